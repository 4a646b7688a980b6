"""The local tier: what Redis answered to exact reads, held in this process for as long as it would answer the same.

It holds replies and judges nothing: what it gives is read, checked and served as if it had just come from Redis, by the
same code. A read's request names the record, the tenant, the user and all else whose invalidations count, and is what
replies are found by: they answer that very request and no other.

Redis pushes the names of records and of epochs that change, see `pushes`. A record's push takes away what is held of
it, one of the epochs takes away everything. What was asked for before a push was heard is not held after it.

What is promised:

- An invalidation by this cache itself holds at once: when its call returns, nothing of before is held any more.
- One from elsewhere (another cache or process, an expiry, an eviction, FLUSHALL) holds as soon as its push has come to
  this machine, which takes a fraction of a millisecond. While something has come that the thread of the pushes was not
  run to tell, everything goes to Redis.
- Nothing is served that was invalidated more than `ALIVE_S` (0.25 s) ago, whatever fails: all that had changed by then
  was heard, which an answer of the server over the connection of the pushes has proved. The server is asked `BEAT_S`
  (0.05 s) after each answer. Without proof everything goes to Redis, as without this tier.
- The connection of the pushes is newer than every other of this cache. Where an address leads to another server since,
  as after a failover, calls and pushes do not come from two different ones.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from langchain_aegis import nearby, relays, scripts
from langchain_aegis.connections import Connections
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.links import packed
from langchain_aegis.namespace import prefix_of
from langchain_aegis.pushes import ALIVE_S, Pushes, clock
from langchain_aegis.results import LocalStats
from langchain_aegis.settings import AegisSettings
from langchain_aegis.store import Commands

# Commands and scripts that change no record, nor the epochs in a way that concerns one.
_HARMLESS: Final = frozenset({
    "HMGET", "HGETALL", "SMEMBERS", "SCAN", "ZSCORE", "ZCOUNT", "ZADD", "FT._LIST", "FT.SEARCH", "FT.CREATE", "FT.INFO",
    "FCALL_RO", "FUNCTION", "XRANGE", "EXISTS", "GET", relays.SEND,
    nearby.SCRIPT, scripts.UNLIST, scripts.SWEEP, scripts.REMEMBER, scripts.LEASE, scripts.RELEASE,
})  # fmt: skip
Meanwhile: TypeAlias = Callable[[], object] | None
_DIGITS: Final = 32  # of an exact key
_OVERHEAD: Final = 1_000  # bytes of a held read besides its values: two lists, their places, and where it is found
_OF_A_VALUE: Final = 41  # bytes of a value besides its own


class LocalTier:
    """Holds replies, the most recently used, up to a number of bytes. May be used from any thread.

    Args:
        prefix: Of the namespace's names.
        max_bytes: What all that is held may take up.
        make: Returns a connection of redis-py for the pushes that is not connected yet.

    Attributes:
        doubts: How often a connection was made for calls.
    """

    def __init__(self, prefix: str, max_bytes: int, make: Callable[[], Any]) -> None:
        self._prefixes = f"{prefix}e:", f"{prefix}epochs"
        self._entry = self._prefixes[0].encode()
        self._channel = f"{prefix}pushes"
        self._max_bytes = max_bytes
        self._make = make
        self.doubts = 0
        self._hits = self._invalidated = self._evicted = 0
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Hold nothing, and hear nothing: in the child of a fork the connection is the parent's."""
        if (pushes := getattr(self, "_pushes", None)) is not None:
            pushes.abandon()
        self._pushes: Pushes | None = None
        self._lock = threading.Lock()
        self._held: OrderedDict[bytes, tuple[bytes, list[Any], int]] = OrderedDict()  # by exact key
        self._bytes = 0
        self._state = 0  # moves whenever something was taken away, or would have been
        self._heard = False  # whether pushes come, proved or not
        self._until_s = 0.0  # so long all that changed `ALIVE_S` before was heard

    # -- what calls ask -------------------------------------------------------------------------------------------

    def get(self, request: bytes) -> list[Any] | None:
        """Return the replies to a read's request, if they still hold."""
        if (pushes := self._pushes) is None:
            self._start()
            return None
        pushes.asked = True
        if pushes.idle:
            pushes.ring()
        name = self._name(request)
        with self._lock:
            if (held := self._held.get(name)) is None or held[0] != request or clock() >= self._until_s:
                return None
            if not pushes.quiet():
                return None
            self._held.move_to_end(name)
            self._hits += 1
        return held[1]

    def state(self) -> int | None:
        """Return what `keep` wants to know from before the request was sent; None: its replies cannot be held."""
        return self._state if self._heard else None

    def keep(self, request: bytes, replies: list[Any], state: int | None) -> None:
        """Hold replies to a read, if nothing was heard since they were asked for."""
        if state is None or not all(isinstance(reply, list) and reply[0] is not None for reply in replies):
            return
        size = _OVERHEAD + len(request) + sum(_OF_A_VALUE + len(v) for reply in replies for v in reply if v is not None)
        name = self._name(request)
        gone = []
        with self._lock:
            if state != self._state or size > self._max_bytes or not name:
                return
            if (old := self._held.pop(name, None)) is not None:
                self._bytes -= old[2]
            self._held[name] = request, replies, size
            self._bytes += size
            while self._bytes > self._max_bytes:
                gone.append(self._held.popitem(last=False)[1])  # freed later, outside of the lock
                self._bytes -= gone[-1][2]
            self._evicted += len(gone)

    def drop(self, names: Sequence[str] | None) -> None:
        """Hold nothing any more of some exact keys, or of any, nor what is being read of anything."""
        self._drop(None if names is None else [name.encode() for name in names])

    def stats(self) -> LocalStats:
        """Return what it holds and has done."""
        with self._lock:
            return LocalStats(
                self._hits, len(self._held), self._bytes, self._invalidated, self._evicted, clock() < self._until_s
            )

    def close(self) -> None:
        """Close the connection, and hold nothing; a later call opens another one."""
        with self._lock:
            pushes, self._pushes = self._pushes, None
        if pushes is not None:
            pushes.close()
        self.lost()

    # -- what connections tell ------------------------------------------------------------------------------------

    def connected(self, _: Any) -> None:
        """A connection for calls was made: it may lead to another server than that of the pushes."""
        with self._lock:
            self.doubts += 1
            pushes = self._pushes
        self.lost()
        if pushes is not None:
            pushes.ring()

    def changed(self, names: Sequence[bytes] | None) -> None:
        """Drop what has changed."""
        if names is None or not all(name.startswith(self._entry) for name in names):
            self._drop(None)
        else:
            self._drop([name[len(self._entry) :] for name in names])

    def proved(self, at_s: float, doubts: int) -> None:
        """Answer until this proof is too old."""
        with self._lock:
            if doubts != self.doubts or self._pushes is None:
                return
            if not self._heard:  # of what was asked for earlier, a change may have gone unheard
                self._heard = True
                self._state += 1
            self._until_s = at_s + ALIVE_S

    def lost(self) -> None:
        """Hold nothing, and nothing new."""
        with self._lock:
            self._heard, self._until_s = False, 0.0
        self._drop(None)

    # -- parts ----------------------------------------------------------------------------------------------------

    def _name(self, request: bytes) -> bytes:
        """Return the exact key that a request reads, or b""."""
        at = request.find(self._entry)
        return request[at + len(self._entry) :][:_DIGITS] if at >= 0 else b""

    def _drop(self, names: Sequence[bytes] | None) -> None:
        gone: list[Any] = []
        with self._lock:
            self._state += 1
            if names is None:
                gone = [self._held]
                self._invalidated += len(self._held)
                self._held, self._bytes = OrderedDict(), 0
            for name in names or ():
                if (old := self._held.pop(name, None)) is not None:
                    gone.append(old)
                    self._bytes -= old[2]
                    self._invalidated += 1

    def _start(self) -> None:
        with self._lock:
            if self._pushes is None:
                pushes = Pushes(self, self._make, self._prefixes, self._channel)
                self._pushes = pushes if pushes.start() else None


