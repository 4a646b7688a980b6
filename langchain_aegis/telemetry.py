"""What chat calls do: counted by server and model, and told to the caller's OpenTelemetry span.

The client's four chat methods are decorated with what stands here. Counting is always on, as for the cache and for
admission: a few microseconds for a call, and nothing that is said in it is looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Concatenate, Final, ParamSpec, Protocol, Self, TypeVar
from urllib.parse import urlsplit

from langchain_aegis.counts import Distribution, Histogram
from langchain_aegis.errors import AegisError
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.identity import normalise_model

BOUNDS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
# A loaded model is found in a millisecond, at most in some tens of them; the smallest took 0.8 s to load.
LOAD_WAIT_S: Final = 0.2
OTHERS: Final = "(others)"
_MOST_ROWS = 200  # names of models come from the application: what it makes up must not fill the memory
_REASONS = frozenset({"stop", "length", "load", "unload"})

Part = dict[str, Any]


class Addressed(Protocol):
    """A client of one server."""

    base_url: str


S = TypeVar("S", bound=Addressed)
P = ParamSpec("P")
Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCounts:
    """What the calls of one model did, up to one moment.

    Attributes:
        server: Address, without credentials.
        model: Name with its tag, `OTHERS` for all beyond the first 200.
        outcomes: Calls by how they ended: "ok", "left" (nobody waited for the end), or the class of the error.
        finishes: Whole answers by why they ended: "stop", "length", "load", "unload", "other".
        input_tokens: Of prompts, as the server counts them: with those that it knew already.
        output_tokens: Of answers.
        prompt_s: Seconds of reading prompts, without what the server knew already.
        generation_s: Seconds of writing answers; tokens by seconds is the speed of one call.
        load_waits: Calls that waited `LOAD_WAIT_S` or longer until the model was loaded.
        load_s: Seconds that all calls waited for that.
        first_token_s: From the request to its first part, of streamed calls.
        total_s: From the request to the end, of calls that ended "ok".
    """

    server: str
    model: str
    outcomes: Mapping[str, int]
    finishes: Mapping[str, int]
    input_tokens: int
    output_tokens: int
    prompt_s: float
    generation_s: float
    load_waits: int
    load_s: float
    first_token_s: Distribution
    total_s: Distribution


@dataclass(slots=True)
class _Row:
    outcomes: Counter[str] = field(default_factory=Counter)
    finishes: Counter[str] = field(default_factory=Counter)
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_ns: int = 0
    generation_ns: int = 0
    load_waits: int = 0
    load_ns: int = 0
    first_token_s: Histogram = field(default_factory=lambda: Histogram(BOUNDS_S))
    total_s: Histogram = field(default_factory=lambda: Histogram(BOUNDS_S))


class Chats:
    """The counts of this process; the child of a fork begins at 0. May be used from any thread."""

    def __init__(self) -> None:
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Begin at 0."""
        self._lock = threading.Lock()
        self._rows: dict[tuple[str, str], _Row] = {}

    def snapshot(self) -> list[ChatCounts]:
        """Return everything as it is now, each row consistent in itself."""
        with self._lock:
            return [
                ChatCounts(
                    server=server, model=model, outcomes=dict(row.outcomes), finishes=dict(row.finishes),
                    input_tokens=row.input_tokens, output_tokens=row.output_tokens, prompt_s=row.prompt_ns / 1e9,
                    generation_s=row.generation_ns / 1e9, load_waits=row.load_waits, load_s=row.load_ns / 1e9,
                    first_token_s=row.first_token_s.frozen(), total_s=row.total_s.frozen(),
                )
                for (server, model), row in self._rows.items()
            ]  # fmt: skip

    def count(self, call: _Call, outcome: str, first_s: float | None, total_s: float, last: Part | None) -> None:
        """Count a call that is over; `last` is the part that ended its answer."""
        with self._lock:
            row = self._row(call.server, call.model)
            row.outcomes[outcome] += 1
            if first_s is not None:
                row.first_token_s.add(first_s)
            if last is None:
                return
            row.total_s.add(total_s)
            reason = last.get("done_reason")
            row.finishes[reason if reason in _REASONS else "other"] += 1
            row.input_tokens += _number(last, "prompt_eval_count")
            row.output_tokens += _number(last, "eval_count")
            row.prompt_ns += _number(last, "prompt_eval_duration")
            row.generation_ns += _number(last, "eval_duration")
            load_ns = _number(last, "load_duration")
            row.load_ns += load_ns
            row.load_waits += load_ns >= LOAD_WAIT_S * 1e9

    def _row(self, server: str, model: str) -> _Row:
        name = server, model
        if (row := self._rows.get(name)) is None:
            if len(self._rows) >= _MOST_ROWS:
                name = server, OTHERS
            row = self._rows.setdefault(name, _Row())
        return row


chats = Chats()


