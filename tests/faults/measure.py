"""What a fault costs callers, against the same calls without a cache at the same time of the same machine."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from itertools import pairwise

from faults.recorder import Recorder, Seen, callers, questions, threads

# The promises hold on a machine that does nothing else; one that is busy is given so many times as long.
SLACK = float(os.environ.get("AEGIS_FAULT_SLACK", "3"))
ADDED_S = 0.120 * SLACK  # at most, by 99 of 100 calls
ADDED_OPEN_S = 0.001 * SLACK  # in the median, once Redis is left alone
HITS_AGAIN_S = 6.0 * SLACK
PRODUCTION = {"op_budget_s": 0.1}  # the default of a cache


@contextlib.contextmanager
def no_collections():
    """What a test session has imported takes a tenth of a second to be looked through; no call shall pay for that."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Load:
    """Many callers of one recorder, all tasks of one loop or all threads."""

    def __init__(self, recorder: Recorder, how: str, at_once: int = 64) -> None:
        self.recorder, self.how, self.at_once = recorder, how, at_once
        self.bare = Recorder(None, recorder.name)

    def __call__(self, asked, during=None, recorder: Recorder | None = None, tenants=(None,)) -> Seen:
        """Ask all; `during` is called by a thread after half of them."""
        recorder = recorder or self.recorder
        with no_collections():
            if self.how == "threads":
                return threads(recorder, asked, at_once=self.at_once, during=during, tenants=tenants)

            async def meanwhile():
                await asyncio.to_thread(during)

            told = None if during is None else meanwhile
            return asyncio.run(callers(recorder, asked, at_once=self.at_once, during=told, tenants=tenants))

    def added(self, asked, during=None) -> float:
        """Ask all; returns by how much 99 of 100 calls took longer than without a cache, in seconds."""
        without = self(asked, recorder=self.bare)
        seen = self(asked, during)
        assert len(seen.took) == len(asked)
        return seen.quantile(0.99) - without.quantile(0.99)

    def added_one_by_one(self, count: int = 150) -> float:
        """Return by how much the median of calls one after the other is longer than without a cache, in seconds."""
        alone = Load(self.recorder, self.how, at_once=1)
        asked = questions(count, "one")
        return alone(asked).median - alone(asked, recorder=self.bare).median


def slowness() -> float:
    """Return how many times as long as alone something takes on this machine now: 1 on one that does nothing else."""
    slowest = 1.0
    for _ in range(3):
        wall, cpu = time.perf_counter(), time.thread_time()
        for _ in range(100_000):
            pass
        slowest = max(slowest, (time.perf_counter() - wall) / max(1e-6, time.thread_time() - cpu))
    return slowest


def within(bound_s: float, measured, tries: int = 4) -> list[float]:
    """Return what `measured` returned, the last time at most `bound_s`: the machine may have been busy before.

    A machine that is shared is given as many times as long as it is slow.
    """
    told: list[float] = []
    while True:
        slow = slowness()
        told.append(measured())
        if told[-1] <= bound_s * max(slow, slowness()):
            return told
        assert len(told) < tries, f"more than {bound_s:g} s each time: {told}, {slow:.1f} times as slow as alone"


async def standing_still(call) -> tuple[float, float]:
    """Await a call; returns how long it took, and for how long the event loop did nothing else at most, in seconds."""
    ticks = [time.monotonic()]

    async def tick():
        while True:
            await asyncio.sleep(0.001)
            ticks.append(time.monotonic())

    ticking = asyncio.ensure_future(tick())
    await asyncio.sleep(0.005)
    began = time.monotonic()
    await call
    took = time.monotonic() - began
    await asyncio.sleep(0.005)
    ticking.cancel()
    return took, max(b - a for a, b in pairwise(ticks))
