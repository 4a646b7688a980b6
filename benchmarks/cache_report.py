"""What the benchmark of the cache says: tables, ratios beside what they shall be, pictures."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from cache_rounds import CALLS, NO_CACHE, OPERATIONS, Measured
from results_page import HERE, draw_bars, number, table, write_section

AEGIS, GET, FCALL, EXACT, SEMANTIC = "aegis", "GET", "FCALL KNN", "RedisCache", "RedisSemanticCache"
_READING = """\
Every system has the same entries and takes its turn in each round, in an order drawn anew; a prompt has 0.9 kB, an
answer 1 kB, and all entries are in one scope. Each answer is compared with the only right one: a wrong answer fails
the run, only right ones are timed, and an update is one that follows its own miss, as in LangChain.

- `GET`: one GET of the bytes that `aegis` keeps as the answer, with the same client. Nothing is checked.
- `FCALL KNN`: one call of a function on the server: the nearest vector of the scope, and a GET of its answer.
- `aegis`: this package's cache as it is by default: guards, signatures, epochs, budgets, breakers, counters.
- `RedisCache`, `RedisSemanticCache`: langchain-redis, if it is installed. At most 10,000 entries.
"""
_SAID = {"exact": "exact hit", "semantic": "hit by meaning", "miss": "miss", "update": "update"}


@dataclass(frozen=True, slots=True)
class Ratio:
    """Something that was measured, beside its goal.

    Attributes:
        what: In words.
        value: What it is; None: something that it needs was not measured.
        low: The same of the lower deciles, which say more where the machine is busy; None: there are none.
        goal: What it shall be at most, or at least.
        unit: Of both; "x" for a multiple.
        at_least: Whether more is better.
    """

    what: str
    value: float | None
    goal: float
    unit: str = "x"
    at_least: bool = False
    low: float | None = None

    @property
    def holds(self) -> bool | None:
        """Whether it is as it shall be; None if it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal


