"""What was asked, made, served and invalidated in a soak, and what of it was wrong.

Every answer names who it was made for, which question it answers, which model made it, and a number that grows: what
was made before an invalidation began has a lower one than what is made after it.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import traceback
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from faults.tenants import Caller

SHOWN = 25  # events before a violation
RECENT_S = 10.0
KEPT = 40  # violations that are told in full
_FILL = 97  # characters of an answer beside what it names, at most: what is cut shows


@dataclass(frozen=True, slots=True)
class Call:
    """A call that is under way.

    Attributes:
        number: Of the call.
        target: The model or pipeline that is asked, as its answers name it.
        cache: Name of the cache in front of it.
        caller: Who asks.
        about: The question, the same for questions that one answer serves.
        began_s: Monotonic seconds.
        made: Number of the answer that was made last before.
        floor: Answers with this number, or a lower one, were invalidated before the call began.
    """

    number: int
    target: str
    cache: str
    caller: Caller
    about: str
    began_s: float
    made: int
    floor: int


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must not happen, with what happened before it."""

    kind: str
    text: str
    before: tuple[str, ...]


@dataclass(slots=True)
class Window:
    """The time of a fault.

    Attributes:
        name: Of the fault.
        where: "redis", "embedder", "ollama" or "callers".
        began_s: Monotonic seconds.
        ended_s: None while it lasts.
        may_raise: The errors that it may cost a caller, by the target's name.
    """

    name: str
    where: str
    began_s: float
    ended_s: float | None = None
    may_raise: dict[str, tuple[type[BaseException], ...]] = field(default_factory=dict)


