"""The cache as LangChain calls it: right answers, no errors, whatever Redis and the embedder do."""

import asyncio
import threading
import time
import uuid

import pytest
import redis
from caches import MODEL, Words, chat, prompt, stats_of, text_of
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, SystemMessage
from langchain_core.outputs import ChatGeneration, Generation

from langchain_aegis import AegisSemanticCache, Answer, aegis_scope, aegis_sources, lookup, was_cached
from langchain_aegis.errors import AegisConfigError, AegisConnectionError
from langchain_aegis.notices import forget_warnings
from langchain_aegis.settings import AegisSettings


@pytest.fixture(autouse=True)
def _warnings_anew():
    forget_warnings()


def test_an_exact_repeat_hits_and_asks_no_embedder(make_cache):
    words = Words()
    cache = make_cache(embeddings=words)
    assert cache.lookup(prompt("How long may I keep a book?"), MODEL) is None
    cache.update(prompt("How long may I keep a book?"), MODEL, chat("28 days"))
    (hit,) = cache.lookup(prompt("How long may I keep a book?"), MODEL)
    assert hit.text == "28 days"
    assert len(words.asked) == 1  # by the first lookup; the update used its vector
    marks = was_cached(hit.message)
    assert (marks["tier"], marks["similarity"]) == ("exact", 1.0)
    assert was_cached(AIMessage("fresh")) is None


def test_redis_is_asked_once_for_an_exact_repeat_and_not_again_where_there_is_none(make_cache, monkeypatch):
    """What an exact repeat needs is sent before any flow begins; what the flow then does goes on from the replies."""
    cache = make_cache(repeats="serve")
    cache.update(prompt("How long may I keep a book?"), MODEL, chat("28 days"))
    assert stats_of(cache.cache).stored == 1
    cache.lookup(prompt("How long can I keep a book?"), MODEL)
    connections, sent = cache.cache._connections, []
    ask, aask = connections.ask, connections.aask
    monkeypatch.setattr(connections, "ask", lambda request, *how: sent.append(request) or ask(request, *how))
    monkeypatch.setattr(connections, "aask", lambda request, *how: sent.append(request) or aask(request, *how))
    assert text_of(cache.lookup(prompt("How long may I keep a book?"), MODEL)) == "28 days"
    assert len(sent) == 1
    assert text_of(cache.lookup(prompt("How long can I keep a book?"), MODEL)) == "28 days"
    assert [b"HMGET" in request for request in sent] == [True, True, False]  # the record once, then the nearest
    monkeypatch.setattr(cache.cache, "_perform", None)
    monkeypatch.setattr(cache.cache, "_aperform", None)
    assert text_of(cache.lookup(prompt("How long may I keep a book?"), MODEL)) == "28 days"  # no flow asks anything


def test_an_exact_repeat_that_nobody_may_be_served_goes_on_as_a_miss(make_cache, monkeypatch):
    """All that can be said against a record is said whichever way it was read."""
    seen = []
    cache = make_cache(on_lookup=seen.append)
    asked, answered = (prompt("How long may I keep a book?"), MODEL), chat("28 days")
    with aegis_scope(user="u", sources=["doc"]):
        cache.update(*asked, answered)
        assert text_of(cache.lookup(*asked)) == "28 days"
        cache.cache.invalidate(sources=["another"])  # its own sources must now be asked for
        assert text_of(cache.lookup(*asked)) == "28 days"
        cache.cache.invalidate(sources=["doc"])
        assert cache.lookup(*asked) is None
        assert seen[-1].reasons == ("no_candidate",)
        cache.update(*asked, answered)
        assert text_of(cache.lookup(*asked)) == "28 days"
        assert seen[-1].record.src
        later = time.time_ns() + 10**9 * 10**9
        monkeypatch.setattr(time, "time_ns", lambda: later)
        assert cache.lookup(*asked) is None
        monkeypatch.undo()
        with aegis_scope(cache="refresh"):
            assert cache.lookup(*asked) is None
        assert seen[-1].reasons == ("refresh",)
        cache.update(*asked, chat("21 days"))
        assert text_of(cache.lookup(*asked)) == "21 days"
    assert seen[-1].tier == "exact"
    assert cache.cache.stats().rejected == 0


