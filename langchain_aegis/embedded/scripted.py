"""An engine that answers without a model: text, tool calls, JSON and vectors made from the request alone."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from langchain_aegis.embedded import scripted_answers as script
from langchain_aegis.embedded.scripted_caches import PromptCaches
from langchain_aegis.embedded.scripted_slots import AllSlots
from langchain_aegis.embedded.wire_engine import (
    Embedding,
    End,
    EngineError,
    Generation,
    ModelCard,
    Piece,
    Vectors,
)
from langchain_aegis.embedded.wire_window import kept, overflow, shorter

DEFAULT_WINDOW = 4096  # what Ollama gives on a machine without a large GPU
_HOST_TOKENS = 1_000_000  # that the host's prompt cache keeps of a model
_SILENT = Piece()
_OPEN_ENDED_WINDOWS = 10  # Ollama ends what is asked to go on for ever after ten windows


@dataclass(frozen=True, kw_only=True)
class ScriptedModel:
    """A model that the scripted engine lists.

    Args:
        name: `x` is listed as `x:latest`.
        embedding: It makes vectors and cannot chat.
        tools: It calls tools.
        thinking: It thinks before it answers, unless told not to.
        context_length: Tokens; a longer window is not given, whatever `num_ctx` says.
        dimensions: Of its vectors.
        file_bytes: Size of its weights; None: that of a small one.
        digest: What names this version of it, 64 hex digits; "": derived from the name.
    """

    name: str
    file_bytes: int | None = None
    embedding: bool = False
    tools: bool = True
    thinking: bool = False
    context_length: int = 32_768
    dimensions: int = 384
    digest: str = ""

    @classmethod
    def named(cls, name: str) -> ScriptedModel:
        """Return a chat model, or an embedding model where the name says so (`embed`, `minilm`, `bge`)."""
        return cls(name=name, embedding=any(part in name.lower() for part in ("embed", "minilm", "bge")))

    def card(self) -> ModelCard:
        """Return what /api/tags tells about it."""
        name = self.name if ":" in self.name.rpartition("/")[2] else f"{self.name}:latest"
        if self.embedding:
            return ModelCard(
                name=name, capabilities=("embedding",), context_length=min(self.context_length, 8192), family="bert",
                embedding_length=self.dimensions, parameter_size="22.57M", quantization="F16",
                file_bytes=self.file_bytes or 45_960_996, digest=self.digest,
            )  # fmt: skip
        able = ("completion", *(["tools"] if self.tools else []), *(["thinking"] if self.thinking else []))
        return ModelCard(
            name=name, capabilities=able, context_length=self.context_length, embedding_length=self.dimensions,
            file_bytes=self.file_bytes or 98_000_000, digest=self.digest,
        )  # fmt: skip


DEFAULT_MODELS = (ScriptedModel(name="scripted:latest"), ScriptedModel(name="scripted-embed:latest", embedding=True))


@dataclass
class Counters:
    """What the engine did.

    Attributes:
        max_running: Most requests that had a slot at the same time.
        generations: Answers begun.
        prefilled_tokens: Prompt tokens that were evaluated.
        cached_tokens: Prompt tokens that need not be, because a slot or the host's cache knew them.
        generated_tokens: Tokens sent, also of answers that nobody waited for.
        pulled_bytes: Bytes of models that were downloaded.
        texts_embedded: Over all requests for vectors.
        requests_embedded: Requests for vectors.
        loads: Models loaded, because they were not, or with other options.
        reloads: Those of them that were loaded with other options before.
    """

    max_running: int = 0
    generations: int = 0
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    texts_embedded: int = 0
    requests_embedded: int = 0
    loads: int = 0
    reloads: int = 0
    pulled_bytes: int = 0


class ScriptedEngine:
    """Deterministic answers, with the slots, windows and speed of a real server.

    At temperature 0, or with a seed, the same request always has the same answer. Otherwise a number that grows with
    every request decides what the prompt leaves open, as sampling would.

    Args:
        models: What is listed.
        slots: Generations of each model at the same time; more wait in the order in which they came. Embedding models
            have one slot.
        max_waiting: More waiting requests than that are refused with 503; None: any number may wait.
        tokens_per_s: Speed of each generation; 0: no delay at all.
        prefill_tokens_per_s: Speed of reading what neither a slot nor the host's cache knows; 0: no delay.
        load_s: Seconds to load a model.
        request_s: Seconds that each request costs beside all this, in its slot.
        host_cache: Whether what a slot gives up is kept in the host's memory (llama-server's `--cache-ram`).
        knows_truncate: Whether a request can forbid that its prompt is cut.
        words: Length of an answer, about.
        changed: Called whenever a number changes that a test may wait for.
    """

    def __init__(
        self,
        models: Sequence[ScriptedModel] = DEFAULT_MODELS,
        *,
        slots: int = 4,
        max_waiting: int | None = None,
        tokens_per_s: float = 0.0,
        prefill_tokens_per_s: float = 0.0,
        load_s: float = 0.0,
        request_s: float = 0.0,
        host_cache: bool = True,
        knows_truncate: bool = True,
        words: int = 16,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._models = {model.card().name: model for model in models}
        self._cards = tuple(model.card() for model in models)
        self._token_s = 1 / tokens_per_s if tokens_per_s else 0.0
        self._prefill_s = 1 / prefill_tokens_per_s if prefill_tokens_per_s else 0.0
        self._load_s = load_s
        self._request_s = request_s
        self._host_tokens = _HOST_TOKENS if host_cache else 0
        self._knows_truncate = knows_truncate
        self._words = words
        self._changed = changed
        self._draws = itertools.count(1)
        self._runners: dict[str, Mapping[str, Any]] = {}
        self._caches: dict[str, PromptCaches] = {}
        self.counters = Counters()
        self.slots = AllSlots(slots, max_waiting, self._slots_changed)

    @property
    def cards(self) -> Sequence[ModelCard]:
        """The models."""
        return self._cards

    def add(self, model: ScriptedModel) -> None:
        """List one more model, or another version of one."""
        card = replace(model.card(), modified_ns=time.time_ns())
        self._models[card.name] = model
        self._cards = (*(each for each in self._cards if each.name != card.name), card)

    def window(self, card: ModelCard, num_ctx: int | None) -> int:
        """Return `num_ctx`, or the default, within what the model can."""
        return min(max(num_ctx, 4) if num_ctx else DEFAULT_WINDOW, card.context_length)

    async def load(self, card: ModelCard, runner: Mapping[str, Any]) -> None:
        """Take as long as was asked for; what the model's slots knew is gone."""
        self.counters.loads += 1
        self.counters.reloads += self._runners.get(card.name, runner) != runner
        self._runners[card.name] = runner
        self._caches[card.name] = PromptCaches(self.slots.count, self._host_tokens)
        if self._load_s:
            await asyncio.sleep(self._load_s)

    async def generate(self, request: Generation) -> AsyncGenerator[Piece | End, None]:
        """Yield the answer token by token."""
        async with self.slots.of(request.model).one():
            started = time.perf_counter_ns()
            self.counters.generations += 1
            window = self.window(request.model, request.options.get("num_ctx"))
            prompt = self._prompt(request, window)
            caches = self._caches.setdefault(request.model.name, PromptCaches(self.slots.count, self._host_tokens))
            known = caches.take(prompt)
            text: list[str] = []
            try:
                await self._read(len(prompt), known)
                text = list(prompt)
                read = time.perf_counter_ns()
                parts = self._parts(request, "".join(prompt))
                limit = _limit(request, len(prompt), window)
                told = 0
                for part in itertools.islice(parts, limit):
                    told += 1
                    self.counters.generated_tokens += 1
                    await asyncio.sleep(self._token_s)  # also without a delay: other requests run in between
                    if part != _SILENT:
                        text.append(part.content)
                        yield part
                finished = next(parts, None) is None
            finally:
                caches.give(text)
            yield End(
                reason="stop" if finished else "length",
                prompt_tokens=len(prompt),
                prompt_ns=max(read - started, 1),
                tokens=told + (1 if finished else 0),  # the token that ends an answer counts
                tokens_ns=max(time.perf_counter_ns() - read, 1),
                context=tuple(_token_id(token) for token in prompt) if request.context else (),
            )

    async def embed(self, request: Embedding) -> Vectors:
        """Return bags of words as vectors."""
        model = self._models[request.model.name]
        window = self.window(request.model, request.options.get("num_ctx"))
        read: list[list[str]] = []
        for text in request.texts:
            tokens = script.tokens(text)
            if len(tokens) > window - 2 and not request.truncate:
                raise EngineError(400, "the input length exceeds the context length")
            read.append(tokens[: window - 2])
        async with self.slots.of(request.model).one():
            self.counters.requests_embedded += 1
            self.counters.texts_embedded += len(read)
            await asyncio.sleep(self._request_s + self._prefill_s * sum(map(len, read)))
            vectors = [script.embed("".join(tokens), model.dimensions) for tokens in read]
        return Vectors(vectors=vectors, tokens=sum(len(tokens) + 2 for tokens in read))

    async def aclose(self) -> None:
        """Nothing to stop."""

    def _prompt(self, request: Generation, window: int) -> list[str]:
        """Return the prompt's tokens, cut as Ollama cuts them.

        First the oldest messages go, then the middle of what is left.
        """
        tokens = script.tokens(script.rendered(request))
        if not request.truncate and self._knows_truncate:
            if len(tokens) >= window:
                raise overflow(len(tokens), window)
            return tokens
        if len(tokens) > window and not request.raw:
            for messages in shorter(request.messages):
                tokens = script.tokens(script.rendered(request, messages))
                if len(tokens) <= window:
                    break
        if len(tokens) < window:
            return tokens
        first, last = kept(len(tokens), window, request.options.get("num_keep", 4), shift=request.shift)
        return [*tokens[:first], *tokens[len(tokens) - last :]]

    async def _read(self, tokens: int, known: int) -> None:
        new = max(tokens - known, 1)  # the last token is always evaluated
        self.counters.prefilled_tokens += new
        self.counters.cached_tokens += tokens - new
        await asyncio.sleep(self._request_s + self._prefill_s * new)

    def _parts(self, request: Generation, prompt: str) -> Iterator[Piece]:
        random = request.options.get("temperature", 0.8) > 0 and request.options.get("seed", -1) < 0
        seed = script.seed_of(prompt, request, str(next(self._draws)) if random else "")
        if request.think:
            for token in script.tokens(script.thought(request, seed)):
                yield Piece(thinking=token, logprobs=_logprobs(request, token))
        if call := script.tool_call(request, seed):
            # A call is generated token by token like text, but sent when it is complete.
            yield from [_SILENT] * (len(script.tokens(json.dumps(call, ensure_ascii=False))) - 1)
            yield Piece(tool_calls=(call,))
            return
        text = _until_stop(script.answer(request, seed, self._words), request.options.get("stop", ()))
        for token in script.tokens(text):
            yield Piece(content=token, logprobs=_logprobs(request, token))

    def _slots_changed(self) -> None:
        self.counters.max_running = max(self.counters.max_running, self.slots.running)
        self._changed()


def _limit(request: Generation, prompt_tokens: int, window: int) -> int:
    asked = request.options.get("num_predict", -1)
    limit = _OPEN_ENDED_WINDOWS * window
    limit = limit if asked < 0 else min(asked, limit)
    return limit if request.shift else min(limit, window - prompt_tokens)


def _until_stop(text: str, stops: Sequence[str]) -> str:
    ends = [found for stop in stops if stop and (found := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def _logprobs(request: Generation, token: str) -> tuple[dict[str, Any], ...]:
    if not request.logprobs:
        return ()
    best = -0.1 * (1 + _token_id(token) % 9)
    ranked = [token, *(f"{token}{rank}" for rank in range(1, request.top_logprobs))]
    likely = [{"token": t, "logprob": best - rank, "bytes": list(t.encode())} for rank, t in enumerate(ranked)]
    return ({**likely[0], **({"top_logprobs": likely} if request.top_logprobs else {})},)


def _token_id(token: str) -> int:
    return int.from_bytes(token.encode()[:3], "big") % 49_152
