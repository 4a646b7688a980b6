"""Judge the Ollama and Redis services of a compose file without running anything."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from langchain_aegis.ollama.environment import Variable, check_variables, read_env_file
from langchain_aegis.ollama.findings import Finding
from langchain_aegis.ollama.knowledge import Image, knowledge

_LOOPBACK = re.compile(r"127\.\d+\.\d+\.\d+|\[?::1\]?|localhost")
_EVERYWHERE = {"", "0.0.0.0", "::", "[::]"}  # noqa: S104 - what is warned of
_OPERATORS = {"|", "||", "&&", ";", "&", "(", ")", "{", "}", "!", "if", "then", "else", "do", "while", "until"}
_WRAPPERS = {"exec", "timeout", "env", "sh", "bash"}


@dataclass(frozen=True)
class Service:
    """One service of a compose file that runs a known server.

    Attributes:
        place: Where it stands: file and service.
        kind: "ollama" or "redis".
        official: Its image is one whose contents are known.
        tag: The image's tag, "" if there is none.
        data: The service as read, with variables filled in where they are known.
    """

    place: str
    kind: str
    official: bool
    tag: str
    digest: bool
    data: Mapping[str, Any]

    @property
    def image(self) -> Image:
        """What is known about the image of this kind of server."""
        return knowledge().image[self.kind]


def check_compose(path: Path, values: Mapping[str, str]) -> Iterator[Finding]:
    """Judge a compose file.

    Args:
        path: The file.
        values: Variables for `${NAME}`; one that is neither there nor has a default is unknown, and what depends on it
            is not judged.

    Raises:
        OSError: The file cannot be read.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        services = data["services"]
        named = [(str(name), dict(service)) for name, service in services.items()]
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError, ValueError) as exc:
        reason = " ".join(str(exc).split())
        yield Finding(
            code="compose-unreadable",
            severity="error",
            where=str(path),
            what=f"this is no compose file: {reason}",
            why="Nothing in it could be judged.",
            fix="Correct it; `docker compose config` names the place.",
        )
        return
    for name, raw in named:
        service = _service(f"{path} services.{name}", name, _filled(raw, values))
        if service is not None:
            yield from _check_image(service)
            yield from _check_environment(service, path.parent)
            yield from _check_ports(service)
            yield from _check_health(service)
            yield from _check_hardening(service)


def _service(place: str, name: str, data: Mapping[str, Any]) -> Service | None:
    """Return the service if it runs a server that is known here."""
    reference, at, _ = str(data.get("image") or "").partition("@")
    head, slash, last = reference.rpartition("/")
    base, _, tag = last.partition(":")
    repository = f"{head}{slash}{base}".removeprefix("docker.io/").removeprefix("library/")
    for kind, image in knowledge().image.items():
        bases = {n.rpartition("/")[2] for n in image.names}
        if repository in image.names or base in bases or (not reference and name in bases):
            return Service(place, kind, repository in image.names, tag, bool(at), data)
    return None


def _check_image(service: Service) -> Iterator[Finding]:
    image = str(service.data.get("image") or "")
    if image and not service.digest and service.tag in ("", "latest"):
        yield Finding(
            code="image-unpinned",
            severity="warning",
            where=f"{service.place}.image",
            what=f"{image} is not pinned (latest)",
            why="The next pull may bring another server, which reads other settings.",
            fix=f"Name a version, e.g. {image.partition(':')[0]}:{service.image.tag}.",
        )
    elif image and not service.digest:
        yield Finding(
            code="image-without-digest",
            severity="info",
            where=f"{service.place}.image",
            what=f"{image} has no digest",
            why="A tag may be moved to other bytes.",
            fix=f"docker buildx imagetools inspect {image}",
        )


