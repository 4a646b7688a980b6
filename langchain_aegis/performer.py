"""Drives the engine's flows, blocking or awaited, with real parts."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from redis.exceptions import RedisError

from langchain_aegis.breaker import Unavailable
from langchain_aegis.connections import Connections
from langchain_aegis.engine import Engine
from langchain_aegis.errands import the_errands
from langchain_aegis.errors import AegisConfigError, AegisConnectionError
from langchain_aegis.flows import Flow, arun, run
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.lookup import Embed, Later, Verify, Wait, Work
from langchain_aegis.notices import logger, warn_once
from langchain_aegis.store import Commands
from langchain_aegis.sweeper import the_sweeper
from langchain_aegis.verifiers import Verifier

T = TypeVar("T")


class Performer:
    """What the parts of a cache share: an engine, and what its flows ask for.

    Args:
        engine: Decides.
        connections: To Redis.
        verifier: Gives second opinions, or None.
    """

    def __init__(self, engine: Engine, connections: Connections, verifier: Verifier | None) -> None:
        self._engine = engine
        self._connections = connections
        self._verifier = verifier
        engine.wake_sweeper = self._sweep

    def _perform(self, step: Any) -> Any:
        if type(step) is Commands:
            return self._connections.perform(step)
        if isinstance(step, Embed):
            return self._engine.embedder.embed(step.text)
        if isinstance(step, Verify):
            return self._opinion().verify(step.cached, step.new)
        if isinstance(step, Work):
            return step.do()
        if isinstance(step, Later):
            return self._leave(step)
        assert isinstance(step, Wait)  # noqa: S101  # there is no other
        return time.sleep(step.seconds)

    async def _aperform(self, step: Any) -> Any:
        if type(step) is Commands:
            return await self._connections.aperform(step)
        if isinstance(step, Embed):
            return await self._engine.embedder.aembed(step.text)
        if isinstance(step, Verify):
            return await self._opinion().averify(step.cached, step.new)
        if isinstance(step, Work):
            return await _in_thread(step.do)
        if isinstance(step, Later):
            return self._leave(step)
        assert isinstance(step, Wait)  # noqa: S101  # there is no other
        return await asyncio.sleep(step.seconds)

    def _leave(self, step: Later) -> None:
        """Have a flow run by another thread; where too many are waiting, one is lost."""
        perform = self._connections.perform
        the_errands.add(self._connections, lambda: run(step.flow(), perform))

    def _opinion(self) -> Verifier:
        if self._verifier is None:
            raise Unavailable("verifier_failed")
        return self._verifier

    def _sweep(self) -> None:
        """Have what was invalidated removed in the background."""
        the_sweeper.wake(self._engine.store, self._connections)

    def _insist(self, flow: Callable[[], Flow[T]]) -> T:
        """Run a flow whose failure the caller must know of. Raises AegisConnectionError if Redis did not do it."""
        try:
            return run(flow(), self._perform)
        except (Unavailable, RedisError) as exc:
            raise _not_done(exc) from exc

    async def _ainsist(self, flow: Callable[[], Flow[T]]) -> T:
        try:
            await arun(self._engine.ready(), self._aperform)
            return await arun(flow(), self._aperform)
        except (Unavailable, RedisError) as exc:
            raise _not_done(exc) from exc


class _Threads:
    """A few threads for what takes some milliseconds: those of the event loop may all be busy with a user's work."""

    def __init__(self) -> None:
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Forget the threads: they are the parent's, after a fork."""
        self.pool = ThreadPoolExecutor(4, thread_name_prefix="aegis-work")


_threads = _Threads()


async def _in_thread(do: Callable[[], T]) -> T:
    """Return what `do` returns, done in a thread with the caller's context."""
    work = partial(contextvars.copy_context().run, without_stop, do)
    return await asyncio.get_running_loop().run_in_executor(_threads.pool, work)


def without_stop(do: Callable[[], T]) -> T:
    """Return what `do` returns; a StopIteration, which no future can hold, is raised as a RuntimeError."""
    try:
        return do()
    except StopIteration as exc:
        raise RuntimeError("the function raised StopIteration") from exc


def swallow(what: str, exc: Exception) -> None:
    """Note a failure that must not cost the user his call."""
    warn_once(f"{what}:{type(exc).__name__}", f"the cache's {what} failed; the call goes on without it ({_where(exc)})")
    logger.debug("%s failed", what, exc_info=exc)


def _where(exc: Exception) -> str:
    """The kind of an error and where it arose: its text may quote a prompt. Our own errors quote none."""
    if isinstance(exc, AegisConfigError):
        return str(exc)
    trace = exc.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" in {trace.tb_frame.f_code.co_name}, line {trace.tb_lineno}" if trace is not None else ""
    return f"{type(exc).__name__}{place}"


def _not_done(exc: Exception) -> AegisConnectionError:
    reason = exc.reason if isinstance(exc, Unavailable) else type(exc).__name__
    return AegisConnectionError(f"Redis did not answer ({reason}): entries may still be served, call this again")
