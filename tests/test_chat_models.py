"""ChatAegis takes ChatOllama's place: the same answers and tokens, checked options, and no broken or wrong call."""

import asyncio
import copy
import logging
import pickle
import threading
from typing import TypedDict

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.load import dumpd, dumps, load
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama
from langgraph.graph import START, MessagesState, StateGraph
from lying_server import LyingServer, line, plain
from pydantic import BaseModel, Field

from langchain_aegis import ChatAegis
from langchain_aegis.errors import (
    AegisConfigError,
    AegisContextOverflowError,
    AegisError,
    AegisModelNotFoundError,
    AegisOptionError,
    AegisOverloadedError,
    AegisRequestError,
    AegisServerError,
    AegisStreamError,
    AegisTimeoutError,
)
from langchain_aegis.identity import identify
from langchain_aegis.notices import forget_warnings
from langchain_aegis.options import MODEL_OPTIONS, Call, merge
from langchain_aegis.testing import ScriptedModel, ScriptedOllama

MODELS = [ScriptedModel(name="m"), ScriptedModel(name="other"), ScriptedModel(name="thinker", thinking=True),
          ScriptedModel(name="small", context_length=128)]  # fmt: skip
QUESTION = "What is the capital of France?"


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
def lying():
    server = LyingServer()
    yield server
    server.close()


@pytest.fixture
def model(server):
    return ChatAegis("m", base_url=server.base_url, temperature=0)


@pytest.fixture
def upstream(server):
    model = ChatOllama(model="m", base_url=server.base_url, temperature=0)
    yield model
    model._client.close()
    LOOP.run(model._async_client.close())


@pytest.fixture(params=["sync", "async"])
def way(request):
    return request.param


LOOP = asyncio.Runner()  # one loop for all tests that use ChatOllama too: it does not survive a second one


@pytest.fixture(scope="module", autouse=True)
def _close_loop():
    yield
    LOOP.close()


def ask(model, way, prompt=QUESTION, /, *args, **kwargs):
    if way == "sync":
        return model.invoke(prompt, *args, **kwargs)
    return LOOP.run(model.ainvoke(prompt, *args, **kwargs))


def stream(model, way, prompt=QUESTION, /, *args, **kwargs):
    if way == "sync":
        return list(model.stream(prompt, *args, **kwargs))

    async def run():
        return [chunk async for chunk in model.astream(prompt, *args, **kwargs)]

    return LOOP.run(run())


def texts(chunks):
    return [chunk.text for chunk in chunks if chunk.text]


@tool
def weather(city: str, days: int = 1) -> str:
    """Tell the weather of a city."""
    return f"sunny in {city} for {days} days"


class Person(BaseModel):
    """A person."""

    name: str = Field(description="the name")
    age: int
    tags: list[str] = []


class City(TypedDict):
    """A city."""

    name: str
    people: int


# -- the same as ChatOllama --

HISTORY = [
    SystemMessage("You are brief.", id="s"),
    HumanMessage("What is the weather in Paris?", name="bob"),
    AIMessage("", tool_calls=[{"name": "weather", "args": {"city": "Paris"}, "id": "1"}]),
    ToolMessage("sunny", tool_call_id="1", name="weather"),
    AIMessage("It is sunny.", additional_kwargs={"reasoning_content": "I looked."}),
    HumanMessage(
        [
            {"type": "text", "text": "And this?"},
            {"type": "image_url", "image_url": "data:image/png;base64,iVBORw0KGgo="},
        ]
    ),
]


def test_the_messages_and_tools_on_the_wire_are_chat_ollamas(server, model, upstream):
    """Byte for byte the same JSON, but for what this package adds on purpose."""
    for each in (model, upstream):
        each.bind_tools([weather, Person], stop=None).invoke(HISTORY)
    ours, theirs = server.chats
    assert (ours.pop("keep_alive"), ours.pop("truncate"), ours.pop("stream")) == ("30m", False, False)
    assert theirs.pop("stream") is True
    assert ours == theirs


