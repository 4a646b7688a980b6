"""The order of retrieved chunks does not matter; every other byte around the question does."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.load import dumps
from langchain_core.messages import HumanMessage, SystemMessage

from langchain_aegis.chunks import Chunks
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.keys import Keyring, Who
from langchain_aegis.notices import forget_warnings

SECRET = b"0123456789abcdef0123456789abcdef"
MODEL = "[('_type', 'chat'), ('model', 'm:1'), ('stop', None)]"
DOCS = r"(?s)<doc>(.*?)</doc>"
LINES = r"(?m)^- (.*)$"


def key(prompt, rule, question=None, system="Help."):
    ring = Keyring(SECRET, chunks=rule)
    return ring.for_prompt(dumps([SystemMessage(system), HumanMessage(prompt)]), MODEL, Who(), question)


def rag(*docs, question="How far?", before="Use this.", after="Answer:", form="<doc>{}</doc>", sep="\n"):
    return f"{before}\n{sep.join(form.format(d) for d in docs)}\n\nQuestion: {question}\n\n{after}"


def paragraphs(text):
    """Chunks that are joined by blank lines between two headings."""
    start, end = text.index("Context:\n") + 9, text.index("\n\nQuestion")
    spans, at = [], start
    for part in text[start:end].split("\n\n"):
        spans.append((at, at + len(part)))
        at += len(part) + 2
    return spans


words = st.text(alphabet="abc \ufffc\n", max_size=5)


@given(st.lists(words, max_size=4), st.lists(words, max_size=4))
def test_scopes_are_equal_exactly_when_the_sets_of_chunks_are(one, two):
    a, b = (key(rag(*docs), DOCS) for docs in (one, two))
    # One chunk alone has no separator, so that a repetition of it shows.
    assert (a.scope == b.scope) == (set(filter(None, one)) == set(filter(None, two)) and seen(one) == seen(two))
    assert (a.exact == b.exact) == (one == two)


def seen(docs):
    """What of a list of chunks, some of them empty, shows around the chunks."""
    full = [bool(d) for d in docs]
    return min(sum(full), 2) if all(full) else tuple(full)


def test_chunks_joined_by_blank_lines_may_stand_in_any_order():
    def of(*docs):
        return key("Context:\n" + "\n\n".join(docs) + "\n\nQuestion: How far?", paragraphs)

    assert of("a", "b", "c").scope == of("c", "a", "b").scope == of("a", "b", "c", "b").scope
    assert of("a", "b", "c").scope != of("a", "b").scope
    assert of("a", "b", "c").exact != of("c", "a", "b").exact


def test_what_stands_between_chunks_keeps_its_place():
    numbered = [rag(*docs, form="- {}", sep="\n[x]\n") for docs in (("a", "b"), ("b", "a"))]
    assert len({key(p, LINES).scope for p in numbered}) == 1
    titled = ["T1\n- a\nT2\n- b\n\nQuestion: How far?", "T2\n- b\nT1\n- a\n\nQuestion: How far?"]
    assert len({key(p, LINES).scope for p in titled}) == 2


@pytest.mark.parametrize("changed", [{"before": "Use that."}, {"after": "Reply:"}, {"sep": "\n\n"}])
def test_what_stands_around_chunks_counts(changed):
    assert key(rag("a", "b"), DOCS).scope != key(rag("a", "b", **changed), DOCS).scope
    assert key(rag("a", "b"), DOCS, system="Help A.").scope != key(rag("a", "b"), DOCS, system="Help B.").scope


def test_chunks_in_a_system_prompt_are_a_set_too():
    a, b = (key("How far?", DOCS, system=f"Use {d}.") for d in ("<doc>a</doc><doc>b</doc>", "<doc>b</doc><doc>a</doc>"))
    assert a.scope == b.scope
    assert a.exact != b.exact
    assert a.fields() == b.fields()
    assert a.fields()["chunks"] != key("How far?", DOCS, system="Use <doc>a</doc><doc>c</doc>.").fields()["chunks"]


def test_a_chunk_before_the_question_is_another_than_one_after_it():
    a = key("<doc>a</doc>\nQuestion: How far?\n\n<doc>b</doc>", DOCS)
    b = key("<doc>b</doc>\nQuestion: How far?\n\n<doc>a</doc>", DOCS)
    assert a.scope != b.scope


@given(st.text(alphabet="ab<>do/c ", max_size=20))
def test_a_question_never_decides_what_a_chunk_is(asked):
    """Nobody can turn another prompt's text into a chunk by what he asks."""
    ring = Keyring(SECRET, chunks=DOCS)
    question = f"How {asked.strip()} far?"
    found = ring.for_prompt(rag("a", "b", question=question), MODEL, Who(), question)
    plain = ring.for_prompt(rag("a", "b", question="How?"), MODEL, Who(), "How?")
    assert found.scope in (plain.scope, "")


@pytest.mark.parametrize(
    "rule",
    [
        lambda text: [(0, 9), (5, 12)],
        lambda text: [(-3, 4)],
        lambda text: [(0, 10_000)],
        lambda text: [(5, 2)],
        lambda text: [(0, 1, 2)],
        lambda text: None,
        lambda text: ["ab"],
        lambda text: 1 / 0,
        paragraphs,
    ],
)
def test_a_rule_that_fails_finds_no_chunks_and_says_so_once(rule, caplog):
    forget_warnings()
    a, b = (rag(*docs) for docs in (("a", "b"), ("b", "a")))
    with caplog.at_level(logging.WARNING, "langchain_aegis"):
        assert key(a, rule).scope != key(b, rule).scope
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["chunks_failed"]
    assert key(a, rule).scope == key(a, lambda text: []).scope


def test_spans_may_come_in_any_order():
    text = "ab cd"
    part = Chunks(lambda _: [(3, 5), (0, 2)]).split(text)
    assert (part.gaps, part.chunks) == (("", " ", ""), ("ab", "cd"))


@pytest.mark.parametrize("rule", ["(", 7])
def test_what_is_no_rule_is_refused_at_once(rule):
    with pytest.raises(AegisConfigError, match="chunks"):
        Chunks(rule)
