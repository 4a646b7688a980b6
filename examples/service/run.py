"""Run the service: its parts, unless the environment names others, and its workers."""

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path

import uvicorn

from langchain_aegis.embedded import EmbeddedOllama, EmbeddedRedis

EXAMPLES = Path(__file__).resolve().parents[1]
SLOTS = 4  # of the embedded server, and of Ollama in docker-compose.dgx-spark.yml


def main() -> None:
    """Start everything, and stop it at SIGTERM or Ctrl-C: workers finish what they have, then the parts end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--workers", type=int, default=4)
    given = parser.parse_args()
    with contextlib.ExitStack() as exits:
        environment = {"SERVICE_RUN_DIR": exits.enter_context(tempfile.TemporaryDirectory(prefix="service-"))}
        if not os.environ.get("REDIS_URL"):
            environment["REDIS_URL"] = exits.enter_context(EmbeddedRedis()).url
        if not os.environ.get("OLLAMA_BASE_URL"):
            environment["OLLAMA_BASE_URL"] = exits.enter_context(EmbeddedOllama()).base_url
            environment |= {"OLLAMA_MODEL_GENERATION": "smollm2:135m", "OLLAMA_MODEL_EMBEDDINGS": "all-minilm"}
        if "AEGIS_SHARED_SLOTS" not in os.environ:
            # Each worker has slots of its own: its share of the server's. Where workers share slots, all have all.
            environment["AEGIS_MAX_CONCURRENCY"] = str(max(1, SLOTS // given.workers))
        # A question before which so many of its worker wait is refused, with the time to come back.
        environment["AEGIS_MAX_WAITING"] = "8"
        # The model has the same processors as the workers here, so that a look-up may be late. It is worth waiting for:
        # the model takes seconds.
        environment["AEGIS_OP_BUDGET_S"] = "1"
        os.environ.update({name: os.environ.get(name) or value for name, value in environment.items()})
        print(f"http://{given.host}:{given.port}: POST /ask; /docs, /healthz, /readyz, /metrics", file=sys.stderr)
        uvicorn.run(
            "service.app:create_app", factory=True, app_dir=str(EXAMPLES), host=given.host, port=given.port,
            workers=given.workers, log_level="warning", access_log=False,
            timeout_graceful_shutdown=20,  # for answers that are under way
            timeout_worker_healthcheck=60,  # a worker that is busy is not a worker that hangs
        )  # fmt: skip


if __name__ == "__main__":
    main()
