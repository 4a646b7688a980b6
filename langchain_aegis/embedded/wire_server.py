"""Serve an ASGI application on a loopback socket inside the running event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

_TURNS = 5  # of the loop: one that was accepted just now becomes a connection only in the second
_IDLE_S = 300  # an idle connection of a client's pool: longer than any pool keeps it


class _Protocol(H11Protocol):
    """Lets the application drop its connection, through `scope["state"]["cut"]`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.access_log = False
        self.app_state = {**self.app_state, "cut": transport.close}


class Listener:
    """A listening server. Made by `listen`."""

    def __init__(self, server: asyncio.Server, state: ServerState, port: int) -> None:
        self._server = server
        self._state = state
        self.port = port

    async def aclose(self) -> None:
        """Stop: close the socket and every connection, and wait until their requests are over."""
        self._server.close()
        for _ in range(_TURNS):
            for connection in list(self._state.connections):
                # A running request sees its client leave, and cleans up behind itself.
                connection.transport.abort()
            await asyncio.sleep(0)
        tasks = list(self._state.tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=5)
        with contextlib.suppress(OSError):
            await asyncio.wait_for(self._server.wait_closed(), 5)


def loopback_socket(port: int = 0) -> socket.socket:
    """Return a socket that listens on 127.0.0.1: clients may connect before the server runs.

    Args:
        port: 0 takes any free one.
    """
    # With the protocol named, asyncio sends small writes at once; otherwise each answer waits 40 ms for an
    # acknowledgement between its head and its body.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen(2048)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening


async def listen(app: object, listening: socket.socket) -> Listener:
    """Serve `app` on a socket until the listener is closed.

    uvicorn's protocol is used without its server: no signal handlers, no logging setup, no polling loop.
    """
    config = Config(
        app,  # type: ignore[arg-type]
        log_config=None,
        lifespan="off",
        http=_Protocol,
        ws="none",  # Ollama has none; what uvicorn would import for them is deprecated, in some versions
        timeout_keep_alive=_IDLE_S,
    )
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: _Protocol(config=config, server_state=state, app_state={}), sock=listening
    )
    return Listener(server, state, listening.getsockname()[1])
