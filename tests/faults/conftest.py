"""Fixtures of the fault kit. Every test here has a deadline, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from pathlib import Path

import pytest
from conftest import short_directory

from faults.proxy import Proxy
from faults.recorder import Recorder
from faults.redis_process import RedisProcess
from faults.watch import deadline, nothing_left
from langchain_aegis import AegisSemanticCache
from langchain_aegis.notices import forget_warnings
from langchain_aegis.writes import the_writer

DEADLINE_S = 60.0  # of a whole test; `@pytest.mark.deadline(s)` sets another
ROUNDS = int(os.environ.get("AEGIS_FAULT_ROUNDS", "0"))  # of those tests that may go on for long; 0: a few


@pytest.fixture(autouse=True)
def _has_a_deadline(request):
    told = request.node.get_closest_marker("deadline")
    with deadline(told.args[0] if told is not None else DEADLINE_S):
        yield


@pytest.fixture(autouse=True)
def _warnings_are_said_again():
    forget_warnings()


@pytest.fixture(scope="session")
def _one_redis(_clean_environment):
    with short_directory() as path, RedisProcess(path) as server:
        yield server


@pytest.fixture
def server(_one_redis):
    """A Redis with search that nothing has happened to yet."""
    _one_redis.heal()
    yield _one_redis
    _one_redis.heal()


@pytest.fixture(scope="session")
def _one_plain_redis(_clean_environment):
    with short_directory() as path, RedisProcess(path, search=False) as server:
        yield server


@pytest.fixture
def plain_server(_one_plain_redis):
    """The same without the search module."""
    _one_plain_redis.heal()
    yield _one_plain_redis
    _one_plain_redis.heal()


@pytest.fixture
def new_server(_clean_environment):
    """Makes servers of one's own: `new_server(search=..., **options)`."""
    made = []

    def make(**told):
        made.append(RedisProcess(Path(tempfile.mkdtemp(prefix="aeg-", dir="/tmp")), **told))
        return made[-1]

    yield make
    for server in made:
        server.close()
        shutil.rmtree(server.path, ignore_errors=True)


@pytest.fixture
def proxy(server):
    """A network between a client and `server`."""
    with Proxy(str(server.socket)) as proxy:
        yield proxy


@pytest.fixture
def new_cache(server):
    """Makes caches, of the exact tier unless told: `new_cache(url=..., **options)`.

    Redis is given long, lest a busy machine has a hit look like a miss; where it is about time, a test says
    `**PRODUCTION`.
    """
    made = []

    def make(url=None, embeddings=None, **told):
        options = {"namespace": f"x{uuid.uuid4().hex[:8]}", "require_tenant": False, "op_budget_s": 5, **told}
        cache = AegisSemanticCache(url or server.unix_url, embeddings, **options)
        if embeddings is None:
            cache._engine.embedder._make = lambda: None
        made.append(cache)
        return cache

    yield make
    for cache in made:
        cache.close()


@pytest.fixture
def new_recorder(new_cache):
    """Makes recorders over a cache of `new_cache`; at the end every answer was right and none was missing."""
    made = []

    def make(cache=None, name="speaking", alike=lambda question: question, **told):
        made.append(Recorder(cache if cache is not None else new_cache(**told), name, alike))
        return made[-1]

    yield make
    for recorder in made:
        recorder.assert_right()


@pytest.fixture
def rounds():
    """A function: how many rounds to make of what may go on for long, by default."""
    return lambda few: ROUNDS or few


@pytest.fixture
def stored():
    """A function that waits until what was told to be stored is stored."""

    def wait():
        assert the_writer.drain(timeout_s=10)

    return wait


@pytest.fixture
def leaves_nothing():
    """Fails if what comes after it leaves threads or descriptors behind."""
    with nothing_left():
        yield
