"""The rounds in which the systems take turns, and what is noted of each answer.

One operation of every system, in an order drawn anew, then the next: what the machine does meanwhile hits all alike.
Each answer is compared with the only right one. A wrong answer, or none where there must be one, is a failure.
"""

import asyncio
import gc
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cache_systems import System
from cache_workload import KNOWN, PARAPHRASES, PROMPTS, Item, Workload, generations, messages
from langchain_core.caches import BaseCache
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from pydantic import Field

OPERATIONS = ("exact", "semantic", "miss", "update")
CALLS = ("exact", "semantic", "miss")  # through a model
NO_CACHE = "no cache"
LEAST_HITS = 0.5  # of what is asked by meaning; a system that answers less is not measured, it is broken


@dataclass(slots=True)
class Tally:
    """How often something was asked, answered, and answered with what belongs to another question."""

    asked: int = 0
    answered: int = 0
    wrong: int = 0


@dataclass(slots=True)
class Measured:
    """What was measured of one number of entries.

    Attributes:
        entries: So many were stored.
        wall: Seconds of each operation that did what it should, by (system, "sync" or "async", operation).
        cpu: The same of processor time, of all threads.
        rates: Lookups per second with many at once, by (system, operation).
        tallies: By (system, operation).
        failures: Why the run has failed; empty: it has not.
        memory: Bytes of Redis that a system's entries take, by system.
        fill_s: Seconds that it took to store them.
        added: Seconds that a cache adds to a call that it does not answer, by (system, "sync" or "async").
    """

    entries: int
    wall: dict[tuple[str, str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu: dict[tuple[str, str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    rates: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    tallies: dict[tuple[str, str], Tally] = field(default_factory=lambda: defaultdict(Tally))
    failures: list[str] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    fill_s: dict[str, float] = field(default_factory=dict)
    added: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))

    def wall_us(self, system: str, way: str, operation: str, share: float = 0.5) -> float | None:
        """Return a quantile in microseconds, by default the median; None if it was not measured."""
        return _quantile(self.wall.get((system, way, operation)), share, 1e6)

    def cpu_us(self, system: str, way: str, operation: str) -> float | None:
        """Return the median of the processor time in microseconds; None if it was not measured."""
        return _quantile(self.cpu.get((system, way, operation)), 0.5, 1e6)

    def added_us(self, system: str, way: str, share: float = 0.5) -> float | None:
        """Return a quantile of what a cache adds to a call that it does not answer; None if it was not measured."""
        return _quantile(self.added.get((system, way)), share, 1e6)

    def rate(self, system: str, operation: str, share: float = 0.5) -> float | None:
        """Return a quantile of lookups per second; None if it was not measured."""
        return _quantile(self.rates.get((system, operation)), share, 1.0)

    def judge(self, system: System, operation: str, item: Item | None, got: Any, *, name: str = "") -> bool:
        """Note an answer; returns whether it is the one that should come.

        Args:
            system: Whose answer it is.
            operation: What was asked.
            item: Whose answer is right; None: nothing must come.
            got: What came.
            name: What the operation is called in the tally, if not `operation`.
        """
        tally = self.tallies[system.name, name or operation]
        tally.asked += 1
        if got is None:
            return item is None
        tally.answered += 1
        if item is None or not is_answer(got, item):
            tally.wrong += 1
            if tally.wrong == 1 and not system.errs_by_design():  # one example; `conclude` tells how many
                self.failures.append(f"{system.name}, {name or operation}: a wrong answer, {str(text_of(got))[:60]!r}")
            return False
        return True

    def conclude(self, system: System) -> None:
        """Note how much was answered wrongly, and what was answered too seldom to be called measured."""
        if not system.errs_by_design():
            for (name, operation), tally in self.tallies.items():
                if name == system.name and tally.wrong:
                    self.failures.append(f"{name}, {operation}: {tally.wrong} of {tally.asked} answered wrongly")
        for operation, least in (("exact", 0.95), ("kept", 0.95), ("semantic", LEAST_HITS)):
            tally = self.tallies.get((system.name, operation))
            if tally is None or system.errs_by_design():
                continue
            if tally.answered < least * tally.asked:
                self.failures.append(f"{system.name}, {operation}: {tally.answered} of {tally.asked} answered")


def _quantile(values: Sequence[float] | None, share: float, factor: float) -> float | None:
    if not values:
        return None
    if share == 0.5:
        return statistics.median(values) * factor
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] * factor


def text_of(got: Any) -> str | bytes:
    """Return the text of what a system returned."""
    if isinstance(got, (str, bytes)):
        return got
    return str(got.content if hasattr(got, "content") else got[0].text)


def is_answer(got: Any, item: Item) -> bool:
    """Return whether what a system returned is the item's answer, whole; a floor returns its bytes as JSON."""
    text = text_of(got)
    return item.answer.encode() in text if isinstance(text, bytes) else text == item.answer


class Deck:
    """Draws what is asked; a paraphrase is drawn once, for whoever answered it by meaning does not do so again.

    Args:
        workload: Whose items.
        entries: Items below this number are stored.
        seed: Draws.
    """

    def __init__(self, workload: Workload, entries: int, seed: int) -> None:
        self.workload, self.random = workload, random.Random(seed)
        self._fresh, self.entries = entries, min(entries, KNOWN)
        self._pairs = self._all_pairs()

    def _all_pairs(self) -> Iterator[tuple[int, int]]:
        for paraphrase in range(PARAPHRASES):
            numbers = range(self.entries)
            yield from ((n, paraphrase) for n in self.random.sample(numbers, min(self.entries, 20_000)))

    def stored(self) -> Item:
        """Return an item that is stored."""
        return self.workload.item(self.random.randrange(self.entries))

    def repeat(self) -> tuple[Item, str]:
        """Return a stored item, and its question."""
        item = self.stored()
        return item, item.question

    def near(self) -> tuple[Item, str]:
        """Return a stored item, and a paraphrase that was not asked yet. Raises RuntimeError if all were."""
        try:
            number, paraphrase = next(self._pairs)
        except StopIteration:
            raise RuntimeError(f"{self.entries} entries have too few paraphrases for so many rounds") from None
        item = self.workload.item(number)
        return item, item.paraphrases[paraphrase]

    def new(self) -> Item:
        """Return an item that is not stored."""
        self._fresh += 1
        return self.workload.item(self._fresh - 1)


@dataclass(frozen=True, slots=True)
class Round:
    """What is asked in one round."""

    exact: Item
    near: Item
    paraphrase: str
    new: Item

    @classmethod
    def drawn(cls, deck: Deck) -> "Round":
        """Draw one."""
        near, paraphrase = deck.near()
        return cls(deck.stored(), near, paraphrase, deck.new())

    def asked(self, operation: str) -> tuple[str, Item | None]:
        """Return the question of an operation, and whose answer must come."""
        if operation == "exact":
            return self.exact.question, self.exact
        return (self.paraphrase, self.near) if operation == "semantic" else (self.new.question, None)


async def run_rounds(
    measured: Measured, systems: Sequence[System], deck: Deck, prepare: Callable[..., None], *, rounds: int,
    warmup: int, awaited: bool,
) -> None:  # fmt: skip
    """Measure lookups and updates, one at a time."""
    way = "async" if awaited else "sync"
    drawn = [Round.drawn(deck) for _ in range(rounds + warmup)]
    prepare([i for r in drawn for i in (r.exact, r.near, r.new)], paraphrases=True)
    gc.collect()
    gc.disable()
    try:
        for number, each in enumerate(drawn):
            for operation in OPERATIONS:
                question, item = each.asked(operation)
                prompt = PROMPTS.prompt(question)
                for system in deck.random.sample(systems, len(systems)):
                    if operation in ("exact", "semantic") and operation not in system.tiers:
                        continue
                    began, cpu = time.perf_counter(), time.process_time()
                    if operation == "update":
                        got = await system.aupdate(each.new) if awaited else system.update(each.new)
                    else:
                        got = await system.alookup(prompt) if awaited else system.lookup(prompt)
                    taken = time.perf_counter() - began, time.process_time() - cpu
                    # What was not found by meaning took another way: its time says nothing of hits.
                    good = operation == "update" or measured.judge(system, operation, item, got)
                    if good and number >= warmup:
                        measured.wall[system.name, way, operation].append(taken[0])
                        measured.cpu[system.name, way, operation].append(taken[1])
            if number % 50 == 49:
                gc.collect()  # between rounds, in nobody's time
    finally:
        gc.enable()
    for each in drawn:  # what was stored is there
        for system in systems:
            if "exact" in system.tiers:
                prompt = PROMPTS.prompt(each.new.question)
                got = await system.alookup(prompt) if awaited else system.lookup(prompt)
                measured.judge(system, "exact", each.new, got, name="kept")


async def run_crowd(
    measured: Measured, systems: Sequence[System], deck: Deck, prepare: Callable[..., None], *, lookups: int,
    at_once: int, times: int,
) -> None:  # fmt: skip
    """Measure lookups per second, many at once in one event loop."""
    for _ in range(times):
        for operation in ("exact", "semantic"):
            asked = [deck.repeat() if operation == "exact" else deck.near() for _ in range(lookups)]
            prepare([item for item, _ in asked], paraphrases=True)
            for system in deck.random.sample(systems, len(systems)):
                if operation not in system.tiers:
                    continue
                coming, answers = iter([(PROMPTS.prompt(question), item) for item, question in asked]), []

                async def work(system=system, coming=coming, answers=answers) -> None:
                    for prompt, item in coming:
                        answers.append((item, await system.alookup(prompt)))

                began = time.perf_counter()
                await asyncio.gather(*(work() for _ in range(at_once)))
                seconds = time.perf_counter() - began
                for item, got in answers:
                    measured.judge(system, operation, item, got, name=f"{operation} x{at_once}")
                measured.rates[system.name, operation].append(lookups / seconds)


# -- through a model --


class Model(BaseChatModel):
    """Answers at once, with what belongs to the question."""

    answers: dict[str, AIMessage] = Field(default_factory=dict)
    calls: int = 0

    @property
    def _llm_type(self) -> str:
        return "bench"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": "bench"}

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        self.calls += 1
        return ChatResult(generations=[ChatGeneration(message=self.answers[messages[-1].content])])

    async def _agenerate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        return self._generate(messages)


class _Spy(BaseCache):
    def __init__(self) -> None:
        self.told: tuple[str, str] = ("", "")

    def lookup(self, prompt: str, llm_string: str) -> None:
        self.told = prompt, llm_string

    def update(self, prompt: str, llm_string: str, return_val: Any) -> None:
        pass

    def clear(self, **kwargs: Any) -> None:
        pass


def told_by_langchain() -> str:
    """Return the second string that a cache is told; raises RuntimeError if the first is not what is built here."""
    spy, question = _Spy(), 'Is "this" it?'
    Model(cache=spy, answers={question: AIMessage("Yes.")}).invoke(messages(question))
    if spy.told[0] != PROMPTS.prompt(question):
        raise RuntimeError("LangChain writes prompts in another way than this benchmark")
    return spy.told[1]


async def run_calls(
    measured: Measured, systems: Sequence[System], deck: Deck, prepare: Callable[..., None], *, rounds: int,
    warmup: int, awaited: bool,
) -> None:  # fmt: skip
    """Measure `invoke` or `ainvoke` of a model whose own work takes no time, with each cache and with none."""
    way = "ainvoke" if awaited else "invoke"
    models: list[tuple[System | None, str, Model]] = [(None, NO_CACHE, Model(cache=False))]
    models += [(s, s.name, Model(cache=s.cache)) for s in systems if s.cache is not None]
    drawn = [Round.drawn(deck) for _ in range(rounds + warmup)]
    prepare([i for r in drawn for i in (r.exact, r.near, r.new)], paraphrases=True)
    for number, each in enumerate(drawn):
        for operation in CALLS:
            question, item = each.asked(operation)
            right = item or each.new
            taken: dict[str, float] = {}
            for system, name, model in deck.random.sample(models, len(models)):
                if system is not None and operation != "miss" and operation not in system.tiers:
                    continue
                model.answers = {question: generations(right)[0].message}
                before, asked = model.calls, messages(question)
                began = time.perf_counter()
                got = await model.ainvoke(asked) if awaited else model.invoke(asked)
                seconds = time.perf_counter() - began
                hit = model.calls == before
                if system is None:
                    good = True
                else:
                    good = measured.judge(system, operation, item, got if hit else None, name=f"{operation} {way}")
                if not hit and not is_answer(got, right):
                    measured.failures.append(f"{name}, {way}: the model's own answer was changed")
                if good:
                    taken[name] = seconds
            if number >= warmup:
                for name, seconds in taken.items():
                    measured.wall[name, way, operation].append(seconds)
                    if operation == "miss" and NO_CACHE in taken:
                        measured.added[name, way].append(seconds - taken[NO_CACHE])
