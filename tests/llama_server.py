"""llama.cpp's own server with the small model, on OpenAI's wire: `python llama_server.py`, until its input ends.

Prints `{"base_url": ...}` when it serves. A process of its own: llama.cpp's threads and memory are not the test's.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

MODEL = "smollm2"
SLOTS = 2


@contextlib.contextmanager
def running():
    """Run the server; yields its address."""
    command = [sys.executable, str(Path(__file__).resolve())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("{"), f"the server did not start: {line}{process.stdout.read()}"
            yield json.loads(line)["base_url"]
        finally:
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def main():
    import xllamacpp

    import langchain_aegis.embedded  # noqa: F401 - threads that do not spin
    from langchain_aegis.embedded.models import smollm2_path

    params = xllamacpp.CommonParams()
    params.model.path = str(smollm2_path())
    params.model_alias = {MODEL}
    params.n_ctx, params.n_parallel = 2048 * SLOTS, SLOTS
    params.n_batch = params.n_ubatch = 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.fit_params = params.warmup = params.ui = False
    params.verbosity = -1
    params.endpoint_metrics = True
    server = xllamacpp.Server(params)
    print(json.dumps({"base_url": f"{server.listening_address}/v1"}), flush=True)
    sys.stdin.read()
    sys.stdout.flush()
    os._exit(0)  # its threads take their time to end


if __name__ == "__main__":
    main()
