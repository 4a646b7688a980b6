"""One TLS context for all connections to a Redis.

redis-py makes one for every connection, which reads the certificates of the system: 50 ms each time, of an event loop
too.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Mapping
from typing import Any, Final

import redis
import redis.asyncio
from redis.asyncio.connection import RedisSSLContext
from redis.exceptions import ConnectionError as RedisConnectionError

from langchain_aegis.loops import in_a_thread

_DEFAULTS: Final = {"cert_reqs": "required", "check_hostname": True}  # those of redis-py's connections


class Tls:
    """Makes the context when it is first needed, whichever thread needs it.

    Args:
        arguments: Of redis-py's connections, with those that begin with `ssl_`.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        known = {f"ssl_{name}" for name in RedisSSLContext.__slots__}
        told = {name.removeprefix("ssl_"): value for name, value in arguments.items() if name in known}
        self._told = {**_DEFAULTS, **told}
        self.reset()

    def reset(self) -> None:
        """Forget the context, and whoever is making it: a thread of the parent, after a fork."""
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None

    def get(self) -> ssl.SSLContext:
        """Return the context; reads files the first time. Raises OSError, and RedisError for what cannot be used."""
        with self._lock:
            if self._context is None:
                try:
                    self._context = RedisSSLContext(**self._told).get()
                except ValueError as exc:
                    raise RedisConnectionError(f"no TLS ({type(exc).__name__})") from exc
            return self._context

    async def aget(self) -> ssl.SSLContext:
        """Like `get`, without blocking the event loop: whoever has to read files is a thread of its own."""
        if (made := self._context) is not None:
            return made
        return await in_a_thread("aegis-tls", self.get)

    def failed(self, error: BaseException) -> None:
        """Read certificates anew for the next connection if an error says that one was not believed: it may be new."""
        seen: BaseException | None = error
        while seen is not None:
            if isinstance(seen, ssl.SSLError):
                with self._lock:
                    self._context = None
                return
            seen = seen.__cause__ or seen.__context__


class TlsConnection(redis.SSLConnection):
    """A blocking connection of redis-py with a context that others use too."""

    def __init__(self, *, tls: Tls, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._tls = tls

    def _wrap_socket_with_ssl(self, sock: Any) -> Any:
        if self.ssl_validate_ocsp or self.ssl_validate_ocsp_stapled:
            return super()._wrap_socket_with_ssl(sock)  # type: ignore[no-untyped-call]
        return self._tls.get().wrap_socket(sock, server_hostname=self.host)


class AsyncTlsConnection(redis.asyncio.SSLConnection):
    """The same for an event loop, which never waits while files are read."""

    def __init__(self, *, tls: Tls, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._tls = tls

    async def _connect(self) -> None:
        async with asyncio.timeout(self.socket_connect_timeout):  # for both
            self.ssl_context.context = await self._tls.aget()
            await super()._connect()  # type: ignore[no-untyped-call]
