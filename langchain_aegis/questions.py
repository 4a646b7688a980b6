"""Which part of a prompt is the question that may be matched by meaning.

Only the question is embedded; everything around it is compared byte for byte. What is no question (a text to
translate, an order to act, a remark) or has another answer tomorrow is answered from the exact tier only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from langchain_aegis.lexicon import read
from langchain_aegis.tasks import Exchange, ends_with_label, is_payload, is_worked_on, normal, wants_answer


@dataclass(slots=True)
class Question:
    """The question and where it stands: `last[start:end] == text`, without whitespace around it."""

    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class NoQuestion:
    """No part of the prompt can be told to be the question.

    Attributes:
        reason: "no_question" (nothing there, or no label in a prompt that is more than a question), "several_labels",
            "too_long", "not_verbatim" (the question that the caller gave does not stand exactly once in the prompt).
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Labels:
    """The words that mark the parts of a prompt, in lower case.

    Attributes:
        question: Stand at the start of a line before a colon; the question follows on that line or the next.
        other: Stand there too and begin something else, so that a question ends before them.
        tags: Names of XML elements that hold the question.
    """

    question: tuple[str, ...]
    other: tuple[str, ...]
    tags: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.replace("_", " ") for word in text.split())


_DATA: dict[str, dict[str, str]] = read("questions.toml")
LABELS = Labels(
    question=_words(_DATA["labels"]["question"]),
    other=_words(_DATA["labels"]["other"]),
    tags=tuple(_DATA["labels"]["tag"].split()),
)


def find_question(
    last: str,
    *,
    others: Sequence[str] = (),
    given: str | None = None,
    labels: Labels = LABELS,
    max_chars: int = 400,
) -> Question | NoQuestion:
    """Find the question in the last human message.

    Args:
        last: Text of the last human message.
        others: Texts of all other messages.
        given: The question, if the caller said it; it must stand exactly once in `last` and nowhere else.
        labels: How prompts mark their parts.
        max_chars: Longest question, in characters.

    Returns:
        The question, with `last == last[:start] + text + last[end:]`, or why there is none.
    """
    if given is not None:
        return _given(last, others, given.strip(), max_chars)
    if _SIGN.search(last) is None:  # there is neither a label nor a tag
        whole = _span(last, 0, len(last), max_chars)
        return NoQuestion("no_question") if isinstance(whole, Question) and _BLANK_LINE.search(whole.text) else whole
    marks = _marks(labels)
    found = [match.end() for match in marks.question.finditer(last)]
    tagged = list(marks.tag.finditer(last))
    if len(found) + len(tagged) > 1:
        return NoQuestion("several_labels")
    if tagged:
        closing = re.compile(f"</{re.escape(tagged[0].group(1))}>", re.IGNORECASE).search(last, tagged[0].end())
        return _span(last, tagged[0].end(), closing.start(), max_chars) if closing else NoQuestion("no_question")
    if found:
        start = found[0]
        if not last[start:].partition("\n")[0].strip():
            start = last.find("\n", start) + 1 or len(last)
        end = marks.end.search(last, start)
        return _span(last, start, end.start() if end else len(last), max_chars)
    whole = _span(last, 0, len(last), max_chars)
    if isinstance(whole, Question) and (
        _BLANK_LINE.search(whole.text) or marks.other.search(last) or _ANY_TAG.search(last)
    ):
        return NoQuestion("no_question")
    return whole


def question_at(last: str, start: int, end: int, *, max_chars: int = 400) -> Question | NoQuestion:
    """Return what stands at `last[start:end]` as the question, if it is one that can be embedded."""
    if not 0 <= start <= end <= len(last):
        return NoQuestion("no_question")
    return _span(last, start, end, max_chars)


def _given(last: str, others: Sequence[str], given: str, max_chars: int) -> Question | NoQuestion:
    if not given:
        return NoQuestion("no_question")
    start = last.find(given)
    if start < 0 or last.find(given, start + 1) >= 0 or any(given in other for other in others):
        return NoQuestion("not_verbatim")
    return _span(last, start, start + len(given), max_chars)


def _span(last: str, start: int, end: int, max_chars: int) -> Question | NoQuestion:
    """Return the span without the whitespace around it, if it is one that can be embedded."""
    part = last[start:end]
    text = part.strip()
    if not text:
        return NoQuestion("no_question")
    if len(text) > max_chars:
        return NoQuestion("too_long")
    start += len(part) - len(part.lstrip())
    return Question(text, start, start + len(text))


