"""What a question says, in the form in which two questions are compared.

A profile holds codes of a closed vocabulary and short keyed digests, no words, so that it may lie in a database.
English and German; of other languages it holds what needs no vocabulary.
"""

from __future__ import annotations

import struct
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from zlib import crc32

from langchain_aegis.lexicon import AGENT, AUXILIARY, LANGUAGES, SYMMETRIC, Phrases, Word, lexicon
from langchain_aegis.tokens import (
    CODE,
    GERMAN,
    GREETING,
    NAME,
    NUMBER,
    NUMERIC,
    PLAIN_TEXT,
    SYMBOL,
    TOKEN,
    VERSION_TAG,
    WORD,
    Form,
    as_float,
    canonical,
    forms_of,
    join_particle,
    language_of,
    plain,
)

_VERSION = 5
_MAX_CHARACTERS = 16_384  # of a text; what follows counts as one identifier
NEGATED, DENYING = 1, 2  # an odd number of negations; a word that denies without one
PASSIVE = 4  # with its agent; SYMMETRIC, "and", "between" and the like, comes from the lexicon
# What a profile holds at all: of two that do not hold it, nothing more has to be compared.
COUNTS, NAMES, STARTS, REPEATS, PHRASES = 16, 32, 64, 128, 256
DIGEST = 0x800000  # set in the number of a term that is a digest, clear in that of a form of the lexicon


@dataclass(slots=True)  # not frozen, nor a tuple: a comparison reads thirty fields, and slots are read fastest
class Profile:
    """What the guards compare; never changed. Holds codes of a closed vocabulary and short keyed digests, no words.

    A term is a word with content: the number of a form in the lexicon, or a digest of the word's stem.
    """

    language: int  # position in LANGUAGES
    question: int  # position in the lexicon's question codes
    flags: int  # sum of NEGATED, DENYING, PASSIVE, SYMMETRIC, COUNTS, NAMES, STARTS, REPEATS, PHRASES
    shape: int  # one bit per wish about the answer's form
    source: int  # term after "from"; -1 if none
    target: int  # term after "to"; -1 if none
    order: tuple[int, ...]  # the terms, as they follow each other
    terms: frozenset[int]
    numbers: frozenset[int]
    weak_numbers: frozenset[int]
    quantities: frozenset[int]
    names: frozenset[int]
    identifiers: frozenset[int]
    exclusive: frozenset[int]  # 256 * set + class
    opposites: frozenset[int]  # 2 * pair + side
    opposed: frozenset[int]  # the other sides of those pairs, as far as it does not speak of them, too
    frame: frozenset[int]  # the words without content: code + 256 * how often it stood before
    spellings: tuple[
        int, ...
    ]  # per term a digest that survives swapped and doubled letters; 0 of names and short words

    def encode(self) -> bytes:
        """Return the profile as bytes for a record; `decode` reads them."""
        sets = (self.numbers, self.weak_numbers, self.quantities, self.names, self.identifiers)
        codes = (self.exclusive, self.opposites, self.opposed, self.frame)
        wide = [*self.order, *(term for part in sets for term in sorted(part))]
        narrow = [*self.spellings, *(code for part in codes for code in sorted(part))]
        single = (self.language, self.question, self.flags, self.shape, self.source, self.target)
        body = _BODY.pack(*single, len(self.order), *map(len, sets), *map(len, codes))
        body += _values(len(wide), len(narrow)).pack(*wide, *narrow)
        return _HEAD.pack(_VERSION, lexicon().fingerprint, crc32(body)) + body

    @staticmethod
    def decode(data: bytes) -> Profile:
        """Return the profile that `encode` wrote.

        Raises:
            ValueError: Other bytes, or those of another version of the lexicon.
        """
        known = lexicon()
        if len(data) < _START:
            raise ValueError("not a profile: too short")
        version, fingerprint, checksum = _HEAD.unpack_from(data)
        if version != _VERSION or fingerprint != known.fingerprint:
            raise ValueError("not a profile of this version")
        if checksum != crc32(data[_HEAD.size :]):
            raise ValueError("not a profile: damaged")
        (
            language, question, flags, shape, source, target,
            words, numbers, weak, quantities, names, identifiers, exclusive, opposites, opposed, frame,
        ) = _BODY.unpack_from(data, _HEAD.size)  # fmt: skip
        if language >= len(LANGUAGES) or question >= len(known.questions):
            raise ValueError("not a profile: unknown codes")
        wide = words + numbers + weak + quantities + names + identifiers
        narrow = words + exclusive + opposites + opposed + frame
        if len(data) != _START + 4 * wide + 2 * narrow:
            raise ValueError("not a profile: of another length")
        values = _values(wide, narrow).unpack_from(data, _START)
        order = values[:words]
        numbered = weakly = measured = named = identified = excluding = opposing = opposite = _NONE  # of most questions
        if wide > words:
            numbered = frozenset(values[words : (at := words + numbers)])
            weakly = frozenset(values[at : (at := at + weak)])
            measured = frozenset(values[at : (at := at + quantities)])
            named = frozenset(values[at : (at := at + names)])
            identified = frozenset(values[at:wide])
        start = at = wide + words
        if exclusive:
            excluding = frozenset(values[at : (at := at + exclusive)])
        if opposites:
            opposing = frozenset(values[at : (at := at + opposites)])
            opposite = frozenset(values[at : (at := at + opposed)])
        return Profile(
            language, question, flags, shape, source, target, order, frozenset(order),
            numbered, weakly, measured, named, identified, excluding, opposing, opposite,
            frozenset(values[at:]), values[wide:start],
        )  # fmt: skip


