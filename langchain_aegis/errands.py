"""What a call leaves to be done in Redis and does not wait for, in one thread of the process."""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from langchain_aegis.forks import reset_after_fork
from langchain_aegis.notices import logger

_MOST_WAITING: Final = 1_000
_IDLE_S: Final = 10.0  # then the thread ends
_LINGER_S: Final = 0.003  # so long who gave the first errand has the interpreter for himself: he is in a hurry
_EXIT_S: Final = 1.0


class Errands:
    """Runs errands one after another, in the order in which they were given.

    Args:
        most: So many may wait; a further one is refused.
    """

    def __init__(self, most: int = _MOST_WAITING) -> None:
        self.failures = 0  # errands that failed, ever
        self._most = most
        self._drained_at_exit = False
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Forget the errands and the thread: they are the parent's, after a fork."""
        self._changed = threading.Condition()
        self._waiting: deque[tuple[object, Callable[[], object]]] = deque()
        self._running: object = None
        self._thread: threading.Thread | None = None

    def add(self, owner: object, do: Callable[[], object]) -> bool:
        """Have something done soon.

        Args:
            owner: Whose errand it is, for `settle`.
            do: What is done; its exceptions are counted.

        Returns:
            False if it will not be done: too many are waiting, or the interpreter is ending. Never raises.
        """
        with self._changed:
            if len(self._waiting) >= self._most:
                return False
            self._waiting.append((owner, do))
            if self._thread is not None:
                self._changed.notify_all()
                return True
            self._thread = threading.Thread(target=self._run, name="aegis-errands", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the interpreter is ending
                self._thread = None
                self._waiting.clear()
                return False
            if not self._drained_at_exit:
                self._drained_at_exit = True
                atexit.register(self._drain)
        return True

    def settle(self, owner: object, timeout_s: float = _EXIT_S) -> bool:
        """Wait until an owner's errands are done; returns whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._has(owner), timeout_s)

    def _has(self, owner: object) -> bool:
        return self._running is owner or any(whose is owner for whose, _ in self._waiting)

    def _drain(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and self._running is None, _EXIT_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.notify_all()
                idle = not self._waiting
                if idle and not self._changed.wait_for(lambda: self._waiting, _IDLE_S):
                    self._thread = None
                    return
            if idle:
                time.sleep(_LINGER_S)
            with self._changed:
                self._running, do = self._waiting.popleft()
            try:
                do()
            except Exception as exc:  # nobody is there to catch it
                self.failures += 1
                logger.debug("an errand failed", exc_info=exc)
            del do  # what it holds shall not be held while the thread waits


the_errands: Final = Errands()
