"""Refuse at least cost: under overload most calls are refused, and what each costs is taken from those that run."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from langchain_core.caches import BaseCache
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig
from pydantic import ConfigDict

from langchain_aegis.admission import Admission
from langchain_aegis.merging import canonical, chat_flights
from langchain_aegis.prefixes import counted_as
from langchain_aegis.scope import ReadAnywhere, current, read_anywhere, seen_config
from langchain_aegis.tickets import held_tickets
from langchain_aegis.traits import priority

if TYPE_CHECKING:
    from langchain_core.language_models.chat_models import _ChatModelBinding as Binding
else:
    Binding = RunnableBinding


class TurningAway:
    """A wrapper that refuses a call before anything is made ready for it, also through its bindings.

    The class that uses it is a `ForwardingChatModel` with an `admission`.
    """

    if TYPE_CHECKING:  # at run time pydantic would take them for fields
        inner: BaseChatModel
        cache: BaseCache | bool | None
        _convert_input: Callable[[LanguageModelInput], PromptValue]

        @cached_property
        def admission(self) -> Admission: ...  # noqa: D102

    def turn_away(
        self, prompt: LanguageModelInput, kwargs: Mapping[str, Any], config: RunnableConfig | None = None
    ) -> None:
        """Raise `AegisOverloadedError` for a call that can only be refused; take nothing.

        Whatever may be joined, answered by a cache, or let in returns from here and is decided where calls enter.
        """
        admission: Admission = self.admission
        if not admission.full or priority.get() != "interactive" or held_tickets.get():
            return
        if self._has_cache() and current().cache == "use":
            return
        if len(chat_flights) and self._may_join(prompt):
            return
        if config:
            with seen_config(config):
                traits = counted_as(self.inner, kwargs)
        else:
            traits = counted_as(self.inner, kwargs)
        admission.turn_away(traits)

    def _may_join(self, prompt: LanguageModelInput) -> bool:
        said = canonical(prompt if isinstance(prompt, str) else self._convert_input(prompt).to_messages())
        return said is not None and chat_flights.flies(said)

    def _has_cache(self) -> bool:
        return isinstance(self.cache, BaseCache) or (self.cache is not False and get_llm_cache() is not None)

    def bind(self, **kwargs: Any) -> Binding:
        """Bind arguments, as LangChain does."""
        return EarlyBinding(bound=cast("BaseChatModel", self), kwargs=kwargs, config={})

    def _rebound(self, made: RunnableBinding[Any, Any], bound: Runnable[Any, Any]) -> Runnable[Any, Any]:
        """Return a binding of the model's as one of `bound`; own classes of models stay what they are."""
        if made.lc_id() != RunnableBinding.lc_id():
            return made.model_copy(update={"bound": bound})
        return EarlyBinding.model_construct(**{**made.__dict__, "bound": bound})


class EarlyBinding(Binding):
    """LangChain's binding; asks the wrapper whether it takes the call before it merges configs for it."""

    model_config = ConfigDict(ignored_types=(ReadAnywhere,))

    @classmethod
    def lc_id(cls) -> list[str]:
        """Return the name under which LangChain writes and loads it: that of its own binding."""
        return RunnableBinding.lc_id()

    def invoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As LangChain's."""
        self._ask(input, config, kwargs)
        return super().invoke(input, config, **kwargs)

    async def ainvoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As LangChain's."""
        self._ask(input, config, kwargs)
        return await super().ainvoke(input, config, **kwargs)

    @read_anywhere
    def stream(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """As LangChain's."""
        self._ask(input, config, kwargs)
        yield from super().stream(input, config, **kwargs)

    @read_anywhere
    async def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """As LangChain's."""
        self._ask(input, config, kwargs)
        base = cast("AsyncGenerator[Any]", super().astream(input, config, **kwargs))
        async with aclosing(base):
            async for chunk in base:
                yield chunk

    def _ask(self, input: LanguageModelInput, config: RunnableConfig | None, kwargs: Mapping[str, Any]) -> None:
        """Have a call refused; one whose caller may be named by merged configs goes LangChain's way first."""
        bound = self.bound
        if (
            isinstance(bound, TurningAway)
            and bound.admission.full
            and not self.config.get("configurable")
            and not self.config_factories
        ):
            bound.turn_away(input, {**self.kwargs, **kwargs} if kwargs else self.kwargs, config)
