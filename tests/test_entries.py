"""What comes back from Redis is what was stored, or nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, Generation

from langchain_aegis.entries import (
    Record,
    calls_tools,
    decode_answer,
    decode_value,
    encode_answer,
    encode_value,
    refusal,
    unseal,
)
from langchain_aegis.seals import Seal

KEY = Seal([b"k" * 32])
RECORD = Record(
    key="0" * 32, scope="1" * 32, emb="abcd1234", digest="", created_ms=1, expires_ms=2, epochs="f00:3",
    answer=b'{"kind":"value","item":"Paris"}', profile=b"profile", vec=b"\x00<\x00\x00", src=("source:1", "source:2"),
    task="chat",
)  # fmt: skip


def stored(record=RECORD):
    return {name.encode(): value for name, value in record.sealed(KEY).items()}


def chat(content="Paris", reason="stop", **kwargs):
    metadata = {"done_reason": reason} if reason else {}
    return ChatGeneration(message=AIMessage(content, response_metadata=metadata, **kwargs))


def test_a_record_comes_back_as_it_was():
    assert unseal(stored(), KEY) == RECORD


def test_a_field_that_is_empty_is_left_out_and_may_be_there():
    assert set(stored()) == {name.encode() for name in (
        "v", "key", "scope", "emb", "created_ms", "expires_ms", "epochs", "answer", "profile", "vec", "src", "task",
        "mac",
    )}  # fmt: skip
    assert unseal({**stored(), b"question": b"", b"digest": b"", b"fresh_ms": b"", b"negative": b""}, KEY) == RECORD
    assert unseal({**stored(), b"question": b"Who?"}, KEY) is None
    assert unseal({**stored(), b"negative": b"1"}, KEY) is None


@pytest.mark.row(40)
def test_unknown_fields_are_ignored_and_another_version_is_a_miss():
    assert unseal({**stored(), b"later": b"x"}, KEY) == RECORD
    assert unseal({**stored(), b"v": b"2"}, KEY) is None
    assert unseal(stored(), Seal([b"x" * 32])) is None
    assert unseal({}, KEY) is None


@pytest.mark.parametrize("field", sorted(stored()))
@pytest.mark.row(28)
def test_a_missing_field_is_a_miss(field):
    assert unseal({n: v for n, v in stored().items() if n != field}, KEY) is None


@pytest.mark.row(27)
def test_every_flipped_bit_is_a_miss():
    for field, value in stored().items():
        for bit in range(len(value) * 8):
            changed = bytearray(value)
            changed[bit // 8] ^= 1 << bit % 8
            assert unseal({**stored(), field: bytes(changed)}, KEY) is None, (field, bit)


@given(st.sampled_from(sorted(stored())), st.binary(max_size=40))
@pytest.mark.row(27, 28)
def test_every_other_value_is_a_miss(field, value):
    assert unseal({**stored(), field: value}, KEY) in (None, RECORD if value == stored()[field] else None)


@pytest.mark.row(27)
def test_bytes_moved_from_one_field_to_the_next_are_a_miss():
    fields = stored()
    assert unseal({**fields, b"scope": fields[b"scope"] + b"a", b"emb": fields[b"emb"][1:]}, KEY) is None


# Nested, but small: what is checked is the kinds of values, and a large tree takes long to draw.
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=8)

messages = st.builds(
    lambda content, name, args, extra: AIMessage(
        content, name=name, tool_calls=[{"name": "f", "args": args, "id": "1"}], additional_kwargs=extra,
        response_metadata={"model_name": "m", "done_reason": "stop", "total_duration": 5},
    ),
    st.text(alphabet=st.characters(codec=None)),
    st.one_of(st.none(), st.text(min_size=1)),
    st.dictionaries(st.text(), VALUES),
    st.dictionaries(st.sampled_from(["reasoning_content", "lc", "refusal"]), st.text()),
)  # fmt: skip


@given(messages)
def test_a_message_comes_back_with_all_that_the_user_sees(message):
    (generation,) = decode_answer(encode_answer([ChatGeneration(message=message)]))
    again = generation.message
    assert (again.content, again.name, again.tool_calls) == (message.content, message.name, message.tool_calls)
    assert again.additional_kwargs == message.additional_kwargs
    assert again.response_metadata == {"model_name": "m", "done_reason": "stop"}


@given(st.text(), st.one_of(st.none(), st.dictionaries(st.text(), st.integers(-5, 5))))
def test_a_plain_generation_comes_back_equal(text, info):
    generation = Generation(text=text, generation_info=info)
    assert decode_answer(encode_answer([generation, generation])) == [generation, generation]


def test_a_hit_is_a_fresh_object_with_complete_usage():
    data = encode_answer([chat()])
    one, two = (decode_answer(data, marks={"tier": "exact"})[0].message for _ in range(2))
    assert one.id != two.id
    assert one.usage_metadata == {
        "input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_token_details": {"cache_read": 0},
    }  # fmt: skip
    assert one.response_metadata["aegis_cache"] == {"tier": "exact"}
    timed = ChatGeneration(
        message=AIMessage("x", response_metadata={"done_reason": "stop", "total_duration": 2 * 10**9})
    )
    (again,) = decode_answer(encode_answer([timed]), marks={"tier": "exact"})
    assert again.message.response_metadata["aegis_cache"] == {"tier": "exact", "generation_s": 2.0}
    one.additional_kwargs["x"] = 1
    assert "x" not in decode_answer(data)[0].message.additional_kwargs


@pytest.mark.row(32)
def test_a_payload_that_looks_like_langchains_own_stays_data():
    evil = {"lc": 1, "type": "secret", "id": ["HOME"]}
    (generation,) = decode_answer(encode_answer([chat(additional_kwargs={"x": evil})]))
    assert generation.message.additional_kwargs == {"x": evil}


@pytest.mark.parametrize(
    ("generations", "reason"),
    [
        ([], "empty"),
        ([chat(reason=None)], "incomplete"),
        ([chat(reason="length")], "incomplete"),
        ([chat(reason="load")], "incomplete"),
        ([chat(reason="tool_calls")], "incomplete"),
        ([chat(content="")], "empty"),
        ([chat(), chat(reason="length")], "incomplete"),
        ([ChatGeneration(message=HumanMessage("x"))], "not_an_answer"),
        ([ChatGeneration(message=AIMessage("x", response_metadata={"done_reason": "stop", "done": False}))],
         "incomplete"),
        ([ChatGeneration(message=AIMessage("x", response_metadata={"done_reason": "stop"},
          invalid_tool_calls=[{"name": "f", "args": "{", "id": "1", "error": None}]))], "invalid_tool_calls"),
        ([Generation(text="")], "empty"),
        ([Generation(text="x")], None),
        ([chat()], None),
        ([chat(reason="end_turn")], None),
    ],
)  # fmt: skip
def test_only_complete_answers_are_kept(generations, reason):
    assert refusal(generations) == reason


def test_an_answer_that_asks_for_a_tool_is_complete_with_its_own_reason():
    call = [{"name": "f", "args": {}, "id": "1"}]
    assert refusal([chat(content="", reason="tool_calls", tool_calls=call)]) is None
    assert calls_tools([chat(tool_calls=call)])
    assert not calls_tools([chat()])


@pytest.mark.parametrize("value", ["text", {"a": [1, None, "ü"]}, ["x"], 3, True])
def test_a_pipelines_value_comes_back_equal(value):
    assert decode_value(encode_value(value)) == (True, value)


def test_a_pipelines_messages_come_back_as_messages():
    (_, message) = decode_value(encode_value(chat().message), marks={"tier": "semantic"})
    assert (message.content, message.response_metadata["aegis_cache"]) == ("Paris", {"tier": "semantic"})
    (_, both) = decode_value(encode_value([chat("a").message, chat("b").message]))
    assert [m.content for m in both] == ["a", "b"]


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, {"a": (1,)}, object(), HumanMessage("x"), [HumanMessage("x")], b"x"])
def test_what_would_come_back_changed_is_refused(value):
    with pytest.raises((TypeError, ValueError)):
        encode_value(value)


@given(st.binary(max_size=60))
@pytest.mark.row(31)
def test_whatever_lies_in_redis_decoding_never_raises(data):
    assert decode_answer(data) is None
    assert decode_value(data) is None


@pytest.mark.row(33)
def test_deep_nesting_is_a_miss():
    data = b'{"kind":"value","item":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert decode_value(data) is None


PLAIN = AIMessage(
    "Paris.", id="run-1", usage_metadata={"input_tokens": 5, "output_tokens": 2, "total_tokens": 7},
    response_metadata={"model_name": "m", "done_reason": "stop"},
)  # fmt: skip


def test_a_plain_answer_is_as_if_its_message_had_been_made_by_the_constructor():
    """It is put together without the checks that it has passed before it was stored."""
    (got,) = decode_answer(encode_answer([ChatGeneration(message=PLAIN)]), marks={"tier": "exact"})
    same = AIMessage(
        "Paris.", id=got.message.id, name=None, tool_calls=[], additional_kwargs={},
        response_metadata={"model_name": "m", "done_reason": "stop", "aegis_cache": {"tier": "exact"}},
        usage_metadata={
            "input_tokens": 5, "output_tokens": 2, "total_tokens": 7, "input_token_details": {"cache_read": 5}
        },
        invalid_tool_calls=[],
    )  # fmt: skip
    expected = ChatGeneration(message=same)
    for one, other in ((got, expected), (got.message, same)):
        assert one == other
        assert vars(one).keys() == vars(other).keys()
        assert {n: type(v) for n, v in vars(one).items()} == {n: type(v) for n, v in vars(other).items()}
        assert one.model_fields_set == other.model_fields_set
        assert one.__pydantic_extra__ == other.__pydantic_extra__
        assert one.__pydantic_private__ == other.__pydantic_private__
        assert (dumps(one), repr(one), one.model_dump()) == (dumps(other), repr(other), other.model_dump())


def test_two_hits_share_nothing_that_can_be_changed():
    data = encode_answer([ChatGeneration(message=PLAIN)])
    (one,), (other,) = decode_answer(data), decode_answer(data)
    for message in (one.message, other.message):
        message.additional_kwargs["mine"] = message.tool_calls.append({}) or message.invalid_tool_calls.append({})
        message.response_metadata["mine"] = message.usage_metadata["mine"] = message.model_fields_set.add("mine")
        assert (len(message.tool_calls), len(message.invalid_tool_calls)) == (1, 1)
    (fresh,) = decode_answer(data)
    assert "mine" not in {
        *fresh.message.additional_kwargs, *fresh.message.response_metadata, *fresh.message.usage_metadata,
        *fresh.message.model_fields_set,
    }  # fmt: skip
    assert fresh.message.id not in (one.message.id, other.message.id)


@pytest.mark.parametrize(
    "odd",
    ["a lone \ud800 one", "\\ud800 in letters", "x\u2028\U0001f600", 2**63 - 1, 2**64 + 1, 10**18, -(10**30), 1e300],
)
@pytest.mark.parametrize("place", ["content", "argument", "metadata"])
def test_whatever_the_quick_parser_would_change_comes_back_as_it_was(odd, place):
    call = {"name": "f", "args": {"a": odd}, "id": "1", "type": "tool_call"}
    message = AIMessage(
        str(odd) if place == "content" else "Yes.",
        tool_calls=[call] if place == "argument" else [],
        response_metadata={"done_reason": "stop", **({"model": odd} if place == "metadata" else {})},
    )
    (got,) = decode_answer(encode_answer([ChatGeneration(message=message)]))
    assert (got.message.content, got.message.tool_calls) == (message.content, message.tool_calls)
    assert got.message.response_metadata == message.response_metadata
