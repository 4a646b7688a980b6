"""The metrics of all workers on one page: each serves its own on a socket, and whoever is scraped asks all."""

import asyncio
import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from langchain_aegis.metrics import register_all

TIMEOUT_S = 2.0  # a worker that is about to end, or has its hands full, is left out of this page


class Metrics:
    """What this worker counts, and the way to the others.

    Args:
        cache: Its cache.
        ollama_url: The model server.
    """

    def __init__(self, cache: Any, ollama_url: str) -> None:
        self._own = CollectorRegistry()
        register_all(cache, servers=[ollama_url], registry=self._own)
        self._folder = os.environ.get("SERVICE_RUN_DIR")
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        """Serve this worker's page to the others."""
        # Where that cannot be, for one because the path is too long for a socket, a page shows one worker.
        if self._folder:
            with contextlib.suppress(OSError):
                self._server = await asyncio.start_unix_server(self._serve, self._path(os.getpid()))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Be gone from the others' pages."""
        if self._server is not None:
            self._server.close()
            self._path(os.getpid()).unlink(missing_ok=True)

    async def page(self) -> bytes:
        """Return the samples of all workers, each with the label `worker`."""
        pages = {str(os.getpid()): generate_latest(self._own).decode()}
        if self._folder:
            others = self._others()
            found = await asyncio.gather(*(self._ask(path) for path in others))
            pages |= {path.stem: page for path, page in zip(others, found, strict=True) if page}
        together = CollectorRegistry()
        together.register(_Pages(pages))
        return generate_latest(together)

    def _others(self) -> list[Path]:
        mine = self._path(os.getpid())
        return [path for path in mine.parent.glob("*.sock") if path != mine]

    def _path(self, pid: int) -> Path:
        return Path(self._folder or "") / f"{pid}.sock"

    async def _serve(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(generate_latest(self._own))
            await writer.drain()
            writer.close()

    async def _ask(self, path: Path) -> str:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(path)
                page = await reader.read()
                writer.close()
                return page.decode()
        except ConnectionRefusedError:  # a worker that was killed has left its socket
            with contextlib.suppress(OSError):
                os.unlink(path)
        except (OSError, TimeoutError):
            pass
        return ""


class _Pages:
    """Several workers' pages as one collector."""

    def __init__(self, pages: dict[str, str]) -> None:
        self._pages = pages

    def collect(self) -> list[Metric]:
        """Return the metrics, those of a name together."""
        found: dict[str, Metric] = {}
        for worker, page in self._pages.items():
            for metric in text_string_to_metric_families(page):
                whole = found.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    whole.add_sample(sample.name, {**sample.labels, "worker": worker}, sample.value)
        return list(found.values())
