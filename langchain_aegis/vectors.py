"""Vectors as Redis keeps them: float16, little endian, length 1."""

from __future__ import annotations

import contextlib
import importlib
import math
import struct
import sys
from array import array
from collections.abc import Sequence
from operator import mul
from typing import Any

_MANY = 64  # from so many vectors on, importing numpy pays for itself


def _numpy(vectors: int = 1) -> Any:
    """Return numpy if it is loaded already, or installed and worth it; else None: struct does for a few vectors.

    Importing it costs a fifth of a second, which a first lookup shall not pay on an event loop.
    """
    loaded = sys.modules.get("numpy")
    # Another thread may be importing it: then it stands there without half of its names.
    if loaded is not None and not getattr(loaded.__spec__, "_initializing", False):
        return loaded
    if vectors >= _MANY:
        with contextlib.suppress(ImportError):
            return importlib.import_module("numpy")
    return None


def pack(vector: Sequence[float]) -> bytes | None:
    """Return `vector`, shape `(dimensions,)`, scaled to length 1 as float16; None if it has no direction.

    A vector with NaN or infinity, or of length 0, would match everything: it is refused.
    """
    try:
        if (np := _numpy()) is not None:
            # A list becomes an array sooner than numpy would look at each of its values.
            values = np.frombuffer(array("d", vector)) if type(vector) is list and vector else np.asarray(vector, "d")
            with np.errstate(all="ignore"):
                length = math.sqrt(values.dot(values)) if values.ndim == 1 else 0.0
                if not 0 < length < math.inf:
                    return None
                packed: bytes = (values / length).astype("<f2").tobytes()
            return packed
        length = math.sqrt(math.fsum(x * x for x in vector))
        if not (math.isfinite(length) and length > 0):
            return None
        return struct.pack(f"<{len(vector)}e", *(x / length for x in vector))
    except (TypeError, ValueError, OverflowError, struct.error):
        return None


def similarities(query: bytes, stored: Sequence[bytes]) -> list[float]:
    """Return the cosine of `query` with each of `stored`, in [-1, 1]; NaN where lengths differ or a value is no number.

    Computed here, from signed bytes, rather than taken from the server.
    """
    if (np := _numpy(len(stored))) is not None:
        if len(stored) == 1:  # most hits: without the matrix it takes half the time
            return [_one_similarity(np, query, stored[0])]
        q = np.frombuffer(query, dtype="<f2").astype(np.float32)
        q_length = float(np.sqrt(q @ q))
        rows = [s if len(s) == len(query) else b"\x00\x7e" * (len(query) // 2) for s in stored]  # 0x7e00 is NaN
        if not rows:
            return []
        matrix = np.frombuffer(b"".join(rows), dtype="<f2").reshape(len(rows), -1).astype(np.float32)
        with np.errstate(all="ignore"):
            result: list[float] = (matrix @ q / (np.sqrt(np.einsum("ij,ij->i", matrix, matrix)) * q_length)).tolist()
        return result
    return [_similarity(query, s) for s in stored]


def _one_similarity(np: Any, query: bytes, stored: bytes) -> float:
    if len(stored) != len(query) or len(query) % 2:
        return math.nan
    both = np.frombuffer(query + stored, "<f2").astype("f").reshape(2, -1)
    with np.errstate(all="ignore"):
        (one, between), (_, other) = both.dot(both.T).tolist()
    length = math.sqrt(one * other)
    return float(between / length) if length else math.nan


def _similarity(query: bytes, stored: bytes) -> float:
    if len(stored) != len(query) or len(query) % 2:
        return math.nan
    a = struct.unpack(f"<{len(query) // 2}e", query)
    b = struct.unpack(f"<{len(stored) // 2}e", stored)
    length = math.sqrt(sum(map(mul, a, a)) * sum(map(mul, b, b)))
    return sum(map(mul, a, b)) / length if length else math.nan
