"""The command `aegis`.

Imports of the library stand inside the commands, so that `aegis --help` starts fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from langchain_aegis import __version__
from langchain_aegis.cli_cache import Json, OllamaUrl, RedisUrl, cache_app, print_json
from langchain_aegis.cli_plan import plan
from langchain_aegis.cli_top import top

if TYPE_CHECKING:
    from langchain_aegis.ollama.findings import Finding

app = typer.Typer(
    name="aegis",
    help="Semantic cache, admission control and a tuned Ollama client for LangChain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cache_app, name="cache")
app.command()(plan)
app.command()(top)


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


@app.command()
def doctor(
    compose: Annotated[list[Path] | None, typer.Option(help="Compose file to judge; may be repeated.")] = None,
    env_file: Annotated[list[Path] | None, typer.Option(help="Env file to judge; may be repeated.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Judge the files only; ask no server.")] = False,
    as_json: Json = False,
    ollama_url: OllamaUrl = None,
    redis_url: RedisUrl = None,
) -> None:
    """Say what the servers really are, and which settings do nothing. Sends no prompt and changes nothing.

    Exit code: 0 fine, 1 warnings, 2 errors.
    """
    from langchain_aegis.errors import AegisConfigError
    from langchain_aegis.ollama import doctor as checks
    from langchain_aegis.ollama.findings import exit_code
    from langchain_aegis.settings import AegisSettings, normalise_base_url

    if offline and not (compose or env_file):
        raise AegisConfigError("--offline judges files: name one with --compose or --env-file")
    findings = list(checks.check_files(compose or [], env_file or []))
    if not offline:
        settings = AegisSettings.from_env().but(
            ollama_base_url=normalise_base_url(ollama_url) if ollama_url else None, redis_url=redis_url
        )
        findings += checks.check_servers(settings, checks.window_in_environment(env_file or []))
    if as_json:
        print_json([finding.as_dict() for finding in findings])
    else:
        _print_findings(findings)
    raise typer.Exit(exit_code(findings))


def _print_findings(findings: Iterable[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    colours = {"ok": "green", "info": "blue", "warning": "yellow", "error": "red"}
    for finding in findings:
        line = Text(f"{finding.severity:<7} ", style=colours[finding.severity])
        line.append(f"{finding.code}: {finding.what}", style="default")
        line.append(f"  [{finding.where}]", style="dim")
        console.print(line)
        for more in (finding.why, finding.fix):
            if more:
                console.print(Text(f"        {more}"))
