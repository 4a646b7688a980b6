"""Redis may be away, frozen, full, read-only, locked or emptied: no call fails, and hardly one waits."""

import asyncio
import contextlib
import logging
import socket
import threading
import time
from contextlib import contextmanager

import pytest
from caches import Words
from conftest import wait_until
from langchain_core.caches import BaseCache

from faults.measure import (
    ADDED_OPEN_S,
    ADDED_S,
    HITS_AGAIN_S,
    PRODUCTION,
    SLACK,
    Load,
    slowness,
    standing_still,
    within,
)
from faults.recorder import Recorder, Seen, Speaking, questions
from faults.watch import no_tasks_left, nothing_left
from langchain_aegis import AegisConfigError, AegisConnectionError, AegisError, AegisSemanticCache
from langchain_aegis.breaker import Breaker

ASKED = questions(40)
PROBE_S = 5.0  # from one probe to the next
HOW = pytest.mark.parametrize("how", ["tasks", "threads"])
# Sixty-four threads on two cores take their time.
HOW_MANY = pytest.mark.parametrize("how", ["tasks", pytest.param("threads", marks=pytest.mark.slow)])


@pytest.fixture
def warm(server, new_recorder, stored):
    """Makes a load whose 40 questions are stored already, over the server's port."""

    def make(how="tasks", at_once=64, **told):
        load = Load(new_recorder(**{"url": server.url, **PRODUCTION, **told}), how, at_once)
        load(ASKED)
        stored()
        wait_until(lambda: load(ASKED).hits == len(ASKED))
        return load

    return make


def hits_again(load, since):
    """Wait until all hit again; returns how long ago `since` was."""
    one = load.recorder
    wait_until(lambda: one.ask(ASKED[0]) and Load(one, load.how, 4)(ASKED).hits == len(ASKED), HITS_AGAIN_S, "a hit")
    return time.monotonic() - since


def reasons(recorder):
    return recorder.cache.stats().reasons


# -- away -------------------------------------------------------------------------------------------------------------


@pytest.mark.row(1)
@HOW_MANY
@pytest.mark.slow
def test_a_redis_that_was_never_there_costs_nobody_an_answer(server, new_recorder, how):
    server.kill()
    load = Load(new_recorder(url=server.url, **PRODUCTION), how, at_once=1)
    load(questions(4))
    assert not load.recorder.cache._connections.breaker.open
    load(questions(1))
    assert load.recorder.cache._connections.breaker.open
    within(2 * ADDED_OPEN_S, load.added_one_by_one)
    within(ADDED_S, lambda: max(load(questions(1_000)).took))
    assert set(reasons(load.recorder)) == {"redis_down"}


@pytest.mark.row(1)
@pytest.mark.parametrize("how", ["tasks", "threads"])
@pytest.mark.slow
def test_of_a_redis_that_never_said_a_word_five_calls_wait(server, new_recorder, how):
    load = Load(new_recorder(url=server.url, **PRODUCTION), how, at_once=1)
    with server.frozen():
        load(questions(30))
    assert 5 <= reasons(load.recorder)["redis_slow"] <= 7  # and one a second: a busy machine may take longer
    assert load.recorder.calls == 30


@pytest.mark.row(2)
@HOW_MANY
@pytest.mark.slow
def test_a_redis_killed_under_load_costs_nobody_an_answer_and_hits_return_with_it(server, warm, how, rounds):
    for _ in range(rounds(1)):
        load = warm(how)
        within(ADDED_S, lambda load=load: load.added(ASKED * 20, during=server.kill) if server.alive else 0.0)
        assert load.recorder.cache._connections.breaker.open
        within(ADDED_OPEN_S, load.added_one_by_one)
        server.start()
        assert hits_again(load, time.monotonic()) <= HITS_AGAIN_S


