"""Read Ollama's answers from bytes, one rule for streamed ones and whole ones. Pure: no network.

Lines end at `\n` only (JSON texts may hold other characters that Python counts as line ends), sizes are bounded,
and an answer counts only when exactly one part said `done: true`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import orjson

from langchain_aegis.errors import AegisError, AegisStreamError
from langchain_aegis.notices import warn_once
from langchain_aegis.refusals import error_line, pull_error

MAX_LINE_BYTES = 8 * 1024 * 1024
MAX_TOTAL_BYTES = 64 * 1024 * 1024
_QUOTED_BYTES = 120
_BOM = b"\xef\xbb\xbf"


class Parts:
    """The parts of one streamed answer, checked as they arrive.

    Attributes:
        begun: The server has answered with a status of success.
        done: The part that ends the answer has been returned.
    """

    missing: ClassVar[str]  # what is not there when the end has not come
    refuse: Callable[..., AegisError] = staticmethod(error_line)

    def __init__(self, *, max_line_bytes: int = MAX_LINE_BYTES, max_total_bytes: int = MAX_TOTAL_BYTES) -> None:
        self.begun = False
        self.done = False
        self._max_line = max_line_bytes
        self._max_total = max_total_bytes
        self._buffer = bytearray()
        self._searched = 0
        self._total = 0
        self._texts: list[str] = []

    @property
    def partial(self) -> str:
        """Text that has arrived so far."""
        return "".join(self._texts)

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Return the parts that `data` completes.

        Raises:
            AegisStreamError: A line is no part of an answer, holds an error, or is too long.
        """
        self._total += len(data)
        if self._total > self._max_total:
            raise self._broken(f"the answer is longer than {self._max_total} bytes")
        if not self._buffer and data.find(b"\n") == len(data) - 1:  # one whole line, as servers send them
            part = self._read(data)
            return [] if part is None else [part]
        if not self._buffer and not data.strip(b" \t\r\n"):  # else a flood of empty lines would be a loop for each
            return []
        self._buffer += data
        parts = []
        while (end := self._buffer.find(b"\n", self._searched)) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._searched = 0
            if (part := self._read(line)) is not None:
                parts.append(part)
        self._searched = len(self._buffer)
        if self._searched > self._max_line:
            raise self._broken(f"a line of the answer is longer than {self._max_line} bytes")
        return parts

    def finish(self) -> list[dict[str, Any]]:
        """Return what a last line without its end holds, once the connection has ended.

        Raises:
            AegisStreamError: No part said that it was the last, so the answer is not whole.
        """
        last = self._read(bytes(self._buffer))
        self._buffer.clear()
        if not self.done:
            raise self._broken(f"the answer ended without {self.missing}; it may be cut")
        return [last] if last is not None else []

    def whole(self, body: bytes) -> dict[str, Any]:
        """Return the one part that an answer without streaming consists of."""
        part = self._read(body)
        if part is None or not self.done:
            raise self._broken(f"the answer came without {self.missing}; it may be cut")
        return part

    def _read(self, line: bytes) -> dict[str, Any] | None:
        line = line.strip(b" \t\r\n").removeprefix(_BOM)
        if not line:
            return None
        if len(line) > self._max_line:
            raise self._broken(f"a line of the answer is longer than {self._max_line} bytes")
        if self.done:
            warn_once("data_after_done", "an Ollama server sent more after the end of an answer; it was ignored")
            return None
        part = parse_object(line, texts=self._texts, refuse=self.refuse)
        self._accept(part, line)
        return part

    def _accept(self, part: dict[str, Any], line: bytes) -> None:
        """Check a part, and note whether it is the last."""
        raise NotImplementedError

    def _broken(self, message: str) -> AegisStreamError:
        return AegisStreamError(message, partial=self.partial)


class ChatParts(Parts):
    """The parts of one answer of `/api/chat`."""

    missing = "`done: true`"

    def _accept(self, part: dict[str, Any], line: bytes) -> None:
        message = part.get("message")
        done = part.get("done") is True
        if message is None and done:
            message = part["message"] = {}
        if not isinstance(message, dict) or not isinstance(message.get("content") or "", str):
            raise self._broken(f"not a part of an answer of Ollama: {_quote(line)}")
        self._texts.append(message.get("content") or "")
        self.done = done


class PullParts(Parts):
    """The parts of one answer of `/api/pull`: how far the download is."""

    missing = "`status: success`"
    refuse = staticmethod(pull_error)

    def _accept(self, part: dict[str, Any], line: bytes) -> None:
        if not isinstance(part.get("status"), str):
            raise self._broken(f"not a part of an answer of Ollama: {_quote(line)}")
        self.done = part["status"] == "success"


def parse_object(
    body: bytes, *, texts: Iterable[str] = (), refuse: Callable[..., AegisError] = error_line
) -> dict[str, Any]:
    """Return the JSON object that `body` holds.

    Args:
        body: The JSON text.
        texts: What had come before it, for the errors' `partial`; put together only when one is raised.
        refuse: Makes the error of the object's `error`.

    Raises:
        AegisStreamError: It is no JSON object.
        AegisError: What `refuse` makes of its `error`, if it has one.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise AegisStreamError(f"not an answer of Ollama: {_quote(body)}", partial="".join(texts)) from exc
    if not isinstance(value, dict):
        raise AegisStreamError(f"not an answer of Ollama: {_quote(body)}", partial="".join(texts))
    if error := value.get("error"):
        raise refuse(error, partial="".join(texts))
    return value


def _quote(line: bytes) -> str:
    return repr(line[:_QUOTED_BYTES].decode("utf-8", "replace"))
