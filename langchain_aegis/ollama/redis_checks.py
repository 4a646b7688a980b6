"""Judge a running Redis: search, memory, eviction, login. Nothing is written into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError
from redis.retry import Retry

from langchain_aegis.ollama.findings import Finding
from langchain_aegis.ollama.redis_service import EVICTS, FULL, UNBOUNDED
from langchain_aegis.sentinel_urls import sentinels_of
from langchain_aegis.settings import AegisSettings, redact_url

TIMEOUT_S = 3.0


def check_redis_server(settings: AegisSettings) -> Iterator[Finding]:
    """Ask the Redis that the settings name, with short timeouts."""
    where = redact_url(settings.redis_url)
    told: dict[str, Any] = {
        "socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S, "protocol": 2,
        "retry": Retry(NoBackoff(), 0), "decode_responses": True,
    }  # fmt: skip
    try:
        watching = sentinels_of(settings.redis_url)
        client = redis.Redis.from_url(settings.redis_url, **told) if watching is None else watching.client(**told)
    except ValueError as exc:
        yield _down(where, f"the address cannot be read ({exc})", "Set REDIS_URL, e.g. redis://127.0.0.1:6379.")
        return
    try:
        client.ping()
        server = _info(client, "server")
        memory = _info(client, "memory") | _info(client, "stats")
        try:
            indexes: list[str] | None = client.execute_command("FT._LIST")
        except NoPermissionError:
            raise
        except ResponseError:
            indexes = None
    except (AuthenticationError, NoPermissionError) as exc:
        yield _down(where, f"Redis refuses the login or a command ({exc})", "See docker/users.acl for what the "
                    "cache needs, and put user and password into REDIS_URL.")  # fmt: skip
        return
    except (RedisError, OSError) as exc:
        yield _down(where, f"no Redis ({type(exc).__name__}: {exc})", "Start it, or set REDIS_URL.")
        return
    finally:
        client.close()
    yield from judge_redis(where, server, memory, indexes, settings.namespace)
    parts = urlsplit(settings.redis_url)
    if parts.scheme in ("redis", "rediss") and not parts.password:
        far = parts.hostname not in (None, "localhost", "127.0.0.1", "::1")
        yield Finding(
            code="redis-no-password", severity="error" if far else "info", where=where,
            what="Redis answers without a password",
            why=f"Whoever reaches it {'over the network ' if far else ''}may read and change all cached answers.",
            fix="Set requirepass or an ACL (docker/users.acl), and put the password into REDIS_URL.",
        )  # fmt: skip


def judge_redis(
    where: str, server: Mapping[str, Any], memory: Mapping[str, Any], indexes: list[str] | None, namespace: str
) -> Iterator[Finding]:
    """Judge what INFO and FT._LIST said.

    Args:
        where: The server's address, without a login.
        server: INFO server.
        memory: INFO memory and INFO stats; empty if this user may not ask.
        indexes: Names of the search indexes; None where there is no search.
        namespace: First part of our own.
    """
    version = server.get("valkey_version") or server.get("redis_version") or "of an unknown version"
    name = f"{'Valkey' if 'valkey_version' in server else 'Redis'} {version}"
    bound = int(memory.get("maxmemory") or 0)
    policy = str(memory.get("maxmemory_policy") or "")
    if indexes is None:
        yield Finding(
            code="redis-search", severity="warning", where=where, what=f"{name} without search",
            why="The semantic tier compares the newest 2000 vectors of a scope in the process.",
            fix="Use Redis 8 or later, which has search.",
        )  # fmt: skip
    else:
        ours = sum(index.startswith(f"{namespace}:") for index in indexes)
        yield Finding(
            code="redis-search", severity="ok", where=where,
            what=f"{name} with search, {ours} {'index' if ours == 1 else 'indexes'} of namespace {namespace}",
        )  # fmt: skip
    if not memory:
        yield Finding(
            code="redis-memory", severity="info", where=where,
            what="unknown: this user may not ask for the memory bound", fix="Allow the command INFO.",
        )  # fmt: skip
    elif not bound:
        yield Finding(
            code="redis-memory", severity="warning", where=where,
            what="Redis has no maxmemory: it grows with what is cached", why=UNBOUNDED,
            fix="CONFIG SET maxmemory 2gb, and maxmemory-policy volatile-lru; then CONFIG REWRITE.",
        )  # fmt: skip
    else:
        yield Finding(
            code="redis-memory", severity="ok", where=where,
            what=f"{_mib(memory.get('used_memory'))} used of maxmemory {_mib(bound)}, {policy}",
        )  # fmt: skip
    if bound and policy == "noeviction":
        yield Finding(
            code="redis-eviction", severity="warning", where=where, what="maxmemory with the policy noeviction",
            why=FULL, fix="CONFIG SET maxmemory-policy volatile-lru",
        )  # fmt: skip
    elif bound and policy.startswith("allkeys"):
        yield Finding(
            code="redis-eviction", severity="warning", where=where,
            what=f"Redis may evict what has no TTL (maxmemory-policy {policy})", why=EVICTS,
            fix="CONFIG SET maxmemory-policy volatile-lru",
        )  # fmt: skip
    elif bound and (evicted := int(memory.get("evicted_keys") or 0)):
        yield Finding(
            code="redis-eviction", severity="info", where=where,
            what=f"{evicted} entries were evicted since it started",
            why="Answers go before their time, and are generated again.", fix="CONFIG SET maxmemory to more.",
        )  # fmt: skip


def _mib(size: Any) -> str:
    return f"{int(size or 0) / 2**20:.0f} MiB"


def _info(client: redis.Redis, section: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = client.info(section)
    except (NoPermissionError, ResponseError):  # a user who may not ask; the rest is still worth knowing
        return {}
    return found


def _down(where: str, what: str, fix: str) -> Finding:
    return Finding(
        code="redis-search", severity="error", where=where, what=what,
        why="Nothing is cached; calls go to the model.", fix=fix,
    )  # fmt: skip
