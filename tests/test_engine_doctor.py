"""The doctor on vLLM: what it says of a server on OpenAI's wire, and of two engines on one GPU."""

import socket
import threading
from dataclasses import replace

import pytest
from langchain_openai import ChatOpenAI
from openai_server import MODEL, OpenAIServer
from typer.testing import CliRunner

from langchain_aegis.cli import app
from langchain_aegis.ollama.compose import check_compose
from langchain_aegis.ollama.doctor import check_servers
from langchain_aegis.ollama.engine_checks import (
    check_engine,
    judge_engine_bounds,
    judge_engine_load,
    judge_engine_window,
    judge_prefix_cache,
    judge_shared_gpu,
)
from langchain_aegis.ollama.server_checks import Told
from langchain_aegis.openai_servers import Load, Served, ServedModel
from langchain_aegis.settings import AegisSettings
from langchain_aegis.testing import ScriptedOllama

WHERE = "http://127.0.0.1:8000"
CALM = Load(running=3, waiting=0, preempted=0, kv_tokens=1_000_000, prefix_caching=True, memory_share=0.9)
VLLM = Served(root=WHERE, engine="vllm", version="0.33.0", models=(ServedModel(name=MODEL, window=8192),), load=CALM)


def found(findings):
    return [(f.code, f.severity) for f in findings]


def loaded(**changes):
    return replace(VLLM, load=replace(CALM, **changes))


def test_a_server_that_suits_its_callers_has_nothing_against_it():
    with OpenAIServer() as server:
        settings = AegisSettings(vllm_base_url=server.base_url, vllm_max_num_seqs=8)
        findings = list(check_engine(settings, Told(window=8192), []))
    assert found(findings) == [
        ("engine", "ok"), ("engine-window", "ok"), ("engine-bounds", "ok"), ("engine-load", "ok"),
        ("engine-prefix-cache", "ok"),
    ]  # fmt: skip
    assert "vLLM 0.33.0 answers with llama-3.1-8b (meta-llama/Llama-3.1-8B)" in findings[0].what
    assert "60% of all prompts' tokens" in findings[-1].what


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://127.0.0.1:1/v1"])
def test_a_server_that_is_off_is_one_error(address):
    (finding,) = check_engine(AegisSettings(vllm_base_url=address), Told(), [])
    assert (finding.code, finding.severity) == ("engine", "error")


def test_a_key_that_is_missing_is_said():
    with OpenAIServer(api_key="token") as server:
        (finding,) = check_engine(AegisSettings(vllm_base_url=server.root), Told(), [])
        assert "VLLM_API_KEY" in finding.fix
        assert (
            found(check_engine(AegisSettings(vllm_base_url=server.root, vllm_api_key="token"), Told(), []))[0][1]
            == "ok"
        )


def test_a_gateway_without_metrics_is_said_to_be_one():
    with OpenAIServer(tells=()) as server:
        codes = found(check_engine(AegisSettings(vllm_base_url=server.root, vllm_max_num_seqs=8), Told(), []))
    assert codes == [("engine", "ok"), ("engine", "info"), ("engine-window", "ok"), ("engine-bounds", "ok")]


@pytest.mark.parametrize(
    ("served", "told", "severities"),
    [
        (VLLM, 8192, ["ok"]),
        (VLLM, None, ["ok"]),
        (VLLM, 32768, ["warning"]),  # prompts made for the other engine are refused here
        (loaded(longest_prompt=5000), 8192, ["ok"]),
        (loaded(longest_prompt=10_000), 8192, ["warning"]),
        (loaded(finished={"stop": 90, "length": 10}), None, ["ok", "warning"]),
        (loaded(finished={"stop": 99, "length": 1}), None, ["ok"]),
        (loaded(finished={"length": 3}), None, ["ok"]),  # too few to say anything
        (replace(VLLM, models=(ServedModel(name="x"),)), 8192, ["info"]),
    ],
)
def test_the_window_against_what_is_sent(served, told, severities):
    assert [f.severity for f in judge_engine_window(WHERE, served, told)] == severities


@pytest.mark.parametrize(
    ("slots", "bound", "severities"),
    [
        (None, None, ["warning"]),  # four calls at once on a server that may run hundreds
        (None, 64, ["ok"]),
        (64, None, ["ok"]),
        (64, 64, ["ok"]),
        (64, 128, ["warning", "info"]),
        (64, 16, ["info"]),
        (256, 256, ["ok", "info"]),  # more windows than the KV cache holds
    ],
)
def test_the_bounds_against_what_runs_at_once(slots, bound, severities):
    served = replace(VLLM, slots=slots)
    assert [f.severity for f in judge_engine_bounds(WHERE, served, bound)] == severities


def test_requests_that_wait_at_the_server_or_were_begun_again_are_warned_of():
    assert found(judge_engine_load(WHERE, VLLM)) == [("engine-load", "ok")]
    assert [f.severity for f in judge_engine_load(WHERE, loaded(waiting=5))] == ["warning"]
    assert [f.severity for f in judge_engine_load(WHERE, loaded(preempted=2))] == ["ok", "warning"]
    assert list(judge_engine_load(WHERE, replace(VLLM, load=None))) == []


