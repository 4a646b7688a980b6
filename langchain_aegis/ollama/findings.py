"""What the doctor finds: one statement each, with its reason and what to do."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from langchain_aegis.ollama.places import Edit

Severity = Literal["ok", "info", "warning", "error"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One statement of the doctor.

    Attributes:
        code: Stable name of the kind of finding, e.g. `setting-ignored`; one of `codes()`.
        severity: "ok", "info" (worth knowing), "warning" (works, not as meant) or "error" (does not work, or is open
            to others).
        where: File, line and place, or address of the server; never with a password.
        what: The fact.
        why: What follows from it.
        fix: What to write or run instead; empty if nothing is to be done.
        edit: The change of the file that does what `fix` says, where one can be made safely.
    """

    code: str
    severity: Severity
    where: str
    what: str
    why: str = ""
    fix: str = ""
    edit: Edit | None = None

    def as_dict(self) -> dict[str, str]:
        """Return the finding as plain JSON data, without the edit."""
        return {name: str(getattr(self, name)) for name in ("code", "severity", "where", "what", "why", "fix")}


@dataclass(frozen=True, kw_only=True)
class Code:
    """One kind of finding, as the documentation lists it.

    Attributes:
        looks_at: "files", "ollama", "vllm", "redis" or "probe": what must be there for it.
        severity: The severities that it may have.
        checks: What is looked for, in one sentence.
        fixed: `--fix` can correct it, at least in its usual form.
    """

    looks_at: Literal["files", "ollama", "vllm", "redis", "probe"]
    severity: tuple[str, ...]
    checks: str
    fixed: bool = False


@cache
def codes() -> Mapping[str, Code]:
    """Return every code that the doctor may report; read once per process."""
    table = tomllib.loads(resources.files("langchain_aegis.ollama").joinpath("codes.toml").read_text(encoding="utf-8"))
    return {code: Code(**row | {"severity": tuple(row["severity"])}) for code, row in table.items()}


def render_codes() -> str:
    """Return the table of codes as Markdown."""
    where = {"files": "files", "ollama": "server", "vllm": "vLLM", "redis": "Redis", "probe": "`--probe`"}
    rows = [
        f"| `{name}` | {where[c.looks_at]} | {', '.join(c.severity)} | {c.checks} | {'yes' if c.fixed else ''} |"
        for name, c in codes().items()
    ]
    return "\n".join(["| Code | Looks at | Severity | What it says | `--fix` |", "|---|---|---|---|---|", *rows]) + "\n"


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 2 if there is an error among the findings, 1 if there is a warning, else 0."""
    severities = {f.severity for f in findings}
    return 2 if "error" in severities else 1 if "warning" in severities else 0