def test_invoke_and_stream_give_the_same_answers_and_tokens(model, upstream, way):
    """And the same usage, and the same metadata but for timings."""
    mine, theirs = ask(model, way), ask(upstream, way)
    assert mine.content == theirs.content
    assert mine.usage_metadata == theirs.usage_metadata
    assert set(theirs.response_metadata) - {"logprobs"} <= set(mine.response_metadata)
    for name in ("model", "model_name", "model_provider", "done", "done_reason", "eval_count"):
        assert mine.response_metadata[name] == theirs.response_metadata[name]
    assert texts(stream(model, way)) == texts(stream(upstream, way))


def test_tools_give_the_same_calls(model, upstream, way):
    """Bound tools, invoked and streamed."""
    found = []
    for each in (model, upstream):
        bound = each.bind_tools([weather])
        message, streamed = ask(bound, way, "Weather in Rome?"), None
        for chunk in stream(bound, way, "Weather in Rome?"):
            streamed = chunk if streamed is None else streamed + chunk
        found.append([[(c["name"], c["args"]) for c in m.tool_calls] for m in (message, streamed)])
    assert found[0] == found[1]
    assert found[0][0][0][0] == "weather"


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize(
    "schema", [Person, City, Person.model_json_schema()], ids=["pydantic", "typed dict", "json schema"]
)
def test_structured_output_is_the_same(model, upstream, method, schema, way):
    """All methods, with pydantic classes, typed dicts and JSON schemas."""
    text = 'Ada is a person. Answer in JSON with the keys "name" and "age".'
    found = [
        ask(each.with_structured_output(schema, method=method, include_raw=True), way, text)
        for each in (model, upstream)
    ]
    assert found[0]["parsed"] == found[1]["parsed"]
    assert str(found[0]["parsing_error"]) == str(found[1]["parsing_error"])
    if method != "json_mode":
        assert found[0]["parsed"]


@pytest.mark.parametrize("mode", ["invoke", "messages", "updates"])
def test_an_agent_with_tools_does_the_same(model, upstream, mode):
    """`create_agent` calls the tool, and answers from its result."""
    found = []
    for each in (model, upstream):
        agent = create_agent(each, [weather], system_prompt="Use the tool.")
        question = {"messages": [HumanMessage("What is the weather in Paris?")]}
        if mode == "invoke":
            found.append([(m.type, m.text) for m in agent.invoke(question)["messages"]])
        elif mode == "messages":
            found.append([m.text for m, _ in agent.stream(question, stream_mode="messages") if m.text])
        else:
            found.append([list(update) for update in agent.stream(question, stream_mode="updates")])
    assert found[0] == found[1]
    if mode == "invoke":
        assert "sunny in" in found[0][-1][1]


@pytest.mark.parametrize("strategy", [ProviderStrategy, ToolStrategy])
def test_an_agent_with_a_response_format_does_the_same(model, upstream, strategy):
    """By Ollama's `format`, and by a tool."""
    question = {"messages": [HumanMessage("Ada is a person")]}
    agents = [create_agent(each, [weather], response_format=strategy(Person)) for each in (model, upstream)]
    found = [agent.invoke(question, {"recursion_limit": 8}) for agent in agents]
    assert found[0]["structured_response"] == found[1]["structured_response"]
    assert [m.type for m in found[0]["messages"]] == [m.type for m in found[1]["messages"]]


def graph_of(model, nodes=1):
    builder = StateGraph(MessagesState)
    for number in range(nodes):
        builder.add_node(f"ask{number}", lambda state: {"messages": [model.invoke([HumanMessage(QUESTION)])]})
    builder.add_edge(START, "ask0")
    for number in range(1, nodes):
        builder.add_edge(f"ask{number - 1}", f"ask{number}")
    return builder.compile()


