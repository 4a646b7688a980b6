"""One suite for the Ollama wire: the scripted engine and llama.cpp keep the same promises, byte for byte."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage
from langchain_ollama import ChatOllama, OllamaEmbeddings
from langchain_ollama._utils import validate_model
from pydantic import BaseModel

from langchain_aegis.embedded import wire_json
from langchain_aegis.embedded.ollama import EmbeddedOllama
from langchain_aegis.embedded.wire_requests import Refused, duration_ns, full_name, valid_name
from langchain_aegis.testing import ScriptedModel, ScriptedOllama

FIXTURES = Path(__file__).parent / "fixtures" / "ollama"
CASES: list[dict[str, Any]] = json.loads((FIXTURES / "errors.json").read_text())
FIELDS: dict[str, dict[str, list[str]]] = json.loads((FIXTURES / "fields.json").read_text())
CHAT, EMBED = "smollm2:135m", "all-minilm"
DEADLINE_S = 60


@pytest.fixture(scope="module", params=["scripted", pytest.param("llama", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that lists a chat model without tools and an embedding model, over a real socket."""
    if request.param == "scripted":
        models = [
            ScriptedModel(name=CHAT, tools=False),
            ScriptedModel(name=EMBED, embedding=True, context_length=256),
        ]
        with ScriptedOllama(models) as scripted:
            yield scripted.base_url
    else:
        with EmbeddedOllama("llama", shared=False) as embedded:
            yield embedded.base_url


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=DEADLINE_S, verify=False) as client:  # noqa: S501  plain http
        yield client


def ask(text: str = "What is the capital of France?", **more: Any) -> dict[str, Any]:
    options = {"temperature": 0, "num_predict": 12} | more.pop("options", {})
    return {"model": CHAT, "messages": [{"role": "user", "content": text}], "options": options} | more


def blanked(line: bytes) -> bytes:
    """Replace what differs from run to run: times, numbers, what the model said, and the model's name."""
    line = re.sub(rb'"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{0,8}[1-9])?Z"', b"TIME", line)
    line = re.sub(rb'"(model|content)":"[^"]*"', rb'"\1":TEXT', line)
    return re.sub(rb":\d+(?=[,}])", b":INTEGER", line)


class TestBytes:
    def test_a_stream_is_what_ollama_streams(self, http: httpx.Client) -> None:
        measured_first, measured_last = (FIXTURES / "chat_stream.ndjson").read_bytes().splitlines()
        response = http.post("/api/chat", json=ask())

        assert response.headers["content-type"] == "application/x-ndjson"
        assert response.headers["transfer-encoding"] == "chunked"
        assert response.content.endswith(b"\n")
        *pieces, last = response.content.splitlines()
        assert {blanked(piece) for piece in pieces} == {blanked(measured_first)}
        done = {"stop": last, "length": last.replace(b'"length"', b'"stop"')}[json.loads(last)["done_reason"]]
        assert blanked(done) == blanked(measured_last)

    def test_without_streaming_it_is_one_object(self, http: httpx.Client) -> None:
        """The same fields as the last line, no newline, a Content-Length."""
        measured = (FIXTURES / "chat_stream.ndjson").read_bytes().splitlines()[1]
        response = http.post("/api/chat", json=ask(stream=False))

        assert response.headers["content-type"] == "application/json; charset=utf-8"
        assert int(response.headers["content-length"]) == len(response.content)
        assert blanked(response.content.replace(b'"length"', b'"stop"')) == blanked(measured)

    def test_embeddings_are_what_ollama_sends(self, http: httpx.Client) -> None:
        measured = (FIXTURES / "embed.json").read_bytes()
        response = http.post("/api/embed", json={"model": EMBED, "input": ["hello"]})

        numbers = re.compile(rb"\[\[.*\]\]")
        assert blanked(numbers.sub(b"", response.content)) == blanked(numbers.sub(b"", measured))
        assert all(len(number.lstrip(b"-0.")) <= 9 for number in re.findall(rb"-?0\.\d+", response.content))

    @pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['route']} {case['body'][:60]}")
    def test_refusals_are_ollamas(self, http: httpx.Client, case: dict[str, Any]) -> None:
        body, expected = (case[key].replace("smollm2:latest", "smollm2").replace("smollm2", CHAT) for key in
                          ("body", "answer"))  # fmt: skip
        response = http.post(case["route"], content=body.encode())

        counts = re.compile(r"\(\d+ tokens\) exceeds|n_prompt_tokens\\\":\d+")
        assert response.status_code == case["status"]
        assert counts.sub("", response.text) == counts.sub("", expected)

    @pytest.mark.parametrize("route", FIELDS)
    def test_listings_have_ollamas_fields_in_order(self, http: httpx.Client, route: str) -> None:
        http.post("/api/chat", json={"model": CHAT, "messages": []})
        models = http.get(route).json()["models"]

        assert models
        for model in models:
            assert list(model) == FIELDS[route]["models"]
            assert list(model["details"]) == FIELDS[route]["details"]

    def test_html_is_escaped_as_go_does(self, http: httpx.Client) -> None:
        response = http.post("/api/chat", json={"model": "<a&b>", "messages": []})
        assert response.text == r"""{"error":"invalid model name"}"""
        response = http.post("/api/show", json={"model": CHAT})
        assert ("<" in response.json()["template"]) == ("\\u003c" in response.text)
        assert "<" not in response.text

    def test_what_is_not_there(self, http: httpx.Client) -> None:
        assert (http.get("/").text, http.head("/").status_code) == ("Ollama is running", 200)
        assert re.fullmatch(r'{"version":"\d+\.\d+\.\d+"}', http.get("/api/version").text)
        assert (http.get("/api/nothing").status_code, http.get("/api/nothing").text) == (404, "404 page not found")
        assert (http.get("/api/chat").status_code, http.get("/api/chat").text) == (405, "405 method not allowed")

    def test_bodies_that_go_accepts(self, http: httpx.Client) -> None:
        """Nulls, unknown fields and options, upper-case roles, half of a surrogate pair, something after the end."""
        body = ask("x \ud83d y", stream=False, nonsense=1, keep_alive=None, format=None, tools=None,
                   options={"unknown": "x", "num_predict": 2.0, "seed": None})  # fmt: skip
        body["messages"][0]["role"] = "USER"
        response = http.post("/api/chat", content=json.dumps(body).encode() + b" trailing")

        assert response.status_code == 200
        assert response.json()["eval_count"] == 2


