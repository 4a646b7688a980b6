"""Promises that are easily broken where parts of the cache meet: stale, wrong or foreign answers, and broken calls."""

import asyncio
import copy
import pickle
import threading
import uuid

import pytest
from caches import MODEL, Words, chat, prompt, text_of
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.outputs import ChatGeneration, Generation

from langchain_aegis import AegisSemanticCache, aegis_scope
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.results import Answer
from langchain_aegis.writes import the_writer

BOOK, CARD = "How long may I keep a book?", "What does a reader card cost?"
NEAR_BOOK = "How long can I keep a book?"


def asked(cache, question, llm_string=MODEL):
    return text_of(cache.lookup(prompt(question), llm_string))


def taught(cache, question=BOOK, answer="28 days", llm_string=MODEL):
    assert cache.lookup(prompt(question), llm_string) is None
    cache.update(prompt(question), llm_string, chat(answer))


@pytest.fixture
def clock(monkeypatch):
    """Moves the time that the cache sees."""
    from langchain_aegis import engine

    start, moved = engine.now_ms(), [0]
    for name in ("engine", "updates", "control", "explain", "transfer"):
        monkeypatch.setattr(f"langchain_aegis.{name}.now_ms", lambda: start + moved[0])

    def move(seconds):
        moved[0] += int(seconds * 1000)

    return move


# -- wrong answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [{"verifier_band": (0.55, 0.6), "min_similarity": 0.99}, {"min_similarity": 0.99}])
def test_nothing_below_the_threshold_is_served_without_the_verifiers_consent(make_cache, told):
    """The band may end below the threshold: what lies between is asked about too."""
    asked_for = []

    def never(cached, new):
        asked_for.append(new)
        return False

    cache = make_cache(verifier=never, **told)
    taught(cache, "How long may I keep a very old and rare and heavy book about the history of this town here?")
    assert (
        asked(cache, "How long can I keep a very old and rare and heavy book about the history of this town here?")
        is None
    )
    assert cache.cache.stats().semantic_hits == 0


@pytest.mark.parametrize("info", [{"finish_reason": "length"}, {"done_reason": "length"}, {"done": False}])
def test_a_cut_answer_of_a_plain_language_model_is_not_kept(make_cache, info):
    cache = make_cache()
    assert cache.lookup("What is it?", MODEL) is None
    cache.update("What is it?", MODEL, [Generation(text="a thi", generation_info=info)])
    assert cache.lookup("What is it?", MODEL) is None
    cache.update("What is it?", MODEL, [Generation(text="a thing", generation_info={"finish_reason": "stop"})])
    assert text_of(cache.lookup("What is it?", MODEL)) == "a thing"


def test_an_answer_that_is_cut_by_any_of_its_descriptions_is_not_kept(make_cache):
    cache = make_cache()
    message = AIMessage("28 d", response_metadata={"finish_reason": "stop"})
    assert asked(cache, BOOK) is None
    cache.update(prompt(BOOK), MODEL, [ChatGeneration(message=message, generation_info={"finish_reason": "length"})])
    assert asked(cache, BOOK) is None


@pytest.mark.parametrize("prompts", [[f"Prompt {n}" for n in range(40)], ["The same"] * 3], ids=["many", "repeated"])
def test_an_invalidation_wins_over_every_prompt_of_one_call(make_cache, prompts):
    """LangChain's plain language models look all prompts of a call up first, and store all answers at its end."""
    cache = make_cache(namespace="batch")
    cache.clear()
    for text in prompts:
        assert cache.lookup(text, MODEL) is None
    make_cache(namespace="batch").invalidate(model="m")
    for text in prompts:
        cache.update(text, MODEL, [Generation(text="of before")])
    assert [text for text in prompts if cache.lookup(text, MODEL) is not None] == []


def test_more_prompts_than_are_kept_in_mind_are_still_not_stored_outdated(make_cache, monkeypatch):
    monkeypatch.setattr("langchain_aegis.stamps._KEPT", 3)
    cache = make_cache()
    prompts = [f"Prompt {n}" for n in range(60)]
    for text in prompts:
        assert cache.lookup(text, MODEL) is None
    cache.invalidate(model="m")
    for text in prompts:
        cache.update(text, MODEL, [Generation(text="of before")])
    assert [text for text in prompts if cache.lookup(text, MODEL) is not None] == []


