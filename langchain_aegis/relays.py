"""Pass an answer on to other processes while it is being made, through a Redis stream.

    {ns}:{p00}:r:<exact>   what is passed on of the answer to a key, until shortly after its end (stream)

One process makes the answer: who holds the key's lease. It writes each piece as it comes; others that were asked the
same meanwhile read them. The name is the exact key, so it is one tenant's, user's and model's; every piece is signed
like a record, with the key, with the number of the piece, and with a name for this one telling, so that nothing can be
put in, left out or taken from an earlier one. The first piece says at which moment of the namespace the call was looked
up: only who was looked up at the same one reads on, as in a process.

An answer has come when its end has: a mark of its own, written when the model has said that it was all. What stops
before is no answer. A stream is there for as long as its writer says every second that it lives, and the lease with it:
who dies, is cancelled or fails leaves none, or a mark that says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Generator, Hashable, Mapping
from typing import Any, Final

import orjson
from langchain_core.messages import AIMessageChunk
from langchain_core.outputs import ChatGenerationChunk

from langchain_aegis.breaker import Unavailable
from langchain_aegis.connections import Connections
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.namespace import Commands
from langchain_aegis.notices import logger
from langchain_aegis.replays import BrokenOff
from langchain_aegis.scripts import release
from langchain_aegis.seals import Seal

_LIVING_MS: Final = 5_000  # so long after its writer's last word a stream is there
_BEAT_S: Final = 1.0  # so often he says one
_AGAIN_S: Final = 0.1  # after Redis was away
_READ_AFTER_MS: Final = 10_000  # an end that was written
_MOST_BYTES: Final = 16 * 1024 * 1024  # of one answer, in pieces
_READ_AT_ONCE: Final = 500
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.01, 0.1  # between two looks at a stream
_LONG_PAUSE_S: Final = 0.25  # the same, if there is none: what is made may not be streamed
_FIELDS: Final = ("content", "additional_kwargs", "response_metadata", "usage_metadata", "tool_call_chunks",
                  "chunk_position")  # fmt: skip

SEND: Final = """
local stream, lease = KEYS[1], KEYS[2]
local fence, lease_ms, living_ms = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local cast, number, given_up = ARGV[4], tonumber(ARGV[5]), ARGV[6] == '1'
local holder = redis.call('GET', lease)
if holder ~= fence and holder ~= '-' .. fence then return 0 end
-- It may have been asked before, and its answer not heard: what is there already is not written again.
local head, there = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1], 0
if head and head[2][2] == cast then
  there = redis.call('XLEN', stream)
elseif number > 0 then
  return 0
else
  redis.call('DEL', stream)
end
for i = 7, #ARGV, 2 do
  if number >= there then redis.call('XADD', stream, '*', 'c', cast, 'm', ARGV[i], 'd', ARGV[i + 1]) end
  number = number + 1
end
redis.call('PEXPIRE', stream, living_ms)
if holder == fence then
  if given_up then
    redis.call('SET', lease, '-' .. fence, 'PX', 600000)  -- as who has stored the answer does
  elseif redis.call('PTTL', lease) < lease_ms then
    redis.call('PEXPIRE', lease, lease_ms)
  end
