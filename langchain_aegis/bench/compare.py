"""Two reports side by side: what changed, and what cannot be told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from langchain_aegis.bench.figures import MIN_ROUNDS, Figure, apart, number
from langchain_aegis.bench.run import FORMAT
from langchain_aegis.bench.words import KINDS, NAMES
from langchain_aegis.calibration import Share
from langchain_aegis.errors import AegisConfigError

WITHIN = "within the noise"
# What of the settings decides which questions are asked, and what is served.
_DRAWN = ("seed", "mix", "workload", "questions")
_NOT_COMPARED = {"machine": ("load_before", "load_after"), "versions": (), "settings": ()}


@dataclass(frozen=True, slots=True)
class Change:
    """One figure in both reports.

    Attributes:
        what: The figure in words.
        before: In the first report, with its range.
        after: In the second.
        ratio: Second by first, with the smallest and the largest that the ranges allow; "" where there is none.
        verdict: "better", "worse", "within the noise", or why nothing is said.
    """

    what: str
    before: str
    after: str
    ratio: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two reports say together.

    Attributes:
        warnings: How machine, versions and settings differ, one line each.
        changes: Every figure that both have.
    """

    warnings: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)


def read_report(path: Path) -> dict[str, Any]:
    """Read what `aegis bench --json` wrote.

    Raises:
        AegisConfigError: The file cannot be read, or is something else.
    """
    try:
        report: Any = orjson.loads(path.read_bytes())
    except OSError as exc:
        raise AegisConfigError(f"{path} cannot be read: {exc.strerror}") from exc
    except orjson.JSONDecodeError as exc:
        raise AegisConfigError(f"{path} is no JSON ({exc})") from exc
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise AegisConfigError(f"{path} was not written by `aegis bench --json` of this version ({FORMAT})")
    return report


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> Comparison:
    """Compare two reports.

    A difference is called one only if the gap between both ranges is wider than either of them, there were at least
    three rounds in each, and it is larger than the machine's own noise. Multiples that were measured in the
    same rounds do not depend on the machine's speed; for them the noise is in their ranges already.
    """
    noise = 1 + max(float(report["noise"]["spread"]) for report in (first, second))
    ours = {figure.key: figure for figure in map(Figure.of, first["figures"])}
    changes = [
        _change(ours[figure.key], figure, noise) for figure in map(Figure.of, second["figures"]) if figure.key in ours
    ]
    return Comparison(list(_differences(first, second)), [*changes, *_answered(first, second)])


def _change(before: Figure, after: Figure, noise: float) -> Change:
    low, high = after.low / before.high, after.high / before.low
    middle = after.median / before.median
    rounds = min(len(before.values), len(after.values))
    if rounds < MIN_ROUNDS:
        verdict = f"too few rounds ({rounds})"
    elif not apart(before.low, before.high, after.low, after.high) or (
        not before.over and 1 / noise <= middle <= noise
    ):
        verdict = WITHIN
    else:
        verdict = "better" if (middle > 1) == (after.better == "higher") else "worse"
    over = f" against {after.over}" if after.over else ""
    callers = f", {after.callers} callers" if after.callers > 1 else ""
    return Change(
        f"{after.workload}: {NAMES.get(after.name, after.name)}, {after.way}{over}{callers}",
        str(before), str(after), f"{number(middle)} ({number(low)} to {number(high)})", verdict,
    )  # fmt: skip


def _answered(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Change]:
    """Compare what the cache answered: counts, so equal questions are needed."""
    if not first.get("answered") or not second.get("answered"):
        return
    same = all(first["settings"].get(name) == second["settings"].get(name) for name in _DRAWN)
    ours, theirs = first["answered"]["kinds"], second["answered"]["kinds"]
    for kind, name in KINDS.items():
        if kind not in ours or kind not in theirs:
            continue
        for what, better in (("answered", 1), ("wrong", -1)):
            before, after = (Share(_count(row[kind], what), row[kind]["asked"]) for row in (ours, theirs))
            yield Change(
                f"rag: {name}, {what}", f"{before.count} of {before.of}", f"{after.count} of {after.of}", "",
                _of_shares(before, after, same, better),
            )  # fmt: skip


def _of_shares(before: Share, after: Share, same: bool, better: int) -> str:
    if before.rate == after.rate:
        return "the same"
    if not same:  # other questions: each is a sample, and only intervals can be compared
        (low, high), (lower, higher) = before.interval(), after.interval()
        if lower <= high and low <= higher:
            return WITHIN
    return "better" if (after.rate > before.rate) == (better > 0) else "worse"


def _count(row: Mapping[str, int], what: str) -> int:
    return row["exact"] + row["semantic"] if what == "answered" else row["wrong"]


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    for part, left_out in _NOT_COMPARED.items():
        for name in dict.fromkeys((*first[part], *second[part])):
            one, other = first[part].get(name), second[part].get(name)
            if one != other and name not in left_out:
                yield f"{part}: {name.replace('_', ' ')} was {_shown(one)}, is {_shown(other)}"
    if first["package"] != second["package"]:
        yield f"package: was {first['package']}, is {second['package']}"


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "not told" if value is None else str(value)
