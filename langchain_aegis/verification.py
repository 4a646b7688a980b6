"""Whether a cached question's answer may serve a new question that lies near it.

Similarity cannot tell: "enable" lies nearer to "disable" than to "switch on". Each guard looks for one kind of
difference that changes the answer, and blocks when it finds one. Pure: no clock, no network. English and German;
other languages are held to the guards that need no vocabulary.
"""

from __future__ import annotations

import re
import struct
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import combinations
from typing import NamedTuple

from langchain_aegis.lexicon import LANGUAGES, Lexicon, Table, Word, lexicon, stem
from langchain_aegis.lexicon import thresholds as thresholds

GUARDS: tuple[str, ...] = (
    "language",
    "number",
    "quantity",
    "identifier",
    "negation",
    "antonym",
    "exclusive",
    "question_word",
    "direction",
    "order",
    "shape",
    "entity",
    "substitution",
    "restriction",
    "topic",
)

_VERSION = 1
_MAX_CHARACTERS = 16_384  # of a text; what follows counts as one identifier
_NEGATED, _DENYING = 1, 2  # an odd number of negations; a word that denies without one
_PASSIVE, _SYMMETRIC = 4, 8  # a passive with its agent; "and", "between" and the like
_DIGEST = 0x800000  # set in the number of a term that is a digest, clear in that of a form of the lexicon


class Profile(NamedTuple):
    """What the guards compare. Holds codes of a closed vocabulary and short keyed digests, no words.

    A term is a word with content: the number of a form in the lexicon, or a digest of the word's stem.
    """

    language: int  # position in LANGUAGES
    question: int  # position in the lexicon's question codes
    flags: int  # sum of _NEGATED, _DENYING, _PASSIVE, _SYMMETRIC
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
    exclusive: frozenset[int]  # 64 * group + class
    opposites: frozenset[int]  # 2 * pair + side
    spellings: tuple[tuple[int, int], ...]  # (position in order, a digest that survives swapped and doubled letters)

    def encode(self) -> bytes:
        """Return the profile as bytes for a record; `decode` reads them."""
        sets = (self.numbers, self.weak_numbers, self.quantities, self.names, self.identifiers)
        wide = (self.order, *map(sorted, sets))
        narrow = (sorted(self.exclusive), sorted(self.opposites), [part for pair in self.spellings for part in pair])
        counts = [len(part) for part in (*wide, *narrow)]
        head = (_VERSION, lexicon().fingerprint, self.language, self.question, self.flags, self.shape)
        return b"".join(
            (
                _HEAD.pack(*head, self.source, self.target, *counts),
                b"".join(term.to_bytes(3, "big") for part in wide for term in part),
                struct.pack(f">{sum(counts[len(wide) :])}H", *(code for part in narrow for code in part)),
            )
        )

    @staticmethod
    def decode(data: bytes) -> Profile:
        """Return the profile that `encode` wrote.

        Raises:
            ValueError: Other bytes, or those of another version of the lexicon.
        """
        try:
            version, fingerprint, *codes = _HEAD.unpack_from(data)
        except struct.error as exc:
            raise ValueError("not a profile: too short") from exc
        if version != _VERSION or fingerprint != lexicon().fingerprint:
            raise ValueError("the profile is of another version")
        language, question, flags, shape, source, target, *counts = codes
        middle = _HEAD.size + 3 * sum(counts[:_WIDE_PARTS])
        if len(data) != middle + 2 * sum(counts[_WIDE_PARTS:]):
            raise ValueError("not a profile: wrong length")
        terms = [int.from_bytes(data[at : at + 3], "big") for at in range(_HEAD.size, middle, 3)]
        short = struct.unpack_from(f">{sum(counts[_WIDE_PARTS:])}H", data, middle)
        order, numbers, weak, quantities, names, identifiers = _cut(terms, counts[:_WIDE_PARTS])
        exclusive, opposites, spelled = _cut(short, counts[_WIDE_PARTS:])
        profile = Profile(
            language=language,
            question=question,
            flags=flags,
            shape=shape,
            source=source,
            target=target,
            order=tuple(order),
            terms=frozenset(order),
            numbers=frozenset(numbers),
            weak_numbers=frozenset(weak),
            quantities=frozenset(quantities),
            names=frozenset(names),
            identifiers=frozenset(identifiers),
            exclusive=frozenset(exclusive),
            opposites=frozenset(opposites),
            spellings=tuple(zip(spelled[::2], spelled[1::2], strict=False)),
        )
        # Order inside the sets, repeated members and codes out of range all show here.
        if language >= len(LANGUAGES) or question >= len(lexicon().questions) or profile.encode() != data:
            raise ValueError("not a profile: not as written")
        return profile


