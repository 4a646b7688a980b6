"""The demonstration: what it says about the cache is true, and what cannot run is said in one line."""

import io
import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import redis
from conftest import running_redis
from langchain_core.globals import get_llm_cache
from rich.console import Console

from langchain_aegis.demo.questions import Asked, read_questions
from langchain_aegis.demo.retrieval import Passages, read_documents
from langchain_aegis.demo.run import Result, _summary, run_demo
from langchain_aegis.demo.table import print_report
from langchain_aegis.errors import AegisConfigError, AegisConnectionError, AegisError
from langchain_aegis.notices import forget_warnings
from langchain_aegis.testing import ScriptedOllama

DEADLINE_S = 300
NOWHERE = "127.0.0.1:1"
FIELDS = {
    "question": str, "kind": str, "tier": str, "served_from": (str, type(None)), "similarity": (float, type(None)),
    "reason": str, "time_s": float, "tokens": int, "answer": str, "wrong_hit": bool, "grounded": (bool, type(None)),
}  # fmt: skip


@pytest.fixture(scope="module")
def scripted():
    with ScriptedOllama() as server:
        yield server


@pytest.fixture(scope="module")
def private_redis():
    with running_redis("valkey+search") as server:
        yield server.url


@pytest.fixture
def empty_redis(private_redis):
    with redis.Redis.from_url(private_redis) as client:
        client.flushall()
    return private_redis


@pytest.fixture
def demo(empty_redis, scripted, home, capfdbinary):
    """Run the demonstration in this process; returns (exit code, stdout, stderr)."""
    scripted.heal()
    scripted.forget()
    forget_warnings()

    def run(**options):
        code = run_demo(
            **{"redis_url": empty_redis, "ollama_url": scripted.base_url, "model": "scripted", "json": True, **options}
        )
        out, err = capfdbinary.readouterr()
        return code, out.decode(), err.decode()

    return run


# -- its files


def test_questions_are_read_in_order_with_defaults(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text(
        '{"question": " Why? ", "source": "a.md"}\n\n{"question":"Wer?","source":"b","kind":"trap","fact":"Ö"}',
        encoding="utf-8",
    )
    assert read_questions(file) == [
        Asked(question=" Why? ", kind="new", source="a.md", fact=""),
        Asked(question="Wer?", kind="trap", source="b", fact="Ö"),
    ]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "not JSON"),
        ("\xff", "not JSON"),
        ('["a", "b"]', "source"),
        ('{"question": "a"}', "source"),
        ('{"question": " ", "source": "a.md"}', "question"),
        ('{"question": 7, "source": "a.md"}', "question"),
    ],
)
def test_a_broken_question_is_named_by_its_line(tmp_path, line, word):
    file = tmp_path / "q.jsonl"
    file.write_bytes(b'{"question": "Why?", "source": "a.md"}\n\n' + line.encode("latin-1"))
    with pytest.raises(AegisConfigError, match=r"q\.jsonl, line 3: .*" + word):
        read_questions(file)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_list_without_a_question_is_refused(tmp_path, content):
    file = tmp_path / "q.jsonl"
    file.write_text(content)
    with pytest.raises(AegisConfigError, match="no question"):
        read_questions(file)


def test_a_documents_source_is_its_file_name(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "c.pdf").write_text("not read")
    (tmp_path / "d.md").mkdir()
    found = read_documents(tmp_path)
    assert [(d.page_content, d.metadata["source"]) for d in found] == [("one", "a.md"), ("two", "b.txt")]


def test_a_long_document_becomes_passages_that_hold_every_word(tmp_path):
    words = [f"word{i}" for i in range(1000)]
    (tmp_path / "a.md").write_text("\n\n".join(textwrap.wrap(" ".join(words), 250)))
    found = read_documents(tmp_path)
    assert len(found) > 5
    assert max(len(d.page_content) for d in found) <= 601
    assert " ".join(d.page_content for d in found).split() == words
    assert {d.metadata["source"] for d in found} == {"a.md"}


def test_documents_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(AegisConfigError, match="gone"):
        read_documents(tmp_path / "gone")
    with pytest.raises(AegisConfigError, match=r"no \.md or \.txt"):
        read_documents(tmp_path)
    (tmp_path / "a.md").write_bytes(b"\xff\xfe")
    with pytest.raises(AegisConfigError, match=r"a\.md .*UTF-8"):
        read_documents(tmp_path)


