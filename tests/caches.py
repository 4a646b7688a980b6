"""What tests of the cache share: calls as LangChain makes them, an embedder of words, blocking and awaited in one."""

import asyncio
from contextvars import copy_context

from langchain_core.caches import RETURN_VAL_TYPE
from langchain_core.embeddings import Embeddings
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration

from langchain_aegis.stamps import _forgotten, _pending
from langchain_aegis.writes import the_writer

MODEL = "[('_type', 'chat'), ('model', 'm'), ('stop', None)]"


def prompt(*messages):
    return dumps([HumanMessage(m) if isinstance(m, str) else m for m in messages])


def chat(text, reason="stop", **kwargs) -> RETURN_VAL_TYPE:
    return [ChatGeneration(message=AIMessage(text, response_metadata={"done_reason": reason}, **kwargs))]


def text_of(found):
    return None if found is None else found[0].text


def call_once(awaited, cache, name, *told, **named):
    """Call a method of a cache, or its asynchronous twin in an event loop of its own."""
    if not awaited:
        return getattr(cache, name)(*told, **named)

    async def one():
        try:
            return await getattr(cache, f"a{name}")(*told, **named)
        finally:
            await cache.aclose()

    return asyncio.run(one())


def stats_of(cache):
    """What a cache has done, with what it was told to store; `stats()` waits for that only outside of event loops."""
    assert the_writer.drain(timeout_s=10)
    return cache.stats()


class Words(Embeddings):
    """Texts are as near as the words that they share."""

    model = "words"

    def __init__(self):
        self.asked = []

    def embed_documents(self, texts):
        return [self.embed_query(t) for t in texts]

    def embed_query(self, text):
        self.asked.append(text)
        vector = [0.0] * 512
        for word in text.lower().strip("?!. ").split():
            vector[sum(word.encode()) * 7 % 512] += 1.0
        return vector


class Same(Embeddings):
    """Every question is as near as can be to every other: rules, guards and scopes alone decide."""

    model = "same"

    def embed_query(self, text):
        return [0.6, 0.8]

    def embed_documents(self, texts):
        return [[0.6, 0.8] for _ in texts]


class Driver:
    """Calls a cache blocking or awaited, so that one test proves both."""

    def __init__(self, cache, awaited):
        self.cache, self.awaited = cache, awaited
        self._loop = asyncio.new_event_loop() if awaited else None

    def _run(self, name, *args, **kwargs):
        if not self.awaited:
            return getattr(self.cache, name)(*args, **kwargs)
        # LangChain awaits lookup and update in one task: what one leaves in the context, the other finds there.
        context = copy_context()
        call = getattr(self.cache, f"a{name}")(*args, **kwargs)
        try:
            return self._loop.run_until_complete(self._loop.create_task(call, context=context))
        finally:
            for variable in (_pending, _forgotten):
                if variable in context:
                    variable.set(context[variable])

    def wait_for(self, late):
        return self._loop.run_until_complete(late) if self.awaited else late.result(10)

    def __getattr__(self, name):
        return lambda *args, **kwargs: self._run(name, *args, **kwargs)

    def end(self):
        if self._loop is not None:
            self._loop.run_until_complete(self.cache.aclose())
            self._loop.close()
        self.cache.close()
