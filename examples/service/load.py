"""Ask the service as many clients do, kill a worker and Redis meanwhile, and say how every question ended.

    python examples/service/load.py --start --clients 200 --seconds 60 --kill-worker --restart-redis

Exit code 1 if a question ended in anything but an answer or a typed 503 with Retry-After. A question whose connection
breaks is asked again, as a gateway in front of the workers does; `asked_again` counts them.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TOPICS = [  # each: questions that have one answer
    ["When does the library open on Saturday?", "At what time does the library open on Saturday?"],
    ["When does the library open on Sunday?", "At what time does the library open on Sunday?"],
    ["How do I increase the loan limit of my account?", "How can I increase the loan limit of my account?"],
    ["How do I decrease the loan limit of my account?", "How can I decrease the loan limit of my account?"],
    ["What does a reader card for 12 months cost?", "How much does a reader card for 12 months cost?"],
    ["What does a reader card for 3 months cost?", "How much does a reader card for 3 months cost?"],
    ["Which rooms may visitors use without a reservation?", "Which rooms can visitors use without a reservation?"],
    ["Which rooms may visitors use with a reservation?", "Which rooms can visitors use with a reservation?"],
    ["For how many days are books lent?"],
    ["For how many days are films lent?"],
    ["What does the cafe beside the entrance sell?"],
    ["On which floor are the printers?", "Where are the printers?"],
]
TENANTS, USERS = ("acme", "globex"), 50
NEW_SHARE = 0.05  # of the questions: asked by nobody before
TRIES = 4
PATIENCE_S = 120.0
ANSWERED = ("exact", "semantic", "model", "shared")


class BrokenError(Exception):
    """The connection broke: the worker is gone."""


@dataclass
class Report:
    """How the questions ended.

    Attributes:
        ended: exact, semantic (answered from the cache), model (by it), shared (from the cache, but not yet there when
            it was asked for), refused (a typed 503), or what must not be -> how many.
        cached_ms: Times from question to the last word, of answers from the cache.
        cached_at: When each of these came, in seconds since the start.
        redis_back_at: When Redis served again, None if it was never away.
        model_ms: The same of answers by the model.
        first_ms: Times to the first word, of answers from the cache.
        asked_again: Questions whose connection broke.
        wrong: Answers that were made for another question.
        misses: Why questions were not answered from the cache, as the workers count.
        said: What happened, with its time.
    """

    ended: Counter[str] = field(default_factory=Counter)
    cached_ms: list[float] = field(default_factory=list)
    cached_at: list[float] = field(default_factory=list)
    redis_back_at: float | None = None
    model_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    asked_again: int = 0
    wrong: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether every question ended as it may, and answers came from the cache, also after Redis was away."""
        hits = bool(self.cached_at) if self.redis_back_at is None else self._hits_again_s is not None
        return not self.wrong and set(self.ended) <= {*ANSWERED, "refused"} and hits

    @property
    def _hits_again_s(self) -> float | None:
        back = self.redis_back_at
        return None if back is None else next((at - back for at in self.cached_at if at > back), None)

    def as_dict(self, seconds: float) -> dict[str, Any]:
        """Return the figures."""
        until = [*self.cached_at, seconds]
        gaps = [later - earlier for earlier, later in zip([0.0, *self.cached_at], until, strict=True)]
        again = self._hits_again_s
        return {
            "questions": sum(self.ended.values()),
            "per_s": round(sum(self.ended.values()) / seconds, 1),
            "ended": dict(sorted(self.ended.items())),
            "asked_again": self.asked_again,
            "wrong": self.wrong,
            "cached_ms": _spread(self.cached_ms),
            "cached_first_word_ms": _spread(self.first_ms),
            "model_ms": _spread(self.model_ms),
            "longest_without_a_cached_answer_s": round(max(gaps), 2),
            "hits_after_redis_was_back_s": None if again is None else round(again, 2),
            "misses": self.misses,
            "said": self.said,
        }


