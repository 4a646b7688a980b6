"""Slots of one server for several processes: never more at once than there are, and nobody waits for the dead."""

import asyncio
import contextlib
import gc
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from conftest import short_directory, wait_until
from faults.redis_process import RedisProcess

from langchain_aegis import BatchingChatModel, ChatAegis, slot_lender
from langchain_aegis.admission import Admission
from langchain_aegis.errors import AegisClosedError, AegisConfigError, AegisDeadlineError, AegisOverloadedError
from langchain_aegis.notices import forget_warnings
from langchain_aegis.servers import _registry, admission_for, pool_for
from langchain_aegis.shared_admission import SharedAdmission
from langchain_aegis.slot_lender import SlotLender
from langchain_aegis.slot_scripts import names_of, read_turn, turn
from langchain_aegis.testing import ScriptedOllama
from langchain_aegis.traits import background

GPU = "http://gpu:11434"
LONG_S = 20.0


class Workers:
    """Several processes' worth of workers in this one, each with a thread and a connection of its own."""

    def __init__(self, url, namespace=None, lease_s=10.0):
        self.url, self.namespace, self.lease_s = url, namespace or f"w{uuid.uuid4().hex[:8]}", lease_s
        self.lenders = []
        self.client = redis.Redis.from_url(url, protocol=2)
        self.names = names_of(self.namespace, GPU)

    def new(self, slots=4, places=100, **options):
        self.lenders.append(
            SlotLender(options.get("url", self.url), self.namespace, options.get("lease_s", self.lease_s))
        )
        admission = self.lenders[-1].admission(GPU)
        admission.limit(max_concurrency=slots, max_waiting=places)
        return admission

    def in_use(self):
        """Names of the slots in use, as Redis counts them."""
        return {name.decode() for name in self.client.zrange(self.names[0], 0, -1)}

    def turn(self, worker="another", **what):
        """Say what a worker of no lender would."""
        told = {"channel": "", "lease_ms": 10_000, "limit": 4, "leave": 0, "want": 0, "kept": (), "dropped": (), **what}
        return read_turn(self.client.execute_command(*turn(self.names, worker, **told)))

    def close(self):
        for lender in self.lenders:
            lender.close(timeout_s=5)
        self.client.close()


@pytest.fixture
def workers(redis_url):
    made = Workers(redis_url)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _no_lender_stays():
    """A process keeps its thread and its connection until it ends; the next test is another process."""
    yield
    while slot_lender._lenders.made:
        slot_lender._lenders.made.popitem()[1].close()


@pytest.fixture
def own_redis():
    """A Redis that anything may happen to."""
    forget_warnings()
    with short_directory() as path, RedisProcess(path, search=False, saved=False) as server:
        yield server


def runs(ticket):
    return ticket.running


def taken(*tickets):
    """Wait until calls run."""
    for ticket in tickets:
        wait_until(lambda ticket=ticket: ticket.running, what="the turn of a call")
    return tickets


def leave(*tickets):
    for ticket in tickets:
        ticket.leave()


class Count:
    """How many calls run at once, and the most of them ever."""

    def __init__(self):
        self.lock, self.now, self.most, self.all = threading.Lock(), 0, 0, 0

    def __enter__(self):
        with self.lock:
            self.now += 1
            self.all += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *_):
        with self.lock:
            self.now -= 1


# -- counting -----------------------------------------------------------------------------------------------------


def test_two_workers_have_as_many_slots_as_one(workers):
    one, other = workers.new(), workers.new()
    first, second = taken(*(one.enter() for _ in range(2))), taken(*(other.enter() for _ in range(2)))
    late = other.enter()
    wait_until(lambda: other.plan().want == 1 and workers.client.zcard(workers.names[1]), what="a worker that waits")
    assert not late.running
    assert len(workers.in_use()) == 4
    first[0].leave()
    taken(late)
    assert len(workers.in_use()) == 4
    leave(*first, *second, late)
    wait_until(lambda: not workers.in_use(), what="that everything is given back")


def test_one_worker_alone_has_all_slots(workers):
    admission = workers.new()
    tickets = taken(*(admission.enter() for _ in range(4)))
    assert admission.stats().lent == 4
    assert admission.stats().workers == 1
    leave(*tickets)
    wait_until(lambda: admission.stats().lent == 0)


