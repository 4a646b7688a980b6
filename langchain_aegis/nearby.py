"""The search by meaning as one function that runs in Redis, and how it is called where functions are not allowed.

What lies near a question, the signed records of those that may serve it, and what is noted of the question come in one
reply. Of records that are too far away only names and distances are told: most lookups that miss see no others.

How a search goes through the index depends on the size of the scope. Most scopes hold a few entries, which are compared
one by one; one that is most of a large index is searched along the graph, which for a small one takes a thousand times
as long. `scripts.put` counts each scope's entries.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from redis.exceptions import ResponseError

from langchain_aegis.entries import FIELDS, Record
from langchain_aegis.flows import Flow
from langchain_aegis.namespace import Commands
from langchain_aegis.replies import Near, as_text, error_kind, is_unknown_command
from langchain_aegis.vectors import similarities

# A scope of n entries among N is compared one by one unless n * n > GRAPH_FROM * N: measured where both cost the same,
# 550 of 10,000 and 1,700 of 100,000.
GRAPH_FROM: Final = 30
# So many entries a search along the graph compares at least.
_SEEN: Final = 24
_SEEN_OF_MANY: Final = 64
_MANY: Final = 30_000

# How a scope is searched is asked anew after so long: a search in the wrong way is slow, not wrong.
_SIZE_KNOWN_S: Final = 1.0
_SCOPES_KNOWN: Final = 4_096

_ROUNDING: Final = 1e-3  # by so much the server's distances may be off: it computes with 16 bits

_HEAD: Final = "local FIELDS = {" + ", ".join(f"'{name}'" for name in FIELDS) + "}\n"
_BODY: Final = (
    """
local prefix, index, scope, emb, vector, many, timeout = args[1], args[2], args[3], args[4], args[5], args[6], args[7]
local farthest, asking, how = tonumber(args[8]), args[9], args[10]
if how == '' then
  local now = redis.call('TIME')
  now = tonumber(now[1]) * 1000
  local function size(name)
    local told, sum = redis.call('HGETALL', name), 0
    for i = 1, #told, 2 do
      if tonumber(told[i]) > now then sum = sum + tonumber(told[i + 1]) end
    end
    return sum
  end
  local held, all = size(prefix .. 'n:' .. scope .. ':' .. emb), size(prefix .. 'n:' .. emb)
  how = 'HYBRID_POLICY ADHOC_BF'
  if held * held > $GRAPH_FROM * all then
    how = 'EF_RUNTIME ' .. (all > $MANY and $SEEN_OF_MANY or $SEEN) .. ' HYBRID_POLICY BATCHES'
  end
end
local found = redis.pcall(
  'FT.SEARCH', index, '(@scope:{' .. scope .. '})=>[KNN ' .. many .. ' @vec $v ' .. how .. ' AS d]',
  'PARAMS', '2', 'v', vector, 'RETURN', '1', 'd', 'LIMIT', '0', many, 'TIMEOUT', timeout, 'DIALECT', '2')
