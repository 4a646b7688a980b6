"""A hit of any LangChain cache looks like an answer of the model, and streams are kept and given back as streams."""

import asyncio
import gc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import RunnableLambda
from langgraph.graph import START, MessagesState, StateGraph

from langchain_aegis import ChatAegis
from langchain_aegis.errors import AegisStreamError
from langchain_aegis.notices import forget_warnings
from langchain_aegis.replays import as_chunks, complete_usage, freshen
from langchain_aegis.scope import who
from langchain_aegis.testing import ScriptedModel, ScriptedOllama

QUESTION = "Tell me about the whales of the northern sea"
MODELS = [ScriptedModel(name="m"), ScriptedModel(name="thinker", thinking=True)]


class Spy(InMemoryCache):
    """Counts, and notes whose call it saw."""

    def __init__(self):
        super().__init__()
        self.lookups, self.updates, self.whose = [], [], []

    def lookup(self, prompt, llm_string):
        self.lookups.append((prompt, llm_string))
        self.whose.append(who("tenant_id", "user_id"))
        return super().lookup(prompt, llm_string)

    def update(self, prompt, llm_string, return_val):
        self.updates.append((prompt, llm_string))
        super().update(prompt, llm_string, return_val)

    async def alookup(self, prompt, llm_string):
        return self.lookup(prompt, llm_string)

    async def aupdate(self, prompt, llm_string, return_val):
        self.update(prompt, llm_string, return_val)


class Broken(InMemoryCache):
    def lookup(self, prompt, llm_string):
        raise OSError("redis is gone")

    def update(self, prompt, llm_string, return_val):
        raise OSError("redis is gone")


@pytest.fixture(scope="module")
def shared():
    with ScriptedOllama(MODELS) as server:
        yield server


@pytest.fixture
def server(shared):
    shared.heal()
    shared.forget()
    forget_warnings()
    return shared


@pytest.fixture
def cache():
    return Spy()


@pytest.fixture
def model(server, cache):
    return ChatAegis("m", base_url=server.base_url, temperature=0, cache=cache)


@pytest.fixture(params=["sync", "async"])
def way(request):
    return request.param


def ask(model, way, prompt=QUESTION, config=None, **kwargs):
    return (
        model.invoke(prompt, config, **kwargs)
        if way == "sync"
        else asyncio.run(model.ainvoke(prompt, config, **kwargs))
    )


def stream(model, way, prompt=QUESTION, config=None, **kwargs):
    if way == "sync":
        return list(model.stream(prompt, config, **kwargs))

    async def run():
        return [chunk async for chunk in model.astream(prompt, config, **kwargs)]

    return asyncio.run(run())


def joined(chunks):
    return "".join(chunk.text for chunk in chunks)


def check_replay(chunks, answer):
    """Several pieces, one id, complete usage, an end."""
    assert joined(chunks) == answer.text
    assert len(chunks) > 3
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].chunk_position == "last"
    usage = chunks[-1].usage_metadata
    assert usage["input_tokens"] == answer.usage_metadata["input_tokens"]
    assert chunks[-1].response_metadata["done_reason"] == "stop"


# -- streams and the cache --


def test_streams_and_invokes_share_one_entry(server, cache, model, way):
    """Cold stream, warm stream, invoke: one call of the model, one entry."""
    cold = stream(model, way)
    warm = stream(model, way)
    answer = ask(model, way)
    assert server.routes["/api/chat"] == 1
    assert joined(cold) == answer.text
    check_replay(warm, answer)
    assert warm[0].id != cold[0].id
    assert len(set(cache.lookups)) == len(set(cache.updates)) == len(cache.updates) == 1


def test_an_invoke_warms_a_stream(server, model, way):
    """The other way round."""
    answer = ask(model, way)
    chunks = stream(model, way)
    check_replay(chunks, answer)
    assert chunks[0].id != answer.id
    assert server.routes["/api/chat"] == 1


def test_sync_and_async_share_entries(server, model):
    """They look up the same key."""
    assert joined(stream(model, "sync")) == joined(stream(model, "async")) == ask(model, "async").text
    assert server.routes["/api/chat"] == 1


