"""What a cache counts, for Prometheus: `register(cache)`; with all the rest for a web application: `asgi_app()`."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

try:
    from prometheus_client import REGISTRY, make_asgi_app
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
except ImportError as exc:
    raise ImportError(f"{exc}; run: pip install 'langchain-aegis[metrics]'", name=exc.name) from exc

from langchain_aegis.counts import SIMILARITY, Distribution
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.metrics_admission import register_admission
from langchain_aegis.metrics_chat import register_chat
from langchain_aegis.metrics_server import ServerCollector, register_server
from langchain_aegis.notices import warn_once
from langchain_aegis.reasons import explain
from langchain_aegis.results import CacheHealth, CacheStats
from langchain_aegis.settings import AegisSettings, normalise_base_url

PREFIX: Final = "aegis_cache"
# Some of the bounds that are counted: Prometheus keeps a series for each.
BUCKETS_S: Final = tuple(float(f"{step}e{power}") for power in range(-4, 2) for step in (1, 2, 5))


class Observed(Protocol):
    """A cache, as far as it is looked at here."""

    settings: AegisSettings

    def stats(self) -> CacheStats:
        """Return what it has done."""

    def health(self) -> CacheHealth:
        """Return what the namespace holds."""


Rows = Iterable[tuple[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True)
class _Counter:
    name: str
    text: str
    labels: tuple[str, ...]
    rows: Callable[[CacheStats], Rows]


@dataclass(frozen=True, slots=True)
class _Spread:
    name: str
    text: str
    labels: tuple[str, ...]
    bounds: tuple[float, ...]
    rows: Callable[[CacheStats], Iterable[tuple[tuple[str, ...], Distribution]]]


@dataclass(frozen=True, slots=True)
class _Gauge:
    name: str
    text: str
    level: Callable[[CacheHealth], float | None]


_COUNTERS: Final = (
    _Counter("lookups", "Lookups, by the tier that answered; miss: none did.", ("tier",),
             lambda s: (((tier,), spread.count) for tier, spread in s.lookup_s.items())),
    _Counter("local_hits", "Reads that the local tier answered.", (),
             lambda s: [((), s.local.hits)] if s.local is not None else []),
    _Counter("misses", "Calls that the cache did not answer, by reason; a call may have several.", ("reason", "stage"),
             lambda s: (((code, explain(code).stage), n) for code, n in s.reasons.items())),
    _Counter("stored", "Answers that were kept.", (), lambda s: [((), s.stored)]),
    _Counter("not_stored", "Answers that were not kept, by reason.", ("reason",),
             lambda s: (((code,), n) for code, n in s.not_stored.items())),
    _Counter("rejected_records", "Records that were damaged, forged, or of somebody else.", (),
             lambda s: [((), s.rejected)]),
    _Counter("task_lookups", "Lookups of each named task, by the tier that answered.", ("task", "tier"),
             lambda s: (((task, tier), n) for task, tiers in s.by_task.items() for tier, n in tiers.items())),
    _Counter("saved_tokens", "Tokens of the answers that were served, as the model counted them.", ("kind",),
             lambda s: [(("input",), s.saved.input_tokens), (("output",), s.saved.output_tokens)]),
    _Counter("saved_seconds", "Seconds that it took to make the answers that were served.", (),
             lambda s: [((), s.saved.seconds)]),
    _Counter("shadow_checked", "Hits that were drawn for checking and compared with a new answer.", (),
             lambda s: [((), s.checked.hits)]),
    _Counter("shadow_wrong", "Those of them whose answer was another one.", (), lambda s: [((), s.checked.wrong)]),
)  # fmt: skip
_SPREADS: Final = (
    _Spread("lookup_seconds", "Seconds that a lookup took, by the tier that answered.", ("tier",), BUCKETS_S,
            lambda s: (((tier,), spread) for tier, spread in s.lookup_s.items())),
    _Spread("update_seconds", "Seconds that it took to keep an answer.", (), BUCKETS_S, lambda s: [((), s.update_s)]),
    _Spread("nearest_miss_similarity", "Cosine of the nearest candidate that was not served.", (), SIMILARITY,
            lambda s: [((), s.nearest_misses.similarity)]),
)  # fmt: skip
_GAUGES: Final = (
    _Gauge("redis_up", "Whether Redis answers.", lambda h: float(h.redis)),
    _Gauge("entries", "Answers that can be served now, of all processes.", lambda h: h.entries if h.redis else None),
    _Gauge("tenants", "Groups of entries: one per tenant, and one for calls without a tenant.",
           lambda h: h.tenants if h.redis else None),
)  # fmt: skip


class CacheCollector:
    """Shows what caches have counted whenever Prometheus asks; counts nothing itself.

    Every series has the label `namespace`; caches of one namespace are shown as one.

    Args:
        cache: The first cache; `add` takes more.
        health: Ask Redis how many entries there are, once per scrape. On an event loop that is done in a thread, and
            the scrape shows what the one before it found.
    """

    def __init__(self, cache: Observed, *, health: bool = True) -> None:
        self._caches: list[Observed] = []
        self._health = health
        self.reset()
        self.add(cache)
        reset_after_fork(self)

    def reset(self) -> None:
        """Forget what Redis said; the caches stay."""
        self._lock = threading.Lock()
        self._asking = False
        self._found: dict[str, CacheHealth] = {}

    def add(self, cache: Observed) -> None:
        """Show another cache too; one that is shown already stays as it is."""
        with self._lock:
            if not any(known is cache for known in self._caches):
                self._caches.append(cache)

    def describe(self) -> Iterator[Any]:
        """Yield the families without values, so that registering asks nobody."""
        for row in _COUNTERS:
            yield CounterMetricFamily(f"{PREFIX}_{row.name}", row.text, labels=("namespace", *row.labels))
        for spread in _SPREADS:
            yield HistogramMetricFamily(f"{PREFIX}_{spread.name}", spread.text, labels=("namespace", *spread.labels))
        for gauge in _GAUGES:
            yield GaugeMetricFamily(f"{PREFIX}_{gauge.name}", gauge.text, labels=("namespace",))

    def collect(self) -> Iterator[Any]:
        """Yield the families with their values."""
        with self._lock:
            caches = list(self._caches)
        stats: list[tuple[str, CacheStats]] = [(cache.settings.namespace, cache.stats()) for cache in caches]
        for row in _COUNTERS:
            counter = CounterMetricFamily(f"{PREFIX}_{row.name}", row.text, labels=("namespace", *row.labels))
            values: dict[tuple[str, ...], float] = {}
            for namespace, one in stats:
                for labels, value in row.rows(one):
                    values[namespace, *labels] = values.get((namespace, *labels), 0) + value
            for names, value in values.items():
                counter.add_metric(names, value)
            yield counter
        for spread in _SPREADS:
            histogram = HistogramMetricFamily(
                f"{PREFIX}_{spread.name}", spread.text, labels=("namespace", *spread.labels)
            )
            found: dict[tuple[str, ...], list[Distribution]] = {}
            for namespace, one in stats:
                for labels, distribution in spread.rows(one):
                    found.setdefault((namespace, *labels), []).append(distribution)
            for names, several in found.items():
                histogram.add_metric(names, _buckets(several, spread.bounds), sum(d.total for d in several))
            yield histogram
        healths = self._healths(caches)
        for gauge in _GAUGES:
            levels = GaugeMetricFamily(f"{PREFIX}_{gauge.name}", gauge.text, labels=("namespace",))
            for namespace, health in healths.items():
                if (level := gauge.level(health)) is not None:
                    levels.add_metric((namespace,), level)
            yield levels

    def _healths(self, caches: list[Observed]) -> dict[str, CacheHealth]:
        """What each namespace holds; on an event loop as it was when last asked."""
        if not self._health:
            return {}
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._ask(caches)
        else:
            with self._lock:
                asked, self._asking = self._asking, True
            if not asked:
                loop.run_in_executor(None, self._ask, caches)
        with self._lock:
            return dict(self._found)

    def _ask(self, caches: list[Observed]) -> None:
        try:
            found = {cache.settings.namespace: cache.health() for cache in caches}
        except Exception as exc:  # whatever a cache cannot tell, the scrape must show the rest
            warn_once("metrics_health", f"a cache's health could not be read ({type(exc).__name__})")
            found = {}
        with self._lock:
            self._found, self._asking = found, False


def _buckets(several: list[Distribution], bounds: tuple[float, ...]) -> list[tuple[str, float]]:
    """Return the cumulative counts of several distributions together, as Prometheus wants them."""
    counts = [sum(at) for at in zip(*([n for _, n in d.upto(bounds)] for d in several), strict=True)]
    buckets = [(str(bound), float(n)) for bound, n in zip(bounds, counts, strict=True)]
    return [*buckets, ("+Inf", float(sum(d.count for d in several)))]


def collector(cache: Observed, *, health: bool = True) -> CacheCollector:
    """Return a collector of `cache` that is registered nowhere."""
    return CacheCollector(cache, health=health)


def register(cache: Observed, registry: Any = None, *, health: bool = True) -> CacheCollector:
    """Show `cache` in a Prometheus registry.

    Args:
        cache: The cache.
        registry: A `CollectorRegistry`; default that of the process.
        health: As for `CacheCollector`.

    Returns:
        The collector: `collector.add(other)` shows another cache, `registry.unregister(collector)` ends it.

    Raises:
        AegisConfigError: A cache is shown in this registry already.
    """
    made = CacheCollector(cache, health=health)
    try:
        (REGISTRY if registry is None else registry).register(made)
    except ValueError as exc:
        raise AegisConfigError(
            "this registry shows a cache already: keep what register() returned, and show further ones with its add()"
        ) from exc
    return made


_shown: weakref.WeakKeyDictionary[Any, tuple[CacheCollector | None, ServerCollector | None]] = (
    weakref.WeakKeyDictionary()
)


def register_all(*caches: Observed, servers: Sequence[str] | None = None, registry: Any = None) -> None:
    """Show everything in a Prometheus registry: chat calls, admission, servers and caches.

    May be called again: what is new is shown, too. A cache or server that was registered by hand before is left as it
    is, and so are all caches, or all servers.

    Args:
        caches: The caches to show.
        servers: Addresses of Ollama servers; default `OLLAMA_BASE_URL`. Empty: no server is asked.
        registry: A `CollectorRegistry`; default that of the process.

    Raises:
        AegisConfigError: One of the servers is no address.
    """
    told = [AegisSettings.from_env().ollama_base_url] if servers is None else servers
    addresses = [normalise_base_url(address) for address in told]
    target = REGISTRY if registry is None else registry
    cached, served = _shown.get(target, (None, None))
    with contextlib.suppress(AegisConfigError):  # which says, here and below, that it is shown already
        register_chat(target)
    with contextlib.suppress(AegisConfigError):
        register_admission(target)
    for address in addresses:
        if served is not None:
            served.add(address)
            continue
        with contextlib.suppress(AegisConfigError):
            served = register_server(address, target)
    for cache in caches:
        if cached is not None:
            cached.add(cache)
            continue
        with contextlib.suppress(AegisConfigError):
            cached = register(cache, target)
    _shown[target] = cached, served


def asgi_app(*caches: Observed, servers: Sequence[str] | None = None, registry: Any = None) -> Any:
    """Return an ASGI application that answers Prometheus, for FastAPI, Starlette or a server of its own.

    FastAPI: `app.mount("/metrics", asgi_app(cache))`. It answers whoever asks: keep that path inside.

    Args:
        caches: As for `register_all`, which is called.
        servers: As for `register_all`.
        registry: A `CollectorRegistry`; default that of the process.
    """
    register_all(*caches, servers=servers, registry=registry)
    return make_asgi_app(REGISTRY if registry is None else registry)
