"""The two-tier algorithm, once: exact, then by meaning.

A fault of Redis or of the embedder never leaves this module: it is a miss with a reason.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from langchain_aegis.breaker import Unavailable
from langchain_aegis.digests import Asked
from langchain_aegis.embedder import embedder_id
from langchain_aegis.entries import Record
from langchain_aegis.flows import Flow, Settle
from langchain_aegis.keys import Key
from langchain_aegis.steps import Aside, Embed, Verify, Wait, Work
from langchain_aegis.store import Epochs, Near, Store
from langchain_aegis.vectors import pack
from langchain_aegis.verification import Profile, compare, hardly_differ, nearness, profile
from langchain_aegis.writes import the_writer

_SERVED: Final = "s"  # begins the note that an entry was served for a text, and until when it can be
_UNHEARD: Final = frozenset({"verifier_slow", "verifier_failed"})
LONG: Final = 4_000  # characters of a prompt that is read in a thread
AGREES: Final = 0.5  # of a verifier: from here on one answer serves both questions


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What decides whether a near entry may answer.

    Attributes:
        semantic: Whether there may be an embedder to ask.
        embedder: Returns the embedder's name and the lowest cosine that is served; asked after the first vector.
        k: How many candidates are asked for.
        guards_off: Guards that are switched off.
        budget_s: Time for all that is asked of Redis.
        grey: Returns, for the lowest cosine that is served, the cosines between which the verifier must agree; None
            if there is no verifier.
        touch: Whether the time of a hit is noted, for the bound of entries per tenant.
        revalidate_ms: How long an answer is served when it is stale already, while one caller renews it.
        lease_ms: How long this process may generate alone while others wait for its answer; 0 if they need not.
        wait_s: How long another process's answer is waited for.
        repeats: Which texts are answered by meaning only the first time that they are asked: "ask" all, "serve" none,
            "auto" those that differ from the stored question in more than `hardly_differ` allows.
        judge_all: Judge every candidate, also after one may serve, and note nothing of it.
        embedded_by: Returns the model that makes the vectors, as far as it is known.
    """

    semantic: bool
    embedder: Callable[[], tuple[str, float]]
    k: int
    guards_off: frozenset[str]
    budget_s: float
    grey: Callable[[float], tuple[float, float]] | None = None
    touch: bool = False
    revalidate_ms: int = 0
    lease_ms: int = 0
    wait_s: float = 0.0
    repeats: str = "serve"
    judge_all: bool = False
    embedded_by: Callable[[], Asked] = Asked


@dataclass(slots=True)
class Candidate:
    """A stored question that is near the one asked.

    Attributes:
        key: Exact key of its entry.
        similarity: Cosine, in [-1, 1].
        reasons: Why it may not answer; empty for the one that was served.
        question: Its text, if questions are kept.
        created_ms: Unix time in milliseconds.
    """

    key: str
    similarity: float
    reasons: tuple[str, ...]
    question: str = ""
    created_ms: int = 0


