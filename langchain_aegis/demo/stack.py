"""The parts that the demonstration runs on: the user's own where told and reachable, else embedded ones."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import redis
from langchain_core.embeddings import Embeddings

from langchain_aegis.client import OllamaClient
from langchain_aegis.embedded import EmbeddedOllama, EmbeddedRedis, MiniLMEmbeddings
from langchain_aegis.embeddings import AegisEmbeddings
from langchain_aegis.errors import AegisConfigError, AegisConnectionError, AegisError
from langchain_aegis.settings import AegisSettings, normalise_base_url, redact_url

EMBEDDED_MODEL = "smollm2:135m"


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What runs, and what it is.

    Attributes:
        redis_url: Address of Redis.
        ollama_url: Address of the model server.
        model: Name of the chat model.
        embeddings: Embeds documents and questions.
        about: The same for a reader, without credentials.
    """

    redis_url: str
    ollama_url: str
    model: str
    embeddings: Embeddings
    about: Mapping[str, Any]


@contextlib.contextmanager
def start_stack(
    *, model: str | None, redis_url: str | None, ollama_url: str | None, say: Callable[[str], None]
) -> Iterator[Stack]:
    """Start or find the parts, and stop on leaving those that nobody else uses.

    Args:
        model: Chat model; default OLLAMA_MODEL_GENERATION, or the embedded one.
        redis_url: Used if told; an address from the environment only if it answers.
        ollama_url: Likewise.
        say: Told what happens, one line each.

    Raises:
        AegisError: A part does not start; one line that says why and what to do.
    """
    settings = AegisSettings.from_env()
    with contextlib.ExitStack() as exits:
        # Whatever was told and does not work is said before anything is started.
        found_redis = _own_redis(redis_url, settings, say)
        found_ollama = _own_ollama(ollama_url, settings, say)
        if found_ollama is not None:
            chosen = _own_model(found_ollama, model or settings.model_generation)
        elif model not in (None, EMBEDDED_MODEL):
            raise AegisConfigError(
                f"the embedded server has {EMBEDDED_MODEL} only; for {model} set OLLAMA_BASE_URL or --ollama-url"
            )
        else:
            chosen = EMBEDDED_MODEL
        say("starting ...")
        kind, where = (redact_url(url) if url is not None else "embedded" for url in (found_redis, found_ollama))
        if found_redis is None:
            found_redis = exits.enter_context(EmbeddedRedis()).url
        if found_ollama is None:
            found_ollama = exits.enter_context(EmbeddedOllama()).base_url
        embeddings: Embeddings = MiniLMEmbeddings()
        if where != "embedded" and settings.model_embeddings is not None:
            embeddings = AegisEmbeddings(settings.model_embeddings, base_url=found_ollama)
        embeddings.embed_query("warm up")  # loading it is not part of anybody's first question
        about = {
            "redis": kind,
            "ollama": where,
            "model": chosen,
            "embedder": getattr(embeddings, "model", type(embeddings).__name__),
            "ollama_version": OllamaClient(found_ollama).version(),
        }
        yield Stack(redis_url=found_redis, ollama_url=found_ollama, model=chosen, embeddings=embeddings, about=about)


def _own_redis(told: str | None, settings: AegisSettings, say: Callable[[str], None]) -> str | None:
    url = told or (settings.redis_url if _named("REDIS_URL", "REDIS_HOST", "AEGIS_REDIS_URL") else None)
    if url is None:
        return None
    try:
        with redis.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2) as client:
            client.ping()
        return url
    except (redis.RedisError, ValueError, OSError) as exc:
        problem = f"no Redis answers at {redact_url(url)} ({type(exc).__name__})"
        if told:
            raise AegisConnectionError(f"{problem}; without --redis-url an embedded one is used") from exc
        say(f"{problem}: using an embedded one")
        return None


def _own_ollama(told: str | None, settings: AegisSettings, say: Callable[[str], None]) -> str | None:
    named = _named("OLLAMA_BASE_URL", "OLLAMA_HOST", "AEGIS_OLLAMA_BASE_URL")
    url = normalise_base_url(told) if told else (settings.ollama_base_url if named else None)
    if url is None:
        return None
    try:
        OllamaClient(url).version()
        return url
    except AegisError as exc:
        if told:
            raise
        say(f"{exc} Using an embedded one.")
        return None


def _own_model(url: str, wanted: str | None) -> str:
    """Return the name of a chat model that the server has; says how to get it otherwise."""
    names = [str(m.get("name", "")) for m in OllamaClient(url).tags()]
    if wanted is None:
        raise AegisConfigError(f"which model? Use --model or OLLAMA_MODEL_GENERATION; {redact_url(url)} has {names}")
    if wanted not in names and f"{wanted}:latest" not in names:
        raise AegisConfigError(f"{redact_url(url)} does not have {wanted}: run `ollama pull {wanted}`")
    return wanted


def _named(*variables: str) -> bool:
    return any(os.environ.get(v, "").strip() for v in variables)
