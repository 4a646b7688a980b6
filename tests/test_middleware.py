"""The cache in agents: a repeated question is answered without the model, and nothing else ever is."""

import asyncio
import hashlib
import uuid

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelFallbackMiddleware
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.caches import InMemoryCache
from langchain_core.embeddings import Embeddings
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import BaseModel

from langchain_aegis import (
    AegisConfigError,
    AegisConnectionError,
    AegisSemanticCache,
    BatchingChatModel,
    ChatAegis,
    aegis_scope,
    was_cached,
)
from langchain_aegis.middleware import AegisCacheMiddleware, rests_on_tool_results
from langchain_aegis.notices import forget_warnings
from langchain_aegis.router import AegisRouter
from langchain_aegis.testing import ScriptedOllama

WEATHER = "What is the weather in Paris?"
PLAIN = "Tell me about rivers."


@pytest.fixture(autouse=True)
def fresh():
    """Neither a global cache nor a warning of another test."""
    forget_warnings()
    yield
    set_llm_cache(None)


@pytest.fixture(scope="module")
def _server():
    with ScriptedOllama(["chat:8b", "other:3b"]) as server:
        yield server


@pytest.fixture
def server(_server):
    _server.heal()
    _server.forget()
    return _server


@pytest.fixture
def model(server):
    return ChatAegis("chat:8b", base_url=server.base_url, temperature=0)


@pytest.fixture
def make(redis_url):
    """Makes caches of one namespace of this test's own."""
    namespace, made = f"mw{uuid.uuid4().hex[:8]}", []

    def one(**arguments):
        given = {"embeddings": Apart(), "namespace": namespace, "op_budget_s": 5, **arguments}
        made.append(AegisSemanticCache(redis_url, **given))
        return made[-1]

    yield one
    for cache in made:
        cache.close()


@pytest.fixture(params=["sync", "async"])
def ask(request):
    """Runs an agent either way."""

    def run(agent, text, config=None, **kwargs):
        given = {"messages": [HumanMessage(text)]}
        if request.param == "sync":
            return agent.invoke(given, config, **kwargs)
        return asyncio.run(agent.ainvoke(given, config, **kwargs))

    return run


runs = []


@tool
def get_weather(city: str) -> str:
    """Tell the weather in a city."""
    runs.append(city)
    return f"sunny in {city}"


@tool
def get_time(city: str) -> str:
    """Tell the time in a city."""
    return f"noon in {city}"


class Apart(Embeddings):
    """No two texts are near each other."""

    model = "apart"

    def embed_query(self, text):
        return [byte - 127.5 for byte in hashlib.sha512(text.encode()).digest()]

    def embed_documents(self, texts):
        return [self.embed_query(text) for text in texts]


class City(BaseModel):
    """A city."""

    name: str


class Counting(BaseChatModel):
    """Counts on itself, as many models of tests do, and names itself."""

    model: str = "counting"
    asked: int = 0

    @property
    def _llm_type(self):
        return "counting"

    @property
    def _identifying_params(self):
        return {"model": self.model}

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        self.asked += 1
        answer = AIMessage(f"answer {self.asked}", response_metadata={"finish_reason": "stop"})
        return ChatResult(generations=[ChatGeneration(message=answer)])


def test_a_repeated_question_is_answered_without_the_model(server, model, make, ask):
    agent = create_agent(model, middleware=[AegisCacheMiddleware(make())], system_prompt="Be brief.")
    first, second = (ask(agent, PLAIN)["messages"][-1] for _ in range(2))
    assert len(server.chats) == 1
    assert second.text == first.text
    assert was_cached(first) is None
    assert was_cached(second)["tier"] == "exact"
    assert first.id != second.id


def test_what_sync_calls_kept_answers_async_ones(server, model, make):
    agent = create_agent(model, middleware=[AegisCacheMiddleware(make())])
    agent.invoke({"messages": [HumanMessage(PLAIN)]})
    state = asyncio.run(agent.ainvoke({"messages": [HumanMessage(PLAIN)]}))
    assert was_cached(state["messages"][-1])
    assert len(server.chats) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"system_prompt": "Be long."},
        {"tools": [get_weather]},
        {"tools": [get_time]},
        {"response_format": ToolStrategy(City)},
        {"response_format": ProviderStrategy(City)},
        {"model": "other:3b"},
        {"temperature": 0.5},
    ],
    ids=["system", "tool", "another tool", "tool strategy", "provider strategy", "model", "temperature"],
)
@pytest.mark.row(49)
def test_everything_that_the_model_sees_is_in_the_key(server, make, change, ask):
    def agent(model="chat:8b", temperature=0, **told):
        chat = ChatAegis(model, base_url=server.base_url, temperature=temperature)
        return create_agent(chat, middleware=[AegisCacheMiddleware(make())], **{"system_prompt": "Be brief.", **told})

    ask(agent(), PLAIN)
    before = len(server.chats)
    try:
        ask(agent(**change), PLAIN)
    finally:
        assert len(server.chats) > before


