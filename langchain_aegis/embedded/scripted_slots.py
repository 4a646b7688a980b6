"""First-come-first-served queues for the slots of a server's models."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable

from langchain_aegis.embedded.wire_engine import BUSY, EngineError, ModelCard


class Slots:
    """Lets at most `count` requests run; the others wait in the order in which they came.

    Used inside one event loop.

    Args:
        count: At least 1.
        max_waiting: More requests than that are refused with status 503. None: any number may wait.
        changed: Called after every change of the two numbers below.
    """

    def __init__(self, count: int, max_waiting: int | None = None, changed: Callable[[], None] = lambda: None) -> None:
        if count < 1:
            raise ValueError(f"slots must be at least 1, got {count}")
        self._count = count
        self._max_waiting = max_waiting
        self._changed = changed
        self._queue: deque[asyncio.Future[None]] = deque()
        self._held = False
        self.running = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    def hold(self) -> None:
        """Give out no slot until `release` is called."""
        self._held = True

    def release(self) -> None:
        """End `hold`."""
        self._held = False
        self._admit()

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Wait for a slot and keep it while the block runs.

        Raises:
            EngineError: 503: too many wait already.
        """
        if self._held or self._queue or self.running >= self._count:
            if self._max_waiting is not None and self.waiting >= self._max_waiting:
                raise EngineError(503, BUSY)
            await self._turn()
        else:
            self.running += 1
        self._changed()
        try:
            yield
        finally:
            self.running -= 1
            self._admit()

    async def _turn(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        self._changed()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the slot was given while the request was being cancelled
                self.running -= 1
            elif turn in self._queue:
                self._queue.remove(turn)
            self._admit()
            raise

    def _admit(self) -> None:
        while self._queue and not self._held and self.running < self._count:
            turn = self._queue.popleft()
            if not turn.cancelled():
                self.running += 1
                turn.set_result(None)
        self._changed()


class AllSlots:
    """The slots of every model of a server: each has its own, an embedding model one.

    Args:
        count: Slots of a chat model (`OLLAMA_NUM_PARALLEL`).
        max_waiting: See `Slots`; of each model.
        changed: See `Slots`.
    """

    def __init__(self, count: int, max_waiting: int | None, changed: Callable[[], None]) -> None:
        if count < 1:
            raise ValueError(f"slots must be at least 1, got {count}")
        self.count = count
        self._max_waiting = max_waiting
        self._changed = changed
        self._models: dict[str, Slots] = {}
        self._held = False

    def of(self, card: ModelCard) -> Slots:
        """Return the slots of a model."""
        slots = self._models.get(card.name)
        if slots is None:
            count = self.count if "completion" in card.capabilities else 1
            slots = self._models[card.name] = Slots(count, self._max_waiting, self._changed)
            if self._held:
                slots.hold()
        return slots

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return sum(slots.running for slots in self._models.values())

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return sum(slots.waiting for slots in self._models.values())

    def hold(self) -> None:
        """Give out no slot until `release` is called."""
        self._held = True
        for slots in self._models.values():
            slots.hold()

    def release(self) -> None:
        """End `hold`."""
        self._held = False
        for slots in self._models.values():
            slots.release()
