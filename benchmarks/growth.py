"""How does the cache grow: with entries, tenants, scopes and the length of answers?

Fills a private Redis through the cache's own writing code, and looks up in it; every answer is checked, and a wrong
one fails the run. Most entries are copies of stored ones with other keys and vectors drawn by seed: what a lookup has
to find its answer among.

    python benchmarks/growth.py                                    # to 20,000 entries: 4 minutes
    python benchmarks/growth.py --entries 1000 10000 100000        # with scopes of 1 to 50,000
    python benchmarks/growth.py --entries 100000 1000000 --dimensions 64 --only entries   # an hour
    python benchmarks/growth.py --write                            # also into benchmarks/README.md, with pictures
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy
import redis
from cache_filling import fill, multiply
from cache_rounds import is_answer, told_by_langchain
from cache_systems import MIN_SIMILARITY, private_redis, settled_memory, versions
from cache_workload import PROMPTS, Item, Vectors, Workload
from growth_report import Growth, print_growth, write_growth
from results_page import Conditions, redis_version

from langchain_aegis import AegisSemanticCache, aegis_scope
from langchain_aegis.lookup import Lookup

NAMESPACE = "growth"
SCOPES = (1, 20, 1_000)  # entries of a scope; a further one has half of all
KNOWN = 400  # questions of the large scopes that can be asked; the others are only there
POLICIES = ("ADHOC_BF", "BATCHES")
PARTS = ("entries", "scopes", "tenants", "answers", "flat")
NEW_FROM = 5_000_000  # items that nobody stores


@dataclass
class Grown:
    """A cache that grows in one Redis.

    Attributes:
        url: Of the Redis.
        llm_string: As LangChain tells it.
        dimensions: Of the vectors.
        answer_bytes: Length of the answers.
        seed: Draws everything.
        namespace: Of the cache.
        op_budget_s: Time for Redis per lookup; None: the cache's own.
    """

    url: str
    llm_string: str
    dimensions: int
    seed: int
    answer_bytes: int = 1024
    namespace: str = NAMESPACE
    op_budget_s: float | None = None
    failures: list[str] = field(default_factory=list)
    entries: int = 0
    known: dict[str, list[Item]] = field(default_factory=dict)
    seen: list[Lookup] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.workload = Workload(self.seed, self.answer_bytes)
        self.vectors = Vectors(self.workload, self.dimensions)
        self.random = random.Random(self.seed)
        self._drawn = numpy.random.default_rng(self.seed)
        self._new, self._next = NEW_FROM, 0
        self.cache, self._writer = self._make(op_budget_s=self.op_budget_s), self._make(op_budget_s=60.0)
        self.client = redis.Redis.from_url(self.url, protocol=2, socket_timeout=600)

    def _make(self, **told):
        return AegisSemanticCache(
            self.url, self.vectors, namespace=self.namespace, min_similarity=MIN_SIMILARITY, repeats="serve",
            on_lookup=self.seen.append, **told,
        )  # fmt: skip

    def close(self) -> None:
        for cache in (self.cache, self._writer):
            cache.close()
        self.client.close()

    def add(self, tenant: str, count: int, *, known: int = KNOWN, scopes_of: int | None = None) -> None:
        """Store so many entries of a tenant, in one scope; or in scopes of so many, each with a tenant of its own."""
        have = self.known.setdefault(tenant, [])
        ask = 1 if scopes_of and not have else max(0, min(known - len(have), count))
        items = self.workload.items(self._next, self._next + ask)
        self._next += ask
        fill(self._writer, items, self.llm_string, scope=lambda _: {"tenant": tenant}, prepare=self.vectors.prepare)
        have += items
        if count > ask:
            self.look(tenant, have[0].question, have[0])
            record = self.seen[-1].record
            multiply(self._writer, record, count - ask, self._rows, tenanted=True, scopes_of=scopes_of)
        self.entries += count

    def _rows(self, many: int) -> numpy.ndarray:
        return self.vectors.around(self._drawn, many)

    def look(self, tenant: str, question: str, right: Item | None) -> float | None:
        """Look up; returns the seconds, or None if there was no answer where one can come. Notes a wrong one."""
        prompt = PROMPTS.prompt(question)
        with aegis_scope(tenant=tenant):
            began = time.perf_counter()
            got = self.cache.lookup(prompt, self.llm_string)
            seconds = time.perf_counter() - began
        if got is None:
            return seconds if right is None else None
        if right is None or not is_answer(got, right):
            self.failures.append(f"{tenant}: a wrong answer to {question!r}")
        return seconds

    def asked(self, operation: str, tenant: str) -> tuple[str, Item | None]:
        """Return a question of an operation, and whose answer must come; its vector is made."""
        if operation == "miss":
            self._new += 1
            item = self.workload.item(self._new)
            self.vectors.prepare([item])
            return item.question, None
        item = self.random.choice(self.known[tenant])
        self.vectors.prepare([item], paraphrases=True)
        return (item.question if operation == "exact" else self.random.choice(item.paraphrases)), item

    def times(self, tenants: Sequence[str], rounds: int) -> dict[str, float]:
        """Return the median in microseconds of an exact hit, a hit by meaning and a miss, of tenants drawn."""
        taken: dict[str, list[float]] = {"exact": [], "semantic": [], "miss": []}
        for number in range(rounds + 5):
            for operation, seconds in taken.items():
                tenant = self.random.choice(tenants)
                question, right = self.asked(operation, tenant)
                took = self.look(tenant, question, right)
                if took is not None and number >= 5:
                    seconds.append(took)
        for operation, seconds in taken.items():
            if len(seconds) < rounds / 2:
                self.failures.append(f"{operation}: only {len(seconds)} of {rounds} as they should be")
        return {o: statistics.median(s) * 1e6 for o, s in taken.items() if s}

    def indexes(self) -> list[str]:
        """Return the names of the cache's search indexes."""
        names = [name.decode() for name in self.client.execute_command("FT._LIST")]
        return [name for name in names if name.startswith(f"{self.namespace}:")]

    def rebuild_s(self, tenant: str) -> float:
        """Drop the indexes, let a lookup make them again, and return how long that takes, in seconds."""
        names = self.indexes()
        for name in names:
            self.client.execute_command("FT.DROPINDEX", name)
        began = time.perf_counter()
        self.look(tenant, *self.asked("miss", tenant))
        while time.perf_counter() - began < 3600:
            if set(names) <= set(self.indexes()) and not any(self._indexing(name) for name in names):
                return time.perf_counter() - began
            time.sleep(
                min(2.0, max(0.01, (time.perf_counter() - began) / 20))
            )  # asking costs the server something, too
        raise RuntimeError("the index is not made again")

    def _indexing(self, name: str) -> bool:
        told = self.client.execute_command("FT.INFO", name)
        return int(float(dict(zip(told[::2], told[1::2], strict=True))[b"indexing"])) == 1

    def search(self, found: Lookup, policy: str, many: int = 5) -> Callable[[], float]:
        """Return what searches the scope of a lookup with a hybrid policy, bare, and returns the seconds."""
        (index,) = self.indexes()
        query = f"(@scope:{{{found.key.scope}}} @emb:{{{found.embedder}}})=>[KNN {many} @vec $v HYBRID_POLICY {policy}]"
        asked = ("FT.SEARCH", index, query, "PARAMS", 2, "v", found.vector, "LIMIT", 0, many, "DIALECT", 2)

        def searched() -> float:
            began = time.perf_counter()
            self.client.execute_command(*asked)
            return time.perf_counter() - began

        return searched


