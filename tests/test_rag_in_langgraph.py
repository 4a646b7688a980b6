"""The example's RAG graph with ChatAegis and the cache: hits that look like answers, and never somebody else's."""

import asyncio
import importlib.util
import logging
import uuid
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.documents import Document
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_ollama import ChatOllama
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.runtime import Runtime

from langchain_aegis import AegisSemanticCache, ChatAegis, aegis_scope, aegis_sources, was_cached
from langchain_aegis.identity import EXECUTION_OPTIONS
from langchain_aegis.notices import forget_warnings
from langchain_aegis.options import MODEL_OPTIONS
from langchain_aegis.testing import ScriptedModel, ScriptedOllama
from langchain_aegis.writes import the_writer

_spec = importlib.util.spec_from_file_location("rag_graph", Path(__file__).parents[1] / "examples" / "rag_graph.py")
rag_graph = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(rag_graph)

SATURDAY, SATURDAY_TOO = "When does the library open on Saturday?", "At what time does the library open on Saturday?"
SUNDAY = "When does the library open on Sunday?"
LIMIT, LIMIT_TOO = "How do I increase the loan limit of my account?", "How can I increase the loan limit of my account?"
PASSAGES = {
    "library open": ["On Saturday the library opens at 10:00.", "On Sunday the library opens at 12:00."],
    "loan limit": ["To increase the loan limit, write a letter.", "To decrease the loan limit, see Settings."],
}
SOURCES = {"library open": "hours.md", "loan limit": "limits.md"}
MODEL = "qwen3:8b"


async def retrieve(question):
    """The same passages for questions about the same thing, as KNN over a small collection gives."""
    topic = next(topic for topic in PASSAGES if topic in question)
    return [Document(text, metadata={"source": SOURCES[topic]}) for text in PASSAGES[topic]]


@pytest.fixture(scope="module")
def running():
    with ScriptedOllama([ScriptedModel(name=MODEL, thinking=True), "llama3.2:8b"]) as server:
        yield server


@pytest.fixture
def server(running):
    running.heal()
    running.forget()
    forget_warnings()
    return running


@pytest.fixture
async def cache(redis_url, minilm):
    """The LLM cache of LangChain, in a namespace of its own; slow machines shall not make hits misses."""
    async with AegisSemanticCache(
        redis_url, minilm, namespace=f"g{uuid.uuid4().hex[:8]}", op_budget_s=10, embed_budget_s=30
    ) as made:
        set_llm_cache(made)
        yield made
        set_llm_cache(None)


@pytest.fixture
def model(server):
    """Makes the chat model; a node of a real application would hold one line of this."""
    return lambda name=MODEL, **options: ChatAegis(name, base_url=server.base_url, **{"temperature": 0, **options})


async def ask(graph, question, config=None, **more):
    return (await graph.ainvoke({"question": question}, config, **more))["answer"]


# -- one cache, one graph


async def test_a_question_asked_twice_is_answered_once_by_the_model(server, cache, model):
    graph = rag_graph.build_graph(model(), retrieve)
    first, second = await ask(graph, SATURDAY), await ask(graph, SATURDAY)
    assert len(server.chats) == 1
    assert was_cached(first) is None
    assert was_cached(second)["tier"] == "exact"
    assert second.text == first.text
    assert second.id != first.id
    assert second.usage_metadata["total_tokens"] == first.usage_metadata["total_tokens"]


async def test_a_paraphrase_with_the_same_context_is_a_hit_and_a_trap_is_not(server, cache, model):
    graph = rag_graph.build_graph(model(), retrieve)
    first = await ask(graph, SATURDAY)
    same, trap = await ask(graph, SATURDAY_TOO), await ask(graph, SUNDAY)
    assert was_cached(same)["tier"] == "semantic"
    assert same.text == first.text
    assert was_cached(trap) is None
    assert len(server.chats) == 2


async def test_a_changed_document_is_another_context(server, cache, model):
    before = rag_graph.build_graph(model(), retrieve)

    async def retrieve_again(question):
        return [*await retrieve(question), Document("From May on the library opens at 9:00 on Saturday.")]

    await ask(before, SATURDAY)
    after = rag_graph.build_graph(model(), retrieve_again)
    assert was_cached(await ask(after, SATURDAY)) is None
    assert was_cached(await ask(after, SATURDAY_TOO))["tier"] == "semantic"  # of the new answer
    assert len(server.chats) == 2