end
return 1
"""


class Relay:
    """One lookup's part in passing an answer on.

    Args:
        connections: To Redis.
        prefix: Of the namespace's names.
        seal: What pieces are signed with.
        exact: The key.
        stamp: At which moment of the namespace it was looked up.
        fence: Number of the lease under which this process makes the answer; 0: another one does.
        lease_ms: How long that lease is.
        wait_s: How long it is waited for the first piece.
        engine: Distinguishes caches.
        found: The lookup.

    Attributes:
        leads: This process makes the answer.
        key: Equal for those who may read the same.
    """

    def __init__(
        self, connections: Connections, prefix: str, seal: Seal, exact: str, stamp: str, *, fence: int, lease_ms: int,
        wait_s: float, engine: object, found: Any = None,
    ) -> None:  # fmt: skip
        self.leads = fence > 0
        self.key: Hashable = engine, exact, stamp
        self._connections = connections
        self._prefix, self._exact, self._stamp = prefix, exact, stamp
        self._seal = seal
        self._until_s = time.monotonic() + wait_s
        self._names = f"{prefix}r:{exact}", f"{prefix}l:{exact}"
        self._fence, self._lease_ms = fence, lease_ms
        self._cast: _Cast | None = None
        self._found = found

    # -- who makes the answer -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Tell others that the pieces will come."""
        if self._cast is None and self.leads:
            self._cast = _Cast(self, self._connections, self._names, self._fence, self._lease_ms)
            self._write({"kind": "begin", "stamp": self._stamp, "fence": self._fence})

    def send(self, chunk: ChatGenerationChunk) -> None:
        """Pass a piece on, soon; nobody waits for that. Of what cannot be written nothing more is passed on."""
        if self._cast is None or self._cast.over:
            return
        try:
            self._write({"kind": "chunk", "chunk": _plain(chunk)})
        except (TypeError, ValueError):
            self._finish("cut")  # the answer will be stored all the same: its lease goes on

    def end(self) -> None:
        """Say that all has come. Later calls do nothing."""
        self._finish("end")

    def cut(self) -> None:
        """Say that no answer comes: another process may make it. Later calls do nothing; safe in a finaliser."""
        self._finish("cut", gives_up=True)

    def _finish(self, kind: str, *, gives_up: bool = False) -> None:
        cast = self._cast
        if cast is not None and not cast.over:
            cast.given_up = gives_up
            self._write({"kind": kind})
            cast.over = True
            the_relayer.put(cast)

    def _write(self, what: dict[str, Any]) -> None:
        cast = self._cast
        assert cast is not None  # noqa: S101  # the caller has looked
        body = orjson.dumps({**what, "cast": cast.name, "n": cast.count})
        if self._seal.encrypts:
            body = self._seal.hide(body, self._exact.encode())
        cast.add(self._seal.sign(self._signed(body)), body)
        the_relayer.put(cast)

    def _signed(self, body: bytes) -> bytes:
        return b"aegis relay v1\0%s\0%s" % (self._exact.encode(), body)

    # -- who waits for it ---------------------------------------------------------------------------------------------

    def follow(self) -> Generator[ChatGenerationChunk]:
        """Yield the pieces that another process makes, from the first one to the end of the answer.

        Raises:
            BrokenOff: There are none, or the end does not come; what was yielded is no answer.
        """
        reading = _Reading(self)
        while True:
            try:
                replies = self._connections.perform(reading.question)
            except Unavailable as exc:
                reading.failed(exc)
                replies = []
            yield from reading.take(replies)
            if reading.over:
                break
            time.sleep(reading.pause_s)
        if reading.dead:
            with contextlib.suppress(Unavailable):
                self._connections.perform(reading.burial)
        reading.check()

    async def afollow(self) -> AsyncGenerator[ChatGenerationChunk]:
        """Do what `follow` does, without blocking the event loop."""
        reading = _Reading(self)
        while True:
            try:
                replies = await self._connections.aperform(reading.question)
            except Unavailable as exc:
                reading.failed(exc)
                replies = []
            for chunk in reading.take(replies):
                yield chunk
            if reading.over:
                break
            await asyncio.sleep(reading.pause_s)
        if reading.dead:
            with contextlib.suppress(Unavailable):
                await self._connections.aperform(reading.burial)
        reading.check()

    def followed(self) -> None:
        """Note that the answer came from another process, which stores it."""
        if self._found is not None:
            self._found.epochs = None

    def opened(self, signature: Any, body: Any) -> Mapping[str, Any] | None:
        """Return what a piece says, None if it is not signed for this key."""
        if not isinstance(signature, bytes) or not isinstance(body, bytes):
            return None
        if not self._seal.holds(signature, self._signed(body)):
            return None
        shown = self._seal.show(body, self._exact.encode(), signature) if self._seal.encrypts else body
        try:
            said = orjson.loads(shown or b"")
        except ValueError:
            return None
        return said if isinstance(said, dict) else None


