"""Hear from Redis which keys change, and know up to when all that changed was heard.

Redis pushes the names of changed keys over the connection that asked for them (`CLIENT TRACKING ON BCAST`, RESP3). Over
the same connection it is asked again and again whether it is there. Pushes and answers come in the order in which they
arose, so an answer proves that whatever changed before the question was sent has been heard by now. A connection of
its own for the pushes (`REDIRECT`) would prove less: what it hears depends on another one that may have died unheard.

What is not proved counts as not heard: a frozen server, a connection that is half open, a proxy that swallows, a thread
that is not run, a process that was stopped all look the same from here.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import hiredis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from langchain_aegis.links import packed, readable
from langchain_aegis.notices import logger, warn_once
from langchain_aegis.replies import error_kind

BEAT_S: Final = 0.05  # after an answer, so long until the next question
ALIVE_S: Final = 0.25  # so long an answer counts, from when its question was sent
_DEAD_S: Final = 1.0  # without an answer for so long, another connection is made
_IDLE_S: Final = 2.0  # when nobody has wanted to know for so long, nothing is asked
_LOOK_S: Final = 1.0  # between two looks whether there still is a listener, when nothing is asked
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.05, 5.0  # before another connection is made
_DOUBT_PAUSE_S: Final = 0.005  # several callers may connect at once
_REFUSED_PAUSE_S: Final = 60.0
_READ_AT_ONCE: Final = 65_536
_PING: Final = packed([("PING",)])


def _clock() -> Callable[[], float]:
    # A machine that sleeps hears nothing, and CLOCK_MONOTONIC sleeps with it.
    boot: int | None = getattr(time, "CLOCK_BOOTTIME", None)
    if boot is None:
        return time.monotonic
    known: int = boot
    return lambda: time.clock_gettime(known)


clock: Final = _clock()


class Listener(Protocol):
    """Is told what was heard, in the thread of the connection.

    Attributes:
        doubts: How often there was reason to doubt that the connection leads to the right server.
    """

    doubts: int

    def changed(self, names: Sequence[bytes] | None) -> None:
        """Keys have changed; None: any may have."""

    def proved(self, at_s: float, doubts: int) -> None:
        """All that changed before `at_s` was heard, unless there is more doubt than when the connection was made."""

    def lost(self) -> None:
        """From now on nothing is heard."""


class Refused(Exception):
    """The server does not push."""


class Pushes:
    """One connection and its thread; they end with their listener.

    Args:
        listener: Who is told; it is held weakly.
        make: Returns a connection of redis-py that is not connected yet.
        prefixes: Of the names of the keys that are listened to; none begins with another.
        channel: Any name of our own: who subscribes to something is disconnected by the server when he falls far
            behind, where others have it keep everything for them in its memory.

    Attributes:
        asked: Set it when somebody wants to know.
        idle: Nothing is asked of the server: `ring` then.
    """

    def __init__(self, listener: Listener, make: Callable[[], Any], prefixes: Sequence[str], channel: str) -> None:
        self.asked = True
        self.idle = False
        self._listener = weakref.ref(listener, lambda _: self.ring())
        self._make = make
        self._prefixes = tuple(part for prefix in prefixes for part in ("PREFIX", prefix))
        self._channel = channel
        self._closing = False
        self._session: _Session | None = None
        self._telling = False  # something has come, and is being told
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._rope.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="aegis-pushes", daemon=True)

    def start(self) -> bool:
        """Start the thread; returns whether that was possible: it is not when the interpreter ends."""
        try:
            self._thread.start()
        except RuntimeError:
            return False
        return True

    def ring(self) -> None:
        """Have the thread look at once."""
        with contextlib.suppress(OSError):  # it is closed, or has not heard the last ring yet
            self._rope.send(b"!")

    def quiet(self) -> bool:
        """Whether nothing has come that is not told yet; a thread that computes may keep ours waiting for 5 ms.

        Of several threads only one may ask at a time.
        """
        session = self._session
        return session is not None and not self._telling and not session.waits()

    def close(self, timeout_s: float = 1.0) -> None:
        """End the thread, which closes the connection."""
        self._closing = True
        self.ring()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def abandon(self) -> None:
        """In the child of a fork: let go of what is the parent's, who does not notice."""
        with contextlib.suppress(Exception):
            if self._session is not None:
                self._session.abandon()
            self._bell.close()
            self._rope.close()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause_s = 0.0
        try:
            while self._wait(pause_s):
                pause_s = self._connected(pause_s)
        finally:
            self._bell.close()
            self._rope.close()

    def _connected(self, paused_s: float) -> float:
        """Listen for as long as that goes well; returns how long to wait before the next try."""
        session: _Session | None = None
        try:
            listener = self._listener()
            if listener is None:
                return 0.0
            doubts = listener.doubts
            del listener
            session = self._session = _Session(self._make(), self._bell)
            session.agree(self._prefixes, self._channel)
            paused_s = 0.0
            self._listen(session, doubts)
            return _DOUBT_PAUSE_S
        except Refused as exc:
            warn_once(
                "no_pushes",
                f"this Redis does not push what changes ({exc}): the local tier holds nothing, all else goes on. It "
                "needs Redis 6 or Valkey, and the commands HELLO and CLIENT TRACKING",
            )
            return _REFUSED_PAUSE_S
        except Exception as exc:  # nobody is there to catch it, whatever it is: then nothing is heard
            logger.debug("the connection for pushes was lost", exc_info=exc)
            return min(_LAST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * paused_s))
        finally:
            self._session, self._telling = None, False
            if (listener := self._listener()) is not None:
                listener.lost()
            if session is not None:  # not before: who asks for what has come must not look at another's descriptor
                session.close()

    def _listen(self, session: _Session, doubts: int) -> None:
        """Tell what is heard until there is doubt, or nobody to tell it. Raises RedisError or OSError."""
        sent_s: float | None = session.ping()
        heard_s = wanted_s = clock()
        while True:
            now_s = clock()
            if self.asked:
                self.asked, wanted_s = False, now_s
            if sent_s is not None:
                wait_s = sent_s + _DEAD_S - now_s
                if wait_s <= 0:
                    raise RedisTimeoutError("Redis did not answer in time")
            elif now_s - wanted_s < _IDLE_S:
                wait_s = heard_s + BEAT_S - now_s
                if wait_s <= 0:
                    sent_s = session.ping()
                    continue
            else:
                self.idle = True
                wait_s = 0.0 if self.asked else _LOOK_S
            told = session.wait(wait_s)
            self.idle = False
            self._hear_bell()
            listener = self._listener()
            if self._closing or listener is None or listener.doubts != doubts:
                return
            self._telling = told
            for reply in session.heard() if told else ():
                if isinstance(reply, hiredis.PushNotification):
                    if reply[0] == b"invalidate":
                        listener.changed(reply[1])
                elif reply == b"PONG" and sent_s is not None:
                    listener.proved(sent_s, doubts)
                    sent_s, heard_s = None, clock()
                else:
                    raise RedisConnectionError("Redis answered what was not asked")
            self._telling = False
            del listener

    def _wait(self, pause_s: float) -> bool:
        """Wait before another connection is made, and until somebody wants it; returns whether somebody does."""
        until_s = clock() + pause_s
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        while not self._closing and self._listener() is not None:
            left_s = until_s - clock()
            if left_s <= 0 and self.asked:
                return True
            self.idle = left_s <= 0
            if not (self.idle and self.asked):
                poll.poll((left_s if left_s > 0 else _LOOK_S) * 1000)
            self.idle = False
            self._hear_bell()
        return False

    def _hear_bell(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._bell.recv(4096):
                pass


class _Session:
    """One connection, connected; who waits for it hears a bell, too."""

    def __init__(self, connection: Any, bell: socket.socket) -> None:
        self._connection = connection
        connection.connect()
        self._sock: Any = connection._sock
        self._pending: Callable[[], int] = getattr(self._sock, "pending", lambda: 0)  # TLS reads ahead
        self._reader: Any = hiredis.Reader(
            replyError=readable(connection._parser.parse_error)
        )  # its stubs know no bytearray
        self._buffer = bytearray(_READ_AT_ONCE)
        self._number = self._sock.fileno()
        self._poll = select.poll()
        self._poll.register(self._number, select.POLLIN)
        self._poll.register(bell, select.POLLIN)
        self._look = select.poll()  # for other threads
        self._look.register(self._number, select.POLLIN)

    def agree(self, prefixes: Sequence[str], channel: str) -> None:
        """Have the server push. Raises Refused, RedisError or OSError."""
        self._sock.sendall(packed([("HELLO", "3"), ("CLIENT", "TRACKING", "ON", "BCAST", *prefixes)]))
        replies: list[Any] = []
        while len(replies) < 2:
            replies += [r for r in self.read() if not isinstance(r, hiredis.PushNotification)]
        for reply in replies:
            if isinstance(reply, RedisConnectionError):  # it is loading, for one
                raise reply
            if isinstance(reply, Exception):
                raise Refused(error_kind(reply))
        self._sock.sendall(packed([("SUBSCRIBE", channel)]))
        told: list[Any] = []
        while not any(isinstance(r, Exception) or r[0] == b"subscribe" for r in told):  # where it is forbidden, without
            told += self.read()

    def ping(self) -> float:
        """Ask whether the server is there; returns when, before it was sent."""
        at_s = clock()
        self._sock.sendall(_PING)
        return at_s

    def wait(self, wait_s: float) -> bool:
        """Wait until something can be read, or the bell rings; returns whether something can be read."""
        return any(number == self._number for number, _ in self._poll.poll(max(0.0, wait_s) * 1000))

    def waits(self) -> bool:
        """Whether something has come that nobody has read yet."""
        return bool(self._look.poll(0))

    def read(self) -> list[Any]:
        """Return what has come, in order. Raises RedisError or OSError."""
        replies = []
        while True:
            if not (size := self._sock.recv_into(self._buffer)):
                raise RedisConnectionError("Redis closed the connection")
            self._reader.feed(self._buffer, 0, size)
            while (reply := self._reader.gets()) is not False:
                replies.append(reply)
            if not self._pending():
                return replies

    def heard(self) -> list[Any]:
        """Return what has come, in order; nothing if TLS had something to say to itself. Raises RedisError, OSError."""
        try:
            return self.read()
        except TimeoutError:
            return []

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(RedisError, OSError):
            self._connection.disconnect()

    def abandon(self) -> None:
        """Close the descriptor, not the connection."""
        self._sock.close()
