"""Tell whether another thread's event loop still gets on with its work.

Whoever waits for something that an event loop has to do waits for ever if that loop is blocked, maybe by the very
thread that waits: `pool.submit(model.invoke, x).result()` in a coroutine does that.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time

QUIET_S = 0.25  # after so long without a sign of life the loop is asked for one
ANSWER_S = 0.25  # within which a loop that is not blocked answers
LONGEST_S = 2.0  # for one whose thread is busy: it may be waiting actively
_LOOK_S = 0.05


class Pulse:
    """The signs of life of one event loop; made in it, asked from anywhere. Askers share what they find out."""

    __slots__ = ("_asked", "_loop", "_moved", "_seen", "_stood_at", "_thread")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = threading.get_ident()
        self._seen = time.monotonic()
        self._asked: float | None = None
        self._stood_at: object = None
        self._moved = False

    def beat(self) -> None:
        """Note a sign of life; called in the loop."""
        self._seen = time.monotonic()
        self._asked = None

    def due_s(self) -> float:
        """Return after how many seconds `stopped` should be asked next."""
        if self._asked is not None:
            return _LOOK_S
        return max(_LOOK_S, self._seen + QUIET_S - time.monotonic())

    def stopped(self) -> bool:
        """Whether the loop is blocked, or over; to be asked again and again while waiting."""
        now, asked = time.monotonic(), self._asked
        if self._loop.is_closed():
            return True
        if asked is None:
            if now - self._seen >= QUIET_S:
                self._moved, self._stood_at, self._asked = False, self._stands_at(), now
                try:
                    self._loop.call_soon_threadsafe(self.beat)
                except RuntimeError:  # closed meanwhile
                    return True
            return False
        # A busy loop answers late: that its thread moves tells it from a blocked one.
        self._moved = self._moved or self._stands_at() != self._stood_at
        if now - asked < ANSWER_S:
            return False
        return not self._moved or now - asked >= LONGEST_S or not self._loop.is_running()

    def _stands_at(self) -> object:
        frame = sys._current_frames().get(self._thread)
        return None if frame is None else (id(frame), frame.f_lasti)
