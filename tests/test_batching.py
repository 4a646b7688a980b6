"""Admission control around chat models and Runnables: nothing lost, nothing mixed up, nothing twice."""

import asyncio
import contextvars
import gc
import pickle
import random
import threading
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.load import dumpd
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import JsonOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableBinding, RunnableLambda
from langchain_core.tools import tool
from langchain_core.tracers._streaming import _StreamingCallbackHandler
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_ollama import ChatOllama
from langchain_tests.unit_tests import ChatModelUnitTests
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel

from langchain_aegis import (
    AegisConfigError,
    AegisDeadlineError,
    AegisOverloadedError,
    BatchingChatModel,
    BatchingEmbeddings,
    BatchingRunnable,
    aegis_scope,
    batching,
)
from langchain_aegis.merging import chat_flights
from langchain_aegis.replays import StreamEntry
from langchain_aegis.scope import who as who_asks

LONG_S = 20.0

who = contextvars.ContextVar("who", default="nobody")


class Fake(BaseChatModel):
    """Answers `answer <n>`, streams it in words, calls the first bound tool once; waits at its gate if it has one."""

    model: str = "fake"
    temperature: float | None = 0.7
    seed: int | None = None
    gate: Any = None  # asyncio.Event for asynchronous calls, threading.Event for others
    calls: list
    busy: list  # how many calls were under way when each one started
    seen: list
    open_streams: list

    def __init__(self, **arguments):
        super().__init__(**{"calls": [], "busy": [], "seen": [], "open_streams": [], **arguments})
        self._count = iter(range(1, 10**9))  # unlike those of itertools, it may be copied in Python 3.14, too
        self._now = 0

    @property
    def _llm_type(self):
        return "fake-chat"

    @property
    def _identifying_params(self):
        return {"model": self.model, "temperature": self.temperature, "seed": self.seed}

    def bind_tools(self, tools, **kwargs):
        return self.bind(tools=[convert_to_openai_tool(t) for t in tools], **kwargs)

    def with_structured_output(self, schema, **kwargs):
        return self.bind(format=schema.model_json_schema()) | JsonOutputParser()

    def _enter(self, messages, kwargs):
        self.calls.append((messages, kwargs))
        self.seen.append(who.get())
        self._now += 1
        self.busy.append(self._now)
        if messages[-1].content == "poison":
            self._now -= 1
            raise ValueError("poisoned")

    def _make(self, messages, kwargs):
        if kwargs.get("format"):
            return AIMessage('{"city": "Paris"}')
        if kwargs.get("tools") and not any(isinstance(m, ToolMessage) for m in messages):
            name = kwargs["tools"][0]["function"]["name"]
            return AIMessage("", tool_calls=[{"name": name, "args": {"city": "Paris"}, "id": "c1"}])
        return AIMessage(f"answer {next(self._count)} to {messages[-1].content}")

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        self._enter(messages, kwargs)
        try:
            if isinstance(self.gate, threading.Event):
                assert self.gate.wait(LONG_S)
            return ChatResult(generations=[ChatGeneration(message=self._make(messages, kwargs))])
        finally:
            self._now -= 1

    async def _agenerate(self, messages, stop=None, run_manager=None, **kwargs):
        self._enter(messages, kwargs)
        try:
            if isinstance(self.gate, asyncio.Event):
                await self.gate.wait()
            else:
                await asyncio.sleep(0)
            return ChatResult(generations=[ChatGeneration(message=self._make(messages, kwargs))])
        finally:
            self._now -= 1

    def _chunks(self, messages, kwargs):
        message = self._make(messages, kwargs)
        if message.tool_calls:
            call = message.tool_calls[0]
            piece = {"name": call["name"], "args": '{"city": "Paris"}', "id": call["id"], "index": 0}
            yield ChatGenerationChunk(message=AIMessageChunk("", tool_call_chunks=[piece]))
        else:
            for word in message.content.split(" "):
                yield ChatGenerationChunk(message=AIMessageChunk(word + " "))

    def _stream(self, messages, stop=None, run_manager=None, **kwargs):
        self._enter(messages, kwargs)
        self.open_streams.append(1)
        try:
            yield from self._chunks(messages, kwargs)
        finally:
            self.open_streams.pop()
            self._now -= 1

    async def _astream(self, messages, stop=None, run_manager=None, **kwargs):
        self._enter(messages, kwargs)
        self.open_streams.append(1)
        try:
            for chunk in self._chunks(messages, kwargs):
                if isinstance(self.gate, asyncio.Event):
                    await self.gate.wait()
                yield chunk
        finally:
            self.open_streams.pop()
            self._now -= 1


class Plain(Fake):
    """The same without streaming."""

    _stream = BaseChatModel._stream
    _astream = BaseChatModel._astream


@tool
def weather(city: str) -> str:
    """Tell the weather in a city."""
    return f"sunny in {city}"


async def settle(turns=30):
    for _ in range(turns):
        await asyncio.sleep(0)


