"""What came of a soak, as Markdown."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from faults.soak_faults import FAULTS

if TYPE_CHECKING:
    from faults.soak import Soak

_PLACE = re.compile(r"(<!-- soak -->\n)(.*?)(<!-- /soak -->)", re.S)


def text_of_report(soak: Soak) -> str:
    """Return the figures of a run."""
    history = soak.history
    away = [name for name, fault in FAULTS.items() if fault.away]
    every = list(FAULTS)
    measured = history.count("measured", away) > 0
    added = [_more(soak.added(share, away)) if measured else "not measured" for share in (0.5, 0.99)]
    served = sum(history.hits.values())
    lines = [
        "| | |",
        "|---|---|",
        f"| Length, seed | {soak.seconds:g} s, {soak.seed} |",
        f"| Versions | {', '.join(f'{name} {version}' for name, version in soak.servers.items())} |",
        f"| Faults | {sum(history.faults.values())}, of {len(history.faults)} kinds |",
        f"| Calls | {history.calls:,}; {history.cancelled:,} of them cancelled |",
        f"| Answered by a cache | {served:,}: {_counted(history.hits)}; local tier {soak.local_hits:,} of them |",
        f"| Invalidated | {history.invalidations:,} times; {history.refused:,} times it was said that Redis is away |",
        f"| Errors of the model server that reached a caller | {_counted(history.errors) or 'none'} |",
        f"| A call without a cache | {_both(soak, 'bare', None)} |",
        f"| With a cache, nothing the matter | {_both(soak, 'measured', [''])} |",
        f"| With a cache, during a fault | {_both(soak, 'measured', every)} |",
        f"| Added while Redis is away | {added[0]} in the median, {added[1]} at p99 |",
        f"| Hits again after a fault | {_recovered(soak)} |",
        f"| Memory (RSS) | {_range(soak)} |",
        f"| Descriptors, threads, tasks | {_counts(soak)} |",
        f"| **Violations** | **{sum(history.wrong.values())}**{': ' * bool(history.wrong)}{_counted(history.wrong)} |",
        "",
        "Faults by kind: " + "; ".join(f"{name} {count}" for name, count in sorted(history.faults.items())) + ".",
    ]
    return "\n".join(lines)


def write_report(soak: Soak, path: Path) -> None:
    """Write the figures into a file between its marks, or as the whole file if it has none."""
    before = path.read_text() if path.exists() else ""
    text = f"\n{text_of_report(soak)}\n\n"
    if _PLACE.search(before):
        path.write_text(_PLACE.sub(lambda place: f"{place[1]}{text}{place[3]}", before))
    else:
        path.write_text(text.strip() + "\n")


def _counted(counts) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))


def _ms(seconds: float) -> str:
    return f"{seconds * 1_000:.1f} ms"


def _more(seconds: float) -> str:
    return _ms(seconds) if seconds > 0 else "nothing"


def _both(soak: Soak, what: str, faults: list[str] | None) -> str:
    half, most = (soak.history.quantile(share, what, faults) for share in (0.5, 0.99))
    return "not measured" if half is None or most is None else f"{_ms(half)} in the median, {_ms(most)} at p99"


def _recovered(soak: Soak) -> str:
    if not soak.recovered:
        return "not measured"
    took_s, after, what = max(soak.recovered)
    return (
        f"{statistics.median(each[0] for each in soak.recovered):.2f} s in the median, {took_s:.2f} s at most ({what}; "
        f"after: {after})"
    )


def _range(soak: Soak) -> str:
    warm, middle, end = soak.parts()
    if not end:
        return "too short to tell"
    told = (statistics.median(s.rss_bytes for s in part) / 1e6 for part in (warm, middle, end))
    return "{:.0f} MB in the first third, {:.0f} MB in the second, {:.0f} MB in the last (medians)".format(*told)


def _counts(soak: Soak) -> str:
    _, middle, end = soak.parts()
    if not end:
        return "too short to tell"
    told = [
        " and ".join(f"{statistics.median(getattr(s, name) for s in part):g}" for part in (middle, end))
        for name in ("descriptors", "threads", "tasks")
    ]
    return f"{'; '.join(told)} (medians of the second and the last third); nothing is left at the end"
