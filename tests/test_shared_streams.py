"""Streams are shared like any other call: one call of the model, and each reader's stream is whole and its own."""

import asyncio
import gc
import itertools
import threading
import uuid
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_ollama import ChatOllama

from langchain_aegis import AegisConfigError, AegisSemanticCache, BatchingChatModel, ChatAegis, aegis_scope, was_cached
from langchain_aegis.copies import CHAT_FORMS, pieces, twin_of_chunk, whole
from langchain_aegis.errors import AegisDeadlineError, AegisOverloadedError, AegisStreamError
from langchain_aegis.merging import chat_flights
from langchain_aegis.pulses import Pulse
from langchain_aegis.testing import ScriptedOllama

LONG_S = 20.0
WORDS = ("one ", "two ", "three ", "four ")
TEXT = "".join(WORDS)
USAGE = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}
DONE = {"done_reason": "stop", "model_name": "steps"}


class Steps(BaseChatModel):
    """Streams four words, each one when it has been allowed; counts calls, and streams that were left early."""

    temperature: float = 0
    allowed: Any = None  # a threading.Semaphore; None: no waiting
    fails_after: int | None = None
    calls: list
    left: list
    model_id: str | None = None

    def __init__(self, **arguments):
        super().__init__(**{"calls": [], "left": [], **arguments})

    @property
    def _llm_type(self):
        return "steps"

    @property
    def _identifying_params(self):
        return {"temperature": self.temperature}

    def allow(self, steps=4):
        self.allowed.release(steps)

    def _result(self):
        message = AIMessage(TEXT, usage_metadata=USAGE)
        return ChatResult(generations=[ChatGeneration(message=message, generation_info=dict(DONE))])

    def _chunk(self, i):
        if self.fails_after == i:
            raise ValueError("the model failed")
        last = i == len(WORDS) - 1
        message = AIMessageChunk(WORDS[i], usage_metadata=USAGE if last else None, id=self.model_id)
        return ChatGenerationChunk(message=message, generation_info=dict(DONE) if last else None)

    def _wait(self):
        if self.allowed is not None:
            assert self.allowed.acquire(timeout=LONG_S)

    async def _await(self):
        await asyncio.sleep(0)
        while self.allowed is not None and not self.allowed.acquire(blocking=False):  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        self.calls.append("generate")
        for _ in WORDS:
            self._wait()
        return self._result()

    async def _agenerate(self, messages, stop=None, run_manager=None, **kwargs):
        self.calls.append("agenerate")
        for _ in WORDS:
            await self._await()
        return self._result()

    def _stream(self, messages, stop=None, run_manager=None, **kwargs):
        self.calls.append("stream")
        try:
            for i in range(len(WORDS)):
                self._wait()
                yield self._chunk(i)
        except GeneratorExit:
            self.left.append("stream")
            raise

    async def _astream(self, messages, stop=None, run_manager=None, **kwargs):
        self.calls.append("astream")
        try:
            for i in range(len(WORDS)):
                await self._await()
                yield self._chunk(i)
        except (GeneratorExit, asyncio.CancelledError):
            self.left.append("astream")
            raise


def slow(**arguments):
    return BatchingChatModel(Steps(allowed=threading.Semaphore(0), **arguments))


async def collect(stream):
    return [chunk async for chunk in stream]


def text_of(chunks):
    return "".join(chunk.content for chunk in chunks)


