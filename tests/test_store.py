"""The store keeps its promises on every kind of Redis: with search, Redis 8, and without search."""

import math
import random
import uuid

import pytest
import redis

from langchain_aegis.breaker import Unavailable
from langchain_aegis.connections import Connections
from langchain_aegis.entries import Record
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.flows import arun, run
from langchain_aegis.store import SCOPE_VECTORS, Commands, Store
from langchain_aegis.vectors import pack

MAC = b"m" * 32
NOW = 1_800_000_000_000
THINGS = ["namespace", "tenant:a"]
SCOPE, OTHER_SCOPE = "a" * 32, "b" * 32
EMB = "abcd1234"


class Kept:
    """A store with blocking calls, on one server, in a namespace of its own."""

    def __init__(self, url, mac_key=MAC, fingerprint="f00", namespace=None):
        self.namespace = namespace or f"t{uuid.uuid4().hex[:8]}"
        self.store = Store(self.namespace, mac_key, fingerprint)
        self.connections = Connections(url, budget_s=5)
        self.redis = redis.Redis.from_url(url)

    def do(self, flow):
        return run(flow, self.connections.perform)

    def epochs(self, things=THINGS):
        return self.do(self.store.epochs(things))

    def put(
        self, exact, epochs=None, things=THINGS, sets=("tenant:a",), tenanted=False, ttl_ms=60_000, now_ms=NOW, **fields
    ):
        epochs = epochs or self.epochs()
        record = Record(**{
            "key": exact, "scope": SCOPE, "emb": EMB, "digest": "", "created_ms": now_ms, "expires_ms": now_ms + ttl_ms,
            "epochs": epochs.stamp(), "answer": b"{}", **fields,
        })  # fmt: skip
        things = [*things, *record.src]
        return self.do(
            self.store.put(record, things=things, sets=[*sets, *record.src], now_ms=now_ms, tenanted=tenanted)
        )

    def read(self, exact, things=THINGS):
        return self.do(self.store.read(exact, things))[0]

    def nearest(self, vector, scope=SCOPE, k=5, embedder=EMB):
        return self.do(self.store.nearest(scope, embedder, pack(vector), k, self.epochs(), 1_000)).near

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


def direction(angle):
    return [math.cos(angle), math.sin(angle), 0.0, 0.0]


def test_what_is_put_is_read(kept):
    assert kept.read(name(1)) is None
    assert kept.put(name(1), answer=b'{"a":1}') == "stored"
    assert kept.read(name(1)).answer == b'{"a":1}'
    ttl = kept.redis.pttl(f"{kept.namespace}:{{p00}}:e:{name(1)}")
    assert 0 < ttl <= 60_000


def test_near_records_come_nearest_first(kept):
    for i, angle in enumerate((0.3, 0.1, 0.2)):
        kept.put(name(i), vec=pack(direction(angle)))
    found = kept.nearest(direction(0.0))
    assert [n.record.key for n in found] == [name(1), name(2), name(0)]
    assert [n.similarity for n in found] == pytest.approx([math.cos(a) for a in (0.1, 0.2, 0.3)], abs=1e-3)
    assert len(kept.nearest(direction(0.0), k=2)) == 2


def test_another_scope_or_embedder_is_never_found(kept):
    kept.put(name(1), vec=pack(direction(0)))
    kept.put(name(2), vec=pack(direction(0)), scope=OTHER_SCOPE)
    kept.put(name(3), vec=pack(direction(0)), emb="ffff0000")
    assert [n.record.key for n in kept.nearest(direction(0))] == [name(1)]
    assert [n.record.key for n in kept.nearest(direction(0), scope=OTHER_SCOPE)] == [name(2)]
    assert [n.record.key for n in kept.nearest(direction(0), embedder="ffff0000")] == [name(3)]


def test_forged_records_are_not_served_and_counted(kept):
    kept.put(name(1), vec=pack(direction(0)), answer=b'{"a":1}')
    entry = f"{kept.namespace}:{{p00}}:e:{name(1)}"
    kept.redis.hset(entry, "answer", b'{"a":2}')
    assert kept.read(name(1)) is None
    assert kept.nearest(direction(0)) == []
    assert kept.store.rejected == 2


def test_a_record_copied_to_another_name_is_not_served(kept):
    kept.put(name(1), vec=pack(direction(0)))
    kept.redis.copy(f"{kept.namespace}:{{p00}}:e:{name(1)}", f"{kept.namespace}:{{p00}}:e:{name(2)}")
    assert kept.read(name(2)) is None
    assert [n.record.key for n in kept.nearest(direction(0))] == [name(1)]


