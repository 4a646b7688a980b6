"""Identical concurrent calls make one call, and hurt one another in nothing."""

import asyncio
import contextvars
import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_aegis.admission import Admission
from langchain_aegis.errors import AegisContextOverflowError, AegisDeadlineError, AegisOverloadedError
from langchain_aegis.flights import Flights, own_error

LONG_S = 20.0
who = contextvars.ContextVar("who", default="nobody")


class Calls:
    """Work that counts its starts, waits until told, and returns a mutable value."""

    def __init__(self, error=None):
        self.started = 0
        self.seen = []
        self.cancelled = 0
        self.error = error
        self.go = asyncio.Event()

    async def __call__(self):
        self.started += 1
        self.seen.append(who.get())
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return {"answer": [self.started]}


async def settle(turns=20):
    for _ in range(turns):
        await asyncio.sleep(0)


@pytest.fixture
def bound():
    return Admission(2, 3)


def join(flights, bound, work, key="k", **how):
    async def call():
        seat = flights.board(key, lambda wait: bound.enter(wait=wait))
        return await seat.aresult(work, **how)

    return asyncio.create_task(call())


def own_task(tasks):
    """The flight's own task among all."""
    (flight,) = (t for t in tasks if t.get_coro().__qualname__ == "Flight.afly")
    return flight


def idle(flights, bound):
    stats = bound.stats()
    return (len(flights), stats.running, stats.waiting, stats.waiting_bulk) == (0, 0, 0, 0)


async def test_a_hundred_identical_calls_make_one_and_share_no_object(bound):
    flights, work = Flights(), Calls()
    tasks = [join(flights, bound, work) for _ in range(100)]
    await settle()
    assert (bound.stats().running, bound.stats().waiting, len(flights)) == (1, 0, 1)
    work.go.set()
    async with asyncio.timeout(LONG_S):
        results = await asyncio.gather(*tasks)
    assert work.started == 1
    results[0]["answer"].append("mine")
    assert all(r == {"answer": [1]} for r in results[1:])
    assert idle(flights, bound)


@pytest.mark.row(92)
async def test_cancelling_the_leader_or_any_other_hurts_nobody(bound):
    flights, work = Flights(), Calls()
    tasks = [join(flights, bound, work) for _ in range(100)]
    await settle()
    for task in tasks[:99]:
        task.cancel()
    await settle()
    work.go.set()
    async with asyncio.timeout(LONG_S):
        assert await tasks[99] == {"answer": [1]}
    assert (work.started, work.cancelled) == (1, 0)
    assert idle(flights, bound)


@pytest.mark.row(93)
async def test_the_last_ones_leaving_cancels_the_call_and_the_next_starts_afresh(bound):
    flights, work = Flights(), Calls()
    tasks = [join(flights, bound, work) for _ in range(3)]
    await settle()
    for task in tasks:
        task.cancel()
    await asyncio.sleep(0)
    afresh = join(flights, bound, work)  # the first call is being cancelled just now
    await settle()
    assert (work.started, work.cancelled) == (2, 1)
    work.go.set()
    async with asyncio.timeout(LONG_S):
        assert await afresh == {"answer": [2]}
    assert idle(flights, bound)


async def test_a_flight_cancelled_before_its_first_step_loses_no_slot(bound):
    flights, work = Flights(), Calls()
    task = join(flights, bound, work)
    await asyncio.sleep(0)  # the flight's task exists and has not run
    own_task(asyncio.all_tasks()).cancel()
    task.cancel()
    await settle()
    assert work.started == 0
    assert idle(flights, bound)


@pytest.mark.row(91, 93)
async def test_a_call_that_waits_for_a_slot_is_dropped_when_nobody_wants_it(bound):
    flights, work = Flights(), Calls()
    held = [bound.enter(), bound.enter()]
    task = join(flights, bound, work)
    await settle()
    assert bound.stats().waiting == 1
    task.cancel()
    await settle()
    assert bound.stats().waiting == 0
    for ticket in held:
        ticket.leave()
    assert work.started == 0
    assert idle(flights, bound)


@pytest.mark.row(94)
async def test_each_caller_gets_an_error_of_its_own_and_a_failed_flight_is_not_joined(bound):
    error = AegisContextOverflowError("too long", prompt_tokens=9, window_tokens=4, status_code=400)
    error.add_note("a note")
    flights, work = Flights(), Calls(error)
    tasks = [join(flights, bound, work) for _ in range(5)]
    await settle()
    work.go.set()
    async with asyncio.timeout(LONG_S):
        errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert work.started == 1
    assert len({id(e) for e in errors}) == 5
    for e in errors:
        assert type(e) is AegisContextOverflowError
        assert (str(e), e.prompt_tokens, e.window_tokens, e.status_code) == ("too long", 9, 4, 400)
        assert e.__cause__ is error
    errors[0].add_note("only here")
    assert errors[1].__notes__ == ["a note"]
    work.error = None
    async with asyncio.timeout(LONG_S):
        assert await join(flights, bound, work) == {"answer": [2]}
    assert idle(flights, bound)


