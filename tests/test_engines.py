"""Servers on OpenAI's wire: bounded by what they run at once, with the cache's contract, chat and vectors alike."""

import asyncio
import contextlib
import socket
import threading
import uuid

import pytest
from conftest import wait_until
from langchain_core.caches import InMemoryCache
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai_server import MODEL, OpenAIServer, closed

from langchain_aegis import (
    AegisConnectionError,
    AegisOverloadedError,
    AegisRouter,
    AegisSemanticCache,
    BatchingChatModel,
    BatchingEmbeddings,
    ChatAegis,
    aegis_scope,
    was_cached,
)
from langchain_aegis.embedding_cache import AegisEmbeddingCache
from langchain_aegis.notices import forget_warnings
from langchain_aegis.openai_servers import ask, read_metrics, root_of, slots_of
from langchain_aegis.own_bounds import learning, server_on_openai_wire
from langchain_aegis.servers import server_of
from langchain_aegis.writes import the_writer

SATURDAY, SATURDAY_TOO = "When does the library open on Saturday?", "At what time does the library open on Saturday?"
SUNDAY = "When does the library open on Sunday?"


@pytest.fixture
def server():
    with OpenAIServer() as running:
        yield running


_made = []


@pytest.fixture(autouse=True)
async def _connections_are_closed():
    """The client of OpenAI's wire leaves its connections to the collector."""
    yield
    await closed(*_made)
    _made.clear()


def chat(server, **options):
    told = {
        "model": MODEL,
        "base_url": getattr(server, "base_url", server),
        "api_key": "none",
        "temperature": 0,
        "max_retries": 0,
        **options,
    }
    model = ChatOpenAI(**told)
    _made.append(model)
    return model


def vectors(server, **options):
    address = getattr(server, "base_url", server)
    told = {"api_key": "none", "check_embedding_ctx_length": False, "max_retries": 0, **options}
    embeddings = OpenAIEmbeddings(model="bge-m3", base_url=address, **told)
    _made.append(embeddings)
    return embeddings


@pytest.fixture
def cache(redis_url, minilm):
    made = AegisSemanticCache(
        redis_url, minilm, namespace=f"o{uuid.uuid4().hex[:8]}", op_budget_s=10, embed_budget_s=30
    )
    yield made
    made.close()


# -- Bounds


async def burst(model, server, callers):
    """Begin so many different calls at once."""
    return [asyncio.ensure_future(model.ainvoke(f"Question number {i}?")) for i in range(callers)]


async def ended(calls):
    return await asyncio.gather(*calls, return_exceptions=True)


async def reached(server, true):
    await asyncio.to_thread(server.wait_for, true)


async def test_what_a_server_tells_is_what_runs_at_once():
    """llama.cpp says how many slots it has; no number stands anywhere in the application."""
    with OpenAIServer(max_num_seqs=9, tells=("slots",)) as server:
        model = BatchingChatModel(chat(server))
        assert model.admission.max_concurrency == 4  # nothing was asked of anybody
        assert server.requests == []
        await model.ainvoke("Hello?")
        await asyncio.to_thread(wait_until, lambda: model.admission.max_concurrency == 9)
        server.hold()
        calls = await burst(model, server, 30)
        await reached(server, lambda s: s.running == 9)
        server.release()
        assert all(not isinstance(each, Exception) for each in await ended(calls))
        assert (server.most_running, server.waiting) == (9, 0)


async def test_vllm_in_development_mode_tells_its_max_num_seqs():
    with OpenAIServer(max_num_seqs=33, tells=("metrics", "server_info")) as server:
        model = BatchingChatModel(chat(server))
        await model.ainvoke("Hello?")
        await asyncio.to_thread(wait_until, lambda: model.admission.max_concurrency == 33)


async def test_a_server_that_does_not_tell_has_as_many_slots_as_any_other(server):
    model = BatchingChatModel(chat(server))
    server.hold()
    calls = await burst(model, server, 20)
    await reached(server, lambda s: s.running == 4)
    server.release()
    await ended(calls)
    assert server.most_running == 4


