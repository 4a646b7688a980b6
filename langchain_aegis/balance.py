"""Which of several servers of one model a call goes to: to the least busy, unless another one knows its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from langchain_aegis.queues import LONG_PREFIX


@dataclass(frozen=True, slots=True)
class Candidate:
    """What counts of one server.

    Attributes:
        up: Calls may be sent there.
        slots: Calls that it gets at once; at least 1.
        busy: Calls of this process that run or wait there.
        shared: Leading blocks that the prompt has in common with one that was sent there recently.
        last: When it was chosen last, in any unit that grows; decides between equals.
    """

    up: bool
    slots: int
    busy: int
    shared: int = 0
    last: int = 0


def in_order(candidates: Sequence[Candidate]) -> list[int]:
    """Return the positions of the servers that are up, in the order in which to ask them."""

    def load(at: int) -> tuple[float, int]:
        one = candidates[at]
        return (one.busy + 1) / one.slots, one.last  # with this call: a free server of 8 slots goes before one of 4

    order = sorted((at for at, one in enumerate(candidates) if one.up), key=load)
    if order:
        knows = max(order, key=lambda at: candidates[at].shared)  # of equals the least busy
        known = candidates[knows]
        if known.shared >= LONG_PREFIX and not _clearly_busier(known, candidates[order[0]]):
            order.remove(knows)
            order.insert(0, knows)
    return order


def _clearly_busier(one: Candidate, least: Candidate) -> bool:
    """Whether waiting for `one` costs more than reading the prompt anew at the least busy.

    A free slot is used at once. Where all have to wait, one more service time is worth a prompt that is known.
    """
    if one.busy < one.slots:
        return False
    return least.busy < least.slots or one.busy / one.slots > least.busy / least.slots + 1
