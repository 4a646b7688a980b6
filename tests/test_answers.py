"""Ollama's answers as LangChain's chunks: what is made without LangChain's checks is what they would have let pass."""

import pytest
from langchain_core.load import dumps
from langchain_core.messages import AIMessageChunk
from langchain_core.outputs import ChatGenerationChunk

from langchain_aegis.answers import read_chunk

PIECES = {
    "text": ({"content": "word "}, {"content": "word "}),
    "nothing": ({"content": ""}, {"content": ""}),
    "no text": ({"thinking": "hm"}, {"content": "", "additional_kwargs": {"reasoning_content": "hm"}}),
    "both": (
        {"content": "so", "thinking": "hm"},
        {"content": "so", "additional_kwargs": {"reasoning_content": "hm"}},
    ),
}


def piece(message, **fields):
    return read_chunk({"model": "m", "message": message, "done": False, **fields}, reasoning=True)


def sum_of(chunk):
    """Return three of them in one, as at the end of a stream."""
    two = [chunk, chunk]
    return chunk + two


@pytest.mark.parametrize(("sent", "arguments"), PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("logprobs", [None, [{"token": "so", "logprob": -0.5}]])
def test_a_piece_is_what_langchain_makes_of_its_text(sent, arguments, logprobs):
    info = {} if logprobs is None else {"generation_info": {"logprobs": logprobs}}
    checked = ChatGenerationChunk(message=AIMessageChunk(**arguments), **info)
    found = piece(sent, logprobs=logprobs)
    assert type(found) is type(checked) and type(found.message) is type(checked.message)
    assert found == checked
    for one, other in ((found, checked), (found.message, checked.message)):
        assert vars(one) == vars(other)
        assert one.model_fields_set == other.model_fields_set
        assert dumps(one) == dumps(other)
    assert type(found.text) is type(checked.text)  # may be called, as LangChain's own
    assert sum_of(found) == sum_of(checked)


def test_pieces_share_nothing():
    """Whoever changes one, as LangChain itself does with ids and metadata, changes no other and none to come."""
    first, second = piece({"content": "a"}), piece({"content": "b"})
    message = first.message
    message.id = "run-1"
    message.content = "changed"
    message.additional_kwargs["x"] = message.response_metadata["x"] = 1
    message.tool_calls.append({"name": "f", "args": {}, "id": "1"})
    message.invalid_tool_calls.append({"name": "f", "args": "", "id": "1", "error": ""})
    message.tool_call_chunks.append({"name": "f", "args": "", "id": "1", "index": 0})
    message.extra = 1
    first.generation_info = {"x": 1}
    for each in (second, piece({"content": "b"})):
        assert each == ChatGenerationChunk(message=AIMessageChunk(content="b"))
        assert each.message.model_fields_set == {"content"}
        assert not each.message.model_extra
