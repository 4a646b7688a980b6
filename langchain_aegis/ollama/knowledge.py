"""What an Ollama server does with each setting, request field and combination, by its release.

    table = knowledge()
    table.setting("OLLAMA_NUM_CTX").status                       # "ignored"
    table.setting("OLLAMA_NUM_PARALLEL", "0.9.0").default        # "chosen by memory: 2 or 1"
    table.setting("truncate", "0.9.0").status                    # "not yet"
    table.setting("OLLAMA_NEW_THING").status                     # "unknown": unknown to us
    table.server, table.request, table.contradictions            # the rows
    print(table.render_markdown())

The rows are data: settings.toml (environment variables, images), requests.toml and contradictions.toml, each row with
the files of Ollama's source that it was read in.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal

Status = Literal["read", "barely", "ignored", "not yet", "gone", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a setting and a field of a request have in common.

    Attributes:
        reads: "yes", "no" (ignored) or "barely" (read, with hardly any effect).
        since: First release that has it, None if no release did.
        until: Last release that read it, where it is gone.
        barely_since: First release in which it has hardly any effect, where it had one before.
        default: Release -> what holds from it on where nothing is set.
        effect: What it does, in one sentence.
        needs: What must be there for it to work; empty if nothing.
        instead: What to use instead of one that is ignored.
        source: Files of Ollama's source that say so.
    """

    name: str
    reads: Literal["yes", "no", "barely"] = "yes"
    since: str | None = None
    until: str | None = None
    barely_since: str | None = None
    default: Mapping[str, str] = field(default_factory=dict)
    effect: str = ""
    needs: str = ""
    instead: str = ""
    source: str = ""

    def default_at(self, version: str | None = None) -> str | None:
        """Return the default of a release (None: the newest known); None if there is no such setting in it."""
        release = version_tuple(version) if version else None
        held = [text for since, text in self.default.items() if release is None or version_tuple(since) <= release]
        return held[-1] if held else None

    def status_at(self, version: str | None = None) -> Status:
        """Return what a release (None: the newest known) does with it."""
        release = version_tuple(version) if version else None
        if self.until:
            if release is None or release > version_tuple(self.until):
                return "gone"
            return "not yet" if self.since and release < version_tuple(self.since) else "read"
        if self.reads == "no":
            return "ignored"
        if self.since and release is not None and release < version_tuple(self.since):
            return "not yet"
        full = self.barely_since and release is not None and release < version_tuple(self.barely_since)
        return "read" if self.reads == "yes" or full else "barely"


@dataclass(frozen=True, kw_only=True)
class ServerSetting(Row):
    """One environment variable of the server, which reads it once, when it starts.

    Attributes:
        kind: How the server reads the value; None if it does not.
        values: Words that are understood; empty if any is.
        rename: The setting that takes the same value and does what was meant; empty if there is none.
    """

    kind: Literal["count", "bool", "duration", "text"] | None = None
    values: tuple[str, ...] = ()
    rename: str = ""

    def misread(self, value: str, version: str | None = None) -> str | None:
        """Say what a release (None: the newest known) makes of a `value` that it cannot read; None if it can."""
        text = bare(value)
        if not text:
            return None
        if self.kind == "count" and not text.isdigit():
            return "is no whole number, so the default is used"
        if self.kind == "bool" and text not in TRUE | FALSE:
            return "is neither true nor false, so it counts as true"
        if self.kind == "duration" and not (_NUMBER.fullmatch(text) or _DURATION.fullmatch(text)):
            return "is no duration such as 30m, so the default of 5m is used"
        if self.values and text.lower() not in self.values:
            old = version is not None and version_tuple(version) < version_tuple(knowledge().runner_since)
            then = "so f16 is used" if old else "so every model fails to load"
            return f"is none of {', '.join(self.values)}, {then}"
        return None


@dataclass(frozen=True, kw_only=True)
class RequestField(Row):
    """One field of a request.

    Attributes:
        where: "options" (inside `options`) or "top" (beside `model`); elsewhere it is ignored in silence.
        calls: "chat", "generate", "embed": the calls that know it.
        type: Its JSON type.
        reload: A value that differs from the loaded one starts the model's runner anew.
    """

    where: Literal["options", "top"] | None = None
    calls: tuple[str, ...] = ()
    type: str = ""
    reload: bool = False


