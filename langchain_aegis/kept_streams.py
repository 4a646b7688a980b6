"""Ask LangChain's cache for a streamed call before it shares another's, and keep what was streamed.

Models that ask a cache while they stream do so when the stream begins. A caller that joins a stream has to ask first:
what the cache says decides whose stream it may join.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

from langchain_core.caches import BaseCache
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models._utils import _update_message_content_to_blocks
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk

from langchain_aegis.copies import twin_of_chunk, whole
from langchain_aegis.followed import afound, found
from langchain_aegis.forwarding import ForwardingChatModel
from langchain_aegis.replays import StreamEntry
from langchain_aegis.stamps import follows, last_lookup

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig


def may_look_up(wrapper: ForwardingChatModel) -> bool:
    """Whether the wrapper asks a cache for what streams: in place of the model inside, or because that asks none."""
    inner = wrapper.inner
    if wrapper.cache is False or isinstance(inner, ForwardingChatModel) or not StreamEntry.applies(inner):
        return False
    cache = _cache_of(wrapper)
    if _asks_itself(inner):
        return cache is not None and wrapper.cache is inner.cache
    # LangChain asks no cache for a stream. One that is made for it is asked by the wrapper, any other one is not.
    return bool(getattr(cache, "keeps_streams", False))


def _asks_itself(inner: BaseChatModel) -> bool:
    hits = sys.modules.get("langchain_aegis.hits")  # not loaded: then it is no such model
    return hits is not None and isinstance(inner, hits.CachedChat)


def may_follow(wrapper: ForwardingChatModel) -> bool:
    """Whether LangChain has looked the call up, and it takes what another process makes as it comes."""
    return follows() and not StreamEntry.applies(wrapper.inner) and _cache_of(wrapper) is not None


def _cache_of(wrapper: ForwardingChatModel) -> BaseCache | None:
    return wrapper.cache if isinstance(wrapper.cache, BaseCache) else get_llm_cache()


class KeptStream:
    """One streamed call of a wrapper, in LangChain's cache.

    Args:
        wrapper: One for which `may_look_up` or `may_follow` is true.
        messages: The prompt.
        stop: As in `invoke`.
        kwargs: The call's other arguments.
        config: The call's own config.
        deadline: Time of `time.monotonic()` at which the caller leaves.
    """

    def __init__(
        self,
        wrapper: ForwardingChatModel,
        messages: list[BaseMessage],
        stop: list[str] | None,
        kwargs: Mapping[str, Any],
        config: RunnableConfig | None,
        deadline: float | None = None,
    ) -> None:
        cache = _cache_of(wrapper)
        assert cache is not None  # noqa: S101 - see Args
        self._entry = StreamEntry(
            cache, messages, wrapper._get_llm_string(stop=stop, **kwargs), config,
            consulted=not StreamEntry.applies(wrapper.inner),
        )  # fmt: skip
        self._deadline = deadline
        self._output_version = wrapper.output_version
        self._chunks: list[ChatGenerationChunk] = []

    @property
    def stamp(self) -> str:
        """When the cache was asked, in its own counting."""
        return self._entry._context.run(last_lookup)

    def found(self) -> Iterator[ChatGenerationChunk]:
        """Yield the answer that is kept, or that another process makes; unless `answered`, this call has to make it."""
        return found(self._entry, self._deadline)

    def afound(self) -> AsyncGenerator[ChatGenerationChunk]:
        """Do what `found` does, without blocking the event loop."""
        return afound(self._entry, self._deadline)

    @property
    def answered(self) -> bool:
        """Whether what `found` has given was all."""
        return self._entry.answered

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._entry.leave()  # who waits for the rest elsewhere need not any longer, unless it was stored

    def add(self, chunk: ChatGenerationChunk) -> ChatGenerationChunk | None:
        """Take the next chunk; return what of it was not given already."""
        self._entry.send(chunk)
        self._chunks.append(twin_of_chunk(chunk, False))
        return self._entry.rest(chunk)

    def store(self) -> None:
        """Keep the answer; to be called when its end has come."""
        if self._chunks:
            self._entry.store(self._generation())

    async def astore(self) -> None:
        """Do what `store` does, without blocking the event loop."""
        if self._chunks:
            await self._entry.astore(self._generation())

    def _generation(self) -> ChatGeneration:
        """Return what LangChain would store had the answer not been streamed."""
        (generation,) = whole(self._chunks).generations
        generation.message.response_metadata = {
            **(generation.generation_info or {}),
            **generation.message.response_metadata,
        }
        if self._output_version == "v1" and isinstance(generation.message, AIMessage):
            generation.message = _update_message_content_to_blocks(generation.message, "v1")
        return generation
