"""`aegis bench` measures in interleaved rounds, shows every figure with its range, and claims no more than that."""

import copy
import dataclasses
import itertools
import json
import math
import random
import re
import sys
from collections import Counter
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from langchain_aegis import AegisConfigError, AegisSemanticCache
from langchain_aegis.bench.charts import HEIGHT, WIDTH, charts
from langchain_aegis.bench.claims import check
from langchain_aegis.bench.compare import WITHIN, compare, read_report
from langchain_aegis.bench.drawing import Pixels, Svg
from langchain_aegis.bench.figures import Figure, Figures, apart, number, percentile
from langchain_aegis.bench.page import page, write_pictures
from langchain_aegis.bench.rag import Counts, Tally
from langchain_aegis.bench.run import FORMAT, QUICK, Plan, Servers, run_bench
from langchain_aegis.bench.words import tables, verdict
from langchain_aegis.bench.workloads import draw_mix, read_prompts
from langchain_aegis.cli import app
from langchain_aegis.pairs import load
from langchain_aegis.testing import ScriptedOllama


def figure(*values, **told):
    named = {"workload": "callers", "name": "latency_p50", "way": "ChatAegis", "unit": "s", "better": "lower", **told}
    return Figure(values=values, **named)


# -- Figures --


def test_a_figure_is_a_median_with_its_range():
    assert str(figure(3.0, 1.0, 2.0)) == "2.00 (1.00 to 3.00) s"


@pytest.mark.parametrize(
    ("values", "differs"),
    [
        ((0.5, 0.6, 0.7), True),
        ((2.0, 3.0, 2.5), True),
        ((0.9, 1.1, 0.8), False),
        ((0.5, 0.5), False),
        ((1.1, 2.0, 1.5), False),
        ((0.4, 0.6, 0.8), False),
        ((0.0, 0.0, 0.0), False),
    ],
)
def test_a_multiple_is_one_only_if_its_rounds_are_further_from_one_than_from_each_other(values, differs):
    ratio = figure(*values, over="ChatOllama", unit="x")
    assert ratio.differs == differs
    assert (verdict(ratio) == WITHIN) != differs


@pytest.mark.parametrize(("rounds", "ratios", "pairs"), [(3, 0.06, 0.01), (4, 0.015, 0.002), (5, 0.004, 0.001)])
@pytest.mark.parametrize("tail", ["light", "heavy", "one-sided"])
def test_chance_alone_is_seldom_called_a_difference(rounds, ratios, pairs, tail):
    """The shares that docs/bench.md tells, of rounds that differ by chance only."""
    draw = random.Random(7)
    noise = {
        "light": lambda: draw.gauss(0, 0.3),
        "heavy": lambda: draw.gauss(0, 0.1) / max(draw.random(), 0.01),
        "one-sided": lambda: draw.expovariate(3) - math.log(2) / 3,  # its median is 0
    }[tail]

    def drawn():
        values = [math.exp(noise()) for _ in range(rounds)]
        return min(values), max(values)

    times = 10_000
    assert sum(apart(1.0, 1.0, *drawn()) for _ in range(times)) <= ratios * times
    assert sum(apart(*drawn(), *drawn()) for _ in range(times)) <= pairs * times


def test_a_ratio_is_of_the_same_round():
    figures = Figures("callers")
    for ours, theirs in ((1.0, 4.0), (2.0, 4.0), (9.0, 9.0)):
        figures.add("latency_p50", "b", ours, "s")
        figures.add("latency_p50", "a", theirs, "s")
        figures.ratio("latency_p50", "b", "a")
        figures.ratio("latency_p50", "b", "a", inverse=True, as_="times_faster")
    found = {f.name: f for f in figures.done() if f.over}
    assert found["latency_p50"].values == (0.25, 0.5, 1.0)
    assert (found["times_faster"].values, found["times_faster"].better) == ((4.0, 2.0, 1.0), "higher")


def test_percentiles_of_few_values_are_the_largest():
    assert percentile([3, 1, 2], 0.95) == 3
    assert percentile(range(100), 0.5) == 50


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (12.34, "12.3"), (0.01234, "0.0123"), (0.00012, "0.00012")]
)
def test_numbers_have_three_digits_and_no_exponent(value, text):
    assert number(value) == text


