"""Whose call this is, as context that follows it through threads, tasks and graph nodes.

LangChain gives a cache two strings and nothing else. What else decides about an answer (tenant, user, task, the
question inside a long prompt, the documents that an answer rests on) is told with `aegis_scope`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar, Token
from types import MethodType, TracebackType
from typing import Any, Self, TypeVar, cast, get_args, overload

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.nesting import (
    NO_FRAME,
    CacheUse,
    Entered,
    Frame,
    Sources,
    frame_of_caller,
    in_force,
    is_doubtful,
    kept,
    note_tenant,
    scopes,
    take_out,
)
from langchain_aegis.nesting import Scope as Scope
from langchain_aegis.nesting import current as current
from langchain_aegis.nesting import tenants_named as tenants_named
from langchain_aegis.notices import warn_once

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_NONE: frozenset[str] = frozenset()
_config: ContextVar[Mapping[str, Any] | None] = ContextVar("aegis_config", default=None)


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
        made = self._scope._made(NO_FRAME)
        scope = kept(made, doubtful=made.doubtful)
        if scope.scope.tenant is not None:
            note_tenant()
        return _wrap_async(stream, scope) if isinstance(stream, AsyncIterator) else _wrap_sync(stream, scope)


class aegis_scope:  # used like a function: `with aegis_scope(tenant="acme"): ...`
    """Say whose calls the ones inside are; use with `with` or `async with`.

    Scopes nest: an inner one changes only what it names. Leaving one never raises, even in another task than the
    one that entered it (a generator may be closed anywhere); what is around it is then in force again. A call that
    may be another's, because generators that hold scopes of several tenants or users are read in turn, bypasses the
    cache: `wrap` such generators.

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

    __slots__ = ("_changes", "_entered", "_sources")

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
        changes: dict[str, Any] = {}
        for name, value in (("tenant", tenant), ("user", user), ("task", task), ("question", question)):
            if value is not None:
                changes[name] = _check_text(name, value)
        if ttl_s is not None:
            if isinstance(ttl_s, bool) or not isinstance(ttl_s, (int, float)) or not 0 < ttl_s < float("inf"):
                raise AegisConfigError(f"ttl_s must be a number of seconds above 0, got {ttl_s!r}")
            changes["ttl_s"] = ttl_s
        if cache is not None:
            if cache not in get_args(CacheUse):
                raise AegisConfigError(f'cache must be "use", "refresh" or "off", got {cache!r}')
            changes["cache"] = cache
        self._changes = changes
        self._sources = _check_ids(sources) if sources else _NONE
        self._entered: list[tuple[Entered, Token[Entered | None]]] = []

    def _made(self, frame: Frame) -> Entered:
        outer = in_force()
        if outer is None:
            return Entered(self._changes, Sources(self._sources), None, frame)
        missing = _NONE
        if outer.lost:
            missing, outer = outer.own_missing, outer.outer
        around = None if outer is None else outer.scope.sources
        made = Entered(self._changes, Sources(self._sources, around), outer, frame, missing)
        made.doubtful = is_doubtful(outer) and not made.names_all()
        return made

    def __enter__(self) -> Self:
        made = self._made(frame_of_caller(globals()))
        if "tenant" in self._changes:
            note_tenant()
        self._entered.append((made, scopes.set(made)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        top = scopes.get()
        left, token = self._entered_below(top)
        try:
            scopes.reset(token)
        except ValueError:  # another context than it was entered in: there it stays, and must not count
            left.lost = True
            if top is left:
                scopes.set(left.outer)
            return
        while top is not left and top is not None and top.lost:
            top = top.outer
        if top is not left:  # generators are not left in turn
            take_out(left, top)
            scopes.set(top)
        elif (around := scopes.get()) is not left.outer:  # what was around it has been left meanwhile
            if around is not None and around.lost:
                around.outer = left.outer
                around.own_missing |= left.own_missing
            else:
                scopes.set(left.outer)

    def _entered_below(self, top: Entered | None) -> tuple[Entered, Token[Entered | None]]:
        """Take back the innermost of what this one entered here; it may be shared by several tasks."""
        while top is not None:
            for one in reversed(self._entered):
                if one[0] is top:
                    self._entered.remove(one)
                    return one
            top = top.outer
        return self._entered.pop()

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
    sources = current().sources
    if sources is None:
        warn_once(
            "sources_outside_scope", "aegis_sources() outside an aegis_scope has no effect; open one around the graph"
        )
    else:
        sources.add(*checked)


class seen_config:
    """Show the cache the config of a direct call such as `model.invoke(x, config)`, which LangChain hides from it.

    What is in force in the caller's own task stays in force inside, where LangChain goes on in tasks of its own.
    """

    __slots__ = ("_mapping", "_scope_token", "_token")

    def __init__(self, config: Mapping[str, Any] | None) -> None:
        self._mapping = (config or {}).get("configurable") or None
        self._token: Token[Mapping[str, Any] | None] | None = None
        self._scope_token: Token[Entered | None] | None = None

    def __enter__(self) -> Self:
        if self._mapping is not None:
            self._token = _config.set(self._mapping)
        top = in_force()
        if top is not None and top.mixed:
            self._scope_token = scopes.set(kept(top, doubtful=is_doubtful(top)))
        return self

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            _leave(_config, self._token)
        if self._scope_token is not None:
            _leave(scopes, self._scope_token)


@overload
def bound_here(stream: AsyncIterator[T]) -> AsyncIterator[T]: ...
@overload
def bound_here(stream: Iterator[T]) -> Iterator[T]: ...
def bound_here(stream: AsyncIterator[T] | Iterator[T]) -> AsyncIterator[T] | Iterator[T]:
    """Return `stream` with every step run in the scope in force here, if that names a tenant or a user.

    For what is made inside a `with` block and read after it. Elsewhere the stream is whose first reader's it is.
    """
    top = in_force()
    if top is None or (top.scope.tenant is None and top.scope.user is None and not top.missing):
        return stream
    alone = kept(top, doubtful=is_doubtful(top))
    return _wrap_async(stream, alone) if isinstance(stream, AsyncIterator) else _wrap_sync(stream, alone)


class ReadAnywhere:
    """A generator method whose generator stays in the scope in which it was called.

    LangChain asks whether a function is a generator function, and treats it otherwise: this one still looks like it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        for name in ("__code__", "__defaults__", "__kwdefaults__"):  # what `inspect` takes for a function
            setattr(self, name, getattr(function, name))

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        return bound_here(self._function(*args, **kwargs))


def read_anywhere(function: F) -> F:
    """Let what a generator method of a model returns be read after the `aegis_scope` in which it was called."""
    return cast("F", ReadAnywhere(function))


def who(tenant_key: str | None, user_key: str | None) -> tuple[str | None, str | None]:
    """Return tenant and user of the call that runs here.

    The first that names one wins: `aegis_scope`, the config of the call itself, LangGraph's runtime context, the
    `configurable` of the run around it. None of the others may name another one than `aegis_scope` does.

    Raises:
        AegisConfigError: A place names one that is empty, no id, or not the scope's; the scope may be somebody
            else's; or the one that named it was lost. The cache must then not be used.
    """
    top = in_force()
    places = _places()
    if top is None:
        return _told("tenant", None, tenant_key, places), _told("user", None, user_key, places)
    if (top.mixed or top.doubtful) and is_doubtful(top):
        problem = (
            "generators that hold an aegis_scope of several tenants or users are read in turn, and whose call this is "
            "cannot be told; bind each with aegis_scope(...).wrap(generator)"
        )
        warn_once("mixed_scopes", problem)
        raise AegisConfigError(problem)
    tenant, user = top.scope.tenant, top.scope.user
    if places:
        tenant, user = _told("tenant", tenant, tenant_key, places), _told("user", user, user_key, places)
    if top.missing and ((tenant is None and "tenant" in top.missing) or (user is None and "user" in top.missing)):
        raise AegisConfigError(
            "the aegis_scope that named one here was left in another task; bind generators with aegis_scope.wrap"
        )
    return tenant, user


def _told(what: str, scoped: str | None, key: str | None, places: list[Any]) -> str | None:
    if not key:
        return scoped
    for place in places:
        named = _identity(place, key)
        if named is None:
            continue
        if scoped is None:
            return named
        if named != scoped:
            raise AegisConfigError(
                f"aegis_scope names one {what}, and {key!r} in the config or context of the run another; name the same "
                "one, or enter the scope where the run starts"
            )
    return scoped


def _places() -> list[Any]:
    """Return what may name tenant and user of the call that runs here, the nearest first."""
    seen = _config.get()
    places: list[Any] = [] if seen is None else [seen]
    core = sys.modules.get("langchain_core.runnables.config")
    config = None if core is None else core.var_child_runnable_config.get()
    if not config:
        return places
    if (runtime := sys.modules.get("langgraph.runtime")) is not None:
        try:
            context = runtime.get_runtime().context
        except (RuntimeError, KeyError, AttributeError):
            context = None  # not inside a graph
        if context is not None:
            places.append(context)
    if configurable := config.get("configurable"):
        places.append(configurable)
    return places


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


class _Steps:
    """Around each step of a stream: its scopes are in force inside, those it entered too, and never outside."""

    __slots__ = ("_scope", "_token")

    def __init__(self, scope: Entered) -> None:
        self._scope: Entered | None = scope

    def __enter__(self) -> None:
        self._token = scopes.set(self._scope)

    def __exit__(self, *_: object) -> None:
        self._scope = scopes.get()
        _leave(scopes, self._token)


def _wrap_sync(stream: Iterator[T], scope: Entered) -> Iterator[T]:
    step = _Steps(scope)
    try:
        while True:
            with step:
                try:
                    item = next(stream)
                except StopIteration:
                    return
            yield item
    finally:
        if (close := getattr(stream, "close", None)) is not None:
            with step:
                close()


async def _wrap_async(stream: AsyncIterator[T], scope: Entered) -> AsyncIterator[T]:
    step = _Steps(scope)
    try:
        while True:
            with step:
                try:
                    item = await anext(stream)
                except StopAsyncIteration:
                    return
            yield item
    finally:
        if (aclose := getattr(stream, "aclose", None)) is not None:
            with step:
                await aclose()
