"""How the slots of one server are counted in Redis, among all processes that use them: one Lua script.

    {ns}:{s<server>}:slots      a slot in use -> when its lease ends, in milliseconds of Redis's clock (sorted set)
    {ns}:{s<server>}:waiting    workers that want one, in the order of their turns (sorted set)
    {ns}:{s<server>}:workers    what each worker said last, and "#", the number of the last lease (hash)

A worker is one process's share of one server. A slot in use is `<worker>:<what tells it from the worker's others>`, a
name that is never used twice: that is the fence. Who gives back too late a slot that was taken from it gives back
nothing.

A lease bounds nothing by itself: what is computed at the server cannot be called back. So a worker that was silent for
longer than its lease (it was stopped, or cut off) and still has the call under way counts it again when it is back,
beyond the bound if need be. Nobody gets a slot then until there are fewer than the bound: the excess is as long as that
call, and as large as what was taken away, once.

Turns: a worker waits in one place however many calls wait behind it, and goes to the end after each slot. Time is
Redis's own, so hosts may disagree about it; where that jumps forward, leases end early and are counted again, and what
seems to end later than any lease does, because it jumped back, ends at once.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from langchain_aegis.settings import is_loopback

_LONGEST_MS: Final = 120_000  # twice the longest lease
_KEPT_MS: Final = 600_000  # so long after the last word the names are there
_SILENT_MS: Final = 5_000  # who waits says so every second; without pushes, who said nothing for so long has gone

TURN: Final = (
    """
local slots, waiting, workers = KEYS[1], KEYS[2], KEYS[3]
local me, channel, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
local limit, leave, want = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local time = redis.call('TIME')
local micros = tonumber(time[1]) * 1000000 + tonumber(time[2])
local now = math.floor(micros / 1000)
redis.call('ZREMRANGEBYSCORE', slots, '-inf', now)
redis.call('ZREMRANGEBYSCORE', slots, now + $LONGEST, '+inf')

-- What this worker uses, and what it gives back.
local kept, lost, at = {}, 0, 8
for i = at, at + tonumber(ARGV[7]) - 1 do
  kept[ARGV[i]] = true
  lost = lost + redis.call('ZADD', slots, now + lease, ARGV[i])
end
at = at + tonumber(ARGV[7])
for i = at, #ARGV do redis.call('ZREM', slots, ARGV[i]) end

