"""Redis replies as Python values, whichever way redis-py has changed them."""

from __future__ import annotations

from typing import Any

from redis.exceptions import ResponseError


def as_text(value: Any) -> str:
    """Return a reply as text."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def as_pairs(reply: Any) -> dict[bytes, bytes]:
    """Return HGETALL's reply as a dict: a raw reply alternates names and values."""
    if isinstance(reply, dict):
        return reply
    return dict(zip(reply[::2], reply[1::2], strict=True))


def popped_members(reply: Any) -> list[Any]:
    """Return ZPOPMIN's members: redis-py makes pairs of them, a raw reply alternates members and scores."""
    if reply and isinstance(reply[0], (tuple, list)):
        return [member for member, _ in reply]
    return list(reply[::2])


def raise_error(reply: Any) -> None:
    """Raise an error reply."""
    if isinstance(reply, Exception):
        raise reply


def error_kind(error: Exception) -> str:
    """Return an error reply's first word (NOPERM, OOM, READONLY ...): never its text, which may quote a command."""
    words = str(error).split(maxsplit=1)
    word = words[0].strip(",.:") if words else ""
    return word if word.isupper() else type(error).__name__


def is_missing_index(error: Exception) -> bool:
    """Say whether a search failed because its index is not there."""
    text = str(error).lower()
    return isinstance(error, ResponseError) and ("no such index" in text or "unknown index" in text)


def is_unknown_command(error: Exception) -> bool:
    """Say whether the server does not know a command."""
    return isinstance(error, ResponseError) and "unknown command" in str(error).lower()
