"""What does the batching layer cost, and what does it save?

Runs against the scripted server, which has Ollama's scheduling; `--real` adds the small real model. Run:
python benchmarks/batching.py [--only idle reloads ...] [--real] [--write]
"""

import argparse
import asyncio
import contextlib
import gc
import inspect
import random
import statistics
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import httpx
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_ollama import ChatOllama
from langgraph.graph import START, MessagesState, StateGraph

from langchain_aegis import AegisOverloadedError, BatchingChatModel, ChatAegis, aegis_scope
from langchain_aegis.testing import ScriptedOllama

PAGE = Path(__file__).parent.parent / "docs" / "batching.md"
SLOTS = 4


class Model(BaseChatModel):
    """Answers after `service_s` seconds."""

    service_s: float = 0.0

    @property
    def _llm_type(self):
        return "fixed"

    @property
    def _identifying_params(self):
        return {"model": "fixed"}

    def _answer(self, messages):
        return ChatResult(generations=[ChatGeneration(message=AIMessage(f"to {messages[-1].content}"))])

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        return self._answer(messages)

    async def _agenerate(self, messages, stop=None, run_manager=None, **kwargs):
        if self.service_s:
            await asyncio.sleep(self.service_s)
        return self._answer(messages)


class FixedWindow:
    """The naive design: calls are collected for a fixed time, then sent together."""

    def __init__(self, model, window_s=0.05):
        self.model, self.window_s, self.waiting = model, window_s, []

    async def ainvoke(self, question):
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((question, future))
        if len(self.waiting) == 1:
            asyncio.get_running_loop().call_later(self.window_s, self._send)
        return await future

    def _send(self):
        batch, self.waiting = self.waiting, []
        self.task = asyncio.create_task(self._answer(batch))

    async def _answer(self, batch):
        for (_, future), answer in zip(batch, await self.model.abatch([q for q, _ in batch]), strict=True):
            future.set_result(answer)


def us(seconds):
    return f"{seconds * 1e6:,.0f} µs"


def at(times, share):
    return sorted(times)[min(len(times) - 1, int(len(times) * share))]


# One call on an idle server


async def timed(call):
    start = time.perf_counter()
    await call
    return time.perf_counter() - start


def idle(told):
    models = {"bare": Model(), "wrapped": BatchingChatModel(Model())}
    blocking = {name: [] for name in models}
    for i in range(2_000):
        for name, model in models.items():
            start = time.perf_counter()
            model.invoke(f"q {i}")
            blocking[name].append(time.perf_counter() - start)
    alone, layered = (statistics.median(blocking[name]) for name in models)
    yield "added to `invoke` on an idle server, median", us(layered - alone), f"the call alone {us(alone)}"

    async def awaited():
        times = {name: [] for name in models}
        for i in range(2_000):
            for name, model in models.items():
                times[name].append(await timed(model.ainvoke(f"q {i}")))
        naive = FixedWindow(models["bare"])
        windows = [await timed(naive.ainvoke(f"q {i}")) for i in range(20)]
        return *(statistics.median(times[name]) for name in models), statistics.median(windows)

    alone, layered, window = asyncio.run(awaited())
    yield "added to `ainvoke` on an idle server, median", us(layered - alone), f"the call alone {us(alone)}"
    yield "added by a fixed window of 50 ms", us(window - alone), "a design that waits for company"


# Refusals


