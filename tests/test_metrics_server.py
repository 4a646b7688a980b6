"""Prometheus sees chat calls and servers; a server that is dead or slow holds up no scrape."""

import asyncio
import re
import socket
import threading
import time

import httpx
import pytest
from conftest import wait_until

from langchain_aegis import AegisConfigError, ChatAegis
from langchain_aegis.telemetry import chats
from langchain_aegis.testing import ScriptedOllama

pytest.importorskip("prometheus_client", reason="the extra metrics is not installed")

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from langchain_aegis.metrics import asgi_app, register, register_all
from langchain_aegis.metrics_chat import register_chat
from langchain_aegis.metrics_server import register_server


def read(text):
    """All samples as Prometheus reads them: (name, labels without the server) -> value."""
    return {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k != "server")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(registry):
    return read(generate_latest(registry).decode())


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """No count of another test, and scrapes that wait for a server that a busy machine makes slow."""
    monkeypatch.setattr("langchain_aegis.metrics_server._PATIENCE_S", 10.0)
    chats.reset()
    yield
    chats.reset()


def test_a_chat_call_has_its_series(server):
    registry = CollectorRegistry()
    register_chat(registry)
    model = ChatAegis("m", base_url=server.base_url, cache=False)
    model.invoke("a question")
    list(model.stream("another question"))
    seen = scrape(registry)
    assert seen["aegis_chat_calls_total", "m:latest", "ok"] == 2
    assert seen["aegis_chat_finishes_total", "m:latest", "stop"] == 2
    assert seen["aegis_chat_tokens_total", "output", "m:latest"] == server.counters.generated_tokens + 2
    assert seen["aegis_chat_tokens_total", "input", "m:latest"] > 0
    assert seen["aegis_chat_generation_seconds_total", "m:latest"] > 0
    assert seen["aegis_chat_load_waits_total", "m:latest"] == 0
    assert seen["aegis_chat_first_token_seconds_count", "m:latest"] == 1
    assert seen["aegis_chat_seconds_count", "m:latest"] == 2
    assert seen["aegis_chat_seconds_bucket", "+Inf", "m:latest"] == 2
    assert scrape(registry) == seen, "a second scrape counts nothing"


def test_a_registry_shows_the_chat_calls_once():
    registry = CollectorRegistry()
    collector = register_chat(registry)
    with pytest.raises(AegisConfigError, match="already"):
        register_chat(registry)
    registry.unregister(collector)
    register_chat(registry)


def test_what_is_loaded_is_shown(server):
    ChatAegis("m", base_url=server.base_url, num_ctx=2048, cache=False, keep_alive=-1).invoke("a question")
    registry = CollectorRegistry()
    register_server(server.base_url, registry)
    seen = scrape(registry)
    assert seen["aegis_server_up",] == 1
    assert seen["aegis_server_models",] == 1
    assert seen["aegis_server_model_window_tokens", "m:latest"] == 2048
    assert seen["aegis_server_model_bytes", "m:latest"] >= seen["aegis_server_model_vram_bytes", "m:latest"] >= 0
    assert seen["aegis_server_model_expires_timestamp_seconds", "m:latest"] > time.time() + 1e8
    assert seen["aegis_server_model_loads_total", "m:latest"] == 1


def test_loads_and_evictions_are_what_changed_between_two_looks():
    with ScriptedOllama(["m", "n"], max_loaded=1) as server:
        models = {name: ChatAegis(name, base_url=server.base_url, cache=False, keep_alive=-1) for name in ("m", "n")}
        registry = CollectorRegistry()
        register_server(server.base_url, registry, every_s=0)
        for name, num_ctx in (("m", 1024), ("m", 1024), ("m", 2048), ("n", 1024), ("m", 2048)):
            models[name].invoke("a question", num_ctx=num_ctx)
            seen = scrape(registry)
    assert seen["aegis_server_model_loads_total", "m:latest"] == 3
    assert seen["aegis_server_model_loads_total", "n:latest"] == 1
    assert seen["aegis_server_model_evictions_total", "m:latest"] == 1
    assert seen["aegis_server_model_evictions_total", "n:latest"] == 1


def test_a_model_that_expired_was_not_evicted():
    with ScriptedOllama("m") as server:
        registry = CollectorRegistry()
        register_server(server.base_url, registry, every_s=0)
        ChatAegis("m", base_url=server.base_url, cache=False, keep_alive="1ms").invoke("a question")
        scrape(registry)
        server.advance(10)
        seen = scrape(registry)
    assert seen["aegis_server_models",] == 0
    assert seen.get(("aegis_server_model_evictions_total", "m:latest"), 0) == 0


