"""How long one request may take, and when it is sent again."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import httpx

from langchain_aegis.deadlines import Until
from langchain_aegis.errors import AegisConnectionError, AegisError, AegisOverloadedError, AegisTimeoutError
from langchain_aegis.settings import AegisSettings

_FIRST_WAIT_S = 0.25
_MAX_WAIT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Bounds of one request in seconds; None is no bound.

    `connect_s` is for reaching the server, `read_s` for the time between two pieces of a streamed answer, and
    `deadline_s` for the whole. An answer that is not streamed comes in one piece: only its deadline counts.
    """

    connect_s: float | None = 5.0
    read_s: float | None = 120.0
    deadline_s: float | None = 600.0

    @classmethod
    def of(cls, settings: AegisSettings) -> Self:
        """Return the bounds that the settings name."""
        return cls(connect_s=settings.connect_timeout_s, read_s=settings.read_timeout_s, deadline_s=settings.deadline_s)

    def within(self, deadline_s: float | None) -> Timeouts:
        """Return these bounds with another deadline; None keeps them."""
        if deadline_s is None:
            return self
        read_s = deadline_s if self.read_s is None else min(self.read_s, deadline_s)
        return replace(self, deadline_s=deadline_s, read_s=read_s)

    def like(self, timeout: Any) -> Timeouts:
        """Return these bounds with those of an httpx `timeout=` argument."""
        told = httpx.Timeout(timeout)
        return replace(
            self, connect_s=told.connect, read_s=told.read, deadline_s=None if told.read is None else self.deadline_s
        )

    def of_http(self, *, whole: bool = False) -> httpx.Timeout:
        """Return the bounds that httpx can keep; `whole` for an answer that comes in one piece."""
        read_s = self.deadline_s if whole else self.read_s
        return httpx.Timeout(connect=self.connect_s, read=read_s, write=self.read_s, pool=self.read_s)


def attempts(bounds: Timeouts, retries: int) -> Iterator[Attempt]:
    """Yield the tries of one request; all of them share its deadline."""
    ends = math.inf if bounds.deadline_s is None else time.monotonic() + bounds.deadline_s
    for number in range(retries + 1):
        yield Attempt(number, number == retries, bounds.deadline_s, ends)


class Attempt:
    """One try of a request."""

    __slots__ = ("_deadline_s", "_ends", "_last", "_number")

    def __init__(self, number: int, last: bool, deadline_s: float | None, ends: float) -> None:
        self._number = number
        self._last = last
        self._deadline_s = deadline_s
        self._ends = ends

    def check(self) -> None:
        """Raise AegisTimeoutError if the deadline has passed."""
        if time.monotonic() > self._ends:
            raise self._late()

    def ends_within(self, seconds: float | None) -> bool:
        """Say whether the deadline comes before `seconds` have passed; None is no bound."""
        return self._ends < (math.inf if seconds is None else time.monotonic() + seconds)

    def bound(self, at_most_s: float = math.inf) -> _Bound:
        """Return a context that stops what runs inside at the deadline, with an AegisTimeoutError."""
        return _Bound(self, min(self._ends - time.monotonic(), at_most_s))

    def blocking(self, at_most_s: float = math.inf) -> _Blocking:
        """Do what `bound` does for a thread that waits for a client of `deadlines.bounded`."""
        return _Blocking(self, min(self._ends, math.inf if at_most_s == math.inf else time.monotonic() + at_most_s))

    def wait_s(self, error: AegisError, begun: bool) -> float:
        """Return the seconds to wait before the next attempt; raise `error` if there is none."""
        again = isinstance(error, (AegisConnectionError, AegisOverloadedError)) and not begun and not self._last
        if not again:
            raise error
        wait_s = error.retry_after_s if isinstance(error, AegisOverloadedError) else _FIRST_WAIT_S * 2**self._number
        if wait_s > _MAX_WAIT_S or time.monotonic() + wait_s > self._ends:
            raise error
        return wait_s

    def _late(self) -> AegisTimeoutError:
        return AegisTimeoutError(
            f"the answer was not complete after {self._deadline_s} s; AEGIS_DEADLINE_S or `timeout=` gives it longer"
        )


class _Bound:
    __slots__ = ("_attempt", "_timeout")

    def __init__(self, attempt: Attempt, left_s: float) -> None:
        self._attempt = attempt
        self._timeout = asyncio.timeout(None if left_s == math.inf else left_s)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as exc:
            raise self._attempt._late() from exc


class _Blocking(Until):
    __slots__ = ("_attempt",)

    def __init__(self, attempt: Attempt, ends: float) -> None:
        super().__init__(ends)
        self._attempt = attempt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, httpx.TimeoutException) and time.monotonic() >= self._ends:
            raise self._attempt._late() from error