@dataclass(slots=True)
class Lookup:
    """What one lookup found, and what its update needs to know.

    Attributes:
        key: Where the answer belongs.
        record: What is served, or None.
        tier: "exact", "semantic" or "miss".
        similarity: Of the served question; 1.0 for an exact hit; None for a miss.
        reasons: Why it missed, or why no other tier was asked: codes.
        candidates: What the semantic tier saw, nearest first.
        epochs: As they were when the lookup began; None if unknown, then nothing may be stored.
        vector: The question's vector as it is stored, or b"".
        embedder: Id of the embedder that made it, or "".
        late: A future of a vector that came too late for the lookup; the update may still use it.
        profile_key: Keys the words in the question's profile; None without a vector.
        min_similarity: The lowest cosine that is served with this embedder; 0.0 while it is not known.
        stale: An exact repeat's answer that is too old to be served.
        shadowed: An answer that would have been served, and is compared with the model's instead.
        fence: Number of the lease under which this process generates alone, or 0.
        lookup_id: Names this hit, for `cache.report_wrong`; "" for a miss.
        asked: The models that are asked.
        began_ms: When the lookup began, in unix milliseconds: no answer is younger than what was known then.
        started: The same by `time.perf_counter`.
        asked_s: How long the exact read took.
    """

    key: Key
    record: Record | None = None
    tier: str = "miss"
    similarity: float | None = None
    reasons: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    epochs: Epochs | None = None
    vector: bytes = b""
    embedder: str = ""
    late: Any = None
    profile_key: bytes | None = None
    min_similarity: float = 0.0
    stale: Record | None = None
    shadowed: Record | None = None
    fence: int = 0
    lookup_id: str = ""
    asked: Asked = field(default_factory=Asked)
    began_ms: int = 0
    started: float = field(default_factory=time.perf_counter)
    asked_s: float = 0.0
    _profile: Profile | None = None

    @property
    def profile(self) -> Profile | None:
        """The question's profile, or None if it has no vector; made when it is first asked for.

        Most lookups that miss compare nothing. Then it is made where the answer is stored, in the background.
        """
        if self._profile is None and self.profile_key is not None:
            self._profile = profile(self.key.question or "", key=self.profile_key)
        return self._profile

    @property
    def moment(self) -> str:
        """What a call must have in common with this one to share an answer that is being made; "" if unknown."""
        stamp = self.epochs.stamp if self.epochs is not None else ""
        return f"{stamp} {self.asked.digest}" if self.asked.digest else stamp

    def read(self) -> None:
        """Make the profile now."""
        _ = self.profile


@dataclass(slots=True)
class Begun:
    """A lookup for which Redis was asked for an exact repeat before its flow began.

    Attributes:
        found: The lookup.
        policy: What decides about it.
        request: What is sent, see `Store.request`.
        told: Whose call it is.
        meanwhile: What is done until the reply comes.
        replies: What came of it.
        took_s: How long that took.
    """

    found: Lookup
    policy: Policy
    request: bytes
    told: Any
    meanwhile: Callable[[], None] | None = None
    replies: Sequence[Any] | Unavailable = ()
    took_s: float = 0.0


def find(
    store: Store, key: Key, policy: Policy, now_ms: Callable[[], int], profile_key: bytes, *, serve: bool = True,
    begun: Begun | None = None, asked: Asked | None = None,
) -> Flow[Lookup]:  # fmt: skip
    """Decide which stored answer, if any, serves `key`.

    Args:
        store: Where to look.
        key: What is asked.
        policy: How near is near enough.
        now_ms: Returns the unix time in milliseconds.
        profile_key: Keys the words in the guards' profiles.
        serve: False: serve nothing, and see to it that no answer whose making has begun already is kept.
        begun: Redis was asked for an exact repeat already.
        asked: The models that are asked, if anything is known of them.
    """
    found = Lookup(key, began_ms=now_ms(), asked=asked or Asked()) if begun is None else begun.found
    try:
        if not serve:
            found.epochs = yield from store.refresh(key.exact, key.things)
            yield from resolved(key)
            if key.question is not None and policy.semantic:  # the new answer shall be found by meaning, too
                yield from embed(found, policy, profile_key)
            found.reasons = ("refresh",)
            return found
        until = time.monotonic() + policy.budget_s  # for all that is waited for
        if begun is None and not (yield from _written(until, key.exact)):
            raise Unavailable("redis_slow")  # which could not take it in that time, and would not be read from sooner
        yield from _exact(found, store, policy, now_ms(), begun)
        # An answer may have come while Redis was asked: whoever made it has left, so there is nobody to join.
        if found.record is None and not found.reasons and (yield from _arrived(until, key.exact)):
            yield from _exact(found, store, policy, now_ms(), None)
        if found.record is None:
            yield from resolved(key)
            yield from _written(until, key.scope, store.prefix)
        if found.record is not None or found.reasons:
            if found.fence and key.question is not None and policy.semantic:  # as for a refresh
                told = found.reasons
                yield from embed(found, policy, profile_key)
                found.reasons = told
            return found
        yield from _by_meaning(found, store, policy, now_ms(), profile_key)
        if found.record is None and policy.lease_ms and found.epochs is not None:
            yield from _alone(found, store, policy, now_ms)
    except Unavailable as exc:
        found.record, found.tier, found.similarity, found.reasons = None, "miss", None, (exc.reason,)
        if exc.reason == "unreadable":  # too large to be an answer of ours: nobody shall have to wait for it again
            yield Aside(partial(store.forget, key.exact))
    return found


