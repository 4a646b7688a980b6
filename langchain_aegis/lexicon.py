"""The vocabulary of the package, read from data files once per process."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

_DATA = files("langchain_aegis") / "data"
_FILES = ("languages.toml", "guards.toml", "classes.toml", "opposites.toml", "synonyms.toml", "wordnet.toml")
LANGUAGES = ("", "en", "de", "fr", "es", "it", "nl", "pt")  # a profile stores the position; "" is undecided
SYMMETRIC, AUXILIARY, AGENT = 8, 16, 32  # "and", "between"; "was" and "by" of a passive
MODES = ("strict", "balanced", "lenient")


@dataclass(slots=True)
class Word:
    """What the lexicon knows about one form. A form that nothing is known about has no `Word`."""

    number: int  # of the form in the lexicon, from 1; 0 while it has no content of its own
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

    @property
    def silent(self) -> bool:
        """Whether it says nothing beyond its being there."""
        speaking = (self.negation, self.soft_negation, self.question, self.direction, self.shape, self.exclusive)
        counting = (self.value, self.factor, self.ordinal)
        return not any(speaking) and not self.opposites and all(value is None for value in counting)


# Second word -> (the words after it, the phrase as one form), the longest first.
Phrases = dict[str, list[tuple[tuple[str, ...], Word]]]


@dataclass(slots=True)
class Table:
    """The forms of one language; keys are lower case, except those that match only as they are written."""

    words: dict[str, Word] = field(default_factory=dict)
    stems: dict[str, Word] = field(default_factory=dict)
    phrases: dict[str, Phrases] = field(default_factory=dict)  # by first word and by its stem


@dataclass(slots=True)
class Lexicon:
    """Everything that verification needs, in lookups of one step."""

    fingerprint: bytes  # 2 bytes; numbers in a stored profile mean something only under the same one
    tables: dict[str, Table]
    votes: dict[str, int]  # form -> the sum of 1 << 16 * position in LANGUAGES
    related: dict[int, frozenset[int]]  # number of a form -> numbers of the forms that may stand for it
    graded: frozenset[int]  # qualities that have an opposite, words that deny
    canonical: dict[int, int]  # number of a form -> the one that stands for it and its synonyms
    light: frozenset[int]
    relations: frozenset[int]
    acts: frozenset[int]  # verbs that say what is done
    category: frozenset[int]  # what a name may be introduced with
    implied: tuple[frozenset[int], ...]  # per question code: what its question word asks for already
    narrowing: frozenset[int]  # members of exclusive sets that narrow a question down
    reversible: dict[int, frozenset[int]]  # number of a member -> the exclusive sets in which two may change places
    conflicts: frozenset[tuple[int, int]]  # positions in `questions`
    what: int  # position in `questions`; "what" may ask for anything that `implied` names
    asks: frozenset[str]  # words after which a question word begins the question itself ("could you tell me when")
    questions: tuple[str, ...]  # codes of question words; a profile stores the position
    codes: dict[str, int]  # the same the other way round; "" is "command"
    shapes: tuple[str, ...]
    groups: tuple[str, ...]  # names of the exclusive sets
    yes_no: dict[str, dict[str, str]]  # per language: first word -> question code
    parts: dict[int, frozenset[int]]  # number of a phrase -> numbers of its words, if those have content
    separable: frozenset[str]
    particles: frozenset[str]  # German: stand at the end and belong to the verb ("melde ... an")
    before_noun: frozenset[str]  # German: what stands before is the verb of a question
    not_prefixed: tuple[str, ...]
    marks: dict[str, int]  # form -> sum of SYMMETRIC, AUXILIARY, AGENT


def read(name: str) -> dict[str, Any]:
    """Return one data file, parsed."""
    return tomllib.loads((_DATA / name).read_text(encoding="utf-8"))


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
    """Return the lexicon; the first call reads the data files (some ten milliseconds)."""
    return _Builder().build()


@lru_cache(maxsize=1 << 14)
def stem(word: str, language: str) -> str:
    """Return `word` (lower case) without its inflection. Rough: it only has to be the same for both of two texts."""
    return _stem_de(word) if language == "de" else _stem_en(word)


_IRREGULAR: dict[str, str] = {}  # English: "bought" -> "buy"; filled with the lexicon


def _stem_en(word: str) -> str:
    if word.endswith(("'s", "s'")):
        word = word[:-2]
    word = _IRREGULAR.get(word, word)
    size = len(word)
    if size < 4:
        return word
    if word.endswith("ies") and size > 4:
        word = word[:-3] + "y"
    elif word.endswith(("sses", "shes", "ches", "xes", "zes")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    elif word.endswith("ied") and size > 4:
        return word[:-3] + "y"
    elif (word.endswith("ing") and size > 5) or (word.endswith("ed") and size > 4):
        cut = word[:-3] if word.endswith("ing") else word[:-2]
        if any(vowel in cut for vowel in "aeiouy"):
            if len(cut) > 3 and cut[-1] == cut[-2] and cut[-1] not in "sf" and (cut[-1] != "l" or len(cut) > 5):
                return cut[:-1]
            word = cut + "e" if _SHORT.fullmatch(cut) else cut
    for ending in _EN_DERIVED:
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word[:-1] if word.endswith("e") and len(word) > 3 and not _SHORT.fullmatch(word[:-1]) else word


_SHORT = re.compile(r"[^aeiouy]*[aeiouy][^aeiouywx]")  # "rat": with an "e" it is another word, and "rating" is of that
_EN_DERIVED = ("ation", "ition", "ment", "ance", "ence", "ity", "ion", "ate")  # "formation" is "form"
_FOLD = str.maketrans({"ä": "a", "ö": "o", "ü": "u", "ß": "ss"})
_DE_ENDINGS = (
    "ungen",
    "ung",
    "keiten",
    "keit",
    "ern",
    "tet",
    "ten",
    "est",
    "en",
    "er",
    "em",
    "es",
    "et",
    "te",
    "st",
    "e",
    "n",
    "s",
    "t",
)


def _stem_de(word: str) -> str:
    word = word.translate(_FOLD)
    size = len(word)
    for ending in _DE_ENDINGS:
        if word.endswith(ending) and size - len(ending) >= 4:
            return word[: -len(ending)]
    return word


class _Builder:
    """Joins the data files into a `Lexicon`."""

    def __init__(self) -> None:
        self.tables = {"en": Table(), "de": Table()}
        self.related: dict[int, set[int]] = {}
        self.numbers: dict[str, int] = {}
        self.not_english: set[str] = set()
        self.not_german: set[str] = set()
        self.pairs = 0  # of opposites

    def build(self) -> Lexicon:
        """Read all files and return the finished lexicon."""
        guards, languages, synonyms = read("guards.toml"), read("languages.toml"), read("synonyms.toml")
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
        wordnet = read("wordnet.toml")
        _IRREGULAR.update(_pairs(wordnet["irregular"]))
        groups, narrowing, reversible, persons = self._classes(read("classes.toml"))
        opposites = read("opposites.toml")
        self._opposites(opposites["qualities"].strip().splitlines(), ("en", "de"))
        graded = frozenset(
            word.number for table in self.tables.values() for word in table.words.values() if word.opposites
        )
        self._opposites(opposites["acts"].strip().splitlines(), ("en", "de"))
        for language in self.tables:
            self._opposites(opposites[language].strip().splitlines(), (language,))
        self._opposites(wordnet["opposites"].split(), ("en",))
        shapes = tuple(guards["shape"])
        for bit, text in enumerate(guards["shape"].values()):
            for word in self._add(text.split()):
                word.shape |= 1 << bit
                word.stop = True
        for language, text in synonyms["sets"].items():
            for line in text.strip().splitlines():
                self._set(line.split(), (language,))
        for pair in wordnet["synonyms"].split():
            self._set(pair.split("|"), ("en",))
        light = {
            number for language, text in synonyms["light"].items() for number in self._each(text.split(), (language,))
        }
        acts = self._each(wordnet["acts"].split(), ("en",)) | self._each(synonyms["acts"]["de"].split(), ("de",))
        relations = {
            number
            for language, text in synonyms["relations"].items()
            for number in self._each(text.split(), (language,))
        }
        implied = {
            code: frozenset(self._each(text.split(), ("en", "de"))) for code, text in synonyms["implied"].items()
        }
        implied["who"] |= persons
        category = {
            number for text in synonyms["category"].values() for number in self._each(text.split(), ("en", "de"))
        }
        direction = guards["direction"]
        for kind in ("convert", "from", "to"):
            for word in self._add(direction[kind].split()):
                word.direction = word.direction or kind
        parts = {number: words for language in ("de", "en") for number, words in self._parts(language)}
        for language, table in self.tables.items():
            _index(table, language)
            for order, word in enumerate(word for word in table.words.values() if word.stop):
                word.frame = order % 255 + 1
        # "account" has the stem of "accounting", and that is no reason to take it for a trade.
        denying = {word.number for table in self.tables.values() for word in table.words.values() if word.soft_negation}
        common = {word.number for table in self.tables.values() for word in table.words.values() if not word.exclusive}
        raw = b"".join((_DATA / name).read_bytes() for name in _FILES)
        return Lexicon(
            fingerprint=hashlib.blake2b(raw, digest_size=2).digest(),
            tables=self.tables,
            votes=_votes(languages["detect"]),
            related={number: frozenset(others - {number}) for number, others in self.related.items()},
            graded=graded | denying,
            canonical={number: min(others) for number, others in self.related.items()},
            light=frozenset(light),
            relations=frozenset(relations),
            acts=frozenset(acts),
            category=frozenset(category),
            implied=tuple(implied.get(code, frozenset()) for code in questions),
            narrowing=frozenset(narrowing - common),
            reversible={number: frozenset(groups) for number, groups in reversible.items()},
            conflicts=_conflicts(guards["question_words"]["conflicts"], questions),
            what=questions.index("what"),
            asks=frozenset(guards["question_words"]["asks"].split()),
            questions=questions,
            codes={code: position for position, code in enumerate(questions)} | {"": questions.index("command")},
            shapes=shapes,
            groups=groups,
            yes_no={language: _first_words(guards["question_words"], language) for language in self.tables},
            parts=parts,
            separable=frozenset(synonyms["phrases"]["separable"].split()),
            particles=frozenset(guards["particles"]["particles"].split()),
            before_noun=frozenset(guards["particles"]["before_noun"].split()),
            not_prefixed=tuple(guards["negation"]["not_prefixed"].split()),
            marks=_marks(direction),
        )

    def _classes(self, data: dict[str, Any]) -> tuple[tuple[str, ...], set[int], dict[int, set[int]], set[int]]:
        names: list[str] = []
        narrowing: set[int] = set()
        persons: set[int] = set()
        reversible: dict[int, set[int]] = {}
        for section in (name for name, content in data.items() if isinstance(content, dict)):
            for name, text in data[section].items():
                for number, members in enumerate(text.split("|")):
                    for word in self._set(members.split(), ("en", "de")):
                        word.exclusive = (*word.exclusive, len(names) * 256 + number)
                        if section in data["narrowing"].split():
                            narrowing.add(word.number)
                        if section == "people":
                            persons.add(word.number)
                        if section in data["reversible"].split():
                            reversible.setdefault(word.number, set()).add(len(names))
                names.append(name)
        return tuple(names), narrowing, reversible, persons

    def _parts(self, language: str) -> Iterator[tuple[int, frozenset[int]]]:
        words = self.tables[language].words
        for form, phrase in list(words.items()):
            parts = form.split("_")
            if len(parts) > 1 and phrase.number and not phrase.stop:
                speaking = [part for part in parts if part not in words or not words[part].stop]
                if len(speaking) > 1:
                    yield phrase.number, frozenset(self._each(speaking, (language,)))

    def _opposites(self, lines: Iterable[str], languages: tuple[str, ...]) -> None:
        for line in lines:
            for side, members in enumerate(line.split("|")):
                for word in self._set(members.split(), languages):
                    word.opposites = (*word.opposites, self.pairs * 2 + side)
            self.pairs += 1

    def _negations(self, data: dict[str, str]) -> None:
        for language in self.tables:
            for word in self._add(data[language].split(), (language,)):
                word.negation = word.stop = True
            for word in self._set_each(data[f"soft_{language}"].split(), language):
                word.soft_negation = True

    def _questions(self, data: dict[str, str]) -> tuple[str, ...]:
        codes = ["command", "yes_no", "possible", "units", "degree"]
        for language in self.tables:
            for form, code in _pairs(data[language]):
                for word in self._add([form], (language,)):
                    word.question, word.stop = code, True
                if code not in codes:
                    codes.append(code)
        for form in data["possible"].split():
            if "_" in form:
                for word in self._add([form]):
                    word.question, word.stop = "possible", True
        for word in self._add(data["manner"].split()):
            word.question, word.stop = "manner", True
        return tuple(codes)

    def _numbers(self, data: dict[str, str]) -> None:
        for form, value in _pairs(data["words"]):
            for word in self._add([form]):
                word.value = float(value)
        for form, value in _pairs(data["factors"]):
            for word in self._add([form]):
                word.factor = float(value)
        for form, value in _pairs(data["ordinals"]):
            for word in self._add([form]):
                word.ordinal = int(value)
        for word in self._add(data["weak"].split()):
            word.value, word.weak = 1.0, True
        for word in self._add(data["two"].split()):
            word.value, word.weak = 2.0, True

    def _add(self, forms: Iterable[str], languages: Iterable[str] = ("en", "de")) -> Iterator[Word]:
        """Yield the `Word` of each form in each language, made if needed."""
        languages = tuple(languages)
        for form in forms:
            for language in languages:
                if form in (self.not_english if language == "en" else self.not_german) and len(languages) > 1:
                    continue
                table = self.tables[language]
                word = table.words.get(form)
                if word is None:
                    word = table.words[form] = Word(0)
                yield word

    def _set(self, forms: list[str], languages: tuple[str, ...]) -> list[Word]:
        """Make the forms stand for one another; return their words."""
        words = []
        for form in forms:
            for word in self._add([form], languages):
                if not word.number:  # inflections of a word are one term
                    base = stem(form, languages[0]).replace("-", "_")
                    word.number = self.numbers.setdefault(base, len(self.numbers) + 1)
                words.append(word)
        numbers = {word.number for word in words}
        for number in numbers:
            self.related.setdefault(number, set()).update(numbers)
        return words

    def _set_each(self, forms: list[str], language: str) -> list[Word]:
        return [word for form in forms for word in self._set([form], (language,))]

    def _each(self, forms: list[str], languages: tuple[str, ...]) -> set[int]:
        """Return the numbers of forms that need not stand for one another."""
        return {word.number for form in forms for word in self._set([form], languages)}


def _index(table: Table, language: str) -> None:
    """Fill `stems` and `phrases` from `words`."""
    for form, word in sorted(table.words.items(), key=lambda item: item[1].stop):
        if "_" not in form:
            table.stems.setdefault(stem(form, language), word)  # "allowance" is rather of "allow" than of "allowed"
            continue
        first, second, *rest = form.split("_")
        for key in {first, stem(first, language)}:
            table.phrases.setdefault(key, {}).setdefault(second, []).append((tuple(rest), word))
    for following in table.phrases.values():
        for found in following.values():
            found.sort(key=lambda phrase: len(phrase[0]), reverse=True)


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(form, value) for form, _, value in (item.rpartition("=") for item in text.split())]


def _marks(data: dict[str, str]) -> dict[str, int]:
    marks: dict[str, int] = {}
    for name, bit in (("symmetric", SYMMETRIC), ("passive_aux", AUXILIARY), ("passive_by", AGENT)):
        for form in data[name].split():
            marks[form] = marks.get(form, 0) | bit
    return marks


def _first_words(data: dict[str, str], language: str) -> dict[str, str]:
    possible = set(data["possible"].split())
    return {form: "possible" if form in possible else "yes_no" for form in data[f"yes_no_{language}"].split()}


def _votes(data: dict[str, str]) -> dict[str, int]:
    votes: dict[str, int] = {}
    for language, text in data.items():
        for form in text.split():
            votes[form] = votes.get(form, 0) | 1 << 16 * LANGUAGES.index(language)
    return votes


def _conflicts(text: str, questions: tuple[str, ...]) -> frozenset[tuple[int, int]]:
    pairs = [tuple(map(questions.index, item.split(":"))) for item in text.split()]
    return frozenset({(a, b) for a, b in pairs} | {(b, a) for a, b in pairs})
