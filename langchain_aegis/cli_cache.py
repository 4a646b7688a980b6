"""The command `aegis cache`.

Imports of the library stand inside the commands, so that `aegis --help` starts fast.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from langchain_core.embeddings import Embeddings

    from langchain_aegis.cache import AegisSemanticCache
    from langchain_aegis.calibration import Calibration, Served, Share
    from langchain_aegis.results import Explanation
    from langchain_aegis.transfer import Carried

cache_app = typer.Typer(
    help="Look at the cached answers of a Redis, remove them, or measure what may be served.", no_args_is_help=True
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
RedisUrl = Annotated[str | None, typer.Option(help="Default: REDIS_URL, or REDIS_HOST and REDIS_PORT.")]
OllamaUrl = Annotated[str | None, typer.Option(help="Default: OLLAMA_BASE_URL.")]
Namespace = Annotated[str | None, typer.Option(help="First part of the names in Redis. Default: AEGIS_NAMESPACE.")]

_FEW = 0.1  # share of a language's paraphrases below which it is as good as not cached by meaning
_OP_BUDGET_S, _EMBED_BUDGET_S = 5.0, 60.0
_RULES = {
    "traps": "more traps would be served",
    "exposure": "more traps would reach the guards than with all-minilm-l6-v2",
    "unrelated": "unrelated questions would reach the guards",
    "lowest": "no threshold is lower",
}
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
def inspect(
    task: Annotated[str | None, typer.Option(help="Only answers of this task.")] = None,
    limit: Annotated[int, typer.Option(help="List so many at most, the newest first.", min=0)] = 20,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """List what can be served: age, time to live, size, task; questions only if the cache keeps them. No answers."""
    with _cache(redis_url, namespace) as cache:
        found = sorted((e for e in cache.entries() if task is None or e.task == task), key=lambda e: (e.age_s, e.key))
    totals = {
        "entries": len(found),
        "by_meaning": sum(entry.by_meaning for entry in found),
        "bytes": sum(entry.bytes for entry in found),
        "tasks": dict(sorted(Counter(entry.task for entry in found).items())),
    }
    if as_json:
        print_json({**totals, "newest": [asdict(entry) for entry in found[:limit]]})
        return
    _print_table(totals)
    row = "{:<32} {:<9} {:>9} {:>9} {:>9} {:>7}  {:<12} {}".format
    if found[:limit]:
        print()
        print(row("key", "tier", "age s", "ttl s", "bytes", "sources", "task", "question").rstrip())
    for entry in found[:limit]:
        tier = "meaning" if entry.by_meaning else "exact"
        numbers = f"{entry.age_s:.0f}", f"{entry.ttl_s:.0f}", entry.bytes, entry.sources
        print(row(entry.key, tier, *numbers, _line(entry.task), _line(entry.question)).rstrip())


@cache_app.command()
def explain(
    question: Annotated[str, typer.Argument(help="What is asked.")],
    pipeline: Annotated[
        str | None, typer.Option(help="As given to get_or_generate. Default: compare with questions of any scope.")
    ] = None,
    version: Annotated[str, typer.Option(help="As given to get_or_generate.")] = "",
    tenant: Annotated[str | None, typer.Option(help="Whose call it is.")] = None,
    user: Annotated[str | None, typer.Option(help="Whose call it is.")] = None,
    task: Annotated[str | None, typer.Option(help="Its task.")] = None,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Say what the cache would do with a question, and why. Nothing is counted or changed.

    Exit code: 0 it would answer, 1 it would not.
    """
    from langchain_aegis.scope import aegis_scope

    with _cache(redis_url, namespace) as cache, aegis_scope(tenant=tenant, user=user, task=task):
        found = cache.explain(question, pipeline=pipeline, version=version)
    if as_json:
        print_json(asdict(found))
    else:
        _print_explanation(found)
    raise typer.Exit(0 if found.decision in ("exact", "semantic") else 1)


