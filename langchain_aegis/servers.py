"""Find the server behind a model, so that everything that uses it shares its bounds."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from langchain_aegis.admission import Admission
from langchain_aegis.bounds import MAX_CONCURRENCY, MAX_WAITING, check_bounds
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.live import live
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
    own = Admission(
        MAX_CONCURRENCY if max_concurrency is None else max_concurrency,
        MAX_WAITING if max_waiting is None else max_waiting,
    )
    with _registry.lock:
        _registry.alone.add(own)
    return own


def admission_for(server: str, *, max_concurrency: int | None = None, max_waiting: int | None = None) -> Admission:
    """Return the process's one `Admission` for a server, made on first use.

    Args:
        server: Its address; equal texts are one server.
        max_concurrency: Slots that this user of the server asks for; the smallest that anybody asked for wins, and
            4 are used when nobody asks.
        max_waiting: Likewise, with 100.

    Raises:
        AegisConfigError: A bound is out of range.
    """
    check_bounds(max_concurrency=max_concurrency, max_waiting=max_waiting)
    with _registry.lock:
        shared = _registry.servers.get(server)
        if shared is None or shared.admission.closed:
            shared = _registry.servers[server] = _Shared(Admission())
        shared.max_concurrency = _smaller(shared.max_concurrency, max_concurrency)
        shared.max_waiting = _smaller(shared.max_waiting, max_waiting)
        shared.admission.limit(max_concurrency=shared.max_concurrency, max_waiting=shared.max_waiting)
        return shared.admission


def admissions() -> dict[str, Admission]:
    """Return the process's admissions by the address of their server; those of models that name none by a number."""
    with _registry.lock:
        named = {server: shared.admission for server, shared in _registry.servers.items()}
        alone = {f"(no address) {at}": admission for at, admission in enumerate(_registry.alone, 1)}
    return named | alone


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


@dataclass(slots=True)
class _Shared:
    admission: Admission
    max_concurrency: int | None = None
    max_waiting: int | None = None


class _Registry:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.servers: dict[str, _Shared] = {}
        self.alone: weakref.WeakSet[Admission] = weakref.WeakSet()
        reset_after_fork(self)

    def reset(self) -> None:
        self.lock = threading.Lock()


_registry = _Registry()
live.admissions = admissions


def _smaller(old: int | None, new: int | None) -> int | None:
    return old if new is None else new if old is None else min(old, new)
