"""Who runs next among the calls that wait for a slot. No lock, no clock: admission calls it with both.

Three rules, each within what the one before allows:

1. Interactive calls go before items of batches, those before background traffic, and none of them starves.
2. Tenants take turns.
3. Calls that need what the server has loaded go before those that make it load something, and a slot goes on with calls
   that begin like the one that just left it, because the server still has that beginning in its prompt cache. Nobody
   waits longer for this than first come, first served would have made him wait, and his patience on top; where a load
   is saved, half of it more, and the loads, which he would have had to wait for anyway.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from langchain_aegis.traits import Priority, common

if TYPE_CHECKING:
    from langchain_aegis.tickets import Ticket

LONG_PREFIX = 4  # blocks, about 500 tokens: what is shorter is read anew faster than it is worth waiting for
_BULK_EVERY = 8  # one of so many turns is a batch's while interactive calls wait, too: slow, but it moves
_LOOKED_AT = 256  # calls of a tenant that are compared; of a batch of 10,000 the others have their turn later
_TENANTS_LOOKED_AT = 16
_MODELS = 16  # that a server may have loaded


class Warm(NamedTuple):
    """What a free slot of the server still has in its prompt cache."""

    prefix: tuple[int, ...]
    in_a_row: int  # calls that began like this and followed the first one in it
    since: float  # when the first of them started; when it was left, if there was none


class Queue:
    """The calls of one tenant, the oldest first."""

    __slots__ = ("granted", "tickets")

    def __init__(self) -> None:
        self.tickets: dict[Ticket, None] = {}
        self.granted = 0  # turns that it has had

    def first(self) -> list[Ticket]:
        """Return the calls that are looked at."""
        return list(islice(self.tickets, _LOOKED_AT))


Waiting = OrderedDict[str | None, Queue]


class Line:
    """The calls that wait, and what is known of the slots that they wait for."""

    def __init__(self) -> None:
        self._waiting: dict[Priority, Waiting] = {
            "interactive": OrderedDict(),
            "bulk": OrderedDict(),
            "spare": OrderedDict(),
        }
        self._sizes: dict[Priority, int] = {"interactive": 0, "bulk": 0, "spare": 0}
        self._total = 0
        self._since_bulk = 0
        self._loaded: Hashable = None  # the runner that was asked for last
        self._loaded_since = 0.0  # when it was
        self._ready_since: float | None = None  # when it had answered for the first time; None before
        self._resident: dict[str | None, Hashable] = {}  # of each model the runner that was asked for last
        self._warm: deque[Warm] = deque()  # of the slots that were left last, the newest at the end
        self.prefixes_reused = 0  # turns given to calls that begin like the one before them in their slot
        self.reloads_avoided = 0  # turns given to a later call because an earlier one needs another runner

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[Ticket]:
        for tenants in self._waiting.values():
            for queue in tenants.values():
                yield from queue.tickets

    def size(self, kind: Priority) -> int:
        """Return how many calls of a priority wait."""
        return self._sizes[kind]

    def add(self, ticket: Ticket) -> None:
        """Put a call at the end."""
        tenants = self._waiting[ticket.kind]
        queue = tenants.get(ticket.traits.tenant)
        if queue is None:
            queue = tenants[ticket.traits.tenant] = Queue()
        ticket.due = queue.granted + len(queue.tickets)
        queue.tickets[ticket] = None
        self._sizes[ticket.kind] += 1
        self._total += 1

    def remove(self, ticket: Ticket) -> bool:
        """Take a call out; False if it does not wait here."""
        tenants = self._waiting[ticket.kind]
        queue = tenants.get(ticket.traits.tenant)
        if queue is None or ticket not in queue.tickets:
            return False
        del queue.tickets[ticket]
        self._sizes[ticket.kind] -= 1
        self._total -= 1
        if not queue.tickets:
            del tenants[ticket.traits.tenant]
        return True

    def clear(self) -> None:
        """Take every call out."""
        for tenants in self._waiting.values():
            tenants.clear()
        self._sizes = dict.fromkeys(self._sizes, 0)
        self._total = 0

    def starting(self, ticket: Ticket, clock: Callable[[], float]) -> None:
        """Note that a call runs, whether or not it had to wait."""
        runner = ticket.traits.runner
        if runner is not None and runner != self._loaded:
            self._loaded, self._loaded_since, self._ready_since = runner, clock(), None
            self._resident.pop(ticket.traits.model, None)
            self._resident[ticket.traits.model] = runner
            if len(self._resident) > _MODELS:
                del self._resident[next(iter(self._resident))]

    def leaving(self, ticket: Ticket, slots: int, now: float) -> None:
        """Note that a call has left one of `slots` slots."""
        if self._ready_since is None and ticket.started is not None and ticket.traits.runner == self._loaded:
            self._ready_since = now
        if not ticket.prefix and not self._warm:
            return
        self._warm.append(Warm(ticket.prefix, ticket.in_a_row, ticket.since if ticket.in_a_row else now))
        while len(self._warm) > slots:
            self._warm.popleft()

    def rival(self, tenant: str | None) -> Ticket | None:
        """Return the call that has to go so that one of `tenant` may wait: the newest of whoever has the most waiting.

        None if nobody has at least two more than this tenant, counting only calls that may be refused.
        """
        tenants = self._waiting["interactive"]
        if len(tenants) == 1 and tenant in tenants:
            return None
        counts = {name: sum(ticket.counted for ticket in queue.tickets) for name, queue in tenants.items()}
        greediest = max(counts, key=counts.__getitem__, default=None)
        if not counts or counts[greediest] < counts.get(tenant, 0) + 2:
            return None
        return next((ticket for ticket in reversed(tenants[greediest].tickets) if ticket.counted), None)

    def next(self, running: Collection[Ticket], slots: int, now: float, patience_s: float) -> Ticket | None:
        """Take out the call that runs next; None if none of those that wait may.

        Args:
            running: The calls that hold a slot.
            slots: How many there are; at least one is free.
            now: Seconds.
            patience_s: For how long a call may be overtaken.
        """
        kind = self._kind(running, slots)
        if kind is None:
            return None
        tenants = self._waiting[kind]
        tenant, queue = next(iter(tenants.items()))
        pool = queue.first()
        if len(self) == 1 or not pool[0].ordered:
            chosen = pool[0]
        else:
            warm = [each for each in islice(reversed(self._warm), slots - len(running)) if each.prefix]
            fitting = self._fitting(tenants, pool, warm, now, patience_s)
            chosen = self._alike(fitting, warm, running, now)
        tenant = chosen.traits.tenant
        queue = tenants[tenant]
        self.remove(chosen)
        queue.granted += 1
        if tenant in tenants:
            tenants.move_to_end(tenant)  # the next turn is another's
        self._since_bulk = 0 if kind == "bulk" else self._since_bulk + 1
        self.starting(chosen, lambda: now)
        return chosen

    def _kind(self, running: Collection[Ticket], slots: int) -> Priority | None:
        interactive, bulk, spare = (self._sizes[kind] for kind in ("interactive", "bulk", "spare"))
        if bulk and (not interactive or self._since_bulk >= _BULK_EVERY - 1):
            return "bulk"
        if interactive:
            return "interactive"
        # Background traffic leaves one slot free for whoever comes next.
        if spare and (len(running) + 1 < slots or (slots == 1 and not running)):
            return "spare"
        return None

    def _fitting(
        self, tenants: Waiting, pool: list[Ticket], warm: list[Warm], now: float, patience_s: float
    ) -> list[Ticket]:
        """Return the calls that the server can run without loading anything; of the tenant in turn, if it has any.

        If there are none, or somebody has waited too long for that, all those that need the same.
        """
        half_s = max(pool[0].window_s, patience_s) / 2
        overdue = self._overdue(tenants[pool[0].traits.tenant], pool, now, half_s)
        choice = pool
        if overdue:  # what has begun goes on for a while
            young = [each for each in warm if now - each.since < half_s]
            choice = [t for t in pool if t in overdue or any(_gain(t, each) for each in young)]
        loaded = self._loaded
        if loaded is None:
            return choice
        fitting = [t for t in choice if t.traits.runner is None or t.traits.runner == loaded]
        if not fitting and (not overdue or self._just_loaded(now, half_s)):
            fitting = [t for t in pool if t.traits.runner is None or t.traits.runner == loaded]
            for queue in islice(tenants.values(), 1, None if fitting else _TENANTS_LOOKED_AT):
                if fitting:
                    break
                fitting = [t for t in queue.first() if t.ordered and t.traits.runner == loaded]
        if not fitting:  # another model may be loaded beside this one; only then something else has to be loaded
            # Those that came together with the first have waited as long, but for who of them was written first.
            until = (choice[0].entered or now) + choice[0].window_s
            together = [t for t in pool if (t.entered or now) <= until]
            resident = (t for t in (*choice, *together) if self._resident.get(t.traits.model) == t.traits.runner)
            runner = next(resident, choice[0]).traits.runner
            named = [t for t in choice if t.traits.runner == runner]
            return named or [t for t in together if t.traits.runner == runner]
        if fitting[0] is not pool[0]:
            self.reloads_avoided += 1
            if pool[0].passed is None:
                pool[0].passed = now
        return fitting

    def _just_loaded(self, now: float, half_s: float) -> bool:
        """Whether the runner that was asked for last has had less than `half_s` to answer calls.

        The time that it takes to load is not counted, up to as much again: whoever waits would wait for it anyway, and
        were it counted, a server whose loads take longer than its answers would do little else.
        """
        since = self._ready_since
        return now - (self._loaded_since + half_s if since is None else since) < half_s

    @staticmethod
    def _overdue(queue: Queue, pool: Iterable[Ticket], now: float, half_s: float) -> set[Ticket]:
        """Return the calls that would have had their turn long ago, had each had it as it came."""
        overdue = set()
        for ticket in pool:
            if ticket.passed is None:
                if ticket.due >= queue.granted:
                    break  # later ones are due later
                ticket.passed = now
            elif now - ticket.passed > half_s:
                overdue.add(ticket)
        return overdue

    def _alike(self, choice: list[Ticket], warm: list[Warm], running: Iterable[Ticket], now: float) -> Ticket:
        """Return the call that profits most from a free slot's prompt cache; of equals the one least like any running.

        Of those again the one that came first. A slot that has served `max_batch` of one group in a row is free for
        others.
        """
        if len(choice) == 1 or not any(ticket.prefix for ticket in choice):
            return choice[0]
        others = [ticket.prefix for ticket in running if ticket.prefix]
        best, best_score, best_warm = choice[0], (-1, 0), None
        for ticket in choice:
            gains = [(_gain(ticket, each), each) for each in warm]
            gain, found = max(gains, key=_first, default=(0, None))
            twin = max((common(ticket.prefix, other) for other in others), default=0)
            score = gain, -(twin if twin >= LONG_PREFIX else 0)
            if score > best_score:
                best, best_score, best_warm = ticket, score, found if gain else None
        if best_warm is not None:
            self._warm.remove(best_warm)
            best.in_a_row = best_warm.in_a_row + 1
            best.since = best_warm.since if best_warm.in_a_row else now
            self.prefixes_reused += 1
        return best


def _gain(ticket: Ticket, warm: Warm) -> int:
    """Return how many blocks of a call's prompt a slot need not read, 0 if they are few or others come first."""
    shared = common(ticket.prefix, warm.prefix)
    return shared if shared >= LONG_PREFIX and warm.in_a_row + 1 < ticket.max_batch else 0


def _first(pair: tuple[int, Warm]) -> int:
    return pair[0]