@contextmanager
def paused(server, *how):
    """A pause of all clients ends by itself alone: it holds up the command that would end it, too."""
    server.client.execute_command("CLIENT", "PAUSE", 1_500 if how == ("ALL",) else 60_000, *how)
    yield
    server.client.execute_command("CLIENT", "UNPAUSE")


@contextmanager
def asleep(server):
    """DEBUG SLEEP ends by itself."""
    thread = threading.Thread(target=lambda: server.client.execute_command("DEBUG", "SLEEP", "2"))
    thread.start()
    yield
    thread.join()


@pytest.mark.row(3, 4, 6)
@pytest.mark.parametrize("fault", ["frozen", *(pytest.param(f, marks=pytest.mark.slow) for f in ("paused", "asleep"))])
@HOW_MANY
def test_a_redis_that_says_nothing_costs_a_tenth_of_a_second_and_then_nothing(server, warm, fault, how):
    load = warm(how)
    stop = {"frozen": server.frozen, "paused": lambda: paused(server, "ALL"), "asleep": lambda: asleep(server)}[fault]

    def added():
        with stop():
            waited = reasons(load.recorder).get("redis_slow", 0)
            took = load.added(ASKED * 15)
            if fault == "frozen":
                assert load.recorder.cache._connections.breaker.open
                # Only those that were under way when it froze have waited for it, and one more a second.
                assert reasons(load.recorder)["redis_slow"] - waited <= 64 + 20
            return took

    within(ADDED_S, added)
    if fault == "frozen":
        with server.frozen():
            load(ASKED)
            within(ADDED_OPEN_S, load.added_one_by_one)
    # Whatever it says now is late, and is nobody's answer: the recorder looks at each.
    assert hits_again(load, time.monotonic()) <= HITS_AGAIN_S


@pytest.mark.row(20)
@HOW_MANY
@pytest.mark.slow
def test_while_redis_is_away_one_probe_in_five_seconds_tries_and_no_caller_waits(server, proxy, new_recorder, how):
    """The network resets what comes, then takes it again: the first probe that is answered ends it."""
    load = Load(new_recorder(url=proxy.url, **PRODUCTION), how, at_once=64)
    load(questions(64))
    connections = load.recorder.cache._connections
    proxy.down.reset, proxy.down.cut_after = True, 0
    load(questions(64))
    assert connections.breaker.open
    before, began, waited = proxy.made, time.monotonic(), reasons(load.recorder)
    while (took := time.monotonic() - began) < 11:
        load(questions(64))
    assert 1 <= proxy.made - before <= took / PROBE_S + 1
    assert reasons(load.recorder).get("redis_slow", 0) == waited.get("redis_slow", 0)
    proxy.heal()
    assert hits_again(load, time.monotonic()) <= HITS_AGAIN_S


@pytest.mark.row(3, 20)
@pytest.mark.slow
def test_a_redis_that_thaws_is_asked_again_at_once(server, new_recorder):
    """What was asked while it was frozen is answered then; it need not be asked anew five seconds later."""
    recorder = new_recorder(url=server.url, **PRODUCTION)
    breaker, clock = recorder.cache._connections.breaker, [0.0]
    breaker._clock = lambda: clock[0]
    with server.frozen():
        while not breaker.open:
            recorder.ask("Why?")
        clock[0] += PROBE_S
        for _ in range(20):
            recorder.ask("Why?")
        assert [breaker.allow() for _ in range(20)] == [False] * 20
        clock[0] += 10 * PROBE_S  # one at a time, however long it takes
        probes = [t for t in threading.enumerate() if t.name == "aegis-probe"]
        assert not breaker.allow()
        assert [t for t in threading.enumerate() if t.name == "aegis-probe"] == probes
    wait_until(lambda: not breaker.open)
    assert breaker.allow()


