"""Answers as records that can be trusted when they are read back.

Record v1 is a flat hash. Its MAC covers every field, the vector and the guards' profile too, so that nobody who can
write to Redis can forge an answer or point a true one at another question. Values are plain JSON of our own shape:
nothing in a record can name a class.

Record v2 is the same encrypted: all that Redis need not read is one ciphertext in place of the answer, which opens
beside the very fields that it was stored with and no others. The MAC covers that hash as it covers the other one.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Final, Literal, TypeVar

import orjson
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, Generation
from pydantic import BaseModel

from langchain_aegis.cut_answers import rests_on_a_part
from langchain_aegis.messages import dumps, is_simple, loads
from langchain_aegis.nonces import nonces
from langchain_aegis.seals import Seal

M = TypeVar("M", bound=BaseModel)

# Of a stored record; the last signs the others.
FIELDS: Final = (
    "v", "key", "scope", "fields", "emb", "digest", "created_ms", "fresh_ms", "expires_ms", "epochs", "answer",
    "negative", "profile", "vec", "src", "sets", "task", "question", "mac",
)  # fmt: skip
_LENGTHS: Final = struct.Struct(f">{len(FIELDS) - 1}Q")
_NAMES: Final = tuple(name.encode() for name in FIELDS)
# What Redis searches, counts, expires, invalidates and removes by; all else can be encrypted.
CLEAR: Final = frozenset({"v", "key", "scope", "emb", "created_ms", "expires_ms", "epochs", "vec", "sets"})
_HIDDEN: Final = tuple(at for at, name in enumerate(FIELDS[:-1]) if name not in CLEAR)  # places in FIELDS
_HIDDEN_LENGTHS: Final = struct.Struct(f">{len(_HIDDEN)}Q")
_ANSWER: Final = FIELDS.index("answer")

# How a model says why it stopped; only the first line's values mean that the answer is complete.
_COMPLETE = frozenset({"stop", "end_turn", "stop_sequence", "STOP", "eos", "eos_token"})
_COMPLETE_CALL = frozenset({"tool_calls", "tool_use", "function_call"})
_REASON_FIELDS = ("done_reason", "finish_reason", "stop_reason")

# What is kept of response_metadata: what describes the answer. Timings and ids belong to the call that made it.
_KEPT_METADATA = frozenset(
    {"model", "model_name", "model_provider", "done", "system_fingerprint", "output_version", *_REASON_FIELDS}
)


@dataclass(kw_only=True, slots=True)  # not frozen: making one of each record that is read would take four times as long
class Record:
    """One answer as it lies in Redis.

    Attributes:
        key: The exact key, which is also part of the record's name.
        scope: The scope, or "".
        fields: Short digests of the scope's parts, see `keys.written_fields`: so `explain` can say which one differs.
        emb: Id of the embedder that made `vec`, or "".
        digest: The model's digest when the answer was made, or "".
        created_ms: Unix time in milliseconds.
        fresh_ms: Unix time in milliseconds from which the answer is stale.
        expires_ms: Unix time in milliseconds after which the record is never served.
        epochs: The namespace's incarnation and clock, as they were before the answer was made.
        answer: The answer as JSON, see `encode_answer`.
        profile: What the guards need to know about the question, or b"".
        vec: The question's vector as float16, little endian, or b"".
        negative: Whether it says that there is no answer; such answers are kept for a shorter time.
        src: Names of the documents that the answer rests on.
        sets: Names of the sets that list the record: tenant, user, task, model, sources.
        task: Name of the task, or "".
        question: The question's text if it is kept, else "".
    """

    key: str
    scope: str
    emb: str
    digest: str
    created_ms: int
    expires_ms: int
    epochs: str
    answer: bytes
    fields: str = ""
    fresh_ms: int = 0
    negative: bool = False
    profile: bytes = b""
    vec: bytes = b""
    src: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    task: str = ""
    question: str = ""

    def sealed(self, seal: Seal) -> dict[str, bytes]:
        """Return the record as Redis fields, signed; a field that is empty is left out, which saves Redis its name."""
        values: dict[str, bytes] = {"v": seal.version}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, tuple):
                value = ",".join(value)
            elif isinstance(value, bool):
                value = "1" if value else ""
            values[f.name] = value if isinstance(value, bytes) else str(value or "").encode("utf-8", "surrogatepass")
        ordered = [values[name] for name in FIELDS[:-1]]
        if seal.encrypts:
            ordered = _hidden(ordered, seal)
        told = zip(FIELDS, [*ordered, seal.sign(_joined(ordered))], strict=True)
        return {name: value for name, value in told if value}


def unseal(stored: Mapping[bytes, bytes], seal: Seal) -> Record | None:
    """Return the record in `stored`, or None if it is damaged, forged, or of another version.

    Unknown fields are ignored; they are not signed and not read.
    """
    return unseal_values(in_order(stored), seal)


def in_order(stored: Mapping[bytes, bytes]) -> Sequence[Any]:
    """Return the values of `FIELDS` in this order; None where there is none."""
    return [stored.get(name) for name in _NAMES]


def unseal_values(stored: Sequence[Any], seal: Seal) -> Record | None:
    """Do what `unseal` does, with the values of `FIELDS` in this order; None where there is none."""
    try:
        *values, mac = [value or b"" for value in stored]
        if values[0] != seal.version:
            seal.other(values[0])
            return None
        if not seal.holds(mac, b"".join((_LENGTHS.pack(*map(len, values)), *values))):  # `_joined`, on the way of hits
            return None
        if seal.encrypts:
            values = _shown(values, mac, seal)
        (_, key, scope, told, emb, digest, created_ms, fresh_ms, expires_ms, epochs, answer, negative, profile, vec,
         src, sets, task, question) = values  # fmt: skip
        return Record(
            key=key.decode(), scope=scope.decode(), emb=emb.decode(), digest=digest.decode("utf-8", "surrogatepass"),
            created_ms=int(created_ms), fresh_ms=int(fresh_ms or 0), expires_ms=int(expires_ms), epochs=epochs.decode(),
            fields=told.decode(), negative=bool(negative), answer=answer, profile=profile, vec=vec,
            src=tuple(src.decode().split(",")) if src else (), sets=tuple(sets.decode().split(",")) if sets else (),
            task=task.decode("utf-8", "surrogatepass"), question=question.decode("utf-8", "surrogatepass"),
        )  # fmt: skip
    except (ValueError, AttributeError, TypeError, struct.error):
        return None


def claimed(stored: Sequence[Any]) -> Record | None:
    """Return what Redis works with of a record that cannot be unsealed, to remove it: it may be forged.

    Args:
        stored: The values of `FIELDS` in this order; None where there is none.
    """
    told = {name: value or b"" for name, value in zip(FIELDS, stored, strict=True)}
    try:
        return Record(
            key=told["key"].decode(), scope="", emb=told["emb"].decode(), digest="", created_ms=int(told["created_ms"]),
            expires_ms=int(told["expires_ms"]), epochs=told["epochs"].decode(), answer=b"", vec=told["vec"],
            sets=tuple(told["sets"].decode().split(",")),
        )  # fmt: skip
    except (ValueError, AttributeError, TypeError):
        return None


def _joined(values: Sequence[bytes]) -> bytes:
    """Return the values of a record, in the order of `FIELDS`, as what is signed: all lengths, then all values."""
    return b"".join((_LENGTHS.pack(*map(len, values)), *values))


def _hidden(values: Sequence[bytes], seal: Seal) -> list[bytes]:
    """Return a record's values with those that Redis need not read as one ciphertext in place of the answer."""
    secret = [values[at] for at in _HIDDEN]
    clear = [value if at not in _HIDDEN else b"" for at, value in enumerate(values)]
    about = _joined(clear)  # the exact key first of all: moved to another record, it does not open
    clear[_ANSWER] = seal.hide(b"".join((_HIDDEN_LENGTHS.pack(*map(len, secret)), *secret)), about)
    return clear


