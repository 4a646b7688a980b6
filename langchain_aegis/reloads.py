"""Keep the calls of a process from making an Ollama server reload a model again and again.

A model is loaded with its runner options (`num_ctx`, `num_thread`, ...). A request with others restarts it: seconds,
all other requests of the model wait, and what it knew of prompts is lost. So the first call with a second set is
reported, and from then on all calls of a model and server send one set:

- `num_ctx`: the largest that any call has asked for. A smaller one rides on it: its prompt fits a fortiori. A call
  that leaves the window to the server rides only when the server's own window is known to be no larger.
- The other options, which decide how fast and not what is answered: the first value that any call has asked for.
- What changes results is never changed, and a difference only reported: `shift`, and the window of an embedder, which
  decides how much of a long text is embedded.

Requests may overtake each other on their way: one with the smaller window that arrives after one with the larger would
have the model loaded twice more. So who is the first to send a larger window waits until the server has what was sent
with a smaller one. That costs no time, for Ollama reloads a model only when it has answered what came before.

What was constructed and never called counts for nothing. The guard sees the calls of its own process only.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from langchain_aegis.errors import AegisOptionError, AegisReloadError
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.identity import normalise_model
from langchain_aegis.notices import logger
from langchain_aegis.settings import redact_url
from langchain_aegis.wakers import Waker

Rule = Literal["share", "raise", "allow"]

# Ollama starts the model's runner anew when one of them differs from what it was loaded with (sched.go, needsReload).
RUNNER_OPTIONS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread", "draft_num_predict", "shift")
AUTO: Mapping[str, Any] = {}  # nothing asked for: the server decides
_MOST_MODELS, _MOST_SETS = 256, 64  # names and options may come from outside
ARRIVES_S = 2.0  # a request that was sent so long ago is at the server, answered or not
_LIBRARIES = frozenset(
    {"langchain_aegis", "langchain_core", "langchain_ollama", "langchain", "langchain_classic", "langgraph", "pydantic",
     "asyncio", "concurrent", "threading", "contextlib", "functools", "copy"}
)  # fmt: skip


def resolve_strict(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a model's arguments with `strict`, if it is there, put as `on_reload`.

    Raises:
        AegisOptionError: It is neither True nor False, or contradicts `on_reload`.
    """
    strict = arguments.pop("strict", None)
    if strict is None:
        return arguments
    if not isinstance(strict, bool):
        raise AegisOptionError(f"strict must be True or False, got {strict!r}")
    told = arguments.get("on_reload")
    if told is not None and strict != (told == "raise"):
        raise AegisOptionError(f'strict={strict} contradicts on_reload={told!r}; strict=True means on_reload="raise"')
    return {**arguments, "on_reload": "raise"} if strict else arguments


@dataclass(slots=True)
class Asked:
    """One set of runner options that calls of a model ask for.

    Attributes:
        options: Those that are not left to the server.
        place: The file and line that asked for it first.
        calls: How many calls asked for it.
        shared: How many of them were sent with another set, so that nothing is reloaded.
    """

    options: Mapping[str, Any]
    place: str
    calls: int = 0
    shared: int = 0

    @property
    def text(self) -> str:
        """The options, as in `num_ctx=4096 num_thread=8`."""
        return " ".join(f"{name}={value}" for name, value in self.options.items()) or "the server's defaults"


@dataclass(slots=True, eq=False)
class Flight:
    """A request on its way, until its answer begins: only then the server surely has it.

    Attributes:
        num_ctx: The window that it is sent with; None: the server's.
        at: When it was sent.
    """

    num_ctx: int | None = None
    at: float = 0.0


