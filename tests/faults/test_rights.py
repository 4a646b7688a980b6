"""The shipped user of Redis may do all that the cache does, and nothing else."""

import asyncio
import hashlib
import re
import secrets
from pathlib import Path

import pytest
import redis
from caches import MODEL, Driver, Words, chat, prompt, text_of
from conftest import wait_until

from langchain_aegis import AegisEmbeddingCache, AegisEmbeddings, AegisSemanticCache, aegis_scope
from langchain_aegis.nearby import LIBRARY
from langchain_aegis.testing import ScriptedOllama
from langchain_aegis.writes import the_writer

ACL = (Path(__file__).resolve().parent.parent.parent / "docker/users.acl").read_text()
STORED, ASKED, THIRD = "How long may I keep a book?", "How long can I keep a book?", "What does a card cost?"
# How the search gets into Redis: the user loads it, an administrator has, or a script does the same.
WAYS = {
    "as shipped": lambda rules: rules,
    "loaded by an administrator": lambda rules: [r for r in rules if r != "+function|load"],
    "as a script": lambda rules: [r for r in rules if r not in ("+function|load", "+fcall_ro")],
}


@pytest.fixture
def user(server):
    """Makes the user of the shipped file on a server, with rules that may be changed; returns its address."""
    made = []

    def make(change=lambda rules: rules, at=server):
        password = secrets.token_hex(16)
        (line,) = re.findall(r"^user aegis (.*)$", ACL, re.M)
        digest = hashlib.sha256(password.encode()).hexdigest()
        at.client.execute_command("ACL", "SETUSER", "aegis", "reset", *change(_known(at, line, digest)))
        at.client.execute_command("ACL", "LOG", "RESET")
        made.append(at)
        return f"unix://aegis:{password}@{at.socket}"

    yield make
    for at in made:
        at.client.execute_command("ACL", "DELUSER", "aegis")


def _known(server, line, digest):
    """The rules of the file; a server without search knows no commands of it."""
    rules = line.replace("PASSWORD_SHA256", digest).split()
    return [rule for rule in rules if server.has_search or not rule.startswith("+ft.")]


def refused(server):
    return [dict(zip(told[::2], told[1::2], strict=True)) for told in server.client.execute_command("ACL", "LOG")]


def everything(cache, driver, path):
    """Do all that a cache can do, blocking or awaited."""
    driver.clear()
    with aegis_scope(tenant="acme", user="bob", task="faq", sources=["a.md"]):
        assert driver.lookup(prompt(STORED), MODEL) is None
        driver.update(prompt(STORED), MODEL, chat("28 days"))
        assert text_of(driver.lookup(prompt(STORED), MODEL)) == "28 days"
        found = driver.lookup(prompt(ASKED), MODEL)
        assert text_of(found) == "28 days", cache.stats().reasons
        assert cache.explain(ASKED, llm_string=MODEL) is not None
        assert cache.explain(prompt=prompt("Who is there?"), llm_string=MODEL) is not None
        assert driver.report_wrong(found[0].message) is True
        assert driver.lookup(prompt(STORED), MODEL) is None
        driver.update(prompt(STORED), MODEL, chat("28 days, again"))
        with aegis_scope(cache="refresh"):
            assert driver.lookup(prompt(STORED), MODEL) is None
            driver.update(prompt(STORED), MODEL, chat("28 days, anew"))
        for number in range(8):
            driver.update(prompt(f"What does item {number} cost?"), MODEL, chat("4 euros"))
            assert text_of(driver.lookup(prompt(f"What does item {number} cost?"), MODEL)) == "4 euros"
    assert the_writer.drain(timeout_s=10)
    assert len(list(cache.entries())) == 5  # as many as the tenant may have
    assert cache.health().redis
    cache.validate()
    assert cache.export(path) == 5
    assert cache.import_(path).taken == 5
    for told in (
        {"sources": ["a.md"]}, {"tenant": "acme"}, {"user": "bob"}, {"task": "faq"}, {"model": "m"},
        {"older_than_s": 3_000}, {"near": STORED}, {"tenant": "acme", "user": "bob"},
    ):  # fmt: skip
        driver.invalidate(**told)
    cache.opt_out("bob")
    with aegis_scope(tenant="acme", user="bob"):
        assert driver.lookup(prompt(THIRD), MODEL) is None
    cache.opt_in("bob")
    driver.clear()
    assert the_writer.drain(timeout_s=10)


@pytest.mark.row(126)
@pytest.mark.parametrize("awaited", [False, True], ids=["blocking", "awaited"])
@pytest.mark.parametrize("way", [*WAYS, "without search"])
def test_everything_runs_with_the_rights_of_the_shipped_user(request, user, tmp_path, awaited, way):
    server = request.getfixturevalue("plain_server" if way == "without search" else "server")
    url = user(WAYS.get(way, WAYS["as shipped"]), server)
    if way == "loaded by an administrator":
        server.client.execute_command("FUNCTION", "LOAD", LIBRARY)
    told = {"namespace": "aegis", "min_similarity": 0.6, "op_budget_s": 5, "embed_budget_s": 10, "lease_s": 5,
            "keep_questions": True, "max_entries_per_tenant": 5, "stale_if_error_s": 60}  # fmt: skip
    driver = Driver(AegisSemanticCache(url, Words(), **told), awaited)
    everything(driver.cache, driver, tmp_path / "answers")
    wait_until(lambda: not server.entries(), what="the sweep")
    if server.has_search:
        assert server.indexes()
    assert driver.cache.stats().semantic_hits >= 1
    driver.end()
    # To try whether functions may be loaded, and to be told that they may not, is how the way is found.
    tried = {"as a script": {b"fcall_ro"}}.get(way, set())
    assert {entry[b"object"].lower() for entry in refused(server)} <= tried, refused(server)


