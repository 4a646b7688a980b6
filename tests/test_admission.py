"""At most N calls run, at most M wait, nothing is ever lost."""

import asyncio
import gc
import multiprocessing
import os
import random
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_aegis import admission as module
from langchain_aegis.admission import Admission
from langchain_aegis.errors import AegisClosedError, AegisConfigError, AegisDeadlineError, AegisOverloadedError
from langchain_aegis.servers import admission_for

LONG_S = 20.0


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


async def settle(turns=20):
    for _ in range(turns):
        await asyncio.sleep(0)


def free(admission):
    """All slots are free and nobody waits."""
    stats = admission.stats()
    return (stats.running, stats.waiting, stats.waiting_bulk) == (0, 0, 0)


async def test_slots_then_places_then_refusal():
    """4 run, 3 wait, the eighth is refused, and everybody who was taken in is served in order."""
    admission = Admission(4, 3)
    go, order = asyncio.Event(), []

    async def call(i):
        async with admission.aslot():
            order.append(i)
            await go.wait()

    tasks = [asyncio.create_task(call(i)) for i in range(7)]
    await settle()
    assert (admission.stats().running, admission.stats().waiting) == (4, 3)
    with pytest.raises(AegisOverloadedError) as refused:
        admission.enter()
    assert refused.value.retry_after_s > 0
    assert refused.value.retryable
    go.set()
    async with asyncio.timeout(LONG_S):
        await asyncio.gather(*tasks)
    assert order == list(range(7))
    stats = admission.stats()
    assert (stats.served, stats.refused, stats.expired) == (7, 1, 0)
    assert free(admission)


def test_retry_after_follows_the_measured_service_time():
    """Refusals name the time in which those who wait now will have been served."""
    clock = Clock()
    admission = Admission(2, 3, clock=clock)
    for _ in range(3):
        with admission.slot():
            clock.now += 4.0
    tickets = [admission.enter() for _ in range(5)]
    with pytest.raises(AegisOverloadedError) as refused:
        admission.enter()
    assert refused.value.retry_after_s == pytest.approx(4.0 * 4 / 2)
    for ticket in tickets:
        ticket.leave()
    assert free(admission)


def test_items_of_a_batch_wait_without_counting():
    admission = Admission(1, 1)
    tickets = [admission.enter(), *(admission.enter(wait="queue") for _ in range(50))]
    assert (admission.stats().waiting, admission.stats().waiting_bulk) == (0, 50)
    single = admission.enter()
    with pytest.raises(AegisOverloadedError):
        admission.enter()
    for ticket in (tickets[0], single, *tickets[1:]):  # a single call goes before items of batches
        assert ticket.running
        ticket.leave()
    assert free(admission)


def test_max_waiting_zero_means_run_or_be_refused():
    admission = Admission(1, 0)
    with admission.slot(), pytest.raises(AegisOverloadedError):
        admission.enter()
    assert free(admission)


@pytest.mark.row(98)
async def test_expired_work_is_never_started():
    """A deadline that passes in the queue fails the call; the slot goes to the next one."""
    clock = Clock()
    admission = Admission(1, 10, clock=clock)
    holder = admission.enter()
    late, in_time = admission.enter(deadline_s=5), admission.enter(deadline_s=50)
    clock.now += 10
    holder.leave()
    with pytest.raises(AegisDeadlineError):
        await late.await_()
    await in_time.await_()
    in_time.leave()
    assert admission.stats().expired == 1
    with pytest.raises(AegisDeadlineError):
        admission.enter(deadline=clock.now)
    assert free(admission)


@pytest.mark.row(98)
async def test_a_granted_slot_is_not_used_after_the_deadline():
    clock = Clock()
    admission = Admission(1, 1, clock=clock)
    ticket = admission.enter(deadline_s=1)
    clock.now += 2
    with pytest.raises(AegisDeadlineError):
        await ticket.await_()
    with admission.slot(deadline_s=1):
        pass
    assert free(admission)


@pytest.mark.row(98)
async def test_waiting_ends_at_the_deadline():
    """The wait itself ends, without anybody giving a slot back."""
    admission = Admission(1, 10)
    with admission.slot():
        async with asyncio.timeout(LONG_S):
            with pytest.raises(AegisDeadlineError):
                async with admission.aslot(deadline_s=0.01):
                    pytest.fail("started after its deadline")

            def sync():
                with pytest.raises(AegisDeadlineError), admission.slot(deadline_s=0.01):
                    pytest.fail("started after its deadline")

            await asyncio.to_thread(sync)
    assert admission.stats().expired == 2
    assert free(admission)


@pytest.mark.row(91)
async def test_a_cancelled_wait_gives_its_place_back():
    admission = Admission(1, 2)
    holder = admission.enter()
    tasks = [asyncio.create_task(use(admission)) for _ in range(2)]
    await settle()
    tasks[0].cancel()
    await settle()
    assert admission.stats().waiting == 1
    holder.leave()
    async with asyncio.timeout(LONG_S):
        await tasks[1]
    assert free(admission)


