"""What the benchmark of the cache compares: bare Redis commands, this package's cache, and others if installed.

A system stores items and answers prompts, blocking and awaited. What it returns is checked by the harness, never by
itself. A further one is a subclass of `System` in `SYSTEMS`.
"""

import hashlib
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice
from typing import Any

import numpy
import redis
import redis.asyncio
from cache_filling import fill, multiply
from cache_workload import KNOWN, PROMPTS, Item, generations
from langchain_core.caches import BaseCache
from langchain_core.embeddings import Embeddings

from langchain_aegis import AegisSemanticCache
from langchain_aegis.embedded import EmbeddedRedis
from langchain_aegis.entries import encode_answer

MIN_SIMILARITY = 0.85  # the same for all
FLOOR_CONNECTIONS = 16  # awaited: more than that are slower on two cores, so that would be no floor
_BUDGET_S = 60.0  # for filling: a pipeline of many answers is slower than one


@dataclass(frozen=True, slots=True)
class Place:
    """Where a system works.

    Attributes:
        url: Of the Redis.
        embeddings: What embeds.
        llm_string: What LangChain tells of the model.
        dimensions: Of its vectors.
        calibrated: Whether the embedder makes every wrong hit impossible for whoever compares vectors correctly.
        own: Further arguments of this package's cache.
        scope: Returns the arguments of `aegis_scope` in which an item is stored; None: there is none.
    """

    url: str
    embeddings: Embeddings
    llm_string: str
    dimensions: int
    calibrated: bool = True
    own: tuple[tuple[str, Any], ...] = ()
    scope: Callable[[Item], dict[str, Any]] | None = None


class System(ABC):
    """One row of the tables.

    Attributes:
        name: Of its row.
        tiers: Which of "exact" and "semantic" it answers.
        most: It is left out where there are more entries than that.
        own: Whether it is this package's.
        cache: What LangChain's models can be given, once it is open; None: it is no such cache.
    """

    name = ""
    tiers: tuple[str, ...] = ("exact", "semantic")
    most = 10**9
    own = False
    cache: BaseCache | None = None

    def __init__(self, place: Place) -> None:
        self.place = place

    @classmethod
    def missing(cls) -> str:
        """Return the package that it lacks, or ""."""
        return ""

    def errs_by_design(self) -> bool:
        """Whether wrong hits are a finding about it, rather than a failure of the run."""
        return False

    def open(self) -> None:  # noqa: B027  # not every system has something to do here
        """Make what is needed before the first answer is stored."""

    @abstractmethod
    def fill(self, items: Iterable[Item], prepare: Any) -> None:
        """Store many answers, as quickly as may be; `prepare` makes the vectors of a list of items."""

    @abstractmethod
    def lookup(self, prompt: str) -> Any:
        """Return what is found: text, bytes, generations, or None."""

    @abstractmethod
    async def alookup(self, prompt: str) -> Any:
        """Like `lookup`."""

    @abstractmethod
    def update(self, item: Item) -> None:
        """Store an item's answer; called after its prompt was looked up in vain."""

    @abstractmethod
    async def aupdate(self, item: Item) -> None:
        """Like `update`."""

    async def aclose(self) -> None:  # noqa: B027  # not every system has something to do here
        """Close what is open in this event loop."""

    def close(self) -> None:  # noqa: B027  # not every system has something to do here
        """Close the rest."""


# -- the floors: what Redis and its client take, whatever is built on them --


class _Floor(System):
    def open(self) -> None:
        self.client = redis.Redis.from_url(self.place.url, protocol=2)
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            self.place.url, protocol=2, max_connections=FLOOR_CONNECTIONS
        )
        self.aclient = redis.asyncio.Redis(connection_pool=pool)
        self.prefix = f"floor:{self.name[:3]}:"

    def key(self, prompt: str) -> str:
        told = (prompt + self.place.llm_string).encode()
        return f"{self.prefix}a:{hashlib.blake2b(told, digest_size=16).hexdigest()}"

    @abstractmethod
    def commands(self, item: Item) -> list[tuple[Any, ...]]: ...

    def fill(self, items: Iterable[Item], prepare: Any) -> None:
        part: list[Item] = []
        for item in items:
            part.append(item)
            if len(part) == 200:
                self._store(part, prepare)
                part = []
        self._store(part, prepare)

    def _store(self, part: list[Item], prepare: Any) -> None:
        prepare(part)
        pipe = self.client.pipeline(transaction=False)
        for item in part:
            for command in self.commands(item):
                pipe.execute_command(*command)
        pipe.execute()

    def update(self, item: Item) -> None:
        pipe = self.client.pipeline(transaction=False)
        for command in self.commands(item):
            pipe.execute_command(*command)
        pipe.execute()

    async def aupdate(self, item: Item) -> None:
        pipe = self.aclient.pipeline(transaction=False)
        for command in self.commands(item):
            pipe.execute_command(*command)
        await pipe.execute()

    async def aclose(self) -> None:
        await self.aclient.aclose(close_connection_pool=True)

    def close(self) -> None:
        self.client.close()


