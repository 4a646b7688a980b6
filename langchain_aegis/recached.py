"""A chat model with another cache than its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult

from langchain_aegis.forwarding import ForwardingChatModel
from langchain_aegis.replays import consulted_by_core


class Recached(ForwardingChatModel):
    """The model `inner`, whose answers are kept in `cache` and nowhere else, whatever cache it or LangChain has.

    The model is not copied: what it remembers, it remembers.

    Args:
        inner: The model.
        cache: A cache, or False for none.
        skips: Says of a call's messages that no cache may be used for it.
    """

    skips: Callable[[Sequence[BaseMessage]], bool] | None = None

    def _generate_with_cache(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        with consulted_by_core(_innermost(self.inner)):  # by this wrapper: the model inside must not look again
            return super(Recached, self._for(messages))._generate_with_cache(messages, *args, **kwargs)

    async def _agenerate_with_cache(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        with consulted_by_core(_innermost(self.inner)):
            return await super(Recached, self._for(messages))._agenerate_with_cache(messages, *args, **kwargs)

    def _for(self, messages: Sequence[BaseMessage]) -> Recached:
        if self.skips is None or not self.skips(messages):
            return self
        return self.model_copy(update={"cache": False})

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> ChatResult:  # fmt: skip
        return self.inner._generate(messages, stop=stop, **self.managed(run_manager), **kwargs)

    async def _agenerate(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> ChatResult:  # fmt: skip
        return await self.inner._agenerate(messages, stop=stop, **self.amanaged(run_manager), **kwargs)

    def _stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:  # fmt: skip
        given = {} if run_manager is None else {"run_manager": run_manager}
        return self.inner._stream(messages, stop=stop, **given, **kwargs)

    def _astream(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:  # fmt: skip
        given = {} if run_manager is None else {"run_manager": run_manager}
        return self.inner._astream(messages, stop=stop, **given, **kwargs)


def _innermost(model: BaseChatModel) -> BaseChatModel:
    while isinstance(model, ForwardingChatModel):
        model = model.inner
    return model
