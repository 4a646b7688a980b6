"""The store keeps its promises on every kind of Redis: with search, Redis 8, and without search."""

import asyncio
import math
import random
import socket
import threading
import uuid
from dataclasses import replace

import pytest
import redis
from conftest import wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from langchain_aegis import indexes, scripts
from langchain_aegis.breaker import Unavailable
from langchain_aegis.connections import Connections
from langchain_aegis.entries import Record
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.flows import arun, run
from langchain_aegis.notices import forget_warnings
from langchain_aegis.seals import Seal
from langchain_aegis.store import SCOPE_VECTORS, Commands, Invalidation, Store
from langchain_aegis.vectors import pack

SEAL = Seal([b"m" * 32])
NOW = 1_800_000_000_000
THINGS = ["namespace", "tenant:a"]
SCOPE, OTHER_SCOPE = "a" * 32, "b" * 32
EMB = "abcd1234"


class Kept:
    """A store with blocking calls, on one server, in a namespace of its own."""

    def __init__(self, url, seal=SEAL, fingerprint="f00", namespace=None):
        self.namespace = namespace or f"t{uuid.uuid4().hex[:8]}"
        self.store = Store(self.namespace, seal, fingerprint)
        self.connections = Connections(url, budget_s=5)
        self.redis = redis.Redis.from_url(url)

    def do(self, flow):
        return run(flow, self.connections.perform)

    def epochs(self, things=THINGS):
        return self.do(self.store.epochs(things))

    def put(
        self, exact, epochs=None, things=THINGS, sets=("tenant:a",), tenanted=False, ttl_ms=60_000, now_ms=NOW,
        max_entries=None, fence=0, **fields,
    ):  # fmt: skip
        epochs = epochs or self.epochs()
        record = Record(**{
            "key": exact, "scope": SCOPE, "emb": EMB, "digest": "", "created_ms": now_ms, "expires_ms": now_ms + ttl_ms,
            "epochs": epochs.stamp, "answer": b"{}", **fields,
        })  # fmt: skip
        record = replace(record, sets=(*sets, *(s for s in record.src if s.startswith("source:"))))
        put = self.store.put(
            record, things=[*things, *record.src], now_ms=now_ms, tenanted=tenanted, max_entries=max_entries,
            fence=fence,
        )  # fmt: skip
        return self.do(put)

    def invalidate(self, things, groups=(), sources=False, **how):
        return self.do(self.store.invalidate(Invalidation(things, groups, sources, **how)))

    def read(self, exact, things=THINGS):
        return self.do(self.store.read(exact, things))[0]

    def listed(self, kind="z"):
        """What the sets of a kind list, by thing."""
        start = f"{self.namespace}:{{p00}}:{kind}:"
        return {
            key.decode().removeprefix(start): {m.decode() for m in self.redis.zrange(key, 0, -1)}
            for key in self.redis.scan_iter(f"{start}*")
        }

    def nearest(self, vector, scope=SCOPE, k=5, embedder=EMB):
        return self.do(self.store.nearest(scope, embedder, pack(vector), k, self.epochs(), 1_000)).near

    def notes(self, exact):
        nearest = self.store.nearest(SCOPE, EMB, pack([1.0, 1.0]), 1, self.epochs(), 1_000, asking=exact)
        return self.do(nearest).notes

    def sweep(self):
        """Sweep until nothing is left; returns how many entries were unlinked."""
        removed, state = 0, "more"
        while state == "more":
            swept = self.do(self.store.sweep("me"))
            state, removed = swept.state, removed + swept.removed
        assert state == "done"
        return removed

    def held(self, now_ms=NOW):
        return self.do(self.store.held(now_ms))

    def entries(self):
        return {key.decode().rpartition(":")[2] for key in self.redis.scan_iter(f"{self.namespace}:{{p00}}:e:*")}

    def close(self):
        self.connections.close()
        self.redis.close()


@pytest.fixture
def kept(any_redis):
    kept = Kept(any_redis.url)
    yield kept
    kept.close()


def name(i):
    return f"{i:032x}"


def test_a_tenants_further_answers_leave_the_epochs_untouched(kept):
    """Whoever watches them, or has them pushed, learns of invalidations alone."""
    kept.put(name(1), tenanted=True)
    with kept.redis.pipeline() as watching:
        watching.watch(f"{kept.namespace}:{{p00}}:epochs")
        kept.put(name(2), tenanted=True)
        watching.multi()
        watching.ping()
        assert watching.execute() == [True]
    assert kept.do(kept.store.epochs(THINGS)).tenanted


def direction(angle):
    return [math.cos(angle), math.sin(angle), 0.0, 0.0]


def test_what_is_put_is_read(kept):
    assert kept.read(name(1)) is None
    assert kept.put(name(1), answer=b'{"a":1}') == "stored"
    assert kept.read(name(1)).answer == b'{"a":1}'
    ttl = kept.redis.pttl(f"{kept.namespace}:{{p00}}:e:{name(1)}")
    assert 0 < ttl <= 60_000


def test_nothing_of_an_earlier_record_is_left_in_the_next_one(kept):
    kept.put(name(1), vec=pack(direction(0)), digest="abc", negative=True, question="Who?", task="chat", fresh_ms=NOW)
    assert kept.put(name(1), scope="", emb="") == "stored"
    assert kept.read(name(1)).question == ""
    assert kept.nearest(direction(0)) == []
    assert kept.put(name(1), emb="") == "stored"  # a scope, but no vector: its embedder was away
    assert kept.invalidate(["tenant:a"], [["tenant:a"]]) == 1
    assert kept.sweep() == 1


def test_near_records_come_nearest_first(kept):
    for i, angle in enumerate((0.3, 0.1, 0.2)):
        kept.put(name(i), vec=pack(direction(angle)))
    found = kept.nearest(direction(0.0))
    assert [n.record.key for n in found] == [name(1), name(2), name(0)]
    assert [n.similarity for n in found] == pytest.approx([math.cos(a) for a in (0.1, 0.2, 0.3)], abs=1e-3)
    assert len(kept.nearest(direction(0.0), k=2)) == 2


