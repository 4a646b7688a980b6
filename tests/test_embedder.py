"""An embedder that only blocks is asked in threads of its own."""

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import pytest
from langchain_core.embeddings import Embeddings

from langchain_aegis import BatchingEmbeddings, budgets
from langchain_aegis.breaker import Unavailable
from langchain_aegis.embedder import Embedder, embedder_name

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


@pytest.mark.row(46)
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


def test_a_late_vector_can_still_be_had_by_who_blocks():
    free = threading.Event()
    with pytest.raises(Unavailable, match="embedder_slow") as caught:
        embedder(Blocking(lambda: free.wait(20) and [3.0]), budget_s=0.01).embed("x")
    assert not caught.value.late.done()
    free.set()
    assert caught.value.late.result(20) == [3.0]


def test_what_an_embedder_raises_late_is_told_late():
    free = threading.Event()
    with pytest.raises(Unavailable, match="embedder_slow") as caught:
        embedder(Blocking(lambda: free.wait(20) and 1 / 0), budget_s=0.01).embed("x")
    free.set()
    assert isinstance(caught.value.late.exception(20), ZeroDivisionError)


@pytest.mark.parametrize("error", [TimeoutError, StopIteration, ValueError])
def test_what_an_embedder_raises_is_a_fault_for_who_blocks(error):
    def answer():
        raise error

    with pytest.raises(Unavailable, match="embedder_down"):
        embedder(Blocking(answer)).embed("x")


def test_many_callers_get_their_own_vectors_from_a_few_threads():
    used, barrier = set(), threading.Barrier(32)

    class Numbers(Blocking):
        def embed_query(self, text):
            used.add(threading.current_thread())
            return [float(text)]

    numbers, wrong = Numbers(list), []
    del numbers.embed_query
    asked = embedder(numbers)

    def ask(at):
        barrier.wait(20)
        texts = [f"{at}.{i:03}" for i in range(200)]
        wrong.extend(text for text in texts if asked.embed(text) != [float(text)])

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert len(used) <= 8


@pytest.mark.row(46)
def test_what_hangs_costs_its_thread_and_not_the_others_their_answers():
    free = threading.Event()
    hanging, quick = embedder(Blocking(lambda: free.wait(60) and [1.0]), 0.01), embedder(Blocking(lambda: [2.0]))
    late = []
    for _ in range(4):  # fewer than open the breaker
        with pytest.raises(Unavailable, match="embedder_slow") as caught:
            hanging.embed("x")
        late.append(caught.value.late)
    assert quick.embed("x") == [2.0]
    free.set()
    assert [vector.result(20) for vector in late] == [[1.0]] * 4


def test_while_all_threads_hang_the_next_call_waits_for_its_turn():
    free = threading.Event()
    workers = budgets._Workers("hang")
    hanging = [budgets._Errand(free.wait) for _ in range(8)]
    for errand in hanging:
        workers.start(errand)
    last, dropped = budgets._Errand(lambda: "done"), budgets.Future()
    workers.start(last)
    workers.start(budgets._Errand(lambda: "never", dropped))
    assert dropped.cancel()
    free.set()
    assert last.result(20) == "done"
    workers.close()
    assert [errand.result(0) for errand in hanging] == [True] * 8
    with pytest.raises(RuntimeError):
        workers.start(last)


def test_an_idle_thread_keeps_no_question():
    class Text(str):
        pass

    text = Text("x")
    kept = weakref.ref(text)
    assert embedder(Blocking(lambda: [1.0])).embed(text) == [1.0]
    assert budgets._workers("embed") is budgets._workers("embed")
    assert embedder(Blocking(lambda: [2.0])).embed("y") == [2.0]  # the same thread: it has let go of the first
    del text
    gc.collect()
    assert kept() is None


def test_a_process_that_ends_waits_for_an_embedder_that_still_computes():
    program = """
import threading, time
from langchain_aegis.breaker import Unavailable
from langchain_aegis.budgets import Budget
begun = threading.Event()
def work():
    begun.set()
    time.sleep(0.3)
    print("computed", flush=True)
budget = Budget(0.01, name="embed", slow="slow", down="down", slow_notice="", down_notice="")
try:
    budget.run(work)
except Unavailable as late:
    print(late.reason, flush=True)
begun.wait(20)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.split() == ["slow", "computed"]


class Named(Blocking):
    def __init__(self, model):
        super().__init__(lambda: [1.0])
        self.model = model


class Handing(Named):
    """As langchain's CacheBackedEmbeddings."""

    def __init__(self, underlying_embeddings):
        super().__init__(None)
        self.underlying_embeddings = underlying_embeddings


@pytest.mark.parametrize(
    "wrap", [BatchingEmbeddings, Handing, lambda inner: Handing(BatchingEmbeddings(inner)), lambda inner: inner]
)
def test_vectors_of_two_models_have_two_names_whoever_hands_them_on(wrap):
    one, other = wrap(Named("one")), wrap(Named("other:latest"))
    assert (embedder_name(one), embedder_name(other)) == ("one", "other")


def test_a_wrapper_around_itself_has_a_name():
    odd = Named("odd")
    odd.inner = odd
    assert embedder_name(odd) == "odd"
