"""At most N calls of a server run, at most M wait, the rest is refused at once.

An `Admission` is shared by sync threads, by any number of event loops and by one `asyncio.run` after another. A call
takes a `Ticket`, which is either a slot or a place in the queue; `Admission._next` alone decides who runs next. A
slot is handed on directly, so a free slot and a waiting call never exist together.

A ticket may be given back from a finaliser that interrupts its own thread inside this module. Giving back therefore
never waits for the lock: the ticket is put on a list, and whoever holds the lock settles that list when letting go.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

from langchain_aegis.errors import (
    AegisClosedError,
    AegisConfigError,
    AegisDeadlineError,
    AegisOverloadedError,
)
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.tickets import State, Ticket, held_tickets
from langchain_aegis.wakers import Waker

MAX_CONCURRENCY = 4
MAX_WAITING = 100
Wait = Literal["refuse", "queue"]

_FIRST_GUESS_S = 1.0  # a service time before any was measured
_SMOOTHING = 0.2  # weight of the newest service time
_LONGEST_RETRY_S = 60.0
_DEAD_LOOP_CHECK_S = 1.0


@dataclass(frozen=True, slots=True)
class AdmissionStats:
    """One moment of an `Admission`: gauges first, then counts since it was made."""

    max_concurrency: int
    max_waiting: int
    running: int
    waiting: int  # calls that count against max_waiting
    waiting_bulk: int  # items of batches, which do not count
    served: int
    refused: int
    expired: int
    service_s: float | None  # smoothed time that a slot is held, in seconds


class Admission:
    """Slots and a bounded queue for the calls of one server.

    Args:
        max_concurrency: Most calls that run at once.
        max_waiting: Most calls that wait; items of a batch wait without counting.
        clock: Seconds, monotonic; for tests.

    Raises:
        AegisConfigError: A bound is out of range.
    """

    def __init__(
        self,
        max_concurrency: int = MAX_CONCURRENCY,
        max_waiting: int = MAX_WAITING,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_bounds(max_concurrency=max_concurrency, max_waiting=max_waiting)
        self._max_concurrency = max_concurrency
        self._max_waiting = max_waiting
        self._clock = clock
        self._closed = False
        self._served = self._refused = self._expired = 0
        self._service_s: float | None = None
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Forget every call: in the child of a fork they are somebody else's."""
        self._lock = threading.Lock()
        self._running: set[Ticket] = set()
        self._queue: OrderedDict[Ticket, None] = OrderedDict()
        self._counted = 0  # waiting calls that count against max_waiting
        self._gone: deque[Ticket] = deque()
        self._idle: list[Waker] = []
        self._next_purge = 0.0

    def __deepcopy__(self, memo: Any) -> Self:
        """A copied model still talks to the same server."""
        return self

    @property
    def max_concurrency(self) -> int:
        """Most calls that run at once."""
        return self._max_concurrency

    @property
    def max_waiting(self) -> int:
        """Most calls that wait, items of batches not counted."""
        return self._max_waiting

    @property
    def closed(self) -> bool:
        """Whether new calls are turned away for good."""
        return self._closed

    @property
    def full(self) -> bool:
        """Whether `enter` would refuse a call now; without a lock, so it may be wrong a moment later."""
        return self._counted >= self._max_waiting and len(self._running) >= self._max_concurrency

    def enter(self, *, wait: Wait = "refuse", deadline_s: float | None = None, deadline: float | None = None) -> Ticket:
        """Take a slot, or a place in the queue, without waiting for anything.

        Args:
            wait: "refuse" when `max_waiting` calls wait already, or "queue" whatever happens (items of a batch).
            deadline_s: Seconds from now until which the call must have started.
            deadline: The same as a time of the clock (`time.monotonic()`); the earlier one counts.

        Returns:
            A ticket; `wait` or `await_` it, and `leave` it in a `finally`.

        Raises:
            AegisOverloadedError: The queue is full; nothing was taken.
            AegisDeadlineError: The deadline has passed already.
            AegisClosedError: The admission was closed.
        """
        if deadline_s is not None:
            own = self._clock() + deadline_s
            deadline = own if deadline is None else min(own, deadline)
        if (held := held_tickets.get()) and any(t.admission is self and t.running for t in held):
            return Ticket(self, State.RIDING, bulk=False, deadline=deadline)
        bulk = wait == "queue"
        try:
            with self._lock:
                if self._closed:
                    raise AegisClosedError("this admission was closed; it takes no new calls")
                if deadline is not None and deadline <= self._clock():
                    self._expired += 1
                    raise AegisDeadlineError("the deadline had passed before the call was made; nothing was sent")
                if len(self._running) < self._max_concurrency or self._reclaimed():
                    ticket = Ticket(self, State.RUNNING, bulk=bulk, deadline=deadline)
                    self._running.add(ticket)
                    return ticket
                if not bulk and self._counted >= self._max_waiting and not self._purged():
                    self._refused += 1
                    raise self._overloaded()
                ticket = Ticket(self, State.WAITING, bulk=bulk, deadline=deadline)
                self._queue[ticket] = None
                self._counted += not bulk
                return ticket
        finally:
            if self._gone:
                self._settle()

    @contextlib.contextmanager
    def slot(
        self, *, wait: Wait = "refuse", deadline_s: float | None = None, deadline: float | None = None
    ) -> Iterator[Ticket]:
        """Hold a slot for the length of a `with` block; arguments and errors as in `enter` and `Ticket.wait`."""
        ticket = self.enter(wait=wait, deadline_s=deadline_s, deadline=deadline)
        try:
            ticket.wait()
            yield ticket
        finally:
            ticket.leave()

    @contextlib.asynccontextmanager
    async def aslot(
        self, *, wait: Wait = "refuse", deadline_s: float | None = None, deadline: float | None = None
    ) -> AsyncIterator[Ticket]:
        """Hold a slot for the length of an `async with` block; as `slot`."""
        ticket = self.enter(wait=wait, deadline_s=deadline_s, deadline=deadline)
        try:
            await ticket.await_()
            yield ticket
        finally:
            ticket.leave()

    def limit(self, *, max_concurrency: int | None = None, max_waiting: int | None = None) -> None:
        """Change the bounds; running and waiting calls keep what they have."""
        check_bounds(max_concurrency=max_concurrency, max_waiting=max_waiting)
        with self._lock:
            if max_concurrency is not None:
                self._max_concurrency = max_concurrency
            if max_waiting is not None:
                self._max_waiting = max_waiting
            granted = self._grant()
        self._wake(granted)
        self._settle()

    def close(self) -> None:
        """Turn new calls away and fail the waiting ones with `AegisClosedError`; running ones end as they like."""
        with self._lock:
            self._closed = True
            waiting = list(self._queue)
            self._queue.clear()
            self._counted = 0
            for ticket in waiting:
                ticket.state = State.CLOSED
        self._wake(waiting)
        self._settle()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Turn new calls away, let waiting and running ones finish, and close.

        Returns:
            True when all had finished within `timeout_s`; False when the rest had to be closed.
        """
        waker = self._stop_admitting(None)
        if waker is not None:
            waker.wait(timeout_s)
        return self._finish_drain()

    async def adrain(self, timeout_s: float | None = None) -> bool:
        """The same as `drain`, without blocking the event loop."""
        waker = self._stop_admitting(asyncio.get_running_loop())
        if waker is not None:
            await waker.await_(timeout_s)
        return self._finish_drain()

    def stats(self) -> AdmissionStats:
        """Return a snapshot."""
        self._settle()
        with self._lock:
            found = AdmissionStats(
                max_concurrency=self._max_concurrency,
                max_waiting=self._max_waiting,
                running=len(self._running),
                waiting=self._counted,
                waiting_bulk=len(self._queue) - self._counted,
                served=self._served,
                refused=self._refused,
                expired=self._expired,
                service_s=self._service_s,
            )
        self._settle()
        return found

    # The rest is for tickets. Methods that say "locked" are called with the lock held.

    def _next(self) -> Ticket:
        """Choose who runs next; locked, and the queue is not empty. The only place that decides."""
        ticket, _ = self._queue.popitem(last=False)
        self._counted -= not ticket.bulk
        return ticket

    def _grant(self) -> list[Ticket]:
        """Give free slots to waiting calls; locked. Returns the tickets to wake."""
        woken = []
        while self._queue and len(self._running) < self._max_concurrency:
            ticket = self._next()
            if ticket.deadline is not None and ticket.deadline <= self._clock():
                ticket.state = State.EXPIRED
                self._expired += 1
            else:
                ticket.state = State.RUNNING
                self._running.add(ticket)
            woken.append(ticket)
        return woken

    def _leave(self, ticket: Ticket) -> None:
        self._gone.append(ticket)
        self._settle()

    def _settle(self) -> None:
        """Take back what was left, and hand it on."""
        while self._gone:
            if not self._lock.acquire(blocking=False):
                return  # its holder settles as soon as it lets go, and sees what was appended before
            try:
                woken: list[Ticket] = []
                idle: list[Waker] = []
                while self._gone:
                    woken += self._take_back(self._gone.popleft())
                woken += self._grant()
                if not self._running and not self._queue:
                    idle, self._idle = self._idle, idle
            finally:
                self._lock.release()
            self._wake(woken)
            for waker in idle:
                with contextlib.suppress(RuntimeError):  # the loop that waited for the end has ended itself
                    waker.wake()

    def _take_back(self, ticket: Ticket) -> list[Ticket]:
        """Remove a ticket from wherever it stands; locked. Returns it when somebody still waits for it."""
        state, ticket.state = ticket.state, State.LEFT
        if state is State.WAITING and ticket in self._queue:
            del self._queue[ticket]
            self._counted -= not ticket.bulk
            return [ticket]
        if ticket in self._running:
            self._running.discard(ticket)
            if ticket.started is not None:
                self._served += 1
                took = self._clock() - ticket.started
                old = self._service_s
                self._service_s = took if old is None else old + _SMOOTHING * (took - old)
        return []

    def _wake(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            if (waker := ticket.waker) is not None:
                try:
                    waker.wake()
                except RuntimeError:
                    self._gone.append(ticket)  # its loop is closed: the slot goes to the next one
        if self._gone:
            self._settle()

    def _register(self, ticket: Ticket, loop: asyncio.AbstractEventLoop | None) -> Waker | None:
        """Make the ticket's waker, unless there is nothing to wait for."""
        waker = Waker(loop)
        with self._lock:
            if waits := ticket.state is State.WAITING:
                ticket.waker = waker
                ticket.loop = loop
        self._settle()
        return waker if waits else None

    def _overrun(self, ticket: Ticket) -> None:
        """Let a call run beyond the bound."""
        with self._lock:
            if ticket.state is State.WAITING:
                self._queue.pop(ticket, None)
                self._counted -= not ticket.bulk
                ticket.state = State.RUNNING
                self._running.add(ticket)
        self._settle()

    def _expire(self, ticket: Ticket) -> None:
        """Take a waiting ticket out of the queue and tell whoever waits for it."""
        with self._lock:
            if waited := ticket.state is State.WAITING:
                self._take_back(ticket)
                ticket.state = State.EXPIRED
                self._expired += 1
        if waited:
            self._wake([ticket])
        self._settle()

    def _count_expired(self) -> None:
        with self._lock:
            self._expired += 1
        self._settle()

    def _reclaimed(self) -> bool:
        """Take slots back from calls whose event loop was closed under them; locked."""
        for ticket in self._running:
            if ticket.loop is not None and ticket.loop.is_closed():
                self._gone.append(ticket)
        if self._queue:
            return False  # settling gives what was taken back to those who wait already
        while self._gone:
            self._take_back(self._gone.popleft())
        return len(self._running) < self._max_concurrency

    def _purged(self) -> bool:
        """Drop waiting calls whose event loop was closed under them; locked. Looks at most once a second."""
        now = self._clock()
        if now < self._next_purge:
            return False
        self._next_purge = now + _DEAD_LOOP_CHECK_S
        for ticket in [t for t in self._queue if t.loop is not None and t.loop.is_closed()]:
            self._take_back(ticket)
        return self._counted < self._max_waiting

    def _overloaded(self) -> AegisOverloadedError:
        """Make the refusal, with the time after which the calls that wait now will have been served; locked."""
        service_s = _FIRST_GUESS_S if self._service_s is None else self._service_s
        after_s = min(_LONGEST_RETRY_S, service_s * (len(self._queue) + 1) / self._max_concurrency)
        return AegisOverloadedError(
            f"{self._counted} calls wait already (max_waiting={self._max_waiting}); nothing was sent. "
            f"Try again in {after_s:.1f} s, or use .batch/.abatch, which wait for their turn",
            retry_after_s=after_s,
        )

    def _stop_admitting(self, loop: asyncio.AbstractEventLoop | None) -> Waker | None:
        waker = Waker(loop)
        with self._lock:
            self._closed = True
            if busy := bool(self._running or self._queue):
                self._idle.append(waker)
        self._settle()
        return waker if busy else None

    def _finish_drain(self) -> bool:
        with self._lock:
            finished = not self._running and not self._queue
        self.close()
        return finished


