"""Which of the scopes that were entered is in force.

A context follows calls, threads and tasks, but no generators: what one of them enters stays in force, while it is
paused, for whoever runs next. Here is told whose call it then is, or that this cannot be told.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from types import CodeType, FrameType
from typing import Any, Literal

CacheUse = Literal["use", "refresh", "off"]
Frame = tuple[int, CodeType | None, bool]  # id, code, whether it can pause
NO_FRAME: Frame = (0, None, False)


class Sources:
    """Documents that an answer rests on.

    What a scope declares holds for everything inside it, inner scopes too; what is added later, in an inner scope,
    is added to the outer ones' as well.

    Args:
        ids: Ids of documents, declared.
        outer: Of the scope around this one.
    """

    __slots__ = ("_added", "_inherited", "_outer", "declared")

    def __init__(self, ids: Iterable[str] = (), outer: Sources | None = None) -> None:
        self.declared: frozenset[str] = frozenset(ids)
        if outer is not None and outer.declared:
            self.declared |= outer.declared
        self._added: set[str] = set()  # set.add and set.update are atomic under the GIL
        self._inherited: set[str] = set()
        self._outer = outer

    def add(self, *ids: str) -> None:
        """Add `ids` here and in every outer scope."""
        self._added.update(ids)
        if self._outer is not None:
            self._outer.add(*ids)

    def inherit(self, names: Iterable[str]) -> None:
        """Add what a kept answer rests on, by the names under which the cache keeps it, here and in outer scopes."""
        names = tuple(names)
        self._inherited.update(names)
        if self._outer is not None:
            self._outer.inherit(names)

    def ids(self) -> frozenset[str]:
        """Return all ids that hold here."""
        return self.declared | self._added

    def inherited(self) -> frozenset[str]:
        """Return the names that kept answers brought along."""
        return frozenset(self._inherited)


@dataclass(slots=True)  # not frozen, which would make each `with` 2 us dearer
class Scope:
    """What `aegis_scope` said about the calls inside it; None where it said nothing. Never changed once made."""

    tenant: str | None = None
    user: str | None = None
    task: str | None = None
    question: str | None = None
    ttl_s: float | None = None
    cache: CacheUse = "use"
    sources: Sources | None = field(default=None, compare=False)


_NO_SCOPE = Scope()


class Entered:
    """A scope that is in force, and the one around it.

    Args:
        changes: What it names itself.
        sources: Collects the sources named in it; None to go on with the outer scope's.
        outer: What was in force where it was entered.
        frame: The code that holds it open, as `frame_of_caller` returns it.
        missing: "tenant", "user": what a lost scope named, so that having none must not pass for being nobody's.
    """

    __slots__ = ("changes", "code", "doubtful", "frame_id", "lost", "missing", "mixed", "outer", "own_missing",
                 "own_pauses", "pauses", "scope", "sources")  # fmt: skip

    def __init__(
        self,
        changes: Mapping[str, Any],
        sources: Sources | None = None,
        outer: Entered | None = None,
        frame: Frame = NO_FRAME,
        missing: frozenset[str] = frozenset(),
    ) -> None:
        self.changes = changes
        self.sources = sources
        # Not the frame itself, which would keep all that it refers to. While the code holds the scope open the frame
        # lives, and its id is its own.
        self.frame_id, self.code, self.own_pauses = frame
        self.own_missing = missing
        self.lost = False  # left in another context than it was entered in, where it cannot be taken back
        self.doubtful = False  # whose calls it was entered for cannot be told
        self.put_on(outer)

    def put_on(self, outer: Entered | None) -> None:
        """Work out what is in force with these changes on top of `outer`."""
        self.outer = outer
        around: Scope
        if outer is None:
            around, self.pauses, self.mixed, self.missing = _NO_SCOPE, self.own_pauses, False, self.own_missing
        else:
            around = outer.scope
            self.pauses = self.own_pauses or outer.pauses
            self.missing = self.own_missing | outer.missing if outer.missing else self.own_missing
        told = self.changes.get
        self.scope: Scope = Scope(
            told("tenant", around.tenant), told("user", around.user), told("task", around.task),
            told("question", around.question), told("ttl_s", around.ttl_s), told("cache", around.cache),
            around.sources if self.sources is None else self.sources,
        )  # fmt: skip
        if outer is not None:
            self.mixed = outer.mixed or (self.pauses and _differ(self.scope, around))

    def names_all(self) -> bool:
        """Say whether nobody's identity comes from the outer scope."""
        return "tenant" in self.changes and ("user" in self.changes or self.scope.user is None)


