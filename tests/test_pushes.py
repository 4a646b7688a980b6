"""What the local tier holds is served only while it is proved that pushes come; whatever breaks, calls go on."""

import asyncio
import contextlib
import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest
import redis
from caches import MODEL
from conftest import is_running, running_redis, wait_until
from tiers import BOOK, MANY, asked, has_heard, hits, is_held, taught, tier_of

from langchain_aegis import AegisSemanticCache, notices
from langchain_aegis.local_tier import LocalTier
from langchain_aegis.pushes import ALIVE_S, Pushes, _Session, clock
from langchain_aegis.sweeper import Sweeper
from langchain_aegis.writes import the_writer


def open_cache(url, namespace=None, **options):
    namespace = namespace or f"p{uuid.uuid4().hex[:8]}"
    cache = AegisSemanticCache(url, namespace=namespace, **{"local_tier_bytes": MANY, "op_budget_s": 5, **options})
    cache._engine.embedder._make = lambda: None
    return cache


@pytest.fixture
def cache(redis_url):
    with open_cache(redis_url) as cache:
        taught(cache, "28 days")
        assert is_held(cache) == "28 days"
        yield cache


@pytest.fixture
def other(redis_url, cache):
    """Stands for another process."""
    with open_cache(redis_url, cache.settings.namespace, local_tier_bytes=0) as other:
        yield other


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url, protocol=2) as client:
        yield client


def listening(client, namespace=""):
    """The connections that the server pushes to, of one namespace: who listens is subscribed to a name of it."""
    told = [c for c in client.client_list() if "t" in c["flags"]]
    subscribed = client.pubsub_numsub(f"{namespace}:{{p00}}:pushes")[0][1] if namespace else len(told)
    assert subscribed <= len(told)
    return told if subscribed else []


def threads():
    return [t for t in threading.enumerate() if t.name == "aegis-pushes"]


class Proxy:
    """Stands between a cache and the server at `path`; swallows what the server says where `swallows` says so.

    `says` changes what the cache says.
    """

    def __init__(self, path):
        self.path = path
        self.swallows = lambda pushes: False
        self.says = lambda data: data
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets = [self._listener]
        self._start(self._accept)

    def _start(self, do, *args):
        threading.Thread(target=self._quietly, args=(do, *args), daemon=True).start()

    def _quietly(self, do, *args):
        with contextlib.suppress(OSError):
            do(*args)

    def _accept(self):
        while True:
            near, _ = self._listener.accept()
            far = socket.socket(socket.AF_UNIX)
            self._sockets += [near, far]
            try:
                far.connect(self.path)
            except OSError:
                near.close()
                continue
            said = bytearray()
            self._start(self._pump, near, far, said, True)
            self._start(self._pump, far, near, said, False)

    def _pump(self, one, two, said, outwards):
        try:
            while data := one.recv(65536):
                if outwards:
                    said += data
                elif self.swallows(b"TRACKING" in said):
                    continue
                two.sendall(self.says(data) if outwards else data)
        finally:
            for end in (one, two):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self):
        for opened in self._sockets:
            opened.close()


@pytest.fixture
def own_redis():
    with running_redis("plain") as server:
        yield server


def path_of(server):
    return server.url.removeprefix("unix://")


@pytest.fixture
def proxy(own_redis):
    proxy = Proxy(path_of(own_redis))
    yield proxy
    proxy.close()


def is_silent(cache):
    """Wait until the tier may not answer; calls go on meanwhile."""

    def silent():
        cache.lookup(BOOK, MODEL)
        return not tier_of(cache).stats().alive

    wait_until(silent, what="the end of what is proved")


# -- the connection breaks --------------------------------------------------------------------------------------------


def test_what_was_held_is_gone_with_the_connection_and_comes_back_with_another(cache, other, client):
    tier = tier_of(cache)
    for times in range(1, 4):
        for connection in listening(client, cache.settings.namespace):
            client.client_kill_filter(_id=connection["id"])
        wait_until(lambda times=times: tier.stats().invalidated >= times, what="the loss")
        assert asked(cache) == "28 days"
        assert is_held(cache) == "28 days"
    other.clear()
    has_heard(cache)
    assert asked(cache) is None


def test_while_no_connection_can_be_made_every_call_asks_redis(proxy):
    with open_cache(proxy.url) as cache:
        taught(cache, "28 days")
        assert is_held(cache) == "28 days"
        proxy.swallows = lambda pushes: pushes
        is_silent(cache)
        before = hits(cache)
        for _ in range(20):
            assert asked(cache) == "28 days"
        assert hits(cache) == before
        with open_cache(f"unix://{proxy.path}", cache.settings.namespace, local_tier_bytes=0) as other:
            taught(other, "30 days")
            assert asked(cache) == "30 days"
            assert hits(cache) == before
        proxy.swallows = lambda pushes: False
        assert is_held(cache) == "30 days"


