"""What a server on OpenAI's wire tells of itself: vLLM, llama.cpp, or another one. Nothing is generated.

The names of vLLM's metrics are those that it has had since 0.8 (`vllm/v1/metrics/loggers.py`, `vllm/config/cache.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import orjson

from langchain_aegis.errors import AegisConnectionError, AegisRequestError, AegisServerError, AegisTimeoutError
from langchain_aegis.settings import redact_url

TIMEOUT_S = 3.0

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_MOST_BYTES = 8_388_608  # of an answer: metrics of a server with many adapters are some hundred KB


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model of a server.

    Attributes:
        name: As requests name it.
        root: Which weights it is, where the server tells; the name may be an alias.
        window: Tokens for prompt and answer; None if it is not told.
    """

    name: str
    root: str | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a server's metrics say; None where they do not.

    Attributes:
        running: Requests that run now.
        waiting: Requests that wait at the server now.
        preempted: Requests that were stopped and begun again because the KV cache was full, since the start.
        kv_used: Share of the KV cache that is taken, 0 to 1.
        kv_tokens: Tokens that the KV cache holds, of all engines together.
        prefix_caching: Beginnings of prompts are kept.
        prefix_asked: Tokens of prompts that were looked up there, since the start.
        prefix_found: Those that were found.
        memory_share: Share of the GPU's memory that the server has taken.
        finished: Why answers ended -> how many, since the start.
        longest_prompt: Tokens that no prompt so far exceeded, and more than half of which some prompt had.
        engines: How many engines the server has, each with bounds of its own.
    """

    running: int | None = None
    waiting: int | None = None
    preempted: int | None = None
    kv_used: float | None = None
    kv_tokens: int | None = None
    prefix_caching: bool | None = None
    prefix_asked: int | None = None
    prefix_found: int | None = None
    memory_share: float | None = None
    finished: Mapping[str, int] = field(default_factory=dict)
    longest_prompt: int | None = None
    engines: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server tells.

    Attributes:
        root: Its address, without `/v1`.
        engine: "vllm", "llama.cpp", or "" for any other.
        version: Its release, None if it is not told.
        models: Its models.
        slots: Requests that it runs at once; None if it does not tell.
        load: What its metrics say, None if there are none.
    """

    root: str
    engine: Literal["vllm", "llama.cpp", ""] = ""
    version: str | None = None
    models: tuple[ServedModel, ...] = ()
    slots: int | None = None
    load: Load | None = None


def root_of(base_url: str) -> str:
    """Return an address without the `/v1` that clients of OpenAI's wire are given: metrics stand beside it."""
    return base_url.rstrip("/").removesuffix("/v1").rstrip("/")


def ask(base_url: str, *, api_key: str | None = None, timeout_s: float = TIMEOUT_S) -> Served:
    """Ask a server what it is; blocks.

    Args:
        base_url: Its address, with or without `/v1`.
        api_key: What it asks for (vLLM's `--api-key`).
        timeout_s: Of each of up to five requests.

    Raises:
        AegisConnectionError: It cannot be reached.
        AegisTimeoutError: It does not answer in time.
        AegisRequestError: It refuses, for one because of the key.
        AegisServerError: Its answer is none.
    """
    root = root_of(base_url)
    with _client(root, api_key, timeout_s) as client:
        models = _models(_json(_get(client, root, "/v1/models")))
        load = _optional(client, "/metrics")
        version = _parsed(_optional(client, "/version")).get("version")
        metrics = None if load is None else read_metrics(load)
        engine, slots = _slots(client)
    by_card = "vllm" if any(card.get("owned_by") == "vllm" for card in models) else ""
    return Served(
        root=root,
        engine=engine or ("vllm" if metrics is not None and "vllm:" in (load or "") else by_card),  # type: ignore[arg-type]
        version=version if isinstance(version, str) else None,
        models=tuple(_model(card) for card in models),
        slots=slots,
        load=metrics,
    )


def slots_of(base_url: str, *, api_key: str | None = None, timeout_s: float = TIMEOUT_S) -> int | None:
    """Return how many requests a server runs at once; None if it does not tell, or does not answer. Blocks.

    llama.cpp tells (`/props`). vLLM tells its `--max-num-seqs` only where it was started with
    `VLLM_SERVER_DEV_MODE=1` (`/server_info`), which also opens what nobody wants open.
    """
    root = root_of(base_url)
    try:
        with _client(root, api_key, timeout_s) as client:
            return _slots(client)[1]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None


