"""Copy a chat model's answer for each caller that shares it, whole or in chunks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk, message_chunk_to_message
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.outputs.chat_generation import merge_chat_generation_chunks

from langchain_aegis.broadcasts import Forms
from langchain_aegis.replays import as_chunks


def twin_of_result(result: ChatResult) -> ChatResult:
    """Return an independent copy, whose messages get the id of the run that they are returned to."""
    twin = result.model_copy(deep=True)
    for generation in twin.generations:
        generation.message.id = None
    return twin


def twin_of_chunk(chunk: ChatGenerationChunk, own: bool) -> ChatGenerationChunk:
    """Return an independent copy, whose message gets the id of the run that it is returned to.

    Args:
        chunk: Of a stream.
        own: For the caller that opened the stream: it keeps the id that the model gave.
    """
    twin: ChatGenerationChunk = _copied(chunk)
    message = _copied(chunk.message)
    if not own:
        message.__dict__["id"] = None
    twin.__dict__["message"] = message
    return twin


def _copied(value: Any, put: Callable[[object, str, Any], None] = object.__setattr__) -> Any:
    # `model_copy(deep=True)` takes six times as long, and this is done for every token and reader.
    fields = dict(value.__dict__)
    for name, field in fields.items():
        if field.__class__ is dict or field.__class__ is list:
            fields[name] = copy.deepcopy(field) if field else field.copy()
        elif isinstance(field, (dict, list)):
            fields[name] = copy.deepcopy(field)
    made = object.__new__(type(value))
    put(made, "__dict__", fields)
    put(made, "__pydantic_fields_set__", set(value.__pydantic_fields_set__))
    extra, private = value.__pydantic_extra__, value.__pydantic_private__
    put(made, "__pydantic_extra__", copy.deepcopy(extra) if extra else extra)
    put(made, "__pydantic_private__", private.copy() if private else private)
    return made


def whole(chunks: list[ChatGenerationChunk]) -> ChatResult:
    """Return the answer that the chunks are, as the model would give it when it is not streamed.

    Raises:
        ValueError: There are none.
    """
    if not chunks:
        raise ValueError("No generation chunks were returned")
    last = chunks[-1].message
    if isinstance(last, AIMessageChunk) and not last.chunk_position:
        last.chunk_position = "last"  # tool calls are read from their pieces once all have come
    merged = merge_chat_generation_chunks(chunks)
    assert merged is not None  # noqa: S101 - there are chunks
    message = message_chunk_to_message(merged.message)
    return ChatResult(generations=[ChatGeneration(message=message, generation_info=merged.generation_info)])


def pieces(result: ChatResult) -> list[ChatGenerationChunk] | None:
    """Return an answer as chunks, or None if it is several."""
    if len(result.generations) != 1:
        return None
    (generation,) = result.generations
    message = generation.message
    if not isinstance(message, AIMessage):
        return None
    if isinstance(message.content, str):
        chunks = as_chunks(message)
        if message.usage_metadata is None:
            chunks[-1].message.usage_metadata = None  # type: ignore[attr-defined]
    else:
        fields = {name: value for name, value in message.__dict__.items() if name != "type"}
        chunks = [ChatGenerationChunk(message=AIMessageChunk(**fields, chunk_position="last"))]
    chunks[-1].generation_info = {**(result.llm_output or {}), **(generation.generation_info or {})}
    return chunks


CHAT_FORMS: Forms[ChatResult] = Forms(twin_of_result, twin_of_chunk, whole, pieces)
