"""Where an answer belongs, and how it is stored.

No method here is asynchronous: what needs I/O is a flow, and the cache drives it blocking or awaited. The last step of
a flow that stores is done in the background, see `writes`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, TypeVar

from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGeneration, Generation

from langchain_aegis import entries
from langchain_aegis.breaker import Unavailable
from langchain_aegis.cache_options import Options, never
from langchain_aegis.calibration import Calibration, thresholds
from langchain_aegis.counts import Counts
from langchain_aegis.digests import began_s
from langchain_aegis.embedder import Embedder
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.expected import Expected
from langchain_aegis.flows import Flow, Settle
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.home import load_secret, record_secrets
from langchain_aegis.keys import Declined, Key, Keyring, Who, written_fields
from langchain_aegis.lookup import LONG, Lookup, Policy, embed, resolved, take_vector
from langchain_aegis.notices import warn_once
from langchain_aegis.questions import exact_only_reason, find_question
from langchain_aegis.results import was_cached
from langchain_aegis.scope import Scope, current, tenants_named, who
from langchain_aegis.scopes_seen import ScopesSeen
from langchain_aegis.shadow import Shadow
from langchain_aegis.stamps import forgotten, recall
from langchain_aegis.steps import Work
from langchain_aegis.store import Store
from langchain_aegis.vectors import pack, similarities
from langchain_aegis.verification import compare, profile
from langchain_aegis.writes import the_writer

T = TypeVar("T")


_LONG_UNREAD = 30_000  # characters of a prompt of which a digest is made in a thread: beyond, it takes milliseconds
_HOUR_S = 3_600  # clocks of servers differ by less
_LONGEST_S = 10 * 365 * 86_400  # beyond, Redis could not count


@dataclass(frozen=True, slots=True)
class Later:
    """Do the rest in the background.

    Attributes:
        rest: Makes the flow that does it.
        exact: The exact key of what it stores.
        scope: Its scope, or ""; the store's prefix if that is not known yet.
        size: Bytes of the answer.
        place: The namespace.
    """

    rest: Callable[[], Flow[None]]
    exact: str
    scope: str
    size: int
    place: str


@dataclass(slots=True)
class _Made:
    """An answer, and what held where it was made."""

    answer: bytes
    by_meaning: bool = field(kw_only=True)
    negative: bool = field(kw_only=True)
    unasked: bool = False  # it was not looked up
    began_s: float = 0.0  # when its making began, by its server's clock; 0.0 if it does not say
    at_ms: int = 0
    ttl_s: float | None = None
    sources: frozenset[str] = frozenset()
    inherited: frozenset[str] = frozenset()

    def note(self, scope: Scope) -> None:
        """Keep what is said around the call now: when the answer is stored, others may have said other things."""
        self.at_ms, self.ttl_s = now_ms(), scope.ttl_s
        if scope.sources is not None:
            self.sources, self.inherited = scope.sources.ids(), scope.sources.inherited()


class Updates:
    """What the cache knows, and its half that stores."""

    def __init__(self, options: Options, embedder: Embedder) -> None:
        self.options = options
        self.embedder = embedder
        self.counts = Counts()
        self.scopes = ScopesSeen()
        self.expected = Expected()
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

    # -- one call -------------------------------------------------------------------------------------------------

    def located(self, prompt: str, llm_string: str, told: Who) -> Flow[Key | str]:
        """Return where the answer belongs, or the reason why the cache is not used."""
        key = yield from self._located(prompt, llm_string, told)
        if isinstance(key, Key):
            yield from resolved(key)
        return key

    def _located(self, prompt: str, llm_string: str, told: Who) -> Flow[Key | str]:
        """Return the same; of the key only what an exact repeat needs is known."""
        yield from self.ready()
        if self._is_long(prompt):
            located: Key | str = yield Work(partial(self._locate, prompt, llm_string, told))
            return located
        return self._locate(prompt, llm_string, told)

    def _is_long(self, prompt: str) -> bool:
        # Where an option asks for the question, all of the prompt has to be read now.
        return len(prompt) > (LONG if self.options.bypass is not never or self.options.scope_ignore else _LONG_UNREAD)

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
            if not isinstance(key := (yield from self._located(prompt, llm_string, told)), Key):
                return
            found = Lookup(key, began_ms=now_ms(), epochs=self.store.recent_epochs())
            if found.epochs is None:
                try:
                    found.epochs = yield from self.store.epochs(key.things, tenant=key.tenant, user=key.user)
                except Unavailable as exc:
                    return self.counts.not_stored(exc.reason)
            if (first := forgotten(self._identity)) is not None:  # it may have been looked up as long ago as that
                found.epochs, found.began_ms = first.found.epochs, first.found.began_ms
        try:
            answer = entries.encode_answer(generations)
        except (TypeError, ValueError):
            return (yield from self.give_up(found, "not_json"))
        negative = self.options.negative(generations[0].text)
        by_meaning = len(generations) == 1 and not entries.calls_tools(generations) and not negative
        made = _Made(answer, by_meaning=by_meaning, negative=negative, unasked=pending is None,
                     began_s=began_s(generations))  # fmt: skip
        yield from self._store(found, made)

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
        yield from self._store(found, _Made(answer, by_meaning=by_meaning, negative=negative))

    def give_up(self, found: Lookup | None, reason: str) -> Flow[None]:
        """Note that an answer is not kept; whoever waits for it need not any longer."""
        self.counts.not_stored(reason)
        if found is not None:
            yield from self._release(found)

    def _release(self, found: Lookup) -> Flow[None]:
        if found.fence:
            with contextlib.suppress(Unavailable):
                yield from self.store.release(found.key.exact, found.fence)

    # -- parts ----------------------------------------------------------------------------------------------------

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
                embedded_by=self.embedder.asked,
            )
        return replace(made, **changes) if changes else made

    def _open(self) -> tuple[Keyring, Store]:
        opened = self._opened
        if opened is None:
            with self._lock:
                if (opened := self._opened) is None:
                    o = self.options
                    secret = load_secret(o.settings)
                    keyring = Keyring(
                        secret, record_secrets=record_secrets(o.settings, secret), encrypt=o.settings.encrypt,
                        namespace=o.settings.namespace, share_within_tenant=o.share_within_tenant,
                        scope_ignore=o.scope_ignore, find_question=o.find_question,
                        allow_unnamed_models=o.allow_unnamed_models, labels=o.labels, chunks=o.chunks,
                    )  # fmt: skip
                    opened = keyring, Store(o.settings.namespace, keyring.seal, keyring.fingerprint)
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
        return _whose(tenant, user, scope.task)

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

    def _store(self, found: Lookup, made: _Made) -> Flow[None]:
        """Have an answer stored in the background; where many wait for that, this waits until there is room."""
        key = found.key
        if len(made.answer) > self.options.settings.max_entry_bytes:
            return (yield from self.give_up(found, "too_large"))
        made.note(current())
        until = time.monotonic() + self.options.settings.op_budget_s
        while (done := the_writer.crowded()) is not None:
            if (left_s := until - time.monotonic()) <= 0:
                return (yield from self.give_up(found, "queue_full"))
            yield Settle(done, left_s)
        # Of an answer that was not looked up, the question is found in the background: till then its scope is any.
        scope = self.store.prefix if made.unasked else key.scope
        place = self.options.settings.namespace
        self.expected.stored(key.exact)
        yield Later(partial(self._put, found, made), key.exact, scope, len(made.answer), place)

    def _put(self, found: Lookup, made: _Made) -> Flow[None]:
        """Store an answer, if it still may be."""
        key, o = found.key, self.options
        started = time.perf_counter()
        if found.shadowed is not None and self.shadow is not None:
            yield from self._compare(found.shadowed.answer, made.answer, self.shadow)
        if found.epochs is None:  # not known since when nothing was invalidated: it could be outdated already
            return self.counts.not_stored(found.reasons[0] if found.reasons else "redis_down")
        if made.unasked and (reason := (yield from self._learn(found))):
            return self.counts.not_stored(reason)
        if not (yield from found.asked.answered(made.began_s or found.began_ms / 1000 - _HOUR_S)):
            return (yield from self.give_up(found, "model_changed"))
        if not found.vector and found.late is not None and found.late.done() and not found.late.cancelled():
            take_vector(found, None if found.late.exception() else pack(found.late.result()), self.policy(),
                        self.keyring.profile_key)  # fmt: skip
        record, things = self._record(found, made)
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

    def _learn(self, found: Lookup) -> Flow[str | None]:
        """Do for an answer that was not looked up what its lookup would have done; return why it is not kept."""
        key = found.key
        try:
            now = yield from self.store.epochs(key.things, tenant=key.tenant, user=key.user)
        except Unavailable as exc:
            return exc.reason
        if now is not None and now.opted_out:
            return "opted_out"
        self._seen_tenant = self._seen_tenant or (now is not None and now.tenanted)
        if self._tenant_missing(key.tenanted):
            return "no_tenant"
        if key.question is not None and not self.embedder.missing:
            yield from embed(found, self.policy(), self.keyring.profile_key)
        return None

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

    def _record(self, found: Lookup, made: _Made) -> tuple[entries.Record, list[str]]:
        """Return what is stored, and everything whose invalidation concerns it."""
        key, o, epochs = found.key, self.options, found.epochs
        assert epochs is not None  # noqa: S101  # the caller has looked
        by_meaning = made.by_meaning and bool(found.vector) and found.profile is not None
        thing, ids, negative = self.keyring.thing, sorted(made.sources), made.negative
        sources = [thing("source", s) for s in ids]
        extra = [thing("tenant-source", key.tenant, s) for s in ids]
        if made.inherited:  # made from other kept answers: it goes with their documents, too
            inherited = made.inherited - {*sources, *extra}
            sources += sorted(name for name in inherited if name.startswith("source:"))
            extra += sorted(name for name in inherited if not name.startswith("source:"))
        if o.share_within_tenant:  # another user may be served this: his lookup does not ask for this one's epochs
            extra += [t for t in key.things if t.startswith(("user:", "tenant-user:"))]
        ttl_s = made.ttl_s or o.ttl_by_task.get(key.task) or o.settings.ttl_s
        ttl_s = min(ttl_s, o.negative_ttl_s if negative else _LONGEST_S)
        created_ms = found.began_ms or now_ms()  # an answer is as old as what was known when its making began
        fresh_ms = made.at_ms + int(ttl_s * 1000)
        stale_ms = 0 if negative else min(max(o.stale_while_revalidate_ms, o.stale_if_error_ms), _LONGEST_S * 1000)
        record = entries.Record(
            key=key.exact, scope=key.scope if by_meaning else "", emb=found.embedder if by_meaning else "",
            fields=written_fields(key.fields()), digest=found.asked.digest,
            created_ms=created_ms, fresh_ms=fresh_ms if stale_ms else 0, expires_ms=fresh_ms + stale_ms,
            epochs=epochs.stamp, answer=made.answer, negative=negative,
            profile=found.profile.encode() if by_meaning and found.profile is not None else b"",
            vec=found.vector if by_meaning else b"", src=tuple(sources + extra), sets=(*key.sets, *sources),
            task=key.task, question=(key.question or "") if o.keep_questions else "",
        )  # fmt: skip
        return record, [*key.things, *sources, *extra]


def _is_stale(messages: Sequence[BaseMessage]) -> str | None:
    """Return a reason code if an answer is an old one of a cache itself: as a new one it would live on."""
    return "stale" if any((was_cached(message) or {}).get("stale") for message in messages) else None


@lru_cache(maxsize=256)
def _whose(tenant: str | None, user: str | None, task: str | None) -> Who:
    return Who(tenant=tenant, user=user, task=task)


def now_ms() -> int:
    """Return the unix time in milliseconds."""
    return time.time_ns() // 1_000_000
