"""Redis or we are killed while answers are written: what is served then is whole, and nothing lives for ever."""

import asyncio
import itertools
import json
import os
import random
import re
import signal
import socket
import threading
import time

import pytest
from caches import MODEL, Words, chat, prompt, text_of
from conftest import wait_until
from langchain_core.embeddings import Embeddings
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration

from faults.measure import ADDED_S, HITS_AGAIN_S, PRODUCTION, Load, within
from faults.recorder import questions
from langchain_aegis import AegisSemanticCache, aegis_scope
from langchain_aegis.entries import unseal


def write_for_ever(url, threads):
    """What our process does until it is killed: four threads write for a tenant each."""
    cache = AegisSemanticCache(url, Words(), namespace="killed", max_entries_per_tenant=300)

    def write(number):
        for i in itertools.count():
            text = json.dumps({"writer": number, "i": i, "body": "x" * (i * 7919 % 6000)})
            message = AIMessage(text, response_metadata={"done_reason": "stop"})
            with aegis_scope(tenant=f"t{number}"):
                asked = prompt(f"What is the fee of item {i % 200} of {number}?")
                cache.update(asked, MODEL, [ChatGeneration(message=message)])

    for number in range(threads):
        threading.Thread(target=write, args=(number,), daemon=True).start()
    threading.Event().wait()


class Writers:
    """A process of ours that writes until it is killed: a forked child."""

    def __init__(self, server, threads=4):
        self.pid = os.fork()
        if self.pid == 0:
            try:
                write_for_ever(server.unix_url, threads)
            finally:
                os._exit(1)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def our_own(new_server):
    return new_server()


def check(server, cache):
    """Look at every key and every entry; returns how many entries there are and how many could be served."""
    names = list(server.client.scan_iter("killed:*", count=1_000))
    kinds = {name: name.split(b":")[2] for name in names}
    lives = dict(zip(names, (server.client.pttl(name) for name in names), strict=True))
    # What says when things were invalidated, and which tenants have sets, stays: all else ends.
    immortal = {name for name, ttl in lives.items() if ttl < 0 and kinds[name] not in (b"epochs", b"z")}
    immortal |= {n for n, ttl in lives.items() if ttl < 0 and n.startswith(b"killed:{p00}:z:")}
    assert not immortal
    served = 0
    entries = [name for name in names if kinds[name] == b"e"]
    for name in entries:
        record = unseal(server.client.hgetall(name), cache._engine.keyring.seal)
        assert record is not None, f"torn: {name}"
        served += 1
    return len(entries), served


@pytest.mark.row(37)
@pytest.mark.parametrize("killed", ["redis", "us"])
@pytest.mark.deadline(900)
@pytest.mark.slow
def test_whoever_is_killed_while_four_write_leaves_nothing_torn_or_immortal(our_own, new_cache, rounds, killed):
    """AEGIS_FAULT_ROUNDS=50 makes as many rounds as are promised."""
    cache = new_cache(url=our_own.unix_url, namespace="killed")
    writers, looked_at = None, 0
    for number in range(rounds(3)):
        if writers is None:
            writers = Writers(our_own)
        before = our_own.calls("hset")
        wait_until(lambda before=before: our_own.calls("hset") > before + 100, what="some writes")
        time.sleep(0.001 * (number * 37 % 50))  # any moment of a write is as good as another
        if killed == "redis":
            our_own.kill()
            our_own.start()
        else:
            writers.kill()
            writers = None
        our_own.client.connection_pool.disconnect()
        entries, served = check(our_own, cache)
        assert entries == served
        looked_at += entries
    if writers is not None:
        writers.kill()
    assert looked_at > 0


