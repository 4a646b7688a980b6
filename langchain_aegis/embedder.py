"""The embedder behind a time budget: a slow or broken one costs a semantic hit, never a call."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from langchain_core.embeddings import Embeddings

from langchain_aegis.breaker import Breaker, Unavailable
from langchain_aegis.errors import AegisError
from langchain_aegis.notices import warn_once

_RETRY_S = 30.0  # after so long, a missing embedder is looked for again


class Embedder:
    """One embedder, made when it is first needed.

    Args:
        make: Returns the embeddings, or None if there are none; may block, so it is called in a thread.
        budget_s: How long one text may take.
    """

    def __init__(self, make: Callable[[], Embeddings | None], *, budget_s: float) -> None:
        self.breaker = Breaker()
        self._make = make
        self._budget_s = budget_s
        self._lock = threading.Lock()
        self._embeddings: Embeddings | None = None
        self._look_again = 0.0

    @property
    def name(self) -> str | None:
        """The embedder's name, or None while none was found."""
        return embedder_name(self._embeddings) if self._embeddings is not None else None

    @property
    def missing(self) -> bool:
        """Whether one was looked for in vain a short time ago."""
        return self._embeddings is None and time.monotonic() < self._look_again

    def embed(self, text: str) -> Sequence[float]:
        """Return the vector of `text`, shape `(dimensions,)`.

        Raises:
            Unavailable: There is no embedder, it failed, or it needs longer than the budget.
        """
        self._check()
        future = _workers().submit(contextvars.copy_context().run, self._embed, text)
        try:
            return self._done(future.result(self._budget_s))
        except TimeoutError as exc:
            if future.done():
                raise self._failed(exc) from exc
            raise self._slow(future) from exc
        except Exception as exc:  # embedders raise what they like
            raise self._failed(exc) from exc

    async def aembed(self, text: str) -> Sequence[float]:
        """Like `embed`, without blocking the event loop."""
        self._check()
        task = asyncio.create_task(self._aembed(text))
        try:
            done, _ = await asyncio.wait({task}, timeout=self._budget_s)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not done:
            task.add_done_callback(lambda t: t.cancelled() or t.exception())  # nobody may be left to ask
            raise self._slow(task)
        try:
            return self._done(task.result())
        except Unavailable:
            raise
        except Exception as exc:  # embedders raise what they like
            raise self._failed(exc) from exc

    def _embed(self, text: str) -> Sequence[float]:
        return self.get().embed_query(text)

    async def _aembed(self, text: str) -> Sequence[float]:
        embeddings = self._embeddings
        if embeddings is None:
            embeddings = await asyncio.to_thread(self.get)
        return await embeddings.aembed_query(text)

    def get(self) -> Embeddings:
        """Return the embeddings themselves, made if necessary; blocks. Raises Unavailable if there are none."""
        with self._lock:
            if self._embeddings is None:
                if time.monotonic() < self._look_again:
                    raise Unavailable("no_embedder")
                self._look_again = time.monotonic() + _RETRY_S
                self._embeddings = self._make()
                if self._embeddings is None:
                    raise Unavailable("no_embedder")
            return self._embeddings

    def _check(self) -> None:
        if self.missing:
            raise Unavailable("no_embedder")
        if not self.breaker.allow():
            raise Unavailable("embedder_down")

    def _done(self, vector: Sequence[float]) -> Sequence[float]:
        self.breaker.succeeded()
        return vector

    def _slow(self, late: Any) -> Unavailable:
        self.breaker.failed()
        warn_once("embedder_slow", f"the embedder needs longer than {self._budget_s} s (embed_budget_s)")
        return Unavailable("embedder_slow", late)

    def _failed(self, exc: Exception) -> Unavailable:
        if isinstance(exc, Unavailable):
            return exc
        self.breaker.failed()
        detail = str(exc) if isinstance(exc, AegisError) else type(exc).__name__
        warn_once("embedder_down", f"the embedder failed ({detail}); only exact repeats are answered from the cache")
        return Unavailable("embedder_down")


_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _workers() -> ThreadPoolExecutor:
    """The threads that embed for blocking callers.

    Joined at exit: a native library that still computes in a daemon thread aborts a process that ends.
    """
    global _pool
    if (pool := _pool) is None:
        with _pool_lock:
            pool = _pool = _pool or ThreadPoolExecutor(8, thread_name_prefix="aegis-embed")
    return pool


def _forget_after_fork() -> None:
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


def embedder_name(embeddings: Embeddings) -> str:
    """Return a name that two embedders share only if their vectors can be compared."""
    for attribute in ("model", "model_name", "model_id", "deployment", "repo_id"):
        value = getattr(embeddings, attribute, None)
        if isinstance(value, str) and value:
            return value.removesuffix(":latest")
    kind = type(embeddings)
    return f"{kind.__module__}.{kind.__qualname__}"


def embedder_id(name: str, dimensions: int) -> str:
    """Return 8 hex characters for an embedder's vectors of one length: part of the index's name."""
    return hashlib.blake2b(f"{name}\0{dimensions}".encode(), digest_size=4).hexdigest()