class TestGeneration:
    def test_the_same_request_has_the_same_answer_at_temperature_zero(self, http: httpx.Client) -> None:
        first, second = (http.post("/api/chat", json=ask(stream=False)).json() for _ in range(2))

        assert first["message"] == second["message"]
        assert first["prompt_eval_count"] == second["prompt_eval_count"] > 10  # cached tokens count too

    def test_num_predict_ends_as_length(self, http: httpx.Client) -> None:
        answer = http.post("/api/chat", json=ask(stream=False, options={"num_predict": 3})).json()
        assert (answer["eval_count"], answer["done_reason"]) == (3, "length")

    def test_a_stop_sequence_is_not_sent(self, http: httpx.Client) -> None:
        whole = http.post("/api/chat", json=ask(stream=False)).json()["message"]["content"]
        stop = whole.split()[2]
        answer = http.post("/api/chat", json=ask(stream=False, options={"stop": [stop]})).json()

        assert answer["message"]["content"] == whole[: whole.index(stop)]
        assert answer["done_reason"] == "stop"

    @pytest.mark.slow
    def test_a_prompt_is_cut_to_half_of_the_window(self, http: httpx.Client) -> None:
        """Measured on Ollama: prompt_eval_count 130 at num_ctx 256."""
        body = ask("word " * 360, stream=False, options={"num_ctx": 256, "num_predict": 1})
        assert http.post("/api/chat", json=body).json()["prompt_eval_count"] == 130

    def test_a_schema_is_satisfied(self, http: httpx.Client) -> None:
        schema = {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
            "required": ["name", "age"],
        }
        body = ask("Bob is 4 years old. Answer as JSON.", format=schema, stream=False, options={"num_predict": 60})
        answer = json.loads(http.post("/api/chat", json=body).json()["message"]["content"])

        assert set(answer) == {"name", "age"}
        assert isinstance(answer["age"], int)

    def test_json_mode_gives_an_object(self, http: httpx.Client) -> None:
        body = ask("Bob is 4. JSON with 'name'.", format="json", stream=False, options={"num_predict": 60})
        assert isinstance(json.loads(http.post("/api/chat", json=body).json()["message"]["content"]), dict)

    def test_log_probabilities(self, http: httpx.Client) -> None:
        answer = http.post("/api/chat", json=ask(stream=False, logprobs=True, top_logprobs=2)).json()

        assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] <= 0 for entry in answer["logprobs"])
        text = "".join(entry["token"] for entry in answer["logprobs"])
        assert text.startswith(answer["message"]["content"])

    def test_generate_continues_its_context(self, http: httpx.Client) -> None:
        body = {
            "model": CHAT,
            "prompt": "Hello there",
            "stream": False,
            "options": {"temperature": 0, "num_predict": 4},
        }
        first = http.post("/api/generate", json=body).json()
        second = http.post("/api/generate", json=body | {"context": first["context"]}).json()

        assert list(first)[:6] == ["model", "created_at", "response", "done", "done_reason", "context"]
        assert second["prompt_eval_count"] > first["prompt_eval_count"]

    def test_generate_raw_takes_the_prompt_as_it_is(self, http: httpx.Client) -> None:
        body = {"model": CHAT, "prompt": "Hello", "stream": False, "options": {"num_predict": 1}}
        counts = [
            http.post("/api/generate", json=body | more).json()["prompt_eval_count"] for more in ({}, {"raw": True})
        ]
        assert counts[0] > counts[1]
        assert http.post("/api/generate", json=body | {"raw": True, "system": "x"}).status_code == 400

    async def test_a_client_that_leaves_frees_its_slot(self, url: str) -> None:
        """More clients leave in mid-answer than there are slots; the next one is served at once."""
        async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as client:
            for _ in range(6):
                body = ask("Tell me a long story.", options={"num_predict": 2_000, "temperature": 0.8})
                async with client.stream("POST", "/api/chat", json=body) as response:
                    await anext(response.aiter_lines())
            answer = await asyncio.wait_for(client.post("/api/chat", json=ask(stream=False)), DEADLINE_S)
        assert answer.json()["done"]

    @pytest.mark.slow
    async def test_concurrent_requests_keep_apart(self, url: str) -> None:
        names = ["Zebulon", "Quentin", "Xanthe", "Wilhelmina", "Ottokar", "Ulrike"]
        async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as client:
            bodies = [ask(f"Repeat the name {name}.", stream=False) for name in names]
            answers = await asyncio.gather(*(client.post("/api/chat", json=body) for body in bodies))
        texts = [str(answer.json()["message"]["content"]) for answer in answers]
        for name, text in zip(names, texts, strict=True):
            assert not [other for other in names if other != name and other in text]
        # The small model does not always do what it is told.
        assert sum(name in text for name, text in zip(names, texts, strict=True)) >= 3


