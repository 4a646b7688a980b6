"""A scripted server on OpenAI's wire, with vLLM's routes beside it, over a real socket; no model."""

import asyncio
import base64
import json
import struct
import threading

from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from langchain_aegis.embedded.wire_server import listen, loopback_socket
from langchain_aegis.embedded.wire_thread import LoopThread

MODEL = "llama-3.1-8b"


class OpenAIServer:
    """Serves one model, at most `max_num_seqs` requests at once; the rest waits, as in vLLM.

    Args:
        max_num_seqs: Requests that run at once.
        window: `max_model_len`.
        tells: Which of "slots" (llama.cpp's /props), "server_info" (vLLM's, in development mode) and "metrics" there
            is.
        api_key: What /v1 asks for.
    """

    def __init__(self, *, max_num_seqs=256, window=8192, tells=("metrics",), api_key=None, cache=True):
        self.max_num_seqs, self.window, self.tells, self.api_key = max_num_seqs, window, set(tells), api_key
        self.config = {"block_size": "16", "num_gpu_blocks": "4096", "gpu_memory_utilization": "0.9",
                       "enable_prefix_caching": str(cache)}  # fmt: skip
        self.prompts = {8192: 0}  # bound -> how many prompts were below it, for the histogram
        self.finished = {"stop": 0, "length": 0}
        self.requests = []  # (path, body) as they came
        self.begun = []  # bodies in the order in which they began to run
        self.running = self.waiting = self.most_running = 0
        self.end = "stop"  # finish_reason of the next answers; None: the answer breaks off without one
        self.status = None  # of the next answers, if it is an error
        self._free = asyncio.Event()
        self._free.set()
        self._changed = threading.Condition()

    def __enter__(self):
        self._thread = LoopThread("openai-server")
        self._slots = self._thread.call(lambda: asyncio.Semaphore(self.max_num_seqs))
        socket = loopback_socket()
        self.root = f"http://127.0.0.1:{socket.getsockname()[1]}"
        self.base_url = f"{self.root}/v1"
        self._listener = self._thread.run(listen(self._app(), socket))
        return self

    def __exit__(self, *_):
        self._thread.run(self._listener.aclose())
        self._thread.stop()

    @property
    def chats(self):
        return [body for path, body in self.requests if path == "/v1/chat/completions"]

    def hold(self):
        """Let no answer end until `release`."""
        self._thread.call(self._free.clear)

    def release(self):
        self._thread.call(self._free.set)

    def wait_for(self, true, timeout_s=10):
        """Wait until `true(self)`."""
        with self._changed:
            assert self._changed.wait_for(lambda: true(self), timeout_s), (self.running, self.waiting)

    def _app(self):
        routes = [("/v1/models", self._models), ("/version", self._version), ("/health", self._health),
                  ("/v1/chat/completions", self._chat), ("/v1/embeddings", self._embeddings)]  # fmt: skip
        if "metrics" in self.tells:
            routes.append(("/metrics", self._metrics))
        if "slots" in self.tells:
            routes.append(("/props", self._props))
        if "server_info" in self.tells:
            routes.append(("/server_info", self._info))
        return Starlette(routes=[Route(path, handler, methods=["GET", "POST"]) for path, handler in routes])

    async def _taken(self, request):
        body = json.loads(await request.body() or "{}")
        with self._changed:
            self.requests.append((request.url.path, body))
            self._changed.notify_all()
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return body, JSONResponse({"error": "Unauthorized"}, 401)
        if self.status:
            return body, JSONResponse({"error": {"message": "told to fail", "type": "x"}}, self.status)
        return body, None

    async def _models(self, request):
        _, refused = await self._taken(request)
        card = {"id": MODEL, "object": "model", "created": 1, "owned_by": "vllm", "root": "meta-llama/Llama-3.1-8B",
                "max_model_len": self.window}  # fmt: skip
        return refused or JSONResponse({"object": "list", "data": [card]})

    async def _version(self, request):
        return JSONResponse({"version": "0.33.0"})

    async def _health(self, request):
        return PlainTextResponse("")

    async def _props(self, request):
        return JSONResponse({"total_slots": self.max_num_seqs, "default_generation_settings": {"n_ctx": self.window}})

    async def _info(self, request):
        config = {"scheduler_config": {"max_num_seqs": self.max_num_seqs}, "parallel_config": {"data_parallel_size": 1}}
        return JSONResponse({"vllm_config": config if request.query_params.get("config_format") == "json" else "text"})

    async def _metrics(self, request):
        of = f'{{engine="0",model_name="{MODEL}"}}'
        config = ",".join(f'{name}="{value}"' for name, value in self.config.items())
        lines = [
            "# HELP vllm:num_requests_running Number of requests in model execution batches.",
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running{of} {float(self.running)}",
            f"vllm:num_requests_waiting{of} {float(self.waiting)}",
            f"vllm:kv_cache_usage_perc{of} 0.25",
            f"vllm:num_preemptions_total{of} 0.0",
            f"vllm:prefix_cache_queries_total{of} 1000.0",
            f"vllm:prefix_cache_hits_total{of} 600.0",
            f'vllm:cache_config_info{{{config},engine="0"}} 1.0',
        ]
        for reason, count in self.finished.items():
            lines.append(f'vllm:request_success_total{{engine="0",finished_reason="{reason}"}} {float(count)}')
        most = max(self.prompts.values())
        for bound, count in [*sorted(self.prompts.items()), ("+Inf", most)]:
            lines.append(f'vllm:request_prompt_tokens_bucket{{engine="0",le="{bound}"}} {float(count)}')
        return PlainTextResponse("\n".join(lines) + "\n")

    async def _chat(self, request):
        body, refused = await self._taken(request)
        if refused:
            return refused
        if body["model"] != MODEL:
            return JSONResponse({"error": {"message": "The model does not exist.", "type": "NotFoundError"}}, 404)
        said = "About " + str(body["messages"][-1]["content"]).strip().rpartition("\n")[2][:80]
        if not body.get("stream"):
            await self._run(body)
            message = {"role": "assistant", "content": said}
            answer = {"index": 0, "message": message, "finish_reason": self.end}
            return JSONResponse({**_head("chat.completion"), "choices": [answer], "usage": _usage(said)})
        return StreamingResponse(self._events(request, body, said), media_type="text/event-stream")

    async def _events(self, request, body, said):
        await self._run(body)
        for word in said.split(" "):
            yield _event({"delta": {"role": "assistant", "content": word + " "}, "index": 0, "finish_reason": None})
        if self.end is None:
            request.scope["state"]["cut"]()
            return
        yield _event({"delta": {}, "index": 0, "finish_reason": self.end})
        yield f"data: {json.dumps({**_head('chat.completion.chunk'), 'choices': [], 'usage': _usage(said)})}\n\n"
        yield "data: [DONE]\n\n"

    async def _run(self, body):
        self._count(waiting=1)
        try:
            async with self._slots:
                self._count(waiting=-1, running=1, begun=body)
                try:
                    await self._free.wait()
                finally:
                    self._count(waiting=1, running=-1)
        finally:
            self._count(waiting=-1)

    def _count(self, *, waiting=0, running=0, begun=None):
        with self._changed:
            self.waiting += waiting
            self.running += running
            self.most_running = max(self.most_running, self.running)
            if begun is not None:
                self.begun.append(begun)
            self._changed.notify_all()

    async def _embeddings(self, request):
        body, refused = await self._taken(request)
        if refused:
            return refused
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        await self._run(body)
        rows = [{"object": "embedding", "index": i, "embedding": _vector(text)} for i, text in enumerate(texts)]
        if body.get("encoding_format") == "base64":
            for row in rows:
                row["embedding"] = base64.b64encode(
                    struct.pack(f"<{len(row['embedding'])}f", *row["embedding"])
                ).decode()
        return JSONResponse(
            {"object": "list", "data": rows, "model": body["model"], "usage": {"prompt_tokens": 1, "total_tokens": 1}}
        )


def _vector(text):
    """Texts are as near as the words that they share."""
    vector = [0.0] * 128
    for word in str(text).lower().strip("?!. ").split():
        vector[sum(word.encode()) * 7 % 128] += 1.0
    return vector


def _head(kind):
    return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": MODEL}


def _usage(said):
    made = len(said.split())
    return {"prompt_tokens": 7, "completion_tokens": made, "total_tokens": 7 + made}


def _event(choice):
    return f"data: {json.dumps({**_head('chat.completion.chunk'), 'choices': [choice]})}\n\n"


async def closed(*models):
    """Close the connections of models of langchain-openai and langchain-ollama, which they leave to the collector."""
    from langchain_openai.chat_models import _client_utils

    for model in models:
        if hasattr(model, "root_client"):  # the connections are those of all models of an address
            model.root_client.close()
            await model.root_async_client.close()
        elif hasattr(model, "async_client"):
            model.client._client.close()
            await model.async_client._client.close()
        elif type(model).__name__ == "ChatOllama":
            model._client._client.close()
            await model._async_client._client.aclose()
    _client_utils._cached_sync_httpx_client.cache_clear()
    _client_utils._cached_async_httpx_client.cache_clear()
