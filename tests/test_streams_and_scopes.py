"""A stream is that of the scope it was made in, else its first reader's, whatever happens before its last step."""

import asyncio
import contextlib
import inspect
import uuid

import pytest
from caches import stats_of
from langchain_core.messages import AIMessageChunk
from langchain_core.runnables import RunnableLambda

from langchain_aegis import AegisSemanticCache, BatchingChatModel, ChatAegis, aegis_scope, was_cached
from langchain_aegis.notices import forget_warnings
from langchain_aegis.testing import ScriptedOllama

QUESTION = "How long may I keep a book?"


@pytest.fixture
def server():
    with ScriptedOllama() as server:
        yield server


@pytest.fixture
def model(server, redis_url):
    with AegisSemanticCache(redis_url, namespace=f"s{uuid.uuid4().hex[:8]}", op_budget_s=5) as cache:
        cache._engine.embedder._make = lambda: None  # the exact tier is enough here
        yield ChatAegis("scripted", base_url=server.base_url, temperature=0, cache=cache)
        asyncio.run(cache.aclose())


def hit(model, tenant):
    with aegis_scope(tenant=tenant):
        return was_cached(model.invoke(QUESTION)) is not None


async def finish(stream, tenant):
    with aegis_scope(tenant=tenant):
        async for _ in stream:
            pass


async def test_an_async_stream_that_another_tenant_reads_to_its_end_stays_the_first_ones(model):
    stream = model.astream(QUESTION)
    with aegis_scope(tenant="a"):
        await anext(stream)
    await asyncio.create_task(finish(stream, "b"))
    found = await asyncio.to_thread(lambda: (hit(model, "a"), hit(model, "b")))
    assert found == (True, False)
    await model.cache.aclose()


def test_a_stream_that_another_tenant_reads_to_its_end_stays_the_first_ones(model):
    stream = model.stream(QUESTION)
    with aegis_scope(tenant="a"):
        next(stream)
    with aegis_scope(tenant="b"):
        list(stream)
    assert (hit(model, "a"), hit(model, "b")) == (True, False)


async def test_an_invalidation_wins_over_a_stream_that_another_task_reads_to_its_end(model):
    stream = model.astream(QUESTION)
    with aegis_scope(tenant="a"):
        await anext(stream)
    await model.cache.ainvalidate(tenant="a")
    await asyncio.create_task(finish(stream, "a"))
    assert stats_of(model.cache).not_stored == {"invalidated": 1}
    await model.cache.aclose()


def test_sources_named_while_a_stream_is_read_belong_to_its_answer(model):
    with aegis_scope(tenant="a", sources=["loans.md"]):
        list(model.stream(QUESTION))
    assert hit(model, "a")
    assert model.cache.invalidate(sources=["loans.md"]) == 1
    assert not hit(model, "a")


# -- made inside a scope, read after it


async def _stream(model):
    return await asyncio.to_thread(list, model.stream(QUESTION))


async def _astream(model):
    stream = model.astream(QUESTION)

    async def read():
        return [chunk async for chunk in stream]

    return await asyncio.create_task(read())


def made_in(scope, make):
    """As `with aegis_scope(...): return StreamingResponse(model.astream(question))`."""
    with scope:
        return make()


@pytest.mark.parametrize("names", [{"tenant": "a"}, {"user": "u1"}, {"tenant": "a", "user": "u1"}])
async def test_a_stream_made_in_a_scope_and_read_after_it_is_that_scopes(model, server, names):
    other = {name: value + "x" for name, value in names.items()}
    for expected in (2, 2):
        for told in (names, other):
            chunks = made_in(aegis_scope(**told), lambda: model.astream(QUESTION))
            assert [chunk async for chunk in chunks]
        assert len(server.chats) == expected
    await model.cache.aclose()


def test_a_blocking_stream_made_in_a_scope_and_read_in_anothers_is_the_first_ones(model):
    stream = made_in(aegis_scope(tenant="a"), lambda: model.stream(QUESTION))
    with aegis_scope(tenant="b"):
        list(stream)
    assert (hit(model, "a"), hit(model, "b")) == (True, False)


