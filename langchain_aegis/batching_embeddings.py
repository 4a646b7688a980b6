"""Gather concurrent queries into few embedding requests."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Generator
from contextvars import Context
from typing import Any

import httpx
from langchain_core.embeddings import Embeddings

from langchain_aegis.admission import Admission
from langchain_aegis.errors import (
    AegisConfigError,
    AegisDeadlineError,
    AegisError,
    AegisOverloadedError,
    AegisServerError,
)
from langchain_aegis.flights import own_error
from langchain_aegis.flows import arun, run
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.servers import admission_of, check_arguments
from langchain_aegis.tickets import Ticket
from langchain_aegis.wakers import Waker, running_loop

Place = asyncio.AbstractEventLoop | None


class BatchingEmbeddings(Embeddings):
    """Any Embeddings, with bounded requests; queries that arrive while one is under way become one request.

    A lone query is sent at once, as `embed_query`. Queries that come in meanwhile are sent together, as one
    `embed_documents`, each text once; when that fails because of a text, every text is tried alone, so that only
    its own callers get the error. Queries are gathered within one event loop, and among sync threads.

    Args:
        inner: The embedder. All users of one server share its bounds; the smallest that any of them asks for wins.
        merge: Gather queries. Set it to False for an embedder that embeds a query differently from a document
            (another instruction, prefix or input type: E5, Nomic, Cohere, Voyage, Vertex): gathered queries would
            get vectors of documents.
        max_concurrency: Most requests under way; 4 if nobody asks for another number.
        max_waiting: Most requests that wait; queries beyond `max_waiting * max_batch` texts are refused. 100 likewise.
        window_ms: How long waiting queries may be collected while all slots are busy, in milliseconds.
        max_batch: Most texts of a gathered request.
        deadline_s: Seconds after which a query's caller gets `AegisDeadlineError`.

    Raises:
        AegisConfigError: `inner` is no Embeddings, or a bound is out of range.
    """

    def __init__(
        self,
        inner: Embeddings,
        *,
        merge: bool = True,
        max_concurrency: int | None = None,
        max_waiting: int | None = None,
        window_ms: float = 50.0,
        max_batch: int = 64,
        deadline_s: float | None = None,
    ) -> None:
        if not isinstance(inner, Embeddings):
            raise AegisConfigError(f"inner must be Embeddings, got {type(inner).__name__}; try batching(x)")
        check_arguments({"window_ms": window_ms, "max_batch": max_batch, "deadline_s": deadline_s})
        self.inner = inner
        self.merge = merge
        self.admission: Admission = admission_of(inner, max_concurrency=max_concurrency, max_waiting=max_waiting)
        self.window_ms = window_ms
        self.max_batch = max_batch
        self.deadline_s = deadline_s
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Forget every query: in the child of a fork they are somebody else's."""
        self._lock = threading.RLock()  # re-entrant: a finaliser may withdraw a query while its own thread asks
        self._queues: dict[Place, _Queue] = {}

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of `text`; may share a request with other queries."""
        if not self.merge or running_loop() is not None:
            with self.admission.slot(deadline_s=self.deadline_s) as ticket, ticket.held():
                return self.inner.embed_query(text)
        wish = self._wish(None, text)
        try:
            waker = Waker(None)
            if wish.wait_for(waker):
                waker.wait(self.deadline_s)
            return wish.vector()
        finally:
            self._withdraw(None, wish)

    async def aembed_query(self, text: str) -> list[float]:
        """Return the vector of `text`; may share a request with other queries."""
        if not self.merge:
            async with self.admission.aslot(deadline_s=self.deadline_s) as ticket:
                with ticket.held():
                    return await self.inner.aembed_query(text)
        loop = asyncio.get_running_loop()
        wish = self._wish(loop, text)
        try:
            waker = Waker(loop)
            if wish.wait_for(waker):
                await waker.await_(self.deadline_s)
            return wish.vector()
        finally:
            self._withdraw(loop, wish)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors of `texts`, in order, in one request of its own."""
        with self.admission.slot(deadline_s=self.deadline_s) as ticket, ticket.held():
            return self.inner.embed_documents(texts)

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors of `texts`, in order, in one request of its own."""
        async with self.admission.aslot(deadline_s=self.deadline_s) as ticket:
            with ticket.held():
                return await self.inner.aembed_documents(texts)

    def _wish(self, place: Place, text: str) -> _Wish:
        """Ask for a text's vector, and start a request if there is reason to."""
        with self._lock:
            queue = self._queues.get(place)
            if queue is None:
                for loop in [loop for loop in self._queues if loop is not None and loop.is_closed()]:
                    del self._queues[loop]
                queue = self._queues[place] = _Queue()
            wish = queue.wishes.get(text)
            if wish is None:
                if len(queue.waiting) >= max(1, self.admission.max_waiting) * self.max_batch:
                    raise AegisOverloadedError(
                        f"{len(queue.waiting)} texts wait for their vectors already; nothing was sent",
                        retry_after_s=1.0,
                    )
                # A request that is not under way yet needs a place of its own, or is refused here and now.
                ticket = None if queue.flying else self.admission.enter()
                wish = queue.wishes[text] = _Wish(text, self._lock)
                queue.waiting.append(wish)
                wish.seats = 1
                if ticket is not None:
                    self._start(place, queue, ticket)
                elif len(queue.waiting) >= self.max_batch and queue.flying < self.admission.max_concurrency:
                    self._start(place, queue, self.admission.enter(wait="queue"))
            else:
                wish.seats += 1
            return wish

    def _start(self, place: Place, queue: _Queue, ticket: Ticket) -> None:
        batch = _Batch([queue.waiting.popleft() for _ in range(min(self.max_batch, len(queue.waiting)))], ticket)
        for wish in batch.wishes:
            wish.batch = batch
        queue.flying += 1
        if place is None:
            threading.Thread(
                target=Context().run, args=(self._fly, queue, batch), name="aegis-embeddings", daemon=True
            ).start()
        else:
            batch.task = place.create_task(self._afly(place, queue, batch), context=Context())
            batch.task.add_done_callback(lambda _: self._land(place, queue, batch, asyncio.CancelledError()))

    def _fly(self, queue: _Queue, batch: _Batch) -> None:
        error: BaseException | None = None
        try:
            batch.ticket.wait()
            with batch.ticket.held():
                run(_ask(batch.wishes), lambda step: getattr(self.inner, step[0])(step[1]))
        except BaseException as exc:  # nobody may wait for ever
            error = exc
        self._land(None, queue, batch, error)

    async def _afly(self, place: Place, queue: _Queue, batch: _Batch) -> None:
        error: BaseException | None = None
        try:
            await batch.ticket.await_()
            with batch.ticket.held():
                await arun(_ask(batch.wishes), lambda step: getattr(self.inner, f"a{step[0]}")(step[1]))
        except BaseException as exc:  # nobody may wait for ever
            error = exc
            if not isinstance(exc, Exception):
                raise
        finally:
            self._land(place, queue, batch, error)

    def _land(self, place: Place, queue: _Queue, batch: _Batch, error: BaseException | None) -> None:
        """End a request; what gathered meanwhile is the next one. Later calls do nothing."""
        with self._lock:
            if batch.landed:
                return
            batch.landed = True
            batch.ticket.leave()
            queue.flying -= 1
            for wish in batch.wishes:
                if queue.wishes.get(wish.text) is wish:
                    del queue.wishes[wish.text]
                wish.land(None, error)
            if queue.waiting and not (place is not None and place.is_closed()):
                try:
                    self._start(place, queue, self.admission.enter(wait="queue"))
                except AegisError as exc:  # the admission was closed meanwhile
                    for wish in queue.waiting:
                        wish.land(None, exc)
                    queue.waiting.clear()
                    queue.wishes.clear()
            if not queue.flying and self._queues.get(place) is queue:
                del self._queues[place]

    def _withdraw(self, place: Place, wish: _Wish) -> None:
        """One caller has gone; a text that nobody wants is not sent, a request that nobody wants is stopped."""
        with self._lock:
            wish.seats -= 1
            if wish.seats or wish.landed:
                return
            queue = self._queues.get(place)
            if queue is not None and queue.wishes.get(wish.text) is wish:
                del queue.wishes[wish.text]
            if wish.batch is None:
                if queue is not None:
                    queue.waiting.remove(wish)
            elif not any(other.seats for other in wish.batch.wishes):
                if wish.batch.task is not None and place is not None and not place.is_closed():
                    place.call_soon_threadsafe(wish.batch.task.cancel)
                elif place is None:
                    wish.batch.ticket.expire()


