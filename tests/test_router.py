"""One chat model for several tasks: the right one answers, as itself, and a fallback never in its name."""

import asyncio
import uuid

import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import ModelConnectionError
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_core.tracers._streaming import _StreamingCallbackHandler
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel

from langchain_aegis import AegisConfigError, BatchingChatModel, ChatAegis, aegis_scope
from langchain_aegis.errors import AegisConnectionError, AegisModelNotFoundError, AegisTimeoutError
from langchain_aegis.notices import forget_warnings
from langchain_aegis.router import AegisRouter
from langchain_aegis.testing import ScriptedOllama

MODELS = ("classify:1b", "generate:8b", "spare:3b")


@pytest.fixture(autouse=True)
def fresh():
    """Neither a global cache nor a warning of another test."""
    forget_warnings()
    yield
    set_llm_cache(None)


@pytest.fixture(scope="module")
def _server():
    with ScriptedOllama(MODELS) as server:
        yield server


@pytest.fixture
def server(_server):
    _server.heal()
    _server.forget()
    return _server


@pytest.fixture
def models(server):
    """Two models of one server."""
    return {
        "classify": ChatAegis("classify:1b", base_url=server.base_url, temperature=0),
        "generate": ChatAegis("generate:8b", base_url=server.base_url, temperature=0),
    }


class Fake(BaseChatModel):
    """Says its name in three tokens; raises what `error` holds, after `tokens` of them."""

    says: str
    error: BaseException | None = None
    tokens: int = 0
    asked: int = 0

    @property
    def _llm_type(self):
        return "fake"

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        self.asked += 1
        if self.error is not None:
            raise self.error
        return ChatResult(generations=[ChatGeneration(message=AIMessage(f"I am {self.says}"))])

    def _stream(self, messages, stop=None, run_manager=None, **kwargs):
        self.asked += 1
        for i, word in enumerate(["I ", "am ", self.says]):
            if self.error is not None and i == self.tokens:
                raise self.error
            yield ChatGenerationChunk(message=AIMessageChunk(word))

    async def _agenerate(self, messages, stop=None, run_manager=None, **kwargs):
        return self._generate(messages)

    async def _astream(self, messages, stop=None, run_manager=None, **kwargs):
        for chunk in self._stream(messages):
            yield chunk


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Tokens(BaseCallbackHandler, _StreamingCallbackHandler):
    """Reads tokens, as LangGraph's stream of messages does, and notes what runs there were."""

    def __init__(self):
        self.tokens, self.runs, self.ends, self.errors = [], [], [], []

    def on_chat_model_start(self, serialized, messages, *, run_id, parent_run_id=None, metadata=None, **kwargs):
        self.runs.append((run_id, parent_run_id, (metadata or {}).get("ls_model_name")))

    def on_llm_new_token(self, token, **kwargs):
        self.tokens.append(token)

    def on_llm_end(self, response, *, run_id, **kwargs):
        self.ends.append(run_id)

    def on_llm_error(self, error, *, run_id, **kwargs):
        self.errors.append(run_id)

    def tap_output_iter(self, run_id, output):
        return output

    def tap_output_aiter(self, run_id, output):
        return output


def pair(error=None, *, clock=None, **arguments):
    """A router whose first model fails with `error`, its two models, and its clock."""
    clock = clock or Clock()
    first, second = Fake(says="first", error=error), Fake(says="second")
    router = AegisRouter(
        {"first": first, "second": second}, default="first", fallback=["second"], clock=clock, **arguments
    )
    return router, first, second, clock


async def ways(router, input="hi", config=None):
    """The answer by every way of asking."""
    yield lambda: asyncio.to_thread(lambda: router.invoke(input, config).text)

    async def ainvoke():
        return (await router.ainvoke(input, config)).text

    async def astream():
        return "".join([c.text async for c in router.astream(input, config)])

    async def abatch():
        return (await router.abatch([input], config))[0].text

    async def agenerate():
        return (await router.agenerate([[HumanMessage(input)]])).generations[0][0].text

    yield ainvoke
    yield lambda: asyncio.to_thread(lambda: "".join(c.text for c in router.stream(input, config)))
    yield astream
    yield lambda: asyncio.to_thread(lambda: router.batch([input], config)[0].text)
    yield abatch
    yield lambda: asyncio.to_thread(lambda: router.generate([[HumanMessage(input)]]).generations[0][0].text)
    yield agenerate


