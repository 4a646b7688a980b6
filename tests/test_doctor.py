"""The doctor: what it says of files and of live servers is true, and it invents nothing."""

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from langchain_aegis.ollama.compose import check_compose
from langchain_aegis.ollama.doctor import check_servers, read_files
from langchain_aegis.ollama.env_files import Variable, read_env_file
from langchain_aegis.ollama.environment import check_variables
from langchain_aegis.ollama.findings import Finding, exit_code, render_codes
from langchain_aegis.ollama.findings import codes as codes_of_table
from langchain_aegis.ollama.knowledge import knowledge
from langchain_aegis.ollama.redis_checks import judge_redis
from langchain_aegis.ollama.repair import repair
from langchain_aegis.ollama.server_checks import (
    Told,
    judge_loaded,
    judge_quantisation,
    judge_slots,
    judge_version,
    judge_window,
)
from langchain_aegis.settings import AegisSettings

ROOT = Path(__file__).resolve().parent.parent
TABLE = knowledge()
CLEAN = """
services:
  ollama:
    image: ollama/ollama:0.33.0
    environment: {OLLAMA_NUM_PARALLEL: "4", OLLAMA_CONTEXT_LENGTH: "8192", OLLAMA_KEEP_ALIVE: "30m"}
    ports: ["127.0.0.1:11434:11434"]
    healthcheck: {test: ["CMD", "ollama", "list"]}
"""


def codes(findings, *severities):
    return {f.code for f in findings if not severities or f.severity in severities}


def of_environment(server_only=True, version=None, **values):
    variables = {name: Variable(value, name) for name, value in values.items()}
    return list(check_variables(variables, server_only=server_only, version=version))


def of_compose(tmp_path, text, **values):
    path = tmp_path / "compose.yml"
    path.write_text(text)
    return list(check_compose(path, values))


# -- The table ---------------------------------------------------------------------------------------------------


def test_what_applications_use_is_no_setting_of_the_server():
    assert not {n for n in TABLE.application if n in TABLE.server and TABLE.server[n].reads == "yes"}
    assert {"OLLAMA_BASE_URL", "OLLAMA_MODEL_GENERATION", "OLLAMA_MODEL_EMBEDDINGS"} <= TABLE.application


# -- Variables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, s in TABLE.server.items() if s.reads != "yes"])
def test_each_setting_that_does_nothing_is_found(name):
    (finding,) = of_environment(**{name: "1"})
    assert finding.severity == "warning"
    assert name in finding.what
    assert finding.fix


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("OLLAMA_NUM_PARALLEL", ["4", " 8 ", '"2"'], ["four", "-1", "2.5", "4k"]),
        ("OLLAMA_SCHED_SPREAD", ["1", "true", "F", "0"], ["yes", "on", "2"]),
        ("OLLAMA_KEEP_ALIVE", ["30m", "-1", "1h30m", "3600", "1.5h"], ["30 minutes", "forever", "30min"]),
        ("OLLAMA_LOAD_TIMEOUT", ["10m", "0"], ["ten"]),
        ("OLLAMA_KV_CACHE_TYPE", ["f16", "q8_0", "q4_0", "Q8_0", '"F16"'], ["fp16", "int8", "Q9_0"]),
    ],
)
def test_values_that_the_server_misreads_are_found(name, good, bad):
    for value in good:
        assert not codes(of_environment(**{name: value}), "warning", "error"), value
    for value in bad:
        assert codes(of_environment(**{name: value}), "warning", "error") == {"value-misread"}, value


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"OLLAMA_KEEP_ALIVE": "0"}, "keep-alive-zero"), ({"OLLAMA_KEEP_ALIVE": "0s"}, "keep-alive-zero"),
        ({"OLLAMA_KEEP_ALIVE": "30"}, "keep-alive-seconds"),
        ({"OLLAMA_MAX_LOADED_MODELS": "1"}, "models-evict-each-other"),
        ({"OLLAMA_ORIGINS": "http://a, *"}, "any-web-page"), ({"OLLAMA_DEBUG_LOG_REQUESTS": "1"}, "prompts-logged"),
        ({"OLLAMA_KV_CACHE_TYPE": "q8_0", "OLLAMA_FLASH_ATTENTION": "0"}, "kv-cache-needs-flash-attention"),
        ({"OLLAMA_KV_CACHE_TYPE": "Q8_0", "OLLAMA_FLASH_ATTENTION": "0"}, "kv-cache-needs-flash-attention"),
        ({"OLLAMA_NUM_PARALEL": "4"}, "setting-misspelt"), ({"OLLAMA_MODEL": "x"}, "setting-unknown"),
        ({"OLLAMA_GPU_OVERHEAD": "0"}, "setting-without-effect"),
    ],
)  # fmt: skip
def test_values_that_hurt_are_found(values, code):
    assert codes(of_environment(**values), "warning", "error") == {code}


