"""What the figures were measured on, with how much noise."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from langchain_aegis.bench.figures import Figure, percentile

_PACKAGES = ("langchain-aegis", "langchain-core", "langchain-ollama", "httpx", "redis", "onnxruntime", "xllamacpp")
_LOOPS = 300_000  # about 20 ms


def machine() -> dict[str, Any]:
    """Return processor, cores, memory, system and Python."""
    return {
        "processor": _processor(),
        "cores": _cores(),
        "memory_gb": _memory_gb(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what takes part, as far as it is installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def load_average() -> float | None:
    """Return how many processes wanted to run, of the last minute; None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def spin_s() -> float:
    """Return how long a computation took that is always the same: what differs is the machine's noise."""
    started = time.perf_counter()
    total = 0
    for i in range(_LOOPS):
        total += i & 7
    return time.perf_counter() - started


def noise(spins: Sequence[float]) -> dict[str, Any]:
    """Return how far apart the same computation was.

    `spread` 0.2: the upper quartile took 20 % longer than the lower one. The extremes are told, but one process that
    was interrupted once says nothing about a median.
    """
    of = Figure(workload="noise", name="spin", way="", unit="ms", better="lower", values=tuple(s * 1e3 for s in spins))
    return {
        "spin_ms": {"median": of.median, "low": of.low, "high": of.high, "times": len(spins)},
        "spread": round(percentile(spins, 0.75) / percentile(spins, 0.25) - 1, 3),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