# Which model


@pytest.mark.parametrize(("task", "model"), [("generate", "generate:8b"), ("classify", "classify:1b"),
                                             ("unheard of", "classify:1b"), (None, "classify:1b")])  # fmt: skip
async def test_the_task_of_the_scope_chooses_and_unknown_ones_get_the_default(server, models, task, model):
    router = AegisRouter(models, default="classify")
    with aegis_scope(task=task):
        async for ask in ways(router):
            assert await ask()
    assert {body["model"] for body in server.chats} == {model}
    assert len(server.chats) == 8


def test_the_config_chooses_where_no_scope_does(server, models):
    router = AegisRouter(models, default="classify")
    config = {"configurable": {"task": "generate"}}
    router.invoke("hi", config)
    (ChatPromptTemplate.from_template("{q}") | router).invoke({"q": "hi"}, config)
    with aegis_scope(task="classify"):
        router.invoke("hi", config)
    AegisRouter(models, default="classify", task_key="kind").invoke("hi", config)
    AegisRouter(models, default="classify", task_key=None).invoke("hi", config)
    router.invoke("hi", {"configurable": {"task": ["generate"]}})
    assert [body["model"][:3] for body in server.chats] == ["gen", "gen", "cla", "cla", "cla", "cla"]


async def test_the_config_of_a_graph_reaches_a_router_in_its_node(server, models):
    router = AegisRouter(models, default="classify")

    async def node(state):
        return {"messages": [await router.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState).add_node("ask", node).add_edge(START, "ask").compile()
    await graph.ainvoke({"messages": "hi"}, {"configurable": {"task": "generate"}})
    assert [body["model"] for body in server.chats] == ["generate:8b"]


async def test_a_function_of_the_messages_chooses_last_for_each_prompt(server, models):
    router = AegisRouter(models, default="classify", task=lambda m: "generate" if len(m[-1].text) > 5 else None)
    router.batch(["short", "not so short"], {"max_concurrency": 1})
    result = await router.agenerate([[HumanMessage("long enough")], [HumanMessage("x")]])
    assert sorted(body["model"] for body in server.chats[:2]) == ["classify:1b", "generate:8b"]
    assert [g[0].message.response_metadata["model"] for g in result.generations] == ["generate:8b", "classify:1b"]
    assert len(result.run) == 2


def test_a_name_stands_for_chat_aegis(server, monkeypatch):
    monkeypatch.setenv("OLLAMA_BASE_URL", server.base_url)
    router = AegisRouter({"chat": "spare:3b"}, default="chat")
    assert isinstance(router.models["chat"], ChatAegis)
    assert router.invoke("hi").response_metadata["model"] == "spare:3b"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"models": {}, "default": "a"}, "at least one"),
        ({"models": ["a"], "default": "a"}, "mapping"),
        ({"models": {"a": "m"}, "default": "b"}, "'b'.*'a'"),
        ({"models": {"a": 3}, "default": "a"}, "'a' must be a chat model or a name, got int"),
        ({"models": {" ": "m"}, "default": " "}, "blank"),
        ({"models": {"a": "m"}, "default": "a", "fallback": ["b"]}, "fallback names 'b'"),
        ({"models": {"a": "m"}, "default": "a", "fallback": {"b": "a"}}, "fallback names 'b'"),
        ({"models": {"a": "m"}, "default": "a", "fallback": {"a": 3}}, "fallback must name"),
        ({"models": {"a": "m"}, "default": "a", "task": "a"}, "function"),
        ({"models": {"a": "m"}, "default": "a", "task_key": ""}, "task_key"),
        ({"models": {"a": "m"}, "default": "a", "recheck_s": -1}, "recheck_s"),
        ({"models": {"a": "m"}, "default": "a", "recheck_s": float("nan")}, "recheck_s"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, said):
    with pytest.raises(AegisConfigError, match=said):
        AegisRouter(arguments.pop("models"), **arguments)


# As the model itself


@tool
def get_weather(city: str) -> str:
    """Tell the weather in a city."""
    return f"sunny in {city}"


class City(BaseModel):
    """A city."""

    name: str