async def until(condition):
    """Wait for what another thread does, where there is nothing to be woken by."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def idle(wrapper):
    stats = wrapper.admission.stats()
    return (stats.running, stats.waiting, stats.waiting_bulk) == (0, 0, 0)


def fill(wrapper):
    """Take every slot and every place."""
    bound = wrapper.admission
    return [bound.enter() for _ in range(bound.max_concurrency + bound.max_waiting)]


@pytest.fixture
def small():
    """One slot, one place."""
    return BatchingChatModel(Fake(), max_concurrency=1, max_waiting=1)


# Refusal


async def consume(stream):
    return [chunk async for chunk in stream]


ENTRIES = {
    "invoke": lambda m: asyncio.to_thread(m.invoke, "q"),
    "ainvoke": lambda m: m.ainvoke("q"),
    "stream": lambda m: asyncio.to_thread(lambda: list(m.stream("q"))),
    "astream": lambda m: consume(m.astream("q")),
    "generate": lambda m: asyncio.to_thread(m.generate, [[HumanMessage("q")]]),
    "agenerate": lambda m: m.agenerate([[HumanMessage("q")], [HumanMessage("r")]]),
    "astream_events": lambda m: consume(m.astream_events("q", version="v2")),
    "stream_events": lambda m: asyncio.to_thread(lambda: list(m.stream_events("q", version="v3"))),
    "bound": lambda m: m.bind_tools([weather]).ainvoke("q"),
    "chain": lambda m: (ChatPromptTemplate.from_messages([("human", "{q}")]) | m).ainvoke({"q": "q"}),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("temperature", [0, 0.7])
async def test_every_entry_point_refuses_alike(entry, temperature):
    wrapper = BatchingChatModel(Fake(temperature=temperature), max_concurrency=1, max_waiting=1)
    held = fill(wrapper)
    async with asyncio.timeout(LONG_S):
        with pytest.raises(AegisOverloadedError) as refused:
            await ENTRIES[entry](wrapper)
        assert refused.value.retry_after_s > 0
        assert wrapper.inner.calls == []
        for ticket in held:
            ticket.leave()
        await ENTRIES[entry](wrapper)
    assert len(wrapper.inner.calls) == (2 if entry == "agenerate" else 1)
    assert idle(wrapper)


async def test_a_refused_call_has_started_no_run():
    """Refusal comes before LangChain's machinery: no callback hears of the call."""
    wrapper = BatchingChatModel(Fake(), max_concurrency=1, max_waiting=0)
    handler = Runs()
    fill(wrapper)
    with pytest.raises(AegisOverloadedError):
        await wrapper.ainvoke("q", config={"callbacks": [handler]})
    assert handler.starts == []


async def test_a_binding_asks_before_it_merges_configs(monkeypatch):
    """Under overload most calls are refused, and LangChain's merging is most of what that would cost."""
    wrapper = BatchingChatModel(Fake(), max_concurrency=1, max_waiting=0)
    fill(wrapper)
    admission = wrapper.admission
    held = [admission.enter(wait="patient")]
    monkeypatch.setattr(admission, "_next_purge", float("inf"))  # once a second a call goes the long way, and tidies up
    monkeypatch.setattr(RunnableBinding, "_merge_configs", lambda *_: pytest.fail("merged"))
    for binding in (wrapper.bind(stop=["x"]), wrapper.bind_tools([weather]), wrapper.bind(stop=["x"]).bind(seed=1)):
        for ask in (binding.ainvoke, lambda q, b=binding: asyncio.to_thread(b.invoke, q),
                    lambda q, b=binding: consume(b.astream(q)),
                    lambda q, b=binding: asyncio.to_thread(lambda: list(b.stream(q)))):  # fmt: skip
            with pytest.raises(AegisOverloadedError):
                await ask("q")
    assert admission.stats().refused == 12
    assert {(row.model, row.tenant) for row in admission.stats().rows if row.refused} == {(wrapper.inner.model, None)}
    assert held


@pytest.mark.slow
async def test_a_refusal_leaves_no_garbage():
    """An error that its own traceback holds is collected later, by a pause that hits one refusal of a hundred."""
    wrapper = BatchingChatModel(Fake(), max_concurrency=1, max_waiting=1)
    held, binding = fill(wrapper), wrapper.bind(stop=["x"])

    async def refuse(ask):
        for _ in range(100):
            try:
                await ask("q")
            except AegisOverloadedError:
                continue
            pytest.fail("a full queue took a call")

    await refuse(binding.ainvoke)
    gc.collect()
    gc.disable()
    try:
        for ask in (wrapper.ainvoke, binding.ainvoke):
            await refuse(ask)
            assert gc.collect() < 20
    finally:
        gc.enable()
    assert held


async def test_a_quick_refusal_leaves_the_joinable_the_named_and_the_waiting_alone(monkeypatch):
    """What would get in, or share a call, the long way, does so through a full queue's bindings too."""
    gate = asyncio.Event()
    wrapper = BatchingChatModel(Fake(gate=gate, temperature=0), max_concurrency=1, max_waiting=2)
    monkeypatch.setattr(wrapper.admission, "_next_purge", float("inf"))
    binding = wrapper.bind(stop=["x"])
    with aegis_scope(tenant="greedy"):
        first = asyncio.create_task(binding.ainvoke("same"))
        await settle()
        waiting = [asyncio.create_task(binding.ainvoke(f"q {i}")) for i in range(2)]
        await settle()
        joined = asyncio.create_task(binding.ainvoke("same"))
        await settle()
        with pytest.raises(AegisOverloadedError):
            await binding.ainvoke("one too many")
    with aegis_scope(tenant="modest"):
        modest = asyncio.create_task(binding.ainvoke("theirs"))
    await settle()
    gate.set()
    assert (await joined).content == (await first).content
    assert (await modest).content
    refused = [r for r in await asyncio.gather(*waiting, return_exceptions=True) if isinstance(r, AegisOverloadedError)]
    assert len(refused) == 1
    assert len(wrapper.inner.calls) == 3


def test_a_binding_is_written_as_langchains():
    wrapper = BatchingChatModel(Fake())
    assert dumpd(wrapper.bind(stop=["x"]))["id"] == dumpd(RunnableBinding(bound=wrapper, kwargs={}))["id"]
    assert wrapper.bind(stop=["x"]).kwargs == {"stop": ["x"]}
    assert wrapper.bind_tools([weather]).bound is wrapper


@pytest.mark.row(88)
async def test_ten_thousand_at_once():
    gate = asyncio.Event()
    wrapper = BatchingChatModel(Fake(gate=gate), max_concurrency=4, max_waiting=100)
    tasks = [asyncio.create_task(wrapper.ainvoke(f"q {i}")) for i in range(10_000)]
    await settle()
    gate.set()
    async with asyncio.timeout(60):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(r, AIMessage) for r in results) == 104
    assert sum(isinstance(r, AegisOverloadedError) for r in results) == 9_896
    assert max(wrapper.inner.busy) == 4
    assert idle(wrapper)


