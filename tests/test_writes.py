"""Nobody waits for an answer to be stored, whoever asks next finds it, and what was removed meanwhile stays away."""

import asyncio
import contextlib
import contextvars
import os
import subprocess
import sys
import threading
import uuid

import pytest
import redis
from caches import MODEL, Driver, Same, Words, chat, prompt, stats_of, text_of

from langchain_aegis import AegisSemanticCache, aegis_scope, aegis_sources, writes
from langchain_aegis.writes import Write, Writer, the_writer

BOOK, PARAPHRASE = "How long may I keep a book?", "How long can I keep a book?"


@contextlib.contextmanager
def held():
    """Keep the writer from writing."""
    go, begun = threading.Event(), threading.Event()
    the_writer.put(Write(lambda: begun.set() or go.wait(30), "", "", 0, "held"))
    assert begun.wait(10)
    try:
        yield go
    finally:
        go.set()
        assert the_writer.drain(timeout_s=10)


def write(do, exact="k", size=1, place="p"):
    return Write(do, exact, "", size, place)


# -- as the cache uses it ---------------------------------------------------------------------------------------------


def test_an_update_does_not_wait_for_redis_and_the_next_lookup_waits_for_the_update(make_cache):
    cache = make_cache()
    assert cache.lookup(prompt(BOOK), MODEL) is None
    with held() as go:
        cache.update(prompt(BOOK), MODEL, chat("28 days"))
        assert the_writer.busy
        threading.Timer(0.05, go.set).start()
        found = cache.lookup(prompt(BOOK), MODEL)
    assert text_of(found) == "28 days"
    assert found[0].message.response_metadata["aegis_cache"]["tier"] == "exact"


def test_the_next_lookup_waits_for_an_update_that_replaces_an_answer(make_cache):
    cache = make_cache()
    cache.update(prompt(BOOK), MODEL, chat("28 days"))
    assert the_writer.drain(timeout_s=10)
    with held() as go:
        cache.update(prompt(BOOK), MODEL, chat("14 days"))
        threading.Timer(0.05, go.set).start()
        found = cache.lookup(prompt(BOOK), MODEL)
    assert text_of(found) == "14 days"


def test_a_paraphrase_waits_for_the_writes_of_its_scope(make_cache):
    cache = make_cache()
    assert cache.lookup(prompt(BOOK), MODEL) is None
    with held() as go:
        cache.update(prompt(BOOK), MODEL, chat("28 days"))
        threading.Timer(0.05, go.set).start()
        assert text_of(cache.lookup(prompt(PARAPHRASE), MODEL)) == "28 days"


def test_a_paraphrase_waits_for_an_answer_that_was_not_looked_up(make_cache):
    cache = make_cache()
    with held() as go:
        cache.update(prompt(BOOK), MODEL, chat("28 days"))
        threading.Timer(0.05, go.set).start()
        assert text_of(cache.lookup(prompt(PARAPHRASE), MODEL)) == "28 days"


def test_another_cache_of_the_process_finds_what_the_first_was_told(make_cache):
    cache = make_cache()
    other = make_cache(namespace=cache.cache.settings.namespace)
    assert cache.lookup(prompt(BOOK), MODEL) is None
    with held() as go:
        cache.update(prompt(BOOK), MODEL, chat("28 days"))
        threading.Timer(0.05, go.set).start()
        assert text_of(other.lookup(prompt(BOOK), MODEL)) == "28 days"


@pytest.mark.parametrize("remove", ["clear", "invalidate"])
def test_a_removal_wins_over_what_is_queued(make_cache, monkeypatch, remove):
    monkeypatch.setattr(writes, "DRAIN_S", 0.01)
    monkeypatch.setattr(Writer.drain, "__defaults__", (None, 0.01))
    cache = make_cache()
    assert cache.lookup(prompt(BOOK), MODEL) is None
    with held():
        cache.update(prompt(BOOK), MODEL, chat("28 days"))
        cache.clear() if remove == "clear" else cache.invalidate(model="m")
    assert stats_of(cache.cache).not_stored == {"invalidated": 1}
    assert cache.lookup(prompt(BOOK), MODEL) is None


def test_a_removal_counts_what_was_queued_before_it(make_cache):
    cache = make_cache()
    cache.lookup(prompt(BOOK), MODEL)
    with held() as go:
        cache.update(prompt(BOOK), MODEL, chat("28 days"))
        threading.Timer(0.05, go.set).start()
        assert cache.invalidate(model="m") == 1


