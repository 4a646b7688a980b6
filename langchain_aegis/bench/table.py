"""A report or a comparison as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from langchain_aegis.bench.compare import Comparison
from langchain_aegis.bench.words import Rows, setting_lines, tables

_STYLES = {
    "holds": "green", "better": "green", "does not hold": "red", "worse": "red", "undecided": "yellow",
    "within the noise": "dim",
}  # fmt: skip


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print everything that was measured, and on what."""
    for title, heads, rows in tables(report):
        console.print(_table(title, heads, rows))
    for line in setting_lines(report):
        console.print(Text(line, style="dim"))


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print what differs between two reports."""
    for line in comparison.warnings:
        console.print(Text(line, style="yellow"))
    rows = [(change.what, change.before, change.after, change.ratio, change.verdict) for change in comparison.changes]
    console.print(_table("Second report against the first", ("", "First", "Second", "Ratio", ""), rows))


def _table(title: str, heads: tuple[str, ...], rows: Rows) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return table