@pytest.mark.row(20)
@pytest.mark.parametrize("fault", ["gone", "frozen", "locked"])
@pytest.mark.slow
def test_a_probe_ends_with_its_cache_and_leaves_nothing(server, new_cache, fault):
    cache = new_cache(url=server.url, **PRODUCTION)
    breaker = cache._connections.breaker
    if fault == "gone":
        server.kill()
    elif fault == "locked":
        server.client.config_set("requirepass", "s3cret")
    with nothing_left(), server.frozen() if fault == "frozen" else contextlib.nullcontext():
        for _ in range(5):
            breaker.failed()
        breaker._next_try = 0.0
        assert not breaker.allow()
        if fault == "frozen":
            wait_until(lambda: cache._connections._probing)
        cache.close()
        wait_until(lambda: not breaker._trying, 3)
        assert breaker.open


@pytest.mark.row(20)
def test_of_many_that_find_the_breaker_half_open_one_may_try():
    now = [0.0]
    breaker = Breaker(clock=lambda: now[0])
    for _ in range(5):
        breaker.failed()
    for second in range(1, 5):
        now[0] = second + 0.01 * second
        allowed, start = [], threading.Barrier(32)

        def one(start=start, allowed=allowed):
            start.wait(10)
            allowed.append(breaker.allow())

        many = [threading.Thread(target=one) for _ in range(32)]
        for thread in many:
            thread.start()
        for thread in many:
            thread.join()
        assert sum(allowed) == 1
    breaker.succeeded()
    assert all(breaker.allow() for _ in range(100))


@pytest.mark.row(21)
@pytest.mark.slow
def test_a_redis_that_freezes_every_half_second_costs_nobody_an_answer(server, warm, rounds, caplog):
    load = warm("tasks")
    done = threading.Event()

    def flap():
        while not done.wait(0.5):
            server.freeze()
            done.wait(0.5)
            server.thaw()

    thread = threading.Thread(target=flap)
    thread.start()
    seen, until = Seen(), time.monotonic() + rounds(3)
    try:
        while time.monotonic() < until:
            told = load(ASKED * 10)
            seen.took += told.took
    finally:
        done.set()
        thread.join()
        server.thaw()
    without = load(ASKED * 25, recorder=load.bare)
    within(ADDED_S, lambda: seen.quantile(0.99) - without.quantile(0.99))
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) <= 1
    assert hits_again(load, time.monotonic()) <= HITS_AGAIN_S


# -- there, but ... ---------------------------------------------------------------------------------------------------


@pytest.mark.row(5)
@HOW
@pytest.mark.slow
def test_a_redis_that_takes_no_writes_for_a_while_still_answers(server, warm, how, stored):
    load = warm(how, at_once=8)
    with paused(server, "WRITE"):
        mixed = [q for pair in zip(ASKED, questions(40, "new"), strict=True) for q in pair]
        within(0.1, lambda: 1 - load(mixed).hits / len(ASKED))  # nine of ten, or more
        stored()
    assert load.recorder.cache.stats().not_stored.keys() & {"redis_slow", "redis_down", "queue_full"}
    assert hits_again(load, time.monotonic()) <= HITS_AGAIN_S


@pytest.mark.row(7)
@HOW_MANY
@pytest.mark.slow
def test_a_full_redis_still_answers_and_stores_nothing_more(server, warm, new_recorder, how, stored):
    load = warm(how, namespace="full")
    calm = Load(new_recorder(url=server.url, namespace="full"), how)
    server.fill()
    within(ADDED_S, lambda: load.added(ASKED * 20))
    assert calm(ASKED).hits == len(ASKED)
    assert calm(questions(40, "new")).hits == 0
    stored()
    assert calm.recorder.cache.stats().not_stored == {"failed": 40}
    server.make_room()
    calm(questions(40, "new"))
    stored()
    assert calm(questions(40, "new")).hits == 40


@pytest.mark.row(7)
@pytest.mark.slow
def test_a_redis_that_is_full_from_the_start_costs_nothing(server, new_recorder, stored):
    server.fill()
    load = Load(new_recorder(url=server.url), "tasks")
    load(ASKED)
    stored()
    server.make_room()
    load(ASKED)
    stored()
    assert load(ASKED).hits == len(ASKED)


