"""Talk to an Ollama server over shared HTTP connections, from threads and event loops."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import ssl
import threading
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import AsyncGenerator, Generator, Mapping
from typing import Any, Self
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx
import orjson

from langchain_aegis import __version__
from langchain_aegis.attempts import Attempt, Timeouts, attempts
from langchain_aegis.deadlines import bounded
from langchain_aegis.digests import Models
from langchain_aegis.errors import AegisError, AegisRequestError, AegisServerError, AegisTimeoutError
from langchain_aegis.loops import PerLoop
from langchain_aegis.ndjson import MAX_TOTAL_BYTES, ChatParts, Parts, PullParts, parse_object
from langchain_aegis.refusals import refusal, translated
from langchain_aegis.settings import is_loopback, normalise_base_url
from langchain_aegis.telemetry import acounted, acounted_stream, counted, counted_stream

_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=15)
_MAX_ERROR_BYTES = 65_536
_MAX_PARSED_IN_LOOP_BYTES = 200_000  # about 1 ms
_MAX_SHARED = 32
_DRAIN_S = 1.0


@functools.lru_cache(maxsize=1)
def _trusted() -> ssl.SSLContext:
    return httpx.create_ssl_context()


@functools.lru_cache(maxsize=1)
def _untrusting() -> ssl.SSLContext:
    # Reading the CA bundle costs 40 ms. A client for http:// never uses it, and this one trusts nobody.
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class OllamaClient:
    """One Ollama server: chat, embeddings, and the small calls.

    Made without any I/O. May be used from any number of threads and event loops, and in the child of a fork. All
    calls raise the errors of `langchain_aegis.errors`.

    Args:
        base_url: Address; `user:password@` in it becomes basic authentication.
        headers: Sent with every request.
        timeouts: Used where a call names none.
        sync_options: More arguments for `httpx.Client`.
        async_options: The same for `httpx.AsyncClient`.

    Raises:
        AegisConfigError: `base_url` is no http address.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeouts: Timeouts | None = None,
        sync_options: Mapping[str, Any] | None = None,
        async_options: Mapping[str, Any] | None = None,
    ) -> None:
        parts = urlsplit(normalise_base_url(base_url))
        login, at, host = parts.netloc.rpartition("@")
        self.base_url = urlunsplit((parts.scheme, host, parts.path, "", ""))
        self.timeouts = timeouts or Timeouts()
        self.models = Models()
        self._made_of = (base_url, headers, timeouts, sync_options, async_options)
        self._tls = parts.scheme == "https"
        user, _, password = login.partition(":")
        self._common: dict[str, Any] = {
            "auth": (unquote(user), unquote(password)) if at else None,
            "headers": {
                "user-agent": f"langchain-aegis/{__version__}",
                "accept-encoding": "identity",  # a compressed answer could unpack to any size
                "content-type": "application/json",
                **{name.lower(): value for name, value in (headers or {}).items()},
            },
            "trust_env": not is_loopback(parts.hostname or ""),  # loopback never goes through a proxy
            "follow_redirects": False,
            "limits": _LIMITS,
        }
        self._sync_options = dict(sync_options or {})
        self._async_options = dict(async_options or {})
        self._start()
        _living.add(self)

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._http: httpx.Client | None = None
        self._closer: weakref.finalize[[], OllamaClient] | None = None
        self._ahttp: PerLoop[httpx.AsyncClient] = PerLoop(self._make_async, httpx.AsyncClient.aclose)

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, self._made_of

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __repr__(self) -> str:
        return f"OllamaClient({self.base_url!r})"

    # -- chat --

    @counted
    def chat(self, body: Mapping[str, Any], *, timeouts: Timeouts | None = None, retries: int = 0) -> dict[str, Any]:
        """Return the whole answer to a `/api/chat` request, sent with `stream: false`.

        Args:
            body: Fields of the request; `stream` is set here.
            timeouts: Bounds of this call.
            retries: How often it is sent again when the server is overloaded or cannot be reached.
        """
        answer = self._post("/api/chat", {**body, "stream": False}, timeouts, retries)
        return ChatParts().whole(answer)

    @acounted
    async def achat(
        self, body: Mapping[str, Any], *, timeouts: Timeouts | None = None, retries: int = 0
    ) -> dict[str, Any]:
        """Do what `chat` does, without blocking the event loop."""
        answer = await self._apost("/api/chat", {**body, "stream": False}, timeouts, retries)
        return ChatParts().whole(answer)

    @counted_stream
    def chat_stream(
        self, body: Mapping[str, Any], *, timeouts: Timeouts | None = None, retries: int = 0
    ) -> Generator[dict[str, Any], None, None]:
        """Yield the parts of the answer to a `/api/chat` request; the last has `done: true`.

        Closing the generator closes the connection, so that the server stops generating.

        Raises:
            AegisStreamError: The answer is not whole; `.partial` is the text that had come.
        """
        bounds = timeouts or self.timeouts
        for attempt in attempts(bounds, retries):
            parts = ChatParts()
            try:
                yield from self._stream_once("/api/chat", {**body, "stream": True}, bounds, attempt, parts)
                return
            except AegisError as exc:
                time.sleep(attempt.wait_s(exc, parts.begun))

    def _stream_once(
        self, path: str, body: dict[str, Any], bounds: Timeouts, attempt: Attempt, parts: Parts
    ) -> Generator[dict[str, Any], None, None]:
        client = self._sync()
        request = client.build_request("POST", self._url(path), content=_encode(body), timeout=bounds.of_http())
        with translated(self.base_url, parts), contextlib.ExitStack() as stack:
            with attempt.blocking():
                response = stack.enter_context(contextlib.closing(client.send(request, stream=True)))
                if not response.is_success:
                    raise self._refusal(response, _collect(response, attempt), body["model"])
            _check_encoding(response)
            parts.begun = True
            data = response.iter_raw()
            while True:
                try:
                    with attempt.blocking(_DRAIN_S if parts.done else math.inf):
                        piece = next(data, None)
                except (httpx.HTTPError, AegisTimeoutError):
                    if parts.done:  # the answer is whole; only the connection did not end well
                        return
                    raise
                if piece is None:
                    break
                yield from parts.feed(piece)
                if not parts.done:
                    attempt.check()
            yield from parts.finish()

    @acounted_stream
    async def achat_stream(
        self, body: Mapping[str, Any], *, timeouts: Timeouts | None = None, retries: int = 0
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Do what `chat_stream` does, without blocking the event loop."""
        bounds = timeouts or self.timeouts
        for attempt in attempts(bounds, retries):
            parts = ChatParts()
            try:
                async with contextlib.aclosing(
                    self._astream_once("/api/chat", {**body, "stream": True}, bounds, attempt, parts)
                ) as stream:
                    async for part in stream:
                        yield part
                return
            except AegisError as exc:
                await asyncio.sleep(attempt.wait_s(exc, parts.begun))

    async def _astream_once(
        self, path: str, body: dict[str, Any], bounds: Timeouts, attempt: Attempt, parts: Parts
    ) -> AsyncGenerator[dict[str, Any], None]:
        sent = _encode(body)
        client = await self._async()
        with translated(self.base_url, parts):
            request = client.build_request("POST", self._url(path), content=sent, timeout=bounds.of_http())
            async with attempt.bound():
                response = await client.send(request, stream=True)
            async with contextlib.aclosing(response):
                if not response.is_success:
                    async with attempt.bound():
                        text = await _acollect(response)
                    raise self._refusal(response, text, body["model"])
                _check_encoding(response)
                parts.begun = True
                data = response.aiter_raw()
                while True:
                    try:
                        if attempt.ends_within(bounds.read_s) or parts.done:
                            async with attempt.bound(_DRAIN_S if parts.done else math.inf):
                                piece = await anext(data, None)
                        else:  # httpx's own bound ends this read before the deadline
                            piece = await anext(data, None)
                    except (httpx.HTTPError, AegisTimeoutError):
                        if parts.done:  # the answer is whole; only the connection did not end well
                            return
                        raise
                    if piece is None:
                        break
                    for part in parts.feed(piece):
                        yield part
                for part in parts.finish():
                    yield part

    # -- downloads --

    def pull(self, model: str, *, timeouts: Timeouts | None = None) -> Generator[dict[str, Any], None, None]:
        """Have the server download a model; yield `status`, and perhaps `digest`, `total`, `completed` (bytes).

        What was downloaded is kept by the server when this breaks off: the next pull goes on there.
        """
        bounds, body = timeouts or self.timeouts, {"model": model, "stream": True}
        with self.models.changing():
            yield from self._stream_once("/api/pull", body, bounds, next(attempts(bounds, 0)), PullParts())

    async def apull(self, model: str, *, timeouts: Timeouts | None = None) -> AsyncGenerator[dict[str, Any], None]:
        """Do what `pull` does, without blocking the event loop."""
        bounds, body = timeouts or self.timeouts, {"model": model, "stream": True}
        stream = self._astream_once("/api/pull", body, bounds, next(attempts(bounds, 0)), PullParts())
        with self.models.changing():
            async with contextlib.aclosing(stream) as parts:
                async for part in parts:
                    yield part

    # -- small calls --

    def embed(self, body: Mapping[str, Any], *, timeouts: Timeouts | None = None, retries: int = 0) -> dict[str, Any]:
        """Return the answer to a `/api/embed` request."""
        return parse_object(self._post("/api/embed", body, timeouts, retries))

    async def aembed(
        self, body: Mapping[str, Any], *, timeouts: Timeouts | None = None, retries: int = 0
    ) -> dict[str, Any]:
        """Return the answer to a `/api/embed` request."""
        answer = await self._apost("/api/embed", body, timeouts, retries)
        if len(answer) > _MAX_PARSED_IN_LOOP_BYTES:
            return await asyncio.to_thread(parse_object, answer)
        return parse_object(answer)

    def version(self, *, timeouts: Timeouts | None = None) -> str:
        """Return the server's version, "" if it names none."""
        return str(parse_object(self._post("/api/version", None, timeouts)).get("version", ""))

    async def aversion(self, *, timeouts: Timeouts | None = None) -> str:
        """Return the server's version, "" if it names none."""
        return str(parse_object(await self._apost("/api/version", None, timeouts)).get("version", ""))

    def tags(self, *, timeouts: Timeouts | None = None) -> list[dict[str, Any]]:
        """Return the models that the server has."""
        return _models(self._post("/api/tags", None, timeouts))

    async def atags(self, *, timeouts: Timeouts | None = None) -> list[dict[str, Any]]:
        """Return the models that the server has."""
        return _models(await self._apost("/api/tags", None, timeouts))

    def ps(self, *, timeouts: Timeouts | None = None) -> list[dict[str, Any]]:
        """Return the models that are loaded."""
        return _models(self._post("/api/ps", None, timeouts))

    async def aps(self, *, timeouts: Timeouts | None = None) -> list[dict[str, Any]]:
        """Return the models that are loaded."""
        return _models(await self._apost("/api/ps", None, timeouts))

    def show(self, model: str, *, verbose: bool = False, timeouts: Timeouts | None = None) -> dict[str, Any]:
        """Return what the server knows about a model; `verbose`: with lists, e.g. of all its tokens."""
        body = {"model": model, "verbose": True} if verbose else {"model": model}
        return parse_object(self._post("/api/show", body, timeouts))

    async def ashow(self, model: str, *, verbose: bool = False, timeouts: Timeouts | None = None) -> dict[str, Any]:
        """Return what the server knows about a model; `verbose`: with lists, e.g. of all its tokens."""
        body = {"model": model, "verbose": True} if verbose else {"model": model}
        return parse_object(await self._apost("/api/show", body, timeouts))

    def close(self) -> None:
        """Close the connections of the threads; a later call opens new ones."""
        with self._lock:
            closer, self._http, self._closer = self._closer, None, None
        if closer is not None:
            closer()

    async def aclose(self) -> None:
        """Close the connections of the running event loop, and those of the threads."""
        await self._ahttp.aclose()
        self.close()

    # -- one request --

    def _post(self, path: str, body: Mapping[str, Any] | None, timeouts: Timeouts | None, retries: int = 0) -> bytes:
        bounds = timeouts or self.timeouts
        sent = None if body is None else _encode(body)
        for attempt in attempts(bounds, retries):
            progress = ChatParts()
            try:
                with (
                    translated(self.base_url, progress),
                    attempt.blocking(),
                    self._sync().stream(
                        "GET" if sent is None else "POST",
                        self._url(path),
                        content=sent,
                        timeout=bounds.of_http(whole=True),
                    ) as response,
                ):
                    progress.begun = response.is_success
                    return self._checked(response, _collect(response, attempt), body)
            except AegisError as exc:
                time.sleep(attempt.wait_s(exc, progress.begun))
        raise AssertionError("the last attempt raises")

    async def _apost(
        self, path: str, body: Mapping[str, Any] | None, timeouts: Timeouts | None, retries: int = 0
    ) -> bytes:
        bounds = timeouts or self.timeouts
        sent = None if body is None else _encode(body)
        client = await self._async()
        for attempt in attempts(bounds, retries):
            progress = ChatParts()
            try:
                async with attempt.bound():
                    with translated(self.base_url, progress):
                        async with client.stream(
                            "GET" if sent is None else "POST",
                            self._url(path),
                            content=sent,
                            timeout=bounds.of_http(whole=True),
                        ) as response:
                            progress.begun = response.is_success
                            return self._checked(response, await _acollect(response), body)
            except AegisError as exc:
                await asyncio.sleep(attempt.wait_s(exc, progress.begun))
        raise AssertionError("the last attempt raises")

    def _checked(self, response: httpx.Response, text: bytes, body: Mapping[str, Any] | None) -> bytes:
        if not response.is_success:
            raise self._refusal(response, text, (body or {}).get("model"))
        _check_encoding(response)
        return text

    def _refusal(self, response: httpx.Response, text: bytes, model: str | None) -> AegisError:
        return refusal(response.status_code, response.headers, text, url=self.base_url, model=model)

    def _url(self, path: str) -> str:
        return self.base_url + path

    def _sync(self) -> httpx.Client:
        client = self._http
        if client is None:
            with self._lock:
                if self._http is None:
                    self._http = bounded(httpx.Client(**self._options(self._sync_options)))
                    self._closer = weakref.finalize(self, self._http.close)
                client = self._http
        return client

    async def _async(self) -> httpx.AsyncClient:
        if self._tls and "verify" not in self._async_options and not _trusted.cache_info().currsize:
            await asyncio.to_thread(_trusted)
        return self._ahttp.get()

    def _make_async(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(**self._options(self._async_options))

    def _options(self, own: Mapping[str, Any]) -> dict[str, Any]:
        headers = {name.lower(): value for name, value in (own.get("headers") or {}).items()}
        tls = {} if "verify" in own else {"verify": _trusted() if self._tls else _untrusting()}
        return {**self._common, **tls, **own, "headers": {**self._common["headers"], **headers}}


def shared_client(base_url: str, headers: Mapping[str, str] | None = None) -> OllamaClient:
    """Return the process's client for an address, so that all models of it share connections.

    Raises:
        AegisConfigError: `base_url` is no http address.
    """
    key = (base_url, *sorted((headers or {}).items()))
    with _shared_lock:
        client = _shared.get(key)
        if client is None:
            client = _shared[key] = OllamaClient(base_url, headers=headers)
        _shared.move_to_end(key)
        while len(_shared) > _MAX_SHARED:  # whoever still uses it keeps it
            _shared.popitem(last=False)
        return client


_shared: OrderedDict[tuple[Any, ...], OllamaClient] = OrderedDict()
_shared_lock = threading.Lock()
_living: weakref.WeakSet[OllamaClient] = weakref.WeakSet()


def _after_fork() -> None:
    """Forget connections that belong to the parent; using them would mix two processes' answers."""
    global _shared_lock
    _shared_lock = threading.Lock()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the parent closes them
        for client in list(_living):
            if client._closer is not None:
                client._closer.detach()
            client._ahttp.forget()
            client._start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _remake(
    base_url: str,
    headers: Mapping[str, str] | None,
    timeouts: Timeouts | None,
    sync_options: Mapping[str, Any] | None,
    async_options: Mapping[str, Any] | None,
) -> OllamaClient:
    return OllamaClient(
        base_url, headers=headers, timeouts=timeouts, sync_options=sync_options, async_options=async_options
    )


def _encode(body: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(body)
    except (TypeError, ValueError) as exc:  # lone surrogates, integers beyond 64 bits, objects
        raise AegisRequestError(f"the request cannot be written as JSON: {exc}") from exc


def _check_encoding(response: httpx.Response) -> None:
    encoding = response.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise AegisServerError(f"the server sent a {encoding} body although none was asked for", retryable=False)


def _collect(response: httpx.Response, attempt: Attempt) -> bytes:
    body = bytearray()
    for piece in response.iter_raw():
        body += piece
        if _is_enough(response, body):
            break
        attempt.check()
    return bytes(body)


async def _acollect(response: httpx.Response) -> bytes:
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if _is_enough(response, body):
            break
    return bytes(body)


def _is_enough(response: httpx.Response, body: bytearray) -> bool:
    if response.is_success and len(body) > MAX_TOTAL_BYTES:
        raise AegisServerError(f"the server's answer is longer than {MAX_TOTAL_BYTES} bytes", retryable=False)
    return not response.is_success and len(body) >= _MAX_ERROR_BYTES  # of an error, the beginning is enough


def _models(body: bytes) -> list[dict[str, Any]]:
    models = parse_object(body).get("models")
    return [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []
