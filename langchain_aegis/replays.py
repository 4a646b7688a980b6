"""Give a cached answer back as a message of its own, or as a stream, and keep streams in LangChain's cache.

LangChain consults its cache for `invoke` only, and hands a hit on as one lump with the id of the answer that was
stored. Knows nothing of any particular cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar, copy_context
from copy import deepcopy
from types import NoneType
from typing import Any, Self, TypeVar

from langchain_core.caches import BaseCache
from langchain_core.globals import get_llm_cache
from langchain_core.language_models._utils import _update_message_content_to_blocks
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk

from langchain_aegis.cut_answers import rests_on_a_part
from langchain_aegis.errors import AegisStreamError
from langchain_aegis.notices import warn_once
from langchain_aegis.scope import seen_config
from langchain_aegis.stamps import following

T = TypeVar("T")

_WORDS_PER_CHUNK = 3
_MAX_CHUNKS = 32  # a chunk costs some 40 us, and a hit shall not hold the event loop

# The model whose cache LangChain itself consults right now, so that the stream inside it need not.
_consulted: ContextVar[object] = ContextVar("aegis_consulted", default=None)


@contextlib.contextmanager
def consulted_by_core(model: object) -> Iterator[None]:
    """Say that LangChain looks up and stores the calls of `model` inside."""
    token = _consulted.set(model)
    try:
        yield
    finally:
        _consulted.reset(token)


def following_core(model: Any, run_manager: Any, options: Mapping[str, Any], *, async_api: bool) -> Any:
    """Return a context for a call that LangChain looks up: if its tokens are read, it takes another process's pieces.

    Args:
        model: Whose cache LangChain asks.
        run_manager: As LangChain gives it.
        options: The call's other arguments.
        async_api: Whether it is awaited.
    """
    cache = model.cache if isinstance(model.cache, BaseCache) else get_llm_cache()
    if model.cache is False or not getattr(cache, "relays", False):
        return contextlib.nullcontext()
    told = {"async_api": async_api, "run_manager": run_manager, **options}
    return following(model._should_stream(**told) and not model._should_use_protocol_streaming(**told))


class BrokenOff(Exception):
    """An answer that another process makes does not come to its end, or not here."""


class StreamEntry:
    """Where the answer of one streamed call stands in LangChain's cache.

    A cache that fails is a miss: without it, the stream would have worked. Lookup and update run in one context, that
    of the stream's first step: whoever reads the rest of it, maybe in another task and for another tenant, decides
    neither whose answer it is nor since when nothing was invalidated.

    Args:
        cache: LangChain's.
        messages: The prompt.
        llm_string: The model, as the cache is told it.
        config: The call's own config.
        consulted: LangChain has looked the call up, and stores the answer: only what comes from other processes, or
            goes there, is left to be done.
    """

    def __init__(
        self, cache: BaseCache, messages: Iterable[BaseMessage], llm_string: str, config: Mapping[str, Any] | None, *,
        consulted: bool = False,
    ) -> None:  # fmt: skip
        self._prompt = dumped(messages)
        self._cache = cache
        self._llm_string = llm_string
        self._config = config
        self.consulted = consulted
        self._context = copy_context()
        self.relay: Any = None  # what passes the answer on between processes, after a lookup that missed
        self.answered = False  # all of an answer was given, and the model need not be asked
        self._given = ""  # of an answer that broke off before
        self._left = ""  # of that, what has not come again

    @staticmethod
    def applies(model: object) -> bool:
        """Say whether LangChain has not consulted the cache for this call already."""
        return _consulted.get() is not model

    def lookup(self) -> AIMessage | None:
        """Return the cached answer, None if there is none."""
        try:
            found = None if self.consulted else self._run(lambda: self._cache.lookup(*self._asked))
            return self._look_for_relay(_first(found))
        except Exception as exc:  # a cache may raise anything
            _failed(exc)
            return None

    async def alookup(self) -> AIMessage | None:
        """Do what `lookup` does, without blocking the event loop."""
        try:
            found = None if self.consulted else await self._arun(lambda: self._cache.alookup(*self._asked))
            return self._look_for_relay(_first(found))
        except Exception as exc:  # a cache may raise anything
            _failed(exc)
            return None

    def store(self, generation: ChatGeneration) -> None:
        """Keep a complete answer, unless it rests on a part of its prompt."""
        if not self._is_whole(generation):
            return
        try:
            self._run(lambda: self._cache.update(self._prompt, self._llm_string, [generation]))
        except Exception as exc:  # a cache may raise anything, and the answer has been given
            _failed(exc)

    async def astore(self, generation: ChatGeneration) -> None:
        """Do what `store` does, without blocking the event loop."""
        if not self._is_whole(generation):
            return
        try:
            await self._arun(lambda: self._cache.aupdate(self._prompt, self._llm_string, [generation]))
        except Exception as exc:  # a cache may raise anything, and the answer has been given
            _failed(exc)

    def send(self, chunk: ChatGenerationChunk) -> None:
        """Pass a piece of the answer on to other processes that wait for it, if there may be any."""
        if self.relay is not None:
            self.relay.send(chunk)

    def broke_off(self, given: Sequence[ChatGenerationChunk], why: Exception) -> None:
        """Note that an answer broke off of which these pieces were given: `rest` leaves them out of the next one.

        Raises:
            AegisStreamError: They are not text alone: nobody could say whether another answer goes on from them.
        """
        self._given += "".join(str(chunk.text) for chunk in given)
        self._left = self._given
        if not all(_is_text(chunk.message) for chunk in given):
            raise self._lost() from why

    def rest(self, chunk: ChatGenerationChunk) -> ChatGenerationChunk | None:
        """Return what of a piece was not given already, or None if nothing.

        Raises:
            AegisStreamError: It is another answer than that of which a part was given.
        """
        if not self._left:
            return chunk
        text = str(chunk.text)
        if not (text.startswith(self._left) or self._left.startswith(text)) or not _is_text(chunk.message):
            raise self._lost()
        new, self._left = text[len(self._left) :], self._left[len(text) :]
        ends = bool(chunk.message.response_metadata or getattr(chunk.message, "chunk_position", None))
        if self._left and ends:
            raise self._lost()
        if not new and not ends:
            return None
        return ChatGenerationChunk(
            message=chunk.message.model_copy(update={"content": new}), generation_info=chunk.generation_info
        )

    def _lost(self) -> AegisStreamError:
        return AegisStreamError(
            "the answer broke off: another process made it, and does not go on. Ask again", partial=self._given
        )

    def leave(self) -> None:
        """Say that no more comes of the answer; does nothing after `store`."""
        if self.relay is not None:
            self.relay.cut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def _look_for_relay(self, found: AIMessage | None) -> AIMessage | None:
        make = getattr(self._cache, "relay", None)
        self.relay = None if make is None or found is not None else self._run(lambda: make(*self._asked))
        return found

    @property
    def _asked(self) -> tuple[str, str]:
        return self._prompt, self._llm_string

    def _is_whole(self, generation: ChatGeneration) -> bool:
        """Return whether an answer is to be kept; whoever waits for it elsewhere is told that it has come."""
        if rests_on_a_part([generation]):
            self.leave()
            return False
        if self.relay is not None:
            self.relay.end()
        return not self.consulted

    def _run(self, ask: Callable[[], T]) -> T:
        def inside() -> T:
            with seen_config(self._config), following():
                return ask()

        return self._context.run(inside)

    async def _arun(self, ask: Callable[[], Awaitable[T]]) -> T:
        async def inside() -> T:
            with seen_config(self._config), following():
                return await ask()

        return await asyncio.create_task(inside(), context=self._context)


def dumped(messages: Iterable[BaseMessage]) -> str:
    """Return the prompt under which LangChain itself would look `messages` up."""
    return dumps([m.model_copy(update={"id": None}) if m.id is not None else m for m in messages])


def freshen(generations: list[ChatGeneration], message_id: str, output_version: str | None) -> list[AIMessage]:
    """Replace cached generations, in place, by ones of this call's own; return their messages.

    They share nothing with the cache, have a new id (with the old one a graph's state would replace an earlier
    message), complete usage (consumers of events require it), and content in the form that the model gives.
    """
    messages = []
    for index, generation in enumerate(generations):
        if isinstance(generation.message, AIMessage):
            message = _own(generation.message, f"{message_id}-{index}" if index else message_id)
            if output_version != "v1":
                message = _plain(message)
            generations[index] = generation.model_copy(update={"message": message})
            messages.append(message)
    return messages


def complete_usage(usage: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return `usage` with every field that LangChain's consumers require."""
    known = dict(usage or {})
    for name in ("input_tokens", "output_tokens"):
        known.setdefault(name, 0)
    known.setdefault("total_tokens", known["input_tokens"] + known["output_tokens"])
    return known