async def test_an_agent_works_with_it_and_the_task_holds_in_every_step(server, models):
    agent = create_agent(AegisRouter(models, default="classify"), [get_weather], system_prompt="Help.")
    question = {"messages": [HumanMessage("What is the weather in Paris?")]}
    with aegis_scope(task="generate"):
        direct = agent.invoke(question)
        state = await agent.ainvoke(question)
    for found in (direct, state):
        assert [m.type for m in found["messages"]] == ["human", "ai", "tool", "ai"]
    assert {body["model"] for body in server.chats} == {"generate:8b"}
    assert all(body["tools"] for body in server.chats)


async def test_tools_and_schemas_are_bound_in_the_chosen_model_s_own_way(server, models):
    router = AegisRouter(models, default="classify")
    bound, structured = router.bind_tools([get_weather]), router.with_structured_output(City)
    with aegis_scope(task="generate"):
        assert bound.invoke("What is the weather in Paris?").tool_calls
        assert isinstance(await structured.ainvoke("Which city?"), City)
        assert isinstance(structured.batch(["Which city?"])[0], City)
        assert [c async for c in structured.astream("Which city?")]
    assert (ChatPromptTemplate.from_template("{q}") | bound).invoke({"q": "What is the weather in Paris?"}).tool_calls
    assert [body["model"][:3] for body in server.chats] == ["gen"] * 4 + ["cla"]
    own = models["generate"].with_structured_output(City)
    own.invoke("Which city?")
    assert server.chats[-1]["format"] == server.chats[1]["format"]


