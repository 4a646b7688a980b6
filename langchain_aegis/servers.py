"""Find the server behind a model, so that everything that uses it shares its bounds."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from langchain_aegis.admission import Admission
from langchain_aegis.bounds import MAX_CONCURRENCY, MAX_WAITING, check_bounds
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.live import live
from langchain_aegis.pools import Pool
from langchain_aegis.settings import normalise_base_url, redact_url

_BOUNDS = ("max_concurrency", "max_waiting", "window_ms", "max_batch", "deadline_s")
_OPENAI = "openai_api_base"
_ADDRESSES = ("base_url", _OPENAI)


def server_of(inner: object) -> str | None:
    """Return the normalised address of the server that `inner` calls, or None if it does not say.

    Of a model that several servers have, it is the text of all addresses.
    """
    if addresses := addresses_of(inner):
        return ", ".join(sorted(addresses))
    for name in _ADDRESSES:
        address = getattr(inner, name, None)
        if isinstance(address, str) and address.strip():
            # A server's bounds are the same whether it is asked on its own wire or, below /v1, on OpenAI's.
            return _normalised(address.strip().rstrip("/").removesuffix("/v1") if name == _OPENAI else address)
    if hasattr(inner, _OPENAI) and (address := os.environ.get("OPENAI_BASE_URL", "").strip()):  # read by its client
        return _normalised(address.rstrip("/").removesuffix("/v1"))
    if "ollama" in str(getattr(inner, "_llm_type", "")).lower() or type(inner).__module__.startswith(
        "langchain_ollama"
    ):
        return _normalised(os.environ.get("OLLAMA_HOST", "").strip() or "http://127.0.0.1:11434")
    return None


def addresses_of(inner: object) -> tuple[str, ...]:
    """Return the addresses of a model that several servers have; empty for any other."""
    told = getattr(inner, "base_url", None)
    return tuple(told) if isinstance(told, list) else ()


def admission_of(inner: object, *, max_concurrency: int | None = None, max_waiting: int | None = None) -> Admission:
    """Return the bounds of `inner`'s server, shared in this process; of its own if it names no server."""
    if addresses := addresses_of(inner):
        return pool_for(addresses, max_concurrency=max_concurrency, max_waiting=max_waiting)
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
            shared = _registry.servers[server] = _Shared(_new(server))
        shared.max_concurrency = _smaller(shared.max_concurrency, max_concurrency)
        shared.max_waiting = _smaller(shared.max_waiting, max_waiting)
        shared.admission.limit(max_concurrency=shared.max_concurrency, max_waiting=shared.max_waiting)
        return shared.admission


def pool_for(addresses: Iterable[str], *, max_concurrency: int | None = None, max_waiting: int | None = None) -> Pool:
    """Return the process's one `Pool` for several servers, made on first use.

    Args:
        addresses: Theirs, in any order.
        max_concurrency: Slots of each, as in `admission_for`.
        max_waiting: Calls that wait for any of them, as in `admission_for`.

    Raises:
        AegisConfigError: A bound is out of range.
    """
    check_bounds(max_waiting=max_waiting)
    members = {each: admission_for(each, max_concurrency=max_concurrency) for each in sorted(addresses)}
    name = ", ".join(members)
    with _registry.lock:
        shared = _registry.servers.get(name)
        if shared is None or shared.admission.closed:
            shared = _registry.servers[name] = _Shared(Pool(members))
        shared.max_waiting = _smaller(shared.max_waiting, max_waiting)
        pool = cast("Pool", shared.admission)
        pool.limit(max_waiting=shared.max_waiting)
        pool.fit(members)
        return pool


def admissions() -> dict[str, Admission]:
    """Return the process's admissions by the address of their server; those of models that name none by a number.

    The names are to be shown: a login in an address is left out.
    """
    with _registry.lock:
        named: dict[str, Admission] = {}
        for server, shared in _registry.servers.items():
            shown = name = ", ".join(redact_url(each) for each in server.split(", "))
            for at in itertools.count(2):  # the same server with another login
                if name not in named:
                    break
                name = f"{shown} ({at})"
            named[name] = shared.admission
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


def _new(server: str) -> Admission:
    """Return an admission for a server, whose slots this process may share with others."""
    if not os.environ.get("AEGIS_SHARED_SLOTS", "").strip():
        return Admission()
    from langchain_aegis.slot_lender import admission_at  # Redis is needed for nothing else here

    return admission_at(server)


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
