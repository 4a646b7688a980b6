"""What a cache has done in this process, counted as it happens."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration

from langchain_aegis.forks import reset_after_fork

# Upper bounds, six for each power of ten: a quantile is right within a quarter of itself.
SECONDS: Final = tuple(float(f"{step}e{power}") for power in range(-5, 2) for step in (1, 1.5, 2, 3, 5, 7))
# Upper bounds; finer where thresholds lie.
SIMILARITY: Final = (0.5, 0.6, 0.7, 0.75, 0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97,
                     0.98, 0.99, 1.0)  # fmt: skip
TIERS: Final = ("exact", "semantic", "stale", "miss")
_TASKS_KEPT = 50  # names; those that come later are counted as "other"


@dataclass(frozen=True, slots=True)
class Distribution:
    """How measured values are spread.

    Attributes:
        bounds: Upper bounds of the buckets, ascending, inclusive; what is above the last one is in a bucket of its own.
        counts: How many values each bucket holds, shape `(len(bounds) + 1,)`.
        total: Sum of the values.
        largest: The largest value, or 0.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float = 0.0
    largest: float = 0.0

    @property
    def count(self) -> int:
        """How many values there are."""
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """Return the value that `share` of all values do not exceed, estimated within its bucket; 0 without values."""
        wanted = share * self.count
        for at, upto in enumerate(accumulate(self.counts)):
            if self.counts[at] and upto >= wanted:
                low = self.bounds[at - 1] if at else 0.0
                high = min(self.bounds[at] if at < len(self.bounds) else self.largest, self.largest)
                return max(0.0, high - (high - low) * (upto - wanted) / self.counts[at])
        return 0.0

    @property
    def p50(self) -> float:
        """The median."""
        return self.quantile(0.5)

    @property
    def p95(self) -> float:
        """What 95 % of the values do not exceed."""
        return self.quantile(0.95)

    @property
    def p99(self) -> float:
        """What 99 % of the values do not exceed."""
        return self.quantile(0.99)

    def upto(self, bounds: Sequence[float]) -> list[tuple[float, int]]:
        """Return (bound, how many values do not exceed it) for some of the bounds, ascending."""
        sums = dict(zip(self.bounds, accumulate(self.counts), strict=False))
        return [(bound, sums[bound]) for bound in bounds]


@dataclass(frozen=True, slots=True)
class Cost:
    """What it took to make answers; 0 where that is not known.

    Attributes:
        seconds: Of generation.
        input_tokens: Read by the model.
        output_tokens: Written by the model.
    """

    seconds: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0


_FREE: Final = Cost()


@dataclass(frozen=True, slots=True)
class NearestMisses:
    """How near the misses came that had a candidate.

    Attributes:
        similarity: Cosines of the nearest candidates that were below the threshold, or were held back.
        last: The latest of them, or None.
        last_reason: Why it was not served: a code, or "".
    """

    similarity: Distribution
    last: float | None = None
    last_reason: str = ""