def _check_environment(service: Service, directory: Path) -> Iterator[Finding]:
    if service.kind != "ollama":
        return
    version = service.tag if re.match(r"v?\d+\.\d+\.\d+", service.tag) else None
    variables: dict[str, Variable] = {}
    for file in _env_files(service.data.get("env_file")):
        path = directory / file
        try:
            variables |= read_env_file(path)
        except (OSError, UnicodeDecodeError):
            yield Finding(
                code="env-file-unreadable",
                severity="info",
                where=f"{service.place}.env_file",
                what=f"{file} cannot be read here",
                why="Its settings were not judged.",
                fix="Create it.",
            )
    variables |= {
        name: Variable(value, f"{service.place}.environment.{name}")
        for name, value in _pairs(service.data.get("environment"))
    }
    yield from check_variables(variables, server_only=True, version=version)


def _check_ports(service: Service) -> Iterator[Finding]:
    severity, why = _openness(service)
    for text, address in map(_published, _list(service.data.get("ports"))):
        if address is not None and not _LOOPBACK.fullmatch(address):
            yield Finding(
                code="port-exposed",
                severity=severity,
                where=f"{service.place}.ports",
                what=f"port {text} is published on {'all interfaces' if address in _EVERYWHERE else address}",
                why=f"{why} Docker's rules come before the host's firewall.",
                fix=f'Write "127.0.0.1:{service.image.port}:{service.image.port}", or publish no port.',
            )
    environment = dict(_pairs(service.data.get("environment")))
    if service.data.get("network_mode") == "host" and not _LOOPBACK.match(environment.get("OLLAMA_HOST") or ""):
        yield Finding(
            code="port-exposed",
            severity=severity,
            where=f"{service.place}.network_mode",
            what=f"the host's network exposes port {service.image.port} on all interfaces (0.0.0.0)",
            why=why,
            fix=f'Remove network_mode and write ports: ["127.0.0.1:{service.image.port}:{service.image.port}"].',
        )


def _openness(service: Service) -> tuple[Any, str]:
    if service.kind == "ollama":
        return "error", "Whoever reaches the machine may use the server: it asks for no login."
    if _has_login(service):
        return "warning", "Only the password is between the network and all cached answers."
    return "error", "Whoever reaches the machine may read and change all cached answers."


def _has_login(service: Service) -> bool:
    """Guess from command and variables whether this Redis asks for a password."""
    text = f"{service.data.get('command')} {service.data.get('entrypoint')} {service.data.get('environment')}"
    return bool(re.search(r"requirepass|aclfile|REDIS_PASSWORD|REDIS_ARGS|\.conf|redis-start", text))


def _check_health(service: Service) -> Iterator[Finding]:
    health = _map(service.data.get("healthcheck"))
    where = f"{service.place}.healthcheck"
    test = health.get("test")
    if not test:
        if not health.get("disable"):
            yield Finding(
                code="no-health-check",
                severity="info",
                where=where,
                what="there is no health check",
                why="Other services start before this one answers.",
                fix=service.image.check,
            )
        return
    programs, text = _programs(test)
    for program in programs:
        if service.official and program in service.image.absent:
            yield Finding(
                code="health-check-cannot-run",
                severity="error",
                where=where,
                what=f"the health check calls {program}, which the image does not have",
                why="The service stays unhealthy for ever, and what depends on it never starts.",
                fix=service.image.check,
            )
    if service.kind == "ollama" and re.search(r"\bollama\s+(--version|-v)\b", text):
        yield Finding(
            code="health-check-proves-nothing",
            severity="warning",
            where=where,
            what="`ollama --version` succeeds without a server",
            why="The service counts as healthy when it is not.",
            fix=service.image.check,
        )
    if service.kind == "redis" and "redis-cli" in text and "PONG" not in text and _has_login(service):
        yield Finding(
            code="health-check-proves-nothing",
            severity="warning",
            where=where,
            what="`redis-cli ping` exits with 0 even if the login is refused",
            why="The service counts as healthy when nobody can use it.",
            fix=service.image.check,
        )


