"""The one place that knows Redis: names, commands, scripts.

Everything is written once, as flows: generators that yield `Commands` (one round trip each) and are sent the replies.
An error reply is sent as a value, so that a flow decides what it means; a connection that fails is thrown into it.

    {ns}:{p00}:e:<exact>              a record (hash), see `entries`
    {ns}:{p00}:epochs                 incarnation, clock, and when each thing was last invalidated (hash)
    {ns}:{p00}:z:<thing>              the entries of a tenant, user or source (sorted set by expiry)
    {ns}:{p00}:z                      the names of the tenants' sets
    {ns}:{p00}:idx:<embedder8>:v1     the search index, where there is search
    {ns}:{p00}:v:<scope>:<embedder8>  the vectors of a scope (hash), where there is none

The braces around the partition are literal: a lookup is one shard's work. Only digests stand in names and queries.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from langchain_aegis.entries import Record, unseal
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.flows import Flow
from langchain_aegis.notices import warn_once
from langchain_aegis.replies import (
    as_pairs,
    as_text,
    error_kind,
    is_missing_index,
    is_unknown_command,
    popped_members,
    raise_error,
)  # fmt: skip
from langchain_aegis.vectors import similarities


@dataclass(frozen=True, slots=True)
class Commands:
    """Commands that are sent together, in one round trip; answered by a list of replies."""

    each: tuple[tuple[Any, ...], ...]


SCOPE_VECTORS: Final = 2_000  # without search: so many vectors of a scope are compared, the newest
_UNLINK_CHUNK: Final = 200  # unlinking an indexed vector costs the server's only thread about half a millisecond

# Store a record if nothing that it belongs to was invalidated since its answer's lookup began.
# KEYS: record, epochs, registry of sets, [scope's vectors], sets...   ARGV: see `Store.put`.
_PUT = """
local record, epochs, registry = KEYS[1], KEYS[2], KEYS[3]
local id, clock, now, ttl, expires = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5]
local tenanted, member, limit, vec = ARGV[6], ARGV[7], tonumber(ARGV[8]), ARGV[9]
local things, at = tonumber(ARGV[10]), 11
if redis.call('HGET', epochs, 'id') ~= id then return 'lost' end
for i = at, at + things - 1 do
  local dead = redis.call('HGET', epochs, ARGV[i])
  if dead and tonumber(dead) > clock then return 'invalidated' end
end
at = at + things
local fields = {}
for i = at, #ARGV do fields[#fields + 1] = ARGV[i] end
redis.call('UNLINK', record)
redis.call('HSET', record, unpack(fields))
redis.call('PEXPIRE', record, ttl)
if tenanted == '1' then redis.call('HSET', epochs, 'tenanted', '1') end
local first = 4
if limit > 0 then
  first = 5
  if redis.call('HLEN', KEYS[4]) >= limit + math.ceil(limit / 10) then
    local all, ages = redis.call('HGETALL', KEYS[4]), {}
    for i = 1, #all, 2 do ages[#ages + 1] = {string.sub(all[i + 1], 1, 16), all[i]} end
    table.sort(ages, function(a, b) return a[1] < b[1] end)
    for i = 1, #ages - limit do redis.call('HDEL', KEYS[4], ages[i][2]) end
  end
  redis.call('HSET', KEYS[4], member, vec)
  if redis.call('PTTL', KEYS[4]) < tonumber(ttl) then redis.call('PEXPIRE', KEYS[4], ttl) end
end
redis.call('SADD', registry, KEYS[first])
for i = first, #KEYS do
  redis.call('ZREMRANGEBYSCORE', KEYS[i], '-inf', now)
  redis.call('ZADD', KEYS[i], expires, member)
  if redis.call('PTTL', KEYS[i]) < tonumber(ttl) then redis.call('PEXPIRE', KEYS[i], ttl) end
