"""Embeddings on Ollama whose concurrent calls become few requests."""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self

from langchain_core.utils.utils import secret_from_env
from langchain_ollama.embeddings import OllamaEmbeddings
from pydantic import Field, PrivateAttr, SecretStr, ValidationError, model_validator

from langchain_aegis.client import OllamaClient
from langchain_aegis.embedding_requests import Embed, Vector
from langchain_aegis.endpoint import Endpoint
from langchain_aegis.errors import AegisBatchError, AegisConfigError, AegisServerError
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.gathered_embeddings import (
    MAX_BATCH,
    MAX_BATCH_CHARS,
    GatheredEmbeddings,
    Kept,
    LearnDigest,
    check_batch,
    check_cache,
)
from langchain_aegis.identity import EXECUTION_OPTIONS, normalise_model
from langchain_aegis.options import (
    ALIASES,
    MODEL_OPTIONS,
    check_keep_alive,
    check_model,
    check_names,
    option_error,
    resolve_aliases,
)
from langchain_aegis.reloads import Place, Rule, place, reloads, runner_options
from langchain_aegis.settings import AegisSettings, normalise_base_url
from langchain_aegis.warming import Report, Target, Warmed, awarm, warm

if TYPE_CHECKING:
    from langchain_aegis.embedding_cache import AegisEmbeddingCache

_MAX_SHARED: Final = 64  # kinds of requests for which a client's concurrent calls are gathered


