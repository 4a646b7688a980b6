"""What the last lookup of a cache saw, for whoever shares the answer that is made next.

A call that was looked up after an invalidation must not be given an answer whose making began before it.
"""

from __future__ import annotations

from contextvars import ContextVar

_stamp: ContextVar[str] = ContextVar("aegis_lookup_stamp", default="")


def note_lookup(stamp: str) -> None:
    """Say at which moment of the namespace, in its own counting, this context's lookup was made; "" if unknown."""
    _stamp.set(stamp)


def last_lookup() -> str:
    """Return what the last lookup in this context noted."""
    return _stamp.get()