def test_registering_asks_nobody(server):
    register_server(server.base_url, CollectorRegistry())
    assert server.routes["/api/ps"] == 0


def test_one_answer_is_good_for_several_scrapes(server):
    registry = CollectorRegistry()
    register_server(server.base_url, registry, every_s=3600)
    for _ in range(5):
        scrape(registry)
    assert server.routes["/api/ps"] == 1


def test_a_server_that_is_away_is_down_and_comes_back():
    with ScriptedOllama("m") as server:
        ChatAegis("m", base_url=server.base_url, cache=False).invoke("a question")
        registry = CollectorRegistry()
        register_server(server.base_url, registry, every_s=0)
        assert scrape(registry)["aegis_server_up",] == 1
        server.close()
        seen = scrape(registry)
        assert seen["aegis_server_up",] == 0
        assert ("aegis_server_models",) not in seen, "nobody knows what is loaded"
        server.start()
        seen = scrape(registry)
        assert seen["aegis_server_up",] == 1
        assert seen["aegis_server_model_loads_total", "m:latest"] == 1, "it was loaded all the time"


@pytest.fixture
def silent():
    """An address that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def looks():
    return [t for t in threading.enumerate() if t.name == "aegis-server-metrics"]


@pytest.mark.slow
def test_a_server_that_never_answers_is_asked_by_one_thread(silent, monkeypatch):
    monkeypatch.setattr("langchain_aegis.metrics_server._PATIENCE_S", 0.01)
    registry = CollectorRegistry()
    register_server(silent, registry, every_s=0)
    for _ in range(3):
        assert ("aegis_server_up",) not in scrape(registry)
    assert len(looks()) == 1
    wait_until(lambda: not looks(), what="the end of the look")
    assert scrape(registry)["aegis_server_up",] == 0


async def get(app, path="/"):
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test", follow_redirects=True
    ) as c:
        return await c.get(path)


@pytest.mark.slow
async def test_on_an_event_loop_no_scrape_waits_for_the_server(silent):
    app = asgi_app(servers=[silent], registry=CollectorRegistry())
    held = asyncio.get_running_loop().time()
    answer = await get(app)
    assert answer.status_code == 200
    assert looks(), "it is asked meanwhile"
    assert asyncio.get_running_loop().time() - held < 2  # the server's bound; a wait would have been cut there
    await asyncio.to_thread(wait_until, lambda: not looks())


async def test_one_line_shows_everything_in_a_web_application(server):
    from starlette.applications import Starlette
    from test_metrics import Cache

    cache, registry = Cache(), CollectorRegistry()
    app = Starlette()
    app.mount("/metrics", asgi_app(cache, servers=[server.base_url, "http://127.0.0.1:9"], registry=registry))
    await ChatAegis("m", base_url=server.base_url, cache=False).ainvoke("a question")
    await get(app, "/metrics")
    await asyncio.to_thread(wait_until, lambda: not looks())
    answer = await get(app, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    seen = read(answer.text)
    assert seen["aegis_chat_calls_total", "m:latest", "ok"] == 1
    assert seen["aegis_admission_calls_total", "served", "m:latest"] >= 1
    up = {
        s.labels["server"]: s.value
        for f in text_string_to_metric_families(answer.text)
        for s in f.samples
        if s.name == "aegis_server_up"
    }
    assert up == {server.base_url: 1, "http://127.0.0.1:9": 0}
    assert ("aegis_cache_lookups_total", "aegis", "miss") in seen


async def test_what_is_told_later_is_shown_too(server):
    from test_metrics import Cache

    registry = CollectorRegistry()
    register_all(Cache("one"), servers=[server.base_url], registry=registry)
    app = asgi_app(Cache("two"), servers=["http://127.0.0.1:9"], registry=registry)
    await get(app)
    await asyncio.to_thread(wait_until, lambda: not looks())
    text = (await get(app)).text
    assert set(re.findall(r'aegis_cache_stored_total\{namespace="(\w+)"\}', text)) == {"one", "two"}
    assert set(re.findall(r'aegis_server_up\{server="([^"]+)"\}', text)) == {server.base_url, "http://127.0.0.1:9"}


def test_what_was_registered_by_hand_stays():
    from test_metrics import Cache

    registry = CollectorRegistry()
    register(Cache("by_hand"), registry)
    register_all(Cache("other"), servers=[], registry=registry)
    assert {key[1] for key in scrape(registry) if key[0] == "aegis_cache_stored_total"} == {"by_hand"}


@pytest.mark.parametrize("servers", [["ftp://x"], ["http://"]])
def test_an_address_that_is_none_is_refused(servers):
    with pytest.raises(AegisConfigError):
        register_all(servers=servers, registry=CollectorRegistry())
