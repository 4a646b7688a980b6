"""Judge a running Ollama server by what it tells of itself. No model is loaded, and no prompt is sent."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from langchain_aegis.client import OllamaClient
from langchain_aegis.errors import AegisError
from langchain_aegis.identity import normalise_model
from langchain_aegis.ollama.findings import Finding, Severity
from langchain_aegis.ollama.knowledge import knowledge, version_tuple
from langchain_aegis.settings import AegisSettings
from langchain_aegis.timestamps import unix_s

DEFAULT_EMBEDDER = "bge-m3"
SMALL_WINDOW = 4096  # the default without a large GPU: three retrieved documents fill it
SOON = timedelta(minutes=1)  # less than people pause between two questions
_COARSE = re.compile(r"(?i)^(I?Q[12]|TQ)")  # one and two bits a weight
_FULL = re.compile(r"(?i)^(B?F16|F32)$")


@dataclass(frozen=True)
class Told:
    """What files and environment say of the server, as far as it is known here.

    Attributes:
        window: OLLAMA_CONTEXT_LENGTH in tokens.
        slots: OLLAMA_NUM_PARALLEL.
        gpu: A service reserves a GPU.
    """

    window: int | None = None
    slots: int | None = None
    gpu: bool = False


def check_ollama(client: OllamaClient, settings: AegisSettings, told: Told) -> Iterator[Finding]:
    """Ask an Ollama server for its version, its models, and those that are loaded."""
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
    yield judge_version(where, version)
    names = {_name(model) for model in models}
    yield from _check_models(where, names, settings)
    yield from _check_window(client, loaded, names, settings, told.window)
    gpu = told.gpu or any(_whole(model.get("size_vram")) for model in loaded)
    wanted = {normalise_model(m) for m in (settings.model_generation, settings.model_embeddings) if m}
    for model in loaded:
        yield from judge_loaded(where, model, now=datetime.now(UTC), gpu=gpu)
    used = wanted | {_name(model) for model in loaded}
    for model in models:
        if _name(model) in used:
            yield from judge_slots(where, model, slots=told.slots, version=version)
            yield from judge_quantisation(where, model)


def judge_version(where: str, version: str) -> Finding:
    """Judge the version that the server tells."""
    table = knowledge()
    if version_tuple(version) and version_tuple(version) < version_tuple(table.runner_since):
        refuses = version_tuple(version) >= version_tuple(table.request["truncate"].since or "")
        return Finding(
            code="version", severity="warning", where=where,
            what=f"Ollama {version} is older than {table.runner_since}",
            why="It runs models in another way, and settings mean something else there."
            + ("" if refuses else " It cannot refuse a prompt that does not fit: the beginning is cut without a word."),
            fix=f"Update Ollama to {table.image['ollama'].tag}.",
        )  # fmt: skip
    if not version_tuple(version) or not table.knows(version):
        return Finding(
            code="version", severity="info", where=where,
            what=f"Ollama {version or 'of an unknown version'} is unknown to us (0.5 to 0.33 are known)",
            why=f"It is judged like {table.verified}.", fix="Update langchain-aegis.",
        )  # fmt: skip
    return Finding(code="version", severity="ok", where=where, what=f"Ollama {version}")


def judge_loaded(where: str, model: Mapping[str, Any], *, now: datetime, gpu: bool) -> Iterator[Finding]:
    """Judge one entry of /api/ps: where its weights are, and when it goes."""
    name, size, vram = _name(model), _whole(model.get("size")), _whole(model.get("size_vram"))
    if size and vram < size:
        partly = vram > 0
        severity: Severity = "warning" if partly or gpu else "info"
        share = round(100 * (size - vram) / size)
        yield Finding(
            code="model-on-cpu", severity=severity, where=where,
            what=f"{name} is {'partly' if partly else 'wholly'} on the CPU: {share} % of {size / 2**30:.1f} GiB",
            why="Each token waits for the part on the CPU." if partly or gpu else "There is no GPU that is used.",
            fix="Use a smaller window, fewer slots, a smaller quantisation, or unload other models." if partly
            else "If there is a GPU: give it to the container (device reservation) and look into the server's log.",
        )  # fmt: skip
    expires_s = unix_s(model.get("expires_at"))
    if expires_s is not None and 0 < (left_s := expires_s - now.timestamp()) < SOON.total_seconds():
        yield Finding(
            code="keep-alive-expiring", severity="warning", where=where,
            what=f"{name} is unloaded in {int(left_s)} seconds if nobody asks it",
            why="The next call then waits until it is loaded again, and its prompt caches are lost.",
            fix="Send keep_alive=30m with every call (ChatAegis does), or set OLLAMA_KEEP_ALIVE=24h at the server.",
        )  # fmt: skip


def judge_slots(where: str, model: Mapping[str, Any], *, slots: int | None, version: str) -> Iterator[Finding]:
    """Say of an entry of /api/tags whether it gets one slot although more are set."""
    if not slots or slots == 1:
        return
    details = model.get("details")
    given: Mapping[str, Any] = details if isinstance(details, Mapping) else {}
    families = [str(family) for family in (given.get("family"), *(given.get("families") or ())) if family]
    family = knowledge().one_slot_for(families, version)
    capabilities = model.get("capabilities")
    if family:
        yield Finding(
            code="one-slot", severity="warning", where=where,
            what=f"{_name(model)} ({family}) gets one slot, whatever OLLAMA_NUM_PARALLEL={slots} says",
            why="Calls to it are served one after another.", fix="Set AEGIS_MAX_CONCURRENCY=1, or use another model.",
        )  # fmt: skip
    elif isinstance(capabilities, list) and capabilities and "completion" not in capabilities:
        yield Finding(
            code="one-slot", severity="info", where=where,
            what=f"{_name(model)} makes vectors, so it gets one slot, whatever OLLAMA_NUM_PARALLEL={slots} says",
            why="Its requests are served one after another.",
            fix="Send many texts in one request: AegisEmbeddings joins those of concurrent calls.",
        )  # fmt: skip


def judge_quantisation(where: str, model: Mapping[str, Any]) -> Iterator[Finding]:
    """Say what an entry of /api/tags is quantised to, where that is unusual for a chat model."""
    details = model.get("details")
    level = str(details.get("quantization_level") or "") if isinstance(details, Mapping) else ""
    capabilities = model.get("capabilities") or []
    if "embedding" in capabilities or not level:
        return
    if _FULL.match(level):
        yield Finding(
            code="quantisation", severity="info", where=where, what=f"{_name(model)} is not quantised ({level})",
            why="Each token reads all weights: three to four times those of Q4_K_M, so it is as many times slower.",
            fix="Pull the model's q4_K_M or q8_0 tag; `aegis plan` compares them.",
        )  # fmt: skip
    elif _COARSE.match(level):
        yield Finding(
            code="quantisation", severity="info", where=where, what=f"{_name(model)} is quantised to {level}",
            why="Two bits a weight or less make answers clearly worse.",
            fix="Pull the model's q4_K_M tag, or a smaller model.",
        )  # fmt: skip


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
    windows = {_name(model): model.get("context_length") for model in loaded}
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
        yield judge_window(client.base_url, name, windows.get(name), shown, window_told)


def judge_window(where: str, name: str, window: Any, shown: Mapping[str, Any], told: int | None) -> Finding:
    """Judge a model's window in tokens: what /api/ps and /api/show say, and what was asked for."""
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


def _name(model: Mapping[str, Any]) -> str:
    return normalise_model(str(model.get("name") or model.get("model") or ""))


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
