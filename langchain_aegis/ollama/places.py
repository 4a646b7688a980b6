"""Where a setting stands in a file, to the character."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self


@dataclass(frozen=True)
class Place:
    """The characters of one entry of a file; all spans are (first, behind the last), counted from 0.

    Attributes:
        path: The file.
        line: Line of the entry, counted from 1.
        name: Span of the entry's name; of a list's item, the item.
        value: Span of its value.
        entry: Span of name and value together.
        yaml: It stands in a YAML file.
        quotes: The value is YAML of its own, which a new one is quoted for; not so in `NAME=value`.
    """

    path: Path
    line: int
    name: tuple[int, int]
    value: tuple[int, int]
    entry: tuple[int, int]
    yaml: bool = False
    quotes: bool = False


@dataclass(frozen=True)
class Edit:
    """One change of a file.

    Attributes:
        kind: "remove" the entry, "rename" it, or give it another "value" (as it stands in the file).
        text: The new name or value.
        why: Stands in a comment beside it.
    """

    kind: Literal["remove", "rename", "value"]
    place: Place
    why: str
    text: str = ""


class Text(str):
    """A text of a file that knows where it stands.

    Attributes:
        place: None if it stands nowhere.
        raw: The same characters as the file has them, with quotes and variables.
        override: It names a value that replaces another file's instead of being merged with it.
    """

    place: Place | None
    raw: str
    override: bool

    def __new__(cls, value: str, place: Place | None = None, raw: str = "", *, override: bool = False) -> Self:
        """Make the text; `raw` is empty where the file is not at hand."""
        text = super().__new__(cls, value)
        text.place, text.raw, text.override = place, raw, override
        return text


def line_of(value: object) -> str:
    """Return ":12" for what stands in line 12, "" for what stands nowhere."""
    place = getattr(value, "place", None)
    return f":{place.line}" if place else ""
