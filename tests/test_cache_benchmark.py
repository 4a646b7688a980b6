"""The benchmarks of the cache measure only what answered rightly, and load what the cache itself would have written."""

import sys
from pathlib import Path

import numpy
import pytest
import redis

from langchain_aegis import AegisSemanticCache, aegis_scope
from langchain_aegis.writes import the_writer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import cache
import cache_filling
import cache_report
import cache_rounds
import cache_systems
import growth
import results_page
from cache_rounds import Deck, Measured, told_by_langchain
from cache_workload import PARAPHRASES, PROMPTS, Vectors, Workload, generations

TINY = ["--sizes", "60", "--rounds", "4", "--crowd", "10", "--at-once", "4", "--real-entries", "0", "--seed", "3",
        "--op-budget-s", "30"]  # a busy machine is no miss  # fmt: skip
LLM = "[('_type', 'bench'), ('model', 'bench'), ('stop', None)]"


@pytest.fixture(scope="module")
def url():
    with cache_systems.private_redis(None) as address:
        yield address


@pytest.fixture
def tiny(url):
    return [*TINY, "--url", url]


class Mixed(cache_systems.FloorGet):
    """Answers every fourth repeat with what belongs to another question."""

    name, tiers = "mixed", ("exact",)
    asked = 0

    def lookup(self, prompt):
        Mixed.asked += 1
        found = super().lookup(prompt)
        if found is None or Mixed.asked % 4:
            return found
        return super().lookup(PROMPTS.prompt(Workload(3).item(59).question))


class Eager(cache_systems.FloorFunction):
    """Answers whatever is asked, with the nearest that there is."""

    name = "eager"

    def _asked(self, vector):
        return (*super()._asked(vector)[:-1], 2.0)


class Cut(cache_systems.FloorGet):
    """Loses the end of each answer."""

    name = "cut"

    def lookup(self, prompt):
        found = super().lookup(prompt)
        return found and found[:300]


class Silent(cache_systems.FloorGet):
    """Answers nothing, which is quick."""

    name = "silent"

    def lookup(self, prompt):
        return None


