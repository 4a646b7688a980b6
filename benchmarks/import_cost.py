"""What does importing this package cost, beside what an application imports anyway?

Interleaved fresh processes; CPU seconds (user + system) and their ratio. Run: python benchmarks/import_cost.py
"""

import os
import statistics
import subprocess
import sys

OURS = "from langchain_aegis import ChatAegis, AegisSemanticCache"
THEIRS = "from langchain_ollama import ChatOllama; import redis"
ROUNDS = 11


def cpu_s(code):
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    for code in (OURS, THEIRS):  # compiled and in the file cache
        cpu_s(code)
    pairs = [(cpu_s(OURS), cpu_s(THEIRS)) for _ in range(ROUNDS)]
    ratios = sorted(a / b for a, b in pairs)
    print(f"{statistics.median(a for a, _ in pairs):.2f} s  {OURS}")
    print(f"{statistics.median(b for _, b in pairs):.2f} s  {THEIRS}")
    print(f"ratio: median {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}")
