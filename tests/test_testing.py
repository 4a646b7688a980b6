"""The scripted Ollama without a socket: httpx transports that reach it in this process."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from langchain_aegis.testing import ScriptedOllama

BODY: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.text.splitlines()]


def test_the_same_answer_sync_and_async() -> None:
    server = ScriptedOllama()
    body = BODY | {"options": {"temperature": 0}}

    async def over_async() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(transport=server.async_transport, base_url="http://ollama") as client:
            return lines(await client.post("/api/chat", json=body))

    with httpx.Client(transport=server.transport, base_url="http://ollama") as client:
        one = lines(client.post("/api/chat", json=body))
    two = asyncio.run(over_async())
    server.close()
    assert [line["message"] for line in one] == [line["message"] for line in two]
    assert server.disconnects == 0


async def test_streams_and_notices_a_reader_that_leaves() -> None:
    server = ScriptedOllama(words=2_000, tokens_per_s=200)
    async with (
        httpx.AsyncClient(transport=server.async_transport, base_url="http://ollama") as client,
        client.stream("POST", "/api/chat", json=BODY) as answer,
    ):
        assert json.loads(await anext(answer.aiter_lines()))["done"] is False
    await server.await_until(lambda s: s.disconnects == 1 and s.running == 0)
    await asyncio.to_thread(server.close)


def test_faults_and_timeouts_apply() -> None:
    server = ScriptedOllama()
    with httpx.Client(transport=server.transport, base_url="http://ollama", timeout=0.2) as client:
        server.fail("cut", after=1)
        with pytest.raises(httpx.RemoteProtocolError):
            client.post("/api/chat", json=BODY)
        server.fail("hang")
        with pytest.raises(httpx.ReadTimeout):
            client.post("/api/chat", json=BODY)
        server.wait_until(lambda s: s.running == 0)
        server.close()


async def test_async_faults_and_timeouts_apply() -> None:
    server = ScriptedOllama()
    transport = server.async_transport
    async with httpx.AsyncClient(transport=transport, base_url="http://ollama", timeout=0.2) as client:
        server.fail("cut", after=1)
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/api/chat", json=BODY)
        server.fail("hang", after=2)
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/api/chat", json=BODY)
        await asyncio.to_thread(server.close)
        with pytest.raises(httpx.ConnectError):
            await client.post("/api/chat", json=BODY)