def test_the_global_cache_is_used_too(server, cache, way):
    """`set_llm_cache`, and `cache=False` against it."""
    set_llm_cache(cache)
    try:
        model = ChatAegis("m", base_url=server.base_url, temperature=0)
        stream(model, way)
        stream(model, way)
        assert server.routes["/api/chat"] == 1
        stream(model.model_copy(update={"cache": False}), way)
        assert server.routes["/api/chat"] == 2
        assert len(cache.lookups) == 2
    finally:
        set_llm_cache(None)


def test_an_abandoned_stream_is_not_stored(server, cache, model, way):
    """Nobody knows how it would have ended."""
    if way == "sync":
        chunks = model.stream(QUESTION)
        next(chunks)
        chunks.close()
    else:

        async def some():
            async for _ in model.astream(QUESTION):
                break
            gc.collect()

        asyncio.run(some())
    assert cache.updates == []


@pytest.mark.parametrize("fault", ["cut", "error", "no_done", "malformed"])
def test_a_broken_stream_is_not_stored(server, cache, model, fault, way):
    """Half an answer is none."""
    server.fail(fault, after=3)
    with pytest.raises(AegisStreamError):
        stream(model, way)
    assert cache.updates == []
    assert joined(stream(model, way)) == ask(model, way).text


def test_a_broken_cache_does_not_break_a_stream(server, caplog, way):
    """It is a miss, said once."""
    model = ChatAegis("m", base_url=server.base_url, temperature=0, cache=Broken())
    assert joined(stream(model, way)) == joined(stream(model, way))
    assert server.routes["/api/chat"] == 2
    assert len([r for r in caplog.records if "stream_cache_failed" in r.getMessage()]) == 1


def test_streams_of_different_options_are_kept_apart(server, model, way):
    """The key is that of an invoke."""
    stream(model, way)
    stream(model, way, seed=7)
    stream(model, way, stop=["sea"])
    assert server.routes["/api/chat"] == 3


def test_what_the_model_thought_comes_back(server, cache, way):
    """Reasoning is part of the answer."""
    model = ChatAegis("thinker", base_url=server.base_url, temperature=0, reasoning=True, cache=cache)
    found = []
    for _ in range(2):
        whole = None
        for chunk in stream(model, way):
            whole = chunk if whole is None else whole + chunk
        found.append((whole.text, whole.additional_kwargs))
    assert found[0] == found[1]
    assert found[0][1]["reasoning_content"]


def test_the_newest_content_format_is_kept(server, cache, way):
    """`output_version="v1"` gives blocks, cold and warm, streamed and not."""
    model = ChatAegis("m", base_url=server.base_url, temperature=0, cache=cache, output_version="v1")
    cold, warm, answer = stream(model, way), stream(model, way), ask(model, way)
    assert server.routes["/api/chat"] == 1
    assert joined(cold) == joined(warm) == answer.text
    assert answer.content[0]["type"] == "text"
    whole = warm[0]
    for chunk in warm[1:]:
        whole += chunk
    assert [block["type"] for block in whole.content] == ["text"]


def test_an_answer_stored_as_blocks_comes_back_as_text(server, cache, way):
    """A graph read through v3 events stores blocks; an invoke, or a stream, gives what it gives without a cache."""
    model = ChatAegis("thinker", base_url=server.base_url, temperature=0, reasoning=True, cache=cache)
    graph_of(model).stream_events({"messages": []}, version="v3").output  # noqa: B018 (consumes it)
    stored = cache._cache[cache.updates[0]][0].message
    assert isinstance(stored.content, list)
    hit = ask(model, way, [HumanMessage(QUESTION)])
    fresh = ask(model.model_copy(update={"cache": False}), way, [HumanMessage(QUESTION)])
    assert (hit.content, hit.additional_kwargs) == (fresh.content, fresh.additional_kwargs)
    assert set(hit.response_metadata) == set(fresh.response_metadata)
    chunks = stream(model, way, [HumanMessage(QUESTION)])
    assert all(isinstance(chunk.content, str) for chunk in chunks)
    assert joined(chunks) == fresh.content


