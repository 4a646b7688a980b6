"""Who asked what, and whose answer came: every answer names its tenant, its question and the model that made it."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from pydantic import Field

from langchain_aegis import aegis_scope, was_cached


class Speaking(BaseChatModel):
    """Answers with whose question it was told, which question, and its own name.

    The tenant is told in the call's metadata (which no key contains): a served answer names who made it, not who asks.
    """

    name: str = "speaking"
    calls: list[str] = Field(default_factory=list)

    @property
    def _llm_type(self):
        return "speaking"

    @property
    def _identifying_params(self):
        return {"model": self.name}

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        return self._answer(messages, run_manager)

    async def _agenerate(self, messages, stop=None, run_manager=None, **kwargs):
        return self._answer(messages, run_manager)

    def _answer(self, messages, run_manager):
        told = (run_manager.metadata or {}).get("told") if run_manager is not None else None
        self.calls.append(messages[-1].content)
        text = json.dumps({"tenant": told, "question": messages[-1].content, "model": self.name})
        message = AIMessage(text, response_metadata={"done_reason": "stop"})
        return ChatResult(generations=[ChatGeneration(message=message)])


@dataclass
class Seen:
    """What came of some calls: how long each took, in seconds, and how many were answered by the cache."""

    took: list[float] = field(default_factory=list)
    hits: int = 0
    errors: list[BaseException] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        """Return the time that this share of the calls took at most."""
        return sorted(self.took)[min(len(self.took) - 1, int(share * len(self.took)))]

    @property
    def median(self) -> float:
        """The time that half of the calls took at most."""
        return self.quantile(0.5)


class Recorder:
    """Calls models through a cache and keeps all that is wrong with what comes back.

    Args:
        cache: The cache, or None.
        name: Of the model.
        alike: Returns the same for questions that one answer serves.

    Attributes:
        wrong: Answers to another question, of another tenant or another model, with what was asked.
        errors: What was raised instead of an answer.
    """

    def __init__(self, cache, name: str = "speaking", alike=lambda question: question) -> None:
        self.cache, self.name, self.alike = cache, name, alike
        self.model = Speaking(cache=cache, name=name)
        self.wrong: list[tuple[object, object]] = []
        self.errors: list[BaseException] = []
        self._lock = threading.Lock()

    def __repr__(self):
        return f"<Recorder: {len(self.wrong)} wrong, {len(self.errors)} errors>"

    @property
    def calls(self) -> int:
        """How often the model was asked."""
        return len(self.model.calls)

    def ask(self, question: str, tenant: str | None = None, seen: Seen | None = None) -> bool | None:
        """Ask; returns whether the cache answered, None if an error was raised instead."""
        began = time.perf_counter()
        try:
            with aegis_scope(tenant=tenant):
                answer = self.model.invoke(question, {"metadata": {"told": tenant}})
        except Exception as exc:  # it is what this counts
            return self._failed(exc, seen)
        return self._took(answer, question, tenant, time.perf_counter() - began, seen)

    async def aask(self, question: str, tenant: str | None = None, seen: Seen | None = None) -> bool | None:
        """Like `ask`; a cancellation goes on."""
        began = time.perf_counter()
        try:
            with aegis_scope(tenant=tenant):
                answer = await self.model.ainvoke(question, {"metadata": {"told": tenant}})
        except Exception as exc:  # it is what this counts
            return self._failed(exc, seen)
        return self._took(answer, question, tenant, time.perf_counter() - began, seen)

    def check(self, answer, question: str, tenant: str | None) -> None:
        """Note an answer that is not the one to what was asked."""
        asked = {"tenant": tenant, "question": self.alike(question), "model": self.name}
        try:
            told = json.loads(answer.content)
            told["question"] = self.alike(told["question"])
        except (ValueError, TypeError):
            told = answer
        if told != asked:
            self.wrong.append((asked, told))

    def assert_right(self) -> None:
        """Fail if anything was wrong since the beginning."""
        assert not self.errors, self.errors[:3]
        assert not self.wrong, self.wrong[:3]

    def _failed(self, exc, seen):
        with self._lock:
            self.errors.append(exc)
            if seen is not None:
                seen.errors.append(exc)

    def _took(self, answer, question, tenant, seconds, seen):
        hit = was_cached(answer) is not None
        with self._lock:
            self.check(answer, question, tenant)
            if seen is not None:
                seen.took.append(seconds)
                seen.hits += hit
        return hit


def questions(count: int, about: str = "item") -> list[str]:
    """Return so many questions, no two of which are the same."""
    return [f"What is the fee of {about} {i}?" for i in range(count)]


async def callers(recorder: Recorder, asked, *, at_once: int = 64, tenants=(None,), during=None) -> Seen:
    """Ask all, so many at once, for the tenants in turn; `during` is awaited after half of them.

    Each caller asks as soon as the one before it is answered.
    """
    seen, work, done = Seen(), list(zip(asked, itertools.cycle(tenants))), itertools.count(1)
    half, left = len(work) // 2, iter(work)
    reached = asyncio.Event()

    async def caller():
        for question, tenant in left:
            await recorder.aask(question, tenant, seen)
            if next(done) >= half:
                reached.set()
            await asyncio.sleep(0)

    async def meanwhile():
        await reached.wait()
        if during is not None:
            await during()

    await asyncio.gather(meanwhile(), *(caller() for _ in range(at_once)))
    return seen


def threads(recorder: Recorder, asked, *, at_once: int = 64, tenants=(None,), during=None) -> Seen:
    """Do the same with threads; `during` is called by one of them."""
    seen, half = Seen(), len(asked) // 2

    def one(numbered):
        number, (question, tenant) = numbered
        if number == half and during is not None:
            during()
        recorder.ask(question, tenant, seen)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, enumerate(zip(asked, itertools.cycle(tenants)))))
    return seen