_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_SIGN = re.compile(r"[<:#*_]")  # every label and every tag has one
_ANY_TAG = re.compile(r"</?[A-Za-z][\w-]*(?:\s[^<>]*)?>")


_ONLY_A_LABEL = r"^[^\S\n]*(?:[#*]+[^\S\n]*)?[^\W\d_][\w /()-]{0,40}:(?:\*\*)?[^\S\n]*$"


@dataclass(frozen=True, slots=True)
class _Marks:
    question: re.Pattern[str]
    other: re.Pattern[str]
    tag: re.Pattern[str]
    end: re.Pattern[str]


@lru_cache(maxsize=64)
def _marks(labels: Labels) -> _Marks:
    """Return the patterns for `labels`."""
    question = _line(_either(labels.question))
    other = _line(_either((*labels.other, *labels.question)))
    flags = re.IGNORECASE | re.MULTILINE
    return _Marks(
        question=re.compile(question, flags),
        other=re.compile(other, flags),
        tag=re.compile(rf"<({_either(labels.tags)})>", re.IGNORECASE),
        end=re.compile(rf"{other}|{_BLANK_LINE.pattern}|^[^\S\n]*(?:</?[A-Za-z]|\#|---|===)|{_ONLY_A_LABEL}", flags),
    )


def _line(words: str) -> str:
    """Return a pattern for a line that begins with one of the words as a label: with a colon, or as a heading."""
    number = r"(?:[^\S\n]*\#?\d+)?[^\S\n]*"
    colon = rf"(?:[>#*\-]+[^\S\n]*)?(?:{words}){number}(?:\*\*)?:(?:\*\*)?"
    heading = rf"(?:\#{{1,6}}[^\S\n]+(?:\*\*)?|\*\*|__)(?:{words}){number}(?:\*\*|__)?[^\S\n]*$"
    return rf"^[^\S\n]*(?:{colon}|{heading})"


def _either(words: Iterable[str]) -> str:
    """Return a pattern for any of the words, the longest first; a pattern that never matches if there are none."""
    ordered = sorted({word.replace("_", " ") for word in words}, key=len, reverse=True)
    return "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in ordered) or r"(?!)"


def exact_only_reason(
    question: str,
    *,
    system: Sequence[str] = (),
    around: Sequence[str] = (),
    earlier: Sequence[Exchange] = (),
    marked: bool = False,
) -> str | None:
    """Return why this question must not be matched by meaning.

    Args:
        question: What would be embedded.
        system: The system prompts. One that speaks of work and not of answering counts as a task.
        around: What stands before and after the question in its message.
        earlier: What was said earlier, with the replies.
        marked: The caller said which part of the prompt is the question.

    Returns:
        "not_a_question" (a text to be worked on, or one that asks nothing), "action" (something is to be done),
        "volatile" (the answer changes from hour to hour), or None if it may be matched.
    """
    rules = _rules()
    text = normal(question)
    begin = rules.fillers.match(text)
    bare = text[begin.end() :] if begin else text
    if (
        is_payload(bare)
        or not wants_answer(system, around, marked=marked)
        or (around and ends_with_label(around[-1]))
        or is_worked_on(earlier)
    ):
        return "not_a_question"
    if _is_action(bare, rules):
        return "action"
    if not _asks(bare, rules):
        return "not_a_question"
    return "volatile" if _is_volatile(bare, rules) else None


def _is_action(text: str, rules: _Rules) -> bool:
    """Return whether something is to be done, not told."""
    wish = rules.wishes.match(text)
    if wish:
        verb = rules.actions.match(text, wish.end())
        if rules.infinitives.search(text, wish.end()):
            verb = verb or wish
        if verb is None or rules.asked_how.search(text, wish.end()):
            return False
        return (
            wish.group(0).lower().startswith("i") or verb is wish or rules.personal.search(text, wish.end()) is not None
        )
    verb = rules.actions.match(text)
    if verb is None or rules.requests.match(text) or rules.things.match(text, verb.end()):
        return False
    return not text.endswith("?") or rules.determiners.match(text, verb.end()) is not None


