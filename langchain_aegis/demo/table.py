"""The demonstration's results as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

_STYLES = {"exact": "green", "semantic": "cyan", "miss": "dim"}


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print both tables and the summary."""
    wide = console.width >= 100
    console.print(_table("Through the graph, unchanged: the LLM's cache", report["questions"], wide=wide))
    before = [q["before_retrieval"] for q in report["questions"]]
    console.print(_table("Around the graph: get_or_generate, before retrieval", before, wide=wide))
    summary = Table(title="Summary", title_justify="left", box=SIMPLE, pad_edge=False)
    for column in ("", "hit rate", "wrong hits", "grounded (a small model)", "seconds saved"):
        summary.add_column(column)
    for name, part in (("LLM's cache", report["summary"]), ("before retrieval", report["summary"]["before_retrieval"])):
        wrong = Text(str(part["wrong_hits"]), style="bold red" if part["wrong_hits"] else "green")
        grounded = f"{part['grounded']} of {part['judged']}"
        summary.add_row(name, f"{part['hit_rate']:.0%}", wrong, grounded, f"{part['time_saved_s']:.1f}")
    console.print(summary)
    stack = ", ".join(f"{name} {value}" for name, value in report["stack"].items())
    console.print(Text(stack, style="dim"))


def _table(title: str, rows: list[dict[str, Any]], *, wide: bool) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("question", min_width=24, ratio=3)
    table.add_column("kind")
    table.add_column("tier")
    table.add_column("similar", justify="right")
    table.add_column("why", min_width=10, ratio=2)
    table.add_column("s", justify="right")
    table.add_column("tok", justify="right")
    if wide:
        table.add_column("fact")
    for row in rows:
        tier = Text(row["tier"], style=_STYLES.get(row["tier"], ""))
        if row["wrong_hit"]:
            tier = Text("WRONG", style="bold red")
        same = row["served_from"] in (None, row["question"])
        table.add_row(
            Text(row["question"]),
            row["kind"],
            tier,
            "" if row["similarity"] is None else f"{row['similarity']:.3f}",
            Text(row["reason"] if same else f"as: {row['served_from']}"),
            f"{row['time_s']:.2f}",
            str(row["tokens"]),
            *([{True: "yes", False: "no", None: ""}[row["grounded"]]] if wide else []),
        )
    return table
