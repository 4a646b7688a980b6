"""The services of a compose file that run a known server."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_aegis.ollama.commands import Command, of_service
from langchain_aegis.ollama.compose_file import assignment
from langchain_aegis.ollama.env_files import Variable
from langchain_aegis.ollama.interpolation import unknown
from langchain_aegis.ollama.knowledge import Image, knowledge
from langchain_aegis.ollama.places import Text, line_of

_LOOPBACK = re.compile(r"127\.\d+\.\d+\.\d+|\[?::1\]?|localhost")
_FLOATING = re.compile(r"latest|stable|main|master|edge|nightly|dev|alpine|bookworm|trixie|rocm|cuda")
EVERYWHERE = {"", "0.0.0.0", "::", "[::]"}  # noqa: S104 - what is warned of


@dataclass(frozen=True)
class Port:
    """One published port.

    Attributes:
        text: As people write it.
        address: Of the host, "" for all; None if it is not known.
        target: Port of the container, None if it is not known.
        item: The text in the file.
    """

    text: str
    address: str | None
    target: int | None
    item: Text | None

    @property
    def open(self) -> bool:
        """Say whether others than this machine reach it."""
        return self.address is not None and not _LOOPBACK.fullmatch(self.address)


@dataclass(frozen=True)
class Service:
    """One service of a compose file that runs a known server.

    Attributes:
        file: The compose file.
        name: Of the service.
        kind: "ollama" or "redis".
        official: Its image is one whose contents are known.
        repository: Of the image, without a tag; "" if it has none.
        tag: The image's tag, "" if there is none.
        digest: The image is pinned by its bytes.
        data: The service as read.
        foreign: Neither image nor name says what it runs, but what it publishes, mounts and sets does.
    """

    file: Path
    name: str
    kind: str
    official: bool
    repository: str
    tag: str
    digest: bool
    data: Mapping[str, Any]
    foreign: bool = False

    @property
    def image(self) -> Image:
        """What is known about the image of this kind of server."""
        return knowledge().image[self.kind]

    @property
    def fragment(self) -> bool:
        """It adds to a service of another file, so what is missing here may stand there."""
        return not (self.data.get("image") or self.data.get("build"))

    @property
    def floating(self) -> bool:
        """Its image may be another one tomorrow."""
        return not self.digest and (not re.search(r"\d", self.tag) or _FLOATING.match(self.tag) is not None)

    @property
    def version(self) -> str | None:
        """Version by the tag, None if that names none."""
        found = None if self.foreign else re.match(r"v?(\d+(\.\d+)*)", self.tag)
        return found[1] if found else None

    def where(self, at: object, path: str = "") -> str:
        """Return file, line of `at` and place in the service, for people."""
        return f"{self.file}{line_of(at)} services.{self.name}{'.' if path else ''}{path}"

    def key(self, name: str) -> Text | None:
        """Return a key of the service with its place."""
        return next((key for key in self.data if key == name and isinstance(key, Text)), None)

    @property
    def started(self) -> Command:
        """What `entrypoint` and `command` call together."""
        parts = [of_service(self.data.get(name)) for name in ("entrypoint", "command")]
        return Command(
            parts[0].words + parts[1].words, parts[0].programs + parts[1].programs, f"{parts[0].text} {parts[1].text}"
        )  # fmt: skip

    @property
    def pairs(self) -> list[tuple[Any, Any]]:
        """Name and text of `environment` in their order, repeated ones too; in either of its forms."""
        given = self.data.get("environment")
        if isinstance(given, Mapping):
            return list(given.items())
        found: list[tuple[Any, Any]] = []
        for item in as_list(given):  # `- NAME: value` is a mistake that compose refuses; its settings are known still
            if isinstance(item, Mapping):
                found += item.items()
            elif isinstance(item, Text):
                found.append(assignment(item))
        return found

    @property
    def environment(self) -> list[tuple[str, Variable]]:
        """The variables of `environment` in their order, repeated ones too."""
        return [(str(name), self._variable(name, value)) for name, value in self.pairs]

    def _variable(self, name: Any, value: Any) -> Variable:
        text = str(value) if isinstance(value, Text) else None
        where = self.where(name, f"environment.{name}")
        filled = "$" in getattr(value, "raw", "")
        return Variable(None if text is None or unknown(text) else text, where, getattr(name, "place", None), filled)

    @property
    def ports(self) -> list[Port]:
        """The ports that it publishes."""
        given = self.data.get("ports")
        return [_port(port) for port in ([given] if isinstance(given, Text) else as_list(given))]

    @property
    def env_files(self) -> list[tuple[str, bool]]:
        """The names of its env files, and whether each must be there."""
        entry = self.data.get("env_file")
        entries = [entry] if isinstance(entry, str | Mapping) else as_list(entry)
        return [
            (str(e.get("path")), not is_false(e.get("required"))) if isinstance(e, Mapping) else (str(e), True)
            for e in entries
        ]


def services_of(path: Path, services: Mapping[str, Mapping[str, Any]]) -> Iterator[Service]:
    """Yield the services that run a server that is known here."""
    for name, data in services.items():
        if (service := _service(path, str(name), data)) is not None:
            yield service


def _service(path: Path, name: str, data: Mapping[str, Any]) -> Service | None:
    image_text = str(data.get("image") or "")
    reference, at, _ = ("" if unknown(image_text) and image_text.startswith("${") else image_text).partition("@")
    head, slash, last = reference.rpartition("/")
    base, _, tag = last.partition(":")
    repository = f"{head}{slash}{base}".removeprefix("docker.io/").removeprefix("library/")
    for kind, image in knowledge().image.items():
        bases = {n.rpartition("/")[2] for n in image.names}
        if repository in image.names or base in bases or (not reference and name in bases):
            official = repository in image.names and not data.get("build")
            return Service(path, name, kind, official, repository, tag, bool(at), data)
    service = Service(path, name, "ollama", False, repository, tag, bool(at), data, foreign=True)
    return service if _serves_ollama(service) else None


def _serves_ollama(service: Service) -> bool:
    """Say whether an image of one's own runs Ollama: its port or its models are there, and variables for a server."""
    table = knowledge()
    exposed = {_number(str(item).partition("/")[0]) for item in as_list(service.data.get("expose"))}
    volumes = [v.get("target") if isinstance(v, Mapping) else v for v in as_list(service.data.get("volumes"))]
    here = service.image.port in exposed | {port.target for port in service.ports}
    if not here and not any(re.search(r"/\.ollama(:\w+(,\w+)*)?/?$", str(volume)) for volume in volumes):
        return False
    names = {name for name, _ in service.environment if name.startswith("OLLAMA_") and not table.of_application(name)}
    return bool(names - {"OLLAMA_HOST"})


