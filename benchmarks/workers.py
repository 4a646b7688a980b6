"""Measure what sharing slots and answers between processes costs, and write it into docs/workers.md.

python benchmarks/workers.py [--write]

Takes two minutes. The server is the scripted one, in this process, with 4 slots and answers of 0.3 s.
"""

import argparse
import asyncio
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import redis

from langchain_aegis import AegisSemanticCache, BatchingChatModel, ChatAegis
from langchain_aegis.embedded import EmbeddedRedis
from langchain_aegis.servers import admission_for
from langchain_aegis.slot_scripts import names_of
from langchain_aegis.testing import ScriptedOllama

PAGE = Path(__file__).resolve().parent.parent / "docs" / "workers.md"
MARKS = "<!-- measured -->", "<!-- /measured -->"
CALLS = 500
ANSWER_S = 0.3
PROCESSES, CALLERS = 8, 16
SECONDS = 8.0


def told_by(values: list[float]) -> str:
    values.sort()
    return f"{statistics.median(values) * 1e6:.0f} µs (95 %: {values[int(len(values) * 0.95)] * 1e6:.0f} µs)"


def blocking(server: str) -> list[float]:
    admission, took = admission_for(server), []
    for _ in range(CALLS):
        began = time.perf_counter()
        with admission.slot():
            took.append(time.perf_counter() - began)
        time.sleep(0.002)
    return took


async def awaited(server: str) -> list[float]:
    admission, took = admission_for(server), []
    for _ in range(CALLS):
        began = time.perf_counter()
        async with admission.aslot():
            took.append(time.perf_counter() - began)
        await asyncio.sleep(0.002)
    return took


def one_call(url: str) -> list[tuple[str, str, str]]:
    rows, beside = [], {}
    for shared in ("0", "1"):
        os.environ["AEGIS_SHARED_SLOTS"] = shared
        for name, took in (
            ("blocking", blocking(f"http://{shared}-blocking")),
            ("awaited", asyncio.run(awaited(f"http://{shared}-awaited"))),
        ):
            if shared == "0":
                beside[name] = told_by(took)
            else:
                rows.append((f"until a call has a free slot, {name}", told_by(took), f"not shared: {beside[name]}"))
    with redis.Redis.from_url(url) as client:
        told = client.info("commandstats")["cmdstat_eval"]
        rows.append(
            (
                "of that, Redis computes",
                f"{told['usec_per_call']:.0f} µs",
                f"{told['calls'] / CALLS / 2:.1f} times per call: taking it, giving it back",
            )
        )
    return rows


class Process:
    """One worker: a process of this file."""

    def __init__(self, callers: int, told: dict[str, str], *how: str) -> None:
        self.answers: list[float] = []
        self.worker = b""  # its name where slots are counted
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--callers", str(callers), *how],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **told},
        )  # fmt: skip

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def told_at_the_end(self) -> list[str]:
        return self.process.communicate()[0].splitlines()

    def start(self, until_s: float) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{until_s}\n")
        self.process.stdin.flush()
        self.reader = threading.Thread(target=lambda: self.answers.extend(map(float, self.process.stdout or ())))
        self.reader.start()


def together(processes: list[Process], seconds: float) -> float:
    """Let processes ask for so long; returns when they began."""
    for each in processes:
        assert each.process.stdout is not None
        each.worker = each.process.stdout.readline().split()[1].encode()
    began_s = time.time()
    for each in processes:
        each.start(began_s + seconds)
    return began_s


def ended(processes: list[Process]) -> None:
    for each in processes:
        each.process.wait(60)
        each.reader.join()


def goodput(processes: list[Process], from_s: float, until_s: float) -> float:
    return sum(from_s <= at <= until_s for each in processes for at in each.answers) / (until_s - from_s)


