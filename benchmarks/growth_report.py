"""What the benchmark of growth says: tables, pictures, and what follows from them."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from results_page import draw_lines, number, table, write_section

_READING = """\
Times are medians of blocking lookups, whole: an exact read, and a search if that finds nothing. Each answer is checked.
Entries are written by the cache's own code; the index is dropped and made again by the next lookup. A bare search asks
for 5 of a scope and all their fields, as the cache does.
"""
GB_8 = 8e9
_SAID = {"exact": "exact hit", "semantic": "hit by meaning", "miss": "miss"}


@dataclass(slots=True)
class Growth:
    """Everything that one run measured. Times are medians in microseconds, memory is bytes per entry.

    Attributes:
        dimensions: Of the vectors, where nothing else is said.
        entries: By number of entries: "exact", "semantic", "miss", "bytes", "fill_us", "rebuild_s".
        scopes: Entries of the scope with half of all.
        policies: By entries of a scope: a bare search by either policy, a bare "GET", and a miss of "aegis".
        policies_at: So many entries there were then.
        tenants: By number of tenants: times and "bytes".
        answers: By kilobytes of an answer: times and "bytes".
        large_vector_bytes: Of an answer of 1 kB with a vector of 1,024 dimensions.
        flat: By number of vectors: a bare search of "FLAT" and "HNSW", and "FLAT write", "HNSW write".
        conditions: Machine, load, versions, date.
        failures: Why the run has failed.
    """

    dimensions: int
    entries: dict[int, dict[str, float]] = field(default_factory=dict)
    scopes: dict[str, int] = field(default_factory=dict)
    policies: dict[int, dict[str, float]] = field(default_factory=dict)
    policies_at: int = 0
    tenants: dict[int, dict[str, float]] = field(default_factory=dict)
    answers: dict[int, dict[str, float]] = field(default_factory=dict)
    large_vector_bytes: float = 0.0
    flat: dict[int, dict[str, float]] = field(default_factory=dict)
    conditions: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def crossover(self) -> int | None:
        """The smallest number of vectors from which on a flat search takes 1.5 times as long as one over HNSW."""
        above = None
        for size, row in sorted(self.flat.items(), reverse=True):
            if row["FLAT"] < 1.5 * row["HNSW"]:
                break
            above = size
        return above


def _sections(growth: Growth) -> Iterator[tuple[str, str]]:
    if growth.entries:
        rows = [
            [f"{size:,}", *(number(row.get(o)) for o in _SAID), number(row["bytes"]), number(row["fill_us"]),
             number(row["rebuild_s"])]
            for size, row in growth.entries.items()
        ]  # fmt: skip
        yield (
            f"Entries: answers of 1 kB, {growth.dimensions} dimensions, looked up in a scope of half of all",
            table(["entries", *(f"{said}, µs" for said in _SAID.values()), "bytes each", "filling, µs each",
                   "index made again, s"], rows),
        )  # fmt: skip
    if growth.policies:
        rows = []
        for size, row in sorted(growth.policies.items()):
            better = min(row["ADHOC_BF"], row["BATCHES"])
            multiples = (row["aegis"] / better, row["aegis"] / (better + row["GET"]))
            shown = [number(row[name]) for name in ("ADHOC_BF", "BATCHES", "aegis")]
            rows.append([f"{size:,}", *shown, *(f"{number(multiple)}x" for multiple in multiples)])
        yield (
            f"Scopes, of {growth.policies_at:,} entries: a bare search with either policy, and a whole miss",
            table(["entries of the scope", "ADHOC_BF, µs", "BATCHES, µs", "aegis, µs", "to the better one",
                   "to the better one and a GET"], rows),
        )  # fmt: skip
    for title, head, values in (
        ("Tenants, the same number of entries altogether", "tenants", growth.tenants),
        ("Answers", "kB", growth.answers),
    ):
        if values:
            rows = [
                [f"{at:,}", *(number(row.get(o)) for o in _SAID), number(row["bytes"])] for at, row in values.items()
            ]
            yield title, table([head, *(f"{said}, µs" for said in _SAID.values()), "bytes each"], rows)
    if growth.flat:
        names = ("FLAT", "HNSW", "FLAT write", "HNSW write")
        rows = [[f"{size:,}", *(number(row[name]) for name in names)] for size, row in growth.flat.items()]
        where = growth.crossover
        told = (
            f"From {where:,} vectors on, a flat search takes at least 1.5 times as long as one over HNSW."
            if where else "A flat search never took 1.5 times as long as one over HNSW."
        )  # fmt: skip
        yield (
            f"Flat or HNSW: bare searches of 5 within one scope, float16, {growth.dimensions} dimensions",
            table(["vectors", *(f"{name}, µs" for name in names)], rows) + f"\n{told}\n",
        )
    if held := dict(_held(growth)):
        rows = [[what, number(each), f"{GB_8 / each:,.0f}"] for what, each in held.items()]
        yield (
            "What one Redis holds in 8 GB, computed from the bytes measured",
            table(["", "bytes each", "entries"], rows),
        )


def _held(growth: Growth) -> Iterator[tuple[str, float]]:
    if growth.entries:
        size = max(growth.entries)
        yield f"answers of 1 kB, {growth.dimensions} dimensions, of {size:,} entries", growth.entries[size]["bytes"]
    for kilobytes, row in growth.answers.items():
        yield f"answers of {kilobytes} kB, 384 dimensions", row["bytes"]
    if growth.large_vector_bytes:
        yield "answers of 1 kB, 1,024 dimensions", growth.large_vector_bytes


def print_growth(growth: Growth) -> None:
    """Print all tables."""
    for title, text in _sections(growth):
        print(f"\n{title}\n\n{text}", end="")
    print(f"\n{growth.conditions}")


def write_growth(growth: Growth) -> None:
    """Write the section of benchmarks/README.md, and its pictures."""
    pictures = []
    about = "microseconds; medians"
    if len(growth.entries) > 1:
        series = {said: {n: row[o] for n, row in growth.entries.items()} for o, said in _SAID.items()}
        pictures.append(draw_lines("growth-entries", "A lookup by number of entries", about, "entries", series,
                                   growth.conditions))  # fmt: skip
    if len(growth.policies) > 1:
        names = ("ADHOC_BF", "BATCHES", "aegis")
        series = {name: {n: row[name] for n, row in growth.policies.items()} for name in names}
        pictures.append(draw_lines(
            "growth-scopes", f"A search by entries of the scope, of {growth.policies_at:,}", about,
            "entries of the scope", series, growth.conditions,
        ))  # fmt: skip
    if len(growth.flat) > 1:
        series = {name: {n: row[name] for n, row in growth.flat.items()} for name in ("FLAT", "HNSW")}
        pictures.append(draw_lines("growth-flat", "A bare search, flat and over HNSW", about, "vectors", series,
                                   growth.conditions))  # fmt: skip
    text = ["## Growth\n", "Written by `make bench-growth`.", growth.conditions, "", _READING]
    text += [f"![{name}]({name})\n" for name in pictures]
    text += [f"### {title}\n\n{body}" for title, body in _sections(growth)]
    write_section("growth", "\n".join(text))
