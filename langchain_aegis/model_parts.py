"""Read what LangChain's `llm_string` says about a model. Pure, but for one variable of the environment."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
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
_STRUCTURE_FIELDS = frozenset({
    "format", "response_format", "ls_structured_output_format", "structured_output",
    # vLLM's, SGLang's and llama.cpp's own, which go through `extra_body`
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding",
    "json_schema", "grammar", "regex", "ebnf", "text_format",
})  # fmt: skip
_PART_OF = {
    "stop": "stop",
    **dict.fromkeys(_MODEL_NAMES, "model"),
    **dict.fromkeys(_TOOL_FIELDS, "tools"),
    **dict.fromkeys(_STRUCTURE_FIELDS, "format"),
}
_WITHIN = ("model_kwargs", "extra_body")  # fields of a request inside a field of the model
_OPENAI = ["langchain", "chat_models", "openai", "ChatOpenAI"]
# Of ChatOpenAI: how long, how often, through what and in how many pieces an answer comes, not what it says. All else
# is part of the key, also the address (one name may mean two models at two servers) and headers (gateways route by
# them).
_TRANSPORT = frozenset({
    "name", "request_timeout", "max_retries", "streaming", "stream_usage", "stream_chunk_timeout", "disable_streaming",
    "http_socket_options", "openai_proxy", "openai_api_key", "tiktoken_model_name",
})  # fmt: skip
_BASE_URL = "openai_api_base"
_BETWEEN = "---"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class ModelPart:
    """What LangChain's `llm_string` says about the model."""

    canonical: str
    name: str | None
    exact_only: str | None = None


def parse_llm_string(llm_string: str) -> ModelPart | None:
    """Read what LangChain says about the model; None if it is LangChain's own form and names no model.

    A form that is not known is opaque: hashed whole, exact tier only.
    """
    # The client of OpenAI's wire reads it itself, so that no field of the model names the server.
    return _parse(llm_string, os.environ.get("OPENAI_BASE_URL", "") if '"ChatOpenAI"' in llm_string else "")


@functools.lru_cache(maxsize=256)
def _parse(llm_string: str, base_url: str) -> ModelPart | None:
    fields = _read(llm_string)
    if fields is None:
        return ModelPart(llm_string, None, "opaque_model")
    name = _name(fields)
    if name is None and not llm_string.startswith(_OWN_FORM):
        return None
    told = dict(_told(fields))
    reason = "tools" if any(told.get(f) for f in _TOOL_FIELDS) else None
    if reason is None and any(told.get(f) for f in _STRUCTURE_FIELDS):
        reason = "structured_output"
    return ModelPart(_of_openai(llm_string, base_url) or llm_string, name, reason)


def model_fields(llm_string: str) -> dict[str, tuple[str]]:
    """Return what an `llm_string` says in parts: model, tools, format, stop, and all else as options."""
    fields = _read(llm_string)
    parts: dict[str, dict[str, Any]] = {"model": {}, "options": {}, "tools": {}, "format": {}, "stop": {}}
    if fields is None or _UNREADABLE in fields.values():
        fields = {**(fields or {}), "whole": llm_string}
    elif _of_openai(llm_string, ""):
        fields = {name: value for name, value in fields.items() if name not in _TRANSPORT}
    for name, value in fields.items():
        parts[_PART_OF.get(name, "options")][name] = value
    return {part: (repr(sorted(told.items())),) for part, told in parts.items()}


def _name(fields: Mapping[str, Any]) -> str | None:
    return next((str(fields[n]) for n in _MODEL_NAMES if fields.get(n)), None)


def _told(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a request, those first that stand inside another one."""
    for name in _WITHIN:
        inner = fields.get(name)
        if isinstance(inner, Mapping):
            yield from ((key, value) for key, value in _told(inner) if value)
    yield from ((key, value) for key, value in fields.items() if value)


def _of_openai(llm_string: str, base_url: str) -> str | None:
    """Return what ChatOpenAI's form says without what leaves answers alone; None for any other form.

    Args:
        llm_string: The form.
        base_url: The address that the client uses where the model names none.
    """
    if '"ChatOpenAI"' not in llm_string:
        return None
    try:
        read, tail = _split(llm_string)
    except (ValueError, RecursionError):
        return None
    if read.get("id") != _OPENAI or not isinstance(read.get("kwargs"), dict):
        return None
    fields = {name: value for name, value in read["kwargs"].items() if name not in _TRANSPORT}
    address = fields.get(_BASE_URL) or base_url
    if isinstance(address, str) and address:
        fields[_BASE_URL] = address.rstrip("/")
    return f"{json.dumps({'id': _OPENAI, 'kwargs': fields}, sort_keys=True)}{_BETWEEN}{tail}"


def _split(llm_string: str) -> tuple[dict[str, Any], str]:
    """Return the constructor and the call's arguments of a serialisable model; ValueError for any other form.

    Either may hold what stands between them: a text that ends the answer, for one.
    """
    read, end = _DECODER.raw_decode(llm_string)
    if not isinstance(read, dict) or not llm_string.startswith(_BETWEEN, end):
        raise ValueError("not LangChain's form")
    return read, llm_string[end + len(_BETWEEN) :]


def _read(llm_string: str) -> dict[str, Any] | None:
    """Return the fields of a form that is known, else None."""
    try:
        if llm_string.startswith(_OWN_FORM):
            return dict(loads(llm_string[len(_OWN_FORM) :]))
        if llm_string.startswith("[("):
            return _read_params(llm_string)
        if llm_string.startswith("{"):
            constructor, arguments = _split(llm_string)
            return {**constructor.get("kwargs", {}), **_read_params(arguments)}
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