@cache_app.command()
def invalidate(
    source: Annotated[list[str] | None, typer.Option(help="Answers that rest on it; may be repeated.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Answers of this tenant; also together with another.")] = None,
    user: Annotated[str | None, typer.Option(help="Answers of this user.")] = None,
    task: Annotated[str | None, typer.Option(help="Answers of this task.")] = None,
    model: Annotated[str | None, typer.Option(help='Answers of this model, or of "pipeline:NAME".')] = None,
    older_than_s: Annotated[
        float | None, typer.Option("--older-than-s", help="Answers that were made longer ago, in seconds.")
    ] = None,
    near: Annotated[
        str | None, typer.Option(help="Answers to questions as near to this one as a hit has to be.")
    ] = None,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> None:
    """Remove answers; none of them is served any more when this returns.

    Name one of the options, alone or together with --tenant. With --older-than-s the answers are counted in the
    background, and not here.
    """
    with _cache(redis_url, namespace) as cache:
        removed = cache.invalidate(
            sources=source or None,
            tenant=tenant,
            user=user,
            task=task,
            model=model,
            older_than_s=older_than_s,
            near=near,
        )
    print(removed, "removed")


@cache_app.command(context_settings={"ignore_unknown_options": True})  # an id may begin with "-"
def report_wrong(
    lookup_id: Annotated[str, typer.Argument(help="The lookup_id among the marks of the cached answer.")],
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> None:
    """Remove an answer that was wrong, and never serve it again for the question that got it.

    Exit code: 0 it was there, 1 it was gone already.
    """
    with _cache(redis_url, namespace) as cache:
        removed = cache.report_wrong(lookup_id)
    print("removed" if removed else "it was gone already")
    raise typer.Exit(0 if removed else 1)


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
def export(
    file: Annotated[Path, typer.Argument(help="Written anew; only its owner can read it.")],
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> None:
    """Write every answer that can be served to a file: in clear, each signed."""
    with _cache(redis_url, namespace) as cache, _files():
        print(cache.export(file), "exported")


@cache_app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(help="What `export` wrote, under the same secret and namespace.")],
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Take the answers of an exported file in; what was invalidated since stays so.

    Exit code: 0 all were taken, 1 some were not.
    """
    with _cache(redis_url, namespace) as cache, _files():
        _print_carried(cache.import_(file), "imported", as_json)


@cache_app.command()
def warm(
    file: Annotated[
        Path, typer.Argument(help="JSON lines: question, answer; also sources, tenant, user, task, ttl_s.")
    ],
    pipeline: Annotated[str, typer.Option(help="As given to get_or_generate.")],
    version: Annotated[str, typer.Option(help="As given to get_or_generate.")] = "",
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Put answers that are known beforehand into a pipeline's cache.

    Exit code: 0 all were taken, 1 some were not.
    """
    with _cache(redis_url, namespace) as cache, _files():
        _print_carried(cache.warm(_rows(file), pipeline=pipeline, version=version), "stored", as_json)


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

    # Nobody's call waits for this: a slow Redis or a cold embedder shall still answer.
    return AegisSemanticCache(redis_url, namespace=namespace, op_budget_s=_OP_BUDGET_S, embed_budget_s=_EMBED_BUDGET_S)


@contextlib.contextmanager
def _files() -> Iterator[None]:
    """Say in one line what is wrong with a file."""
    from langchain_aegis.errors import AegisConfigError

    try:
        yield
    except OSError as exc:
        if exc.filename is None:  # of no file: a fault of something else
            raise
        raise AegisConfigError(f"{exc.filename}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise AegisConfigError("the file is no UTF-8 text") from exc


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines."""
    from langchain_aegis.errors import AegisConfigError

    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as exc:
                raise AegisConfigError(f"{file}, line {number} is no JSON") from exc
            if not isinstance(row, dict):
                raise AegisConfigError(f"{file}, line {number} is no JSON object")
            yield row


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
    print()
    for rule in dict.fromkeys(figures.bound_by for figures in found.modes.values()):
        print(f"set by {rule}: below, {_RULES[rule]}")
    print("The guards were developed with these pairs: of other traps they let more pass.")


def _row(row: Any, name: str, threshold: str, one: Served, bound_by: str) -> str:
    alone = f"{one.plain_traps.rate:.0%} / {one.plain_paraphrases.rate:.0%}"
    return str(row(name, threshold, _share(one.traps), _share(one.paraphrases), alone, bound_by)).rstrip()


def _share(share: Share) -> str:
    low, high = share.interval()
    return f"{share.count} of {share.of} [{low:.1%}, {high:.1%}]"


def _print_explanation(found: Explanation) -> None:
    reasons = f" ({', '.join(found.reasons)})" if found.reasons else ""
    print(f"{found.decision}{reasons}")
    if found.embedder is not None and found.min_similarity is not None:
        print(f"embedder {found.embedder}, served from {found.min_similarity:.3f}")
    for near in found.candidates:
        other = f", other {', '.join(near.differing)}" if near.differing else ""
        verdict = ", ".join(near.reasons) or "may be served"
        text = f' "{_line(near.question)}"' if near.question else ""
        print(f"  {near.similarity:.3f}  {verdict}{other}, {near.age_s:.0f} s old{text}")
    for code, meaning in found.meanings.items():
        print(f"{code}: {meaning}")
    if found.scopes:
        print(found.scopes)


def _print_carried(carried: Carried, what: str, as_json: bool) -> None:
    if as_json:
        print_json(asdict(carried))
    else:
        print(carried.taken, what)
        for code, count in sorted(carried.left.items()):
            print(f"{count} not: {code}")
    raise typer.Exit(1 if carried.left else 0)


def _line(text: str, most: int = 80) -> str:
    """Return text of somebody else as one short line that a terminal shows as it is."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return plain if len(plain) <= most else f"{plain[: most - 1]}…"


def _print_table(values: Mapping[str, Any]) -> None:
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {json.dumps(value, ensure_ascii=False, default=list)}")