@lru_cache(maxsize=1 << 10)
def _values(wide: int, narrow: int) -> struct.Struct:
    """Return the layout of so many numbers of 4 bytes and of 2."""
    return struct.Struct(f">{wide}I{narrow}H")


_HEAD = struct.Struct(">B2sI")  # version, lexicon, checksum
_BODY = struct.Struct(">BBHIii10H")
_START = _HEAD.size + _BODY.size
_NONE: frozenset[int] = frozenset()


def profile(text: str, *, key: bytes = b"") -> Profile:
    """Return what the guards need to know about `text`.

    Args:
        text: A question. Some hundred characters are meant; more is only slower.
        key: At most 64 bytes. With a secret key nobody can test by the digests whether a word was in the question.

    Returns:
        A profile, comparable with those made with the same key.
    """
    return _Reader(text, key).read()


@lru_cache(maxsize=1 << 15)
def _digest(text: str, key: bytes) -> int:
    """Return 23 bits that stand for `text`, marked as a digest."""
    return (
        int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=3, key=key).digest(), "big") | DIGEST
    )


@lru_cache(maxsize=1 << 15)
def _spelling(low: str, key: bytes) -> int:
    """Return 16 bits, not 0, that stay the same when neighbouring letters are swapped, doubled or halved."""
    skeleton = low[0] + "".join(sorted(set(low)))
    digest = blake2b(skeleton.encode("utf-8", "surrogatepass"), digest_size=2, key=key).digest()
    return int.from_bytes(digest, "big") or 1


