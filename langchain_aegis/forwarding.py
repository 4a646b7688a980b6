"""A chat model that presents itself as the one inside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from inspect import signature
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult, Generation
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import (
    Runnable,
    RunnableBinding,
    RunnableParallel,
    RunnableSequence,
    RunnableWithFallbacks,
)
from langchain_core.runnables.passthrough import RunnableAssign
from langchain_core.tools import BaseTool

from langchain_aegis.cut_answers import keeping_whole, noted

# Taken over from the model inside, unless the wrapper is told otherwise. Never `cache`: it is the wrapper's own.
INHERITED = ("callbacks", "tags", "metadata", "verbose", "name", "rate_limiter", "disable_streaming",
             "output_version", "custom_get_token_ids")  # fmt: skip


class ForwardingChatModel(BaseChatModel):
    """Base of wrappers: identity, tracing, profile, tools and structured output are those of `inner`.

    Attributes that the wrapper does not have are read from `inner`, methods are not: a call never gets around the
    wrapper unseen.
    """

    inner: BaseChatModel

    def __init__(self, inner: BaseChatModel, **arguments: Any) -> None:
        for name in INHERITED:
            if name not in arguments and (value := getattr(inner, name, None)) is not None:
                arguments[name] = value
        super().__init__(inner=inner, **arguments)  # type: ignore[call-arg]

    def __getattr__(self, name: str) -> Any:
        """Return the model's plain attribute, such as `model` or `temperature`."""
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            inner = self.__dict__.get("inner")
            if name.startswith("_") or inner is None or callable(value := getattr(inner, name)):
                raise
            return value

    def __getstate__(self) -> dict[Any, Any]:
        """Return what is pickled: not what is worked out again, such as the slots, which are one process's own."""
        state = super().__getstate__()
        own = {
            name for kind in type(self).__mro__ for name, value in vars(kind).items() if type(value) is cached_property
        }
        return {**state, "__dict__": {name: value for name, value in state["__dict__"].items() if name not in own}}

    # Identity and tracing

    @property
    def _llm_type(self) -> str:
        return self.inner._llm_type

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return dict(self.inner._identifying_params)

    @cached_property
    def _serialized(self) -> dict[str, Any]:
        return self.inner._serialized

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        return self.inner._get_llm_string(stop=stop, **kwargs)

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        return self.inner._get_invocation_params(stop=stop, **kwargs)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self.inner._get_ls_params(stop=stop, **kwargs)

    def _resolve_model_profile(self) -> ModelProfile | None:
        return self.inner.profile

    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None]) -> dict[str, Any]:
        return self.inner._combine_llm_outputs(llm_outputs)

    # Input, tokens, cache hits

    def _convert_input(self, model_input: LanguageModelInput) -> PromptValue:
        return self.inner._convert_input(model_input)

    def get_token_ids(self, text: str) -> list[int]:
        """Return the model's token ids of `text`."""
        return self.inner.get_token_ids(text)

    def get_num_tokens(self, text: str) -> int:
        """Return how many tokens `text` has for the model."""
        return self.inner.get_num_tokens(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Return how many tokens `messages` have for the model."""
        return self.inner.get_num_tokens_from_messages(messages, tools)

    def _convert_cached_generations(self, cache_val: list[Generation]) -> list[ChatGeneration]:
        return self.inner._convert_cached_generations(cache_val)

    def _replay_v2_events_for_cache_hit(
        self, generations: list[ChatGeneration], *, run_manager: CallbackManagerForLLMRun | None, **kwargs: Any
    ) -> None:
        self.inner._replay_v2_events_for_cache_hit(generations, run_manager=run_manager, **kwargs)

    async def _areplay_v2_events_for_cache_hit(
        self, generations: list[ChatGeneration], *, run_manager: AsyncCallbackManagerForLLMRun | None, **kwargs: Any
    ) -> None:
        await self.inner._areplay_v2_events_for_cache_hit(generations, run_manager=run_manager, **kwargs)

    def _generate_with_cache(self, *args: Any, **kwargs: Any) -> ChatResult:
        return noted(super(ForwardingChatModel, keeping_whole(self))._generate_with_cache(*args, **kwargs))

    async def _agenerate_with_cache(self, *args: Any, **kwargs: Any) -> ChatResult:
        return noted(await super(ForwardingChatModel, keeping_whole(self))._agenerate_with_cache(*args, **kwargs))

    # Streaming: the wrapper has `_stream` and `_astream` whatever the model has

    def _should_stream(self, *, async_api: bool, run_manager: Any = None, **kwargs: Any) -> bool:
        return not self._streaming_disabled(**kwargs) and self.inner._should_stream(
            async_api=async_api, run_manager=run_manager, **kwargs
        )

    def _should_use_protocol_streaming(self, *, async_api: bool, run_manager: Any = None, **kwargs: Any) -> bool:
        # The model's own hooks for this are not used: events are made from `_stream`, so it must have that.
        model = type(self.inner)
        can = model._stream is not BaseChatModel._stream or (async_api and model._astream is not BaseChatModel._astream)
        return can and super()._should_use_protocol_streaming(async_api=async_api, run_manager=run_manager, **kwargs)

    def managed(self, run_manager: object) -> dict[str, Any]:
        """Return `run_manager` as a keyword argument, if the model's `_generate` takes one."""
        return {"run_manager": run_manager} if self._takes_manager else {}

    def amanaged(self, run_manager: object) -> dict[str, Any]:
        """Return `run_manager` as a keyword argument, if the model's `_agenerate` takes one."""
        return {"run_manager": run_manager} if self._atakes_manager else {}

    @cached_property
    def _takes_manager(self) -> bool:
        return "run_manager" in signature(self.inner._generate).parameters

    @cached_property
    def _atakes_manager(self) -> bool:
        return "run_manager" in signature(self.inner._agenerate).parameters

    # Tools and structured output: the model's own way, through the wrapper

    def bind_tools(
        self, tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool], **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Bind tools as the model does; the result calls this wrapper."""
        return self._rerooted(self.inner.bind_tools(tools, **kwargs))

    def with_structured_output(self, schema: dict[str, Any] | type, **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        """Structure the output as the model does; the result calls this wrapper."""
        return self._rerooted(self.inner.with_structured_output(schema, **kwargs))

    def _rerooted(self, made: Runnable[Any, Any]) -> Runnable[Any, Any]:
        """Return what the model made of itself with the wrapper in the model's place."""
        return _replace(made, self)

    def _rebound(self, made: RunnableBinding[Any, Any], bound: Runnable[Any, Any]) -> Runnable[Any, Any]:
        """Return a binding of the model's as one of `bound`."""
        return made.model_copy(update={"bound": bound})


def _replace(made: Runnable[Any, Any], wrapper: ForwardingChatModel) -> Runnable[Any, Any]:
    if made is wrapper.inner:
        return wrapper
    if isinstance(made, BaseChatModel) and not isinstance(made, ForwardingChatModel):
        # The model made a changed copy of itself. The copy is wrapped alike, and goes through the same admission.
        return wrapper.model_copy(update={"inner": made})
    if isinstance(made, RunnableBinding):
        return wrapper._rebound(made, _replace(made.bound, wrapper))
    if isinstance(made, RunnableSequence):
        return RunnableSequence(*(_replace(step, wrapper) for step in made.steps), name=made.name)
    if isinstance(made, RunnableParallel):
        return made.model_copy(
            update={"steps__": {name: _replace(step, wrapper) for name, step in made.steps__.items()}}
        )
    if isinstance(made, RunnableAssign):
        return made.model_copy(update={"mapper": _replace(made.mapper, wrapper)})
    if isinstance(made, RunnableWithFallbacks):
        return made.model_copy(
            update={
                "runnable": _replace(made.runnable, wrapper),
                "fallbacks": [_replace(other, wrapper) for other in made.fallbacks],
            }
        )
    return made
