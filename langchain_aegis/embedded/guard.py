"""Leases on server processes that all processes of one user share.

The first process that wants a server starts a keeper (`keeper.py`), which starts the server; others attach; when the
last lease is gone, however its process ended, the keeper stops the server. A server that died is started again, at
the same address, by the next `acquire()`.

    server = SharedServer("echo", home, [sys.executable, "-m", "echo_server"], ready=ReadyLine())
    info = server.acquire()         # ServerInfo(pid=..., address={"port": 40123})
    ...
    server.release()
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from langchain_aegis.errors import AegisConfigError, AegisConnectionError
from langchain_aegis.home import aegis_home
from langchain_aegis.settings import AegisSettings

_logger = logging.getLogger("langchain_aegis")

_MAX_SOCKET_BYTES = 100  # the kernels' limit is 104 or 108
_MAX_NAME_BYTES = 24
_REMARK_S = 2.0  # a server that is busy for so long is worth a line in the log


@dataclass(frozen=True)
class ReadySocket:
    """Ready when a unix socket accepts a connection.

    Args:
        path: The socket. It is the server's address: `{"socket": path}`.
        send: Sent after connecting, if not empty.
        expect: How the answer to `send` must begin.
        busy: How it begins while the server still reads its data, if not empty: then it is waited for longer.
    """

    path: str
    send: str = ""
    expect: str = ""
    busy: str = ""
    kind: Literal["socket"] = field(default="socket", init=False)


@dataclass(frozen=True)
class ReadyLine:
    """Ready when the server prints a line on stdout that is a JSON object: its address, such as `{"port": 40123}`."""

    kind: Literal["line"] = field(default="line", init=False)


@dataclass(frozen=True)
class ServerInfo:
    """A running server.

    Args:
        pid: Of the server process itself.
        address: Where it can be reached; what `ready=` says, and `address=` of the process that started it.
        keeper_pid: Of the process that keeps it.
    """

    pid: int
    address: Mapping[str, Any]
    keeper_pid: int


class SharedServer:
    """A server process of this user, started by whoever needs it first.

    Thread-safe. Several objects with the same `home` and `name`, in one process or in many, mean the same server; the
    first one's command is the one that runs, so put what makes servers differ into `name`. The child of a `fork`
    holds no lease until it calls `acquire()` itself.

    Args:
        name: Short word for files and messages, at most 15 bytes.
        home: Directory of the lock and the log `<name>.log`; created with mode 0700.
        command: Program and arguments; absolute paths, for it runs in `/`. It must stay in the foreground.
        env: Environment variables in addition to those of this process.
        ready: How to see that the server is up.
        address: Merged into `ServerInfo.address`: what other processes need to know about the running server.
        timeout_s: How long the server may take to become ready.
        busy_timeout_s: The same for one that says that it is busy (see `ReadySocket`); it is logged, once.
        grace_s: How long the server stays when the process that held the last lease ended without `release()`.
        stop_timeout_s: From SIGTERM to SIGKILL; 0 kills at once.
        spare: Files to move aside (as `<file>.damaged`) if the server ends while it starts, before one more try.
        remove_home: Delete `home` when the server is gone.
    """

    def __init__(
        self,
        name: str,
        home: Path,
        command: Sequence[str],
        *,
        ready: ReadySocket | ReadyLine,
        env: Mapping[str, str] | None = None,
        address: Mapping[str, Any] | None = None,
        timeout_s: float = 60.0,
        busy_timeout_s: float = 300.0,
        grace_s: float = 0.5,
        stop_timeout_s: float = 4.0,
        spare: Sequence[Path] = (),
        remove_home: bool = False,
    ) -> None:
        self.name = name
        self.home = aegis_home(AegisSettings(home=str(home))).resolve()
        self._env = dict(env or {})
        self._timeout_s = timeout_s
        self._spare = [str(path) for path in spare]
        self._lock_path = self.home / f"{name}.lock"
        self._log_path = self.home / f"{name}.log"
        self._order = {
            "lock": str(self._lock_path),
            "log": str(self._log_path),
            "socket": str(socket_path(self.home, f"{name}.keeper")),
            "command": [str(part) for part in command],
            "ready": asdict(ready),
            "address": dict(address or {}),
            "timeout_s": timeout_s,
            "busy_timeout_s": max(timeout_s, busy_timeout_s),
            "grace_s": grace_s,
            "stop_timeout_s": stop_timeout_s,
            "spare": self._spare,
            "remove": str(self.home) if remove_home else None,
        }
        self._lease: _Lease | None = None

    def acquire(self) -> ServerInfo:
        """Return the running server, started if need be; blocks until it is ready.

        Does nothing but look while this object holds the lease of a living server, so it may be called before every
        use.

        Raises:
            AegisConfigError: The program cannot be run.
            AegisConnectionError: The server did not become ready; the message ends with its last words.
        """
        with _lock_of(self._lock_path):
            if self._lease is not None and self._lease.alive():
                return self._lease.info
            self._drop(wait_s=0)
            lease = _leases.get(self._lock_path)
            if lease is None or not lease.alive():
                lease = _leases[self._lock_path] = self._open()
            lease.holders += 1
            self._lease = lease
            return lease.info

    def release(self, *, wait_s: float = 0) -> None:
        """Give the lease back; does nothing without one.

        Args:
            wait_s: If this was the last lease of all, wait at most this long until the server is gone.
        """
        with _lock_of(self._lock_path):
            self._drop(wait_s=wait_s)

    def _drop(self, *, wait_s: float) -> None:
        lease, self._lease = self._lease, None
        if lease is None:
            return
        lease.holders -= 1
        if lease.holders == 0:
            if _leases.get(self._lock_path) is lease:
                del _leases[self._lock_path]
            lease.close(wait_s)

    def _open(self) -> _Lease:
        """Attach to the keeper, or become the one who starts it."""
        deadline = time.monotonic() + self._timeout_s + 10.0
        while True:
            if (lease := self._attach(deadline)) is not None:
                return lease
            with self._start_lock() as mine:
                if mine:  # look again: the one who had it before has started a keeper
                    return self._attach(deadline) or self._start(deadline)
            if time.monotonic() > deadline:
                raise AegisConnectionError(
                    f"The embedded {self.name} was not ready in time; another process is still starting it "
                    f"(log: {self._log_path})"
                )
            time.sleep(0.02)

    @contextlib.contextmanager
    def _start_lock(self) -> Iterator[bool]:
        """Take the lock of those who start a keeper, if it is free; yields whether it was."""
        try:
            file = open(self.home / f"{self.name}.start", "ab")  # noqa: SIM115 - closed below, or in a forked child
        except OSError as exc:
            raise AegisConfigError(f"{self.home} cannot be used: {exc}") from exc
        _opening.add(file)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = True
            except BlockingIOError:
                free = False
            yield free
        finally:
            _opening.discard(file)
            file.close()

    def _attach(self, deadline: float) -> _Lease | None:
        """Return a lease from the running keeper; None if there is none, or it is about to end."""
        try:
            path = json.loads(self._lock_path.read_bytes())["socket"]
        except (OSError, ValueError, KeyError):
            return None
        connection = socket.socket(socket.AF_UNIX)
        _opening.add(connection)
        try:
            connection.settimeout(5.0)
            connection.connect(path)
            return self._lease_from(connection, deadline)
        except OSError:
            return None
        finally:
            _opening.discard(connection)
            connection.close()

    def _start(self, deadline: float) -> _Lease:
        """Start a keeper whose first lease is ours."""
        if not sys.executable:
            raise AegisConfigError(f"The embedded {self.name} needs a Python program to run; sys.executable is empty")
        ours, theirs = socket.socketpair()
        _opening.update((ours, theirs))
        try:
            with open(self._log_path, "ab") as log:
                keeper = [sys.executable, "-I", "-S", str(Path(__file__).with_name("keeper.py")), str(theirs.fileno())]
                process = subprocess.Popen(  # noqa: S603 - our own file
                    keeper,
                    env={**os.environ, **self._env},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # a Ctrl-C in our terminal is not meant for the server
                    cwd="/",
                )
                process.wait()  # it forks and returns at once
            theirs.close()
            ours.sendall(json.dumps(self._order).encode() + b"\n")
            lease = self._lease_from(ours, deadline)
        except OSError as exc:
            raise AegisConnectionError(f"The embedded {self.name} did not start: {exc}") from exc
        finally:
            _opening.difference_update((ours, theirs))
            ours.close()
            theirs.close()
        if lease is None:
            raise AegisConnectionError(f"The embedded {self.name} did not start; see {self._log_path}")
        return lease

    def _lease_from(self, connection: socket.socket, deadline: float) -> _Lease | None:
        """Wait for the keeper's answer; None if it ends without one."""
        received, remark_at = b"", float("inf")
        while True:
            while b"\n" not in received:
                connection.settimeout(max(0.1, min(deadline, remark_at) - time.monotonic()))
                try:
                    chunk = connection.recv(65536)
                except TimeoutError:
                    if time.monotonic() < remark_at:
                        raise
                    remark_at = float("inf")
                    _logger.warning(
                        "The embedded %s still reads its saved data (%s); this is waited for, up to %g s",
                        self.name,
                        ", ".join(self._spare),
                        self._order["busy_timeout_s"],
                    )
                    continue
                if not chunk:
                    return None
                received += chunk
            line, _, received = received.partition(b"\n")
            answer = json.loads(line)
            if "busy_s" not in answer:
                break
            deadline = time.monotonic() + answer["busy_s"] + 10.0
            remark_at = time.monotonic() + _REMARK_S
        if reason := answer.get("error"):
            kind = AegisConfigError if answer.get("config") else AegisConnectionError
            raise kind(f"The embedded {self.name} did not start: {reason} (log: {self._log_path})")
        for path in answer.get("moved", ()):
            _logger.warning(
                "The embedded %s did not start with its old data; started anew, the old is %s", self.name, path
            )
        info = ServerInfo(answer["pid"], answer["address"], answer["keeper"])
        return _Lease(connection.detach(), info)