async def test_sync_and_async_callers_share_the_same_slots(workers):
    """Threads, event loops and workers, whatever they do at whatever moment: four at once, and all have their turn."""
    count, admissions = Count(), [workers.new() for _ in range(3)]

    def blocking(admission):
        with admission.slot(wait="queue"), count:
            time.sleep(0.0005)

    def another_loop(admission):
        async def call():
            async with admission.aslot(wait="queue"):
                with count:
                    await asyncio.sleep(0.0005)

        async def main():
            await asyncio.gather(*(call() for _ in range(10)))

        asyncio.run(main())

    async def awaited(admission):
        async with admission.aslot(wait="queue"):
            with count:
                await asyncio.sleep(0.0005)

    with ThreadPoolExecutor(16) as pool:
        loop = asyncio.get_running_loop()
        threads = [loop.run_in_executor(pool, blocking, a) for a in admissions for _ in range(20)]
        loops = [loop.run_in_executor(pool, another_loop, a) for a in admissions]
        async with asyncio.timeout(LONG_S):
            await asyncio.gather(*threads, *loops, *(awaited(a) for a in admissions for _ in range(20)))
    assert count.most == 4
    assert count.all == 3 * (20 + 10 + 20)
    wait_until(lambda: not workers.in_use())


@pytest.mark.parametrize("seed", range(4))
def test_random_cancels_lose_no_slot(workers, seed):
    """Cancelled before, while or after a slot is lent, expired, refused: the bound holds, all slots come back."""
    rng = random.Random(seed)
    count, admissions = Count(), [workers.new(slots=3, places=5) for _ in range(2)]

    async def call():
        admission = rng.choice(admissions)
        wait, deadline_s = rng.choice(["refuse", "queue"]), rng.choice([None, None, LONG_S, 0.002])
        with contextlib.suppress(AegisOverloadedError, AegisDeadlineError):
            async with admission.aslot(wait=wait, deadline_s=deadline_s):
                with count:
                    await asyncio.sleep(rng.choice([0, 0, 0.001]))

    async def main():
        tasks = []
        for _ in range(120):
            tasks.append(asyncio.create_task(call()))
            if rng.random() < 0.4:
                rng.choice(tasks).cancel()
            if rng.random() < 0.5:
                await asyncio.sleep(rng.choice([0, 0, 0.001]))
        async with asyncio.timeout(LONG_S):
            return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(main())
    assert all(r is None or isinstance(r, asyncio.CancelledError) for r in results)
    assert count.most <= 3
    wait_until(lambda: not workers.in_use(), what="that everything is given back")
    assert {(a.stats().running, a.busy, a.stats().lent) for a in admissions} == {(0, 0, 0)}


async def test_a_call_that_is_cancelled_in_each_of_its_steps_keeps_nothing(workers):
    """A task is cancelled after 0, 1, 2, ... turns of its loop, until it gets through."""
    admission = workers.new(slots=1)

    async def call():
        async with admission.aslot():
            await asyncio.sleep(0)

    for turns in range(12):
        task = asyncio.create_task(call())
        for _ in range(turns):
            await asyncio.sleep(0.0003)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        async with asyncio.timeout(LONG_S):
            await call()
    await asyncio.to_thread(wait_until, lambda: not workers.in_use())


def test_a_worker_with_many_calls_does_not_keep_another_waiting(workers):
    """Turns go round the workers, however many calls wait behind one of them."""
    busy, other = workers.new(slots=2), workers.new(slots=2)
    running = list(taken(busy.enter(), busy.enter()))
    waiting = [busy.enter(wait="queue") for _ in range(20)]
    single = other.enter()
    wait_until(lambda: workers.client.zcard(workers.names[1]) == 1)
    served = 0
    while not single.running:
        running.pop(0).leave()
        wait_until(lambda: single.running or any(t.running for t in waiting), what="the next turn")
        if not single.running:
            served += 1
            running.append(next(t for t in waiting if t.running))
            waiting.remove(running[-1])
    assert served <= 2
    leave(single, *running, *waiting)


def test_within_a_worker_priorities_stay(workers):
    """A slot that comes goes to whoever's turn it is here: single calls before items of batches."""
    one, other = workers.new(slots=1), workers.new(slots=1)
    (holder,) = taken(other.enter())
    bulk = one.enter(wait="queue")
    single = one.enter()
    wait_until(lambda: workers.client.zcard(workers.names[1]) == 1)
    holder.leave()
    taken(single)
    assert not bulk.running
    single.leave()
    taken(bulk)
    bulk.leave()


