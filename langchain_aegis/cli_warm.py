"""The command `aegis warm`: models on a server, ready before the first call."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from langchain_aegis.cli_cache import Json, OllamaUrl, print_json
from langchain_aegis.cli_top import plain

if TYPE_CHECKING:
    from langchain_aegis.attempts import Timeouts
    from langchain_aegis.client import OllamaClient
    from langchain_aegis.warming import Report, Target, Warmed

_CHECKS_AHEAD = 2  # a model is prolonged when it would be gone after so many looks


def warm(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Default: OLLAMA_MODEL_GENERATION and OLLAMA_MODEL_EMBEDDINGS."),
    ] = None,
    ollama_url: OllamaUrl = None,
    num_ctx: Annotated[
        int | None,
        typer.Option(min=1, help="Window of chat models, as the application asks for it. Default: what is loaded."),
    ] = None,
    keep_alive: Annotated[
        str | None, typer.Option(help='How long they stay: "30m", seconds, or -1 for ever. Default: AEGIS_KEEP_ALIVE.')
    ] = None,
    system: Annotated[
        Path | None, typer.Option(help="File with the system prompt that all prompts begin with; read in advance.")
    ] = None,
    pull: Annotated[bool, typer.Option(help="Download models that the server does not have.")] = True,
    watch: Annotated[
        float | None,
        typer.Option(min=1.0, help="Look again every so many seconds, until Ctrl-C, and load what is gone."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Download models if necessary, load them, the largest first, and keep them loaded.

    Exit code: 0 all are loaded, 1 not all of them are at the same time, 2 an error.
    """
    from langchain_aegis.attempts import Timeouts
    from langchain_aegis.client import shared_client
    from langchain_aegis.errors import AegisConfigError
    from langchain_aegis.options import check_keep_alive
    from langchain_aegis.settings import AegisSettings, normalise_base_url
    from langchain_aegis.warming import Target

    settings = AegisSettings.from_env().but(ollama_base_url=normalise_base_url(ollama_url) if ollama_url else None)
    named = models or [name for name in (settings.model_generation, settings.model_embeddings) if name]
    if not named:
        raise AegisConfigError("name a model: `aegis warm MODEL`, or set OLLAMA_MODEL_GENERATION")
    stays = check_keep_alive(settings.keep_alive if keep_alive is None else keep_alive)
    text = _text(system)
    targets = [
        Target(
            model=name,
            body={"keep_alive": stays},
            runner=(lambda: {"num_ctx": num_ctx}) if num_ctx is not None else None,
            system=text,
        )
        for name in dict.fromkeys(named)
    ]
    client, timeouts = shared_client(settings.ollama_base_url), Timeouts.of(settings)
    found = _warm(targets, client, timeouts, pull)
    if as_json:
        print_json([asdict(each) for each in found])
    else:
        _print(found)
    if watch is not None:
        _watch(targets, client, timeouts, watch)
    raise typer.Exit(0 if all(each.resident for each in found) else 1)


def _text(file: Path | None) -> str | None:
    from langchain_aegis.errors import AegisConfigError

    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        raise AegisConfigError(f"--system {file}: cannot be read as text ({exc})") from exc


def _warm(targets: Sequence[Target], client: OllamaClient, timeouts: Timeouts, pull: bool) -> list[Warmed]:
    from langchain_aegis.warming import warm as warm_up

    with _shown() as report:
        return warm_up(targets, client, timeouts, pull=pull, report=report)


@contextmanager
def _shown() -> Iterator[Report]:
    """Show progress on stderr: a bar with bytes and time left, or lines where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    from langchain_aegis.warming import Progress

    console = Console(stderr=True)
    said: set[tuple[str, str, str]] = set()
    rows: dict[str, Any] = {}
    texts = {"load": "loading", "prefill": "reading the system prompt", "ready": "ready"}
    columns = (
        SpinnerColumn(finished_text=" "), TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(),
        TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:

        def report(told: Progress) -> None:
            name = plain(told.model)
            text = plain(texts.get(told.phase, told.text))
            if told.phase == "retry":
                console.print(f"{name}: the download broke off and goes on ({text})", soft_wrap=True)
                return
            if not console.is_terminal:
                line = (told.model, told.phase, text)
                if line not in said:
                    said.add(line)
                    console.print(f"{name}: {text}", soft_wrap=True)
                return
            if told.model not in rows:
                rows[told.model] = bars.add_task(name, total=None)
            row = rows[told.model]
            if told.phase == "pull":
                description = f"{name} {text}"
                bars.update(row, description=description, completed=told.completed, total=told.total or None)
            else:
                bars.update(row, description=f"{name} {text}")
            if told.phase == "ready" and not any(task.id == row and task.total for task in bars.tasks):
                bars.remove_task(row)  # nothing was downloaded: there is no bar to leave behind
                console.print(f"{name}: ready")

        yield report


def _print(found: Sequence[Warmed]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Models", title_justify="left")
    table.add_column("Model", overflow="fold")
    columns = ["Loaded", "Took", "Window", "Memory", "On GPU", "Stays"]
    more = {"Pulled": any(each.pulled_bytes for each in found), "Read": any(each.prefilled_tokens for each in found)}
    columns += [name for name, needed in more.items() if needed]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for each in found:
        cells = {
            "Loaded": "yes" if each.resident else "no",
            "Took": f"{each.load_s:.1f} s",
            "Window": str(each.window_tokens or "-"),
            "Memory": _size(each.size_bytes),
            "On GPU": f"{each.gpu_bytes / each.size_bytes:.0%}" if each.size_bytes else "-",
            "Stays": "-" if not each.resident else "for ever" if each.stays_s is None else _duration(each.stays_s),
            "Pulled": _size(each.pulled_bytes),
            "Read": f"{each.prefilled_tokens} tokens" if each.prefilled_tokens else "-",
        }
        table.add_row(plain(each.model), *(cells[name] for name in columns))
    console = Console()
    console.print(table)
    if gone := [plain(each.model) for each in found if not each.resident]:
        console.print(
            f"{', '.join(gone)}: loaded, then unloaded for another model: they do not fit together. See `aegis plan`"
            " for what fits, and OLLAMA_MAX_LOADED_MODELS for how many the server allows.",
            soft_wrap=True,
        )


def _watch(targets: Sequence[Target], client: OllamaClient, timeouts: Timeouts, every_s: float) -> None:
    """Load again what is gone, and prolong what would be, until Ctrl-C; an outage is waited for."""
    from rich.console import Console

    from langchain_aegis.errors import AegisError
    from langchain_aegis.warming import fading
    from langchain_aegis.warming import warm as warm_up

    console = Console(stderr=True)
    try:
        while True:
            time.sleep(every_s)
            try:
                if again := fading(targets, client.ps(timeouts=timeouts), within_s=_CHECKS_AHEAD * every_s):
                    warm_up(again, client, timeouts, pull=False)
                    console.print(f"warmed again: {', '.join(plain(each.model) for each in again)}", soft_wrap=True)
            except AegisError as exc:
                console.print(f"not warm: {plain(str(exc))}", soft_wrap=True)
    except KeyboardInterrupt:
        return


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB" if count else "-"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
