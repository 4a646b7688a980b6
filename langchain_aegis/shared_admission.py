"""The admission of a server whose slots several processes share: a call runs when this process is lent one.

Who runs next in a process is decided as in any `Admission`, when a slot comes. Whose turn it is among processes is
decided elsewhere (`slot_scripts`), by whoever lends. So a call waits in one queue only, and nothing is awaited that
was not before: cancelling, deadlines, threads and event loops are the queue's. A slot goes back when its call has left,
not to the next one here: else a busy process would keep it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from langchain_aegis.admission import Admission
from langchain_aegis.bounds import MAX_CONCURRENCY, MAX_WAITING
from langchain_aegis.tallies import AdmissionStats
from langchain_aegis.tickets import State, Ticket
from langchain_aegis.traits import Priority

_BRIEF_S = 0.1  # so long a call that blocks its event loop anyway waits to be lent a slot


class Lender(Protocol):
    """Lends slots."""

    def look(self, admission: SharedAdmission) -> bool:
        """Note that an admission needs more slots, or fewer; returns whether somebody will see to that.

        Never waits, and may be called by a finaliser.
        """


@dataclass(frozen=True, slots=True)
class Plan:
    """What an admission does with what it is lent.

    Attributes:
        lent: Slots that it keeps.
        want: How many more it can use now.
        leave: So many slots of the server are to be left free, of those that it wants.
    """

    lent: int
    want: int
    leave: int


class SharedAdmission(Admission):
    """Slots of a server that other processes use too.

    `max_waiting` bounds the calls of this process. As many more may wait as this process alone could run: they wait for
    others' calls, not for each other.

    Args:
        lender: Lends the slots.
        max_concurrency: Most calls that run at once, of all processes together.
        max_waiting: Most calls of this process that wait.
        clock: Seconds, monotonic; for tests.
    """

    def __init__(
        self,
        lender: Lender,
        max_concurrency: int = MAX_CONCURRENCY,
        max_waiting: int = MAX_WAITING,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lender = lender
        super().__init__(max_concurrency, max_waiting, clock=clock)

    def reset(self) -> None:
        """Forget every call, and what was lent for them: in the child of a fork they are somebody else's."""
        self._lent = 0
        self._alone: int | None = None  # slots that it takes while nobody lends any
        self._workers = 1
        super().reset()

    @property
    def full(self) -> bool:
        """Whether `enter` would refuse a call now; without a lock, so it may be wrong a moment later."""
        return self._is_full_for("interactive", True)

    def enter(self, **arguments: Any) -> Ticket:
        """Take a place in the queue; as `Admission.enter`."""
        ticket = super().enter(**arguments)
        if ticket.state is State.WAITING and not self._lender.look(self):
            self.part()
        return ticket

    def stats(self) -> AdmissionStats:
        """Return a snapshot."""
        found = super().stats()
        return replace(found, lent=None if self._alone is not None else self._lent, workers=self._workers)

    @property
    def share(self) -> int:
        """This process's share of the slots, at least one: more workers than slots are more calls than slots."""
        return max(1, self._max_concurrency // self._workers)

    # -- for the lender -------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """Return how many slots are needed."""
        with self._lock:
            running, most = len(self._running), self._max_concurrency
            waiting = len(self._line) - self._line.size("spare")
            # Those that run beyond what was lent count too, as soon as something is free.
            want = max(0, min(most - running, waiting)) + max(0, running - self._lent)
            leave = 0
            if not want and self._line.size("spare") and (running + 1 < most or (most == 1 and not running)):
                want, leave = 1, int(most > 1)
            found = Plan(self._lent, want, leave)
        self._settle()
        return found

    def lend(self, slots: int, workers: int | None = None) -> bool:
        """Take so many more slots; returns whether some of them are not needed after all."""
        with self._lock:
            self._lent += slots
            self._workers = workers or self._workers
            self._fit()
            granted = self._grant()
            left = self._lent - len(self._running)
            self._give_back()
        self._wake(granted)
        self._settle()
        return left > 0

    def part(self) -> None:
        """Go on alone, with this process's share of the slots: nobody can be asked."""
        with self._lock:
            self._alone = self.share
            self._fit()
            granted = self._grant()
        self._wake(granted)
        self._settle()

    def rejoin(self) -> int:
        """Go on with what is lent; returns how many slots are in use."""
        with self._lock:
            self._alone, self._lent = None, len(self._running)
            self._fit()
            found = self._lent
        self._settle()
        return found

    # -- for tickets; locked --------------------------------------------------------------------------------------

    def _fit(self) -> None:
        self._usable = min(self._max_concurrency, self._lent if self._alone is None else self._alone)

    def _share(self) -> int:
        return self.share

    def _give_back(self) -> None:
        if self._lent > len(self._running):
            self._lent = len(self._running)
            self._fit()
            self._lender.look(self)

    def _is_full_for(self, kind: Priority, counted: bool) -> bool:
        if kind == "spare":
            return self._line.size("spare") > self._max_waiting
        could = max(0, self._max_concurrency - len(self._running))
        return counted and self._counted >= self._max_waiting + could

    def _take_back(self, ticket: Ticket) -> list[Ticket]:
        woken = super()._take_back(ticket)
        self._give_back()
        return woken

    def _overrun(self, ticket: Ticket, *, blocks: bool = False) -> None:
        # The loop that this blocks does not lend: what is free comes meanwhile.
        if blocks and self._alone is None and len(self._running) < self._max_concurrency:
            waker = self._register(ticket, None)
            if waker is not None:
                waker.wait(_BRIEF_S)
        super()._overrun(ticket)
        self._lender.look(self)