async def test_passages_are_found_by_meaning_in_a_fixed_order_with_and_without_search(tmp_path, any_redis, minilm):
    texts = {"a.md": "Bicycles are repaired in the cellar.", "b.md": "The cafe sells tea.", "c.md": "Tea is 2 euros."}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    passages = Passages(any_redis.url, minilm, read_documents(tmp_path))
    passages.open()
    passages.open()  # again: they are there already
    assert [d.metadata["source"] for d in await passages.nearest("Who sells tea, and for how much?", k=2)] == [
        "b.md",
        "c.md",
    ]
    passages.close()


async def test_a_redis_that_ends_is_an_error_of_ours(tmp_path, minilm):
    (tmp_path / "a.md").write_text("one")
    with running_redis("valkey+search") as server:
        passages = Passages(server.url, minilm, read_documents(tmp_path))
        passages.open()
    with pytest.raises(AegisConnectionError):
        await passages.nearest("one")
    with pytest.raises(AegisConnectionError):
        passages.open()
    passages.close()


# -- its tables


def result(question="Where?", **more):
    base = {
        "question": question, "kind": "new", "tier": "miss", "served_from": None, "similarity": None, "reason": "new",
        "time_s": 1.0, "tokens": 7, "answer": "There.", "wrong_hit": False, "grounded": None, "saved_s": 0.0,
    }  # fmt: skip
    return Result(**base | more)


RESULTS = [
    result("When does the library on the other side of the river open on Saturday in the month of December?"),
    result(tier="exact", kind="repeat", served_from="Where?", similarity=1.0, reason="", saved_s=2.0, grounded=True),
    result(tier="semantic", kind="paraphrase", served_from="Whereabouts?", similarity=0.97, reason="", grounded=False),
    result(kind="trap", similarity=0.951, reason="guard: exclusive, substitution", grounded=True),
    result(kind="trap", similarity=0.944, reason="context differs"),
    result(tier="semantic", kind="trap", served_from="Who?", similarity=0.99, reason="", wrong_hit=True, saved_s=1.0),
]


def test_the_summary_counts_wrong_hits_and_grounded_answers_apart():
    assert _summary(RESULTS) == {"hit_rate": 0.5, "wrong_hits": 1, "grounded": 2, "judged": 3, "time_saved_s": 3.0}


def test_a_summary_of_misses_alone_is_zero():
    assert _summary([result()]) == {"hit_rate": 0.0, "wrong_hits": 0, "grounded": 0, "judged": 0, "time_saved_s": 0.0}


def printed(width):
    report = {
        "questions": [vars(r) | {"before_retrieval": vars(r)} for r in RESULTS],
        "summary": _summary(RESULTS) | {"before_retrieval": _summary(RESULTS)},
        "stack": {"redis": "embedded", "model": "smollm2:135m"},
    }
    out = io.StringIO()
    print_report(report, Console(file=out, width=width, color_system=None))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_no_verdict_is_lost_however_narrow_the_terminal(width):
    text = printed(width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    rows = re.findall(r"\b(miss|exact|semantic|WRONG) ", text)
    assert rows == ["miss", "exact", "semantic", "miss", "miss", "WRONG"] * 2
    for words in (
        "guard:",
        "exclusive",
        "substitution",
        "context",
        "differs",
        "Whereabouts?",
        "Who?",
        "0.951",
        "0.990",
    ):
        assert text.count(words) == 2, words
    assert re.search(r"LLM's cache +50% +1 +2 of 3 +3\.0", text)
    assert re.search(r"before retrieval +50% +1 +2 of 3 +3\.0", text)


# -- what cannot run


BROKEN = {
    "unreachable Redis": {"redis_url": f"redis://:secret@{NOWHERE}"},
    "no address of a Redis": {"redis_url": "nonsense"},
    "unreachable Ollama": {"ollama_url": f"http://{NOWHERE}"},
    "no address of an Ollama": {"ollama_url": "::"},
    "unknown model": {"model": "nobody-has-it"},
    "model that makes vectors": {"model": None},
    "embedded server and unknown model": {"ollama_url": None, "model": "nobody-has-it"},
    "missing documents": {"documents": "gone"},
    "missing questions": {"questions": "gone"},
    "documents are a file": {"documents": __file__},
    "questions are a directory": {"questions": "."},
    "broken questions": {"questions": "broken.jsonl"},
}


@pytest.mark.parametrize("options", BROKEN.values(), ids=BROKEN)
def test_what_cannot_start_is_one_line_and_exit_code_2(demo, options, tmp_path):
    (tmp_path / "broken.jsonl").write_text("{")
    paths = {n: tmp_path / v for n, v in options.items() if n in ("documents", "questions")}
    code, out, err = demo(**options | paths)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"aegis demo: [^\n]+\n", err), err
    assert "secret" not in err


def test_a_missing_package_is_named_with_the_command_that_installs_it(demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "langgraph.graph", None)
    code, out, err = demo()
    assert (code, out) == (2, "")
    assert err == "aegis demo: langgraph.graph is missing; run: pip install 'langchain-aegis[embedded]'\n"


