"""Many loops, many threads and many ways to leave: nothing stays behind, and nothing is said on stderr."""

import asyncio
import contextlib
import gc
import re
import subprocess
import sys
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import wait_until
from langchain_core.messages import HumanMessage

from langchain_aegis import AegisDeadlineError, AegisOverloadedError, BatchingChatModel, ChatAegis
from langchain_aegis.testing import ScriptedOllama

LONG_S = 30.0

MODELS = {
    "BatchingChatModel": lambda **told: BatchingChatModel(ChatAegis(**told), max_concurrency=4, max_waiting=500),
    "ChatAegis": lambda **told: ChatAegis(**told, max_concurrency=4),
}


@pytest.fixture
def server():
    """One of its own: bounds belong to an address, and no other test has asked anything of this one."""
    with ScriptedOllama("m", words=8) as running:
        yield running


@pytest.fixture(params=MODELS)
def model(request, server):
    return MODELS[request.param](model="m", base_url=server.base_url, temperature=0)


async def every_way(model, name, *, drops=True):
    """Use the model in every asynchronous way, and leave it in every way."""
    answers = await asyncio.gather(
        *(model.ainvoke(f"{name} same") for _ in range(3)),
        model.ainvoke(f"{name} other"),
        *(model.agenerate([[HumanMessage(f"{name} generated")]]) for _ in range(2)),
        model.abatch([f"{name} item {i}" for i in range(3)]),
    )
    assert all(f"{name}" in answer.content for answer in answers[:4])
    assert [f"item {i}" in item.content for i, item in enumerate(answers[-1])] == [True] * 3

    pieces = [piece async for piece in model.astream(f"{name} streamed")]
    assert name in "".join(piece.content for piece in pieces)
    async for event in model.astream_events(f"{name} events", version="v2"):
        assert event["event"]
    async with contextlib.aclosing(model.astream(f"{name} closed")) as closed:
        await anext(closed)
    tasks = [asyncio.create_task(model.ainvoke(f"{name} cancelled {i % 3}")) for i in range(6)]
    for at, task in enumerate(tasks):
        for _ in range(at):
            await asyncio.sleep(0)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if drops:
        dropped = model.astream(f"{name} dropped")
        await anext(dropped)
        del dropped


def every_way_blocking(model, name):
    """The same without a loop."""
    assert name in model.invoke(f"{name} same").content
    assert name in "".join(piece.content for piece in model.stream(f"{name} streamed"))
    model.generate([[HumanMessage(f"{name} generated")]])
    closed = model.stream(f"{name} closed")
    next(closed)
    closed.close()
    next(model.stream(f"{name} dropped"))


def run(coroutine, **how):
    """`asyncio.run` until every task has ended; returns what the loop complained of."""
    complaints = []

    async def main():
        loop = asyncio.get_running_loop()
        loop.slow_callback_duration = LONG_S  # two busy cores are slow; that is nobody's fault
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        async with asyncio.timeout(LONG_S):
            await coroutine
            while len(asyncio.all_tasks()) > 1:  # noqa: ASYNC110 - those that close what was dropped
                await asyncio.sleep(0.001)

    asyncio.run(main(), **how)
    return complaints


def ours():
    """How many objects of the library's classes there are, by class; without those of the scripted server."""
    gc.collect()
    names = (f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects())
    return Counter(name for name in names if re.match(r"langchain_aegis\.(?!embedded|testing)", name))


def idle(model):
    stats = model.admission.stats() if isinstance(model, BatchingChatModel) else model._admission.stats()
    return (stats.running, stats.waiting, stats.waiting_bulk) == (0, 0, 0)


@pytest.mark.row(101, 103)
@pytest.mark.slow
def test_two_loops_and_64_threads_on_one_instance(model, server, open_descriptors):
    """Everybody gets an own answer, the server sees four at once at most, and the connections go with the loops."""
    every_way_blocking(model, "warm")

    async def many(name):
        answers = await asyncio.gather(*(model.ainvoke(f"{name}x{i} asks") for i in range(100)))
        assert all(f"{name}x{i}" in answer.content for i, answer in enumerate(answers))
        await every_way(model, name)

    def ask(i):
        assert f"thread{i}" in model.invoke(f"thread{i} asks").content
        every_way_blocking(model, f"thread{i}")

    descriptors = open_descriptors()
    with ThreadPoolExecutor(66) as pool:
        loops = [pool.submit(run, many(f"loop{i}")) for i in range(2)]
        threads = [pool.submit(ask, i) for i in range(64)]
        for thread in threads:
            thread.result(LONG_S)
        for loop in loops:
            assert loop.result(LONG_S) == []
    assert server.counters.max_running <= 4
    wait_until(lambda: idle(model), LONG_S, "the last slot's return")
    # At most one pooled connection for each of four slots stays for later blocking calls, at both of its ends.
    wait_until(lambda: open_descriptors() <= descriptors + 2 * 4, LONG_S, "the end of the loops' connections")


