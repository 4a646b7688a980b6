"""A RAG service for several tenants: questions in, answers as server-sent events out. `make service` runs it."""

import asyncio
import contextlib
import json
import math
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any

import httpx
from fastapi import Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from langchain_core.documents import Document
from pydantic import BaseModel, Field
from rag_graph import build_graph
from service.workers import Metrics

from langchain_aegis import (
    AegisClosedError,
    AegisEmbeddingCache,
    AegisEmbeddings,
    AegisError,
    AegisOverloadedError,
    AegisSemanticCache,
    AegisSettings,
    BatchingChatModel,
    ChatAegis,
    aegis_scope,
    aegis_sources,
    was_cached,
)

ANSWER_TOKENS = 128
DEADLINE_S = 60.0  # of one question: nobody waits longer for a slot and an answer together
DRAIN_S = 10.0
RETRY_S = 5.0  # where nobody knows when the model server is back
LOOKED_S = 1.0  # for so long it is believed what the model server said last


class Asked(BaseModel):
    """A question."""

    question: str = Field(min_length=1, max_length=400)


@dataclass(frozen=True)
class Asker:
    """Who asks."""

    tenant: str
    user: str


class NotAuthenticatedError(Exception):
    """Nobody says who asks."""


def asker(x_tenant: Annotated[str, Header()] = "", x_user: Annotated[str, Header()] = "") -> Asker:
    """Return who asks: what the gateway in front has put there after it has checked a token.

    Never from what the caller may write himself: the gateway must remove these headers from what comes in.
    """
    if not x_tenant.strip() or not x_user.strip():
        raise NotAuthenticatedError("x-tenant and x-user are missing")
    return Asker(x_tenant, x_user)


class Service:
    """What a worker holds: made once, when it starts."""

    def __init__(self) -> None:
        settings = AegisSettings.from_env()
        self.ollama_url = settings.ollama_base_url
        self._vectors = AegisEmbeddingCache(redis_url=settings.redis_url)  # what one worker has embedded, all know
        self._embeddings = AegisEmbeddings(cache=self._vectors)
        self.cache = AegisSemanticCache(
            embeddings=self._embeddings,
            require_tenant=True,
            share_within_tenant=True,  # the documents are the tenant's, so all of its users may have the same answer
        )
        self.model = BatchingChatModel(
            ChatAegis(temperature=0, num_predict=ANSWER_TOKENS),
            cache=self.cache,
            max_concurrency=settings.max_concurrency,
            max_waiting=settings.max_waiting,
            deadline_s=DEADLINE_S,
        )
        self._graph = build_graph(self.model, self._retrieve)  # it knows nothing of this package
        self._documents: list[tuple[Document, list[float]]] = []
        self._http = httpx.AsyncClient(timeout=2)
        self._ready = (0.0, False)

    async def open(self) -> None:
        """Embed the documents; one worker does, the others find the vectors in Redis."""
        folder = resources.files("langchain_aegis.demo") / "documents"
        files = sorted((file for file in folder.iterdir() if file.name.endswith(".md")), key=lambda file: file.name)
        texts = [file.read_text(encoding="utf-8") for file in files]
        vectors = await self._embeddings.aembed_documents(texts)
        self._documents = [
            (Document(text, metadata={"source": file.name}), vector)
            for file, text, vector in zip(files, texts, vectors, strict=True)
        ]

    async def _retrieve(self, question: str) -> list[Document]:
        asked = await self._embeddings.aembed_query(question)
        near = sorted(self._documents, key=lambda each: -sum(a * b for a, b in zip(asked, each[1], strict=True)))[:3]
        found = sorted((document for document, _ in near), key=lambda document: document.metadata["source"])
        aegis_sources(
            *(document.metadata["source"] for document in found)
        )  # `invalidate(sources=...)` finds it by them
        return found

    async def answer(self, question: str) -> AsyncIterator[tuple[str, Any]]:
        """Yield the events of an answer: tokens, then its end. What refuses the question does so before the first."""
        began, sources, cached = time.monotonic(), list[str](), None
        parts = self._graph.astream({"question": question}, stream_mode=["messages", "updates"])
        async with contextlib.aclosing(parts):
            async for kind, part in parts:
                if kind == "messages":
                    chunk = part[0]
                    cached = was_cached(chunk) or cached
                    if chunk.text:
                        yield "token", chunk.text
                elif "find" in part:
                    sources = [document.metadata["source"] for document in part["find"]["documents"]]
        tier = cached["tier"] if cached else None
        yield "end", {"cached": tier, "sources": sources, "ms": round(1000 * (time.monotonic() - began))}

    async def ready(self) -> bool:
        """Whether the model server answers."""
        looked, is_ready = self._ready
        if time.monotonic() - looked > LOOKED_S:
            try:
                is_ready = (await self._http.get(f"{self.ollama_url}/api/version")).is_success
            except httpx.HTTPError:
                is_ready = False
            self._ready = time.monotonic(), is_ready
        return is_ready

    async def aclose(self) -> None:
        """Finish what is under way, then let everything go."""
        await self.model.admission.adrain(DRAIN_S)
        await self.cache.aclose()
        await self._vectors.aclose()
        await self._http.aclose()