def _written(until: float, *names: str) -> Flow[bool]:
    """Wait until nothing of exact keys or scopes is on its way to Redis, or it is late; return whether all is there."""
    for name in names:
        if (done := the_writer.pending(name)) is not None:
            yield Settle(done, max(0.0, until - time.monotonic()))
            if not done.done():
                return False
    return True


def _arrived(until: float, exact: str) -> Flow[bool]:
    """Return whether an answer to a key was on its way to Redis and is there now."""
    return the_writer.pending(exact) is not None and (yield from _written(until, exact))


def resolved(key: Key) -> Flow[None]:
    """See to it that the question is known: in a long prompt, finding it takes milliseconds."""
    if key.length > LONG:
        yield Work(key.resolve)
    else:
        key.resolve()


def _exact(found: Lookup, store: Store, policy: Policy, now_ms: int, begun: Begun | None) -> Flow[None]:
    """Serve an exact repeat; a reason is noted only where nothing further is to be asked."""
    key = found.key
    asked = time.perf_counter()
    record, found.epochs = yield from store.read(
        key.exact, key.things, tenant=key.tenant, user=key.user, touch_ms=now_ms if policy.touch else 0,
        first=None if begun is None else begun.replies,
    )  # fmt: skip
    found.asked_s = time.perf_counter() - asked if begun is None else begun.took_s
    if record is not None and record.digest:
        yield from found.asked.ascertain()
    if found.epochs is not None and found.epochs.opted_out:
        found.epochs, found.reasons = None, ("opted_out",)  # nothing is kept of this user
    elif record is None or serve_exact(found, record, now_ms) or not _current(found, record, now_ms):
        return
    else:
        found.stale = record
        if now_ms < record.fresh_ms + policy.revalidate_ms:
            found.fence = yield from store.lease(key.exact, policy.lease_ms or 60_000)
            if found.fence:
                found.reasons = ("stale_revalidate",)
            else:
                found.record, found.tier, found.similarity = record, "exact", 1.0


def serve_exact(found: Lookup, record: Record, now_ms: int) -> bool:
    """Serve a living record of an exact repeat if it is neither too old nor another model's; return whether it was."""
    if not _current(found, record, now_ms) or not _fresh(record, now_ms):
        return False
    found.record, found.tier, found.similarity = record, "exact", 1.0
    return True