@dataclass(frozen=True, kw_only=True)
class Contradiction:
    """Settings of one server that do not go together; the fields are those of contradictions.toml."""

    code: str
    severity: Literal["info", "warning", "error"]
    at: str
    what: str
    why: str
    fix: str
    source: str
    since: str | None = None
    until: str | None = None
    when: Mapping[str, str] = field(default_factory=dict)
    product: tuple[str, ...] = ()
    above: int = 0
    remove: str = ""

    def applies(self, values: Mapping[str, str], version: str | None = None) -> bool:
        """Say whether the `values` of one server of a release (None: the newest known) contradict each other."""
        release = version_tuple(version) if version else None
        if release is not None and self.since and release < version_tuple(self.since):
            return False
        if self.until and (release is None or release > version_tuple(self.until)):
            return False
        if self.product:
            product = 1
            for name in self.product:
                text = bare(values.get(name, ""))
                product *= int(text) if text.isdigit() else 0
            if product <= self.above:
                return False
        return all(_holds(condition, bare(values.get(name, ""))) for name, condition in self.when.items())


@dataclass(frozen=True, kw_only=True)
class Image:
    """What an official image holds, for health checks.

    Attributes:
        names: Repositories of the image, without a tag.
        tag: A version that is known to be good.
        port: The port that its server listens on.
        present: Programs that are in it for certain.
        absent: Programs that are not in it.
        check: A health check that works.
    """

    names: tuple[str, ...]
    tag: str
    port: int
    present: tuple[str, ...]
    absent: tuple[str, ...]
    check: str


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What is known of one name in one release.

    Attributes:
        status: "read", "barely" (hardly any effect), "ignored" (never read), "not yet" or "gone" (read by other
            releases), "unknown" (unknown to us).
        default: What holds where it is not set; None if there is nothing.
        certain: False if the name, or the release, is unknown to us: a release outside the table is judged like the
            nearest one in it.
        row: The row of the table, None for an unknown name.
    """

    name: str
    status: Status
    default: str | None = None
    certain: bool = True
    row: ServerSetting | RequestField | None = None


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """The whole table.

    Attributes:
        verified: Newest release whose source the table was read in.
        oldest: Oldest such release.
        runner_since: First release with today's runner (llama-server).
        server: Environment variable -> its row.
        request: Field of a request -> its row.
        contradictions: Settings that do not go together.
        one_slot: Family of models that gets one slot whatever is set -> first release that does so.
        application: Names that applications use for themselves.
        application_words: Words by which other names of applications are recognised.
        image: "ollama", "redis" -> what its image holds.
    """

    verified: str
    oldest: str
    runner_since: str
    server: Mapping[str, ServerSetting]
    request: Mapping[str, RequestField]
    contradictions: tuple[Contradiction, ...]
    one_slot: Mapping[str, str]
    application: frozenset[str]
    application_words: frozenset[str]
    image: Mapping[str, Image]

    def setting(self, name: str, version: str | None = None) -> Standing:
        """Return what is known of an environment variable, or of a field of a request.

        Args:
            name: E.g. "OLLAMA_NUM_PARALLEL" or "num_ctx".
            version: Release of the server, e.g. "0.32.15"; None: the newest known.
        """
        row = self.server.get(name) or self.request.get(name)
        if row is None:
            return Standing(name=name, status="unknown", certain=False)
        return Standing(
            name=name, status=row.status_at(version), default=row.default_at(version),
            certain=self.knows(version), row=row,
        )  # fmt: skip

    def knows(self, version: str | None) -> bool:
        """Say whether a release lies in the range that the table was read in."""
        if version is None:
            return True
        release = version_tuple(version)
        return (
            bool(release) and version_tuple(self.oldest) <= release and release[:2] <= version_tuple(self.verified)[:2]
        )

    def one_slot_for(self, families: tuple[str, ...] | list[str], version: str | None = None) -> str | None:
        """Return the family that gets one slot in a release, whatever OLLAMA_NUM_PARALLEL says; None if none does."""
        for family in families:
            since = self.one_slot.get(family)
            if since and (version is None or version_tuple(version) >= version_tuple(since)):
                return family
        return None

    def of_application(self, name: str) -> bool:
        """Say whether a name is probably an application's own, where an application reads the file too."""
        if name in self.application:
            return True
        likely = bool(self.application_words & set(name.upper().split("_")))
        return likely and name not in self.server and self.nearest(name) is None

    def nearest(self, name: str) -> str | None:
        """Return the setting that `name` is probably a misspelling of; None for a name that applications use."""
        if name in self.application:
            return None
        prefix, _, rest = name.upper().replace("-", "_").partition("_")
        if prefix != "OLLAMA" and not difflib.get_close_matches(prefix, ["OLLAMA"], n=1, cutoff=0.8):
            return None
        known = [n.removeprefix("OLLAMA_") for n, s in self.server.items() if s.reads == "yes" and n[:7] == "OLLAMA_"]
        found = difflib.get_close_matches(rest, known, n=1, cutoff=0.8)
        return f"OLLAMA_{found[0]}" if found else None

    def render_markdown(self, version: str | None = None) -> str:
        """Return the table as Markdown: settings, request fields, what is ignored, what contradicts.

        Args:
            version: Release of the server whose defaults are shown; None: the newest known, with the changes before it.
        """
        read = [row for row in self.server.values() if row.status_at(version) in ("read", "barely")]
        fields = [row for row in self.request.values() if row.status_at(version) in ("read", "barely")]
        rest = [row for rows in (self.server, self.request) for row in rows.values() if row not in [*read, *fields]]
        parts = [
            "### Environment of the server", "",
            "Read once, when the server starts.", "",
            *_rows(("Variable", "Since", "Default", "Effect", "Needs", "Source"),
                   [(f"`{r.name}`", r.since, _defaults(r, version), r.effect, r.needs, r.source) for r in read]), "",
            "### Fields of a request", "",
            *_rows(("Field", "Where", "Calls", "Since", "Default", "Reloads the model", "Effect", "Needs", "Source"),
                   [(f"`{r.name}`", "`options`" if r.where == "options" else "beside `model`", ", ".join(r.calls),
                     r.since, _defaults(r, version), "**yes**" if r.reload else "no", r.effect, r.needs, r.source)
                    for r in fields]), "",
            "### Ignored", "",
            *_rows(("Name", "What reads it", "Use instead", "Source"),
                   [(f"`{r.name}`", _readers(r), r.instead, r.source) for r in rest]), "",
            "### What does not go together", "",
            *_rows(("Settings", "Severity", "Releases", "Consequence", "Fix", "Source"),
                   [(c.what, c.severity, _releases(c), c.why, c.fix, c.source) for c in self.contradictions]), "",
            "One slot whatever `OLLAMA_NUM_PARALLEL` says: embedding models, and the families "
            + ", ".join(f"{family} (since {since})" for family, since in self.one_slot.items()) + ".",
        ]  # fmt: skip
        return "\n".join(parts) + "\n"


