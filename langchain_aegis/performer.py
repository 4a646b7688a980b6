"""Drives the engine's flows, blocking or awaited, with real parts."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from typing import Any, TypeVar

from redis.exceptions import AuthenticationError, AuthorizationError, RedisError, ResponseError

from langchain_aegis.breaker import Unavailable
from langchain_aegis.connections import Connections
from langchain_aegis.digests import AskServer
from langchain_aegis.engine import Engine
from langchain_aegis.errors import AegisConfigError, AegisConnectionError, AegisError
from langchain_aegis.flows import Flow, Settle, arun, run
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.lookup import Begun
from langchain_aegis.namespace import OF_CLUSTER
from langchain_aegis.notices import logger, warn_once
from langchain_aegis.replies import error_kind, is_of_cluster
from langchain_aegis.stamps import follows
from langchain_aegis.steps import Aside, Embed, Verify, Wait, Work
from langchain_aegis.store import Commands
from langchain_aegis.sweeper import the_sweeper
from langchain_aegis.updates import Later
from langchain_aegis.verifiers import Verifier
from langchain_aegis.writes import Write, the_writer

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
            return self._later(step)
        if isinstance(step, Aside):
            return self._aside(step)
        if isinstance(step, Settle):
            with contextlib.suppress(FutureTimeoutError):
                step.done.result(step.seconds)
            return None
        if isinstance(step, AskServer):
            return step.perform()
        assert isinstance(step, Wait)  # noqa: S101  # there is no other
        _may_wait()
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
            return self._later(step)
        if isinstance(step, Aside):
            return self._aside(step)
        if isinstance(step, Settle):
            done = asyncio.wrap_future(step.done)
            await asyncio.wait([done], timeout=step.seconds)
            return done.cancel() and None  # what is waited for goes on
        if isinstance(step, AskServer):
            return await step.aperform()
        assert isinstance(step, Wait)  # noqa: S101  # there is no other
        _may_wait()
        return await asyncio.sleep(step.seconds)

    def _ask(self, begun: Begun) -> None:
        """Ask Redis what a lookup that has begun wants to know."""
        asked = time.perf_counter()
        try:
            begun.replies = self._connections.ask(begun.request, 2, begun.meanwhile)
        except Unavailable as exc:
            begun.replies = exc
        begun.took_s = time.perf_counter() - asked

    async def _aask(self, begun: Begun) -> None:
        asked = time.perf_counter()
        try:
            begun.replies = await self._connections.aask(begun.request, 2, begun.meanwhile)
        except Unavailable as exc:
            begun.replies = exc
        begun.took_s = time.perf_counter() - asked

    def _later(self, step: Later) -> None:
        do = partial(run, step.rest(), self._perform)
        the_writer.put(Write(do, step.exact, step.scope, step.size, step.place))

    def _aside(self, step: Aside) -> None:
        """Have a flow run in the background; where too much is waiting, it is left."""
        if the_writer.crowded() is None:
            place = self._engine.options.settings.namespace
            the_writer.put(Write(partial(self._quietly, step), "", "", 0, place))

    def _quietly(self, step: Aside) -> None:
        try:
            run(step.flow(), self._connections.perform)
        except Exception as exc:  # nobody is there to catch it, and no answer depends on it
            logger.debug("what a hit left to be noted was not", exc_info=exc)

    def _written(self) -> None:
        """Wait until what was told to be stored in this namespace is stored, but not for ever."""
        the_writer.drain(self._engine.options.settings.namespace)

    async def _awritten(self) -> None:
        if the_writer.busy:
            await asyncio.to_thread(self._written)

    def _opinion(self) -> Verifier:
        if self._verifier is None:
            raise Unavailable("verifier_failed")
        return self._verifier

    def _sweep(self) -> None:
        """Have what was invalidated removed in the background."""
        the_sweeper.wake(self._engine.store, self._connections)

    def _insist(self, flow: Callable[[], Flow[T]]) -> T:
        """Run a flow whose failure the caller must know of. Raises AegisConnectionError if Redis did not do it."""
        self._written()
        try:
            return run(flow(), self._perform)
        except (Unavailable, RedisError) as exc:
            raise _not_done(exc) from exc

    async def _ainsist(self, flow: Callable[[], Flow[T]]) -> T:
        await self._awritten()
        try:
            await arun(self._engine.ready(), self._aperform)
            return await arun(flow(), self._aperform)
        except (Unavailable, RedisError) as exc:
            raise _not_done(exc) from exc


def _may_wait() -> None:
    """Raise Unavailable for a lookup that need not wait for another process's answer: it follows its making."""
    if follows():
        raise Unavailable("followed")


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


def unfit(exc: Exception) -> AegisError:
    """Return what to raise where Redis was looked at and an error came of it."""
    seen: BaseException | None = exc
    while seen is not None:
        kind = type(seen).__name__
        if isinstance(seen, (AuthenticationError, AuthorizationError)):
            return AegisConfigError(f"Redis refuses the user or the password, or wants one ({kind}): see redis_url")
        if isinstance(seen, ssl.SSLError):
            return AegisConfigError(f"no TLS with this Redis ({kind}): see rediss:// and ssl_ca_certs in redis_url")
        if isinstance(seen, ResponseError):
            if is_of_cluster(seen):
                return AegisConfigError(OF_CLUSTER)
            return AegisConfigError(f"Redis does not do what the cache needs ({error_kind(seen)}): see `aegis doctor`")
        seen = seen.__cause__ or seen.__context__
    reason = exc.reason if isinstance(exc, Unavailable) else type(exc).__name__
    return AegisConnectionError(f"Redis does not answer ({reason})")


def _not_done(exc: Exception) -> AegisConnectionError:
    reason = exc.reason if isinstance(exc, Unavailable) else type(exc).__name__
    return AegisConnectionError(f"Redis did not answer ({reason}): entries may still be served, call this again")