@pytest.mark.slow
def test_a_run_measures_everything_and_finds_no_wrong_answer(tiny, capsys, monkeypatch):
    for module in (cache_systems, cache_rounds):
        monkeypatch.setattr(module, "KNOWN", 40)  # the other 20 entries cannot be asked for
    told = cache.arguments([*tiny, "--memory-entries", "40"])
    done = cache.run(told, [cache_systems.FloorGet, cache_systems.FloorFunction, cache_systems.Aegis])
    assert done.failures == []
    (measured,) = done.sizes
    for way in ("sync", "async"):
        for operation in ("exact", "semantic", "miss", "update"):
            assert len(measured.wall["aegis", way, operation]) > 0, (way, operation)
            assert measured.wall_us("aegis", way, operation) > measured.cpu_us("GET", way, "miss") / 100
    for tally in ("exact", "exact x4", "exact invoke", "exact ainvoke", "kept", "semantic"):
        told_of = measured.tallies["aegis", tally]
        assert told_of.answered == told_of.asked > 0, tally
    assert measured.tallies["aegis", "miss"].answered == 0
    assert {"aegis, 384 dimensions, LRU and source sets", "aegis, 1024 dimensions, LRU and source sets"} == set(
        done.bytes_each
    )
    assert {r.what for r in cache_report.ratios(done)} >= {
        "exact hit, sync, to a GET",
        "miss, async, to a GET and an FCALL",
    }
    cache_report.print_run(done)
    assert "| aegis |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_system_that_answers_wrongly_or_not_at_all_makes_the_run_fail(tiny, capsys):
    liars = [Mixed, Eager, Cut, Silent]
    assert cache.main([*tiny, "--crowd", "0", "--memory-entries", "0"], [cache_systems.FloorGet, *liars]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    for kind in liars:
        assert any(line.startswith(f"FAILED: 60 entries: {kind.name}, ") for line in failed), kind
    assert not any("GET" in line for line in failed)


@pytest.mark.slow
def test_the_floors_alone_do_not_fail(tiny, capsys):
    told = [*tiny, "--rounds", "2", "--crowd", "0", "--memory-entries", "0"]
    assert cache.main(told, [cache_systems.FloorGet, cache_systems.FloorFunction]) == 0
    assert "FAILED" not in capsys.readouterr().out


def test_what_is_not_right_is_not_timed():
    measured, workload = Measured(1), Workload(3)
    item, other = workload.item(0), workload.item(1)
    system = cache_systems.FloorGet(None)
    assert measured.judge(system, "exact", item, generations(item))
    assert not measured.judge(system, "exact", item, generations(other))
    assert not measured.judge(system, "exact", item, None)
    assert not measured.judge(system, "miss", None, generations(other))
    assert measured.judge(system, "miss", None, None)
    assert len(measured.failures) == 2


def test_every_question_is_another_and_so_is_every_answer():
    workload = Workload(3)
    items = workload.items(0, 3000)
    texts = [text for item in items for text in (item.question, *item.paraphrases)]
    assert len(set(texts)) == len(texts)
    assert len({item.answer for item in items}) == len(items)
    assert {len(item.answer) for item in items} == {1024}
    assert workload.item(workload.total + 5).question != workload.item(5).question
    deck = Deck(workload, 20, 3)
    asked = [deck.near()[1] for _ in range(20 * PARAPHRASES)]
    assert len(set(asked)) == len(asked)


def test_prompts_are_those_that_langchain_writes():
    assert told_by_langchain() == LLM
    assert PROMPTS.question(PROMPTS.prompt('Is "this" \\ it?')) == 'Is "this" \\ it?'


def shape(client, namespace):
    """Return the kinds of names of a namespace with their number, and the fields of its records."""
    kinds, fields = {}, set()
    for name in client.scan_iter(f"{namespace}:*"):
        kind = name.decode().split(":")[2]
        kinds[kind] = kinds.get(kind, 0) + 1
        if kind == "e":
            fields.add(tuple(sorted(client.hkeys(name))))
    return kinds, fields


def test_what_is_loaded_quickly_is_what_update_writes(url, monkeypatch):
    workload = Workload(3)
    vectors, items, seen = Vectors(workload), workload.items(0, 7), []
    vectors.prepare(items)
    with redis.Redis.from_url(url, protocol=2) as client:
        client.flushall()
        caches = {name: AegisSemanticCache(url, vectors, namespace=name, on_lookup=seen.append, op_budget_s=30)
                  for name in ("one", "many", "more")}  # fmt: skip
        with aegis_scope(tenant="acme"):
            for item in items:
                caches["one"].update(PROMPTS.prompt(item.question), LLM, generations(item))
        assert the_writer.drain(timeout_s=10)
        # In the background, a question would be embedded when the next part's vectors have replaced its own.
        monkeypatch.setattr(the_writer, "put", lambda _: pytest.fail("left to the background"))
        assert cache_filling.fill(caches["many"], items, LLM, scope=lambda _: {"tenant": "acme"}) == 7
        cache_filling.fill(caches["more"], items[:1], LLM, scope=lambda _: {"tenant": "acme"})
        monkeypatch.undo()
        with aegis_scope(tenant="acme"):
            for item in items:
                found = caches["many"].lookup(PROMPTS.prompt(item.question), LLM)
                assert found[0].text == item.answer
            caches["more"].lookup(PROMPTS.prompt(items[0].question), LLM)
        rows = vectors.around(numpy.random.default_rng(3), 6)
        cache_filling.multiply(caches["more"], seen[-1].record, 6, lambda many: rows[:many], tenanted=True)
        assert shape(client, "one") == shape(client, "many") == shape(client, "more")
        for each in caches.values():
            each.close()


@pytest.mark.slow
def test_growth_is_measured_and_checked(url, capsys):
    told = growth.arguments(
        ["--entries", "60", "120", "--rounds", "4", "--tenant-entries", "1000", "--answer-entries", "60",
         "--flat-up-to", "500", "--dimensions", "32", "--op-budget-s", "30", "--url", url,
         "--only", "entries", "scopes", "answers", "flat"]
    )  # fmt: skip
    grown = growth.run(told)
    assert grown.failures == []
    assert list(grown.entries) == [60, 120]
    assert set(grown.policies) == {1, 20, 60}
    assert 50_000 < grown.answers[64]["bytes"] - grown.answers[1]["bytes"] < 80_000
    growth.print_growth(grown)
    assert "What one Redis holds in 8 GB" in capsys.readouterr().out


def test_growth_notices_a_wrong_answer(url):
    grown = growth.Grown(url, LLM, 32, 3, namespace="wrong", op_budget_s=30)
    grown.add("acme", 3, known=3)
    grown.look("acme", grown.known["acme"][0].question, grown.known["acme"][0])
    assert grown.failures == []
    grown.look("acme", grown.known["acme"][0].question, grown.known["acme"][1])
    grown.look("acme", grown.known["acme"][0].question, None)
    assert len(grown.failures) == 2
    grown.close()


def test_each_section_of_the_page_is_replaced_alone(tmp_path):
    page = tmp_path / "README.md"
    results_page.write_section("cache", "## The cache\n\nold", page)
    results_page.write_section("growth", "## Growth\n\nhere \\1", page)
    page.write_text(page.read_text() + "\nBy hand.\n")
    results_page.write_section("cache", "## The cache\n\nnew", page)
    text = page.read_text()
    assert "old" not in text and "new" in text and "here \\1" in text and text.endswith("By hand.\n")
    assert text.index("## The cache") < text.index("## Growth")


def test_pictures_hold_every_value(tmp_path, monkeypatch):
    monkeypatch.setattr(results_page, "HERE", tmp_path)
    results_page.draw_bars("bars", "Title", "µs", ["exact", "miss"], {"aegis": [10.0, 2000.0], "GET": [5.0, None]}, "n")
    results_page.draw_lines("lines", "Title", "µs", "entries", {"aegis": {1_000: 10.0, 100_000: 30.0}}, "note " * 60)
    bars, lines = (tmp_path / "bars.svg").read_text(), (tmp_path / "lines.svg").read_text()
    assert "2,000" in bars and "10.0" in bars and "5.00" in bars
    assert lines.count("<circle") == 2 and "100k" in lines