def test_a_paraphrase_hits_by_meaning_and_another_question_does_not(make_cache):
    cache = make_cache()
    cache.update(prompt("How long may I keep a book?"), MODEL, chat("28 days"))
    (hit,) = cache.lookup(prompt("How long can I keep a book?"), MODEL)
    assert (hit.text, was_cached(hit.message)["tier"]) == ("28 days", "semantic")
    assert cache.lookup(prompt("What does a reader card cost?"), MODEL) is None


def test_the_words_of_a_question_are_read_once_for_its_lookup_and_its_update(make_cache, monkeypatch):
    read, seen = [], []
    made = lookup.profile
    monkeypatch.setattr(lookup, "profile", lambda text, **key: read.append(text) or made(text, **key))
    cache = make_cache(on_lookup=seen.append)
    far, near = "What does a reader card cost?", "How long can I keep a book?"
    cache.update(prompt("How long may I keep a book?"), MODEL, chat("28 days"))
    assert cache.lookup(prompt(near), MODEL) is not None
    assert read[-1] == near
    read.clear()
    assert cache.lookup(prompt(far), MODEL) is None
    assert seen[-1].reasons == ("below_threshold",)
    cache.update(prompt(far), MODEL, chat("5 euros"))
    assert text_of(cache.lookup(prompt("What does the reader card cost?"), MODEL)) == "5 euros"
    assert read.count(far) == 1


def test_a_guard_stops_a_near_question_and_says_so(make_cache):
    seen = []
    cache = make_cache(on_lookup=seen.append)
    cache.update(prompt("May I return 3 books at the desk?"), MODEL, chat("Yes"))
    assert cache.lookup(prompt("May I return 30 books at the desk?"), MODEL) is None
    assert seen[-1].reasons == ("guard:number",)
    assert seen[-1].candidates[0].similarity > 0.6
    assert cache.cache.stats().reasons["guard:number"] == 1
    open_wide = make_cache(guards_off=["number"])
    open_wide.update(prompt("May I return 3 books at the desk?"), MODEL, chat("Yes"))
    assert text_of(open_wide.lookup(prompt("May I return 30 books at the desk?"), MODEL)) == "Yes"


@pytest.mark.parametrize(
    ("other_prompt", "other_model"),
    [
        (prompt("How long can I keep a book?"), MODEL.replace("'m'", "'m2'")),
        (prompt(SystemMessage("Be rude."), "How long can I keep a book?"), MODEL),
        (prompt("Hello", AIMessage("Hi"), "How long can I keep a book?"), MODEL),
        (prompt("How long can I keep a book?"), MODEL.replace("None", "['X']")),
    ],
)
@pytest.mark.row(49)
def test_another_model_system_history_or_option_never_shares(make_cache, other_prompt, other_model):
    cache = make_cache()
    cache.update(prompt("How long can I keep a book?"), MODEL, chat("28 days"))
    assert text_of(cache.lookup(prompt("How long can I keep a book?"), MODEL)) == "28 days"
    assert cache.lookup(other_prompt, other_model) is None


@pytest.mark.row(56)
def test_a_nearer_entry_of_another_tenant_neither_answers_nor_hides_ones_own(make_cache):
    cache = make_cache()
    with aegis_scope(tenant="a"):
        cache.update(prompt("How long may I keep a book?"), MODEL, chat("a: 28"))
    with aegis_scope(tenant="b"):
        assert cache.lookup(prompt("How long may I keep a book?"), MODEL) is None
        cache.update(prompt("How long may I keep one book?"), MODEL, chat("b: 14"))
        assert text_of(cache.lookup(prompt("How long may I keep a book?"), MODEL)) == "b: 14"
    with aegis_scope(tenant="a"):
        assert text_of(cache.lookup(prompt("How long may I keep a book?"), MODEL)) == "a: 28"


