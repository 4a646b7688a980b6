"""How much memory a model takes with a number of slots and a window, and what fits; arithmetic without I/O.

All sizes are bytes, and a GB is 10^9 of them. What the runner needs beside weights and KV cache is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from langchain_aegis.ollama.plan_quantisation import kv_bits
from langchain_aegis.ollama.plan_shape import Shape

GB = 10**9
MIB = 2**20
CELL = 256  # windows are rounded up to a multiple of it (llama.cpp, src/llama-context.cpp)
SMALLEST_CONTEXT = 4096  # no smaller window is recommended: it is the server's own smallest default
MOST_SLOTS = 64  # more is not planned with, however much memory there is
PROMPT_CACHE_MIB = 8192  # llama.cpp, common/common.h: cache_ram_mib
# Memory that a CUDA or ROCm process takes before it does anything: Ollama 0.12, discover/gpu.go: cudaMinimumMemory.
DEVICE_BYTES = 457 * MIB


@dataclass(frozen=True, kw_only=True)
class Room:
    """Where a model has to fit.

    Attributes:
        memory_bytes: Of the GPU, or of the machine where both use the same.
        reserve_bytes: What stays free.
        shared: The prompt cache lies in this memory, too.
        gpu: A GPU runs the model.
    """

    memory_bytes: int
    reserve_bytes: int
    shared: bool
    gpu: bool

    @property
    def budget_bytes(self) -> int:
        """What models may take."""
        return max(self.memory_bytes - self.reserve_bytes, 0)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is run.

    Attributes:
        slots: Answers at once (OLLAMA_NUM_PARALLEL).
        context: Window of each slot in tokens (OLLAMA_CONTEXT_LENGTH).
        kv_type: OLLAMA_KV_CACHE_TYPE.
        flash_attention: Without it the scores of a whole window are kept.
        prompt_cache_mib: LLAMA_ARG_CACHE_RAM.
    """

    slots: int
    context: int
    kv_type: str = "f16"
    flash_attention: bool = True
    prompt_cache_mib: int = PROMPT_CACHE_MIB


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a model takes.

    Attributes:
        kv_slot: Keys and values of one slot.
        compute: Buffers of the runner: an estimate.
        prompt_cache: Prompts seen before, in main memory; its bound, not what is used at first.
        total: What has to fit into the memory of the Room.
    """

    weights: int
    kv_slot: int
    slots: int
    compute: int
    prompt_cache: int
    total: int


def batch_of(layout: Layout) -> int:
    """Return how many tokens of a prompt are read at once, as Ollama 0.33 chooses (server/sched.go:859)."""
    if not layout.flash_attention:
        return 512
    tokens = layout.context * layout.slots
    return 2048 if tokens > 32768 else 1024 if tokens > 4096 else 512


def kv_bytes(shape: Shape, layout: Layout) -> int:
    """Return what keys, values and states of one slot take."""
    cells = _padded(layout.context)
    # llama.cpp, src/llama-kv-cache-iswa.cpp: a layer that sees a part keeps that part and one batch.
    sliding = min(cells, _padded(shape.sliding_window + batch_of(layout)))
    values = shape.full_width * cells + shape.sliding_width * sliding
    return round(values * kv_bits(layout.kv_type) / 8) + shape.state_bytes


def compute_bytes(shape: Shape, layout: Layout, *, gpu: bool) -> int:
    """Estimate the runner's buffers: the output of one batch, and without flash attention the scores of one layer."""
    batch = batch_of(layout)
    values = batch * (shape.vocabulary + 4 * shape.embedding)
    if not layout.flash_attention:
        values += batch * shape.heads * _padded(layout.context)
    return 4 * values + (DEVICE_BYTES if gpu else 0)


def need(shape: Shape, layout: Layout, room: Room) -> Need:
    """Return what a model takes."""
    kv_slot = kv_bytes(shape, layout)
    compute = compute_bytes(shape, layout, gpu=room.gpu)
    prompt_cache = layout.prompt_cache_mib * MIB
    total = shape.weights_bytes + kv_slot * layout.slots + compute + (prompt_cache if room.shared else 0)
    return Need(
        weights=shape.weights_bytes,
        kv_slot=kv_slot,
        slots=layout.slots,
        compute=compute,
        prompt_cache=prompt_cache,
        total=total,
    )


def fits(shape: Shape, layout: Layout, room: Room) -> bool:
    """Return whether it fits into what models may take."""
    return need(shape, layout, room).total <= room.budget_bytes


def largest_context(shape: Shape, layout: Layout, room: Room) -> int:
    """Return the largest window that fits with these slots, a multiple of 256; 0 if none does."""
    low, high = 0, (shape.window or 2**20) // CELL
    while low < high:  # need grows with the window
        middle = (low + high + 1) // 2
        if fits(shape, replace(layout, context=middle * CELL), room):
            low = middle
        else:
            high = middle - 1
    return low * CELL


def most_slots(shape: Shape, layout: Layout, room: Room) -> int:
    """Return the largest number of slots that fits with this window, up to 64; 0 if none does."""
    most = 1 if shape.single_slot else MOST_SLOTS
    return max((n for n in range(1, most + 1) if fits(shape, replace(layout, slots=n), room)), default=0)


def settle(shape: Shape, wish: Layout, room: Room) -> Layout | None:
    """Return what to run: the wish, else fewer slots, else a smaller window, too; None if nothing fits.

    The window comes first: a prompt that does not fit is refused, a call that waits for a slot is answered later.
    """
    wanted = possible(shape, wish)
    slots = min(wanted.slots, most_slots(shape, wanted, room))
    if slots:
        return replace(wanted, slots=slots)
    one = replace(wanted, slots=1)
    smaller = min(largest_context(shape, one, room), wanted.context)
    return replace(one, context=smaller) if smaller >= min(SMALLEST_CONTEXT, wanted.context) else None


def possible(shape: Shape, wish: Layout) -> Layout:
    """Return the wish as far as the model can fulfil it, whatever the memory."""
    slots = 1 if shape.single_slot else wish.slots
    return replace(wish, slots=slots, context=min(wish.context, shape.window or wish.context))


def _padded(tokens: int) -> int:
    return -(-tokens // CELL) * CELL