_WIDE_PARTS = 6  # of three bytes a term; the other three parts are codes of two bytes
_HEAD = struct.Struct(">B2sBBBIii9H")


def _cut(values: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    """Split `values` into consecutive parts of the given sizes."""
    parts, start = [], 0
    for size in sizes:
        parts.append(values[start : start + size])
        start += size
    return parts


def profile(text: str, *, key: bytes = b"") -> Profile:
    """Return what the guards need to know about `text`.

    Args:
        text: A question. Some hundred characters are meant; more is only slower.
        key: At most 64 bytes. With a secret key nobody can test by the digests whether a word was in the question.

    Returns:
        A profile, comparable with those made with the same key.
    """
    return _Reader(text, key).read()


_TOKEN = re.compile(
    r"""
    "[^"\n]{1,80}" | „[^“”"\n]{1,80}[“”"] | “[^”\n]{1,80}” | `[^`\n]{1,80}`     # quoted
    | (?<!\w)'[^'\s][^'\n]{0,80}'(?!\w)
    | https?://\S+ | [\w.+-]+@[\w-]+\.[\w.-]*\w                     # addresses
    | (?<!\S)--?[^\W\d][\w-]*                                       # options
    | km/h | m/s | [cC]\+\+ | [cCfF]\#(?!\w)
    | \d+(?:[.,:/]\d+)*(?:[^\W_]\w*)?                               # numbers and what hangs on them
    | [^\W\d_]\w*(?:[-'./][^\W_]\w*)*                               # words, file names, compounds
    | _\w+ | [%€$£¥₹&] | °[cfCF]
    """,
    re.VERBOSE,
)
# Of code and formulas, and pictures; not punctuation.
_SYMBOL = re.compile(r"[=<>{}\[\]^|\\~+*]|[^\w\s\x00-\x7f’‘‚“”„–—−…°€£¥₹§¿¡«»·•´]")
_NUMBER = re.compile(r"(\d+(?:[.,:/]\d+)*)(.*)", re.DOTALL)
_GROUPED = re.compile(r"\d{1,3}(?:[.,]\d{3})+")
_INITIALS = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")
_INNER_CAPITAL = re.compile(r"[^\W\d_][^\W\d_]*[a-zß-ÿ][A-Z]|^[a-z]+[A-Z]")
_GREETING = re.compile(
    r"\s*(?:good\s+|guten\s+)?(?:morning|afternoon|evening|day|morgen|tag|abend)\s*[!,.]\s*(?=\S)", re.I
)
_QUOTES = "\"'`„“”"
_VERSION_TAG = re.compile(r"v\d+(?:\.\d+)*")

_PLAIN, _NUMERIC, _CODE, _NAME = range(4)


class _Form(NamedTuple):
    """One token, looked up."""

    low: str
    stem: str
    word: Word | None
    kind: int
    denied: bool = False  # "non-members": `stem` and `word` are those of "members"


@lru_cache(maxsize=1 << 15)
def _forms(token: str, language: str) -> tuple[_Form, ...]:
    """Return what is known of a token; of its parts if it is a compound that nothing is known of."""
    table = lexicon().tables[language]
    first = token[0]
    if first.isdigit():
        return (_Form(token.lower(), token.lower(), None, _NUMERIC),)
    if first in _QUOTES and len(token) > 2:
        inner = token.strip(_QUOTES).lower()
        return (_Form(inner, inner, None, _CODE),)
    if token in table.words and first.isupper():
        return (_Form(token.lower(), token, table.words[token], _PLAIN),)
    if _INITIALS.fullmatch(token):
        token = token.replace(".", "")
        token = token.upper() if token.upper() in table.words else token
        if token in table.words:
            return (_Form(token.lower(), token, table.words[token], _PLAIN),)
    low = token.lower()
    base = stem(low, language)
    word = table.words.get(low) or table.stems.get(base)
    if word is not None:
        return (_Form(low, base, word, _PLAIN),)
    if any(character.isdigit() for character in token) or first == "-" or "_" in token or "." in token or "@" in token:
        return (_Form(low, low.lstrip("-"), None, _CODE),)
    if "-" in token or "/" in token:
        parts = [part for part in re.split(r"[-/]", token) if part]
        if parts[0].lower() in ("non", "nicht") and len(parts) > 1:
            return (*(form._replace(denied=True) for form in _forms(parts[1], language)), *_each(parts[2:], language))
        return _each(parts, language)
    return (_denied(low, language, table) or _Form(low, base, None, _case(token)),)


def _each(parts: list[str], language: str) -> tuple[_Form, ...]:
    return tuple(form for part in parts for form in _forms(part, language))


def _case(token: str) -> int:
    return _NAME if (token.isupper() and len(token) > 1) or _INNER_CAPITAL.search(token) else _PLAIN


def _denied(low: str, language: str, table: Table) -> _Form | None:
    """Return the form without its denying prefix ("unpaid", "nonmember"), or None if it has none."""
    for prefix in ("un", "non", "nicht"):
        rest = low[len(prefix) :]
        if low.startswith(prefix) and len(rest) > 3 and not low.startswith(tuple(lexicon().not_prefixed)):
            base = stem(rest, language)
            return _Form(low, base, table.words.get(rest) or table.stems.get(base), _PLAIN, True)
    return None


@lru_cache(maxsize=1 << 15)
def _digest(text: str, key: bytes) -> int:
    """Return 23 bits that stand for `text`, marked as a digest."""
    return (
        int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=3, key=key).digest(), "big") | _DIGEST
    )