def as_chunks(message: AIMessage, *, output_version: str | None = None) -> list[ChatGenerationChunk]:
    """Return a message as the chunks of a stream, a few words each; the last holds usage, metadata and tool calls.

    Args:
        message: A complete answer.
        output_version: "v1" for chunks whose content is a list of blocks.
    """
    words = re.findall(r"\s*\S+|\s+\Z", str(message.text))
    size = max(_WORDS_PER_CHUNK, math.ceil(len(words) / _MAX_CHUNKS))
    texts = ["".join(words[i : i + size]) for i in range(0, len(words), size)] or [""]
    usage = complete_usage(message.usage_metadata)
    chunks = [AIMessageChunk(content=text, id=message.id) for text in texts[:-1]]
    chunks.append(
        AIMessageChunk(
            content=texts[-1],
            id=message.id,
            tool_calls=message.tool_calls,
            invalid_tool_calls=message.invalid_tool_calls,
            usage_metadata=UsageMetadata(**usage),  # type: ignore[typeddict-item] # a cache may add fields
            response_metadata=message.response_metadata,
            chunk_position="last",
        )
    )
    chunks[0].additional_kwargs = dict(message.additional_kwargs)
    if output_version == "v1":
        chunks = _as_blocks(chunks)
    return [ChatGenerationChunk(message=chunk) for chunk in chunks]


