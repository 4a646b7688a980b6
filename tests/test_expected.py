"""A key whose answer was stored or served here is expected to be found again; others only where most are found."""

import os

from langchain_aegis.expected import Expected


def key():
    return os.urandom(16).hex()


def test_what_was_stored_or_served_is_expected_and_another_is_not():
    expected = Expected()
    stored, served, other = key(), key(), key()
    expected.stored(stored)
    expected.hit(served)
    assert [expected.miss(each) for each in (stored, served, other)] == [False, False, True]


def test_where_most_unknown_keys_are_found_nothing_is_prepared_until_they_are_missed_again():
    expected = Expected()
    for _ in range(20):
        expected.hit(key())
    assert not expected.miss(key())
    for _ in range(20):
        expected.missed()
    assert expected.miss(key())


def test_repeats_of_a_known_key_say_nothing_about_unknown_ones():
    expected, known = Expected(), key()
    expected.stored(known)
    for _ in range(100):
        expected.hit(known)
    assert expected.miss(key())


def test_most_of_ten_thousand_keys_are_kept():
    expected, keys = Expected(), [key() for _ in range(10_000)]
    for each in keys:
        expected.stored(each)
    assert sum(expected.miss(each) for each in keys) < 1_500  # two keys may want one place
    assert sum(not expected.miss(key()) for _ in range(10_000)) < 10
