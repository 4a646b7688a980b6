"""What Ollama does with a prompt that is longer than the window."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from langchain_aegis.embedded.wire_engine import EngineError, Message

_TOO_LONG = (
    "the prompt is longer than the context length currently available to the model; shorten the prompt, adjust the "
    "context length in settings, or use a model with a longer context length"
)


def shorter(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield the conversation without its oldest messages, one more left out each time; the last one always stays.

    System messages stay too.
    """
    for start in range(1, len(messages)):
        yield [*(message for message in messages[:start] if message["role"] == "system"), *messages[start:]]


def kept(tokens: int, window: int, num_keep: int, *, shift: bool) -> tuple[int, int]:
    """Return how many tokens of a prompt stay at its start and at its end: about half of the window in all.

    Args:
        tokens: Of the prompt; at least `window`.
        num_keep: The option; so many stay at the start.
        shift: The request's field; without it nothing is cut.

    Raises:
        EngineError: 400, if nothing may be cut.
    """
    if not shift:
        raise EngineError(400, _TOO_LONG)
    first = min(num_keep if num_keep >= 0 else tokens, window - 1)
    return first, window - max((window - first) // 2, 1) - first


def overflow(tokens: int, window: int) -> EngineError:
    """Return the refusal of a prompt that must not be cut: llama.cpp's answer, JSON inside a JSON string."""
    message = f"request ({tokens} tokens) exceeds the available context size ({window} tokens), try increasing it"
    kind = "exceed_context_size_error"
    error = {"code": 400, "message": message, "type": kind, "n_prompt_tokens": tokens, "n_ctx": window}
    return EngineError(400, json.dumps({"error": error}, separators=(",", ":")))