def graph_of(model):
    async def node(state):
        return {"messages": [await model.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("node", node)
    graph.add_edge(START, "node")
    return graph.compile()


def refusal(told):
    model = BatchingChatModel(Model(), max_concurrency=SLOTS, max_waiting=100)
    held = [model.admission.enter() for _ in range(SLOTS + 100)]
    graph = graph_of(model)
    ways = {
        "`ainvoke`": (model.ainvoke, str, 10_000),
        "a prebuilt binding": (model.bind(stop=["END"]).ainvoke, str, 10_000),
        "`prompt \\| model`": (
            (ChatPromptTemplate.from_messages([("human", "{q}")]) | model).ainvoke,
            lambda q: {"q": q},
            2_000,
        ),
        "a graph node": (graph.ainvoke, lambda q: {"messages": [("human", q)]}, 500),
    }

    async def refused(ask, make, count):
        times = []
        inputs = [make(f"q {i}") for i in range(count)]
        gc.collect()
        for given in inputs:
            start = time.perf_counter()
            with contextlib.suppress(AegisOverloadedError):
                await ask(given)
                raise AssertionError("a full queue took a call")
            times.append(time.perf_counter() - start)
        return times

    for name, (ask, make, count) in ways.items():
        times = asyncio.run(refused(ask, make, count))
        yield (
            f"a refusal through {name}, p50 / p99",
            f"{us(at(times, 0.5))} / {us(at(times, 0.99))}",
            f"{count:,} calls",
        )
    for ticket in held:
        ticket.leave()


def burst(told):
    async def load():
        model = BatchingChatModel(Model(service_s=0.02), max_concurrency=SLOTS, max_waiting=100)
        start = time.perf_counter()
        found = await asyncio.gather(*(model.ainvoke(f"q {i}") for i in range(10_000)), return_exceptions=True)
        return found, time.perf_counter() - start

    found, took_s = asyncio.run(load())
    refused = sum(isinstance(r, AegisOverloadedError) for r in found)
    answered = sum(isinstance(r, AIMessage) for r in found)
    assert answered + refused == 10_000
    yield (
        "10,000 calls at once, 4 slots, 100 places",
        f"{answered} answered, {refused:,} refused",
        f"{took_s:.1f} s in all",
    )


def batch(told):
    for name, wrap in (("`abatch`", lambda m: m), ("`abatch` of a binding", lambda m: m.bind(stop=["END"]))):

        async def load(wrap=wrap):
            model = BatchingChatModel(Model(service_s=1e-6), max_concurrency=SLOTS, max_waiting=100)
            gc.collect()
            tracemalloc.start()
            answers = await wrap(model).abatch([f"q {i}" for i in range(10_000)])
            kept, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert [a.content for a in answers] == [f"to q {i}" for i in range(10_000)]
            return model.admission.stats().refused, kept, peak

        refused, kept, peak = asyncio.run(load())
        yield (
            f"{name} of 10,000",
            f"10,000 answered, {refused} refused",
            f"peak {peak / 1e6:.0f} MB, of which the answers {kept / 1e6:.0f} MB",
        )


# What the server has to read


def contexts_of(count, tokens, seed=1):
    """Texts of about so many tokens of the scripted server, that differ from their first word on."""
    draw = random.Random(seed)
    words = ["library", "reader", "shelf", "film", "loan", "card", "room", "week", "return", "fee", "limit", "desk"]
    return [f"Context {i}: " + " ".join(draw.choices(words, k=tokens - 4)) for i in range(count)]


def asked_in(contexts, each, shuffled=True):
    calls = [[SystemMessage(c), HumanMessage(f"What about {i}?")] for c in contexts for i in range(each)]
    if shuffled:
        random.Random(7).shuffle(calls)
    return calls


def scripted(**told):
    known = inspect.signature(ScriptedOllama.__init__).parameters
    return ScriptedOllama(["m", "n"], words=4, **{name: value for name, value in told.items() if name in known})


async def all_at_once(model, calls):
    start = time.perf_counter()
    await asyncio.gather(*(model.ainvoke(call) for call in calls))
    return time.perf_counter() - start


def chat_ollama(**told):
    return ChatOllama(**told, client_kwargs={"verify": False, "limits": httpx.Limits(max_connections=None)})


def batched(name="m", **told):
    return BatchingChatModel(ChatAegis(name, **told), max_concurrency=SLOTS, max_waiting=10_000)


def prefixes(told):
    contexts = contexts_of(20, 1_000)
    calls = asked_in(contexts, 10)
    with scripted(slots=1, host_cache=True) as server:  # one after another, context by context
        model = ChatAegis("m", base_url=server.base_url)
        for call in asked_in(contexts, 10, shuffled=False):
            model.invoke(call)
        least = server.counters.prefilled_tokens
    for cache in (False, True):
        read, took = {}, {}
        for name, make in (("unbatched", lambda url: chat_ollama(model="m", base_url=url)),
                           ("batched", lambda url: batched(base_url=url))):  # fmt: skip
            with scripted(slots=SLOTS, host_cache=cache, prefill_tokens_per_s=20_000) as server:
                took[name] = asyncio.run(all_at_once(make(server.base_url), calls))
                read[name] = server.counters.prefilled_tokens
        yield (
            f"200 calls over 20 contexts of 1,000 tokens, host prompt cache {'on' if cache else 'off'}: "
            "prompt tokens read, times the minimum",
            f"{read['batched'] / least:.2f}",
            f"unbatched {read['unbatched'] / least:.2f}; time {took['batched'] / took['unbatched']:.2f} of unbatched",
        )


def reloads(told):
    options = [(name, num_ctx) for name in ("m", "n") for num_ctx in (2_048, 4_096)]
    found = {}
    for how, make in (("unbatched", lambda name, **t: chat_ollama(model=name, **t)), ("batched", batched)):
        with scripted(slots=SLOTS, max_loaded=1) as server:
            models = [make(name, num_ctx=num_ctx, base_url=server.base_url) for name, num_ctx in options]

            async def load(models=models):
                await asyncio.gather(*(models[i % 4].ainvoke(f"question {i}") for i in range(100)))

            asyncio.run(load())
            found[how] = server.counters.loads
    yield (
        "100 calls of two models with two `num_ctx`, interleaved: times that the server loads a model",
        str(found["batched"]),
        f"unbatched {found['unbatched']}",
    )


# Overload


@contextlib.contextmanager
def server_of_its_own(**told):
    """A scripted server in another process, so that the load here does not slow it down; yields its address."""
    code = (
        "import sys; from langchain_aegis.testing import ScriptedOllama\n"
        f"with ScriptedOllama('m', **{told!r}) as server: print(server.base_url, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        yield child.stdout.readline().strip()
        child.stdin.close()


def overload(told):
    for service_s in (0.1, 0.5):
        yield overloaded(told.seconds, service_s)


def overloaded(seconds, service_s):
    async def closed_loop(model, length_s):
        """As many answers a second as the server can give."""
        end, count = time.perf_counter() + length_s, 0

        async def caller():
            nonlocal count
            while time.perf_counter() < end:
                await model.ainvoke(f"q {count}")
                count += 1

        await asyncio.gather(*(caller() for _ in range(SLOTS)))
        return count / length_s

    async def open_loop(model, rate):
        start, tasks, done = time.perf_counter(), set(), []
        counts = {"answered": 0, "refused": 0}

        async def one(i):
            begun = time.perf_counter()
            try:
                await model.ainvoke(f"q {i}")
            except AegisOverloadedError:
                counts["refused"] += 1
            else:
                now = time.perf_counter()
                counts["answered"] += now < start + seconds
                done.append(now - begun)

        sent = 0
        while (passed := time.perf_counter() - start) < seconds:
            for _ in range(int(passed * rate) - sent):
                task = asyncio.create_task(one(sent))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                sent += 1
            await asyncio.sleep(0.005)
        await asyncio.gather(*tasks)
        return counts, done, sent

    async def both():
        model = BatchingChatModel(ChatAegis("m", base_url=url), max_concurrency=SLOTS, max_waiting=100)
        await closed_loop(model, 1)
        capacity = await closed_loop(model, max(2, seconds / 6))
        return capacity, *await open_loop(model, 20 * capacity)

    with server_of_its_own(slots=SLOTS, words=8, tokens_per_s=20 / service_s) as url:
        capacity, counts, done, sent = asyncio.run(both())
    return (
        f"answers of {service_s} s, {sent / seconds:.0f} calls a second for {seconds:g} s at a capacity of "
        f"{capacity:.0f}: goodput",
        f"{counts['answered'] / seconds / capacity:.1%} of capacity",
        f"{counts['answered']:,} answered in time, {counts['refused']:,} refused; "
        f"p99 of the answered {at(done, 0.99):.1f} s",
    )


def fairness(told):
    async def ten_calls(model):
        async def one(i):
            with aegis_scope(tenant="B"):
                return await timed(model.ainvoke(f"b {i}"))

        return max(await asyncio.gather(*(one(i) for i in range(10))))

    async def beside(model):
        with aegis_scope(tenant="A"):
            tasks = [asyncio.create_task(model.ainvoke(f"a {i}")) for i in range(5_000)]
        await asyncio.sleep(1)
        found = await ten_calls(model)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return found

    def model():
        return BatchingChatModel(Model(service_s=0.05), max_concurrency=SLOTS, max_waiting=10_000)

    solo = statistics.median(asyncio.run(ten_calls(model())) for _ in range(3))
    with_a = asyncio.run(beside(model()))
    yield (
        "ten calls of tenant B beside 5,000 of tenant A: slowest of B, times that of B alone",
        f"{with_a / solo:.1f}",
        f"{solo * 1e3:.0f} ms alone; first come, first served would be {5_000 * 0.05 / SLOTS:.0f} s",
    )


# The small real model


def real(told):
    from langchain_aegis.embedded import EmbeddedOllama

    def questions(number):
        texts = contexts_of(5, 700, seed=number)
        return [
            [SystemMessage(call[0].content), HumanMessage(call[1].content + " Answer with one word.")]
            for call in asked_in(texts, 6)
        ]

    async def run(model, calls):
        start = time.perf_counter()
        answers = await asyncio.gather(*(model.ainvoke(call) for call in calls))
        took_s = time.perf_counter() - start
        read_s = sum(a.response_metadata["prompt_eval_duration"] for a in answers) / 1e9
        return took_s, read_s

    found = {"unbatched": [], "batched": []}
    with EmbeddedOllama() as server:
        options = {"base_url": server.base_url, "num_predict": 2, "temperature": 0}
        models = {
            "unbatched": lambda: chat_ollama(model="smollm2:135m", **options),  # its client knows one event loop
            "batched": lambda: batched("smollm2:135m", **options),
        }
        for number, name in enumerate(("unbatched", "batched", "batched", "unbatched")):
            found[name].append(asyncio.run(run(models[name](), questions(10 + number))))
    took, read = ({k: sum(v[i] for v in runs) for k, runs in found.items()} for i in (0, 1))
    yield (
        "30 calls over 5 contexts, SmolLM2-135M on two cores: time, of unbatched",
        f"{took['batched'] / took['unbatched']:.2f}",
        f"{took['batched'] / 2:.0f} s against {took['unbatched'] / 2:.0f} s; "
        f"reading prompts {read['batched'] / read['unbatched']:.2f} of unbatched",
    )


SECTIONS = {each.__name__: each for each in (idle, refusal, burst, batch, prefixes, reloads, overload, fairness, real)}


def table(rows):
    return "\n".join(["| Measured | Result | Beside |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="measure only these")
    parser.add_argument("--real", action="store_true", help="the small real model, too: minutes of two cores")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the overload")
    parser.add_argument("--write", action="store_true", help="put the table into docs/batching.md")
    told = parser.parse_args()
    chosen = told.only or [name for name in SECTIONS if told.real or name != "real"]
    rows = []
    for name in chosen:
        for row in SECTIONS[name](told):
            print(": ".join((row[0].replace("\\|", "|"), f"{row[1]} ({row[2]})")), flush=True)
            rows.append(row)
    if told.write:
        before, mark, rest = PAGE.read_text(encoding="utf-8").partition("<!-- measured -->")
        _, end, after = rest.partition("<!-- /measured -->")
        assert end, f"{PAGE} has no marks for the table"
        PAGE.write_text(f"{before}{mark}\n\n{table(rows)}\n\n{end}{after}", encoding="utf-8")
