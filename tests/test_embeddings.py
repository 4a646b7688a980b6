"""AegisEmbeddings takes OllamaEmbeddings' place, merges queries, and never hands on a vector that is none."""

import asyncio
import copy
import gc
import math
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import wait_until
from langchain_ollama import OllamaEmbeddings
from lying_server import LyingServer, plain

from langchain_aegis import AegisEmbeddings
from langchain_aegis.embeddings import MAX_BATCH
from langchain_aegis.errors import (
    AegisConfigError,
    AegisConnectionError,
    AegisContextOverflowError,
    AegisError,
    AegisModelNotFoundError,
    AegisOptionError,
    AegisOverloadedError,
    AegisRequestError,
    AegisServerError,
)
from langchain_aegis.testing import ScriptedModel, ScriptedOllama

DEADLINE_S = 20


@pytest.fixture(scope="module")
def shared():
    with ScriptedOllama([ScriptedModel(name="embed", embedding=True), "chat"]) as server:
        yield server


@pytest.fixture
def server(shared):
    shared.heal()
    shared.forget()
    return shared


@pytest.fixture
def model(server):
    return AegisEmbeddings("embed", base_url=server.base_url)


@pytest.fixture
def lying():
    server = LyingServer()
    yield server
    server.close()


@pytest.fixture(params=["sync", "async"])
def way(request):
    return request.param


def embed(model, way, texts):
    return model.embed_documents(texts) if way == "sync" else asyncio.run(model.aembed_documents(texts))


def bodies(server):
    return [seen.body for seen in server.requests if seen.path == "/api/embed"]


# -- the same as OllamaEmbeddings --


def test_vectors_are_those_of_ollama_embeddings(server, model):
    """Documents and queries, sync and async."""
    upstream = OllamaEmbeddings(model="embed", base_url=server.base_url)
    texts = ["one text", "another text", "one text", ""]
    theirs = upstream.embed_documents(texts)
    assert embed(model, "sync", texts) == embed(model, "async", texts) == theirs
    assert model.embed_query("one text") == asyncio.run(model.aembed_query("one text")) == theirs[0]
    upstream._client.close()


@pytest.mark.row(83)
def test_documents_are_sent_in_batches_without_duplicates(server, model, way):
    """And come back in their order; nothing is sent for nothing."""
    texts = [f"text {n % 150}" for n in range(300)]
    vectors = embed(model, way, texts)
    assert [len(body["input"]) for body in bodies(server)] == [64, 64, 22]
    assert vectors[:150] == vectors[150:]
    assert vectors[7] == model.embed_query("text 7")
    server.forget()
    assert embed(model, way, []) == []
    assert server.requests == ()


def test_what_is_sent(server, way):
    """Options that were given, and no nulls."""
    model = AegisEmbeddings(
        "embed", base_url=server.base_url, dimensions=16, truncate=False, num_ctx=256, keep_alive="1h"
    )
    assert len(embed(model, way, ["x"])[0]) == 16
    assert bodies(server)[0] == {"model": "embed", "input": ["x"], "truncate": False, "dimensions": 16,
                                 "keep_alive": "1h", "options": {"num_ctx": 256}}  # fmt: skip
    embed(AegisEmbeddings("embed", base_url=server.base_url), way, ["x"])
    assert bodies(server)[1] == {"model": "embed", "input": ["x"], "keep_alive": "30m", "options": {}}


# -- merged queries --


async def test_queries_that_come_together_share_requests(server, model):
    """A hundred at once need two requests, and each gets its own vector."""
    texts = [f"query {n}" for n in range(100)]
    vectors = await asyncio.gather(*(model.aembed_query(text) for text in texts))
    assert [len(body["input"]) for body in bodies(server)] == [MAX_BATCH, 100 - MAX_BATCH]
    assert list(vectors) == await model.aembed_documents(texts)


async def test_queries_gather_while_a_request_is_under_way(server, model):
    """Nobody waits while the server is idle; what comes later goes together."""
    with server.hold():
        first = asyncio.create_task(model.aembed_query("first"))
        await server.await_until(lambda s: s.routes["/api/embed"] == 1)
        later = [asyncio.create_task(model.aembed_query(f"later {n}")) for n in range(10)]
        await asyncio.sleep(0)
        assert bodies(server)[0]["input"] == ["first"]
    await asyncio.wait_for(asyncio.gather(first, *later), DEADLINE_S)
    assert [len(body["input"]) for body in bodies(server)] == [1, 10]


