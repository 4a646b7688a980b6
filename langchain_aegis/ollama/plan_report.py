"""Put a plan together: what a model takes on a machine, what fits, how fast, and what the server is to be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from langchain_aegis.ollama.knowledge import knowledge, version_tuple
from langchain_aegis.ollama.machine import Host
from langchain_aegis.ollama.plan import (
    GB,
    PROMPT_CACHE_MIB,
    SMALLEST_CONTEXT,
    Layout,
    Need,
    Room,
    largest_context,
    most_slots,
    need,
    possible,
    settle,
)
from langchain_aegis.ollama.plan_quantisation import (
    Quantisation,
    check_quality,
    meets,
    quantisations,
    sources,
)
from langchain_aegis.ollama.plan_shape import Shape, quantised_kv_cache_hurts
from langchain_aegis.ollama.plan_speed import Speed, estimate, source
from langchain_aegis.ollama.tuning import Environment, FlashAttention, server_environment
from langchain_aegis.tuning import OllamaTuning

_GRID = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is asked for; None: the tuning's.

    Attributes:
        quality: Name of the quality target for choosing a quantisation.
        version: Release of the server.
    """

    slots: int | None = None
    context: int | None = None
    kv_type: str = "f16"
    flash_attention: FlashAttention = "auto"
    prompt_cache_mib: int | None = None
    quality: str = "good"
    version: str | None = None


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The model in one quantisation.

    Attributes:
        file_bytes: Of its file; an estimate, except for the one that is there.
        layout: What fits then; None if nothing does.
        speed: One answer at the beginning of its window.
        meets: The quality target.
    """

    row: Quantisation
    file_bytes: int
    layout: Layout | None
    speed: Speed | None
    meets: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that `aegis plan` says of a model.

    Attributes:
        asked: What was wished for.
        layout: What to run; None if nothing fits.
        need: Of `layout`, else of what was asked for.
        windows: Slots -> largest window that fits.
        slots: Most slots that fit with the window that was asked for.
        recommended: The smallest quantisation that meets the quality target and fits, if possible as asked; None if
            there is none.
        speeds: Answers at once, tokens before each, and the tokens per second of all of them together.
    """

    shape: Shape
    host: Host
    asked: Layout
    layout: Layout | None
    need: Need
    windows: dict[int, int]
    slots: int
    stored: tuple[Stored, ...]
    recommended: str | None
    quality: str
    speeds: tuple[tuple[int, int, Speed], ...]
    environment: Environment
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON data; sizes in 10^9 bytes."""
        shape, room = self.shape, self.host.room
        return {
            "machine": self.host.about,
            "model": {
                "name": shape.name, "architecture": shape.architecture, "quantisation": shape.quantisation,
                "parameters": shape.parameters, "parameters_read_per_token": round(shape.parameters_read()),
                "window": shape.window, "single_slot": shape.single_slot,
            },
            "asked": asdict(self.asked),
            "fits_as_asked": self.layout == possible(shape, self.asked),
            "run": asdict(self.layout) if self.layout else None,
            "memory": {
                "weights_gb": _gb(self.need.weights), "kv_slot_gb": _gb(self.need.kv_slot), "slots": self.need.slots,
                "kv_gb": _gb(self.need.kv_slot * self.need.slots), "compute_gb_estimate": _gb(self.need.compute),
                "prompt_cache_gb": _gb(self.need.prompt_cache), "prompt_cache_counts": room.shared,
                "total_gb": _gb(self.need.total), "budget_gb": _gb(room.budget_bytes),
                "memory_gb": _gb(room.memory_bytes), "reserve_gb": _gb(room.reserve_bytes),
            },
            "largest_window_by_slots": {str(slots): window for slots, window in self.windows.items()},
            "most_slots_with_the_window": self.slots,
            "quality": self.quality,
            "recommended_quantisation": self.recommended,
            "quantisations": [
                {
                    "name": each.row.name, "bits_per_weight": each.row.bits, "file_gb": _gb(each.file_bytes),
                    "size_ratio": round(each.row.size_ratio, 3), "speed_ratio": _rounded(each.row.speed_ratio),
                    "kl_divergence": each.row.kl, "perplexity_ratio": _rounded(each.row.perplexity_ratio),
                    "meets_quality": each.meets, "run": asdict(each.layout) if each.layout else None,
                    "tokens_s_estimate": _range(each.speed),
                }
                for each in self.stored
            ],
            "speed_estimates": [
                {"answers": answers, "tokens": tokens, "tokens_s": _range(speed), "ceiling": round(speed.ceiling, 1)}
                for answers, tokens, speed in self.speeds
            ],
            **settings_as_dict(self.host.tuning, self.environment),
            "notes": list(self.notes),
            "sources": {**sources(), "speed": source()},
        }  # fmt: skip


def make_plan(shape: Shape, host: Host, wish: Wish, notes: Sequence[str] = ()) -> Plan:
    """Plan a model on a machine.

    Args:
        notes: What is to be said before the plan's own notes.

    Raises:
        AegisConfigError: The wish contradicts itself, or names something that does not exist.
    """
    tuning, room, bandwidth = host.tuning, host.room, host.bandwidth_gb_s
    asked = layout_of(tuning, wish)
    most = check_quality(wish.quality)
    layout = settle(shape, asked, room)
    stored = tuple(_stored(shape, row, asked, room, bandwidth, meets(row, most)) for row in _offered(shape))
    environment = server_environment(
        tuning, version=wish.version, flash_attention=wish.flash_attention, layout=layout or asked,
        fitted_to=shape.name if layout and layout != asked else "", gpu=room.gpu,
    )  # fmt: skip
    grid = [n for n in _GRID if n == 1 or not shape.single_slot]
    return Plan(
        shape=shape,
        host=host,
        asked=asked,
        layout=layout,
        need=need(shape, layout or asked, room),
        windows={n: largest_context(shape, replace(asked, slots=n), room) for n in grid},
        slots=most_slots(shape, possible(shape, asked), room),
        stored=stored,
        recommended=_recommended(stored, possible(shape, asked)),
        quality=wish.quality,
        speeds=_speeds(shape, layout or asked, bandwidth),
        environment=environment,
        notes=(*notes, *shape.assumed, *_said(shape, asked, layout, room), *environment.notes),
    )


def layout_of(tuning: OllamaTuning, wish: Wish) -> Layout:
    """Return the wish with the tuning's numbers where it says nothing."""
    told = tuning.environment()
    cache_mib = int(told.get("LLAMA_ARG_CACHE_RAM", PROMPT_CACHE_MIB))
    if wish.prompt_cache_mib is not None:
        cache_mib = wish.prompt_cache_mib
    if wish.version and version_tuple(wish.version) < version_tuple(knowledge().runner_since):
        cache_mib = 0  # older runners keep prompts in their slots only
    return Layout(
        slots=wish.slots or int(told["OLLAMA_NUM_PARALLEL"]),
        context=wish.context or int(told["OLLAMA_CONTEXT_LENGTH"]),
        kv_type=wish.kv_type,
        flash_attention=wish.flash_attention != "off",
        prompt_cache_mib=cache_mib,
    )


