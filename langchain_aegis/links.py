"""Round trips to Redis at the price of one write and one read.

redis-py connects: it knows addresses, TLS and credentials, and which error a reply stands for. What goes over the
connection afterwards does not pass through its client, whose pool, retries and metrics cost several times what the
round trip itself does. A connection over which anything went wrong is closed: a reply that came late must never be
taken for the answer to another question.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import hiredis
import redis
import redis.asyncio
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

_IDLE_S: Final = 0.02  # after so long it is asked whether the server has closed the connection meanwhile
_READ_AT_ONCE: Final = 65_536
_LARGEST: Final = 64 * 1024 * 1024  # bytes of replies to one caller


class TooLarge(RedisError):
    """What comes is larger than anything of ours: somebody else has written it.

    Attributes:
        own: Whether it is the reply to what was asked here, or only came before that one.
    """

    def __init__(self, own: bool = True) -> None:
        super().__init__("a reply of Redis is too large")
        self.own = own


class AllInUse(RedisTimeoutError):
    """No connection became free in time: too many ask at once, which says nothing about Redis."""

    def __init__(self) -> None:
        super().__init__("all connections to Redis are in use")


def packed(commands: Sequence[tuple[Any, ...]]) -> bytes:
    """Return commands as they are sent."""
    return b"".join([hiredis.pack_command(command) for command in commands])


def _check(replies: list[Any]) -> list[Any]:
    """Return replies; raises those that concern the server rather than a command: it is loading, or full."""
    for reply in replies:
        if isinstance(reply, RedisConnectionError):
            raise reply
    return replies


def readable(parse: Callable[[str], Exception]) -> Callable[[str], Exception]:
    """Return what makes an error reply an exception; one that redis-py cannot read is an error reply too.

    Of whoever has not logged in, Redis reads no long commands: it closes the connection, and says so by another error.
    """

    def error(text: str) -> Exception:
        if "Protocol error: unauthenticated" in text:
            return AuthenticationError("Authentication required.")
        try:
            return parse(text)
        except Exception:  # whatever it stumbles over: the command was refused
            return ResponseError("an error reply that cannot be read")

    return error


def _try(meanwhile: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):  # who needs it will do it again, and see
        meanwhile()


class Link:
    """One connection for one caller at a time, which blocks it."""

    __slots__ = ("_buffer", "_connection", "_poll", "_reader", "_sock", "_timeout_s", "used_s")

    def __init__(self, connection: redis.Connection) -> None:
        connection.connect()
        self._connection = connection
        sock: Any = connection._sock
        self._sock = sock
        self._timeout_s: float = connection.socket_timeout or float("inf")
        self._reader: Any = hiredis.Reader(
            replyError=readable(connection._parser.parse_error)
        )  # its stubs know no bytearray
        self._buffer = bytearray(_READ_AT_ONCE)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self.used_s = time.monotonic()

    def ask(
        self, request: bytes, count: int, meanwhile: Callable[[], object] | None = None, until_s: float | None = None,
        largest: int = _LARGEST,
    ) -> list[Any]:  # fmt: skip
        """Send what `packed` returned and return so many replies; after an exception, `close` it.

        Args:
            request: What is sent.
            count: Number of replies.
            meanwhile: What is done until they come.
            until_s: When it is too late, in monotonic seconds; default: as long from now as the connection waits.
            largest: Bytes of the replies; more are not read.
        """
        sock, reader, buffer = self._sock, self._reader, self._buffer
        if hurried := until_s is not None:
            self._hurry(until_s)
        else:
            until_s = time.monotonic() + self._timeout_s
        sock.sendall(request)
        if meanwhile is not None:
            _try(meanwhile)
        replies: list[Any] = []
        total = 0
        while True:
            if not (size := sock.recv_into(buffer)):
                _check(replies)
                raise RedisConnectionError("Redis closed the connection")
            reader.feed(buffer, 0, size)
            while (reply := reader.gets()) is not False:
                replies.append(reply)
            if len(replies) >= count:
                break
            if (total := total + size) > largest:
                raise TooLarge
            hurried = True  # it answers, but drop by drop
            self._hurry(until_s)
        if hurried:
            sock.settimeout(self._connection.socket_timeout)
        now_s = time.monotonic()
        if len(replies) != count or reader.has_data():
            raise RedisConnectionError("Redis answered what was not asked")
        self.used_s = now_s
        return replies

    def _hurry(self, until_s: float) -> None:
        """Wait for what comes next no longer than until then. Raises RedisTimeoutError if that has passed."""
        if (left_s := until_s - time.monotonic()) <= 0:
            raise RedisTimeoutError("Redis did not answer in time")
        self._sock.settimeout(left_s if left_s < self._timeout_s else self._connection.socket_timeout)

    def is_stale(self) -> bool:
        """Return whether the server has closed the connection, or sent something unasked."""
        return time.monotonic() - self.used_s > _IDLE_S and bool(self._poll.poll(0))

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # it may be half made, or the interpreter may be ending
            self._connection.disconnect()


class Links:
    """Blocking connections for all threads.

    Args:
        make: Returns a connection of redis-py that is not connected yet.
        most: So many at a time.
        wait_s: How long a caller waits while all are in use.
    """

    def __init__(self, make: Callable[[], Any], most: int, wait_s: float) -> None:
        self._make = make
        self._most = most
        self._wait_s = wait_s
        self._free: deque[Link] = deque()  # its methods are atomic
        self._changed = threading.Condition()
        self._count = 0
        self._waiting = 0
        self._closed = False

    def ask(
        self, request: bytes, count: int, meanwhile: Callable[[], object] | None = None, *, largest: int = _LARGEST
    ) -> list[Any]:
        """Send what `packed` returned and return so many replies; error replies are values.

        `meanwhile` is done until they come, see `Commands`. Raises RedisError (TooLarge if they have more bytes than
        `largest`) or OSError.
        """
        until_s = None
        try:
            link = self._free.pop()
        except IndexError:
            until_s = time.monotonic() + self._wait_s  # for both: a connection, and the replies
            link = self._another(until_s)
            # Too little time would only cost a connection that is well.
            until_s = max(until_s, time.monotonic() + self._wait_s / 5)
        try:
            if link.is_stale():
                link.close()
                link = Link(self._make())
            replies = link.ask(request, count, meanwhile, until_s, largest)
        except BaseException:  # a KeyboardInterrupt too
            link.close()
            self._lost()
            raise
        self._free.append(link)
        if self._waiting:
            with self._changed:
                self._changed.notify()
        if self._closed:
            self.close()
        return _check(replies)

    def close(self) -> None:
        """Close the connections: those in use once they are given back."""
        self._closed = True
        with contextlib.suppress(IndexError):
            while True:
                self._free.pop().close()
                self._lost()

    def _another(self, until_s: float) -> Link:
        with self._changed:
            self._waiting += 1
            try:
                while True:
                    with contextlib.suppress(IndexError):
                        return self._free.pop()
                    left_s = until_s - time.monotonic()
                    # Later, others have waited in vain for what this one would ask: it would only add to their crowd.
                    if self._count < self._most and left_s > self._wait_s / 5:
                        self._count += 1
                        break
                    if left_s <= 0 or not self._changed.wait(left_s):
                        raise AllInUse
            finally:
                self._waiting -= 1
        try:
            return Link(self._make())
        except BaseException:
            self._lost()
            raise

    def _lost(self) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify()


class _Asked:
    """A question on its way; it keeps its place in the row even if nobody waits for the answer any longer."""

    __slots__ = ("answer", "count", "largest", "replies", "sent_s")

    def __init__(self, answer: asyncio.Future[list[Any]], count: int, sent_s: float, largest: int) -> None:
        self.answer = answer
        self.count = count
        self.largest = largest
        self.sent_s = sent_s
        self.replies: list[Any] = []


class AsyncLink(asyncio.Protocol):
    """One connection for all callers of an event loop: what they ask in one turn of the loop is sent together."""

    def __init__(self, connection: redis.asyncio.Connection, budget_s: float) -> None:
        """Take over a connection that has just been made."""
        self._unread = 0  # bytes of the reply that is on its way
        writer: Any = connection._writer
        self._loop = asyncio.get_running_loop()
        self._budget_s = budget_s
        self._connection = connection
        self._transport: asyncio.Transport = writer.transport
        self._reader = hiredis.Reader(replyError=readable(connection._parser.parse_error))
        self._asked: deque[_Asked] = deque()
        self._unsent: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None
        self._heard_s = self._loop.time()
        self.closed = False
        self._poll = select.poll()
        self._poll.register(writer.get_extra_info("socket").fileno(), select.POLLIN)
        self._transport.set_protocol(self)

    async def ask(
        self, request: bytes, count: int, meanwhile: Callable[[], object] | None = None, *, largest: int = _LARGEST
    ) -> list[Any]:
        """Send what `packed` returned and return so many replies. Raises RedisError."""
        if self.closed:
            raise RedisConnectionError("the connection to Redis was closed")
        loop = self._loop
        asked = _Asked(loop.create_future(), count, loop.time(), largest)
        self._asked.append(asked)
        if len(self._asked) == 1:
            self._transport.write(request)
            if meanwhile is not None:  # where others wait, the loop has better things to do
                _try(meanwhile)
        else:
            if not self._unsent:
                loop.call_soon(self._send)
            self._unsent.append(request)
            asked.sent_s = float("inf")
        if self._timer is None:
            self._timer = loop.call_later(self._budget_s, self._look)
        return _check(await asked.answer)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that it belongs to."""
        return self._loop

    @property
    def doubtful(self) -> bool:
        """Whether the connection is closed, or has said something unasked while it was idle."""
        return self.closed or (
            not self._asked and self._loop.time() - self._heard_s > _IDLE_S and bool(self._poll.poll(0))
        )

    def close(self, error: Exception | None = None) -> None:
        """Close the connection; whoever waits for an answer is told `error`."""
        if self.closed:
            return
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._transport.abort()
        self._connection._close()
        while self._asked:
            asked = self._asked.popleft()
            if not asked.answer.done():
                said = (reply for reply in asked.replies if isinstance(reply, RedisConnectionError))
                error = error or next(said, None)
                asked.answer.set_exception(error or RedisConnectionError("the connection to Redis was closed"))
            if isinstance(error, TooLarge):
                error = TooLarge(own=False)  # the others have only been behind it

    # -- what the event loop tells ------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Give each answer to the one who asked first."""
        reader, row = self._reader, self._asked
        self._heard_s = self._loop.time()
        try:
            reader.feed(data)
            if (reply := reader.gets()) is False:
                self._unread += len(data)
                if self._unread > row[0].largest:
                    self.close(TooLarge())
                return
            self._unread = 0
            while reply is not False:
                asked = row[0]
                asked.replies.append(reply)
                if len(asked.replies) == asked.count:
                    row.popleft()
                    if not asked.answer.done():
                        asked.answer.set_result(asked.replies)
                reply = reader.gets()
        except (hiredis.HiredisError, IndexError) as exc:
            self.close(RedisConnectionError(f"Redis answered what was not asked ({type(exc).__name__})"))

    def eof_received(self) -> bool:
        """The server has closed the connection."""
        self.close()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self.close(None if exc is None else RedisConnectionError(f"the connection to Redis broke ({exc})"))

    def _send(self) -> None:
        if not self.closed:
            self._transport.write(b"".join(self._unsent))
            now_s, row = self._loop.time(), self._asked
            for i in range(1, len(self._unsent) + 1):
                row[-i].sent_s = now_s
        self._unsent.clear()

    def _look(self) -> None:
        """Tell those that have waited for too long. A server that has said nothing at all may never do so again."""
        self._timer = None
        if not self._asked:
            return
        late_s = self._loop.time() - self._budget_s
        first_s = self._asked[0].sent_s
        if first_s <= late_s and self._heard_s <= first_s:
            self.close(RedisTimeoutError("Redis did not answer in time"))
            return
        next_s = late_s + self._budget_s
        for asked in self._asked:
            if asked.sent_s > late_s:
                next_s = min(next_s, asked.sent_s)
                break
            if not asked.answer.done():
                asked.answer.set_exception(RedisTimeoutError("Redis did not answer in time"))
        self._timer = self._loop.call_at(next_s + self._budget_s, self._look)


