"""A semantic cache, admission control and a tuned Ollama client for LangChain.

Public names are imported on first use, so that `import langchain_aegis` loads neither langchain-core nor redis.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME_OF = {
    "AegisCacheMiddleware": "middleware",
    "AegisClosedError": "errors",
    "AegisConfigError": "errors",
    "AegisConnectionError": "errors",
    "AegisContextOverflowError": "errors",
    "AegisDeadlineError": "errors",
    "AegisEmbeddings": "embeddings",
    "AegisError": "errors",
    "AegisModelNotFoundError": "errors",
    "AegisOptionError": "errors",
    "AegisOverloadedError": "errors",
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
    "batching": "runnables",
    "was_cached": "results",
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
