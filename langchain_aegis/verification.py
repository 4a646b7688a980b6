"""Whether a cached question's answer may serve a new question that lies near it.

Similarity cannot tell: "enable" lies nearer to "disable" than to "switch on". Each guard looks for one kind of
difference that changes the answer, and blocks when it finds one. Pure: no clock, no network.
"""

from __future__ import annotations

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
    both = cached.language and new.language
    # An undecided language is one of names and key words only: they must be the same then ("Mozart Geburtstag").
    if (cached.language != new.language) if both else cached.terms != new.terms:
        found.append("language")
    if cached.numbers != new.numbers and _numbers_differ(cached, new):
        found.append("number")
    if cached.quantities != new.quantities:
        found.append("quantity")
    if (cached.flags ^ new.flags) & NEGATED and not _denied_in_a_word(cached.flags, new.flags):
        found.append("negation")
    left, right = cached.opposites, new.opposites
    if left and right and left != right:
        for code in left:
            if code not in right and code ^ 1 in right and code ^ 1 not in left:
                found.append("antonym")
                break
    left, right = cached.exclusive, new.exclusive
    if left and right and left != right:
        groups = {code >> 8 for code in left - right}
        if groups:
            for code in right:
                if code >> 8 in groups and code not in left:
                    found.append("exclusive")
                    break
    if cached.question != new.question and _asks_otherwise(cached, new, known):
        found.append("question_word")
    if (cached.source >= 0 or new.source >= 0) and _turned_round(cached, new):
        found.append("direction")
    if cached.shape != new.shape:
        found.append("shape")
    if cached.order != new.order or (cached.flags ^ new.flags) & PASSIVE:
        found += _wording(cached, new, known)
    return tuple(code for code in found if code not in off) if off else tuple(found)


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


def same_words(cached: Profile, new: Profile) -> bool:
    """Return whether two questions differ only in words without content, in order or in inflection."""
    return (cached.terms ^ new.terms) <= lexicon().light


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
    left, right = _canonical_order(cached, known), _canonical_order(new, known)
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


def _canonical_order(one: Profile, known: Lexicon) -> list[int]:
    """Return the terms in their order, every word replaced by one that stands for all of its meaning."""
    return [min(known.related.get(term, (term,))) for term in one.order]


def _wording(cached: Profile, new: Profile, known: Lexicon) -> list[str]:
    """Return the guards over the order of the terms and over those that only one of the questions holds."""
    mine, theirs, related = cached.terms, new.terms, known.related
    left, right = set(), set()
    # Asked in the same way, both name what they ask for, and it has to be the same ("how much is the rent", "the fee").
    alike = cached.question == new.question
    implied = _NONE if alike else known.implied[new.question]
    for term in mine:
        if term not in theirs and (
            term >= DIGEST or (term not in implied and (term not in related or related[term].isdisjoint(theirs)))
        ):
            left.add(term)
    implied = _NONE if alike else known.implied[cached.question]
    for term in theirs:
        if term not in mine and (
            term >= DIGEST or (term not in implied and (term not in related or related[term].isdisjoint(mine)))
        ):
            right.add(term)
    if left and right:
        # Most odd words are words of the lexicon, which are never misspelt.
        if (max(left) >= DIGEST and _alike(left, cached, new)) or (max(right) >= DIGEST and _alike(right, new, cached)):
            _drop_misspelt(left, right, cached, new)
        phrases = known.parts.keys()
        if not (phrases.isdisjoint(left) and phrases.isdisjoint(right)):
            _drop_phrases(left, right, cached, new, known)
    if not left or not right:
        left = left - known.light  # "-=" would go through all of the long set
        right = right - known.light
    if not (left or right):
        return ["order"] if _swapped(cached, new, known) else []
    if (not left or not right) and (
        cached.numbers & new.numbers or cached.names & new.names or cached.identifiers & new.identifiers
    ):
        left = left - known.category
        right = right - known.category
    found = []
    odd = left | right
    if cached.identifiers != new.identifiers and not odd.isdisjoint(cached.identifiers | new.identifiers):
        found.append("identifier")
    if cached.names != new.names and not odd.isdisjoint(cached.names | new.names):
        found.append("entity")
    if odd and (found or not _reworded(left, right, cached, new, known)):
        found.append("substitution" if left and right else "restriction")
    if left and len(left) == len(cached.terms) and right and len(right) == len(new.terms):
        found.append("topic")
    return found


def _reworded(left: set[int], right: set[int], cached: Profile, new: Profile, known: Lexicon) -> bool:
    """Return whether the odd words come from another way to ask.

    A word that is put into an otherwise equal sentence changes what is asked ("flu", "flu in babies"; "my account",
    "my message"). Where the sentence is built anew, a few odd words mostly belong to the new construction, as long as
    the questions share more and none of the odd words is one of a set of alternatives. Names and codes never get here.
    """
    left, right = left - known.relations, right - known.relations
    many, more = len(left), len(right)
    if many > 3 or more > 3 or many + more > 5:
        return False
    needed = 2 if many + more < 3 else 3
    if len(cached.terms) - many < needed or len(new.terms) - more < needed:
        return False
    around, others = cached.frame, new.frame
    if len(around ^ others) < _NEW_CONSTRUCTION or around <= others or others <= around:
        return False
    odd = left | right
    if not (known.graded.isdisjoint(odd) and known.narrowing.isdisjoint(odd)):
        return False
    # "How do I cancel it", "what is the process for upgrading it": another act.
    return known.acts.isdisjoint(left) or known.acts.isdisjoint(right)


def _drop_phrases(left: set[int], right: set[int], cached: Profile, new: Profile, known: Lexicon) -> None:
    """Take out phrases whose words stand apart in the other question ("word document", "document in Word")."""
    phrases = (
        {x for x in left if _stands_apart(x, new.terms, known)},
        {x for x in right if _stands_apart(x, cached.terms, known)},
    )
    parts = [{part for phrase in side for part in known.parts[phrase]} for side in phrases]
    left -= phrases[0] | {x for x in left if x in parts[1] or not known.related.get(x, _NONE).isdisjoint(parts[1])}
    right -= phrases[1] | {x for x in right if x in parts[0] or not known.related.get(x, _NONE).isdisjoint(parts[0])}


def _stands_apart(phrase: int, terms: frozenset[int], known: Lexicon) -> bool:
    parts = known.parts.get(phrase, _NONE)
    return bool(parts) and all(part in terms or not known.related.get(part, _NONE).isdisjoint(terms) for part in parts)


def _alike(odd: set[int], one: Profile, other: Profile) -> bool:
    """Return whether an unknown odd word looks like a word of the other: two words of the lexicon are always two."""
    looks = other.spellings
    for term, digest in zip(one.order, one.spellings):  # noqa: B905  (of one length; this runs for most candidates)
        if term >= DIGEST and digest in looks and digest and term in odd:
            return True
    return False


def _drop_misspelt(left: set[int], right: set[int], cached: Profile, new: Profile) -> None:
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
