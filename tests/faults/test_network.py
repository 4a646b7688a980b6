"""Bytes between us and Redis may be late, cut, changed or swapped: nobody is served what is not his."""

import asyncio
import random
import time

import pytest
from caches import MODEL, chat, prompt, text_of
from conftest import wait_until

from faults.measure import ADDED_S, PRODUCTION, Load, slowness
from faults.proxy import replies
from faults.recorder import questions
from faults.watch import no_tasks_left

ASKED = questions(20)


def filled(recorder, stored):
    """Have 20 questions of a recorder stored."""
    for question in ASKED:
        recorder.ask(question)
    stored()
    wait_until(lambda: sum(recorder.ask(q) for q in ASKED) == len(ASKED))
    return recorder


@pytest.fixture
def through(proxy, new_recorder, stored):
    """A recorder over the proxy, whose 20 questions are stored."""
    return filled(new_recorder(url=proxy.url), stored)


class Asker:
    """Asks blocking or awaited, in one event loop."""

    def __init__(self, recorder, awaited):
        self.recorder, self.awaited = recorder, awaited
        self.loop = asyncio.new_event_loop()

    def __call__(self, question):
        if not self.awaited:
            return self.recorder.ask(question)
        return self.loop.run_until_complete(self.recorder.aask(question))

    def close(self):
        self.loop.run_until_complete(self.recorder.cache.aclose())
        self.loop.close()


@pytest.fixture(params=["blocking", "awaited"])
def ask(request, through):
    asker = Asker(through, request.param == "awaited")
    yield asker
    asker.close()


@pytest.fixture(params=["blocking", "awaited"])
def hasty(request, proxy, new_recorder, stored):
    """The same as `ask`, with no more time than in production."""
    asker = Asker(filled(new_recorder(url=proxy.url, **PRODUCTION), stored), request.param == "awaited")
    yield asker
    asker.close()


def length_of_a_hit(ask, proxy, way):
    """How many bytes go one way in a lookup that hits."""
    seen = []

    def count(data):
        seen.append(data)
        return data

    way.rewrite = count
    assert ask(ASKED[0])
    proxy.heal()
    return sum(map(len, seen))


@pytest.mark.row(22, 23)
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.slow
def test_a_reply_that_is_cut_anywhere_is_a_miss_and_the_next_call_is_right(ask, proxy, reset):
    size = length_of_a_hit(ask, proxy, proxy.down)
    breaker = ask.recorder.cache._connections.breaker
    step = 1 if not reset and not ask.awaited else 7
    for n in range(0, size, step):
        proxy.down.reset, proxy.down.cut_after = reset, n
        assert ask(ASKED[1]) is False, n
        proxy.heal()
        assert ask(ASKED[n % 20]) is True, n
        assert not breaker.open
    wait_until(lambda: proxy.open <= 3)  # of a thread, of the loop, and of the writer


@pytest.mark.row(22)
def test_a_request_that_is_cut_anywhere_is_a_miss_and_the_next_call_is_right(ask, proxy):
    for n in range(0, length_of_a_hit(ask, proxy, proxy.up), 13):
        proxy.up.cut_after = n
        assert ask(ASKED[1]) is False, n
        proxy.heal()
        assert ask(ASKED[2]) is True, n


@pytest.mark.row(24)
def test_a_reply_that_comes_byte_by_byte_is_a_hit_or_a_miss_within_the_budget(hasty, proxy):
    proxy.down.slice_bytes = 1
    hits = [hasty(q) for q in ASKED]
    assert all(hit in (True, False) for hit in hits)
    proxy.down.jitter_s = 0.05
    took = []
    for question in ASKED[:6]:
        began = time.monotonic()
        hasty(question)
        took.append(time.monotonic() - began)
    assert sorted(took)[3] <= ADDED_S * slowness()
    proxy.heal()
    wait_until(lambda: sum(hasty(q) for q in ASKED) == len(ASKED), 6)


@pytest.mark.row(24)
def test_bytes_that_never_arrive_cost_no_more_than_the_budget(hasty, proxy):
    for way in (proxy.up, proxy.down):
        way.black_hole = True
        began = time.monotonic()
        assert hasty(ASKED[0]) is False
        assert time.monotonic() - began <= ADDED_S * slowness()
        proxy.heal()
        wait_until(lambda: hasty(ASKED[1]), 6)


@pytest.mark.row(24)
def test_a_network_that_trembles_within_the_budget_costs_no_hit(ask, proxy):
    proxy.down.latency_s, proxy.down.jitter_s = 0.01, 0.02
    assert all(ask(q) for q in ASKED)


@pytest.mark.row(27)
def test_a_bit_that_changes_on_its_way_is_a_miss_or_no_difference(ask, proxy):
    size = length_of_a_hit(ask, proxy, proxy.down)
    for n in range(0, size, 23):
        proxy.down.flip = n
        ask(ASKED[1])  # the recorder looks at what is served
        proxy.heal()
        wait_until(lambda n=n: ask(ASKED[n % 20]), 6)


