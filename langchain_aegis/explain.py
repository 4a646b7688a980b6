"""Say what the cache would do with a call, and why, without counting it or changing anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from redis.exceptions import RedisError

from langchain_aegis.breaker import Unavailable
from langchain_aegis.digests import Asked, asked_for
from langchain_aegis.engine import Engine
from langchain_aegis.entries import Record
from langchain_aegis.flows import Flow
from langchain_aegis.keys import Key, Who, read_fields
from langchain_aegis.lookup import Candidate, Lookup, embed, find, judge
from langchain_aegis.questions import exact_only_reason
from langchain_aegis.reasons import explain as reason_of
from langchain_aegis.results import Explained, Explanation
from langchain_aegis.store import Near
from langchain_aegis.updates import now_ms

_TIMEOUT_MS = 2_000  # whoever asks why can wait longer than a user


def explain_call(engine: Engine, prompt: str, llm_string: str) -> Flow[Explanation]:
    """Explain a model's call, as LangChain describes it."""
    told = engine.caller()
    key = (yield from engine.located(prompt, llm_string, told)) if isinstance(told, Who) else told
    return (yield from _explain(engine, key, asked_for(llm_string)))


def explain_pipeline(engine: Engine, question: str, pipeline: str, version: str) -> Flow[Explanation]:
    """Explain a call of `get_or_generate`."""
    yield from engine.ready()
    told = engine.caller()
    key = engine.locate_pipeline(question, pipeline, version, told) if isinstance(told, Who) else told
    return (yield from _explain(engine, key))


def explain_question(engine: Engine, question: str) -> Flow[Explanation]:
    """Explain a question alone: what is near it in any scope, and what the guards say.

    Only the questions of the caller's own tenant and user are shown.
    """
    yield from engine.ready()
    text = question.strip()
    key = Key("", "", text, exact_only_reason(text), (), "", None, False)
    found = Lookup(key)
    near: list[Near] = []
    try:
        found.epochs = yield from engine.store.epochs(())
        near = yield from _anywhere(engine, found)
    except Unavailable as exc:
        found.reasons = (exc.reason,)
    except RedisError:
        found.reasons = ("redis_down",)
    candidates = yield from _judged(engine, found, near, {})
    told = engine.caller()
    asker = told if isinstance(told, Who) else Who()
    mine = engine.keyring.for_pipeline(text, asker, pipeline="", version="").fields()
    candidates = tuple(_veiled(c, _differing(mine, n.record)) for c, n in zip(candidates, near, strict=True))
    passed = found.record is not None and key.exact_only is None
    reasons = () if passed else tuple(dict.fromkeys((*_some(key.exact_only), *found.reasons)))
    explained = tuple(_explained(c, None) for c in candidates)
    return _explanation(engine, "semantic" if passed else "miss", reasons, found, explained)


def _explain(engine: Engine, key: Key | str, asked: Asked | None = None) -> Flow[Explanation]:
    if not isinstance(key, Key):
        return _explanation(engine, "bypass", (key,), None, ())
    policy = engine.policy(judge_all=True, touch=False, lease_ms=0, revalidate_ms=0)
    found = yield from find(engine.store, key, policy, now_ms, engine.keyring.profile_key, asked=asked)
    yield from engine.heed(found)
    mine = [_explained(c, ()) for c in found.candidates]
    others: list[Explained] = []
    if found.tier != "exact" and key.question is not None:
        near = [n for n in (yield from _elsewhere(engine, found)) if n.record.scope != key.scope]
        aside = replace(found, record=None, candidates=(), reasons=())
        judged = yield from _judged(engine, aside, near, {})
        fields = key.fields()
        for candidate, at in zip(judged, near, strict=True):
            others.append(_of_other_scope(candidate, at.record, fields))
    reasons = () if found.record is not None else found.reasons
    return _explanation(engine, found.tier, reasons, found, (*mine, *others))


def _elsewhere(engine: Engine, found: Lookup) -> Flow[list[Near]]:
    try:
        return (yield from _anywhere(engine, found))
    except (Unavailable, RedisError):
        return []


def _anywhere(engine: Engine, found: Lookup) -> Flow[list[Near]]:
    """Return what is near the question in any scope."""
    if engine.embedder.missing or found.epochs is None:
        found.reasons = found.reasons or ("no_embedder",)
        return []
    if not found.vector:
        yield from embed(found, engine.policy(), engine.keyring.profile_key)
    if not found.vector:
        return []
    k = engine.options.k
    near = yield from engine.store.nearest_anywhere(found.embedder, found.vector, k, found.epochs, _TIMEOUT_MS)
    return near


def _judged(
    engine: Engine, found: Lookup, near: Sequence[Near], notes: Mapping[str, str]
) -> Flow[tuple[Candidate, ...]]:
    if near:
        policy = engine.policy(judge_all=True, grey=None)
        yield from judge(found, near, notes, engine.store, policy, now_ms())
    return found.candidates


def _of_other_scope(candidate: Candidate, record: Record, fields: Mapping[str, str]) -> Explained:
    """Return a candidate of another scope; its question is not shown if it is another tenant's."""
    differing = _differing(fields, record)
    candidate = _veiled(candidate, differing)
    return _explained(replace(candidate, reasons=("other_scope", *candidate.reasons)), differing)


def _differing(fields: Mapping[str, str], record: Record) -> tuple[str, ...]:
    theirs = read_fields(record.fields)
    return tuple(name for name in {**fields, **theirs} if fields.get(name) != theirs.get(name))


def _veiled(candidate: Candidate, differing: tuple[str, ...]) -> Candidate:
    """Return a candidate without its question if it is another tenant's or user's."""
    return replace(candidate, question="") if {"tenant", "user"} & set(differing) else candidate


def _explained(candidate: Candidate, differing: tuple[str, ...] | None) -> Explained:
    age_s = round(max(0, now_ms() - candidate.created_ms) / 1000, 3)
    return Explained(candidate.key, candidate.similarity, candidate.reasons, differing, age_s, candidate.question)


def _explanation(
    engine: Engine, decision: str, reasons: tuple[str, ...], found: Lookup | None, candidates: tuple[Explained, ...]
) -> Explanation:
    codes = dict.fromkeys((*reasons, *(code for c in candidates for code in c.reasons)))
    told = {code: reason_of(code) for code in codes}
    return Explanation(
        decision=decision,
        reasons=reasons,
        question=found.key.question if found is not None else None,
        min_similarity=(found.min_similarity or None) if found is not None else None,
        embedder=engine.embedder.name,
        candidates=candidates,
        meanings={code: f"{reason.meaning} {reason.remedy}".strip() for code, reason in told.items()},
        scopes=engine.scopes.noticed(),
    )


def _some(code: str | None) -> tuple[str, ...]:
    return () if code is None else (code,)
