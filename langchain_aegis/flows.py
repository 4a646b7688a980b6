"""Write an algorithm once, and run it blocking or awaited.

A flow is a generator that yields what it needs from outside (a round trip, a vector) and is sent the answer. `run`
and `arun` drive it; what goes wrong outside is thrown into the flow, which decides what that means.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")

# The steps of a flow are of several kinds and their answers differ, so both are Any: keep flows short.
Flow: TypeAlias = Generator[Any, Any, T]


@dataclass(frozen=True, slots=True)
class Settle:
    """Step: wait until what somebody else does is over, but not for longer than some seconds."""

    done: Future[None]
    seconds: float


def run(flow: Flow[T], perform: Callable[[Any], Any]) -> T:
    """Drive a flow with blocking calls; what `perform` raises is thrown into the flow."""
    resume: Callable[[Any], Any] = flow.send
    answer: Any = None
    try:
        while True:
            step = resume(answer)
            try:
                answer, resume = perform(step), flow.send
            except Exception as exc:  # the flow decides what it means, or lets it out
                answer, resume = exc, flow.throw
    except StopIteration as done:
        result: T = done.value
        return result


async def arun(flow: Flow[T], perform: Callable[[Any], Awaitable[Any]]) -> T:
    """Drive a flow with awaited calls; what `perform` raises is thrown into the flow."""
    resume: Callable[[Any], Any] = flow.send
    answer: Any = None
    try:
        while True:
            step = resume(answer)
            try:
                answer, resume = await perform(step), flow.send
            except Exception as exc:  # the flow decides what it means, or lets it out
                answer, resume = exc, flow.throw
    except StopIteration as done:
        result: T = done.value
        return result
