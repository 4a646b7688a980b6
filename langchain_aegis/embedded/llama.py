"""An engine that runs the two small models, SmolLM2-135M by llama.cpp, MiniLM by onnxruntime.

Meant for a process of its own (see `ollama.py`): llama.cpp's threads and memory are not the application's.
llama.cpp's own HTTP server does the generating; it listens on loopback and answers only to a key made for this run.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Self

import httpx

from langchain_aegis.embedded.scripted_slots import Slots
from langchain_aegis.embedded.wire_engine import (
    Embedding,
    End,
    EngineError,
    Generation,
    Message,
    ModelCard,
    Piece,
    Vectors,
)
from langchain_aegis.embedded.wire_window import kept, overflow, shorter
from langchain_aegis.errors import AegisConfigError

WINDOW = 4096  # tokens per slot, Ollama's own default; 4 slots of this size take 380 MB
SLOTS = 4
_PROMPT_CACHE_MIB = 256  # prompts that lost their slot are kept in memory, as Ollama does
_TEMPLATE = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
_CHAT = ModelCard(
    name="smollm2:135m", capabilities=("completion",), context_length=8192, embedding_length=576, family="llama",
    parameter_size="134.52M", quantization="Q4_1", file_bytes=98_362_432, template=_TEMPLATE, license="Apache-2.0",
    digest="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)  # fmt: skip
_EMBEDDING = ModelCard(
    name="all-minilm:latest", capabilities=("embedding",), context_length=256, embedding_length=384, family="bert",
    parameter_size="22.57M", quantization="INT8", file_bytes=22_928_619, license="Apache-2.0",
    digest="8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
)  # fmt: skip
_DIED = (
    "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error, check "
    "ollama server logs for details"
)
# Between tokens the small model likes to write white space without end.
_COMPACT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}


class LlamaEngine:
    """`smollm2:135m` and `all-minilm`; any other model is not found.

    Made by `start`. The window is 4,096 tokens for each of four slots, whatever larger `num_ctx` is asked for. Tools
    are not supported, as with an Ollama model whose template has none.
    """

    def __init__(self, server: Any, key: str) -> None:
        self._server = server  # lives as long as it is referenced
        self._slots = Slots(SLOTS)
        self._client = httpx.AsyncClient(
            base_url=server.listening_address,
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(None, connect=10),  # reading a long prompt takes as long as it takes
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=SLOTS),
            trust_env=False,
        )
        self._tokenizer: Any = None

    @classmethod
    async def start(cls, weights: Path) -> Self:
        """Load the weights (0.6 to 5 s).

        Args:
            weights: A GGUF file.

        Raises:
            AegisConfigError: llama.cpp is not installed, or a library that it needs is missing.
        """
        key = secrets.token_hex(16)
        server = await asyncio.to_thread(_llama_server, weights, key)
        return cls(server, key)

    @property
    def cards(self) -> Sequence[ModelCard]:
        """The two models."""
        return (_CHAT, _EMBEDDING)

    def window(self, card: ModelCard, num_ctx: int | None) -> int:
        """Return the tokens for prompt and answer."""
        most = min(card.context_length, WINDOW)
        return min(max(num_ctx, 4), most) if num_ctx else most

    async def load(self, card: ModelCard, runner: Mapping[str, Any]) -> None:
        """Load the embedding model; the other one is there from the start."""
        if card is _EMBEDDING:
            await asyncio.to_thread(self._load_tokenizer)
            await self.embed(Embedding(model=card, texts=("warm",)))

    async def generate(self, request: Generation) -> AsyncGenerator[Piece | End, None]:
        """Yield what llama.cpp generates."""
        window = self.window(request.model, request.options.get("num_ctx"))
        try:
            prompt = await self._prompt(request, window)
            body = _body(request, prompt, window)
            async with self._slots.one(), aclosing(self._events(body)) as events:
                said = ""
                async for event in events:
                    said += event.get("content", "")
                    if event.get("content"):
                        yield Piece(content=event["content"], logprobs=_logprobs(event, request.top_logprobs))
                    if event.get("stop"):
                        yield await self._end(request, prompt, said, event)
                        return
        except httpx.HTTPError as exc:
            raise EngineError(500, _DIED) from exc
        raise EngineError(500, _DIED)

    async def embed(self, request: Embedding) -> Vectors:
        """Return MiniLM's vectors, made in a thread."""
        from langchain_aegis.embedded.minilm import MiniLMEmbeddings

        def run() -> Vectors:
            counts = [len(encoded) for encoded in self._load_tokenizer().encode_batch(list(request.texts))]
            limit = self.window(request.model, request.options.get("num_ctx"))
            if not request.truncate and max(counts) > limit:
                raise EngineError(400, "the input length exceeds the context length")
            vectors = MiniLMEmbeddings().embed_documents(list(request.texts))
            return Vectors(vectors=vectors, tokens=sum(min(count, limit) for count in counts))

        return await asyncio.to_thread(run)

    async def aclose(self) -> None:
        """Close the connections to llama.cpp and let it go."""
        await self._client.aclose()
        self._server = None

    async def _prompt(self, request: Generation, window: int) -> str | list[int]:
        """Return the prompt, as text, or as tokens if it had to be cut."""
        before = await self._before(request)
        text = before + _rendered(request, request.messages)
        if len(text) < window:  # no token is shorter than a character
            return text
        tokens = await self._tokens(text)
        if not request.truncate:
            if len(tokens) >= window:
                raise overflow(len(tokens), window)
            return text
        if len(tokens) > window and not request.raw:
            for messages in shorter(request.messages):
                text = before + _rendered(request, messages)
                tokens = await self._tokens(text)
                if len(tokens) <= window:
                    break
        if len(tokens) < window:
            return text
        first, last = kept(len(tokens), window, request.options["num_keep"], shift=request.shift)
        return [*tokens[:first], *tokens[len(tokens) - last :]]

    async def _before(self, request: Generation) -> str:
        if not request.before:
            return ""
        answer = await self._client.post("/detokenize", json={"tokens": request.before})
        return str(answer.json()["content"])

    async def _tokens(self, text: str) -> list[int]:
        answer = await self._client.post("/tokenize", json={"content": text, "add_special": True})
        tokens: list[int] = answer.json()["tokens"]
        return tokens

    async def _events(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of one completion; leaving early closes the connection, and llama.cpp stops."""
        async with self._client.stream("POST", "/completion", json=body) as response:
            if response.status_code >= 400:
                raise EngineError(response.status_code, (await response.aread()).decode().strip())
            async for text in response.aiter_lines():
                if text.startswith("data: ") and text != "data: [DONE]":
                    event: dict[str, Any] = json.loads(text.removeprefix("data: "))
                    if error := event.get("error"):
                        raise EngineError(500, str(error.get("message", error) if isinstance(error, dict) else error))
                    yield event

    async def _end(self, request: Generation, prompt: str | list[int], said: str, event: Mapping[str, Any]) -> End:
        timings = event["timings"]
        context: list[int] = []
        if request.context:
            context = [*(prompt if isinstance(prompt, list) else await self._tokens(prompt)), *await self._tokens(said)]
        return End(
            reason="length" if event.get("stop_type") == "limit" else "stop",
            prompt_tokens=timings["cache_n"] + timings["prompt_n"],
            prompt_ns=int(timings["prompt_ms"] * 1_000_000),
            tokens=timings["predicted_n"],
            tokens_ns=int(timings["predicted_ms"] * 1_000_000),
            context=tuple(context),
        )

    def _load_tokenizer(self) -> Any:
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(Path(__file__).with_name("tokenizer.json")))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            self._tokenizer = tokenizer
        return self._tokenizer


def why_not(exc: ImportError) -> str:
    """Say in one line why llama.cpp cannot be loaded, and what to do."""
    if "libgomp" in str(exc):
        return "The embedded model needs the system library libgomp.so.1; run: apt-get install libgomp1"
    return f"The embedded model is not installed ({exc}); run: pip install 'langchain-aegis[embedded]'"


def _llama_server(weights: Path, key: str) -> Any:
    try:
        import xllamacpp
    except ImportError as exc:
        raise AegisConfigError(why_not(exc)) from exc
    params = xllamacpp.CommonParams()
    params.model.path = str(weights)
    params.n_ctx = WINDOW * SLOTS
    params.n_parallel = SLOTS
    params.n_batch = params.n_ubatch = 512
    params.cache_ram_mib = _PROMPT_CACHE_MIB
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = _threads()
    params.fit_params = False  # there is no GPU to fit anything into
    params.warmup = False
    params.ui = False
    params.verbosity = -1
    params.api_keys = [key]
    try:
        return xllamacpp.Server(params)
    except RuntimeError as exc:
        raise AegisConfigError(f"llama.cpp cannot load {weights}: {exc}") from exc


def _threads() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, 8)


def _rendered(request: Generation, messages: Sequence[Message]) -> str:
    if request.raw:
        return str(messages[-1]["content"])
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def _body(request: Generation, prompt: str | list[int], window: int) -> dict[str, Any]:
    options = request.options
    tokens = options["num_predict"]
    body = {
        "prompt": prompt,
        "stream": True,
        "cache_prompt": True,
        # Ollama would go on for ten windows; the smallest of models says nothing new after one.
        "n_predict": window if tokens < 0 else min(tokens, window),
        "n_keep": options["num_keep"],
        "stop": list(options["stop"]),
        "seed": options["seed"],
    }
    same = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_last_n", "repeat_penalty",
            "presence_penalty", "frequency_penalty")  # fmt: skip
    names = {"typical_p": "typ_p"}
    body |= {names.get(name, name): options[name] for name in same}
    if request.logprobs:
        body["n_probs"] = max(request.top_logprobs, 1)
    if request.format is not None:
        schema = {"type": "object"} if request.format == "json" else _closed(request.format, request.format)
        body["json_schema"] = {**schema, **_COMPACT}
    return body


def _closed(schema: Any, root: Any) -> Any:
    """Return the schema with objects that hold what they declare and nothing else, as Ollama's grammar has it.

    Raises:
        EngineError: 400: a part cannot be used; llama.cpp would silently ignore the whole schema.
    """
    if isinstance(schema, list):
        return [_closed(part, root) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    if isinstance(ref := schema.get("$ref"), str) and not _resolves(ref, root):
        raise EngineError(400, f"failed to parse grammar: {ref} cannot be resolved")
    if isinstance(pattern := schema.get("pattern"), str):
        try:
            re.compile(pattern)
        except re.error as exc:
            raise EngineError(400, f"failed to parse grammar: pattern {pattern!r}: {exc}") from exc
    kept = ("enum", "const", "default", "examples", "required")
    closed = {name: part if name in kept else _closed(part, root) for name, part in schema.items()}
    if isinstance(schema.get("properties"), Mapping) and "additionalProperties" not in schema:
        closed["additionalProperties"] = False
    return closed


def _resolves(ref: str, root: Any) -> bool:
    if not ref.startswith("#"):
        return False
    for part in ref.removeprefix("#").strip("/").split("/") if ref != "#" else ():
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(root, Mapping) or name not in root:
            return False
        root = root[name]
    return True


def _logprobs(event: Mapping[str, Any], top: int) -> tuple[dict[str, Any], ...]:
    def one(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {"token": entry["token"], "logprob": entry["logprob"], "bytes": entry["bytes"]}

    found = []
    for entry in event.get("completion_probabilities", ()):
        ranked = [one(other) for other in entry.get("top_logprobs", ())][:top]
        found.append({**one(entry), **({"top_logprobs": ranked} if ranked else {})})
    return tuple(found)
