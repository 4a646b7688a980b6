"""Write a server's environment as a compose file, an env file or a systemd drop-in, with the reason above each line."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from langchain_aegis.ollama.knowledge import knowledge
from langchain_aegis.ollama.plan import MIB, Room
from langchain_aegis.ollama.tuning import Environment
from langchain_aegis.tuning import Line

_WIDTH = 118


def as_env(environment: Environment, head: Sequence[str]) -> str:
    """Return an env file."""
    body = (text for line in environment.lines for text in [*_reason(line), f"{line.name}={line.value}"])
    return _text([*_comments(head), "", *body])


def as_systemd(environment: Environment, head: Sequence[str]) -> str:
    """Return a drop-in for ollama.service."""
    place = "Save as /etc/systemd/system/ollama.service.d/aegis.conf; systemctl daemon-reload; systemctl restart ollama"
    body = (text for line in environment.lines for text in [*_reason(line), f"Environment={_unit(line)}"])
    return _text([*_comments([*head, place]), "", "[Service]", *body])


def as_compose(environment: Environment, head: Sequence[str], room: Room) -> str:
    """Return a compose file with the one service, hardened and published on loopback only."""
    image = knowledge().image["ollama"]
    lines = [
        *_comments(head), "",
        "services:",
        "  ollama:",
        f"    image: {image.names[0]}:{environment.version}",
        "    environment:",
        *(text for line in environment.lines for text in [*_reason(line, 6), f'      {line.name}: "{line.value}"']),
        "    ports:",
        f'      - "127.0.0.1:{image.port}:{image.port}" # the server asks for no login',
        "    volumes:",
        "      - ollama-models:/root/.ollama",
    ]  # fmt: skip
    if room.gpu:
        lines += [
            "    deploy:",
            "      resources:",
            "        reservations:",
            "          devices:",
            "            - driver: nvidia",
            "              count: all",
            "              capabilities: [gpu]",
        ]
    lines += [
        "    read_only: true",
        '    tmpfs: ["/tmp"]',
        '    cap_drop: ["ALL"]',
        '    security_opt: ["no-new-privileges:true"]',
    ]
    if room.shared:
        # Measured on a GB10: graphistry/pygraphistry pull request 1671.
        note = "does not bound what the GPU takes of it" if room.gpu else "the rest is for everything else here"
        lines += [f"    mem_limit: {room.budget_bytes // MIB}m # main memory; {note}"]
    lines += [
        "    pids_limit: 2048 # runners have many threads",
        "    healthcheck:",
        f"      {image.check}",
        "      interval: 10s",
        "      timeout: 5s",
        "      retries: 12",
        "      start_period: 20s",
        "    restart: unless-stopped",
        "",
        "volumes:",
        "  ollama-models: {}",
    ]
    return _text(lines)


def _reason(line: Line, indent: int = 0) -> list[str]:
    return _comments([f"{line.reason} [{line.source}]"], indent)


def _comments(sentences: Iterable[str], indent: int = 0) -> list[str]:
    start = " " * indent + "# "
    return [
        text
        for sentence in sentences
        for text in textwrap.wrap(
            sentence, _WIDTH, initial_indent=start, subsequent_indent=start, break_long_words=False,
            break_on_hyphens=False,
        )
    ]  # fmt: skip


def _unit(line: Line) -> str:
    """Return an assignment as systemd reads it back: % starts a specifier, \\ and " are quoted."""
    value = str(line.value).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{line.name}={value}"'


def _text(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"