class _Reading:
    """What a follower knows of a stream: no network, no clock but that of its patience.

    Attributes:
        over: Nothing more is to be read.
        dead: Whoever wrote it has said nothing for too long: his lease is to be given back.
        pause_s: Until the next look.
    """

    def __init__(self, relay: Relay) -> None:
        self.over = self.dead = False
        self.pause_s = _FIRST_PAUSE_S
        self._relay = relay
        self._last = "-"
        self._count = 0
        self._cast = ""
        self._fence = 0
        self._why: str | None = None  # it broke off
        self._heard_s = time.monotonic()

    @property
    def question(self) -> Commands:
        """What Redis is asked."""
        stream, lease = self._relay._names
        return Commands(
            (("XRANGE", stream, self._last, "+", "COUNT", _READ_AT_ONCE), ("EXISTS", stream), ("GET", lease))
        )

    @property
    def burial(self) -> Commands:
        """What gives back the lease of who has died."""
        return Commands((release(self._relay._prefix, self._relay._exact, self._fence),))

    def failed(self, exc: Unavailable) -> None:
        """Note that Redis did not answer."""
        if not self._count or time.monotonic() - self._heard_s > _LIVING_MS / 1000:
            self._end(exc.reason)
        self.pause_s = _AGAIN_S

    def take(self, replies: list[Any]) -> list[ChatGenerationChunk]:
        """Return the pieces that have come."""
        found: list[ChatGenerationChunk] = []
        if self.over or not replies:
            return found
        if any(isinstance(reply, Exception) for reply in replies):
            self._end("refused")
            return found
        self._heard_s = time.monotonic()
        rows, there, holder = replies
        for name, fields in rows:
            told = dict(zip(fields[::2], fields[1::2], strict=False))
            said = self._relay.opened(told.get(b"m"), told.get(b"d"))
            if not self._count and said is not None and not _holds(holder, said.get("fence")):
                rows = []  # of one who makes it no more; whoever has the lease now will begin anew
                break
            self._last = f"({name.decode()}"
            if not self._read(said, found):
                return [] if self._why is not None else found  # of what is known to be no answer nothing is given
        if rows:
            self.pause_s = 0.0 if len(rows) == _READ_AT_ONCE else _FIRST_PAUSE_S
        elif self._count:
            self.pause_s = min(_LAST_PAUSE_S, self.pause_s * 1.5)
            if not there:
                self.dead = True
                self._end("silent")
        else:
            self.pause_s = min(_LONG_PAUSE_S, self.pause_s * 1.5)
            if holder is None or holder.startswith(b"-"):
                self._end("nobody")  # it has ended meanwhile, or was given up
            elif time.monotonic() > self._relay._until_s:
                self._end("late")
        return found

    def check(self) -> None:
        """Raise BrokenOff unless the end has come."""
        if self._why is not None:
            raise BrokenOff(self._why)

    def _read(self, said: Mapping[str, Any] | None, found: list[ChatGenerationChunk]) -> bool:
        """Take one piece; returns whether there is more to be read."""
        if said is None or said.get("n") != self._count:
            return self._end("damaged")
        kind = said.get("kind")
        if self._count == 0:
            if kind != "begin" or said.get("stamp") != self._relay._stamp:
                return self._end("another_time")
            self._cast, self._fence = str(said.get("cast")), int(said.get("fence") or 0)
        elif said.get("cast") != self._cast:
            return self._end("another_telling")
        self._count += 1
        if kind == "chunk":
            try:
                found.append(_revived(said["chunk"]))
            except (KeyError, TypeError, ValueError):
                return self._end("unreadable")
        elif kind == "end":
            self.over = True
            return False
        elif kind == "cut":
            return self._end("cut")
        return True

    def _end(self, why: str) -> bool:
        self.over, self._why = True, why
        return False


class _Cast:
    """What one process passes on of one answer, until it is written."""

    def __init__(
        self, owner: Relay, connections: Connections, names: tuple[str, str], fence: int, lease_ms: int
    ) -> None:
        self.name = secrets.token_hex(8)
        self.count = 0
        self.over = False  # nothing more is added
        self.given_up = False  # and no answer will be stored
        self.owner = weakref.ref(owner)
        self.due_s = 0.0
        self.pending: deque[tuple[bytes, bytes]] = deque()
        self._connections = connections
        self._names = names
        self._fence, self._lease_ms = fence, lease_ms
        self._written = 0
        self._bytes = 0
        self._since_s: float | None = None  # Redis has been away

    def add(self, signature: bytes, body: bytes) -> None:
        """Take the next piece."""
        self.count += 1
        self._bytes += len(body)
        if self._bytes > _MOST_BYTES:
            self.over = True  # no end will come
            return
        self.pending.append((signature, body))

    def write(self) -> bool:
        """Write what is there, or a sign of life; returns whether there is more to come."""
        over = self.over  # before the look: what is added first is written first
        pieces = list(self.pending)
        living_ms = _READ_AFTER_MS if over else _LIVING_MS
        told = [part for piece in pieces for part in piece]
        command = (
            "EVAL", SEND, 2, *self._names, self._fence, self._lease_ms, living_ms, self.name, self._written,
            int(over and self.given_up), *told,
        )  # fmt: skip
        try:
            (reply,) = self._connections.perform(Commands((command,)))
        except Unavailable:
            now_s = time.monotonic()
            self._since_s = now_s if self._since_s is None else self._since_s
            self.due_s = now_s + _AGAIN_S
            return now_s - self._since_s < _LIVING_MS / 1000
        self._since_s = None
        self._written += len(pieces)
        for _ in pieces:
            self.pending.popleft()
        self.due_s = time.monotonic() + _BEAT_S
        if isinstance(reply, Exception) or int(reply) != 1:  # forbidden, full, or another one has the lease
            self.over = True
            self.pending.clear()
            return False
        return not over


