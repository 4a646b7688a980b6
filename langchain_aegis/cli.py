"""The command `aegis`.

Imports of the library stand inside the commands, so that `aegis --help` starts fast.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from langchain_aegis import __version__
from langchain_aegis.cli_bench import bench_app
from langchain_aegis.cli_cache import Json, OllamaUrl, RedisUrl, cache_app
from langchain_aegis.cli_doctor import doctor
from langchain_aegis.cli_plan import plan
from langchain_aegis.cli_top import top
from langchain_aegis.cli_warm import warm

app = typer.Typer(
    name="aegis",
    help="Semantic cache, admission control and a tuned Ollama client for LangChain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cache_app, name="cache")
app.add_typer(bench_app, name="bench")
app.command()(doctor)
app.command()(plan)
app.command()(top)
app.command()(warm)


def main() -> None:
    """Run the command line; the process ends with its exit code.

    An error of this package is one line on stderr and exit code 2; AEGIS_DEBUG=1 shows where it came from.
    """
    try:
        app()
    except Exception as exc:
        # Late: the errors need langchain-core, which `aegis --help` does not.
        from langchain_aegis.errors import AegisError

        if not isinstance(exc, AegisError) or os.environ.get("AEGIS_DEBUG", "") not in ("", "0"):
            raise
        print(f"aegis: {' '.join(str(exc).split())}", file=sys.stderr)
        sys.exit(2)


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Chat model. Default: OLLAMA_MODEL_GENERATION.")] = None,
    redis_url: RedisUrl = None,
    ollama_url: OllamaUrl = None,
    no_guards: Annotated[bool, typer.Option("--no-guards", help="Serve what the guards would stop.")] = False,
    as_json: Json = False,
    documents: Annotated[Path | None, typer.Option(help="Directory of .md and .txt files.")] = None,
    questions: Annotated[Path | None, typer.Option(help="JSON lines: question, kind, source, fact.")] = None,
) -> None:
    """Answer questions with a LangGraph RAG graph and real parts, and show what the cache did.

    Exit code: 0 no wrong hit, 1 a wrong hit, 2 the parts did not start.
    """
    from langchain_aegis.demo.run import run_demo

    code = run_demo(
        model=model,
        redis_url=redis_url,
        ollama_url=ollama_url,
        no_guards=no_guards,
        json=as_json,
        documents=documents,
        questions=questions,
    )
    raise typer.Exit(code)
