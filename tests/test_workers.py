"""Real processes in front of one server: what several uvicorn workers do, without uvicorn."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid

import pytest
import redis
from conftest import short_directory, wait_until
from faults.redis_process import RedisProcess

from langchain_aegis.slot_scripts import names_of
from langchain_aegis.testing import ScriptedOllama

# One worker: `callers` coroutines that ask until told to stop; each line of its output is an answer, by its time.
WORKER = """
import asyncio, sys, time
from langchain_aegis import BatchingChatModel, ChatAegis

model = BatchingChatModel(ChatAegis("m", temperature=0.5), max_concurrency=4)

async def caller(name, until_s):
    number = 0
    while time.time() < until_s:
        number += 1
        answer = await model.ainvoke(f"{name} asks number {number}")
        assert answer.text
        print(time.time(), flush=True)

async def main():
    await model.ainvoke("warm up")
    print("ready", getattr(getattr(model.admission, "_lender", None), "worker", "-"), flush=True)
    until_s = float(sys.stdin.readline())
    await asyncio.gather(*(caller(f"{sys.argv[1]}.{i}", until_s) for i in range(int(sys.argv[2]))))

asyncio.run(main())
"""


class Worker:
    def __init__(self, name, callers, env):
        self.answers = []
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WORKER, name, str(callers)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip

    def ready(self):
        ready, self.worker = self.process.stdout.readline().split()
        assert ready == "ready"

    def ask_until(self, when_s):
        self.process.stdin.write(f"{when_s}\n")
        self.process.stdin.flush()
        self._reader = threading.Thread(target=lambda: self.answers.extend(map(float, self.process.stdout)))
        self._reader.start()

    def end(self):
        """Wait until it has ended; returns its exit code."""
        code = self.process.wait(60)
        self._reader.join(10)
        self.process.stdin.close()
        self.process.stdout.close()
        return code


class Seen:
    """The most requests that a server had at once, its own queue included."""

    def __init__(self, server):
        self.server, self.most, self._done = server, 0, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self):
        def more(server):
            self.most = max(self.most, server.running + server.waiting)
            return self._done.is_set()

        self.server.wait_until(more, timeout_s=300)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self.server._notify()
        self._thread.join(10)


def environment(redis_url, server, **told):
    namespace = f"w{uuid.uuid4().hex[:8]}"
    return {
        **os.environ, "OLLAMA_BASE_URL": server.base_url, "AEGIS_SHARED_SLOTS": "1", "AEGIS_REDIS_URL": redis_url,
        "AEGIS_NAMESPACE": namespace, "AEGIS_SLOT_LEASE_S": "2", **told,
    }  # fmt: skip


def goodput(workers, from_s, until_s):
    return sum(from_s <= at <= until_s for worker in workers for at in worker.answers) / (until_s - from_s)


def run_for(seconds, workers):
    for worker in workers:
        worker.ready()
    began_s = time.time()
    for worker in workers:
        worker.ask_until(began_s + seconds)
    return began_s


@pytest.mark.slow
def test_eight_processes_never_have_more_calls_than_slots_and_lose_little_by_that(redis_url):
    """8 processes x 16 callers, 4 slots; beside a single process that keeps to them."""
    with ScriptedOllama("m", slots=4, request_s=0.3) as server:
        env = environment(redis_url, server)
        alone = Worker("alone", 16, {**env, "AEGIS_SHARED_SLOTS": "0"})
        began_s = run_for(6, [alone])
        assert alone.end() == 0
        single = goodput([alone], began_s + 1, began_s + 6)
        server.forget()
        workers = [Worker(f"w{i}", 16, env) for i in range(8)]
        with Seen(server) as seen:
            began_s = run_for(8, workers)
            assert [worker.end() for worker in workers] == [0] * 8
        assert seen.most == 4
        assert server.counters.max_running == 4
        shared = goodput(workers, began_s + 1, began_s + 8)
        print(json.dumps({"single": single, "shared": shared, "ratio": shared / single}))
        assert shared >= 0.9 * single
        each = [len(worker.answers) for worker in workers]
        assert min(each) >= 0.5 * max(each)  # fair between processes


@pytest.mark.slow
def test_the_slots_of_killed_processes_are_back_within_the_lease(redis_url):
    """kill -9 of 3 of 8 processes, each in the middle of calls."""
    with ScriptedOllama("m", slots=4, request_s=0.3) as server:
        env = environment(redis_url, server)
        slots = names_of(env["AEGIS_NAMESPACE"], server.base_url)[0]
        workers = [Worker(f"w{i}", 16, env) for i in range(8)]
        with redis.Redis.from_url(redis_url) as client, Seen(server) as seen:

            def held(worker):
                return [name for name in client.zrange(slots, 0, -1) if name.startswith(worker.worker.encode())]

            began_s = run_for(14, workers)
            wait_until(lambda: sum(map(bool, map(held, workers))) >= 3)
            killed = []
            while len(killed) < 3:
                for worker in workers:
                    if worker not in killed and held(worker):
                        os.kill(worker.process.pid, signal.SIGSTOP)  # from now on it gives nothing back
                        if held(worker) and len(killed) < 3:
                            os.kill(worker.process.pid, signal.SIGKILL)
                            killed.append(worker)
                        else:
                            os.kill(worker.process.pid, signal.SIGCONT)
            killed_s = time.time()
            wait_until(lambda: not any(map(held, killed)), what="the end of their leases")
            assert time.time() - killed_s < 2 + 1  # the lease, and a busy machine
            back_s = time.time()
            codes = [worker.end() for worker in workers]
        living = [worker for worker in workers if worker not in killed]
        assert [worker.process.returncode for worker in killed] == [-signal.SIGKILL] * 3
        assert codes.count(0) == 5
        assert seen.most == 4
        assert goodput(living, back_s, began_s + 14) >= 0.8 * 4 / 0.3  # of all four slots


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_redis_that_goes_away_under_load_breaks_no_call_and_the_count_holds_again(how):
    with (
        short_directory() as path,
        RedisProcess(path, search=False, saved=False) as own,
        ScriptedOllama("m", slots=64, request_s=0.2) as server,
    ):
        env = environment(own.url, server)
        workers = [Worker(f"w{i}", 8, env) for i in range(4)]
        with Seen(server) as all_the_time:
            began_s = run_for(14, workers)
            time.sleep(2)
            if how == "killed":
                own.kill()
                time.sleep(3)
                own.start()
            else:
                with own.frozen():
                    time.sleep(3)
            back_s = time.time()
            time.sleep(4)  # till everybody is counted again
            with Seen(server) as afterwards:
                codes = [worker.end() for worker in workers]
        assert codes == [0] * 4  # every call was answered
        assert afterwards.most == 4
        assert all_the_time.most <= 8  # those that had slots, and each one's share
        assert goodput(workers, back_s - 2, back_s) > 0.5 * 4 / 0.2  # in the middle of it
        assert goodput(workers, back_s + 4, began_s + 14) > 0.7 * 4 / 0.2


# One worker: `callers` coroutines that ask the same at about the same moment and read it as it comes.
ASKER = """
import asyncio, hashlib, sys, time
from langchain_aegis import AegisSemanticCache, BatchingChatModel, ChatAegis