async def test_a_full_queue_still_serves_what_a_cache_knows(small):
    small.cache = InMemoryCache()
    known = await small.ainvoke("known")
    held = fill(small)
    assert (await small.ainvoke("known")).content == known.content
    assert (await asyncio.to_thread(small.invoke, "known")).content == known.content
    with pytest.raises(AegisOverloadedError):
        await small.ainvoke("unknown")
    assert len(small.inner.calls) == 1
    for ticket in held:
        ticket.leave()
    assert idle(small)


# Batches


@pytest.mark.row(89)
async def test_batches_of_any_length_wait_in_order_and_never_merge():
    """300 items through 2 slots and 1 place: all answered, in order, each by a call of its own."""
    wrapper = BatchingChatModel(Fake(temperature=0), max_concurrency=2, max_waiting=1)
    prompts = [f"item {i % 100}" for i in range(300)]
    async with asyncio.timeout(LONG_S):
        answers = await wrapper.abatch(prompts)
        seen = {i: a.content async for i, a in wrapper.abatch_as_completed(prompts)}
        sync = await asyncio.to_thread(wrapper.batch, prompts[:60])
        some = await asyncio.to_thread(lambda: dict(wrapper.batch_as_completed(prompts[:20])))
    for found in ([a.content for a in answers], [seen[i] for i in range(300)]):
        assert [f.split(" to ")[1] for f in found] == prompts
    assert [a.content.split(" to ")[1] for a in sync] == prompts[:60]
    assert sorted(some) == list(range(20))
    assert len({a.content for a in answers}) == 300
    assert len(wrapper.inner.calls) == 300 + 300 + 60 + 20
    assert max(wrapper.inner.busy) <= 2
    assert wrapper.admission.stats().refused == 0
    assert idle(wrapper)
    assert await wrapper.abatch([]) == []
    assert wrapper.batch([]) == []


async def test_a_batch_holds_few_tasks_at_once():
    wrapper = BatchingChatModel(Fake(), max_concurrency=4, max_batch=16)
    before, most = len(asyncio.all_tasks()), 0
    async for _ in wrapper.abatch_as_completed([f"q {i}" for i in range(300)]):
        most = max(most, len(asyncio.all_tasks()) - before)
    assert most <= 4 * (4 + 16)


@pytest.mark.row(95)
@pytest.mark.parametrize("how", ["batch", "abatch"])
async def test_one_bad_item_hurts_no_neighbour(how, small):
    prompts = ["a", "poison", "b"]

    async def run(**kwargs):
        if how == "abatch":
            return await small.abatch(prompts, **kwargs)
        return await asyncio.to_thread(lambda: small.batch(prompts, **kwargs))

    a, poison, b = await run(return_exceptions=True)
    assert isinstance(poison, ValueError)
    assert (a.content.split(" to ")[1], b.content.split(" to ")[1]) == ("a", "b")
    with pytest.raises(ValueError, match="poisoned"):
        await run()
    assert idle(small)


async def test_a_batch_honours_the_configs_bound_and_a_bound_model():
    wrapper = BatchingChatModel(Fake(), max_concurrency=8)
    async with asyncio.timeout(LONG_S):
        await wrapper.bind(stop=["x"]).abatch([f"q {i}" for i in range(40)], {"max_concurrency": 3})
    assert max(wrapper.inner.busy) == 3


async def test_a_cancelled_batch_leaves_nothing_behind(small):
    small.inner.gate = asyncio.Event()
    task = asyncio.create_task(small.abatch([f"q {i}" for i in range(50)]))
    await settle()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await settle()
    assert idle(small)
    assert len(small.inner.calls) == 1


# Merging


@pytest.mark.parametrize(
    ("arguments", "first", "second", "calls"),
    [
        ({"temperature": 0}, {}, {}, 1),
        ({"seed": 7}, {}, {}, 1),
        ({}, {}, {}, 2),
        ({}, {"temperature": 0}, {"temperature": 0}, 1),
        ({"temperature": 0}, {"temperature": 0.9}, {"temperature": 0.9}, 2),
        ({"temperature": 0}, {"stop": ["x"]}, {"stop": ["y"]}, 2),
        ({"temperature": 0}, {"format": "json"}, {}, 2),
        ({"temperature": 0}, {"config": {"tags": ["a"]}}, {"config": {"tags": ["b"]}}, 1),
    ],
)
@pytest.mark.parametrize("mode", ["async", "threads"])
async def test_what_is_deterministic_and_equal_makes_one_call(arguments, first, second, calls, mode):
    gate = asyncio.Event() if mode == "async" else threading.Event()
    wrapper = BatchingChatModel(Fake(gate=gate, **arguments))

    async def ask(kwargs):
        if mode == "async":
            return await wrapper.ainvoke("q", **kwargs)
        return await asyncio.to_thread(wrapper.invoke, "q", **kwargs)

    tasks = [asyncio.create_task(ask(first)), asyncio.create_task(ask(second))]
    async with asyncio.timeout(LONG_S):
        if mode == "threads":
            await until(lambda: len(wrapper.inner.calls) + seats(wrapper) >= (3 if calls == 1 else 2))
        await settle()
        gate.set()
        answers = await asyncio.gather(*tasks)
    assert len(wrapper.inner.calls) == calls
    assert answers[0] is not answers[1]
    assert len({a.id for a in answers}) == 2
    assert idle(wrapper)


def seats(wrapper):
    return chat_flights.seats


async def merged(ask, *others, gate):
    """Run the asks at the same time and return the answers."""
    tasks = [asyncio.create_task(ask()) for ask in (ask, *others)]
    await settle()
    gate.set()
    async with asyncio.timeout(LONG_S):
        return await asyncio.gather(*tasks)


