"""docs/chat.md: its code runs, and says what it prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from langchain_aegis import ChatAegis, errors
from langchain_aegis.cli import app
from langchain_aegis.testing import ScriptedOllama

PAGE = (Path(__file__).parent.parent / "docs" / "chat.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture
def server(monkeypatch):
    with ScriptedOllama(["llama3.1:8b", "bge-m3"]) as server:
        monkeypatch.setenv("OLLAMA_BASE_URL", server.base_url)
        yield server


def test_the_code_prints_what_the_page_says(server):
    """One block after the other, in one program."""
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        for block in BLOCKS:
            exec(compile(block, "chat.md", "exec"), names)  # noqa: S102
    lines = printed.getvalue().splitlines()
    tokens, window = map(int, lines[0].split())
    assert (tokens > 15_000, window) == (True, 4096)
    assert f"{tokens} 4096" in PAGE
    assert f"Raise num_ctx above {tokens}" in lines[1]
    assert lines[2] in PAGE
    assert lines[3].startswith("8192 ")


def test_the_report_is_the_one_that_is_logged(server, caplog):
    """But for places and address."""
    for window in (4096, 8192):
        ChatAegis("llama3.1:8b", num_ctx=window).invoke("What is it?")
    (report,) = [r.message for r in caplog.records if r.message.startswith("reload:")]
    shown = re.search(r"```\n(reload: .*?)```", PAGE, re.S)[1]
    place = r"\S+\.py:\d+"
    pattern = re.sub(place, "PLACE", " ".join(shown.split()))
    assert re.sub(place, "PLACE", report).replace(server.base_url, "http://127.0.0.1:11434") == pattern


def test_the_options_and_errors_exist():
    help_text = re.sub(
        r"\x1b\[[0-9;]*m", "", CliRunner().invoke(app, ["warm", "--help"], env={"COLUMNS": "200"}).output
    )
    for option in re.findall(r"^\| `(--[a-z-]+)", PAGE, re.M):
        assert option in help_text
    for name in re.findall(r"`(Aegis\w+Error)`", PAGE):
        assert hasattr(errors, name)
