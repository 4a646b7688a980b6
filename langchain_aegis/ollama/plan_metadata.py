"""Read a model's shape from what an Ollama server says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_aegis.ollama.knowledge import knowledge
from langchain_aegis.ollama.plan_shape import Shape, parse_size, sliding_layers

_LARGE_VOCABULARY = 262_144


def of_metadata(name: str, shown: Mapping[str, Any], size_bytes: int) -> Shape | None:
    """Return the model that `/api/show` describes; None if its layers are not described there.

    Args:
        shown: The answer to /api/show; with `verbose`, lists that differ from layer to layer are in it.
        size_bytes: Of its files, from /api/tags.
    """
    info, details = _mapping(shown.get("model_info")), _mapping(shown.get("details"))
    architecture = str(info.get("general.architecture") or details.get("family") or "")
    own = {key.removeprefix(f"{architecture}."): value for key, value in info.items()}
    parameters = _count(info.get("general.parameter_count")) or parse_size(str(details.get("parameter_size")))
    layers, heads = _count(own.get("block_count")), _largest(own.get("attention.head_count"))
    if not (parameters and layers and heads):
        return None
    embedding, experts = _count(own.get("embedding_length")) or 0, _count(own.get("expert_count")) or 0
    key = _count(own.get("attention.key_length")) or embedding // heads
    value = _count(own.get("attention.value_length")) or key
    sliding_key = _count(own.get("attention.key_length_swa")) or key
    sliding_value = _count(own.get("attention.value_length_swa")) or value
    window = _count(own.get("attention.sliding_window")) or 0
    vocabulary = _count(own.get("vocab_size")) or len(own.get("tokenizer.ggml.tokens") or ())
    assumed = []
    if (kv_heads := _per_layer(own.get("attention.head_count_kv"), layers)) is None:
        kv_heads = [heads] * layers
        assumed.append("As many heads for keys and values as for queries are assumed; that is the most it can be.")
    if not vocabulary:
        vocabulary = _LARGE_VOCABULARY
        assumed.append(f"A vocabulary of {vocabulary:,} tokens is assumed for the compute buffers.")
    feed_forward = _largest(own.get("expert_feed_forward_length" if experts else "feed_forward_length")) or 0
    routed = layers - (_count(own.get("leading_dense_block_count")) or 0)
    in_experts = min(3 * embedding * feed_forward * experts * routed, parameters)
    attention = embedding * (key + value) * (heads * layers + sum(kv_heads))
    body = attention + (in_experts or 3 * embedding * feed_forward * layers)
    cached = _cached(kv_heads, own)
    slides = (_pattern(own, layers) or sliding_layers(architecture, layers) if window else None) or [False] * layers
    quantisation = str(details.get("quantization_level") or "unknown")
    return Shape(
        name=name,
        architecture=architecture,
        parameters=parameters,
        weights_bytes=size_bytes,
        quantisation=quantisation,
        window=_count(own.get("context_length")),
        heads=heads,
        embedding=embedding,
        vocabulary=vocabulary,
        full_width=sum(n for n, slide in zip(cached, slides, strict=True) if not slide) * (key + value),
        sliding_width=sum(n for n, slide in zip(cached, slides, strict=True) if slide) * (sliding_key + sliding_value),
        sliding_window=window,
        state_bytes=_state_bytes(own) * sum(not n for n in cached),
        experts=experts,
        experts_used=_count(own.get("expert_used_count")) or experts,
        expert_parameters=in_experts,
        # The table of tokens is there twice if the rest leaves room for it; once is the careful guess.
        tied=not feed_forward or parameters < body + 1.5 * vocabulary * embedding,
        single_slot=_has_single_slot(architecture, shown.get("capabilities")),
        native=quantisation.upper().startswith("MXFP4"),
        assumed=tuple(assumed),
    )


def needs_lists(shown: Mapping[str, Any]) -> bool:
    """Return whether numbers that differ from layer to layer were left out of an answer to /api/show."""
    info = _mapping(shown.get("model_info"))
    names = ("head_count", "head_count_kv", "sliding_window_pattern")
    wanted = [f"{info.get('general.architecture')}.attention.{name}" for name in names]
    return any(name in info and not info[name] for name in wanted)


def _has_single_slot(architecture: str, capabilities: Any) -> bool:
    answers = not isinstance(capabilities, Sequence) or "completion" in capabilities
    return not answers or knowledge().one_slot_for([architecture]) is not None


def _cached(kv_heads: Sequence[int], own: Mapping[str, Any]) -> list[int]:
    """Return each layer's heads in the KV cache: none where a state takes its place, or another layer's is used."""
    interval = _count(own.get("full_attention_interval")) or 1
    end = len(kv_heads) - (_count(own.get("attention.shared_kv_layers")) or 0)
    return [n if (i + 1) % interval == 0 and i < end else 0 for i, n in enumerate(kv_heads)]


def _state_bytes(own: Mapping[str, Any]) -> int:
    """Return what one recurrent layer keeps of a sequence; in f32, whatever the KV cache's type."""
    inner, state, groups, kernel = (
        _count(own.get(f"ssm.{name}")) or 0 for name in ("inner_size", "state_size", "group_count", "conv_kernel")
    )
    return 4 * (max(kernel - 1, 0) * (inner + 2 * groups * state) + state * inner)


def _pattern(own: Mapping[str, Any], layers: int) -> list[bool] | None:
    pattern = own.get("attention.sliding_window_pattern")
    if isinstance(pattern, Sequence) and len(pattern) == layers:
        return [bool(each) for each in pattern]
    period = _count(pattern)
    return [i % period < period - 1 for i in range(layers)] if period else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _per_layer(value: Any, layers: int) -> list[int] | None:
    if isinstance(value, Sequence) and len(value) == layers and all(isinstance(each, int) for each in value):
        return list(value)
    return [value] * layers if _count(value) else None


def _largest(value: Any) -> int | None:
    if isinstance(value, Sequence):
        return max((each for each in value if _count(each)), default=None)
    return _count(value)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
