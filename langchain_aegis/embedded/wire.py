"""An ASGI application that speaks Ollama's HTTP API for any engine.

Bytes, statuses and error texts are those of Ollama 0.33, as measured and as its source says: newline-delimited JSON,
integer nanoseconds, zero values left out, three wordings of "not found".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from langchain_aegis.embedded import wire_answers as answers
from langchain_aegis.embedded.wire_catalog import Catalog
from langchain_aegis.embedded.wire_engine import (
    Embedding,
    End,
    Engine,
    EngineError,
    Generation,
    ModelCard,
    Piece,
)
from langchain_aegis.embedded.wire_exchange import Exchange, Reply
from langchain_aegis.embedded.wire_faults import Seen, Witness
from langchain_aegis.embedded.wire_json import GoSyntaxError, decode, encode, float32_lists
from langchain_aegis.embedded.wire_pull import Pulls
from langchain_aegis.embedded.wire_requests import Refused, full_name, options, output_format, parse, valid_name
from langchain_aegis.embedded.wire_residency import Residency

VERSION = "0.33.0"
_LOOPBACK_HOSTS = {"localhost", "127.0.0.1", "[::1]"}
_GENERATING = {"/api/chat": "chat", "/api/generate": "generate"}

Handler = Callable[[bytes, int], Awaitable[Reply]]


class OllamaWire:
    """The application. Give it to an ASGI server, or to an ASGI transport.

    Args:
        engine: Generates the text and the vectors.
        witness: Told of every request; may let it fail.
        hosts: Accepted names in the `Host` header: a web page that resolves its own name to loopback is refused. None
            accepts any.
        residency: Keeps account of what is loaded.
        pulls: What can be downloaded; by default nothing beyond what is there.
    """

    def __init__(
        self, engine: Engine, *, witness: Witness | None = None, hosts: set[str] | None = _LOOPBACK_HOSTS,
        residency: Residency | None = None, pulls: Pulls | None = None,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._pulls = pulls or Pulls(engine)
        self._witness = witness
        self._hosts = hosts
        self._residency = residency or Residency(engine)
        self._catalog = Catalog(engine, self._residency)
        posts: dict[str, Handler] = {
            "/api/chat": self._chat,
            "/api/generate": self._generate,
            "/api/embed": self._embed,
            "/api/embeddings": self._embeddings,
            "/api/show": self._show,
            "/api/pull": self._pull,
        }
        gets: dict[str, Handler] = {
            "/api/tags": self._tags,
            "/api/ps": self._ps,
            "/api/version": self._version,
        }
        self._app = Starlette(
            routes=[
                Route("/", _greeting, methods=["GET"]),
                *(Route(path, self._endpoint(handler), methods=["POST"]) for path, handler in posts.items()),
                *(Route(path, self._endpoint(handler), methods=["GET"]) for path, handler in gets.items()),
            ],
            exception_handlers={HTTPException: _unknown_route},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if self._hosts is not None and scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
            if host and host.rpartition(":")[0] not in self._hosts and host not in self._hosts:
                await Response(status_code=403)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _endpoint(self, handler: Handler) -> Callable[[Request], Awaitable[Any]]:
        async def endpoint(request: Request) -> Any:
            started = time.perf_counter_ns()
            try:
                body = await request.body()
            except ClientDisconnect:  # nobody is left to answer
                return Response(status_code=400)
            seen = Seen(method=request.method, path=request.url.path, headers=dict(request.headers), body=_object(body))
            fault = self._witness.arrived(seen) if self._witness else None
            return Exchange(lambda: handler(body, started), seen, fault, self._witness)

        return endpoint

    # Text

    async def _chat(self, body: bytes, started: int) -> Reply:
        asked = parse("/api/chat", body)
        card = self._find(asked, empty=Refused(400, "model is required"))
        messages = [_message(message) for message in asked.get("messages", ())]
        return await self._text("/api/chat", asked, card, messages, started)

    async def _generate(self, body: bytes, started: int) -> Reply:
        asked = parse("/api/generate", body)
        card = self._find(asked, empty=Refused(404, f"model '{asked.get('model', '')}' not found"))
        if asked.get("raw") and (asked.get("template") or asked.get("system") or asked.get("context")):
            raise Refused(400, "raw mode does not support template, system, or context")
        messages = []
        if prompt := asked.get("prompt", ""):
            if system := asked.get("system"):
                messages.append({"role": "system", "content": system})
            messages.append({"role": "user", "content": prompt})
        return await self._text("/api/generate", asked, card, messages, started)

    async def _text(
        self, path: str, asked: Mapping[str, Any], card: ModelCard, messages: list[dict[str, Any]], started: int
    ) -> Reply:
        keep_alive: int | None = asked.get("keep_alive")
        if not messages and keep_alive == 0:
            self._residency.unload(card.name)
            return answers.idle(path, asked["model"], "unload")
        think = _think(asked, card)
        wanted = ["completion"]
        wanted += ["tools"] * bool(asked.get("tools"))
        wanted += ["insert"] * bool(asked.get("suffix"))
        _require(card, wanted, asked["model"], _GENERATING[path])
        run = options(asked.get("options", {}))
        shift = asked.get("shift", True)
        if not messages:
            async with self._residency.using(card, run, shift=shift, keep_alive_ns=keep_alive):
                return answers.idle(path, asked["model"], "load")
        generation = Generation(
            model=card,
            messages=tuple(messages),
            tools=tuple(asked.get("tools", ())),
            format=output_format(asked.get("format")),
            think=think,
            options=run,
            truncate=asked.get("truncate", True),
            shift=shift,
            logprobs=asked.get("logprobs", False),
            top_logprobs=asked.get("top_logprobs", 0),
            suffix=asked.get("suffix", ""),
            raw=asked.get("raw", False),
            before=tuple(token for token in asked.get("context", ()) if isinstance(token, int)),
            context=path == "/api/generate" and not asked.get("raw"),
        )
        parts = self._parts(generation, keep_alive, started)
        if asked.get("stream", True):
            return _lines(path, asked["model"], parts)
        whole = answers.Whole(path, asked["model"])
        async with aclosing(parts):
            async for part in parts:
                if isinstance(part, Piece):
                    whole.add(part)
                else:
                    return whole.complete(*part)
        raise EngineError(500, "unexpected response")

    async def _parts(
        self, generation: Generation, keep_alive_ns: int | None, started: int
    ) -> AsyncGenerator[Piece | tuple[End, answers.Clock], None]:
        """Yield the pieces, then the end with the times that the request took."""
        async with self._residency.using(
            generation.model, generation.options, shift=generation.shift, keep_alive_ns=keep_alive_ns
        ):
            loaded = time.perf_counter_ns()
            async with aclosing(self._engine.generate(generation)) as parts:
                async for part in parts:
                    if isinstance(part, End):
                        yield part, answers.Clock(loaded - started, time.perf_counter_ns() - started)
                        return
                    yield part

    # Vectors

    async def _embed(self, body: bytes, started: int) -> Reply:
        asked = parse("/api/embed", body)
        model = asked.get("model", "")
        if not model:
            raise Refused(404, f"model '{model}' not found")
        given = asked.get("input")
        texts = [given] if isinstance(given, str) and given else given or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Refused(400, "invalid input type")
        card = self._find(asked, unknown=f'model "{model}" not found, try pulling it first')
        run = options(asked.get("options", {}))
        async with self._residency.using(card, run, keep_alive_ns=asked.get("keep_alive")):
            loaded = time.perf_counter_ns()
            if not texts:
                return {"model": model, "embeddings": []}
            _require_embedding(card)
            found = await self._engine.embed(
                Embedding(model=card, texts=tuple(texts), options=run, truncate=asked.get("truncate", True))
            )
        vectors = found.vectors
        if 0 < asked.get("dimensions", 0) < len(vectors[0]):
            vectors = [_normalised(vector[: asked["dimensions"]]) for vector in vectors]
        # Writing a large batch takes long enough to hold up other requests.
        numbers = await asyncio.to_thread(float32_lists, vectors) if len(vectors) > 8 else float32_lists(vectors)
        total = time.perf_counter_ns() - started
        head = encode({"model": model})[:-1] + b',"embeddings":' + numbers
        tail = {"total_duration": total, "load_duration": loaded - started, "prompt_eval_count": found.tokens}
        return head + b"," + encode({name: value for name, value in tail.items() if value})[1:]

    async def _embeddings(self, body: bytes, started: int) -> Reply:
        asked = parse("/api/embeddings", body)
        model = asked.get("model", "")
        card = self._find(
            asked, empty=Refused(400, "model is required"), unknown=f'model "{model}" not found, try pulling it first'
        )
        run = options(asked.get("options", {}))
        async with self._residency.using(card, run, keep_alive_ns=asked.get("keep_alive")):
            if not asked.get("prompt"):
                return {"embedding": []}
            _require_embedding(card, status=500)
            found = await self._engine.embed(Embedding(model=card, texts=(asked["prompt"],), options=run))
        return b'{"embedding":' + float32_lists(found.vectors)[1:-1] + b"}"

    # Models

    async def _show(self, body: bytes, started: int) -> Reply:
        asked = parse("/api/show", body)
        asked["model"] = asked.get("model") or asked.get("name") or ""
        # This route alone names the model with its tag.
        card = self._find(
            asked,
            empty=Refused(400, "model is required"),
            unknown=f"model '{full_name(asked['model'])}' not found",
        )
        return self._catalog.show(card)

    async def _pull(self, body: bytes, started: int) -> Reply:
        asked = parse("/api/pull", body)
        name = asked.get("model") or asked.get("name") or ""
        if not valid_name(name):
            raise Refused(400, "invalid model name")
        lines = self._pulls.pull(name)
        if asked.get("stream", True):
            return _told(lines)
        async with aclosing(lines):
            async for _ in lines:
                pass
        return {"status": "success"}

    async def _tags(self, body: bytes, started: int) -> Reply:
        return self._catalog.tags()

    async def _ps(self, body: bytes, started: int) -> Reply:
        return self._catalog.running()

    async def _version(self, body: bytes, started: int) -> Reply:
        return {"version": VERSION}

    def _find(self, asked: Mapping[str, Any], *, empty: Refused | None = None, unknown: str = "") -> ModelCard:
        name = asked.get("model", "")
        if not name and empty is not None:
            raise empty
        if not valid_name(name):
            raise Refused(400, "invalid model name")
        wanted = full_name(name)
        for card in self._engine.cards:
            if card.name.lower() == wanted:
                return card
        raise Refused(404, unknown or f"model '{name}' not found")


async def _lines(
    path: str, model: str, parts: AsyncGenerator[Piece | tuple[End, answers.Clock], None]
) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(parts):
        async for part in parts:
            yield answers.piece(path, model, part) if isinstance(part, Piece) else answers.end(path, model, *part)


async def _told(lines: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(lines):
        async for told in lines:
            yield told


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in message.items() if value is not None}
    return {**kept, "role": str(kept.get("role", "")).lower(), "content": kept.get("content", "")}


def _think(asked: Mapping[str, Any], card: ModelCard) -> bool | str | None:
    value: bool | str | None = asked.get("think")
    if "thinking" in card.capabilities:
        return True if value is None else value
    if value:
        raise Refused(400, f'"{asked["model"]}" does not support thinking')
    return None


def _require(card: ModelCard, wanted: list[str], model: str, verb: str) -> None:
    missing = [capability for capability in wanted if capability not in card.capabilities]
    if "completion" in missing:
        raise Refused(400, f'"{model}" does not support {verb}')
    if missing:
        raise Refused(400, f"registry.ollama.ai/library/{card.name} does not support " + "\n".join(missing))


def _require_embedding(card: ModelCard, status: int = 501) -> None:
    if "embedding" not in card.capabilities:
        raise Refused(status, "This server does not support embeddings. Start it with `--embeddings`")


def _normalised(vector: Any) -> list[float]:
    norm = max(sum(value * value for value in vector) ** 0.5, 1e-12)
    return [value / norm for value in vector]


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        value = decode(body)
    except GoSyntaxError:
        return None
    return value if isinstance(value, dict) else None


async def _greeting(request: Request) -> Response:
    return PlainTextResponse("Ollama is running")


async def _unknown_route(request: Request, exc: Exception) -> Response:
    status = exc.status_code if isinstance(exc, HTTPException) else 404
    text = "405 method not allowed" if status == 405 else "404 page not found"
    return Response(text, status, media_type="text/plain")
