"""Calibration: what the packaged pairs are, and which threshold an embedder gets."""

from collections import Counter

from langchain_aegis import pairs


def test_the_packaged_pairs_are_those_that_may_be_shipped():
    """Every licence of a source is named beside the data; sources that may not be passed on are not there."""
    loaded = pairs.load()
    assert {pair.source for pair in loaded} == {"hand", "fow", "gated_banking", "gated_finance"}
    assert Counter(pair.duplicate for pair in loaded) == {False: 272, True: 236}
    assert {pair.lang for pair in loaded} == {"en", "de"}
    assert pairs.load() is loaded
    assert len({(pair.cached, pair.new) for pair in loaded}) == len(loaded)
    assert all(pair.cached.strip() and pair.new.strip() for pair in loaded)
