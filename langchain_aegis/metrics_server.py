"""What an Ollama server has loaded, for Prometheus: `register_server()`."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

try:
    from prometheus_client import REGISTRY
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
except ImportError as exc:
    raise ImportError(f"{exc}; run: pip install 'langchain-aegis[metrics]'", name=exc.name) from exc

from langchain_aegis.attempts import Timeouts
from langchain_aegis.client import OllamaClient, shared_client
from langchain_aegis.errors import AegisConfigError, AegisError
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.settings import AegisSettings
from langchain_aegis.timestamps import unix_s

PREFIX: Final = "aegis_server"
_BOUNDS: Final = Timeouts(connect_s=2.0, read_s=2.0, deadline_s=4.0)
_PATIENCE_S: Final = 0.5  # of a scrape outside an event loop, for an answer that is on its way


@dataclass(frozen=True, slots=True)
class _Gauge:
    name: str
    text: str
    level: Callable[[Mapping[str, Any]], float | None]


def _number(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda model: float(value) if type(value := model.get(name)) is int else None


def _expires_s(model: Mapping[str, Any]) -> float | None:
    return unix_s(model.get("expires_at"))


_GAUGES: Final = (
    _Gauge("model_bytes", "Memory of a loaded model with its window.", _number("size")),
    _Gauge("model_vram_bytes", "How much of that is on the GPU; less than all of it is slow.", _number("size_vram")),
    _Gauge("model_window_tokens", "Window of a slot of a loaded model.", _number("context_length")),
    _Gauge("model_expires_timestamp_seconds", "When a loaded model is unloaded if nobody calls it.", _expires_s),
)
_LABELS: Final = ("server", "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What is known of a server, at one moment."""

    up: bool | None = None
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    at: float = 0.0
    loads: Counter[str] = field(default_factory=Counter)
    evictions: Counter[str] = field(default_factory=Counter)


_COUNTERS: Final[tuple[tuple[str, str, Callable[[_Seen], Counter[str]]], ...]] = (
    ("model_loads", "Times that a model was found loaded, or with another window, that was not so before.",
     lambda s: s.loads),
    ("model_evictions", "Times that a model was found gone before it had expired.", lambda s: s.evictions),
)  # fmt: skip


