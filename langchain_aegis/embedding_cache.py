"""Vectors of texts that were embedded before, kept in this process and in Redis.

    {ns}:{p00}:emb:<model>:<text>     a byte of version, a MAC of name and vector, and the vector as float32

Both digests in the name are keyed: no text and no model's name stands in Redis. `<model>` stands for the model's own
digest and every option that changes a vector, so a model that was pulled anew finds none of its predecessor's vectors.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from redis.exceptions import RedisError

from langchain_aegis.breaker import Unavailable
from langchain_aegis.cache_options import checked_settings
from langchain_aegis.ciphers import Cipher
from langchain_aegis.connections import Connections
from langchain_aegis.embedding_requests import unpack
from langchain_aegis.errors import AegisConfigError, AegisConnectionError
from langchain_aegis.flows import Flow, arun, run
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.home import load_secret, record_secrets
from langchain_aegis.namespace import Commands
from langchain_aegis.notices import warn_once
from langchain_aegis.seals import derive
from langchain_aegis.settings import AegisSettings

_PLAIN: Final = b"\x01"
_ENCRYPTED: Final = b"\x02"
_MAC: Final = 16
_ASKED_AT_ONCE: Final = 64  # values; of 1,024 dimensions they are a quarter of a megabyte
_REMOVED_AT_ONCE: Final = 500


@dataclass(frozen=True, slots=True)
class EmbeddingCacheStats:
    """What a cache has done since it was made."""

    entries: int  # vectors kept in this process
    memory_hits: int
    redis_hits: int
    misses: int  # texts that the embedder was asked for
    rejected: int  # values in Redis that were damaged, forged, or of another length


class AegisEmbeddingCache:
    """Keeps vectors, for `AegisEmbeddings(cache=...)` and `BatchingEmbeddings(..., cache=...)`; several may share one.

    In this process the vectors used last are kept, 4 bytes per dimension: 40 MB for 10,000 of 1,024 dimensions. With
    a Redis they are shared with other processes, and outlive this one. A Redis that is away, slow or full costs
    `op_budget_s` at most and is a miss, never an error.

    All vectors of an embedder that has a cache are rounded to float32, whether they come from it or not.

    Args:
        max_entries: Most vectors kept in this process.
        redis_url: Redis to keep them in, too, for example `redis://127.0.0.1:6379`; default: none.
        redis: Use this client's server and credentials instead (a `redis.Redis` or `redis.asyncio.Redis`).
        redis_kwargs: Further arguments of redis-py's connections.
        version: Names the state of the model behind an embedder that cannot tell a digest (Ollama's models can).
            Change it when that model, or anything that prepares its texts, is changed.
        ttl_s: How long a vector is kept, in seconds; reading does not prolong it.
        namespace: First part of every name in Redis; default `AEGIS_NAMESPACE` ("aegis").
        op_budget_s: How long one round trip to Redis may take; default `AEGIS_OP_BUDGET_S` (0.1).
        settings: Defaults; else those of the environment.

    Raises:
        AegisConfigError: An argument cannot be used, or the secret that names are made with cannot be read. Nothing is
            connected yet.
    """

    def __init__(
        self,
        *,
        max_entries: int = 10_000,
        redis_url: str | None = None,
        redis: Any = None,
        redis_kwargs: Mapping[str, Any] | None = None,
        version: str | None = None,
        ttl_s: float = 604_800,
        namespace: str | None = None,
        op_budget_s: float | None = None,
        settings: AegisSettings | None = None,
    ) -> None:
        settings = checked_settings(settings, redis_url=redis_url, namespace=namespace, op_budget_s=op_budget_s)
        if isinstance(max_entries, bool) or not isinstance(max_entries, int) or max_entries < 1:
            raise AegisConfigError(f"max_entries must be a whole number of at least 1, got {max_entries!r}")
        if isinstance(ttl_s, bool) or not isinstance(ttl_s, (int, float)) or not 0 < ttl_s < math.inf:
            raise AegisConfigError(f"ttl_s must be a number of seconds above 0, got {ttl_s!r}")
        if version is not None and (not isinstance(version, str) or not version.strip()):
            raise AegisConfigError(f"version must be a text that is not empty, got {version!r}")
        self.version = version
        self._max_entries = max_entries
        self._ttl_s = min(float(ttl_s), 10 * 365 * 86_400.0)
        self._prefix = f"{settings.namespace}:{{p00}}:emb:"
        self._connections: Connections | None = None
        secret = os.urandom(32)  # names within this process need no secret that others have
        signing: tuple[bytes, ...] = ()
        if redis_url is not None or redis is not None:
            self._connections = Connections(
                settings.redis_url, client=redis, budget_s=settings.op_budget_s, kwargs=redis_kwargs
            )
            secret = load_secret(settings)
            signing = record_secrets(settings, secret)
        self._names_key = derive(secret, "embedding names")
        self._mac_keys = [derive(one, "embedding mac") for one in signing]  # the first signs
        self._ciphers = [Cipher(one, "embedding") for one in signing] if settings.encrypt else []
        self._version = _ENCRYPTED if self._ciphers else _PLAIN
        self._entries: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()  # name -> vector, end of its time
        self._counts = dict.fromkeys(("memory_hits", "redis_hits", "misses", "rejected"), 0)
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Take a new lock: another thread of the parent may have held the old one."""
        self._lock = threading.Lock()

    # What users call

    def stats(self) -> EmbeddingCacheStats:
        """Return a snapshot."""
        with self._lock:
            return EmbeddingCacheStats(entries=len(self._entries), **self._counts)

    def clear(self) -> int:
        """Remove every vector, of this process and of the namespace in Redis.

        Returns:
            How many were removed from Redis.

        Raises:
            AegisConnectionError: Redis did not answer; some vectors may still be there.
        """
        self._forget()
        try:
            return run(self._remove(), self.perform)
        except (Unavailable, RedisError) as exc:
            raise AegisConnectionError("Redis did not answer: vectors may still be there, call this again") from exc

    async def aclear(self) -> int:
        """As `clear`."""
        self._forget()
        try:
            return await arun(self._remove(), self.aperform)
        except (Unavailable, RedisError) as exc:
            raise AegisConnectionError("Redis did not answer: vectors may still be there, call this again") from exc

    def close(self) -> None:
        """Close the connections to Redis; may be called again, and a later use opens new ones."""
        if self._connections is not None:
            self._connections.close()

    async def aclose(self) -> None:
        """Close the connections of this event loop and of all threads."""
        if self._connections is not None:
            await self._connections.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copy of an embedder goes on with the same vectors

    def __reduce__(self) -> Any:
        raise TypeError("an AegisEmbeddingCache holds connections and cannot be pickled: make one in each process")

    # What embedders use

    @property
    def shared(self) -> bool:
        """Whether there is a Redis."""
        return self._connections is not None

    def model_key(self, identity: str) -> str:
        """Return the name for a model's vectors, 16 hex characters."""
        return self._digest(identity.encode("utf-8", "surrogatepass"), 8).hex()

    def recall(self, model: str, text: str, dimensions: int | None = None) -> list[float] | None:
        """Return the vector kept in this process, of that many dimensions if told, or None."""
        name = self._name(model, text)
        with self._lock:
            found = self._entries.get(name)
            if found is None:
                return None
            packed, ends = found
            if time.monotonic() >= ends or (dimensions is not None and len(packed) != 4 * dimensions):
                del self._entries[name]
                return None
            self._entries.move_to_end(name)
            self._counts["memory_hits"] += 1
        return unpack(packed)

    def ask_redis(
        self, model: str, texts: Sequence[str], dimensions: int | None = None
    ) -> Flow[dict[str, list[float]]]:
        """Return what Redis has of the vectors of some texts, which is then kept in this process too."""
        found: dict[str, list[float]] = {}
        for start in range(0, len(texts) if self.shared else 0, _ASKED_AT_ONCE):
            asked = texts[start : start + _ASKED_AT_ONCE]
            names = [self._name(model, text) for text in asked]
            try:
                (reply,) = yield Commands((("MGET", *(self._in_redis(name) for name in names)),))
            except Unavailable:
                break
            if isinstance(reply, Exception):
                break
            for text, name, value in zip(asked, names, reply, strict=True):
                if value is None:
                    continue
                packed = self._unseal(name, value, dimensions)
                with self._lock:
                    self._counts["rejected" if packed is None else "redis_hits"] += 1
                if packed is not None:
                    self._remember(name, packed)
                    found[text] = unpack(packed)
        return found

    def keep(self, model: str, vectors: Mapping[str, bytes]) -> Flow[None]:
        """Keep packed vectors by their texts."""
        named = {self._name(model, text): packed for text, packed in vectors.items()}
        for name, packed in named.items():
            self._remember(name, packed)
        if not self.shared or not named:
            return
        ttl_ms = max(1, int(self._ttl_s * 1000))
        try:
            replies = yield Commands(
                tuple(
                    ("SET", self._in_redis(name), self._seal(name, packed), "PX", ttl_ms)
                    for name, packed in named.items()
                )
            )
        except Unavailable:
            return
        if refused := next((reply for reply in replies if isinstance(reply, Exception)), None):
            warn_once("embedding_cache_refused", f"Redis does not keep vectors ({refused}); each process keeps its own")

    def missed(self, count: int) -> None:
        """Count texts that the embedder is asked for."""
        with self._lock:
            self._counts["misses"] += count

    def perform(self, step: Commands) -> list[Any]:
        """Send one round trip. Raises Unavailable."""
        if self._connections is None:
            raise Unavailable("redis_down")
        return self._connections.perform(step)

    async def aperform(self, step: Commands) -> list[Any]:
        """As `perform`, without blocking the event loop."""
        if self._connections is None:
            raise Unavailable("redis_down")
        return await self._connections.aperform(step)

    # Parts

    def _name(self, model: str, text: str) -> bytes:
        return bytes.fromhex(model) + self._digest(model.encode() + text.encode("utf-8", "surrogatepass"), 16)

    def _in_redis(self, name: bytes) -> str:
        return f"{self._prefix}{name[:8].hex()}:{name[8:].hex()}"

    def _digest(self, data: bytes, size: int) -> bytes:
        return hashlib.blake2b(data, key=self._names_key, digest_size=size, person=b"aegis-embed-v1").digest()

    def _sign(self, name: bytes, body: bytes, mac_key: bytes) -> bytes:
        signed = self._in_redis(name).encode() + body  # the name's length is fixed
        return hashlib.blake2b(signed, key=mac_key, digest_size=_MAC, person=b"aegis-vector-v1").digest()

    def _seal(self, name: bytes, packed: bytes) -> bytes:
        body = self._ciphers[0].seal(packed, self._in_redis(name).encode()) if self._ciphers else packed
        return self._version + self._sign(name, body, self._mac_keys[0]) + body

    def _unseal(self, name: bytes, value: object, dimensions: int | None) -> bytes | None:
        """Return a value's vector; None if it is not one that we have put under this name."""
        if not isinstance(value, bytes) or value[:1] != self._version:
            return None
        mac, body = value[1 : 1 + _MAC], value[1 + _MAC :]
        for at, mac_key in enumerate(self._mac_keys):
            if hmac.compare_digest(mac, self._sign(name, body, mac_key)):
                packed = self._ciphers[at].open(body, self._in_redis(name).encode()) if self._ciphers else body
                right = packed and not len(packed) % 4 and dimensions in (None, len(packed) // 4)
                return packed if right else None
        return None

    def _remember(self, name: bytes, packed: bytes) -> None:
        with self._lock:
            self._entries[name] = packed, time.monotonic() + self._ttl_s
            self._entries.move_to_end(name)
            while len(self._entries) > self._max_entries:
                self._entries.popitem(last=False)

    def _forget(self) -> None:
        with self._lock:
            self._entries.clear()

    def _remove(self) -> Flow[int]:
        removed, cursor = 0, 0
        while self.shared:
            (reply,) = yield Commands((("SCAN", cursor, "MATCH", f"{self._prefix}*", "COUNT", _REMOVED_AT_ONCE),))
            if isinstance(reply, Exception):
                raise reply
            cursor = int(reply[0])
            if reply[1]:
                (count,) = yield Commands((("UNLINK", *reply[1]),))
                if isinstance(count, Exception):
                    raise count
                removed += count
            if not cursor:
                break
        return removed