@pytest.mark.parametrize(
    ("one", "other", "calls"),
    [
        ({"tenant": "a"}, {"tenant": "a"}, 1),
        ({"tenant": "a"}, {"tenant": "b"}, 2),
        ({"tenant": "a"}, {}, 2),
        ({"tenant": "a", "user": "x"}, {"tenant": "a", "user": "y"}, 2),
        ({"task": "t"}, {"task": "u"}, 2),
        ({"cache": "off"}, {"cache": "off"}, 2),
        ({"cache": "refresh"}, {"cache": "refresh"}, 2),
        ({}, {"cache": "off"}, 2),
    ],
)
@pytest.mark.row(57)
async def test_calls_are_shared_within_a_tenant_only(one, other, calls):
    gate = asyncio.Event()
    wrapper = BatchingChatModel(Fake(temperature=0, gate=gate))

    def ask(scope):
        async def run():
            with aegis_scope(**scope):
                return await wrapper.ainvoke("q")

        return run

    await merged(ask(one), ask(other), gate=gate)
    assert len(wrapper.inner.calls) == calls
    assert idle(wrapper)


@pytest.mark.parametrize(
    ("one", "other", "calls"),
    [
        ({"tenant_id": "a"}, {"tenant_id": "b"}, 2),
        ({"tenant_id": "a"}, {}, 2),
        ({"org": "a"}, {"org": "b"}, 2),  # whatever an application calls its tenant
        ({"tenant_id": "a", "thread_id": "1"}, {"tenant_id": "a", "thread_id": "2"}, 1),
        ({"tenant_id": " "}, {"tenant_id": " "}, 2),  # names nobody
    ],
)
@pytest.mark.parametrize("way", ["direct", "chain"])
@pytest.mark.row(57)
async def test_a_tenant_in_the_config_is_not_shared_with_another(one, other, calls, way):
    gate = asyncio.Event()
    wrapper = BatchingChatModel(Fake(temperature=0, gate=gate))

    async def same(x):
        return x

    runnable = wrapper if way == "direct" else RunnableLambda(same) | wrapper
    asks = [lambda c=c: runnable.ainvoke("q", {"configurable": c}) for c in (one, other)]
    await merged(*asks, gate=gate)
    assert len(wrapper.inner.calls) == calls


@pytest.mark.row(57)
async def test_the_wrappers_own_cache_decides_about_sharing():
    gate = asyncio.Event()
    never = BatchingChatModel(Fake(temperature=0, gate=gate), cache=False)
    await merged(lambda: never.ainvoke("q"), lambda: never.ainvoke("q"), gate=gate)
    assert len(never.inner.calls) == 2

    gate = asyncio.Event()
    cached = BatchingChatModel(Fake(gate=gate, cache=False), cache=InMemoryCache())
    await merged(*(lambda: cached.ainvoke("q") for _ in range(5)), gate=gate)
    await cached.ainvoke("q")
    assert len(cached.inner.calls) == 1

    gate = asyncio.Event()
    everywhere = BatchingChatModel(Fake(gate=gate))
    set_llm_cache(InMemoryCache())
    try:
        await merged(*(lambda: everywhere.ainvoke("q") for _ in range(5)), gate=gate)
    finally:
        set_llm_cache(None)
    assert len(everywhere.inner.calls) == 1


async def test_two_models_never_share():
    gate = asyncio.Event()
    one, two = (BatchingChatModel(Fake(temperature=0, gate=gate)) for _ in range(2))
    await merged(lambda: one.ainvoke("q"), lambda: two.ainvoke("q"), gate=gate)
    assert (len(one.inner.calls), len(two.inner.calls)) == (1, 1)


def conversation(name="bob", text="q", picture="AAAA", **more):
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    call = {"name": "f", "args": {"x": more.pop("x", 1)}, "id": "c1"}
    return [
        SystemMessage("be kind"),
        HumanMessage([{"type": "text", "text": text}, image], name=name, id=str(uuid.uuid4())),
        AIMessage("", tool_calls=[call], response_metadata={"total_duration": random.random()}, id=str(uuid.uuid4())),
        ToolMessage("1", tool_call_id="c1", artifact=object()),
    ]


@pytest.mark.parametrize(
    ("one", "other", "calls"),
    [
        (conversation(), conversation(), 1),
        (conversation(), conversation(name="eve"), 2),
        (conversation(), conversation(text="r"), 2),
        (conversation(), conversation(picture="BBBB"), 2),
        (conversation(), conversation(x=2), 2),
        ("q", [HumanMessage("q")], 1),
        ("q", [("human", "q")], 1),
        ("q", [SystemMessage("q")], 2),
        ("q", [HumanMessage("q", name="bob")], 2),
        ([HumanMessage("q"), HumanMessage("r")], [HumanMessage("r"), HumanMessage("q")], 2),
    ],
)
async def test_what_the_model_sees_decides_about_sharing(one, other, calls):
    gate = asyncio.Event()
    wrapper = BatchingChatModel(Fake(temperature=0, gate=gate))
    await merged(lambda: wrapper.ainvoke(one), lambda: wrapper.ainvoke(other), gate=gate)
    assert len(wrapper.inner.calls) == calls


@pytest.mark.row(92)
async def test_joiners_do_not_count_and_cancelling_them_hurts_nobody(small):
    """1,000 identical callers on one place: one call; 999 cancelled: the last one has its answer."""
    small.inner.temperature, small.inner.gate = 0, asyncio.Event()
    tasks = [asyncio.create_task(small.ainvoke("same")) for _ in range(1_000)]
    await settle()
    assert (small.admission.stats().waiting, small.admission.stats().refused) == (0, 0)
    for task in tasks[:999]:
        task.cancel()
    await settle()
    small.inner.gate.set()
    async with asyncio.timeout(LONG_S):
        assert (await tasks[999]).content == "answer 1 to same"
    assert len(small.inner.calls) == 1
    assert idle(small)


@pytest.mark.row(93)
async def test_the_last_callers_leaving_stops_the_call(small):
    small.inner.temperature, small.inner.gate = 0, asyncio.Event()
    tasks = [asyncio.create_task(small.ainvoke("same")) for _ in range(3)]
    await settle()
    for task in tasks:
        task.cancel()
    await settle()
    assert small.inner._now == 0
    assert idle(small)


@pytest.mark.row(94)
async def test_a_failure_is_everybodys_own():
    wrapper = BatchingChatModel(Fake(temperature=0))
    errors = await asyncio.gather(*(wrapper.ainvoke("poison") for _ in range(5)), return_exceptions=True)
    assert [type(e) for e in errors] == [ValueError] * 5
    assert len({id(e) for e in errors}) == 5
    assert len(wrapper.inner.calls) == 1
    assert idle(wrapper)