async def test_a_model_that_fails_fails_the_graph_and_leaves_nothing_behind(server, cache, model):
    graph = rag_graph.build_graph(model(max_retries=0), retrieve)
    server.fail("no_done")
    with pytest.raises(Exception, match="done"):
        await ask(graph, SATURDAY)
    assert was_cached(await ask(graph, SATURDAY)) is None
    assert was_cached(await ask(graph, SATURDAY))


# -- streams


async def streamed(graph, question, **more):
    """Return the message chunks that a user interface gets."""
    parts = graph.astream({"question": question}, stream_mode="messages", **more)
    return [message async for message, _ in parts]


async def test_a_hit_streams_like_an_answer(server, cache, model):
    graph = rag_graph.build_graph(model(), retrieve)
    fresh, hit = await streamed(graph, SATURDAY), await streamed(graph, SATURDAY)
    assert len(server.chats) == 1
    for chunks in (fresh, hit):
        assert all(isinstance(chunk, AIMessageChunk) for chunk in chunks)  # no whole message after its pieces
        assert len([chunk for chunk in chunks if chunk.text]) > 2
        assert len({chunk.id for chunk in chunks}) == 1
        assert [chunk.chunk_position for chunk in chunks].count("last") == 1
    assert "".join(c.text for c in hit) == "".join(c.text for c in fresh)
    assert {c.id for c in hit}.isdisjoint(c.id for c in fresh)
    whole = sum(hit[1:], hit[0])
    assert was_cached(whole)["tier"] == "exact"
    before = sum(fresh[1:], fresh[0]).usage_metadata
    assert {name: whole.usage_metadata[name] for name in before} == before


async def test_the_streamed_id_is_that_of_the_answer_in_the_state(server, cache, model):
    graph = rag_graph.build_graph(model(), retrieve)
    for expected_chats in (1, 1):
        ids, answer = set(), None
        async for mode, part in graph.astream({"question": SATURDAY}, stream_mode=["messages", "values"]):
            if mode == "messages":
                ids.add(part[0].id)
            else:
                answer = part.get("answer")
        assert ids == {answer.id}
        assert len(server.chats) == expected_chats


async def test_what_was_streamed_is_a_hit_for_who_does_not_stream_and_the_reverse(server, cache, model):
    graph = rag_graph.build_graph(model(), retrieve)
    chunks = await streamed(graph, SATURDAY)
    assert (await ask(graph, SATURDAY)).text == "".join(chunk.text for chunk in chunks)
    answer = await ask(graph, LIMIT)
    assert "".join(chunk.text for chunk in await streamed(graph, LIMIT)) == answer.text
    assert len(server.chats) == 2


# -- a state that collects messages


class Chat(TypedDict):
    messages: Annotated[list[Any], add_messages]


def chat_graph(model, *, awaited):
    def prompt(state):
        return f"You work in a library.\n\nQuestion: {state['messages'][-1].text}\n\nAnswer:"

    async def areply(state: Chat) -> Chat:
        return {"messages": [await model.ainvoke(prompt(state))]}

    def reply(state: Chat) -> Chat:
        return {"messages": [model.invoke(prompt(state))]}

    graph = StateGraph(Chat)
    graph.add_node("reply", areply if awaited else reply)
    graph.add_edge(START, "reply")
    graph.add_edge("reply", END)
    return graph.compile(checkpointer=InMemorySaver())


