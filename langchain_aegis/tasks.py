"""Tell prompts that want a text worked on from prompts that want a question answered.

"Translate what the user writes" makes a payload of the message, and payloads are matched exactly or not at all: one
letter of a text that is to be corrected decides about the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import islice

from langchain_aegis.lexicon import read

Rules = dict[str, re.Pattern[str]]
Exchange = tuple[str, str]  # what a human said earlier, and the reply

_SENTENCE = re.compile(r"(?<=[.!?;])[\"')]*\s+|\n+|(?<=\w\.)(?=[A-Z][a-z])")
_STOP = re.compile(r"[.!?;](?!\Z)|\n")  # without one there is one sentence
_LABEL_WORDS = 3  # words; a label, not an answer
_LONG_QUOTE = r"(?:[\"“„«](?:[^\"“”„«»\n]{1,400})[\"”“»]|(?<!\w)['‘‚](?:[^'\n]|(?<=\w)'(?=\w)){1,400}['’‘](?!\w))"


def wants_answer(system: Sequence[str], around: Sequence[str], *, marked: bool = False) -> bool:
    """Return whether a prompt's instructions leave the message a question to be answered.

    Args:
        system: The system prompts. If they speak of work or of what is to be made, and nothing tells them to be about
            answering, the message counts as a text to be worked on: "English to Dutch, no comments" can be said in
            too many ways.
        around: What stands before and after the question in its message.
        marked: The caller has said that it is a question; then only a task in plain words makes a text of it.
    """
    told = [text for part in system if (text := normal(part))]
    parts = [*told, *(text for part in around if (text := normal(part)))]
    if not parts:
        return True
    readings = [_read(part) for part in parts]
    if any(reading.answering for reading in readings):
        return not any(reading.orders for reading in readings)
    # Only a prompt that speaks of answering is trusted to tell its documents from its orders.
    readings = [_read(part, documents=2 if i < len(told) else 1) for i, part in enumerate(parts)]
    if any(reading.orders or reading.loosely for reading in readings) or any(map(_tells_work, around)):
        return False
    system_readings = readings[: len(told)]
    return marked or any(r.neutral for r in system_readings) or not any(r.speaks_of_work for r in system_readings)


@lru_cache(maxsize=256)
def _tells_work(part: str) -> bool:
    """Return whether what stands around a question begins by telling what is done with it ("You sort tickets")."""
    rules = _rules()
    first = without_documents(normal(part)[:_BEGINNING]).strip().partition("\n\n")[0]  # documents come later
    return any(
        (rules["you_do"].match(sentence) or _is_ordered(sentence, rules))
        and not rules["about_answers"].search(sentence)
        and not rules["neutral"].match(sentence)
        for sentence in islice(_sentences(first), _TELLING)
    )


@lru_cache(maxsize=1024)
def is_payload(text: str) -> bool:
    """Return whether a message itself says what to do with a text, quotes the text, or is program text."""
    rules = _rules()
    parts = _SENTENCE.split(text) if _STOP.search(text) else (text,)
    if _CODE.search(text) or _ARROW.search(text) or any(_is_ordered(part, rules) for part in parts):
        return True
    if any(
        rules[name].search(text) for name in ("these_texts", "choice_alone", "made", "head_of_task", "language_tail")
    ):
        return True
    # Most questions have neither a colon nor a second sentence: those searches take longer than all others together.
    head, colon, tail = text.partition(":")
    if (
        colon
        and tail.strip()
        and len(head.split()) <= 16
        and (rules["heads"].search(head) or rules["demonstrative"].search(head))
        and not _TIME.search(text)
    ):
        return True
    if (quote := _QUOTE.search(text) if _MARK.search(text) else None) and (
        len(quote.group(0).split()) >= 4 or quote.group(0)[-2] in ".?!" or rules["cited"].search(text)
    ):
        return True
    if "\n" in text and (ends_with_label(text) or not wants_answer((), (text.rpartition("\n")[2],))):
        return True
    asked, mark, rest = text.partition("?")
    if not mark or len(rest.split()) <= 1 or len(asked.split()) > 14:
        return False
    return bool(rules["demonstrative"].search(asked) or rules["heads"].search(asked) or " " not in asked)


def _is_ordered(sentence: str, rules: Rules) -> bool:
    """Return whether a sentence of a message begins with the order to work on a text."""
    lead = rules["leads"].match(sentence)
    verb = rules["verbs"].match(sentence, lead.end() if lead else 0)
    if verb is None:
        return False
    if verb.group(0).lower() not in _NOUNS or rules["object"].match(sentence, verb.end()):
        return True
    return not (sentence.endswith("?") or _NOUN_TAIL.match(sentence, verb.end()))


def is_worked_on(exchanges: Sequence[Exchange]) -> bool:
    """Return whether earlier turns show that messages are worked on: examples of a task, or an order to go on with."""
    if not exchanges:
        return False
    signs = [_signs(asked, reply) for asked, reply in exchanges]
    if any(sign & _ORDERED for sign in signs) or is_payload(exchanges[0][0]):
        return True
    count, machine, alike, back = len(signs), *(sum(s & bit > 0 for s in signs) for bit in (_MACHINE, _ALIKE, _BACK))
    if machine or count == 1:
        return max(machine, alike) * 2 >= count
    return all(sign & _SHORT for sign in signs) or max(alike, back) * 2 >= count


# What an exchange may show: an order; a reply of program text, of the same words, of a question, of a label.
_ORDERED, _MACHINE, _ALIKE, _BACK, _SHORT = (1 << i for i in range(5))


@lru_cache(maxsize=1024)
def _signs(asked: str, reply: str) -> int:
    asked, reply = asked.strip(), reply.strip()
    signs = _ORDERED if _is_ordered(asked, _rules()) else 0
    signs |= _MACHINE if _PROGRAM.match(reply) else 0
    signs |= _BACK if reply.endswith("?") else 0
    if len(reply) <= _LONGEST:
        signs |= _SHORT if len(reply.split()) <= _LABEL_WORDS else 0
        signs |= _ALIKE if _alike(asked, reply) else 0
    return signs


def ends_with_label(text: str) -> bool:
    """Return whether a prompt ends with a label that is no answer's, e.g. "SQLQuery:"."""
    if (tag := _OPENED.search(text)) is not None:  # "<label>"
        return _rules()["answer_labels"].fullmatch(tag[1].replace("_", " ")) is None
    last = text.rstrip().rpartition("\n")[2].strip(" *#_>-").rstrip()
    if len(last.split()) > 6 and (label := _LAST_LABEL.search(last)):  # "Text: ... Title:"
        last = label[1]
    if not last.endswith(":") or len(last) > 80 or len(last.split()) > 6:
        return False
    return _rules()["answer_labels"].fullmatch(last[:-1].strip(" *#_>-")) is None