def test_a_graph_streams_the_same_tokens(server, model, upstream):
    """`stream_mode="messages"` switches an invoke inside a node to a stream."""
    found = [
        texts(m for m, _ in graph_of(each).stream({"messages": []}, stream_mode="messages"))
        for each in (model, upstream)
    ]
    assert found[0] == found[1]
    assert len(found[0]) > 5
    assert [chat["stream"] for chat in server.chats] == [True, True]


def test_events_of_v2_and_v3_carry_the_same_tokens(model, upstream):
    """`astream_events` of a chain, `stream_events` of the model."""

    async def run(each):
        chain = each | (lambda message: message.text)
        events = [e async for e in chain.astream_events(QUESTION, version="v2") if e["event"] == "on_chat_model_stream"]
        v3 = await each.astream_events(QUESTION, version="v3")
        return texts(e["data"]["chunk"] for e in events), [str(delta) async for delta in v3.text]

    found = [
        (*LOOP.run(run(each)), [str(delta) for delta in each.stream_events(QUESTION, version="v3").text])
        for each in (model, upstream)
    ]
    assert found[0] == found[1]
    assert all(len(tokens) > 5 for tokens in found[0])


# -- how the server is called --


def test_nobody_who_reads_tokens_means_no_stream(server, model, way):
    """One object instead of a line for each token."""
    ask(model, way)
    assert [chat["stream"] for chat in server.chats] == [False]


def test_a_handler_of_tokens_gets_them(server, model, way):
    """As with ChatOllama, which always streams."""
    from langchain_core.callbacks import BaseCallbackHandler, UsageMetadataCallbackHandler

    class Tokens(BaseCallbackHandler):
        def __init__(self):
            self.seen = []

        def on_llm_new_token(self, token, **kwargs):
            self.seen.append(token)

    handler = Tokens()
    message = ask(model, way, QUESTION, {"callbacks": [handler, UsageMetadataCallbackHandler()]})
    assert "".join(handler.seen) == message.text
    ask(model, way, QUESTION, {"callbacks": [UsageMetadataCallbackHandler()]})
    assert [chat["stream"] for chat in server.chats] == [True, False]


def test_a_stream_ends_with_usage_and_metadata(model, way):
    """On the last chunk, which says that it is the last."""
    chunks = stream(model, way)
    assert [chunk.chunk_position for chunk in chunks] == [None] * (len(chunks) - 1) + ["last"]
    assert all(chunk.usage_metadata is None for chunk in chunks[:-1])
    usage = chunks[-1].usage_metadata
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"] > 0
    meta = chunks[-1].response_metadata
    assert (meta["model_name"], meta["model_provider"], meta["done_reason"]) == ("m", "ollama", "stop")
    assert len({chunk.id for chunk in chunks}) == 1
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.text == ask(model, way).text


