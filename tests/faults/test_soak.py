"""The soak: a short one, and that it sees what it is there to see."""

import gc
import os
import subprocess
import sys
import threading
import time

import pytest

from faults import soak
from faults.soak_faults import FAULTS
from faults.soak_history import History, Window
from faults.soak_parts import CALLERS, SCRIPTED, about, source_of
from faults.tenants import THINGS, TIERS
from langchain_aegis.errors import AegisConnectionError, AegisServerError

ACME, OTHERS = CALLERS[0], CALLERS[1:]


@pytest.fixture
def history():
    return History(source_of)


def served(history, text=None, *, made_for=ACME, subject="exact book", target="one", asked=None):
    """Have an answer made, then ask, then be served it, or `text`."""
    made = history.text_of_answer(made_for, subject, target)
    call = asked or history.begin("one", "far", ACME, "exact book")
    history.answered(call, made if text is None else text(made), "exact")
    return dict(history.wrong)


def test_a_right_answer_is_no_violation(history):
    assert served(history) == {}


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_an_answer_of_anybody_else_is_seen(history, number):
    (kind,) = served(history, made_for=OTHERS[number])
    assert kind in ("an answer of another tenant", "an answer of another user", "an answer of another task")


def test_an_answer_of_another_model_or_to_another_question_is_seen(history):
    assert served(history, target="two") == {"an answer of another model": 1}
    assert served(history, subject="exact card")["an answer to another question"] == 1


def test_an_answer_that_is_cut_anywhere_is_seen(history):
    text = history.text_of_answer(ACME, "exact book", "one")
    parts = [text[:length] for length in range(len(text))] + [text.replace("xx", "x", 1)]
    for part in parts:
        history.answered(history.begin("one", "far", ACME, "exact book"), part, "exact")
    assert history.wrong == {"a truncated answer": len(parts)}


@pytest.mark.parametrize(("kind", "name"), [("all", ""), ("tenant", "acme"), ("source", source_of("exact book"))])
def test_what_was_invalidated_before_a_call_began_is_seen(history, kind, name):
    old = history.text_of_answer(ACME, "exact book", "one")
    before = history.begin("one", "far", ACME, "exact book")
    began = history.invalidating()
    during = history.text_of_answer(ACME, "exact book", "one")
    history.invalidated("far", kind, name, began)
    elsewhere = history.begin("one", "near", ACME, "exact book")
    after = history.begin("one", "far", ACME, "exact book")
    for call, text in ((before, old), (elsewhere, old), (after, during)):
        history.answered(call, text, "exact")
    assert not history.wrong
    history.answered(after, old, "exact")
    assert history.wrong == {"an answer that was invalidated": 1}
    assert any("gone" in line for line in history.violations[0].before)


def test_an_error_is_a_violation_unless_its_cause_was_the_matter(history):
    window = FAULTS["Ollama: 500"].window("Ollama: 500")
    early = history.begin(SCRIPTED, "near", ACME, "exact book")
    with history.during(window):
        meanwhile, other = (history.begin(target, "near", ACME, "exact book") for target in (SCRIPTED, "one"))
    late = history.begin(SCRIPTED, "near", ACME, "exact book")
    for call in (early, meanwhile):
        history.failed(call, AegisServerError("it failed"))
    assert not history.wrong
    for wrong, (call, error) in enumerate(
        [
            (late, AegisServerError("it failed")),
            (other, AegisServerError("it failed")),
            (meanwhile, AegisConnectionError("another one")),
            (meanwhile, KeyError("no typed one")),
        ],
        1,
    ):
        history.failed(call, error)
        assert history.wrong == {"an error": wrong}
    assert "Traceback" in history.violations[0].text or "AegisServerError" in history.violations[0].text


def test_an_invalidation_may_fail_again_and_again_only_while_redis_is_away(history):
    before_s = time.monotonic()
    with history.during(Window("frozen", "redis", before_s)):
        pass
    after_s = time.monotonic()
    history.not_invalidated("far", "tenant", AegisConnectionError("away"), before_s, last=True)
    history.not_invalidated("far", "tenant", AegisConnectionError("away"), after_s, last=False)
    assert not history.wrong
    history.not_invalidated("far", "tenant", AegisConnectionError("away"), after_s, last=True)
    assert history.wrong == {"an error": 1}


