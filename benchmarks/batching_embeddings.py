"""What do gathered embedding requests save, and what does a vector from the cache cost?

Beside OllamaEmbeddings, interleaved: on the scripted server, where every request costs 5 ms, and with the real MiniLM
on the embedded server. Run: python benchmarks/batching_embeddings.py [--only scripted cache ...] [--write]
"""

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from langchain_ollama import OllamaEmbeddings

from langchain_aegis import AegisEmbeddingCache, AegisEmbeddings, BatchingEmbeddings
from langchain_aegis.embedded import EmbeddedOllama, EmbeddedRedis

PAGE = Path(__file__).parent.parent / "docs" / "batching.md"
MARKS = "<!-- embeddings -->", "<!-- /embeddings -->"
CALLERS = 64
WORDS = [
    *["library", "reader", "shelf", "film", "loan", "card", "room", "week", "return", "fee", "limit", "desk", "copy"],
    *["branch", "series", "story", "late", "open", "hold", "renew", "music", "map", "child", "adult", "guide", "floor"],
]  # fmt: skip

draw = random.Random(4)


def texts_of(count, shortest=6, longest=14):
    """New texts of so many words."""
    return [
        " ".join(draw.choices(WORDS, k=draw.randint(shortest, longest))) + f" {draw.random()}" for _ in range(count)
    ]


def embedders(model, base_url):
    upstream = OllamaEmbeddings(model=model, base_url=base_url)
    return {
        "OllamaEmbeddings": upstream,
        "AegisEmbeddings": AegisEmbeddings(model, base_url=base_url),
        "BatchingEmbeddings(OllamaEmbeddings)": BatchingEmbeddings(upstream),
    }


# Ways to ask


async def tasks(model, texts):
    await asyncio.gather(*(model.aembed_query(text) for text in texts))


async def threads(model, texts):
    with ThreadPoolExecutor(CALLERS) as pool:
        await asyncio.gather(*(asyncio.wrap_future(pool.submit(model.embed_query, text)) for text in texts))


async def compare(models, ways, rounds, requests, pid):
    """Yield rows; every round asks all embedders, each time another one first, for texts that nobody has seen."""
    for name, (way, make_texts) in ways.items():
        rates, costs = ({each: [] for each in models} for _ in range(2))
        counted = dict.fromkeys(models, 0)
        order = list(models)
        for number in range(-1, rounds):  # the first warms connections up, and does not count
            order.append(order.pop(0))
            for each in order:
                texts = make_texts()
                before, cpu_s, start = requests(), cpu_of(pid), time.perf_counter()
                await way(models[each], texts)
                took_s, cpu_s = time.perf_counter() - start, cpu_of(pid) - cpu_s
                if number >= 0:
                    rates[each].append(len(texts) / took_s)
                    costs[each].append(1 / cpu_s)
                    counted[each] += requests() - before
        theirs, cheap = rates.pop("OllamaEmbeddings"), costs.pop("OllamaEmbeddings")
        for each, ours in rates.items():
            yield (
                f"{name}, `{each}`",
                times(ours, theirs),
                times(costs[each], cheap),
                f"{rate(ours)} against {rate(theirs)}",
                f"{counted[each] / rounds:.1f} against {counted['OllamaEmbeddings'] / rounds:.0f}",
            )


def times(ours, theirs):
    ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


