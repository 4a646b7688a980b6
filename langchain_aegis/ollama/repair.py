"""Correct a file by changing only what is wrong in it: a copy beside the original, its comments kept."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import yaml

from langchain_aegis.ollama.findings import Finding
from langchain_aegis.ollama.places import Edit


@dataclass(frozen=True)
class Repaired:
    """One corrected file.

    Attributes:
        original: The file that was read, which is left as it is.
        written: The new file beside it.
        changes: How many were made.
        open: Warnings and errors of the file that must be corrected by hand.
    """

    original: Path
    written: Path
    changes: int
    open: int


def repair(findings: Iterable[Finding]) -> list[Repaired]:
    """Write a corrected copy beside each file that has a finding with an edit.

    `compose.yml` becomes `compose.fixed.yml`, `.env` becomes `.env.fixed`; if that exists already, with another
    content, the next free number is used (`compose.fixed.2.yml`). Nothing is ever overwritten.

    Raises:
        OSError: A file cannot be read or written.
    """
    by_file: dict[Path, list[Edit]] = {}
    for finding in findings:
        if finding.edit is not None:
            by_file.setdefault(finding.edit.place.path, []).append(finding.edit)
    done = []
    for path, edits in by_file.items():
        before = path.read_bytes()
        bom = before.startswith(b"\xef\xbb\xbf")
        text, changes = corrected(before.decode("utf-8-sig"), edits, yaml_file=edits[0].place.yaml)
        after = (b"\xef\xbb\xbf" if bom else b"") + text.encode()
        by_hand = [f for f in findings if f.edit is None and f.severity in ("warning", "error")]
        here = [f for f in by_hand if f.where.startswith(f"{path}:") or f.where.startswith(f"{path} ")]
        done.append(Repaired(path, _write(path, after), changes, len(here)))
    return done


def corrected(text: str, edits: Iterable[Edit], *, yaml_file: bool) -> tuple[str, int]:
    """Return the text with the edits made, and how many; one that meets another's characters is left out."""
    taken: list[tuple[int, int]] = []
    changes: list[tuple[int, int, str]] = []
    for edit in dict.fromkeys(edits):
        start, end, new = _change(text, edit)
        if all(end <= a or start >= b for a, b in taken):
            taken.append((start, end))
            changes.append((start, end, new))
    empty = set(_emptied(text)) if yaml_file else set()
    for start, end, new in sorted(changes, reverse=True):
        text = text[:start] + new + text[end:]
    if yaml_file:
        for at in sorted((at for path, at in _emptied(text).items() if path not in empty), reverse=True):
            text = f"{text[:at]} {{}}{text[at:]}"  # compose wants a mapping there, not nothing
    return text, len(changes)


def _emptied(text: str) -> dict[tuple[str, ...], int]:
    """Return the keys without a value: path -> where a value would stand."""
    found: dict[tuple[str, ...], int] = {}

    def visit(node: yaml.Node | None, path: tuple[str, ...]) -> None:
        if not isinstance(node, yaml.MappingNode) or len(path) > 3:
            return
        for key, value in node.value:
            here = (*path, str(key.value))
            colon = re.compile(r"[ \t]*:").match(text, key.end_mark.index)
            if colon and isinstance(value, yaml.ScalarNode) and value.value == "" and value.style is None:
                found[here] = colon.end()
            visit(value, here)

    visit(yaml.compose(text, Loader=yaml.SafeLoader), ())
    return found


def _change(text: str, edit: Edit) -> tuple[int, int, str]:
    place = edit.place
    if edit.kind == "rename":
        return *place.name, _quoted_like(text[slice(*place.name)], edit.text)
    if edit.kind == "value":
        old = text[slice(*place.value)]
        new = edit.text
        if place.quotes and not new.startswith(("[", "{")):
            new = _quoted_like(old, new) if old[:1] in ("'", '"') else json.dumps(new)
        elif old[:1] in ("'", '"') and not place.quotes and old[-1:] == old[:1]:
            new = f"{old[0]}{new}{old[0]}"
        return *place.value, new if place.value[0] > place.name[1] or place.value == place.name else f" {new}"
    return _removal(text, edit)


def _quoted_like(old: str, new: str) -> str:
    quote = old[:1]
    return f"{quote}{new}{quote}" if quote in ("'", '"') and old[-1:] == quote else new


def _removal(text: str, edit: Edit) -> tuple[int, int, str]:
    """Comment out an entry that has its lines for itself; cut one out of a line with others."""
    start, end = edit.place.entry
    first = text.rfind("\n", 0, start) + 1
    newline = re.compile(r"\r?\n|\Z").search(text, end)
    last = newline.start() if newline else len(text)
    before, after = text[first:start], text[end:last]
    if re.fullmatch(r"[ \t]*(?:- +|export[ \t]+)?", before) and re.fullmatch(r"[ \t]*(#.*)?", after):
        indent = before[: len(before) - len(before.lstrip())]
        lines = text[first:last].split("\n")
        note = f"{indent}# aegis doctor: {' '.join(edit.why.split())}"
        ending = "\r" if lines[0].endswith("\r") or text[last : last + 2] == "\r\n" else ""
        out = [f"{note}{ending}", *(f"{indent}# {line[len(indent) :]}" for line in lines)]
        return first, last, "\n".join(out)
    if comma := re.match(r"[ \t]*,[ \t]*", text[end:]):
        return start, end + comma.end(), ""
    comma = re.search(r",\s*$", text[:start])
    return comma.start() if comma else start, end, ""


def _write(path: Path, content: bytes) -> Path:
    for number in count(1):
        target = _beside(path, number)
        try:
            with target.open("xb") as file:
                file.write(content)
        except FileExistsError:
            if target.is_file() and target.read_bytes() == content:
                return target
            continue
        return target
    raise AssertionError("unreachable")


def _beside(path: Path, number: int) -> Path:
    word = "fixed" if number == 1 else f"fixed.{number}"
    if path.suffix in (".yml", ".yaml", ".env", ".conf"):
        return path.with_name(f"{path.stem}.{word}{path.suffix}")
    return path.with_name(f"{path.name}.{word}")
