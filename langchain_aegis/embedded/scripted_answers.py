"""What the scripted model says: a pure function of what it was asked."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from langchain_aegis.embedded.scripted_schema import STOP_WORDS, Filler, keys_named, salient
from langchain_aegis.embedded.wire_engine import Generation, Message

_VOCABULARY = re.findall(
    r"\w+",
    """
    amber anchor autumn basket beacon bridge candle canyon cedar circle clover copper coral cotton desert ember
    engine falcon feather forest garden ginger glacier granite harbor hazel horizon island ivory jasmine kettle
    lantern lemon linen lunar maple marble meadow mirror mountain nickel ocean olive orchard paper pebble pepper
    pillow planet pocket prairie quartz rabbit raven ribbon river saddle saffron silver spruce summit thunder timber
    tunnel valley velvet village violet walnut willow window winter yarrow
    """,
)
_TOKEN = re.compile(r"\s*\w{1,8}|\s*[^\w\s]|\s+")
_PARTS = re.compile(r"[A-Z]?[a-zäöüß]+|[A-Z]+(?![a-z])|\d+")
_QUOTE_CHARS = 4_000


def tokens(text: str) -> list[str]:
    """Split a text into tokens; joined, they are the text."""
    return _TOKEN.findall(text)


def rendered(request: Generation, messages: Sequence[Message] | None = None) -> str:
    """Return the prompt that a chat template would make of the request."""
    messages = request.messages if messages is None else messages
    if request.raw:
        return str(messages[-1]["content"])
    parts = [f"<|before|>\n{request.before}\n"] if request.before else []
    parts += [f"<|tools|>\n{json.dumps(request.tools, ensure_ascii=False)}\n"] if request.tools else []
    for message in messages:
        calls = message.get("tool_calls")
        said = message["content"] + (json.dumps(calls, ensure_ascii=False, sort_keys=True) if calls else "")
        parts.append(f"<|{message['role']}|>\n{said}\n")
    return "".join(parts) + "<|assistant|>\n"


def seed_of(prompt: str, request: Generation, draw: str) -> str:
    """Return what the answer's free parts depend on: the prompt, the options that change an answer, and `draw`."""
    options = {name: request.options.get(name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
    said = [request.model.name, prompt, options, request.format, request.suffix, request.think, draw]
    return hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def tool_call(request: Generation, seed: str) -> dict[str, Any] | None:
    """Return the call of the tool that fits the last message best, or None if the user did not speak last."""
    last = request.messages[-1]
    if not request.tools or last["role"] != "user":
        return None
    text = last["content"]
    asked = _word_set(text)

    def fit(tool: Mapping[str, Any]) -> tuple[bool, int]:
        function = tool.get("function", {})
        name = str(function.get("name", ""))
        exact = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None
        return exact, len(asked & _word_set(f"{name} {function.get('description') or ''}"))

    best = max(request.tools, key=fit).get("function", {})  # of equals the first
    arguments = Filler(text, seed).arguments(best.get("parameters") or {})
    return {"name": str(best.get("name", "")), "arguments": arguments}


def answer(request: Generation, seed: str, words: int) -> str:
    """Return the answer's text.

    It quotes the words of the last message, or the tools' results in full, so that a reader can tell which prompt it
    answers; then follow about `words` words drawn from a list. With a format it is JSON.
    """
    text = str(request.messages[-1]["content"])
    if isinstance(request.format, Mapping):
        return json.dumps(Filler(text, seed).value(request.format), ensure_ascii=False)
    if request.format == "json":
        names = keys_named(text) or ["answer"]
        filler = Filler(text, seed)
        return json.dumps({name: _sentence(salient(text), f"{seed}/{name}", 6) for name in names} if names != ["answer"]
                          else {"answer": filler.value({"type": "string"})}, ensure_ascii=False)  # fmt: skip
    results = _tool_results(request.messages)
    if results:
        return "\n".join(results)
    return _sentence(salient(text), seed, words)


def thought(request: Generation, seed: str) -> str:
    """Return what the model thinks before it answers."""
    return "Let me think. " + _sentence(salient(str(request.messages[-1]["content"]), 4), f"{seed}/thought", 6)


def embed(text: str, dimensions: int) -> list[float]:
    """Return the L2-normalised vector of a bag of words: texts that share words are near each other.

    Args:
        text: Any text. Case and punctuation do not matter, stop words hardly.
        dimensions: Length of the vector.
    """
    vector = [0.0] * dimensions
    for word in re.findall(r"\w+", text.lower()) or [""]:
        weight = 0.2 if word in STOP_WORDS else 1.0
        for place, sign in enumerate(_signs(word, dimensions)):
            vector[place] += weight * sign
    norm = math.sqrt(sum(value * value for value in vector))
    if not norm:  # words that cancel each other exactly
        return [1.0] + [0.0] * (dimensions - 1)
    return [value / norm for value in vector]


@lru_cache(maxsize=2048)
def _signs(word: str, dimensions: int) -> tuple[int, ...]:
    """Return the word's own direction: vectors of different words are nearly at right angles."""
    bits = int.from_bytes(hashlib.shake_128(word.encode()).digest((dimensions + 7) // 8), "big")
    return tuple(1 if bits >> place & 1 else -1 for place in range(dimensions))


def _sentence(about: Sequence[str], seed: str, words: int) -> str:
    drawn = [_VOCABULARY[_number(f"{seed}/{place}") % len(_VOCABULARY)] for place in range(words)]
    return f"About {' '.join(about) or 'nothing'}: {' '.join(drawn)}."


def _tool_results(messages: Sequence[Message]) -> list[str]:
    results: list[str] = []
    for message in reversed(messages):
        if message["role"] != "tool":
            break
        name = message.get("tool_name") or "the tool"
        results.append(f"The result of {name} is: {str(message['content'])[:_QUOTE_CHARS]}")
    return results[::-1]


def _word_set(text: str) -> set[str]:
    return {part.lower() for part in _PARTS.findall(text)} - STOP_WORDS


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