def _shown(values: list[bytes], signature: bytes, seal: Seal) -> list[bytes]:
    """Return what `_hidden` was given. Raises ValueError if it was given something else."""
    shown = [*values[:_ANSWER], b"", *values[_ANSWER + 1 :]]
    data = seal.show(values[_ANSWER], _joined(shown), signature)
    if data is None:
        raise ValueError("not encrypted for this record")
    place = _HIDDEN_LENGTHS.size
    for at, length in zip(_HIDDEN, _HIDDEN_LENGTHS.unpack_from(data), strict=True):
        shown[at] = data[place : place + length]
        place += length
    return shown


def refusal(generations: Sequence[Generation]) -> str | None:
    """Return why these generations must not be stored, as a reason code, or None.

    Only a complete answer is stored: a cut one would be served again and again. A plain `Generation` need not say why
    the model stopped; if it does, it must be complete too.
    """
    if not generations:
        return "empty"
    for generation in generations:
        said: list[Mapping[str, Any]] = [generation.generation_info or {}]
        if rests_on_a_part([generation]):
            return "part_of_prompt"
        if not isinstance(generation, ChatGeneration):
            if not generation.text:
                return "empty"
            if _is_cut(said, _COMPLETE):
                return "incomplete"
            continue
        message = generation.message
        if not isinstance(message, AIMessage):
            return "not_an_answer"
        if message.invalid_tool_calls:
            return "invalid_tool_calls"
        if not message.content and not message.tool_calls:
            return "empty"
        said.append(message.response_metadata)
        if not _reasons(said) or _is_cut(said, _COMPLETE | _COMPLETE_CALL if message.tool_calls else _COMPLETE):
            return "incomplete"
    return None


