"""A text is embedded once for as long as its model is the same one; a Redis that fails is a miss."""

import asyncio
import copy
import math
import os
import pickle
import signal
import uuid
from array import array
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from conftest import running_redis, wait_until
from langchain_core.embeddings import Embeddings
from langchain_ollama import OllamaEmbeddings
from lying_server import LyingServer, plain

from langchain_aegis import (
    AegisConfigError,
    AegisConnectionError,
    AegisEmbeddingCache,
    AegisEmbeddings,
    BatchingEmbeddings,
    aegis_scope,
)
from langchain_aegis.embedding_requests import pack, unpack
from langchain_aegis.notices import forget_warnings
from langchain_aegis.testing import ScriptedModel, ScriptedOllama

DEADLINE_S = 20
TEXTS = [f"text {n}" for n in range(6)]


@pytest.fixture(scope="module")
def shared():
    with ScriptedOllama([ScriptedModel(name="embed", embedding=True)]) as server:
        yield server


@pytest.fixture
def server(shared):
    shared.heal()
    shared.forget()
    return shared


@pytest.fixture(params=["sync", "async"])
def way(request):
    return request.param


@pytest.fixture
def namespace():
    return f"m{uuid.uuid4().hex[:8]}"


@pytest.fixture
def make_cache(redis_url, namespace):
    """Makes caches on one namespace; each is a process's of its own, as far as the cache can tell."""
    made = []

    def make(**arguments):
        made.append(
            AegisEmbeddingCache(**{"redis_url": redis_url, "namespace": namespace, "op_budget_s": 5, **arguments})
        )
        return made[-1]

    yield make
    for cache in made:
        cache.close()


@pytest.fixture
def raw(redis_url, namespace):
    with redis.Redis.from_url(redis_url) as client:
        client.names = lambda: sorted(client.scan_iter(f"{namespace}:*"))
        yield client


def embed(model, way, texts):
    return model.embed_documents(texts) if way == "sync" else asyncio.run(model.aembed_documents(texts))


def query(model, way, text):
    return model.embed_query(text) if way == "sync" else asyncio.run(model.aembed_query(text))


def sent(server):
    return [seen.body["input"] for seen in server.requests if seen.path == "/api/embed"]


def half_a_minute_later(model):
    """What was learnt of the model's digest is too old."""
    model._way[0]._kept._asked_at = -math.inf


class Changing:
    """An Ollama whose model can be pulled anew: vectors of the text's length, times the model's number."""

    def __init__(self):
        self.number, self.tells, self.dimensions = 1, True, 3
        self.pulled_while_embedding = False
        self.embedded = []
        self._server = LyingServer()
        self._server.script = self._answer
        self.url, self.close = self._server.url, self._server.close

    def _answer(self, body):
        if body is None:
            digest = {"digest": f"{self.number:064x}"} if self.tells else {}
            return plain({"models": [{"name": "m:latest", **digest}]})
        self.embedded += body["input"]
        answer = plain({"embeddings": [[float(len(t) * self.number)] * self.dimensions for t in body["input"]]})
        if self.pulled_while_embedding:
            self.number += 1
        return answer


@pytest.fixture
def changing():
    server = Changing()
    yield server
    server.close()


class Words(Embeddings):
    """No server and no digest; queries differ from documents."""

    def __init__(self, dimensions=3, model="words"):
        self.dimensions, self.model = dimensions, model
        self.asked = []

    def embed_documents(self, texts):
        self.asked += texts
        return [[len(t) / 3] * self.dimensions for t in texts]

    def embed_query(self, text):
        self.asked.append(f"? {text}")
        return [len(text) / 7] * self.dimensions


# -- in this process --


def test_a_text_is_embedded_once(server, way):
    """And what comes from the cache is what came from the server, as a list of the caller's own."""
    cache = AegisEmbeddingCache()
    model = AegisEmbeddings("embed", base_url=server.base_url, cache=cache)
    first = embed(model, way, TEXTS)
    again = embed(model, way, [*TEXTS, "new"])
    assert again[:-1] == first
    assert query(model, way, TEXTS[0]) == first[0]
    assert sent(server) == [TEXTS, ["new"]]
    again[0].append(0.0)
    assert query(model, way, TEXTS[0]) == first[0]
    stats = cache.stats()
    assert (stats.entries, stats.memory_hits, stats.misses, stats.redis_hits) == (7, 8, 7, 0)


