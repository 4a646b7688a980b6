"""The tool that breaks one rule at a time: shown on a toy project."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools/mutants.py"
TESTED = """
[[mutant]]
name = "never-served"
file = "langchain_aegis/rule.py"
old = "age < 10"
new = "age < 100"
tests = ["tests/test_rule.py"]
"""
UNTESTED = """
[[mutant]]
name = "colour"
file = "langchain_aegis/rule.py"
old = "'blue'"
new = "'red'"
tests = ["tests/test_rule.py"]
"""


@pytest.fixture
def toy(tmp_path):
    """A tree with one tested rule and one that no test looks at; returns (path, run)."""
    for name, text in {
        "langchain_aegis/rule.py": "def served(age):\n    return age < 10\n\n\nCOLOUR = 'blue'\n",
        "tests/test_rule.py": "from langchain_aegis.rule import served\ndef test_rule():\n    assert not served(10)\n",
        "pyproject.toml": "[tool.pytest.ini_options]\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "langchain_aegis/__init__.py").write_text("")
    (tmp_path / "tools").mkdir()

    def run(mutants, *arguments):
        (tmp_path / "tools/mutants.toml").write_text(mutants)
        return subprocess.run(
            [sys.executable, str(TOOL), "--root", str(tmp_path), *arguments],
            env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return tmp_path, run


def test_a_mutant_that_a_test_notices_is_fine_and_the_tree_is_untouched(toy):
    root, run = toy
    before = (root / "langchain_aegis/rule.py").read_text()
    done = run(TESTED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 noticed, 0 not" in done.stdout
    assert (root / "langchain_aegis/rule.py").read_text() == before


@pytest.mark.slow
def test_a_mutant_that_no_test_notices_fails_the_run(toy):
    _, run = toy
    done = run(TESTED + UNTESTED)
    assert done.returncode == 1
    assert "NOT NOTICED  colour" in done.stdout
    assert run(TESTED + UNTESTED, "never-served").returncode == 0


@pytest.mark.parametrize(("old", "count"), [("age < 11", 0), ("age", 2)])
def test_a_text_that_is_not_found_exactly_once_is_an_error(toy, old, count):
    _, run = toy
    done = run(TESTED.replace('age < 10"', f'{old}"'))
    assert (done.returncode, f"stands {count} times" in done.stderr) == (2, True), done.stderr


def test_tests_that_fail_without_a_mutant_are_an_error(toy):
    """Else every mutant would count as noticed."""
    root, run = toy
    (root / "tests/test_rule.py").write_text("def test_rule():\n    assert False\n")
    done = run(TESTED)
    assert done.returncode == 2
    assert "without any mutant" in done.stderr


def test_tests_that_do_not_run_at_all_are_an_error(toy):
    _, run = toy
    assert run(TESTED.replace("test_rule.py", "test_gone.py")).returncode == 2


def test_the_list_fits_the_code():
    """The texts of the real list stand in the code, each exactly once."""
    done = subprocess.run(
        [sys.executable, str(TOOL), "--list"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
