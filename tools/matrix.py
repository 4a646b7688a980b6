"""Write the table of `docs/reliability.md`: every fault, what must come of it, and the tests that show it.

    python tools/matrix.py            # write it
    python tools/matrix.py --check    # exit code 1 if it is not what it would be written as

The faults stand in `tests/faults/matrix.toml`; a test names the rows that it shows with `@pytest.mark.row(3, 4)`.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "tests/faults/matrix.toml"
GUIDE = ROOT / "docs/reliability.md"
_PLACE = re.compile(r"(<!-- matrix -->\n)(.*?)(<!-- /matrix -->)", re.S)
_OPEN = "*still to come*"


@cache
def marked(root: Path) -> dict[int, list[str]]:
    """Return the ids of the tests that show each row; parameters are not told apart."""
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted((root / "tests").rglob("test_*.py")):
        name = path.relative_to(root).as_posix()
        text = path.read_text()
        for node in ast.walk(ast.parse(text, name)) if "mark.row(" in text else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for row in sorted({row for told in node.decorator_list for row in _rows_in(told)}):
                    found[row].append(f"{name}::{node.name}")
    return found


def _rows_in(decorator: ast.expr) -> list[int]:
    """Return the rows in a decorator: its own, and those of parameters that are marked."""
    return [
        value.value
        for node in ast.walk(decorator)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.row"
        for value in node.args
        if isinstance(value, ast.Constant) and isinstance(value.value, int)
    ]


def matrix(path: Path = ROWS) -> dict[str, dict]:
    """Return the groups of faults; "why" maps rows that no test shows here to the reason."""
    return tomllib.loads(path.read_text())


def render(root: Path = ROOT) -> str:
    """Return the table as Markdown."""
    tests, told = marked(root), matrix(root / ROWS.relative_to(ROOT))
    why = {int(number): reason for number, reason in told.pop("why", {}).items()}
    lines = []
    for name, group in told.items():
        lines += [
            f"**{name}: {group['title']}**",
            "",
            "| | Fault | What must come of it | Shown by |",
            "|---|---|---|---|",
        ]
        for number, fault, promise in group["rows"]:
            shown = [f"`{test.removeprefix('tests/')}`" for test in tests[number]] or [why.get(number, _OPEN)]
            lines.append(f"| {number} | {_cell(fault)} | {_cell(promise)} | {'<br>'.join(shown)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def renewed(text: str, root: Path = ROOT) -> str:
    """Return the guide with the table as it is now."""
    return _PLACE.sub(lambda place: f"{place[1]}\n{render(root)}\n{place[3]}", text)


def unknown(root: Path = ROOT) -> set[int]:
    """Return the rows that tests name and that do not exist."""
    told = matrix(root / ROWS.relative_to(ROOT))
    return set(marked(root)) - {row[0] for group in told.values() for row in group.get("rows", ())}


def main() -> int:
    if rows := unknown():
        print(f"no such row: {', '.join(map(str, sorted(rows)))}")
        return 1
    before = GUIDE.read_text()
    after = renewed(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            print(f"{GUIDE.relative_to(ROOT)}: not up to date; run python tools/matrix.py")
        return int(before != after)
    GUIDE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
