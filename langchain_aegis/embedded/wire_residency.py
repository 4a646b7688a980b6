"""Keep account of which models are loaded, with which options, until when."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from langchain_aegis.embedded.wire_engine import BUSY, Engine, EngineError, ModelCard
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

    def prolong(self, now_ns: int) -> None:
        """Let the time until it is unloaded begin anew."""
        self.expires_ns = min(now_ns + self.keep_alive_ns, FOREVER_NS)


class Residency:
    """Loads models when they are asked for, and forgets them when their time is over.

    Loads happen one after another. One that replaces a runner waits until nobody uses that, and one that needs room
    until another model is idle; meanwhile requests that fit what is loaded go straight through, and steady ones keep
    it waiting, as in Ollama.

    Args:
        engine: Loads and runs the models.
        max_queue: Most requests that wait for a load, beside the one that is being loaded (`OLLAMA_MAX_QUEUE`).
            Requests for a model that is loaded as they want it are never counted.
        max_loaded: Most models loaded at once (`OLLAMA_MAX_LOADED_MODELS`); None: as many as there are.
        clock_ns: Nanoseconds since 1970.
    """

    def __init__(
        self, engine: Engine, *, max_queue: int = 512, max_loaded: int | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:  # fmt: skip
        self.engine = engine
        self._max_queue = max_queue
        self._max_loaded = max_loaded
        self._clock_ns = clock_ns
        self._residents: dict[str, Resident] = {}
        self._queued = 0
        self._loading = asyncio.Lock()
        self._waiting: set[asyncio.Future[None]] = set()  # for a model to become idle

    @contextlib.asynccontextmanager
    async def using(
        self, card: ModelCard, options: Mapping[str, Any], *, shift: bool = True, keep_alive_ns: int | None = None
    ) -> AsyncIterator[int]:
        """Keep a model loaded while the block runs; the value is the time that loading took, in nanoseconds.

        Raises:
            EngineError: 503: too many wait for a load already.
        """
        started = time.perf_counter_ns()
        window = self.engine.window(card, options.get("num_ctx"))
        runner = {name: options.get(name) for name in RUNNER_OPTIONS} | {"num_ctx": window, "shift": shift}
        resident = self._fitting(card, runner)
        if resident is None:
            if self._queued > self._max_queue:
                raise EngineError(503, BUSY)
            self._queued += 1
            try:
                async with self._loading:
                    resident = self._fitting(card, runner) or await self._load(card, runner, window)
                    resident.running += 1
            finally:
                self._queued -= 1
        else:
            resident.running += 1
        if keep_alive_ns is not None:
            resident.keep_alive_ns = keep_alive_ns
        resident.prolong(self._clock_ns())
        try:
            yield time.perf_counter_ns() - started
        finally:
            resident.running -= 1
            resident.prolong(self._clock_ns())
            if not resident.running:
                self._tell_idle()

    def unload(self, name: str) -> None:
        """Forget a model; requests that are using it are not disturbed."""
        self._residents.pop(name, None)
        self._tell_idle()

    def loaded(self) -> list[Resident]:
        """Return the models that are loaded now, the one that stays longest first."""
        alive = [resident for name in list(self._residents) if (resident := self._alive(name))]
        return sorted(alive, key=lambda resident: -resident.expires_ns)

    async def _load(self, card: ModelCard, runner: Mapping[str, Any], window: int) -> Resident:
        while (old := self._alive(card.name)) and old.running:
            await self._idle()
            if (fitting := self._fitting(card, runner)) is not None:
                return fitting
        while old is None and self._max_loaded is not None and len(self.loaded()) >= self._max_loaded:
            idle = [resident for resident in self.loaded() if not resident.running]
            if idle:
                del self._residents[idle[-1].card.name]
            else:
                await self._idle()
        await self.engine.load(card, runner)
        resident = old or Resident(card, runner, window)
        resident.runner, resident.context_length = runner, window
        self._residents[card.name] = resident
        return resident

    def _fitting(self, card: ModelCard, runner: Mapping[str, Any]) -> Resident | None:
        resident = self._alive(card.name)
        return None if resident is None or _differs(resident.runner, runner) else resident

    def _alive(self, name: str) -> Resident | None:
        resident = self._residents.get(name)
        if resident and not resident.running and resident.expires_ns <= self._clock_ns():
            del self._residents[name]
            return None
        return resident

    async def _idle(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)

    def _tell_idle(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)


def _differs(loaded: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    # num_gpu -1 (let the server decide) is content with whatever is there.
    return any(loaded[name] != value for name, value in asked.items() if not (name == "num_gpu" and value < 0))
