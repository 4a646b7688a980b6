"""What an admission counts, by model and tenant."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from langchain_aegis.traits import Traits

Event = Literal["served", "refused", "expired", "cancelled", "merged"]
EVENTS: Final[tuple[Event, ...]] = get_args(Event)

BOUNDS_S: Final = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
OTHERS: Final = "(others)"
_MOST_ROWS = 1_000  # tenants come from outside: what they name must not fill the memory


@dataclass(slots=True)
class Row:
    """The counts of one model and tenant.

    Attributes:
        model: Name of the model, or None.
        tenant: Name of the tenant, None if there is none, `OTHERS` for all beyond the first 1,000.
        served: Calls that held a slot and gave it back.
        refused: Calls turned away because the queue was full.
        expired: Calls whose deadline passed before they could run.
        cancelled: Calls that left the queue by themselves.
        merged: Calls that were answered by another one's call of the model.
        waits: How many calls waited, by time: one number per bound of `BOUNDS_S`, and one for what is longer.
        waited_s: Seconds that all of them waited together.
    """

    model: str | None
    tenant: str | None
    served: int = 0
    refused: int = 0
    expired: int = 0
    cancelled: int = 0
    merged: int = 0
    waits: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    waited_s: float = 0.0

    def copy(self) -> Row:
        """Return an independent copy."""
        return Row(
            self.model, self.tenant, self.served, self.refused, self.expired, self.cancelled, self.merged,
            list(self.waits), self.waited_s,
        )  # fmt: skip

    def wait_s(self, quantile: float) -> float:
        """Return a bound in seconds that `quantile` (0 to 1) of the waits did not exceed; 0.0 if nobody waited.

        Beyond the last bound it is infinite.
        """
        rank, seen = quantile * sum(self.waits), 0
        for bound, count in zip((*BOUNDS_S, float("inf")), self.waits, strict=True):
            seen += count
            if count and seen >= rank:
                return bound
        return 0.0


@dataclass(frozen=True, slots=True)
class AdmissionStats:
    """One moment of an `Admission`: gauges first, then counts since it was made."""

    max_concurrency: int
    max_waiting: int
    running: int
    waiting: int  # calls that count against max_waiting
    waiting_bulk: int  # items of batches, and others that wait without counting
    waiting_spare: int  # background traffic
    oldest_s: float  # seconds that the call has waited that waits longest
    service_s: float | None  # smoothed time that a slot is held, in seconds
    served: int
    refused: int
    expired: int
    cancelled: int  # left the queue by themselves
    merged: int  # were answered by another one's call
    prefixes_reused: int  # turns given to calls whose prompt begins like the one before in their slot
    reloads_avoided: int  # turns given to calls that need what was loaded, past one that needs something else
    rows: tuple[Row, ...]  # the counts by model and tenant
    lent: int | None = None  # slots of those that processes share which this one has; None: it shares none now
    workers: int | None = None  # processes that share the server's slots, as far as known; None: none are shared


class Tally:
    """Counts by model and tenant. Not thread-safe: its admission's lock guards it."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str | None, str | None], Row] = {}

    def count(self, event: Event, traits: Traits) -> None:
        """Count one event."""
        row = self._row(traits)
        setattr(row, event, getattr(row, event) + 1)

    def waited(self, traits: Traits, seconds: float) -> None:
        """Note that a call waited for its slot."""
        row = self._row(traits)
        row.waits[bisect_left(BOUNDS_S, seconds)] += 1
        row.waited_s += seconds

    def rows(self) -> tuple[Row, ...]:
        """Return a copy of every row."""
        return tuple(row.copy() for row in self._rows.values())

    def _row(self, traits: Traits) -> Row:
        name = traits.model, traits.tenant
        row = self._rows.get(name)
        if row is None:
            if len(self._rows) >= _MOST_ROWS:
                name = None, OTHERS
            row = self._rows.setdefault(name, Row(*name))
        return row