class AegisEmbeddings(OllamaEmbeddings):
    """OllamaEmbeddings with a shared transport, checked answers and few requests.

    Calls of any kind that run at the same time share requests, each text once: while one is under way, the texts that
    come gather and go together into the next. Nobody waits while nothing is under way. Each event loop gathers its
    own, and all threads together theirs. A text that the server refuses fails only the calls that hold it.

    Args:
        model: Name of the model; default `OLLAMA_MODEL_EMBEDDINGS`.
        base_url: Address of the server; default `OLLAMA_BASE_URL`.
        keep_alive: How long the model stays loaded: seconds or a duration; default `AEGIS_KEEP_ALIVE` ("30m").
        dimensions: Length of the vectors, for models that can shorten them.
        truncate: False makes the server refuse a text that does not fit into the model's window (an
            AegisContextOverflowError) instead of embedding its beginning.
        on_reload: As for ChatAegis. `num_ctx` is always sent as asked: it decides how much of a long text is embedded.
        timeout: Seconds that one request may take; default `AEGIS_DEADLINE_S`.
        max_retries: How often a request is repeated while the server is overloaded or cannot be reached.
        max_batch: Most texts of a request.
        max_batch_chars: Most characters of a request's texts together; a longer text goes alone.
        cache: Keeps vectors; default: none are kept.
        api_key: Sent as bearer token; default `OLLAMA_API_KEY`.

    Raises:
        AegisConfigError: No model is named, or `base_url` is no address.
        AegisOptionError: An argument is unknown or has the wrong type.
    """

    base_url: str | None = Field(default=None, repr=False)
    keep_alive: float | str | None = None  # type: ignore[assignment] # upstream takes whole seconds only
    truncate: bool | None = None
    on_reload: Rule = "share"
    timeout: float | None = None
    max_retries: int | None = Field(default=None, ge=0, le=10)
    api_key: SecretStr | None = Field(default_factory=secret_from_env("OLLAMA_API_KEY", default=None), repr=False)
    num_batch: int | None = None
    max_batch: int = MAX_BATCH
    max_batch_chars: int = MAX_BATCH_CHARS
    cache: Any = Field(default=None, exclude=True, repr=False)
    client_kwargs: dict[str, Any] | None = Field(default={}, exclude=True, repr=False)
    sync_client_kwargs: dict[str, Any] | None = Field(default={}, exclude=True, repr=False)
    async_client_kwargs: dict[str, Any] | None = Field(default={}, exclude=True, repr=False)

    _endpoint: Endpoint = PrivateAttr()
    _default_keep_alive: str = PrivateAttr()
    _made_at: Place = PrivateAttr()
    _memo: _Memo = PrivateAttr(default_factory=lambda: _Memo())

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
        check_batch(self.max_batch, self.max_batch_chars)
        check_cache(self.cache)
        if self.keep_alive is not None:
            check_keep_alive(self.keep_alive)
        self._default_keep_alive = settings.keep_alive
        self._made_at = place()
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
        """Return one vector for each text, in their order; may share requests with other calls.

        Raises:
            AegisError: The server cannot be reached, refused a text, or sent no usable vectors.
        """
        gathered, requests = self._way
        return gathered.embed(_checked(texts), requests, documents=True)

    def embed_query(self, text: str) -> Vector:
        """Return the vector of one text; see `embed_documents`."""
        gathered, requests = self._way
        return gathered.embed(_checked([text]), requests)[0]

    async def aembed_documents(self, texts: list[str]) -> list[Vector]:
        """Return one vector for each text, in their order; see `embed_documents`."""
        gathered, requests = self._way
        return await gathered.aembed(_checked(texts), requests, documents=True)

    async def aembed_query(self, text: str) -> Vector:
        """Return the vector of one text; see `embed_documents`."""
        gathered, requests = self._way
        return (await gathered.aembed(_checked([text]), requests))[0]

    def warm(self, *, pull: bool = True, report: Report | None = None) -> Warmed:
        """Have the server load the model; see `ChatAegis.warm`."""
        client, target = self._warmth()
        return warm([target], client, self._endpoint.timeouts, pull=pull, report=report)[0]

    async def awarm(self, *, pull: bool = True, report: Report | None = None) -> Warmed:
        """Do what `warm` does, without blocking the event loop."""
        client, target = self._warmth()
        return (await awarm([target], client, self._endpoint.timeouts, pull=pull, report=report))[0]

    def _warmth(self) -> tuple[OllamaClient, Target]:
        where, rule, client = self._made_at.text, self.on_reload, self._endpoint.client(self.base_url)
        return client, Target.of(self._body(), client.base_url, rule=rule, where=where, embeds=True)

    @property
    def _way(self) -> tuple[GatheredEmbeddings, _Requests]:
        """What all objects share that would send the same requests to the same server; and this one's own."""
        made, fields = self._memo.made, self.__dict__
        if made is not None and made[0] is self._endpoint and made[1] == fields:
            return made[2]
        client = self._endpoint.client(self.base_url)
        # Not a method of this object, which the memo would then keep alive.
        guarded = partial(_guarded, client.base_url, self.model, self.on_reload, self._made_at)
        requests = _Requests(client, self._body(), self._endpoint.bounds(), self.dimensions, self.cache, guarded)
        key = (
            repr(requests.body), repr(requests.bounds), self.max_batch, self.max_batch_chars, id(self.cache),
            self.on_reload,
        )  # fmt: skip
        way = _shared.get(client, key, self._make_gathered), requests
        self._memo.made = self._endpoint, dict(fields), way
        return way

    def _make_gathered(self) -> GatheredEmbeddings:
        return GatheredEmbeddings(
            kept=None if self.cache is None else kept_of(self, self.cache, learns=True),
            max_batch=self.max_batch,
            max_chars=self.max_batch_chars,
        )

    def _body(self) -> dict[str, Any]:
        values = self.__dict__
        fields = {
            "model": self.model,
            "truncate": self.truncate,
            "dimensions": self.dimensions,
            "keep_alive": check_keep_alive(self._default_keep_alive if self.keep_alive is None else self.keep_alive),
            "options": {name: value for name in MODEL_OPTIONS if (value := values.get(name)) is not None},
        }
        return {name: value for name, value in fields.items() if value is not None}


def _guarded(base_url: str, model: str, rule: Rule, made_at: Place, body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the body of a request with the runner options that all calls of the model send."""
    if rule == "allow":
        return body
    asked = runner_options(body["options"])
    reloads.share(base_url, model, asked, where=lambda: made_at.text, rule=rule, own=("num_ctx",))
    return {**body, "options": {**body["options"], **reloads.send(base_url, model, asked, own=("num_ctx",))}}


def kept_of(embeddings: OllamaEmbeddings, cache: AegisEmbeddingCache, *, learns: bool) -> Kept:
    """Return what a cache keeps of a model of Ollama's."""
    values = embeddings.__dict__
    fields = {
        "dimensions": embeddings.dimensions,
        "truncate": values.get("truncate") is not False,
        "options": {
            name: value
            for name in MODEL_OPTIONS
            if name not in EXECUTION_OPTIONS and (value := values.get(name)) is not None
        },
    }
    return Kept(cache, fields, normalise_model(embeddings.model), learns=learns)


class _Memo:
    """What was made of an object's fields; no part of what it is: copies begin without, and compare as equal."""

    def __init__(self) -> None:
        self.made: tuple[Endpoint, dict[str, Any], tuple[GatheredEmbeddings, _Requests]] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Memo)

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Memo:
        return _Memo()

    def __reduce__(self) -> Any:
        return _Memo, ()