def test_background_traffic_leaves_one_slot_of_all_workers_free(workers):
    one, other = workers.new(slots=3), workers.new(slots=3)
    first = taken(*(one.enter() for _ in range(2)))
    with background():
        spare = other.enter()
    wait_until(lambda: workers.client.zcard(workers.names[1]) == 1)
    assert not spare.running
    (single,) = taken(other.enter())  # the last one is for whoever else comes
    first[0].leave()
    single.leave()
    taken(spare)
    leave(spare, *first)
    alone = workers.new(slots=1)
    wait_until(lambda: not workers.in_use())
    with background():
        taken(spare := alone.enter())
    spare.leave()


def test_each_worker_keeps_to_the_bound_that_it_was_told(workers):
    careful, other = workers.new(slots=1), workers.new(slots=4)
    tickets = taken(*(other.enter() for _ in range(3)))
    late = careful.enter()
    wait_until(lambda: workers.client.zcard(workers.names[1]) == 1)
    fourth = other.enter()
    taken(fourth)  # who waits for something else holds up nobody
    assert not late.running
    leave(*tickets, fourth)
    taken(late)
    late.leave()


def test_a_server_has_one_count_under_every_login_and_another_one_on_every_host(monkeypatch):
    assert names_of("a", "http://me:secret@gpu:11434") == names_of("a", GPU)
    assert len({names_of("a", GPU), names_of("b", GPU), names_of("a", "http://gpu:11435"), names_of("a", "https://gpu:11434"),
                names_of("a", "http://gpu:11434/v1")}) == 5  # fmt: skip
    local = names_of("a", "http://127.0.0.1:11434")
    monkeypatch.setattr(socket, "gethostname", lambda: "another-host")
    assert names_of("a", "http://127.0.0.1:11434") != local
    assert all(name.startswith("a:{s") and "gpu" not in name for name in names_of("a", GPU))


# -- a worker's bounds --------------------------------------------------------------------------------------------


def test_who_could_run_alone_is_not_refused_while_others_run(workers):
    """`max_waiting=0` refuses who would have to wait for a call of this process, not for one of another."""
    one, other = workers.new(slots=2, places=0), workers.new(slots=2, places=0)
    first = taken(one.enter(), one.enter())
    with pytest.raises(AegisOverloadedError):
        one.enter()
    waiting = [other.enter(), other.enter()]
    assert other.full
    with pytest.raises(AegisOverloadedError) as refused:
        other.enter()
    assert refused.value.retry_after_s > 0
    leave(*first)
    taken(*waiting)
    leave(*waiting)


async def test_a_deadline_ends_the_wait_for_a_slot_of_another_process(workers):
    one, other = workers.new(slots=1), workers.new(slots=1)
    (holder,) = await asyncio.to_thread(taken, one.enter())
    with pytest.raises(AegisDeadlineError):
        async with other.aslot(deadline_s=0.05):
            pass
    holder.leave()
    async with asyncio.timeout(LONG_S), other.aslot():
        pass


async def test_a_blocking_call_in_an_event_loop_is_lent_a_slot_all_the_same(workers):
    admission = workers.new(slots=1)
    with admission.slot():
        assert len(workers.in_use()) == 1
    wait_until(lambda: not workers.in_use())
    other = workers.new(slots=1)
    with other.slot(), admission.slot():  # here waiting would last for ever: beyond the bound, and counted
        wait_until(lambda: admission.plan().want == 1)
    wait_until(lambda: not workers.in_use())


def test_closing_fails_who_waits_and_gives_back_what_was_lent(workers):
    one, other = workers.new(slots=1), workers.new(slots=1)
    (holder,) = taken(one.enter())
    late = other.enter()
    other.close()
    with pytest.raises(AegisClosedError):
        late.wait()
    with pytest.raises(AegisClosedError):
        other.enter()
    holder.leave()
    assert one.drain(timeout_s=LONG_S)
    wait_until(lambda: not workers.in_use())


def test_an_admission_that_nobody_uses_any_more_gives_back_what_it_had(workers):
    workers.lease_s = 1.0
    admission = workers.new()
    taken(admission.enter())
    assert len(workers.in_use()) == 1
    lender = workers.lenders[0]
    del admission
    gc.collect()
    wait_until(lambda: not lender._shares, what="the end of the share")
    assert not workers.in_use()


