"""One value per event loop, closed with its loop."""

import asyncio
import threading
import warnings

import pytest

from langchain_aegis.loops import PerLoop


class Connection:
    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.closed_in = None

    async def aclose(self):
        await asyncio.sleep(0)
        self.closed_in = asyncio.get_running_loop()


def test_a_loop_keeps_its_value_and_the_next_one_gets_another():
    made = []
    per_loop = PerLoop(lambda: made.append(Connection()) or made[-1], Connection.aclose)

    async def use():
        assert per_loop.get() is per_loop.get()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            asyncio.run(use())
    assert len(made) == 20
    assert all(c.closed_in is c.loop for c in made)
    assert per_loop.values() == []


def test_loops_in_two_threads_do_not_share():
    made = []
    per_loop = PerLoop(lambda: made.append(Connection()) or made[-1], Connection.aclose)
    barrier = threading.Barrier(2)

    async def use():
        first = per_loop.get()
        barrier.wait(5)
        assert first.loop is asyncio.get_running_loop()

    threads = [threading.Thread(target=asyncio.run, args=(use(),)) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(made) == 2


async def test_after_aclose_a_new_value_is_made():
    per_loop = PerLoop(Connection, Connection.aclose)
    first = per_loop.get()
    await per_loop.aclose()
    assert first.closed_in is asyncio.get_running_loop()
    assert per_loop.get() is not first
    await per_loop.aclose()


def test_outside_a_loop_it_says_so():
    with pytest.raises(RuntimeError):
        PerLoop(Connection, Connection.aclose).get()