def test_zeros_that_ollama_leaves_out_are_zeros(lying, way):
    """Usage and durations are always complete."""
    lying.script = plain(
        {"model": "m", "message": {"role": "assistant", "content": "hi"}, "done": True, "done_reason": "stop"}
    )
    message = ask(ChatAegis("m", base_url=lying.url), way)
    assert message.usage_metadata == {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    assert message.response_metadata["load_duration"] == 0


def test_the_servers_id_of_a_tool_call_is_kept(lying, way):
    """One is made up only where the server sent none."""
    calls = [{"id": "call_7", "function": {"name": "weather", "arguments": {"city": "Rome"}}},
             {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}]  # fmt: skip
    lying.script = plain({"model": "m", "message": {"content": "", "tool_calls": calls}, "done": True})
    first, second = ask(ChatAegis("m", base_url=lying.url), way).tool_calls
    assert first["id"] == "call_7"
    assert second["id"] not in (None, "", "call_7")
    assert (first["args"], second["args"]) == ({"city": "Rome"}, {"city": "Oslo"})


def test_a_tool_call_that_cannot_be_read_is_a_server_error(lying, way):
    """Not a KeyError from somewhere below."""
    lying.script = plain({"model": "m", "message": {"content": "", "tool_calls": [{"name": "weather"}]}, "done": True})
    with pytest.raises(AegisServerError, match="tool call"):
        ask(ChatAegis("m", base_url=lying.url), way)


def test_what_the_model_thought_is_kept_when_asked_for(server, way):
    """In `reasoning_content`, as ChatOllama has it."""
    thinking = ChatAegis("thinker", base_url=server.base_url, temperature=0, reasoning=True)
    message = ask(thinking, way)
    assert message.additional_kwargs["reasoning_content"].startswith("Let me think")
    whole = None
    for chunk in stream(thinking, way):
        whole = chunk if whole is None else whole + chunk
    assert whole.additional_kwargs["reasoning_content"] == message.additional_kwargs["reasoning_content"]
    assert "reasoning_content" not in ask(thinking, way, reasoning=False).additional_kwargs
    assert [chat["think"] for chat in server.chats] == [True, True, False]


def test_one_model_works_in_many_loops_and_threads(model):
    """`asyncio.run` again and again, threads, and both at once."""
    assert [asyncio.run(model.ainvoke(QUESTION)).text for _ in range(3)] == [model.invoke(QUESTION).text] * 3
    found, errors = [], []

    def work(number):
        try:
            found.append((model.invoke(QUESTION) if number % 2 else asyncio.run(model.ainvoke(QUESTION))).text)
        except Exception as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    [t.start() for t in threads]
    [t.join(30) for t in threads]
    assert errors == []
    assert len(found) == 8
    assert len(set(found)) == 1


def test_copies_work_and_talk_to_their_own_address(model):
    """Pickled, deep-copied, or copied with another address."""
    answer = model.invoke(QUESTION).text
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), model.model_copy()):  # noqa: S301 (our own)
        assert other.invoke(QUESTION).text == answer
    with ScriptedOllama(MODELS) as second:
        assert model.model_copy(update={"base_url": second.base_url}).invoke(QUESTION).text == answer
        assert second.routes["/api/chat"] == 1


@pytest.mark.row(85)
def test_leaving_a_stream_stops_the_server(way):
    """A consumer that has seen enough costs nothing more."""
    with ScriptedOllama("m", tokens_per_s=20, words=400) as slow:
        model = ChatAegis("m", base_url=slow.base_url)
        if way == "sync":
            chunks = model.stream(QUESTION)
            next(chunks)
            chunks.close()
        else:

            async def one():
                async for _ in model.astream(QUESTION):
                    break

            asyncio.run(one())
        slow.wait_until(lambda s: s.disconnects == 1 and s.running == 0)


# -- errors --


@pytest.mark.parametrize(
    ("fault", "error"),
    [(503, AegisOverloadedError), (500, AegisServerError), (400, AegisRequestError)],
)
def test_a_refusal_is_an_error_of_this_package(server, model, fault, error, way):
    """Invoked and streamed."""
    server.fail(fault, times=2)
    for kind in (ask, stream):
        with pytest.raises(error) as caught:
            kind(model, way)
        assert caught.value.status_code == fault


@pytest.mark.parametrize("fault", ["cut", "error", "no_done", "malformed"])
def test_a_broken_stream_is_an_error_and_never_a_short_answer(server, model, fault, way):
    """With the text that had come."""
    server.fail(fault, after=3)
    with pytest.raises(AegisStreamError) as caught:
        stream(model, way)
    assert caught.value.partial


def test_a_model_that_is_not_there_is_named(server, way):
    """With the command that fetches it."""
    with pytest.raises(AegisModelNotFoundError, match="ollama pull nope"):
        ask(ChatAegis("nope", base_url=server.base_url), way)
    with pytest.raises(AegisModelNotFoundError, match="ollama pull nope"):
        ChatAegis("nope", base_url=server.base_url, validate_model_on_init=True)
    ChatAegis("m:latest", base_url=server.base_url, validate_model_on_init=True)
    ChatAegis("m", base_url=server.base_url, validate_model_on_init=True)


