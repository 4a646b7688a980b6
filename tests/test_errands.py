"""What a call does not wait for is done all the same, in order, and known at once in its own process."""

import threading

import pytest
from caches import MODEL, Driver, Same, chat, prompt, text_of

from langchain_aegis import AegisSemanticCache
from langchain_aegis.errands import Errands, the_errands


def test_errands_are_done_in_their_order():
    errands, done, owner = Errands(), [], object()
    for i in range(50):
        assert errands.add(owner, lambda i=i: done.append(i))
    assert errands.settle(owner)
    assert done == list(range(50))


def test_a_failure_is_counted_and_the_next_errand_is_done():
    errands, done, owner = Errands(), [], object()
    errands.add(owner, lambda: 1 / 0)
    errands.add(owner, lambda: done.append(1))
    assert errands.settle(owner)
    assert (errands.failures, done) == (1, [1])


def test_too_many_are_refused_and_another_owner_is_not_waited_for():
    errands, free, mine, other = Errands(most=2), threading.Event(), object(), object()
    started = threading.Event()
    errands.add(other, lambda: (started.set(), free.wait(10)))
    assert started.wait(10)
    assert [errands.add(other, lambda: None) for _ in range(3)] == [True, True, False]
    assert errands.settle(mine, 0)
    assert not errands.settle(other, 0)
    free.set()
    assert errands.settle(other)


def test_a_thread_that_cannot_start_is_no_error(monkeypatch):
    def fail(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    errands, owner = Errands(), object()
    monkeypatch.setattr(threading.Thread, "start", fail)
    assert not errands.add(owner, lambda: None)
    assert errands.settle(owner, 0)


@pytest.mark.parametrize("awaited", [False, True])
def test_a_hit_that_shall_not_be_repeated_is_not_waited_for_and_not_repeated(redis_url, awaited, monkeypatch):
    """While the note is still to be written, too; and it is written before the connections are closed."""
    seen = []

    def driver():
        return Driver(
            AegisSemanticCache(
                redis_url,
                Same(),
                namespace=f"errands{awaited}",
                repeats="ask",
                on_lookup=lambda f: seen.append(f.reasons),
            ),
            awaited,
        )

    kept, again = [], prompt("How can I reset my password?")
    first = driver()
    first.update(prompt("How do I reset my password?"), MODEL, chat("so"))
    with monkeypatch.context() as held:
        held.setattr(the_errands, "add", lambda *errand: kept.append(errand) or True)
        assert text_of(first.lookup(again, MODEL)) == "so"
        assert first.lookup(again, MODEL) is None
    assert len(kept) == 1
    assert the_errands.add(*kept[0])
    first.end()
    second = driver()
    assert second.lookup(again, MODEL) is None
    assert seen == [(), ("asked_again",), ("asked_again",)]
    second.end()