@pytest.mark.parametrize("broken", [{}, {"values": []}, {"values": ["x"]}])
def test_what_is_no_figure_is_refused(broken):
    with pytest.raises(AegisConfigError):
        Figure.of({**figure(1.0).as_dict(), **broken} if broken else broken)


# -- The mix --


@pytest.mark.parametrize("seed", range(5))
def test_the_mix_is_the_note_s_and_nothing_is_chosen(seed):
    stream = draw_mix(load(), 200, seed)
    assert Counter(r.kind for r in stream.traffic) == {"repeat": 100, "paraphrase": 60, "new": 40}
    assert len(stream.traps) == 60
    assert stream == draw_mix(load(), 200, seed)
    assert stream != draw_mix(load(), 200, seed + 1)
    known = {r.question for r in stream.known}
    topics = {r.topic for r in stream.known}
    for request in stream.traffic:
        assert (request.question in known) == (request.kind == "repeat")
        assert (request.topic in topics) == (request.kind != "new")
    pairs = {(p.new, p.cached): p.duplicate for p in load()}
    for trap in stream.traps:
        assert any(pairs.get((trap.question, question)) is False for question in known), "beside a known question"
    drawn = {r.question for r in stream.traffic if r.kind == "paraphrase"}
    of_all = sum(p.lang == "de" for p in load() if p.duplicate)
    assert any(p.lang == "de" for p in load() if p.new in drawn) == bool(of_all), "no language is left out"


