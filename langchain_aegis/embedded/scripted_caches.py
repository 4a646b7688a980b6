"""What a runner still knows of earlier prompts: in its slots, and in the host's memory.

As llama-server does it (Ollama 0.33): a free slot whose last text shares more than a tenth of the prompt is taken, the
one that shares most; else the one that was not used for longest. What a slot gives up goes to a cache in the host's
memory, from where it comes back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

_SIMILAR = 0.1  # of the prompt: less does not decide which slot is taken


class PromptCaches:
    """The slots of one loaded model.

    Args:
        slots: How many.
        host_tokens: Tokens that the host's cache keeps; 0: there is none.
    """

    def __init__(self, slots: int, host_tokens: int) -> None:
        self._free: deque[list[str]] = deque([] for _ in range(slots))  # the one that is free for longest first
        self._host_tokens = host_tokens
        self._host: deque[list[str]] = deque()

    def take(self, prompt: Sequence[str]) -> int:
        """Take a slot for `prompt`; returns how many of its tokens need not be read."""
        texts = [(common(prompt, text), at) for at, text in enumerate(self._free)]
        known, at = max(texts, key=lambda pair: (pair[0], -pair[1]), default=(0, None))
        if at is None:
            return 0
        if known <= _SIMILAR * len(prompt):
            known, at = texts[0]
        text = self._free[at]
        del self._free[at]
        kept = max(self._host, key=lambda other: common(prompt, other), default=())
        if (in_host := common(prompt, kept)) > known:
            known = in_host
        if len(text) > known:
            self._keep(text)
        return known

    def give(self, text: list[str]) -> None:
        """Give a slot back that holds `text`: the prompt, and what was generated."""
        self._free.append(text)

    def _keep(self, text: list[str]) -> None:
        if not self._host_tokens:
            return
        self._host = deque(other for other in self._host if common(text, other) < len(other))
        self._host.append(text)
        while sum(map(len, self._host)) > self._host_tokens:
            self._host.popleft()


def common(left: Sequence[str], right: Sequence[str]) -> int:
    """Return how many leading tokens two texts share."""
    low, high = 0, min(len(left), len(right))
    while low < high:  # comparing slices is far quicker than comparing tokens one by one
        middle = (low + high + 1) // 2
        if left[:middle] == right[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
