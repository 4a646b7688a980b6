"""The callers of a soak: blocking and awaited, whole answers, streams and batches, and those who invalidate."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from langchain_core.messages import AIMessage

from faults.soak_history import Call
from faults.soak_parts import BOUNDED, CALLERS, PIPELINE, SCRIPTED, Stack, about, source_of
from faults.tenants import THINGS, TIERS, Caller
from langchain_aegis import aegis_scope, was_cached
from langchain_aegis.errors import AegisConnectionError

AWAITED, BLOCKING = 10, 3  # callers
HANGS_S = 30.0  # that no call may take
GRACE_S = 6.0  # of invalidating again and again: then it must be done, unless Redis is away
AGAIN_S = 0.3
# How often each is done, of 1,000.
_INVALIDATE, _CLEAR, _PIPELINE, _STREAM, _BATCH = 6, 1, 100, 150, 100


@dataclass(frozen=True)
class Plan:
    """What a caller does next.

    Attributes:
        how: "one", "stream", "batch", "pipeline", "invalidate" or "clear".
        caller: For whom.
        target: The model.
        questions: What is asked; one unless it is a batch.
        cache: Of the target, or what is to be invalidated.
        kind: What is to be invalidated: "tenant", "source", "task", "user"; `name`: which.
    """

    how: str
    caller: Caller
    target: str = ""
    questions: tuple[str, ...] = ()
    cache: str = ""
    kind: str = ""
    name: str = ""


def plan(chosen: random.Random, target: str | None = None) -> Plan:
    """Return what a caller does next; `target`: asks this model and does nothing else."""
    caller, drawn = chosen.choice(CALLERS), chosen.randrange(1_000)
    if target is None:
        if drawn < _CLEAR:
            return Plan("clear", caller, cache=chosen.choice(("far", "near")))
        if (drawn := drawn - _CLEAR) < _INVALIDATE:
            kind, name = chosen.choice(
                (("tenant", caller.tenant), ("source", source_of(_subject(chosen))), ("task", "chat"), ("user", "bob"))
            )
            return Plan("invalidate", caller, cache=chosen.choice(("far", "near")), kind=kind, name=name)
        if (drawn := drawn - _INVALIDATE) < _PIPELINE:
            return Plan("pipeline", caller, PIPELINE, (_question(chosen, TIERS[1]),), "near")
        drawn -= _PIPELINE
    name = target or chosen.choice(("one", "two", BOUNDED, BOUNDED, SCRIPTED, SCRIPTED))
    how = "stream" if drawn < _STREAM else "batch" if drawn < _STREAM + _BATCH else "one"
    first = _question(chosen)
    if how == "batch":
        # All of a batch are said to rest on one document.
        more = [q for _ in range(8) if source_of(about(q := _question(chosen))) == source_of(about(first))]
        return Plan(how, caller, name, (first, *more[:3]))
    return Plan(how, caller, name, (first,))


def _subject(chosen: random.Random) -> str:
    return f"x {_thing(chosen)}"


def _thing(chosen: random.Random) -> str:
    """Some are asked about much more often than others."""
    return chosen.choice(THINGS[: chosen.choice((1, 3, 10))])


def _question(chosen: random.Random, tier=None) -> str:
    tier = tier or chosen.choice(TIERS)
    return chosen.choice((tier.stored, tier.asked))(_thing(chosen))


def scope_of(caller: Caller, question: str) -> aegis_scope:
    """Return the scope of a call."""
    return aegis_scope(tenant=caller.tenant, user=caller.user, task=caller.task, sources=[source_of(about(question))])


def tier_of(message: AIMessage) -> str | None:
    """Return the tier that answered, or None."""
    told = was_cached(message)
    return None if told is None else str(told.get("tier"))


class Load:
    """All callers of a stack, from `start` to `stop`. The event loop runs in a thread of its own.

    Args:
        stack: What they call.
        seed: What they do depends on it.
    """

    def __init__(self, stack: Stack, seed: int) -> None:
        self.stack, self.history = stack, stack.history
        stack.load = self
        self._seed = seed
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._threads = [threading.Thread(target=self._loop, name="soak-loop")]
        self._threads += [threading.Thread(target=self._blocking, args=(n,), name=f"soak-{n}") for n in range(BLOCKING)]
        self._threads += [threading.Thread(target=self._measure, name="soak-measure")]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        """Let every caller finish its call and stop; whoever does not is a violation."""
        self._stop.set()
        for thread in self._threads:
            thread.join(HANGS_S + 5)
            if thread.is_alive():
                self.history.violation("a caller that waits for ever", f"{thread.name} did not end")

    def tasks(self) -> int:
        """Return how many tasks the event loop has."""
        return len(asyncio.all_tasks(self.loop))

    # -- blocking -------------------------------------------------------------------------------------------------

    def _blocking(self, number: int) -> None:
        chosen = random.Random(f"{self._seed} blocking {number}")
        while not self._stop.is_set():
            self._do(plan(chosen))
            self._stop.wait(chosen.uniform(0.005, 0.1))

    def _do(self, what: Plan) -> None:
        if what.how in ("invalidate", "clear"):
            for act, outcome in self._invalidating(what):
                try:
                    act("")
                except Exception as exc:  # it is what this looks for
                    outcome["error"] = exc
                    self._stop.wait(AGAIN_S)
            return
        calls = self._begin(what)
        question = what.questions[0]
        try:
            with scope_of(what.caller, question):
                if what.how == "pipeline":
                    self._got_value(calls[0], self.stack.caches["near"].get_or_generate(
                        question, lambda: self._made(calls[0]), pipeline=PIPELINE))  # fmt: skip
                    return
                model = self._model(what)
                if what.how == "batch":
                    self._got(calls, model.batch(list(what.questions)))
                elif what.how == "stream":
                    self._got(calls, [_joined(list(model.stream(question)))])
                else:
                    self._got(calls, [model.invoke(question)])
        except Exception as exc:  # it is what this looks for
            self._failed(calls, exc)

    # -- awaited --------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        asyncio.run(self._all())

    async def _all(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(self._unseen)
        callers = [asyncio.ensure_future(self._awaited(n)) for n in range(AWAITED)]
        callers.append(asyncio.ensure_future(self._ameasure()))
        self._ready.set()
        await asyncio.gather(*callers)
        await self.stack.aclose()
        for _ in range(100):
            if len(left := asyncio.all_tasks() - {asyncio.current_task()}) == 0:
                return
            await asyncio.sleep(0.02)
        self.history.violation("tasks left behind", f"{len(left)}: {sorted(map(repr, left))[:5]}")

    def _unseen(self, loop, context) -> None:
        self.history.violation("an error that nobody has seen", f"{context}")

    async def _awaited(self, number: int) -> None:
        chosen = random.Random(f"{self._seed} awaited {number}")
        while not self._stop.is_set():
            await self._ado(plan(chosen))
            await asyncio.sleep(chosen.uniform(0.005, 0.1))

    async def _ado(self, what: Plan) -> None:
        if what.how in ("invalidate", "clear"):
            for act, outcome in self._invalidating(what):
                try:
                    await act("a")
                except Exception as exc:  # it is what this looks for
                    outcome["error"] = exc
                    await asyncio.sleep(AGAIN_S)
            return
        calls = self._begin(what)
        try:
            async with asyncio.timeout(HANGS_S), scope_of(what.caller, what.questions[0]):
                await self._aask(what, calls)
        except asyncio.CancelledError:
            for call in calls:
                self.history.left(call)
            raise
        except Exception as exc:  # it is what this looks for
            self._failed(calls, exc)

    async def _aask(self, what: Plan, calls: list[Call]) -> None:
        question = what.questions[0]
        if what.how == "pipeline":

            async def made():
                return self._made(calls[0])

            value = await self.stack.caches["near"].aget_or_generate(question, made, pipeline=PIPELINE)
            self._got_value(calls[0], value)
            return
        model = self._model(what)
        if what.how == "batch":
            self._got(calls, await model.abatch(list(what.questions)))
        elif what.how == "stream":
            self._got(calls, [_joined([chunk async for chunk in model.astream(question)])])
        else:
            self._got(calls, [await model.ainvoke(question)])

    def storm(self, seconds: float, drawn: float, *, leave: float, at_once: int, target: str | None = None) -> None:
        """Let many call at once, again and again for so long, and a share of them leave at any moment; blocks."""
        done = asyncio.run_coroutine_threadsafe(
            self._storm(seconds, random.Random(f"{self._seed} storm {drawn}"), leave, at_once, target), self.loop
        )
        done.result(seconds + 2 * HANGS_S)

    async def _storm(
        self, seconds: float, chosen: random.Random, leave: float, at_once: int, target: str | None
    ) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            name = target or chosen.choice(("one", BOUNDED, SCRIPTED))
            plans = [plan(chosen, name) for _ in range(at_once)]
            if target is not None:
                plans = [Plan("one", p.caller, p.target, (f"{p.questions[0]} {n}",)) for n, p in enumerate(plans)]
            tasks = [asyncio.ensure_future(self._ado(each)) for each in plans]
            for task in tasks:
                if chosen.random() < leave:
                    self.loop.call_later(chosen.choice((0.0, 0.002, 0.02, 0.1)) * chosen.random(), task.cancel)
            await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled() and task.exception() is not None:
                    self.history.violation("an error", f"of a caller that left: {task.exception()!r}")
            await asyncio.sleep(chosen.uniform(0.05, 0.2))

    # -- what a cache costs ---------------------------------------------------------------------------------------

    def _measure(self) -> None:
        """Ask the same model with and without a cache in turn: what a cache adds is the difference."""
        chosen = random.Random(f"{self._seed} measure")
        number = 0
        while not self._stop.is_set():
            number += 1
            for model in (self.stack.bare, self.stack.measured):
                what = self._measured_plan(model.name, chosen, number)
                began_s = time.monotonic()
                calls = self._begin(what)
                try:
                    with scope_of(what.caller, what.questions[0]):
                        answer = model.invoke(what.questions[0])
                except Exception as exc:  # it is what this looks for
                    self._failed(calls, exc)
                else:
                    self.history.measured(model.name, time.monotonic() - began_s, began_s)
                    self._got(calls, [answer])
            self._stop.wait(0.03)

    async def _ameasure(self) -> None:
        chosen = random.Random(f"{self._seed} measure awaited")
        number = 0
        while not self._stop.is_set():
            number += 1
            for model in (self.stack.bare, self.stack.measured):
                what = self._measured_plan(model.name, chosen, number)
                began_s = time.monotonic()
                calls = self._begin(what)
                try:
                    async with asyncio.timeout(HANGS_S), scope_of(what.caller, what.questions[0]):
                        answer = await model.ainvoke(what.questions[0])
                except Exception as exc:  # it is what this looks for
                    self._failed(calls, exc)
                else:
                    self.history.measured(model.name, time.monotonic() - began_s, began_s)
                    self._got(calls, [answer])
            await asyncio.sleep(0.03)

    def _measured_plan(self, name: str, chosen: random.Random, number: int) -> Plan:
        """Every second question is new."""
        question = _question(chosen)
        return Plan("one", chosen.choice(CALLERS), name, (f"{question} {number}" if number % 2 else question,))

    # -- parts ----------------------------------------------------------------------------------------------------

    def _model(self, what: Plan):
        return self.stack.targets[what.target][1](what.caller)

    def _begin(self, what: Plan) -> list[Call]:
        cache = what.cache or (self.stack.targets[what.target][0] if what.target in self.stack.targets else "far")
        return [self.history.begin(what.target, cache, what.caller, about(question)) for question in what.questions]

    def _made(self, call: Call) -> str:
        return self.history.text_of_answer(call.caller, call.about, PIPELINE)

    def _got(self, calls: list[Call], answers: list[AIMessage]) -> None:
        for call, answer in zip(calls, answers, strict=True):
            self.history.answered(call, answer.text, tier_of(answer))
            self._in_time(call)

    def _got_value(self, call: Call, value: str) -> None:
        """A value says nothing of where it is from; what was made before the call began was kept."""
        version = _version(value)
        self.history.answered(call, value, "pipeline" if version is not None and version <= call.made else None)
        self._in_time(call)

    def _failed(self, calls: list[Call], exc: Exception) -> None:
        for call in calls:
            self.history.failed(call, exc)
            self._in_time(call)

    def _in_time(self, call: Call) -> None:
        if (took_s := time.monotonic() - call.began_s) > HANGS_S:
            self.history.violation("a caller that waits for ever", f"{call} took {took_s:.1f} s")

    def _invalidating(self, what: Plan) -> Iterator[tuple[Callable[[str], object], dict]]:
        """Yield what to do until it is done; as the documentation says, who is told that it is not calls again."""
        cache, first_s = self.stack.caches[what.cache], time.monotonic()
        kind = what.kind or "all"
        told = {} if kind == "all" else {"sources": [what.name]} if kind == "source" else {kind: what.name}
        name = "clear" if kind == "all" else "invalidate"
        done = False

        def act(prefix: str):
            return getattr(cache, prefix + name)(**told)

        while not done and not self._stop.is_set():
            began = self.history.invalidating()
            outcome: dict = {}
            yield act, outcome
            if (error := outcome.get("error")) is None:
                self.history.invalidated(what.cache, kind, what.name, began)
                return
            if not isinstance(error, AegisConnectionError):
                self.history.violation("an error", f"invalidating by {kind} raised {error!r}")
                return
            done = time.monotonic() > first_s + GRACE_S
            self.history.not_invalidated(what.cache, kind, error, first_s, last=done)


def _joined(chunks: list) -> AIMessage:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    return whole


def _version(value: str) -> int | None:
    try:
        return json.loads(value)[5]
    except (ValueError, TypeError, IndexError):
        return None
