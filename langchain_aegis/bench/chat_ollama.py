"""The ChatOllama that everything is measured against."""

from __future__ import annotations

from typing import Any

from langchain_ollama import ChatOllama


def chat_ollama(model: str, base_url: str, **options: Any) -> ChatOllama:
    """Return one as an application makes it, deterministic and without a cache."""
    return ChatOllama(model=model, base_url=base_url, temperature=0, cache=False, **options)


async def aclose(model: Any) -> None:
    """Close its connections, which it leaves to the garbage collector."""
    model._client.close()
    await model._async_client.close()
