"""What a user does with a cache besides asking it: every promise of `langchain_aegis.control`, on a real Redis."""

import json

import pytest
from caches import MODEL, Words, chat, prompt, text_of
from conftest import wait_until
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.outputs import Generation

from langchain_aegis import AegisSemanticCache, ChatAegis, aegis_scope, aegis_sources, was_cached
from langchain_aegis.errors import AegisConfigError, AegisOverloadedError
from langchain_aegis.updates import now_ms
from langchain_aegis.writes import the_writer

BOOK, CARD = "How long may I keep a book?", "What does a reader card cost?"
NEAR_BOOK = "How long can I keep a book?"
OTHER_MODEL = MODEL.replace("'m'", "'other'")


def asked(cache, question, llm_string=MODEL):
    return text_of(cache.lookup(prompt(question), llm_string))


def taught(cache, question=BOOK, answer="28 days", llm_string=MODEL):
    assert cache.lookup(prompt(question), llm_string) is None
    cache.update(prompt(question), llm_string, chat(answer))


# -- reports ----------------------------------------------------------------------------------------------------------


def test_a_wrong_hit_is_removed_and_that_pair_is_never_served_again(make_cache):
    cache = make_cache()
    taught(cache)
    (hit,) = cache.lookup(prompt(NEAR_BOOK), MODEL)
    assert cache.report_wrong(hit.message) is True
    assert asked(cache, BOOK) is None, "the entry is gone"
    cache.update(prompt(BOOK), MODEL, chat("28 days, again"))
    assert asked(cache, BOOK) == "28 days, again", "the question itself may be answered anew"
    assert asked(cache, NEAR_BOOK) is None, "but not for the one it was reported for"
    assert cache.cache.stats().reasons["reported"] >= 1


def test_the_pair_holds_the_other_way_round_too(make_cache):
    cache = make_cache()
    taught(cache)
    (hit,) = cache.lookup(prompt(NEAR_BOOK), MODEL)
    cache.report_wrong(was_cached(hit.message)["lookup_id"])
    taught(cache, NEAR_BOOK, "as long as you like")
    assert asked(cache, BOOK) is None


def test_a_report_wins_over_an_answer_that_is_being_made(make_cache):
    first, second = make_cache(namespace="shared"), make_cache(namespace="shared")
    first.clear()
    taught(first)
    (hit,) = first.lookup(prompt(BOOK), MODEL)
    with aegis_scope(cache="refresh"):
        assert second.lookup(prompt(BOOK), MODEL) is None
        first.report_wrong(hit.message)
        second.update(prompt(BOOK), MODEL, chat("of before the report"))
    assert asked(first, BOOK) is None


@pytest.mark.parametrize("bad", ["", "x", 5, None, HumanMessage("no hit"), "A" * 64])
def test_only_hits_of_this_cache_can_be_reported(make_cache, bad):
    with pytest.raises(AegisConfigError, match="report_wrong takes"):
        make_cache().report_wrong(bad)


def test_a_lookup_id_of_another_secret_removes_nothing(make_cache, monkeypatch):
    mine = make_cache(namespace="mine")
    mine.clear()
    taught(mine)
    (hit,) = mine.lookup(prompt(BOOK), MODEL)
    monkeypatch.setenv("AEGIS_SECRET_KEY", "another secret of enough bytes 0123456789")
    with pytest.raises(AegisConfigError):
        make_cache(namespace="theirs").report_wrong(hit.message)


# -- invalidation -----------------------------------------------------------------------------------------------------


def test_invalidation_by_task_and_by_model(make_cache):
    cache = make_cache()
    with aegis_scope(task="chat"):
        taught(cache)
    taught(cache, CARD, "4 euros", OTHER_MODEL)
    assert cache.invalidate(task="chat") == 1
    with aegis_scope(task="chat"):
        assert asked(cache, BOOK) is None
    assert asked(cache, CARD, OTHER_MODEL) == "4 euros"
    assert cache.invalidate(model="other") == 1
    assert asked(cache, CARD, OTHER_MODEL) is None


@pytest.mark.row(62)
def test_invalidation_within_a_tenant_leaves_the_other_tenants(make_cache):
    cache = make_cache()
    for tenant in ("acme", "globex"):
        with aegis_scope(tenant=tenant, task="chat"):
            taught(cache)
    assert cache.invalidate(task="chat", tenant="acme") == 1
    with aegis_scope(tenant="acme", task="chat"):
        assert asked(cache, BOOK) is None
    with aegis_scope(tenant="globex", task="chat"):
        assert asked(cache, BOOK) == "28 days"


