"""What of a model decides how much memory it takes, and the models whose shapes are shipped."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any, Self

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.ollama.plan_quantisation import of_name, quantisations


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model, as far as memory and speed go.

    Attributes:
        weights_bytes: Of its file.
        quantisation: As the server calls it, e.g. "Q4_K_M".
        window: Tokens that it was trained for; None: not known.
        vocabulary: Tokens that it knows.
        full_width: Values of keys and values that one token takes, over all layers that see the whole window.
        sliding_width: The same over the layers that see `sliding_window` tokens only.
        state_bytes: What a slot takes beside these, whatever the window (recurrent layers).
        experts: Of each layer, 0 if it has none; `experts_used` of them work on a token.
        expert_parameters: Of all experts of all layers.
        tied: The table of tokens is used for the output, too, and so read for each token.
        single_slot: Ollama runs one answer at a time, whatever it is told.
        native: It was trained in its quantisation.
        assumed: What is a guess, in whole sentences.
    """

    name: str
    architecture: str
    parameters: int
    weights_bytes: int
    quantisation: str
    window: int | None
    heads: int
    embedding: int
    vocabulary: int
    full_width: int
    sliding_width: int = 0
    sliding_window: int = 0
    state_bytes: int = 0
    experts: int = 0
    experts_used: int = 0
    expert_parameters: int = 0
    tied: bool = True
    single_slot: bool = False
    native: bool = False
    assumed: tuple[str, ...] = ()

    def stored_as(self, quantisation: str) -> Self:
        """Return the model in another quantisation; its size is then an estimate."""
        row = quantisations()[quantisation]
        return replace(self, quantisation=quantisation, weights_bytes=round(self.parameters * row.bits / 8))

    def parameters_read(self, answers: int = 1) -> float:
        """Return how many parameters one step reads that makes a token for each of `answers` at once.

        Experts are drawn independently for each token, so more answers touch more of them.
        """
        untouched = (1 - self.experts_used / self.experts) ** answers if self.experts else 0.0
        table = 0 if self.tied else self.vocabulary * self.embedding
        return self.parameters - table - self.expert_parameters * untouched


@cache
def _tables() -> dict[str, Any]:
    text = resources.files("langchain_aegis.ollama").joinpath("models.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def known_models() -> Mapping[str, Mapping[str, Any]]:
    """Return the shipped rows, by name."""
    rows: Mapping[str, Mapping[str, Any]] = _tables()["model"]
    return rows


def quantised_kv_cache_hurts(architecture: str) -> bool:
    """Return whether a quantised KV cache is known to spoil this architecture's answers."""
    return architecture in _tables()["quantised_kv_cache_hurts"]["architectures"]


def sliding_layers(architecture: str, layers: int) -> list[bool] | None:
    """Return which layers see a sliding window only, as the runner knows it of an architecture; None if it does not."""
    period = _tables()["sliding_period"].get(architecture)
    return [i % period < period - 1 for i in range(layers)] if period else None


def of_table(name: str, quantisation: str | None = None) -> Shape | None:
    """Return a model of the shipped table; None if it is not there.

    Args:
        name: As Ollama calls it; a quantisation in its tag counts: "llama3.1:8b-instruct-q8_0".
        quantisation: Wins over the tag; default: that of the tag, else what `ollama pull` fetches.
    """
    base, tagged = of_name(name.removesuffix(":latest"))
    found = _row(base)
    if found is None:
        return None
    key, row = found
    native = row.get("native")
    wanted = quantisation or native or tagged or "Q4_K_M"
    window = row.get("sliding_window", 0)
    slides = (sliding_layers(row["architecture"], row["layers"]) if window else None) or []
    per_layer = 2 * row["kv_heads"] * row["head"]
    shape = Shape(
        name=key,
        weights_bytes=round(row["parameters"] * row.get("bits", 0) / 8),
        quantisation=wanted,
        full_width=per_layer * (row["layers"] - sum(slides)),
        sliding_width=per_layer * sum(slides),
        sliding_window=window,
        expert_parameters=3 * row["embedding"] * row["feed_forward"] * row["layers"] * row.get("experts", 0),
        tied=row.get("tied", False),
        native=wanted == native,
        **{field: row.get(field, 0) for field in _COPIED},
    )
    return shape if shape.native else shape.stored_as(wanted)


def of_size(name: str, parameters: int, quantisation: str | None = None) -> Shape:
    """Return a model of which only the size is known: its layers are taken from the next larger dense one."""
    dense = sorted((row["parameters"], key) for key, row in known_models().items() if not row.get("experts"))
    _, like = next((each for each in dense if each[0] >= parameters * 0.95), dense[-1])
    model = of_table(like)
    assert model is not None  # noqa: S101 - the name comes from the table
    note = f"Layers, heads and window of {like} are assumed, the next larger model that is known here."
    shape = replace(model, name=name, architecture="unknown", parameters=parameters, assumed=(note,))
    return shape.stored_as(quantisation or of_name(name)[1] or "Q4_K_M")


def of_tag(name: str, quantisation: str | None = None) -> Shape:
    """Return a model of which nothing but its name is known, by the size that its tag gives: "some:8b".

    Raises:
        AegisConfigError: It gives none.
    """
    size = re.search(r":(\d+(?:\.\d+)?[mb])(?:-|$)", name, re.IGNORECASE)
    parameters = parse_size(size[1]) if size else None
    if parameters is None:
        raise _unknown(name)
    return of_size(name, parameters, quantisation)


def parse_size(text: str) -> int | None:
    """Return the number that "8b", "8.03B", "270M" or "8000000000" means; None if it is none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmbt]?)\s*", text, re.IGNORECASE)
    if not found:
        return None
    return round(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[found[2].lower()]) or None


def _row(name: str) -> tuple[str, Mapping[str, Any]] | None:
    for key, row in known_models().items():
        if name == key or name in row.get("also", ()):
            return key, row
    # "llama3.1:8b-instruct": what follows the size says how it was trained, not what its shape is.
    shorter = name.rpartition("-")[0]
    return _row(shorter) if ":" in shorter else None


def _unknown(name: str) -> AegisConfigError:
    return AegisConfigError(
        f"{name!r} is not known here: pull it and ask its server, add its size (--parameters 8b), or name one of "
        + ", ".join(known_models())
    )


_COPIED = (
    "architecture", "parameters", "window", "heads", "embedding", "vocabulary", "experts", "experts_used",
)  # fmt: skip
