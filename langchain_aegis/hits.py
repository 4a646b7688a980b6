"""Let a chat model give cached answers as streams, and let its cache see the config of a call."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any, Self
from uuid import uuid4

from langchain_core.caches import BaseCache
from langchain_core.callbacks import (
    AsyncCallbackHandler,
    AsyncCallbackManagerForLLMRun,
    BaseCallbackHandler,
    CallbackManagerForLLMRun,
)
from langchain_core.globals import get_llm_cache
from langchain_core.language_models._compat_bridge import chunks_to_events
from langchain_core.language_models.base import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_core.tracers.base import AsyncBaseTracer, BaseTracer
from langchain_core.utils.utils import LC_ID_PREFIX
from langchain_ollama.chat_models import ChatOllama
from pydantic import ConfigDict, PrivateAttr

from langchain_aegis.cut_answers import keeping_whole
from langchain_aegis.errors import AegisError
from langchain_aegis.replays import as_chunks, consulted_by_core, dumped, following_core, freshen
from langchain_aegis.scope import ReadAnywhere, bound_here, read_anywhere, seen_config


class CachedChat(ChatOllama):
    """ChatOllama whose hits in LangChain's cache look like answers of the model.

    LangChain hands a hit on as one lump with the id of the stored answer, and hides the config of a direct call
    such as `model.invoke(x, config)` from the cache.
    """

    model_config = ConfigDict(ignored_types=(ReadAnywhere,))

    _shown_config: RunnableConfig | None = PrivateAttr(default=None)

    def _should_stream(
        self,
        *,
        async_api: bool,
        run_manager: CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> bool:
        # A plain handler of tokens sees them with ChatOllama, which always streams.
        return super()._should_stream(async_api=async_api, run_manager=run_manager, **kwargs) or (
            run_manager is not None
            and not self._streaming_disabled(**kwargs)
            and any(_takes_tokens(handler) for handler in run_manager.handlers)
        )

    def _generate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        asked = keeping_whole(self)
        with consulted_by_core(asked), following_core(asked, run_manager, kwargs, async_api=False):
            try:
                return super(CachedChat, asked)._generate_with_cache(messages, stop, run_manager, **kwargs)
            except AegisError as exc:
                told = {"async_api": False, "run_manager": run_manager, **kwargs}
                ask = self._asking_old("stale_answer", exc, messages, stop, told, kwargs)
                if ask is None or (found := ask()) is None:
                    raise
                old = self._convert_cached_generations(found)
                self._replay_v2_events_for_cache_hit(old, run_manager=run_manager, **kwargs)
                return ChatResult(generations=old)

    async def _agenerate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        asked = keeping_whole(self)
        with consulted_by_core(asked), following_core(asked, run_manager, kwargs, async_api=True):
            try:
                return await super(CachedChat, asked)._agenerate_with_cache(messages, stop, run_manager, **kwargs)
            except AegisError as exc:
                told = {"async_api": True, "run_manager": run_manager, **kwargs}
                ask = self._asking_old("astale_answer", exc, messages, stop, told, kwargs)
                if ask is None or (found := await ask()) is None:
                    raise
                old = self._convert_cached_generations(found)
                await self._areplay_v2_events_for_cache_hit(old, run_manager=run_manager, **kwargs)
                return ChatResult(generations=old)

    def _asking_old(
        self, how: str, exc: AegisError, messages: list[BaseMessage], stop: list[str] | None, told: dict[str, Any],
        options: dict[str, Any],
    ) -> Callable[[], Any] | None:  # fmt: skip
        """Return what asks the cache for an old answer in place of one that the server failed to give."""
        if not exc.retryable or self._should_stream(**told) or self._should_use_protocol_streaming(**told):
            return None  # a stream may have begun already
        cache = self.cache if isinstance(self.cache, BaseCache) else get_llm_cache()
        give = None if self.cache is False else getattr(cache, how, None)
        return None if give is None else partial(give, dumped(messages), self._get_llm_string(stop=stop, **options))

    def _replay_v2_events_for_cache_hit(
        self, generations: list[ChatGeneration], *, run_manager: CallbackManagerForLLMRun | None, **kwargs: Any
    ) -> None:
        messages = freshen(generations, _message_id(run_manager), self.output_version)
        if run_manager is None or not run_manager.handlers:  # nobody to tell
            return
        told = {"async_api": False, "run_manager": run_manager, **kwargs}
        if self._should_use_protocol_streaming(**told):
            for message in messages:
                for event in chunks_to_events(iter(as_chunks(message)), message_id=message.id):
                    run_manager.on_stream_event(event)
        elif self._should_stream(**told):
            for message in messages:
                for chunk in as_chunks(message, output_version=self.output_version):
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)

    async def _areplay_v2_events_for_cache_hit(
        self, generations: list[ChatGeneration], *, run_manager: AsyncCallbackManagerForLLMRun | None, **kwargs: Any
    ) -> None:
        messages = freshen(generations, _message_id(run_manager), self.output_version)
        if run_manager is None or not run_manager.handlers:  # nobody to tell
            return
        told = {"async_api": True, "run_manager": run_manager, **kwargs}
        if self._should_use_protocol_streaming(**told):
            for message in messages:
                for event in chunks_to_events(iter(as_chunks(message)), message_id=message.id):
                    await run_manager.on_stream_event(event)
        elif self._should_stream(**told):
            for message in messages:
                for chunk in as_chunks(message, output_version=self.output_version):
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)

    # -- entry points: the cache sees the config that LangChain hides from it --

    def invoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, *, stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:  # fmt: skip
        """Return the model's answer; keyword arguments are options of this call."""
        with seen_config(config):
            return super().invoke(input, config, stop=stop, **kwargs)

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, *, stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:  # fmt: skip
        """Return the model's answer; keyword arguments are options of this call."""
        with seen_config(config):
            return await super().ainvoke(input, config, stop=stop, **kwargs)

    @read_anywhere
    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, *, stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:  # fmt: skip
        """Yield the model's answer as it comes; a cached one comes in pieces too.

        It may be read after the `aegis_scope` in which it was called.
        """
        # The copy shows its config to the cache by itself: a ContextVar set in here would reach the caller's code.
        yield from super(CachedChat, self._showing(config)).stream(input, config, stop=stop, **kwargs)

    @read_anywhere
    async def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, *, stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:  # fmt: skip
        """Yield the model's answer as it comes; a cached one comes in pieces too.

        It may be read after the `aegis_scope` in which it was called.
        """
        stream = super(CachedChat, self._showing(config)).astream(input, config, stop=stop, **kwargs)
        async with contextlib.aclosing(stream) as chunks:  # type: ignore[type-var] # an async generator
            async for chunk in chunks:
                yield chunk

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Stream the events of a call; see LangChain's `stream_events`."""
        return super(CachedChat, self._showing(config)).stream_events(input, config, **kwargs)

    def astream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Stream the events of a call; see LangChain's `astream_events`."""
        events = super(CachedChat, self._showing(config)).astream_events(input, config, **kwargs)
        return bound_here(events) if isinstance(events, AsyncIterator) else events

    def _showing(self, config: RunnableConfig | None) -> Self:
        if not (config and config.get("configurable")):
            return self
        shown = self.model_copy()
        shown._shown_config = config
        return shown


def _takes_tokens(handler: BaseCallbackHandler) -> bool:
    """Say whether a handler does something with tokens; a tracer only notes them."""
    return not isinstance(handler, (BaseTracer, AsyncBaseTracer)) and type(handler).on_llm_new_token not in (
        BaseCallbackHandler.on_llm_new_token,
        AsyncCallbackHandler.on_llm_new_token,
    )


def _message_id(run_manager: CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun | None) -> str:
    return f"{LC_ID_PREFIX}-{run_manager.run_id if run_manager else uuid4()}"
