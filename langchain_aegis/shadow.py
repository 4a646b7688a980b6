"""How often semantic hits are wrong, measured on a drawn share of them.

A drawn hit is returned as a miss, and the new answer is compared with the one that would have been served. Only
counts are kept.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from typing import NamedTuple

from langchain_aegis.agreement import answers_agree as answers_agree
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.notices import logger

_Z = 1.959964  # of a 95 % interval
_LEAST = 20  # comparisons before an alarm
_STEP = 0.02  # by which an alarm raises the lowest similarity that is served


class Rate(NamedTuple):
    """The share of wrong hits and its 95 % interval (Wilson), all in [0, 1].

    Undecided comparisons count as right in `value` and `low`, as wrong in `high`. Leaving them out would overstate the
    share: answers that differ are far easier to tell than answers that say the same in other words.
    """

    value: float
    low: float
    high: float


class Shadow:
    """Draws hits to be checked, counts what came out, and tightens when too many are wrong.

    As soon as the interval's lower end exceeds `budget`, one warning is logged, `tightening` grows by 0.02, and the
    count starts anew. Nothing is ever loosened again: what a stricter cache no longer serves cannot be measured.

    Args:
        rate: Share of semantic hits that are checked, in [0, 1]; 0.01 to 0.05 is meant.
        budget: Share of wrong hits that is put up with, between 0 and 1.
        draw: Returns numbers in [0, 1).

    Raises:
        AegisConfigError: A number is out of range.
    """

    def __init__(self, rate: float, *, budget: float = 0.05, draw: Callable[[], float] = random.random) -> None:
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
            raise AegisConfigError(f"the shadow rate must be a number in [0, 1], such as 0.02, got {rate!r}")
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < 1:
            raise AegisConfigError(f"the budget of wrong hits must be a number between 0 and 1, got {budget!r}")
        self.rate = rate
        self.budget = budget
        self._draw = draw
        self._checked = self._wrong = self._undecided = self._alarms = 0
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Take a new lock: another thread of the parent may have held the old one. The counts stay."""
        self._lock = threading.Lock()

    def draw(self) -> bool:
        """Return whether this hit is to be checked, and so not served."""
        return self._draw() < self.rate

    def compared(self, agrees: bool | None) -> None:
        """Note whether a new answer said the same as the one that would have been served; None: it cannot be said."""
        with self._lock:
            self._checked += 1
            self._wrong += agrees is False
            self._undecided += agrees is None
            found = self._rate()
            if self._checked < _LEAST or found.low <= self.budget:
                return
            checked, wrong = self._checked, self._wrong
            self._checked = self._wrong = self._undecided = 0
            self._alarms += 1
            tightening = self._alarms * _STEP
        logger.warning(
            "shadow_alarm: %d of %d checked semantic hits were wrong (%.0f %%, 95 %% interval %.0f to %.0f %%, budget "
            "%.0f %%): min_similarity is raised by %.2f in this process; raise min_similarity=, use mode=\"strict\" or "
            "give a verifier=",
            wrong, checked, 100 * found.value, 100 * found.low, 100 * found.high, 100 * self.budget, tightening,
        )  # fmt: skip

    @property
    def checked(self) -> int:
        """Comparisons since the last alarm."""
        return self._checked

    @property
    def wrong(self) -> int:
        """Those of them in which the answers differ."""
        return self._wrong

    @property
    def undecided(self) -> int:
        """Those of them without a result."""
        return self._undecided

    @property
    def alarms(self) -> int:
        """How often the budget was exceeded."""
        return self._alarms

    @property
    def tightening(self) -> float:
        """What is to be added to the lowest cosine similarity that is served; 0.0, or a multiple of 0.02."""
        return round(self._alarms * _STEP, 4)

    def wrong_rate(self) -> Rate:
        """Return the share of checked hits that were wrong since the last alarm; (0, 0, 1) while none was checked."""
        with self._lock:
            return self._rate()

    def _rate(self) -> Rate:
        if not self._checked:
            return Rate(0.0, 0.0, 1.0)
        low, _ = _wilson(self._wrong, self._checked)
        _, high = _wilson(self._wrong + self._undecided, self._checked)
        return Rate(self._wrong / self._checked, low, high)


def _wilson(wrong: int, checked: int) -> tuple[float, float]:
    """Return the 95 % interval of a share."""
    share, spread = wrong / checked, _Z * _Z / checked
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return (max(0.0, middle - half) if wrong else 0.0, min(1.0, middle + half) if wrong < checked else 1.0)