@pytest.mark.row(44)
def test_another_scope_or_embedder_is_never_found(kept):
    kept.put(name(1), vec=pack(direction(0)))
    kept.put(name(2), vec=pack(direction(0)), scope=OTHER_SCOPE)
    kept.put(name(3), vec=pack(direction(0)), emb="ffff0000")
    assert [n.record.key for n in kept.nearest(direction(0))] == [name(1)]
    assert [n.record.key for n in kept.nearest(direction(0), scope=OTHER_SCOPE)] == [name(2)]
    assert [n.record.key for n in kept.nearest(direction(0), embedder="ffff0000")] == [name(3)]


@pytest.mark.row(27)
def test_forged_records_are_not_served_and_counted(kept):
    kept.put(name(1), vec=pack(direction(0)), answer=b'{"a":1}')
    entry = f"{kept.namespace}:{{p00}}:e:{name(1)}"
    kept.redis.hset(entry, "answer", b'{"a":2}')
    assert kept.read(name(1)) is None
    assert kept.nearest(direction(0)) == []
    assert kept.store.rejected == 2


@pytest.mark.row(29)
def test_a_record_copied_to_another_name_is_not_served(kept):
    kept.put(name(1), vec=pack(direction(0)))
    kept.redis.copy(f"{kept.namespace}:{{p00}}:e:{name(1)}", f"{kept.namespace}:{{p00}}:e:{name(2)}")
    assert kept.read(name(2)) is None
    assert [n.record.key for n in kept.nearest(direction(0))] == [name(1)]


@pytest.mark.row(29)
def test_a_rewritten_vector_does_not_point_an_answer_at_another_question(kept):
    kept.put(name(1), vec=pack(direction(1.5)))
    kept.redis.hset(f"{kept.namespace}:{{p00}}:e:{name(1)}", "vec", pack(direction(0)))
    assert kept.nearest(direction(0)) == []


@pytest.mark.row(17)
def test_other_types_under_our_names_are_a_miss(kept):
    kept.put(name(1))
    kept.redis.delete(f"{kept.namespace}:{{p00}}:e:{name(1)}")
    kept.redis.set(f"{kept.namespace}:{{p00}}:e:{name(1)}", "text")
    assert kept.read(name(1)) is None
    assert kept.put(name(1)) == "stored"
    assert kept.read(name(1)) is not None


@pytest.mark.parametrize(
    ("things", "sources"),
    [(["tenant:a"], False), (["namespace"], False), (["source:d1"], True), (["tenant-source:d1"], True)],
)  # fmt: skip
def test_an_invalidation_removes_at_once_and_wins_over_what_began_before(kept, things, sources):
    src = ("source:d1", "tenant-source:d1")
    before = kept.epochs()
    kept.put(name(1), src=src, vec=pack(direction(0)))
    kept.put(name(2), vec=pack(direction(0.1)))
    kept.invalidate(things, sources=sources)  # logically only: nothing is unlinked
    assert kept.read(name(1)) is None
    concerns_all = not sources
    assert (kept.read(name(2)) is None) == concerns_all
    assert [n.record.key for n in kept.nearest(direction(0))] == ([] if concerns_all else [name(2)])
    # An answer whose making began before is not stored either ...
    assert kept.put(name(1), epochs=before, src=src) == "invalidated"
    # ... and one that begins now is.
    assert kept.put(name(1), src=src) == "stored"
    assert kept.read(name(1)) is not None


def test_an_invalidation_may_be_the_first_thing_that_happens(kept):
    for _ in range(2):
        assert kept.invalidate(["tenant:a"], [["tenant:a"]]) == 0
        assert kept.do(kept.store.clear()) == 0
    kept.put(name(1))
    assert kept.invalidate(["tenant:a"], [["tenant:a"]]) == 1


def test_removal_follows_the_sets(kept):
    for i in range(450):
        kept.put(name(i), sets=("tenant:a", "user:u") if i % 2 else ("tenant:a",), src=("source:d1",) if i < 10 else ())
    assert kept.invalidate(["source:d1"], [["source:d1"]], sources=True) == 10
    assert kept.invalidate(["tenant-user:x"], [["user:u", "tenant:a"]], sources=True) == 220
    assert kept.invalidate(["tenant:a"], [["tenant:a"]]) == 220
    assert len(kept.entries()) == 450
    assert kept.sweep() == 450
    assert kept.entries() == set()


@pytest.mark.row(62)
def test_clear_removes_this_namespace_and_no_other(kept, any_redis):
    other = Kept(any_redis.url)
    kept.put(name(1))
    kept.put(name(2), sets=("tenant:b",))
    other.put(name(1))
    assert kept.do(kept.store.clear()) == 2
    assert (kept.read(name(1)), other.read(name(1)) is not None) == (None, True)
    other.close()


@pytest.mark.row(13)
def test_what_began_before_the_server_was_emptied_is_not_stored(kept):
    before = kept.epochs()
    kept.put(name(1))
    for found in kept.redis.scan_iter(f"{kept.namespace}:*"):
        kept.redis.delete(found)
    assert kept.put(name(1), epochs=before) == "lost"
    assert kept.put(name(1)) == "stored"


@pytest.mark.row(30)
def test_an_old_record_restored_into_a_new_incarnation_is_not_served(kept):
    kept.put(name(1))
    entry = f"{kept.namespace}:{{p00}}:e:{name(1)}"
    dump = kept.redis.dump(entry)
    for found in kept.redis.scan_iter(f"{kept.namespace}:*"):
        kept.redis.delete(found)
    kept.redis.restore(entry, 60_000, dump)
    assert kept.read(name(1)) is None


