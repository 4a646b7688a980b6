"""What does an exact hit cost from the local tier, how soon is a change heard, and what do pushes cost the server?

A prompt of 1 kB and an answer of 1 kB; hits are medians of interleaved rounds, with a raw GET of as many bytes beside
them. A change is heard once the tier holds the record no more, counted from before it is sent, over another connection
of the same process. What pushes cost is CPU of the server per write of a record, with listeners that read all that they
are told. Run: python benchmarks/local_tier.py
"""

import asyncio
import os
import socket
import statistics
import threading
import time
from urllib.parse import urlsplit

import redis
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration

from langchain_aegis import AegisSemanticCache
from langchain_aegis.embedded import EmbeddedRedis
from langchain_aegis.links import packed
from langchain_aegis.local_tier import LocalTier
from langchain_aegis.writes import the_writer

ROUNDS, CALLS, CHANGES, WRITES = 9, 300, 1_000, 10_000
LISTENERS = (0, 1, 10, 50)
MODEL = "[('_type', 'chat'), ('model', 'm'), ('stop', None)]"
PROMPT = dumps([HumanMessage("x" * 1_000 + " What is the fee?")])
ANSWER = [ChatGeneration(message=AIMessage("y" * 1_000, response_metadata={"done_reason": "stop"}))]


def open_cache(url, namespace="bench", **options):
    cache = AegisSemanticCache(url, namespace=namespace, op_budget_s=5, **options)
    cache._engine.embedder._make = lambda: None  # exact tier
    return cache


def median_us(call):
    times = []
    for _ in range(CALLS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


async def amedian_us(call):
    times = []
    for _ in range(CALLS):
        began = time.perf_counter()
        await call()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def ready(cache):
    """Ask until the tier answers."""
    before = cache.stats().local.hits
    while cache.stats().local.hits == before:
        assert cache.lookup(PROMPT, MODEL)


async def hits(url, plain, tiered):
    raw = redis.Redis.from_url(url, protocol=2)
    raw.set("raw", b"y" * 1_500)
    rows = {name: [] for name in ("raw GET", "Redis, sync", "local, sync", "Redis, async", "local, async")}
    for _ in range(ROUNDS):
        ready(tiered)
        rows["raw GET"].append(median_us(lambda: raw.get("raw")))
        for name, cache in (("Redis", plain), ("local", tiered)):
            rows[f"{name}, sync"].append(median_us(lambda c=cache: c.lookup(PROMPT, MODEL)))
            rows[f"{name}, async"].append(await amedian_us(lambda c=cache: c.alookup(PROMPT, MODEL)))
    for name, values in rows.items():
        print(f"{name:13} {statistics.median(values):6.1f} µs ({min(values):.1f} to {max(values):.1f})")
    await plain.aclose()


def changes(url, cache):
    heard, at_s, took = threading.Event(), [0.0], []
    changed = LocalTier.changed

    def note(tier, names):
        changed(tier, names)
        at_s[0] = time.perf_counter()
        heard.set()

    client = redis.Redis.from_url(url, protocol=2)
    (name,) = client.scan_iter("bench:*:e:*")
    ready(cache)
    LocalTier.changed = note
    for _ in range(CHANGES):
        heard.clear()
        began = time.perf_counter()
        client.hset(name, "unknown", "1")
        assert heard.wait(5)
        took.append((at_s[0] - began) * 1e6)
    LocalTier.changed = changed
    cuts = statistics.quantiles(took, n=100)
    print(f"a change is heard after {cuts[49]:.0f} µs (p50), {cuts[98]:.0f} µs (p99), {max(took):.0f} µs at most")


def listener(path):
    """Connect as the tier does, and read all that comes."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    prefixes = ("PREFIX", "bench:{p00}:e:", "PREFIX", "bench:{p00}:epochs")
    sock.sendall(packed([("HELLO", "3"), ("CLIENT", "TRACKING", "ON", "BCAST", *prefixes)]))

    def read():
        while sock.recv(1 << 20):
            pass

    threading.Thread(target=read, daemon=True).start()


def cost(url, pid):
    client = redis.Redis.from_url(url, protocol=2)
    hertz = os.sysconf("SC_CLK_TCK")

    def cpu_s():
        with open(f"/proc/{pid}/stat") as file:
            return sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / hertz

    def per_write_us(batch):
        began = cpu_s()
        for start in range(0, WRITES, batch):
            pipe = client.pipeline(transaction=False)
            for i in range(start, start + batch):
                pipe.hset(f"bench:{{p00}}:e:{i % 1_000:032d}", "answer", b"y" * 1_000)
            pipe.execute()
        return (cpu_s() - began) / WRITES * 1e6

    there = 0
    for many in LISTENERS:
        for _ in range(many - there):
            listener(urlsplit(url).path)
        there = many
        print(f"{many:3} listeners: {per_write_us(1):5.1f} µs of the server per write, {per_write_us(100):5.1f} in "
              "batches of 100")  # fmt: skip


if __name__ == "__main__":
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with EmbeddedRedis(shared=False) as server:
        plain, tiered = open_cache(server.url), open_cache(server.url, local_tier_bytes=1 << 20)
        plain.lookup(PROMPT, MODEL)
        plain.update(PROMPT, MODEL, ANSWER)
        the_writer.drain(timeout_s=10)
        asyncio.run(hits(server.url, plain, tiered))
        changes(server.url, tiered)
        plain.close()
        tiered.close()
        cost(server.url, server.pid)
