"""Stream answers to the terminal; what was asked before comes as a stream too, without the model."""

import asyncio
import time

from langchain_core.globals import set_llm_cache

from langchain_aegis import AegisSemanticCache, ChatAegis, was_cached
from langchain_aegis.embedded import EmbeddedRedis, MiniLMEmbeddings
from langchain_aegis.testing import ScriptedOllama

QUESTIONS = [
    "How long may I keep a borrowed book?",
    "How long may I keep a borrowed book?",  # the same again
    "How long can I keep a borrowed book?",  # the same in other words
    "How long may I keep a borrowed film?",  # another question, however alike
]


async def main() -> None:
    # Your own: ChatAegis("qwen3:8b") and AegisSemanticCache("redis://...") need nothing of what is embedded here.
    with EmbeddedRedis(shared=False) as redis, ScriptedOllama(tokens_per_s=40) as server:
        model = ChatAegis("scripted", base_url=server.base_url, temperature=0)
        embeddings = MiniLMEmbeddings()
        embeddings.embed_query("Loads the model now, not during the first question.")
        async with AegisSemanticCache(redis.url, embeddings) as cache:
            set_llm_cache(cache)
            for question in QUESTIONS:
                await stream(model, question)
            set_llm_cache(None)
        print(f"\n{len(QUESTIONS)} questions, {len(server.chats)} asked of the model")


async def stream(model: ChatAegis, question: str) -> None:
    print(f"\n> {question}")
    started = time.perf_counter()
    answer = None
    async for chunk in model.astream(question):
        print(chunk.text, end="|", flush=True)
        answer = chunk if answer is None else answer + chunk
    hit = was_cached(answer) if answer else None
    tier = f"{hit['tier']} hit, similarity {hit['similarity']:.3f}" if hit else "answered by the model"
    print(f"\n  {tier}, {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    asyncio.run(main())
