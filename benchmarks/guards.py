"""What do the guards decide alone, what does each kind of trap rest on, and how long do they take?

Run: python benchmarks/guards.py [PAIRS.jsonl ...]

Without files: the pairs that come with the package. A file holds one object a line with "a", "b", "duplicate",
"source", "category" and "lang". No embedder takes part, as if every question were as near as can be to every other.

CPU times are medians over the texts (pairs) of the shortest of some runs, warm, with what reading the clock costs.
A lookup makes one profile, and decodes and compares one for each candidate; *compare* finds all guards that object, as
`cache.judge` shows them, not only the first. Ends with 1 if a time exceeds its bar.
"""

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from categories import guards_of, kind_of

from langchain_aegis import pairs as packaged
from langchain_aegis.verification import GUARDS, Profile, compare, profile

WORDS = "substitution restriction topic"  # any word that the other question does not say in some way
RUNS = 9
BARS_US = {"profile": 60, "compare": 8}


def read(paths: list[str]) -> list[tuple[str, str, bool, str, str]]:
    """Return (cached question, new question, whether one answer serves both, kind, language)."""
    if not paths:
        found = packaged.load()
        return [(one.cached, one.new, one.duplicate, kind_of(one.category, one.source), one.lang) for one in found]
    rows = [json.loads(line) for path in paths for line in Path(path).read_text("utf-8").splitlines() if line]
    return [(r["a"], r["b"], bool(r["duplicate"]), kind_of(r["category"], r["source"]), r["lang"]) for r in rows]


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


def decisions(rows, profiles):
    """Print what the guards let pass, by language and by kind of trap."""
    traps, hits = defaultdict(list), defaultdict(list)
    for cached, new, duplicate, kind, lang in rows:
        codes = compare(profiles[cached], profiles[new])
        (hits if duplicate else traps)[lang].append(codes)
        if not duplicate:
            traps[kind, lang].append(codes)
    print("guards alone           traps served        paraphrases found")
    for lang in sorted(hits):
        print(f"  {lang:20s} {share(traps[lang])}   {share(hits[lang])}")
    print("traps served           by all guards       without its own    without those over words, too")
    for kind, lang in sorted(name for name in traps if isinstance(name, tuple)):
        own, some = guards_of(kind), traps[kind, lang]
        print(f"  {f'{kind} {lang}':46s} {share(some)}  {share(some, own)}  ", end="")
        print(share(some, own | set(WORDS.split())), " ".join(code for code in GUARDS if code in own))


def speed(rows, profiles):
    """Print how long the guards take; return whether they keep to the bars."""
    encoded = [(one.encode(),) for one in profiles.values()]
    took_us = {
        "profile": (cpu_us(profile, [(text,) for text in profiles]), "a text"),
        "compare": (cpu_us(compare, [(profiles[row[0]], profiles[row[1]]) for row in rows]), "a pair, all guards"),
        "decode": (cpu_us(Profile.decode, encoded), f"of {median(len(data) for (data,) in encoded):.0f} bytes"),
    }
    kept = True
    print("CPU time, median")
    for name, (us, what) in took_us.items():
        bar = BARS_US.get(name)
        missed = bar is not None and us > bar
        kept = kept and not missed
        print(f"  {name:8s} {us:5.1f} us {what}", end="" if bar else "\n")
        if bar:
            print(f"; bar {bar} us: {'MISSED' if missed else 'kept'}")
    return kept


def main() -> None:
    rows = read(sys.argv[1:])
    profiles = {text: profile(text) for row in rows for text in row[:2]}
    decisions(rows, profiles)
    sys.exit(0 if speed(rows, profiles) else 1)


if __name__ == "__main__":
    main()