def admission_for(server: str, *, max_concurrency: int | None = None, max_waiting: int | None = None) -> Admission:
    """Return the process's one `Admission` for a server, made on first use.

    Args:
        server: Its address; equal texts are one server.
        max_concurrency: Slots that this user of the server asks for; the smallest that anybody asked for wins, and
            4 are used when nobody asks.
        max_waiting: Likewise, with 100.

    Raises:
        AegisConfigError: A bound is out of range.
    """
    check_bounds(max_concurrency=max_concurrency, max_waiting=max_waiting)
    with _registry.lock:
        shared = _registry.servers.get(server)
        if shared is None or shared.admission.closed:
            shared = _registry.servers[server] = _Shared(Admission())
        shared.max_concurrency = _smaller(shared.max_concurrency, max_concurrency)
        shared.max_waiting = _smaller(shared.max_waiting, max_waiting)
        shared.admission.limit(max_concurrency=shared.max_concurrency, max_waiting=shared.max_waiting)
        return shared.admission


def check_bounds(
    *,
    max_concurrency: int | None = None,
    max_waiting: int | None = None,
    window_ms: float | None = None,
    max_batch: int | None = None,
    deadline_s: float | None = None,
) -> None:
    """Raise `AegisConfigError` for a bound that is out of range; None is never checked."""
    for name, whole, least in (("max_concurrency", max_concurrency, 1), ("max_waiting", max_waiting, 0),
                               ("max_batch", max_batch, 1)):  # fmt: skip
        if whole is not None and (isinstance(whole, bool) or not isinstance(whole, int) or whole < least):
            raise AegisConfigError(f"{name} must be a whole number of at least {least}, got {whole!r}")
    if window_ms is not None and not (_is_number(window_ms) and 0 <= window_ms < math.inf):
        raise AegisConfigError(f"window_ms must be a number of milliseconds, 0 or more, got {window_ms!r}")
    if deadline_s is not None and not (_is_number(deadline_s) and 0 < deadline_s < math.inf):
        raise AegisConfigError(f"deadline_s must be a number of seconds above 0, got {deadline_s!r}")


@dataclass(slots=True)
class _Shared:
    admission: Admission
    max_concurrency: int | None = None
    max_waiting: int | None = None


class _Registry:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.servers: dict[str, _Shared] = {}
        reset_after_fork(self)

    def reset(self) -> None:
        self.lock = threading.Lock()


_registry = _Registry()


def _smaller(old: int | None, new: int | None) -> int | None:
    return old if new is None else new if old is None else min(old, new)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
