"""The package's one logger: a warning, or an error, is said once per process."""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger("langchain_aegis")

_said: set[str] = set()
_lock = threading.Lock()


def warn_once(code: str, message: str, *, level: int = logging.WARNING) -> None:
    """Log `message` as a warning the first time that this process meets `code`.

    Args:
        code: What the warning is about, e.g. `unnamed_model`; it starts the logged line.
        message: What happened and what the user can do. Never a prompt, an answer or a credential.
        level: `logging.ERROR` for what goes on until somebody changes a setting.
    """
    with _lock:
        if code in _said:
            return
        _said.add(code)
    logger.log(level, "%s: %s", code, message)


def forget_warnings() -> None:
    """Let every warning be said again: for tests."""
    with _lock:
        _said.clear()
