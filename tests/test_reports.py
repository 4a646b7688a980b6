"""A lookup id names one hit, and nobody else can make one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_aegis.reports import lookup_id, read_lookup_id

KEY = b"k" * 32
ASKED, SERVED = "0" * 31 + "a", "f" * 32


def test_an_id_says_what_was_asked_and_what_was_served():
    assert read_lookup_id(KEY, lookup_id(KEY, ASKED, SERVED)) == (ASKED, SERVED)


def test_two_hits_have_two_ids():
    assert lookup_id(KEY, ASKED, SERVED) != lookup_id(KEY, ASKED, SERVED)


def test_another_secret_reads_nothing():
    assert read_lookup_id(b"x" * 32, lookup_id(KEY, ASKED, SERVED)) is None


@given(st.integers(0, 63), st.sampled_from("ABCxyz019-_"))
def test_a_changed_character_is_noticed(at, character):
    good = lookup_id(KEY, ASKED, SERVED)
    bad = good[:at] + character + good[at + 1 :]
    assert bad == good or read_lookup_id(KEY, bad) is None


@pytest.mark.parametrize("text", ["", "x", "é", "a" * 64, "=" * 64, "a" * 10_000])
def test_any_other_text_is_no_id(text):
    assert read_lookup_id(KEY, text) is None
