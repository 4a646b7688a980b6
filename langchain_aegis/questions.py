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

_SHORT_INSTRUCTION = 300  # characters; in a longer one a lone verb may come from a retrieved document


@dataclass(frozen=True, slots=True)
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
_ANY_TAG = re.compile(r"</?[A-Za-z][\w-]*(?:\s[^<>]*)?>")


@dataclass(frozen=True, slots=True)
class _Marks:
    question: re.Pattern[str]
    other: re.Pattern[str]
    tag: re.Pattern[str]
    end: re.Pattern[str]


@lru_cache(maxsize=64)
def _marks(labels: Labels) -> _Marks:
    """Return the patterns for `labels`."""
    line = r"^[^\S\n]*(?:[>#*\-]+[^\S\n]*)?(?:{})(?:[^\S\n]*\#?\d+)?[^\S\n]*(?:\*\*)?[::](?:\*\*)?"
    question = line.format(_either(labels.question))
    other = line.format(_either((*labels.other, *labels.question)))
    flags = re.IGNORECASE | re.MULTILINE
    return _Marks(
        question=re.compile(question, flags),
        other=re.compile(other, flags),
        tag=re.compile(rf"<({_either(labels.tags)})>", re.IGNORECASE),
        end=re.compile(rf"{other}|{_BLANK_LINE.pattern}|^[^\S\n]*(?:</?[A-Za-z]|\#|---|===)", flags),
    )


def _either(words: Iterable[str]) -> str:
    """Return a pattern for any of the words, the longest first; a pattern that never matches if there are none."""
    ordered = sorted({word.replace("_", " ") for word in words}, key=len, reverse=True)
    return "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in ordered) or r"(?!)"


def exact_only_reason(question: str, *, instructions: Sequence[str] = ()) -> str | None:
    """Return why this question must not be matched by meaning.

    Args:
        question: What would be embedded.
        instructions: The system prompt and the text around the question.

    Returns:
        "not_a_question" (a text to be worked on, or one that asks nothing), "action" (something is to be done),
        "volatile" (the answer changes from hour to hour), or None if it may be matched.
    """
    rules = _rules()
    text = _normal(question)
    begin = rules.fillers.match(text)
    bare = text[begin.end() :] if begin else text
    if _is_payload(bare, rules) or any(_is_task(_normal(part)) for part in instructions):
        return "not_a_question"
    if _is_action(bare, rules):
        return "action"
    if not _asks(bare, rules):
        return "not_a_question"
    return "volatile" if _is_volatile(bare, rules) else None


def _normal(text: str) -> str:
    return text.replace("’", "'").strip()


def _is_payload(text: str, rules: _Rules) -> bool:
    """Return whether the message itself says what to do with a text, or is program text."""
    if _CODE.search(text):
        return True
    lead = rules.leads.match(text)
    verb = rules.payload.match(text, lead.end() if lead else 0)
    if verb is None:
        return False
    return not (text.endswith("?") and verb.group(0).lower() in rules.payload_nouns)


@lru_cache(maxsize=256)
def _is_task(text: str) -> bool:
    """Return whether an instruction makes every message a text to be worked on.

    Retrieved documents come through here too, so the words of the rules are looked at only where a sentence or a
    clause begins with one of them.
    """
    rules = _rules()
    low = text.lower()
    if any(you in low for you in _YOU) and any(rules.roles.match(text, at.end()) for at in _YOU_ARE.finditer(text)):
        return True
    clauses = dict.fromkeys(_CLAUSE.split(low))
    return any(
        clause[:24].partition(" ")[0] in rules.first_words and _is_order(clause, rules) for clause in clauses
    ) or (len(low) <= _SHORT_INSTRUCTION and any(_is_order(part, rules, lone=True) for part in _SENTENCE.split(low)))


def _is_order(clause: str, rules: _Rules, *, lone: bool = False) -> bool:
    """Return whether a clause orders to work on a text; a `lone` verb orders so without naming the text."""
    lead = rules.leads.match(clause)
    verb = rules.payload.match(clause, lead.end() if lead else 0)
    if verb is None or rules.answers.search(clause):
        return False
    return len(clause.split()) <= 3 if lone else rules.objects.search(clause, verb.end()) is not None


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
    if verb is None or rules.requests.match(text):
        return False
    return not text.endswith("?") or rules.determiners.match(text, verb.end()) is not None


