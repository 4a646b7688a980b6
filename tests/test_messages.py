"""A prompt is read as what the model sees."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from langchain_aegis import messages
from langchain_aegis.messages import parse_prompt


def canonical(*conversation):
    return parse_prompt(dumps([m.model_copy(update={"id": None}) for m in conversation]))


def test_a_text_is_one_human_message():
    (message,) = parse_prompt("What is a cache?")
    assert (message.role, message.text) == ("human", "What is a cache?")


@pytest.mark.row(119)
def test_ids_usage_and_timings_do_not_matter():
    def turn(run):
        call = {"name": "zone", "args": {"city": "Graz"}, "id": f"call-{run}"}
        return canonical(
            SystemMessage("Help."),
            HumanMessage("Where?", id=f"h{run}"),
            AIMessage("", id=f"a{run}", tool_calls=[call], response_metadata={"total_duration": run},
                      usage_metadata={"input_tokens": run, "output_tokens": 1, "total_tokens": run + 1}),
            ToolMessage("zone 2", tool_call_id=f"call-{run}", id=f"t{run}"),
        )  # fmt: skip

    assert turn(1) == turn(2)


CONVERSATION = (
    SystemMessage("Help."),
    HumanMessage("Where?", name="bob"),
    AIMessage("Look.", tool_calls=[{"name": "zone", "args": {"city": "Graz"}, "id": "1"}]),
    ToolMessage("zone 2", tool_call_id="1"),
    HumanMessage([{"type": "text", "text": "And now?"}, {"type": "image_url", "image_url": {"url": "data:,A"}}]),
    ChatMessage("Noted.", role="critic"),
)


@pytest.mark.row(117, 119)
@pytest.mark.parametrize(
    ("at", "other"),
    [
        (0, SystemMessage("Help!")),
        (0, HumanMessage("Help.")),
        (1, HumanMessage("Where?", name="eve")),
        (1, HumanMessage("Where? ", name="bob")),
        (2, AIMessage("Look.", tool_calls=[{"name": "zone", "args": {"city": "Linz"}, "id": "1"}])),
        (2, AIMessage("Look.", tool_calls=[{"name": "area", "args": {"city": "Graz"}, "id": "1"}])),
        (2, AIMessage("Look.")),
        (3, ToolMessage("zone 2", tool_call_id="other")),
        (3, ToolMessage("zone 2", tool_call_id="1", status="error")),
        (
            4,
            HumanMessage(
                [{"type": "text", "text": "And now?"}, {"type": "image_url", "image_url": {"url": "data:,B"}}]
            ),
        ),
        (4, HumanMessage("And now?")),
        (5, ChatMessage("Noted.", role="author")),
    ],
)
def test_whatever_the_model_sees_matters(at, other):
    changed = list(CONVERSATION)
    changed[at] = other
    assert canonical(*changed) != canonical(*CONVERSATION)
    assert canonical(*CONVERSATION[:at], *CONVERSATION[at + 1 :]) != canonical(*CONVERSATION)


@pytest.mark.row(115, 116)
@given(st.text(alphabet=st.characters(codec=None)))  # lone surrogates too
def test_text_comes_back_byte_for_byte(text):
    (message,) = canonical(HumanMessage(text))
    assert message.text == text
    assert parse_prompt(text)[0].text == text or text.startswith("[{")


@pytest.mark.row(117)
def test_media_is_told_from_text():
    assert canonical(CONVERSATION[4])[0].has_media
    assert not canonical(HumanMessage([{"type": "text", "text": "hi"}]))[0].has_media
    assert canonical(HumanMessage([{"type": "text", "text": "hi"}]))[0].text == "hi"
    assert canonical(HumanMessage([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]))[0].text is None


@pytest.mark.parametrize("kwargs", [None, [], {"content": None, "type": "human"}, {"content": "x"}, "x"])
def test_what_cannot_be_read_is_said_never_guessed(kwargs):
    item = {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", "HumanMessage"], "kwargs": kwargs}
    assert parse_prompt(json.dumps([item])) is None
    assert parse_prompt(json.dumps([item])[:-1]) is None


@pytest.mark.row(116)
def test_json_with_lone_surrogates_and_great_numbers_survives():
    for value in ({"a": "\ud800"}, {"b": 2**80}, {"c": -(2**63) - 1}, {"d": ["ü", None, 1.5]}):
        again = messages.loads(messages.dumps(value))
        assert again == value
        assert [type(v) for v in again.values()] == [type(v) for v in value.values()]