end
return 'stored'
"""

# Move the clock on and mark things as dead up to now. KEYS: epochs.  ARGV: incarnation and fingerprint to use if there
# are none, "1" if things are among them that records list themselves (sources), things...
_INVALIDATE = """
redis.call('HSETNX', KEYS[1], 'id', ARGV[1])
redis.call('HSETNX', KEYS[1], 'fingerprint', ARGV[2])
local clock = redis.call('HINCRBY', KEYS[1], 'clock', 1)
if ARGV[3] == '1' then redis.call('HSET', KEYS[1], 'source', clock) end
for i = 4, #ARGV do redis.call('HSET', KEYS[1], ARGV[i], clock) end
return clock
"""


@dataclass(frozen=True, slots=True)
class Epochs:
    """What a namespace says about invalidations, at one moment.

    Attributes:
        id: The namespace's incarnation: drawn when its first entry is written, gone with a FLUSHALL.
        clock: Number of invalidations so far.
        dead: For each thing asked for: the clock at which it was last invalidated.
        source: The clock at which any source was last invalidated.
        tenanted: Whether any entry was ever written for a named tenant.
        fingerprint: Of the secret that the namespace's names are made with.
    """

    id: str
    clock: int
    dead: tuple[int, ...]
    source: int
    tenanted: bool
    fingerprint: str

    def stamp(self) -> str:
        """Return what is written into a record whose making began now."""
        return f"{self.id}:{self.clock}"


@dataclass(frozen=True, slots=True)
class Near:
    """A record near a question."""

    record: Record
    similarity: float


class Store:
    """Flows over one namespace.

    Args:
        namespace: First part of every name.
        mac_key: What records are signed with.
        fingerprint: Of the secret; kept in Redis so that a process with another one notices.
    """

    def __init__(self, namespace: str, mac_key: bytes, fingerprint: str) -> None:
        self._prefix = f"{namespace}:{{p00}}:"
        self._mac_key = mac_key
        self._fingerprint = fingerprint
        self._epochs = f"{self._prefix}epochs"
        self._registry = f"{self._prefix}z"
        self.search: bool | None = None  # not known before the first use
        self._indexes: set[str] = set()  # those known to exist
        self.rejected = 0  # records that were damaged, forged, or of somebody else

    # -- reading --------------------------------------------------------------------------------------------------

    def read(self, exact: str, things: Sequence[str]) -> Flow[tuple[Record | None, Epochs | None]]:
        """Return the record under `exact`, if it may be served, and the epochs at that moment.

        Epochs are None if Redis cannot keep them (read-only, out of memory): nothing can then be stored.
        """
        stored, told = yield Commands((("HGETALL", self._entry(exact)), self._ask(things)))
        epochs = self._read_epochs(told)
        if epochs is None:
            epochs = yield from self._begin(things)
        if epochs is None or not stored or isinstance(stored, Exception):
            return None, epochs
        record = unseal(as_pairs(stored), self._mac_key)
        if record is None or record.key != exact:
            self.rejected += 1
            return None, epochs
        alive = yield from self._alive([record], epochs)
        return (alive[0] if alive else None), epochs

    def epochs(self, things: Sequence[str]) -> Flow[Epochs | None]:
        """Return the epochs now."""
        (told,) = yield Commands((self._ask(things),))
        found = self._read_epochs(told)
        if found is None:
            found = yield from self._begin(things)
        return found

    def nearest(
        self, scope: str, embedder: str, vector: bytes, k: int, epochs: Epochs, timeout_ms: int
    ) -> Flow[list[Near]]:
        """Return at most `k` servable records of `scope`, most similar first.

        Args:
            scope: 32 hex characters; records of other scopes are never returned.
            embedder: Id of the embedder that made `vector`; records of others are never returned.
            vector: As `vectors.pack` returns it.
            k: How many to ask for.
            epochs: As read with the exact key.
            timeout_ms: How long the server may search.
        """
        if (yield from self._has_search()):
            stored = yield from self._search(scope, embedder, vector, k, timeout_ms)
        else:
            stored = yield from self._compare(scope, embedder, vector, k)
        records = []
        for name, fields in stored:
            record = unseal(fields, self._mac_key)
            # The query asked for this scope; the signed record must say so too.
            if record is None or name != self._entry(record.key) or record.scope != scope or record.emb != embedder:
                self.rejected += 1
            else:
                records.append(record)
        alive = yield from self._alive(records, epochs)
        pairs = zip(alive, similarities(vector, [r.vec for r in alive]), strict=True)
        return sorted((Near(r, s) for r, s in pairs if -1.01 <= s <= 1.01), key=lambda n: -n.similarity)

    # -- writing --------------------------------------------------------------------------------------------------

    def put(
        self, record: Record, *, things: Sequence[str], sets: Sequence[str], now_ms: int, tenanted: bool
    ) -> Flow[str]:
        """Store `record` unless something that it belongs to was invalidated since its `epochs`.

        Args:
            record: The record; its `epochs` are those that its lookup read.
            things: What it belongs to, its sources included.
            sets: Things whose sets list it: tenant, user, sources.
            now_ms: Unix time in milliseconds.
            tenanted: Whether it belongs to a named tenant.

        Returns:
            "stored", "invalidated", "lost" (the namespace was emptied meanwhile), or "failed" (Redis refused).
        """
        incarnation, _, clock = record.epochs.partition(":")
        fields = [part for pair in record.sealed(self._mac_key).items() for part in pair]
        keys = [self._entry(record.key), self._epochs, self._registry]
        limit = 0
        if record.vec:
            if (yield from self._has_search()):
                yield from self._ensure_index(record.emb, len(record.vec) // 2)
            else:
                keys.append(self._vectors(record.scope, record.emb))
                limit = SCOPE_VECTORS
        keys += [self._set(s) for s in sets]
        arguments = [
            incarnation, clock, now_ms, max(1, record.expires_ms - now_ms), record.expires_ms,
            int(tenanted), record.key, limit, b"%016d" % record.created_ms + record.vec, len(things), *things, *fields,
        ]  # fmt: skip
        (reply,) = yield Commands((("EVAL", _PUT, len(keys), *keys, *arguments),))
        if isinstance(reply, Exception):
            warn_once(
                "store_refused", f"Redis refused to store an answer ({error_kind(reply)}); answers are not cached"
            )
            return "failed"
        return str(as_text(reply))

    def invalidate(self, things: Sequence[str], sets: Sequence[Sequence[str]], *, sources: bool) -> Flow[int]:
        """Make every record of `things` unservable at once, then remove those that the sets list.

        Args:
            things: What is invalidated.
            sets: For each group of things: records that are listed in all of the group's sets are removed.
            sources: Whether sources are among the things.

        Returns:
            How many records were removed.

        Raises:
            AegisConfigError: The namespace was written with another secret: nothing would be found.
            ResponseError: Redis refused.
        """
        yield from self._check_secret()
        yield from self._mark(things, sources=sources)
        removed = 0
        for group in sets:
            removed += yield from self._remove([self._set(s) for s in group])
        return removed

    def clear(self) -> Flow[int]:
        """Remove every record of the namespace; returns how many. Raises as `invalidate`."""
        yield from self._check_secret()
        (names,) = yield Commands((("SMEMBERS", self._registry),))
        raise_error(names)
        yield from self._mark(["namespace"], sources=False)
        removed = 0
        for name in sorted(as_text(n) for n in names):
            removed += yield from self._remove([name])
        return removed

    def held(self, now_ms: int) -> Flow[tuple[int, int]]:
        """Return how many records can be served, and how many tenants have any (calls without one count as one)."""
        yield from self._has_search()
        (names,) = yield Commands((("SMEMBERS", self._registry),))
        raise_error(names)
        if not names:
            return 0, 0
        counts = yield Commands(tuple(("ZCOUNT", name, f"({now_ms}", "+inf") for name in sorted(names)))
        living = [int(c) for c in counts if not isinstance(c, Exception) and int(c)]
        return sum(living), len(living)

    # -- parts ----------------------------------------------------------------------------------------------------

    def _entry(self, exact: str) -> str:
        return f"{self._prefix}e:{exact}"

    def _set(self, thing: str) -> str:
        return f"{self._prefix}z:{thing}"

    def _index(self, embedder: str) -> str:
        return f"{self._prefix}idx:{embedder}:v1"

    def _vectors(self, scope: str, embedder: str) -> str:
        return f"{self._prefix}v:{scope}:{embedder}"

    def _ask(self, things: Sequence[str]) -> tuple[str, ...]:
        return ("HMGET", self._epochs, "id", "clock", "source", "tenanted", "fingerprint", *things)

    def _read_epochs(self, told: Any) -> Epochs | None:
        if isinstance(told, Exception) or told[0] is None:
            return None
        try:
            clock, source = int(told[1] or 0), int(told[2] or 0)
            dead = tuple(int(d or 0) for d in told[5:])
        except ValueError:
            return None  # somebody else writes under our name
        fingerprint = as_text(told[4] or b"")
        if fingerprint != self._fingerprint:
            warn_once(
                "another_secret",
                "other processes use this Redis with another secret, so answers are not shared with them and cannot be "
                "invalidated from here; give every host the same AEGIS_SECRET_KEY",
            )
        return Epochs(as_text(told[0]), clock, dead, source, bool(told[3]), fingerprint)

    def _begin(self, things: Sequence[str]) -> Flow[Epochs | None]:
        """Draw the namespace's incarnation; the first of several processes wins."""
        *_, told = yield Commands(
            (
                ("HSETNX", self._epochs, "id", secrets.token_hex(8)),
                ("HSETNX", self._epochs, "fingerprint", self._fingerprint),
                self._ask(things),
            )
        )
        return self._read_epochs(told)

    def _mark(self, things: Sequence[str], *, sources: bool) -> Flow[None]:
        told = (secrets.token_hex(8), self._fingerprint, int(sources), *things)
        (clock,) = yield Commands((("EVAL", _INVALIDATE, 1, self._epochs, *told),))
        raise_error(clock)

    def _check_secret(self) -> Flow[None]:
        (told,) = yield Commands((self._ask(()),))
        epochs = self._read_epochs(told)
        if epochs is not None and epochs.fingerprint != self._fingerprint:
            raise AegisConfigError(
                "these entries were written with another secret: nothing would be removed. "
                "Give every host of this Redis the same AEGIS_SECRET_KEY"
            )

    def _alive(self, records: list[Record], epochs: Epochs) -> Flow[list[Record]]:
        """Keep the records that nothing has invalidated since their making began."""
        kept: list[Record] = []
        asked: list[Record] = []
        for record in records:
            incarnation, _, clock = record.epochs.partition(":")
            if incarnation != epochs.id or not clock.isdigit() or int(clock) > epochs.clock:
                continue
            if any(dead > int(clock) for dead in epochs.dead):
                continue
            # Only if some source was invalidated after it: which ones?
            (asked if record.src and epochs.source > int(clock) else kept).append(record)
        if asked:
            replies = yield Commands(tuple(("HMGET", self._epochs, *record.src) for record in asked))
            for record, dead in zip(asked, replies, strict=True):
                made = int(record.epochs.partition(":")[2])
                if not isinstance(dead, Exception) and all(int(d or 0) <= made for d in dead):
                    kept.append(record)
        return kept

    def _has_search(self) -> Flow[bool]:
        if self.search is None:
            (reply,) = yield Commands((("FT._LIST",),))
            if isinstance(reply, Exception):
                self.search = False
                warn_once(
                    "no_search",
                    f"this Redis has no search ({error_kind(reply)}): the semantic tier compares the newest "
                    f"{SCOPE_VECTORS} questions of a scope itself. Redis 8 or Redis Stack has it",
                )
            else:
                self.search = True
        return self.search

    def _search(
        self, scope: str, embedder: str, vector: bytes, k: int, timeout_ms: int
    ) -> Flow[list[tuple[str, dict[bytes, bytes]]]]:
        query = f"(@scope:{{{scope}}} @emb:{{{embedder}}})=>[KNN {k} @vec $v HYBRID_POLICY ADHOC_BF]"
        (reply,) = yield Commands(
            (("FT.SEARCH", self._index(embedder), query, "PARAMS", 2, "v", vector, "LIMIT", 0, k,
              "TIMEOUT", timeout_ms, "DIALECT", 2),)
        )  # fmt: skip
        if isinstance(reply, Exception):
            if is_missing_index(
                reply
            ):  # emptied or restarted: made again, and what is there is indexed in the background
                self._indexes.discard(embedder)
                yield from self._ensure_index(embedder, len(vector) // 2)
            elif is_unknown_command(reply):
                self.search = None  # another server answers now
            return []
        return [
            (as_text(name), as_pairs(fields)) for name, fields in zip(reply[1::2], reply[2::2], strict=True) if fields
        ]

    def _ensure_index(self, embedder: str, dimensions: int) -> Flow[None]:
        if embedder in self._indexes:
            return
        # Scopes are small, so candidates of the scope are compared one by one (ADHOC_BF) and the graph is seldom used.
        (reply,) = yield Commands(
            (("FT.CREATE", self._index(embedder), "ON", "HASH", "PREFIX", 1, f"{self._prefix}e:", "SCHEMA",
              "scope", "TAG", "CASESENSITIVE", "emb", "TAG", "CASESENSITIVE",
              "vec", "VECTOR", "HNSW", 6, "TYPE", "FLOAT16", "DIM", dimensions, "DISTANCE_METRIC", "COSINE"),)
        )  # fmt: skip
        if not isinstance(reply, Exception) or "already exists" in str(reply).lower():
            self._indexes.add(embedder)
        elif is_unknown_command(reply):
            self.search = None
        else:
            warn_once(
                "no_index", f"the search index cannot be made ({error_kind(reply)}): only exact repeats are answered"
            )

    def _compare(self, scope: str, embedder: str, vector: bytes, k: int) -> Flow[list[tuple[str, dict[bytes, bytes]]]]:
        name = self._vectors(scope, embedder)
        (reply,) = yield Commands((("HGETALL", name),))
        if isinstance(reply, Exception) or not reply:
            return []
        rows = sorted(as_pairs(reply).items(), key=lambda row: row[1][:16], reverse=True)[:SCOPE_VECTORS]
        scores = similarities(vector, [value[16:] for _, value in rows])
        best = sorted(
            (-score, key.decode("ascii", "replace"))
            for score, (key, _) in zip(scores, rows, strict=True)
            if score == score
        )
        # Some may have expired or been removed since: ask for more than are needed, and forget those.
        wanted = [key for _, key in best[: 4 * k]]
        if not wanted:
            return []
        replies = yield Commands(tuple(("HGETALL", self._entry(key)) for key in wanted))
        found = [
            (self._entry(key), as_pairs(r))
            for key, r in zip(wanted, replies, strict=True)
            if r and not isinstance(r, Exception)
        ]
        gone = [key for key, r in zip(wanted, replies, strict=True) if not r]
        if gone:
            yield Commands((("HDEL", name, *gone),))
        return found[:k]

    def _remove(self, sets: list[str]) -> Flow[int]:
        """Unlink, in chunks, the records that all of `sets` list."""
        removed = 0
        if len(sets) == 1:
            while True:
                (members,) = yield Commands((("ZPOPMIN", sets[0], _UNLINK_CHUNK),))
                raise_error(members)
                names = [as_text(m) for m in popped_members(members)]
                if not names:
                    return removed
                removed += yield from self._unlink(names)
        (members,) = yield Commands((("ZINTER", len(sets), *sets),))
        raise_error(members)
        names = [as_text(m) for m in members]
        for start in range(0, len(names), _UNLINK_CHUNK):
            chunk = names[start : start + _UNLINK_CHUNK]
            removed += yield from self._unlink(chunk)
            yield Commands(tuple(("ZREM", name, *chunk) for name in sets))
        return removed

    def _unlink(self, exacts: Iterable[str]) -> Flow[int]:
        (count,) = yield Commands((("UNLINK", *(self._entry(e) for e in exacts)),))
        raise_error(count)
        return int(count)
