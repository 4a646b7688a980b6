"""A server with Ollama's API that runs from PyPI packages alone.

As a program, `python -m langchain_aegis.embedded.ollama --engine llama`, it listens on a free loopback port and prints
`{"port": ...}` when it is ready, or `{"error": ...}` when it cannot start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import site
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from langchain_aegis.embedded.server import EmbeddedServer
from langchain_aegis.errors import AegisConfigError, AegisConnectionError, AegisError
from langchain_aegis.home import aegis_home
from langchain_aegis.settings import AegisSettings

if TYPE_CHECKING:
    from langchain_aegis.embedded.guard import ServerInfo, SharedServer
    from langchain_aegis.embedded.wire_engine import Engine

EngineName = Literal["llama", "scripted"]
ENGINES: tuple[EngineName, ...] = ("llama", "scripted")

_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "ORT_DISABLE_TELEMETRY": "1"}


class EmbeddedOllama(EmbeddedServer):
    """An Ollama-like server in a child process, ended with its last user.

    Starts when entered, or when `base_url` is first read. A server that died is started again when `base_url` is next
    read, at another port. Without `close()` it is in use until this process ends.

        with EmbeddedOllama() as server:
            model = ChatAegis("smollm2:135m", base_url=server.base_url)

    Args:
        engine: "llama": SmolLM2-135M as `smollm2:135m` and MiniLM as `all-minilm`. "scripted": no model, answers made
            from the request (see `langchain_aegis.testing`), `scripted` and `scripted-embed`.
        home: Directory for lock and log, default: this package's home (see `langchain_aegis.home`).
        shared: All processes of this user use one server per `home`. Default: yes for "llama", no for "scripted",
            which otherwise is this object's own.

    Starting raises AegisConfigError if a package, a system library or the model's weights are missing, and
    AegisConnectionError, which says why, if the server does not start.
    """

    def __init__(
        self,
        engine: EngineName = "llama",
        *,
        home: str | os.PathLike[str] | None = None,
        shared: bool | None = None,
    ) -> None:
        if engine not in ENGINES:
            raise AegisConfigError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
        super().__init__()
        self._engine = engine
        self._home = home
        self._shared = engine == "llama" if shared is None else shared

    @property
    def base_url(self) -> str:
        """Address of the server, `http://127.0.0.1:<port>`; starts it, which blocks for 1 to 10 s."""
        return f"http://127.0.0.1:{self.start().address['port']}"

    def start(self) -> ServerInfo:
        """Start the server, or attach to it; does nothing while it runs."""
        info = super().start()
        if reason := info.address.get("error"):
            self.close()
            raise (AegisConfigError if info.address.get("config") else AegisConnectionError)(reason)
        return info

    def _make(self) -> SharedServer:
        if sys.platform == "win32":
            raise AegisConfigError("No embedded Ollama for Windows. Set OLLAMA_BASE_URL to a running Ollama.")
        from langchain_aegis.embedded import guard

        arguments = ["--engine", self._engine]
        if self._engine == "llama":
            # Here and not in the child: fetching the weights reports its progress to whoever started us.
            from langchain_aegis.embedded.models import smollm2_path

            arguments += ["--weights", str(smollm2_path())]
        if self._shared:
            home = aegis_home(AegisSettings(home=os.fspath(self._home)) if self._home is not None else None)
        else:
            home = guard.fresh_home("aegis-ollama-")
        return guard.SharedServer(
            "ollama" if self._engine == "llama" else "scripted",
            home,
            [sys.executable, "-m", "langchain_aegis.embedded.ollama", *arguments],
            ready=guard.ReadyLine(),
            env=_ENVIRONMENT | _import_path(),
            stop_timeout_s=0.0,  # it has nothing to save
            remove_home=not self._shared,
        )


def _import_path() -> dict[str, str]:
    """Return the environment in which a child finds this package where it is not installed."""
    parent = str(Path(__file__).resolve().parents[2])
    if parent in {str(Path(path).resolve()) for path in [*site.getsitepackages(), site.getusersitepackages()]}:
        return {}
    given = os.environ.get("PYTHONPATH", "")
    paths = [os.path.abspath(path) for path in given.split(os.pathsep) if path]
    return {"PYTHONPATH": os.pathsep.join([*paths, *([parent] if parent not in paths else [])])}


async def _engine(name: str, weights: str | None) -> Engine:
    if name == "scripted":
        from langchain_aegis.embedded.scripted import ScriptedEngine

        return ScriptedEngine()
    from langchain_aegis.embedded.llama import LlamaEngine

    if weights is None:
        from langchain_aegis.embedded.models import smollm2_path

        weights = str(await asyncio.to_thread(smollm2_path))
    return await LlamaEngine.start(Path(weights))


async def _serve(name: str, weights: str | None) -> None:
    try:
        from langchain_aegis.embedded.wire import OllamaWire
        from langchain_aegis.embedded.wire_server import listen, loopback_socket
    except ImportError as exc:
        raise AegisConfigError(
            f"The embedded Ollama is not installed ({exc}); run: pip install 'langchain-aegis[embedded]'"
        ) from exc
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    engine = await _engine(name, weights)
    listener = await listen(OllamaWire(engine), loopback_socket())
    print(json.dumps({"port": listener.port}), flush=True)
    await ended.wait()
    await listener.aclose()
    await engine.aclose()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the server until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m langchain_aegis.embedded.ollama", description=__doc__)
    parser.add_argument("--engine", choices=ENGINES, default="llama")
    parser.add_argument("--weights", help="GGUF file of SmolLM2-135M-Instruct; default: look for it, or fetch it")
    given = parser.parse_args(arguments)
    try:
        asyncio.run(_serve(given.engine, given.weights))
    except (AegisError, OSError) as exc:
        reason = " ".join(str(exc).split())
        print(json.dumps({"error": reason, "config": isinstance(exc, AegisConfigError)}), flush=True)
        sys.exit(1)
    sys.stdout.flush()
    os._exit(0)  # llama.cpp's threads take their time to end, and nothing is left to save


if __name__ == "__main__":
    main()