async def test_a_setting_says_what_a_server_does_not(server, monkeypatch):
    monkeypatch.setenv("AEGIS_VLLM_MAX_NUM_SEQS", "12")
    model = BatchingChatModel(chat(server))
    server.hold()
    calls = await burst(model, server, 40)
    await reached(server, lambda s: s.running == 12)
    server.release()
    await ended(calls)
    assert server.most_running == 12


def test_the_setting_is_for_the_server_that_is_meant(server, monkeypatch):
    monkeypatch.setenv("AEGIS_VLLM_MAX_NUM_SEQS", "12")
    monkeypatch.setenv("VLLM_BASE_URL", "http://127.0.0.1:1")
    assert BatchingChatModel(chat(server)).admission.max_concurrency == 4
    monkeypatch.setenv("VLLM_BASE_URL", server.root)
    assert BatchingChatModel(chat(server)).admission.max_concurrency == 12
    assert BatchingChatModel(ChatAegis("m", base_url="http://127.0.0.1:2")).admission.max_concurrency == 4


@pytest.mark.parametrize(
    ("address", "own"),
    [
        ("https://api.openai.com/v1", False), ("https://x.openai.azure.com/openai/v1", False),
        ("http://127.0.0.1:8000/v1", True), ("https://gateway.example/v1", True),
        ("http://openai.com.example/v1", True),
    ],
)  # fmt: skip
def test_a_hosted_service_is_asked_for_nothing(address, own):
    assert (server_on_openai_wire(chat(address)) is not None) is own


async def test_the_smallest_bound_that_anybody_asks_for_wins_over_what_the_server_tells():
    with OpenAIServer(max_num_seqs=9, tells=("slots",)) as server:
        free, careful = BatchingChatModel(chat(server)), BatchingChatModel(chat(server), max_concurrency=2)
        await free.ainvoke("Hello?")
        await asyncio.to_thread(wait_until, lambda: learning._next[server.root] == float("inf"))
        assert free.admission is careful.admission
        assert free.admission.max_concurrency == 2


async def test_beyond_the_bounds_a_call_is_refused_with_a_time_and_an_exact_hit_is_served(server, cache):
    model = BatchingChatModel(chat(server, cache=cache), max_concurrency=2, max_waiting=3, cache=cache)
    first = await model.ainvoke(SATURDAY)
    assert the_writer.drain(timeout_s=10)
    server.hold()
    calls = await burst(model, server, 5)
    await reached(server, lambda s: s.running == 2)
    await asyncio.to_thread(wait_until, lambda: model.admission.stats().waiting == 3)  # they ask the cache first
    with pytest.raises(AegisOverloadedError) as refused:
        await model.ainvoke("One more?")
    assert refused.value.retry_after_s > 0
    hit = await model.ainvoke(SATURDAY)
    assert (hit.text, was_cached(hit)["tier"]) == (first.text, "exact")
    server.release()
    assert all(not isinstance(each, Exception) for each in await ended(calls))


async def test_a_batch_waits_and_is_never_refused(server):
    model = BatchingChatModel(chat(server), max_concurrency=8, max_waiting=1)
    answers = await model.abatch([f"Question number {i}?" for i in range(60)])
    assert len({answer.text for answer in answers}) == 60
    assert server.most_running <= 8


async def test_identical_calls_are_one_call_of_the_server(server):
    model = BatchingChatModel(chat(server))
    server.hold()
    calls = [asyncio.ensure_future(model.ainvoke(SATURDAY)) for _ in range(50)]
    await reached(server, lambda s: s.running == 1)
    server.release()
    answers = await ended(calls)
    assert {answer.text for answer in answers} == {f"About {SATURDAY}"}
    assert len(server.chats) == 1


async def test_calls_that_begin_alike_are_asked_one_after_another(server):
    """So that the server finds the long beginning in its prefix cache, whoever comes in between."""
    documents = {name: f"{name} " * 1500 for name in "AB"}
    model = BatchingChatModel(chat(server), max_concurrency=1)
    server.hold()
    first = asyncio.ensure_future(model.ainvoke("Hello?"))
    await reached(server, lambda s: s.running == 1)
    calls = []
    for i in range(4):
        for text in documents.values():
            calls.append(asyncio.ensure_future(model.ainvoke(f"{text}\nQuestion {i}?")))
            await asyncio.sleep(0)
    await asyncio.to_thread(wait_until, lambda: model.admission.stats().waiting == 8)
    server.release()
    await ended([first, *calls])
    order = [body["messages"][0]["content"][0] for body in server.begun[1:]]
    assert "".join(order) in ("AAAABBBB", "BBBBAAAA")


