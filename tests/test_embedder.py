"""An embedder that only blocks is asked in threads of its own."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import pytest
from langchain_core.embeddings import Embeddings

from langchain_aegis.breaker import Unavailable
from langchain_aegis.embedder import Embedder

asks = ContextVar("asks", default="nobody")


class Blocking(Embeddings):
    def __init__(self, answer):
        self.embed_query = lambda text: answer()

    def embed_documents(self, texts):
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text):
        raise NotImplementedError


class Awaited(Blocking):
    async def aembed_query(self, text):
        return [2.0]


def embedder(embeddings, budget_s=20.0):
    made = Embedder(lambda: embeddings, budget_s=budget_s)
    made.get()
    return made


async def test_a_users_work_does_not_keep_the_embedder_waiting():
    busy, free = ThreadPoolExecutor(1), threading.Event()
    asyncio.get_running_loop().set_default_executor(busy)
    busy.submit(free.wait, 20)
    assert await embedder(Blocking(lambda: [1.0])).aembed("x") == [1.0]
    free.set()


async def test_the_embedder_sees_the_context_of_the_call():
    asks.set("me")
    seen = []
    await embedder(Blocking(lambda: seen.append(asks.get()) or [1.0])).aembed("x")
    assert seen == ["me"]


async def test_an_embedder_with_a_way_of_its_own_is_awaited():
    assert await embedder(Awaited(lambda: 1 / 0)).aembed("x") == [2.0]


async def test_what_an_embedder_raises_is_a_fault_at_once_and_not_a_delay():
    def stop():
        raise StopIteration

    for raises in (stop, lambda: 1 / 0):
        with pytest.raises(Unavailable, match="embedder_down"):
            await embedder(Blocking(raises)).aembed("x")


async def test_a_late_vector_can_still_be_had():
    free = threading.Event()
    with pytest.raises(Unavailable, match="embedder_slow") as caught:
        await embedder(Blocking(lambda: free.wait(20) and [3.0]), budget_s=0.01).aembed("x")
    assert not caught.value.late.done()
    free.set()
    assert await caught.value.late == [3.0]