@pytest.mark.row(59)
def test_once_a_tenant_was_seen_calls_without_one_bypass_the_cache(make_cache, caplog):
    cache = make_cache()
    cache.update(prompt("How long may I keep a book?"), MODEL, chat("28"))
    assert cache.lookup(prompt("How long may I keep a book?"), MODEL) is not None
    with aegis_scope(tenant="a"):
        cache.update(prompt("How long may I keep a book?"), MODEL, chat("a: 28"))
    assert stats_of(cache.cache).stored == 2
    other = make_cache(namespace=cache.cache.settings.namespace)  # another process learns it from Redis
    for c in (cache, other, cache):
        assert c.lookup(prompt("How long may I keep a book?"), MODEL) is None
        c.update(prompt("Where is the cafe?"), MODEL, chat("no"))
    assert [r.getMessage().split(":")[0] for r in caplog.records].count("no_tenant") == 1
    relaxed = make_cache(namespace=cache.cache.settings.namespace, require_tenant=False)
    assert relaxed.lookup(prompt("How long may I keep a book?"), MODEL) is not None
    assert relaxed.lookup(prompt("Where is the cafe?"), MODEL) is None


@pytest.mark.row(59)
def test_a_required_tenant_is_required_from_the_start(make_cache):
    cache = make_cache(require_tenant=True)
    cache.update(prompt("How long may I keep a book?"), MODEL, chat("28"))
    assert cache.lookup(prompt("How long may I keep a book?"), MODEL) is None
    assert cache.cache.stats().stored == 0


def test_users_are_kept_apart_unless_told(make_cache):
    for share in (False, True):
        cache = make_cache(share_within_tenant=share)
        with aegis_scope(tenant="a", user="u1"):
            cache.update(prompt("How long may I keep a book?"), MODEL, chat("28"))
        with aegis_scope(tenant="a", user="u2"):
            assert (cache.lookup(prompt("How long can I keep a book?"), MODEL) is not None) == share
        # What a user's answers rest on goes with the user, also where others share them.
        assert cache.invalidate(tenant="a", user="u1") == 1
        with aegis_scope(tenant="a", user="u2"):
            assert cache.lookup(prompt("How long may I keep a book?"), MODEL) is None


def test_plain_chat_ollama_is_declined_with_one_warning(make_cache, caplog):
    cache = make_cache()
    unnamed = "[('_type', 'chat-ollama'), ('stop', None)]"
    for _ in range(3):
        cache.update(prompt("Why?"), unnamed, chat("x"))
        assert cache.lookup(prompt("Why?"), unnamed) is None
    assert [r.getMessage().split(":")[0] for r in caplog.records].count("unnamed_model") == 1


@pytest.mark.row(82)
@pytest.mark.parametrize("reason", [None, "length", "load"])
def test_a_cut_answer_is_not_kept(make_cache, reason):
    cache = make_cache()
    cache.update(prompt("Why?"), MODEL, chat("because", reason=reason))
    assert cache.lookup(prompt("Why?"), MODEL) is None
    assert cache.cache.stats().not_stored == {"incomplete": 1}


def test_tool_calls_and_several_generations_are_served_on_an_exact_repeat_only(make_cache):
    cache = make_cache()
    call = [{"name": "f", "args": {"a": 1}, "id": "1"}]
    cache.update(prompt("How long may I keep a book?"), MODEL, chat("", reason="tool_calls", tool_calls=call))
    (hit,) = cache.lookup(prompt("How long may I keep a book?"), MODEL)
    assert hit.message.tool_calls[0]["args"] == {"a": 1}
    assert cache.lookup(prompt("How long can I keep a book?"), MODEL) is None
    cache.update(prompt("Which branch has a cafe?"), "opaque", [Generation(text="a"), Generation(text="b")])
    assert cache.lookup(prompt("Which branch has a cafe?"), "opaque") == [Generation(text="a"), Generation(text="b")]


