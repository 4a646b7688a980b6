"""Work through many items, a few at a time, each waiting for its turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import aclosing
from contextvars import copy_context
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar, cast

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list

from langchain_aegis.admission import Admission
from langchain_aegis.wakers import running_loop

T = TypeVar("T")
Outcome = tuple[int, T | Exception]
Configs = RunnableConfig | Sequence[RunnableConfig] | None


class Bulk:
    """The four batch methods of a Runnable. Items wait for their turn instead of being refused, and never share calls.

    The class that uses it has `_invoke` and `_ainvoke`, `admission` and `max_batch`.
    """

    if TYPE_CHECKING:  # at run time pydantic would take them for fields
        max_batch: int
        _invoke: Callable[..., Any]
        _ainvoke: Callable[..., Coroutine[Any, Any, Any]]

        @cached_property
        def admission(self) -> Admission: ...  # noqa: D102

    def batch(
        self, inputs: list[Any], config: Configs = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Answer each input, in order; `max_concurrency` of the config bounds how many are under way."""
        found = dict(self.batch_as_completed(inputs, config, return_exceptions=return_exceptions, **kwargs))
        return [found[i] for i in range(len(inputs))]

    def batch_as_completed(
        self, inputs: Sequence[Any], config: Configs = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> Iterator[Outcome[Any]]:
        """As `batch`; yields `(index, answer)` as the answers come."""
        configs, width = self._configs(config, len(inputs))

        def run(i: int) -> Any:
            return self._invoke("queue", inputs[i], configs[i], **kwargs)

        yield from work_through(len(inputs), width, run, keep_errors=return_exceptions)

    async def abatch(
        self, inputs: list[Any], config: Configs = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Answer each input, in order; `max_concurrency` of the config bounds how many are under way."""
        outcomes = self.abatch_as_completed(inputs, config, return_exceptions=return_exceptions, **kwargs)
        async with aclosing(cast("AsyncGenerator[Outcome[Any]]", outcomes)):
            found = {i: outcome async for i, outcome in outcomes}
        return [found[i] for i in range(len(inputs))]

    async def abatch_as_completed(
        self, inputs: Sequence[Any], config: Configs = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> AsyncIterator[Outcome[Any]]:
        """As `abatch`; yields `(index, answer)` as the answers come."""
        configs, width = self._configs(config, len(inputs))

        def run(i: int) -> Coroutine[Any, Any, Any]:
            return self._ainvoke("queue", inputs[i], configs[i], **kwargs)

        async with aclosing(awork_through(len(inputs), width, run, keep_errors=return_exceptions)) as outcomes:
            async for outcome in outcomes:
                yield outcome

    def _configs(self, config: Configs, count: int) -> tuple[list[RunnableConfig], int]:
        """Return one config per item, and how many items may be under way."""
        configs = get_config_list(config, count) if count else []
        told = configs[0].get("max_concurrency") if configs else None
        return configs, told or self.admission.max_concurrency + self.max_batch


def work_through(count: int, width: int, run: Callable[[int], T], *, keep_errors: bool) -> Iterator[Outcome[T]]:
    """Yield `(i, run(i))` for each i below `count` as they end, at most `width` at once, each in its own context.

    Args:
        count: Number of items.
        width: Most threads. Inside a running event loop there are none: the items run one after another.
        run: Does item i.
        keep_errors: Yield an item's `Exception` in place of its result; else the first one is raised, items that
            run end first, and no other is started.
    """
    if running_loop() is not None or min(count, width) == 1:
        for i in range(count):
            try:
                yield i, copy_context().run(run, i)
            except Exception as exc:  # whatever the item raised is its outcome
                if not keep_errors:
                    raise
                yield i, exc
        return
    items = iter(range(count))
    with ThreadPoolExecutor(max(1, min(count, width)), "aegis-batch") as pool:
        pending: dict[Future[T], int] = {}
        try:
            for i in islice(items, width):
                pending[pool.submit(copy_context().run, run, i)] = i
            while pending:
                for done in wait(pending, return_when=FIRST_COMPLETED).done:
                    i = pending.pop(done)
                    if (error := done.exception()) is not None and not (keep_errors and isinstance(error, Exception)):
                        raise error
                    for following in islice(items, 1):
                        pending[pool.submit(copy_context().run, run, following)] = following
                    yield i, error if isinstance(error, Exception) else done.result()
        finally:
            for future in pending:
                future.cancel()


async def awork_through(
    count: int, width: int, run: Callable[[int], Coroutine[Any, Any, T]], *, keep_errors: bool
) -> AsyncGenerator[Outcome[T]]:
    """As `work_through`, with tasks; those under way are cancelled when the consumer leaves or an error is raised."""
    items = iter(range(count))
    pending: dict[asyncio.Task[T], int] = {}
    try:
        for i in islice(items, width):
            pending[asyncio.create_task(run(i))] = i
        while pending:
            for done in (await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED))[0]:
                i = pending.pop(done)
                if done.cancelled():
                    raise asyncio.CancelledError
                if (error := done.exception()) is not None and not (keep_errors and isinstance(error, Exception)):
                    raise error
                for following in islice(items, 1):
                    pending[asyncio.create_task(run(following))] = following
                yield i, error if isinstance(error, Exception) else done.result()
    finally:
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.gather(*pending, return_exceptions=True)
