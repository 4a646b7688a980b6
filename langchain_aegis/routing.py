"""The way of one call through the models that may answer it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import aclosing, closing, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import httpx
from langchain_core.callbacks import BaseCallbackHandler, BaseCallbackManager, Callbacks
from langchain_core.exceptions import ModelConnectionError, ModelTimeoutError
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSerializable, ensure_config
from langchain_core.runnables.config import get_config_list
from pydantic import PrivateAttr

from langchain_aegis.bulk import Bulk, Configs
from langchain_aegis.errors import AegisError
from langchain_aegis.fleet import Fleet
from langchain_aegis.notices import warn_once

_DOWN = (ModelConnectionError, ModelTimeoutError, ConnectionError, httpx.ConnectError, httpx.TimeoutException)


class Call:
    """One call: iterate over the models to ask, and ask each inside `with call`.

        for model in call:
            with call:
                return model.invoke(input, call.config)
        raise call.error

    The `with` block swallows the error of a model that is down, if nothing of its answer was given to anybody.
    """

    def __init__(self, fleet: Fleet, chain: tuple[str, ...], config: RunnableConfig | None) -> None:
        self._fleet = fleet
        self._chain = chain
        self._config = config
        self._name = chain[0]
        self._tokens = _Tokens()
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[BaseChatModel]:
        for name in self._order():
            self._name = name
            yield self._fleet.engine(name)

    def _order(self) -> Iterator[str]:
        if len(self._chain) == 1:
            yield self._name
            return
        down = []
        for name in self._chain:
            if self._fleet.breakers[name].allow():
                yield name
            else:
                down.append(name)
        yield from down  # nobody else has answered

    def begun(self) -> None:
        """Say that a part of the answer was given."""
        if not self._tokens.given:
            self._tokens.given = True
            self._fleet.breakers[self._name].succeeded()

    @property
    def error(self) -> BaseException:
        """Why the first model that was asked did not answer."""
        assert self._error is not None  # noqa: S101  # every block either returned, raised, or set it
        return self._error

    @property
    def config(self) -> RunnableConfig | None:
        """The config for asking the model whose turn it is."""
        config = self._config
        if len(self._chain) == 1:
            return config
        # Nothing else of the config around: LangChain adds it, and the cache ranks it below the call's own.
        told = self.fresh({**(config or {}), "callbacks": self.callbacks(ensure_config(config).get("callbacks"))})
        return cast("RunnableConfig", told)

    def fresh(self, told: dict[str, Any]) -> dict[str, Any]:
        """Return `told` without the run's id, if the run of another model has taken it."""
        return told if self._error is None else {name: value for name, value in told.items() if name != "run_id"}

    def callbacks(self, callbacks: Callbacks) -> Callbacks:
        """Return `callbacks` and one that notes whether tokens were given to them."""
        if len(self._chain) == 1:
            return callbacks
        if isinstance(callbacks, BaseCallbackManager):
            manager = callbacks.copy()
            manager.add_handler(self._tokens)
            return manager
        return [*(callbacks or ()), self._tokens]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        breaker = self._fleet.breakers[self._name]
        if error is None:
            breaker.succeeded()
            return False
        if not _is_down(error) or self._tokens.given:
            return False
        breaker.failed()
        self._error = self._error or error
        if len(self._chain) > 1:
            warn_once(
                f"model_down:{self._name}",
                f"the model for {self._name!r} is down ({type(error).__name__}); its calls go to a fallback, and it is"
                f" tried again every {self._fleet.recheck_s:g} s",
            )
        return True


