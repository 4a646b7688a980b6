"""What `make check` runs: linters, types, and the quick tests of structure and deployment files.

Every step runs, also after a failure; the exit code is 1 if any failed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Names of files that the tree may not have yet or any more are an error of the step, not of this list.
STEPS = {
    "lint": ["-m", "ruff", "check", "."],
    "format": ["-m", "ruff", "format", "--check", "."],
    "types": ["-m", "mypy"],
    "types of examples that are not run": ["-m", "mypy", "examples/ray_serve_llm.py"],
    "types of the example service": ["-m", "mypy", "--explicit-package-bases", "examples/service"],
    "structure": ["-m", "pytest", "tests/test_architecture.py", "tests/test_compose.py"],
}


def main() -> int:
    failed = []
    for name, command in STEPS.items():
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode:
            failed.append(name)
            print(done.stdout + done.stderr)
        print(f"{'FAIL' if done.returncode else 'pass'}  {name}  {time.monotonic() - began:.1f} s", flush=True)
    print(f"check: {len(STEPS) - len(failed)} passed, {len(failed)} failed" + "".join(f", {name}" for name in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