def cpu_of(pid):
    """Return the processor time of this process and of the server's, in seconds (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rate(values):
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


@contextlib.contextmanager
def server_of_its_own(dimensions=384, **told):
    """A scripted server in another process; yields its address, a function that counts its requests, and its pid."""
    code = (
        "import sys; from langchain_aegis.testing import ScriptedModel, ScriptedOllama\n"
        f"model = ScriptedModel(name='embed', embedding=True, dimensions={dimensions})\n"
        f"with ScriptedOllama(model, **{told!r}) as server:\n"
        "    print(server.base_url, flush=True)\n"
        "    for line in sys.stdin: print(server.counters.requests_embedded, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:

        def requests():
            child.stdin.write("\n")
            child.stdin.flush()
            return int(child.stdout.readline())

        yield child.stdout.readline().strip(), requests, child.pid
        child.stdin.close()


def rows_of(found):
    async def collect():
        return [row async for row in found]

    return asyncio.run(collect())


def scripted(told):
    """Writing vectors takes the scripted server, which is Python, longer than a real one: the longer, the more."""
    rows = []
    for dimensions in (64, 384):
        ways = {
            f"5 ms per request, {dimensions} dimensions, 64 {how}": (way, lambda: texts_of(CALLERS))
            for how, way in (("`aembed_query`", tasks), ("threads", threads))
        }
        with server_of_its_own(dimensions, request_s=0.005) as (url, requests, pid):
            rows += rows_of(compare(embedders("embed", url), ways, told.rounds, requests, pid))
    return rows


def minilm(told):
    ways = {
        "MiniLM, 64 `aembed_query`": (tasks, lambda: texts_of(CALLERS)),
        "MiniLM, 64 threads": (threads, lambda: texts_of(CALLERS)),
        "MiniLM, 64 `aembed_query` of 2 to 150 words": (tasks, lambda: texts_of(CALLERS, 2, 150)),
    }
    with EmbeddedOllama() as server, counting() as requests:
        return rows_of(compare(embedders("all-minilm", server.base_url), ways, told.rounds, requests, server.pid))


@contextlib.contextmanager
def counting():
    """Count the requests to /api/embed that this process sends: the embedded server does not."""
    import httpx

    sent = 0
    kinds = {httpx.HTTPTransport: "handle_request", httpx.AsyncHTTPTransport: "handle_async_request"}
    originals = {kind: getattr(kind, name) for kind, name in kinds.items()}

    def counted(original):
        def handle(self, request):
            nonlocal sent
            sent += request.url.path == "/api/embed"
            return original(self, request)

        return handle

    for kind, name in kinds.items():
        setattr(kind, name, counted(originals[kind]))
    try:
        yield lambda: sent
    finally:
        for kind, name in kinds.items():
            setattr(kind, name, originals[kind])


def cache(told):
    """The cost of a text that was embedded before, 384 dimensions, one call after another."""
    texts = texts_of(500)
    rows = []
    with server_of_its_own() as (url, _, _), EmbeddedRedis() as store:

        def model(**arguments):
            made = AegisEmbeddingCache(redis_url=store.url, namespace=namespace, op_budget_s=5, **arguments)
            return AegisEmbeddings("embed", base_url=url, cache=made)

        async def awaited(cached, again):
            times = []
            for text in again:
                start = time.perf_counter()
                await cached.aembed_query(text)
                times.append(time.perf_counter() - start)
            return times

        def blocking(cached, again):
            times = []
            for text in again:
                start = time.perf_counter()
                cached.embed_query(text)
                times.append(time.perf_counter() - start)
            return times

        namespace = f"bench{uuid.uuid4().hex[:8]}"
        plain = AegisEmbeddings("embed", base_url=url)
        warm = model()
        warm.embed_documents(texts)
        ways = {
            "`embed_query`": blocking,
            "`aembed_query`": lambda *given: asyncio.run(awaited(*given)),
        }
        for name, way in ways.items():
            way(plain, texts[:CALLERS])  # opens connections, here and below
            asked = us(way(plain, texts[CALLERS:]))
            way(warm, texts[:CALLERS])
            rows.append((f"a vector kept in this process, {name}", us(way(warm, texts)), f"the server {asked}"))
            fresh = model()
            way(fresh, texts[:CALLERS])
            rows.append((f"a vector kept in Redis, {name}", us(way(fresh, texts[CALLERS:])), f"the server {asked}"))
        both = {"without": plain, "with": model()}
        costs = {name: [] for name in both}
        for text in texts_of(300):
            for name, each in both.items():
                costs[name] += blocking(each, [text])
        beside = f"without a cache {us(costs['without'])}"
        rows.append(("a text that is in neither, `embed_query`", us(costs["with"]), beside))
    return rows


def us(times):
    ordered = sorted(times)
    low, high = (ordered[int(len(ordered) * share)] for share in (0.05, 0.95))
    return f"{statistics.median(times) * 1e6:,.0f} µs ({low * 1e6:,.0f} to {high * 1e6:,.0f})"


SECTIONS = {each.__name__: each for each in (scripted, minilm, cache)}


HEADS = {
    5: "| Measured | Times the throughput | Texts per processor second, times | Texts a second | Requests |",
    3: "| With a cache, 384 dimensions | Median (5 % to 95 %) | Beside |",
}


def tables(rows):
    """Return a table for each kind of row."""
    parts = []
    for width, head in HEADS.items():
        if found := [row for row in rows if len(row) == width]:
            parts.append("\n".join([head, "|---" * width + "|", *(f"| {' | '.join(row)} |" for row in found)]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="measure only these")
    parser.add_argument("--rounds", type=int, default=15, help="of each comparison")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/batching.md")
    told = parser.parse_args()
    rows = []
    for name in told.only or SECTIONS:
        for row in SECTIONS[name](told):
            print(" | ".join(row), flush=True)
            rows.append(row)
    if told.write:
        before, mark, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        _, end, after = rest.partition(MARKS[1])
        assert end, f"{PAGE} has no marks for the tables"
        PAGE.write_text(f"{before}{mark}\n\n{tables(rows)}\n\n{end}{after}", encoding="utf-8")
