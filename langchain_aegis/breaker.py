"""Stop asking what keeps failing, and let one call try now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any


class Unavailable(Exception):
    """Redis or the embedder cannot be asked now; becomes a miss and never reaches a user.

    Attributes:
        reason: "redis_down", "redis_slow", "embedder_down", "embedder_slow".
        late: A future of the answer that came too late, if it is still on its way.
    """

    def __init__(self, reason: str, late: Any = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.late = late


class Breaker:
    """Stops asking what has failed several times in a row; then lets one call try, or has it tried beside the calls.

    Args:
        failures: So many in a row open it.
        pause_s: How long it stays open before it is tried.
        clock: Monotonic seconds.
        probe: Begins to try, and returns at once; when that is over `tried` is told. None: a call tries.
        again_s: How much time is between the beginnings of two tries at least; default: `pause_s`.
    """

    def __init__(
        self,
        failures: int = 5,
        pause_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        probe: Callable[[], None] | None = None,
        again_s: float | None = None,
    ) -> None:
        self._limit = failures
        self._pause_s = pause_s
        self._clock = clock
        self._probe = probe
        self._again_s = pause_s if again_s is None else again_s
        self._trying = False
        self._lock = threading.Lock()
        self._failed = 0
        self._next_try = 0.0

    @property
    def open(self) -> bool:
        """Whether calls are being turned away."""
        return self._failed >= self._limit

    def allow(self) -> bool:
        """Return whether this call may go ahead; while open, one call per pause may, or none if there is a probe."""
        if self._failed < self._limit:
            return True
        with self._lock:
            now = self._clock()
            if self._trying or now < self._next_try:
                return False
            self._next_try = now + self._again_s
            if self._probe is None:
                return True
            self._trying = True
        self._probe()
        return False

    def tried(self, well: bool) -> None:
        """Say that the probe is over, and whether it went well."""
        with self._lock:
            self._trying = False
            if well:
                self._failed = 0

    def succeeded(self) -> None:
        """Say that a call went well."""
        if self._failed:
            with self._lock:
                self._failed = 0

    def failed(self) -> None:
        """Say that a call failed."""
        with self._lock:
            self._failed += 1
            # What was under way when it opened does not put off the probe.
            if self._failed == self._limit or (self._failed > self._limit and self._probe is None):
                self._next_try = max(self._next_try, self._clock() + self._pause_s)