@pytest.mark.row(14)
def test_the_index_comes_back_after_it_was_dropped(kept):
    kept.put(name(1), vec=pack(direction(0)))
    if kept.store.search:
        kept.redis.execute_command("FT.DROPINDEX", f"{kept.namespace}:{{p00}}:idx:{EMB}:v2")
        assert kept.nearest(direction(0)) == []  # a miss, which makes the index again
        kept.put(name(2), vec=pack(direction(0.1)))
        keys = {n.record.key for n in kept.nearest(direction(0))}
        assert name(2) in keys
    else:
        kept.redis.delete(f"{kept.namespace}:{{p00}}:v:{SCOPE}:{EMB}")
        assert kept.nearest(direction(0)) == []


@pytest.mark.parametrize("any_redis", ["plain"], indirect=True)
@pytest.mark.row(16)
def test_without_search_the_newest_vectors_of_a_scope_are_compared(any_redis):
    kept = Kept(any_redis.url)
    epochs = kept.epochs()
    drawn = random.Random(3)
    for i in range(SCOPE_VECTORS + 300):
        kept.put(name(i), epochs=epochs, vec=pack([drawn.gauss(0, 1) for _ in range(4)]), now_ms=NOW + i)
    held = kept.redis.hlen(f"{kept.namespace}:{{p00}}:v:{SCOPE}:{EMB}")
    assert SCOPE_VECTORS <= held <= SCOPE_VECTORS * 1.1
    kept.put(name(99_999), epochs=epochs, vec=pack(direction(0)), now_ms=NOW + 9_999)
    assert kept.nearest(direction(0))[0].record.key == name(99_999)
    kept.close()


@pytest.mark.parametrize("any_redis", ["plain"], indirect=True)
def test_an_expired_record_is_forgotten_without_search(any_redis):
    kept = Kept(any_redis.url)
    kept.put(name(1), vec=pack(direction(0)))
    kept.put(name(2), vec=pack(direction(0.1)))
    kept.redis.delete(f"{kept.namespace}:{{p00}}:e:{name(1)}")
    assert [n.record.key for n in kept.nearest(direction(0))] == [name(2)]
    assert kept.redis.hlen(f"{kept.namespace}:{{p00}}:v:{SCOPE}:{EMB}") == 1
    kept.close()


def test_whether_a_search_finds_all_is_known(kept):
    """So that who must not overlook anything can look at every entry himself."""
    assert kept.do(kept.store.finds_all(EMB)) is False, "nothing was indexed yet"
    kept.put(name(1), vec=pack(direction(0)))
    whole = wait_until(lambda: kept.do(kept.store.finds_all(EMB)) == kept.store.search or None, what="the index")
    assert whole is True
    if kept.store.search:
        kept.redis.execute_command("FT.DROPINDEX", f"{kept.namespace}:{{p00}}:idx:{EMB}:v2")
        assert kept.do(kept.store.finds_all(EMB)) is False


def test_another_secret_is_noticed_and_its_entries_cannot_be_invalidated_from_here(kept, any_redis):
    kept.put(name(1))
    stranger = Kept(any_redis.url, seal=Seal([b"x" * 32]), fingerprint="bad", namespace=kept.namespace)
    assert stranger.read(name(1)) is None
    for flow in (stranger.store.invalidate(Invalidation(["tenant:a"], [["tenant:a"]])), stranger.store.clear()):
        with pytest.raises(AegisConfigError, match="AEGIS_SECRET_KEY"):
            stranger.do(flow)
    assert kept.read(name(1)) is not None
    stranger.close()


@pytest.mark.row(7, 8)
def test_a_server_that_refuses_writes_costs_nothing_but_the_entry(kept):
    class Refusing:
        def perform(self, step):
            if step.each[0][0] == "EVAL":
                return [redis.ResponseError("OOM command not allowed when used memory > 'maxmemory'.")]
            return kept.connections.perform(step)

    epochs = kept.epochs()
    record = Record(
        key=name(1),
        scope="",
        emb="",
        digest="",
        created_ms=NOW,
        expires_ms=NOW + 1,
        epochs=epochs.stamp,
        answer=b"",
        sets=("tenant:a",),
    )
    flow = kept.store.put(record, things=THINGS, now_ms=NOW, tenanted=False)
    assert run(flow, Refusing().perform) == "failed"


async def test_the_same_flows_run_awaited(any_redis):
    kept = Kept(any_redis.url)
    kept.put(name(1), vec=pack(direction(0)))
    epochs = await arun(kept.store.epochs(THINGS), kept.connections.aperform)
    found = await arun(kept.store.nearest(SCOPE, EMB, pack(direction(0)), 5, epochs, 1_000), kept.connections.aperform)
    assert [n.record.key for n in found.near] == [name(1)]
    await kept.connections.aclose()
    kept.close()


@pytest.mark.row(7)
def test_a_server_that_is_full_takes_nothing_also_where_something_would_be_replaced(kept):
    """Once a script has removed something, the server lets it write, full or not."""
    assert kept.put(name(1)) == "stored"
    kept.redis.config_set("maxmemory-policy", "noeviction")
    kept.redis.config_set("maxmemory", 1)
    try:
        for number in (1, 2):
            assert kept.put(name(number), answer=b"new") == "failed"
        assert kept.read(name(1)).answer == b"{}"
        assert kept.entries() == {name(1)}
    finally:
        kept.redis.config_set("maxmemory", 0)
        kept.redis.config_set("maxmemory-policy", "volatile-lru")