def test_a_lookup_does_not_wait_for_longer_than_redis_may_take(make_cache):
    told = []
    cache = make_cache(op_budget_s=0.2, on_lookup=told.append)
    cache.lookup(prompt(BOOK), MODEL)
    with held():
        cache.update(prompt(BOOK), MODEL, chat("28 days"))
        assert cache.lookup(prompt(BOOK), MODEL) is None
        assert told[-1].reasons == ("redis_slow",), "it is not asked as well"
        assert cache.lookup(prompt(PARAPHRASE), MODEL) is None
        assert told[-1].asked_s, "it was asked, and waited for the scope's write only once"
    assert text_of(cache.lookup(prompt(BOOK), MODEL)) == "28 days"


def test_where_many_wait_an_update_waits_and_then_gives_up(make_cache, monkeypatch):
    monkeypatch.setattr(writes, "MOST", 2)
    cache = make_cache(op_budget_s=0.2)
    questions = [f"What is rule {n}?" for n in ("one", "two", "three")]
    for question in questions:
        cache.lookup(prompt(question), MODEL)
    with held() as go:
        cache.update(prompt(questions[0]), MODEL, chat("a"))
        cache.update(prompt(questions[1]), MODEL, chat("b"))
        threading.Timer(0.05, go.set).start()
        cache.update(prompt(questions[2]), MODEL, chat("c"))
    assert stats_of(cache.cache).not_stored == {"queue_full": 1}
    assert [text_of(cache.lookup(prompt(q), MODEL)) for q in (questions[0], questions[2])] == ["a", "c"]


def test_what_is_told_of_an_answer_is_what_held_when_it_was_made(make_cache):
    cache = make_cache()
    with held(), aegis_scope(tenant="acme", sources=["loans.md"]):
        cache.lookup(prompt(BOOK), MODEL)
        cache.update(prompt(BOOK), MODEL, chat("28 days"))
        aegis_sources("another.md")  # of the next step
    assert cache.invalidate(sources=["another.md"]) == 0
    assert cache.invalidate(sources=["loans.md"]) == 1


def test_an_answer_is_stored_as_it_was_told(make_cache):
    cache = make_cache()
    cache.lookup(prompt(BOOK), MODEL)
    answer = chat("28 days")
    with held():
        cache.update(prompt(BOOK), MODEL, answer)
        answer[0].message.content = "changed by the application"
    assert text_of(cache.lookup(prompt(BOOK), MODEL)) == "28 days"


def test_a_redis_that_is_gone_is_counted(tmp_path):
    with AegisSemanticCache(f"unix://{tmp_path}/none.sock", Words(), namespace="gone") as cache:
        cache.lookup(prompt(BOOK), MODEL)
        cache.update(prompt(BOOK), MODEL, chat("28 days"))
        assert cache.stats().not_stored == {"redis_down": 1}


async def test_stats_do_not_hold_up_an_event_loop(redis_url):
    async with AegisSemanticCache(redis_url, Words(), namespace=f"c{uuid.uuid4().hex[:8]}") as cache:
        await cache.alookup(prompt(BOOK), MODEL)
        with held():
            await cache.aupdate(prompt(BOOK), MODEL, chat("28 days"))
            assert cache.stats().stored == 0
        assert cache.stats().stored == 1


async def test_a_cancelled_lookup_does_not_cancel_the_write_it_waits_for(redis_url):
    async with AegisSemanticCache(redis_url, Words(), namespace=f"c{uuid.uuid4().hex[:8]}", op_budget_s=5) as cache:
        await cache.alookup(prompt(BOOK), MODEL)
        with held():
            await cache.aupdate(prompt(BOOK), MODEL, chat("28 days"))
            waiting = asyncio.ensure_future(cache.alookup(prompt(BOOK), MODEL))
            await asyncio.sleep(0.01)
            waiting.cancel()
        assert text_of(await cache.alookup(prompt(BOOK), MODEL)) == "28 days"


def test_an_answer_that_comes_while_redis_is_asked_is_found(make_cache, monkeypatch):
    """Whoever made it has left by then: nobody else's answer could be joined, and the model would be asked again."""
    cache = make_cache(op_budget_s=5)
    cache.lookup(prompt("Is it open?"), MODEL)
    text = prompt("Translate into German: The library is open.")  # by meaning it is not found
    connections, ask, aask = (one := cache.cache._connections), one.ask, one.aask

    def comes(replies):
        monkeypatch.undo()
        contextvars.Context().run(cache.cache.update, text, MODEL, chat("Die Bibliothek ist offen."))
        return replies

    async def asked(*request):
        return comes(await aask(*request))

    monkeypatch.setattr(connections, "ask", lambda *request: comes(ask(*request)))
    monkeypatch.setattr(connections, "aask", asked)
    assert text_of(cache.lookup(text, MODEL)) == "Die Bibliothek ist offen."


