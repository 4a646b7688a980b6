"""Does anything ever go wrong, whatever happens, for as long as you like? A mixed load with a fault every five seconds.

Run: python tests/faults/soak.py [--seconds N] [--seed N] [--report FILE]

Some callers, blocking and awaited, ask several models behind two caches, for several tenants; meanwhile Redis is
killed, frozen, filled and emptied, the network cuts and swallows, what lies in Redis is changed, the embedder and the
model server fail, and callers leave. Every answer is compared with the whole history. Exit code 1 if anything was
wrong, with the seed and what happened before. The same seed gives the same faults and the same callers, but not the
same moments.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import os
import platform
import random
import re
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faults.measure import ADDED_S, HITS_AGAIN_S, slowness
from faults.soak_faults import FAULTS
from faults.soak_history import History
from faults.soak_load import Load, scope_of, tier_of
from faults.soak_parts import CALLERS, OLLAMA_S, Stack, quiet, source_of
from faults.soak_report import text_of_report, write_report
from faults.tenants import TIERS
from faults.watch import descriptors, passing_threads
from langchain_aegis.writes import the_writer

EVERY_S = 5.0  # a fault
EMBED_S = ADDED_S  # more while the embedder is away: it has a budget of its own
GROWN_BYTES = 24 * 1024 * 1024  # at most, from the second third of a run to the last: in the first it may grow
MORE_DESCRIPTORS, MORE_THREADS = 12, 8  # at a calm moment than at any in the time of warming up
# Names that have no end of their own: they count, list and name what has one.
_LASTING = re.compile(rb":(epochs|z|b|trash|sweeping)$|:(z|u|n|v):")


@dataclass(frozen=True)
class Sample:
    """What the process had at a calm moment."""

    at_s: float
    rss_bytes: int
    descriptors: int
    threads: int
    tasks: int


@dataclass
class Soak:
    """One run.

    Args:
        seconds: How long faults happen.
        seed: Of faults and callers.
        planted: Violations to be made up, for a test of this program.
    """

    seconds: float
    seed: int
    planted: tuple[str, ...] = ()
    history: History = field(default_factory=lambda: History(source_of))
    samples: list[Sample] = field(default_factory=list)
    recovered: list[tuple[float, str, str]] = field(default_factory=list)  # seconds, after what, what came last
    slow: float = 1.0
    servers: dict[str, str] = field(default_factory=dict)
    local_hits: int = 0  # of the local tier

    def run(self) -> bool:
        """Run; returns whether nothing was wrong."""
        path = Path(tempfile.mkdtemp(prefix="aeg-", dir="/tmp"))
        try:
            with quiet(), _nothing_unseen(self.history):
                self._run(path)
        finally:
            shutil.rmtree(path, ignore_errors=True)
        return not self.history.wrong

    def _run(self, path: Path) -> None:
        threads, opened = passing_threads(), len(descriptors())
        stack = Stack(self.history, path)
        try:
            self.servers = _versions(stack)
            load = Load(stack, self.seed)
            load.start()
            try:
                self._conduct(stack, load)
            finally:
                load.stop()
            the_writer.drain(timeout_s=10)
            self._look_at_keys(stack)
            self.local_hits = stack.caches["near"].stats().local.hits
        finally:
            stack.close()
        self._look_at_times()
        self._look_at_samples()
        self._look_at_what_is_left(threads, opened)

    # -- what happens ---------------------------------------------------------------------------------------------

    def _conduct(self, stack: Stack, load: Load) -> None:
        chosen = random.Random(self.seed)
        began_s = time.monotonic()
        self._wait_for_hits(stack, "the start", chosen)
        deck: list[str] = []
        due_s = began_s
        while time.monotonic() < began_s + self.seconds:
            due_s = max(due_s + EVERY_S, time.monotonic())
            deck = deck or chosen.sample(list(FAULTS), len(FAULTS))
            name, lasts_s = deck.pop(), chosen.uniform(0.5, 3.0)
            fault = FAULTS[name]
            with self.history.during(fault.window(name)):
                fault.happen(stack, lasts_s, chosen)
            self._wait_for_hits(stack, name, chosen)
            self._sample(load, time.monotonic() - began_s)
            if (left_s := min(due_s, began_s + self.seconds) - time.monotonic()) > 0:
                time.sleep(left_s)
        if "an answer of another tenant" in self.planted:
            call = self.history.begin("one", "far", CALLERS[0], "exact book")
            self.history.answered(call, self.history.text_of_answer(CALLERS[3], "exact book", "one"), "exact")
        if "a descriptor left behind" in self.planted:
            os.open("/dev/null", os.O_RDONLY)
        if "an entry without expiry" in self.planted:
            stack.server.client.hset(f"{stack.caches['far'].settings.namespace}:{{p00}}:e:0", "v", 1)

    def _wait_for_hits(self, stack: Stack, after: str, chosen: random.Random) -> None:
        """Wait until each cache hits again, on exact repeats and by meaning."""
        # Where a model server stalls, callers still wait for it.
        bound_s = HITS_AGAIN_S + (OLLAMA_S if after in FAULTS and FAULTS[after].where == "ollama" else 0.0)
        began_s = time.monotonic()
        missing = {(name, tier.name) for name in stack.caches for tier in TIERS}
        last = ""
        while missing:
            for name, tier in sorted(missing):
                if self._hits(stack, name, tier, chosen):
                    missing.discard((name, tier))
                    last = f"{name}, {tier}"
            took_s = time.monotonic() - began_s
            if took_s > bound_s * self.slow:
                self.slow = max(self.slow, slowness())
                if took_s > bound_s * self.slow:
                    self.history.violation("no hits again", f"{sorted(missing)} {took_s:.1f} s after {after}")
                    return
            time.sleep(0.02)
        if after in FAULTS:
            self.recovered.append((time.monotonic() - began_s, after, last))

    def _hits(self, stack: Stack, cache: str, tier: str, chosen: random.Random) -> bool:
        """Have a question of its own answered twice, the second time in other words if it is by meaning."""
        form = next(each for each in TIERS if each.name == tier)
        caller, model = CALLERS[0], "one" if cache == "far" else "scripted"
        thing = f"pin {self.seed} {chosen.randrange(10**9)}"
        message = None
        for question in (form.stored(thing), form.asked(thing)):
            call = self.history.begin(model, cache, caller, f"{tier} {thing}")
            try:
                with scope_of(caller, question):
                    message = stack.targets[model][1](caller).invoke(question)
            except Exception as exc:  # it is what this looks for
                self.history.failed(call, exc)
                return False
            self.history.answered(call, message.text, tier_of(message))
            the_writer.drain(timeout_s=5)
        return tier_of(message) == tier

    def _sample(self, load: Load, at_s: float) -> None:
        self.samples.append(Sample(at_s, rss_bytes(), len(descriptors()), threading.active_count(), load.tasks()))

    # -- what is looked at when it is over -------------------------------------------------------------------------

    def _look_at_keys(self, stack: Stack) -> None:
        client = stack.server.client
        found: Counter[bytes] = Counter()
        for name in client.scan_iter("*", count=1_000):
            if client.ttl(name) == -1 and not _LASTING.search(name):
                found[re.sub(rb"[0-9a-f]{8,}", b"...", name)] += 1
        if found:
            self.history.violation("an entry without expiry", f"{dict(found)}")

    def _look_at_times(self) -> None:
        self.slow = max(self.slow, slowness())
        for where, bound_s in (("redis", ADDED_S), ("embedder", ADDED_S + EMBED_S), ("ollama", ADDED_S)):
            names = [name for name, fault in FAULTS.items() if fault.where == where]
            if self.history.count("measured", names) < 100:
                continue
            added_s = self.added(0.99, names)
            if added_s > bound_s * self.slow:
                self.history.violation(
                    "a slow call",
                    f"faults of {where}: {added_s * 1000:.0f} ms more at p99 than without a cache; allowed are "
                    f"{bound_s * 1000:.0f} ms, {self.slow:.1f} times as long as the machine is slow",
                )

    def added(self, share: float, faults: list[str] | None = None) -> float:
        """Return by how much this share of the calls took longer than without a cache, at most, in seconds."""
        with_cache, without = (self.history.quantile(share, what, faults) for what in ("measured", "bare"))
        return (with_cache or 0.0) - (without or 0.0)

    def _look_at_samples(self) -> None:
        warm, middle, end = self.parts()
        if not warm or not middle or not end:
            return
        grown = statistics.median(s.rss_bytes for s in end) - statistics.median(s.rss_bytes for s in middle)
        if grown > GROWN_BYTES:
            self.history.violation("memory that grows", f"{grown / 1e6:.1f} MB more at the end than in the middle")
        for name, more in (("descriptors", MORE_DESCRIPTORS), ("threads", MORE_THREADS)):
            before = max(getattr(s, name) for s in (*warm, *middle))
            after = statistics.median(getattr(s, name) for s in end)
            if after > before + more:
                self.history.violation(f"{name} left behind", f"{after:g} at the end, {before} before")

    def parts(self) -> tuple[list[Sample], list[Sample], list[Sample]]:
        """Return what was seen in each third of the run: the first warms up; empty if there is too little."""
        if len(self.samples) < 12:
            return [], [], []
        third = len(self.samples) // 3
        return self.samples[:third], self.samples[third : 2 * third], self.samples[2 * third :]

    def _look_at_what_is_left(self, threads: set[threading.Thread], opened: int, patience_s: float = 10.0) -> None:
        until = time.monotonic() + patience_s
        while True:
            gc.collect()
            left, more = passing_threads() - threads, len(descriptors()) - opened
            if not left and more <= 0:
                return
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        if left:
            self.history.violation("threads left behind", f"{sorted(t.name for t in left)}")
        if more > 0:
            self.history.violation("descriptors left behind", f"{more} more: {Counter(descriptors().values())}")


def rss_bytes() -> int:
    """Return the memory that this process has in use, as the kernel counts it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@contextlib.contextmanager
