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

from langchain_aegis.cut_answers import noting_cuts
from langchain_aegis.entries import decode_value
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.flows import arun, run
from langchain_aegis.lookup import Lookup
from langchain_aegis.notices import warn_once
from langchain_aegis.performer import Performer, swallow, without_stop
from langchain_aegis.results import Answer
from langchain_aegis.scope import aegis_scope, current

Node = TypeVar("Node", bound=Callable[..., Any])
_BROKEN: Any = object()  # in place of sources that are not known
_UNKNOWN, _CUT = "not_json", "part_of_prompt"


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
        _check(question, generate, pipeline, version)
        with aegis_scope(sources=sources, task=task, ttl_s=ttl_s), noting_cuts() as cuts:
            found = None
            try:
                found, hit = run(self._engine.lookup_value(question, pipeline, version), self._perform)
                if hit is not None:
                    return hit[1]
            except Exception as exc:  # whatever goes wrong in a cache must not cost the user his call
                swallow("lookup", exc)
            try:
                made = generate()
            except Exception:  # any failure of the user's own code: without an old answer it is raised on
                if (old := self._instead(found)) is not None:
                    return old[1]
                raise
            value, negative, known = _unwrap(made)
            if found is not None:
                try:
                    if known and not cuts:
                        run(self._engine.store_value(found, value, negative=negative), self._perform)
                    else:
                        run(self._engine.give_up(found, _CUT if cuts else _UNKNOWN), self._perform)
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
        _check(question, generate, pipeline, version)
        with aegis_scope(sources=sources, task=task, ttl_s=ttl_s), noting_cuts() as cuts:
            found = None
            try:
                found, hit = await arun(self._engine.lookup_value(question, pipeline, version), self._aperform)
                if hit is not None:
                    return hit[1]
            except Exception as exc:  # as in `get_or_generate`
                swallow("lookup", exc)
            try:
                asynchronous = inspect.iscoroutinefunction(generate)
                made = await (generate() if asynchronous else asyncio.to_thread(without_stop, generate))
                made = await made if inspect.isawaitable(made) else made
            except Exception:  # as in `get_or_generate`
                if (old := await self._ainstead(found)) is not None:
                    return old[1]
                raise
            value, negative, known = _unwrap(made)
            if found is not None:
                try:
                    if known and not cuts:
                        await arun(self._engine.store_value(found, value, negative=negative), self._aperform)
                    else:
                        await arun(self._engine.give_up(found, _CUT if cuts else _UNKNOWN), self._aperform)
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
                messages counts with its last human message, if that is a text; what was said before then belongs to
                `depends`. A state without a question runs the node.
            pipeline: Name of the pipeline; pipelines never share answers.
            version: Of the node, its prompts and its data.
            depends: What else in the state decides about the answer, as plain JSON: states that differ in it never
                share answers. Without it the node must need nothing of the state but the question.
            sources: Documents that the node's answer rests on, from what the node returned.
            task: Kind of work, see `aegis_scope`.
            ttl_s: How long the answer is kept, in seconds.

        A function given here that raises leaves the node uncached; what the node itself raises is raised.

        Raises:
            AegisConfigError: An argument cannot be used.
        """
        _check_pipeline(pipeline, version)
        told: dict[str, Any] = {"pipeline": pipeline, "task": task, "ttl_s": ttl_s}

        def with_sources(made: Any) -> Any:
            if sources is None or isinstance(made, Answer):
                return made
            try:
                return Answer(made, sources=sources(made))
            except Exception as exc:  # the user's own rule may raise anything; the node's answer is there
                _say_broken("sources", exc)
                return Answer(made, sources=_BROKEN)

        def decorate(function: Node) -> Node:
            if inspect.iscoroutinefunction(function):

                @functools.wraps(function)
                async def anode(state: Any, *args: Any, **kwargs: Any) -> Any:
                    asked = _asked(state, question, version, depends)
                    if asked is None:
                        return _unwrap(with_sources(await function(state, *args, **kwargs)))[0]

                    async def generate() -> Any:
                        return with_sources(await function(state, *args, **kwargs))

                    return await self.aget_or_generate(asked[0], generate, version=asked[1], **told)

                return anode  # type: ignore[return-value] # it has the signature of `function`

            @functools.wraps(function)
            def node(state: Any, *args: Any, **kwargs: Any) -> Any:
                asked = _asked(state, question, version, depends)
                if asked is None:
                    return _unwrap(with_sources(function(state, *args, **kwargs)))[0]
                return self.get_or_generate(
                    asked[0], lambda: with_sources(function(state, *args, **kwargs)), version=asked[1], **told
                )

            return node  # type: ignore[return-value] # it has the signature of `function`

        return decorate

    def _instead(self, found: Lookup | None) -> tuple[bool, Any] | None:
        """Return (True, old value) if one may stand in for an answer that could not be made."""
        if found is None:
            return None
        try:
            return run(self._engine.instead(found, decode_value), self._perform)
        except Exception as exc:  # as in `get_or_generate`
            swallow("lookup", exc)
            return None

    async def _ainstead(self, found: Lookup | None) -> tuple[bool, Any] | None:
        if found is None:
            return None
        try:
            return await arun(self._engine.instead(found, decode_value), self._aperform)
        except Exception as exc:  # as in `get_or_generate`
            swallow("lookup", exc)
            return None


def _check(question: str, generate: Callable[[], Any], pipeline: str, version: str) -> None:
    _check_text("question", question)
    _check_pipeline(pipeline, version)
    if not callable(generate):
        raise AegisConfigError(f"generate must be a function without arguments, got {type(generate).__name__}")


def _check_pipeline(pipeline: str, version: str) -> None:
    _check_text("pipeline", pipeline)
    if not isinstance(version, str):
        raise AegisConfigError(f"version must be a text, got {version!r}")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise AegisConfigError(f"{name} must be a text that is not blank, got {value!r}")


def _unwrap(made: Any) -> tuple[Any, bool, bool]:
    """Return a pipeline's value, whether it is negative, and whether its sources are known: they are noted."""
    if not isinstance(made, Answer):
        return made, False, True
    try:
        with aegis_scope(sources=made.sources):  # checks them
            ids = made.sources if isinstance(made.sources, Collection) else None
    except (AegisConfigError, TypeError) as exc:
        ids = None
        if made.sources is not _BROKEN:
            _say_broken("sources", exc)
    if ids is not None and (sources := current().sources) is not None:
        sources.add(*ids)
    return made.value, made.negative, ids is not None