@pytest.mark.row(14)
def test_of_many_that_find_the_index_gone_one_makes_it(kept, any_redis, monkeypatch):
    if not any_redis.has_search:
        pytest.skip("there is no index")
    kept.put(name(1), vec=pack(direction(0.0)))
    kept.redis.execute_command("FT.DROPINDEX", kept.store._index(EMB))
    epochs = kept.epochs()
    asking = [kept.store.nearest(SCOPE, EMB, pack(direction(0.0)), 5, epochs, 1_000) for _ in range(20)]
    monkeypatch.setattr(indexes, "_MADE_S", 60.0)  # a busy machine may take long for all of them
    steps = [kept.connections.perform(next(flow)) for flow in asking]  # all are told before one goes on
    made = []
    for flow, replies in zip(asking, steps, strict=True):
        try:
            while True:
                step = flow.send(replies)
                made += [command for command in step.each if command[0] == "FT.CREATE"]
                replies = kept.connections.perform(step)
        except StopIteration:
            pass
    assert len(made) == 1
    wait_until(lambda: [near.record.key for near in kept.nearest(direction(0.0))] == [name(1)], what="the index")
    # If it goes again, it is made again.
    kept.store._making.clear()
    kept.redis.execute_command("FT.DROPINDEX", made[0][1])
    wait_until(lambda: kept.nearest(direction(0.0)), what="the index")


@pytest.mark.row(15)
def test_an_index_of_somebody_else_is_left_alone_and_told_of_once(kept, any_redis, caplog):
    if not any_redis.has_search:
        pytest.skip("there is no index")
    forget_warnings()
    foreign = kept.store._index(EMB)
    kept.redis.execute_command(
        "FT.CREATE", foreign, "ON", "HASH", "PREFIX", 1, f"{kept.namespace}:", "SCHEMA", "scope", "TAG",
        "vec", "VECTOR", "FLAT", 6, "TYPE", "FLOAT32", "DIM", 7, "DISTANCE_METRIC", "L2",
    )  # fmt: skip
    for number in range(3):
        assert kept.put(name(number), vec=pack(direction(0.0))) == "stored"
        assert kept.read(name(number)) is not None
    assert kept.nearest(direction(0.0)) == []
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1 and told[0].startswith("foreign_index")
    kept.redis.execute_command("FT.DROPINDEX", foreign)
    # An index of ours is not taken for another's by a process that did not make it.
    forget_warnings()
    kept.put(name(1), vec=pack(direction(0.0)))
    other = Kept(any_redis.url, namespace=kept.namespace)
    wait_until(lambda: kept.nearest(direction(0.0)), what="the index")
    other.put(name(2), vec=pack(direction(0.0)))
    assert not [r for r in caplog.records[1:] if "foreign_index" in r.getMessage()]
    other.close()


@pytest.mark.row(18)
@pytest.mark.parametrize("host", ["slow.invalid", "127.0.0.1"])
def test_a_host_whose_name_takes_long_to_be_found_holds_nobody_up(monkeypatch, host):
    """The resolver of the system blocks for seconds when its server is away; no name, no resolver."""
    looked_up, go, real = [], threading.Event(), socket.getaddrinfo

    def slow(name, *told, **named):
        if name != host:  # threads of earlier tests look for servers of theirs, again and again
            return real(name, *told, **named)
        looked_up.append(threading.current_thread())
        go.wait(30)
        raise socket.gaierror(socket.EAI_AGAIN, "not now")

    if host == "slow.invalid":
        monkeypatch.setattr(socket, "getaddrinfo", slow)
    connections = Connections(f"redis://{host}:1", budget_s=0.05)
    for _ in range(5):
        with pytest.raises(Unavailable, match="redis_slow" if looked_up or host == "slow.invalid" else "redis_down"):
            connections.perform(Commands((("PING",),)))
    assert connections.breaker.open
    assert threading.main_thread() not in looked_up
    go.set()
    for thread in looked_up:
        thread.join(10)


@pytest.mark.row(18)
def test_a_server_is_found_by_its_name(redis_url):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = Connections(f"redis://{socket.gethostname()}.localhost:{listener.getsockname()[1]}", budget_s=5)
        try:
            socket.getaddrinfo(f"{socket.gethostname()}.localhost", 1)
        except OSError:
            pytest.skip("this system finds no name but localhost")
        threading.Thread(target=lambda: listener.accept()[0].sendall(b"+PONG\r\n")).start()
        assert connections.perform(Commands((("PING",),))) == [b"PONG"]
        connections.close()


@pytest.mark.row(34)
@pytest.mark.parametrize("awaited", [False, True], ids=["blocking", "awaited"])
def test_what_is_larger_than_any_answer_is_not_read_and_is_no_fault_of_redis(kept, any_redis, awaited):
    kept.put(name(1))
    key = f"{kept.namespace}:{{p00}}:e:{name(1)}"
    kept.redis.hset(key, "answer", b"x" * 9_000_000)
    connections = Connections(any_redis.url, budget_s=5)
    request = kept.store.request(name(1), THINGS, "a", None)
    with pytest.raises(Unavailable, match="unreadable"):
        asyncio.run(_once(connections, request)) if awaited else connections.ask(request, 2)
    assert not connections.breaker._failed
    kept.redis.hset(key, "answer", b"x" * 2_000_000)
    assert (asyncio.run(_once(connections, request)) if awaited else connections.ask(request, 2))[0][10] is not None
    kept.do(kept.store.forget(name(1)))
    assert not kept.entries()
    connections.close()


async def _once(connections, request):
    try:
        return await connections.aask(request, 2)
    finally:
        await connections.aclose()


@pytest.mark.row(1)
async def test_a_server_that_is_not_there_is_said_and_then_left_alone(tmp_path):
    connections = Connections(f"unix://{tmp_path}/none.sock")
    step = Commands((("PING",),))
    for _ in range(5):
        with pytest.raises(Unavailable):
            connections.perform(step)
    assert connections.breaker.open
    with pytest.raises(Unavailable, match="redis_down"):
        await connections.aperform(step)
    connections.close()


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://localhost:port", ""])
def test_a_wrong_address_is_refused_before_anything_is_connected(url):
    with pytest.raises(AegisConfigError, match="redis_url"):
        Connections(url)


def test_an_unknown_argument_of_redis_is_refused_at_once():
    with pytest.raises(AegisConfigError, match="redis_kwargs"):
        Connections("redis://127.0.0.1:1", kwargs={"no_such_argument": 1})