@pytest.mark.row(8)
@HOW
@pytest.mark.slow
def test_a_redis_that_became_a_replica_still_answers_and_takes_no_writes(server, warm, how, stored, caplog):
    load = warm(how, op_budget_s=5)
    server.client.execute_command("REPLICAOF", "127.0.0.1", "1")
    assert load(ASKED).hits == len(ASKED)
    assert load(questions(40, "new")).hits == 0
    stored()
    assert load.recorder.cache.stats().not_stored == {"failed": 40}
    assert len([r for r in caplog.records if "ReadOnlyError" in r.getMessage()]) == 1
    server.client.execute_command("REPLICAOF", "NO", "ONE")
    assert load(ASKED).hits == len(ASKED)


@pytest.mark.row(9)
@HOW
@pytest.mark.parametrize("told", ["", ":wrong@"])
@pytest.mark.slow
def test_a_password_that_is_missing_or_wrong_is_a_miss_and_one_error_in_the_log(
    server, new_recorder, told, how, caplog
):
    server.client.config_set("requirepass", "s3cret-canary")
    load = Load(new_recorder(url=server.url.replace("//", f"//{told}")), how)
    assert load(ASKED * 5).hits == 0
    (record,) = (r for r in caplog.records if r.levelno >= logging.WARNING)  # not one for each call
    assert (record.levelname, record.name) == ("ERROR", "langchain_aegis")
    said = record.getMessage()
    assert said.startswith("redis_unavailable") and "aegis doctor" in said
    assert "canary" not in caplog.text and "wrong" not in caplog.text.replace("went wrong", "")
    with pytest.raises(AegisConfigError, match="password") as caught:
        AegisSemanticCache(server.url.replace("//", f"//{told}"), validate=True)
    assert "canary" not in str(caught.value) and "wrong" not in str(caught.value)
    right = Load(new_recorder(url=server.url.replace("//", "//:s3cret-canary@"), validate=True), how)
    right(ASKED)
    wait_until(lambda: right(ASKED).hits == len(ASKED))


@pytest.mark.row(9)
@pytest.mark.parametrize("how", ["tasks", "threads"])
@pytest.mark.parametrize("told", ["", ":wrong@"])
def test_a_password_that_came_while_redis_was_away_is_an_error_in_the_log_too(
    new_recorder, new_server, told, how, caplog
):
    """That Redis is away was said by a warning, and does not stand for what nobody but the operator can mend."""
    server = new_server()
    load = Load(new_recorder(url=server.url.replace("//", f"//{told}")), how, at_once=1)
    server.kill()
    load(ASKED[:2])
    server.start()
    server.client.config_set("requirepass", "s3cret-canary")
    wait_until(lambda: load(ASKED[:2]).hits == 0 and len(caplog.records) > 1, 2 * PROBE_S, "the error")
    said = [(r.levelname, r.getMessage().partition(":")[0]) for r in caplog.records if r.levelno >= logging.WARNING]
    assert said == [("WARNING", "redis_unavailable"), ("ERROR", "redis_unavailable")]


