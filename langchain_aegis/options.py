"""Merge a model's options with those of one call into one checked request. Pure: no network, no LangChain."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from pydantic import ValidationError

from langchain_aegis.errors import AegisOptionError
from langchain_aegis.identity import identify, llm_string

# Ollama's options and what they hold (api/types.go of 0.33; those from mirostat on are read by older servers only).
# The server ignores an unknown name in silence, and answers 500 to a wrong type.
MODEL_OPTIONS: dict[str, type] = {
    **dict.fromkeys(("num_keep", "seed", "num_predict", "top_k", "repeat_last_n"), int),
    **dict.fromkeys(("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict"), int),
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "repeat_penalty"), float),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), float),
    "use_mmap": bool,
    "mirostat": int,
    **dict.fromkeys(("mirostat_eta", "mirostat_tau", "tfs_z"), float),
    **dict.fromkeys(("numa", "low_vram", "use_mlock", "penalize_newline"), bool),
}
ALIASES = {"max_tokens": "num_predict", "think": "reasoning"}

# Further arguments of a call; those of the last line are LangChain's, and say nothing to Ollama.
CALL_ARGUMENTS = frozenset(
    {"model", "options", "reasoning", "format", "response_format", "logprobs", "top_logprobs", "keep_alive", "tools",
     "tool_choice", "truncate", "shift", "timeout", "stream",
     "strict", "ls_structured_output_format", "structured_output_format"}
)  # fmt: skip
_KNOWN = frozenset({*MODEL_OPTIONS, *ALIASES, *CALL_ARGUMENTS, "stop"})
_KNOWN_OPTIONS = frozenset({*MODEL_OPTIONS, *ALIASES, "stop"})
_BIG = 2**63  # what JSON and Go hold exactly; not a number and infinity are outside
_WORDS = {int: "a whole number", float: "a number", bool: "True or False"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """Everything that one call asks for, apart from its messages."""

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)  # without `stop`; no None
    stop: tuple[str, ...] | None = None
    tools: list[Mapping[str, Any]] | None = None
    tool_choice: Any = None
    format: str | Mapping[str, Any] | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    keep_alive: float | str | None = None
    truncate: bool | None = None
    shift: bool | None = None
    timeout_s: float | None = None

    def identity(self, **fields: Any) -> dict[str, Any]:
        """Return what of this call decides about the answer; see `identity.identify`."""
        return identify(
            model=self.model,
            options=self.options,
            stop=self.stop,
            tools=self.tools,
            tool_choice=self.tool_choice,
            format=self.format,
            think=self.think,
            logprobs=self.logprobs or None,
            top_logprobs=self.top_logprobs,
            truncate=self.truncate,
            shift=self.shift,
            **fields,
        )

    def request(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the body of a `/api/chat` request; fields that say nothing are left out."""
        options = {**self.options, "stop": list(self.stop)} if self.stop is not None else dict(self.options)
        fields = {
            "model": self.model,
            "messages": messages,
            "tools": self.tools,
            "format": self.format or None,
            "options": options,
            "think": self.think,
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs,
            "keep_alive": self.keep_alive,
            "truncate": self.truncate,
            "shift": self.shift,
        }
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Standing:
    """What a model asks for in a call without arguments. Models with equal options share it: not to be changed.

    Attributes:
        call: The call.
        output_version: LangChain's form of the message, if it is another than Ollama's.
    """

    call: Call
    output_version: str | None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides about the answers."""
        return self.call.identity(output_version=self.output_version)

    @cached_property
    def llm_string(self) -> str:
        """The identity as the text that LangChain passes to a cache; see `identity.llm_string`."""
        return llm_string(self.identity)


@lru_cache(maxsize=256, typed=True)  # typed: 1, 1.0 and True are sent as they are
def standing(
    model: str,
    stop: tuple[str, ...] | None,
    form: str | Mapping[str, Any] | None,
    think: bool | str | None,
    logprobs: bool | None,
    top_logprobs: int | None,
    keep_alive: float | str,
    truncate: bool,
    output_version: str | None,
    *options: Any,
) -> Standing:
    """Return what a model with these values asks for, worked out once.

    `options` are those of `MODEL_OPTIONS`, in its order.

    Raises:
        AegisOptionError: `keep_alive` is none.
        TypeError: A value, such as a schema, cannot be a key; `standing.__wrapped__` takes it.
    """
    call = Call(
        model=model,
        options={name: value for name, value in zip(MODEL_OPTIONS, options, strict=True) if value is not None},
        stop=stop,
        format=form,
        think=think,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        keep_alive=check_keep_alive(keep_alive),
        truncate=truncate,
    )
    return Standing(call, output_version)


def merge(
    defaults: Call,
    arguments: Mapping[str, Any],
    *,
    stop: Any = None,
    resolve_format: Callable[[Any, Any], Any] = lambda given, _: given,
) -> Call:
    """Return `defaults` with the arguments of one call merged over them.

    An option that is None keeps the model's; `options={...}` adds to the model's options, and an argument of the
    call's own wins over both. `stop` replaces the model's.

    Args:
        defaults: What the model was made with.
        arguments: Keyword arguments of the call.
        stop: Texts that end the answer, or None for the model's.
        resolve_format: Makes Ollama's `format` of a `format` and an OpenAI-like `response_format`.

    Raises:
        AegisOptionError: A name is unknown (the message names the nearest known one) or a value has the wrong type.
    """
    if not arguments:
        return defaults if stop is None else _but(defaults, stop=check_stop(stop))
    check_names(arguments, _KNOWN, "option")
    given = resolve_aliases(arguments)
    inner = given.get("options")
    if inner is not None and not isinstance(inner, Mapping):
        raise AegisOptionError(f"options must be a mapping of names to values, got {inner!r}")
    told = resolve_aliases(inner or {})
    check_names(told, _KNOWN_OPTIONS, "option in options={...}")
    told.update({name: value for name, value in given.items() if name in MODEL_OPTIONS and value is not None})
    inner_stop = told.pop("stop", None)
    options = {name: check_option(name, value) for name, value in told.items() if value is not None}
    ends = stop if stop is not None else inner_stop
    changes: dict[str, Any] = {"options": {**defaults.options, **options}}
    if ends is not None:
        changes["stop"] = check_stop(ends)
    # An explicit None of these switches the model's own off, as with ChatOllama.
    changes |= {name: given[name] for name in ("logprobs", "top_logprobs", "truncate", "shift") if name in given}
    if "reasoning" in given:
        changes["think"] = given["reasoning"]
    if given.get("model") is not None:
        changes["model"] = check_model(given["model"])
    if given.get("keep_alive") is not None:
        changes["keep_alive"] = check_keep_alive(given["keep_alive"])
    if given.get("timeout") is not None:
        changes["timeout_s"] = check_timeout(given["timeout"])
    if "format" in given or "response_format" in given:
        form = resolve_format(given.get("format", defaults.format), given.get("response_format"))
        changes["format"] = check_format(form)
    if given.get("tool_choice") != "none" and given.get("tools"):
        changes["tools"] = list(given["tools"])
        changes["tool_choice"] = given.get("tool_choice")
    return _but(defaults, **changes)


def check_names(names: Iterable[str], known: Set[str], what: str) -> None:
    """Raise AegisOptionError for the first name that is not known, with the nearest one that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), sorted(known), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise AegisOptionError(f"unknown {what} {name!r}{hint}")


