"""A scripted Ollama for the tests of applications: no model, no network beyond loopback, the same answers every time.

Needs `pip install 'langchain-aegis[testing]'`.

    from langchain_aegis.testing import ScriptedOllama

    def test_the_answer_is_shown():
        with ScriptedOllama("qwen3:8b") as server:
            model = ChatAegis("qwen3:8b", base_url=server.base_url, temperature=0)
            assert "capital France" in model.invoke("What is the capital of France?").text
            assert server.requests[0].body["options"]["temperature"] == 0

    def test_an_outage_is_survived():
        with ScriptedOllama() as server:
            server.fail(503, times=2)                      # the next two requests
            server.fail("cut", after=3, when=lambda seen: "Paris" in seen.text)
            ...

What it answers is made from the request: text that quotes the question's words, the call of the tool whose name and
description fit best, JSON that satisfies the schema, vectors that are near when texts share words. At temperature 0,
or with a seed, the same request has the same answer; otherwise parts of it change from call to call.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

try:
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as exc:
    raise ImportError(f"{exc}; run: pip install 'langchain-aegis[testing]'", name=exc.name) from exc

from langchain_aegis.embedded.scripted import DEFAULT_MODELS, Counters, ScriptedEngine, ScriptedModel
from langchain_aegis.embedded.wire import OllamaWire
from langchain_aegis.embedded.wire_faults import Fault, FaultKind, Seen
from langchain_aegis.embedded.wire_pull import Pulls
from langchain_aegis.embedded.wire_residency import Residency
from langchain_aegis.embedded.wire_server import Listener, listen, loopback_socket
from langchain_aegis.embedded.wire_thread import LoopThread
from langchain_aegis.embedded.wire_transport import InProcessAsyncTransport, InProcessTransport
from langchain_aegis.errors import AegisConfigError, AegisTimeoutError

if TYPE_CHECKING:
    import httpx

__all__ = ["Fault", "ScriptedModel", "ScriptedOllama", "Seen"]

_WORK = ("/api/chat", "/api/generate", "/api/embed", "/api/embeddings")


@dataclass
class _Rule:
    fault: Fault
    left: int | None
    when: Callable[[Seen], bool] | None
    paths: tuple[str, ...]


class ScriptedOllama:
    """An Ollama server in a background thread, reached over a loopback socket or without one.

    Use it as a context manager, sync or async, or call `start` and `close`. `transport` and `async_transport` need no
    `start`. After `close`, `start` serves on the same port again, as a server does that was restarted.

    Args:
        models: Names to list beside `scripted:latest` and `scripted-embed:latest`; a name that holds `embed`, `minilm`
            or `bge` makes vectors. A `ScriptedModel` says more: that it thinks, has no tools, how large its window is.
            Any other name is answered with 404.
        registry: Models that are not there and can be pulled; the bytes that came are kept when a pull breaks off.
        pull_bytes_per_s: Speed of a pull; 0: no delay.
        slots: Generations of each model at the same time; more requests wait in the order in which they came.
            Embedding models have one slot.
        max_waiting: More waiting requests are refused with 503; None: any number may wait, as in Ollama.
        tokens_per_s: Speed of each generation; 0: no delay.
        prefill_tokens_per_s: Speed of reading the part of a prompt that neither a slot nor the host's cache knows;
            0: no delay.
        load_s: Seconds that loading a model takes.
        request_s: Seconds that every request costs beside all this.
        host_cache: Whether what a slot gives up is kept in the host's memory and comes back, as in Ollama from 0.30 on.
        knows_truncate: False for an old server, which cuts a prompt that is too long although it was told not to.
        max_queue: More requests that wait for a model to be loaded are refused with 503 (`OLLAMA_MAX_QUEUE`). Those
            for a model that is loaded as they want it are not counted.
        max_loaded: Models loaded at the same time (`OLLAMA_MAX_LOADED_MODELS`); None: all.
        words: Length of an answer, about.
    """

    def __init__(
        self,
        models: str | ScriptedModel | Sequence[str | ScriptedModel] = (),
        *,
        registry: Sequence[str | ScriptedModel] = (),
        pull_bytes_per_s: float = 0.0,
        slots: int = 4,
        max_waiting: int | None = None,
        tokens_per_s: float = 0.0,
        prefill_tokens_per_s: float = 0.0,
        load_s: float = 0.0,
        request_s: float = 0.0,
        host_cache: bool = True,
        knows_truncate: bool = True,
        max_queue: int = 512,
        max_loaded: int | None = None,
        words: int = 16,
    ) -> None:
        named = _models([models] if isinstance(models, str | ScriptedModel) else models)
        taken = {model.card().name for model in named}
        self._changed = threading.Condition()
        self._engine = ScriptedEngine(
            [*named, *(model for model in DEFAULT_MODELS if model.name not in taken)],
            slots=slots,
            max_waiting=max_waiting,
            tokens_per_s=tokens_per_s,
            prefill_tokens_per_s=prefill_tokens_per_s,
            load_s=load_s,
            request_s=request_s,
            host_cache=host_cache,
            knows_truncate=knows_truncate,
            words=words,
            changed=self._notify,
        )
        self._later_ns = 0
        loaded = Residency(self._engine, max_queue=max_queue, max_loaded=max_loaded, clock_ns=self._now_ns)
        remote = {model.card().name: model for model in _models(registry)}
        pulls = Pulls(
            self._engine,
            {name: model.card() for name, model in remote.items()},
            arrived=lambda card: self._engine.add(remote[card.name]),
            moved=self._moved,
            bytes_per_s=pull_bytes_per_s,
        )
        self._app = OllamaWire(self._engine, witness=self, residency=loaded, pulls=pulls)
        self._in_process_app = OllamaWire(self._engine, witness=self, hosts=None, residency=loaded, pulls=pulls)
        self._lock = threading.Lock()
        self._thread: LoopThread | None = None
        self._listener: Listener | None = None
        self._port = 0
        self._requests: list[Seen] = []
        self._rules: list[_Rule] = []
        self._disconnects = 0

    # Lifetime

    def start(self) -> Self:
        """Listen; when this returns, requests are answered. Idempotent."""
        thread = self._loop_thread()
        with self._lock:
            if self._listener is None:
                self._listener = thread.run(listen(self._app, loopback_socket(self._port)))
                self._port = self._listener.port
        return self

    def close(self) -> None:
        """Stop: running requests lose their connection. Idempotent."""
        with self._lock:
            thread, self._thread = self._thread, None
            listener, self._listener = self._listener, None
            if thread is None:
                return
            if listener is not None:
                thread.run(listener.aclose())
            thread.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.start)

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    # How to reach it

    @property
    def base_url(self) -> str:
        """Address of the server, for example `http://127.0.0.1:40123`; kept after `close`.

        Raises:
            AegisConfigError: It was never started.
        """
        if not self._port:
            raise AegisConfigError("the scripted server has no address yet: use `with ScriptedOllama() as server`")
        return f"http://127.0.0.1:{self._port}"

    @property
    def transport(self) -> httpx.BaseTransport:
        """For `httpx.Client(transport=..., base_url="http://ollama")`: no socket is used."""
        return InProcessTransport(self._in_process_app, self._loop_thread())

    @property
    def async_transport(self) -> httpx.AsyncBaseTransport:
        """The same for `httpx.AsyncClient`, in any event loop."""
        return InProcessAsyncTransport(self._in_process_app, self._loop_thread())

    # What goes wrong, and when

    def fail(
        self,
        fault: Fault | FaultKind | int,
        *,
        times: int | None = 1,
        when: Callable[[Seen], bool] | None = None,
        path: str | None = None,
        **details: Any,
    ) -> None:
        """Let requests fail; see `Fault` for the ways.

        Args:
            fault: A `Fault`, its kind ("cut", "hang", "error", "no_done", "malformed", "slow"), or a status to answer.
            times: For how many requests; None: for all.
            when: Only for requests that it accepts.
            path: Only for this route; otherwise for chat, generate and the two embedding routes.
            details: The other fields of `Fault`, for example `after=3`.
        """
        if isinstance(fault, int):
            fault = Fault(kind="status", status=fault, **details)
        elif isinstance(fault, str):
            fault = Fault(kind=fault, **details)
        self._rules.append(_Rule(fault, times, when, (path,) if path else _WORK))

    def heal(self) -> None:
        """Forget what `fail` asked for."""
        self._rules.clear()

    def hold(self) -> contextlib.AbstractContextManager[None]:
        """Give out no slot until `release`, or until the end of the block if used in a `with` statement."""
        self._loop_thread().call(self._engine.slots.hold)
        return self._holding()

    def release(self) -> None:
        """End `hold`: waiting requests run in the order in which they came."""
        self._loop_thread().call(self._engine.slots.release)

    def put(self, model: str | ScriptedModel) -> None:
        """Have the server list a model, in place of the one that had its name: as after `ollama pull`."""
        (added,) = _models([model])
        self._engine.add(added)

    def advance(self, seconds: float) -> None:
        """Let time go on by `seconds` for what is loaded: models whose `keep_alive` is over are unloaded."""
        self._later_ns += int(seconds * 1e9)

    def _now_ns(self) -> int:
        return time.time_ns() + self._later_ns

    @contextlib.contextmanager
    def _holding(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.release()

    # What it saw

    @property
    def requests(self) -> tuple[Seen, ...]:
        """All requests in the order in which they came."""
        return tuple(self._requests)

    @property
    def chats(self) -> list[dict[str, Any]]:
        """The bodies of the requests to /api/chat."""
        return [dict(seen.body or {}) for seen in self.requests if seen.path == "/api/chat"]

    @property
    def routes(self) -> Counter[str]:
        """How many requests each route had."""
        return Counter(seen.path for seen in self.requests)

    @property
    def counters(self) -> Counters:
        """What was generated, prefilled, embedded and loaded; and the most generations at one time."""
        return self._engine.counters

    @property
    def running(self) -> int:
        """Requests that have a slot now."""
        return self._engine.slots.running

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot now."""
        return self._engine.slots.waiting

    @property
    def disconnects(self) -> int:
        """Clients that left before their answer was complete."""
        return self._disconnects

    def wait_until(self, condition: Callable[[Self], bool], timeout_s: float = 10.0) -> None:
        """Block until `condition(server)` holds, for example `lambda server: server.waiting == 3`.

        Raises:
            AegisTimeoutError: It did not within `timeout_s` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self), timeout_s):
                raise AegisTimeoutError(
                    f"not within {timeout_s:g} s: {len(self._requests)} requests seen, {self.running} running, "
                    f"{self.waiting} waiting, {self._disconnects} clients left"
                )

    async def await_until(self, condition: Callable[[Self], bool], timeout_s: float = 10.0) -> None:
        """Wait like `wait_until` without blocking the event loop."""
        await asyncio.to_thread(self.wait_until, condition, timeout_s)

    def forget(self) -> None:
        """Set all that was seen and counted to zero."""
        self._requests.clear()
        self._disconnects = 0
        for name, zero in vars(Counters()).items():
            setattr(self._engine.counters, name, zero)

    # For the wire

    def arrived(self, seen: Seen) -> Fault | None:
        """Take note of a request, and choose how it fails (called by the server)."""
        self._requests.append(seen)
        self._notify()
        for rule in self._rules:
            if rule.left != 0 and seen.path in rule.paths and (rule.when is None or rule.when(seen)):
                rule.left = None if rule.left is None else rule.left - 1
                return rule.fault
        return None

    def left(self, seen: Seen) -> None:
        """Count a client that left (called by the server)."""
        self._disconnects += 1
        self._notify()

    def _moved(self, count: int) -> None:
        self._engine.counters.pulled_bytes += count
        self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _loop_thread(self) -> LoopThread:
        with self._lock:
            if self._thread is None:
                self._thread = LoopThread("scripted-ollama")
            return self._thread


def _models(given: Sequence[str | ScriptedModel]) -> list[ScriptedModel]:
    return [model if isinstance(model, ScriptedModel) else ScriptedModel.named(model) for model in given]
