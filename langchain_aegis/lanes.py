"""What waits and what is under way in one event loop, or in the threads that run none."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

from langchain_aegis.errors import AegisDeadlineError
from langchain_aegis.own_errors import own_error
from langchain_aegis.pulses import Pulse
from langchain_aegis.wakers import Waker, running_loop

V = TypeVar("V")
Place = asyncio.AbstractEventLoop | None  # None: a thread that runs no event loop

_DOCUMENTS_TURN = 8  # so many requests take queries first, then one takes documents first


class Performer(Protocol):
    """Does what a request's flow asks for."""

    def perform(self, step: Any) -> Any:
        """Do a step, blocking."""

    async def aperform(self, step: Any) -> Any:
        """Do a step in the running event loop."""


class Wish(Generic[V]):
    """A text, and those who wait for what belongs to it."""

    __slots__ = ("_error", "_lock", "_value", "_wakers", "blamed", "document", "flight", "landed", "lane", "performer",
                 "seats", "text")  # fmt: skip

    def __init__(self, text: str, lane: Lane[V], performer: Performer, lock: Any, *, document: bool) -> None:
        self.text = text
        self.document = document
        self.lane = lane
        self.performer = performer
        self.seats = 0
        self.flight: Flight[V] | None = None  # the request that it went into
        self.landed = False
        self.blamed = False  # the error that it landed with is this text's own
        self._lock = lock
        self._value: V | None = None
        self._error: BaseException | None = None
        self._wakers: list[Waker] = []

    def wait_for(self, waker: Waker) -> bool:
        """Have `waker` woken at the end; False: it has come already."""
        with self._lock:
            if not self.landed:
                self._wakers.append(waker)
            return not self.landed

    def land(self, value: V | None, error: BaseException | None = None) -> None:
        """Keep the outcome and tell everybody; later calls do nothing."""
        with self._lock:
            if self.landed:
                return
            self._value, self._error, self.landed = value, error, True
            if self.lane.wishes.get(self.text) is self:
                del self.lane.wishes[self.text]
            wakers, self._wakers = self._wakers, []
        for waker in wakers:
            with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits there any more
                waker.wake()

    def value(self) -> V:
        """Return the value, which others may have too, or raise one caller's own error."""
        if isinstance(self._error, Exception):
            raise own_error(self._error) from self._error
        if self._error is not None:
            raise LostError
        return self._value  # type: ignore[return-value] # landed without an error


class Lane(Generic[V]):
    """What goes on in one event loop, or in the threads that run none."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.wishes: dict[str, Wish[V]] = {}  # waiting or under way, by text
        self.flights: set[Flight[V]] = set()
        self.size = 0  # wishes that wait
        self.chars = 0  # of their texts
        self.halved = False  # the last request left the other half to the next one
        self.empty = 0  # requests that have not chosen their texts yet
        self._pulse = Pulse(place) if place is not None else None
        self._waiting: tuple[deque[Wish[V]], deque[Wish[V]]] = deque(), deque()  # queries, documents
        self._turn = 0

    def add(self, wish: Wish[V]) -> None:
        """Let a wish wait."""
        self.wishes[wish.text] = wish
        self._waiting[wish.document].append(wish)
        self.size += 1
        self.chars += len(wish.text)

    def give_back(self, wishes: Sequence[Wish[V]]) -> None:
        """Let wishes that were taken go before all others."""
        for wish in reversed(wishes):
            self._waiting[wish.document].appendleft(wish)
            self.size += 1
            self.chars += len(wish.text)

    def leave(self, wish: Wish[V]) -> None:
        """Note that nobody waits for a wish any more."""
        self.size -= 1
        self.chars -= len(wish.text)

    def take(self, most: int, most_chars: float) -> list[Wish[V]]:
        """Return the next request's wishes, which wait no more: at most so many, or characters, but one at least."""
        self._turn += 1
        queries, documents = self._waiting
        queues = (documents, queries) if self._turn % _DOCUMENTS_TURN == 0 else (queries, documents)
        taken: list[Wish[V]] = []
        chars = 0
        for queue in queues:
            while queue and len(taken) < most:
                wish = queue[0]
                if wish.seats:
                    chars += len(wish.text)
                    if taken and chars > most_chars:
                        return taken
                    self.leave(wish)
                    taken.append(wish)
                queue.popleft()
        return taken

    def is_over(self) -> bool:
        """Whether its event loop is closed."""
        return self.place is not None and self.place.is_closed()

    def patience_s(self, here: Place, deadline: float | None) -> float | None:
        """Return for how long somebody at `here` waits before looking whether that still makes sense."""
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if self._pulse is None or self.place is here:
            return left
        due = self._pulse.due_s()
        return due if left is None else min(due, left)

    def check(self, here: Place, deadline: float | None) -> None:
        """Raise what ends the waiting of somebody at `here`."""
        if deadline is not None and time.monotonic() >= deadline:
            raise AegisDeadlineError("the deadline passed before the vector was there")
        if self._pulse is not None and self.place is not here and self._pulse.stopped():
            raise LostError


class Flight(Generic[V]):
    """One request."""

    def __init__(self, lane: Lane[V], ticket: Any) -> None:
        self.lane = lane
        self.ticket = ticket
        self.wishes: list[Wish[V]] = []
        self.loaded = False  # its texts are chosen
        self.landed = False
        self.stopped = False
        self.interrupt: BaseException | None = None  # of the thread that made it
        self.task: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """End a request that nobody wants, as far as it can be ended."""
        self.stopped = True
        place = self.lane.place
        if self.task is None or place is None:
            self.ticket.expire()
        elif running_loop() is place:
            self.task.cancel()
        else:
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                place.call_soon_threadsafe(self.task.cancel)


class LostError(Exception):
    """The request came to nothing: it was cancelled, or its event loop is blocked."""
