"""Read env files as compose reads them, and systemd drop-ins, with the place of every variable."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from langchain_aegis.ollama.places import Place


@dataclass(frozen=True)
class Variable:
    """One variable of a server.

    Attributes:
        value: None if it is not known here.
        where: File, line and name, for people.
        place: Where it stands to the character; None if it stands in no file.
        filled: The value was filled in from other variables.
    """

    value: str | None
    where: str
    place: Place | None = None
    filled: bool = False


def read_variables(path: Path) -> list[tuple[str, Variable]]:
    """Return the variables of an env file or systemd unit in their order, repeated ones too.

    Raises:
        OSError: The file cannot be read.
        UnicodeDecodeError: It is no text.
    """
    text = read_text(path)
    unit = re.search(r"(?m)^\s*\[Service\]\s*$", text) is not None
    return list(_of_unit(path, text) if unit else _of_env(path, text))


def read_env_file(path: Path) -> dict[str, Variable]:
    """Return the variables of an env file, the last one of a name winning. Raises as `read_variables`."""
    return dict(read_variables(path))


def read_text(path: Path) -> str:
    """Return a file's text with its own line ends. Raises as `read_variables`."""
    try:
        content = path.read_bytes()
    except ValueError as exc:  # a name that no file can have
        raise OSError(str(exc)) from exc
    return content.decode("utf-8-sig")


def identity(path: Path) -> Path:
    """Return one path for all ways to write it, as far as it can be resolved."""
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):
        return path.absolute()


def _of_env(path: Path, text: str) -> Iterator[tuple[str, Variable]]:
    position = 0
    while found := _ENTRY.search(text, position):
        position = found.end()
        name, line = found["name"], text.count("\n", 0, found.start("name")) + 1
        raw, start = found["raw"], found.start("raw")
        value, length = _value(raw)
        if raw[:1] in ("'", '"') and (more := _quoted(text, start)):
            value, length = more
            position = start + length
        place = Place(path, line, found.span("name"), (start, start + length), (found.start("name"), start + length))
        yield name, Variable(value, f"{path}:{line} {name}", place)


def _quoted(text: str, start: int) -> tuple[str | None, int] | None:
    """Return value and length of a quoted value, which may go over several lines; None if the quote is not closed."""
    found = re.compile(r"'[^']*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL).match(text, start)
    if not found:
        return None
    inner = found[0][1:-1]
    return (None if found[0][0] == '"' and _USES.search(inner) else inner), len(found[0])


def _value(raw: str) -> tuple[str | None, int]:
    """Return the value of the rest of a line, None if it depends on another variable, and its length."""
    bare = re.split(r"(?:^|\s)#", raw, maxsplit=1)[0].rstrip()
    return (None if _USES.search(bare) else bare), len(bare)


def _of_unit(path: Path, text: str) -> Iterator[tuple[str, Variable]]:
    for line in re.finditer(r"(?m)^[ \t]*Environment[ \t]*=(.*)$", text):
        for found in _ASSIGNED.finditer(text, line.start(1), line.end(1)):
            kind = "quoted" if found["quoted"] else "plain"
            inner = found[kind]
            start = found.start(kind)
            name, equals, value = inner.partition("=")
            if equals and _NAME.fullmatch(name):
                number = text.count("\n", 0, start) + 1
                ends = (start + len(name) + 1, start + len(inner))
                whole = (
                    line.span()
                    if found.span() == (line.start(1), line.start(1) + len(line[1].strip()))
                    else found.span()
                )
                place = Place(path, number, (start, start + len(name)), ends, whole)
                yield name, Variable(value, f"{path}:{number} {name}", place)


_NAME = re.compile(r"[A-Za-z_]\w*")
_USES = re.compile(r"\$\{|\$[A-Za-z_]")
_ENTRY = re.compile(
    r"^[ \t]*(?:export[ \t]+)?(?P<name>[A-Za-z_][A-Za-z0-9_.-]*)[ \t]*[=:][ \t]*(?P<raw>[^\r\n]*)",
    re.MULTILINE,
)
_ASSIGNED = re.compile(r"\"(?P<quoted>[^\"]*)\"|(?P<plain>[^\s\"]+)")
