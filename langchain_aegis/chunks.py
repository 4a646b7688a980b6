"""Tell the retrieved chunks in a prompt from the text around them.

The order in which a retriever returns its chunks says nothing about the answer, so a scope takes them as a set.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.notices import warn_once

Spans = Sequence[tuple[int, int]]
ChunkRule = str | Callable[[str], Spans]
QUESTION_MARK = "\ufffc"  # stands for the question while chunks are looked for


@dataclass(slots=True)
class Part:
    """A piece of text: its chunks, and what stands before, between and after them.

    Attributes:
        gaps: One more than there are chunks.
        chunks: In the order of the text.
    """

    gaps: tuple[str, ...]
    chunks: tuple[str, ...] = ()


class Chunks:
    """Finds chunks by a rule.

    Args:
        rule: A regular expression whose group 1, or whole match if it has no group, is one chunk; or a callable that
            returns (start, end) of each. None: there are no chunks. A rule sees the text with one mark in place of
            the question, so that the question cannot decide what counts as a chunk.

    Raises:
        AegisConfigError: The rule is neither, or no regular expression.
    """

    def __init__(self, rule: ChunkRule | None) -> None:
        self._find: Callable[[str], Spans] | None
        if rule is None or (callable(rule) and not isinstance(rule, str)):
            self._find = rule
            return
        try:
            self._find = _by_pattern(re.compile(rule))
        except (re.error, TypeError) as exc:
            raise AegisConfigError(f"chunks: {rule!r} is neither a regular expression nor a callable ({exc})") from exc

    def __bool__(self) -> bool:
        """Return whether there is a rule."""
        return self._find is not None

    def split(self, text: str) -> Part:
        """Return `text` in pieces."""
        return _part(text, 0, len(text), self._spans(text))

    def split_around(self, prefix: str, suffix: str) -> tuple[Part, Part]:
        """Return what stands before and after a question in pieces; no chunk reaches across the question."""
        text = f"{prefix}{QUESTION_MARK}{suffix}"
        spans = self._spans(text)
        return _part(text, 0, len(prefix), spans), _part(text, len(prefix) + 1, len(text), spans)

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Return the spans in order; none if the rule makes no sense of this text."""
        if self._find is None:
            return []
        try:
            spans = sorted((int(start), int(end)) for start, end in self._find(text))
            ends = [0, *(end for _, end in spans)]
            if any(not before <= start <= end <= len(text) for before, (start, end) in zip(ends, spans, strict=False)):
                raise ValueError("chunks overlap or lie outside the text")
        except Exception as exc:  # whatever a caller's rule raises must not break the call
            warn_once(
                "chunks_failed",
                f"the rule for chunks failed ({type(exc).__name__}), so the text counts as it stands and the order of "
                "its chunks matters. The rule is asked about every message of a prompt, with one character in place of "
                "the question: let it return no spans where there are none",
            )
            return []
        return [(start, end) for start, end in spans if start < end]


def _by_pattern(pattern: re.Pattern[str]) -> Callable[[str], Spans]:
    group = 1 if pattern.groups else 0
    return lambda text: [span for match in pattern.finditer(text) if (span := match.span(group)) != (-1, -1)]


def _part(text: str, start: int, end: int, spans: Spans) -> Part:
    inside = [span for span in spans if start <= span[0] and span[1] <= end]
    edges = [start, *(edge for span in inside for edge in span), end]
    gaps = tuple(text[edges[i] : edges[i + 1]] for i in range(0, len(edges), 2))
    return Part(gaps, tuple(text[first:last] for first, last in inside))
