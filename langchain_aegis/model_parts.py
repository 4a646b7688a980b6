"""Read what LangChain's `llm_string` says about a model. Pure."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from langchain_aegis.messages import loads

_MODEL_NAMES = (
    "model",
    "model_name",
    "model_id",
    "deployment_name",
    "azure_deployment",
    "repo_id",
    "model_path",
    "engine",
)
_OWN_FORM = "aegis/1 "
_UNREADABLE = "unreadable"
_TOOL_FIELDS = frozenset({"tools", "functions", "tool_choice", "function_call"})
_STRUCTURE_FIELDS = frozenset({"format", "response_format", "ls_structured_output_format", "structured_output"})
_PART_OF = {
    "stop": "stop",
    **dict.fromkeys(_MODEL_NAMES, "model"),
    **dict.fromkeys(_TOOL_FIELDS, "tools"),
    **dict.fromkeys(_STRUCTURE_FIELDS, "format"),
}


@dataclass(frozen=True, slots=True)
class ModelPart:
    """What LangChain's `llm_string` says about the model."""

    canonical: str
    name: str | None
    exact_only: str | None = None


@functools.lru_cache(maxsize=256)
def parse_llm_string(llm_string: str) -> ModelPart | None:
    """Read what LangChain says about the model; None if it is LangChain's own form and names no model.

    A form that is not known is opaque: hashed whole, exact tier only.
    """
    fields = _read(llm_string)
    if fields is None:
        return ModelPart(llm_string, None, "opaque_model")
    name = _name(fields)
    if name is None and not llm_string.startswith(_OWN_FORM):
        return None
    reason = "tools" if any(fields.get(f) for f in _TOOL_FIELDS) else None
    if reason is None and any(fields.get(f) for f in _STRUCTURE_FIELDS):
        reason = "structured_output"
    return ModelPart(llm_string, name, reason)


def model_fields(llm_string: str) -> dict[str, tuple[str]]:
    """Return what an `llm_string` says in parts: model, tools, format, stop, and all else as options."""
    fields = _read(llm_string)
    parts: dict[str, dict[str, Any]] = {"model": {}, "options": {}, "tools": {}, "format": {}, "stop": {}}
    if fields is None or _UNREADABLE in fields.values():
        fields = {**(fields or {}), "whole": llm_string}
    for name, value in fields.items():
        parts[_PART_OF.get(name, "options")][name] = value
    return {part: (repr(sorted(told.items())),) for part, told in parts.items()}


def _name(fields: Mapping[str, Any]) -> str | None:
    return next((str(fields[n]) for n in _MODEL_NAMES if fields.get(n)), None)


def _read(llm_string: str) -> dict[str, Any] | None:
    """Return the fields of a form that is known, else None."""
    try:
        if llm_string.startswith(_OWN_FORM):
            return dict(loads(llm_string[len(_OWN_FORM) :]))
        if llm_string.startswith("[("):
            return _read_params(llm_string)
        head, dashes, tail = llm_string.rpartition("---")
        if dashes and head.startswith("{"):  # a serialisable model: its constructor as JSON, then the call's arguments
            return {**loads(head).get("kwargs", {}), **_read_params(tail)}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return None


def _read_params(text: str) -> dict[str, Any]:
    """Read `str(sorted(params.items()))`: as literals where possible, else at least the names and plain texts."""
    try:
        return dict(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        names: dict[str, Any] = dict.fromkeys(re.findall(r"[\[ ]\('(\w+)', (?!None)", text), _UNREADABLE)
        names.update(re.findall(r"[\[ ]\('(\w+)', '([^']*)'\)", text))
        return names
