"""What admissions count, for Prometheus: `register_admission()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

try:
    from prometheus_client import REGISTRY
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
except ImportError as exc:
    raise ImportError(f"{exc}; run: pip install 'langchain-aegis[metrics]'", name=exc.name) from exc

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.reloads import reloads
from langchain_aegis.servers import admissions
from langchain_aegis.tallies import BOUNDS_S, EVENTS, AdmissionStats, Row

PREFIX: Final = "aegis_admission"


@dataclass(frozen=True, slots=True)
class _Gauge:
    name: str
    text: str
    level: Callable[[AdmissionStats], float | None]


_GAUGES: Final = (
    _Gauge("slots", "Calls that may run at once.", lambda s: s.max_concurrency),
    _Gauge("running", "Calls that run.", lambda s: s.running),
    _Gauge("lent", "Slots that processes share and that this one has now; none while it cannot ask.", lambda s: s.lent),
    _Gauge("workers", "Processes that share the server's slots, as far as this one knows.", lambda s: s.workers),
    _Gauge("places", "Calls that may wait before others are refused.", lambda s: s.max_waiting),
    _Gauge("waiting", "Calls that wait and count against the places.", lambda s: s.waiting),
    _Gauge("waiting_uncounted", "Items of batches, and others that wait without counting.", lambda s: s.waiting_bulk),
    _Gauge("waiting_background", "Background traffic that waits.", lambda s: s.waiting_spare),
    _Gauge("oldest_wait_seconds", "Seconds that the call has waited that waits longest.", lambda s: s.oldest_s),
    _Gauge("service_seconds", "Seconds that a slot is held, smoothed.", lambda s: s.service_s),
)
_COUNTERS: Final = (
    ("prefixes_reused", "Turns given to calls that begin like the one before them in their slot."),
    ("reloads_avoided", "Turns given to calls that need what is loaded, past one that needs something else."),
)


class AdmissionCollector:
    """Shows the process's admissions whenever Prometheus asks; counts nothing itself.

    Args:
        tenants: Give calls and waits a label `tenant`: up to 1,000 series of each per server. Off, because names of
            tenants come from outside and may be nobody's business who reads the metrics.
    """

    def __init__(self, *, tenants: bool = False) -> None:
        self._labels = ("server", "model", "tenant") if tenants else ("server", "model")

    def describe(self) -> Iterator[Any]:
        """Yield the families without values."""
        yield from self._families({})

    def collect(self) -> Iterator[Any]:
        """Yield the families with their values."""
        yield from self._families({server: admission.stats() for server, admission in admissions().items()})

    def _families(self, servers: dict[str, AdmissionStats]) -> Iterator[Any]:
        for gauge in _GAUGES:
            levels = GaugeMetricFamily(f"{PREFIX}_{gauge.name}", gauge.text, labels=("server",))
            for server, stats in servers.items():
                if (level := gauge.level(stats)) is not None:
                    levels.add_metric((server,), level)
            yield levels
        for name, text in _COUNTERS:
            turns = CounterMetricFamily(f"{PREFIX}_{name}", text, labels=("server",))
            for server, stats in servers.items():
                turns.add_metric((server,), getattr(stats, name))
            yield turns
        calls = CounterMetricFamily(
            f"{PREFIX}_calls", "Calls, by what became of them.", labels=(*self._labels, "event")
        )
        waits = HistogramMetricFamily(f"{PREFIX}_wait_seconds", "Seconds waited for a slot.", labels=self._labels)
        for labels, rows in self._rows(servers).items():
            for event in EVENTS:
                calls.add_metric((*labels, event), sum(getattr(row, event) for row in rows))
            counts = accumulate(map(sum, zip(*(row.waits for row in rows), strict=True)))
            bounds = (*map(str, BOUNDS_S), "+Inf")
            waits.add_metric(labels, list(zip(bounds, counts, strict=True)), sum(row.waited_s for row in rows))
        yield calls
        yield waits
        yield from _runner_families()

    def _rows(self, servers: dict[str, AdmissionStats]) -> dict[tuple[str, ...], list[Row]]:
        found: dict[tuple[str, ...], list[Row]] = {}
        for server, stats in servers.items():
            for row in stats.rows:
                labels = (server, row.model or "", row.tenant or "")[: len(self._labels)]
                found.setdefault(labels, []).append(row)
        return found


def _runner_families() -> Iterator[Any]:
    """Yield what calls ask a model to be loaded with, and what it would be reloaded for."""
    labels = ("server", "model", "options")
    asked = CounterMetricFamily("aegis_runner_calls", "Calls, by the runner options that they ask for.", labels=labels)
    shared = CounterMetricFamily(
        "aegis_runner_shared", "Calls sent with other calls' runner options, so that nothing reloads.", labels=labels
    )
    switches = CounterMetricFamily(
        "aegis_runner_switches",
        "Calls sent with other runner options than the call before: each reloads the model.",
        labels=("server", "model"),
    )
    for server, model, sets, switched in reloads.rows():
        for each in sets:
            asked.add_metric((server, model, each.text), each.calls)
            shared.add_metric((server, model, each.text), each.shared)
        switches.add_metric((server, model), switched)
    yield asked
    yield shared
    yield switches


def register_admission(registry: Any = None, *, tenants: bool = False) -> AdmissionCollector:
    """Show the process's admissions in a Prometheus registry.

    Args:
        registry: A `CollectorRegistry`; default that of the process.
        tenants: As for `AdmissionCollector`.

    Returns:
        The collector; `registry.unregister(collector)` ends it.

    Raises:
        AegisConfigError: They are shown in this registry already.
    """
    made = AdmissionCollector(tenants=tenants)
    try:
        (REGISTRY if registry is None else registry).register(made)
    except ValueError as exc:
        raise AegisConfigError("this registry shows the admissions already") from exc
    return made
