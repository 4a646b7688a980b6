"""The vocabulary of the package, read from data files once per process."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from importlib.resources import files
from itertools import chain, count
from typing import Any

_DATA = files("langchain_aegis") / "data"
_FILES = ("languages.toml", "guards.toml", "classes.toml", "opposites.toml", "synonyms.toml", "wordnet.toml")
LANGUAGES = ("", "en", "de", "fr", "es", "it", "nl", "pt")  # a profile stores the position; "" is undecided
QUIET = 30  # up to this number in a frame: words such as "the" and "can", which may come and go
SYMMETRIC, AUXILIARY, AGENT = 8, 16, 32  # "and", "between"; "was" and "by" of a passive
MODES = ("strict", "balanced", "lenient")


@dataclass(slots=True)
class Word:
    """What the lexicon knows about one form. A form that nothing is known about has no `Word`."""

    number: int = 0  # of the form in the lexicon, from 1; 0 if it has no content of its own
    stop: bool = False
    frame: int = 0  # of a form without content: a number from 1 to 255 that tells it from most others
    negation: bool = False
    soft_negation: bool = False
    question: str = ""
    value: float | None = None
    factor: float | None = None
    ordinal: int | None = None
    weak: bool = False
    unit: tuple[str, float] | None = None
    exclusive: tuple[int, ...] = ()  # 256 * set + class
    opposites: tuple[int, ...] = ()  # 2 * pair + side
    shape: int = 0  # bit of the wish about the answer's form
    direction: str = ""  # "from" | "to" | "convert"


# Second word -> (the words after it, the phrase as one form), the longest first.
Phrases = dict[str, list[tuple[tuple[str, ...], str]]]
Codes = dict[str, tuple[int, ...]]


@dataclass
class Table:
    """The forms of one language; keys are lower case, except those that match only as they are written.

    Most of the twenty thousand forms are never asked for, so a `Word` is made when it is.
    """

    language: str
    words: dict[str, int] = field(default_factory=dict)  # form -> its number
    special: dict[str, Word] = field(default_factory=dict)  # what more is known about a form; and what `find` made
    stops: frozenset[str] = frozenset()  # forms without content
    exclusive: Codes = field(default_factory=dict)
    opposites: Codes = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)  # form -> stem, as far as the builder needed it

    def find(self, form: str) -> Word | None:
        """Return what is known about a form, or None."""
        word = self.special.get(form)
        if word is None and form in self.words:
            exclusive, opposites = self.exclusive.get(form, ()), self.opposites.get(form, ())
            word = self.special[form] = Word(self.words[form], exclusive=exclusive, opposites=opposites)
        return word

    def find_stem(self, base: str) -> Word | None:
        """Return what is known about the form that has this stem, or None."""
        form = self.stems.get(base)
        return None if form is None else self.find(form)

    @cached_property  # a process that never sees a German question does not pay for German stems
    def stems(self) -> dict[str, str]:
        """Stem -> a form that has it: rather one with content ("allowance" is rather of "allow" than of "allowed")."""
        found: dict[str, str] = {}
        base_of, bases, self.bases = _STEMMERS[self.language], self.bases, {}
        for form in sorted(self.words, key=self.stops.__contains__):
            if "_" not in form:
                found.setdefault(bases.get(form) or base_of(form), form)
        return found

    @cached_property
    def phrases(self) -> dict[str, Phrases]:
        """First word of a phrase, and its stem -> how it goes on."""
        found: dict[str, Phrases] = {}
        for form in sorted((form for form in self.words if "_" in form), key=self.stops.__contains__):
            first, second, *rest = form.split("_")
            for key in {first, stem(first, self.language)}:
                ways = found.setdefault(key, {}).setdefault(second, [])
                ways.append((tuple(rest), form))
                if len(ways) > 1:
                    ways.sort(key=lambda way: len(way[0]), reverse=True)
        return found


@dataclass(slots=True)
class Lexicon:
    """Everything that verification needs, in lookups of one step."""

    fingerprint: bytes  # 2 bytes; numbers in a stored profile mean something only under the same one
    tables: dict[str, Table]
    votes: dict[str, int]  # form -> the sum of 1 << 16 * position in LANGUAGES
    related: dict[int, frozenset[int]]  # number of a form -> its own and those of others that may stand for it, if any
    graded: frozenset[int]  # qualities that have an opposite, words that deny
    light: frozenset[int]
    relations: frozenset[int]
    acts: frozenset[int]  # verbs that say what is done
    category: frozenset[int]  # what a name may be introduced with
    implied: tuple[frozenset[int], ...]  # per question code: what its question word asks for already
    alternatives: frozenset[int]  # qualities, and members of exclusive sets that narrow a question down
    reversible: dict[int, frozenset[int]]  # number of a member -> the exclusive sets in which two may change places
    conflicts: frozenset[tuple[int, int]]  # positions in `questions`
    what: int  # position in `questions`; "what" may ask for anything that `implied` names
    asks: frozenset[str]  # words after which a question word begins the question itself ("could you tell me when")
    subjects: frozenset[str]  # English: what "when" begins a clause with
    questions: tuple[str, ...]  # codes of question words; a profile stores the position
    codes: dict[str, int]  # the same the other way round; "" is "command"
    yes_no: dict[str, dict[str, str]]  # per language: first word -> question code
    parts: dict[int, frozenset[int]]  # number of a phrase -> numbers of its words, if those have content
    phrases: frozenset[int]  # the keys of `parts`
    separable: frozenset[str]
    particles: frozenset[str]  # German: stand at the end and belong to the verb ("melde ... an")
    before_noun: frozenset[str]  # German: what stands before is the verb of a question
    not_prefixed: tuple[str, ...]
    marks: dict[str, int]  # form -> sum of SYMMETRIC, AUXILIARY, AGENT


def read(name: str) -> dict[str, Any]:
    """Return one data file, parsed."""
    return _parsed((_DATA / name).read_bytes())


def _parsed(raw: bytes) -> dict[str, Any]:
    text = raw.decode("utf-8")
    if "\\" not in text and "'''" not in text:
        # Without escapes the two kinds of long strings are the same, and tomllib reads this kind ten times as fast.
        text = text.replace('"""', "'''")
    return tomllib.loads(text)