def test_a_cache_that_is_switched_off_is_said(demo, monkeypatch):
    monkeypatch.setenv("REDIS_CACHE_ENABLED", "false")
    code, out, err = demo()
    assert (code, out) == (2, "")
    assert "REDIS_CACHE_ENABLED" in err.splitlines()[-1]


def test_a_model_that_fails_midway_is_one_line(demo, scripted):
    scripted.fail(500, times=None, when=lambda seen: "12 months" in seen.text)
    code, out, err = demo()
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("aegis demo: ")
    assert "Traceback" not in err
    assert get_llm_cache() is None


def test_the_traceback_is_there_for_who_asks(demo, monkeypatch):
    monkeypatch.setenv("AEGIS_DEBUG", "1")
    with pytest.raises(AegisError):
        demo(model="nobody-has-it")


# -- the demonstration itself, on the scripted model


def check(report, *, minimum=14):
    """The schema that others read, and what holds for every run with guards."""
    assert set(report) == {"version", "questions", "summary", "stack"}
    assert len(report["questions"]) >= minimum
    for question in report["questions"]:
        for each in (question, question["before_retrieval"]):
            assert set(FIELDS) <= set(each)
            for name, kind in FIELDS.items():
                assert isinstance(each[name], kind), name
            assert each["tier"] in ("exact", "semantic", "miss")
            assert (each["tier"] == "miss") == (each["served_from"] is None)
            assert (each["tier"] == "miss") == (each["tokens"] > 0) == bool(each["reason"])
            assert each["time_s"] >= 0
            assert each["answer"]
    assert {"hit_rate", "wrong_hits", "grounded", "time_saved_s"} <= set(report["summary"])
    assert report["summary"]["wrong_hits"] == sum(q["wrong_hit"] for q in report["questions"])
    return report


def tiers(report):
    return [q["tier"] for q in report["questions"]]


def guarded(report):
    """Traps that similarity alone would have served."""
    least = report["stack"]["min_similarity"]
    return [q for q in report["questions"] if q["reason"].startswith("guard: ") and q["similarity"] >= least]


def test_it_hits_repeats_and_paraphrases_and_stops_traps(demo, scripted):
    code, out, err = demo()
    report = check(json.loads(out))
    assert (code, report["summary"]["wrong_hits"]) == (0, 0)
    assert tiers(report).count("exact") >= 2
    assert tiers(report).count("semantic") >= 2
    assert len({q["question"] for q in guarded(report)}) >= 3
    asked = [q["question"] for q in report["questions"]]
    assert [line.split("  ")[-1] for line in err.splitlines()[1:]] == asked * 2  # progress, in order
    misses = [each for q in report["questions"] for each in (q, q["before_retrieval"]) if each["tier"] == "miss"]
    assert len(scripted.chats) == len(misses)  # what it calls a hit cost no request
    assert get_llm_cache() is None


@pytest.mark.slow
def test_asked_again_only_paraphrases_are_generated_and_once(demo, scripted):
    """A text that was answered by meaning gets an answer of its own when it is asked again."""
    before = {q["question"]: q["tier"] for q in json.loads(demo()[1])["questions"]}
    scripted.forget()
    code, out, _ = demo()
    report = check(json.loads(out))
    assert code == 0
    anew = [q["question"] for q in report["questions"] if q["tier"] == "miss"]
    assert {before[question] for question in anew} <= {"semantic"}
    misses = [each for q in report["questions"] for each in (q, q["before_retrieval"]) if each["tier"] == "miss"]
    assert len(scripted.chats) == len(misses)
    scripted.forget()
    assert set(tiers(check(json.loads(demo()[1])))) == {"exact", "semantic"}
    assert scripted.chats == []


@pytest.mark.slow
def test_without_guards_wrong_answers_are_served_and_it_says_so(demo):
    code, out, _ = demo(no_guards=True)
    report = check(json.loads(out))
    assert code == 1
    assert report["summary"]["wrong_hits"] >= 1
    assert report["stack"]["guards"] is False
    wrong = next(q for q in report["questions"] if q["wrong_hit"])
    assert (wrong["kind"], wrong["tier"]) == ("trap", "semantic")
    assert demo()[0] == 0  # and nothing of it is left for a run with guards


def test_for_people_it_prints_tables_on_stdout_and_progress_on_stderr(demo):
    code, out, err = demo(json=False)
    assert code == 0
    assert all(words in out for words in ("Through the graph", "before retrieval", "guard: ", "Summary", "wrong hits"))
    assert "Summary" not in err


# -- with documents and questions of one's own

