"""LangChain's own suites for chat models and embeddings, over a real socket."""

import base64
from typing import Any

import httpx
import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests, EmbeddingsUnitTests

from langchain_aegis import AegisEmbeddings, ChatAegis
from langchain_aegis.testing import ScriptedModel, ScriptedOllama

ADDRESS = "http://127.0.0.1:11434"  # the unit tests send nothing


@pytest.fixture(scope="module", autouse=True)
def server():
    models = [ScriptedModel(name="m"), ScriptedModel(name="other"), ScriptedModel(name="embed", embedding=True)]
    with ScriptedOllama(models) as running:
        Running.base_url = running.base_url
        yield running


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """The image tests fetch a picture from the internet; one pixel serves as well."""
    pixel = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    )
    monkeypatch.setattr(httpx, "get", lambda *args, **kwargs: httpx.Response(200, content=pixel))


class Running:
    base_url = ADDRESS


class TestChatAegisUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[ChatAegis]:
        return ChatAegis

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "m", "base_url": ADDRESS}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        environ = {"OLLAMA_MODEL_GENERATION": "m", "OLLAMA_BASE_URL": ADDRESS, "OLLAMA_API_KEY": "test"}
        return environ, {}, {"model": "m", "base_url": ADDRESS, "api_key": "test"}

    # test_chat_models.py serialises and loads a model with the class allowed by name.
    @pytest.mark.xfail(reason='core allows "all" to load classes of LangChain\'s own packages only')
    def test_serdes(self, *args: Any, **kwargs: Any) -> None:
        super().test_serdes(*args, **kwargs)


class TestChatAegisIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[ChatAegis]:
        return ChatAegis

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "m", "base_url": Running.base_url, "temperature": 0}

    @property
    def has_tool_choice(self) -> bool:
        return False  # Ollama ignores it

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_image_inputs(self) -> bool:
        return True

    @property
    def supports_image_tool_message(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "other"


class TestAegisEmbeddingsUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[AegisEmbeddings]:
        return AegisEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": "embed", "base_url": ADDRESS}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        environ = {"OLLAMA_MODEL_EMBEDDINGS": "embed", "OLLAMA_BASE_URL": ADDRESS}
        return environ, {}, {"model": "embed", "base_url": ADDRESS}


class TestAegisEmbeddingsIntegration(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[AegisEmbeddings]:
        return AegisEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": "embed", "base_url": Running.base_url}
