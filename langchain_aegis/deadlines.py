"""End a thread's HTTP request at its deadline, whichever of its steps waits for the network.

httpx bounds each read by itself, and a server that sends a byte now and then is never late for one. What waits here
looks at the clock of the whole request too.
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from types import TracebackType
from typing import Any

import httpcore
import httpx

from langchain_aegis.settings import is_looked_up


class _Told(threading.local):
    ends: float = math.inf


_told = _Told()


class Until:
    """A context in which no wait of this thread goes on beyond `ends`, on the monotonic clock; inf is no bound.

    What waits raises the timeouts of httpx, if its client was given to `bounded`.
    """

    __slots__ = ("_before", "_ends")

    def __init__(self, ends: float) -> None:
        self._ends = ends

    def __enter__(self) -> None:
        self._before, _told.ends = _told.ends, self._ends

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _told.ends = self._before


def bounded(client: httpx.Client) -> httpx.Client:
    """Return the client, every connection of which now heeds `Until`; a transport of another kind stays as it is."""
    for transport in (client._transport, *client._mounts.values()):
        pool: Any = getattr(transport, "_pool", None)  # httpx has no argument for httpcore's `network_backend`
        backend = getattr(pool, "_network_backend", None)
        if isinstance(backend, httpcore.NetworkBackend) and not isinstance(backend, _Backend):
            pool._network_backend = _Backend(backend)
    return client


def _least(timeout: float | None, late: type[httpcore.TimeoutException]) -> float | None:
    """Return how long one wait may take, in seconds; None is no bound."""
    if _told.ends == math.inf:
        return timeout
    left = _told.ends - time.monotonic()
    if left <= 0:
        raise late("the deadline of the request has passed")
    return left if timeout is None else min(timeout, left)


class _Backend(httpcore.NetworkBackend):
    def __init__(self, inner: httpcore.NetworkBackend) -> None:
        self._inner = inner

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        timeout = _least(timeout, httpcore.ConnectTimeout)
        if timeout is None or not is_looked_up(host):
            return _Stream(self._inner.connect_tcp(host, port, timeout, local_address, socket_options))
        ends = time.monotonic() + timeout
        *others, last = _found(host, port, timeout)
        for address in others:
            with contextlib.suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return _Stream(self._inner.connect_tcp(address, port, _left(ends), local_address, socket_options))
        return _Stream(self._inner.connect_tcp(last, port, _left(ends), local_address, socket_options))

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.NetworkStream:
        timeout = _least(timeout, httpcore.ConnectTimeout)
        return _Stream(self._inner.connect_unix_socket(path, timeout, socket_options))

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _least(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, _least(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        timeout = _least(timeout, httpcore.ConnectTimeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def _left(ends: float) -> float:
    left = ends - time.monotonic()
    if left <= 0:
        raise httpcore.ConnectTimeout("timed out")
    return left


def _found(host: str, port: int, timeout_s: float) -> list[str]:
    """Return the addresses of a host, looked up in a thread, for which the caller waits no longer than told.

    Raises:
        httpcore.ConnectTimeout: The lookup takes longer; its thread ends when the system gives up.
        httpcore.ConnectError: Nobody knows the name.
    """
    found: Future[list[str]] = Future()

    def look_up() -> None:
        try:
            told = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
            found.set_result([str(address[0]) for *_, address in told])
        except (OSError, UnicodeError) as exc:  # a label that is too long is a UnicodeError
            found.set_exception(exc)

    threading.Thread(target=look_up, name="aegis-look-up", daemon=True).start()
    try:
        addresses = found.result(timeout_s)
    except FutureTimeoutError as exc:
        raise httpcore.ConnectTimeout("its name was not found in time") from exc
    except (OSError, UnicodeError) as exc:
        raise httpcore.ConnectError(str(exc)) from exc
    if not addresses:
        raise httpcore.ConnectError("its name has no address")
    return addresses
