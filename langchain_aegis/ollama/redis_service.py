"""Judge the Redis service of a compose file by its image, its command and the configuration that it mounts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from langchain_aegis.ollama.env_files import read_text
from langchain_aegis.ollama.findings import Finding, Severity
from langchain_aegis.ollama.places import Edit, Place, Text
from langchain_aegis.ollama.services import Service, as_list

_SIZE = re.compile(r"(?i)(\d+)(b|k|kb|m|mb|g|gb)?")
_FACTORS = {"": 1, "b": 1, "k": 10**3, "kb": 2**10, "m": 10**6, "mb": 2**20, "g": 10**9, "gb": 2**30}


@dataclass
class Configuration:
    """What is known of a Redis's configuration.

    Attributes:
        options: Option -> its values, the last line of a name winning.
        certain: Every file that it is started with could be read.
    """

    options: dict[str, str] = field(default_factory=dict)
    certain: bool = True

    @property
    def login(self) -> bool | None:
        """Say whether it asks for a password; None if that is not known."""
        if self.options.get("requirepass", "") or {"aclfile", "user"} & set(self.options):
            return True
        return False if self.certain else None

    @property
    def memory(self) -> int | None:
        """Its bound in bytes, 0 if it has none, None if that is not known."""
        text = self.options.get("maxmemory")
        if text is None:
            return 0 if self.certain else None
        found = _SIZE.fullmatch(text)
        return int(found[1]) * _FACTORS[(found[2] or "").lower()] if found else None


def configuration(service: Service) -> Configuration:
    """Read the options of a Redis service from its command, its variables and the files that it mounts."""
    found = Configuration()
    variables = {str(name): None if value is None else str(value) for name, value in service.pairs}
    words = list(service.started.words)
    for name in ("REDIS_ARGS", "VALKEY_EXTRA_FLAGS", "REDIS_EXTRA_FLAGS"):
        if name in variables:
            words += (variables[name] or "${unknown}").split()
    _take(words, service, found, set())
    if not service.official:  # bitnami and others read variables of their own
        found.certain = False
        if variables.get("REDIS_PASSWORD") or variables.get("REDIS_PASSWORD_FILE"):
            found.options.setdefault("requirepass", "set")
        elif str(variables.get("ALLOW_EMPTY_PASSWORD")).lower() == "yes":
            found.certain = True
    if service.fragment:
        found.certain = False
    return found


def _take(words: list[str], service: Service, found: Configuration, seen: set[str]) -> None:
    """Take options from the words of a command, and from the files among them."""
    for i, word in enumerate(words):
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].lower().partition("=")
            rest = [] if equals else words[i + 1 : i + 2]
            found.options[name] = value if equals else "" if not rest or _is_option(rest[0]) else rest[0]
        elif word.endswith((".conf", ".sh")) and word not in seen:
            seen.add(word)
            file = _mounted(word, service)
            if file is None:
                found.certain = False
                continue
            try:
                text = read_text(file)
            except (OSError, UnicodeDecodeError):
                found.certain = False
                continue
            if word.endswith(".sh"):
                _take(re.split(r"[\s\"']+", re.sub(r"(?m)^\s*#.*$", "", text)), service, found, seen)
            else:
                _read_conf(text, found)


def _is_option(word: str) -> bool:
    return word.startswith("--") or word in (";", "&&", "||", "|", "&")


def _read_conf(text: str, found: Configuration) -> None:
    for line in text.splitlines():
        name, _, value = line.strip().partition(" ")
        if name and not name.startswith("#"):
            found.options[name.lower()] = value.strip().strip("\"'")
            if name.lower() == "include":
                found.certain = False


def _mounted(word: str, service: Service) -> Path | None:
    """Return the file of this machine that stands at a path of the container."""
    name = word.rpartition("/")[2]
    for volume in as_list(service.data.get("volumes")):
        if isinstance(volume, Mapping):
            source, target = str(volume.get("source") or ""), str(volume.get("target") or "")
        else:
            source, _, rest = str(volume).partition(":")
            target = rest.partition(":")[0]
        if not source.startswith((".", "/", "~")) or not target:
            continue
        path = service.file.parent / (source.replace("~", str(Path.home()), 1) if source.startswith("~/") else source)
        if target.rpartition("/")[2] == name:
            return path
        if word.startswith(target.rstrip("/") + "/"):
            return path / word[len(target.rstrip("/")) + 1 :]
    return None


def check_redis(service: Service) -> Iterator[Finding]:
    """Judge search, memory, eviction and login of a Redis service."""
    config = configuration(service)
    at: object = service.key("command") or service.key("image")
    yield from _search(service, config)
    yield from _memory(service, config, at)
    if config.login is False:
        exposed = any(port.open for port in service.ports) or service.data.get("network_mode") == "host"
        severity: Severity = "error" if exposed else "warning"
        unread = [n for n, _ in service.environment if n in ("REDIS_PASSWORD", "REDIS_PASS", "REDIS_REQUIREPASS")]
        note = f" ({unread[0]} is not read by the image)" if unread and service.official else ""
        yield Finding(
            code="redis-no-password", severity=severity, where=service.where(at),
            what=f"Redis asks for no password{note}",
            why="Whoever reaches it, from any container of its networks, may read and change all cached answers.",
            fix='command: ["redis-server", "--requirepass", "${REDIS_PASSWORD:?}"], or an ACL file.',
        )  # fmt: skip


def _search(service: Service, config: Configuration) -> Iterator[Finding]:
    if not service.official or "loadmodule" in config.options:
        return
    last = service.repository.rpartition("/")[2]
    why = "The semantic tier compares the newest 2000 vectors of a scope in the process."
    major = int(service.version.partition(".")[0]) if service.version else None
    if last.startswith("redis-stack"):
        return
    if last == "valkey" or (major is not None and major < 8):
        yield Finding(
            code="redis-search", severity="warning", where=service.where(service.data.get("image"), "image"),
            what=f"{service.data.get('image')} has no search", why=why,
            fix=f"Use Redis 8 or later, e.g. redis:{service.image.tag}.",
        )  # fmt: skip
        return
    words = service.started.words
    first = words[0] if words else "redis-server"
    entry = service.data.get("entrypoint")
    direct = bool(entry) or not (first == "redis-server" or first.startswith("-") or first.endswith(".conf"))
    script = any(word.endswith(".sh") for word in words)
    if direct and not script and not any("docker-entrypoint.sh" in word for word in words):
        yield Finding(
            code="redis-search", severity="warning", where=service.where(service.key("command")),
            what="Redis is started past the image's entrypoint, so search is not loaded", why=why,
            fix='Begin the command with "redis-server", or let the script `exec docker-entrypoint.sh redis-server`.',
        )  # fmt: skip


def _memory(service: Service, config: Configuration, at: object) -> Iterator[Finding]:
    memory, policy = config.memory, config.options.get("maxmemory-policy", "noeviction").lower()
    if memory == 0:
        yield Finding(
            code="redis-memory", severity="warning", where=service.where(at),
            what="Redis has no maxmemory: it grows with what is cached", why=UNBOUNDED,
            fix="Add --maxmemory 2gb --maxmemory-policy volatile-lru to its command.",
        )  # fmt: skip
    elif memory and policy == "noeviction":
        yield Finding(
            code="redis-eviction", severity="warning", where=service.where(at),
            what="Redis has maxmemory and the policy noeviction", why=FULL,
            fix="Use --maxmemory-policy volatile-lru.", edit=_other_policy(service, "noeviction"),
        )  # fmt: skip
    if policy.startswith("allkeys"):
        yield Finding(
            code="redis-eviction", severity="warning", where=service.where(at),
            what=f"Redis may evict what has no TTL (maxmemory-policy {policy})", why=EVICTS,
            fix="Use --maxmemory-policy volatile-lru.", edit=_other_policy(service, policy),
        )  # fmt: skip


def _other_policy(service: Service, policy: str) -> Edit | None:
    """Exchange the word in the command, where it stands there once."""
    command = service.data.get("command")
    for text in [command] if isinstance(command, Text) else as_list(command):
        place = getattr(text, "place", None)
        if isinstance(text, Text) and place is not None and text.raw.count(policy) == 1:
            start = place.name[0] + text.raw.index(policy)
            span = (start, start + len(policy))
            return Edit("value", Place(place.path, place.line, span, span, span, yaml=True), "", "volatile-lru")
    return None


UNBOUNDED = "When the machine's memory is used up, Redis or a model is killed."
FULL = "When it is full it refuses every write, and nothing new is cached."
EVICTS = "The marks that say `this source was invalidated` have no TTL; losing one would bring a removed answer back."
