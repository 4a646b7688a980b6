"""Wrappers that bound and share the calls of anything LangChain runs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable, Iterator, Mapping
from contextlib import aclosing
from functools import cached_property
from typing import Any, cast

from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSerializable, ensure_config
from langchain_core.runnables.base import coerce_to_runnable
from langchain_core.runnables.utils import ConfigurableFieldSpec
from pydantic import ConfigDict

from langchain_aegis.admission import Admission, Wait
from langchain_aegis.batching_chat import BatchingChatModel
from langchain_aegis.batching_embeddings import BatchingEmbeddings
from langchain_aegis.bulk import Bulk
from langchain_aegis.calls import OF_A_RUN, Entry, scoped, whose
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.flights import Flights
from langchain_aegis.scope import current
from langchain_aegis.servers import admission_of, check_arguments

__all__ = ["BatchingChatModel", "BatchingEmbeddings", "BatchingRunnable", "batching"]


class BatchingRunnable(Bulk, RunnableSerializable[Any, Any]):
    """Any Runnable or function, with at most `max_concurrency` calls under way and a bounded queue in front.

    A call beyond the bounds is refused at once with `AegisOverloadedError`; `.batch`, `.abatch` and their
    `as_completed` forms wait for their turn instead. Each call runs in its caller's context, with its caller's
    config. The wrapper adds no run of its own to a trace.

    Args:
        inner: A Runnable, or what LangChain makes one of (a function, a dict of Runnables).
        key: Returns what makes two inputs the same; identical concurrent calls then make one call, in an empty
            context and without callbacks, and each caller gets a deep copy of the result. None: not this input.
            Calls are only the same within one tenant, user, task, `configurable` and set of keyword arguments.
        max_concurrency: Most calls under way. A streaming call counts until its stream ends.
        max_waiting: Most calls that wait; callers that share a call, and items of batches, do not count.
        window_ms: Accepted as by the other wrappers, without effect: nothing is known of a Runnable's prompts, so its
            calls run first come, first served.
        max_batch: How many items of a `.batch` wait in the queue.
        deadline_s: Seconds after which a caller gets `AegisDeadlineError`.

    Raises:
        AegisConfigError: `inner` cannot be run, or a bound is out of range.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    inner: Runnable[Any, Any]
    key: Callable[[Any], Hashable | None] | None = None
    max_concurrency: int = 4
    max_waiting: int = 100
    window_ms: float = 50.0
    max_batch: int = 16
    deadline_s: float | None = None

    def __init__(self, inner: Any, **arguments: Any) -> None:
        try:
            runnable = coerce_to_runnable(inner)
        except TypeError as exc:
            raise AegisConfigError(f"inner must be a Runnable or a function, got {type(inner).__name__}") from exc
        check_arguments(arguments)
        super().__init__(inner=runnable, **arguments)  # type: ignore[call-arg]
        _ = self.admission  # the server's bounds hold from now on

    @cached_property
    def admission(self) -> Admission:
        """The slots and the queue. For `stats()` and `drain()`."""
        told = self.model_fields_set
        return admission_of(
            self.inner,
            max_concurrency=self.max_concurrency if "max_concurrency" in told else None,
            max_waiting=self.max_waiting if "max_waiting" in told else None,
        )

    @cached_property
    def _flights(self) -> Flights[Any]:
        return Flights()

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Run the Runnable; errors as in the class description."""
        return self._invoke("refuse", input, config, **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Run the Runnable; errors as in the class description."""
        return await self._ainvoke("refuse", input, config, **kwargs)

    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any | None) -> Iterator[Any]:
        """Stream the Runnable's output; holds a slot until the stream ends or is closed."""
        entry = self._entry("refuse")
        entry.take(None)
        yield from entry.stream(lambda: self.inner.stream(input, config, **kwargs))

    async def astream(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any | None
    ) -> AsyncIterator[Any]:
        """Stream the Runnable's output; holds a slot until the stream ends or is closed."""
        entry = self._entry("refuse")
        entry.take(None)
        chunks = entry.astream(lambda: self.inner.astream(input, config, **kwargs))
        async with aclosing(cast("AsyncGenerator[Any]", chunks)):
            async for chunk in chunks:
                yield chunk

    def _invoke(self, wait: Wait, input: Any, config: RunnableConfig | None, **kwargs: Any) -> Any:
        entry, scope = self._entry(wait, blocking=True), current()
        plain = self._take(entry, input, config, kwargs)

        def shared() -> Any:
            with scoped(scope):
                return self.inner.invoke(input, plain, **kwargs)

        return entry.run(lambda: self.inner.invoke(input, config, **kwargs), shared)

    async def _ainvoke(self, wait: Wait, input: Any, config: RunnableConfig | None, **kwargs: Any) -> Any:
        entry, scope = self._entry(wait), current()
        plain = self._take(entry, input, config, kwargs)

        async def shared() -> Any:
            with scoped(scope):
                return await self.inner.ainvoke(input, plain, **kwargs)

        return await entry.arun(lambda: self.inner.ainvoke(input, config, **kwargs), shared)

    def _entry(self, wait: Wait, *, blocking: bool = False) -> Entry[Any]:
        return Entry(self, self.admission, self._flights, wait, self.deadline_s, blocking=blocking)

    def _take(
        self, entry: Entry[Any], input: Any, config: RunnableConfig | None, kwargs: Mapping[str, Any]
    ) -> RunnableConfig | None:
        """Take a place for the call; returns the config of a call that belongs to nobody, if it may be shared."""
        same = self.key(input) if self.key is not None and entry.may_share and current().cache == "use" else None
        asker = None if same is None else whose(config)
        if asker is None:
            entry.take(None)
            return None
        entry.take((same, repr(sorted(kwargs.items())), asker))
        own = ensure_config(config).get("configurable", {})
        # All who share the call have these in common; what a graph adds would tie it to one of its runs.
        return {"configurable": {name: value for name, value in own.items() if not name.startswith(OF_A_RUN)}}

    # It presents itself as the Runnable inside.

    def get_name(self, suffix: str | None = None, *, name: str | None = None) -> str:
        """Return the name of the Runnable inside, unless the wrapper has one."""
        return self.inner.get_name(suffix, name=name or self.name)

    @property
    def InputType(self) -> Any:
        """What the Runnable takes."""
        return self.inner.InputType

    @property
    def OutputType(self) -> Any:
        """What the Runnable returns."""
        return self.inner.OutputType

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        """What can be configured in the Runnable."""
        return self.inner.config_specs


def batching(x: Any, **arguments: Any) -> BatchingChatModel | BatchingEmbeddings | BatchingRunnable:
    """Wrap `x` in admission control: the wrapper that fits it.

    Args:
        x: A chat model, Embeddings, any other Runnable, or a function.
        **arguments: Those of the wrapper: `max_concurrency`, `max_waiting`, `window_ms`, `max_batch`, `deadline_s`.

    Raises:
        AegisConfigError: `x` is none of these, or an argument is unknown or out of range.
    """
    wrapper: type[BatchingChatModel] | type[BatchingEmbeddings] | type[BatchingRunnable]
    if isinstance(x, BaseChatModel):
        wrapper = BatchingChatModel
    elif isinstance(x, Embeddings):
        wrapper = BatchingEmbeddings
    elif isinstance(x, Runnable) or (callable(x) and not isinstance(x, type)):
        wrapper = BatchingRunnable
    else:
        raise AegisConfigError(
            f"batching() takes a chat model, Embeddings, a Runnable or a function, got {type(x).__name__}"
        )
    return wrapper(x, **arguments)
