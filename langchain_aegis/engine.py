"""What the cache does between LangChain's call and Redis: decides, looks up, stores, counts.

No method here is asynchronous: what needs I/O is a flow, and the cache drives it blocking or awaited.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, Literal, TypeVar

from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGeneration, Generation

from langchain_aegis import entries
from langchain_aegis.breaker import Unavailable
from langchain_aegis.cache_options import Options, never
from langchain_aegis.calibration import Calibration, thresholds
from langchain_aegis.counts import Counts, cost_of
from langchain_aegis.embedder import Embedder
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.flows import Flow
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.home import load_secret
from langchain_aegis.keys import Declined, Key, Keyring, Who
from langchain_aegis.lookup import LONG, Lookup, Policy, Work, embed, find, resolved, take_vector
from langchain_aegis.notices import warn_once
from langchain_aegis.questions import exact_only_reason, find_question
from langchain_aegis.reports import lookup_id
from langchain_aegis.results import CacheStats, was_cached
from langchain_aegis.scope import current, tenants_named, who
from langchain_aegis.scopes_seen import ScopesSeen
from langchain_aegis.shadow import Shadow
from langchain_aegis.stamps import forgotten, note_lookup, recall, remember
from langchain_aegis.store import Store
from langchain_aegis.vectors import pack, similarities
from langchain_aegis.verification import compare, profile

T = TypeVar("T")


_LONG_UNREAD = 30_000  # characters of a prompt of which a digest is made in a thread: beyond, it takes milliseconds
_LONGEST_S = 10 * 365 * 86_400  # beyond, Redis could not count


class Engine:
    """The cache without its two drivers."""

    def __init__(self, options: Options, embedder: Embedder) -> None:
        self.options = options
        self.embedder = embedder
        self.counts = Counts()
        self.scopes = ScopesSeen()
        self.shadow = Shadow(options.shadow_rate) if options.shadow_rate else None
        self.reset()
        reset_after_fork(self)
        self._opened: tuple[Keyring, Store] | None = None
        self._policies: dict[bool, Policy] = {}
        self._seen_tenant = current().tenant is not None  # made inside a scope: before `tenants_named` is looked at
        self.calibration: Calibration | None = None  # of this embedder, once it is made
        self.wake_sweeper: Callable[[], None] = lambda: None
        self._named_before = tenants_named()
        self._identity = object()  # unlike id(self), never another engine's after this one is gone

    def reset(self) -> None:
        """Take a new lock: another thread of the parent may have held the old one."""
        self._lock = threading.RLock()

    @property
    def store(self) -> Store:
        """The store; the secret is read when it is first needed."""
        return self._open()[1]

    @property
    def keyring(self) -> Keyring:
        """Makes the keys; the secret is read when it is first needed."""
        return self._open()[0]

    @property
    def rejected(self) -> int:
        """Records that were damaged, forged, or of somebody else."""
        return self._opened[1].rejected if self._opened is not None else 0

    def stats(self) -> CacheStats:
        """Return what happened so far."""
        counted = self.counts.snapshot()
        values = {f.name: getattr(counted, f.name) for f in fields(counted)}
        return CacheStats(**values, rejected=self.rejected, scopes=self.scopes.noticed())

    # -- one call -------------------------------------------------------------------------------------------------

    def lookup(self, prompt: str, llm_string: str) -> Flow[list[Generation] | None]:
        """Return what is served for a model's call, fresh for it; a miss is kept in mind for the update."""
        note_lookup("")
        told = self.caller()
        key: Key | str = told if isinstance(told, str) else (yield from self._located(prompt, llm_string, told))
        if isinstance(key, Key):
            found = yield from self.find(key)
            answer = self._served(found, entries.decode_answer)
            if answer is None:
                remember(self._identity, prompt, llm_string, told, found)
            return answer
        if key == "unnamed_model":
            warn_once(
                "unnamed_model",
                "this model's cache key names no model, so answers of different models would mix (plain ChatOllama is "
                "such a one): nothing is cached. Use ChatAegis, or AegisSemanticCache(allow_unnamed_models=True)",
            )
        self.counts.bypassed(key)
        return None

    def located(self, prompt: str, llm_string: str, told: Who) -> Flow[Key | str]:
        """Return where the answer belongs, or the reason why the cache is not used."""
        key = yield from self._located(prompt, llm_string, told)
        if isinstance(key, Key):
            yield from resolved(key)
        return key

    def _located(self, prompt: str, llm_string: str, told: Who) -> Flow[Key | str]:
        """Return the same; of the key only what an exact repeat needs is known."""
        yield from self.ready()
        # Where an option asks for the question, all of the prompt has to be read now.
        long = LONG if self.options.bypass is not never or self.options.scope_ignore else _LONG_UNREAD
        if len(prompt) > long:
            located: Key | str = yield Work(partial(self._locate, prompt, llm_string, told))
            return located
        return self._locate(prompt, llm_string, told)

    def ready(self) -> Flow[None]:
        """See to it that the secret and the words of the guards are read: no event loop shall wait for that."""
        if self._opened is None:
            yield Work(self._prepare)

    def _prepare(self) -> None:
        with self._lock:  # many calls may come at once: one does the work
            if self._opened is None:
                question = "What is it?"
                find_question(f"Context:\nIt.\n\nQuestion: {question}")
                exact_only_reason(question, system=["Answer."], around=["Context:\nIt."], earlier=[(question, "It.")])
                compare(profile(question), profile(f"{question} Why?"))
                self._open()

    def _locate(self, prompt: str, llm_string: str, told: Who) -> Key | str:
        key = self.keyring.for_prompt(prompt, llm_string, told, current().question)
        if isinstance(key, Declined):
            return key.reason
        if (bypass := self.options.bypass) is not never and bypass(
            key.question if key.question is not None else prompt
        ):
            return "bypass"
        return key

    def lookup_value(
        self, question: str, pipeline: str, version: str
    ) -> Flow[tuple[Lookup | None, tuple[Literal[True], Any] | None]]:
        """Return the lookup of a pipeline's call, None if the cache is not used, and (True, value) if it is a hit."""
        found = yield from self.find_value(question, pipeline, version)
        return found, None if found is None else self._served(found, entries.decode_value)

    def find_value(self, question: str, pipeline: str, version: str) -> Flow[Lookup | None]:
        """Look a pipeline's answer up; None if the cache must not be used."""
        yield from self.ready()
        told = self.caller()
        key = self.locate_pipeline(question, pipeline, version, told) if isinstance(told, Who) else told
        if isinstance(key, Key):
            return (yield from self.find(key))
        self.counts.bypassed(key)
        return None

    def locate_pipeline(self, question: str, pipeline: str, version: str, told: Who) -> Key | str:
        """Return where a pipeline's answer belongs, or the reason why the cache is not used."""
        if self.options.bypass(question):
            return "bypass"
        return self.keyring.for_pipeline(question, told, pipeline=pipeline, version=version)

    def find(self, key: Key) -> Flow[Lookup]:
        """Look `key` up; a refresh only sees to it that no earlier answer is kept."""
        serve = current().cache != "refresh"
        found = yield from find(self.store, key, self.policy(), now_ms, self.keyring.profile_key, serve=serve)
        note_lookup(found.epochs.stamp() if found.epochs is not None else "")
        yield from self.heed(found)
        if found.tier != "exact" and key.scope:
            self.scopes.saw(key.scope, key.fields)
        return found

    def heed(self, found: Lookup) -> Flow[None]:
        """Learn what the namespace says, and serve nothing to a call that names no tenant although it should."""
        if found.epochs is not None:
            self._seen_tenant = self._seen_tenant or found.epochs.tenanted
            if found.epochs.trash:
                self.wake_sweeper()
        if self._tenant_missing(found.key.tenanted):
            yield from self._release(found)
            found.record, found.tier, found.similarity, found.epochs, found.stale = None, "miss", None, None, None
            found.reasons = ("no_tenant",)

    def instead(self, found: Lookup, decode: Callable[..., T | None]) -> Flow[T | None]:
        """Let others make the answer whose making failed; return an old one, decoded, if that may be served."""
        yield from self._release(found)
        if found.stale is None or not self.options.stale_if_error_ms:
            return None
        key = found.key  # what has become of it since: an invalidation wins here too
        found.stale, epochs = yield from self.store.read(key.exact, key.things, tenant=key.tenant, user=key.user)
        if epochs is None or epochs.opted_out or not self._take_stale(found):
            return None
        return self._served(found, decode)

    def stale_answer(self, prompt: str, llm_string: str) -> Flow[list[Generation] | None]:
        """Return an old answer of the call that was looked up in this context, if it may stand in for the model's."""
        pending = recall(self._identity, prompt, llm_string)
        if pending is None or pending.who != self.caller():
            return None
        return (yield from self.instead(pending.found, entries.decode_answer))

    def _take_stale(self, found: Lookup) -> bool:
        if found.stale is None or now_ms() >= found.stale.fresh_ms + self.options.stale_if_error_ms:
            return False
        found.record, found.tier, found.similarity = found.stale, "exact", 1.0
        return True

    def update(self, prompt: str, llm_string: str, generations: Sequence[Generation]) -> Flow[None]:
        """Store the answer of a call, if it may be."""
        if not isinstance(told := self.caller(), Who):
            return
        pending = recall(self._identity, prompt, llm_string)
        found: Lookup | None = pending.found if pending is not None else None
        messages = [g.message for g in generations if isinstance(g, ChatGeneration)]
        if reason := entries.refusal(generations) or _is_stale(messages):
            return (yield from self.give_up(found, reason))
        if pending is not None and pending.who != told:  # what is around the call has changed: whose is it?
            return (yield from self.give_up(found, "bad_identity"))
        if found is None:  # an update without a lookup: the answer comes from elsewhere, and counts from now
            if not isinstance(key := (yield from self.located(prompt, llm_string, told)), Key):
                return
            found = Lookup(key)
            try:
                _, found.epochs = yield from self.store.read(key.exact, key.things, tenant=key.tenant, user=key.user)
            except Unavailable as exc:
                return self.counts.not_stored(exc.reason)
            if found.epochs is not None and found.epochs.opted_out:
                return self.counts.not_stored("opted_out")
            if self._tenant_missing(key.tenanted):
                return self.counts.not_stored("no_tenant")
            if key.question is not None and not self.embedder.missing:
                yield from embed(found, self.policy(), self.keyring.profile_key)
            if (first := forgotten(self._identity)) is not None:  # it may have been looked up as long ago as that
                found.epochs, found.began_ms = first.found.epochs, first.found.began_ms
        try:
            answer = entries.encode_answer(generations)
        except (TypeError, ValueError):
            return (yield from self.give_up(found, "not_json"))
        negative = self.options.negative(generations[0].text)
        by_meaning = len(generations) == 1 and not entries.calls_tools(generations) and not negative
        digest = entries.model_digest(generations)
        yield from self._store(found, answer, by_meaning=by_meaning, digest=digest, negative=negative)

    def store_value(self, found: Lookup, value: Any, *, negative: bool = False) -> Flow[None]:
        """Store a pipeline's answer, if it may be."""
        messages = entries.messages_in(value)
        if not negative and (value is None or value in ("", [], {})):
            return (yield from self.give_up(found, "empty"))
        if messages and (
            reason := entries.refusal([ChatGeneration(message=m) for m in messages]) or _is_stale(messages)
        ):
            return (yield from self.give_up(found, reason))
        try:
            answer = yield Work(partial(entries.encode_value, value))
        except (TypeError, ValueError, RecursionError):
            warn_once(
                "pipeline_value", "a pipeline returned neither text, messages nor plain JSON: its answers are not kept"
            )
            return (yield from self.give_up(found, "not_json"))
        if not negative and isinstance(value, str):
            negative = self.options.negative(value)
        by_meaning = not negative and not any(m.tool_calls for m in messages)
        yield from self._store(found, answer, by_meaning=by_meaning, digest="", negative=negative)

    def give_up(self, found: Lookup | None, reason: str) -> Flow[None]:
        """Note that an answer is not kept; whoever waits for it need not any longer."""
        self.counts.not_stored(reason)
        if found is not None:
            yield from self._release(found)

    def _release(self, found: Lookup) -> Flow[None]:
        if found.fence:
            with contextlib.suppress(Unavailable):
                yield from self.store.release(found.key.exact, found.fence)

    def min_similarity(self) -> tuple[str, float]:
        """Return the embedder's name and the lowest cosine that is served with it."""
        name = self.embedder.name or ""
        value = self.options.min_similarity
        if value is None:
            value, known = thresholds(name, self.options.settings.mode, self.calibration)
            if not known:
                warn_once(
                    f"uncalibrated:{name}",
                    f"no threshold was calibrated for the embedder {name!r}: {value} is used. Run `aegis cache "
                    "calibrate`; min_similarity= sets another",
                )
        tightening = self.shadow.tightening if self.shadow is not None else 0.0
        return name, min(max(value, 0.99), value + tightening) if tightening else value

    def policy(self, **changes: Any) -> Policy:
        """Return how near is near enough."""
        semantic = not self.embedder.missing
        if (made := self._policies.get(semantic)) is None:
            o = self.options
            made = self._policies[semantic] = Policy(
                semantic=semantic,
                embedder=self.min_similarity,
                k=o.k,
                guards_off=o.guards_off,
                budget_s=o.settings.op_budget_s,
                grey=o.grey if o.verifies else None,
                touch=o.max_entries_per_tenant is not None,
                revalidate_ms=o.stale_while_revalidate_ms,
                lease_ms=o.lease_ms,
                wait_s=o.lease_wait_s,
                repeats=o.repeats,
            )
        return replace(made, **changes) if changes else made

    # -- parts ----------------------------------------------------------------------------------------------------

    def _open(self) -> tuple[Keyring, Store]:
        opened = self._opened
        if opened is None:
            with self._lock:
                if (opened := self._opened) is None:
                    o = self.options
                    keyring = Keyring(
                        load_secret(o.settings), namespace=o.settings.namespace,
                        share_within_tenant=o.share_within_tenant,
                        scope_ignore=o.scope_ignore, find_question=o.find_question,
                        allow_unnamed_models=o.allow_unnamed_models, labels=o.labels, chunks=o.chunks,
                    )  # fmt: skip
                    opened = keyring, Store(o.settings.namespace, keyring.mac_key, keyring.fingerprint)
                    self._opened = opened
        return opened

    def caller(self) -> Who | str:
        """Return whose call it is, or the reason why the cache must not be used for it."""
        scope, settings = current(), self.options.settings
        if not settings.cache_enabled or scope.cache == "off":
            return "off"
        try:
            tenant, user = who(settings.tenant_key, settings.user_key)
        except AegisConfigError as exc:
            warn_once(
                "bad_identity", f"a call names a tenant or user that cannot be used ({exc}); it bypasses the cache"
            )
            return "bad_identity"
        if self._tenant_missing(tenant is not None):
            return "no_tenant"
        self._seen_tenant = self._seen_tenant or tenant is not None
        return Who(tenant=tenant, user=user, task=scope.task)

    def _tenant_missing(self, tenanted: bool) -> bool:
        required = self.options.require_tenant
        if tenanted or required is False:
            return False
        # "auto": a scope with a tenant anywhere in this process counts too: this call may have lost its own on the way.
        if required == "auto" and not self._seen_tenant and tenants_named() == self._named_before:
            return False
        warn_once(
            "no_tenant",
            "a call names no tenant although others do: it bypasses the cache. Put it inside aegis_scope(tenant=...), "
            "or say AegisSemanticCache(require_tenant=False)",
        )
        return True

    def _served(self, found: Lookup, decode: Callable[..., T | None]) -> T | None:
        answer: T | None = None
        if found.tier == "semantic" and self.shadow is not None and not self.options.dry_run and self.shadow.draw():
            found.shadowed, found.record = found.record, None
            found.tier, found.similarity, found.reasons = "miss", None, ("shadow",)
        if found.record is not None:
            record = found.record
            found.lookup_id = lookup_id(self.keyring.mac_key, found.key.exact, record.key)
            marks = {
                "tier": found.tier,
                "similarity": round(found.similarity or 0.0, 4),
                "age_s": round(max(0, now_ms() - record.created_ms) / 1000, 3),
                "lookup_id": found.lookup_id,
            }
            if record is found.stale:
                marks["stale"] = True
            if record.negative:
                marks["negative"] = True
            answer = decode(record.answer, marks=marks)
            if answer is None:
                found.record, found.tier, found.similarity, found.reasons = None, "miss", None, ("unreadable",)
            elif (sources := current().sources) is not None and record.src and not self.options.dry_run:
                sources.inherit(record.src)
        self._count(found, answer)
        if self.options.on_lookup is not None:
            try:
                self.options.on_lookup(found)
            except Exception as exc:  # somebody else's code must not cost the user his call
                warn_once("on_lookup", f"on_lookup raised {type(exc).__name__}")
        return None if self.options.dry_run else answer

    def _count(self, found: Lookup, answer: object) -> None:
        seconds = time.perf_counter() - found.started
        task = found.key.task
        if found.record is None:
            best = max((c for c in found.candidates if c.reasons), key=lambda c: c.similarity, default=None)
            nearest = (best.similarity, best.reasons[0]) if best is not None else None
            self.counts.miss(found.reasons, seconds, nearest=nearest, task=task)
            return
        tier = "stale" if found.record is found.stale else found.tier
        self.counts.hit(tier, seconds, cost=cost_of(answer[1] if isinstance(answer, tuple) else answer), task=task)

    def _store(self, found: Lookup, answer: bytes, *, by_meaning: bool, digest: str, negative: bool) -> Flow[None]:
        key, o = found.key, self.options
        started = time.perf_counter()
        if found.shadowed is not None and self.shadow is not None:
            yield from self._compare(found.shadowed.answer, answer, self.shadow)
        if found.epochs is None:  # not known since when nothing was invalidated: it could be outdated already
            return self.counts.not_stored(found.reasons[0] if found.reasons else "redis_down")
        if len(answer) > o.settings.max_entry_bytes:
            return (yield from self.give_up(found, "too_large"))
        if not found.vector and found.late is not None and found.late.done() and not found.late.cancelled():
            take_vector(found, None if found.late.exception() else pack(found.late.result()), self.policy(),
                        self.keyring.profile_key)  # fmt: skip
        record, things = self._record(found, answer, by_meaning=by_meaning, digest=digest, negative=negative)
        try:
            reply = yield from self.store.put(
                record, things=things, now_ms=now_ms(), tenanted=key.tenanted,
                max_entries=o.max_entries_per_tenant, fence=found.fence,
            )  # fmt: skip
        except Unavailable as exc:
            return self.counts.not_stored(exc.reason)
        if reply != "stored":
            return (yield from self.give_up(found, reply))
        self.counts.stored(time.perf_counter() - started)

    def _compare(self, old: bytes, new: bytes, shadow: Shadow) -> Flow[None]:
        """Note whether a hit that was drawn for checking would have been right."""
        try:
            agrees = yield Work(partial(self.options.compare_answers, old, new, similar=self._similar))
        except Exception as exc:  # the user's own rule may raise anything
            warn_once("compare_answers", f"compare_answers raised {type(exc).__name__}: nothing is known of that hit")
            return
        shadow.compared(agrees)
        if agrees is not None:
            self.counts.checked(wrong=not agrees)

    def _similar(self, one: str, other: str) -> float:
        """Return the cosine of two answers; blocks."""
        vectors = [pack(self.embedder.embed(text)) or b"" for text in (one, other)]
        return similarities(vectors[0], vectors[1:])[0]

    def _record(
        self, found: Lookup, answer: bytes, *, by_meaning: bool, digest: str, negative: bool
    ) -> tuple[entries.Record, list[str]]:
        """Return what is stored, and everything whose invalidation concerns it."""
        key, o, epochs = found.key, self.options, found.epochs
        assert epochs is not None  # noqa: S101  # the caller has looked
        by_meaning = by_meaning and bool(found.vector) and found.profile is not None
        scope, thing = current(), self.keyring.thing
        ids = sorted(scope.sources.ids()) if scope.sources is not None else []
        sources = [thing("source", s) for s in ids]
        extra = [thing("tenant-source", key.tenant, s) for s in ids]
        if scope.sources is not None:  # made from other kept answers: it goes with their documents, too
            inherited = scope.sources.inherited() - {*sources, *extra}
            sources += sorted(name for name in inherited if name.startswith("source:"))
            extra += sorted(name for name in inherited if not name.startswith("source:"))
        if o.share_within_tenant:  # another user may be served this: his lookup does not ask for this one's epochs
            extra += [t for t in key.things if t.startswith(("user:", "tenant-user:"))]
        ttl_s = scope.ttl_s or o.ttl_by_task.get(key.task) or o.settings.ttl_s
        ttl_s = min(ttl_s, o.negative_ttl_s if negative else _LONGEST_S)
        created_ms = found.began_ms or now_ms()  # an answer is as old as what was known when its making began
        fresh_ms = now_ms() + int(ttl_s * 1000)
        stale_ms = 0 if negative else min(max(o.stale_while_revalidate_ms, o.stale_if_error_ms), _LONGEST_S * 1000)
        record = entries.Record(
            key=key.exact, scope=key.scope if by_meaning else "", emb=found.embedder if by_meaning else "",
            fields=",".join(f"{name}={value}" for name, value in key.fields().items()), digest=digest,
            created_ms=created_ms, fresh_ms=fresh_ms if stale_ms else 0, expires_ms=fresh_ms + stale_ms,
            epochs=epochs.stamp(), answer=answer, negative=negative,
            profile=found.profile.encode() if by_meaning and found.profile is not None else b"",
            vec=found.vector if by_meaning else b"", src=tuple(sources + extra), sets=(*key.sets, *sources),
            task=key.task, question=(key.question or "") if o.keep_questions else "",
        )  # fmt: skip
        return record, [*key.things, *sources, *extra]


def _is_stale(messages: Sequence[BaseMessage]) -> str | None:
    """Return a reason code if an answer is an old one of a cache itself: as a new one it would live on."""
    return "stale" if any((was_cached(message) or {}).get("stale") for message in messages) else None


def now_ms() -> int:
    """Return the unix time in milliseconds."""
    return time.time_ns() // 1_000_000