class AsyncLinks:
    """The connection of one event loop, made when it is needed.

    Args:
        make: Returns a connection of redis-py that is not connected yet.
        budget_s: How long an answer may take.
    """

    def __init__(self, make: Callable[[], Any], budget_s: float) -> None:
        self._make = make
        self._budget_s = budget_s
        self._link: AsyncLink | None = None
        self._making: asyncio.Task[AsyncLink] | None = None

    async def ask(
        self, request: bytes, count: int, meanwhile: Callable[[], object] | None = None, *, largest: int = _LARGEST
    ) -> list[Any]:
        """Send what `packed` returned and return so many replies; error replies are values. Raises RedisError, OSError.

        TooLarge is raised if one reply has more bytes than `largest`.

        Whoever is cancelled meanwhile leaves the others' answers as they are.
        """
        link = self._link
        if link is None or link.doubtful:
            link = await self._connected()
        return await link.ask(request, count, meanwhile, largest=largest)

    async def aclose(self) -> None:
        """Close the connection."""
        making, link = self._making, self._link
        self._making = self._link = None
        if making is not None:
            making.cancel()
        if link is not None:
            link.close()

    def leave(self) -> None:
        """Have the event loop close the connection, from any thread; the next caller makes another."""
        if (link := self._link) is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the connection with it
                link.loop.call_soon_threadsafe(link.close)

    async def _connected(self) -> AsyncLink:
        if (link := self._link) is not None and link.doubtful:
            self._link = None
            link.close()
        if self._making is None:
            self._making = asyncio.ensure_future(self._connect())
            self._making.add_done_callback(self._made)
        return await asyncio.shield(self._making)

    async def _connect(self) -> AsyncLink:
        connection = self._make()
        await connection.connect()
        return AsyncLink(connection, self._budget_s)

    def _made(self, making: asyncio.Task[AsyncLink]) -> None:
        if making.cancelled():
            wanted = False
        else:
            wanted = making is self._making
            if making.exception() is None and wanted:
                self._link = making.result()
            elif making.exception() is None:
                making.result().close()
        if wanted:
            self._making = None
