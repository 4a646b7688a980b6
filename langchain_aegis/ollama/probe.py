"""Ask a server a question or two, and see in its own times whether models are loaded again and again.

Only `aegis doctor --probe` does this. It sends no runner option and no keep_alive, so it changes nothing for others; a
model that was not loaded is loaded, as by any call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from langchain_aegis.client import OllamaClient
from langchain_aegis.errors import AegisError
from langchain_aegis.identity import normalise_model
from langchain_aegis.ollama.findings import Finding
from langchain_aegis.ollama.server_checks import DEFAULT_EMBEDDER
from langchain_aegis.settings import AegisSettings

RELOADED_S = 0.5  # a loaded model says 0.001 to 0.1 s; starting a runner took 0.8 s with the smallest model there is
_TOKENS = 16


def probe(client: OllamaClient, settings: AegisSettings) -> Iterator[Finding]:
    """Chat, embed, chat: the second chat finds its model loaded, unless something unloads it meanwhile."""
    where = client.base_url
    try:
        names = {_name(model) for model in client.tags()}
        before = {_name(model): model.get("context_length") for model in client.ps()}
        chat = settings.model_generation
        if not chat or normalise_model(chat) not in names:
            yield Finding(
                code="probe", severity="info", where=where, what="nothing was asked: no chat model that the server has",
                fix="Set OLLAMA_MODEL_GENERATION.",
            )  # fmt: skip
            return
        first = client.chat(_body(chat, 1))
        between = {_name(model): model.get("context_length") for model in client.ps()}
        embedder = settings.model_embeddings or DEFAULT_EMBEDDER
        embeds = normalise_model(embedder) in names
        if embeds:
            client.embed({"model": embedder, "input": ["ok"]})
        after_embedding = {_name(model) for model in client.ps()}
        second = client.chat(_body(chat, _TOKENS))
    except AegisError as exc:
        yield Finding(
            code="probe", severity="error", where=where, what=f"a call failed: {exc}",
            why="Calls of an application fail alike.", fix="See `ollama ps` and the server's log.",
        )  # fmt: skip
        return
    yield from judge_probe(
        where, normalise_model(chat), normalise_model(embedder) if embeds else None,
        before=before, first=first, between=between, after_embedding=after_embedding, second=second,
    )  # fmt: skip


def judge_probe(
    where: str,
    chat: str,
    embedder: str | None,
    *,
    before: Mapping[str, Any],
    first: Mapping[str, Any],
    between: Mapping[str, Any],
    after_embedding: set[str],
    second: Mapping[str, Any],
) -> Iterator[Finding]:
    """Judge the answers, and what /api/ps listed before, between and after them (name -> window)."""
    first_s, second_s = (float(answer.get("load_duration") or 0) / 1e9 for answer in (first, second))
    if chat in before and first_s >= RELOADED_S:
        yield Finding(
            code="reload-ping-pong", severity="warning", where=where,
            what=f"{chat} was loaded with a window of {before[chat]}, and a call without options loaded it again with "
            f"{between.get(chat)} ({first_s:.1f} s)",
            why="Somebody else sends other runner options (num_ctx, num_thread, num_gpu, shift ...): each change "
            "starts the model anew, and its prompt caches are lost.",
            fix="Send the same runner options from every caller, best none: set OLLAMA_CONTEXT_LENGTH at the server.",
        )  # fmt: skip
    if second_s >= RELOADED_S:
        evicted = embedder is not None and chat not in after_embedding
        yield Finding(
            code="models-evict-each-other" if evicted else "reload-ping-pong", severity="warning", where=where,
            what=f"{chat} was loaded again after {f'a call to {embedder}' if evicted else 'a moment'} "
            f"({second_s:.1f} s)",
            why="A chat model and an embedding model unload each other on every call." if evicted
            else "Another caller's runner options, or too little memory, drove it out between two calls.",
            fix="Set OLLAMA_MAX_LOADED_MODELS=2 or more, or free memory: a smaller window, fewer slots." if evicted
            else "Send the same runner options from every caller.",
        )  # fmt: skip
    evaluated, tokens = float(second.get("eval_duration") or 0) / 1e9, int(second.get("eval_count") or 0)
    speed = (
        f"{tokens / evaluated:.1f} tokens/s over {tokens} tokens" if evaluated and tokens > 1 else "no speed measured"
    )
    yield Finding(
        code="probe", severity="ok", where=where,
        what=f"{chat}: loading {first_s:.2f} s, then {second_s:.2f} s; {speed}",
    )  # fmt: skip


def _body(model: str, tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": "Count from one to twenty."}],
        "stream": False,
        "options": {"num_predict": tokens},
    }


def _name(model: Mapping[str, Any]) -> str:
    return normalise_model(str(model.get("name") or model.get("model") or ""))