class Routes(Bulk):
    """The entry points of a Runnable; each call goes to the public one of the chosen model.

    So its answer is looked up, stored and traced as that model's own, also where the model is a fallback.
    """

    if TYPE_CHECKING:  # at run time pydantic would take them for fields

        @property
        def width(self) -> int: ...  # noqa: D102

        def call(self, input: Any, config: RunnableConfig | None) -> Call: ...  # noqa: D102

        def made(self, model: BaseChatModel) -> Runnable[Any, Any]: ...  # noqa: D102

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Call the chosen model."""
        return self._invoke("refuse", input, config, **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Call the chosen model."""
        return await self._ainvoke("refuse", input, config, **kwargs)

    def _invoke(self, wait: str, input: Any, config: RunnableConfig | None, **kwargs: Any) -> Any:
        call = self.call(input, config)
        for model in call:
            with call:
                made, told = self.made(model), call.config
                if wait == "queue":  # a batch of one waits for its turn where a single call is refused
                    return made.batch([input], [told or {}], **kwargs)[0]
                return made.invoke(input, told, **kwargs)
        raise call.error

    async def _ainvoke(self, wait: str, input: Any, config: RunnableConfig | None, **kwargs: Any) -> Any:
        call = self.call(input, config)
        for model in call:
            with call:
                made, told = self.made(model), call.config
                if wait == "queue":
                    return (await made.abatch([input], [told or {}], **kwargs))[0]
                return await made.ainvoke(input, told, **kwargs)
        raise call.error

    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """Stream the chosen model's answer; once a part of it was given, no other model is asked."""
        call = self.call(input, config)
        for model in call:
            with call:
                chunks = self.made(model).stream(input, call.config, **kwargs)
                with closing(cast("Generator[Any]", chunks)) if hasattr(chunks, "close") else nullcontext():
                    for chunk in chunks:
                        call.begun()
                        yield chunk
                return
        raise call.error

    async def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        """Stream the chosen model's answer; once a part of it was given, no other model is asked."""
        call = self.call(input, config)
        for model in call:
            with call:
                chunks = self.made(model).astream(input, call.config, **kwargs)
                async with (
                    aclosing(cast("AsyncGenerator[Any]", chunks)) if hasattr(chunks, "aclose") else nullcontext()
                ):
                    async for chunk in chunks:
                        call.begun()
                        yield chunk
                return
        raise call.error

    def _configs(self, config: Configs, count: int) -> tuple[list[RunnableConfig], int]:
        configs = get_config_list(config, count) if count else []
        return configs, (configs[0].get("max_concurrency") if configs else None) or self.width


class Routed(Routes, RunnableSerializable[LanguageModelInput, Any]):
    """What a router makes of itself with tools or a schema: made of the chosen model when a call comes."""

    router: Any
    way: str
    what: Any
    arguments: dict[str, Any]
    _ready: dict[int, tuple[BaseChatModel, Runnable[Any, Any]]] = PrivateAttr(default_factory=dict)

    def call(self, input: Any, config: RunnableConfig | None) -> Call:
        """Return the way of a call through the models."""
        return self.router.call(input, config)  # type: ignore[no-any-return]

    @property
    def width(self) -> int:
        """How many items of a batch are under way at most."""
        return self.router.width  # type: ignore[no-any-return]

    def made(self, model: BaseChatModel) -> Runnable[Any, Any]:
        """Return what `model` makes of itself; made once."""
        if (ready := self._ready.get(id(model))) is None:
            ready = self._ready[id(model)] = model, getattr(model, self.way)(self.what, **self.arguments)
        return ready[1]


class _Tokens(BaseCallbackHandler):
    """Notes whether a handler was given a part of an answer."""

    run_inline = True

    def __init__(self) -> None:
        self.given = False
        # On the instance: models look at a handler's class to see whether it reads tokens, and this one needs none.
        self.on_llm_new_token: Callable[..., None] = self._note
        self.on_stream_event: Callable[..., None] = self._note

    def _note(self, *_: Any, **__: Any) -> None:
        self.given = True

    def on_chat_model_start(self, *_: Any, **__: Any) -> None:
        """Do nothing; by default LangChain would write the prompt as one text."""


def _is_down(error: BaseException) -> bool:
    # A client of another maker may raise an error of its own, from the one of its HTTP library.
    cause = None if isinstance(error, AegisError) else error.__cause__
    return isinstance(error, _DOWN) or isinstance(cause, _DOWN)
