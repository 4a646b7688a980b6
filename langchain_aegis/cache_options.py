"""The cache's arguments, checked before anything is connected."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

from langchain_core.embeddings import Embeddings

from langchain_aegis import ciphers
from langchain_aegis.agreement import answers_agree
from langchain_aegis.chunks import ChunkRule, Chunks
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
        find_question: FindQuestion | None,
        guards_off: Iterable[str],
        on_lookup: Callable[[Lookup], None] | None,
        labels: Labels | None,
        chunks: ChunkRule | None,
        verifier: object,
        verifier_band: tuple[float, float] | None,
        verifier_budget_s: float,
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
        off = _texts("guards_off", guards_off)
        if unknown := set(off) - set(GUARDS):
            raise AegisConfigError(f"no guard named {', '.join(sorted(unknown))}; there are {', '.join(GUARDS)}")
        for name, value in (("keep_questions", keep_questions), *rest.items()):  # what is left are switches
            if not isinstance(value, bool):
                raise AegisConfigError(f"{name} must be True or False, got {value!r}")
        for name, rule in (
            ("find_question", find_question),
            ("on_lookup", on_lookup),
            ("compare_answers", compare_answers),
        ):
            _check_rule(name, rule)
        if labels is not None and not isinstance(labels, Labels):
            raise AegisConfigError(f"labels must be a Labels, got {type(labels).__name__}")
        _check_rule("chunks", None if isinstance(chunks, str) else chunks)
        Chunks(chunks)  # a pattern that is none is said now
        if max_entries_per_tenant is not None:
            _check_number("max_entries_per_tenant", max_entries_per_tenant, at_least=1, whole=True)
        _check_number("shadow_rate", shadow_rate, at_most=0.5)
        _check_number("negative_ttl_s", negative_ttl_s, above=0)
        _check_number("verifier_budget_s", verifier_budget_s, above=0)
        for name, seconds in (
            ("stale_while_revalidate_s", stale_while_revalidate_s),
            ("stale_if_error_s", stale_if_error_s),
            ("lease_s", lease_s),
            ("lease_wait_s", lease_wait_s),
        ):
            _check_number(name, seconds)
        if verifier_band is not None and not _is_band(verifier_band):
            raise AegisConfigError(f"verifier_band must be two cosines like (0.75, 0.97), got {verifier_band!r}")
        if not isinstance(ttl_by_task or {}, Mapping):
            raise AegisConfigError(f"ttl_by_task must map tasks to seconds, got {type(ttl_by_task).__name__}")
        for task, seconds in (ttl_by_task or {}).items():
            _check_number(f"ttl_by_task[{task!r}]", seconds, above=0)
        return cls(
            settings=settings,
            min_similarity=_min_similarity(min_similarity, distance_threshold),
            k=k,
            ttl_by_task=dict(ttl_by_task or {}),
            require_tenant=require_tenant,
            bypass=_matching("bypass", bypass),
            scope_ignore=_patterns("scope_ignore", scope_ignore),
            find_question=find_question,
            guards_off=frozenset(off),
            on_lookup=on_lookup,
            labels=labels,
            chunks=chunks,
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
        low, high = self.verifier_band or (max(0.5, min_similarity - 0.1), 0.97)
        return low, max(high, min_similarity)  # nothing below the threshold is served without its consent


def checked_settings(settings: AegisSettings | None, **changes: Any) -> AegisSettings:
    """Return the settings of the environment, or those given, with the cache's own arguments in their place.

    Raises:
        AegisConfigError: A value cannot be used.
    """
    if settings is not None and not isinstance(settings, AegisSettings):
        raise AegisConfigError(f"settings must be an AegisSettings, got {type(settings).__name__}")
    for name, value in changes.items():
        if name in ("redis_url", "namespace", "mode"):
            if value is not None and not isinstance(value, str):
                raise AegisConfigError(f"{name} must be a text, got {value!r}")
        elif name == "local_tier_bytes" and value is not None:
            _check_number(name, value, whole=True)
        elif value is not None:
            _check_number(name, value, above=0)
    checked = (settings if settings is not None else AegisSettings.from_env()).but(**changes)
    if checked.encrypt:
        ciphers.require()  # not only when the first answer is to be stored
    return checked


def _check_number(
    name: str,
    value: float,
    *,
    above: float | None = None,
    at_least: float = 0,
    at_most: float = float("inf"),
    whole: bool = False,
) -> None:
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
        if isinstance(distance, bool) or not isinstance(distance, (int, float)):
            raise AegisConfigError(f"distance_threshold must be a number, got {distance!r}")
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
    told = _texts(name, patterns)
    for pattern in told:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as exc:
            raise AegisConfigError(f"{name}: {pattern!r} is no regular expression ({exc})") from exc
    return told


def never(_: str) -> bool:
    """Say no: the rule where none was given."""
    return False


def _matching(name: str, rule: Bypass | None) -> Callable[[str], bool]:
    """Return a rule, given as a function or as patterns, as a function."""
    if rule is None:
        return never
    if callable(rule):
        _check_rule(name, rule)
        return rule
    patterns = [re.compile(p, re.IGNORECASE) for p in _patterns(name, rule)]
    return lambda text: any(p.search(text) for p in patterns)


def _texts(name: str, told: Iterable[str]) -> tuple[str, ...]:
    if isinstance(told, str) or not isinstance(told, Iterable):
        raise AegisConfigError(f"{name} must be a list of texts, got {told!r}; write {name}=[text]")
    return tuple(told)


def _check_rule(name: str, rule: object) -> None:
    # A coroutine would count as true wherever a rule is asked, and nobody would await it.
    if rule is not None and (not callable(rule) or inspect.iscoroutinefunction(rule)):
        raise AegisConfigError(f"{name} must be a function that is no coroutine function, got {rule!r}")


def _is_band(band: object) -> bool:
    if not isinstance(band, (tuple, list)) or len(band) != 2:
        return False
    low, high = band
    return all(isinstance(v, (int, float)) for v in band) and 0.5 <= low < high <= 1.01
