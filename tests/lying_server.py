"""A server that says whatever a test wants, over a real socket: it may lie about HTTP, NDJSON and Ollama."""

import asyncio
import json
import socket
import struct
import threading


class LyingServer:
    """Answers each request with `script`: bytes are sent, "hang" waits for the client to leave, "reset" resets.

    A number is a pause in seconds. `script` may also be a function of the parsed request body. It counts `requests`
    (their bodies), `heads` (raw) and `connections`; `asked` is set by the first request, `left` when a client has
    closed the connection during "hang", or reset it. With `tags_aside`, `/api/tags` gets an answer of its own: that
    there are no models.
    """

    def __init__(self, *, tags_aside=False):
        self.script, self.tags_aside = [], tags_aside
        self.requests, self.heads, self.connections = [], [], 0
        self.asked, self.left = threading.Event(), threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait(10)
        self.url = f"http://127.0.0.1:{self.port}"

    def _run(self):
        asyncio.run(self._serve())

    async def _serve(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        async with server:
            await self._stop.wait()
            # From Python 3.12 on, leaving the block waits for connections that clients keep open.
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    async def _connection(self, reader, writer):
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        except ConnectionError:  # who closes a connection with something unread in it resets it
            self.left.set()
        finally:
            writer.close()

    async def _one(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        body = await reader.readexactly(int(fields.get(b"content-length", 0)))
        if self.tags_aside and head.startswith(b"GET /api/tags "):  # a cache asks it beside its model's calls
            writer.write(plain({"models": []})[0])
            return True
        self.heads.append(head)
        self.requests.append(json.loads(body) if body else None)
        self.asked.set()
        for step in self.script(self.requests[-1]) if callable(self.script) else list(self.script):
            if step == "hang":
                if await reader.read(1) == b"":
                    self.left.set()
                return False
            if step == "reset":
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return False
            if step == "close":
                return False
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
            writer.write(step)
            await writer.drain()
        return True

    def close(self):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)


def chunked(*pieces, end=True, status="200 OK", type_="application/x-ndjson", headers=""):
    """Return a chunked answer, one piece a chunk."""
    yield f"HTTP/1.1 {status}\r\nContent-Type: {type_}\r\n{headers}Transfer-Encoding: chunked\r\n\r\n".encode()
    for piece in pieces:
        yield b"%x\r\n%s\r\n" % (len(piece), piece) if isinstance(piece, bytes) else piece
    if end:
        yield b"0\r\n\r\n"


def plain(body, status="200 OK", type_="application/json; charset=utf-8", headers=""):
    """Return an answer with a length."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {type_}\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return [head.encode() + body]


def line(content="", done=False, **fields):
    """Return one line of a streamed answer, as Ollama writes it."""
    part = {"model": "m", "created_at": "2026-11-22T12:39:43.9Z", "message": {"role": "assistant", "content": content}}
    return json.dumps({**part, "done": done, **fields}).encode() + b"\n"


END = line(done=True, done_reason="stop", total_duration=1548945687, load_duration=1199140946, prompt_eval_count=16,
           prompt_eval_duration=220554000, eval_count=8, eval_duration=125396000)  # fmt: skip
