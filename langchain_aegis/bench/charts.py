"""The charts of a report: what is in them, and where it stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_aegis.bench.drawing import FAINT, INK, Canvas
from langchain_aegis.bench.figures import Figure, find, number

WIDTH, HEIGHT = 900, 456
# Okabe and Ito's colours, which the colour-blind tell apart; each has a marker of its own, too.
_COLOURS = {"ChatOllama": "#555555", "ChatAegis": "#0072b2", "batched": "#d55e00", "cached": "#009e73"}
_TIERS = (("exact", "exact hit", "#009e73"), ("semantic", "hit by meaning", "#56b4e9"),
          ("wrong", "wrong answer", "#d55e00"), ("model", "asks the model", "#cccccc"))  # fmt: skip
_KINDS = {
    "repeat": "exact repeats", "paraphrase": "paraphrases", "new": "new questions", "trap": "traps beside them",
    "own": "own questions",
}  # fmt: skip
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 30, 96, 122
_CALLERS = {
    "latency_p50": ("Time to a whole answer, median", "seconds"),
    "first_token_p50": ("Time to the first token, median", "seconds"),
    "throughput": ("Throughput", "answers per second"),
}


@dataclass(frozen=True, slots=True)
class Chart:
    """One picture.

    Attributes:
        name: Of its file.
        title: What it shows.
        draw: Draws it.
    """

    name: str
    title: str
    draw: Callable[[Canvas], None]


def charts(report: Mapping[str, Any]) -> Iterator[Chart]:
    """Yield the charts for which the report has figures."""
    figures = [Figure.of(each) for each in report["figures"]]
    notes = footer(report)
    if costs := [f for f in find(figures, workload="client", over="") if f.name.startswith("cpu_")]:
        yield Chart("client-cost", "What one answer of 512 tokens costs the client",
                    lambda canvas: _draw_costs(canvas, costs, notes))  # fmt: skip
    for name, (title, unit) in _CALLERS.items():
        if found := find(figures, workload="callers", name=name, over=""):
            yield Chart(f"callers-{name.replace('_', '-')}", title, _drawer(found, title, unit, notes))
    if answered := report.get("answered"):
        yield Chart("rag-answered", "What the cache answers", lambda canvas: _draw_answered(canvas, answered, notes))


def footer(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return in short lines what was measured on what, with which settings and how much noise."""
    at, told, spin = report["machine"], report["settings"], report["noise"]["spin_ms"]
    server = f"Ollama {told['ollama']} {told['ollama_version']}, {told['model']}" if "model" in told else "scripted"
    length = f"{told['tokens']} tokens per answer, " if told.get("tokens") else ""
    lines = (
        f"{_shorter(at['processor'])}, {at['cores']} cores, load {at['load_before']} to {at['load_after']}; "
        f"the same computation took {number(spin['low'])} to {number(spin['high'])} ms, "
        f"median {number(spin['median'])}",
        f"{server}; langchain-aegis {report['package']}, Python {at['python']}; {length}seed {told['seed']}, "
        f"{report['made_at'][:10]}",
        "Medians of interleaved rounds; bars span all rounds.",
    )
    return tuple(line.encode("ascii", "replace").decode() for line in lines)


def _drawer(figures: list[Figure], title: str, unit: str, notes: tuple[str, ...]) -> Callable[[Canvas], None]:
    return lambda canvas: _draw_lines(canvas, figures, title, unit, notes)


