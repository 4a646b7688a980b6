"""Carry answers out of a cache and into one."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from langchain_aegis.entries import Record, unseal
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.flows import Flow, run
from langchain_aegis.performer import Performer
from langchain_aegis.scope import aegis_scope
from langchain_aegis.seals import Seal
from langchain_aegis.store import Epochs, Store
from langchain_aegis.updates import now_ms

_FORMAT: Final = "langchain-aegis export 1"
_MAX_LINE = 64 * 1024 * 1024  # characters


@dataclass(frozen=True, slots=True)
class Carried:
    """What became of the entries of a file.

    Attributes:
        taken: How many are in the cache now.
        left: Why the others are not, by code.
    """

    taken: int
    left: Mapping[str, int]


class Transfer(Performer):
    """Export, import, and answers known beforehand."""

    def export(self, path: str | Path) -> int:
        """Write every answer that can be served to a file that only its owner can read; returns how many.

        The file holds the answers as Redis does, in clear unless they are encrypted, each signed: it can be imported
        with the same secret, and the same `encrypt`.

        Raises:
            AegisConnectionError: Redis did not answer.
        """
        self._insist(lambda: self._engine.store.epochs(()))  # no file where Redis does not answer
        count = 0
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o600)  # it may have been there before
            file.write(json.dumps({"format": _FORMAT, "namespace": self._engine.options.settings.namespace}) + "\n")
            for record in self._all_records():
                sealed = record.sealed(self._engine.keyring.seal)
                file.write(json.dumps({name: base64.b64encode(v).decode() for name, v in sealed.items()}) + "\n")
                count += 1
        return count

    def import_(self, path: str | Path) -> Carried:
        """Take the answers of an exported file into this namespace.

        Into the Redis that they come from: what was invalidated since the export stays invalidated. Into another
        one: nobody knows what was invalidated since, so export late. Entries keep their age and time to live, and
        replace none that is younger.

        Raises:
            AegisConfigError: The file is no export, or of another secret or namespace.
            AegisConnectionError: Redis did not answer; call again.
        """
        keyring, store = self._engine.keyring, self._engine.store
        with open(path, encoding="utf-8", errors="replace") as file:
            try:
                header = json.loads(file.readline(_MAX_LINE))
            except ValueError:
                header = None
            if not isinstance(header, dict) or header.get("format") != _FORMAT:
                raise AegisConfigError(f"{path} is no export of langchain-aegis")
            namespace = self._engine.options.settings.namespace
            if header.get("namespace", namespace) != namespace:  # its names are made with the namespace
                raise AegisConfigError(f"{path} is of the namespace {header['namespace']!r}, and this is {namespace!r}")
            epochs = self._insist(lambda: store.epochs(()))
            if epochs is None:
                raise AegisConfigError("this Redis takes no entries: it is read-only or out of memory")
            taken, left = 0, dict[str, int]()
            anonymous = keyring.thing("tenant", None)
            for line in file:
                record = _read(line, keyring.seal)
                reply = "rejected"
                if record is not None and record.expires_ms <= now_ms():
                    reply = "expired"
                elif record is not None:
                    fitting = record if _from_here(record, epochs) else replace(record, epochs=epochs.stamp)
                    reply = self._insist(partial(_put, store, fitting, anonymous))
                if reply == "stored":
                    taken += 1
                else:
                    left[reply] = left.get(reply, 0) + 1
        if not taken and left.get("rejected"):
            raise AegisConfigError(
                f"{path} was exported with another secret, or another AEGIS_ENCRYPT: nothing in it can be trusted here"
            )
        return Carried(taken, left)

    def warm(self, rows: Iterable[Mapping[str, Any]], *, pipeline: str, version: str = "") -> Carried:
        """Put answers that are known beforehand into a pipeline's cache, in place of any that is there.

        Args:
            rows: Each has `question` and `answer` and may have `sources`, `tenant`, `user`, `task`, `ttl_s`.
            pipeline: As in `get_or_generate`.
            version: As in `get_or_generate`.

        Raises:
            AegisConfigError: A row cannot be used; those before it are in the cache.
        """
        taken, left = 0, dict[str, int]()
        for number, row in enumerate(rows, 1):
            question, answer = row.get("question"), row.get("answer")
            if not isinstance(question, str) or not question.strip() or answer in (None, "", [], {}):
                raise AegisConfigError(f"row {number} needs a question and an answer")
            told = {name: row[name] for name in ("tenant", "user", "task", "ttl_s", "sources") if name in row}
            before = self._engine.counts.snapshot()
            with aegis_scope(cache="refresh", **told):
                found = run(self._engine.find_value(question, pipeline, version), self._perform)
                if found is not None:
                    run(self._engine.store_value(found, answer), self._perform)
            self._written()
            after = self._engine.counts.snapshot()
            taken += after.stored - before.stored
            for code, count in after.not_stored.items():
                if more := count - before.not_stored.get(code, 0):
                    left[code] = left.get(code, 0) + more
        return Carried(taken, left)

    def _all_records(self) -> Iterator[Record]:
        cursor = 0
        while True:
            cursor, records = self._insist(partial(self._engine.store.records, cursor))
            yield from (listed.record for listed in records if listed.alive and listed.record.expires_ms > now_ms())
            if not cursor:
                return


def _read(line: str, seal: Seal) -> Record | None:
    try:
        fields = json.loads(line)
        return unseal({name.encode(): base64.b64decode(value) for name, value in fields.items()}, seal)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _from_here(record: Record, epochs: Epochs) -> bool:
    """Return whether a record was made in this very namespace, whose clock it then goes by."""
    return record.epochs.partition(":")[0] == epochs.id


def _put(store: Store, record: Record, anonymous: str) -> Flow[str]:
    things = ["namespace", *record.sets, *record.src]
    there, _ = yield from store.read(record.key, things)
    if there is not None and there.created_ms > record.created_ms and there.expires_ms > now_ms():
        return "older"
    reply = yield from store.put(record, things=things, now_ms=now_ms(), tenanted=anonymous not in record.sets)
    return reply
