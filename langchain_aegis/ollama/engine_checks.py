"""Judge a running vLLM, or another server on OpenAI's wire, by what it tells of itself. No prompt is sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from langchain_aegis.bounds import MAX_CONCURRENCY
from langchain_aegis.errors import AegisError
from langchain_aegis.ollama.findings import Finding
from langchain_aegis.ollama.server_checks import Told
from langchain_aegis.openai_servers import Served, ask
from langchain_aegis.settings import AegisSettings, is_loopback, redact_url

_MANY_CUT = 0.02  # share of answers that end at the limit: below it may be those that were meant to
_FEW = 20  # answers, from which on a share says something
_NAMES = {"vllm": "vLLM", "llama.cpp": "llama.cpp", "": "A server on OpenAI's wire"}


def check_engine(settings: AegisSettings, told: Told, ollama_loaded: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Ask the server that the settings name, and judge what it says.

    Args:
        settings: Where it is, and how many calls at once this process would send it.
        told: What is known of Ollama: the window that prompts were made for.
        ollama_loaded: What Ollama has loaded, entries of its /api/ps.
    """
    address = settings.vllm_base_url or ""
    where = redact_url(address)
    try:
        served = ask(address, api_key=settings.vllm_api_key)
    except AegisError as exc:
        refused = exc.status_code in (401, 403)
        yield Finding(
            code="engine", severity="error", where=where, what=str(exc), why="Every call fails.",
            fix="Set VLLM_API_KEY to the key it was started with." if refused else "Start it, or set VLLM_BASE_URL.",
        )  # fmt: skip
        return
    yield from judge_engine(where, served)
    yield from judge_engine_window(where, served, told.window)
    yield from judge_engine_bounds(where, served, settings.vllm_max_num_seqs)
    yield from judge_engine_load(where, served)
    yield from judge_prefix_cache(where, served)
    yield from judge_shared_gpu(where, served, settings.ollama_base_url, ollama_loaded)


def judge_engine(where: str, served: Served) -> Iterator[Finding]:
    """Say what answers."""
    names = ", ".join(
        f"{model.name} ({model.root})" if model.root and model.root != model.name else model.name
        for model in served.models
    )
    release = f" {served.version}" if served.version else ""
    yield Finding(
        code="engine", severity="ok" if served.models else "error", where=where,
        what=f"{_NAMES[served.engine]}{release} answers with {names or 'no model'}",
    )  # fmt: skip
    if served.engine == "vllm" and served.load is None:
        yield Finding(
            code="engine", severity="info", where=where, what="there are no metrics at /metrics",
            why="What runs, waits and is kept there is not known here.",
            fix="Ask the server itself rather than a gateway in front of it; leave --disable-log-stats out.",
        )  # fmt: skip


def judge_engine_window(where: str, served: Served, told: int | None) -> Iterator[Finding]:
    """Judge the windows in tokens, against `told` (those of Ollama) and what was sent so far."""
    load = served.load
    cut = load.finished.get("length", 0) if load else 0
    ended = sum(load.finished.values()) if load else 0
    for model in served.models:
        if model.window is None:
            yield Finding(code="engine-window", severity="info", where=where, what=f"{model.name} tells no window")
        elif told and model.window < told:
            yield Finding(
                code="engine-window", severity="warning", where=where,
                what=f"{model.name} has a window of {model.window} tokens, OLLAMA_CONTEXT_LENGTH is {told}",
                why="Prompts that fit there are refused here (400), the longest ones first.",
                fix=f"Start it with --max-model-len {told}, or send shorter prompts.",
            )  # fmt: skip
        elif load and load.longest_prompt and load.longest_prompt >= model.window:
            yield Finding(
                code="engine-window", severity="warning", where=where,
                what=f"prompts nearly fill the window of {model.name} ({model.window} tokens)",
                why="What is left is all that an answer may have; longer prompts are refused (400).",
                fix="Raise --max-model-len, or send less context.",
            )  # fmt: skip
        else:
            longest = f"; no prompt had more than {load.longest_prompt}" if load and load.longest_prompt else ""
            yield Finding(
                code="engine-window", severity="ok", where=where,
                what=f"{model.name} has a window of {model.window} tokens{longest}",
            )  # fmt: skip
    if ended >= _FEW and cut / ended > _MANY_CUT:
        yield Finding(
            code="engine-window", severity="warning", where=where,
            what=f"{cut} of {ended} answers ended at a limit, not where they were complete",
            why="They are cut; the cache keeps none of them, so each is asked for again.",
            fix="Raise max_completion_tokens of the calls, or --max-model-len.",
        )  # fmt: skip


