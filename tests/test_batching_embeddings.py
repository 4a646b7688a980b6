"""Concurrent queries become few requests, and each caller gets its own vector."""

import asyncio
import random
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from caches import Words
from conftest import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.embeddings import Embeddings
from langchain_ollama import OllamaEmbeddings

from langchain_aegis import (
    AegisBatchError,
    AegisDeadlineError,
    AegisOverloadedError,
    AegisServerError,
    BatchingEmbeddings,
)
from langchain_aegis.embedder import embedder_name

LONG_S = 20.0


def vector(text):
    return [float(len(text)), float(sum(map(ord, text)))]


class Fake(Embeddings):
    """Notes each request; refuses the text `bad`; may wait at a gate."""

    def __init__(self):
        self.requests = []
        self.gate = None
        self.busy = self.most = 0
        self.error = None
        self.short = False

    def _start(self, texts):
        self.requests.append(texts)
        self.busy += 1
        self.most = max(self.most, self.busy)

    def _answer(self, texts):
        self.busy -= 1
        if self.error is not None:
            raise self.error
        if "bad" in texts:
            raise ValueError("bad text")
        vectors = [vector(t) for t in texts]
        return vectors[:-1] if self.short and len(texts) > 1 else vectors

    def embed_documents(self, texts):
        self._start(texts)
        if self.gate:
            assert self.gate.wait(LONG_S)
        return self._answer(texts)

    def embed_query(self, text):
        return self.embed_documents([text])[0]

    async def aembed_documents(self, texts):
        self._start(texts)
        try:
            await (self.gate.wait() if self.gate else asyncio.sleep(0))
        except asyncio.CancelledError:
            self.busy -= 1
            raise
        return self._answer(texts)

    async def aembed_query(self, text):
        return (await self.aembed_documents([text]))[0]


async def settle(turns=30):
    for _ in range(turns):
        await asyncio.sleep(0)


def idle(wrapper):
    stats = wrapper.admission.stats()
    gathered = wrapper._documents.idle and wrapper._queries.idle
    return (stats.running, stats.waiting, stats.waiting_bulk, gathered) == (0, 0, 0, True)


@pytest.fixture
def inner():
    return Fake()


@pytest.mark.row(97)
async def test_sixty_four_queries_are_one_request(inner):
    wrapper = BatchingEmbeddings(inner)
    texts = [f"text {i}" for i in range(64)]
    async with asyncio.timeout(LONG_S):
        vectors = await asyncio.gather(*(wrapper.aembed_query(t) for t in texts))
    assert vectors == [vector(t) for t in texts]
    assert [len(r) for r in inner.requests] == [64]
    assert idle(wrapper)


@pytest.mark.row(97)
async def test_what_comes_while_a_request_is_under_way_goes_together(inner):
    """Nobody waits while nothing is under way."""
    inner.gate = asyncio.Event()
    wrapper = BatchingEmbeddings(inner)
    first = asyncio.create_task(wrapper.aembed_query("first"))
    await settle()
    assert inner.requests == [["first"]]
    later = [asyncio.create_task(wrapper.aembed_query(f"later {i}")) for i in range(9)]
    await settle()
    inner.gate.set()
    async with asyncio.timeout(LONG_S):
        await asyncio.gather(first, *later)
    assert [len(r) for r in inner.requests] == [1, 9]


@pytest.mark.row(121)
async def test_a_text_is_sent_once_and_each_caller_has_a_list_of_its_own(inner):
    wrapper = BatchingEmbeddings(inner)
    vectors = await asyncio.gather(*(wrapper.aembed_query(t) for t in ["a", "b", "a", "c", "b", "b"]))
    assert inner.requests == [["a", "b", "c"]]
    assert vectors[1] == vectors[4] == vectors[5]
    vectors[1].append(0.0)
    assert vectors[4] == vector("b")


@pytest.mark.row(95)
async def test_one_bad_text_fails_its_own_callers_only(inner):
    wrapper = BatchingEmbeddings(inner)
    asked = ["first", "a", "bad", "b", "bad"]
    results = await asyncio.gather(*(wrapper.aembed_query(t) for t in asked), return_exceptions=True)
    assert [r for r in results if isinstance(r, list)] == [vector(t) for t in ("first", "a", "b")]
    assert [type(results[i]) for i in (2, 4)] == [ValueError, ValueError]
    assert results[2] is not results[4]
    assert inner.requests == [["a", "b", "bad", "first"], ["a", "b"], ["bad"], ["first"]]
    assert idle(wrapper)


