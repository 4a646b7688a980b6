"""The semantic cache that LangChain calls: `set_llm_cache(AegisSemanticCache())`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

from langchain_core.caches import RETURN_VAL_TYPE, BaseCache
from langchain_core.embeddings import Embeddings

from langchain_aegis.cache_options import Bypass, Negative, Options, checked_settings
from langchain_aegis.calibration import calibrated
from langchain_aegis.chunks import ChunkRule
from langchain_aegis.control import Control
from langchain_aegis.embedder import Embedder
from langchain_aegis.engine import Engine
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.flows import arun, run
from langchain_aegis.keys import FindQuestion
from langchain_aegis.local_tier import connections_for
from langchain_aegis.lookup import Lookup
from langchain_aegis.notices import warn_once
from langchain_aegis.performer import swallow
from langchain_aegis.pipelines import Pipelines
from langchain_aegis.questions import Labels
from langchain_aegis.relays import Relay, relay_of
from langchain_aegis.settings import AegisSettings, Mode
from langchain_aegis.stamps import peek
from langchain_aegis.sweeper import the_sweeper
from langchain_aegis.transfer import Transfer
from langchain_aegis.verifiers import Verifier


class AegisSemanticCache(Pipelines, Control, Transfer, BaseCache):
    """A cache with an exact and a semantic tier on Redis, that never serves another question's answer.

    No argument is needed: settings come from the environment (`AegisSettings`), and nothing is read or connected
    before the first use. A fault of Redis or of the embedder is a miss, never an exception.

    Args:
        redis_url: `redis://`, `rediss://` or `unix://`, or `redis+sentinel://host:26379,host:26379/service/0` where
            Sentinels say which server is the master; default `REDIS_URL`.
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
        keep_questions: Keep each question's text beside its answer, in clear unless `AEGIS_ENCRYPT` is set.
        max_entry_bytes: Larger answers are not kept.
        local_tier_bytes: What answers that were read may take up in this process, so that their exact repeats ask
            Redis nothing; the most recently used stay. 0: none are held. What is invalidated elsewhere is seen as soon
            as Redis pushes it, as a rule within a millisecond, and never later than after 0.25 s: without proof that
            all was heard up to then, Redis is asked. Not used together with `max_entries_per_tenant`.
        op_budget_s: Time for Redis per lookup or update.
        embed_budget_s: Time for the embedder per lookup.
        dry_run: Look up and store, but serve nothing.
        on_lookup: Called with every `Lookup`.
        labels: How prompts mark their parts, in place of the built-in labels.
        chunks: What counts as one retrieved chunk, a pattern or a function of a message's text: answers are shared
            between prompts with the same set of chunks, in any order.
        verifier: Gives a second opinion on near questions: a callable (cached, new) -> bool or number in [0, 1], a
            cross-encoder, or a chat model. Questions are then kept. Without an opinion there is no hit.
        verifier_band: Cosines between which it is asked; default from a tenth below the threshold to 0.97. Nearer
            ones are served without it if they reach the threshold.
        verifier_budget_s: Time for one opinion.
        shadow_rate: Share of hits by meaning, at most 0.5, that are returned as misses and compared with the new
            answer: `stats().checked` is then a measured rate of wrong hits, which raises the threshold when it is
            too high.
        compare_answers: Says whether two answers say the same; default: by their numbers, negations and words.
        max_entries_per_tenant: Beyond it, the answers of a tenant that were not used for longest go.
        stale_while_revalidate_s: For so long after its TTL an answer is served on exact repeats while one caller
            makes a new one; marked `stale`.
        stale_if_error_s: For so long after its TTL an answer is served on exact repeats when ChatAegis or
            `get_or_generate` fails to make a new one; marked `stale`. Answers that are streamed are not.
        negative: Patterns, or a function of the answer's text, for answers that say that nothing was found.
        negative_ttl_s: How long such answers are kept, if others are not kept for a shorter time.
        lease_s: For so long one process may make an answer while others wait for it, or are streamed it as it
            comes; 0: as `AEGIS_LEASE_S` says, and without that each makes its own.
        lease_wait_s: How long a process waits for another's answer.
        repeats: A text that was answered by meaning and is asked again gets an answer of its own, which serves exact
            repeats from then on, so that a wrong hit is never served twice. "auto": if the stored question differs in
            more than words such as "the", inflection and synonyms; "ask": always; "serve": never.
        validate: Look at Redis now, as the method of this name does, and raise what it raises. On an event loop,
            `await cache.avalidate()` instead.
        settings: Defaults for all of the above.

    Raises:
        AegisConfigError: An argument cannot be used; the message says what to write instead.
        AegisConnectionError: With `validate`: Redis does not answer.
    """

    keeps_streams: ClassVar[bool] = True  # BatchingChatModel asks it for what streams, whatever model is inside

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
        local_tier_bytes: int | None = None,
        op_budget_s: float | None = None,
        embed_budget_s: float | None = None,
        dry_run: bool = False,
        on_lookup: Callable[[Lookup], None] | None = None,
        labels: Labels | None = None,
        chunks: ChunkRule | None = None,
        verifier: Any = None,
        verifier_band: tuple[float, float] | None = None,
        verifier_budget_s: float = 0.5,
        shadow_rate: float = 0.0,
        compare_answers: Callable[[str, str], bool] | None = None,
        max_entries_per_tenant: int | None = None,
        stale_while_revalidate_s: float = 0,
        stale_if_error_s: float = 0,
        negative: Negative | None = None,
        negative_ttl_s: float = 60,
        lease_s: float = 0,
        lease_wait_s: float = 10,
        repeats: Literal["auto", "serve", "ask"] = "auto",
        validate: bool = False,
        settings: AegisSettings | None = None,
    ) -> None:
        self.settings = checked_settings(
            settings, redis_url=redis_url, namespace=namespace, mode=mode, ttl_s=ttl_s, max_entry_bytes=max_entry_bytes,
            local_tier_bytes=local_tier_bytes, op_budget_s=op_budget_s, embed_budget_s=embed_budget_s,
        )  # fmt: skip
        if redis_kwargs is not None and not isinstance(redis_kwargs, Mapping):
            raise AegisConfigError(f"redis_kwargs must map names to values, got {type(redis_kwargs).__name__}")
        connections = connections_for(
            self.settings, client=redis, kwargs=redis_kwargs, k=k if isinstance(k, int) else 1
        )
        self._given = embeddings
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
            labels=labels,
            chunks=chunks,
            verifier=verifier,
            verifier_band=verifier_band,
            verifier_budget_s=verifier_budget_s,
            shadow_rate=shadow_rate,
            compare_answers=compare_answers,
            max_entries_per_tenant=max_entries_per_tenant,
            stale_while_revalidate_s=stale_while_revalidate_s,
            stale_if_error_s=stale_if_error_s,
            negative=negative,
            negative_ttl_s=negative_ttl_s,
            lease_s=self.settings.lease_s if lease_s == 0 else lease_s,
            lease_wait_s=lease_wait_s,
            repeats=repeats,
        )
        super().__init__(
            Engine(options, Embedder(self._make_embeddings, budget_s=self.settings.embed_budget_s)),
            connections,
            _verifier(verifier, verifier_budget_s),
        )
        self._judged: dict[str, bytes] = {}
        if validate:
            try:
                self.validate()
            except BaseException:
                self.close()
                raise

    # -- what LangChain calls -------------------------------------------------------------------------------------

    def lookup(self, prompt: str, llm_string: str) -> RETURN_VAL_TYPE | None:
        """Return the kept answer to `prompt`, as a fresh list of generations, or None."""
        try:
            if (begun := self._engine.begin(prompt, llm_string)) is None:
                return run(self._engine.lookup(prompt, llm_string), self._perform)
            self._ask(begun)
            if (told := self._engine.answer(begun, prompt, llm_string)) is not None:
                return told[0]
            return run(self._engine.go_on(begun, prompt, llm_string), self._perform)
        except Exception as exc:  # LangChain calls this bare: whatever goes wrong here must not cost the user his call
            swallow("lookup", exc)
            return None

    async def alookup(self, prompt: str, llm_string: str) -> RETURN_VAL_TYPE | None:
        """Return the kept answer to `prompt`, as a fresh list of generations, or None."""
        try:
            if (begun := self._engine.begin(prompt, llm_string)) is None:
                return await arun(self._engine.lookup(prompt, llm_string), self._aperform)
            await self._aask(begun)
            if (told := self._engine.answer(begun, prompt, llm_string)) is not None:
                return told[0]
            return await arun(self._engine.go_on(begun, prompt, llm_string), self._aperform)
        except Exception as exc:  # as in `lookup`
            swallow("lookup", exc)
            return None

    def update(self, prompt: str, llm_string: str, return_val: RETURN_VAL_TYPE) -> None:
        """Keep `return_val`, if it is complete and nothing that it rests on was invalidated meanwhile.

        It is stored in the background: every lookup of this process finds it, another process a moment later.
        """
        try:
            run(self._engine.update(prompt, llm_string, return_val), self._perform)
        except Exception as exc:  # as in `lookup`: the answer is there, it must reach the user
            swallow("update", exc)

    async def aupdate(self, prompt: str, llm_string: str, return_val: RETURN_VAL_TYPE) -> None:
        """Keep `return_val`, if it is complete and nothing that it rests on was invalidated meanwhile."""
        try:
            await arun(self._engine.update(prompt, llm_string, return_val), self._aperform)
        except Exception as exc:  # as in `update`
            swallow("update", exc)

    def stale_answer(self, prompt: str, llm_string: str) -> RETURN_VAL_TYPE | None:
        """Return an answer past its TTL to a call that was just looked up in this context, or None.

        ChatAegis asks for it when the server fails; only a cache with `stale_if_error_s` has one.
        """
        try:
            return run(self._engine.stale_answer(prompt, llm_string), self._perform)
        except Exception as exc:  # as in `lookup`
            swallow("lookup", exc)
            return None

    async def astale_answer(self, prompt: str, llm_string: str) -> RETURN_VAL_TYPE | None:
        """Like `stale_answer`."""
        try:
            return await arun(self._engine.stale_answer(prompt, llm_string), self._aperform)
        except Exception as exc:  # as in `lookup`
            swallow("lookup", exc)
            return None

    @property
    def relays(self) -> bool:
        """Whether answers are passed on between processes while they are made."""
        return self._engine.options.lease_ms > 0

    def relay(self, prompt: str, llm_string: str) -> Relay | None:
        """Return what passes an answer on between processes, after a lookup in this context that missed, or None.

        ChatAegis and BatchingChatModel ask for it when they stream; only a cache with `lease_s` has one.
        """
        try:
            pending = peek(self._engine._identity, prompt, llm_string)
            return None if pending is None else relay_of(self._engine, self._connections, pending)
        except Exception as exc:  # as in `lookup`
            swallow("lookup", exc)
            return None

    # -- its life ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Store what is still to be stored, for at most a second, and close the connections.

        May be called again, and a later use opens new ones.
        """
        self._written()
        the_sweeper.leave(self._connections)
        self._connections.close()

    async def aclose(self) -> None:
        """Store what is still to be stored, and close the connections of this event loop and of all threads."""
        await self._awritten()
        await asyncio.to_thread(the_sweeper.leave, self._connections)
        await self._connections.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # as a model's client: a copy of a model or a graph goes on with the same connections

    def __reduce__(self) -> Any:
        raise TypeError("an AegisSemanticCache holds connections and cannot be pickled: make one in each process")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # -- parts ----------------------------------------------------------------------------------------------------

    def _make_embeddings(self) -> Embeddings | None:
        """Return the embedder; notes what `aegis cache calibrate` has found for it. Runs in a thread.

        If the embedder fails here, it is made again later: without its own threshold it would serve too much.
        """
        made = self._given if self._given is not None else self._default_embeddings()
        if made is not None:
            self._engine.calibration = calibrated(made, self.settings)
            if "langchain_ollama" in sys.modules:  # else it is none of Ollama's
                from langchain_aegis.embedder_models import models_of

                self._engine.embedder.models = models_of(made)
        return made

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


def _verifier(given: Any, budget_s: float) -> Verifier | None:
    return given if given is None or isinstance(given, Verifier) else Verifier(given, budget_s=budget_s)
