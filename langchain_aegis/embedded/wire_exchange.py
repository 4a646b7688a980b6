"""Send one reply for as long as its reader stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

from starlette.types import Receive, Scope, Send

from langchain_aegis.embedded.wire_engine import EngineError
from langchain_aegis.embedded.wire_faults import RUNNER_DIED, Fault, Seen, Witness
from langchain_aegis.embedded.wire_json import encode, line

Reply = Mapping[str, Any] | bytes | AsyncGenerator[dict[str, Any], None]
_JSON = "application/json; charset=utf-8"
_LINES = "application/x-ndjson"


class Exchange:
    """The response side of one request, as an ASGI application.

    Args:
        reply: Makes the reply: an object, its bytes, or a generator of a stream's objects.
        seen: The request, for the witness.
        fault: How it goes wrong, if it does.
        witness: Told when the client leaves early.
    """

    def __init__(
        self, reply: Callable[[], Awaitable[Reply]], seen: Seen, fault: Fault | None, witness: Witness | None
    ) -> None:
        self._reply = reply
        self._seen = seen
        self._fault = fault
        self._witness = witness

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the reply, or stop making it as soon as the client disconnects."""
        sender = _Sender(send, scope.get("state", {}).get("cut"))
        sending = asyncio.ensure_future(self._send(sender))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            elif self._witness and not sender.over:
                self._witness.left(self._seen)
        finally:
            # Whatever ends this request, its generator is closed and its slot free before it returns.
            await _cancelled(sending)
            await _cancelled(leaving)

    async def _send(self, sender: _Sender) -> None:
        fault = self._fault
        if fault and fault.kind == "status":
            await sender.whole(encode({"error": fault.text}), fault.status, fault.headers)
            return
        try:
            if fault and fault.kind == "hang" and not fault.after:
                await _for_ever()
            reply = await self._reply()
            if isinstance(reply, AsyncGenerator):
                async with aclosing(reply):
                    await self._stream(sender, reply)
            else:
                await self._whole(sender, reply)
        except EngineError as exc:
            if sender.started:
                await sender.lines(line({"error": exc.message}))
                await sender.finish()
            else:
                await sender.whole(encode({"error": exc.message}), exc.status)

    async def _whole(self, sender: _Sender, reply: Mapping[str, Any] | bytes) -> None:
        body = reply if isinstance(reply, bytes) else encode(reply)
        fault = self._fault
        if fault is None:
            await sender.whole(body)
        elif fault.kind == "slow":
            await asyncio.sleep(fault.delay_s)
            await sender.whole(body)
        elif fault.kind == "error":
            await sender.whole(encode({"error": fault.text}), 500)
        elif fault.kind == "malformed":
            await sender.whole(body[: len(body) // 2])
        elif fault.kind == "no_done":
            await sender.whole(encode(_unfinished(reply)))
        elif fault.kind == "cut":
            await sender.start(200, [(b"content-type", _JSON.encode()), (b"content-length", b"%d" % len(body))])
            await sender.lines(body[: len(body) // 2])
            await sender.cut()
        else:
            await _for_ever()

    async def _stream(self, sender: _Sender, reply: AsyncGenerator[dict[str, Any], None]) -> None:
        fault = self._fault
        sent = 0
        async for item in reply:
            if fault and fault.kind == "slow":
                await asyncio.sleep(fault.delay_s)
            elif fault and (sent == fault.after or item.get("done")) and await self._fail(sender, fault, item):
                return
            # The status waits for the first line: what fails before it is answered with an error status.
            if not sender.started:
                await sender.start(200, [(b"content-type", _LINES.encode())])
            await sender.lines(line(item))
            sent += 1
        await sender.finish()

    async def _fail(self, sender: _Sender, fault: Fault, item: Mapping[str, Any]) -> bool:
        """Let the stream go wrong instead of `item`; True ends it."""
        last = bool(item.get("done"))
        if fault.kind == "no_done" and not last:
            return False
        if not sender.started:
            await sender.start(200, [(b"content-type", _LINES.encode())])
        if fault.kind == "cut":
            await sender.cut()
        elif fault.kind == "no_done":
            await sender.finish()
        elif fault.kind == "error":
            await sender.lines(line({"error": fault.text or RUNNER_DIED}))
            await sender.finish()
        elif fault.kind == "malformed":
            if not sender.malformed:
                sender.malformed = True
                await sender.lines(line(item)[: len(line(item)) // 2] + b"\n")
            return False
        else:
            await _for_ever()
        return True


class _Sender:
    """Writes one response and knows how far it is."""

    def __init__(self, send: Send, cut: Callable[[], None] | None) -> None:
        self._send = send
        self._cut = cut
        self.started = False
        self.malformed = False
        self.over = False  # nothing more will be sent

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def lines(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self) -> None:
        self.over = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def whole(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        fields = [(b"content-type", _JSON.encode()), (b"content-length", b"%d" % len(body))]
        fields += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        await self.start(status, fields)
        self.over = True
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def cut(self) -> None:
        """Close the connection; the request then ends as if its client had left."""
        if self._cut is None:
            raise ConnectionResetError("the connection was cut")
        self.over = True
        self._cut()
        await _for_ever()


def _unfinished(reply: Mapping[str, Any] | bytes) -> dict[str, Any]:
    """Return an answer without all that tells that it is complete."""
    if not isinstance(reply, Mapping) or "done" not in reply:
        return {}
    kept = {name: reply[name] for name in ("model", "created_at", "message", "response") if name in reply}
    return {**kept, "done": False}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _for_ever() -> None:
    await asyncio.get_running_loop().create_future()


async def _cancelled(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
