"""Answers that rest on a part of their prompt: marked, and kept out of every cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final, TypeVar

from langchain_core.caches import RETURN_VAL_TYPE, BaseCache
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult, Generation

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


_noted: ContextVar[list[bool] | None] = ContextVar("aegis_cut_noted", default=None)


@contextlib.contextmanager
def noting_cuts() -> Iterator[list[bool]]:
    """Note whether a model's answer inside rests on a part of its prompt: the list is not empty then.

    What a pipeline makes of such an answer need not show it.
    """
    noted: list[bool] = []
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        with contextlib.suppress(ValueError):  # left in another context, which never had the list
            _noted.reset(token)
        if noted:
            note_cut()  # the pipeline around this one rests on it too


def note_cut() -> None:
    """Say that an answer of this context rests on a part of its prompt."""
    if (noted := _noted.get()) is not None:
        noted.append(True)


def note_if_cut(*made: Generation) -> None:
    """Note what rests on a part of its prompt: it may have been made in another context."""
    if _noted.get() is not None and rests_on_a_part(made):
        note_cut()


def noted(result: ChatResult) -> ChatResult:
    """Return `result`, and note it if it rests on a part of its prompt."""
    note_if_cut(*result.generations)
    return result


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
