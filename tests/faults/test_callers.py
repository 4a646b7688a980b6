"""Whatever asks Redis: pipelines, streams, vectors, blocking or awaited. A fault costs none of them an answer."""

import asyncio
import contextlib
import time

import pytest
from conftest import wait_until

from faults.measure import ADDED_S, PRODUCTION, slowness
from langchain_aegis import AegisEmbeddingCache, AegisEmbeddings, Answer, BatchingChatModel, ChatAegis, was_cached
from langchain_aegis.testing import ScriptedOllama

CALLS = ("get_or_generate", "aget_or_generate", "invoke", "ainvoke", "stream", "astream", "embed", "aembed")
FAULTS = ("gone", "frozen", "locked", "replica", "full", "emptied", "lost functions", "wrong types", "slow", "cut")


@pytest.fixture(scope="module")
def ollama():
    with ScriptedOllama(["m", "m-embed"]) as server:
        yield server


@contextlib.contextmanager
def fault_of(server, proxy, name):
    """Something that happens to Redis, or to the network before it, for the time of a block."""
    client = server.client
    if name == "frozen":
        with server.frozen():
            yield
        return
    if name == "gone":
        server.kill()
    elif name == "locked":
        client.config_set("requirepass", "s3cret")
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    elif name == "replica":
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
    elif name == "full":
        server.fill()
    elif name == "emptied":
        server.empty()
    elif name == "lost functions":
        client.execute_command("FUNCTION", "FLUSH")
        client.execute_command("SCRIPT", "FLUSH")
    elif name == "wrong types":
        for key in client.scan_iter("*"):
            client.delete(key)
            client.rpush(key, "x")
    elif name == "slow":
        proxy.down.latency_s = 0.5
    else:
        proxy.down.cut_after = 7
    yield
    proxy.heal()
    if name == "gone":
        server.start()
    elif name == "locked":
        client.execute_command("AUTH", "s3cret")
        client.config_set("requirepass", "")
    elif name == "replica":
        client.execute_command("REPLICAOF", "NO", "ONE")
    elif name == "full":
        server.make_room()
    elif name == "wrong types":
        client.flushall()


class Caller:
    """One way to ask, and whether the answer came from Redis."""

    def __init__(self, how, ollama, new_cache, url):
        self.how, self.made = how, 0
        if how.endswith("embed"):
            self.ollama, self.url = ollama, url
            self.closing = self.cache = AegisEmbeddingCache(redis_url=url, namespace="callers", **PRODUCTION)
            return
        self.cache = new_cache(url=url, namespace="callers", **PRODUCTION)
        self.model = BatchingChatModel(
            ChatAegis("m", base_url=ollama.base_url, temperature=0, cache=self.cache), cache=self.cache
        )

    def ask(self, text):
        """Ask, and return whether it was answered by what was stored; fails unless the answer is right."""
        how, question = self.how, f"What is the fee of {text}?"
        if how.endswith("get_or_generate"):
            made = []

            def generate():
                made.append(1)
                return Answer(f"to {question}")

            if how[0] == "a":
                answer = asyncio.run(self.cache.aget_or_generate(question, generate, pipeline="p"))
            else:
                answer = self.cache.get_or_generate(question, generate, pipeline="p")
            assert answer == f"to {question}"
            return not made
        if how.endswith("embed"):
            model = AegisEmbeddings("m-embed", base_url=self.ollama.base_url, cache=self.cache)
            before = self.cache.stats()
            vector = asyncio.run(model.aembed_query(question)) if how[0] == "a" else model.embed_query(question)
            bare = AegisEmbeddings("m-embed", base_url=self.ollama.base_url).embed_query(question)
            assert max(abs(a - b) for a, b in zip(vector, bare, strict=True)) < 1e-3
            self.cache._entries.clear()  # what this process holds
            return self.cache.stats().redis_hits > before.redis_hits
        if how == "invoke":
            answers = [self.model.invoke(question)]
        elif how == "ainvoke":
            answers = [asyncio.run(self.model.ainvoke(question))]
        elif how == "stream":
            answers = list(self.model.stream(question))
        else:

            async def all_of_it():
                return [chunk async for chunk in self.model.astream(question)]

            answers = asyncio.run(all_of_it())
        assert "".join(each.text for each in answers)
        return any(was_cached(each) for each in answers)


@pytest.mark.row(1, 3, 7, 8, 9, 12, 13, 17, 22)
@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("how", CALLS)
def test_a_fault_costs_no_caller_an_answer_whichever_way_he_asks(server, proxy, ollama, new_cache, stored, how, name):
    """Before, during and after it each answer is right; then there are hits again."""
    caller = Caller(how, ollama, new_cache, proxy.url)
    try:
        caller.ask("the first item")
        stored()
        wait_until(lambda: caller.ask("the first item"), what="a hit")
        slow = slowness()
        with fault_of(server, proxy, name):
            for number in range(8):
                began = time.monotonic()
                caller.ask(("the first item", f"another item, {name} {number % 3}")[number % 2])
                took = time.monotonic() - began
                assert took <= (4 * ADDED_S + 1) * max(slow, slowness())  # a lookup, its update, and the call itself
            if name not in ("frozen", "slow"):
                stored()
        stored()
        wait_until(lambda: caller.ask("the first item"), 7.0 * max(1.0, slow), "a hit afterwards")
    finally:
        if how.endswith("embed"):
            caller.cache.close()
