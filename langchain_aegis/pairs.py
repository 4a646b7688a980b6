"""Labelled question pairs that show what an embedder and the guards let through.

Made by hand, taken from fow-cache (CC BY 4.0, Mabon ap Gwyn) or from gated-semantic-cache (MIT, Jags Ramnarayan); see
`data/pairs/README.md` and `NOTICE`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

SOURCES = ("hand", "fow", "gated")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two questions that lie near each other.

    Attributes:
        cached: The one that was answered.
        new: The one that is asked now.
        duplicate: Whether the answer serves it (a paraphrase), or not (a trap).
        source: Who wrote it: "hand", "fow", "gated_banking", "gated_finance".
        category: What makes the difference, in the source's words.
        lang: "en" or "de".
        component: Questions of two components have nothing to do with each other.
    """

    cached: str
    new: str
    duplicate: bool
    source: str
    category: str
    lang: str
    component: int


@cache
def load() -> tuple[Pair, ...]:
    """Return the pairs that come with this package, always in the same order."""
    directory = files("langchain_aegis") / "data" / "pairs"
    return tuple(
        Pair(cached, new, bool(duplicate), source, category, lang, component)
        for name in SOURCES
        for cached, new, duplicate, source, category, lang, component in map(
            json.loads, (directory / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        )
    )