@pytest.mark.row(96)
async def test_a_wrong_number_of_vectors_is_never_matched_to_texts(inner):
    inner.short = True
    wrapper = BatchingEmbeddings(inner)
    results = await asyncio.gather(*(wrapper.aembed_query(t) for t in "abc"), return_exceptions=True)
    assert [type(r) for r in results] == [AegisBatchError] * 3
    assert inner.requests == [["a", "b", "c"]]
    assert await wrapper.aembed_query("a") == vector("a")


async def test_a_server_that_is_away_is_not_asked_for_each_text(inner):
    inner.error = ConnectionError("away")
    wrapper = BatchingEmbeddings(inner)
    results = await asyncio.gather(*(wrapper.aembed_query(f"{i}") for i in range(20)), return_exceptions=True)
    assert [type(r) for r in results] == [ConnectionError] * 20
    assert len({id(r) for r in results}) == 20
    assert len(inner.requests) == 1
    assert idle(wrapper)


@pytest.mark.row(91)
async def test_a_cancelled_query_is_not_sent_and_hurts_nobody(inner):
    inner.gate = asyncio.Event()
    wrapper = BatchingEmbeddings(inner)
    tasks = [asyncio.create_task(wrapper.aembed_query("first"))]
    await settle()
    tasks += [asyncio.create_task(wrapper.aembed_query(t)) for t in ["gone", "stays", "stays"]]
    await settle()
    for i in (0, 1, 2):
        tasks[i].cancel()
    await settle()
    inner.gate.set()
    async with asyncio.timeout(LONG_S):
        assert await tasks[3] == vector("stays")
    assert inner.requests == [["first"], ["stays"]]
    assert inner.busy == 0
    assert idle(wrapper)


@pytest.mark.row(97)
async def test_more_than_a_batch_uses_more_slots_and_the_bound_holds(inner):
    inner.gate = asyncio.Event()
    wrapper = BatchingEmbeddings(inner, max_concurrency=2, max_batch=4, max_waiting=3)
    tasks = [asyncio.create_task(wrapper.aembed_query(f"{i}")) for i in range(40)]
    await settle()
    assert [len(r) for r in inner.requests] == [4, 4]
    inner.gate.set()
    async with asyncio.timeout(LONG_S):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(r, AegisOverloadedError) for r in results) == 40 - (4 + 4 + 3 * 4)
    assert all(r == vector(f"{i}") for i, r in enumerate(results) if isinstance(r, list))
    assert inner.most == 2
    assert idle(wrapper)


async def test_documents_and_queries_share_requests_slots_and_bounds(inner):
    """Queries go first; what is more than may wait is refused, but not the rest of a call that has begun."""
    inner.gate = asyncio.Event()
    wrapper = BatchingEmbeddings(inner, max_concurrency=1, max_waiting=1, max_batch=3)
    documents = asyncio.create_task(wrapper.aembed_documents(["bb", "a", "dddd", "ccc"]))
    await settle()
    more = asyncio.create_task(wrapper.aembed_documents(["eeee", "fffff"]))
    await settle()
    query = asyncio.create_task(wrapper.aembed_query("q"))
    await settle()
    with pytest.raises(AegisOverloadedError):
        await wrapper.aembed_documents(["g"])
    with pytest.raises(AegisOverloadedError):
        await wrapper.aembed_query("g")
    inner.gate.set()
    async with asyncio.timeout(LONG_S):
        assert await documents == [vector(t) for t in ("bb", "a", "dddd", "ccc")]
        assert await query == vector("q")
        assert await more == [vector("eeee"), vector("fffff")]
    assert inner.requests == [["a", "bb", "ccc"], ["q", "eeee", "fffff"], ["dddd"]]
    assert inner.most == 1
    inner.gate = None
    assert await asyncio.to_thread(wrapper.embed_documents, ["d"]) == [vector("d")]
    assert idle(wrapper)