def test_a_server_is_the_same_one_on_either_wire_and_however_it_is_named(monkeypatch):
    for address in ("http://gpu:11434/v1", "http://gpu:11434/v1/", "http://gpu:11434"):
        assert server_of(ChatOpenAI(model="m", base_url=address, api_key="none")) == "http://gpu:11434"
    assert server_of(OpenAIEmbeddings(model="m", base_url="http://gpu:11434/v1", api_key="none")) == "http://gpu:11434"
    assert server_of(ChatAegis("m", base_url="http://gpu:11434")) == "http://gpu:11434"
    assert server_of(ChatOpenAI(model="m", api_key="none")) is None
    monkeypatch.setenv("OPENAI_BASE_URL", "http://gpu:8000/v1")
    assert server_of(ChatOpenAI(model="m", api_key="none")) == "http://gpu:8000"
    monkeypatch.setenv("OPENAI_API_BASE", "http://gpu:8001/v1")
    assert server_of(ChatOpenAI(model="m", api_key="none")) == "http://gpu:8001"


# -- The cache


async def test_the_contract_of_the_cache(server, cache):
    model = BatchingChatModel(chat(server), cache=cache)

    async def ask(question, **changed):
        prompt = f"Context:\n{changed.pop('context', 'Open from 10 to 12.')}\n\nQuestion: {question}\n\nAnswer:"
        asked = model if not changed else BatchingChatModel(chat(server, **changed), cache=cache)
        answer = await asked.ainvoke([HumanMessage(prompt)])
        await asyncio.to_thread(the_writer.drain, timeout_s=10)
        return (was_cached(answer) or {}).get("tier")

    assert await ask(SATURDAY) is None
    assert await ask(SATURDAY) == "exact"
    assert await ask(SATURDAY_TOO) == "semantic"
    assert await ask(SUNDAY) is None  # another question
    assert await ask(SATURDAY, context="Closed.") is None  # other documents
    assert await ask(SATURDAY, temperature=0.5) is None  # another option
    assert await ask(SATURDAY, seed=3) is None
    assert await ask(SATURDAY, timeout=30, max_retries=1) == "exact"  # no option of the answer
    with aegis_scope(tenant="acme"):
        assert await ask(SATURDAY) is None  # another tenant
        assert await ask(SATURDAY) == "exact"
    assert len(server.chats) == 6


@pytest.mark.parametrize("streams", [False, True])
async def test_what_was_cut_at_the_limit_is_not_kept(server, cache, streams):
    model = BatchingChatModel(chat(server, streaming=streams), cache=cache)
    server.end = "length"
    await model.ainvoke(SATURDAY)
    server.end = "stop"
    assert was_cached(await model.ainvoke(SATURDAY)) is None
    await asyncio.to_thread(the_writer.drain, timeout_s=10)
    assert was_cached(await model.ainvoke(SATURDAY))["tier"] == "exact"


async def test_a_stream_that_breaks_off_is_not_kept(server, cache):
    model = BatchingChatModel(chat(server, streaming=True), cache=cache)
    server.end = None
    with pytest.raises(Exception, match=r"(?i)connection|incomplete|protocol|closed"):
        await model.ainvoke(SATURDAY)
    server.end = "stop"
    assert was_cached(await model.ainvoke(SATURDAY)) is None
    assert model.admission.stats().running == 0


async def streamed(model, question, awaited):
    """Return the chunks of a stream; what it left to be stored is stored."""
    if awaited:
        chunks = [chunk async for chunk in model.astream(question)]
    else:
        chunks = await asyncio.to_thread(lambda: list(model.stream(question)))
    assert await asyncio.to_thread(the_writer.drain, timeout_s=10)
    return chunks


