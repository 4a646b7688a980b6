"""Check a request's body as Ollama does, with its wording of every refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from langchain_aegis.embedded.wire_engine import EngineError
from langchain_aegis.embedded.wire_json import GoSyntaxError, decode

FOREVER_NS = 2**63 - 1
DEFAULT_KEEP_ALIVE_NS = 5 * 60 * 1_000_000_000

# Options that are fixed when a model is loaded: a request with other values reloads it.
RUNNER_OPTIONS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread", "draft_num_predict")

_INT, _FLOAT, _BOOL, _STRINGS = "integer", "float32", "boolean", "array"
_OPTIONS: dict[str, tuple[str, Any]] = {
    "num_ctx": (_INT, None),
    "num_batch": (_INT, 512),
    "num_gpu": (_INT, -1),
    "main_gpu": (_INT, None),
    "use_mmap": (_BOOL, None),
    "num_thread": (_INT, 0),
    "draft_num_predict": (_INT, 4),
    "num_keep": (_INT, 4),
    "seed": (_INT, -1),
    "num_predict": (_INT, -1),
    "top_k": (_INT, 40),
    "top_p": (_FLOAT, 0.9),
    "min_p": (_FLOAT, 0.0),
    "typical_p": (_FLOAT, 1.0),
    "repeat_last_n": (_INT, 64),
    "temperature": (_FLOAT, 0.8),
    "repeat_penalty": (_FLOAT, 1.0),
    "presence_penalty": (_FLOAT, 0.0),
    "frequency_penalty": (_FLOAT, 0.0),
    "stop": (_STRINGS, ()),
}

_STRING, _BOOLEAN, _NUMBER, _LIST, _OBJECT = "string", "bool", "int", "array", "object"
_GENERATE_FIELDS = {
    "stream": _BOOLEAN, "options": _OBJECT, "truncate": _BOOLEAN, "shift": _BOOLEAN, "logprobs": _BOOLEAN,
    "top_logprobs": _NUMBER,
}  # fmt: skip
FIELDS: dict[str, tuple[str, dict[str, str]]] = {
    "/api/chat": ("ChatRequest", {"model": _STRING, "messages": _LIST, "tools": _LIST, **_GENERATE_FIELDS}),
    "/api/generate": (
        "GenerateRequest",
        {"model": _STRING, "prompt": _STRING, "suffix": _STRING, "system": _STRING, "template": _STRING,
         "context": _LIST, "raw": _BOOLEAN, "images": _LIST, **_GENERATE_FIELDS},
    ),
    "/api/embed": ("EmbedRequest", {"model": _STRING, "truncate": _BOOLEAN, "dimensions": _NUMBER, "options": _OBJECT}),
    "/api/embeddings": ("EmbeddingRequest", {"model": _STRING, "prompt": _STRING, "options": _OBJECT}),
    "/api/pull": ("PullRequest", {"model": _STRING, "name": _STRING, "insecure": _BOOLEAN, "stream": _BOOLEAN}),
    "/api/show": ("ShowRequest", {"model": _STRING, "name": _STRING, "verbose": _BOOLEAN}),
}  # fmt: skip
_GO_TYPE = {
    "messages": "[]api.Message", "tools": "api.Tools", "options": "map[string]interface {}", "context": "[]int",
    "images": "[]api.ImageData",
}  # fmt: skip

# host/namespace/model:tag, of which only the model is needed.
_NAME = re.compile(
    r"(?:[A-Za-z0-9_][\w.:-]{0,349}/)?(?:[A-Za-z0-9_][\w-]{0,79}/)?[A-Za-z0-9_][\w.-]{0,79}(?::[A-Za-z0-9_][\w.-]{0,79})?",
    re.ASCII,
)


class Refused(EngineError):
    """The request is wrong; nothing was asked of the engine."""


def parse(path: str, body: bytes) -> dict[str, Any]:
    """Return the body as an object without null fields, its known fields checked for their types.

    Raises:
        Refused: 400 with Go's message.
    """
    try:
        value = decode(body)
    except GoSyntaxError as exc:
        raise Refused(400, "missing request body" if str(exc) == "EOF" else str(exc)) from exc
    struct, kinds = FIELDS[path]
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Refused(400, f"json: cannot unmarshal {_kind(value)} into Go value of type api.{struct}")
    value = {name: item for name, item in value.items() if item is not None}
    for name, kind in kinds.items():
        if name in value:
            _check(value[name], kind, f"{struct}.{name}", _GO_TYPE.get(name, kind))
    for message in value.get("messages", ()):
        _check_message(message)
    if "think" in value:
        _check_think(value["think"])
    if "keep_alive" in value:
        value["keep_alive"] = duration_ns(value["keep_alive"])
    if not 0 <= value.get("top_logprobs", 0) <= 20:
        raise Refused(400, "top_logprobs must be between 0 and 20")
    return value


def options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return every option, defaults filled in; names that Ollama does not know are ignored, as it does.

    Raises:
        Refused: 500 for a value of another type; that is Ollama's status for it.
    """
    complete = {name: default for name, (_, default) in _OPTIONS.items()}
    for name, value in given.items():
        if name not in _OPTIONS or value is None:
            continue
        kind = _OPTIONS[name][0]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind == _INT and number:
            complete[name] = int(value)
        elif kind == _FLOAT and number:
            complete[name] = float(value)
        elif kind == _BOOL and isinstance(value, bool):
            complete[name] = value
        elif kind == _STRINGS and isinstance(value, list):
            if not all(isinstance(item, str) for item in value):
                raise Refused(500, f'option "{name}" must be of an array of strings')
            complete[name] = tuple(value)
        else:
            raise Refused(500, f'option "{name}" must be of type {kind}')
    return complete