@dataclass(slots=True)
class Run:
    """Everything that one run measured.

    Attributes:
        sizes: By number of entries, with an embedder that costs nothing.
        real: With MiniLM, or None.
        bytes_each: Redis' bytes per entry of further arrangements.
        conditions: Machine, load, versions, date.
        at_once: How many lookups were under way where many were.
    """

    sizes: list[Measured]
    real: Measured | None
    bytes_each: Mapping[str, float]
    conditions: str
    at_once: int
    failures: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.failures = [
            f"{m.entries:,} entries: {failure}" for m in [*self.sizes, *filter(None, [self.real])]
            for failure in m.failures
        ]  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON: medians in microseconds."""
        return {
            "conditions": self.conditions, "failures": self.failures, "bytes_per_entry": dict(self.bytes_each),
            "sizes": [_plain(m) for m in self.sizes], "real": _plain(self.real) if self.real else None,
            "ratios": [{"what": r.what, "value": r.value, "goal": r.goal} for r in ratios(self)],
        }  # fmt: skip


def _plain(m: Measured) -> dict[str, Any]:
    return {
        "entries": m.entries,
        "median_us": {"|".join(key): round(m.wall_us(*key) or 0, 1) for key in m.wall},
        "cpu_us": {"|".join(key): round(m.cpu_us(*key) or 0, 1) for key in m.cpu},
        "per_second": {"|".join(key): round(m.rate(*key) or 0) for key in m.rates},
        "answers": {"|".join(key): [t.asked, t.answered, t.wrong] for key, t in m.tallies.items()},
        "bytes": m.memory, "fill_s": m.fill_s,
    }  # fmt: skip


def _over(a: float | None, *b: float | None) -> float | None:
    return None if a is None or None in b else a / sum(v for v in b if v is not None)


def _compared(run: Run) -> Measured:
    """Return what was measured with the most entries that all systems had."""
    return next((m for m in reversed(run.sizes) if m.entries <= 10_000), run.sizes[-1])


def ratios(run: Run) -> list[Ratio]:
    """Return what is held against goals, at the largest number of entries that all systems had."""
    low = {r.what: r.value for r in _ratios(run, 0.1)}
    return [replace(r, low=low[r.what]) for r in _ratios(run, 0.5)]


def _ratios(run: Run, share: float) -> list[Ratio]:
    of = _compared(run)
    at = partial(of.wall_us, share=share)
    found = []
    for way, most in (("sync", 1.8), ("async", 1.7)):
        found.append(Ratio(f"exact hit, {way}, to a GET", _over(at(AEGIS, way, "exact"), at(GET, way, "exact")), most))
    for way in ("sync", "async"):
        floor = at(GET, way, "exact"), at(FCALL, way, "semantic"), at(FCALL, way, "miss")
        near, miss = at(AEGIS, way, "semantic"), at(AEGIS, way, "miss")
        found += [
            Ratio(f"hit by meaning, {way}, to a GET and an FCALL", _over(near, floor[0], floor[1]), 1.6),
            Ratio(f"miss, {way}, to a GET and an FCALL", _over(miss, floor[0], floor[2]), 1.6),
            Ratio(f"hit by meaning, {way}, to {SEMANTIC}", _over(near, at(SEMANTIC, way, "semantic")), 0.5),
            Ratio(f"miss, {way}, to {SEMANTIC}", _over(miss, at(SEMANTIC, way, "miss")), 0.5),
            Ratio(f"update, {way}, the caller's time", at(AEGIS, way, "update"), 100.0, "µs"),
        ]
    for said, way, most in (("sync", "sync", 0.55), ("through invoke", "invoke", 0.85)):
        to_peer = _over(at(AEGIS, way, "exact"), at(EXACT, way, "exact"))
        found.append(Ratio(f"exact hit, {said}, to {EXACT}", to_peer, most))
    rate, floor_rate, peer_rate = (of.rate(name, "exact", 1 - share) for name in (AEGIS, GET, EXACT))
    found.append(Ratio(f"exact lookups per second, {run.at_once} at once, to GETs", _over(rate, floor_rate), 0.6,
                       at_least=True))  # fmt: skip
    found.append(Ratio(f"exact lookups per second, {run.at_once} at once, to {EXACT}", _over(rate, peer_rate), 2.5,
                       at_least=True))  # fmt: skip
    for way in ("invoke", "ainvoke"):
        found.append(Ratio(f"added to {way} by a miss and its update", of.added_us(AEGIS, way, share), 1200.0, "µs"))
    for dimensions, most in ((384, 52.0), (1024, 88.0)):
        each = run.bytes_each.get(f"{AEGIS}, {dimensions} dimensions, LRU and source sets")
        found.append(Ratio(f"10,000 answers of 1 KB, {dimensions} dimensions, LRU and source sets",
                           each and each / 100, most, "MB"))  # fmt: skip
    by_size = {m.entries: m for m in run.sizes}
    if 10_000 in by_size and 100_000 in by_size:
        for operation in ("semantic", "miss"):
            small, large = (by_size[n].wall_us(AEGIS, "sync", operation, share=share) for n in (10_000, 100_000))
            found.append(Ratio(f"{_SAID[operation]}, sync, 100,000 entries to 10,000", _over(large, small), 1.5))
    return [r for r in found if r.value is not None]


def _sections(run: Run) -> Iterator[tuple[str, str]]:
    rows = []
    for r in ratios(run):
        goal = f"{'at least' if r.at_least else 'at most'} {_with(r.goal, r.unit)}"
        rows.append(
            [r.what, _with(r.value, r.unit), _with(r.low, r.unit), goal, "holds" if r.holds else "does not hold"]
        )
    yield "Beside their goals", table(["", "medians", "lower deciles", "goal", "by medians"], rows)
    for m in run.sizes:
        yield f"{m.entries:,} entries, an embedder that costs nothing: medians in µs", _times(m, run.at_once)
        yield f"{m.entries:,} entries: processor time of the caller, medians in µs", _table(m, m.cpu_us)
        yield f"{m.entries:,} entries, through a model that answers at once: medians in µs", _calls(m)
    if run.real is not None:
        yield (
            f"{run.real.entries:,} entries, MiniLM in this process: medians in µs",
            _times(run.real, run.at_once) + "\n" + _answered(run.real),
        )
    of = _compared(run)
    rows = [[f"{name}, 384 dimensions", _with(each / of.entries / 100, "MB")] for name, each in of.memory.items()]
    rows += [[what, _with(each / 100, "MB")] for what, each in run.bytes_each.items()]
    yield "Memory of Redis for 10,000 answers of 1 KB", table(["", ""], rows)


def _with(value: float | None, unit: str) -> str:
    return number(value) + {"x": "x"}.get(unit, f" {unit}")


def _systems(m: Measured) -> list[str]:
    return list(dict.fromkeys(name for name, _, _ in m.wall if name != NO_CACHE))


def _ordered(m: Measured) -> list[str]:
    return [name for name in m.fill_s if name in _systems(m)]


def _table(m: Measured, of: Any) -> str:
    heads = ["", *(f"{_SAID[o]}, {way}" for way in ("sync", "async") for o in OPERATIONS)]
    rows = [
        [name, *(number(of(name, way, o)) for way in ("sync", "async") for o in OPERATIONS)] for name in _ordered(m)
    ]
    return table(heads, rows)


def _times(m: Measured, at_once: int) -> str:
    heads = ["", *(f"{_SAID[o]}, {way}" for way in ("sync", "async") for o in OPERATIONS)]
    many = bool(m.rates)
    heads += [f"exact/s, {at_once} at once", "by meaning/s"] if many else []
    rows = []
    for name in _ordered(m):
        row = [name, *(number(m.wall_us(name, way, o)) for way in ("sync", "async") for o in OPERATIONS)]
        rows.append(row + ([number(m.rate(name, o)) for o in ("exact", "semantic")] if many else []))
    return table(heads, rows)


def _calls(m: Measured) -> str:
    heads = ["", *(f"{_SAID[o]}, {way}" for way in ("invoke", "ainvoke") for o in CALLS), "added by a miss, invoke",
             "ainvoke"]  # fmt: skip
    rows = []
    for name in [NO_CACHE, *_ordered(m)]:
        if (name, "invoke", "miss") in m.wall:
            row = [name, *(number(m.wall_us(name, way, o)) for way in ("invoke", "ainvoke") for o in CALLS)]
            added = [number(m.added_us(name, way)) for way in ("invoke", "ainvoke")]
            rows.append(row + (added if name != NO_CACHE else ["-", "-"]))
    return table(heads, rows)


def _answered(m: Measured) -> str:
    rows = []
    for name in _ordered(m):
        row = [name]
        for operation in ("exact", "semantic", "miss"):
            t = m.tallies.get((name, operation))
            row.append("-" if t is None or not t.asked else f"{t.answered} of {t.asked}, {t.wrong} wrong")
        rows.append(row)
    return table(["answered", "exact repeats", "paraphrases", "new questions"], rows)


def print_run(run: Run) -> None:
    """Print all tables."""
    for title, text in _sections(run):
        print(f"\n{title}\n\n{text}", end="")
    print(f"\n{run.conditions}")


def write_run(run: Run) -> None:
    """Write the section of benchmarks/README.md, and its picture."""
    of = _compared(run)
    shown = [("sync", o) for o in OPERATIONS] + [("async", o) for o in OPERATIONS]
    series = {name: [of.wall_us(name, way, o) for way, o in shown] for name in _ordered(of)}
    picture = draw_bars(
        "cache", f"One operation, {of.entries:,} entries", "microseconds, logarithmic; medians of interleaved rounds",
        [f"{_SAID[o]}, {way}" for way, o in shown], series, run.conditions,
    )  # fmt: skip
    text = [
        "## The cache\n",
        "Written by `make bench-cache`.",
        run.conditions,
        "",
        _READING,
        f"![{picture}]({picture})\n",
    ]
    profiles = [name for name in ("hit", "semantic", "miss") if (HERE / "profiles" / f"{name}.txt").exists()]
    if profiles:
        links = ", ".join(f"[{name}](profiles/{name}.txt)" for name in profiles)
        text.append(f"Where the time of a lookup goes, function by function: {links}.\n")
    text += [f"### {title}\n\n{body}" for title, body in _sections(run)]
    write_section("cache", "\n".join(text))
