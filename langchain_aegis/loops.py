"""One value per event loop: clients and locks belong to the loop that first used them.

An object of this package may be used from several event loops, one after another (`asyncio.run` twice) or at the
same time in several threads. Connections cannot: they are bound to the loop that opened them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Future, InvalidStateError
from typing import Generic, TypeVar

T = TypeVar("T")


class PerLoop(Generic[T]):
    """Make a value on first use in an event loop, and close it when that loop ends.

    The end of a loop is noticed through an async generator that waits inside it: `asyncio.run` finalises such
    generators before it closes the loop, while connections can still be closed properly. A loop that is closed
    without that leaves the value to the garbage collector.

    Args:
        make: Called inside the loop; returns the loop's value. Must not block.
        aclose: Awaited with the value when the loop ends or `aclose()` is called.
    """

    def __init__(self, make: Callable[[], T], aclose: Callable[[T], Awaitable[object]]) -> None:
        self._make = make
        self._aclose = aclose
        self._lock = threading.Lock()
        self._values: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[T, AsyncGenerator[None, None]]] = (
            weakref.WeakKeyDictionary()
        )

    def get(self) -> T:
        """Return the running loop's value; raises RuntimeError outside a loop."""
        loop = asyncio.get_running_loop()
        found = self._values.get(loop)  # only this loop's thread ever writes this entry
        if found is not None:
            return found[0]
        value = self._make()
        sentinel = self._sentinel(loop, value)
        # The first step runs without suspending, and registers the generator with the loop.
        with contextlib.suppress(StopIteration):
            sentinel.asend(None).send(None)
        with self._lock:
            self._values[loop] = (value, sentinel)
        return value

    async def _sentinel(self, loop: asyncio.AbstractEventLoop, value: T) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            with self._lock:
                self._values.pop(loop, None)
            with contextlib.suppress(Exception):  # the loop ends: nobody is left to be told
                await self._aclose(value)

    async def aclose(self) -> None:
        """Close the running loop's value, if it has one; a later `get` makes a new one."""
        found = self._values.get(asyncio.get_running_loop())
        if found is not None:
            await found[1].aclose()

    def values(self) -> list[T]:
        """Return the values of all living loops."""
        with self._lock:
            return [value for value, _ in self._values.values()]

    def forget(self) -> None:
        """Drop all values without closing them: for the child of a fork, whose sockets are its parent's."""
        self._lock = threading.Lock()
        self._values = weakref.WeakKeyDictionary()


async def in_a_thread(name: str, do: Callable[[], T]) -> T:
    """Return what `do` returns, done in a thread of its own: those of the event loop may all be busy.

    Whoever is cancelled leaves it to its end.
    """
    done: Future[T] = Future()

    def work() -> None:
        try:
            result = do()
        except Exception as exc:  # whoever waits decides what it means
            with contextlib.suppress(InvalidStateError):
                done.set_exception(exc)
        else:
            with contextlib.suppress(InvalidStateError):
                done.set_result(result)

    threading.Thread(target=work, name=name, daemon=True).start()
    return await asyncio.wrap_future(done)