@pytest.mark.row(9)
@pytest.mark.parametrize("awaited", [False, True])
async def test_who_wants_to_know_at_once_is_told_what_is_wrong(server, new_cache, caplog, awaited):
    """A password that is missing, one that was changed later, rights that are missing, no server; then all is well."""

    async def told(cache):
        try:
            await cache.avalidate() if awaited else cache.validate()
        except AegisError as exc:
            return type(exc), str(exc)
        finally:
            await cache.aclose()
        return None

    cache = new_cache(url=server.url)
    assert await told(cache) is None
    assert not server.entries() and not server.client.keys("*")  # nothing was written
    server.client.config_set("requirepass", "s3cret")
    kind, said = await told(cache)
    assert kind is AegisConfigError and "password" in said
    server.client.config_set("requirepass", "")
    server.client.execute_command("ACL", "SETUSER", "poor", "on", ">poor", "~none:*", "+@all")
    try:
        kind, said = await told(new_cache(url=server.url.replace("//", "//poor:poor@")))
        assert kind is AegisConfigError and "NOPERM" in said
        kind, said = await told(new_cache(url=server.url.replace("//", "//poor:other@")))
        assert kind is AegisConfigError and "password" in said
    finally:
        server.client.execute_command("ACL", "DELUSER", "poor")
    assert await told(cache) is None
    server.kill()
    kind, said = await told(cache)
    assert kind is AegisConnectionError and "does not answer" in said


@pytest.mark.row(11)
@HOW
@pytest.mark.slow
def test_a_redis_that_takes_no_more_clients_costs_nobody_an_answer(server, warm, how):
    load = warm(how, at_once=4)
    load.recorder.cache.close()
    server.client.config_set("maxclients", 10)
    taken = []
    try:
        # All places are taken by others.
        taken += [socket.create_connection(("127.0.0.1", server.port)) for _ in range(12)]
        wait_until(lambda: _refuses(server))
        assert Load(load.recorder, how)(ASKED * 5).hits == 0
    finally:
        for one in taken:
            one.close()
    server.client.config_set("maxclients", 1_000)
    assert hits_again(load, time.monotonic()) <= HITS_AGAIN_S


def _refuses(server):
    with socket.create_connection(("127.0.0.1", server.port)) as one:
        one.sendall(b"PING\r\n")
        return b"max number" in one.recv(100)


@pytest.mark.row(12)
def test_who_finds_all_connections_in_use_waits_no_longer_than_the_budget(proxy, new_cache):
    cache = new_cache(url=proxy.url, **PRODUCTION)
    cache._connections._size, cache._connections._sync = 2, None
    proxy.down.latency_s = 1.0
    recorder = Recorder(cache)

    def longest():
        cache._connections.breaker.succeeded()
        seen = Load(recorder, "threads", at_once=16)(questions(16))
        return max(seen.took)

    within(ADDED_S, longest)
    assert reasons(recorder).keys() <= {"redis_slow", "redis_down"}
    assert proxy.most <= 4
    recorder.assert_right()


@pytest.mark.row(16)
@HOW
def test_a_redis_without_search_serves_both_tiers_with_one_warning(plain_server, new_recorder, stored, how, caplog):
    recorder = new_recorder(url=plain_server.url, embeddings=Words(), min_similarity=0.6)
    Load(recorder, how)(ASKED[:8])
    stored()
    assert Load(recorder, how)(ASKED[:8]).hits == 8
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 1 and "has no search" in said[0]


@pytest.mark.row(17)
@pytest.mark.parametrize("kind", ["text", "list", "set", "empty hash"])
def test_something_else_under_the_name_of_an_entry_is_a_miss_and_is_written_over(server, new_recorder, stored, kind):
    recorder = new_recorder(url=server.url)
    recorder.ask("Why?")
    stored()
    (name,) = server.entries()
    server.client.delete(name)
    put = {"text": server.client.set, "list": server.client.lpush, "set": server.client.sadd}.get(kind)
    if put is not None:
        put(name, "x")
    else:
        server.client.hset(name, "other", "x")
    assert recorder.ask("Why?") is False
    stored()
    assert recorder.ask("Why?") is True
    assert server.client.type(name) == b"hash"


@pytest.mark.row(17)
def test_something_else_under_every_other_name_is_a_miss_and_no_error(server, new_recorder, stored):
    recorder = new_recorder(url=server.url, embeddings=Words(), min_similarity=0.6)
    recorder.ask("Why?", "acme")
    recorder.ask("How?", "acme")
    stored()
    for name in server.client.scan_iter("*"):
        server.client.delete(name)
        server.client.set(name, "x")
    for _ in range(2):
        assert recorder.ask("Why?", "acme") is False
        stored()