SHOP = {
    "brake-front.md": "Front brake: the repair of the front brake costs 25 euros and takes one hour.",
    "brake-rear.md": "Rear brake: the repair of the rear brake costs 40 euros and takes two hours.",
    "returns-receipt.txt": "Returns with a receipt: customers get their money back within 14 days.",
    "returns-none.txt": "Returns without a receipt: customers get a voucher and never money.",
    "rental.md": "Rental: a bicycle costs 12 euros for a day and 60 euros for a week.",
    "cafe.md": "The cafe in the yard serves coffee and cake from noon.",
}
SHOP_QUESTIONS = [
    ("What does a repair of the front brake cost?", "new", "brake-front.md", "25"),
    ("What does a repair of the front brake cost?", "repeat", "brake-front.md", "25"),
    ("How much does a repair of the front brake cost?", "paraphrase", "brake-front.md", "25"),
    ("What does a repair of the rear brake cost?", "trap", "brake-rear.md", "40"),
    ("Can I return a bicycle with a receipt?", "new", "returns-receipt.txt", "money"),
    ("Can I return a bicycle without a receipt?", "trap", "returns-none.txt", "voucher"),
    ("When does the cafe open?", "new", "cafe.md", ""),
]


@pytest.fixture
def shop(tmp_path):
    """Documents and questions of a bicycle shop."""
    documents, questions = tmp_path / "documents", tmp_path / "questions.jsonl"
    documents.mkdir()
    for name, text in SHOP.items():
        (documents / name).write_text(text)
    write_questions(questions, SHOP_QUESTIONS)
    return {"documents": documents, "questions": questions}


def write_questions(file, rows):
    names = ("question", "kind", "source", "fact")
    file.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))


def test_own_documents_and_questions_hold_on_every_kind_of_redis(demo, shop, any_redis):
    code, out, _ = demo(redis_url=any_redis.url, **shop)
    report = check(json.loads(out), minimum=7)
    assert code == 0
    assert [q["question"] for q in report["questions"]] == [row[0] for row in SHOP_QUESTIONS]
    assert tiers(report) == ["miss", "exact", "semantic", "miss", "miss", "miss", "miss"]
    assert [q["question"] for q in guarded(report)] == [SHOP_QUESTIONS[3][0], SHOP_QUESTIONS[5][0]]
    assert report["questions"][2]["served_from"] == SHOP_QUESTIONS[0][0]
    assert report["questions"][6]["grounded"] is None
    with redis.Redis.from_url(any_redis.url) as client:
        client.flushall()


def test_own_traps_are_wrong_hits_without_guards(demo, shop):
    code, out, _ = demo(no_guards=True, **shop)
    assert code == 1
    wrong = {q["question"] for q in json.loads(out)["questions"] if q["wrong_hit"]}
    assert wrong == {SHOP_QUESTIONS[3][0], SHOP_QUESTIONS[5][0]}


def test_changed_documents_answer_anew(demo, shop):
    demo(**shop)
    (shop["documents"] / "brake-front.md").write_text("Front brake: the repair costs 30 euros now.")
    report = json.loads(demo(**shop)[1])
    assert tiers(report)[:2] == ["miss", "exact"]


def test_an_answer_to_a_question_of_another_list_is_not_served(demo, shop):
    demo(no_guards=True, **shop)
    write_questions(shop["questions"], [SHOP_QUESTIONS[3]])  # its neighbour's source is not known any more
    code, out, _ = demo(no_guards=True, **shop)
    assert (code, tiers(json.loads(out))) == (0, ["miss"])


# -- with the real model


def run_command(home, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "langchain_aegis", "demo", "--json", *arguments],
        env=os.environ | {"AEGIS_HOME": str(home)}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return check(json.loads(done.stdout))


@pytest.mark.slow
def test_the_real_parts_run_together_and_the_next_start_knows_the_answers(home):
    """Also: the command prints one JSON document on stdout, and nothing else there."""
    first = run_command(home)
    assert first["stack"]["redis"] == first["stack"]["ollama"] == "embedded"
    assert first["summary"]["wrong_hits"] == 0
    assert tiers(first).count("exact") >= 2
    assert tiers(first).count("semantic") >= 2
    assert len({q["question"] for q in guarded(first)}) >= 3
    assert any(q["grounded"] for q in first["questions"])
    second = run_command(home)
    assert second["questions"][0]["tier"] == "exact"
    assert second["summary"]["wrong_hits"] == 0
    known = {q["question"]: q["answer"] for q in first["questions"]}
    kept = {q["question"]: q["answer"] for q in second["questions"] if q["tier"] != "miss"}
    assert len(kept) > len(known) / 2
    assert kept.items() <= known.items()
