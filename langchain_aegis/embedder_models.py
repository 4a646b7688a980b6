"""Which model of which Ollama makes an embedder's vectors."""

from __future__ import annotations

import os
from typing import Any

from langchain_core.embeddings import Embeddings
from langchain_ollama import OllamaEmbeddings

from langchain_aegis.client import OllamaClient
from langchain_aegis.embedder import innermost
from langchain_aegis.endpoint import Endpoint
from langchain_aegis.settings import AegisSettings, normalise_base_url


def endpoint_of(embeddings: OllamaEmbeddings) -> Endpoint:
    """Return what calls of the embedder go to."""
    made: Endpoint | None = getattr(embeddings, "_endpoint", None)
    if made is not None:
        return made
    # As the `ollama` package finds it.
    address = embeddings.base_url or os.environ.get("OLLAMA_HOST", "").strip() or "http://127.0.0.1:11434"
    return Endpoint.of(
        normalise_base_url(address),
        AegisSettings.from_env(),
        client_kwargs=embeddings.client_kwargs,
        sync_client_kwargs=embeddings.sync_client_kwargs,
        async_client_kwargs=embeddings.async_client_kwargs,
    )


def models_of(embeddings: Embeddings) -> list[tuple[str, OllamaClient]]:
    """Return the model that makes the vectors, also inside a wrapper, and who has it; none if no Ollama does.

    Raises:
        AegisConfigError: Its address is none.
    """
    inner: Any = innermost(embeddings)
    if not isinstance(inner, OllamaEmbeddings):
        return []
    own = hasattr(inner, "_endpoint")  # an AegisEmbeddings: its address is normalised
    return [(inner.model, endpoint_of(inner).client(inner.base_url if own else None))]
