"""Another question, model, option, history or tenant has another key; the same call always has the same."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage

from langchain_aegis.keys import Declined, Keyring, Who, read_fields, written_fields
from langchain_aegis.model_parts import parse_llm_string
from langchain_aegis.questions import Labels

SECRET = b"0123456789abcdef0123456789abcdef"
MODEL = "[('_type', 'chat'), ('model', 'm:1'), ('stop', None), ('temperature', 0.0)]"
RING = Keyring(SECRET)


def key(*messages, llm=MODEL, who=None, question=None, ring=RING):
    return ring.for_prompt(dumps(list(messages)), llm, who or Who(), question)


BASE = (SystemMessage("You support a library."), HumanMessage("How long may I keep a book?"))


@pytest.mark.row(54)
def test_a_key_is_hex_and_holds_no_text():
    found = key(*BASE, who=Who(tenant="acme", user="alice", task="chat"))
    for digest in (found.exact, found.scope):
        assert len(digest) == 32
        assert set(digest) <= set(string.hexdigits.lower())
    assert not any(word in " ".join(found.things) for word in ("acme", "alice", "chat"))


@pytest.mark.parametrize(
    "changed",
    [
        {"llm": MODEL.replace("m:1", "m:2")},
        {"llm": MODEL.replace("0.0", "0.7")},
        {"llm": MODEL.replace("None", "['X']")},
        {"who": Who(tenant="a")},
        {"who": Who(user="a")},
        {"who": Who(task="a")},
        {"ring": Keyring(SECRET, namespace="other")},
        {"ring": Keyring(b"another secret of 32 bytes length")},
    ],
)
@pytest.mark.row(49)
def test_model_option_tenant_user_and_task_change_both_keys(changed):
    base, other = key(*BASE), key(*BASE, **changed)
    assert base.exact != other.exact
    assert base.scope != other.scope


@pytest.mark.row(49)
def test_system_and_history_change_the_scope_and_the_question_does_not():
    base = key(*BASE)
    assert key(SystemMessage("Be rude."), BASE[1]).scope != base.scope
    assert key(BASE[0], HumanMessage("Hello?"), AIMessage("Hi."), BASE[1]).scope != base.scope
    assert key(BASE[0], HumanMessage("How long may I keep a book?", name="bob")).scope != base.scope
    other = key(BASE[0], HumanMessage("What does a card cost?"))
    assert (other.scope == base.scope, other.exact == base.exact) == (True, False)


texts = st.text(max_size=30)


@given(
    st.tuples(*[st.one_of(st.none(), texts.filter(str.strip))] * 3),
    st.tuples(*[st.one_of(st.none(), texts.filter(str.strip))] * 3),
)
@pytest.mark.row(42, 54, 55)
def test_no_two_identities_share_a_key(one, two):
    def of(i):
        return key(*BASE, who=Who(tenant=i[0], user=i[1], task=i[2]))

    assert (of(one).exact == of(two).exact) == (one == two)
    assert (of(one).scope == of(two).scope) == (one == two)


@given(st.lists(st.sampled_from(["a", "b", "", "\0", "ab", "é", "e\u0301", "A", "a,b", "a|b"]), max_size=4), st.data())
@pytest.mark.row(42)
def test_no_two_conversations_share_a_key(parts, data):
    other = data.draw(
        st.lists(st.sampled_from(["a", "b", "", "\0", "ab", "é", "e\u0301", "A", "a,b", "a|b"]), max_size=4)
    )
    one = key(*[HumanMessage(p) for p in parts], HumanMessage("Why?"))
    two = key(*[HumanMessage(p) for p in other], HumanMessage("Why?"))
    assert (one.exact == two.exact) == (parts == other)


def test_a_question_in_a_long_prompt_is_found_and_all_around_it_is_scope():
    prompt = "Answer from the context.\n\nContext:\nLoans run for {days} days.\n\nQuestion: {question}\n\nAnswer:"
    one = key(HumanMessage(prompt.format(days=28, question="How long may I keep a book?")))
    two = key(HumanMessage(prompt.format(days=28, question="How long can I keep a book?")))
    other_context = key(HumanMessage(prompt.format(days=14, question="How long may I keep a book?")))
    assert one.question == "How long may I keep a book?"
    assert one.scope == two.scope != other_context.scope


def test_a_marked_question_is_cut_out_verbatim():
    prompt = "Here are the rules ... and now tell me: what does a card cost? Thanks."
    marked = key(HumanMessage(prompt), question="what does a card cost?")
    assert marked.question == "what does a card cost?"
    assert (
        marked.scope != key(HumanMessage(prompt.replace("Thanks", "Please")), question="what does a card cost?").scope
    )


def test_own_rule_for_the_question():
    ring = Keyring(SECRET, find_question=lambda text: (text.index("Q>") + 2, len(text)) if "Q>" in text else None)
    found = key(HumanMessage("context Q> how high is it? "), ring=ring)
    assert found.question == "how high is it?"
    assert key(HumanMessage("how high is it?"), ring=ring).exact_only == "no_question"


def test_users_of_a_tenant_share_only_when_told():
    ring = Keyring(SECRET, share_within_tenant=True)
    a, b = (key(*BASE, who=Who(tenant="t", user=u), ring=ring) for u in "ab")
    assert (a.exact, a.scope) == (b.exact, b.scope)
    assert key(*BASE, who=Who(tenant="t2", user="a"), ring=ring).scope != a.scope


def test_told_patterns_outside_the_question_do_not_matter():
    ring = Keyring(SECRET, scope_ignore=[r"\d{4}-\d{2}-\d{2}"])
    a, b = (key(SystemMessage(f"Day: 2026-11-{d}"), BASE[1], ring=ring) for d in ("01", "02"))
    assert a.scope == b.scope
    assert a.exact == b.exact


@pytest.mark.parametrize(
    ("messages", "llm", "reason"),
    [
        (BASE, MODEL.replace("('stop'", "('tools', [{'name': 'f'}]), ('stop'"), "tools"),
        (BASE, MODEL.replace("('_type'", "('format', 'json'), ('_type'"), "structured_output"),
        (BASE, "something else", "opaque_model"),
        ((*BASE, AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}]), ToolMessage("x", tool_call_id="1"),
          BASE[1]), MODEL, "tools"),
        ((HumanMessage([{"type": "image_url", "image_url": {"url": "data:,A"}}]),), MODEL, "media"),
        ((*BASE, AIMessage("Well")), MODEL, "no_question"),
        ((SystemMessage("Translate into German."), BASE[1]), MODEL, "not_a_question"),
    ],
)  # fmt: skip
def test_what_is_answered_on_an_exact_repeat_only_says_why(messages, llm, reason):
    found = key(*messages, llm=llm)
    assert (found.exact_only, found.scope, found.question) == (reason, "", None)


def test_a_model_without_a_name_is_declined_unless_told():
    unnamed = "[('_type', 'chat-ollama'), ('stop', None)]"
    assert key(*BASE, llm=unnamed) == Declined("unnamed_model")
    allowed = key(*BASE, llm=unnamed, ring=Keyring(SECRET, allow_unnamed_models=True))
    assert allowed.question == "How long may I keep a book?"


def test_the_forms_of_a_model_that_langchain_writes():
    assert parse_llm_string("[('_type', 'x'), ('model_name', 'gpt')]").name == "gpt"
    assert parse_llm_string('{"id": [], "kwargs": {"model_name": "gpt"}, "lc": 1}---[(\'stop\', None)]').name == "gpt"
    assert parse_llm_string('aegis/1 {"model":"m:latest"}').name == "m:latest"
    assert parse_llm_string('aegis/1 {"model":"m:latest","tools":[1]}').exact_only == "tools"
    with_object = "[('_type', 'x'), ('callbacks', <object at 0x7f>), ('model', 'm'), ('tools', [<f>])]"
    assert (parse_llm_string(with_object).name, parse_llm_string(with_object).exact_only) == ("m", "tools")


def test_pipelines_and_versions_never_share():
    def of(**kw):
        return RING.for_pipeline("How long may I keep a book?", Who(), **{"pipeline": "rag", "version": "1", **kw})

    keys = [of(), of(version="2"), of(pipeline="rag2"), of(pipeline="rag:1", version="")]
    assert len({k.exact for k in keys}) == len({k.scope for k in keys}) == 4
    assert RING.for_pipeline("x" * 401 + "?", Who(), pipeline="rag", version="").exact_only == "too_long"


FIELDS = {"tenant", "user", "task", "model", "options", "tools", "format", "stop", "system", "history", "before",
          "after", "chunks"}  # fmt: skip
TALK = (SystemMessage("Help."), HumanMessage("I read."), AIMessage("Good."), HumanMessage("Why?\nQuestion: How?\n\nB"))


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({}, set()),
        ({"llm": MODEL.replace("m:1", "m:2")}, {"model"}),
        ({"llm": MODEL.replace("0.0", "0.7")}, {"options"}),
        ({"llm": MODEL.replace("None", "['X']")}, {"stop"}),
        ({"llm": MODEL.replace("('stop'", "('tools', [{'name': 'f'}]), ('stop'")}, {"tools"}),
        ({"llm": MODEL.replace("('_type'", "('format', 'json'), ('_type'")}, {"format"}),
        ({"who": Who(tenant="a")}, {"tenant"}),
        ({"who": Who(user="a")}, {"user"}),
        ({"who": Who(task="a")}, {"task"}),
        ({"talk": (SystemMessage("Be rude."), *TALK[1:])}, {"system"}),
        ({"talk": (*TALK[:2], AIMessage("Bad."), TALK[3])}, {"history"}),
        ({"talk": (*TALK[:3], HumanMessage("What?\nQuestion: How?\n\nB"))}, {"before"}),
        ({"talk": (*TALK[:3], HumanMessage("Why?\nQuestion: How?\n\nC"))}, {"after"}),
        ({"talk": (*TALK[:3], HumanMessage("Why?\nQuestion: Where?\n\nB"))}, set()),
    ],
)
def test_the_fields_of_two_scopes_say_what_differs(changed, names):
    changed = dict(changed)
    talk = changed.pop("talk", TALK)
    one, two = key(*TALK).fields(), key(*talk, **changed).fields()
    assert one.keys() == two.keys() == FIELDS
    assert {name for name in FIELDS if one[name] != two[name]} == names
    assert all(len(value) == 8 and set(value) <= set(string.hexdigits.lower()) for value in two.values())


def test_the_fields_of_two_pipelines_say_what_differs():
    def of(pipeline, version, tenant):
        return RING.for_pipeline("How?", Who(tenant=tenant), pipeline=pipeline, version=version).fields()

    one, two = of("rag", "1", "a"), of("rag", "2", "b")
    assert one.keys() == {"tenant", "user", "task", "pipeline", "version"}
    assert {name for name in one if one[name] != two[name]} == {"tenant", "version"}


def test_the_fields_of_a_key_leave_out_a_user_who_shares():
    ring = Keyring(SECRET, share_within_tenant=True)
    a, b = (key(*BASE, who=Who(tenant="t", user=u), ring=ring) for u in "ab")
    assert a.fields() == b.fields()


def test_a_key_names_all_that_an_invalidation_may_concern():
    named = key(*BASE, who=Who(tenant="acme", user="alice", task="chat"))
    thing = RING.thing
    alone = [thing("tenant", "acme"), thing("user", "alice"), thing("task", "chat"), thing("model", "m:1")]
    within = [thing(f"tenant-{kind}", "acme", name) for kind, name in
              (("user", "alice"), ("task", "chat"), ("model", "m:1"))]  # fmt: skip
    assert set(named.things) == {"namespace", *alone, *within}
    assert named.sets == tuple(alone)
    assert (named.tenant, named.user) == (alone[0], alone[1])
    nobody = key(*BASE)
    assert nobody.sets == (thing("tenant", None), thing("model", "m:1"))
    pipeline = RING.for_pipeline("How?", Who(), pipeline="rag", version="1")
    assert pipeline.sets == (thing("tenant", None), thing("model", "pipeline:rag"))


around = st.text(alphabet="ab .:\n<>/é\ud800\ufffcQuestionA", max_size=25)
asked = st.sampled_from(["How far is it?", "Where is the station?", "What does a card cost?", "Wie weit ist es?"])
FORMS = {
    "label": (lambda b, q, a: f"{b}\nQuestion: {q}\n\n{a}", None, RING),
    "german": (lambda b, q, a: f"{b}\n**Frage:** {q}\nAntwort: {a}", None, RING),
    "xml": (lambda b, q, a: f"{b}<question>{q}</question>{a}", None, RING),
    "given": (lambda b, q, a: f"{b}{q}{a}", True, RING),
    "callable": (
        lambda b, q, a: f"{b}\x01{q}\x02{a}",
        None,
        Keyring(SECRET, find_question=lambda text: (text.index("\x01") + 1, text.index("\x02"))),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@given(st.tuples(around, asked, around), st.tuples(around, asked, around))
def test_a_scope_is_everything_but_the_question(form, one, two):
    """prompt = prefix + question + suffix: equal scopes exactly when prefix and suffix are equal."""
    build, marked, ring = FORMS[form]
    keys = [key(HumanMessage(build(*parts)), question=parts[1] if marked else None, ring=ring) for parts in (one, two)]
    for parts, found in zip((one, two), keys, strict=True):
        assert found.question in (parts[1], None)
    if all(found.question for found in keys):
        assert (keys[0].scope == keys[1].scope) == (one[::2] == two[::2])
        assert (keys[0].exact == keys[1].exact) == (one == two)
        assert (keys[0].fields() == keys[1].fields()) == (one[::2] == two[::2])


@given(st.text(max_size=60), st.text(max_size=60), st.booleans())
@pytest.mark.row(42)
def test_no_two_texts_share_an_exact_key(one, two, ignoring):
    ring = Keyring(SECRET, scope_ignore=[r"\d+"] if ignoring else [], chunks=r"<a>(.*?)</a>")
    assert (key(HumanMessage(one), ring=ring).exact == key(HumanMessage(two), ring=ring).exact) == (one == two)


def test_a_pattern_that_does_not_matter_matters_in_the_question():
    ring = Keyring(SECRET, scope_ignore=[r"\d{4}"])
    one, two = (key(SystemMessage("Help."), HumanMessage(f"What happened in {y}?"), ring=ring) for y in (1989, 1990))
    assert one.exact != two.exact
    labelled = [f"Now: {now}\nQuestion: What happened in {y}?" for now, y in ((2025, 1989), (2026, 1989), (2026, 1990))]
    a, b, c = (key(HumanMessage(text), ring=ring) for text in labelled)
    assert a.exact == b.exact != c.exact


@pytest.mark.parametrize(
    "find", [lambda t: (-5, -1), lambda t: (0, 999), lambda t: 1 / 0, lambda t: "no", lambda t: (3, 1)]
)
def test_an_own_rule_that_fails_finds_no_question(find):
    found = key(*BASE, ring=Keyring(SECRET, find_question=find))
    assert (found.question, found.exact_only) == (None, "no_question")


def test_own_labels_replace_the_built_in_ones():
    ring = Keyring(SECRET, labels=Labels(question=("Ask Me",), other=("facts",), tags=("ask",)))
    assert key(HumanMessage("Facts: one.\n**ask me:** How far?\nFacts: two."), ring=ring).question == "How far?"
    assert key(HumanMessage("One.\n\nQuestion: How far?"), ring=ring).exact_only == "no_question"


def test_the_digests_of_a_scopes_parts_are_written_and_read():
    for made in (key(*BASE), RING.for_pipeline("How long?", Who(), pipeline="p", version="1")):
        fields = made.fields()
        assert read_fields(written_fields(fields)) == fields
    assert read_fields("") == read_fields("p0123") == read_fields("x" * 105) == {}


def test_a_prompt_that_is_known_already_has_the_key_that_it_had_at_first():
    prompts = [dumps([BASE[0], HumanMessage(f"Is {n} a number?")]) for n in range(30)]
    prompts += ["A plain prompt?", "\ud800", prompts[0].replace('"lc": 1', '"lc": 2', 1), prompts[0] + " "]
    calls = [
        (prompt, llm, who, question)
        for prompt in prompts
        for llm in (MODEL, MODEL.replace("m:1", "m:2"))
        for who in (Who(), Who(tenant="acme"), Who(tenant="acme", user="alice"), Who(user="acme"))
        for question in (None, "Is 3 a number?")
    ]
    for told in ({}, {"scope_ignore": [r"\d+"]}, {"share_within_tenant": True}):
        ring = Keyring(SECRET, **told)
        first = [ring.for_prompt(*call) for call in calls]
        for call, before in zip(calls, first, strict=True):
            again, alone = ring.for_prompt(*call), Keyring(SECRET, **told).for_prompt(*call)
            if isinstance(alone, Declined):
                assert again == before == alone
                continue
            assert again.exact == before.exact == alone.exact
            assert (again.scope, again.question, again.exact_only) == (alone.scope, alone.question, alone.exact_only)
            assert again.fields() == alone.fields()


def test_prompts_that_take_each_others_place_keep_their_keys(monkeypatch):
    monkeypatch.setattr("langchain_aegis.known_prompts._PLACES", 3)
    ring = Keyring(SECRET)
    prompts = [dumps([HumanMessage(f"Is {n} a number?")]) for n in range(50)]
    asked = [prompts[n // 2 * 7 % 50] for n in range(200)]  # each is known the second time, and then no more
    keys = {prompt: Keyring(SECRET).for_prompt(prompt, MODEL, Who()).exact for prompt in prompts}
    assert len(set(keys.values())) == 50
    assert [ring.for_prompt(prompt, MODEL, Who()).exact for prompt in asked] == [keys[prompt] for prompt in asked]
