"""Answers that rest on a part of their prompt: marked, and kept out of every cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from langchain_core.caches import RETURN_VAL_TYPE, BaseCache
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, Generation

Model = TypeVar("Model", bound=BaseChatModel)

MARK: Final = "aegis_cut"  # in `response_metadata`


def was_cut(message: BaseMessage) -> dict[str, Any] | None:
    """Return what the model did not see of its prompt, or None if it saw all of it, as far as is known.

    Returns:
        `how`: "cut" (the server left out a part), "trimmed" (`trim=` shortened it) or "shifted" (the window was full
        before the answer was complete, so that the server dropped the beginning). `prompt_tokens` (of the whole
        prompt) and `window_tokens`: numbers, or None where the server did not say.
    """
    mark = message.response_metadata.get(MARK) if isinstance(message, AIMessage) else None
    return mark if isinstance(mark, dict) else None


def is_cut(told: Iterable[Mapping[str, Any]]) -> bool:
    """Say whether metadata of an answer holds the mark."""
    return any(MARK in each for each in told)


def rests_on_a_part(generations: Sequence[Generation]) -> bool:
    """Say whether any of these answers is marked."""
    for generation in generations:
        told = [generation.generation_info or {}]
        if isinstance(generation, ChatGeneration):
            told.append(generation.message.response_metadata)
        if is_cut(told):
            return True
    return False


class WholeOnly(BaseCache):
    """The cache `inner`, which is not given what rests on a part of its prompt.

    LangChain stores whatever a model returns, and asks nobody.
    """

    def __init__(self, inner: BaseCache) -> None:
        self.inner = inner

    def lookup(self, prompt: str, llm_string: str) -> RETURN_VAL_TYPE | None:
        """Ask the cache."""
        return self.inner.lookup(prompt, llm_string)

    async def alookup(self, prompt: str, llm_string: str) -> RETURN_VAL_TYPE | None:
        """Ask the cache."""
        return await self.inner.alookup(prompt, llm_string)

    def update(self, prompt: str, llm_string: str, return_val: RETURN_VAL_TYPE) -> None:
        """Store answers, unless one is marked."""
        if not rests_on_a_part(return_val):
            self.inner.update(prompt, llm_string, return_val)

    async def aupdate(self, prompt: str, llm_string: str, return_val: RETURN_VAL_TYPE) -> None:
        """Store answers, unless one is marked."""
        if not rests_on_a_part(return_val):
            await self.inner.aupdate(prompt, llm_string, return_val)

    def clear(self, **kwargs: Any) -> None:
        """Clear the cache."""
        self.inner.clear(**kwargs)

    async def aclear(self, **kwargs: Any) -> None:
        """Clear the cache."""
        await self.inner.aclear(**kwargs)


def keeping_whole(model: Model) -> Model:
    """Return `model`, or a copy of it, whose cache is given no answer that rests on a part of its prompt."""
    cache = model.cache if isinstance(model.cache, BaseCache) else get_llm_cache()
    if cache is None or model.cache is False or hasattr(cache, "stale_answer"):  # this package's sees to it itself
        return model
    return model.model_copy(update={"cache": WholeOnly(cache)})