async def test_the_same_text_is_embedded_once(server, model):
    """Callers do not share the list."""
    vectors = await asyncio.gather(*(model.aembed_query("same") for _ in range(20)))
    assert [body["input"] for body in bodies(server)] == [["same"]]
    vectors[0][0] = math.pi
    vectors[1][0] = math.e
    assert vectors[2][0] not in (math.pi, math.e)


async def test_equal_models_share_requests_and_others_do_not(server, model):
    """Every object made for a request of its own would undo the merging."""
    twin = AegisEmbeddings("embed", base_url=server.base_url)
    short = AegisEmbeddings("embed", base_url=server.base_url, dimensions=8)
    one, two, three = await asyncio.gather(model.aembed_query("a"), twin.aembed_query("b"), short.aembed_query("c"))
    assert (len(one), len(two), len(three)) == (384, 384, 8)
    assert sorted(body["input"] for body in bodies(server)) == [["a", "b"], ["c"]]


async def test_a_waiter_that_leaves_hurts_nobody(server, model):
    """Neither in flight nor waiting; and what nobody waits for is not sent."""
    with server.hold():
        flying = [asyncio.create_task(model.aembed_query("flying")) for _ in range(2)]
        await server.await_until(lambda s: s.routes["/api/embed"] == 1)
        waiting = [asyncio.create_task(model.aembed_query(text)) for text in ("gone", "stays", "stays")]
        await asyncio.sleep(0)
        for task in (flying[0], waiting[0], waiting[1]):
            task.cancel()
    results = await asyncio.wait_for(asyncio.gather(*flying, *waiting, return_exceptions=True), DEADLINE_S)
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [True, False, True, True, False]
    assert [body["input"] for body in bodies(server)] == [["flying"], ["stays"]]


async def test_a_bad_text_does_not_fail_its_neighbours(server, model):
    """The one that the server refuses is found by halving."""
    server.fail(400, times=None, when=lambda seen: "poison" in seen.text, message="bad text")
    texts = [f"text {n}" if n != 37 else "poison" for n in range(60)]
    results = await asyncio.gather(*(model.aembed_query(text) for text in texts), return_exceptions=True)
    assert isinstance(results.pop(37), AegisRequestError)
    assert all(isinstance(result, list) for result in results)
    assert len(bodies(server)) <= 13


async def test_a_text_that_makes_the_model_fail_does_not_fail_its_neighbours(server, model):
    """Some models compute no number for some texts, and Ollama then answers 500 for the whole request."""
    message = "failed to encode response: json: unsupported value: NaN"
    server.fail(500, times=None, when=lambda seen: "poison" in seen.text, message=message)
    results = await asyncio.gather(*(model.aembed_query(t) for t in ("a", "poison", "b")), return_exceptions=True)
    assert [type(result) for result in results] == [list, AegisServerError, list]


async def test_a_server_that_refuses_everything_is_not_asked_for_each_text(server, model):
    """Which is found out with a text that nobody refuses."""
    server.fail(400, times=None, message="no")
    texts = [f"text {n}" for n in range(64)]
    results = await asyncio.gather(*(model.aembed_query(text) for text in texts), return_exceptions=True)
    assert {type(result) for result in results} == {AegisRequestError}
    assert len(bodies(server)) <= 8


async def test_a_text_that_cannot_be_sent_is_found_without_a_server(server, model):
    texts = ["a", "\ud800", "b"]
    results = await asyncio.gather(*(model.aembed_query(text) for text in texts), return_exceptions=True)
    assert [type(result) for result in results] == [list, AegisRequestError, list]


async def test_documents_of_several_calls_share_requests_and_one_bad_text_fails_its_call_only(server, model):
    server.fail(400, times=None, when=lambda seen: "poison" in seen.text, message="bad text")
    calls = [[f"{n} a", f"{n} b"] for n in range(8)] + [["0 a", "poison"]]
    results = await asyncio.gather(*(model.aembed_documents(call) for call in calls), return_exceptions=True)
    error = results.pop()
    assert isinstance(error, AegisRequestError)
    assert error.__notes__ == ["This was text 2 of 2."]
    assert all(len(result) == 2 for result in results)
    assert sum(len(body["input"]) for body in bodies(server) if "poison" not in body["input"]) <= 17
    assert len(bodies(server)) <= 10