def test_a_black_hole_ends_what_is_served(proxy):
    with open_cache(proxy.url, op_budget_s=0.1) as cache:
        taught(cache, "28 days")
        assert is_held(cache) == "28 days"
        proxy.swallows = lambda pushes: True
        is_silent(cache)
        before = hits(cache)
        assert asked(cache) is None
        assert hits(cache) == before
        proxy.swallows = lambda pushes: False
        wait_until(lambda: asked(cache) == "28 days", what="an answer of Redis")
        assert is_held(cache) == "28 days"


def test_a_frozen_redis_ends_what_is_served(own_redis):
    with open_cache(own_redis.url, op_budget_s=0.1) as cache:
        taught(cache, "28 days")
        assert is_held(cache) == "28 days"
        os.kill(own_redis.pid, signal.SIGSTOP)
        try:
            is_silent(cache)
            before = hits(cache)
            assert asked(cache) is None
            assert hits(cache) == before
        finally:
            os.kill(own_redis.pid, signal.SIGCONT)
        wait_until(lambda: asked(cache) == "28 days", what="an answer of Redis")
        assert is_held(cache) == "28 days"


def test_a_redis_that_was_killed_and_comes_back_empty_has_its_emptiness_served(own_redis, proxy):
    with open_cache(proxy.url) as cache, running_redis("plain") as another:
        taught(cache, "28 days")
        assert is_held(cache) == "28 days"
        proxy.path = path_of(another)
        os.kill(own_redis.pid, signal.SIGKILL)
        wait_until(lambda: not is_running(own_redis.pid))
        has_heard(cache)
        assert asked(cache) is None
        taught(cache, "30 days")
        assert is_held(cache) == "30 days"


async def test_a_connection_of_an_event_loop_is_a_reason_to_connect_anew_too(redis_url):
    with open_cache(redis_url) as cache:
        before = tier_of(cache).doubts
        assert await cache.alookup(BOOK, MODEL) is None
        assert tier_of(cache).doubts == before + 1
        await cache.aclose()


def test_after_a_failover_pushes_come_from_where_calls_go(own_redis, proxy):
    """The old server goes on, and goes on answering over what is connected to it."""
    with open_cache(proxy.url) as cache, running_redis("plain") as another:
        taught(cache, "28 days")
        assert is_held(cache) == "28 days"
        proxy.path = path_of(another)
        with redis.Redis.from_url(own_redis.url, protocol=2) as old:
            for connection in old.client_list():
                if "t" not in connection["flags"] and connection["cmd"] != "client|list":
                    old.client_kill_filter(_id=connection["id"])
            wait_until(lambda: cache.lookup("never asked", MODEL) is None and tier_of(cache).doubts >= 2)
            assert asked(cache) is None
            has_heard(cache)
            wait_until(lambda: not listening(old), what="the end of the old connection")
        taught(cache, "30 days")
        assert is_held(cache) == "30 days"
        with open_cache(another.url, cache.settings.namespace, local_tier_bytes=0) as other:
            other.clear()
        has_heard(cache)
        assert asked(cache) is None


def test_every_kind_of_server_pushes(any_redis):
    with open_cache(any_redis.url) as cache, open_cache(any_redis.url, cache.settings.namespace) as other:
        taught(other, "28 days")
        assert is_held(cache) == is_held(other) == "28 days"
        other.clear()
        has_heard(cache)
        assert asked(cache) is None


@pytest.mark.parametrize("lacks", ["tracking", "resp3"])
def test_a_redis_that_does_not_push_costs_one_warning_and_nothing_else(own_redis, proxy, lacks, caplog):
    notices._said.discard("no_pushes")
    with redis.Redis.from_url(own_redis.url, protocol=2) as admin:
        admin.execute_command("ACL", "SETUSER", "app", "on", ">secret", "~*", "&*", "+@all", "-client|tracking")
    told = {"redis_kwargs": {"username": "app", "password": "secret"}} if lacks == "tracking" else {}
    proxy.says = lambda data: data.replace(b"HELLO", b"OLLEH") if lacks == "resp3" else data
    with open_cache(proxy.url, **told) as cache:
        taught(cache, "28 days")
        for _ in range(20):
            assert asked(cache) == "28 days"
        wait_until(lambda: any("does not push" in r.message for r in caplog.records), what="the warning")
        for _ in range(20):
            assert asked(cache) == "28 days"
        assert hits(cache) == 0
        assert not tier_of(cache).stats().alive
        cache.clear()
        assert asked(cache) is None
    assert sum("does not push" in r.message for r in caplog.records) == 1
    assert threads() == []