class Service:
    """The service, from outside.

    Args:
        url: Its address.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80

    async def get(self, path: str) -> tuple[int, dict[str, Any]]:
        """Return status and JSON of a path."""
        status, body = await self._get(path)
        return status, json.loads(_dechunked(body) or b"{}")

    async def misses(self) -> dict[str, int]:
        """Return why questions were not answered from the cache, and how often, by the workers that live."""
        counted: Counter[str] = Counter()
        for line in (await self._get("/metrics"))[1].decode().splitlines():
            if found := re.match(r'aegis_cache_misses_total{.*reason="(\w+)".*} ([\d.e+]+)$', line):
                counted[found[1]] += int(float(found[2]))
        return {reason: n for reason, n in counted.most_common() if n}

    async def _get(self, path: str) -> tuple[int, bytes]:
        async with self._asked(f"GET {path} HTTP/1.1\r\n", b"") as reader:
            status, _ = await _head(reader)
            return status, await reader.read()

    async def ask(self, question: str, tenant: str, user: str) -> tuple[str, str, float]:
        """Return how a question ended, the answer, and the seconds to its first word. Raises BrokenError."""
        body = json.dumps({"question": question}).encode()
        who = f"content-type: application/json\r\nx-tenant: {tenant}\r\nx-user: {user}\r\n"
        began, first, words, ending = time.monotonic(), 0.0, list[str](), ""
        try:
            async with self._asked(f"POST /ask HTTP/1.1\r\n{who}", body) as reader:
                status, headers = await _head(reader)
                if status != 200:
                    return _refusal(status, headers, _dechunked(await reader.read())), "", 0.0
                kind = ""
                async for line in reader:
                    text = line.decode().strip()
                    if text.startswith("event: "):
                        kind = text.removeprefix("event: ")
                    elif text.startswith("data: "):
                        data = json.loads(text.removeprefix("data: "))
                        if kind == "token":
                            first = first or time.monotonic() - began
                            words.append(data)
                        elif kind == "end":
                            ending = data["cached"] or "model"
                        else:
                            return f"error event {data.get('error')}", "", first
        except (OSError, asyncio.IncompleteReadError, ValueError) as exc:
            raise BrokenError(type(exc).__name__) from exc
        if not ending:
            raise BrokenError("no end")
        return ending, "".join(words), first

    @contextlib.asynccontextmanager
    async def _asked(self, head: str, body: bytes) -> Any:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            more = f"host: {self._host}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + more.encode() + body)
            await writer.drain()
            yield reader
        finally:
            writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    return int(lines[0].split()[1]), headers


def _dechunked(body: bytes) -> bytes:
    start, end = body.find(b"{"), body.rfind(b"}")
    return body[start : end + 1] if start >= 0 else b""


def _refusal(status: int, headers: dict[str, str], body: bytes) -> str:
    try:
        typed = bool(json.loads(body)["error"]) and int(headers["retry-after"]) >= 1
    except (ValueError, KeyError, TypeError):
        typed = False
    return "refused" if status == 503 and typed else f"status {status}{'' if typed else ', not typed'}"


class Load:
    """Clients that ask until the time is over.

    Args:
        service: Whom.
        seconds: For how long new questions are asked; those that were asked are waited for.
        pause_s: What a client does between two questions, on average.
        seed: Of the choice of questions.
    """

    def __init__(self, service: Service, seconds: float, pause_s: float, seed: int) -> None:
        self.service, self.seconds, self.pause_s = service, seconds, pause_s
        self.report = Report()
        self._random = random.Random(seed)
        self._made: dict[tuple[str, str], set[str]] = {}  # tenant and topic -> answers that the model gave
        self._kept: set[tuple[str, str]] = set()  # tenant and question: those that have an answer of their own
        self._count = 0
        self._redis: Any = None
        self.began = time.monotonic()

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def say(self, what: str) -> None:
        """Note what happens."""
        self.report.said.append(f"{self.now:.1f} s: {what}")
        print(self.report.said[-1], file=sys.stderr, flush=True)

    async def client(self, number: int) -> None:
        """Ask, read, pause, and ask again."""
        tenant, user = TENANTS[number % len(TENANTS)], f"user{number % USERS}"
        await asyncio.sleep(self._random.random() * self.pause_s)
        while self.now < self.seconds:
            topic, question = self._next()
            await self._question(tenant, user, topic, question)
            await asyncio.sleep(self.pause_s * (0.5 + self._random.random()))

    def _next(self) -> tuple[str, str]:
        self._count += 1
        if self._random.random() < NEW_SHARE:
            return f"new {self._count}", f"Which floor is shelf {self._count} on?"
        topic = TOPICS[min(int(self._random.paretovariate(0.7)) - 1, len(TOPICS) - 1)]  # some are asked far more often
        return topic[0], self._random.choice(topic)

    async def _question(self, tenant: str, user: str, topic: str, question: str) -> None:
        began, report = time.monotonic(), self.report
        was_there = (tenant, question) in self._kept, (tenant, topic) in self._kept
        for _ in range(TRIES):
            try:
                async with asyncio.timeout(PATIENCE_S):
                    ending, answer, first_s = await self.service.ask(question, tenant, user)
                break
            except BrokenError:
                report.asked_again += 1
                await asyncio.sleep(0.1)
            except TimeoutError:
                ending, answer, first_s = "no answer in time", "", 0.0
                break
        else:
            ending, answer, first_s = "lost", "", 0.0
        if ending in ("model", "exact"):
            self._kept.add((tenant, question))
        if (ending == "exact" and not was_there[0]) or (ending == "semantic" and not any(was_there)):
            ending = "shared"
        report.ended[ending] += 1
        took_ms = 1000 * (time.monotonic() - began)
        if ending == "model":
            report.model_ms.append(took_ms)
            self._made.setdefault((tenant, topic), set()).add(answer)
        elif ending in ANSWERED:
            report.wrong += self._is_anothers(tenant, topic, answer)
        if ending in ("exact", "semantic"):
            report.cached_ms.append(took_ms)
            report.first_ms.append(1000 * first_s)
            report.cached_at.append(self.now)

    def _is_anothers(self, tenant: str, topic: str, answer: str) -> bool:
        """Whether an answer was made for another question of the tenant, and never for this one."""
        if answer in self._made.get((tenant, topic), ()):
            return False
        return any(answer in made for (owner, other), made in self._made.items() if owner == tenant and other != topic)

    async def warm(self) -> None:
        """Ask what is asked often once, as on any day before; nothing of this is counted."""
        asked = [(tenant, topic[0]) for tenant in TENANTS for topic in TOPICS]
        for at in range(0, len(asked), 4):
            together = asked[at : at + 4]
            answers = await asyncio.gather(
                *(self.service.ask(question, tenant, "ann") for tenant, question in together)
            )
            for (tenant, question), (_, answer, _) in zip(together, answers, strict=True):
                self._made.setdefault((tenant, question), set()).add(answer)
                self._kept.add((tenant, question))

    async def kill_worker(self) -> None:
        """Kill the worker that answers first, as the kernel does when memory is short."""
        _, health = await self.service.get("/healthz")
        os.kill(health["worker"], signal.SIGKILL)
        self.say(f"worker {health['worker']} killed")

    async def restart_redis(self) -> None:
        """Kill Redis and start it again; it is held until this program ends."""
        from langchain_aegis.embedded import EmbeddedRedis

        def killed(redis: EmbeddedRedis) -> int:
            pid = int(redis.pid)
            os.kill(pid, signal.SIGKILL)
            return pid

        def started_again(redis: EmbeddedRedis, before: int) -> int:
            while (pid := int(redis.pid)) == before:  # its death has not been noticed yet
                time.sleep(0.05)
            return pid

        self._redis = EmbeddedRedis()
        before = await asyncio.to_thread(killed, self._redis)
        self.say(f"Redis {before} killed")
        again = await asyncio.to_thread(started_again, self._redis, before)
        self.say(f"Redis is back as {again}")
        self.report.redis_back_at = self.now


async def run(load: Load, clients: int, *, kill_worker: bool, restart_redis: bool) -> Report:
    """Ask with so many clients at once; the faults come after a third and after two thirds of the time."""

    async def faults() -> None:
        for at, wanted, fault in ((1, kill_worker, load.kill_worker), (2, restart_redis, load.restart_redis)):
            await asyncio.sleep(max(0.0, at * load.seconds / 3 - load.now))
            if wanted:
                await fault()

    load.began = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(faults())
        for number in range(clients):
            tasks.create_task(load.client(number))
    return load.report


async def until_ready(service: Service, timeout_s: float = 180.0) -> None:
    """Wait until the service can answer."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
            if (await service.get("/readyz"))[0] == 200:
                return
        if time.monotonic() > deadline:
            raise TimeoutError("the service did not become ready")
        await asyncio.sleep(0.25)


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