@pytest.mark.parametrize(
    "values",
    [
        {"OLLAMA_KV_CACHE_TYPE": "q8_0"}, {"OLLAMA_KV_CACHE_TYPE": "q8_0", "OLLAMA_FLASH_ATTENTION": "1"},
        {"OLLAMA_KV_CACHE_TYPE": "f16", "OLLAMA_FLASH_ATTENTION": "0"}, {"OLLAMA_MAX_QUEUE": "512"},
        {"OLLAMA_KEEP_ALIVE": "300"}, {"OLLAMA_NUM_PARALLEL": ""}, {"LLAMA_ARG_THREADS": "16"},
        {"LLAMA_ARG_SOMETHING_ELSE": "1"}, {"CUDA_VISIBLE_DEVICES": "0"}, {"NVIDIA_VISIBLE_DEVICES": "all"},
    ],
)  # fmt: skip
def test_nothing_is_invented(values):
    assert not codes(of_environment(**values), "warning", "error")


def test_names_of_the_application_are_fine_in_an_env_file_and_useless_in_the_servers_environment():
    values = {
        "OLLAMA_BASE_URL": "http://x",
        "OLLAMA_MODEL_GENERATION": "y",
        "OLLAMA_TIMEOUT": "60",
        "OLLAMA_MODEL_QUERY": "1",
    }
    assert not codes(of_environment(server_only=False, **values), "warning", "error")
    assert len(of_environment(**values)) == 4
    (finding,) = of_environment(server_only=False, OLLAMA_NUM_PARALELL="4")
    assert "OLLAMA_NUM_PARALLEL" in finding.fix


def test_the_version_of_the_image_counts():
    """What an old server still read is not called ignored, and what it did not have yet is."""
    assert not of_environment(version="0.6.0", OLLAMA_NEW_ENGINE="1")
    assert codes(of_environment(version="0.32.15", OLLAMA_NEW_ENGINE="1")) == {"setting-ignored"}
    assert codes(of_environment(version="0.5.7", OLLAMA_CONTEXT_LENGTH="8192")) == {"setting-too-new"}
    assert codes(of_environment(version="0.24.0", LLAMA_ARG_THREADS="8")) == {"setting-too-new"}


def test_an_env_file_is_read_as_compose_reads_it(tmp_path):
    path = tmp_path / "x.env"
    path.write_text("# c\nA=1 # one\nexport B = 'x # y'\nC=\"q\" # z\nnonsense\nA=2\nD=a#b\nE=\n")
    assert {n: v.value for n, v in read_env_file(path).items()} == {
        "A": "2",
        "B": "x # y",
        "C": "q",
        "D": "a#b",
        "E": "",
    }
    assert read_env_file(path)["A"].where == f"{path}:6 A"


@given(st.text(max_size=300))
def test_no_env_file_breaks_the_doctor(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("env") / "x.env"
    path.write_text(text, encoding="utf-8")
    list(check_variables(read_env_file(path), server_only=False))


# -- Compose files -----------------------------------------------------------------------------------------------


def test_a_clean_file_gives_no_warning(tmp_path):
    assert not codes(of_compose(tmp_path, CLEAN), "warning", "error")


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        (":0.33.0", ":latest", "image-unpinned"),
        (":0.33.0", "", "image-unpinned"),
        ("127.0.0.1:11434:11434", "11434:11434", "port-exposed"),
        ("127.0.0.1:11434:11434", "0.0.0.0:11434:11434", "port-exposed"),
        ("127.0.0.1:11434:11434", "[::]:11434:11434", "port-exposed"),
        ("127.0.0.1:11434:11434", "192.168.1.5:11434:11434/tcp", "port-exposed"),
        ("127.0.0.1:11434:11434", "11434", "port-exposed"),
        ('"127.0.0.1:11434:11434"', "{target: 11434, published: 11434}", "port-exposed"),
        ('["CMD", "ollama", "list"]', '["CMD", "curl", "-f", "http://localhost:11434"]', "health-check-cannot-run"),
        ('["CMD", "ollama", "list"]', '["CMD-SHELL", "ollama list || wget -q http://x"]', "health-check-cannot-run"),
        ('["CMD", "ollama", "list"]', "curl -f http://localhost:11434 || exit 1", "health-check-cannot-run"),
        ('["CMD", "ollama", "list"]', "[\"CMD\", \"sh\", \"-c\", \"timeout 5 curl -s x\"]", "health-check-cannot-run"),
        ('["CMD", "ollama", "list"]', '["CMD", "ollama", "--version"]', "health-check-proves-nothing"),
        ("OLLAMA_NUM_PARALLEL", "OLLAMA_NUM_THREADS", "setting-ignored"),
        ("image:", "privileged: true\n    image:", "privileged"),
        ('ports: ["127.0.0.1:11434:11434"]', "network_mode: host", "port-exposed"),
    ],
)  # fmt: skip
def test_each_planted_fault_is_found_and_no_other(tmp_path, old, new, code):
    assert old in CLEAN
    assert codes(of_compose(tmp_path, CLEAN.replace(old, new)), "warning", "error") == {code}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("127.0.0.1:11434:11434", "[::1]:11434:11434"), ("127.0.0.1:11434:11434", "${BIND}:11434:11434"),
        ("127.0.0.1:11434:11434", "${BIND:-127.0.0.1}:11434:11434"),
        ('"127.0.0.1:11434:11434"', "{target: 11434, published: 11434, host_ip: 127.0.0.1}"),
        ('["CMD", "ollama", "list"]', '["CMD-SHELL", "bash -c \'</dev/tcp/localhost/11434\'"]'),
        ('["CMD", "ollama", "list"]', '["CMD-SHELL", "ollama ps | grep -q curl"]'),
        ('["CMD", "ollama", "list"]', '["NONE"]'),
        ('{OLLAMA_NUM_PARALLEL: "4", OLLAMA_CONTEXT_LENGTH: "8192", OLLAMA_KEEP_ALIVE: "30m"}',
         "[OLLAMA_NUM_PARALLEL=4, OLLAMA_HOST, OLLAMA_SCHED_SPREAD=true]"),
        ("ollama/ollama:0.33.0", "ollama/ollama@sha256:" + "0" * 64), ("ollama:\n", "ollama:\n    # nothing\n"),
        ("services:", "x-common: &c {a: 1}\nservices:\n  web: {image: nginx, ports: ['80:80']}"),
        ("30m", "${KEEP}"), ("30m", "${KEEP:-30m}"), ('KEEP_ALIVE: "30m"', "SCHED_SPREAD: true"),
    ],
)  # fmt: skip
def test_other_ways_to_write_a_clean_file_give_no_warning(tmp_path, old, new):
    assert old in CLEAN
    assert not codes(of_compose(tmp_path, CLEAN.replace(old, new)), "warning", "error")


