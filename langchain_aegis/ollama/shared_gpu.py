"""Find services of compose files that would run Ollama and vLLM on one GPU at the same time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_aegis.ollama.compose_file import ComposeFile
from langchain_aegis.ollama.findings import Finding
from langchain_aegis.ollama.places import line_of
from langchain_aegis.ollama.services import Service, as_list, as_map

_VLLM = re.compile(r"(^|/)vllm(-openai)?(:|@|$)")


def reserves_gpu(data: Mapping[str, Any]) -> bool:
    """Say whether a service gets a GPU."""
    devices = as_map(as_map(as_map(data.get("deploy")).get("resources")).get("reservations")).get("devices")
    return bool(devices) or data.get("runtime") == "nvidia" or bool(data.get("gpus"))


def check_shared_gpu(files: Sequence[ComposeFile], services: Sequence[Service]) -> Iterator[Finding]:
    """Judge the services that start together: both without a profile, or with one that they share."""
    ollama = [s for s in services if s.kind == "ollama" and reserves_gpu(s.data)]
    for file in files:
        for name, data in file.services.items():
            image = data.get("image")
            if not _VLLM.search(str(image or "")) or not reserves_gpu(data):
                continue
            for other in ollama:
                ours, theirs = _profiles(data), _profiles(other.data)
                if ours & theirs or not (ours or theirs):
                    yield Finding(
                        code="engines-share-gpu", severity="warning",
                        where=f"{file.path}{line_of(image)} services.{name}",
                        what=f"{name} (vLLM) and {other.name} (Ollama) start together, each with the GPU",
                        why="vLLM takes most of the GPU's memory at once; Ollama's models then go to the CPU, or vLLM "
                        "does not start.",
                        fix=f'Give {name} profiles: ["ingestion"], and stop {other.name} while it runs.',
                    )  # fmt: skip


def _profiles(data: Mapping[str, Any]) -> set[str]:
    return {str(profile) for profile in as_list(data.get("profiles"))}