def test_a_rewritten_vector_does_not_point_an_answer_at_another_question(kept):
    kept.put(name(1), vec=pack(direction(1.5)))
    kept.redis.hset(f"{kept.namespace}:{{p00}}:e:{name(1)}", "vec", pack(direction(0)))
    assert kept.nearest(direction(0)) == []


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
    kept.do(kept.store.invalidate(things, [], sources=sources))  # logically only: nothing is unlinked
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
        assert kept.do(kept.store.invalidate(["tenant:a"], [["tenant:a"]], sources=False)) == 0
        assert kept.do(kept.store.clear()) == 0
    kept.put(name(1))
    assert kept.do(kept.store.invalidate(["tenant:a"], [["tenant:a"]], sources=False)) == 1


def test_removal_follows_the_sets(kept):
    for i in range(450):
        kept.put(name(i), sets=("tenant:a", "user:u") if i % 2 else ("tenant:a",), src=("source:d1",) if i < 10 else ())
    assert kept.do(kept.store.invalidate(["source:d1"], [["source:d1"]], sources=True)) == 10
    assert kept.do(kept.store.invalidate(["tenant-user:x"], [["user:u", "tenant:a"]], sources=True)) == 220
    assert kept.do(kept.store.invalidate(["tenant:a"], [["tenant:a"]], sources=False)) == 220
    assert len(kept.entries()) == 450
    assert kept.sweep() == 450
    assert kept.entries() == set()


def test_clear_removes_this_namespace_and_no_other(kept, any_redis):
    other = Kept(any_redis.url)
    kept.put(name(1))
    kept.put(name(2), sets=("tenant:b",))
    other.put(name(1))
    assert kept.do(kept.store.clear()) == 2
    assert (kept.read(name(1)), other.read(name(1)) is not None) == (None, True)
    other.close()


def test_what_began_before_the_server_was_emptied_is_not_stored(kept):
    before = kept.epochs()
    kept.put(name(1))
    for found in kept.redis.scan_iter(f"{kept.namespace}:*"):
        kept.redis.delete(found)
    assert kept.put(name(1), epochs=before) == "lost"
    assert kept.put(name(1)) == "stored"


def test_an_old_record_restored_into_a_new_incarnation_is_not_served(kept):
    kept.put(name(1))
    entry = f"{kept.namespace}:{{p00}}:e:{name(1)}"
    dump = kept.redis.dump(entry)
    for found in kept.redis.scan_iter(f"{kept.namespace}:*"):
        kept.redis.delete(found)
    kept.redis.restore(entry, 60_000, dump)
    assert kept.read(name(1)) is None


def test_the_index_comes_back_after_it_was_dropped(kept):
    kept.put(name(1), vec=pack(direction(0)))
    if kept.store.search:
        kept.redis.execute_command("FT.DROPINDEX", f"{kept.namespace}:{{p00}}:idx:{EMB}:v1")
        assert kept.nearest(direction(0)) == []  # a miss, which makes the index again
        kept.put(name(2), vec=pack(direction(0.1)))
        keys = {n.record.key for n in kept.nearest(direction(0))}
        assert name(2) in keys
    else:
        kept.redis.delete(f"{kept.namespace}:{{p00}}:v:{SCOPE}:{EMB}")
        assert kept.nearest(direction(0)) == []


@pytest.mark.parametrize("any_redis", ["plain"], indirect=True)
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


def test_another_secret_is_noticed_and_its_entries_cannot_be_invalidated_from_here(kept, any_redis):
    kept.put(name(1))
    stranger = Kept(any_redis.url, mac_key=b"x" * 32, fingerprint="bad", namespace=kept.namespace)
    assert stranger.read(name(1)) is None
    for flow in (stranger.store.invalidate(["tenant:a"], [["tenant:a"]], sources=False), stranger.store.clear()):
        with pytest.raises(AegisConfigError, match="AEGIS_SECRET_KEY"):
            stranger.do(flow)
    assert kept.read(name(1)) is not None
    stranger.close()


def test_a_server_that_refuses_writes_costs_nothing_but_the_entry(kept):
    class Refusing:
        def perform(self, step):
            if step.each[0][0] == "EVAL":
                return [redis.ResponseError("OOM command not allowed when used memory > 'maxmemory'.")]
            return kept.connections.perform(step)

    epochs = kept.epochs()
    record = Record(
        key=name(1), scope="", emb="", digest="", created_ms=NOW, expires_ms=NOW + 1, epochs=epochs.stamp(), answer=b""
    )
    flow = kept.store.put(record, things=THINGS, sets=["tenant:a"], now_ms=NOW, tenanted=False)
    assert run(flow, Refusing().perform) == "failed"


async def test_the_same_flows_run_awaited(any_redis):
    kept = Kept(any_redis.url)
    kept.put(name(1), vec=pack(direction(0)))
    epochs = await arun(kept.store.epochs(THINGS), kept.connections.aperform)
    found = await arun(kept.store.nearest(SCOPE, EMB, pack(direction(0)), 5, epochs, 1_000), kept.connections.aperform)
    assert [n.record.key for n in found.near] == [name(1)]
    await kept.connections.aclose()
    kept.close()


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
