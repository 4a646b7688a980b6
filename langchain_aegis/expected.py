"""Guess whether a lookup will find an exact repeat, so that what a miss needs can be prepared while Redis answers."""

from __future__ import annotations

from array import array
from typing import Final

_PLACES: Final = 1 << 16
_STEP: Final = 1 / 8
_OFTEN: Final = 0.5


class Expected:
    """The keys whose answers this process has stored or served lately, in a quarter of a megabyte.

    A wrong guess costs some microseconds and nothing else. So no lock is taken, a place holds the last key that came to
    it, and it holds 32 bits of the key.
    """

    def __init__(self) -> None:
        self._places = array("I", bytes(4 * _PLACES))
        self._surprises = 0.0  # share of exact hits among the last keys that were not known

    def miss(self, exact: str) -> bool:
        """Return whether a key, at least 12 hex characters, is expected to have no answer yet."""
        return self._surprises < _OFTEN and not self._knows(exact)

    def stored(self, exact: str) -> None:
        """Say that an answer was stored under a key."""
        self._places[int(exact[:4], 16)] = int(exact[4:12], 16)

    def hit(self, exact: str) -> None:
        """Say that an answer was found under a key."""
        if not self._knows(exact):
            self._surprises += _STEP * (1 - self._surprises)
            self.stored(exact)

    def missed(self) -> None:
        """Say that none was found, under whatever key."""
        self._surprises -= _STEP * self._surprises

    def _knows(self, exact: str) -> bool:
        return self._places[int(exact[:4], 16)] == int(exact[4:12], 16)
