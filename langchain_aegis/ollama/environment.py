"""Judge the environment variables that an Ollama server is started with."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace

from langchain_aegis.ollama.env_files import Variable
from langchain_aegis.ollama.findings import Finding
from langchain_aegis.ollama.knowledge import ServerSetting, bare, knowledge, version_tuple
from langchain_aegis.ollama.places import Edit

_SERVERS = ("OLLAMA_", "LLAMA_ARG_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "HSA_", "GGML_")
_ZERO = re.compile(r"[+-]?(0+(\.0*)?(ns|us|µs|ms|s|m|h)?)+")
_EVERYWHERE = re.compile(r"(https?://)?(0\.0\.0\.0|\[?::\]?)(:\d+)?/?")
_UNITS = {"s": "s", "sec": "s", "secs": "s", "second": "s", "seconds": "s", "m": "m", "min": "m", "mins": "m",
          "minute": "m", "minutes": "m", "h": "h", "hr": "h", "hrs": "h", "hour": "h", "hours": "h"}  # fmt: skip


def check_variables(
    variables: Mapping[str, Variable],
    *,
    server_only: bool,
    version: str | None = None,
    elsewhere: Collection[str] = (),
) -> Iterator[Finding]:
    """Judge the variables of a server.

    Args:
        variables: Name to value, all of one place: they are also judged together.
        server_only: The place is read by the server alone (a service's `environment`), so a name that the server does
            not know helps nobody. An env file is read by the application too.
        version: Release of the server, e.g. "0.32.15"; None: the newest known.
        elsewhere: Names that a compose file fills in: they mean what stands there, and are judged there.
    """
    judge = _Judge(variables, server_only, version)
    for name, variable in variables.items():
        if name not in elsewhere and (server_only or not judge.table.of_application(name)):
            yield from judge.one(name, variable)
    if not set(elsewhere) >= set(variables):
        yield from judge.together()


def only_server(variables: Collection[str]) -> bool:
    """Say whether an env file is the server's alone: it holds its settings, and nothing for an application."""
    table = knowledge()
    ours = all(name.startswith(_SERVERS) and not table.of_application(name) for name in variables)
    return ours and any(table.setting(name).status == "read" for name in variables if name != "OLLAMA_HOST")


def check_repeated(variables: list[tuple[str, Variable]]) -> Iterator[Finding]:
    """Judge names that stand more than once in one place, in the order of the place."""
    last: dict[str, Variable] = {}
    for name, variable in variables:
        before = last.get(name)
        last[name] = variable
        if before is None or not name.startswith(("OLLAMA_", "LLAMA_ARG_", "REDIS_", "AEGIS_")):
            continue
        differs = before.value != variable.value
        yield Finding(
            code="setting-repeated", severity="warning" if differs else "info", where=variable.where,
            what=f"{name} is set more than once{'' if differs else ', to the same value'}",
            why="The last one counts; whoever reads the first is misled.", fix="Remove the first.",
            edit=Edit("remove", before.place, "set again below") if before.place else None,
        )  # fmt: skip


class _Judge:
    """Judges the variables of one place."""

    def __init__(self, variables: Mapping[str, Variable], server_only: bool, version: str | None) -> None:
        self.variables, self.server_only, self.version = variables, server_only, version
        self.table = knowledge()
        self.release = version_tuple(version) if version else None

    def one(self, name: str, variable: Variable) -> Iterator[Finding]:
        setting = self.table.server.get(name)
        if setting is not None:
            yield from self.known(setting, variable)
        else:
            yield from self.unknown(name, variable)

    def known(self, setting: ServerSetting, variable: Variable) -> Iterator[Finding]:
        name, value = setting.name, variable.value
        status = setting.status_at(self.version)
        if status in ("ignored", "gone"):
            gone = f", was read until {setting.until}" if status == "gone" else ""
            yield Finding(
                code="setting-ignored", severity="warning", where=variable.where,
                what=f"{name} is ignored by Ollama{gone}",
                why="The server runs with its default as if this line were not there.",
                fix=f"Use {setting.instead}.", edit=self.instead(setting, variable),
            )  # fmt: skip
        elif status == "not yet":
            yield Finding(
                code="setting-too-new", severity="warning", where=variable.where,
                what=f"{name} is read since Ollama {setting.since}, the image is {self.version}",
                why="This version ignores it.", fix=f"Use Ollama {setting.since} or later.",
            )  # fmt: skip
        elif status == "barely":
            yield Finding(
                code="setting-without-effect", severity="warning", where=variable.where,
                what=f"{name} has hardly any effect", why=f"It {setting.effect}.", fix=f"Use {setting.instead}.",
                edit=self.remove(variable, "has hardly any effect"),
            )  # fmt: skip
        elif value is not None and (reason := setting.misread(value, self.version)):
            better = _corrected(setting, value)
            yield Finding(
                code="value-misread", where=variable.where, what=f"{name}={value} {reason}",
                severity="error" if "fails to load" in reason else "warning",
                why=f"{name}: {setting.effect}.", fix=f"Write {name}={better}." if better else "Correct the value.",
                edit=self.value(variable, better, f"{value} {reason}") if better else None,
            )  # fmt: skip
        elif value is not None and (judge := _JUDGES.get(name)):
            for finding in judge(name, bare(value), variable.where):
                told = re.fullmatch(rf"(?:Set|Write the unit:) {name}=(\S+?)\.", finding.fix)
                edit = self.value(variable, told[1], finding.what) if told else None
                yield replace(finding, edit=edit)

    def unknown(self, name: str, variable: Variable) -> Iterator[Finding]:
        near = self.table.nearest(name)
        if near is None and not name.startswith("OLLAMA_"):
            meant = self.table.server.get(f"OLLAMA_{name}")  # the prefix was forgotten
            if not self.server_only or meant is None or "_" not in name or not (meant.reads == "yes" or meant.rename):
                return
            near = meant.rename or meant.name
        where = self.table.setting(near) if near else None
        yield Finding(
            code="setting-misspelt" if near else "setting-unknown", severity="warning", where=variable.where,
            what=f"{name} is no setting of an Ollama server that is known to us (0.5 to 0.33)",
            why="The server does not read it." if self.server_only else "If it is meant for the server: it does not "
            "read it.",
            fix=f"Did you mean {near}?" if near else "Remove it, or set it where it is read.",
            edit=self.rename(variable, near) if near and where and where.status == "read" and ":" not in name else None,
        )  # fmt: skip

    def together(self) -> Iterator[Finding]:
        values = {name: bare(v.value) for name, v in self.variables.items() if v.value is not None}
        unknown = {name for name, v in self.variables.items() if v.value is None}
        for c in self.table.contradictions:
            if unknown & {c.at, *c.when, *c.product} or (c.severity == "info" and not self.server_only):
                continue
            if c.applies(values, self.version):
                removed = self.variables.get(c.remove)
                yield Finding(
                    code=c.code, severity=c.severity, where=self.variables[c.at].where,
                    what=c.what.format_map(values), why=c.why, fix=c.fix,
                    edit=self.remove(removed, c.why) if removed else None,
                )  # fmt: skip

    # -- The changes that correct a file --------------------------------------------------------------------------

    def instead(self, setting: ServerSetting, variable: Variable) -> Edit | None:
        """Rename an ignored setting to the one that was meant, unless that is set already; else remove it."""
        to = setting.rename
        if not to or to in self.variables or self.table.setting(to, self.version).status != "read":
            return self.remove(variable, f"ignored by Ollama; use {setting.instead}")
        if variable.value is None or self.table.server[to].misread(variable.value, self.version):
            return self.remove(variable, f"ignored by Ollama; use {setting.instead}")
        return self.rename(variable, to)

    def remove(self, variable: Variable, why: str) -> Edit | None:
        return Edit("remove", variable.place, why) if variable.place else None

    def rename(self, variable: Variable, to: str) -> Edit | None:
        if variable.place is None or to in self.variables:
            return self.remove(variable, f"not read by Ollama; {to} is set already")
        return Edit("rename", variable.place, "the name before is not read by Ollama", to)

    def value(self, variable: Variable, text: str, why: str) -> Edit | None:
        if variable.place is None or variable.filled:
            return None
        return Edit("value", variable.place, why, text)


def _corrected(setting: ServerSetting, value: str) -> str | None:
    """Return what a misread value was meant to be, where that is plain."""
    text = bare(value).lower()
    if setting.kind == "bool":
        return (
            "true"
            if text in ("yes", "on", "y", "enabled")
            else "false"
            if text in ("no", "off", "n", "disabled")
            else None
        )
    if setting.kind == "duration":
        if text in ("forever", "infinite", "infinity", "always", "never"):
            return "-1"
        found = re.fullmatch(r"(\d+)\s*([a-z]+)", text)
        if found and found[2] in ("d", "day", "days"):
            return f"{int(found[1]) * 24}h"
        return f"{found[1]}{_UNITS[found[2]]}" if found and found[2] in _UNITS else None
    if setting.kind == "count" and (found := re.fullmatch(r"(\d+)\s*k", text)):
        return str(int(found[1]) * 1024)
    return {"fp16": "f16", "float16": "f16", "q8": "q8_0", "int8": "q8_0", "q4": "q4_0", "int4": "q4_0"}.get(text)


def _keep_alive(name: str, value: str, where: str) -> Iterator[Finding]:
    number = int(value) if re.fullmatch(r"[+-]?\d+", value) else None
    if value and _ZERO.fullmatch(value):
        yield Finding(
            code="keep-alive-zero", severity="warning", where=where, what=f"{name}={value} unloads a model at once",
            why="Every call loads the model anew.", fix=f"Set {name}=30m.",
        )  # fmt: skip
    elif number is not None and 0 < number <= 60:
        yield Finding(
            code="keep-alive-seconds", severity="warning", where=where, what=f"{name}={value} means {number} seconds",
            why="A model is unloaded between two calls.", fix=f"Write the unit: {name}={number}m.",
        )  # fmt: skip


def _origins(name: str, value: str, where: str) -> Iterator[Finding]:
    if "*" in (origin.strip() for origin in value.split(",")):
        yield Finding(
            code="any-web-page", severity="warning", where=where, what=f"{name}={value} allows every web page",
            why="A page that somebody opens in a browser may use the server.",
            fix="Name the pages that may, or remove it.",
        )  # fmt: skip


def _log_requests(name: str, value: str, where: str) -> Iterator[Finding]:
    if value.lower() not in ("0", "f", "false", ""):
        yield Finding(
            code="prompts-logged", severity="warning", where=where,
            what=f"{name}={value} writes every prompt to a file",
            why="Prompts and documents stay on the disk in clear.", fix="Remove it.",
        )  # fmt: skip


def _max_queue(name: str, value: str, where: str) -> Iterator[Finding]:
    yield Finding(
        code="queue-bounds-loading-only", severity="info", where=where,
        what=f"{name}={value} bounds only the calls that wait for a model to be loaded",
        why="Calls to a loaded model wait without a bound; nothing is refused.",
        fix="Bound them in the client: AEGIS_MAX_CONCURRENCY and AEGIS_MAX_WAITING.",
    )  # fmt: skip


def _flash_attention(name: str, value: str, where: str) -> Iterator[Finding]:
    if value.lower() in ("0", "f", "false"):
        yield Finding(
            code="flash-attention-off", severity="info", where=where,
            what=f"{name}={value} switches flash attention off",
            why="It costs memory and forbids a quantised KV cache; unset, the runner decides by itself.",
            fix=f"Remove {name}.",
        )  # fmt: skip


def _host(name: str, value: str, where: str) -> Iterator[Finding]:
    if _EVERYWHERE.fullmatch(value):
        yield Finding(
            code="listens-everywhere", severity="info" if ".environment" in where else "warning", where=where,
            what=f"{name}={value} listens on all interfaces",
            why="Whoever reaches the machine may use the server: it asks for no login.",
            fix=f"Use {name}=127.0.0.1:11434, or publish a container's port on 127.0.0.1 only.",
        )  # fmt: skip


_JUDGES: Mapping[str, Callable[[str, str, str], Iterator[Finding]]] = {
    "OLLAMA_KEEP_ALIVE": _keep_alive,
    "OLLAMA_ORIGINS": _origins,
    "OLLAMA_DEBUG_LOG_REQUESTS": _log_requests,
    "OLLAMA_MAX_QUEUE": _max_queue,
    "OLLAMA_FLASH_ATTENTION": _flash_attention,
    "OLLAMA_HOST": _host,
}