-- What it was given and has not heard of.
local mine, head = {}, me .. ':'
local held = redis.call('ZRANGE', slots, 0, -1)
local count = #held
for _, name in ipairs(held) do
  if string.sub(name, 1, #head) == head then
    mine[#mine + 1] = name
    if not kept[name] then want = want - 1 end
  end
end

local told, alive = redis.call('HGETALL', workers), 0
local known = {}
for i = 1, #told, 2 do
  local name, until_ms, seen, most, rest, wants, where =
    told[i], string.match(told[i + 1], '^(%d+) (%d+) (%d+) (%d+) (%d+) (.*)$')
  if name ~= '#' and name ~= me then
    if until_ms and tonumber(until_ms) > now and tonumber(until_ms) < now + $LONGEST then
      alive = alive + 1
      known[name] = {ends = until_ms, seen = tonumber(seen), limit = tonumber(most), leave = tonumber(rest),
                     want = tonumber(wants), channel = where}
    else
      redis.call('HDEL', workers, name)
      redis.call('ZREM', waiting, name)
    end
  end
end
if lease == 0 then
  redis.call('HDEL', workers, me)
  redis.call('ZREM', waiting, me)
else
  alive = alive + 1
  known[me] = {ends = string.format('%d', now + lease), seen = now, limit = limit, leave = leave,
               want = math.max(0, want), channel = channel}
  if want > 0 then redis.call('ZADD', waiting, 'NX', micros, me) else redis.call('ZREM', waiting, me) end
end

-- Free slots go to those whose turn it is, one each in every round.
local changed = {[me] = lease > 0 or nil}
local granted = true
while granted do
  granted = false
  for _, name in ipairs(redis.call('ZRANGE', waiting, 0, -1)) do
    local who = known[name]
    local silent = who and name ~= me and who.channel == '' and now - who.seen > $SILENT
    if not who or who.want < 1 or silent then
      redis.call('ZREM', waiting, name)
    elseif count < who.limit - who.leave then
      local number = redis.call('HINCRBY', workers, '#', 1)
      local slot = string.format('%s:%d.%d', name, number, now)
      local heard = 1
      if name ~= me and who.channel ~= '' then
        heard = redis.pcall('PUBLISH', who.channel, slot)
        if type(heard) == 'table' then heard = 1 end  -- forbidden: it will ask
      end
      if heard == 0 then  -- it has gone
        redis.call('ZREM', waiting, name)
        redis.call('HDEL', workers, name)
        known[name], changed[name] = nil, nil
        alive = alive - 1
      else
        redis.call('ZADD', slots, now + (name == me and lease or tonumber(who.ends) - who.seen), slot)
        count, granted, changed[name] = count + 1, true, true
        who.want = who.want - 1
        if name == me then mine[#mine + 1] = slot end
        micros = micros + 1
        if who.want > 0 then redis.call('ZADD', waiting, micros, name) else redis.call('ZREM', waiting, name) end
      end
    end
  end
end
for name in pairs(changed) do
  local who = known[name]
  redis.call('HSET', workers, name, string.format(
    '%s %d %d %d %d %s', who.ends, who.seen, who.limit, who.leave, who.want, who.channel))
end
for i = 1, 3 do redis.call('PEXPIRE', KEYS[i], $KEPT) end
local first = redis.call('ZRANGE', slots, 0, 0, 'WITHSCORES')
return {count, alive, first[2] and math.max(0, tonumber(first[2]) - now) or 0, lost, unpack(mine)}
""".replace("$LONGEST", str(_LONGEST_MS))
    .replace("$SILENT", str(_SILENT_MS)).replace("$KEPT", str(_KEPT_MS))
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Told:
    """What came of one turn.

    Attributes:
        count: Slots in use, of all workers.
        workers: Those that live, this one among them.
        soonest_s: Until the first lease ends that is not renewed, in seconds.
        lost: Slots that this worker uses and that were not counted any more; they are again.
        slots: Names of all that are this worker's now.
    """

    count: int
    workers: int
    soonest_s: float
    lost: int
    slots: list[str]


def names_of(namespace: str, server: str) -> tuple[str, str, str]:
    """Return the names under which a server's slots are counted; all are of one hash slot.

    Workers on several hosts call a server by the same address, or count it twice. An address of loopback is each host's
    own. A login in the address plays no part.
    """
    parts = urlsplit(server)
    host = parts.hostname or ""
    place = f"{socket.gethostname()} " if is_loopback(host) else ""
    where = f"{place}{parts.scheme}://{host}:{parts.port}{parts.path}"
    begin = f"{namespace}:{{s{hashlib.blake2b(where.encode(), digest_size=8).hexdigest()}}}:"
    return f"{begin}slots", f"{begin}waiting", f"{begin}workers"


def turn(
    names: tuple[str, str, str], worker: str, *, channel: str, lease_ms: int, limit: int, leave: int, want: int,
    kept: Sequence[str], dropped: Sequence[str],
) -> tuple[Any, ...]:  # fmt: skip
    """Return the command that says what a worker uses and wants, and hands on what is free.

    Args:
        names: As `names_of` returns them.
        worker: Its name.
        channel: Where it hears of slots that it is given later; "": it asks.
        lease_ms: How long it may be silent; 0: it goes.
        limit: Most slots in use, as far as it is concerned.
        leave: So many of them it leaves free.
        want: How many more it can use now.
        kept: Names of those that it uses.
        dropped: Names of those that it gives back.
    """
    return ("EVAL", TURN, 3, *names, worker, channel, lease_ms, limit, leave, want, len(kept), *kept, *dropped)


def read_turn(reply: Sequence[Any]) -> Told:
    """Return what the reply to `turn` says. Raises ValueError, TypeError or IndexError if it is none."""
    return Told(int(reply[0]), int(reply[1]), int(reply[2]) / 1000, int(reply[3]), [n.decode() for n in reply[4:]])