async def test_a_request_is_bounded_in_characters_too(inner):
    """And texts of a length go together."""
    wrapper = BatchingEmbeddings(inner, max_batch_chars=10)
    texts = ["x" * length for length in (4, 30, 3, 1, 2)]
    assert await wrapper.aembed_documents(texts) == [vector(t) for t in texts]
    assert [[len(t) for t in request] for request in inner.requests] == [[1, 2, 3, 4], [30]]


async def test_a_few_long_texts_do_not_pad_many_short_ones(inner):
    """Most embedders compute a request's texts at the length of the longest."""
    wrapper = BatchingEmbeddings(inner)
    texts = [f"{i:03}" for i in range(60)] + ["x" * 2_000 + str(i) for i in range(4)]
    random.Random(1).shuffle(texts)
    await asyncio.gather(*(wrapper.aembed_query(t) for t in texts))
    assert [len(request) for request in inner.requests] == [60, 4]
    inner.requests.clear()
    await asyncio.gather(*(wrapper.aembed_query("x" * length) for length in range(1, 64)))
    assert len(inner.requests) == 1


async def test_much_to_compute_is_two_requests_at_a_time(inner):
    """Half of the work each, so that no half of the server is idle; never more than two for that."""
    inner.gate = asyncio.Event()
    wrapper = BatchingEmbeddings(inner)
    tasks = [asyncio.create_task(wrapper.aembed_query("x" * length)) for length in range(300, 364)]
    await settle()
    assert [len(request) for request in inner.requests] == [33, 31]
    inner.gate.set()
    async with asyncio.timeout(LONG_S):
        await asyncio.gather(*tasks)
    assert (len(inner.requests), inner.most) == (2, 2)
    assert idle(wrapper)


async def test_documents_are_not_starved_by_queries(inner):
    """One request of eight takes documents first."""
    wrapper = BatchingEmbeddings(inner, max_batch=1, max_concurrency=1)
    queries = [asyncio.create_task(wrapper.aembed_query(f"q{i}")) for i in range(40)]
    documents = asyncio.create_task(wrapper.aembed_documents(["d"]))
    async with asyncio.timeout(LONG_S):
        await asyncio.gather(*queries, documents)
    assert inner.requests.index(["d"]) < 8


async def test_without_merging_each_query_is_a_request(inner):
    """As many at once as there are slots; documents still share theirs."""
    inner.gate = asyncio.Event()
    wrapper = BatchingEmbeddings(inner, merge=False, max_concurrency=3)
    queries = [asyncio.create_task(wrapper.aembed_query(t)) for t in ["a", "b", "a", "c", "d"]]
    documents = [asyncio.create_task(wrapper.aembed_documents([t])) for t in ["x", "y"]]
    await settle()
    assert inner.requests == [["a"], ["b"], ["c"]]
    inner.gate.set()
    async with asyncio.timeout(LONG_S):
        await asyncio.gather(*queries, *documents)
    assert sorted(inner.requests[3:]) == [["d"], ["x", "y"]]
    assert inner.most == 3
    assert idle(wrapper)


@pytest.mark.row(98)
async def test_a_deadline_ends_the_wait(inner):
    inner.gate = asyncio.Event()
    wrapper = BatchingEmbeddings(inner, deadline_s=0.01)
    async with asyncio.timeout(LONG_S):
        results = await asyncio.gather(*(wrapper.aembed_query(f"{i}") for i in range(3)), return_exceptions=True)
        await settle()
    assert [type(r) for r in results] == [AegisDeadlineError] * 3
    assert len(inner.requests) == 1
    assert idle(wrapper)


@pytest.mark.row(107)
async def test_a_closed_admission_fails_who_waits(inner):
    inner.gate = asyncio.Event()
    wrapper = BatchingEmbeddings(inner)
    tasks = [asyncio.create_task(wrapper.aembed_query("0"))]
    await settle()
    tasks += [asyncio.create_task(wrapper.aembed_query(f"{i}")) for i in (1, 2)]
    await settle()
    wrapper.admission.close()
    inner.gate.set()
    async with asyncio.timeout(LONG_S):
        first, *others = await asyncio.gather(*tasks, return_exceptions=True)
    assert first == vector("0")
    assert all("closed" in str(e) for e in others)
    assert idle(wrapper)


