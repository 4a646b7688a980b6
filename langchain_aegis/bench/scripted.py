"""A scripted server in a process of its own, so that what it costs is not the client's.

As a program it prints its address and serves until its standard input ends.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from langchain_aegis.embedded.ollama import _import_path
from langchain_aegis.errors import AegisConnectionError

WORDS = 2_000  # no answer ends before the tokens that were asked for


@contextlib.contextmanager
def scripted_server() -> Iterator[str]:
    """Run one; yields its address.

    Raises:
        AegisConnectionError: It did not start.
    """
    import os

    command = [sys.executable, "-m", "langchain_aegis.bench.scripted"]
    environment = {**os.environ, **_import_path()}
    with subprocess.Popen(  # noqa: S603 - this file
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            address = process.stdout.readline().strip() if process.stdout else ""
            if not address:
                raise AegisConnectionError("the scripted server did not start: is langchain-aegis[testing] installed?")
            yield address
        finally:
            if process.stdin:
                process.stdin.close()
            process.terminate()


def _serve() -> None:
    from langchain_aegis.testing import ScriptedOllama

    with ScriptedOllama(words=WORDS) as server:
        print(server.base_url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    _serve()