def test_without_a_cache_nothing_is_kept(server, way):
    model = AegisEmbeddings("embed", base_url=server.base_url)
    assert query(model, way, "x") == query(model, way, "x")
    assert len(sent(server)) == 2
    assert server.routes["/api/tags"] == 0


def test_vectors_are_those_of_the_server_as_float32(server):
    plain_one = AegisEmbeddings("embed", base_url=server.base_url)
    cached = AegisEmbeddings("embed", base_url=server.base_url, cache=AegisEmbeddingCache())
    expected = [list(array("f", vector)) for vector in plain_one.embed_documents(TEXTS)]
    assert cached.embed_documents(TEXTS) == cached.embed_documents(TEXTS) == expected


def test_the_vectors_used_last_are_kept(server):
    cache = AegisEmbeddingCache(max_entries=3)
    model = AegisEmbeddings("embed", base_url=server.base_url, cache=cache)
    for text in "abcad":  # b goes
        model.embed_query(text)
    server.forget()
    for text in "acdb":
        model.embed_query(text)
    assert sent(server) == [["b"]]
    assert cache.stats().entries == 3


def test_a_vector_has_its_time(server):
    model = AegisEmbeddings("embed", base_url=server.base_url, cache=AegisEmbeddingCache(ttl_s=1e-9))
    model.embed_query("x")
    model.embed_query("x")
    assert sent(server) == [["x"], ["x"]]


async def test_identical_texts_under_way_are_asked_once_by_everybody(server, make_cache, raw):
    """Loops and threads; Redis, too."""
    model = AegisEmbeddings("embed", base_url=server.base_url, cache=make_cache())
    raw.config_resetstat()
    with ThreadPoolExecutor(16) as pool:
        with server.hold():
            first = asyncio.create_task(model.aembed_query("same"))
            await server.await_until(lambda s: s.routes["/api/embed"] == 1)
            tasks = [asyncio.create_task(model.aembed_query("same")) for _ in range(16)]
            threads = [pool.submit(model.embed_documents, ["same"]) for _ in range(16)]
            await asyncio.to_thread(wait_until, lambda: model._way[0]._asked_and_kept.seats == 33)
        async with asyncio.timeout(DEADLINE_S):
            expected = await first
            assert await asyncio.gather(*tasks) == [expected] * 16
            assert await asyncio.gather(*map(asyncio.wrap_future, threads)) == [[expected]] * 16
    assert sent(server) == [["same"]]
    assert raw.info("commandstats")["cmdstat_mget"]["calls"] == 1


async def test_many_queries_are_one_request_to_redis_each_way(server, make_cache, raw):
    models = [AegisEmbeddings("embed", base_url=server.base_url, cache=make_cache()) for _ in range(2)]
    for model in models:
        raw.config_resetstat()
        await asyncio.gather(*(model.aembed_query(f"q {n}") for n in range(64)))
        calls = raw.info("commandstats")
        assert calls["cmdstat_mget"]["calls"] == 1
    assert "cmdstat_set" not in calls
    assert [len(texts) for texts in sent(server)] == [64]


# -- in Redis --


def test_another_process_finds_the_vectors(server, make_cache, raw, way):
    first = embed(AegisEmbeddings("embed", base_url=server.base_url, cache=make_cache()), way, TEXTS)
    cache = make_cache()
    other = AegisEmbeddings("embed:latest", base_url=server.base_url, cache=cache)
    assert embed(other, way, TEXTS[::-1]) == first[::-1]
    assert len(sent(server)) == 1
    assert (cache.stats().redis_hits, cache.stats().misses) == (6, 0)
    embed(other, way, TEXTS)
    assert cache.stats().memory_hits == 6


def test_one_call_in_a_loop_of_its_own_is_kept(server, make_cache):
    """The loop ends at once; the vector stands in Redis nevertheless."""
    for _ in range(2):
        model = AegisEmbeddings("embed", base_url=server.base_url, cache=make_cache())
        asyncio.run(model.aembed_query("x"))
    assert sent(server) == [["x"]]


