"""What docs/router.md says is so."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from langchain_aegis import ChatAegis
from langchain_aegis.notices import forget_warnings
from langchain_aegis.testing import ScriptedOllama

PAGE = Path(__file__).parent.parent / "docs" / "router.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
HOSTS = ("http://gpu-1:11434", "http://gpu-2:11434")


@pytest.fixture
def servers(monkeypatch):
    """Scripted servers by their names on the page; one stands for vLLM and the gateway, which no test has."""
    forget_warnings()
    names = ["llama3.2:3b", "llama3.1:8b", "llama-3.1-8b", "llama-3.1-70b"]
    made = {name: ScriptedOllama(names, words=4) for name in ("ollama", "vllm", *HOSTS)}
    for server in made.values():
        server.start()
    monkeypatch.setenv("OLLAMA_BASE_URL", made["ollama"].base_url)
    openai = ModuleType("langchain_openai")
    openai.ChatOpenAI = lambda *, model, **_: ChatAegis(model, base_url=made["vllm"].base_url)
    monkeypatch.setitem(sys.modules, "langchain_openai", openai)
    yield made
    for server in made.values():
        server.close()


@pytest.mark.slow
def test_the_examples_run(servers):
    def asked(name):
        found = [chat["model"] for chat in servers[name].chats]
        servers[name].forget()
        return found

    names, code = {}, list(BLOCKS)
    assert len(code) == 5

    def run():
        text = code.pop(0)
        for host in HOSTS:
            text = text.replace(host, servers[host].base_url)
        exec(compile(text, "docs/router.md", "exec"), names)  # noqa: S102 - our own page

    run()
    assert asked("ollama") == ["llama3.1:8b", "llama3.2:3b"]
    assert asked("vllm") == ["llama-3.1-8b"] * 200
    run()
    assert asked("vllm") == ["llama-3.1-8b"]
    assert asked("ollama") == ["llama3.2:3b"]
    servers["vllm"].close()
    run()
    with names["aegis_scope"](task="extract"):
        assert names["answer"]("Name the persons in this letter.")
    assert asked("ollama") == ["llama3.1:8b"] * 2
    servers["ollama"].close()
    assert names["answer"]("Who is there?") == "The assistant is not available now."
    run()
    assert len(names["answers"]) == 20
    assert names["spread"].admission.max_concurrency == 8
    counts = [len(asked(host)) for host in HOSTS]
    assert sum(counts) == 20
    assert all(counts)
    servers[HOSTS[0]].close()
    names["spread"].invoke("one")
    names["spread"].invoke("other")
    assert names["spread"].admission.down == (servers[HOSTS[0]].base_url,)
    servers["vllm"].start()
    run()
    assert asked("vllm") == ["llama-3.1-70b"]
    assert not code


def test_it_links_to_what_exists():
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.*)$", TEXT, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            assert not file or (PAGE.parent / file).exists(), target
            assert file or anchor in anchors, target
