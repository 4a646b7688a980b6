"""How fast a model can generate at most, from the bandwidth of its memory, and how much of that is reached.

Each token needs all weights that work on it, and the keys and values of the tokens before it, read once from memory.
That gives a ceiling. What is reached is a share of it, taken from published measurements (gb10.toml).
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from langchain_aegis.ollama.plan import GB, Layout, kv_bytes
from langchain_aegis.ollama.plan_shape import Shape, of_table


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Generated tokens per second of all answers together: an estimate, and its ceiling."""

    low: float
    high: float
    ceiling: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One published measurement on a GB10.

    Attributes:
        shape: The model, with the size of the file that was measured.
        answers: At once.
        tokens: Of each answer's prompt and its beginning.
        tokens_s: Of all answers together.
    """

    shape: Shape
    answers: int
    tokens: int
    tokens_s: float

    @property
    def ceiling(self) -> float:
        """What the memory allows, in tokens per second."""
        return ceiling(self.shape, gb10_bandwidth(), self.tokens, answers=self.answers)

    @property
    def share(self) -> float:
        """How much of the ceiling was reached."""
        return self.tokens_s / self.ceiling


def ceiling(shape: Shape, bandwidth_gb_s: float, tokens: int, *, answers: int = 1, kv_type: str = "f16") -> float:
    """Return the tokens per second that memory of this bandwidth allows at most, of all answers together.

    Args:
        tokens: That each answer has before it: of a sliding window only its part is read.
        answers: At once; they share the reading of the weights, but each has its own keys and values.
    """
    weights = shape.weights_bytes * shape.parameters_read(answers) / shape.parameters
    cache_bytes = kv_bytes(shape, Layout(slots=1, context=max(tokens, 1), kv_type=kv_type)) if tokens else 0
    return answers * bandwidth_gb_s * GB / (weights + answers * cache_bytes)


def estimate(shape: Shape, bandwidth_gb_s: float, tokens: int, *, answers: int = 1, kv_type: str = "f16") -> Speed:
    """Return what to expect: the shares of the ceiling that were reached on a GB10, applied to this model."""
    most = ceiling(shape, bandwidth_gb_s, tokens, answers=answers, kv_type=kv_type)
    low, high = shares(several=answers > 1)
    return Speed(low=most * low, high=most * high, ceiling=most)


@cache
def gb10_bandwidth() -> float:
    """Return the bandwidth of the measured machine in 10^9 bytes per second."""
    bandwidth: float = _file()["bandwidth_gb_s"]
    return bandwidth


@cache
def measurements() -> Sequence[Measured]:
    """Return the published measurements."""
    rows = []
    for row in _file()["measured"]:
        known = of_table(row["model"])
        assert known is not None  # noqa: S101 - a test compares the two files
        shape = replace(known, quantisation=row["quantisation"], weights_bytes=round(row["gib"] * 2**30))
        for (answers, tokens), speed in zip(_file()["columns"], row["tokens_s"], strict=True):
            rows.append(Measured(shape=shape, answers=answers, tokens=tokens, tokens_s=speed))
    return rows


@cache
def shares(*, several: bool) -> tuple[float, float]:
    """Return the smallest and the largest share of the ceiling that was reached by one answer, or several at once."""
    reached = [row.share for row in measurements() if (row.answers > 1) == several]
    return min(reached), max(reached)


def source() -> str:
    """Return where the measurements come from."""
    text: str = _file()["source"]
    return text


@cache
def _file() -> dict[str, Any]:
    text = resources.files("langchain_aegis.ollama").joinpath("gb10.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
