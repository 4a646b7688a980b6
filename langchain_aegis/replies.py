"""What Redis tells, as Python values, whichever way redis-py has changed the replies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from redis.exceptions import (
    AskError,
    ClusterCrossSlotError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    ResponseError,
    TryAgainError,
)

from langchain_aegis.entries import Record
from langchain_aegis.profiles import Profile


@dataclass(slots=True)
class Epochs:
    """What a namespace says about invalidations, at one moment. Not changed once it is made.

    Attributes:
        id: The namespace's incarnation: drawn when its first entry is written, gone with a FLUSHALL.
        clock: Number of invalidations so far.
        dead: For each thing asked for: the clock at which it was last invalidated.
        source: The clock at which any source was last invalidated.
        tenanted: Whether any entry was ever written for a named tenant.
        fingerprint: Of the secret that the namespace's names are made with.
        before_ms: Records that were made earlier are dead, in unix milliseconds.
        opted_out: Whether the user wants nothing of his to be kept.
        trash: Whether invalidated records are still to be unlinked.
        stamp: What is written into a record whose making began now.
        newest: The clock at which any of the things asked for was last invalidated.
    """

    id: str
    clock: int
    dead: tuple[int, ...]
    source: int
    tenanted: bool
    fingerprint: str
    before_ms: int = 0
    opted_out: bool = False
    trash: bool = False
    stamp: str = field(init=False)
    newest: int = field(init=False)

    def __post_init__(self) -> None:
        self.stamp = f"{self.id}:{self.clock}"
        self.newest = max(self.dead, default=0)


@dataclass(slots=True)
class Near:
    """A record near a question."""

    record: Record
    similarity: float
    _profile: Profile | Literal[False] | None = field(default=None, init=False)

    @property
    def profile(self) -> Profile | None:
        """The profile of the record's question, read once; None if it has none that can be read."""
        if self._profile is None:
            try:
                self._profile = Profile.decode(self.record.profile)
            except ValueError:
                self._profile = False
        return self._profile or None


@dataclass(frozen=True, slots=True)
class Nearest(Sequence[Near]):
    """What lies near a question: a sequence of records, and notes.

    Attributes:
        near: Most similar first.
        far: Exact keys and cosines of what was found, but is less similar than asked for; as Redis tells them, so that
            nothing but a report may rest on them. Most similar first.
        notes: What is known of the key that asks and the keys of others: "x" if the pair was reported wrong, else a
            verifier's score as text.
    """

    near: list[Near]
    notes: dict[str, str] = field(default_factory=dict)
    far: Sequence[tuple[str, float]] = ()

    def __len__(self) -> int:
        return len(self.near)

    def __getitem__(self, which: Any) -> Any:
        return self.near[which]


@dataclass(frozen=True, slots=True)
class Listed:
    """A record of the namespace, and whether nothing has invalidated it."""

    record: Record
    alive: bool


@dataclass(frozen=True, slots=True)
class Swept:
    """What a step of sweeping did.

    Attributes:
        state: "more" is left, "later" there may be more, somebody else is "busy" with it, or all is "done".
        removed: So many records were unlinked.
        took_s: So long the server did nothing else, in seconds.
    """

    state: str
    removed: int
    took_s: float


def as_text(value: Any) -> str:
    """Return a reply as text."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def as_pairs(reply: Any) -> dict[bytes, bytes]:
    """Return HGETALL's reply as a dict: a raw reply alternates names and values."""
    if isinstance(reply, dict):
        return reply
    return dict(zip(reply[::2], reply[1::2], strict=True))


def raise_error(reply: Any) -> None:
    """Raise an error reply."""
    if isinstance(reply, Exception):
        raise reply


def error_kind(error: Exception) -> str:
    """Return an error reply's first word (NOPERM, OOM, READONLY ...): never its text, which may quote a command."""
    if isinstance(error, NoPermissionError):  # redis-py has taken the word off
        return "NOPERM"
    words = str(error).split(maxsplit=1)
    word = words[0].strip(",.:") if words else ""
    return word if word.isupper() else type(error).__name__


def is_missing_index(error: Exception) -> bool:
    """Say whether a search failed because its index is not there."""
    text = str(error).lower()
    return isinstance(error, ResponseError) and ("no such index" in text or "unknown index" in text)


def is_unknown_command(error: Exception) -> bool:
    """Say whether the server does not know a command."""
    return isinstance(error, ResponseError) and "unknown command" in str(error).lower()


def is_other_index(told: Any, dimensions: int | None, start: str) -> bool:
    """Say whether FT.INFO describes an index of other vectors or records than ours; no, if it does not say.

    Args:
        told: Its reply.
        dimensions: Of our vectors; None: of any number.
        start: What the names of our records begin with.
    """
    if isinstance(told, Exception):
        return False
    words = [word.lower() for word in _words(told)]
    expected = {"data_type": "float16", "distance_metric": "cosine", "prefixes": start.lower()}
    if dimensions is not None:
        expected["dim"] = str(dimensions)
    return any(word in expected and following != expected[word] for word, following in pairwise(words))


def is_whole_index(told: Any) -> bool:
    """Say whether FT.INFO describes an index that holds all that it should; no, if it does not say."""
    if isinstance(told, Exception):
        return False
    words = [word.lower() for word in _words(told)]
    said = {word: following for word, following in pairwise(words) if word in ("indexing", "percent_indexed")}
    return said == {"indexing": "0", "percent_indexed": "1"}


def is_of_cluster(error: object) -> bool:
    """Say whether an error reply is one of a node of a Cluster, which has others do what it was asked."""
    kinds = (AskError, TryAgainError, ClusterDownError, ClusterCrossSlotError)
    return isinstance(error, kinds) and not isinstance(error, MasterDownError)


def _words(told: Any) -> Iterator[str]:
    for part in told:
        if isinstance(part, (list, tuple)):
            yield from _words(part)
        else:
            yield as_text(part)