class TestModels:
    def test_load_and_unload(self, http: httpx.Client) -> None:
        def loaded() -> dict[str, dict[str, Any]]:
            return {model["name"]: model for model in http.get("/api/ps").json()["models"]}

        answer = http.post("/api/chat", json={"model": CHAT, "keep_alive": -1}).json()
        assert (answer["message"], answer["done_reason"]) == ({"role": "assistant", "content": ""}, "load")
        assert loaded()[CHAT]["expires_at"].startswith("2319")
        http.post("/api/chat", json={"model": CHAT})
        assert loaded()[CHAT]["expires_at"].startswith("2319")  # what was said last stays

        http.post("/api/generate", json={"model": CHAT, "options": {"num_ctx": 512}, "keep_alive": "1h30m"})
        assert loaded()[CHAT]["context_length"] == 512
        assert not loaded()[CHAT]["expires_at"].startswith("2319")

        answer = http.post("/api/generate", json={"model": CHAT, "keep_alive": 0}).json()
        assert (answer["response"], answer["done_reason"]) == ("", "unload")
        assert CHAT not in loaded()

    def test_names_are_found_as_ollama_finds_them(self, http: httpx.Client) -> None:
        for name in ("SmolLM2:135M", "library/smollm2:135m", "registry.ollama.ai/library/smollm2:135m"):
            assert http.post("/api/show", json={"model": name}).status_code == 200
        for name in ("smollm2", "all-minilm:22m", "other/smollm2:135m"):
            assert http.post("/api/show", json={"model": name}).status_code == 404
        assert http.post("/api/show", json={"name": EMBED}).json()["capabilities"] == ["embedding"]

    def test_vectors(self, http: httpx.Client) -> None:
        texts = ["reset my password", "how to reset a password", "penguins live in the south"]
        answer = http.post("/api/embed", json={"model": EMBED, "input": texts}).json()
        one, two, three = answer["embeddings"]

        assert [len(vector) for vector in (one, two, three)] == [384] * 3
        assert math.fsum(value * value for value in one) == pytest.approx(1, abs=1e-5)
        near, far = (math.fsum(a * b for a, b in zip(one, other, strict=True)) for other in (two, three))
        assert near > 0.6 > far
        cut = http.post("/api/embed", json={"model": EMBED, "input": texts[0], "dimensions": 64}).json()["embeddings"][
            0
        ]
        assert len(cut) == 64
        assert math.fsum(value * value for value in cut) == pytest.approx(1, abs=1e-5)
        long = http.post("/api/embed", json={"model": EMBED, "input": "word " * 600}).json()
        assert long["prompt_eval_count"] == 256
        legacy = http.post("/api/embeddings", json={"model": EMBED, "prompt": texts[0]}).json()
        assert legacy["embedding"] == pytest.approx(one, abs=1e-6)
        assert http.post("/api/embeddings", json={"model": EMBED}).text == '{"embedding":[]}'