def test_a_cache_never_takes_over_the_lookup_of_one_that_is_gone(redis_url):
    """CPython gives a new object the address of one that is gone, often."""
    for _ in range(40):
        with AegisSemanticCache(redis_url, Words(), namespace=f"c{uuid.uuid4().hex[:8]}", op_budget_s=5) as cache:
            cache.lookup(prompt("Why?"), MODEL)
        del cache
        with AegisSemanticCache(redis_url, Words(), namespace=f"c{uuid.uuid4().hex[:8]}", op_budget_s=5) as cache:
            cache.update(prompt("Why?"), MODEL, chat("x"))
            assert text_of(cache.lookup(prompt("Why?"), MODEL)) == "x"
        del cache


def test_off_and_refresh(make_cache):
    cache = make_cache()
    cache.update(prompt("Why?"), MODEL, chat("old"))
    with aegis_scope(cache="off"):
        assert cache.lookup(prompt("Why?"), MODEL) is None
        cache.update(prompt("Why?"), MODEL, chat("never"))
    assert text_of(cache.lookup(prompt("Why?"), MODEL)) == "old"
    with aegis_scope(cache="refresh"):
        assert cache.lookup(prompt("Why?"), MODEL) is None
        cache.update(prompt("Why?"), MODEL, chat("new"))
    assert text_of(cache.lookup(prompt("Why?"), MODEL)) == "new"


def test_dry_run_serves_nothing_and_counts(make_cache):
    cache = make_cache(dry_run=True)
    cache.update(prompt("Why?"), MODEL, chat("x"))
    assert cache.lookup(prompt("Why?"), MODEL) is None
    assert cache.cache.stats().exact_hits == 1


def test_told_patterns_bypass_the_cache(make_cache):
    cache = make_cache(bypass=[r"\bstock\b"])
    cache.update(prompt("What is the stock of bikes?"), MODEL, chat("3"))
    assert cache.lookup(prompt("What is the stock of bikes?"), MODEL) is None
    assert cache.cache.stats().stored == 0


@pytest.mark.parametrize("how", ["scope", "task", "cache"])
def test_an_answer_lives_as_long_as_told(make_cache, redis_url, how):
    cache = make_cache(ttl_s=50 if how == "cache" else 9_000, ttl_by_task={"chat": 50} if how == "task" else None)
    with aegis_scope(task="chat", ttl_s=50 if how == "scope" else None):
        cache.update(prompt("Why?"), MODEL, chat("x"))
        assert cache.lookup(prompt("Why?"), MODEL) is not None
    with redis.Redis.from_url(redis_url) as client:
        (entry,) = client.scan_iter(f"{cache.cache.settings.namespace}:*:e:*")
        assert 0 < client.pttl(entry) <= 50_000


@pytest.mark.row(30)
def test_an_expired_answer_is_never_served_even_if_redis_still_has_it(make_cache, redis_url, monkeypatch):
    cache = make_cache()
    cache.update(prompt("Why is it so?"), MODEL, chat("x"))
    later = time.time_ns() + 3_601 * 10**9
    monkeypatch.setattr("langchain_aegis.engine.time.time_ns", lambda: later)
    assert cache.lookup(prompt("Why is it so?"), MODEL) is None
    assert cache.lookup(prompt("Why is this so?"), MODEL) is None


@pytest.mark.row(62)
def test_invalidation_by_source_and_tenant(make_cache):
    cache = make_cache()
    with aegis_scope(tenant="a", sources=["doc1"]):
        cache.lookup(prompt("How long may I keep a book?"), MODEL)
        aegis_sources("doc2")
        cache.update(prompt("How long may I keep a book?"), MODEL, chat("28"))
    with aegis_scope(tenant="b", sources=["doc2"]):
        cache.update(prompt("How long may I keep a book?"), MODEL, chat("14"))

    def hit(tenant):
        with aegis_scope(tenant=tenant):
            return cache.lookup(prompt("How long may I keep a book?"), MODEL) is not None

    assert (hit("a"), hit("b")) == (True, True)
    assert cache.invalidate(sources=["doc2"], tenant="b") == 1
    assert (hit("a"), hit("b")) == (True, False)
    assert cache.invalidate(sources=["doc3", "doc1"]) == 1
    assert hit("a") is False
    with aegis_scope(tenant="a"):
        cache.update(prompt("How long may I keep a book?"), MODEL, chat("28"))
    assert hit("a") is True
    assert cache.invalidate(tenant="a") == 1
    assert hit("a") is False