def refused(error: AegisError) -> JSONResponse:
    """Return a typed answer: 503 with the time to come back, or 400 for what will never work."""
    body: dict[str, Any] = {"error": type(error).__name__, "message": str(error)}
    if not (error.retryable or isinstance(error, AegisClosedError)):
        return JSONResponse(body, status_code=400)
    wait_s = error.retry_after_s if isinstance(error, AegisOverloadedError) else RETRY_S
    seconds = max(1, math.ceil(wait_s))  # the header knows whole ones
    return JSONResponse(body | {"retry_after_s": seconds}, status_code=503, headers={"retry-after": str(seconds)})


def create_app() -> FastAPI:
    """Return the application of one worker."""
    state: dict[str, Any] = {}

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service = state["service"] = await asyncio.to_thread(Service)
        await service.open()
        async with Metrics(service.cache, service.ollama_url) as metrics:
            state["metrics"] = metrics
            yield
            await service.aclose()

    app = FastAPI(title="A RAG service", lifespan=lifespan)

    @app.post("/ask")
    async def ask(asked: Asked, who: Annotated[Asker, Depends(asker)]) -> Response:
        # What streams is read when this function has returned; `wrap` binds each step of it to the scope.
        events = aegis_scope(tenant=who.tenant, user=who.user).wrap(state["service"].answer(asked.question))
        first = await anext(events)  # a question that is refused ends here, before a status is sent
        return StreamingResponse(_sent(first, events), media_type="text/event-stream")

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Whether this worker lives; nothing else is asked."""
        return {"status": "ok", "worker": os.getpid()}

    @app.get("/readyz")
    async def readyz() -> Response:
        """Whether it can answer. Without Redis it can: nothing comes from the cache then."""
        service: Service = state["service"]
        is_ready = await service.ready()
        health = await service.cache.ahealth()
        body = {"ready": is_ready, "cache": health.redis, "entries": health.entries, "worker": os.getpid()}
        return JSONResponse(body, 200 if is_ready else 503, None if is_ready else {"retry-after": str(int(RETRY_S))})

    @app.get("/metrics")
    async def metrics() -> Response:
        """All workers' metrics, for Prometheus; keep this path inside."""
        return Response(await state["metrics"].page(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(AegisError)
    async def _(request: Request, error: AegisError) -> JSONResponse:
        return refused(error)

    @app.exception_handler(NotAuthenticatedError)
    async def _(request: Request, error: NotAuthenticatedError) -> JSONResponse:
        return JSONResponse({"error": "NotAuthenticatedError", "message": str(error)}, status_code=401)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        # Not the framework's own answer, which repeats what was asked.
        where = sorted({".".join(map(str, each["loc"])) for each in error.errors()})
        return JSONResponse({"error": "RequestValidationError", "message": ", ".join(where)}, status_code=422)

    return app


async def _sent(first: tuple[str, Any], events: AsyncIterator[tuple[str, Any]]) -> AsyncIterator[str]:
    """Yield server-sent events; what fails now is an event, for the status has been sent."""
    async with contextlib.aclosing(events):  # type: ignore[type-var]
        try:
            yield _event(*first)
            async for kind, data in events:
                yield _event(kind, data)
        except AegisError as error:
            yield _event("error", json.loads(bytes(refused(error).body)))


def _event(kind: str, data: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"
