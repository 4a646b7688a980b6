"""Remember which prompts are which keys: to take a prompt apart takes as long as asking Redis for its answer."""

from __future__ import annotations

from typing import Final

_PLACES: Final = 1 << 14


class KnownPrompts:
    """The exact keys of the prompts that were asked last, by a digest of their bytes; 4 MB at most, no text.

    Whoever asks an exact repeat has often asked it here before. A place holds the last prompt that came to it, so no
    lock is needed, and one that is forgotten is only taken apart again.
    """

    __slots__ = ("_places",)

    def __init__(self) -> None:
        self._places: list[tuple[bytes, str] | None] = [None] * _PLACES

    def get(self, raw: bytes) -> str | None:
        """Return the exact key of the prompt with this digest, at least 16 bytes; None if that is not known."""
        known = self._places[int.from_bytes(raw[:2], "big") % _PLACES]
        return known[1] if known is not None and known[0] == raw else None

    def put(self, raw: bytes, exact: str) -> None:
        """Note a key."""
        self._places[int.from_bytes(raw[:2], "big") % _PLACES] = raw, exact