def _by_meaning(found: Lookup, store: Store, policy: Policy, now_ms: int, profile_key: bytes) -> Flow[None]:
    key = found.key
    if key.question is None or not policy.semantic:
        found.reasons = (key.exact_only or "no_embedder",)
        return
    yield from embed(found, policy, profile_key)
    if not found.vector or found.epochs is None:
        found.reasons = found.reasons or ("redis_down",)
    elif found.asked_s > policy.budget_s / 2:
        found.reasons = ("redis_slow",)  # a second question to a slow Redis would exceed the budget
    else:
        nearest = yield from store.nearest(
            key.scope, found.embedder, found.vector, policy.k, found.epochs, max(1, int(policy.budget_s * 500)),
            asking=key.exact, lowest=-2.0 if policy.judge_all else _lowest(found, policy), meanwhile=found.read,
        )  # fmt: skip
        if policy.repeats != "serve" and any(_served_before(note, now_ms) for note in nearest.notes.values()):
            found.reasons = ("asked_again",)
            return
        if any(near.record.digest for near in nearest.near):
            yield from found.asked.ascertain()
        yield from judge(found, nearest.near, nearest.notes, store, policy, now_ms)
        if found.record is None and nearest.far:
            found.candidates += tuple(Candidate(name, cosine, ("below_threshold",)) for name, cosine in nearest.far)
            found.reasons = found.candidates[0].reasons
        if (served := found.record) is not None and not policy.judge_all:
            if _is_doubtful(found, next(near for near in nearest if near.record is served), policy):
                note = f"{_SERVED}{served.expires_ms}"
                store.noted(key.exact, served.key, note)
                yield Aside(partial(store.note, key.exact, served.key, note))
            if policy.touch:
                yield Aside(partial(store.touch, served.key, key.tenant, now_ms))


def _is_doubtful(found: Lookup, served: Near, policy: Policy) -> bool:
    """Return whether the text shall not be answered by meaning a second time: a wrong hit is then not repeated."""
    if policy.repeats != "auto" or found.profile is None:
        return policy.repeats == "ask"
    if policy.grey is not None and (found.similarity or 0.0) < policy.grey(found.min_similarity)[1]:
        return False  # the verifier has agreed
    return served.profile is None or not hardly_differ(served.profile, found.profile)


def _served_before(note: str, now_ms: int) -> bool:
    """Return whether a note says that this text was answered by meaning, with an entry that has not expired yet."""
    return note.startswith(_SERVED) and note[1:].isdigit() and now_ms < int(note[1:])


def _alone(found: Lookup, store: Store, policy: Policy, now_ms: Callable[[], int]) -> Flow[None]:
    """Let one process generate, and wait for its answer, but not for ever."""
    key, until, pause_s = found.key, time.monotonic() + policy.wait_s, 0.01
    waited = False
    while True:
        fence = yield from store.lease(key.exact, policy.lease_ms)
        if waited:  # what was learnt before the wait may be outdated, and the other's answer may be there
            found.began_ms = began_ms = now_ms()
            record, found.epochs = yield from store.read(key.exact, key.things, tenant=key.tenant, user=key.user)
            yield from found.asked.ascertain()
            if record is not None and _current(found, record, began_ms) and _fresh(record, began_ms):
                found.record, found.tier, found.similarity, found.reasons = record, "exact", 1.0, ()
                if fence:
                    yield from store.release(key.exact, fence)
                return
        if fence:
            found.fence = fence
            return
        if time.monotonic() >= until:
            found.reasons = ("lease_wait",)
            return
        yield Wait(pause_s)
        waited, pause_s = True, min(0.25, pause_s * 1.5)


def embed(found: Lookup, policy: Policy, profile_key: bytes) -> Flow[None]:
    """Fill in the question's vector, and what its profile is made with."""
    assert found.key.question is not None  # noqa: S101  # the caller has looked
    before = policy.embedded_by().digest
    try:
        vector = pack((yield Embed(found.key.question)))
    except Unavailable as exc:
        found.reasons, found.late = (exc.reason,), exc.late
        return
    asked = policy.embedded_by()
    yield from asked.ascertain()
    if before not in ("", asked.digest):  # pulled anew: which of the two has made this vector?
        found.reasons = ("model_changed",)
        return
    take_vector(found, vector, policy, profile_key)


