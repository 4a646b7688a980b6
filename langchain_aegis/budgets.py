"""Time budgets for parts that others wrote: what is late or broken costs its result, never the call."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from typing import Any, Generic, TypeVar

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
        errand = _Errand(work)
        self._start(errand)
        try:
            return self._done(errand.result(self.seconds))
        except _Late as exc:
            raise self._late(exc.future) from None
        except (Exception, asyncio.CancelledError) as exc:  # these parts raise what they like
            raise self._failed(exc) from exc

    async def arun(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Like `run` for a coroutine; it runs in this event loop, and ends with its caller's cancellation."""
        self._check()
        return await self._within(asyncio.create_task(work()))

    async def arun_blocking(self, work: Callable[[], T]) -> T:
        """Like `run` without blocking the event loop."""
        self._check()
        future: Future[T] = Future()
        self._start(_Errand(work, future))
        return await self._within(asyncio.wrap_future(future))

    def _start(self, errand: _Errand[Any]) -> None:
        try:
            _workers(self._name).start(errand)
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


class _Errand(Generic[T]):
    """A piece of work that a thread does while somebody waits for it, for a while.

    Args:
        work: What is done, with the context of whoever makes this.
        future: Told what comes of it, too; cancelled before the work begins, nothing is done.
    """

    __slots__ = ("_context", "_error", "_future", "_guard", "_over", "_result", "_work")

    def __init__(self, work: Callable[[], T], future: Future[T] | None = None) -> None:
        self._context = contextvars.copy_context()
        self._work = work
        self._future = future
        self._guard = threading.Lock()  # held while it is said who is told
        self._over = threading.Lock()  # held until there is a result
        self._over.acquire()
        self._result: T | None = None
        self._error: BaseException | None = None

    def do(self) -> None:
        """Do the work; never raises."""
        if self._future is not None and not self._future.set_running_or_notify_cancel():
            return
        try:
            self._result = self._context.run(self._work)
        except BaseException as exc:  # whoever waits decides what it means
            self._error = exc
        with self._guard:
            self._over.release()
            future = self._future
        if future is not None:
            self._tell(future)

    def result(self, seconds: float) -> T:
        """Return what the work has returned, or raise what it has raised. Raises Late."""
        if not self._over.acquire(timeout=seconds):
            with self._guard:
                if not self._over.acquire(blocking=False):
                    self._future = Future()
                    raise _Late(self._future)
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # there is one where there is no error

    def _tell(self, future: Future[T]) -> None:
        with contextlib.suppress(InvalidStateError):  # it was given up meanwhile
            if self._error is not None:
                future.set_exception(self._error)
            else:
                future.set_result(self._result)  # type: ignore[arg-type]  # as in `result`


class _Late(Exception):
    """Nobody waits any longer; the future still gets the result."""

    def __init__(self, future: Future[Any]) -> None:
        super().__init__()
        self.future = future


class _Workers:
    """A few threads of one part.

    An errand is handed to the thread that was used last, by a lock that this one waits for: that takes two thirds of
    the time that a ThreadPoolExecutor's queue and future take. Asking a quick embedder in the caller's own thread would
    take less, but the one call that hangs, be it once in a million, would then not end with its budget.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition(threading.Lock())
        self._free: list[_Worker] = []
        self._waiting: deque[_Errand[Any]] = deque()
        self._count = 0
        self._closed = False

    def start(self, errand: _Errand[Any]) -> None:
        """Have an errand done, at once if a thread is free. Raises RuntimeError if the interpreter is about to end."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the interpreter is about to end")
            if self._free:
                self._free.pop().give(errand)
            elif self._count < _WORKERS:
                _Worker(self, errand, f"aegis-{self._name}_{self._count}").start()
                self._count += 1
            else:
                self._waiting.append(errand)

    def next(self, worker: _Worker) -> _Errand[Any] | None:
        """Return what a thread is to do next; None: it waits to be given something."""
        with self._changed:
            if self._waiting:
                return self._waiting.popleft()
            self._free.append(worker)
            if self._closed:
                self._changed.notify_all()
            return None

    def close(self) -> None:
        """Wait until all errands are done; then there are no more."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: len(self._free) == self._count)


class _Worker(threading.Thread):
    """Does one errand after another."""

    def __init__(self, workers: _Workers, first: _Errand[Any], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._workers = workers
        self._errand: _Errand[Any] | None = first  # what was given and is not begun
        self._wanted = threading.Lock()
        self._wanted.acquire()

    def give(self, errand: _Errand[Any]) -> None:
        """Give an errand to a thread that waits."""
        self._errand = errand
        self._wanted.release()

    def run(self) -> None:
        """Do what is given; never ends by itself."""
        errand, self._errand = self._errand, None
        while True:
            if errand is not None:
                errand.do()
            errand = self._workers.next(self)
            if errand is None:  # an idle thread keeps nobody's question
                self._wanted.acquire()  # released once each time that it is given one
                errand, self._errand = self._errand, None


_pools: dict[str, _Workers] = {}
_pools_lock = threading.Lock()


def _workers(name: str) -> _Workers:
    """The threads of one part."""
    if (pool := _pools.get(name)) is None:
        with _pools_lock:
            pool = _pools.setdefault(name, _Workers(name))
    return pool


@atexit.register
def _close() -> None:
    """Wait for the threads: a native library that still computes in one aborts a process that ends."""
    for pool in list(_pools.values()):
        pool.close()


def _forget_after_fork() -> None:
    global _pools, _pools_lock
    _pools, _pools_lock = {}, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
