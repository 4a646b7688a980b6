"""What admission may know of a call to choose its turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

Priority = Literal["interactive", "bulk", "spare"]


def no_prefix() -> tuple[int, ...]:
    """Return the prefix of a call that shares none."""
    return ()


@dataclass(frozen=True, slots=True)
class Traits:
    """One call's traits; every one may be unknown.

    Attributes:
        tenant: Whose call it is: tenants take turns, and counts are kept by it.
        model: Its model's name, for counts.
        runner: Equal for calls that the server runs without loading anything anew (model, `num_ctx`, ...).
            None, where that is not known, is never a reason to prefer or put back a call.
        prefix: Returns a digest of each beginning of the prompt that is a whole number of blocks, shortest first.
            Asked at most once per ticket, outside of locks when the call has to wait.
    """

    tenant: str | None = None
    model: str | None = None
    runner: Hashable = None
    prefix: Callable[[], tuple[int, ...]] = no_prefix


NO_TRAITS = Traits()


def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Return how many leading blocks two prefixes share."""
    low, high = 0, min(len(one), len(other))
    if low == high or one[0] != other[0]:
        return 0
    while low < high:  # digests are cumulative: equal at n means equal before n
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


priority: ContextVar[Priority] = ContextVar("aegis_priority", default="interactive")


def background() -> AbstractContextManager[None]:
    """Mark calls made inside as background traffic (a cache's judge, a health check): never the last free slot's."""
    return _prioritised("spare")


def in_bulk() -> AbstractContextManager[None]:
    """Mark calls made inside as items of a batch: they wait for their turn, after single calls."""
    return _prioritised("bulk")


@contextlib.contextmanager
def _prioritised(what: Priority) -> Iterator[None]:
    token = priority.set(what)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # left in another context, which never had the mark
            priority.reset(token)
