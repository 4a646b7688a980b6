"""A process that keeps one server running for as long as somebody holds a lease on it.

`guard.py` runs this file as a script, in a session of its own, with the standard library alone: it imports nothing of
this package, so that it starts in a few ms. It is told what to do by one JSON line on the first lease, an inherited
socket; every further lease is a connection to its unix socket. The kernel closes a lease however its process ends,
and the end of the last one is the order to stop: at once if it was given back (a byte says so), else after a grace.

The lock file belongs to the keeper AND its server (which inherits the descriptor): whoever gets the lock knows that
no older server is left on the same data.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any

_LOG = 2  # the caller gave us the log as stderr
_POLL_S = 0.005  # between two looks at a server that starts
_BUSY_POLL_S = 0.05  # the same for one that said that it still reads its data


class Keeper:
    """One server, its leases, and the socket at which more leases are taken.

    Args:
        order: What `guard.SharedServer` wrote; the keys are the names used below.
        first: The lease of the process that started this one.
    """

    def __init__(self, order: dict[str, Any], first: socket.socket) -> None:
        self._order = order
        self._leases: set[socket.socket] = set()
        self._returned: set[socket.socket] = set()  # given back on purpose: its end is near
        self._leaving: list[socket.socket] = []  # the last ones to go: closed when the server is gone
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._lock = -1
        self._answer: dict[str, Any] | None = None  # known once the server is ready
        self._probe: socket.socket | None = None  # asks the server whether it is ready
        self._began = self._deadline = 0.0
        self._busy = False  # the server has said that it still reads its data
        self._output = b""
        self._moved: list[str] = []
        self._told_to_stop = False
        self._idle_until: float | None = None
        self._add(first)

    def run(self) -> None:
        """Start the server, serve leases, and return when the server is gone."""
        wake, self._wake = socket.socketpair()
        wake.setblocking(False)
        self._wake.setblocking(False)
        self._selector.register(wake, selectors.EVENT_READ, lambda: wake.recv(64))
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_terminate)
        try:
            if self._take_lock():
                self._listen()
                self._start()
                self._serve()
        finally:
            self._stop()

    # Leases

    def _add(self, lease: socket.socket) -> None:
        lease.settimeout(1.0)
        self._leases.add(lease)
        self._idle_until = None
        for left in self._leaving:
            left.close()
        self._leaving.clear()
        self._selector.register(lease, selectors.EVENT_READ, lambda: self._on_lease(lease))
        if self._answer is not None:
            self._tell(lease, self._answer)
        elif self._busy:
            self._tell(lease, self._still_busy())

    def _on_lease(self, lease: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if lease.recv(4096):
                self._returned.add(lease)
                return
        self._selector.unregister(lease)
        self._leases.discard(lease)
        returned = lease in self._returned
        self._returned.discard(lease)
        if self._leases:
            lease.close()
        else:
            self._leaving.append(lease)  # it may wait for the server's end
            self._idle_until = time.monotonic() + (0.0 if returned else self._order["grace_s"])

    def _on_connection(self) -> None:
        assert self._listener is not None  # noqa: S101
        with contextlib.suppress(OSError):
            self._add(self._listener.accept()[0])

    @staticmethod
    def _tell(lease: socket.socket, answer: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has gone: its end is noticed by reading
            lease.sendall(json.dumps(answer).encode() + b"\n")

    def _tell_all(self, answer: dict[str, Any]) -> None:
        for lease in self._leases:
            self._tell(lease, answer)

    # The server

    def _take_lock(self) -> bool:
        """Wait until an older keeper and its server are gone."""
        self._lock = os.open(self._order["lock"], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + self._order["timeout_s"]
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.truncate(_LOG, 0)
                return True
            if time.monotonic() > deadline or self._told_to_stop:
                before = os.pread(self._lock, 4096, 0).decode(errors="replace").strip()
                self._tell_all({"error": f"an older server does not end ({before}); end it with kill -9"})
                return False
            time.sleep(0.02)

    def _listen(self) -> None:
        path = self._order["socket"]
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._on_connection)
        self._note(None)

    def _note(self, server: int | None) -> None:
        """Say in the lock file where the keeper listens: the directory may depend on the starter's environment."""
        note = json.dumps({"socket": self._order["socket"], "keeper": os.getpid(), "server": server}).encode()
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, note, 0)

    def _start(self) -> None:
        by_line = self._order["ready"]["kind"] == "line"
        try:
            self._server = subprocess.Popen(  # noqa: S603 - the command is the package's own
                self._order["command"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if by_line else _LOG,
                stderr=_LOG,
                pass_fds=(self._lock,),
                process_group=0,
                preexec_fn=_die_with_parent(),  # safe: this process has one thread
            )
        except (OSError, subprocess.SubprocessError) as exc:
            self._tell_all({"error": f"it cannot be run: {exc}", "config": True})
            return
        self._note(self._server.pid)
        self._began = time.monotonic()
        self._deadline = self._began + self._order["timeout_s"]
        self._busy = False
        if self._server.stdout is not None:
            os.set_blocking(self._server.stdout.fileno(), False)
            self._selector.register(self._server.stdout, selectors.EVENT_READ, self._on_output)

    def _serve(self) -> None:
        while self._server is not None and not self._told_to_stop:
            for key, _ in self._selector.select(self._patience()):
                key.data()
            if self._server.poll() is not None:
                self._on_end()
            elif self._answer is None:
                self._check_ready()
            if self._idle_until is not None and time.monotonic() >= self._idle_until:
                return

    def _patience(self) -> float | None:
        """Return how long nothing needs to be looked at, in seconds."""
        ends = [] if self._idle_until is None else [self._idle_until]
        if self._answer is None:
            ends.append(self._deadline)
            if self._order["ready"]["kind"] == "socket" and self._probe is None:
                ends.append(time.monotonic() + (_BUSY_POLL_S if self._busy else _POLL_S))
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _on_output(self) -> None:
        """Look for the address in what the server prints; all of it goes to the log, so that the pipe never fills."""
        assert self._server is not None and self._server.stdout is not None  # noqa: S101
        chunk = self._server.stdout.read(65536)
        if not chunk:
            self._selector.unregister(self._server.stdout)
            return
        os.write(_LOG, chunk)
        if self._answer is None:
            *lines, self._output = (self._output + chunk).split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError):
                    address = json.loads(line)
                    if isinstance(address, dict):
                        self._on_ready(address)
                        return

    def _check_ready(self) -> None:
        if self._order["ready"]["kind"] == "socket" and self._probe is None:
            self._ask()
        if self._answer is None and time.monotonic() > self._deadline:
            waited_s = f"{self._order['busy_timeout_s' if self._busy else 'timeout_s']:g} s"
            kept = " and ".join(path for path in self._order["spare"] if os.path.exists(path))
            self._fail(
                f"it still read its data after {waited_s}" if self._busy else f"it was not ready within {waited_s}",
                f"; its data is in {kept}: move that away, or delete it, to start with nothing" if kept else "",
            )

    def _ask(self) -> None:
        """Ask the server whether it is ready, without waiting for the answer: one that reads its data takes long."""
        ready = self._order["ready"]
        probe = socket.socket(socket.AF_UNIX)
        probe.setblocking(False)
        try:
            probe.connect(ready["path"])
            probe.sendall(ready["send"].encode())
        except OSError:  # it does not listen yet
            probe.close()
            return
        if not ready["send"]:
            probe.close()
            self._on_ready({"socket": ready["path"]})
            return
        self._probe = probe
        self._selector.register(probe, selectors.EVENT_READ, self._on_probe)

    def _on_probe(self) -> None:
        assert self._probe is not None  # noqa: S101
        ready, said = self._order["ready"], b""
        with contextlib.suppress(OSError):
            said = self._probe.recv(256)
        self._drop_probe()
        if said.startswith(ready["expect"].encode()):
            self._on_ready({"socket": ready["path"]})
        elif not self._busy and ready["busy"] and said.startswith(ready["busy"].encode()):
            self._busy = True
            self._deadline = self._began + self._order["busy_timeout_s"]
            self._tell_all(self._still_busy())

    def _drop_probe(self) -> None:
        if self._probe is not None:
            self._selector.unregister(self._probe)
            self._probe.close()
            self._probe = None

    def _still_busy(self) -> dict[str, Any]:
        return {"busy_s": max(0.0, self._deadline - time.monotonic())}

    def _on_ready(self, address: dict[str, Any]) -> None:
        assert self._server is not None  # noqa: S101
        self._answer = {
            "pid": self._server.pid,
            "keeper": os.getpid(),
            "address": {**self._order["address"], **address},
        }
        self._tell_all({**self._answer, "moved": self._moved})

    def _on_end(self) -> None:
        """The server ended by itself: give it one more try without its old data if it never came up."""
        assert self._server is not None  # noqa: S101
        code = self._server.returncode
        self._let_go()
        if self._answer is None:
            found = [path for path in self._order["spare"] if os.path.exists(path)]
            if found and not self._moved:
                os.write(_LOG, b"\nended while it started; trying without its old data\n")
                for path in found:
                    shutil.rmtree(f"{path}.damaged", ignore_errors=True)  # a directory is not replaced otherwise
                    os.replace(path, f"{path}.damaged")
                    self._moved.append(f"{path}.damaged")
                self._start()
                return
            for path in self._moved:  # the data was not the reason
                os.replace(path, path.removesuffix(".damaged"))
            self._fail(f"it ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}")

    def _fail(self, reason: str, remedy: str = "") -> None:
        with open(self._order["log"], errors="replace") as log:
            tail = " | ".join([line.strip() for line in log.read()[-4000:].splitlines() if line.strip()][-3:])
        self._tell_all({"error": f"{reason}: {tail or 'it printed nothing'}"[:600] + remedy})
        self._told_to_stop = True

    def _stop(self) -> None:
        """Take no more leases, end the server, and only then let the last holders go."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._order["socket"])
            self._listener.close()
        if self._server is not None:
            stop_timeout_s = self._order["stop_timeout_s"] if self._answer is not None else 0
            if stop_timeout_s and self._server.poll() is None:
                self._server.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._server.wait(stop_timeout_s)
            self._let_go()
        if self._order["remove"]:
            shutil.rmtree(self._order["remove"], ignore_errors=True)
        for lease in (*self._leases, *self._leaving):
            lease.close()

    def _let_go(self) -> None:
        """Kill what is left of the server and of its children."""
        assert self._server is not None  # noqa: S101
        self._drop_probe()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()
        if self._server.stdout is not None:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(self._server.stdout)
            self._server.stdout.close()
        self._server = None

    def _on_terminate(self, *_: object) -> None:
        self._told_to_stop = True


def _die_with_parent() -> Any:
    """Return what a child runs before its program, so that a killed keeper takes its server with it."""
    if sys.platform != "linux":
        return None
    import ctypes

    prctl, keeper = ctypes.CDLL(None).prctl, os.getpid()

    def prepare() -> None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != keeper:  # it died before the line above
            os._exit(1)

    return prepare


def main(descriptor: int) -> None:
    """Leave the caller's process tree, then keep what the first line on `descriptor` names."""
    if os.fork():
        os._exit(0)  # the caller waits for this one: no zombie stays with it
    os.umask(0o077)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the caller's thread may have blocked some
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(ignored, signal.SIG_IGN)
    first = socket.socket(fileno=descriptor)
    first.set_inheritable(False)
    first.settimeout(10.0)
    with first.makefile("rb") as reader:
        line = reader.readline()
    if line.endswith(b"\n"):  # else the caller is gone already
        Keeper(json.loads(line), first).run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
