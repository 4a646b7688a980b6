"""Identical calls that are made at the same time share one call.

A flight is that one call. It belongs to nobody: it runs in an empty context, as a task of its own in an event loop,
and on the opening caller's thread otherwise (on a thread of its own when that caller has a deadline and may leave).
Flights are shared within one event loop, and among the threads that run none; two loops never share one, so the end
of a loop ends nobody else's call.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Awaitable, Callable, Hashable
from contextvars import Context
from typing import Generic, TypeVar

from langchain_aegis.admission import Wait
from langchain_aegis.errors import AegisDeadlineError
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.tickets import Ticket
from langchain_aegis.wakers import Waker, running_loop

T = TypeVar("T")
Enter = Callable[[Wait], Ticket]


class Flights(Generic[T]):
    """The flights that can be joined now.

    Args:
        twin: Returns an independent copy of a result, for each caller but a lone one.
    """

    def __init__(self, twin: Callable[[T], T] = copy.deepcopy) -> None:
        self.twin = twin
        # Re-entrant: a finaliser may leave a seat while its own thread boards.
        self.lock = threading.RLock()
        self._open: dict[asyncio.AbstractEventLoop | None, dict[Hashable, Flight[T]]] = {}
        self._asked: dict[Hashable, int] = {}
        reset_after_fork(self)

    def __len__(self) -> int:
        """Return how many flights can be joined, over all loops and threads."""
        with self.lock:
            return sum(map(len, self._open.values()))

    def __deepcopy__(self, memo: object) -> Flights[T]:
        """A copied model still shares its calls."""
        return self

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
        place = running_loop()
        with self.lock:
            flight = self._open.get(place, {}).get(key)
            if flight is None or flight.closed:
                ticket = enter("refuse")
                if place not in self._open:
                    self._forget_closed_loops()
                flight = Flight(self, place, key, ticket, asked)
                self._open.setdefault(place, {})[key] = flight
                self._asked[asked] = self._asked.get(asked, 0) + 1
            else:
                flight.shared = True
            flight.seats += 1
            return Seat(flight, enter)

    def alone(self, ticket: Ticket, enter: Enter) -> Seat[T]:
        """Return the only seat of a flight that cannot be joined."""
        flight = Flight(self, running_loop(), None, ticket, None)
        flight.seats = 1
        return Seat(flight, enter)

    def close(self, flight: Flight[T]) -> None:
        """Let nobody join `flight` any more."""
        with self.lock:
            flight.closed = True
            here = self._open.get(flight.place, {})
            if here.get(flight.key) is flight:
                del here[flight.key]
                self._forget(flight)
                if not here:
                    del self._open[flight.place]

    def reset(self) -> None:
        """Drop every flight: in the child of a fork they are somebody else's."""
        self.lock = threading.RLock()
        self._open = {}
        self._asked = {}

    def _forget(self, flight: Flight[T]) -> None:
        self._asked[flight.asked] -= 1
        if not self._asked[flight.asked]:
            del self._asked[flight.asked]

    def _forget_closed_loops(self) -> None:
        for loop in [loop for loop in self._open if loop is not None and loop.is_closed()]:
            for flight in self._open.pop(loop).values():
                flight.closed = True
                self._forget(flight)
                flight.ticket.leave()


