"""The objects of a generated answer, field by field in Ollama's order."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from langchain_aegis.embedded.wire_engine import End, Piece
from langchain_aegis.embedded.wire_json import timestamp, without_zeros

_ID_LETTERS = string.ascii_lowercase + string.digits


@dataclass(frozen=True)
class Clock:
    """Nanoseconds that a request has taken: until the model was loaded, and in all."""

    load_ns: int
    total_ns: int


def idle(path: str, model: str, reason: str) -> dict[str, Any]:
    """Return the answer to a request that generates nothing: it only loads or unloads the model."""
    text = {"response": ""} if path == "/api/generate" else {"message": {"role": "assistant", "content": ""}}
    return {"model": model, "created_at": timestamp(), **text, "done": True, "done_reason": reason}


def piece(path: str, model: str, part: Piece) -> dict[str, Any]:
    """Return one line of a stream, not the last."""
    return _Collected(path, model).add(part).partial()


def end(path: str, model: str, last: End, clock: Clock) -> dict[str, Any]:
    """Return the last line of a stream."""
    return _Collected(path, model).complete(last, clock)


class Whole:
    """Collects the pieces of an answer that is sent as one object."""

    def __init__(self, path: str, model: str) -> None:
        self._collected = _Collected(path, model)

    def add(self, part: Piece) -> None:
        """Append one piece."""
        self._collected.add(part)

    def complete(self, last: End, clock: Clock) -> dict[str, Any]:
        """Return the answer."""
        return self._collected.complete(last, clock)


@dataclass
class _Collected:
    path: str
    model: str
    content: str = ""
    thinking: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[Mapping[str, Any]] = field(default_factory=list)

    def add(self, part: Piece) -> _Collected:
        self.content += part.content
        self.thinking += part.thinking
        self.logprobs.extend(part.logprobs)
        for call in part.tool_calls:
            function = {"index": len(self.tool_calls), "name": call["name"], "arguments": call["arguments"]}
            name = "call_" + "".join(secrets.choice(_ID_LETTERS) for _ in range(8))
            self.tool_calls.append({"id": name, "function": function})
        return self

    def partial(self) -> dict[str, Any]:
        head: dict[str, Any] = {"model": self.model, "created_at": timestamp()}
        if self.path == "/api/generate":
            head |= {"response": self.content, **without_zeros({"thinking": self.thinking}), "done": False}
            return head | without_zeros({"logprobs": self.logprobs})
        message = {"role": "assistant", "content": self.content}
        message |= without_zeros({"thinking": self.thinking, "tool_calls": self.tool_calls})
        return head | {"message": message, "done": False} | without_zeros({"logprobs": self.logprobs})

    def complete(self, last: End, clock: Clock) -> dict[str, Any]:
        answer = self.partial()
        logprobs = without_zeros({"logprobs": answer.pop("logprobs", None)})
        metrics = without_zeros(
            {
                "total_duration": clock.total_ns,
                "load_duration": clock.load_ns,
                "prompt_eval_count": last.prompt_tokens,
                "prompt_eval_duration": last.prompt_ns,
                "eval_count": last.tokens,
                "eval_duration": last.tokens_ns,
            }
        )
        answer |= {"done": True, "done_reason": last.reason}
        if self.path == "/api/generate":
            return answer | without_zeros({"context": list(last.context)}) | metrics | logprobs
        return answer | logprobs | metrics
