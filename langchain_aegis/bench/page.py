"""A report as one HTML page that needs nothing else: no script, no network, no font."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from langchain_aegis.bench.charts import HEIGHT, WIDTH, charts
from langchain_aegis.bench.drawing import Pixels, Svg
from langchain_aegis.bench.words import setting_lines, tables

_STYLE = """
body { font: 15px/1.5 Helvetica, Arial, sans-serif; color: #1a1a1a; background: #fff; max-width: 1100px;
  margin: 2em auto; padding: 0 1em; }
h1 { font-size: 26px; } h2 { font-size: 19px; margin-top: 2em; }
svg { display: block; width: 100%; max-width: 900px; height: auto; border: 1px solid #d9d9d9; margin: 1em 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 4px 12px 4px 0; border-bottom: 1px solid #d9d9d9; }
td { font-variant-numeric: tabular-nums; }
.good { color: #00664a; font-weight: bold; } .bad { color: #a33c00; font-weight: bold; } .none { color: #595959; }
"""
_CLASSES = {
    "holds": "good", "better": "good", "does not hold": "bad", "worse": "bad", "undecided": "none",
    "within the noise": "none",
}  # fmt: skip
_READING = (
    "Every figure is the median of interleaved rounds, with the smallest and the largest round in brackets. A ratio "
    "is called a difference only where its rounds are further from 1 than from each other; the rest is noise."
)


def page(report: Mapping[str, Any]) -> str:
    """Return the page."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>aegis bench, {escape(report['made_at'][:10])}</title><style>{_STYLE}</style></head><body>",
        f"<h1>aegis bench</h1><p>{escape(_READING)}</p>",
        *(f"<p>{escape(line)}</p>" for line in setting_lines(report)),
    ]
    for chart in charts(report):
        canvas = Svg(WIDTH, HEIGHT, chart.title)
        chart.draw(canvas)
        parts.append(canvas.done())
    for title, heads, rows in tables(report):
        parts.append(f'<h2>{escape(title)}</h2><div class="scroll"><table><tr>')
        parts += [f"<th>{escape(head)}</th>" for head in heads]
        parts.append("</tr>")
        for row in rows:
            parts.append("<tr>")
            for cell in row:
                kind = f' class="{_CLASSES[cell]}"' if cell in _CLASSES else ""
                parts.append(f"<td{kind}>{escape(cell)}</td>")
            parts.append("</tr>")
        parts.append("</table></div>")
    return "".join([*parts, "</body></html>\n"])


def write_pictures(report: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write each chart as a PNG file; returns their paths.

    Raises:
        AegisConfigError: Pillow is not installed.
        OSError: The directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in charts(report):
        canvas = Pixels(WIDTH, HEIGHT)
        chart.draw(canvas)
        path = directory / f"{chart.name}.png"
        path.write_bytes(canvas.done())
        written.append(path)
    return written
