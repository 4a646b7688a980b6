"""What lookups leave behind for their updates: as a plain mapping would keep it, however many there are."""

import random
from contextvars import copy_context

import pytest

from langchain_aegis import stamps
from langchain_aegis.stamps import forgotten, recall, remember

ENGINE, OTHER = object(), object()


@pytest.fixture(autouse=True)
def _own_context(request):
    """Leave nothing behind: each test is run in a copy of the context."""
    function = request.function
    request.node.obj = lambda **kwargs: copy_context().run(function, **kwargs)


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_lookups_and_updates_finds_what_a_plain_mapping_would(seed):
    drawn, kept = random.Random(seed), {}
    for turn in range(3_000):
        name = (drawn.choice([ENGINE, OTHER]), f"prompt {drawn.randrange(200)}", "model")
        if drawn.random() < 0.5:
            remember(*name, "who", turn)
            kept[name] = turn, kept.get(name, (0, 0))[1] + 1
        else:
            found = recall(*name)
            assert (None if found is None else (found.found, found.times)) == kept.get(name)
            if found is not None:
                kept[name] = found.found, found.times - 1
                if not kept[name][1]:
                    del kept[name]
    assert forgotten(ENGINE) is forgotten(OTHER) is None


def test_of_too_many_the_first_is_known_to_be_forgotten(monkeypatch):
    monkeypatch.setattr(stamps, "_KEPT", 50)
    for n in range(300):
        remember(ENGINE, f"prompt {n}", "model", "who", n)
    remember(OTHER, "prompt", "model", "who", "other's")
    first = forgotten(ENGINE)
    assert first is not None
    assert first.found == 0
    assert forgotten(OTHER) is None
    known = [n for n in range(300) if recall(ENGINE, f"prompt {n}", "model") is not None]
    assert known == list(range(known[0], 300))  # the newest, all of them
    assert 50 <= len(known) < 75


def test_what_a_copied_context_takes_is_still_there_in_the_one_that_it_was_copied_from():
    for n in range(40):
        remember(ENGINE, f"prompt {n}", "model", "who", n)

    def in_copy():
        assert [recall(ENGINE, f"prompt {n}", "model").found for n in range(40)] == list(range(40))
        remember(ENGINE, "prompt 3", "model", "who", "the copy's")

    copy_context().run(in_copy)
    assert [recall(ENGINE, f"prompt {n}", "model").found for n in range(40)] == list(range(40))
    assert recall(ENGINE, "prompt 3", "model") is None