def _port(port: Any) -> Port:
    if isinstance(port, Mapping):
        published, target = str(port.get("published") or ""), str(port.get("target") or "")
        address = str(port.get("host_ip") or "")
        item = next((key for key in port if key == "published" and isinstance(key, Text)), None)
        known = not unknown(address)
        return Port(f"{published}:{target}", address if known else None, _number(target), item)
    text = str(port)
    plain = text.partition("/")[0]
    head, _, target = plain.rpartition(":")
    address = head.rpartition(":")[0] if ":" in head or head.startswith("[") else ""
    # An unknown variable may hold an address, unless its name says that it is the port's number.
    doubtful = unknown(head) and not re.fullmatch(r"\$\{\w*PORT\w*\}", head.rpartition(":")[2])
    if unknown(address) or (doubtful and not address):
        return Port(text, None, _number(target), port if isinstance(port, Text) else None)
    return Port(text, address, _number(target), port if isinstance(port, Text) else None)


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, anything else as an empty one."""
    return value if isinstance(value, list) else []


def as_map(value: Any) -> Mapping[Any, Any]:
    """Return a mapping as it is, anything else as an empty one."""
    return value if isinstance(value, Mapping) else {}


def is_true(value: Any) -> bool:
    """Say whether YAML's text means true."""
    return str(value).lower() in ("true", "yes", "on", "y")


def is_false(value: Any) -> bool:
    """Say whether YAML's text means false."""
    return str(value).lower() in ("false", "no", "off", "n")