class _Requests:
    """Sends one model's requests.

    Args:
        client: To its server.
        body: Of its requests, without the texts.
        bounds: How long, and how often.
        dimensions: What the vectors must have, if it is known.
        cache: Asked for what flows want of Redis.
        guarded: Returns the body as it is sent now.
    """

    def __init__(
        self,
        client: OllamaClient,
        body: Mapping[str, Any],
        bounds: Mapping[str, Any],
        dimensions: int | None,
        cache: AegisEmbeddingCache | None,
        guarded: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ) -> None:
        self.client = client
        self.body = body
        self.bounds = bounds
        self._dimensions = dimensions
        self._cache = cache
        self._guarded = guarded

    def perform(self, step: Any) -> Any:
        """Do a step of a flow, blocking."""
        if isinstance(step, Embed):
            answer = self.client.embed(self._asking(step.texts), **self.bounds)
            return self._vectors(answer, step.texts)
        if isinstance(step, LearnDigest):
            return digest_in(self.client.tags(timeouts=self.bounds["timeouts"]), self.body["model"])
        return self._cache.perform(step) if self._cache is not None else None

    async def aperform(self, step: Any) -> Any:
        """Do a step of a flow in the running event loop."""
        if isinstance(step, Embed):
            answer = await self.client.aembed(self._asking(step.texts), **self.bounds)
            return self._vectors(answer, step.texts)
        if isinstance(step, LearnDigest):
            return digest_in(await self.client.atags(timeouts=self.bounds["timeouts"]), self.body["model"])
        return await self._cache.aperform(step) if self._cache is not None else None

    def _asking(self, texts: Sequence[str]) -> dict[str, Any]:
        return {**self._guarded(self.body), "input": texts}

    def _vectors(self, answer: dict[str, Any], texts: Sequence[str]) -> list[Vector]:
        """Return the vectors of an answer, checked: a wrong one would find wrong neighbours."""
        model, vectors = self.body["model"], answer.get("embeddings")
        if not isinstance(vectors, list):
            raise AegisServerError(f"{model} sent no vectors for {len(texts)} texts")
        if len(vectors) != len(texts):
            raise AegisBatchError(f"{model} sent {len(vectors)} vectors for {len(texts)} texts")
        for vector in vectors:
            if not isinstance(vector, list) or not vector or len(vector) != len(vectors[0]):
                raise AegisServerError(f"{model} sent vectors of different lengths, or empty ones")
            try:
                finite = math.isfinite(sum(vector))  # one NaN or infinity makes the sum one
            except (TypeError, OverflowError):
                finite = False
            if not finite:
                raise AegisServerError(f"{model} sent a vector that holds something other than finite numbers")
        if self._dimensions is not None and len(vectors[0]) != self._dimensions:
            raise AegisServerError(
                f"{model} sent {len(vectors[0])} dimensions where {self._dimensions} were asked for",
                retryable=False,
            )
        return vectors


def digest_in(tags: Sequence[Mapping[str, Any]], model: str) -> str | None:
    """Return a model's digest, from what the server says about those it has; None if it says none."""
    name = normalise_model(model)
    for card in tags:
        if name in (card.get("model"), card.get("name")):
            digest = card.get("digest")
            return digest if isinstance(digest, str) and digest else None
    return None


def _checked(texts: Sequence[str]) -> Sequence[str]:
    given: object = texts
    if isinstance(given, str):
        raise AegisConfigError("embed_documents takes a list of texts; use embed_query for one text")
    for text in texts:
        if not isinstance(text, str):
            raise AegisConfigError(f"only texts can be embedded, got {type(text).__name__}")
    return texts


class _Shared:
    """The gathered embeddings of each client, for as long as the client lives."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[OllamaClient, OrderedDict[object, GatheredEmbeddings]] = (
            weakref.WeakKeyDictionary()
        )
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Take a new lock: another thread of the parent may have held the old one."""
        self._lock = threading.Lock()

    def get(self, client: OllamaClient, key: object, make: Callable[[], GatheredEmbeddings]) -> GatheredEmbeddings:
        with self._lock:
            of_client = self._of.setdefault(client, OrderedDict())
            if (found := of_client.get(key)) is None:
                found = of_client[key] = make()
            of_client.move_to_end(key)
            while len(of_client) > _MAX_SHARED:  # whoever still uses it keeps it
                of_client.popitem(last=False)
            return found


_shared = _Shared()