def test_an_answer_is_not_kept_for_another_than_the_one_who_asked(make_cache):
    cache = make_cache()
    with aegis_scope(tenant="acme"):
        assert asked(cache, BOOK) is None
    with aegis_scope(tenant="globex"):
        cache.update(prompt(BOOK), MODEL, chat("28 days"))
        assert asked(cache, BOOK) is None


def test_a_stale_answer_that_is_invalidated_meanwhile_does_not_stand_in_for_a_failure(make_cache, clock):
    cache = make_cache(ttl_s=60, stale_if_error_s=600)
    cache.get_or_generate(BOOK, lambda: "28 days", pipeline="faq")
    clock(61)

    def fails():
        cache.cache.invalidate(model="pipeline:faq")
        raise OSError("the model is away")

    with pytest.raises(OSError, match="away"):
        cache.get_or_generate(BOOK, fails, pipeline="faq")


def test_a_call_that_lost_its_tenant_is_given_no_stale_answer_either(make_cache, clock):
    cache, other = (make_cache(namespace="lost", ttl_s=60, stale_if_error_s=600) for _ in range(2))
    cache.clear()
    cache.get_or_generate(BOOK, lambda: "28 days", pipeline="faq")
    from langchain_aegis import nesting

    with aegis_scope(tenant="acme"):
        cache.get_or_generate(CARD, lambda: "4 euros", pipeline="faq")
    assert the_writer.drain(timeout_s=10)  # another process learns of the tenant once its answer is stored
    other.cache._engine._named_before = nesting.tenants_named()  # another process: it has seen no tenant
    clock(61)

    def fails():
        raise OSError("the model is away")

    with pytest.raises(OSError, match="away"):
        other.get_or_generate(BOOK, fails, pipeline="faq")


def test_an_answer_made_of_a_stale_one_is_not_kept_as_a_fresh_one(make_cache):
    cache = make_cache().cache
    old = AIMessage("28 days", response_metadata={"done_reason": "stop", "aegis_cache": {"stale": True}})
    cache.get_or_generate(BOOK, lambda: {"answer": old}, pipeline="faq")
    assert cache.get_or_generate(BOOK, lambda: "made anew", pipeline="faq") == "made anew"


def test_an_answer_that_says_nothing_was_found_is_kept_no_longer_than_told(make_cache, clock):
    cache = make_cache(negative=["not in"], negative_ttl_s=60)
    with aegis_scope(ttl_s=5):
        taught(cache, BOOK, "That is not in the documents.")
    clock(6)
    assert asked(cache, BOOK) is None


def test_a_renewed_answer_is_found_by_meaning_as_the_old_one_was(make_cache, clock):
    cache = make_cache(ttl_s=60, stale_while_revalidate_s=60)
    taught(cache)
    clock(61)
    taught(cache, BOOK, "21 days")
    assert asked(cache, NEAR_BOOK) == "21 days"


@pytest.mark.parametrize("ttl_s", [1e15, 1e300])
def test_a_time_to_live_beyond_all_bounds_is_cut(make_cache, redis_url, ttl_s):
    import redis

    cache = make_cache()
    with aegis_scope(ttl_s=ttl_s):
        taught(cache)
        assert asked(cache, BOOK) == "28 days"
    with redis.Redis.from_url(redis_url) as client:
        (name,) = client.keys(f"{cache.cache.settings.namespace}:*:e:*")
        assert client.ttl(name) > 0


# -- nodes and pipelines ----------------------------------------------------------------------------------------------


def counting(made):
    runs = []

    def node(state):
        runs.append(1)
        return made if made is not None else {"n": len(runs)}

    return node


def test_a_node_does_not_take_a_question_with_a_picture_for_the_question_alone(make_cache):
    cache = make_cache().cache
    node = cache.node("messages", pipeline="look", depends=lambda s: "")(counting(None))

    def state(picture):
        blocks = [{"type": "text", "text": BOOK}, {"type": "image_url", "image_url": {"url": picture}}]
        return {"messages": [HumanMessage(blocks)]}

    assert [node(state(url))["n"] for url in ("data:a", "data:b")] == [1, 2]