def settings_as_dict(tuning: OllamaTuning, environment: Environment) -> dict[str, Any]:
    """Return what is to be set, as JSON data."""
    return {
        "tuning": tuning.name,
        "ollama_version": environment.version,
        "server": [asdict(line) for line in environment.lines],
        "request": [asdict(line) for line in tuning.request],
        "client": [asdict(line) for line in environment.client],
    }


def _offered(shape: Shape) -> list[Quantisation]:
    """Return the quantisations that there are of a model: one that was trained in its own is not converted."""
    rows = quantisations()
    if shape.native:
        return [rows.get(shape.quantisation, rows["MXFP4"])]
    return [row for row in rows.values() if not row.native]


def _stored(shape: Shape, row: Quantisation, asked: Layout, room: Room, bandwidth: float | None, good: bool) -> Stored:
    there = shape.quantisation == row.name or shape.native
    model = shape if there else shape.stored_as(row.name)
    return Stored(
        row=row,
        file_bytes=model.weights_bytes,
        layout=settle(model, asked, room),
        speed=estimate(model, bandwidth, 0) if bandwidth else None,
        meets=good,
    )


def _recommended(stored: Sequence[Stored], wanted: Layout) -> str | None:
    """Return the smallest that is good enough and fits, best as asked: smaller is faster."""
    good = [each for each in stored if each.meets and each.layout]
    best = [each for each in good if each.layout == wanted] or good
    return min(best, key=lambda each: each.file_bytes).row.name if best else None


def _speeds(shape: Shape, layout: Layout, bandwidth: float | None) -> tuple[tuple[int, int, Speed], ...]:
    if bandwidth is None:
        return ()
    points = [(1, 0), (1, layout.context // 2), (layout.slots, layout.context // 2)]
    return tuple(
        (answers, tokens, estimate(shape, bandwidth, tokens, answers=answers, kv_type=layout.kv_type))
        for answers, tokens in dict.fromkeys(points)
    )


def _said(shape: Shape, asked: Layout, layout: Layout | None, room: Room) -> list[str]:
    said = []
    if shape.single_slot and asked.slots > 1:
        said.append("Ollama runs one answer of this model at a time, whatever OLLAMA_NUM_PARALLEL says.")
    if shape.window and asked.context > shape.window:
        said.append(f"It was trained for {shape.window:,} tokens; a larger window is cut to that.")
    if asked.kv_type != "f16" and quantised_kv_cache_hurts(shape.architecture):
        said.append("A quantised KV cache is known to spoil this model's answers; see docs/quantization.md.")
    if layout is None:
        missing = need(shape, replace(asked, slots=1, context=SMALLEST_CONTEXT), room).total - room.budget_bytes
        said.append(f"It does not fit: even one slot of {SMALLEST_CONTEXT:,} tokens needs {missing / GB:.1f} GB more.")
        if room.shared and asked.prompt_cache_mib:
            said.append("Prompts seen before take part of the memory; --prompt-cache-mib 0 gives them up.")
    elif layout != (wanted := possible(shape, asked)):
        said.append(f"Of {wanted.slots} slots of {wanted.context:,} tokens, {layout.slots} of {layout.context:,} fit.")
        half = settle(shape, replace(asked, kv_type="q8_0"), room) if asked.kv_type == "f16" else None
        if half and (half.slots, half.context) != (layout.slots, layout.context):
            said.append(f"With --kv-cache q8_0 {half.slots} of {half.context:,} would.")
    return said


def _range(speed: Speed | None) -> list[float] | None:
    return [round(speed.low, 1), round(speed.high, 1)] if speed else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _gb(size: int) -> float:
    return round(size / GB, 3)
