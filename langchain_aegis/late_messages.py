"""A prompt's messages, made when somebody reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import BaseMessage


class LateMessages(Sequence[BaseMessage]):
    """The messages of a call's input. A call that finds a free slot never needs them before LangChain makes its own.

    Args:
        model: Converts the input.
        prompt: As in the model's `invoke`.
    """

    def __init__(self, model: BaseChatModel, prompt: LanguageModelInput) -> None:
        self._model, self._prompt = model, prompt

    def _made(self) -> list[BaseMessage]:
        return self._model._convert_input(self._prompt).to_messages()

    def __iter__(self) -> Iterator[BaseMessage]:
        return iter(self._made())

    def __len__(self) -> int:
        return len(self._made())

    def __getitem__(self, index: Any) -> Any:
        return self._made()[index]
