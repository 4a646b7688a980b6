"""Send one chat call to one of several servers that have its model, and to the next if that cannot be reached."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from contextlib import aclosing, closing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import httpx

from langchain_aegis.attempts import Timeouts
from langchain_aegis.client import OllamaClient
from langchain_aegis.errors import AegisConnectionError, AegisError, AegisTimeoutError
from langchain_aegis.pools import Pool
from langchain_aegis.settings import redact_url
from langchain_aegis.traits import Traits

_LOOK = Timeouts(connect_s=1.0, read_s=1.0, deadline_s=1.0)
_UNREACHED = (httpx.ConnectError, httpx.ConnectTimeout)


class Asks(Protocol):
    """One call of one server, ready to be sent."""

    def whole(self) -> dict[str, Any]:
        """Return the answer."""

    async def awhole(self) -> dict[str, Any]:
        """Return the answer, without blocking the event loop."""

    def parts(self) -> Generator[dict[str, Any], None, None]:
        """Yield the parts of the answer."""

    def aparts(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the parts of the answer, without blocking the event loop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """One call, ready to be sent to whichever server suits it.

    Once a part of an answer was given, no other server is asked.

    Attributes:
        pool: The servers; a slot of it is held until the answer is complete.
        turn: What admission is told of the call.
        at: Makes the call of the server at an address.
        client: Returns the client of an address.
        recheck_s: Seconds for which a server that is down is left alone.
    """

    pool: Pool
    turn: Mapping[str, Any]
    at: Callable[[str], Asks]
    client: Callable[[str], OllamaClient]
    recheck_s: float

    def whole(self) -> dict[str, Any]:
        """Return the answer."""
        with self.pool.slot(**self.turn):
            self._look()
            trip = self._trip()
            for address in trip:
                with trip:
                    return self.at(address).whole()
            raise trip.failure()

    async def awhole(self) -> dict[str, Any]:
        """Return the answer, without blocking the event loop."""
        async with self.pool.aslot(**self.turn):
            await self._alook()
            trip = self._trip()
            for address in trip:
                with trip:
                    return await self.at(address).awhole()
            raise trip.failure()

    def parts(self) -> Generator[dict[str, Any], None, None]:
        """Yield the parts of the answer; the last has `done: true`."""
        # Held: whoever reads this stream may call the model in between, and must not wait for the slot taken here.
        with self.pool.slot(**self.turn) as ticket, ticket.held():
            self._look()
            trip = self._trip()
            for address in trip:
                with trip, closing(self.at(address).parts()) as parts:
                    for part in parts:
                        trip.begun = True
                        yield part
                    return
            raise trip.failure()

    async def aparts(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the parts of the answer, without blocking the event loop."""
        async with self.pool.aslot(**self.turn) as ticket:
            with ticket.held():
                await self._alook()
                trip = self._trip()
                for address in trip:
                    with trip:
                        async with aclosing(self.at(address).aparts()) as parts:
                            async for part in parts:
                                trip.begun = True
                                yield part
                            return
                raise trip.failure()

    def _trip(self) -> _Trip:
        return _Trip(self.pool, self.turn["traits"], self.recheck_s)

    def _look(self) -> None:
        """See whether servers that are down are up again, where it is time to; costs no tokens."""
        for address in self.pool.to_look_at(self.recheck_s):
            try:
                self.client(address).version(timeouts=_LOOK)
            except (AegisConnectionError, AegisTimeoutError):
                continue
            except AegisError:
                pass  # it answers, if only that it does not like the question
            self.pool.found(address)

    async def _alook(self) -> None:
        for address in self.pool.to_look_at(self.recheck_s):
            try:
                await self.client(address).aversion(timeouts=_LOOK)
            except (AegisConnectionError, AegisTimeoutError):
                continue
            except AegisError:
                pass
            self.pool.found(address)


class _Trip:
    """One call's way: iterate over the servers to ask, and ask each inside `with trip`.

    The `with` block swallows the error of a server that cannot be reached, unless its answer had begun.
    """

    def __init__(self, pool: Pool, traits: Traits, recheck_s: float) -> None:
        self._pool = pool
        self._traits = traits
        self._recheck_s = recheck_s
        self._tried: list[str] = []
        self._error: AegisConnectionError | None = None
        self.begun = False

    def __iter__(self) -> Iterator[str]:
        while (address := self._pool.choose(self._traits, self._tried, self)) is not None:
            self._tried.append(address)
            yield address

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        address = self._tried[-1]
        self._pool.left(address, self)
        if error is None:
            self._pool.found(address)
        if not isinstance(error, AegisConnectionError) or self.begun:
            return False
        if isinstance(error.__cause__, _UNREACHED):  # not merely a connection that ended, as idle ones do
            self._pool.lost(address, self._recheck_s)
        self._error = error
        return True

    def failure(self) -> AegisConnectionError:
        """Return why no server has answered."""
        where = ", ".join(redact_url(address) for address in self._pool.addresses)
        last = f" ({self._error})" if self._error else ""
        failure = AegisConnectionError(f"none of the servers at {where} can be reached{last}")
        failure.__cause__ = self._error
        return failure
