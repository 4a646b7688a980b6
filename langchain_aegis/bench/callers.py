"""Latency and throughput of 1 to 16 callers at once: ChatOllama, ChatAegis, batched, and answered from the cache."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.caches import BaseCache
from langchain_core.language_models import BaseChatModel

from langchain_aegis.batching_chat import BatchingChatModel
from langchain_aegis.bench.chat_ollama import chat_ollama
from langchain_aegis.bench.figures import Figure, Figures, percentile
from langchain_aegis.chat_models import ChatAegis
from langchain_aegis.errors import AegisError
from langchain_aegis.results import was_cached

WAYS = ("ChatOllama", "ChatAegis", "batched", "cached")
BURST_CALLERS, BURST_QUESTIONS = 16, 4
_CACHED_PROMPTS, _CACHED_EACH = 4, 8
_SENTENCE = {"num_predict": 128, "stop": [".", "\n"]}  # only a whole answer is kept
_LETTERS = "bcdfghjklmnpqrstvwxz"


@dataclass(frozen=True, slots=True)
class Answered:
    """One streamed answer: seconds to its first text, seconds to its end, tokens, and whether it was a cached one."""

    first_s: float
    total_s: float
    tokens: int
    cached: bool


class Prompts:
    """Prompts that the server has never seen, so that none is faster because of the one before it.

    Args:
        questions: What they ask.
        seed: Decides about everything.
    """

    def __init__(self, questions: Sequence[str], seed: int) -> None:
        self._questions = questions
        self._draw = random.Random(seed)

    def questions(self, count: int) -> list[str]:
        """Draw so many questions."""
        return self._draw.choices(self._questions, k=count)

    def fresh(self, questions: Sequence[str]) -> list[str]:
        """Return a prompt for each question that differs from all others from its first word on."""
        return [f"{''.join(self._draw.choices(_LETTERS, k=6))}: {question}" for question in questions]


def models(model: str, base_url: str, tokens: int, cache: BaseCache) -> dict[str, BaseChatModel]:
    """Return one model for each of `WAYS`."""
    told: dict[str, Any] = {"base_url": base_url, "temperature": 0, "num_predict": tokens}
    return {
        "ChatOllama": chat_ollama(model, base_url, num_predict=tokens),
        "ChatAegis": ChatAegis(model, cache=False, **told),
        "batched": BatchingChatModel(ChatAegis(model, cache=False, **told)),
        "cached": ChatAegis(model, cache=cache, **told | _SENTENCE),
    }


async def measure(
    ways: dict[str, BaseChatModel], levels: Sequence[int], rounds: int, prompts: Prompts, say: Callable[[str], None]
) -> AsyncIterator[list[Figure]]:
    """Measure round by round, the ways in turn; yields after each round, and at last all figures.

    Args:
        ways: From `models`.
        levels: Numbers of callers.
        rounds: How often everything is done.
        prompts: Where the prompts come from.
        say: Told when a round begins.

    Raises:
        AegisError: The server failed.
    """
    figures, burst = Figures("callers"), Figures("burst")
    for name in ("ChatOllama", "ChatAegis", "batched"):  # connections are opened, the model is loaded
        await _answer(ways[name], prompts.fresh(prompts.questions(1))[0])
    kept = await _keep(ways["cached"], prompts)
    for number in range(rounds):
        say(f"  round {number + 1} of {rounds}")
        for callers in levels:
            turn = WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]  # none always comes first
            questions = [prompts.questions(max(1, 2 // callers)) for _ in range(callers)]  # the same for all ways
            for name in turn:
                if name == "cached":
                    asked = [kept * (_CACHED_EACH // len(kept))] * callers
                else:
                    asked = [prompts.fresh(of_one) for of_one in questions]
                _note(figures, name, callers, *await _level(ways[name], asked))
            for name in ("latency_p50", "throughput"):
                figures.ratio(name, "ChatAegis", "ChatOllama", callers=callers)
            figures.ratio("throughput", "batched", "ChatAegis", callers=callers)
            figures.ratio("latency_p50", "cached", "ChatAegis", callers=callers, inverse=True, as_="times_faster")
        await _burst(burst, ways, prompts, ("ChatAegis", "batched") if number % 2 else ("batched", "ChatAegis"))
        yield []
    yield [*figures.done(), *burst.done()]


async def _keep(model: BaseChatModel, prompts: Prompts) -> list[str]:
    """Return prompts whose answers are in the cache."""
    asked = prompts.fresh(prompts.questions(_CACHED_PROMPTS))
    for prompt in asked:
        await _answer(model, prompt)
    kept = [prompt for prompt in asked if (await _answer(model, prompt)).cached]
    if not kept:
        raise AegisError("no answer was in the cache after it had been made: ask `aegis doctor` about Redis")
    return kept


async def _burst(figures: Figures, ways: dict[str, BaseChatModel], prompts: Prompts, turn: Sequence[str]) -> None:
    """Let 16 callers ask at once, but only four questions: who merges asks the model four times."""
    questions = prompts.questions(BURST_QUESTIONS)
    for name in turn:
        asked = prompts.fresh(questions) * (BURST_CALLERS // BURST_QUESTIONS)
        answers, took_s = await _level(ways[name], [[prompt] for prompt in asked])
        figures.add("throughput", name, len(answers) / took_s, "answers/s", "higher", callers=BURST_CALLERS)
    figures.ratio("throughput", "batched", "ChatAegis", callers=BURST_CALLERS)


def _note(figures: Figures, way: str, callers: int, answers: list[Answered], took_s: float) -> None:
    if way == "cached" and not all(a.cached for a in answers):
        raise AegisError("a cached answer was gone or came too late: the machine or its Redis is too busy to measure")
    totals = [a.total_s for a in answers]
    figures.add("first_token_p50", way, percentile([a.first_s for a in answers], 0.5), "s", callers=callers)
    figures.add("latency_p50", way, percentile(totals, 0.5), "s", callers=callers)
    figures.add("latency_p95", way, percentile(totals, 0.95), "s", callers=callers)
    figures.add("throughput", way, len(answers) / took_s, "answers/s", "higher", callers=callers)
    if way != "cached":  # nothing is generated there
        tokens_s = sum(a.tokens for a in answers) / took_s
        figures.add("tokens", way, tokens_s, "tokens/s", "higher", callers=callers)


async def _level(model: BaseChatModel, asked: Sequence[Sequence[str]]) -> tuple[list[Answered], float]:
    """Let each caller ask its prompts one after another; returns the answers, and the seconds that all of it took."""

    async def caller(prompts: Sequence[str]) -> list[Answered]:
        return [await _answer(model, prompt) for prompt in prompts]

    started = time.perf_counter()
    answers = await asyncio.gather(*(caller(prompts) for prompts in asked))
    return [a for of_one in answers for a in of_one], time.perf_counter() - started


async def _answer(model: BaseChatModel, prompt: str) -> Answered:
    started, first, tokens, cached = time.perf_counter(), None, 0, False
    async for chunk in model.astream(prompt):
        if first is None and chunk.text:
            first = time.perf_counter()
        cached = cached or was_cached(chunk) is not None
        if chunk.usage_metadata:
            tokens += chunk.usage_metadata["output_tokens"]
    ended = time.perf_counter()
    if tokens <= 0:
        raise AegisError("the server does not say how many tokens it wrote; nothing can be measured with it")
    return Answered((first or ended) - started, ended - started, tokens, cached)
