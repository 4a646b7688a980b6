"""At most N calls of a server run, at most M wait, the rest is refused at once.

An `Admission` is shared by sync threads, by any number of event loops and by one `asyncio.run` after another. A call
takes a `Ticket`, which is either a slot or a place in the queue; `queues.Line` alone decides who runs next. A slot is
handed on directly, so a free slot and a waiting call never exist together, but for background traffic, which leaves
the last slot free.

A ticket may be given back from a finaliser that interrupts its own thread inside this module. Giving back therefore
never waits for the lock: the ticket is put on a list, and whoever holds the lock settles that list when letting go.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Literal, Self

from langchain_aegis.bounds import MAX_BATCH, MAX_CONCURRENCY, MAX_WAITING, WINDOW_MS, check_bounds
from langchain_aegis.errors import (
    AegisClosedError,
    AegisDeadlineError,
    AegisOverloadedError,
)
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.live import live
from langchain_aegis.queues import Line
from langchain_aegis.tallies import EVENTS, AdmissionStats, Tally
from langchain_aegis.tickets import State, Ticket, held_tickets
from langchain_aegis.traits import NO_TRAITS, Priority, Traits, priority
from langchain_aegis.wakers import Waker

Wait = Literal["refuse", "patient", "queue"]

_FIRST_GUESS_S = 1.0  # a service time before any was measured
_SMOOTHING = 0.2  # weight of the newest service time
_FADING = 0.05  # how fast a long service time is forgotten
_LONGEST_RETRY_S = 60.0
_DEAD_LOOP_CHECK_S = 1.0
_PATIENCE_S = 2.0  # for so long, or twice a service time, a call may be overtaken by those that suit the server better


class Admission:
    """Slots and a bounded queue for the calls of one server.

    Args:
        max_concurrency: Most calls that run at once.
        max_waiting: Most calls that wait; items of a batch wait without counting. When all places are taken, a call
            of a tenant with fewer of them gets the place of the newest call of whoever has most.
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
        self._tally = Tally()
        self._service_s: float | None = None
        self._longest_s = 0.0
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Forget every call: in the child of a fork they are somebody else's."""
        self._lock = threading.Lock()
        self._running: set[Ticket] = set()
        self._line = Line()
        self._counted = 0  # waiting calls that count against max_waiting
        self._gone: deque[Ticket] = deque()
        self._idle: list[Waker] = []
        self._next_purge = 0.0
        self._fit()

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
        return self._counted >= self._max_waiting and len(self._running) >= self._usable

    @property
    def busy(self) -> int:
        """How many calls run or wait; without a lock, so it may be wrong a moment later."""
        return len(self._running) + len(self._line)

    def covers(self, other: Admission) -> bool:
        """Whether a slot of `other` is one of these."""
        return other is self

    def enter(
        self, *, wait: Wait = "refuse", deadline_s: float | None = None, deadline: float | None = None,
        traits: Traits = NO_TRAITS, window_ms: float = WINDOW_MS, max_batch: int = MAX_BATCH,
    ) -> Ticket:  # fmt: skip
        """Take a slot, or a place in the queue, without waiting for anything.

        Args:
            wait: "refuse" when `max_waiting` calls wait already; "patient" to wait without counting; "queue" likewise,
                but after all others (items of a batch). Inside `traits.background()` it is background traffic.
            deadline_s: Seconds from now until which the call must have started.
            deadline: The same as a time of the clock (`time.monotonic()`); the earlier one counts.
            traits: What is known of the call; decides about its turn.
            window_ms: 0: it waits first come, first served within its tenant. Else calls that share a long prefix, or
                a model and runner options, may overtake it, for this long, twice a service time, or 2 s, whichever is
                longest.
            max_batch: Most calls that begin alike and run in a row in one slot, while others wait.

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
        if (held := held_tickets.get()) and any(self.covers(t.admission) and t.running for t in held):
            return Ticket(self, State.RIDING, deadline=deadline)
        kind = priority.get()
        if kind == "interactive" and wait == "queue":
            kind = "bulk"
        counted = kind == "interactive" and wait == "refuse"
        evicted = None
        try:
            with self._lock:
                if self._closed:
                    raise AegisClosedError("this admission was closed; it takes no new calls")
                if deadline is not None and deadline <= self._clock():
                    self._tally.count("expired", traits)
                    raise AegisDeadlineError("the deadline had passed before the call was made; nothing was sent")
                runs = self._has_slot_for(kind) or (self._reclaimed() and self._has_slot_for(kind))
                if not runs and self._is_full_for(kind, counted) and (
                    not self._purge() or self._is_full_for(kind, counted)
                ):  # fmt: skip
                    evicted = self._line.rival(traits.tenant) if counted else None
                    if evicted is None:
                        self._tally.count("refused", traits)
                        raise self._overloaded()
                    self._line.remove(evicted)
                    self._counted -= 1
                    self._tally.count("refused", evicted.traits)
                    evicted.refusal, evicted.state = self._overloaded(), State.EVICTED
                ticket = Ticket(
                    self, State.WAITING, kind, traits, counted=counted, deadline=deadline, window_s=window_ms / 1000,
                    max_batch=max_batch,
                )  # fmt: skip
                if runs:
                    self._run(ticket)
                    self._line.starting(ticket, self._clock)
                    return ticket
                ticket.entered = self._clock()
                self._line.add(ticket)
                self._counted += counted
                running = tuple(self._running)
        finally:
            live.touch()
            if self._gone:
                self._settle()
        if evicted is not None:
            self._wake([evicted])
        ticket.look()
        for other in running:
            other.look()
        return ticket

    def turn_away(self, traits: Traits) -> None:
        """Raise what `enter` would raise for an interactive call that is to be refused when the queue is full.

        Takes nothing and waits for nothing; returns when the call may have a chance, which `enter` then decides.

        Raises:
            AegisOverloadedError: The queue is full.
        """
        if not self.full or self._clock() >= self._next_purge:  # the second: calls of closed loops make room
            return
        live.touch()
        try:
            with self._lock:
                if not self._closed and self.full and len(self._line) and self._line.rival(traits.tenant) is None:
                    self._tally.count("refused", traits)
                    raise self._overloaded()  # not kept in a name: it would hold its own frame, as garbage
        finally:
            if self._gone:
                self._settle()

    @contextlib.contextmanager
    def slot(self, **arguments: Any) -> Iterator[Ticket]:
        """Hold a slot for the length of a `with` block; arguments and errors as in `enter` and `Ticket.wait`."""
        ticket = self.enter(**arguments)
        try:
            ticket.wait()
            yield ticket
        finally:
            ticket.leave()

    @contextlib.asynccontextmanager
    async def aslot(self, **arguments: Any) -> AsyncIterator[Ticket]:
        """Hold a slot for the length of an `async with` block; as `slot`."""
        ticket = self.enter(**arguments)
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
                self._fit()
            if max_waiting is not None:
                self._max_waiting = max_waiting
            granted = self._grant()
        self._wake(granted)
        self._settle()

    def close(self) -> None:
        """Turn new calls away and fail the waiting ones with `AegisClosedError`; running ones end as they like."""
        with self._lock:
            self._closed = True
            waiting = list(self._line)
            self._line.clear()
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
            now, line, rows = self._clock(), self._line, self._tally.rows()
            found = AdmissionStats(
                max_concurrency=self._max_concurrency,
                max_waiting=self._max_waiting,
                running=len(self._running),
                waiting=self._counted,
                waiting_bulk=len(line) - self._counted - line.size("spare"),
                waiting_spare=line.size("spare"),
                oldest_s=max((now - t.entered for t in line if t.entered is not None), default=0.0),
                service_s=self._service_s,
                **{event: sum(getattr(row, event) for row in rows) for event in EVENTS},
                prefixes_reused=line.prefixes_reused,
                reloads_avoided=line.reloads_avoided,
                rows=rows,
            )
        self._settle()
        return found

    def merged(self, traits: Traits) -> None:
        """Count a call that is answered by another one's call of the model."""
        with self._lock:
            self._tally.count("merged", traits)
        self._settle()

    # The rest is for tickets. Methods that say "locked" are called with the lock held.

    def _fit(self) -> None:
        """Note how many slots may be used now; locked."""
        self._usable = self._max_concurrency

    def _share(self) -> int:
        """Return how many slots those who wait here may count on, as a rule."""
        return self._max_concurrency

    def _has_slot_for(self, kind: Priority) -> bool:
        """Whether a call that arrives now may run at once; locked."""
        used, slots = len(self._running), self._usable
        if kind == "spare":  # one slot stays free for whoever comes next
            return not len(self._line) and (used + 1 < slots or (slots == 1 and not used))
        return used < slots

    def _is_full_for(self, kind: Priority, counted: bool) -> bool:
        """Whether a call that cannot run at once has no place to wait; locked."""
        if kind == "spare":
            return self._line.size("spare") >= self._max_waiting
        return counted and self._counted >= self._max_waiting

    def _run(self, ticket: Ticket) -> None:
        """Give a slot to a call; locked."""
        ticket.state = State.RUNNING
        self._running.add(ticket)

    def _grant(self) -> list[Ticket]:
        """Give free slots to waiting calls; locked. Returns the tickets to wake."""
        woken = []
        while len(self._line) and len(self._running) < self._usable:
            now = self._clock()
            patience_s = max(_PATIENCE_S, 2 * self._longest_s)
            ticket = self._line.next(self._running, self._max_concurrency, now, patience_s)
            if ticket is None:
                break
            self._counted -= ticket.counted
            if ticket.deadline is not None and ticket.deadline <= now:
                ticket.state = State.EXPIRED
                self._tally.count("expired", ticket.traits)
            else:
                self._run(ticket)
                self._tally.waited(ticket.traits, now - (ticket.entered or now))
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
                if not self._running and not len(self._line):
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
        if state is State.WAITING and self._line.remove(ticket):
            self._counted -= ticket.counted
            self._tally.count("cancelled", ticket.traits)
            return [ticket]
        if ticket in self._running:
            self._running.discard(ticket)
            now = self._clock()
            self._line.leaving(ticket, self._max_concurrency, now)
            if ticket.started is not None:
                self._tally.count("served", ticket.traits)
                took = now - ticket.started
                old = self._service_s
                self._service_s = took if old is None else old + _SMOOTHING * (took - old)
                self._longest_s = max(took, self._longest_s + _FADING * (took - self._longest_s))
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

    def _overrun(self, ticket: Ticket, *, blocks: bool = False) -> None:
        """Let a call run beyond the bound; `blocks`: it blocks its event loop anyway."""
        with self._lock:
            if ticket.state is State.WAITING:
                self._line.remove(ticket)
                self._counted -= ticket.counted
                self._run(ticket)
        self._settle()

    def _expire(self, ticket: Ticket) -> None:
        """Take a waiting ticket out of the queue and tell whoever waits for it."""
        with self._lock:
            if waited := ticket.state is State.WAITING:
                self._line.remove(ticket)
                self._counted -= ticket.counted
                ticket.state = State.EXPIRED
                self._tally.count("expired", ticket.traits)
        if waited:
            self._wake([ticket])
        self._settle()

    def _count_expired(self, ticket: Ticket) -> None:
        with self._lock:
            self._tally.count("expired", ticket.traits)
        self._settle()

    def _reclaimed(self) -> bool:
        """Take slots back from calls whose event loop was closed under them; locked."""
        for ticket in self._running:
            if ticket.loop is not None and ticket.loop.is_closed():
                self._gone.append(ticket)
        if len(self._line):
            return False  # settling gives what was taken back to those who wait already
        while self._gone:
            self._take_back(self._gone.popleft())
        return len(self._running) < self._usable

    def _purge(self) -> bool:
        """Drop waiting calls whose event loop was closed under them; locked. False if it was looked a moment ago."""
        now = self._clock()
        if now < self._next_purge:
            return False
        self._next_purge = now + _DEAD_LOOP_CHECK_S
        for ticket in [t for t in self._line if t.loop is not None and t.loop.is_closed()]:
            self._take_back(ticket)
        return True

    def _overloaded(self) -> AegisOverloadedError:
        """Make the refusal, with the time after which the calls that wait now will have been served; locked."""
        service_s = _FIRST_GUESS_S if self._service_s is None else self._service_s
        after_s = min(_LONGEST_RETRY_S, service_s * (len(self._line) + 1) / self._share())
        return AegisOverloadedError(
            f"{self._counted} calls wait already (max_waiting={self._max_waiting}); nothing was sent. "
            f"Try again in {after_s:.1f} s, or use .batch/.abatch, which wait for their turn",
            retry_after_s=after_s,
        )

    def _stop_admitting(self, loop: asyncio.AbstractEventLoop | None) -> Waker | None:
        waker = Waker(loop)
        with self._lock:
            self._closed = True
            if busy := bool(self._running or len(self._line)):
                self._idle.append(waker)
        self._settle()
        return waker if busy else None

    def _finish_drain(self) -> bool:
        with self._lock:
            finished = not self._running and not len(self._line)
        self.close()
        return finished