# Callbacks, context, run tree


class Runs(BaseCallbackHandler):
    """Notes what it is told, by run."""

    def __init__(self):
        self.starts, self.ends, self.errors, self.parents, self.tags, self.names = [], [], [], {}, {}, []

    def on_chat_model_start(self, serialized, messages, *, run_id, parent_run_id=None, tags=None, name=None, **kwargs):
        self.starts.append(run_id)
        self.parents[run_id] = parent_run_id
        self.tags[run_id] = tags
        self.names.append(name)

    def on_chain_start(self, serialized, inputs, *, run_id, parent_run_id=None, **kwargs):
        self.parents[run_id] = parent_run_id

    def on_llm_end(self, response, *, run_id, **kwargs):
        self.ends.append(run_id)

    def on_llm_error(self, error, *, run_id, **kwargs):
        self.errors.append(run_id)


@pytest.mark.row(58, 112)
async def test_callers_of_one_call_keep_their_callbacks_tags_and_run_ids():
    gate = asyncio.Event()
    wrapper = BatchingChatModel(Fake(temperature=0, gate=gate))
    handlers, ids = [Runs() for _ in range(3)], [uuid.uuid4() for _ in range(3)]
    answers = await merged(
        *(
            lambda i=i: wrapper.ainvoke("q", {"callbacks": [handlers[i]], "tags": [f"t{i}"], "run_id": ids[i]})
            for i in range(3)
        ),
        gate=gate,
    )
    assert len(wrapper.inner.calls) == 1
    for i, handler in enumerate(handlers):
        assert handler.starts == handler.ends == [ids[i]]
        assert handler.tags == {ids[i]: [f"t{i}"]}
        assert answers[i].id == f"lc_run--{ids[i]}-0"
        answers[i].content += f" for {i}"
    assert [a.content for a in answers] == [f"answer 1 to q for {i}" for i in range(3)]


@pytest.mark.row(58, 112)
async def test_a_call_of_its_own_runs_in_its_callers_context(small):
    small.admission.limit(max_waiting=10)

    async def ask(name):
        who.set(name)
        return await small.ainvoke("q")

    await asyncio.gather(ask("alice"), ask("bob"))
    assert small.inner.seen == ["alice", "bob"]
    small.inner.temperature = 0
    await asyncio.gather(ask("alice"), ask("bob"))
    assert small.inner.seen[2:] == ["nobody"]


class Words(BaseCallbackHandler):
    def __init__(self):
        self.words = []

    def on_llm_new_token(self, token, **kwargs):
        self.words.append(token)


class Telling(Fake):
    """Reports tokens from `_generate`, as some models do."""

    async def _agenerate(self, messages, stop=None, run_manager=None, **kwargs):
        result = await super()._agenerate(messages, stop, run_manager, **kwargs)
        if run_manager:
            await run_manager.on_llm_new_token("token")
        return result


async def test_a_caller_that_reads_tokens_gets_a_call_of_its_own():
    wrapper, readers = BatchingChatModel(Telling(temperature=0)), [Words(), Words()]
    await asyncio.gather(*(wrapper.ainvoke("q", {"callbacks": [r]}) for r in readers), wrapper.ainvoke("q"))
    assert [r.words for r in readers] == [["token"], ["token"]]
    assert len(wrapper.inner.calls) == 3
    assert idle(wrapper)


def test_the_models_own_callbacks_and_tags_still_count():
    handler = Runs()
    BatchingChatModel(Fake(callbacks=[handler], tags=["own"])).invoke("q")
    assert [handler.tags[run] for run in handler.starts] == [["own"]]
    assert len(handler.ends) == 1


