"""Gather what is asked for at the same time into few requests, each text in them once.

Each event loop has a lane of its own, and so have all threads together: a request is made where its texts are waited
for, so that no loop that is blocked holds up another's callers. A text that another lane has under way is waited for
there, for as long as that lane shows signs of life.

Nobody waits while a lane is idle. What comes while it has a request under way goes together into the next one, which
takes along all that waits by the time it has its slot. A thread that finds its lane idle makes the request itself.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from contextvars import Context
from typing import Any, Generic, Literal, Protocol, TypeVar

from langchain_aegis.bounds import WINDOW_MS
from langchain_aegis.errors import AegisError, AegisOverloadedError, AegisServerError
from langchain_aegis.flows import Flow, arun, run
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.free_ticket import FREE_TICKET
from langchain_aegis.lanes import Flight, Lane, LostError, Performer, Place, Wish
from langchain_aegis.traits import NO_TRAITS, Traits
from langchain_aegis.wakers import Waker, running_loop

V = TypeVar("V")

_FLYING = 2  # requests under way in a lane without bounds: one is computed while the next is sent


Wait = Literal["refuse", "patient", "queue"]  # as `Admission.enter` means them


class Slots(Protocol):
    """What bounds requests: an `Admission`."""

    @property
    def max_concurrency(self) -> int:
        """Most requests under way."""

    @property
    def max_waiting(self) -> int:
        """Most requests that wait."""

    def enter(self, *, wait: Wait, traits: Traits, window_ms: float) -> Any:
        """Return the ticket of a request."""


class Gathering(Generic[V]):
    """The requests for one kind of thing; made once for all its callers.

    Args:
        ask: The flow of one request: lands every wish that it is given, or raises what all of them get.
        admission: Each request takes a slot of it; None: nothing bounds them.
        max_batch: Most texts of a request.
        max_chars: Most characters of a request's texts together; a longer text goes alone.
        split_chars: With more than that to compute, two requests are under way, one of the shorter texts.
        traits: What the admission may know of a request.
        window_ms: How long others may overtake a request that waits for a slot; see `Admission.enter`.
    """

    def __init__(
        self,
        ask: Callable[[list[Wish[V]]], Flow[None]],
        *,
        admission: Slots | None = None,
        max_batch: int = 64,
        max_chars: float = math.inf,
        split_chars: float = math.inf,
        traits: Traits = NO_TRAITS,
        window_ms: float = WINDOW_MS,
    ) -> None:
        self._ask = ask
        self._admission = admission
        self.max_batch = max_batch
        self._max_chars = max_chars
        self._split_chars = split_chars
        self._traits = traits
        self._window_ms = window_ms
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Forget every wish: in the child of a fork they are somebody else's."""
        self._lock = threading.RLock()  # re-entrant: a finaliser may withdraw a wish while its own thread asks
        self._lanes: dict[Place, Lane[V]] = {}

    @property
    def idle(self) -> bool:
        """Whether nothing is under way and nobody waits."""
        return not self._lanes

    def has(self, text: str) -> bool:
        """Whether a text is under way or waits; without a lock, so it may be wrong a moment later."""
        return any(text in lane.wishes for lane in tuple(self._lanes.values()))

    @property
    def seats(self) -> int:
        """How many callers wait for the texts that are under way or waiting."""
        with self._lock:
            return sum(wish.seats for lane in self._lanes.values() for wish in lane.wishes.values())

    def get(
        self,
        texts: Sequence[str],
        performer: Performer,
        *,
        deadline: float | None = None,
        documents: bool = False,
        wait: Wait = "refuse",
        known: Callable[[str], V | None] | None = None,
        place_of: Callable[[str], str] | None = None,
    ) -> list[V]:
        """Return what belongs to each of some distinct texts, in their order; values may be shared with others.

        Args:
            texts: At most `max_batch`, or a request cannot take them all.
            performer: Does what the request's flow asks for; any caller's may be used.
            deadline: Time of `time.monotonic()` at which this caller leaves.
            documents: They are no queries, and wait until those have been served.
            wait: "refuse" when too many texts wait; "patient" to wait however many there are.
            known: Looks once more, in memory only, before a text is asked for.
            place_of: Says which of the caller's texts it is that was refused.

        Raises:
            AegisOverloadedError: Too many texts wait.
            AegisDeadlineError: The deadline passed.
            Exception: What a request raised, as an instance of this caller's own.
        """
        if running_loop() is not None:
            return _values(self._alone(texts, performer, documents), place_of)
        for joins in (True, False):
            wishes, flight = self._board(
                None, texts, performer, joins, documents, wait, known, carries=deadline is None
            )
            try:
                if flight is not None:
                    Context().run(self._fly, flight)
                    if flight.interrupt is not None:
                        raise flight.interrupt
                for wish in wishes:
                    self._wait(wish, deadline)
                return _values(wishes, place_of)
            except LostError:
                continue
            finally:
                self._withdraw(wishes)
        raise _cancelled()

    async def aget(
        self,
        texts: Sequence[str],
        performer: Performer,
        *,
        deadline: float | None = None,
        documents: bool = False,
        wait: Wait = "refuse",
        known: Callable[[str], V | None] | None = None,
        place_of: Callable[[str], str] | None = None,
    ) -> list[V]:
        """As `get`, in an event loop. Cancelling it hurts nobody else."""
        loop = asyncio.get_running_loop()
        for joins in (True, False):
            wishes, _ = self._board(loop, texts, performer, joins, documents, wait, known)
            try:
                for wish in wishes:
                    await self._await(wish, loop, deadline)
                return _values(wishes, place_of)
            except LostError:
                continue
            finally:
                self._withdraw(wishes)
        raise _cancelled()

    def _alone(self, texts: Sequence[str], performer: Performer, documents: bool) -> list[Wish[V]]:
        """Make requests of one's own: in a running event loop, nobody may be waited for who may need that loop."""
        lane: Lane[V] = Lane(None)
        wishes = [Wish(text, lane, performer, self._lock, document=documents) for text in texts]
        for wish in wishes:
            wish.seats = 1
            lane.add(wish)
        ticket = self._enter("refuse")
        try:
            ticket.wait()
            with ticket.held():
                while lane.size:
                    run(self._ask(lane.take(self.max_batch, self._max_chars)), performer.perform)
        finally:
            ticket.leave()
        return wishes

    # Boarding

    def _board(
        self, place: Place, texts: Sequence[str], performer: Performer, joins: bool, documents: bool, wait: Wait,
        known: Callable[[str], V | None] | None, *, carries: bool = False,
    ) -> tuple[list[Wish[V]], Flight[V] | None]:  # fmt: skip
        """Ask for texts, and start a request if there is reason to.

        Args:
            joins: Other lanes' wishes may be joined.
            carries: The caller can make a request on its own thread.

        Returns:
            The wishes, each with a seat of this caller; and the request that this caller has to make.
        """
        with self._lock:
            lane = self._lane(place)
            wishes: list[Wish[V]] = []
            fresh: list[Wish[V]] = []
            for text in texts:
                wish = lane.wishes.get(text) or (self._elsewhere(lane, text) if joins else None)
                if wish is None:
                    wish = Wish(text, lane, performer, self._lock, document=documents)
                    if known is not None and (value := known(text)) is not None:
                        wish.land(value)
                    else:
                        fresh.append(wish)
                wishes.append(wish)
            ticket = None
            if fresh:
                try:
                    self._check_room(lane, wait)
                    ticket = None if lane.flights else self._enter(wait)
                except AegisError:
                    self._drop(lane)
                    raise
                for wish in fresh:
                    lane.add(wish)
            for wish in wishes:
                wish.seats += 1
            flight = None if ticket is None else self._start(lane, ticket, carries=carries)
            self._next(lane)
            return wishes, flight

    def _lane(self, place: Place) -> Lane[V]:
        lane = self._lanes.get(place)
        if lane is None:
            for loop in [loop for loop in self._lanes if loop is not None and loop.is_closed()]:
                del self._lanes[loop]
            lane = self._lanes[place] = Lane(place)
        return lane

    def _elsewhere(self, own: Lane[V], text: str) -> Wish[V] | None:
        for lane in self._lanes.values():
            if lane is not own and (wish := lane.wishes.get(text)) is not None and not lane.is_over():
                return wish
        return None

    def _check_room(self, lane: Lane[V], wait: Wait) -> None:
        if self._admission is None or wait != "refuse":
            return
        if lane.size >= (max(1, self._admission.max_waiting) + lane.empty) * self.max_batch:
            raise AegisOverloadedError(
                f"{lane.size} texts wait for their vectors already; nothing was sent", retry_after_s=1.0
            )

    def _enter(self, wait: Wait) -> Any:
        if self._admission is None:
            return FREE_TICKET
        return self._admission.enter(wait=wait, traits=self._traits, window_ms=self._window_ms)

    # Requests

    def _start(self, lane: Lane[V], ticket: Any, *, carries: bool = False) -> Flight[V] | None:
        """Start a request; it is returned if the caller has to make it. Locked."""
        flight = Flight(lane, ticket)
        lane.flights.add(flight)
        lane.empty += 1
        if lane.place is not None:
            flight.task = lane.place.create_task(self._afly(flight), context=Context())
            flight.task.add_done_callback(lambda _: self._land(flight, asyncio.CancelledError()))
            return None
        if carries:
            return flight
        thread = threading.Thread(target=Context().run, args=(self._fly, flight), name="aegis-embeddings", daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:  # the interpreter is about to end, or has too many threads
            self._land(flight, AegisServerError(f"no thread can be started for the request: {exc}"))
        return None

    def _fly(self, flight: Flight[V]) -> None:
        error: BaseException | None = None
        try:
            flight.ticket.wait()
            if wishes := self._load(flight):
                with flight.ticket.held():
                    run(self._ask(wishes), wishes[0].performer.perform)
        except BaseException as exc:  # nobody may wait for ever
            error = exc
            flight.interrupt = None if isinstance(exc, Exception) else exc
        self._land(flight, error)

    async def _afly(self, flight: Flight[V]) -> None:
        error: BaseException | None = None
        try:
            await asyncio.sleep(0)  # calls of the same moment go together
            await flight.ticket.await_()
            if wishes := self._load(flight):
                with flight.ticket.held():
                    await arun(self._ask(wishes), wishes[0].performer.aperform)
        except BaseException as exc:  # nobody may wait for ever
            error = exc
            if not isinstance(exc, Exception):
                raise
        finally:
            self._land(flight, error)

    def _load(self, flight: Flight[V]) -> list[Wish[V]]:
        """Choose the texts of a request that has its slot now."""
        with self._lock:
            flight.loaded = True
            flight.lane.empty -= 1
            flight.wishes = flight.lane.take(self.max_batch, self._max_chars)
            rest: list[Wish[V]] = []
            if len(flight.lane.flights) == 1 and not flight.lane.halved:
                flight.wishes, rest = self._split(flight.wishes)
                flight.lane.give_back(rest)
            flight.lane.halved = bool(rest)
            for wish in flight.wishes:
                wish.flight = flight
            self._next(flight.lane)  # what did not fit
            return flight.wishes

    def _split(self, wishes: list[Wish[V]]) -> tuple[list[Wish[V]], list[Wish[V]]]:
        """Cut what is much to compute in two: a server's other half is idle, and texts are padded to the longest."""
        lengths = sorted(len(wish.text) for wish in wishes)
        count = len(wishes)
        if count < 2 or count * lengths[-1] < self._split_chars:
            return wishes, []
        at = min(range(1, count), key=lambda i: max(i * lengths[i - 1], (count - i) * lengths[-1]))
        wishes = sorted(wishes, key=lambda wish: len(wish.text))
        return wishes[:at], wishes[at:]

    def _land(self, flight: Flight[V], error: BaseException | None) -> None:
        """End a request; what has gathered meanwhile is the next one. Later calls do nothing."""
        lane = flight.lane
        with self._lock:
            if flight.landed:
                return
            flight.landed = True
            flight.ticket.leave()
            lane.flights.discard(flight)
            for wish in flight.wishes:
                wish.land(None, error if error is not None else asyncio.CancelledError())
            if not flight.loaded:
                lane.empty -= 1
                if isinstance(error, Exception) and not flight.stopped and not lane.flights:
                    self._fail(lane, error)  # they got no slot
            if lane.place is None:
                self._next(lane)
            elif not lane.place.is_closed():
                if error is None or isinstance(error, Exception):
                    self._next(lane)
                else:  # the loop may be about to end: its callers are cancelled next
                    lane.place.call_soon(self._next, lane)
            self._drop(lane)

    def _next(self, lane: Lane[V]) -> None:
        """Start the requests that there is reason for."""
        with self._lock:
            flying = _FLYING if self._admission is None else self._admission.max_concurrency
            while lane.size and (
                not lane.flights or (len(lane.flights) < flying and self._is_much(lane, len(lane.flights)))
            ):
                try:
                    ticket = self._enter("queue")
                except AegisError as exc:  # the admission was closed meanwhile
                    if not lane.flights:
                        self._fail(lane, exc)
                    break
                self._start(lane, ticket)
            self._drop(lane)

    def _is_much(self, lane: Lane[V], flying: int) -> bool:
        """Whether so much waits that one more request shall be under way."""
        if lane.size >= (lane.empty + 1) * self.max_batch:
            return True
        return not lane.empty and flying < _FLYING and lane.chars >= self._split_chars / 2

    def _fail(self, lane: Lane[V], error: AegisError | Exception) -> None:
        for wish in lane.take(lane.size, math.inf):
            wish.land(None, error)

    def _drop(self, lane: Lane[V]) -> None:
        """Forget a lane in which nothing happens."""
        if not lane.flights and not lane.size and self._lanes.get(lane.place) is lane:
            del self._lanes[lane.place]

    def _withdraw(self, wishes: list[Wish[V]]) -> None:
        """One caller has gone; a text that nobody wants is not sent, a request that nobody wants is stopped."""
        with self._lock:
            for wish in wishes:
                wish.seats -= 1
                if wish.seats or wish.landed:
                    continue
                lane = wish.lane
                if lane.wishes.get(wish.text) is wish:
                    del lane.wishes[wish.text]
                if wish.flight is not None:
                    if not any(other.seats and not other.landed for other in wish.flight.wishes):
                        wish.flight.stop()
                else:
                    lane.leave(wish)
                    if not lane.size:
                        for flight in lane.flights:
                            if not flight.loaded:
                                flight.stop()
                        self._drop(lane)

    # Waiting

    def _wait(self, wish: Wish[V], deadline: float | None) -> None:
        waker = Waker(None)
        if wish.wait_for(waker):
            while not waker.woken:
                waker.wait(wish.lane.patience_s(None, deadline))
                if not waker.woken:
                    wish.lane.check(None, deadline)

    async def _await(self, wish: Wish[V], loop: asyncio.AbstractEventLoop, deadline: float | None) -> None:
        waker = Waker(loop)
        if wish.wait_for(waker):
            while not waker.woken:
                await waker.await_(wish.lane.patience_s(loop, deadline))
                if not waker.woken:
                    wish.lane.check(loop, deadline)


def _values(wishes: list[Wish[V]], place_of: Callable[[str], str] | None) -> list[V]:
    values = []
    for wish in wishes:
        try:
            values.append(wish.value())
        except Exception as exc:
            if wish.blamed and place_of is not None:
                exc.add_note(place_of(wish.text))
            raise
    return values


def _cancelled() -> AegisServerError:
    return AegisServerError("the request for these texts was cancelled, twice; ask again")
