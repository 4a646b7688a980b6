"""Name what decides about a model's answer apart from the prompt. Pure: no clock, no network.

Two models may share an answer only when this name is equal. The rule leans to one side: an option that is not
known to leave answers alone is part of the name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_aegis.errors import AegisOptionError

PREFIX = "aegis/1 "
_write = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode

# They decide how fast and where an answer is computed, not what it says.
EXECUTION_OPTIONS = frozenset(
    {"num_thread", "num_gpu", "num_batch", "main_gpu", "use_mmap", "use_mlock", "low_vram", "numa", "draft_num_predict"}
)


def normalise_model(name: str) -> str:
    """Return `name` with its tag: Ollama reads `x` as `x:latest`."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def identify(
    *,
    model: str,
    options: Mapping[str, Any] | None = None,
    stop: Sequence[str] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: Any = None,
    format: str | Mapping[str, Any] | None = None,
    think: bool | str | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Return everything that decides about an answer, in a form that is equal whenever answers may be shared.

    Args:
        model: Name of the model, with or without a tag.
        options: Ollama's options, constructor and call merged. Those in `EXECUTION_OPTIONS` are left out.
        stop: Texts that end the answer, in any order.
        tools: The tools as they are sent; their order counts, the prompt lists them in it.
        tool_choice: Which tool must be called.
        format: `"json"`, or a JSON schema. The order of a schema's properties counts: it is the answer's order.
        think: Ollama's `think` field.
        fields: Further fields of the request that change the answer, such as `logprobs` or `truncate`.

    Returns:
        Plain JSON values. What is None or empty is left out.
    """
    shared = {
        name: _number(value)
        for name, value in (options or {}).items()
        if value is not None and name not in EXECUTION_OPTIONS and name != "stop"
    }
    ends = stop if stop is not None else (options or {}).get("stop")
    named = {
        "model": normalise_model(model),
        "options": dict(sorted(shared.items())) or None,
        "stop": sorted({ends} if isinstance(ends, str) else set(ends)) if ends else None,
        "tools": [_in_order(tool) for tool in tools] if tools else None,
        "tool_choice": _in_order(tool_choice) if tools else None,
        "format": (_in_order(format) if isinstance(format, Mapping) else format) or None,
        "think": think,
        **{name: _number(value) for name, value in fields.items()},
    }
    return {name: value for name, value in sorted(named.items()) if value is not None}


def llm_string(identity: Mapping[str, Any]) -> str:
    """Return `identity` (see `identify`) as the text that LangChain passes to a cache.

    Raises:
        AegisOptionError: A value is nothing that JSON can say.
    """
    try:
        return PREFIX + _write(identity)
    except (TypeError, ValueError, RecursionError) as exc:
        raise AegisOptionError(f"an option of the model cannot be written as JSON: {exc}") from exc


def _number(value: Any) -> Any:
    # 0 and 0.0 are one temperature; True is no number.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _in_order(value: Any) -> Any:
    """Return a schema with its properties as pairs, because sorted JSON would lose their order."""
    if isinstance(value, Mapping):
        return {
            name: [[key, _in_order(each)] for key, each in inner.items()]
            if name == "properties" and isinstance(inner, Mapping)
            else _in_order(inner)
            for name, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_in_order(each) for each in value]
    return value
