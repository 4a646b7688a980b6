"""Redis clients that never make a caller wait: tight timeouts, no retries, a breaker."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from typing import Any

import hiredis
import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, BusyLoadingError, ReadOnlyError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from langchain_aegis.breaker import Breaker, Unavailable
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.links import AllInUse, AsyncLinks, Link, Links, TooLarge, packed
from langchain_aegis.loops import PerLoop
from langchain_aegis.notices import warn_once
from langchain_aegis.sentinel_urls import SCHEMES, sentinels_of
from langchain_aegis.sentinels import (
    AsyncSoughtConnection,
    AsyncSoughtTlsConnection,
    Seeker,
    SoughtConnection,
    SoughtTlsConnection,
    is_sentinel_pool,
)
from langchain_aegis.settings import is_looked_up, redact_url
from langchain_aegis.store import Commands
from langchain_aegis.tls import AsyncTlsConnection, Tls, TlsConnection

# Of a given client's arguments: those that would undo the tight timeouts, or that belong to its own classes.
_NEVER_TAKEN_OVER = (
    "retry", "retry_on_error", "retry_on_timeout", "parser_class", "encoder_class", "event_dispatcher", "lib_name",
    "lib_version", "maint_notifications_config", "maint_notifications_pool_handler", "redis_connect_func",
)  # fmt: skip
_BESIDE_ANSWER = 2 * 1024 * 1024  # bytes of an entry beside its answer, far more than there are
_BESIDE_ANSWERS = 20 * 1024 * 1024  # of a reply to a search; where there is none, it holds 2,000 vectors
_FIRST_PROBE_S = 1.0  # so long one that has gone is left alone ...
_PROBE_S = 5.0  # ... and then tried no more often than this; it may take as long to answer
_ASK_AGAIN_S = 0.1  # after so long, if it was late or is still loading
_SCHEMES = ("redis://", "rediss://", "unix://", *SCHEMES)


class Connections:
    """Performs a store's commands, blocking or awaited, on one Redis.

    Args:
        url: `redis://`, `rediss://` or `unix://`, or of Sentinels, see `sentinel_urls`.
        client: Use this client's server and credentials instead (a `redis.Redis` or `redis.asyncio.Redis`; what
            `Sentinel.master_for` made leads to whichever server is the master).
        budget_s: How long one round trip may take; a slower one counts as a fault.
        kwargs: Further arguments of redis-py's connections.
        max_connections: For all threads together; an event loop needs one.
        max_entry_bytes: Of an answer that is served.
        k: So many answers may come at once.

    Raises:
        AegisConfigError: The URL or an argument cannot be used. Nothing is connected yet.
    """

    tier: Any = None  # of those that have one, see `local_tier`

    def __init__(
        self,
        url: str,
        *,
        client: Any = None,
        budget_s: float = 0.1,
        kwargs: Mapping[str, Any] | None = None,
        max_connections: int = 32,
        max_entry_bytes: int = 1024 * 1024,
        k: int = 5,
    ) -> None:
        self.breaker = self._new_breaker()
        self._budget_s = budget_s
        self._size = max_connections
        # More is not read of what Redis answers: it is none of ours.
        self._largest_entry = _BESIDE_ANSWER + max_entry_bytes
        self._largest = _BESIDE_ANSWERS + k * max_entry_bytes
        self._told = {**_connection_arguments(url, client, budget_s), **(kwargs or {})}
        self._ours: dict[str, Any] = {
            "decode_responses": False,
            "protocol": 2,  # with 3, raw replies of FT.SEARCH change their shape
            "socket_timeout": budget_s,
            "socket_connect_timeout": budget_s,
            "driver_info": None,  # saves a round trip when connecting
        }
        self._sought = "seek" in self._told
        self._tls = Tls({**self._told, **self._ours})
        self._lock = threading.Lock()
        self._probing: Any = None  # the connection over which it is tried whether Redis is back
        self._sync: Links | None = None
        self._async: PerLoop[AsyncLinks] = PerLoop(self._make_async, AsyncLinks.aclose)
        _living.add(self)
        if self._sought:
            self._told["seek"].moved = self._moved
        self._make_sync()  # a wrong argument is said now; nothing is connected

    def perform(self, step: Commands) -> list[Any]:
        """Send one round trip; error replies are returned as values.

        Raises:
            Unavailable: Redis cannot be asked, or did not answer within the budget.
        """
        largest = self._largest_entry if step.request else self._largest
        return self.ask(step.request or packed(step.each), len(step.each), step.meanwhile, largest)

    async def aperform(self, step: Commands) -> list[Any]:
        """Like `perform`, without blocking the event loop."""
        largest = self._largest_entry if step.request else self._largest
        return await self.aask(step.request or packed(step.each), len(step.each), step.meanwhile, largest)

    def ask(
        self, request: bytes, count: int, meanwhile: Callable[[], object] | None = None, largest: int | None = None
    ) -> list[Any]:
        """Do what `perform` does, with `count` commands as they are sent.

        Of replies that have more bytes than `largest`, default: than one entry has, no more are read.
        """
        if not self.breaker.allow():
            raise Unavailable("redis_down")
        links = self._sync
        if links is None:
            with self._lock:
                links = self._sync = self._sync or self._make_sync()
        try:
            replies = links.ask(request, count, meanwhile, largest=largest or self._largest_entry)
        except (RedisError, hiredis.HiredisError, OSError) as exc:
            raise self._unavailable(exc) from exc
        self.breaker.succeeded()
        if self._sought and _of_a_replica(replies):
            self._drop(links)  # another is the master by now
        return replies

    async def aask(
        self, request: bytes, count: int, meanwhile: Callable[[], object] | None = None, largest: int | None = None
    ) -> list[Any]:
        """Like `ask`, without blocking the event loop."""
        if not self.breaker.allow():
            raise Unavailable("redis_down")
        try:
            replies = await self._async.get().ask(request, count, meanwhile, largest=largest or self._largest_entry)
        except (RedisError, hiredis.HiredisError, OSError) as exc:
            raise self._unavailable(exc) from exc
        self.breaker.succeeded()
        if self._sought and _of_a_replica(replies):
            await self._async.get().aclose()
        return replies

    def close(self) -> None:
        """Close the connections of all threads; a later call opens new ones."""
        self._drop(self._sync)
        probing, self._probing = self._probing, None
        if probing is not None:
            probing.disconnect()  # ends it

    def _drop(self, links: Links | None) -> None:
        with self._lock:
            if self._sync is links:
                self._sync = None
        if links is not None:
            links.close()

    def _moved(self) -> None:
        """Leave the old master, wherever it is still spoken to."""
        self._drop(self._sync)
        for links in self._async.values():
            links.leave()

    async def aclose(self) -> None:
        """Close the connections of this event loop, and those of all threads."""
        await self._async.aclose()
        self.close()

    def after_fork(self) -> None:
        """In the child of a fork: the connections are the parent's."""
        self._lock = threading.Lock()
        self.breaker, self._probing = self._new_breaker(), None
        self._tls.reset()
        self._sync = None
        self._async.forget()

    def _unavailable(self, exc: Exception) -> Unavailable:
        if isinstance(exc, TooLarge):  # Redis is well
            warn_once("reply_too_large", "Redis holds something very large under a name of ours; it is not read")
            return Unavailable("unreadable" if exc.own else "redis_down")
        if isinstance(exc, AllInUse):  # those who have one will find out how Redis is
            return Unavailable("redis_slow")
        self._tls.failed(exc)
        self.breaker.failed()
        slow = isinstance(exc, (RedisTimeoutError, TimeoutError))
        if isinstance(exc, (AuthenticationError, AuthorizationError)):  # it will not be otherwise by itself
            warn_once(
                "redis_unavailable:login",
                f"Redis refuses the user or the password, or asks for one ({type(exc).__name__}); calls go to the "
                "model until that is set right. See `aegis doctor`",
                level=logging.ERROR,
            )
            return Unavailable("redis_down")
        warn_once(
            "redis_unavailable",
            f"Redis does not answer ({type(exc).__name__}); calls go to the model until it does. See `aegis doctor`",
        )
        return Unavailable("redis_slow" if slow else "redis_down")

    def _new_breaker(self) -> Breaker:
        return Breaker(pause_s=_FIRST_PROBE_S, probe=self._probe, again_s=_PROBE_S)

    def _probe(self) -> None:
        """Have a thread find out whether Redis is back; no caller waits for that."""
        try:
            threading.Thread(target=self._try, name="aegis-probe", daemon=True).start()
        except RuntimeError:  # the interpreter is about to end
            self.breaker.tried(False)

    def _try(self) -> None:
        breaker, well = self.breaker, False
        try:
            # Another may be the master before one that is frozen goes on.
            patience_s = _FIRST_PROBE_S if self._sought else _PROBE_S
            self._probing = made = self.connecting(
                {"socket_timeout": patience_s, "socket_connect_timeout": patience_s}
            )()
            link = Link(made)
            until_s = time.monotonic() + patience_s
            while self._probing is made and (began_s := time.monotonic()) < until_s:
                (reply,) = link.ask(packed([("PING",)]), 1, None, until_s)
                refused = isinstance(reply, RedisConnectionError)  # it is locked, full, or loading
                well = not refused and time.monotonic() - began_s <= self._budget_s
                if well or (refused and not isinstance(reply, BusyLoadingError)):
                    break
                time.sleep(_ASK_AGAIN_S)
            link.close()
        except Exception as exc:  # whatever it is: Redis is not back
            self._tls.failed(exc)
        finally:
            breaker.tried(well)

    def connecting(self, other: Mapping[str, Any] | None = None) -> Callable[[], Any]:
        """Return what makes a connection of redis-py that blocks and is not connected yet.

        Args:
            other: Arguments that differ from those of the connections for calls.
        """
        arguments = {**self._told, **self._ours, "retry": Retry(NoBackoff(), 0), **(other or {})}
        kind = _connection_class(
            arguments,
            SoughtConnection if self._sought else redis.Connection,
            partial(SoughtTlsConnection if self._sought else TlsConnection, tls=self._tls),
            redis.UnixDomainSocketConnection,
        )
        make = partial(kind, **arguments)
        try:
            made = make()  # unconnected: only checks the arguments
        except (TypeError, RedisError) as exc:
            raise AegisConfigError(f"redis_kwargs: {exc}") from exc
        self._by_name = is_looked_up(getattr(made, "host", None))
        return make

    def _watched(self, connection: Any) -> Any:
        """Return a connection that will be used for calls; for those who want to know when it is connected."""
        return connection

    def _make_sync(self) -> Links:
        connecting = self.connecting()

        def make() -> Any:
            return self._watched(connecting())

        return Links(partial(_connected, make, self._budget_s) if self._by_name else make, self._size, self._budget_s)

    def _make_async(self) -> AsyncLinks:
        arguments = {**self._told, **self._ours, "retry": AsyncRetry(NoBackoff(), 0)}
        kind = _connection_class(
            arguments,
            AsyncSoughtConnection if self._sought else redis.asyncio.Connection,
            partial(AsyncSoughtTlsConnection if self._sought else AsyncTlsConnection, tls=self._tls),
            redis.asyncio.UnixDomainSocketConnection,
        )
        make = partial(kind, **arguments)
        return AsyncLinks(lambda: self._watched(make()), self._budget_s)


