"""Calibration: what the packaged pairs are, and which threshold an embedder gets."""

import hashlib
import json
import math
import random
import stat
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.embeddings import Embeddings

from langchain_aegis import calibration, pairs
from langchain_aegis.calibration import Calibration, Share, calibrate, calibrated, thresholds
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.notices import forget_warnings


def test_the_packaged_pairs_are_those_that_may_be_shipped():
    """Every licence of a source is named beside the data; sources that may not be passed on are not there."""
    loaded = pairs.load()
    assert {pair.source for pair in loaded} == {"hand", "fow", "gated_banking", "gated_finance"}
    assert Counter(pair.duplicate for pair in loaded) == {False: 272, True: 236}
    assert {pair.lang for pair in loaded} == {"en", "de"}
    assert pairs.load() is loaded
    assert len({(pair.cached, pair.new) for pair in loaded}) == len(loaded)
    assert all(pair.cached.strip() and pair.new.strip() for pair in loaded)


# -- Embedders that are made up ------------------------------------------------------------------------------------


def direction(name, size=64):
    """A vector of length 1 that only the name decides; two names have nothing to do with each other."""
    draw = random.Random(hashlib.blake2b(name.encode()).digest())
    values = [draw.gauss(0, 1) for _ in range(size)]
    length = math.hypot(*values)
    return [x / length for x in values]


def meanings():
    """Text -> the first text that means the same."""
    same = {}
    for pair in pairs.load():
        same.setdefault(pair.cached, pair.cached)
        same[pair.new] = same[pair.cached] if pair.duplicate else same.get(pair.new, pair.new)
    return same


class Made(Embeddings):
    """An embedder from a function; `asked` counts the texts."""

    def __init__(self, vector, model="made"):
        self.vector, self.model, self.asked = vector, model, 0

    def embed_query(self, text):
        self.asked += 1
        return self.vector(text)

    def embed_documents(self, texts):
        return [self.embed_query(text) for text in texts]


def mixed(own, meaning, topic):
    """An embedder that sees, by weight, the wording, the meaning and the topic of a question."""
    same, component = meanings(), {t: p.component for p in pairs.load() for t in (p.cached, p.new)}

    def vector(text):
        parts = (own, text), (meaning, f"meaning {same.get(text, text)}"), (topic, f"topic {component.get(text, text)}")
        return [sum(v) for v in zip(*([w * x for x in direction(name)] for w, name in parts), strict=True)]

    return vector


PERFECT = mixed(0, 1, 0)
USUAL = mixed(0.4, 0.3, 1)


@pytest.fixture(scope="module")
def usual():
    return calibrate(Made(USUAL))


def test_a_perfect_embedder_finds_all_that_the_guards_let_through():
    found = calibrate(Made(PERFECT))
    for figures in found.modes.values():
        assert figures.served.traps.count == 0
        assert figures.served.plain_paraphrases.rate == 1
    assert found.separation > 0.999


def test_more_is_served_from_strict_to_lenient(usual):
    modes = [usual.modes[mode] for mode in ("strict", "balanced", "lenient")]
    for stricter, laxer in pairwise(modes):
        assert stricter.threshold >= laxer.threshold
        assert stricter.served.paraphrases.count <= laxer.served.paraphrases.count


def test_what_is_promised_holds_by_the_upper_end_of_the_interval(usual):
    for mode, figures in usual.modes.items():
        assert figures.served.traps.interval()[1] <= calibration.TARGETS[mode]
        assert sum(one.traps.count for one in figures.by_language.values()) == figures.served.traps.count


def test_the_guards_blind_spots_raise_the_threshold(monkeypatch):
    """Without guards the traps themselves keep the threshold up, as far as cosine can."""
    embedder = Made(mixed(0.4, 1, 1))
    monkeypatch.setattr(calibration, "compare", lambda *_, **__: ())
    monkeypatch.setattr(calibration, "exact_only_reason", lambda _: None)
    found = calibrate(embedder)
    assert found.modes["strict"].bound_by == "traps"
    assert found.modes["strict"].served.traps.interval()[1] <= 0.015


