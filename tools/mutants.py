"""Break one safety rule at a time in a copy of the tree, and require that the tests notice.

    python tools/mutants.py [--list] [NAME ...]

The list is tools/mutants.toml. Exit codes: 0 every mutant was noticed, 1 one was not, 2 the list or its tests are
wrong (a text that is not found exactly once, tests that fail without any mutant, or that do not run at all).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("langchain_aegis", "tests", "docs", "examples", "tools", "pyproject.toml", "docker-compose.dgx-spark.yml")
TIMEOUT_S = 240  # of one run of pytest; a mutant that makes the tests hang is noticed as well
FAILED = 1  # pytest's exit codes: 0 all passed, 1 some failed; 2 to 5 mean that nothing can be concluded


class ListError(Exception):
    """The list of mutants does not fit the code."""


@dataclass(frozen=True)
class Mutant:
    """One rule broken on purpose.

    Attributes:
        file: Path below the root of the tree.
        old: Text that stands exactly once in the file.
        new: What stands there instead.
        tests: Arguments of pytest; at least one of these tests must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def text(self, root: Path) -> str:
        """Return the file below `root` with the rule broken; raises ListError if its text is not there once."""
        path = root / self.file
        text = path.read_text() if path.is_file() else ""
        if (count := text.count(self.old)) != 1:
            raise ListError(f"{self.name}: its text stands {count} times in {self.file}, must be once")
        return text.replace(self.old, self.new)


def read(path: Path) -> list[Mutant]:
    """Return the mutants of a list."""
    with path.open("rb") as file:
        return [Mutant(**{**m, "tests": tuple(m["tests"])}) for m in tomllib.load(file)["mutant"]]


def pytest(root: Path, tests: tuple[str, ...]) -> int:
    """Run `tests` in the copy at `root`; return pytest's exit code, FAILED if they took too long."""
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--no-header", "--tb=no", *tests]
    with subprocess.Popen(
        command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return FAILED
    if process.returncode not in (0, FAILED):
        print(output[-2000:])
    return process.returncode


def copy_tree(source: Path, target: Path) -> Path:
    """Copy what the tests need from `source` to the new directory `target`."""
    target.mkdir()
    for name in COPIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (source / name).is_file():
            shutil.copy2(source / name, target / name)
    return target


def run(mutants: list[Mutant], source: Path) -> int:
    """Apply each mutant to a copy of `source` of its own and print what became of it; return the exit code."""
    unnoticed = []
    with tempfile.TemporaryDirectory(prefix="aegis-mutants-") as directory:
        clean = copy_tree(source, Path(directory) / "clean")
        for mutant in mutants:  # all texts first: a list that does not fit costs no test run
            text = mutant.text(source)
            (copy_tree(source, Path(directory) / mutant.name) / mutant.file).write_text(text)
        for tests in dict.fromkeys(m.tests for m in mutants):
            if code := pytest(clean, tests):
                raise ListError(f"without any mutant, pytest {' '.join(tests)} ends with exit code {code}")
        for mutant in mutants:
            began = time.monotonic()
            code = pytest(Path(directory) / mutant.name, mutant.tests)
            if code not in (0, FAILED):
                raise ListError(f"{mutant.name}: pytest ends with exit code {code}, so nothing is shown")
            if code == 0:
                unnoticed.append(mutant.name)
            print(
                f"{'noticed' if code else 'NOT NOTICED'}  {mutant.name}  {time.monotonic() - began:.1f} s", flush=True
            )
    print(f"mutants: {len(mutants) - len(unnoticed)} noticed, {len(unnoticed)} not")
    return 1 if unnoticed else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these mutants")
    parser.add_argument("--list", action="store_true", help="check that every text is found, and stop")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree to copy")
    arguments = parser.parse_args(argv)
    try:
        mutants = read(arguments.root / "tools/mutants.toml")
        if unknown := set(arguments.names) - {m.name for m in mutants}:
            raise ListError(f"no such mutant: {', '.join(sorted(unknown))}")
        mutants = [m for m in mutants if not arguments.names or m.name in arguments.names]
        if not mutants:
            raise ListError("the list is empty")
        if arguments.list:
            for mutant in mutants:
                mutant.text(arguments.root)
                print(mutant.name)
            return 0
        return run(mutants, arguments.root)
    except ListError as exc:
        print(f"mutants: {exc}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
