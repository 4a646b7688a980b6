"""Several servers of one model: one queue for all, and what is known of each.

A call takes a slot of the pool, which has as many as its servers together, and then one of the server that is chosen
for it. So the choice is made when the call runs, not when it begins to wait.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from langchain_aegis.admission import Admission
from langchain_aegis.balance import Candidate, in_order
from langchain_aegis.bounds import MAX_WAITING
from langchain_aegis.notices import warn_once
from langchain_aegis.queues import LONG_PREFIX
from langchain_aegis.settings import redact_url
from langchain_aegis.tickets import held_tickets
from langchain_aegis.traits import Traits, common

_REMEMBERED = 64  # prompts of each server: what its slots and its host's prompt cache may still know
_ALL_DOWN_S = 1.0  # between two looks at a server when there is no other


@dataclass(slots=True)
class Member:
    """One server of a pool."""

    address: str
    admission: Admission
    down: bool = False
    looked: float = 0.0  # when it was found to be down, or somebody set out to look
    last: int = 0
    under_way: set[object] = field(default_factory=set)  # calls that were sent there, with or without a slot yet
    read: OrderedDict[tuple[Hashable, tuple[int, ...]], None] = field(default_factory=OrderedDict)

    def shared(self, runner: Hashable, prefix: tuple[int, ...]) -> int:
        """Return how many leading blocks of a prompt it has read recently, for the same model and options."""
        return max((common(prefix, known) for other, known in self.read if other == runner), default=0)

    def remember(self, runner: Hashable, prefix: tuple[int, ...]) -> None:
        """Note a prompt that it reads now."""
        self.read[runner, prefix] = None
        self.read.move_to_end((runner, prefix))
        if len(self.read) > _REMEMBERED:
            self.read.popitem(last=False)


class Pool(Admission):
    """The slots and the queue of several servers, and which of them a call goes to.

    A server that cannot be reached gets no calls until somebody has found it up again. That is looked for when a call
    comes, never in the background.

    Args:
        members: The admission of each server, by address.
        max_waiting: As in `Admission`, for all of them together.
        clock: Seconds, monotonic; for tests.
    """

    def __init__(
        self,
        members: Mapping[str, Admission],
        max_waiting: int = MAX_WAITING,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._members = {address: Member(address, admission) for address, admission in members.items()}
        self._calls = 0
        super().__init__(self._slots(), max_waiting, clock=clock)

    def reset(self) -> None:
        """Forget every call: in the child of a fork they are somebody else's."""
        super().reset()
        self._choosing = threading.Lock()
        for member in self._members.values():
            member.under_way = set()

    @property
    def addresses(self) -> tuple[str, ...]:
        """The servers."""
        return tuple(self._members)

    @property
    def down(self) -> tuple[str, ...]:
        """The servers that get no calls now."""
        return tuple(member.address for member in self._members.values() if member.down)

    def covers(self, other: Admission) -> bool:
        """Whether a slot of `other` is one of this pool's."""
        return other is self or any(member.admission is other for member in self._members.values())

    def fit(self, members: Mapping[str, Admission] | None = None) -> None:
        """Have as many slots as the servers that are up; `members` are their admissions from now on."""
        for address, admission in (members or {}).items():
            self._members[address].admission = admission
        if (slots := self._slots()) != self.max_concurrency:
            self.limit(max_concurrency=slots)

    def choose(self, traits: Traits, tried: Collection[str], call: object) -> str | None:
        """Return the server for a call, None if there is none.

        Args:
            traits: What is known of the call.
            tried: Servers that it was sent to already.
            call: Counts as under way there until `left`.
        """
        prefix = traits.prefix()
        long = len(prefix) >= LONG_PREFIX
        held = [ticket.admission for ticket in held_tickets.get() if ticket.running]
        with self._choosing:
            members = list(self._members.values())
            # Inside a call that holds a slot of a server, waiting for another one could last for ever.
            chosen = next((m for m in members if m.admission in held and not m.down and m.address not in tried), None)
            if chosen is None:
                order = in_order(
                    [
                        Candidate(
                            up=not member.down and member.address not in tried,
                            slots=member.admission.max_concurrency,
                            busy=max(member.admission.busy, len(member.under_way)),
                            shared=member.shared(traits.runner, prefix) if long else 0,
                            last=member.last,
                        )
                        for member in members
                    ]
                )
                if not order:
                    return None
                chosen = members[order[0]]
            self._calls += 1
            chosen.last = self._calls
            chosen.under_way.add(call)
            if long:
                chosen.remember(traits.runner, prefix)
            return chosen.address

    def left(self, address: str, call: object) -> None:
        """Say that a call has ended; safe in a finaliser."""
        self._members[address].under_way.discard(call)

    def lost(self, address: str, recheck_s: float) -> None:
        """Say that a server cannot be reached: it gets no calls until `found`."""
        with self._choosing:
            member = self._members[address]
            member.down, member.looked = True, self._clock()
            member.read.clear()  # whatever it knew, it has to be started anew
        self.fit()
        where = redact_url(address)
        warn_once(
            f"server_down:{where}",
            f"the server at {where} cannot be reached; its calls go to the others, and it is looked at"
            f" again every {recheck_s:g} s",
        )

    def found(self, address: str) -> None:
        """Say that a server answers."""
        if self._members[address].down:
            with self._choosing:
                self._members[address].down = False
            self.fit()

    def to_look_at(self, recheck_s: float) -> Iterable[str]:
        """Return the servers that are down and were not looked at for `recheck_s`: each is the caller's to look at.

        If all of them are down, it is a second at most, so that who has no choice need not wait longer than he must.
        """
        members = self._members.values()
        if not any(member.down for member in members):
            return ()
        with self._choosing:
            now = self._clock()
            pause_s = min(recheck_s, _ALL_DOWN_S) if all(member.down for member in members) else recheck_s
            due = [member for member in members if member.down and now - member.looked >= pause_s]
            for member in due:
                member.looked = now
            return [member.address for member in due]

    def _slots(self) -> int:
        members = self._members.values()
        up = [member for member in members if not member.down]
        return sum(member.admission.max_concurrency for member in up or members)
