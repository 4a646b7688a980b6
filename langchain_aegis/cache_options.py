"""The cache's arguments, checked before anything is connected."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from langchain_core.embeddings import Embeddings

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.keys import FindQuestion
from langchain_aegis.lookup import Lookup
from langchain_aegis.settings import AegisSettings
from langchain_aegis.verification import GUARDS

Bypass = Callable[[str], bool] | Iterable[str]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The cache's arguments, checked; see `AegisSemanticCache` for what each means."""

    settings: AegisSettings
    min_similarity: float | None
    k: int
    ttl_by_task: Mapping[str, int]
    require_tenant: bool | Literal["auto"]
    share_within_tenant: bool
    bypass: Callable[[str], bool]
    scope_ignore: tuple[str, ...]
    find_question: FindQuestion | None
    guards_off: frozenset[str]
    allow_unnamed_models: bool
    keep_questions: bool
    dry_run: bool
    on_lookup: Callable[[Lookup], None] | None

    @classmethod
    def checked(
        cls,
        *,
        settings: AegisSettings,
        embeddings: Embeddings | None,
        min_similarity: float | None,
        distance_threshold: float | None,
        k: int,
        ttl_by_task: Mapping[str, int] | None,
        require_tenant: bool | Literal["auto"],
        bypass: Bypass | None,
        scope_ignore: Iterable[str],
        guards_off: Iterable[str],
        **rest: Any,
    ) -> Self:
        """Return the arguments as options. Raises AegisConfigError, which says what to write instead."""
        if embeddings is not None and not isinstance(embeddings, Embeddings):
            raise AegisConfigError(f"embeddings must be a langchain_core Embeddings, got {type(embeddings).__name__}")
        if require_tenant not in (True, False, "auto"):
            raise AegisConfigError(f'require_tenant must be True, False or "auto", got {require_tenant!r}')
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= 100:
            raise AegisConfigError(f"k must be a whole number from 1 to 100, got {k!r}")
        if unknown := set(guards_off) - set(GUARDS):
            raise AegisConfigError(f"no guard named {', '.join(sorted(unknown))}; there are {', '.join(GUARDS)}")
        if bad := [t for t in (ttl_by_task or {}).values() if not t > 0]:
            raise AegisConfigError(f"ttl_by_task must hold seconds above 0, got {bad[0]!r}")
        return cls(
            settings=settings,
            min_similarity=_min_similarity(min_similarity, distance_threshold),
            k=k,
            ttl_by_task=dict(ttl_by_task or {}),
            require_tenant=require_tenant,
            bypass=_bypass(bypass),
            scope_ignore=_patterns("scope_ignore", scope_ignore),
            guards_off=frozenset(guards_off),
            **rest,
        )


def _min_similarity(similarity: float | None, distance: float | None) -> float | None:
    if distance is not None:
        if similarity is not None:
            raise AegisConfigError("give min_similarity or distance_threshold, not both")
        similarity = 1.0 - distance
    if similarity is None:
        return None
    if isinstance(similarity, bool) or not isinstance(similarity, (int, float)) or not 0.5 <= similarity <= 1:
        raise AegisConfigError(
            f"min_similarity must be in [0.5, 1], got {similarity!r}: it is a cosine similarity, where 1 is the same. "
            "For a cosine distance, as redisvl counts, use distance_threshold"
        )
    return float(similarity)


def _patterns(name: str, patterns: Iterable[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise AegisConfigError(f"{name} must be a list of patterns; write {name}=[pattern]")
    told = tuple(patterns)
    for pattern in told:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as exc:
            raise AegisConfigError(f"{name}: {pattern!r} is no regular expression ({exc})") from exc
    return told


def _bypass(rule: Bypass | None) -> Callable[[str], bool]:
    if rule is None:
        return lambda _: False
    if callable(rule):
        return rule
    patterns = [re.compile(p, re.IGNORECASE) for p in _patterns("bypass", rule)]
    return lambda text: any(p.search(text) for p in patterns)