def test_tenants_and_users_of_the_runtime_context_are_kept_apart(server, model, make):
    class Context(BaseModel):
        tenant: str
        user: str = "u"

    settings = AegisSemanticCache().settings.but(tenant_key="tenant", user_key="user")
    agent = create_agent(model, middleware=[AegisCacheMiddleware(make(settings=settings))], context_schema=Context)
    given = {"messages": [HumanMessage(PLAIN)]}
    for context in (Context(tenant="a"), Context(tenant="b"), Context(tenant="a", user="v")):
        agent.invoke(given, context=context)
        asyncio.run(agent.ainvoke(given, context=context))
    assert len(server.chats) == 3
    with aegis_scope(tenant="c"):
        assert not was_cached(agent.invoke(given, context=Context(tenant="a"))["messages"][-1])
    assert was_cached(agent.invoke(given, context=Context(tenant="a"))["messages"][-1])


def test_another_middleware_s_prompt_is_what_counts(server, model, make):
    """Also one that changes the messages after this middleware has seen them."""

    class Dated(AgentMiddleware):
        day = "Monday"

        def wrap_model_call(self, request, handler):
            return handler(request.override(system_message=SystemMessage(f"It is {self.day}.")))

    dated = Dated()
    agent = create_agent(model, middleware=[AegisCacheMiddleware(make()), dated])
    agent.invoke({"messages": [HumanMessage(PLAIN)]})
    dated.day = "Tuesday"
    assert not was_cached(agent.invoke({"messages": [HumanMessage(PLAIN)]})["messages"][-1])
    assert was_cached(agent.invoke({"messages": [HumanMessage(PLAIN)]})["messages"][-1])


def test_the_answer_of_another_middleware_s_model_is_not_kept_as_the_agent_s(server, make):
    down = ChatAegis("chat:8b", base_url="http://127.0.0.1:9", temperature=0)
    spare = ChatAegis("other:3b", base_url=server.base_url, temperature=0)
    cache = make()
    agent = create_agent(down, middleware=[AegisCacheMiddleware(cache), ModelFallbackMiddleware(spare)])
    for _ in range(2):
        agent.invoke({"messages": [HumanMessage(PLAIN)]})
    back = create_agent(down.model_copy(update={"base_url": server.base_url}), middleware=[AegisCacheMiddleware(cache)])
    answer = back.invoke({"messages": [HumanMessage(PLAIN)]})["messages"][-1]
    assert answer.response_metadata["model"] == "chat:8b"
    assert not was_cached(answer)


# Tools


def test_the_call_of_a_tool_is_kept_and_what_rests_on_its_result_is_not(server, model, make, ask):
    cache = make()
    agent = create_agent(model, [get_weather], middleware=[AegisCacheMiddleware(cache)])
    runs.clear()
    states = [ask(agent, WEATHER)["messages"] for _ in range(2)]
    for state in states:
        assert [m.type for m in state] == ["human", "ai", "tool", "ai"]
    assert len(runs) == 2  # the tool is asked every time
    assert was_cached(states[1][1])["tier"] == "exact"
    assert states[1][1].tool_calls[0]["args"] == states[0][1].tool_calls[0]["args"]
    assert was_cached(states[1][3]) is None
    assert len(server.chats) == 3
    assert cache.stats().stored == 1


def test_not_even_a_global_cache_keeps_what_rests_on_tool_results(server, model, make, ask):
    cache = make()
    set_llm_cache(cache)
    agent = create_agent(model, [get_weather], middleware=[AegisCacheMiddleware(cache)])
    for _ in range(2):
        ask(agent, WEATHER)
    assert len(server.chats) == 3
    assert cache.stats().stored == 1


def test_it_is_kept_if_told_so_and_then_served_to_those_only_who_are_told_so(server, model, make, ask):
    cache = make()
    allowed = create_agent(model, [get_weather], middleware=[AegisCacheMiddleware(cache, allow_tool_results=True)])
    for _ in range(2):
        state = ask(allowed, WEATHER)["messages"]
    assert was_cached(state[3])["tier"] == "exact"
    assert len(server.chats) == 2
    other = create_agent(model, [get_weather], middleware=[AegisCacheMiddleware(cache)])
    assert was_cached(ask(other, WEATHER)["messages"][3]) is None
    assert len(server.chats) == 3