def test_a_lender_that_ends_gives_everything_back(workers):
    admission = workers.new()
    tickets = taken(*(admission.enter() for _ in range(3)))
    assert len(workers.in_use()) == 3
    workers.lenders[0].close(timeout_s=LONG_S)
    assert not workers.in_use()
    assert workers.turn(want=1).workers == 1  # the other one has gone
    leave(*tickets)
    with admission.slot():  # what is called when the interpreter ends is not held up
        pass


# -- leases -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_slots_of_a_worker_that_died_come_back_when_its_lease_ends(workers):
    dead = workers.turn(want=4, lease_ms=1_000)
    assert len(dead.slots) == 4
    began_s = time.monotonic()
    admission = workers.new()
    tickets = taken(*(admission.enter() for _ in range(4)))
    assert 0.9 < time.monotonic() - began_s < 5
    leave(*tickets)


@pytest.mark.slow
def test_a_lease_is_renewed_for_as_long_as_its_call_runs(workers):
    workers.lease_s = 1.0
    one, other = workers.new(slots=1), workers.new(slots=1)
    (holder,) = taken(one.enter())
    late = other.enter()
    time.sleep(2.5)
    assert not late.running
    assert len(workers.in_use()) == 1
    holder.leave()
    taken(late)
    late.leave()


def test_a_slot_that_was_taken_away_is_counted_again_and_lent_to_nobody_until_the_bound_holds(workers):
    """Whoever was silent for too long still computes at the server: the truth is one more than there are."""
    workers.lease_s = 1.0
    one, other = workers.new(slots=2), workers.new(slots=2)
    tickets = taken(one.enter(), one.enter())
    lost = next(iter(workers.in_use()))
    workers.client.zrem(workers.names[0], lost)  # as if its lease had ended
    (taker,) = taken(other.enter())
    wait_until(lambda: len(workers.in_use()) == 3, what="that it is counted again")
    assert lost in workers.in_use()
    late = other.enter()
    tickets[0].leave()
    wait_until(lambda: len(workers.in_use()) == 2)
    assert not late.running
    tickets[1].leave()
    taken(late)
    leave(taker, late)


def test_who_gives_back_too_late_what_was_taken_from_him_gives_back_nothing(workers):
    (slot,) = workers.turn("slow", want=1, limit=1).slots
    workers.client.zrem(workers.names[0], slot)
    (other,) = workers.turn("quick", want=1, limit=1).slots
    assert other != slot
    assert workers.turn("slow", dropped=[slot], limit=1).count == 1
    assert workers.in_use() == {other}


def test_a_lease_that_another_clock_has_written_ends_at_once(workers):
    """After a failover to a server whose clock is behind, or by somebody else's hand."""
    workers.client.zadd(workers.names[0], {f"x:{i}": 10**15 for i in range(4)})
    workers.client.hset(workers.names[2], "x", f"{10**15} 0 4 0 9 ")
    workers.client.zadd(workers.names[1], {"x": 0})
    found = workers.turn(want=1)
    assert (found.count, found.workers, len(found.slots)) == (1, 1, 1)
    assert workers.client.zscore(workers.names[1], "x") is None


def test_slots_that_were_given_and_not_heard_of_are_told_again(workers):
    (slot,) = workers.turn("one", want=1, limit=1).slots
    assert workers.turn("other", want=1, limit=1).slots == []
    workers.turn("one", dropped=[slot], limit=1)  # hands it on to the other, who hears nothing: it has no channel
    found = workers.turn("other", want=1, limit=1)
    assert len(found.slots) == 1
    assert found.count == 1


def test_who_listens_no_more_is_given_nothing(workers):
    (slot,) = workers.turn("one", want=1, limit=1).slots
    workers.turn("dead", want=3, limit=1, channel="nobody-listens-here")
    workers.turn("third", want=1, limit=1)
    assert workers.turn("one", dropped=[slot], limit=1).workers == 2
    assert len(workers.turn("third", want=1, limit=1).slots) == 1


def test_names_that_nobody_uses_any_more_go(workers):
    workers.turn(want=5, limit=1)
    assert all(0 < workers.client.pttl(name) <= 600_000 for name in workers.names)


