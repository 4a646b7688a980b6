"""What this package relies on in langchain-core and langchain-ollama is still there."""

import importlib
import inspect
from functools import reduce
from pathlib import Path

import pytest
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.utils.utils import LC_ID_PREFIX
from langchain_ollama.chat_models import ChatOllama

import langchain_aegis
from langchain_aegis._compat import RELIES_ON


@pytest.mark.parametrize("name", RELIES_ON)
def test_a_private_name_exists_with_its_parameters(name):
    """A release that changes one fails here, not in a user's call."""
    module, _, path = name.partition(":")
    found = reduce(getattr, path.split("."), importlib.import_module(module))
    parameters = inspect.signature(getattr(found, "func", found)).parameters  # `func` of a cached property
    assert set(RELIES_ON[name]) <= set(parameters)


def test_the_list_is_complete():
    """Every private name that is imported from LangChain, or taken from it by inheritance, stands in it."""
    listed = {name.rpartition(":")[2].rpartition(".")[2] for name in RELIES_ON}
    ours = (
        "chat_models",
        "embeddings",
        "hits",
        "replays",
        "answers",
        "forwarding",
        "batching_chat",
        "recached",
        "router",
    )
    for name in ours:
        module = importlib.import_module(f"langchain_aegis.{name}")
        source = Path(module.__file__).read_text()
        for cls in (c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__):
            for own in vars(cls):
                theirs = [base for base in cls.__mro__ if base.__module__.startswith(("langchain_core", "langchain_o"))]
                if own.startswith("_") and not own.startswith("__") and any(own in vars(base) for base in theirs):
                    assert own in listed | PUBLIC, f"{name}.{cls.__name__} replaces {own}"
        for line in source.splitlines():
            if line.startswith(("from langchain_core", "from langchain_ollama")):
                for imported in line.partition(" import ")[2].strip("()").split(", "):
                    assert not imported.startswith("_") or imported in listed, imported


# LangChain's documented extension points, pydantic's own, and the ABC cache.
PUBLIC = {"_generate", "_agenerate", "_stream", "_astream", "_llm_type", "_identifying_params", "_abc_impl",
          "_get_ls_params", "_client", "_async_client"}  # fmt: skip


def test_core_calls_the_hooks_of_a_cache_hit():
    """With the generations that it then returns, so that they can be replaced in place."""
    for name in ("_generate_with_cache", "_agenerate_with_cache"):
        source = inspect.getsource(getattr(BaseChatModel, name))
        assert "replay_v2_events_for_cache_hit(" in source
        assert "return ChatResult(generations=converted_generations)" in source
    assert LC_ID_PREFIX == "lc_run-"


def test_chat_ollama_makes_its_clients_in_the_validator_that_is_replaced():
    """Otherwise each ChatAegis would load a CA bundle again."""
    assert "Client(host=" in inspect.getsource(ChatOllama._set_clients)
    decorators = langchain_aegis.ChatAegis.__pydantic_decorators__.model_validators
    assert decorators["_set_clients"].cls_ref.startswith("langchain_aegis.")
