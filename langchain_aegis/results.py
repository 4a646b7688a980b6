"""What the cache tells its users about answers, and what they tell it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage


@dataclass(frozen=True, slots=True)
class Answer:
    """A pipeline's answer together with the documents that it rests on.

    Attributes:
        value: What the caller gets: a text, messages, or plain JSON.
        sources: Ids of documents; `cache.invalidate(sources=...)` removes the answer with any of them.
    """

    value: Any
    sources: Collection[str] = ()


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
class CacheStats:
    """What a cache has done in this process.

    Attributes:
        exact_hits: Answered on an exact repeat.
        semantic_hits: Answered by meaning.
        misses: Not answered.
        stored: Answers written.
        reasons: Why lookups missed, by code.
        not_stored: Why answers were not written, by code.
        rejected: Records that were damaged, forged, or of somebody else.
    """

    exact_hits: int
    semantic_hits: int
    misses: int
    stored: int
    reasons: Mapping[str, int]
    not_stored: Mapping[str, int]
    rejected: int

    @property
    def hit_rate(self) -> float:
        """Share of lookups that were answered, in [0, 1]."""
        hits = self.exact_hits + self.semantic_hits
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