def test_a_user_who_may_not_subscribe_is_pushed_to_all_the_same(own_redis):
    with redis.Redis.from_url(own_redis.url, protocol=2) as admin:
        admin.execute_command("ACL", "SETUSER", "app", "on", ">secret", "~*", "resetchannels", "+@all")
    with open_cache(own_redis.url, redis_kwargs={"username": "app", "password": "secret"}) as cache:
        taught(cache, "28 days")
        assert is_held(cache) == "28 days"
        with open_cache(own_redis.url, cache.settings.namespace, local_tier_bytes=0) as other:
            other.clear()
        has_heard(cache)
        assert asked(cache) is None


# -- its life ---------------------------------------------------------------------------------------------------------


def test_closing_the_cache_ends_the_thread_and_the_connection(redis_url, client):
    with open_cache(redis_url) as cache:
        assert threads() == [], "nothing is connected before the first use"
        taught(cache, "28 days")
        assert is_held(cache) == "28 days"
        assert len(threads()) == 1
        cache.close()
        assert threads() == []
        wait_until(lambda: not listening(client, cache.settings.namespace))
        assert tier_of(cache).stats().entries == 0
        assert is_held(cache) == "28 days", "a later use opens another one"
        asyncio.run(cache.aclose())
        assert threads() == []


def test_a_cache_that_is_forgotten_takes_its_thread_along(redis_url):
    cache = open_cache(redis_url)
    taught(cache, "28 days")
    assert is_held(cache) == "28 days"
    assert len(threads()) == 1
    assert the_writer.drain(timeout_s=10)
    del cache
    wait_until(lambda: gc.collect() >= 0 and threads() == [], what="the end of the thread")


def test_who_asks_nothing_sends_nothing_and_hears_all_the_same(cache, other, client, monkeypatch):
    monkeypatch.setattr("langchain_aegis.pushes._IDLE_S", 0.0)
    wait_until(lambda: tier_of(cache)._pushes.idle and not tier_of(cache).stats().alive, what="idleness")
    before = client.info("commandstats")["cmdstat_ping"]["calls"]
    other.clear()
    wait_until(lambda: tier_of(cache).stats().entries == 0, what="a push")
    assert client.info("commandstats")["cmdstat_ping"]["calls"] == before
    assert asked(cache) is None
    taught(other, "30 days")
    monkeypatch.setattr("langchain_aegis.pushes._IDLE_S", 2.0)
    assert is_held(cache) == "30 days"


@pytest.mark.parametrize(("owner", "step"), [(Pushes, "_hear_bell"), (_Session, "heard"), (LocalTier, "changed")])
def test_what_has_come_but_is_not_told_yet_is_known_to_be_missing(cache, other, monkeypatch, owner, step):
    """The thread that tells it may have to wait for others to let it run."""
    do, inside, gate = getattr(owner, step), threading.Event(), threading.Event()

    def held_up(*told):
        inside.set()
        assert gate.wait(10)
        return do(*told)

    monkeypatch.setattr(Sweeper, "wake", lambda *_: None)  # it causes pushes of its own
    has_heard(cache)
    assert is_held(cache) == "28 days"
    tier = tier_of(cache)
    before = tier.stats().invalidated
    try:
        monkeypatch.setattr(owner, step, held_up)
        other.clear()
        assert inside.wait(10)
        wait_until(lambda: not tier._pushes.quiet(), what="a push")
        assert asked(cache) is None
        assert tier.stats().entries == 1
        assert tier.stats().invalidated == before, "it still holds what is not served"
    finally:
        gate.set()


def test_many_writes_at_once_are_all_heard(cache, other, client):
    name = f"{cache.settings.namespace}:{{p00}}:e:"
    with client.pipeline(transaction=False) as pipe:
        for i in range(20_000):
            pipe.set(f"{name}{i:032d}", b"x", px=60_000)
        pipe.execute()
    has_heard(cache)
    assert is_held(cache) == "28 days"
    other.clear()
    has_heard(cache)
    assert asked(cache) is None


# -- other processes --------------------------------------------------------------------------------------------------

READER = """
import asyncio, json, sys, threading
sys.path.insert(0, {tests!r})
from caches import text_of
from test_pushes import BOOK, MODEL, asked, clock, hits, open_cache
cache, last, reads, over = open_cache({url!r}, {namespace!r}), {{}}, 0, threading.Event()
while not hits(cache):
    asked(cache)
print("ready", flush=True)
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
for _ in range({burners}):
    threading.Thread(target=exec, args=("while True: pass",), daemon=True).start()

def read():
    global reads
    while not over.is_set():
        began_s = clock()
        last[asked(cache)] = began_s
        reads += 1

async def aread():
    global reads
    while not over.is_set():
        began_s = clock()
        last[text_of(await cache.alookup(BOOK, MODEL))] = began_s
        reads += 1

asyncio.run(aread()) if {awaited} else read()
print(json.dumps([last, reads, hits(cache)]), flush=True)
"""