def test_variables_are_filled_in_as_compose_does(tmp_path):
    text = CLEAN.replace("127.0.0.1:11434:11434", "${BIND:-127.0.0.1}:${PORT-11434}:11434").replace(
        "30m", "${KEEP:?no}"
    )
    assert not codes(of_compose(tmp_path, text, BIND="", KEEP="30m"), "warning", "error")
    assert codes(of_compose(tmp_path, text, BIND="0.0.0.0", KEEP="30m"), "error") == {"port-exposed"}  # noqa: S104
    assert codes(of_compose(tmp_path, text, KEEP="0"), "warning") == {"keep-alive-zero"}


def test_an_env_file_of_a_service_is_judged_with_it(tmp_path):
    (tmp_path / "o.env").write_text("OLLAMA_NUM_CTX=32768\nOLLAMA_FLASH_ATTENTION=0\n")
    text = CLEAN.replace("image:", "env_file: [o.env, {path: gone.env, required: false}]\n    image:")
    findings = of_compose(tmp_path, text.replace('OLLAMA_NUM_PARALLEL: "4"', "OLLAMA_KV_CACHE_TYPE: q8_0"))
    assert codes(findings, "warning", "error") == {"setting-ignored", "kv-cache-needs-flash-attention"}
    assert any(f.where.endswith("o.env:1 OLLAMA_NUM_CTX") for f in findings)


BOUND = "redis-server --maxmemory 2gb --maxmemory-policy volatile-lru --requirepass x"


