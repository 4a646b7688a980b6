"""The one place that knows Redis: names, commands, scripts.

Everything is written once, as flows: generators that yield `Commands` (one round trip each) and are sent the replies.
An error reply is sent as a value, so that a flow decides what it means; a connection that fails is thrown into it.

Names stand in `namespace`, Lua in `scripts`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final

from langchain_aegis import scripts
from langchain_aegis.breaker import Unavailable
from langchain_aegis.entries import FIELDS, Record, claimed, in_order, unseal_values
from langchain_aegis.flows import Flow
from langchain_aegis.indexes import SCOPE_VECTORS, Indexed
from langchain_aegis.links import packed
from langchain_aegis.namespace import Commands, Invalidation, lives, named
from langchain_aegis.nearby import Found, most_similar, ranked
from langchain_aegis.notices import warn_once
from langchain_aegis.replies import (
    Epochs,
    Listed,
    Near,
    Nearest,
    Swept,
    as_pairs,
    as_text,
    error_kind,
    raise_error,
)  # fmt: skip
from langchain_aegis.seals import Seal

__all__ = ["SCOPE_VECTORS", "Commands", "Epochs", "Invalidation", "Listed", "Near", "Nearest", "Store", "Swept"]


_COUNTED_AT_ONCE: Final = 250  # entries; a millisecond of the server's only thread
_DROPPED_AT_ONCE: Final = 8  # unlinking an indexed vector costs it about half a millisecond
_SWEEP_US: Final = 500
_LOCK_MS: Final = 10_000
_DIGITS: Final = 32  # of an exact key


class Store(Indexed):
    """Flows over one namespace.

    Args:
        namespace: First part of every name.
        seal: What records are signed with.
        fingerprint: Of the secret; kept in Redis so that a process with another one notices.
    """

    def __init__(self, namespace: str, seal: Seal, fingerprint: str) -> None:
        super().__init__(namespace, seal, fingerprint)
        self.rejected = 0  # records that were damaged, forged, or of somebody else
        # The request for a record, around its key, whose length is always the same.
        begins, ends = packed([("HMGET", self._entry("0" * _DIGITS), *FIELDS)]).rsplit(b"0" * _DIGITS, 1)
        self._read_begins, self._read_ends = begins, ends
        self._packed_ask = lru_cache(maxsize=256)(self._pack_ask)

    # -- reading --------------------------------------------------------------------------------------------------

    def read(
        self, exact: str, things: Sequence[str], *, tenant: str | None = None, user: str | None = None,
        touch_ms: int = 0, first: Sequence[Any] | Unavailable | None = None,
    ) -> Flow[tuple[Record | None, Epochs | None]]:  # fmt: skip
        """Return the record under `exact`, if it may be served, and the epochs at that moment.

        Epochs are None if Redis cannot keep them (read-only, out of memory): nothing can then be stored.

        Args:
            exact: The exact key.
            things: What it belongs to.
            tenant: Name of its tenant; default: the one among `things`.
            user: Name of its user; default: the one among `things`.
            touch_ms: Unix time in milliseconds, noted as the entry's last use; 0: none is noted.
            first: What came of sending `request`, if that was done already.
        """
        if isinstance(first, Unavailable):
            raise first
        tenant, user = named(things, tenant, "tenant:"), named(things, user, "user:")
        replies: Any = first
        if replies is None:
            read: tuple[Any, ...] = ("HMGET", self._entry(exact), *FIELDS)
            ask = self._ask(things, tenant, user)
            if touch_ms and tenant:
                replies = yield Commands((read, ask, self._touch(exact, tenant, touch_ms)))
            else:
                replies = yield Commands((read, ask), self.request(exact, things, tenant, user))
        stored, told, *_ = replies
        if (found := self.at_once(exact, stored, told)) is not None:
            return found
        epochs = self._read_epochs(told)
        if epochs is None:
            epochs = yield from self._begin(things, tenant, user)
        if epochs is None or isinstance(stored, Exception) or stored[0] is None:
            return None, epochs
        record = unseal_values(stored, self._seal)
        if record is None or record.key != exact:
            self.rejected += 1
            return None, epochs
        alive = yield from self._alive([record], epochs)
        return (alive[0] if alive else None), epochs

    def request(self, exact: str, things: Sequence[str], tenant: str | None, user: str | None) -> bytes:
        """Return what is sent to read a record and the epochs, two commands; b"" if `exact` is no exact key.

        Arguments as `read`, but all of them are said.
        """
        name = exact.encode()  # what is sent says how long it is
        if len(name) != _DIGITS:
            return b""
        return b"".join((self._read_begins, name, self._read_ends, self._packed_ask(tuple(things), tenant, user)))

    def at_once(self, exact: str, stored: Any, told: Any) -> tuple[Record, Epochs] | None:
        """Return a living record and the epochs from the two replies to `request`; None: `read` has to see."""
        if isinstance(stored, Exception) or stored[0] is None or (epochs := self._read_epochs(told)) is None:
            return None
        record = unseal_values(stored, self._seal)
        if record is None or record.key != exact or not lives(record, epochs):
            return None
        return record, epochs

    def epochs(
        self, things: Sequence[str], *, tenant: str | None = None, user: str | None = None
    ) -> Flow[Epochs | None]:
        """Return the epochs now; arguments as `read`."""
        tenant, user = named(things, tenant, "tenant:"), named(things, user, "user:")
        (told,) = yield Commands((self._ask(things, tenant, user),))
        found = self._read_epochs(told)
        if found is None:
            found = yield from self._begin(things, tenant, user)
        return found

    def touch(self, exact: str, tenant: str, now_ms: int) -> Flow[None]:
        """Note the use of an entry that was found by meaning, so that it is not the next to go."""
        yield Commands((self._touch(exact, tenant, now_ms),))

    def nearest(
        self, scope: str, embedder: str, vector: bytes, k: int, epochs: Epochs, timeout_ms: int, *,
        asking: str | None = None, lowest: float = -2.0, meanwhile: Callable[[], object] | None = None,
    ) -> Flow[Nearest]:  # fmt: skip
        """Return at most `k` servable records of `scope`.

        Args:
            scope: 32 hex characters; records of other scopes are never returned.
            embedder: Id of the embedder that made `vector`; records of others are never returned.
            vector: As `vectors.pack` returns it.
            k: How many to ask for.
            epochs: As read with the exact key.
            timeout_ms: How long the server may search.
            asking: Exact key of the question; what is known of it and others is read in the same round trip.
            lowest: Lowest cosine of the records that are returned; of others only keys and cosines are told.
            meanwhile: As for `Commands`.
        """
        found = yield from self._of_scope(scope, embedder, vector, k, timeout_ms, asking, lowest, meanwhile)
        alive = yield from self._alive(self._unsealed(found.stored, scope, embedder), epochs)
        if epochs.trash and not alive and len(found.stored) == k:
            # Dead records that are not unlinked yet must not hide living ones for long.
            more = yield from self._of_scope(scope, embedder, vector, k * 4, timeout_ms, None, lowest)
            alive = yield from self._alive(self._unsealed(more.stored, scope, embedder), epochs)
        notes = self._notes(asking, found.told)
        return Nearest(ranked(vector, alive)[:k], notes, sorted(found.far, key=itemgetter(1), reverse=True)[:k])

    def nearest_anywhere(
        self, embedder: str, vector: bytes, k: int, epochs: Epochs, timeout_ms: int, *, tenant: str | None = None,
        unread: bool = False,
    ) -> Flow[list[Near]]:  # fmt: skip
        """Return at most `k` living records of any scope, most similar first; none where there is no search.

        They answer nobody: another scope's record only explains, or is removed.

        Args:
            embedder: Id of the embedder that made `vector`.
            vector: As `vectors.pack` returns it.
            k: How many to ask for.
            epochs: As read now.
            timeout_ms: How long the server may search.
            tenant: Name of the tenant whose records are wanted; None: all.
            unread: Also those that this process cannot read, as they say themselves: another one may serve them.
        """
        if not (yield from self._has_search()):
            return []
        found: list[Near] = []
        many = k
        while True:
            query = f"*=>[KNN {many} @vec $v EF_RUNTIME 200]"
            stored = (yield from self._search(query, embedder, vector, many, timeout_ms, None)).stored
            unsealed = [
                (name, unseal_values(values, self._seal) or (claimed(values) if unread else None))
                for name, values in stored
            ]
            records = [r for name, r in unsealed if r is not None and name == self._entry(r.key) and r.emb == embedder]
            records = [r for r in records if tenant is None or tenant in r.sets[:1]]
            alive = yield from self._listed(records, epochs)
            found = ranked(vector, [r for r, lives in zip(records, alive, strict=True) if lives])[:k]
            # The index knows no tenants: where others are nearer, more must be asked for.
            if len(found) == k or len(stored) < many or many >= 1_000:
                return found
            many = min(1_000, many * 8)

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

    # -- writing --------------------------------------------------------------------------------------------------

    def put(
        self, record: Record, *, things: Sequence[str], now_ms: int, tenanted: bool, max_entries: int | None = None,
        fence: int = 0,
    ) -> Flow[str]:  # fmt: skip
        """Store `record` unless something that it belongs to was invalidated since its `epochs`.

        Args:
            record: The record; its `epochs` are those that its lookup read, its `sets` list it, its tenant's first.
            things: What it belongs to, its sources included.
            now_ms: Unix time in milliseconds.
            tenanted: Whether it belongs to a named tenant.
            max_entries: So many records of its tenant are kept; the least recently used go.
            fence: Number of the lease under which it was made, or 0.

        Returns:
            "stored", "invalidated", "opted_out" (its user wants nothing kept), "fenced" (another lease was given
            since), "lost" (the namespace was emptied meanwhile), or "failed" (Redis refused).
        """
        kept = 0
        if record.vec:
            if (yield from self._has_search()):
                yield from self._ensure_index(record.emb, len(record.vec) // 2)
            else:
                kept = SCOPE_VECTORS
        (reply,) = yield Commands(
            (
                scripts.put(
                    self.prefix, record, record.sealed(self._seal), things=[*things, "near"],
                    outs=[f"out:{thing}" for thing in things if thing.startswith("user:")], now_ms=now_ms,
                    tenanted=tenanted, max_entries=max_entries or 0, fence=fence, vectors=kept,
                ),
            )
        )  # fmt: skip
        if isinstance(reply, Exception):
            if not self._is_of_cluster(reply):
                warn_once(
                    "store_refused", f"Redis refused to store an answer ({error_kind(reply)}); answers are not cached"
                )
            return "failed"
        return str(as_text(reply))

    def refresh(
        self, exact: str, things: Sequence[str], *, tenant: str | None = None, user: str | None = None
    ) -> Flow[Epochs | None]:
        """Refuse answers to `exact` that are being made, and return the epochs after that; arguments as `read`."""
        tenant, user = named(things, tenant, "tenant:"), named(things, user, "user:")
        moved, told = yield Commands(
            (scripts.refresh(self.prefix, exact, self._birth()), self._ask(things, tenant, user))
        )
        return None if isinstance(moved, Exception) else self._read_epochs(told)

    def invalidate(self, what: Invalidation) -> Flow[int]:
        """Make records unservable at once, and hand them over to whoever sweeps; returns how many lived until now.

        Raises:
            AegisConfigError: The namespace was written with another secret: nothing would be found.
            ResponseError: Redis refused.
        """
        yield from self._check_secret()
        things = [*what.things, *(["source"] if what.sources else []), *(["near"] if what.near is not None else [])]
        before = "before" if what.before_tenant is None else f"before:{what.before_tenant}"
        clock, count = yield from self._mark(things, what.groups, before_ms=what.before_ms, before=before,
                                             now_ms=what.now_ms)  # fmt: skip
        if what.before_ms:
            count += yield from self._age(what.before_ms, what.before_tenant)
        keys = list(what.near or ())
        for start in range(0, len(keys), _DROPPED_AT_ONCE):
            (reply,) = yield Commands((scripts.drop(self.prefix, clock, keys[start : start + _DROPPED_AT_ONCE]),))
            raise_error(reply)
            count += int(reply)
        return count

    def clear(self, *, now_ms: int = 0) -> Flow[int]:
        """Make every record of the namespace unservable at once; returns how many there are. Raises as `invalidate`."""
        yield from self._check_secret()
        _, count = yield from self._mark(["namespace"], (), everything=True, now_ms=now_ms)
        return count

    def sweep(self, token: str) -> Flow[Swept]:
        """Unlink a little of what was invalidated, unless somebody else is at it. Raises ResponseError.

        Args:
            token: Of whoever sweeps, the same for all steps.
        """
        (reply,) = yield Commands((scripts.sweep(self.prefix, token, _LOCK_MS, _SWEEP_US, 200),))
        raise_error(reply)
        return Swept(as_text(reply[0]), int(reply[1]), int(reply[2]) / 1e6)

    def report(self, served: str, asked: str) -> Flow[bool]:
        """Remove the entry `served`, and never again serve it to the key `asked`, nor the other way round.

        Answers to both that are being made are refused.

        Returns:
            Whether the entry was there and alive.

        Raises:
            AegisConfigError: The namespace was written with another secret: nothing would be found.
            ResponseError: Redis refused.
        """
        yield from self._check_secret()
        (reply,) = yield Commands((scripts.report(self.prefix, served, asked),))
        self._told = (), None
        raise_error(reply)
        return bool(reply)

    def note(self, asked: str, served: str, text: str) -> Flow[None]:
        """Remember a verifier's score of a pair; a report is never overwritten."""
        signed = f"{text}:{self._sign(asked, served, text, self._seal.mac_keys[0])}"
        yield Commands((scripts.note(self.prefix, asked, served, signed),))

    def lease(self, exact: str, lease_ms: int) -> Flow[int]:
        """Return the number of a lease that is ours for `lease_ms`, or 0 if another holds it or Redis refused."""
        (reply,) = yield Commands((scripts.lease(self.prefix, exact, lease_ms),))
        return 0 if isinstance(reply, Exception) else int(reply)

    def release(self, exact: str, fence: int) -> Flow[None]:
        """Give a lease back, if it is still ours."""
        yield Commands((scripts.release(self.prefix, exact, fence),))

    def forget(self, exact: str) -> Flow[None]:
        """Remove what lies under the name of an entry, whatever it is."""
        yield Commands((("UNLINK", self._entry(exact)),))

    def opt(self, user_thing: str, out: bool) -> Flow[None]:
        """Say whether nothing of a user shall be kept from now on.

        Raises:
            AegisConfigError: The namespace was written with another secret, in which this user has another name: it
                holds for this secret alone.
            ResponseError: Redis refused.
        """
        field = f"out:{user_thing}"
        command = ("HSET", self._epochs, field, "1") if out else ("HDEL", self._epochs, field)
        reply, told = yield Commands((command, self._ask(())))
        raise_error(reply)
        self._refuse_other_secret(told)

    # -- parts ----------------------------------------------------------------------------------------------------

    def _pack_ask(self, things: tuple[str, ...], tenant: str | None, user: str | None) -> bytes:
        return packed([self._ask(things, tenant, user)])

    def _mark(
        self, things: Sequence[str], groups: Sequence[Sequence[str]], *, everything: bool = False, before_ms: int = 0,
        before: str = "before", now_ms: int = 0,
    ) -> Flow[tuple[int, int]]:  # fmt: skip
        """Move the clock on, mark things, count what the groups' sets list; returns the clock and the count."""
        (made,) = yield Commands(
            (
                scripts.mark(
                    self.prefix, self._birth(), things=things, groups=groups, everything=everything,
                    before_ms=before_ms, before=before, now_ms=now_ms,
                ),
            )
        )  # fmt: skip
        self._told = (), None  # what was read before the invalidation
        raise_error(made)
        clock, lists, place, count = int(made[0]), [as_text(name) for name in made[1:]], (1, 0), 0
        while lists and place[0]:
            (reply,) = yield Commands((scripts.unlist(self.prefix, clock, _COUNTED_AT_ONCE, place, lists),))
            raise_error(reply)
            place, count = (int(reply[0]), int(reply[1])), count + int(reply[2])
        return clock, count

    def _age(self, before_ms: int, tenant: str | None) -> Flow[int]:
        """Hand over the records of a tenant, or of all, that were made before a moment; returns how many."""
        names: list[str] = [f"{self._registry}:{tenant}"]
        if tenant is None:
            (members,) = yield Commands((("SMEMBERS", self._registry),))
            raise_error(members)
            names = sorted(as_text(name) for name in members)
        trash, count = f"{self.prefix}trash:b{before_ms}:{secrets.token_hex(4)}", 0
        for name in names:
            cursor = None
            while cursor != "0":
                (reply,) = yield Commands(
                    (scripts.age(self.prefix, name, trash, before_ms, cursor or "0", _COUNTED_AT_ONCE),)
                )
                raise_error(reply)
                cursor, count = as_text(reply[0]), count + int(reply[1])
        return count

    def _unsealed(self, stored: list[tuple[str, Sequence[Any]]], scope: str, embedder: str) -> list[Record]:
        records = []
        for name, values in stored:
            record = unseal_values(values, self._seal)
            # The query asked for this scope; the signed record must say so too.
            if record is None or name != self._entry(record.key) or record.scope != scope or record.emb != embedder:
                self.rejected += 1
            else:
                records.append(record)
        return records

    def _of_scope(
        self, scope: str, embedder: str, vector: bytes, many: int, timeout_ms: int, asking: str | None, lowest: float,
        meanwhile: Callable[[], object] | None = None,
    ) -> Flow[Found]:  # fmt: skip
        if not (yield from self._has_search()):
            return (yield from self._compare(scope, embedder, vector, many, asking, lowest))
        if self._server_search.possible:
            found = yield from self._server_search.call(
                self._epochs, self.prefix, self._index(embedder), scope, embedder, vector, many, timeout_ms,
                lowest, asking or "", meanwhile,
            )  # fmt: skip
            if self._server_search.possible:
                if found.error is not None:
                    yield from self._index_lost(found.error, embedder, vector)
                return found
        query = f"(@scope:{{{scope}}})=>[KNN {many} @vec $v]"  # how it goes through the index, the server guesses
        return (yield from self._search(query, embedder, vector, many, timeout_ms, asking))

    def _search(
        self, query: str, embedder: str, vector: bytes, many: int, timeout_ms: int, asking: str | None
    ) -> Flow[Found]:
        """Return the names and fields that the index finds, and what is noted of the key that asks."""
        reply, *told = yield Commands(
            (("FT.SEARCH", self._index(embedder), query, "PARAMS", 2, "v", vector, "LIMIT", 0, many,
              "TIMEOUT", timeout_ms, "DIALECT", 2), *self._asks(asking))
        )  # fmt: skip
        found = Found(told=told[0] if told else None)
        if isinstance(reply, Exception):
            yield from self._index_lost(reply, embedder, vector)
        else:
            rows = zip(reply[1::2], reply[2::2], strict=True)
            found.stored.extend((as_text(name), in_order(as_pairs(fields))) for name, fields in rows if fields)
        return found

    def _compare(
        self, scope: str, embedder: str, vector: bytes, many: int, asking: str | None, lowest: float
    ) -> Flow[Found]:
        """As `_search`, where there is none."""
        name = self._vectors(scope, embedder)
        reply, *told = yield Commands((("HGETALL", name), *self._asks(asking)))
        found = Found(told=told[0] if told else None)
        if isinstance(reply, Exception) or not reply:
            return found
        # Some may have expired or been removed since: ask for more than are needed, and forget those.
        best = most_similar(vector, as_pairs(reply), SCOPE_VECTORS)[: 4 * many]
        wanted = [key for key, cosine in best if cosine >= lowest]
        found.far.extend(best[len(wanted) : many])
        if not wanted:
            return found
        replies = yield Commands(tuple(("HGETALL", self._entry(key)) for key in wanted))
        found.stored.extend(
            (self._entry(key), in_order(as_pairs(r)))
            for key, r in zip(wanted, replies, strict=True)
            if r and not isinstance(r, Exception)
        )
        gone = [key for key, r in zip(wanted, replies, strict=True) if not r]
        if gone:
            yield Commands((("HDEL", name, *gone),))
        del found.stored[many:]
        return found