def test_many_random_turns_never_lend_more_than_there_are(workers):
    """Whatever workers want, keep, give back and forget, and in whatever order they say so."""
    rng = random.Random(8)
    held = {f"w{i}": set() for i in range(5)}
    ever, waited = set(), dict.fromkeys(held, 0)
    for _ in range(600):
        worker = rng.choice(list(held))
        dropped = {slot for slot in held[worker] if rng.random() < 0.5}
        want = rng.choice([0, 1, 1, 3])
        found = workers.turn(worker, want=want, kept=held[worker] - dropped, dropped=dropped, limit=3)
        new = set(found.slots) - held[worker]
        assert not new & ever  # no name is used twice
        assert held[worker] - dropped <= set(found.slots)
        ever |= new
        held[worker] = set(found.slots)
        assert found.lost == 0
        assert found.count <= 3
        assert found.count == len(workers.in_use())
        assert found.workers == sum(bool(workers.client.hexists(workers.names[2], w)) for w in held)
        waited[worker] += 1
    assert len(ever) > 100


# -- Redis fails --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_while_redis_is_away_each_worker_has_its_share_and_then_the_count_holds_again(own_redis, caplog):
    workers = Workers(own_redis.url)
    one, other = workers.new(), workers.new()
    first = taken(one.enter(), one.enter(), one.enter(), other.enter())
    ring(workers)
    wait_until(lambda: one.stats().workers == other.stats().workers == 2)
    own_redis.kill()
    late = taken(other.enter())  # one of two, for it has one already
    more = [one.enter(), other.enter()]
    wait_until(lambda: one.stats().lent is None, what="that it goes on alone")
    assert not any(map(runs, more))
    assert [one.stats().running, other.stats().running] == [3, 2]
    assert sum("slots_not_shared" in record.message for record in caplog.records) == 1
    own_redis.start()
    wait_until(lambda: len(workers.in_use()) == 5, what="that all that runs is counted again")
    first[0].leave()
    wait_until(lambda: len(workers.in_use()) == 4)
    assert not any(map(runs, more))  # one too many has gone, and one is none
    leave(*first[1:3])
    taken(*more)
    assert len(workers.in_use()) == 4
    leave(first[3], *late, *more)
    wait_until(lambda: not workers.in_use())
    workers.close()


def ring(workers):
    """Have every worker say something."""
    for lender in workers.lenders:
        for share in lender._shares:
            share.changed = True
        lender.ring()


@pytest.mark.slow
def test_a_frozen_redis_holds_up_nobody_for_long(own_redis):
    workers = Workers(own_redis.url)
    one, other = workers.new(), workers.new()
    first = taken(one.enter(), other.enter())
    with own_redis.frozen():
        began_s = time.monotonic()
        late = taken(one.enter(), other.enter())
        assert time.monotonic() - began_s < 5
        leave(*late)
        again = time.monotonic()
        leave(*taken(one.enter(), other.enter()))
        assert time.monotonic() - again < 0.5  # once is enough
    wait_until(lambda: one.stats().lent is not None and other.stats().lent is not None)
    wait_until(lambda: len(workers.in_use()) == 2)
    more = [one.enter() for _ in range(4)]
    wait_until(lambda: sum(map(runs, more)) == 2)
    assert len(workers.in_use()) == 4
    leave(*first)
    taken(*more)
    leave(*more)
    wait_until(lambda: not workers.in_use())
    workers.close()


def test_a_redis_that_was_emptied_counts_again_what_runs(own_redis):
    workers = Workers(own_redis.url, lease_s=1.0)
    one, other = workers.new(), workers.new()
    tickets = taken(*(one.enter() for _ in range(4)))
    own_redis.empty()
    wait_until(lambda: len(workers.in_use()) == 4)
    late = other.enter()
    wait_until(lambda: workers.client.zcard(workers.names[1]) == 1)
    assert not late.running
    leave(late, *tickets)
    workers.close()


def test_a_connection_that_was_closed_is_made_anew_and_nothing_is_lent_meanwhile(own_redis):
    workers = Workers(own_redis.url)
    one, other = workers.new(slots=2), workers.new(slots=2)
    first = taken(one.enter(), other.enter())
    for _ in range(3):
        workers.client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        late = one.enter()
        wait_until(lambda: workers.client.zcard(workers.names[1]) == 1 and len(workers.in_use()) == 2)
        assert not late.running
        late.leave()
        ring(workers)
        wait_until(lambda: workers.client.zcard(workers.names[1]) == 0)
    assert one.stats().lent == 1
    leave(*first)
    wait_until(lambda: not workers.in_use())
    workers.close()