async def use(admission, **how):
    async with admission.aslot(**how):
        pass


async def test_a_cancel_that_races_the_wake_up_passes_the_slot_on():
    """The slot was granted, the waiter is cancelled before it runs: the next one gets the slot."""
    admission = Admission(1, 5)
    holder = admission.enter()
    first, second = (asyncio.create_task(use(admission)) for _ in range(2))
    await settle()
    holder.leave()  # wakes `first`, which has not run yet
    first.cancel()
    async with asyncio.timeout(LONG_S):
        await second
        with pytest.raises(asyncio.CancelledError):
            await first
    assert free(admission)


@pytest.mark.row(108)
def test_a_closed_loop_loses_no_slot():
    """Waiters and holders of a loop that was closed under them do not keep slots or places."""
    admission = Admission(2, 2)

    async def hold():
        async with admission.aslot():
            await asyncio.Event().wait()

    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(hold()) for _ in range(4)]
    loop.run_until_complete(settle())
    assert (admission.stats().running, admission.stats().waiting) == (2, 2)
    loop.close()
    with ThreadPoolExecutor(1) as pool:

        def call():
            with admission.slot():
                return "served"

        assert pool.submit(call).result(LONG_S) == "served"
    assert admission.stats().running <= 2
    for task in tasks:
        task._log_destroy_pending = False
    del tasks
    gc.collect()
    with admission.slot(), admission.slot():
        pass
    assert free(admission)


@pytest.mark.row(108)
def test_a_slot_granted_to_a_closed_loop_goes_to_the_next():
    admission = Admission(1, 5)
    holder = admission.enter()
    loop = asyncio.new_event_loop()
    task = loop.create_task(use(admission))
    loop.run_until_complete(settle())
    loop.close()
    behind = admission.enter()
    holder.leave()
    assert behind.running
    behind.leave()
    task._log_destroy_pending = False
    assert free(admission)


def test_a_ticket_left_by_a_finaliser_does_not_deadlock():
    """The garbage collector may give a slot back in the middle of this module's own critical section."""
    admission = Admission(1, 5)
    ticket = admission.enter()
    with admission._lock:
        ticket.leave()
    assert free(admission)
    waiting = [admission.enter() for _ in range(2)]
    with admission._lock:
        waiting[0].leave()
    assert admission.stats().waiting == 0
    assert waiting[1].running
    waiting[1].leave()
    assert free(admission)


@pytest.mark.row(101, 103)
def test_two_loops_and_threads_share_one_bound():
    """2 loops in 2 threads and 16 sync threads: never more than 3 at once, all 460 served."""
    admission = Admission(3, 1000)
    now, most, lock = 0, 0, threading.Lock()

    def enter(by):
        nonlocal now, most
        with lock:
            now += by
            most = max(most, now)

    async def acall():
        async with admission.aslot():
            enter(1)
            await asyncio.sleep(0)
            enter(-1)

    async def many():
        async with asyncio.timeout(LONG_S):
            await asyncio.gather(*(acall() for _ in range(150)))

    def sync():
        for _ in range(10):
            with admission.slot():
                enter(1)
                os.sched_yield()
                enter(-1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=asyncio.run, args=(many(),), daemon=True) for _ in range(2)]
        threads += [threading.Thread(target=sync, daemon=True) for _ in range(16)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(LONG_S)
    assert not any(t.is_alive() for t in threads)
    assert most <= 3
    assert admission.stats().served == 460
    assert free(admission)


@pytest.mark.row(102)
def test_fifty_loops_in_a_row():
    admission = Admission(2, 100)

    async def many():
        await asyncio.gather(*(use(admission) for _ in range(10)))

    for _ in range(50):
        asyncio.run(many())
    assert admission.stats().served == 500
    assert free(admission)


@pytest.mark.row(104)
def test_a_blocking_call_inside_its_own_loop_does_not_deadlock():
    """The slots are held by tasks of the loop that the call blocks: it runs beyond the bound."""
    admission = Admission(1, 1)

    async def main():
        async with admission.aslot():
            with admission.slot():
                assert admission.stats().running == 2

    asyncio.run(main())
    assert free(admission)


async def test_a_call_inside_a_held_slot_rides_along():
    """A wrapper and the model inside it may share an admission: one slot, no deadlock."""
    admission, other = Admission(1, 0), Admission(1, 0)
    async with admission.aslot() as ticket:
        with ticket.held():
            async with asyncio.timeout(LONG_S), admission.aslot(), other.aslot():
                assert admission.stats().running == 1
                assert other.stats().running == 1
        with pytest.raises(AegisOverloadedError):
            admission.enter()
        with ticket.held():
            inherited = asyncio.create_task(use(admission))
            await inherited
            outlived = asyncio.create_task(settle(5))
    await outlived
    assert free(admission)


async def test_a_task_that_outlives_the_slot_rides_no_longer():
    admission = Admission(1, 0)
    ended = asyncio.Event()

    async def later():
        await ended.wait()
        async with admission.aslot():
            return admission.stats().running

    async with admission.aslot() as ticket:
        with ticket.held():
            task = asyncio.create_task(later())
    ended.set()
    assert await task == 1
    assert free(admission)


@pytest.mark.row(107)
async def test_close_fails_the_waiting_and_drain_lets_them_finish():
    admission = Admission(1, 5)
    holder = admission.enter()
    waiting = asyncio.create_task(use(admission))
    await settle()
    admission.close()
    admission.close()
    with pytest.raises(AegisClosedError):
        await waiting
    with pytest.raises(AegisClosedError):
        admission.enter()
    holder.leave()
    assert free(admission)

    admission = Admission(1, 5)
    holder = admission.enter()
    waiting = asyncio.create_task(use(admission))
    await settle()
    draining = asyncio.create_task(admission.adrain(LONG_S))
    await settle()
    with pytest.raises(AegisClosedError):
        admission.enter()
    holder.leave()
    assert await draining is True
    await waiting
    assert admission.drain() is True


@pytest.mark.row(107)
def test_drain_closes_what_does_not_end_in_time():
    admission = Admission(1, 5)
    holder, waiting = admission.enter(), admission.enter()
    assert admission.drain(0.01) is False
    with pytest.raises(AegisClosedError):
        waiting.wait()
    holder.leave()
    assert free(admission)


def test_the_smallest_explicit_bound_of_a_server_wins():
    server = "http://test-bounds:11434"
    assert admission_for(server).max_concurrency == 4
    assert admission_for(server).max_waiting == 100
    shared = admission_for(server, max_concurrency=8)
    assert shared.max_concurrency == 8
    assert admission_for(server, max_concurrency=2, max_waiting=7) is shared
    admission_for(server, max_concurrency=6, max_waiting=9)
    assert (shared.max_concurrency, shared.max_waiting) == (2, 7)
    assert admission_for("http://another:11434") is not shared
    shared.close()
    assert not admission_for(server).closed


def test_a_raised_bound_lets_waiting_calls_run():
    admission = Admission(1, 5)
    first, second = admission.enter(), admission.enter()
    assert not second.running
    admission.limit(max_concurrency=2)
    assert second.running
    first.leave()
    second.leave()
    assert free(admission)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_concurrency": 0},
        {"max_concurrency": 2.5},
        {"max_waiting": -1},
        {"max_waiting": True},
        {"window_ms": -1},
        {"window_ms": float("nan")},
        {"max_batch": 0},
        {"deadline_s": 0},
        {"deadline_s": float("inf")},
        {"deadline_s": "5"},
    ],
)
def test_bounds_out_of_range_are_refused(bad):
    with pytest.raises(AegisConfigError, match=next(iter(bad))):
        module.check_bounds(**bad)


