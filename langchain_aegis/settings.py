"""Every default of the package in one frozen value, read from the environment once.

Knows nothing of LangChain, Redis or Ollama, and does no I/O.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from ipaddress import ip_address
from typing import Any, Literal, Self
from urllib.parse import quote, urlsplit, urlunsplit

Mode = Literal["strict", "balanced", "lenient"]
MODES: tuple[Mode, ...] = ("strict", "balanced", "lenient")

THE_SECRET = "secret"  # noqa: S105  # among the keys of records: the one that names are made with
_SHORTEST = 16  # characters of a secret
_PORTS = {"Ollama": 11434, "vLLM": 8000}
_A = {"Ollama": "an Ollama", "vLLM": "a vLLM"}
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


def _config_error(message: str) -> Exception:
    # Imported late: `errors` needs langchain-core, and `import langchain_aegis` alone shall stay light.
    from langchain_aegis.errors import AegisConfigError

    return AegisConfigError(message)


@dataclass(frozen=True, kw_only=True)
class AegisSettings:
    """What is used where an argument does not say otherwise.

    Units stand in the names. `AegisSettings.from_env()` reads `AEGIS_<FIELD>` (upper case) for every field and the
    names that an Ollama and Redis application has already: `OLLAMA_BASE_URL` (or `OLLAMA_HOST`),
    `OLLAMA_MODEL_GENERATION`, `OLLAMA_MODEL_EMBEDDINGS`, `VLLM_BASE_URL`, `VLLM_API_KEY`, `REDIS_URL` (or
    `REDIS_HOST`, `REDIS_PORT`, `REDIS_PASSWORD`), `REDIS_CACHE_ENABLED`, `BATCH_WINDOW_MS`. The package's own name wins
    over the common one.
    """

    # Servers
    ollama_base_url: str = field(default="http://127.0.0.1:11434", repr=False)  # may hold a password
    model_generation: str | None = None
    model_embeddings: str | None = None
    redis_url: str = field(default="redis://127.0.0.1:6379", repr=False)  # may hold a password
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 120.0  # between two pieces of an answer
    deadline_s: float = 600.0  # of one whole answer
    keep_alive: str = "30m"
    vllm_base_url: str | None = field(default=None, repr=False)  # of vLLM or another server on OpenAI's wire
    vllm_api_key: str | None = field(default=None, repr=False)
    vllm_max_num_seqs: int | None = None  # what it runs at once; None: asked, where it tells

    # Cache
    cache_enabled: bool = True
    namespace: str = "aegis"
    mode: Mode = "balanced"
    ttl_s: int = 3600
    op_budget_s: float = 0.1
    embed_budget_s: float = 1.0
    max_entry_bytes: int = 1_048_576
    local_tier_bytes: int = 0  # 0: no local tier
    lease_s: float = 0.0  # so long one process may make an answer for all; 0: each makes its own
    tenant_key: str | None = "tenant_id"  # name of the tenant in a run's `configurable`
    user_key: str | None = "user_id"

    # Admission
    max_concurrency: int = 4
    max_waiting: int = 100
    window_ms: float = 50.0
    max_batch: int = 16
    shared_slots: bool = False  # `max_concurrency` bounds the calls of all processes together, by leases in Redis
    slot_lease_s: float = 10.0  # after which the slots of a process that has died are free again

    # Host
    home: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    record_keys: tuple[str, ...] = field(default=(), repr=False)  # the first signs; "secret": `secret_key`, the default
    encrypt: bool = False  # needs the extra `crypto`

    def __post_init__(self) -> None:
        """Refuse values that could only fail later."""
        if self.mode not in MODES:
            raise _config_error(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        for name in ("ttl_s", "op_budget_s", "embed_budget_s", "max_entry_bytes", "connect_timeout_s",
                     "read_timeout_s", "deadline_s", "max_concurrency", "max_batch"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise _config_error(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.vllm_max_num_seqs is not None and not self.vllm_max_num_seqs > 0:
            raise _config_error(f"vllm_max_num_seqs must be above 0, got {self.vllm_max_num_seqs!r}")
        for name in ("max_waiting", "window_ms", "local_tier_bytes", "lease_s"):
            if not getattr(self, name) >= 0:
                raise _config_error(f"{name} must be 0 or more, got {getattr(self, name)!r}")
        if not 1 <= self.slot_lease_s <= 60:  # shorter, a busy machine would lose what it uses
            raise _config_error(f"slot_lease_s must be 1 to 60, got {self.slot_lease_s!r}")
        if not self.namespace or any(c in "{}*?[]\\" or c.isspace() or not c.isprintable() for c in self.namespace):
            raise _config_error(f"namespace must be a plain word without braces or wildcards, got {self.namespace!r}")
        if self.secret_key is not None and len(self.secret_key) < _SHORTEST:
            raise _config_error(f"secret_key (AEGIS_SECRET_KEY) must have at least {_SHORTEST} characters")
        self._check_record_keys()

    def _check_record_keys(self) -> None:
        """Refuse keys of records that are none; what they are is not said."""
        keys = self.record_keys
        if not isinstance(keys, tuple) or not all(isinstance(key, str) for key in keys):
            raise _config_error("record_keys must be a tuple of texts")
        if any(len(key) < _SHORTEST and key != THE_SECRET for key in keys):
            raise _config_error(
                f"record_keys (AEGIS_RECORD_KEYS) must have at least {_SHORTEST} characters each, or be the word "
                f'"{THE_SECRET}" for the secret that is in use already'
            )
        if len({self.secret_key if key == THE_SECRET else key for key in keys}) < len(keys):
            raise _config_error("record_keys (AEGIS_RECORD_KEYS) must name each key once")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Read the settings from `environ` (default: the process environment).

        Empty values count as unset.

        Raises:
            AegisConfigError: A value cannot be read; the message names the variable.
        """
        env = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for common, name in _COMMON_NAMES:
            if text := env.get(common, "").strip():
                values[name] = _parse(common, name, text)
        if "redis_url" not in values and (env.get("REDIS_HOST", "").strip() or env.get("REDIS_PORT", "").strip()):
            values["redis_url"] = _redis_url(env)
        for f in fields(cls):
            if text := env.get(f"AEGIS_{f.name.upper()}", "").strip():
                values[f.name] = _parse(f"AEGIS_{f.name.upper()}", f.name, text)
        return cls(**values)

    def but(self, **changes: Any) -> Self:
        """Return a copy with the given fields changed; None means unchanged."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


def normalise_base_url(text: str, *, of: str = "Ollama") -> str:
    """Return the address of a server with scheme and port, without a trailing slash.

    `myhost` becomes `http://myhost:11434`, `0.0.0.0:11434` (an address to listen on) becomes loopback.

    Args:
        text: The address.
        of: "Ollama" or "vLLM": whose port is meant where none is named.

    Raises:
        AegisConfigError: It is no http address.
    """
    url = text.strip()
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port
    except ValueError:
        raise _config_error(f"not an address of {_A[of]} server: {redact_url(text)!r}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _config_error(
            f"not an address of {_A[of]} server: {redact_url(text)!r} (try http://127.0.0.1:{_PORTS[of]})"
        )
    host = "127.0.0.1" if parts.hostname == "0.0.0.0" else parts.hostname  # noqa: S104
    host = f"[{host}]" if ":" in host else host
    user = parts.netloc.rpartition("@")[0]
    if port is None:
        port = {"https": 443}.get(parts.scheme, 80 if "://" in url else _PORTS[of])
    netloc = f"{user}@{host}:{port}" if user else f"{host}:{port}"
    return urlunsplit((parts.scheme, netloc, parts.path.rstrip("/"), "", ""))


def redact_url(url: str) -> str:
    """Return `url` without user and password, fit for logs and errors."""
    start = re.match(r"[a-z][a-z0-9+.-]*://", url, re.IGNORECASE)
    scheme = start[0] if start else ""
    _, at, rest = url.removeprefix(scheme).rpartition("@")  # the last one: a password may be left unquoted
    return f"{scheme}{'***@' if at else ''}{rest.partition('?')[0]}"


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def is_looked_up(host: Any) -> bool:
    """Return whether the system must look a host's name up, which may take seconds and knows no timeout."""
    if not isinstance(host, str) or host == "localhost":
        return False
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return True
    return False


