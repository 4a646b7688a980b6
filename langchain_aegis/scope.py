"""Whose call this is, as context that follows it through threads, tasks and graph nodes.

LangChain gives a cache two strings and nothing else. What else decides about an answer (tenant, user, task, the
question inside a long prompt, the documents that an answer rests on) is told with `aegis_scope`.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, get_args, overload

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.notices import warn_once

T = TypeVar("T")
CacheUse = Literal["use", "refresh", "off"]


class Sources:
    """Ids of the documents that an answer rests on; adding to an inner scope's set adds to the outer ones' too."""

    __slots__ = ("_ids", "_outer")

    def __init__(self, ids: Iterable[str] = (), outer: Sources | None = None) -> None:
        self._ids = set(ids)  # set.add and set.update are atomic under the GIL
        self._outer = outer

    def add(self, *ids: str) -> None:
        """Add `ids` here and in every outer scope."""
        self._ids.update(ids)
        if self._outer is not None:
            self._outer.add(*ids)

    def ids(self) -> frozenset[str]:
        """Return what has been added so far."""
        return frozenset(self._ids)


@dataclass(frozen=True, slots=True)
class Scope:
    """What `aegis_scope` said about the calls inside it; None where it said nothing."""

    tenant: str | None = None
    user: str | None = None
    task: str | None = None
    question: str | None = None
    ttl_s: float | None = None
    cache: CacheUse = "use"
    sources: Sources | None = field(default=None, compare=False)


_NO_SCOPE = Scope()
_scope: ContextVar[Scope] = ContextVar("aegis_scope", default=_NO_SCOPE)
_config: ContextVar[Mapping[str, Any] | None] = ContextVar("aegis_config", default=None)


def current() -> Scope:
    """Return the scope that is in force here."""
    return _scope.get()


class _Wrap:
    """`aegis_scope.wrap(stream)` binds the scope in force here, `aegis_scope(...).wrap(stream)` one of its own."""

    def __get__(self, scope: aegis_scope | None, owner: type[aegis_scope]) -> _Bind:
        return _Bind(scope or owner())


class _Bind:
    def __init__(self, scope: aegis_scope) -> None:
        self._scope = scope

    @overload
    def __call__(self, stream: AsyncIterator[T]) -> AsyncIterator[T]: ...
    @overload
    def __call__(self, stream: Iterator[T]) -> Iterator[T]: ...
    def __call__(self, stream: Iterator[T] | AsyncIterator[T]) -> Iterator[T] | AsyncIterator[T]:
        """Return `stream` with every step run inside the scope, wherever and whenever it is consumed.

        For a generator that is handed to a web framework and read after the `with` block has ended.
        """
        scope = self._scope.combined()
        return _wrap_async(stream, scope) if isinstance(stream, AsyncIterator) else _wrap_sync(stream, scope)


class aegis_scope:  # used like a function: `with aegis_scope(tenant="acme"): ...`
    """Say whose calls the ones inside are; use with `with` or `async with`.

    Scopes nest: an inner one changes only what it names. Leaving one never raises, even in another task than the
    one that entered it (a generator may be closed anywhere).

    Args:
        tenant: Whose data this is. Answers never cross tenants.
        user: Which user of the tenant; answers are kept apart per user unless the cache shares within a tenant.
        task: Kind of work ("chat", "classify"); kept apart, and the cache may give it a TTL of its own.
        question: The question inside the prompt, verbatim, when no label marks it.
        sources: Ids of the documents that the answers rest on, for `cache.invalidate(sources=...)`.
        ttl_s: How long answers of these calls are kept, in seconds.
        cache: "use" it, "refresh" (ask the model and replace the entry), or "off".

    Raises:
        AegisConfigError: A value is empty, blank or of the wrong type.
    """

    __slots__ = ("_changes", "_sources", "_tokens")

    def __init__(
        self,
        *,
        tenant: str | None = None,
        user: str | None = None,
        task: str | None = None,
        question: str | None = None,
        sources: Iterable[str] | None = None,
        ttl_s: float | None = None,
        cache: CacheUse | None = None,
    ) -> None:
        names = {"tenant": tenant, "user": user, "task": task, "question": question}
        for name, value in names.items():
            if value is not None:
                _check_text(name, value)
        changes: dict[str, Any] = {name: value for name, value in names.items() if value is not None}
        if ttl_s is not None:
            if isinstance(ttl_s, bool) or not isinstance(ttl_s, (int, float)) or not 0 < ttl_s < float("inf"):
                raise AegisConfigError(f"ttl_s must be a number of seconds above 0, got {ttl_s!r}")
            changes["ttl_s"] = ttl_s
        if cache is not None:
            if cache not in get_args(CacheUse):
                raise AegisConfigError(f'cache must be "use", "refresh" or "off", got {cache!r}')
            changes["cache"] = cache
        self._changes = changes
        self._sources = _check_ids(sources or ())
        self._tokens: list[Token[Scope]] = []

    def combined(self) -> Scope:
        """Return the scope in force here with this one's changes."""
        outer = _scope.get()
        return replace(outer, **self._changes, sources=Sources(self._sources, outer.sources))

    def __enter__(self) -> Self:
        self._tokens.append(_scope.set(self.combined()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _leave(_scope, self._tokens.pop())

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    wrap = _Wrap()


def aegis_sources(*ids: str) -> None:
    """Say that the answer being made rests on these documents; adds to the enclosing `aegis_scope`.

    Works from any node or thread of a graph that was started inside the scope.

    Raises:
        AegisConfigError: An id is empty or not a string.
    """
    checked = _check_ids(ids)
    sources = _scope.get().sources
    if sources is None:
        warn_once(
            "sources_outside_scope", "aegis_sources() outside an aegis_scope has no effect; open one around the graph"
        )
    else:
        sources.add(*checked)


class seen_config:
    """Show the cache the config of a direct call such as `model.invoke(x, config)`, which LangChain hides from it."""

    __slots__ = ("_mapping", "_token")

    def __init__(self, config: Mapping[str, Any] | None) -> None:
        self._mapping = (config or {}).get("configurable") or None
        self._token: Token[Mapping[str, Any] | None] | None = None

    def __enter__(self) -> Self:
        if self._mapping is not None:
            self._token = _config.set(self._mapping)
        return self

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            _leave(_config, self._token)


def who(tenant_key: str | None, user_key: str | None) -> tuple[str | None, str | None]:
    """Return tenant and user of the call that runs here.

    The first that names one wins: `aegis_scope`, the config of the call itself, LangGraph's runtime context, the
    `configurable` of the run around it.

    Raises:
        AegisConfigError: A place names one that is empty or no id; the cache must then not be used.
    """
    scope = _scope.get()
    tenant, user = scope.tenant, scope.user
    if (tenant is not None or not tenant_key) and (user is not None or not user_key):
        return tenant, user
    for place in _places():
        if tenant is None and tenant_key:
            tenant = _identity(place, tenant_key)
        if user is None and user_key:
            user = _identity(place, user_key)
    return tenant, user


def _places() -> Iterator[Any]:
    import sys

    if (seen := _config.get()) is not None:
        yield seen
    if (runtime := sys.modules.get("langgraph.runtime")) is not None:
        try:
            context = runtime.get_runtime().context
        except (RuntimeError, KeyError, AttributeError):
            context = None  # not inside a graph
        if context is not None:
            yield context
    from langchain_core.runnables.config import var_child_runnable_config

    if (config := var_child_runnable_config.get()) and (configurable := config.get("configurable")):
        yield configurable


def _identity(place: Any, name: str) -> str | None:
    value = place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
    if value is None:
        return None
    if isinstance(value, (int, uuid.UUID)) and not isinstance(value, bool):
        return str(value)
    return _check_text(name, value)


def _check_text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise AegisConfigError(f"{name} must be a text that is not blank, got {value!r}")
    return value


def _check_ids(ids: Iterable[str]) -> frozenset[str]:
    if isinstance(ids, str):
        raise AegisConfigError("sources must be a collection of ids, got one text; write sources=[id]")
    return frozenset(_check_text("a source", i) for i in ids)


def _leave(variable: ContextVar[Any], token: Token[Any]) -> None:
    # ValueError: left in another context than it was entered in; that one has its own value, nothing to undo.
    with contextlib.suppress(ValueError):
        variable.reset(token)


def _wrap_sync(stream: Iterator[T], scope: Scope) -> Iterator[T]:
    try:
        while True:
            token = _scope.set(scope)
            try:
                item = next(stream)
            except StopIteration:
                return
            finally:
                _leave(_scope, token)
            yield item
    finally:
        if (close := getattr(stream, "close", None)) is not None:
            close()


async def _wrap_async(stream: AsyncIterator[T], scope: Scope) -> AsyncIterator[T]:
    try:
        while True:
            token = _scope.set(scope)
            try:
                item = await anext(stream)
            except StopAsyncIteration:
                return
            finally:
                _leave(_scope, token)
            yield item
    finally:
        if (aclose := getattr(stream, "aclose", None)) is not None:
            await aclose()