def test_a_prompt_that_does_not_fit_is_refused(server, way):
    """Cut in silence it would be another question."""
    small = ChatAegis("small", base_url=server.base_url)
    for kind in (ask, stream):
        with pytest.raises(AegisContextOverflowError, match="window"):
            kind(small, way, "word " * 500)


def test_a_prompt_that_does_not_fit_is_cut_with_a_warning_where_that_is_wanted(server, caplog, way):
    """`on_overflow="warn"`."""
    small = ChatAegis("small", base_url=server.base_url, on_overflow="warn")
    with caplog.at_level(logging.WARNING, "langchain_aegis"):
        assert ask(small, way, "word " * 500).text
        assert stream(small, way, "word " * 500)
    assert [r for r in caplog.records if "prompt_cut" in r.message]
    assert [chat["truncate"] for chat in server.chats] == [False, True] * 2


def test_a_call_may_have_a_deadline_of_its_own(server, model, way):
    """`timeout=` of the constructor and of the call are seconds for the whole answer."""
    server.fail("hang", times=None)
    for kind in (ask, stream):
        with pytest.raises(AegisTimeoutError):
            kind(model, way, timeout=0.2)
    with pytest.raises(AegisTimeoutError):
        ask(ChatAegis("m", base_url=server.base_url, timeout=0.2), way)


def test_an_overloaded_server_is_asked_again_when_told_to(server, way):
    """`max_retries`."""
    server.fail(503, times=2, headers={"Retry-After": "0"})
    assert ask(ChatAegis("m", base_url=server.base_url, max_retries=2), way).text
    assert server.routes["/api/chat"] == 3


# -- construction --


