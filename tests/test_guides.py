"""The guides: their tables are those of the code, their commands run, their links lead somewhere."""

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from langchain_aegis.cli import app

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import tables  # noqa: E402

TEXTS = {name: (ROOT / name).read_text() for name in tables.GUIDES}
BLOCKS = [block for text in TEXTS.values() for block in re.findall(r"```bash\n(.*?)```", text, re.S)]
COMMANDS = sorted({line.partition("#")[0].strip() for line in "".join(BLOCKS).splitlines() if "aegis plan" in line})


@pytest.mark.parametrize("name", TEXTS)
def test_tables_are_fresh(name):
    """Else: python tools/tables.py."""
    assert tables.renewed(TEXTS[name]) == TEXTS[name]


def test_a_stale_table_is_seen(tmp_path, monkeypatch, capsys):
    stale = TEXTS["docs/quantization.md"].replace("| **Q4_K_M** | 4.89", "| **Q4_K_M** | 4.00")
    assert stale != TEXTS["docs/quantization.md"]
    (tmp_path / "docs").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(stale if name == "docs/quantization.md" else text)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 1
    assert capsys.readouterr().out.startswith("docs/quantization.md: not up to date")
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    assert tables.main() == 0
    assert (tmp_path / "docs/quantization.md").read_text() == TEXTS["docs/quantization.md"]


def test_every_table_is_used():
    used = {found for text in TEXTS.values() for found in re.findall(r"<!-- table: (\S+) -->", text)}
    assert used == set(tables.TABLES)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command):
    done = CliRunner().invoke(app, [*command.split()[1:], "--offline"])  # that it starts as a process: test_cli.py
    assert done.exit_code in (0, 1), done.output  # 1: it does not fit the machine that this runs on
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert done.stdout


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for target, anchor in re.findall(
        r"\]\(([^)#\s]*)(?:#([^)]*))?\)", re.sub(r"```.*?```", "", TEXTS[name], flags=re.S)
    ):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), target
        if anchor:
            heads = re.findall(r"(?m)^#+ (.*)$", path.read_text())
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, anchor
