"""The command `aegis plan`: with a server and without one, as a table, as JSON and as files."""

import json
import sys

import pytest
import yaml
from lying_server import LyingServer

from langchain_aegis.cli import main
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.ollama.compose import check_compose
from langchain_aegis.ollama.env_files import read_env_file
from langchain_aegis.ollama.machine import host_of
from langchain_aegis.ollama.plan_report import Wish, make_plan
from langchain_aegis.ollama.plan_shape import of_table
from langchain_aegis.ollama.plan_source import find_model
from langchain_aegis.testing import ScriptedOllama

SPARK = ["--tuning", "dgx-spark", "--offline"]


@pytest.fixture
def aegis(monkeypatch, capsys):
    """Run the command; returns exit code, stdout and stderr."""
    for name in ("OLLAMA_BASE_URL", "OLLAMA_HOST", "OLLAMA_MODEL_GENERATION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["aegis", "plan", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return run


@pytest.fixture
def server():
    """A server that describes a model as Ollama does: lists only where they are asked for."""
    lying = LyingServer()
    own = {
        "block_count": 4, "embedding_length": 4096, "context_length": 131072, "attention.head_count": 32,
        "attention.key_length": 128, "attention.value_length": 128, "feed_forward_length": 14336,
    }  # fmt: skip
    info = {"general.architecture": "nemotron_h", "general.parameter_count": 8_000_000_000}
    info |= {f"nemotron_h.{name}": value for name, value in own.items()}
    seen = []

    def answer(body):
        path = lying.heads[-1].split()[1].decode()
        seen.append((path, body))
        lists = {"nemotron_h.attention.head_count_kv": [8, 0, 8, 0], "nemotron_h.vocab_size": 131072}
        short = {"nemotron_h.attention.head_count_kv": None, "nemotron_h.vocab_size": 131072}
        said = {
            "/api/version": {"version": "0.32.15"},
            "/api/tags": {"models": [{"name": "mine:latest", "model": "mine:latest", "size": 5_000_000_000}]},
            "/api/show": {
                "model_info": info | (lists if (body or {}).get("verbose") else short),
                "details": {"family": "nemotron_h", "parameter_size": "8.0B", "quantization_level": "Q4_K_M"},
                "capabilities": ["completion"],
            },
        }[path]
        text = json.dumps(said).encode()
        return [b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n" % len(text) + text]  # fmt: skip

    lying.script = answer
    lying.seen = seen
    yield lying
    lying.close()


# -- Without a server ---------------------------------------------------------------------------------------------


def test_a_person_reads_what_a_model_takes_and_what_fits(aegis):
    code, out, _ = aegis("llama3.3:70b", *SPARK)
    assert code == 0
    for said in ("70.6B parameters, Q4_K_M", "Fits with 3 slots of 32,768 tokens", "With --kv-cache q8_0 4 of 32,768",
                 "estimate", "smallest that is good", "OLLAMA_FLASH_ATTENTION stays unset"):  # fmt: skip
        assert said in out, said


def test_json_says_the_same(aegis):
    code, out, _ = aegis("llama3.3:70b", *SPARK, "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["run"]["slots"] == 3
    assert not plan["fits_as_asked"]
    memory = plan["memory"]
    parts = memory["weights_gb"] + memory["kv_gb"] + memory["compute_gb_estimate"] + memory["prompt_cache_gb"]
    assert memory["total_gb"] == pytest.approx(parts, abs=0.01)
    assert memory["total_gb"] <= memory["budget_gb"] == 96
    assert plan["recommended_quantisation"] == "Q4_K_M"
    assert {line["name"]: line["value"] for line in plan["server"]}["OLLAMA_NUM_PARALLEL"] == "3"
    assert {line["name"]: line["value"] for line in plan["client"]}["max_concurrency"] == 3


@pytest.mark.parametrize(
    ("arguments", "recommended"),
    [
        (["llama3.1:8b", "--memory-gb", "24"], "Q4_K_M"),
        (["llama3.1:8b", "--memory-gb", "24", "--quality", "near-lossless"], "Q8_0"),
        (["llama3.1:8b", "--memory-gb", "8.5", "--slots", "1", "--context", "4096", "--quality", "high"], "Q5_K_M"),
        (["llama3.3:70b", "--memory-gb", "24"], None),
        (["gpt-oss:20b", "--memory-gb", "24", "--quality", "near-lossless"], "MXFP4"),
    ],
)
def test_a_quantisation_is_chosen_for_memory_and_quality(aegis, arguments, recommended):
    _, out, _ = aegis(*arguments, "--tuning", "workstation", "--offline", "--json")
    plan = json.loads(out)
    assert plan["recommended_quantisation"] == recommended
    for row in plan["quantisations"]:
        assert row["run"] is None or row["file_gb"] < plan["memory"]["budget_gb"]


def test_what_does_not_fit_is_code_1_as_a_table_and_an_error_as_a_file(aegis):
    laptop = ["--tuning", "laptop", "--memory-gb", "10", "--offline"]
    code, out, _ = aegis("llama3.1:8b", *laptop, "--quantization", "q8_0")
    assert code == 1
    assert "Does not fit" in out
    assert "--prompt-cache-mib 0" in out
    code, out, err = aegis("llama3.1:8b", *laptop, "--quantization", "q8_0", "--format", "env")
    assert (code, out) == (2, "")
    assert "--quantization Q5_K_S would" in err


@pytest.mark.parametrize("output", ["compose", "env", "systemd"])
def test_files_hold_what_fits(aegis, tmp_path, output):
    code, out, err = aegis("llama3.3:70b", *SPARK, "--format", output)
    assert (code, err) == (0, "")
    assert "llama3.3:70b (Q4_K_M)" in out
    if output == "compose":
        assert yaml.safe_load(out)["services"]["ollama"]["environment"]["OLLAMA_NUM_PARALLEL"] == "3"
        (tmp_path / "c.yml").write_text(out)
        assert not [f for f in check_compose(tmp_path / "c.yml", {}) if f.severity in ("warning", "error")]
    elif output == "env":
        (tmp_path / ".env").write_text(out)
        assert read_env_file(tmp_path / ".env")["OLLAMA_NUM_PARALLEL"].value == "3"
    else:
        assert 'Environment="OLLAMA_NUM_PARALLEL=3"' in out


def test_files_need_no_model(aegis):
    code, out, _ = aegis(*SPARK, "--format", "env", "--slots", "2")
    assert code == 0
    assert "OLLAMA_NUM_PARALLEL=2\n" in out
    code, out, _ = aegis(*SPARK, "--json")
    assert json.loads(out)["tuning"] == "dgx-spark"


def test_quantisations_can_be_compared_without_a_model(aegis):
    _, out, _ = aegis("--quantizations")
    assert "Q4_K_M" in out and "tools/perplexity/README.md" in out
    _, out, _ = aegis("--quantizations", "--json")
    assert json.loads(out)["quantisations"][0]["name"] == "Q2_K"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--offline"], "aegis plan NAME"),
        (["nobody", "--offline"], "--parameters 8b"),
        (["m", "--parameters", "big", "--offline"], "such as 8b"),
        (["qwen3:8b", "--offline", "--tuning", "gpu"], "dgx-spark, workstation"),
        (["qwen3:8b", "--offline", "--quantization", "Q9"], "Q2_K"),
        (["qwen3:8b", "--offline", "--quality", "best"], "near-lossless"),
        (["qwen3:8b", "--offline", "--kv-cache", "q8"], "q8_0"),
        (["qwen3:8b", "--offline", "--kv-cache", "q8_0", "--flash-attention", "off"], "--kv-cache f16"),
        (["qwen3:8b", "--offline", "--kv-cache", "Q8_0", "--flash-attention", "off"], "--kv-cache f16"),
        (["qwen3:8b", "--offline", "--flash-attention", "maybe"], "auto, on, off"),
        (["qwen3:8b", "--offline", "--format", "xml"], "systemd"),
        (["qwen3:8b", "--offline", "--memory-gb", "0"], "above 0"),
        (["qwen3:8b", "--offline", "--memory-gb", "8", "--reserve-gb", "9"], "nothing is left"),
    ],
)
def test_wrong_input_is_one_line_that_says_what_to_write(aegis, arguments, said):
    code, out, err = aegis(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


@pytest.mark.parametrize("arguments", [["--slots", "0"], ["--context", "10"], ["--slots", "many"]])
def test_numbers_out_of_range_are_refused(aegis, arguments):
    assert aegis("qwen3:8b", *arguments)[0] == 2


def test_a_quantised_cache_is_warned_of_where_it_is_known_to_hurt():
    wish = Wish(kv_type="q8_0")
    assert any("spoil" in note for note in make_plan(of_table("gpt-oss:20b"), host_of("dgx-spark"), wish).notes)
    assert not any("spoil" in note for note in make_plan(of_table("qwen3:8b"), host_of("dgx-spark"), wish).notes)


def test_no_speed_is_estimated_where_the_bandwidth_is_not_known(aegis):
    host = host_of("workstation")
    assert make_plan(of_table("qwen3:8b"), host, Wish()).speeds == ()
    plan = make_plan(of_table("qwen3:8b"), host_of("workstation", bandwidth_gb_s=1008), Wish())
    assert [answers for answers, _, _ in plan.speeds] == [1, 1, 4]
    _, out, _ = aegis("qwen3:8b", "--tuning", "workstation", "--offline")
    assert "Generation" not in out


def test_older_servers_keep_no_prompts_in_main_memory():
    old = make_plan(of_table("qwen3:8b"), host_of("dgx-spark"), Wish(version="0.24.0"))
    assert old.need.prompt_cache == 0
    assert "LLAMA_ARG_CACHE_RAM" not in {line.name for line in old.environment.lines}


# -- With a server ------------------------------------------------------------------------------------------------


def test_a_servers_own_metadata_are_used(aegis, server):
    code, out, _ = aegis("mine", "--tuning", "dgx-spark", "--ollama-url", server.url, "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["memory"]["weights_gb"] == 5
    assert plan["ollama_version"] == "0.32.15"
    assert plan["model"]["single_slot"]  # this family gets one slot whatever is set
    assert plan["run"]["slots"] == 1
    # keys and values of 2 layers with 8 heads: the others keep a state
    assert plan["memory"]["kv_slot_gb"] == pytest.approx(2 * 8 * 256 * 32768 * 2 / 1e9, abs=1e-3)
    assert [body for path, body in server.seen if path == "/api/show"] == [
        {"model": "mine"}, {"model": "mine", "verbose": True},
    ]  # fmt: skip


def test_another_quantisation_of_a_servers_model_is_an_estimate(server):
    found = find_model("mine", server.url, None, "Q8_0", 5)
    assert found.shape.weights_bytes == pytest.approx(8.5e9, rel=0.01)
    assert any("estimate" in note for note in found.notes)


def test_a_model_that_the_server_lacks_is_planned_from_the_table():
    with ScriptedOllama() as running:
        found = find_model("qwen3:8b", running.base_url, None, None, 5)
    assert found.shape.name == "qwen3:8b"
    assert any("ollama pull qwen3:8b" in note for note in found.notes)
    assert found.version


def test_a_server_that_does_not_describe_layers_is_no_hindrance():
    with ScriptedOllama("qwen3:8b") as running:
        found = find_model("qwen3:8b", running.base_url, None, None, 5)
    assert found.shape.name == "qwen3:8b"
    assert any("does not describe" in note for note in found.notes)


def test_a_server_that_does_not_answer_is_no_hindrance(aegis):
    code, out, _ = aegis("qwen3:8b", "--tuning", "dgx-spark", "--ollama-url", "http://user:secret@127.0.0.1:9")
    assert code == 0
    assert "was not asked" in out
    assert "secret" not in out


def test_a_server_elsewhere_needs_the_name_of_its_tuning(aegis):
    elsewhere = ["--ollama-url", "http://192.0.2.1.invalid:11434", "--format", "env"]
    assert "name its --tuning" in aegis(*elsewhere)[1]
    assert "name its --tuning" not in aegis("--tuning", "cpu", *elsewhere)[1]


def test_a_size_is_enough(server):
    found = find_model(None, None, "13b", None, 5)
    assert found.shape.parameters == 13_000_000_000
    assert find_model("mine", server.url, "13b", None, 5).shape.name == "mine"
    with pytest.raises(AegisConfigError, match="8b or 270m"):
        find_model(None, None, "", None, 5)


@pytest.mark.parametrize("memory", ["20", "128"])
@pytest.mark.parametrize("form", ["table", "env"])
def test_a_model_is_called_by_the_name_that_was_given(aegis, memory, form):
    """Not by that of the model of the same shape whose sizes are used."""
    _, out, err = aegis("llama3.1:70b", "--offline", "--tuning", "workstation", "--memory-gb", memory, "--format", form)
    assert "llama3.1:70b" in out + err
    assert "llama3.3" not in out + err
