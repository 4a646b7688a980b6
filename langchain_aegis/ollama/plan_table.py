"""Show a plan to a person: rich tables."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from langchain_aegis.ollama.plan import GB
from langchain_aegis.ollama.plan_quantisation import meets, quality_levels, quantisations, sources
from langchain_aegis.ollama.plan_report import Plan, Stored
from langchain_aegis.ollama.plan_speed import Speed, source
from langchain_aegis.ollama.tuning import Environment
from langchain_aegis.tuning import Line, OllamaTuning


def plan_table(plan: Plan) -> RenderableType:
    """Return a plan as tables."""
    shape = plan.shape
    read = "" if not shape.experts else f", {shape.parameters_read() / 1e9:.1f}B of them for each token"
    head = Text(f"{shape.name}: {shape.parameters / 1e9:.1f}B parameters{read}, {shape.quantisation}", style="bold")
    verdict = Text(_verdict(plan), style="green" if plan.layout else "red")
    parts: list[RenderableType] = [head, Text(plan.host.about), Text(), _memory(plan), verdict]
    parts += [Text(), _windows(plan), Text(), _stored(plan)]
    if plan.speeds:
        parts += [Text(), _speeds(plan)]
    parts += [Text(), settings_table(plan.host.tuning, plan.environment)]
    if plan.notes:
        parts += [Text(), *(Text(f"- {note}") for note in plan.notes)]
    return Group(*parts)


def settings_table(tuning: OllamaTuning, environment: Environment) -> RenderableType:
    """Return what is to be set, and why."""
    table = Table(title=f"Settings: {tuning.name}, Ollama {environment.version}", title_justify="left", expand=True)
    for name, ratio in (("Where", 2), ("Setting", 5), ("Value", 2), ("Why", 9)):
        table.add_column(name, overflow="fold", ratio=ratio)
    groups: Iterable[tuple[str, tuple[Line, ...]]] = (
        ("server", environment.lines), ("request", tuning.request), ("client", environment.client),
    )  # fmt: skip
    for where, lines in groups:
        for line in lines:
            table.add_row(where, line.name, str(line.value), line.reason)
    return table


def quantisation_table() -> RenderableType:
    """Return all quantisations, without a model."""
    table = Table(title="Quantisations, relative to F16", title_justify="left")
    for name in ("", "Bits per weight", "Size", "Speed", "Perplexity", "KL divergence", "Quality", "ollama create"):
        table.add_column(name, justify="left" if name in ("", "Quality", "ollama create") else "right")
    for row in quantisations().values():
        table.add_row(
            row.name, f"{row.bits:.2f}", _percent(row.size_ratio), _times(row.speed_ratio),
            _worse(row.perplexity_ratio), "-" if row.kl is None else f"{row.kl:.4f}", quality_of(row.name),
            "yes" if row.create else "",
        )  # fmt: skip
    return Group(table, Text(f"Size and speed: {sources()['sizes']}. Quality: {sources()['quality']}."))


def quality_of(name: str) -> str:
    """Return the strictest quality target that a quantisation meets."""
    row = quantisations()[name]
    if row.native:
        return "as trained"
    return next((level for level, most in quality_levels().items() if meets(row, most)), "")


def _memory(plan: Plan) -> Table:
    need, room = plan.need, plan.host.room
    layout = plan.layout or plan.asked
    table = Table(title="Memory", title_justify="left")
    for name in ("", "GB"):
        table.add_column(name, justify="right" if name else "left")
    table.add_column("")
    rows = [
        ("Weights", need.weights, "size of its file"),
        (f"KV cache, {need.slots} x {layout.context:,} tokens", need.kv_slot * need.slots,
         f"{need.kv_slot / GB:.2f} for each slot, {layout.kv_type}"),
        ("Buffers of the runner", need.compute, "estimate"),
    ]  # fmt: skip
    if room.shared:
        rows.append(("Prompts seen before", need.prompt_cache, "at most; LLAMA_ARG_CACHE_RAM"))
    for name, size, note in rows:
        table.add_row(name, f"{size / GB:.1f}", note)
    table.add_section()
    table.add_row("Together", f"{need.total / GB:.1f}", "")
    kept = f"{room.memory_bytes / GB:.1f}, of which {room.reserve_bytes / GB:.1f} stay free"
    table.add_row("There is", f"{room.budget_bytes / GB:.1f}", kept)
    if not room.shared:
        table.caption = f"Beside it up to {need.prompt_cache / GB:.1f} GB of main memory for prompts seen before."
        table.caption_justify = "left"
    return table


def _windows(plan: Plan) -> Table:
    table = Table(title="Largest window that fits", title_justify="left")
    table.add_column("Slots", justify="right")
    table.add_column("Tokens of each slot")
    for slots, window in plan.windows.items():
        limit = (
            ", all that it was trained for" if plan.shape.window and window >= plan.shape.window // 256 * 256 else ""
        )
        table.add_row(str(slots), f"{window:,}{limit}" if window else "does not fit")
    return table


def _stored(plan: Plan) -> Table:
    table = Table(title="Stored as", title_justify="left")
    for name in ("", "File, GB", "What fits", "Tokens/s (estimate)", "Perplexity", "Quality", ""):
        table.add_column(name, justify="right" if name.startswith(("File", "Tokens", "Perpl")) else "left")
    for each in plan.stored:
        marks = [mark for mark, there in (
            ("this one", each.row.name == plan.shape.quantisation),
            (f"smallest that is {plan.quality} and fits", each.row.name == plan.recommended),
        ) if there]  # fmt: skip
        table.add_row(
            each.row.name, f"{each.file_bytes / GB:.1f}", _fit(each), _tokens(each.speed),
            _worse(each.row.perplexity_ratio), quality_of(each.row.name), ", ".join(marks),
            style="bold" if each.row.name == plan.recommended else "" if each.layout and each.meets else "dim",
        )  # fmt: skip
    table.caption = f"Perplexity: relative to F16, {sources()['quality']}. Sizes: {sources()['sizes']}."
    table.caption_justify = "left"
    return table


def _speeds(plan: Plan) -> Table:
    table = Table(title="Generation (estimate from the memory's bandwidth)", title_justify="left")
    for name in ("Answers at once", "Tokens before each", "Tokens/s of all", "Ceiling"):
        table.add_column(name, justify="right")
    for answers, tokens, speed in plan.speeds:
        table.add_row(str(answers), f"{tokens:,}", _tokens(speed), _digits(speed.ceiling, speed.ceiling))
    table.caption = f"Ceiling: weights and KV cache read once per token. Share reached: {source()}."
    table.caption_justify = "left"
    return table


def _verdict(plan: Plan) -> str:
    if plan.layout is None:
        return "Does not fit."
    slots = plan.layout.slots
    text = f"Fits with {slots} {'slot' if slots == 1 else 'slots'} of {plan.layout.context:,} tokens"
    return f"{text}; up to {plan.slots} would." if plan.slots > slots else f"{text}."


def _fit(each: Stored) -> str:
    return f"{each.layout.slots} x {each.layout.context:,}" if each.layout else "nothing"


def _tokens(speed: Speed | None) -> str:
    return "-" if speed is None else f"{_digits(speed.low, speed.low)}-{_digits(speed.high, speed.low)}"


def _digits(number: float, like: float) -> str:
    return f"{number:.{0 if like >= 10 else 1}f}"


def _percent(ratio: float) -> str:
    return f"{ratio:.0%}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1f}x"


def _worse(ratio: float | None) -> str:
    return "-" if ratio is None else f"+{ratio - 1:.1%}"