@pytest.mark.parametrize("kind", ["task", "model", "older_than_s", "near", "tenant-task"])
def test_an_invalidation_wins_over_an_answer_that_is_being_made(make_cache, kind):
    cache = make_cache()
    with aegis_scope(tenant="acme", task="chat"):
        assert cache.lookup(prompt(BOOK), MODEL) is None
        told = {"task": {"task": "chat"}, "model": {"model": "m"}, "near": {"near": NEAR_BOOK},
                "tenant-task": {"task": "chat", "tenant": "acme"},
                "older_than_s": {"older_than_s": 0}}[kind]  # fmt: skip
        cache.invalidate(**told)
        cache.update(prompt(BOOK), MODEL, chat("of before"))
        assert asked(cache, BOOK) is None


def test_what_is_older_than_told_is_gone(make_cache, monkeypatch):
    cache = make_cache()
    taught(cache)
    from langchain_aegis import engine

    real = engine.now_ms()
    for module in ("engine", "updates"):
        monkeypatch.setattr(f"langchain_aegis.{module}.now_ms", lambda: real + 100_000)
    monkeypatch.setattr("langchain_aegis.control.now_ms", lambda: real + 100_000)
    taught(cache, CARD, "4 euros")
    cache.invalidate(older_than_s=50)
    assert asked(cache, BOOK) is None
    assert asked(cache, CARD) == "4 euros"


def test_what_is_near_a_question_is_gone(make_cache):
    cache = make_cache()
    taught(cache)
    taught(cache, CARD, "4 euros")
    assert cache.invalidate(near=NEAR_BOOK) == 1
    assert asked(cache, BOOK) is None
    assert asked(cache, CARD) == "4 euros"


@pytest.mark.parametrize(
    "bad",
    [{"task": "a", "model": "b"}, {"task": ""}, {"older_than_s": -1}, {"older_than_s": "1"}, {"near": " "}, {}],
    ids=str,
)
def test_an_invalidation_that_is_none_is_refused(make_cache, bad):
    with pytest.raises(AegisConfigError):
        make_cache().invalidate(**bad)


def test_a_refresh_wins_over_an_answer_whose_making_began_before(make_cache):
    slow, quick = make_cache(namespace="refreshed"), make_cache(namespace="refreshed")
    slow.clear()
    assert slow.lookup(prompt(BOOK), MODEL) is None
    with aegis_scope(cache="refresh"):
        assert quick.lookup(prompt(BOOK), MODEL) is None
        quick.update(prompt(BOOK), MODEL, chat("new"))
    slow.update(prompt(BOOK), MODEL, chat("old"))
    assert asked(quick, BOOK) == "new"
    assert asked(quick, NEAR_BOOK) == "new", "a refreshed answer is found by meaning, too"


# -- users ------------------------------------------------------------------------------------------------------------


def test_a_user_who_opts_out_is_served_nothing_and_nothing_of_him_is_kept(make_cache):
    cache = make_cache()
    with aegis_scope(user="bob"):
        taught(cache)
        assert cache.opt_out("bob") == 1
        assert asked(cache, BOOK) is None
        cache.update(prompt(BOOK), MODEL, chat("28 days"))
        assert asked(cache, BOOK) is None
    with aegis_scope(user="eve"):
        taught(cache)
        assert asked(cache, BOOK) == "28 days"
    cache.opt_in("bob")
    with aegis_scope(user="bob"):
        taught(cache)
        assert asked(cache, BOOK) == "28 days"


def test_a_user_who_opted_out_is_not_served_what_others_share_either(make_cache):
    cache = make_cache(share_within_tenant=True)
    cache.opt_out("bob")
    with aegis_scope(tenant="acme", user="eve"):
        taught(cache)
        assert asked(cache, BOOK) == "28 days"
    with aegis_scope(tenant="acme", user="bob"):
        assert asked(cache, BOOK) is None
        assert cache.cache.stats().reasons["opted_out"] == 1


# -- explanations -----------------------------------------------------------------------------------------------------