@cache
def thresholds(embedder: str, mode: str) -> tuple[float, bool]:
    """Return the similarity from which on a candidate is worth verifying.

    Args:
        embedder: Name of the embedding model, with or without an Ollama tag or a directory.
        mode: "strict", "balanced" or "lenient".

    Returns:
        The cosine similarity, and whether it was measured for this embedder.

    Raises:
        ValueError: There is no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    data = read("thresholds.toml")
    name = embedder.rsplit("/", 1)[-1].split(":", 1)[0].lower()
    name = data["aliases"].get(name, name)
    known = name in data["embedders"]
    return float(data["embedders"][name][mode] if known else data["unknown"][mode]), known


@cache
def lexicon() -> Lexicon:
    """Return the lexicon; the first call reads the data files (some hundred milliseconds)."""
    return _Builder().build()


@lru_cache(maxsize=1 << 14)
def stem(word: str, language: str) -> str:
    """Return `word` (lower case) without its inflection. Rough: it only has to be the same for both of two texts."""
    return _stem_de(word) if language == "de" else _stem_en(word)


_IRREGULAR: dict[str, str] = {}  # English: "bought" -> "buy"; filled with the lexicon


def _stem_en(word: str) -> str:
    if "'" in word and word.endswith(("'s", "s'")):
        word = word[:-2]
    word = _IRREGULAR.get(word, word)
    size = len(word)
    if size < 4:
        return word
    last = word[-1]
    if last == "s":
        if word.endswith("ies") and size > 4:
            word = word[:-3] + "y"
        elif word.endswith(("sses", "shes", "ches", "xes", "zes")):
            word = word[:-2]
        elif not word.endswith(("ss", "us", "is")):
            word = word[:-1]
    elif last == "d" and word.endswith("ied") and size > 4:
        return word[:-3] + "y"
    elif (last == "g" and word.endswith("ing") and size > 5) or (last == "d" and word.endswith("ed") and size > 4):
        cut = word[:-3] if last == "g" else word[:-2]
        if not _VOWELS.isdisjoint(cut):
            if len(cut) > 3 and cut[-1] == cut[-2] and cut[-1] not in "sf" and (cut[-1] != "l" or len(cut) > 5):
                return cut[:-1]
            word = cut + "e" if _SHORT.fullmatch(cut) else cut
    last = word[-1]
    for ending in _EN_DERIVED.get(last, ()):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word[:-1] if last == "e" and len(word) > 3 and not _SHORT.fullmatch(word[:-1]) else word


_VOWELS = frozenset("aeiouy")
_SHORT = re.compile(r"[^aeiouy]*[aeiouy][^aeiouywx]")  # "rat": with an "e" it is another word, and "rating" is of that
# By the last letter; "formation" is "form".
_EN_DERIVED = {"n": ("ation", "ition", "ion"), "t": ("ment",), "e": ("ance", "ence", "ate"), "y": ("ity",)}
_FOLD = str.maketrans({"ä": "a", "ö": "o", "ü": "u", "ß": "ss"})
_DE_ENDINGS = "ungen keiten ern ten en n", "ung", "keit tet est et st t", "er", "em", "es s", "te e"
_DE_ENDINGS_BY_LETTER = {endings[-1]: tuple(endings.split()) for endings in _DE_ENDINGS}


def _stem_de(word: str) -> str:
    if not word.isascii():
        word = word.translate(_FOLD)
    size = len(word)
    if size > 4:
        for ending in _DE_ENDINGS_BY_LETTER.get(word[-1], ()):
            if word.endswith(ending) and size - len(ending) >= 4:
                return word[: -len(ending)]
    return word


_STEMMERS = {"en": _stem_en, "de": _stem_de}
_BOTH = ("en", "de")


class _Builder:
    """Joins the data files into a `Lexicon`."""

    def __init__(self) -> None:
        self.tables = {language: Table(language) for language in _BOTH}
        self.related: dict[int, frozenset[int]] = {}
        self.numbers: dict[str, int] = {}
        self.not_english: set[str] = set()
        self.not_german: set[str] = set()
        self.pairs = 0  # of opposites

    def build(self) -> Lexicon:
        """Read all files and return the finished lexicon."""
        raw = [(_DATA / name).read_bytes() for name in _FILES]
        languages, guards, classes, opposites, synonyms, wordnet = map(_parsed, raw)
        self.not_english = set(guards["homographs"]["not_english"].split())
        self.not_german = set(guards["homographs"]["not_german"].split())
        for language, text in languages["stop"].items():
            for word in self._add(text.split(), (language,)):
                word.stop = True
        self._negations(guards["negation"])
        questions = self._questions(guards["question_words"])
        self._numbers(guards["numbers"])
        for dimension, text in guards["units"].items():
            for form, factor in _pairs(text):
                for word in self._add([form]):
                    word.unit = (dimension, float(factor))
        _IRREGULAR.update(_pairs(wordnet["irregular"]))
        narrowing, reversible, persons = self._classes(classes)
        self._opposites(opposites["qualities"].strip().splitlines(), *_BOTH)
        graded = _joined(frozenset(map(table.words.__getitem__, table.opposites)) for table in self.tables.values())
        self._opposites(opposites["acts"].strip().splitlines(), *_BOTH)
        for language in self.tables:
            self._opposites(opposites[language].strip().splitlines(), language)
        self._opposites(wordnet["opposites"].split(), "en")
        for bit, text in enumerate(guards["shape"].values()):
            for word in self._add(text.split()):
                word.shape |= 1 << bit
                word.stop = True
        for language, text in synonyms["sets"].items():
            self._sets([line.split() for line in text.splitlines()], language)
        self._sets([pair.split("|") for pair in wordnet["synonyms"].split()], "en")
        light = _joined(self._terms(text, language) for language, text in synonyms["light"].items())
        acts = self._terms(wordnet["acts"], "en") | self._terms(synonyms["acts"]["de"], "de")
        relations = _joined(self._terms(text, language) for language, text in synonyms["relations"].items())
        implied = {code: self._terms(text, *_BOTH) for code, text in synonyms["implied"].items()}
        implied["who"] |= persons
        category = _joined(self._terms(text, *_BOTH) for text in synonyms["category"].values())
        direction = guards["direction"]
        for kind in ("convert", "from", "to"):
            for word in self._add(direction[kind].split()):
                word.direction = word.direction or kind
        parts = self._parts("de") | self._parts("en")
        for table in self.tables.values():
            for form, word in table.special.items():
                word.number = table.words[form]
                word.exclusive, word.opposites = table.exclusive.get(form, ()), table.opposites.get(form, ())
            quiet = languages["quiet"][table.language].split()
            for order, form in enumerate(filter(table.stops.__contains__, table.words)):
                table.special[form].frame = 1 + (quiet.index(form) if form in quiet else QUIET + order % (255 - QUIET))
            # "account" has the stem of "accounting", and that is no reason to take it for a trade.
            narrowing -= {table.words[form] for form in table.words.keys() - table.exclusive.keys()}
        denying = {word.number for t in self.tables.values() for word in t.special.values() if word.soft_negation}
        return Lexicon(
            fingerprint=hashlib.blake2b(b"".join(raw), digest_size=2).digest(),
            tables=self.tables,
            votes=_votes(languages["detect"]),
            related=self.related,
            graded=graded | denying,
            light=light,
            relations=relations,
            acts=acts,
            category=category,
            implied=tuple(implied.get(code, frozenset()) for code in questions),
            alternatives=(graded | denying | narrowing) - relations,
            reversible=reversible,
            conflicts=_conflicts(guards["question_words"]["conflicts"], questions),
            what=questions.index("what"),
            asks=frozenset(guards["question_words"]["asks"].split()),
            questions=questions,
            codes={code: position for position, code in enumerate(questions)} | {"": questions.index("command")},
            yes_no={language: _first_words(guards["question_words"], language) for language in self.tables},
            parts=parts,
            phrases=frozenset(parts),
            subjects=frozenset(guards["question_words"]["subjects"].split()),
            separable=frozenset(synonyms["phrases"]["separable"].split()),
            particles=frozenset(guards["particles"]["particles"].split()),
            before_noun=frozenset(guards["particles"]["before_noun"].split()),
            not_prefixed=tuple(guards["negation"]["not_prefixed"].split()),
            marks=_marks(direction),
        )

    def _classes(self, data: dict[str, Any]) -> tuple[set[int], dict[int, frozenset[int]], set[int]]:
        groups = count()
        narrowing: set[int] = set()
        persons: set[int] = set()
        reversible: dict[int, frozenset[int]] = {}
        marked: Codes = {}
        for section in (name for name, content in data.items() if isinstance(content, dict)):
            narrows, turns = (section in data[kind].split() for kind in ("narrowing", "reversible"))
            for text, group in zip(data[section].values(), groups, strict=False):
                members = [forms.split() for forms in text.split("|")]
                for number, forms in enumerate(members):
                    _mark(marked, forms, group * 256 + number)
                numbers = frozenset().union(*self._sets(members, *_BOTH))
                if narrows:
                    narrowing |= numbers
                if section == "people":
                    persons |= numbers
                for one in numbers if turns else ():
                    reversible[one] = reversible.get(one, frozenset()) | {group}
        for table, excluded in self._tables(_BOTH):
            table.exclusive = {form: codes for form, codes in marked.items() if form not in excluded}
        return narrowing, reversible, persons

    def _parts(self, language: str) -> dict[int, frozenset[int]]:
        table = self.tables[language]
        table.stops = stops = frozenset(form for form, word in table.special.items() if word.stop)
        phrases = [form for form, number in table.words.items() if "_" in form and number and form not in stops]
        speaking = [[part for part in form.split("_") if part not in stops] for form in phrases]
        several = [(form, parts) for form, parts in zip(phrases, speaking, strict=True) if len(parts) > 1]
        self._learn(chain.from_iterable(parts for _, parts in several), language)
        number_of = table.words.__getitem__
        return {number_of(form): frozenset(map(number_of, parts)) for form, parts in several}

    def _opposites(self, lines: list[str], *languages: str) -> None:
        sides = [[side.split() for side in line.split("|")] for line in lines]
        marked: Codes = {}
        for pair, both in enumerate(sides, self.pairs):
            for side, forms in enumerate(both):
                _mark(marked, forms, pair * 2 + side)
        for table, excluded in self._tables(languages):
            for form, codes in marked.items():
                if form not in excluded:
                    table.opposites[form] = (*table.opposites.get(form, ()), *codes)
        self._sets(list(chain.from_iterable(sides)), *languages)
        self.pairs += len(lines)

    def _negations(self, data: dict[str, str]) -> None:
        for language in self.tables:
            for word in self._add(data[language].split(), (language,)):
                word.negation = word.stop = True
            forms = data[f"soft_{language}"].split()
            self._learn(forms, language)
            for word in self._add(forms, (language,)):
                word.soft_negation = True

    def _questions(self, data: dict[str, str]) -> tuple[str, ...]:
        codes = ["command", "yes_no", "possible", "units", "degree"]
        for language in self.tables:
            for form, code in _pairs(data[language]):
                for word in self._add([form], (language,)):
                    word.question, word.stop = code, True
                if code not in codes:
                    codes.append(code)
        for word in self._add(form for form in data["possible"].split() if "_" in form):
            word.question, word.stop = "possible", True
        for word in self._add(data["manner"].split()):
            word.question, word.stop = "manner", True
        return tuple(codes)

    def _numbers(self, data: dict[str, str]) -> None:
        for kind, attribute in (("words", "value"), ("factors", "factor"), ("ordinals", "ordinal")):
            for form, value in _pairs(data[kind]):
                for word in self._add([form]):
                    setattr(word, attribute, int(value) if kind == "ordinals" else float(value))
        for kind, number in (("weak", 1.0), ("two", 2.0)):
            for word in self._add(data[kind].split()):
                word.value, word.weak = number, True

    def _add(self, forms: Iterable[str], languages: tuple[str, ...] = _BOTH) -> Iterator[Word]:
        """Yield the `Word` of each form in each language, made if needed."""
        for form in forms:
            for table, excluded in self._tables(languages):
                if form not in excluded:
                    table.words.setdefault(form, 0)
                    word = table.special.get(form)
                    if word is None:
                        word = table.special[form] = Word()
                    yield word

    def _tables(self, languages: tuple[str, ...]) -> tuple[tuple[Table, set[str]], ...]:
        """Return for each language its table, and the forms that are not to be added to it."""
        if len(languages) == 1:
            return ((self.tables[languages[0]], set()),)
        return (self.tables["en"], self.not_english), (self.tables["de"], self.not_german)

    def _sets(self, sets: list[list[str]], *languages: str) -> list[frozenset[int]]:
        """Make the forms of each set stand for one another; return the numbers of each."""
        forms = self._learn(chain.from_iterable(sets), *languages)
        found: list[frozenset[int]] = [frozenset()] * len(sets)
        for table, excluded in self._tables(languages):
            kept = sets if excluded.isdisjoint(forms) else [[x for x in own if x not in excluded] for own in sets]
            numbers_of = table.words.__getitem__
            found = [numbers.union(map(numbers_of, own)) for numbers, own in zip(found, kept, strict=True)]
        related = self.related
        for together in found:
            if len(together) > 1:
                for number in together:
                    related[number] = related[number] | together if number in related else together
        return found

    def _learn(self, forms: Iterable[str], *languages: str) -> Iterable[str]:
        """Give a number to forms with content, inflections of a word are one term; return the forms."""
        forms, first = dict.fromkeys(forms), languages[0]
        numbers, base_of, bases = self.numbers, _STEMMERS[first], self.tables[first].bases
        for table, excluded in self._tables(languages):
            words = table.words
            for form in [form for form in forms if not words.get(form) and form not in excluded]:
                base = bases.get(form)
                if base is None:
                    base = bases[form] = base_of(form)
                if "-" in base:
                    base = base.replace("-", "_")
                number = numbers.get(base)
                if number is None:
                    number = numbers[base] = len(numbers) + 1
                words[form] = number
        return forms

    def _terms(self, text: str, *languages: str) -> frozenset[int]:
        """Return the numbers of the forms of `text`."""
        # In one language a form may have the number of another, by its stem, than in the other.
        return _joined(self._sets([[form] for form in text.split()], *languages))


def _mark(codes: Codes, forms: list[str], code: int) -> None:
    for form in forms:
        codes[form] = (*codes.get(form, ()), code)


def _joined(sets: Iterable[frozenset[int]]) -> frozenset[int]:
    return frozenset().union(*sets)


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(form, value) for form, _, value in (item.rpartition("=") for item in text.split())]


def _marks(data: dict[str, str]) -> dict[str, int]:
    marks: dict[str, int] = {}
    for name, bit in (("symmetric", SYMMETRIC), ("passive_aux", AUXILIARY), ("passive_by", AGENT)):
        for form in data[name].split():
            marks[form] = marks.get(form, 0) | bit
    return marks


def _first_words(data: dict[str, str], language: str) -> dict[str, str]:
    words, possible = data[f"yes_no_{language}"].split(), data["possible"].split()
    return {form: "possible" if form in possible else "yes_no" for form in words}


def _votes(data: dict[str, str]) -> dict[str, int]:
    votes: dict[str, int] = {}
    for language, text in data.items():
        for form in text.split():
            votes[form] = votes.get(form, 0) | 1 << 16 * LANGUAGES.index(language)
    return votes


def _conflicts(text: str, questions: tuple[str, ...]) -> frozenset[tuple[int, int]]:
    pairs = [tuple(map(questions.index, item.split(":"))) for item in text.split()]
    return frozenset({(a, b) for a, b in pairs} | {(b, a) for a, b in pairs})
