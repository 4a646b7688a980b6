"""One connection to Redis for a thread that asks, is told things unasked, and hears a bell meanwhile.

With RESP3 a connection that has subscribed still takes commands, and what is pushed and what is answered come in the
order in which they arose. So nothing that was given is taken for older than an answer that says the opposite.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import hiredis
import redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.links import packed, readable
from langchain_aegis.settings import redact_url
from langchain_aegis.tls import Tls, TlsConnection

_READ_AT_ONCE: Final = 65_536


def dialing(url: str, patience_s: float) -> Callable[[], Any]:
    """Return what makes a connection of redis-py that is not connected yet.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        patience_s: How long it may take to connect, and to send.

    Raises:
        AegisConfigError: The URL cannot be used.
    """
    try:
        told = dict(redis.connection.parse_url(url))
    except ValueError as exc:
        raise AegisConfigError(f"redis_url cannot be read: {redact_url(url)!r}") from exc
    kind: Any = told.pop("connection_class", redis.Connection)
    arguments: dict[str, Any] = {
        **told, "decode_responses": False, "protocol": 2, "socket_timeout": patience_s,
        "socket_connect_timeout": patience_s, "driver_info": None, "retry": Retry(NoBackoff(), 0),
    }  # fmt: skip
    if kind is redis.SSLConnection:
        kind = partial(TlsConnection, tls=Tls(arguments))
    make = partial(kind, **arguments)
    try:
        make()  # unconnected: only checks the arguments
    except (TypeError, RedisError) as exc:
        raise AegisConfigError(f"redis_url has an argument that cannot be used: {redact_url(url)!r}") from exc
    return make


class SlotLink:
    """A connection, connected, of one thread.

    Args:
        make: Returns a connection of redis-py that is not connected yet.
        bell: Whoever waits hears it, too.
        patience_s: How long an answer may take.

    Raises:
        RedisError: It cannot be connected; or OSError.

    Attributes:
        pushed: What subscribed channels have told and nobody has read yet.
    """

    def __init__(self, make: Callable[[], Any], bell: socket.socket, patience_s: float) -> None:
        self.pushed: deque[bytes] = deque()
        self._patience_s = patience_s
        self._connection = connection = make()
        connection.connect()
        self._sock: Any = connection._sock
        self._pending: Callable[[], int] = getattr(self._sock, "pending", lambda: 0)  # TLS reads ahead
        self._reader: Any = hiredis.Reader(replyError=readable(connection._parser.parse_error))
        self._buffer = bytearray(_READ_AT_ONCE)
        self._replies: deque[Any] = deque()
        self._number = self._sock.fileno()
        self._poll = select.poll()
        self._poll.register(self._number, select.POLLIN)
        self._own = select.poll()
        self._own.register(self._number, select.POLLIN)
        self._poll.register(bell, select.POLLIN)

    def subscribe(self, channel: str) -> bool:
        """Have a channel's messages pushed; False: this server does not, or not to this user."""
        (told,) = self.ask(("HELLO", "3"))
        if isinstance(told, RedisConnectionError):  # it is loading, for one
            raise told
        if isinstance(told, Exception):
            return False
        self._sock.sendall(packed([("SUBSCRIBE", channel)]))
        (told,) = self._answers(1, confirms=True)
        return not isinstance(told, Exception)

    def ask(self, *commands: Sequence[Any]) -> list[Any]:
        """Send commands and return a reply for each; error replies are values. Raises RedisError or OSError."""
        self._sock.sendall(packed([tuple(command) for command in commands]))
        return self._answers(len(commands))

    def wait(self, wait_s: float) -> None:
        """Wait until something is pushed, or the bell rings. Raises RedisError or OSError."""
        if self.pushed:
            return
        if any(number == self._number for number, _ in self._poll.poll(max(0.0, wait_s) * 1000)):
            self._read()
            if self._replies:
                raise RedisConnectionError("Redis answered what was not asked")

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(RedisError, OSError):
            self._connection.disconnect()

    def abandon(self) -> None:
        """In the child of a fork: close the descriptor, not the connection."""
        self._sock.close()

    def _answers(self, count: int, *, confirms: bool = False) -> list[Any]:
        until_s = time.monotonic() + self._patience_s
        while len(self._replies) < count:
            # Before the look: what has come by then counts, however late this thread was run.
            late = time.monotonic() >= until_s
            if self._pending() or self._own.poll(0.0 if late else max(0.0, until_s - time.monotonic()) * 1000):
                self._read(confirms=confirms)
            elif late:
                raise RedisTimeoutError("Redis did not answer in time")
        if len(self._replies) > count:
            raise RedisConnectionError("Redis answered what was not asked")
        found = list(self._replies)
        self._replies.clear()
        return found

    def _read(self, *, confirms: bool = False) -> None:
        while True:
            try:
                size = self._sock.recv_into(self._buffer)
            except TimeoutError:  # TLS had something to say to itself
                return
            if not size:
                raise RedisConnectionError("Redis closed the connection")
            self._reader.feed(self._buffer, 0, size)
            while (reply := self._reader.gets()) is not False:
                if not isinstance(reply, hiredis.PushNotification):
                    self._replies.append(reply)
                elif reply[0] == b"message":
                    self.pushed.append(reply[2])
                elif confirms and reply[0] == b"subscribe":
                    self._replies.append(reply)
            if not self._pending():
                return
