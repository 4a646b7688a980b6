"""How figures are called and grouped for a reader, the same in a terminal and on a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_aegis.bench.claims import Claim, as_text
from langchain_aegis.bench.figures import Figure, find, number, share_text

Rows = Sequence[tuple[str, ...]]

NAMES = {
    "cpu_invoke": "processor time, invoke", "cpu_ainvoke": "processor time, ainvoke",
    "cpu_stream": "processor time, stream", "cpu_astream": "processor time, astream",
    "first_token_p50": "first token, median", "latency_p50": "whole answer, median", "latency_p95": "whole answer, p95",
    "throughput": "throughput", "tokens": "tokens", "times_faster": "times faster",
    "time_per_question": "time per question, mean", "hit_p50": "an answer from the cache, median",
}  # fmt: skip
WORKLOADS = {
    "client": "Client: one answer of 512 tokens, scripted server in another process",
    "rag": "RAG application: every question without and with the cache around retrieval and model",
    "callers": "Callers at once: streamed answers",
    "burst": "Burst: 16 callers at once, 4 different questions",
}
KINDS = {
    "first": "asked for the first time", "repeat": "exact repeats", "paraphrase": "paraphrases",
    "new": "new questions", "trap": "traps beside them", "own": "own questions",
}  # fmt: skip


def tables(report: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], Rows]]:
    """Yield (title, heads, rows) for everything that was measured; a figure stands with its range."""
    figures = [Figure.of(each) for each in report["figures"]]
    claims = [Claim(**each) for each in report["claims"]]
    if claims:
        rows: Rows = [(c.said, c.by, c.measured, as_text(c), c.reason) for c in claims]
        yield "Expected and measured", ("Expected", "By", "Measured (range)", "", "Why"), rows
    if answered := report.get("answered"):
        rows = [
            (KINDS[kind], share_text(row["exact"] + row["semantic"], row["asked"]), str(row["exact"]),
             str(row["semantic"]), str(row["wrong"]), str(row["unlabelled"]))
            for kind in KINDS
            if (row := answered["kinds"].get(kind))
        ]  # fmt: skip
        heads = ("Questions", "Answered (95 %)", "exact", "by meaning", "wrong", "unlabelled")
        yield "What the cache answers", heads, rows
        pairs = [("wrong", *pair) for pair in answered["wrong"]] + [("no label", *p) for p in answered["unlabelled"]]
        if pairs:
            yield "Answers to judge", ("", "Asked", "Answered with the answer to"), pairs
    for workload, title in WORKLOADS.items():
        of_one = find(figures, workload=workload)
        if absolute := [f for f in of_one if not f.over]:
            yield title, *_grid(absolute)
        if ratios := [f for f in of_one if f.over]:
            rows = [(NAMES[f.name], f"{f.way} against {f.over}", str(f.callers), str(f), verdict(f)) for f in ratios]
            yield f"{title.partition(':')[0]}: compared in the same rounds", ("", "", "Callers", "Ratio", ""), rows


def verdict(figure: Figure) -> str:
    """Say what a ratio with its range allows to say."""
    if not figure.differs:
        return "within the noise"
    return "better" if (figure.median > 1) == (figure.better == "higher") else "worse"


def setting_lines(report: Mapping[str, Any]) -> list[str]:
    """Return machine, versions, settings and noise, one line each."""
    noise = report["noise"]
    spin = noise["spin_ms"]
    return [
        f"Machine: {_joined(report['machine'])}",
        f"Versions: {_joined(report['versions'])}",
        f"Settings: {_joined(report['settings'])}",
        f"Noise: the same computation, {spin['times']} times, took {number(spin['median'])} ms "
        f"({number(spin['low'])} to {number(spin['high'])}), the quartiles {noise['spread']:.0%} apart",
        f"Measured: {report['made_at']}, in {report['took_s']:.0f} s",
    ]


def _grid(figures: Sequence[Figure]) -> tuple[tuple[str, ...], Rows]:
    """Return one row for each quantity and number of callers, one column for each way."""
    ways = list(dict.fromkeys(f.way for f in figures))
    names = dict.fromkeys((f.name, f.callers, f.unit) for f in figures)
    rows = []
    for name, callers, unit in names:
        cells = []
        for way in ways:
            found = find(figures, name=name, callers=callers, way=way)
            cells.append("".join(str(f).removesuffix(f" {unit}") for f in found))
        rows.append((f"{NAMES[name]}, {unit}", str(callers), *cells))
    return ("", "Callers", *ways), rows


def _joined(values: Mapping[str, Any]) -> str:
    shown = {k: ", ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for k, v in values.items()}
    return "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items() if value is not None)
