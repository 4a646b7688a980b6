"""The cache around a whole pipeline, asked before retrieval.

There a paraphrase hits although it would fetch other documents.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from langchain_core.messages import BaseMessage

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.flows import arun, run
from langchain_aegis.lookup import Lookup
from langchain_aegis.notices import warn_once
from langchain_aegis.performer import Performer, swallow
from langchain_aegis.results import Answer
from langchain_aegis.scope import aegis_scope, current

Node = TypeVar("Node", bound=Callable[..., Any])
_MISS: Any = object()


class Pipelines(Performer):
    """`get_or_generate`, its async twin, and the same around a graph's node."""

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
            generate: Makes the answer: JSON that may hold answers of a model and documents, or an `Answer` with its
                sources. What it raises is raised here, and nothing is kept; but with the cache's `stale_if_error_s`,
                an old answer is returned instead.
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
            except Exception as exc:  # whatever goes wrong in a cache must not cost the user his call
                swallow("lookup", exc)
            try:
                made = generate()
            except Exception:  # any failure of the user's own code: without an old answer it is raised on
                if (old := self._old(found)) is not _MISS:
                    return old
                raise
            value, negative = _unwrap(made)
            if found is not None:
                try:
                    run(self._engine.store_value(found, value, negative=negative), self._perform)
                except Exception as exc:  # as above
                    swallow("update", exc)
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
            except Exception as exc:  # as in `get_or_generate`
                swallow("lookup", exc)
            try:
                made = await (generate() if inspect.iscoroutinefunction(generate) else asyncio.to_thread(generate))
                made = await made if inspect.isawaitable(made) else made
            except Exception:  # as in `get_or_generate`
                if (old := self._old(found)) is not _MISS:
                    return old
                raise
            value, negative = _unwrap(made)
            if found is not None:
                try:
                    await arun(self._engine.store_value(found, value, negative=negative), self._aperform)
                except Exception as exc:  # as in `get_or_generate`
                    swallow("update", exc)
            return value

    def node(
        self,
        question: str | Callable[[Any], str | None] = "question",
        *,
        pipeline: str,
        version: str = "",
        depends: Callable[[Any], Any] | None = None,
        sources: Callable[[Any], Collection[str]] | None = None,
        task: str | None = None,
        ttl_s: float | None = None,
    ) -> Callable[[Node], Node]:
        """Return a decorator that answers a LangGraph node, sync or async, from the cache.

        Args:
            question: Name of the state's field that holds the question, or a function of the state. A list of
                messages counts with its last human message; what was said before then belongs to `depends`. A state
                without a question runs the node.
            pipeline: Name of the pipeline; pipelines never share answers.
            version: Of the node, its prompts and its data.
            depends: What else in the state decides about the answer, as plain JSON: states that differ in it never
                share answers. Without it the node must need nothing of the state but the question.
            sources: Documents that the node's answer rests on, from what the node returned.
            task: Kind of work, see `aegis_scope`.
            ttl_s: How long the answer is kept, in seconds.

        Raises:
            AegisConfigError: An argument cannot be used.
        """
        if not isinstance(pipeline, str) or not pipeline.strip():
            raise AegisConfigError(f"pipeline must be a text that is not blank, got {pipeline!r}")
        told: dict[str, Any] = {"pipeline": pipeline, "task": task, "ttl_s": ttl_s}

        def with_sources(made: Any) -> Any:
            return made if sources is None or isinstance(made, Answer) else Answer(made, sources=sources(made))

        def decorate(function: Node) -> Node:
            if inspect.iscoroutinefunction(function):

                @functools.wraps(function)
                async def anode(state: Any, *args: Any, **kwargs: Any) -> Any:
                    asked = _asked(state, question, version, depends)
                    if asked is None:
                        return _unwrap(await function(state, *args, **kwargs))[0]

                    async def generate() -> Any:
                        return with_sources(await function(state, *args, **kwargs))

                    return await self.aget_or_generate(asked[0], generate, version=asked[1], **told)

                return anode  # type: ignore[return-value] # it has the signature of `function`

            @functools.wraps(function)
            def node(state: Any, *args: Any, **kwargs: Any) -> Any:
                asked = _asked(state, question, version, depends)
                if asked is None:
                    return _unwrap(function(state, *args, **kwargs))[0]
                return self.get_or_generate(
                    asked[0], lambda: with_sources(function(state, *args, **kwargs)), version=asked[1], **told
                )

            return node  # type: ignore[return-value] # it has the signature of `function`

        return decorate

    def _old(self, found: Lookup | None) -> Any:
        """Return a stale answer that may stand in for one that could not be made, else _MISS."""
        if found is None:
            return _MISS
        try:
            old = self._engine.stale_value(found)
        except Exception as exc:  # as in `get_or_generate`
            swallow("lookup", exc)
            return _MISS
        return _MISS if old is None else old[1]


def _pipeline_scope(
    question: str, pipeline: str, sources: Collection[str], task: str | None, ttl_s: float | None
) -> aegis_scope:
    for name, value in (("question", question), ("pipeline", pipeline)):
        if not isinstance(value, str) or not value.strip():
            raise AegisConfigError(f"{name} must be a text that is not blank, got {value!r}")
    return aegis_scope(sources=sources, task=task, ttl_s=ttl_s)


def _unwrap(made: Any) -> tuple[Any, bool]:
    """Return a pipeline's value and whether it is negative; notes the sources that came with it."""
    if not isinstance(made, Answer):
        return made, False
    sources = current().sources
    if sources is not None:
        sources.add(*made.sources)
    return made.value, made.negative


def _asked(
    state: Any, question: str | Callable[[Any], str | None], version: str, depends: Callable[[Any], Any] | None
) -> tuple[str, str] | None:
    """Return a node's question and version, or None if it has to run without the cache."""
    value: Any = question(state) if callable(question) else _field(state, question)
    before: Sequence[BaseMessage] = ()
    if isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[-1], BaseMessage):
        if value[-1].type != "human":
            return None
        before, value = value[:-1], str(value[-1].text)
    if not isinstance(value, str) or not value.strip():
        return None
    if before and depends is None:
        warn_once(
            "node_history", "cache.node: a question after earlier messages is not cached; say with depends= what of "
            "them decides about the answer"
        )  # fmt: skip
        return None
    if depends is None:
        return value, version
    try:
        other = json.dumps(depends(state), sort_keys=True, ensure_ascii=True)
    except (TypeError, ValueError):
        warn_once("node_depends", "cache.node: depends= returned what is no plain JSON: the node is not cached")
        return None
    return value, f"{len(version)}:{version}:{other}"


def _field(state: Any, name: str) -> Any:
    return state.get(name) if isinstance(state, Mapping) else getattr(state, name, None)
