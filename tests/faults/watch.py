"""What ends a test that hangs, and what sees what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import os
import signal
import sys
import threading
import time

import pytest

# They live as long as the process does: see `langchain_aegis.writes`, `.budgets`, `.performer`, `.sweeper`.
LASTING = ("aegis-", "asyncio_", "pytest", "execnet", "MainThread")


@contextlib.contextmanager
def deadline(seconds: float):
    """Fail when a block takes longer, wherever it hangs; twice as long ends the process, with every thread's stack.

    Only in the main thread, where the tests run.
    """

    def late(_, __):
        faulthandler.dump_traceback(all_threads=True)
        pytest.fail(f"not done after {seconds:g} s", pytrace=True)

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(2 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def descriptors() -> dict[str, str]:
    """Return what this process has open, by number."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


def passing_threads() -> set[threading.Thread]:
    """Return the threads that ought to end."""
    return {t for t in threading.enumerate() if not t.name.startswith(LASTING)}


@contextlib.contextmanager
def nothing_left(patience_s: float = 5.0):
    """Fail if a block leaves threads, sockets or other descriptors behind; what is ending is waited for."""
    gc.collect()
    threads, opened = passing_threads(), descriptors()
    yield
    until = time.monotonic() + patience_s
    while True:
        gc.collect()
        left = passing_threads() - threads
        more = [
            name for number, name in descriptors().items()
            if number not in opened and not name.startswith("anon_inode:")
        ]  # fmt: skip
        # Numbers are used again: what counts is that there are not more than before.
        if not left and len(descriptors()) <= len(opened) + _lasting_descriptors(opened):
            return
        assert time.monotonic() < until, f"left behind: {left or ''} {more}"
        time.sleep(0.01)


def _lasting_descriptors(before: dict[str, str]) -> int:
    """How many of those that are new belong to threads that last: none, as they hold none."""
    return 0


@contextlib.asynccontextmanager
async def no_tasks_left():
    """Fail if a block leaves tasks in the event loop, or errors that nobody has seen."""
    errors: list[dict] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: errors.append(context))
    before = asyncio.all_tasks()
    yield
    for _ in range(200):
        left = asyncio.all_tasks() - before
        if not left:
            break
        await asyncio.sleep(0.005)
    gc.collect()
    await asyncio.sleep(0)
    assert not left, left
    assert not errors, errors