@pytest.mark.parametrize(
    ("service", "expected"),
    [
        (f"command: {BOUND}", set()),
        (f"command: {BOUND}\n    ports: ['127.0.0.1:6379:6379']", set()),
        (f"command: {BOUND}\n    ports: ['6379:6379']", {"port-exposed"}),
        (f"command: {BOUND}\n    healthcheck: {{test: [CMD, redis-cli, ping]}}", {"health-check-proves-nothing"}),
        (f"command: {BOUND}\n    healthcheck: {{test: [CMD, redis-cli, -a, x, ping]}}", set()),
        (f"command: {BOUND}\n    healthcheck: {{test: [CMD, curl, localhost]}}", {"health-check-cannot-run"}),
        (f"command: {BOUND.replace('volatile', 'allkeys')}", {"redis-eviction"}),
        (f"command: {BOUND.replace('volatile-lru', 'noeviction')}", {"redis-eviction"}),
        (f"command: {BOUND.replace('--maxmemory-policy volatile-lru', '')}", {"redis-eviction"}),
        (f"command: {BOUND.replace('--maxmemory 2gb', '')}", {"redis-memory"}),
        (f"command: {BOUND.replace('2gb', '0')}", {"redis-memory"}),
        (f"command: {BOUND.replace('--requirepass x', '')}", {"redis-no-password"}),
        ("command: " + BOUND.replace("requirepass x", "requirepass ''"), {"redis-no-password"}),
        ("command: [redis-server, --maxmemory, 2gb, --maxmemory-policy, volatile-lru, --requirepass, $$PW]", set()),
        ("command: --maxmemory 2gb --maxmemory-policy volatile-lfu --requirepass x", set()),
        ("command: redis-server /etc/redis.conf", set()),  # which is not here: nothing is known
        ("command: redis-server /etc/redis.conf\n    volumes: ['./r.conf:/etc/redis.conf:ro']", {"redis-eviction"}),
        (f"command: [sh, -c, 'exec {BOUND}']", {"redis-search"}),
        (f"command: [sh, -c, 'exec docker-entrypoint.sh {BOUND}']", set()),
        (f"entrypoint: {BOUND}", {"redis-search"}),
        ("ports: ['6379:6379']", {"port-exposed", "redis-memory", "redis-no-password"}),
        ("environment: {REDIS_PASSWORD: secret}", {"redis-memory", "redis-no-password"}),
    ],
)  # fmt: skip
def test_a_redis_service_is_judged_too(tmp_path, service, expected):
    (tmp_path / "r.conf").write_text("# c\nrequirepass x\nmaxmemory 1gb\nmaxmemory-policy allkeys-lru\n")
    text = f"services:\n  cache:\n    image: redis:8.2.3\n    {service}\n"
    assert codes(of_compose(tmp_path, text), "warning", "error") == expected


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("redis:7-alpine", {"redis-search"}), ("redis:6.2.14", {"redis-search"}),
        ("valkey/valkey:8.1", {"redis-search"}),
        ("redis:8", set()), ("redis:8.4-alpine", set()), ("docker.io/library/redis:8.2.3", set()),
        ("redis/redis-stack-server:7.4.0-v3", set()), ("redis:alpine", {"image-unpinned"}),
        ("redis", {"image-unpinned"}),
        ("bitnami/redis:7.4", set()), ("ghcr.io/ours/redis:1", set()),
    ],
)  # fmt: skip
def test_search_is_a_matter_of_the_image(tmp_path, image, expected):
    text = f"services:\n  cache:\n    image: {image}\n    command: {BOUND}\n"
    assert codes(of_compose(tmp_path, text), "warning", "error") == expected


@pytest.mark.parametrize("text", ["", "[", "a: b", "services: 3", "services: {ollama: 5}", "\x00", "services:\n\t- a"])
def test_what_is_no_compose_file_is_one_error(tmp_path, text):
    assert codes(of_compose(tmp_path, text)) == {"compose-unreadable"}


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8)
    | st.sampled_from(["11434:11434", "OLLAMA_NUM_CTX=1", "a.conf", "./x:/a.conf", "curl x", "host", "${A:-"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(
        ["image", "environment", "ports", "healthcheck", "test", "env_file", "deploy", "resources", "security_opt",
         "command", "entrypoint", "volumes", "source", "extends", "network_mode", "privileged", "OLLAMA_NUM_CTX",
         "OLLAMA_HOST", "target", "published", "host_ip"]), inner, max_size=4),
    max_leaves=12,
), st.sampled_from(["ollama", "redis"]))  # fmt: skip
def test_no_service_breaks_the_doctor(tmp_path_factory, service, name):
    """Whatever stands in a service: findings, never a traceback, and what can be corrected can be read again."""
    path = tmp_path_factory.mktemp("compose") / "c.yml"
    path.write_text(json.dumps({"services": {name: service}}))
    for done in repair(list(check_compose(path, {}))):
        assert not {f.code for f in check_compose(done.written, {})} & {"compose-unreadable"}


def test_files_that_are_not_there_are_errors(tmp_path):
    findings = read_files([tmp_path / "no.yml"], [tmp_path / "no.env"]).findings
    assert codes(findings, "error") == {"file-unreadable"}
    assert len(findings) == 2


# -- Judgements --------------------------------------------------------------------------------------------------


def test_the_worst_finding_decides_the_exit_code():
    def make(severity):
        return Finding(code="c", severity=severity, where="w", what="x")

    assert [exit_code(map(make, s)) for s in ([], ["ok", "info"], ["warning", "ok"], ["error", "warning"])] == [
        0,
        0,
        1,
        2,
    ]


@pytest.mark.parametrize(
    ("window", "longest", "told", "severity", "says"),
    [
        (8192, 8192, None, "ok", "8192"),
        (32768, 131072, 32768, "ok", "32768"),
        (4096, 131072, None, "warning", "131072"),
        (4096, 4096, None, "ok", "4096"),
        (4096, 131072, 32768, "warning", "OLLAMA_CONTEXT_LENGTH here says 32768"),
        (8192, 8192, 32768, "ok", "8192"),
        (None, 8192, 32768, "info", "8192 tokens (OLLAMA_CONTEXT_LENGTH)"),
        (None, 131072, None, "info", "4096, 32768 or 262144"),
        (None, None, None, "info", "not loaded"),
    ],
)
def test_the_window_is_judged_by_what_is_loaded(window, longest, told, severity, says):
    shown = {"model_info": {"llama.context_length": longest}} if longest else {}
    finding = judge_window("w", "m:latest", window, shown, told)
    assert finding.severity == severity
    assert says in finding.what