def _as_blocks(chunks: Sequence[AIMessageChunk]) -> list[AIMessageChunk]:
    # Blocks of one kind that follow each other are pieces of one, and pieces are told by their index.
    converted, index, kind = [], -1, ""
    for chunk in chunks:
        blocks = _update_message_content_to_blocks(chunk, "v1")
        for block in blocks.content:
            if isinstance(block, dict):
                if block["type"] != kind:
                    kind, index = block["type"], index + 1
                block.setdefault("index", index)
        converted.append(blocks)
    return converted


def _own(message: AIMessage, message_id: str | None) -> AIMessage:
    own = {name: _unshared(value) for name, value in vars(message).items() if type(value) not in _UNCHANGEABLE}
    own |= {name: _unshared(value) for name, value in (message.model_extra or {}).items()}
    own["usage_metadata"] = complete_usage(own.get("usage_metadata"))
    return message.model_copy(update={**own, "id": message_id})


def _unshared(value: Any) -> Any:
    """Return a copy of what messages hold, which is plain data nearly always; `deepcopy` takes three times as long."""
    kind = type(value)
    if kind in _UNCHANGEABLE:
        return value
    if kind is dict:
        return {key: _unshared(each) for key, each in value.items()}
    if kind is list:
        return [_unshared(each) for each in value]
    return deepcopy(value)


_UNCHANGEABLE = frozenset({str, int, float, bool, NoneType})


def _plain(message: AIMessage) -> AIMessage:
    """Return a message whose content is a text, as Ollama's answers are.

    A call with a handler of v3 events stores a list of blocks, whatever the model's `output_version`.
    """
    if isinstance(message.content, str) or message.response_metadata.get("output_version") != "v1":
        return message
    thought = "".join(b.get("reasoning", "") for b in message.content_blocks if b["type"] == "reasoning")
    extra = {"reasoning_content": thought} if thought else {}
    metadata = {name: value for name, value in message.response_metadata.items() if name != "output_version"}
    return message.model_copy(
        update={
            "content": str(message.text),
            "additional_kwargs": {**extra, **message.additional_kwargs},
            "response_metadata": metadata,
        }
    )


def _is_text(message: BaseMessage) -> bool:
    """Return whether a piece of an answer is nothing but text."""
    return (
        isinstance(message.content, str)
        and not message.additional_kwargs
        and not getattr(message, "tool_call_chunks", None)
    )


def _first(found: object) -> AIMessage | None:
    # As in LangChain, only a list is a hit; a plain text counts as a message.
    if not isinstance(found, list) or not found:
        return None
    message = getattr(found[0], "message", None)
    if message is None and isinstance(text := getattr(found[0], "text", None), str):
        return AIMessage(content=text)
    return _plain(_own(message, None)) if isinstance(message, AIMessage) else None


def _failed(exc: Exception) -> None:
    warn_once(
        "stream_cache_failed", f"the cache failed for a streamed answer ({type(exc).__name__}); the model was asked"
    )
