"""The semantic cache that LangChain calls: `set_llm_cache(AegisSemanticCache())`."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from langchain_core.caches import RETURN_VAL_TYPE, BaseCache
from langchain_core.embeddings import Embeddings
from redis.exceptions import RedisError

from langchain_aegis.breaker import Unavailable
from langchain_aegis.cache_options import Bypass, Options
from langchain_aegis.connections import Connections
from langchain_aegis.embedder import Embedder
from langchain_aegis.engine import Engine
from langchain_aegis.errors import AegisConfigError, AegisConnectionError
from langchain_aegis.flows import Flow, arun, run
from langchain_aegis.keys import FindQuestion
from langchain_aegis.lookup import Embed, Lookup, guard_codes
from langchain_aegis.notices import logger, warn_once
from langchain_aegis.questions import exact_only_reason
from langchain_aegis.results import Answer, CacheHealth, CacheStats, Verdict
from langchain_aegis.scope import aegis_scope, current
from langchain_aegis.settings import AegisSettings, Mode
from langchain_aegis.vectors import pack, similarities
from langchain_aegis.verification import compare, profile

T = TypeVar("T")


class AegisSemanticCache(BaseCache):
    """A cache with an exact and a semantic tier on Redis, that never serves another question's answer.

    No argument is needed: settings come from the environment (`AegisSettings`), and nothing is read or connected
    before the first use. A fault of Redis or of the embedder is a miss, never an exception.

    Args:
        redis_url: `redis://`, `rediss://` or `unix://`; default `REDIS_URL`.
        embeddings: What embeds questions; default `OLLAMA_MODEL_EMBEDDINGS`, else bge-m3 if the Ollama server has
            it, else none: then only exact repeats are answered.
        redis: A redis-py client whose server and credentials are used instead of `redis_url`.
        redis_kwargs: Further arguments of redis-py's connections.
        namespace: First part of every name in Redis.
        mode: "strict", "balanced" or "lenient": which calibrated threshold is used.
        min_similarity: Lowest cosine that is served, in [0.5, 1]; wins over `mode`.
        distance_threshold: The same as a cosine distance, as redisvl counts: 1 - similarity.
        k: How many near questions are looked at.
        ttl_s: How long an answer is kept, in seconds; reading does not prolong it.
        ttl_by_task: The same for single tasks.
        require_tenant: True: calls without a tenant bypass the cache. "auto": they do once the namespace has seen one.
        share_within_tenant: Let users of a tenant share answers.
        bypass: Patterns, or a function of the question, for calls that the cache must not touch.
        scope_ignore: Patterns of text outside the question that does not matter, such as a timestamp.
        find_question: Own rule for where the question stands in the last human message: text -> (start, end) or None.
        guards_off: Guards that are switched off, see `langchain_aegis.verification.GUARDS`.
        allow_unnamed_models: Cache models whose key names no model, such as plain ChatOllama. Answers of different
            models then mix.
        keep_questions: Keep each question's text beside its answer, in clear.
        max_entry_bytes: Larger answers are not kept.
        op_budget_s: Time for Redis per lookup or update.
        embed_budget_s: Time for the embedder per lookup.
        dry_run: Look up and store, but serve nothing.
        on_lookup: Called with every `Lookup`.
        settings: Defaults for all of the above.

    Raises:
        AegisConfigError: An argument cannot be used; the message says what to write instead.
    """

    def __init__(
        self,
        redis_url: str | None = None,
        embeddings: Embeddings | None = None,
        *,
        redis: Any = None,
        redis_kwargs: Mapping[str, Any] | None = None,
        namespace: str | None = None,
        mode: Mode | None = None,
        min_similarity: float | None = None,
        distance_threshold: float | None = None,
        k: int = 5,
        ttl_s: int | None = None,
        ttl_by_task: Mapping[str, int] | None = None,
        require_tenant: bool | Literal["auto"] = "auto",
        share_within_tenant: bool = False,
        bypass: Bypass | None = None,
        scope_ignore: Iterable[str] = (),
        find_question: FindQuestion | None = None,
        guards_off: Iterable[str] = (),
        allow_unnamed_models: bool = False,
        keep_questions: bool = False,
        max_entry_bytes: int | None = None,
        op_budget_s: float | None = None,
        embed_budget_s: float | None = None,
        dry_run: bool = False,
        on_lookup: Callable[[Lookup], None] | None = None,
        settings: AegisSettings | None = None,
    ) -> None:
        self.settings = (settings or AegisSettings.from_env()).but(
            redis_url=redis_url, namespace=namespace, mode=mode, ttl_s=ttl_s, max_entry_bytes=max_entry_bytes,
            op_budget_s=op_budget_s, embed_budget_s=embed_budget_s,
        )  # fmt: skip
        self._connections = Connections(
            self.settings.redis_url, client=redis, budget_s=self.settings.op_budget_s, kwargs=redis_kwargs
        )
        make = (lambda: embeddings) if embeddings is not None else self._default_embeddings
        options = Options.checked(
            settings=self.settings,
            embeddings=embeddings,
            min_similarity=min_similarity,
            distance_threshold=distance_threshold,
            k=k,
            ttl_by_task=ttl_by_task,
            require_tenant=require_tenant,
            share_within_tenant=share_within_tenant,
            bypass=bypass,
            scope_ignore=scope_ignore,
            find_question=find_question,
            guards_off=guards_off,
            allow_unnamed_models=allow_unnamed_models,
            keep_questions=keep_questions,
            dry_run=dry_run,
            on_lookup=on_lookup,
        )
        self._engine = Engine(options, Embedder(make, budget_s=self.settings.embed_budget_s))
        self._judged: dict[str, bytes] = {}

    # -- what LangChain calls -------------------------------------------------------------------------------------

    def lookup(self, prompt: str, llm_string: str) -> RETURN_VAL_TYPE | None:
        """Return the kept answer to `prompt`, as a fresh list of generations, or None."""
        try:
            if (keyed := self._engine.key_of(prompt, llm_string)) is None:
                return None
            found = run(self._engine.find(keyed[0]), self._perform)
            if (answer := self._engine.finish(found)) is None:
                self._engine.remember(prompt, llm_string, keyed[1], found)
            return answer
        except Exception as exc:  # LangChain calls this bare: whatever goes wrong here must not cost the user his call
            _swallow("lookup", exc)
            return None

    async def alookup(self, prompt: str, llm_string: str) -> RETURN_VAL_TYPE | None:
        """Return the kept answer to `prompt`, as a fresh list of generations, or None."""
        try:
            if (keyed := self._engine.key_of(prompt, llm_string)) is None:
                return None
            found = await arun(self._engine.find(keyed[0]), self._aperform)
            if (answer := self._engine.finish(found)) is None:
                self._engine.remember(prompt, llm_string, keyed[1], found)
            return answer
        except Exception as exc:  # as in `lookup`
            _swallow("lookup", exc)
            return None

    def update(self, prompt: str, llm_string: str, return_val: RETURN_VAL_TYPE) -> None:
        """Keep `return_val`, if it is complete and nothing that it rests on was invalidated meanwhile."""
        try:
            run(self._engine.update(prompt, llm_string, return_val), self._perform)
        except Exception as exc:  # as in `lookup`: the answer is there, it must reach the user
            _swallow("update", exc)

    async def aupdate(self, prompt: str, llm_string: str, return_val: RETURN_VAL_TYPE) -> None:
        """Keep `return_val`, if it is complete and nothing that it rests on was invalidated meanwhile."""
        try:
            await arun(self._engine.update(prompt, llm_string, return_val), self._aperform)
        except Exception as exc:  # as in `update`
            _swallow("update", exc)

    def clear(self, **kwargs: Any) -> None:
        """Remove every entry of the namespace.

        Raises:
            AegisConnectionError: Redis did not answer; nothing is promised, call again.
            AegisConfigError: The entries were written with another secret.
        """
        self._insist(self._engine.store.clear)

    async def aclear(self, **kwargs: Any) -> None:
        """Remove every entry of the namespace; raises as `clear`."""
        await self._ainsist(self._engine.store.clear)

    # -- a whole pipeline -----------------------------------------------------------------------------------------

    def get_or_generate(
        self,
        question: str,
        generate: Callable[[], Any],
        *,
        pipeline: str,
        version: str = "",
        sources: Collection[str] = (),
        task: str | None = None,
        ttl_s: float | None = None,
    ) -> Any:
        """Return the kept answer of a pipeline to `question`, else what `generate()` returns.

        Asked before retrieval, a paraphrase hits although it would fetch other documents.

        Args:
            question: What the user asked; matched exactly, then by meaning.
            generate: Makes the answer: a text, messages, plain JSON, or an `Answer` with its sources. What it raises
                is raised here, and nothing is kept.
            pipeline: Name of the pipeline; pipelines never share answers.
            version: Of the pipeline, its prompts and its data; versions never share answers.
            sources: Documents that every answer rests on; `aegis_sources()` inside `generate` adds to them.
            task: Kind of work, see `aegis_scope`.
            ttl_s: How long the answer is kept, in seconds.

        Raises:
            AegisConfigError: An argument cannot be used.
        """
        with _pipeline_scope(question, pipeline, sources, task, ttl_s):
            found = None
            try:
                if (key := self._engine.pipeline_key(question, pipeline, version)) is not None:
                    found = run(self._engine.find(key), self._perform)
                    if (hit := self._engine.finish_value(found)) is not None:
                        return hit[1]
            except Exception as exc:  # as in `lookup`
                _swallow("lookup", exc)
            value = _unwrap(generate())
            if found is not None:
                try:
                    run(self._engine.store_value(found, value), self._perform)
                except Exception as exc:  # as in `update`
                    _swallow("update", exc)
            return value

    async def aget_or_generate(
        self,
        question: str,
        generate: Callable[[], Any],
        *,
        pipeline: str,
        version: str = "",
        sources: Collection[str] = (),
        task: str | None = None,
        ttl_s: float | None = None,
    ) -> Any:
        """Like `get_or_generate`; `generate` may be a coroutine function, else it runs in a thread."""
        with _pipeline_scope(question, pipeline, sources, task, ttl_s):
            found = None
            try:
                if (key := self._engine.pipeline_key(question, pipeline, version)) is not None:
                    found = await arun(self._engine.find(key), self._aperform)
                    if (hit := self._engine.finish_value(found)) is not None:
                        return hit[1]
            except Exception as exc:  # as in `lookup`
                _swallow("lookup", exc)
            made = await (generate() if inspect.iscoroutinefunction(generate) else asyncio.to_thread(generate))
            value = _unwrap(await made if inspect.isawaitable(made) else made)
            if found is not None:
                try:
                    await arun(self._engine.store_value(found, value), self._aperform)
                except Exception as exc:  # as in `update`
                    _swallow("update", exc)
            return value

    # -- control --------------------------------------------------------------------------------------------------

    def invalidate(
        self, *, sources: Collection[str] | None = None, tenant: str | None = None, user: str | None = None
    ) -> int:
        """Remove answers: those that rest on any of `sources`, or those of a tenant, of a user, or of both.

        When this returns, none of them is served any more, nor is any whose making began before.

        Returns:
            How many entries were removed.

        Raises:
            AegisConfigError: Nothing was named, or the entries were written with another secret.
            AegisConnectionError: Redis did not answer; call again.
        """
        return self._insist(lambda: self._invalidation(sources, tenant, user))

    async def ainvalidate(
        self, *, sources: Collection[str] | None = None, tenant: str | None = None, user: str | None = None
    ) -> int:
        """Like `invalidate`."""
        return await self._ainsist(lambda: self._invalidation(sources, tenant, user))

    def judge(self, cached_question: str, new_question: str) -> Verdict:
        """Say whether the answer to `cached_question` would be served for `new_question`; asks no Redis.

        Raises:
            AegisConfigError: There is no embedder.
        """
        vectors = [self._vector_of(question) for question in (cached_question, new_question)]
        similarity = similarities(vectors[1], vectors[:1])[0]
        reasons = [r for q in (cached_question, new_question) if (r := exact_only_reason(q)) is not None]
        if not similarity >= self._engine.min_similarity()[1]:
            reasons.append("below_threshold")
        off = self._engine.options.guards_off
        reasons += guard_codes(compare(profile(cached_question), profile(new_question), off=off))
        return Verdict(not reasons, similarity, tuple(dict.fromkeys(reasons)))

    async def ajudge(self, cached_question: str, new_question: str) -> Verdict:
        """Like `judge`."""
        return await asyncio.to_thread(self.judge, cached_question, new_question)

    @property
    def min_similarity(self) -> float:
        """Lowest cosine that is served: as given, else calibrated for the embedder and the mode."""
        return self._engine.min_similarity()[1]

    def stats(self) -> CacheStats:
        """Return what this cache has done in this process."""
        counts = self._engine.counts
        with self._engine.lock:
            return CacheStats(
                exact_hits=counts.tiers["exact"],
                semantic_hits=counts.tiers["semantic"],
                misses=counts.tiers["miss"],
                stored=counts.stored,
                reasons=dict(counts.reasons),
                not_stored=dict(counts.not_stored),
                rejected=self._engine.rejected,
            )

    def health(self) -> CacheHealth:
        """Return what the namespace holds in Redis, for all processes; never raises for a fault of Redis."""
        try:
            held = run(self._engine.store.held(time.time_ns() // 1_000_000), self._connections.perform)
        except (Unavailable, RedisError):
            held = None
        return self._health(held)

    async def ahealth(self) -> CacheHealth:
        """Like `health`."""
        try:
            held = await arun(self._engine.store.held(time.time_ns() // 1_000_000), self._connections.aperform)
        except (Unavailable, RedisError):
            held = None
        return self._health(held)

    def close(self) -> None:
        """Close the connections; may be called again, and a later use opens new ones."""
        self._connections.close()

    async def aclose(self) -> None:
        """Close the connections of this event loop and of all threads."""
        await self._connections.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # -- parts ----------------------------------------------------------------------------------------------------

    def _health(self, held: tuple[int, int] | None) -> CacheHealth:
        entries, tenants = held or (0, 0)
        return CacheHealth(held is not None, self._engine.store.search, entries, tenants, self._engine.embedder.name)

    def _perform(self, step: Any) -> Any:
        return self._engine.embedder.embed(step.text) if isinstance(step, Embed) else self._connections.perform(step)

    async def _aperform(self, step: Any) -> Any:
        if isinstance(step, Embed):
            return await self._engine.embedder.aembed(step.text)
        return await self._connections.aperform(step)

    def _invalidation(self, sources: Collection[str] | None, tenant: str | None, user: str | None) -> Flow[int]:
        things, sets = self._engine.invalidation(sources, tenant, user)
        # Entries that several users share, and those with sources, are looked at one by one once this has moved.
        one_by_one = sources is not None or user is not None
        return (yield from self._engine.store.invalidate(things, sets, sources=one_by_one))

    def _insist(self, flow: Callable[[], Flow[T]]) -> T:
        try:
            return run(flow(), self._connections.perform)
        except (Unavailable, RedisError) as exc:
            raise _not_done(exc) from exc

    async def _ainsist(self, flow: Callable[[], Flow[T]]) -> T:
        try:
            return await arun(flow(), self._connections.aperform)
        except (Unavailable, RedisError) as exc:
            raise _not_done(exc) from exc

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

    def _default_embeddings(self) -> Embeddings | None:
        """OLLAMA_MODEL_EMBEDDINGS, else bge-m3 if the server has it, else none: never silently another."""
        from langchain_aegis.client import OllamaClient
        from langchain_aegis.embeddings import AegisEmbeddings

        name = self.settings.model_embeddings
        if name is None:
            tags = OllamaClient(self.settings.ollama_base_url).tags()
            names = {str(m.get("name", "")).removesuffix(":latest") for m in tags}
            if "bge-m3" not in names:
                warn_once(
                    "no_embedder",
                    "no embedding model: only exact repeats are answered from the cache. "
                    "Run `ollama pull bge-m3`, or set OLLAMA_MODEL_EMBEDDINGS",
                )
                return None
            name = "bge-m3"
        return AegisEmbeddings(name, base_url=self.settings.ollama_base_url)


def _swallow(what: str, exc: Exception) -> None:
    warn_once(f"{what}:{type(exc).__name__}", f"the cache's {what} failed; the call goes on without it ({_where(exc)})")
    logger.debug("%s failed", what, exc_info=exc)


def _where(exc: Exception) -> str:
    """The kind of an error and where it arose: its text may quote a prompt. Our own errors quote none."""
    if isinstance(exc, AegisConfigError):
        return str(exc)
    trace = exc.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" in {trace.tb_frame.f_code.co_name}, line {trace.tb_lineno}" if trace is not None else ""
    return f"{type(exc).__name__}{place}"


def _not_done(exc: Exception) -> AegisConnectionError:
    reason = exc.reason if isinstance(exc, Unavailable) else type(exc).__name__
    return AegisConnectionError(f"Redis did not answer ({reason}): entries may still be served, call this again")


def _pipeline_scope(
    question: str, pipeline: str, sources: Collection[str], task: str | None, ttl_s: float | None
) -> aegis_scope:
    for name, value in (("question", question), ("pipeline", pipeline)):
        if not isinstance(value, str) or not value.strip():
            raise AegisConfigError(f"{name} must be a text that is not blank, got {value!r}")
    return aegis_scope(sources=sources, task=task, ttl_s=ttl_s)


def _unwrap(made: Any) -> Any:
    """Return a pipeline's value; notes the sources that came with it in the enclosing scope."""
    if not isinstance(made, Answer):
        return made
    sources = current().sources
    if sources is not None:
        sources.add(*made.sources)
    return made.value