@pytest.mark.parametrize(
    ("messages", "rests"),
    [
        ([HumanMessage("hi"), AIMessage("ho")], False),
        ([HumanMessage("hi"), ToolMessage("x", tool_call_id="1"), AIMessage("ho"), HumanMessage("and?")], True),
        ([AIMessage([{"type": "server_tool_result", "output": "x"}]), HumanMessage("and?")], True),
        ([AIMessage([{"type": "web_search_tool_result", "content": []}]), HumanMessage("and?")], True),
        ([HumanMessage([{"type": "text", "text": "tool_result"}, "tool_result"])], False),
    ],
)
def test_results_are_seen_wherever_they_stand(messages, rests):
    assert rests_on_tool_results(messages) is rests


@pytest.mark.parametrize("strategy", [ToolStrategy, ProviderStrategy])
def test_a_kept_answer_has_its_structured_response(server, model, make, ask, strategy):
    agent = create_agent(model, middleware=[AegisCacheMiddleware(make())], response_format=strategy(City))
    first, second = (ask(agent, "Which city is it?") for _ in range(2))
    assert isinstance(first["structured_response"], City)
    assert second["structured_response"] == first["structured_response"]
    assert len(server.chats) == 1


# One answer, once


def test_an_answer_is_not_kept_twice(server, model, make, redis_url, ask):
    """Neither in the same global cache nor in another one, nor in the model's own."""
    mine, other = make(), InMemoryCache()
    for everywhere, own in ((mine, None), (other, None), (None, InMemoryCache())):
        set_llm_cache(everywhere)
        model.cache = own
        agent = create_agent(model, middleware=[AegisCacheMiddleware(mine)])
        ask(agent, f"{PLAIN} {everywhere} {own}")
        ask(agent, f"{PLAIN} {everywhere} {own}")
        assert not (own or other)._cache
    stats = mine.stats()
    assert (stats.stored, stats.misses, stats.exact_hits) == (3, 3, 3)
    assert len(server.chats) == 3


def test_the_cache_that_was_given_goes_before_any_other(server, model, make):
    everywhere, own, given = (make(namespace=f"mw{uuid.uuid4().hex[:8]}") for _ in range(3))
    set_llm_cache(everywhere)
    model.cache = own
    create_agent(model, middleware=[AegisCacheMiddleware(given)]).invoke({"messages": [HumanMessage(PLAIN)]})
    assert [cache.stats().stored for cache in (everywhere, own, given)] == [0, 0, 1]


def test_by_default_the_cache_is_the_one_that_is_there(server, model, make, monkeypatch, redis_url):
    cache = make()
    set_llm_cache(cache)
    create_agent(model, middleware=[AegisCacheMiddleware()]).invoke({"messages": [HumanMessage(PLAIN)]})
    assert cache.stats().stored == 1
    set_llm_cache(InMemoryCache())
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("AEGIS_NAMESPACE", cache.settings.namespace)
    middleware = AegisCacheMiddleware()
    state = create_agent(model, middleware=[middleware]).invoke({"messages": [HumanMessage(PLAIN)]})
    assert was_cached(state["messages"][-1])
    middleware._own.close()


def test_a_model_that_must_not_be_cached_is_not(server, model, make, ask):
    model.cache = False
    agent = create_agent(model, middleware=[AegisCacheMiddleware(make())])
    for _ in range(2):
        ask(agent, PLAIN)
    assert len(server.chats) == 2


def test_any_model_keeps_its_own_state(make, ask):
    counting = Counting()
    agent = create_agent(counting, middleware=[AegisCacheMiddleware(make())])
    assert [ask(agent, q)["messages"][-1].text for q in ("one", "two", "one")] == ["answer 1", "answer 2", "answer 1"]
    assert counting.asked == 2


@pytest.mark.parametrize("same", [False, True])
def test_admission_stays_in_place(server, model, make, ask, same):
    cache = make()
    set_llm_cache(cache if same else None)
    bounded = BatchingChatModel(model, max_concurrency=1)
    agent = create_agent(bounded, [get_weather], middleware=[AegisCacheMiddleware(cache)])
    for _ in range(2):
        assert [m.type for m in ask(agent, WEATHER)["messages"]] == ["human", "ai", "tool", "ai"]
    assert len(server.chats) == 3
    assert cache.stats().stored == 1
    assert [list(agent.stream({"messages": [HumanMessage(WEATHER)]}, stream_mode="messages"))]
    assert len(server.chats) == 4
    assert cache.stats().stored == 1


