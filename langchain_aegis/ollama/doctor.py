"""Compare what the settings expect with what the servers and files really are.

Nothing is changed, no model is loaded, and no prompt is sent.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError
from redis.retry import Retry

from langchain_aegis.attempts import Timeouts
from langchain_aegis.client import OllamaClient
from langchain_aegis.errors import AegisError
from langchain_aegis.identity import normalise_model
from langchain_aegis.ollama.compose import check_compose
from langchain_aegis.ollama.environment import check_variables, read_env_file
from langchain_aegis.ollama.findings import Finding
from langchain_aegis.ollama.knowledge import knowledge, version_tuple
from langchain_aegis.settings import AegisSettings, redact_url

TIMEOUT_S = 3.0
DEFAULT_EMBEDDER = "bge-m3"
SMALL_WINDOW = 4096  # the default without a large GPU: three retrieved documents fill it


def check_files(compose: Sequence[Path], env_files: Sequence[Path]) -> Iterator[Finding]:
    """Judge compose and env files; the env files also fill in the variables of the compose files."""
    values: dict[str, str] = {}
    for path in env_files:
        try:
            variables = read_env_file(path)
        except (OSError, UnicodeDecodeError) as exc:
            yield _unreadable(path, exc)
            continue
        values |= {name: variable.value for name, variable in variables.items() if variable.value is not None}
        yield from check_variables(variables, server_only=False)
    for path in compose:
        try:
            yield from check_compose(path, values)
        except OSError as exc:
            yield _unreadable(path, exc)


def check_servers(settings: AegisSettings, window_told: int | None = None) -> Iterator[Finding]:
    """Ask the Ollama server and the Redis that the settings name, with short timeouts.

    Args:
        settings: Where they are, and which models are expected.
        window_told: OLLAMA_CONTEXT_LENGTH as far as it is known here, in tokens.
    """
    client = OllamaClient(
        settings.ollama_base_url,
        timeouts=Timeouts(connect_s=TIMEOUT_S, read_s=TIMEOUT_S, deadline_s=2 * TIMEOUT_S),
    )
    try:
        yield from _check_ollama(client, settings, window_told)
    finally:
        client.close()
    yield _check_redis(settings)


def window_in_environment(env_files: Sequence[Path], environ: Mapping[str, str] | None = None) -> int | None:
    """Return OLLAMA_CONTEXT_LENGTH from the env files, else from `environ`; None if it is not there."""
    text = (os.environ if environ is None else environ).get("OLLAMA_CONTEXT_LENGTH", "")
    for path in env_files:
        if path.is_file() and (found := read_env_file(path).get("OLLAMA_CONTEXT_LENGTH")):
            text = found.value or text
    return int(text) if text.strip().isdigit() and int(text) > 0 else None


def _check_ollama(client: OllamaClient, settings: AegisSettings, window_told: int | None) -> Iterator[Finding]:
    where = client.base_url
    try:
        version = client.version()
        models = client.tags()
        loaded = client.ps()
    except AegisError as exc:
        yield Finding(
            code="server", severity="error", where=where, what=str(exc),
            why="Every call fails at once.", fix="Start it (`ollama serve`), or set OLLAMA_BASE_URL.",
        )  # fmt: skip
        for code in ("version", "models", "window"):
            yield Finding(code=code, severity="info", where=where, what="unknown: the server does not answer")
        return
    yield Finding(code="server", severity="ok", where=where, what=f"an Ollama server answers with {len(models)} models")
    yield _check_version(where, version)
    names = {normalise_model(str(model.get("name") or model.get("model") or "")) for model in models}
    yield from _check_models(where, names, settings)
    yield from _check_window(client, loaded, names, settings, window_told)


def _check_version(where: str, version: str) -> Finding:
    table = knowledge()
    if version and version_tuple(version) < version_tuple(table.runner_since):
        return Finding(
            code="version", severity="warning", where=where,
            what=f"Ollama {version} is older than {table.runner_since}",
            why="It runs models in another way, and settings mean something else there.", fix="Update Ollama.",
        )  # fmt: skip
    return Finding(code="version", severity="ok", where=where, what=f"Ollama {version or 'of an unknown version'}")


def _check_models(where: str, names: set[str], settings: AegisSettings) -> Iterator[Finding]:
    there: list[str] = []
    missing: list[str] = []
    for model in (settings.model_generation, settings.model_embeddings):
        if model:
            (there if normalise_model(model) in names else missing).append(model)
    for model in missing:
        yield Finding(
            code="models", severity="error", where=where, what=f"the server does not have {model}",
            why="Calls to it fail with AegisModelNotFoundError.", fix=f"ollama pull {model}",
        )  # fmt: skip
    if not settings.model_embeddings:
        if normalise_model(DEFAULT_EMBEDDER) in names:
            there.append(f"{DEFAULT_EMBEDDER} (the default embedder)")
        else:
            yield Finding(
                code="models", severity="warning", where=where,
                what=f"no embedding model: OLLAMA_MODEL_EMBEDDINGS is not set and the server has no {DEFAULT_EMBEDDER}",
                why="Only exact repeats are answered from the cache.", fix=f"ollama pull {DEFAULT_EMBEDDER}",
            )  # fmt: skip
    if not settings.model_generation:
        yield Finding(
            code="models", severity="info", where=where, what="OLLAMA_MODEL_GENERATION is not set",
            why="ChatAegis() without a model raises AegisConfigError.",
            fix=f"Set it to one of: {', '.join(sorted(names)) or 'nothing yet'}.",
        )  # fmt: skip
    if there:
        yield Finding(code="models", severity="ok", where=where, what=f"the server has {', '.join(there)}")


def _check_window(
    client: OllamaClient,
    loaded: list[dict[str, Any]],
    names: set[str],
    settings: AegisSettings,
    window_told: int | None,
) -> Iterator[Finding]:
    windows = {normalise_model(str(model.get("name") or "")): model.get("context_length") for model in loaded}
    told = normalise_model(settings.model_generation) if settings.model_generation else None
    embedder = normalise_model(settings.model_embeddings or DEFAULT_EMBEDDER)
    asked = [told] if told else sorted(name for name in windows if name != embedder)
    if not asked or asked[0] not in names:
        reason = "no model is named or loaded" if not asked else f"the server does not have {asked[0]}"
        yield Finding(code="window", severity="info", where=client.base_url, what=f"unknown: {reason}")
        return
    for name in asked:
        try:
            shown = client.show(name)
        except AegisError as exc:
            shown = {}
            yield Finding(code="window", severity="info", where=client.base_url, what=f"{name} cannot be shown: {exc}")
        yield _judge_window(client.base_url, name, windows.get(name), shown, window_told)


def _judge_window(where: str, name: str, window: Any, shown: Mapping[str, Any], told: int | None) -> Finding:
    info = shown.get("model_info")
    longest = next(
        (v for k, v in (info.items() if isinstance(info, dict) else ()) if k.endswith(".context_length")), None
    )
    of_model = f" of the {longest} that the model could hold" if isinstance(longest, int) else ""
    if not isinstance(window, int) or window <= 0:
        own = re.search(r"(?m)^num_ctx\s+(\d+)", str(shown.get("parameters") or ""))
        if own:
            will = f"{own[1]} tokens (num_ctx of its Modelfile)"
        elif told:
            will = f"{min(told, longest) if isinstance(longest, int) else told} tokens (OLLAMA_CONTEXT_LENGTH)"
        else:
            will = "4096, 32768 or 262144 tokens by the video memory, unless OLLAMA_CONTEXT_LENGTH is set at the server"
        return Finding(
            code="window", severity="info", where=where, what=f"{name} is not loaded; its window will be {will}",
            why="A request's own num_ctx wins.", fix="Ask again while it is loaded to see the real one.",
        )  # fmt: skip
    if told and window < min(told, longest if isinstance(longest, int) else told):
        return Finding(
            code="window", severity="warning", where=where,
            what=f"{name} runs with a window of {window} tokens, OLLAMA_CONTEXT_LENGTH here says {told}",
            why="The server was started with other settings, or a caller sends another num_ctx.",
            fix="Set OLLAMA_CONTEXT_LENGTH where the server is started, and restart it.",
        )  # fmt: skip
    if window <= SMALL_WINDOW and isinstance(longest, int) and window < longest:
        return Finding(
            code="window", severity="warning", where=where,
            what=f"{name} runs with a window of {window} tokens{of_model}",
            why="Longer prompts are refused (other clients: their beginning is cut without a word).",
            fix="Set OLLAMA_CONTEXT_LENGTH to the longest prompt and its answer, and restart the server.",
        )  # fmt: skip
    return Finding(
        code="window", severity="ok", where=where, what=f"{name} runs with a window of {window} tokens{of_model}"
    )


def _check_redis(settings: AegisSettings) -> Finding:
    where = redact_url(settings.redis_url)
    try:
        client = redis.Redis.from_url(
            settings.redis_url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, protocol=2,
            retry=Retry(NoBackoff(), 0), decode_responses=True,
        )  # fmt: skip
    except ValueError as exc:
        return _redis_down(where, f"the address cannot be read ({exc})", "Set REDIS_URL, e.g. redis://127.0.0.1:6379.")
    try:
        client.ping()
        server = _info(client, "server")
        memory = _info(client, "memory")
        try:
            indexes: list[str] | None = client.execute_command("FT._LIST")
        except NoPermissionError:
            raise
        except ResponseError:
            indexes = None
    except (AuthenticationError, NoPermissionError) as exc:
        return _redis_down(where, f"Redis refuses the login or a command ({exc})", "See docker/users.acl for what the "
                           "cache needs, and put user and password into REDIS_URL.")  # fmt: skip
    except (RedisError, OSError) as exc:
        return _redis_down(where, f"no Redis ({type(exc).__name__}: {exc})", "Start it, or set REDIS_URL.")
    finally:
        client.close()
    return _judge_redis(where, server, memory, indexes, settings.namespace)


def _judge_redis(
    where: str, server: Mapping[str, Any], memory: Mapping[str, Any], indexes: list[str] | None, namespace: str
) -> Finding:
    version = server.get("valkey_version") or server.get("redis_version") or "of an unknown version"
    name = f"{'Valkey' if 'valkey_version' in server else 'Redis'} {version}"
    bound = int(memory.get("maxmemory") or 0)
    policy = str(memory.get("maxmemory_policy") or "")
    note = f"maxmemory {bound // 2**20} MiB, {policy}" if bound else "no maxmemory: it grows with what is cached"
    if not memory:
        note = "its memory bound may not be asked for"
    if indexes is None:
        return Finding(
            code="redis-search", severity="warning", where=where, what=f"{name} without search; {note}",
            why="The semantic tier compares the newest 2000 vectors of a scope in the process.",
            fix="Use Redis 8 or later, which has search.",
        )  # fmt: skip
    if bound and policy == "noeviction":
        return Finding(
            code="redis-search", severity="warning", where=where, what=f"{name} with search; {note}",
            why="When it is full it refuses every write, and nothing new is cached.",
            fix="CONFIG SET maxmemory-policy volatile-lru",
        )  # fmt: skip
    ours = sum(index.startswith(f"{namespace}:") for index in indexes)
    return Finding(
        code="redis-search", severity="ok", where=where,
        what=f"{name} with search, {ours} {'index' if ours == 1 else 'indexes'} of namespace {namespace}; {note}",
    )  # fmt: skip


def _info(client: redis.Redis, section: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = client.info(section)
    except (NoPermissionError, ResponseError):  # a user who may not ask; the rest is still worth knowing
        return {}
    return found


def _redis_down(where: str, what: str, fix: str) -> Finding:
    return Finding(
        code="redis-search", severity="error", where=where, what=what,
        why="Nothing is cached; calls go to the model.", fix=fix,
    )  # fmt: skip


def _unreadable(path: Path, exc: Exception) -> Finding:
    return Finding(
        code="file-unreadable", severity="error", where=str(path), what=f"it cannot be read: {exc}",
        why="Nothing in it was judged.", fix="Name another file.",
    )  # fmt: skip
