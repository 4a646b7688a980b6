"""Judge the Ollama and Redis services of compose files without running anything."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langchain_aegis.ollama.commands import of_health_check, of_service
from langchain_aegis.ollama.compose_file import ComposeFile, NoComposeFileError, merged, read_compose
from langchain_aegis.ollama.env_files import Variable, identity, read_variables
from langchain_aegis.ollama.environment import check_repeated, check_variables, only_server
from langchain_aegis.ollama.findings import Finding, Severity
from langchain_aegis.ollama.interpolation import unknown
from langchain_aegis.ollama.knowledge import bare, knowledge, version_tuple
from langchain_aegis.ollama.places import Edit, Place, Text
from langchain_aegis.ollama.redis_service import check_redis, configuration
from langchain_aegis.ollama.services import EVERYWHERE, Service, as_list, as_map, is_true, services_of
from langchain_aegis.ollama.shared_gpu import check_shared_gpu, reserves_gpu

_SUBCOMMANDS = {
    "serve", "start", "create", "show", "run", "pull", "push", "list", "ls", "ps", "cp", "rm", "stop", "signin",
    "signout", "launch", "help", "runner",
}  # fmt: skip
_LOOPBACK_HOST = re.compile(r"(https?://)?(127\.\d+\.\d+\.\d+|localhost|\[?::1\]?)(:\d+)?/?")


@dataclass
class Project:
    """What several compose files say together.

    Attributes:
        findings: Of all files.
        values: OLLAMA_* as far as an Ollama service is started with them.
        uses: Variables that the files fill in.
        env_files: Those that a service reads.
        gpu: A service reserves a GPU.
        awaited: Service -> one that waits for it to be healthy.
    """

    findings: list[Finding] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)
    uses: set[str] = field(default_factory=set)
    env_files: set[Path] = field(default_factory=set)
    gpu: bool = False
    awaited: dict[str, str] = field(default_factory=dict)


def check_compose(path: Path, values: Mapping[str, str]) -> Iterator[Finding]:
    """Judge one compose file; see `check_project`.

    Raises:
        OSError: The file cannot be read.
    """
    yield from check_project([path], values).findings


def check_project(paths: Sequence[Path], values: Mapping[str, str]) -> Project:
    """Judge compose files.

    A service without an image of its own that an earlier file has too is merged with it, as `docker compose -f A -f B`
    does; any other service stands for itself.

    Args:
        paths: The files, in the order in which compose is given them.
        values: Variables for `${NAME}`; one that is neither there nor has a default is unknown, and what depends on it
            is not judged.

    Raises:
        OSError: A file cannot be read.
    """
    project = Project()
    files: list[ComposeFile] = []
    for path in paths:
        try:
            files.append(read_compose(path, values))
        except NoComposeFileError as exc:
            project.findings.append(Finding(
                code="compose-unreadable", severity="error", where=str(path), what=f"this is no compose file: {exc}",
                why="Nothing in it could be judged.", fix="Correct it; `docker compose config` names the place.",
            ))  # fmt: skip
    services: list[Service] = []
    for file in files:
        project.uses |= file.uses
        project.findings += _of_file(file)
        for name, data in file.services.items():
            for other, wanted in as_map(data.get("depends_on")).items():
                if as_map(wanted).get("condition") == "service_healthy":
                    project.awaited.setdefault(str(other), str(name))
        for service in services_of(file.path, file.services):
            base = next((i for i, s in enumerate(services) if s.name == service.name and service.fragment), None)
            if base is None:
                services.append(service)
            else:
                joint = merged(services[base].data, service.data)
                services[base] = next(services_of(services[base].file, {service.name: joint}))
    for service in services:
        project.findings += _of_service(service, project)
    project.findings += check_shared_gpu(files, services)
    project.findings = _once(project.findings)
    return project


def _of_file(file: ComposeFile) -> Iterator[Finding]:
    for key in file.repeated:
        yield Finding(
            code="key-repeated", severity="error", where=f"{file.path}:{key.place.line if key.place else 0} {key}",
            what=f"{key} stands twice in one mapping", why="Docker compose refuses the file.",
            fix="Remove one of them.",
        )  # fmt: skip
    for name in file.missing:
        yield Finding(
            code="file-unreadable", severity="warning", where=str(file.path),
            what=f"{name} (extends) cannot be read here",
            why="What a service takes from it was not judged.", fix="Name the right file.",
        )  # fmt: skip
    if file.extra.get("include"):
        yield Finding(
            code="include-not-read", severity="info", where=str(file.path),
            what="the files under `include` were not read",
            why="Their services were not judged.", fix="Name them with --compose too.",
        )  # fmt: skip


def _of_service(service: Service, project: Project) -> Iterator[Finding]:
    yield from _check_image(service)
    if service.kind == "ollama":
        yield from _check_environment(service, project)
        yield from _check_command(service)
    else:
        yield from check_redis(service)
    yield from _check_ports(service)
    yield from _check_health(service, project.awaited.get(service.name))
    yield from _check_hardening(service)
    project.gpu |= reserves_gpu(service.data)


def _once(findings: list[Finding]) -> list[Finding]:
    """Drop what an anchor or `extends` shows a second time: the same statement about the same line."""
    kept: dict[tuple[str, str, str], Finding] = {}
    for finding in findings:
        line = re.match(r".*?:\d+(?= |$)", finding.where)
        kept.setdefault((finding.code, line[0] if line else finding.where, finding.what), finding)
    return list(kept.values())


def _check_image(service: Service) -> Iterator[Finding]:
    image = service.data.get("image")
    if not image or service.digest or service.foreign or service.data.get("build") or unknown(str(image)):
        return
    where = service.where(image, "image")
    if service.floating:
        pinned = f"{str(image).partition(':')[0]}:{service.image.tag}" if service.tag in ("", "latest") else ""
        plain = isinstance(image, Text) and image.place is not None and "$" not in image.raw
        own = service.repository == service.image.names[0]
        yield Finding(
            code="image-unpinned", severity="warning", where=where,
            what=f"{image} is not pinned ({service.tag or 'latest'})",
            why="The next pull may bring another server, which reads other settings.",
            fix=f"Name a version, e.g. {pinned or f'{service.repository}:{service.image.tag}-{service.tag}'}.",
            edit=Edit("value", image.place, "pinned", pinned) if plain and pinned and own else None,
        )  # fmt: skip
        return
    yield Finding(
        code="image-without-digest", severity="info", where=where, what=f"{image} has no digest",
        why="A tag may be moved to other bytes.", fix=f"docker buildx imagetools inspect {image}",
    )  # fmt: skip
    if service.kind == "ollama" and service.version and service.official:
        yield from _check_version(service.version, where)


def _check_version(version: str, where: str) -> Iterator[Finding]:
    table = knowledge()
    if version_tuple(version) < version_tuple(table.runner_since):
        refuses = version_tuple(version) >= version_tuple(table.request["truncate"].since or "")
        yield Finding(
            code="version", severity="warning", where=where,
            what=f"Ollama {version} is older than {table.runner_since}",
            why="It runs models in another way, and settings mean something else there."
            + ("" if refuses else " It cannot refuse a prompt that does not fit: the beginning is cut without a word."),
            fix=f"Update to {table.image['ollama'].tag}.",
        )  # fmt: skip
    elif not table.knows(version):
        yield Finding(
            code="version", severity="info", where=where, what=f"Ollama {version} is newer than what is known to us",
            why=f"It is judged like {table.verified}.", fix="Update langchain-aegis.",
        )  # fmt: skip


def _check_environment(service: Service, project: Project) -> Iterator[Finding]:
    table = knowledge()
    variables: dict[str, Variable] = {}
    for file, needed in service.env_files:
        path = service.file.parent / file
        project.env_files.add(identity(path))
        try:
            repeated = read_variables(path)
        except (OSError, UnicodeDecodeError):
            if needed:
                yield Finding(
                    code="env-file-unreadable", severity="info",
                    where=service.where(service.key("env_file"), "env_file"),
                    what=f"{file} cannot be read here", why="Its settings were not judged.", fix="Create it.",
                )  # fmt: skip
            continue
        yield from check_repeated(repeated)
        shared = not only_server({name for name, _ in repeated})  # an application reads it too
        variables |= {
            name: v for name, v in repeated
            if name.startswith(("OLLAMA_", "LLAMA_ARG_")) and not (shared and table.of_application(name))
        }  # fmt: skip
    for item in as_list(service.data.get("environment")):
        if isinstance(item, Mapping) or (isinstance(item, Text) and "=" not in item and ":" in item):
            key = next(iter(item), None) if isinstance(item, Mapping) else item
            yield Finding(
                code="entry-malformed", severity="error", where=service.where(key, "environment"),
                what=f"`- {key}{': ...' if isinstance(item, Mapping) else ''}` is no variable of a list",
                why="Compose refuses a mapping in a list; a text without `=` sets nothing.",
                fix="Write - NAME=value, or take the dash away.",
            )  # fmt: skip
    own = service.environment
    yield from check_repeated(own)
    variables |= dict(own)
    yield from check_variables(variables, server_only=True, version=service.version)
    yield from _check_address(service, variables)
    for name, variable in variables.items():
        if variable.value is not None and name.startswith("OLLAMA_"):
            project.values.setdefault(name, bare(variable.value))


def _check_address(service: Service, variables: Mapping[str, Variable]) -> Iterator[Finding]:
    """Compare OLLAMA_HOST with the ports that are published."""
    host = variables.get("OLLAMA_HOST")
    if host is None or not host.value or not service.ports or service.data.get("network_mode") == "host":
        return
    value = bare(host.value)
    port = re.search(r":(\d+)/?$", value)
    listens = int(port[1]) if port else service.image.port
    if _LOOPBACK_HOST.fullmatch(value):
        yield Finding(
            code="port-not-served", severity="error", where=host.where,
            what=f"OLLAMA_HOST={value} listens inside the container only",
            why="Neither the published port nor another container reaches it.",
            fix="Remove OLLAMA_HOST: the image sets it.", edit=_removed(host.place, "the image sets it"),
        )  # fmt: skip
    elif service.ports and all(p.target not in (None, listens) for p in service.ports):
        yield Finding(
            code="port-not-served", severity="error", where=host.where,
            what=f"OLLAMA_HOST={value} listens on port {listens}, published is {service.ports[0].text}",
            why="Nobody answers at the published port.", fix=f"Publish {listens}, or remove OLLAMA_HOST.",
        )  # fmt: skip


def _check_command(service: Service) -> Iterator[Finding]:
    """The image's entrypoint is `ollama`: a command is its arguments; and neither may call what is not there."""
    if not service.official:
        return
    command, entry = of_service(service.data.get("command")), service.data.get("entrypoint")
    first = command.words[0] if command.words else "serve"
    where = service.where(service.key("command") or service.key("entrypoint"), "command")
    if not entry and not first.startswith(("-", "$")) and first not in _SUBCOMMANDS:
        rest = " ".join(command.words[1:]) if first.rpartition("/")[2] == "ollama" else ""
        yield Finding(
            code="command-cannot-run", severity="error", where=where,
            what=f"the image's entrypoint is `ollama`, so the command runs `ollama {first} ...`",
            why="Ollama does not know that subcommand; the container ends at once.",
            fix=f"Write command: {rest}." if rest else 'Set entrypoint: ["/bin/sh", "-c"] too.',
        )  # fmt: skip
        return
    started = service.started
    for program in started.programs:
        if program in service.image.absent and not started.installs:
            yield Finding(
                code="command-cannot-run", severity="error", where=where,
                what=f"the command calls {program}, which the image does not have",
                why="What it waits for never happens.", fix="Use `ollama list` to wait for the server.",
            )  # fmt: skip


