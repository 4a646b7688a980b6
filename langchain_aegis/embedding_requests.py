"""The flow of one request for vectors.

A text that is refused is found, and fails nobody else.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import httpx

from langchain_aegis.errors import AegisBatchError, AegisError, AegisRequestError
from langchain_aegis.flows import Flow
from langchain_aegis.lanes import Wish
from langchain_aegis.vectors import pack as pack_unit
from langchain_aegis.vectors import similarities

Vector: TypeAlias = list[float]

_HARMLESS = "a"  # what no embedder refuses, unless it refuses everything
_COMPARED = 32  # with fewer numbers, different texts may well have the same ones
_SAME = 0.999


@dataclass(frozen=True, slots=True)
class Embed:
    """Step of a flow: ask the embedder; the answer is one vector for each text.

    Attributes:
        texts: At least one.
        query: There is one only, and it is a query; else they may be documents.
    """

    texts: list[str]
    query: bool = False


Keep: TypeAlias = Callable[[list[str], list[Vector]], Flow[list[Vector]]]


def embed_wishes(wishes: Sequence[Wish[Vector]], keep: Keep | None = None) -> Flow[None]:
    """Land every wish with its vector, or with the error that its text alone is to blame for.

    Args:
        wishes: At least one.
        keep: Gets the texts and vectors of each answer first, and returns the vectors to hand out.

    Raises what is no text's fault: the server is away, slow, busy, refuses everything, or returns vectors of which
    nobody knows whose they are (AegisBatchError).
    """
    # Sorted, because servers that compute a request in parts pad each part to its longest text.
    yield from _Search(keep).embed(sorted(wishes, key=lambda wish: len(wish.text)), certain=False)


class _Search:
    """Finds the texts that the embedder refuses, by halving."""

    def __init__(self, keep: Keep | None) -> None:
        self._keep = keep
        self._answered = False  # some request was: the embedder does not refuse everything

    def embed(self, wishes: Sequence[Wish[Vector]], *, certain: bool) -> Flow[bool]:
        """Land `wishes`; returns whether the embedder took all of them together.

        Args:
            wishes: Those that nobody waits for any more are left out.
            certain: One of their texts is known to be refused, so all of them together are not sent.
        """
        wishes = [wish for wish in wishes if wish.seats]
        if not wishes:
            return False
        if not certain or len(wishes) == 1:
            try:
                texts = [wish.text for wish in wishes]
                vectors = yield Embed(texts, query=len(wishes) == 1 and not wishes[0].document)
                yield from _check(texts, vectors)
            except Exception as exc:  # whatever the embedder raised: one of the texts may be to blame
                if not _may_be_a_texts_fault(exc):
                    raise
                if len(wishes) == 1:
                    yield from self._refused(wishes[0], exc)
                    return False
            else:
                self._answered = True
                if self._keep is not None:
                    vectors = yield from self._keep(texts, vectors)
                for wish, vector in zip(wishes, vectors, strict=True):
                    wish.land(vector)
                return True
        half = len(wishes) // 2
        first = yield from self.embed(wishes[:half], certain=False)
        yield from self.embed(wishes[half:], certain=first)
        return False

    def _refused(self, wish: Wish[Vector], error: Exception) -> Flow[None]:
        """Land a wish with the error that it got alone; raises it if any text would get it."""
        others = any(other is not wish and not other.landed for other in wish.flight.wishes) if wish.flight else False
        if others and not self._answered:
            try:
                yield Embed([_HARMLESS])
            except Exception as exc:  # then it says nothing about this text
                raise exc from error
            self._answered = True
        wish.blamed = True
        wish.land(None, error)


def _check(texts: Sequence[str], vectors: Sequence[Vector]) -> Flow[None]:
    """Raise AegisBatchError unless there is one vector for each text.

    Where two texts have the very same one, both are asked for again, alone: if they differ then, one was returned twice
    in the place of another.
    """
    try:
        count = len(vectors)
    except TypeError:
        raise AegisBatchError(f"the embedder returned no vectors for {len(texts)} texts") from None
    if count != len(texts):
        raise AegisBatchError(f"the embedder returned {count} vectors for {len(texts)} texts")
    alone: list[bytes] = []
    for at in _doubled(vectors):
        (vector,) = yield Embed([texts[at]])
        alone.append(pack_unit(vector) or b"")
    if alone and all(alone) and not similarities(alone[0], alone[1:])[0] >= _SAME:
        raise AegisBatchError(f"the embedder returned one vector twice, among {count}, for texts that differ")


def _doubled(vectors: Sequence[Vector]) -> list[int]:
    """Return two places that hold the same vector.

    None if several vectors are there more than once, or the only one of many: an embedder that often says the same of
    different texts is not asked again for each of them.
    """
    try:
        if len(vectors) < 2 or len(vectors[0]) < _COMPARED:
            return []
        alike = _grouped(vectors, range(len(vectors)), _COMPARED)
        same = [group for each in alike for group in _grouped(vectors, each, None)]
    except TypeError:  # whoever uses them will find out
        return []
    return same[0][:2] if len(same) == 1 and (len(same[0]) < len(vectors) or len(vectors) == 2) else []


def _grouped(vectors: Sequence[Vector], places: Iterable[int], most: int | None) -> list[list[int]]:
    """Return the places whose vectors share their first `most` numbers, those that share them with none left out."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for at in places:
        groups.setdefault(tuple(vectors[at][:most]), []).append(at)
    return [group for group in groups.values() if len(group) > 1]


def _may_be_a_texts_fault(error: Exception) -> bool:
    """Whether other texts of the same request might be embedded: the server is not away, slow or busy."""
    if isinstance(error, AegisRequestError):
        return _is_refusal(error.status_code)
    if isinstance(error, AegisError):
        # What Ollama says when a model computes no number for a text: the texts beside it are not to blame.
        return error.status_code == 500 and "unsupported value" in str(error)
    if isinstance(error, NotImplementedError):
        return False
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (ConnectionError, TimeoutError, httpx.TransportError, AegisError)):
            return False
        cause = cause.__cause__
    return _is_refusal(getattr(error, "status_code", None))


def _is_refusal(status: object) -> bool:
    """Whether a status says that the request's content is wrong; no status says nothing against it."""
    return not isinstance(status, int) or (400 <= status < 500 and status not in (401, 403, 404, 405, 407, 408, 429))


def pack(vector: Sequence[float]) -> bytes | None:
    """Return a vector as float32, little endian; None if it is none: empty, or not all finite numbers of float32."""
    try:
        packed = array("f", vector)
        if not packed or not math.isfinite(sum(packed)):
            return None
    except (TypeError, OverflowError, ValueError):
        return None
    if sys.byteorder != "little":
        packed.byteswap()
    return packed.tobytes()


def unpack(packed: bytes) -> list[float]:
    """Return the vector that `pack` was given, rounded to float32."""
    vector = array("f", packed)
    if sys.byteorder != "little":
        vector.byteswap()
    return vector.tolist()
