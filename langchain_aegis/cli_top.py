"""The command `aegis top`: what the admissions of this user's processes do, live."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from langchain_aegis.cli_cache import Json, print_json

if TYPE_CHECKING:
    from rich.console import Group

    from langchain_aegis.live import Told

_FIRST_S = 3.0  # a process looks once a second whether anybody asks, and answers at once
_NOBODY = (
    "No process of this user uses a model through langchain-aegis now, or its AEGIS_HOME is another one. A process "
    "is seen from its next call on."
)


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one table and stop.")] = False,
    as_json: Json = False,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Show slots, queues and waiting times of this user's processes, by server, model and tenant, until Ctrl-C.

    Exit code: 0, or 1 if --once or --json found no process.
    """
    if as_json or once:
        found = _first()
        if as_json:
            print_json([{"pid": each.pid, "program": each.program, "servers": each.servers} for each in found])
        else:
            _print(found)
        raise typer.Exit(0 if found else 1)
    _follow(interval)


def _first() -> list[Told]:
    """Return what processes tell, waiting for the first of them a little."""
    from langchain_aegis import live

    until = time.monotonic() + _FIRST_S
    while True:
        live.watch()
        if (found := live.told()) or time.monotonic() > until:
            return found
        time.sleep(0.05)


def _follow(interval_s: float) -> None:
    from rich.live import Live

    from langchain_aegis import live

    live.watch()
    try:
        with Live(table(live.told()), auto_refresh=False, screen=True) as screen:
            while True:
                time.sleep(interval_s)
                live.watch()
                screen.update(table(live.told()), refresh=True)
    except KeyboardInterrupt:
        return


def _print(found: list[Told]) -> None:
    from rich.console import Console

    Console().print(table(found))


def table(found: list[Told]) -> Group:
    """Return two tables: servers, and their models and tenants."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if not found:
        return Group(Text(_NOBODY))
    servers = Table(title="Servers", title_justify="left", expand=True)
    for name in ("Process", "Server"):
        servers.add_column(name, overflow="fold")
    for name in ("Slots", "Waiting", "Batches", "Background", "Oldest", "Service", "Prefix reused", "Reloads avoided"):
        servers.add_column(name, justify="right")
    calls = Table(title="Calls", title_justify="left", expand=True)
    for name in ("Process", "Model", "Tenant"):
        calls.add_column(name, overflow="fold")
    for name in ("Served", "Merged", "Refused", "Expired", "Cancelled", "Wait p50", "Wait p99"):
        calls.add_column(name, justify="right")
    for each in found:
        for server, stats in each.servers.items():
            servers.add_row(str(each.pid), plain(server), *_of_server(stats))
            for row in stats["rows"]:
                calls.add_row(str(each.pid), plain(row["model"]), plain(row["tenant"]), *_of_row(row))
    return Group(servers, calls)


def _of_server(stats: Mapping[str, Any]) -> list[str]:
    return [
        f"{stats['running']}/{stats['max_concurrency']}", f"{stats['waiting']}/{stats['max_waiting']}",
        str(stats["waiting_bulk"]), str(stats["waiting_spare"]), _seconds(stats["oldest_s"]),
        _seconds(stats["service_s"]), str(stats["prefixes_reused"]), str(stats["reloads_avoided"]),
    ]  # fmt: skip


def _of_row(row: Mapping[str, Any]) -> list[str]:
    from langchain_aegis.tallies import Row

    waits = Row(None, None, waits=row["waits"])
    return [
        *(str(row[name]) for name in ("served", "merged", "refused", "expired", "cancelled")),
        *(f"≤ {_seconds(waits.wait_s(quantile))}" if any(row["waits"]) else "-" for quantile in (0.5, 0.99)),
    ]


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def plain(text: str | None) -> str:
    """Return a name from outside so that it cannot steer the terminal, nor rich's markup."""
    from rich.markup import escape

    return "-" if text is None else escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))
