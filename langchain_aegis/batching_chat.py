"""Admission control and single flight around any chat model."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cached_property
from inspect import signature
from typing import Any, cast

import orjson
from langchain_core.caches import BaseCache
from langchain_core.callbacks import (
    AsyncCallbackHandler,
    AsyncCallbackManagerForLLMRun,
    BaseCallbackHandler,
    CallbackManagerForLLMRun,
    Callbacks,
)
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import RunnableConfig
from langchain_core.tracers.base import AsyncBaseTracer, BaseTracer
from pydantic import ConfigDict

from langchain_aegis.admission import Admission, Wait
from langchain_aegis.bulk import Bulk
from langchain_aegis.calls import Entry, scoped, whose
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.flights import Flights
from langchain_aegis.forwarding import ForwardingChatModel
from langchain_aegis.identity import PREFIX
from langchain_aegis.replays import consulted_by_core
from langchain_aegis.scope import ReadAnywhere, current, read_anywhere, seen_config
from langchain_aegis.servers import admission_of, check_arguments, server_of
from langchain_aegis.stamps import last_lookup

_TRACING_ONLY = ("ls_structured_output_format", "structured_output_format")
_NOT_SENT = frozenset({"id", "usage_metadata", "artifact"})
_METADATA_SENT = ("model_provider", "output_version")  # decide how a message is written on the wire


class BatchingChatModel(Bulk, ForwardingChatModel):  # type: ignore[misc]  # LangChain overloads them by literals
    """Any chat model, with at most `max_concurrency` calls under way and a bounded queue in front.

    A call beyond the bounds is refused at once with `AegisOverloadedError`, before LangChain does anything for it.
    `.batch`, `.abatch` and their `as_completed` forms wait for their turn instead. Identical concurrent calls make
    one call of the model when a cache applies or the model is deterministic (temperature 0, or a seed), except
    inside `aegis_scope(cache="off")` or `"refresh"`, with `cache=False`, for items of a batch, and for callers that
    read tokens. Calls are shared within one event loop, and among sync threads. The model's own `cache` plays no
    part: give the wrapper one.

    A call that shares another's runs in an empty context: the model sees tenant, user and task of `aegis_scope`, but
    no other ContextVar of the caller, and no callbacks.

    Args:
        inner: The model. All wrappers of one server share its bounds; the smallest that any of them asks for wins.
        max_concurrency: Most calls under way at the server. A streaming call counts until its stream ends.
        max_waiting: Most calls that wait; callers that share a call, and items of batches, do not count.
        window_ms: How long waiting calls may be collected to be put in a better order, in milliseconds.
        max_batch: Most calls that are put in order at once; also how many items of a `.batch` wait in the queue.
        deadline_s: Seconds after which a caller gets `AegisDeadlineError`. A synchronous request that has been sent
            cannot be stopped; it keeps its slot until the model answers.

    Raises:
        AegisConfigError: `inner` is no chat model, or a bound is out of range.
    """

    model_config = ConfigDict(ignored_types=(ReadAnywhere,))

    max_concurrency: int = 4
    max_waiting: int = 100
    window_ms: float = 50.0
    max_batch: int = 16
    deadline_s: float | None = None

    def __init__(self, inner: BaseChatModel, **arguments: Any) -> None:
        if not isinstance(inner, BaseChatModel):
            raise AegisConfigError(f"inner must be a chat model, got {type(inner).__name__}; try batching(x)")
        check_arguments(arguments)
        super().__init__(inner, **arguments)
        _ = self.admission  # the server's bounds hold from now on

    @cached_property
    def admission(self) -> Admission:
        """The slots and the queue; shared with every other user of the same server. For `stats()` and `drain()`."""
        told = self.model_fields_set
        return admission_of(
            self.inner,
            max_concurrency=self.max_concurrency if "max_concurrency" in told else None,
            max_waiting=self.max_waiting if "max_waiting" in told else None,
        )

    # Entry points: take a place before LangChain does anything.

    def invoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, *, stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:  # fmt: skip
        """Call the model; errors as in the class description."""
        return self._invoke("refuse", input, config, stop=stop, **kwargs)

    def _invoke(
        self, wait: Wait, input: LanguageModelInput, config: RunnableConfig | None, *, stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:  # fmt: skip
        if self._inside():
            return super().invoke(input, config, stop=stop, **kwargs)
        entry = self._enter(input, stop, kwargs, wait, blocking=True, config=config)
        with seen_config(config), _within(entry):
            return super().invoke(input, config, stop=stop, **kwargs)

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, *, stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:  # fmt: skip
        """Call the model; errors as in the class description."""
        if self._inside():
            return await super().ainvoke(input, config, stop=stop, **kwargs)
        entry = self._enter(input, stop, kwargs, "refuse", config=config)
        return await self._ainvoke_with(entry, input, config, stop, kwargs)

    async def _ainvoke(
        self, wait: Wait, input: LanguageModelInput, config: RunnableConfig | None, *, stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:  # fmt: skip
        entry = self._enter(input, stop, kwargs, wait, config=config)
        return await self._ainvoke_with(entry, input, config, stop, kwargs)

    async def _ainvoke_with(
        self, entry: Entry[ChatResult], input: LanguageModelInput, config: RunnableConfig | None,
        stop: list[str] | None, kwargs: dict[str, Any],
    ) -> AIMessage:  # fmt: skip
        with seen_config(config), _within(entry):
            return await super().ainvoke(input, config, stop=stop, **kwargs)

    def generate(
        self, messages: list[list[BaseMessage]], stop: list[str] | None = None, callbacks: Callbacks = None,
        **kwargs: Any,
    ) -> LLMResult:  # fmt: skip
        """Call the model for each prompt; the first one takes a place or is refused, the others wait for theirs."""
        if not messages or self._inside():
            return super().generate(messages, stop, callbacks, **kwargs)
        entry = self._enter(messages[0], stop, _sent(kwargs), "refuse", many=len(messages) > 1, blocking=True)
        with _within(entry):
            return super().generate(messages, stop, callbacks, **kwargs)

    async def agenerate(
        self, messages: list[list[BaseMessage]], stop: list[str] | None = None, callbacks: Callbacks = None,
        **kwargs: Any,
    ) -> LLMResult:  # fmt: skip
        """Call the model for each prompt; the first one takes a place or is refused, the others wait for theirs."""
        if not messages or self._inside():
            return await super().agenerate(messages, stop, callbacks, **kwargs)
        entry = self._enter(messages[0], stop, _sent(kwargs), "refuse", many=len(messages) > 1)
        with _within(entry):
            return await super().agenerate(messages, stop, callbacks, **kwargs)

    @read_anywhere
    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, *, stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:  # fmt: skip
        """Stream the model's answer; holds a slot until the stream ends or is closed.

        It may be read after the `aegis_scope` in which it was called.
        """
        base = cast("Generator[AIMessageChunk]", super().stream(input, config, stop=stop, **kwargs))
        if not self._should_stream(async_api=False, **{**kwargs, "stream": True}):
            yield from base
            return
        entry = self._entry("refuse", config=config)
        entry.take(None)
        try:
            with _within(entry, leave=False):
                first = next(base, None)
            if first is not None:
                yield first
            yield from base
        finally:
            base.close()
            entry.close()

    @read_anywhere
    async def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, *, stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:  # fmt: skip
        """Stream the model's answer; holds a slot until the stream ends or is closed.

        It may be read after the `aegis_scope` in which it was called.
        """
        base = cast("AsyncGenerator[AIMessageChunk]", super().astream(input, config, stop=stop, **kwargs))
        async with contextlib.aclosing(base):
            if not self._should_stream(async_api=True, **{**kwargs, "stream": True}):
                async for chunk in base:
                    yield chunk
                return
            entry = self._entry("refuse", config=config)
            entry.take(None)
            try:
                with _within(entry, leave=False):
                    first = await anext(base, None)
                if first is not None:
                    yield first
                async for chunk in base:
                    yield chunk
            finally:
                await base.aclose()
                await entry.aclose()

    # What LangChain calls when an answer is needed.

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> ChatResult:  # fmt: skip
        scope = current()
        entry = self._claim(messages, stop, kwargs, run_manager, blocking=True)

        def own() -> ChatResult:
            return self.inner._generate(messages, stop=stop, **self.managed(run_manager), **kwargs)

        def shared() -> ChatResult:
            with scoped(scope):
                return self.inner._generate(messages, stop=stop, **kwargs)

        return entry.run(own, shared)

    async def _agenerate(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> ChatResult:  # fmt: skip
        scope = current()
        entry = self._claim(messages, stop, kwargs, run_manager)

        async def own() -> ChatResult:
            return await self.inner._agenerate(messages, stop=stop, **self.amanaged(run_manager), **kwargs)

        async def shared() -> ChatResult:
            with scoped(scope):
                return await self.inner._agenerate(messages, stop=stop, **kwargs)

        return await entry.arun(own, shared)

    def _stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:  # fmt: skip
        given = {} if run_manager is None else {"run_manager": run_manager}
        entry = self._claim(messages, stop, kwargs, None, streams=True)
        return entry.stream(
            lambda: self.inner._stream(messages, stop=stop, **given, **kwargs), lambda: self._streaming(entry)
        )

    async def _astream(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:  # fmt: skip
        given = {} if run_manager is None else {"run_manager": run_manager}
        entry = self._claim(messages, stop, kwargs, None, streams=True)
        chunks = entry.astream(
            lambda: self.inner._astream(messages, stop=stop, **given, **kwargs), lambda: self._streaming(entry)
        )
        async with contextlib.aclosing(cast("AsyncGenerator[ChatGenerationChunk]", chunks)):
            async for chunk in chunks:
                yield chunk

    def _entry(self, wait: Wait, **how: Any) -> Entry[ChatResult]:
        return Entry(self, self.admission, _flights, wait, self.deadline_s, **how)

    def _enter(
        self, prompt: LanguageModelInput, stop: list[str] | None, kwargs: Mapping[str, Any], wait: Wait,
        **how: Any,
    ) -> Entry[ChatResult]:  # fmt: skip
        """Take a place for a call, unless a cache may answer it: then it is decided after the lookup."""
        entry = self._entry(wait, **how)
        if not (current().cache == "use" and self._has_cache()):
            entry.take(self._key(prompt, stop, kwargs, entry))
        return entry

    def _claim(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: Mapping[str, Any],
        run_manager: Any, *, streams: bool = False, blocking: bool = False,
    ) -> Entry[ChatResult]:  # fmt: skip
        """Return what this call took on its way in; calls that came in another way take it now."""
        entry = _entered.get()
        if entry is None or entry.owner is not self or not entry.opened:
            entry = self._entry("refuse", blocking=blocking)
        elif entry.claimed:
            entry = self._entry("queue" if entry.many else "refuse", blocking=blocking)
        entry.claimed = True
        own = streams or _reads_tokens(run_manager)
        if own:
            entry.take_own()
        elif not entry.decided:
            entry.take(self._key(messages, stop, kwargs, entry))
        return entry

    def _inside(self) -> bool:
        """Whether an outer entry point of this very call has taken its place already."""
        entry = _entered.get()
        return entry is not None and entry.owner is self and entry.opened and not entry.claimed

    def _has_cache(self) -> bool:
        return isinstance(self.cache, BaseCache) or (self.cache is not False and get_llm_cache() is not None)

    def _key(
        self, prompt: LanguageModelInput, stop: list[str] | None, kwargs: Mapping[str, Any], entry: Entry[ChatResult]
    ) -> tuple[Hashable, ...] | None:
        """Return what a call must have in common with another to share its answer, or None if it must not."""
        if not entry.may_share or self.cache is False or current().cache != "use":
            return None
        params = self.inner._identifying_params
        if not (self._has_cache() or _is_deterministic(self.inner, params, kwargs)):
            return None
        if not isinstance(prompt, str):
            prompt = self._convert_input(prompt).to_messages()
        canonical = _canonical(prompt)
        if canonical is None or (self.admission.full and not _flights.flies(canonical)):
            return None  # the second: it will be refused, and that has to be quick
        asker = whose(entry.config)
        if asker is None:
            return None
        # Whoever was looked up after an invalidation must not join a call that began before it.
        seen = last_lookup() if self._has_cache() else ""
        return canonical, self._model_key(params, stop, kwargs), asker, seen

    def _model_key(self, params: Mapping[str, Any], stop: list[str] | None, kwargs: Mapping[str, Any]) -> Hashable:
        """Return a value that is equal only for models and options that give the same answers."""
        sent = {name: value for name, value in kwargs.items() if name not in _TRACING_ONLY} if kwargs else kwargs
        inner = self.inner
        if type(inner)._get_llm_string is not BaseChatModel._get_llm_string:
            named = inner._get_llm_string(stop=stop, **sent)
            if named.startswith(PREFIX):
                return server_of(inner), named
            return id(inner), named
        # LangChain's form is slow to make and often names no model, so a model is equal to itself only. What may be
        # set on it between two calls counts too.
        options = repr(sorted(sent.items())) if sent else ""
        return id(inner), inner.__dict__.get("model"), repr(params), repr(stop), options

    @contextlib.contextmanager
    def _streaming(self, entry: Entry[ChatResult]) -> Iterator[None]:
        """Be around each step of a stream: a model that looks into a cache while it streams sees the call's config.

        It looks only where this wrapper would: it and the model have the same `cache`.
        """
        same = self.cache is self.inner.cache
        with seen_config(entry.config), contextlib.nullcontext() if same else consulted_by_core(self.inner):
            yield

    def _generate_with_cache(self, *args: Any, **kwargs: Any) -> ChatResult:
        with consulted_by_core(self.inner):  # by this wrapper: the model inside need not look again
            return super()._generate_with_cache(*args, **kwargs)

    async def _agenerate_with_cache(self, *args: Any, **kwargs: Any) -> ChatResult:
        with consulted_by_core(self.inner):
            return await super()._agenerate_with_cache(*args, **kwargs)


@contextlib.contextmanager
def _within(entry: Entry[ChatResult], *, leave: bool = True) -> Iterator[None]:
    """Let the model, which LangChain calls several frames below, find what the call took on its way in."""
    token = _entered.set(entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # another context than it was set in
            _entered.reset(token)
        if leave:
            entry.leave()


def _sent(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `generate` that reach the model."""
    return {k: v for k, v in kwargs.items() if k not in ("tags", "metadata", "run_name", "run_id")}