class _Wish:
    """A text, and those who wait for its vector."""

    def __init__(self, text: str, lock: threading.RLock) -> None:
        self.text = text
        self.seats = 0
        self.batch: _Batch | None = None
        self.landed = False
        self._lock: Any = lock
        self._shared = False
        self._vector: list[float] | None = None
        self._error: BaseException | None = None
        self._wakers: list[Waker] = []

    def wait_for(self, waker: Waker) -> bool:
        with self._lock:
            if not self.landed:
                self._wakers.append(waker)
            return not self.landed

    def land(self, vector: list[float] | None, error: BaseException | None) -> None:
        """Keep the outcome and tell everybody; later calls do nothing."""
        with self._lock:
            if self.landed:
                return
            self._vector, self._error, self.landed = vector, error, True
            wakers, self._wakers = self._wakers, []
        for waker in wakers:
            waker.wake()

    def vector(self) -> list[float]:
        """Return one caller's own copy, or raise its own error."""
        if not self.landed:
            raise AegisDeadlineError("the deadline passed before the vector was there")
        if isinstance(self._error, Exception):
            raise own_error(self._error) from self._error
        if self._vector is None:
            raise AegisServerError("the request that this query was part of was cancelled; ask again")
        return list(self._vector)


class _Batch:
    """The texts of one request."""

    def __init__(self, wishes: list[_Wish], ticket: Ticket) -> None:
        self.wishes = wishes
        self.ticket = ticket
        self.task: asyncio.Task[None] | None = None
        self.landed = False


