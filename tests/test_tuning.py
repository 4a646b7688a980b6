"""The tunings: each line has its reason, none surprises a client, and the repository's own compose file agrees."""

from pathlib import Path

import pytest
import yaml

from langchain_aegis import AegisSettings, ChatAegis
from langchain_aegis.errors import AegisOptionError
from langchain_aegis.ollama.knowledge import knowledge
from langchain_aegis.testing import ScriptedOllama
from langchain_aegis.tuning import AUTO, named, tuned, tunings

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(tunings())
RUNNER = {"num_ctx", "num_batch", "num_gpu", "num_thread", "main_gpu", "use_mmap", "draft_num_predict", "shift"}


def test_there_is_one_for_each_kind_of_machine():
    assert NAMES == ["cpu", "dgx-spark", "laptop", "workstation"]


@pytest.mark.parametrize("name", NAMES)
def test_every_line_has_a_reason_and_a_source(name):
    for line in (*named(name).server, *named(name).request, *named(name).client):
        assert line.reason and line.source, line.name
        assert not line.reason.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_the_server_reads_every_variable(name):
    for variable, value in named(name).environment().items():
        setting = knowledge().server[variable]
        assert setting.reads == "yes"
        assert setting.misread(value) is None


@pytest.mark.parametrize("name", NAMES)
def test_no_request_makes_the_server_load_a_model_again(name):
    assert not {line.name for line in named(name).request} & RUNNER


@pytest.mark.parametrize("name", NAMES)
def test_the_client_lets_through_what_the_server_runs_at_once(name):
    settings = tuned(AegisSettings(), name)
    assert settings.max_concurrency == int(named(name).environment()["OLLAMA_NUM_PARALLEL"])
    assert settings.keep_alive == named(name).environment()["OLLAMA_KEEP_ALIVE"]


def test_the_compose_file_of_this_repository_is_the_tuning_of_that_machine():
    services = yaml.safe_load((ROOT / "docker-compose.dgx-spark.yml").read_text())["services"]
    assert services["ollama"]["environment"] == named("dgx-spark").environment()


def test_auto_changes_nothing():
    """The client's machine says nothing about the server's."""
    settings = AegisSettings(keep_alive="1m")
    assert tuned(settings, AUTO) is settings


def test_what_somebody_set_stays():
    settings = tuned(AegisSettings(keep_alive="1m", deadline_s=9.0), "cpu")
    assert (settings.keep_alive, settings.deadline_s, settings.read_timeout_s) == ("1m", 9.0, 600.0)


@pytest.mark.parametrize("name", ["", "dgx", "DGX-SPARK"])
def test_a_tuning_that_does_not_exist_is_refused_with_those_that_do(name):
    with pytest.raises(AegisOptionError, match="'auto' or one of dgx-spark, workstation, laptop, cpu"):
        ChatAegis("m", tuning=name)


def test_a_model_of_a_named_tuning_sends_its_keep_alive_and_nothing_else():
    with ScriptedOllama("qwen3:8b") as server:
        for tuning in (AUTO, "dgx-spark"):
            ChatAegis("qwen3:8b", base_url=server.base_url, tuning=tuning, temperature=0).invoke("How many?")
        plain, spark = (request.body for request in server.requests if request.path == "/api/chat")
    assert (plain["keep_alive"], spark["keep_alive"]) == ("30m", "24h")
    assert {**plain, "keep_alive": ""} == {**spark, "keep_alive": ""}


def test_a_tuning_does_not_change_what_answers_are_cached_under():
    assert ChatAegis("m")._get_llm_string() == ChatAegis("m", tuning="dgx-spark")._get_llm_string()


def test_an_argument_wins_over_the_tuning():
    model = ChatAegis("m", tuning="cpu", keep_alive="2m", max_concurrency=3, timeout=7)
    assert (model._defaults().keep_alive, model._slots) == ("2m", 3)
    assert model._endpoint.timeouts.deadline_s == 7