def _nothing_unseen(history: History) -> Iterator[None]:
    """Note errors of threads, and such as nobody can raise."""
    hooks = threading.excepthook, sys.unraisablehook

    def seen(told) -> None:
        history.violation("an error that nobody has seen", f"{told.exc_type.__name__}: {told.exc_value}")

    threading.excepthook = sys.unraisablehook = seen
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = hooks


def _versions(stack: Stack) -> dict[str, str]:
    told = stack.server.client.info("server")
    name = "Valkey" if "valkey_version" in told else "Redis"
    names = ("langchain-aegis", "langchain-core", "langchain-ollama", "redis", "hiredis", "httpx", "pydantic")
    return {
        "Python": platform.python_version(),
        name: str(told.get("valkey_version") or told["redis_version"]),
        **{each: importlib.metadata.version(each) for each in names},
    }


def main(arguments: list[str] | None = None) -> int:
    """Run as a program; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1_800)
    parser.add_argument("--seed", type=int, help="default: another one each time")
    parser.add_argument("--report", type=Path, help="write what came of it into this file, between <!-- soak --> marks")
    parser.add_argument("--plant", action="append", default=[], help=argparse.SUPPRESS)
    told = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(10**6) if told.seed is None else told.seed
    print(f"soak: {told.seconds:g} s, seed {seed}", flush=True)
    soak = Soak(told.seconds, seed, tuple(told.plant))
    right = soak.run()
    for violation in soak.history.violations:
        print(f"\nVIOLATION, seed {seed}: {violation.kind}\n{violation.text}\nbefore:")
        print("\n".join(f"  {line}" for line in violation.before))
    print(text_of_report(soak))
    if told.report is not None:
        write_report(soak, told.report)
    return 0 if right else 1


if __name__ == "__main__":
    for name in list(os.environ):
        if name.startswith(("AEGIS_", "OLLAMA_", "REDIS_")) and name != "AEGIS_FAULT_SLACK":
            del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="aeg-", dir="/tmp") as home:
        os.environ["AEGIS_HOME"] = home
        sys.exit(main())
