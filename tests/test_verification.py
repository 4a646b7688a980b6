"""Whether one question's answer may serve another question."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_aegis.verification import GUARDS, Profile, compare, profile, thresholds

KEY = b"a key of the tests"
VOCABULARY = (
    "How do I enable disable not 30 minutes from Paris to Rome the Redis v2.4 three reasons € 500 Frage wie lange "
    'über kein "orders" parse_config non-members 18-year-old briefly in a table turn off July May 5k 2 million'
)
WORDS = st.sampled_from(VOCABULARY.split())
TEXTS = st.one_of(st.text(max_size=80), st.lists(WORDS, max_size=14).map(" ".join))


def reasons(cached: str, new: str) -> tuple[str, ...]:
    return compare(profile(cached, key=KEY), profile(new, key=KEY))


@given(TEXTS)
def test_every_question_may_serve_itself(text: str) -> None:
    one = profile(text, key=KEY)
    assert compare(one, one) == ()


@given(TEXTS)
def test_a_profile_survives_its_bytes(text: str) -> None:
    one = profile(text, key=KEY)
    assert Profile.decode(one.encode()) == one


@given(TEXTS, TEXTS)
def test_the_order_of_the_two_questions_makes_no_difference(left: str, right: str) -> None:
    one, other = profile(left, key=KEY), profile(right, key=KEY)
    assert compare(one, other) == compare(other, one)


@given(st.binary(max_size=200))
def test_other_bytes_raise_only_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert Profile.decode(data).encode() == data


@given(TEXTS, st.integers(0, 400), st.integers(0, 255))
def test_changed_bytes_are_refused_or_are_a_profile_of_their_own(text: str, at: int, byte: int) -> None:
    data = bytearray(profile(text, key=KEY).encode())
    data[at % len(data)] = byte
    with contextlib.suppress(ValueError):
        assert Profile.decode(bytes(data)).encode() == data
    with pytest.raises(ValueError):
        Profile.decode(bytes(data) + b"\0")


@given(TEXTS, TEXTS)
def test_guards_that_are_switched_off_do_not_block(left: str, right: str) -> None:
    one, other = profile(left, key=KEY), profile(right, key=KEY)
    assert compare(one, other, off=frozenset(GUARDS)) == ()
    for code in compare(one, other):
        assert code in GUARDS
        assert code not in compare(one, other, off=frozenset({code}))


def test_a_profile_holds_no_word_and_is_small() -> None:
    text = "How much did the Miller wedding at Lake Constance cost in July 2024, including 35 guests from Quedlinburg?"
    data = profile(text, key=KEY).encode()
    assert len(data) <= 250
    for word in text.lower().split():
        assert len(word) < 4 or word.encode() not in data.lower()
    assert profile(text, key=b"another").encode() != data


def test_thresholds_name_what_was_measured() -> None:
    for mode in ("strict", "balanced", "lenient"):
        value, known = thresholds("all-minilm:latest", mode)
        assert known
        assert 0.5 < value < 1
        assert not thresholds("somebody/else", mode)[1]
    assert thresholds("x", "balanced")[0] == 0.92
    with pytest.raises(ValueError, match="mode"):
        thresholds("all-minilm", "bold")


def test_a_text_of_any_length_has_a_profile() -> None:
    long = "a1-b " * 50_000
    one = profile(long, key=KEY)
    assert Profile.decode(one.encode()) == one
    assert compare(one, profile(long + "x", key=KEY)) != ()
