"""What does the cache cost, beside bare Redis commands and beside other caches?

Fills a private Redis with seeded questions; then every system takes its turn in each round: an exact repeat, a
paraphrase, a question that nobody asked before, and the storing of its answer; blocking, awaited, 64 at once, and
through `invoke` and `ainvoke` of a model. Every answer is checked; a wrong one fails the run, and nothing is written.

    python benchmarks/cache.py                        # 1,000 and 10,000 entries, memory, a real embedder: 4 minutes
    python benchmarks/cache.py --sizes 100000         # this package and the floors only: 4 minutes
    python benchmarks/cache.py --write                # also into benchmarks/README.md, with pictures
    python benchmarks/cache.py --profile hit          # where the time of a hit goes: hit, semantic or miss

Peers take part if they are installed: langchain-redis.
"""

import argparse
import asyncio
import cProfile
import gc
import io
import json
import pstats
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import redis
from cache_report import Run, print_run, write_run
from cache_rounds import Deck, Measured, run_calls, run_crowd, run_rounds, told_by_langchain
from cache_systems import SYSTEMS, Aegis, Place, System, private_redis, settled_memory, versions
from cache_workload import PROMPTS, Item, Vectors, Workload
from results_page import HERE, Conditions, redis_version

from langchain_aegis.embedded import MiniLMEmbeddings

Prepare = Callable[..., None]


def chosen(kinds: Sequence[type[System]], told: argparse.Namespace, say: Callable[[str], None]) -> list[type[System]]:
    """Return the systems that can take part; says which cannot."""
    taking = []
    for kind in kinds:
        if told.only and not any(name in kind.name for name in told.only):
            continue
        if package := kind.missing():
            say(f"{kind.name} is left out: {package} is not installed")
        else:
            taking.append(kind)
    return taking


def budgets(told: argparse.Namespace) -> tuple[tuple[str, Any], ...]:
    """Return the arguments of this package's cache that the command line names."""
    return () if told.op_budget_s is None else (("op_budget_s", told.op_budget_s), ("embed_budget_s", told.op_budget_s))


def filled(
    kinds: Sequence[type[System]], place: Place, items: Callable[[], Iterator[Item]], prepare: Prepare,
    measured: Measured,
) -> list[System]:  # fmt: skip
    """Open the systems, and store the items in each; notes what that takes."""
    systems = []
    with redis.Redis.from_url(place.url, protocol=2) as client:
        client.flushall()
        for kind in kinds:
            if measured.entries > kind.most:
                continue
            system, before, began = kind(place), settled_memory(client), time.perf_counter()
            system.open()
            system.fill(items(), prepare)
            measured.fill_s[system.name] = time.perf_counter() - began
            measured.memory[system.name] = settled_memory(client) - before
            systems.append(system)
    return systems