@pytest.mark.row(38)
@pytest.mark.slow
def test_a_log_that_is_cut_anywhere_loads_and_serves_nothing_wrong(our_own, new_recorder, stored, rounds):
    recorder = new_recorder(url=our_own.unix_url, namespace="killed")
    asked = questions(30)
    Load(recorder, "threads", 8)(asked)
    stored()
    wait_until(lambda: Load(recorder, "threads", 8)(asked).hits == len(asked))
    our_own.client.execute_command("CONFIG", "SET", "appendfsync", "always")
    our_own.client.set("last", "x")
    our_own.kill()
    (log,) = (our_own.path / "appendonlydir").glob("*.incr.aof")
    whole = log.read_bytes()
    for cut in [1, 7, 300, 1_111, 5_000, *range(11, len(whole) // 2, len(whole) // max(2, rounds(4)))]:
        log.write_bytes(whole[:-cut])
        our_own.start()
        our_own.client.connection_pool.disconnect()
        recorder.cache._connections.breaker.succeeded()
        check(our_own, recorder.cache)
        seen = Load(recorder, "threads", 8)(asked)  # the recorder looks at each
        assert seen.hits >= 0 and not seen.errors
        stored()
        our_own.kill()


@pytest.mark.row(10)
@pytest.mark.slow
@pytest.mark.parametrize("how", ["tasks", "threads"])
def test_a_redis_that_still_reads_its_data_is_a_miss(new_server, new_recorder, stored, how):
    # While it loads it looks at its connections after every 1,024 keys.
    server = new_server(search=False, key_load_delay=100)
    pipe = server.client.pipeline(transaction=False)
    for number in range(25_000):
        pipe.set(f"k{number}", "v")
    pipe.execute()
    load = Load(new_recorder(url=server.url, **PRODUCTION), how, 16)
    asked = questions(20)
    load(asked)
    stored()
    wait_until(lambda: load(asked).hits == len(asked))
    server.client.execute_command("CONFIG", "SET", "appendfsync", "always")
    server.client.set("last", "x")
    server.kill()
    server.start(ready=False)
    wait_until(lambda: _says_loading(server), what="a server that loads")
    within(ADDED_S, lambda: load.added(asked * 3) if _says_loading(server) else 0.0)
    assert load.recorder.cache.stats().reasons.keys() & {"redis_down", "redis_slow"}
    server.wait()
    began = time.monotonic()
    wait_until(lambda: load(asked).hits == len(asked), HITS_AGAIN_S)
    assert time.monotonic() - began <= HITS_AGAIN_S


def _says_loading(server):
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=2) as one:
            one.sendall(b"PING\r\n")
            return one.recv(100).startswith(b"-LOADING")
    except OSError:
        return False


@pytest.mark.row(19)
@pytest.mark.slow
def test_after_a_kill_the_exact_tier_hits_at_once_and_the_other_soon(our_own, new_recorder, stored):
    recorder = new_recorder(
        url=our_own.unix_url, embeddings=Words(), min_similarity=0.9, alike=lambda q: q.replace(" please", "")
    )  # fmt: skip
    asked = [f"What is the fee of item {i} in the big hall?" for i in range(300)]
    again = [f"What is the fee of item {i} in the big hall please?" for i in range(10)]
    load = Load(recorder, "threads", 8)
    load(asked)
    stored()
    our_own.client.execute_command("CONFIG", "SET", "appendfsync", "always")
    our_own.client.set("last", "x")
    stored_then = len(our_own.entries())
    our_own.kill()
    our_own.start()
    our_own.client.connection_pool.disconnect()
    wait_until(lambda: recorder.ask(asked[0]), HITS_AGAIN_S)
    seen = load(asked)
    assert stored_then >= 290
    assert seen.hits >= stored_then - 5  # a thread may find its connection closed
    assert our_own.indexes()
    load(again)  # misses or hits, and no error
    stored()
    wait_until(lambda: load(again).hits == len(again), HITS_AGAIN_S)


class Spread(Embeddings):
    """Questions with the same number are near each other, others are not."""

    model = "spread"

    def embed_query(self, text):
        item, words = (random.Random(seed) for seed in (re.search(r"\d+", text).group(), text))
        return [item.gauss(0, 1) + words.gauss(0, 0.3) for _ in range(64)]

    def embed_documents(self, texts):
        return [self.embed_query(text) for text in texts]


ENTRIES = int(os.environ.get("AEGIS_FAULT_ENTRIES", "2000"))


@pytest.mark.row(19)
@pytest.mark.slow
@pytest.mark.deadline(900)
@pytest.mark.parametrize("awaited", [False, True])
def test_after_a_kill_among_very_many_entries_exact_repeats_hit_at_once(our_own, new_cache, stored, caplog, awaited):
    """Those by meaning as the index is made again, and nobody hears of that. AEGIS_FAULT_ENTRIES=100000 as promised."""
    cache = new_cache(url=our_own.unix_url, embeddings=Spread(), min_similarity=0.7, embed_budget_s=10, repeats="serve")

    def asked(number, words="What is the fee of item"):
        return prompt(f"{words} {number}?")

    def tenant(number):
        return aegis_scope(tenant=f"t{number % 100}")

    for number in range(ENTRIES):
        with tenant(number):
            cache.update(asked(number), MODEL, chat(f"answer {number}"))
        if number % 500 == 0:
            stored()
    stored()
    our_own.client.execute_command("CONFIG", "SET", "appendfsync", "always")
    our_own.client.set("last", "x")
    sample = random.Random(7).sample(range(ENTRIES), 200)

    def hits(words="What is the fee of item"):
        """Look the sample up; how many are answered, each with its own answer."""

        async def all_of_them():
            return [await one(number) for number in sample]

        async def one(number):
            with tenant(number):
                return await cache.alookup(asked(number, words), MODEL)

        def blocking(number):
            with tenant(number):
                return cache.lookup(asked(number, words), MODEL)

        found = asyncio.run(all_of_them()) if awaited else [blocking(number) for number in sample]
        answers = [text_of(each) for each in found]
        assert all(a in (None, f"answer {number}") for a, number in zip(answers, sample, strict=True))
        return len(sample) - answers.count(None)

    assert hits() == len(sample)
    our_own.kill()
    began = time.monotonic()
    our_own.start(patience_s=20 + ENTRIES * 0.002)  # it makes the index as it reads its data
    loaded = time.monotonic()
    our_own.client.connection_pool.disconnect()
    cache._connections.close()  # whatever was open is known to be gone
    assert hits() == len(sample)
    at_once = hits("What is the price of item")
    # Making the index again costs a fraction of a millisecond an entry, on a machine that does nothing else.
    wait_until(
        lambda: hits("What is the price of item") == len(sample), HITS_AGAIN_S + ENTRIES * 0.002, "hits by meaning"
    )
    print(
        f"{ENTRIES:,} entries: loaded in {loaded - began:.1f} s; exact {len(sample)} of {len(sample)} at once, by "
        f"meaning {at_once} at once, all {time.monotonic() - loaded:.1f} s later"
    )
    said = {r.getMessage().partition(":")[0] for r in caplog.records if r.levelname == "WARNING"}
    assert said <= {"redis_unavailable"}
    assert len(our_own.indexes()) == 1


@pytest.mark.row(2, 37)
@pytest.mark.slow
def test_a_redis_that_is_killed_again_and_again_while_many_ask_serves_nothing_wrong(our_own, new_recorder, rounds):
    load = Load(new_recorder(url=our_own.url, **PRODUCTION), "threads", 16)
    asked = questions(60)
    done = threading.Event()

    def kill():
        for _ in range(rounds(3)):
            time.sleep(0.15)
            our_own.kill()
            time.sleep(0.05)
            our_own.start()
        done.set()

    killer = threading.Thread(target=kill)
    killer.start()
    while not done.is_set():
        load(asked)
    killer.join()
    wait_until(lambda: load(asked).hits == len(asked), HITS_AGAIN_S)
