"""A Redis of one's own that anything may happen to. It is the embedded one's program, and needs no docker."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from langchain_aegis.embedded.keeper import _die_with_parent
from langchain_aegis.embedded.redis import _search_modules, _server_program

_START_S = 20.0
_PORTS = range(20_000, 32_000)  # below those from which the kernel draws for outgoing connections


class RedisProcess:
    """A server on a port and on a unix socket, whose data survives `kill` and `start` again.

    Args:
        path: Its directory, with a short name: a socket stands there.
        search: With the search module.
        saved: With a log of every write (AOF, written every second, as is usual).
        program: Another server's program.
        options: Further options of the server.
    """

    def __init__(self, path: Path, *, search: bool = True, saved: bool = True, program: str | None = None, **options):
        self.path, self.has_search, self.saved = path, search, saved
        self.socket, self.log = path / "s", path / "log"
        self._program = program or _server_program(None)
        self._modules = _search_modules(None) if search and program is None else []
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        for _ in range(20):
            self.port = random.SystemRandom().choice(_PORTS)
            with contextlib.suppress(OSError):
                self.start()
                break
        # As redis-py speaks to it by default, but for the patience: what a test itself asks may take long.
        self.client = redis.Redis(
            unix_socket_path=str(self.socket), protocol=2, socket_timeout=10, retry=Retry(NoBackoff(), 1)
        )

    # -- its life -------------------------------------------------------------------------------------------------

    def start(self, *, ready: bool = True, patience_s: float = _START_S) -> None:
        """Start it, with the data that it had and on the same port; `ready`: and wait until it answers."""
        options = {
            "port": self.port, "bind": "127.0.0.1", "unixsocket": self.socket, "dir": self.path, "save": "",
            "appendonly": "yes" if self.saved else "no", "appendfsync": "everysec", "enable-debug-command": "yes",
            "maxmemory-policy": "noeviction", **{n.replace("_", "-"): v for n, v in self._options.items()},
        }  # fmt: skip
        told = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        # A server that another thread starts would end with that thread.
        main = threading.current_thread() is threading.main_thread()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, *told, *(part for m in self._modules for part in ("--loadmodule", m))],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent() if main else None,
            )  # fmt: skip
        if ready:
            self.wait(patience_s)

    def wait(self, patience_s: float = _START_S) -> None:
        """Wait until it answers. Raises OSError if it ends instead."""
        assert self._process is not None
        deadline = time.monotonic() + patience_s
        with redis.Redis(unix_socket_path=str(self.socket), protocol=2, retry=Retry(NoBackoff(), 0)) as client:
            while True:
                with contextlib.suppress(redis.RedisError, OSError):
                    client.ping()
                    return
                if self._process.poll() is not None:
                    raise OSError(self.log.read_text()[-500:])
                assert time.monotonic() < deadline, self.log.read_text()[-500:]
                time.sleep(0.003)

    def close(self) -> None:
        """End it; its data stays."""
        self.client.close()
        if self._process is not None:
            self.kill()

    def __enter__(self) -> RedisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what happens to it ---------------------------------------------------------------------------------------

    def kill(self) -> None:
        """End it with SIGKILL; it may be frozen."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """Stop it, with all of its connections open."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    @contextlib.contextmanager
    def frozen(self):
        """Stop it for the time of a block."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def fill(self) -> None:
        """Let it have no memory for a single write more."""
        self.client.config_set("maxmemory", 1)

    def make_room(self) -> None:
        """Let it have memory again."""
        self.client.config_set("maxmemory", 0)

    def empty(self) -> None:
        """Remove everything, the indexes too."""
        self.client.flushall()

    def indexes(self) -> list[str]:
        """Return the names of the search indexes."""
        return [name.decode() for name in self.client.execute_command("FT._LIST")]

    def drop_indexes(self) -> None:
        """Remove the indexes and nothing else."""
        for name in self.indexes():
            self.client.execute_command("FT.DROPINDEX", name)

    def give_index(self, name: str, start: str, *, dimensions: int, metric: str = "L2") -> None:
        """Make an index of another kind under a name."""
        self.client.execute_command(
            "FT.CREATE", name, "ON", "HASH", "PREFIX", 1, start, "SCHEMA", "scope", "TAG", "CASESENSITIVE",
            "vec", "VECTOR", "FLAT", 6, "TYPE", "FLOAT32", "DIM", dimensions, "DISTANCE_METRIC", metric,
        )  # fmt: skip

    def heal(self) -> None:
        """Undo everything that was done, and remove all data."""
        if not self.alive:
            self.start()
        self.thaw()
        with contextlib.suppress(redis.ResponseError):
            self.client.execute_command("CLIENT", "UNPAUSE")
        self.client.execute_command("REPLICAOF", "NO", "ONE")
        self.client.config_set("maxmemory", 0)
        self.client.config_set("maxclients", 1_000)
        self.client.config_set("requirepass", "")
        self.client.flushall()
        self.client.execute_command("FUNCTION", "FLUSH")

    # -- what is seen of it ---------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs, frozen or not."""
        return self._process is not None and self._process.poll() is None

    @property
    def url(self) -> str:
        """Its address on loopback."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def unix_url(self) -> str:
        """Its address on its unix socket."""
        return f"unix://{self.socket}"

    def calls(self, command: str) -> int:
        """Return how often a command was run, those that failed too."""
        told = self.client.info("commandstats").get(f"cmdstat_{command}", {})
        return told.get("calls", 0) + told.get("rejected_calls", 0)

    def entries(self) -> list[bytes]:
        """Return the names of all stored answers."""
        return list(self.client.scan_iter("*:e:*", count=1_000))