def _connection_arguments(url: str, client: Any, budget_s: float) -> dict[str, Any]:
    if client is None and (watching := sentinels_of(url)) is not None:
        client = watching.client()
    if client is None:
        if not url.startswith(_SCHEMES):
            raise AegisConfigError(
                f"redis_url must start with {', '.join(_SCHEMES)}, got {redact_url(url)!r} (try redis://127.0.0.1:6379)"
            )
        try:
            return dict(redis.connection.parse_url(url))
        except ValueError as exc:
            raise AegisConfigError(f"redis_url cannot be read: {redact_url(url)!r}") from exc
    pool = getattr(client, "connection_pool", None)
    if not isinstance(pool, (redis.ConnectionPool, redis.asyncio.ConnectionPool)):
        raise AegisConfigError(
            "redis must be a redis.Redis or redis.asyncio.Redis client of one server, or one that Sentinel.master_for "
            "made; or give redis_url"
        )
    told = dict(pool.connection_kwargs)
    if is_sentinel_pool(pool):
        told.pop("connection_pool", None)
        told["seek"] = Seeker(pool, budget_s)
    for ours in _NEVER_TAKEN_OVER:
        told.pop(ours, None)
    told["connection_class"] = pool.connection_class
    return told


def _of_a_replica(replies: list[Any]) -> bool:
    return any(isinstance(reply, ReadOnlyError) for reply in replies)