def test_a_miss_says_which_field_of_the_scope_differs_from_the_nearest(make_cache):
    cache = make_cache(keep_questions=True)
    stamped = [SystemMessage("It is 10:02."), HumanMessage(BOOK)]
    assert cache.lookup(prompt(*stamped), MODEL) is None
    cache.update(prompt(*stamped), MODEL, chat("28 days"))
    told = cache.explain(prompt=[SystemMessage("It is 10:03."), HumanMessage(NEAR_BOOK)], llm_string=MODEL)
    assert (told.decision, told.reasons, told.question) == ("miss", ("no_candidate",), NEAR_BOOK)
    (other,) = told.candidates
    assert other.differing == ("system",)
    assert other.reasons[0] == "other_scope"
    assert other.question == BOOK
    assert all(told.meanings[code] for code in ("no_candidate", "other_scope"))
    assert cache.cache.stats().misses == 1, "an explanation is not counted"


def test_an_explanation_names_the_guard(make_cache):
    cache = make_cache()
    taught(cache, "May I return 3 books at the desk?", "Yes")
    told = cache.explain(prompt=prompt("May I return 30 books at the desk?"), llm_string=MODEL)
    assert told.candidates[0].reasons == ("guard:number",)
    assert told.candidates[0].differing == ()


def test_hits_bypasses_and_lone_questions_are_explained_too(make_cache):
    cache = make_cache(bypass=["secret"])
    taught(cache)
    assert cache.explain(prompt=prompt(BOOK), llm_string=MODEL).decision == "exact"
    hit = cache.explain(prompt=prompt(NEAR_BOOK), llm_string=MODEL)
    assert (hit.decision, hit.reasons, hit.candidates[0].reasons) == ("semantic", (), ())
    assert cache.explain(prompt=prompt("What is the secret?"), llm_string=MODEL).reasons == ("bypass",)
    alone = cache.explain(NEAR_BOOK)
    assert (alone.decision, alone.candidates[0].differing) == ("semantic", None)
    assert cache.explain("Delete my account").decision == "miss"
    assert cache.explain(BOOK, pipeline="faq").decision == "miss"


def test_another_tenants_question_is_not_shown(make_cache):
    cache = make_cache(keep_questions=True)
    with aegis_scope(tenant="acme"):
        taught(cache)
    with aegis_scope(tenant="globex"):
        (other,) = cache.explain(prompt=prompt(BOOK), llm_string=MODEL).candidates
    assert other.differing == ("tenant",)
    assert other.question == ""


@pytest.mark.parametrize("bad", [{}, {"question": ""}, {"prompt": "p"}, {"question": BOOK, "prompt": "p"}], ids=str)
def test_what_to_explain_must_be_said(make_cache, bad):
    with pytest.raises(AegisConfigError):
        make_cache().explain(**bad)


# -- stale answers, negative ones, bounds -----------------------------------------------------------------------------


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


def test_one_caller_renews_a_stale_answer_and_the_others_get_it_marked(make_cache, clock):
    cache, other = (make_cache(namespace="swr", ttl_s=60, stale_while_revalidate_s=60) for _ in range(2))
    cache.clear()
    taught(cache)
    clock(61)
    assert cache.lookup(prompt(BOOK), MODEL) is None, "the first one renews it"
    (old,) = other.lookup(prompt(BOOK), MODEL)
    assert was_cached(old.message)["stale"] is True
    assert other.cache.stats().stale_hits == 1
    assert asked(other, NEAR_BOOK) is None, "a stale answer is for exact repeats"
    cache.update(prompt(BOOK), MODEL, chat("21 days"))
    (new,) = other.lookup(prompt(BOOK), MODEL)
    assert (new.text, was_cached(new.message).get("stale")) == ("21 days", None)
    clock(121)
    assert asked(other, BOOK) is None, "beyond its time"


def test_without_being_told_nothing_stale_is_served(make_cache, clock):
    cache = make_cache(ttl_s=60)
    taught(cache)
    clock(61)
    assert asked(cache, BOOK) is None


def test_a_pipeline_that_fails_is_answered_with_an_old_answer_if_told(make_cache, clock):
    cache, strict = make_cache(ttl_s=60, stale_if_error_s=60), make_cache(ttl_s=60)

    def fails():
        raise OSError("the model is away")

    for one in (cache, strict):
        assert one.get_or_generate(BOOK, lambda: "28 days", pipeline="faq") == "28 days"
    clock(61)
    assert cache.get_or_generate(BOOK, fails, pipeline="faq") == "28 days"
    with pytest.raises(OSError, match="away"):
        strict.get_or_generate(BOOK, fails, pipeline="faq")
    clock(61)
    with pytest.raises(OSError, match="away"):
        cache.get_or_generate(BOOK, fails, pipeline="faq")


