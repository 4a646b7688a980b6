"""What chat calls did, for Prometheus: `register_chat()`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

try:
    from prometheus_client import REGISTRY
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
except ImportError as exc:
    raise ImportError(f"{exc}; run: pip install 'langchain-aegis[metrics]'", name=exc.name) from exc

from langchain_aegis.counts import Distribution
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.telemetry import BOUNDS_S, ChatCounts, chats

PREFIX: Final = "aegis_chat"
_LABELS: Final = ("server", "model")


@dataclass(frozen=True, slots=True)
class _Counter:
    name: str
    text: str
    labels: tuple[str, ...]
    rows: Callable[[ChatCounts], Iterable[tuple[tuple[str, ...], float]]]


@dataclass(frozen=True, slots=True)
class _Spread:
    name: str
    text: str
    values: Callable[[ChatCounts], Distribution]


_COUNTERS: Final = (
    _Counter("calls", "Calls of the server, by how they ended: ok, left, or the class of the error.", ("outcome",),
             lambda c: (((outcome,), n) for outcome, n in c.outcomes.items())),
    _Counter("finishes", "Whole answers, by why they ended; length: cut at the end.", ("reason",),
             lambda c: (((reason,), n) for reason, n in c.finishes.items())),
    _Counter("tokens", "Tokens of prompts (input) and answers (output), as the server counts them.", ("kind",),
             lambda c: [(("input",), c.input_tokens), (("output",), c.output_tokens)]),
    _Counter("prompt_seconds", "Seconds of reading prompts, without what the server knew already.", (),
             lambda c: [((), c.prompt_s)]),
    _Counter("generation_seconds", "Seconds of writing answers; output tokens by these are tokens/s of one call.", (),
             lambda c: [((), c.generation_s)]),
    _Counter("load_waits", "Calls that waited 0.2 s or longer until the model was loaded.", (),
             lambda c: [((), c.load_waits)]),
    _Counter("load_seconds", "Seconds that calls waited until the model was loaded.", (),
             lambda c: [((), c.load_s)]),
)  # fmt: skip
_SPREADS: Final = (
    _Spread("first_token_seconds", "Seconds from a streamed request to its first part.", lambda c: c.first_token_s),
    _Spread("seconds", "Seconds from a request to the end of its answer.", lambda c: c.total_s),
)


class ChatCollector:
    """Shows what the process's chat calls did whenever Prometheus asks; counts nothing itself."""

    def describe(self) -> Iterator[Any]:
        """Yield the families without values."""
        yield from self._families([])

    def collect(self) -> Iterator[Any]:
        """Yield the families with their values."""
        yield from self._families(chats.snapshot())

    def _families(self, models: list[ChatCounts]) -> Iterator[Any]:
        for row in _COUNTERS:
            counter = CounterMetricFamily(f"{PREFIX}_{row.name}", row.text, labels=(*_LABELS, *row.labels))
            for model in models:
                for labels, value in row.rows(model):
                    counter.add_metric((model.server, model.model, *labels), value)
            yield counter
        for spread in _SPREADS:
            histogram = HistogramMetricFamily(f"{PREFIX}_{spread.name}", spread.text, labels=_LABELS)
            for model in models:
                values = spread.values(model)
                buckets = [(str(bound), float(n)) for bound, n in values.upto(BOUNDS_S)]
                histogram.add_metric(
                    (model.server, model.model), [*buckets, ("+Inf", float(values.count))], values.total
                )
            yield histogram


def register_chat(registry: Any = None) -> ChatCollector:
    """Show the process's chat calls in a Prometheus registry.

    Args:
        registry: A `CollectorRegistry`; default that of the process.

    Returns:
        The collector; `registry.unregister(collector)` ends it.

    Raises:
        AegisConfigError: They are shown in this registry already.
    """
    made = ChatCollector()
    try:
        (REGISTRY if registry is None else registry).register(made)
    except ValueError as exc:
        raise AegisConfigError("this registry shows the chat calls already") from exc
    return made
