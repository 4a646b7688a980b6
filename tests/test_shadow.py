"""Shadow mode: what is drawn, how answers are compared, and when the cache becomes stricter."""

import json
import math
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, Generation

from langchain_aegis.agreement import texts_agree
from langchain_aegis.entries import encode_answer, encode_value
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.shadow import Rate, Shadow, answers_agree

HERE = Path(__file__).parent

SENTENCES = (
    "You can return it within 30 days.", "You cannot return it after 30 days.", "It costs 10 euros.", "Yes.", "No.",
    "It costs 10 dollars a month.", "The button is enabled.", "The button is disabled.", "Use `sort()`, not `--sort`.",
)  # fmt: skip


def pairs(name):
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def said(*texts):
    return encode_answer([ChatGeneration(message=AIMessage(text)) for text in texts])


class TestCounting:
    def test_the_drawn_share_is_the_rate(self):
        shadow = Shadow(0.03, draw=random.Random(1).random)
        assert 0.02 < sum(shadow.draw() for _ in range(10_000)) / 10_000 < 0.04
        assert not any(Shadow(0).draw() for _ in range(100))
        assert all(Shadow(1).draw() for _ in range(100))

    @pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan, "0.1", True, None])
    def test_a_rate_that_is_no_share_is_refused(self, rate):
        with pytest.raises(AegisConfigError, match="shadow rate"):
            Shadow(rate)

    @pytest.mark.parametrize("budget", [0, 1, math.nan, "0.1", True])
    def test_a_budget_that_is_no_share_is_refused(self, budget):
        with pytest.raises(AegisConfigError, match="budget"):
            Shadow(0.1, budget=budget)

    def test_the_interval_is_wilsons(self):
        """3 of 60: 1.71 % to 13.70 %."""
        shadow = Shadow(0.02, budget=0.5)
        for at in range(60):
            shadow.compared(at >= 3)
        assert shadow.wrong_rate() == pytest.approx(Rate(0.05, 0.01715, 0.13703), abs=1e-4)
        assert (shadow.checked, shadow.wrong) == (60, 3)

    def test_nothing_is_known_before_the_first_comparison(self):
        assert Shadow(0.02).wrong_rate() == (0, 0, 1)

    @given(st.lists(st.sampled_from([True, False, None]), max_size=200), st.floats(0.01, 0.99))
    def test_the_rate_lies_in_its_interval_and_the_undecided_widen_it_upwards(self, results, budget):
        shadow, without = Shadow(0.02, budget=budget), Shadow(0.02, budget=budget)
        for agrees in results:
            shadow.compared(agrees)
            without.compared(agrees is not False)
            rate, other = shadow.wrong_rate(), without.wrong_rate()
            assert 0 <= rate.low <= rate.value <= rate.high <= 1
            assert rate[:2] == other[:2]
            assert rate.high >= other.high
        assert shadow.tightening == without.tightening

    @given(st.lists(st.booleans(), max_size=300), st.floats(0.01, 0.5))
    def test_it_only_ever_becomes_stricter_and_never_on_few_comparisons(self, results, budget):
        shadow, before, since = Shadow(0.02, budget=budget), 0.0, 0
        for agrees in results:
            shadow.compared(agrees)
            since += 1
            assert shadow.tightening in (before, pytest.approx(before + 0.02))
            if shadow.tightening != before:
                assert since >= 20
                assert (shadow.checked, shadow.wrong) == (0, 0)
                before, since = shadow.tightening, 0
        assert shadow.tightening == pytest.approx(0.02 * shadow.alarms)


