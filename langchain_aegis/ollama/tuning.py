"""The server's environment for a tuning: what this release reads, what fits, and why each line is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.ollama.knowledge import knowledge, version_tuple
from langchain_aegis.ollama.plan import PROMPT_CACHE_MIB, Layout
from langchain_aegis.ollama.plan_quantisation import kv_bits
from langchain_aegis.tuning import Line, OllamaTuning

FlashAttention = Literal["auto", "on", "off"]
# First release whose CUDA libraries hold code for compute capability 12.1 (CMakePresets.json, by tag), and first that
# reads the GB10's memory (pull request 12619, "NVML fallback for unified memory GPUs"), and first whose new runner
# loads models there past the page cache (17286; large ones stalled before, issue 16480).
_SM_121_SINCE, _UNIFIED_MEMORY_SINCE, _DIRECT_LOAD_SINCE = "0.11.11", "0.12.6", "0.32.2"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a server is started with.

    Attributes:
        version: Release that it is for, e.g. "0.32.15".
        lines: Variables that this release reads, with their reasons.
        client: Fields of AegisSettings of the callers; as many calls at once as there are slots.
        notes: What was left out or decided otherwise, in whole sentences.
    """

    version: str
    lines: tuple[Line, ...]
    client: tuple[Line, ...]
    notes: tuple[str, ...]


def server_environment(
    tuning: OllamaTuning,
    *,
    version: str | None = None,
    flash_attention: FlashAttention = "auto",
    layout: Layout | None = None,
    fitted_to: str = "",
    gpu: bool | None = None,
) -> Environment:
    """Return the environment of a server.

    Args:
        version: Its release; None: the newest that is known to be good.
        flash_attention: "auto" follows the release; "off" also keeps the KV cache from being quantised.
        layout: Slots, window, type of the KV cache and size of the prompt cache; None: the tuning's.
        fitted_to: The model that slots and window were fitted to.
        gpu: A GPU runs the models; None: as in the tuning.

    Raises:
        AegisConfigError: A quantised KV cache without flash attention: every model would fail to load.
    """
    release = version or knowledge().image["ollama"].tag
    gpu = tuning.gpu if gpu is None else gpu
    lines = _laid_out(tuning.server, layout, fitted_to)
    kv_type = layout.kv_type if layout else "f16"
    flash, why = flash_attention_line(release, flash_attention, kv_type=kv_type, gpu=gpu)
    if flash:
        lines.append(flash)
    if kv_type != "f16":
        reason = f"keys and values take {kv_bits(kv_type):g} bits instead of 16, in all models; answers change a little"
        source = "Ollama, docs/faq.mdx; llama.cpp pull request 21551"
        lines.append(Line(name="OLLAMA_KV_CACHE_TYPE", value=kv_type, reason=reason, source=source))
    read = [line for line in lines if knowledge().setting(line.name, release).status == "read"]
    since = {line.name: knowledge().server[line.name].since for line in lines if line not in read}
    notes = [why, *(f"{n} is left out: Ollama reads it since {first}, not in {release}." for n, first in since.items())]
    if not knowledge().knows(release):
        notes.append(f"Ollama {release} is outside of what is known here ({knowledge().oldest} to "
                     f"{knowledge().verified}); it is treated like the nearest known release.")  # fmt: skip
    if tuning.name == "dgx-spark":
        notes += _of_spark(release)
    client = tuning.client
    if layout:
        client = tuple(replace(each, value=layout.slots) if each.name == "max_concurrency" else each for each in client)
    return Environment(version=release, lines=tuple(read), client=client, notes=tuple(notes))


