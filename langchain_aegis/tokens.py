"""Cut a text into tokens, each with what the lexicon knows of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from langchain_aegis.lexicon import LANGUAGES, Phrases, Table, Word, lexicon, stem

TOKEN = re.compile(
    r"""
    [^\W\d_]+(?=[\s,;!?)]|$)                                            # a word, nothing hangs on it
    | "[^"\n]{1,80}" | „[^“”"\n]{1,80}[“”"] | “[^”\n]{1,80}” | `[^`\n]{1,80}`     # quoted
    | (?<!\w)'[^'\s][^'\n]{0,80}'(?!\w)
    | https?://\S+ | [\w.+-]{1,64}@[\w-]+\.[\w.-]*\w                     # addresses
    | (?<!\S)--?[^\W\d][\w-]*                                       # options
    | km/h | m/s | [cC]\+\+ | [cCfF]\#(?!\w)
    | \d{4}-\d\d?-\d\d?(?![\w-])                                    # dates: their parts have an order
    | \d+(?:[.,:/]\d+)*(?:[^\W_]\w*)?                               # numbers and what hangs on them
    | [^\W\d_]\w*\(\)                                               # functions: get() is no "get"
    | [^\W\d_]\w*(?:[-'./][^\W_]\w*)*                               # words, file names, compounds
    | _\w+ | [%€$£¥₹&] | °[cfCF]
    """,
    re.VERBOSE,
)
# Of code and formulas, and pictures; not punctuation.
SYMBOL = re.compile(r"""[^\w\s!"#$%&'(),\-./:;?@`\x00-\x1f\x7f’‘‚“”„–—−…°€£¥₹§¿¡«»·•´]""")
# Most questions are letters, spaces and these marks. TOKEN finds runs of letters in them, and SYMBOL nothing: this is
# said faster.
PLAIN_TEXT = re.compile(r"[a-zA-ZäöüÄÖÜß\s,:;!?)]*+(?:\((?!\))[a-zA-ZäöüÄÖÜß\s,:;!?)]*+)*+")
WORD = re.compile(r"[a-zA-ZäöüÄÖÜß]+")
NUMBER = re.compile(r"(\d{4}-\d\d?-\d\d?|\d+(?:[.,:/]\d+)*)(.*)", re.DOTALL)
GROUPED = re.compile(r"\d{1,3}(?:[.,]\d{3})+")
_INITIALS = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")
_LETTERS = re.compile(r"[^\W\d_]+(?:[-/'][^\W\d_]+)*|[^\w\s].*|.", re.DOTALL)
_INNER_CAPITAL = re.compile(r"[a-zß-ÿ][A-Z]")
GREETING = re.compile(
    r"\s*(?:good\s+|guten\s+)?(?:morning|afternoon|evening|day|morgen|tag|abend)\s*[!,.]\s*(?=\S)", re.I
)
_QUOTES = "\"'`„“”"
VERSION_TAG = re.compile(r"v\d+(?:\.\d+)*")

PLAIN, NUMERIC, CODE, NAME = range(4)
ENGLISH, GERMAN = LANGUAGES.index("en"), LANGUAGES.index("de")


@dataclass(slots=True)
class Form:
    """One token, looked up."""

    low: str
    stem: str
    word: Word | None
    kind: int
    denied: bool = False  # "non-members": `stem` and `word` are those of "members"
    capital: bool = False
    phrases: Phrases | None = None  # that begin with this form
    separable: bool = False  # their second word may come later
    marks: int = 0
    frame: int = 0  # as in the lexicon; 0 of a form with content
    inert: bool = False  # says nothing that any guard looks at
    term: int = 0  # number of a form that says what it says and no more; 0 of every other
    unknown: bool = False  # an ordinary word that the lexicon does not hold


@lru_cache(maxsize=1 << 15)
def forms_of(token: str, language: str) -> tuple[Form, ...]:
    """Return what is known of a token; of its parts if it is a compound that nothing is known of."""
    known = lexicon()
    table = known.tables[language]
    forms = _forms(token, language, table)
    for form in forms:
        form.phrases = table.phrases.get(form.low) or table.phrases.get(form.stem)
        form.separable = form.low in known.separable or form.stem in known.separable
        form.marks = known.marks.get(form.low, 0)
        word = form.word
        ordinary = form.kind == PLAIN and not form.denied and not (form.capital and len(form.low) == 1)
        if word is None:
            form.unknown = ordinary and len(form.low) > 1
            continue
        form.frame = word.frame
        if form.phrases and (word.number in known.graded or (form.low in table.stops and not word.stop)):
            ordinary = False  # it depends on its place: "how" may stand before, and a text may begin with it ("May I")
        if ordinary and _silent(word):
            form.inert, form.term = word.stop, 0 if word.stop else word.number
    return forms


def _silent(word: Word) -> bool:
    """Return whether a word says nothing beyond its being there."""
    speaking = (word.negation, word.soft_negation, word.question, word.direction, word.shape, word.exclusive)
    counting = (word.value, word.factor, word.ordinal)
    return not any(speaking) and not word.opposites and all(value is None for value in counting)


def _forms(token: str, language: str, table: Table) -> tuple[Form, ...]:
    first = token[0]
    if first.isdigit():
        return (Form(token.lower(), token.lower(), None, NUMERIC),)
    if first in _QUOTES and len(token) > 2:
        inner = token.strip(_QUOTES).lower()
        return (Form(inner, inner, None, CODE),)
    capital = first.isupper()
    if _INITIALS.fullmatch(token):
        token = token.replace(".", "")
        token = token.upper() if token.upper() in table.words else token
    if capital and token in table.words:
        return (Form(token.lower(), token, table.find(token), PLAIN, capital=True),)
    low = token.lower()
    base = stem(low, language)
    word = table.find(low) or table.find_stem(base)
    if word is not None:
        return (Form(low, base, word, PLAIN, capital=capital),)
    if first == "-":
        return (Form(low, token.lstrip("-"), None, CODE),)  # -v is not -V
    if not _LETTERS.fullmatch(token):
        return (Form(low, low.removesuffix("()"), None, CODE),)
    if "-" in token or "/" in token or "'" in token:
        parts = [part for part in re.split(r"[-/']", token) if part]
        if parts[0].lower() in ("non", "nicht") and len(parts) > 1:
            denied, *others = _each(parts[1:], language, table)
            denied.denied = True
            return (denied, *others)
        return _each(parts, language, table)
    if language == "de":
        found = _german(low, table, capital)
        if found:
            return found
    return (_denied(low, language, table, capital) or Form(low, base, None, _case(token), capital=capital),)


_INFIX = re.compile(
    r"(ab|an|auf|aus|bei|ein|fest|her|herunter|hinzu|hoch|mit|nach|runter|vor|weg|weiter|wieder|zurück|zusammen|um|)"
    r"(?:zu|ge)(\w{3,}(?:en|rn|ln|t))"
)
_LINKS = ("", "s", "es", "n", "en", "e")  # between the parts of a compound


def _german(low: str, table: Table, capital: bool) -> tuple[Form, ...]:
    """Return the forms of an inflected verb ("gekündigt", "anzumelden") or of a compound's parts, or none."""
    match = _INFIX.fullmatch(low)
    if match:
        base = stem(match[1] + match[2], "de")
        word = table.find_stem(base)
        if word is not None:
            return (Form(low, base, word, PLAIN, capital=capital),)
    for cut in range(4, len(low) - 3):
        last = table.find(low[cut:]) or table.find_stem(stem(low[cut:], "de"))
        if last is None or not last.number:
            continue
        for link in _LINKS:
            rest = low[: cut - len(link)]
            if len(rest) > 3 and low[:cut].endswith(link):
                first = table.find(rest) or (table.find_stem(stem(rest, "de")) if not link else None)
                if first is not None and first.number:
                    return (
                        Form(rest, stem(rest, "de"), first, PLAIN, capital=capital),
                        Form(low[cut:], stem(low[cut:], "de"), last, PLAIN, capital=capital),
                    )
    return ()


def join_particle(forms: list[Form]) -> None:
    """Put the particle at the end of a German question back before its verb ("melde ich mich an": "anmelde")."""
    known = lexicon()
    if len(forms) < 3 or forms[-1].low not in known.particles:
        return
    particle, table, verb = forms[-1].low, known.tables["de"], -1
    for at, form in enumerate(forms[:-2]):
        if not form.low.isalpha():
            continue
        if stem(particle + form.low, "de") in table.stems:
            verb = at
            break
        if verb < 0 and len(form.low) > 3 and (form.word is None or not form.word.stop):
            verb = at if forms[at + 1].low in known.before_noun else -1
    if verb >= 0:
        forms[verb] = forms_of(particle + forms[verb].low, "de")[0]
        forms.pop()


def _each(parts: list[str], language: str, table: Table) -> tuple[Form, ...]:
    return tuple(form for part in parts for form in _forms(part, language, table))


def _case(token: str) -> int:
    return NAME if (token.isupper() and len(token) > 1) or _INNER_CAPITAL.search(token) else PLAIN


def _denied(low: str, language: str, table: Table, capital: bool) -> Form | None:
    """Return the form without its denying prefix ("unpaid", "nonmember"), or None if it has none."""
    for prefix in ("un", "non", "nicht"):
        rest = low[len(prefix) :]
        if low.startswith(prefix) and len(rest) > 3 and not low.startswith(lexicon().not_prefixed):
            base = stem(rest, language)
            return Form(low, base, table.find(rest) or table.find_stem(base), PLAIN, True, capital)
    return None


def language_of(tokens: list[str]) -> int:
    """Return the position in LANGUAGES of the language that most of the common words belong to; 0 if undecided."""
    total = sum(map(_votes, tokens))
    if total:
        winner = _winner(total)
        if winner >= 0:
            return winner
    # "Was kostet ..." could be both: the rest of the words decides.
    tables = lexicon().tables
    english, german = (sum(token.lower() in tables[name].words for token in tokens) for name in ("en", "de"))
    german += sum(token.endswith(_GERMAN_ENDINGS) or not _UMLAUTS.isdisjoint(token) for token in tokens)
    return 0 if english == german else ENGLISH if english > german else GERMAN


@lru_cache(maxsize=1 << 15)
def _votes(token: str) -> int:
    votes = lexicon().votes
    return votes.get(token) or votes.get(token.lower(), 0)


@lru_cache(maxsize=1 << 12)
def _winner(votes: int) -> int:
    """Return the position with the most votes; 0 if others than English and German share them, -1 if those do."""
    scores = [votes >> 16 * position & 0xFFFF for position in range(len(LANGUAGES))]
    best = max(scores)
    if scores.count(best) == 1:
        return scores.index(best)
    return -1 if best in (scores[ENGLISH], scores[GERMAN]) else 0


_UMLAUTS = frozenset("äöüßÄÖÜ")
_GERMAN_ENDINGS = (
    "ieren",
    "iert",
    "iere",
    "ung",
    "ungen",
    "keit",
    "heit",
    "lich",
    "schaft",
    "igkeit",
    "stelle",
    "zeiten",
)


def canonical(digits: str) -> str:
    """Return a number as it is compared: without separators of thousands, with a decimal point."""
    if GROUPED.fullmatch(digits):
        return digits.replace(",", "").replace(".", "")
    return digits.replace(",", ".")


def as_float(value: str) -> float:
    """Return a number of a text; 0 for what only looks like one ("1.2.3", "12:30")."""
    try:
        return float(value)
    except ValueError:
        return 0.0


def plain(value: float) -> str:
    """Return a number so that equal ones read the same."""
    return f"{value:.10g}"
