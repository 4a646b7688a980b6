"""What a soak runs on: models that name whom they answer, an embedder that fails when told, and the servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from langchain_core.embeddings import Embeddings
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import ConfigDict

from faults.proxy import Proxy
from faults.redis_process import RedisProcess
from faults.soak_history import History
from faults.tenants import THINGS, TIERS, Caller, Words
from langchain_aegis import AegisEmbeddings, AegisSemanticCache, BatchingChatModel, ChatAegis
from langchain_aegis.embedded.wire_engine import Piece
from langchain_aegis.scope import current
from langchain_aegis.testing import ScriptedModel, ScriptedOllama

TTL_S = 90
MODEL_S = 0.004  # of a model that is none
PIECE = 20  # characters of its answers
OLLAMA_S = 5.0  # that an answer of the scripted server may take
MOST_AT_ONCE, MOST_WAITING = 4, 60  # of the model behind bounds
PIPELINE, BOUNDED, SCRIPTED = "pipeline", "bounded", "scripted"
CALLERS = tuple(
    Caller(tenant, user, task)
    for tenant, user, task in (
        ("acme", None, None), ("acme", "bob", None), ("acme", "Bob", "chat"), ("Acme", "bob", None),
        ("acme ", None, "chat"), ("acme,globex", "bob", "chat"), ("globex", None, None), ("globex", "acme", None),
    )
)  # fmt: skip
DOCUMENTS = 5
_DOCUMENT = {thing: f"document {place % DOCUMENTS}" for place, thing in enumerate(THINGS)}
_FRAMES = [(tier.name, *form("\0").split("\0")) for tier in TIERS for form in (tier.stored, tier.asked)]


def about(question: str) -> str:
    """Return the same for questions that one answer serves; a number behind one makes it another question."""
    question, mark, number = question.partition("? ")
    if mark:
        return f"{about(question + '?')} {number}"
    for name, before, after in _FRAMES:
        if question.startswith(before) and question.endswith(after):
            return f"{name} {question[len(before) : len(question) - len(after)]}"
    return question


def source_of(subject: str) -> str:
    """Return the document that the answer to a question rests on."""
    return _DOCUMENT.get(subject.rpartition(" ")[2], "document 0")


class Talking(BaseChatModel):
    """A model that is asked without a wire; its answers name whom `aegis_scope` told it that it answers."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: str
    history: History

    @property
    def _llm_type(self):
        return "talking"

    @property
    def _identifying_params(self):
        return {"model": self.name}

    def _text(self, messages):
        scope = current()
        caller = Caller(scope.tenant or "", scope.user, scope.task)
        return self.history.text_of_answer(caller, about(messages[-1].content), self.name)

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        text = self._text(messages)
        time.sleep(MODEL_S)
        return _result(text)

    async def _agenerate(self, messages, stop=None, run_manager=None, **kwargs):
        text = self._text(messages)
        await asyncio.sleep(MODEL_S)
        return _result(text)

    def _stream(self, messages, stop=None, run_manager=None, **kwargs):
        for piece in _pieces(self._text(messages)):
            time.sleep(MODEL_S / 4)
            yield piece

    async def _astream(self, messages, stop=None, run_manager=None, **kwargs):
        for piece in _pieces(self._text(messages)):
            await asyncio.sleep(MODEL_S / 4)
            yield piece


def _result(text: str) -> ChatResult:
    message = AIMessage(text, response_metadata={"done_reason": "stop"})
    return ChatResult(generations=[ChatGeneration(message=message)])