@pytest.mark.parametrize("awaited", [True, False])
async def test_what_streams_comes_from_the_cache_as_a_stream(server, cache, awaited):
    model = BatchingChatModel(chat(server), cache=cache)
    fresh = await streamed(model, SATURDAY, awaited)
    assert (len(fresh) > 3, was_cached(sum(fresh[1:], fresh[0]))) == (True, None)
    for question, tier in ((SATURDAY, "exact"), (SATURDAY_TOO, "semantic")):
        hit = await streamed(model, question, awaited)
        assert "".join(chunk.text for chunk in hit) == "".join(chunk.text for chunk in fresh)
        assert was_cached(sum(hit[1:], hit[0]))["tier"] == tier
        assert len({chunk.id for chunk in hit}) == 1
    assert was_cached(await model.ainvoke(SATURDAY))["tier"] == "exact"  # one entry for both ways
    with aegis_scope(tenant="acme"):
        other = await streamed(model, SATURDAY, awaited)
    assert was_cached(sum(other[1:], other[0])) is None
    assert len(server.chats) == 2
    assert model.admission.stats().running == 0


@pytest.mark.parametrize("awaited", [True, False])
async def test_a_stream_that_is_cut_breaks_off_or_is_left_is_not_kept(server, cache, awaited):
    model = BatchingChatModel(chat(server), cache=cache)
    server.end = "length"
    await streamed(model, SATURDAY, awaited)
    server.end = None
    with pytest.raises(Exception, match=r"(?i)connection|incomplete|protocol|closed"):
        await streamed(model, SATURDAY, awaited)
    server.end = "stop"
    if awaited:
        async with contextlib.aclosing(model.astream(SATURDAY)) as chunks:
            await anext(chunks)
    else:
        stream = model.stream(SATURDAY)
        next(stream)
        stream.close()
    fresh = await streamed(model, SATURDAY, awaited)
    assert was_cached(sum(fresh[1:], fresh[0])) is None
    assert len(server.chats) == 4


@pytest.mark.parametrize("awaited", [True, False])
async def test_a_stream_is_looked_up_in_no_cache_that_is_not_made_for_it(server, awaited):
    """As in LangChain; and not inside `cache=False` or `aegis_scope(cache="off")`."""
    model = BatchingChatModel(chat(server, temperature=0.7), cache=InMemoryCache())
    for _ in range(2):
        await streamed(model, SATURDAY, awaited)
    assert len(server.chats) == 2


@pytest.mark.parametrize("awaited", [True, False])
async def test_a_stream_is_not_looked_up_where_the_caller_wants_none(server, cache, awaited):
    for model, mode in ((BatchingChatModel(chat(server), cache=cache), "off"),
                        (BatchingChatModel(chat(server), cache=False), "use")):  # fmt: skip
        with aegis_scope(cache=mode):
            for _ in range(2):
                found = await streamed(model, SATURDAY, awaited)
                assert was_cached(sum(found[1:], found[0])) is None
    assert len(server.chats) == 4


async def test_answers_of_a_model_of_that_name_at_another_server_are_other_answers(server, cache):
    with OpenAIServer() as another:
        for each in (server, another):
            model = BatchingChatModel(chat(each), cache=cache)
            assert was_cached(await model.ainvoke(SATURDAY)) is None
            await asyncio.to_thread(the_writer.drain, timeout_s=10)
            assert was_cached(await model.ainvoke(SATURDAY))["tier"] == "exact"
        assert await cache.ainvalidate(model=MODEL) == 2


# -- The router


def refused_port():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return closed.getsockname()[1]


async def test_a_router_sends_bulk_work_to_one_engine_and_chat_to_the_other(server):
    with OpenAIServer() as another:
        router = AegisRouter(
            {"extract": BatchingChatModel(chat(server)), "chat": BatchingChatModel(chat(another))}, default="chat"
        )
        with aegis_scope(task="extract"):
            await router.abatch([f"Extract {i}" for i in range(10)])
        await router.ainvoke("Hello?")
        assert (len(server.chats), len(another.chats)) == (10, 1)


