"""Random bytes for names that a hit gives, without asking the system each time.

On some machines a call of the system's generator takes longer than Redis does; one fetches many names' worth.
"""

from __future__ import annotations

import os
from collections import deque
from typing import Final

from langchain_aegis.forks import reset_after_fork

SIZE: Final = 16  # bytes
_AT_ONCE: Final = 256


class Nonces:
    """Hands out what `os.urandom` returned, every byte once. May be used from any thread.

    The child of a fork begins anew: what its parent has in store is the parent's.
    """

    def __init__(self) -> None:
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Forget what is in store."""
        self._ready: deque[bytes] = deque()  # its methods are atomic

    def draw(self) -> bytes:
        """Return 16 random bytes that nobody else gets."""
        ready = self._ready
        try:
            return ready.pop()
        except IndexError:
            drawn = os.urandom(SIZE * _AT_ONCE)
            ready.extend(drawn[at : at + SIZE] for at in range(SIZE, len(drawn), SIZE))
            return drawn[:SIZE]


nonces: Final = Nonces()
