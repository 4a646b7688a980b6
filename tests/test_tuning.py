"""The tunings: each line has its reason, none surprises a client, and the repository's own compose file agrees."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_aegis import AegisSettings, ChatAegis
from langchain_aegis.errors import AegisConfigError, AegisOptionError
from langchain_aegis.ollama import machine
from langchain_aegis.ollama.compose import check_compose
from langchain_aegis.ollama.env_files import read_env_file
from langchain_aegis.ollama.environment import check_variables
from langchain_aegis.ollama.knowledge import knowledge, version_tuple
from langchain_aegis.ollama.machine import Machine, detect, host_of
from langchain_aegis.ollama.plan import GB, Layout
from langchain_aegis.ollama.plan_quantisation import kv_types
from langchain_aegis.ollama.rendering import as_compose, as_env, as_systemd
from langchain_aegis.ollama.tuning import flash_attention_line, server_environment
from langchain_aegis.testing import ScriptedOllama
from langchain_aegis.tuning import AUTO, Line, named, tuned, tunings

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(tunings())
RELEASES = ["0.5.0", "0.6.8", "0.9.6", "0.11.10", "0.12.3", "0.15.0", "0.24.0", "0.30.0", "0.32.15", "0.33.0-rc2"]
RUNNER = {"num_ctx", "num_batch", "num_gpu", "num_thread", "main_gpu", "use_mmap", "draft_num_predict", "shift"}


def test_there_is_one_for_each_kind_of_machine():
    assert NAMES == ["cpu", "dgx-spark", "laptop", "workstation"]


@pytest.mark.parametrize("name", NAMES)
def test_every_line_has_a_reason_and_a_source(name):
    for line in (*named(name).server, *named(name).request, *named(name).client):
        assert line.reason and line.source, line.name
        assert not line.reason.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_the_server_reads_every_variable(name):
    for variable, value in named(name).environment().items():
        setting = knowledge().server[variable]
        assert setting.reads == "yes"
        assert setting.misread(value) is None


@pytest.mark.parametrize("name", NAMES)
def test_no_request_makes_the_server_load_a_model_again(name):
    assert not {line.name for line in named(name).request} & RUNNER


@pytest.mark.parametrize("name", NAMES)
def test_the_client_lets_through_what_the_server_runs_at_once(name):
    settings = tuned(AegisSettings(), name)
    assert settings.max_concurrency == int(named(name).environment()["OLLAMA_NUM_PARALLEL"])
    assert settings.keep_alive == named(name).environment()["OLLAMA_KEEP_ALIVE"]


def test_the_compose_file_of_this_repository_is_the_tuning_of_that_machine():
    services = yaml.safe_load((ROOT / "docker-compose.dgx-spark.yml").read_text())["services"]
    assert services["ollama"]["environment"] == named("dgx-spark").environment()


def test_auto_changes_nothing():
    """The client's machine says nothing about the server's."""
    settings = AegisSettings(keep_alive="1m")
    assert tuned(settings, AUTO) is settings


def test_what_somebody_set_stays():
    settings = tuned(AegisSettings(keep_alive="1m", deadline_s=9.0), "cpu")
    assert (settings.keep_alive, settings.deadline_s, settings.read_timeout_s) == ("1m", 9.0, 600.0)


@pytest.mark.parametrize("name", ["", "dgx", "DGX-SPARK"])
def test_a_tuning_that_does_not_exist_is_refused_with_those_that_do(name):
    with pytest.raises(AegisOptionError, match="'auto' or one of dgx-spark, workstation, laptop, cpu"):
        ChatAegis("m", tuning=name)


def test_a_model_of_a_named_tuning_sends_its_keep_alive_and_nothing_else():
    with ScriptedOllama("qwen3:8b") as server:
        for tuning in (AUTO, "dgx-spark"):
            ChatAegis("qwen3:8b", base_url=server.base_url, tuning=tuning, temperature=0).invoke("How many?")
        plain, spark = (request.body for request in server.requests if request.path == "/api/chat")
    assert (plain["keep_alive"], spark["keep_alive"]) == ("30m", "24h")
    assert {**plain, "keep_alive": ""} == {**spark, "keep_alive": ""}


def test_a_tuning_does_not_change_what_answers_are_cached_under():
    assert ChatAegis("m")._get_llm_string() == ChatAegis("m", tuning="dgx-spark")._get_llm_string()


def test_an_argument_wins_over_the_tuning():
    model = ChatAegis("m", tuning="cpu", keep_alive="2m", max_concurrency=3, timeout=7)
    assert (model._defaults().keep_alive, model._slots) == ("2m", 3)
    assert model._endpoint.timeouts.deadline_s == 7


# -- The server's environment -------------------------------------------------------------------------------------


def values(environment):
    return {line.name: str(line.value) for line in environment.lines}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", NAMES)
def test_no_variable_is_written_that_the_release_ignores(name, release):
    """And none is left out without a word."""
    environment = server_environment(named(name), version=release)
    for variable in values(environment):
        assert knowledge().setting(variable, release).status == "read", variable
    missing = set(named(name).environment()) - set(values(environment))
    assert all(any(note.startswith(f"{variable} is left out") for note in environment.notes) for variable in missing)


def test_the_newest_release_reads_all_of_it():
    assert values(server_environment(named("dgx-spark"))) == named("dgx-spark").environment()


def test_slots_and_window_are_those_of_the_plan_and_the_client_follows():
    layout = Layout(slots=3, context=16384, prompt_cache_mib=2048)
    environment = server_environment(named("dgx-spark"), layout=layout, fitted_to="llama3.3:70b")
    told = values(environment)
    assert (told["OLLAMA_NUM_PARALLEL"], told["OLLAMA_CONTEXT_LENGTH"]) == ("3", "16384")
    assert told["LLAMA_ARG_CACHE_RAM"] == "2048"
    reasons = {line.name: line.reason for line in environment.lines}
    assert "what fits beside llama3.3:70b" in reasons["OLLAMA_NUM_PARALLEL"]
    assert "262,144" not in reasons["OLLAMA_CONTEXT_LENGTH"]  # a reason for another number
    assert {line.name: line.value for line in environment.client}["max_concurrency"] == 3


@pytest.mark.parametrize("release", ["0.30.0", "0.32.15", "0.33.0-rc2", "0.40.0"])
def test_todays_runner_decides_about_flash_attention_itself(release):
    line, why = flash_attention_line(release, "auto")
    assert line is None
    assert "sm_121" in why


@pytest.mark.parametrize("release", ["0.5.0", "0.12.3", "0.24.0"])
def test_older_releases_are_told_to_use_flash_attention(release):
    line, _ = flash_attention_line(release, "auto")
    assert (line.name, line.value) == ("OLLAMA_FLASH_ATTENTION", "1")
    assert flash_attention_line(release, "auto", gpu=False)[0] is None
    quantised, _ = flash_attention_line(release, "auto", kv_type="q8_0", gpu=False)
    assert quantised.value == "1"  # else the type would be ignored


@pytest.mark.parametrize("release", RELEASES)
def test_flash_attention_is_switched_off_only_with_a_plain_cache(release):
    """With q8_0 every model would fail to load."""
    tuning = named("dgx-spark")
    off = server_environment(tuning, version=release, flash_attention="off", layout=Layout(slots=1, context=4096))
    assert values(off)["OLLAMA_FLASH_ATTENTION"] == "0"
    assert "OLLAMA_KV_CACHE_TYPE" not in values(off)
    with pytest.raises(AegisConfigError, match="--kv-cache f16"):
        server_environment(
            tuning, version=release, flash_attention="off", layout=Layout(slots=1, context=4096, kv_type="q8_0")
        )


def test_releases_that_do_not_know_the_gb10_are_told_so():
    assert any("sm_121" in note for note in server_environment(named("dgx-spark"), version="0.11.10").notes)
    assert any("memory" in note for note in server_environment(named("dgx-spark"), version="0.12.5").notes)
    assert any("stall" in note for note in server_environment(named("dgx-spark"), version="0.30.6").notes)
    for name, release in (("dgx-spark", "0.24.0"), ("dgx-spark", "0.32.15"), ("workstation", "0.12.5")):
        assert not any("or later." in note for note in server_environment(named(name), version=release).notes)


def test_a_release_outside_of_the_table_is_said_to_be_one():
    assert any("outside of what is known" in note for note in server_environment(named("cpu"), version="1.2.0").notes)


# -- Files --------------------------------------------------------------------------------------------------------

environments = st.builds(
    server_environment,
    st.sampled_from(list(tunings().values())),
    version=st.sampled_from(RELEASES),
    flash_attention=st.sampled_from(["auto", "on"]),
    layout=st.builds(
        Layout,
        slots=st.integers(1, 16),
        context=st.integers(4096, 32768),
        kv_type=st.sampled_from(kv_types()),
        prompt_cache_mib=st.integers(0, 8192),
    ),
    gpu=st.booleans(),
)


@settings(deadline=None, max_examples=60)
@given(environments, st.sampled_from(NAMES))
def test_every_file_reads_back_as_what_was_meant_and_the_doctor_is_content(tmp_path_factory, environment, name):
    directory, head = tmp_path_factory.mktemp("files"), ["A file.", "With `head` & more."]
    (directory / ".env").write_text(as_env(environment, head))
    variables = read_env_file(directory / ".env")
    assert {n: v.value for n, v in variables.items()} == values(environment)
    findings = list(check_variables(variables, server_only=False, version=environment.version))

    drop_in = as_systemd(environment, head)
    assert "[Service]\n" in drop_in
    assigned = [shlex.split(found)[0] for found in re.findall(r"(?m)^Environment=(.*)$", drop_in)]
    assert dict(each.split("=", 1) for each in assigned) == values(environment)

    path = directory / "compose.yml"
    path.write_text(as_compose(environment, head, host_of(name).room))
    parsed = yaml.safe_load(path.read_text())
    assert parsed["services"]["ollama"]["environment"] == values(environment)
    findings += check_compose(path, {})
    # That a release is old is said of it, whatever the file: it was asked for.
    assert [f for f in findings if f.severity in ("warning", "error") and f.code != "version"] == []


@pytest.mark.parametrize("name", NAMES)
def test_compose_files_are_valid(name):
    schema = json.loads((ROOT / "tests/compose-spec.schema.json").read_text())
    host = host_of(name)
    text = as_compose(server_environment(host.tuning), ["x"], host.room)
    compose = yaml.safe_load(text)
    jsonschema.Draft7Validator(schema).validate(compose)
    service = compose["services"]["ollama"]
    assert ("deploy" in service, "mem_limit" in service) == (host.room.gpu, host.room.shared)
    assert service["ports"] == ["127.0.0.1:11434:11434"]


def test_every_line_of_a_file_has_its_reason_above_it():
    environment = server_environment(named("cpu"))
    for text in (
        as_env(environment, []),
        as_systemd(environment, []),
        as_compose(environment, [], host_of("cpu").room),
    ):
        lines = [line.strip() for line in text.splitlines()]
        for variable in values(environment):
            (at,) = (n for n, line in enumerate(lines) if re.match(rf'(Environment=")?{variable}[=:]', line))
            assert lines[at - 1].startswith("#")


def test_a_drop_in_quotes_what_systemd_would_read_otherwise():
    odd = replace(
        server_environment(named("cpu")), lines=(Line(name="A", value='50% of "C:\\x"', reason="r", source="s"),)
    )
    assert 'Environment="A=50%% of \\"C:\\\\x\\""' in as_systemd(odd, [])


# -- This machine -------------------------------------------------------------------------------------------------


def gpu_says(monkeypatch, tmp_path, text, code=0):
    """Put an nvidia-smi on the path that prints `text`."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{text}'\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("said", "name", "memory"),
    [
        ("NVIDIA GB10, [N/A]\n", "NVIDIA GB10", None),
        ("NVIDIA GeForce RTX 4090, 24564\n", "NVIDIA GeForce RTX 4090", 24564 * 2**20),
        ("NVIDIA L40S, 46068\nNVIDIA L40S, 46068\n", "NVIDIA L40S", 2 * 46068 * 2**20),
        ("No devices were found\n", None, None),
        ("", None, None),
    ],
)
def test_gpus_are_seen(monkeypatch, tmp_path, said, name, memory):
    """A GB10 reports no memory of its own: llama.cpp benches/dgx-spark.md shows nvidia-smi saying "Not Supported"."""
    gpu_says(monkeypatch, tmp_path, said)
    found = detect()
    assert (found.gpu, found.gpu_memory_bytes) == (name, memory)
    assert found.memory_bytes > 2**30


