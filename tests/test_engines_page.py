"""What docs/engines.md says is so."""

import re
from pathlib import Path

import pytest
from langchain_openai import ChatOpenAI
from openai_server import OpenAIServer, closed

from langchain_aegis.model_parts import _TRANSPORT
from langchain_aegis.testing import ScriptedOllama
from langchain_aegis.writes import the_writer

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "engines.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.slow
async def test_the_examples_run(redis_url, minilm, monkeypatch):
    with ScriptedOllama(["llama3.2:3b"]) as ollama, OpenAIServer() as server:
        monkeypatch.setenv("OLLAMA_BASE_URL", ollama.base_url)
        monkeypatch.setenv("REDIS_URL", redis_url)
        monkeypatch.setenv("AEGIS_NAMESPACE", "engines")
        monkeypatch.setenv("AEGIS_OP_BUDGET_S", "10")
        names = {}
        assert len(BLOCKS) == 3
        for code in BLOCKS:
            text = re.sub(r"http://127.0.0.1:800\d/v1", server.base_url, code)
            exec(compile(text, "docs/engines.md", "exec"), names)  # noqa: S102 - our own page
            the_writer.drain(timeout_s=10)
        assert len(server.chats) == len(names["facts"]) == 100
        assert server.most_running <= 4
        assert names["chat"].invoke("Hello?").text
        assert len(names["embeddings"].embed_query("one")) == 128
        for cache in (names["bulk"].cache, names["cache"]):
            cache.close()
        await closed(names["bulk"].inner, names["embeddings"].inner)


def test_links_lead_somewhere():
    heads = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"(?m)^#+ (.*)$", TEXT)}
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", TEXT):
        assert not target or (ROOT / "docs" / target).exists(), target
        assert target or anchor in heads, anchor


def test_the_table_of_what_is_not_in_the_key_is_that_of_the_code():
    table = TEXT.partition("| Not in the key |")[2].partition("\n\n")[0]
    told = set(re.findall(r"`(\w+)`", table))
    aliases = {name: field.alias or name for name, field in ChatOpenAI.model_fields.items()}
    assert {aliases.get(name, name) for name in _TRANSPORT} | {"tags", "metadata"} == told


def test_the_commands_that_it_names_are_there():
    for script in re.findall(r"docker/[\w-]+\.sh", TEXT):
        assert (ROOT / script).is_file()
    assert "pull-vllm" in (ROOT / "docker-compose.dgx-spark.yml").read_text()
