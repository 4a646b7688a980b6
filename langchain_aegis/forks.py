"""Let the child of a fork start afresh: the calls that its parent had under way are not its own."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    """Has state, such as locks, that must not be taken over from another process."""

    def reset(self) -> None:
        """Forget everything that belongs to the parent."""


_living: weakref.WeakSet[Forkable] = weakref.WeakSet()


def reset_after_fork(owner: Forkable) -> None:
    """Have `owner.reset()` called in every child of a fork, for as long as `owner` lives."""
    _living.add(owner)


def _reset_all() -> None:
    for owner in list(_living):
        owner.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