def test_a_given_client_is_used_as_an_address(redis_url):
    client = redis.Redis.from_url(redis_url, decode_responses=True, protocol=3)
    connections = Connections("redis://127.0.0.1:1", client=client)
    assert connections.perform(Commands((("PING",),)))[0] in (b"PONG", True)
    connections.close()
    client.close()


# -- What is dead, and how many are left -------------------------------------------------------------------------


def test_what_is_held_is_right_as_soon_as_the_call_returns(kept):
    """Nothing is unlinked yet, but what is dead is not counted, by nobody and only once."""
    for i in range(300):
        sources = [f"source:s{s}" for s in range(3) if i % (s + 2) == 0]
        kept.put(name(i), sets=("tenant:a" if i < 200 else "tenant:b",), src=tuple(sources))
    assert kept.held() == (300, 2)
    first = kept.invalidate(["source:s0", "source:s1"], [["source:s0"], ["source:s1"]], sources=True)
    assert first == sum(i % 2 == 0 or i % 3 == 0 for i in range(300))
    assert kept.held() == (300 - first, 2)
    second = kept.invalidate(["source:s2"], [["source:s2"]], sources=True)
    assert second == sum(i % 4 == 0 and i % 2 and i % 3 for i in range(300)) == 0
    assert kept.invalidate(["tenant:a"], [["tenant:a"]]) == sum(bool(i % 2 and i % 3) for i in range(200))
    assert kept.held()[1] == 1
    assert kept.do(kept.store.clear()) == sum(bool(i % 2 and i % 3) for i in range(200, 300))
    assert kept.held() == (0, 0)
    assert len(kept.entries()) == 300
    assert kept.sweep() == 300
    assert (kept.entries(), kept.listed()) == (set(), {})


def test_after_an_invalidation_each_source_is_asked_for_once(kept):
    """Else every lookup of an older entry would cost another round trip until all of them have expired."""
    for i in range(6):
        kept.put(name(i), src=(f"source:s{i % 3}",))
    steps = []

    def read(i):
        run(kept.store.read(name(i), THINGS), lambda step: steps.append(step) or kept.connections.perform(step))
        return len(steps)

    assert read(0) == 1
    kept.invalidate(["source:s9"], sources=True)
    assert [read(i) for i in (0, 0, 3, 1, 1, 4)] == [3, 4, 5, 7, 8, 9]
    kept.invalidate(["source:s0"], sources=True)
    assert read(0) == 11
    assert kept.read(name(0)) is None
    assert kept.read(name(1)) is not None


def test_an_entry_that_is_stored_anew_survives_the_sweep(kept):
    src = ("source:d1",)
    for i in range(4):
        kept.put(name(i), src=src, vec=pack(direction(i)))
    assert kept.invalidate(src, [src], sources=True) == 4
    assert kept.put(name(1), src=src, vec=pack(direction(1))) == "stored"
    assert kept.put(name(2), sets=("tenant:a", "user:u"), vec=pack(direction(2))) == "stored"
    assert kept.held() == (2, 1)
    assert kept.sweep() == 2
    assert kept.entries() == {name(1), name(2)}
    assert kept.listed() == {"tenant:a": {name(1), name(2)}, "user:u": {name(2)}, "source:d1": {name(1)}}
    assert [n.record.key for n in kept.nearest(direction(1), k=1)] == [name(1)]
    assert kept.invalidate(src, [src], sources=True) == 1


def test_overwriting_leaves_no_stale_membership(kept):
    kept.put(name(1), sets=("tenant:a", "user:u"), src=("source:d1",), vec=pack(direction(0)))
    kept.put(name(1), sets=("tenant:a",), src=("source:d2",), scope=OTHER_SCOPE, vec=pack(direction(0)))
    assert kept.listed() == {"tenant:a": {name(1)}, "source:d2": {name(1)}}
    assert kept.invalidate(["source:d1"], [["source:d1"]], sources=True) == 0
    assert kept.read(name(1)) is not None
    assert kept.nearest(direction(0)) == []
    assert len(kept.nearest(direction(0), scope=OTHER_SCOPE)) == 1


def test_entries_older_than_a_moment_are_dead(kept):
    for i in range(20):
        kept.put(name(i), sets=("tenant:a" if i < 12 else "tenant:b",), created_ms=NOW + i, vec=pack(direction(i / 20)))
    things = {"tenant:a": ["namespace", "tenant:a"], "tenant:b": ["namespace", "tenant:b"]}

    def alive():
        return {i for i in range(20) if kept.read(name(i), things["tenant:a" if i < 12 else "tenant:b"])}

    assert kept.invalidate([], before_ms=NOW + 5, before_tenant="tenant:a") == 5
    assert alive() == {*range(5, 20)}
    assert kept.held() == (15, 2)
    assert kept.invalidate([], before_ms=NOW + 2, before_tenant="tenant:a") == 0  # an earlier moment takes nothing back
    assert kept.invalidate([], before_ms=NOW + 14) == 9
    assert alive() == {*range(14, 20)}
    found = kept.do(kept.store.nearest(SCOPE, EMB, pack(direction(0)), 20, kept.epochs(), 1_000))
    assert {int(n.record.key, 16) for n in found} == {*range(14, 20)}
    assert kept.held() == (6, 1)
    assert kept.put(name(50), created_ms=NOW + 1) == "invalidated"  # imported from elsewhere, say
    assert kept.put(name(3), created_ms=NOW + 14) == "stored"
    assert kept.sweep() == 13
    assert kept.entries() == {name(i) for i in (3, *range(14, 20))}
    assert kept.held() == (7, 2)