@pytest.mark.parametrize("pair", [({1: "a"}, {"1": "a"}), ({"a": {2: 1}}, {"a": {"2": 1}}), ([True], [1])], ids=str)
def test_states_that_differ_share_nothing(make_cache, pair):
    cache = make_cache().cache
    node = cache.node("q", pipeline="p", depends=lambda s: s["on"])(counting(None))
    assert [node({"q": BOOK, "on": on})["n"] for on in pair] == [1, 2]


def test_a_tuple_may_say_what_a_node_depends_on(make_cache):
    cache = make_cache().cache
    node = cache.node("q", pipeline="p", depends=lambda s: (s["a"], None))(counting(None))
    assert [node({"q": BOOK, "a": a})["n"] for a in (1, 1, 2)] == [1, 1, 2]


@pytest.mark.parametrize("told", ["question", "depends", "sources"])
@pytest.mark.parametrize("awaited", [False, True])
async def test_a_rule_of_a_node_that_raises_does_not_break_the_node(redis_url, told, awaited):
    def broken(_):
        raise KeyError("no such field")

    rules = {"question": "q", told: broken}
    async with AegisSemanticCache(redis_url, Words(), namespace=f"c{uuid.uuid4().hex[:8]}", op_budget_s=5) as cache:
        runs = []

        def work(state):
            runs.append(1)
            return {"n": len(runs)}

        async def awork(state):
            return work(state)

        node = cache.node(pipeline="p", **rules)(awork if awaited else work)
        results = [await node({"q": BOOK}) if awaited else node({"q": BOOK}) for _ in range(2)]
        assert [r["n"] for r in results] == [1, 2], "and nothing is kept whose sources are not known"


@pytest.mark.parametrize("sources", ["a.md", None, 5, [""], [5]], ids=repr)
def test_an_answer_with_sources_that_are_none_is_returned_and_not_kept(make_cache, sources):
    cache = make_cache()
    made = [cache.get_or_generate(BOOK, lambda n=n: Answer(n, sources=sources), pipeline="p") for n in "ab"]
    assert made == ["a", "b"]


@pytest.mark.parametrize("told", [{"version": 2}, {"generate": "28 days"}], ids=",".join)
def test_a_pipelines_wrong_argument_is_said_at_once(make_cache, told):
    told = {"generate": lambda: "28 days", "pipeline": "p", **told}
    with pytest.raises(AegisConfigError):
        make_cache().get_or_generate(BOOK, **told)


async def test_whatever_a_blocking_function_raises_reaches_who_awaits_it(redis_url):
    """asyncio cannot carry StopIteration out of a thread: the caller would wait for ever."""
    async with AegisSemanticCache(redis_url, Words(), namespace=f"c{uuid.uuid4().hex[:8]}", op_budget_s=5) as cache:
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(cache.aget_or_generate(BOOK, lambda: next(iter(())), pipeline="p"), 10)


def test_who_fails_to_make_an_answer_lets_the_others_go_on(make_cache):
    first, second = (make_cache(namespace="failing", lease_s=60, lease_wait_s=30) for _ in range(2))
    first.clear()

    def fails():
        raise OSError("the model is away")

    with pytest.raises(OSError, match="away"):
        first.get_or_generate(BOOK, fails, pipeline="p")
    assert second.get_or_generate(BOOK, lambda: "28 days", pipeline="p") == "28 days"
    assert "lease_wait" not in second.cache.stats().reasons
    assert second.cache.stats().lookup_s["miss"].largest < 20


def test_what_a_pipelines_hit_saves_is_counted(make_cache):
    usage = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}
    made = AIMessage("28 days", response_metadata={"done_reason": "stop"}, usage_metadata=usage)
    cache = make_cache()
    for _ in range(2):
        cache.get_or_generate(BOOK, lambda: made, pipeline="p")
    assert cache.cache.stats().saved.output_tokens == 4


# -- looking and correcting -------------------------------------------------------------------------------------------


def test_a_question_alone_shows_no_other_tenants_questions(make_cache):
    cache = make_cache(keep_questions=True)
    with aegis_scope(tenant="acme", user="ann"):
        taught(cache)
        assert [c.question for c in cache.explain(NEAR_BOOK).candidates] == [BOOK]
    for other in ({"tenant": "globex"}, {"tenant": "acme", "user": "bob"}):
        with aegis_scope(**other):
            assert [c.question for c in cache.explain(NEAR_BOOK).candidates] == [""]
    assert [c.question for c in cache.explain(NEAR_BOOK).candidates] == [""]


