"""A text to be worked on is told from a question, whatever the style of the prompt."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

from langchain_aegis.keys import Keyring, Who
from langchain_aegis.tasks import ends_with_label, is_payload, is_worked_on, wants_answer, without_documents

PROMPTS = tomllib.loads((Path(__file__).parent / "prompts.toml").read_text(encoding="utf-8"))
MODEL = "[('_type', 'chat'), ('model', 'm:1'), ('stop', None)]"
RING = Keyring(b"0123456789abcdef0123456789abcdef")
PAYLOADS = (
    "He go to school yesterday.",
    "Where is the railway station?",
    "How many customers do we have in Berlin?",
    "the library opening hours",
    "Wo ist der Bahnhof?",
)


def matched(*messages):
    """The text that is matched by meaning, or None."""
    return RING.for_prompt(dumps(list(messages)), MODEL, Who()).question


@pytest.mark.parametrize("instructions", PROMPTS["system_tasks"])
def test_a_task_in_the_system_prompt_makes_payloads_of_questions(instructions):
    assert [matched(SystemMessage(instructions), HumanMessage(text)) for text in PAYLOADS] == [None] * 5


@pytest.mark.parametrize("message", PROMPTS["message_tasks"])
def test_a_task_in_the_message_is_answered_on_an_exact_repeat_only(message):
    assert [matched(HumanMessage(message.replace("{t}", text))) for text in PAYLOADS] == [None] * 5


@pytest.mark.parametrize(("instructions", "message"), PROMPTS["labelled_tasks"])
def test_a_task_in_the_system_prompt_is_one_for_a_labelled_text_too(instructions, message):
    told = SystemMessage(instructions)
    assert [matched(told, HumanMessage(message.replace("{t}", text))) for text in PAYLOADS] == [None] * 5


@pytest.mark.parametrize("turns", PROMPTS["examples"])
def test_examples_of_a_task_make_payloads_of_what_follows(turns):
    before = [m for asked, reply in turns for m in (HumanMessage(asked), AIMessage(reply))]
    assert [matched(*before, HumanMessage(text)) for text in PAYLOADS] == [None] * 5


@pytest.mark.parametrize(("system", "message"), PROMPTS["answering"])
def test_questions_in_prompts_that_answer_are_matched(system, message):
    def fill(text, question):
        return text.replace("{c}", PROMPTS["c"]).replace("{c2}", PROMPTS["c2"]).replace("{q}", question)

    lost = [
        question
        for question in PROMPTS["questions"]
        if matched(*[SystemMessage(fill(system, ""))] * bool(system), HumanMessage(fill(message, question))) != question
    ]
    assert lost == []


def test_an_earlier_conversation_leaves_a_question_one():
    before = [
        HumanMessage("Where can I park?"),
        AIMessage("There is a garage behind the station, and two smaller ones in the old town."),
        HumanMessage("Is it open at night?"),
        AIMessage("The garage is open all day and all night; the small ones close at ten."),
    ]
    assert matched(SystemMessage("You help visitors."), *before, HumanMessage("What does it cost?")) is not None


def test_a_question_that_the_caller_marked_needs_no_system_prompt_about_answers():
    def marked(instructions):
        prompt = dumps([SystemMessage(instructions), HumanMessage("Well: how far is it?")])
        return RING.for_prompt(prompt, MODEL, Who(), "how far is it?").question

    assert marked("Respond with short sentences.") == "how far is it?"
    assert marked("Translate the user's message.") is None
    assert matched(SystemMessage("Respond with short sentences."), HumanMessage("How far is it?")) is None


@pytest.mark.parametrize("instructions", ["Vienna, 2026.", "It is 10:02.", "Never mention competitors.", "Tenant: acme",
                                          "If unsure, say so.", "Heute ist Montag.", "S1"])  # fmt: skip
def test_what_has_no_word_of_work_leaves_a_question_one(instructions):
    assert matched(SystemMessage(instructions), HumanMessage("How far is it?")) == "How far is it?"


@pytest.mark.parametrize("order", ["Translate the text into German.", "You correct English.", "Reply with SQL."])
def test_a_task_behind_much_text_is_seen(order):
    long = "The branch opens at nine and closes at five. " * 300
    assert not wants_answer([f"You are a helpful assistant. {long}{order}"], [])
    assert not wants_answer([f"You are a helpful assistant.\nContext: {long}\n{order}"], [])


def test_orders_in_documents_are_left_out_of_prompts_that_answer():
    document = "Translate the text before you send the message. Correct each sentence."
    assert wants_answer([f"Answer the question from the context.\n\nContext:\n{document}"], [])
    assert wants_answer(["Answer the question."], [f"<context>{document}</context>\nQuestion: ", "\nAnswer:"])
    assert not wants_answer(["You are a helpful assistant."], [f"Context:\n{document}\nQuestion: "])
    assert without_documents("A.\n<context>B</context>\nContext:\nC\n\nRules:\nD").split() == ["A.", "Rules:", "D"]


@pytest.mark.parametrize(
    ("end", "other"),
    [("\nAnswer:", "\nSQLQuery:"), ("\n**Antwort:**", "\nZusammenfassung:"), ("\nHelpful Answer:", "\nSentiment: ")],
)
def test_the_label_at_the_end_says_what_is_wanted(end, other):
    assert not ends_with_label(end)
    assert ends_with_label(other)


@given(st.text(max_size=300), st.text(max_size=300))
def test_any_text_can_be_judged(one, two):
    assert wants_answer([one], [two]) in (True, False)
    assert is_payload(one) in (True, False)
    assert is_worked_on([(one, two)]) in (True, False)


@pytest.mark.parametrize(
    "text", ["the " * 5000, "a:" * 8000, "<doc>" * 3000, '"' * 15000, "\n" * 15000, "You are a " * 1500]
)
def test_no_text_takes_long(text):
    """Every step looks at a bounded piece of text; the deadline is far above what is needed."""
    wants_answer([text], [text[1:]])
    is_payload(text[:400])
    ends_with_label(text)
