"""In which order ChatAegis' calls reach a busy server."""

import asyncio
import threading

import pytest

from langchain_aegis import ChatAegis, aegis_scope
from langchain_aegis.admission import Admission
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.testing import ScriptedOllama

CONTEXT = "The desk lends books for four weeks, and films for one. " * 60
DEADLINE_S = 30


@pytest.fixture
def own_server():
    """A server of the test's own: bounds are kept by address."""
    with ScriptedOllama() as server:
        yield server


def asked(server):
    return [chat["messages"][-1]["content"][-1] for chat in server.chats]


async def settled(admission: Admission, waiting: int):
    async with asyncio.timeout(DEADLINE_S):
        while (stats := admission.stats()).waiting_bulk != waiting:  # noqa: ASYNC110  # nothing tells of it
            await asyncio.sleep(0)
    return stats


async def ordered(server, model, *calls):
    """Return the last characters of the prompts, as they reached the server while it had one slot."""
    with server.hold():
        tasks = []
        for n, call in enumerate(calls):
            tasks.append(asyncio.create_task(call()))
            await settled(model._admission, n if n else 0)
            if not n:
                await asyncio.to_thread(server.wait_until, lambda each: each.waiting == 1)
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*tasks)
    return asked(server)


async def test_single_calls_go_before_items_of_a_batch(own_server):
    model = ChatAegis("scripted", base_url=own_server.base_url, max_concurrency=1)
    with own_server.hold():
        first = asyncio.create_task(model.ainvoke("0"))
        await asyncio.to_thread(own_server.wait_until, lambda each: each.waiting == 1)
        batch = asyncio.create_task(model.abatch(["a", "b", "c"]))
        await settled(model._admission, 3)
        single = asyncio.create_task(model.ainvoke("1"))
        await settled(model._admission, 4)
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(first, batch, single)
    assert asked(own_server) == ["0", "1", "a", "b", "c"]


def test_items_of_a_batch_in_threads_wait_likewise(own_server):
    model = ChatAegis("scripted", base_url=own_server.base_url, max_concurrency=1)
    with own_server.hold():
        threads = [threading.Thread(target=model.invoke, args=("0",))]
        threads[0].start()
        own_server.wait_until(lambda each: each.waiting == 1)
        threads.append(threading.Thread(target=model.batch, args=(["a", "a"],)))
        threads[1].start()
        asyncio.run(settled(model._admission, 2))
        threads.append(threading.Thread(target=model.invoke, args=("1",)))
        threads[2].start()
        asyncio.run(settled(model._admission, 3))
    for thread in threads:
        thread.join(DEADLINE_S)
    assert asked(own_server) == ["0", "1", "a", "a"]


async def test_calls_with_the_same_context_follow_each_other(own_server):
    model = ChatAegis("scripted", base_url=own_server.base_url, max_concurrency=1)
    other = CONTEXT.replace("desk", "shop")
    texts = [f"{CONTEXT if n % 2 else other}{n}" for n in range(6)]
    order = await ordered(own_server, model, *[lambda text=text: model.ainvoke(text) for text in texts])
    assert order == ["0", "2", "4", "1", "3", "5"]


async def test_without_a_window_they_run_as_they_came(own_server, monkeypatch):
    monkeypatch.setenv("BATCH_WINDOW_MS", "0")
    model = ChatAegis("scripted", base_url=own_server.base_url, max_concurrency=1)
    other = CONTEXT.replace("desk", "shop")
    texts = [f"{CONTEXT if n % 2 else other}{n}" for n in range(6)]
    order = await ordered(own_server, model, *[lambda text=text: model.ainvoke(text) for text in texts])
    assert order == list("012345")


async def test_calls_that_need_the_same_runner_follow_each_other(own_server):
    small, large = (
        ChatAegis("scripted", base_url=own_server.base_url, max_concurrency=1, num_ctx=window, on_reload="allow")
        for window in (2048, 4096)
    )
    order = await ordered(
        own_server, small, *[lambda n=n: (large if n % 2 else small).ainvoke(str(n)) for n in range(6)]
    )
    assert order == ["0", "2", "4", "1", "3", "5"]


async def test_tenants_take_turns(own_server):
    model = ChatAegis("scripted", base_url=own_server.base_url, max_concurrency=1)

    async def call(tenant, text):
        with aegis_scope(tenant=tenant):
            await model.ainvoke(text)

    calls = [("a", "0"), ("a", "1"), ("a", "2"), ("a", "3"), ("b", "x"), ("b", "y")]
    order = await ordered(own_server, model, *[lambda call_=each: call(*call_) for each in calls])
    assert order == ["0", "1", "x", "2", "y", "3"]


async def test_the_counts_are_kept_by_model_and_tenant(own_server):
    model = ChatAegis("scripted", base_url=own_server.base_url)
    with aegis_scope(tenant="acme"):
        await model.ainvoke("hello")
    (row,) = model._admission.stats().rows
    assert (row.model, row.tenant, row.served) == ("scripted:latest", "acme", 1)


def test_a_window_that_is_none_is_refused_when_the_model_is_made(monkeypatch):
    monkeypatch.setenv("BATCH_WINDOW_MS", "-1")
    with pytest.raises(AegisConfigError, match="window_ms"):
        ChatAegis("scripted")
