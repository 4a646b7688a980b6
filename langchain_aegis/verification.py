"""Whether a cached question's answer may serve a new question that lies near it.

Similarity cannot tell: "enable" lies nearer to "disable" than to "switch on". Each guard looks for one kind of
difference that changes the answer, and blocks when it finds one. Pure: no clock, no network.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

from langchain_aegis.lexicon import SYMMETRIC, Lexicon, lexicon
from langchain_aegis.lexicon import thresholds as thresholds
from langchain_aegis.profiles import DENYING, DIGEST, NEGATED, PASSIVE
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
    # An undecided language is one of names and key words only: they must be the same then ("Mozart Geburtstag").
    if cached.language != new.language if cached.language and new.language else cached.terms != new.terms:
        found.append("language")
    if cached.numbers != new.numbers and _numbers_differ(cached, new):
        found.append("number")
    if cached.quantities != new.quantities:
        found.append("quantity")
    turned = cached.flags ^ new.flags
    if turned & NEGATED and not _denied_in_a_word(cached.flags, new.flags):
        found.append("negation")
    left, right = cached.opposites, new.opposites
    if not (left <= right or right <= left) and _take_sides(left, right, 1):
        found.append("antonym")
    left, right = cached.exclusive, new.exclusive
    if not (left <= right or right <= left) and _take_sides(left, right, 8):
        found.append("exclusive")
    if cached.question != new.question and _asks_otherwise(cached, new, known):
        found.append("question_word")
    if (cached.source >= 0 or new.source >= 0) and _turned_round(cached, new):
        found.append("direction")
    if cached.shape != new.shape:
        found.append("shape")
    if cached.order != new.order or turned & PASSIVE:
        _wording(cached, new, known, found)
    return tuple(code for code in found if code not in off) if off else tuple(found)


def _take_sides(left: frozenset[int], right: frozenset[int], bits: int) -> bool:
    """Return whether each holds a member of one set of alternatives that the other does not hold."""
    for code in right:
        if code not in left:
            for other in left:
                if not (code ^ other) >> bits and other not in right:
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
        return False
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


@lru_cache(maxsize=1 << 14)
def _canonical(term: int) -> int:
    """Return the term that stands for all terms of its meaning."""
    return min(lexicon().related.get(term, (term,)))


def _wording(cached: Profile, new: Profile, known: Lexicon, found: list[str]) -> None:
    """Add the guards over the order of the terms and over those that only one of the questions holds."""
    left, left_misspelt = _odd(cached, new, known)
    right, right_misspelt = _odd(new, cached, known)
    if left and right:
        if left_misspelt or right_misspelt:
            left, right = _without_misspelt(left, right, cached, new)
        if not (known.phrases.isdisjoint(left) and known.phrases.isdisjoint(right)):
            left, right = _without_phrases(left, right, cached, new, known)
    if not (left and right):
        if left or right:
            left, right = left - known.light, right - known.light
        if not (left or right):
            if _swapped(cached, new, known):
                found.append("order")
            return
        if cached.numbers & new.numbers or cached.names & new.names or cached.identifiers & new.identifiers:
            left, right = left - known.category, right - known.category
    odd = left | right
    named = False
    if cached.identifiers != new.identifiers and not odd.isdisjoint(cached.identifiers | new.identifiers):
        found.append("identifier")
        named = True
    if cached.names != new.names and not odd.isdisjoint(cached.names | new.names):
        found.append("entity")
        named = True
    if odd and (named or not known.alternatives.isdisjoint(odd) or not _reworded(left, right, cached, new, known)):
        found.append("substitution" if left and right else "restriction")
    if len(left) == len(cached.terms) and len(right) == len(new.terms) and left and right:
        found.append("topic")


def _odd(one: Profile, other: Profile, known: Lexicon) -> tuple[frozenset[int], bool]:
    """Return the terms that the other question does not say in any way, and whether one of them may be misspelt.

    That is a word which no lexicon knows and which looks like a word of the other: two words of the lexicon are two.
    """
    theirs, related = other.terms, known.related
    odd = one.terms - theirs
    misspelt = False
    for term in odd:
        if term >= DIGEST:
            look = one.spellings[one.order.index(term)]
            # Of a word that is repeated, `_without_misspelt` sees every spelling.
            if (look and look in other.spellings) or (len(one.order) > len(one.terms) and one.order.count(term) > 1):
                misspelt = True
        # Asked in the same way, both name what they ask for: it has to be the same ("how much is the rent", "the fee").
        elif (one.question != other.question and term in known.implied[other.question]) or (
            term in related and not related[term].isdisjoint(theirs)
        ):
            odd = odd - {term}  # a new set: the loop goes on over the old one
    return odd, misspelt


def _reworded(left: frozenset[int], right: frozenset[int], cached: Profile, new: Profile, known: Lexicon) -> bool:
    """Return whether the odd words come from another way to ask.

    A word that is put into an otherwise equal sentence changes what is asked ("flu", "flu in babies"; "my account",
    "my message"). Where the sentence is built anew, a few odd words mostly belong to the new construction, as long as
    the questions share more and none of the odd words is one of a set of alternatives. Names and codes never get here.
    """
    around, others = cached.frame, new.frame
    if around <= others or others <= around or len(around ^ others) < _NEW_CONSTRUCTION:
        return False
    left, right = left - known.relations, right - known.relations
    many, more = len(left), len(right)
    if many > 3 or more > 3 or many + more > 5:
        return False
    needed = 2 if many + more < 3 else 3
    if len(cached.terms) - many < needed or len(new.terms) - more < needed:
        return False
    # "How do I cancel it", "what is the process for upgrading it": another act.
    return known.acts.isdisjoint(left) or known.acts.isdisjoint(right)


def _without_phrases(
    left: frozenset[int], right: frozenset[int], cached: Profile, new: Profile, known: Lexicon
) -> tuple[frozenset[int], frozenset[int]]:
    """Take out phrases whose words stand apart in the other question ("word document", "document in Word")."""
    phrases = (
        {x for x in left if _stands_apart(x, new.terms, known)},
        {x for x in right if _stands_apart(x, cached.terms, known)},
    )
    parts = [{part for phrase in side for part in known.parts[phrase]} for side in phrases]
    left -= phrases[0] | {x for x in left if x in parts[1] or not known.related.get(x, _NONE).isdisjoint(parts[1])}
    right -= phrases[1] | {x for x in right if x in parts[0] or not known.related.get(x, _NONE).isdisjoint(parts[0])}
    return left, right


def _stands_apart(phrase: int, terms: frozenset[int], known: Lexicon) -> bool:
    parts = known.parts.get(phrase, _NONE)
    return bool(parts) and all(part in terms or not known.related.get(part, _NONE).isdisjoint(terms) for part in parts)


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
