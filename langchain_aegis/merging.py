"""Decide which chat calls may share one answer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import orjson
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatResult
from langchain_core.tracers.base import AsyncBaseTracer, BaseTracer

from langchain_aegis.calls import Entry, whose
from langchain_aegis.copies import CHAT_FORMS
from langchain_aegis.flights import Flights
from langchain_aegis.identity import PREFIX
from langchain_aegis.scope import current
from langchain_aegis.servers import server_of

_TRACING_ONLY = ("ls_structured_output_format", "structured_output_format")
_NOT_SENT = frozenset({"id", "usage_metadata", "artifact"})
_METADATA_SENT = ("model_provider", "output_version")  # decide how a message is written on the wire


def key_of(
    model: BaseChatModel, prompt: str | Sequence[BaseMessage], stop: list[str] | None, kwargs: Mapping[str, Any],
    entry: Entry[ChatResult], *, cached: bool, looked_up: str | None,
) -> tuple[Hashable, ...] | None:  # fmt: skip
    """Return what a call must have in common with another to share its answer, or None if it must not.

    Args:
        model: The model that makes the call.
        prompt: A text, or the messages.
        stop: As in `invoke`.
        kwargs: The call's other arguments.
        entry: The call.
        cached: A cache keeps the answer, so others get the same one anyway. If not, the call must be deterministic.
        looked_up: When the cache was asked for the call, in the cache's own counting ("" if it does not tell); None:
            it was not asked. Whoever was looked up after an invalidation must not join a call that began before it.
    """
    if not entry.may_share or current().cache != "use":
        return None
    params = model._identifying_params
    if not (cached or _is_deterministic(model, params, kwargs)):
        return None
    said = canonical(prompt)
    if said is None or (entry.admission.full and not chat_flights.flies(said)):
        return None  # the second: it will be refused, and that has to be quick
    asker = whose(entry.config)
    if asker is None:
        return None
    return said, _model_key(model, params, stop, kwargs), asker, looked_up


def reads_tokens(run_manager: Any) -> bool:
    """Whether one of the caller's handlers wants each token; tracers only note them."""
    return run_manager is not None and any(
        type(handler).on_llm_new_token not in _NOTES_TOKENS and not handler.ignore_llm
        for handler in run_manager.handlers
    )


def canonical(prompt: str | Sequence[BaseMessage]) -> bytes | None:
    """Return what the model sees of `prompt`, or None if that cannot be told exactly.

    Leans to one side: whatever is not known to leave the answer alone makes two prompts different.
    """
    if isinstance(prompt, str):
        return b"human " + prompt.encode("utf-8", "surrogatepass")
    seen = []
    for message in prompt:
        fields = {name: value for name, value in message.__dict__.items() if value and name not in _NOT_SENT}
        if metadata := fields.pop("response_metadata", None):
            fields["response_metadata"] = [metadata.get(name) for name in _METADATA_SENT]
        seen.append([type(message).__name__, fields, message.__pydantic_extra__ or {}])
    text = prompt[0].content if len(prompt) == 1 else None
    if isinstance(text, str) and seen == [["HumanMessage", {"content": text, "type": "human"}, {}]]:
        return canonical(text)
    try:
        return orjson.dumps(seen, option=orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_DATETIME)
    except TypeError:  # holds something that JSON cannot say
        return None


def _is_deterministic(model: BaseChatModel, params: Mapping[str, Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the model is told to give the same answer every time: temperature 0, or a seed."""
    options = kwargs.get("options")
    told = {**options, **kwargs} if isinstance(options, dict) else kwargs

    def value(name: str) -> Any:
        return told[name] if name in told else params.get(name, model.__dict__.get(name))

    temperature = value("temperature")
    return value("seed") is not None or (
        isinstance(temperature, (int, float)) and not isinstance(temperature, bool) and temperature == 0
    )


def _model_key(
    model: BaseChatModel, params: Mapping[str, Any], stop: list[str] | None, kwargs: Mapping[str, Any]
) -> Hashable:
    """Return a value that is equal only for models and options that give the same answers."""
    sent = {name: value for name, value in kwargs.items() if name not in _TRACING_ONLY} if kwargs else kwargs
    if type(model)._get_llm_string is not BaseChatModel._get_llm_string:
        named = model._get_llm_string(stop=stop, **sent)
        if named.startswith(PREFIX):
            return server_of(model), named
        return id(model), named
    # LangChain's form is slow to make and often names no model, so a model is equal to itself only. What may be
    # set on it between two calls counts too.
    options = repr(sorted(sent.items())) if sent else ""
    return id(model), model.__dict__.get("model"), repr(params), repr(stop), options


chat_flights: Flights[ChatResult] = Flights(CHAT_FORMS)
_NOTES_TOKENS = {
    BaseCallbackHandler.on_llm_new_token,
    AsyncCallbackHandler.on_llm_new_token,
    BaseTracer.on_llm_new_token,
    AsyncBaseTracer.on_llm_new_token,
}
