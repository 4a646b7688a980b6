"""Ollama's timestamps: nine digits after the point, any zone, and a year of 2318 for "never"."""

from __future__ import annotations

from datetime import UTC, datetime


def unix_s(timestamp: object) -> float | None:
    """Return a timestamp as unix time in seconds, without a zone taken for UTC; None if it is none."""
    try:
        told = datetime.fromisoformat(str(timestamp))
        return (told if told.tzinfo else told.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