@pytest.mark.row(61)
def test_redis_holds_no_text_and_nothing_for_ever(server, make_cache, raw, namespace):
    AegisEmbeddings("embed", base_url=server.base_url, cache=make_cache(ttl_s=60)).embed_documents(["secret", "other"])
    names = raw.names()
    assert len(names) == 2
    for name in names:
        head, tail = name.decode().split(":emb:")
        assert head == f"{namespace}:{{p00}}"
        model, text = tail.split(":")
        assert (len(bytes.fromhex(model)), len(bytes.fromhex(text))) == (8, 16)
        value = raw.get(name)
        assert len(value) == 1 + 16 + 4 * 384
        assert b"secret" not in value
        assert 0 < raw.pttl(name) <= 60_000


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: value[:-1] + bytes([value[-1] ^ 1]),  # another vector
        lambda value: value[:1] + bytes(16) + value[17:],  # another signature
        lambda value: b"\x02" + value[1:],  # another version
        lambda value: value[:-4],  # another length
        lambda value: value[:17],
        lambda value: b"",
    ],
)
def test_a_damaged_vector_is_a_miss(server, make_cache, raw, way, damage):
    model = AegisEmbeddings("embed", base_url=server.base_url, cache=make_cache())
    expected = query(model, way, "x")
    (name,) = raw.names()
    raw.set(name, damage(raw.get(name)))
    cache = make_cache()
    assert query(AegisEmbeddings("embed", base_url=server.base_url, cache=cache), way, "x") == expected
    assert cache.stats().rejected == 1
    assert len(sent(server)) == 2
    assert query(AegisEmbeddings("embed", base_url=server.base_url, cache=make_cache()), way, "x") == expected
    assert len(sent(server)) == 2


def test_a_vector_under_another_name_is_a_miss(server, make_cache, raw):
    model = AegisEmbeddings("embed", base_url=server.base_url, cache=make_cache())
    expected = model.embed_documents(["x", "y"])
    x, y = raw.names()
    one, other = raw.get(x), raw.get(y)
    raw.set(x, other)
    raw.set(y, one)
    other = AegisEmbeddings("embed", base_url=server.base_url, cache=make_cache())
    assert other.embed_documents(["x", "y"]) == expected


def test_a_process_with_another_secret_finds_nothing(server, make_cache, raw, monkeypatch):
    monkeypatch.setenv("AEGIS_SECRET_KEY", "k" * 32)
    AegisEmbeddings("embed", base_url=server.base_url, cache=make_cache()).embed_query("x")
    monkeypatch.setenv("AEGIS_SECRET_KEY", "l" * 32)
    AegisEmbeddings("embed", base_url=server.base_url, cache=make_cache()).embed_query("x")
    assert len(sent(server)) == len(raw.names()) == 2


def test_a_wrong_type_under_a_name_is_a_miss(server, make_cache, raw, way):
    model = AegisEmbeddings("embed", base_url=server.base_url, cache=make_cache())
    expected = query(model, way, "x")
    (name,) = raw.names()
    raw.delete(name)
    raw.rpush(name, "x")
    assert query(AegisEmbeddings("embed", base_url=server.base_url, cache=make_cache()), way, "x") == expected


@pytest.mark.slow
def test_a_redis_that_freezes_or_dies_is_a_miss(server, way, namespace, home):
    with running_redis("plain") as own:
        cache = AegisEmbeddingCache(redis_url=own.url, namespace=namespace, op_budget_s=0.05)
        model = AegisEmbeddings("embed", base_url=server.base_url, cache=cache)
        expected = query(model, way, "x")
        os.kill(own.pid, signal.SIGSTOP)
        try:
            assert query(model, way, "x") == expected  # this process has it
            for n in range(8):
                assert query(model, way, f"frozen {n}")
            assert cache._connections.breaker.open
        finally:
            os.kill(own.pid, signal.SIGCONT)
        os.kill(own.pid, signal.SIGKILL)
        assert query(model, way, "dead")
        assert query(model, way, "frozen 1")
        with pytest.raises(AegisConnectionError):
            cache.clear()
        cache.close()
    assert len(sent(server)) == 10


