"""The search by meaning in one call: as a function, as a script or as a plain search, by the size of the scope."""

import threading
import uuid

import pytest
import redis

from langchain_aegis import nearby
from langchain_aegis.connections import Connections
from langchain_aegis.entries import Record
from langchain_aegis.flows import run
from langchain_aegis.seals import Seal
from langchain_aegis.store import Invalidation, Store
from langchain_aegis.vectors import pack

NOW = 1_800_000_000_000
HOUR = 3_600_000
THINGS = ["namespace", "tenant:a"]
EMB = "abcd1234"


def name(i):
    return f"{i:032x}"


A, B, C = (letter * 32 for letter in "abc")  # scopes


class Kept:
    """A store in a namespace of its own, whose commands are noted."""

    def __init__(self, url):
        self.namespace = f"t{uuid.uuid4().hex[:8]}"
        self.store = Store(self.namespace, Seal([b"m" * 32]), "f00")
        self.connections = Connections(url, budget_s=5)
        self.redis = redis.Redis.from_url(url)
        self.sent = []
        self.refuse = {}  # command -> the error that the server answers

    def _perform(self, step):
        self.sent += [command[0] for command in step.each]
        if any(command[0] in self.refuse for command in step.each):
            return [redis.ResponseError(self.refuse.get(command[0], "another error")) for command in step.each]
        return self.connections.perform(step)

    def do(self, flow):
        return run(flow, self._perform)

    def put(self, i, of=A, vector=(1.0, 0.0), expires_ms=NOW + HOUR, **how):
        epochs = self.do(self.store.epochs(THINGS))
        record = Record(
            key=name(i), scope=of, emb=EMB, digest="", created_ms=NOW, expires_ms=expires_ms, epochs=epochs.stamp,
            answer=b"{}", vec=pack(vector), sets=("tenant:a",),
        )  # fmt: skip
        assert self.do(self.store.put(record, things=THINGS, now_ms=NOW, tenanted=False, **how)) == "stored"

    def nearest(self, of=A, **how):
        epochs = self.do(self.store.epochs(THINGS))
        return self.do(self.store.nearest(of, EMB, pack([1.0, 0.0]), 5, epochs, 1_000, **how))

    def counted(self, of=None):
        """What is counted of a scope, or of all: number of entries by when they expire."""
        told = self.redis.hgetall(f"{self.namespace}:{{p00}}:n:{f'{of}:' if of else ''}{EMB}")
        return {int(place): int(number) for place, number in told.items()}

    def close(self):
        self.connections.close()
        self.redis.close()


@pytest.fixture
def kept(any_redis):
    kept = Kept(any_redis.url)
    if not kept.do(kept.store._has_search()):
        pytest.skip("about search")
    yield kept
    kept.close()


