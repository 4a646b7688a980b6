"""Every example runs as a reader would run it, shows its point, and fits on a screen."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from langchain_aegis.testing import ScriptedOllama

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = sorted(path.name for path in EXAMPLES.glob("*.py"))
NOT_RUN = {"ray_serve_llm.py"}  # needs GPUs
DEADLINE_S = 120

# Patterns that the output must hold, in this order.
SHOWN = {
    "streaming_chat.py": [
        r"long\|.*answered by the model",
        r"long.*\|.*exact hit",
        r"long.*\|.*semantic hit",
        r"film\?\n.*answered by the model",
        r"4 questions, 2 asked of the model",
    ],
    "agent_with_tools.py": [
        r"model: opening_hours\({'weekday': 'Saturday'}\)\n.*tool: .*10:00.*\n.*model: .*10:00",
        r"cache: opening_hours\({'weekday': 'Saturday'}\)\n.*tool: .*10:00.*\n.*cache: .*10:00",
        r"model: opening_hours\({'weekday': 'Sunday'}\)",
        r"3 questions, 4 calls of the model, 3 of the tool",
    ],
    "two_tenants.py": [
        r"acme +from the model\n +globex +from the model\n +acme +from the cache\n +globex +from the cache",
        r"nobody +from the model",
        r"removes 1 answer",
        r"acme +from the model\n +globex +from the cache",
    ],
    "web_application.py": [
        r"acme +About (.*) \(from the model\)\nglobex +About (?!\1).* \(from the model\)\n",
        r"acme +About \1 \(cached\)\nglobex .* \(cached\)",
        r"4 requests, 2 asked of the model",
    ],
    "whole_pipeline.py": [
        r"asked the model \| How long may I.*asked the model \| What is the fine",
        r"from the cache +\| How long can I.*from the cache +\| What's the fine",
        r"changed: 1 answer.*asked the model \| How long can I.*from the cache +\| What is the fine",
        r"6 questions, 3 asked of the model",
    ],
    "burst.py": [
        r"200 callers: 163 answered, 37 refused",
        r"asked 104 times: 59 callers shared",
        r"at most 4 generations",
        r"come back after \d+\.\d s",
        r"140 answered",
    ],
    "test_an_application.py": [r"5 passed"],
    "rag_graph.py": [r"exact", r"semantic", r"guard: ", r"Summary", r"wrong hits"],
}


@pytest.mark.parametrize("name", [name for name in FILES if name not in NOT_RUN])
@pytest.mark.slow
def test_the_example_runs_alone_and_shows_its_point(name, home, tmp_path):
    with contextlib.ExitStack() as exits:
        environment = os.environ | {"NO_COLOR": "1", "TERM": "dumb"}
        if name == "rag_graph.py":  # test_demo.py runs it with the real model, which takes a minute
            server = exits.enter_context(ScriptedOllama())
            environment |= {"OLLAMA_BASE_URL": server.base_url, "OLLAMA_MODEL_GENERATION": "scripted"}
        done = subprocess.run(
            [sys.executable, EXAMPLES / name], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(".*".join(SHOWN[name]), done.stdout, re.DOTALL), done.stdout + done.stderr


@pytest.mark.parametrize("name", NOT_RUN)
def test_an_example_that_is_not_run_is_type_checked_and_says_so(name):
    checks = (EXAMPLES.parent / "tools" / "check.py").read_text()
    assert f'"-m", "mypy", "examples/{name}"' in checks
    assert "type-checked" in (EXAMPLES / name).read_text().partition("\n")[0]


@pytest.mark.parametrize("name", FILES)
def test_the_example_is_shorter_than_60_lines(name):
    assert len((EXAMPLES / name).read_text().splitlines()) < 60


@pytest.mark.parametrize("name", FILES)
def test_the_example_says_in_its_first_line_what_it_shows(name):
    assert re.match(r'"""[A-Z][^"]+[.`]"""\n', (EXAMPLES / name).read_text())


def test_the_index_names_every_example_and_nothing_else():
    index = (EXAMPLES / "README.md").read_text()
    assert sorted(re.findall(r"^\| \[(\S+\.py)\]\((\S+\.py)\) \|", index, re.MULTILINE)) == [(n, n) for n in FILES]


@pytest.mark.parametrize("name", FILES)
def test_the_example_uses_public_names_only(name):
    text = (EXAMPLES / name).read_text()
    used = set(re.findall(r"^\s*from (langchain_aegis\S*) import", text, re.MULTILINE))
    public = {"langchain_aegis", "langchain_aegis.embedded", "langchain_aegis.testing"}
    assert used <= public | ({"langchain_aegis.demo.run"} if name == "rag_graph.py" else set())
