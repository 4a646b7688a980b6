"""What the cache tells its users about answers, and what they tell it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage

from langchain_aegis.counts import Counted


@dataclass(frozen=True, slots=True)
class Answer:
    """A pipeline's answer together with the documents that it rests on.

    Attributes:
        value: What the caller gets: a text, messages, or plain JSON.
        sources: Ids of documents; `cache.invalidate(sources=...)` removes the answer with any of them.
        negative: Nothing was found. Such an answer is kept for the cache's `negative_ttl_s` only.
    """

    value: Any
    sources: Collection[str] = ()
    negative: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the answer to one question may be served for another.

    Attributes:
        served: Whether it would be.
        similarity: Cosine of the two questions.
        reasons: Codes of what speaks against it.
    """

    served: bool
    similarity: float
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explained:
    """A stored question that is near the one asked, and what speaks against serving its answer.

    Attributes:
        key: Exact key of its entry.
        similarity: Cosine, in [-1, 1].
        reasons: Codes of what speaks against it; empty if its answer may be served.
        differing: Fields of the scope in which its call differed; None if there is no scope to compare with.
        age_s: How old its answer is, in seconds.
        question: Its text, if questions are kept.
    """

    key: str
    similarity: float
    reasons: tuple[str, ...]
    differing: tuple[str, ...] | None
    age_s: float
    question: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the cache would do with a call, and why.

    Attributes:
        decision: "exact", "semantic", "miss", or "bypass".
        reasons: Codes of why it is no hit, and why only the exact tier was asked; empty for a hit.
        question: The text that is matched by meaning, or None.
        min_similarity: Lowest cosine that is served; None if no embedder was asked.
        embedder: Name of the embedder, or None.
        candidates: Near questions of this scope, nearest first, then those of other scopes.
        meanings: For each reason: what it means and what can be done.
        scopes: What was noticed about the scopes of this process's calls, or "".
    """

    decision: str
    reasons: tuple[str, ...]
    question: str | None
    min_similarity: float | None
    embedder: str | None
    candidates: tuple[Explained, ...]
    meanings: Mapping[str, str]
    scopes: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored answer, without its text.

    Attributes:
        key: Exact key.
        by_meaning: Whether paraphrases may be served it.
        task: Name of the task, or "".
        age_s: How old it is, in seconds.
        ttl_s: For how long it is served yet, in seconds.
        bytes: Size of the answer.
        sources: How many documents it rests on.
        question: Its text, if questions are kept.
    """

    key: str
    by_meaning: bool
    task: str
    age_s: float
    ttl_s: float
    bytes: int
    sources: int
    question: str = ""


@dataclass(frozen=True, slots=True)
class LocalStats:
    """What a cache's local tier holds and has done in this process.

    Attributes:
        hits: Reads that it answered.
        entries: Reads that it could answer.
        bytes: What they take up.
        invalidated: Entries that something took away: a change of them, an invalidation, a connection that was lost.
        evicted: Entries that went because others needed the room.
        alive: Whether it may answer now.
    """

    hits: int
    entries: int
    bytes: int
    invalidated: int
    evicted: int
    alive: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheStats(Counted):
    """What a cache has done in this process.

    Attributes:
        rejected: Records that were damaged, forged, or of somebody else.
        scopes: What was noticed about the scopes of this process's calls, or "".
        local: What the local tier holds and has done; None if there is none. Its hits are among the exact ones.
    """

    rejected: int
    scopes: str = ""
    local: LocalStats | None = None

    @property
    def hit_rate(self) -> float:
        """Share of lookups that were answered, in [0, 1]."""
        hits = self.exact_hits + self.semantic_hits + self.stale_hits
        return hits / (hits + self.misses) if hits + self.misses else 0.0


@dataclass(frozen=True, slots=True)
class CacheHealth:
    """What a namespace holds, and whether it can be reached, at one moment.

    Attributes:
        redis: Whether Redis answers.
        search: Whether it has search; None if that is not known.
        entries: Answers that can be served now, of all processes.
        tenants: Groups of entries: one per tenant, and one for calls without a tenant.
        embedder: Name of the embedder, or None while none was needed or found.
    """

    redis: bool
    search: bool | None
    entries: int
    tenants: int
    embedder: str | None


def was_cached(message: BaseMessage) -> dict[str, Any] | None:
    """Return how `message` was answered from the cache (tier, similarity, age_s, lookup_id), or None if it was not."""
    marks = message.response_metadata.get("aegis_cache") if isinstance(message, AIMessage) else None
    return marks if isinstance(marks, dict) else None