def _redis_url(env: Mapping[str, str]) -> str:
    host = env.get("REDIS_HOST", "").strip() or "127.0.0.1"
    port = env.get("REDIS_PORT", "").strip() or "6379"
    if not port.isdigit():
        raise _config_error(f"REDIS_PORT must be a number, got {port!r}")
    password = env.get("REDIS_PASSWORD", "").strip()
    login = f":{quote(password, safe='')}@" if password else ""
    return f"redis://{login}{host}:{port}"


def _parse(variable: str, name: str, text: str) -> Any:
    parser = _PARSERS.get(name)
    if parser is None:
        return text
    try:
        return parser(text)
    except ValueError:
        raise _config_error(f"{variable}={redact_url(text)!r} cannot be read as {_KINDS[parser]}") from None


def _vllm_url(text: str) -> str:
    return normalise_base_url(text, of="vLLM")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _bool(text: str) -> bool:
    word = text.lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(text)


_COMMON_NAMES = (
    ("OLLAMA_HOST", "ollama_base_url"),
    ("OLLAMA_BASE_URL", "ollama_base_url"),
    ("OLLAMA_MODEL_GENERATION", "model_generation"),
    ("OLLAMA_MODEL_EMBEDDINGS", "model_embeddings"),
    ("VLLM_BASE_URL", "vllm_base_url"),
    ("VLLM_API_KEY", "vllm_api_key"),
    ("REDIS_URL", "redis_url"),
    ("REDIS_CACHE_ENABLED", "cache_enabled"),
    ("BATCH_WINDOW_MS", "window_ms"),
)
_KINDS: dict[Callable[[str], Any], str] = {
    int: "a whole number",
    float: "a number",
    _bool: "yes or no",
    normalise_base_url: "an address",
    _vllm_url: "an address",
}
_PARSERS: dict[str, Callable[[str], Any]] = {
    "ollama_base_url": normalise_base_url,
    "vllm_base_url": _vllm_url,
    **dict.fromkeys(("connect_timeout_s", "read_timeout_s", "deadline_s", "op_budget_s", "embed_budget_s",
                     "window_ms", "slot_lease_s", "lease_s"), float),
    **dict.fromkeys(("ttl_s", "max_entry_bytes", "local_tier_bytes", "max_concurrency", "max_waiting",
                     "max_batch", "vllm_max_num_seqs"), int),
    "cache_enabled": _bool,
    "encrypt": _bool,
    "shared_slots": _bool,
    "record_keys": _words,
}  # fmt: skip
