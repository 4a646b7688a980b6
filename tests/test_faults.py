"""Redis may be killed or frozen while calls run: nobody notices, and hits come back by themselves."""

import asyncio
import os
import signal
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import is_running, wait_until
from langchain_core.caches import BaseCache
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult

from langchain_aegis import AegisSemanticCache, was_cached
from langchain_aegis.embedded.redis import EmbeddedRedis
from langchain_aegis.writes import the_writer

CALLERS = 16


class Counting(BaseChatModel):
    """Answers each prompt with its own text, so that a wrong answer shows."""

    @property
    def _llm_type(self):
        return "counting"

    @property
    def _identifying_params(self):
        return {"model": "counting"}

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        message = AIMessage(f"about: {messages[-1].content}", response_metadata={"done_reason": "stop"})
        return ChatResult(generations=[ChatGeneration(message=message)])


class Stack:
    def __init__(self, url, awaited):
        self.cache = AegisSemanticCache(url, namespace=f"f{uuid.uuid4().hex[:8]}", require_tenant=False)
        self.cache._engine.embedder._make = lambda: None  # exact tier: the fault under test is Redis
        self.model = Counting(cache=self.cache)
        self.awaited = awaited

    def ask(self, questions):
        """Ask all, `CALLERS` at a time; returns the answers, each of which must be the question's own."""
        if self.awaited:
            answers = asyncio.run(self._ask(questions))
        else:
            with ThreadPoolExecutor(CALLERS) as pool:
                answers = list(pool.map(self.model.invoke, questions))
        assert [a.content for a in answers] == [f"about: {q}" for q in questions]
        return answers

    async def _ask(self, questions):
        slots = asyncio.Semaphore(CALLERS)

        async def one(question):
            async with slots:
                return await self.model.ainvoke(question)

        return await asyncio.gather(*map(one, questions))

    def hits(self, questions):
        return sum(was_cached(a) is not None for a in self.ask(questions))


QUESTIONS = [f"What is the fee of item {i}?" for i in range(40)]


@pytest.fixture(params=["threads", "tasks"])
def stack(request, home):
    with EmbeddedRedis(home) as server:
        stack = Stack(server.url, request.param == "tasks")
        stack.pid = server.pid
        stack.ask(QUESTIONS)
        assert the_writer.drain(timeout_s=10)
        assert stack.hits(QUESTIONS) == len(QUESTIONS)
        yield stack
        stack.cache.close()


def all_hit_again(stack):
    return stack.hits(QUESTIONS[:1]) == 1 and stack.hits(QUESTIONS) == len(QUESTIONS)


def test_a_frozen_redis_costs_nobody_an_answer(stack):
    breaker = stack.cache._connections.breaker
    os.kill(stack.pid, signal.SIGSTOP)
    try:
        stack.ask(QUESTIONS * 2)
        assert breaker.open
        # Only those that were under way when it froze have waited for it, and one more per pause.
        waited = stack.cache.stats().reasons
        assert 0 < waited["redis_slow"] <= 2 * CALLERS
        assert waited["redis_slow"] + waited.get("redis_down", 0) == len(QUESTIONS) * 2
    finally:
        os.kill(stack.pid, signal.SIGCONT)
    wait_until(lambda: all_hit_again(stack), 10, "hits after the thaw")


def test_a_killed_redis_costs_nobody_an_answer_and_hits_return_with_it(stack, home):
    os.kill(stack.pid, signal.SIGKILL)
    wait_until(lambda: not is_running(stack.pid))
    stack.ask(QUESTIONS * 2)
    with EmbeddedRedis(home) as again:  # on the same address
        assert again.pid != stack.pid
        wait_until(lambda: all_hit_again(stack), 10, "hits after its return")  # each try stores what it missed


def test_a_redis_killed_in_the_middle_costs_nobody_an_answer(stack):
    killer = threading.Timer(0.02, os.kill, (stack.pid, signal.SIGKILL))
    killer.start()
    stack.ask(QUESTIONS * 10)
    killer.join()
    wait_until(lambda: not is_running(stack.pid))
    assert stack.hits(QUESTIONS) == 0


def test_langchain_calls_the_cache_bare():
    """What makes all this necessary: if core ever guards the cache itself, this notices."""

    class Broken(BaseCache):
        def lookup(self, prompt, llm_string):
            raise RuntimeError("redis is away")

        def update(self, prompt, llm_string, return_val):
            raise AssertionError("not reached")

        def clear(self, **kwargs):
            raise AssertionError("not reached")

    with pytest.raises(RuntimeError, match="redis is away"):
        Counting(cache=Broken()).invoke("Why?")