def _draw_lines(canvas: Canvas, figures: list[Figure], title: str, unit: str, notes: tuple[str, ...]) -> None:
    """Draw a line per way over the number of callers; the scale of the values is logarithmic."""
    ways = [way for way in _COLOURS if find(figures, way=way)]
    levels = sorted({f.callers for f in figures})
    _head(canvas, title, f"{unit}, logarithmic scale, by callers at once", notes)
    _legend(canvas, [(way, _COLOURS[way]) for way in ways])
    low, high = min(f.low for f in figures), max(f.high for f in figures)
    ticks = _log_ticks(low, high)
    bottom, top = math.log10(ticks[0]), math.log10(ticks[-1])
    floor, right = canvas.height - _BOTTOM, canvas.width - _RIGHT

    def y(value: float) -> float:
        return floor - (math.log10(value) - bottom) / (top - bottom) * (floor - _TOP)

    for tick in ticks:
        canvas.line([(_LEFT, y(tick)), (right, y(tick))], FAINT)
        canvas.text(_LEFT - 8, y(tick) + 4, _tick(tick), anchor="end")
    step = (right - _LEFT) / len(levels)
    for at, callers in enumerate(levels):
        canvas.text(_LEFT + (at + 0.5) * step, floor + 20, f"{callers}", anchor="middle")
    canvas.text((_LEFT + right) / 2, floor + 42, "callers at once", anchor="middle")
    for number_of, way in enumerate(ways):
        shift = (number_of - (len(ways) - 1) / 2) * 9  # side by side, so that no range hides another
        points = []
        for at, callers in enumerate(levels):
            for figure in find(figures, way=way, callers=callers):
                x = _LEFT + (at + 0.5) * step + shift
                canvas.line([(x, y(figure.low)), (x, y(figure.high))], _COLOURS[way], width=2)
                points.append((x, y(figure.median)))
        canvas.line(points, _COLOURS[way], width=1.5)
        for point in points:
            _mark(canvas, way, *point)


def _draw_costs(canvas: Canvas, figures: list[Figure], notes: tuple[str, ...]) -> None:
    _head(
        canvas,
        "What one answer of 512 tokens costs the client",
        "milliseconds of processor time; less is better",
        notes,
    )
    ways = ("ChatOllama", "ChatAegis")
    _legend(canvas, [(way, _COLOURS[way]) for way in ways], marked=False)
    left, right, floor = 110, canvas.width - 170, canvas.height - _BOTTOM
    ticks = _even_ticks(max(f.high for f in figures))
    for tick in ticks:
        x = left + tick / ticks[-1] * (right - left)
        canvas.line([(x, _TOP), (x, floor)], FAINT)
        canvas.text(x, floor + 20, _tick(tick), anchor="middle")
    canvas.text((left + right) / 2, floor + 42, "milliseconds", anchor="middle")
    names = [name for name in ("invoke", "ainvoke", "stream", "astream") if find(figures, name=f"cpu_{name}")]
    step = (floor - _TOP) / len(names)
    for at, name in enumerate(names):
        y = _TOP + at * step
        canvas.text(left - 10, y + step / 2 + 4, f".{name}", anchor="end")
        for place, way in enumerate(ways):
            for figure in find(figures, name=f"cpu_{name}", way=way):
                top, height = y + step * (0.12 + 0.4 * place), step * 0.34
                canvas.rect(left, top, figure.median / ticks[-1] * (right - left), height, _COLOURS[way])
                ends = [left + v / ticks[-1] * (right - left) for v in (figure.low, figure.high)]
                for width, colour in ((5, "#ffffff"), (2, INK)):  # seen on the bar, too
                    canvas.line([(ends[0], top + height / 2), (ends[1], top + height / 2)], colour, width=width)
                text = f"{number(figure.median)} ({number(figure.low)} to {number(figure.high)})"
                canvas.text(max(ends[1], left) + 8, top + height / 2 + 4, text, size=12)


