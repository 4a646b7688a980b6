"""What happened is counted once, by all threads, at next to no cost."""

import math
import multiprocessing
import random
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, Generation

from langchain_aegis.counts import SECONDS, SIMILARITY, Checked, Cost, Counts, Distribution, cost_of
from langchain_aegis.entries import decode_answer, encode_answer

durations = st.lists(st.floats(2e-5, 60.0), min_size=1, max_size=200)


def spread(values, bounds=SECONDS):
    """The distribution of some values, as `Counts` makes it."""
    counts = Counts()
    for value in values:
        counts.stored(value)
    return counts.snapshot().update_s


def test_nothing_has_happened_at_first():
    seen = Counts().snapshot()
    assert (seen.exact_hits, seen.semantic_hits, seen.stale_hits, seen.misses, seen.stored) == (0, 0, 0, 0, 0)
    assert not seen.reasons
    assert not seen.not_stored
    assert not seen.by_task
    assert seen.update_s.p99 == 0.0
    assert seen.nearest_misses.last is None
    assert seen.checked.interval == (0.0, 1.0)


def test_everything_is_counted_where_it_belongs():
    counts = Counts()
    counts.hit("exact", 0.001, cost=Cost(2.5, 100, 20), task="chat")
    counts.hit("semantic", 0.01, cost=Cost(0.5, 10, 2))
    counts.hit("stale", 0.002)
    counts.miss(("no_candidate",), 0.02, task="chat")
    counts.miss(("guard:number", "guard:entity"), 0.03, (0.97, "guard:number"))
    counts.miss(("below_threshold",), 0.03, (0.85, "below_threshold"))
    counts.bypassed("off")
    counts.stored(0.004)
    counts.not_stored("incomplete")
    counts.checked(wrong=True)
    counts.checked(wrong=False)
    seen = counts.snapshot()
    assert (seen.exact_hits, seen.semantic_hits, seen.stale_hits, seen.misses, seen.stored) == (1, 1, 1, 3, 1)
    assert seen.reasons == {"no_candidate": 1, "guard:number": 1, "guard:entity": 1, "below_threshold": 1, "off": 1}
    assert seen.not_stored == {"incomplete": 1}
    assert seen.by_task == {"chat": {"exact": 1, "miss": 1}}
    assert (seen.saved.seconds, seen.saved.input_tokens, seen.saved.output_tokens) == (3.0, 110, 22)
    assert (seen.nearest_misses.last, seen.nearest_misses.last_reason) == (0.85, "below_threshold")
    assert seen.nearest_misses.similarity.count == 2
    assert (seen.checked.hits, seen.checked.wrong, seen.checked.rate) == (2, 1, 0.5)
    assert seen.lookup_s["miss"].total == pytest.approx(0.08)


def test_a_snapshot_does_not_change_later():
    counts = Counts()
    counts.miss(("expired",), 0.01, task="chat")
    seen = counts.snapshot()
    counts.miss(("expired",), 0.01, task="chat")
    assert (seen.misses, seen.reasons, seen.by_task) == (1, {"expired": 1}, {"chat": {"miss": 1}})


def test_ten_thousand_tasks_take_no_more_memory_than_fifty():
    counts = Counts()
    for number in range(10_000):
        counts.miss((), 0.001, task=f"task {number}")
    by_task = counts.snapshot().by_task
    assert len(by_task) == 51
    assert by_task["task 0"] == {"miss": 1}
    assert by_task["other"] == {"miss": 9_950}


@given(durations, st.sampled_from([0.5, 0.95, 0.99]))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values, share):
    true = sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
    above = min(bound for bound in SECONDS if bound >= true)
    below = max((bound for bound in SECONDS if bound < true), default=0.0)
    assert below <= spread(values).quantile(share) <= above


@given(durations)
def test_quantiles_ascend_and_exceed_no_value(values):
    seen = spread(values)
    assert seen.p50 <= seen.p95 <= seen.p99 <= max(values)
    assert seen.count == len(values)
    assert seen.total == pytest.approx(sum(values))