class Relayer:
    """Writes what is passed on, in one thread of the process, and says for how long its writers live."""

    def __init__(self) -> None:
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Forget all: in the child of a fork it is the parent's."""
        self._lock = threading.Lock()
        self._came: queue.SimpleQueue[_Cast] = queue.SimpleQueue()  # may be put to by a finaliser, unlike others
        self._thread: threading.Thread | None = None

    def put(self, cast: _Cast) -> None:
        """Have a cast written soon; never waits."""
        self._came.put(cast)
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="aegis-relays", daemon=True)
                    # Where no thread can be started, the interpreter is about to end.
                    with contextlib.suppress(RuntimeError):
                        self._thread.start()

    def _run(self) -> None:
        casts: dict[_Cast, None] = {}
        while True:
            wait_s = min((cast.due_s for cast in casts), default=None)
            with contextlib.suppress(queue.Empty):
                cast = self._came.get(timeout=None if wait_s is None else max(0.0, wait_s - time.monotonic()))
                while True:
                    if cast not in casts and (not cast.over or cast.pending):
                        casts[cast] = None
                    if cast._since_s is None:
                        cast.due_s = 0.0
                    cast = self._came.get_nowait()
            for cast in list(casts):
                if time.monotonic() >= cast.due_s:
                    if cast.owner() is None and not cast.over:
                        cast.over = True  # nobody will say how it ends: no end comes
                    try:
                        lives = cast.write()
                    except Exception as exc:  # nobody is there to catch it, and no answer depends on it
                        logger.debug("an answer could not be passed on", exc_info=exc)
                        cast.over, lives = True, False
                    if not lives:
                        del casts[cast]


the_relayer: Final = Relayer()


def _holds(holder: bytes | None, fence: Any) -> bool:
    """Return whether a lease of this number is the last one, given back or not, or nobody knows."""
    return holder is None or holder.decode().removeprefix("-") == str(fence)


def _plain(chunk: ChatGenerationChunk) -> dict[str, Any]:
    """Return what a chunk holds as plain JSON values. Raises TypeError or ValueError if it holds anything else."""
    message = chunk.message
    if not isinstance(message, AIMessageChunk):
        raise TypeError("only chunks of answers are passed on")
    told: dict[str, Any] = {name: value for name in _FIELDS if (value := getattr(message, name, None))}
    if chunk.generation_info:
        told["info"] = chunk.generation_info
    if orjson.loads(orjson.dumps(told)) != told:
        raise ValueError("it would come back changed")
    return told


def _revived(told: dict[str, Any]) -> ChatGenerationChunk:
    fields = {name: told[name] for name in _FIELDS if name in told}
    message = AIMessageChunk(**{"content": "", **fields})
    return ChatGenerationChunk(message=message, generation_info=told.get("info"))


def relay_of(engine: Any, connections: Connections, pending: Any) -> Relay | None:
    """Return the part of a lookup that missed in passing its answer on; None if it has none."""
    options, found = engine.options, pending.found
    shared = found.reasons == ("followed",) or found.fence
    if not options.lease_ms or options.dry_run or not shared or found.epochs is None or found.stale is not None:
        return None
    return Relay(
        connections, engine.store.prefix, engine.keyring.seal, found.key.exact, found.moment,
        fence=found.fence, lease_ms=options.lease_ms, wait_s=options.lease_wait_s, engine=engine._identity,
        found=found,
    )  # fmt: skip