@dataclass(slots=True)
class Runner:
    """What the calls of one model and server ask for.

    Attributes:
        sets: By their options.
        switches: Calls that were sent with another set than the call before: each reloads the model.
        server_window: Tokens of the window that the server chooses by itself, once known.
    """

    sets: dict[tuple[Any, ...], Asked] = field(default_factory=dict)
    switches: int = 0
    server_window: int | None = None
    sent: dict[str, Any] | None = None
    shared: dict[str, Any] = field(default_factory=dict)  # what is sent, but for `shift`
    windows: dict[tuple[Any, ...], tuple[int, float]] = field(default_factory=dict)
    flights: list[Flight] = field(default_factory=list)
    waiting: list[Waker] = field(default_factory=list)  # until one of them has landed

    def ahead(self, num_ctx: int | None, now: float) -> bool:
        """Say whether a request with a smaller window is on its way."""
        if num_ctx is None or not self.flights:
            return False
        self.flights = [flight for flight in self.flights if now - flight.at < ARRIVES_S]
        return any(flight.num_ctx is not None and flight.num_ctx < num_ctx for flight in self.flights)

    def leaves_window(self) -> bool:
        """Whether any call left the window to the server."""
        return any("num_ctx" not in asked.options for asked in self.sets.values())

    def unclear(self) -> bool:
        """Whether some calls leave the window to the server, some do not, and it is not known which is larger."""
        return self.server_window is None and "num_ctx" in self.shared and self.leaves_window()

    def conflicts(self, options: Mapping[str, Any]) -> list[str]:
        """Return the options in which a set differs from one that was asked for before."""
        found = []
        for name in RUNNER_OPTIONS:
            others = [asked.options.get(name) for asked in self.sets.values()]
            if name == "num_ctx":  # an unset one is a window, too
                known = {self.server_window if other is None else other for other in others}
                mine = options.get(name, self.server_window)
            elif name == "shift":
                known, mine = {True if other is None else other for other in others}, options.get(name, True)
            else:  # who leaves one open rides on whoever does not
                known, mine = {other for other in others if other is not None}, options.get(name)
                if mine is None:
                    continue
            if known - {mine}:
                found.append(name)
        return found

    def learn(self, options: Mapping[str, Any], own: Collection[str]) -> None:
        """Take a set into what is sent by all, but for a call's `own` options."""
        for name, value in options.items():
            if name == "num_ctx" and name not in own:
                self.shared[name] = max(value, self.shared.get(name, 0))
            elif name not in own:
                self.shared.setdefault(name, value)

    def for_(self, options: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
        """Return what a call with these options is sent with."""
        sent = {**options, **{name: value for name, value in self.shared.items() if name not in own}}
        if "num_ctx" in sent and "num_ctx" not in own and self.leaves_window():
            if self.server_window is not None and self.server_window >= sent["num_ctx"]:
                del sent["num_ctx"]  # the server's own window is the largest
            elif self.server_window is None and "num_ctx" not in options:
                del sent["num_ctx"]  # it may be larger than all that was asked for
        return {name: sent[name] for name in RUNNER_OPTIONS if name in sent}


class Reloads:
    """The guard of a process; there is one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._runners: OrderedDict[tuple[str, str], Runner] = OrderedDict()
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Let no lock of the parent's be held in the child of a fork; what was learnt stays true."""
        self._lock = threading.Lock()
        for runner in self._runners.values():  # they are the parent's
            runner.flights, runner.waiting = [], []

    def forget(self) -> None:
        """Forget all calls: for tests."""
        with self._lock:
            self._runners.clear()

    def share(
        self,
        server: str,
        model: str,
        options: Mapping[str, Any],
        *,
        where: Callable[[], str],
        rule: Rule = "share",
        own: Collection[str] = ("shift",),
    ) -> dict[str, Any]:
        """Take note of what a call asks for, and return the runner options that it would be sent with now.

        What it is sent with, `send` says when its turn has come: others may have asked for more meanwhile.

        Args:
            server: Address of the server.
            model: Name of the model.
            options: Runner options that the call asks for; see `runner_options`.
            where: Returns the file and line that asks; called when a set is seen for the first time.
            rule: "share" one set; "raise" instead of using a second one. (For "allow", this is not to be called.)
            own: Options that change what the call returns, and so are sent as asked.

        Raises:
            AegisReloadError: With "raise", a set that differs from an earlier call's.
        """
        key = tuple(options.get(name) for name in RUNNER_OPTIONS)
        report = ""
        with self._lock:
            runner = self._runner(server, model)
            asked = runner.sets.get(key)
            if asked is None:
                asked = Asked(dict(options), where())
                if names := runner.conflicts(options):
                    other = next(other for other in runner.sets.values() if _differ(other, asked, names))
                    report = _report(server, model, other, asked, names)
                    if rule == "raise":
                        raise AegisReloadError(
                            f'{report}. Give one set everywhere, or leave out on_reload="raise" to share the larger one'
                        )
                if len(runner.sets) < _MOST_SETS:
                    runner.sets[key] = asked
                else:
                    report = ""  # said often enough
                runner.learn(options, own)
            sent = runner.for_(options, own)
            asked.calls += 1
            if report:
                report += f". {_outcome(runner, names, own)}"
        if report:
            logger.warning("reload: %s", report)
        return sent

    def send(
        self, server: str, model: str, options: Mapping[str, Any], *, own: Collection[str] = ("shift",)
    ) -> dict[str, Any]:
        """Return the runner options that a call, which `share` knows, is sent with now."""
        with self._lock:
            return self._send(self._runner(server, model), options, own)

    def depart(
        self, server: str, model: str, options: Mapping[str, Any], *, flight: Flight, waker: Waker,
        own: Collection[str] = ("shift",),
    ) -> dict[str, Any] | None:  # fmt: skip
        """Do what `send` does, unless a request with a smaller window is on its way: then return None.

        Args:
            server: Address of the server.
            model: Name of the model.
            options: Runner options that the call asks for.
            flight: The request, which is on its way from now on, until `landed`, if not None is returned.
            waker: Woken when it is worth another try, which it also is after `ARRIVES_S`.
            own: Options that change what the call returns, and so are sent as asked.
        """
        with self._lock:
            runner, now = self._runner(server, model), self._clock()
            num_ctx = runner.for_(options, own).get("num_ctx")
            if runner.ahead(num_ctx, now):
                runner.waiting.append(waker)
                return None
            flight.num_ctx, flight.at = num_ctx, now
            runner.flights.append(flight)
            return self._send(runner, options, own)

    def landed(self, server: str, model: str, flight: Flight) -> None:
        """Take note that the answer to a request has begun, or never will; may be called again."""
        with self._lock:
            runner = self._runner(server, model)
            if flight in runner.flights:
                runner.flights.remove(flight)
            waiting, runner.waiting = runner.waiting, []
        for waker in waiting:
            with contextlib.suppress(RuntimeError):  # its event loop is closed
                waker.wake()

    @staticmethod
    def _send(runner: Runner, options: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
        key = tuple(options.get(name) for name in RUNNER_OPTIONS)
        sent = runner.for_(options, own)
        if (asked := runner.sets.get(key)) is not None:
            asked.shared += sent != options
        runner.switches += runner.sent not in (None, sent)
        runner.sent = sent
        return sent

    def window(self, server: str, model: str, options: Mapping[str, Any], *, within_s: float) -> int | None:
        """Return the window that the server gave for these options, if it said so in the last `within_s` seconds."""
        key = tuple(options.get(name) for name in RUNNER_OPTIONS)
        with self._lock:
            runner = self._runners.get((server, normalise_model(model)))
            tokens, at = runner.windows.get(key, (None, 0.0)) if runner else (None, 0.0)
            return tokens if tokens is not None and self._clock() - at < within_s else None

    def note_window(self, server: str, model: str, options: Mapping[str, Any], tokens: int) -> None:
        """Keep in mind the window that the server gave for these options, in tokens."""
        key = tuple(options.get(name) for name in RUNNER_OPTIONS)
        with self._lock:
            runner = self._runner(server, model)
            if key in runner.windows or len(runner.windows) < _MOST_SETS:
                runner.windows[key] = tokens, self._clock()
            if "num_ctx" not in options:
                runner.server_window = tokens

    def unclear(self, server: str, model: str) -> bool:
        """Whether it must be known which window the server chooses by itself, and is not."""
        with self._lock:
            runner = self._runners.get((server, normalise_model(model)))
            return runner is not None and runner.unclear()

    def last_sent(self, server: str, model: str) -> dict[str, Any] | None:
        """Return the set that the last call was sent with."""
        with self._lock:
            runner = self._runners.get((server, normalise_model(model)))
            return runner.sent if runner else None

    def rows(self) -> list[tuple[str, str, list[Asked], int]]:
        """Return (server, model, sets, switches) for each model; copies."""
        with self._lock:
            return [
                (server, model, [Asked(a.options, a.place, a.calls, a.shared) for a in runner.sets.values()],
                 runner.switches)
                for (server, model), runner in self._runners.items()
            ]  # fmt: skip

    def _runner(self, server: str, model: str) -> Runner:
        name = server, normalise_model(model)
        runner = self._runners.setdefault(name, Runner())
        self._runners.move_to_end(name)
        while len(self._runners) > _MOST_MODELS:
            self._runners.popitem(last=False)
        return runner


reloads = Reloads()


def runner_options(options: Mapping[str, Any], shift: bool | None = None) -> dict[str, Any]:
    """Return those of a call's options that a model is loaded with, without what leaves the choice to the server."""
    asked = {name: options.get(name) for name in RUNNER_OPTIONS} | {"shift": shift}
    if (asked["num_gpu"] or 0) < 0:
        asked["num_gpu"] = None
    for name in ("num_ctx", "num_batch", "num_thread"):
        asked[name] = asked[name] or None
    return {name: value for name, value in asked.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Place:
    """A file and line, as `file:line`. All are equal: models that are alike stay so, wherever they were made."""

    text: str = field(compare=False)


def place() -> Place:
    """Return the place of the code that called into LangChain or this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame = frame.f_back
    return Place(f"{frame.f_code.co_filename}:{frame.f_lineno}")


def _differ(one: Asked, other: Asked, names: list[str]) -> bool:
    return any(one.options.get(name) != other.options.get(name) for name in names)


def _report(server: str, model: str, one: Asked, other: Asked, names: list[str]) -> str:
    def said(asked: Asked) -> str:
        values = (f"{name}={asked.options.get(name, 'not set')}" for name in names)
        return f"{', '.join(values)} at {asked.place}"

    return (
        f"{normalise_model(model)} on {redact_url(server)} is asked for {said(one)} and {said(other)}; Ollama reloads"
        " a model whenever these change"
    )


def _outcome(runner: Runner, names: list[str], own: Collection[str]) -> str:
    told = []
    shared = {name: runner.shared[name] for name in names if name in runner.shared and name not in own}
    if "num_ctx" in names and "num_ctx" not in own and runner.unclear():
        told.append("both are sent until the server's own window is known; then the larger is sent by all calls")
        shared.pop("num_ctx", None)
    if shared:
        told.append(f"all calls now send {', '.join(f'{name}={value}' for name, value in shared.items())}")
    if changing := " and ".join(name for name in names if name in own):
        told.append(f"{changing}, which changes results, is sent as asked, so these calls do reload the model")
    told.append('give one set everywhere, or on_reload="raise" or "allow"')
    outcome = "; ".join(told)
    return outcome[0].upper() + outcome[1:]
