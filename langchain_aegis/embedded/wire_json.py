"""JSON exactly as Ollama's Go server writes it.

Go escapes `<`, `>` and `&`, writes float32 with the fewest digits that read back the same, sorts the keys of its maps
and drops trailing zeros of times. Clients that compare bytes, or sign them, see the difference.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import struct
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

_HTML = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_ESCAPED = re.compile("[<>&\u2028\u2029]")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_WHOLE = re.compile(rb"\.0(?=[,\]])")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def encode(value: Any) -> bytes:
    """Return `value` as compact JSON in UTF-8; object keys keep their order."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    text = _ESCAPED.sub(lambda match: _HTML[match.group()], text)
    return _LONE_SURROGATE.sub("\ufffd", text).encode()


def line(value: Any) -> bytes:
    """Return one line of a streamed answer, its newline included."""
    return encode(value) + b"\n"


def without_zeros(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what Go's `omitempty` drops: 0, "", empty lists, None and False."""
    return {name: value for name, value in fields.items() if value or (isinstance(value, dict) and value)}


def timestamp(nanoseconds: int | None = None) -> str:
    """Return a time (default: now) in UTC as RFC 3339 with up to nine decimals, trailing zeros dropped.

    Args:
        nanoseconds: Since 1970-01-01 UTC.
    """
    now = time.time_ns() if nanoseconds is None else nanoseconds
    seconds, fraction = divmod(now, 1_000_000_000)
    head = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    tail = f".{fraction:09d}".rstrip("0").rstrip(".")
    return f"{head}{tail}Z"


def float32(value: float) -> str:
    """Return a finite number as Go writes a float32: the fewest digits that give the same 32 bits."""
    bits = struct.pack("f", value)
    for digits in (6, 7, 8, 9):
        text = f"{value:.{digits}g}"
        if struct.pack("f", float(text)) == bits:
            break
    number = float(text)
    if number and (abs(number) < 1e-6 or abs(number) >= 1e21):
        mantissa, _, exponent = f"{number:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{exponent[0]}{exponent[1:].lstrip('0') or '0'}"
    if "e" in text:  # Go switches to an exponent later than Python
        text = f"{number:.{9 + 6}f}".rstrip("0").rstrip(".")
    return text


def float32_lists(vectors: Iterable[Sequence[float]]) -> bytes:
    """Return vectors as a JSON array of arrays of float32."""
    vectors = list(vectors)
    if (np := _numpy(len(vectors))) is not None:
        with contextlib.suppress(ValueError):  # lists of different lengths
            text = orjson.dumps(np.array(vectors, np.float32), option=orjson.OPT_SERIALIZE_NUMPY)
            if b"e" not in text and b"n" not in text:  # exponents and null, which Go writes in another way
                return _WHOLE.sub(b"", text)
    return ("[" + ",".join("[" + ",".join(map(float32, vector)) + "]" for vector in vectors) + "]").encode()


def _numpy(vectors: int) -> Any:
    """Return numpy if it is loaded, or is there and worth the fifth of a second that loading it takes."""
    if vectors > 8 or "numpy" in sys.modules:
        with contextlib.suppress(ImportError):
            return importlib.import_module("numpy")  # waits for another thread that is loading it
    return None


class GoSyntaxError(ValueError):
    """A request body that is no JSON; the message is the one that Go gives."""


def decode(body: bytes) -> Any:
    """Parse the first JSON value of a request body; what follows it is ignored, as Go's decoder does.

    Raises:
        GoSyntaxError: The body is empty ("EOF"), ends early or is not JSON.
    """
    text = body.decode("utf-8", "replace").lstrip(" \t\r\n")
    if not text:
        raise GoSyntaxError("EOF")
    try:
        value, _ = _DECODER.raw_decode(text)
    except json.JSONDecodeError as exc:
        # A value that is cut off inside a string or word is reported at its start, not at the end.
        rest = text[exc.pos :].strip()
        if not rest or exc.msg.startswith("Unterminated") or any(w.startswith(rest) for w in ("true", "false", "null")):
            raise GoSyntaxError("unexpected EOF") from exc
        raise GoSyntaxError(f"invalid character {_quoted(rest[0])} looking for beginning of value") from exc
    except RecursionError as exc:
        raise GoSyntaxError("exceeded max depth") from exc
    return _mended(value) if _SURROGATE_ESCAPE.search(text) else value


def _mended(value: Any) -> Any:
    """Replace halves of surrogate pairs, as Go's decoder does: they are no characters and cannot be encoded."""
    if isinstance(value, str):
        return _LONE_SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_mended(item) for item in value]
    if isinstance(value, dict):
        return {_mended(name): _mended(item) for name, item in value.items()}
    return value


def _refuse_constant(name: str) -> Any:
    raise GoSyntaxError(f"invalid character {_quoted(name[0])} looking for beginning of value")


def _quoted(char: str) -> str:
    return {"'": r"'\''", '"': "'\"'"}.get(char, f"'{char}'")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