def _asks(text: str, rules: _Rules) -> bool:
    if "?" in text or "?" in text:
        return True
    lead = rules.leads.match(text)
    start = lead.end() if lead else 0
    return bool(
        rules.openings.match(text)
        or rules.requests.match(text)
        or rules.requests.match(text, start)
        or rules.inside.search(text)
    )


def _is_volatile(text: str, rules: _Rules) -> bool:
    text = rules.harmless.sub(" ", text)
    return bool(rules.volatile.search(text) or rules.lower.search(text) or rules.current.search(text))


_CODE = re.compile(
    r"```|^\s*(?:select\s.+\sfrom|insert\s+into|def\s+\w+\(|class\s+\w+[:(]|import\s+\w+|#include)\b", re.I | re.M
)
_SENTENCE = re.compile(r"[.!?:;\n]+[\s\d*-]*")
_CLAUSE = re.compile(r"[.!?:;,\n]+[\s\d*-]*")
_YOU = ("you are", "act as", "you're", "du bist", "agiere als", "handle als")
_YOU_ARE = re.compile(rf"\b(?:{_either(_YOU)})\s+", re.I)


@dataclass(frozen=True, slots=True)
class _Rules:
    """The patterns over the words of questions.toml."""

    fillers: re.Pattern[str]
    leads: re.Pattern[str]
    openings: re.Pattern[str]
    requests: re.Pattern[str]
    inside: re.Pattern[str]
    payload: re.Pattern[str]
    payload_nouns: frozenset[str]
    objects: re.Pattern[str]
    roles: re.Pattern[str]
    first_words: frozenset[str]  # of leads and payload verbs
    answers: re.Pattern[str]
    actions: re.Pattern[str]
    wishes: re.Pattern[str]
    infinitives: re.Pattern[str]
    personal: re.Pattern[str]
    determiners: re.Pattern[str]
    asked_how: re.Pattern[str]
    volatile: re.Pattern[str]
    lower: re.Pattern[str]
    current: re.Pattern[str]
    harmless: re.Pattern[str]


@cache
def _rules() -> _Rules:
    asks, payload, volatile, action = (_DATA[name] for name in ("asks", "payload", "volatile", "action"))

    def any_of(text: str, *, before: str = r"(?<!\w)", after: str = r"(?![\w'])", flags: int = re.I) -> re.Pattern[str]:
        return re.compile(f"{before}(?:{_either(text.split())}){after}", flags)

    return _Rules(
        fillers=re.compile(rf"(?:(?:{_either(asks['fillers'].split())})(?![\w'-])[\s,.!:;–-]*)+", re.I),
        leads=re.compile(rf"(?:(?:{_either(payload['leads'].split())})(?!\w)[\s,:]*)+", re.I),
        openings=any_of(asks["openings"]),
        requests=any_of(asks["requests"]),
        inside=any_of(asks["inside"]),
        payload=any_of(payload["verbs"]),
        payload_nouns=frozenset(payload["nouns"].split()),
        objects=any_of(payload["objects"]),
        roles=re.compile(
            rf"(?:an?\s+|the\s+|ein\w*\s+)?(?:[\w-]+\s+){{0,3}}?(?:{_either(payload['roles'].split())})\b",
            re.I,
        ),
        first_words=frozenset(word.split()[0] for word in _words(f"{payload['leads']} {payload['verbs']}")),
        answers=any_of(payload["answers"]),
        actions=any_of(action["verbs"]),
        wishes=any_of(action["wishes"], after=r"(?!\w)\s+(?:please\s+|bitte\s+)?"),
        infinitives=any_of(action["german_infinitives"]),
        personal=any_of(action["personal"]),
        determiners=any_of(action["determiners"], before=r"\s+"),
        asked_how=any_of(action["asked_how"]),
        volatile=any_of(volatile["words"]),
        lower=any_of(volatile["lower"], flags=0),
        current=re.compile(rf"\bcurrent\b(?!\s+(?:{_either(volatile['current'].split())})\b)", re.I),
        harmless=any_of(volatile["harmless"]),
    )