def test_what_is_beyond_every_bound_is_counted_too():
    seen = spread([1e-9, 500.0])
    assert seen.count == 2
    assert seen.quantile(1.0) == 500.0


@given(st.lists(st.floats(-1.0, 1.01)))
def test_counts_up_to_a_bound_are_those_of_the_values(values):
    counts = Counts()
    for value in values:
        counts.miss((), 0.001, (value, "below_threshold"))
    seen = counts.snapshot().nearest_misses.similarity
    assert seen.upto(SIMILARITY) == [(bound, sum(v <= bound for v in values)) for bound in SIMILARITY]


@pytest.mark.parametrize(
    ("hits", "wrong", "low", "high"),
    [(100, 0, 0.0, 0.0370), (100, 5, 0.0215, 0.1118), (10, 10, 0.7225, 1.0)],
)
def test_the_interval_is_wilsons(hits, wrong, low, high):
    assert Checked(hits, wrong).interval == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_an_empty_distribution_has_no_quantiles():
    assert Distribution((1.0,), (0, 0)).p50 == 0.0


def test_threads_lose_no_count():
    counts = Counts()

    def work():
        for _ in range(500):
            counts.hit("exact", 0.001, cost=Cost(0.0, 0, 1), task="chat")
            counts.miss(("expired",), 0.001)
            counts.snapshot()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    seen = counts.snapshot()
    assert (seen.exact_hits, seen.misses, seen.reasons["expired"], seen.saved.output_tokens) == (4000,) * 4


def _in_child(counts, sender):
    counts.hit("exact", 0.001)
    sender.send(counts.snapshot().exact_hits)


def test_the_child_of_a_fork_begins_at_0_even_when_the_lock_was_held():
    counts = Counts()
    counts.hit("exact", 0.001)
    receiver, sender = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(counts, sender))
    with counts._lock:  # as if another thread were counting
        child.start()
    assert receiver.poll(30)
    assert receiver.recv() == 1
    child.join(30)
    assert counts.snapshot().exact_hits == 1


def test_counting_costs_little_beside_a_digest_of_a_prompt():
    """A ratio, taken side by side: one lookup is counted in the time of parsing a short JSON prompt a few times."""
    import json

    counts = Counts()
    rng = random.Random(1)
    seconds = [rng.uniform(1e-4, 1.0) for _ in range(2_000)]
    prompt = json.dumps([{"kwargs": {"content": "How long may I keep a book?" * 10, "type": "human"}}] * 10)

    def per_lookup():
        began = time.thread_time()
        for value in seconds:
            counts.miss(("below_threshold",), value, (0.9, "below_threshold"), task="chat")
        return (time.thread_time() - began) / len(seconds)

    def per_parse():
        began = time.thread_time()
        for _ in range(2_000):
            json.loads(prompt)
        return (time.thread_time() - began) / 2_000

    assert min(per_lookup() for _ in range(5)) < 0.5 * min(per_parse() for _ in range(5))


def test_an_answer_from_the_cache_tells_what_its_making_took():
    message = AIMessage(
        "30 days.",
        response_metadata={"total_duration": 2_500_000_000, "done_reason": "stop"},
        usage_metadata={"input_tokens": 100, "output_tokens": 20, "total_tokens": 120},
    )
    kept = decode_answer(encode_answer([ChatGeneration(message=message)] * 2), marks={"tier": "exact"})
    assert cost_of(kept) == Cost(2.5, 200, 40)
    assert cost_of(kept[0].message) == Cost(2.5, 100, 20)


@pytest.mark.parametrize("answer", ["text", [], {"a": 1}, [Generation(text="x")], AIMessage("no usage"), [1, "a"]])
def test_what_does_not_tell_costs_nothing(answer):
    assert cost_of(answer) == Cost()
