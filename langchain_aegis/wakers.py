"""Wake one waiting thread, or one waiting coroutine of any event loop."""

from __future__ import annotations

import asyncio
import threading


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs in this thread, or None."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class Waker:
    """Wakes a thread (`loop=None`) or a coroutine of `loop`; never resolves a future from a foreign thread."""

    __slots__ = ("_event", "_future", "_loop", "woken")

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._loop = loop
        self._future: asyncio.Future[None] | None = None if loop is None else loop.create_future()
        self._event = threading.Event() if loop is None else None
        self.woken = False  # by `wake`, not by a timeout

    @property
    def blocks(self) -> bool:
        """Whether a thread waits, not a coroutine."""
        return self._loop is None

    def wake(self) -> None:
        """Wake it; raises RuntimeError when its loop is closed."""
        self.woken = True
        if self._event is not None:
            self._event.set()
        elif self._loop is not None:
            if running_loop() is self._loop:
                self._resolve()
            else:
                self._loop.call_soon_threadsafe(self._resolve)

    def _resolve(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    def wait(self, timeout_s: float | None) -> None:
        """Block this thread until woken, or for `timeout_s` seconds; may be called again after that."""
        if self._event is not None:
            self._event.wait(None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX))

    async def await_(self, timeout_s: float | None) -> None:
        """Suspend this coroutine until woken, or for `timeout_s` seconds; it must run in the waker's loop."""
        if self._loop is None or self._future is None or self.woken:
            return
        if self._future.done():  # an earlier timeout
            self._future = self._loop.create_future()
        timer = None if timeout_s is None else self._loop.call_later(timeout_s, self._resolve)
        try:
            await self._future
        finally:
            if timer is not None:
                timer.cancel()
