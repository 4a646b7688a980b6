"""What the cache does between LangChain's call and Redis: decides, looks up, stores, counts.

No method here is asynchronous: what needs I/O is a flow, and the cache drives it blocking or awaited.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, Generation

from langchain_aegis import entries
from langchain_aegis.breaker import Unavailable
from langchain_aegis.cache_options import Options
from langchain_aegis.embedder import Embedder
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.flows import Flow
from langchain_aegis.home import load_secret
from langchain_aegis.keys import Declined, Key, Keyring, Who
from langchain_aegis.lookup import Lookup, Policy, embed, find, take_vector
from langchain_aegis.notices import warn_once
from langchain_aegis.scope import current, who
from langchain_aegis.store import Store
from langchain_aegis.vectors import pack
from langchain_aegis.verification import thresholds

T = TypeVar("T")


@dataclass(slots=True)
class Counts:
    """What happened so far, by code."""

    tiers: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    not_stored: Counter[str] = field(default_factory=Counter)
    stored: int = 0


@dataclass(frozen=True, slots=True)
class _Pending:
    """A lookup whose update is still to come; the context in which both run carries it."""

    engine: object
    prompt: str
    llm_string: str
    who: Who
    found: Lookup


_pending: ContextVar[tuple[_Pending, ...]] = ContextVar("aegis_pending", default=())
_PENDING_KEPT = 8  # so many calls may be nested in one another


class Engine:
    """The cache without its two drivers."""

    def __init__(self, options: Options, embedder: Embedder) -> None:
        self.options = options
        self.embedder = embedder
        self.counts = Counts()
        self.lock = threading.Lock()
        self._opened: tuple[Keyring, Store] | None = None
        self._seen_tenant = False
        self._identity = object()  # unlike id(self), never another engine's after this one is gone

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

    # -- one call -------------------------------------------------------------------------------------------------

    def key_of(self, prompt: str, llm_string: str) -> tuple[Key, Who] | None:
        """Return where the answer belongs, or None if the cache must not be used for this call."""
        told = self._who()
        return None if told is None else self._keyed(prompt, llm_string, told)

    def _keyed(self, prompt: str, llm_string: str, told: Who) -> tuple[Key, Who] | None:
        key = self.keyring.for_prompt(prompt, llm_string, told, current().question)
        if isinstance(key, Declined):
            if key.reason == "unnamed_model":
                warn_once(
                    "unnamed_model",
                    "this model's cache key names no model, so answers of different models would mix (plain ChatOllama "
                    "is such a one): nothing is cached. Use ChatAegis, or AegisSemanticCache("
                    "allow_unnamed_models=True)",
                )
            self._bypassed(key.reason)
            return None
        if self.options.bypass(key.question if key.question is not None else prompt):
            self._bypassed("bypass")
            return None
        return key, told

    def pipeline_key(self, question: str, pipeline: str, version: str) -> Key | None:
        """Return where a pipeline's answer belongs, or None if the cache must not be used."""
        told = self._who()
        if told is None:
            return None
        if self.options.bypass(question):
            self._bypassed("bypass")
            return None
        return self.keyring.for_pipeline(question, told, pipeline=pipeline, version=version)

    def find(self, key: Key) -> Flow[Lookup]:
        """Look `key` up; only learns the epochs where an answer must not be served."""
        serve = current().cache != "refresh"
        found = yield from find(self.store, key, self._policy(), _now_ms(), self.keyring.profile_key, serve=serve)
        if found.epochs is not None and found.epochs.tenanted:
            self._seen_tenant = True
        if self._tenant_missing(key.tenanted):
            found.record, found.tier, found.similarity, found.epochs = None, "miss", None, None
            found.reasons = ("no_tenant",)
        return found

    def finish(self, found: Lookup) -> list[Generation] | None:
        """Return what is served, fresh for this call."""
        return self._served(found, entries.decode_answer)

    def finish_value(self, found: Lookup) -> tuple[Literal[True], Any] | None:
        """Return (True, value) if a pipeline's answer is served."""
        return self._served(found, entries.decode_value)

    def remember(self, prompt: str, llm_string: str, told: Who, found: Lookup) -> None:
        """Keep a lookup for the update that follows in the same context."""
        others = (
            p for p in _pending.get() if (p.engine, p.prompt, p.llm_string) != (self._identity, prompt, llm_string)
        )
        mine = _Pending(self._identity, prompt, llm_string, told, found)
        _pending.set((mine, *others)[:_PENDING_KEPT])

    def update(self, prompt: str, llm_string: str, generations: Sequence[Generation]) -> Flow[None]:
        """Store the answer of a call, if it may be."""
        if current().cache == "off":
            return
        if reason := entries.refusal(generations):
            return self._not_stored(reason)
        if (told := self._who()) is None:
            return
        found = self._recall(prompt, llm_string, told)
        if found is None:  # an update without a lookup: the answer comes from elsewhere, and counts from now
            if (keyed := self._keyed(prompt, llm_string, told)) is None:
                return
            key = keyed[0]
            found = Lookup(key)
            try:
                found.epochs = yield from self.store.epochs(key.things)
            except Unavailable as exc:
                return self._not_stored(exc.reason)
            if self._tenant_missing(key.tenanted):
                return self._not_stored("no_tenant")
            if key.question is not None and not self.embedder.missing:
                yield from embed(found, self._policy(), self.keyring.profile_key)
        try:
            answer = entries.encode_answer(generations)
        except (TypeError, ValueError):
            return self._not_stored("not_json")
        by_meaning = len(generations) == 1 and not entries.calls_tools(generations)
        yield from self._store(found, answer, by_meaning=by_meaning, digest=_model_digest(generations))

    def store_value(self, found: Lookup, value: Any) -> Flow[None]:
        """Store a pipeline's answer, if it may be."""
        messages = [m for m in (value if isinstance(value, list) else [value]) if isinstance(m, AIMessage)]
        if value is None or value in ("", [], {}):
            return self._not_stored("empty")
        if messages and (reason := entries.refusal([ChatGeneration(message=m) for m in messages])):
            return self._not_stored(reason)
        try:
            answer = entries.encode_value(value)
        except (TypeError, ValueError):
            warn_once(
                "pipeline_value", "a pipeline returned neither text, messages nor plain JSON: its answers are not kept"
            )
            return self._not_stored("not_json")
        yield from self._store(found, answer, by_meaning=not any(m.tool_calls for m in messages), digest="")

    def invalidation(
        self, sources: Collection[str] | None, tenant: str | None, user: str | None
    ) -> tuple[list[str], list[list[str]]]:
        """Return the things to invalidate and the groups of sets whose entries are to be removed.

        Raises:
            AegisConfigError: Nothing that can be invalidated was named.
        """
        if isinstance(sources, str):
            raise AegisConfigError("sources must be a collection of ids; write sources=[id]")
        for name, value in (("tenant", tenant), ("user", user), *(("a source", s) for s in sources or ())):
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise AegisConfigError(f"{name} must be a text that is not blank, got {value!r}")
        thing = self.keyring.thing
        if sources is not None and user is None:
            if tenant is None:
                names = [thing("source", s) for s in sources]
                return names, [[n] for n in names]
            mine = thing("tenant", tenant)
            pairs = [(thing("tenant-source", mine, s), thing("source", s)) for s in sources]
            return [p[0] for p in pairs], [[p[1], mine] for p in pairs]
        if sources is None and tenant is not None and user is not None:
            return [thing("tenant-user", tenant, user)], [[thing("user", user), thing("tenant", tenant)]]
        if sources is None and (tenant is not None or user is not None):
            name = thing("tenant", tenant) if tenant is not None else thing("user", user)
            return [name], [[name]]
        raise AegisConfigError(
            "invalidate by sources, tenant, user, tenant and user, or tenant and sources; or clear()"
        )

    def min_similarity(self) -> tuple[str, float]:
        """Return the embedder's name and the lowest cosine that is served with it."""
        name = self.embedder.name or ""
        if self.options.min_similarity is not None:
            return name, self.options.min_similarity
        value, known = thresholds(name, self.options.settings.mode)
        if not known:
            warn_once(
                f"uncalibrated:{name}",
                f"no threshold was calibrated for the embedder {name!r}: {value} is used; min_similarity= sets another",
            )
        return name, value

    # -- parts ----------------------------------------------------------------------------------------------------

    def _open(self) -> tuple[Keyring, Store]:
        opened = self._opened
        if opened is None:
            with self.lock:
                if (opened := self._opened) is None:
                    o = self.options
                    keyring = Keyring(
                        load_secret(o.settings), namespace=o.settings.namespace,
                        share_within_tenant=o.share_within_tenant,
                        scope_ignore=o.scope_ignore, find_question=o.find_question,
                        allow_unnamed_models=o.allow_unnamed_models,
                    )  # fmt: skip
                    opened = keyring, Store(o.settings.namespace, keyring.mac_key, keyring.fingerprint)
                    self._opened = opened
        return opened

    def _policy(self) -> Policy:
        return Policy(
            semantic=not self.embedder.missing,
            embedder=self.min_similarity,
            k=self.options.k,
            guards_off=self.options.guards_off,
            budget_s=self.options.settings.op_budget_s,
        )

    def _who(self) -> Who | None:
        """Return whose call it is, or None if the cache must not be used for it."""
        if not self.options.settings.cache_enabled or current().cache == "off":
            self._bypassed("off")
            return None
        try:
            tenant, user = who(self.options.settings.tenant_key, self.options.settings.user_key)
        except AegisConfigError as exc:
            warn_once(
                "bad_identity", f"a call names a tenant or user that cannot be used ({exc}); it bypasses the cache"
            )
            self._bypassed("bad_identity")
            return None
        if self._tenant_missing(tenant is not None):
            self._bypassed("no_tenant")
            return None
        self._seen_tenant = self._seen_tenant or tenant is not None
        return Who(tenant=tenant, user=user, task=current().task)

    def _tenant_missing(self, tenanted: bool) -> bool:
        required = self.options.require_tenant
        if tenanted or required is False or (required == "auto" and not self._seen_tenant):
            return False
        warn_once(
            "no_tenant",
            "a call names no tenant although others do: it bypasses the cache. Put it inside aegis_scope(tenant=...), "
            "or say AegisSemanticCache(require_tenant=False)",
        )
        return True

    def _served(self, found: Lookup, decode: Callable[..., T | None]) -> T | None:
        answer: T | None = None
        if found.record is not None:
            marks = {
                "tier": found.tier,
                "similarity": round(found.similarity or 0.0, 4),
                "age_s": round(max(0, _now_ms() - found.record.created_ms) / 1000, 3),
                "lookup_id": uuid.uuid4().hex,
            }
            answer = decode(found.record.answer, marks=marks)
            if answer is None:
                found.record, found.tier, found.similarity, found.reasons = None, "miss", None, ("unreadable",)
        with self.lock:
            self.counts.tiers[found.tier] += 1
            self.counts.reasons.update(found.reasons)
        if self.options.on_lookup is not None:
            try:
                self.options.on_lookup(found)
            except Exception as exc:  # somebody else's code must not cost the user his call
                warn_once("on_lookup", f"on_lookup raised {type(exc).__name__}")
        return None if self.options.dry_run else answer

    def _recall(self, prompt: str, llm_string: str, told: Who) -> Lookup | None:
        for pending in _pending.get():
            if (pending.engine, pending.prompt, pending.llm_string, pending.who) == (
                self._identity,
                prompt,
                llm_string,
                told,
            ):
                _pending.set(tuple(p for p in _pending.get() if p is not pending))
                return pending.found
        return None

    def _store(self, found: Lookup, answer: bytes, *, by_meaning: bool, digest: str) -> Flow[None]:
        key, o = found.key, self.options
        if found.epochs is None:  # not known since when nothing was invalidated: it could be outdated already
            return self._not_stored(found.reasons[0] if found.reasons else "redis_down")
        if len(answer) > o.settings.max_entry_bytes:
            return self._not_stored("too_large")
        if not found.vector and found.late is not None and found.late.done() and not found.late.cancelled():
            take_vector(found, None if found.late.exception() else pack(found.late.result()), self._policy(),
                        self.keyring.profile_key)  # fmt: skip
        by_meaning = by_meaning and bool(found.vector) and found.profile is not None
        scope, thing = current(), self.keyring.thing
        ids = sorted(scope.sources.ids()) if scope.sources is not None else []
        sources = [thing("source", s) for s in ids]
        extra = [thing("tenant-source", key.tenant, s) for s in ids]
        if o.share_within_tenant:  # another user may be served this: his lookup does not ask for this one's epochs
            extra += [t for t in key.things if t.startswith(("user:", "tenant-user:"))]
        ttl_s = scope.ttl_s or o.ttl_by_task.get(key.task) or o.settings.ttl_s
        now_ms = _now_ms()
        record = entries.Record(
            key=key.exact, scope=key.scope if by_meaning else "", emb=found.embedder if by_meaning else "",
            digest=digest,
            created_ms=now_ms, expires_ms=now_ms + int(ttl_s * 1000), epochs=found.epochs.stamp(), answer=answer,
            profile=found.profile.encode() if by_meaning and found.profile is not None else b"",
            vec=found.vector if by_meaning else b"", src=tuple(sources + extra), task=key.task,
            question=(key.question or "") if o.keep_questions else "",
        )  # fmt: skip
        sets = [key.tenant, *([key.user] if key.user is not None else []), *sources]
        try:
            reply = yield from self.store.put(
                record, things=[*key.things, *sources, *extra], sets=sets, now_ms=now_ms, tenanted=key.tenanted
            )
        except Unavailable as exc:
            return self._not_stored(exc.reason)
        if reply != "stored":
            return self._not_stored(reply)
        with self.lock:
            self.counts.stored += 1

    def _bypassed(self, reason: str) -> None:
        with self.lock:
            self.counts.reasons[reason] += 1

    def _not_stored(self, reason: str) -> None:
        with self.lock:
            self.counts.not_stored[reason] += 1


def _model_digest(generations: Sequence[Generation]) -> str:
    for generation in generations:
        if isinstance(generation, ChatGeneration) and isinstance(generation.message, AIMessage):
            return str(generation.message.response_metadata.get("model_digest") or "")
    return ""


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
