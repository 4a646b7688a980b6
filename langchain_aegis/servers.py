"""Find the server behind a model, so that everything that uses it shares its bounds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from langchain_aegis.admission import MAX_CONCURRENCY, MAX_WAITING, Admission, admission_for, check_bounds
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.settings import normalise_base_url

_BOUNDS = ("max_concurrency", "max_waiting", "window_ms", "max_batch", "deadline_s")
_ADDRESSES = ("base_url", "openai_api_base")


def server_of(inner: object) -> str | None:
    """Return the normalised address of the server that `inner` calls, or None if it does not say."""
    for name in _ADDRESSES:
        address = getattr(inner, name, None)
        if isinstance(address, str) and address.strip():
            return _normalised(address)
    if "ollama" in str(getattr(inner, "_llm_type", "")).lower() or type(inner).__module__.startswith(
        "langchain_ollama"
    ):
        return _normalised(os.environ.get("OLLAMA_HOST", "").strip() or "http://127.0.0.1:11434")
    return None


def admission_of(inner: object, *, max_concurrency: int | None = None, max_waiting: int | None = None) -> Admission:
    """Return the bounds of `inner`'s server, shared in this process; of its own if it names no server."""
    if (server := server_of(inner)) is not None:
        return admission_for(server, max_concurrency=max_concurrency, max_waiting=max_waiting)
    return Admission(
        MAX_CONCURRENCY if max_concurrency is None else max_concurrency,
        MAX_WAITING if max_waiting is None else max_waiting,
    )


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check the bounds among a wrapper's arguments.

    Raises:
        AegisConfigError: One is out of range.
    """
    given = {name: arguments[name] for name in _BOUNDS if name in arguments}
    for name, value in given.items():
        if value is None and name != "deadline_s":
            raise AegisConfigError(f"{name} must be a number, got None")
    check_bounds(**given)


def _normalised(address: str) -> str | None:
    try:
        return normalise_base_url(address)
    except AegisConfigError:
        return None  # whatever it is, its own client will say so