cache = AegisSemanticCache(lease_s=30, lease_wait_s=30, op_budget_s=5)
model = BatchingChatModel(ChatAegis("m", temperature=0, cache=cache), cache=cache, max_waiting=1000)

async def caller(i):
    await asyncio.sleep(i * 0.01)  # some come late
    times, text = [], ""
    async for chunk in model.astream("How long may I keep a book at home?"):
        times.append(time.time())
        text += chunk.text
    print(len(times), times[0], times[-1], hashlib.sha256(text.encode()).hexdigest(), flush=True)

async def main():
    assert await cache.alookup("warm up", "x") is None
    print("ready", flush=True)
    sys.stdin.readline()
    await asyncio.gather(*(caller(i) for i in range(int(sys.argv[1]))))

asyncio.run(main())
"""


def askers(env, processes, callers):
    """Start processes of so many callers each, ready to ask."""
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", ASKER, str(callers)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=env,
        )
        for _ in range(processes)
    ]  # fmt: skip
    for process in started:
        assert process.stdout.readline() == "ready\n"
    return started


def go(*processes):
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()


@pytest.mark.slow
def test_when_the_process_that_makes_the_answer_is_killed_another_one_makes_it(redis_url):
    with ScriptedOllama("m", slots=4, words=24) as server:
        leader, *others = askers(environment(redis_url, server), 4, 5)
        with server.hold():  # nothing has come of it yet
            go(leader)
            server.wait_until(lambda server: len(server.chats) == 1, timeout_s=30)
            go(*others)
            time.sleep(1)
            assert len(server.chats) == 1
            leader.kill()
            server.wait_until(lambda server: len(server.chats) == 2, timeout_s=30)
        told = [process.communicate(timeout=60)[0] for process in others]
        assert [process.returncode for process in others] == [0] * 3
        rows = [line.split() for text in told for line in text.splitlines()]
        assert len(rows) == 15
        assert len({digest for *_, digest in rows}) == 1
        assert len(server.chats) == 2
        leader.communicate(timeout=10)


@pytest.mark.slow
def test_eight_processes_with_four_hundred_identical_calls_make_one_that_is_streamed_to_all(redis_url):
    with ScriptedOllama("m", slots=4, tokens_per_s=8, words=24) as server:
        processes = askers(environment(redis_url, server), 8, 50)
        go(*processes)
        told = [process.communicate(timeout=60)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * 8
        rows = [line.split() for text in told for line in text.splitlines()]
        assert len(rows) == 400
        assert len({digest for *_, digest in rows}) == 1
        assert len(server.chats) == 1
        # All of them began to read well before the answer was complete, and read it in many pieces.
        ends = min(float(last) for _, _, last, _ in rows)
        assert max(float(first) for _, first, _, _ in rows) < ends
        assert min(int(count) for count, *_ in rows) > 5