def test_the_model_may_come_from_the_environment(monkeypatch):
    """Argument first, then `OLLAMA_MODEL_GENERATION`, else an error that says so."""
    monkeypatch.setenv("OLLAMA_MODEL_GENERATION", "from-env")
    monkeypatch.setenv("OLLAMA_BASE_URL", "myhost")
    monkeypatch.setenv("AEGIS_KEEP_ALIVE", "5m")
    assert (ChatAegis().model, ChatAegis().base_url) == ("from-env", "http://myhost:11434")
    assert ChatAegis("mine").model == ChatAegis(model="mine").model == "mine"
    assert ChatAegis()._defaults().keep_alive == "5m"
    monkeypatch.delenv("OLLAMA_MODEL_GENERATION")
    with pytest.raises(AegisConfigError, match="OLLAMA_MODEL_GENERATION"):
        ChatAegis()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"temprature": 0}, "temperature"),
        ({"num_threads": 4}, "num_thread"),
        ({"base_urll": "x"}, "base_url"),
        ({"temperature": "hot"}, "temperature"),
        ({"num_ctx": "many"}, "num_ctx"),
        ({"on_overflow": "cut"}, "on_overflow"),
        ({"tuning": ""}, "tuning"),
        ({"keep_alive": [1]}, "keep_alive"),
        ({"timeout": 0}, "timeout"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"top_logprobs": 0}, "top_logprobs"),
        ({"top_logprobs": 2, "logprobs": False}, "logprobs"),
        ({"max_tokens": 5, "num_predict": 6}, "max_tokens"),
        ({"model": ""}, "model"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_right_one(arguments, said):
    """Upstream drops an unknown one in silence."""
    with pytest.raises(AegisOptionError, match=said):
        ChatAegis(**{"model": "m", **arguments})


@pytest.mark.parametrize("url", ["ftp://host", "http://host:port", "http://"])
def test_a_wrong_address_is_refused(url):
    """Upstream uses another server instead."""
    with pytest.raises(AegisConfigError, match="address"):
        ChatAegis("m", base_url=url)


def test_every_argument_of_chat_ollama_is_accepted():
    """And those of Ollama that it lacks."""
    ours, theirs = set(ChatAegis.model_fields), set(ChatOllama.model_fields)
    assert theirs <= ours
    assert set(MODEL_OPTIONS) <= ours


def test_credentials_are_sent_and_never_shown(lying):
    """Neither by repr nor when serialised."""
    lying.script = plain({"model": "m", "message": {"content": "hi"}, "done": True})
    url = lying.url.replace("http://", "http://user:s3cret@")
    model = ChatAegis("m", base_url=url, client_kwargs={"headers": {"X-Key": "s3cret-2"}})
    model.invoke("hi")
    head = lying.heads[0].lower()
    assert b"authorization: basic dxnlcjpzm2nyzxq=" in head
    assert b"x-key: s3cret-2" in head
    keyed = ChatAegis("m", base_url=lying.url, api_key="s3cret-3")
    keyed.invoke("hi")
    assert b"authorization: bearer s3cret-3" in lying.heads[1].lower()
    for each in (model, keyed):
        assert "s3cret" not in repr(each) + str(each) + dumps(each) + each._get_llm_string()


def test_a_model_is_serialised_and_loaded(monkeypatch):
    """With what was given to it, but for credentials: those come from the environment again."""
    model = ChatAegis("m", base_url="http://u:s3cret@host:1", temperature=0, stop=["x"], api_key="s3cret-2", num_ctx=9)
    written = dumpd(model)
    assert "s3cret" not in str(written)
    monkeypatch.setenv("OLLAMA_BASE_URL", "http://u:s3cret@host:1")
    monkeypatch.setenv("OLLAMA_API_KEY", "s3cret-2")
    again = load(
        written, allowed_objects=[ChatAegis], valid_namespaces=["langchain_aegis"], secrets_from_env=True
    )  # (what this test wrote itself)
    assert (again, again._get_llm_string()) == (model, model._get_llm_string())


def test_further_arguments_of_httpx_reach_it(server):
    """`client_kwargs` as with ChatOllama."""
    seen = []
    model = ChatAegis("m", base_url=server.base_url, sync_client_kwargs={"event_hooks": {"request": [seen.append]}},
                      client_kwargs={"timeout": 5})  # fmt: skip
    assert model.invoke(QUESTION).text
    assert len(seen) == 1
    assert model._endpoint.timeouts.read_s == 5


def test_configurable_fields_and_bindings_work(server, model):
    """LangChain makes the model anew with other arguments."""
    from langchain_core.runnables import ConfigurableField

    chosen = model.configurable_fields(temperature=ConfigurableField(id="t"))
    chosen.with_config(configurable={"t": 0.5}).invoke(QUESTION)
    model.bind(num_predict=3).invoke(QUESTION)
    assert [chat["options"] for chat in server.chats] == [{"temperature": 0.5}, {"temperature": 0, "num_predict": 3}]


# -- options --


def test_options_of_a_call_are_merged_over_the_models(server, way):
    """Upstream replaces them, or fails."""
    model = ChatAegis(
        "m", base_url=server.base_url, temperature=0, num_ctx=512, stop=["END"], keep_alive="1h", min_p=0.1
    )
    ask(model, way, num_predict=7, temperature=0.5)
    ask(model, way, options={"top_k": 5, "num_ctx": 1024}, max_tokens=9)
    ask(model, way, stop=["X"], keep_alive=-1, model="other", truncate=True)
    first, second, third = server.chats
    assert first["options"] == {"temperature": 0.5, "num_ctx": 512, "num_predict": 7, "min_p": 0.1, "stop": ["END"]}
    assert second["options"] == {
        "temperature": 0,
        "num_ctx": 1024,
        "top_k": 5,
        "num_predict": 9,
        "min_p": 0.1,
        "stop": ["END"],
    }
    assert third["options"]["stop"] == ["X"]
    assert (third["model"], third["keep_alive"], third["truncate"]) == ("other", -1, True)
    assert [first["keep_alive"], first["truncate"]] == ["1h", False]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"temprature": 0}, "temperature"),
        ({"options": {"num_threads": 1}}, "num_thread"),
        ({"options": 3}, "options"),
        ({"num_ctx": "4096"}, "num_ctx"),
        ({"num_predict": 1.5}, "num_predict"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"use_mmap": 1}, "use_mmap"),
        ({"stop": 3}, "stop"),
        ({"format": "yaml"}, "format"),
        ({"model": 3}, "model"),
        ({"timeout": -1}, "timeout"),
        ({"keep_alive": [1]}, "keep_alive"),
    ],
)
def test_a_wrong_option_of_a_call_is_refused_before_anything_is_sent(server, model, arguments, said, way):
    """With the nearest name that exists."""
    for kind in (ask, stream):
        with pytest.raises(AegisOptionError, match=said):
            kind(model, way, QUESTION, **arguments)
    assert server.requests == ()


