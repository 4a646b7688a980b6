"""The command `aegis bench`.

Imports of the library stand inside the commands, so that `aegis --help` starts fast.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from langchain_aegis.cli_cache import Json, OllamaUrl, RedisUrl, print_json

_WIDTH = 160

bench_app = typer.Typer(
    help="Measure what the cache, admission and ChatAegis change here, before and after in one run.",
    invoke_without_command=True,
)


@bench_app.callback()
def bench(
    context: typer.Context,
    json: Annotated[Path | None, typer.Option("--json", help="Write the report to this file; - is stdout.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write it as one HTML page with charts.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the charts as PNG files into this directory.")] = None,
    model: Annotated[str | None, typer.Option(help="Chat model. Default: OLLAMA_MODEL_GENERATION.")] = None,
    ollama_url: OllamaUrl = None,
    redis_url: RedisUrl = None,
    prompts: Annotated[
        Path | None, typer.Option(help='Own questions in place of the mix. JSON lines: "question", "source".')
    ] = None,
    part: Annotated[list[str] | None, typer.Option(help="client, callers or rag; may be repeated.")] = None,
    callers: Annotated[str | None, typer.Option(help="Callers at once, such as 1,2,4,8,16.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Length of an answer. Default: 8 embedded, else 64.")] = None,
    rounds: Annotated[int | None, typer.Option(help="How often everything is done, at least 3.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer callers, questions and tokens.")] = False,
    seed: Annotated[int | None, typer.Option(help="Decides which questions are drawn.")] = None,
) -> None:
    """Measure latency, throughput, the client's cost and what the cache answers, with ranges.

    Without addresses it runs on the embedded servers. Exit code: 0, 1 if a wrong answer was served, 2 if a part failed.
    """
    if context.invoked_subcommand is not None:
        return
    from dataclasses import replace

    import orjson
    from rich.console import Console

    from langchain_aegis.bench.drawing import check_pillow
    from langchain_aegis.bench.page import page, write_pictures
    from langchain_aegis.bench.run import QUICK, Plan, Servers, run_bench
    from langchain_aegis.bench.table import print_report

    if png is not None:  # all this before minutes are spent
        check_pillow()
    for file in (json, html):
        if file is not None and str(file) != "-":
            _check_can_be_written(file)
    told: dict[str, Any] = {
        "parts": tuple(part) if part else None, "callers": _numbers(callers), "tokens": tokens, "rounds": rounds,
        "seed": seed,
    }  # fmt: skip
    plan = replace(QUICK if quick else Plan(), **{k: v for k, v in told.items() if v is not None})
    progress = Console(stderr=True)
    report = run_bench(
        plan, Servers(model=model, ollama_url=ollama_url, redis_url=redis_url), prompts=prompts,
        say=lambda line: progress.print(line, markup=False, highlight=False, style="dim"),
    )  # fmt: skip
    text = orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    if json is not None and str(json) == "-":
        sys.stdout.buffer.write(text)
    else:
        print_report(report, Console(width=None if sys.stdout.isatty() else _WIDTH))
        if json is not None:
            json.write_bytes(text)
    if html is not None:
        html.write_text(page(report), encoding="utf-8")
    if png is not None:
        write_pictures(report, png)
    raise typer.Exit(1 if report["answered"] and report["answered"]["wrong"] else 0)


@bench_app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A report from `aegis bench --json`.")],
    second: Annotated[Path, typer.Argument(help="Another one, compared with the first.")],
    as_json: Json = False,
) -> None:
    """Show what changed from one report to another, as ratios with ranges; what lies within the noise is no change."""
    from langchain_aegis.bench import compare as comparing

    found = comparing.compare(comparing.read_report(first), comparing.read_report(second))
    if as_json:
        print_json(asdict(found))
        return
    from rich.console import Console

    from langchain_aegis.bench.table import print_comparison

    print_comparison(found, Console(width=None if sys.stdout.isatty() else _WIDTH))


def _check_can_be_written(file: Path) -> None:
    from langchain_aegis.errors import AegisConfigError

    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise AegisConfigError(f"{file} cannot be written: name a file in a directory that exists")


def _numbers(text: str | None) -> tuple[int, ...] | None:
    from langchain_aegis.errors import AegisConfigError

    if text is None:
        return None
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as exc:
        raise AegisConfigError(f"--callers takes numbers such as 1,2,4, got {text!r}") from exc