def _draw_answered(canvas: Canvas, answered: Mapping[str, Any], notes: tuple[str, ...]) -> None:
    kinds: dict[str, Mapping[str, int]] = {k: answered["kinds"][k] for k in _KINDS if k in answered["kinds"]}
    mix = [kinds[k] for k in kinds if k != "trap"]
    total = {name: sum(row[name] for row in mix) for name in ("asked", "exact", "semantic", "wrong")}
    rows = [("the whole mix", total), *((_KINDS[kind], row) for kind, row in kinds.items())]
    drawn = "repeat" in kinds
    told = "half exact repeats, 30 % paraphrases, 20 % new; drawn by seed" if drawn else "questions from a file"
    _head(canvas, "What the cache answers", f"share of the questions of each kind; {told}", notes)
    _legend(canvas, [(label, colour) for _, label, colour in _TIERS])
    left, right, floor = 190, canvas.width - 60, canvas.height - _BOTTOM
    for tick in range(0, 101, 20):
        x = left + tick / 100 * (right - left)
        canvas.line([(x, _TOP), (x, floor)], FAINT)
        canvas.text(x, floor + 20, f"{tick} %", anchor="middle")
    step = (floor - _TOP) / len(rows)
    marks = [left + share / 100 * (right - left) for share in (85, 90)]
    for at, (label, row) in enumerate(rows):
        top, height, x = _TOP + at * step + step * 0.16, step * 0.68, float(left)
        canvas.text(left - 10, top + height / 2 - 3, label, anchor="end", bold=at == 0)
        canvas.text(left - 10, top + height / 2 + 13, f"{row['asked']} asked", anchor="end", size=11)
        wrong = row["wrong"]
        parts = {"exact": row["exact"], "semantic": row["semantic"] - wrong, "wrong": wrong,
                 "model": row["asked"] - row["exact"] - row["semantic"]}  # fmt: skip
        for name, _, colour in _TIERS:
            width = parts[name] / row["asked"] * (right - left)
            canvas.rect(x, top, width, height, colour)
            if width > 40:
                dark = name in ("exact", "wrong")
                middle = x + width / 2
                if drawn and at == 0 and any(abs(middle - mark) < 20 for mark in marks):
                    # Beside the marks of what was expected, not under them: on the wider side.
                    before, after = marks[0] - x, x + width - marks[-1]
                    middle = x + before / 2 if before > after else marks[-1] + after / 2
                canvas.text(middle, top + height / 2 + 5, f"{100 * parts[name] / row['asked']:.0f} %",
                            anchor="middle", colour="#ffffff" if dark else INK)  # fmt: skip
            x += width
    if drawn:
        y = _TOP + step * 0.04
        for mark in marks:
            canvas.line([(mark, y), (mark, y + step * 0.92)], INK, width=2)
        canvas.text(left + 0.875 * (right - left), y - 6, "expected: 85 to 90 %", size=11, anchor="middle")


def _head(canvas: Canvas, title: str, about: str, notes: tuple[str, ...]) -> None:
    canvas.text(20, 30, title, size=18, bold=True)
    canvas.text(20, 52, about, size=13)
    for at, note in enumerate(notes):
        canvas.text(20, canvas.height - 44 + 16 * at, note, size=11, colour="#595959")


def _legend(canvas: Canvas, entries: Sequence[tuple[str, str]], *, marked: bool = True) -> None:
    x = 24.0
    for label, colour in entries:
        if marked and label in _COLOURS:
            _mark(canvas, label, x, 72)
        else:
            canvas.rect(x - 5, 67, 11, 11, colour)
        canvas.text(x + 13, 77, label)
        x += 40 + 7.6 * len(label)


def _mark(canvas: Canvas, way: str, x: float, y: float) -> None:
    colour = _COLOURS[way]
    if way == "ChatOllama":
        canvas.rect(x - 5, y - 5, 10, 10, colour)
    elif way == "ChatAegis":
        canvas.dot(x, y, 5.5, colour)
    elif way == "batched":
        canvas.polygon([(x, y - 7), (x + 6.5, y + 5), (x - 6.5, y + 5)], colour)
    else:
        canvas.polygon([(x, y - 7), (x + 7, y), (x, y + 7), (x - 7, y)], colour)


def _log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten around the values; with 2 and 5 in between if there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last == first:
        last += 1
    if last - first > 3:
        return [10.0**power for power in range(first, last + 1)]
    fine = [step * 10.0**power for power in range(first, last) for step in (1, 2, 5)] + [10.0**last]
    below, above = [t for t in fine if t <= low], [t for t in fine if t >= high]
    return [t for t in fine if below[-1] <= t <= above[0]]


def _even_ticks(high: float) -> list[float]:
    size = 10.0 ** math.floor(math.log10(high))
    step = next(s * size for s in (0.1, 0.2, 0.25, 0.5, 1, 2) if s * size * 6 >= high)
    return [step * n for n in range(math.ceil(high / step) + 1)]


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 or value == 0 else f"{value:.6f}".rstrip("0")


def _shorter(processor: str) -> str:
    return " ".join(processor.replace("(R)", "").replace("(TM)", "").replace(" CPU", "").split())[:40]