@pytest.mark.parametrize("awaited", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("mode", ["values", "messages"])
async def test_a_conversation_keeps_every_message_over_two_hits(server, cache, model, awaited, mode):
    graph = chat_graph(model(), awaited=awaited)
    thread = {"configurable": {"thread_id": "1"}}
    for question in (SATURDAY, SATURDAY, SATURDAY_TOO):
        turn = {"messages": [HumanMessage(question)]}
        if awaited:
            parts = [part async for part in graph.astream(turn, thread, stream_mode=mode)]
        else:
            parts = list(graph.stream(turn, thread, stream_mode=mode))
        if mode == "messages":
            assert all(isinstance(message, AIMessageChunk) for message, _ in parts)
            assert len({message.id for message, _ in parts}) == 1
    kept = graph.get_state(thread).values["messages"]
    answers = [message for message in kept if isinstance(message, AIMessage)]
    assert [message.type for message in kept] == ["human", "ai"] * 3
    assert len({message.id for message in kept}) == 6
    assert len({message.text for message in answers}) == 1
    assert [(was_cached(a) or {}).get("tier") for a in answers] == [None, "exact", "semantic"]
    assert len(server.chats) == 1


# -- models that must not share


async def test_plain_chat_ollama_is_declined_with_one_warning_and_still_answers(server, cache, model, caplog):
    plain = ChatOllama(model=MODEL, base_url=server.base_url, temperature=0)
    graph = rag_graph.build_graph(plain, retrieve)
    with caplog.at_level(logging.WARNING, "langchain_aegis"):
        answers = [await ask(graph, question) for question in (SATURDAY, SATURDAY, SATURDAY_TOO)]
    await plain._async_client.close()
    assert all(was_cached(answer) is None and answer.text for answer in answers)
    assert len(server.chats) == 3
    warnings = [record.getMessage() for record in caplog.records if record.name == "langchain_aegis"]
    assert len(warnings) == 1
    assert "ChatAegis" in warnings[0]
    ours = rag_graph.build_graph(model(), retrieve)  # not answered by what ChatOllama was told
    assert [was_cached(await ask(ours, SATURDAY)) is None for _ in range(2)] == [True, False]


# Every option that changes an answer, with a value that the models of these tests do not have otherwise.
CHANGES = {
    "model": "llama3.2:8b",
    "reasoning": True,
    "format": {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]},
    "stop": ["never said"],
    "logprobs": True,
    "temperature": 0.3,
    "seed": 7,
    "num_ctx": 2048,
    "num_predict": 500,
    "num_keep": 8,
    "top_k": 3,
    "top_p": 0.5,
    "min_p": 0.2,
    "typical_p": 0.5,
    "tfs_z": 0.5,
    "repeat_last_n": 3,
    "repeat_penalty": 1.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "penalize_newline": True,
    "mirostat": 1,
    "mirostat_eta": 0.3,
    "mirostat_tau": 2.0,
}


def test_no_option_that_changes_answers_is_missing_here():
    assert set(MODEL_OPTIONS) - EXECUTION_OPTIONS <= set(CHANGES)


@pytest.mark.parametrize("given", ["to the model", "with the call"])
@pytest.mark.parametrize("option", CHANGES)
async def test_models_that_differ_in_one_option_never_share_an_answer(server, cache, model, option, given):
    changed = {option: CHANGES[option]}
    if given == "with the call":
        other_model = model().bind(**changed)
    else:
        other_model = model(changed["model"]) if option == "model" else model(**changed)
    one, other = (rag_graph.build_graph(m, retrieve) for m in (model(), other_model))
    for question in (SATURDAY, LIMIT):
        assert was_cached(await ask(one, question)) is None
    assert was_cached(await ask(other, SATURDAY)) is None  # no exact hit
    assert was_cached(await ask(other, LIMIT_TOO)) is None  # no semantic hit
    assert len(server.chats) == 4
    # Each has its own entries: what was a miss above is a hit for the model that answered it.
    assert was_cached(await ask(other, SATURDAY))["tier"] == "exact"
    assert was_cached(await ask(one, SATURDAY))["tier"] == "exact"
    assert was_cached(await ask(one, LIMIT_TOO))["tier"] == "semantic"
    assert len(server.chats) == 4


@pytest.mark.parametrize(
    "same",
    [{"num_thread": 2}, {"num_gpu": 0}, {"num_batch": 64}, {"keep_alive": "1h"}, {"timeout": 50}, {"max_retries": 0}],
    ids=lambda same: next(iter(same)),
)
async def test_models_that_differ_in_how_fast_they_answer_share_answers(server, cache, model, same):
    await ask(rag_graph.build_graph(model(), retrieve), SATURDAY)
    assert was_cached(await ask(rag_graph.build_graph(model(**same), retrieve), SATURDAY))
    assert len(server.chats) == 1