class Person(BaseModel):
    """A person."""

    name: str
    age: int


class TestClients:
    def test_the_ollama_client(self, url: str) -> None:
        client = ollama.Client(url)
        messages = [{"role": "user", "content": "Say hello"}]
        options = {"temperature": 0, "num_predict": 8}

        whole = client.chat(CHAT, messages, options=options)
        stream = list(client.chat(CHAT, messages, options=options, stream=True))
        assert "".join(part.message.content or "" for part in stream) == whole.message.content
        assert stream[-1].eval_count == whole.eval_count
        assert client.generate(CHAT, "Say hello", options=options).response == whole.message.content
        assert len(client.embed(EMBED, ["a", "b"]).embeddings) == 2
        assert len(client.embeddings(EMBED, "a").embedding) == 384
        assert {CHAT, f"{EMBED}:latest"} <= {model.model for model in client.list().models}
        assert CHAT in {model.model for model in client.ps().models}
        assert client.show(CHAT).capabilities == ["completion"]
        with pytest.raises(ollama.ResponseError, match="model 'nope' not found") as caught:
            client.chat("nope", messages)
        assert caught.value.status_code == 404
        client._client.close()

    async def test_the_async_ollama_client(self, url: str) -> None:
        client = ollama.AsyncClient(url)
        messages = [{"role": "user", "content": "Say hello"}]
        options = {"temperature": 0, "num_predict": 8}

        whole = await client.chat(CHAT, messages, options=options)
        stream = [part async for part in await client.chat(CHAT, messages, options=options, stream=True)]
        assert "".join(part.message.content or "" for part in stream) == whole.message.content
        assert len((await client.embed(EMBED, "a")).embeddings[0]) == 384
        await client._client.aclose()

    def chat(self, url: str, **more: Any) -> ChatOllama:
        more = {"model": CHAT, "temperature": 0, "num_predict": 8} | more
        return ChatOllama(base_url=url, client_kwargs={"timeout": DEADLINE_S}, **more)

    def close(self, model: Any) -> None:
        model._client._client.close()

    def test_chat_ollama(self, url: str) -> None:
        model = self.chat(url, validate_model_on_init=True)
        messages = [SystemMessage("Be kind."), HumanMessage("Say hello")]

        answer = model.invoke(messages)
        assert answer.usage_metadata is not None
        assert answer.usage_metadata["input_tokens"] > 5
        assert answer.usage_metadata["output_tokens"] <= 8
        assert answer.response_metadata["model_name"] == CHAT

        full: Any = None
        for chunk in model.stream(messages):
            assert isinstance(chunk, AIMessageChunk)
            full = chunk if full is None else full + chunk
        assert full.content == answer.content
        assert full.usage_metadata == answer.usage_metadata
        self.close(model)

    async def test_chat_ollama_async(self, url: str) -> None:
        model = self.chat(url)
        chunks = [chunk async for chunk in model.astream("Say hello")]

        assert "".join(str(chunk.content) for chunk in chunks) == (await model.ainvoke("Say hello")).content
        await model._async_client._client.aclose()
        self.close(model)

    def test_chat_ollama_structured_output(self, url: str) -> None:
        model = self.chat(url, num_predict=60)
        found = model.with_structured_output(Person, method="json_schema").invoke(
            "Bob is 42 years old. Answer as JSON."
        )

        assert isinstance(found, Person)
        assert (found.name, found.age) == ("Bob", 42)
        self.close(model)

    def test_an_unknown_model_is_not_found(self, url: str) -> None:
        model = self.chat(url, model="nope")
        with pytest.raises(ValueError, match="not found in Ollama"):
            validate_model(model._client, "nope")  # what validate_model_on_init calls
        with pytest.raises(ollama.ResponseError, match="model 'nope' not found"):
            model.invoke("x")
        self.close(model)

    def test_tools_are_refused_by_a_model_without(self, url: str) -> None:
        model = self.chat(url)
        with pytest.raises(ollama.ResponseError, match="does not support tools"):
            model.bind_tools([Person]).invoke("Bob is 42")
        self.close(model)

    async def test_ollama_embeddings(self, url: str) -> None:
        model = OllamaEmbeddings(model=EMBED, base_url=url, validate_model_on_init=True)
        one, two = model.embed_documents(["hello", "world"])

        assert model.embed_query("hello") == pytest.approx(one, abs=1e-6)
        assert await model.aembed_query("world") == pytest.approx(two, abs=1e-6)
        model._client._client.close()
        await model._async_client._client.aclose()


