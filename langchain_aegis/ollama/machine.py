"""What this machine is, as far as models go: its memory, its GPU, and the tuning that fits."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.ollama.plan import GB, Room
from langchain_aegis.tuning import AUTO, OllamaTuning, named

_GB10 = "GB10"  # the chip of a DGX Spark; its driver reports no memory of its own
_QUERY = ["--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
_DEVICE_MARGIN = 2**30  # what llama.cpp leaves free on a device, common/common.h: fit_params_target
_SMALLEST_RESERVE = 2 * GB


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine.

    Attributes:
        memory_bytes: Main memory.
        gpu: Name of the first NVIDIA GPU; None if there is none that can be seen.
        gpu_memory_bytes: Of all GPUs together; None where they use the main memory.
        battery: It is carried around.
    """

    memory_bytes: int
    gpu: str | None = None
    gpu_memory_bytes: int | None = None
    battery: bool = False

    @property
    def tuning(self) -> str:
        """Name of the tuning for it."""
        if self.gpu and _GB10 in self.gpu:
            return "dgx-spark"
        if self.battery:
            return "laptop"
        return "workstation" if self.gpu else "cpu"

    def __str__(self) -> str:
        """Say it in a line."""
        own = f" with {self.gpu_memory_bytes / GB:.0f} GB" if self.gpu_memory_bytes else ""
        gpu = f"{self.gpu}{own}" if self.gpu else "no GPU"
        return f"{self.memory_bytes / GB:.0f} GB of main memory, {gpu}{', a battery' if self.battery else ''}"


def detect() -> Machine:
    """Return this machine. What cannot be read counts as not there."""
    darwin = platform.system() == "Darwin"
    gpu, gpu_memory = (None, None) if darwin else _nvidia()
    return Machine(
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu=gpu,
        gpu_memory_bytes=gpu_memory,
        # A Mac's models share the memory with everything else, as a laptop's do.
        battery=darwin or any(Path("/sys/class/power_supply").glob("BAT*")),
    )


@dataclass(frozen=True, kw_only=True)
class Host:
    """Where a model is to run: how that machine is tuned, and what room it has.

    Attributes:
        bandwidth_gb_s: Of the memory that holds the model, in 10^9 bytes per second; None: not known.
        about: Which machine this is, and how that is known; one line.
    """

    tuning: OllamaTuning
    room: Room
    bandwidth_gb_s: float | None
    about: str


def host_of(
    tuning: str, memory_gb: float | None = None, reserve_gb: float | None = None, bandwidth_gb_s: float | None = None
) -> Host:
    """Return the machine of a named tuning, or this one for "auto".

    Args:
        memory_gb: Instead of what the machine says, or the tuning plans with.
        reserve_gb: What stays free. Default: a quarter of shared memory, for everything else on the machine; 1 GiB of
            a GPU's own, as the runner itself leaves.
        bandwidth_gb_s: Instead of what is known of the machine.

    Raises:
        AegisConfigError: There is no such tuning, or nothing is left for a model.
    """
    for name, value in (("--memory-gb", memory_gb), ("--bandwidth-gb-s", bandwidth_gb_s)):
        if value is not None and not 0 < value < math.inf:
            raise AegisConfigError(f"{name} must be above 0, got {value:g}")
    if tuning == AUTO:
        machine = detect()
        told, shared, gpu = named(machine.tuning), machine.gpu_memory_bytes is None, machine.gpu is not None
        memory = machine.gpu_memory_bytes or machine.memory_bytes
        about = f"This machine: {machine}; tuning {told.name}."
    else:
        told = named(tuning)
        shared, gpu, memory = told.shared, told.gpu, round(told.memory_gb * GB)
        about = f"{told.title}; {'as asked' if memory_gb else 'planned with'} {memory_gb or told.memory_gb:g} GB."
    if memory_gb is not None:
        memory = round(memory_gb * GB)
    reserve = max(memory // 4, _SMALLEST_RESERVE) if shared else _DEVICE_MARGIN
    if reserve_gb is not None:
        reserve = round(reserve_gb * GB)
    if not 0 <= reserve < memory:
        raise AegisConfigError(
            f"nothing is left for models: of {memory / GB:g} GB (--memory-gb) {reserve / GB:g} (--reserve-gb) stay free"
        )
    return Host(
        tuning=told,
        room=Room(memory_bytes=memory, reserve_bytes=reserve, shared=shared, gpu=gpu),
        bandwidth_gb_s=told.bandwidth_gb_s if bandwidth_gb_s is None else bandwidth_gb_s,
        about=about,
    )


def _nvidia() -> tuple[str | None, int | None]:
    """Return the name of the first NVIDIA GPU and the memory of all, in bytes; None where nothing is said."""
    if (program := shutil.which("nvidia-smi")) is None:
        return None, None
    try:
        done = subprocess.run(  # noqa: S603 - the system's own program, with fixed arguments
            [program, *_QUERY], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
    rows = [row.rpartition(",") for row in done.stdout.splitlines() if "," in row]
    if not rows:
        return None, None
    mib = [int(memory) for _, _, memory in rows if memory.strip().isdigit()]
    return rows[0][0].strip(), sum(mib) * 2**20 or None