def judge_engine_bounds(where: str, served: Served, bound: int | None) -> Iterator[Finding]:
    """Judge how many calls this process lets through at once, against what the server runs at once."""
    if served.slots is None and bound is None:
        yield Finding(
            code="engine-bounds", severity="warning", where=where,
            what=f"the server does not tell what it runs at once, so {MAX_CONCURRENCY} calls are sent at once",
            why="vLLM runs 256 and more unless it was started with another --max-num-seqs: most of it idles.",
            fix="Set AEGIS_VLLM_MAX_NUM_SEQS to its --max-num-seqs, or max_concurrency= of BatchingChatModel.",
        )  # fmt: skip
    elif served.slots is not None and bound is not None and bound > served.slots:
        yield Finding(
            code="engine-bounds", severity="warning", where=where,
            what=f"AEGIS_VLLM_MAX_NUM_SEQS={bound}, and the server runs {served.slots} at once",
            why="The rest waits at the server: in the order in which it came, whoever's it is, and out of reach.",
            fix=f"Set AEGIS_VLLM_MAX_NUM_SEQS={served.slots}, or leave it out: this server tells.",
        )  # fmt: skip
    elif served.slots is not None and bound is not None and bound < served.slots:
        yield Finding(
            code="engine-bounds", severity="info", where=where,
            what=f"{bound} calls are sent at once; the server could run {served.slots}",
            why="Meant so if other processes use it too: each has slots of its own.",
            fix=f"Else set AEGIS_VLLM_MAX_NUM_SEQS={served.slots}.",
        )  # fmt: skip
    else:
        source = "as the server tells" if bound is None else "AEGIS_VLLM_MAX_NUM_SEQS"
        yield Finding(
            code="engine-bounds", severity="ok", where=where, what=f"{bound or served.slots} calls at once ({source})"
        )
    window = max((model.window or 0 for model in served.models), default=0)
    tokens, most = (served.load.kv_tokens if served.load else None), bound or served.slots
    if tokens and window and most and most * window > tokens:
        yield Finding(
            code="engine-bounds", severity="info", where=where,
            what=f"the KV cache holds {tokens} tokens: {tokens // window} calls that fill the window, or {most} of "
            f"{tokens // most} tokens each",
            why="Beyond that the server stops calls and begins them again.",
            fix="Nothing, if most prompts are shorter.",
        )  # fmt: skip


def judge_engine_load(where: str, served: Served) -> Iterator[Finding]:
    """Judge what runs and waits now, and what was begun again."""
    load = served.load
    if load is None or load.running is None:
        return
    waiting = load.waiting or 0
    now = f"{load.running} requests run and {waiting} wait now"
    if waiting:
        yield Finding(
            code="engine-load", severity="warning", where=where, what=now,
            why="Somebody sends more than it runs at once. What waits there has no fair turns, and is not refused in "
            "time.",
            fix="Lower AEGIS_VLLM_MAX_NUM_SEQS, share it out between the processes, or look who else calls.",
        )  # fmt: skip
    else:
        used = "" if load.kv_used is None else f"; {load.kv_used:.0%} of the KV cache is taken"
        yield Finding(code="engine-load", severity="ok", where=where, what=now + used)
    if load.preempted:
        yield Finding(
            code="engine-load", severity="warning", where=where,
            what=f"{load.preempted} requests were stopped and begun again since the server started",
            why="The KV cache was full: their prompts are read twice.",
            fix="Lower --max-num-seqs and AEGIS_VLLM_MAX_NUM_SEQS, or give it more memory.",
        )  # fmt: skip


def judge_prefix_cache(where: str, served: Served) -> Iterator[Finding]:
    """Judge whether beginnings of prompts are kept."""
    load = served.load
    if served.engine != "vllm" or load is None:
        return
    if load.prefix_caching is None:
        yield Finding(
            code="engine-prefix-cache", severity="info", where=where, what="whether prefixes are kept is unknown"
        )
    elif not load.prefix_caching:
        yield Finding(
            code="engine-prefix-cache", severity="warning", where=where, what="beginnings of prompts are not kept",
            why="The same instructions and documents are read anew for every call; in vain are calls that begin alike "
            "put next to each other.",
            fix="Leave --no-enable-prefix-caching out.",
        )  # fmt: skip
    else:
        share = f": {load.prefix_found / load.prefix_asked:.0%} of all prompts' tokens were there" if (
            load.prefix_asked and load.prefix_found is not None
        ) else ""  # fmt: skip
        yield Finding(
            code="engine-prefix-cache", severity="ok", where=where, what=f"beginnings of prompts are kept{share}"
        )


def judge_shared_gpu(
    where: str, served: Served, ollama_url: str, loaded: Sequence[Mapping[str, Any]]
) -> Iterator[Finding]:
    """Say whether vLLM and Ollama hold memory of one machine's GPU at the same time."""
    held = sum(size for model in loaded if isinstance(size := model.get("size_vram"), int))
    if served.engine != "vllm" or not held or not _same_host(served.root, ollama_url):
        return
    share = served.load.memory_share if served.load else None
    yield Finding(
        code="engines-share-gpu", severity="warning", where=where,
        what=f"Ollama has {held / 2**30:.1f} GiB of models on the GPU, and vLLM "
        + (f"{share:.0%} of its memory" if share else "the rest"),
        why="Each takes from the other: models go to the CPU, or one of them does not start the next time.",
        fix="Stop one (`docker/engine.sh vllm` or `ollama`), or lower --gpu-memory-utilization until both fit.",
    )  # fmt: skip


def _same_host(one: str, other: str) -> bool:
    first, second = (urlsplit(url).hostname or "" for url in (one, other))
    return first == second or (is_loopback(first) and is_loopback(second))
