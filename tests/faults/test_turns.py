"""When a call is sent, and when its caller is told that it will not be: in milliseconds of a real clock."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
from conftest import wait_until
from langchain_core.embeddings import Embeddings
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda

from faults.measure import SLACK, no_collections, within
from faults.watch import no_tasks_left
from langchain_aegis import AegisDeadlineError, BatchingChatModel, BatchingEmbeddings, BatchingRunnable

pytestmark = pytest.mark.slow  # together

LONG_S = 30.0
DISPATCH_S = 0.010 * SLACK  # from where nothing holds a call up until it is sent
LATE_S = 0.020 * SLACK
DEADLINE_S = 0.1
WINDOW_MS = 50


class Vectors(Embeddings):
    """Notes when each request came, and of what; may be held up."""

    def __init__(self):
        self.came: list[tuple[float, list[str]]] = []
        self.gate: asyncio.Event | None = None  # awaited requests wait for it

    def embed_documents(self, texts):
        self.came.append((time.monotonic(), list(texts)))
        return [[float(text), 1.0] for text in texts]

    async def aembed_documents(self, texts):
        self.came.append((time.monotonic(), list(texts)))
        if self.gate is not None:
            await self.gate.wait()
        return [[float(text), 1.0] for text in texts]

    def embed_query(self, text):
        return self.embed_documents([text])[0]

    async def aembed_query(self, text):
        return (await self.aembed_documents([text]))[0]


def runnable(came, service_s=0.0, **bounds):
    def blocking(asked):
        came[asked] = time.monotonic()
        time.sleep(service_s)
        return asked

    async def awaited(asked):
        came[asked] = time.monotonic()
        await asyncio.sleep(service_s)
        return asked

    return BatchingRunnable(RunnableLambda(blocking, awaited), window_ms=WINDOW_MS, **bounds)


# -- row 97 -----------------------------------------------------------------------------------------------------------


@pytest.mark.row(97)
@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("how", ["tasks", "threads"])
def test_calls_that_find_a_slot_free_are_sent_at_once(count, how):
    """One, and as many as there are slots: within 10 ms, not after the window."""

    def measured():
        came, asked = {}, {}
        wrapper = runnable(came, 0.01, max_concurrency=16, max_batch=16)

        def begin(i):
            asked[i] = time.monotonic()

        async def call(i):
            begin(i)
            return await wrapper.ainvoke(i)

        async def tasks():
            async with no_tasks_left(), asyncio.timeout(LONG_S):
                await asyncio.gather(*(call(i) for i in range(count)))

        def blocking(i):
            begin(i)
            return wrapper.invoke(i)

        with no_collections():
            if how == "tasks":
                asyncio.run(tasks())
            else:
                with ThreadPoolExecutor(count) as pool:
                    list(pool.map(blocking, range(count)))
        assert len(came) == count
        return max(came[i] - asked[i] for i in range(count))

    within(DISPATCH_S, measured)


@pytest.mark.row(97)
def test_what_is_more_than_there_are_slots_is_sent_when_the_first_is_free():
    """Of seventeen calls one waits, for a slot alone."""

    async def round_of_17():
        gates, began, came = [asyncio.Event() for _ in range(17)], [asyncio.Event() for _ in range(17)], {}

        async def work(i):
            came[i] = time.monotonic()
            began[i].set()
            await gates[i].wait()
            return i

        wrapper = BatchingRunnable(RunnableLambda(work), max_concurrency=16, max_batch=16, window_ms=WINDOW_MS)
        tasks = [asyncio.create_task(wrapper.ainvoke(i)) for i in range(17)]
        async with asyncio.timeout(LONG_S):
            for one in began[:16]:
                await one.wait()
            assert 16 not in came
            freed = time.monotonic()
            gates[7].set()
            await began[16].wait()
            for gate in gates:
                gate.set()
            assert await asyncio.gather(*tasks) == list(range(17))
        return came[16] - freed

    def measured():
        with no_collections():
            return asyncio.run(round_of_17())

    within(DISPATCH_S, measured)


@pytest.mark.row(97)
@pytest.mark.parametrize("count", [1, 16, 17])
def test_texts_are_sent_at_once_and_as_few_requests(count):
    """All of one moment in one request, of sixteen at most; the seventeenth is another request, as soon."""

    def measured():
        inner = Vectors()
        wrapper = BatchingEmbeddings(inner, max_batch=16, window_ms=WINDOW_MS)

        async def main():
            async with no_tasks_left(), asyncio.timeout(LONG_S):
                began = time.monotonic()
                found = await asyncio.gather(*(wrapper.aembed_query(str(i)) for i in range(count)))
                assert found == [[float(i), 1.0] for i in range(count)]
                return began

        with no_collections():
            began = asyncio.run(main())
        assert [len(texts) for _, texts in inner.came] == ([count] if count <= 16 else [16, 1])
        return max(at - began for at, _ in inner.came)

    within(DISPATCH_S, measured)


@pytest.mark.row(97)
@pytest.mark.parametrize("what", ["calls", "texts"])
def test_a_trickle_waits_for_nobody(what):
    """One call every few milliseconds, each of which finds a slot: no window is ever waited for."""

    def measured():
        came, inner, waited = {}, Vectors(), []
        calls = runnable(came, max_concurrency=4)
        texts = BatchingEmbeddings(inner, window_ms=WINDOW_MS)

        async def main():
            async with no_tasks_left(), asyncio.timeout(LONG_S):
                for i in range(20):
                    began = time.monotonic()
                    if what == "calls":
                        await calls.ainvoke(i)
                        waited.append(came[i] - began)
                    else:
                        await texts.aembed_query(str(i))
                        waited.append(inner.came[-1][0] - began)
                    await asyncio.sleep(0.003)

        with no_collections():
            asyncio.run(main())
        return max(waited)

    within(DISPATCH_S, measured)


@pytest.mark.row(97)
def test_what_comes_while_a_request_is_under_way_is_sent_when_it_has_ended():
    """Texts that trickle in meanwhile are one request, within 10 ms of the end of the one before it."""

    def measured():
        inner = Vectors()
        wrapper = BatchingEmbeddings(inner, max_concurrency=1, window_ms=WINDOW_MS)

        async def main():
            inner.gate = asyncio.Event()
            async with no_tasks_left(), asyncio.timeout(LONG_S):
                tasks = [asyncio.create_task(wrapper.aembed_query("0"))]
                for i in range(1, 9):
                    await asyncio.sleep(0.002)
                    tasks.append(asyncio.create_task(wrapper.aembed_query(str(i))))
                await asyncio.sleep(0.002)
                assert len(inner.came) == 1
                inner.gate.set()
                ended = time.monotonic()
                await asyncio.gather(*tasks)
            return inner.came[1][0] - ended

        with no_collections():
            took = asyncio.run(main())
        assert [len(texts) for _, texts in inner.came] == [1, 8]
        return took

    within(DISPATCH_S, measured)


# -- row 98 -----------------------------------------------------------------------------------------------------------


class Model(GenericFakeChatModel):
    """Notes what it is asked."""

    asked: list

    def _generate(self, messages, *args, **kwargs):
        self.asked.append(messages[-1].content)
        return super()._generate(messages, *args, **kwargs)


def made(what):
    """A wrapper with one slot, and what has been sent."""
    if what == "chat":
        model = Model(messages=itertools.repeat(AIMessage("yes")), asked=[])
        return BatchingChatModel(model, max_concurrency=1, deadline_s=DEADLINE_S), model.asked
    if what == "embeddings":
        inner = Vectors()
        return BatchingEmbeddings(inner, max_concurrency=1, deadline_s=DEADLINE_S), inner.came
    came = {}
    return runnable(came, max_concurrency=1, deadline_s=DEADLINE_S), came


async def consume(stream):
    return [each async for each in stream]


AWAITED = {
    "invoke": lambda wrapper, i: wrapper.ainvoke(f"{i}"),
    "stream": lambda wrapper, i: consume(wrapper.astream(f"{i}")),
    "batch": lambda wrapper, i: wrapper.abatch([f"{i}"]),
    "query": lambda wrapper, i: wrapper.aembed_query(f"{i}"),
    "documents": lambda wrapper, i: wrapper.aembed_documents([f"{i}"]),
}
BLOCKING = {
    "invoke": lambda wrapper, i: wrapper.invoke(f"{i}"),
    "stream": lambda wrapper, i: list(wrapper.stream(f"{i}")),
    "batch": lambda wrapper, i: wrapper.batch([f"{i}"]),
    "query": lambda wrapper, i: wrapper.embed_query(f"{i}"),
    "documents": lambda wrapper, i: wrapper.embed_documents([f"{i}"]),
}
WAYS = [
    (what, way)
    for what in ("chat", "runnable", "embeddings")
    for way in (("query", "documents") if what == "embeddings" else ("invoke", "stream", "batch"))
]


@pytest.mark.row(98)
@pytest.mark.parametrize(("what", "way"), WAYS)
@pytest.mark.parametrize("how", ["tasks", "threads"])
def test_a_deadline_that_passes_in_the_queue_is_told_in_time_and_nothing_is_sent_later(what, way, how):
    """Eight callers behind one that holds the slot: each is told after 0.1 s, within 20 ms, and none is sent."""
    wrapper, sent = made(what)

    def late(began):
        return abs(time.monotonic() - began - DEADLINE_S)

    async def call(i):
        began = time.monotonic()
        with pytest.raises(AegisDeadlineError):
            await AWAITED[way](wrapper, i)
        return late(began)

    async def tasks():
        async with no_tasks_left(), asyncio.timeout(LONG_S):
            return await asyncio.gather(*(call(i) for i in range(8)))

    def thread(i):
        began = time.monotonic()
        with pytest.raises(AegisDeadlineError):
            BLOCKING[way](wrapper, i)
        return late(began)

    def measured():
        with wrapper.admission.slot(), no_collections():
            if how == "tasks":
                return max(asyncio.run(tasks()))
            with ThreadPoolExecutor(8) as pool:
                return max(pool.map(thread, range(8)))

    measured()  # whoever comes first makes what the others use
    within(LATE_S, measured)
    # The slot is free now: it goes to who comes next, and to none of those.
    stats = wrapper.admission.stats()
    assert (stats.running, stats.waiting, stats.waiting_bulk) == (0, 0, 0)
    assert not sent
    (wrapper.embed_query if what == "embeddings" else wrapper.invoke)("99")
    assert len(sent) == 1


# -- row 104 ----------------------------------------------------------------------------------------------------------


@pytest.mark.row(104)
@pytest.mark.parametrize(("what", "way"), WAYS)
@pytest.mark.parametrize("slots", ["free", "taken"])
def test_a_blocking_call_in_an_event_loop_ends_with_one_warning(what, way, slots, caplog):
    """Whether a slot is free, or all are held by tasks of the very loop that the call blocks."""
    wrapper, sent = made(what)

    async def main():
        if slots == "free":
            return [BLOCKING[way](wrapper, i) for i in range(3)]
        async with wrapper.admission.aslot():
            return [BLOCKING[way](wrapper, i) for i in range(3)]

    assert len(asyncio.run(asyncio.wait_for(main(), LONG_S))) == 3
    assert len(sent) == 3
    said = [r for r in caplog.records if r.getMessage().startswith("sync_call_in_event_loop")]
    assert [(r.levelname, r.name) for r in said] == [("WARNING", "langchain_aegis")]
    assert "ainvoke" in said[0].getMessage()
    stats = wrapper.admission.stats()
    assert (stats.running, stats.waiting, stats.waiting_bulk) == (0, 0, 0)


@pytest.mark.row(104)
@pytest.mark.parametrize(("what", "way"), WAYS)
def test_who_blocks_no_event_loop_is_not_warned(what, way, caplog):
    """Threads without a loop, those of a loop's executor, and who awaits."""
    wrapper, sent = made(what)

    async def main():
        await asyncio.to_thread(BLOCKING[way], wrapper, 2)
        await AWAITED[way](wrapper, 3)

    BLOCKING[way](wrapper, 1)
    asyncio.run(main())
    wait_until(lambda: len(sent) == 3)
    assert "sync_call_in_event_loop" not in caplog.text


@pytest.mark.row(104)
def test_a_notebook_whose_loop_waits_for_the_cell_anyway_is_not_warned(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    wrapper, sent = made("chat")

    async def cell():
        return wrapper.invoke("1").content

    assert asyncio.run(cell()) == "yes" and len(sent) == 1
    assert "sync_call_in_event_loop" not in caplog.text
