"""Read the prompt string that LangChain hands to a cache as canonical messages.

Canonical means: what the model sees, and nothing that differs between two runs of the same conversation. Ids, usage,
response metadata and timings are dropped, tool-call ids are renumbered; text is never changed.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

import orjson

# What langchain-core's `dumps` starts a list of messages with. Any other prompt is one human message.
_MESSAGES_PREFIX = '[{"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", '

# Copies of fields that stand elsewhere in the message, with ids that differ between runs.
_DROPPED_KWARGS = frozenset({"tool_calls"})
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_SURROGATE = b"\\ud"  # as `json` writes a lone one, and others beside it
_INERT_BLOCKS = frozenset({"text", "tool_call", "tool_use", "reasoning", "thinking"})


@dataclass(slots=True)
class Message:
    """One message as the model sees it.

    Attributes:
        role: "system", "human", "ai", "tool", "function", or the role of a ChatMessage.
        content: Text, or a list of content blocks.
        rest: Everything else that the model sees, as canonical JSON.
    """

    role: str
    content: str | list[Any]
    rest: bytes

    @property
    def text(self) -> str | None:
        """The content if it is one text, else None."""
        if isinstance(self.content, str):
            return self.content
        if len(self.content) == 1 and isinstance(block := self.content[0], dict) and block.keys() == {"type", "text"}:
            return block["text"] if block["type"] == "text" and isinstance(block["text"], str) else None
        return None

    @property
    def has_media(self) -> bool:
        """Whether the content holds anything but text and tool calls: an image, a file, audio."""
        return not isinstance(self.content, str) and any(
            not isinstance(block, str) and not (isinstance(block, dict) and block.get("type") in _INERT_BLOCKS)
            for block in self.content
        )


def parse_prompt(prompt: str) -> tuple[Message, ...] | None:
    """Return the messages in `prompt`, or None if it holds something that cannot be read reliably.

    Args:
        prompt: `dumps` of a list of messages, or any other text, which counts as one human message.
    """
    if not prompt.startswith(_MESSAGES_PREFIX):
        return (Message("human", prompt, b"{}"),)
    try:
        raw = loads(prompt)
        numbers: dict[str, str] = {}
        return tuple(_message(item, numbers) for item in raw)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def loads(data: str | bytes) -> Any:
    """Parse JSON exactly. Raises ValueError or RecursionError.

    Lone surrogates, which orjson refuses, and whole numbers beyond 64 bits, of which it makes floats, are read by the
    standard library.
    """
    raw = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    if not _has_long_number(raw):
        with contextlib.suppress(orjson.JSONDecodeError):
            return orjson.loads(raw)
    return json.loads(raw.decode("utf-8", "surrogatepass"))


def is_simple(data: bytes) -> bool:
    """Return whether orjson alone reads what `dumps` wrote exactly."""
    return not _has_long_number(data) and _SURROGATE not in data


def _has_long_number(data: bytes) -> bool:
    return b"0" * 19 in data.translate(_DIGITS)  # a pattern for 19 digits takes ten times as long


def dumps(value: Any, *, sort: bool = True) -> bytes:
    """Write JSON, sorted by key unless told otherwise: the same bytes for equal values.

    Raises:
        TypeError, ValueError: The value is not JSON.
    """
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS if sort else None)
    except TypeError:  # lone surrogates, whole numbers beyond 64 bits; or really no JSON, then this raises too
        return json.dumps(value, sort_keys=sort, separators=(",", ":")).encode()


_KINDS_OF_CHUNKS = {
    "AIMessageChunk": "ai", "HumanMessageChunk": "human", "SystemMessageChunk": "system", "ToolMessageChunk": "tool",
    "FunctionMessageChunk": "function", "ChatMessageChunk": "chat",
}  # fmt: skip


def _message(item: dict[str, Any], numbers: dict[str, str]) -> Message:
    if item["lc"] != 1 or item["type"] != "constructor" or item["id"][:3] != ["langchain", "schema", "messages"]:
        raise ValueError("not a message")
    kwargs = item["kwargs"]
    kind = _KINDS_OF_CHUNKS.get(kwargs["type"], kwargs["type"])  # a stream that was put together is a message
    role = kwargs.get("role") or kind
    content = kwargs["content"]
    if not isinstance(content, str):
        content = [_block(block, numbers) for block in content]
    rest: dict[str, Any] = {"type": kind}
    if kwargs.get("name") is not None:
        rest["name"] = kwargs["name"]
    for field in ("tool_calls", "invalid_tool_calls"):
        if calls := kwargs.get(field):
            rest[field] = [[c["name"], c["args"], _number(c.get("id"), numbers)] for c in calls]
    if kwargs.get("tool_call_id") is not None:
        rest["answers"] = _number(kwargs["tool_call_id"], numbers)
        rest["status"] = kwargs.get("status", "success")
    if extra := {k: v for k, v in kwargs.get("additional_kwargs", {}).items() if k not in _DROPPED_KWARGS}:
        rest["extra"] = extra
    return Message(str(role), content, dumps(rest))


def _block(block: Any, numbers: dict[str, str]) -> Any:
    if isinstance(block, dict) and block.get("type") in ("tool_call", "tool_use"):
        return {**block, "id": _number(block.get("id"), numbers)}
    return block


def _number(call_id: Any, numbers: dict[str, str]) -> str | None:
    return None if call_id is None else numbers.setdefault(str(call_id), f"call-{len(numbers) + 1}")