class FloorGet(_Floor):
    """One GET of the bytes that this package's cache keeps as the answer."""

    name, tiers = "GET", ("exact",)

    def commands(self, item: Item) -> list[tuple[Any, ...]]:
        return [("SET", self.key(PROMPTS.prompt(item.question)), encode_answer(generations(item)), "EX", 3600)]

    def lookup(self, prompt: str) -> Any:
        return self.client.get(self.key(prompt))

    async def alookup(self, prompt: str) -> Any:
        return await self.aclient.get(self.key(prompt))


_FUNCTION = """#!lua name=benchfloor
redis.register_function{function_name='bench_nearest', flags={'no-writes'}, callback=function(keys, args)
  local found = redis.call('FT.SEARCH', args[1], args[2], 'PARAMS', '2', 'v', args[3], 'RETURN', '2', 'd', 'answer',
                           'LIMIT', '0', '1', 'DIALECT', '2')
  if found[1] == 0 then return false end
  local fields = {}
  for i = 1, #found[3], 2 do fields[found[3][i]] = found[3][i + 1] end
  if tonumber(fields.d) > tonumber(args[4]) then return false end
  return redis.call('GET', fields.answer)
end}
"""


class FloorFunction(_Floor):
    """One call of a function on the server: the nearest vector of a scope, and its answer if that is near enough.

    Nothing is checked: no age, no tenant, no guard, no signature.
    """

    name, tiers = "FCALL KNN", ("semantic",)
    index = "floor_idx"

    def errs_by_design(self) -> bool:
        return not self.place.calibrated

    def open(self) -> None:
        super().open()
        self.client.execute_command(
            "FT.CREATE", self.index, "ON", "HASH", "PREFIX", 1, f"{self.prefix}v:", "SCHEMA", "scope", "TAG",
            "vec", "VECTOR", "HNSW", 10, "TYPE", "FLOAT16", "DIM", self.place.dimensions, "DISTANCE_METRIC", "COSINE",
            "M", 8, "EF_CONSTRUCTION", 40,
        )  # fmt: skip
        self.client.function_load(_FUNCTION, replace=True)

    def commands(self, item: Item) -> list[tuple[Any, ...]]:
        name = self.key(PROMPTS.prompt(item.question))
        vector = _float16(self.place.embeddings.embed_query(item.question))
        return [
            ("SET", name, encode_answer(generations(item)), "EX", 3600),
            ("HSET", name.replace(":a:", ":v:"), "scope", "one", "vec", vector, "answer", name),
        ]

    def _call(self, prompt: str) -> tuple[Any, ...]:
        vector = _float16(self.place.embeddings.embed_query(PROMPTS.question(prompt)))
        return self._asked(vector)

    def _asked(self, vector: bytes) -> tuple[Any, ...]:
        query = "(@scope:{one})=>[KNN 1 @vec $v HYBRID_POLICY BATCHES AS d]"
        return ("FCALL_RO", "bench_nearest", 0, self.index, query, vector, 1 - MIN_SIMILARITY)

    def lookup(self, prompt: str) -> Any:
        return self.client.execute_command(*self._call(prompt))

    async def alookup(self, prompt: str) -> Any:
        vector = await self.place.embeddings.aembed_query(PROMPTS.question(prompt))
        return await self.aclient.execute_command(*self._asked(_float16(vector)))


def _float16(vector: Sequence[float]) -> bytes:
    return numpy.asarray(vector, "<f2").tobytes()


# -- LangChain's caches --


