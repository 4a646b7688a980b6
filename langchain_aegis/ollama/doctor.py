"""Compare what the settings expect with what the servers and files really are.

Nothing is changed, and no prompt is sent unless a probe is asked for.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langchain_aegis.attempts import Timeouts
from langchain_aegis.client import OllamaClient
from langchain_aegis.errors import AegisError
from langchain_aegis.ollama.compose import check_project
from langchain_aegis.ollama.engine_checks import check_engine
from langchain_aegis.ollama.env_files import Variable, identity, read_variables
from langchain_aegis.ollama.environment import check_repeated, check_variables, only_server
from langchain_aegis.ollama.findings import Finding
from langchain_aegis.ollama.knowledge import bare
from langchain_aegis.ollama.probe import probe as ask
from langchain_aegis.ollama.redis_checks import TIMEOUT_S, check_redis_server
from langchain_aegis.ollama.server_checks import Told, check_ollama
from langchain_aegis.settings import AegisSettings


@dataclass
class Files:
    """What the files say: their faults, and what they tell of the server.

    Attributes:
        findings: In the order of the files: env files, then compose files.
        values: Variables of the server as far as they are known.
        gpu: A service reserves a GPU.
    """

    findings: list[Finding] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)
    gpu: bool = False

    def told(self, environ: Mapping[str, str] | None = None) -> Told:
        """Return what is known of the server; what the files do not say is taken from `environ`."""
        values = {**(os.environ if environ is None else environ), **self.values}
        return Told(_count(values, "OLLAMA_CONTEXT_LENGTH"), _count(values, "OLLAMA_NUM_PARALLEL"), self.gpu)


def read_files(compose: Sequence[Path], env_files: Sequence[Path]) -> Files:
    """Judge compose and env files; the env files also fill in the variables of the compose files.

    As compose does, a `.env` beside the first compose file fills them in where no env file is named.
    """
    files = Files()
    filled: dict[str, str] = {}
    read: list[tuple[Path, list[tuple[str, Variable]]]] = []
    for path in env_files:
        try:
            read.append((path, read_variables(path)))
        except (OSError, UnicodeDecodeError) as exc:
            files.findings.append(_unreadable(path, exc))
    for _, variables in read:
        filled |= {name: v.value for name, v in variables if v.value is not None}
    beside = compose[0].parent / ".env" if compose and not env_files else None
    if beside is not None and beside.is_file():
        try:
            filled = {name: v.value for name, v in read_variables(beside) if v.value is not None}
        except (OSError, UnicodeDecodeError) as exc:
            files.findings.append(_unreadable(beside, exc))
    there: list[Path] = []
    for path in compose:
        try:
            path.open("rb").close()
            there.append(path)
        except OSError as exc:
            files.findings.append(_unreadable(path, exc))
    project = check_project(there, filled)
    for path, variables in read:
        if identity(path) not in project.env_files:
            files.findings += check_repeated(variables)
            names = {name for name, _ in variables}
            own = only_server(names) and not names & project.uses
            files.findings += check_variables(dict(variables), server_only=own, elsewhere=project.uses)
    files.findings += project.findings
    files.values = {**{n: bare(v) for n, v in filled.items() if n.startswith("OLLAMA_") and v}, **project.values}
    files.gpu = project.gpu
    return files


def check_servers(settings: AegisSettings, told: Told | None = None, *, probe: bool = False) -> Iterator[Finding]:
    """Ask the Ollama server, vLLM if it is named, and the Redis of the settings, with short timeouts.

    Args:
        settings: Where they are, and which models are expected.
        told: What the files say of the server.
        probe: Also send two short prompts, and see whether models are loaded again between them. A call may have to
            load a model: it has the time that the settings give any call.
    """
    timeouts = Timeouts(connect_s=TIMEOUT_S, read_s=TIMEOUT_S, deadline_s=2 * TIMEOUT_S)
    client = OllamaClient(settings.ollama_base_url, timeouts=timeouts)
    loaded: list[dict[str, Any]] = []
    try:
        yield from check_ollama(client, settings, told or Told())
        if settings.vllm_base_url is not None:
            with contextlib.suppress(AegisError):  # that it does not answer was said
                loaded = client.ps()
    finally:
        client.close()
    if settings.vllm_base_url is not None:
        yield from check_engine(settings, told or Told(), loaded)
    if probe:
        patient = OllamaClient(settings.ollama_base_url, timeouts=Timeouts.of(settings))
        try:
            yield from ask(patient, settings)
        finally:
            patient.close()
    yield from check_redis_server(settings)


def _count(values: Mapping[str, str], name: str) -> int | None:
    text = bare(values.get(name, ""))
    return int(text) if text.isdigit() and int(text) > 0 else None


def _unreadable(path: Path, exc: Exception) -> Finding:
    return Finding(
        code="file-unreadable", severity="error", where=str(path), what=f"it cannot be read: {exc}",
        why="Nothing in it was judged.", fix="Name another file.",
    )  # fmt: skip
