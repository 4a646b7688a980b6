"""Write the tables of the guides from the data that the code uses: `python tools/tables.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. With `--check` nothing is written, and the exit code
is 1 if one is not what it would be written as.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from langchain_aegis.ollama.findings import render_codes
from langchain_aegis.ollama.knowledge import knowledge
from langchain_aegis.ollama.machine import host_of
from langchain_aegis.ollama.plan import GB, Layout, kv_bytes
from langchain_aegis.ollama.plan_quantisation import (
    kv_bits,
    kv_perplexity_ratio,
    kv_types,
    quality_levels,
    quantisations,
)
from langchain_aegis.ollama.plan_report import Wish, make_plan
from langchain_aegis.ollama.plan_shape import Shape, known_models, of_table
from langchain_aegis.ollama.plan_speed import measurements, shares
from langchain_aegis.ollama.plan_table import quality_of
from langchain_aegis.tuning import tunings

ROOT = Path(__file__).resolve().parent.parent
GUIDES = ("docs/tuning.md", "docs/quantization.md", "docs/dgx-spark.md", "docs/doctor.md")
_PLACE = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n)(.*?)(<!-- end -->)", re.S)


def settings() -> str:
    return knowledge().render_markdown()


def tuned() -> str:
    names = list(tunings())
    rows = []
    groups = {line.name: group for t in tunings().values() for group in ("server", "request", "client")
              for line in getattr(t, group)}  # fmt: skip
    for name, group in groups.items():
        told = [{line.name: line.value for line in getattr(tunings()[t], group)}.get(name, "") for t in names]
        where = {"server": "server's environment", "request": "every request", "client": "calling process"}[group]
        rows.append([f"`{name}`", where, *(str(value) for value in told)])
    return _table(["Setting", "Where", *(f"`{name}`" for name in names)], rows)


def reasons() -> str:
    rows = {}
    for tuning in tunings().values():
        for line in (*tuning.server, *tuning.request, *tuning.client):
            rows.setdefault((line.name, line.reason, line.source), []).append(f"`{tuning.name}`")
    return _table(
        ["Setting", "In", "Why", "Source"],
        [[f"`{name}`", ", ".join(where), reason, source] for (name, reason, source), where in sorted(rows.items())],
    )


def quantised() -> str:
    rows = []
    for row in quantisations().values():
        worse = "-" if row.perplexity_ratio is None else f"+{row.perplexity_ratio - 1:.1%}"
        rows.append([
            f"**{row.name}**" if row.name == "Q4_K_M" else row.name, f"{row.bits:.2f}", f"{row.size_ratio:.0%}",
            f"{8.03 * row.bits / 8:.1f}", "-" if row.speed_ratio is None else f"{row.speed_ratio:.1f}x", worse,
            "-" if row.kl is None else f"{row.kl:.4f}", quality_of(row.name), "yes" if row.create else "",
        ])  # fmt: skip
    head = ["", "Bits per weight", "Size", "GB for 8.03B", "Generation", "Perplexity", "KL divergence", "Quality",
            "`ollama create -q`"]  # fmt: skip
    return _table(head, rows)


def why() -> str:
    """The default against F16 and its neighbours, in words."""
    rows = quantisations()
    default, below, above, f16 = (rows[name] for name in ("Q4_K_M", "Q3_K_M", "Q5_K_M", "F16"))
    text = (
        f"Against F16 it takes {default.size_ratio:.0%} of the memory and generates {default.speed_ratio:.1f} times as "
        f"fast, for {default.perplexity_ratio - 1:.1%} more perplexity. One step down ({below.name}) saves another "
        f"{1 - below.bits / default.bits:.0%} of the file and loses {below.kl / default.kl:.1f} times as much (KL "
        f"divergence); one step up ({above.name}) costs {above.bits / default.bits - 1:.0%} more memory and "
        f"{1 - above.tokens_s / default.tokens_s:.0%} of the speed, and loses {above.kl / default.kl:.0%} of it. "
        f"{f16.name} itself is {f16.bits / default.bits:.1f} times as large."
    )
    return textwrap.fill(text, 120) + "\n"


def levels() -> str:
    rows = [[f"`{name}`", f"at most {most:.1%} above that of F16"] for name, most in quality_levels().items()]
    return _table(["`--quality`", "Perplexity"], rows)


def kv_cache() -> str:
    shape = _known("llama3.1:8b")
    rows = []
    for kind in kv_types():
        slot = kv_bytes(shape, Layout(slots=1, context=32768, kv_type=kind)) / GB
        worse = f"+{kv_perplexity_ratio(kind) - 1:.1%}"
        rows.append([f"`{kind}`", f"{kv_bits(kind):g}", f"{slot:.2f}", worse])
    head = [
        "`OLLAMA_KV_CACHE_TYPE`",
        "Bits per value",
        "GB for 32,768 tokens of llama3.1:8b",
        "Perplexity of gemma3 4b",
    ]
    return _table(head, rows)


def measured() -> str:
    rows = [
        [row.shape.name, row.shape.quantisation, f"{row.shape.weights_bytes / GB:.1f}", str(row.answers),
         f"{row.tokens:,}", f"{row.tokens_s:.1f}", f"{row.ceiling:.1f}", f"{row.share:.0%}"]
        for row in measurements()
    ]  # fmt: skip
    head = ["Model", "", "File, GB", "Answers at once", "Tokens before each", "Tokens/s of all", "Ceiling", "Reached"]
    one, more = (tuple(f"{share:.0%}" for share in shares(several=several)) for several in (False, True))
    return (
        _table(head, rows)
        + f"\nReached by one answer: {one[0]} to {one[1]} of the ceiling; by several at once: {more[0]} to {more[1]}.\n"
    )


def fitting() -> str:
    rows = []
    for name in known_models():
        shape = _known(name)
        plan = make_plan(shape, host_of("dgx-spark"), Wish())
        run = "does not fit" if plan.layout is None else f"{plan.layout.slots} x {plan.layout.context:,}"
        first, last = plan.speeds[0][2], plan.speeds[-1][2]
        rows.append([
            name, shape.quantisation, f"{shape.weights_bytes / GB:.1f}", f"{plan.need.kv_slot / GB:.2f}", run,
            str(plan.slots), f"{first.low:.0f} to {first.high:.0f}", f"{last.low:.0f} to {last.high:.0f}",
        ])  # fmt: skip
    head = ["Model", "", "File, GB", "KV cache of a slot, GB", "Slots x window", "Slots at most",
            "Tokens/s, one answer", "of all slots, half full"]  # fmt: skip
    return _table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings, "tunings": tuned, "reasons": reasons, "quantisations": quantised, "why": why,
    "quality": levels, "kv-cache": kv_cache, "measured": measured, "fitting": fitting,
    "doctor": render_codes,
}  # fmt: skip


def renewed(text: str) -> str:
    """Return a guide with its tables as they are now."""
    return _PLACE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[4]}", text)


def main() -> int:
    check = sys.argv[1:] == ["--check"]
    stale = [name for name in GUIDES if renewed((ROOT / name).read_text()) != (ROOT / name).read_text()]
    for name in stale:
        print(f"{name}: {'not up to date; run python tools/tables.py' if check else 'written'}")
        if not check:
            (ROOT / name).write_text(renewed((ROOT / name).read_text()))
    return 1 if check and stale else 0


def _known(name: str) -> Shape:
    found = of_table(name)
    if found is None:
        raise KeyError(name)
    return found


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


if __name__ == "__main__":
    sys.exit(main())