def test_explaining_leaves_no_verdict_behind(make_cache, redis_url):
    import redis

    cache = make_cache(verifier=lambda cached, new: True, verifier_band=(0.6, 1.0))
    taught(cache)
    assert cache.explain(prompt=prompt(NEAR_BOOK), llm_string=MODEL).decision == "semantic"
    with redis.Redis.from_url(redis_url) as client:
        assert client.keys(f"{cache.cache.settings.namespace}:{{p00}}:b*") == []


def test_an_explanation_knows_that_the_namespace_asks_for_tenants(make_cache):
    from langchain_aegis import nesting

    cache, other = (make_cache(namespace="asks") for _ in range(2))
    cache.clear()
    taught(cache)
    with aegis_scope(tenant="acme"):
        taught(cache)
    assert the_writer.drain(timeout_s=10)  # another process learns of the tenant once its answer is stored
    other.cache._engine._named_before = nesting.tenants_named()  # another process: it has seen no tenant
    told = other.explain(prompt=prompt(BOOK), llm_string=MODEL)
    assert (told.decision, told.reasons) == ("miss", ("no_tenant",))
    assert asked(other, BOOK) is None


def test_sources_may_be_named_by_a_generator(make_cache):
    cache = make_cache()
    with aegis_scope(sources=["a.md"]):
        taught(cache)
    assert cache.invalidate(sources=(name for name in ["a.md"])) == 1
    assert asked(cache, BOOK) is None


def test_sources_that_are_none_cannot_be_invalidated(make_cache):
    with pytest.raises(AegisConfigError):
        make_cache().invalidate(sources=5)


def test_a_verifier_that_is_late_is_asked_once_for_a_question(make_cache):
    asked_for = []

    def broken(cached, new):
        asked_for.append(cached)
        raise OSError

    cache = make_cache(verifier=broken, verifier_band=(0.5, 1.0))
    for question in (BOOK, "How long may I keep my book?", "How long may I keep the book?"):
        taught(cache, question)
        asked_for.clear()
    assert asked(cache, NEAR_BOOK) is None
    assert len(asked_for) == 1


# -- carrying ---------------------------------------------------------------------------------------------------------


def test_an_export_of_another_namespace_is_refused(make_cache, tmp_path):
    one, other = make_cache().cache, make_cache().cache
    one.get_or_generate(BOOK, lambda: "28 days", pipeline="faq")
    one.export(tmp_path / "answers")
    with pytest.raises(AegisConfigError, match="namespace"):
        other.import_(tmp_path / "answers")


def test_an_import_replaces_no_younger_answer(make_cache, tmp_path, clock):
    cache = make_cache().cache
    cache.get_or_generate(BOOK, lambda: "28 days", pipeline="faq")
    cache.export(tmp_path / "answers")
    clock(10)
    cache.clear()
    cache.get_or_generate(BOOK, lambda: "21 days", pipeline="faq")
    lines = (tmp_path / "answers").read_text()
    cache._engine.store  # noqa: B018
    with pytest.MonkeyPatch.context() as patch:  # as if it came from another Redis
        patch.setattr("langchain_aegis.transfer._from_here", lambda record, epochs: False)
        carried = cache.import_(tmp_path / "answers")
    assert cache.get_or_generate(BOOK, lambda: "new", pipeline="faq") == "21 days"
    assert (carried.taken, sum(carried.left.values())) == (0, 1)
    assert lines


def test_an_export_is_its_owners_alone_also_over_an_older_file(make_cache, tmp_path):
    path = tmp_path / "answers"
    path.write_text("older")
    path.chmod(0o644)
    cache = make_cache().cache
    cache.get_or_generate(BOOK, lambda: "28 days", pipeline="faq")
    cache.export(path)
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "junk", [b"\xff\xfe\n", b"[" * 100_000 + b"\n", b'{"v": 1}\n', b"\n"], ids=["bytes", "deep", "v", ""]
)
def test_junk_in_a_file_is_left_out(make_cache, tmp_path, junk):
    path = tmp_path / "answers"
    cache = make_cache().cache
    cache.get_or_generate(BOOK, lambda: "28 days", pipeline="faq")
    cache.export(path)
    path.write_bytes(path.read_bytes() + junk)
    assert dict(cache.import_(path).left)["rejected"] == 1