class _Queue:
    """Who waits in one event loop, or in the threads that run none."""

    def __init__(self) -> None:
        self.wishes: dict[str, _Wish] = {}  # waiting or under way, by text
        self.waiting: deque[_Wish] = deque()
        self.flying = 0


def _ask(wishes: list[_Wish]) -> Generator[tuple[str, Any], Any, None]:
    """Find each text's vector; yields the embedder's method and argument, and is sent what it returned or raised."""
    if len(wishes) > 1:
        try:
            vectors = yield "embed_documents", [wish.text for wish in wishes]
            if len(vectors) != len(wishes):
                raise AegisServerError(f"the embedder returned {len(vectors)} vectors for {len(wishes)} texts")
        except Exception as exc:  # whatever the embedder raised: one of the texts may be to blame
            if _is_no_texts_fault(exc):
                raise
        else:
            for wish, vector in zip(wishes, vectors, strict=True):
                wish.land(vector, None)
            return
    for wish in wishes:
        if wish.seats:
            try:
                vector = yield "embed_query", wish.text
            except Exception as exc:  # whatever it was, it is this text's outcome
                wish.land(None, exc)
                if _is_no_texts_fault(exc):
                    raise
            else:
                wish.land(vector, None)


def _is_no_texts_fault(error: BaseException | None) -> bool:
    """Whether asking again for each text alone would only fail again: the server is away, slow or busy."""
    while error is not None:
        if isinstance(error, (ConnectionError, TimeoutError, httpx.TransportError, AegisOverloadedError)):
            return True
        error = error.__cause__
    return False