@pytest.mark.row(18)
@HOW
def test_a_name_that_nobody_knows_is_a_miss(new_recorder, how):
    load = Load(new_recorder(url="redis://no-such-host.invalid:6379", **PRODUCTION), how, at_once=1)
    load(questions(20))
    assert set(reasons(load.recorder)) <= {"redis_down", "redis_slow"}


@pytest.mark.row(18)
async def test_a_name_that_takes_long_to_be_found_holds_nobody_up(new_recorder, monkeypatch):
    """The resolver of the system blocks for seconds when its server is away."""
    real = socket.getaddrinfo

    def slow(host, *args, **kwargs):
        if host == "slow.invalid":
            time.sleep(1.5)
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    recorder = new_recorder(url="redis://slow.invalid:6379", **PRODUCTION)

    def blocking():
        began = time.monotonic()
        recorder.ask("Why?")
        return time.monotonic() - began

    await asyncio.to_thread(within, ADDED_S, blocking)
    recorder.cache._connections.breaker.succeeded()
    async with no_tasks_left():
        for _ in range(4):
            slow = slowness()
            took, still = await standing_still(recorder.aask("How?"))
            slow = max(slow, slowness())
            if took <= ADDED_S * slow and still <= 0.020 * SLACK * slow:
                break
        else:
            pytest.fail(f"took {took:.3f} s, and the loop stood still for {still:.3f} s")
        await recorder.cache.aclose()


# -- emptied ----------------------------------------------------------------------------------------------------------


def same_words(count):
    return [f"What is the fee of item {i} in euros?" for i in range(count)]


@pytest.mark.row(13, 14)
@pytest.mark.parametrize("fault", ["empty", "drop_indexes"])
@HOW_MANY
@pytest.mark.slow
def test_an_index_that_is_gone_is_made_again_once_and_hits_return(server, new_recorder, stored, fault, how):
    recorder = new_recorder(url=server.url, embeddings=Words(), min_similarity=0.999, **PRODUCTION)
    load = Load(recorder, how)
    asked = same_words(30)
    load(asked)
    stored()
    wait_until(lambda: load(asked).hits == len(asked))
    server.client.config_resetstat()
    gone = threading.Event()

    def go():
        getattr(server, fault)()
        gone.set()

    within(ADDED_S, lambda: load.added(asked * 10, during=None if gone.is_set() else go))
    load([f"{q[:-1]} or in pounds?" for q in asked])  # they ask the index
    stored()
    assert len(server.indexes()) == 1
    assert 1 <= server.calls("FT.CREATE") <= 2  # two threads may find it gone in the same microsecond
    began = time.monotonic()
    wait_until(lambda: load(asked).hits == len(asked))
    assert time.monotonic() - began <= 1.0 * SLACK


@pytest.mark.row(14)
def test_many_processes_that_make_the_index_at_once_agree(server, new_cache, stored):
    """Twenty forked children, each with connections of its own."""
    import os

    namespace = "race"
    ready, go = os.pipe(), os.pipe()
    children = []
    for number in range(20):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                cache = AegisSemanticCache(
                    server.unix_url, Words(), namespace=namespace, require_tenant=False, op_budget_s=5
                )
                os.write(ready[1], b"r")
                os.read(go[0], 1)
                recorder = Recorder(cache)
                recorder.ask(f"What is the fee of item {number}?")
                stored()
                code = 0 if recorder.ask(f"What is the fee of item {number}?") and not recorder.errors else 2
            finally:
                os._exit(code)
        children.append(pid)
    for _ in children:
        os.read(ready[0], 1)
    os.write(go[1], b"g" * len(children))
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    for end in (*ready, *go):
        os.close(end)
    assert codes == [0] * 20
    assert len(server.indexes()) == 1
    assert len(server.entries()) == 20