def test_no_more_traps_reach_the_guards_than_with_the_model_they_were_chosen_for(usual):
    for mode, most in (("strict", 0.52), ("balanced", 0.87), ("lenient", 0.9)):
        assert usual.modes[mode].served.plain_traps.rate <= most


@pytest.mark.parametrize("shift", [0.3, 0.75])
def test_an_embedder_whose_cosines_are_all_high_serves_the_same_pairs(usual, shift):
    """As multilingual-e5 has it, where unrelated questions have 0.8."""

    def vector(text):
        values = USUAL(text)
        length = math.hypot(*values)
        return [math.sqrt(1 - shift) * x / length for x in values] + [math.sqrt(shift)]

    found = calibrate(Made(vector))
    assert found.unrelated == pytest.approx(shift + (1 - shift) * usual.unrelated, abs=2e-3)
    for mode, figures in found.modes.items():
        assert figures.threshold == pytest.approx(shift + (1 - shift) * usual.modes[mode].threshold, abs=2e-3)
        mine, theirs = figures.served, usual.modes[mode].served
        assert abs(mine.plain_traps.count - theirs.plain_traps.count) <= 3
        assert abs(mine.paraphrases.count - theirs.paraphrases.count) <= 3


@pytest.mark.parametrize(
    "vector", [direction, lambda _: [1.0, 2.0], mixed(1, 0.05, 0)], ids=["random", "constant", "weak"]
)
def test_an_embedder_that_tells_nothing_apart_is_refused(vector):
    with pytest.raises(AegisConfigError, match="does not tell questions apart"):
        calibrate(Made(vector))


def test_an_embedder_that_sees_only_the_topic_is_refused():
    """Paraphrases are nearer than unrelated questions, but traps are as near: no threshold keeps them off."""
    with pytest.raises(AegisConfigError, match="does not tell questions apart"):
        calibrate(Made(mixed(0, 0, 1)))


@pytest.mark.parametrize(
    "vector", [lambda _: [0.0, 0.0], lambda _: [math.nan, 1.0], lambda t: [1.0] * (2 + len(t) % 2)]
)
def test_vectors_that_cannot_be_used_are_said(vector):
    with pytest.raises(AegisConfigError, match="vector"):
        calibrate(Made(vector))


def test_too_few_pairs_show_nothing_and_cost_nothing():
    embedder = Made(PERFECT)
    with pytest.raises(AegisConfigError, match="too few"):
        calibrate(embedder, pairs=pairs.load()[:50])
    assert embedder.asked == 0


def test_an_embedder_of_questions_and_passages_is_asked_for_questions():
    """The cache embeds both questions of a pair as queries, so that is what is measured."""

    class Asymmetric(Made):
        def embed_documents(self, texts):
            return [direction(text) for text in texts]

    assert calibrate(Asymmetric(USUAL)).modes == calibrate(Made(USUAL)).modes