def test_the_modelfiles_own_window_is_known():
    finding = judge_window("w", "m:latest", None, {"parameters": "stop x\nnum_ctx                        16384"}, 8192)
    assert "16384 tokens (num_ctx of its Modelfile)" in finding.what


@pytest.mark.parametrize(
    ("memory", "indexes", "wrong"),
    [
        ({"maxmemory": 2**30, "maxmemory_policy": "volatile-lru"}, ["aegis:{p00}:idx:a:v1", "x"], set()),
        ({"maxmemory": 0}, [], {"redis-memory"}),
        ({"maxmemory": 2**30, "maxmemory_policy": "noeviction"}, [], {"redis-eviction"}),
        ({"maxmemory": 2**30, "maxmemory_policy": "allkeys-lru"}, [], {"redis-eviction"}),
        ({"maxmemory": 2**30, "maxmemory_policy": "volatile-lru"}, None, {"redis-search"}),
        ({"maxmemory": 2**30, "maxmemory_policy": "volatile-lru", "evicted_keys": 7}, [], set()),
        ({}, [], set()),
    ],
)
def test_redis_is_judged_by_search_memory_and_eviction(memory, indexes, wrong):
    findings = list(judge_redis("w", {"redis_version": "8.2.3"}, memory, indexes, "aegis"))
    assert codes(findings, "warning", "error") == wrong
    assert ("redis-eviction" in codes(findings, "info")) == ("evicted_keys" in memory)
    if indexes and memory:
        assert "1 index of namespace aegis" in findings[0].what


def test_what_the_files_say_of_the_server_wins_over_the_environment(tmp_path):
    (tmp_path / "x.env").write_text("OLLAMA_CONTEXT_LENGTH=32768\n")
    environ = {"OLLAMA_CONTEXT_LENGTH": "1", "OLLAMA_NUM_PARALLEL": "2"}
    assert read_files([], [tmp_path / "x.env"]).told(environ) == Told(32768, 2, False)
    assert read_files([], []).told({"OLLAMA_CONTEXT_LENGTH": "8192"}) == Told(8192, None, False)
    assert read_files([], []).told({"OLLAMA_CONTEXT_LENGTH": "big"}) == Told()
    gpu = "deploy: {resources: {reservations: {devices: [{driver: nvidia}]}}}"
    (tmp_path / "c.yml").write_text(CLEAN.replace("image:", f"{gpu}\n    image:"))
    assert read_files([tmp_path / "c.yml"], [tmp_path / "x.env"]).told({}) == Told(8192, 4, True)


# -- Live servers ------------------------------------------------------------------------------------------------

LINES = [
    "server", "version", "models", "window", "model-on-cpu", "redis-search", "redis-memory", "redis-no-password",
]  # fmt: skip


@pytest.fixture
def ollama(redis_url):
    """A server with four models, beside a Redis that has evicted nothing: others before used the same one."""
    from langchain_aegis.testing import ScriptedModel, ScriptedOllama

    models = [
        ScriptedModel(name="chat:8b", context_length=32768),
        ScriptedModel(name="small:1b", context_length=4096),
        ScriptedModel(name="bge-m3", embedding=True),
        ScriptedModel(name="all-minilm", embedding=True),
    ]
    with redis.Redis.from_url(redis_url) as client:
        client.config_resetstat()
    with ScriptedOllama(models) as server:
        yield server


def ask(ollama, redis_url, told=None, **settings):
    """Run the doctor on live servers; returns code -> finding, the worst one of a code."""
    rank = ["ok", "info", "warning", "error"]
    url = getattr(ollama, "base_url", ollama)
    findings = check_servers(AegisSettings(ollama_base_url=url, redis_url=redis_url, **settings), Told(window=told))
    found = {}
    for finding in findings:
        if finding.code not in found or rank.index(finding.severity) > rank.index(found[finding.code].severity):
            found[finding.code] = finding
    assert [code for code in LINES if code in found] == list(found)
    return found


def load(ollama, model, **options):
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": False, "options": options}
    httpx.post(f"{ollama.base_url}/api/chat", json=body, timeout=30).raise_for_status()


def test_servers_that_are_all_well(ollama, redis_url):
    load(ollama, "chat:8b", num_ctx=16384)
    found = ask(ollama, redis_url, model_generation="chat:8b", model_embeddings="all-minilm")
    assert {code for code, f in found.items() if f.severity != "ok"} == {"model-on-cpu"}  # which is worth knowing
    assert found["model-on-cpu"].severity == "info"
    assert "0." in found["version"].what
    assert "16384 tokens of the 32768" in found["window"].what
    assert "with search" in found["redis-search"].what


def test_no_prompt_is_sent_and_no_model_is_loaded(ollama, redis_url):
    ask(ollama, redis_url, model_generation="chat:8b", model_embeddings="bge-m3")
    assert set(ollama.routes) <= {"/api/version", "/api/tags", "/api/ps", "/api/show"}
    assert ollama.counters.loads == 0