@pytest.mark.row(15)
def test_a_foreign_index_under_our_name_is_not_touched_and_serves_nothing_wrong(server, new_recorder, stored, caplog):
    told = {"url": server.url, "embeddings": Words(), "min_similarity": 0.6}
    recorder = new_recorder(**told, namespace="foreign")
    recorder.ask("What is the fee of the yellow item?")
    stored()
    (name,) = server.indexes()
    server.client.execute_command("FT.DROPINDEX", name)
    server.give_index(name, "foreign:{p00}:e:", dimensions=7)
    again = new_recorder(**told, namespace="foreign")
    assert again.ask("What is the fee of the yellow item?") is True
    assert again.ask("What is the fee of the yellow item please?") is False
    stored()
    assert again.ask("What is the fee of the yellow item please?") is True
    info = server.client.execute_command("FT.INFO", name)
    assert b"FLOAT32" in str(info).encode()
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 1 and said[0].startswith("foreign_index")


@pytest.mark.row(15)
@pytest.mark.parametrize("other", ["dimensions", "metric", "numbers", "names", "of another embedder"])
@pytest.mark.parametrize("way", ["constructor", "blocking", "awaited"])
def test_a_foreign_index_under_our_name_is_said_at_once_to_who_asks(
    server, new_recorder, new_cache, stored, other, way
):
    """It is refused, and never written over."""
    told = {"url": server.url, "embeddings": Words(), "min_similarity": 0.6, "namespace": "foreign"}
    recorder = new_recorder(**told)
    recorder.ask("What is the fee of the yellow item?")
    stored()
    (name,) = server.indexes()
    recorder.cache.validate()
    server.client.execute_command("FT.DROPINDEX", name)
    if other == "of another embedder":
        name = "foreign:{p00}:idx:00000000:v2"
    kind = "FLOAT32" if other == "numbers" else "FLOAT16"
    server.client.execute_command(
        "FT.CREATE", name, "ON", "HASH", "PREFIX", 1, "x:" if other == "names" else "foreign:{p00}:e:", "SCHEMA",
        "scope", "TAG", "CASESENSITIVE", "vec", "VECTOR", "HNSW", 6, "TYPE", kind,
        "DIM", 7 if other == "dimensions" else 512,
        "DISTANCE_METRIC", "L2" if other in ("metric", "of another embedder") else "COSINE",
    )  # fmt: skip
    before = server.client.execute_command("FT.INFO", name)
    with pytest.raises(AegisConfigError, match="another index"):
        if way == "constructor":
            AegisSemanticCache(server.url, Words(), namespace="foreign", validate=True)
        elif way == "blocking":
            new_cache(**told).validate()
        else:
            asyncio.run(new_cache(**told).avalidate())
    after = server.client.execute_command("FT.INFO", name)
    assert before[:6] == after[:6]


@pytest.mark.row(3)
@pytest.mark.slow
async def test_nothing_is_left_behind_by_an_outage(server, leaves_nothing, new_recorder):
    recorder = new_recorder(url=server.url, **PRODUCTION)
    async with no_tasks_left():
        for fault in (server.frozen, lambda: paused(server, "ALL")):
            await asyncio.gather(*(recorder.aask(q) for q in ASKED))
            with fault():
                await asyncio.gather(*(recorder.aask(q) for q in ASKED))
        await recorder.cache.aclose()


def test_langchain_calls_the_cache_bare():
    """What makes all this necessary: if core ever guards the cache itself, this notices."""

    class Broken(BaseCache):
        def lookup(self, prompt, llm_string):
            raise RuntimeError("redis is away")

        def update(self, prompt, llm_string, return_val):
            raise AssertionError("not reached")

        def clear(self, **kwargs):
            raise AssertionError("not reached")

    with pytest.raises(RuntimeError, match="redis is away"):
        Speaking(cache=Broken()).invoke("Why?")
