"""What the Ollama wire asks of the engine behind it."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Message = dict[str, Any]  # role, content; perhaps thinking, images, tool_calls, tool_name, tool_call_id


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A model as /api/tags and /api/show describe it.

    Attributes:
        name: With its tag, for example `smollm2:135m`.
        capabilities: Among "completion", "tools", "thinking", "embedding", "insert", "vision".
        context_length: Tokens that the model was trained for.
        embedding_length: Dimensions of its vectors, or of its hidden layer.
        file_bytes: Size of the weights.
        modified_ns: Nanoseconds since 1970.
        digest: 64 hex digits; derived from the name when left empty.
    """

    name: str
    capabilities: tuple[str, ...] = ("completion",)
    context_length: int = 8192
    embedding_length: int = 576
    family: str = "llama"
    parameter_size: str = "134.52M"
    quantization: str = "Q4_1"
    file_bytes: int = 98_000_000
    modified_ns: int = 1_767_225_600_000_000_000
    digest: str = ""
    template: str = "{{ .Prompt }}"
    license: str = ""

    def __post_init__(self) -> None:
        """Fill in the digest."""
        if not self.digest:
            object.__setattr__(self, "digest", hashlib.sha256(self.name.encode()).hexdigest())


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One request for text.

    Attributes:
        messages: At least one; roles in lower case.
        format: None, "json" or a JSON schema.
        think: None when the model cannot think; else the request's value, True where it said nothing.
        options: Every option of Ollama with its default filled in; `num_ctx` is None where the request said nothing.
        truncate: Cut a prompt that does not fit, instead of refusing it.
        shift: Go on when the window is full, by forgetting its oldest part.
        suffix: Text that the answer shall lead to (/api/generate of a model with "insert").
        raw: The only message's content is the whole prompt; no template around it.
        before: Tokens of an earlier answer's `End.context`, which this prompt continues (/api/generate).
        context: `End.context` is wanted.
    """

    model: ModelCard
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    format: str | Mapping[str, Any] | None = None
    think: bool | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    truncate: bool = True
    shift: bool = True
    logprobs: bool = False
    top_logprobs: int = 0
    suffix: str = ""
    raw: bool = False
    before: tuple[int, ...] = ()
    context: bool = False


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of an answer, as it is generated."""

    content: str = ""
    thinking: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()  # {"name": ..., "arguments": {...}}
    logprobs: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class End:
    """The end of an answer.

    Attributes:
        reason: "stop" or "length".
        prompt_tokens: Of the whole prompt, cached ones included.
        prompt_ns: Time spent on the part of the prompt that was not cached.
        tokens: Generated, the end token included.
        context: Tokens of prompt and answer, if they were wanted.
    """

    reason: str
    prompt_tokens: int
    prompt_ns: int
    tokens: int
    tokens_ns: int
    context: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """One request for vectors of `texts`; see `Generation` for the options."""

    model: ModelCard
    texts: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """The answer to an `Embedding`: one L2-normalised vector per text, and the tokens of all texts."""

    vectors: Sequence[Sequence[float]]
    tokens: int


BUSY = "server busy, please try again.  maximum pending requests exceeded"


class EngineError(Exception):
    """The engine refuses or fails; status and message go to the client as Ollama would send them."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Engine(Protocol):
    """Generates text and vectors. All methods run in the event loop of the server; none may block it."""

    @property
    def cards(self) -> Sequence[ModelCard]:
        """The models, in the order in which they are listed."""

    def window(self, card: ModelCard, num_ctx: int | None) -> int:
        """Return the tokens that prompt and answer may have together when `num_ctx` was asked for."""

    async def load(self, card: ModelCard, runner: Mapping[str, Any]) -> None:
        """Make a model ready. Called when it is not loaded, or loaded with other runner options."""

    def generate(self, request: Generation) -> AsyncGenerator[Piece | End, None]:
        """Yield pieces, then one `End`. Closing the generator stops the generation and frees its slot.

        Raises:
            EngineError: Before the first piece: the request is refused. Later: the generation failed.
        """

    async def embed(self, request: Embedding) -> Vectors:
        """Return one vector per text.

        Raises:
            EngineError: A text is too long with `truncate=False`.
        """

    async def aclose(self) -> None:
        """Stop; idempotent."""
