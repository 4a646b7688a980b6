"""What does importing this package cost, beside what an application imports anyway?

Interleaved fresh processes; CPU seconds (user + system) and their ratio. Run: python benchmarks/import_cost.py
"""

import os
import statistics
import subprocess
import sys

# Ours, and what it takes the place of.
PAIRS = [
    ("import langchain_aegis", "pass"),
    ("from langchain_aegis import ChatAegis", "from langchain_ollama import ChatOllama"),
    (
        "from langchain_aegis import ChatAegis, AegisSemanticCache",
        "from langchain_ollama import ChatOllama; import redis",
    ),
]
ROUNDS = 11


def cpu_s(code):
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def compare(ours, theirs):
    for code in (ours, theirs):  # compiled and in the file cache
        cpu_s(code)
    pairs = [(cpu_s(ours), cpu_s(theirs)) for _ in range(ROUNDS)]
    print(f"{statistics.median(a for a, _ in pairs):.2f} s  {ours}")
    print(f"{statistics.median(b for _, b in pairs):.2f} s  {theirs}")
    if theirs != "pass":
        ratios = sorted(a / b for a, b in pairs)
        print(f"ratio: median {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}")


if __name__ == "__main__":
    for pair in PAIRS:
        compare(*pair)
