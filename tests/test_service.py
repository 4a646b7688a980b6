"""The example service: typed refusals, tenants from the request, streams, all workers' metrics, an orderly end."""

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import httpx
import pytest
from conftest import running_redis, wait_until
from prometheus_client.parser import text_string_to_metric_families

from langchain_aegis.testing import ScriptedOllama
from langchain_aegis.writes import the_writer

EXAMPLES = Path(__file__).parents[1] / "examples"
SERVICE = EXAMPLES / "service"
ANN = {"x-tenant": "acme", "x-user": "ann"}
SATURDAY = "When does the library open on Saturday?"


@pytest.fixture
def ollama():
    with ScriptedOllama(words=6) as server:
        yield server


@pytest.fixture
def told(ollama, redis_url, monkeypatch):
    """The environment of a worker."""
    values = {
        "OLLAMA_BASE_URL": ollama.base_url, "OLLAMA_MODEL_GENERATION": "scripted",
        "OLLAMA_MODEL_EMBEDDINGS": "scripted-embed", "REDIS_URL": redis_url,
        "AEGIS_NAMESPACE": f"s{uuid.uuid4().hex[:8]}", "AEGIS_OP_BUDGET_S": "10", "AEGIS_EMBED_BUDGET_S": "30",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return monkeypatch


@contextlib.asynccontextmanager
async def worker():
    """One worker of the service in this process, and a client of it."""
    from service.app import create_app

    app = create_app()
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service", headers=ANN) as client:
            yield client


async def ask(client, question=SATURDAY, **who):
    return await client.post("/ask", json={"question": question}, headers=who or None)


def events(answer):
    """Return (kind, data) of each event."""
    parts = [part.split("\n") for part in answer.text.strip().split("\n\n")]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in parts]


def end_of(answer):
    assert answer.status_code == 200, answer.text
    kind, data = events(answer)[-1]
    assert kind == "end"
    return data


async def stored():
    assert await asyncio.to_thread(the_writer.drain, timeout_s=10)


async def test_an_answer_streams_and_comes_from_the_cache_the_second_time(told, ollama):
    async with worker() as client:
        first = await ask(client)
        await stored()
        second = await ask(client)
    assert first.headers["content-type"].startswith("text/event-stream")
    tokens = ["".join(data for kind, data in events(answer) if kind == "token") for answer in (first, second)]
    assert tokens[0] == tokens[1] != ""
    assert len(events(first)) > 3  # in pieces
    assert (end_of(first)["cached"], end_of(second)["cached"]) == (None, "exact")
    assert "hours-saturday.md" in end_of(second)["sources"]
    assert len(ollama.chats) == 1


async def test_the_request_says_whose_answer_it_is(told, ollama):
    async with worker() as client:
        await ask(client)
        await stored()
        assert end_of(await ask(client, **{"x-tenant": "globex", "x-user": "ann"}))["cached"] is None
        assert end_of(await ask(client, **{"x-tenant": "acme", "x-user": "bob"}))["cached"] == "exact"
    assert len(ollama.chats) == 2


@pytest.mark.parametrize("who", [{"x-tenant": ""}, {"x-user": " "}, {"x-tenant": " ", "x-user": ""}])
async def test_who_says_not_who_he_is_gets_nothing(told, ollama, who):
    async with worker() as client:
        answer = await ask(client, **{**ANN, **who})
    assert (answer.status_code, answer.json()["error"]) == (401, "NotAuthenticatedError")
    assert ollama.chats == []


async def test_a_question_that_is_none_is_refused_without_repeating_it(told):
    async with worker() as client:
        for body in ({"question": ""}, {"question": "secret " * 100}, {"asked": "secret"}, {"question": 3}):
            answer = await client.post("/ask", json=body)
            assert (answer.status_code, answer.json()["error"]) == (422, "RequestValidationError")
            assert "secret" not in answer.text


