"""What lookups leave behind in their context for what follows in it.

For the update: which lookup it belongs to, so that an answer counts from the moment that its call was looked up. For
whoever shares the answer that is made next: a call that was looked up after an invalidation must not be given an
answer whose making began before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
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


_NONE: Mapping[Any, Any] = MappingProxyType({})
_stamp: ContextVar[str] = ContextVar("aegis_lookup_stamp", default="")
# Values are replaced, never changed: a copied context has its own.
_pending: ContextVar[Mapping[tuple[object, str, str], Pending]] = ContextVar("aegis_pending", default=_NONE)
_forgotten: ContextVar[Mapping[object, Pending]] = ContextVar("aegis_forgotten", default=_NONE)


def remember(engine: object, prompt: str, llm_string: str, who: Any, found: Any) -> None:
    """Keep a lookup for the update that follows in the same context."""
    name = (engine, prompt, llm_string)
    kept = dict(_pending.get())
    before = kept.pop(name, None)
    if len(kept) >= _KEPT:
        (owner, *_), gone = next(iter(kept.items()))
        del kept[next(iter(kept))]
        _forgotten.set({owner: gone, **_forgotten.get()})  # the first one counts
    kept[name] = Pending(who, found, before.times + 1 if before is not None else 1)
    _pending.set(kept)


def recall(engine: object, prompt: str, llm_string: str) -> Pending | None:
    """Take the last lookup of this prompt in this context; None if there was none."""
    name = (engine, prompt, llm_string)
    kept = dict(_pending.get())
    if (found := kept.pop(name, None)) is None:
        return None
    if found.times > 1:
        kept[name] = Pending(found.who, found.found, found.times - 1)
    _pending.set(kept)
    return found


def forgotten(engine: object) -> Pending | None:
    """Return the first of so many lookups in this context that not all could be kept; None if all were."""
    return _forgotten.get().get(engine)


def note_lookup(stamp: str) -> None:
    """Say at which moment of the namespace, in its own counting, this context's lookup was made; "" if unknown."""
    _stamp.set(stamp)


def last_lookup() -> str:
    """Return what the last lookup in this context noted."""
    return _stamp.get()
