"""The cache's arguments, checked before anything is connected."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

from langchain_core.embeddings import Embeddings

from langchain_aegis.agreement import answers_agree
from langchain_aegis.chunks import ChunkRule
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.keys import FindQuestion
from langchain_aegis.lookup import Lookup
from langchain_aegis.questions import Labels
from langchain_aegis.settings import AegisSettings
from langchain_aegis.verification import GUARDS

Bypass = Callable[[str], bool] | Iterable[str]
Negative = Callable[[str], bool] | Iterable[str]


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
    labels: Labels | None
    chunks: ChunkRule | None
    verifies: bool
    verifier_band: tuple[float, float] | None
    shadow_rate: float
    compare_answers: Callable[..., bool | None]
    max_entries_per_tenant: int | None
    stale_while_revalidate_ms: int
    stale_if_error_ms: int
    negative: Callable[[str], bool]
    negative_ttl_s: float
    lease_ms: int
    lease_wait_s: float
    repeats: Literal["auto", "serve", "ask"]

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
        verifier: object,
        verifier_band: tuple[float, float] | None,
        keep_questions: bool,
        shadow_rate: float,
        compare_answers: Callable[[str, str], bool] | None,
        max_entries_per_tenant: int | None,
        stale_while_revalidate_s: float,
        stale_if_error_s: float,
        negative: Negative | None,
        negative_ttl_s: float,
        lease_s: float,
        lease_wait_s: float,
        repeats: Literal["auto", "serve", "ask"],
        **rest: Any,
    ) -> Self:
        """Return the arguments as options. Raises AegisConfigError, which says what to write instead."""
        if embeddings is not None and not isinstance(embeddings, Embeddings):
            raise AegisConfigError(f"embeddings must be a langchain_core Embeddings, got {type(embeddings).__name__}")
        if require_tenant not in (True, False, "auto"):
            raise AegisConfigError(f'require_tenant must be True, False or "auto", got {require_tenant!r}')
        if repeats not in ("auto", "serve", "ask"):
            raise AegisConfigError(f'repeats must be "auto", "serve" or "ask", got {repeats!r}')
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= 100:
            raise AegisConfigError(f"k must be a whole number from 1 to 100, got {k!r}")
        if unknown := set(guards_off) - set(GUARDS):
            raise AegisConfigError(f"no guard named {', '.join(sorted(unknown))}; there are {', '.join(GUARDS)}")
        _check_number("max_entries_per_tenant", max_entries_per_tenant, at_least=1, whole=True)
        _check_number("shadow_rate", shadow_rate, at_most=0.5)
        _check_number("negative_ttl_s", negative_ttl_s, above=0)
        for name, seconds in (
            ("stale_while_revalidate_s", stale_while_revalidate_s),
            ("stale_if_error_s", stale_if_error_s),
            ("lease_s", lease_s),
            ("lease_wait_s", lease_wait_s),
        ):
            _check_number(name, seconds)
        if verifier_band is not None and not (
            len(verifier_band) == 2 and 0.5 <= verifier_band[0] < verifier_band[1] <= 1.01
        ):
            raise AegisConfigError(f"verifier_band must be two cosines like (0.75, 0.97), got {verifier_band!r}")
        if bad := [t for t in (ttl_by_task or {}).values() if not t > 0]:
            raise AegisConfigError(f"ttl_by_task must hold seconds above 0, got {bad[0]!r}")
        return cls(
            settings=settings,
            min_similarity=_min_similarity(min_similarity, distance_threshold),
            k=k,
            ttl_by_task=dict(ttl_by_task or {}),
            require_tenant=require_tenant,
            bypass=_matching("bypass", bypass),
            scope_ignore=_patterns("scope_ignore", scope_ignore),
            guards_off=frozenset(guards_off),
            verifies=verifier is not None,
            verifier_band=verifier_band,
            keep_questions=keep_questions or verifier is not None,  # the verifier reads both questions
            shadow_rate=shadow_rate,
            compare_answers=partial(answers_agree, compare_answers=compare_answers),
            max_entries_per_tenant=max_entries_per_tenant,
            stale_while_revalidate_ms=int(stale_while_revalidate_s * 1000),
            stale_if_error_ms=int(stale_if_error_s * 1000),
            negative=_matching("negative", negative),
            negative_ttl_s=negative_ttl_s,
            lease_ms=int(lease_s * 1000),
            lease_wait_s=lease_wait_s,
            repeats=repeats,
            **rest,
        )

    def grey(self, min_similarity: float) -> tuple[float, float]:
        """Return the cosines between which the verifier must agree, for the lowest that is served without one."""
        return self.verifier_band or (max(0.5, min_similarity - 0.1), 0.97)


def _check_number(
    name: str,
    value: float | None,
    *,
    above: float | None = None,
    at_least: float = 0,
    at_most: float = float("inf"),
    whole: bool = False,
) -> None:
    if value is None:
        return
    kinds = (int,) if whole else (int, float)
    right = isinstance(value, kinds) and not isinstance(value, bool) and at_least <= value <= at_most
    if not right or (above is not None and not value > above) or value == float("inf"):
        bound = f"above {above:g}" if above is not None else f"of at least {at_least:g}"
        most = f" and at most {at_most:g}" if at_most < float("inf") else ""
        raise AegisConfigError(f"{name} must be a {'whole ' if whole else ''}number {bound}{most}, got {value!r}")


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


def _matching(name: str, rule: Bypass | None) -> Callable[[str], bool]:
    """Return a rule, given as a function or as patterns, as a function."""
    if rule is None:
        return lambda _: False
    if callable(rule):
        return rule
    patterns = [re.compile(p, re.IGNORECASE) for p in _patterns(name, rule)]
    return lambda text: any(p.search(text) for p in patterns)
