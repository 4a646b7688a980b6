"""Which part of a prompt is the question, and whether it may be matched by meaning."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import langchain_aegis
from langchain_aegis.questions import LABELS, Labels, NoQuestion, Question, exact_only_reason, find_question

PIECES = st.sampled_from(
    [
        "Question:",
        "Frage: ",
        "Answer:",
        "Context:",
        "\n",
        "\n\n",
        " ",
        "\t",
        "<question>",
        "</question>",
        "How far?",
        "ü",
        "\r\n",
    ]
)
PROMPTS = st.one_of(st.text(max_size=120), st.lists(PIECES, max_size=14).map("".join))


@given(PROMPTS, st.none() | st.text(max_size=12))
def test_prompt_is_prefix_question_suffix(last: str, told: str | None) -> None:
    found = find_question(last, given=told)
    if isinstance(found, Question):
        assert last == last[: found.start] + found.text + last[found.end :]
        assert last[found.start : found.end] == found.text == found.text.strip() != ""
        assert len(found.text) <= 400
    else:
        assert found.reason in {"no_question", "several_labels", "too_long", "not_verbatim"}


@given(st.text(max_size=60), st.text(min_size=1, max_size=20).filter(str.strip), st.text(max_size=60))
def test_the_given_question_is_found_exactly_when_it_stands_once(before: str, question: str, after: str) -> None:
    last, wanted = before + question + after, question.strip()
    found = find_question(last, given=question)
    once = sum(last.startswith(wanted, at) for at in range(len(last))) == 1
    assert isinstance(found, Question) == once
    assert find_question(last, given=question, others=[f"x{wanted}y"]) == NoQuestion("not_verbatim")


@pytest.mark.parametrize(
    "prompt",
    [
        "How far is it?",
        "  How far is it?\n",
        "Use the context.\n\nContext:\nMany roads.\n\nQuestion: How far is it?\n\nAnswer:",
        "Kontext: Viele Wege.\nFrage: How far is it?\nAntwort:",
        "FRAGE:\nHow far is it?\nAntwort:",
        "**Question:** How far is it?\n**Answer:**",
        "### Question: How far is it?\n### Answer:",
        "<documents>Many roads.</documents>\n<question>How far is it?</question>",
        "<context>Many roads.</context>\n<frage>\nHow far is it?\n</frage>",
        "Context: roads\r\n\r\nUser question: How far is it?\r\n\r\nHelpful answer:",
        "Nutzerfrage: How far is it?\n\nAnswer briefly.",
        "Question: How far is it?\n<context>Many roads.</context>",
    ],
)
def test_the_question_is_found_in_usual_prompts(prompt: str) -> None:
    found = find_question(prompt)
    assert isinstance(found, Question)
    assert found.text == "How far is it?"


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "no_question"),
        ("Question:\n\nAnswer:", "no_question"),
        ("Question: a?\nAnswer: b\n\nQuestion: c?\nAnswer:", "several_labels"),
        ("Context:\nQuestion: an FAQ's\nAnswer: x\n<question>mine?</question>", "several_labels"),
        ("Context: roads\nHow far is it?", "no_question"),
        ("Many roads.\n\nHow far is it?", "no_question"),
        ("<doc>Many roads.</doc> How far is it?", "no_question"),
        ("far " * 101, "too_long"),
        ("Question: " + "far " * 101, "too_long"),
    ],
)
def test_a_prompt_without_one_clear_question_has_none(prompt: str, reason: str) -> None:
    assert find_question(prompt) == NoQuestion(reason)


def test_labels_and_length_can_be_chosen() -> None:
    mine = Labels(question=("ask",), other=("facts",), tags=("ask",))
    found = find_question("Facts: roads\nASK: How far?\nFacts: none", labels=mine)
    assert isinstance(found, Question)
    assert found.text == "How far?"
    assert isinstance(find_question("<ask>How far?</ask>", labels=mine), Question)
    assert find_question("Ask: How far?", labels=mine, max_chars=7) == NoQuestion("too_long")
    assert "frage" in LABELS.question


QUESTIONS = [
    "Explain photosynthesis",
    "Tell me about the reading room",
    "List the branches with a cafe",
    "Name a river of Europe",
    "Give me three reasons to cycle",
    "Erkläre die Steuerklassen",
    "Nenne drei Gründe für ein Fahrrad",
    "Opening hours?",
    "Rate limits of the interface?",
    "Return policy?",
    "How do I delete my account?",
    "Can I cancel a subscription?",
    "Kann ich eine Buchung stornieren?",
    "Can you deliver to Norway?",
    "whats the boiling point of mercury",
    "I want to close my account for good, how?",
    "I'd like to know who may borrow films",
    "How do I translate a page in a browser?",
    "How do I open a current account?",
    "Hi, quick one: how do I order a card?",
    "Wie spare ich Strom?",
]


@pytest.mark.parametrize("text", QUESTIONS)
def test_questions_and_requests_for_information_may_be_matched(text: str) -> None:
    assert exact_only_reason(text) is None


@pytest.mark.parametrize(
    "instruction",
    [
        "You support the customers of a library. Use the context only, be brief, "
        "answer in the language of the question.",
        "Answer the question.",
        "Use the following pieces of retrieved context to answer the question. If you don't know the answer, say so. "
        "Use three sentences at most and keep the answer concise.",
        "You are a helpful assistant. Write your answer in German. Summarise the answer at the end.",
        "Beantworte die Frage nur aus dem Kontext.\nKontext: Die Bücherei öffnet um neun.",
        "Du bist ein freundlicher Assistent. Antworte kurz.",
    ],
)
def test_instructions_to_answer_make_no_task(instruction: str) -> None:
    assert exact_only_reason("How far is it?", system=["", instruction]) is None


@pytest.mark.parametrize(
    "instruction",
    [
        "Translate to Spanish.",
        "You translate English into Dutch.",
        "You are a professional German translator.",
        "Correct the grammar.",
        "Proofread:",
        "Your task is to classify the user's message as praise or blame.",
        "Summarize the text below in one line.",
        "Extract all names from the given text.",
        "You are an SQL expert. Given a request, create a query.",
        "Rewrite the question so that it stands alone.",
        "Given a conversation and a question, formulate a standalone question. Do not answer it.",
        "You are a grader who judges whether a document matters.",
        "Du bist ein Übersetzer.",
        "Korrigiere den folgenden Text:",
        "Bitte fasse den Artikel zusammen.",
    ],
)
def test_a_task_in_the_instructions_makes_every_text_a_payload(instruction: str) -> None:
    assert exact_only_reason("How far is it?", system=[instruction]) == "not_a_question"
    assert exact_only_reason("How far is it?", around=[f"{instruction}\nQuestion: "]) == "not_a_question"


@pytest.mark.parametrize(
    "text",
    [
        "Translate: Where is the station?",
        "Please correct this sentence: She go home.",
        "Can you proofread this letter?",
        "Summarise this: the meeting was long",
        "Write a function that sorts a list",
        "Schreibe ein Gedicht über Regen",
        "Übersetze das ins Englische",
        "I like this camera",
        "She goes home at five.",
        "Das Essen war gut",
        "Thanks a lot!",
        "select name from users where id = 1",
    ],
)
def test_payloads_and_remarks_are_not_questions(text: str) -> None:
    assert exact_only_reason(text) == "not_a_question"


@pytest.mark.parametrize(
    "text",
    [
        "What is open today?",
        "What is the current price of gold?",
        "Latest headlines?",
        "Wie ist das Wetter heute?",
        "Was gilt jetzt?",
    ],
)
def test_what_changes_from_hour_to_hour_is_volatile(text: str) -> None:
    assert exact_only_reason(text) == "volatile"


DATA = Path(langchain_aegis.__file__).parent / "data" / "questions.toml"


def test_every_volatile_phrase_is_seen_in_any_case_and_in_every_place() -> None:
    told = tomllib.loads(DATA.read_text("utf-8"))["volatile"]
    phrases = [phrase.replace("_", " ") for phrase in told["words"].split()]
    assert len(phrases) > 50
    for phrase in [*phrases, "current"]:
        for text in (f"Is it {phrase}?", f"Is it {phrase.upper()}, or not?", f"Ist es ({phrase.title()}) größer?"):
            assert exact_only_reason(text) == "volatile", text
    assert exact_only_reason("Fährt der Zug morgen?") == exact_only_reason("Kommt er morgen?") == "volatile"


@pytest.mark.parametrize(
    "text",
    [
        "Transfer 20 euros to Ben",
        "Delete my account",
        "Please cancel the order",
        "Could you book a room for me?",
        "I want to close my account",
        "Überweise 20 Euro an Ben",
        "Ich möchte mein Abo kündigen",
        "Kannst du das Licht ausschalten?",
    ],
)
def test_what_is_to_be_done_is_an_action(text: str) -> None:
    assert exact_only_reason(text) == "action"


@given(st.text(max_size=200), st.text(max_size=200))
def test_any_text_is_judged(text: str, instruction: str) -> None:
    assert exact_only_reason(text, system=[instruction], around=[instruction], earlier=[(text, instruction)]) in {
        None,
        "not_a_question",
        "action",
        "volatile",
    }
