"""What one long answer costs the client's processor: ChatAegis and ChatOllama on one scripted server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

from langchain_core.language_models import BaseChatModel

from langchain_aegis.bench.chat_ollama import aclose, chat_ollama
from langchain_aegis.bench.figures import Figure, Figures
from langchain_aegis.chat_models import ChatAegis

TOKENS = 512
BAR = 1 / 8  # of what ChatOllama.invoke costs
_PROMPT = "Tell me all about libraries. " * 20


def measure(base_url: str, rounds: int) -> Iterator[list[Figure]]:
    """Measure round by round, interleaved; yields after each, and at last all figures.

    Args:
        base_url: Of a scripted server in another process.
        rounds: How often everything is done.
    """
    models: dict[str, BaseChatModel] = {
        "ChatOllama": chat_ollama("scripted", base_url, num_predict=TOKENS),
        "ChatAegis": ChatAegis("scripted", base_url=base_url, temperature=0, num_predict=TOKENS, cache=False),
    }
    figures = Figures("client")
    with asyncio.Runner() as runner:
        calls = {name: _calls(model, runner) for name, model in models.items()}
        for _, call in (pair for ways in calls.values() for pair in ways.items()):
            call()  # connections are opened, modules imported
        for _ in range(rounds):
            for how in ("invoke", "ainvoke", "stream", "astream"):
                for name in models:
                    figures.add(f"cpu_{how}", name, _cpu_s(calls[name][how]) * 1e3, "ms")
                figures.ratio(f"cpu_{how}", "ChatAegis", "ChatOllama")
            yield []
        runner.run(aclose(models["ChatOllama"]))
    yield figures.done()


def _calls(model: BaseChatModel, runner: asyncio.Runner) -> dict[str, Callable[[], Any]]:
    async def read() -> None:
        async for _ in model.astream(_PROMPT):
            pass

    return {
        "invoke": lambda: model.invoke(_PROMPT),
        "ainvoke": lambda: runner.run(_awaited(model)),
        "stream": lambda: [None for _ in model.stream(_PROMPT)],
        "astream": lambda: runner.run(read()),
    }


async def _awaited(model: BaseChatModel) -> None:
    await model.ainvoke(_PROMPT)


def _cpu_s(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started