@pytest.mark.parametrize("asynchronous", [True, False])
async def test_an_engine_that_is_off_is_down_at_once_and_its_calls_go_to_the_other(server, asynchronous):
    off = chat(f"http://127.0.0.1:{refused_port()}/v1")
    router = AegisRouter(
        {"extract": BatchingChatModel(off), "chat": BatchingChatModel(chat(server))}, default="chat",
        fallback={"extract": "chat"},
    )  # fmt: skip
    with aegis_scope(task="extract"):
        answer = await router.ainvoke("Extract") if asynchronous else await asyncio.to_thread(router.invoke, "Extract")
    assert answer.text == "About Extract"
    assert router._fleet.breakers["extract"].allow() is False


# -- Vectors


async def test_queries_that_come_together_share_requests(server):
    embeddings = BatchingEmbeddings(vectors(server), max_concurrency=1)
    server.hold()
    queries = [asyncio.ensure_future(embeddings.aembed_query(f"word{i}")) for i in range(40)]
    await reached(server, lambda s: s.running == 1)
    await asyncio.sleep(0)
    server.release()
    found = await ended(queries)
    asked = [body["input"] for path, body in server.requests if path == "/v1/embeddings"]
    assert len(asked) <= 4
    assert sum(len(texts) for texts in asked) == 40
    assert server.most_running == 1
    assert found == await vectors(server).aembed_documents([f"word{i}" for i in range(40)])


def test_vectors_are_kept_under_the_name_of_the_model_and_its_server(server, redis_url):
    kept = AegisEmbeddingCache(redis_url=redis_url, namespace=f"v{uuid.uuid4().hex[:8]}", version="1")
    embeddings = BatchingEmbeddings(vectors(server), cache=kept)
    assert embeddings.embed_query("one two") == embeddings.embed_query("one two")
    assert len(server.requests) == 1
    with OpenAIServer() as another:
        BatchingEmbeddings(vectors(another), cache=kept).embed_query("one two")
        assert len(another.requests) == 1
    kept.close()


@pytest.mark.parametrize("wrapped", [False, True])
async def test_they_are_the_embedder_of_the_cache(server, redis_url, wrapped):
    embeddings = BatchingEmbeddings(vectors(server)) if wrapped else vectors(server)
    async with AegisSemanticCache(
        redis_url, embeddings, namespace=f"e{uuid.uuid4().hex[:8]}", op_budget_s=10, embed_budget_s=30,
        min_similarity=0.7,
    ) as cache:  # fmt: skip
        model = BatchingChatModel(chat(server), cache=cache)
        await model.ainvoke(SATURDAY)
        await asyncio.to_thread(the_writer.drain, timeout_s=10)
        hit = await model.ainvoke(SATURDAY_TOO)
        assert was_cached(hit)["tier"] == "semantic"
        assert was_cached(await model.ainvoke(SUNDAY)) is None
        assert (await cache.ahealth()).embedder == "bge-m3"


async def test_an_embedder_that_is_off_costs_hits_by_meaning_and_no_call(server, redis_url):
    off = vectors(f"http://127.0.0.1:{refused_port()}/v1")
    async with AegisSemanticCache(redis_url, off, namespace=f"e{uuid.uuid4().hex[:8]}", op_budget_s=10) as cache:
        model = BatchingChatModel(chat(server), cache=cache)
        assert was_cached(await model.ainvoke(SATURDAY)) is None
        await asyncio.to_thread(the_writer.drain, timeout_s=10)
        assert was_cached(await model.ainvoke(SATURDAY))["tier"] == "exact"


def test_tokens_of_another_model_are_warned_of(caplog):
    """Else the server would take OpenAI's token numbers for those of its own model, and say nothing."""
    forget_warnings()
    vectors("http://127.0.0.1:1/v1")
    BatchingEmbeddings(vectors("http://127.0.0.1:1/v1"))
    BatchingEmbeddings(vectors("https://api.openai.com/v1", check_embedding_ctx_length=True))
    assert caplog.messages == []
    BatchingEmbeddings(vectors("http://127.0.0.1:1/v1", check_embedding_ctx_length=True))
    assert "check_embedding_ctx_length=False" in caplog.text


# -- What a server tells


