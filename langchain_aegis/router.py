"""One chat model that stands for several, chosen by the task of each call."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import orjson
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig, ensure_config
from pydantic import PrivateAttr

from langchain_aegis.bulk import awork_through
from langchain_aegis.digests import Servers, note_asked, noted
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.fleet import Fallback, Fleet
from langchain_aegis.recached import Recached
from langchain_aegis.routing import Call, Routed, Routes
from langchain_aegis.scope import current

ChooseTask = Callable[[list[BaseMessage]], str | None]


class AegisRouter(Routes, BaseChatModel):  # type: ignore[misc]  # LangChain overloads them by literals
    """Several chat models in one: the task of a call chooses.

    The task is named by `aegis_scope(task=...)`, else by the config (`configurable[task_key]`), else by `task`. A
    name that no model has, and no name, mean the default. Each call is the chosen model's own call in every way: its
    cache and key, its run in traces, its admission. So `cache`, `callbacks`, `tags` and the like belong to the
    models, and so does a wrapper: route between `BatchingChatModel`s, do not wrap the router in one.

    A model is down when it cannot be reached or does not answer in time, before the first token. Its calls then go
    to its fallbacks, and after `recheck_s` one call tries it again. Any other error is raised as it is.
    `stream_events(version="v3")` goes around a model that is known to be down, but does not find that out.

    Args:
        models: Task -> chat model; a text is the name of a model for `ChatAegis`.
        default: The task whose model answers all others.
        fallback: Names in `models` that are asked in order when the chosen model is down; or a mapping from a task
            to its own name or names.
        task: Returns the task of a call's messages, or None.
        task_key: Name of the task in a config's `configurable`; None: configs are not looked at.
        recheck_s: Seconds for which a model that is down is left alone.
        clock: Returns monotonic seconds.

    Raises:
        AegisConfigError: An argument cannot be used; the message says what to write instead.
    """

    task: ChooseTask | None = None
    task_key: str | None = "task"
    _fleet: Fleet = PrivateAttr()

    def __init__(
        self,
        models: Mapping[str, BaseChatModel | str],
        *,
        default: str,
        fallback: Fallback | None = None,
        task: ChooseTask | None = None,
        task_key: str | None = "task",
        recheck_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        fleet = Fleet(models, default, fallback, recheck_s, clock)
        if task is not None and not callable(task):
            raise AegisConfigError(f"task must be a function of the messages, got {type(task).__name__}")
        if task_key is not None and (not isinstance(task_key, str) or not task_key.strip()):
            raise AegisConfigError(f"task_key must be a text that is not blank, or None; got {task_key!r}")
        super().__init__(task=task, task_key=task_key, profile=_common_profile(fleet))  # type: ignore[call-arg]
        self._fleet = fleet

    @property
    def models(self) -> Mapping[str, BaseChatModel]:
        """Task -> model."""
        return self._fleet.models

    def over(self, change: Callable[[BaseChatModel], BaseChatModel]) -> AegisRouter:
        """Return this router over changed models; both learn from each other which ones are down."""
        changed = self.model_copy()
        changed._fleet = self._fleet.over(change)
        return changed

    def call(self, input: LanguageModelInput, config: RunnableConfig | None) -> Call:
        """Return the way of a call through the models."""
        name: Any = current().task
        if name is None and self.task_key is not None:
            name = (ensure_config(config).get("configurable") or {}).get(self.task_key)
        if name is None and self.task is not None:
            name = self.task(self._convert_input(input).to_messages())
        return Call(self._fleet, self._fleet.chain(name), config)

    def made(self, model: BaseChatModel) -> Runnable[Any, Any]:
        """Return what is called in the place of `model`: itself."""
        return model

    @property
    def width(self) -> int:
        """How many items of a batch are under way at most."""
        return self._fleet.width

    # What else LangChain calls

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """Bind tools as the model does that a call chooses."""
        return Routed(router=self, way="bind_tools", what=tools, arguments=kwargs)

    def with_structured_output(self, schema: dict[str, Any] | type, **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        """Structure the output as the model does that a call chooses."""
        return Routed(router=self, way="with_structured_output", what=schema, arguments=kwargs)

    def generate(
        self, messages: list[list[BaseMessage]], stop: list[str] | None = None, callbacks: Callbacks = None,
        **kwargs: Any,
    ) -> LLMResult:  # fmt: skip
        """Call, for each prompt, the model that it chooses."""

        def one(prompt: list[BaseMessage], told: dict[str, Any]) -> LLMResult:
            call = self.call(prompt, None)
            for model in call:
                with call:
                    return model.generate([prompt], stop, call.callbacks(callbacks), **call.fresh(told))
            raise call.error

        return _joined([one(prompt, _told(kwargs, i)) for i, prompt in enumerate(messages)])

    async def agenerate(
        self, messages: list[list[BaseMessage]], stop: list[str] | None = None, callbacks: Callbacks = None,
        **kwargs: Any,
    ) -> LLMResult:  # fmt: skip
        """Call, for each prompt, the model that it chooses."""

        async def one(i: int) -> LLMResult:
            call, told = self.call(messages[i], None), _told(kwargs, i)
            for model in call:
                with call:
                    return await model.agenerate([messages[i]], stop, call.callbacks(callbacks), **call.fresh(told))
            raise call.error

        found = {
            i: cast("LLMResult", made)
            async for i, made in awork_through(len(messages), self.width, one, keep_errors=False)
        }
        return _joined([found[i] for i in range(len(messages))])

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Stream the events of a call; see LangChain's `stream_events`."""
        if kwargs.get("version") != "v3":
            return super().stream_events(input, config, **kwargs)
        return next(iter(self.call(input, config))).stream_events(input, config, **kwargs)

    def astream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Stream the events of a call; see LangChain's `astream_events`."""
        if kwargs.get("version") != "v3":
            return super().astream_events(input, config, **kwargs)
        return next(iter(self.call(input, config))).astream_events(input, config, **kwargs)

    # For wrappers, which call these instead of the entry points. A wrapper makes its key before the call and keeps
    # what comes back under it, so the model depends on scope and messages alone, and there are no fallbacks.

    def _candidates(self, messages: list[BaseMessage] | None = None) -> list[Recached]:
        """Return the models one of which answers: one, unless that depends on messages that are not known here."""
        name: Any = current().task
        if name is None and self.task is not None:
            if messages is None:
                return [Recached(inner=model, cache=False) for model in self.models.values()]
            name = self.task(messages)
        return [Recached(inner=self.models[self._fleet.known(name)], cache=False)]

    @property
    def _llm_type(self) -> str:
        return "aegis-router"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        first, *others = self._candidates()
        return {"models": [m._identifying_params for m in (first, *others)]} if others else first._identifying_params

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        strings, asked = list[str](), list[tuple[str, Servers]]()
        for model in self._candidates():
            strings.append(text := model._get_llm_string(stop=stop, **kwargs))
            asked += noted(text)
        if len(strings) == 1:
            return strings[0]
        text = "aegis-router/1 " + orjson.dumps(strings).decode()
        note_asked(text, *asked)
        return text

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._candidates()[0]._get_ls_params(stop=stop, **kwargs)

    def _should_stream(self, **kwargs: Any) -> bool:
        return all(model._should_stream(**kwargs) for model in self._candidates())

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> ChatResult:  # fmt: skip
        return self._candidates(messages)[0]._generate(messages, stop, run_manager, **kwargs)

    async def _agenerate(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> ChatResult:  # fmt: skip
        return await self._candidates(messages)[0]._agenerate(messages, stop, run_manager, **kwargs)

    def _stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:  # fmt: skip
        return self._candidates(messages)[0]._stream(messages, stop, run_manager, **kwargs)

    def _astream(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:  # fmt: skip
        return self._candidates(messages)[0]._astream(messages, stop, run_manager, **kwargs)


def _told(kwargs: dict[str, Any], i: int) -> dict[str, Any]:
    """Return the arguments of the i-th prompt; a run's id is for the first one's run."""
    return kwargs if i == 0 else {name: value for name, value in kwargs.items() if name != "run_id"}


def _joined(results: Sequence[LLMResult]) -> LLMResult:
    if len(results) == 1:
        return results[0]
    runs = [run for result in results for run in result.run or ()]
    return LLMResult(generations=[g for r in results for g in r.generations], llm_output={}, run=runs or None)


def _common_profile(fleet: Fleet) -> ModelProfile | None:
    """Return what all models can do."""
    first, *others = [dict(model.profile or {}) for model in fleet.models.values()]
    common = {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}
    return cast("ModelProfile", common) if common else None