async def until(condition):
    async with asyncio.timeout(LONG_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def idle(wrapper):
    await until(lambda: (s := wrapper.admission.stats()).running == s.waiting == len(chat_flights) == 0)


WAYS = {
    "ainvoke": lambda m, **k: m.ainvoke("q", **k),
    "invoke": lambda m, **k: asyncio.to_thread(m.invoke, "q", **k),
    "astream": lambda m, **k: collect(m.astream("q", **k)),
    "stream": lambda m, **k: asyncio.to_thread(lambda: list(m.stream("q", **k))),
    "ainvoke elsewhere": lambda m, **k: asyncio.to_thread(lambda: asyncio.run(m.ainvoke("q", **k))),
    "astream elsewhere": lambda m, **k: asyncio.to_thread(lambda: asyncio.run(collect(m.astream("q", **k)))),
}


def summed(answer):
    if isinstance(answer, list):
        total = answer[0]
        for chunk in answer[1:]:
            total += chunk
        return total
    return answer


# One call


@pytest.mark.parametrize("second", WAYS)
@pytest.mark.parametrize("first", WAYS)
async def test_whoever_comes_second_shares_the_first_ones_call(first, second):
    """All ways of calling, in threads and two loops: the same text, usage and metadata, and ids of their own."""
    wrapper = slow()
    one = asyncio.create_task(WAYS[first](wrapper))
    await until(lambda: wrapper.inner.calls)
    wrapper.inner.allow(1)
    other = asyncio.create_task(WAYS[second](wrapper))
    await until(lambda: chat_flights.seats == 2)
    wrapper.inner.allow(3)
    async with asyncio.timeout(LONG_S):
        answers = [summed(a) for a in await asyncio.gather(one, other)]
    assert len(wrapper.inner.calls) == 1
    assert wrapper.admission.stats().merged == 1
    for answer in answers:
        assert (answer.content, answer.usage_metadata, dict(answer.response_metadata)) == (TEXT, USAGE, DONE)
    assert len({answer.id for answer in answers}) == 2
    await idle(wrapper)


@pytest.mark.parametrize("opener", ["ainvoke", "invoke", "astream", "stream"])
@pytest.mark.slow
async def test_a_thousand_mixed_callers_make_one_call(opener):
    wrapper = slow()
    with ThreadPoolExecutor(120) as pool:
        loop = asyncio.get_running_loop()

        def call(i):
            if i % 10 == 0:
                return loop.run_in_executor(pool, wrapper.invoke, "q")
            if i % 10 == 1 and i < 100:
                return loop.run_in_executor(pool, lambda: list(wrapper.stream("q")))
            return asyncio.ensure_future(wrapper.ainvoke("q") if i % 2 else collect(wrapper.astream("q")))

        first = asyncio.ensure_future(WAYS[opener](wrapper))
        await until(lambda: wrapper.inner.calls)
        others = [call(i) for i in range(999)]
        await until(lambda: chat_flights.seats >= 1_000)
        wrapper.inner.allow()
        async with asyncio.timeout(LONG_S):
            answers = await asyncio.gather(first, *others)
    assert {summed(answer).content for answer in answers} == {TEXT}
    assert len({summed(answer).id for answer in answers}) == 1_000
    assert len(wrapper.inner.calls) == 1
    assert wrapper.admission.stats().merged == 999
    await idle(wrapper)


async def test_a_late_reader_gets_what_there_is_at_once_and_then_the_rest():
    wrapper = slow()
    early = wrapper.astream("q")
    wrapper.inner.allow(2)
    async with asyncio.timeout(LONG_S):
        assert [(await anext(early)).content for _ in range(2)] == ["one ", "two "]
        late = wrapper.astream("q")
        assert [(await anext(late)).content for _ in range(2)] == ["one ", "two "]  # nothing more was produced
        wrapper.inner.allow(2)
        assert text_of(await collect(late)) == text_of(await collect(early)) == "three four "
    assert wrapper.inner.calls == ["astream"]
    await idle(wrapper)


def test_late_threads_get_what_there_is_and_read_on_by_themselves():
    """No thread is needed beside the readers' own: whoever needs the next chunk reads it."""
    wrapper, before = slow(), threading.active_count()
    early = wrapper.stream("q")
    wrapper.inner.allow(2)
    assert next(early).content == "one "
    late = wrapper.stream("q")
    assert [next(late).content for _ in range(2)] == ["one ", "two "]
    wrapper.inner.allow(2)
    assert text_of(late) == "three four "
    assert threading.active_count() == before
    assert wrapper.admission.stats().running == 0  # the slow reader holds no slot
    assert text_of(early) == "two three four "
    assert wrapper.inner.calls == ["stream"]


async def test_a_reader_that_pauses_holds_up_nobody_and_no_slot():
    wrapper = slow()
    paused = wrapper.astream("q")
    wrapper.inner.allow()
    await anext(paused)
    async with asyncio.timeout(LONG_S):
        assert text_of(await collect(wrapper.astream("q"))) == TEXT
    await idle(wrapper)
    assert text_of(await collect(paused)) == "two three four "
    assert wrapper.inner.calls == ["astream"]


@pytest.mark.row(121)
async def test_readers_share_no_object():
    wrapper = slow()

    async def spoils():
        async for chunk in wrapper.astream("q"):
            assert chunk.content in (*WORDS, "")
            chunk.content += "spoilt"
            chunk.response_metadata["spoilt"] = True
            if chunk.usage_metadata:
                assert chunk.usage_metadata == USAGE
                chunk.usage_metadata["input_tokens"] = 99

    tasks = [asyncio.create_task(spoils()) for _ in range(3)]
    await until(lambda: chat_flights.seats == 3)
    wrapper.inner.allow()
    await asyncio.gather(*tasks)
    assert wrapper.inner.calls == ["astream"]


async def test_the_opener_keeps_the_models_id_and_others_have_their_runs():
    wrapper = slow(model_id="of-the-model")
    run = uuid.uuid4()
    first = asyncio.create_task(collect(wrapper.astream("q")))
    await until(lambda: wrapper.inner.calls)
    second = asyncio.create_task(collect(wrapper.astream("q", {"run_id": run})))
    await until(lambda: chat_flights.seats == 2)
    wrapper.inner.allow()
    assert summed(await first).id == "of-the-model"
    assert {chunk.id for chunk in await second} == {f"lc_run--{run}"}


# Who does not share


@pytest.mark.parametrize("way", ["astream", "stream"])
@pytest.mark.parametrize("reason", ["temperature", "off", "refresh", "cache=False"])
async def test_streams_that_may_differ_are_not_shared(way, reason):
    inner = Steps(allowed=threading.Semaphore(0), temperature=0.8 if reason == "temperature" else 0)
    wrapper = BatchingChatModel(inner, cache=False if reason == "cache=False" else None)
    with aegis_scope(cache=reason if reason in ("off", "refresh") else None):
        tasks = [asyncio.create_task(WAYS[way](wrapper)) for _ in range(2)]
        await until(lambda: len(inner.calls) == 2)
    inner.allow(2 * len(WORDS))
    async with asyncio.timeout(LONG_S):
        assert [text_of(chunks) for chunks in await asyncio.gather(*tasks)] == [TEXT] * 2
    await idle(wrapper)


async def test_a_stream_that_asks_no_cache_joins_none_that_did():
    """LangChain asks its cache for `invoke` alone; what that began before an invalidation is not for a stream."""
    set_llm_cache(InMemoryCache())
    try:
        wrapper = slow()
        tasks = [asyncio.create_task(WAYS[way](wrapper)) for way in ("ainvoke", "astream", "astream")]
        await until(lambda: chat_flights.seats == 3)
        wrapper.inner.allow(2 * len(WORDS))
        await asyncio.gather(*tasks)
        assert sorted(wrapper.inner.calls) == ["agenerate", "astream"]
    finally:
        set_llm_cache(None)


def test_one_batch_at_a_temperature_is_so_many_samples():
    wrapper = BatchingChatModel(Steps(temperature=0.8))
    wrapper.batch(["q"] * 5)
    assert len(wrapper.inner.calls) == 5


async def test_tenants_share_no_stream():
    wrapper = slow()
    tasks = []
    for tenant in ("a", "b"):
        with aegis_scope(tenant=tenant):
            tasks.append(asyncio.create_task(collect(wrapper.astream("q"))))
    await until(lambda: len(wrapper.inner.calls) == 2)
    wrapper.inner.allow(8)
    await asyncio.gather(*tasks)


async def test_a_blocking_stream_in_a_running_loop_shares_nothing():
    wrapper = slow()
    task = asyncio.create_task(collect(wrapper.astream("q")))
    await until(lambda: wrapper.inner.calls)
    wrapper.inner.allow(8)
    assert text_of(wrapper.stream("q")) == TEXT  # the loop stands still meanwhile
    async with asyncio.timeout(LONG_S):
        await task
    assert len(wrapper.inner.calls) == 2


# Leaving


@pytest.mark.parametrize("leaver", [0, 1, 2])
async def test_a_readers_leaving_hurts_nobody(leaver):
    wrapper = slow()
    tasks = [asyncio.create_task(WAYS[way](wrapper)) for way in ("astream", "ainvoke", "astream")]
    await until(lambda: chat_flights.seats == 3)
    wrapper.inner.allow(1)
    await until(lambda: wrapper.inner.allowed._value == 0)
    tasks[leaver].cancel()
    wrapper.inner.allow(3)
    async with asyncio.timeout(LONG_S):
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(answers.pop(leaver), asyncio.CancelledError)
    assert [summed(answer).content for answer in answers] == [TEXT] * 2
    assert (len(wrapper.inner.calls), wrapper.inner.left) == (1, [])
    await idle(wrapper)


@pytest.mark.row(92)
async def test_of_a_thousand_the_last_one_is_served():
    wrapper = slow()
    tasks = [asyncio.create_task(WAYS["astream" if i % 2 else "ainvoke"](wrapper)) for i in range(1_000)]
    await until(lambda: chat_flights.seats == 1_000)
    for task in tasks[:-1]:
        task.cancel()
    wrapper.inner.allow()
    async with asyncio.timeout(LONG_S):
        assert text_of(await tasks[-1]) == TEXT
    assert len(wrapper.inner.calls) == 1
    await idle(wrapper)


@pytest.mark.row(93)
@pytest.mark.parametrize("end", ["cancel", "aclose", "forget"])
async def test_when_all_are_gone_the_models_stream_is_closed(end):
    wrapper = slow()
    wrapper.inner.allow(1)
    if end == "cancel":
        tasks = [asyncio.create_task(collect(wrapper.astream("q"))) for _ in range(3)]
        await until(lambda: chat_flights.seats == 3)
        await until(lambda: wrapper.inner.allowed._value == 0)
        for task in tasks:
            task.cancel()
    else:
        streams = [wrapper.astream("q") for _ in range(3)]
        for stream in streams:
            await anext(stream)
        for stream in streams if end == "aclose" else ():
            await stream.aclose()
        if end == "aclose":
            assert wrapper.inner.left == ["astream"]  # at once, as without sharing
        del stream, streams
        gc.collect()
    await until(lambda: wrapper.inner.left == ["astream"])
    await idle(wrapper)


def test_when_all_threads_are_gone_the_models_stream_is_closed():
    wrapper = slow()
    wrapper.inner.allow(2)
    streams = [wrapper.stream("q") for _ in range(3)]
    for stream in streams:
        next(stream)
    for stream in streams[:2]:
        stream.close()
    assert wrapper.inner.left == []
    assert next(streams[2]).content == "two "
    streams[2].close()
    assert wrapper.inner.left == ["stream"]
    assert wrapper.admission.stats().running == 0


async def test_a_thread_that_opened_a_stream_may_leave_it_to_a_loop():
    wrapper = slow()
    wrapper.inner.allow(1)
    opened = wrapper.stream("q")
    await asyncio.to_thread(next, opened)
    task = asyncio.create_task(collect(wrapper.astream("q")))
    await until(lambda: chat_flights.seats == 2)
    await asyncio.to_thread(opened.close)
    wrapper.inner.allow(3)
    async with asyncio.timeout(LONG_S):
        assert text_of(await task) == TEXT
    assert wrapper.inner.calls == ["stream"]
    await idle(wrapper)


@pytest.mark.parametrize("way", ["stream", "astream"])
async def test_a_deadline_ends_one_readers_stream(way):
    inner = Steps(allowed=threading.Semaphore(0))
    patient, hasty = BatchingChatModel(inner), BatchingChatModel(inner, deadline_s=0.05)
    task = asyncio.create_task(WAYS["astream"](patient))
    await until(lambda: inner.calls)
    async with asyncio.timeout(LONG_S):
        with pytest.raises(AegisDeadlineError):
            await WAYS[way](hasty)
        inner.allow()
        assert text_of(await task) == TEXT
    assert len(inner.calls) == 1


# Errors


@pytest.mark.row(94)
@pytest.mark.parametrize("first", ["astream", "stream"])
async def test_a_failure_comes_to_each_reader_after_what_it_follows(first):
    wrapper = slow(fails_after=2)
    seen = []

    async def read():
        found = []
        seen.append(found)
        async for chunk in wrapper.astream("q"):
            found += [chunk.content]

    one = asyncio.create_task(WAYS[first](wrapper))
    await until(lambda: wrapper.inner.calls)
    others = [asyncio.create_task(read()) for _ in range(2)]
    whole_one = asyncio.create_task(wrapper.ainvoke("q"))
    await until(lambda: chat_flights.seats == 4)
    wrapper.inner.allow()
    errors = await asyncio.gather(one, whole_one, *others, return_exceptions=True)
    assert [str(error) for error in errors] == ["the model failed"] * 4
    assert len({id(error) for error in errors}) == 4
    assert seen == [["one ", "two "]] * 2
    assert len(wrapper.inner.calls) == 1
    wrapper.inner.fails_after = None
    wrapper.inner.allow()
    assert text_of(await WAYS["astream"](wrapper)) == TEXT  # a failed call is not joined
    await idle(wrapper)


async def test_a_full_queue_refuses_streams_that_can_join_nothing():
    inner = Steps(allowed=threading.Semaphore(0))
    wrapper = BatchingChatModel(inner, max_concurrency=1, max_waiting=0)
    task = asyncio.create_task(collect(wrapper.astream("q")))
    await until(lambda: inner.calls)
    with pytest.raises(AegisOverloadedError):
        await anext(wrapper.astream("another"))
    joins = asyncio.create_task(collect(wrapper.astream("q")))
    await until(lambda: chat_flights.seats == 2)
    inner.allow()
    assert text_of(await task) == text_of(await joins) == TEXT


# Loops that end or stand still


def test_when_the_loop_of_a_stream_ends_nobody_is_given_half_of_two_answers():
    """Who has read a part gets an error, who has read nothing a call of its own."""
    wrapper = slow()
    half, read, failed = threading.Event(), [], []

    def reads():
        try:
            for chunk in wrapper.stream("q"):
                read.append(chunk.content)
                half.set()
        except AegisStreamError as error:
            failed.append(error)

    async def opens():
        task = asyncio.create_task(collect(wrapper.astream("q")))
        await until(lambda: wrapper.inner.calls)
        threads = [threading.Thread(target=reads), threading.Thread(target=lambda: asked.append(wrapper.invoke("q")))]
        for thread in threads:
            thread.start()
        await until(lambda: chat_flights.seats == 3)
        wrapper.inner.allow(1)
        await until(half.is_set)
        task.cancel()  # the flight itself goes on, until the loop ends with this coroutine
        return threads

    asked = []
    threads = asyncio.run(opens())
    wrapper.inner.allow()
    for thread in threads:
        thread.join(LONG_S)
    assert read == ["one "]
    assert [error.partial for error in failed] == ["one "]
    assert failed[0].retryable
    assert asked[0].content == TEXT
    assert wrapper.inner.calls == ["astream", "generate"]


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("way", ["invoke", "stream", "asyncio.run"])
async def test_a_loop_that_waits_for_a_thread_is_not_waited_for(way, slots):
    """The thread would wait for a call that the blocked loop makes: it makes the call itself, slot or no slot."""
    inner = Steps(allowed=threading.Semaphore(0))
    wrapper = BatchingChatModel(inner, max_concurrency=slots)
    task = asyncio.create_task(wrapper.ainvoke("q"))
    await until(lambda: inner.calls)
    inner.allow()
    calls = {
        "invoke": lambda: wrapper.invoke("q").content,
        "stream": lambda: text_of(wrapper.stream("q")),
        "asyncio.run": lambda: asyncio.run(wrapper.ainvoke("q")).content,
    }
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(calls[way]).result(LONG_S) == TEXT
    inner.allow()
    async with asyncio.timeout(LONG_S):
        assert (await task).content == TEXT
    assert len(inner.calls) == 2
    await idle(wrapper)


def test_a_loop_that_is_busy_is_waited_for():
    """A thread that moves is not blocked: asked for a sign of life, it may take its time."""
    stop, ready, found = threading.Event(), threading.Event(), []

    async def busy():
        found.append(Pulse(asyncio.get_running_loop()))
        found[0]._seen -= 10  # long ago
        ready.set()
        numbers = itertools.count()
        while not stop.is_set():
            sum(next(numbers) for _ in range(100))

    thread = threading.Thread(target=asyncio.run, args=(busy(),))
    thread.start()
    assert ready.wait(LONG_S)
    pulse = found[0]
    try:
        assert not pulse.stopped()  # asks
        while not pulse._moved:
            pulse.stopped()
        pulse._asked -= 1.0
        assert not pulse.stopped()
        pulse._asked -= 2.0
        assert pulse.stopped()  # maybe it waits actively
    finally:
        stop.set()
        thread.join(LONG_S)
    assert pulse.stopped()  # over


async def test_a_loop_that_answers_is_alive():
    pulse = Pulse(asyncio.get_running_loop())
    pulse._seen -= 10
    assert not await asyncio.to_thread(pulse.stopped)
    await asyncio.sleep(0)
    await until(lambda: pulse._asked is None)
    assert pulse.due_s() > 0.1


# Callbacks


class Told(BaseCallbackHandler):
    """Notes what it is told, by run."""

    def __init__(self):
        self.starts, self.ends, self.tokens, self.texts = Counter(), Counter(), {}, {}

    def on_chat_model_start(self, serialized, messages, *, run_id, **kwargs):
        self.starts[run_id] += 1

    def on_llm_new_token(self, token, *, run_id, **kwargs):
        self.tokens.setdefault(run_id, []).append(token)

    def on_llm_end(self, response, *, run_id, **kwargs):
        self.ends[run_id] += 1
        self.texts[run_id] = response.generations[0][0].text


@pytest.mark.row(112)
@pytest.mark.parametrize("mode", ["async", "threads"])
async def test_each_reader_has_its_own_run_and_hears_each_token_once(mode):
    wrapper, handlers, ids = slow(), [Told() for _ in range(3)], [uuid.uuid4() for _ in range(3)]
    way = WAYS["astream" if mode == "async" else "stream"]
    tasks = [asyncio.create_task(way(wrapper, config={"callbacks": [handlers[i]], "run_id": ids[i]})) for i in range(3)]
    await until(lambda: chat_flights.seats == 3)
    wrapper.inner.allow()
    await asyncio.gather(*tasks)
    assert len(wrapper.inner.calls) == 1
    for handler, run in zip(handlers, ids, strict=True):
        assert handler.starts == handler.ends == {run: 1}
        assert [token for token in handler.tokens[run] if token] == list(WORDS)
        assert handler.texts == {run: TEXT}


async def test_events_of_two_readers_are_whole(loop_errors):
    wrapper = slow()
    tasks = [asyncio.create_task(collect(wrapper.astream_events("q", version="v2"))) for _ in range(2)]
    await until(lambda: chat_flights.seats == 2)
    wrapper.inner.allow()
    for events in await asyncio.gather(*tasks):
        pieces = [e["data"]["chunk"].content for e in events if e["event"] == "on_chat_model_stream"]
        assert "".join(pieces) == events[-1]["data"]["output"].content == TEXT
    assert len(wrapper.inner.calls) == 1


# Against a server


@pytest.fixture
def server():
    with ScriptedOllama("m", words=12) as server:
        yield server


def chat_ollama(server, **told):
    return ChatOllama(model="m", base_url=server.base_url, client_kwargs={"verify": False}, **told)


@pytest.mark.parametrize("make", [lambda s, **k: ChatAegis("m", base_url=s.base_url, **k), chat_ollama])
async def test_whole_and_streamed_answers_are_made_of_each_other(server, make):
    """What a caller of `ainvoke` gets of a stream, and a reader of a whole answer, is what a call of its own gives."""
    inner = make(server, temperature=0)
    alone = await inner.ainvoke("Where is the library?")
    streamed = [chunk async for chunk in inner._astream(_messages())]
    made = whole([twin_of_chunk(chunk, False) for chunk in streamed]).generations[0]
    assert made.message.content == alone.content
    assert made.message.usage_metadata == alone.usage_metadata
    metadata = {**(made.generation_info or {}), **made.message.response_metadata}
    assert metadata.keys() == alone.response_metadata.keys()
    again = whole(pieces(ChatResult(generations=[made])))
    assert again.generations[0].message == made.message
    await _close(inner)


def _messages():
    return ChatAegis("m")._convert_input("Where is the library?").to_messages()


async def _close(inner):
    if type(inner) is ChatOllama:
        inner._client._client.close()
        await inner._async_client._client.aclose()


async def test_tool_calls_survive(server):
    call = {"name": "f", "args": {"x": 1}, "id": "c", "type": "tool_call"}
    message = AIMessage("", tool_calls=[call])
    result = ChatResult(generations=[ChatGeneration(message=message)])
    assert whole(pieces(result)).generations[0].message.tool_calls == [call]
    blocks = AIMessage([{"type": "reasoning", "reasoning": "r"}, {"type": "text", "text": "t"}])
    result = ChatResult(generations=[ChatGeneration(message=blocks)])
    assert whole(pieces(result)).generations[0].message.content == blocks.content
    assert pieces(ChatResult(generations=[*result.generations] * 2)) is None
    with pytest.raises(ValueError, match="No generation chunks"):
        whole([])
    assert CHAT_FORMS.whole is whole


@pytest.mark.parametrize("make", [lambda s, **k: ChatAegis("m", base_url=s.base_url, **k), chat_ollama])
async def test_callers_whose_handlers_read_tokens_share_a_call(server, make):
    inner = make(server, temperature=0)
    wrapper, handlers = BatchingChatModel(inner), [Told() for _ in range(5)]
    answers = await asyncio.gather(*(wrapper.ainvoke("q", {"callbacks": [handler]}) for handler in handlers))
    assert len(server.chats) == 1
    for handler, answer in zip(handlers, answers, strict=True):
        (tokens,) = handler.tokens.values()
        assert "".join(tokens) == answer.content
        assert sum(map(bool, tokens)) > 5
    await _close(inner)


async def test_the_server_sees_that_all_have_gone():
    with ScriptedOllama("m", tokens_per_s=20, words=400) as server:
        wrapper = BatchingChatModel(ChatAegis("m", base_url=server.base_url, temperature=0))
        streams = [wrapper.astream("q") for _ in range(10)]
        async with asyncio.timeout(LONG_S):
            for stream in streams:
                await anext(stream)
            whole_one = asyncio.create_task(wrapper.ainvoke("q"))
            await until(lambda: chat_flights.seats == 11)
            for stream in streams:
                await stream.aclose()
            assert server.disconnects == 0
            whole_one.cancel()
            await until(lambda: server.disconnects == 1)
        assert len(server.chats) == 1
        await idle(wrapper)


# With a cache


@pytest.fixture
async def cache(redis_url):
    async with AegisSemanticCache(redis_url, namespace=f"f{uuid.uuid4().hex[:8]}", op_budget_s=5) as cache:
        cache._engine.embedder._make = lambda: None  # the exact tier is enough here
        yield cache


async def test_streams_are_looked_up_before_they_are_shared_and_kept_once_complete(server, cache):
    """At a temperature, too: all would get what the first one's answer is in the cache."""
    wrapper = BatchingChatModel(ChatAegis("m", base_url=server.base_url, temperature=0.8, cache=cache), cache=cache)
    answers = await asyncio.gather(*(collect(wrapper.astream("Where is it?")) for _ in range(5)))
    assert len({text_of(answer) for answer in answers}) == 1
    assert len(server.chats) == 1
    kept = await wrapper.ainvoke("Where is it?")
    assert was_cached(kept)
    assert kept.content == text_of(answers[0])
    held = [wrapper.admission.enter() for _ in range(104)]
    assert text_of(await collect(wrapper.astream("Where is it?"))) == kept.content  # no place is needed
    for ticket in held:
        ticket.leave()
    assert len(server.chats) == 1
    await idle(wrapper)


async def test_who_asks_after_an_invalidation_does_not_join_a_stream_from_before(cache):
    with ScriptedOllama("m", tokens_per_s=20, words=400) as server:
        wrapper = BatchingChatModel(ChatAegis("m", base_url=server.base_url, temperature=0, cache=cache), cache=cache)
        with aegis_scope(tenant="a"):
            before = wrapper.astream("Where is it?")
            await anext(before)
            await cache.ainvalidate(tenant="a")
            after = wrapper.astream("Where is it?")
            await anext(after)
        assert len(server.chats) == 2
        await before.aclose()
        await after.aclose()


# Loops and factories


@pytest.mark.row(102)
def test_fifty_loops_in_a_row_without_a_warning():
    wrapper = BatchingChatModel(Steps())

    async def many():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: pytest.fail(str(context)))
        found = await asyncio.gather(
            *(collect(wrapper.astream("same")) for _ in range(5)), *(wrapper.ainvoke("same") for _ in range(5))
        )
        assert {summed(a).content for a in found} == {TEXT}
        stream = wrapper.astream("left open")
        await anext(stream)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(50):
            asyncio.run(many())
        gc.collect()
    assert len(wrapper.inner.calls) == 50 * 2
    assert wrapper.admission.stats().running == chat_flights.seats == 0