class _Call:
    """One call under way; `last` is the part of its answer that came last."""

    __slots__ = ("begun", "body", "first_s", "last", "model", "server", "span")

    def __init__(self, client: Addressed, body: Body) -> None:
        self.server = client.base_url
        self.body = body
        self.model = normalise_model(str(body.get("model")))
        self.span = _recording_span()
        self.first_s: float | None = None
        self.last: Part | None = None
        self.begun = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        whole = self.last is not None and self.last.get("done") is True
        if exc is None or whole:  # who leaves after the end has had all of it
            chats.count(self, "ok", self.first_s, time.perf_counter() - self.begun, self.last or {})
            error = ""
        else:
            left = isinstance(exc, GeneratorExit | asyncio.CancelledError)
            error = "" if left else type(exc).__name__
            outcome = "left" if left else error if isinstance(exc, AegisError) else "other"
            chats.count(self, outcome, self.first_s, 0.0, None)
        if self.span is not None:
            _describe(self.span, self, error, self.last if exc is None or whole else None)

    def first(self) -> None:
        self.first_s = time.perf_counter() - self.begun


def counted(chat: Callable[Concatenate[S, Body, P], Part]) -> Callable[Concatenate[S, Body, P], Part]:
    """Count the calls of a method that returns the part which is the whole answer."""

    @functools.wraps(chat)
    def watched(self: S, body: Body, /, *args: P.args, **kwargs: P.kwargs) -> Part:
        with _Call(self, body) as call:
            call.last = answer = chat(self, body, *args, **kwargs)
            return answer

    return watched


def acounted(
    chat: Callable[Concatenate[S, Body, P], Coroutine[Any, Any, Part]],
) -> Callable[Concatenate[S, Body, P], Coroutine[Any, Any, Part]]:
    """Do what `counted` does, for a coroutine."""

    @functools.wraps(chat)
    async def watched(self: S, body: Body, /, *args: P.args, **kwargs: P.kwargs) -> Part:
        with _Call(self, body) as call:
            call.last = answer = await chat(self, body, *args, **kwargs)
            return answer

    return watched


def counted_stream(
    chat: Callable[Concatenate[S, Body, P], Generator[Part, None, None]],
) -> Callable[Concatenate[S, Body, P], Generator[Part, None, None]]:
    """Count the calls of a method that yields an answer's parts."""

    @functools.wraps(chat)
    def watched(self: S, body: Body, /, *args: P.args, **kwargs: P.kwargs) -> Generator[Part, None, None]:
        with _Call(self, body) as call, contextlib.closing(chat(self, body, *args, **kwargs)) as parts:
            for part in parts:
                if call.last is None:
                    call.first()
                call.last = part
                yield part

    return watched


def acounted_stream(
    chat: Callable[Concatenate[S, Body, P], AsyncGenerator[Part, None]],
) -> Callable[Concatenate[S, Body, P], AsyncGenerator[Part, None]]:
    """Do what `counted_stream` does, for an asynchronous generator."""

    @functools.wraps(chat)
    async def watched(self: S, body: Body, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Part, None]:
        with _Call(self, body) as call:
            async with contextlib.aclosing(chat(self, body, *args, **kwargs)) as parts:
                async for part in parts:
                    if call.last is None:
                        call.first()
                    call.last = part
                    yield part

    return watched


def _number(part: Part, name: str) -> int:
    value = part.get(name)  # Ollama leaves a zero out
    return value if type(value) is int else 0


# -- OpenTelemetry: names of its semantic conventions for generative AI. Never a text. --

_OPTIONS = {
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "num_predict": "gen_ai.request.max_tokens",
    "seed": "gen_ai.request.seed",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
}
_USED = {"gen_ai.usage.input_tokens": "prompt_eval_count", "gen_ai.usage.output_tokens": "eval_count"}


def _recording_span() -> Any:
    """Return the caller's span if one records; a process that has not imported OpenTelemetry has none."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    span = trace.get_current_span()
    return span if span.is_recording() else None


def _describe(span: Any, call: _Call, error: str, last: Part | None) -> None:
    at = urlsplit(call.server)
    options = call.body.get("options") or {}
    told: dict[str, Any] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "ollama",
        "gen_ai.request.model": call.body.get("model"),
        "server.address": at.hostname,
        "server.port": at.port,
        **{name: options.get(option) for option, name in _OPTIONS.items()},
    }
    if last is not None:
        # A span around several calls holds the sum of their tokens, and of everything else the latest.
        before = getattr(span, "attributes", None) or {}
        told |= {name: (before.get(name) or 0) + _number(last, count) for name, count in _USED.items()}
        told |= {"gen_ai.response.model": last.get("model")}
        if reason := last.get("done_reason"):
            told["gen_ai.response.finish_reasons"] = (reason,)
    if error:
        told["error.type"] = error
    with contextlib.suppress(Exception):  # whatever a tracing library does, the answer is there
        span.set_attributes({name: value for name, value in told.items() if value is not None})