@pytest.mark.row(102)
@pytest.mark.slow
def test_fifty_loops_in_a_row_leave_nothing(model, open_descriptors):
    """No task, no thread, no descriptor, no object of the library, no complaint."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(5):
            assert run(every_way(model, f"warm{i}")) == []
        wait_until(lambda: idle(model), LONG_S)
        descriptors, threads, objects = open_descriptors(), threading.active_count(), ours()
        for i in range(50):
            assert run(every_way(model, f"loop{i}")) == []
        wait_until(lambda: idle(model), LONG_S)
        wait_until(lambda: open_descriptors() <= descriptors, LONG_S, "the end of the last connection")
        wait_until(lambda: not ours() - objects, LONG_S, "the end of the last call")
        assert threading.active_count() <= threads


@pytest.mark.slow
def test_threads_that_come_and_go_leave_nothing(model, open_descriptors):
    """Each thread is a new one; what they used is used again by the next, or gone."""

    def generation(name):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: every_way_blocking(model, f"{name}x{i}"), range(8), timeout=LONG_S))
        wait_until(lambda: idle(model), LONG_S)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(3):
            generation(f"warm{i}")
        descriptors, objects = open_descriptors(), ours()
        for i in range(10):
            generation(f"gen{i}")
        # Four slots: four connections, at both ends; which of them are open now is the pool's affair.
        wait_until(lambda: open_descriptors() <= descriptors + 2 * 4, LONG_S, "the end of the last connection")
        found = ours() - objects
        assert max(found.values(), default=0) <= 4, found


@pytest.mark.slow
def test_refusals_and_deadlines_leave_nothing(server, open_descriptors):
    """Ten thousand refusals and fifty passed deadlines later everything is as it was."""
    model = BatchingChatModel(ChatAegis("m", base_url=server.base_url), max_concurrency=1, max_waiting=1)
    hasty = BatchingChatModel(ChatAegis("m", base_url=server.base_url), deadline_s=0.01)

    async def refused(count):
        with server.hold():
            fill = [asyncio.create_task(model.ainvoke(f"fill {i}")) for i in range(2)]
            await server.await_until(lambda seen: seen.waiting == 1)
            for _ in range(count):
                with pytest.raises(AegisOverloadedError):
                    await model.ainvoke("one more")
                with pytest.raises(AegisOverloadedError):
                    await anext(model.astream("one more"))
        await asyncio.gather(*fill)

    async def expired(count):
        with server.hold():
            for i in range(count):
                with pytest.raises(AegisDeadlineError):
                    await hasty.ainvoke(f"late {i}")

    async def both(count):
        await refused(count)
        await expired(count // 100)

    assert run(both(200)) == []
    wait_until(lambda: idle(model) and idle(hasty), LONG_S)
    descriptors, objects = open_descriptors(), ours()
    assert run(both(5_000)) == []
    wait_until(lambda: idle(model) and idle(hasty), LONG_S)
    wait_until(lambda: open_descriptors() <= descriptors, LONG_S, "the end of the last connection")
    wait_until(lambda: not ours() - objects, LONG_S, "the end of the last call")


@pytest.mark.slow
def test_a_stream_that_outlives_its_loop_gives_its_slot_back(model, open_descriptors):
    """Its reader holds it, unread, while the loop is closed: Python complains of that, but nothing is lost."""
    held = []

    async def leave_open(count):
        for i in range(count):
            stream = model.astream(f"left open {i}")
            await anext(stream)
            held.append(stream)

    run(leave_open(3))
    held.clear()
    wait_until(lambda: idle(model), LONG_S, "the return of the slots")
    descriptors = open_descriptors()
    for _ in range(10):
        run(leave_open(3))
        wait_until(lambda: idle(model), LONG_S, "the return of the slots")
    held.clear()
    gc.collect()
    wait_until(lambda: open_descriptors() <= descriptors, LONG_S, "the end of the last connection")
    assert model.invoke("and on").content


@pytest.mark.row(105)
@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
def test_eager_tasks_change_nothing(model, open_descriptors):
    """A task that runs before `create_task` returns finds every flight and every ticket where it must be."""

    async def eager(name):
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        # With eager tasks Python closes the parts of a dropped stream in the wrong order, whoever wrote them.
        await every_way(model, name, drops=False)

    assert run(eager("warm"), debug=True) == []
    wait_until(lambda: idle(model), LONG_S)
    descriptors, objects = open_descriptors(), ours()
    for i in range(10):
        assert run(eager(f"eager{i}"), debug=True) == []
    wait_until(lambda: idle(model), LONG_S)
    wait_until(lambda: open_descriptors() <= descriptors, LONG_S, "the end of the last connection")
    wait_until(lambda: not ours() - objects, LONG_S, "the end of the last call")


WORKLOAD = f"""
import asyncio, sys, threading
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_batching_leaks import MODELS, every_way, every_way_blocking, run
from langchain_aegis.testing import ScriptedOllama

with ScriptedOllama("m", words=8) as server:
    for name, make in MODELS.items():
        model = make(model="m", base_url=server.base_url, temperature=0)
        for i in range(3):
            assert run(every_way(model, f"{{name}}{{i}}")) == []
        threads = [threading.Thread(target=every_way_blocking, args=(model, f"thread{{i}}")) for i in range(8)]
        threads += [threading.Thread(target=run, args=(every_way(model, f"loop{{i}}"),)) for i in range(2)]
        for thread in threads:
            thread.start()
        every_way_blocking(model, "main")
        for thread in threads:
            thread.join()
        model.batch(["a", "b"])
print("done")
"""


@pytest.mark.row(105, 127)
@pytest.mark.slow
def test_python_has_nothing_to_complain_of():
    """`python -W error -X dev`: no warning, no log line, nothing at exit."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", WORKLOAD], capture_output=True, text=True, timeout=120
    )
    # What asyncio's debug mode calls slow is the machine's.
    said = [line for line in done.stderr.splitlines() if not re.fullmatch(r"Executing <.* took [\d.]+ seconds", line)]
    assert said == []
    assert (done.returncode, done.stdout) == (0, "done\n")
