"""A web application of two tenants that streams: the scope of a request goes along with what is read after its end."""

import asyncio
from collections.abc import AsyncIterator

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from langchain_aegis import AegisSemanticCache, ChatAegis, aegis_scope, was_cached
from langchain_aegis.embedded import EmbeddedRedis, MiniLMEmbeddings
from langchain_aegis.testing import ScriptedOllama

QUESTION = "What is the notice period of our contract?"


def make_app(model: ChatAegis) -> Starlette:
    async def stream(question: str) -> AsyncIterator[str]:
        async for chunk in model.astream(question):
            yield chunk.text
            if chunk.chunk_position == "last":
                yield " (cached)" if was_cached(chunk) else " (from the model)"

    async def chat(request: Request) -> StreamingResponse:
        # From an authenticated place: a gateway that checks a token, never from what the caller may write himself.
        tenant = request.headers["x-tenant"]
        # The framework reads the stream when this function has returned; `wrap` binds each step of it to the scope.
        return StreamingResponse(aegis_scope(tenant=tenant).wrap(stream(request.query_params["q"])))

    return Starlette(routes=[Route("/chat", chat)])


async def main() -> None:
    embeddings = MiniLMEmbeddings()
    embeddings.embed_query("Loads the model now, not during the first question.")
    with EmbeddedRedis(shared=False) as redis, ScriptedOllama(words=4) as server:
        async with AegisSemanticCache(redis.url, embeddings, require_tenant=True) as cache:
            model = ChatAegis("scripted", base_url=server.base_url, cache=cache)
            transport = httpx.ASGITransport(make_app(model))
            async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
                for tenant in ("acme", "globex", "acme", "globex"):
                    answer = await client.get("/chat", params={"q": QUESTION}, headers={"x-tenant": tenant})
                    print(f"{tenant:6} {answer.text}")
        print(f"4 requests, {len(server.chats)} asked of the model")


if __name__ == "__main__":
    asyncio.run(main())