@dataclass(frozen=True, slots=True)
class Checked:
    """How many of the hits that were drawn for checking were wrong.

    Attributes:
        hits: Hits that were drawn and compared with a new answer.
        wrong: Those of them whose answer was another one.
    """

    hits: int = 0
    wrong: int = 0

    @property
    def rate(self) -> float:
        """Share of wrong ones, in [0, 1]; 0 if none was checked."""
        return self.wrong / self.hits if self.hits else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true share lies with 95 % confidence (Wilson); (0, 1) if none was checked."""
        if not self.hits:
            return 0.0, 1.0
        n, z = self.hits, 1.959964
        centre = self.rate + z * z / (2 * n)
        spread = z * math.sqrt(self.rate * (1 - self.rate) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """What was counted up to one moment.

    Attributes:
        exact_hits: Answered on an exact repeat.
        semantic_hits: Answered by meaning.
        stale_hits: Answered with an entry that was past its fresh time.
        misses: Not answered.
        stored: Answers written.
        reasons: Why lookups missed or the cache was not asked, by code.
        not_stored: Why answers were not written, by code.
        by_task: Lookups of each named task, by tier. At most 50 tasks, then "other".
        lookup_s: Seconds that lookups took, by tier.
        update_s: Seconds that it took to write an answer.
        saved: What the served answers would have cost to make again.
        nearest_misses: How near misses came.
        checked: Hits that were drawn for checking.
    """

    exact_hits: int
    semantic_hits: int
    stale_hits: int
    misses: int
    stored: int
    reasons: Mapping[str, int]
    not_stored: Mapping[str, int]
    by_task: Mapping[str, Mapping[str, int]]
    lookup_s: Mapping[str, Distribution]
    update_s: Distribution
    saved: Cost
    nearest_misses: NearestMisses
    checked: Checked


def cost_of(answer: Any) -> Cost:
    """Return what a served answer says about its making: generations, a message, messages, or any other value."""
    seconds, read, written = 0.0, 0, 0
    for item in answer if isinstance(answer, list) else (answer,):
        message = item.message if isinstance(item, ChatGeneration) else item
        if not isinstance(message, AIMessage):
            continue
        marks = message.response_metadata.get("aegis_cache")
        # Several generations of one call share its time.
        seconds = max(seconds, float((marks or {}).get("generation_s") or 0.0))
        if usage := message.usage_metadata:
            read += usage["input_tokens"]
            written += usage["output_tokens"]
    return Cost(seconds, read, written)


class Histogram:
    """Counts values by bucket; its owner holds the lock."""

    __slots__ = ("_bounds", "_counts", "_largest", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._largest = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value
        if value > self._largest:
            self._largest = value

    def frozen(self) -> Distribution:
        """Return what was counted."""
        return Distribution(self._bounds, tuple(self._counts), self._total, self._largest)


class Counts:
    """Counts what happens; every method may be called from any thread and takes about a microsecond.

    The child of a fork begins at 0.
    """

    def __init__(self) -> None:
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Begin at 0."""
        self._lock = threading.Lock()
        self._lookup_s = {tier: Histogram(SECONDS) for tier in TIERS}
        self._update_s = Histogram(SECONDS)
        self._reasons: dict[str, int] = {}
        self._not_stored: dict[str, int] = {}
        self._tasks: dict[str, dict[str, int]] = {}  # by tier
        self._saved_s = 0.0
        self._input_tokens = 0
        self._output_tokens = 0
        self._similarity = Histogram(SIMILARITY)
        self._last: tuple[float, str] | None = None
        self._checked = 0
        self._wrong = 0

    def hit(self, tier: str, seconds: float, *, cost: Cost = _FREE, task: str = "") -> None:
        """Count a lookup that was answered.

        Args:
            tier: "exact", "semantic", or "stale" (by either, with an entry past its fresh time).
            seconds: How long the lookup took.
            cost: What it took to make the answer, see `cost_of`.
            task: Name of the task, or "".
        """
        with self._lock:
            self._lookup_s[tier].add(seconds)
            self._saved_s += cost.seconds
            self._input_tokens += cost.input_tokens
            self._output_tokens += cost.output_tokens
            if task:
                self._count_task(task, tier)

    def miss(
        self, reasons: Sequence[str], seconds: float, nearest: tuple[float, str] | None = None, *, task: str = ""
    ) -> None:
        """Count a lookup that was not answered.

        Args:
            reasons: Codes.
            seconds: How long the lookup took.
            nearest: Cosine of the nearest candidate and the code why it was not served, if there was a candidate.
            task: Name of the task, or "".
        """
        with self._lock:
            self._lookup_s["miss"].add(seconds)
            for reason in reasons:
                self._reasons[reason] = self._reasons.get(reason, 0) + 1
            if nearest is not None:
                self._similarity.add(nearest[0])
                self._last = nearest
            if task:
                self._count_task(task, "miss")

    def bypassed(self, reason: str) -> None:
        """Count a call for which the cache was not asked."""
        with self._lock:
            self._reasons[reason] = self._reasons.get(reason, 0) + 1

    def stored(self, seconds: float) -> None:
        """Count an answer that was written; `seconds` is how long that took."""
        with self._lock:
            self._update_s.add(seconds)

    def not_stored(self, reason: str) -> None:
        """Count an answer that was not written."""
        with self._lock:
            self._not_stored[reason] = self._not_stored.get(reason, 0) + 1

    def checked(self, *, wrong: bool) -> None:
        """Count a hit that was compared with a new answer."""
        with self._lock:
            self._checked += 1
            self._wrong += wrong

    def snapshot(self) -> Counted:
        """Return everything as it is now, consistent in itself."""
        with self._lock:
            lookup_s = {tier: histogram.frozen() for tier, histogram in self._lookup_s.items()}
            update_s = self._update_s.frozen()
            last, last_reason = self._last or (None, "")
            return Counted(
                exact_hits=lookup_s["exact"].count,
                semantic_hits=lookup_s["semantic"].count,
                stale_hits=lookup_s["stale"].count,
                misses=lookup_s["miss"].count,
                stored=update_s.count,
                reasons=dict(self._reasons),
                not_stored=dict(self._not_stored),
                by_task={task: dict(tiers) for task, tiers in self._tasks.items()},
                lookup_s=lookup_s,
                update_s=update_s,
                saved=Cost(self._saved_s, self._input_tokens, self._output_tokens),
                nearest_misses=NearestMisses(self._similarity.frozen(), last, last_reason),
                checked=Checked(self._checked, self._wrong),
            )

    def _count_task(self, name: str, tier: str) -> None:
        tiers = self._tasks.get(name)
        if tiers is None:
            tiers = self._tasks.setdefault(name if len(self._tasks) < _TASKS_KEPT else "other", {})
        tiers[tier] = tiers.get(tier, 0) + 1
