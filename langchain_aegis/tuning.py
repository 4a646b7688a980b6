"""The tunings: what an Ollama server and its callers are set to on a kind of machine, with a reason for each line."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from langchain_aegis.errors import AegisOptionError
from langchain_aegis.settings import AegisSettings

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One setting of a tuning.

    Attributes:
        name: An environment variable of the server, a field of a request, or a field of AegisSettings.
        reason: Why it has this value.
        source: Where what the reason claims can be looked up.
    """

    name: str
    value: str | int | float
    reason: str
    source: str


@dataclass(frozen=True, kw_only=True)
class OllamaTuning:
    """What a kind of machine is set to.

    Attributes:
        memory_gb: Memory for models, in 10^9 bytes; used where a machine's own cannot be read.
        shared: CPU and GPU use the same memory, or there is no GPU.
        gpu: A GPU runs the models.
        bandwidth_gb_s: Of the memory that holds the models, in 10^9 bytes per second; None: not known.
        server: Environment of the server.
        request: Fields of every request. None of them makes a server load a model again.
        client: Fields of AegisSettings in the calling process.
    """

    name: str
    title: str
    memory_gb: float
    shared: bool
    gpu: bool
    bandwidth_gb_s: float | None = None
    server: tuple[Line, ...]
    request: tuple[Line, ...]
    client: tuple[Line, ...]

    def environment(self) -> dict[str, str]:
        """Return the server's environment, for the newest known Ollama."""
        return {line.name: str(line.value) for line in self.server}


@cache
def tunings() -> Mapping[str, OllamaTuning]:
    """Return all tunings by name; read once per process."""
    text = resources.files("langchain_aegis.data").joinpath("tunings.toml").read_text(encoding="utf-8")
    return {name: _tuning(name, row) for name, row in tomllib.loads(text).items()}


def named(name: str) -> OllamaTuning:
    """Return the tuning of that name.

    Raises:
        AegisOptionError: There is none.
    """
    if (tuning := tunings().get(name.strip())) is None:
        raise AegisOptionError(f"tuning must be {AUTO!r} or one of {', '.join(tunings())}, got {name!r}")
    return tuning


def tuned(settings: AegisSettings, name: str) -> AegisSettings:
    """Return `settings` as a client of that tuning uses them.

    Only a tuning that was asked for by name changes anything: "auto" would mean this machine, and the server may be
    another. A setting that differs from its default was set by somebody and stays.

    Raises:
        AegisOptionError: There is no such tuning.
    """
    if name.strip() == AUTO:
        return settings
    tuning = named(name)
    wanted = {line.name: line.value for line in (*tuning.request, *tuning.client)}
    return settings.but(**{n: v for n, v in wanted.items() if getattr(settings, n) == getattr(AegisSettings, n)})


def _tuning(name: str, row: Mapping[str, Any]) -> OllamaTuning:
    groups = {group: _lines(row[group]) for group in ("server", "request", "client")}
    return OllamaTuning(name=name, **{**row, **groups})


def _lines(rows: Mapping[str, Mapping[str, Any]]) -> tuple[Line, ...]:
    return tuple(Line(name=name, **row) for name, row in rows.items())
