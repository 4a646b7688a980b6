"""The embedder behind a time budget: a slow or broken one costs a semantic hit, never a call."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence

from langchain_core.embeddings import Embeddings

from langchain_aegis.breaker import Unavailable
from langchain_aegis.budgets import Budget
from langchain_aegis.digests import Asked, Server
from langchain_aegis.notices import warn_once
from langchain_aegis.settings import redact_url

_RETRY_S = 30.0  # after so long, a missing embedder is looked for again


class Embedder:
    """One embedder, made when it is first needed.

    Args:
        make: Returns the embeddings, or None if there are none; may block, so it is called in a thread.
        budget_s: How long one text may take.
    """

    def __init__(self, make: Callable[[], Embeddings | None], *, budget_s: float) -> None:
        self._make = make
        self._budget = Budget(
            budget_s,
            name="embed",
            slow="embedder_slow",
            down="embedder_down",
            slow_notice=f"the embedder needs longer than {budget_s} s (embed_budget_s)",
            down_notice="the embedder failed ({}); only exact repeats are answered from the cache",
        )
        self.breaker = self._budget.breaker
        self._lock = threading.Lock()
        self._embeddings: Embeddings | None = None
        self._look_again = 0.0
        self.models: Sequence[tuple[str, Server]] = ()  # what makes the vectors: a name and who has it, once it is made

    @property
    def name(self) -> str | None:
        """The embedder's name, or None while none was found."""
        return embedder_name(self._embeddings) if self._embeddings is not None else None

    def asked(self) -> Asked:
        """Return the model that makes the vectors, by what is known of it now."""
        return Asked(self.models)

    @property
    def missing(self) -> bool:
        """Whether one was looked for in vain a short time ago."""
        return self._embeddings is None and time.monotonic() < self._look_again

    def embed(self, text: str) -> Sequence[float]:
        """Return the vector of `text`, shape `(dimensions,)`.

        Raises:
            Unavailable: There is no embedder, it failed, or it needs longer than the budget.
        """
        self._check()
        return self._budget.run(lambda: self.get().embed_query(text))

    async def aembed(self, text: str) -> Sequence[float]:
        """Like `embed`, without blocking the event loop."""
        self._check()
        embeddings = self._embeddings
        # One that knows no other way is called in a thread, and not in one of the event loop's: a user's work may fill
        # those.
        if embeddings is not None and type(embeddings).aembed_query is Embeddings.aembed_query:
            return await self._budget.arun_blocking(lambda: _embed(embeddings, text))
        return await self._budget.arun(lambda: self._aembed(text))

    async def _aembed(self, text: str) -> Sequence[float]:
        embeddings = self._embeddings
        if embeddings is None:
            embeddings = await asyncio.to_thread(self.get)
        return await embeddings.aembed_query(text)

    def get(self) -> Embeddings:
        """Return the embeddings themselves, made if necessary; blocks. Raises Unavailable if there are none."""
        with self._lock:
            if self._embeddings is None:
                if time.monotonic() < self._look_again:
                    raise Unavailable("no_embedder")
                try:
                    self._embeddings = self._make()
                finally:  # only now: while it is made, it is not missing, and others wait for it
                    if self._embeddings is None:
                        self._look_again = time.monotonic() + _RETRY_S
                if self._embeddings is None:
                    raise Unavailable("no_embedder")
                warn_of_tokens(self._embeddings)
            return self._embeddings

    def _check(self) -> None:
        if self.missing:
            raise Unavailable("no_embedder")


def _embed(embeddings: Embeddings, text: str) -> Sequence[float]:
    """Return a text's vector; a StopIteration, which no future can hold, is raised as a RuntimeError."""
    try:
        return embeddings.embed_query(text)
    except StopIteration as exc:
        raise RuntimeError("the embedder raised StopIteration") from exc


def innermost(embeddings: Embeddings) -> Embeddings:
    """Return what makes the vectors: BatchingEmbeddings, CacheBackedEmbeddings and the like only hand them on."""
    for _ in range(8):
        inner = getattr(embeddings, "inner", None) or getattr(embeddings, "underlying_embeddings", None)
        if not isinstance(inner, Embeddings):
            break
        embeddings = inner
    return embeddings


def embedder_name(embeddings: Embeddings) -> str:
    """Return a name that two embedders share only if their vectors can be compared."""
    embeddings = innermost(embeddings)
    for attribute in ("model", "model_name", "model_id", "deployment", "repo_id"):
        value = getattr(embeddings, attribute, None)
        if isinstance(value, str) and value:
            return value.removesuffix(":latest")
    kind = type(embeddings)
    return f"{kind.__module__}.{kind.__qualname__}"


def warn_of_tokens(embeddings: Embeddings) -> None:
    """Warn once of an embedder that sends a server the token numbers of another maker's model.

    `OpenAIEmbeddings` does that unless told otherwise; vLLM takes them for those of its own model, and its vectors then
    mean nothing.
    """
    if not (
        getattr(embeddings, "check_embedding_ctx_length", False) and getattr(embeddings, "tiktoken_enabled", False)
    ):
        return
    address = getattr(embeddings, "openai_api_base", None) or os.environ.get("OPENAI_BASE_URL")
    if address and "api.openai.com" not in str(address):
        warn_once(
            "embeddings_of_tokens",
            f"{type(embeddings).__name__} sends {redact_url(str(address))} the numbers of OpenAI's tokens, which"
            " another model reads as other texts; give it check_embedding_ctx_length=False",
        )


def embedder_id(name: str, dimensions: int) -> str:
    """Return 8 hex characters for an embedder's vectors of one length: part of the index's name."""
    return hashlib.blake2b(f"{name}\0{dimensions}".encode(), digest_size=4).hexdigest()
