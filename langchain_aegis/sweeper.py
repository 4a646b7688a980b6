"""Unlink what was invalidated, a little at a time, in one thread of the process.

Removing one indexed vector costs Redis about half a millisecond in which it serves nobody, so a long list goes in
short steps with pauses between them. Nobody waits for it: what was invalidated is not served any more anyway. Of
several processes one sweeps at a time; what a process leaves behind when it ends is done by the next one that sees it.
"""

from __future__ import annotations

import atexit
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from langchain_aegis.connections import Connections
from langchain_aegis.flows import run
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.notices import logger, warn_once
from langchain_aegis.store import Store, Swept

_PAUSE: Final = 8.0  # times as long as the server was busy: nobody waits for the sweep, others do for the server
_MOST_QUEUED: Final = 10.0  # where steps themselves have to wait, pauses grow by as much, up to so many times the step
_LEAST_PAUSE_S: Final = 0.001
_LOOK_AGAIN_S: Final = 0.25  # when another process is at it
_FIRST_RETRY_S, _LAST_RETRY_S = 0.1, 10.0
_RETRIES: Final = 12  # then it is left to whoever sees next that there is something to do
_EXIT_S: Final = 1.0


@dataclass(slots=True, eq=False)
class _Job:
    store: Store
    connections: Connections
    due: float
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    failures: int = 0  # in a row
    again: bool = False  # woken while a step was under way
    stuck: bool = False  # waits for Redis or for another process


class Sweeper:
    """Sweeps several namespaces, each with the connections of a cache that uses it.

    It keeps nothing of a cache but its store and its connections, and those only until the work is done.

    Args:
        clock: Monotonic seconds.
        wait: Waits on a condition for so many seconds, or until it is notified.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Condition, float], object] = threading.Condition.wait,
    ) -> None:
        self.failures = 0  # steps that failed, ever
        self.removed = 0  # entries that were unlinked, ever
        self._clock = clock
        self._wait = wait
        self._drained_at_exit = False
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Forget the jobs and the thread: they are the parent's, after a fork."""
        self._changed = threading.Condition()
        self._jobs: dict[tuple[str, int], _Job] = {}
        self._running: _Job | None = None
        self._thread: threading.Thread | None = None

    def wake(self, store: Store, connections: Connections) -> None:
        """Say that a namespace has something to sweep. Returns at once and never raises."""
        name = store.prefix, id(connections)
        with self._changed:
            if (job := self._jobs.get(name)) is not None:
                job.again = True
                return
            self._jobs[name] = _Job(store, connections, self._clock())
            if self._thread is not None:
                self._changed.notify_all()
                return
            self._thread = threading.Thread(target=self._run, name="aegis-sweeper", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the interpreter is ending: another process will see that there is something to do
                self._thread = None
                self._jobs.clear()
                return
            if not self._drained_at_exit:
                self._drained_at_exit = True
                atexit.register(self._drain)

    def leave(self, connections: Connections, timeout_s: float = 0.2) -> None:
        """Give up the jobs that use `connections`, which will be closed; waits for a step that is under way."""
        with self._changed:
            for name, job in list(self._jobs.items()):
                if job.connections is connections:
                    del self._jobs[name]
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._running is None or self._running.connections is not connections, timeout_s
            )

    def wait(self, timeout_s: float) -> bool:
        """Wait until nothing is left to do; returns whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs, timeout_s)

    def _drain(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: all(job.stuck for job in self._jobs.values()), _EXIT_S)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._next()) is not None:
            swept: Swept | None = None
            began = self._clock()
            try:
                swept = run(job.store.sweep(job.token), job.connections.perform)
            except Exception as exc:  # nobody is there to catch it: it is counted, and tried again
                self.failures += 1
                logger.debug("a step of sweeping failed", exc_info=exc)
            self._settle(job, swept, self._clock() - began)
            del job  # a namespace that is done shall not be held while another one waits

    def _next(self) -> _Job | None:
        with self._changed:
            while self._jobs:
                job = min(self._jobs.values(), key=lambda j: j.due)
                if (left_s := job.due - self._clock()) <= 0:
                    job.again = False
                    self._running = job
                    return job
                del job
                self._wait(self._changed, left_s)
            self._thread = None
            return None

    def _settle(self, job: _Job, swept: Swept | None, round_trip_s: float) -> None:
        """Decide when a job goes on, or that it is over."""
        with self._changed:
            self._running = None
            over = False
            if swept is None:
                job.failures += 1
                pause_s = min(_LAST_RETRY_S, _FIRST_RETRY_S * 2 ** (job.failures - 1))
                if over := job.failures > _RETRIES:
                    warn_once(
                        "not_swept",
                        "Redis failed while invalidated answers were being removed: they are not served, but take up "
                        "memory until the next process that uses this namespace goes on, or until they expire",
                    )
            else:
                self.removed += swept.removed
                job.failures = 0
                over = swept.state == "done" and not job.again
                queued_s = min(max(0.0, round_trip_s - swept.took_s), _MOST_QUEUED * swept.took_s)
                pause_s = max(_LEAST_PAUSE_S, _PAUSE * swept.took_s + queued_s)
                if swept.state in ("busy", "later"):
                    pause_s = _LOOK_AGAIN_S
            job.stuck = swept is None or swept.state == "busy"
            job.due = self._clock() + pause_s
            if over:
                name = job.store.prefix, id(job.connections)
                if self._jobs.get(name) is job:
                    del self._jobs[name]
            self._changed.notify_all()


the_sweeper: Final = Sweeper()