def _pieces(text: str) -> list[ChatGenerationChunk]:
    step = max(1, len(text) // 4)
    parts = [AIMessageChunk(text[at : at + step]) for at in range(0, len(text), step)]
    parts.append(AIMessageChunk("", response_metadata={"done_reason": "stop"}, chunk_position="last"))
    return [ChatGenerationChunk(message=part) for part in parts]


_asking: ContextVar[Caller] = ContextVar("soak_asking")


class NamingOllama(ScriptedOllama):
    """The scripted server; its answers name whom a header of the request told it that it answers."""

    def __init__(self, history: History) -> None:
        models = [ScriptedModel.named("soak"), ScriptedModel(name="soak-embed", embedding=True, dimensions=128)]
        super().__init__(models, host_cache=False)  # which would remember a million tokens: this looks at memory
        self._history = history
        self._engine._parts = self._named_parts

    def arrived(self, seen):
        """Take note of a request; old ones are forgotten."""
        if (told := seen.headers.get("x-soak")) is not None:
            _asking.set(Caller(*json.loads(unquote(told))))
        if len(self.requests) > 500:
            self.forget()
        return super().arrived(seen)

    def _named_parts(self, request, prompt) -> Iterator[Piece]:
        subject = about(str(request.messages[-1]["content"]))
        text = self._history.text_of_answer(_asking.get(Caller("")), subject, SCRIPTED)
        # Few pieces: where it is written token by token, this server is what a busy machine has no time for.
        for at in range(0, len(text), PIECE):
            yield Piece(content=text[at : at + PIECE])


class FailingWords(Embeddings):
    """An embedder of words that is slow, down or wrong when told."""

    model = "words"

    def __init__(self) -> None:
        self._words = Words()
        self.late_s = 0.0
        self.down = False
        self.wrong: list[float] | None = None

    def heal(self) -> None:
        """Be well again."""
        self.late_s, self.down, self.wrong = 0.0, False, None

    def _embedded(self, text: str) -> list[float]:
        if self.down:
            raise ConnectionError("the embedder is down")
        if len(self._words._known) > 300:
            self._words._known.clear()
        return self.wrong if self.wrong is not None else self._words.embed_query(text)

    def embed_query(self, text):
        time.sleep(self.late_s)
        return self._embedded(text)

    def embed_documents(self, texts):
        return [self.embed_query(text) for text in texts]

    async def aembed_query(self, text):
        await asyncio.sleep(self.late_s)
        return self._embedded(text)

    async def aembed_documents(self, texts):
        return [await self.aembed_query(text) for text in texts]


class Stack:
    """Everything that takes part: servers, a network, caches and models.

    One cache reaches Redis over a network, with an embedder of its own process; the other over a socket, with the
    local tier and an embedder behind the scripted Ollama.

    Args:
        history: Of the run.
        path: A directory with a short name.
    """

    def __init__(self, history: History, path: Path) -> None:
        self.history = history
        self.load: Any = None  # set by the load
        self.server = RedisProcess(path)
        self.proxy = Proxy(str(self.server.socket))
        self.ollama = NamingOllama(history).start()
        self.words = FailingWords()
        self.meaning = AegisEmbeddings("soak-embed", base_url=self.ollama.base_url)
        common: dict[str, Any] = {
            "min_similarity": 0.6, "repeats": "serve", "require_tenant": True, "ttl_s": TTL_S,
            "op_budget_s": 0.1, "embed_budget_s": 0.1,
        }  # fmt: skip
        self.caches = {
            "far": AegisSemanticCache(self.proxy.url, self.words, namespace=f"f{uuid.uuid4().hex[:8]}", **common),
            "near": AegisSemanticCache(
                self.server.unix_url, self.meaning, namespace=f"n{uuid.uuid4().hex[:8]}", local_tier_bytes=100_000,
                **common,
            ),
        }  # fmt: skip
        far, near = self.caches["far"], self.caches["near"]
        self.bare = Talking(name="bare", history=history, cache=False)
        self.measured = Talking(name="measured", history=history, cache=far)
        talking = {name: Talking(name=name, history=history, cache=far) for name in ("one", "two")}
        bounded = BatchingChatModel(
            Talking(name=BOUNDED, history=history), cache=far, max_concurrency=MOST_AT_ONCE, max_waiting=MOST_WAITING
        )
        scripted = {caller: self._chat(caller, near) for caller in CALLERS}
        self._scripted = list(scripted.values())
        # The model to call for whom, and the cache in front of it.
        self.targets: dict[str, tuple[str, Any]] = {
            **{name: ("far", lambda caller, model=model: model) for name, model in talking.items()},
            BOUNDED: ("far", lambda caller: bounded),
            SCRIPTED: ("near", scripted.__getitem__),
        }

    def _chat(self, caller: Caller, cache: AegisSemanticCache) -> ChatAegis:
        named = quote(json.dumps([caller.tenant, caller.user, caller.task]))
        return ChatAegis(
            "soak", base_url=self.ollama.base_url, cache=cache, temperature=0.8, timeout=OLLAMA_S, max_retries=0,
            client_kwargs={"headers": {"x-soak": named}},
        )  # fmt: skip

    async def aclose(self) -> None:
        """Close the connections of this event loop."""
        for cache in self.caches.values():
            await cache.aclose()
        for model in (*self._scripted, self.meaning):
            await model._endpoint.client().aclose()

    def close(self) -> None:
        """Close everything."""
        for cache in self.caches.values():
            cache.close()
        for model in (*self._scripted, self.meaning):
            model._endpoint.client().close()
        self.ollama.close()
        self.proxy.close()
        self.server.close()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let the cache's own warnings not be printed, nor those of a network that cuts: faults are meant."""
    log, loops = logging.getLogger("langchain_aegis"), logging.getLogger("asyncio")
    before = log.level

    def matters(record: logging.LogRecord) -> bool:
        return "socket.send() raised" not in record.getMessage()

    log.setLevel(logging.CRITICAL)
    loops.addFilter(matters)
    try:
        yield
    finally:
        log.setLevel(before)
        loops.removeFilter(matters)
