"""Tell `aegis top` what this process's admissions do, while somebody looks.

A process that is looked at writes a file per second into `top/` of the home directory. Whether anybody looks is asked
at most once a second, when a call comes, by the age of one file that `aegis top` touches. Nothing runs and nothing is
written while nobody looks; and what cannot be written is left.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.home import aegis_home

if TYPE_CHECKING:
    from langchain_aegis.admission import Admission

PERIOD_S = 1.0
FRESH_S = 5.0  # a file that is older tells of nobody
_FOLDER, _WATCHED = "top", "watched"


class Live:
    """What this process tells; there is one.

    Attributes:
        admissions: Returns the process's admissions by server.
    """

    def __init__(self) -> None:
        self.admissions: Callable[[], Mapping[str, Admission]] = dict
        self._next = 0.0
        self._thread: threading.Thread | None = None
        reset_after_fork(self)

    def reset(self) -> None:
        """Start anew in the child of a fork: its parent's thread does not run here."""
        self._thread, self._next = None, 0.0

    def touch(self) -> None:
        """Note that a call came; costs next to nothing, and never fails."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + PERIOD_S
        if self._thread is None and is_watched():
            self._thread = threading.Thread(target=self._report, name="aegis-live", daemon=True)
            # Where no thread can be started, the interpreter is about to end.
            with contextlib.suppress(RuntimeError):
                self._thread.start()

    def _report(self) -> None:
        file = _folder() / f"{os.getpid()}.json"
        done = threading.Event()
        try:
            while is_watched():
                _write(file, self.snapshot())
                done.wait(PERIOD_S)
        except OSError:
            pass  # a full or read-only disk: `aegis top` sees nothing, the application goes on
        finally:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
            self._thread = None

    def snapshot(self) -> dict[str, Any]:
        """Return what this process tells, as plain JSON values."""
        servers = {server: asdict(admission.stats()) for server, admission in self.admissions().items()}
        return {"pid": os.getpid(), "program": _program(), "servers": servers}


live = Live()


@dataclass(frozen=True, slots=True)
class Told:
    """What one process told last.

    Attributes:
        pid: The process.
        program: What it is.
        servers: Address of each server -> the fields of `AdmissionStats`.
    """

    pid: int
    program: str
    servers: dict[str, dict[str, Any]]


def is_watched() -> bool:
    """Whether somebody has looked in the last few seconds."""
    try:
        return time.time() - (_folder() / _WATCHED).stat().st_mtime < FRESH_S
    except OSError:
        return False


def watch() -> None:
    """Ask all processes of this user to tell what they do, for the next seconds.

    Raises:
        AegisConfigError: The home directory cannot be written.
    """
    try:
        folder = aegis_home() / _FOLDER
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / _WATCHED).touch(mode=0o600)
    except OSError as exc:
        raise AegisConfigError(
            f"{exc.filename or 'the home directory'} cannot be written ({exc.strerror}); set AEGIS_HOME, to the same "
            "directory as the application's"
        ) from exc


def told() -> list[Told]:
    """Return what the processes of this user told in the last seconds; files of dead ones are removed."""
    return sorted(_read(), key=lambda each: each.pid)


def _read() -> Iterator[Told]:
    with contextlib.suppress(OSError):
        for file in _folder().glob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if time.time() - file.stat().st_mtime > FRESH_S or not _is_alive(int(file.stem)):
                    file.unlink(missing_ok=True)
                    continue
                values = orjson.loads(file.read_bytes())
                yield Told(int(values["pid"]), str(values["program"]), dict(values["servers"]))


def _folder() -> Path:
    return aegis_home() / _FOLDER


def _write(file: Path, values: dict[str, Any]) -> None:
    new = file.with_suffix(f".{threading.get_ident()}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as stream:
        stream.write(orjson.dumps(values))
    new.replace(file)


def _program() -> str:
    try:
        parts = Path("/proc/self/cmdline").read_bytes().split(b"\0")
    except OSError:
        return f"process {os.getpid()}"
    words = [part.decode(errors="replace") for part in parts if part]
    return " ".join([Path(words[0]).name, *words[1:]])[:200] if words else f"process {os.getpid()}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True