def _check_ports(service: Service) -> Iterator[Finding]:
    severity, why = _openness(service)
    good = f"127.0.0.1:{service.image.port}:{service.image.port}"
    for port in service.ports:
        if port.open:
            yield Finding(
                code="port-exposed", severity=severity, where=service.where(port.item or service.key("ports"), "ports"),
                what=f"port {port.text} is published on "
                f"{'all interfaces (0.0.0.0)' if port.address in EVERYWHERE else port.address}",
                why=f"{why} Docker's rules come before the host's firewall.",
                fix=f'Write "{good}", or publish no port.', edit=_on_loopback(port.item),
            )  # fmt: skip
    environment = {name: v.value or "" for name, v in service.environment}
    if service.data.get("network_mode") != "host":
        return
    bound = (
        environment.get("OLLAMA_HOST", "")
        if service.kind == "ollama"
        else configuration(service).options.get("bind", "")
    )
    if not _LOOPBACK_HOST.fullmatch(bare(bound)):
        yield Finding(
            code="port-exposed", severity=severity, where=service.where(service.key("network_mode"), "network_mode"),
            what=f"the host's network exposes port {service.image.port} on all interfaces (0.0.0.0)", why=why,
            fix=f'Remove network_mode and write ports: ["{good}"].',
        )  # fmt: skip


