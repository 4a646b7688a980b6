"""httpx transports that reach an ASGI application without a socket.

Unlike httpx's own ASGI transport, the answer streams, a read timeout applies, closing the response is seen by the
application as a client that leaves, and there is a transport for the synchronous client too. The application runs in
the loop of a background thread, so any number of threads and event loops may use it.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
from starlette.types import ASGIApp, Message

from langchain_aegis.embedded.wire_thread import LoopThread

_Item = Message | Exception | None  # None: the application has returned


class _Call:
    """One request, running in the application's loop."""

    def __init__(self, app: ASGIApp, request: httpx.Request, body: bytes, deliver: Callable[[_Item], None]) -> None:
        self._app = app
        self._deliver = deliver
        self._left = asyncio.Event()
        self._body: bytes | None = body
        url = request.url
        self._scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "scheme": url.scheme,
            "path": url.path,
            "raw_path": url.raw_path.split(b"?")[0],
            "query_string": url.query,
            "root_path": "",
            "server": (url.host, url.port),
            "client": ("127.0.0.1", 0),
            "state": {"cut": self._cut},
        }
        self._task = asyncio.get_running_loop().create_task(self._run())

    def leave(self) -> None:
        """The client has what it wants, or goes away."""
        self._left.set()

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
        except Exception as exc:  # whatever the application raises belongs to the caller, as with httpx's transport
            self._deliver(exc)
        else:
            self._deliver(None)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self._deliver(message)
        await asyncio.sleep(0)  # as a socket would: others may run between two lines

    def _cut(self) -> None:
        text = "peer closed connection without sending complete message body (incomplete chunked read)"
        self._deliver(httpx.RemoteProtocolError(text))
        self._left.set()


class InProcessTransport(httpx.BaseTransport):
    """For `httpx.Client(transport=...)`."""

    def __init__(self, app: ASGIApp, thread: LoopThread) -> None:
        self._app = app
        self._thread = thread

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request and return its response as soon as its head is there."""
        arrived: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        body = request.read()
        call = _started(self._thread, lambda: _Call(self._app, request, body, arrived.put))
        timeout = _read_timeout(request)

        def take() -> Message | None:
            try:
                return _message(arrived.get(timeout=timeout))
            except queue.Empty as exc:
                raise httpx.ReadTimeout("timed out", request=request) from exc

        stream = _Stream(take, lambda: _leave(self._thread, call))
        try:
            head = _head(take())
        except BaseException:
            stream.close()
            raise
        return httpx.Response(head["status"], headers=head["headers"], stream=stream, request=request)


class InProcessAsyncTransport(httpx.AsyncBaseTransport):
    """For `httpx.AsyncClient(transport=...)`, in any event loop."""

    def __init__(self, app: ASGIApp, thread: LoopThread) -> None:
        self._app = app
        self._thread = thread

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request and return its response as soon as its head is there."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[_Item] = asyncio.Queue()

        def deliver(item: _Item) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(arrived.put_nowait, item)

        body = await request.aread()
        call = await asyncio.to_thread(_started, self._thread, lambda: _Call(self._app, request, body, deliver))
        timeout = _read_timeout(request)

        async def take() -> Message | None:
            try:
                return _message(await asyncio.wait_for(arrived.get(), timeout))
            except TimeoutError as exc:
                raise httpx.ReadTimeout("timed out", request=request) from exc

        stream = _AsyncStream(take, lambda: _leave(self._thread, call))
        try:
            head = _head(await take())
        except BaseException:
            await stream.aclose()
            raise
        return httpx.Response(head["status"], headers=head["headers"], stream=stream, request=request)


class _Stream(httpx.SyncByteStream):
    def __init__(self, take: Callable[[], Message | None], leave: Callable[[], None]) -> None:
        self._take = take
        self._leave = leave

    def __iter__(self) -> Iterator[bytes]:
        while message := self._take():
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body"):
                return

    def close(self) -> None:
        self._leave()


class _AsyncStream(httpx.AsyncByteStream):
    def __init__(self, take: Callable[[], Any], leave: Callable[[], None]) -> None:
        self._take = take
        self._leave = leave

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while message := await self._take():
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body"):
                return

    async def aclose(self) -> None:
        self._leave()


def _started(thread: LoopThread, start: Callable[[], _Call]) -> _Call:
    if thread.loop.is_closed():
        raise httpx.ConnectError("All connection attempts failed")
    return thread.call(start)


def _leave(thread: LoopThread, call: _Call) -> None:
    if not thread.loop.is_closed():
        thread.loop.call_soon_threadsafe(call.leave)


def _message(item: _Item) -> Message | None:
    if isinstance(item, Exception):
        raise item
    return item


def _head(message: Message | None) -> Message:
    if message is None:
        raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
    return message


def _read_timeout(request: httpx.Request) -> float | None:
    timeout: float | None = request.extensions.get("timeout", {}).get("read")
    return timeout