async def test_events_made_in_a_scope_and_read_after_it_are_that_scopes(model):
    events = made_in(aegis_scope(tenant="a"), lambda: model.astream_events(QUESTION, version="v2"))
    assert [event async for event in events]
    found = await asyncio.to_thread(lambda: (hit(model, "a"), hit(model, "b")))
    assert found == (True, False)
    await model.cache.aclose()


async def test_a_stream_through_admission_made_in_a_scope_and_read_after_it_is_that_scopes(server, model):
    """The model inside looks into the cache, which it has in common with the wrapper, while it streams."""
    outer = BatchingChatModel(model, cache=model.cache)
    asked = []
    for tenant in ("a", "b"):
        steps = made_in(aegis_scope(tenant=tenant), lambda: outer.astream(QUESTION))
        assert [chunk async for chunk in steps]
        asked.append(len(server.chats))
        steps = made_in(aegis_scope(tenant=tenant), lambda: outer.stream(QUESTION))
        assert await asyncio.to_thread(list, steps)
        asked.append(len(server.chats))
    assert asked == [1, 1, 2, 2]
    await model.cache.aclose()


def test_what_is_sent_after_the_scope_holds_the_settings_of_the_scope(model, server):
    for _ in range(2):
        list(made_in(aegis_scope(tenant="a", cache="off"), lambda: model.stream(QUESTION)))
    assert len(server.chats) == 2
    assert stats_of(model.cache).stored == 0


def test_a_stream_that_is_never_read_is_nothing(model, server):
    made_in(aegis_scope(tenant="a"), lambda: model.stream(QUESTION)).close()
    made_in(aegis_scope(tenant="a"), lambda: model.astream(QUESTION))
    assert not server.chats


@pytest.mark.parametrize("kind", ["model", "admission"])
async def test_langchain_still_sees_generator_functions(model, kind):
    """It collects what such a function yields, and hands on what another one returns."""
    asked = model if kind == "model" else BatchingChatModel(model)
    assert inspect.isgeneratorfunction(asked.stream)
    assert inspect.isasyncgenfunction(asked.astream)
    assert list(inspect.signature(asked.stream).parameters) == ["input", "config", "stop", "kwargs"]
    assert isinstance(await asyncio.to_thread(RunnableLambda(asked.stream).invoke, QUESTION), AIMessageChunk)
    assert isinstance(await RunnableLambda(asked.astream).ainvoke(QUESTION), AIMessageChunk)
    await model.cache.aclose()


# -- scopes that are mixed up


async def held(model, tenant, ask):
    with aegis_scope(tenant=tenant):
        while True:
            yield await ask(model)


async def _invoke(model):
    return [await model.ainvoke(QUESTION)]


@pytest.mark.parametrize("ask", [_invoke, _astream], ids=["ainvoke", "astream"])
async def test_generators_read_in_turn_bypass_the_cache_until_one_is_closed(model, server, ask, caplog):
    forget_warnings()
    async with contextlib.aclosing(held(model, "a", ask)) as first:
        await anext(first)
        async with contextlib.aclosing(held(model, "b", ask)) as second:
            await anext(second)
            stored = stats_of(model.cache).stored
            assert stored == len(server.chats) == 2
            await anext(first)
            await anext(first)
            assert len(server.chats) == 4
            assert stats_of(model.cache).stored == stored
            await anext(second)  # what runs is what entered the scope in force
            assert len(server.chats) == 4
        await anext(first)
        assert len(server.chats) == 4
    assert [r.getMessage().split(":")[0] for r in caplog.records].count("mixed_scopes") == 1
    assert "wrap" in caplog.text
    await model.cache.aclose()


@pytest.mark.row(59)
async def test_a_call_whose_config_names_another_tenant_than_the_scope_bypasses_the_cache(model, server, caplog):
    forget_warnings()
    config = {"configurable": {"tenant_id": "b"}}
    for _ in range(2):
        with aegis_scope(tenant="a"):
            await model.ainvoke(QUESTION, config)
            assert [chunk async for chunk in model.astream(QUESTION, config)]
    assert len(server.chats) == 4
    assert stats_of(model.cache).stored == 0
    assert stats_of(model.cache).reasons["bad_identity"] >= 4
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["bad_identity"]
    await model.cache.aclose()