@pytest.mark.parametrize(
    "bad", [{}, {"sources": "doc"}, {"sources": ["a"], "user": "u"}, {"tenant": ""}, {"tenant": 3}]
)
def test_an_invalidation_that_names_nothing_is_an_error(make_cache, bad):
    with pytest.raises(AegisConfigError):
        make_cache().invalidate(**bad)


@pytest.mark.parametrize("how", ["source", "tenant", "clear"])
def test_an_invalidation_wins_over_an_answer_that_is_being_made(make_cache, how):
    cache = make_cache()
    other = make_cache(namespace=cache.cache.settings.namespace)
    with aegis_scope(tenant="a"):
        assert cache.lookup(prompt("How long may I keep a book?"), MODEL) is None
        {"source": lambda: other.invalidate(sources=["doc"]), "tenant": lambda: other.invalidate(tenant="a"),
         "clear": lambda: other.clear()}[how]()  # fmt: skip
        aegis_sources("doc")
        with aegis_scope(sources=["doc"]):
            cache.update(prompt("How long may I keep a book?"), MODEL, chat("outdated"))
        assert cache.lookup(prompt("How long may I keep a book?"), MODEL) is None
        assert cache.cache.stats().not_stored == {"invalidated": 1}


def test_clear_empties_the_namespace(make_cache):
    cache = make_cache()
    for tenant in ("a", "b"):
        with aegis_scope(tenant=tenant):
            cache.update(prompt("Why?"), MODEL, chat("x"))
    cache.clear()
    with aegis_scope(tenant="a"):
        assert cache.lookup(prompt("Why?"), MODEL) is None


def test_health_says_what_the_namespace_holds(make_cache):
    cache = make_cache()
    assert (cache.health().redis, cache.health().entries) == (True, 0)
    for tenant in ("a", "b"):
        with aegis_scope(tenant=tenant):
            cache.update(prompt("How long may I keep a book?"), MODEL, chat("28"))
    other = make_cache(namespace=cache.cache.settings.namespace)  # another process sees the same
    assert (other.health().entries, other.health().tenants) == (2, 2)
    assert (cache.health().search, cache.health().embedder) == (True, "words")


@pytest.mark.row(61)
def test_nothing_that_a_user_typed_or_a_secret_stands_in_redis(make_cache, redis_url):
    cache = make_cache()
    with aegis_scope(tenant="canary-tenant", user="canary-user", sources=["canary-source"]):
        cache.update(prompt("Where does the canary sing?"), MODEL, chat("In its cage"))
    assert stats_of(cache.cache).stored == 1
    with redis.Redis.from_url(redis_url) as client:
        names = list(client.scan_iter(f"{cache.cache.settings.namespace}:*"))
        entry = next(n for n in names if b":e:" in n)
        stored = repr(names) + repr({k: v for k, v in client.hgetall(entry).items() if k != b"answer"})
    assert len(names) >= 5
    assert "canary" not in stored


def test_questions_are_kept_when_told(make_cache):
    seen = []
    cache = make_cache(keep_questions=True, on_lookup=seen.append)
    cache.update(prompt("How long may I keep a book?"), MODEL, chat("28"))
    cache.lookup(prompt("How long can I keep a book?"), MODEL)
    assert seen[-1].candidates[0].question == "How long may I keep a book?"


# -- a whole pipeline -----------------------------------------------------------------------------------------------


