"""How an application is tested without a model: `pytest examples/test_an_application.py`."""

from collections.abc import Iterator

import pytest
from langchain_core.language_models import BaseChatModel

from langchain_aegis import AegisEmbeddings, AegisError, AegisSemanticCache, ChatAegis, was_cached
from langchain_aegis.embedded import EmbeddedRedis
from langchain_aegis.testing import Fault, ScriptedOllama


def reply(model: BaseChatModel, question: str) -> str:
    """The application: answers a visitor, and says so if it cannot."""
    try:
        return str(model.invoke([("system", "You work in a library."), ("user", question)]).text)
    except AegisError as error:
        return "Please try again in a minute." if error.retryable else "We cannot answer this."


@pytest.fixture
def server() -> Iterator[ScriptedOllama]:
    with ScriptedOllama("qwen3:8b") as running:
        yield running


@pytest.fixture
def model(server: ScriptedOllama) -> ChatAegis:
    return ChatAegis("qwen3:8b", base_url=server.base_url, temperature=0, max_retries=0)


def test_the_question_reaches_the_model_with_its_instructions(server: ScriptedOllama, model: ChatAegis) -> None:
    assert "printers" in reply(model, "Where are the printers?")  # the scripted model quotes what it was asked
    assert [message["role"] for message in server.chats[0]["messages"]] == ["system", "user"]


@pytest.mark.parametrize("fault", [Fault(kind="status", status=503), Fault(kind="cut", after=3), Fault(kind="no_done")])
def test_half_an_answer_is_never_shown(server: ScriptedOllama, model: ChatAegis, fault: Fault) -> None:
    server.fail(fault)
    assert reply(model, "Where are the printers?") == "Please try again in a minute."
    assert "printers" in reply(model, "Where are the printers?")  # the fault is over


def test_a_repeated_question_is_not_asked_twice(server: ScriptedOllama, model: ChatAegis) -> None:
    embeddings = AegisEmbeddings("scripted-embed", base_url=server.base_url)
    with EmbeddedRedis(shared=False) as redis, AegisSemanticCache(redis.url, embeddings) as cache:
        model.cache = cache
        first, second = (model.invoke("Where are the printers?") for _ in range(2))
    assert was_cached(second) and second.text == first.text
    assert len(server.chats) == 1


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "--disable-warnings"]))