options = st.dictionaries(
    st.sampled_from(sorted(MODEL_OPTIONS)), st.one_of(st.none(), st.integers(0, 1)), max_size=6
).map(lambda d: {k: (bool(v) if MODEL_OPTIONS[k] is bool and v is not None else v) for k, v in d.items()})


@settings(deadline=None)
@given(options, options, options)
def test_merging_keeps_what_is_not_named(made, inner, named):
    """Call over `options={...}` over constructor; None changes nothing."""
    base = Call(model="m", options={k: v for k, v in made.items() if v is not None})
    merged = merge(base, {"options": inner, **named})
    assert merged.options == {k: v for d in (made, inner, named) for k, v in d.items() if v is not None}
    assert (base.model, base.keep_alive) == (merged.model, merged.keep_alive)


def test_a_changed_model_has_another_name_and_another_request():
    """What is worked out once for equal options notices every change, in place too, and every type."""
    model = ChatAegis("m", stop=["a"], format={"type": "object", "properties": {}})

    def seen():
        return model._get_llm_string(), dumps([model._identifying_params, model._chat_params([HumanMessage("hi")])])

    found = [seen()]
    model.stop.append("b")
    found.append(seen())
    model.format["properties"]["n"] = {"type": "integer"}
    found.append(seen())
    for name, value in (("format", None), ("temperature", 1), ("num_predict", 5), ("stop", None), ("reasoning", True),
                        ("output_version", "v1"), ("on_overflow", "warn"), ("model", "other")):  # fmt: skip
        setattr(model, name, value)
        found.append(seen())
    model = model.model_copy(update={"top_k": 3})
    found.append(seen())
    names, requests = zip(*found, strict=True)
    assert len(set(names)) == len(set(requests)) == len(found)

    sent = {}
    for value in (1, True, 1.0):
        model.logprobs = value
        sent[type(value)] = model._chat_params([])["logprobs"]
    assert all(type(value) is kind for kind, value in sent.items())


def test_who_changes_what_a_trace_is_told_changes_no_model():
    """A callback owns what it is given."""
    model, told = ChatAegis("m", temperature=0.5, stop=["a"]), []
    for _ in range(2):
        params = model._get_invocation_params()
        told.append(dumps(params))
        params["options"]["temperature"] = params["options"]["seed"] = 2
        params["stop"] = params["model"] = "x"
        model._identifying_params["stop"].append("b")
    assert told[0] == told[1]
    assert model._get_llm_string() == ChatAegis("m", temperature=0.5, stop=["a"])._get_llm_string()
    assert model._chat_params([])["options"] == {"temperature": 0.5, "stop": ["a"]}


