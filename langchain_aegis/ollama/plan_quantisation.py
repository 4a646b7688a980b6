"""How models are stored: bits, what is lost, how fast; and which one fits a memory and a quality."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from langchain_aegis.errors import AegisConfigError


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """One row of quantisations.toml, where the sources stand.

    Attributes:
        bits: Per weight, of a whole file.
        kl: Mean Kullback-Leibler divergence from F16; None: not comparable.
        perplexity: On Wikitext-2.
        tokens_s: Of the table's machine; only ratios mean anything.
        create: `ollama create --quantize` can make it.
        native: Nothing to lose: models are trained in it.
    """

    name: str
    bits: float
    kl: float | None = None
    perplexity: float | None = None
    tokens_s: float | None = None
    create: bool = False
    native: bool = False

    @property
    def size_ratio(self) -> float:
        """Size relative to F16."""
        return self.bits / quantisations()["F16"].bits

    @property
    def perplexity_ratio(self) -> float | None:
        """Perplexity relative to F16; 1.03 means 3 % worse."""
        reference: float = _tables()["reference"]["f16_perplexity"]
        return None if self.perplexity is None else self.perplexity / reference

    @property
    def speed_ratio(self) -> float | None:
        """Generated tokens per second relative to F16."""
        reference = quantisations()["F16"].tokens_s
        return None if self.tokens_s is None or reference is None else self.tokens_s / reference


@cache
def _tables() -> dict[str, Any]:
    text = resources.files("langchain_aegis.ollama").joinpath("quantisations.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@cache
def quantisations() -> Mapping[str, Quantisation]:
    """Return all rows by name, from small to large."""
    rows = [Quantisation(name=name, **row) for name, row in _tables()["quantisation"].items()]
    return {row.name: row for row in sorted(rows, key=lambda row: row.bits)}


def sources() -> Mapping[str, str]:
    """Return where the rows come from."""
    reference = _tables()["reference"]
    return {name: reference[name] for name in ("sizes", "quality")}


def quality_levels() -> Mapping[str, float]:
    """Return the quality targets, from strict to lax: by how much perplexity may be above that of F16."""
    levels: Mapping[str, float] = _tables()["quality"]
    return levels


def kv_bits(kv_type: str) -> float:
    """Return the bits that a value of the KV cache takes.

    Raises:
        AegisConfigError: It is no type that a plan can be made for.
    """
    rows = _tables()["kv_cache"]
    if kv_type not in rows:
        raise AegisConfigError(f"the KV cache's type must be one of {', '.join(rows)}, got {kv_type!r}")
    bits: float = rows[kv_type]["bits"]
    return bits


def kv_perplexity_ratio(kv_type: str) -> float:
    """Return the perplexity with a type of the KV cache, relative to f16."""
    rows = _tables()["kv_cache"]
    ratio: float = rows[kv_type]["perplexity"] / rows["f16"]["perplexity"]
    return ratio


def kv_types() -> list[str]:
    """Return the types of the KV cache that a plan can be made for."""
    return list(_tables()["kv_cache"])


def check_quantisation(name: str) -> str:
    """Return the row's name for any spelling of it.

    Raises:
        AegisConfigError: There is no such row.
    """
    if (found := _spelt(name)) is None:
        raise AegisConfigError(f"the quantisation must be one of {', '.join(quantisations())}, got {name!r}")
    return found


def check_quality(name: str) -> float:
    """Return by how much a quality target lets perplexity be above that of F16.

    Raises:
        AegisConfigError: There is no such target.
    """
    levels = quality_levels()
    if name not in levels:
        raise AegisConfigError(f"the quality must be one of {', '.join(levels)}, got {name!r}")
    return levels[name]


def of_name(model: str) -> tuple[str, str | None]:
    """Split a model's name into the part without its quantisation, and that."""
    head, _, last = model.rpartition("-")
    found = _spelt(last) if head else None
    return (head, found) if found else (model, None)


def meets(row: Quantisation, most: float) -> bool:
    """Return whether no more is lost than a quality target allows; a model that was trained in it loses nothing."""
    return row.native or (row.perplexity_ratio is not None and row.perplexity_ratio - 1 <= most)


def _spelt(name: str) -> str | None:
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    plain = {"fp16": "f16", "bf16": "f16", "mxfp4moe": "mxfp4"}.get(plain, plain)
    return next((row for row in quantisations() if re.sub(r"[^a-z0-9]", "", row.lower()) == plain), None)
