"""Turn Ollama's answers into LangChain's messages."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk, ToolCall
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_ollama.chat_models import _get_tool_calls_from_response

from langchain_aegis.errors import AegisServerError

# Ollama leaves a zero out.
_COUNTS = (
    "total_duration",
    "load_duration",
    "prompt_eval_count",
    "prompt_eval_duration",
    "eval_count",
    "eval_duration",
)


def read_result(part: Mapping[str, Any], *, reasoning: bool | str | None) -> ChatResult:
    """Return the message of a whole answer.

    Args:
        part: The answer, with `done: true`.
        reasoning: The request's `think`; without it what the model thought is dropped.

    Raises:
        AegisServerError: A tool call is not what Ollama sends.
    """
    content, extra, calls = _contents(part, reasoning)
    message = AIMessage(content=content, additional_kwargs=extra, tool_calls=calls, usage_metadata=_usage(part))
    return ChatResult(generations=[ChatGeneration(message=message, generation_info=_metadata(part))])


def read_chunk(part: Mapping[str, Any], *, reasoning: bool | str | None) -> ChatGenerationChunk:
    """Return the message chunk of one part of a streamed answer; see `read_result`."""
    content, extra, calls = _contents(part, reasoning)
    if not part.get("done"):
        logprobs = part.get("logprobs")
        info = {"logprobs": logprobs} if logprobs is not None else None
        if not calls:
            return _piece(content, extra, info)
        message = AIMessageChunk(content=content, additional_kwargs=extra, tool_calls=calls)
        return ChatGenerationChunk(message=message, generation_info=info)
    message = AIMessageChunk(
        content=content,
        additional_kwargs=extra,
        tool_calls=calls,
        usage_metadata=_usage(part),
        chunk_position="last",
    )
    return ChatGenerationChunk(message=message, generation_info=_metadata(part))


class Whole:
    """The parts of a streamed answer put together, as it would have come without streaming."""

    def __init__(self) -> None:
        self._last: Mapping[str, Any] | None = None
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[Any] = []
        self._logprobs: list[Any] = []

    def add(self, part: Mapping[str, Any]) -> None:
        """Take the next part."""
        message = part["message"]
        self._texts.append(message.get("content") or "")
        self._thoughts.append(message.get("thinking") or "")
        self._calls += message.get("tool_calls") or []
        self._logprobs += part.get("logprobs") or []
        if part.get("done"):
            self._last = part

    def part(self) -> dict[str, Any] | None:
        """Return the whole answer, or None if its end has not come."""
        if self._last is None:
            return None
        message = {"content": "".join(self._texts), "thinking": "".join(self._thoughts), "tool_calls": self._calls}
        logprobs = {"logprobs": self._logprobs} if self._logprobs else {}
        return {**self._last, "message": message, **logprobs}


def _piece(text: str, extra: dict[str, Any], info: dict[str, Any] | None) -> ChatGenerationChunk:
    """Return the chunk of a part that holds text only, made for each token: a copy of an empty one.

    LangChain has checked that one; to have it check every text, which the client has done, costs three times as much.
    """
    message = copy(_EMPTY_MESSAGE)
    values = message.__dict__
    for name, container in _CONTAINERS:
        values[name] = container()
    values["content"] = text
    if extra:
        values["additional_kwargs"] = extra
        message.model_fields_set.add("additional_kwargs")
    chunk = copy(_EMPTY_CHUNK)
    chunk.__dict__.update(message=message, text=message.text)
    if info is not None:
        chunk.generation_info = info
    return chunk


_EMPTY_MESSAGE = AIMessageChunk(content="")
_EMPTY_CHUNK = ChatGenerationChunk(message=_EMPTY_MESSAGE)
# Fields that no two messages may share.
_CONTAINERS = [(name, type(value)) for name, value in vars(_EMPTY_MESSAGE).items() if isinstance(value, (list, dict))]


def _contents(part: Mapping[str, Any], reasoning: bool | str | None) -> tuple[str, dict[str, Any], list[ToolCall]]:
    message = part["message"]
    thought = message.get("thinking") if reasoning else None
    extra = {"reasoning_content": thought} if thought else {}
    calls: list[ToolCall] = []
    if raw := message.get("tool_calls"):
        try:
            calls = _get_tool_calls_from_response(part)
            for call, sent in zip(calls, raw, strict=True):
                if isinstance(sent.get("id"), str) and sent["id"]:
                    call["id"] = sent["id"]  # upstream makes up an id even where the server sent one
        except (KeyError, TypeError, AttributeError, ValueError) as exc:
            raise AegisServerError(f"the server sent a tool call that cannot be read: {str(raw)[:500]}") from exc
    return message.get("content") or "", extra, calls


def _usage(part: Mapping[str, Any]) -> UsageMetadata:
    used, made = (n if type(n := part.get(name)) is int else 0 for name in ("prompt_eval_count", "eval_count"))
    return UsageMetadata(input_tokens=used, output_tokens=made, total_tokens=used + made)


def _metadata(part: Mapping[str, Any]) -> dict[str, Any]:
    info = {**dict.fromkeys(_COUNTS, 0), **{name: value for name, value in part.items() if name != "message"}}
    return {**info, "model_name": part.get("model"), "model_provider": "ollama"}