def resolve_aliases(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return `arguments` under Ollama's own names."""
    resolved = dict(arguments)
    for alias, name in ALIASES.items():
        if alias in resolved:
            value = resolved.pop(alias)
            if value is None:
                continue
            if resolved.get(name) is not None and resolved[name] != value:
                raise AegisOptionError(f"{alias} and {name} are one option, got {value!r} and {resolved[name]!r}")
            resolved[name] = value
    return resolved


def check_option(name: str, value: Any) -> Any:
    """Return an option's value in the type that the server wants; whole floats count as whole numbers."""
    kind = MODEL_OPTIONS[name]
    if isinstance(value, bool):
        if kind is bool:
            return value
    elif isinstance(value, (int, float)) and -_BIG <= value < _BIG and kind is not bool:
        if kind is float:
            return value
        if float(value).is_integer():
            return int(value)
    raise AegisOptionError(f"{name} must be {_WORDS[kind]}, got {value!r}")


def check_stop(stop: Any) -> tuple[str, ...]:
    """Return the texts that end an answer; one text stands for itself."""
    texts = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, (list, tuple, set)) else None
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise AegisOptionError(f"stop must be a list of texts, got {stop!r}")
    return texts


def check_model(model: Any) -> str:
    """Return a model's name."""
    if not isinstance(model, str) or not model.strip():
        raise AegisOptionError(f"model must be the name of a model, got {model!r}")
    return model


def check_format(form: Any) -> str | Mapping[str, Any] | None:
    """Return Ollama's `format`: nothing, "json" or a JSON schema."""
    if form is None or form in ("", "json") or isinstance(form, Mapping):
        return form or None
    raise AegisOptionError(f'format must be "json" or a JSON schema, got {form!r}')


def check_timeout(timeout_s: Any) -> float:
    """Return seconds above 0."""
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < math.inf:
        raise AegisOptionError(f"timeout must be a number of seconds above 0, got {timeout_s!r}")
    return timeout_s


def check_keep_alive(keep_alive: Any) -> float | str:
    """Return how long the model stays loaded: seconds, or a Go duration such as "30m"; a number in a text counts."""
    if isinstance(keep_alive, str):
        try:
            number = float(keep_alive)
        except ValueError:
            return keep_alive
        keep_alive = number
    if isinstance(keep_alive, bool) or not isinstance(keep_alive, (int, float)) or not math.isfinite(keep_alive):
        raise AegisOptionError(f'keep_alive must be seconds or a duration such as "30m", got {keep_alive!r}')
    return int(keep_alive) if float(keep_alive).is_integer() else keep_alive


def option_error(name: str, exc: ValidationError) -> AegisOptionError:
    """Return what pydantic found wrong with a constructor's arguments, without their values."""
    faults = (f"{'.'.join(map(str, fault['loc'])) or 'arguments'}: {fault['msg']}" for fault in exc.errors())
    return AegisOptionError(f"{name}: {'; '.join(faults)}")


def _but(call: Call, **changes: Any) -> Call:
    return Call(**{name: changes.get(name, getattr(call, name)) for name in Call.__slots__})
