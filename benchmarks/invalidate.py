"""What does it cost the others when a tenth of a large cache is invalidated?

Fills a private Redis with entries in scopes of 20, a tenth of which rests on one source and another tenth of which
belongs to one tenant. 64 callers in two processes look up, exactly and by meaning, nine in ten times an entry of the
others, and think between two lookups. Then each tenth is invalidated.
Run: python benchmarks/invalidate.py [--entries 100000] [--think-ms 100]
"""

import argparse
import asyncio
import functools
import multiprocessing
import random
import statistics
import time

import numpy
import redis

from langchain_aegis.connections import Connections
from langchain_aegis.embedded import EmbeddedRedis
from langchain_aegis.entries import Record
from langchain_aegis.flows import arun, run
from langchain_aegis.seals import Seal
from langchain_aegis.store import Invalidation, Store
from langchain_aegis.sweeper import the_sweeper

CALLERS, PROCESSES, DIMENSIONS, SCOPE_SIZE = 64, 2, 384, 20
EMBEDDER = "abcd1234"
KINDS = {"source": 0, "tenant": 1}  # last digit of the entries that are invalidated


def store():
    return Store("bench", Seal([b"m" * 32]), "f00")


def name(i):
    return f"{i:032x}"


def scope(i):
    return f"{i // SCOPE_SIZE:032x}"


def tenant(i):
    return f"tenant:{i % 10}"


@functools.cache
def vector(i):
    values = numpy.random.default_rng(i).standard_normal(DIMENSIONS)
    return (values / numpy.linalg.norm(values)).astype("<f2").tobytes()


def fill(url, count):
    """Write all entries through the store, many flows at a time."""
    kept, connections = store(), Connections(url, budget_s=60)
    epochs = run(kept.epochs(["namespace"]), connections.perform)
    answer = b'{"kind":"value","item":"' + b"a" * 500 + b'"}'
    started = time.perf_counter()

    def put(i):
        now_ms = time.time_ns() // 1_000_000
        sources = (f"source:{'doomed' if i % 10 == KINDS['source'] else i % 997}",)
        record = Record(
            key=name(i), scope=scope(i), emb=EMBEDDER, digest="", created_ms=now_ms, expires_ms=now_ms + 3_600_000,
            epochs=epochs.stamp, answer=answer, vec=vector(i), src=sources, sets=(tenant(i), *sources),
        )  # fmt: skip
        return kept.put(record, things=["namespace", tenant(i), *sources], now_ms=now_ms, tenanted=True)

    assert run(put(0), connections.perform) == "stored"
    with redis.Redis.from_url(url, socket_timeout=600) as client:
        for start in range(1, count, 200):
            pipe = client.pipeline(transaction=False)
            for i in range(start, min(start + 200, count)):
                (command,) = put(i).send(None).each
                pipe.execute_command(*command)
            assert set(pipe.execute()) == {b"stored"}
    connections.close()
    return time.perf_counter() - started


async def call(url, count, think_s, seed, until, phase, ready, told):
    """Look up until told to stop; tells (when it began, seconds, whether of the doomed, whether served) of each."""
    kept, connections = store(), Connections(url, budget_s=60)

    async def caller(number):
        drawn, seen = random.Random(seed * 1000 + number), []
        while not until.is_set():
            await asyncio.sleep(drawn.uniform(0, 2 * think_s))
            doomed = drawn.random() < 0.1
            digit = phase.value if doomed else drawn.randrange(2, 10)
            i = drawn.randrange(count // 10) * 10 + digit
            began = time.monotonic()
            record, epochs = await arun(kept.read(name(i), ["namespace", tenant(i)]), connections.aperform)
            near = await arun(kept.nearest(scope(i), EMBEDDER, vector(i), 5, epochs, 5_000), connections.aperform)
            hits = {n.record.key for n in near if n.similarity > 0.99} | ({record.key} if record else set())
            if len(seen) == 10:
                ready.release()
            seen.append((began, time.monotonic() - began, digit, name(i) in hits))
        return seen

    told.put([s for seen in await asyncio.gather(*map(caller, range(CALLERS // PROCESSES))) for s in seen])
    await connections.aclose()


def work(*arguments):
    asyncio.run(call(*arguments))


def p99(seconds):
    return statistics.quantiles(seconds, n=100)[98] * 1e3


def measure(url, count, think_s, kind):
    context = multiprocessing.get_context("spawn")
    until, told, phase = context.Event(), context.Queue(), context.Value("i", KINDS[kind])
    ready = context.Semaphore(0)
    callers = [
        context.Process(target=work, args=(url, count, think_s, KINDS[kind] * 10 + n, until, phase, ready, told))
        for n in range(PROCESSES)
    ]
    for process in callers:
        process.start()
    kept, connections = store(), Connections(url, budget_s=60)
    thing = "source:doomed" if kind == "source" else tenant(KINDS[kind])
    for _ in range(CALLERS):
        ready.acquire(timeout=120)
    time.sleep(10)
    asked = time.monotonic()
    what = Invalidation([thing], [[thing]], kind == "source", now_ms=time.time_ns() // 1_000_000)
    removed = run(kept.invalidate(what), connections.perform)
    returned = time.monotonic()
    the_sweeper.wake(kept, connections)
    assert the_sweeper.wait(900)
    swept = time.monotonic()
    time.sleep(3)
    until.set()
    seen = [s for _ in callers for s in told.get(timeout=60)]
    for process in callers:
        process.join(60)
    others = [(began, took) for began, took, digit, _ in seen if digit != KINDS[kind]]
    before = [took for began, took in others if asked - 10 < began < asked - 0.5]
    during = [took for began, took in others if asked <= began < swept]
    wrong = sum(hit for began, _, digit, hit in seen if digit == KINDS[kind] and began > returned)
    right = sum(hit for began, _, digit, hit in seen if digit == KINDS[kind] and began < asked)
    print(f"one {kind}: {removed} of {count} entries invalidated in {(returned - asked) * 1e3:.0f} ms; "
          f"{right} hits on them before, {wrong} after the call returned")  # fmt: skip
    print(f"  lookups of the others: before p50 {statistics.median(before) * 1e3:.1f} ms, p99 {p99(before):.1f} ms, "
          f"{len(before) / 9.5:.0f}/s; during the sweep p50 {statistics.median(during) * 1e3:.1f} ms, "
          f"p99 {p99(during):.1f} ms ({p99(during) / p99(before):.2f}x), {len(during) / (swept - asked):.0f}/s, "
          f"slowest {max(during) * 1e3:.0f} ms")  # fmt: skip
    print(f"  swept in {swept - returned:.0f} s")
    connections.close()
    return wrong == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--think-ms", type=float, default=100, help="mean pause of a caller; 0: none")
    told = parser.parse_args()
    count = told.entries
    with EmbeddedRedis(shared=False) as server:
        with redis.Redis.from_url(server.url) as client:
            client.config_set("maxmemory", 0)
        print(f"{count} entries of {DIMENSIONS} dimensions written in {fill(server.url, count):.0f} s")
        good = [measure(server.url, count, told.think_ms / 1e3, kind) for kind in KINDS]
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