def test_answers_that_say_nothing_was_found_live_shorter(make_cache, clock):
    cache = make_cache(negative=["not in the documents"], negative_ttl_s=10)
    taught(cache, BOOK, "That is not in the documents.")
    (hit,) = cache.lookup(prompt(BOOK), MODEL)
    assert was_cached(hit.message)["negative"] is True
    assert asked(cache, NEAR_BOOK) is None, "for exact repeats only"
    clock(11)
    assert asked(cache, BOOK) is None


def test_a_tenant_keeps_what_was_used_last(make_cache):
    cache = make_cache(max_entries_per_tenant=3)
    questions = [f"What does card {name} cost?" for name in ("red", "green", "blue")]
    for question in questions:
        taught(cache, question, question)
        assert the_writer.drain(timeout_s=10)
        used_ms = now_ms()
        wait_until(lambda used_ms=used_ms: now_ms() > used_ms)  # of two uses in one millisecond, neither is the last
    assert asked(cache, questions[0]) == questions[0], "used: no longer the oldest"
    taught(cache, "What does the library own?", "books")
    assert the_writer.drain(timeout_s=10)
    assert [asked(cache, q) for q in questions] == [questions[0], None, questions[2]]


@pytest.mark.row(111)
def test_one_process_generates_while_the_others_wait(make_cache):
    first, second = (make_cache(namespace="lease", lease_s=60, lease_wait_s=0.05) for _ in range(2))
    first.clear()
    assert first.lookup(prompt(BOOK), MODEL) is None
    assert second.lookup(prompt(BOOK), MODEL) is None
    assert second.cache.stats().reasons["lease_wait"] == 1, "it waited in vain, then goes on alone"
    first.update(prompt(BOOK), MODEL, chat("28 days"))
    assert asked(second, BOOK) == "28 days"


# -- second opinions and checks ---------------------------------------------------------------------------------------


def test_a_verifier_decides_in_the_grey_band_and_is_remembered(make_cache):
    opinions = []

    def never(cached, new):
        opinions.append((cached, new))
        return False

    cache = make_cache(verifier=never, verifier_band=(0.6, 1.0))
    taught(cache)
    assert asked(cache, NEAR_BOOK) is None
    assert asked(cache, NEAR_BOOK) is None
    assert opinions == [(BOOK, NEAR_BOOK)], "asked once"
    assert cache.cache.stats().reasons["verifier"] == 2
    agreeing = make_cache(verifier=lambda cached, new: 0.9, verifier_band=(0.6, 1.0))
    taught(agreeing)
    assert asked(agreeing, NEAR_BOOK) == "28 days"


def test_a_verifier_that_fails_costs_the_hit_and_nothing_else(make_cache):
    def broken(cached, new):
        raise RuntimeError

    cache = make_cache(verifier=broken, verifier_band=(0.6, 1.0))
    taught(cache)
    assert asked(cache, NEAR_BOOK) is None
    assert asked(cache, BOOK) == "28 days"


def test_hits_drawn_for_checking_are_misses_and_are_compared(make_cache):
    cache = make_cache(shadow_rate=0.5)
    cache.cache._engine.shadow._draw = lambda: 0.0
    taught(cache)
    assert asked(cache, NEAR_BOOK) is None
    cache.update(prompt(NEAR_BOOK), MODEL, chat("28 days"))
    taught(cache, "What does the red card cost?", "It costs 4 euros.")
    assert asked(cache, "What does the red card cost") is None
    cache.update(prompt("What does the red card cost"), MODEL, chat("It costs 7 euros."))
    checked = cache.cache.stats().checked
    assert (checked.hits, checked.wrong) == (2, 1)


# -- pipelines --------------------------------------------------------------------------------------------------------