class History:
    """Everything that happened. May be used from any thread; its size has a bound but for the times that it keeps.

    Args:
        source_of: Returns the document that the answer to a question rests on.
    """

    def __init__(self, source_of=lambda about: "") -> None:
        self._source_of = source_of
        self._lock = threading.Lock()
        self._began_s = time.monotonic()
        self._events: deque[tuple] = deque(maxlen=2_000)
        self._floors: dict[tuple[str, ...], int] = {}
        self._windows: deque[Window] = deque(maxlen=50)
        self.version = 0
        self.calls = 0
        self.hits: Counter[str] = Counter()  # by tier
        self.errors: Counter[str] = Counter()  # those that were allowed, by type
        self.invalidations = self.refused = 0
        self.cancelled = 0
        self.faults: Counter[str] = Counter()
        self.took: dict[tuple[str, str], array] = {}  # seconds, by fault and by what was measured
        self.violations: list[Violation] = []
        self.wrong: Counter[str] = Counter()  # violations by kind, those that are not told too

    # -- what happens ---------------------------------------------------------------------------------------------

    def text_of_answer(self, caller: Caller, about: str, target: str) -> str:
        """Return an answer; to be called when it is made."""
        with self._lock:
            self.version += 1
            version = self.version
            self._note("made", target, caller, about, version)
        fill = "x" * (version * 31 % _FILL)
        return json.dumps([target, caller.tenant, caller.user, caller.task, about, version, len(fill), fill, "end"])

    def begin(self, target: str, cache: str, caller: Caller, about: str) -> Call:
        """Note that a call begins."""
        with self._lock:
            self.calls += 1
            concerned = (
                ("all",), ("tenant", caller.tenant), ("user", caller.user or ""), ("task", caller.task or ""),
                ("source", self._source_of(about)),
            )  # fmt: skip
            floor = max(self._floors.get((cache, *name), 0) for name in concerned)
            call = Call(self.calls, target, cache, caller, about, time.monotonic(), self.version, floor)
            self._note("asks", target, caller, about, call.number)
            return call

    def answered(self, call: Call, text: str, tier: str | None) -> None:
        """Note what a call got; `tier`: of the cache that answered, or None."""
        with self._lock:
            self._note("gets", call.target, call.caller, tier or "new", call.number)
            if tier is not None:
                self.hits[tier] += 1
            if (wrong := _wrong(call, text)) is not None:
                self._violation(wrong, f"{call} was answered {text[:300]!r}, from {tier or 'the model'}")

    def failed(self, call: Call, error: BaseException) -> None:
        """Note that a call raised: that is allowed only if what can cost a caller that error was the matter."""
        now_s = time.monotonic()
        with self._lock:
            self._note("fails", call.target, call.caller, repr(error)[:80], call.number)
            if any(
                isinstance(error, window.may_raise.get(call.target, ()))
                for window in self._windows
                if window.ended_s is None or window.ended_s >= call.began_s
            ):
                self.errors[type(error).__name__] += 1
                return
            told = "".join(traceback.format_exception(error)[-12:])
            self._violation("an error", f"{call} raised after {now_s - call.began_s:.3f} s\n{told}")

    def left(self, call: Call) -> None:
        """Note that a caller was cancelled."""
        with self._lock:
            self.cancelled += 1
            self._note("leaves", call.target, call.caller, "", call.number)

    def invalidating(self) -> int:
        """Return what `invalidated` is to be told; to be called before an invalidation."""
        with self._lock:
            return self.version

    def invalidated(self, cache: str, kind: str, name: str, began: int) -> None:
        """Note that an invalidation has returned: `("all", "")`, or a tenant, user, task or source by name."""
        with self._lock:
            self.invalidations += 1
            key = (cache, "all") if kind == "all" else (cache, kind, name)
            self._floors[key] = max(self._floors.get(key, 0), began)
            self._note("gone", cache, f"{kind} {name}", "up to", began)

    def not_invalidated(self, cache: str, kind: str, error: BaseException, began_s: float, *, last: bool) -> None:
        """Note that an invalidation raised; `last`: so often since `began_s` that Redis must have been the matter."""
        with self._lock:
            self.refused += 1
            self._note("not gone", cache, kind, repr(error)[:80], "")
            if last and not any(
                w.where == "redis" and (w.ended_s is None or w.ended_s >= began_s) for w in self._windows
            ):
                self._violation("an error", f"invalidating by {kind} raised {error!r} again and again")

    @contextlib.contextmanager
    def during(self, window: Window) -> Iterator[Window]:
        """Note that something is the matter for the time of a block."""
        with self._lock:
            self._windows.append(window)
            self.faults[window.name] += 1
            self._note("FAULT", window.name, "", "begins", "")
        try:
            yield window
        finally:
            with self._lock:
                window.ended_s = time.monotonic()
                self._note("FAULT", window.name, "", "ends", "")

    def measured(self, what: str, seconds: float, began_s: float) -> None:
        """Note how long a call of a known kind took, by the fault that was the matter meanwhile."""
        with self._lock:
            last = self._windows[-1] if self._windows else None
            matter = last is not None and (last.ended_s is None or last.ended_s >= began_s)
            self.took.setdefault((last.name if matter else "", what), array("d")).append(seconds)

    def violation(self, kind: str, text: str) -> None:
        """Note something that must not happen."""
        with self._lock:
            self._violation(kind, text)

    # -- what came of it ------------------------------------------------------------------------------------------

    def quantile(self, share: float, what: str, faults: Sequence[str] | None = None) -> float | None:
        """Return the time that this share of what was measured took at most, during some faults or ever."""
        with self._lock:
            found = sorted(
                seconds
                for (fault, name), each in self.took.items()
                if name == what and (faults is None or fault in faults)
                for seconds in each
            )
        return found[min(len(found) - 1, int(share * len(found)))] if found else None

    def count(self, what: str, faults: Sequence[str]) -> int:
        """Return how often something was measured during some faults."""
        with self._lock:
            return sum(len(each) for (fault, name), each in self.took.items() if name == what and fault in faults)

    # -- parts; the lock is held -----------------------------------------------------------------------------------

    def _note(self, *event: object) -> None:
        self._events.append((time.monotonic() - self._began_s, *event))

    def _violation(self, kind: str, text: str) -> None:
        self.wrong[kind] += 1
        now_s = time.monotonic()
        matter = [w.name for w in self._windows if w.ended_s is None or w.ended_s > now_s - RECENT_S]
        text = f"{text}\nlately the matter: {', '.join(matter) or 'nothing'}"
        if len(self.violations) < KEPT:
            before = islice(self._events, max(0, len(self._events) - SHOWN), None)
            self.violations.append(Violation(kind, text, tuple(f"{e[0]:9.3f} s  {_plain(e[1:])}" for e in before)))


def _plain(event: Sequence[object]) -> str:
    parts = ("/".join(map(repr, (p.tenant, p.user, p.task))) if isinstance(p, Caller) else str(p) for p in event)
    return ascii("  ".join(parts))[1:-1]


def _wrong(call: Call, text: str) -> str | None:
    """Return what is wrong with an answer, or None."""
    try:
        target, tenant, user, task, about, version, size, fill, end = json.loads(text)
    except (ValueError, TypeError):
        return "a truncated answer"
    if len(fill) != size or end != "end":
        return "a truncated answer"
    for kind, right in (
        ("an answer of another tenant", tenant == call.caller.tenant),
        ("an answer of another user", user == call.caller.user),
        ("an answer of another task", task == call.caller.task),
        ("an answer of another model", target == call.target),
        ("an answer to another question", about == call.about),
        ("an answer that was invalidated", version > call.floor),
    ):
        if not right:
            return kind
    return None
