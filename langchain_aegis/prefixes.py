"""What admission may know of a chat call: how its prompt begins, whose it is, what the server must have loaded."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.identity import normalise_model
from langchain_aegis.options import Call
from langchain_aegis.reloads import RUNNER_OPTIONS
from langchain_aegis.scope import who
from langchain_aegis.settings import AegisSettings
from langchain_aegis.traits import Traits

BLOCK_CHARS = 512  # of a prompt: about 128 tokens
_MOST_BLOCKS = 256  # what follows 131,072 characters is rarely shared by what began alike


def traits_of_chat(
    model: BaseChatModel, prompt: str | Sequence[BaseMessage], kwargs: Mapping[str, Any], *, tenant: str | None = None
) -> Traits:
    """Return the traits of one call; never raises, and reads the prompt only when its beginning is asked for.

    Args:
        model: The model inside, whose attributes `model` (or `model_name`) and runner options are read.
        prompt: A text, or the messages.
        kwargs: Arguments of the call, which go before the model's attributes.
        tenant: Whose call it is; found out if None.
    """
    told = model.__dict__
    options = kwargs.get("options")
    given = {**options, **kwargs} if isinstance(options, Mapping) else kwargs
    name = _model_name(told, given)
    runner: tuple[Any, ...] | None = None
    if name is not None:
        # Only what Ollama's clients have; of others, such as vLLM's, the model's name alone decides.
        runner = (name, *(_plain(given[o] if o in given else told.get(o)) for o in RUNNER_OPTIONS))
    tools = kwargs.get("tools")
    return Traits(
        tenant=_tenant() if tenant is None else tenant,
        model=name,
        runner=runner,
        prefix=functools.partial(prefix_of, prompt, tools),
    )


def counted_as(model: BaseChatModel, kwargs: Mapping[str, Any]) -> Traits:
    """Return of a call's traits only those by which it is counted; arguments as in `traits_of_chat`."""
    return Traits(_tenant(), _model_name(model.__dict__, kwargs))


def traits_of_request(call: Call, body: Mapping[str, Any]) -> Traits:
    """Return the traits of a request to Ollama: what it asks for, and its body."""
    model = normalise_model(call.model)
    runner = (model, *(call.options.get(name) for name in RUNNER_OPTIONS[:-1]), call.shift)
    prefix = functools.partial(prefix_of, body["messages"], body.get("tools"))
    return Traits(tenant=_tenant(), model=model, runner=runner, prefix=prefix)


def prefix_of(prompt: str | Sequence[BaseMessage | Mapping[str, Any]], tools: Any = None) -> tuple[int, ...]:
    """Return a digest of each beginning of a prompt that is a whole number of blocks of `BLOCK_CHARS` characters.

    Two prompts share their first n blocks when the first n digests are equal. For this process only; no secret.
    """
    text = "\x1e".join(_texts(prompt))[: _MOST_BLOCKS * BLOCK_CHARS]
    state = hash(repr(tools)) if tools else 0  # a server writes them before everything else
    states = []
    for start in range(0, len(text) - BLOCK_CHARS + 1, BLOCK_CHARS):
        state = hash((state, text[start : start + BLOCK_CHARS]))
        states.append(state)
    return tuple(states)


def _texts(prompt: str | Sequence[BaseMessage | Mapping[str, Any]]) -> Iterator[str]:
    if isinstance(prompt, str):
        yield "human"
        yield prompt
        return
    for message in prompt:
        if isinstance(message, BaseMessage):
            role, content = message.type, message.content
        else:
            role, content = message["role"], message.get("content") or ""
        yield role
        yield content if isinstance(content, str) else repr(content)


def _model_name(told: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    name = given.get("model") or told.get("model") or told.get("model_name")
    if not isinstance(name, str):
        return None
    return normalise_model(name) if "num_ctx" in told else name


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool)) else None


def _tenant() -> str | None:
    try:
        return who(*_keys())[0]
    except AegisConfigError:  # somebody is named who cannot be; for turns it is nobody
        return None


@functools.cache
def _keys() -> tuple[str | None, str | None]:
    try:
        settings = AegisSettings.from_env()
    except AegisConfigError:  # said by whoever needs that setting
        settings = AegisSettings()
    return settings.tenant_key, settings.user_key