@pytest.mark.row(105)
@pytest.mark.parametrize("factory", [None, *filter(None, [getattr(asyncio, "eager_task_factory", None)])])
def test_any_task_factory(factory):
    wrapper = BatchingChatModel(Steps())

    async def main():
        asyncio.get_running_loop().set_task_factory(factory)
        return await asyncio.gather(
            *(collect(wrapper.astream(f"q {i % 3}")) for i in range(15)), *(wrapper.ainvoke(f"q {i}") for i in range(3))
        )

    assert {summed(a).content for a in asyncio.run(asyncio.wait_for(main(), LONG_S), debug=True)} == {TEXT}
    assert wrapper.admission.stats().running == len(chat_flights) == 0


@settings(max_examples=12)
@given(st.data())
def test_whoever_stays_is_served_whole(data):
    """Readers in threads and in the loop come and go at random: each one that stays gets the whole answer."""
    wrapper = BatchingChatModel(Steps(), max_concurrency=data.draw(st.integers(1, 3)))
    steps = data.draw(st.lists(st.sampled_from([*WAYS, "cancel", "turn"]), min_size=5, max_size=25))

    async def main():
        tasks = []
        for step in steps:
            if step == "cancel" and tasks:
                tasks[data.draw(st.integers(0, len(tasks) - 1))].cancel()
            elif step in WAYS:
                tasks.append(asyncio.create_task(WAYS[step](wrapper)))
            else:
                await asyncio.sleep(0)
        async with asyncio.timeout(LONG_S):
            answers = await asyncio.gather(*tasks, return_exceptions=True)
        await idle(wrapper)
        return answers

    for answer in asyncio.run(main()):
        assert isinstance(answer, asyncio.CancelledError) or summed(answer).content == TEXT


# The window


def test_the_window_is_read_from_the_environment_once(monkeypatch):
    assert BatchingChatModel(Steps()).window_ms == 50
    monkeypatch.setenv("BATCH_WINDOW_MS", "7")
    wrapper = BatchingChatModel(Steps())
    monkeypatch.setenv("BATCH_WINDOW_MS", "wide")
    assert wrapper.window_ms == 7
    with pytest.raises(AegisConfigError, match="BATCH_WINDOW_MS"):
        BatchingChatModel(Steps())
    monkeypatch.delenv("BATCH_WINDOW_MS")
    assert BatchingChatModel(Steps(), window_ms=0, max_batch=3).window_ms == 0