def take_vector(found: Lookup, vector: bytes | None, policy: Policy, profile_key: bytes) -> None:
    """Note a vector, and what the profile that is stored with it is made with."""
    if vector is None:
        found.reasons = ("bad_vector",)
        return
    name, found.min_similarity = policy.embedder()
    found.vector = vector
    digest = policy.embedded_by().digest  # vectors of two versions are never compared
    found.embedder = embedder_id(f"{name}@{digest}" if digest else name, len(vector) // 2)
    found.profile_key = profile_key


def judge(
    found: Lookup, nearest: Sequence[Near], notes: Mapping[str, str], store: Store, policy: Policy, now_ms: int
) -> Flow[None]:
    """Serve the most similar candidate that every check accepts."""
    candidates: list[Candidate] = []
    lowest = _lowest(found, policy)
    unheard: tuple[str, ...] = ()  # why there was no second opinion: a lookup waits for that only once
    for near in nearest:
        noted = notes.get(near.record.key, "")
        reasons = _objections(near, found, now_ms, policy, lowest, noted)
        if not reasons and policy.grey is not None and near.similarity < policy.grey(found.min_similarity)[1]:
            reasons = unheard or (yield from _second_opinion(near, found, noted, store, keep=not policy.judge_all))
            unheard = reasons if reasons and reasons[0] in _UNHEARD else ()
        record = near.record
        candidates.append(Candidate(record.key, near.similarity, reasons, record.question, record.created_ms))
        if not reasons and found.record is None:
            found.record, found.tier, found.similarity = record, "semantic", near.similarity
            if not policy.judge_all:
                break
    found.candidates = tuple(candidates)
    if found.record is None:
        found.reasons = candidates[0].reasons if candidates else ("no_candidate",)


def _lowest(found: Lookup, policy: Policy) -> float:
    """Return the cosine below which no candidate is looked at."""
    return policy.grey(found.min_similarity)[0] if policy.grey is not None else found.min_similarity


def _objections(near: Near, found: Lookup, now_ms: int, policy: Policy, lowest: float, noted: str) -> tuple[str, ...]:
    # Written so that a similarity that is no number is refused.
    if not near.similarity >= lowest:
        return ("below_threshold",)
    if not same_model(found, near.record):
        return ("model_changed",)
    if not _current(found, near.record, now_ms):
        return ("expired",)
    if not _fresh(near.record, now_ms):
        return ("stale",)
    if noted == "x":
        return ("reported",)
    assert found.profile is not None  # noqa: S101  # set before any candidate is asked for
    if (cached := near.profile) is None:
        return ("no_profile",)
    room = nearness(near.similarity, found.min_similarity)
    return guard_codes(compare(cached, found.profile, off=policy.guards_off, near=room))


def _second_opinion(near: Near, found: Lookup, noted: str, store: Store, *, keep: bool) -> Flow[tuple[str, ...]]:
    """Return why the verifier is against this candidate; what it said about the pair before still holds.

    Args:
        near: The candidate.
        found: The lookup.
        noted: What is noted of the pair, or "".
        store: Where what the verifier says is noted.
        keep: Whether it is.
    """
    try:
        score = float(noted)
    except ValueError:
        if not near.record.question:
            return ("verifier_no_text",)
        try:
            score = yield Verify(near.record.question, found.key.question or "")
        except Unavailable as exc:
            return (exc.reason,)
        if keep:
            with contextlib.suppress(Unavailable):
                yield from store.note(found.key.exact, near.record.key, f"{score:.3f}")
    return () if score >= AGREES else ("verifier",)


def guard_codes(guards: Sequence[str]) -> tuple[str, ...]:
    """Return violated guards as reason codes."""
    return tuple(f"guard:{name}" for name in guards)


def _fresh(record: Record, now_ms: int) -> bool:
    return not record.fresh_ms or now_ms < record.fresh_ms


def _current(found: Lookup, record: Record, now_ms: int) -> bool:
    if not record.created_ms - 60_000 <= now_ms < record.expires_ms:
        return False
    return same_model(found, record)


def same_model(found: Lookup, record: Record) -> bool:
    """Return whether a record's answer is of the model that is asked; where nobody has said, it is taken for that."""
    return not record.digest or not found.asked.digest or record.digest == found.asked.digest