class _Server:
    """One server, asked (`/api/ps`) in a thread of its own and not more often than its answers are good."""

    def __init__(self, client: OllamaClient, every_s: float) -> None:
        self._client = client
        self._every_s = every_s
        self.address = client.base_url
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Forget what the server said."""
        self._lock = threading.Lock()
        self._asking: threading.Event | None = None
        self._seen = _Seen()

    @property
    def seen(self) -> _Seen:
        """What the server said when it was last asked."""
        with self._lock:
            return self._seen

    def ask(self) -> threading.Event | None:
        """Have the server asked unless its last answer is good enough; the event is set when it has been."""
        with self._lock:
            if self._asking is not None:
                return self._asking
            if self._seen.up is not None and time.monotonic() < self._seen.at + self._every_s:
                return None
            asked = self._asking = threading.Event()
        threading.Thread(target=self._look, args=(asked,), name="aegis-server-metrics", daemon=True).start()
        return asked

    def _look(self, asked: threading.Event) -> None:
        found: dict[str, Mapping[str, Any]] | None = None
        try:
            models = self._client.ps(timeouts=_BOUNDS)
            found = {str(model.get("model") or model.get("name")): model for model in models}
        except AegisError:
            pass  # shown as down
        finally:
            with self._lock:
                if self._asking is asked:  # not that of a parent process
                    self._seen = _after(self._seen, found)
                    self._asking = None
            asked.set()


class ServerCollector:
    """Shows what Ollama servers have loaded whenever Prometheus asks.

    No scrape waits for a server longer than 0.5 s, on an event loop not at all: it shows what is known. Loads and
    evictions are what changed between two looks, so of several in between only one is counted.

    Args:
        base_url: Address of the first; default `OLLAMA_BASE_URL`. `add` takes more.
        client: Used in place of one for `base_url`, for a server that wants a key.
        every_s: Seconds for which an answer of a server is good enough.
    """

    def __init__(
        self, base_url: str | None = None, *, client: OllamaClient | None = None, every_s: float = 10.0
    ) -> None:
        self._every_s = every_s
        self._servers: dict[str, _Server] = {}
        self.add(base_url, client=client)

    def add(self, base_url: str | None = None, *, client: OllamaClient | None = None) -> None:
        """Show another server too; one that is shown already stays as it is."""
        client = client or shared_client(base_url or AegisSettings.from_env().ollama_base_url)
        self._servers.setdefault(client.base_url, _Server(client, self._every_s))

    def describe(self) -> Iterator[Any]:
        """Yield the families without values, so that registering asks nobody."""
        yield from self._families({})

    def collect(self) -> Iterator[Any]:
        """Yield the families with their values."""
        servers = list(self._servers.values())
        asked = [event for server in servers if (event := server.ask()) is not None]
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            until = time.monotonic() + _PATIENCE_S
            for event in asked:
                event.wait(max(0.0, until - time.monotonic()))
        yield from self._families({server.address: server.seen for server in servers})

    def _families(self, servers: dict[str, _Seen]) -> Iterator[Any]:
        up = GaugeMetricFamily(f"{PREFIX}_up", "Whether the server answers.", labels=("server",))
        loaded = GaugeMetricFamily(f"{PREFIX}_models", "Models that are loaded.", labels=("server",))
        answering = {address: seen for address, seen in servers.items() if seen.up}
        for address, seen in servers.items():
            if seen.up is not None:
                up.add_metric((address,), float(seen.up))
        for address, seen in answering.items():
            loaded.add_metric((address,), len(seen.models))
        yield up
        yield loaded
        for gauge in _GAUGES:
            levels = GaugeMetricFamily(f"{PREFIX}_{gauge.name}", gauge.text, labels=_LABELS)
            for address, seen in answering.items():
                for name, model in seen.models.items():
                    if (level := gauge.level(model)) is not None:
                        levels.add_metric((address, name), level)
            yield levels
        for kind, text, counts in _COUNTERS:
            changes = CounterMetricFamily(f"{PREFIX}_{kind}", text, labels=_LABELS)
            for address, seen in servers.items():
                for name, count in counts(seen).items():
                    changes.add_metric((address, name), count)
            yield changes


def _after(before: _Seen, found: dict[str, Mapping[str, Any]] | None) -> _Seen:
    """Return what is known after a look; None: the server did not answer."""
    now = time.monotonic()
    if found is None:  # what it has loaded is not known, so what comes next is compared with what was
        return replace(before, up=False, at=now)
    loads, evictions = Counter(before.loads), Counter(before.evictions)
    for name, model in found.items():
        old = before.models.get(name)
        loads[name] += old is None or _kind(old) != _kind(model)
    for name in before.models.keys() - found.keys():
        expires = _expires_s(before.models[name])
        evictions[name] += expires is None or expires > time.time()
    return _Seen(up=True, models=found, at=now, loads=loads, evictions=evictions)


def _kind(model: Mapping[str, Any]) -> tuple[Any, ...]:
    return model.get("digest"), model.get("context_length")


def register_server(
    base_url: str | None = None, registry: Any = None, *, client: OllamaClient | None = None, every_s: float = 10.0
) -> ServerCollector:
    """Show what a server has loaded in a Prometheus registry.

    Args:
        base_url: As for `ServerCollector`.
        registry: A `CollectorRegistry`; default that of the process.
        client: As for `ServerCollector`.
        every_s: As for `ServerCollector`.

    Returns:
        The collector; `registry.unregister(collector)` ends it.

    Raises:
        AegisConfigError: A server is shown in this registry already, or `base_url` is no address.
    """
    made = ServerCollector(base_url, client=client, every_s=every_s)
    try:
        (REGISTRY if registry is None else registry).register(made)
    except ValueError as exc:
        raise AegisConfigError(
            "this registry shows a server already: keep what register_server() returned, and show more with its add()"
        ) from exc
    return made
