"""Keep account of which models are loaded, with which options, until when."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from langchain_aegis.embedded.wire_engine import Engine, ModelCard
from langchain_aegis.embedded.wire_requests import DEFAULT_KEEP_ALIVE_NS, FOREVER_NS, RUNNER_OPTIONS


@dataclass
class Resident:
    """A loaded model.

    Attributes:
        runner: The options that it was loaded with; a request with others loads it again.
        keep_alive_ns: What the last request that said something asked for; later requests inherit it.
        expires_ns: Since 1970; counted from the end of the last request.
    """

    card: ModelCard
    runner: Mapping[str, Any]
    context_length: int
    keep_alive_ns: int = DEFAULT_KEEP_ALIVE_NS
    expires_ns: int = FOREVER_NS
    running: int = 0

    def prolong(self) -> None:
        """Let the time until it is unloaded begin anew."""
        self.expires_ns = min(time.time_ns() + self.keep_alive_ns, FOREVER_NS)


@dataclass
class Residency:
    """Loads models when they are asked for, and forgets them when their time is over."""

    engine: Engine
    _residents: dict[str, Resident] = field(default_factory=dict)
    _loading: dict[str, asyncio.Lock] = field(default_factory=dict)

    @contextlib.asynccontextmanager
    async def using(
        self, card: ModelCard, options: Mapping[str, Any], *, shift: bool = True, keep_alive_ns: int | None = None
    ) -> AsyncIterator[int]:
        """Keep a model loaded while the block runs; the value is the time that loading took, in nanoseconds."""
        started = time.perf_counter_ns()
        window = self.engine.window(card, options.get("num_ctx"))
        runner = {name: options.get(name) for name in RUNNER_OPTIONS} | {"num_ctx": window, "shift": shift}
        async with self._loading.setdefault(card.name, asyncio.Lock()):
            resident = self._alive(card.name)
            if resident is None or _differs(resident.runner, runner):
                await self.engine.load(card, runner)
                kept = resident or Resident(card, runner, window)
                kept.runner, kept.context_length = runner, window
                self._residents[card.name] = resident = kept
            resident.running += 1
        if keep_alive_ns is not None:
            resident.keep_alive_ns = keep_alive_ns
        resident.prolong()
        try:
            yield time.perf_counter_ns() - started
        finally:
            resident.running -= 1
            resident.prolong()

    def unload(self, name: str) -> None:
        """Forget a model; requests that are using it are not disturbed."""
        self._residents.pop(name, None)

    def loaded(self) -> list[Resident]:
        """Return the models that are loaded now, the one that stays longest first."""
        alive = [resident for name in list(self._residents) if (resident := self._alive(name))]
        return sorted(alive, key=lambda resident: -resident.expires_ns)

    def _alive(self, name: str) -> Resident | None:
        resident = self._residents.get(name)
        if resident and not resident.running and resident.expires_ns <= time.time_ns():
            del self._residents[name]
            return None
        return resident


def _differs(loaded: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    # num_gpu -1 (let the server decide) is content with whatever is there.
    return any(loaded[name] != value for name, value in asked.items() if not (name == "num_gpu" and value < 0))