class TieredConnections(Connections):
    """Connections with a local tier before them, for one namespace.

    Args:
        settings: Of the cache.
        kwargs: As for `Connections`.
    """

    tier: LocalTier

    def __init__(self, settings: AegisSettings, **kwargs: Any) -> None:
        super().__init__(settings.redis_url, budget_s=settings.op_budget_s, **kwargs)
        self._prefix = prefix_of(settings.namespace)
        self.tier = LocalTier(self._prefix, settings.local_tier_bytes, self.connecting())

    def ask(self, request: bytes, count: int, meanwhile: Meanwhile = None, largest: int | None = None) -> list[Any]:
        """Return the replies to a read's request that are held, else those of Redis."""
        if (held := self.tier.get(request)) is not None:
            return held
        state = self.tier.state()
        replies = super().ask(request, count, meanwhile, largest)
        self.tier.keep(request, replies, state)
        return replies

    async def aask(
        self, request: bytes, count: int, meanwhile: Meanwhile = None, largest: int | None = None
    ) -> list[Any]:
        """Like `ask`, without blocking the event loop."""
        if (held := self.tier.get(request)) is not None:
            return held
        state = self.tier.state()
        replies = await super().aask(request, count, meanwhile, largest)
        self.tier.keep(request, replies, state)
        return replies

    def perform(self, step: Commands) -> list[Any]:
        """Send one round trip, and hold nothing any more of what it changes; raises as for `Connections`."""
        if _is_read(step):
            return self.ask(step.request, len(step.each), step.meanwhile)
        try:
            return super().ask(step.request or packed(step.each), len(step.each), step.meanwhile, self._largest)
        finally:  # also if it failed: it may have been done
            self._dropped(step)

    async def aperform(self, step: Commands) -> list[Any]:
        """Like `perform`, without blocking the event loop."""
        if _is_read(step):
            return await self.aask(step.request, len(step.each), step.meanwhile)
        try:
            return await super().aask(step.request or packed(step.each), len(step.each), step.meanwhile, self._largest)
        finally:
            self._dropped(step)

    async def aclose(self) -> None:
        """Close the connections of this event loop, those of all threads, and that of the pushes."""
        await asyncio.to_thread(self.tier.close)
        await super().aclose()

    def close(self) -> None:
        """Close the connections of all threads, and that of the pushes; a later call opens new ones."""
        super().close()
        self.tier.close()

    def _watched(self, connection: Any) -> Any:
        connection.register_connect_callback(self.tier.connected)
        return connection

    def _dropped(self, step: Commands) -> None:
        for command in step.each:
            if (names := _changed(self._prefix, command)) is None or names:
                self.tier.drop(names)