def without_documents(text: str) -> str:
    """Return `text` without what stands in tags or behind a label that announces documents."""
    rules = _rules()
    text = _without_tagged(text, rules)
    kept, at = [], 0
    while (label := rules["context_label"].search(text, at)) is not None:
        kept.append(text[at : label.start()])
        anew = _ANEW.search(text, label.end())
        at = anew.start() if anew else len(text)
    kept.append(text[at:])
    return "\n".join(kept)


def _without_tagged(text: str, rules: Rules) -> str:
    kept, at = [], 0
    unclosed: set[str] = set()
    for tag in rules["context_tag"].finditer(text):
        if tag.start() < at or tag[1] in unclosed:
            continue
        close = text.find(f"</{tag[1]}>", tag.end())
        if close < 0:
            unclosed.add(tag[1])
            continue
        kept.append(text[at : tag.start()])
        at = close + len(tag[1]) + 3
    return "\n".join([*kept, text[at:]])


@dataclass(slots=True)
class _Reading:
    """What a text says about what is to be done.

    Attributes:
        answering: It speaks of answering questions.
        orders: It plainly orders to work on the message.
        loosely: It orders so, if nothing speaks of answering.
        neutral: It says who the model is, or how it is to speak.
        speaks_of_work: It has a word that may tell what to do with a text, or what to make of it.
    """

    answering: bool
    orders: bool
    loosely: bool
    neutral: bool
    speaks_of_work: bool


@lru_cache(maxsize=256)
def _read(text: str, *, documents: int = 0) -> _Reading:
    """Read instructions; `documents` says how much of the documents in a long text is read with them."""
    rules = _rules()
    if not documents:
        text = without_documents(text)
    beginning, end = _BEGINNING * (documents or 4), _END * (documents or 4)
    if len(text) > beginning + end:  # what is to be done stands before the documents, or behind them
        text = f"{text[:beginning]}\n{text[-end:]}"
    orders = loosely = neutral = work = False
    for sentence in _sentences(text):
        neutral = neutral or rules["neutral"].match(sentence) is not None
        if orders or rules["not_told"].search(sentence):
            continue
        told = rules["negated"].sub(" _ ", sentence)
        kinds = _kinds_of(told)
        work = work or kinds != 0
        orders = _is_order(told, kinds, rules)
        loosely = loosely or _is_loose_order(told, kinds, rules)
    return _Reading(rules["answering"].search(text) is not None, orders, loosely, neutral, work)