@pytest.mark.parametrize(("status", "error"), [(503, AegisOverloadedError), (500, AegisServerError)])
async def test_a_failure_reaches_every_waiter_as_an_error_of_its_own(server, model, status, error):
    """And the next call works."""
    server.fail(status)
    results = await asyncio.gather(*(model.aembed_query(f"t{n}") for n in range(5)), return_exceptions=True)
    assert {type(result) for result in results} == {error}
    assert len({id(result) for result in results}) == 5
    assert {result.status_code for result in results} == {status}
    assert len(bodies(server)) == 1
    assert await model.aembed_query("t0")


def test_many_loops_and_threads_share_one_object(server, model):
    """`asyncio.run` again and again, and sync calls from threads."""
    expected = model.embed_query("x")
    assert [asyncio.run(model.aembed_query("x")) for _ in range(3)] == [expected] * 3
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(model.embed_query, "x") for _ in range(8)]
        jobs += [pool.submit(lambda: asyncio.run(model.aembed_query("x"))) for _ in range(8)]
        assert [job.result(DEADLINE_S) for job in jobs] == [expected] * 16


def test_threads_and_loops_share_few_requests(server, model):
    """64 threads and two event loops with 64 calls each, of all four kinds, half of their texts in common."""

    async def awaited(name):
        queries = [model.aembed_query(f"text {n}" if n % 2 else f"{name} {n}") for n in range(32)]
        documents = [model.aembed_documents([f"text {n}", f"{name} {n}"]) for n in range(32)]
        return await asyncio.gather(*queries, *documents)

    def blocking(n):
        return model.embed_query(f"text {n}") if n % 2 else model.embed_documents([f"text {n}"])[0]

    with ThreadPoolExecutor(66) as pool:
        with server.hold():
            loops = [pool.submit(asyncio.run, awaited(name)) for name in ("x", "y")]
            server.wait_until(lambda s: s.routes["/api/embed"] >= 1)
            threads = [pool.submit(blocking, n) for n in range(64)]
        found = [thread.result(DEADLINE_S) for thread in threads]
        x, y = (loop.result(DEADLINE_S) for loop in loops)
    requests = len(bodies(server))
    assert requests <= 12
    expected = model.embed_documents([f"text {n}" for n in range(64)])
    assert found == expected
    assert x[1:32:2] == y[1:32:2] == expected[1:32:2]
    assert [vectors[0] for vectors in x[32:]] == expected[:32]


def test_a_text_under_way_in_another_loop_is_waited_for(server, model):
    """And a thread's in a loop: it is asked once."""
    with ThreadPoolExecutor(3) as pool, server.hold():
        first = pool.submit(asyncio.run, model.aembed_query("same"))
        server.wait_until(lambda s: s.routes["/api/embed"] == 1)
        others = [pool.submit(model.embed_query, "same"), pool.submit(asyncio.run, model.aembed_query("same"))]
        gathering = model._way[0].asked
        wait_until(lambda: gathering.seats == 3)
        server.release()
        assert first.result(DEADLINE_S) == others[0].result(DEADLINE_S) == others[1].result(DEADLINE_S)
    assert len(bodies(server)) == 1


def test_a_loop_that_waits_for_a_thread_cannot_hold_it_up(server, model):
    """The thread asks for a text that this very loop has under way."""

    async def main():
        task = asyncio.create_task(model.aembed_query("x"))
        await server.await_until(lambda s: s.routes["/api/embed"] == 1)
        with ThreadPoolExecutor(1) as pool:
            server.release()
            found = pool.submit(model.embed_query, "x").result(DEADLINE_S)
        return found == await task

    server.hold()
    assert asyncio.run(main())
    assert len(bodies(server)) <= 2


def test_a_loop_that_ends_takes_nobody_along(server, model):
    """A thread that waited for its text asks for it again."""

    async def leave():
        task = asyncio.create_task(model.aembed_query("x"))
        await server.await_until(lambda s: s.routes["/api/embed"] == 1)
        thread = pool.submit(model.embed_query, "x")
        await asyncio.to_thread(wait_until, lambda: model._way[0].asked.seats == 2)
        return task, thread

    with ThreadPoolExecutor(2) as pool:
        with server.hold():
            task, thread = asyncio.run(leave())
        assert task.cancelled()
        assert len(thread.result(DEADLINE_S)) == 384
    assert model._way[0].idle