def test_a_graph_node_is_answered_from_the_cache(redis_url):
    from langgraph.graph import END, START, StateGraph
    from typing_extensions import TypedDict

    class State(TypedDict, total=False):
        question: str
        answer: str

    runs = []
    with AegisSemanticCache(redis_url, Words(), namespace="node", min_similarity=0.6, op_budget_s=5) as cache:
        cache.clear()

        @cache.node("question", pipeline="faq")
        def answer(state: State) -> State:
            runs.append(state["question"])
            aegis_sources("rules.md")
            return {"answer": f"answer {len(runs)}"}

        graph = StateGraph(State)
        graph.add_node("answer", answer)
        graph.add_edge(START, "answer")
        graph.add_edge("answer", END)
        app = graph.compile()
        answers = [app.invoke({"question": q})["answer"] for q in (BOOK, NEAR_BOOK, CARD)]
        assert answers == ["answer 1", "answer 1", "answer 2"]
        assert cache.invalidate(sources=["rules.md"]) == 2
        assert app.invoke({"question": BOOK})["answer"] == "answer 3"


async def test_a_coroutine_node_and_what_it_depends_on(redis_url):
    async with AegisSemanticCache(redis_url, Words(), namespace="anode", min_similarity=0.6, op_budget_s=5) as cache:
        await cache.aclear()
        runs = []

        @cache.node(lambda s: s["q"], pipeline="faq", depends=lambda s: s.get("audience"))
        async def answer(state):
            runs.append(state)
            return {"a": len(runs)}

        states = [{"q": BOOK}, {"q": BOOK}, {"q": BOOK, "audience": "children"}, {"q": ""}, {"q": None}]
        assert [(await answer(s))["a"] for s in states] == [1, 1, 2, 3, 4]


def test_a_node_with_earlier_messages_is_cached_only_when_told_what_they_decide(make_cache):
    cache = make_cache().cache
    runs = []

    def answer(state):
        runs.append(1)
        return {"n": len(runs)}

    history = [HumanMessage("Hello"), SystemMessage("x"), HumanMessage(BOOK)]
    bare = cache.node("messages", pipeline="a")(answer)
    assert [bare({"messages": history})["n"] for _ in range(2)] == [1, 2]
    told = cache.node("messages", pipeline="b", depends=lambda s: [m.text for m in s["messages"][:-1]])(answer)
    assert [told({"messages": history})["n"] for _ in range(2)] == [3, 3]


# -- carrying ---------------------------------------------------------------------------------------------------------


def test_an_export_can_be_imported_where_it_came_from_but_revives_nothing(make_cache, tmp_path):
    cache = make_cache().cache
    with aegis_scope(tenant="acme", sources=["a.md"]):
        cache.get_or_generate(BOOK, lambda: "28 days", pipeline="faq")
    with aegis_scope(tenant="acme"):
        cache.get_or_generate(CARD, lambda: "4 euros", pipeline="faq")
    path = tmp_path / "answers.jsonl"
    assert cache.export(path) == 2
    assert path.stat().st_mode & 0o077 == 0
    cache.invalidate(sources=["a.md"])
    carried = cache.import_(path)
    with aegis_scope(tenant="acme"):
        assert cache.get_or_generate(CARD, lambda: "new", pipeline="faq") == "4 euros"
        assert cache.get_or_generate(BOOK, lambda: "new", pipeline="faq") == "new"
    assert (carried.taken, dict(carried.left)) == (1, {"invalidated": 1})


def test_an_export_of_another_secret_or_no_export_is_refused(make_cache, tmp_path, monkeypatch):
    cache = make_cache().cache
    cache.get_or_generate(BOOK, lambda: "28 days", pipeline="faq")
    path = tmp_path / "answers.jsonl"
    cache.export(path)
    monkeypatch.setenv("AEGIS_SECRET_KEY", "another secret of enough bytes 0123456789")
    with pytest.raises(AegisConfigError, match="another secret"):
        make_cache(namespace=cache.settings.namespace).cache.import_(path)
    path.write_text("{}\n")
    with pytest.raises(AegisConfigError, match="no export"):
        cache.import_(path)


def test_answers_known_beforehand_are_served(make_cache):
    cache = make_cache().cache
    rows = [{"question": BOOK, "answer": "28 days", "sources": ["a.md"]}, {"question": CARD, "answer": "4 euros"}]
    assert cache.warm(rows, pipeline="faq").taken == 2
    assert cache.get_or_generate(NEAR_BOOK, lambda: "made", pipeline="faq") == "28 days"
    cache.invalidate(sources=["a.md"])
    assert cache.get_or_generate(BOOK, lambda: "made", pipeline="faq") == "made"
    with pytest.raises(AegisConfigError, match="row 1"):
        cache.warm([{"question": BOOK}], pipeline="faq")