class Swap:
    """Swaps the records of the first two lookups that are answered."""

    def __init__(self):
        self.kept, self.done = b"", False

    def __call__(self, data):
        if self.done:
            return data
        self.kept += data
        told = replies(self.kept)
        if told is None or len(told) < 4:
            return b""
        self.done = True
        told[0], told[2] = told[2], told[0]
        return b"".join(told)


@pytest.mark.row(26)
async def test_replies_that_are_swapped_are_two_misses_and_counted(through, proxy):
    assert await through.aask(ASKED[0])
    proxy.down.rewrite = swap = Swap()
    before = through.cache.stats().rejected
    told = await asyncio.gather(through.aask(ASKED[1]), through.aask(ASKED[2]))
    assert swap.done
    assert told == [False, False]
    proxy.heal()
    assert through.cache.stats().rejected - before == 2
    assert await through.aask(ASKED[3])
    await through.cache.aclose()


async def storm(recorder, proxy, count, seed, at_once=64):
    """Cancel lookups at random moments, and see whom the replies reach; returns how many were cancelled."""
    lookup, rnd, cancelled = recorder.cache.alookup, random.Random(seed), 0
    asked = [(prompt(f"What is the fee of thing {i}?"), f"it is {i}") for i in range(50)]
    for text, answer in asked:
        await recorder.cache.aupdate(text, MODEL, chat(answer))
    for text, _ in asked:  # waits for what is stored
        await lookup(text, MODEL)

    async def one():
        nonlocal cancelled
        text, answer = rnd.choice(asked)
        task = asyncio.ensure_future(lookup(text, MODEL))
        await asyncio.sleep(rnd.choice((0, 0, 0.0005, 0.001, 0.002, 0.004)) * rnd.random())
        if rnd.random() < 0.8:
            task.cancel()
        try:
            told = text_of(await task)
        except asyncio.CancelledError:
            cancelled += 1
            return
        assert told in (answer, None), (told, answer)

    while cancelled < count:
        proxy.down.latency_s, proxy.down.jitter_s = rnd.choice(((0, 0), (0, 0.002), (0.001, 0.003), (0.003, 0)))
        await asyncio.gather(*(one() for _ in range(at_once)))
    proxy.heal()
    # Every one after that has its own.
    told = await asyncio.gather(*(lookup(text, MODEL) for text, _ in asked))
    assert [text_of(t) for t in told] == [answer for _, answer in asked]
    return cancelled


@pytest.mark.row(25)
@pytest.mark.deadline(600)
async def test_no_reply_reaches_another_however_many_are_cancelled(proxy, new_recorder, rounds):
    """AEGIS_FAULT_ROUNDS=10000 cancels as many as is promised."""
    recorder = new_recorder(url=proxy.url)
    async with no_tasks_left():
        await storm(recorder, proxy, rounds(1_500), seed=25)
        assert proxy.made <= 1 + recorder.cache.stats().reasons.get("redis_slow", 0) + 1  # and one that writes
        assert proxy.open <= 2
        await recorder.cache.aclose()


@pytest.mark.row(25)
@pytest.mark.slow
def test_threads_that_time_out_over_a_slow_network_get_only_their_own(proxy, new_recorder, stored):
    """A thread cannot be cancelled, but it leaves its reply behind just so when it has waited for too long."""
    recorder = new_recorder(url=proxy.url, op_budget_s=0.02)
    load = Load(recorder, "threads", at_once=8)
    load(ASKED)
    stored()
    for latency_s in (0.01, 0.018, 0.022, 0.03):
        proxy.down.latency_s, proxy.down.jitter_s = latency_s, 0.01
        recorder.cache._connections.breaker.succeeded()
        load(ASKED * 3)
    proxy.heal()
    wait_until(lambda: load(ASKED).hits == len(ASKED), 6)
    assert proxy.open <= 8 + 1


REFUSALS = (
    "MOVED", "MOVED 1", "MOVED x y", "MOVED 1 :", "ASK 1 nowhere", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN x", "ERR", "",
    " ", "READONLY x", "MISCONF x", "BUSY x", "NOPERM", "NOREPLICAS x", "WRONGTYPE x", "OOM x", "no word at all",
    "\udcff\udcfe", "x" * 10_000,
)  # fmt: skip


@pytest.mark.row(22, 26)
@pytest.mark.slow
@pytest.mark.parametrize("awaited", [False, True])
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda text: text[:12] or "nothing")
async def test_whatever_redis_refuses_with_is_a_miss(proxy, new_recorder, caplog, refusal, awaited):
    """Also what redis-py itself cannot read: no exception, none in the event loop, and none is swallowed."""
    recorder = new_recorder(url=proxy.url, op_budget_s=0.2)  # it waits for the third reply to three commands
    said = f"-{refusal}\r\n".encode("utf-8", "surrogateescape")
    proxy.down.rewrite = lambda _: said * 2  # a lookup is two commands
    async with no_tasks_left():
        for _ in range(2):
            asked = recorder.aask(ASKED[0]) if awaited else asyncio.to_thread(recorder.ask, ASKED[0])
            assert await asked is False
        assert recorder.cache.health().entries == 0
        await recorder.cache.aclose()
    assert not [r for r in caplog.records if r.getMessage().startswith(("lookup:", "update:"))]