def measure(
    kinds: Sequence[type[System]], place: Place, workload: Workload, entries: int, told: argparse.Namespace, *,
    prepare: Prepare, rounds: int, crowd: int,
) -> Measured:  # fmt: skip
    """Return what was measured with so many entries; `crowd` lookups at once are counted, if it is not 0."""
    measured = Measured(entries)
    systems = filled(kinds, place, lambda: map(workload.item, range(entries)), prepare, measured)
    deck = Deck(workload, entries, told.seed)
    options: dict[str, Any] = {"rounds": rounds, "warmup": max(2, rounds // 10)}

    async def all_rounds() -> None:
        for awaited in (False, True):
            await run_rounds(measured, systems, deck, prepare, awaited=awaited, **options)
        for awaited in (False, True):
            await run_calls(measured, systems, deck, prepare, awaited=awaited, **options)
        if crowd:
            await run_crowd(measured, systems, deck, prepare, lookups=crowd, at_once=told.at_once, times=3)
        for system in systems:
            await system.aclose()

    asyncio.run(all_rounds())
    for system in systems:
        measured.conclude(system)
        system.close()
    return measured


def real(kinds: Sequence[type[System]], url: str, llm_string: str, told: argparse.Namespace) -> Measured | None:
    """Return what was measured with MiniLM; None if it was not asked for."""
    if not told.real_entries:
        return None
    place = Place(url, MiniLMEmbeddings(), llm_string, MiniLMEmbeddings.dimensions, calibrated=False, own=budgets(told))
    rounds = min(told.rounds, 15)
    workload = Workload(told.seed)
    return measure(
        kinds, place, workload, told.real_entries, told, prepare=lambda items, **_: None, rounds=rounds, crowd=0
    )


MEMORY_KINDS = ((Aegis, 384, True), (Aegis, 1024, True))


def memory(url: str, llm_string: str, told: argparse.Namespace) -> dict[str, float]:
    """Return Redis' bytes per entry of further arrangements, by what they are."""
    found = {}
    for kind, dimensions, bounded in MEMORY_KINDS if told.memory_entries else ():
        workload, many = Workload(told.seed), told.memory_entries
        vectors = Vectors(workload, dimensions)
        place = Place(
            url, vectors, llm_string, dimensions, own=(("max_entries_per_tenant", 10 * many),) if bounded else (),
            scope=(lambda item: {"sources": [f"document-{item.number % 997}"]}) if bounded else None,
        )  # fmt: skip
        measured = Measured(many)
        for system in filled(
            [kind], place, lambda w=workload, m=many: map(w.item, range(m)), vectors.prepare, measured
        ):
            system.close()
            with_ = ", LRU and source sets" if bounded else ""
            found[f"{kind.name}, {dimensions} dimensions{with_}"] = measured.memory[system.name] / many
    return found


def profile(what: str, url: str, llm_string: str, told: argparse.Namespace) -> str:
    """Return where the time of many lookups goes, the dearest functions first."""
    workload, entries, many = Workload(told.seed), 1000, 1000
    vectors = Vectors(workload)
    place = Place(url, vectors, llm_string, vectors.dimensions)
    (system,) = filled([Aegis], place, lambda: map(workload.item, range(entries)), vectors.prepare, Measured(entries))
    items = workload.items(0, many) if what != "miss" else workload.items(entries, entries + many)
    vectors.prepare(items, paraphrases=True)
    texts = [i.paraphrases[0] if what == "semantic" else i.question for i in items]
    prompts = [PROMPTS.prompt(text) for text in texts]
    system.lookup(prompts.pop())
    profiler = cProfile.Profile()
    gc.collect()
    gc.disable()  # else a collection is told as the time of whatever made it due
    profiler.enable()
    found = [system.lookup(prompt) for prompt in prompts]
    profiler.disable()
    gc.enable()
    system.close()
    hits = sum(each is not None for each in found)
    told_by = io.StringIO()
    stats = pstats.Stats(profiler, stream=told_by).strip_dirs()
    stats.sort_stats("tottime").print_stats(30)
    stats.sort_stats("cumulative").print_stats(30)
    text = "\n".join(line.rstrip() for line in told_by.getvalue().strip().splitlines())
    return f"{len(prompts)} lookups, blocking, of 1,000 entries: {hits} hits. cProfile doubles their time.\n\n{text}\n"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000], help="numbers of entries")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--crowd", type=int, default=400, help="lookups, three times, with many at once; 0: none")
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--real-entries", type=int, default=150, help="with MiniLM; 0: not at all")
    parser.add_argument("--memory-entries", type=int, default=4_000, help="for the memory; 0: not at all")
    parser.add_argument("--only", nargs="+", help="parts of the names of the systems that take part")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--op-budget-s", type=float, help="time for Redis per lookup; default: the cache's own")
    parser.add_argument("--url", help="a Redis that is emptied; default: a private one")
    parser.add_argument("--json", type=Path, help="also into this file")
    parser.add_argument("--write", action="store_true", help="into benchmarks/README.md, with pictures")
    parser.add_argument("--profile", choices=("hit", "semantic", "miss"), help="write benchmarks/profiles/NAME.txt")
    return parser.parse_args(given)


def run(told: argparse.Namespace, systems: Sequence[type[System]] = SYSTEMS, say: Callable[[str], None] = print) -> Run:
    """Measure everything that was asked for."""
    conditions, began, llm_string = Conditions(versions()), time.perf_counter(), told_by_langchain()
    kinds = chosen(systems, told, say)
    with private_redis(told.url) as url:
        sizes = []
        for entries in told.sizes:
            workload = Workload(told.seed)
            vectors = Vectors(workload)
            place = Place(url, vectors, llm_string, vectors.dimensions, own=budgets(told))
            sizes.append(
                measure(kinds, place, workload, entries, told, prepare=vectors.prepare, rounds=told.rounds,
                        crowd=told.crowd)
            )  # fmt: skip
            say(f"{entries:,} entries: {time.perf_counter() - began:.0f} s since the start")
        embedded = real([k for k in kinds if "semantic" in k.tiers], url, llm_string, told)
        bytes_each = memory(url, llm_string, told)
        with redis.Redis.from_url(url) as client:
            server = redis_version(client)
    lines = conditions.lines(time.perf_counter() - began, server, told.seed)
    return Run(sizes, embedded, bytes_each, lines, told.at_once)


def main(given: Sequence[str] | None = None, systems: Sequence[type[System]] = SYSTEMS) -> int:
    """Do what the command line says; returns 1 if a system answered wrongly, or not where it must."""
    told = arguments(given)
    if told.profile:
        with private_redis(told.url) as url:
            text = profile(told.profile, url, told_by_langchain(), told)
        path = HERE / "profiles" / f"{told.profile}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(text)
        return 0
    done = run(told, systems)
    print_run(done)
    if told.json:
        told.json.write_text(json.dumps(done.as_dict(), indent=1), encoding="utf-8")
    if done.failures:
        print("\n".join(f"FAILED: {failure}" for failure in done.failures))
        return 1
    if told.write:
        write_run(done)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
