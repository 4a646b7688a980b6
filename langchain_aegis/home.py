"""The directory in which this package keeps what must outlive a process: the secret, models, the embedded Redis."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from pathlib import Path

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.settings import THE_SECRET, AegisSettings


def aegis_home(settings: AegisSettings | None = None) -> Path:
    """Return the home directory, created with mode 0700.

    `AEGIS_HOME`, else `$XDG_CACHE_HOME/langchain-aegis`, else `~/.cache/langchain-aegis`, else
    `<tmp>/langchain-aegis-<uid>`: the last when there is no home directory or it cannot be written.

    Raises:
        AegisConfigError: `AEGIS_HOME` cannot be used, or the temporary directory belongs to somebody else.
    """
    told = (settings.home if settings else None) or os.environ.get("AEGIS_HOME", "").strip()
    if told:
        try:
            return _private(Path(told).expanduser())
        except (OSError, RuntimeError) as exc:
            raise AegisConfigError(f"AEGIS_HOME={told} cannot be used: {exc}") from exc
    cache = os.environ.get("XDG_CACHE_HOME", "").strip()
    home = os.environ.get("HOME", "").strip()
    for base in (Path(cache) if cache else None, Path(home) / ".cache" if home else None):
        if base is not None and base.is_absolute():
            with contextlib.suppress(OSError, PermissionError):
                return _private(base / "langchain-aegis")
    path = Path(tempfile.gettempdir()) / f"langchain-aegis-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    try:
        return _private(path)
    except OSError as exc:
        raise AegisConfigError(f"{path} cannot be used ({exc}); set AEGIS_HOME to a directory of your own") from exc


def load_secret(settings: AegisSettings) -> bytes:
    """Return the secret that all names and signatures are derived from.

    `AEGIS_SECRET_KEY` if set (needed as soon as two hosts share a Redis), else 32 random bytes kept in the home
    directory. Several processes that start at once agree on one file.

    Raises:
        AegisConfigError: The file cannot be read or written.
    """
    if settings.secret_key:
        return settings.secret_key.encode()
    path = aegis_home(settings) / "secret"
    try:
        with contextlib.suppress(FileNotFoundError):
            return _checked(path, path.read_bytes())
        # Written beside and linked into place: a reader sees no file or all of it, and the first writer wins.
        fresh = path.with_name(f"secret.{os.getpid()}.{secrets.token_hex(4)}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(32))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)
        finally:
            fresh.unlink()
        return _checked(path, path.read_bytes())
    except OSError as exc:
        raise AegisConfigError(f"the secret {path} cannot be kept ({exc}); set AEGIS_SECRET_KEY or AEGIS_HOME") from exc


def record_secrets(settings: AegisSettings, secret: bytes) -> tuple[bytes, ...]:
    """Return the secrets of records, the first of which signs new ones: `AEGIS_RECORD_KEYS`.

    Args:
        settings: What is listed there.
        secret: What `load_secret` returned: the word "secret" stands for it, and it is the default.
    """
    return tuple(secret if text == THE_SECRET else text.encode() for text in settings.record_keys) or (secret,)


def _checked(path: Path, secret: bytes) -> bytes:
    if len(secret) < 16:
        raise AegisConfigError(f"{path} is damaged; remove it (cached answers are then asked anew)")
    return secret


def _private(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        status = path.stat()
        if status.st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to another user")
        if status.st_mode & stat.S_ISVTX:  # /tmp and the like: for root, the next line would close it to everybody
            raise PermissionError(f"{path} is shared by all users; name a directory inside it")
        if status.st_mode & 0o077:
            path.chmod(0o700)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written")
    return path