@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.slow
def test_a_process_that_ends_at_once_has_stored_its_answers(redis_url, closes):
    namespace = f"c{uuid.uuid4().hex[:8]}"
    code = f"""
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration
from langchain_aegis import AegisSemanticCache, writes
writes.DRAIN_S = 30  # a second is enough where nothing else runs
cache = AegisSemanticCache({redis_url!r}, namespace={namespace!r}, op_budget_s=5)
for i in range(20):
    cache.update(f"Is it rule {{i}}?", {MODEL!r},
                 [ChatGeneration(message=AIMessage("yes", response_metadata={{"done_reason": "stop"}}))])
{"cache.close()" if closes else ""}
"""
    environment = {**os.environ, "OLLAMA_BASE_URL": "http://127.0.0.1:9"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)
    with redis.Redis.from_url(redis_url, protocol=2) as client:
        assert len(list(client.scan_iter(f"{namespace}:*:e:*"))) == 20


def test_a_child_process_does_not_write_for_its_parent(make_cache):
    cache = make_cache()
    cache.lookup(prompt(BOOK), MODEL)
    with held():
        cache.update(prompt(BOOK), MODEL, chat("28 days"))
        child = os.fork()
        if not child:
            os._exit(0 if not the_writer.busy and the_writer.drain() and the_writer._thread is None else 1)
        assert os.waitpid(child, 0)[1] == 0


# -- alone ------------------------------------------------------------------------------------------------------------


def test_writes_are_done_in_turn_and_one_that_fails_does_not_stop_the_next():
    writer, done = Writer(), []

    def fail():
        raise ValueError("not this one")

    for do in (lambda: done.append(1), fail, lambda: done.append(2)):
        writer.put(write(do))
    assert writer.drain(timeout_s=10)
    assert done == [1, 2]
    assert writer.pending("k") is None
    assert not writer.busy


def test_only_the_writes_of_a_place_are_waited_for():
    writer, go = Writer(), threading.Event()
    writer.put(write(lambda: None, place="a"))
    writer.put(write(lambda: go.wait(10), place="b"))
    assert writer.drain("a", timeout_s=10)
    assert not writer.drain("b", timeout_s=0.01)
    go.set()
    assert writer.drain("b", timeout_s=10)


def test_it_is_crowded_by_number_and_by_bytes():
    writer, go = Writer(), threading.Event()
    writer.put(write(lambda: go.wait(10)))
    assert writer.crowded() is None
    writer.put(write(lambda: None, size=writes.MOST_BYTES))
    first = writer.crowded()
    go.set()
    assert first.result(10) is None
    assert writer.drain(timeout_s=10)
    assert writer.crowded() is None


def test_where_no_thread_can_be_started_it_is_done_at_once(monkeypatch):
    writer, done = Writer(), []
    monkeypatch.setattr(writer, "_start", lambda: False)
    one = write(lambda: done.append(1))
    writer.put(one)
    assert done == [1]
    assert one.over
    assert one.promise().done()


@pytest.mark.parametrize("awaited", [False, True])
def test_a_hit_that_shall_not_be_repeated_is_not_waited_for_and_not_repeated(redis_url, awaited, monkeypatch):
    """While the note is still to be written, too; and it is written before the connections are closed."""
    seen = []

    def driver():
        return Driver(
            AegisSemanticCache(
                redis_url,
                Same(),
                namespace=f"asides{awaited}",
                repeats="ask",
                on_lookup=lambda f: seen.append(f.reasons),
            ),
            awaited,
        )

    kept, again = [], prompt("How can I reset my password?")
    first = driver()
    first.update(prompt("How do I reset my password?"), MODEL, chat("so"))
    with monkeypatch.context() as held:
        held.setattr(the_writer, "put", kept.append)
        assert text_of(first.lookup(again, MODEL)) == "so"
        assert first.lookup(again, MODEL) is None
    assert len(kept) == 1
    the_writer.put(kept[0])
    first.end()
    second = driver()
    assert second.lookup(again, MODEL) is None
    assert seen == [(), ("asked_again",), ("asked_again",)]
    second.end()