def in_child(pipe, admission):
    with admission.slot(deadline_s=LONG_S):
        pipe.send(admission.stats().running)


@pytest.mark.row(106)
def test_the_child_of_a_fork_starts_with_free_slots():
    admission = Admission(1, 1)
    holder = admission.enter()
    ours, theirs = multiprocessing.Pipe()
    with admission._lock:  # held by the parent at the moment of the fork
        child = multiprocessing.get_context("fork").Process(target=in_child, args=(theirs, admission))
        child.start()
    assert ours.poll(LONG_S)
    assert ours.recv() == 1
    child.join(LONG_S)
    assert admission.stats().running == 1
    holder.leave()
    assert free(admission)


@pytest.mark.row(91)
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(0, 6))
def test_random_cancels_lose_no_slot(seed, slots, places):
    """Whatever is cancelled, expired or refused at whatever moment: the bounds hold, all slots come back."""
    rng = random.Random(seed)
    admission = Admission(slots, places)
    most = 0

    async def call(steps):
        nonlocal most
        async with admission.aslot(wait=rng.choice(["refuse", "queue"]), deadline_s=rng.choice([None, LONG_S])):
            most = max(most, admission.stats().running)
            for _ in range(steps):
                await asyncio.sleep(0)

    async def main():
        tasks = []
        for _ in range(60):
            action = rng.random()
            if action < 0.6:
                tasks.append(asyncio.create_task(call(rng.randrange(4))))
            elif tasks and action < 0.85:
                rng.choice(tasks).cancel()
            else:
                await asyncio.sleep(0)
            assert admission.stats().waiting <= places
        async with asyncio.timeout(LONG_S):
            return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(main())
    assert all(r is None or isinstance(r, AegisOverloadedError | asyncio.CancelledError) for r in results)
    assert most <= slots
    assert free(admission)
    assert admission.stats().served >= sum(r is None for r in results)


@pytest.mark.row(88)
async def test_ten_thousand_callers_on_a_bound_of_a_hundred():
    admission = Admission(4, 100)
    go = asyncio.Event()

    async def call():
        async with admission.aslot():
            await go.wait()

    tasks = [asyncio.create_task(call()) for _ in range(10_000)]
    await settle()
    go.set()
    async with asyncio.timeout(LONG_S):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(r is None for r in results) == 104
    assert sum(isinstance(r, AegisOverloadedError) for r in results) == 9_896
    assert admission.stats().refused == 9_896