def _asks(text: str, rules: _Rules) -> bool:
    if "?" in text:
        return True
    lead = rules.leads.match(text)
    start = lead.end() if lead else 0
    return _is_keywords(text, rules) or bool(
        rules.openings.match(text)
        or rules.requests.match(text)
        or rules.requests.match(text, start)
        or rules.inside.search(text)
    )


def _is_keywords(text: str, rules: _Rules) -> bool:
    """Return whether this is what one types into a search box: a few words that make no sentence."""
    words = text.split()
    return 2 <= len(words) <= 9 and _PUNCTUATION.search(text) is None and rules.sentence.search(text) is None


def _is_volatile(text: str, rules: _Rules) -> bool:
    # Beyond ASCII, letters have more forms than lower case tells: the patterns decide there.
    if text.isascii() and rules.volatile_words.isdisjoint(_WORD.findall(text.lower())):
        return False
    text = rules.harmless.sub(" ", text)
    if _HOW_TO.match(text):
        text = _UPGRADE.sub(" ", text)
    return bool(rules.volatile.search(text) or rules.lower.search(text) or rules.current.search(text))


_HOW_TO = re.compile(
    r"(?:how|wie)\s+(?:do|can|to|should|would|kann|kannst|können|bekomme|installiere|aktualisiere)\b", re.I
)
_UPGRADE = re.compile(
    r"\b(?:latest|newest|neueste\w*|aktuell\w*)\s+(?:\w+\s+)?(?:version|update|release|firmware)\b", re.I
)
_WORD = re.compile(r"\w+")
_PUNCTUATION = re.compile(r"[.,;:!()<>\"“”„\n]")


@dataclass(frozen=True, slots=True)
class _Rules:
    """The patterns over the words of questions.toml."""

    fillers: re.Pattern[str]
    leads: re.Pattern[str]
    openings: re.Pattern[str]
    requests: re.Pattern[str]
    inside: re.Pattern[str]
    sentence: re.Pattern[str]
    actions: re.Pattern[str]
    wishes: re.Pattern[str]
    infinitives: re.Pattern[str]
    personal: re.Pattern[str]
    determiners: re.Pattern[str]
    things: re.Pattern[str]
    asked_how: re.Pattern[str]
    volatile: re.Pattern[str]
    lower: re.Pattern[str]
    current: re.Pattern[str]
    harmless: re.Pattern[str]
    volatile_words: frozenset[str]


def _first_words(text: str) -> frozenset[str]:
    """Return the first words, in lower case, of phrases as `any_of` matches them: a match has one of them in it."""
    return frozenset(_WORD.findall(phrase.replace("_", " ").lower())[0] for phrase in text.split())


@cache
def _rules() -> _Rules:
    asks, volatile, action = (_DATA[name] for name in ("asks", "volatile", "action"))

    def any_of(text: str, *, before: str = r"(?<!\w)", after: str = r"(?![\w'])", flags: int = re.I) -> re.Pattern[str]:
        return re.compile(f"{before}(?:{_either(text.split())}){after}", flags)

    return _Rules(
        fillers=re.compile(rf"(?:(?:{_either(asks['fillers'].split())})(?![\w'-])[\s,.!:;–-]*)+", re.I),
        leads=re.compile(rf"(?:(?:{_either(asks['leads'].split())})(?!\w)[\s,:]*)+", re.I),
        openings=any_of(asks["openings"]),
        requests=any_of(asks["requests"]),
        inside=any_of(asks["inside"]),
        sentence=any_of(asks["sentence"]),
        actions=any_of(action["verbs"]),
        wishes=any_of(action["wishes"], after=r"(?!\w)\s+(?:please\s+|bitte\s+)?"),
        infinitives=any_of(action["german_infinitives"]),
        personal=any_of(action["personal"]),
        determiners=any_of(action["determiners"], before=r"\s+"),
        things=any_of(action["things"], before=r"\s+(?:[\w-]+\s+)?"),
        asked_how=any_of(action["asked_how"]),
        volatile=any_of(volatile["words"]),
        lower=any_of(volatile["lower"], flags=0),
        current=re.compile(rf"\bcurrent\b(?!\s+(?:{_either(volatile['current'].split())})\b)", re.I),
        harmless=any_of(volatile["harmless"]),
        volatile_words=_first_words(f"{volatile['words']} {volatile['lower']} current"),
    )
