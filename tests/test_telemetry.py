"""Every chat call is counted once, with what it cost and how it ended; spans get numbers, never texts."""

import asyncio
import contextlib
import os
import sys

import pytest
from conftest import wait_until
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from langchain_aegis import AegisContextOverflowError, AegisError, AegisServerError, ChatAegis
from langchain_aegis.telemetry import BOUNDS_S, LOAD_WAIT_S, OTHERS, Chats, _Call, chats
from langchain_aegis.testing import ScriptedOllama

SECRET = "the-word-that-nobody-may-see"


@pytest.fixture(autouse=True)
def counts():
    chats.reset()
    yield chats
    chats.reset()


@pytest.fixture
def model(server):
    return ChatAegis("m", base_url=server.base_url, temperature=0, cache=False)


def only(counts):
    (row,) = counts.snapshot()
    return row


async def ask(model, way, prompt="How long may I keep a book?"):
    if way == "invoke":
        model.invoke(prompt)
    elif way == "ainvoke":
        await model.ainvoke(prompt)
    elif way == "stream":
        list(model.stream(prompt))
    else:
        async for _ in model.astream(prompt):
            pass


WAYS = pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream"])


@WAYS
async def test_a_call_is_counted_once_with_what_it_cost(model, server, counts, way):
    await ask(model, way)
    row = only(counts)
    assert (row.server, row.model) == (server.base_url, "m:latest")
    assert (row.outcomes, row.finishes) == ({"ok": 1}, {"stop": 1})
    assert row.input_tokens == server.counters.prefilled_tokens + server.counters.cached_tokens > 0
    assert row.output_tokens == server.counters.generated_tokens + 1  # and the one that ends the answer
    assert row.generation_s > 0
    assert row.total_s.count == 1
    assert row.first_token_s.count == (1 if "stream" in way else 0)
    assert 0 < row.first_token_s.total <= row.total_s.total or "stream" not in way


@WAYS
async def test_an_error_is_counted_by_its_class(model, server, counts, way):
    server.fail(500)
    with pytest.raises(AegisServerError):
        await ask(model, way)
    row = only(counts)
    assert (row.outcomes, row.finishes, row.total_s.count) == ({"AegisServerError": 1}, {}, 0)


@pytest.mark.parametrize("way", ["stream", "astream"])
async def test_an_answer_that_breaks_off_is_no_whole_one(model, server, counts, way):
    server.fail("cut", after=2)
    with pytest.raises(AegisError):
        await ask(model, way)
    row = only(counts)
    assert row.outcomes == {"AegisStreamError": 1}
    assert (row.first_token_s.count, row.total_s.count, row.output_tokens) == (1, 0, 0)


async def test_a_prompt_that_does_not_fit_is_seen(server, counts):
    model = ChatAegis("m", base_url=server.base_url, num_ctx=64, cache=False)
    with pytest.raises(AegisContextOverflowError):
        model.invoke("word " * 200)
    assert only(counts).outcomes == {"AegisContextOverflowError": 1}


async def test_who_leaves_early_is_counted_as_such(model, counts):
    stream = model.stream("a question")
    next(stream)
    stream.close()
    awaited = model.astream("a question")
    await anext(awaited)
    await awaited.aclose()
    # LangChain leaves the inner generators to the event loop.
    await asyncio.to_thread(wait_until, lambda: only(counts).outcomes == {"left": 2})


