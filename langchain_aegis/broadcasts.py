"""One call of a model whose outcome several callers wait for, or whose chunks they read.

A stream's chunks are kept until its end, so that whoever comes late reads it from its beginning, and a slow reader
holds up nobody. In an event loop a task of its own reads the model's stream. A blocking stream is read on by whoever
needs its next chunk, or by a thread of its own once somebody waits who cannot block.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from langchain_aegis.own_errors import own_error
from langchain_aegis.pulses import Pulse
from langchain_aegis.tickets import Ticket
from langchain_aegis.wakers import Waker, running_loop

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Forms(Generic[T]):
    """How answers are copied for each caller, and how whole ones and streams are made of each other.

    Attributes:
        twin: Returns an independent copy of a whole answer.
        copy_chunk: Returns an independent copy of a chunk; the second argument says whether for who opened the stream.
        whole: Makes one answer of all chunks, which it may change.
        pieces: Makes chunks of an answer, which it may change; None: this one cannot be streamed.
    """

    twin: Callable[[T], T] = copy.deepcopy
    copy_chunk: Callable[[Any, bool], Any] = lambda chunk, _: copy.deepcopy(chunk)
    whole: Callable[[list[Any]], T] | None = None
    pieces: Callable[[T], list[Any] | None] | None = None


class Source:
    """A blocking stream and the context in which every step of it runs, on whatever thread."""

    __slots__ = ("busy", "chunks", "context", "pumped", "start")

    def __init__(self, start: Callable[[], Iterator[Any]]) -> None:
        self.start = start
        self.chunks: Iterator[Any] | None = None
        self.context = Context()
        self.busy = False  # somebody reads its next chunk now
        self.pumped = False  # a thread of its own reads it


class Flight(Generic[T]):
    """One call that several callers wait for.

    Args:
        lock: Re-entrant; guards it and where it can be found.
        forms: How its answer is handed out.
        forget: Makes sure that nobody finds it any more; called with the lock held.
        key: What it can be found by.
        asked: The part of the key that is quickly told.
        ticket: Its place at the server.
    """

    __slots__ = ("asked", "chunks", "closed", "error", "forget", "forms", "key", "landed", "lock", "place", "pulse",
                 "readers", "result", "seats", "shared", "source", "started", "taken", "task", "ticket",
                 "waiters")  # fmt: skip

    def __init__(
        self,
        lock: AbstractContextManager[Any],
        forms: Forms[T],
        forget: Callable[[Flight[T]], None],
        key: Hashable,
        asked: Hashable,
        ticket: Ticket,
    ) -> None:
        self.lock = lock
        self.forms = forms
        self.forget = forget
        self.key = key
        self.asked = asked
        self.ticket = ticket
        self.place: asyncio.AbstractEventLoop | None = None  # where it is made; None: on a thread
        self.pulse: Pulse | None = None
        self.seats = 0
        self.shared = False  # more than one caller took a seat, ever
        self.started = False
        self.closed = False  # nobody can join
        self.landed = False  # it has an outcome
        self.taken = False  # somebody has the result itself, not a copy
        self.result: T | None = None
        self.error: BaseException | None = None
        self.chunks: list[Any] | None = None  # of a stream, as they came
        self.source: Source | None = None
        self.task: asyncio.Task[None] | None = None
        self.waiters: set[Waker] = set()  # for the end
        self.readers: set[Waker] = set()  # for the next chunk

    def claim(self, *, streams: bool = False, source: Source | None = None) -> bool:
        """Return True to the one caller that has to start the call, here.

        Args:
            streams: It will be made as a stream.
            source: That stream, if it blocks.
        """
        with self.lock:
            if self.started:
                return False
            self.started = True
            self.place = running_loop() if source is None else None
            if self.place is not None:
                self.pulse = Pulse(self.place)
            if streams:
                self.chunks, self.source = [], source
            return True

    # Making the call

    def fly(self, work: Callable[[], T]) -> None:
        """Make the call; returns when it has ended, with its outcome kept."""
        try:
            self.ticket.wait()
            with self.ticket.held():
                result = work()
        except Exception as exc:  # whatever it was, each caller gets it
            self._land(None, exc)
        except BaseException as exc:  # an interrupt of this thread: the others make the call themselves
            self._land(None, exc)
            raise
        else:
            self._land(result, None)
        finally:
            self.ticket.leave()

    async def afly(self, work: Callable[[], Awaitable[T | None]]) -> None:
        """The same in an event loop; runs as a task of its own."""
        try:
            await self.ticket.await_()
            with self.ticket.held():
                result = await work()
        except Exception as exc:  # whatever it was, each caller gets it
            self._land(None, exc)
        except BaseException as exc:  # cancelled: by the last caller's leaving, or from outside
            self._land(None, exc)
            raise
        else:
            self._land(result, None)
        finally:
            self.ticket.leave()

    async def apump(self, start: Callable[[], AsyncIterator[Any]]) -> None:
        """Keep the chunks of an asynchronous stream; the work of `afly` for one."""
        chunks = aiter(start())
        try:
            async for chunk in chunks:
                self._emit(chunk)
        finally:
            if (aclose := getattr(chunks, "aclose", None)) is not None:
                await aclose()

    def end(self, task: asyncio.Task[None]) -> None:
        """Clean up after a task that was cancelled before its first step: nothing of it ran."""
        if not self.landed:
            self._land(None, asyncio.CancelledError())
            self.ticket.leave()

    def begin_pull(self) -> bool:
        """Whether the caller, and nobody else, shall `pull` the next chunk now."""
        with self.lock:
            source = self.source
            if source is None or source.busy or self.landed:
                return False
            source.busy = True
            return True

    def pull(self) -> None:
        """Read one chunk of a blocking stream, or its end, on this thread; after `begin_pull` returned True."""
        source = self.source
        if source is None:
            return
        try:
            chunk = source.context.run(self._step, source)
        except StopIteration:
            self._finish(None)
        except Exception as exc:  # whatever it was, each reader gets it
            self._finish(exc)
        except BaseException as exc:  # an interrupt of this thread
            self._finish(exc)
            raise
        else:
            self._emit(chunk)
        if not self.seats:
            self.stop_source()

    def _step(self, source: Source) -> Any:
        if source.chunks is None:
            self.ticket.wait()
            with self.ticket.held():
                source.chunks = iter(source.start())
        with self.ticket.held():
            return next(source.chunks)

    def have_pumped(self) -> None:
        """Have a blocking stream read by a thread of its own from now on."""
        with self.lock:
            if self.source is None or self.source.pumped or self.landed:
                return
            self.source.pumped = True
        threading.Thread(target=Context().run, args=(self._pump,), name="aegis-stream", daemon=True).start()

    def _pump(self) -> None:
        while not self.landed:
            if self.begin_pull():
                self.pull()
            elif self.wait_for(waker := Waker(None), len(self.chunks or ())):
                waker.wait(None)

    def _emit(self, chunk: Any) -> None:
        with self.lock:
            if self.chunks is not None:
                self.chunks.append(chunk)
            if self.source is not None:
                self.source.busy = False
            readers, self.readers = self.readers, set()
        if self.pulse is not None:
            self.pulse.beat()
        _wake(readers)

    def _finish(self, error: BaseException | None) -> None:
        self._land(None, error)
        self.ticket.leave()

    def _land(self, result: T | None, error: BaseException | None) -> None:
        with self.lock:
            self.close()
            self.result, self.error, self.landed = result, error, True
            woken = self.waiters | self.readers
            self.waiters, self.readers = set(), set()
        _wake(woken)

    # Waiting for it

    def wait_for(self, waker: Waker, seen: int | None = None) -> bool:
        """Have `waker` woken at the end, or as soon as there are more than `seen` chunks.

        Returns:
            False when that has come already, or when the caller may read the stream on by itself.
        """
        with self.lock:
            if self.landed:
                return False
            if seen is None or self.chunks is None:
                self.waiters.add(waker)
                return True
            if len(self.chunks) > seen or (self.source is not None and not self.source.busy and waker.blocks):
                return False
            self.readers.add(waker)
            return True

    def unwait(self, waker: Waker) -> None:
        """Take back what `wait_for` did."""
        with self.lock:
            self.waiters.discard(waker)
            self.readers.discard(waker)

    def close(self) -> None:
        """Let nobody join any more."""
        with self.lock:
            if not self.closed:
                self.closed = True
                self.forget(self)

    def leave(self) -> None:
        """One caller goes; the last one's leaving stops the call as far as it can be stopped."""
        with self.lock:
            self.seats -= 1
            if self.seats or self.landed:
                return
            self.close()  # before the cancel: nobody joins a dying flight
        if not self.started:
            self.ticket.leave()
        elif self.source is not None:
            self.stop_source()
        elif self.place is None:
            self.ticket.expire()
        elif self.task is not None and not self.place.is_closed():
            if running_loop() is self.place:
                self.task.cancel()
            else:
                with contextlib.suppress(RuntimeError):  # closed meanwhile
                    self.place.call_soon_threadsafe(self.task.cancel)

    def stop_source(self) -> None:
        """Close a blocking stream that nobody wants any more; whoever reads it now does so afterwards."""
        if not self.begin_pull() or self.source is None:
            return
        try:
            if (close := getattr(self.source.chunks, "close", None)) is not None:
                self.source.context.run(close)
        finally:
            self._finish(asyncio.CancelledError())

    def outcome(self) -> bool:
        """Return whether the call came to its end, or raise its error as the caller's own; False: it was lost."""
        if self.error is None:
            return True
        if not isinstance(self.error, Exception):
            return False
        if not self.shared:
            raise self.error
        raise own_error(self.error) from self.error

    def own_result(self) -> tuple[bool, T | None]:
        """Return True with one caller's own copy of the answer; False where it cannot have one."""
        if self.chunks is not None and self.forms.whole is not None:
            # Of copies: the chunks themselves are still being read.
            return True, self.forms.whole([self.forms.copy_chunk(chunk, False) for chunk in self.chunks])
        if not self.shared:
            return True, self.result
        try:
            return True, self.forms.twin(self.result)  # type: ignore[arg-type]
        except Exception:  # a result of any type that cannot be copied: one caller has it, the others call again
            with self.lock:
                first, self.taken = not self.taken, True
            return first, self.result


def _wake(wakers: set[Waker]) -> None:
    for waker in wakers:
        with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits there any more
            waker.wake()
