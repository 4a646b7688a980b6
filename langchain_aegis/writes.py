"""Store answers after the call that made them has gone on, in one thread of the process.

Nobody waits for Redis to take an answer, but whoever asks for it next must find it: a lookup waits for the writes of
its own key and scope that are under way. An invalidation wins over what is queued, as over everything else that began
before it: the write compares epochs.
"""

from __future__ import annotations

import atexit
import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from langchain_aegis.forks import reset_after_fork
from langchain_aegis.notices import logger, warn_once

MOST: Final = 256  # writes; more make their callers wait
MOST_BYTES: Final = 32 * 1024 * 1024
DRAIN_S: Final = 1.0
_LINGER_S: Final = 0.003  # so long who leaves a note has the interpreter for himself: he is about to answer


@dataclass(slots=True, eq=False)
class Write:
    """An answer on its way.

    Attributes:
        do: Stores it; counts what comes of it.
        exact: The exact key, or "" for a note that no answer depends on.
        scope: The scope, or "".
        size: Bytes of the answer.
        place: The namespace.
        done: Resolved when it is over, whatever came of it; made when somebody asks for it.
        over: Whether it is.
    """

    do: Callable[[], object]
    exact: str
    scope: str
    size: int
    place: str
    done: Future[None] | None = None
    over: bool = False
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    def promise(self) -> Future[None]:
        """Return what is resolved when it is over. The writer's lock guards this, and `end`."""
        if self.done is None:
            self.done = Future()
            self.done.set_running_or_notify_cancel()  # who stops waiting for it does not stop it
            if self.over:
                self.done.set_result(None)
        return self.done

    def end(self) -> None:
        """Say that it is over."""
        self.over = True
        if self.done is not None:
            self.done.set_result(None)


class Writer:
    """A queue of writes, and the thread that does them in turn. May be used from any thread."""

    def __init__(self) -> None:
        self._drained_at_exit = False
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Forget the writes and the thread: they are the parent's, after a fork."""
        self._changed = threading.Condition()
        self._queue: deque[Write] = deque()  # the first is under way
        self._latest: dict[str, Write] = {}  # by exact key and by scope; both are digests of the namespace's secret
        self._bytes = 0
        self._thread: threading.Thread | None = None

    def put(self, write: Write) -> None:
        """Queue a write; where no thread can be started any more it is done at once. Never raises."""
        with self._changed:
            if self._thread is None and not self._start():
                self._do(write)
                write.end()
                return
            self._queue.append(write)
            self._bytes += write.size
            for name in (write.exact, write.scope):
                if name:
                    self._latest[name] = write
            if len(self._queue) == 1:
                self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._queue)

    def pending(self, name: str) -> Future[None] | None:
        """Return what is resolved when nothing of an exact key or of a scope is on its way any more; None: nothing is.

        Later writes are not waited for.
        """
        if not name or name not in self._latest:
            return None
        with self._changed:
            write = self._latest.get(name)
            return None if write is None else write.promise()

    def crowded(self) -> Future[None] | None:
        """Return what is resolved when there may be room for another write; None: there is room."""
        if len(self._queue) < MOST and self._bytes < MOST_BYTES:
            return None
        with self._changed:
            return self._queue[0].promise() if self._queue else None

    def drain(self, place: str | None = None, timeout_s: float | None = None) -> bool:
        """Wait until what is queued now, of one place or of all, is stored; returns whether it is."""
        with self._changed:
            last = next((w for w in reversed(self._queue) if place is None or w.place == place), None)
        if last is None:
            return True
        until = time.monotonic() + (DRAIN_S if timeout_s is None else timeout_s)
        with self._changed:
            return self._changed.wait_for(lambda: last.over, max(0.0, until - time.monotonic()))

    # -- the thread -----------------------------------------------------------------------------------------------

    def _start(self) -> bool:
        thread = threading.Thread(target=self._run, name="aegis-writer", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is ending
            return False
        self._thread = thread
        if not self._drained_at_exit:
            self._drained_at_exit = True
            atexit.register(self.drain)
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                if idle := not self._queue:
                    self._changed.wait_for(lambda: self._queue)
                write = self._queue[0]
            if idle and not write.exact:
                time.sleep(_LINGER_S)
            self._do(write)
            with self._changed:
                self._queue.popleft()
                self._bytes -= write.size
                for name in (write.exact, write.scope):
                    if self._latest.get(name) is write:
                        del self._latest[name]
                write.end()
                self._changed.notify_all()
            del write  # an idle thread keeps nobody's answer

    def _do(self, write: Write) -> None:
        try:
            write.context.run(write.do)
        except Exception as exc:  # the answer has reached the user; what is told here is its kind alone
            warn_once(
                f"write:{type(exc).__name__}",
                f"an answer could not be stored ({type(exc).__name__}); see `aegis doctor`",
            )
            logger.debug("a write failed", exc_info=exc)


the_writer: Final = Writer()