def many(url: str) -> list[tuple[str, str, str]]:
    namespace = f"b{uuid.uuid4().hex[:8]}"
    with ScriptedOllama("m", slots=4, request_s=ANSWER_S) as server:
        told = {"OLLAMA_BASE_URL": server.base_url, "AEGIS_NAMESPACE": namespace, "AEGIS_SLOT_LEASE_S": "2"}
        alone = [Process(CALLERS, {**told, "AEGIS_SHARED_SLOTS": "0"})]
        began_s = together(alone, SECONDS)
        ended(alone)
        single = goodput(alone, began_s + 1, began_s + SECONDS)
        server.forget()
        processes = [Process(CALLERS, {**told, "AEGIS_SHARED_SLOTS": "1"}) for _ in range(PROCESSES)]
        began_s = together(processes, 2 * SECONDS)
        time.sleep(SECONDS)
        shared = goodput(processes, began_s + 1, began_s + SECONDS)
        each = [len(one.answers) for one in processes]
        with redis.Redis.from_url(url) as client:
            slots = names_of(namespace, server.base_url)[0]

            def held(one: Process) -> bool:
                return any(name.startswith(one.worker) for name in client.zrange(slots, 0, -1))

            killed: list[Process] = []
            while len(killed) < 3:  # each while it holds a slot
                for one in processes:
                    if one not in killed and len(killed) < 3 and held(one):
                        os.kill(one.process.pid, signal.SIGSTOP)
                        dies = held(one)
                        os.kill(one.process.pid, signal.SIGKILL if dies else signal.SIGCONT)
                        killed += [one] if dies else []
            killed_s = time.time()
            while any(map(held, killed)):
                time.sleep(0.01)
            back_s = time.time() - killed_s
        ended(processes)
        return [
            (
                f"{PROCESSES} processes with {CALLERS} callers each, 4 slots, answers of {ANSWER_S} s",
                f"{shared:.1f} answers a second; never more than {server.counters.max_running} at once",
                f"one process with {CALLERS} callers: {single:.1f} a second ({shared / single:.0%})",
            ),
            ("answers of each process in that time", f"{min(each)} to {max(each)}", "fair shares would be equal"),
            (
                "kill -9 of 3 of them, each in a call: until the last slot of theirs is free",
                f"{back_s:.1f} s",
                "AEGIS_SLOT_LEASE_S=2",
            ),
        ]


def identical(url: str) -> list[tuple[str, str, str]]:
    """Let all processes stream the same at the same time."""
    rows: list[tuple[str, str, str]] = []
    beside = ""
    for processes, callers, lease_s in ((1, 1, "0"), (PROCESSES, 50, "0"), (PROCESSES, 50, "60")):
        with ScriptedOllama("m", slots=4, tokens_per_s=8, words=24) as server:
            told = {
                "OLLAMA_BASE_URL": server.base_url, "AEGIS_NAMESPACE": f"i{lease_s}{processes}",
                "AEGIS_SHARED_SLOTS": "1", "AEGIS_LEASE_S": lease_s,
            }  # fmt: skip
            started = [Process(callers, told, "--same") for _ in range(processes)]
            for each in started:
                assert each.process.stdout is not None
                each.process.stdout.readline()
            began_s = time.time()
            for each in started:
                each.go()
            pairs = [line.split() for each in started for line in each.told_at_the_end()]
            first, last = (max(float(pair[i]) for pair in pairs) - began_s for i in (0, 1))
            calls = f"{len(server.chats)} call{'s' * (len(server.chats) > 1)} of the model"
            text = f"{calls}; everybody's first piece after {first:.1f} s, all after {last:.1f} s"
            if processes == 1:
                beside = f"one caller alone: first piece after {first:.1f} s, all after {last:.1f} s"
            else:
                shared = "with" if lease_s != "0" else "without"
                what = f"{processes} processes, {len(pairs)} identical streams, {shared} `AEGIS_LEASE_S`"
                rows.append((what, text, beside))
    return rows


async def same(callers: int) -> None:
    cache = AegisSemanticCache(op_budget_s=2)
    model = BatchingChatModel(ChatAegis("m", temperature=0, cache=cache), cache=cache, max_waiting=1000)

    async def caller() -> None:
        times = [time.time() async for _ in model.astream("How long may I keep a book at home?")]
        print(times[0], times[-1], flush=True)

    await cache.alookup("warm up", "x")
    print("ready -", flush=True)
    sys.stdin.readline()
    await asyncio.gather(*(caller() for _ in range(callers)))


async def worker(callers: int) -> None:
    model = BatchingChatModel(ChatAegis("m", temperature=0.5), max_concurrency=4)

    async def caller(number: int, until_s: float) -> None:
        count = 0
        while time.time() < until_s:
            count += 1
            await model.ainvoke(f"caller {number} of {os.getpid()} asks number {count}")
            print(time.time(), flush=True)

    await model.ainvoke("warm up")
    print("ready", getattr(getattr(model.admission, "_lender", None), "worker", "-"), flush=True)
    until_s = float(sys.stdin.readline())
    await asyncio.gather(*(caller(number, until_s) for number in range(callers)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/workers.md")
    parser.add_argument("--callers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--same", action="store_true", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.callers:
        asyncio.run((same if told.same else worker)(told.callers))
        return
    with EmbeddedRedis(shared=False, search=False) as server:
        os.environ.update(AEGIS_REDIS_URL=server.url, AEGIS_NAMESPACE="b")
        rows = [*one_call(server.url), *many(server.url), *identical(server.url)]
    table = "\n".join(["| Measured | Result | Beside |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])
    print(table)
    if told.write:
        before, mark, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        _, end, after = rest.partition(MARKS[1])
        PAGE.write_text(f"{before}{mark}\n\n{table}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
