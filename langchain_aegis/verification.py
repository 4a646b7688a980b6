"""Whether a cached question's answer may serve a new question that lies near it.

Similarity cannot tell: "enable" lies nearer to "disable" than to "switch on". Each guard looks for one kind of
difference that changes the answer, and blocks when it finds one. Pure: no clock, no network.
"""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import combinations, filterfalse

from langchain_aegis.lexicon import QUIET, SYMMETRIC, Lexicon, lexicon, read
from langchain_aegis.lexicon import thresholds as thresholds
from langchain_aegis.profiles import COUNTS, DENYING, DIGEST, NAMES, NEGATED, PASSIVE, PHRASES, REPEATS, STARTS
from langchain_aegis.profiles import Profile as Profile
from langchain_aegis.profiles import profile as profile

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

_NONE: frozenset[int] = frozenset()
_NEW_CONSTRUCTION = 3  # words without content in which two sentences differ that are built in different ways


FAR, NEAR, CLOSE = 0, 1, 2
# Of the way from the lowest similarity that is served to 1: from the first on a question may be built anew, from the
# second on also one of few words, or with another quality. Below, other words mostly make another question.
_NEAR, _CLOSE = 0.343, 0.571


def nearness(similarity: float, min_similarity: float) -> int:
    """Return how much room for other words a similarity gives two questions: FAR, NEAR or CLOSE."""
    way = similarity - min_similarity
    room = 1 - min_similarity
    return CLOSE if way >= _CLOSE * room else NEAR if way >= _NEAR * room else FAR


def compare(cached: Profile, new: Profile, *, off: frozenset[str] = frozenset(), near: int = CLOSE) -> tuple[str, ...]:
    """Return the guards that forbid to answer one question with the other's answer.

    Args:
        cached: Profile of the question whose answer is stored.
        new: Profile of the question that is asked, made with the same key.
        off: Guards that are not to block.
        near: What `nearness` says of their similarity. The less of it, the more must they share.

    Returns:
        Codes out of `GUARDS`; empty if the answer may be served. The order of the two makes no difference.
    """
    found = []
    known = lexicon()
    if (not cached.language or cached.language != new.language) and _languages_differ(cached, new):
        found.append("language")
    mine, theirs = cached.flags, new.flags
    flags, differ = mine | theirs, mine ^ theirs
    if flags & COUNTS:
        if cached.numbers != new.numbers and _numbers_differ(cached, new):
            found.append("number")
        if cached.quantities != new.quantities:
            found.append("quantity")
    if differ & NEGATED and not _denied_in_a_word(mine, theirs):
        found.append("negation")
    if not cached.opposed.isdisjoint(new.opposites) and _oppose(cached, new):
        found.append("antonym")
    left, right = cached.exclusive, new.exclusive
    if not (left <= right or right <= left) and _exclude(left, right):
        found.append("exclusive")
    if cached.question != new.question and _asks_otherwise(cached, new, known):
        found.append("question_word")
    if flags & STARTS and _turned_round(cached, new):
        found.append("direction")
    if cached.shape != new.shape:
        found.append("shape")
    if cached.order != new.order or differ & PASSIVE:
        _wording(cached, new, known, flags, near, found)
    return tuple(filterfalse(off.__contains__, found) if off else found)


def _languages_differ(cached: Profile, new: Profile) -> bool:
    # An undecided language is one of names and key words only: they must be the same then ("Mozart Geburtstag").
    return bool(cached.language and new.language) or cached.terms != new.terms


def _oppose(cached: Profile, new: Profile) -> bool:
    """Return whether of a pair of opposites one question speaks of one, and the other only of the other."""
    return any(code ^ 1 not in new.opposites for code in cached.opposed & new.opposites)


def _exclude(left: frozenset[int], right: frozenset[int]) -> bool:
    """Return whether each holds a member of an exclusive set that the other does not hold."""
    ours = left - right
    for code in right - left:
        for other in ours:
            if code >> 8 == other >> 8:
                return True
    return False


