"""Whether two answers say the same.

A model words every answer anew, so only what can be seen is decided: contradictions (numbers, names, code, yes or no,
negation) and near identity. The rest stays open.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration

from langchain_aegis.entries import decode_answer, decode_value
from langchain_aegis.lexicon import lexicon
from langchain_aegis.profiles import DENYING, DIGEST, NEGATED, Profile
from langchain_aegis.verification import compare, profile

_MOST_CHARACTERS = 6_000  # of an answer that are read
_MOST_SENTENCES = 60
_ALIGNED = 0.5  # overlap from which two sentences are about the same
_CLOSE = 0.7  # overlap from which a negation turns a sentence round instead of wording it in another way
_SAME_WORDS, _OTHER_WORDS = 0.9, 0.15  # overlap alone
_SAME, _OTHER = 0.75, 0.5  # overlap and similarity together
_WEIGHT = 0.6  # of the similarity in that
_UNRELATED = "The ferry to the island leaves from the old harbour."

_MARKUP = re.compile(r"(?m)^\s*(?:#+|[-*•>]|\d{1,2}[.)])\s+|\*\*|__|```\w*|`")
_SENTENCE = re.compile(r"(?<=[.!?:;])\s+|\n+")
_DIGITS = re.compile(r"\d+(?:[.,:]\d+)*")
_CODE = re.compile(
    r"(?<![\w-])--?[^\W\d][\w-]*|[^\W\d]\w*(?=\()|\b\w*[^\W\d]_\w+|\b[^\W_]+\.[a-z]{2,5}\b"
    r"|\b(?=\w*\d)(?=\w*[A-Z])[A-Z0-9]\w+(?:-\w+)*"
)
_POLARITY = re.compile(r"\W*(?:(yes|ja|yep|certainly|natürlich)|(no|nein|nope))\b(?!\s+\w+\s+(?:later|longer))", re.I)
_NOT_ONLY = re.compile(r"\b(?:not (?:only|just)|nicht nur)\b", re.I)  # denies nothing
_SPACE = re.compile(r"\s+")


def answers_agree(
    old: bytes,
    new: bytes,
    *,
    similar: Callable[[str, str], float] | None = None,
    compare_answers: Callable[[str, str], bool] | None = None,
) -> bool | None:
    """Return whether two encoded answers say the same; None where that cannot be said.

    Takes some milliseconds of CPU for long answers, and more for `similar`: not for an event loop.

    Args:
        old: What `entries.encode_answer` or `encode_value` wrote.
        new: The same.
        similar: Cosine similarity of two texts. Its scale is taken from what it says about an unrelated text.
        compare_answers: The user's own rule for texts; replaces all others.

    Raises:
        Exception: Whatever `similar` or `compare_answers` raise.
    """
    mine, theirs = _content(old), _content(new)
    if mine is None or theirs is None:
        return None

    def texts(one: str, other: str) -> bool | None:
        if compare_answers is not None:
            return bool(compare_answers(one, other))
        return texts_agree(one, other, similar=similar)

    return _agree(mine, theirs, texts)


def texts_agree(old: str, new: str, *, similar: Callable[[str, str], float] | None = None) -> bool | None:
    """Return whether two texts say the same; see `answers_agree`."""
    if _normal(old) == _normal(new):
        return True
    one, other = _Text.read(old), _Text.read(new)
    if _contradict(one, other):
        return False
    if one.says and one.says == other.says and not (one.whole.terms and other.whole.terms):
        return True  # "Yes." and "Yes, you can."
    overlap = _overlap(one.whole, other.whole)
    if similar is None:
        return True if overlap >= _SAME_WORDS else False if overlap <= _OTHER_WORDS else None
    nothing = min(max(similar(old, _UNRELATED), 0.0), 0.95)
    similarity = (similar(old, new) - nothing) / (1 - nothing)
    score = _WEIGHT * similarity + (1 - _WEIGHT) * overlap
    if score >= _SAME:
        return True
    figures = _counted(one.whole)
    # The same figures in other words: not a reason to say that they are about something else.
    return False if score <= _OTHER and not (figures and figures == _counted(other.whole)) else None


def _content(data: bytes) -> Any:
    """Return what an encoded answer holds, as a text or plain JSON; None if it holds nothing that can be compared."""
    generations = decode_answer(data)
    if generations is not None:
        items = [_said(g.message) if isinstance(g, ChatGeneration) else g.text for g in generations]
        return items[0] if len(items) == 1 else items
    value = decode_value(data)
    if value is None:
        return None
    if isinstance(value[1], list):
        return [_said(item) for item in value[1]]
    return _said(value[1])


def _said(value: Any) -> Any:
    if not isinstance(value, AIMessage):
        return value
    calls = [{"name": call["name"], "args": call["args"]} for call in value.tool_calls]
    return {"text": value.text, "calls": calls} if calls else value.text


def _agree(old: Any, new: Any, texts: Callable[[str, str], bool | None]) -> bool | None:
    """Compare plain JSON: texts by their meaning, everything else exactly."""
    if isinstance(old, str) and isinstance(new, str):
        return texts(old, new)
    if isinstance(old, dict) and isinstance(new, dict):
        if old.keys() != new.keys():
            return False
        return _all(_agree(old[name], new[name], texts) for name in old)
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return False
        return _all(_agree(one, other, texts) for one, other in zip(old, new, strict=True))
    return type(old) is type(new) and bool(old == new)


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    found = set(verdicts)
    return False if False in found else None if None in found else True


def _normal(text: str) -> str:
    plain = _MARKUP.sub("", unicodedata.normalize("NFKC", text))
    return _SPACE.sub(" ", plain).strip(" .!\n\"'").casefold()


@dataclass(slots=True)
class _Text:
    """An answer as it is compared."""

    whole: Profile
    sentences: list[tuple[Profile, str]]
    digits: frozenset[str]
    code: frozenset[str]
    says: str  # "yes", "no" or ""

    @staticmethod
    def read(text: str) -> _Text:
        plain = _NOT_ONLY.sub("", _MARKUP.sub("", unicodedata.normalize("NFKC", text)[:_MOST_CHARACTERS]))
        start = _POLARITY.match(plain)
        rest = plain[start.end() :] if start else plain  # "No, we do not": one denial, not two
        parts = [part for part in _SENTENCE.split(rest) if part.strip()][:_MOST_SENTENCES]
        return _Text(
            whole=profile(plain),
            sentences=[(profile(part), part) for part in parts],
            digits=_digits(plain),
            code=_code(plain),
            says="" if start is None else "yes" if start[1] else "no",
        )


def _digits(text: str) -> frozenset[str]:
    return frozenset(found.replace(",", "").replace(".", "") for found in _DIGITS.findall(text))


def _code(text: str) -> frozenset[str]:
    return frozenset(_CODE.findall(text))


def _contradict(one: _Text, other: _Text) -> bool:
    if one.says and other.says and one.says != other.says:
        return True
    if _apart(one.whole.names, other.whole.names) or _apart(one.code, other.code):
        return True
    mine, theirs = _counted(one.whole), _counted(other.whole)
    if mine.isdisjoint(theirs) and _numbers_differ(one.whole, other.whole, one.digits, other.digits):
        return True
    if one.whole.language != other.whole.language and min(len(one.whole.terms), len(other.whole.terms)) > 4:
        return bool(one.whole.language and other.whole.language)
    return any(_sentences_contradict(a, b) for a, b in _aligned(one.sentences, other.sentences))


def _apart(one: Set[Any], other: Set[Any]) -> bool:
    """Return whether both name something, and nothing of it is the same."""
    return bool(one and other) and one.isdisjoint(other)


def _mutual(one: Set[Any], other: Set[Any]) -> bool:
    return bool(one - other) and bool(other - one)


def _counted(one: Profile) -> frozenset[int]:
    return (one.numbers | one.quantities) - one.weak_numbers


def _numbers_differ(one: Profile, other: Profile, mine: frozenset[str], theirs: frozenset[str]) -> bool:
    """Return whether each has a number that the other lacks.

    "28 days", "28 paid days": with the same figures it takes two quantities.
    """
    if not _mutual(_counted(one), _counted(other)):
        return False
    return mine != theirs or not mine or _mutual(one.quantities, other.quantities)


def _aligned(
    one: list[tuple[Profile, str]], other: list[tuple[Profile, str]]
) -> Iterable[tuple[tuple[Profile, str], tuple[Profile, str]]]:
    """Yield the pairs of sentences that are about the same, each the best match of the other."""
    found = [
        (overlap, -abs(at - beside), -at - beside, at, beside)  # of equals those in the same place; both ways alike
        for (at, a), (beside, b) in itertools.product(enumerate(one), enumerate(other))
        if (overlap := _overlap(a[0], b[0])) >= _ALIGNED
    ]
    mine, theirs = set(range(len(one))), set(range(len(other)))
    for *_, at, beside in sorted(found, reverse=True):
        if at in mine and beside in theirs:
            mine.remove(at)
            theirs.remove(beside)
            yield one[at], other[beside]


def _sentences_contradict(one: tuple[Profile, str], other: tuple[Profile, str]) -> bool:
    (a, mine), (b, theirs) = one, other
    if _numbers_differ(a, b, _digits(mine), _digits(theirs)) or _mutual(_code(mine), _code(theirs)):
        return True
    if "exclusive" in (guards := compare(a, b)):
        return True
    if _overlap(a, b) < _CLOSE and max(_odd(a, b), _odd(b, a)) > 1:
        return False
    turned = bool((a.flags ^ b.flags) & NEGATED)
    if "antonym" in guards:
        return not turned  # "not enabled" is "disabled"
    return turned and not (a.flags | b.flags) & DENYING


def _overlap(one: Profile, other: Profile) -> float:
    """Return the share of the terms that both have, synonyms included, in [0, 1]."""
    if not one.terms or not other.terms:
        return 0.0
    both = 1 - _odd(one, other) / len(one.terms), 1 - _odd(other, one) / len(other.terms)
    return 2 * both[0] * both[1] / (sum(both) or 1.0)


def _odd(one: Profile, other: Profile) -> int:
    """Return how many terms of one text the other does not have, not even as a synonym."""
    related = lexicon().related
    return sum(
        bool(term & DIGEST) or related.get(term, frozenset()).isdisjoint(other.terms)
        for term in one.terms - other.terms
    )
