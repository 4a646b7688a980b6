"""A place in no queue, where nothing is bounded."""

from __future__ import annotations

import contextlib
from typing import Any, Final


class _FreeTicket:
    """What `tickets.Ticket` is where nobody waits and nothing is given back."""

    def wait(self) -> None:
        pass

    async def await_(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def expire(self) -> None:
        pass

    def held(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


FREE_TICKET: Final[Any] = _FreeTicket()