def _denied_in_a_word(cached: int, new: int) -> bool:
    """Return whether the question without a negation says the same in one word ("can't remember", "forgot")."""
    negated, other = (cached, new) if cached & NEGATED else (new, cached)
    return bool(other & DENYING and not negated & DENYING)


def _asks_otherwise(cached: Profile, new: Profile, known: Lexicon) -> bool:
    """Return whether the question words ask for different things ("when", "where")."""
    if (cached.question, new.question) not in known.conflicts:
        return False
    if known.what == cached.question:
        return known.implied[new.question].isdisjoint(cached.terms)
    return known.what != new.question or known.implied[cached.question].isdisjoint(new.terms)


def hardly_differ(cached: Profile, new: Profile) -> bool:
    """Return whether two questions differ at most in words such as "the" and "can", in inflection and in synonyms."""
    known = lexicon()
    if any(code & 0xFF > QUIET for code in cached.frame ^ new.frame) or len(cached.order) != len(new.order):
        return False
    for one, other in zip(cached.order, new.order, strict=True):
        if one != other and other not in known.related.get(one, _NONE):
            return False
    if (cached.flags ^ new.flags) & (NEGATED | DENYING | PASSIVE | SYMMETRIC):
        return False
    return all(getattr(cached, name) == getattr(new, name) for name in _ASKED)


# What two such questions have in common. The guards have compared the rest; where words may differ, that differs, too.
_ASKED = ("language", "question", "shape", "numbers", "weak_numbers", "quantities", "names", "identifiers")


def _turned_round(cached: Profile, new: Profile) -> bool:
    """Return whether one question starts where the other ends."""
    if cached.source == new.source and cached.target == new.target:
        return False
    if -1 != cached.source == new.target or -1 != cached.target == new.source:
        return True
    # "Net from gross", "gross from net": both ends are spoken of in both.
    return (
        min(cached.source, new.source) >= 0
        and cached.source != new.source
        and not cached.target == new.target >= 0
        and cached.source in new.terms
        and new.source in cached.terms
    )


def _numbers_differ(cached: Profile, new: Profile) -> bool:
    left, right = cached.numbers - new.numbers, new.numbers - cached.numbers
    if left and right:
        return True
    # "one" and "both" are often left out: alone they prove nothing.
    return bool((left | right) - cached.weak_numbers - new.weak_numbers)


def _swapped(cached: Profile, new: Profile, known: Lexicon) -> bool:
    """Return whether two things change places ("does A call B", "does B call A")."""
    if len(cached.order) != len(new.order):
        return False
    left, right = [*map(_canonical, cached.order)], [*map(_canonical, new.order)]
    if (cached.flags ^ new.flags) & PASSIVE:
        return left == right and len(left) > 2  # "views that use tables", "views used by tables"
    if left == right or sorted(left) != sorted(right):
        return False
    differ = [at for at in range(len(left)) if left[at] != right[at]]
    if len(differ) == 2 and differ[1] > differ[0] + 1:
        # "The largest table of the base", "which table is largest": a quality may stand anywhere.
        return cached.question == new.question and known.graded.isdisjoint((left[differ[0]], left[differ[1]]))
    # Neighbours change places without harm ("apology letter", "letter of apology"), and so does a part of the sentence
    # that moves to its front, unless that turns round two names or two of a kind.
    if (cached.flags | new.flags) & SYMMETRIC:
        return _far_apart(left, right, known)
    things = {term for term in left if term in cached.names or term in cached.identifiers}
    if [term for term in left if term in things] != [term for term in right if term in things]:
        return True
    mine, theirs = len(cached.frame - new.frame), len(new.frame - cached.frame)
    if min(mine, theirs) > 0 and mine + theirs >= _NEW_CONSTRUCTION:
        return False  # built anew, the parts of the sentence stand where they may
    groups = {term: known.reversible[term] for term in left if term in known.reversible}
    return any(
        groups[one] & groups[other] and (left.index(one) < left.index(other)) != (right.index(one) < right.index(other))
        for one, other in combinations(groups, 2)
    )


