"""How much slower is a call while Redis is frozen or killed, and how soon are there hits again?

16 callers at a time ask a model that takes 20 ms, blocking and awaited. Each figure is the slowest call, less the
median of calls that miss the cache of a healthy Redis. Run: python benchmarks/redis_away.py
"""

import asyncio
import os
import signal
import statistics
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

from langchain_core.embeddings import Embeddings
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult

from langchain_aegis import AegisSemanticCache, was_cached
from langchain_aegis.embedded import EmbeddedRedis

CALLERS = 16
MODEL_S = 0.02


class Free(Embeddings):
    """Costs nothing, so that the figures are those of Redis."""

    model = "free"

    def embed_query(self, text):
        return [float(b) for b in text.encode()[-16:].rjust(16)]

    def embed_documents(self, texts):
        return [self.embed_query(t) for t in texts]


class Model(BaseChatModel):
    @property
    def _llm_type(self):
        return "fixed"

    @property
    def _identifying_params(self):
        return {"model": "fixed"}

    def _answer(self, messages):
        message = AIMessage(f"about {messages[-1].content}", response_metadata={"done_reason": "stop"})
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        time.sleep(MODEL_S)
        return self._answer(messages)

    async def _agenerate(self, messages, stop=None, run_manager=None, **kwargs):
        await asyncio.sleep(MODEL_S)
        return self._answer(messages)


class Load:
    def __init__(self, model, awaited):
        self.model, self.awaited, self.errors = model, awaited, 0

    def __call__(self, questions):
        """Ask all; returns each call's seconds."""
        if self.awaited:
            return asyncio.run(self._awaited(questions))
        with ThreadPoolExecutor(CALLERS) as pool:
            return list(pool.map(self._blocking, questions))

    def _blocking(self, question):
        start = time.perf_counter()
        self._check(question, self.model.invoke(question))
        return time.perf_counter() - start

    async def _awaited(self, questions):
        slots = asyncio.Semaphore(CALLERS)

        async def one(question):
            async with slots:
                start = time.perf_counter()
                self._check(question, await self.model.ainvoke(question))
                return time.perf_counter() - start

        return await asyncio.gather(*map(one, questions))

    def _check(self, question, answer):
        self.errors += answer.content != f"about {question}"

    def again_s(self, question):
        start = time.perf_counter()
        while was_cached(self.model.invoke(question)) is None:
            time.sleep(0.05)
        return time.perf_counter() - start


def questions(kind, count):
    return [f"What is the {kind} number {uuid.uuid4().hex[:6]} of item {i}?" for i in range(count)]


def measure(awaited):
    home = tempfile.mkdtemp(prefix="away-", dir="/tmp")
    name = "awaited" if awaited else "blocking"
    server = EmbeddedRedis(home)
    cache = AegisSemanticCache(server.url, Free(), namespace=f"away{uuid.uuid4().hex[:6]}")
    load = Load(Model(cache=cache), awaited)
    known = questions("known", 40)
    load(known)
    usual = statistics.median(load(questions("usual", 120)))
    pid = server.pid
    os.kill(pid, signal.SIGSTOP)
    frozen = load(questions("frozen", 160) + known)
    os.kill(pid, signal.SIGCONT)
    print(f"{name}: frozen: slowest call +{(max(frozen) - usual) * 1e3:.0f} ms; "
          f"hits again {load.again_s(known[0]):.1f} s after the thaw")  # fmt: skip
    os.kill(pid, signal.SIGKILL)
    killed = load(questions("killed", 160) + known)
    server.close()
    server = EmbeddedRedis(home)
    server.start()
    print(f"{name}: killed: slowest call +{(max(killed) - usual) * 1e3:.0f} ms; "
          f"hits again {load.again_s(questions('new', 1)[0]):.1f} s after its return")  # fmt: skip
    print(f"{name}: a usual miss {usual * 1e3:.0f} ms; wrong answers or errors {load.errors}")
    cache.close()
    server.close()


if __name__ == "__main__":
    for awaited in (False, True):
        measure(awaited)