def test_what_is_near_is_removed_at_once_and_what_is_being_made_is_refused(kept):
    before = kept.epochs()
    for i in range(30):
        kept.put(name(i), src=("source:d1",), vec=pack(direction(i / 10)))
    flow = kept.store.invalidate(Invalidation(near=[name(i) for i in range(20)]))
    replies, clock = None, None
    with pytest.raises(StopIteration) as done:
        while True:
            step = flow.send(replies)
            if clock is None and kept.epochs().clock > before.clock:
                clock = kept.epochs().clock
                assert kept.put(name(19), src=("source:d1",)) == "stored"  # anew, before it is its turn
            replies = kept.connections.perform(step)
    assert done.value.value == 19
    assert kept.entries() == {name(i) for i in range(19, 30)}
    assert kept.listed()["source:d1"] == kept.entries()
    assert kept.put(name(40), epochs=before) == "invalidated"
    assert kept.held() == (11, 1)


@pytest.mark.parametrize("any_redis", ["valkey+search", "redis8+search"], indirect=True)
def test_dead_entries_do_not_hide_living_ones_while_they_are_swept(any_redis):
    kept = Kept(any_redis.url)
    for i in range(12):
        kept.put(name(i), src=("source:d1",), vec=pack(direction(i / 100)))
    kept.put(name(99), vec=pack(direction(0.5)))
    kept.invalidate(["source:d1"], [["source:d1"]], sources=True)
    assert [n.record.key for n in kept.nearest(direction(0), k=4)] == [name(99)]
    kept.close()


TENANTS = st.sampled_from(["tenant:a", "tenant:b"])
SOURCES = st.sampled_from(["source:1", "source:2", "source:3"])
OPERATIONS = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 7), TENANTS, st.frozensets(SOURCES, max_size=2), st.booleans()),
    st.tuples(st.just("source"), st.frozensets(SOURCES, min_size=1)),
    st.tuples(st.just("tenant"), TENANTS),
    st.tuples(st.just("both"), TENANTS, SOURCES),
    st.tuples(st.just("user"), TENANTS),
    st.tuples(st.just("before"), st.integers(0, 8), st.none() | TENANTS),
    st.tuples(st.just("near"), st.frozensets(st.integers(0, 7))),
    st.tuples(st.just("clear")),
    st.tuples(st.just("sweep")),
)


@pytest.mark.parametrize("any_redis", ["plain"], indirect=True)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=st.lists(OPERATIONS, max_size=25))
@pytest.mark.slow
def test_any_sequence_of_writes_invalidations_and_sweeps_keeps_the_books(any_redis, operations):
    """Against a model in Python: what is served, what is counted, what each call returns, what is left at the end."""
    kept, alive, now = Kept(any_redis.url), {}, NOW
    for operation, *told in operations:
        now += 1
        if operation == "put":
            i, tenant, sources, with_user = told
            sets = (tenant, *([f"user:{tenant}"] if with_user else []))
            key = name(i) + tenant[-1]  # the tenant is part of every key
            src = tuple(s for source in sorted(sources) for s in (source, f"tenant-{source}:{tenant}"))
            assert kept.put(key, things=["namespace", *sets], sets=sets, src=src, now_ms=now, ttl_ms=10**6) == "stored"
            alive[key] = ({*sets, *sources}, now)
            continue
        if operation == "sweep":
            kept.sweep()
            continue
        if operation == "source":
            dead = {k for k, (sets, _) in alive.items() if sets & told[0]}
            count = kept.invalidate([*told[0]], [[s] for s in sorted(told[0])], sources=True, now_ms=now)
        elif operation == "tenant":
            dead = {k for k, (sets, _) in alive.items() if told[0] in sets}
            count = kept.invalidate([told[0]], [[told[0]]], now_ms=now)
        elif operation == "user":
            dead = {k for k, (sets, _) in alive.items() if f"user:{told[0]}" in sets}
            count = kept.invalidate([f"user:{told[0]}"], [[f"user:{told[0]}"]], now_ms=now)
        elif operation == "both":
            dead = {k for k, (sets, _) in alive.items() if {*told} <= sets}
            count = kept.invalidate([f"tenant-{told[1]}:{told[0]}"], [told], sources=True, now_ms=now)
        elif operation == "before":
            bound, tenant = now - told[0], told[1]
            dead = {k for k, (sets, made) in alive.items() if made < bound and (tenant is None or tenant in sets)}
            count = kept.invalidate([], before_ms=bound, before_tenant=tenant, now_ms=now)
        elif operation == "near":
            dead = {name(i) + "a" for i in told[0]} & alive.keys()
            count = kept.invalidate([], near=[name(i) + "a" for i in sorted(told[0])], now_ms=now)
        else:
            dead, count = set(alive), kept.do(kept.store.clear(now_ms=now))
        assert count == len(dead)
        for key in dead:
            del alive[key]
        assert kept.held(now)[0] == len(alive)
        for key in (name(i) + t for i in range(8) for t in "ab"):
            tenant = f"tenant:{key[-1]}"
            served = kept.read(key, ["namespace", tenant, f"user:{tenant}"] if key not in alive else
                               ["namespace", *(s for s in alive[key][0] if not s.startswith("source"))])  # fmt: skip
            assert (served is not None) == (key in alive)
    kept.sweep()
    assert kept.entries() == set(alive)
    expected = {}
    for key, (sets, _) in alive.items():
        for each in sets:
            expected.setdefault(each, set()).add(key)
    assert kept.listed() == expected
    records = [listed for listed in kept.do(kept.store.records())[1] if listed.alive]
    assert {listed.record.key for listed in records} <= set(alive)
    kept.close()


# -- The size bound ----------------------------------------------------------------------------------------------


def test_the_least_recently_used_entries_of_a_tenant_go(kept):
    for i in range(5):
        kept.put(name(i), max_entries=5, src=("source:d1",), now_ms=NOW + i, vec=pack(direction(i / 10)))
    kept.put(name(100), sets=("tenant:b",), max_entries=5)
    kept.do(kept.store.read(name(0), THINGS, tenant="tenant:a", touch_ms=NOW + 10))
    kept.do(kept.store.touch(name(1), "tenant:a", NOW + 11))
    for i in (5, 6, 7):
        kept.put(name(i), max_entries=5, now_ms=NOW + 10 + i)
    assert kept.entries() == {name(i) for i in (0, 1, 5, 6, 7, 100)}
    assert kept.held() == (6, 2)
    assert kept.listed()["source:d1"] == {name(0), name(1)}
    assert kept.listed("u") == {"tenant:a": {name(i) for i in (0, 1, 5, 6, 7)}, "tenant:b": {name(100)}}
    assert {int(n.record.key, 16) for n in kept.nearest(direction(0))} == {0, 1}