def test_clearing_removes_all_vectors_and_nothing_else(server, make_cache, raw, way, namespace):
    raw.set(f"{namespace}:{{p00}}:e:other", "kept")
    cache = make_cache()
    model = AegisEmbeddings("embed", base_url=server.base_url, cache=cache)
    model.embed_documents([f"{n}" for n in range(600)])
    assert (cache.clear() if way == "sync" else asyncio.run(cache.aclear())) == 600
    assert raw.names() == [f"{namespace}:{{p00}}:e:other".encode()]
    assert cache.stats().entries == 0
    model.embed_query("1")
    assert sent(server)[-1] == ["1"]


# -- which model --


@pytest.mark.row(44, 86)
def test_a_model_that_was_pulled_anew_has_no_vectors_yet(changing, make_cache, way):
    """Noticed after 30 s, by every process; the old ones come back with the old model."""
    model = AegisEmbeddings("m", base_url=changing.url, cache=make_cache())
    assert query(model, way, "ab") == [2.0] * 3
    changing.number = 2
    assert query(model, way, "ab") == [2.0] * 3  # not yet
    half_a_minute_later(model)
    assert query(model, way, "ab") == [4.0] * 3
    assert query(AegisEmbeddings("m", base_url=changing.url, cache=make_cache()), way, "ab") == [4.0] * 3
    changing.number = 1
    half_a_minute_later(model)
    assert query(model, way, "ab") == [2.0] * 3
    assert changing.embedded == ["ab", "ab"]


@pytest.mark.row(86)
def test_a_vector_made_while_the_model_was_replaced_is_not_kept(changing, make_cache, raw, way):
    """Nobody knows which of the two has made it."""
    model = AegisEmbeddings("m", base_url=changing.url, cache=make_cache())
    changing.pulled_while_embedding = True
    assert query(model, way, "ab") == [2.0] * 3
    assert raw.names() == []
    changing.pulled_while_embedding = False
    assert query(model, way, "ab") == [4.0] * 3
    assert len(raw.names()) == 1


def test_a_server_that_is_away_does_not_take_the_vectors_along(server, way):
    model = AegisEmbeddings("embed", base_url=server.base_url, cache=AegisEmbeddingCache())
    expected = query(model, way, "x")
    server.fail(500, times=None, path="/api/tags")
    server.fail(500, times=None)
    half_a_minute_later(model)
    assert query(model, way, "x") == expected


def test_without_a_digest_a_version_names_the_model(changing, make_cache, raw, way, caplog):
    changing.tells = False
    forget_warnings()
    model = AegisEmbeddings("m", base_url=changing.url, cache=make_cache())
    query(model, way, "ab")
    query(model, way, "ab")
    assert changing.embedded == ["ab", "ab"]
    assert raw.names() == []
    assert [record.message for record in caplog.records if "version=" in record.message]
    for version in ("1", "1", "2"):
        query(AegisEmbeddings("m", base_url=changing.url, cache=make_cache(version=version)), way, "ab")
    assert len(changing.embedded) == 4


def test_what_changes_a_vector_is_part_of_its_name(server, make_cache):
    """And what does not is not."""
    cache = make_cache()
    for options in ({}, {"dimensions": 8}, {"num_ctx": 256}, {"truncate": False}):
        vector = AegisEmbeddings("embed", base_url=server.base_url, cache=cache, **options).embed_query("x")
        assert len(vector) == options.get("dimensions", 384)
    assert len(sent(server)) == 4
    for options in ({"truncate": True}, {"num_thread": 2}, {"keep_alive": 5}, {"timeout": 50}, {"max_batch": 2}):
        AegisEmbeddings("embed", base_url=server.base_url, cache=cache, **options).embed_query("x")
    assert len(sent(server)) == 4


@pytest.mark.row(44)
def test_vectors_of_another_length_are_of_another_model(changing, way):
    """Where nothing else says so; they are never mixed."""
    changing.tells = False
    model = AegisEmbeddings("m", base_url=changing.url, cache=AegisEmbeddingCache(version="1"))
    embed(model, way, ["a", "b"])
    changing.dimensions = 5
    assert [len(vector) for vector in embed(model, way, ["a", "new", "b"])] == [5, 5, 5]
    assert [len(vector) for vector in embed(model, way, ["a", "b"])] == [5, 5]
    assert changing.embedded == ["a", "b", "new", "a", "b"]


# -- other embedders --


def test_another_embedder_needs_a_version(make_cache):
    with pytest.raises(AegisConfigError, match="version="):
        BatchingEmbeddings(Words(), cache=make_cache())