def _is_deterministic(inner: BaseChatModel, params: Mapping[str, Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the model is told to give the same answer every time: temperature 0, or a seed."""
    options = kwargs.get("options")
    told = {**options, **kwargs} if isinstance(options, dict) else kwargs

    def value(name: str) -> Any:
        return told[name] if name in told else params.get(name, inner.__dict__.get(name))

    temperature = value("temperature")
    return value("seed") is not None or (
        isinstance(temperature, (int, float)) and not isinstance(temperature, bool) and temperature == 0
    )


def _reads_tokens(run_manager: Any) -> bool:
    """Whether one of the caller's handlers wants each token; tracers only note them."""
    return run_manager is not None and any(
        type(handler).on_llm_new_token not in _NOTES_TOKENS and not handler.ignore_llm
        for handler in run_manager.handlers
    )


def _canonical(prompt: str | Sequence[BaseMessage]) -> bytes | None:
    """Return what the model sees of `prompt`, or None if that cannot be told exactly.

    Leans to one side: whatever is not known to leave the answer alone makes two prompts different.
    """
    if isinstance(prompt, str):
        return b"human " + prompt.encode("utf-8", "surrogatepass")
    seen = []
    for message in prompt:
        fields = {name: value for name, value in message.__dict__.items() if value and name not in _NOT_SENT}
        if metadata := fields.pop("response_metadata", None):
            fields["response_metadata"] = [metadata.get(name) for name in _METADATA_SENT]
        seen.append([type(message).__name__, fields, message.__pydantic_extra__ or {}])
    text = prompt[0].content if len(prompt) == 1 else None
    if isinstance(text, str) and seen == [["HumanMessage", {"content": text, "type": "human"}, {}]]:
        return _canonical(text)
    try:
        return orjson.dumps(seen, option=orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_DATETIME)
    except TypeError:  # holds something that JSON cannot say
        return None


def _twin(result: ChatResult) -> ChatResult:
    """Return an independent copy, whose messages get the id of the run that they are returned to."""
    twin = result.model_copy(deep=True)
    for generation in twin.generations:
        generation.message.id = None
    return twin


# LangChain inspects them with every call; found ready, that costs next to nothing.
for _method in (BatchingChatModel._generate, BatchingChatModel._agenerate):
    setattr(_method, "__signature__", signature(_method))  # noqa: B010

_flights: Flights[ChatResult] = Flights(_twin)
_entered: ContextVar[Entry[ChatResult] | None] = ContextVar("aegis_entry", default=None)
_NOTES_TOKENS = {
    BaseCallbackHandler.on_llm_new_token,
    AsyncCallbackHandler.on_llm_new_token,
    BaseTracer.on_llm_new_token,
    AsyncBaseTracer.on_llm_new_token,
}