def _connection_class(arguments: dict[str, Any], plain: type, tls: Any, unix: type) -> Any:
    """Choose the class by what the URL or the client asked for; drops the argument that said so."""
    told = arguments.pop("connection_class", None)
    name = told.__name__ if told is not None else ""
    if "path" in arguments or "Unix" in name:
        return unix
    return tls if "SSL" in name else plain


def _connected(make: Callable[[], Any], budget_s: float) -> Any:
    """Return a connection that is connected, in a thread: the caller waits for it no longer than the budget.

    Raises what `connect` raises, and RedisTimeoutError.
    """
    connection: Any = make()
    done: Future[None] = Future()

    def connect() -> None:
        try:
            connection.connect()
        except BaseException as exc:  # whoever waits decides what it means
            with contextlib.suppress(InvalidStateError):
                done.set_exception(exc)
        else:
            try:
                done.set_result(None)
            except InvalidStateError:  # nobody waits any longer
                connection.disconnect()

    threading.Thread(target=connect, name="aegis-connect", daemon=True).start()
    try:
        done.result(budget_s)
    except FutureTimeoutError as exc:
        if done.cancel():
            raise RedisTimeoutError("Redis was not found in time") from exc
        done.result()
    return connection


_living: weakref.WeakSet[Connections] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for connections in list(_living):
        connections.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