def test_a_loop_that_ends_leaves_nothing_behind(server, model):
    """Its waiters are cancelled with it, and the next loop works."""

    async def leave():
        task = asyncio.create_task(model.aembed_query("x"))
        await server.await_until(lambda s: s.routes["/api/embed"] == 1)
        return task

    with server.hold():
        assert asyncio.run(leave()).cancelled()
    assert asyncio.run(model.aembed_query("y"))


# -- errors --


@pytest.mark.row(83)
@pytest.mark.parametrize(
    "embeddings",
    [None, [], [[1.0]], [[1.0], [1.0, 2.0]], [[], []], [[1.0], ["x"]], [[1.0], [None]], [1.0, 2.0], [[1e999], [1.0]]],
)
@pytest.mark.row(43)
def test_vectors_that_are_none_are_a_server_error(lying, embeddings, way):
    """Wrong count, wrong length, not numbers, not finite."""
    text = repr(embeddings).replace("None", "null").replace("inf", "1e999").replace("'", '"')
    lying.script = plain(f'{{"model":"m","embeddings":{text}}}'.encode())
    with pytest.raises(AegisServerError):
        embed(AegisEmbeddings("m", base_url=lying.url), way, ["a", "b"])


@pytest.mark.row(43, 83)
def test_not_a_number_is_a_server_error(lying, way):
    """Some servers write it so."""
    lying.script = plain(b'{"embeddings":[[NaN,1.0]]}')
    with pytest.raises(AegisServerError):
        embed(AegisEmbeddings("m", base_url=lying.url), way, ["a"])


@pytest.mark.row(83)
def test_dimensions_that_the_model_does_not_have_are_an_error(lying, way):
    """Ollama ignores them in silence."""
    lying.script = plain({"embeddings": [[1.0, 2.0]]})
    with pytest.raises(AegisServerError, match="2 dimensions where 3"):
        embed(AegisEmbeddings("m", base_url=lying.url, dimensions=3), way, ["a"])


def test_refusals_have_their_errors(server, model, way):
    """A model that is not there, one that makes no vectors, a text that is too long, nobody there."""
    with pytest.raises(AegisModelNotFoundError, match="ollama pull nope"):
        embed(AegisEmbeddings("nope", base_url=server.base_url), way, ["a"])
    with pytest.raises(AegisRequestError, match="embeddings"):
        embed(AegisEmbeddings("chat", base_url=server.base_url), way, ["a"])
    with pytest.raises(AegisContextOverflowError):
        embed(AegisEmbeddings("embed", base_url=server.base_url, truncate=False), way, ["word " * 20_000])
    with pytest.raises(AegisConnectionError):
        embed(AegisEmbeddings("m", base_url="http://127.0.0.1:9"), way, ["a"])
    with pytest.raises(AegisModelNotFoundError):
        AegisEmbeddings("nope", base_url=server.base_url, validate_model_on_init=True)


def test_an_object_that_was_used_is_freed_at_once(server):
    """With its own connections, if it has some; what was made of its fields does not keep it."""
    model = AegisEmbeddings("embed", base_url=server.base_url)
    model.embed_query("x")
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_a_changed_field_counts(server, model):
    model.embed_query("x")
    model.dimensions = 8
    assert len(model.embed_query("x")) == 8
    assert len(model.model_copy(update={"dimensions": 16}).embed_query("x")) == 16
    assert len(model.embed_query("x")) == 8


def test_construction(monkeypatch):
    """Default model and address, copies, and wrong arguments."""
    monkeypatch.setenv("OLLAMA_BASE_URL", "myhost")
    with pytest.raises(AegisConfigError, match="OLLAMA_MODEL_EMBEDDINGS"):
        AegisEmbeddings()
    monkeypatch.setenv("OLLAMA_MODEL_EMBEDDINGS", "bge-m3")
    model = AegisEmbeddings()
    assert (model.model, model.base_url) == ("bge-m3", "http://myhost:11434")
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), model.model_copy()):  # noqa: S301 (our own)
        assert other == model
    for wrong in ({"dimension": 3}, {"dimensions": 0}, {"keep_alive": [1]}, {"timeout": -1}):
        with pytest.raises(AegisOptionError, match=next(iter(wrong))):
            AegisEmbeddings(**wrong)
    with pytest.raises(AegisConfigError):
        AegisEmbeddings(base_url="ftp://x")
    assert "s3cret" not in repr(AegisEmbeddings(base_url="http://u:s3cret@h"))
    assert issubclass(AegisConfigError, AegisError)
