"""Which version of a model its server has: what another one answered under the same name is outdated.

A name such as `llama3.1:8b` stands for whatever was pulled last. The server tells the digests of what it has
(`/api/tags`), and is asked before an answer is served if it was not asked for `FRESH_S`. So an answer of a model that
was pulled anew elsewhere is served for `FRESH_S` at most, and not at all once this process has pulled it. While a
server does not say, what it said last counts; of one that never said anything nothing is known, and its answers are
served.

An answer is kept with the version that was known when it was looked up: at worst a newer one has made it, and then it
is served to nobody. Where none was known, the server is asked afterwards, in the background, and must not have changed
the model since the making of the answer began. If it does not say now, the answer is served until it says something.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

from langchain_core.outputs import ChatGeneration, Generation

from langchain_aegis.attempts import Timeouts
from langchain_aegis.flows import Flow, Settle
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.identity import normalise_model
from langchain_aegis.notices import logger
from langchain_aegis.timestamps import unix_s

FRESH_S: Final = 5.0
_AFTER_FAILURE_S: Final = 15.0
_BUDGET_S: Final = 0.25  # for one question; it takes a millisecond
clock: Final = time.monotonic
_UNKNOWN: Final = "?"  # in place of a digest; it differs from all
_TIMEOUTS: Final = Timeouts(connect_s=_BUDGET_S, read_s=_BUDGET_S, deadline_s=_BUDGET_S)


class Server(Protocol):
    """What is asked, as a rule an `OllamaClient`."""

    models: Models

    def tags(self, *, timeouts: Timeouts | None = None) -> list[dict[str, Any]]:
        """Return the models that the server has."""

    async def atags(self, *, timeouts: Timeouts | None = None) -> list[dict[str, Any]]:
        """Return the models that the server has."""


Servers: TypeAlias = Callable[[], Sequence[Server]]


@dataclass(frozen=True, slots=True)
class AskServer:
    """Step of a flow: ask a server which models it has."""

    server: Server

    def perform(self) -> list[dict[str, Any]]:
        """Ask, blocking. Raises AegisError."""
        return self.server.tags(timeouts=_TIMEOUTS)

    async def aperform(self) -> list[dict[str, Any]]:
        """Ask in the running event loop. Raises AegisError."""
        return await self.server.atags(timeouts=_TIMEOUTS)


class Models:
    """What a server said about its models. May be used from any thread."""

    def __init__(self) -> None:
        self._told: Mapping[str, tuple[str, float]] = {}  # by name: digest, and since when, in unix seconds
        self.known = False  # the server has said it once
        self._until_s = self._forgotten_s = -math.inf
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Forget who is asking: after a fork it is a thread of the parent."""
        self._lock = threading.Lock()
        self._asking: Future[None] | None = None

    @property
    def fresh(self) -> bool:
        """Whether the server need not be asked now."""
        return clock() < self._until_s

    def digest(self, model: str) -> str:
        """Return 12 digits of a model's digest as it is known, "" if it is not."""
        return self._told.get(normalise_model(model), ("", 0.0))[0]

    def changed_s(self, model: str) -> float:
        """Return when a model became what it is, in unix seconds by its server's clock; -infinity if nobody says."""
        return self._told.get(normalise_model(model), ("", -math.inf))[1]

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Have the server asked again after this, before anything more is taken from here."""
        try:
            yield
        finally:
            self._until_s, self._forgotten_s = -math.inf, clock()

    def learn(self, server: Server) -> Flow[None]:
        """Ask the server, unless somebody does so already: then wait for what he hears."""
        with self._lock:
            if (asking := self._asking) is None:
                mine = self._asking = Future()
                mine.set_running_or_notify_cancel()  # who gives up waiting ends it for nobody else
        if asking is not None:
            yield Settle(asking, _BUDGET_S)
            return
        fresh_s = _AFTER_FAILURE_S
        asked_s = clock()
        try:
            self._told = dict(filter(None, map(_read, (yield AskServer(server)))))
            self.known, fresh_s = True, FRESH_S
        except Exception as exc:  # whatever it is: the model's own call will say it
            logger.debug("the digests of a server's models cannot be learnt", exc_info=exc)
        finally:  # also if the caller was cancelled
            with self._lock:
                self._asking = None
            self._until_s = asked_s + fresh_s if asked_s > self._forgotten_s else -math.inf
            mine.set_result(None)


def began_s(generations: Sequence[Generation]) -> float:
    """Return when the making of an answer began, in unix seconds by its server's clock; 0.0 if it does not say."""
    for generation in generations:
        if isinstance(generation, ChatGeneration):
            told = generation.message.response_metadata
            ended_s, took_ns = unix_s(told.get("created_at")), told.get("total_duration")
            if ended_s is not None and type(took_ns) is int and took_ns > 0:
                return ended_s - took_ns / 1e9
    return 0.0