def test_chat_ollama_calls_tools() -> None:
    """Only the scripted engine has a model with tools."""
    with ScriptedOllama("with-tools") as server:
        model = ChatOllama(model="with-tools", base_url=server.base_url)
        for answer in (
            model.bind_tools([Person]).invoke("Bob is 42 years old"),
            *model.bind_tools([Person]).stream("Bob is 42 years old"),
        ):
            if answer.tool_calls:
                assert answer.tool_calls[0]["args"] == {"name": "Bob", "age": 42}
        found = model.with_structured_output(Person, method="function_calling").invoke("Bob is 42 years old")
        assert found == Person(name="Bob", age=42)
        model._client._client.close()


class TestGo:
    """How Go writes and reads values."""

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0.0, "0"), (-0.0, "-0"), (1.0, "1"), (0.1, "0.1"), (-0.034432307, "-0.034432307"), (1e-7, "1e-7"),
         (0.000012345, "0.000012345"), (3.4e38, "3.4e+38"), (16777216.0, "16777216"), (1e-6, "0.000001")],
    )  # fmt: skip
    def test_float32(self, value: float, text: str) -> None:
        assert wire_json.float32(value) == text

    @given(st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3)))
    def test_vectors_are_written_as_their_numbers(self, vectors: list[list[float]]) -> None:
        expected = "[" + ",".join(f"[{','.join(map(wire_json.float32, vector))}]" for vector in vectors) + "]"
        assert wire_json.float32_lists(vectors).decode() == expected

    @given(st.floats(width=32, allow_nan=False, allow_infinity=False))
    def test_float32_reads_back_the_same(self, value: float) -> None:
        text = wire_json.float32(value)
        assert json.loads(text) == pytest.approx(value, rel=1e-7, abs=1e-45)
        import struct

        assert struct.pack("f", float(text)) == struct.pack("f", value)

    @pytest.mark.parametrize(
        ("nanoseconds", "text"),
        [(0, "1970-01-01T00:00:00Z"), (1_500_000_000, "1970-01-01T00:00:01.5Z"), (1, "1970-01-01T00:00:00.000000001Z")],
    )
    def test_timestamps(self, nanoseconds: int, text: str) -> None:
        assert wire_json.timestamp(nanoseconds) == text

    def test_json(self) -> None:
        assert (
            wire_json.encode({"a": "<&>\u2028\ud800é\n"}) == '{"a":"\\u003c\\u0026\\u003e\\u2028\ufffdé\\n"}'.encode()
        )

    @pytest.mark.parametrize(
        ("body", "message"),
        [(b"", "EOF"), (b"  ", "EOF"), (b'{"a":', "unexpected EOF"), (b'{"a":"b', "unexpected EOF"),
         (b"[tr", "unexpected EOF"), (b"x", "invalid character 'x' looking for beginning of value"),
         (b"NaN", "invalid character 'N' looking for beginning of value")],
    )  # fmt: skip
    def test_bad_json(self, body: bytes, message: str) -> None:
        with pytest.raises(wire_json.GoSyntaxError, match=f"^{message}$"):
            wire_json.decode(body)

    @pytest.mark.parametrize(
        ("value", "seconds"),
        [(0, 0), (1.5, 1.5), ("5m", 300), ("1h30m", 5400), ("1.5s", 1.5), ("0", 0), ("250ms", 0.25), ("+2s", 2)],
    )
    def test_durations(self, value: Any, seconds: float) -> None:
        assert duration_ns(value) == int(seconds * 1e9)

    def test_negative_durations_mean_for_ever(self) -> None:
        assert duration_ns(-1) == duration_ns("-1s") == duration_ns("-5m") == 2**63 - 1

    @pytest.mark.parametrize("value", ["", "x", "5", "5 m", "5q", "m", True, [1]])
    def test_bad_durations(self, value: Any) -> None:
        with pytest.raises(Refused):
            duration_ns(value)

    def test_names(self) -> None:
        assert full_name("X") == "x:latest"
        assert full_name("hf.co/a/b") == "hf.co/a/b:latest"
        assert valid_name("hf.co/some-one/some.model:q4_K_M")
        assert not any(map(valid_name, ("", " ", "a b", "a:", "/a", "a//b", "a:b:c", "é")))
