"""What the cache does between LangChain's call and Redis: decides, looks up, stores, counts.

No method here is asynchronous: what needs I/O is a flow, and the cache drives it blocking or awaited.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, TypeVar

from langchain_core.outputs import Generation

from langchain_aegis import entries
from langchain_aegis.breaker import Unavailable
from langchain_aegis.cache_options import never
from langchain_aegis.counts import cost_of
from langchain_aegis.digests import Asked, asked_for
from langchain_aegis.flows import Flow
from langchain_aegis.keys import Key, Who
from langchain_aegis.lookup import LONG, Begun, Lookup, find, same_model, serve_exact
from langchain_aegis.notices import warn_once
from langchain_aegis.reports import lookup_id
from langchain_aegis.results import CacheStats
from langchain_aegis.scope import current
from langchain_aegis.stamps import note_lookup, recall, remember
from langchain_aegis.updates import Updates, now_ms
from langchain_aegis.writes import the_writer

T = TypeVar("T")


_LONG_UNREAD = 30_000  # characters of a prompt of which a digest is made in a thread: beyond, it takes milliseconds
_LONGEST_S = 10 * 365 * 86_400  # beyond, Redis could not count


class Engine(Updates):
    """The cache without its two drivers."""

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
            found = yield from self.find(key, asked=asked_for(llm_string))
            return self._told(found, prompt, llm_string, told)
        if key == "unnamed_model":
            warn_once(
                "unnamed_model",
                "this model's cache key names no model, so answers of different models would mix (plain ChatOllama is "
                "such a one): nothing is cached. Use ChatAegis, or AegisSemanticCache(allow_unnamed_models=True)",
            )
        self.counts.bypassed(key)
        return None

    def begin(self, prompt: str, llm_string: str) -> Begun | None:
        """Begin the lookup of a model's call without a flow, whose steps cost as much as asking Redis.

        What this returns is sent and `answer` is asked, then `go_on` if that cannot say. None: `lookup` has to do all.
        """
        if self._opened is None or self.options.bypass is not never or self._is_long(prompt):
            return None
        note_lookup("")
        told, policy = self.caller(), self.policy()
        if isinstance(told, str) or policy.touch or current().cache == "refresh":
            return None
        key = self._locate(prompt, llm_string, told)
        if isinstance(key, str) or the_writer.pending(key.exact) is not None:
            return None
        request = self.store.request(key.exact, key.things, key.tenant, key.user)
        begun = Begun(Lookup(key, began_ms=now_ms(), asked=asked_for(llm_string)), policy, request, told)
        if self.expected.miss(key.exact) and key.length <= LONG:
            begun.meanwhile = key.resolve
        return begun

    def answer(self, begun: Begun, prompt: str, llm_string: str) -> tuple[list[Generation] | None] | None:
        """Return what is served (in a tuple, since it may be None) if the replies say all; None: `go_on`."""
        found, replies = begun.found, begun.replies
        if isinstance(replies, Unavailable) or (read := self.store.at_once(found.key.exact, *replies)) is None:
            return None
        record, epochs = read
        if epochs.opted_out or (record.digest and not found.asked.look()) or not serve_exact(found, record, now_ms()):
            return None
        found.epochs, found.asked_s = epochs, begun.took_s
        note_lookup(found.moment)
        if not self._heeded(found):
            found.record, found.tier, found.similarity = None, "miss", None
            return None
        self.expected.hit(found.key.exact)
        return (self._told(found, prompt, llm_string, begun.told),)

    def go_on(self, begun: Begun, prompt: str, llm_string: str) -> Flow[list[Generation] | None]:
        """Go on with a lookup that more must be asked for, or that Redis did not answer."""
        self.expected.missed()
        return self._told((yield from self.find(begun.found.key, begun)), prompt, llm_string, begun.told)

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

    def find(self, key: Key, begun: Begun | None = None, *, asked: Asked | None = None) -> Flow[Lookup]:
        """Look `key` up; a refresh only sees to it that no earlier answer is kept."""
        serve = current().cache != "refresh"
        policy = self.policy() if begun is None else begun.policy
        found = yield from find(
            self.store, key, policy, now_ms, self.keyring.profile_key, serve=serve, begun=begun, asked=asked
        )
        note_lookup(found.moment)
        yield from self.heed(found)
        if found.tier != "exact" and key.scope:
            self.scopes.saw(key.scope, key.fields)
        return found

    def heed(self, found: Lookup) -> Flow[None]:
        """Learn what the namespace says, and serve nothing to a call that names no tenant although it should."""
        if not self._heeded(found):
            yield from self._release(found)
            found.record, found.tier, found.similarity, found.epochs, found.stale = None, "miss", None, None, None
            found.reasons = ("no_tenant",)

    def _heeded(self, found: Lookup) -> bool:
        """Learn what the namespace says; return whether the call may be served."""
        if found.epochs is not None:
            self._seen_tenant = self._seen_tenant or found.epochs.tenanted
            if found.epochs.trash:
                self.wake_sweeper()
        return not self._tenant_missing(found.key.tenanted)

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
        if (
            found.stale is None
            or not same_model(found, found.stale)
            or now_ms() >= found.stale.fresh_ms + self.options.stale_if_error_ms
        ):
            return False
        found.record, found.tier, found.similarity = found.stale, "exact", 1.0
        return True

    # -- parts ----------------------------------------------------------------------------------------------------

    def _told(self, found: Lookup, prompt: str, llm_string: str, told: Who | str) -> list[Generation] | None:
        """Return what is served for a model's call; a miss is kept in mind for the update."""
        answer = self._served(found, entries.decode_answer)
        if answer is None:
            remember(self._identity, prompt, llm_string, told, found)
        return answer

    def _served(self, found: Lookup, decode: Callable[..., T | None]) -> T | None:
        answer: T | None = None
        if found.tier == "semantic" and self.shadow is not None and not self.options.dry_run and self.shadow.draw():
            found.shadowed, found.record = found.record, None
            found.tier, found.similarity, found.reasons = "miss", None, ("shadow",)
        if found.record is not None:
            record = found.record
            found.lookup_id = lookup_id(self.keyring.seal.mac_keys[0], found.key.exact, record.key)
            marks = {
                "tier": found.tier,
                "similarity": round(found.similarity or 0.0, 4),
                "age_s": max(0, now_ms() - record.created_ms) / 1000,
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
