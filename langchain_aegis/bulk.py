"""Work through many items, a few at a time, each waiting for its turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import aclosing
from contextvars import copy_context
from functools import cached_property
from itertools import islice, pairwise, zip_longest
from typing import TYPE_CHECKING, Any, TypeVar, cast

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list

from langchain_aegis.admission import Admission
from langchain_aegis.progress import bar_for
from langchain_aegis.queues import LONG_PREFIX
from langchain_aegis.traits import common
from langchain_aegis.wakers import running_loop

T = TypeVar("T")
Outcome = tuple[int, T | Exception]
Configs = RunnableConfig | Sequence[RunnableConfig] | None

_FEW = 32  # prompts that are read in the event loop


class Bulk:
    """The four batch methods of a Runnable. Items wait for their turn instead of being refused, and never share calls.

    Inside `batch_progress()` each batch shows a bar.

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
        order = self._order(inputs)

        def run(at: int) -> Any:
            return self._invoke("queue", inputs[order[at]], configs[order[at]], **kwargs)

        with bar_for(len(inputs)) as bar:
            for at, outcome in work_through(len(inputs), width, bar.items(run), keep_errors=return_exceptions):
                bar.told(outcome)
                yield order[at], outcome

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
        # Reading many prompts takes longer than an event loop may be kept.
        few = len(inputs) <= _FEW
        order = self._order(inputs) if few else await asyncio.to_thread(self._order, inputs)

        def run(at: int) -> Coroutine[Any, Any, Any]:
            return self._ainvoke("queue", inputs[order[at]], configs[order[at]], **kwargs)

        with bar_for(len(inputs)) as bar:
            worked = awork_through(len(inputs), width, bar.aitems(run), keep_errors=return_exceptions)
            async with aclosing(worked) as outcomes:
                async for at, outcome in outcomes:
                    bar.told(outcome)
                    yield order[at], outcome

    def _order(self, inputs: Sequence[Any]) -> Sequence[int]:
        """Return the positions of the inputs in the order in which they are worked through; may take its time."""
        return range(len(inputs))

    def _configs(self, config: Configs, count: int) -> tuple[list[RunnableConfig], int]:
        """Return one config per item, and how many items may be under way."""
        configs = get_config_list(config, count) if count else []
        told = configs[0].get("max_concurrency") if configs else None
        return configs, told or self.admission.max_concurrency + self.max_batch


def in_lanes(prefixes: Sequence[tuple[int, ...]], lanes: int) -> Sequence[int]:
    """Return the positions of `prefixes`, put in order so that long ones that are shared meet.

    They are sorted, cut into as many rows as there are lanes, and taken from the rows in turn: each slot of the server
    then goes on with what its prompt cache knows. Where nothing long is shared, they stay as they are.
    """
    ranked = sorted(range(len(prefixes)), key=prefixes.__getitem__)
    if not any(common(prefixes[one], prefixes[other]) >= LONG_PREFIX for one, other in pairwise(ranked)):
        return range(len(prefixes))
    length = -(-len(ranked) // lanes)
    rows = [ranked[start : start + length] for start in range(0, len(ranked), length)]
    return [at for column in zip_longest(*rows) for at in column if at is not None]


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