def test_reading_neither_lists_an_entry_nor_brings_one_back(kept):
    kept.put(name(1))
    for i in (1, 2):
        kept.do(kept.store.read(name(i), THINGS, touch_ms=NOW))
        kept.do(kept.store.touch(name(i), "tenant:a", NOW))
    assert kept.listed("u") == {}


def test_a_lower_bound_is_reached_step_by_step(kept):
    for i in range(40):
        kept.put(name(i), now_ms=NOW + i)  # nobody has noted their use
    sizes = []
    for i in range(40, 46):
        kept.put(name(i), max_entries=10, now_ms=NOW + i)
        sizes.append(kept.held(NOW + 50)[0])
    assert sizes == [33, 26, 19, 12, 10, 10]
    assert {name(i) for i in range(40, 46)} <= kept.entries()


def test_expired_entries_do_not_count(kept):
    for i in range(5):
        kept.put(name(i), max_entries=6, ttl_ms=1_000)
    for i in range(5, 11):
        assert kept.put(name(i), max_entries=6, now_ms=NOW + 2_000) == "stored"
    assert {name(i) for i in range(5, 11)} <= kept.entries()
    assert kept.listed("u") == {"tenant:a": {name(i) for i in range(5, 11)}} == kept.listed()


# -- Refresh, reports, leases, opting out ------------------------------------------------------------------------


def test_a_refresh_wins_over_answers_that_were_being_made(kept):
    kept.put(name(1), answer=b'"old"')
    before = kept.epochs()
    epochs = kept.do(kept.store.refresh(name(1), THINGS))
    assert kept.read(name(1)).answer == b'"old"'  # until the new one is there
    assert kept.put(name(1), epochs=before) == "invalidated"
    assert kept.put(name(2), epochs=before) == "stored"
    assert kept.put(name(1), epochs=epochs, answer=b'"new"') == "stored"
    assert kept.put(name(1), epochs=before) == "invalidated"
    assert kept.read(name(1)).answer == b'"new"'
    assert 0 < kept.redis.pttl(f"{kept.namespace}:{{p00}}:t:{name(1)}") <= 24 * 3600 * 1000


def test_a_refresh_may_be_the_first_thing_that_happens(kept):
    epochs = kept.do(kept.store.refresh(name(1), THINGS))
    assert kept.put(name(1), epochs=epochs) == "stored"


def test_a_reported_pair_is_noted_both_ways_and_its_entry_gone(kept):
    before = kept.epochs()
    kept.put(name(1), src=("source:d1",), vec=pack(direction(0)))
    assert kept.do(kept.store.report(name(1), name(2))) is True
    assert kept.do(kept.store.report(name(1), name(2))) is False
    assert kept.held() == (0, 0)
    assert (kept.read(name(1)), kept.nearest(direction(0)), kept.listed()) == (None, [], {})
    assert [kept.put(name(i), epochs=before) for i in (1, 2, 3)] == ["invalidated", "invalidated", "stored"]
    assert kept.put(name(1), vec=pack(direction(0))) == "stored"  # for other questions
    assert kept.notes(name(2)) == {name(1): "x"}
    assert kept.notes(name(1)) == {name(2): "x"}
    assert kept.notes(name(3)) == {}
    assert 0 < kept.redis.pttl(f"{kept.namespace}:{{p00}}:b:{name(1)}") <= 30 * 24 * 3600 * 1000


def test_an_exact_hit_can_be_reported_too(kept):
    kept.put(name(1))
    assert kept.do(kept.store.report(name(1), name(1))) is True
    assert (kept.read(name(1)), kept.notes(name(1))) == (None, {})


def test_a_score_is_remembered_and_a_report_outlives_it(kept):
    kept.do(kept.store.note(name(2), name(1), "0.25"))
    assert kept.notes(name(2)) == {name(1): "0.25"}
    assert kept.notes(name(1)) == {}
    kept.do(kept.store.note(name(2), name(1), "0.75"))
    assert kept.notes(name(2)) == {name(1): "0.75"}
    kept.do(kept.store.report(name(1), name(2)))
    kept.do(kept.store.note(name(2), name(1), "0.99"))
    assert kept.notes(name(2)) == {name(1): "x"}


def test_a_score_that_somebody_else_wrote_is_not_believed(kept):
    kept.do(kept.store.note(name(2), name(1), "0.75"))
    kept.do(kept.store.note(name(2), name(3), "0.25"))
    pairs = f"{kept.namespace}:{{p00}}:b:{name(2)}"
    kept.redis.hset(pairs, name(3), kept.redis.hget(pairs, name(1)))  # moved to another pair
    kept.redis.hset(pairs, name(4), "1.0")
    kept.redis.hset(pairs, name(5), "1.0:" + "0" * 16)
    kept.redis.hset(pairs, name(6), b"\xff\xfe:\xff")
    kept.redis.hset(pairs, name(7), "")
    assert kept.notes(name(2)) == {name(1): "0.75"}
    kept.redis.delete(pairs)
    kept.redis.set(pairs, "text")
    assert kept.notes(name(2)) == {}


def test_the_list_of_pairs_is_bounded_and_scores_go_first(kept):
    for i in range(100, 110):
        kept.do(kept.store.note(name(1), name(i), "0.5"))
    for i in range(40):
        kept.do(kept.store.report(name(i + 200), name(1)))
    notes = kept.notes(name(1))
    assert len(notes) == scripts.PAIRS_PER_KEY
    assert set(notes.values()) == {"x"}
    kept.do(kept.store.note(name(1), name(999), "0.5"))
    assert kept.notes(name(1)) == notes