def by_entries(grown: Grown, sizes: Sequence[int], rounds: int, growth: Growth, say: Callable[[str], None]) -> None:
    """Grow to each size, with one scope of half of all; note times, memory, and how long the index takes."""
    empty = settled_memory(grown.client)
    for size in sizes:
        began, before = time.perf_counter(), grown.entries
        for scope in SCOPES:
            if f"scope-{scope}" not in grown.known and size >= 4 * scope:
                grown.add(f"scope-{scope}", scope, known=min(scope, KNOWN))
        half = size // 2 - growth.scopes.get("half", 0)
        grown.add("half", half)
        growth.scopes["half"] = size // 2
        if (rest := size - grown.entries) > 0:
            grown.add("others", rest, scopes_of=20)
        filled = (time.perf_counter() - began) / (grown.entries - before)
        growth.entries[size] = {
            **grown.times(["half"], rounds), "bytes": (settled_memory(grown.client) - empty) / size,
            "fill_us": filled * 1e6, "rebuild_s": grown.rebuild_s("half"),
        }  # fmt: skip
        say(f"{size:,} entries: {time.perf_counter() - began:.0f} s")


def by_scope(grown: Grown, rounds: int, growth: Growth) -> None:
    """Note what a miss takes in scopes of each size, beside a bare search with either policy."""
    tenants = [tenant for tenant in grown.known if tenant.startswith("scope-") or tenant == "half"]
    taken: dict[str, dict[str, list[float]]] = {t: {p: [] for p in (*POLICIES, "aegis", "GET")} for t in tenants}
    for number in range(rounds + 5):
        for tenant in tenants:
            grown.seen.clear()
            asked = grown.asked("miss", tenant)
            grown.look(tenant, *asked)  # whoever walks to a place of a large graph first waits for the memory
            found = grown.seen[-1]
            ways = {**{policy: grown.search(found, policy) for policy in POLICIES},
                    "aegis": partial(grown.look, tenant, *asked)}  # fmt: skip
            row = {way: ways[way]() for way in grown.random.sample(list(ways), len(ways))}
            began = time.perf_counter()
            grown.client.get("nothing")
            row["GET"] = time.perf_counter() - began
            if row["aegis"] is not None and number >= 5:
                for name, seconds in row.items():
                    taken[tenant][name].append(seconds)
    for tenant, columns in taken.items():
        size = growth.scopes["half"] if tenant == "half" else int(tenant.removeprefix("scope-"))
        growth.policies[size] = {name: statistics.median(seconds) * 1e6 for name, seconds in columns.items()}
    growth.policies_at = grown.entries