def test_a_missing_model_is_an_error_with_the_command_that_fetches_it(ollama, redis_url):
    finding = ask(ollama, redis_url, model_generation="absent:8b")["models"]
    assert (finding.severity, finding.fix) == ("error", "ollama pull absent:8b")


def test_the_default_embedder_is_found_and_its_absence_said(redis_url):
    from langchain_aegis.testing import ScriptedOllama

    with ScriptedOllama(["chat:8b", "bge-m3"]) as server:
        assert ask(server, redis_url, model_generation="chat:8b")["models"].severity == "ok"
    with ScriptedOllama(["chat:8b"]) as server:
        finding = ask(server, redis_url, model_generation="chat:8b")["models"]
    assert (finding.severity, finding.fix) == ("warning", "ollama pull bge-m3")


def test_a_name_without_a_tag_means_latest(redis_url):
    from langchain_aegis.testing import ScriptedOllama

    with ScriptedOllama(["chat", "bge-m3"]) as server:
        assert ask(server, redis_url, model_generation="chat")["models"].severity == "ok"


def test_a_small_window_of_a_large_model_is_a_warning(ollama, redis_url):
    load(ollama, "chat:8b", num_ctx=4096)
    finding = ask(ollama, redis_url, model_generation="chat:8b")["window"]
    assert finding.severity == "warning"
    assert "4096" in finding.what and "OLLAMA_CONTEXT_LENGTH" in finding.fix
    load(ollama, "small:1b", num_ctx=4096)
    assert ask(ollama, redis_url, model_generation="small:1b")["window"].severity == "ok"


def test_another_window_than_the_one_that_was_set_is_a_warning(ollama, redis_url):
    load(ollama, "chat:8b", num_ctx=8192)
    assert "here says 32768" in ask(ollama, redis_url, 32768, model_generation="chat:8b")["window"].what


def test_a_model_that_is_not_loaded_is_said_to_be_so(ollama, redis_url):
    finding = ask(ollama, redis_url, 16384, model_generation="chat:8b")["window"]
    assert finding.severity == "info"
    assert "not loaded; its window will be 16384" in finding.what


def test_a_server_that_is_not_there_is_an_error_and_the_rest_unknown(redis_url):
    found = ask("http://127.0.0.1:9", redis_url)
    assert [found[code].severity for code in LINES[:4]] == ["error", "info", "info", "info"]
    assert found["redis-search"].severity == "ok"


def test_a_server_that_is_no_ollama_is_an_error(ollama, redis_url):
    ollama.fail(500, times=None, path="/api/version")
    assert ask(ollama, redis_url)["server"].severity == "error"


def test_a_redis_that_is_not_there_is_an_error_without_its_password(ollama):
    finding = ask(ollama, "redis://:geheim-geheim@127.0.0.1:9")["redis-search"]
    assert finding.severity == "error"
    assert "geheim" not in json.dumps(finding.as_dict())


def test_every_kind_of_redis_is_judged_by_its_search(ollama, any_redis):
    finding = ask(ollama, any_redis.url)["redis-search"]
    assert finding.severity == ("ok" if any_redis.has_search else "warning")
    assert ("Valkey" if any_redis.kind.startswith("valkey") else "Redis") in finding.what or not any_redis.has_search


def test_nothing_is_written_into_redis(ollama, redis_url):
    with redis.Redis.from_url(redis_url) as client:
        before = client.dbsize()
        ask(ollama, redis_url, namespace="doctor-test")
        assert client.dbsize() == before
        assert not list(client.scan_iter("doctor-test*"))