scopes: ContextVar[Entered | None] = ContextVar("aegis_scope", default=None)
_numbers = itertools.count(1)
_named = 0


def current() -> Scope:
    """Return the scope that is in force here."""
    top = in_force()
    return _NO_SCOPE if top is None else top.scope


def tenants_named() -> int:
    """Return how often this process entered or bound a scope that names a tenant.

    Once it differs from what it was, somebody names tenants, and a call that names none may have lost its own.
    """
    return _named


def note_tenant() -> None:
    """Count one more in `tenants_named`."""
    global _named
    _named = next(_numbers)  # atomic; threads may write out of order, but never a number that was there before


def in_force() -> Entered | None:
    """Return the innermost scope that has not been left.

    Where a lost one is between it and here, that is told by a scope of its own that changes nothing and is marked lost.
    """
    entered = top = scopes.get()
    while entered is not None:
        if entered.lost:
            return _without_lost(top)
        entered = entered.outer
    return top


def _without_lost(top: Entered | None) -> Entered | None:
    missing: frozenset[str] = frozenset()
    while top is not None and top.lost:
        missing |= _identities(top)
        top = top.outer
    entered = top
    while entered is not None:
        if entered.outer is not None and entered.outer.lost:
            entered.own_missing |= _identities(entered.outer)
            take_out(entered.outer, top)
        else:
            entered = entered.outer
    if not missing:
        return top
    told = Entered({}, outer=top, missing=missing)
    told.lost = True
    return told


def _identities(entered: Entered) -> frozenset[str]:
    return entered.own_missing | ({"tenant", "user"} & entered.changes.keys())


def take_out(left: Entered, top: Entered | None) -> None:
    """Put what was entered over `left`, up to `top`, on what is below it."""
    over = []
    entered = top
    while entered is not None and entered is not left:
        over.append(entered)
        entered = entered.outer
    if entered is left:
        below = left.outer
        for one in reversed(over):
            one.put_on(below)
            below = one


def frame_of_caller(passing: Mapping[str, Any]) -> Frame:
    """Return id and code of the frame whose `with` enters a scope, and whether that frame can pause inside it.

    A generator that contextlib drives pauses too, but is left in turn: then it is the frame that uses it.

    Args:
        passing: Globals of the module whose own frames do not count.
    """
    frame = sys._getframe(2)
    while True:
        code, around = frame.f_code, frame.f_globals
        if around is not passing and around is not _CONTEXTLIB:
            pauses = bool(code.co_flags & _PAUSES)
            if not pauses or (back := frame.f_back) is None or back.f_globals is not _CONTEXTLIB:
                return id(frame), code, pauses
        elif (back := frame.f_back) is None:
            return NO_FRAME
        frame = back


_PAUSES = CO_GENERATOR | CO_ASYNC_GENERATOR
_CONTEXTLIB = vars(contextlib)


def _differ(one: Scope, other: Scope) -> bool:
    return (one.tenant != other.tenant and None not in (one.tenant, other.tenant)) or (
        one.user != other.user and None not in (one.user, other.user)
    )


def is_doubtful(top: Entered | None) -> bool:
    """Say whether `top` may be in force here only because a generator paused inside it, or inside one around it.

    A context does not follow generators: what one of them enters is in force for whoever runs next. So the code that
    holds `top` open must be what is being run.
    """
    if top is None or not top.mixed:
        return top is not None and top.doubtful
    if top.doubtful:
        return True
    holders: dict[int, Entered] = {}
    entered: Entered | None = top
    while entered is not None:
        holders.setdefault(entered.frame_id, entered)
        entered = entered.outer
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        holder = holders.get(id(frame))
        if holder is not None and holder.code is frame.f_code:
            return (holder.scope.tenant, holder.scope.user) != (top.scope.tenant, top.scope.user)
        frame = frame.f_back
    return True  # another task or thread: whose is not known


def kept(top: Entered, *, doubtful: bool) -> Entered:
    """Return what is in force as a scope of its own, which nothing that happens to the others concerns."""
    alone = Entered({}, missing=top.missing)
    alone.scope, alone.doubtful = top.scope, doubtful
    return alone