def test_progress_ends_with_all_texts():
    seen = []
    calibrate(Made(PERFECT), progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 800


@given(st.integers(0, 400), st.integers(1, 400))
def test_an_interval_holds_its_rate(count, of):
    share = Share(min(count, of), of)
    low, high = share.interval()
    assert 0 <= low <= share.rate + 1e-9 and share.rate - 1e-9 <= high <= 1


# -- Kept for later ------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(usual, home):
    """The calibration of `Made(USUAL)`, kept in a home of its own."""
    forget_warnings()
    return replace(usual), calibration.save(usual)


def test_a_calibration_survives_as_it_was(kept, home):
    found, path = kept
    assert path == home / "calibration.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert calibration.read(path) == {"made": found}
    assert list(home.iterdir()) == [path]
    assert Calibration.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_the_calibrated_threshold_wins_over_the_shipped_one(kept):
    embedder = Made(USUAL)
    known = calibrated(embedder)
    assert embedder.asked == 1
    assert thresholds("made", "balanced", known) == (known.modes["balanced"].threshold, True)
    assert thresholds("made", "balanced")[1] is False
    with pytest.raises(ValueError, match="mode"):
        thresholds("made", "bold", known)


def test_an_embedder_that_nobody_measured_is_not_asked(kept):
    embedder = Made(USUAL, model="another")
    assert calibrated(embedder) is None
    assert embedder.asked == 0


@pytest.mark.parametrize("other", [mixed(0.4, 0.31, 0.2), lambda t: [*USUAL(t), 1.0]], ids=["weights", "dimensions"])
def test_another_model_under_the_same_name_does_not_inherit(kept, other, caplog):
    assert calibrated(Made(other)) is None
    assert "another model" in caplog.text


def test_the_same_model_on_another_host_inherits(kept):
    """Its floats differ in the last places."""
    assert calibrated(Made(lambda text: [x * 3 + 1e-4 for x in USUAL(text)])) is not None


def test_other_guards_ask_for_a_new_calibration_once(kept, caplog):
    found, path = kept
    calibration.save(replace(found, guards="0000"), path)
    for _ in range(3):
        assert calibrated(Made(USUAL)) is not None
    assert caplog.text.count("calibration_stale") == 1


def test_embedders_are_kept_beside_each_other(kept):
    found, path = kept
    calibration.save(replace(found, name="second"))
    calibration.save(replace(found, name="made", date="2030-01-01"))
    known = calibration.read(path)
    assert sorted(known) == ["made", "second"]
    assert known["made"].date == "2030-01-01"


def test_a_file_for_many_hosts_is_named_by_the_environment(usual, home, tmp_path, monkeypatch):
    path = calibration.save(usual, tmp_path / "ours.json")
    assert calibrated(Made(USUAL)) is None
    monkeypatch.setenv("AEGIS_CALIBRATION", str(path))
    assert calibrated(Made(USUAL)) == usual


@pytest.mark.parametrize(
    "text", ["", "[]", '{"v": 2}', '{"v": 1, "embedders": {"made": {}}}', '{"v": 1, "embedders": 3}']
)
def test_a_damaged_file_is_a_warning_and_never_overwritten(kept, usual, text, caplog):
    path = kept[1]
    path.write_text(text)
    assert calibrated(Made(USUAL)) is None
    assert "calibration_file" in caplog.text
    with pytest.raises(AegisConfigError, match=r"calibration\.json"):
        calibration.save(usual)
    assert path.read_text() == text


@pytest.mark.parametrize("value", [0.2, 1.01, math.nan, "x"])
def test_a_threshold_out_of_range_is_not_believed(kept, value):
    data = json.loads(kept[1].read_text())
    data["embedders"]["made"]["modes"]["lenient"]["threshold"] = value
    kept[1].write_text(json.dumps(data))
    assert calibrated(Made(USUAL)) is None


def test_a_file_that_is_not_there_is_a_warning(usual, home, monkeypatch, caplog):
    forget_warnings()
    calibration.save(usual)
    monkeypatch.setenv("AEGIS_CALIBRATION", str(home / "none.json"))
    assert calibrated(Made(USUAL)) == usual
    assert "none.json" in caplog.text


def test_the_cache_serves_from_the_calibrated_threshold(kept):
    from langchain_aegis import AegisSemanticCache

    found, _ = kept
    for mode, figures in found.modes.items():
        with AegisSemanticCache(embeddings=Made(USUAL), mode=mode) as cache:
            cache.judge("What is one?", "What is two?")
            assert cache.min_similarity == figures.threshold


@pytest.mark.slow
def test_the_small_model_gets_the_thresholds_that_ship_for_it(minilm):
    """The rule was set by this model: what it finds is what the package says."""
    found = calibrate(minilm)
    for mode, figures in found.modes.items():
        assert figures.threshold == pytest.approx(thresholds(minilm.model, mode)[0], abs=0.006)
        assert figures.bound_by == "exposure"