def _read(card: Mapping[str, Any]) -> tuple[str, tuple[str, float]] | None:
    name, digest, since_s = card.get("model") or card.get("name"), card.get("digest"), unix_s(card.get("modified_at"))
    if not isinstance(name, str) or not isinstance(digest, str):
        return None
    return name, (digest.removeprefix("sha256:")[:12], -math.inf if since_s is None else since_s)


# -- which model a lookup asks for: the text that names it to a cache, and what that stands for ----------------------


class Asked:
    """The models that one lookup asks for, as a rule one.

    Args:
        parts: Names of models, and the servers that have them.

    Attributes:
        digest: What stands for their versions, as far as that was known when it was looked at last; "" if it was not.
    """

    __slots__ = ("_parts", "digest")

    def __init__(self, parts: Sequence[tuple[str, Server]] = ()) -> None:
        self._parts = parts
        self.digest = self._known() if parts else ""

    def look(self) -> bool:
        """Take what is known now; return whether that is fresh, so that nobody has to be asked."""
        if self._parts:
            if not all(server.models.fresh for _, server in self._parts):
                return False
            self.digest = self._known()
        return True

    def ascertain(self) -> Flow[None]:
        """Ask the servers that were not asked for long."""
        for _, server in self._parts:
            if not server.models.fresh:
                yield from server.models.learn(server)
        self.digest = self._known()

    def answered(self, began_s: float) -> Flow[bool]:
        """Learn which version has made an answer, if that was not known before; return whether it is known now.

        Args:
            began_s: When its making began, in unix seconds by its server's clock.
        """
        if not self._parts or self.digest:  # what was known before: if another version made it, it is served to nobody
            return True
        yield from self.ascertain()
        if not all(server.models.known for _, server in self._parts):
            self.digest = _UNKNOWN
        return not self._known() or all(server.models.changed_s(name) < began_s for name, server in self._parts)

    def _known(self) -> str:
        if len(self._parts) == 1:
            ((name, server),) = self._parts
            return server.models.digest(name)
        return ",".join(sorted({server.models.digest(name) for name, server in self._parts} - {""}))


_asked: ContextVar[tuple[str, tuple[tuple[str, Servers], ...]]] = ContextVar("aegis_asked_model", default=("", ()))


def note_asked(llm_string: str, *models: tuple[str, Servers]) -> None:
    """Say, before a cache is asked, which models of which servers `llm_string` stands for in this context."""
    _asked.set((llm_string, models))


def noted(llm_string: str) -> tuple[tuple[str, Servers], ...]:
    """Return what was said about `llm_string`, if that was the last thing that was said in this context."""
    text, models = _asked.get()
    return models if text == llm_string else ()


def asked_for(llm_string: str) -> Asked:
    """Return the models that `llm_string` stands for; none if that was not said."""
    return Asked([(name, server) for name, servers in noted(llm_string) for server in servers()])