async def test_tokens_and_runs_come_once_and_are_those_of_the_model(server, models):
    router = AegisRouter(models, default="generate", fallback=["classify"])

    async def node(state):
        return {"messages": [await router.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState).add_node("ask", node).add_edge(START, "ask").compile()
    seen = Tokens()
    parts = [part async for part, _ in graph.astream({"messages": "hi"}, {"callbacks": [seen]}, stream_mode="messages")]
    answer = router.invoke("hi").text
    assert "".join(p.text for p in parts) == answer
    assert len(parts) > 3
    assert len({p.id for p in parts}) == 1
    assert "".join(seen.tokens) == answer
    assert len(seen.runs) == len(seen.ends) == 1
    assert seen.runs[0][1] is not None
    assert seen.runs[0][2] == "generate:8b"


async def test_events_of_all_versions_are_those_of_the_model(models):
    router = AegisRouter(models, default="generate")
    answer = router.invoke("hi").text
    events = [e async for e in router.astream_events("hi", version="v2")]
    assert "".join(e["data"]["chunk"].text for e in events if e["event"] == "on_chat_model_stream") == answer
    assert {e["event"] for e in events} == {"on_chat_model_start", "on_chat_model_stream", "on_chat_model_end"}
    assert str(router.stream_events("hi", version="v3").output.text) == answer
    assert (await (await router.astream_events("hi", version="v3")).output).text == answer


async def test_nothing_is_kept_under_another_model_s_key(server, models):
    cache = InMemoryCache()
    set_llm_cache(cache)
    router = AegisRouter(models, default="classify")
    for task in ("classify", "generate", "classify", "generate"):
        with aegis_scope(task=task):
            assert router.invoke("hi").response_metadata["model"].startswith(task)
            assert [c async for c in router.astream("hi")]
    assert len(server.chats) == 2
    assert len(cache._cache) == 2


async def test_models_that_a_cache_cannot_tell_apart_are_not_cached(caplog):
    set_llm_cache(InMemoryCache())
    one, two = Fake(says="one"), Fake(says="two")
    router = AegisRouter({"one": one, "two": two}, default="one")
    for _ in range(2):
        assert router.invoke("hi").text == "I am one"
        with aegis_scope(task="two"):
            assert (await router.ainvoke("hi")).text == "I am two"
    assert (one.asked, two.asked) == (2, 2)
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["unnamed_models"]
    alone = AegisRouter({"one": one}, default="one")
    assert alone.invoke("hi").text == alone.invoke("hi").text
    assert one.asked == 3


# When a model is down


@pytest.mark.parametrize(
    "error",
    [AegisConnectionError("gone"), AegisTimeoutError("late"), ModelConnectionError("gone"), ConnectionRefusedError()],
    ids=repr,
)
async def test_a_fallback_answers_whichever_way_the_call_came(error, caplog):
    async for ask in ways(pair(error)[0]):  # the first way finds it out, the others know
        assert await ask() == "I am second"
    for i in range(8):  # each way finds it out
        asks = [a async for a in ways(pair(error)[0])]
        assert await asks[i]() == "I am second"
    assert [r.getMessage().partition(" ")[0] for r in caplog.records] == ["model_down:first:"]


def test_a_model_that_is_down_is_left_alone_and_tried_again():
    router, first, second, clock = pair(AegisConnectionError("gone"), recheck_s=30)
    for _ in range(3):
        assert router.invoke("hi").text == "I am second"
    assert (first.asked, second.asked) == (1, 3)
    clock.now = 31
    router.invoke("hi")
    assert first.asked == 2  # still down
    router.invoke("hi")
    first.error, clock.now = None, 45
    assert router.invoke("hi").text == "I am second"
    clock.now = 62
    assert router.invoke("hi").text == "I am first"
    assert "".join(c.text for c in router.stream("hi")) == "I am first"


async def test_one_call_tries_while_the_others_go_on_with_the_fallback():
    router, first, _, clock = pair(AegisConnectionError("gone"))
    await router.ainvoke("hi")
    clock.now, trying, answer = 31, asyncio.Event(), asyncio.Event()

    class Slow(Fake):
        async def _agenerate(self, messages, stop=None, run_manager=None, **kwargs):
            trying.set()
            await answer.wait()
            return self._generate(messages)

    other = router.over(lambda model: Slow(says="first") if model is first else model)
    probe = asyncio.create_task(other.ainvoke("hi"))
    await asyncio.wait_for(trying.wait(), 10)
    assert (await asyncio.wait_for(other.ainvoke("hi"), 10)).text == "I am second"
    answer.set()
    assert (await probe).text == "I am first"
    assert (await other.ainvoke("hi")).text == "I am first"


@pytest.mark.parametrize("error", [AegisModelNotFoundError("no"), ValueError("bug"), KeyboardInterrupt()], ids=repr)
async def test_other_errors_are_raised_as_they_are(error):
    router, _, second, _ = pair(error)
    for call in (router.invoke, lambda x: list(router.stream(x)), lambda x: router.batch([x])):
        with pytest.raises(type(error)) as caught:
            call("hi")
        assert caught.value is error
    assert second.asked == 0


def test_the_first_error_is_raised_when_all_are_down_and_all_are_asked_again():
    router, first, second, _ = pair(AegisConnectionError("the first one"))
    second.error = AegisTimeoutError("the second one")
    for _ in range(2):
        with pytest.raises(AegisConnectionError, match="the first one"):
            router.invoke("hi")
    assert (first.asked, second.asked) == (2, 2)
    second.error = None
    assert router.invoke("hi").text == "I am second"


def test_without_a_fallback_the_error_is_the_model_s_and_the_next_call_asks_it(caplog):
    first = Fake(says="first", error=AegisConnectionError("gone"))
    router = AegisRouter({"first": first, "second": Fake(says="second")}, default="first", fallback={"second": "first"})
    for _ in range(2):
        with pytest.raises(AegisConnectionError, match="gone"):
            router.invoke("hi")
    first.error = None
    assert router.invoke("hi").text == "I am first"
    assert caplog.records == []


@pytest.mark.parametrize("tokens", [1, 2])
async def test_an_answer_that_has_begun_is_never_started_again(tokens):
    router, first, second, _ = pair(AegisTimeoutError("late"))
    first.tokens = tokens
    got = []
    with pytest.raises(AegisTimeoutError):
        for chunk in router.stream("hi"):
            got.append(chunk.text)  # noqa: PERF401
    with pytest.raises(AegisTimeoutError):
        async for chunk in router.astream("hi"):
            got.append(chunk.text)  # noqa: PERF401
    assert got == ["I ", "am "][:tokens] * 2
    seen = Tokens()  # a call whose tokens are read on the way, as in a graph
    for call in (router.invoke, router.batch):
        with pytest.raises(AegisTimeoutError):
            call("hi" if call == router.invoke else ["hi"], {"callbacks": [seen]})
    with pytest.raises(AegisTimeoutError):
        await router.ainvoke("hi", {"callbacks": [seen]})
    with pytest.raises(AegisTimeoutError):
        router.generate([[HumanMessage("hi")]], callbacks=[seen])
    assert seen.tokens == ["I ", "am "][:tokens] * 4
    assert second.asked == 0


async def test_a_failure_before_the_first_token_gives_each_token_once():
    router, _, _, _ = pair(AegisConnectionError("gone"))
    seen, run_id = Tokens(), uuid.uuid4()
    assert (await router.ainvoke("hi", {"callbacks": [seen], "run_id": run_id})).text == "I am second"
    assert "".join(seen.tokens) == "I am second"
    assert len(seen.runs) == 2  # the failed one is seen as such, and is the one that was named
    assert seen.errors == [run_id] == [seen.runs[0][0]]
    assert seen.ends == [seen.runs[1][0]] != [run_id]


async def test_a_fallback_s_answer_is_kept_as_its_own_only(server):
    """The model comes back: it is asked, and what the fallback said in its place is served to nobody else."""
    cache = InMemoryCache()
    set_llm_cache(cache)
    clock = Clock()
    with ScriptedOllama(["generate:8b"]) as own:
        model = ChatAegis("generate:8b", base_url=own.base_url, temperature=0)
        spare = ChatAegis("spare:3b", base_url=server.base_url, temperature=0)
        router = AegisRouter(
            {"generate": model, "spare": spare}, default="generate", fallback={"generate": "spare"}, clock=clock
        )
        own.close()
        for _ in range(2):  # found out in the call, then known before it
            assert router.invoke("hi").response_metadata["model"] == "spare:3b"
            assert (await router.ainvoke("hi")).response_metadata["model"] == "spare:3b"
            assert [c async for c in router.astream("hi")][-1].response_metadata["model"] == "spare:3b"
        assert len(server.chats) == 1  # the fallback's own entry answers its own calls
        assert len(cache._cache) == 1
        own.start()
        clock.now = 31
        assert router.invoke("hi").response_metadata["model"] == "generate:8b"
        assert len(own.chats) == 1
        assert router.invoke("hi").response_metadata["model"] == "generate:8b"
        assert len(own.chats) == 1
        with aegis_scope(task="spare"):
            assert router.invoke("hi").response_metadata["model"] == "spare:3b"
    assert len(server.chats) == 1
    assert len(cache._cache) == 2


# With admission


async def test_a_long_batch_waits_for_its_turn_and_goes_around_a_model_that_is_down(server):
    def bounded(model):
        return BatchingChatModel(model, max_concurrency=2, max_waiting=8)

    dead = ChatAegis("generate:8b", base_url="http://127.0.0.1:9")
    spare = ChatAegis("spare:3b", base_url=server.base_url)
    router = AegisRouter(
        {"generate": bounded(dead), "spare": bounded(spare)}, default="generate", fallback={"generate": "spare"}
    )
    answers = await router.abatch([f"document {i}" for i in range(60)])
    answers += await router.bind_tools([get_weather]).abatch([f"document {i}" for i in range(60)])
    answers += await asyncio.to_thread(router.batch, [f"document {i}" for i in range(60)])
    assert len(answers) == len(server.chats) == 180
    assert server.counters.max_running <= 2


def test_a_wrapper_around_it_gets_the_model_of_the_task_under_that_model_s_key(server, models):
    cache = InMemoryCache()
    wrapped = BatchingChatModel(AegisRouter(models, default="classify"), cache=cache)
    for _ in range(2):
        for task in ("classify", "generate"):
            with aegis_scope(task=task):
                assert wrapped.invoke("hi").response_metadata["model"].startswith(task)
    assert len(server.chats) == 2
    keys = {llm_string for _, llm_string in cache._cache}
    assert keys == {models["classify"]._get_llm_string(), models["generate"]._get_llm_string()}


def test_a_wrapper_s_key_names_all_models_where_the_messages_choose(server, models):
    router = AegisRouter(models, default="classify", task=lambda m: "generate" if "long" in m[-1].text else None)
    wrapped = BatchingChatModel(router, cache=InMemoryCache())
    for _ in range(2):
        assert wrapped.invoke("a long one").response_metadata["model"] == "generate:8b"
        assert wrapped.invoke("hi").response_metadata["model"] == "classify:1b"
        assert "".join(c.text for c in wrapped.stream("a long one"))
    other = AegisRouter({**models, "generate": models["classify"]}, default="classify", task=router.task)
    assert other._get_llm_string() != router._get_llm_string()


def test_a_wrapper_gets_no_fallback_because_it_has_made_its_key_already():
    router, _, second, _ = pair(AegisConnectionError("gone"))
    with pytest.raises(AegisConnectionError):
        BatchingChatModel(router, cache=InMemoryCache()).invoke("hi")
    assert second.asked == 0