@cache
def knowledge() -> Knowledge:
    """Return the table; read once per process."""
    settings, requests, contradictions = map(_read, ("settings.toml", "requests.toml", "contradictions.toml"))
    return Knowledge(
        verified=settings["verified"],
        oldest=settings["oldest"],
        runner_since=settings["runner_since"],
        server={name: ServerSetting(name=name, **_row(row)) for name, row in settings["server"].items()},
        request={name: RequestField(name=name, **_row(row)) for name, row in requests["request"].items()},
        contradictions=tuple(Contradiction(**_row(row)) for row in contradictions["contradiction"]),
        one_slot=contradictions["one_slot"]["families"],
        application=frozenset(settings["application"]["names"]),
        application_words=frozenset(settings["application"]["words"]),
        image={name: Image(**_row(row)) for name, row in settings["image"].items()},
    )


def version_tuple(text: str) -> tuple[int, ...]:
    """Return the numbers of a version, to compare with another: "0.33.0-rc2" is (0, 33, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("-")[0]))


def bare(value: str) -> str:
    """Return a value as the server sees it: without blanks and quotes around it."""
    return value.strip().strip("\"'")


def _holds(condition: str, value: str) -> bool:
    """Say whether a value fulfils a condition of contradictions.toml."""
    word, _, rest = condition.partition(" ")
    if condition in ("on", "off", "unset", "not on"):
        off = value in FALSE
        return {"on": bool(value) and not off, "off": off, "unset": not value, "not on": not value or off}[condition]
    if word == "one":
        return value.lower() in rest.split()
    number, bound = (int(value) if value.isdigit() else None), int(rest)
    return number is not None and {"=": number == bound, "<": 0 < number < bound, ">": number > bound}[word]


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files("langchain_aegis.ollama").joinpath(name).read_text(encoding="utf-8"))


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    if isinstance(default := values.get("default"), str):
        values["default"] = {row.get("since", ""): default}
    return values


def _defaults(row: Row, version: str | None) -> str | None:
    if version or len(row.default) < 2:
        return row.default_at(version)
    held = list(row.default.items())
    before = "; ".join(f"before {held[i + 1][0]}: {text}" for i, (_, text) in reversed(list(enumerate(held[:-1]))))
    return f"{held[-1][1]} ({before})"


def _readers(row: Row) -> str:
    return f"{row.since} to {row.until}" if row.until else f"since {row.since}" if row.since else "nothing"


def _releases(c: Contradiction) -> str:
    return " ".join([f"from {c.since}" if c.since else "", f"to {c.until}" if c.until else ""]).strip() or "all"


def _rows(head: tuple[str, ...], rows: list[tuple[str | None, ...]]) -> list[str]:
    cells = [[(cell or "").replace("|", "\\|") for cell in row] for row in [head, ("---",) * len(head), *rows]]
    return [f"| {' | '.join(row)} |" for row in cells]


TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})
_NUMBER = re.compile(r"[+-]?\d+")
_DURATION = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)((\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h))*")