def doctor(*arguments, **environment):
    """Run the command; returns (exit code, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "langchain_aegis", "doctor", *map(str, arguments)],
        env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_the_command_prints_findings_and_nothing_else_as_json(ollama, redis_url):
    load(ollama, "chat:8b", num_ctx=16384)
    code, out, err = doctor(
        "--json", "--ollama-url", ollama.base_url, "--redis-url", redis_url, OLLAMA_MODEL_GENERATION="chat:8b"
    )
    findings = json.loads(out)
    assert (code, err) == (0, "")
    assert {f["code"] for f in findings} == set(LINES) - {"redis-no-password"}  # a socket needs none
    assert all(set(f) == {"code", "severity", "where", "what", "why", "fix"} for f in findings)


@pytest.mark.parametrize(
    ("line", "expected"),
    [("OLLAMA_CONTEXT_LENGTH=8192", 0), ("OLLAMA_NUM_CTX=8192", 1), ("OLLAMA_KV_CACHE_TYPE=int4", 2)],
)
def test_the_exit_code_is_that_of_the_worst_finding(tmp_path, line, expected):
    (tmp_path / "x.env").write_text(f"{line}\n")
    code, out, err = doctor("--offline", "--env-file", tmp_path / "x.env")
    assert (code, err) == (expected, "")
    assert (line.partition("=")[0] in out) == (expected > 0)


def test_offline_asks_nobody(tmp_path, ollama):
    (tmp_path / "c.yml").write_text(CLEAN)
    code, out, _ = doctor("--offline", "--json", "--compose", tmp_path / "c.yml", OLLAMA_BASE_URL=ollama.base_url)
    assert code == 0
    assert not {"server", "redis-search"} & {f["code"] for f in json.loads(out)}
    assert not ollama.requests


# -- What a running server tells ---------------------------------------------------------------------------------

NOW = datetime(2026, 8, 21, 12, 0, tzinfo=UTC)


def loaded(**changes):
    """Return an entry of /api/ps as Ollama 0.33 writes it, all in video memory and kept for long."""
    entry = {
        "name": "chat:8b", "model": "chat:8b", "size": 8 * 2**30, "size_vram": 8 * 2**30, "context_length": 8192,
        "expires_at": "2026-08-21T14:30:00.123456789+02:00", "digest": "abc",
        "details": {"family": "llama", "families": ["llama"], "quantization_level": "Q4_K_M"},
    }  # fmt: skip
    return entry | changes


@pytest.mark.parametrize(
    ("changes", "gpu", "expected"),
    [
        ({}, True, []),
        ({"size_vram": 6 * 2**30}, False, [("model-on-cpu", "warning", "25 %")]),
        ({"size_vram": 0}, True, [("model-on-cpu", "warning", "wholly")]),
        ({"size_vram": 0}, False, [("model-on-cpu", "info", "wholly")]),
        ({"size": None, "size_vram": None}, True, []),
        ({"expires_at": "2026-08-21T12:00:42Z"}, True, [("keep-alive-expiring", "warning", "42 seconds")]),
        ({"expires_at": "2026-08-21T14:00:42.5+02:00"}, True, [("keep-alive-expiring", "warning", "42 seconds")]),
        ({"expires_at": "2026-08-21T12:04:00Z"}, True, []),
        ({"expires_at": "2026-08-21T11:59:00Z"}, True, []),  # the clocks differ
        ({"expires_at": "2319-01-01T00:00:00Z"}, True, []),
        ({"expires_at": "soon"}, True, []),
    ],
)  # fmt: skip
def test_a_loaded_model_is_judged(changes, gpu, expected):
    findings = judge_loaded("w", loaded(**changes), now=NOW, gpu=gpu)
    found = [(f.code, f.severity, f.what) for f in findings]
    assert [(code, severity) for code, severity, _ in found] == [(code, severity) for code, severity, _ in expected]
    assert all(says in what for (_, _, says), (_, _, what) in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("model", "slots", "version", "severity"),
    [
        ({"details": {"family": "llama"}, "capabilities": ["completion"]}, 4, "0.33.0", None),
        ({"details": {"family": "qwen3vl", "families": None}}, 4, "0.33.0", "warning"),
        ({"details": {"family": "x", "families": ["x", "qwen35moe"]}}, 4, "0.33.0", "warning"),
        ({"details": {"family": "qwen35moe"}}, 4, "0.16.0", None),
        ({"details": {"family": "qwen3vl"}}, 1, "0.33.0", None),
        ({"details": {"family": "qwen3vl"}}, None, "0.33.0", None),
        ({"capabilities": ["embedding"]}, 4, "0.33.0", "info"), ({"capabilities": []}, 4, "0.33.0", None),
        ({"details": None, "capabilities": None}, 4, "0.33.0", None),
    ],
)  # fmt: skip
def test_models_that_get_one_slot_are_named(model, slots, version, severity):
    found = list(judge_slots("w", {"name": "m", **model}, slots=slots, version=version))
    assert [(f.code, f.severity) for f in found] == ([("one-slot", severity)] if severity else [])


@pytest.mark.parametrize(
    ("level", "capabilities", "says"),
    [
        ("Q4_K_M", ["completion"], None), ("Q8_0", [], None), ("MXFP4", [], None), ("Q3_K_S", [], None),
        ("F16", ["embedding"], None), ("F16", ["completion"], "not quantised"), ("BF16", None, "not quantised"),
        ("Q2_K", ["completion"], "Q2_K"), ("IQ1_M", ["completion"], "IQ1_M"), ("", [], None),
    ],
)  # fmt: skip
def test_an_unusual_quantisation_is_said(level, capabilities, says):
    model = {"name": "m", "details": {"quantization_level": level}, "capabilities": capabilities}
    found = list(judge_quantisation("w", model))
    assert [f.severity for f in found] == ([] if says is None else ["info"])
    assert all(says in f.what for f in found)


@pytest.mark.parametrize(
    ("version", "severity", "says"),
    [
        ("0.33.0-rc2", "ok", "0.33.0-rc2"), ("0.30.0", "ok", "0.30.0"), ("0.24.0", "warning", "older than 0.30.0"),
        ("0.9.6", "warning", "0.9.6"), ("0.35.1", "info", "unknown to us"), ("", "info", "unknown"),
        ("main", "info", "unknown"),
    ],
)  # fmt: skip
def test_the_servers_version_is_judged(version, severity, says):
    finding = judge_version("w", version)
    assert (finding.severity, says in finding.what) == (severity, True)
    assert ("cannot refuse a prompt" in finding.why) == (version == "0.9.6")


# -- The probe ---------------------------------------------------------------------------------------------------


def probed(server, redis_url, monkeypatch, **settings):
    """Run the doctor with a probe on a server whose loads take 0.1 s; returns what the probe says."""
    from langchain_aegis.ollama import probe

    monkeypatch.setattr(probe, "RELOADED_S", 0.05)
    settings = AegisSettings(ollama_base_url=server.base_url, redis_url=redis_url, **settings)
    findings = list(check_servers(settings, probe=True))
    return [f for f in findings if f.code in ("probe", "reload-ping-pong", "models-evict-each-other")]


def test_a_probe_on_a_quiet_server_says_how_fast_it_is(redis_url, monkeypatch):
    from langchain_aegis.testing import ScriptedOllama

    with ScriptedOllama(["chat:8b", "bge-m3"], load_s=0.1) as server:
        (finding,) = probed(server, redis_url, monkeypatch, model_generation="chat:8b")
        assert (finding.code, finding.severity) == ("probe", "ok")
        assert server.routes["/api/chat"] == 2
        assert all("keep_alive" not in chat and set(chat["options"]) == {"num_predict"} for chat in server.chats)


def test_a_probe_sees_an_embedding_model_drive_the_chat_model_out(redis_url, monkeypatch):
    from langchain_aegis.testing import ScriptedOllama

    with ScriptedOllama(["chat:8b", "bge-m3"], load_s=0.1, max_loaded=1) as server:
        finding, _ = probed(server, redis_url, monkeypatch, model_generation="chat:8b")
    assert (finding.code, finding.severity) == ("models-evict-each-other", "warning")
    assert "bge-m3" in finding.what and "OLLAMA_MAX_LOADED_MODELS" in finding.fix


def test_a_probe_sees_that_others_send_other_options(redis_url, monkeypatch):
    from langchain_aegis.testing import ScriptedOllama

    with ScriptedOllama(["chat:8b", "bge-m3"], load_s=0.1) as server:
        load(server, "chat:8b", num_ctx=8192)
        finding, _ = probed(server, redis_url, monkeypatch, model_generation="chat:8b")
    assert (finding.code, finding.severity) == ("reload-ping-pong", "warning")
    assert "8192" in finding.what


def test_a_probe_that_cannot_ask_says_so(ollama, redis_url, monkeypatch):
    (finding,) = probed(ollama, redis_url, monkeypatch, model_generation="absent:1b")
    assert (finding.code, finding.severity) == ("probe", "info")
    assert not ollama.chats
    ollama.fail(500, times=None, path="/api/chat")
    (finding,) = probed(ollama, redis_url, monkeypatch, model_generation="chat:8b")
    assert (finding.code, finding.severity) == ("probe", "error")


# -- The command -------------------------------------------------------------------------------------------------


def test_the_worst_comes_first(tmp_path):
    (tmp_path / "x.env").write_text("OLLAMA_MAX_QUEUE=9\nOLLAMA_NUM_CTX=1\nOLLAMA_KV_CACHE_TYPE=int9\n")
    out = doctor("--offline", "--env-file", tmp_path / "x.env")[1]
    assert re.findall(r"(?m)^(error|warning|info) ", out) == ["error", "warning", "info"]
    assert out.splitlines()[-1] == "1 error, 1 warning, 1 info"


@pytest.mark.slow
def test_a_corrected_copy_is_written_on_request_only(tmp_path):
    path = tmp_path / "compose.yml"
    path.write_text("services: {ollama: {image: 'ollama/ollama:0.32.15', environment: {OLLAMA_NUM_CTX: 8192}}}\n")
    assert doctor("--offline", "--compose", path)[0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["compose.yml"]
    code, out, err = doctor("--offline", "--json", "--fix", "--compose", path)
    assert (code, err.count("\n")) == (1, 1)
    assert "compose.fixed.yml: 1 change" in err
    assert {"code", "severity", "where", "what", "why", "fix"} == set(json.loads(out)[0])
    assert doctor("--offline", "--compose", tmp_path / "compose.fixed.yml")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--fix"], "--compose"),
        (["--offline", "--probe", "--env-file", "x"], "--offline"),
        (["--offline"], "--compose"),
    ],
)
def test_options_that_make_no_sense_are_one_line(arguments, says):
    code, out, err = doctor(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_every_finding_has_a_code_of_the_table():
    """Which the documentation shows."""
    source = "".join(p.read_text() for p in (ROOT / "langchain_aegis/ollama").glob("*.py"))
    source += (ROOT / "langchain_aegis/ollama/contradictions.toml").read_text()
    used = set(re.findall(r'code ?= ?"([a-z-]+)"', source)) | {"models-evict-each-other", "setting-misspelt"}
    assert used | {"setting-unknown", "reload-ping-pong"} == set(codes_of_table())
    assert {f"{row.split('`')[1]}" for row in render_codes().splitlines()[2:]} == set(codes_of_table())