def graph_of(model, nodes=1):
    async def node(state):
        return {"messages": [await model.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    for i in range(nodes):
        graph.add_node(f"n{i}", node)
        graph.add_edge(START, f"n{i}")
    return graph.compile()


@pytest.mark.parametrize("temperature", [0, 0.7])
async def test_a_graph_streams_each_token_once(temperature):
    plain, wrapped = (graph_of(m) for m in (Fake(), BatchingChatModel(Fake(temperature=temperature))))

    async def tokens(graph):
        return [
            (c.content, type(c)) async for c, _ in graph.astream({"messages": [("human", "q")]}, stream_mode="messages")
        ]

    assert await tokens(wrapped) == await tokens(plain)


@pytest.mark.row(112)
async def test_five_parallel_nodes_share_one_call_and_the_run_tree_is_right():
    wrapper, handler = BatchingChatModel(Fake(temperature=0)), Runs()
    state = await graph_of(wrapper, nodes=5).ainvoke({"messages": [("human", "q")]}, {"callbacks": [handler]})
    assert len(state["messages"]) == 6  # five answers with five ids
    assert len({m.id for m in state["messages"]}) == 6
    assert len(wrapper.inner.calls) == 1
    assert len(handler.starts) == len(handler.ends) == len(set(handler.starts)) == 5
    assert len({handler.parents[run] for run in handler.starts}) == 5  # each below its own node
    assert idle(wrapper)


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("mode", ["async", "sync"])
async def test_an_agent_with_tools(mode, temperature):
    wrapper, handler = BatchingChatModel(Fake(temperature=temperature)), Runs()
    agent = create_agent(wrapper, [weather])
    question = {"messages": [("human", "weather?")]}
    if mode == "async":
        state = await agent.ainvoke(question, {"callbacks": [handler]})
    else:
        state = await asyncio.to_thread(agent.invoke, question, {"callbacks": [handler]})
    kinds = [type(m).__name__ for m in state["messages"]]
    assert kinds == ["HumanMessage", "AIMessage", "ToolMessage", "AIMessage"]
    assert state["messages"][2].content == "sunny in Paris"
    assert len(handler.starts) == len(handler.ends) == 2
    assert all(handler.parents[run] is not None for run in handler.starts)
    assert [kwargs["tools"][0]["function"]["name"] for _, kwargs in wrapper.inner.calls] == ["weather"] * 2
    pieces = [m.content async for m, _ in agent.astream(question, stream_mode="messages") if m.content]
    assert "".join(pieces) == "sunny in Paris" + "answer 2 to sunny in Paris "
    assert wrapper.admission.stats().served == 4
    assert idle(wrapper)


# The model inside shows through


class City(BaseModel):
    """A city."""

    city: str


async def test_structured_output_is_the_models_own_way(small):
    structured = small.with_structured_output(City)
    held = fill(small)
    with pytest.raises(AegisOverloadedError):
        await structured.ainvoke("q")
    for ticket in held:
        ticket.leave()
    assert await structured.ainvoke("q") == {"city": "Paris"}
    assert small.inner.calls[0][1] == {"format": City.model_json_schema()}
    assert small.admission.stats().served == 1


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize("include_raw", [False, True])
def test_structured_output_of_ollama_goes_through_the_wrapper(method, include_raw):
    inner = ChatOllama(model="m", base_url="http://127.0.0.1:9")
    wrapper = BatchingChatModel(inner)
    made, own = (m.with_structured_output(City, method=method, include_raw=include_raw) for m in (wrapper, inner))
    found, expected = (s.first.steps__["raw"] if include_raw else s.first for s in (made, own))
    assert found.bound is wrapper
    assert expected.bound is inner
    assert found.kwargs == expected.kwargs


def test_a_model_that_returns_a_changed_copy_of_itself_stays_wrapped(small):
    class Copying(Fake):
        def bind_tools(self, tools, **kwargs):
            return self.model_copy(update={"model": "with-tools"})

    wrapper = BatchingChatModel(Copying())
    bound = wrapper.bind_tools([weather])
    assert isinstance(bound, BatchingChatModel)
    assert bound.inner.model == "with-tools"
    assert bound.admission is wrapper.admission


def test_it_presents_itself_as_the_model_inside():
    inner = Fake(temperature=0, profile={"max_input_tokens": 77}, custom_get_token_ids=lambda text: list(range(9)))
    wrapper = BatchingChatModel(inner)
    for name, arguments in {
        "_llm_type": None, "_identifying_params": None, "profile": None, "model": None, "temperature": None,
        "_serialized": None,
        "_get_llm_string": {"stop": ["x"], "tools": [1]}, "_get_ls_params": {"stop": ["x"]},
        "_get_invocation_params": {"stop": ["x"]}, "get_num_tokens": {"text": "one two"},
    }.items():  # fmt: skip
        ours, theirs = getattr(wrapper, name), getattr(inner, name)
        assert (ours == theirs) if arguments is None else (ours(**arguments) == theirs(**arguments)), name
    assert not hasattr(wrapper, "nothing_of_the_sort")
    copied = wrapper.model_copy(deep=True)
    assert copied.admission is wrapper.admission


def test_wrappers_of_one_server_share_its_bounds():
    address = "http://one-server.test:1"
    one = BatchingChatModel(ChatOllama(model="a", base_url=address))
    two = BatchingChatModel(ChatOllama(model="b", base_url=address + "/"), max_concurrency=2)
    other = BatchingChatModel(ChatOllama(model="b", base_url="http://one-server.test:2"))
    assert one.admission is two.admission is not other.admission
    assert one.admission.max_concurrency == 2
    assert BatchingChatModel(Fake()).admission is not BatchingChatModel(Fake()).admission


class Looking(Fake):
    """Looks into LangChain's cache while it streams, as ChatAegis does."""

    def _stream(self, messages, stop=None, run_manager=None, **kwargs):
        self.seen.append((StreamEntry.applies(self), who_asks("tenant_id", None)[0]))
        yield from super()._stream(messages, stop, run_manager, **kwargs)


def test_a_model_that_looks_into_a_cache_does_so_once_and_sees_the_config():
    handler = StreamHandler()
    config = {"configurable": {"tenant_id": "acme"}}
    wrapper = BatchingChatModel(Looking())
    list(wrapper.stream("q", config))  # LangChain does not look for streams
    wrapper.invoke("q", {**config, "callbacks": [handler]})  # LangChain has looked before it streams
    list(BatchingChatModel(wrapper.inner, cache=False).stream("q", config))
    assert [s for s in wrapper.inner.seen if isinstance(s, tuple)] == [(True, "acme"), (False, "acme"), (False, "acme")]
    assert handler.tokens > 0


class StreamHandler(BaseCallbackHandler, _StreamingCallbackHandler):
    """Makes LangChain stream an `invoke`."""

    tokens = 0

    def tap_output_aiter(self, run_id, output):
        return output

    def tap_output_iter(self, run_id, output):
        return output

    def on_llm_new_token(self, token, **kwargs):
        self.tokens += 1


class TestStandard(ChatModelUnitTests):
    """LangChain's own promises about a chat model."""

    @property
    def chat_model_class(self):
        return BatchingChatModel

    @property
    def chat_model_params(self):
        return {"inner": Fake()}


# Streams


@pytest.mark.parametrize("end", ["read", "close", "error", "cancel"])
async def test_an_asynchronous_stream_holds_its_slot_until_it_ends(end, small):
    if end == "error":
        with pytest.raises(ValueError, match="poisoned"):
            await consume(small.astream("poison"))
    elif end == "cancel":
        small.inner.gate = asyncio.Event()
        task = asyncio.create_task(consume(small.astream("q")))
        await settle()
        assert small.admission.stats().running == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        stream = small.astream("q")
        await anext(stream)
        assert small.admission.stats().running == 1
        if end == "read":
            await consume(stream)
        else:
            await stream.aclose()
    assert idle(small)
    assert small.inner.open_streams == []


@pytest.mark.parametrize("end", ["read", "close", "drop", "error"])
def test_a_stream_holds_its_slot_until_it_ends(end, small):
    if end == "error":
        with pytest.raises(ValueError, match="poisoned"):
            list(small.stream("poison"))
    else:
        stream = small.stream("q")
        next(stream)
        assert small.admission.stats().running == 1
        if end == "read":
            list(stream)
        elif end == "close":
            stream.close()
        del stream
    assert idle(small)
    assert small.inner.open_streams == []


def test_a_stream_that_is_never_read_takes_no_place(small):
    stream = small.stream("q")
    assert idle(small)
    del stream


async def test_calls_between_two_pieces_of_a_stream_need_a_slot_of_their_own(small):
    stream = small.astream("q")
    await anext(stream)
    other = asyncio.create_task(small.ainvoke("r"))
    await settle()
    assert (small.admission.stats().running, small.admission.stats().waiting) == (1, 1)
    await stream.aclose()
    async with asyncio.timeout(LONG_S):
        await other
    assert idle(small)


async def test_a_model_without_streaming_streams_one_piece():
    wrapper = BatchingChatModel(Plain(), max_concurrency=1, max_waiting=0)
    assert [c.content for c in await consume(wrapper.astream("q"))] == ["answer 1 to q"]
    assert [c.content for c in await asyncio.to_thread(lambda: list(wrapper.stream("q")))] == ["answer 2 to q"]
    assert idle(wrapper)


# Deadlines


@pytest.mark.row(98)
async def test_a_deadline_ends_waiting_and_running(small):
    late = BatchingChatModel(small.inner, max_concurrency=1, deadline_s=0.01)
    held = late.admission.enter()
    async with asyncio.timeout(LONG_S):
        with pytest.raises(AegisDeadlineError):
            await late.ainvoke("q")
        with pytest.raises(AegisDeadlineError):
            await asyncio.to_thread(late.invoke, "q")
        assert late.inner.calls == []
        held.leave()
        late.inner.gate = asyncio.Event()
        with pytest.raises(AegisDeadlineError):
            await late.ainvoke("q")
        with pytest.raises(AegisDeadlineError):
            await consume(late.astream("q"))
        late.inner.temperature = 0
        with pytest.raises(AegisDeadlineError):
            await late.ainvoke("q")
        await settle()
    assert idle(late)


@pytest.mark.parametrize("temperature", [0, 0.7])
async def test_a_thread_leaves_at_its_deadline_and_the_slot_stays_taken_until_the_model_answers(temperature):
    gate = threading.Event()
    wrapper = BatchingChatModel(Fake(gate=gate, temperature=temperature), deadline_s=0.05)
    async with asyncio.timeout(LONG_S):
        with pytest.raises(AegisDeadlineError):
            await asyncio.to_thread(wrapper.invoke, "q")
        assert wrapper.admission.stats().running == 1
        gate.set()
        await until(lambda: idle(wrapper))


# Threads, loops, forks


@pytest.mark.row(101, 103)
def test_two_loops_and_64_threads_on_one_instance():
    wrapper = BatchingChatModel(Fake(), max_concurrency=3, max_waiting=10_000)

    async def many():
        async with asyncio.timeout(LONG_S):
            return await asyncio.gather(*(wrapper.ainvoke(f"a {i}") for i in range(100)))

    with ThreadPoolExecutor(66) as pool:
        loops = [pool.submit(asyncio.run, many()) for _ in range(2)]
        threads = [pool.submit(wrapper.invoke, f"s {i}") for i in range(64)]
        answers = [a for loop in loops for a in loop.result(LONG_S)] + [t.result(LONG_S) for t in threads]
    assert len({a.content for a in answers}) == 264
    assert wrapper.admission.stats().served == 264
    assert idle(wrapper)


@pytest.mark.row(102)
def test_fifty_loops_in_a_row_without_a_warning():
    wrapper = BatchingChatModel(Fake(temperature=0))

    async def many():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: pytest.fail(str(context)))
        await asyncio.gather(*(wrapper.ainvoke("same") for _ in range(5)), wrapper.abatch(["a", "b"]))
        stream = wrapper.astream("left open")
        await anext(stream)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(50):
            asyncio.run(many())
    assert len(wrapper.inner.calls) == 50 * 4
    assert idle(wrapper)
    assert seats(wrapper) == 0


@pytest.mark.row(104)
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_blocking_call_inside_a_running_loop_ends(temperature):
    """All slots are held by tasks of the loop that the call blocks."""
    gate = asyncio.Event()
    wrapper = BatchingChatModel(Fake(temperature=temperature, gate=gate), max_concurrency=1)

    async def main():
        task = asyncio.create_task(wrapper.ainvoke("q"))
        await settle()
        assert wrapper.invoke("q").content
        assert len(wrapper.batch(["a", "b"])) == 2
        assert list(wrapper.stream("q"))
        gate.set()
        await task

    asyncio.run(asyncio.wait_for(main(), LONG_S))
    assert idle(wrapper)


def test_a_wrapper_that_was_used_can_be_pickled():
    """A process that is spawned has slots of its own."""
    wrapper = BatchingChatModel(Fake(), max_concurrency=3)
    assert wrapper.invoke("q").content
    held = wrapper.admission.enter()
    again = pickle.loads(pickle.dumps(wrapper))  # noqa: S301 (our own bytes)
    held.leave()
    assert (again.admission.max_concurrency, again.admission.stats().running) == (3, 0)
    assert again.invoke("q").content


@pytest.mark.row(105)
@pytest.mark.parametrize("factory", [None, *filter(None, [getattr(asyncio, "eager_task_factory", None)])])
def test_any_task_factory(factory):
    wrapper = BatchingChatModel(Fake(temperature=0), max_concurrency=2)

    async def main():
        asyncio.get_running_loop().set_task_factory(factory)
        tasks = [asyncio.create_task(wrapper.ainvoke(f"q {i % 3}")) for i in range(30)]
        return await asyncio.gather(*tasks)

    assert len(asyncio.run(asyncio.wait_for(main(), LONG_S), debug=True)) == 30
    assert idle(wrapper)


@pytest.mark.row(91)
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32))
def test_whoever_stays_is_answered(seed):
    """Calls, streams and batches, some shared, some failing, cancelled at random: no slot is lost."""
    rng = random.Random(seed)
    wrapper = BatchingChatModel(Fake(temperature=rng.choice([0, 0.7])), max_concurrency=rng.randint(1, 3))

    async def main():
        tasks = []
        for _ in range(60):
            prompt = rng.choice(["a", "b", f"{rng.random()}", "poison"])
            action = rng.randrange(6)
            if action == 0:
                tasks.append(asyncio.create_task(consume(wrapper.astream(prompt))))
            elif action == 1:
                tasks.append(asyncio.create_task(wrapper.abatch([prompt] * 3, return_exceptions=True)))
            elif action <= 3:
                tasks.append(asyncio.create_task(wrapper.ainvoke(prompt)))
            elif tasks and action == 4:
                rng.choice(tasks).cancel()
            else:
                await asyncio.sleep(0)
        async with asyncio.timeout(LONG_S):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        await settle()
        return results

    for result in asyncio.run(main()):
        assert isinstance(result, AIMessage | list | ValueError | asyncio.CancelledError)
    assert wrapper.inner._now == 0
    assert idle(wrapper)
    assert seats(wrapper) == 0