@pytest.mark.parametrize("size", [0, 15, 2_000])
def test_a_mix_that_cannot_be_drawn_is_refused(size):
    with pytest.raises(AegisConfigError):
        draw_mix(load(), size, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "no question"), ("{", "line 1"), ('{"question": "a?"}\n{"q": 1}', "line 2"), ('["a"]', "line 1")],
)
def test_prompts_that_cannot_be_read_are_named(tmp_path, text, says):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(AegisConfigError, match=says):
        read_prompts(path)
    with pytest.raises(AegisConfigError, match="cannot be read"):
        read_prompts(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("wrong", [{"rounds": 2}, {"callers": ()}, {"callers": (0,)}, {"tokens": 1}, {"parts": ("x",)}])
def test_a_plan_that_gives_no_range_is_refused(wrong):
    with pytest.raises(AegisConfigError):
        Plan(**wrong)


# -- Claims --


def counts(**hits):
    kinds = {"repeat": 100, "paraphrase": 60, "new": 40, "trap": 60}
    made = Counts()
    for kind, asked in kinds.items():
        semantic = hits.get(kind, 0)
        made.kinds[kind] = Tally(asked=asked, semantic=semantic, wrong=semantic if kind in ("new", "trap") else 0)
    return made


def test_the_note_s_hit_rate_stands_beside_the_measured_one_with_the_reason():
    claim, *_ = check([], counts(repeat=100, paraphrase=30))
    assert "85 to 90 %" in claim.said
    assert claim.measured.startswith("130 of 200 = 65 %")
    assert claim.holds is False
    assert "80 % at most" in claim.reason


@pytest.mark.parametrize(("hits", "holds"), [(10, False), (20, None), (21, True), (40, True)])
def test_a_share_near_its_bound_is_undecided(hits, holds):
    (claim,) = (c for c in check([], counts(paraphrase=hits)) if c.said.startswith("35 %"))
    assert claim.holds is holds


def test_a_wrong_answer_is_never_fine():
    found = {c.said: c.holds for c in check([], counts(repeat=99, new=1, trap=1))}
    assert [found[said] for said in found if said.startswith(("every", "no "))] == [False, False, False]


@pytest.mark.parametrize(("values", "holds"), [((11, 12, 30), True), ((9, 12, 30), None), ((2, 3, 4), False)])
def test_a_range_on_both_sides_of_a_bound_decides_nothing(values, holds):
    faster = figure(*values, name="times_faster", way="cached", over="ChatAegis", unit="x", better="higher")
    (claim,) = check([faster], None)
    assert claim.holds is holds


# -- A whole run, on a scripted server with the speed of a slow model --


@pytest.fixture(scope="module")
def report(redis_url, minilm):
    plan = dataclasses.replace(QUICK, callers=(1, 2))
    with ScriptedOllama(["m"], tokens_per_s=80) as server:
        return run_bench(plan, Servers(model="m", ollama_url=server.base_url, redis_url=redis_url))


def values(report, **wanted):
    found = [f for f in map(Figure.of, report["figures"]) if all(getattr(f, k) == v for k, v in wanted.items())]
    assert found, wanted
    return found


@pytest.mark.slow
def test_every_part_has_its_figures_with_as_many_rounds(report):
    assert report["format"] == FORMAT
    for way in ("ChatOllama", "ChatAegis", "batched", "cached"):
        for callers in (1, 2):
            for name in ("first_token_p50", "latency_p50", "latency_p95", "throughput"):
                (found,) = values(report, workload="callers", way=way, callers=callers, name=name, over="")
                assert len(found.values) == QUICK.rounds
                assert found.low > 0
    values(report, workload="client", name="cpu_astream", way="ChatOllama")
    values(report, workload="burst", name="throughput", over="ChatAegis")
    values(report, workload="rag", name="time_per_question", way="with cache")
    assert report["noise"]["spin_ms"]["times"] > QUICK.rounds
    assert report["settings"]["model"] == "m"
    assert report["settings"]["seed"] == QUICK.seed


@pytest.mark.slow
def test_the_bar_is_kept(report):
    (cost,) = values(report, name="cpu_invoke", over="ChatOllama")
    assert cost.median <= 1 / 8
    (faster,) = values(report, name="times_faster", way="cached", callers=1)
    assert faster.median >= 5  # of an answer of 4 tokens
    told = report["summary"]
    assert told["client_cpu_ratio"] == pytest.approx(cost.median, abs=1e-4)
    assert (told["repeat_hit_share"], told["new_hit_share"], told["wrong_answers"]) == (1, 0, 0)
    kinds = report["answered"]["kinds"]
    assert kinds["repeat"]["exact"] == kinds["repeat"]["asked"] == 20
    assert kinds["new"]["exact"] + kinds["new"]["semantic"] == 0
    assert kinds["trap"]["wrong"] == 0
    assert kinds["paraphrase"]["semantic"] > 0


@pytest.mark.slow
def test_a_run_leaves_no_answer_behind(report, redis_url):
    with AegisSemanticCache(redis_url, namespace="aegis-bench", op_budget_s=5) as cache:
        assert cache.health().entries == 0


@pytest.mark.slow
def test_the_same_report_is_the_same(report):
    found = compare(report, report)
    assert found.warnings == []
    assert {change.verdict for change in found.changes} <= {WITHIN, "the same"}
    assert len(found.changes) > len(report["figures"])


@pytest.mark.slow
def test_own_questions_are_asked_in_their_order(redis_url, minilm, tmp_path):
    path = tmp_path / "own.jsonl"
    asked = ["How long may I keep a book?", "How long may I keep a film?", "How long may I keep a book?"]
    path.write_text("".join(json.dumps({"question": q, "source": q}) + "\n" for q in asked))
    plan = dataclasses.replace(QUICK, parts=("rag",))
    with ScriptedOllama(["m"]) as server:
        made = run_bench(plan, Servers(model="m", ollama_url=server.base_url, redis_url=redis_url), prompts=path)
    own = made["answered"]["kinds"]["own"]
    assert (own["asked"], own["exact"], own["wrong"]) == (3, 1, 0)
    assert made["claims"] == [] or not any("research note" in c["by"] and "85" in c["said"] for c in made["claims"])
    assert made["settings"]["workload"] == "own prompts"
    assert {c.name for c in charts(made)} == {"rag-answered"}


# -- Pictures and pages --


class Recorder(Pixels):
    """Remembers what texts stand where."""

    def __init__(self):
        super().__init__(WIDTH, HEIGHT)
        self.written, self.lines = [], []

    def line(self, points, colour, width=1.5):
        self.lines.append(points)

    def text(self, x, y, text, *, size=13, anchor="start", colour="", bold=False):
        self.written.append((x, y, text, size, anchor))

    def boxes(self, wider=1.0):
        """Yield (text, left, top, right, bottom), as in a font that is so much wider."""
        for x, y, text, size, anchor in self.written:
            width = wider * self._font(size * 4).getlength(text) / 4
            left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
            yield text, left, y - 0.75 * size, left + width, y + 0.2 * size


def made(**changes):
    """A report of a run that nobody waited for."""
    ways = {"ChatOllama": 2.0, "ChatAegis": 1.9, "batched": 1.8, "cached": 0.004}
    figures = [
        figure(*(base * callers * noise for noise in (0.9, 1.0, 1.3)), name=name, way=way, callers=callers)
        for way, base in ways.items()
        for callers in (1, 2, 4, 8, 16)
        for name in ("latency_p50", "first_token_p50", "throughput")
    ]
    figures += [
        figure(at * 0.9, at, at * 2, workload="client", name=f"cpu_{how}", way=way, unit="ms")
        for how in ("invoke", "ainvoke", "stream", "astream")
        for way, at in (("ChatOllama", 148.0), ("ChatAegis", 14.0))
    ]
    row = {"exact": 0, "semantic": 0, "wrong": 0, "unlabelled": 0}
    kinds = {
        "repeat": {**row, "asked": 100, "exact": 100},
        "paraphrase": {**row, "asked": 60, "semantic": 31, "wrong": 5},
        "new": {**row, "asked": 40},
        "trap": {**row, "asked": 60},
    }
    report = {
        "format": FORMAT, "made_at": "2026-11-30T10:00:00+00:00", "package": "0.1.0", "took_s": 1.0,
        "machine": {"processor": "An(R) Exceedingly Long(TM) Name of a Processor @ 2.30GHz", "cores": 128,
                    "load_before": 10.01, "load_after": 12.34, "python": "3.13.10"},
        "versions": {"httpx": "0.28.1"},
        "settings": {"ollama": "http://192.168.100.100:11434", "ollama_version": "0.33.0", "model": "llama3.2:8b<b>",
                     "tokens": 64, "seed": 7, "mix": 200, "workload": "mix", "questions": 200},
        "noise": {"spin_ms": {"median": 20.0, "low": 19.0, "high": 21.0, "times": 9}, "spread": 0.1},
        "figures": [f.as_dict() for f in figures],
        "answered": {"kinds": kinds, "wrong": [["a <i>?", "b?"]], "unlabelled": [], "slow": 0},
        "claims": [],
    }  # fmt: skip
    return {**report, **changes}


def test_no_text_of_a_chart_lies_on_another_or_outside():
    pytest.importorskip("PIL")
    shown = list(charts(made()))
    assert [c.name for c in shown] == [
        "client-cost", "callers-latency-p50", "callers-first-token-p50", "callers-throughput", "rag-answered",
    ]  # fmt: skip
    for chart in shown:
        canvas = Recorder()
        chart.draw(canvas)
        assert len(canvas.written) > 10
        for text, left, top, right, bottom in canvas.boxes(wider=1.15):  # a browser has fonts of its own
            assert text.isascii(), "the font of the files has no other letters"
            inside = left >= 0 and top >= 0 and right <= WIDTH and bottom <= HEIGHT
            assert inside, (chart.name, text)
        for (one, *a), (other, *b) in itertools.combinations(canvas.boxes(), 2):
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, (chart.name, one, other)


@pytest.mark.parametrize("paraphrases", [0, 20, 31, 36, 50, 60])
def test_no_share_is_written_under_the_marks_of_what_was_expected(paraphrases):
    pytest.importorskip("PIL")
    (chart,) = (c for c in charts(answered(paraphrases)) if c.name == "rag-answered")
    canvas = Recorder()
    chart.draw(canvas)
    marks = [points for points in canvas.lines if len(points) == 2 and points[0][0] == points[1][0]][-2:]
    shares = [box for box in canvas.boxes(wider=1.15) if box[0].endswith(" %") and "expected" not in box[0]]
    assert len(shares) > 5
    for text, left, top, right, bottom in shares:
        for (x, high), (_, low) in marks:
            assert not (left < x < right and top < low and high < bottom), (text, x)


@pytest.mark.slow
def test_pictures_are_files_of_that_size_with_colours(tmp_path):
    image = pytest.importorskip("PIL.Image")
    paths = write_pictures(made(), tmp_path / "new")
    assert len(paths) == 5
    for path in paths:
        with image.open(path) as picture:
            assert picture.size == (2 * WIDTH, 2 * HEIGHT)
            assert len(picture.getcolors(1 << 20)) > 10


def test_without_pillow_it_is_said_before_anything_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setattr("langchain_aegis.bench.run.run_bench", None)
    done = CliRunner().invoke(app, ["bench", "--png", "x"])
    assert isinstance(done.exception, AegisConfigError)
    assert "langchain-aegis[bench]" in str(done.exception)


class Page(HTMLParser):
    """Reads a page as a browser would: what is open, and what it would fetch or run."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.fetched = [], Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        if tag not in ("meta", "rect", "polyline", "polygon", "circle"):
            self.open.append(tag)
        self.fetched += [v for k, v in attributes if k in ("src", "href", "xlink:href", "style", "onload")]

    def handle_endtag(self, tag):
        if tag not in ("rect", "polyline", "polygon", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_whole_and_needs_nothing_else():
    text = page(made())
    read = Page(text)
    assert read.open == []
    assert read.tags["svg"] == 5
    assert not {"script", "link", "iframe", "img", "b", "i"} & set(read.tags), "names are text, not markup"
    assert read.fetched == []
    assert not re.search(r"@import|url\(", text)
    assert set(re.findall(r"https?://[^\s\"<;,]+", text)) == {
        "http://www.w3.org/2000/svg", "http://192.168.100.100:11434",  # a name and the server that was measured
    }  # fmt: skip
    shown = " ".join(read.texts)
    for line in ("Machine:", "Versions:", "Settings:", "Noise:", "What the cache answers", "a <i>?"):
        assert line in shown


def test_every_figure_of_a_table_has_its_range():
    for title, heads, rows in tables(made()):
        assert all(len(row) == len(heads) for row in rows), title
        if title.startswith("Callers"):
            assert all(re.fullmatch(r"[\d.,]+ \([\d.,]+ to [\d.,]+\)", cell) for row in rows for cell in row[2:])


def test_svg_escapes_what_it_shows():
    canvas = Svg(10, 10, "<x>")
    canvas.text(1, 1, "<script>")
    assert "<script>" not in canvas.done()


# -- Comparisons --


def changed(by, of="latency_p50", **told):
    other = copy.deepcopy(made())
    for each in other["figures"]:
        if each["name"] == of:
            each["values"] = [v * by for v in each["values"]]
    return {**other, **told}


def verdicts(first, second, name="whole answer, median"):
    found = {c.verdict for c in compare(first, second).changes if name in c.what}
    assert found
    return found


@pytest.mark.parametrize(
    ("by", "verdict"),
    [(1.0, WITHIN), (1.4, WITHIN), (2.0, WITHIN), (3.0, "worse"), (0.5, WITHIN), (0.3, "better")],
)
def test_ranges_that_are_near_each_other_are_no_difference(by, verdict):
    assert verdicts(made(), changed(by)) == {verdict}


def test_the_machine_s_noise_swallows_what_is_smaller():
    noisy = {"noise": {**made()["noise"], "spread": 2.5}}
    assert verdicts(made(), changed(3.0)) == {"worse"}
    assert verdicts(made(), changed(3.0, **noisy)) == {WITHIN}


def test_a_multiple_does_not_depend_on_the_machine_s_noise():
    ratio = {"name": "latency_p50", "way": "ChatAegis", "over": "ChatOllama", "unit": "x"}
    noise = {"noise": {**made()["noise"], "spread": 3.0}}
    first = made(figures=[figure(0.5, 0.5, 0.55, **ratio).as_dict()], **noise)
    second = made(figures=[figure(0.9, 1.0, 0.9, **ratio).as_dict()], **noise)
    (change, *_) = compare(first, second).changes
    assert change.verdict == "worse"
    assert change.ratio.startswith("1.80 (1.64 to 2.00)")


def test_two_rounds_are_too_few():
    few = made(figures=[figure(1.0, 1.0).as_dict()])
    many = made(figures=[figure(5.0, 5.0, 5.0).as_dict()])
    assert verdicts(few, many) == {"too few rounds (2)"}


def test_more_is_better_where_it_is():
    up = {"name": "throughput", "better": "higher", "unit": "answers/s"}
    first, second = (made(figures=[figure(v, v, v, **up).as_dict()]) for v in (1.0, 3.0))
    assert verdicts(first, second, "throughput") == {"better"}


def test_what_differs_in_machine_and_settings_is_said():
    other = made(package="0.2.0")
    other["machine"] = {**other["machine"], "cores": 4, "load_after": 99}
    other["settings"] = {**other["settings"], "model": "n"}
    found = compare(made(), other).warnings
    assert found == [
        "machine: cores was 128, is 4", "settings: model was llama3.2:8b<b>, is n", "package: was 0.1.0, is 0.2.0",
    ]  # fmt: skip


def answered(paraphrases, seed=7, wrong=0):
    report = made()
    report["settings"]["seed"] = seed
    report["answered"]["kinds"]["paraphrase"] |= {"semantic": paraphrases, "wrong": wrong}
    return report


def test_counts_of_the_same_questions_differ_by_one_and_of_others_by_their_intervals():
    name = "paraphrases, answered"
    assert verdicts(answered(31), answered(32), name) == {"better"}
    assert verdicts(answered(31), answered(32, seed=8), name) == {WITHIN}
    assert verdicts(answered(5), answered(50, seed=8), name) == {"better"}
    assert verdicts(answered(31), answered(31, wrong=1), "paraphrases, wrong") == {"worse"}


@pytest.mark.parametrize(
    ("text", "says"), [("{", "no JSON"), ("[]", "not written"), ('{"format": "x"}', "not written")]
)
def test_a_file_that_is_no_report_is_named(tmp_path, text, says):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(AegisConfigError, match=says):
        read_report(path)


def test_the_command_compares_two_files(tmp_path):
    for name, by in (("a", 1.0), ("b", 3.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps(changed(by)))
    paths = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    done = CliRunner().invoke(app, ["bench", "compare", *paths])
    assert done.exit_code == 0, done.output
    assert "worse" in done.output
    as_json = json.loads(CliRunner().invoke(app, ["bench", "compare", *paths, "--json"]).stdout)
    assert as_json["warnings"] == []
    assert {c["verdict"] for c in as_json["changes"]} == {"worse", WITHIN, "the same"}


@pytest.mark.slow
def test_the_command_writes_what_it_is_told_to(tmp_path):
    pytest.importorskip("PIL")
    told = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html"), "--png", str(tmp_path / "png")]
    done = CliRunner().invoke(app, ["bench", "--quick", "--part", "client", "--rounds", "3", *told])
    assert done.exit_code == 0, done.output
    assert "processor time, invoke" in done.output
    assert read_report(tmp_path / "r.json")["settings"]["parts"] == ["client"]
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert [p.name for p in (tmp_path / "png").iterdir()] == ["client-cost.png"]


@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize("place", ["absent/report", "."])
def test_a_file_that_cannot_be_written_is_named_before_anything_is_measured(tmp_path, monkeypatch, option, place):
    monkeypatch.setattr("langchain_aegis.bench.run.run_bench", None)
    done = CliRunner().invoke(app, ["bench", option, str(tmp_path / place)])
    assert isinstance(done.exception, AegisConfigError)
    assert "cannot be written" in str(done.exception)


def test_callers_that_are_no_numbers_are_refused():
    done = CliRunner().invoke(app, ["bench", "--callers", "one"])
    assert isinstance(done.exception, AegisConfigError)