def _sentences(text: str) -> Iterator[str]:
    seen = set()
    for part in _SENTENCE.split(_TAG.sub("\n", text)):
        sentence = part.strip(" \t*#->•")
        if sentence and sentence not in seen:
            seen.add(sentence)
            yield from (sentence[i : i + _LONGEST] for i in range(0, len(sentence), _LONGEST))


def _is_order(sentence: str, kinds: int, rules: Rules) -> bool:
    if kinds & _ROLES and rules["you_are_role"].search(sentence):
        return True
    if kinds & _MAKE and rules["query"].search(sentence):
        return True
    product = kinds & _PRODUCT
    if rules["about_answers"].search(sentence) and not (product and rules["product"].search(sentence)):
        return False
    names: tuple[str, ...] = ("work_on",) if kinds & _WORK and kinds & _INPUT else ()
    names += ("work_into",) if kinds & _WORK and kinds & _LANGUAGE else ()
    names += ("your_task", "you_work") if kinds & (_WORK | _MAKE) else ()
    names += ("made_of_it", "made_with") if kinds & _MAKE and product else ()
    return any(rules[name].search(sentence) for name in names)


def _is_loose_order(sentence: str, kinds: int, rules: Rules) -> bool:
    if rules["about_answers"].search(sentence):
        return False
    names: tuple[str, ...] = ("choice",) if kinds & _CLASSES else ()
    names += ("mentioned",) if kinds & _MENTIONED else ()
    low = sentence.lower()
    names += ("json",) if "json" in low else ()
    names += ("tables", "you_are_loosely") if "sql" in low else ()
    names += ("asks_about_input",) if "?" in low else ()
    names += ("one_word",)
    return any(rules[name].search(sentence) for name in names) or bool(kinds & _WORK and rules["lone"].match(sentence))


# Which lists of tasks.toml a word may belong to: a sentence without any is left alone, which is most of a document.
_WORK, _MAKE, _ROLES, _PRODUCT, _CLASSES, _MENTIONED, _INPUT, _LANGUAGE = (1 << i for i in range(8))


def _kinds_of(sentence: str) -> int:
    kinds = 0
    for word in _WORD.findall(sentence.lower()):
        kinds |= _kinds(word)
    return kinds


@lru_cache(maxsize=16_384)
def _kinds(word: str) -> int:
    return sum(bit for bit, pattern in _first_words() if pattern.match(word))


@cache
def _first_words() -> tuple[tuple[int, re.Pattern[str]], ...]:
    """Return for each list a pattern of how the first words of its phrases begin."""
    lists = {
        _WORK: _DATA["work"],
        _MAKE: f"{_DATA['make']} {_DATA['make_query']}",
        _ROLES: _DATA["roles"],
        _PRODUCT: f"{_DATA['product']} {_DATA['languages']}",
        _CLASSES: _DATA["classes"],
        _MENTIONED: _DATA["mentioned"],
        _INPUT: f"{_DATA['input']} {_DATA['whole_begins']}",
        _LANGUAGE: _DATA["languages"],
    }
    return tuple(
        (bit, re.compile("|".join(sorted({b for phrase in text.split() for b in _beginnings(phrase)}))))
        for bit, text in lists.items()
    )


def _beginnings(phrase: str) -> Iterator[str]:
    """Yield the letters that a phrase may begin with; a phrase without such letters as it is."""
    group = _GROUP.match(phrase)
    if group is not None:
        for option in group[1].split("|"):
            yield from _beginnings(option)
        if group[2]:
            yield from _beginnings(phrase[group.end() :])
        return
    letters = _LETTERS.match(phrase)
    plain = letters[0] if letters else ""
    if phrase[len(plain) :].startswith("?"):
        plain = plain[:-1]
    yield plain or phrase


def normal(text: str) -> str:
    """Return `text` with plain apostrophes, without whitespace around it."""
    return text.replace("’", "'").strip()


def _alike(asked: str, reply: str) -> bool:
    """Return whether a reply repeats most words of what was said."""
    one, two = set(_WORD.findall(asked.lower())), set(_WORD.findall(reply.lower()))
    return bool(one) and len(one & two) * 5 >= max(len(one), len(two)) * 3