class _Reader:
    """Reads one text from its first token to its last."""

    def __init__(self, text: str, key: bytes) -> None:
        if not text.isascii():
            text = unicodedata.normalize("NFC", text).replace("’", "'")
        greeting = GREETING.match(text)
        if greeting:
            text = text[greeting.end() :]
        rest = text[_MAX_CHARACTERS:]
        if rest:
            text = text[:_MAX_CHARACTERS]
        plain = PLAIN_TEXT.fullmatch(text)
        tokens = (WORD if plain else TOKEN).findall(text)
        self.key = key
        self.language = language_of(tokens)
        self.tongue = "de" if self.language == GERMAN else "en"
        tongue = self.tongue
        self.forms = [form for token in tokens for form in forms_of(token, tongue)]
        if tongue == "de":
            join_particle(self.forms)
        self.table = lexicon().tables[tongue]
        self.order: list[int] = []
        self.numbers: set[int] = set()
        self.weak: set[int] = set()
        self.quantities: set[int] = set()
        self.names: set[int] = set()
        self.identifiers: set[int] = set()
        self.exclusive: set[int] = set()
        self.opposites: set[int] = set()
        self.spellings: list[int] = []
        self.frame: list[int] = []
        self.shape = self.negations = self.soft = 0
        self.question = ""
        self.source = self.target = -1
        self.pending = ""  # "from" or "to": what the next term is
        self.towards = ""  # which of the two the last one was
        self.ends = -1  # position of its term
        self.converts = False
        self.at = 0
        self.skip: list[int] = []  # particles that were taken with their verb
        symbols = () if plain else SYMBOL.findall(text)
        for extra in (rest, "".join(symbols)) if rest or symbols else ():
            if extra:
                self._add(_digest(extra, key), self.identifiers)

    def read(self) -> Profile:
        """Return the profile."""
        at, forms, frame, order, spellings, key = 0, self.forms, self.frame, self.order, self.spellings, self.key
        size, marks, skip = len(forms), 0, self.skip
        if size:
            self.question = lexicon().yes_no[self.tongue].get(forms[0].low, "")
        while at < size:
            form = forms[at]
            if form.frame:
                frame.append(form.frame)
            marks |= form.marks
            if skip and at in skip:
                at += 1
                continue
            self.at = at
            if form.phrases and (form.separable or (at + 1 < size and forms[at + 1].low in form.phrases)):
                used = self._phrase(at, form, form.phrases)
                if used:
                    at += used
                    continue
            if form.inert:
                at += 1
                continue
            if (form.term or form.unknown) and not self.pending:
                # Most words: what `_term` does with them, in one step.
                named = form.unknown and form.capital and at and self.tongue == "en"
                spellings.append(_spelling(form.low, key) if len(form.low) > 4 and not named else 0)
                term = form.term or _digest(form.stem, key)
                order.append(term)
                if named:
                    self.names.add(term)
                at += 1
                continue
            word = form.word
            if form.kind == NUMERIC or (word is not None and (word.value is not None or word.factor is not None)):
                at = self._number(at)
                continue
            self._term(at, form)
            at += 1
        return self._profile(marks)

    def _phrase(self, at: int, form: Form, phrases: Phrases) -> int:
        """Take the longest phrase that begins here; return how many tokens it has, 0 if there is none."""
        forms = self.forms
        if at + 1 < len(forms):
            for rest, whole in phrases.get(forms[at + 1].low, ()):
                end = at + 2 + len(rest)
                if tuple(other.low for other in forms[at + 2 : end]) == rest:
                    word = self._whole(whole, form)
                    if word.question == "count" and end < len(forms) and self._unit(forms[end].low):
                        self.question = "units"  # "how many days" may be "how long"
                    return end - at
        if form.separable:
            for later in range(at + 2, min(at + 6, len(forms))):
                for rest, whole in phrases.get(forms[later].low, ()):
                    if not rest:
                        self.skip.append(later)
                        self._whole(whole, form)
                        return 1
        return 0

    def _whole(self, phrase: str, form: Form) -> Word:
        word = self.table.find(phrase) or Word()
        self._word(word, form)
        return word

    def _number(self, at: int) -> int:
        """Take a number with its factor and unit; return the position after it."""
        form = self.forms[at]
        weak, value, unit, after = False, "", "", at + 1
        if self.pending or (at and self.order and at - 1 == self.ends):  # "from 2.1 to 2.2", "from Node 18 to Node 20"
            self._end(_digest(form.low, self.key))
        if form.kind == NUMERIC:
            match = NUMBER.match(form.low)
            digits, suffix = match.groups() if match else (form.low, "")
            if suffix in ("st", "nd", "rd", "th"):
                self.numbers.add(_digest(f"#{digits}", self.key))
                return after
            value = canonical(digits)
            if suffix == "k":
                value = plain(as_float(value) * 1000)
            elif suffix in ("am", "pm"):
                self.exclusive.update(self.table.exclusive[f"#{suffix}"])
            elif suffix and self._unit(suffix) is None:
                word = self.table.find(form.low)
                if word is not None:
                    self._word(word, form)
                else:
                    self._add(_digest(form.low, self.key), self.identifiers)
                return after
            else:
                unit = suffix
        elif form.word is not None:
            weak = form.word.weak
            value = plain(form.word.value if form.word.value is not None else form.word.factor or 0)
        while after < len(self.forms):
            word = self.forms[after].word
            if word is None or unit:
                break
            if word.factor is not None:
                value = plain(as_float(value) * word.factor)
            elif form.kind != NUMERIC and word.value is not None and word.value < 10 <= as_float(value) < 100:
                value = plain(as_float(value) + word.value)
            elif self.forms[after].low in ("am", "pm") and form.kind == NUMERIC:
                self.exclusive.update(self.table.exclusive[f"#{self.forms[after].low}"])
            else:
                break
            weak, after = False, after + 1
        if not unit and after < len(self.forms) and self._unit(self.forms[after].low) is not None:
            unit = self.forms[after].low
            after += 1
        if unit:
            dimension, factor = self._unit(unit) or ("", 1.0)
            self.quantities.add(_digest(f"{dimension}:{plain(as_float(value) * factor)}", self.key))
        else:
            digest = _digest(value, self.key)
            self.numbers.add(digest)
            if weak:
                self.weak.add(digest)
        return after

    def _unit(self, low: str) -> tuple[str, float] | None:
        word = self.table.special.get(low)
        return word.unit if word is not None else None

    def _term(self, at: int, form: Form) -> None:
        """Take one token that is no number."""
        word = form.word
        if at == 0 and form.low in self.table.stops:
            word = self.table.find(form.low)  # "May I ..." is not about a month
        self.negations += form.denied
        if form.kind == CODE:
            if VERSION_TAG.fullmatch(form.low):
                self.numbers.add(_digest(form.low[1:], self.key))
            else:
                self._add(_digest(form.stem, self.key), self.identifiers)
            return
        if word is not None:
            letter = len(form.low) == 1 and form.capital and at and form.low != "i"
            if not letter:
                self._word(word, form, _spelling(form.low, self.key) if len(form.low) > 4 else 0)
                return
        if len(form.low) == 1 and not form.capital:
            return
        digest = _digest(form.stem, self.key)
        named = form.kind == NAME or (form.capital and at > 0 and self.tongue == "en")
        spelling = _spelling(form.low, self.key) if not named and len(form.low) > 4 else 0
        self._add(digest, self.names if named else None, spelling)

    def _word(self, word: Word, form: Form, spelling: int = 0) -> None:
        """Take a form, or a phrase, of the lexicon."""
        self._codes(word)
        self.negations += word.negation
        self.soft |= word.soft_negation
        if word.question:
            self._question(word.question)
        elif (
            self.question == "how" and word.number in lexicon().graded and self.forms[self.at - 1].low in ("how", "wie")
        ):
            self.question = "degree"  # "how quickly"
        if word.ordinal is not None:
            self.numbers.add(_digest(f"#{word.ordinal}", self.key))
        if word.direction == "convert":
            self.converts = True
        elif word.direction == "to" and self.converts and self.source < 0 and self.order:
            self.source = self.order[-1]
        if word.number and not word.stop:
            self._add(word.number, None, spelling)
        elif not word.stop and not word.direction and not word.question:
            self._add(_digest(form.stem, self.key), None)
        if word.direction and word.direction != "convert":  # "nach" is a term, too, and not its own end
            self.pending = word.direction

    def _question(self, code: str) -> None:
        if code == "manner":  # "what is the way to"
            if self.question in ("", "what"):
                self.question = "how"
            return
        polite = self.question in ("yes_no", "possible")  # "could you tell me when"
        after_asking = self.at > 0 and self.forms[self.at - 1].low in lexicon().asks
        if code == "when" and not after_asking and self._next() in lexicon().subjects:
            return  # "When I sit for long, why ..."
        whole = code == "possible" and not self.at  # "is there any way to"
        if whole or not self.question or (polite and after_asking):
            following = self.forms[self.at + 1].word if code == "how" and self.at + 1 < len(self.forms) else None
            graded = following is not None and following.number in lexicon().graded  # "how quickly"
            self.question = "degree" if graded else code

    def _next(self) -> str:
        return self.forms[self.at + 1].low if self.at + 1 < len(self.forms) else ""

    def _codes(self, word: Word) -> None:
        self.shape |= word.shape
        if word.exclusive:
            self.exclusive.update(word.exclusive)
        if word.opposites:
            self.opposites.update(word.opposites)

    def _add(self, term: int, kind: set[int] | None, spelling: int = 0) -> None:
        self.order.append(term)
        self.spellings.append(spelling)
        if kind is not None:
            kind.add(term)
        if self.pending:
            self._end(term)

    def _end(self, term: int) -> None:
        """Take what a way or a change starts or ends with."""
        if self.pending:
            self.towards, self.pending, self.ends = self.pending, "", self.at
        if self.towards == "from":
            self.source = term
        else:
            self.target = term

    def _profile(self, marks: int) -> Profile:
        flags = self.negations % 2 * NEGATED | self.soft * DENYING | marks & SYMMETRIC
        if marks & AUXILIARY and marks & AGENT:
            flags |= PASSIVE
        if self.numbers or self.quantities:
            flags |= COUNTS
        if self.names or self.identifiers:
            flags |= NAMES
        if self.source >= 0:
            flags |= STARTS
        terms = frozenset(self.order)
        if len(terms) < len(self.order):
            flags |= REPEATS
        if not lexicon().phrases.isdisjoint(terms):
            flags |= PHRASES
        frame = set(self.frame)
        if len(frame) < len(self.frame):
            self.frame.sort()
            frame = {code + (at - self.frame.index(code) & 0xFF) * 256 for at, code in enumerate(self.frame)}
        return Profile(
            self.language,
            lexicon().codes[self.question],
            flags,
            self.shape,
            self.source,
            self.target,
            tuple(self.order),
            terms,
            frozenset(self.numbers),
            frozenset(self.weak),
            frozenset(self.quantities),
            frozenset(self.names),
            frozenset(self.identifiers),
            frozenset(self.exclusive),
            frozenset(self.opposites),
            frozenset([code ^ 1 for code in self.opposites if code ^ 1 not in self.opposites]),
            frozenset(frame),
            tuple(self.spellings),
        )
