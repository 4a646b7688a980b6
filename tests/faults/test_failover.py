"""One server is not all there is: a node of a Cluster, and a master that Sentinels replace, cost nobody an answer."""

import subprocess
import threading
import time

import pytest
import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from caches import Words
from conftest import wait_until

from faults.measure import ADDED_OPEN_S, ADDED_S, HITS_AGAIN_S, PRODUCTION, Load, within
from faults.recorder import questions
from langchain_aegis import AegisConfigError, AegisConnectionError, AegisEmbeddingCache, AegisSemanticCache
from langchain_aegis.embedded.redis import _server_program

ASKED = questions(40)
HOW = pytest.mark.parametrize("how", ["tasks", "threads"])
SLOTS = ("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)


def warnings(caplog):
    return {r.getMessage() for r in caplog.records if r.name == "langchain_aegis" and r.levelname == "WARNING"}


# -- a node of a Cluster ----------------------------------------------------------------------------------------------


@pytest.fixture
def node(new_server):
    """A node that serves no slot: CLUSTERDOWN."""
    return new_server(search=False, cluster_enabled="yes")


@pytest.fixture
def moved(node, new_server):
    """A node whose slots are all another's: MOVED."""
    other = new_server(search=False, cluster_enabled="yes")
    other.client.execute_command(*SLOTS)
    node.client.execute_command("CLUSTER", "MEET", "127.0.0.1", other.port)
    wait_until(lambda: error_of(node) == "MovedError", what="MOVED")
    return node


@pytest.fixture
def asks(node, new_server):
    """A node that is giving our slot to another: ASK for what it has not."""
    other = new_server(search=False, cluster_enabled="yes")
    node.client.execute_command(*SLOTS)
    node.client.execute_command("CLUSTER", "MEET", "127.0.0.1", other.port)
    slot = node.client.execute_command("CLUSTER", "KEYSLOT", "x:{p00}:epochs")
    theirs = other.client.execute_command("CLUSTER", "MYID")
    theirs = theirs.decode() if isinstance(theirs, bytes) else theirs
    wait_until(lambda: error_of(node) is None, what="the Cluster")
    wait_until(lambda: migrates(node, slot, theirs), what="the other node")
    return node


def migrates(node, slot, other):
    try:
        return node.client.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", other)
    except redis.ResponseError:
        return False


def error_of(node):
    try:
        node.client.execute_command("HMGET", "x:{p00}:epochs", "id")
    except redis.RedisError as exc:
        return type(exc).__name__
    return None


@pytest.mark.row(18)
@HOW
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["node", "moved", "asks"])
def test_a_node_of_a_cluster_is_a_miss_and_one_warning_that_says_what_to_do(request, new_recorder, how, kind, caplog):
    node = request.getfixturevalue(kind)
    load = Load(new_recorder(url=node.url, embeddings=Words(), min_similarity=0.6), how, 8)
    for _ in range(2):
        assert load(ASKED).hits == 0
    (said,) = warnings(caplog)
    assert said.startswith("cluster") and "redis_url" in said
    cache = load.recorder.cache
    assert not cache._connections.breaker.open
    with pytest.raises(AegisConfigError, match="Cluster"):
        cache.validate()
    with pytest.raises(AegisConnectionError):
        cache.invalidate(tenant="a")
    assert cache.health().entries == 0


@pytest.mark.row(18)
@pytest.mark.slow
def test_a_node_that_has_all_slots_is_a_redis_like_any_other(node, new_recorder, stored):
    node.client.execute_command(*SLOTS)
    wait_until(lambda: error_of(node) is None)
    recorder = new_recorder(url=node.url)
    recorder.ask("Why?")
    stored()
    assert recorder.ask("Why?") is True
    recorder.cache.validate()


@pytest.mark.row(18)
@pytest.mark.parametrize("awaited", [False, True])
async def test_vectors_are_not_kept_on_a_node_of_a_cluster_and_no_call_fails(node, awaited, tmp_path):
    from langchain_aegis import AegisEmbeddings
    from langchain_aegis.testing import ScriptedOllama

    with ScriptedOllama("embed") as ollama, AegisEmbeddingCache(redis_url=node.url, op_budget_s=5) as cache:
        model = AegisEmbeddings("embed", base_url=ollama.base_url, cache=cache)
        for text in ("one", "two", "one"):
            assert await model.aembed_query(text) if awaited else model.embed_query(text)
        await cache.aclose()


def test_a_client_of_a_whole_cluster_is_refused_when_the_cache_is_made():
    client = object.__new__(redis.RedisCluster)
    with pytest.raises(AegisConfigError, match="one server"):
        AegisSemanticCache(redis=client)


# -- Sentinel ---------------------------------------------------------------------------------------------------------