def test_what_waits_is_what_the_server_counts():
    with OpenAIServer(max_num_seqs=2) as server:
        server.hold()
        model = ChatOpenAI(model=MODEL, base_url=server.base_url, api_key="none", max_retries=0)
        threads = [threading.Thread(target=model.invoke, args=(f"{i}?",)) for i in range(5)]
        for thread in threads:
            thread.start()
        server.wait_for(lambda s: s.running == 2 and s.waiting == 3)
        settings = AegisSettings(vllm_base_url=server.base_url, vllm_max_num_seqs=8)
        (finding,) = (f for f in check_engine(settings, Told(), []) if f.code == "engine-load")
        server.release()
        for thread in threads:
            thread.join(10)
        model.root_client.close()
    assert (finding.severity, finding.what) == ("warning", "2 requests run and 3 wait now")


@pytest.mark.parametrize(("caching", "severities"), [(True, ["ok"]), (False, ["warning"]), (None, ["info"])])
def test_a_prefix_cache_that_is_off_is_warned_of(caching, severities):
    assert [f.severity for f in judge_prefix_cache(WHERE, loaded(prefix_caching=caching))] == severities
    assert list(judge_prefix_cache(WHERE, replace(VLLM, engine="llama.cpp"))) == []


GPU = [{"name": "llama3.2:3b", "size": 3 * 2**30, "size_vram": 3 * 2**30}]


@pytest.mark.parametrize(
    ("ollama", "held", "warned"),
    [
        ("http://127.0.0.1:11434", GPU, True),
        ("http://localhost:11434", GPU, True),
        ("http://127.0.0.1:11434", [], False),  # Ollama runs, and holds nothing
        ("http://127.0.0.1:11434", [{"name": "x", "size": 5, "size_vram": 0}], False),
        ("http://gpu2:11434", GPU, False),  # another machine
    ],
)
def test_both_engines_on_one_gpu_are_warned_of(ollama, held, warned):
    findings = list(judge_shared_gpu(WHERE, VLLM, ollama, held))
    assert bool(findings) is warned
    assert all("3.0 GiB" in f.what and "90%" in f.what for f in findings)
    assert list(judge_shared_gpu(WHERE, replace(VLLM, engine=""), ollama, held)) == []


def test_the_command_asks_vllm_where_it_is_named(redis_url):
    with OpenAIServer() as server, ScriptedOllama("chat:8b") as ollama:
        told = ["doctor", "--json", "--ollama-url", ollama.base_url, "--redis-url", redis_url]
        assert '"engine"' not in CliRunner().invoke(app, told).stdout
        done = CliRunner().invoke(app, [*told, "--vllm-url", server.base_url])
        assert '"code": "engine-bounds"' in done.stdout
        assert done.exit_code in (1, 2)


def test_servers_are_asked_for_nothing_where_none_is_named(redis_url):
    with ScriptedOllama("chat:8b") as ollama:
        settings = AegisSettings(ollama_base_url=ollama.base_url, redis_url=redis_url)
        assert not [f for f in check_servers(settings) if f.code.startswith("engine")]


def test_a_login_in_the_address_is_not_shown():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://user:hunter2@127.0.0.1:{closed.getsockname()[1]}"
        findings = list(check_engine(AegisSettings(vllm_base_url=address), Told(), []))
    assert findings
    assert "hunter2" not in "".join(str(f.as_dict()) for f in findings)


COMPOSE = """
services:
  ollama:
    image: ollama/ollama:0.33.0
    healthcheck: {{test: ["CMD", "ollama", "list"]}}
    {ollama}
  vllm:
    image: vllm/vllm-openai:v0.33.0
    {vllm}
"""
RESERVED = "deploy: {resources: {reservations: {devices: [{driver: nvidia, count: all, capabilities: [gpu]}]}}}"


@pytest.mark.parametrize(
    ("ollama", "vllm", "warned"),
    [
        (RESERVED, RESERVED, True),
        ("gpus: all", "runtime: nvidia", True),
        (RESERVED, 'profiles: ["ingestion"]\n    ' + RESERVED, False),
        ('profiles: ["gpu"]\n    ' + RESERVED, 'profiles: ["gpu", "x"]\n    ' + RESERVED, True),
        (RESERVED, "mem_limit: 1g", False),  # on the CPU
        ("mem_limit: 1g", RESERVED, False),
    ],
)
def test_a_compose_file_that_starts_both_engines_with_the_gpu_is_warned_of(tmp_path, ollama, vllm, warned):
    path = tmp_path / "compose.yml"
    path.write_text(COMPOSE.format(ollama=ollama, vllm=vllm))
    codes = {f.code for f in check_compose(path, {})}
    assert ("engines-share-gpu" in codes) is warned