async def test_a_cancelled_call_is_counted_as_left(model, server, counts):
    with server.hold():
        task = asyncio.create_task(model.ainvoke("a question"))
        await server.await_until(lambda s: s.waiting == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert only(counts).outcomes == {"left": 1}


def test_an_answer_cut_at_the_end_is_counted(server, counts):
    ChatAegis("m", base_url=server.base_url, num_predict=3, cache=False).invoke("a question")
    assert only(counts).finishes == {"length": 1}


def test_waiting_for_a_load_is_seen(counts):
    with ScriptedOllama("m", load_s=LOAD_WAIT_S * 1.5) as server:
        for num_ctx in (1024, 1024, 2048):
            ChatAegis("m", base_url=server.base_url, num_ctx=num_ctx, cache=False).invoke("a question")
    row = only(counts)
    assert row.load_waits == 2
    assert row.load_s >= 2 * LOAD_WAIT_S


def test_models_are_told_apart_and_one_name_is_one_model(server, counts):
    for name in ("m", "m:latest", "scripted"):
        ChatAegis(name, base_url=server.base_url, cache=False).invoke("a question")
    assert {row.model: row.outcomes["ok"] for row in counts.snapshot()} == {"m:latest": 2, "scripted:latest": 1}


class Client:
    base_url = "http://127.0.0.1:1"


def test_made_up_names_do_not_fill_the_memory():
    counts = Chats()
    for number in range(1_000):
        counts.count(_Call(Client(), {"model": f"m{number}"}), "ok", None, 0.1, {})
    rows = counts.snapshot()
    assert len(rows) == 201
    assert sum(row.outcomes["ok"] for row in rows) == 1_000
    assert next(row for row in rows if row.model == OTHERS).outcomes == {"ok": 800}


def test_a_reason_that_nobody_knows_makes_no_label():
    counts = Chats()
    for number in range(10):
        counts.count(_Call(Client(), {"model": "m"}), "ok", None, 0.1, {"done_reason": f"made up {number}"})
    assert only(counts).finishes == {"other": 10}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_begins_at_zero(model, counts):
    model.invoke("a question")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, str(len(chats.snapshot())).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 8) == b"0"
    assert only(counts).outcomes == {"ok": 1}


def test_bounds_ascend():
    assert list(BOUNDS_S) == sorted(set(BOUNDS_S))


# -- OpenTelemetry --


@pytest.fixture
def spans():
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")

    @contextlib.contextmanager
    def span():
        with tracer.start_as_current_span("node"):
            yield
        seen.append(dict(exporter.get_finished_spans()[-1].attributes))

    seen = []
    yield span, seen
    provider.shutdown()


@WAYS
async def test_a_recording_span_gets_the_conventions_names(model, server, spans, way):
    span, seen = spans
    with span():
        await ask(model, way)
    (told,) = seen
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.provider.name"] == "ollama"
    assert (told["gen_ai.request.model"], told["gen_ai.response.model"]) == ("m", "m")
    assert told["gen_ai.request.temperature"] == 0
    assert told["gen_ai.usage.input_tokens"] == server.counters.prefilled_tokens + server.counters.cached_tokens
    assert told["gen_ai.usage.output_tokens"] == server.counters.generated_tokens + 1
    assert told["gen_ai.response.finish_reasons"] == ("stop",)
    assert (told["server.address"], told["server.port"]) == ("127.0.0.1", int(server.base_url.rpartition(":")[2]))


def test_a_span_around_several_calls_holds_their_sum(model, server, spans, counts):
    span, seen = spans
    with span():
        model.invoke("one question")
        model.invoke("another question")
    assert seen[0]["gen_ai.usage.output_tokens"] == only(counts).output_tokens


def test_a_failed_call_says_so(model, server, spans):
    span, seen = spans
    server.fail(500)
    with span(), pytest.raises(AegisServerError):
        model.invoke("a question")
    assert seen[0]["error.type"] == "AegisServerError"
    assert "gen_ai.usage.output_tokens" not in seen[0]


def test_no_text_and_no_login_reaches_a_span_or_a_count(server, spans, counts):
    span, seen = spans
    address = server.base_url.replace("http://", f"http://user:{SECRET}@")
    with span():
        ChatAegis("m", base_url=address, stop=[SECRET], cache=False).invoke(f"What is {SECRET}?")
    assert seen
    assert SECRET not in repr(seen) + repr(counts.snapshot())


def test_without_a_recording_span_nothing_is_described(model, monkeypatch):
    described = []
    monkeypatch.setattr("langchain_aegis.telemetry._describe", lambda *a, **k: described.append(a))
    model.invoke("a question")
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    model.invoke("a question")
    assert described == []


def test_a_tracing_library_that_fails_costs_no_answer(model, monkeypatch, counts):
    class Broken:
        def is_recording(self):
            return True

        def set_attributes(self, attributes):
            raise RuntimeError("the exporter is gone")

    monkeypatch.setattr(sys.modules["opentelemetry.trace"], "get_current_span", Broken)
    assert model.invoke("a question").text
    assert only(counts).outcomes == {"ok": 1}
