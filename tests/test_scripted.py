"""The scripted Ollama: what it answers, how it queues, fails and counts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from langchain_aegis.errors import AegisConfigError, AegisTimeoutError
from langchain_aegis.testing import Fault, ScriptedModel, ScriptedOllama, Seen

DEADLINE_S = 20
NO_TLS = False  # loading the CA bundle costs 40 ms for each call over plain http


@pytest.fixture(scope="module")
def shared() -> Iterator[ScriptedOllama]:
    models = [
        ScriptedModel(name="thinker", thinking=True),
        ScriptedModel(name="tool-less", tools=False),
        ScriptedModel(name="small", context_length=128),
    ]
    with ScriptedOllama(models) as server:
        yield server


@pytest.fixture
def server(shared: ScriptedOllama) -> ScriptedOllama:
    shared.heal()
    shared.forget()
    return shared


def chat(server: ScriptedOllama, text: str = "hello", **body: Any) -> httpx.Response:
    messages = body.pop("messages", [{"role": "user", "content": text}])
    body = {"model": "scripted", "messages": messages, "stream": False, "options": {"temperature": 0}} | body
    return httpx.post(f"{server.base_url}/api/chat", json=body, timeout=DEADLINE_S, verify=NO_TLS)


def said(server: ScriptedOllama, text: str = "hello", **body: Any) -> str:
    return chat(server, text, **body).json()["message"]["content"]


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.text.splitlines()]


TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "required": ["city", "days"],
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 10},
                    "unit": {"enum": ["celsius", "fahrenheit"]},
                },
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "send_mail",
            "description": "Send an e-mail to somebody",
            "parameters": {"type": "object", "required": ["to"], "properties": {"to": {"type": "string"}}},
        },
    },
]


class TestText:
    def test_names_the_words_of_the_question(self, server: ScriptedOllama) -> None:
        """A test can tell from an answer which prompt was answered."""
        assert "capital France" in said(server, "What is the capital of France?")

    def test_is_the_same_at_temperature_zero_or_with_a_seed(self, server: ScriptedOllama) -> None:
        assert said(server, "tell me more") == said(server, "tell me more")
        seeded = {"options": {"temperature": 1.0, "seed": 7}}
        assert said(server, "tell me more", **seeded) == said(server, "tell me more", **seeded)

    def test_varies_when_it_is_sampled(self, server: ScriptedOllama) -> None:
        assert said(server, "tell me", options={}) != said(server, "tell me", options={})

    @pytest.mark.parametrize(
        "other",
        [
            {"model": "thinker", "think": False},
            {"options": {"temperature": 0, "top_k": 5}},
            {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "tell me"}]},
        ],
    )
    def test_depends_on_model_options_and_every_message(self, server: ScriptedOllama, other: dict[str, Any]) -> None:
        assert said(server, "tell me") != said(server, "tell me", **other)

    def test_the_stream_joins_to_the_whole_answer(self, server: ScriptedOllama) -> None:
        stream = lines(chat(server, "one two three", stream=True))

        assert len(stream) > 5
        assert "".join(line["message"]["content"] for line in stream) == said(server, "one two three")
        assert stream[-1]["eval_count"] == len(stream)  # the end token counts
        assert [line["done"] for line in stream] == [False] * (len(stream) - 1) + [True]

    def test_stops_before_a_stop_sequence(self, server: ScriptedOllama) -> None:
        whole = said(server, "hello")
        stop = whole.split()[4]
        answer = chat(server, "hello", options={"temperature": 0, "stop": ["never said", stop]}).json()

        assert answer["message"]["content"] == whole[: whole.index(stop)]
        assert answer["done_reason"] == "stop"

    def test_num_predict_ends_it_as_length(self, server: ScriptedOllama) -> None:
        answer = chat(server, "hello", options={"temperature": 0, "num_predict": 3}).json()

        assert (answer["eval_count"], answer["done_reason"]) == (3, "length")
        assert said(server, "hello").startswith(answer["message"]["content"])

    def test_thinks_unless_told_not_to(self, server: ScriptedOllama) -> None:
        told = chat(server, "hello", model="thinker", think=True).json()["message"]
        by_itself = chat(server, "hello", model="thinker").json()["message"]
        silent = chat(server, "hello", model="thinker", think=False).json()["message"]

        assert told["thinking"].startswith("Let me think. About hello")
        assert by_itself == told
        assert "thinking" not in silent

    def test_gives_log_probabilities_when_asked(self, server: ScriptedOllama) -> None:
        answer = chat(server, "hello", logprobs=True, top_logprobs=2).json()

        assert "".join(entry["token"] for entry in answer["logprobs"]) == answer["message"]["content"]
        assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] < 0 for entry in answer["logprobs"])


class TestWindow:
    LONG = " ".join(f"word{number}" for number in range(400))

    def test_a_prompt_that_does_not_fit_is_cut_to_half(self, server: ScriptedOllama) -> None:
        """Measured on Ollama: 369 tokens, num_ctx 256 -> prompt_eval_count 130."""
        answer = chat(server, self.LONG, options={"num_ctx": 256}).json()

        assert answer["prompt_eval_count"] == 130

    def test_the_oldest_messages_go_first_and_system_messages_stay(self, server: ScriptedOllama) -> None:
        messages = [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": self.LONG},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "and now?"},
        ]
        short = [messages[0], *messages[2:]]

        cut = chat(server, messages=messages, options={"num_ctx": 256, "temperature": 0}).json()
        assert cut["prompt_eval_count"] == chat(server, messages=short).json()["prompt_eval_count"]

    def test_truncate_false_refuses_with_the_exact_counts(self, server: ScriptedOllama) -> None:
        answer = chat(server, self.LONG, options={"num_ctx": 256}, truncate=False)

        error = json.loads(answer.json()["error"])["error"]
        assert answer.status_code == 400
        assert error["type"] == "exceed_context_size_error"
        assert error["n_prompt_tokens"] > error["n_ctx"] == 256

    def test_truncate_false_streamed_is_a_status_not_a_line(self, server: ScriptedOllama) -> None:
        assert chat(server, self.LONG, options={"num_ctx": 256}, truncate=False, stream=True).status_code == 400

    def test_no_shift_refuses(self, server: ScriptedOllama) -> None:
        answer = chat(server, self.LONG, options={"num_ctx": 256}, shift=False)

        assert answer.status_code == 400
        assert answer.json()["error"].startswith("the prompt is longer than the context length currently available")

    def test_no_shift_ends_an_answer_at_the_window(self, server: ScriptedOllama) -> None:
        answer = chat(server, "hello", options={"num_ctx": 20, "temperature": 0}, shift=False).json()

        assert answer["done_reason"] == "length"
        assert answer["prompt_eval_count"] + answer["eval_count"] == 20

    def test_the_model_bounds_the_window(self, server: ScriptedOllama) -> None:
        chat(server, model="small", options={"num_ctx": 99_999})
        models = httpx.get(f"{server.base_url}/api/ps").json()["models"]

        assert {model["name"]: model["context_length"] for model in models}["small:latest"] == 128


class TestTools:
    def test_calls_the_tool_that_fits_with_the_prompts_words(self, server: ScriptedOllama) -> None:
        asked = "What is the weather in San Francisco for 3 days in celsius?"
        message = chat(server, asked, tools=TOOLS).json()["message"]

        (call,) = message["tool_calls"]
        assert call["id"].startswith("call_")
        assert call["function"] == {
            "index": 0,
            "name": "get_weather",
            "arguments": {"city": "San Francisco", "days": 3},
        }
        assert message["content"] == ""

    def test_calls_a_tool_by_its_name(self, server: ScriptedOllama) -> None:
        (call,) = chat(server, "Use send_mail for 'Ada' about the weather", tools=TOOLS).json()["message"]["tool_calls"]
        assert call["function"]["arguments"] == {"to": "Ada"}

    def test_answers_with_the_tools_result(self, server: ScriptedOllama) -> None:
        messages = [
            {"role": "user", "content": "weather in Oslo?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "get_weather", "arguments": {}}}],
            },
            {"role": "tool", "tool_name": "get_weather", "content": "<3 degrees & rain>"},
        ]
        message = chat(server, messages=messages, tools=TOOLS).json()["message"]

        assert "<3 degrees & rain>" in message["content"]
        assert "tool_calls" not in message

    def test_a_streamed_call_comes_whole_before_the_last_line(self, server: ScriptedOllama) -> None:
        stream = lines(chat(server, "weather in Oslo", tools=TOOLS, stream=True))

        assert len(stream) == 2
        assert stream[0]["message"]["tool_calls"][0]["function"]["arguments"]["city"] == "Oslo"
        assert stream[1]["done_reason"] == "stop"

    def test_a_model_without_tools_refuses(self, server: ScriptedOllama) -> None:
        answer = chat(server, model="tool-less", tools=TOOLS)

        assert answer.status_code == 400
        assert answer.json()["error"] == "registry.ollama.ai/library/tool-less:latest does not support tools"


class TestJson:
    def test_takes_values_from_the_prompt(self, server: ScriptedOllama) -> None:
        schema = {
            "type": "object",
            "required": ["name", "age"],
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        }
        assert json.loads(said(server, "Bob is 42 years old", format=schema)) == {"name": "Bob", "age": 42}

    def test_json_mode_uses_the_keys_that_the_prompt_names(self, server: ScriptedOllama) -> None:
        asked = "A joke as JSON with 'setup' and 'punchline' keys."
        assert set(json.loads(said(server, asked, format="json"))) == {"setup", "punchline"}
        assert isinstance(json.loads(said(server, "anything", format="json")), dict)


class TestVectors:
    def embed(self, server: ScriptedOllama, texts: list[str], **body: Any) -> list[list[float]]:
        body = {"model": "scripted-embed", "input": texts} | body
        return httpx.post(f"{server.base_url}/api/embed", json=body, verify=NO_TLS).json()["embeddings"]

    def test_texts_that_share_words_are_near(self, server: ScriptedOllama) -> None:
        texts = ["reset my password", "How do I reset the password?", "penguin jokes"]
        first, near, far = self.embed(server, texts)

        def cosine(left: list[float], right: list[float]) -> float:
            return sum(a * b for a, b in zip(left, right, strict=True))

        assert cosine(first, first) == pytest.approx(1, abs=1e-5)
        assert cosine(first, near) > 0.8
        assert abs(cosine(first, far)) < 0.3

    def test_dimensions_cut_and_normalise(self, server: ScriptedOllama) -> None:
        (vector,) = self.embed(server, ["hello world"], dimensions=16)
        assert len(vector) == 16
        assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-5)
        assert len(self.embed(server, ["hello"], dimensions=4000)[0]) == 384  # more than there are: ignored


class TestSlots:
    def ask(self, server: ScriptedOllama, text: str, answered: dict[str, str], **body: Any) -> threading.Thread:
        def run() -> None:
            with contextlib.suppress(httpx.HTTPError):
                head, _, fraction = chat(server, text, **body).json()["created_at"].rstrip("Z").partition(".")
                answered[text] = f"{head}.{fraction:0<9}"

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def test_at_most_the_slots_run_and_the_rest_wait_in_order(self) -> None:
        answered: dict[str, str] = {}
        with ScriptedOllama(slots=1) as server:
            threads = []
            with server.hold():
                for number in range(4):
                    threads.append(self.ask(server, f"question {number}", answered))
                    server.wait_until(lambda s, n=number: s.waiting == n + 1)
            for thread in threads:
                thread.join(DEADLINE_S)
        assert sorted(answered, key=answered.__getitem__) == [f"question {number}" for number in range(4)]
        assert server.counters.max_running == 1

    def test_several_slots_run_at_once(self) -> None:
        with ScriptedOllama(slots=3) as server:
            server.fail("hang", after=1, times=None)
            threads = [self.ask(server, str(number), {}, stream=True) for number in range(5)]
            server.wait_until(lambda s: s.running == 3 and s.waiting == 2)
        for thread in threads:
            thread.join(DEADLINE_S)
        assert server.counters.max_running == 3

    def test_more_waiting_than_allowed_are_refused(self) -> None:
        with ScriptedOllama(slots=1, max_waiting=1) as server, server.hold():
            thread = self.ask(server, "waits", {})
            server.wait_until(lambda s: s.waiting == 1)
            refused = chat(server, "too many")
            server.release()
            thread.join(DEADLINE_S)
        assert refused.status_code == 503
        assert refused.json() == {"error": "server busy, please try again.  maximum pending requests exceeded"}

    async def test_a_waiting_client_that_leaves_takes_no_slot(self) -> None:
        async with ScriptedOllama(slots=1) as server, httpx.AsyncClient(base_url=server.base_url) as client:
            body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "stream": False}
            with server.hold():
                tasks = [asyncio.create_task(client.post("/api/chat", json=body)) for _ in range(3)]
                await server.await_until(lambda s: s.waiting == 3)
                tasks[0].cancel()
                await server.await_until(lambda s: s.disconnects == 1 and s.waiting == 2)
            answers = await asyncio.wait_for(asyncio.gather(*tasks[1:]), DEADLINE_S)
            assert [answer.status_code for answer in answers] == [200, 200]
            await server.await_until(lambda s: s.running == 0)

    async def test_a_reader_that_leaves_stops_the_generation(self) -> None:
        """The slot is free again, the rest is never generated, and the server has counted it."""
        async with ScriptedOllama(slots=1, words=2_000, tokens_per_s=200) as server:
            body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}
            async with (
                httpx.AsyncClient(base_url=server.base_url) as client,
                client.stream("POST", "/api/chat", json=body) as answer,
            ):
                await anext(answer.aiter_lines())
            await server.await_until(lambda s: s.disconnects == 1 and s.running == 0)
            assert server.counters.generated_tokens < 1_000

    def test_a_known_prefix_is_not_prefilled_again(self, server: ScriptedOllama) -> None:
        system = {"role": "system", "content": TestWindow.LONG}
        for question in ("first", "second"):
            before = server.counters.prefilled_tokens
            chat(server, messages=[system, {"role": "user", "content": question}])
        assert server.counters.prefilled_tokens - before < 20

    def test_other_runner_options_load_the_model_again(self, server: ScriptedOllama) -> None:
        for options, loads in (({"num_ctx": 777}, 1), ({"num_ctx": 777, "top_k": 3}, 1), ({"num_ctx": 778}, 2)):
            chat(server, model="tool-less", options=options)
            assert server.counters.loads == loads
        chat(server, model="tool-less", options={"num_ctx": 778}, shift=False)
        assert server.counters.loads == 3


class TestFaults:
    def test_a_status(self, server: ScriptedOllama) -> None:
        server.fail(429, headers={"Retry-After": "2"})
        refused = chat(server)

        assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        assert chat(server).status_code == 200

    def test_a_cut_connection(self, server: ScriptedOllama) -> None:
        for stream in (True, False):
            server.fail("cut", after=2)
            with pytest.raises(httpx.RemoteProtocolError):
                chat(server, stream=stream)
        server.wait_until(lambda s: s.running == 0)
        assert server.disconnects == 0  # it was the server who left

    def test_a_clean_end_without_done(self, server: ScriptedOllama) -> None:
        server.fail("no_done", times=2)

        assert not any(line["done"] for line in lines(chat(server, stream=True)))
        assert chat(server).json()["done"] is False

    def test_an_error_line_after_200(self, server: ScriptedOllama) -> None:
        server.fail("error", after=2, times=2)
        stream = chat(server, stream=True)

        assert stream.status_code == 200
        assert (
            lines(stream)[2]
            == {"error": "an error was encountered while running the model: unexpected EOF"}
            == lines(stream)[-1]
        )
        assert chat(server).status_code == 500

    def test_a_malformed_line(self, server: ScriptedOllama) -> None:
        server.fail("malformed", after=1)
        texts = chat(server, stream=True).text.splitlines()

        with pytest.raises(json.JSONDecodeError):
            json.loads(texts[1])
        assert json.loads(texts[-1])["done"]

    def test_a_hanging_answer_frees_its_slot_when_the_client_gives_up(self, server: ScriptedOllama) -> None:
        server.fail("hang", after=1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.base_url}/api/chat",
                json={"model": "scripted", "messages": [{"role": "user", "content": "hi"}]},
                timeout=0.2,
            )
        server.wait_until(lambda s: s.disconnects == 1 and s.running == 0)

    def test_chosen_by_number_route_or_request(self, server: ScriptedOllama) -> None:
        server.fail(Fault(kind="status", status=500), times=None, when=lambda seen: "bad" in seen.text)
        server.fail(502, path="/api/tags")

        assert [chat(server, text).status_code for text in ("good", "bad one", "good", "bad two")] == [200, 500] * 2
        assert [httpx.get(f"{server.base_url}/api/tags", verify=NO_TLS).status_code for _ in range(2)] == [502, 200]
        server.heal()
        assert chat(server, "bad").status_code == 200

    def test_an_unknown_kind_is_refused(self) -> None:
        with pytest.raises(ValueError, match="kind must be one of"):
            Fault(kind="explode")  # type: ignore[arg-type]

    async def test_embedding_routes_fail_too(self, server: ScriptedOllama) -> None:
        body = {"model": "scripted-embed", "input": "x"}
        async with httpx.AsyncClient(base_url=server.base_url) as client:
            server.fail("malformed")
            with pytest.raises(json.JSONDecodeError):
                (await client.post("/api/embed", json=body)).json()
            server.fail("no_done")
            assert "embeddings" not in (await client.post("/api/embed", json=body)).json()


class TestServer:
    def test_sees_every_request(self, server: ScriptedOllama) -> None:
        chat(server, "first")
        httpx.get(f"{server.base_url}/api/version", headers={"X-Mine": "1"})
        httpx.post(f"{server.base_url}/api/chat", content=b"{")

        first, version, broken = server.requests
        assert first.body is not None
        assert (first.text, first.body["model"]) == ("first", "scripted")
        assert (version.path, version.headers["x-mine"], broken.body) == ("/api/version", "1", None)
        assert server.routes == {"/api/chat": 2, "/api/version": 1}
        assert [body["model"] for body in server.chats[:1]] == ["scripted"]

    def test_starts_again_on_the_same_port(self) -> None:
        server = ScriptedOllama()
        with pytest.raises(AegisConfigError):
            _ = server.base_url
        with server:
            address = server.base_url
            assert server.start() is server
        with pytest.raises(httpx.ConnectError):
            chat(server)
        with server:
            assert server.base_url == address
            assert chat(server).status_code == 200
        server.close()

    def test_close_ends_what_runs(self) -> None:
        """Closing takes no longer because a request hangs or a connection idles."""
        with ScriptedOllama() as server:
            port = int(server.base_url.rpartition(":")[2])
            idle = socket.create_connection(("127.0.0.1", port))
            server.fail("hang", after=1)
            failed: list[Exception] = []

            def ask() -> None:
                try:
                    chat(server)
                except httpx.HTTPError as exc:
                    failed.append(exc)

            thread = threading.Thread(target=ask)
            thread.start()
            server.wait_until(lambda s: len(s.requests) == 1)
        thread.join(DEADLINE_S)
        idle.close()
        assert len(failed) == 1

    def test_wait_until_gives_up(self, server: ScriptedOllama) -> None:
        with pytest.raises(AegisTimeoutError, match="0 running"):
            server.wait_until(lambda s: s.running == 9, timeout_s=0.01)

    def test_a_web_page_cannot_reach_it_by_another_name(self, server: ScriptedOllama) -> None:
        assert httpx.get(server.base_url, headers={"Host": "evil.example"}).status_code == 403


def test_seen_text_of_every_route() -> None:
    def text(body: dict[str, Any] | None) -> str:
        return Seen(method="POST", path="/", headers={}, body=body).text

    assert text({"messages": [{"role": "user", "content": "a"}]}) == "a"
    assert text({"prompt": "b"}) == "b"
    assert text({"input": ["c", "d"]}) == "c\nd"
    assert text(None) == ""
