"""Connections to whichever server is the master now, as Sentinels tell: of a client that `Sentinel.master_for` made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias, TypeGuard

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from redis.backoff import NoBackoff
from redis.retry import Retry

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.loops import in_a_thread
from langchain_aegis.tls import AsyncTlsConnection, TlsConnection

Pool: TypeAlias = redis.sentinel.SentinelConnectionPool | redis.asyncio.sentinel.SentinelConnectionPool
_TAKEN_OVER: Final = {"host", "port", "username", "password", "credential_provider"}
PLACE: Final = "master"  # stands where a connection has a host, until it is known


def is_sentinel_pool(pool: Any) -> TypeGuard[Pool]:
    """Say whether a client's pool asks Sentinels for the master; raises AegisConfigError if it is to read replicas."""
    if not isinstance(pool, (redis.sentinel.SentinelConnectionPool, redis.asyncio.sentinel.SentinelConnectionPool)):
        return False
    if not pool.is_master:
        raise AegisConfigError("redis must be a client of the master, which the cache writes to: Sentinel.master_for")
    return True


class Seeker:
    """Finds the master, blocking; may be used from any thread.

    Args:
        pool: Of the client, blocking or not.
        timeout_s: For each Sentinel that is asked.

    Attributes:
        moved: Called when the master is another than the last time, before its address is returned.
    """

    def __init__(self, pool: Pool, timeout_s: float) -> None:
        self.moved: Callable[[], None] = _nothing
        self._last: tuple[str, int] | None = None
        manager: Any = pool.sentinel_manager
        self._service: Any = pool.service_name
        self._told = [_arguments(one, timeout_s) for one in manager.sentinels]
        self._others: int = manager.min_other_sentinels
        self._forced: Any = getattr(manager, "_force_master_ip", None)

    def __call__(self) -> tuple[str, int]:
        """Return the address of the master. Raises RedisError if no Sentinel tells one."""
        asked: Any = redis.sentinel.Sentinel(
            [], min_other_sentinels=self._others, sentinel_kwargs={}, force_master_ip=self._forced
        )
        asked.sentinels = [redis.Redis(**told) for told in self._told]
        try:
            host, port = asked.discover_master(self._service)
        finally:
            for one in asked.sentinels:
                one.close()
        found = str(host), int(port)
        last, self._last = self._last, found
        if last not in (None, found):
            self.moved()  # what still speaks to the old one would write where nobody reads
        return found


def _nothing() -> None:
    """Do nothing."""


class _Sought:
    """A blocking connection to the master."""

    host: str
    port: int

    def __init__(self, *, seek: Seeker, **arguments: Any) -> None:
        super().__init__(host=PLACE, **arguments)  # type: ignore[call-arg]
        self._seek = seek

    def _connect(self) -> Any:
        self.host, self.port = self._seek()
        return super()._connect()  # type: ignore[misc]


class SoughtConnection(_Sought, redis.Connection):
    """A blocking connection to the master."""


class SoughtTlsConnection(_Sought, TlsConnection):
    """The same over TLS."""


class _AsyncSought:
    """A connection to the master, for an event loop."""

    host: str
    port: int
    socket_connect_timeout: float | None

    def __init__(self, *, seek: Seeker, **arguments: Any) -> None:
        super().__init__(host=PLACE, **arguments)  # type: ignore[call-arg]
        self._seek = seek

    async def _connect(self) -> None:
        async with asyncio.timeout(self.socket_connect_timeout):  # for both
            self.host, self.port = await in_a_thread("aegis-sentinel", self._seek)
            await super()._connect()  # type: ignore[misc]


class AsyncSoughtConnection(_AsyncSought, redis.asyncio.Connection):
    """A connection to the master, for an event loop."""


class AsyncSoughtTlsConnection(_AsyncSought, AsyncTlsConnection):
    """The same over TLS."""


def _arguments(sentinel: Any, timeout_s: float) -> Mapping[str, Any]:
    """Return what a client of a Sentinel is made of: where it is, and who asks."""
    pool = sentinel.connection_pool
    told = {n: v for n, v in pool.connection_kwargs.items() if n in _TAKEN_OVER or n.startswith("ssl_")}
    told.update(protocol=2, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0))
    return {**told, "ssl": True} if "SSL" in pool.connection_class.__name__ else told
