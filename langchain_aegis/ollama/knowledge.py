"""The table of what an Ollama server does with each setting, read from settings.toml."""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class ServerSetting:
    """One environment variable of the server.

    Attributes:
        reads: "yes", "no" (ignored) or "barely" (read, with hardly any effect).
        kind: How the server reads the value; None if it does not.
        since: First release that has it, None if no release did.
        until: Last release that read it, where it is gone.
        values: Words that are understood; empty if any is.
        effect: What it does, in one sentence.
        instead: What to use instead of one that is ignored.
    """

    name: str
    reads: Literal["yes", "no", "barely"]
    kind: Literal["count", "bool", "duration", "text"] | None = None
    since: str | None = None
    until: str | None = None
    values: tuple[str, ...] = ()
    effect: str = ""
    instead: str = ""

    def misread(self, value: str) -> str | None:
        """Say what the server makes of a `value` that it cannot read; None if it can read it."""
        text = value.strip().strip("\"'")  # as the server does
        if not text:
            return None
        if self.kind == "count" and not text.isdigit():
            return "is no whole number, so the default is used"
        if self.kind == "bool" and text not in _BOOLS:
            return "is neither true nor false, so it counts as true"
        if self.kind == "duration" and not (_NUMBER.fullmatch(text) or _DURATION.fullmatch(text)):
            return "is no duration such as 30m, so the default of 5m is used"
        if self.values and text not in self.values:
            return f"is none of {', '.join(self.values)}; every model fails to load"
        return None


@dataclass(frozen=True, kw_only=True)
class Image:
    """What an official image holds, for health checks.

    Attributes:
        names: Repositories of the image, without a tag.
        tag: A version that is known to be good.
        port: The port that its server listens on.
        present: Programs that are in it for certain.
        absent: Programs that are not in it.
        check: A health check that works.
    """

    names: tuple[str, ...]
    tag: str
    port: int
    present: tuple[str, ...]
    absent: tuple[str, ...]
    check: str


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """The whole table.

    Attributes:
        verified: Release whose source the table was read in.
        runner_since: First release to which the table applies in full.
        application: Names that applications use for themselves.
    """

    verified: str
    runner_since: str
    server: dict[str, ServerSetting]
    application: frozenset[str]
    image: dict[str, Image]

    def nearest(self, name: str) -> str | None:
        """Return the setting that `name` is probably a misspelling of."""
        known = [n for n, setting in self.server.items() if setting.reads == "yes"]
        found = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        return found[0] if found else None


@cache
def knowledge() -> Knowledge:
    """Return the table; read once per process."""
    text = resources.files("langchain_aegis.ollama").joinpath("settings.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    return Knowledge(
        verified=table["verified"],
        runner_since=table["runner_since"],
        server={name: ServerSetting(name=name, **_tuples(row)) for name, row in table["server"].items()},
        application=frozenset(table["application"]["names"]),
        image={name: Image(**_tuples(row)) for name, row in table["image"].items()},
    )


def version_tuple(text: str) -> tuple[int, ...]:
    """Return the numbers of a version, to compare with another: "0.33.0-rc2" is (0, 33, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("-")[0]))


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


_BOOLS = {"1", "t", "T", "TRUE", "true", "True", "0", "f", "F", "FALSE", "false", "False"}
_NUMBER = re.compile(r"[+-]?\d+")
_DURATION = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)((\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h))*")
