"""Variables in compose files: `$NAME`, `${NAME:-default}` and the like, as compose fills them in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_NAME = re.compile(r"[A-Za-z_]\w*")
_OPERATOR = re.compile(r":?[-+?]")


def interpolate(text: str, values: Mapping[str, str]) -> str:
    """Fill in the variables of a text; one that is neither known nor has a default stays as `${NAME}`."""
    return "".join(part if name is None else _one(name, part, values) for name, part in _parts(text))


def unknown(text: str) -> bool:
    """Say whether an interpolated text still depends on a variable that is not known."""
    return "${" in text


def names(text: str) -> set[str]:
    """Return the variables that a text uses, those of defaults too."""
    found = set()
    for name, rest in _parts(text):
        if name is not None:
            found |= {name} | names(rest)
    return found


def _parts(text: str) -> Iterator[tuple[str | None, str]]:
    """Yield (None, plain text) and (name of a variable, what follows the name inside its braces)."""
    position = 0
    while (at := text.find("$", position)) >= 0:
        yield None, text[position:at]
        position = at + 1
        if text.startswith("$", position):
            yield None, "$"
            position += 1
        elif text.startswith("{", position) and (end := _closing(text, position)) is not None:
            inner = text[position + 1 : end]
            found = _NAME.match(inner)
            if found:
                yield found[0], inner[found.end() :]
            else:
                yield None, text[at : end + 1]
            position = end + 1
        elif found := _NAME.match(text, position):
            yield found[0], ""
            position = found.end()
        else:
            yield None, "$"
    yield None, text[position:]


def _closing(text: str, opening: int) -> int | None:
    depth = 0
    for at in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return at
    return None


def _one(name: str, rest: str, values: Mapping[str, str]) -> str:
    value = values.get(name)
    found = _OPERATOR.match(rest)
    operator = found[0] if found else ""
    other = rest[len(operator) :]
    if operator.endswith("+"):
        return interpolate(other, values) if value else ""
    if value or (value is not None and not operator.startswith(":")):
        return value
    return interpolate(other, values) if operator.endswith("-") else f"${{{name}}}"