def flash_attention_line(
    release: str, wish: FlashAttention, *, kv_type: str = "f16", gpu: bool = True
) -> tuple[Line | None, str]:
    """Return the line that a release needs for flash attention, None if none, and a sentence that says why.

    Since 0.30.0 the runner gets `--flash-attn auto`, asks the device when a model is loaded, and switches it on where
    all layers can have it; that includes the GB10 (sm_121). To say "1" there would keep it on where a device cannot,
    on the CPU. Releases before switch it on by themselves only for some families of models, and take a quantised KV
    cache only if it was asked for.

    Raises:
        AegisConfigError: It is to be off, and the KV cache quantised.
    """
    name, source = "OLLAMA_FLASH_ATTENTION", "Ollama 0.33, llm/llama_server.go:597; ml/device.go"
    quantised = kv_bits(kv_type) < 16
    if wish == "off":
        if quantised:
            raise AegisConfigError(
                f"a KV cache of {kv_type} needs flash attention: with it off every model fails to load. "
                "Use --kv-cache f16, or leave --flash-attention alone"
            )
        reason = "switched off as asked: costs memory for each window, and the KV cache stays f16"
        return Line(name=name, value="0", reason=reason, source=source), "Flash attention is off, as asked."
    if wish == "on":
        reason = "forced on as asked; where a device cannot, it runs on the CPU"
        return Line(name=name, value="1", reason=reason, source=source), "Flash attention is forced on, as asked."
    since = knowledge().runner_since
    if version_tuple(release) >= version_tuple(since):
        return None, (
            f"OLLAMA_FLASH_ATTENTION stays unset: since Ollama {since} the runner asks the device when a model is "
            "loaded, and the GB10 (sm_121) can."
        )
    if not (gpu or quantised):
        return None, f"OLLAMA_FLASH_ATTENTION stays unset: there is no GPU, and Ollama {release} decides by the model."
    reason = f"Ollama {release} switches it on by itself only for some families of models"
    if quantised:
        reason += ", and ignores the KV cache's type without it"
    source = f"Ollama {release}, fs/ggml/ggml.go: FlashAttention(); llm/server.go"
    return Line(name=name, value="1", reason=reason, source=source), (
        f"OLLAMA_FLASH_ATTENTION=1: before Ollama {since} it is on for some families of models only."
    )


def _laid_out(lines: Sequence[Line], layout: Layout | None, fitted_to: str) -> list[Line]:
    """Return the lines with the layout's numbers, each with a reason that is true of them."""
    if layout is None:
        return list(lines)
    told = {"OLLAMA_NUM_PARALLEL": layout.slots, "OLLAMA_CONTEXT_LENGTH": layout.context}
    told["LLAMA_ARG_CACHE_RAM"] = layout.prompt_cache_mib
    short = {
        "OLLAMA_NUM_PARALLEL": "answers that a model generates at once",
        "OLLAMA_CONTEXT_LENGTH": "window of one slot in tokens",
        "LLAMA_ARG_CACHE_RAM": f"MiB of main memory for prompts seen before, {PROMPT_CACHE_MIB:,} if unset",
    }
    out = []
    for line in lines:
        value = str(told.pop(line.name, line.value))
        if value != str(line.value):
            why = f"what fits beside {fitted_to}" if fitted_to else "as asked"
            line = replace(line, value=value, reason=f"{short[line.name]}: {why}", source="aegis plan")
        out.append(line)
    if told.get("LLAMA_ARG_CACHE_RAM", PROMPT_CACHE_MIB) != PROMPT_CACHE_MIB:
        name = "LLAMA_ARG_CACHE_RAM"
        out.append(Line(name=name, value=str(told[name]), reason=f"{short[name]}: as asked", source="aegis plan"))
    return out


def _of_spark(release: str) -> list[str]:
    number = version_tuple(release)
    if number < version_tuple(_SM_121_SINCE):
        return [f"Ollama {release} has no code for this GPU (sm_121); use {_DIRECT_LOAD_SINCE} or later."]
    if number < version_tuple(_UNIFIED_MEMORY_SINCE):
        return [f"Ollama {release} cannot read this GPU's memory; use {_DIRECT_LOAD_SINCE} or later."]
    if version_tuple(knowledge().runner_since) <= number < version_tuple(_DIRECT_LOAD_SINCE):
        return [f"Large models may stall while Ollama {release} loads them here; use {_DIRECT_LOAD_SINCE} or later."]
    return []