@pytest.mark.parametrize("kind", ["away", "somebody's", "full", "loading"])
def test_a_redis_that_cannot_count_breaks_no_call(own_redis, kind):
    workers = Workers(own_redis.url)
    if kind == "away":
        own_redis.kill()
    elif kind == "somebody's":
        own_redis.client.set(workers.names[0], "a text")
    elif kind == "full":
        own_redis.fill()
    else:
        own_redis.client.execute_command("REPLICAOF", "127.0.0.1", own_redis.port)
    admission = workers.new()
    with admission.slot(deadline_s=LONG_S):
        assert admission.stats().running == 1

    async def main():
        async with admission.aslot(deadline_s=LONG_S):
            assert admission.stats().running == 1

    asyncio.run(main())
    workers.close()


def test_how_many_workers_there_are_is_known_from_who_starts_them(own_redis, monkeypatch):
    own_redis.kill()
    monkeypatch.setenv("AEGIS_SHARED_SLOTS", "yes")
    monkeypatch.setenv("AEGIS_REDIS_URL", own_redis.url)
    monkeypatch.setenv("WEB_CONCURRENCY", "2")
    admission = admission_for(GPU, max_concurrency=4)
    tickets = [admission.enter() for _ in range(4)]
    taken(*tickets[:2])
    assert not any(map(runs, tickets[2:]))
    leave(*tickets)


def test_where_nothing_may_be_pushed_slots_are_asked_for(own_redis):
    """The user of `docker/users.acl` may neither subscribe nor publish."""
    acl = (Path(__file__).parent.parent / "docker/users.acl").read_text()
    rules = next(line for line in acl.splitlines() if line.startswith("user aegis on")).split()[4:]
    rules = [rule for rule in rules if not rule.startswith("+ft.") and rule != "~aegis:*"]
    own_redis.client.execute_command("ACL", "SETUSER", "a", "reset", "on", ">password", *rules, "~w*")
    workers = Workers(own_redis.url)
    url = f"redis://a:password@127.0.0.1:{own_redis.port}"
    one, other = workers.new(slots=1, url=url), workers.new(slots=1, url=url)
    (holder,) = taken(one.enter())
    late = other.enter()
    wait_until(lambda: workers.client.zcard(workers.names[1]) == 1)
    assert not late.running
    holder.leave()
    taken(late)
    late.leave()
    wait_until(lambda: not workers.in_use())
    workers.close()


# -- processes ----------------------------------------------------------------------------------------------------


def in_child(pipe, admission):
    with admission.slot(deadline_s=LONG_S):
        pipe.send(admission.stats().running)
        pipe.recv()


@pytest.mark.slow
def test_the_child_of_a_fork_is_a_worker_of_its_own(workers):
    workers.lease_s = 1.0  # what it has when it ends comes back so late: such a child says no goodbye
    admission = workers.new(slots=2)
    (holder,) = taken(admission.enter())
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=in_child, args=(theirs, admission))
    child.start()
    assert ours.poll(LONG_S)
    assert ours.recv() == 1
    assert len({slot.partition(":")[0] for slot in workers.in_use()}) == 2
    late = admission.enter()
    wait_until(lambda: workers.client.zcard(workers.names[1]) == 1)  # the parent's connection is as it was
    assert not late.running
    ours.send(None)
    child.join(LONG_S)
    assert child.exitcode == 0
    taken(late)
    leave(holder, late)
    wait_until(lambda: not workers.in_use())


def test_a_process_that_ends_leaves_no_slot_behind(redis_url, workers):
    code = (
        "from langchain_aegis.servers import admission_for\n"
        f"ticket = admission_for({GPU!r}).enter()\n"
        "ticket.wait()\nprint('runs', flush=True)\n"
    )
    told = {"AEGIS_SHARED_SLOTS": "1", "AEGIS_REDIS_URL": redis_url, "AEGIS_NAMESPACE": workers.namespace}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **told}, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "runs\n"
    assert not workers.in_use()


