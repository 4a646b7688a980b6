"""What a namespace's Redis can search, and the indexes that it has for that."""

from __future__ import annotations

import time
from typing import Final

from redis.exceptions import NoPermissionError

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.flows import Flow
from langchain_aegis.namespace import Commands, Namespace
from langchain_aegis.nearby import ServerSearch, index
from langchain_aegis.notices import warn_once
from langchain_aegis.replies import (
    as_text,
    error_kind,
    is_missing_index,
    is_other_index,
    is_unknown_command,
    is_whole_index,
    raise_error,
)
from langchain_aegis.seals import Seal

SCOPE_VECTORS: Final = 2_000  # without search: so many vectors of a scope are compared, the newest
_FOREIGN: Final = "another index has the name of ours, and is left as it is"
_REMOVE: Final = "Remove it, or choose another namespace"
_MAKING_S: Final = 1.0  # so long one caller alone makes an index that is gone ...
_MADE_S: Final = 0.1  # ... and so long after that others still hear that it is: they asked before


class Indexed(Namespace):
    """A namespace that is searched; arguments as `Namespace`.

    Attributes:
        search: Whether the server has search; None before the first use.
    """

    def __init__(self, namespace: str, seal: Seal, fingerprint: str) -> None:
        super().__init__(namespace, seal, fingerprint)
        self.search: bool | None = None
        self._indexes: set[str] = set()  # those known to exist
        self._making: dict[str, float] = {}  # until when those that are gone are somebody's to make, monotonic
        self._server_search = ServerSearch()

    def check(self, embedder: str, dimensions: int) -> Flow[None]:
        """Look whether this Redis can be used as it is; nothing is written.

        Args:
            embedder: Id of the embedder, or "" if there is none.
            dimensions: Of its vectors.

        Raises:
            AegisConfigError: It cannot, and waiting would not help; the message says why.
            ResponseError: Redis refused for another reason.
        """
        yield Commands((("PING",),))  # to what is longer, a server that wants a password may answer otherwise
        yield from self._check_secret()
        (names,) = yield Commands((("FT._LIST",),))
        if isinstance(names, Exception):
            return  # the exact tier needs no search, and the other one does without
        ours = {as_text(name) for name in names if as_text(name).startswith(f"{self.prefix}idx:")}
        for name in sorted(ours):
            (told,) = yield Commands((("FT.INFO", name),))
            if isinstance(told, NoPermissionError):
                raise_error(told)
            known = dimensions if embedder and name == self._index(embedder) else None
            if is_other_index(told, known, f"{self.prefix}e:"):
                raise AegisConfigError(f"{_FOREIGN} ({name}). {_REMOVE}")

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

    def finds_all(self, embedder: str) -> Flow[bool]:
        """Return whether a search finds every record of an embedder: its index is there, and not being filled."""
        if not (yield from self._has_search()):
            return False
        (told,) = yield Commands((("FT.INFO", self._index(embedder)),))
        return is_whole_index(told)

    def _index_lost(self, error: Exception, embedder: str, vector: bytes) -> Flow[None]:
        """Make the index again if a search says that it is gone; what is there is indexed in the background."""
        if is_missing_index(error):  # emptied or restarted
            if time.monotonic() >= self._making.get(embedder, 0.0):  # all that ask at once find it gone
                self._making[embedder] = time.monotonic() + _MAKING_S
                self._indexes.discard(embedder)
                yield from self._ensure_index(embedder, len(vector) // 2)
                self._making[embedder] = time.monotonic() + _MADE_S
        elif is_unknown_command(error):
            self._forget_server()
        else:
            warn_once(
                "search_refused",
                f"Redis refused to search ({error_kind(error)}); until it does not, only exact repeats are answered",
            )

    def _forget_server(self) -> None:
        """Learn anew what the server can: another one answers now."""
        self.search, self._server_search = None, ServerSearch()

    def _ensure_index(self, embedder: str, dimensions: int) -> Flow[None]:
        if embedder in self._indexes:
            return
        (reply,) = yield Commands((index(self._index(embedder), f"{self.prefix}e:", embedder, dimensions),))
        if not isinstance(reply, Exception):
            self._indexes.add(embedder)
        elif "already exists" in str(reply).lower():
            self._indexes.add(embedder)
            (told,) = yield Commands((("FT.INFO", self._index(embedder)),))
            if is_other_index(told, dimensions, f"{self.prefix}e:"):
                warn_once("foreign_index", f"{_FOREIGN}: only exact repeats are answered. {_REMOVE}")
        elif is_unknown_command(reply):
            self._forget_server()
        else:
            warn_once(
                "no_index", f"the search index cannot be made ({error_kind(reply)}): only exact repeats are answered"
            )
