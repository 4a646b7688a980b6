"""The command `aegis doctor`: which settings do nothing or hurt, and what the servers really are."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from langchain_aegis.cli_cache import Json, OllamaUrl, RedisUrl, print_json

if TYPE_CHECKING:
    from langchain_aegis.ollama.findings import Finding, Severity

_COLOURS: dict[Severity, str] = {"error": "red", "warning": "yellow", "info": "blue", "ok": "green"}  # the worst first


def doctor(
    compose: Annotated[list[Path] | None, typer.Option(help="Compose file to judge; may be repeated.")] = None,
    env_file: Annotated[
        list[Path] | None, typer.Option(help="Env file or systemd drop-in to judge; may be repeated.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Judge the files only; ask no server.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Send short prompts to see whether models reload.")] = False,
    fix: Annotated[bool, typer.Option("--fix", help="Write corrected copies beside the files.")] = False,
    as_json: Json = False,
    ollama_url: OllamaUrl = None,
    vllm_url: Annotated[
        str | None, typer.Option(help="vLLM, or another server on OpenAI's wire. Default: VLLM_BASE_URL, else none.")
    ] = None,
    redis_url: RedisUrl = None,
) -> None:
    """Say which settings do nothing or hurt, and what the servers really are; with the reason and the fix of each.

    Changes nothing, and sends no prompt unless --probe is given.

    Exit code: 0 fine, 1 warnings, 2 errors.
    """
    from langchain_aegis.errors import AegisConfigError
    from langchain_aegis.ollama.doctor import check_servers, read_files
    from langchain_aegis.ollama.findings import exit_code
    from langchain_aegis.settings import AegisSettings, normalise_base_url

    if not (compose or env_file):
        if offline:
            raise AegisConfigError("--offline judges files: name one with --compose or --env-file")
        if fix:
            raise AegisConfigError("--fix corrects files: name one with --compose or --env-file")
    if offline and probe:
        raise AegisConfigError("--probe asks the server: leave --offline out")
    files = read_files(compose or [], env_file or [])
    findings = files.findings
    if not offline:
        settings = AegisSettings.from_env().but(
            ollama_base_url=normalise_base_url(ollama_url) if ollama_url else None,
            vllm_base_url=normalise_base_url(vllm_url, of="vLLM") if vllm_url else None,
            redis_url=redis_url,
        )
        findings = [*findings, *check_servers(settings, files.told(), probe=probe)]
    if as_json:
        print_json([finding.as_dict() for finding in findings])
    else:
        _print(findings)
    if fix:
        _write(files.findings)
    raise typer.Exit(exit_code(findings))


def _print(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 1, 1, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in sorted(findings, key=lambda finding: list(_COLOURS).index(finding.severity)):
        text = Text(finding.what)
        if finding.why:
            text.append(f"\n{finding.why}", style="dim")
        if finding.fix:
            text.append("\nFix: ", style="bold").append(finding.fix, style="default")
        text.append(f"\n{finding.where}", style="dim italic")
        table.add_row(Text(f"{finding.severity}\n", _COLOURS[finding.severity]).append(finding.code, "default"), text)
    console = Console(soft_wrap=False)
    console.print(table)
    counted = Counter(finding.severity for finding in findings)
    said = [f"{counted[severity]} {severity}" for severity in _COLOURS if counted[severity]]
    console.print(", ".join(said) or "nothing found")


def _write(findings: Sequence[Finding]) -> None:
    from langchain_aegis.errors import AegisConfigError
    from langchain_aegis.ollama.repair import repair

    try:
        done = repair(findings)
    except OSError as exc:
        raise AegisConfigError(f"the corrected copy cannot be written: {exc}") from exc
    for each in done:
        left = f"; {each.open} left to correct by hand" if each.open else ""
        changes = f"{each.changes} {'change' if each.changes == 1 else 'changes'}"
        print(f"{each.original} -> {each.written}: {changes}{left}", file=sys.stderr)
    if not done:
        print("nothing that can be corrected in a file", file=sys.stderr)
