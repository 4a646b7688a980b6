"""Streams of questions, drawn by seed from the labelled pairs or read from a file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.pairs import Pair

Kind = Literal["repeat", "paraphrase", "new", "trap", "own"]
# The traffic that the research note expects.
REPEATS, PARAPHRASES = 0.5, 0.3


@dataclass(frozen=True, slots=True)
class Request:
    """One question.

    Attributes:
        question: The text.
        kind: What it is to those before it; "own" for a question from a file.
        topic: Two questions may have one answer only if they have the same topic; None: nobody says.
    """

    question: str
    kind: Kind
    topic: str | None


@dataclass(frozen=True, slots=True)
class Stream:
    """What is asked, in order.

    Attributes:
        known: Questions that were asked before, with their topics.
        traffic: The mix itself.
        traps: Questions that look like a known one and have another answer. They are beside the mix, so that its
            shares stay those of the note.
        apart: Topics of which a label says that they differ. None: all do that have different names.
    """

    known: tuple[Request, ...]
    traffic: tuple[Request, ...]
    traps: tuple[Request, ...] = ()
    apart: frozenset[frozenset[str]] | None = None


def draw_mix(pairs: Sequence[Pair], size: int, seed: int) -> Stream:
    """Draw a mix of half exact repeats, 30 % paraphrases and 20 % new questions, and a trap beside each paraphrase.

    Nothing is chosen: one pair of each component, in the order that the seed gives. A trap is of the same question as
    its paraphrase where there is one, else of a question of its own, which is asked before like the others.

    Args:
        pairs: Labelled pairs.
        size: Questions in the mix, a multiple of 10.
        seed: Decides about everything.

    Raises:
        AegisConfigError: There are too few pairs.
    """
    if size < 10 or size % 10:
        raise AegisConfigError(f"a mix has a multiple of 10 questions, got {size}")
    draw = random.Random(seed)
    order = list(pairs)
    draw.shuffle(order)
    topics = _topics(pairs)
    repeats, paraphrases = round(size * REPEATS), round(size * PARAPHRASES)
    used: set[int] = set()

    def take(wanted: int, duplicate: bool) -> list[Pair]:
        found: list[Pair] = []
        for pair in order:
            if len(found) < wanted and pair.duplicate == duplicate and pair.component not in used:
                used.add(pair.component)
                found.append(pair)
        return found

    drawn = take(paraphrases, True)
    traps = [t for p in drawn for t in order if not t.duplicate and t.cached == p.cached and t.new != p.new]
    traps = list({t.cached: t for t in traps}.values())
    beside = take(paraphrases - len(traps), False)
    fresh = [p for p in order if p.component not in used]
    fresh = list({p.component: p for p in fresh}.values())[: size - repeats - paraphrases]
    if len(drawn) < paraphrases or len(fresh) < size - repeats - paraphrases:
        raise AegisConfigError(f"the labelled pairs are too few for a mix of {size} questions")
    asked = list(dict.fromkeys(pair.cached for pair in (*drawn, *beside)))
    traffic = [
        *(Request(q, "repeat", topics[q]) for q in draw.choices(asked, k=repeats)),
        *(Request(pair.new, "paraphrase", topics[pair.new]) for pair in drawn),
        *(Request(pair.cached, "new", topics[pair.cached]) for pair in fresh),
    ]
    draw.shuffle(traffic)
    return Stream(
        known=tuple(Request(q, "new", topics[q]) for q in asked),
        traffic=tuple(traffic),
        traps=tuple(Request(pair.new, "trap", topics[pair.new]) for pair in (*traps, *beside)),
        apart=frozenset(frozenset((topics[p.cached], topics[p.new])) for p in pairs if not p.duplicate),
    )


def read_prompts(path: Path) -> Stream:
    """Read a workload of one's own: JSON lines with `question`, and `source` if it is known.

    Two questions with different sources have different answers; with that, wrong answers are counted.

    Raises:
        AegisConfigError: The file cannot be read, or a line of it; the message names the line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as exc:
        raise AegisConfigError(f"{path} cannot be read: {exc.strerror}") from exc
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: Any = orjson.loads(line)
        except orjson.JSONDecodeError as exc:
            raise AegisConfigError(f"{path}, line {number}: not JSON ({exc})") from exc
        question = row.get("question") if isinstance(row, dict) else None
        if not isinstance(question, str) or not question.strip():
            raise AegisConfigError(f'{path}, line {number}: needs {{"question": "..."}}, and "source" if it is known')
        source = row.get("source")
        found.append(Request(question, "own", source if isinstance(source, str) and source else None))
    if not found:
        raise AegisConfigError(f"{path} holds no question")
    return Stream(known=(), traffic=tuple(found))


def _topics(pairs: Sequence[Pair]) -> dict[str, str]:
    """Return a name for each text that is the same for all that mean the same, directly or in a chain of labels."""
    parent = {text: text for pair in pairs for text in (pair.cached, pair.new)}

    def root(text: str) -> str:
        while parent[text] != text:
            text = parent[text]
        return text

    for pair in pairs:
        if pair.duplicate:
            parent[root(pair.cached)] = root(pair.new)
    return {text: root(text) for text in parent}