def test_without_the_setting_nothing_is_shared_and_redis_is_not_even_loaded(monkeypatch):
    for off in ("", "no"):
        monkeypatch.setenv("AEGIS_SHARED_SLOTS", off)
        _registry.servers.clear()
        assert type(admission_for(GPU)) is Admission
    monkeypatch.setenv("AEGIS_SHARED_SLOTS", "four")
    _registry.servers.clear()
    with pytest.raises(AegisConfigError, match="AEGIS_SHARED_SLOTS"):
        admission_for(GPU)
    monkeypatch.setenv("AEGIS_SHARED_SLOTS", "1")
    monkeypatch.setenv("AEGIS_REDIS_URL", "http://user:hunter2@redis")
    with pytest.raises(AegisConfigError) as caught:
        admission_for(GPU)
    assert "hunter2" not in str(caught.value)
    code = f"import sys; from langchain_aegis.servers import admission_for; admission_for({GPU!r}); print(*sys.modules)"
    monkeypatch.delenv("AEGIS_SHARED_SLOTS")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "redis" not in done.stdout.split()


def test_the_models_of_an_application_share_slots_by_the_setting_alone(redis_url, workers, monkeypatch):
    monkeypatch.setenv("AEGIS_SHARED_SLOTS", "1")
    monkeypatch.setenv("AEGIS_REDIS_URL", redis_url)
    monkeypatch.setenv("AEGIS_NAMESPACE", workers.namespace)
    with ScriptedOllama("m") as server:
        model = BatchingChatModel(ChatAegis("m", base_url=server.base_url), max_concurrency=2)
        assert isinstance(model.admission, SharedAdmission)
        other = Workers(redis_url, workers.namespace)
        other.names = names_of(workers.namespace, server.base_url)
        slots = other.turn(want=2, limit=2, lease_ms=60_000).slots
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(model.invoke, text) for text in ("one", "two")]
            wait_until(lambda: other.client.zcard(other.names[1]) == 1)
            assert server.requests == ()
            other.turn(dropped=slots, limit=2)
            assert all(answer.result(LONG_S).text for answer in answers)
            assert sum(len(c.text) > 0 for c in model.stream("three")) > 1
        wait_until(lambda: not other.in_use())
        assert model.admission.stats().served == 3
        other.close()


def test_one_model_on_several_servers_shares_the_slots_of_each(redis_url, workers, monkeypatch):
    monkeypatch.setenv("AEGIS_SHARED_SLOTS", "1")
    monkeypatch.setenv("AEGIS_REDIS_URL", redis_url)
    monkeypatch.setenv("AEGIS_NAMESPACE", workers.namespace)
    with ScriptedOllama("m") as one, ScriptedOllama("m") as other:
        model = ChatAegis("m", base_url=[one.base_url, other.base_url], max_concurrency=1)
        pool = pool_for([one.base_url, other.base_url])
        assert type(pool).__name__ == "Pool"
        assert all(isinstance(member.admission, SharedAdmission) for member in pool._members.values())
        assert all(answer.text for answer in model.batch(["a", "b", "c", "d"]))
        assert len(one.chats) + len(other.chats) == 4


@pytest.mark.slow
def test_a_process_that_was_stopped_goes_on_where_it_was(workers):
    """SIGSTOP for longer than a lease: its slot goes to another, and is counted again when it goes on."""
    workers.lease_s = 1.0
    code = (
        "import sys\nfrom langchain_aegis.servers import admission_for\n"
        f"admission = admission_for({GPU!r}, max_concurrency=1)\n"
        "with admission.slot():\n    print('runs', flush=True)\n    sys.stdin.readline()\n"
        "with admission.slot():\n    print('again', flush=True)\n"
    )
    told = {
        "AEGIS_SHARED_SLOTS": "1", "AEGIS_REDIS_URL": workers.url, "AEGIS_NAMESPACE": workers.namespace,
        "AEGIS_SLOT_LEASE_S": "1",
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **told},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "runs\n"
        os.kill(process.pid, signal.SIGSTOP)
        admission = workers.new(slots=1)
        (ticket,) = taken(admission.enter())
        os.kill(process.pid, signal.SIGCONT)
        wait_until(lambda: len(workers.in_use()) == 2, what="that it is counted again")
        process.stdin.write("\n")
        process.stdin.flush()
        wait_until(lambda: len(workers.in_use()) == 1)
        ticket.leave()
        assert process.stdout.readline() == "again\n"
        assert process.wait(LONG_S) == 0


def test_any_kind_of_redis_counts(any_redis):
    workers = Workers(any_redis.url)
    one, other = workers.new(slots=1), workers.new(slots=1)
    (holder,) = taken(one.enter())
    late = other.enter()
    wait_until(lambda: workers.client.zcard(workers.names[1]) == 1)
    holder.leave()
    taken(late)
    late.leave()
    wait_until(lambda: not workers.in_use())
    workers.close()
