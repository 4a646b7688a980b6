"""A prompt in which something is new every time is noticed, and what it is is said."""

import json
import logging
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_aegis.keys import Keyring, Who
from langchain_aegis.notices import forget_warnings
from langchain_aegis.scopes_seen import LEAST_LOOKUPS, REMEDIES, ScopesSeen, differing

PROMPT_FIELDS = [
    "tenant", "user", "task", "model", "options", "tools", "format", "stop", "system", "history", "before", "after",
    "chunks",
]  # fmt: skip
PIPELINE_FIELDS = ["tenant", "user", "task", "pipeline", "version"]


@pytest.fixture(autouse=True)
def fresh():
    forget_warnings()


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="langchain_aegis")
    return lambda: [r.getMessage() for r in caplog.records if "scopes_seen_once" in r.getMessage()]


def fields(**changes):
    return {**dict.fromkeys(PROMPT_FIELDS, "0" * 8), **{name: f"{value:08x}" for name, value in changes.items()}}


def show(seen, number, **changes):
    """One lookup whose scope is made of the changes."""
    seen.saw(repr(sorted(changes.items())), lambda: fields(**changes))
    return number


@pytest.mark.parametrize("name", PROMPT_FIELDS)
def test_the_field_that_is_new_every_time_is_named_once_with_its_remedy(name, warnings):
    seen = ScopesSeen()
    for number in range(1_000):
        show(seen, number, **{name: number})
    assert seen.summary().fields == (name,)
    assert seen.summary().once == 1.0
    (warning,) = warnings()
    assert f"({name})" in warning
    assert REMEDIES[name] in warning


@pytest.mark.parametrize(
    ("name", "words"),
    [("system", "scope_ignore="), ("before", "get_or_generate"), ("chunks", "before retrieval"), ("before", "chunks="),
     ("user", "share_within_tenant=True"), ("history", "get_or_generate")],
)  # fmt: skip
def test_the_remedy_names_what_to_write(name, words):
    assert words in REMEDIES[name]


def test_every_field_of_a_scope_has_a_remedy():
    assert set(REMEDIES) == {*PROMPT_FIELDS, *PIPELINE_FIELDS}


def test_a_few_values_of_other_fields_do_not_hide_the_one_that_is_always_new(warnings):
    seen = ScopesSeen()
    rng = random.Random(1)
    for number in range(400):
        show(seen, number, history=number, user=rng.randrange(20), task=rng.randrange(3))
    assert seen.summary().fields == ("history",)
    assert len(warnings()) == 1


def test_two_fields_that_always_change_together_are_both_named():
    seen = ScopesSeen()
    for number in range(400):
        show(seen, number, tenant=number, user=number)
    assert seen.summary().fields == ("tenant", "user")


def test_scopes_that_come_again_are_no_reason_to_warn(warnings):
    seen = ScopesSeen()
    rng = random.Random(2)
    for number in range(5_000):
        show(seen, number, user=rng.randrange(40))
    assert seen.summary().once < 0.1
    assert seen.summary().fields == ()
    assert not warnings()


def test_nothing_is_said_before_enough_was_seen(warnings):
    seen = ScopesSeen()
    for number in range(LEAST_LOOKUPS - 1):
        show(seen, number, system=number)
    assert seen.summary() is None
    assert not warnings()


def test_a_process_that_goes_wrong_later_is_noticed_too(warnings):
    seen = ScopesSeen(limit=500)
    for number in range(3_000):
        show(seen, number, user=number % 50)
    assert not warnings()
    for number in range(3_000):
        show(seen, number, system=number)
    assert seen.summary().fields == ("system",)
    assert len(warnings()) == 1


def test_memory_is_bounded_and_fields_are_made_for_few():
    seen = ScopesSeen(limit=500)
    made = []
    for number in range(10_000):
        seen.saw(f"{number:032x}", lambda: made.append(1) or fields())
    assert len(seen._times) <= 500
    assert len(seen._samples) <= 256
    assert len(made) < 2_000


def test_after_a_new_beginning_the_last_summary_is_kept():
    seen = ScopesSeen(limit=300)
    for number in range(310):
        show(seen, number, system=number)
    assert seen.summary().lookups == 300


def test_a_field_that_only_some_scopes_have_differs_from_its_absence():
    assert differing([{"model": "a"}, {"model": "a", "chunks": "c"}]) == ("chunks",)


def test_equal_scopes_differ_in_nothing():
    assert differing([]) == ()
    assert differing([fields(), fields()]) == ()


@given(st.lists(st.fixed_dictionaries({"user": st.integers(0, 3), "system": st.integers(0, 50)}), max_size=40))
def test_only_fields_that_differ_are_named(samples):
    told = [{name: str(value) for name, value in sample.items()} for sample in samples]
    for name in differing(told):
        assert len({sample[name] for sample in told}) > 1


def test_threads_may_look_up_at_the_same_time(warnings):
    seen = ScopesSeen(limit=400)

    def work(thread):
        for number in range(500):
            show(seen, number, system=thread * 1_000 + number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen.summary().once == 1.0
    assert len(warnings()) == 1


def call(keyring, number, *, system="You help.", text="How long may I keep a book?", user="eve"):
    messages = [
        {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", kind],
         "kwargs": {"content": content, "type": kind.removesuffix("Message").lower()}}
        for kind, content in (("SystemMessage", system), ("HumanMessage", text))
    ]  # fmt: skip
    key = keyring.for_prompt(json.dumps(messages), 'aegis/1 {"model":"chat:8b"}', Who(tenant="acme", user=user))
    assert key.scope, key.exact_only
    return key


@pytest.mark.parametrize(
    ("name", "changing"),
    [
        ("system", lambda n: {"system": f"You help. Request {n}."}),
        ("user", lambda n: {"user": f"user {n}"}),
        ("before", lambda n: {"text": f"Context:\nDocument {n}.\n\nQuestion: How long may I keep a book?"}),
        ("after", lambda n: {"text": f"Question: How long may I keep a book?\n\nContext:\nDocument {n}."}),
    ],
)
def test_the_cause_is_found_in_real_keys(name, changing):
    keyring = Keyring(b"0123456789abcdef")
    seen = ScopesSeen()
    for number in range(LEAST_LOOKUPS):
        key = call(keyring, number, **changing(number))
        seen.saw(key.scope, key.fields)
    assert seen.summary().fields == (name,)
