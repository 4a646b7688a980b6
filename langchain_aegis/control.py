"""What a user does with a cache besides asking it: look into it, correct it, empty it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage, HumanMessage
from redis.exceptions import RedisError

from langchain_aegis import invalidations
from langchain_aegis.breaker import Unavailable
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.explain import explain_call, explain_pipeline, explain_question
from langchain_aegis.flows import Flow, arun, run
from langchain_aegis.keys import Key
from langchain_aegis.lookup import Lookup, embed, guard_codes
from langchain_aegis.nearby import ranked
from langchain_aegis.performer import Performer, unfit
from langchain_aegis.questions import exact_only_reason
from langchain_aegis.replays import dumped
from langchain_aegis.reports import read_lookup_id
from langchain_aegis.results import CacheHealth, CacheStats, Entry, Explanation, Verdict, was_cached
from langchain_aegis.steps import Work
from langchain_aegis.store import Invalidation
from langchain_aegis.updates import now_ms
from langchain_aegis.vectors import pack, similarities
from langchain_aegis.verification import compare, nearness, profile
from langchain_aegis.wakers import running_loop

_NEAR = 100  # at most so many entries near a question are removed in one step


class Control(Performer):
    """Invalidation, reports, explanations, figures."""

    _judged: dict[str, bytes]

    # -- removing -------------------------------------------------------------------------------------------------

    def invalidate(
        self,
        *,
        sources: Collection[str] | None = None,
        tenant: str | None = None,
        user: str | None = None,
        task: str | None = None,
        model: str | None = None,
        older_than_s: float | None = None,
        near: str | None = None,
    ) -> int:
        """Remove answers; name one of the following, alone or together with `tenant`, or `tenant` alone.

        When this returns, none of them is served any more, nor is any whose making began before. Their memory is
        given back in the background.

        Args:
            sources: Those that rest on any of these documents.
            tenant: Those of this tenant.
            user: Those of this user.
            task: Those of this task.
            model: Those of this model; "pipeline:NAME" for a pipeline's.
            older_than_s: Those that were made longer ago than so many seconds.
            near: Those to questions that are as near to this one as a hit has to be.

        Returns:
            How many entries were concerned; with `older_than_s` those that had to be looked for in the background
            are not in it.

        Raises:
            AegisConfigError: Nothing that can be invalidated was named, or the entries were written with another
                secret, or there is no embedder for `near`.
            AegisConnectionError: Redis did not answer; call again.
        """
        told = _named(sources, tenant, user, task, model, older_than_s, near)
        return self._insist(lambda: self._invalidation(told))

    async def ainvalidate(
        self,
        *,
        sources: Collection[str] | None = None,
        tenant: str | None = None,
        user: str | None = None,
        task: str | None = None,
        model: str | None = None,
        older_than_s: float | None = None,
        near: str | None = None,
    ) -> int:
        """Like `invalidate`."""
        told = _named(sources, tenant, user, task, model, older_than_s, near)
        return await self._ainsist(lambda: self._invalidation(told))

    def clear(self, **kwargs: Any) -> None:
        """Remove every entry of the namespace.

        Raises:
            AegisConnectionError: Redis did not answer; nothing is promised, call again.
            AegisConfigError: The entries were written with another secret.
        """
        self._insist(self._clearing)

    async def aclear(self, **kwargs: Any) -> None:
        """Remove every entry of the namespace; raises as `clear`."""
        await self._ainsist(self._clearing)

    def report_wrong(self, message_or_lookup_id: BaseMessage | str) -> bool:
        """Say that a cached answer was wrong: it is removed, and never again served for the question that got it.

        Args:
            message_or_lookup_id: A message that `was_cached`, or the `lookup_id` in its marks; the id may come from
                another process, and back from a browser.

        Returns:
            Whether the entry was still there.

        Raises:
            AegisConfigError: It is no cached message of this cache, nor a lookup id.
            AegisConnectionError: Redis did not answer; call again.
        """
        return self._insist(lambda: self._reporting(message_or_lookup_id))

    async def areport_wrong(self, message_or_lookup_id: BaseMessage | str) -> bool:
        """Like `report_wrong`."""
        return await self._ainsist(lambda: self._reporting(message_or_lookup_id))

    def opt_out(self, user: str) -> int:
        """Keep nothing of a user from now on, serve him nothing, and remove what is kept; returns how many entries.

        Holds for all processes until `opt_in`. Raises as `invalidate`.
        """
        told = _named(user=user)
        return self._insist(lambda: self._opting(told, out=True))

    async def aopt_out(self, user: str) -> int:
        """Like `opt_out`."""
        told = _named(user=user)
        return await self._ainsist(lambda: self._opting(told, out=True))

    def opt_in(self, user: str) -> None:
        """Take `opt_out` back. Raises as `invalidate`."""
        told = _named(user=user)
        self._insist(lambda: self._opting(told, out=False))

    async def aopt_in(self, user: str) -> None:
        """Like `opt_in`."""
        told = _named(user=user)
        await self._ainsist(lambda: self._opting(told, out=False))

    # -- looking into it ------------------------------------------------------------------------------------------

    def judge(self, cached_question: str, new_question: str) -> Verdict:
        """Say whether the answer to `cached_question` would be served for `new_question`; asks no Redis.

        Raises:
            AegisConfigError: There is no embedder.
        """
        vectors = [self._vector_of(question) for question in (cached_question, new_question)]
        similarity = similarities(vectors[1], vectors[:1])[0]
        reasons = [r for q in (cached_question, new_question) if (r := exact_only_reason(q)) is not None]
        lowest = self._engine.min_similarity()[1]
        if not similarity >= lowest:
            reasons.append("below_threshold")
        off, room = self._engine.options.guards_off, nearness(similarity, lowest)
        reasons += guard_codes(compare(profile(cached_question), profile(new_question), off=off, near=room))
        return Verdict(not reasons, similarity, tuple(dict.fromkeys(reasons)))

    async def ajudge(self, cached_question: str, new_question: str) -> Verdict:
        """Like `judge`."""
        return await asyncio.to_thread(self.judge, cached_question, new_question)

    def explain(
        self,
        question: str | None = None,
        *,
        prompt: str | Sequence[BaseMessage] | None = None,
        model: Any = None,
        llm_string: str | None = None,
        pipeline: str | None = None,
        version: str = "",
    ) -> Explanation:
        """Say what the cache would do with a call, and why; nothing is counted, stored or changed.

        Whose call it is comes from `aegis_scope`, as for any call.

        Args:
            question: A question alone, which is compared with what is near it in any scope; or that of `pipeline`.
                Texts of other tenants' and users' questions are not shown.
            prompt: A model's whole prompt, a text or messages. Entries of other scopes that are near are listed too,
                with the fields of the scope that differ.
            model: The chat model that `prompt` is for.
            llm_string: What LangChain's cache interface calls so, in place of `model`.
            pipeline: Name given to `get_or_generate`.
            version: Version given to `get_or_generate`.

        Raises:
            AegisConfigError: It is not said what to explain.
        """
        self._written()
        return run(self._explanation(question, prompt, model, llm_string, pipeline, version), self._perform)

    async def aexplain(
        self,
        question: str | None = None,
        *,
        prompt: str | Sequence[BaseMessage] | None = None,
        model: Any = None,
        llm_string: str | None = None,
        pipeline: str | None = None,
        version: str = "",
    ) -> Explanation:
        """Like `explain`."""
        await self._awritten()
        return await arun(self._explanation(question, prompt, model, llm_string, pipeline, version), self._aperform)

    @property
    def min_similarity(self) -> float:
        """Lowest cosine that is served: as given, else calibrated for the embedder and the mode."""
        return self._engine.min_similarity()[1]

    def stats(self) -> CacheStats:
        """Return what this cache has done in this process, with what is being stored just now.

        In an event loop nothing is waited for: there, what is being stored counts as soon as it is.
        """
        if running_loop() is None:
            self._written()
        stats, tier = self._engine.stats(), self._connections.tier
        return stats if tier is None else replace(stats, local=tier.stats())

    def health(self) -> CacheHealth:
        """Return what the namespace holds in Redis, for all processes; never raises for a fault of Redis."""
        self._written()
        try:
            held = run(self._engine.store.held(now_ms()), self._perform)
        except (Unavailable, RedisError):
            held = None
        return self._health(held)

    async def ahealth(self) -> CacheHealth:
        """Like `health`."""
        await self._awritten()
        try:
            held = await arun(self._engine.store.held(now_ms()), self._aperform)
        except (Unavailable, RedisError):
            held = None
        return self._health(held)

    def validate(self) -> None:
        """Look whether Redis can be used as it is, for those who want to know before the first call; writes nothing.

        Without it, all that it raises is a warning at the first call, and every call is a miss.

        Raises:
            AegisConfigError: Redis refuses the user or the password, or what the cache needs; its certificate is not
                believed; it is a node of a Cluster; another index has the name of ours; the namespace was written with
                another secret.
            AegisConnectionError: Redis does not answer.
        """
        try:
            run(self._checking(), self._perform)
        except (Unavailable, RedisError) as exc:
            raise unfit(exc) from exc

    async def avalidate(self) -> None:
        """Like `validate`, without blocking the event loop."""
        try:
            await arun(self._engine.ready(), self._aperform)
            await arun(self._checking(), self._aperform)
        except (Unavailable, RedisError) as exc:
            raise unfit(exc) from exc

    def entries(self) -> Iterator[Entry]:
        """Yield every stored answer that can be served, without its text, in no particular order.

        Raises:
            AegisConnectionError: Redis did not answer.
        """
        cursor, time_ms = 0, now_ms()
        while True:
            cursor, records = self._insist(partial(self._engine.store.records, cursor))
            for listed in records:
                record = listed.record
                if not listed.alive or record.expires_ms <= time_ms:
                    continue
                yield Entry(
                    key=record.key,
                    by_meaning=bool(record.vec),
                    task=record.task,
                    age_s=(time_ms - record.created_ms) / 1000,
                    ttl_s=(record.expires_ms - time_ms) / 1000,
                    bytes=len(record.answer),
                    sources=sum(s.startswith("source:") for s in record.src),
                    question=record.question,
                )
            if not cursor:
                return

    # -- parts ----------------------------------------------------------------------------------------------------

    def _clearing(self) -> Flow[int]:
        removed = yield from self._engine.store.clear(now_ms=now_ms())
        self._sweep()
        return removed

    def _invalidation(self, told: dict[str, Any]) -> Flow[int]:
        store = self._engine.store
        wanted = invalidations.plan(self._engine.keyring, now_ms=now_ms(), **told)
        vector, embedder = b"", ""
        if told["near"] is not None:  # before anything is marked: without a vector nothing can be found
            vector, embedder, lowest = yield from self._embedded(told["near"])
        count = yield from store.invalidate(wanted)
        if vector:
            count = yield from self._remove_near(vector, embedder, lowest, told["tenant"])
        self._sweep()
        return count

    def _checking(self) -> Flow[None]:
        yield from self._engine.store.check("", 0)  # before an embedder is waited for
        found = Lookup(Key("", "", "What is checked?", None, (), "", None, False))
        if not self._engine.embedder.missing:
            yield from embed(found, self._engine.policy(), b"")
        if found.vector:
            yield from self._engine.store.check(found.embedder, len(found.vector) // 2)

    def _embedded(self, question: str) -> Flow[tuple[bytes, str, float]]:
        found = Lookup(Key("", "", question.strip(), None, (), "", None, False))
        if not self._engine.embedder.missing:
            yield from embed(found, self._engine.policy(), b"")
        if not found.vector:
            raise AegisConfigError(
                f"near= needs an embedder that answers ({', '.join(found.reasons) or 'there is none'})"
            )
        return found.vector, found.embedder, found.min_similarity

    def _remove_near(self, vector: bytes, embedder: str, lowest: float, tenant: str | None) -> Flow[int]:
        store, thing = self._engine.store, self._engine.keyring.thing
        owner = thing("tenant", tenant) if tenant is not None else None
        if not (yield from store.finds_all(embedder)):
            return (yield from self._remove_near_one_by_one(vector, embedder, lowest, owner))
        removed = 0
        while True:
            epochs = yield from store.epochs(())
            if epochs is None:
                return removed
            near = yield from store.nearest_anywhere(embedder, vector, _NEAR, epochs, 2_000, tenant=owner, unread=True)
            keys = tuple(n.record.key for n in near if n.similarity >= lowest)
            if not keys:
                return removed
            removed += yield from store.invalidate(Invalidation(near=keys))
            if len(keys) < _NEAR:
                return removed

    def _remove_near_one_by_one(self, vector: bytes, embedder: str, lowest: float, owner: str | None) -> Flow[int]:
        """Look at every record of the namespace, where a search would not find all."""
        store, removed, cursor = self._engine.store, 0, 0
        while True:
            cursor, found = yield from store.records(cursor, unread=True)
            records = [one.record for one in found if one.alive and one.record.emb == embedder]
            near = ranked(vector, [r for r in records if owner is None or owner in r.sets[:1]])
            if keys := tuple(n.record.key for n in near if n.similarity >= lowest):
                removed += yield from store.invalidate(Invalidation(near=keys))
            if not cursor:
                return removed

    def _opting(self, told: dict[str, Any], *, out: bool) -> Flow[int]:
        yield from self._engine.store.opt(self._engine.keyring.thing("user", told["user"]), out)
        return (yield from self._invalidation(told)) if out else 0

    def _reporting(self, message_or_lookup_id: BaseMessage | str) -> Flow[bool]:
        told: Any = message_or_lookup_id
        if isinstance(told, BaseMessage):
            told = (was_cached(told) or {}).get("lookup_id")
        known = self._engine.keyring.seal.mac_keys
        keys = next(filter(None, (read_lookup_id(mac_key, told) for mac_key in known)), None)
        if keys is None:
            raise AegisConfigError(
                "report_wrong takes a message that was_cached(), or the lookup_id in its marks; this is none of a "
                "cache with this secret"
            )
        asked, served = keys
        return (yield from self._engine.store.report(served, asked))

    def _explanation(
        self, question: str | None, prompt: str | Sequence[BaseMessage] | None, model: Any, llm_string: str | None,
        pipeline: str | None, version: str,
    ) -> Flow[Explanation]:  # fmt: skip
        if question is not None and not (isinstance(question, str) and question.strip()):
            raise AegisConfigError(f"question must be a text that is not blank, got {question!r}")
        if prompt is not None:
            if (model is None) == (llm_string is None) or question is not None or pipeline is not None:
                raise AegisConfigError("explain a prompt together with its model (or its llm_string), and nothing else")
            if llm_string is None and not isinstance(model, BaseChatModel):
                raise AegisConfigError(f"model must be the chat model that is called, got {type(model).__name__}")
            told = prompt if isinstance(prompt, str) and llm_string is not None else None
            text = told if told is not None else (yield Work(partial(_dumped, prompt)))
            named = llm_string if llm_string is not None else model._get_llm_string()
            return (yield from explain_call(self._engine, text, named))
        if question is None:
            raise AegisConfigError("say what to explain: question=, or prompt= and model=")
        if pipeline is not None:
            return (yield from explain_pipeline(self._engine, question, pipeline, version))
        return (yield from explain_question(self._engine, question))

    def _health(self, held: tuple[int, int] | None) -> CacheHealth:
        entries, tenants = held or (0, 0)
        return CacheHealth(held is not None, self._engine.store.search, entries, tenants, self._engine.embedder.name)

    def _vector_of(self, question: str) -> bytes:
        if (vector := self._judged.get(question)) is not None:
            return vector
        try:
            packed = pack(self._engine.embedder.get().embed_query(question))  # no budget: nobody waits for an answer
        except Unavailable as exc:
            raise AegisConfigError("judge needs an embedder: give embeddings=, or see `aegis doctor`") from exc
        if packed is None:
            raise AegisConfigError("the embedder returned a vector without a direction (zeros, NaN or infinity)")
        if len(self._judged) >= 4096:
            self._judged.clear()
        self._judged[question] = packed
        return packed


def _named(
    sources: Collection[str] | None = None, tenant: str | None = None, user: str | None = None,
    task: str | None = None, model: str | None = None, older_than_s: float | None = None, near: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "sources": sources, "tenant": tenant, "user": user, "task": task, "model": model,
        "older_than_s": older_than_s, "near": near,
    }  # fmt: skip


def _dumped(prompt: str | Sequence[BaseMessage]) -> str:
    """Return a prompt as LangChain hands it to a cache."""
    return dumped([HumanMessage(prompt)] if isinstance(prompt, str) else prompt)
