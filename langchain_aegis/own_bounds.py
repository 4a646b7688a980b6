"""How many calls a server on OpenAI's wire runs at once, where nobody asked for a number.

A setting names it (`AEGIS_VLLM_MAX_NUM_SEQS`), else the server may tell: it is asked when the first call comes, in a
thread, so that no call waits for that. Until it is known there are as many slots as for any server.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from typing import Any

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.openai_servers import root_of, slots_of
from langchain_aegis.servers import addresses_of, admission_for, server_of
from langchain_aegis.settings import AegisSettings

_HOSTED = r"//([^/]*\.)?openai\.(com|azure\.com)(:\d+)?(/|$)"  # nobody's own slots
_AGAIN_S = 60.0  # after so long, a server that did not answer, or not tell, is asked again


def told_bound(inner: object) -> int | None:
    """Return how many calls the settings let run at once at the server of a model on OpenAI's wire.

    None if they do not say, and for every other model. `AEGIS_VLLM_BASE_URL` says for which server they are; without
    it they are for every server that such a model names.
    """
    server = server_on_openai_wire(inner)
    if server is None:
        return None
    settings = AegisSettings.from_env()
    meant = settings.vllm_base_url
    return settings.vllm_max_num_seqs if meant is None or root_of(meant) == root_of(server) else None


def asked_bounds(model: Any) -> dict[str, int | None]:
    """Return the bounds that a wrapper around a model asks for, as arguments of `admission_of`."""
    told = model.model_fields_set
    return {
        "max_concurrency": model.max_concurrency if "max_concurrency" in told else told_bound(model.inner),
        "max_waiting": model.max_waiting if "max_waiting" in told else None,
    }


class _Learning:
    """What the servers tell; there is one."""

    def __init__(self) -> None:
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Start anew in the child of a fork: its parent's threads do not run here."""
        self._lock = threading.Lock()
        self._next: dict[str, float] = {}  # server -> when it may be asked

    def look(self, server: str, inner: object) -> None:
        """Have a model's server asked, unless it was asked a short time ago; never waits, never fails.

        Args:
            server: Its address, as `server_on_openai_wire` returns it.
            inner: The model, for its key.
        """
        if time.monotonic() < self._next.get(server, 0.0):
            return
        with self._lock:
            if time.monotonic() < self._next.get(server, 0.0):
                return
            self._next[server] = time.monotonic() + _AGAIN_S
        thread = threading.Thread(target=self._ask, args=(server, _key(inner)), name="aegis-bounds", daemon=True)
        # Where no thread can be started, the interpreter is about to end.
        with contextlib.suppress(RuntimeError):
            thread.start()

    def _ask(self, server: str, api_key: str | None) -> None:
        slots = slots_of(server, api_key=api_key)
        if slots is not None:
            admission_for(server, max_concurrency=slots)  # the smallest that anybody asked for still wins
            self._next[server] = float("inf")


learning = _Learning()


def server_on_openai_wire(inner: object) -> str | None:
    """Return the address of a model on OpenAI's wire that names a server; None for any other, and for OpenAI's own."""
    if not hasattr(inner, "openai_api_base") or addresses_of(inner):
        return None
    try:
        server = server_of(inner)
    except AegisConfigError:
        return None
    return None if server is None or re.search(_HOSTED, server) else server


def _key(inner: Any) -> str | None:
    """Return what the model sends as its key, if that is known without calling anything."""
    key = getattr(inner, "openai_api_key", None)
    read = getattr(key, "get_secret_value", None)
    secret = read() if read is not None else None
    return secret if isinstance(secret, str) else None