@contextlib.contextmanager
def started(port: int, workers: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run the service with a home of its own, whose Redis may be killed."""
    with tempfile.TemporaryDirectory(prefix="svc-", dir="/tmp") as home:  # short, for a socket
        os.environ["AEGIS_HOME"] = home
        command = [
            sys.executable,
            str(Path(__file__).with_name("run.py")),
            "--port",
            str(port),
            "--workers",
            str(workers),
        ]
        with subprocess.Popen(command) as process:  # noqa: S603 - our own program
            try:
                yield process
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(60)
                process.kill()


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {name: round(ordered[int(share * (len(ordered) - 1))], 1) for name, share in
            (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0)) if ordered} | {"n": len(ordered)}  # fmt: skip


def main() -> int:
    """Run it and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="default: port 8080, or with --start any free one")
    parser.add_argument("--start", action="store_true", help="run the service too, with a home of its own")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--pause-s", type=float, default=2.0, help="of a client between two questions, on average")
    parser.add_argument("--cold", action="store_true", help="begin with an empty cache")
    parser.add_argument("--kill-worker", action="store_true")
    parser.add_argument("--restart-redis", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    given = parser.parse_args()
    url = given.url or f"http://127.0.0.1:{free_port() if given.start else 8080}"
    service = Service(url)
    load = Load(service, given.seconds, given.pause_s, given.seed)
    with started(urlsplit(url).port or 80, given.workers) if given.start else contextlib.nullcontext():

        async def all_of_it() -> Report:
            await until_ready(service)
            if not given.cold:
                await load.warm()
            report = await run(load, given.clients, kill_worker=given.kill_worker, restart_redis=given.restart_redis)
            report.misses = await service.misses()
            return report

        report = asyncio.run(all_of_it())
    figures = {"clients": given.clients, "seconds": given.seconds, "pause_s": given.pause_s,
               **report.as_dict(given.seconds), "good": report.is_good}  # fmt: skip
    text = json.dumps(figures, indent=2)
    print(text)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
