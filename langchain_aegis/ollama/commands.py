"""Which programs a shell command or a container's command calls."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_OPERATORS = {
    "|",
    "||",
    "&&",
    ";",
    "&",
    "(",
    ")",
    "{",
    "}",
    "!",
    "if",
    "then",
    "else",
    "elif",
    "do",
    "done",
    "while",
    "until",
    "fi",
}
_WRAPPERS = {"exec", "timeout", "env", "sh", "bash", "ash", "nohup", "nice", "time", "eval", "command", "gosu"}
_BLANK = re.compile(r"[ \t\r\n]")  # what shlex splits at
_INSTALLS = re.compile(r"\b(apt(-get)?|apk|dnf|yum|microdnf)\b.*\b(install|add)\b")


@dataclass(frozen=True)
class Command:
    """What is run: the words, scripts of `sh -c` taken apart, and the programs among them."""

    words: tuple[str, ...]
    programs: tuple[str, ...]
    text: str

    @property
    def installs(self) -> bool:
        """Say whether it installs programs, so that any may be there."""
        return _INSTALLS.search(self.text) is not None


def of_health_check(test: Any) -> Command:
    """Return what a health check's `test` calls; nothing for one that is switched off."""
    if isinstance(test, list) and test:
        kind, words = str(test[0]), [str(word) for word in test[1:]]
        if kind == "NONE":
            return Command((), (), "")
        if kind not in ("CMD", "CMD-SHELL"):  # forgotten, which compose refuses
            return of_words([kind, *words])
        return of_text(words[0]) if kind == "CMD-SHELL" and words else of_words(words)
    return of_text(str(test or ""))


def of_service(value: Any) -> Command:
    """Return what a service's `command` or `entrypoint` calls, in either of its forms."""
    if isinstance(value, list):
        return of_words([str(word) for word in value if word is not None])
    return of_text(str(value or ""))


def of_text(text: str) -> Command:
    """Return what a line of shell calls."""
    # `$$` and `$(...)` stand for what the shell fills in; a comment runs to the end of its line.
    plain = re.sub(r"(?m)(^|\s)#.*$", " ", text)
    lexer = shlex.shlex(plain.replace("\n", " ; "), posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        words = list(lexer)
    except ValueError:  # unbalanced quotes
        words = plain.split()
    return of_words(words, text)


def of_words(words: Sequence[str], text: str = "") -> Command:
    """Return what words call that are taken apart already."""
    all_words: list[str] = []
    programs: list[str] = []
    expected, loop, file = True, False, False
    for word in words:
        all_words.append(word)
        if file:  # behind < or >
            file = False
            continue
        if re.fullmatch(r"[<>&]*[<>][<>&]*", word):
            file = True
            continue
        if word in _OPERATORS:
            expected = True
        elif word == "for":
            loop, expected = True, False
        elif expected and not loop and not re.match(r"-|\d|[A-Za-z_]\w*=|[<>$]", word) and not _BLANK.search(word):
            programs.append(word.rpartition("/")[2])
            expected = programs[-1] in _WRAPPERS
        if word == ";":
            loop = False
    for script in (word for word in words if _BLANK.search(word)):  # sh -c '...'
        inner = of_text(script)
        all_words += inner.words
        programs += inner.programs
    for inside in re.findall(r"\$\(([^()]*)\)|`([^`]*)`", text):
        programs += of_text(inside[0] or inside[1]).programs
    return Command(tuple(all_words), tuple(dict.fromkeys(programs)), text or shlex.join(words))