@pytest.mark.row(112)
async def test_the_call_sees_no_callers_context(bound):
    flights, work = Flights(), Calls()
    who.set("alice")
    first = join(flights, bound, work)
    await settle()
    who.set("bob")
    second = join(flights, bound, work)
    work.go.set()
    async with asyncio.timeout(LONG_S):
        await asyncio.gather(first, second)
    assert work.seen == ["nobody"]


async def test_a_refused_call_opens_no_flight(bound):
    flights, work = Flights(), Calls()
    held = [bound.enter() for _ in range(5)]
    with pytest.raises(AegisOverloadedError):
        await join(flights, bound, work)
    assert len(flights) == 0
    for ticket in held:
        ticket.leave()


async def test_a_deadline_ends_one_callers_wait_only(bound):
    flights, work = Flights(), Calls()
    patient = join(flights, bound, work)
    hasty = join(flights, bound, work, deadline=0.0)
    async with asyncio.timeout(LONG_S):
        with pytest.raises(AegisDeadlineError):
            await hasty
        work.go.set()
        assert await patient == {"answer": [1]}
    assert idle(flights, bound)


@pytest.mark.row(99)
async def test_a_flight_that_is_cancelled_from_outside_is_made_again_by_its_callers(bound):
    flights, work = Flights(), Calls()
    tasks = [join(flights, bound, work) for _ in range(2)]
    await settle()
    own_task(asyncio.all_tasks()).cancel()
    await settle()
    work.go.set()
    async with asyncio.timeout(LONG_S):
        results = await asyncio.gather(*tasks)
    assert sorted(r["answer"][0] for r in results) == [3, 3]
    assert work.started == 3
    assert idle(flights, bound)


async def test_a_result_that_cannot_be_copied_is_shared_with_nobody(bound):
    flights, work = Flights(), Calls()

    async def locks():
        await work()
        return threading.Lock()

    tasks = [join(flights, bound, locks) for _ in range(3)]
    await settle()
    work.go.set()
    async with asyncio.timeout(LONG_S):
        results = await asyncio.gather(*tasks)
    assert len({id(r) for r in results}) == 3
    assert idle(flights, bound)


async def test_a_seat_may_be_given_up_for_a_ticket_of_ones_own(bound):
    flights, work = Flights(), Calls()
    alone = flights.board("k", lambda wait: bound.enter(wait=wait))
    ticket = alone.detach()
    assert ticket is not None
    assert ticket.running
    alone.leave()
    assert bound.stats().running == 1
    ticket.leave()
    shared = flights.board("k", lambda wait: bound.enter(wait=wait))
    other = join(flights, bound, work)
    await settle()
    assert shared.detach() is None
    work.go.set()
    async with asyncio.timeout(LONG_S):
        assert await other == {"answer": [1]}
    assert idle(flights, bound)


@pytest.mark.row(100)
@pytest.mark.slow
async def test_garbage_collection_does_not_eat_a_flight(bound):
    flights, work = Flights(), Calls()
    task = join(flights, bound, work)
    await settle()
    gc.collect()
    work.go.set()
    gc.collect()
    async with asyncio.timeout(LONG_S):
        assert await task == {"answer": [1]}


def test_threads_share_one_call(bound):
    """16 threads, 1 call, in nobody's context; each thread has a result of its own."""
    flights, seen = Flights(), []
    boarded, go = threading.Semaphore(0), threading.Event()

    def work():
        seen.append(who.get())
        assert go.wait(LONG_S)
        return ["answer"]

    def call(i):
        who.set(f"thread {i}")
        seat = flights.board("k", lambda wait: bound.enter(wait=wait))
        boarded.release()
        return seat.result(work)

    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(call, i) for i in range(16)]
        assert all(boarded.acquire(timeout=LONG_S) for _ in range(16))
        go.set()
        results = [f.result(LONG_S) for f in futures]
    assert seen == ["nobody"]
    assert results == [["answer"]] * 16
    assert len({id(r) for r in results}) == 16
    assert idle(flights, bound)


