"""What every embedded server has in common: it starts when it is needed, and ends with its last user."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from langchain_aegis.embedded.guard import ServerInfo, SharedServer


class EmbeddedServer(ABC):
    """A server process that this user's processes share; a context manager, blocking and awaited."""

    def __init__(self) -> None:
        self._guard: SharedServer | None = None
        self._lock, self._lock_pid = threading.Lock(), os.getpid()

    @abstractmethod
    def _make(self) -> SharedServer:
        """Return the server to start or to attach to."""

    @property
    def pid(self) -> int:
        """Process id of the server itself; starts it."""
        return self.start().pid

    def start(self) -> ServerInfo:
        """Start the server, or attach to it; does nothing while it runs. Errors as the class says."""
        with self._exclusive():
            if self._guard is None or not self._guard.home.exists():
                self._guard = self._make()
            return self._guard.acquire()

    def close(self) -> None:
        """Leave the server. The last one to do so stops it: what it keeps is saved when this returns."""
        with self._exclusive():
            if self._guard is not None:
                self._guard.release(wait_s=5.0)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        try:
            await asyncio.to_thread(self.start)
        except asyncio.CancelledError:
            await asyncio.to_thread(self.close)  # the thread went on: give back what it got
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        if self._lock_pid != os.getpid():  # after a fork: another thread of the parent may have held it
            self._lock, self._lock_pid = threading.Lock(), os.getpid()
        with self._lock:
            yield