# -- whose call it is --


def test_the_cache_sees_the_config_of_a_direct_call(cache, model, way):
    """LangChain hides it; two tenants would share an answer."""
    config = {"configurable": {"tenant_id": "acme", "user_id": "u1"}}
    ask(model, way, config=config)
    stream(model, way, config=config)
    assert set(cache.whose) == {("acme", "u1")}
    ask(model, way)
    stream(model, way)
    assert cache.whose[2:] == [(None, None)] * 2


def test_a_stream_does_not_show_its_config_to_what_runs_between_its_chunks(cache, model):
    """Another call made by the consumer is another tenant's."""
    for _ in model.stream(QUESTION, {"configurable": {"tenant_id": "acme"}}):
        assert who("tenant_id", None) == (None, None)
    ask(model, "sync", "something else")
    assert cache.whose == [("acme", None), (None, None)]


def test_events_and_batches_show_their_config_too(cache, model):
    """`stream_events` v3 on the model itself, sync and async, v2, and batch."""
    config = {"configurable": {"tenant_id": "acme"}}
    str(model.stream_events(QUESTION, config, version="v3").text)

    async def run():
        v3 = await model.astream_events(QUESTION, config, version="v3")
        assert "".join([str(delta) async for delta in v3.text])
        assert [e async for e in model.astream_events(QUESTION, config, version="v2")]

    asyncio.run(run())
    model.batch([QUESTION] * 2, config)
    assert len(cache.whose) >= 5
    assert set(cache.whose) == {("acme", None)}


# -- hits of an invoke --


def graph_of(model, nodes=1):
    builder = StateGraph(MessagesState)
    for number in range(nodes):
        builder.add_node(f"n{number}", lambda state: {"messages": [model.invoke([HumanMessage(QUESTION)])]})
        builder.add_edge(f"n{number - 1}" if number else START, f"n{number}")
    return builder.compile()


def test_a_hit_has_an_id_of_its_own(cache, model, way):
    """With the stored one, a graph's state would replace the earlier message."""
    ids = {ask(model, way).id for _ in range(3)}
    assert len(ids) == 3
    state = graph_of(model, nodes=2).invoke({"messages": [HumanMessage("hello")]})
    assert len(state["messages"]) == 3
    assert len(cache.updates) == 1


def test_a_hit_shares_nothing_with_the_cache(model, way):
    """Whatever a caller does to its message, the next one gets the answer that was stored."""
    first = ask(model, way)
    content, metadata = first.content, dict(first.response_metadata)
    hit = ask(model, way)
    hit.response_metadata["poison"] = hit.additional_kwargs["poison"] = True
    hit.content += " poison"
    again = ask(model, way)
    assert (again.content, again.additional_kwargs) == (content, {})
    assert again.response_metadata == metadata


def test_a_hit_shares_nothing_below_the_surface_either():
    """Nested values, fields that only the stored message has, and what is no plain data."""

    def made():
        return AIMessage(
            content=[{"type": "text", "text": "hi", "annotations": [{"a": 1}]}],
            id="run-1",
            additional_kwargs={"deep": {"list": [{"a": 1}]}},
            response_metadata={"tags": {"x"}, "pair": ([1],), "logprobs": [{"token": "hi", "top": [1]}]},
            tool_calls=[{"name": "f", "args": {"where": ["a"]}, "id": "1"}],
            usage_metadata={
                "input_tokens": 1,
                "output_tokens": 2,
                "total_tokens": 3,
                "input_token_details": {"audio": 1},
            },
            own={"field": [1]},
        )

    stored = ChatGeneration(message=made())
    (hit,) = freshen([stored], "run-2", "v1")
    assert hit == made().model_copy(update={"id": "run-2"})
    assert hit.model_extra == {"own": {"field": [1]}}
    hit.content[0]["annotations"][0]["a"] = 2
    hit.additional_kwargs["deep"]["list"][0]["a"] = 2
    hit.response_metadata["tags"].add("y")
    hit.response_metadata["pair"][0].append(2)
    hit.response_metadata["logprobs"][0]["top"].append(2)
    hit.tool_calls[0]["args"]["where"].append("b")
    hit.usage_metadata["input_token_details"]["audio"] = 2
    hit.own["field"].append(2)
    assert stored.message == made()


