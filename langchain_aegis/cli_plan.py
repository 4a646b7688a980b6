"""The command `aegis plan`.

Imports of the library stand inside the command, so that `aegis --help` starts fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, cast
from urllib.parse import urlsplit

import typer

from langchain_aegis.cli_cache import Json, OllamaUrl, print_json

if TYPE_CHECKING:
    from langchain_aegis.ollama.machine import Host
    from langchain_aegis.ollama.plan_report import Plan, Wish
    from langchain_aegis.ollama.tuning import Environment, FlashAttention

_FORMATS = ("table", "json", "compose", "env", "systemd")
_QUALITY = "What to lose at most: near-lossless, high, good, fair or any."
_MEMORY = "Memory of the GPU, or of the machine where it is shared, in 10^9 bytes."
_TIMEOUT_S = 5.0


def plan(
    model: Annotated[str | None, typer.Argument(help="Model. Default: OLLAMA_MODEL_GENERATION.")] = None,
    tuning: Annotated[str, typer.Option(help="auto (this machine), dgx-spark, workstation, laptop or cpu.")] = "auto",
    slots: Annotated[int | None, typer.Option(min=1, help="Answers at once.")] = None,
    context: Annotated[int | None, typer.Option(min=256, help="Window of each slot in tokens.")] = None,
    kv_cache: Annotated[str, typer.Option(help="Type of the KV cache: f16, q8_0 or q4_0.")] = "f16",
    flash_attention: Annotated[str, typer.Option(help="auto (by the server's release), on or off.")] = "auto",
    quantization: Annotated[
        str | None, typer.Option("--quantization", "--quantisation", help="Plan it stored as this, e.g. Q8_0.")
    ] = None,
    quality: Annotated[str, typer.Option(help=_QUALITY)] = "good",
    parameters: Annotated[str | None, typer.Option(help="Size of a model that is not known here, e.g. 8b.")] = None,
    memory_gb: Annotated[float | None, typer.Option(help=_MEMORY)] = None,
    reserve_gb: Annotated[float | None, typer.Option(help="What of it stays free.")] = None,
    bandwidth_gb_s: Annotated[float | None, typer.Option(help="Bandwidth of that memory, for tokens/s.")] = None,
    prompt_cache_mib: Annotated[int | None, typer.Option(min=0, help="Main memory for prompts seen before.")] = None,
    ollama_version: Annotated[str | None, typer.Option(help="Release of the server. Default: what it says.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no server.")] = False,
    ollama_url: OllamaUrl = None,
    output: Annotated[str, typer.Option("--format", help="table, json, compose, env or systemd.")] = "table",
    as_json: Json = False,
    quantizations: Annotated[
        bool, typer.Option("--quantizations", help="Only compare the quantisations: size, speed, quality.")
    ] = False,
) -> None:
    """Plan memory, slots, window and settings of a model, and write them as a file for the server. Changes nothing.

    Exit code: 0, 1 the model does not fit, 2 bad input.
    """
    from langchain_aegis.ollama.machine import host_of
    from langchain_aegis.ollama.plan_report import Wish, make_plan
    from langchain_aegis.ollama.plan_source import find_model
    from langchain_aegis.settings import AegisSettings, normalise_base_url
    from langchain_aegis.tuning import AUTO

    _check(flash_attention, ("auto", "on", "off"), "--flash-attention")
    _check(output, _FORMATS, "--format")
    output = "json" if as_json else output
    if quantizations:
        _print_quantisations(output)
        return
    settings = AegisSettings.from_env().but(
        ollama_base_url=normalise_base_url(ollama_url) if ollama_url else None, model_generation=model
    )
    host = host_of(tuning, memory_gb, reserve_gb, bandwidth_gb_s)
    base_url = None if offline else settings.ollama_base_url
    found = find_model(settings.model_generation, base_url, parameters, quantization, _TIMEOUT_S)
    notes = found.notes
    if tuning == AUTO and base_url and urlsplit(base_url).hostname not in ("127.0.0.1", "localhost", "::1"):
        notes = ("This is planned for the machine here, and the server is another one: name its --tuning.", *notes)
    wish = Wish(
        slots=slots,
        context=context,
        kv_type=kv_cache.lower(),  # as the server reads it
        flash_attention=cast("FlashAttention", flash_attention),
        prompt_cache_mib=prompt_cache_mib,
        quality=quality,
        version=ollama_version or found.version,
    )
    if found.shape is None:
        _print_settings(host, wish, notes, output)
    else:
        _print_plan(make_plan(found.shape, host, wish, notes), output)


def _print_plan(made: Plan, output: str) -> None:
    if output == "json":
        print_json(made.as_dict())
    elif output == "table":
        from rich.console import Console

        from langchain_aegis.ollama.plan_table import plan_table

        Console().print(plan_table(made))
    elif made.layout is None:
        from langchain_aegis.errors import AegisConfigError

        smaller = next((each.row.name for each in reversed(made.stored) if each.layout), None)
        advice = f"--quantization {smaller} would" if smaller else "take a smaller model"
        budget_gb = made.host.room.budget_bytes / 1e9
        raise AegisConfigError(f"{made.shape.name} does not fit into {budget_gb:.1f} GB; {advice}")
    else:
        of = f" with {made.shape.name} ({made.shape.quantisation})"
        _print_file(made.environment, made.host, made.notes, output, of)
    raise typer.Exit(0 if made.layout else 1)


def _print_settings(host: Host, wish: Wish, notes: Sequence[str], output: str) -> None:
    """Print what a server without a certain model is to be told."""
    from langchain_aegis.errors import AegisConfigError
    from langchain_aegis.ollama.plan_report import layout_of, settings_as_dict
    from langchain_aegis.ollama.tuning import server_environment

    if output == "table":
        raise AegisConfigError("no model is named; write `aegis plan NAME`, or set OLLAMA_MODEL_GENERATION")
    environment = server_environment(
        host.tuning, version=wish.version, flash_attention=wish.flash_attention,
        layout=layout_of(host.tuning, wish), gpu=host.room.gpu,
    )  # fmt: skip
    notes = [*notes, *environment.notes]
    if output == "json":
        print_json({"machine": host.about, **settings_as_dict(host.tuning, environment), "notes": notes})
    else:
        _print_file(environment, host, notes, output)


def _print_file(environment: Environment, host: Host, notes: Sequence[str], output: str, of: str = "") -> None:
    from langchain_aegis.ollama import rendering

    tuning = host.tuning
    client = ", ".join(f"AEGIS_{line.name.upper()}={line.value}" for line in (*tuning.request, *environment.client))
    head = [
        f"Ollama{of} on {tuning.title}. Written by `aegis plan`.",
        f"In the application: {client}.",
        *notes,
    ]
    if output == "compose":
        text = rendering.as_compose(environment, head, host.room)
    else:
        text = rendering.as_env(environment, head) if output == "env" else rendering.as_systemd(environment, head)
    print(text, end="")


def _print_quantisations(output: str) -> None:
    from dataclasses import asdict

    from langchain_aegis.ollama.plan_quantisation import quantisations, sources

    if output == "json":
        print_json({"quantisations": [asdict(row) for row in quantisations().values()], "sources": dict(sources())})
        return
    from rich.console import Console

    from langchain_aegis.ollama.plan_table import quantisation_table

    Console().print(quantisation_table())


def _check(value: str, allowed: tuple[str, ...], name: str) -> None:
    from langchain_aegis.errors import AegisConfigError

    if value not in allowed:
        raise AegisConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
