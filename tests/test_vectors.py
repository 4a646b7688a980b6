"""Vectors are compared here, from signed bytes; what has no direction is refused."""

import math
import random
import sys
import types

import pytest

from langchain_aegis import vectors
from langchain_aegis.vectors import pack, similarities

RANDOM = random.Random(7)
SAMPLE = [[RANDOM.gauss(0, 1) for _ in range(384)] for _ in range(5)]


@pytest.fixture(params=["numpy", "struct"], autouse=True)
def _arithmetic(request, monkeypatch):
    if request.param == "struct":
        monkeypatch.setattr(vectors, "_numpy", lambda vectors=1: None)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_similarities_are_the_cosines():
    packed = [pack(v) for v in SAMPLE]
    assert similarities(packed[0], packed) == pytest.approx([cosine(SAMPLE[0], v) for v in SAMPLE], abs=2e-3)
    assert similarities(packed[0], packed[:1])[0] == pytest.approx(1.0, abs=1e-6)
    assert similarities(packed[0], []) == []


@pytest.mark.parametrize(
    "bad", [[], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [1e308, 1e308], ["a"], None, [[1.0]], [None, 1.0]]
)
@pytest.mark.row(43)
def test_a_vector_without_a_direction_is_refused(bad):
    assert pack(bad) is None


@pytest.mark.row(45)
def test_other_lengths_and_stored_nan_are_no_number():
    query = pack([1.0, 0.0])
    for stored in (pack([1.0, 0.0, 0.0]), b"", b"\x00", b"\x00\x7e\x00\x7e", b"\x00\x00\x00\x00"):
        assert math.isnan(similarities(query, [stored])[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.row(45)
def test_a_stored_vector_that_is_no_direction_is_no_number_alone_or_among_others():
    query, infinite = pack([3.0, 4.0]), b"\x00\x7c\x00\xfc"
    for stored in ([infinite], [infinite, query], [b"\x00" * 4], [query[:2]], [b"odd"]):
        assert math.isnan(similarities(query, stored)[0])


def test_a_vector_is_as_similar_alone_as_among_others():
    packed = [pack(v) for v in SAMPLE]
    alone = [similarities(packed[0], [other])[0] for other in packed]
    assert alone == pytest.approx(similarities(packed[0], packed), abs=1e-6)


def test_numpy_that_another_thread_still_imports_is_left_alone(monkeypatch):
    half = types.ModuleType("numpy")
    half.__spec__ = types.SimpleNamespace(_initializing=True)
    monkeypatch.setitem(sys.modules, "numpy", half)
    assert len(pack([3.0, 4.0])) == 4