class Watched:
    """A master and its replica, and a Sentinel that makes the one the other."""

    def __init__(self, new_server, path, **options):
        self.master, self.replica = new_server(**options), new_server(**options)
        self.replica.client.execute_command("REPLICAOF", "127.0.0.1", self.master.port)
        wait_until(lambda: self.replica.client.info("replication")["master_link_status"] == "up", what="the replica")
        self.port = self.replica.port + 1
        file = path / "sentinel.conf"
        file.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {path}\nsentinel monitor m 127.0.0.1 {self.master.port} 1\n"
            "sentinel down-after-milliseconds m 400\nsentinel failover-timeout m 2000\n"
        )
        with (path / "sentinel.log").open("wb") as log:
            self.process = subprocess.Popen([_server_program(None), str(file), "--sentinel"], stdout=log, stderr=log)
        self.asked = redis.Redis(port=self.port, protocol=2)
        wait_until(self.knows_the_replica, what="the Sentinel")

    def knows_the_replica(self):
        try:
            return self.asked.sentinel_slaves("m")
        except redis.RedisError:
            return False

    def replaced(self):
        return self.asked.sentinel_get_master_addr_by_name("m")[1] == self.replica.port

    def client(self, kind):
        """Return a client of the master as an application makes it."""
        module = redis.asyncio.sentinel if kind == "awaited" else redis.sentinel
        return module.Sentinel([("127.0.0.1", self.port)]).master_for("m")

    def told(self, kind):
        """Return what a cache is told of it: an address, or a client."""
        url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{self.port}/m"
        return {"url": url} if kind == "address" else {"redis": self.client(kind)}

    def close(self):
        self.asked.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def watched(new_server, tmp_path):
    made = Watched(new_server, tmp_path)
    yield made
    made.close()


@pytest.mark.row(8, 18)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "kind", "how"),
    [  # the client is only asked where the Sentinels are: each kind once with each way to call
        ("killed", "blocking", "tasks"), ("killed", "awaited", "threads"), ("frozen", "blocking", "threads"),
        ("frozen", "awaited", "tasks"), ("told", "blocking", "threads"), ("told", "awaited", "tasks"),
        ("killed", "address", "threads"), ("frozen", "address", "tasks"), ("told", "address", "threads"),
    ],
)  # fmt: skip
def test_a_failover_costs_misses_and_then_there_are_hits_again(watched, new_recorder, stored, how, kind, fault):
    """The master is killed, frozen, or made a replica while many ask; nobody gets an error, and nothing wrong."""
    load = Load(new_recorder(**watched.told(kind), **PRODUCTION), how, 16)
    load(ASKED)
    stored()
    wait_until(lambda: load(ASKED).hits == len(ASKED))
    assert watched.master.entries()
    wait_until(lambda: len(watched.replica.entries()) == len(watched.master.entries()))

    def go():
        if fault == "told":
            watched.asked.execute_command("SENTINEL", "FAILOVER", "m")
        else:
            getattr(watched.master, {"killed": "kill", "frozen": "freeze"}[fault])()

    try:
        within(ADDED_S, lambda: load.added(ASKED * 20, during=go) if not watched.replaced() else 0.0)
        wait_until(lambda: not load(ASKED).errors and watched.replaced(), 20, "the failover")
        began = time.monotonic()
        wait_until(lambda: load(ASKED).hits == len(ASKED), HITS_AGAIN_S, "hits of the new master")
        assert time.monotonic() - began <= HITS_AGAIN_S
        wait_until(lambda: load(questions(5, "new")).hits == 5, HITS_AGAIN_S, "what the new master was given")
        assert watched.replica.client.info("replication")["role"] == "master"
    finally:
        if fault == "frozen":
            watched.master.thaw()


@pytest.mark.row(18)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blocking", "awaited"])
def test_a_sentinel_that_is_away_is_a_miss_within_the_budget(watched, new_recorder, kind):
    client = watched.client(kind)
    watched.process.kill()
    watched.process.wait()
    for how in ("tasks", "threads"):
        load = Load(new_recorder(redis=client, **PRODUCTION), how, 1)
        within(ADDED_S, lambda load=load: max(load(questions(20)).took))
        within(ADDED_OPEN_S, load.added_one_by_one)
        assert load.recorder.cache.stats().reasons.keys() <= {"redis_down", "redis_slow"}
        with pytest.raises(AegisConnectionError):
            load.recorder.cache.validate()


@pytest.mark.parametrize("module", [redis.sentinel, redis.asyncio.sentinel])
def test_a_client_of_the_replicas_is_refused_when_the_cache_is_made(module):
    client = module.Sentinel([("127.0.0.1", 1)]).slave_for("m")
    with pytest.raises(AegisConfigError, match="master_for"):
        AegisSemanticCache(redis=client)


def test_a_client_of_the_master_asks_nobody_until_it_is_used():
    before = threading.active_count()
    client = redis.sentinel.Sentinel([("127.0.0.1", 1)]).master_for("m")
    AegisSemanticCache(redis=client).close()
    assert threading.active_count() <= before