def test_a_pipeline_is_asked_once_for_a_question_and_its_paraphrase(make_cache):
    cache, made = make_cache(), []

    def generate():
        made.append(1)
        aegis_sources("doc1")
        return Answer({"text": "28 days", "n": [1]}, sources=["doc2"])

    for question in ("How long may I keep a book?", "How long may I keep a book?", "How long can I keep a book?"):
        assert cache.get_or_generate(question, generate, pipeline="rag") == {"text": "28 days", "n": [1]}
    assert len(made) == 1
    assert cache.get_or_generate("How long may I keep a book?", generate, pipeline="rag", version="2")
    assert cache.get_or_generate("How long may I keep a book?", generate, pipeline="other")
    assert len(made) == 3
    assert cache.invalidate(sources=["doc1"]) == 3
    cache.get_or_generate("How long may I keep a book?", generate, pipeline="rag")
    assert len(made) == 4
    assert cache.invalidate(sources=["doc2"]) == 1


def test_a_pipelines_error_reaches_the_caller_and_nothing_is_kept(make_cache):
    cache = make_cache()
    with pytest.raises(ZeroDivisionError):
        cache.get_or_generate("Why?", lambda: 1 / 0, pipeline="rag")
    assert cache.get_or_generate("Why?", lambda: "fine", pipeline="rag") == "fine"


def test_a_pipelines_cut_or_odd_answer_is_returned_and_not_kept(make_cache):
    cache = make_cache()
    for value in (AIMessage("cut", response_metadata={"done_reason": "length"}), (1, 2), "", None):
        assert cache.get_or_generate("Why?", lambda value=value: value, pipeline="rag") is value
    assert cache.cache.stats().stored == 0


@pytest.mark.parametrize(
    "bad", [{"question": " "}, {"question": 3}, {"pipeline": ""}, {"sources": "doc"}, {"ttl_s": 0}]
)
def test_a_pipelines_bad_argument_is_refused(make_cache, bad):
    with pytest.raises(AegisConfigError):
        make_cache().get_or_generate(**{"question": "Why?", "generate": lambda: "x", "pipeline": "rag", **bad})


async def test_a_coroutine_function_and_a_blocking_one_may_generate(redis_url):
    cache = AegisSemanticCache(redis_url, Words(), namespace=f"c{uuid.uuid4().hex[:8]}")

    async def generate():
        await asyncio.sleep(0)
        return "awaited"

    where = []
    assert await cache.aget_or_generate("Why?", generate, pipeline="a") == "awaited"
    blocking = lambda: where.append(threading.current_thread()) or "blocking"  # noqa: E731
    assert await cache.aget_or_generate("Why?", blocking, pipeline="b") == "blocking"
    assert where != [threading.main_thread()]
    await cache.aclose()


# -- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.row(1)
def test_without_redis_every_call_is_a_miss_and_invalidation_says_so(make_cache, tmp_path):
    cache = make_cache(f"unix://{tmp_path}/none.sock")
    for _ in range(10):
        assert cache.lookup(prompt("Why?"), MODEL) is None
        cache.update(prompt("Why?"), MODEL, chat("x"))
        assert cache.get_or_generate("Why?", lambda: "x", pipeline="rag") == "x"
    assert (cache.health().redis, cache.health().entries) == (False, 0)
    for call in (lambda: cache.invalidate(tenant="a"), cache.clear):
        with pytest.raises(AegisConnectionError, match="call this again"):
            call()


@pytest.mark.row(3)
def test_an_answer_whose_lookup_redis_did_not_answer_is_not_kept(make_cache, monkeypatch):
    cache = make_cache()
    monkeypatch.setattr(cache.cache._connections.breaker, "allow", lambda: False)
    assert cache.lookup(prompt("Why?"), MODEL) is None
    monkeypatch.undo()
    cache.update(prompt("Why?"), MODEL, chat("perhaps outdated"))
    assert cache.lookup(prompt("Why?"), MODEL) is None


class Broken(Words):
    model = "broken"

    def embed_query(self, text):
        self.asked.append(text)
        raise RuntimeError("no model")


class Odd(Words):
    model = "odd"

    def embed_query(self, text):
        return [float("nan")] * 4 if "keep" in text else [0.0] * 4


class Hanging(Words):
    model = "hanging"

    def __init__(self):
        super().__init__()
        self.go = threading.Event()

    def embed_query(self, text):
        assert self.go.wait(20)
        return super().embed_query(text)