# -- its life ---------------------------------------------------------------------------------------------------------


def test_a_model_that_holds_a_cache_can_be_copied_and_says_why_it_cannot_be_pickled(redis_url):
    with AegisSemanticCache(redis_url, Words()) as cache:
        assert copy.deepcopy({"cache": cache})["cache"] is cache
        assert copy.copy(cache) is cache
        with pytest.raises(TypeError, match="in each process"):
            pickle.dumps(cache)


async def test_long_prompts_are_read_off_the_event_loop_with_the_callers_context(redis_url):
    """What a rule of the user's sees there is his own call; what the lookup leaves behind reaches the update."""
    seen = []

    def rule(text):
        from langchain_aegis.scope import current

        seen.append((threading.current_thread() is threading.main_thread(), current().tenant))
        return False

    long = prompt(SystemMessage("A long text. " * 1000), HumanMessage(BOOK))
    namespace = f"c{uuid.uuid4().hex[:8]}"
    async with AegisSemanticCache(redis_url, Words(), namespace=namespace, bypass=rule, op_budget_s=5) as cache:
        with aegis_scope(tenant="acme"):
            assert await cache.alookup(long, MODEL) is None
            await cache.ainvalidate(tenant="acme")
            await cache.aupdate(long, MODEL, chat("of before"))
            assert await cache.alookup(long, MODEL) is None
            await cache.aupdate(long, MODEL, chat("28 days"))
            assert text_of(await cache.alookup(long, MODEL)) == "28 days"
        await cache.alookup(prompt(BOOK), MODEL)
    assert {tenant for _, tenant in seen[:-1]} <= {"acme"}
    assert not any(on_loop for on_loop, _ in seen[:3])


async def test_a_users_busy_threads_do_not_hold_a_lookup_up(redis_url):
    release = threading.Event()
    async with AegisSemanticCache(redis_url, Words(), namespace=f"c{uuid.uuid4().hex[:8]}", op_budget_s=5) as cache:
        busy = [asyncio.ensure_future(asyncio.to_thread(release.wait, 30)) for _ in range(64)]
        try:
            long = prompt(SystemMessage("A long text. " * 1000), HumanMessage(BOOK))
            assert await asyncio.wait_for(cache.alookup(long, MODEL), 10) is None
        finally:
            release.set()
            await asyncio.gather(*busy)


def test_a_check_of_answers_waits_for_the_embedder_no_longer_than_told(make_cache):
    stuck = threading.Event()

    class Stuck(Words):
        def embed_documents(self, texts):
            stuck.wait(20)
            return super().embed_documents(texts)

    cache = make_cache(embeddings=Stuck(), shadow_rate=0.5)
    cache.cache._engine.shadow._draw = lambda: 0.0
    taught(cache)
    assert asked(cache, NEAR_BOOK) is None
    cache.update(prompt(NEAR_BOOK), MODEL, chat("As long as you like to keep it."))
    assert not stuck.is_set()
    assert asked(cache, NEAR_BOOK) == "As long as you like to keep it."
    stuck.set()


async def coroutine_rule(*_):
    return True


@pytest.mark.parametrize(
    "bad",
    [
        {"ttl_by_task": {"a": "x"}}, {"ttl_by_task": {"a": float("nan")}}, {"ttl_by_task": [1]},
        {"ttl_by_task": {"a": True}},
        {"guards_off": 5}, {"verifier_band": 5}, {"verifier_band": ("a", "b")}, {"verifier_band": (0.9, 0.8)},
        {"distance_threshold": "x"}, {"scope_ignore": 5}, {"find_question": 5}, {"on_lookup": "x"}, {"labels": ["q"]},
        {"chunks": 5}, {"chunks": "("}, {"compare_answers": 5}, {"bypass": 5}, {"negative": 5}, {"negative": "x"},
        {"bypass": coroutine_rule}, {"negative": coroutine_rule}, {"compare_answers": coroutine_rule},
        {"on_lookup": coroutine_rule}, {"find_question": coroutine_rule}, {"verifier": 5}, {"verifier_budget_s": 0},
        {"shadow_rate": None}, {"shadow_rate": 0.6}, {"negative_ttl_s": None}, {"negative_ttl_s": 0}, {"lease_s": None},
        {"lease_s": -1}, {"lease_wait_s": "x"}, {"stale_if_error_s": float("inf")}, {"stale_while_revalidate_s": None},
        {"max_entries_per_tenant": 0}, {"max_entries_per_tenant": 1.5}, {"repeats": "never"}, {"ttl_s": "5"},
        {"ttl_s": float("inf")}, {"op_budget_s": "x"}, {"max_entry_bytes": "1"}, {"embed_budget_s": []},
        {"namespace": 5}, {"dry_run": "no"}, {"share_within_tenant": "no"}, {"keep_questions": 1},
        {"allow_unnamed_models": "no"}, {"redis_kwargs": 5}, {"settings": {"ttl_s": 1}}, {"redis_url": 5},
    ],
    ids=",".join,
)  # fmt: skip
def test_a_bad_argument_is_said_before_anything_is_connected(bad):
    with pytest.raises(AegisConfigError):
        AegisSemanticCache(**bad)


