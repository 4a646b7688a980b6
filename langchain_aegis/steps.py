"""What a lookup's flow asks for beside Redis; whoever drives it does that, blocking or awaited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from langchain_aegis.flows import Flow


@dataclass(frozen=True, slots=True)
class Embed:
    """Ask the embedder for one text's vector; answered by a sequence of numbers."""

    text: str


@dataclass(frozen=True, slots=True)
class Verify:
    """Ask the verifier whether one answer serves both questions; answered by a number in [0, 1]."""

    cached: str
    new: str


@dataclass(frozen=True, slots=True)
class Work:
    """Do what takes some milliseconds of CPU, off an event loop; answered by what it returns."""

    do: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Aside:
    """Run a flow of commands soon; nobody waits for it."""

    flow: Callable[[], Flow[None]]


@dataclass(frozen=True, slots=True)
class Wait:
    """Let some time pass."""

    seconds: float