def test_the_number_of_keys_with_pairs_is_bounded(kept, monkeypatch):
    monkeypatch.setattr(scripts, "PAIR_KEYS", 10)
    for i in range(30):
        kept.do(kept.store.note(name(i), name(99), "0.5"))
    assert kept.redis.zcard(f"{kept.namespace}:{{p00}}:b") == 10
    assert len(list(kept.redis.scan_iter(f"{kept.namespace}:{{p00}}:b:*"))) == 10
    assert kept.notes(name(29)) == {name(99): "0.5"}


def test_one_of_many_gets_the_lease_and_whoever_was_too_slow_is_fenced(kept):
    do, store = kept.do, kept.store
    first = do(store.lease(name(1), 60_000))
    assert first > 0
    assert do(store.lease(name(1), 60_000)) == 0
    assert do(store.lease(name(2), 60_000)) > first
    kept.redis.delete(f"{kept.namespace}:{{p00}}:l:{name(1)}")  # it took too long: the lease has expired
    second = do(store.lease(name(1), 60_000))
    assert second > first
    assert kept.put(name(1), fence=first) == "fenced"
    assert kept.put(name(1), fence=second, answer=b'"second"') == "stored"
    assert kept.put(name(1), fence=first) == "fenced"  # although the lease was given back
    assert kept.read(name(1)).answer == b'"second"'
    third = do(store.lease(name(1), 60_000))
    assert third > second
    do(store.release(name(1), second))  # not ours any more
    assert do(store.lease(name(1), 60_000)) == 0
    do(store.release(name(1), third))
    assert do(store.lease(name(1), 60_000)) > third
    assert kept.put(name(1)) == "stored"  # who has none is not held up


def test_nothing_is_kept_of_a_user_who_opted_out(kept):
    things = [*THINGS, "user:u"]
    kept.do(kept.store.opt("user:u", True))
    assert kept.put(name(1), things=things) == "opted_out"
    assert kept.epochs(things).opted_out
    assert kept.do(kept.store.read(name(1), things))[1].opted_out
    assert not kept.epochs([*THINGS, "user:v"]).opted_out
    assert kept.put(name(1), things=[*THINGS, "user:v"]) == "stored"
    kept.do(kept.store.opt("user:u", False))
    assert not kept.epochs(things).opted_out
    assert kept.put(name(1), things=things) == "stored"


# -- Looking at everything ---------------------------------------------------------------------------------------


def test_every_record_is_told_and_whether_it_lives(any_redis):
    """Also in a namespace whose name is a pattern to Redis."""
    strange, plain = (Kept(any_redis.url, namespace=n + uuid.uuid4().hex[:6]) for n in ("a[b]*?\\", "a"))
    plain.put(name(500))
    for i in range(250):
        strange.put(name(i), src=("source:d1",) if i < 50 else (), question=f"q{i}")
    strange.put(name(300), sets=("tenant:b",), created_ms=NOW + 5)
    strange.redis.hset(f"{strange.namespace}:{{p00}}:e:{name(301)}", "answer", "forged")
    strange.invalidate(["source:d1"], [["source:d1"]], sources=True)
    strange.invalidate([], before_ms=NOW + 1, before_tenant="tenant:a", now_ms=NOW)
    strange.put(name(400))
    cursor, found = 0, {}
    while True:
        cursor, some = strange.do(strange.store.records(cursor))
        found.update({listed.record.key: listed for listed in some})
        if not cursor:
            break
    assert found.keys() == {name(i) for i in (*range(250), 300)}
    assert {key for key, listed in found.items() if listed.alive} == {name(300)}
    assert found[name(7)].record.question == "q7"
    strange.close()
    plain.close()


def test_the_nearest_of_all_scopes_are_told_where_there_is_search(kept):
    for i in range(20):
        tenant = "tenant:a" if i == 19 else "tenant:b"
        kept.put(name(i), sets=(tenant,), scope=f"{i:032x}", vec=pack(direction(i / 20)))
    kept.put(name(50), emb="ffff0000", vec=pack(direction(0)))
    kept.put(name(51), src=("source:d1",), vec=pack(direction(0)))
    kept.invalidate(["source:d1"], [["source:d1"]], sources=True)

    def anywhere(k, **which):
        found = kept.do(kept.store.nearest_anywhere(EMB, pack(direction(0)), k, kept.epochs(), 1_000, **which))
        return [int(n.record.key, 16) for n in found]

    if not kept.store.search:
        assert anywhere(3) == []
        return
    assert anywhere(3) == [0, 1, 2]
    assert anywhere(2, tenant="tenant:a") == [19]
    assert anywhere(2, tenant="tenant:z") == []


def test_notes_come_with_the_search(kept):
    kept.put(name(1), vec=pack(direction(0)))
    kept.do(kept.store.note(name(2), name(1), "0.5"))
    found = kept.do(kept.store.nearest(SCOPE, EMB, pack(direction(0)), 5, kept.epochs(), 1_000, asking=name(2)))
    assert ([n.record.key for n in found.near], found.notes) == ([name(1)], {name(1): "0.5"})


def test_callers_that_find_every_connection_in_use_say_nothing_about_redis(redis_url):
    connections = Connections(redis_url, budget_s=5, max_connections=1)
    with redis.Redis.from_url(redis_url) as client:
        name = f"free-{uuid.uuid4().hex}"
        blocked = threading.Thread(target=connections.perform, args=(Commands((("BLPOP", name, "4"),)),))
        blocked.start()
        wait_until(lambda: any("blpop" in told["cmd"] for told in client.client_list()))
        connections._sync._wait_s = 0.0
        for _ in range(10):
            with pytest.raises(Unavailable, match="redis_slow"):
                connections.perform(Commands((("PING",),)))
        client.rpush(name, "1")
        blocked.join()
    assert not connections.breaker._failed
    assert connections.perform(Commands((("PING",),)))
    connections.close()