# -- users, checks, faults --------------------------------------------------------------------------------------------


def test_who_opts_out_takes_his_answers_from_those_he_shared_them_with(make_cache):
    cache = make_cache(share_within_tenant=True)
    with aegis_scope(tenant="acme", user="bob"):
        taught(cache)
    with aegis_scope(tenant="acme", user="eve"):
        assert asked(cache, BOOK) == "28 days"
    with aegis_scope(tenant="acme", user="eve"):  # another call: what it makes does not rest on the answer above
        taught(cache, CARD, "4 euros")
    assert cache.opt_out("bob") == 1
    with aegis_scope(tenant="acme", user="eve"):
        assert asked(cache, BOOK) is None
        assert asked(cache, NEAR_BOOK) is None
        assert asked(cache, CARD) == "4 euros"
    with aegis_scope(tenant="acme", user="bob"):
        assert asked(cache, CARD) is None
        cache.update(prompt(CARD), MODEL, chat("5 euros"))
    with aegis_scope(tenant="acme", user="eve"):
        assert asked(cache, CARD) == "4 euros"


def test_what_is_only_observed_brings_no_sources_along(make_cache):
    cache, watched = (make_cache(namespace="observed", dry_run=dry) for dry in (False, True))
    cache.clear()
    with aegis_scope(sources=["a.md"]):
        taught(cache)
    with aegis_scope(sources=["b.md"]):
        taught(watched, BOOK, "21 days")
    cache.invalidate(sources=["a.md"])
    assert asked(cache, BOOK) == "21 days"


def test_an_explanation_survives_a_redis_that_refuses_to_search(make_cache, monkeypatch):
    from redis.exceptions import ResponseError

    cache = make_cache()
    taught(cache)

    def refuses(*_, **__):
        raise ResponseError("NOPERM")
        yield

    monkeypatch.setattr(cache.cache._engine.store, "nearest_anywhere", refuses)
    assert cache.explain(prompt=prompt(CARD), llm_string=MODEL).decision == "miss"
    assert cache.explain(NEAR_BOOK).reasons == ("redis_down",)
    with pytest.raises(AegisConfigError, match="chat model"):
        cache.explain(prompt=prompt(CARD), model=5)


@pytest.mark.parametrize("rule", ["bypass", "negative", "on_lookup", "compare_answers", "find_question", "chunks"])
def test_a_rule_of_the_users_that_raises_breaks_no_call(make_cache, rule):
    def broken(*_):
        raise StopIteration

    cache = make_cache(**{rule: broken}, shadow_rate=0.5)
    cache.cache._engine.shadow._draw = lambda: 0.0
    for question in (BOOK, NEAR_BOOK, BOOK):
        cache.lookup(prompt(question), MODEL)
        cache.update(prompt(question), MODEL, chat("28 days"))
    assert cache.get_or_generate(BOOK, lambda: "28 days", pipeline="p") == "28 days"


def test_the_lease_of_an_answer_that_is_not_kept_is_given_back(make_cache):
    first, second = (make_cache(namespace="unkept", lease_s=60, lease_wait_s=30) for _ in range(2))
    first.clear()
    assert first.get_or_generate(BOOK, object, pipeline="p") is not None
    assert second.get_or_generate(BOOK, lambda: "28 days", pipeline="p") == "28 days"
    assert "lease_wait" not in second.cache.stats().reasons
