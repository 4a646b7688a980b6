"""What goes wrong in a soak: each is the matter for a bounded time and then over."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import orjson
import redis

from faults.payloads import BYTES, DOCUMENTS
from faults.soak_history import Window
from faults.soak_parts import BOUNDED, SCRIPTED, Stack
from langchain_aegis.errors import (
    AegisConnectionError,
    AegisDeadlineError,
    AegisOverloadedError,
    AegisServerError,
    AegisStreamError,
    AegisTimeoutError,
)

# What a fault of the model server itself may cost its callers.
_BROKEN = {SCRIPTED: (AegisStreamError,)}
_ENDED = {SCRIPTED: (AegisStreamError, AegisConnectionError)}
_FAILED = {SCRIPTED: (AegisServerError,)}
_BUSY = {SCRIPTED: (AegisOverloadedError,)}
_SILENT = {SCRIPTED: (AegisTimeoutError, AegisDeadlineError)}  # the second: of those who wait for their turn


@dataclass(frozen=True)
class Fault:
    """One way to go wrong.

    Attributes:
        where: "redis", "embedder", "ollama" or "callers".
        happen: Breaks what it is given and returns when it is whole again. It is also given the seconds that it lasts,
            and a source of chance.
        may_raise: The errors that it may cost a caller, by the target's name.
        away: Nothing can be had from Redis while it lasts.
    """

    where: str
    happen: Callable[[Stack, float, random.Random], None]
    may_raise: dict[str, tuple[type[BaseException], ...]] = field(default_factory=dict)
    away: bool = False

    def window(self, name: str) -> Window:
        """Return what the history is told of it."""
        return Window(name, self.where, time.monotonic(), may_raise=self.may_raise)


# -- Redis ------------------------------------------------------------------------------------------------------------


def _killed(stack: Stack, seconds: float, chosen: random.Random) -> None:
    stack.server.kill()
    time.sleep(seconds)
    stack.server.start()


def _frozen(stack: Stack, seconds: float, chosen: random.Random) -> None:
    with stack.server.frozen():
        time.sleep(seconds)


def _trembling(stack: Stack, seconds: float, chosen: random.Random) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with stack.server.frozen():
            time.sleep(chosen.uniform(0.05, 0.4))
        time.sleep(chosen.uniform(0.05, 0.4))


def _paused(what: str):
    def happen(stack: Stack, seconds: float, chosen: random.Random) -> None:
        stack.server.client.execute_command("CLIENT", "PAUSE", int(seconds * 1_000), what)
        time.sleep(seconds + 0.05)

    return happen


def _full(stack: Stack, seconds: float, chosen: random.Random) -> None:
    stack.server.fill()
    time.sleep(seconds)
    stack.server.make_room()


def _read_only(stack: Stack, seconds: float, chosen: random.Random) -> None:
    stack.server.client.execute_command("CONFIG", "SET", "replica-read-only", "yes")
    stack.server.client.execute_command("CONFIG", "SET", "replica-serve-stale-data", "yes")
    stack.server.client.execute_command("REPLICAOF", "127.0.0.1", 1)  # where nobody is
    time.sleep(seconds)
    stack.server.client.execute_command("REPLICAOF", "NO", "ONE")


def _emptied(stack: Stack, seconds: float, chosen: random.Random) -> None:
    for _ in range(chosen.choice((1, 1, 3))):
        stack.server.empty()
        time.sleep(chosen.uniform(0.0, 0.2))


def _no_index(stack: Stack, seconds: float, chosen: random.Random) -> None:
    for _ in range(chosen.choice((1, 1, 3))):
        with contextlib.suppress(redis.ResponseError):  # made again and gone again meanwhile
            stack.server.drop_indexes()
        time.sleep(chosen.uniform(0.0, 0.2))


# -- the network ------------------------------------------------------------------------------------------------------


def _network(change: Callable[[Stack, random.Random], None], steps: int = 1):
    def happen(stack: Stack, seconds: float, chosen: random.Random) -> None:
        for _ in range(steps):
            change(stack, chosen)
            time.sleep(seconds / steps)
        stack.proxy.heal()
        # What was on its way, or swallowed, belongs to no connection any more.
        stack.proxy.disconnect()

    return happen


def _slow(stack: Stack, chosen: random.Random) -> None:
    stack.proxy.down.latency_s = chosen.uniform(0.005, 0.03)


def _very_slow(stack: Stack, chosen: random.Random) -> None:
    stack.proxy.down.latency_s = chosen.uniform(0.15, 0.6)


def _jitter(stack: Stack, chosen: random.Random) -> None:
    stack.proxy.up.jitter_s = stack.proxy.down.jitter_s = chosen.uniform(0.02, 0.2)


def _swallow(stack: Stack, chosen: random.Random) -> None:
    chosen.choice((stack.proxy.up, stack.proxy.down)).black_hole = True


def _slices(stack: Stack, chosen: random.Random) -> None:
    stack.proxy.down.slice_bytes = chosen.choice((1, 7))


def _cut(stack: Stack, chosen: random.Random) -> None:
    way = chosen.choice((stack.proxy.up, stack.proxy.down))
    way.reset, way.cut_after = chosen.random() < 0.5, chosen.randrange(2_000)


def _disconnect(stack: Stack, chosen: random.Random) -> None:
    stack.proxy.disconnect()


# -- what lies in Redis -----------------------------------------------------------------------------------------------


def _stored(change: Callable[[Stack, random.Random, list[bytes]], None]):
    def happen(stack: Stack, seconds: float, chosen: random.Random) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            names = [name for cache in stack.caches.values() for name in _entries(stack, cache.settings.namespace)]
            if names:
                change(stack, chosen, names)
            time.sleep(0.05)

    return happen


def _entries(stack: Stack, namespace: str) -> list[bytes]:
    return list(stack.server.client.scan_iter(f"{namespace}:{{p00}}:e:*", count=1_000))


def _bits(stack: Stack, chosen: random.Random, names: list[bytes]) -> None:
    """Change one bit of one field of some entries, or cut the field."""
    for name in chosen.sample(names, min(len(names), 10)):
        fields = _read(stack, name)
        if not fields:
            continue
        field_name = chosen.choice(list(fields))
        value = bytearray(fields[field_name])
        if value and chosen.random() < 0.7:
            value[chosen.randrange(len(value))] ^= 1 << chosen.randrange(8)
        else:
            del value[chosen.randrange(len(value) + 1) :]
        _write(stack, name, {field_name: bytes(value)})


def _swapped(stack: Stack, chosen: random.Random, names: list[bytes]) -> None:
    """Put the fields of one entry, all or one of them, under the name of another."""
    for _ in range(10):
        one, other = chosen.choice(names), chosen.choice(names)
        fields = _read(stack, one)
        if fields and one != other:
            some = fields if chosen.random() < 0.5 else dict([chosen.choice(list(fields.items()))])
            _write(stack, other, some)


def _hostile(stack: Stack, chosen: random.Random, names: list[bytes]) -> None:
    """Put what an attacker would into entries, or something that is no entry in their place."""
    for name in chosen.sample(names, min(len(names), 10)):
        if chosen.random() < 0.5:
            value = orjson.dumps(chosen.choice(list(DOCUMENTS.values())))
        else:
            value = chosen.choice([each for each in BYTES.values() if len(each) < 20_000])
        if chosen.random() < 0.8:
            _write(stack, name, {chosen.choice((b"answer", b"answer", b"profile", b"src", b"epochs")): value})
        else:
            stack.server.client.set(name, value, px=60_000)


def _old(stack: Stack, chosen: random.Random, names: list[bytes]) -> None:
    """Put back entries that were there before a tenant's were invalidated."""
    client = stack.server.client
    kept = [(name, client.dump(name), client.pttl(name)) for name in chosen.sample(names, min(len(names), 40))]
    for name, cache in stack.caches.items():
        for tenant in ("acme", "globex"):
            began = stack.history.invalidating()
            began_s = time.monotonic()
            try:
                cache.invalidate(tenant=tenant)
            except AegisConnectionError as exc:
                stack.history.not_invalidated(name, "tenant", exc, began_s, last=False)
            else:
                stack.history.invalidated(name, "tenant", tenant, began)
    for name, value, ttl_ms in kept:
        if value is not None and ttl_ms > 0:
            client.restore(name, ttl_ms, value, replace=True)