def by_tenants(told: argparse.Namespace, url: str, llm_string: str, growth: Growth) -> list[str]:
    """Note times with the same number of entries of 1 to 1,000 tenants; returns the failures."""
    failures = []
    for tenants in (1, 10, 100, 1_000):
        grown = Grown(
            url, llm_string, told.dimensions, told.seed, namespace=f"tenants{tenants}", op_budget_s=told.op_budget_s
        )
        empty, many = settled_memory(grown.client), told.tenant_entries
        names = [f"tenant-{n}" for n in range(tenants)]
        asked = names[: max(1, KNOWN // 10)]
        for name in asked:
            grown.add(name, many // tenants, known=min(10 if tenants > 1 else KNOWN, many // tenants))
        if rest := many - grown.entries:
            grown.add("others", rest, scopes_of=many // tenants)
        times = grown.times(asked, told.rounds)
        growth.tenants[tenants] = {**times, "bytes": (settled_memory(grown.client) - empty) / many}
        failures += grown.failures
        grown.client.flushall()
        grown.close()
    return failures


def by_answer(told: argparse.Namespace, url: str, llm_string: str, growth: Growth) -> list[str]:
    """Note times and memory with answers of 1 to 64 kB, and memory at 1,024 dimensions; returns the failures."""
    failures = []
    for size, dimensions in ((1, 384), (4, 384), (16, 384), (64, 384), (1, 1024)):
        grown = Grown(
            url,
            llm_string,
            dimensions,
            told.seed,
            size * 1024,
            namespace=f"answers{size}",
            op_budget_s=told.op_budget_s,
        )
        empty, many = settled_memory(grown.client), told.answer_entries
        grown.add("one", many, known=min(50, many))
        each = (settled_memory(grown.client) - empty) / many
        if dimensions == 384:
            growth.answers[size] = {**grown.times(["one"], told.rounds), "bytes": each}
        else:
            growth.large_vector_bytes = each
        failures += grown.failures
        grown.client.flushall()
        grown.close()
    return failures


def by_index(told: argparse.Namespace, url: str, growth: Growth, say: Callable[[str], None]) -> None:
    """Note what a bare search takes over flat and over HNSW indexes of float16, and what a write takes."""
    vectors = Vectors(Workload(told.seed), told.dimensions)
    drawn, order = numpy.random.default_rng(told.seed), random.Random(told.seed)
    kinds = {"FLAT": (), "HNSW": ("M", 8, "EF_CONSTRUCTION", 40)}
    with redis.Redis.from_url(url, protocol=2, socket_timeout=600) as client:
        for kind, more in kinds.items():
            told_index = ("TYPE", "FLOAT16", "DIM", told.dimensions, "DISTANCE_METRIC", "COSINE", *more)
            client.execute_command(
                "FT.CREATE", f"bare:{kind}", "ON", "HASH", "PREFIX", 1, f"{kind}:", "SCHEMA", "scope", "TAG",
                "vec", "VECTOR", kind, len(told_index), *told_index,
            )  # fmt: skip
        count = 0
        for size in [n for n in (500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000) if n <= told.flat_up_to]:
            rows, wrote = vectors.around(drawn, size - count).astype("<f2"), dict.fromkeys(kinds, 0.0)
            for start in range(0, len(rows), 100):
                for kind in order.sample(list(kinds), 2):
                    pipe = client.pipeline(transaction=False)
                    for at, row in enumerate(rows[start : start + 100], count + start):
                        pipe.hset(f"{kind}:{at}", mapping={"scope": "one", "vec": row.tobytes()})
                    began = time.perf_counter()
                    pipe.execute()
                    wrote[kind] += time.perf_counter() - began
            searched: dict[str, list[float]] = {kind: [] for kind in kinds}
            for row in vectors.around(drawn, told.rounds).astype("<f2"):
                for kind in order.sample(list(kinds), 2):
                    policy = " HYBRID_POLICY BATCHES" if kind == "HNSW" else ""
                    query = f"(@scope:{{one}})=>[KNN 5 @vec $v{policy}]"
                    began = time.perf_counter()
                    client.execute_command("FT.SEARCH", f"bare:{kind}", query, "PARAMS", 2, "v", row.tobytes(),
                                           "NOCONTENT", "DIALECT", 2)  # fmt: skip
                    searched[kind].append(time.perf_counter() - began)
            growth.flat[size] = {
                **{kind: statistics.median(seconds) * 1e6 for kind, seconds in searched.items()},
                **{f"{kind} write": seconds / len(rows) * 1e6 for kind, seconds in wrote.items()},
            }  # fmt: skip
            count = size
        client.flushall()
    say(f"flat and HNSW up to {count:,} vectors")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, nargs="+", default=[1_000, 5_000, 20_000])
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--tenant-entries", type=int, default=4_000)
    parser.add_argument("--answer-entries", type=int, default=2_000)
    parser.add_argument("--flat-up-to", type=int, default=20_000, help="vectors")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts; scopes needs entries")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--op-budget-s", type=float, help="time for Redis per lookup; default: the cache's own")
    parser.add_argument("--url", help="a Redis that is emptied; default: a private one")
    parser.add_argument("--write", action="store_true", help="into benchmarks/README.md, with pictures")
    return parser.parse_args(given)


def run(told: argparse.Namespace, say: Callable[[str], None] = print) -> Growth:
    """Measure everything that was asked for."""
    conditions, began, llm_string = Conditions(versions()), time.perf_counter(), told_by_langchain()
    growth = Growth(dimensions=told.dimensions)
    with private_redis(told.url) as url:
        with redis.Redis.from_url(url) as client:
            client.flushall()
            server = redis_version(client)
        if "flat" in told.only:
            by_index(told, url, growth, say)
        if "tenants" in told.only:
            growth.failures += by_tenants(told, url, llm_string, growth)
            say(f"tenants: {time.perf_counter() - began:.0f} s since the start")
        if "answers" in told.only:
            growth.failures += by_answer(told, url, llm_string, growth)
            say(f"answers: {time.perf_counter() - began:.0f} s since the start")
        if "entries" in told.only or "scopes" in told.only:
            grown = Grown(url, llm_string, told.dimensions, told.seed, op_budget_s=told.op_budget_s)
            by_entries(grown, sorted(told.entries), told.rounds, growth, say)
            if "scopes" in told.only:
                by_scope(grown, told.rounds, growth)
            growth.failures += grown.failures
            grown.close()
    growth.conditions = conditions.lines(time.perf_counter() - began, server, told.seed)
    return growth


def main(given: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns 1 if an answer was wrong, or did not come where it must."""
    told = arguments(given)
    growth = run(told)
    print_growth(growth)
    if growth.failures:
        print("\n".join(f"FAILED: {failure}" for failure in growth.failures[:20]))
        return 1
    if told.write:
        write_growth(growth)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