class _Cache(System):
    cache: Any

    @abstractmethod
    def make(self) -> Any: ...

    def open(self) -> None:
        self.cache = self.make()

    def fill(self, items: Iterable[Item], prepare: Any) -> None:
        for item in items:
            prepare([item])
            self.update(item)

    def lookup(self, prompt: str) -> Any:
        return self.cache.lookup(prompt, self.place.llm_string)

    async def alookup(self, prompt: str) -> Any:
        return await self.cache.alookup(prompt, self.place.llm_string)

    def update(self, item: Item) -> None:
        self.cache.update(PROMPTS.prompt(item.question), self.place.llm_string, generations(item))

    async def aupdate(self, item: Item) -> None:
        await self.cache.aupdate(PROMPTS.prompt(item.question), self.place.llm_string, generations(item))


class Aegis(_Cache):
    """This package's cache as it is by default: guards, signatures, epochs, budgets, breakers, counters."""

    name, own = "aegis", True

    def make(self) -> AegisSemanticCache:
        return self._make()

    def _make(self, **told: Any) -> AegisSemanticCache:
        lowest = MIN_SIMILARITY if self.place.calibrated else None  # a real embedder has a threshold of its own
        return AegisSemanticCache(
            self.place.url, self.place.embeddings, namespace="bench", min_similarity=lowest,
            **{**dict(self.place.own), **told},
        )  # fmt: skip

    def fill(self, items: Iterable[Item], prepare: Any) -> None:
        coming, seen = iter(items), []
        with self._make(op_budget_s=_BUDGET_S, on_lookup=seen.append) as cache:
            known = list(islice(coming, KNOWN))
            fill(cache, known, self.place.llm_string, prepare=prepare, scope=self.place.scope)
            if rest := sum(1 for _ in coming):
                cache.lookup(PROMPTS.prompt(known[0].question), self.place.llm_string)
                drawn = numpy.random.default_rng(len(known))
                multiply(cache, seen[-1].record, rest, lambda many: self.place.embeddings.around(drawn, many))

    async def aclose(self) -> None:
        await self.cache.aclose()

    def close(self) -> None:
        self.cache.close()


class _LangChainRedis(_Cache):
    most = 10_000

    @classmethod
    def missing(cls) -> str:
        return "" if find_spec("langchain_redis") else "langchain-redis"

    def close(self) -> None:
        self._client.close()


class RedisExact(_LangChainRedis):
    """langchain-redis' exact cache."""

    name, tiers = "RedisCache", ("exact",)

    def make(self) -> Any:
        from langchain_redis import RedisCache

        self._client = redis.Redis.from_url(self.place.url)
        return RedisCache(redis_client=self._client, ttl=3600, prefix="lcr")


class RedisSemantic(_LangChainRedis):
    """langchain-redis' semantic cache; an exact repeat is a hit at distance 0."""

    name = "RedisSemanticCache"

    def errs_by_design(self) -> bool:
        # It embeds all of the prompt, and compares nothing but vectors.
        return not self.place.calibrated

    def make(self) -> Any:
        from langchain_redis import RedisSemanticCache

        self._client = redis.Redis.from_url(self.place.url)
        return RedisSemanticCache(
            self.place.embeddings, redis_client=self._client, distance_threshold=1 - MIN_SIMILARITY, ttl=3600,
            name="lcrs", prefix="lcrs",
        )  # fmt: skip


SYSTEMS: list[type[System]] = [FloorGet, FloorFunction, Aegis, RedisExact, RedisSemantic]


@contextmanager
def private_redis(url: str | None) -> Iterator[str]:
    """Yield the address of an empty Redis without a bound on its memory.

    It listens on a port of the loopback interface: the peers' awaited methods cannot use a unix socket.

    Args:
        url: Use this one instead. It is emptied.
    """
    if url is not None:
        yield url
        return
    with EmbeddedRedis(shared=False) as server, redis.Redis.from_url(server.url) as client:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for name, value in (("maxmemory", 0), ("bind", "127.0.0.1"), ("port", port)):
            client.config_set(name, value)
        yield f"redis://127.0.0.1:{port}"


def versions() -> dict[str, str]:
    """Return the versions of the clients and of the peers that are installed."""
    found = {}
    for name in ("redis", "hiredis", "langchain-core", "langchain-redis", "redisvl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def settled_memory(client: redis.Redis) -> int:
    """Return Redis' memory in bytes, once it no longer changes: an index may still be growing."""
    last, until = -1, time.monotonic() + 30
    while time.monotonic() < until:
        now = int(client.info("memory")["used_memory"])
        if abs(now - last) < 50_000:
            break
        last = now
        time.sleep(0.2)
    return last