_ORDERS = ("work_on", "work_into", "your_task", "you_work", "made_of_it", "made_with")
_CODE = re.compile(
    r"```|^\s*(?:select\s.+\sfrom|insert\s+into|def\s+\w+\(|class\s+\w+[:(]|import\s+\w+|#include|print\()\b",
    re.I | re.M,
)
_PROGRAM = re.compile(
    r"\{|\[|<\w|```|(?:select|insert|update|delete|match|with)\s.*(?:\sfrom\s|\sreturn\s|;)", re.I | re.S
)
_WORD = re.compile(r"\w+")
_BEGINNING, _END = 1500, 800  # characters of a text that may be all documents
_TELLING = 3  # sentences at the beginning that tell what is done; further on it may be a document without a label
_LONGEST = 600  # characters of a sentence; documents hold longer ones, tables
_GROUP = re.compile(r"\(\?:([^()]*)\)(\??)")
_LETTERS = re.compile(r"[^\W\d_]+")
_OPENED = re.compile(r"<([A-Za-zÄÖÜäöü_]{1,30})>\s*$")
_LAST_LABEL = re.compile(r"[.?!]\s+([A-ZÄÖÜ][\w-]*:)$")
_TAG = re.compile(r"</?[A-Za-z][\w-]{0,30}>")
_QUOTE = re.compile(_LONG_QUOTE)
_MARK = re.compile("[\"“„«'‘‚]")  # begins a quote
_ARROW = re.compile(r"\s(?:->|=>|→|⇒)\s")
_TIME = re.compile(r"^[^:]*\d:\d")
# A line of a prompt that begins anew: a label, a heading, a tag, a rule.
_ANEW = re.compile(r"^[^\S\n]*(?:#+\s|\*\*|</?\w|-{3,}|={3,}|[A-ZÄÖÜ][\w ]{0,24}:(?=\s|$))", re.M)
_NOUN_TAIL = re.compile(r"\s+(?:of|limits?|names?|numbers?|system|card|status|beer|letter|plan)\b", re.I)


def _alternatives(text: str) -> str:
    words = (word.replace("_?", r"\s*").replace("_", r"\s+") for word in text.split())
    return "|".join(sorted(words, key=len, reverse=True))


_DATA = read("tasks.toml")
_NOUNS = frozenset(_DATA["message"]["nouns"].split())