def _is_read(step: Commands) -> bool:
    """Return whether a step is what the request of a record and the epochs stands for."""
    return bool(step.request) and all(command[0] == "HMGET" for command in step.each)


def _changed(prefix: str, command: scripts.Command) -> Sequence[str] | None:
    """Return the exact keys of the records that a command may change; None: anything may be changed."""
    name, what = command[:2] if len(command) > 1 else (command[0], "")
    if name in _HARMLESS or (name == "EVAL" and what in _HARMLESS):
        return ()
    if name == "EVAL" and what == scripts.PUT:
        return [command[5]]
    if name == "HDEL" and str(what).startswith(f"{prefix}v:"):
        return ()
    return None


def connections_for(settings: AegisSettings, *, client: Any, kwargs: Mapping[str, Any] | None, k: int) -> Connections:
    """Return a cache's connections, with a local tier before them if it shall have one; arguments as they take them.

    Raises:
        AegisConfigError: The URL or an argument cannot be used. Nothing is connected yet.
    """
    told = {"client": client, "kwargs": kwargs, "k": k, "max_entry_bytes": settings.max_entry_bytes}
    if settings.local_tier_bytes:
        return TieredConnections(settings, **told)
    return Connections(settings.redis_url, budget_s=settings.op_budget_s, **told)
