"""What lies near in another scope neither answers nor hides, and nearness alone is not enough."""

import math
import uuid

import pytest
import redis
from caches import MODEL, Words, chat, prompt
from conftest import running_redis
from langchain_core.embeddings import Embeddings

from langchain_aegis import AegisSemanticCache
from langchain_aegis.connections import Connections
from langchain_aegis.entries import Record
from langchain_aegis.flows import run
from langchain_aegis.seals import Seal
from langchain_aegis.store import Store
from langchain_aegis.vectors import pack

NOW_MS = 1_800_000_000_000
MINE, THEIRS = "a" * 32, "b" * 32
EMBEDDER = "abcd1234"


class Scopes:
    """One store of a namespace of its own, into which records of any scope are put."""

    def __init__(self, url):
        self.url = url
        self.namespace = f"i{uuid.uuid4().hex[:8]}"
        self.store = Store(self.namespace, Seal([b"m" * 32]), "f00")
        self.connections = Connections(url, budget_s=5)

    def _do(self, flow):
        return run(flow, self.connections.perform)

    def put(self, number, scope, angle):
        """Store record `number` of `scope`, whose question points `angle` away from the one asked."""
        record = Record(
            key=f"{number:032x}", scope=scope, emb=EMBEDDER, digest="", created_ms=NOW_MS, expires_ms=NOW_MS + 60_000,
            epochs=self._do(self.store.epochs(["namespace"])).stamp, answer=b"{}", vec=vector(angle),
            sets=("tenant:x",),
        )  # fmt: skip
        put = self.store.put(record, things=["namespace"], now_ms=NOW_MS, tenanted=False)
        assert self._do(put) == "stored"

    def nearest(self, scope, k=5):
        epochs = self._do(self.store.epochs(["namespace"]))
        found = self._do(self.store.nearest(scope, EMBEDDER, vector(0), k, epochs, 1_000))
        return [int(near.record.key, 16) for near in found]

    def close(self):
        self.connections.close()


def vector(angle):
    return pack([math.cos(angle), math.sin(angle), 0.0, 0.0])


@pytest.mark.row(56)
def test_many_nearer_entries_of_another_scope_do_not_hide_ones_own(any_redis):
    """More than k of them: a search that filtered afterwards would find none of ours."""
    scopes = Scopes(any_redis.url)
    for number in range(12):
        scopes.put(100 + number, THEIRS, angle=0.01 * number)
    scopes.put(1, MINE, angle=0.5)
    assert scopes.nearest(MINE) == [1]
    assert 1 not in scopes.nearest(THEIRS, k=20)
    scopes.close()


def test_a_rightly_signed_entry_that_is_listed_in_another_scope_is_not_served():
    """Whoever can write into Redis cannot lend one tenant's answer to another."""
    with running_redis("plain") as server:
        scopes = Scopes(server.url)
        scopes.put(1, MINE, angle=0.5)
        scopes.put(2, THEIRS, angle=0.0)
        name = f"{scopes.namespace}:{{p00}}:v:%s:{EMBEDDER}"
        with redis.Redis.from_url(server.url) as client:
            assert client.hset(name % MINE, mapping=client.hgetall(name % THEIRS)) == 1
        assert scopes.nearest(MINE) == [1]
        assert scopes.store.rejected == 1
        scopes.close()


class Angles(Embeddings):
    """Two paraphrases that no guard objects to, at a known cosine."""

    def __init__(self, cosine):
        self.cosine = cosine

    def embed_documents(self, texts):
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text):
        return [1.0, 0.0] if "may" in text else [self.cosine, math.sqrt(1 - self.cosine**2)]


@pytest.mark.parametrize(("cosine", "asked"), [(0.95, 1), (0.91, 1), (0.89, 2), (0.6, 2)])
def test_a_question_below_the_threshold_is_not_served_even_if_no_guard_objects(redis_url, cosine, asked):
    options = {"namespace": f"i{uuid.uuid4().hex[:8]}", "min_similarity": 0.9, "op_budget_s": 5, "embed_budget_s": 5}
    calls = []
    with AegisSemanticCache(redis_url, Angles(cosine), **options) as cache:
        for question in ("How long may I keep a book?", "How long can I keep a book?"):
            cache.get_or_generate(question, lambda: calls.append(1) or "28 days", pipeline="p")
        assert len(calls) == asked
        assert cache.judge("How long may I keep a book?", "How long can I keep a book?").served == (asked == 1)


@pytest.mark.parametrize(("above", "served"), [(-4e-4, True), (4e-4, False)])
def test_the_cosine_that_counts_is_ones_own(redis_url, above, served):
    """The server computes with 16 bits and rounds in the question's favour: what it lets through is measured again."""
    stored, asked = "How long may I keep a book?", "How long can I keep a book?"
    told = {"namespace": f"c{uuid.uuid4().hex[:8]}", "redis_url": redis_url, "embeddings": Words()}
    with AegisSemanticCache(**told, min_similarity=0.5) as cache:
        similarity = cache.judge(stored, asked).similarity
        assert cache.lookup(prompt(stored), MODEL) is None
        cache.update(prompt(stored), MODEL, chat("28 days"))
    seen = []
    with AegisSemanticCache(**told, min_similarity=similarity + above, on_lookup=seen.append) as cache:
        assert (cache.lookup(prompt(asked), MODEL) is not None) is served
    assert seen[0].candidates[0].similarity == pytest.approx(similarity, abs=1e-5)
