"""Identical calls that are made at the same time share one call.

The shared call (a `Flight`) belongs to nobody: it runs in an empty context, as a task of its own in an event loop, and
otherwise on the thread of whoever starts it (on a thread of its own when that caller has a deadline and may leave).
Threads and event loops share flights with each other. Whoever waits for another event loop asks it for a sign of life
now and then, and makes the call itself if there is none: that loop may be waiting for this very caller.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Hashable, Iterator
from contextvars import Context
from typing import Any, Generic, TypeVar

from langchain_aegis.admission import Wait
from langchain_aegis.broadcasts import Flight, Forms, Source
from langchain_aegis.errors import AegisDeadlineError, AegisStreamError
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.own_errors import own_error
from langchain_aegis.tickets import Ticket
from langchain_aegis.wakers import Waker, running_loop

__all__ = ["Flights", "LostFlightError", "Seat", "own_error"]

T = TypeVar("T")
Enter = Callable[[Wait], Ticket]


class LostFlightError(Exception):
    """The shared call came to nothing: its event loop ended or is blocked. Nothing of it was handed out.

    Args:
        blocked: It may still hold its slot, and wait for whoever is told this.
    """

    def __init__(self, *, blocked: bool) -> None:
        super().__init__("the call that was shared is lost")
        self.blocked = blocked


class Flights(Generic[T]):
    """The flights that can be joined now.

    Args:
        forms: How answers are copied for each caller but a lone one, and streamed.
    """

    def __init__(self, forms: Forms[T] | None = None) -> None:
        self.forms: Forms[T] = Forms() if forms is None else forms
        self.reset()
        reset_after_fork(self)

    def __len__(self) -> int:
        """Return how many flights can be joined."""
        return len(self._open)

    def __deepcopy__(self, memo: object) -> Flights[T]:
        """A copied model still shares its calls."""
        return self

    @property
    def seats(self) -> int:
        """How many callers share the flights that can be joined."""
        with self.lock:
            return sum(flight.seats for flight in self._open.values())

    def flies(self, asked: Hashable) -> bool:
        """Whether any flight was opened with `asked`: a quick look, before a key is made."""
        return asked in self._asked

    def board(self, key: Hashable, enter: Enter, asked: Hashable = None) -> Seat[T]:
        """Join the flight for `key`, or open one. Never waits; whoever asks first for a result starts it.

        Args:
            key: Calls with equal keys have the same answer.
            asked: The part of the key that is quickly told, for `flies`.
            enter: Makes the flight's ticket, `enter("refuse")`; its errors are raised and open no flight.

        Returns:
            This caller's seat; it must be left.
        """
        with self.lock:
            flight = self._open.get(key)
            if flight is not None and flight.place is not None and flight.place.is_closed():
                self._bury(flight)
                flight = None
            joins = flight is not None
            if flight is None:
                ticket = enter("refuse")
                if (loop := running_loop()) not in self._loops:
                    for gone in [f for f in self._open.values() if f.place is not None and f.place.is_closed()]:
                        self._bury(gone)
                    self._loops.intersection_update(f.place for f in self._open.values())
                    self._loops.add(loop)
                flight = Flight(self.lock, self.forms, self._forget, key, asked, ticket)
                self._open[key] = flight
                self._asked[asked] = self._asked.get(asked, 0) + 1
            else:
                flight.shared = True
            flight.seats += 1
            return Seat(flight, enter, joins=joins)

    def alone(self, ticket: Ticket, enter: Enter) -> Seat[T]:
        """Return the only seat of a flight that cannot be joined."""
        flight = Flight(self.lock, self.forms, self._forget, None, None, ticket)
        flight.closed, flight.seats = True, 1
        return Seat(flight, enter)

    def reset(self) -> None:
        """Drop every flight: in the child of a fork they are somebody else's."""
        # Re-entrant: a finaliser may leave a seat while its own thread boards.
        self.lock = threading.RLock()
        self._open: dict[Hashable, Flight[T]] = {}
        self._asked: dict[Hashable, int] = {}
        self._loops: set[asyncio.AbstractEventLoop | None] = set()  # where flights were opened, as far as looked

    def _forget(self, flight: Flight[T]) -> None:
        if self._open.get(flight.key) is flight:
            del self._open[flight.key]
            self._asked[flight.asked] -= 1
            if not self._asked[flight.asked]:
                del self._asked[flight.asked]

    def _bury(self, flight: Flight[T]) -> None:
        flight.close()
        flight.ticket.leave()


