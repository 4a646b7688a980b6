"""One namespace in Redis: its names, its epochs, and which of its records live.

    {ns}:{p00}:e:<exact>              a record (hash), see `entries`
    {ns}:{p00}:epochs                 incarnation, clock, and when each thing was last invalidated (hash)
    {ns}:{p00}:z:<thing>              the entries of a tenant, user, task, model or source (sorted set by expiry)
    {ns}:{p00}:z                      the names of the tenants' sets
    {ns}:{p00}:u:<tenant>             the entries of a tenant by last use, where their number is bounded (sorted set)
    {ns}:{p00}:t:<exact>              the clock before which no answer to this key may have been begun
    {ns}:{p00}:l:<exact>              number of the lease of this key; negative: given back
    {ns}:{p00}:r:<exact>              what is passed on of an answer while it is made, see `relays` (stream)
    {ns}:{p00}:b:<exact>              what is known of this key and others: "x" reported wrong, else a score (hash)
    {ns}:{p00}:b                      the keys of which pairs are known (sorted set by time)
    {ns}:{p00}:trash:<mark>:<n>       what was invalidated and is still to be unlinked (sorted set)
    {ns}:{p00}:trash                  the names of those, by the time from which they may be worked on
    {ns}:{p00}:sweeping               who is at it
    {ns}:{p00}:idx:<embedder8>:v2     the search index over one embedder's records, where there is search
    {ns}:{p00}:n:<scope>:<embedder8>  how many records of a scope there are, by when they expire (hash), where ...
    {ns}:{p00}:n:<embedder8>          ... there is search; and the same of all scopes
    {ns}:{p00}:v:<scope>:<embedder8>  the vectors of a scope (hash), where there is none

The braces around the partition are literal: a lookup is one shard's work. Only digests stand in names and queries.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from langchain_aegis.entries import Record, claimed, in_order, unseal_values
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.flows import Flow
from langchain_aegis.notices import warn_once
from langchain_aegis.replies import Epochs, Listed, as_pairs, as_text, is_of_cluster, raise_error
from langchain_aegis.seals import Seal

OF_CLUSTER: Final = (
    "this Redis is a node of a Cluster, which sends us to others, and the cache speaks to one server; give it one that "
    "is no node (redis_url, or redis=)"
)
_MARKS_KEPT: Final = 20_000
_NOTED_HERE: Final = 1_000
_RECENT_S: Final = 1.0


@dataclass(slots=True)  # as records are, not frozen
class Commands:
    """Commands that are sent together, in one round trip; answered by a list of replies.

    Attributes:
        each: Name and arguments of each.
        request: The same as they are sent, if that is known already, else b"".
        meanwhile: What may be prepared for the replies until they come. It is done if there is time, must not take
            longer than some hundred microseconds, and whatever it raises means only that it was not done.
    """

    each: tuple[tuple[Any, ...], ...]
    request: bytes = b""
    meanwhile: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class Invalidation:
    """What is to be served no more.

    Attributes:
        things: Names of things: every record that belongs to one of them is dead.
        groups: For each group of things: the records that are listed in all of the group's sets are those that
            belong to the things; they are counted and unlinked.
        sources: Whether sources, or others that records list themselves, are among the things.
        before_ms: Records that were made earlier are dead, in unix milliseconds; 0: none.
        before_tenant: Name of the tenant to which `before_ms` applies; None: all.
        near: Exact keys of records to remove at once; all answers that are being made now are refused. None: no such.
        now_ms: Unix time in milliseconds; with it, records that have expired already are not counted.
    """

    things: Sequence[str] = ()
    groups: Sequence[Sequence[str]] = ()
    sources: bool = False
    before_ms: int = 0
    before_tenant: str | None = None
    near: Sequence[str] | None = None
    now_ms: int = 0


class Namespace:
    """What every flow over a namespace needs.

    Args:
        namespace: First part of every name.
        seal: What records are signed with.
        fingerprint: Of the secret; kept in Redis so that a process with another one notices.
    """

    def __init__(self, namespace: str, seal: Seal, fingerprint: str) -> None:
        self.prefix = prefix_of(namespace)
        self._seal = seal
        self._fingerprint = fingerprint
        self._epochs = f"{self.prefix}epochs"
        self._registry = f"{self.prefix}z"
        self._noted: dict[str, tuple[str, str]] = {}  # the last notes of this process, by the key that asked
        self._told: tuple[Any, Epochs | None] = (), None  # the last reply about the epochs, and what it says
        self._seen_s = 0.0
        self._marks: tuple[tuple[str, int], dict[str, int]] = ("", 0), {}  # see `_source_marks`

    def records(self, cursor: int = 0, *, unread: bool = False) -> Flow[tuple[int, list[Listed]]]:
        """Return some records of the namespace, and where to go on; 0: that was all, and 0 to begin.

        A record that is there throughout is returned, perhaps twice. Raises ResponseError if Redis refuses.

        Args:
            cursor: Where to go on.
            unread: Also those that this process cannot read, as they say themselves: another one may serve them.
        """
        pattern = re.sub(r"([*?\[\]\\^])", r"\\\1", f"{self.prefix}e:") + "*"
        (reply,) = yield Commands((("SCAN", cursor, "MATCH", pattern, "COUNT", 200),))
        raise_error(reply)
        following, names = int(reply[0]), [as_text(name) for name in reply[1]]
        if not names:
            return following, []
        told, *stored = yield Commands((self._ask(()), *(("HGETALL", name) for name in names)))
        epochs = self._read_epochs(told)
        records = []
        for name, fields in zip(names, stored, strict=True):
            if not fields or isinstance(fields, Exception):
                continue
            values = in_order(as_pairs(fields))
            record = unseal_values(values, self._seal) or (claimed(values) if unread else None)
            if record is not None and name == self._entry(record.key):
                records.append(record)
        if epochs is None:
            return following, [Listed(record, False) for record in records]
        alive = yield from self._listed(records, epochs)
        return following, [Listed(*pair) for pair in zip(records, alive, strict=True)]

    def recent_epochs(self) -> Epochs | None:
        """Return the epochs as they were a moment ago, or None.

        An answer that counts from then is refused at worst: what was invalidated since wins. What they say of things,
        a user or a tenant need not concern the caller's.
        """
        return self._told[1] if time.monotonic() - self._seen_s < _RECENT_S else None

    # -- parts ----------------------------------------------------------------------------------------------------

    def _entry(self, exact: str) -> str:
        return f"{self.prefix}e:{exact}"

    def _index(self, embedder: str) -> str:
        return f"{self.prefix}idx:{embedder}:v2"

    def _vectors(self, scope: str, embedder: str) -> str:
        return f"{self.prefix}v:{scope}:{embedder}"

    def _asks(self, exact: str | None) -> tuple[tuple[str, str], ...]:
        return () if exact is None else (("HGETALL", f"{self.prefix}b:{exact}"),)

    def _touch(self, exact: str, tenant: str, now_ms: int) -> tuple[Any, ...]:
        return ("ZADD", f"{self.prefix}u:{tenant}", "XX", now_ms, exact)

    def _ask(self, things: Sequence[str], tenant: str | None = None, user: str | None = None) -> tuple[str, ...]:
        return ("HMGET", self._epochs, "id", "clock", "source", "tenanted", "fingerprint", "trash", "before",
                f"before:{tenant}", f"out:{user}", *things)  # fmt: skip

    def _read_epochs(self, told: Any) -> Epochs | None:
        self._seen_s = time.monotonic()
        if told == self._told[0]:  # as the last time, as a rule
            return self._told[1]
        if isinstance(told, Exception):
            self._is_of_cluster(told)
            return None
        if told[0] is None:
            return None
        try:
            clock, source, before, before_tenant = (int(told[i] or 0) for i in (1, 2, 6, 7))
            dead = tuple(int(d or 0) for d in told[9:])
        except ValueError:
            return None  # somebody else writes under our name
        fingerprint = as_text(told[4] or b"")
        if fingerprint != self._fingerprint:
            warn_once(
                "another_secret",
                "other processes use this Redis with another secret, so answers are not shared with them and cannot be "
                "invalidated from here; give every host the same AEGIS_SECRET_KEY",
            )
        epochs = Epochs(
            as_text(told[0]), clock, dead, source, bool(told[3]), fingerprint,
            before_ms=max(before, before_tenant), opted_out=bool(told[8]), trash=bool(told[5]),
        )  # fmt: skip
        self._told = told, epochs
        return epochs

    def _is_of_cluster(self, reply: Exception) -> bool:
        """Say whether an error reply is that of a node of a Cluster, and tell the user what to do then."""
        if found := is_of_cluster(reply):
            warn_once("cluster", f"{OF_CLUSTER}; until then its answers are not cached")
        return found

    def _birth(self) -> tuple[str, str]:
        """Return the incarnation and the fingerprint that a namespace gets if it has none."""
        return secrets.token_hex(8), self._fingerprint

    def _begin(self, things: Sequence[str], tenant: str | None, user: str | None) -> Flow[Epochs | None]:
        """Draw the namespace's incarnation; the first of several processes wins."""
        born, fingerprint = self._birth()
        *_, told = yield Commands(
            (
                ("HSETNX", self._epochs, "id", born),
                ("HSETNX", self._epochs, "fingerprint", fingerprint),
                self._ask(things, tenant, user),
            )
        )
        return self._read_epochs(told)

    def _check_secret(self) -> Flow[None]:
        (told,) = yield Commands((self._ask(()),))
        raise_error(told)
        self._refuse_other_secret(told)

    def _refuse_other_secret(self, told: Any) -> None:
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
            if (alive := lives(record, epochs)) is not False:
                (asked if alive is None else kept).append(record)
        if asked:
            marks = yield from self._source_marks({s for record in asked for s in record.src}, epochs)
            kept += [r for r in asked if all(marks.get(s, epochs.clock) <= (_clock(r, epochs) or 0) for s in r.src)]
        return kept

    def _source_marks(self, sources: set[str], epochs: Epochs) -> Flow[dict[str, int]]:
        """Return when each source was last invalidated; one of which that is not known is left out.

        What was learnt stays true for as long as no other source is invalidated, so it is asked for only once.
        """
        state = epochs.id, epochs.source
        if self._marks[0] != state or len(self._marks[1]) > _MARKS_KEPT:
            self._marks = state, {}
        known = self._marks[1]
        unknown = [source for source in sources if source not in known]
        if unknown:
            (told,) = yield Commands((("HMGET", self._epochs, *unknown),))
            if not isinstance(told, Exception):
                known.update((source, int(mark or 0)) for source, mark in zip(unknown, told, strict=True))
        return known

    def _listed(self, records: list[Record], epochs: Epochs) -> Flow[list[bool]]:
        """Say of records of any tenant whether they live: whether their tenant's set lists them, for one."""
        if not records:
            return []
        asked = [
            command
            for record in records
            for tenant in ["".join(record.sets[:1])]
            for command in (
                ("ZSCORE", f"{self._registry}:{tenant}", record.key),
                ("HMGET", self._epochs, "before", f"before:{tenant}", "namespace", *record.sets),
            )
        ]
        replies = yield Commands(tuple(asked))
        raise_error(next((r for r in replies if isinstance(r, Exception)), None))
        living = []
        for record, listed, told in zip(records, replies[::2], replies[1::2], strict=True):
            made = _clock(record, epochs)
            old = record.created_ms < max(int(told[0] or 0), int(told[1] or 0))
            living.append(
                listed is not None and not old and made is not None and all(int(d or 0) <= made for d in told[2:])
            )
        return living

    def noted(self, asked: str, served: str, text: str) -> None:
        """Let this process know at once what `Store.note` will write."""
        if len(self._noted) >= _NOTED_HERE:
            with contextlib.suppress(KeyError, StopIteration, RuntimeError):  # another thread may be at it, too
                del self._noted[next(iter(self._noted))]
        self._noted[asked] = served, text

    def _notes(self, asking: str | None, told: Any) -> dict[str, str]:
        """Return what is noted of a key and others; a score that we have not signed is left out."""
        notes: dict[str, str] = {}
        if asking is None:
            return notes
        if (here := self._noted.get(asking)) is not None:
            notes[here[0]] = here[1]
        for other, value in as_pairs(told).items() if told and not isinstance(told, Exception) else ():
            key, (text, _, signature) = as_text(other), as_text(value).rpartition(":")
            if value == b"x":
                notes[key] = "x"
            elif any(
                hmac.compare_digest(signature.encode(), self._sign(asking, key, text, mac_key).encode())
                for mac_key in self._seal.mac_keys
            ):
                notes[key] = text
        return notes

    def _sign(self, asked: str, served: str, text: str, mac_key: bytes) -> str:
        """Sign a score: whoever writes into Redis must not have one question's answer serve another."""
        digest = hashlib.blake2b(key=mac_key, digest_size=8, person=b"aegis-note-v1")
        digest.update(f"{asked}:{served}:{text}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def prefix_of(namespace: str) -> str:
    """Return what the names of all keys of a namespace begin with."""
    return f"{namespace}:{{p00}}:"


def named(things: Sequence[str], given: str | None, kind: str) -> str | None:
    """Return `given`, else the first of `things` that is of a kind, else None."""
    return given if given is not None else next((thing for thing in things if thing.startswith(kind)), None)


def lives(record: Record, epochs: Epochs) -> bool | None:
    """Return whether nothing has invalidated a record since its making began; None: its sources must be asked for."""
    # As a rule nothing was invalidated since; then the stamp says so without being read.
    made = epochs.clock if record.epochs == epochs.stamp else _clock(record, epochs)
    if made is None or record.created_ms < epochs.before_ms or epochs.newest > made:
        return False
    # Only if some source was invalidated after it: which ones?
    return None if record.src and epochs.source > made else True


def _clock(record: Record, epochs: Epochs) -> int | None:
    """Return the clock at which a record's making began; None if it was in another incarnation."""
    incarnation, _, clock = record.epochs.partition(":")
    if incarnation != epochs.id or not clock.isdigit():
        return None
    made = int(clock)
    return made if made <= epochs.clock else None