async def test_the_tag_latest_is_the_same_model_and_another_server_may_have_it(cache):
    answers = []
    for name in ("small", "small:latest"):
        with ScriptedOllama("small") as server:
            graph = rag_graph.build_graph(ChatAegis(name, base_url=server.base_url, temperature=0), retrieve)
            answers.append(await ask(graph, SATURDAY))
            await asyncio.to_thread(the_writer.drain)  # which asks the server what it has
    assert was_cached(answers[1])["tier"] == "exact"


# -- sources and tenants through a graph


async def retrieve_with_sources(question):
    documents = await retrieve(question)
    aegis_sources(*(document.metadata["source"] for document in documents))
    return documents


async def test_answers_that_rest_on_a_changed_document_are_removed_from_outside(server, cache, model):
    graph = rag_graph.build_graph(model(), retrieve_with_sources)

    async def ask_in_scope(question):
        with aegis_scope():
            return was_cached(await ask(graph, question))

    for question in (SATURDAY, LIMIT):
        assert await ask_in_scope(question) is None
        assert (await ask_in_scope(question))["tier"] == "exact"
    assert await cache.ainvalidate(sources=["hours.md"]) == 1
    assert (await ask_in_scope(LIMIT))["tier"] == "exact"  # rests on another document
    assert await ask_in_scope(SATURDAY_TOO) is None
    assert await ask_in_scope(SATURDAY) is not None  # semantic, of the new answer
    assert cache.invalidate(sources=["nobody-knows.md"]) == 0
    assert len(server.chats) == 3


async def test_an_invalidation_while_the_model_answers_wins_over_the_answer(server, cache, model):
    graph, removed = rag_graph.build_graph(model(), retrieve_with_sources), []

    def the_document_changes(_):
        if not removed:
            removed.append(cache.invalidate(sources=["hours.md"]))
        return False  # the request goes on as if nothing had happened

    server.fail(503, when=the_document_changes)  # called once the request has reached the server
    hits = []
    for _ in range(3):
        with aegis_scope():
            hits.append(was_cached(await ask(graph, SATURDAY)) is not None)
    assert removed == [0]  # nothing was stored yet
    assert hits == [False, False, True]


async def test_a_tenant_in_configurable_keeps_answers_apart(server, cache, model):
    graph = rag_graph.build_graph(model(), retrieve)

    async def hit(tenant, question=SATURDAY):
        return was_cached(await ask(graph, question, {"configurable": {"tenant_id": tenant}}))

    assert await hit("acme") is None
    assert await hit("globex") is None
    assert await hit("globex", SATURDAY_TOO) is not None
    assert (await hit("acme"))["tier"] == "exact"
    assert len(server.chats) == 2
    assert await cache.ainvalidate(tenant="acme") == 1
    assert await hit("acme") is None
    assert (await hit("globex"))["tier"] == "exact"


async def test_a_tenant_in_the_graphs_context_keeps_answers_apart(server, cache, model):
    class Context(TypedDict):
        tenant_id: str

    chat = model()

    async def reply(state: rag_graph.State, runtime: Runtime[Context]) -> rag_graph.State:
        return {"answer": await chat.ainvoke(f"Question: {state['question']}\n\nAnswer:")}

    graph = StateGraph(rag_graph.State, context_schema=Context)
    graph.add_node("reply", reply)
    graph.add_edge(START, "reply")
    compiled = graph.compile()
    answers = [await ask(compiled, SATURDAY, context={"tenant_id": tenant}) for tenant in ("acme", "globex", "acme")]
    assert [was_cached(answer) is None for answer in answers] == [True, True, False]


async def test_a_call_without_a_tenant_gets_nothing_of_tenants_and_gives_nothing(server, cache, model, caplog):
    graph = rag_graph.build_graph(model(), retrieve)
    with aegis_scope(tenant="acme"):
        await ask(graph, SATURDAY)
    with caplog.at_level(logging.WARNING, "langchain_aegis"):
        assert [was_cached(await ask(graph, SATURDAY)) for _ in range(3)] == [None] * 3
    assert [record.getMessage().partition(":")[0] for record in caplog.records].count("no_tenant") == 1
    with aegis_scope(tenant="acme"):
        assert was_cached(await ask(graph, SATURDAY))