# Any Runnable


async def test_a_runnable_is_bounded_and_a_batch_of_it_waits():
    gate = asyncio.Event()

    async def work(x):
        await gate.wait()
        return x * 2

    wrapper = BatchingRunnable(RunnableLambda(work), max_concurrency=2, max_waiting=3)
    tasks = [asyncio.create_task(wrapper.ainvoke(i)) for i in range(10)]
    await settle()
    gate.set()
    async with asyncio.timeout(LONG_S):
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [r for r in results if isinstance(r, int)] == [0, 2, 4, 6, 8]
        assert sum(isinstance(r, AegisOverloadedError) for r in results) == 5
        assert await wrapper.abatch(list(range(100))) == [i * 2 for i in range(100)]
        chain = RunnableLambda(lambda x: x + 1) | wrapper
        assert await chain.abatch(list(range(50))) == [(i + 1) * 2 for i in range(50)]
    assert idle(wrapper)


@pytest.mark.row(112)
def test_a_function_is_called_from_threads_with_its_callers_context_and_config():
    seen = []

    def work(x, config):
        seen.append((who.get(), config["tags"]))
        return x

    wrapper = batching(RunnableLambda(work), max_concurrency=1)
    who.set("alice")
    assert wrapper.invoke(1, {"tags": ["t"]}) == 1
    assert wrapper.batch([1, 2, 3]) == [1, 2, 3]
    assert seen == [("alice", ["t"])] + [("alice", [])] * 3
    assert batching(lambda x: x + 1).invoke(1) == 2