def test_questions_that_one_answer_serves_are_told_from_all_others():
    exact, semantic = TIERS
    assert about(semantic.stored("book")) == about(semantic.asked("book")) == "semantic book"
    assert about(exact.asked("book")) == "exact book"
    numbered = {about(f"{form('book')} 7") for form in (semantic.stored, semantic.asked)}
    assert numbered == {"semantic book 7"}
    assert {source_of(about(semantic.asked(thing))) for thing in THINGS} == {f"document {n}" for n in range(5)}


def test_memory_descriptors_and_threads_that_grow_are_seen():
    def wrong(**grown):
        run = soak.Soak(60, 1)
        for place in range(12):
            had = {"rss_bytes": 10**8, "descriptors": 40, "threads": 12, "tasks": 12}
            had |= {name: had[name] + more for name, more in grown.items() if place >= 8}
            run.samples.append(soak.Sample(place, **had))
        run._look_at_samples()
        return set(run.history.wrong)

    assert wrong() == set()
    assert wrong(rss_bytes=soak.GROWN_BYTES + 1) == {"memory that grows"}
    assert wrong(descriptors=soak.MORE_DESCRIPTORS + 1) == {"descriptors left behind"}
    assert wrong(threads=soak.MORE_THREADS + 1) == {"threads left behind"}


def test_a_descriptor_and_a_thread_that_are_left_behind_are_seen():
    run, end = soak.Soak(1, 1), threading.Event()
    gc.collect()  # what other tests have left may be hundreds, and is closed when it is collected
    threads, opened = soak.passing_threads(), len(soak.descriptors())
    run._look_at_what_is_left(threads, opened, patience_s=2.0)
    assert not run.history.wrong
    threads, opened = soak.passing_threads(), len(soak.descriptors())
    thread = threading.Thread(target=end.wait, name="forgotten")
    # Many: what other tests have left may be closed just now.
    numbers = [os.open("/dev/null", os.O_RDONLY) for _ in range(100)]
    thread.start()
    try:
        run._look_at_what_is_left(threads, opened, patience_s=0.0)
    finally:
        end.set()
        thread.join()
        for number in numbers:
            os.close(number)
    assert set(run.history.wrong) == {"descriptors left behind", "threads left behind"}


def test_calls_that_a_cache_makes_slow_are_seen():
    run = soak.Soak(1, 1)
    with run.history.during(Window("Redis frozen", "redis", time.monotonic())):
        for number in range(200):
            run.history.measured("bare", 0.005, time.monotonic())
            run.history.measured("measured", 60.0 if number < 4 else 0.005, time.monotonic())
    run._look_at_times()
    assert set(run.history.wrong) == {"a slow call"}


@pytest.mark.row(128)
@pytest.mark.slow
@pytest.mark.deadline(240)
def test_whatever_happens_for_a_while_nothing_is_ever_wrong(capsys, tmp_path):
    """The first faults of half an hour of them."""
    report = tmp_path / "report.md"
    report.write_text("before\n<!-- soak -->\nold\n<!-- /soak -->\nafter\n")
    code = soak.main(["--seconds", "20", "--seed", "3", "--report", str(report)])
    assert code == 0, capsys.readouterr().out
    text = report.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| Length, seed | 20 s, 3 |" in text


@pytest.mark.slow
@pytest.mark.deadline(120)
def test_what_is_wrong_in_a_run_is_told_with_its_seed_and_what_came_before():
    planted = ("an answer of another tenant", "a descriptor left behind", "an entry without expiry")
    told = ["--seconds", "1", "--seed", "5", *(part for each in planted for part in ("--plant", each))]
    # As a program: here, something that another test has left may be closed meanwhile.
    done = subprocess.run([sys.executable, soak.__file__, *told], capture_output=True, text=True, timeout=100)
    said = done.stdout
    assert done.returncode == 1, done.stderr
    for kind in ("an answer of another tenant", "descriptors left behind", "an entry without expiry"):
        assert f"VIOLATION, seed 5: {kind}\n" in said
    assert "before:\n" in said and "made" in said
