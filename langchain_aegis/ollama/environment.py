"""Judge the environment variables that an Ollama server is started with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from langchain_aegis.ollama.findings import Finding
from langchain_aegis.ollama.knowledge import ServerSetting, knowledge, version_tuple


@dataclass(frozen=True)
class Variable:
    """One variable of a file: its value (None: not known here) and the place where it stands."""

    value: str | None
    where: str


def read_env_file(path: Path) -> dict[str, Variable]:
    """Return the variables of an env file, the last one of a name winning.

    Raises:
        OSError: The file cannot be read.
        UnicodeDecodeError: It is no text.
    """
    variables = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if found := _LINE.fullmatch(line):
            name, raw = found.groups()
            quoted = _QUOTED.match(raw.strip())
            value = quoted[2] if quoted else re.split(r"\s#", raw, maxsplit=1)[0].strip()
            variables[name] = Variable(value, f"{path}:{number} {name}")
    return variables


def check_variables(
    variables: Mapping[str, Variable], *, server_only: bool, version: str | None = None
) -> Iterator[Finding]:
    """Judge the variables of a server.

    Args:
        variables: Name to value, all of one place: they are also judged together.
        server_only: The place is read by the server alone (a service's `environment`), so a name that the server does
            not know helps nobody. An env file is read by the application too.
        version: Release of the server, e.g. "0.32.15"; None: the newest known.
    """
    table = knowledge()
    for name, variable in variables.items():
        setting = table.server.get(name)
        if not server_only and name in table.application:
            continue
        if setting is not None:
            yield from _check_setting(setting, variable, version)
        elif name.startswith("OLLAMA_"):
            yield from _check_unknown(name, variable, server_only=server_only)
    yield from _check_together(variables, server_only=server_only)


def _check_setting(setting: ServerSetting, variable: Variable, version: str | None) -> Iterator[Finding]:
    release = version_tuple(version) if version else None
    name, where = setting.name, variable.where
    if setting.reads == "no":
        if release and setting.until and release <= version_tuple(setting.until):
            return
        gone = f", was read until {setting.until}" if setting.until else ""
        yield Finding(
            code="setting-ignored",
            severity="warning",
            where=where,
            what=f"{name} is ignored by Ollama{gone}",
            why="The server runs with its default as if this line were not there.",
            fix=f"Use {setting.instead}.",
        )
        return
    if release and setting.since and release < version_tuple(setting.since):
        yield Finding(
            code="setting-too-new",
            severity="warning",
            where=where,
            what=f"{name} is read since Ollama {setting.since}, the image is {version}",
            why="This version ignores it.",
            fix=f"Use Ollama {setting.since} or later.",
        )
        return
    if setting.reads == "barely":
        yield Finding(
            code="setting-without-effect",
            severity="warning",
            where=where,
            what=f"{name} has hardly any effect",
            why=f"It {setting.effect}.",
            fix=f"Use {setting.instead}.",
        )
        return
    value = variable.value
    if value is not None and (reason := setting.misread(value)):
        yield Finding(
            code="value-misread",
            severity="error" if setting.values else "warning",
            where=where,
            what=f"{name}={value} {reason}",
            why=f"{name}: {setting.effect}.",
            fix="Correct the value.",
        )
    elif value is not None and (judge := _JUDGES.get(name)):
        yield from judge(name, value, where)


def _check_unknown(name: str, variable: Variable, *, server_only: bool) -> Iterator[Finding]:
    near = knowledge().nearest(name)
    yield Finding(
        code="setting-unknown",
        severity="warning" if server_only or near else "info",
        where=variable.where,
        what=f"{name} is no setting of an Ollama server",
        why="The server does not read it." if server_only else "If it is meant for the server: it does not read it.",
        fix=f"Did you mean {near}?" if near else "Remove it, or set it where it is read.",
    )


def _check_together(variables: Mapping[str, Variable], *, server_only: bool) -> Iterator[Finding]:
    def value(name: str) -> str:
        return ((found.value if (found := variables.get(name)) else "") or "").strip()

    cache_type = variables.get("OLLAMA_KV_CACHE_TYPE")
    quantised = value("OLLAMA_KV_CACHE_TYPE") not in ("", "f16", "f32", "bf16")
    if cache_type and quantised and value("OLLAMA_FLASH_ATTENTION").lower() in ("0", "f", "false"):
        yield Finding(
            code="kv-cache-needs-flash-attention",
            severity="error",
            where=cache_type.where,
            what=f"OLLAMA_KV_CACHE_TYPE={value('OLLAMA_KV_CACHE_TYPE')} with OLLAMA_FLASH_ATTENTION=0",
            why="Every model fails to load (HTTP 500): a quantised KV cache needs flash attention.",
            fix="Remove OLLAMA_FLASH_ATTENTION, or use OLLAMA_KV_CACHE_TYPE=f16.",
        )
    if server_only and value("OLLAMA_CONTEXT_LENGTH") in ("", "0") and (slots := variables.get("OLLAMA_NUM_PARALLEL")):
        yield Finding(
            code="window-left-to-chance",
            severity="info",
            where=slots.where,
            what="OLLAMA_CONTEXT_LENGTH is not set",
            why="The context window is then 4096, 32768 or 262144 tokens by the video memory, in each slot.",
            fix="Set OLLAMA_CONTEXT_LENGTH to the longest prompt and its answer.",
        )


def _keep_alive(name: str, value: str, where: str) -> Iterator[Finding]:
    number = int(value) if re.fullmatch(r"[+-]?\d+", value) else None
    if number is None and re.fullmatch(r"[+-]?(0+(\.0*)?(ns|us|µs|ms|s|m|h))+", value):
        number = 0
    if number == 0:
        yield Finding(
            code="keep-alive-zero",
            severity="warning",
            where=where,
            what=f"{name}={value} unloads a model at once",
            why="Every call loads the model anew.",
            fix=f"Set {name}=30m.",
        )
    elif number is not None and 0 < number < 60:
        yield Finding(
            code="keep-alive-seconds",
            severity="warning",
            where=where,
            what=f"{name}={value} means {number} seconds",
            why="A model is unloaded between two calls.",
            fix=f"Write the unit: {name}={number}m.",
        )


def _max_loaded_models(name: str, value: str, where: str) -> Iterator[Finding]:
    if value == "1":
        yield Finding(
            code="models-evict-each-other",
            severity="warning",
            where=where,
            what=f"{name}=1 keeps one model loaded",
            why="A chat model and an embedding model then unload each other on every call.",
            fix=f"Set {name}=2 or more, or remove it (three for each GPU).",
        )


def _origins(name: str, value: str, where: str) -> Iterator[Finding]:
    if "*" in (origin.strip() for origin in value.split(",")):
        yield Finding(
            code="any-web-page",
            severity="warning",
            where=where,
            what=f"{name}={value} allows every web page",
            why="A page that somebody opens in a browser may use the server.",
            fix="Name the pages that may, or remove it.",
        )


def _log_requests(name: str, value: str, where: str) -> Iterator[Finding]:
    if value.lower() not in ("0", "f", "false", ""):
        yield Finding(
            code="prompts-logged",
            severity="warning",
            where=where,
            what=f"{name}={value} writes every prompt to a file",
            why="Prompts and documents stay on the disk in clear.",
            fix="Remove it.",
        )


def _max_queue(name: str, value: str, where: str) -> Iterator[Finding]:
    yield Finding(
        code="queue-bounds-loading-only",
        severity="info",
        where=where,
        what=f"{name}={value} bounds only the calls that wait for a model to be loaded",
        why="Calls to a loaded model wait without a bound; nothing is refused.",
        fix="Bound them in the client: AEGIS_MAX_CONCURRENCY and AEGIS_MAX_WAITING.",
    )


def _flash_attention(name: str, value: str, where: str) -> Iterator[Finding]:
    if value.lower() in ("0", "f", "false"):
        yield Finding(
            code="flash-attention-off",
            severity="info",
            where=where,
            what=f"{name}={value} switches flash attention off",
            why="It costs memory and forbids a quantised KV cache; unset, the runner decides by itself.",
            fix=f"Remove {name}.",
        )


def _host(name: str, value: str, where: str) -> Iterator[Finding]:
    if re.match(r"(https?://)?(0\.0\.0\.0|\[?::\]?(:|$))", value):
        yield Finding(
            code="listens-everywhere",
            severity="info" if "environment" in where else "warning",
            where=where,
            what=f"{name}={value} listens on all interfaces",
            why="Whoever reaches the machine may use the server: it asks for no login.",
            fix=f"Use {name}=127.0.0.1:11434, or publish a container's port on 127.0.0.1 only.",
        )


_JUDGES = {
    "OLLAMA_KEEP_ALIVE": _keep_alive,
    "OLLAMA_MAX_LOADED_MODELS": _max_loaded_models,
    "OLLAMA_ORIGINS": _origins,
    "OLLAMA_DEBUG_LOG_REQUESTS": _log_requests,
    "OLLAMA_MAX_QUEUE": _max_queue,
    "OLLAMA_FLASH_ATTENTION": _flash_attention,
    "OLLAMA_HOST": _host,
}
_LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=(.*)")
_QUOTED = re.compile(r"(['\"])(.*?)\1")
