"""Time budgets for parts that others wrote: what is late or broken costs its result, never the call."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from langchain_aegis.breaker import Breaker, Unavailable
from langchain_aegis.errors import AegisError
from langchain_aegis.notices import warn_once

T = TypeVar("T")

_WORKERS = 8  # threads per part, so that one that hangs does not take those of another


class Budget:
    """Runs the calls of one part within a time budget, behind a breaker of its own.

    Args:
        seconds: How long one call may take.
        name: Of the part; its threads are named after it.
        slow: Reason code of a call that takes too long.
        down: Reason code of a call that fails, or is not made because several have.
        slow_notice: Logged once when a call is late.
        down_notice: Logged once when a call fails; `{}` stands for what happened.
    """

    def __init__(self, seconds: float, *, name: str, slow: str, down: str, slow_notice: str, down_notice: str) -> None:
        self.breaker = Breaker()
        self.seconds = seconds
        self._name = name
        self._slow, self._down = slow, down
        self._slow_notice, self._down_notice = slow_notice, down_notice

    def run(self, work: Callable[[], T]) -> T:
        """Return what `work` returns; it runs in a thread, with the caller's context.

        Raises:
            Unavailable: The breaker is open, `work` failed, or it needs longer; its `late` is then a future.
        """
        self._check()
        future = self._submit(work)
        try:
            return self._done(future.result(self.seconds))
        except TimeoutError as exc:
            if future.done():
                raise self._failed(exc) from exc
            raise self._late(future) from exc
        except (Exception, asyncio.CancelledError) as exc:  # these parts raise what they like
            raise self._failed(exc) from exc

    async def arun(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Like `run` for a coroutine; it runs in this event loop, and ends with its caller's cancellation."""
        self._check()
        return await self._within(asyncio.create_task(work()))

    async def arun_blocking(self, work: Callable[[], T]) -> T:
        """Like `run` without blocking the event loop."""
        self._check()
        return await self._within(asyncio.wrap_future(self._submit(work)))

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        try:
            return _workers(self._name).submit(contextvars.copy_context().run, work)
        except RuntimeError as exc:  # the interpreter is about to end
            raise self._failed(exc) from exc

    async def _within(self, future: asyncio.Future[T]) -> T:
        try:
            done, _ = await asyncio.wait({future}, timeout=self.seconds)
        except asyncio.CancelledError:
            future.cancel()
            raise
        if not done:
            future.add_done_callback(lambda f: f.cancelled() or f.exception())  # nobody may be left to ask
            raise self._late(future)
        if future.cancelled():  # by the part itself: that must not look like the caller's own cancellation
            raise self._failed(RuntimeError())
        try:
            return self._done(future.result())
        except Exception as exc:  # these parts raise what they like
            raise self._failed(exc) from exc

    def _check(self) -> None:
        if not self.breaker.allow():
            raise Unavailable(self._down)

    def _done(self, result: T) -> T:
        self.breaker.succeeded()
        return result

    def _late(self, late: Any) -> Unavailable:
        self.breaker.failed()
        warn_once(self._slow, self._slow_notice)
        return Unavailable(self._slow, late)

    def _failed(self, exc: BaseException) -> Unavailable:
        if isinstance(exc, Unavailable):
            return exc  # the part itself says that there is nothing to ask
        self.breaker.failed()
        # Another's message may quote a prompt: only ours are shown.
        detail = str(exc) if isinstance(exc, AegisError) else type(exc).__name__
        warn_once(self._down, self._down_notice.format(detail))
        return Unavailable(self._down)


_pools: dict[str, ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def _workers(name: str) -> ThreadPoolExecutor:
    """The threads of one part.

    Joined at exit: a native library that still computes in a daemon thread aborts a process that ends.
    """
    if (pool := _pools.get(name)) is None:
        with _pools_lock:
            if (pool := _pools.get(name)) is None:
                pool = _pools[name] = ThreadPoolExecutor(_WORKERS, thread_name_prefix=f"aegis-{name}")
    return pool


def _forget_after_fork() -> None:
    global _pools, _pools_lock
    _pools, _pools_lock = {}, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
