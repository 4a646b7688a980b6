"""The cache for the agents of `langchain.agents.create_agent`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

try:
    from langchain.agents.middleware.types import AgentMiddleware, ModelRequest, ModelResponse
except ImportError as exc:
    raise ImportError(f"{exc}; run: pip install 'langchain-aegis[agents]'", name=exc.name) from exc
from langchain_core.caches import BaseCache
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage

from langchain_aegis.cache import AegisSemanticCache
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.notices import warn_once
from langchain_aegis.recached import Recached
from langchain_aegis.router import AegisRouter


class AegisCacheMiddleware(AgentMiddleware[Any, Any, Any]):
    """Answers an agent's model calls from the cache: `create_agent(model, tools, middleware=[AegisCacheMiddleware()])`.

    It gives the model of each call this cache in place of any other, so a hit is the model's own: it is streamed and
    traced, it is parsed by `response_format`, and it is found under everything that the model really sees, whatever
    the other middleware made of it: system prompt, messages, tools, `response_format`, settings, tenant and user. An
    answer is kept once, also where `set_llm_cache` was called.

    A call whose messages hold the result of a tool is neither kept nor answered, by no cache: what a tool said may
    not be true any more. The call that asks for the tool is. A model with `cache=False` is left alone. Put it last in
    the list if other middleware looks at the type of the model.

    Args:
        cache: The cache; default the AegisSemanticCache that the model has or `set_llm_cache` was given, else a new
            one of the environment's settings.
        allow_tool_results: Keep and serve answers that rest on tool results too, under the results.

    Raises:
        AegisConfigError: `cache` is no AegisSemanticCache, or the environment's settings cannot be used.
    """

    def __init__(self, cache: AegisSemanticCache | None = None, *, allow_tool_results: bool = False) -> None:
        super().__init__()
        if cache is not None and not isinstance(cache, AegisSemanticCache):
            raise AegisConfigError(f"cache must be an AegisSemanticCache, got {type(cache).__name__}")
        self._given = cache
        self._own = cache or AegisSemanticCache()  # connects when it is first used, if ever
        self._skips = None if allow_tool_results else rests_on_tool_results

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Call the model with the cache."""
        return handler(self._cached(request))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """Call the model with the cache."""
        return await handler(self._cached(request))

    def _cached(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        model: Any = request.model
        if isinstance(model, BaseChatModel):
            return request.override(model=self._with_cache(model))
        warn_once("agent_model", f"the agent's model is a {type(model).__name__}, no chat model: it is not cached")
        return request

    def _with_cache(self, model: BaseChatModel) -> BaseChatModel:
        if isinstance(model, AegisRouter):  # it is the models that have keys
            return model.over(self._with_cache)
        if model.cache is False:
            return model
        return Recached(inner=model, cache=self._cache_of(model), skips=self._skips)

    def _cache_of(self, model: BaseChatModel) -> AegisSemanticCache:
        there = model.cache if isinstance(model.cache, BaseCache) else get_llm_cache()
        return there if self._given is None and isinstance(there, AegisSemanticCache) else self._own


def rests_on_tool_results(messages: Sequence[BaseMessage]) -> bool:
    """Return whether any of `messages` holds what a tool said, one of the provider's own tools too."""
    return any(
        message.type in ("tool", "function")
        or any(
            isinstance(block, dict) and str(block.get("type")).endswith(("tool_result", "call_output"))
            for block in (message.content if isinstance(message.content, list) else ())
        )
        for message in messages
    )