WAYS = {
    "function": {},
    "script": {"FCALL_RO": "NOPERM this user has no permissions to run the 'fcall_ro' command"},
    "old server": {"FCALL_RO": "unknown command 'FCALL_RO', with args beginning with: "},
    "no library": {"FCALL_RO": "Function not found", "FUNCTION": "NOPERM no permissions to run 'function|load'"},
    "plain search": {"FCALL_RO": "This Redis command is not allowed from script"},
    "nothing": {"FCALL_RO": "unknown command 'FCALL_RO'", "EVAL": "NOPERM this user has no permissions"},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_search_finds_the_same(kept, way):
    kept.put(1)
    kept.put(2, vector=(1.0, 0.1))
    kept.put(3, of=B)
    kept.do(kept.store.note(name(9), name(1), "0.700"))
    kept.refuse = WAYS[way]
    for _ in range(2):
        found = kept.nearest(asking=name(9))
        assert [n.record.key for n in found] == [name(1), name(2)]
        assert found.notes == {name(1): "0.700"}
        kept.sent.clear()
    assert kept.nearest(of=C, asking=name(9)).notes == {name(1): "0.700"}
    searched = [command for command in kept.sent if command not in ("HMGET", "HGETALL")]
    assert searched == {"function": ["FCALL_RO"], "plain search": ["FT.SEARCH"], "nothing": ["FT.SEARCH"]}.get(
        way, ["EVAL"]
    )


def test_the_function_is_loaded_when_it_is_missing(kept):
    kept.put(1)
    kept.redis.function_flush()
    assert len(kept.nearest()) == 1
    libraries = [dict(zip(told[::2], told[1::2], strict=True)) for told in kept.redis.function_list()]
    assert nearby.NAME.encode() in [told[b"library_name"] for told in libraries]


def test_of_what_is_too_far_away_no_record_is_told(kept):
    kept.put(1)
    kept.put(2, vector=(1.0, 1.0))
    kept.put(3, vector=(0.0, 1.0))
    found = kept.nearest(lowest=0.9)
    assert [n.record.key for n in found] == [name(1)]
    assert [key for key, _ in found.far] == [name(2), name(3)]
    assert [cosine for _, cosine in found.far] == pytest.approx([0.7071, 0.0], abs=1e-3)


def test_what_is_too_far_away_is_told_without_search_too(any_redis):
    kept = Kept(any_redis.url)
    kept.store.search = False
    kept.put(1)
    kept.put(2, vector=(1.0, 1.0))
    kept.sent.clear()
    found = kept.nearest(lowest=0.9)
    assert ([n.record.key for n in found], [key for key, _ in found.far]) == ([name(1)], [name(2)])
    assert kept.sent.count("HGETALL") == 2  # the scope's vectors, and one record
    kept.close()


def test_the_entries_of_a_scope_are_counted_until_they_go(kept):
    for i in range(5):
        kept.put(i)
    kept.put(5, of=B)
    kept.put(0)  # in place of the one that was there
    assert (sum(kept.counted(A).values()), sum(kept.counted(B).values())) == (5, 1)
    assert sum(kept.counted().values()) == 6
    kept.put(6, max_entries=4)  # what goes for it is counted no more
    entries = len(list(kept.redis.scan_iter(f"{kept.namespace}:{{p00}}:e:*")))
    assert sum(kept.counted().values()) == entries
    kept.do(kept.store.invalidate(Invalidation(["tenant:a"], [["tenant:a"]])))
    while kept.do(kept.store.sweep("me")).state == "more":
        pass
    assert sum(kept.counted().values()) == sum(kept.counted(A).values()) == 0


def test_counts_are_few_and_go_with_what_they_count(kept):
    for i in range(100):
        kept.put(i, expires_ms=NOW + HOUR + i * 10_000)
    assert len(kept.counted()) <= 10
    assert all(NOW + HOUR <= place <= (NOW + HOUR + 100 * 10_000) * 1.25 for place in kept.counted())
    for key in kept.redis.scan_iter(f"{kept.namespace}:{{p00}}:n:*"):
        assert 0 < kept.redis.pttl(key) <= HOUR + 100 * 10_000
    old = f"{kept.namespace}:{{p00}}:n:{EMB}"
    kept.redis.hset(old, mapping={str(place): 7 for place in range(40)})  # as left by many lifetimes
    kept.put(101)
    assert min(kept.counted()) >= NOW


def searches(kept, of):
    """The searches that the server runs for one lookup in a scope."""
    seen, ready, done = [], threading.Event(), f"done:{uuid.uuid4().hex}"

    def watch():
        with redis.Redis(connection_pool=kept.redis.connection_pool).monitor() as monitor:
            ready.set()
            for told in monitor.listen():
                if done in told["command"]:
                    return
                if told["command"].startswith("FT.SEARCH") and kept.namespace in told["command"]:
                    seen.append(told["command"])

    thread = threading.Thread(target=watch)
    thread.start()
    assert ready.wait(10)
    kept.nearest(of=of)
    kept.redis.echo(done)
    thread.join(10)
    assert not thread.is_alive()
    return seen


@pytest.mark.row(52)
def test_how_is_searched_depends_on_the_size_of_the_scope(kept):
    kept.store.search, now = True, [0.0]
    kept.store._server_search = nearby.ServerSearch(clock=lambda: now[0])
    for i in range(nearby.GRAPH_FROM + 1):
        kept.put(i)
    for i in range(100, 104):
        kept.put(i, of=B)
    (small,) = searches(kept, B)
    assert "ADHOC_BF" in small
    (large,) = searches(kept, A)  # 31 * 31 <= 30 * 35
    assert "ADHOC_BF" in large
    for i in range(nearby.GRAPH_FROM + 1, 40):
        kept.put(i)
    (large,) = searches(kept, A)
    assert "ADHOC_BF" in large  # the size is not asked for with each search
    now[0] += 1
    (large,) = searches(kept, A)
    assert "BATCHES" in large
    now[0] += 1
    kept.redis.hset(f"{kept.namespace}:{{p00}}:n:{A}:{EMB}", mapping=dict.fromkeys(kept.counted(A), 0))
    kept.redis.hset(f"{kept.namespace}:{{p00}}:n:{A}:{EMB}", "1000000000000", 1000)  # of long ago
    (expired,) = searches(kept, A)
    assert "ADHOC_BF" in expired