def output_format(value: Any) -> str | Mapping[str, Any] | None:
    """Return None, "json" or a JSON schema.

    Raises:
        Refused: 500 for anything else.
    """
    if value is None or value == "":
        return None
    if value == "json" or isinstance(value, dict):
        return value  # type: ignore[no-any-return]
    shown = json.dumps(json.dumps(value, ensure_ascii=False), ensure_ascii=False)
    raise Refused(500, f'invalid format: {shown}; expected "json" or a valid JSON Schema object')


def valid_name(name: str) -> bool:
    """Tell whether `name` can name a model."""
    return _NAME.fullmatch(name) is not None


def full_name(name: str) -> str:
    """Return the name with its tag in lower case, as models are compared: `X` is `x:latest`."""
    short = name.removeprefix("registry.ollama.ai/").removeprefix("library/")
    return (short if ":" in short.rpartition("/")[2] else f"{short}:latest").lower()


_UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_DURATION_PART = re.compile(r"(\d+\.?\d*|\.\d+)([^\d.]*)")


def duration_ns(value: Any) -> int:
    """Read a keep_alive: a number of seconds or a Go duration such as `1h30m`; negative means for ever.

    Raises:
        Refused: 400 with Go's message.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        kind = {"bool": "bool", "list": "[]interface {}", "dict": "map[string]interface {}"}[type(value).__name__]
        raise Refused(400, f"Unsupported type: '{kind}'")
    if not isinstance(value, str):
        return FOREVER_NS if value < 0 else min(int(value * 1_000_000_000), FOREVER_NS)
    text, negative = value[1:] if value[:1] in "+-" else value, value.startswith("-")
    if text == "0":
        return 0
    quoted = json.dumps(value, ensure_ascii=False)
    total, position = 0.0, 0
    while match := _DURATION_PART.match(text, position):
        number, unit = match.groups()
        if not unit:
            raise Refused(400, f"time: missing unit in duration {quoted}")
        if unit not in _UNITS:
            raise Refused(400, f'time: unknown unit "{unit}" in duration {quoted}')
        total += float(number) * _UNITS[unit]
        position = match.end()
    if not text or position != len(text):
        raise Refused(400, f"time: invalid duration {quoted}")
    return FOREVER_NS if negative and total else min(int(total), FOREVER_NS)


def _check(value: Any, kind: str, where: str, go_type: str) -> None:
    right = {
        _STRING: isinstance(value, str),
        _BOOLEAN: isinstance(value, bool),
        _NUMBER: isinstance(value, int) and not isinstance(value, bool),
        _LIST: isinstance(value, list),
        _OBJECT: isinstance(value, dict),
    }[kind]
    if not right:
        shown = f"number {value}" if kind == _NUMBER and isinstance(value, float) else _kind(value)
        raise Refused(400, f"json: cannot unmarshal {shown} into Go struct field {where} of type {go_type}")


def _check_message(message: Any) -> None:
    if not isinstance(message, dict):
        raise Refused(
            400, f"json: cannot unmarshal {_kind(message)} into Go struct field ChatRequest.messages of type api.Alias"
        )
    for name in ("role", "content", "thinking", "tool_name", "tool_call_id"):
        if message.get(name) is not None:
            _check(message[name], _STRING, f"Alias.{name}", "string")
    for name, go_type in (("tool_calls", "[]api.ToolCall"), ("images", "[]api.ImageData")):
        if message.get(name) is not None:
            _check(message[name], _LIST, f"Alias.{name}", go_type)


def _check_think(value: Any) -> None:
    levels = '"high", "medium", "low", "max", true, or false'
    if isinstance(value, bool):
        return
    if not isinstance(value, str):
        raise Refused(400, f"think must be a boolean or string ({levels})")
    if value not in ("high", "medium", "low", "max"):
        raise Refused(400, f"invalid think value: {json.dumps(value)} (must be {levels})")


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, str):
        return "string"
    return "object" if isinstance(value, dict) else "array" if isinstance(value, list) else "number"