class Flight(Generic[T]):
    """One call that several callers wait for."""

    __slots__ = ("asked", "closed", "error", "flights", "key", "landed", "place", "result", "seats", "shared",
                 "started", "taken", "task", "ticket", "wakers")  # fmt: skip

    def __init__(
        self,
        flights: Flights[T],
        place: asyncio.AbstractEventLoop | None,
        key: Hashable,
        ticket: Ticket,
        asked: Hashable,
    ) -> None:
        self.flights = flights
        self.place = place
        self.key = key
        self.asked = asked
        self.ticket = ticket
        self.seats = 0
        self.shared = False  # more than one caller took a seat, ever
        self.started = False
        self.closed = False  # nobody can join
        self.landed = False  # it has an outcome
        self.taken = False  # somebody has the result itself, not a copy
        self.result: T | None = None
        self.error: BaseException | None = None
        self.task: asyncio.Task[None] | None = None
        self.wakers: set[Waker] = set()

    def claim(self) -> bool:
        """Return True to the one caller that has to start the call."""
        with self.flights.lock:
            mine, self.started = not self.started, True
            return mine

    def fly(self, work: Callable[[], T]) -> None:
        """Make the call; returns when it has ended, with its outcome kept."""
        try:
            self.ticket.wait()
            with self.ticket.held():
                result = work()
        except Exception as exc:  # whatever it was, each caller gets it
            self._land(None, exc)
        except BaseException as exc:  # an interrupt of this thread: the others make the call themselves
            self._land(None, exc)
            raise
        else:
            self._land(result, None)
        finally:
            self.ticket.leave()

    async def afly(self, work: Callable[[], Awaitable[T]]) -> None:
        """The same in an event loop; runs as a task of its own."""
        try:
            await self.ticket.await_()
            with self.ticket.held():
                result = await work()
        except Exception as exc:  # whatever it was, each caller gets it
            self._land(None, exc)
        except BaseException as exc:  # cancelled: by the last caller's leaving, or from outside
            self._land(None, exc)
            raise
        else:
            self._land(result, None)
        finally:
            self.ticket.leave()

    def end(self, task: asyncio.Task[None]) -> None:
        """Clean up after a task that was cancelled before its first step: nothing of it ran."""
        if not self.landed:
            self._land(None, asyncio.CancelledError())
            self.ticket.leave()

    def _land(self, result: T | None, error: BaseException | None) -> None:
        with self.flights.lock:
            self.flights.close(self)
            self.result, self.error, self.landed = result, error, True
            wakers, self.wakers = self.wakers, set()
        for waker in wakers:
            waker.wake()

    def wait_for(self, waker: Waker) -> bool:
        """Have `waker` woken at the end; False when that has come already."""
        with self.flights.lock:
            if not self.landed:
                self.wakers.add(waker)
            return not self.landed

    def leave(self) -> None:
        """One caller goes; the last one's leaving stops the call as far as it can be stopped."""
        with self.flights.lock:
            self.seats -= 1
            if self.seats or self.landed:
                return
            self.flights.close(self)  # before the cancel: nobody joins a dying flight
        if not self.started:
            self.ticket.leave()
        elif self.place is None:
            self.ticket.expire()
        elif self.task is not None and not self.place.is_closed():
            if running_loop() is self.place:
                self.task.cancel()
            else:
                self.place.call_soon_threadsafe(self.task.cancel)

    def outcome(self) -> tuple[bool, T | None]:
        """Return True with one caller's own result, or raise its own error; False when the call was lost."""
        if self.error is not None:
            if not isinstance(self.error, Exception):
                return False, None
            if not self.shared:
                raise self.error
            raise own_error(self.error) from self.error
        if not self.shared:
            return True, self.result
        try:
            return True, self.flights.twin(self.result)  # type: ignore[arg-type]
        except Exception:  # a result of any type that cannot be copied: one caller has it, the others call again
            with self.flights.lock:
                first, self.taken = not self.taken, True
            return first, self.result


class Seat(Generic[T]):
    """One caller's share of a flight."""

    __slots__ = ("_enter", "_flight", "_left")

    def __init__(self, flight: Flight[T], enter: Enter) -> None:
        self._flight = flight
        self._enter = enter
        self._left = False

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
            if not flight.landed and flight.wait_for(waker := Waker(None)):
                waker.wait(_remaining_s(deadline))
                self._check_landed(waker)
            known, result = flight.outcome()
            if not known:
                ticket = self._enter("queue")
                try:
                    ticket.wait()
                    with ticket.held():
                        return Context().run(work)
                finally:
                    ticket.leave()
            return result  # type: ignore[return-value]
        finally:
            self.leave()

    async def aresult(self, work: Callable[[], Awaitable[T]], deadline: float | None = None) -> T:
        """As `result`, for a coroutine. Cancelling it leaves the seat."""
        flight = self._flight
        try:
            loop = asyncio.get_running_loop()
            if flight.claim():
                flight.task = loop.create_task(flight.afly(work), context=Context())
                flight.task.add_done_callback(flight.end)
            if not flight.landed and flight.wait_for(waker := Waker(loop)):
                try:
                    await waker.await_(_remaining_s(deadline))
                finally:
                    flight.wakers.discard(waker)
                self._check_landed(waker)
            known, result = flight.outcome()
            if not known:
                ticket = self._enter("queue")
                try:
                    await ticket.await_()
                    with ticket.held():
                        return await loop.create_task(_call(work), context=Context())
                finally:
                    ticket.leave()
            return result  # type: ignore[return-value]
        finally:
            self.leave()

    def leave(self) -> None:
        """Give the seat up; later calls do nothing."""
        if not self._left:
            self._left = True
            self._flight.leave()

    def detach(self) -> Ticket | None:
        """Leave the flight; returns its ticket if nobody else has a seat and it has not started."""
        flight = self._flight
        with flight.flights.lock:
            if self._left or flight.started or flight.seats > 1:
                ticket = None
            else:
                ticket = flight.ticket
                flight.landed = True  # so that leaving does not give the ticket back
                flight.flights.close(flight)
        self.leave()
        return ticket

    def _check_landed(self, waker: Waker) -> None:
        if not self._flight.landed:
            self._flight.wakers.discard(waker)
            raise AegisDeadlineError("the deadline passed before the answer was complete")


async def _call(work: Callable[[], Awaitable[T]]) -> T:
    return await work()


def _remaining_s(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def own_error(error: Exception) -> Exception:
    """Return another instance of `error`, or `error` itself if its class makes none."""
    try:
        twin = copy.copy(error)
    except Exception:  # a constructor with other arguments than `args`
        try:
            twin = type(error).__new__(type(error), *error.args)
            twin.__dict__.update(error.__dict__)
        except Exception:  # an extension type without a constructor
            return error
    if type(twin) is not type(error) or str(twin) != str(error):
        return error
    if notes := getattr(error, "__notes__", None):
        twin.__notes__ = list(notes)
    return twin