async def test_what_is_too_much_is_a_typed_503_with_the_time_to_come_back(told, ollama):
    told.setenv("AEGIS_MAX_CONCURRENCY", "1")
    told.setenv("AEGIS_MAX_WAITING", "0")
    async with worker() as client:
        await ask(client)
        await stored()
        ollama.fail("hang", path="/api/chat")
        busy = asyncio.ensure_future(ask(client, "When does the library open on Sunday?"))
        await asyncio.to_thread(wait_until, lambda: len(ollama.chats) == 2)
        refused = await ask(client, "Where are the printers?")
        assert refused.status_code == 503
        assert refused.json()["error"] == "AegisOverloadedError"
        assert int(refused.headers["retry-after"]) == refused.json()["retry_after_s"] >= 1
        assert end_of(await ask(client))["cached"] == "exact"  # what is known is answered however busy it is
        busy.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await busy
        ollama.heal()
        # Whoever leaves gives his slot back.
        assert end_of(await ask(client, "Where are the printers?"))["cached"] is None


async def test_without_a_model_server_it_is_alive_and_not_ready_and_serves_what_it_knows(told, ollama):
    told.setattr("service.app.LOOKED_S", 0.0)
    async with worker() as client:
        await ask(client)
        await stored()
        assert (await client.get("/readyz")).status_code == 200
        ollama.close()
        assert (await client.get("/healthz")).json()["worker"] == os.getpid()
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["ready"]) == (503, False)
        assert int(ready.headers["retry-after"]) >= 1
        assert end_of(await ask(client))["cached"] == "exact"
        down = await ask(client, "Where are the printers?")
        assert (down.status_code, down.json()["error"]) == (503, "AegisConnectionError")
        assert int(down.headers["retry-after"]) >= 1


async def test_what_breaks_in_the_middle_is_an_event(told, ollama):
    async with worker() as client:
        ollama.fail("cut", after=2, path="/api/chat")
        kinds = [kind for kind, _ in events(await ask(client))]
    assert kinds[-1] == "error"
    assert "end" not in kinds


async def test_without_redis_it_answers(told, ollama):
    with running_redis("valkey+search") as redis:
        told.setenv("REDIS_URL", redis.url)
        async with worker() as client:
            await ask(client)
            os.kill(redis.pid, signal.SIGKILL)
            assert end_of(await ask(client))["cached"] is None
            ready = await client.get("/readyz")
            assert (ready.status_code, ready.json()["cache"]) == (200, False)


async def test_one_page_has_the_metrics_of_all_workers(told, tmp_path, home):
    told.setenv("SERVICE_RUN_DIR", str(home))

    async def another(reader, writer):
        writer.write(b'# TYPE aegis_cache_lookups_total counter\naegis_cache_lookups_total{tier="exact"} 7.0\n')
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(another, home / "77.sock"), worker() as client:
        dead = await asyncio.start_unix_server(another, home / "78.sock")
        dead.close()  # a worker that was killed leaves its socket
        await ask(client)
        page = (await client.get("/metrics")).text
    found = {
        (sample.labels["worker"], sample.labels.get("tier"))
        for metric in text_string_to_metric_families(page) if metric.name == "aegis_cache_lookups"
        for sample in metric.samples
    }  # fmt: skip
    assert {("77", "exact"), (str(os.getpid()), "miss")} <= found
    assert not (home / "78.sock").exists()


