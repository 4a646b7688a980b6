"""What the doctor finds: one statement each, with its reason and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["ok", "info", "warning", "error"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One statement of the doctor.

    Attributes:
        code: Stable name of the kind of finding, e.g. `setting-ignored`.
        severity: "ok", "info" (worth knowing), "warning" (works, not as meant) or "error" (does not work, or is open
            to others).
        where: File and place, or address of the server; never with a password.
        what: The fact.
        why: What follows from it.
        fix: What to write or run instead; empty if nothing is to be done.
    """

    code: str
    severity: Severity
    where: str
    what: str
    why: str = ""
    fix: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return the finding as plain JSON data."""
        return asdict(self)


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 2 if there is an error among the findings, 1 if there is a warning, else 0."""
    severities = {f.severity for f in findings}
    return 2 if "error" in severities else 1 if "warning" in severities else 0