class Seat(Generic[T]):
    """One caller's share of a flight.

    Attributes:
        joins: Another caller opened the flight.
    """

    __slots__ = ("_enter", "_flight", "_left", "joins")

    def __init__(self, flight: Flight[T], enter: Enter, *, joins: bool = False) -> None:
        self._flight = flight
        self._enter = enter
        self._left = False
        self.joins = joins

    def result(self, work: Callable[[], T], deadline: float | None = None, context: Context | None = None) -> T:
        """Wait for the call's result, after starting it if nobody has; leaves the seat.

        Args:
            work: Makes the call; used by whoever comes first.
            deadline: Time of `time.monotonic()` at which this caller leaves.
            context: The context to make the call in, for a flight that is not shared; an empty one else.

        Raises:
            AegisDeadlineError: The deadline passed; the call goes on while others wait for it.
            Exception: What the call raised, as an instance of this caller's own.
        """
        flight, context = self._flight, context or Context()
        try:
            if flight.claim():
                if deadline is None:
                    context.run(flight.fly, work)
                else:
                    threading.Thread(
                        target=context.run, args=(flight.fly, work), name="aegis-flight", daemon=True
                    ).start()
            try:
                while not flight.landed:
                    self._wait(deadline, None)
                return self._own_result()
            except LostFlightError as lost:
                ticket = self.own_ticket(lost)
            try:
                ticket.wait()
                with ticket.held():
                    return Context().run(work)
            finally:
                ticket.leave()
        finally:
            self.leave()

    async def aresult(self, work: Callable[[], Awaitable[T]], deadline: float | None = None) -> T:
        """As `result`, for a coroutine. Cancelling it leaves the seat."""
        flight = self._flight
        try:
            loop = asyncio.get_running_loop()
            if flight.claim():
                self._start(loop, work)
            try:
                while not flight.landed:
                    await self._await(loop, deadline, None)
                return self._own_result()
            except LostFlightError as lost:
                ticket = self.own_ticket(lost)
            try:
                await ticket.await_()
                with ticket.held():
                    return await loop.create_task(_call(work), context=Context())
            finally:
                ticket.leave()
        finally:
            self.leave()

    def stream(self, start: Callable[[], Iterator[Any]], deadline: float | None = None) -> Generator[Any]:
        """Yield the call's chunks, each a copy of this caller's own, from the first one on; leaves the seat.

        Args:
            start: Opens the stream, on whoever's thread; used by whoever comes first.
            deadline: Time of `time.monotonic()` at which this caller leaves.

        Raises:
            LostFlightError: The call was lost before there was a chunk; nothing was yielded.
            AegisStreamError: It was lost later.
            AegisDeadlineError: The deadline passed; the call goes on while others wait for it.
            Exception: What the call raised, as an instance of this caller's own.
        """
        flight, seen = self._flight, 0
        try:
            flight.claim(streams=True, source=Source(start))
            while True:
                for chunk in self._chunks_from(seen):
                    seen += 1
                    yield chunk
                if flight.landed and seen >= len(flight.chunks or ()):
                    break
                if flight.begin_pull():
                    flight.pull()
                    if deadline is not None and time.monotonic() >= deadline:
                        raise AegisDeadlineError(_LATE)
                elif not flight.landed:
                    self._wait(deadline, seen)
            if flight.chunks is None:
                yield from self._pieces()
            elif not flight.outcome():
                raise LostFlightError(blocked=False)
        except LostFlightError as lost:
            self._give_up(lost, seen)
        finally:
            self.leave()

    async def astream(
        self, start: Callable[[], AsyncIterator[Any]], deadline: float | None = None
    ) -> AsyncGenerator[Any]:
        """As `stream`, in an event loop."""
        flight, seen = self._flight, 0
        loop = asyncio.get_running_loop()
        try:
            if flight.claim(streams=True):
                self._start(loop, lambda: flight.apump(start))
            while True:
                for chunk in self._chunks_from(seen):
                    seen += 1
                    yield chunk
                if not flight.landed:
                    await self._await(loop, deadline, seen)
                elif seen >= len(flight.chunks or ()):
                    break
            if flight.chunks is None:
                for chunk in self._pieces():
                    yield chunk
            elif not flight.outcome():
                raise LostFlightError(blocked=False)
        except LostFlightError as lost:
            self._give_up(lost, seen)
        finally:
            self.leave()
            if not flight.seats and flight.task is not None and flight.place is loop:
                await asyncio.wait([flight.task])  # the model's stream is closed when this one is

    def leave(self) -> None:
        """Give the seat up; later calls do nothing."""
        if not self._left:
            self._left = True
            self._flight.leave()

    def detach(self) -> Ticket | None:
        """Leave the flight; returns its ticket if nobody else has a seat and it has not started."""
        flight = self._flight
        with flight.lock:
            if self._left or flight.started or flight.seats > 1:
                ticket = None
            else:
                ticket = flight.ticket
                flight.landed = True  # so that leaving does not give the ticket back
                flight.close()
        self.leave()
        return ticket

    def own_ticket(self, lost: LostFlightError) -> Ticket:
        """Return a ticket for making a call alone that was lost for all."""
        ticket = self._enter("patient")
        if lost.blocked:
            # Slots may be held by calls of the loop that is blocked, maybe until this very call has ended.
            ticket.admission._overrun(ticket)
        return ticket

    def _start(self, loop: asyncio.AbstractEventLoop, work: Callable[[], Awaitable[T | None]]) -> None:
        flight = self._flight
        task = loop.create_task(flight.afly(work), context=Context())
        flight.task = task
        task.add_done_callback(flight.end)

    def _chunks_from(self, seen: int) -> Iterator[Any]:
        flight = self._flight
        while flight.chunks is not None and seen < len(flight.chunks):
            yield flight.forms.copy_chunk(flight.chunks[seen], not self.joins)
            seen += 1

    def _own_result(self) -> T:
        if not self._flight.outcome():
            raise LostFlightError(blocked=False)
        known, result = self._flight.own_result()
        if not known:
            raise LostFlightError(blocked=False)
        return result  # type: ignore[return-value]

    def _pieces(self) -> list[Any]:
        """Return an answer that was not streamed as chunks."""
        pieces = self._flight.forms.pieces
        found = None if pieces is None else pieces(self._own_result())
        if found is None:
            raise LostFlightError(blocked=False)
        return found

    def _give_up(self, lost: LostFlightError, seen: int) -> None:
        if not seen:
            raise lost
        chunks = (self._flight.chunks or ())[:seen]
        raise AegisStreamError(
            "the answer broke off: it was shared with a caller whose event loop has ended or is blocked. Ask again",
            partial="".join(str(getattr(chunk, "text", "")) for chunk in chunks),
        ) from lost

    def _wait(self, deadline: float | None, seen: int | None) -> None:
        """Block until the flight has landed, or has more than `seen` chunks, or can be read on by this thread."""
        flight, waker = self._flight, Waker(None)
        if flight.source is not None and seen is None:
            flight.have_pumped()
        if flight.place is not None and flight.place is running_loop():
            raise LostFlightError(blocked=True)  # this thread would have to finish it
        if not flight.wait_for(waker, seen):
            return
        try:
            while not waker.woken:
                waker.wait(self._patience_s(deadline, None))
                if not waker.woken:
                    self._check(deadline, None)
        finally:
            flight.unwait(waker)

    async def _await(self, loop: asyncio.AbstractEventLoop, deadline: float | None, seen: int | None) -> None:
        """As `_wait`, in an event loop, which never reads a blocking stream by itself."""
        flight, waker = self._flight, Waker(loop)
        if flight.source is not None:
            flight.have_pumped()
        if not flight.wait_for(waker, seen):
            return
        try:
            while not waker.woken:
                await waker.await_(self._patience_s(deadline, loop))
                if not waker.woken:
                    self._check(deadline, loop)
        finally:
            flight.unwait(waker)

    def _patience_s(self, deadline: float | None, here: asyncio.AbstractEventLoop | None) -> float | None:
        """Return for how long to wait before looking whether that still makes sense."""
        flight = self._flight
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if flight.pulse is None or flight.place is here:
            return left
        due = flight.pulse.due_s()
        return due if left is None else min(due, left)

    def _check(self, deadline: float | None, here: asyncio.AbstractEventLoop | None) -> None:
        flight = self._flight
        if deadline is not None and time.monotonic() >= deadline:
            raise AegisDeadlineError(_LATE)
        if flight.pulse is not None and flight.place is not here and flight.pulse.stopped():
            flight.close()  # nobody else shall wait for it
            raise LostFlightError(blocked=True)


_LATE = "the deadline passed before the answer was complete"


async def _call(work: Callable[[], Awaitable[T]]) -> T:
    return await work()
