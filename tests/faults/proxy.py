"""A network that is slow, cuts, resets, swallows, slices and changes what goes through it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

_CHUNK = 65_536


@dataclass
class Toxics:
    """What happens to bytes in one direction; may be changed at any time, from any thread.

    Attributes:
        latency_s: So much later they arrive.
        jitter_s: And up to so much more; they never overtake each other.
        cut_after: After so many more bytes the connection is closed.
        reset: It is then reset (RST) instead.
        black_hole: They never arrive.
        slice_bytes: So many of them arrive at a time.
        flip: So many more bytes arrive as they are, the next one with its lowest bit changed.
        rewrite: Is given all bytes and returns what arrives; it may keep some back for later.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    cut_after: int | None = None
    reset: bool = False
    black_hole: bool = False
    slice_bytes: int | None = None
    flip: int | None = None
    rewrite: Callable[[bytes], bytes] | None = None
    random: random.Random = field(default_factory=lambda: random.Random(7))

    def heal(self) -> None:
        """Undo everything."""
        self.latency_s = self.jitter_s = 0.0
        self.cut_after = self.slice_bytes = self.flip = self.rewrite = None
        self.reset = self.black_hole = False


class Proxy:
    """Listens on loopback and passes on to a server, in a thread of its own.

    Args:
        target: A port of loopback, or the path of a unix socket.
        tls: What it shows to clients, if they are to speak TLS; the server is spoken to without.

    Attributes:
        up: What happens on the way to the server.
        down: What happens on the way back.
        made: Connections so far; `open`: those that are open; `most`: so many were open at a time.
    """

    def __init__(self, target: int | str, tls: ssl.SSLContext | None = None) -> None:
        self._target, self._tls = target, tls
        self.up, self.down = Toxics(), Toxics()
        self.made = self.most = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="proxy", daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        self.url = f"redis://127.0.0.1:{self.port}"

    @property
    def open(self) -> int:
        """Connections that are open."""
        return len(self._writers)

    def heal(self) -> None:
        """Undo everything, for connections that are open too."""
        self.up.heal()
        self.down.heal()

    def disconnect(self) -> None:
        """Close every connection."""
        self._loop.call_soon_threadsafe(lambda: [w.close() for w in list(self._writers)])

    def close(self) -> None:
        """Close every connection and the listener."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- in its own thread ----------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        async with server:
            await self._stop.wait()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.made += 1
        try:
            if isinstance(self._target, int):
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            else:
                far_reader, far_writer = await asyncio.open_unix_connection(self._target)
        except OSError:
            writer.close()
            return
        self._writers.add(writer)
        self.most = max(self.most, len(self._writers))
        ways = [
            asyncio.ensure_future(self._pass(reader, far_writer, self.up)),
            asyncio.ensure_future(self._pass(far_reader, writer, self.down)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pass
        finally:
            self._writers.discard(writer)
            for way in ways:
                way.cancel()
            if self.up.reset or self.down.reset:
                _reset_when_closed(writer)
            writer.close()
            far_writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, toxics: Toxics) -> None:
        """Pass bytes on until one side closes: reads at once, and delivers each piece when it is due."""
        due: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        deliver = asyncio.ensure_future(self._deliver(due, writer, toxics))
        at = 0.0
        try:
            while data := await reader.read(_CHUNK):
                if toxics.black_hole:
                    continue
                if toxics.rewrite is not None and not (data := toxics.rewrite(data)):
                    continue
                size = toxics.slice_bytes or len(data)
                for start in range(0, len(data), size):
                    wait = toxics.latency_s + toxics.random.uniform(0.0, toxics.jitter_s)
                    at = max(at, self._loop.time() + wait)
                    due.put_nowait((at, data[start : start + size]))
                if deliver.done():
                    return
            due.put_nowait((at, b""))
            await deliver
        except ConnectionError:
            pass
        finally:
            deliver.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await deliver

    async def _deliver(self, due: asyncio.Queue, writer: asyncio.StreamWriter, toxics: Toxics) -> None:
        while True:
            at, data = await due.get()
            if (wait := at - self._loop.time()) > 0:
                await asyncio.sleep(wait)
            elif toxics.slice_bytes:
                await asyncio.sleep(0)
            if not data:
                return
            if (flip := toxics.flip) is not None:
                if flip < len(data):
                    data = data[:flip] + bytes([data[flip] ^ 1]) + data[flip + 1 :]
                    toxics.flip = None
                else:
                    toxics.flip = flip - len(data)
            if (left := toxics.cut_after) is not None:
                data = data[:left]
                toxics.cut_after = left - len(data)
            writer.write(data)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            if toxics.cut_after == 0:
                if toxics.reset:
                    _reset_when_closed(writer)
                writer.close()
                return


def _reset_when_closed(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        told = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, told)


def replies(data: bytes) -> list[bytes] | None:
    """Return the complete replies of RESP2 that `data` holds, None if the last one is not complete."""
    found, at = [], 0
    while at < len(data):
        if (end := _end_of_reply(data, at)) is None:
            return None
        found.append(data[at:end])
        at = end
    return found


def _end_of_reply(data: bytes, at: int) -> int | None:
    if (line := data.find(b"\r\n", at)) < 0:
        return None
    kind, end = data[at : at + 1], line + 2
    if kind in b"+-:":
        return end
    size = int(data[at + 1 : line])
    if kind == b"$":
        end += max(0, size + 2) if size >= 0 else 0
        return end if end <= len(data) else None
    for _ in range(size):
        if end >= len(data) or (end := _end_of_reply(data, end)) is None:
            return None
    return end
