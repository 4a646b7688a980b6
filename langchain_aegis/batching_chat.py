"""Admission control and single flight around any chat model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cached_property
from inspect import signature
from typing import Any, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import RunnableConfig
from pydantic import ConfigDict

from langchain_aegis.admission import Admission, Wait
from langchain_aegis.bounds import MAX_BATCH, WINDOW_MS
from langchain_aegis.bulk import Bulk, in_lanes
from langchain_aegis.calls import Entry, scoped
from langchain_aegis.copies import whole
from langchain_aegis.cut_answers import note_if_cut
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.forwarding import ForwardingChatModel
from langchain_aegis.kept_streams import KeptStream, may_follow, may_look_up
from langchain_aegis.late_messages import LateMessages
from langchain_aegis.merging import chat_flights, key_of, reads_tokens
from langchain_aegis.own_bounds import asked_bounds, learning, server_on_openai_wire
from langchain_aegis.prefixes import prefix_of, traits_of_chat
from langchain_aegis.replays import StreamEntry, consulted_by_core, following_core
from langchain_aegis.scope import ReadAnywhere, current, read_anywhere, seen_config
from langchain_aegis.servers import admission_of, check_arguments
from langchain_aegis.settings import AegisSettings
from langchain_aegis.stamps import following, follows, last_lookup
from langchain_aegis.turning_away import TurningAway


class BatchingChatModel(Bulk, TurningAway, ForwardingChatModel):  # type: ignore[misc]  # LangChain overloads them by literals
    """Any chat model, with at most `max_concurrency` calls under way and a bounded queue in front.

    A call beyond the bounds is refused at once with `AegisOverloadedError`, before LangChain does anything for it.
    `.batch`, `.abatch` and their `as_completed` forms wait for their turn instead. Identical concurrent calls make
    one call of the model when a cache applies or the model is deterministic (temperature 0, or a seed), except
    inside `aegis_scope(cache="off")` or `"refresh"`, with `cache=False`, and for items of a batch. The model's own
    `cache` plays no part: give the wrapper one. Calls are shared by threads and event loops, streaming ones too: who
    comes late gets the chunks that there are, then the rest; if the call that is under way does not stream, the whole
    answer in chunks.

    A call that may be shared runs in an empty context: the model sees tenant, user and task of `aegis_scope`, but
    no other ContextVar of the caller, and no callbacks. If the event loop that makes it is blocked or ends, the
    others call the model themselves; one that has read a part of the answer gets `AegisStreamError`.

    Args:
        inner: The model. All wrappers of one server share its bounds; the smallest that any of them asks for wins.
        max_concurrency: Most calls under way (`AEGIS_SHARED_SLOTS`: of all processes); streams count to their end.
        max_waiting: Most calls that wait; callers that share a call, and items of batches, do not count.
        window_ms: 0: waiting calls run first come, first served (fair between tenants). Else those that share a long
            prefix, a model and runner options are put next to each other while all slots are busy; nothing is ever
            held back while a slot is free, and no call is overtaken for longer than this, twice a service time, or
            2 s, whichever is longest (half as long again, loads not counted, where the server is saved one). In
            milliseconds; default `BATCH_WINDOW_MS`, else 50.
        max_batch: Most calls of one such group in a row while others wait, and items of a `.batch` in the queue.
        deadline_s: Seconds after which a caller gets `AegisDeadlineError`. A synchronous request that has been sent
            cannot be stopped; it keeps its slot until the model answers.

    Raises:
        AegisConfigError: `inner` is no chat model, or a bound is out of range.
    """

    model_config = ConfigDict(ignored_types=(ReadAnywhere,))

    max_concurrency: int = 4
    max_waiting: int = 100
    window_ms: float = WINDOW_MS
    max_batch: int = MAX_BATCH
    deadline_s: float | None = None

    def __init__(self, inner: BaseChatModel, **arguments: Any) -> None:
        if not isinstance(inner, BaseChatModel):
            raise AegisConfigError(f"inner must be a chat model, got {type(inner).__name__}; try batching(x)")
        settings = AegisSettings.from_env()
        for name in ("window_ms", "max_batch"):
            if arguments.get(name) is None:
                arguments[name] = getattr(settings, name)
        check_arguments(arguments)
        super().__init__(inner, **arguments)
        _ = self.admission  # the server's bounds hold from now on

    @cached_property
    def admission(self) -> Admission:
        """The slots and the queue; shared with every other user of the same server. For `stats()` and `drain()`."""
        return admission_of(self.inner, **asked_bounds(self))

    @cached_property
    def _learns_from(self) -> str | None:
        """The server that may tell how many calls it runs at once, where nobody said so here."""
        return None if "max_concurrency" in self.model_fields_set else server_on_openai_wire(self.inner)

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
        entry = self._enter(input, stop, kwargs, "refuse", streams=True, blocking=True, config=config)
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
            entry = self._enter(input, stop, kwargs, "refuse", streams=True, config=config)
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
        if self._streams_inside and reads_tokens(run_manager):
            return whole(list(self._stream(messages, stop, run_manager, **kwargs)))
        scope = current()
        entry = self._claim(messages, stop, kwargs, own=reads_tokens(run_manager), blocking=True)

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
        if self._streams_inside and reads_tokens(run_manager):
            return whole([chunk async for chunk in self._astream(messages, stop, run_manager, **kwargs)])
        scope = current()
        entry = self._claim(messages, stop, kwargs, own=reads_tokens(run_manager))

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
        kept, scope = self._kept(messages, stop, kwargs), current()
        if kept is not None:
            yield from kept.found()
            if kept.answered:
                return
        entry = self._claim(messages, stop, kwargs, streams=True, blocking=True, kept=kept)

        def shared() -> Iterator[ChatGenerationChunk]:
            with scoped(scope), consulted_by_core(self.inner):
                yield from self.inner._stream(messages, stop=stop, **kwargs)

        with (
            kept or contextlib.nullcontext(),
            contextlib.closing(
                cast(
                    "Generator[ChatGenerationChunk]",
                    entry.stream(
                        lambda: self.inner._stream(messages, stop=stop, **given, **kwargs),
                        lambda: self._streaming(entry, kept),
                        shared,
                    ),
                )
            ) as chunks,
        ):
            for chunk in chunks:
                if entry.shares and run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                note_if_cut(chunk)
                if (piece := chunk if kept is None else kept.add(chunk)) is not None:
                    yield piece
            if kept is not None:
                kept.store()

    async def _astream(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:  # fmt: skip
        given = {} if run_manager is None else {"run_manager": run_manager}
        kept, scope = self._kept(messages, stop, kwargs), current()
        if kept is not None:
            async with contextlib.aclosing(kept.afound()) as answer:
                async for chunk in answer:
                    yield chunk
            if kept.answered:
                return
        entry = self._claim(messages, stop, kwargs, streams=True, kept=kept)

        async def shared() -> AsyncIterator[ChatGenerationChunk]:
            with scoped(scope), consulted_by_core(self.inner):
                stream = cast("AsyncGenerator[ChatGenerationChunk]", self.inner._astream(messages, stop=stop, **kwargs))
                async with contextlib.aclosing(stream):
                    async for chunk in stream:
                        yield chunk

        chunks = entry.astream(
            lambda: self.inner._astream(messages, stop=stop, **given, **kwargs),
            lambda: self._streaming(entry, kept),
            shared,
        )
        with kept or contextlib.nullcontext():
            async with contextlib.aclosing(cast("AsyncGenerator[ChatGenerationChunk]", chunks)):
                async for chunk in chunks:
                    if entry.shares and run_manager:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    note_if_cut(chunk)
                    if (piece := chunk if kept is None else kept.add(chunk)) is not None:
                        yield piece
            if kept is not None:
                await kept.astore()

    def _entry(
        self, wait: Wait, prompt: LanguageModelInput, kwargs: Mapping[str, Any], *,
        config: RunnableConfig | None = None, **how: Any,
    ) -> Entry[ChatResult]:  # fmt: skip
        if self._learns_from is not None:
            learning.look(self._learns_from, self.inner)
        text = prompt if isinstance(prompt, str) else LateMessages(self, prompt)
        if config:
            with seen_config(config):
                traits = traits_of_chat(self.inner, text, kwargs)
        else:
            traits = traits_of_chat(self.inner, text, kwargs)
        return Entry(
            self.inner, self.admission, chat_flights, wait, self.deadline_s,
            config=config, traits=traits, window_ms=self.window_ms, max_batch=self.max_batch, **how,
        )  # fmt: skip

    def _enter(
        self, prompt: LanguageModelInput, stop: list[str] | None, kwargs: Mapping[str, Any], wait: Wait,
        *, streams: bool = False, **how: Any,
    ) -> Entry[ChatResult]:  # fmt: skip
        """Take a place for a call, unless a cache may answer it: then it is decided after the lookup."""
        if wait == "refuse":
            self.turn_away(prompt, kwargs, how.get("config"))
        entry = self._entry(wait, prompt, kwargs, **how)
        asks = may_look_up(self) if streams else self._has_cache()
        if not (asks and current().cache == "use"):
            entry.take(self._key(prompt, stop, kwargs, entry, None if streams else ""))
        return entry

    def _claim(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: Mapping[str, Any], *,
        own: bool = False, streams: bool = False, blocking: bool = False, kept: KeptStream | None = None,
    ) -> Entry[ChatResult]:  # fmt: skip
        """Return what this call took on its way in; calls that came in another way take it now.

        Args:
            messages: The prompt.
            stop: As in `invoke`.
            kwargs: The call's other arguments.
            own: It cannot be shared.
            streams: It streams.
            blocking: It blocks its thread.
            kept: The cache was asked for it, which is streamed.
        """
        entry = _entered.get()
        if entry is None or entry.owner is not self.inner or not entry.opened:
            entry = self._entry("refuse", messages, kwargs, blocking=blocking)
        elif entry.claimed:
            entry = self._entry("queue" if entry.many else "refuse", messages, kwargs, blocking=blocking)
        entry.claimed = True
        if own or (streams and not self._may_share_streams()):
            entry.take_own()
        elif not entry.decided:
            if kept is not None:
                looked_up: str | None = kept.stamp
            else:
                looked_up = None if streams and StreamEntry.applies(self.inner) else last_lookup()
            entry.take(self._key(messages, stop, kwargs, entry, looked_up))
        return entry

    def _order(self, inputs: Sequence[LanguageModelInput]) -> Sequence[int]:
        if not self.window_ms:
            return range(len(inputs))
        return in_lanes([self._prefix_of(each) for each in inputs], self.admission.max_concurrency)

    def _prefix_of(self, value: LanguageModelInput) -> tuple[int, ...]:
        try:
            return prefix_of(value if isinstance(value, str) else self._convert_input(value).to_messages())
        except Exception:  # whatever is wrong with this input is its own call's error, not the batch's
            return ()

    def _inside(self) -> bool:
        """Whether an outer entry point of this very call has taken its place already."""
        entry = _entered.get()
        return entry is not None and entry.owner is self.inner and entry.opened and not entry.claimed

    def _key(
        self, prompt: LanguageModelInput, stop: list[str] | None, kwargs: Mapping[str, Any],
        entry: Entry[ChatResult], looked_up: str | None,
    ) -> tuple[Hashable, ...] | None:  # fmt: skip
        """Return what makes two calls the same, or None for a call that is not shared.

        Args:
            prompt: A text, or the messages.
            stop: As in `invoke`.
            kwargs: The call's other arguments.
            entry: The call.
            looked_up: As in `key_of`.
        """
        if not entry.may_share or self.cache is False:
            return None
        if not isinstance(prompt, str):
            prompt = self._convert_input(prompt).to_messages()
        has_cache = self._has_cache()
        return key_of(
            self.inner, prompt, stop, kwargs, entry,
            cached=has_cache and looked_up is not None, looked_up=looked_up if has_cache else "",
        )  # fmt: skip

    def _may_share_streams(self) -> bool:
        """Whether it is known when the model inside asks a cache for what it streams."""
        return not isinstance(self.inner, ForwardingChatModel) or not self._has_cache()

    def _kept(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: Mapping[str, Any]
    ) -> KeptStream | None:
        """Return what asks the cache for a streamed call, where the model inside would, and the call may be shared."""
        if current().cache != "use" or not (may_look_up(self) or may_follow(self)):
            return None
        entry = _entered.get()
        mine = entry is not None and entry.owner is self.inner and entry.opened and not entry.claimed
        if entry is not None and mine and (entry.decided or not (entry.may_share or follows())):
            return None
        config, deadline = (entry.config, entry.deadline) if entry is not None and mine else (None, None)
        return KeptStream(self, messages, stop, kwargs, config, deadline)

    @cached_property
    def _streams_inside(self) -> bool:
        """Whether the model streams in any case, and tells each token to whoever reads them."""
        ollama = sys.modules.get("langchain_ollama")
        return ollama is not None and type(self.inner)._generate is ollama.ChatOllama._generate

    @contextlib.contextmanager
    def _streaming(self, entry: Entry[ChatResult], kept: KeptStream | None) -> Iterator[None]:
        """Be around each step of a stream: a model that looks into a cache while it streams sees the call's config.

        It looks only where this wrapper would, and has not: it and the model have the same `cache`.
        """
        same = self.cache is self.inner.cache and kept is None
        asked = contextlib.nullcontext() if same else consulted_by_core(self.inner)
        with seen_config(entry.config), following(False), asked:
            yield

    def _generate_with_cache(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        with consulted_by_core(self.inner), following_core(self, run_manager, kwargs, async_api=False):
            return super()._generate_with_cache(messages, stop, run_manager, **kwargs)

    async def _agenerate_with_cache(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        with consulted_by_core(self.inner), following_core(self, run_manager, kwargs, async_api=True):
            return await super()._agenerate_with_cache(messages, stop, run_manager, **kwargs)


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


# LangChain inspects them with every call; found ready, that costs next to nothing.
for _method in (BatchingChatModel._generate, BatchingChatModel._agenerate):
    setattr(_method, "__signature__", signature(_method))  # noqa: B010

_entered: ContextVar[Entry[ChatResult] | None] = ContextVar("aegis_entry", default=None)