def _far_apart(left: list[int], right: list[int], known: Lexicon) -> bool:
    """Return whether two of a kind that more than one word lies between change places.

    "A and B" is "B and A", but "A against C and B" is not "B against C and A".
    """
    for one, other in combinations([term for term in left if term in known.reversible], 2):
        if known.reversible[one] & known.reversible[other]:
            before, after = left.index(one) - left.index(other), right.index(one) - right.index(other)
            if before * after < 0 and min(abs(before), abs(after)) > 2:
                return True
    return False


@lru_cache(maxsize=1 << 14)
def _canonical(term: int) -> int:
    """Return the term that stands for all terms of its meaning."""
    return min(lexicon().related.get(term, (term,)))


def _wording(cached: Profile, new: Profile, known: Lexicon, flags: int, near: int, found: list[str]) -> None:
    """Add the guards over the order of the terms and over those that only one of the questions holds."""
    mine, theirs, related = cached.terms, new.terms, known.related
    left, right = mine - theirs, theirs - mine
    if cached.question != new.question:
        # Asked in the same way, both name what they ask for: it must be the same ("how much is the rent", "the fee").
        left, right = left - known.implied[new.question], right - known.implied[cached.question]
    misspelt = False
    for term in left:
        if term in related:
            if not related[term].isdisjoint(theirs):
                left = left - {term} if len(left) > 1 else _NONE  # the loop goes on over the old set
        elif term >= DIGEST:
            misspelt = misspelt or _looks_like_one_of(term, cached, new)
    for term in right:
        if term in related:
            if not related[term].isdisjoint(mine):
                right = right - {term} if len(right) > 1 else _NONE
        elif term >= DIGEST:
            misspelt = misspelt or _looks_like_one_of(term, new, cached)
    if left and right:
        if misspelt:
            left, right = _without_misspelt(left, right, cached, new)
        if flags & PHRASES and not (known.phrases.isdisjoint(left) and known.phrases.isdisjoint(right)):
            left, right = _without_phrases(left, right, cached, new, known)
    if not (left and right):
        if left or right:
            left, right = left - known.light, right - known.light
        if not (left or right):
            if _swapped(cached, new, known):
                found.append("order")
            return
        if flags & (COUNTS | NAMES) and (
            cached.numbers & new.numbers or cached.names & new.names or cached.identifiers & new.identifiers
        ):
            left, right = left - known.category, right - known.category
    named = False
    if flags & NAMES:
        odd = left | right
        if cached.identifiers != new.identifiers and not odd.isdisjoint(cached.identifiers | new.identifiers):
            found.append("identifier")
            named = True
        if cached.names != new.names and not odd.isdisjoint(cached.names | new.names):
            found.append("entity")
            named = True
    if (left or right) and (named or not _reworded(left, right, cached, new, known, near)):
        found.append("substitution" if left and right else "restriction")
    if left == mine and right == theirs and left and right:
        found.append("topic")


def _looks_like_one_of(term: int, one: Profile, other: Profile) -> bool:
    """Return whether a word of one question that no lexicon knows may be a misspelt word of the other.

    `_without_misspelt` looks closer: at the other's words, and at every spelling of a word that is repeated.
    """
    look = one.spellings[one.order.index(term)]
    return bool(look and look in other.spellings) or bool(one.flags & REPEATS and one.order.count(term) > 1)