def _check_hardening(service: Service) -> Iterator[Finding]:
    data = service.data
    if data.get("privileged"):
        yield Finding(
            code="privileged",
            severity="warning",
            where=f"{service.place}.privileged",
            what="the container is privileged",
            why="Whoever breaks into the server owns the host.",
            fix="Remove it; GPUs need only a device reservation.",
        )
    limits = _map(_map(_map(data.get("deploy")).get("resources")).get("limits"))
    options = {str(option).partition(":")[0] for option in _list(data.get("security_opt"))}
    missing = [
        name
        for name, there in (
            ("read_only: true", data.get("read_only")),
            ('cap_drop: ["ALL"]', data.get("cap_drop")),
            ('security_opt: ["no-new-privileges:true"]', "no-new-privileges" in options),
            ("mem_limit (a memory limit)", data.get("mem_limit") or limits.get("memory")),
        )
        if not there
    ]
    if missing:
        yield Finding(
            code="not-hardened",
            severity="info",
            where=service.place,
            what=f"missing: {', '.join(missing)}",
            why="A flaw in the server reaches further than it must.",
            fix="See docker-compose.dgx-spark.yml.",
        )


def _published(port: Any) -> tuple[str, str | None]:
    """Return the port as text, and the address it is published on: "" for all, None if it is not or not known."""
    if isinstance(port, Mapping):
        text = f"{port.get('published', '')}:{port.get('target', '')}"
        address = str(port.get("host_ip") or "")
    else:
        text = str(port)
        address = text.rpartition(":")[0].rpartition(":")[0] if text.count(":") >= 2 else ""
    return text, None if "${" in f"{text}{address}" else address


def _programs(test: Any) -> tuple[list[str], str]:
    """Return the programs that a health check calls, and its text."""
    if isinstance(test, list):
        kind, words = str(test[0]), [str(word) for word in test[1:]]
        if kind == "NONE":
            return [], ""
        text = words[0] if kind == "CMD-SHELL" and words else shlex.join(words)
    else:
        text = str(test)
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # unbalanced quotes
        words = text.split()
    programs, expected = [], True
    for word in words:
        if word in _OPERATORS:
            expected = True
        elif expected and not re.match(r"-|\d|[A-Za-z_]\w*=", word) and " " not in word:
            programs.append(word.rpartition("/")[2])
            expected = programs[-1] in _WRAPPERS
    for script in (word for word in words if " " in word):  # sh -c '...'
        programs += _programs(script)[0]
    return programs, text


def _pairs(environment: Any) -> Iterator[tuple[str, str | None]]:
    """Yield name and value of an `environment`, in either of its forms."""
    if isinstance(environment, Mapping):
        items = ((str(name), value) for name, value in environment.items())
    else:
        split = (str(line).partition("=") for line in _list(environment))
        items = ((name, value if equals else None) for name, equals, value in split)
    for name, value in items:
        text = str(value).lower() if isinstance(value, bool) else None if value is None else str(value)
        yield name, None if text is not None and "${" in text else text


def _env_files(entry: Any) -> list[str]:
    entries = [entry] if isinstance(entry, str | Mapping) else _list(entry)
    return [str(e.get("path") if isinstance(e, Mapping) else e) for e in entries]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _filled(value: Any, values: Mapping[str, str]) -> Any:
    """Fill in `${NAME}`, `${NAME:-default}` and `$$`; what is not known stays as it stands."""
    if isinstance(value, Mapping):
        return {name: _filled(inner, values) for name, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, values) for inner in value]
    return _VARIABLE.sub(lambda found: _one(found, values), value) if isinstance(value, str) else value


def _one(found: re.Match[str], values: Mapping[str, str]) -> str:
    if found[0] == "$$":
        return "$"
    name, operator, other = found["plain"] or found["name"], found["operator"] or "", found["other"] or ""
    value = values.get(name)
    if operator.endswith("+"):
        return other if value else ""
    if value or (value is not None and not operator.startswith(":")):
        return value
    return other if operator.endswith("-") else f"${{{name}}}"


_VARIABLE = re.compile(
    r"\$\$|\$(?P<plain>[A-Za-z_]\w*)|\$\{(?P<name>[A-Za-z_]\w*)(?:(?P<operator>:?[-+?])(?P<other>[^}]*))?\}"
)
