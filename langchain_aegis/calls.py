"""One call's way through admission: what it took on its way in, and how it runs with that."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from typing import Any, Generic, TypeVar

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config

from langchain_aegis.admission import Admission, Wait
from langchain_aegis.bounds import MAX_BATCH, WINDOW_MS
from langchain_aegis.errors import AegisConfigError, AegisDeadlineError
from langchain_aegis.flights import Flights, LostFlightError, Seat
from langchain_aegis.scope import Scope, aegis_scope, current, seen_config, who
from langchain_aegis.settings import AegisSettings
from langchain_aegis.tickets import Ticket, held_tickets
from langchain_aegis.traits import NO_TRAITS, Traits
from langchain_aegis.wakers import running_loop

OF_A_RUN = ("__", "checkpoint", "thread_id")  # names in `configurable` that differ from run to run of a graph

T = TypeVar("T")
C = TypeVar("C")


class Entry(Generic[T]):
    """What one call holds: nothing yet, a ticket of its own, or a seat in a flight. Must be left.

    Args:
        admission: Whose slots it needs.
        flights: Where identical calls meet.
        wait: As in `Admission.enter`.
        deadline_s: Seconds from now until which the answer must be complete, or None.
        many: Stands for several prompts; only the first one uses it.
        blocking: Made by a synchronous call; inside a running event loop it must not wait for another's call, which
            that loop may have to finish.
        config: The call's own config, which LangChain shows to nobody.
        may_share: Whether it may share a flight; by default a call that is refused rather than queued.
        traits: What is known of the call; decides about its turn.
        window_ms: As in `Admission.enter`.
        max_batch: As in `Admission.enter`.
    """

    __slots__ = ("_chunks", "_order", "_seat", "_ticket", "admission", "claimed", "config", "deadline", "flights",
                 "many", "may_share", "opened", "owner", "traits", "wait")  # fmt: skip

    def __init__(
        self,
        owner: object,
        admission: Admission,
        flights: Flights[T],
        wait: Wait,
        deadline_s: float | None,
        *,
        many: bool = False,
        blocking: bool = False,
        config: RunnableConfig | None = None,
        may_share: bool | None = None,
        traits: Traits = NO_TRAITS,
        window_ms: float = WINDOW_MS,
        max_batch: int = MAX_BATCH,
    ) -> None:
        self.owner = owner
        self.admission = admission
        self.flights = flights
        self.wait: Wait = wait
        self.deadline = None if deadline_s is None else time.monotonic() + deadline_s
        self.many = many
        self.may_share = (
            (wait == "refuse" if may_share is None else may_share)
            and not many
            and not (blocking and running_loop() is not None)
            # Inside a call that holds a slot, waiting for a call that needs one could last for ever.
            and not any(ticket.admission is admission for ticket in held_tickets.get())
        )
        self.traits = traits
        self._order = (window_ms, max_batch)
        self.config = config
        self.claimed = False  # the call has reached the model
        self.opened = True
        self._ticket: Ticket | None = None
        self._seat: Seat[T] | None = None
        self._chunks: Any = None

    @property
    def decided(self) -> bool:
        """Whether a ticket or a seat was taken."""
        return self._ticket is not None or self._seat is not None

    @property
    def shares(self) -> bool:
        """Whether it has a seat: what it gets, others may get too."""
        return self._seat is not None and self._ticket is None

    def take(self, key: tuple[Hashable, ...] | None) -> None:
        """Take a seat in the flight for `key`, or a ticket if it is None; raises `AegisOverloadedError` at once.

        The key's first part is what `Flights.flies` is asked about.
        """
        if key is None:
            self._ticket = self._enter(self.wait)
        else:
            self._seat = self.flights.board(key, self._enter_flight, key[0])
            if self._seat.joins:
                self.admission.merged(self.traits)

    def take_own(self) -> None:
        """Have a ticket instead of a seat: for a call that nobody can share."""
        if self._seat is not None:
            ticket = self._seat.detach()
            self._seat = None
            if ticket is not None:
                ticket.deadline = self.deadline
            self._ticket = ticket or self._enter(self.wait)

    def run(self, work: Callable[[], T], shared_work: Callable[[], T]) -> T:
        """Make the call on this thread, or have it made; leaves the entry.

        Args:
            work: Makes the call as this caller's own, with its callbacks and context.
            shared_work: Makes it for everybody; runs in an empty context.
        """
        try:
            if self._seat is not None:
                return self._seat.result(shared_work, self.deadline)
            ticket = self._own_ticket()
            if self.deadline is not None and running_loop() is None:
                # A request cannot be stopped from outside: it keeps its slot on a thread of its own.
                self._seat, self._ticket = self.flights.alone(ticket, self._enter), None
                return self._seat.result(work, self.deadline, copy_context())
            ticket.wait()
            with ticket.held():
                return work()
        finally:
            self.leave()

    async def arun(self, work: Callable[[], Awaitable[T]], shared_work: Callable[[], Awaitable[T]]) -> T:
        """As `run`, for coroutines."""
        try:
            if self._seat is not None:
                return await self._seat.aresult(shared_work, self.deadline)
            ticket = self._own_ticket()
            await ticket.await_()
            with ticket.held():
                if self.deadline is None:
                    return await work()
                return await _before(self.deadline, work())
        finally:
            self.leave()

    def stream(
        self, start: Callable[[], Iterator[C]], around: Callable[[], AbstractContextManager[object]] = nullcontext,
        shared_start: Callable[[], Iterator[C]] | None = None,
    ) -> Iterator[C]:  # fmt: skip
        """Yield what `start()` yields; the slot is held until the end, an error, or the consumer's leaving.

        Args:
            start: Opens the stream.
            around: Makes a context in which each step runs; the consumer never sees it.
            shared_start: Opens it for everybody, in an empty context; used with a seat.
        """
        try:
            if self._seat is not None and shared_start is not None:
                self._chunks = self._seat.stream(shared_start, self.deadline)
                try:
                    yield from self._chunks
                    return
                except LostFlightError as lost:
                    self._ticket = self._seat.own_ticket(lost)
            ticket = self._own_ticket()
            ticket.wait()
            with ticket.held(), around():
                chunks = self._chunks = iter(start())
            while True:
                with ticket.held(), around():
                    try:
                        chunk = next(chunks)
                    except StopIteration:
                        return
                if self.deadline is not None and time.monotonic() >= self.deadline:
                    raise AegisDeadlineError("the deadline passed before the answer was complete")
                yield chunk
        finally:
            self.close()

    async def astream(
        self, start: Callable[[], AsyncIterator[C]],
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
        shared_start: Callable[[], AsyncIterator[C]] | None = None,
    ) -> AsyncIterator[C]:  # fmt: skip
        """As `stream`, for an asynchronous stream."""
        try:
            if self._seat is not None and shared_start is not None:
                shared = self._chunks = self._seat.astream(shared_start, self.deadline)
                try:
                    async for chunk in shared:
                        yield chunk
                    return
                except LostFlightError as lost:
                    self._ticket = self._seat.own_ticket(lost)
            ticket = self._own_ticket()
            await ticket.await_()
            with ticket.held(), around():
                chunks = self._chunks = aiter(start())
            while True:
                with ticket.held(), around():
                    try:
                        step = anext(chunks)
                        chunk = await (step if self.deadline is None else _before(self.deadline, step))
                    except StopAsyncIteration:
                        return
                yield chunk
        finally:
            await self.aclose()

    def leave(self) -> None:
        """Give back what is held; later calls do nothing."""
        self.opened = False
        if self._seat is not None:
            self._seat.leave()
        if self._ticket is not None:
            self._ticket.leave()

    def close(self) -> None:
        """Close the stream, if there is one, then leave."""
        chunks, self._chunks = self._chunks, None
        try:
            if (close := getattr(chunks, "close", None)) is not None:
                close()
        finally:
            self.leave()

    async def aclose(self) -> None:
        """As `close`, for an asynchronous stream."""
        chunks, self._chunks = self._chunks, None
        try:
            if (aclose := getattr(chunks, "aclose", None)) is not None:
                await aclose()
        finally:
            self.leave()

    def _enter(self, wait: Wait) -> Ticket:
        return self._ticket_at(wait, self.deadline)

    def _enter_flight(self, wait: Wait) -> Ticket:
        # Without this caller's deadline: others may join who have more time. It leaves its seat when it is over.
        return self._ticket_at(wait, None)

    def _ticket_at(self, wait: Wait, deadline: float | None) -> Ticket:
        window_ms, max_batch = self._order
        return self.admission.enter(
            wait=wait, deadline=deadline, traits=self.traits, window_ms=window_ms, max_batch=max_batch
        )

    def _own_ticket(self) -> Ticket:
        if self._ticket is None:
            self._ticket = self._enter(self.wait)
        return self._ticket


async def _before(deadline: float, work: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(deadline - time.monotonic()) as limit:
            return await work
    except TimeoutError as exc:
        if limit.expired():
            raise AegisDeadlineError("the deadline passed before the answer was complete") from exc
        raise


def scoped(scope: Scope) -> AbstractContextManager[object]:
    """Return a context that tells a shared call whose it is; all its callers have these in common."""
    if scope.tenant is None and scope.user is None and scope.task is None:
        return nullcontext()
    return aegis_scope(tenant=scope.tenant, user=scope.user, task=scope.task)


def whose(config: RunnableConfig | None) -> Hashable | None:
    """Return what two calls must have in common to share one; None when that cannot be told.

    Tenant, user and task, and the whole `configurable` of the run: an application may keep its tenant there under a
    name that nobody has told us. Only what differs in every run of a graph is left out.
    """
    try:
        with seen_config(config):
            tenant, user = who(*_keys())
    except AegisConfigError:  # somebody is named who cannot be: the cache will say so
        return None
    around = var_child_runnable_config.get()
    configurable = {
        **((around or {}).get("configurable") or {}),
        **((config or {}).get("configurable") or {}),
    }
    told = {k: v for k, v in configurable.items() if not k.startswith(OF_A_RUN)}
    return tenant, user, current().task, repr(sorted(told.items())) if told else ""


@functools.cache
def _keys() -> tuple[str | None, str | None]:
    try:
        settings = AegisSettings.from_env()
    except AegisConfigError:  # said by whoever needs that setting
        settings = AegisSettings()
    return settings.tenant_key, settings.user_key