@pytest.mark.row(99)
async def test_a_request_cancelled_from_outside_is_made_again_once(inner):
    inner.gate = asyncio.Event()
    wrapper = BatchingEmbeddings(inner)
    task = asyncio.create_task(wrapper.aembed_query("a"))
    for _ in range(2):
        await settle()
        (request,) = (t for t in asyncio.all_tasks() if t.get_coro().__qualname__.endswith("_afly"))
        request.cancel()
    async with asyncio.timeout(LONG_S):
        with pytest.raises(AegisServerError, match="ask again"):
            await task
    assert inner.requests == [["a"], ["a"]]
    assert idle(wrapper)


def test_threads_gather_too(inner):
    """64 threads: one makes a request, the others gather behind it."""
    inner.gate = threading.Event()
    wrapper = BatchingEmbeddings(inner)
    texts = [f"text {i % 40}" for i in range(64)]
    with ThreadPoolExecutor(64) as pool:
        futures = [pool.submit(wrapper.embed_query, t) for t in texts]
        wait_until(lambda: wrapper._documents.asked.seats == 64)
        inner.gate.set()
        assert [f.result(LONG_S) for f in futures] == [vector(t) for t in texts]
    assert [len(r) for r in inner.requests] == [1, 39]
    assert idle(wrapper)


def test_loops_and_threads_on_one_instance_without_a_warning(inner):
    wrapper = BatchingEmbeddings(inner, max_concurrency=2)

    async def many():
        async with asyncio.timeout(LONG_S):
            return await asyncio.gather(*(wrapper.aembed_query(f"{i}") for i in range(30)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ThreadPoolExecutor(10) as pool:
            loops = [pool.submit(asyncio.run, many()) for _ in range(2)]
            threads = [pool.submit(wrapper.embed_query, f"{i}") for i in range(30)]
            expected = [vector(f"{i}") for i in range(30)]
            assert [t.result(LONG_S) for t in threads] == expected
            assert [loop.result(LONG_S) for loop in loops] == [expected] * 2
        for _ in range(20):
            assert asyncio.run(many()) == expected
    assert inner.most <= 2
    assert idle(wrapper)


def test_a_blocking_query_inside_a_running_loop_ends(inner):
    inner.gate = asyncio.Event()
    wrapper = BatchingEmbeddings(inner, max_concurrency=1)

    async def main():
        task = asyncio.create_task(wrapper.aembed_query("a"))
        await settle()
        gate, inner.gate = inner.gate, None
        assert wrapper.embed_query("b") == vector("b")
        gate.set()
        assert await task == vector("a")

    asyncio.run(asyncio.wait_for(main(), LONG_S))
    assert idle(wrapper)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_whoever_stays_gets_the_right_vector(seed):
    """Queries cancelled at random, some bad: every answer is its own text's vector, no slot is lost."""
    rng = random.Random(seed)
    wrapper = BatchingEmbeddings(Fake(), max_concurrency=rng.randint(1, 3), max_batch=rng.randint(1, 6))

    async def main():
        tasks = []
        for _ in range(60):
            if rng.random() < 0.6:
                text = rng.choice(["a", "bb", "ccc", "bad", f"{rng.random()}"])
                tasks.append((text, asyncio.create_task(wrapper.aembed_query(text))))
            elif tasks and rng.random() < 0.5:
                rng.choice(tasks)[1].cancel()
            else:
                await asyncio.sleep(0)
        async with asyncio.timeout(LONG_S):
            results = await asyncio.gather(*(t for _, t in tasks), return_exceptions=True)
        await settle()
        return zip(tasks, results, strict=True)

    for (text, task), result in asyncio.run(main()):
        if isinstance(result, list):
            assert result == vector(text)
        else:
            assert task.cancelled() or (text == "bad" and isinstance(result, ValueError))
    assert wrapper.inner.busy == 0
    assert idle(wrapper)


def test_a_wrapper_has_the_name_of_the_embedder_inside():
    """Two that are wrapped are not one: vectors of either would be compared with those of the other."""
    for model in ("bge-m3", "mxbai-embed-large"):
        inner = OllamaEmbeddings(model=model)
        assert embedder_name(BatchingEmbeddings(inner)) == embedder_name(inner) == model
    assert embedder_name(BatchingEmbeddings(BatchingEmbeddings(Words()))) == "words"
