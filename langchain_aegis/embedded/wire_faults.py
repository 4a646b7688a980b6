"""Ways in which a server can fail, for tests of those who call it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

FaultKind = Literal["status", "cut", "no_done", "hang", "error", "malformed", "slow"]
KINDS: tuple[FaultKind, ...] = ("status", "cut", "no_done", "hang", "error", "malformed", "slow")

_STATUS_TEXT = {
    404: "model 'scripted' not found",
    429: "too many requests",
    500: "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error, "
    "check ollama server logs for details",
    502: "bad gateway",
    503: "server busy, please try again.  maximum pending requests exceeded",
    504: "gateway timeout",
}
RUNNER_DIED = "an error was encountered while running the model: unexpected EOF"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """How one request goes wrong.

    Attributes:
        kind: "status": an error answer. "cut": the connection is closed in mid-answer. "no_done": the answer ends
            properly but its last line is missing. "hang": nothing more is sent, until the client leaves. "error": an
            error line in mid-stream, after HTTP 200 (without streaming: status 500). "malformed": one line is not
            JSON. "slow": `delay_s` before every line.
        after: Lines of a stream that are sent before it goes wrong.
        status: Of the error answer.
        message: Text of the error answer or line; Ollama's own when left empty.
        headers: Of the error answer, for example `{"Retry-After": "2"}`.
        delay_s: Seconds, for "slow".
    """

    kind: FaultKind
    after: int = 0
    status: int = 500
    message: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what would never happen."""
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")

    @property
    def text(self) -> str:
        """The message, or the one that Ollama gives."""
        if self.message:
            return self.message
        return RUNNER_DIED if self.kind == "error" else _STATUS_TEXT.get(self.status, f"status {self.status}")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A request as the server saw it.

    Attributes:
        path: For example "/api/chat".
        headers: Names in lower case.
        body: The parsed body, or None if there was none or it was no JSON object.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any] | None

    @property
    def text(self) -> str:
        """What was asked: the last message's content, the prompt, or the texts to embed."""
        body = self.body or {}
        messages = body.get("messages")
        if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
            return str(messages[-1].get("content") or "")
        texts = body.get("prompt", body.get("input", ""))
        return "\n".join(map(str, texts)) if isinstance(texts, list) else str(texts)


class Witness(Protocol):
    """Sees every request, and may let it fail."""

    def arrived(self, seen: Seen) -> Fault | None:
        """Take note of a request; a fault makes it fail."""

    def left(self, seen: Seen) -> None:
        """The client went away before its answer was complete."""