def test_a_hit_without_usage_gets_complete_usage(server, cache, way):
    """Consumers of events fail otherwise."""
    model = ChatAegis("m", base_url=server.base_url, temperature=0, cache=cache)
    ask(model, way)
    key = cache.updates[0]
    for stored in (ChatGeneration(message=AIMessage("bare answer")), Generation(text="bare answer")):
        cache._cache[key] = [stored]
        hit = ask(model, way)
        assert hit.text == "bare answer"
        assert complete_usage({}).items() <= hit.usage_metadata.items()
        assert joined(stream(model, way)) == "bare answer"
        events = graph_of(model).stream_events({"messages": []}, version="v3")
        assert events.output["messages"][-1].text == "bare answer"


def test_a_graph_gets_a_hit_as_a_stream(server, model, way):
    """Several chunks, one id, no message twice; and the state keeps every message."""
    graph = graph_of(model)
    answer = ask(model, "sync")

    def messages():
        if way == "sync":
            return [m for m, _ in graph.stream({"messages": []}, stream_mode="messages")]

        async def run():
            return [m async for m, _ in graph.astream({"messages": []}, stream_mode="messages")]

        return asyncio.run(run())

    first, second = messages(), messages()
    assert server.routes["/api/chat"] == 1
    check_replay(first, answer)
    check_replay(second, answer)
    assert first[0].id != second[0].id


def test_events_give_a_hit_as_a_stream(server, model):
    """v2 and v3 through a chain, and a handler of tokens."""
    from langchain_core.callbacks import BaseCallbackHandler

    answer = ask(model, "sync").text
    chain = RunnableLambda(model.invoke)

    async def run():
        events = [e async for e in chain.astream_events(QUESTION, version="v2")]
        return [e["data"]["chunk"].text for e in events if e["event"] == "on_chat_model_stream"]

    tokens = asyncio.run(run())
    assert ("".join(tokens), len(tokens) > 3) == (answer, True)
    v3 = graph_of(model).stream_events({"messages": []}, version="v3")
    deltas = [str(delta) for message in v3.messages for delta in message.text]
    assert ("".join(deltas), len(deltas) > 3) == (answer, True)

    class Tokens(BaseCallbackHandler):
        seen = ""

        def on_llm_new_token(self, token, **kwargs):
            self.seen += token

    handler = Tokens()
    model.invoke(QUESTION, {"callbacks": [handler]})
    assert handler.seen == answer
    assert server.routes["/api/chat"] == 1


def test_core_and_the_stream_do_not_both_look_up(cache, model):
    """An invoke that streams inside consults the cache once."""
    list(graph_of(model).stream({"messages": []}, stream_mode="messages"))
    assert (len(cache.lookups), len(cache.updates)) == (1, 1)


@settings(deadline=None)
@given(st.text(max_size=400))
def test_chunks_put_together_are_the_text(text):
    """Every character, in at most a few dozen pieces."""
    chunks = as_chunks(AIMessage(text))
    assert "".join(chunk.text for chunk in chunks) == text
    assert 1 <= len(chunks) <= 33


def test_a_hit_of_a_tool_call_is_complete(server, cache, way):
    """Name and arguments, streamed too."""
    bound = ChatAegis("m", base_url=server.base_url, temperature=0, cache=cache).bind_tools(
        [{"type": "function", "function": {"name": "f", "description": "whales", "parameters": {
            "type": "object", "properties": {"sea": {"type": "string"}}, "required": ["sea"]}}}]
    )  # fmt: skip
    cold = ask(bound, way)
    whole = None
    for chunk in stream(bound, way):
        whole = chunk if whole is None else whole + chunk
    assert [(c["name"], c["args"]) for c in whole.tool_calls] == [(c["name"], c["args"]) for c in cold.tool_calls]
    assert whole.tool_calls
    assert server.routes["/api/chat"] == 1