@cache
def _rules() -> Rules:
    """Return the patterns over the words of tasks.toml."""
    d = {name: f"(?:{_alternatives(text)})" for name, text in _DATA.items() if isinstance(text, str)}
    m = {name: f"(?:{_alternatives(text)})" for name, text in _DATA["message"].items()}
    word = r"(?:[\w/>'-]+\s+)"
    inside = r"(?:(?!(?:in|into|as|to|with|for|of|from|on|zu|mit|aus|als)\s)[\w'-]+\s+)"  # of one noun phrase
    on = rf"(?:{d['which']}\s+{inside}{{0,3}}?{d['input']}|{d['whole']})"
    leads = rf"(?:{m['leads']}\s+)*"
    lead = f"^{leads}"
    choice = rf"\b{d['classes']}\b['\"`]?\s*(?:[,/|]|,?\s*\b{d['between']})\s*['\"`]?(?:not\s+)?{d['classes']}\b"
    version = rf"{d['languages']}\s+(?:version|equivalent|translation|wording|text)"
    product = rf"(?:{d['product']}|{version})"
    patterns = {
        "you_are_role": rf"\b{d['you_are']}\s+{word}{{0,5}}?{d['roles']}\b(?!')|^{d['roles']}\b.{{0,12}}$",
        "work_on": rf"\b{d['work']}\b[^.?!]*?\b{on}(?!\w)|\b{on}\b.{{0,60}}\b{d['work']}\b",
        "work_into": rf"\b{d['work']}\b.{{0,40}}\b(?:to|into|in|as|ins|auf|nach)\s+(?:\w+\s+)?{d['languages']}\b",
        "you_are_loosely": rf"\b{d['you_are']}\s+{word}{{0,5}}?{d['roles_loose']}\b",
        "your_task": rf"\b{d['your_task']}(?!\W+(?:\w+\W+){{0,4}}?{m['serving']}\b)"
        rf".{{0,60}}?\b(?:{d['work']}|{d['make']})\b",
        "you_work": rf"(?:^|[,;:]\s*|\b(?:and|und|that)\s+)(?:you|du|sie)\s+(?:\w+ly\s+)?"
        rf"(?:{d['work']}|writes?|schreibst)\b|"
        rf"\b(?:that|who|which|der|die|das)\s+(?:\w+ly\s+)?(?:{d['work']}|writes?|schreibst)\b",
        "made_of_it": rf"\b{d['make']}\b\W+{inside}{{0,8}}?{product}(?!\w)",
        "made_with": rf"\b(?:answer|reply|respond|antworte)\w*\s+{word}{{0,4}}?(?:with|by|mit)\s+{word}{{0,3}}?"
        rf"{product}(?!\w)",
        "you_do": rf"(?:you|du)\s+(?:\w+ly\s+)?(?!{d['not_doing']}(?!\w))[^\W\d_]{{3,}}(?!\w)",
        "mentioned": rf"\b{d['which']}\s+{inside}?{d['mentioned']}(?!\w)",
        "tables": r"\bsql\w*\b.{0,30}\b(?:tables?|schema|quer\w+|statements?)\b",
        "query": rf"\b{d['make_query']}\s+(?:(?!answer|response)\w+\s+){{0,3}}quer(?:y|ies)\b",
        "product": rf"\b{product}\b",
        "about_answers": rf"\b{d['about_answers']}\b",
        "negated": rf"\b{d['negated']}(?:\s+[\w'-]+)?",
        "not_told": rf"\b{d['not_told']}\b",
        "answering": rf"\b{d['answering']}\b",
        "choice": choice,
        "choice_alone": rf"^(?:{choice}|spam\s+or\s+not)[^?:.]{{0,30}}[:?]|[-–:]\s*{choice}\W*$",
        "one_word": rf"\b{d['one_word']}\b",
        "json": rf"\b(?:{d['make']}|respond)\b.{{0,30}}\bjson\b",
        "asks_about_input": rf"(?:^|:\s*){d['asking']}\b.*\b(?:the|this|that|der|die|das|dies\w+|folgende\w*)\s+"
        rf"(?:author|user|{d['input']})\b.*\?",
        "lone": rf"(?:{d['your_task']}\s*)?{leads}{d['work']}"
        rf"(?:\s+{inside}?(?:code|text|it|them|everything|all))?\W*$",
        "neutral": rf"(?:\w+,\s+)?(?:(?:always|please|immer|bitte|stets)\s+)?{d['neutral']}(?!\w)"
        rf"|.{{0,40}}\b{d['persona']}\b",
        "context_label": rf"^[^\S\n]*(?:[>#*\-]+\s*)?(?:\w+\s+)?{d['context']}(?:\s+(?:is\s+)?(?:below|above))?"
        r"[^\S\n]*(?:\*\*)?[::.].*?$",
        "context_tag": rf"<((?:\w{{1,20}}_)?(?:{d['context']}|doc|chunk)s?)(?:\s[^<>]*)?>",
        "answer_labels": rf"(?!.*(?:sql|code|json)){d['answer_labels']}"
        r"(?:\s+(?:in|auf)\s.{0,30})?(?:\s*\([^)]*\))?",
        "leads": rf"(?:{m['leads']}(?!\w)[\s,:]*)+",
        "verbs": rf"{m['verbs']}(?![\w'])",
        "object": rf"\s+{m['objects']}(?!\w)",
        "these_texts": rf"\b{m['these']}\s+(?:[\w-]+\s+){{0,2}}?{m['texts']}(?!\w)(?!\s+(?:of|from)\b)",
        "made": rf"{lead}{m['makes']}\b\s+(?:[\w-]+\s+){{0,4}}?{m['products']}(?!\w)|^(?:which|what|welche)\s+sql\b",
        "heads": rf"\b(?:{m['heads']}|{d['work']}|{d['languages']})(?!\w)",
        "head_of_task": rf"^(?:(?:in|auf|into|ins|to)\s+{d['languages']}\s*[:,]|{m['heads']}\s+{m['of']}\s+[\"'“]"
        rf"|{m['code']}\b)",
        "language_tail": rf"[-–?.!(,:]\s*(?:\w+\s+)?(?:in|into|to|auf|ins)\s+{d['languages']}"
        r"(?:\s+(?:please|bitte))?\W*$",
        "cited": rf"\b(?:{m['citing']}|(?:in|auf)\s+{d['languages']}|{d['work']}|{m['texts']})\b",
        "demonstrative": rf"\b{m['pointing']}\b",
    }
    flags = {"context_label": re.I | re.M}
    return {name: re.compile(pattern, flags.get(name, re.I)) for name, pattern in patterns.items()}
