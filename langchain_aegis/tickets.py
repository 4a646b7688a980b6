"""One call's place among the calls of a server."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from contextvars import ContextVar, Token
from enum import Enum
from typing import TYPE_CHECKING

from langchain_aegis.bounds import MAX_BATCH
from langchain_aegis.errors import AegisClosedError, AegisDeadlineError, AegisError
from langchain_aegis.notices import warn_once
from langchain_aegis.traits import NO_TRAITS, Priority, Traits
from langchain_aegis.wakers import Waker, running_loop

if TYPE_CHECKING:
    from langchain_aegis.admission import Admission


class State(Enum):
    """Where a ticket stands."""

    WAITING = "waiting"
    RUNNING = "running"
    RIDING = "riding"  # inside a call that holds a slot of the same admission already
    EXPIRED = "expired"
    EVICTED = "evicted"  # refused after all: a call of a tenant with fewer waiting took its place
    CLOSED = "closed"
    LEFT = "left"


class Ticket:
    """One call's place: it waits, then runs, then has left. Made by `Admission.enter`; must be left."""

    __slots__ = ("_looked", "admission", "counted", "deadline", "due", "entered", "in_a_row", "kind", "loop",
                 "max_batch", "passed", "prefix", "refusal", "since", "started", "state", "traits", "waker",
                 "window_s")  # fmt: skip

    def __init__(
        self, admission: Admission, state: State, kind: Priority = "interactive", traits: Traits = NO_TRAITS, *,
        counted: bool = False, deadline: float | None = None, window_s: float = 0.05, max_batch: int = MAX_BATCH,
    ) -> None:  # fmt: skip
        self.admission = admission
        self.state = state
        self.kind = kind
        self.traits = traits
        self.counted = counted  # against max_waiting
        self.deadline = deadline
        self.window_s = window_s
        self.max_batch = max_batch
        self.loop = running_loop()
        self.waker: Waker | None = None
        self.refusal: AegisError | None = None
        self.entered: float | None = None  # when it began to wait
        self.started: float | None = None
        self.due = 0  # turns of its tenant that come before its own, if each has it as it came
        self.passed: float | None = None  # when that was over
        self.prefix: tuple[int, ...] = ()
        self.in_a_row = 0  # calls before it in its slot that began like it
        self.since = 0.0  # when the first of those after the first started
        self._looked = False

    @property
    def ordered(self) -> bool:
        """Whether calls may overtake it for what they have in common with others."""
        return self.window_s > 0

    def look(self) -> None:
        """Find out how its prompt begins; later calls do nothing. Reads the prompt, so not to be called locked."""
        if not self._looked and self.ordered:
            self._looked = True
            try:
                self.prefix = self.traits.prefix()
            except Exception:  # a message of the application's own class: the call loses nothing but its place
                self.prefix = ()

    @property
    def running(self) -> bool:
        """Whether the call may run: it holds a slot, or is part of a call that holds one."""
        return self.state is State.RUNNING or self.state is State.RIDING

    def wait(self) -> None:
        """Block this thread until the call may run.

        In a thread whose event loop is running, waiting could last for ever, because the slots may be held by tasks
        of that loop; the call then runs beyond the bound. Whether or not it would have to wait, there is one warning:
        while it runs, that loop stands still. (Not in a notebook, whose loop waits for the cell anyway.)

        Raises:
            AegisDeadlineError: The deadline passed first; the call must not be started.
            AegisClosedError: The admission was closed.
        """
        if self.state is State.WAITING:
            if running_loop() is not None:
                _warn_of_blocking()
                self.admission._overrun(self, blocks=True)
            elif (waker := self.admission._register(self, None)) is not None:
                try:
                    waker.wait(self._remaining_s())
                except BaseException:
                    self.leave()
                    raise
        elif self.loop is not None and running_loop() is self.loop and "ipykernel" not in sys.modules:
            _warn_of_blocking()
        self._start()

    async def await_(self) -> None:
        """Suspend this coroutine until the call may run. Cancelling it gives the place, or the slot, to the next.

        Raises:
            AegisDeadlineError: The deadline passed first; the call must not be started.
            AegisClosedError: The admission was closed.
        """
        if self.state is State.WAITING:
            loop = asyncio.get_running_loop()
            if (waker := self.admission._register(self, loop)) is not None:
                try:
                    await waker.await_(self._remaining_s())
                except BaseException:
                    self.leave()
                    raise
        self._start()

    def leave(self) -> None:
        """Give the slot or the place back; later calls do nothing. Never blocks, safe in a finaliser."""
        if self.state is not State.LEFT:
            self.admission._leave(self)

    def expire(self) -> None:
        """End the wait of a call that nobody wants any more; one that runs already goes on."""
        self.admission._expire(self)

    def held(self) -> Held:
        """Return a context in which calls to the same admission ride along instead of taking a second slot."""
        return Held(self)

    def _remaining_s(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - self.admission._clock())

    def _start(self) -> None:
        state = self.state
        if state is State.RIDING:
            return
        now = self.admission._clock()
        if state is State.RUNNING and (self.deadline is None or now < self.deadline):
            self.started = now
            return
        if state is State.CLOSED:
            self.leave()
            raise AegisClosedError("the call was still waiting when its admission was closed")
        if state is State.EVICTED and self.refusal is not None:
            refusal = self.refusal
            self.leave()
            raise refusal
        if state is not State.EXPIRED:
            self.admission._count_expired(self)
        self.leave()
        raise AegisDeadlineError("the deadline passed while the call waited for a free slot; nothing was sent")


def _warn_of_blocking() -> None:
    warn_once(
        "sync_call_in_event_loop",
        "a blocking call (invoke, stream, batch) was made inside a running event loop, which stops everything else in "
        "it; use the asynchronous one (ainvoke, astream, abatch)",
    )


class Held:
    """Marks the running code as part of a ticket's call."""

    __slots__ = ("_ticket", "_token")

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._token: Token[tuple[Ticket, ...]] | None = None

    def __enter__(self) -> None:
        self._token = held_tickets.set((*held_tickets.get(), self._ticket))

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            with contextlib.suppress(ValueError):  # left in another context, which never had the mark
                held_tickets.reset(self._token)


held_tickets: ContextVar[tuple[Ticket, ...]] = ContextVar("aegis_held_tickets", default=())