def test_a_server_is_asked_what_it_is(server):
    server.prompts, server.finished = {500: 3, 1000: 9, 2000: 9}, {"stop": 8, "length": 1}
    told = ask(server.base_url)
    assert (told.root, told.engine, told.version, told.slots) == (server.root, "vllm", "0.33.0", None)
    (model,) = told.models
    assert (model.name, model.root, model.window) == (MODEL, "meta-llama/Llama-3.1-8B", 8192)
    load = told.load
    assert (load.running, load.waiting, load.preempted, load.engines) == (0, 0, 0, 1)
    assert (load.kv_tokens, load.kv_used, load.memory_share) == (65536, 0.25, 0.9)
    assert (load.prefix_caching, load.prefix_asked, load.prefix_found) == (True, 1000, 600)
    assert (load.finished, load.longest_prompt) == ({"stop": 8, "length": 1}, 1000)


def test_a_server_without_metrics_is_a_server():
    with OpenAIServer(tells=()) as server:
        told = ask(server.root)
        assert (told.engine, told.slots, told.load) == ("vllm", None, None)
        assert slots_of(server.base_url) is None


def test_the_key_that_a_server_asks_for_is_sent():
    with OpenAIServer(api_key="token", tells=("slots",), max_num_seqs=5) as server:
        with pytest.raises(Exception, match="401"):
            ask(server.root)
        assert ask(server.root, api_key="token").models
        model = BatchingChatModel(chat(server, api_key="token"))
        model.invoke("Hello?")
        wait_until(lambda: model.admission.max_concurrency == 5)


def test_a_server_that_is_off_is_an_error_and_tells_nothing():
    address = f"http://127.0.0.1:{refused_port()}/v1"
    with pytest.raises(AegisConnectionError, match="no server answers"):
        ask(address)
    assert slots_of(address) is None


@pytest.mark.parametrize("answer", [b"", b"hello", b"[1]", b'{"data": 3}', b'{"data": [3, {"id": null}]}'])
def test_an_answer_that_is_none_is_an_error_or_no_model(answer):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)

        def serve():
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(4096)
                    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(answer)}\r\nconnection: close\r\n\r\n"
                    connection.sendall(head.encode() + answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            told = ask(address)
        except Exception as exc:
            assert "answer is no" in str(exc)
        else:
            assert all(model.name == "" for model in told.models)
        assert slots_of(address) is None
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def test_metrics_of_older_releases_and_of_llama_cpp_are_read_and_nonsense_is_not():
    old = """
vllm:num_requests_running{model_name="a"} 3.0
vllm:num_requests_running{model_name="a",engine="1"} 2.0
vllm:gpu_cache_usage_perc{model_name="a"} 0.5
vllm:gpu_prefix_cache_queries_total{model_name="a"} 10
vllm:gpu_prefix_cache_hits_total{model_name="a"} 4
vllm:cache_config_info{block_size="16",num_gpu_blocks="None",enable_prefix_caching="False",swap_space="4 {x}"} 1.0
vllm:request_prompt_tokens_bucket{le="10"} 1
vllm:request_prompt_tokens_bucket{le="+Inf"} 2
"""
    load = read_metrics(old)
    assert (load.running, load.waiting, load.engines, load.kv_used) == (5, None, 2, 0.5)
    assert (load.prefix_caching, load.prefix_asked, load.prefix_found, load.kv_tokens) == (False, 10, 4, None)
    assert load.longest_prompt is None
    new = 'vllm:cache_config_info{kv_cache_size_tokens="1000",num_gpu_blocks="9",block_size="16",engine="0"} 1\n'
    assert read_metrics(new + new.replace('"0"', '"1"')).kv_tokens == 2000
    assert read_metrics("llamacpp:requests_processing 2\nllamacpp:requests_deferred 7\n").waiting == 7
    for text in ("", "#", "{} 1", "vllm:num_requests_running NaN", "a b c d", "\x00", 'x{a="\\"} 1'):
        assert read_metrics(text).running is None


def test_the_root_of_an_address():
    for text in ("http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"):
        assert root_of(text) == "http://a:1"
    assert root_of("http://a:1/serve/v1") == "http://a:1/serve"
