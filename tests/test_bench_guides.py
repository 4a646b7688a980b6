"""The guides to measuring, watching and vLLM: what they name exists, and figures have their source."""

import ast
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import langchain_aegis
from langchain_aegis.bench.words import NAMES, WORKLOADS
from langchain_aegis.cli import app

ROOT = Path(__file__).resolve().parent.parent
GUIDES = {name: (ROOT / f"docs/{name}.md").read_text() for name in ("bench", "monitoring", "vllm")}


def _anchor(heading):
    """Return what a heading is linked by: GitHub leaves out what is no letter, digit or hyphen."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", GUIDES)
def test_every_link_leads_somewhere(name):
    for target, _, part in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]+))?\)", GUIDES[name]):
        path = ROOT / "docs" / target if target else ROOT / f"docs/{name}.md"
        assert path.exists(), target
        heads = {_anchor(h) for h in re.findall(r"^#+ (.+)$", path.read_text(), re.M)}
        assert not part or part in heads, part
    for path in re.findall(r"`((?:docker|tools|benchmarks|langchain_aegis)/[\w./-]+)`", GUIDES[name]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", GUIDES)
def test_code_can_be_read_and_imports_what_there_is(name):
    for block in re.findall(r"```python\n(.*?)```", GUIDES[name], re.S):
        tree = compile(block, name, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "langchain_aegis":
                assert {alias.name for alias in node.names} <= set(langchain_aegis.__all__)


def test_every_option_of_bench_that_is_named_exists():
    shown = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"}).output
    named = {
        option
        for line in re.findall(r"aegis bench[^`]*", GUIDES["bench"])
        for option in re.findall(r"--\w[\w-]*", line)
    }
    named |= set(re.findall(r"`(--\w[\w-]*)`", GUIDES["bench"]))
    assert {"--json", "--png", "--prompts", "--seed", "--quick"} <= named
    assert {option for option in named if option not in shown} == set()


def test_every_figure_is_explained():
    table = GUIDES["bench"].partition("## What each figure means")[2].partition("## ")[0]
    for workload in WORKLOADS:
        assert f"| {workload} |" in table, workload
    for name in {words.partition(",")[0] for words in NAMES.values()}:
        assert name in table, name


def test_the_application_s_figures_are_said_to_be_its_own():
    (paragraph,) = (p for p in GUIDES["vllm"].split("\n\n") if "793" in p)
    assert "Its own documents" in paragraph
    assert "https://github.com/klapom/AEGIS_Rag" in paragraph
    assert "793" not in GUIDES["vllm"].replace(paragraph, "")
