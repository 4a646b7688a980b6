"""The chat models behind a router: which one a task has, and which of them are down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from langchain_core.caches import BaseCache
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import BaseChatModel

from langchain_aegis.breaker import Breaker
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.model_parts import parse_llm_string
from langchain_aegis.notices import warn_once
from langchain_aegis.recached import Recached

Fallback = Mapping[str, str | Sequence[str]] | Sequence[str]

_WIDTH = 20  # items of a batch under way, for a model without bounds of its own


class Fleet:
    """Models by task; see `AegisRouter` for the arguments.

    Attributes:
        models: Task -> model.
        default: The task whose model answers all others.
        recheck_s: Seconds for which a model that is down is left alone.
        breakers: Task -> whether its model is down.
    """

    def __init__(
        self,
        models: Mapping[str, BaseChatModel | str],
        default: str,
        fallback: Fallback | None,
        recheck_s: float,
        clock: Callable[[], float],
    ) -> None:
        if not isinstance(models, Mapping) or not models:
            raise AegisConfigError('models must be a mapping with at least one entry, such as {"chat": "llama3.2:3b"}')
        if isinstance(recheck_s, bool) or not isinstance(recheck_s, (int, float)) or not 0 <= recheck_s < float("inf"):
            raise AegisConfigError(f"recheck_s must be a number of seconds from 0 on, got {recheck_s!r}")
        _check_known([default], models, "default")
        self._chains = _chains(models, fallback)
        self.models = {name: _chat_model(name, model) for name, model in models.items()}
        self.default = default
        self.recheck_s = recheck_s
        self.breakers = {name: Breaker(1, recheck_s, clock) for name in models}
        self._mixed: Mapping[str, BaseChatModel] | None = None

    def over(self, change: Callable[[BaseChatModel], BaseChatModel]) -> Self:
        """Return the same fleet with changed models; both learn from each other which ones are down."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.models, other._mixed = {name: change(model) for name, model in self.models.items()}, None
        return other

    def known(self, name: object) -> str:
        """Return `name` if a model has it, else the default."""
        return name if isinstance(name, str) and name in self.models else self.default

    def chain(self, name: object) -> tuple[str, ...]:
        """Return the names of the models that may answer a task, its own first."""
        return self._chains[self.known(name)]

    def engine(self, name: str) -> BaseChatModel:
        """Return the model of `name`, without its cache where the cache would mix it up with another one."""
        model = self.models[name]
        if not (isinstance(model.cache, BaseCache) or get_llm_cache() is not None):
            return model
        if self._mixed is None:
            self._mixed = _mixed(self.models)
        return self._mixed.get(name, model)

    @property
    def width(self) -> int:
        """How many items of a batch are under way at most."""
        bounds = [(getattr(m, "admission", None), getattr(m, "max_batch", 0)) for m in self.models.values()]
        return sum(_WIDTH if admission is None else admission.max_concurrency + ahead for admission, ahead in bounds)


def _chat_model(name: object, model: object) -> BaseChatModel:
    if not isinstance(name, str) or not name.strip():
        raise AegisConfigError(f"the name of a task must be a text that is not blank, got {name!r}")
    if isinstance(model, BaseChatModel):
        return model
    if not isinstance(model, str):
        raise AegisConfigError(f"the model for {name!r} must be a chat model or a name, got {type(model).__name__}")
    from langchain_aegis.chat_models import ChatAegis

    return ChatAegis(model=model)


def _check_known(names: Sequence[object], models: Mapping[str, Any], what: str) -> None:
    for name in names:
        if not isinstance(name, str) or name not in models:
            raise AegisConfigError(f"{what} names {name!r}, but the models are for {', '.join(map(repr, models))}")


def _chains(models: Mapping[str, Any], fallback: Fallback | None) -> dict[str, tuple[str, ...]]:
    """Return for each task the names of the models to ask, in order."""
    if isinstance(fallback, Mapping):
        _check_known(list(fallback), models, "fallback")
        told = dict(fallback)
    else:
        told = dict.fromkeys(models, fallback or ())
    chains = {}
    for name in models:
        others = told.get(name, ())
        if not isinstance(others, (str, Sequence)):
            raise AegisConfigError(f"fallback must name models: a name, a list, or a mapping to them; got {others!r}")
        names = [others] if isinstance(others, str) else list(others)
        _check_known(names, models, "fallback")
        chains[name] = tuple(dict.fromkeys([name, *names]))
    return chains


def _mixed(models: Mapping[str, BaseChatModel]) -> dict[str, BaseChatModel]:
    """Return, without their cache, the models that have one key in one cache although they are not the same."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name, model in models.items():
        text = model._get_llm_string()
        part = parse_llm_string(text)
        if part is None or part.name is None:
            cache = id(model.cache) if isinstance(model.cache, BaseCache) else 0
            groups.setdefault((text, cache), []).append(name)
    mixed = [name for names in groups.values() if len({id(models[n]) for n in names}) > 1 for name in names]
    if mixed:
        warn_once(
            "unnamed_models",
            f"the models for {', '.join(map(repr, mixed))} have the same cache key, which names no model: their answers"
            " would mix, so they are not cached. ChatAegis has a key that says everything",
        )
    return {name: Recached(inner=models[name], cache=False) for name in mixed}