@pytest.mark.parametrize(("tools", "asked"), [([], 3), ([get_weather], 9)])
def test_a_router_s_models_have_each_their_own_entries(server, model, make, ask, tools, asked):
    down = ChatAegis("gone:1b", base_url="http://127.0.0.1:9", temperature=0)
    other = ChatAegis("other:3b", base_url=server.base_url, temperature=0)
    router = AegisRouter(
        {"chat": model, "other": other, "gone": down}, default="chat", fallback={"gone": "other"}, recheck_s=0
    )
    agent = create_agent(router, tools, middleware=[AegisCacheMiddleware(make())])
    for _ in range(2):
        for task, name in (("chat", "chat:8b"), ("gone", "other:3b"), ("other", "other:3b")):
            with aegis_scope(task=task):
                state = ask(agent, PLAIN)["messages"]
            assert state[-1].response_metadata["model"] == name
    # The task is part of the key, so not even a fallback shares. With a tool, the call after its result is never kept.
    assert len(server.chats) == asked


# As an answer


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_hit_is_streamed_and_the_state_keeps_all_messages(server, model, make, kind):
    agent = create_agent(model, middleware=[AegisCacheMiddleware(make())], checkpointer=InMemorySaver())

    def stream(thread):
        given, config = {"messages": [HumanMessage(PLAIN)]}, {"configurable": {"thread_id": thread}}
        if kind == "sync":
            return [part for part, _ in agent.stream(given, config, stream_mode="messages")]

        async def collect():
            return [part async for part, _ in agent.astream(given, config, stream_mode="messages")]

        return asyncio.run(collect())

    cold, *warm = (stream(str(i)) for i in range(3))
    assert len(server.chats) == 1
    for parts in warm:
        assert len(parts) > 1
        assert len({p.id for p in parts}) == 1
        assert "".join(p.text for p in parts) == "".join(p.text for p in cold)
    for i in range(3):  # the same conversation goes on twice
        stream(str(i))
    assert len(server.chats) == 2
    for i in range(3):
        messages = agent.get_state({"configurable": {"thread_id": str(i)}}).values["messages"]
        assert [m.type for m in messages] == ["human", "ai"] * 2
        assert len({m.id for m in messages}) == 4


def test_a_dead_cache_costs_nobody_an_answer(server, model, ask):
    cache = AegisSemanticCache("redis://127.0.0.1:9", namespace="gone")
    agent = create_agent(model, [get_weather], middleware=[AegisCacheMiddleware(cache)])
    for _ in range(2):
        assert ask(agent, WEATHER)["messages"][-1].text
    assert len(server.chats) == 4


def test_the_model_s_error_is_the_caller_s(make, ask):
    agent = create_agent(ChatAegis("m", base_url="http://127.0.0.1:9"), middleware=[AegisCacheMiddleware(make())])
    with pytest.raises(AegisConnectionError):
        ask(agent, PLAIN)


def test_a_model_that_does_not_name_itself_is_not_cached(make, ask, caplog):
    nameless = Counting(model="")
    agent = create_agent(nameless, middleware=[AegisCacheMiddleware(make())])
    for _ in range(2):
        ask(agent, PLAIN)
    assert nameless.asked == 2
    assert [r.getMessage().partition(":")[0] for r in caplog.records if r.name == "langchain_aegis"] == [
        "unnamed_model"
    ]


def test_a_scope_turns_it_off_and_refreshes(server, model, make, ask):
    agent = create_agent(model, middleware=[AegisCacheMiddleware(make())])
    for use in ("use", "off", "refresh", "use"):
        with aegis_scope(cache=use):
            last = ask(agent, PLAIN)["messages"][-1]
    assert len(server.chats) == 3
    assert was_cached(last)


def test_a_paraphrase_is_answered_by_meaning(server, model, make, ask):
    class Same(Embeddings):
        model = "same"

        def embed_query(self, text):
            return [1.0, 0.5]

        def embed_documents(self, texts):
            return [[1.0, 0.5] for _ in texts]

    agent = create_agent(model, middleware=[AegisCacheMiddleware(make(embeddings=Same(), min_similarity=0.9))])
    ask(agent, "What is the capital of France?")
    hit = ask(agent, "What's the capital of France?")["messages"][-1]
    assert was_cached(hit)["tier"] == "semantic"


def test_anything_else_than_the_cache_is_refused():
    with pytest.raises(AegisConfigError, match="InMemoryCache"):
        AegisCacheMiddleware(InMemoryCache())