def _reasons(said: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return every reason that is given for the end of an answer."""
    return [told[name] for told in said for name in _REASON_FIELDS if told.get(name) is not None]


def _is_cut(said: Sequence[Mapping[str, Any]], complete: frozenset[str]) -> bool:
    """Return whether anything that is said about an answer tells that it is not complete."""
    return any(told.get("done") is False for told in said) or any(reason not in complete for reason in _reasons(said))


def calls_tools(generations: Sequence[Generation]) -> bool:
    """Return whether an answer asks for a tool; such answers are served on an exact repeat only."""
    return any(isinstance(g, ChatGeneration) and isinstance(g.message, AIMessage) and g.message.tool_calls
               for g in generations)  # fmt: skip


def encode_answer(generations: Sequence[Generation]) -> bytes:
    """Write generations as JSON. Raises TypeError or ValueError if they hold what JSON cannot."""
    data = dumps({"kind": "plain", "items": [_plain(g) for g in generations]}, sort=False)
    # It is said here, once, whether the quick parser reads it exactly, so that no hit has to look.
    return data if is_simple(data) else data.replace(_PLAIN, _ANY, 1)


def decode_answer(data: bytes, *, marks: Mapping[str, Any] | None = None) -> list[Generation] | None:
    """Return fresh generations, or None if `data` holds none.

    Args:
        data: What `encode_answer` wrote.
        marks: Put into each message's `response_metadata["aegis_cache"]`.
    """
    try:
        if not data.startswith((_PLAIN, _ANY)):
            return None
        document = orjson.loads(data) if data.startswith(_PLAIN) else loads(data)
        return [_revived(item, marks) for item in document["items"]] or None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def encode_value(value: Any) -> bytes:
    """Write a pipeline's answer: JSON that may hold messages of the model and documents at any depth.

    Raises TypeError or ValueError if it holds anything else.
    """
    item = _tree(value)
    data = dumps({"kind": "value", "item": item}, sort=False)
    if loads(data)["item"] != item:
        raise TypeError("the value is not plain JSON: it would come back changed")
    return data


def decode_value(data: bytes, *, marks: Mapping[str, Any] | None = None) -> tuple[Literal[True], Any] | None:
    """Return (True, value), or None if `data` holds no value."""
    try:
        document = loads(data)
        return (True, _grown(document["item"], marks)) if document["kind"] == "value" else None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def messages_in(value: Any) -> list[AIMessage]:
    """Return the model's messages that a pipeline's answer holds."""
    if isinstance(value, AIMessage):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [m for v in value for m in messages_in(v)] if isinstance(value, (list, tuple)) else []


_PLAIN: Final = b'{"kind":"plain",'
_ANY: Final = b'{"kind":"generations",'

_TAG = "__aegis__"  # marks what is no plain JSON; a value that holds this name itself is not kept


def _tree(value: Any) -> Any:
    """Return `value` with messages and documents as plain JSON."""
    if isinstance(value, AIMessage):
        return {_TAG: "message", "item": _message_fields(value)}
    if isinstance(value, Document):
        return {_TAG: "document", "item": [value.page_content, _tree(value.metadata), value.id]}
    if isinstance(value, BaseMessage):
        raise TypeError("only the model's own messages can be kept")
    if isinstance(value, dict):
        if _TAG in value:
            raise TypeError(f"a value must not have the name {_TAG}")
        return {name: _tree(v) for name, v in value.items()}
    return [_tree(v) for v in value] if type(value) is list else value


def _grown(item: Any, marks: Mapping[str, Any] | None) -> Any:
    if isinstance(item, list):
        return [_grown(i, marks) for i in item]
    if not isinstance(item, dict):
        return item
    if (kind := item.get(_TAG)) is None:
        return {name: _grown(v, marks) for name, v in item.items()}
    if kind == "message":
        return _revived_message(item["item"], marks)
    if kind == "document":
        text, metadata, identity = item["item"]
        return Document(text, metadata=_grown(metadata, marks), id=identity)
    raise ValueError(f"unknown kind {kind!r}")


def _plain(generation: Generation) -> dict[str, Any]:
    if isinstance(generation, ChatGeneration):
        if not isinstance(generation.message, AIMessage):
            raise TypeError("not an answer")
        return {"message": _message_fields(generation.message)}
    return {"text": generation.text, "info": generation.generation_info}


def _message_fields(message: AIMessage) -> dict[str, Any]:
    """Return what is kept of a message; what is empty is left out: most answers are text and nothing else."""
    told = message.response_metadata
    more = {
        "tool_calls": [{"name": c["name"], "args": c["args"], "id": c["id"]} for c in message.tool_calls],
        "extra": message.additional_kwargs,
        "name": message.name,
        "took_ns": told.get("total_duration"),
    }
    return {
        "content": message.content,
        "usage": _counts(message.usage_metadata),
        "metadata": {k: v for k, v in told.items() if k in _KEPT_METADATA},
        **{name: value for name, value in more.items() if value not in (None, [], {})},
    }


def _revived(item: dict[str, Any], marks: Mapping[str, Any] | None) -> Generation:
    if "message" not in item:
        if not isinstance(item["text"], str):
            raise TypeError("not a text")
        return Generation(text=item["text"], generation_info=item["info"])
    message = _revived_message(item["message"], marks)
    told = _plain_generation().__dict__.copy()
    told["text"], told["message"] = message.text, message
    return _like(_plain_generation(), told)


def _revived_message(item: dict[str, Any], marks: Mapping[str, Any] | None) -> AIMessage:
    """Return the message that `_message_fields` took apart; `item`, parsed for it alone, becomes part of it."""
    metadata = item["metadata"]
    if marks is not None:
        metadata["aegis_cache"] = told_of_hit = dict(marks)
        if isinstance(took_ns := item.get("took_ns"), int):
            told_of_hit["generation_s"] = round(took_ns / 1e9, 3)
    content, calls, extra, name = item["content"], item.get("tool_calls", []), item.get("extra", {}), item.get("name")
    usage = _usage(item["usage"])
    # A new id per hit: with the old one, LangGraph's add_messages would replace the earlier message.
    identity = f"aegis-{nonces.draw().hex()}"
    if type(content) is not str or calls or extra:
        return AIMessage(
            content=content, id=identity, name=name,
            tool_calls=[{"name": c["name"], "args": c["args"], "id": c["id"], "type": "tool_call"} for c in calls],
            additional_kwargs=extra, response_metadata=metadata, usage_metadata=usage,
        )  # fmt: skip
    # What was a message when it was signed needs no second check; that takes as long as asking Redis.
    told = _plain_message().__dict__.copy()
    told["content"], told["id"], told["name"] = content, identity, name
    told["additional_kwargs"], told["response_metadata"], told["usage_metadata"] = extra, metadata, usage
    told["tool_calls"], told["invalid_tool_calls"] = calls, []
    return _like(_plain_message(), told)


_put_fields, _put_set, _put_extra, _put_private = (
    BaseModel.__dict__[name].__set__
    for name in ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")
)  # as object.__setattr__ finds them each time


def _like(model: M, told: dict[str, Any]) -> M:
    """Return a model of the same kind with the fields `told`, all of them; nothing is checked or copied."""
    made = object.__new__(type(model))
    _put_fields(made, told)
    _put_set(made, model.__pydantic_fields_set__.copy())
    _put_extra(made, None if model.__pydantic_extra__ is None else {})
    _put_private(made, None)
    return made


@cache
def _plain_message() -> AIMessage:
    """Return a message of the model; everything in it that can change must be replaced in a copy."""
    return AIMessage(
        content="", id="", name=None, tool_calls=[], additional_kwargs={}, response_metadata={}, usage_metadata=None,
        invalid_tool_calls=[],
    )  # fmt: skip


@cache
def _plain_generation() -> ChatGeneration:
    return ChatGeneration(message=_plain_message())


def _counts(usage: Mapping[str, Any] | None) -> list[Any]:
    """Return the counts of tokens read and written, and what they do not tell, if there is anything."""
    more = dict(usage or {})
    more.pop("total_cost", None)
    read, written = int(more.pop("input_tokens", 0) or 0), int(more.pop("output_tokens", 0) or 0)
    if (total := int(more.pop("total_tokens", 0) or 0)) not in (0, read + written):
        more["total_tokens"] = total
    told = {name: value for name, value in more.items() if value is not None}
    return [read, written, told] if told else [read, written]


def _usage(counts: Sequence[Any]) -> Any:
    """Return usage with every required count, marked as read from a cache; event streams fail without the counts."""
    read, written, *more = counts
    if type(read) is not int or type(written) is not int:
        raise TypeError("not a count")
    told: dict[str, Any] = {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
    for other in more:
        told.update(other)
    told["input_token_details"] = {**told.get("input_token_details", {}), "cache_read": read}
    return told