def _read(stack: Stack, name: bytes) -> dict[bytes, bytes]:
    try:
        return stack.server.client.hgetall(name)
    except redis.ResponseError:  # something else was put there before
        return {}


def _write(stack: Stack, name: bytes, fields: dict[bytes, bytes]) -> None:
    """Change an entry if it is still there: what is made anew here would have no end."""
    script = "if redis.call('TYPE', KEYS[1]).ok == 'hash' then redis.call('HSET', KEYS[1], unpack(ARGV)) end"
    stack.server.client.eval(script, 1, name, *(part for pair in fields.items() for part in pair))


# -- the embedder and the model server --------------------------------------------------------------------------------


def _embedder(change: Callable[[Stack], None]):
    def happen(stack: Stack, seconds: float, chosen: random.Random) -> None:
        change(stack)
        time.sleep(seconds)
        stack.words.heal()
        stack.ollama.heal()

    return happen


def _embedder_late(stack: Stack) -> None:
    stack.words.late_s = 0.4
    stack.ollama.fail("slow", times=None, path="/api/embed", delay_s=0.4)


def _embedder_down(stack: Stack) -> None:
    stack.words.down = True
    stack.ollama.fail(500, times=None, path="/api/embed")


def _embedder_wrong(stack: Stack) -> None:
    stack.words.wrong = [float("nan")] * 256
    stack.ollama.fail("malformed", times=None, path="/api/embed")


