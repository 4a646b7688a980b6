"""The two-tier algorithm, once: exact, then by meaning.

A fault of Redis or of the embedder never leaves this module: it is a miss with a reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_aegis.breaker import Unavailable
from langchain_aegis.embedder import embedder_id
from langchain_aegis.entries import Record
from langchain_aegis.flows import Flow
from langchain_aegis.keys import Key
from langchain_aegis.store import Epochs, Near, Store
from langchain_aegis.vectors import pack
from langchain_aegis.verification import Profile, compare, profile


@dataclass(frozen=True, slots=True)
class Embed:
    """Ask the embedder for one text's vector; answered by a sequence of numbers."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What decides whether a near entry may answer.

    Attributes:
        semantic: Whether there may be an embedder to ask.
        embedder: Returns the embedder's name and the lowest cosine that is served; asked after the first vector.
        k: How many candidates are asked for.
        guards_off: Guards that are switched off.
        budget_s: Time for all that is asked of Redis.
        model_digest: The model's digest if it is known, else "".
    """

    semantic: bool
    embedder: Callable[[], tuple[str, float]]
    k: int
    guards_off: frozenset[str]
    budget_s: float
    model_digest: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A stored question that is near the one asked.

    Attributes:
        key: Exact key of its entry.
        similarity: Cosine, in [-1, 1].
        reasons: Why it may not answer; empty for the one that was served.
        question: Its text, if questions are kept.
    """

    key: str
    similarity: float
    reasons: tuple[str, ...]
    question: str = ""


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
        profile: The question's profile, or None.
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
    profile: Profile | None = None
    started: float = field(default_factory=time.perf_counter)


def find(
    store: Store, key: Key, policy: Policy, now_ms: int, profile_key: bytes, *, serve: bool = True
) -> Flow[Lookup]:
    """Decide which stored answer, if any, serves `key`.

    Args:
        store: Where to look.
        key: What is asked.
        policy: How near is near enough.
        now_ms: Unix time in milliseconds.
        profile_key: Keys the words in the guards' profiles.
        serve: False: only learn the epochs, for a refresh.
    """
    found = Lookup(key)
    asked = time.perf_counter()
    try:
        record, found.epochs = yield from store.read(key.exact, key.things)
    except Unavailable as exc:
        found.reasons = (exc.reason,)
        return found
    spent_s = time.perf_counter() - asked
    if not serve:
        found.reasons = ("refresh",)
        return found
    if record is not None and _current(record, now_ms, policy):
        found.record, found.tier, found.similarity = record, "exact", 1.0
        return found
    if key.question is None or not policy.semantic:
        found.reasons = (key.exact_only or "no_embedder",)
        return found
    min_similarity = yield from embed(found, policy, profile_key)
    if not found.vector or found.epochs is None:
        found.reasons = found.reasons or ("redis_down",)
        return found
    if spent_s > policy.budget_s / 2:
        found.reasons = ("redis_slow",)  # a second question to a slow Redis would exceed the budget
        return found
    try:
        nearest = yield from store.nearest(
            key.scope, found.embedder, found.vector, policy.k, found.epochs, max(1, int(policy.budget_s * 500))
        )
    except Unavailable as exc:
        found.reasons = (exc.reason,)
        return found
    _judge(found, nearest, now_ms, policy, min_similarity)
    return found


def embed(found: Lookup, policy: Policy, profile_key: bytes) -> Flow[float]:
    """Fill in the question's vector and profile; returns the lowest cosine that is served with this embedder."""
    assert found.key.question is not None  # noqa: S101  # the caller has looked
    try:
        vector = pack((yield Embed(found.key.question)))
    except Unavailable as exc:
        found.reasons, found.late = (exc.reason,), exc.late
        return 2.0
    return take_vector(found, vector, policy, profile_key)


def take_vector(found: Lookup, vector: bytes | None, policy: Policy, profile_key: bytes) -> float:
    """Note a vector, and the profile that is stored with it; returns the lowest cosine that is served."""
    if vector is None:
        found.reasons = ("bad_vector",)
        return 2.0
    name, min_similarity = policy.embedder()
    found.vector = vector
    found.embedder = embedder_id(name, len(vector) // 2)
    found.profile = profile(found.key.question or "", key=profile_key)
    return min_similarity


def _judge(found: Lookup, nearest: Sequence[Near], now_ms: int, policy: Policy, min_similarity: float) -> None:
    """Serve the most similar candidate that every check accepts."""
    candidates: list[Candidate] = []
    for near in nearest:
        reasons = _objections(near, found, now_ms, policy, min_similarity)
        candidates.append(Candidate(near.record.key, near.similarity, reasons, near.record.question))
        if not reasons:
            found.record, found.tier, found.similarity = near.record, "semantic", near.similarity
            break
    found.candidates = tuple(candidates)
    if found.record is None:
        found.reasons = candidates[0].reasons if candidates else ("no_candidate",)


def _objections(near: Near, found: Lookup, now_ms: int, policy: Policy, min_similarity: float) -> tuple[str, ...]:
    # Written so that a similarity that is no number is refused.
    if not near.similarity >= min_similarity:
        return ("below_threshold",)
    if not _current(near.record, now_ms, policy):
        return ("expired",)
    assert found.profile is not None  # noqa: S101  # set before any candidate is asked for
    try:
        cached = Profile.decode(near.record.profile)
    except ValueError:
        return ("no_profile",)
    return guard_codes(compare(cached, found.profile, off=policy.guards_off))


def guard_codes(guards: Sequence[str]) -> tuple[str, ...]:
    """Return violated guards as reason codes."""
    return tuple(f"guard:{name}" for name in guards)


def _current(record: Record, now_ms: int, policy: Policy) -> bool:
    if not record.created_ms - 60_000 <= now_ms < record.expires_ms:
        return False
    return not (record.digest and policy.model_digest and record.digest != policy.model_digest)