class Reader:
    """A process that reads as fast as it can, and says at its end when it last began to read each version."""

    def __init__(self, url, namespace, *, awaited=False, burners=0):
        told = {"url": url, "namespace": namespace, "awaited": awaited, "burners": burners}
        script = READER.format(tests=str(Path(__file__).parent), **told)
        self.process = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        said = self.process.stdout.readline()
        if said != "ready\n":
            self.__exit__()
        assert said == "ready\n"

    def end(self):
        """Return when the last reads of each version began, how many reads there were, and hits of the tier."""
        out, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        last, reads, local = json.loads(out.splitlines()[-1])
        return last, reads, local

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.process:
            self.process.kill()


class Versions:
    """Writes numbered answers, and knows from when on each may not be served any more."""

    def __init__(self, cache):
        self.cache = cache
        self.number = 0
        self.ended_s = {}
        self.write()

    def write(self):
        before = str(self.number)
        self.number += 1
        taught(self.cache, str(self.number))
        self.ended_s.setdefault(before, clock())

    def remove(self, how):
        how(self.cache)
        self.ended_s[str(self.number)] = clock()

    def check(self, last):
        late = {v: last[v] - at_s for v, at_s in self.ended_s.items() if v in last and last[v] > at_s + ALIVE_S}
        assert late == {}, "read so many seconds after it had ended"


REMOVALS = [
    lambda cache: cache.clear(),
    lambda cache: cache.invalidate(older_than_s=0),
    lambda cache: cache.invalidate(model="m"),
    lambda cache: cache.report_wrong(cache.lookup(BOOK, MODEL)[0].message),
]


@pytest.mark.slow
@pytest.mark.parametrize(("awaited", "burners"), [(False, 0), (True, 0), (False, 2)])
def test_no_process_is_ever_served_what_another_ended_longer_ago_than_promised(redis_url, awaited, burners):
    draw = random.Random(burners + awaited)
    pause = threading.Event()
    with open_cache(redis_url, local_tier_bytes=0) as cache:
        versions = Versions(cache)
        with Reader(redis_url, cache.settings.namespace, awaited=awaited, burners=burners) as reader:
            for _ in range(150):
                if draw.random() < 0.5:
                    versions.remove(draw.choice(REMOVALS))
                pause.wait(draw.choice([0, 0.001, 0.01]))  # never set: only to have the two cross in many ways
                versions.write()
                pause.wait(draw.choice([0, 0.001, 0.01]))
            last, reads, local = reader.end()
    versions.check(last)
    assert reads > local > 0
    assert len(last) > 10 or burners


@pytest.mark.slow
def test_a_process_that_was_stopped_serves_nothing_of_before_when_it_goes_on(redis_url):
    with open_cache(redis_url, local_tier_bytes=0) as cache:
        versions = Versions(cache)
        with Reader(redis_url, cache.settings.namespace) as reader:
            for _ in range(3):
                os.kill(reader.process.pid, signal.SIGSTOP)
                for _ in range(20):
                    versions.write()
                until_s = clock() + ALIVE_S
                wait_until(lambda until_s=until_s: clock() > until_s)
                os.kill(reader.process.pid, signal.SIGCONT)
            last, _, local = reader.end()
    versions.check(last)
    assert local > 0


FORK = """
import os, sys
sys.path.insert(0, {tests!r})
from test_pushes import *
cache, other = open_cache({url!r}, {namespace!r}), open_cache({url!r}, {namespace!r}, local_tier_bytes=0)
taught(other, "28 days")
assert is_held(cache) == "28 days"
child = os.fork()
for who in ("child",) if child == 0 else ("parent",):
    if child == 0:
        assert tier_of(cache).stats().entries == 0 and not tier_of(cache).stats().alive
        assert threads() == []
    else:
        assert os.waitpid(child, 0)[1] == 0
    assert is_held(cache) == "28 days"
    assert len(threads()) == 1
    if child == 0:
        cache.close()
        os._exit(0)
    other.clear()
    has_heard(cache)
    assert asked(cache) is None
"""


@pytest.mark.slow
def test_the_child_of_a_fork_listens_for_itself_and_leaves_its_parent_s_connection_alone(redis_url):
    script = FORK.format(tests=str(Path(__file__).parent), url=redis_url, namespace=f"p{uuid.uuid4().hex[:8]}")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
