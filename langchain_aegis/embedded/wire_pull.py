"""Download models, as /api/pull tells of it: what has come stays, and a later pull goes on there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from langchain_aegis.embedded.wire_engine import Engine, EngineError, ModelCard
from langchain_aegis.embedded.wire_json import without_zeros
from langchain_aegis.embedded.wire_requests import full_name

_STEPS = 16  # lines that tell of one model's weights


class Pulls:
    """What can be downloaded, and how far that is.

    Args:
        engine: Has the models that need no download.
        remote: Models that a registry has, by their full name.
        arrived: Called with a card whose download is complete; afterwards the engine lists it.
        moved: Called with the bytes that came.
        bytes_per_s: Speed; 0: no delay.
    """

    def __init__(
        self,
        engine: Engine,
        remote: Mapping[str, ModelCard] | None = None,
        *,
        arrived: Callable[[ModelCard], None] = lambda card: None,
        moved: Callable[[int], None] = lambda count: None,
        bytes_per_s: float = 0.0,
    ) -> None:
        self._engine = engine
        self._remote = {full_name(name): card for name, card in (remote or {}).items()}
        self._arrived = arrived
        self._moved = moved
        self._byte_s = 1 / bytes_per_s if bytes_per_s else 0.0
        self._done: dict[str, int] = {}  # digest -> bytes

    async def pull(self, name: str) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the lines of one pull; closing it stops the download.

        Raises:
            EngineError: The registry does not have the model.
        """
        yield {"status": "pulling manifest"}
        here = {card.name.lower(): card for card in self._engine.cards}
        card = here.get(full_name(name)) or self._remote.get(full_name(name))
        if card is None:
            raise EngineError(500, "pull model manifest: file does not exist")
        total = card.file_bytes
        if card.name.lower() in here:
            self._done[card.digest] = total
        step = max(total // _STEPS, 1)
        yield self._state(card)
        while (done := self._done.get(card.digest, 0)) < total:
            more = min(step, total - done)
            await asyncio.sleep(more * self._byte_s)
            self._done[card.digest] = done + more
            self._moved(more)
            yield self._state(card)
        yield {"status": "verifying sha256 digest"}
        yield {"status": "writing manifest"}
        if card.name.lower() not in here:
            self._arrived(card)
        yield {"status": "success"}

    def _state(self, card: ModelCard) -> dict[str, Any]:
        done = self._done.get(card.digest, 0)
        fields = {"digest": f"sha256:{card.digest}", "total": card.file_bytes, "completed": done}
        return {"status": f"pulling {card.digest[:12]}", **without_zeros(fields)}