def _on_loopback(item: Text | None) -> Edit | None:
    """Put 127.0.0.1 before a port in the short form."""
    if item is None or item.place is None or item == "published":
        return None
    inner = item.raw.strip("\"'")
    plain = inner.partition("/")[0]
    ports = re.fullmatch(
        r"(?:(?:0\.0\.0\.0|\[::\]|::|\*):)?((?:\$\{[^}]*\}|[\d-]+)(?::(?:\$\{[^}]*\}|[\d-]+))?)", plain
    )
    if not ports:
        return None
    text = ports[1] if re.search(r":(?![^{]*\})", ports[1]) else f"{ports[1]}:{ports[1]}"
    return Edit("value", item.place, "reached from this machine only", f"127.0.0.1:{text}{inner[len(plain) :]}")


def _removed(place: Place | None, why: str) -> Edit | None:
    return Edit("remove", place, why) if place else None


def _openness(service: Service) -> tuple[Severity, str]:
    if service.kind == "ollama":
        return "error", "Whoever reaches the machine may use the server: it asks for no login."
    if configuration(service).login:
        return "warning", "Only the password is between the network and all cached answers."
    return "error", "Whoever reaches the machine may read and change all cached answers."


def _check_health(service: Service, awaited_by: str | None) -> Iterator[Finding]:
    health = as_map(service.data.get("healthcheck"))
    where = service.where(service.key("healthcheck"), "healthcheck")
    test = health.get("test")
    if not test:
        if awaited_by and service.official:
            yield Finding(
                code="no-health-check", severity="error", where=service.where(service.key("image"), "healthcheck"),
                what=f"there is no health check, and {awaited_by} waits for one (condition: service_healthy)",
                why=f"Neither does the image have one: compose refuses to start {awaited_by}.", fix=service.image.check,
            )  # fmt: skip
        elif not is_true(health.get("disable")) and not service.fragment:
            yield Finding(
                code="no-health-check", severity="info", where=where, what="there is no health check",
                why="Other services start before this one answers.", fix=service.image.check,
            )  # fmt: skip
        return
    check, started = of_health_check(test), service.started
    key = next((k for k in health if k == "test" and isinstance(k, Text)), None)
    better = service.image.check.removeprefix("test: ")
    edit = Edit("value", key.place, "", better) if key is not None and key.place and service.kind == "ollama" else None
    for program in check.programs:
        if service.official and program in service.image.absent and not started.installs:
            yield Finding(
                code="health-check-cannot-run", severity="error", where=where,
                what=f"the health check calls {program}, which the image does not have",
                why="The service stays unhealthy for ever, and what depends on it never starts.",
                fix=service.image.check, edit=edit,
            )  # fmt: skip
    if service.kind == "ollama" and re.search(r"\bollama\s+(--version|-v|--help|help|version)\b", check.text):
        yield Finding(
            code="health-check-proves-nothing", severity="warning", where=where,
            what="`ollama --version` succeeds without a server", why="The service counts as healthy when it is not.",
            fix=service.image.check, edit=edit,
        )  # fmt: skip
    if (
        service.kind == "redis"
        and "redis-cli" in check.text
        and "PONG" not in check.text
        and configuration(service).login
    ):
        logs_in = re.search(r"(^|\s)(-a|--pass|-u)\s|REDISCLI_AUTH", check.text) or "REDISCLI_AUTH" in dict(
            service.environment
        )
        yield Finding(
            code="health-check-proves-nothing", severity="info" if logs_in else "warning", where=where,
            what="`redis-cli ping` exits with 0 even if the login is refused",
            why="The service counts as healthy when nobody can use it.", fix=service.image.check,
        )  # fmt: skip


