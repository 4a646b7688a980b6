"""A server gets no more calls of one process at once than it has slots, whoever makes them."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from langchain_aegis import AegisDeadlineError, BatchingChatModel, ChatAegis
from langchain_aegis.testing import ScriptedOllama


@pytest.fixture
def server():
    with ScriptedOllama(slots=16) as server:
        yield server


def model(server, **kwargs):
    return ChatAegis("scripted", base_url=server.base_url, temperature=0, cache=False, **kwargs)


async def astream(chat, prompt):
    return [chunk async for chunk in chat.astream(prompt)]


async def test_all_kinds_of_calls_of_all_models_share_the_slots(server):
    one, two = model(server, max_concurrency=3), model(server)
    calls = [two.ainvoke(f"awaited {i}") for i in range(6)] + [astream(one, f"streamed {i}") for i in range(6)]
    with ThreadPoolExecutor(6) as pool, server.hold():
        blocking = [pool.submit(one.invoke, f"blocking {i}") for i in range(6)]
        waiting = asyncio.gather(*calls)
        await server.await_until(lambda seen: len(seen.chats) == 3)
        server.release()
        assert all(await waiting)
        assert all([await asyncio.wrap_future(f) for f in blocking])
    assert server.counters.max_running <= 3
    assert len(server.chats) == 18


@pytest.mark.slow
async def test_a_long_batch_waits_for_its_turn_and_nothing_is_refused(server):
    answers = await model(server).abatch([f"item {i}" for i in range(300)])
    assert len({a.content for a in answers}) == 300
    assert server.counters.max_running <= 4


async def test_an_abandoned_stream_gives_its_slot_back(server):
    chat = model(server, max_concurrency=1)
    for _ in range(3):
        stream = chat.astream("tell me")
        await anext(stream)
        await stream.aclose()
    assert (await asyncio.wait_for(chat.ainvoke("still there?"), 10)).content


def test_a_reader_of_a_stream_may_call_the_model_in_between(server):
    chat = model(server, max_concurrency=1)
    answers = [chat.invoke(f"what is {i}?").content for i, _ in enumerate(chat.stream("tell me"))]
    assert len(answers) > 1


async def test_an_asynchronous_reader_may_too(server):
    chat = model(server, max_concurrency=1)
    answers = [(await chat.ainvoke("what?")).content async for _ in chat.astream("tell me")]
    assert len(answers) > 1


async def test_a_wrapper_and_its_model_take_one_slot_together(server):
    wrapped = BatchingChatModel(model(server, max_concurrency=1), max_concurrency=1)
    assert (await asyncio.wait_for(wrapped.ainvoke("once"), 10)).content
    assert await asyncio.wait_for(astream(wrapped, "streamed"), 10)


async def test_a_call_whose_time_is_up_before_its_turn_is_never_sent(server):
    chat = model(server, max_concurrency=1)
    with server.hold():
        first = asyncio.create_task(chat.ainvoke("first"))
        await server.await_until(lambda seen: len(seen.chats) == 1)
        with pytest.raises(AegisDeadlineError):
            await model(server, timeout=0.05).ainvoke("second")
    await first
    assert len(server.chats) == 1


def test_the_environment_sets_the_number_for_all(server, monkeypatch):
    monkeypatch.setenv("AEGIS_MAX_CONCURRENCY", "2")
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(model(server).invoke, [f"blocking {i}" for i in range(40)]))
    assert server.counters.max_running <= 2
