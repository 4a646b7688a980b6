"""Bound the requests of any Embeddings, and make them few."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from langchain_core.embeddings import Embeddings
from langchain_ollama.embeddings import OllamaEmbeddings
from pydantic import BaseModel

from langchain_aegis.admission import Admission
from langchain_aegis.embedder import embedder_name, warn_of_tokens
from langchain_aegis.embedder_models import endpoint_of
from langchain_aegis.embedding_requests import Embed
from langchain_aegis.embeddings import digest_in, kept_of
from langchain_aegis.endpoint import Endpoint
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.gathered_embeddings import (
    MAX_BATCH,
    MAX_BATCH_CHARS,
    GatheredEmbeddings,
    Kept,
    LearnDigest,
    check_batch,
    check_cache,
)
from langchain_aegis.servers import admission_of, check_arguments
from langchain_aegis.traits import Traits

if TYPE_CHECKING:
    from langchain_aegis.embedding_cache import AegisEmbeddingCache


class BatchingEmbeddings(Embeddings):
    """Any Embeddings, with bounded requests; calls that come while one is under way share the next.

    A lone query is sent at once, as `embed_query`. Texts that come in meanwhile, of queries and documents, are sent
    together as one `embed_documents`, each text once. If that is refused because of a text, it is found, and only its
    own callers get the error. Each event loop gathers its own texts, and all threads together theirs. An `embed_*` of
    many texts waits for its turn, after queries.

    Args:
        inner: The embedder. All users of one server share its bounds; the smallest that any of them asks for wins.
        merge: Queries may be sent as documents. Set it to False for an embedder that embeds a query differently from a
            document (another instruction, prefix or input type: E5, Nomic, Cohere, Voyage, Vertex); each query is then
            a request, and only documents share them.
        max_concurrency: Most requests under way; 4 if nobody asks for another number.
        max_waiting: Most requests that wait; calls are refused when `max_waiting * max_batch` texts wait. 100 likewise.
        window_ms: For how long calls of other models at the same server may overtake a request that waits for a slot.
        max_batch: Most texts of a request.
        max_batch_chars: Most characters of a request's texts together; a longer text goes alone.
        deadline_s: Seconds after which a caller gets `AegisDeadlineError`.
        cache: Keeps vectors; default: none are kept. An embedder that is not Ollama's needs its `version=`.

    Raises:
        AegisConfigError: `inner` is no Embeddings, a bound is out of range, or the cache needs a version.
    """

    def __init__(
        self,
        inner: Embeddings,
        *,
        merge: bool = True,
        max_concurrency: int | None = None,
        max_waiting: int | None = None,
        window_ms: float = 50.0,
        max_batch: int = MAX_BATCH,
        max_batch_chars: int = MAX_BATCH_CHARS,
        deadline_s: float | None = None,
        cache: AegisEmbeddingCache | None = None,
    ) -> None:
        if not isinstance(inner, Embeddings):
            raise AegisConfigError(f"inner must be Embeddings, got {type(inner).__name__}; try batching(x)")
        check_arguments({"window_ms": window_ms, "max_batch": max_batch, "deadline_s": deadline_s})
        check_batch(max_batch, max_batch_chars)
        check_cache(cache)
        warn_of_tokens(inner)
        self.inner = inner
        self.merge = merge
        self.cache = cache
        self.admission: Admission = admission_of(inner, max_concurrency=max_concurrency, max_waiting=max_waiting)
        self.deadline_s = deadline_s
        self._requests = _Requests(inner, cache)

        def gathered(kind: str, most: int) -> GatheredEmbeddings:
            return GatheredEmbeddings(
                kept=None if cache is None else _kept(inner, cache, kind, learns=self._requests.learns),
                admission=self.admission,
                max_batch=most,
                max_chars=max_batch_chars,
                traits=Traits(model=embedder_name(inner)),
                window_ms=window_ms,
            )

        self._documents = gathered("" if merge else "document", max_batch)
        self._queries = self._documents if merge else gathered("query", 1)

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of `text`; may share a request with other calls."""
        return self._queries.embed([text], self._requests, deadline=self._deadline())[0]

    async def aembed_query(self, text: str) -> list[float]:
        """Return the vector of `text`; may share a request with other calls."""
        return (await self._queries.aembed([text], self._requests, deadline=self._deadline()))[0]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors of `texts`, in order; may share requests with other calls."""
        return self._documents.embed(texts, self._requests, documents=True, deadline=self._deadline())

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors of `texts`, in order; may share requests with other calls."""
        return await self._documents.aembed(texts, self._requests, documents=True, deadline=self._deadline())

    def _deadline(self) -> float | None:
        return None if self.deadline_s is None else time.monotonic() + self.deadline_s


class _Requests:
    """Asks an embedder, and its server for the model's digest if it is Ollama's."""

    def __init__(self, inner: Embeddings, cache: AegisEmbeddingCache | None) -> None:
        self._inner = inner
        self._cache = cache
        self._endpoint: Endpoint | None = None
        if cache is not None and isinstance(inner, OllamaEmbeddings):
            self._endpoint = endpoint_of(inner)

    @property
    def learns(self) -> bool:
        """Whether the server can be asked for the model's digest."""
        return self._endpoint is not None

    def perform(self, step: Any) -> Any:
        """Do a step of a flow, blocking."""
        if isinstance(step, Embed):
            if step.query:
                return [self._inner.embed_query(step.texts[0])]
            return self._inner.embed_documents(step.texts)
        if isinstance(step, LearnDigest):
            endpoint, model = self._ollama()
            return digest_in(endpoint.client().tags(timeouts=endpoint.timeouts), model)
        return self._cache.perform(step) if self._cache is not None else None

    async def aperform(self, step: Any) -> Any:
        """Do a step of a flow in the running event loop."""
        if isinstance(step, Embed):
            if step.query:
                return [await self._inner.aembed_query(step.texts[0])]
            return await self._inner.aembed_documents(step.texts)
        if isinstance(step, LearnDigest):
            endpoint, model = self._ollama()
            return digest_in(await endpoint.client().atags(timeouts=endpoint.timeouts), model)
        return await self._cache.aperform(step) if self._cache is not None else None

    def _ollama(self) -> tuple[Endpoint, str]:
        if self._endpoint is None or not isinstance(self._inner, OllamaEmbeddings):
            raise AegisConfigError("this embedder has no server that tells a digest")
        return self._endpoint, self._inner.model


def _kept(inner: Embeddings, cache: AegisEmbeddingCache, kind: str, *, learns: bool) -> Kept:
    if isinstance(inner, OllamaEmbeddings):
        return kept_of(inner, cache, learns=learns)
    if cache.version is None:
        raise AegisConfigError(
            f"{type(inner).__name__} cannot tell when its model changes: name the model's state in the cache, "
            'AegisEmbeddingCache(version="..."), and change it with the model'
        )
    made_by = f"{type(inner).__module__}.{type(inner).__qualname__}"
    return Kept(cache, {"made_by": made_by, "kind": kind, "told": _told(inner)}, embedder_name(inner), learns=False)


def _told(inner: Embeddings) -> dict[str, Any]:
    """Return what an embedder was told: any of it may change its vectors."""
    values: Mapping[str, Any] = vars(inner)
    if isinstance(inner, BaseModel):
        values = {name: getattr(inner, name) for name in type(inner).model_fields}
    return {name: value for name, value in values.items() if not name.startswith("_") and _is_plain(value)}


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
