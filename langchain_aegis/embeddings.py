"""Embeddings on Ollama whose concurrent queries become few requests."""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextvars import Context
from typing import Any, Self

from langchain_core.utils.utils import secret_from_env
from langchain_ollama.embeddings import OllamaEmbeddings
from pydantic import Field, PrivateAttr, SecretStr, ValidationError, model_validator

from langchain_aegis.client import OllamaClient
from langchain_aegis.endpoint import Endpoint
from langchain_aegis.errors import AegisConfigError, AegisError, AegisRequestError, AegisServerError
from langchain_aegis.loops import PerLoop
from langchain_aegis.options import (
    ALIASES,
    MODEL_OPTIONS,
    check_keep_alive,
    check_model,
    check_names,
    option_error,
    resolve_aliases,
)
from langchain_aegis.settings import AegisSettings, normalise_base_url

MAX_BATCH = 64

Vector = list[float]


class AegisEmbeddings(OllamaEmbeddings):
    """OllamaEmbeddings with a shared transport, checked answers and merged queries.

    `aembed_query` calls that run at the same time in an event loop share requests: while one is under way, the texts
    that come gather and go together in the next. Nobody waits while the server is idle. Documents are sent in
    batches of 64.

    Args:
        model: Name of the model; default `OLLAMA_MODEL_EMBEDDINGS`.
        base_url: Address of the server; default `OLLAMA_BASE_URL`.
        keep_alive: How long the model stays loaded: seconds or a duration; default `AEGIS_KEEP_ALIVE` ("30m").
        dimensions: Length of the vectors, for models that can shorten them.
        truncate: False makes the server refuse a text that does not fit into the model's window (an
            AegisContextOverflowError) instead of embedding its beginning.
        timeout: Seconds that one request may take; default `AEGIS_DEADLINE_S`.
        max_retries: How often a request is repeated while the server is overloaded or cannot be reached.
        api_key: Sent as bearer token; default `OLLAMA_API_KEY`.

    Raises:
        AegisConfigError: No model is named, or `base_url` is no address.
        AegisOptionError: An argument is unknown or has the wrong type.
    """

    base_url: str | None = Field(default=None, repr=False)
    keep_alive: float | str | None = None  # type: ignore[assignment] # upstream takes whole seconds only
    truncate: bool | None = None
    timeout: float | None = None
    max_retries: int | None = Field(default=None, ge=0, le=10)
    api_key: SecretStr | None = Field(default_factory=secret_from_env("OLLAMA_API_KEY", default=None), repr=False)
    num_batch: int | None = None
    client_kwargs: dict[str, Any] | None = Field(default={}, exclude=True, repr=False)
    sync_client_kwargs: dict[str, Any] | None = Field(default={}, exclude=True, repr=False)
    async_client_kwargs: dict[str, Any] | None = Field(default={}, exclude=True, repr=False)

    _endpoint: Endpoint = PrivateAttr()
    _default_keep_alive: str = PrivateAttr()

    def __init__(self, model: str | None = None, **arguments: Any) -> None:
        check_names(arguments, {*type(self).model_fields, *ALIASES}, f"argument of {type(self).__name__}:")
        values = resolve_aliases(arguments)
        if model is None or values.get("base_url") is None:
            settings = AegisSettings.from_env()
            model = settings.model_embeddings if model is None else model
            if values.get("base_url") is None:
                values["base_url"] = settings.ollama_base_url
        if model is None:
            raise AegisConfigError('no model is named; write AegisEmbeddings("name") or set OLLAMA_MODEL_EMBEDDINGS')
        values["base_url"] = normalise_base_url(values["base_url"])
        try:
            super().__init__(model=check_model(model), **values)
        except ValidationError as exc:
            raise option_error(type(self).__name__, exc) from exc

    @model_validator(mode="after")
    def _set_clients(self) -> Self:
        """Take the place of OllamaEmbeddings', which would build two clients for each object."""
        settings = AegisSettings.from_env()
        if self.keep_alive is not None:
            check_keep_alive(self.keep_alive)
        self._default_keep_alive = settings.keep_alive
        self._endpoint = Endpoint.of(
            self.base_url or settings.ollama_base_url,
            settings,
            api_key=self.api_key.get_secret_value() if self.api_key else None,
            timeout=self.timeout,
            retries=self.max_retries,
            client_kwargs=self.client_kwargs,
            sync_client_kwargs=self.sync_client_kwargs,
            async_client_kwargs=self.async_client_kwargs,
        )
        if self.validate_model_on_init:
            self._endpoint.check_has(self.model)
        return self

    def embed_documents(self, texts: list[str]) -> list[Vector]:
        """Return one vector for each text, in their order.

        Raises:
            AegisError: The server cannot be reached, refused a text, or sent no usable vectors.
        """
        found: dict[str, Vector] = {}
        for batch in _batches(texts):
            answer = self._server.embed(self._body(batch), **self._endpoint.bounds())
            found.update(zip(batch, self._vectors(answer, batch), strict=True))
        return [found[text] for text in texts]

    def embed_query(self, text: str) -> Vector:
        """Return the vector of one text; see `embed_documents`."""
        return self.embed_documents([text])[0]

    async def aembed_documents(self, texts: list[str]) -> list[Vector]:
        """Return one vector for each text, in their order; see `embed_documents`."""
        found: dict[str, Vector] = {}
        for batch in _batches(texts):
            found.update(zip(batch, await self._arequest(batch), strict=True))
        return [found[text] for text in texts]

    async def aembed_query(self, text: str) -> Vector:
        """Return the vector of one text; calls that run at the same time share requests."""
        gathering = _gatherings.get()
        key = (self._server, repr(self._body([])), self._endpoint.timeouts, self._endpoint.retries)
        merger = gathering.get(key)
        if merger is None:
            merger = gathering[key] = _Merger(self._arequest, lambda: gathering.pop(key, None))
        return await merger.get(text)

    async def _arequest(self, texts: list[str]) -> list[Vector]:
        answer = await self._server.aembed(self._body(texts), **self._endpoint.bounds())
        return self._vectors(answer, texts)

    @property
    def _server(self) -> OllamaClient:
        return self._endpoint.client(self.base_url)

    def _body(self, texts: Sequence[str]) -> dict[str, Any]:
        values = self.__dict__
        fields = {
            "model": self.model,
            "input": list(texts),
            "truncate": self.truncate,
            "dimensions": self.dimensions,
            "keep_alive": check_keep_alive(self._default_keep_alive if self.keep_alive is None else self.keep_alive),
            "options": {name: value for name in MODEL_OPTIONS if (value := values.get(name)) is not None},
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _vectors(self, answer: dict[str, Any], texts: Sequence[str]) -> list[Vector]:
        """Return the vectors of an answer, checked: a wrong one would find wrong neighbours."""
        vectors = answer.get("embeddings")
        if not isinstance(vectors, list) or len(vectors) != len(texts):
            sent = len(vectors) if isinstance(vectors, list) else "no"
            raise AegisServerError(f"{self.model} sent {sent} vectors for {len(texts)} texts")
        for vector in vectors:
            if not isinstance(vector, list) or not vector or len(vector) != len(vectors[0]):
                raise AegisServerError(f"{self.model} sent vectors of different lengths, or empty ones")
            try:
                finite = math.isfinite(sum(vector))  # one NaN or infinity makes the sum one
            except (TypeError, OverflowError):
                finite = False
            if not finite:
                raise AegisServerError(f"{self.model} sent a vector that holds something other than finite numbers")
        if self.dimensions is not None and vectors and len(vectors[0]) != self.dimensions:
            raise AegisServerError(
                f"{self.model} sent {len(vectors[0])} dimensions where {self.dimensions} were asked for",
                retryable=False,
            )
        return vectors


class _Merger:
    """Merges the texts that come while a request is under way into the next one; for one event loop.

    Exists while there is something to do: `idle` is called when there is not.
    """

    def __init__(self, request: Callable[[list[str]], Awaitable[list[Vector]]], idle: Callable[[], object]) -> None:
        self._request = request
        self._idle = idle
        self._waiting: dict[str, list[asyncio.Future[Vector]]] = {}
        self._flying: dict[str, list[asyncio.Future[Vector]]] = {}
        self._task: asyncio.Task[None] | None = None

    async def get(self, text: str) -> Vector:
        future: asyncio.Future[Vector] = asyncio.get_running_loop().create_future()
        place = self._flying if text in self._flying else self._waiting
        place.setdefault(text, []).append(future)
        if self._task is None:
            # A shared request belongs to no caller: it runs in a context without anybody's variables.
            self._task = asyncio.get_running_loop().create_task(self._run(), context=Context())
        return await future  # a caller that leaves takes only its own future along

    async def _run(self) -> None:
        try:
            await asyncio.sleep(0)  # calls of the same moment go together
            while self._waiting:
                for text in list(self._waiting)[:MAX_BATCH]:
                    futures = [future for future in self._waiting.pop(text) if not future.done()]
                    if futures:
                        self._flying[text] = futures
                if self._flying:
                    await self._fly(list(self._flying))
        finally:
            self._idle()
            self._task = None
            for futures in (*self._waiting.values(), *self._flying.values()):  # the loop ends, or a bug
                for future in futures:
                    future.cancel()
            self._waiting.clear()
            self._flying.clear()

    async def _fly(self, texts: list[str]) -> None:
        try:
            vectors = await self._request(texts)
        except AegisRequestError as exc:
            # One of them is refused: the halves tell which, and the others get their vectors.
            if len(texts) == 1:
                self._fail(texts, exc)
            else:
                await self._fly(texts[: len(texts) // 2])
                await self._fly(texts[len(texts) // 2 :])
        except AegisError as exc:
            self._fail(texts, exc)
        except Exception as exc:  # whatever it is, nobody must wait for ever
            self._fail(texts, AegisServerError(f"embedding failed: {type(exc).__name__}: {exc}"), exc)
        else:
            for text, vector in zip(texts, vectors, strict=True):
                for number, future in enumerate(self._flying.pop(text)):
                    if not future.done():
                        future.set_result(list(vector) if number else vector)

    def _fail(self, texts: list[str], error: AegisError, cause: Exception | None = None) -> None:
        for text in texts:
            for future in self._flying.pop(text):
                if not future.done():
                    own = copy.copy(error)  # tracebacks grow with each raise, so nobody shares one
                    own.__cause__ = cause or error
                    future.set_exception(own)


async def _nothing(_: object) -> None:
    """Close nothing: mergers hold no connection."""


_gatherings: PerLoop[dict[object, _Merger]] = PerLoop(dict, _nothing)


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    distinct = list(dict.fromkeys(texts))
    for start in range(0, len(distinct), MAX_BATCH):
        yield distinct[start : start + MAX_BATCH]
