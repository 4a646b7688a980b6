"""What was expected of caching and batching before anything was measured, beside what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_aegis.bench import client_cost
from langchain_aegis.bench.figures import Figure, find, share_text
from langchain_aegis.bench.rag import Counts
from langchain_aegis.calibration import Share


@dataclass(frozen=True, slots=True)
class Claim:
    """One expectation.

    Attributes:
        said: What was expected.
        by: Who expected it: "research note", or "this package" for what it promises itself.
        measured: What was found here, with its range.
        holds: Whether the whole range agrees; None where it lies on both sides or says nothing.
        reason: Why it is so, where the figure alone may mislead; or "".
    """

    said: str
    by: str
    measured: str
    holds: bool | None
    reason: str = ""


_HIT_RATE = (
    "A fifth of the mix is new and cannot hit without being wrong, so this mix allows 80 % at most. Of the paraphrases "
    "those hit that neither the embedder's threshold nor a guard takes for another question: what is lost there is the "
    "price of serving no trap."
)
_NOTE, _OURS = "research note", "this package"


def check(figures: Sequence[Figure], counts: Counts | None) -> list[Claim]:
    """Return every expectation that this run can say something about.

    Args:
        figures: All that were measured.
        counts: Of the drawn mix; None for prompts of one's own, about which nothing was expected.
    """
    claims = []
    if counts is not None:
        claims += _of_mix(counts)
    for figure in find(figures, name="times_faster", way="cached", callers=1):
        claims.append(Claim("a cached answer comes 10 times faster than a generated one", _NOTE, str(figure),
                            _side(figure, at_least=10)))  # fmt: skip
    for figure in find(figures, workload="rag", name="hit_p50"):
        claims.append(Claim("a cached answer in less than 5 ms", _NOTE, str(figure), _side(figure, at_most=5),
                            "The embedder is part of it, and runs on this machine's processor."))  # fmt: skip
    for figure in find(figures, workload="burst", name="throughput", over="ChatAegis"):
        claims.append(Claim("30 to 50 % more throughput in bursts", _NOTE, str(figure), _side(figure, at_least=1.3),
                            "Of 16 calls, 4 differ. Where nothing can be merged, nothing is won."))  # fmt: skip
    for figure in find(figures, workload="client", name="cpu_invoke", over="ChatOllama"):
        said = f"ChatAegis.invoke costs the client at most 1/8 of ChatOllama.invoke, {client_cost.TOKENS} tokens"
        claims.append(Claim(said, _OURS, str(figure), _side(figure, at_most=client_cost.BAR)))
    return claims


def _of_mix(counts: Counts) -> list[Claim]:
    mix, kind = counts.of("repeat", "paraphrase", "new"), counts.of
    traps = kind("trap")
    paraphrases = Share(kind("paraphrase").hits, kind("paraphrase").asked)
    return [
        Claim("85 to 90 % of all questions are answered from the cache", _NOTE, share_text(mix.hits, mix.asked),
              _share_side(Share(mix.hits, mix.asked), 0.85), _HIT_RATE),
        Claim("every exact repeat hits", _OURS, share_text(kind("repeat").hits, kind("repeat").asked),
              kind("repeat").hits == kind("repeat").asked),
        Claim("35 % of the paraphrases that the seed draws hit", _OURS,
              share_text(paraphrases.count, paraphrases.of),
              paraphrases.rate >= 0.35 or _share_side(paraphrases, 0.35)),
        Claim("no new question hits", _OURS, share_text(kind("new").hits, kind("new").asked), not kind("new").hits),
        Claim("no wrong answer to a trap", _OURS, share_text(traps.wrong, traps.asked), not traps.wrong,
              "The guards were made with these pairs in sight; benchmarks/quality.md has others."),
    ]  # fmt: skip


def _share_side(share: Share, at_least: float) -> bool | None:
    """Say whether the share reaches a bound; a small sample that could come from either side of it says nothing."""
    low, high = share.interval()
    return True if low >= at_least else False if high < at_least else None


def _side(figure: Figure, *, at_least: float | None = None, at_most: float | None = None) -> bool | None:
    if at_least is not None:
        return True if figure.low >= at_least else False if figure.high < at_least else None
    if at_most is not None:
        return True if figure.high <= at_most else False if figure.low > at_most else None
    return None


def summary(figures: Sequence[Figure], counts: Counts | None) -> dict[str, float]:
    """Return the few numbers that a script wants to watch; those that were not measured are left out.

    Shares are in [0, 1], ratios medians of the rounds: their ranges stand with the figures.
    """
    watched: dict[str, dict[str, Any]] = {
        "client_cpu_ratio": {"workload": "client", "name": "cpu_invoke", "over": "ChatOllama"},
        "cached_times_faster": {"workload": "callers", "name": "times_faster", "callers": 1},
        "burst_throughput_ratio": {"workload": "burst", "over": "ChatAegis"},
        "rag_times_faster": {"workload": "rag", "name": "times_faster"},
    }
    told = {name: f.median for name, wanted in watched.items() for f in find(figures, **wanted)}
    if counts is not None:
        asked = {kind: counts.of(kind) for kind in counts.kinds}
        told |= {f"{kind}_hit_share": tally.hits / tally.asked for kind, tally in asked.items() if kind != "first"}
        mix = counts.of("repeat", "paraphrase", "new", "own")
        told |= {"hit_share": mix.hits / mix.asked, "wrong_answers": len(counts.wrong)}
    return {name: round(value, 4) for name, value in told.items()}


def as_text(claim: Claim) -> str:
    """Return whether it holds, in one word."""
    return {True: "holds", False: "does not hold", None: "undecided"}[claim.holds]