def read_metrics(text: str) -> Load:
    """Read what the metrics of vLLM or llama.cpp say, in Prometheus' text format."""
    values: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for name, labels, value in _samples(text):
        values.setdefault(name, []).append((labels, value))

    def total(*names: str) -> int | None:
        found = next((values[name] for name in names if name in values), None)
        return None if found is None else round(sum(value for _, value in found))

    config = [labels for labels, _ in values.get("vllm:cache_config_info", ())]
    shares = [share for each in config if (share := _float(each.get("gpu_memory_utilization"))) is not None]
    used = [value for name in ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc") for _, value in
            values.get(name, ())]  # fmt: skip
    tokens = [found for each in config if (found := _kv_tokens(each)) is not None]
    told = [each["enable_prefix_caching"].lower() == "true" for each in config if "enable_prefix_caching" in each]
    return Load(
        running=total("vllm:num_requests_running", "llamacpp:requests_processing"),
        waiting=total("vllm:num_requests_waiting", "llamacpp:requests_deferred"),
        preempted=total("vllm:num_preemptions_total", "vllm:num_preemptions"),
        kv_used=max(used) if used else None,
        kv_tokens=sum(tokens) if tokens else None,
        prefix_caching=all(told) if told else None,
        prefix_asked=total("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"),
        prefix_found=total("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),
        memory_share=max(shares) if shares else None,
        finished=_by_reason(values.get("vllm:request_success_total", ())),
        longest_prompt=_longest(values.get("vllm:request_prompt_tokens_bucket", ())),
        engines=max(1, len({labels.get("engine", "") for labels, _ in values.get("vllm:num_requests_running", ())})),
    )


def _samples(text: str) -> Iterator[tuple[str, Mapping[str, str], float]]:
    for line in text.splitlines():
        if line.startswith("#") or (found := _SAMPLE.fullmatch(line.strip())) is None:
            continue
        value = _float(found[3])
        if value is not None:
            yield found[1], dict(_LABEL.findall(found[2] or "")), value


def _kv_tokens(config: Mapping[str, str]) -> int | None:
    size = _float(config.get("kv_cache_size_tokens"))  # newer releases; blocks may be shared by groups of layers
    if size is not None:
        return int(size)
    blocks, each = _float(config.get("num_gpu_blocks")), _float(config.get("block_size"))
    return int(blocks * each) if blocks and each else None


def _by_reason(samples: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for labels, value in samples:
        reason = labels.get("finished_reason", "")
        counts[reason] = counts.get(reason, 0) + round(value)
    return counts


def _longest(buckets: Any) -> int | None:
    """Return the least bound of a histogram that nothing exceeded; None where there is none, or nothing was counted."""
    counts: dict[float, float] = {}
    for labels, value in buckets:
        try:
            bound = float(labels.get("le", ""))
        except ValueError:
            continue
        counts[bound] = counts.get(bound, 0.0) + value
    most = counts.get(math.inf, 0.0)
    bound = min((bound for bound, count in counts.items() if count >= most), default=math.inf)
    return int(bound) if most > 0 and bound < math.inf else None


def _client(root: str, api_key: str | None, timeout_s: float) -> httpx.Client:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    # No certificates are read where none are needed.
    return httpx.Client(base_url=root, headers=headers, timeout=timeout_s, verify=not root.startswith("http://"))


def _get(client: httpx.Client, root: str, path: str) -> bytes:
    where = redact_url(root)
    try:
        answer = client.get(path)
    except httpx.TimeoutException as exc:
        raise AegisTimeoutError(f"{where} did not answer in time") from exc
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise AegisConnectionError(f"no server answers at {where} ({type(exc).__name__})") from exc
    if answer.status_code >= 400:
        kind = AegisServerError if answer.status_code >= 500 else AegisRequestError
        raise kind(f"{where}{path} says {answer.status_code}", status_code=answer.status_code)
    return answer.content[:_MOST_BYTES]


def _optional(client: httpx.Client, path: str, **query: str) -> str | None:
    """Return what not every server has; None without it."""
    try:
        answer = client.get(path, params=query)
    except (httpx.HTTPError, httpx.InvalidURL):
        return None
    return answer.content[:_MOST_BYTES].decode("utf-8", "replace") if answer.status_code == 200 else None


def _slots(client: httpx.Client) -> tuple[str, int | None]:
    """Return which engine tells, and how many requests it runs at once."""
    props = _parsed(_optional(client, "/props"))
    if (slots := _count(props.get("total_slots"))) is not None:
        return "llama.cpp", slots
    config = _parsed(_optional(client, "/server_info", config_format="json")).get("vllm_config")
    if not isinstance(config, Mapping):
        return "", None
    scheduler, parallel = config.get("scheduler_config"), config.get("parallel_config")
    each = _count(scheduler.get("max_num_seqs")) if isinstance(scheduler, Mapping) else None
    engines = (_count(parallel.get("data_parallel_size")) if isinstance(parallel, Mapping) else None) or 1
    return "vllm", None if each is None else each * engines


def _json(content: bytes) -> Mapping[str, Any]:
    try:
        read = orjson.loads(content)
    except orjson.JSONDecodeError as exc:
        raise AegisServerError("the answer is no JSON: it is no server on OpenAI's wire") from exc
    if not isinstance(read, dict):
        raise AegisServerError("the answer is no list of models")
    return read


def _parsed(text: str | None) -> Mapping[str, Any]:
    try:
        read = orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        return {}
    return read if isinstance(read, dict) else {}


def _models(read: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    given = read.get("data")
    return [card for card in given if isinstance(card, Mapping)] if isinstance(given, list) else []


def _model(card: Mapping[str, Any]) -> ServedModel:
    meta = card.get("meta")
    window = _count(card.get("max_model_len")) or (_count(meta.get("n_ctx")) if isinstance(meta, Mapping) else None)
    root = card.get("root")
    return ServedModel(
        name=str(card.get("id") or ""), root=root if isinstance(root, str) and root else None, window=window
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _float(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
