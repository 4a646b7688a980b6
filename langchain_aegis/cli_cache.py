"""The command `aegis cache`.

Imports of the library stand inside the commands, so that `aegis --help` starts fast.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from langchain_core.embeddings import Embeddings

    from langchain_aegis.cache import AegisSemanticCache
    from langchain_aegis.calibration import Calibration, Served, Share

cache_app = typer.Typer(
    help="Look at the cached answers of a Redis, remove them, or measure what may be served.", no_args_is_help=True
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
RedisUrl = Annotated[str | None, typer.Option(help="Default: REDIS_URL, or REDIS_HOST and REDIS_PORT.")]
OllamaUrl = Annotated[str | None, typer.Option(help="Default: OLLAMA_BASE_URL.")]
Namespace = Annotated[str | None, typer.Option(help="First part of the names in Redis. Default: AEGIS_NAMESPACE.")]

_FEW = 0.1  # share of a language's paraphrases below which it is as good as not cached by meaning
_LANGUAGES = {"en": "English", "de": "German"}


@cache_app.command()
def stats(redis_url: RedisUrl = None, namespace: Namespace = None, as_json: Json = False) -> None:
    """Print what a namespace holds, for all processes.

    Exit code: 0, or 2 if Redis does not answer.
    """
    with _cache(redis_url, namespace) as cache:
        values = asdict(cache.health())
    del values["embedder"]  # of this process, which needs none
    if as_json:
        print_json(values)
    else:
        _print_table(values)
    raise typer.Exit(0 if values["redis"] else 2)


@cache_app.command()
def invalidate(
    source: Annotated[list[str] | None, typer.Option(help="Answers that rest on it; may be repeated.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Answers of this tenant.")] = None,
    user: Annotated[str | None, typer.Option(help="Answers of this user.")] = None,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> None:
    """Remove answers; none of them is served any more when this returns."""
    with _cache(redis_url, namespace) as cache:
        print(cache.invalidate(sources=source or None, tenant=tenant, user=user), "removed")


@cache_app.command()
def clear(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> None:
    """Remove every answer of a namespace."""
    with _cache(redis_url, namespace) as cache:
        if not yes:
            typer.confirm(f"Remove every answer of namespace {cache.settings.namespace}?", abort=True, err=True)
        cache.clear()
        print("cleared", cache.settings.namespace)


@cache_app.command()
def judge(
    cached: Annotated[str, typer.Argument(help="The question that was answered.")],
    new: Annotated[str, typer.Argument(help="The question that is asked now.")],
    as_json: Json = False,
) -> None:
    """Say whether the answer to one question would be served for another, and why not. Asks no Redis.

    Exit code: 0 it would, 1 it would not.
    """
    with _cache(None, None) as cache:
        verdict = cache.judge(cached, new)
    if as_json:
        print_json(asdict(verdict))
    else:
        reasons = f" ({', '.join(verdict.reasons)})" if verdict.reasons else ""
        print(f"{'served' if verdict.served else 'not served'}, similarity {verdict.similarity:.3f}{reasons}")
    raise typer.Exit(0 if verdict.served else 1)


@cache_app.command()
def calibrate(
    model: Annotated[
        str | None, typer.Option(help="Embedding model of Ollama. Default: OLLAMA_MODEL_EMBEDDINGS, else bge-m3.")
    ] = None,
    ollama_url: OllamaUrl = None,
    minilm: Annotated[bool, typer.Option("--minilm", help="Measure the small model that comes as a package.")] = False,
    file: Annotated[
        Path | None, typer.Option(help="Where to keep it, for AEGIS_CALIBRATION. Default: in AEGIS_HOME.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, but keep nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Measure an embedder with labelled questions and keep the thresholds that it needs.

    Exit code: 0 fine, 1 with a warning, 2 it cannot be used.
    """
    from langchain_aegis import calibration

    embeddings = _embeddings(model, ollama_url, minilm)
    with _Counting() as counting:
        found = calibration.calibrate(embeddings, progress=counting)
    saved = None if dry_run else calibration.save(found, file)
    warnings = _warnings(found)
    if as_json:
        values = found.as_dict()
        del values["probe"]
        print_json({**_with_rates(values), "warnings": warnings, "saved": None if saved is None else str(saved)})
    else:
        _print_calibration(found)
        for warning in warnings:
            print(f"warning: {warning}")
        print("not kept (--dry-run)" if saved is None else f"kept in {saved}")
    raise typer.Exit(1 if warnings else 0)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, ensure_ascii=False, indent=2, default=list))


def _cache(redis_url: str | None, namespace: str | None) -> AegisSemanticCache:
    from langchain_aegis.cache import AegisSemanticCache

    return AegisSemanticCache(redis_url, namespace=namespace)


def _embeddings(model: str | None, ollama_url: str | None, minilm: bool) -> Embeddings:
    from langchain_aegis.errors import AegisConfigError
    from langchain_aegis.settings import AegisSettings

    if minilm:
        if model or ollama_url:
            raise AegisConfigError("--minilm runs in this process: leave --model and --ollama-url out")
        from langchain_aegis.embedded.minilm import MiniLMEmbeddings

        return MiniLMEmbeddings()
    from langchain_aegis.embeddings import AegisEmbeddings

    return AegisEmbeddings(model or AegisSettings.from_env().model_embeddings or "bge-m3", base_url=ollama_url)


class _Counting:
    """Shows on stderr how far the measuring is, where somebody looks."""

    def __enter__(self) -> _Counting:
        return self

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {total} questions", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _warnings(found: Calibration) -> list[str]:
    """Return what the user of these thresholds should know."""
    return [
        f"{_LANGUAGES.get(lang, lang)}: only {one.paraphrases.rate:.0%} of the paraphrases are found in balanced mode; "
        "a multilingual embedder finds more"
        for lang, one in found.modes["balanced"].by_language.items()
        if one.paraphrases.rate < _FEW
    ]


def _with_rates(value: Any) -> Any:
    """Return JSON values in which every count of how many has its rate and its 95 % interval beside it."""
    if not isinstance(value, dict):
        return value
    if value.keys() == {"count", "of"}:
        from langchain_aegis.calibration import Share

        share = Share(**value)
        return {**value, "rate": share.rate, "interval": share.interval()}
    return {name: _with_rates(one) for name, one in value.items()}


def _print_calibration(found: Calibration) -> None:
    print(f"{found.name}, {found.dimensions} dimensions, measured {found.date}")
    print(f"unrelated questions stay below {found.unrelated:.3f}; paraphrases are nearer in {found.separation:.1%}")
    print()
    row = "{:<10} {:>9}  {:<26} {:<26} {:<15} {}".format
    print(row("mode", "threshold", "traps served [95 %]", "paraphrases found [95 %]", "cosine alone", "set by"))
    for mode, figures in found.modes.items():
        print(_row(row, mode, f"{figures.threshold:.4f}", figures.served, figures.bound_by))
        for lang, one in figures.by_language.items():
            print(_row(row, f"  {_LANGUAGES.get(lang, lang)}", "", one, ""))


def _row(row: Any, name: str, threshold: str, one: Served, bound_by: str) -> str:
    alone = f"{one.plain_traps.rate:.0%} / {one.plain_paraphrases.rate:.0%}"
    return str(row(name, threshold, _share(one.traps), _share(one.paraphrases), alone, bound_by)).rstrip()


def _share(share: Share) -> str:
    low, high = share.interval()
    return f"{share.count} of {share.of} [{low:.1%}, {high:.1%}]"


def _print_table(values: Mapping[str, Any]) -> None:
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {json.dumps(value, ensure_ascii=False, default=list)}")