def test_any_embedder_can_have_one(make_cache, way):
    """Its settings are part of the name."""
    inner = Words()
    model = BatchingEmbeddings(inner, cache=make_cache(version="1"))
    assert (
        embed(model, way, ["a", "bb"]) == embed(model, way, ["a", "bb"]) == [unpack(pack([n / 3] * 3)) for n in (1, 2)]
    )
    others = (
        Words(),
        Words(dimensions=4),
        Words(model="other"),
    )
    for other in others:
        embed(BatchingEmbeddings(other, cache=make_cache(version="1")), way, ["a", "bb"])
    assert [len(each.asked) for each in (inner, *others)] == [2, 0, 2, 2]
    changed = Words()
    embed(BatchingEmbeddings(changed, cache=make_cache(version="2")), way, ["a"])
    assert changed.asked == ["a"]


def test_queries_that_are_embedded_differently_are_kept_apart(make_cache, way):
    inner = Words()
    model = BatchingEmbeddings(inner, merge=False, cache=make_cache(version="1"))
    for _ in range(2):
        assert query(model, way, "ab") != embed(model, way, ["ab"])[0]
    assert inner.asked == ["? ab", "ab"]


def test_ollama_embeddings_tell_their_digest(server, make_cache):
    """So they need no version, and share vectors with AegisEmbeddings of the same model."""
    inner = OllamaEmbeddings(model="embed", base_url=server.base_url)
    try:
        expected = embed(BatchingEmbeddings(inner, cache=make_cache()), "sync", TEXTS)
    finally:
        inner._client.close()
    assert embed(AegisEmbeddings("embed", base_url=server.base_url, cache=make_cache()), "sync", TEXTS) == expected
    aegis = AegisEmbeddings("embed", base_url=server.base_url)
    assert embed(BatchingEmbeddings(aegis, cache=make_cache()), "sync", TEXTS) == expected
    assert len(sent(server)) == 1


# -- its use --


def test_the_scope_says_whether_it_is_used(server, make_cache, raw, way):
    model = AegisEmbeddings("embed", base_url=server.base_url, cache=make_cache())
    with aegis_scope(cache="off"):
        query(model, way, "x")
    assert raw.names() == []
    query(model, way, "x")
    with aegis_scope(cache="off"):
        query(model, way, "x")
    with aegis_scope(cache="refresh"):
        query(model, way, "x")
    query(model, way, "x")
    assert len(sent(server)) == 4
    assert len(raw.names()) == 1


def test_a_blocking_query_inside_a_running_loop_uses_it(server, make_cache):
    async def main():
        model = AegisEmbeddings("embed", base_url=server.base_url, cache=make_cache())
        return model.embed_query("x")

    assert asyncio.run(main()) == asyncio.run(main())
    assert len(sent(server)) == 1


def test_copies_share_it_and_it_is_not_pickled(server):
    cache = AegisEmbeddingCache()
    model = AegisEmbeddings("embed", base_url=server.base_url, cache=cache)
    for other in (copy.deepcopy(model), copy.copy(model), model.model_copy()):
        assert other.cache is cache
        assert other == model
    with pytest.raises(TypeError, match="each process"):
        pickle.dumps(model)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_entries": 0},
        {"max_entries": 1.5},
        {"ttl_s": 0},
        {"ttl_s": float("inf")},
        {"version": " "},
        {"redis_url": "http://x"},
        {"namespace": "a b"},
        {"op_budget_s": 0},
        {"redis": object()},
    ],
)
def test_wrong_arguments_are_said_at_once(wrong):
    with pytest.raises(AegisConfigError):
        AegisEmbeddingCache(**wrong)


def test_wrong_caches_are_said_at_once(server):
    with pytest.raises(AegisConfigError, match="AegisEmbeddingCache"):
        AegisEmbeddings("embed", base_url=server.base_url, cache=True)
    with pytest.raises(AegisConfigError, match="AegisEmbeddingCache"):
        BatchingEmbeddings(Words(), cache={})


@pytest.mark.parametrize("vector", [[], [float("nan")], [float("inf"), 1.0], [1e300], ["x"], [None], None])
@pytest.mark.row(43)
def test_what_is_no_vector_is_not_kept(vector):
    assert pack(vector) is None
