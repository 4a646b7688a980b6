"""What the README says is so."""

import re
from pathlib import Path

import pytest

from langchain_aegis import AegisSemanticCache, was_cached
from langchain_aegis.notices import forget_warnings
from langchain_aegis.testing import ScriptedOllama

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture
def application(redis_url, minilm, monkeypatch):
    """The environment that the README's code expects, with a scripted model and the small embedder."""
    from langchain_core.globals import set_llm_cache

    forget_warnings()
    with ScriptedOllama(models=["llama3.2:8b"]) as server:
        monkeypatch.setenv("OLLAMA_BASE_URL", server.base_url)
        monkeypatch.setenv("REDIS_URL", redis_url)
        monkeypatch.setenv("AEGIS_NAMESPACE", "readme")
        monkeypatch.setenv("AEGIS_OP_BUDGET_S", "5")
        made = AegisSemanticCache.__init__
        monkeypatch.setattr(
            AegisSemanticCache, "__init__", lambda self, *a, **kw: made(self, *a, **{"embeddings": minilm, **kw})
        )
        yield server
        set_llm_cache(None)


def run(code, names):
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - our own README


def test_the_code_does_what_its_comments_say(application):
    assert len(BLOCKS) == 2
    names = {}
    run(BLOCKS[0], names)
    asked = [chat["messages"][-1]["content"] for chat in application.chats]
    assert asked == ["How long may I keep a book?", "How long may I keep a film?"]
    with names["aegis_scope"](tenant="acme"):
        assert was_cached(names["model"].invoke("How long can I keep a book?"))["tier"] == "semantic"

    class Graph:
        def invoke(self, state):
            return {"answer": names["model"].invoke(state["question"]).text}

    with names["aegis_scope"](tenant="acme"):
        run(BLOCKS[1], {**names, "graph": Graph(), "question": "Where may I eat?"})
    assert len(application.chats) == 3


def test_every_file_and_command_that_is_named_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"`(make [a-z]+|python [\w/.]+)", README):
        kind, what = command.split()
        assert (f"\n{what}:" in makefile) if kind == "make" else (ROOT / what).exists(), command


def test_every_figure_has_its_command():
    rows = re.findall(r"^\|(.+)\|(.+)\|(.+)\|$", README.partition("## Measured")[2], re.M)[2:]
    assert len(rows) >= 5
    assert all("`" in command for _, _, command in rows)