def test_the_name_for_the_cache_holds_what_changes_answers(model):
    """Constructor and call agree; addresses, timeouts and admission are not in it."""
    name = model._get_llm_string()
    assert name.startswith('aegis/1 {"model":"m:latest"')
    assert model._identifying_params == identify(model="m", options={"temperature": 0}, truncate=False)
    assert (
        name
        == ChatAegis(
            "m:latest",
            base_url="http://elsewhere:1",
            temperature=0.0,
            keep_alive=-1,
            timeout=3,
            max_retries=2,
            num_thread=3,
            num_gpu=1,
            num_batch=9,
            use_mmap=True,
            max_concurrency=2,
            window_ms=1,
            tags=["t"],
            metadata={"a": 1},
            verbose=True,
            client_kwargs={"headers": {"a": "b"}},
            api_key="k",
        )._get_llm_string()
    )
    assert name == model._get_llm_string(keep_alive=3, timeout=5, stream=True, options={"num_thread": 2})
    others = [
        {"temperature": 0.1},
        {"model": "other"},
        {"num_ctx": 9},
        {"num_predict": 9},
        {"seed": 1},
        {"format": "json"},
        {"reasoning": True},
        {"logprobs": True},
        {"stop": ["x"]},
        {"min_p": 0.5},
    ]
    names = {name, *(model._get_llm_string(**other) for other in others)}
    assert len(names) == len(others) + 1
    for other in others:
        made = ChatAegis(**{"model": "m", "base_url": "http://x", "temperature": 0, **other})
        assert made._get_llm_string() == model._get_llm_string(**other)
    assert model.model_copy(update={"on_overflow": "warn"})._get_llm_string() != name
    assert model.model_copy(update={"output_version": "v1"})._get_llm_string() != name
    bound = model.bind_tools([weather]).kwargs
    assert '"tools":' in model._get_llm_string(**bound)


def test_a_response_format_is_a_format(server, model, way):
    """OpenAI's form of it, as upstream takes it."""
    schema = Person.model_json_schema()
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": schema}}
    ask(model, way, response_format=form)
    assert server.chats[0]["format"] == schema
    assert model._get_llm_string(response_format=form) == model._get_llm_string(format=schema)


def test_a_tool_choice_of_none_sends_no_tools(server, model):
    """The one choice that can be kept without the server's help."""
    model.bind_tools([weather]).invoke("Weather in Rome?", tool_choice="none")
    assert "tools" not in server.chats[0]


def test_tracing_sees_the_model_that_was_asked(model):
    """LangSmith's parameters follow the call."""
    params = model._get_ls_params(model="other", temperature=0.3, max_tokens=5, stop=["x"])
    assert params == {"ls_provider": "ollama", "ls_model_name": "other", "ls_model_type": "chat", "ls_temperature": 0.3,
                      "ls_max_tokens": 5, "ls_stop": ["x"]}  # fmt: skip


@pytest.mark.row(116)
def test_no_request_leaves_when_the_text_is_not_unicode(server, model):
    """A lone surrogate."""
    with pytest.raises(AegisRequestError):
        model.invoke("\ud800")
    assert server.requests == ()


@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_errors_are_langchains_errors_too(server, model, status):
    """Code that catches ModelError keeps working."""
    from langchain_core.exceptions import ModelError

    server.fail(status)
    with pytest.raises(ModelError) as caught:
        model.invoke(QUESTION)
    assert isinstance(caught.value, AegisError)


def test_httpx_errors_stay_below(model):
    """Whatever goes wrong, nobody has to catch httpx's errors."""
    gone = model.model_copy(update={"base_url": "http://127.0.0.1:9"})
    with pytest.raises(AegisError) as caught:
        gone.invoke(QUESTION)
    assert isinstance(caught.value.__cause__, httpx.ConnectError)


def test_parts_without_text_are_parts(lying, way):
    """A first line that only says who speaks."""
    lying.script = plain({"model": "m", "message": {"role": "assistant"}, "done": True, "done_reason": "load"})
    message = ask(ChatAegis("m", base_url=lying.url), way)
    assert (message.content, message.response_metadata["done_reason"]) == ("", "load")
    assert line("x").endswith(b"\n")