@pytest.fixture
def load():
    spec = importlib.util.spec_from_file_location("service_load", SERVICE / "load.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["service_load"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["service_load"]


@pytest.mark.parametrize(
    ("status", "headers", "body", "ending"),
    [
        (503, {"retry-after": "2"}, b'{"error": "AegisOverloadedError"}', "refused"),
        (503, {}, b'{"error": "AegisOverloadedError"}', "status 503, not typed"),
        (503, {"retry-after": "0"}, b'{"error": "x"}', "status 503, not typed"),
        (503, {"retry-after": "2"}, b"", "status 503, not typed"),
        (500, {"retry-after": "2"}, b'{"error": "x"}', "status 500"),
    ],
)
def test_the_load_counts_only_a_typed_503_as_a_refusal(load, status, headers, body, ending):
    assert load._refusal(status, headers, body) == ending


def test_the_load_sees_an_answer_that_was_made_for_another_question(load):
    run = load.Load(load.Service("http://127.0.0.1:1"), 1, 1, 1)
    run._made = {("acme", "a"): {"ten"}, ("acme", "b"): {"twelve", "ten"}, ("globex", "c"): {"nine"}}
    assert run._is_anothers("acme", "a", "twelve")
    assert not run._is_anothers("acme", "a", "ten")
    assert not run._is_anothers("acme", "b", "ten")
    assert not run._is_anothers("acme", "a", "nine")  # nobody of this tenant has got it
    report = load.Report()
    report.ended.update(exact=3, refused=1)
    assert not report.is_good  # nothing came from the cache
    report.cached_at.append(1.0)
    assert report.is_good
    report.redis_back_at = 2.0
    assert not report.is_good  # nothing did since Redis was away
    report.cached_at.append(2.5)
    assert report.is_good
    assert report.as_dict(9.0)["hits_after_redis_was_back_s"] == 0.5
    assert report.as_dict(9.0)["longest_without_a_cached_answer_s"] == 6.5
    for bad in ("lost", "status 500", "no answer in time", "error event AegisServerError"):
        report.ended[bad] += 1
        assert not report.is_good
        del report.ended[bad]
    report.wrong = 1
    assert not report.is_good


@pytest.mark.slow
def test_clients_get_an_answer_or_a_typed_503_while_a_worker_and_redis_are_killed(tmp_path):
    """The whole, smaller: `make service-load` has 200 clients for a minute, on the real model."""
    out = tmp_path / "figures.json"
    with ScriptedOllama(words=20, tokens_per_s=60, slots=4) as ollama:
        environment = os.environ | {
            "OLLAMA_BASE_URL": ollama.base_url, "OLLAMA_MODEL_GENERATION": "scripted",
            "OLLAMA_MODEL_EMBEDDINGS": "scripted-embed",
        }  # fmt: skip
        told = ["--start", "--workers", "3", "--clients", "40", "--seconds", "12", "--pause-s", "1", "--kill-worker"]
        done = subprocess.run(
            [sys.executable, SERVICE / "load.py", *told, "--restart-redis", "--json", out],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())
    assert figures["good"] is True
    assert set(figures["ended"]) <= {"exact", "semantic", "model", "shared", "refused"}
    assert figures["cached_ms"]["p95"] > 0
    assert [said.partition(": ")[2].split()[0] for said in figures["said"]] == ["worker", "Redis", "Redis"]
    assert figures["hits_after_redis_was_back_s"] < 10
    assert "Traceback" not in done.stderr


@pytest.mark.slow
async def test_at_its_end_the_service_finishes_what_is_under_way(home, load, tmp_path):
    """SIGTERM: nobody comes in any more, an answer that has begun ends, and no process and no Redis is left."""
    with ScriptedOllama(words=60, tokens_per_s=30) as ollama:
        environment = os.environ | {
            "OLLAMA_BASE_URL": ollama.base_url, "OLLAMA_MODEL_GENERATION": "scripted",
            "OLLAMA_MODEL_EMBEDDINGS": "scripted-embed",
        }  # fmt: skip
        port = load.free_port()
        command = [sys.executable, str(SERVICE / "run.py"), "--port", str(port), "--workers", "2"]
        with subprocess.Popen(  # noqa: ASYNC220 - starting it is quick
            command, env=environment, stderr=subprocess.PIPE, text=True
        ) as process:
            service = load.Service(f"http://127.0.0.1:{port}")
            await load.until_ready(service)
            answer = asyncio.ensure_future(service.ask(SATURDAY, "acme", "ann"))
            await asyncio.to_thread(ollama.wait_until, lambda server: server.running == 1)
            process.send_signal(signal.SIGTERM)
            ending, text, _ = await answer
            assert await asyncio.to_thread(process.wait, 60) == 0
            errors = process.stderr.read()
    assert (ending, len(text.split()) > 20) == ("model", True)
    assert "Traceback" not in errors, errors
    with pytest.raises(OSError):
        await service.get("/healthz")
