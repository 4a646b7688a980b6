"""Give a stream another process's answer while it is made there, to all that ask for it here.

Those of one process read it once: the first of them reads for all, as for a call of the model that they share.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractContextManager, aclosing, nullcontext
from typing import Any, Final, cast

from langchain_core.outputs import ChatGenerationChunk, ChatResult

from langchain_aegis.copies import CHAT_FORMS
from langchain_aegis.errors import AegisStreamError
from langchain_aegis.flights import Flights, LostFlightError, Seat
from langchain_aegis.replays import BrokenOff, StreamEntry, as_chunks
from langchain_aegis.tickets import Ticket

_ROUNDS: Final = 3  # of looking for it again, after who made it has gone


class _NoTicket:
    """A place in no queue: nothing is asked of the model's server."""

    def wait(self) -> None:
        pass

    async def await_(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def expire(self) -> None:
        pass

    def held(self) -> AbstractContextManager[None]:
        return nullcontext()


_NO_TICKET: Final = cast("Ticket", _NoTicket())
followed: Final[Flights[ChatResult]] = Flights(CHAT_FORMS)


def found(entry: StreamEntry, deadline: float | None = None) -> Iterator[ChatGenerationChunk]:
    """Yield the answer that is kept, or that another process makes; none: this caller makes it. As `others`."""
    if (hit := entry.lookup()) is not None:
        yield from as_chunks(hit)
    else:
        yield from others(entry, deadline)


async def afound(entry: StreamEntry, deadline: float | None = None) -> AsyncGenerator[ChatGenerationChunk]:
    """Do what `found` does, without blocking the event loop."""
    if (hit := await entry.alookup()) is not None:
        for chunk in as_chunks(hit):
            yield chunk
        return
    async with aclosing(aothers(entry, deadline)) as chunks:
        async for chunk in chunks:
            yield chunk


def others(entry: StreamEntry, deadline: float | None = None) -> Iterator[ChatGenerationChunk]:
    """Yield the answer that another process makes; none: this caller makes it.

    Args:
        entry: A lookup of which missed.
        deadline: Time of `time.monotonic()` at which this caller leaves.

    Raises:
        AegisStreamError: It broke off, and a part of it was given.
        AegisDeadlineError: The deadline passed.
    """
    for _ in range(_ROUNDS):
        if (seat := _seat(entry)) is None:
            return
        given: list[str] = []
        chunks = seat.stream(entry.relay.follow, deadline)
        try:
            for chunk in chunks:
                given.append(str(chunk.text))
                yield chunk
            return
        except (BrokenOff, LostFlightError) as exc:
            lost: Exception = exc
        finally:
            chunks.close()
            seat.leave()
        if _is_hopeless(lost, given):
            break
        if (hit := entry.lookup()) is not None:
            yield from as_chunks(hit)
            return
    _lead(entry)


async def aothers(entry: StreamEntry, deadline: float | None = None) -> AsyncGenerator[ChatGenerationChunk]:
    """Do what `others` does, without blocking the event loop."""
    for _ in range(_ROUNDS):
        if (seat := _seat(entry)) is None:
            return
        given: list[str] = []
        chunks: AsyncGenerator[Any] = seat.astream(entry.relay.afollow, deadline)
        try:
            async for chunk in chunks:
                given.append(str(chunk.text))
                yield chunk
            return
        except (BrokenOff, LostFlightError) as exc:
            lost: Exception = exc
        finally:
            await chunks.aclose()
            seat.leave()
        if _is_hopeless(lost, given):
            break
        if (hit := await entry.alookup()) is not None:
            for chunk in as_chunks(hit):
                yield chunk
            return
    _lead(entry)


def _seat(entry: StreamEntry) -> Seat[ChatResult] | None:
    """Return a place among those who read the same; None: this caller makes the answer."""
    if entry.relay is None or entry.relay.leads:
        _lead(entry)
        return None
    return followed.board(entry.relay.key, lambda _: _NO_TICKET)


def _lead(entry: StreamEntry) -> None:
    """Begin to pass on what this caller makes, if others wait for it; else whatever it makes is its own."""
    if entry.relay is None:
        return
    if entry.relay.leads:
        entry.relay.begin()
    else:
        entry.relay = None


def _is_hopeless(lost: Exception, given: list[str]) -> bool:
    """Return whether it is no use to look again; raise if a part of the answer was given."""
    if given:
        raise AegisStreamError(
            "the answer broke off: another process made it, and does not go on. Ask again", partial="".join(given)
        ) from lost
    return str(lost) == "late"