def _check_hardening(service: Service) -> Iterator[Finding]:
    data = service.data
    if is_true(data.get("privileged")):
        key = service.key("privileged")
        yield Finding(
            code="privileged", severity="warning", where=service.where(key, "privileged"),
            what="the container is privileged", why="Whoever breaks into the server owns the host.",
            fix="Remove it; GPUs need only a device reservation.",
            edit=_removed(key.place if key is not None else None, "GPUs need only a device reservation"),
        )  # fmt: skip
    if service.fragment:
        return
    limits = as_map(as_map(as_map(data.get("deploy")).get("resources")).get("limits"))
    options = {str(option).partition(":")[0] for option in as_list(data.get("security_opt"))}
    wanted: list[tuple[str, Any]] = [
        ("read_only: true", is_true(data.get("read_only"))),
        ('cap_drop: ["ALL"]', data.get("cap_drop")),
        ('security_opt: ["no-new-privileges:true"]', "no-new-privileges" in options),
        ("mem_limit (a memory limit)", data.get("mem_limit") or limits.get("memory")),
    ]
    if missing := [name for name, there in wanted if not there]:
        yield Finding(
            code="not-hardened", severity="info", where=service.where(None), what=f"missing: {', '.join(missing)}",
            why="A flaw in the server reaches further than it must.", fix="See docker-compose.dgx-spark.yml.",
        )  # fmt: skip