def _reworded(
    left: frozenset[int], right: frozenset[int], cached: Profile, new: Profile, known: Lexicon, near: int
) -> bool:
    """Return whether the odd words come from another way to ask.

    A word that is put into an otherwise equal sentence changes what is asked ("flu", "flu in babies"; "my account",
    "my message"). Where the sentence is built anew, a few odd words mostly belong to the new construction, as long as
    the questions share more. A quality, or a member of a set of alternatives, is never just added; one that stands for
    another word must be close. Names and codes never get here.
    """
    if near == FAR:
        return False
    alternative = not (known.alternatives.isdisjoint(left) and known.alternatives.isdisjoint(right))
    if alternative and (near != CLOSE or not (left and right) or not _denying().isdisjoint(left | right)):
        return False
    left, right = left - known.relations, right - known.relations
    many, more = len(left), len(right)
    if many > 3 or more > 3 or many + more > 5:
        return False
    needed = 2 if near == CLOSE and many + more < 3 else 3
    if len(cached.terms) - many < needed or len(new.terms) - more < needed:
        return False
    if len(cached.frame ^ new.frame) < _NEW_CONSTRUCTION:
        return False
    # "How do I cancel it", "what is the process for upgrading it": another act.
    return known.acts.isdisjoint(left) or known.acts.isdisjoint(right)


@cache
def _denying() -> frozenset[int]:
    """Return the words that deny without a negation, and those that deny their opposite by a prefix ("ineligible")."""
    prefixes = read("guards.toml")["negation"]["prefixes_en"].split()
    found = {word.number for t in lexicon().tables.values() for word in t.special.values() if word.soft_negation}
    table = lexicon().tables["en"]
    for form, codes in table.opposites.items():
        for prefix in filter(form.startswith, prefixes):
            denied = table.opposites.get(form.removeprefix(prefix), ())
            if any(code ^ 1 in denied for code in codes):
                found.add(table.words[form])
    return frozenset(found)


def _without_phrases(
    left: frozenset[int], right: frozenset[int], cached: Profile, new: Profile, known: Lexicon
) -> tuple[frozenset[int], frozenset[int]]:
    """Take out phrases whose words stand apart in the other question ("word document", "document in Word")."""
    ours = {phrase for phrase in left & known.phrases if _stands_apart(phrase, new.terms, known)}
    theirs = {phrase for phrase in right & known.phrases if _stands_apart(phrase, cached.terms, known)}
    if ours or theirs:
        left, right = left - ours - _said(left, theirs, known), right - theirs - _said(right, ours, known)
    return left, right


def _stands_apart(phrase: int, terms: frozenset[int], known: Lexicon) -> bool:
    """Return whether every word of a phrase is said among the terms."""
    related = known.related
    for part in known.parts[phrase]:
        if part not in terms and (part not in related or related[part].isdisjoint(terms)):
            return False
    return True


def _said(terms: frozenset[int], phrases: set[int], known: Lexicon) -> set[int]:
    """Return those of the terms that the phrases say."""
    parts = {part for phrase in phrases for part in known.parts[phrase]}
    return {term for term in terms if term in parts or not known.related.get(term, _NONE).isdisjoint(parts)}


def _without_misspelt(
    left: frozenset[int], right: frozenset[int], cached: Profile, new: Profile
) -> tuple[frozenset[int], frozenset[int]]:
    """Take out of both sets the terms that are the same word but for swapped or doubled letters."""
    mine = {digest for term, digest in zip(cached.order, cached.spellings, strict=True) if term in left}
    theirs = {digest for term, digest in zip(new.order, new.spellings, strict=True) if term in right}
    alike = mine & theirs
    alike.discard(0)
    if alike:
        pairs = {*zip(cached.order, cached.spellings, strict=True), *zip(new.order, new.spellings, strict=True)}
        pairs = {(term, digest) for term, digest in pairs if digest in alike and (term in left or term in right)}
        unknown = {digest for term, digest in pairs if term & DIGEST}
        dropped = {term for term, digest in pairs if digest in unknown}
        left -= dropped
        right -= dropped
    return left, right
