"""The questions of the demonstration, and what is known of the answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from langchain_aegis.errors import AegisConfigError


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question of the list.

    Attributes:
        question: What is asked.
        kind: "new", "repeat", "paraphrase" or "trap"; for the reader.
        source: File name of the document that answers it; two questions with different ones have different answers.
        fact: What a right answer contains, or "".
    """

    question: str
    kind: str
    source: str
    fact: str


def read_questions(path: Path) -> list[Asked]:
    """Read JSON lines. Raises AegisConfigError, which names the file, and the line that cannot be read."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as exc:
        raise AegisConfigError(f"{path} cannot be read: {exc.strerror}") from exc
    asked = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as exc:
            raise AegisConfigError(f"{path}, line {number}: not JSON ({exc})") from exc
        if not isinstance(row, dict) or not _text(row, "question") or not _text(row, "source"):
            raise AegisConfigError(f'{path}, line {number}: needs at least {{"question": "...", "source": "..."}}')
        asked.append(
            Asked(
                question=row["question"],
                kind=_text(row, "kind") or "new",
                source=row["source"],
                fact=_text(row, "fact"),
            )
        )
    if not asked:
        raise AegisConfigError(f"{path} holds no question")
    return asked


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    return value.strip() if isinstance(value, str) else ""