def test_a_thread_leaves_at_its_deadline_and_the_call_goes_on(bound):
    flights, go, started = Flights(), threading.Event(), threading.Event()

    def work():
        started.set()
        assert go.wait(LONG_S)
        return "answer"

    def call(deadline):
        return flights.board("k", lambda wait: bound.enter(wait=wait)).result(work, deadline)

    with ThreadPoolExecutor(2) as pool:
        patient = pool.submit(call, 1e12)  # its deadline is far away: the call runs on a thread of its own
        assert started.wait(LONG_S)
        with pytest.raises(AegisDeadlineError):
            pool.submit(call, 0.0).result(LONG_S)
        go.set()
        assert patient.result(LONG_S) == "answer"
    assert idle(flights, bound)


def test_an_interrupted_thread_does_not_take_the_others_down(bound):
    flights, joined, calls = Flights(), threading.Event(), []

    def work():
        calls.append(threading.current_thread())
        if len(calls) == 1:
            assert joined.wait(LONG_S)
            raise KeyboardInterrupt
        return "answer"

    def lead():
        seat = flights.board("k", lambda wait: bound.enter(wait=wait))
        with pytest.raises(KeyboardInterrupt):
            seat.result(work)

    leader = threading.Thread(target=lead, daemon=True)
    leader.start()
    while not calls:
        threading.Event().wait(0.001)
    seat = flights.board("k", lambda wait: bound.enter(wait=wait))
    joined.set()
    assert seat.result(work) == "answer"
    leader.join(LONG_S)
    assert len(calls) == 2
    assert idle(flights, bound)


@pytest.mark.row(101)
def test_two_loops_and_three_threads_share_one_call(bound):
    """Whoever comes first makes it; each of the others has a result of its own."""
    flights, calls, boarded, go = Flights(), [], threading.Semaphore(0), threading.Event()

    def board():
        seat = flights.board("k", lambda wait: bound.enter(wait=wait))
        boarded.release()
        return seat

    async def acall():
        async def make():
            calls.append(1)
            await asyncio.to_thread(go.wait, LONG_S)
            return ["answer"]

        return await board().aresult(make)

    def call():
        def make():
            calls.append(1)
            assert go.wait(LONG_S)
            return ["answer"]

        return board().result(make)

    with ThreadPoolExecutor(5) as pool:
        futures = [pool.submit(asyncio.run, acall()) for _ in range(2)] + [pool.submit(call) for _ in range(3)]
        assert all(boarded.acquire(timeout=LONG_S) for _ in range(5))
        go.set()
        results = [f.result(LONG_S) for f in futures]
    assert results == [["answer"]] * 5
    assert len({id(r) for r in results}) == 5
    assert len(calls) == 1
    assert idle(flights, bound)


@pytest.mark.row(108)
def test_a_closed_loop_leaves_no_flight_behind(bound):
    flights = Flights()
    loop = asyncio.new_event_loop()

    async def main():
        task = join(flights, bound, Calls())
        await settle()
        return task

    task = loop.run_until_complete(main())
    loop.close()
    task._log_destroy_pending = False
    assert len(flights) == 1
    flights.board("other", lambda wait: bound.enter(wait=wait)).leave()
    assert idle(flights, bound)


class Awkward(Exception):
    def __init__(self, first, *, second):
        super().__init__(f"{first} and {second}")
        self.second = second


@pytest.mark.parametrize(
    "error",
    [ValueError("a", 1), OSError(2, "gone", "file"), KeyError("k"), Awkward("x", second="y"),
     AegisOverloadedError("full", retry_after_s=3.0), UnicodeDecodeError("utf-8", b"x", 0, 1, "bad")],
)  # fmt: skip
def test_an_error_is_multiplied_with_all_it_says(error):
    twin = own_error(error)
    assert twin is not error
    assert (type(twin), str(twin), twin.args, vars(twin)) == (type(error), str(error), error.args, vars(error))


@pytest.mark.row(91)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_random_cancels_lose_nobody(seed):
    """Whoever is not cancelled gets an answer, whatever happens to the others; no slot is lost."""
    rng = random.Random(seed)
    bound, flights = Admission(rng.randint(1, 3), 1000), Flights()

    async def work():
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        if rng.random() < 0.1:
            raise ValueError("bad luck")
        return [1]

    async def main():
        tasks = []
        for _ in range(80):
            if rng.random() < 0.6:
                tasks.append(join(flights, bound, work, key=rng.randrange(3)))
            elif tasks and rng.random() < 0.6:
                rng.choice(tasks).cancel()
            else:
                await asyncio.sleep(0)
        async with asyncio.timeout(LONG_S):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        await settle()
        return results

    results = asyncio.run(main())
    assert all(r == [1] or isinstance(r, asyncio.CancelledError | ValueError) for r in results)
    lists = [id(r) for r in results if isinstance(r, list)]
    assert len(lists) == len(set(lists))
    assert idle(flights, bound)
