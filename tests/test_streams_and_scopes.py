"""A stream belongs to whoever took its first step, whatever happens before its last."""

import asyncio
import uuid

import pytest

from langchain_aegis import AegisSemanticCache, ChatAegis, aegis_scope, was_cached
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
    assert model.cache.stats().not_stored == {"invalidated": 1}
    await model.cache.aclose()


def test_sources_named_while_a_stream_is_read_belong_to_its_answer(model):
    with aegis_scope(tenant="a", sources=["loans.md"]):
        list(model.stream(QUESTION))
    assert hit(model, "a")
    assert model.cache.invalidate(sources=["loans.md"]) == 1
    assert not hit(model, "a")