def test_entries_tell_their_age_and_size_and_no_text(make_cache):
    cache = make_cache().cache
    with aegis_scope(task="faq"):
        cache.get_or_generate(BOOK, lambda: "28 days", pipeline="faq", sources=["a.md"])
    (entry,) = cache.entries()
    assert (entry.by_meaning, entry.task, entry.sources, entry.question) == (True, "faq", 1, "")
    assert 0 < entry.ttl_s <= 3600
    assert json.dumps(entry.key)


def test_a_plain_generation_may_be_reported_by_its_lookup_id(make_cache):
    """Models that return plain text have no message to carry the mark; `on_lookup` has the keys."""
    seen = []
    cache = make_cache(on_lookup=seen.append)
    assert cache.lookup("What is it?", MODEL) is None
    cache.update("What is it?", MODEL, [Generation(text="a thing")])
    (hit,) = cache.lookup("What is it?", MODEL)
    assert hit.text == "a thing"
    assert cache.report_wrong(seen[-1].lookup_id) is True


# -- texts that are asked again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("repeats", "tiers"), [("serve", "ss"), ("ask", "sm"), ("auto", "sm")])
def test_a_text_in_other_words_is_answered_by_meaning_once(make_cache, repeats, tiers):
    cache = make_cache(repeats=repeats, min_similarity=0.5)
    taught(cache, "How do I purchase a reader card here?", "At the desk")
    other_words = "How do you buy a reader card here?"
    found = [asked(cache, other_words) for _ in range(2)]
    assert "".join("s" if f else "m" for f in found) == tiers
    if repeats != "serve":
        assert cache.cache.stats().reasons["asked_again"] == 1
        cache.update(prompt(other_words), MODEL, chat("At the desk, with a passport"))
        assert asked(cache, other_words) == "At the desk, with a passport"


@pytest.mark.parametrize(
    "text",
    ["How can I buy reader cards?", "How do I purchase reader cards?", "Please, how do I purchase the reader card?"],
)
def test_a_text_in_hardly_other_words_is_answered_by_meaning_each_time(make_cache, text):
    """Words such as "the" and "can", inflection and synonyms: there is nothing that the guards could have missed."""
    cache = make_cache(min_similarity=0.5)
    taught(cache, "How do I purchase the reader card?" if "the" in text else "How do I purchase reader cards?", "Here")
    assert [asked(cache, text) for _ in range(3)] == ["Here"] * 3


def test_explaining_does_not_count_as_asking(make_cache):
    cache = make_cache(repeats="ask")
    taught(cache)
    assert cache.explain(prompt=prompt(NEAR_BOOK), llm_string=MODEL).decision == "semantic"
    assert asked(cache, NEAR_BOOK) == "28 days"


# -- ChatAegis and a server that fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
@pytest.mark.parametrize("invalidated", [False, True])
async def test_a_chat_model_that_fails_is_answered_with_an_old_answer_if_told(
    redis_url, server, clock, monkeypatch, way, invalidated
):
    async with AegisSemanticCache(
        redis_url, Words(), namespace="failing", min_similarity=0.6, op_budget_s=5, ttl_s=60, stale_if_error_s=60
    ) as cache:
        await cache.aclear()
        model = ChatAegis(model="m", base_url=server.base_url, cache=cache)

        async def ask():
            return await model.ainvoke(BOOK) if way == "ainvoke" else model.invoke(BOOK)

        fresh = await ask()
        assert was_cached(fresh) is None
        clock(61)
        server.fail(503, times=None)
        if invalidated:  # after the lookup, while the model is asked
            name = "_agenerate" if way == "ainvoke" else "_generate"
            real = getattr(ChatAegis, name)

            def meanwhile(*args, **kwargs):
                cache.invalidate(model="m")
                return real(*args, **kwargs)

            monkeypatch.setattr(ChatAegis, name, meanwhile)
            with pytest.raises(AegisOverloadedError):
                await ask()
        else:
            old = await ask()
            assert (old.text, was_cached(old)["stale"]) == (fresh.text, True)
            clock(61)
            with pytest.raises(AegisOverloadedError):
                await ask()
