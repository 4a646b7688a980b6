"""A measured figure is a median with its range, or it is none."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from langchain_aegis.calibration import Share
from langchain_aegis.errors import AegisConfigError

Better = Literal["lower", "higher"]
MIN_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured quantity.

    Attributes:
        workload: "client", "callers", "burst" or "rag".
        name: What was measured, for example "latency_p50".
        way: How the model was called, for example "ChatAegis".
        over: The way that it is a multiple of, measured in the same rounds; "" for an absolute figure.
        callers: How many called at once.
        unit: "s", "ms", "tokens/s", "answers/s"; "x" for a multiple.
        better: Which direction is the better one.
        values: One per round, in order.
    """

    workload: str
    name: str
    way: str
    unit: str
    better: Better
    values: tuple[float, ...]
    over: str = ""
    callers: int = 1

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What makes it the same figure in two reports."""
        return self.workload, self.name, self.way, self.over, self.callers

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """Of all rounds the smallest."""
        return min(self.values)

    @property
    def high(self) -> float:
        """Of all rounds the largest."""
        return max(self.values)

    @property
    def differs(self) -> bool:
        """Whether a multiple is one: the round that is nearest to 1 is further from it than the rounds are apart.

        That all rounds lie on the same side is not enough: of three rounds that differ by chance alone, a quarter do.
        """
        return len(self.values) >= MIN_ROUNDS and apart(1.0, 1.0, self.low, self.high)

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.low)} to {number(self.high)}) {self.unit}"

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON; median and range are there for the reader."""
        names = ("workload", "name", "way", "over", "callers", "unit", "better", "values", "median", "low", "high")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Figure:
        """Read what `as_dict` wrote.

        Raises:
            AegisConfigError: It is no figure.
        """
        try:
            values = tuple(float(v) for v in value["values"])
            figure = cls(
                workload=str(value["workload"]), name=str(value["name"]), way=str(value["way"]),
                unit=str(value["unit"]), better="lower" if value["better"] == "lower" else "higher", values=values,
                over=str(value["over"]), callers=int(value["callers"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as exc:
            raise AegisConfigError(f"not a figure of `aegis bench`: {str(value)[:100]}") from exc
        if not values:
            raise AegisConfigError(f"a figure without values: {figure.name}")
        return figure


class Figures:
    """Collects figures round by round.

    Args:
        workload: Of all of them.
    """

    def __init__(self, workload: str) -> None:
        self._workload = workload
        self._values: dict[tuple[str, str, str, str, Better, int], list[float]] = defaultdict(list)

    def add(
        self,
        name: str,
        way: str,
        value: float,
        unit: str,
        better: Better = "lower",
        *,
        over: str = "",
        callers: int = 1,
    ) -> None:
        """Take one round's value."""
        self._values[name, way, over, unit, better, callers].append(value)

    def ratio(self, name: str, way: str, over: str, *, callers: int = 1, inverse: bool = False, as_: str = "") -> None:
        """Take the ratio of what two ways had in the latest round.

        Args:
            name: Name of the figure that both have.
            way: The numerator.
            over: The denominator.
            callers: Of both.
            inverse: The other way round, for "times faster".
            as_: Another name for the ratio.
        """
        found = {key[1]: (values[-1], key[4]) for key, values in self._values.items()
                 if (key[0], key[2], key[5]) == (name, "", callers)}  # fmt: skip
        (top, better), (bottom, _) = found[way], found[over]
        if inverse:
            top, bottom, better = bottom, top, "higher" if better == "lower" else "lower"
        self.add(as_ or name, way, top / bottom, "x", better, over=over, callers=callers)

    def done(self) -> list[Figure]:
        """Return them."""
        return [
            Figure(workload=self._workload, name=name, way=way, over=over, unit=unit, better=better, callers=callers,
                   values=tuple(values))
            for (name, way, over, unit, better, callers), values in self._values.items()
        ]  # fmt: skip


def apart(low: float, high: float, other_low: float, other_high: float) -> bool:
    """Say whether the gap between two ranges is wider than either; as ratios, so that 1/2 is as far from 1 as 2."""
    if min(low, other_low) <= 0:
        return False
    gap = max(other_low / high, low / other_high)
    return gap > max(high / low, other_high / other_low)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of all do not exceed; of fewer than 20, the 95th is the largest."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def find(figures: Iterable[Figure], **wanted: Any) -> list[Figure]:
    """Return the figures whose attributes are those."""
    return [f for f in figures if all(getattr(f, name) == value for name, value in wanted.items())]


def number(value: float) -> str:
    """Return three significant digits, never an exponent."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    places = 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.1 else 4 if size >= 0.01 else 5
    return f"{value:.{places}f}"


def share_text(count: int, of: int) -> str:
    """Return a share with Wilson's 95 % interval."""
    low, high = Share(count, of).interval()
    return f"{count} of {of} = {100 * count / of if of else 0:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