@pytest.mark.row(46)
def test_a_broken_embedder_costs_only_the_semantic_tier(make_cache):
    broken = Broken()
    cache = make_cache(embeddings=broken)
    for _ in range(8):
        cache.lookup(prompt("How long may I keep a book?"), MODEL)
    assert len(broken.asked) == 5  # then the breaker is open
    cache.update(prompt("How long may I keep a book?"), MODEL, chat("28"))
    assert text_of(cache.lookup(prompt("How long may I keep a book?"), MODEL)) == "28"
    assert cache.lookup(prompt("How long can I keep a book?"), MODEL) is None


def test_an_embedder_that_is_being_made_is_not_missing(make_cache, monkeypatch):
    cache = make_cache()
    embedder = cache.cache._engine.embedder
    seen = []
    make = embedder._make
    monkeypatch.setattr(embedder, "_make", lambda: (seen.append(embedder.missing), make())[1])
    assert cache.lookup(prompt("How long may I keep a book?"), MODEL) is None
    assert seen == [False]
    assert not embedder.missing


@pytest.mark.row(43)
def test_vectors_without_a_direction_are_never_stored_or_asked(make_cache):
    cache = make_cache(embeddings=Odd())
    for question in ("How long may I keep a book?", "What does a card cost?"):
        cache.update(prompt(question), MODEL, chat(question))
    assert cache.lookup(prompt("How long can I keep a book?"), MODEL) is None
    assert cache.lookup(prompt("What does one card cost?"), MODEL) is None
    assert text_of(cache.lookup(prompt("What does a card cost?"), MODEL)) == "What does a card cost?"


@pytest.mark.row(46)
def test_a_vector_that_comes_too_late_for_the_lookup_serves_the_update(make_cache):
    hanging, seen = Hanging(), []
    cache = make_cache(embeddings=hanging, embed_budget_s=0.05, on_lookup=seen.append)
    assert cache.lookup(prompt("How long may I keep a book?"), MODEL) is None
    assert cache.cache.stats().reasons == {"embedder_slow": 1}
    hanging.go.set()
    cache.wait_for(seen[-1].late)  # the vector arrives while the model answers
    cache.update(prompt("How long may I keep a book?"), MODEL, chat("28"))
    assert text_of(cache.lookup(prompt("How long can I keep a book?"), MODEL)) == "28"


@pytest.mark.row(53)
def test_an_unusable_tenant_bypasses_the_cache(make_cache, caplog):
    from langchain_aegis.scope import seen_config

    cache = make_cache()
    with seen_config({"configurable": {"tenant_id": ""}}):
        cache.update(prompt("Why?"), MODEL, chat("x"))
        assert cache.lookup(prompt("Why?"), MODEL) is None
    assert cache.cache.stats().stored == 0
    assert "bad_identity" in caplog.text


@pytest.mark.row(61)
def test_whatever_goes_wrong_inside_the_call_goes_on(make_cache, monkeypatch, caplog):
    cache = make_cache()
    monkeypatch.setattr(cache.cache._engine, "find", lambda key: 1 / 0)
    monkeypatch.setattr(cache.cache._engine, "update", lambda *a: 1 / 0)
    assert cache.lookup(prompt("canary"), MODEL) is None
    cache.update(prompt("canary"), MODEL, chat("x"))
    assert cache.get_or_generate("canary?", lambda: "made", pipeline="rag") == "made"
    assert "ZeroDivisionError" in caplog.text
    assert "canary" not in caplog.text