local reply = {asking == '' and {} or redis.call('HGETALL', prefix .. 'b:' .. asking), how}
if found.err then reply[3] = found.err return reply end
for i = 2, #found, 2 do
  local told = found[i + 1][2]
  local distance = tonumber(told)
  local near = distance and distance <= farthest
  reply[#reply + 1] = {found[i], told or '', near and redis.call('HMGET', found[i], unpack(FIELDS)) or false}
end
return reply
""".replace("$GRAPH_FROM", str(GRAPH_FROM))
    .replace("$MANY", str(_MANY)).replace("$SEEN_OF_MANY", str(_SEEN_OF_MANY)).replace("$SEEN", str(_SEEN))
)  # fmt: skip

# For scripts that store or unlink records. They know the prefix.
COUNT: Final = """
-- How many entries a scope has, and all of an embedder, by when they expire: in steps of at least an eighth of their
-- life, so that there are few. What is past its step counts no more.
local function count(scope, emb, created, expires, by)
  local life = tonumber(expires) - tonumber(created)
  local step = 2 ^ math.ceil(math.log(math.max(8, life) / 8) / math.log(2))
  local place = string.format('%.0f', math.ceil(tonumber(expires) / step) * step)
  local names = {prefix .. 'n:' .. scope .. ':' .. emb, prefix .. 'n:' .. emb}
  for _, name in ipairs(names) do
    if by > 0 or redis.call('HEXISTS', name, place) == 1 then redis.call('HINCRBY', name, place, by) end
  end
  return names
end
local function unlink(exact)
  local name = prefix .. 'e:' .. exact
  local told = redis.pcall('HMGET', name, 'scope', 'emb', 'created_ms', 'expires_ms')
  if not told.err and told[4] and (told[1] or '') ~= '' then
    count(told[1], told[2] or '', told[3], told[4], -1)  -- what is empty is not written
  end
  return redis.call('UNLINK', name)
end
"""

# Another version has another name: processes of both may use one Redis.
NAME: Final = f"aegis_near_{hashlib.sha256((_HEAD + _BODY).encode()).hexdigest()[:12]}"
LIBRARY: Final = (
    f"#!lua name={NAME}\n{_HEAD}redis.register_function{{function_name='{NAME}', flags={{'no-writes'}}, "
    f"callback=function(keys, args)\n{_BODY}\nend}}\n"
)
SCRIPT: Final = f"{_HEAD}local args = ARGV\n{_BODY}"


@dataclass(slots=True)
class Found:
    """What a search told.

    Attributes:
        stored: Names of records, and the values of their `FIELDS`.
        far: Exact keys and cosines of those that are too far away.
        told: What is noted of the key that asks, as a reply of HGETALL; None if it was not asked for.
        error: Why nothing was found, if the server would not search.
    """

    stored: list[tuple[str, Sequence[Any]]] = field(default_factory=list)
    far: list[tuple[str, float]] = field(default_factory=list)
    told: Any = None
    error: Exception | None = None


class ServerSearch:
    """Calls the function in the best way that the server allows: as a function, as a script, or not at all."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._way = "function"
        self._how: dict[tuple[str, str], tuple[str, float]] = {}

    @property
    def possible(self) -> bool:
        """Whether the server can be asked in one of these ways; not known before the first call."""
        return self._way != ""

    def call(
        self, key: str, prefix: str, index: str, scope: str, embedder: str, vector: bytes, many: int, timeout_ms: int,
        lowest: float, asking: str, meanwhile: Callable[[], object] | None = None,
    ) -> Flow[Found]:  # fmt: skip
        """Return what the function has replied; it means nothing unless `possible` still holds.

        Args:
            key: One that is of the same slot as all others.
            prefix: What all names of the namespace begin with.
            index: Name of the index.
            scope: 32 hex characters.
            embedder: Id of the embedder that made `vector`.
            vector: As `vectors.pack` returns it.
            many: How many are asked for.
            timeout_ms: How long the server may search.
            lowest: Lowest cosine of those whose records are told.
            asking: Exact key of the question, or "": then nothing is noted of it.
            meanwhile: As for `Commands`.
        """
        farthest = f"{1 - lowest + _ROUNDING:.4f}"
        how, until_s = self._how.get((scope, embedder), ("", 0.0))
        if until_s <= (now_s := self._clock()):
            how = ""
        arguments = (prefix, index, scope, embedder, vector, many, timeout_ms, farthest, asking, how)
        reply: Any = None
        for _ in range(4):  # a way that is refused is given up for the next
            if not self.possible:
                break
            if self._way == "function":
                (reply,) = yield Commands((("FCALL_RO", NAME, 1, key, *arguments),), meanwhile=meanwhile)
                if isinstance(reply, ResponseError) and "function not found" in str(reply).lower():
                    _, reply = yield Commands(
                        (("FUNCTION", "LOAD", "REPLACE", LIBRARY), ("FCALL_RO", NAME, 1, key, *arguments))
                    )
            else:
                (reply,) = yield Commands((("EVAL", SCRIPT, 1, key, *arguments),), meanwhile=meanwhile)
            error = reply if isinstance(reply, ResponseError) else _error_in(reply)
            if error is None or not self._refused(error):
                break
        if not how and not isinstance(reply, Exception) and len(reply) > 1:
            if len(self._how) >= _SCOPES_KNOWN:
                self._how.clear()
            self._how[scope, embedder] = as_text(reply[1]), now_s + _SIZE_KNOWN_S
        return _read(reply, len(prefix) + 2)

    def _refused(self, error: ResponseError) -> bool:
        """Go over to the next way if an error reply says that this one is not allowed."""
        text = str(error).lower()
        if "from script" in text:  # the function runs, but must not search
            self._way = ""
        elif is_unknown_command(error) or "function not found" in text or error_kind(error) == "NOPERM":
            self._way = "script" if self._way == "function" else ""
        else:
            return False
        return True


def _read(reply: Any, start: int) -> Found:
    """Read the function's reply; exact keys begin at a place in the names of entries."""
    if isinstance(reply, Exception):
        return Found(error=reply)
    found = Found(told=reply[0], error=_error_in(reply))
    for name, distance, values in reply[2:] if found.error is None else ():
        if values is None:
            if distance:
                found.far.append((as_text(name)[start:], 1 - float(distance)))
        elif values[0] is not None:  # else it has expired just now
            found.stored.append((as_text(name), values))
    return found


def most_similar(vector: bytes, kept: Mapping[bytes, bytes], newest: int) -> list[tuple[str, float]]:
    """Return the exact keys and cosines of a scope's vectors as they are kept without search, most similar first.

    Args:
        vector: As `vectors.pack` returns it.
        kept: Exact key -> 16 digits of the time in milliseconds, and the vector.
        newest: So many of them are compared.
    """
    rows = sorted(kept.items(), key=lambda row: row[1][:16], reverse=True)[:newest]
    scores = similarities(vector, [value[16:] for _, value in rows])
    best = sorted((-score, key.decode("ascii", "replace")) for score, (key, _) in zip(scores, rows, strict=True)
                  if score == score)  # fmt: skip
    return [(key, -score) for score, key in best]


def ranked(vector: bytes, records: Sequence[Record]) -> list[Near]:
    """Return records with their cosines, as their signed vectors have it, most similar first."""
    if not records:
        return []
    pairs = zip(records, similarities(vector, [r.vec for r in records]), strict=True)
    return sorted((Near(r, s) for r, s in pairs if -1.01 <= s <= 1.01), key=lambda n: -n.similarity)


def index(name: str, start: str, embedder: str, dimensions: int) -> tuple[Any, ...]:
    """Return the command that makes the index over one embedder's records, whose names begin with `start`.

    Its graph is a little sparse: with 12 links and 64 candidates for them, 97 of 100 nearest entries are found among
    100,000, and storing or removing one costs the server's only thread 0.24 and 0.35 ms; with 8 and 40 it were 60 of
    100, 0.15 and 0.17 ms.
    """
    return ("FT.CREATE", name, "ON", "HASH", "PREFIX", 1, start, "FILTER", f'@emb=="{embedder}"', "SCHEMA",
            "scope", "TAG", "CASESENSITIVE",
            "vec", "VECTOR", "HNSW", 10, "TYPE", "FLOAT16", "DIM", dimensions, "DISTANCE_METRIC", "COSINE",
            "M", 12, "EF_CONSTRUCTION", 64)  # fmt: skip


def _error_in(reply: Any) -> ResponseError | None:
    """Return the error that the search itself met, beside which the function has told what is noted."""
    return ResponseError(as_text(reply[2])) if len(reply) > 2 and isinstance(reply[2], bytes) else None
