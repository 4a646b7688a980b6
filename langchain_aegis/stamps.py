"""What lookups leave behind in their context for what follows in it.

For the update: which lookup it belongs to, so that an answer counts from the moment that its call was looked up. For
whoever shares the answer that is made next: a call that was looked up after an invalidation must not be given an
answer whose making began before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

_KEPT = 1000  # plain language models look up all prompts of a batch before they store the first answer


@dataclass(slots=True)
class Pending:
    """A lookup whose update is still to come.

    Attributes:
        who: Whose call it is.
        found: What the lookup found.
        times: How often this prompt was looked up for updates that are still to come.
    """

    who: Any
    found: Any
    times: int = 1


_Name = tuple[object, str, str]  # the engine, and what it was asked

_RECENT = 16


@dataclass(slots=True)
class _Kept:
    """Lookups, the last ones apart: noting one more copies only those. Never changed once it is made.

    Attributes:
        recent: The last ones, the newest last; None for one of `older` that was taken or noted again.
        older: All before them.
    """

    recent: Mapping[_Name, Pending | None] = field(default_factory=dict)
    older: Mapping[_Name, Pending] = field(default_factory=dict)

    def find(self, name: _Name) -> Pending | None:
        """Return the lookup of this name."""
        return self.recent[name] if name in self.recent else self.older.get(name)

    def with_(self, name: _Name, pending: Pending | None) -> _Kept:
        """Return the same with this as the newest; None: without it."""
        recent = dict(self.recent)
        recent.pop(name, None)
        if pending is not None or name in self.older:
            recent[name] = pending
        return _Kept(recent, self.older) if len(recent) <= _RECENT else _Kept(older=_joined(self.older, recent))


def _joined(older: Mapping[_Name, Pending], recent: Mapping[_Name, Pending | None]) -> dict[_Name, Pending]:
    """Return all as one, the newest last."""
    kept = dict(older)
    for name, pending in recent.items():
        kept.pop(name, None)
        if pending is not None:
            kept[name] = pending
    return kept


_NONE: Mapping[Any, Any] = MappingProxyType({})
_stamp: ContextVar[str] = ContextVar("aegis_lookup_stamp", default="")
# Values are replaced, never changed: a copied context has its own.
_NOTHING = _Kept()
_pending: ContextVar[_Kept] = ContextVar("aegis_pending", default=_NOTHING)
_follows: ContextVar[bool] = ContextVar("aegis_follows", default=False)
_forgotten: ContextVar[Mapping[object, Pending]] = ContextVar("aegis_forgotten", default=_NONE)


def remember(engine: object, prompt: str, llm_string: str, who: Any, found: Any) -> None:
    """Keep a lookup for the update that follows in the same context."""
    name = (engine, prompt, llm_string)
    kept = _pending.get()
    before = kept.find(name)
    kept = kept.with_(name, Pending(who, found, before.times + 1 if before is not None else 1))
    if len(kept.older) > _KEPT:
        older = dict(kept.older)
        while len(older) > _KEPT:
            (owner, *_), gone = first = next(iter(older.items()))
            del older[first[0]]
            _forgotten.set({owner: gone, **_forgotten.get()})  # the first one counts
        kept = _Kept(kept.recent, older)
    _pending.set(kept)


def peek(engine: object, prompt: str, llm_string: str) -> Pending | None:
    """Return the last lookup of this prompt in this context, and leave it; None if there was none."""
    return _pending.get().find((engine, prompt, llm_string))


def recall(engine: object, prompt: str, llm_string: str) -> Pending | None:
    """Take the last lookup of this prompt in this context; None if there was none."""
    name = (engine, prompt, llm_string)
    kept = _pending.get()
    if (found := kept.find(name)) is None:
        return None
    left = Pending(found.who, found.found, found.times - 1) if found.times > 1 else None
    _pending.set(kept.with_(name, left))
    return found


def forgotten(engine: object) -> Pending | None:
    """Return the first of so many lookups in this context that not all could be kept; None if all were."""
    return _forgotten.get().get(engine)


@contextlib.contextmanager
def following(does: bool = True) -> Iterator[None]:
    """Say that whoever looks up inside takes another process's answer as it comes, rather than wait for its end."""
    token = _follows.set(does)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # left in another context, which never had the mark
            _follows.reset(token)


def follows() -> bool:
    """Return whether this lookup is made `following`."""
    return _follows.get()


def note_lookup(stamp: str) -> None:
    """Say at which moment of the namespace, in its own counting, this context's lookup was made; "" if unknown."""
    _stamp.set(stamp)


def last_lookup() -> str:
    """Return what the last lookup in this context noted."""
    return _stamp.get()