async def test_cancelling_a_lookup_cancels_it(redis_url):
    started = asyncio.Event()

    class Never(Words):
        async def aembed_query(self, text):
            started.set()
            await asyncio.Event().wait()

    cache = AegisSemanticCache(
        redis_url, Never(), namespace=f"c{uuid.uuid4().hex[:8]}", op_budget_s=5, embed_budget_s=30
    )
    task = asyncio.create_task(cache.alookup(prompt("How long may I keep a book?"), MODEL))
    await asyncio.wait_for(started.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(asyncio.all_tasks()) == 1 or ((await asyncio.sleep(0)) is None and len(asyncio.all_tasks()) == 1)
    await cache.aclose()


# -- construction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"min_similarity": 0.2}, {"min_similarity": 1.1}, {"min_similarity": True}, {"distance_threshold": 0.7},
        {"min_similarity": 0.9, "distance_threshold": 0.1}, {"mode": "loose"}, {"k": 0}, {"k": True},
        {"guards_off": ["no_such"]}, {"require_tenant": "yes"}, {"scope_ignore": "x"}, {"scope_ignore": ["("]},
        {"bypass": ["("]}, {"ttl_by_task": {"a": 0}}, {"ttl_s": -1}, {"embeddings": "minilm"}, {"redis": object()},
        {"redis_url": "localhost"}, {"namespace": "a{b"}, {"op_budget_s": 0},
    ],
)  # fmt: skip
def test_a_bad_argument_is_refused_with_nothing_connected(bad):
    with pytest.raises(AegisConfigError):
        AegisSemanticCache(**{"min_similarity": None, **bad})


def test_a_distance_is_taken_as_redisvl_counts():
    assert AegisSemanticCache(distance_threshold=0.1)._engine.options.min_similarity == pytest.approx(0.9)


def test_no_argument_is_needed_and_nothing_is_read_or_connected(monkeypatch, home):
    AegisSemanticCache().close()
    assert list(home.iterdir()) == []


def test_a_switched_off_cache_does_nothing(redis_url, monkeypatch):
    monkeypatch.setenv("REDIS_CACHE_ENABLED", "false")
    with AegisSemanticCache(redis_url, Words()) as cache:
        cache.update(prompt("Why?"), MODEL, chat("x"))
        assert cache.lookup(prompt("Why?"), MODEL) is None
        assert cache.stats().misses == 0


# -- judging --------------------------------------------------------------------------------------------------------


async def test_judging_asks_no_redis(tmp_path):
    cache = AegisSemanticCache(f"unix://{tmp_path}/none.sock", Words(), min_similarity=0.6)
    same = cache.judge("How long may I keep a book?", "How long can I keep a book?")
    assert (same.served, same.reasons) == (True, ())
    trap = await cache.ajudge("May I return 3 books at the desk?", "May I return 30 books at the desk?")
    assert (trap.served, trap.reasons) == (False, ("guard:number",))
    assert trap.similarity > 0.6
    far = cache.judge("Why?", "Which branch has a cafe?")
    assert "below_threshold" in far.reasons


def test_judging_without_an_embedder_says_what_to_do():
    cache = AegisSemanticCache(settings=AegisSettings(ollama_base_url="http://127.0.0.1:9", model_embeddings=None))
    cache._engine.embedder._make = lambda: None
    with pytest.raises(AegisConfigError, match="embedder"):
        cache.judge("a?", "b?")


# -- through LangChain ----------------------------------------------------------------------------------------------


class Model(GenericFakeChatModel):
    name_: str = "m"
    messages: object = None
    calls: list  # of what it was asked

    @property
    def _identifying_params(self):
        return {"model": self.name_}

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        from langchain_core.outputs import ChatResult

        self.calls.append(messages)
        message = AIMessage(f"answer {len(self.calls)}", response_metadata={"done_reason": "stop"})
        return ChatResult(generations=[ChatGeneration(message=message)])

    _stream = None


async def test_a_chat_model_is_answered_from_the_cache(redis_url):
    cache = AegisSemanticCache(redis_url, Words(), namespace=f"c{uuid.uuid4().hex[:8]}", min_similarity=0.6)
    model = Model(messages=iter(()), cache=cache, calls=[])
    first = model.invoke("How long may I keep a book?")
    assert (await model.ainvoke("How long may I keep a book?")).content == first.content
    assert (await model.ainvoke("How long can I keep a book?")).content == first.content
    assert model.invoke("What does a card cost?").content != first.content
    assert len(model.calls) == 2
    ids = {(await model.ainvoke("How long may I keep a book?")).id for _ in range(3)}
    assert len(ids) == 3
    await cache.aclose()
    cache.close()
