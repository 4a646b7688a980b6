"""What does a chat model cost the client: ChatAegis and ChatOllama, side by side on one scripted server.

CPU of the calling thread, medians of interleaved rounds; the server runs in a thread of its own.
Run: python benchmarks/chat_models.py
"""

import statistics
import time

from langchain_ollama import ChatOllama

from langchain_aegis import ChatAegis
from langchain_aegis.testing import ScriptedOllama

ROUNDS = 15


def cpu_ms(call):
    start = time.thread_time()
    call()
    return (time.thread_time() - start) * 1e3


def compare(name, calls):
    times = {kind: [] for kind in calls}
    for _ in range(ROUNDS):
        for kind, call in calls.items():
            times[kind].append(cpu_ms(call))
    ours, theirs = (statistics.median(times[kind]) for kind in ("ChatAegis", "ChatOllama"))
    print(f"{name}: ChatAegis {ours:.1f} ms, ChatOllama {theirs:.1f} ms, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    with ScriptedOllama(words=400) as server:
        kinds = {"ChatAegis": ChatAegis, "ChatOllama": ChatOllama}
        chats = {name: kind(model="scripted", base_url=server.base_url, cache=False) for name, kind in kinds.items()}
        prompt = "Tell me all about libraries. " * 20
        pieces = sum(1 for _ in chats["ChatOllama"].stream(prompt))
        compare(
            "constructing", {n: lambda k=k: k(model="scripted", base_url=server.base_url) for n, k in kinds.items()}
        )
        compare(f"invoke, {pieces} pieces", {n: lambda c=c: c.invoke(prompt) for n, c in chats.items()})
        compare(f"stream, {pieces} pieces", {n: lambda c=c: list(c.stream(prompt)) for n, c in chats.items()})
