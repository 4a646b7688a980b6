"""The example's RAG graph, unmodified, on ChatOllama, on ChatAegis and on ChatOpenAI: one contract of the cache.

ChatOllama and ChatAegis ask the embedded Ollama, ChatOpenAI asks llama.cpp's own server; all run the same small model.
"""

import asyncio
import importlib.util
import uuid
from pathlib import Path

import llama_server
import pytest
from conftest import short_directory, wait_until
from langchain_core.documents import Document
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessageChunk
from langchain_ollama import ChatOllama
from langchain_openai import ChatOpenAI
from openai_server import closed

from langchain_aegis import AegisSemanticCache, BatchingChatModel, ChatAegis, aegis_scope, was_cached
from langchain_aegis.embedded import EmbeddedOllama
from langchain_aegis.notices import forget_warnings
from langchain_aegis.openai_servers import ask as ask_server
from langchain_aegis.writes import the_writer

pytestmark = pytest.mark.slow  # they run the small model

_spec = importlib.util.spec_from_file_location("rag_graph", Path(__file__).parents[1] / "examples" / "rag_graph.py")
rag_graph = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(rag_graph)

SATURDAY, SATURDAY_TOO = "When does the library open on Saturday?", "At what time does the library open on Saturday?"
SUNDAY = "When does the library open on Sunday?"
HOURS = ["On Saturday the library opens at 10:00.", "On Sunday the library opens at 12:00."]
KINDS = ("ChatOllama", "ChatAegis", "ChatOpenAI")


@pytest.fixture(scope="module")
def ollama():
    with short_directory() as home, EmbeddedOllama(home=home) as server:
        yield server.base_url


@pytest.fixture(scope="module")
def llama():
    with llama_server.running() as base_url:
        yield base_url


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def on_llama(base_url, tokens, **told):
    return ChatOpenAI(
        model=llama_server.MODEL, base_url=base_url, api_key="none", max_completion_tokens=tokens, max_retries=0, **told
    )


@pytest.fixture
async def make(kind, ollama, llama):
    """Makes the model of a node; a node of a real application would hold one line of this."""
    made = []

    def model(tokens=120, **options):
        told = {"temperature": 0, **options}
        if kind == "ChatOllama":
            each = ChatOllama(model="smollm2:135m", base_url=ollama, num_predict=tokens, **told)
        elif kind == "ChatAegis":
            each = ChatAegis("smollm2:135m", base_url=ollama, num_predict=tokens, **told)
        else:
            each = on_llama(llama, tokens, **told)
        made.append(each)
        return each

    yield model
    await closed(*made)


@pytest.fixture
async def cache(redis_url, minilm, kind):
    """The LLM cache of LangChain, in a namespace of its own, with one model, as ChatOllama names none."""
    forget_warnings()
    async with AegisSemanticCache(
        redis_url, minilm, namespace=f"g{uuid.uuid4().hex[:8]}", op_budget_s=10, embed_budget_s=30,
        allow_unnamed_models=kind == "ChatOllama",
    ) as made:  # fmt: skip
        set_llm_cache(made)
        yield made
        set_llm_cache(None)


async def retrieve(question):
    return [Document(text, metadata={"source": "hours.md"}) for text in HOURS]


async def ask(graph, question):
    """Return the answer, and from which tier of the cache it came."""
    answer = (await graph.ainvoke({"question": question}))["answer"]
    assert await asyncio.to_thread(the_writer.drain, timeout_s=10)
    return answer.text, (was_cached(answer) or {}).get("tier")


async def tier(graph, question):
    return (await ask(graph, question))[1]


@pytest.mark.parametrize("wrapped", [False, True])
async def test_the_contract(kind, make, cache, wrapped):
    def graph_of(find=retrieve, **options):
        model = make(**options)
        return rag_graph.build_graph(BatchingChatModel(model) if wrapped else model, find)

    graph = graph_of()
    first, fresh = await ask(graph, SATURDAY)
    assert first.strip()
    assert fresh is None
    assert await ask(graph, SATURDAY) == (first, "exact")  # a repeat
    assert await ask(graph, SATURDAY_TOO) == (first, "semantic")  # in other words
    assert await tier(graph, SUNDAY) is None  # another question

    async def another_document(question):
        return [*await retrieve(question), Document("On Saturday the library is closed in May.")]

    assert await tier(graph_of(another_document), SATURDAY) is None  # other documents
    with aegis_scope(tenant="acme"):
        assert await tier(graph, SATURDAY) is None  # another tenant
        assert await tier(graph, SATURDAY) == "exact"
        assert await cache.ainvalidate(tenant="acme") == 1
        assert await tier(graph, SATURDAY) is None  # what was invalidated
    if kind != "ChatOllama":  # whose key says neither, so that the cache has to be told that there is one model
        assert await tier(graph_of(seed=7), SATURDAY) is None  # another option


async def test_a_hit_streams_as_an_answer_does(make, cache):
    graph = rag_graph.build_graph(make(), retrieve)

    async def streamed():
        parts = graph.astream({"question": SATURDAY}, stream_mode="messages")
        chunks = [message async for message, _ in parts]
        assert await asyncio.to_thread(the_writer.drain, timeout_s=10)
        return "".join(chunk.text for chunk in chunks), chunks

    fresh, chunks = await streamed()
    assert len([c for c in chunks if isinstance(c, AIMessageChunk) and c.text]) > 2
    again, hit = await streamed()
    assert again == fresh
    assert any(was_cached(chunk) for chunk in hit)


async def test_an_answer_that_is_cut_is_not_kept(make, cache):
    graph = rag_graph.build_graph(make(tokens=3), retrieve)
    assert [await tier(graph, SATURDAY) for _ in range(2)] == [None, None]


async def test_without_being_told_a_model_that_names_nothing_is_never_cached(redis_url, minilm, ollama, caplog):
    forget_warnings()
    model = ChatOllama(model="smollm2:135m", base_url=ollama, num_predict=60, temperature=0)
    async with AegisSemanticCache(redis_url, minilm, namespace=f"g{uuid.uuid4().hex[:8]}", op_budget_s=10) as cache:
        set_llm_cache(cache)
        try:
            graph = rag_graph.build_graph(model, retrieve)
            assert [await tier(graph, SATURDAY) for _ in range(2)] == [None, None]
        finally:
            set_llm_cache(None)
    assert "unnamed_model" in caplog.text
    await closed(model)


async def test_llama_cpp_is_bounded_by_its_own_slots(llama):
    served = await asyncio.to_thread(ask_server, llama)
    assert (served.engine, served.slots, served.models[0].name) == ("llama.cpp", llama_server.SLOTS, llama_server.MODEL)
    assert served.models[0].window == 2048
    inner = on_llama(llama, 8, temperature=0)
    model = BatchingChatModel(inner)
    await model.abatch([f"Count to {i}." for i in range(2)])
    await asyncio.to_thread(wait_until, lambda: model.admission.max_concurrency == llama_server.SLOTS)
    answers = await model.abatch([f"Say the number {i}." for i in range(8)])
    assert len(answers) == 8
    await closed(inner)
