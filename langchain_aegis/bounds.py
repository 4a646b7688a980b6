"""The bounds of admission: their defaults, and what they may be."""

from __future__ import annotations

import math

from langchain_aegis.errors import AegisConfigError

MAX_CONCURRENCY = 4
MAX_WAITING = 100
MAX_BATCH = 16
WINDOW_MS = 50.0


def check_bounds(
    *,
    max_concurrency: int | None = None,
    max_waiting: int | None = None,
    window_ms: float | None = None,
    max_batch: int | None = None,
    deadline_s: float | None = None,
) -> None:
    """Raise `AegisConfigError` for a bound that is out of range; None is never checked."""
    for name, whole, least in (("max_concurrency", max_concurrency, 1), ("max_waiting", max_waiting, 0),
                               ("max_batch", max_batch, 1)):  # fmt: skip
        if whole is not None and (isinstance(whole, bool) or not isinstance(whole, int) or whole < least):
            raise AegisConfigError(f"{name} must be a whole number of at least {least}, got {whole!r}")
    if window_ms is not None and not (_is_number(window_ms) and 0 <= window_ms < math.inf):
        raise AegisConfigError(f"window_ms must be a number of milliseconds, 0 or more, got {window_ms!r}")
    if deadline_s is not None and not (_is_number(deadline_s) and 0 < deadline_s < math.inf):
        raise AegisConfigError(f"deadline_s must be a number of seconds above 0, got {deadline_s!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
