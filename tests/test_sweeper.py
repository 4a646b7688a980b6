"""What was invalidated is unlinked behind everybody's back: slowly, once, and without ever failing a caller."""

import gc
import multiprocessing
import subprocess
import sys
import textwrap
import threading
import weakref

import pytest
import redis
from conftest import wait_until
from test_store import NOW, Kept, direction, name

from langchain_aegis import forks
from langchain_aegis.breaker import Unavailable
from langchain_aegis.seals import Seal
from langchain_aegis.store import Invalidation, Store
from langchain_aegis.sweeper import Sweeper, the_sweeper
from langchain_aegis.vectors import pack

TENANT_A = Invalidation(["tenant:a"], [["tenant:a"]], now_ms=NOW)


@pytest.fixture
def kept(any_redis):
    kept = Kept(any_redis.url)
    yield kept
    kept.close()


@pytest.fixture
def sweeper():
    """A sweeper of this test's own, which has ended with it."""
    sweeper = Sweeper()
    yield sweeper
    with sweeper._changed:
        sweeper._jobs.clear()
        sweeper._changed.notify_all()
    wait_until(lambda: sweeper._thread is None)


def trash(kept):
    return {key.decode() for key in kept.redis.scan_iter(f"{kept.namespace}:{{p00}}:trash*")}


def test_what_was_invalidated_is_unlinked_by_the_thread(kept, sweeper):
    for i in range(30):
        kept.put(name(i), vec=pack(direction(i / 30)))
    kept.put(name(99), sets=("tenant:b",))
    assert kept.do(kept.store.invalidate(TENANT_A)) == 30
    assert len(kept.entries()) == 31
    assert kept.epochs().trash
    sweeper.wake(kept.store, kept.connections)
    assert sweeper.wait(20)
    assert kept.entries() == {name(99)}
    assert (sweeper.removed, sweeper.failures) == (30, 0)
    assert (trash(kept), kept.epochs().trash) == (set(), False)


def test_one_thread_sweeps_for_all_and_ends_when_nothing_is_left(any_redis, sweeper):
    caches = [Kept(any_redis.url) for _ in range(3)]
    for kept in caches:
        for i in range(40):
            kept.put(name(i), vec=pack(direction(i / 40)))
        kept.do(kept.store.invalidate(TENANT_A))
    for kept in caches:
        sweeper.wake(kept.store, kept.connections)
        threads = [t for t in threading.enumerate() if t.name == "aegis-sweeper" and t is sweeper._thread]
        assert len(threads) <= 1
        assert all(t.daemon for t in threads)
    assert sweeper.wait(30)
    assert [kept.entries() for kept in caches] == [set()] * 3
    wait_until(lambda: sweeper._thread is None)
    for kept in caches:
        kept.close()


@pytest.mark.parametrize("any_redis", ["plain"], indirect=True)
def test_waking_it_while_it_works_is_never_lost(kept, sweeper):
    """The work that is announced while a last step is under way is done too."""
    for round_ in range(30):
        kept.put(name(round_))
        kept.do(kept.store.invalidate(TENANT_A))
        sweeper.wake(kept.store, kept.connections)
    assert sweeper.wait(20)
    assert (kept.entries(), trash(kept)) == (set(), set())


def test_somebody_elses_sweep_is_left_alone(kept, sweeper):
    for i in range(500):
        kept.put(name(i))
    kept.do(kept.store.invalidate(TENANT_A))
    first = kept.do(kept.store.sweep("somebody"))
    assert first.state == "more"
    left = len(kept.entries())
    assert 0 < left < 500
    assert kept.do(kept.store.sweep("me")).state == "busy"
    sweeper.wake(kept.store, kept.connections)
    assert not sweeper.wait(0.4)
    assert len(kept.entries()) == left
    # ... who dies: its lock expires.
    kept.redis.pexpire(f"{kept.namespace}:{{p00}}:sweeping", 1)
    assert sweeper.wait(20)
    assert kept.entries() == set()


class Scripted:
    """Connections that answer with what is written down, and a clock that moves only when somebody waits."""

    def __init__(self, *replies):
        self.replies, self.now, self.pauses = list(replies), 100.0, []

    def perform(self, _):
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return [reply]

    def clock(self):
        return self.now

    def wait(self, _, seconds):
        self.pauses.append(round(seconds, 6))
        self.now += seconds


def swept_with(*replies):
    script = Scripted(*replies)
    sweeper = Sweeper(script.clock, script.wait)
    sweeper.wake(Store("any", Seal([b"m" * 32]), "f00"), script)
    assert sweeper.wait(10)
    return sweeper, script


def test_the_server_has_eight_ninths_of_its_time_for_others():
    sweeper, script = swept_with([b"more", 3, 1500], [b"more", 1, 40_000], [b"more", 0, 0], [b"done", 0, 0])
    assert script.pauses == [0.012, 0.32, 0.001]
    assert sweeper.removed == 4


def test_a_server_that_is_busy_is_asked_more_slowly():
    """What a step took longer at the client than on the server, it has queued behind the others' commands."""
    script = Scripted([b"more", 3, 2000], [b"more", 3, 2000], [b"done", 0, 0])
    answer, round_trips = script.perform, [0.005, 9.0, 0.0]

    def slow(step):
        script.now += round_trips.pop(0)
        return answer(step)

    script.perform = slow
    sweeper = Sweeper(script.clock, script.wait)
    sweeper.wake(Store("any", Seal([b"m" * 32]), "f00"), script)
    assert sweeper.wait(10)
    assert script.pauses == pytest.approx([0.016 + 0.003, 0.016 + 0.02])