@lru_cache(maxsize=1 << 15)
def _spelling(low: str, key: bytes) -> int:
    """Return 16 bits that stay the same when neighbouring letters are swapped, doubled or halved."""
    skeleton = low[0] + "".join(sorted(set(low)))
    return int.from_bytes(blake2b(skeleton.encode("utf-8", "surrogatepass"), digest_size=2, key=key).digest(), "big")


def _language(tokens: list[str]) -> int:
    """Return the position in LANGUAGES of the language that most of the common words belong to; 0 if undecided."""
    votes = lexicon().votes
    scores = [0] * len(LANGUAGES)
    for token in tokens:
        bits = votes.get(token.lower(), 0)
        while bits:
            low = bits & -bits
            scores[low.bit_length() - 1] += 1
            bits ^= low
    best = max(scores)
    if not best:
        return 2 if any(character in "äöüß" for token in tokens for character in token.lower()) else 0
    return scores.index(best) if scores.count(best) == 1 else 0


class _Reader:
    """Reads one text from its first token to its last."""

    def __init__(self, text: str, key: bytes) -> None:
        if not text.isascii():
            text = unicodedata.normalize("NFC", text).replace("’", "'")
        greeting = _GREETING.match(text)
        if greeting:
            text = text[greeting.end() :]
        text, rest = text[:_MAX_CHARACTERS], text[_MAX_CHARACTERS:]
        raw = _TOKEN.findall(text)
        self.key = key
        self.language = _language(raw)
        self.tongue = "de" if self.language == 2 else "en"
        self.table = lexicon().tables[self.tongue]
        self.forms: list[_Form] = []
        self.capitals: list[bool] = []
        for token in raw:
            found = _forms(token, self.tongue)
            self.forms.extend(found)
            self.capitals.extend([token[0].isupper()] * len(found))
        self.order: list[int] = []
        self.numbers: set[int] = set()
        self.weak: set[int] = set()
        self.quantities: set[int] = set()
        self.names: set[int] = set()
        self.identifiers: set[int] = set()
        self.exclusive: set[int] = set()
        self.opposites: set[int] = set()
        self.spellings: list[tuple[int, int]] = []
        self.shape = self.negations = self.soft = 0
        self.question = ""
        self.source = self.target = -1
        self.pending = ""  # "from" or "to": what the next term is
        self.converts = False
        symbols = "".join(_SYMBOL.findall(text))
        for extra in (rest, symbols):
            if extra:
                self._add(_digest(extra, key), self.identifiers)

    def read(self) -> Profile:
        """Return the profile."""
        at, size = 0, len(self.forms)
        skip: set[int] = set()
        while at < size:
            if at in skip:
                at += 1
                continue
            form = self.forms[at]
            found = self._phrase(at, skip)
            if found:
                word, used = found
                self._word(word, form)
                at += used
                if word.question == "count" and at < size and self._unit(self.forms[at].low):
                    self.question = "units"  # "how many days" may be "how long"
                continue
            if form.kind == _NUMERIC or (
                form.word is not None and (form.word.value is not None or form.word.factor is not None)
            ):
                at = self._number(at)
                continue
            self._term(at, form)
            at += 1
        return self._profile()

    def _phrase(self, at: int, skip: set[int]) -> tuple[Word, int] | None:
        """Return the phrase that begins here and how many tokens it takes; a particle further on goes to `skip`."""
        form = self.forms[at]
        rests = self.table.phrases.get(form.low) or self.table.phrases.get(form.stem)
        if not rests:
            return None
        lows = [other.low for other in self.forms[at + 1 : at + 6]]
        for rest, key in rests:
            if tuple(lows[: len(rest)]) == rest:
                return self.table.words[key], 1 + len(rest)
        if form.low in lexicon().separable or form.stem in lexicon().separable:
            for rest, key in rests:
                if len(rest) == 1 and rest[0] in lows[1:]:
                    skip.add(at + 1 + lows.index(rest[0], 1))
                    return self.table.words[key], 1
        return None

    def _number(self, at: int) -> int:
        """Take a number with its factor and unit; return the position after it."""
        form = self.forms[at]
        weak, value, unit, after = False, "", "", at + 1
        if form.kind == _NUMERIC:
            match = _NUMBER.match(form.low)
            digits, suffix = match.groups() if match else (form.low, "")
            if suffix in ("st", "nd", "rd", "th"):
                self.numbers.add(_digest(f"#{digits}", self.key))
                return after
            value = _canonical(digits)
            if suffix == "k":
                value = _plain(_float(value) * 1000)
            elif suffix in ("am", "pm"):
                self._codes(self.table.words[f"#{suffix}"])
            elif suffix and self._unit(suffix) is None:
                word = self.table.words.get(form.low)
                if word is not None:
                    self._word(word, form)
                else:
                    self._add(_digest(form.low, self.key), self.identifiers)
                return after
            else:
                unit = suffix
        else:
            word = form.word
            assert word is not None  # noqa: S101
            weak = word.weak
            value = _plain(word.value if word.value is not None else word.factor or 0)
        while after < len(self.forms):
            word = self.forms[after].word
            if word is None or unit:
                break
            if word.factor is not None:
                value = _plain(_float(value) * word.factor)
            elif form.kind != _NUMERIC and word.value is not None and word.value < 10 <= _float(value) < 100:
                value = _plain(_float(value) + word.value)
            elif self.forms[after].low in ("am", "pm") and form.kind == _NUMERIC:
                self._codes(self.table.words[f"#{self.forms[after].low}"])
            else:
                break
            weak, after = False, after + 1
        if not unit and after < len(self.forms) and self._unit(self.forms[after].low) is not None:
            unit = self.forms[after].low
            after += 1
        if unit:
            dimension, factor = self._unit(unit) or ("", 1.0)
            self.quantities.add(_digest(f"{dimension}:{_plain(_float(value) * factor)}", self.key))
        else:
            digest = _digest(value, self.key)
            self.numbers.add(digest)
            if weak:
                self.weak.add(digest)
        return after

    def _unit(self, low: str) -> tuple[str, float] | None:
        word = self.table.words.get(low)
        return word.unit if word is not None else None

    def _term(self, at: int, form: _Form) -> None:
        """Take one token that is no number."""
        word = form.word
        self.negations += form.denied
        if form.kind == _CODE:
            if _VERSION_TAG.fullmatch(form.low):
                self.numbers.add(_digest(form.low[1:], self.key))
            else:
                self._add(_digest(form.stem, self.key), self.identifiers)
            return
        if word is not None:
            if at == 0:
                self.question = lexicon().yes_no[self.tongue].get(form.low, "")
            letter = len(form.low) == 1 and self.capitals[at] and at and form.low != "i"
            if not letter:
                if len(form.low) > 4 and word.number and not word.stop:
                    self.spellings.append((len(self.order), _spelling(form.low, self.key)))
                self._word(word, form)
                return
        if len(form.low) == 1 and not self.capitals[at]:
            return
        digest = _digest(form.stem, self.key)
        named = form.kind == _NAME or (self.capitals[at] and at > 0 and self.tongue == "en")
        if not named and len(form.low) > 4:
            self.spellings.append((len(self.order), _spelling(form.low, self.key)))
        self._add(digest, self.names if named else None)

    def _word(self, word: Word, form: _Form) -> None:
        """Take a form, or a phrase, of the lexicon."""
        self._codes(word)
        self.negations += word.negation
        self.soft |= word.soft_negation
        if word.question and not self.question:
            self.question = word.question
        if word.ordinal is not None:
            self.numbers.add(_digest(f"#{word.ordinal}", self.key))
        if word.direction == "convert":
            self.converts = True
        elif word.direction:
            if word.direction == "to" and self.converts and self.source < 0 and self.order:
                self.source = self.order[-1]
            self.pending = word.direction
        if word.number and not word.stop:
            self._add(word.number, None)
        elif not word.stop and not word.direction and not word.question:
            self._add(_digest(form.stem, self.key), None)

    def _codes(self, word: Word) -> None:
        self.shape |= word.shape
        for group, number in word.exclusive:
            self.exclusive.add(group * 128 + number)
        for pair, side in word.opposites:
            self.opposites.add(pair * 2 + side)

    def _add(self, term: int, kind: set[int] | None) -> None:
        self.order.append(term)
        if kind is not None:
            kind.add(term)
        if self.pending == "from":
            self.source = term
        elif self.pending == "to":
            self.target = term
        self.pending = ""

    def _profile(self) -> Profile:
        known = lexicon()
        lows = [form.low for form in self.forms]
        passive = any(low in known.passive_aux for low in lows) and any(low in known.passive_by for low in lows)
        symmetric = any(low in known.symmetric for low in lows)
        order = tuple(self.order)
        return Profile(
            language=self.language,
            question=known.questions.index(self.question or "command"),
            flags=self.negations % 2 * _NEGATED | self.soft * _DENYING | passive * _PASSIVE | symmetric * _SYMMETRIC,
            shape=self.shape,
            source=self.source,
            target=self.target,
            order=order,
            terms=frozenset(order),
            numbers=frozenset(self.numbers),
            weak_numbers=frozenset(self.weak),
            quantities=frozenset(self.quantities),
            names=frozenset(self.names),
            identifiers=frozenset(self.identifiers),
            exclusive=frozenset(self.exclusive),
            opposites=frozenset(self.opposites),
            spellings=tuple(self.spellings),
        )


