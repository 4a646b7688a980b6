"""Notices that nothing can ever hit by meaning, because something in every prompt is new.

Only questions of the same scope are compared. A timestamp in the system prompt gives each call a scope of its own, and
the semantic tier then misses for ever without an error. The short digests of a scope's fields tell which one it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from langchain_aegis.forks import reset_after_fork
from langchain_aegis.notices import warn_once

LEAST_LOOKUPS: Final = 200  # before that, nothing is said
SEEN_ONCE: Final = 0.95
_SAMPLES = 256  # scopes whose fields are kept
_FIRST, _EVERY = 16, 8  # the first scopes are sampled, then every eighth: one prompt of a warm-up proves nothing
_NEARLY_ALL = 0.9  # a field with so many of the most distinct one's values differs as much as that one

# Field of a scope -> what the user can do about it.
REMEDIES: Final[Mapping[str, str]] = {
    "tenant": "each call names another tenant: a tenant must stay the same from call to call",
    "user": "each call is another user's: share_within_tenant=True lets users of a tenant share answers, where answers "
    "do not depend on who asks",
    "task": "each call names another task: a task is a kind of work, such as chat or classify",
    "model": "each call names another model",
    "options": "the model's options differ from call to call: take out what varies, such as a seed",
    "tools": "the tools differ from call to call: keep their order and descriptions the same",
    "format": "the output format differs from call to call",
    "stop": "the stop words differ from call to call",
    "system": "the system prompt differs from call to call, as with a timestamp, a request id or the user's name: cut "
    "it out with scope_ignore=[pattern], or take it out of the prompt",
    "history": "the conversation before the question differs: make a follow-up a question of its own, and ask that "
    "with get_or_generate",
    "before": "the text before the question differs: if it holds retrieved documents, ask before retrieval with "
    "get_or_generate, or say with chunks= how they are separated; if it holds a timestamp, cut that out with "
    "scope_ignore=[pattern]",
    "after": "the text after the question differs: if it holds retrieved documents, ask before retrieval with "
    "get_or_generate, or say with chunks= how they are separated; if it holds a timestamp, cut that out with "
    "scope_ignore=[pattern]",
    "chunks": "other documents are retrieved for each call: ask before retrieval with get_or_generate",
    "pipeline": "each call names another pipeline: its name must stay the same",
    "version": "each call names another version: it must change only with the pipeline, its prompts or its data",
}


@dataclass(frozen=True, slots=True)
class ScopesSummary:
    """How often scopes come again.

    Attributes:
        lookups: Lookups by meaning that this is about.
        scopes: Different scopes among them.
        once: Share of the scopes that were seen once, in [0, 1].
        fields: Fields that make the scopes differ, most important first; empty if scopes come again or that is not
            known.
    """

    lookups: int
    scopes: int
    once: float
    fields: tuple[str, ...] = ()

    @property
    def remedies(self) -> tuple[str, ...]:
        """What can be done about each of `fields`."""
        return tuple(REMEDIES.get(field, f"{field} differs from call to call") for field in self.fields)


class ScopesSeen:
    """Counts scopes, and warns once if hardly any comes again.

    Args:
        limit: So many different scopes are remembered, then it begins anew.
    """

    def __init__(self, limit: int = 2_000) -> None:
        self._limit = limit
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Forget everything."""
        self._lock = threading.Lock()
        self._last: ScopesSummary | None = None
        self._warned = False
        self._begin()

    def saw(self, scope: str, fields: Callable[[], Mapping[str, str]]) -> None:
        """Count one lookup by meaning.

        Args:
            scope: Its scope.
            fields: Returns a short digest for each field of the scope; called for some of the lookups only.
        """
        with self._lock:
            self._lookups += 1
            times = self._times.get(scope, 0) + 1
            self._times[scope] = times
            if times == 1:
                self._once += 1
                new = len(self._times)
                sampled = (new <= _FIRST or new % _EVERY == 0) and len(self._samples) < _SAMPLES
            else:
                self._once -= times == 2
                sampled = False
            due = self._lookups >= LEAST_LOOKUPS and self._lookups % _EVERY == 0 and not self._warned
            full = len(self._times) >= self._limit
        if sampled:
            told = dict(fields())  # outside the lock: it makes digests
            with self._lock:
                self._samples.append(told)
        if due or full:
            self._look(full=full)

    def noticed(self) -> str:
        """Return in a sentence what was noticed about the scopes of this process's calls, or ""."""
        summary = self.summary()
        if summary is None or not summary.remedies:
            return ""
        return f"{summary.once:.0%} of {summary.scopes} scopes were seen once: {'; '.join(summary.remedies)}"

    def summary(self) -> ScopesSummary | None:
        """Return how often scopes come again, or None while too little was seen to tell."""
        with self._lock:
            return self._summary() if self._lookups >= LEAST_LOOKUPS else self._last

    def _look(self, *, full: bool) -> None:
        with self._lock:
            if self._lookups < LEAST_LOOKUPS:
                return
            found = self._summary()
            tell = not self._warned and found.once > SEEN_ONCE
            self._warned = self._warned or tell
            if full and len(self._times) >= self._limit:
                self._last = found
                self._begin()
        if tell:
            names = ", ".join(found.fields) or "not known"
            warn_once(
                "scopes_seen_once",
                f"{found.once:.0%} of {found.scopes} scopes were seen once in {found.lookups} lookups, so hardly any "
                f"answer can be found by meaning. What differs ({names}): {'; '.join(found.remedies)}",
            )

    def _begin(self) -> None:
        self._times: dict[str, int] = {}
        self._once = 0
        self._lookups = 0
        self._samples: list[dict[str, str]] = []

    def _summary(self) -> ScopesSummary:
        once = self._once / len(self._times) if self._times else 0.0
        fields = differing(self._samples) if once > SEEN_ONCE else ()
        return ScopesSummary(self._lookups, len(self._times), once, fields)


def differing(samples: list[dict[str, str]]) -> tuple[str, ...]:
    """Return the fields that differ most between scopes: those with nearly as many values as the most various one."""
    values: dict[str, set[str]] = {}
    for sample in samples:
        for name, digest in sample.items():
            values.setdefault(name, set()).add(digest)
    # A field that only some scopes have differs from its absence too.
    various = {name: len(found) + any(name not in sample for sample in samples) for name, found in values.items()}
    most = max(various.values(), default=0)
    if most < 2:
        return ()
    ranked = sorted(various.items(), key=lambda item: -item[1])
    return tuple(name for name, number in ranked if number >= max(2.0, _NEARLY_ALL * most))
