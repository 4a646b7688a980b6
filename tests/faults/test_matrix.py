"""Every fault has a test, or a reason; and the guide says which."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import matrix  # noqa: E402

# Groups of which no row is left open.
DONE = ("G1", "G2", "G3", "G4", "G5", "G6", "G7")


def test_the_table_of_the_guide_is_that_of_the_tests(monkeypatch, capsys):
    """Else: python tools/matrix.py."""
    monkeypatch.setattr(sys, "argv", ["matrix.py", "--check"])
    assert matrix.main() == 0, capsys.readouterr().out


def test_a_test_that_is_new_or_gone_is_seen(tmp_path):
    (tmp_path / "tests/faults").mkdir(parents=True)
    (tmp_path / "tests/faults/matrix.toml").write_text(
        '[G1]\ntitle = "One"\nrows = [[1, "a|b", "c"], [2, "d", ""], [3, "e", ""]]\n[why]\n3 = "not here"\n'
    )
    (tmp_path / "tests/test_x.py").write_text(
        "import pytest\n@pytest.mark.row(1)\ndef test_x(): ...\n"
        "@pytest.mark.parametrize('a', [pytest.param(1, marks=pytest.mark.row(7))])\nasync def test_y(a): ...\n"
    )
    text = matrix.renewed("before\n<!-- matrix -->\nold\n<!-- /matrix -->\nafter", tmp_path)
    assert "| 1 | a\\|b | c | `test_x.py::test_x` |" in text
    assert "| 2 | d |  | *still to come* |" in text
    assert "| 3 | e |  | not here |" in text
    assert text.startswith("before") and text.endswith("after") and "old" not in text
    assert matrix.renewed(text, tmp_path) == text
    assert matrix.unknown(tmp_path) == {7}


def test_no_fault_of_the_groups_that_are_done_is_left_open():
    told, tests = matrix.matrix(), matrix.marked(ROOT)
    why = {int(number) for number in told["why"]}
    rows = [row[0] for name in DONE for row in told[name]["rows"]]
    assert not [row for row in rows if row not in tests and row not in why]


def test_there_are_128_rows_each_once():
    told = matrix.matrix()
    numbers = [row[0] for group in told.values() for row in group.get("rows", ())]
    assert numbers == list(range(1, 129))