def _canonical(digits: str) -> str:
    """Return a number as it is compared: without separators of thousands, with a decimal point."""
    if _GROUPED.fullmatch(digits):
        return digits.replace(",", "").replace(".", "")
    return digits.replace(",", ".")


def _float(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return 0.0


def _plain(value: float) -> str:
    return f"{value:.10g}"


def compare(cached: Profile, new: Profile, *, off: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """Return the guards that forbid to answer one question with the other's answer.

    Args:
        cached: Profile of the question whose answer is stored.
        new: Profile of the question that is asked, made with the same key.
        off: Guards that are not to block.

    Returns:
        Codes out of `GUARDS`; empty if the answer may be served. The order of the two makes no difference.
    """
    found = []
    known = lexicon()
    if cached.language != new.language and cached.language and new.language:
        found.append("language")
    if cached.numbers != new.numbers and _numbers_differ(cached, new):
        found.append("number")
    if cached.quantities != new.quantities:
        found.append("quantity")
    if (cached.flags ^ new.flags) & _NEGATED and not (new if cached.flags & _NEGATED else cached).flags & _DENYING:
        found.append("negation")
    if cached.opposites != new.opposites:
        for code in cached.opposites - new.opposites:
            other = ((code - 1) ^ 1) + 1
            if other in new.opposites and other not in cached.opposites:
                found.append("antonym")
                break
    if cached.exclusive != new.exclusive:
        groups = {code >> 7 for code in cached.exclusive - new.exclusive}
        if groups and any(code >> 7 in groups for code in new.exclusive - cached.exclusive):
            found.append("exclusive")
    if (
        cached.question != new.question
        and (known.questions[cached.question], known.questions[new.question]) in known.conflicts
    ):
        found.append("question_word")
    if (cached.source, cached.target) != (new.source, new.target) and (
        -1 != cached.source == new.target or -1 != cached.target == new.source
    ):
        found.append("direction")
    elif cached.order != new.order and _swapped(cached, new, known):
        found.append("order")
    if cached.shape != new.shape:
        found.append("shape")
    if cached.terms != new.terms:
        found.extend(_wording(cached, new))
    elif cached.order == new.order and (cached.flags ^ new.flags) & _PASSIVE and len(cached.order) > 2:
        found.append("order")
    return tuple(code for code in found if code not in off) if off else tuple(found)


def _numbers_differ(cached: Profile, new: Profile) -> bool:
    left, right = cached.numbers - new.numbers, new.numbers - cached.numbers
    if left and right:
        return True
    # "one" and "both" are often left out: alone they prove nothing.
    return bool((left | right) - cached.weak_numbers - new.weak_numbers)


def _swapped(cached: Profile, new: Profile, known: Lexicon) -> bool:
    """Return whether two things change places ("does A call B", "does B call A")."""
    left, right = (_canonical_order(one, known) for one in (cached, new))
    if (
        left == right
        or len(left) != len(right)
        or sorted(left) != sorted(right)
        or (cached.flags ^ new.flags) & _PASSIVE
    ):
        return False
    differ = [at for at in range(len(left)) if left[at] != right[at]]
    if len(differ) == 2 and differ[1] > differ[0] + 1:
        # "The largest table of the base", "which table is largest": a quality may stand anywhere.
        return cached.question == new.question and known.graded.isdisjoint((left[differ[0]], left[differ[1]]))
    # Neighbours change places without harm ("apology letter", "letter of apology"), and so does a part of the sentence
    # that moves to its front, unless that turns round two names or two of a kind.
    if (cached.flags | new.flags) & _SYMMETRIC:
        return False
    things = {term for term in left if term in cached.names or term in cached.identifiers}
    if [term for term in left if term in things] != [term for term in right if term in things]:
        return True
    groups = {term: known.particular[term] for term in left if term in known.particular}
    return any(
        groups[one] & groups[other] and (left.index(one) < left.index(other)) != (right.index(one) < right.index(other))
        for one, other in combinations(groups, 2)
    )


def _canonical_order(one: Profile, known: Lexicon) -> list[int]:
    """Return the terms in their order, every word replaced by one that stands for all of its meaning."""
    return [term if term & _DIGEST else known.canonical[term] for term in one.order]


def _wording(cached: Profile, new: Profile) -> list[str]:
    """Return the guards over the words that only one of the questions holds."""
    known = lexicon()
    left = _unexplained(cached, new, known)
    right = _unexplained(new, cached, known)
    if left and right:
        _drop_misspelt(left, right, cached, new)
    if not left or not right:
        left, right = left - known.light, right - known.light
        if not (
            cached.names.isdisjoint(new.names)
            and cached.identifiers.isdisjoint(new.identifiers)
            and cached.numbers.isdisjoint(new.numbers)
        ):
            left, right = left - known.category, right - known.category
    found = []
    odd = left | right
    if odd & (cached.identifiers | new.identifiers):
        found.append("identifier")
    if odd & (cached.names | new.names):
        found.append("entity")
    if left and right:
        found.append("substitution")
    elif left or right:
        found.append("restriction")
    if cached.terms and new.terms and len(left) == len(cached.terms):
        found.append("topic")
    return found


def _unexplained(mine: Profile, other: Profile, known: Lexicon) -> set[int]:
    """Return the terms of one question that the other neither holds nor says in another word."""
    related, theirs, implied = known.related, other.terms, known.implied[other.question]
    return {
        term
        for term in mine.terms - theirs
        if term & _DIGEST or (term not in implied and related[term].isdisjoint(theirs))
    }


def _drop_misspelt(left: set[int], right: set[int], cached: Profile, new: Profile) -> None:
    """Take out of both sets the terms that are the same word but for swapped or doubled letters."""
    theirs = {digest: new.order[at] for at, digest in new.spellings if new.order[at] in right}
    for at, digest in cached.spellings:
        mine, other = cached.order[at], theirs.get(digest, 0)
        # Two words of the lexicon are two words, however alike they look.
        if mine in left and other in right and (mine | other) & _DIGEST:
            left.discard(mine)
            right.discard(other)
