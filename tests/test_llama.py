"""The embedded Ollama: its process, its model, and what it says when it cannot start."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import is_running, short_directory, wait_until

from langchain_aegis.embedded import EmbeddedOllama
from langchain_aegis.embedded.llama import WINDOW, why_not
from langchain_aegis.errors import AegisConfigError

CHAT = "smollm2:135m"
DEADLINE_S = 90


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[EmbeddedOllama]:
    with EmbeddedOllama(home=place) as server:
        yield server


def chat(server: EmbeddedOllama, text: str, **more: Any) -> dict[str, Any]:
    options = {"temperature": 0, "num_predict": 4} | more.pop("options", {})
    body = {"model": CHAT, "messages": [{"role": "user", "content": text}], "stream": False, "options": options} | more
    answer = httpx.post(f"{server.base_url}/api/chat", json=body, timeout=DEADLINE_S)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.slow
class TestModel:
    def test_knows_a_capital(self, server: EmbeddedOllama) -> None:
        """It is the instruction-tuned model with the right template, not one that echoes its prompt."""
        answer = chat(server, "What is the capital of France?", options={"num_predict": 20})

        assert "Paris" in answer["message"]["content"]
        assert (answer["prompt_eval_count"], answer["done_reason"]) == (16, "stop")  # the counts of a real Ollama

    @pytest.mark.slow
    def test_a_long_prefix_is_read_once(self, server: EmbeddedOllama) -> None:
        context = "The office opens at nine and closes at five. " * 15
        cold = chat(server, context + "When does it open?")
        warm = chat(server, context + "When does it close?")

        assert warm["prompt_eval_count"] > 150  # what was cached counts too
        assert warm["prompt_eval_duration"] < cold["prompt_eval_duration"] / 4

    def test_the_window_is_reported(self, server: EmbeddedOllama) -> None:
        for asked, given in ((None, WINDOW), (512, 512), (100_000, WINDOW)):
            chat(server, "hi", options={"num_ctx": asked})
            models = httpx.get(f"{server.base_url}/api/ps").json()["models"]
            assert {model["name"]: model["context_length"] for model in models}[CHAT] == given

    def test_an_open_end_is_bounded(self, server: EmbeddedOllama) -> None:
        """Nothing runs for ever because nobody said how long it may become."""
        answer = chat(server, "Count from one to one thousand.", options={"num_predict": -1, "num_ctx": 64})
        assert answer["eval_count"] <= 64

    @pytest.mark.parametrize("schema", [{"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}])
    def test_a_schema_that_cannot_be_kept_is_refused(self, server: EmbeddedOllama, schema: dict[str, Any]) -> None:
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            chat(server, "x", format=schema)

    def test_threads_do_not_spin(self, server: EmbeddedOllama) -> None:
        environment = Path(f"/proc/{server.pid}/environ").read_bytes().split(b"\0")
        assert {b"OMP_WAIT_POLICY=passive", b"GOMP_SPINCOUNT=0", b"ORT_DISABLE_TELEMETRY=1"} <= set(environment)


@pytest.mark.slow
class TestProcess:
    @pytest.mark.slow
    def test_is_shared_and_ends_with_the_last_user(self, server: EmbeddedOllama, home: Path) -> None:
        one, two = EmbeddedOllama(home=home), EmbeddedOllama(home=home)
        pid = one.pid
        assert two.pid == pid != server.pid
        assert one.base_url == two.base_url
        one.close()
        assert httpx.get(f"{two.base_url}/api/version").status_code == 200
        two.close()
        two.close()
        assert not is_running(pid)

    @pytest.mark.slow
    def test_is_started_again_when_it_died(self, server: EmbeddedOllama) -> None:
        pid = server.pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: server.pid != pid, timeout_s=DEADLINE_S)

        assert chat(server, "hello")["done"]

    @pytest.mark.slow
    async def test_starting_does_not_block_the_loop(self) -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        async with EmbeddedOllama(shared=False) as server:
            assert ticks > 10
            assert server.base_url.startswith("http://127.0.0.1:")
        ticking.cancel()


class TestScripted:
    def test_is_private_and_leaves_nothing(self) -> None:
        with EmbeddedOllama("scripted") as one, EmbeddedOllama("scripted") as two:
            assert one.pid != two.pid
            names = [model["name"] for model in httpx.get(f"{one.base_url}/api/tags").json()["models"]]
            assert names == ["scripted:latest", "scripted-embed:latest"]
            pids = [one.pid, two.pid]
            guard = one._guard
            assert guard is not None
        assert not any(map(is_running, pids))
        wait_until(lambda: not guard.home.exists())

    def test_can_be_entered_again(self) -> None:
        server = EmbeddedOllama("scripted")
        for _ in range(2):
            with server:
                assert httpx.get(f"{server.base_url}/api/version").status_code == 200


class TestCannotStart:
    @pytest.mark.parametrize(
        ("reason", "remedy"),
        [
            ("libgomp.so.1: cannot open shared object file: No such file or directory", "apt-get install libgomp1"),
            ("No module named 'xllamacpp'", "pip install 'langchain-aegis[embedded]'"),
        ],
    )
    def test_a_missing_library_is_said_in_one_line(
        self, reason: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The child cannot import llama.cpp; the caller learns why and what to do, without a traceback."""
        (tmp_path / "xllamacpp.py").write_text(f"raise ImportError({reason!r})")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr("langchain_aegis.embedded.models.smollm2_path", lambda: Path("/nowhere"))

        with pytest.raises(AegisConfigError) as caught:
            EmbeddedOllama(shared=False).start()
        assert remedy in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "libgomp.so.1" in why_not(ImportError("libgomp.so.1: cannot open")) and "\n" not in why_not(
            ImportError()
        )

    @pytest.mark.slow
    def test_damaged_weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        weights = tmp_path / "x.gguf"
        weights.write_bytes(b"GGUF?")
        monkeypatch.setattr("langchain_aegis.embedded.models.smollm2_path", lambda: weights)
        with pytest.raises(AegisConfigError, match="cannot load"):
            EmbeddedOllama(shared=False).start()

    def test_an_unknown_engine(self) -> None:
        with pytest.raises(AegisConfigError, match="engine must be one of llama, scripted"):
            EmbeddedOllama("gpt")  # type: ignore[arg-type]