class _Lease:
    """This process's connection to a keeper, counted over the objects that use it.

    A plain descriptor: it is meant to stay open until the process ends if nobody closes it.
    """

    def __init__(self, descriptor: int, info: ServerInfo) -> None:
        self.info = info
        self.holders = 0
        self._descriptor = descriptor

    def alive(self) -> bool:
        """Say whether the keeper still holds its end; it closes it when the server ends."""
        if self._descriptor < 0:
            return False
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return not poll.poll(0)

    def close(self, wait_s: float) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        with socket.socket(fileno=descriptor) as connection, contextlib.suppress(OSError):
            connection.send(b"x", socket.MSG_DONTWAIT)
            if wait_s > 0:
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(wait_s)
                connection.recv(1)

    def forget(self) -> None:
        """Close our copy of the descriptor; the parent's lease is not touched."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


_leases: dict[Path, _Lease] = {}
_locks: dict[Path, threading.Lock] = {}
_opening: set[socket.socket | BinaryIO] = set()  # what is open while a lease is taken


def _lock_of(path: Path) -> threading.Lock:
    return _locks.setdefault(path, threading.Lock())


def _forget_in_child() -> None:
    """After a fork: the leases are the parent's, and so are locks that its other threads held."""
    for opened in _opening:
        opened.close()
    for lease in _leases.values():
        lease.forget()
    _leases.clear()
    _locks.clear()
    _opening.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def socket_path(home: Path, name: str) -> Path:
    """Return where the unix socket `name` of `home` belongs, in a directory with mode 0700.

    In `home` itself, unless that makes the path too long for a socket: then in a directory below the temporary one,
    whose name is derived from `home`.

    Raises:
        AegisConfigError: No directory is short enough, or the one below the temporary directory is not ours.
    """
    if len(name.encode()) > _MAX_NAME_BYTES:
        raise AegisConfigError(f"the name of a socket has at most {_MAX_NAME_BYTES} bytes, got {name!r}")
    home = home.resolve()
    if _fits(home):
        return home / name
    digest = hashlib.blake2b(os.fsencode(home), digest_size=8).hexdigest()
    for parent in (tempfile.gettempdir(), "/tmp"):  # noqa: S108 - owner and mode are checked
        directory = Path(parent) / f"aegis-{os.getuid()}-{digest}"
        if _fits(directory):
            break
    else:
        raise AegisConfigError(f"{home} is too long for a unix socket; set AEGIS_HOME to a shorter path")
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()
    except OSError as exc:
        raise AegisConfigError(f"{directory} cannot be used ({exc}); set AEGIS_HOME to a shorter path") from exc
    if status.st_uid != os.getuid() or not directory.is_dir() or directory.is_symlink() or status.st_mode & 0o077:
        raise AegisConfigError(f"{directory} is not ours alone; remove it, or set AEGIS_HOME to a shorter path")
    return directory / name


def fresh_home(prefix: str) -> Path:
    """Make a new directory with mode 0700 for a server that is not shared; short enough for its sockets.

    Pass it to `SharedServer(home=..., remove_home=True)`.

    Args:
        prefix: Start of its name, at most 16 bytes.
    """
    for parent in (tempfile.gettempdir(), "/tmp"):  # noqa: S108 - made anew, by mkdtemp
        if _fits(Path(parent).resolve() / f"{prefix}12345678"):
            return Path(tempfile.mkdtemp(prefix=prefix, dir=parent)).resolve()
    raise AegisConfigError(f"{tempfile.gettempdir()} is too long for a unix socket; set TMPDIR to a shorter path")


def _fits(directory: Path) -> bool:
    # The same answer for every name, so that all sockets of a home are in one place.
    return len(os.fsencode(directory)) + 1 + _MAX_NAME_BYTES < _MAX_SOCKET_BYTES