def test_failures_are_counted_and_tried_again_ever_more_slowly():
    down, refused = Unavailable("redis_down"), redis.ResponseError("OOM command not allowed")
    sweeper, script = swept_with(down, refused, down, [b"more", 1, 1000], down, [b"busy", 0, 0], [b"done", 0, 0])
    assert script.pauses == [0.1, 0.2, 0.4, 0.008, 0.1, 0.25]
    assert (sweeper.failures, sweeper.removed) == (4, 1)


def test_a_redis_that_stays_away_is_given_up():
    sweeper, script = swept_with(*[Unavailable("redis_down")] * 40)
    assert sweeper.failures == 13
    assert sum(script.pauses) > 60
    assert max(script.pauses) == 10


def test_an_error_of_any_kind_does_not_end_the_thread():
    sweeper, _ = swept_with(ZeroDivisionError(), [b"done", 0, 0])
    assert sweeper.failures == 1


def test_waking_it_costs_the_caller_no_round_trip():
    script = Scripted()
    held, entered = threading.Event(), threading.Event()

    def stuck(_):
        entered.set()
        held.wait(30)
        return [[b"done", 0, 0]]

    script.perform = stuck
    sweeper = Sweeper()
    store = Store("any", Seal([b"m" * 32]), "f00")
    sweeper.wake(store, script)
    assert entered.wait(10)
    sweeper.wake(store, script)  # returns although a step is under way
    held.set()
    assert sweeper.wait(10)


def test_a_cache_that_is_closed_is_not_kept(any_redis, sweeper):
    kept, other = Kept(any_redis.url), Kept(any_redis.url)
    for each in (kept, other):
        for i in range(300):
            each.put(name(i))
        each.do(each.store.invalidate(TENANT_A))
        each.redis.set(f"{each.namespace}:{{p00}}:sweeping", "somebody", px=60_000)
        sweeper.wake(each.store, each.connections)
    sweeper.leave(kept.connections)
    kept.close()
    gone = weakref.ref(kept.connections)
    del kept, each
    wait_until(lambda: gc.collect() is not None and gone() is None)
    sweeper.leave(other.connections)
    assert sweeper.wait(10)
    other.close()


def test_what_a_dead_process_left_is_seen_by_the_next_lookup(kept, any_redis, sweeper):
    for i in range(20):
        kept.put(name(i))
    kept.do(kept.store.invalidate(TENANT_A))  # and this process dies
    next_one = Kept(any_redis.url, namespace=kept.namespace)
    _, epochs = next_one.do(next_one.store.read(name(1), ["namespace", "tenant:z"]))
    assert epochs.trash
    sweeper.wake(next_one.store, next_one.connections)
    assert sweeper.wait(20)
    assert kept.entries() == set()
    assert not kept.epochs().trash
    next_one.close()


def test_a_process_that_died_while_it_counted_left_nothing_for_ever(kept):
    """The sets are taken away in one step; what follows may never come."""
    for i in range(600):
        kept.put(name(i))
    flow, replies = kept.store.invalidate(TENANT_A), None
    for _ in range(2):  # the secret is checked, the mark is set; no more
        replies = kept.connections.perform(flow.send(replies))
    flow.close()
    assert kept.epochs().trash
    assert kept.do(kept.store.sweep("me")).state == "later"  # for it may live
    registry = f"{kept.namespace}:{{p00}}:trash"
    for member, _ in kept.redis.zrange(registry, 0, -1, withscores=True):
        kept.redis.zincrby(registry, -11_000, member)
    assert kept.sweep() == 600


def in_child(namespace, url, sender):
    assert the_sweeper._thread is None
    kept = Kept(url, namespace=namespace)
    the_sweeper.wake(kept.store, kept.connections)
    sender.send((the_sweeper.wait(20), len(kept.entries())))
    kept.close()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_the_child_of_a_fork_has_a_sweeper_of_its_own(redis_url):
    assert the_sweeper in forks._living
    kept = Kept(redis_url)
    for i in range(20):
        kept.put(name(i))
    kept.do(kept.store.invalidate(TENANT_A))
    receiver, sender = multiprocessing.get_context("fork").Pipe()
    with the_sweeper._changed:  # held by the parent at the moment of the fork
        child = multiprocessing.get_context("fork").Process(target=in_child, args=(kept.namespace, redis_url, sender))
        child.start()
    child.join(30)
    assert child.exitcode == 0
    assert receiver.recv() == (True, 0)
    receiver.close()
    sender.close()
    kept.close()


def test_a_process_sweeps_to_the_end_when_that_takes_less_than_a_second(redis_url):
    kept = Kept(redis_url)
    for i in range(60):
        kept.put(name(i))
    code = f"""
        from langchain_aegis.connections import Connections
        from langchain_aegis.flows import run
        from langchain_aegis.seals import Seal
        from langchain_aegis.store import Invalidation, Store
        from langchain_aegis.sweeper import the_sweeper
        connections = Connections({redis_url!r}, budget_s=5)
        store = Store({kept.namespace!r}, Seal([b"m" * 32]), "f00")
        what = Invalidation(["tenant:a"], [["tenant:a"]])
        assert run(store.invalidate(what), connections.perform) == 60
        the_sweeper.wake(store, connections)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert kept.entries() == set()
    kept.close()


@pytest.mark.slow
def test_a_process_ends_although_redis_does_not_answer(tmp_path):
    code = f"""
        from langchain_aegis.connections import Connections
        from langchain_aegis.seals import Seal
        from langchain_aegis.store import Store
        from langchain_aegis.sweeper import the_sweeper
        the_sweeper.wake(Store("any", Seal([b"m" * 32]), "f00"), Connections("unix://{tmp_path}/none.sock"))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60, check=False, capture_output=True)
    assert done.returncode == 0