class TestAlarm:
    def test_one_warning_with_the_figures_and_the_count_starts_anew(self, caplog):
        shadow = Shadow(0.02)
        for at in range(19):
            shadow.compared(at >= 5)
        assert (shadow.tightening, caplog.records) == (0.0, [])
        shadow.compared(True)
        assert (shadow.tightening, shadow.alarms, shadow.checked, shadow.wrong) == (0.02, 1, 0, 0)
        (record,) = caplog.records
        assert record.message.startswith("shadow_alarm: 5 of 20 checked semantic hits were wrong (25 %")
        assert "11 to 47 %" in record.message
        assert "min_similarity" in record.message

    def test_every_further_alarm_tightens_more(self, caplog):
        shadow = Shadow(0.02)
        for _ in range(60):
            shadow.compared(False)
        assert (shadow.tightening, len(caplog.records)) == (0.06, 3)

    def test_a_rate_within_the_budget_raises_none(self, caplog):
        shadow = Shadow(0.02)
        for at in range(1_000):
            shadow.compared(at % 25 != 10)
        assert (shadow.tightening, shadow.wrong_rate().value, caplog.records) == (0, 0.04, [])

    def test_threads_lose_no_comparison(self):
        shadow = Shadow(0.02, budget=0.9999)
        ready = threading.Barrier(8)

        def compare(agrees):
            ready.wait(10)
            for _ in range(2_000):
                shadow.compared(agrees)

        threads = [threading.Thread(target=compare, args=(at % 2 == 0,)) for at in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert (shadow.checked, shadow.wrong) == (16_000, 8_000)


class TestAnswers:
    def test_an_answer_agrees_with_itself_whatever_its_form(self):
        text = "Open **Settings**.\n- Choose Security"
        plain = "open settings. Choose  security."
        assert answers_agree(said(text), said(plain)) is True
        assert answers_agree(said(text), encode_value(plain)) is True
        assert answers_agree(encode_answer([Generation(text=text)]), encode_value(AIMessage(plain))) is True

    @settings(max_examples=40)
    @given(st.text(min_size=1, max_size=200))
    def test_any_text_agrees_with_itself(self, text):
        assert texts_agree(text, text) is True

    @settings(max_examples=60)
    @given(*[st.text(max_size=120) | st.lists(st.sampled_from(SENTENCES), max_size=8).map(" ".join)] * 2)
    def test_any_two_texts_can_be_compared_either_way_round(self, one, other):
        assert texts_agree(one, other) is texts_agree(other, one)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("Yes, you can.", "No, you cannot."),
            ("Ja, das geht.", "Nein, das geht nicht."),
            ("The limit is 10 MB.", "The limit is 20 MB."),
            ("The limit is 10 MB.", "The limit is 10 GB."),
            ("It ended on 8 May 1945.", "It ended on 11 November 1918."),
            ("You can return it.", "You cannot return it."),
            ("It is enabled by default.", "It is disabled by default."),
            ("Use `git reset --soft HEAD~1`.", "Use `git reset --hard HEAD~1`."),
            ("It was built by Ada Lovelace.", "It was built by Grace Hopper."),
        ],
    )
    @pytest.mark.parametrize("similar", [None, lambda one, other: 1.0])
    def test_a_contradiction_is_seen_however_near_the_texts_are(self, old, new, similar):
        assert texts_agree(old, new, similar=similar) is False
        assert texts_agree(new, old, similar=similar) is False

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("The warranty lasts two years.", "The warranty lasts 2 years."),
            ("The link is valid for 24 hours.", "The link is valid for 1 day."),
            ("It is not enabled by default.", "It is disabled by default."),
            ("1. Open it.\n2. Close it.", "Open it, then close it."),
            ("Yes.", "Yes, you can return it."),
        ],
    )
    def test_other_words_for_the_same_are_no_contradiction(self, old, new):
        assert texts_agree(old, new) is not False

    def test_the_similarity_is_read_on_the_embedders_own_scale(self):
        """0.85 means much where unrelated texts have 0.05, nothing where they have 0.84."""
        old, new = "Go to the portal to find every bill.", "All invoices are listed online under billing."

        def embedder(nothing):
            return lambda one, other: 0.98 if {one, other} == {old, new} else nothing

        assert texts_agree(old, new, similar=embedder(0.0)) is not False
        assert texts_agree(old, new, similar=lambda one, other: 0.85) is False

    def test_the_users_own_rule_decides_about_texts(self):
        seen = []
        for verdict in (True, False):
            found = answers_agree(
                said("A"), said("B"), compare_answers=lambda old, new, v=verdict: seen.append((old, new)) or v
            )
            assert found is verdict
        assert seen == [("A", "B")] * 2

    def test_plain_json_is_compared_leaf_by_leaf(self):
        one = {"city": "The capital is Paris.", "people": 2, "tags": ["a"]}
        assert answers_agree(encode_value(one), encode_value({**one, "city": "Paris is the capital."})) is True
        for other in (
            {**one, "people": 3},
            {**one, "tags": ["a", "b"]},
            {"city": one["city"]},
            {**one, "people": True},
        ):
            assert answers_agree(encode_value(one), encode_value(other)) is False
        assert answers_agree(encode_value(1), encode_value(True)) is False

    def test_tool_calls_are_part_of_an_answer(self):
        def calling(**args):
            call = {"name": "find", "args": args, "id": "1", "type": "tool_call"}
            return encode_answer([ChatGeneration(message=AIMessage("", tool_calls=[call]))])

        assert answers_agree(calling(city="Paris"), calling(city="Paris")) is True
        assert answers_agree(calling(city="Paris"), calling(city="Rome")) is not True
        assert answers_agree(calling(n=1), calling(n=2)) is False
        assert answers_agree(calling(n=1), said("Paris.")) is False

    def test_lists_of_messages_and_several_generations(self):
        assert answers_agree(encode_value([AIMessage("A b c.")]), encode_value([AIMessage("A b c")])) is True
        assert answers_agree(said("It is 1.", "It is 2."), said("It is 1.", "It is 3.")) is False

    @pytest.mark.parametrize("data", [b"", b"x", b"{}", b'{"kind":"other"}', b'{"kind":"value"}'])
    def test_what_cannot_be_read_is_undecided(self, data):
        assert answers_agree(data, said("A")) is None
        assert answers_agree(said("A"), data) is None


def measured(name, similar):
    counts = {(same, verdict): 0 for same in (True, False) for verdict in (True, False, None)}
    for row in pairs(name):
        counts[row["same"], texts_agree(row["old"], row["new"], similar=similar)] += 1
    return counts


class TestMeasured:
    """On invented pairs: those the rules were made with, and those written afterwards."""

    @pytest.mark.parametrize("name", ["answer_pairs.jsonl", "more_answer_pairs.jsonl"])
    def test_with_an_embedder(self, name, minilm):
        vectors = {}

        def similar(one, other):
            for text in (one, other):
                vectors[text] = vectors.get(text) or minilm.embed_query(text)
            return math.sumprod(vectors[one], vectors[other]) if hasattr(math, "sumprod") else sum(
                x * y for x, y in zip(vectors[one], vectors[other], strict=True)
            )  # fmt: skip

        counts = measured(name, similar)
        right, wrong = (sum(counts[same, v] for v in (True, False, None)) for same in (True, False))
        assert counts[False, True] == 0
        assert counts[True, False] <= 0.1 * right
        assert counts[False, False] >= 0.7 * wrong
        assert counts[True, True] >= 0.6 * right

    @pytest.mark.parametrize("name", ["answer_pairs.jsonl", "more_answer_pairs.jsonl"])
    def test_without_one_little_is_decided_but_hardly_anything_wrongly(self, name):
        counts = measured(name, None)
        assert counts[False, True] == 0
        assert counts[True, False] <= 2
        assert counts[False, False] >= 15 * len(pairs(name)) // 64
