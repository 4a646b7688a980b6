"""Write what was measured into benchmarks/README.md, each benchmark into a section of its own, with its pictures.

A section stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`; the rest of the file is left alone.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from langchain_aegis.bench.drawing import FAINT, Svg
from langchain_aegis.bench.machine import load_average, machine

HERE = Path(__file__).resolve().parent
PAGE = HERE / "README.md"
# Okabe and Ito's, which the colour-blind tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#555555", "#cc79a7", "#56b4e9", "#e69f00")
_WIDTH, _TOP, _LEFT, _RIGHT, _FOOT = 900, 96, 190, 30, 92
_HEAD = """# Measured

Each section is written by the benchmark that it names; what stands between its marks is not edited by hand.
"""


def write_section(name: str, text: str, page: Path = PAGE) -> None:
    """Put a section in place of the one of this name; at the end of the page, if there is none."""
    whole = page.read_text(encoding="utf-8") if page.exists() else _HEAD
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    made = f"{begin}{text.strip()}\n{end}"
    place = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
    new = place.sub(lambda _: made, whole) if place.search(whole) else f"{whole.rstrip()}\n\n{made}"
    page.write_text(new, encoding="utf-8")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; all columns but the first are set to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def number(value: float | None, unit: str = "") -> str:
    """Return a number with three digits that count; "-" for None."""
    if value is None:
        return "-"
    size = abs(value)
    places = 0 if size >= 100 or value == 0 else 1 if size >= 10 else 2
    return f"{value:,.{places}f}{unit}"


class Conditions:
    """Under which a run was made; begun when it is constructed."""

    def __init__(self, versions: Mapping[str, str]) -> None:
        self._versions, self._before = versions, load_average()

    def lines(self, seconds: float, redis_version: str, seed: int) -> str:
        """Return machine, load, versions, date and length of the run, as a sentence or two."""
        at = machine()
        parts = ", ".join(f"{name} {told}" for name, told in self._versions.items())
        return (
            f"{at['processor']}, {at['cores']} cores, {at['memory_gb']} GB; load average {self._before} before and "
            f"{load_average()} after. {redis_version}; Python {at['python']}, {parts}. "
            f"{datetime.now(UTC):%d %B %Y}, seed {seed}, {seconds:.0f} s."
        )


def redis_version(client) -> str:
    """Return what the server and its search module call themselves."""
    told = client.info("server")
    name = f"Valkey {told['valkey_version']}" if "valkey_version" in told else f"Redis {told['redis_version']}"
    modules = {m[b"name"].decode(): m[b"ver"] for m in client.module_list() if b"ver" in m}
    ver = modules.get("search")
    return f"{name} with RediSearch {ver // 10000}.{ver // 100 % 100}.{ver % 100}" if ver else name


def draw_bars(
    name: str, title: str, about: str, groups: Sequence[str], series: Mapping[str, Sequence[float | None]], note: str
) -> str:  # fmt: skip
    """Write a picture of bars on a logarithmic scale, a group of them per operation; returns its file's name."""
    bar, gap = 15, 16
    height = _TOP + len(groups) * (len(series) * bar + gap) + _FOOT
    canvas = Svg(_WIDTH, height, title)
    _head(canvas, title, about, note, list(series))
    scale, ticks = _log_scale([v for line in series.values() for v in line if v], _LEFT, _WIDTH - 90)
    floor = height - _FOOT
    for tick in ticks:
        canvas.line([(scale(tick), _TOP), (scale(tick), floor)], FAINT)
        canvas.text(scale(tick), floor + 18, _short(tick), anchor="middle", size=12)
    y = _TOP + gap / 2
    for at, group in enumerate(groups):
        canvas.text(_LEFT - 10, y + len(series) * bar / 2 + 4, group, anchor="end")
        for colour, line in zip(COLOURS, series.values(), strict=False):
            value = line[at]
            if value:
                canvas.rect(_LEFT, y + 1, max(1.0, scale(value) - _LEFT), bar - 2, colour)
                canvas.text(scale(value) + 6, y + bar - 3, number(value), size=11)
            y += bar
        y += gap
    (HERE / f"{name}.svg").write_text(canvas.done() + "\n", encoding="utf-8")
    return f"{name}.svg"


def draw_lines(
    name: str, title: str, about: str, below: str, series: Mapping[str, Mapping[float, float]], note: str
) -> str:  # fmt: skip
    """Write a picture of lines, both scales logarithmic; returns its file's name.

    Args:
        name: Of the file, without its ending.
        title: What it shows.
        about: The unit of the values.
        below: What the other axis counts.
        series: Values by place on that axis, by the name of their line.
        note: Machine, load and the like.
    """
    canvas = Svg(_WIDTH, 456, title)
    _head(canvas, title, about, note, list(series))
    left, floor = 90, 456 - _FOOT - 24
    across, stops = _log_scale([x for line in series.values() for x in line], left + 20, _WIDTH - _RIGHT - 20)
    up, ticks = _log_scale([v for line in series.values() for v in line.values()], floor, _TOP + 6)
    for tick in ticks:
        canvas.line([(left, up(tick)), (_WIDTH - _RIGHT, up(tick))], FAINT)
        canvas.text(left - 8, up(tick) + 4, _short(tick), anchor="end", size=12)
    for stop in stops:
        canvas.text(across(stop), floor + 20, _short(stop), anchor="middle", size=12)
    canvas.text((left + _WIDTH - _RIGHT) / 2, floor + 40, below, anchor="middle")
    for colour, line in zip(COLOURS, series.values(), strict=False):
        points = [(across(x), up(v)) for x, v in sorted(line.items())]
        canvas.line(points, colour, width=2)
        for x, y in points:
            canvas.dot(x, y, 4, colour)
    (HERE / f"{name}.svg").write_text(canvas.done() + "\n", encoding="utf-8")
    return f"{name}.svg"


def _head(canvas: Svg, title: str, about: str, note: str, legend: Sequence[str]) -> None:
    canvas.text(20, 30, title, size=18, bold=True)
    canvas.text(20, 52, about, size=13)
    x = 24.0
    for colour, label in zip(COLOURS, legend, strict=False):
        canvas.rect(x - 5, 67, 11, 11, colour)
        canvas.text(x + 13, 77, label)
        x += 40 + 7.4 * len(label)
    words, line, y = note.split(), "", canvas.height - 36
    for word in [*words, ""]:  # lines of about 125 characters
        if line and (not word or len(line) + len(word) > 125):
            canvas.text(20, y, line, size=11, colour="#595959")
            line, y = "", y + 16
        line = f"{line} {word}".strip()


def _log_scale(values: Sequence[float], first: float, last: float) -> tuple[Callable[[float], float], list[float]]:
    """Return where a value stands between two places, and the ticks: powers of ten, with 2 and 5 if there are few."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    steps = (1, 2, 5) if high - low <= 2 else (1,)
    ticks = [step * 10.0**power for power in range(low, high) for step in steps] + [10.0**high]
    return lambda value: first + (math.log10(value) - low) / (high - low) * (last - first), ticks


def _short(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
