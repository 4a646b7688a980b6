"""What does a chat model cost the client: ChatAegis and ChatOllama, side by side on one scripted server.

CPU of this process, all threads; the server is a process of its own. Both models in turn, round by round: medians, and
the median and range of each round's ratio. "LangChain's own" is the least that a chat model can be: the server's lines
read with httpx and orjson, and LangChain's two objects made of each.

Run: python benchmarks/chat_models.py [--rounds 25] [--profile stream|astream|invoke|hit]
"""

import argparse
import asyncio
import cProfile
import pstats
import statistics
import subprocess
import sys
import time

import httpx
import orjson
from langchain_core.caches import BaseCache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_ollama import ChatOllama
from pydantic import ConfigDict

from langchain_aegis import ChatAegis
from langchain_aegis.bench.scripted import scripted_server

TOKENS = 512
HITS = 50  # in one measurement
PROMPT = "Tell me all about libraries. " * 20
KINDS = {"ChatAegis": ChatAegis, "ChatOllama": ChatOllama}
COLD = """
import time
from {module} import {name} as Model
started = time.process_time()
Model(model="scripted", base_url="{base_url}")
print((time.process_time() - started) * 1e3)
"""


class Least(BaseChatModel):
    """No more than LangChain asks for; answers with 512 tokens."""

    base_url: str
    sync_client: httpx.Client
    async_client: httpx.AsyncClient
    model_config = ConfigDict(arbitrary_types_allowed=True)

    @property
    def _llm_type(self):
        return "least"

    def _request(self, messages, stream):
        options = {"num_predict": TOKENS, "temperature": 0}
        sent = [{"role": "user", "content": each.content} for each in messages]
        body = {"model": "scripted", "stream": stream, "options": options, "messages": sent}
        return {"method": "POST", "url": f"{self.base_url}/api/chat", "content": orjson.dumps(body)}

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        text = orjson.loads(self.sync_client.request(**self._request(messages, False)).content)["message"]["content"]
        return ChatResult(generations=[ChatGeneration(message=AIMessage(content=text))])

    async def _agenerate(self, messages, stop=None, run_manager=None, **kwargs):
        answer = await self.async_client.request(**self._request(messages, False))
        text = orjson.loads(answer.content)["message"]["content"]
        return ChatResult(generations=[ChatGeneration(message=AIMessage(content=text))])

    def _stream(self, messages, stop=None, run_manager=None, **kwargs):
        with self.sync_client.stream(**self._request(messages, True)) as response:
            rest = b""
            for data in response.iter_raw():
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    text = orjson.loads(line)["message"]["content"]
                    yield ChatGenerationChunk(message=AIMessageChunk(content=text))

    async def _astream(self, messages, stop=None, run_manager=None, **kwargs):
        async with self.async_client.stream(**self._request(messages, True)) as response:
            rest = b""
            async for data in response.aiter_raw():
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    text = orjson.loads(line)["message"]["content"]
                    yield ChatGenerationChunk(message=AIMessageChunk(content=text))


class Kept(BaseCache):
    """A cache that costs nothing."""

    def __init__(self):
        self.kept = {}

    def lookup(self, prompt, llm_string):
        return self.kept.get((prompt, llm_string))

    async def alookup(self, prompt, llm_string):
        return self.kept.get((prompt, llm_string))

    def update(self, prompt, llm_string, return_val):
        self.kept[prompt, llm_string] = return_val

    def clear(self, **kwargs):
        self.kept.clear()


def cpu_ms(call, times=1):
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) * 1e3 / times


def compare(name, calls, rounds, times=1):
    """Print the medians of each, and ratios to ChatOllama."""
    for call in calls.values():
        call()  # connections are opened, modules imported
    taken = {kind: [] for kind in calls}
    for _ in range(rounds):
        for kind, call in calls.items():
            taken[kind].append(cpu_ms(call, times))
    report(name, taken)


def report(name, taken):
    parts = []
    for kind, found in taken.items():
        ratios = sorted(one / other for one, other in zip(found, taken["ChatOllama"], strict=True))
        share = f" ({statistics.median(ratios):.3f}x, {ratios[0]:.3f} to {ratios[-1]:.3f})"
        parts.append(f"{kind} {statistics.median(found):.2f} ms" + (share if kind != "ChatOllama" else ""))
    print(f"{name}: {'; '.join(parts)}", flush=True)


def constructed(base_url, rounds):
    """Construct in fresh processes, and again and again in this one."""
    cold = {name: [] for name in KINDS}
    for _ in range(max(3, rounds // 4)):
        for name, kind in KINDS.items():
            code = COLD.format(module=kind.__module__, name=name, base_url=base_url)
            done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
            cold[name].append(float(done.stdout))
    report("constructing the first", cold)
    calls = {name: lambda kind=kind: kind(model="scripted", base_url=base_url) for name, kind in KINDS.items()}
    compare("constructing another", calls, rounds)


def ways(model, runner):
    async def read():
        async for _ in model.astream(PROMPT):
            pass

    async def asked():
        await model.ainvoke(PROMPT)

    async def asked_again():
        for _ in range(HITS):
            await model.ainvoke(PROMPT)

    return {
        "invoke": lambda: model.invoke(PROMPT),
        "ainvoke": lambda: runner.run(asked()),
        "stream": lambda: [None for _ in model.stream(PROMPT)],
        "astream": lambda: runner.run(read()),
        "ainvoke_hits": lambda: runner.run(asked_again()),
    }


def main(rounds, profile):
    with scripted_server() as base_url, asyncio.Runner() as runner:
        options = {"model": "scripted", "base_url": base_url, "temperature": 0, "num_predict": TOKENS}
        models = {name: kind(cache=False, **options) for name, kind in KINDS.items()}
        with httpx.Client(trust_env=False) as client:
            least = {"base_url": base_url, "sync_client": client, "async_client": httpx.AsyncClient(trust_env=False)}
            models["LangChain's own"] = Least(cache=False, **least)
            calls = {name: ways(model, runner) for name, model in models.items()}
            # A hit of each kind in a cache of its own.
            kept = {name: kind(cache=Kept(), **options) for name, kind in KINDS.items()}
            kept["LangChain's own"] = Least(cache=Kept(), **least)
            hits = {name: ways(model, runner) for name, model in kept.items()}
            if profile:
                call = hits["ChatAegis"]["invoke"] if profile == "hit" else calls["ChatAegis"][profile]
                profiled(call, 1_000 if profile == "hit" else 20)
            else:
                constructed(base_url, rounds)
                for way in ("invoke", "ainvoke", "stream", "astream"):
                    compare(f"{way}, {TOKENS} tokens", {name: each[way] for name, each in calls.items()}, rounds)
                compare("a hit, invoke", {name: each["invoke"] for name, each in hits.items()}, rounds, HITS)
                compare(f"{HITS} hits, ainvoke", {name: each["ainvoke_hits"] for name, each in hits.items()}, rounds)
            runner.run(least["async_client"].aclose())


def profiled(call, times):
    """Print where the time of ChatAegis goes."""
    call()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(times):
        call()
    profile.disable()
    pstats.Stats(profile).sort_stats("cumtime").print_stats(60)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--profile", choices=["stream", "astream", "invoke", "hit"])
    told = parser.parse_args()
    main(told.rounds, told.profile)