def _ollama(kind: str | int, after: int = 0, **details):
    def happen(stack: Stack, seconds: float, chosen: random.Random) -> None:
        count = 0

        def some(seen) -> bool:
            nonlocal count
            count += 1
            return count % 3 != 0

        where = chosen.randrange(after + 1)
        stack.ollama.fail(kind, times=None, path="/api/chat", when=some, after=where, **details)
        time.sleep(seconds)
        stack.ollama.heal()

    return happen


# -- callers ----------------------------------------------------------------------------------------------------------


def _storm(stack: Stack, seconds: float, chosen: random.Random) -> None:
    """Callers by the dozen, half of whom leave at any moment."""
    stack.load.storm(seconds, chosen.random(), leave=0.5, at_once=32)


def _crowd(stack: Stack, seconds: float, chosen: random.Random) -> None:
    """More callers than may wait."""
    stack.load.storm(seconds, chosen.random(), leave=0.0, at_once=160, target=BOUNDED)


def _storm_while_frozen(stack: Stack, seconds: float, chosen: random.Random) -> None:
    thread = threading.Thread(
        target=stack.load.storm, args=(seconds, chosen.random()), kwargs={"leave": 0.5, "at_once": 24}
    )
    thread.start()
    with stack.server.frozen():
        time.sleep(seconds / 2)
    thread.join()


FAULTS: dict[str, Fault] = {
    "Redis killed, restarted with its data": Fault("redis", _killed, away=True),
    "Redis frozen": Fault("redis", _frozen, away=True),
    "Redis freezes again and again": Fault("redis", _trembling),
    "CLIENT PAUSE ALL": Fault("redis", _paused("ALL"), away=True),
    "CLIENT PAUSE WRITE": Fault("redis", _paused("WRITE")),
    "out of memory": Fault("redis", _full),
    "read-only replica": Fault("redis", _read_only),
    "FLUSHALL": Fault("redis", _emptied),
    "index dropped": Fault("redis", _no_index),
    "network: some milliseconds": Fault("redis", _network(_slow)),
    "network: longer than the budget": Fault("redis", _network(_very_slow)),
    "network: jitter": Fault("redis", _network(_jitter)),
    "network: black hole": Fault("redis", _network(_swallow)),
    "network: a few bytes at a time": Fault("redis", _network(_slices)),
    "network: cut or reset in a reply": Fault("redis", _network(_cut, steps=10)),
    "network: connections closed": Fault("redis", _network(_disconnect, steps=10)),
    "stored: bits and lengths": Fault("redis", _stored(_bits)),
    "stored: under another's name": Fault("redis", _stored(_swapped)),
    "stored: hostile values": Fault("redis", _stored(_hostile)),
    "stored: put back after an invalidation": Fault("redis", _stored(_old)),
    "embedder slow": Fault("embedder", _embedder(_embedder_late)),
    "embedder down": Fault("embedder", _embedder(_embedder_down)),
    "embedder wrong": Fault("embedder", _embedder(_embedder_wrong)),
    "Ollama: 500": Fault("ollama", _ollama(500), _FAILED),
    "Ollama: 503": Fault("ollama", _ollama(503), _BUSY),
    "Ollama: cut": Fault("ollama", _ollama("cut", after=6), _ENDED),
    "Ollama: no end": Fault("ollama", _ollama("no_done", after=6), _BROKEN),
    "Ollama: error in the answer": Fault("ollama", _ollama("error", after=6), _FAILED),
    "Ollama: no JSON": Fault("ollama", _ollama("malformed", after=6), _BROKEN),
    "Ollama: stalls": Fault("ollama", _ollama("hang", after=6), _SILENT),
    "half of the callers leave": Fault("callers", _storm),
    "more callers than may wait": Fault("callers", _crowd, {BOUNDED: (AegisOverloadedError,)}),
    "Redis frozen while callers leave": Fault("redis", _storm_while_frozen),
}
