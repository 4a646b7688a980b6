"""How long does a search by meaning take in scopes of every size, and is it done in the better way?

Fills a private Redis through the store with questions around 256 topics, in scopes of 1 entry up to half of all, and
looks paraphrases up, in turns: as the store does it, comparing the scope one by one (ADHOC_BF), and along the graph
(BATCHES). Prints medians in milliseconds, the ratio to the better of the two, how many of the nearest were found, and
the memory that an entry takes.
Run: python benchmarks/scopes.py [--entries 100000] [--rounds 60] [--answer-bytes 1000]
"""

import argparse
import os
import statistics
import time

import numpy
import redis

from langchain_aegis.connections import Connections
from langchain_aegis.embedded import EmbeddedRedis
from langchain_aegis.entries import Record
from langchain_aegis.flows import run
from langchain_aegis.store import Store

DIMENSIONS, TOPICS, EMBEDDER, THINGS = 384, 256, "abcd1234", ["namespace", "tenant:a"]
SHARES = (0.00001, 0.0002, 0.003, 0.01, 0.03, 0.1, 0.5)
SLOW_S = 0.01  # a way that takes longer is measured a few times only


def vectors(count, drawn):
    topics = drawn.standard_normal((TOPICS, DIMENSIONS), dtype=numpy.float32)
    made = topics[drawn.integers(0, TOPICS, count)] + drawn.standard_normal((count, DIMENSIONS), dtype=numpy.float32)
    return made / numpy.linalg.norm(made, axis=1, keepdims=True)


def packed(vector):
    return (vector / numpy.linalg.norm(vector)).astype("<f2").tobytes()


def fill(store, connections, made, scopes, answer):
    epochs = run(store.epochs(THINGS), connections.perform)
    now_ms = time.time_ns() // 1_000_000
    for i, (vector, scope) in enumerate(zip(made, scopes, strict=True)):
        record = Record(
            key=f"{i:032x}", scope=scope, emb=EMBEDDER, digest="", created_ms=now_ms, expires_ms=now_ms + 86_400_000,
            epochs=epochs.stamp(), answer=answer, profile=b"p" * 80, vec=packed(vector), sets=("tenant:a",),
        )  # fmt: skip
        put = store.put(record, things=THINGS, now_ms=now_ms, tenanted=False)
        assert run(put, connections.perform) == "stored"
    return epochs


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--answer-bytes", type=int, default=1_000)
    told = parser.parse_args()
    drawn = numpy.random.default_rng(5)
    made = vectors(told.entries, drawn)
    sizes = [max(1, round(share * told.entries)) for share in SHARES]
    scopes = [f"{size:032x}" for size in sizes for _ in range(size)]
    scopes += [f"{0:032x}"] * (told.entries - len(scopes))
    scopes = [scopes[i] for i in drawn.permutation(told.entries)]
    with EmbeddedRedis(shared=False) as server:
        client = redis.Redis.from_url(server.url, protocol=2)
        client.config_set("maxmemory", 0)
        store, connections = Store("bench", b"m" * 32, "f00"), Connections(server.url, budget_s=60)
        before, began = client.info("memory")["used_memory"], time.perf_counter()
        epochs = fill(store, connections, made, scopes, b"a" * told.answer_bytes)
        took_s, used = time.perf_counter() - began, client.info("memory")["used_memory"] - before
        print(f"{told.entries} entries in {took_s:.0f} s, {used / told.entries:.0f} bytes each; load {os.getloadavg()}")
        print(
            "| entries of the scope | store | ADHOC_BF | BATCHES | store / better | found |\n|---|---|---|---|---|---|"
        )
        by_scope = {size: [i for i, s in enumerate(scopes) if s == f"{size:032x}"] for size in sizes}

        def as_the_store(scope, vector):
            return [n.record.key for n in run(store.nearest(scope, EMBEDDER, vector, 5, epochs, 9_000, lowest=0.9),
                                              connections.perform)]  # fmt: skip

        def searched(how):
            def search(scope, vector):
                query = f"(@scope:{{{scope}}})=>[KNN 5 @vec $v HYBRID_POLICY {how} AS d]"
                client.execute_command("FT.SEARCH", f"bench:{{p00}}:idx:{EMBEDDER}:v2", query, "PARAMS", 2, "v", vector,
                                       "RETURN", 1, "d", "LIMIT", 0, 5, "TIMEOUT", 9_000, "DIALECT", 2)  # fmt: skip

            return search

        ways = {"store": as_the_store, "ADHOC_BF": searched("ADHOC_BF"), "BATCHES": searched("BATCHES")}
        for size, members in by_scope.items():
            times, found = {name: [] for name in ways}, []
            for _ in range(told.rounds):
                i = int(drawn.choice(members))
                vector = packed(made[i] + 0.25 / DIMENSIONS**0.5 * drawn.standard_normal(DIMENSIONS))
                for way, search in ways.items():
                    if len(times[way]) > 2 and statistics.median(times[way]) > SLOW_S:
                        continue
                    started = time.perf_counter()
                    keys = search(f"{size:032x}", vector)
                    times[way].append(time.perf_counter() - started)
                    if way == "store":
                        found.append(f"{i:032x}" in keys)
            ms = {way: statistics.median(took) * 1e3 for way, took in times.items()}
            better = min(ms["ADHOC_BF"], ms["BATCHES"])
            print(f"| {size} | {ms['store']:.2f} | {ms['ADHOC_BF']:.2f} | {ms['BATCHES']:.2f} | "
                  f"{ms['store'] / better:.2f} | {sum(found) / len(found):.0%} |", flush=True)  # fmt: skip
        connections.close()


if __name__ == "__main__":
    main()