@pytest.mark.parametrize("end", ["read", "close"])
async def test_a_runnables_stream_holds_its_slot(end):
    async def pieces(xs):
        for i in range(3):
            yield i

    wrapper = BatchingRunnable(pieces, max_concurrency=1, max_waiting=0)
    stream = wrapper.astream(1)
    assert await anext(stream) == 0
    with pytest.raises(AegisOverloadedError):
        await anext(wrapper.astream(1))
    if end == "read":
        assert await consume(stream) == [1, 2]
    else:
        await stream.aclose()
    assert idle(wrapper)


async def test_a_key_merges_within_a_tenant_and_a_configuration():
    gate, calls = asyncio.Event(), []

    async def work(x, config):
        calls.append((x, who.get(), config.get("configurable", {}).get("k")))
        await gate.wait()
        return [x]

    wrapper = BatchingRunnable(work, key=str.lower)

    def ask(x, scope=None, **configurable):
        async def run():
            who.set("somebody")
            with aegis_scope(**scope or {}):
                return await wrapper.ainvoke(x, {"configurable": configurable})

        return run

    asks = [ask("A"), ask("a"), ask("b"), ask("a", {"tenant": "t"}), ask("a", k=1), ask("A", k=1)]
    results = await merged(*asks, gate=gate)
    assert calls == [("A", "nobody", None), ("b", "nobody", None), ("a", "nobody", None), ("a", "nobody", 1)]
    assert results == [["A"], ["A"], ["b"], ["a"], ["a"], ["a"]]
    results[0].append(1)
    assert results[1] == ["A"]
    assert idle(wrapper)


# Choosing


def test_batching_picks_the_wrapper():
    class Vectors(BatchingEmbeddings):
        def __init__(self):
            pass

    assert type(batching(Fake(), max_waiting=7)) is BatchingChatModel
    assert type(batching(Vectors())) is BatchingEmbeddings
    assert type(batching(RunnableLambda(len))) is BatchingRunnable
    assert type(batching(len)) is BatchingRunnable
    for wrong in (3, "x", None, Fake):
        with pytest.raises(AegisConfigError, match="chat model, Embeddings, a Runnable or a function"):
            batching(wrong)


@pytest.mark.parametrize("wrap", [lambda **k: BatchingChatModel(Fake(), **k), lambda **k: BatchingRunnable(len, **k)])
def test_bad_bounds_are_refused_at_once(wrap):
    for name, bad in {
        "max_concurrency": 0,
        "max_waiting": -1,
        "window_ms": -5,
        "max_batch": 0,
        "deadline_s": 0,
    }.items():
        with pytest.raises(AegisConfigError, match=name):
            wrap(**{name: bad})
        with pytest.raises(AegisConfigError, match=name):
            wrap(**{name: "many"})
    assert wrap(window_ms=0, max_waiting=0, deadline_s=None).window_ms == 0


def test_the_wrong_thing_inside_is_refused_with_advice():
    with pytest.raises(AegisConfigError, match="chat model"):
        BatchingChatModel(len)
    with pytest.raises(AegisConfigError, match="Runnable"):
        BatchingRunnable(3)
    with pytest.raises(AegisConfigError, match="Embeddings"):
        BatchingEmbeddings(Fake())


class Quiet(AsyncCallbackHandler):
    """An asynchronous handler that wants no tokens."""


async def test_a_handler_that_wants_no_tokens_does_not_prevent_sharing():
    wrapper = BatchingChatModel(Fake(temperature=0))
    await asyncio.gather(*(wrapper.ainvoke("q", {"callbacks": [Quiet()]}) for _ in range(3)))
    assert len(wrapper.inner.calls) == 1
