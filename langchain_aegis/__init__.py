"""A semantic cache, admission control and a tuned Ollama client for LangChain.

Public names are imported on first use, so that `import langchain_aegis` loads neither langchain-core nor redis.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` imports when it is asked for, said to type checkers
    from langchain_aegis.cache import AegisSemanticCache as AegisSemanticCache
    from langchain_aegis.chat_models import ChatAegis as ChatAegis
    from langchain_aegis.cut_answers import was_cut as was_cut
    from langchain_aegis.embedding_cache import AegisEmbeddingCache as AegisEmbeddingCache
    from langchain_aegis.embeddings import AegisEmbeddings as AegisEmbeddings
    from langchain_aegis.errors import AegisBatchError as AegisBatchError
    from langchain_aegis.errors import AegisClosedError as AegisClosedError
    from langchain_aegis.errors import AegisConfigError as AegisConfigError
    from langchain_aegis.errors import AegisConnectionError as AegisConnectionError
    from langchain_aegis.errors import AegisContextOverflowError as AegisContextOverflowError
    from langchain_aegis.errors import AegisDeadlineError as AegisDeadlineError
    from langchain_aegis.errors import AegisError as AegisError
    from langchain_aegis.errors import AegisModelNotFoundError as AegisModelNotFoundError
    from langchain_aegis.errors import AegisOptionError as AegisOptionError
    from langchain_aegis.errors import AegisOverloadedError as AegisOverloadedError
    from langchain_aegis.errors import AegisReloadError as AegisReloadError
    from langchain_aegis.errors import AegisRequestError as AegisRequestError
    from langchain_aegis.errors import AegisServerError as AegisServerError
    from langchain_aegis.errors import AegisStreamError as AegisStreamError
    from langchain_aegis.errors import AegisTimeoutError as AegisTimeoutError
    from langchain_aegis.middleware import AegisCacheMiddleware as AegisCacheMiddleware
    from langchain_aegis.progress import batch_progress as batch_progress
    from langchain_aegis.results import Answer as Answer
    from langchain_aegis.results import was_cached as was_cached
    from langchain_aegis.router import AegisRouter as AegisRouter
    from langchain_aegis.runnables import BatchingChatModel as BatchingChatModel
    from langchain_aegis.runnables import BatchingEmbeddings as BatchingEmbeddings
    from langchain_aegis.runnables import BatchingRunnable as BatchingRunnable
    from langchain_aegis.runnables import batching as batching
    from langchain_aegis.scope import aegis_scope as aegis_scope
    from langchain_aegis.scope import aegis_sources as aegis_sources
    from langchain_aegis.settings import AegisSettings as AegisSettings

__version__ = "0.1.0"

_HOME_OF = {
    "AegisBatchError": "errors",
    "AegisCacheMiddleware": "middleware",
    "AegisClosedError": "errors",
    "AegisConfigError": "errors",
    "AegisConnectionError": "errors",
    "AegisContextOverflowError": "errors",
    "AegisDeadlineError": "errors",
    "AegisEmbeddingCache": "embedding_cache",
    "AegisEmbeddings": "embeddings",
    "AegisError": "errors",
    "AegisModelNotFoundError": "errors",
    "AegisOptionError": "errors",
    "AegisOverloadedError": "errors",
    "AegisReloadError": "errors",
    "AegisRequestError": "errors",
    "AegisRouter": "router",
    "AegisSemanticCache": "cache",
    "AegisServerError": "errors",
    "AegisSettings": "settings",
    "AegisStreamError": "errors",
    "AegisTimeoutError": "errors",
    "Answer": "results",
    "BatchingChatModel": "runnables",
    "BatchingEmbeddings": "runnables",
    "BatchingRunnable": "runnables",
    "ChatAegis": "chat_models",
    "aegis_scope": "scope",
    "aegis_sources": "scope",
    "batch_progress": "progress",
    "batching": "runnables",
    "was_cached": "results",
    "was_cut": "cut_answers",
}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if module := _HOME_OF.get(name):
        value = getattr(importlib.import_module(f"langchain_aegis.{module}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'langchain_aegis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