@pytest.mark.row(126)
def test_vectors_are_kept_with_the_rights_of_the_shipped_user(server, user):
    url = user()
    with ScriptedOllama() as ollama:
        cache = AegisEmbeddingCache(redis_url=url, namespace="aegis", op_budget_s=5)
        for make in (AegisEmbeddings, AegisEmbeddings):
            model = make("scripted-embed", base_url=ollama.base_url, cache=cache)
            model.embed_documents(["a", "b"])
            asyncio.run(model.aembed_query("a"))
        other = AegisEmbeddingCache(redis_url=url, namespace="aegis", op_budget_s=5)  # another process
        AegisEmbeddings("scripted-embed", base_url=ollama.base_url, cache=other).embed_query("a")
        assert other.clear() == 2
    assert refused(server) == []


@pytest.mark.row(126)
@pytest.mark.parametrize("more", [[], ["+client|tracking"], ["+client|tracking", "+subscribe", "&aegis:*"]])
def test_the_local_tier_needs_one_right_more_and_is_left_out_without_it(server, user, new_cache, stored, more):
    """It is not shipped: who may be told of changed names may be told of all of them, other users' too."""
    url = user(lambda rules: [*rules, *more])
    cache = new_cache(url=url, namespace="aegis", op_budget_s=5, local_tier_bytes=1_000_000)
    cache.update(prompt(STORED), MODEL, chat("28 days"))
    stored()

    def local_hits():
        assert text_of(cache.lookup(prompt(STORED), MODEL)) == "28 days"
        return cache.stats().local.hits

    if more:
        wait_until(local_hits, what="a hit of the local tier")
    else:
        assert not any(local_hits() for _ in range(20))
        wait_until(lambda: refused(server), what="the refusal")
    assert {entry[b"object"] for entry in refused(server)} <= {b"client|tracking", b"subscribe", b"aegis:{p00}:pushes"}


REFUSED = [
    ("GET", "other"), ("SET", "other", "1"), ("HGETALL", "other:aegis:{p00}:e:1"), ("HSET", "aegi", "a", "b"),
    ("DEL", "AEGIS:{p00}:e:1"), ("RENAME", "aegis:{p00}:e:1", "other"), ("ZINTERSTORE", "aegis:x", 1, "other"),
    ("ZINTERSTORE", "other", 1, "aegis:x"), ("EVAL", "return redis.call('GET', 'other')", 0),
    ("EVAL", "return redis.call('GET', KEYS[1])", 1, "other"), ("EVAL", "return redis.call('FLUSHALL')", 0),
    ("EVAL", "return redis.call('CONFIG', 'GET', '*')", 0), ("FLUSHALL",), ("FLUSHDB",), ("KEYS", "*"), ("MONITOR",),
    ("CONFIG", "GET", "*"), ("CONFIG", "SET", "dir", "/tmp"), ("ACL", "LIST"), ("ACL", "SETUSER", "x"),
    ("ACL", "WHOAMI"), ("MODULE", "LIST"), ("MODULE", "LOAD", "/tmp/x.so"), ("SAVE",), ("BGSAVE",), ("BGREWRITEAOF",),
    ("DEBUG", "SLEEP", 0), ("SHUTDOWN", "NOSAVE"), ("REPLICAOF", "127.0.0.1", 1), ("SLOWLOG", "GET"),
    ("CLIENT", "LIST"), ("CLIENT", "KILL", "1"), ("CLIENT", "PAUSE", 1), ("FUNCTION", "FLUSH"), ("FUNCTION", "LIST"),
    ("SCRIPT", "FLUSH"), ("PUBLISH", "c", "x"), ("SUBSCRIBE", "c"), ("MIGRATE", "127.0.0.1", 1, "aegis:x", 0, 1),
    ("DUMP", "aegis:x"), ("RESTORE", "aegis:x", 0, "x"), ("COPY", "aegis:x", "other"), ("SWAPDB", 0, 1),
    ("SELECT", 1), ("RANDOMKEY",), ("DBSIZE",), ("OBJECT", "ENCODING", "aegis:x"), ("FT.DROPINDEX", "theirs"),
    ("FT.CONFIG", "GET", "*"), ("FT.ALTER", "theirs", "SCHEMA", "ADD", "x", "TAG"), ("FT.SEARCH", "theirs", "*"),
    ("FT.AGGREGATE", "theirs", "*"),
]  # fmt: skip


@pytest.mark.row(126)
def test_other_names_and_commands_are_refused(server, user):
    url = user()
    server.client.set("other", "theirs")
    server.client.hset("other:1", "name", "theirs")
    server.client.execute_command("FT.CREATE", "theirs", "ON", "HASH", "PREFIX", 1, "other:", "SCHEMA", "name", "TEXT")
    with redis.Redis.from_url(url, protocol=2, socket_timeout=10) as client:
        client.hset("aegis:{p00}:x", "a", "1")
        assert client.hget("aegis:{p00}:x", "a") == b"1"
        allowed = []
        for command in REFUSED:
            try:
                told = client.execute_command(*command)
            except redis.RedisError as exc:
                if not re.search(r"(?i)permission|NOPERM|ACL|not allowed", str(exc)):
                    allowed.append((command, exc))
            else:
                allowed.append((command, told))
    assert allowed == []
    assert server.client.get("other") == b"theirs"


@pytest.mark.row(126)
def test_a_namespace_of_others_costs_its_user_hits_and_no_call(server, user, new_recorder):
    """The file names the namespace "aegis"; whoever uses another one and forgot to say so gets one warning."""
    recorder = new_recorder(url=user(), namespace="theirs")
    for _ in range(2):
        assert recorder.ask("What is the fee of item 7?") is False
    assert not server.entries()