def _say_broken(name: str, exc: Exception) -> None:
    warn_once(
        f"pipeline_{name}",
        f"{name} of a pipeline or node cannot be used ({type(exc).__name__}): its answers are not kept. It must be a "
        "collection of texts"
        if name == "sources"
        else f"{name}= of a node failed ({type(exc).__name__}): the node is not cached",
    )


def _asked(
    state: Any, question: str | Callable[[Any], str | None], version: str, depends: Callable[[Any], Any] | None
) -> tuple[str, str] | None:
    """Return a node's question and version, or None if it has to run without the cache."""
    try:
        value: Any = question(state) if callable(question) else _field(state, question)
    except Exception as exc:  # the user's own rule may raise anything; the node itself may do without
        _say_broken("question", exc)
        return None
    before: Sequence[BaseMessage] = ()
    if isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[-1], BaseMessage):
        if value[-1].type != "human" or not _is_text(value[-1].content):
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
        decides = depends(state)
        other = json.dumps(decides, sort_keys=True, ensure_ascii=True) if _is_plain(decides) else None
    except Exception as exc:  # as above
        _say_broken("depends", exc)
        return None
    if other is None:
        warn_once("node_depends", "cache.node: depends= returned what is no plain JSON: the node is not cached")
        return None
    return value, f"{len(version)}:{version}:{other}"


def _field(state: Any, name: str) -> Any:
    return state.get(name) if isinstance(state, Mapping) else getattr(state, name, None)


def _is_text(content: Any) -> bool:
    """Return whether a message holds text alone: a picture is no part of the question, but of what is asked."""
    return isinstance(content, str) or all(
        isinstance(block, str) or (isinstance(block, dict) and block.get("type") == "text") for block in content
    )


def _is_plain(value: Any) -> bool:
    """Return whether a value is JSON that says all there is to it: names that are no texts would become texts."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(v) for name, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))