def test_a_driver_that_fails_is_no_gpu(monkeypatch, tmp_path):
    gpu_says(monkeypatch, tmp_path, "NVIDIA-SMI has failed, because\n", code=9)
    assert detect().gpu is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert detect().gpu is None


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (Machine(memory_bytes=128 * GB, gpu="NVIDIA GB10"), "dgx-spark"),
        (Machine(memory_bytes=64 * GB, gpu="NVIDIA GeForce RTX 4090", gpu_memory_bytes=25 * GB), "workstation"),
        (Machine(memory_bytes=32 * GB, gpu="NVIDIA RTX 4060", gpu_memory_bytes=8 * GB, battery=True), "laptop"),
        (Machine(memory_bytes=16 * GB, battery=True), "laptop"),
        (Machine(memory_bytes=256 * GB), "cpu"),
    ],
)
def test_auto_is_the_tuning_of_this_machine(monkeypatch, found, name):
    monkeypatch.setattr(machine, "detect", lambda: found)
    host = host_of(AUTO)
    assert host.tuning.name == name
    assert host.room.shared == (found.gpu_memory_bytes is None)
    assert host.room.memory_bytes == (found.gpu_memory_bytes or found.memory_bytes)
    assert host.bandwidth_gb_s == (273 if name == "dgx-spark" else None)


def test_memory_and_what_stays_free():
    """A quarter of what is shared, as in the compose file of this repository; 1 GiB of a card's own."""
    assert host_of("dgx-spark").room.budget_bytes == 96 * GB
    assert host_of("workstation", memory_gb=24).room.budget_bytes == 24 * GB - 2**30
    assert host_of("cpu", memory_gb=64, reserve_gb=10).room.budget_bytes == 54 * GB


@pytest.mark.parametrize(
    "arguments",
    [{"memory_gb": 0}, {"memory_gb": float("nan")}, {"bandwidth_gb_s": -1}, {"memory_gb": 8, "reserve_gb": 8}],
)
def test_impossible_memory_is_refused(arguments):
    with pytest.raises(AegisConfigError, match=r"--memory-gb|--bandwidth-gb-s"):
        host_of("cpu", **arguments)


def test_the_table_of_releases_begins_where_these_do():
    assert version_tuple(RELEASES[0]) == version_tuple(knowledge().oldest)
    assert RELEASES[-1] == knowledge().verified
