"""What the store does in one step: Lua scripts, each with the function that makes its command.

The scripts build the names of keys from the namespace's prefix, which holds a hash tag: all are of one slot. A script
never does much at once, for the server does nothing else meanwhile; what may take long is done in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from langchain_aegis.entries import Record
from langchain_aegis.nearby import COUNT

Command = tuple[Any, ...]

TOMBSTONE_MS: Final = 24 * 3600 * 1000  # longer than any generation takes
PAIRS_MS: Final = 30 * 24 * 3600 * 1000
PAIRS_PER_KEY: Final = 32
PAIR_KEYS: Final = 10_000
_EVICTED_AT_ONCE: Final = 8  # unlinking an indexed vector costs the server's only thread about half a millisecond
_STEPS_KEPT: Final = 32  # of the counts of a scope; twice what entries of one lifetime need
_LEASE_KEPT_MS: Final = 10 * 60 * 1000  # so long is known which lease was the last

# ARGV[1] is the namespace's prefix, in every script.
_NAMES = """
local prefix = ARGV[1]
local epochs, registry, trash = prefix .. 'epochs', prefix .. 'z', prefix .. 'trash'
local function now_ms()
  local now = redis.call('TIME')
  return tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000)
end
"""

# Take a record out of everything that lists it; answers 1 if it lived until now: if its tenant's set, the first, has
# listed it.
_FORGET = (
    COUNT
    + """
local function forget(exact, sets, scope, emb)
  local lived
  for thing in string.gmatch(sets or '', '[^,]+') do
    local listed = redis.call('ZREM', prefix .. 'z:' .. thing, exact)
    if not lived then redis.call('ZREM', prefix .. 'u:' .. thing, exact) end
    lived = lived or listed
  end
  if scope and scope ~= '' then redis.call('HDEL', prefix .. 'v:' .. scope .. ':' .. (emb or ''), exact) end
  return lived or 0
end
local function drop(exact)
  local told = redis.pcall('HMGET', prefix .. 'e:' .. exact, 'sets', 'scope', 'emb')
  local lived = told.err and 0 or forget(exact, told[1], told[2], told[3])
  unlink(exact)
  return lived
end
"""
)

# Whether a record was made before an invalidation: by its clock, or by its age.
_DEAD = """
local function dead(stamp, created, by_age, bound)
  if by_age then return tonumber(created or 0) < bound end
  local id, clock = string.match(stamp or '', '^(%x*):(%d+)$')
  return id ~= redis.call('HGET', epochs, 'id') or tonumber(clock) < bound
end
"""

PUT = (
    (
        _NAMES
        + _FORGET
        + """
