"""Give a stream another process's answer while it is made there, to all that ask for it here.

Those of one process read it once: the first of them reads for all, as for a call of the model that they share.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Any, Final

from langchain_core.outputs import ChatGenerationChunk, ChatResult

from langchain_aegis.copies import CHAT_FORMS
from langchain_aegis.flights import Flights, LostFlightError, Seat
from langchain_aegis.free_ticket import FREE_TICKET
from langchain_aegis.replays import BrokenOff, StreamEntry, as_chunks

_ROUNDS: Final = 3  # of looking for it again, after who made it has gone

followed: Final[Flights[ChatResult]] = Flights(CHAT_FORMS)


def found(entry: StreamEntry, deadline: float | None = None) -> Iterator[ChatGenerationChunk]:
    """Yield the answer that is kept, or that another process makes; `entry.answered` then says whether that was all.

    If not, this caller makes the answer, and `entry.rest` returns what of its pieces was not given yet.

    Args:
        entry: The call.
        deadline: Time of `time.monotonic()` at which the caller leaves.

    Raises:
        AegisStreamError: A part of an answer was given that does not go on, and what is there is another one.
        AegisDeadlineError: The deadline passed.
    """
    for _ in range(_ROUNDS):
        if (hit := entry.lookup()) is not None:
            for chunk in as_chunks(hit):
                if (rest := entry.rest(chunk)) is not None:
                    yield rest
            entry.answered = True
            return
        if (seat := _seat(entry)) is None:
            break
        given: list[ChatGenerationChunk] = []
        chunks = seat.stream(entry.relay.follow, deadline)
        try:
            for chunk in chunks:
                if (rest := entry.rest(chunk)) is not None:
                    given.append(rest)
                    yield rest
            entry.answered = bool(given)
            entry.relay.followed()
            return
        except (BrokenOff, LostFlightError) as exc:
            entry.broke_off(given, exc)
            if str(exc) == "late" or entry.consulted:
                break
        finally:
            chunks.close()
            seat.leave()
    _lead(entry)


async def afound(entry: StreamEntry, deadline: float | None = None) -> AsyncGenerator[ChatGenerationChunk]:
    """Do what `found` does, without blocking the event loop."""
    for _ in range(_ROUNDS):
        if (hit := await entry.alookup()) is not None:
            for chunk in as_chunks(hit):
                if (rest := entry.rest(chunk)) is not None:
                    yield rest
            entry.answered = True
            return
        if (seat := _seat(entry)) is None:
            break
        given: list[ChatGenerationChunk] = []
        chunks: AsyncGenerator[Any] = seat.astream(entry.relay.afollow, deadline)
        try:
            async for chunk in chunks:
                if (rest := entry.rest(chunk)) is not None:
                    given.append(rest)
                    yield rest
            entry.answered = bool(given)
            entry.relay.followed()
            return
        except (BrokenOff, LostFlightError) as exc:
            entry.broke_off(given, exc)
            if str(exc) == "late" or entry.consulted:
                break
        finally:
            await chunks.aclose()
            seat.leave()
    _lead(entry)


def _seat(entry: StreamEntry) -> Seat[ChatResult] | None:
    """Return a place among those who read the same; None: this caller makes the answer."""
    if entry.relay is None or entry.relay.leads:
        return None
    return followed.board(entry.relay.key, lambda _: FREE_TICKET)  # nothing is asked of a server


def _lead(entry: StreamEntry) -> None:
    """Begin to pass on what this caller makes, if others wait for it; else whatever it makes is its own."""
    if entry.relay is None:
        return
    if entry.relay.leads:
        entry.relay.begin()
    else:
        entry.relay = None
