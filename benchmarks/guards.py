"""What do the guards decide alone, what does each kind of trap rest on, and how long do they take?

Run: python benchmarks/guards.py [PAIRS.jsonl ...]

Without files: the pairs that come with the package. A file holds one object a line with "a", "b", "duplicate",
"category" and "lang". No embedder takes part, as if every question were as near as can be to every other. CPU times are
medians over the texts (pairs) of the shortest of some runs, warm.
"""

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from langchain_aegis import pairs as packaged
from langchain_aegis.verification import GUARDS, Profile, compare, profile

# Kind of trap, by how its category's name begins -> the guards that were written for it. What is not named here falls
# to the guards over words that only one question holds.
CATEGORY_GUARDS = {
    "number": "number quantity exclusive",
    "date": "number quantity exclusive",
    "unit": "quantity exclusive",
    "version": "number identifier",
    "identifier": "identifier number",
    "id_swap": "identifier number",
    "negation": "negation antonym",
    "antonym": "antonym negation",
    "quantifier": "exclusive number",
    "comparative": "antonym",
    "wh": "question_word",
    "question": "question_word",
    "attribute": "question_word",
    "entity": "entity exclusive",
    "principal": "exclusive entity",
    "product": "exclusive entity",
    "tier": "exclusive",
    "direction": "direction order",
    "scope": "restriction exclusive",
    "substitution": "substitution",
    "answer_shape": "shape number language",
    "action": "antonym exclusive",
}
WORDS = "substitution restriction topic"  # any word that the other question does not say in some way
RUNS = 9


def guards_of(category: str) -> frozenset[str]:
    """Return the guards that were written for a category of traps."""
    for name, guards in CATEGORY_GUARDS.items():
        if category.lower().startswith(name):
            return frozenset(guards.split())
    return frozenset({"antonym", "exclusive", "direction"})


def read(paths: list[str]) -> list[tuple[str, str, bool, str, str]]:
    """Return (cached question, new question, whether one answer serves both, category, language)."""
    if not paths:
        return [(pair.cached, pair.new, pair.duplicate, pair.category, pair.lang) for pair in packaged.load()]
    rows = [json.loads(line) for path in paths for line in Path(path).read_text("utf-8").splitlines() if line]
    return [(row["a"], row["b"], bool(row["duplicate"]), row["category"], row["lang"]) for row in rows]


def share(codes, off=frozenset()):
    """Return "served of all", where only guards in `off` object to what is served."""
    served = sum(set(found) <= off for found in codes)
    return f"{served:4d} of {len(codes):3d} ({served / max(1, len(codes)):4.0%})"


def cpu_us(function, arguments):
    """Return the median over the arguments of the least CPU time of some calls, in microseconds."""
    times = []
    for argument in arguments:
        least = min(timed(function, argument) for _ in range(RUNS))
        times.append(least / 1000)
    return median(times)


def timed(function, argument):
    started = time.process_time_ns()
    function(*argument)
    return time.process_time_ns() - started


def main() -> None:
    rows = read(sys.argv[1:])
    profiles = {text: profile(text) for row in rows for text in row[:2]}
    traps, hits = defaultdict(list), defaultdict(list)
    for cached, new, duplicate, category, lang in rows:
        codes = compare(profiles[cached], profiles[new])
        kind = category.partition("/")[0]
        (hits if duplicate else traps)[lang].append(codes)
        if not duplicate:
            traps[f"{kind} {lang}"].append(codes)
    print("guards alone           traps served        paraphrases found")
    for lang in sorted(hits):
        print(f"  {lang:20s} {share(traps[lang])}   {share(hits[lang])}")
    print("traps served           by all guards       without its own    without those over words, too")
    for kind in sorted(kind for kind in traps if " " in kind):
        own = guards_of(kind)
        print(f"  {kind[:46]:46s} {share(traps[kind])}  {share(traps[kind], own)}  ", end="")
        print(share(traps[kind], own | set(WORDS.split())), " ".join(code for code in GUARDS if code in own))
    encoded = [(one.encode(),) for one in profiles.values()]
    print(f"profile {cpu_us(profile, [(text,) for text in profiles]):5.1f} us a text")
    print(f"compare {cpu_us(compare, [(profiles[row[0]], profiles[row[1]]) for row in rows]):5.1f} us a pair")
    print(f"decode  {cpu_us(Profile.decode, encoded):5.1f} us, {median(len(data) for (data,) in encoded):.0f} bytes")


if __name__ == "__main__":
    main()