local exact, clock, created = ARGV[2], tonumber(ARGV[4]), tonumber(ARGV[5])
local now, ttl, expires, fence = ARGV[6], ARGV[7], ARGV[8], tonumber(ARGV[10])
local most, limit, scope, emb, vec = tonumber(ARGV[11]), tonumber(ARGV[12]), ARGV[13], ARGV[14], ARGV[15]
local record, at = prefix .. 'e:' .. exact, 16
local function list()
  local count, values = tonumber(ARGV[at]), {}
  for i = at + 1, at + count do values[#values + 1] = ARGV[i] end
  at = at + count + 1
  return values
end
local things, sets, outs, fields = list(), list(), list(), list()
if redis.call('HGET', epochs, 'id') ~= ARGV[3] then return 'lost' end
-- Changes nothing, but is refused by a server that is full. It must come first: once a script has removed something,
-- the server lets it write, full or not.
redis.call('HSETNX', epochs, 'id', ARGV[3])
for _, thing in ipairs(things) do
  local mark = redis.call('HGET', epochs, thing)
  if mark and tonumber(mark) > clock then return 'invalidated' end
end
local grave = redis.call('GET', prefix .. 't:' .. exact)
if grave and tonumber(grave) > clock then return 'invalidated' end
for _, before in ipairs({'before', 'before:' .. (sets[1] or '')}) do
  local bound = redis.call('HGET', epochs, before)
  if bound and created < tonumber(bound) then return 'invalidated' end
end
for _, out in ipairs(outs) do
  if redis.call('HEXISTS', epochs, out) == 1 then return 'opted_out' end
end
if fence > 0 then
  local lease = prefix .. 'l:' .. exact
  local holder = math.abs(tonumber(redis.call('GET', lease) or 0))
  if holder > fence then return 'fenced' end
  redis.call('SET', lease, -fence, 'PX', $LEASE_KEPT_MS)
end

local old = redis.pcall('HMGET', record, 'sets', 'scope', 'emb')
if not old.err then forget(exact, old[1], old[2], old[3]) end
unlink(exact)
redis.call('HSET', record, unpack(fields))
redis.call('PEXPIRE', record, ttl)
if ARGV[9] == '1' then redis.call('HSETNX', epochs, 'tenanted', '1') end
local function lasts(key)
  if redis.call('PTTL', key) < tonumber(ttl) then redis.call('PEXPIRE', key, ttl) end
end
if limit > 0 then
  local vectors = prefix .. 'v:' .. scope .. ':' .. emb
  if redis.call('HLEN', vectors) >= limit + math.ceil(limit / 10) then
    local all, ages = redis.call('HGETALL', vectors), {}
    for i = 1, #all, 2 do ages[#ages + 1] = {string.sub(all[i + 1], 1, 16), all[i]} end
    table.sort(ages, function(a, b) return a[1] < b[1] end)
    for i = 1, #ages - limit do redis.call('HDEL', vectors, ages[i][2]) end
  end
  redis.call('HSET', vectors, exact, vec)
  lasts(vectors)
elseif scope ~= '' then
  for _, name in ipairs(count(scope, emb, created, expires, 1)) do
    lasts(name)
    if redis.call('HLEN', name) > $STEPS_KEPT then
      local steps = redis.call('HGETALL', name)
      for i = 1, #steps, 2 do
        if tonumber(steps[i]) <= tonumber(now) then redis.call('HDEL', name, steps[i]) end
      end
    end
  end
end
for i, thing in ipairs(sets) do
  local set = prefix .. 'z:' .. thing
  local used = prefix .. 'u:' .. thing
  if i == 1 and redis.call('EXISTS', used) == 1 then
    for _, gone in ipairs(redis.call('ZRANGEBYSCORE', set, '-inf', now, 'LIMIT', 0, 100)) do
      redis.call('ZREM', used, gone)
      redis.call('ZREM', set, gone)
    end
  else
    redis.call('ZREMRANGEBYSCORE', set, '-inf', now)
  end
  redis.call('ZADD', set, expires, exact)
  lasts(set)
  if i == 1 then redis.call('SADD', registry, set) end
end
if most > 0 and sets[1] then
  local set, used = prefix .. 'z:' .. sets[1], prefix .. 'u:' .. sets[1]
  redis.call('ZADD', used, now, exact)
  lasts(used)
  local over = redis.call('ZCOUNT', set, '(' .. now, '+inf') - most
  for _ = 1, $EVICTED_AT_ONCE do
    if over <= 0 then break end
    -- Entries of before there was a bound have no use noted: they go first. Then the least recently used.
    local victim
    if redis.call('ZCARD', used) < redis.call('ZCARD', set) then
      for _, member in ipairs(redis.call('ZRANGE', set, 0, 20)) do
        if not victim and not redis.call('ZSCORE', used, member) then victim = member end
      end
    end
    for _, member in ipairs(redis.call('ZRANGE', used, 0, 1)) do
      if not victim and member ~= exact then victim = member end
    end
    if not victim then break end
    drop(victim)
    redis.call('ZREM', used, victim)
    redis.call('ZREM', set, victim)
    over = redis.call('ZCOUNT', set, '(' .. now, '+inf') - most
  end
end
return 'stored'
"""
    )
    .replace("$LEASE_KEPT_MS", str(_LEASE_KEPT_MS))
    .replace("$EVICTED_AT_ONCE", str(_EVICTED_AT_ONCE))
    .replace("$STEPS_KEPT", str(_STEPS_KEPT))
)

# Move the clock on, mark things as dead up to now, and take away the sets that list what is concerned.
_MARK = (
    _NAMES
    + """
redis.call('HSETNX', epochs, 'id', ARGV[2])
redis.call('HSETNX', epochs, 'fingerprint', ARGV[3])
local before, field, now = tonumber(ARGV[4]), ARGV[5], tonumber(ARGV[6])
local clock = redis.call('HINCRBY', epochs, 'clock', 1)
local at = 8
for i = at + 1, at + tonumber(ARGV[at]) do redis.call('HSET', epochs, ARGV[i], clock) end
at = at + tonumber(ARGV[at]) + 1
if before > tonumber(redis.call('HGET', epochs, field) or 0) then redis.call('HSET', epochs, field, ARGV[4]) end
local made = {clock}
local function take(names)
  local list, owned = trash .. ':' .. clock .. ':' .. #made, '0'
  if #names > 1 then
    local count, first = #names, names[1]
    names[count + 1], names[count + 2] = 'AGGREGATE', 'MIN'
    redis.call('ZINTERSTORE', list, count, unpack(names))
    redis.call('PEXPIRE', list, math.max(1, redis.call('PTTL', first)))
  elseif redis.call('EXISTS', names[1]) == 1 then
    redis.call('RENAME', names[1], list)
    if redis.call('SREM', registry, names[1]) == 1 then
      owned = '1'
      redis.call('UNLINK', prefix .. 'u:' .. string.sub(names[1], #prefix + 3))
    end
  end
  if now > 0 then redis.call('ZREMRANGEBYSCORE', list, '-inf', now) end
  if redis.call('EXISTS', list) == 1 then
    redis.call('ZADD', trash, now_ms() + 10000, list)
    redis.call('HSET', epochs, 'trash', '1')
    made[#made + 1] = owned .. list
  end
end
if ARGV[7] == '1' then
  for _, name in ipairs(redis.call('SMEMBERS', registry)) do take({name}) end
  redis.call('UNLINK', registry)
end
while at < #ARGV do
  local names = {}
  for i = at + 1, at + tonumber(ARGV[at]) do names[#names + 1] = prefix .. 'z:' .. ARGV[i] end
  at = at + tonumber(ARGV[at]) + 1
  take(names)
end
return made
"""
)

# Count the entries of a part of the trash that lived until now, and take them out of their tenants' sets. Lists that
# are through are given to whoever sweeps. Answers the place to go on from, or 0, and the count.
UNLIST = (
    _NAMES
    + _DEAD
    + """
local bound, many, i, from, counted = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), 0
while i <= #ARGV - 5 and many > 0 do
  local owned, list = string.sub(ARGV[5 + i], 1, 1) == '1', string.sub(ARGV[5 + i], 2)
  local members = redis.call('ZRANGE', list, from, from + many - 1)
  for _, exact in ipairs(members) do
    local told = redis.pcall('HMGET', prefix .. 'e:' .. exact, 'epochs', 'sets')
    if not told.err and told[1] and dead(told[1], nil, false, bound) then
      local tenant = string.match(told[2] or '', '^[^,]+') or ''
      if owned or redis.call('ZREM', prefix .. 'z:' .. tenant, exact) == 1 then counted = counted + 1 end
    end
  end
  if #members == many then
    from = from + many
    redis.call('ZADD', trash, now_ms() + 10000, list)
  else
    i, from = i + 1, 0
    redis.call('ZADD', trash, 0, list)
  end
  many = many - #members - 1
end
return {i <= #ARGV - 5 and i or 0, from, counted}
"""
)

# Move those entries of a part of a tenant's set into the trash that are older than a moment. Answers the scan's next
# place and their number.
_AGE = (
    _NAMES
    + _FORGET
    + _DEAD
    + """
local set, list, bound, counted = ARGV[2], ARGV[3], tonumber(ARGV[4]), 0
local found = redis.call('ZSCAN', set, ARGV[5], 'COUNT', ARGV[6])
local lasts = redis.call('PTTL', set)
for i = 1, #found[2], 2 do
  local exact = found[2][i]
  local told = redis.pcall('HMGET', prefix .. 'e:' .. exact, 'created_ms', 'sets', 'scope', 'emb')
  if not told.err and told[1] and dead(nil, told[1], true, bound) then
    forget(exact, told[2], told[3], told[4])
    redis.call('ZADD', list, found[2][i + 1], exact)
    counted = counted + 1
  end
end
if counted > 0 then
  redis.call('ZADD', trash, 0, list)
  redis.call('HSET', epochs, 'trash', '1')
  if redis.call('PTTL', list) < lasts then redis.call('PEXPIRE', list, lasts) end
end
return {found[1], counted}
"""
)

# Unlink some of the trash, for at most so many microseconds, if nobody else is at it.
SWEEP = (
    _NAMES
    + _FORGET
    + _DEAD
    + """
local started, lock, token, removed = os.clock(), prefix .. 'sweeping', ARGV[2], 0
local holder = redis.call('GET', lock)
if holder and holder ~= token then return {'busy', 0, 0} end
local list = redis.call('ZRANGEBYSCORE', trash, '-inf', now_ms(), 'LIMIT', 0, 1)[1]
if not list then
  redis.call('UNLINK', lock)
  if redis.call('EXISTS', trash) == 1 then return {'later', 0, 0} end
  redis.call('HDEL', epochs, 'trash')
  return {'done', 0, 0}
end
redis.call('SET', lock, token, 'PX', ARGV[3])
local kind, bound = string.match(string.sub(list, #trash + 1), '^:(b?)(%d+)')
for _, exact in ipairs(redis.call('ZRANGE', list, 0, ARGV[5] - 1)) do
  local told = redis.pcall('HMGET', prefix .. 'e:' .. exact, 'epochs', 'created_ms', 'sets', 'scope', 'emb')
  if not told.err and told[1] and dead(told[1], told[2], kind == 'b', tonumber(bound)) then
    forget(exact, told[3], told[4], told[5])
    removed = removed + unlink(exact)
  end
  redis.call('ZREM', list, exact)
  if (os.clock() - started) * 1000000 > tonumber(ARGV[4]) then break end
end
if redis.call('EXISTS', list) == 0 then redis.call('ZREM', trash, list) end
return {'more', removed, math.floor((os.clock() - started) * 1000000)}
"""
)

# Remove entries now; those that were stored anew since the clock stood at a value stay.
_DROP = (
    _NAMES
    + _FORGET
    + _DEAD
    + """
local removed = 0
for i = 3, #ARGV do
  local stamp = redis.pcall('HGET', prefix .. 'e:' .. ARGV[i], 'epochs')
  if type(stamp) == 'string' and dead(stamp, nil, false, tonumber(ARGV[2])) then removed = removed + drop(ARGV[i]) end
end
return removed
"""
)

# Move the clock on, and refuse what began before under some keys.
_BURY = """
local function bury(...)
  local clock = redis.call('HINCRBY', epochs, 'clock', 1)
  for _, exact in ipairs({...}) do redis.call('SET', prefix .. 't:' .. exact, clock, 'PX', $TOMBSTONE_MS) end
  return clock
end
""".replace("$TOMBSTONE_MS", str(TOMBSTONE_MS))

_REFRESH = (
    _NAMES
    + _BURY
    + """
redis.call('HSETNX', epochs, 'id', ARGV[3])
redis.call('HSETNX', epochs, 'fingerprint', ARGV[4])
return bury(ARGV[2])
"""
)

_NOTE = (
    (
        """
local pairs_of = prefix .. 'b'
local function note(from, to, text)
  local name = pairs_of .. ':' .. from
  local had = redis.call('HGET', name, to)
  if had == 'x' and text ~= 'x' then return end
  if not had and redis.call('HLEN', name) >= $PAIRS_PER_KEY then
    local all, victim = redis.call('HGETALL', name), nil
    for i = 1, #all, 2 do
      if all[i + 1] ~= 'x' then victim = all[i] end
    end
    if not victim and text ~= 'x' then return end
    redis.call('HDEL', name, victim or all[1])
  end
  redis.call('HSET', name, to, text)
  redis.call('PEXPIRE', name, $PAIRS_MS)
  redis.call('ZADD', pairs_of, now_ms(), from)
  for _ = 1, math.min(20, redis.call('ZCARD', pairs_of) - tonumber(ARGV[2])) do
    local old = redis.call('ZRANGE', pairs_of, 0, 0)[1]
    redis.call('ZREM', pairs_of, old)
    redis.call('UNLINK', pairs_of .. ':' .. old)
  end
end
"""
    )
    .replace("$PAIRS_PER_KEY", str(PAIRS_PER_KEY))
    .replace("$PAIRS_MS", str(PAIRS_MS))
)

_REPORT = (
    _NAMES
    + _FORGET
    + _BURY
    + _NOTE
    + """
local served, asked = ARGV[3], ARGV[4]
bury(served, asked)
if served ~= asked then
  note(asked, served, 'x')
  note(served, asked, 'x')
end
return drop(served)
"""
)

REMEMBER = _NAMES + _NOTE + "note(ARGV[3], ARGV[4], ARGV[5])"

LEASE = (
    _NAMES
    + """
local lease = prefix .. 'l:' .. ARGV[2]
if tonumber(redis.call('GET', lease) or 0) > 0 then return 0 end
local fence = redis.call('HINCRBY', epochs, 'fence', 1)
redis.call('SET', lease, fence, 'PX', ARGV[3])
return fence
"""
)

RELEASE = (
    _NAMES
    + """
local lease = prefix .. 'l:' .. ARGV[2]
if redis.call('GET', lease) == ARGV[3] then redis.call('SET', lease, '-' .. ARGV[3], 'PX', $LEASE_KEPT_MS) end
"""
).replace("$LEASE_KEPT_MS", str(_LEASE_KEPT_MS))


def _eval(script: str, prefix: str, *arguments: Any) -> Command:
    return ("EVAL", script, 1, f"{prefix}epochs", prefix, *arguments)


def put(
    prefix: str, record: Record, sealed: dict[str, bytes], *, things: Sequence[str], outs: Sequence[str], now_ms: int,
    tenanted: bool, max_entries: int, fence: int, vectors: int,
) -> Command:  # fmt: skip
    """Store a record unless something forbids it; `vectors`: how many of its scope are kept where there is no search.

    Answers as `Store.put`.
    """
    incarnation, _, clock = record.epochs.partition(":")
    fields = [part for pair in sealed.items() for part in pair]
    vec = b"%016d" % record.created_ms + record.vec if vectors else b""
    return _eval(
        PUT, prefix, record.key, incarnation, clock, record.created_ms, now_ms, max(1, record.expires_ms - now_ms),
        record.expires_ms, int(tenanted), fence, max_entries, vectors, record.scope, record.emb, vec,
        len(things), *things, len(record.sets), *record.sets, len(outs), *outs, len(fields), *fields,
    )  # fmt: skip


def mark(
    prefix: str, born: tuple[str, str], *, things: Sequence[str], groups: Sequence[Sequence[str]], everything: bool,
    before_ms: int, before: str, now_ms: int,
) -> Command:  # fmt: skip
    """Kill things; answers the clock, then the lists of what each group's sets all list, "1" before owned ones."""
    told = [part for group in groups for part in (len(group), *group)]
    return _eval(_MARK, prefix, *born, before_ms, before, now_ms, int(everything), len(things), *things, *told)


def unlist(prefix: str, clock: int, many: int, place: tuple[int, int], lists: Sequence[str]) -> Command:
    """Count a part of the trash as `mark` answered it, from a place; answers the next place and the count."""
    return _eval(UNLIST, prefix, clock, many, *place, *lists)


def age(prefix: str, name: str, trash: str, before_ms: int, cursor: Any, many: int) -> Command:
    """Move what was made before a moment from a part of a set into a list; answers the cursor and the count."""
    return _eval(_AGE, prefix, name, trash, before_ms, cursor, many)


def sweep(prefix: str, token: str, lock_ms: int, budget_us: int, most: int) -> Command:
    """Unlink a part of the trash; answers "more", "later", "busy" or "done", a number, and microseconds."""
    return _eval(SWEEP, prefix, token, lock_ms, budget_us, most)


def drop(prefix: str, clock: int, exacts: Sequence[str]) -> Command:
    """Remove entries that were made before `clock`; answers how many of them lived."""
    return _eval(_DROP, prefix, clock, *exacts)


def refresh(prefix: str, exact: str, born: tuple[str, str]) -> Command:
    """Refuse answers to `exact` that are being made; answers the clock."""
    return _eval(_REFRESH, prefix, exact, *born)


def report(prefix: str, served: str, asked: str) -> Command:
    """Remove an entry, note the pair both ways; answers whether the entry lived."""
    return _eval(_REPORT, prefix, PAIR_KEYS, served, asked)


def note(prefix: str, asked: str, served: str, text: str) -> Command:
    """Note something of a pair, unless it was reported."""
    return _eval(REMEMBER, prefix, PAIR_KEYS, asked, served, text)


def lease(prefix: str, exact: str, lease_ms: int) -> Command:
    """Take the lease of a key; answers its number, or 0."""
    return _eval(LEASE, prefix, exact, lease_ms)


def release(prefix: str, exact: str, fence: int) -> Command:
    """Give a lease back."""
    return _eval(RELEASE, prefix, exact, fence)
