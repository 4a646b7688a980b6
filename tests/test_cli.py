"""The command line: fast help, one line per error, JSON alone on stdout, exit codes that mean something."""

import io
import json
import os
import subprocess
import sys
import types
import uuid
from pathlib import Path

import pytest
from typer.testing import CliRunner

import langchain_aegis
from langchain_aegis import cli, cli_cache
from langchain_aegis.errors import AegisConfigError, AegisConnectionError

HELP = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


def aegis(*arguments, command=(sys.executable, "-m", "langchain_aegis"), **environment):
    done = subprocess.run(
        [*command, *map(str, arguments)], env=os.environ | HELP | environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_the_version_is_the_packages():
    assert aegis("--version") == (0, f"{langchain_aegis.__version__}\n", "")


def test_the_installed_command_is_the_same():
    script = Path(sys.executable).with_name("aegis")
    assert aegis("--version", command=[script])[:2] == (0, f"{langchain_aegis.__version__}\n")


def test_help_names_the_commands_and_loads_no_library():
    code = (
        "import sys\nfrom langchain_aegis.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    exit_code, out, err = aegis("--help", command=[sys.executable, "-c", code])
    assert exit_code == 0
    assert all(word in out for word in ("demo", "doctor", "cache"))
    assert not {"langchain_core", "redis", "httpx", "langchain_ollama", "yaml"} & set(err.split())


def test_every_command_explains_itself():
    def walk(command, path):
        assert command.help, path
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, f"{path} {parameter.name}"
        for name, child in getattr(command, "commands", {}).items():
            walk(child, f"{path} {name}")

    import typer

    walk(typer.main.get_command(cli.app), "aegis")


@pytest.fixture
def main(monkeypatch, capsys):
    """Run the command in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments, **environment):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["aegis", *map(str, arguments)])
            for name, value in (HELP | environment).items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                cli.main()
        told = capsys.readouterr()
        return ended.value.code or 0, told.out, told.err

    return run


def test_without_a_command_the_help_is_shown(main):
    exit_code, out, err = main()
    assert exit_code == 2
    assert "Usage" in out + err


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        (["doctor"], {"AEGIS_TTL_S": "soon"}, "AEGIS_TTL_S"),
        (["doctor", "--ollama-url", "ftp://x"], {}, "address"),
        (["cache", "invalidate"], {}, "sources"),
        (["cache", "clear", "--yes", "--redis-url", "http://x"], {}, "redis_url"),
        (["cache", "clear", "--yes", "--redis-url", "redis://127.0.0.1:9"], {}, "Redis"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_exit_code_2(main, arguments, variables, says):
    exit_code, out, err = main(*arguments, **variables)
    assert (exit_code, out) == (2, "")
    line = err.splitlines()[-1]
    assert line.startswith("aegis: ") and says in line
    assert "Traceback" not in err


def test_debugging_shows_where_an_error_came_from(main):
    with pytest.raises(AegisConfigError):
        main("doctor", AEGIS_TTL_S="soon", AEGIS_DEBUG="1")
    assert main("doctor", AEGIS_TTL_S="soon", AEGIS_DEBUG="0")[0] == 2


def test_a_wrong_option_is_a_usage_error(main):
    exit_code, out, err = main("doctor", "--no-such-option")
    assert (exit_code, out) == (2, "")
    assert "--no-such-option" in err


@pytest.fixture
def demo(monkeypatch):
    """A stand-in for the demo that notes its options; its result can be set."""
    seen = {}
    module = types.ModuleType("langchain_aegis.demo.run")

    def run_demo(**options):
        seen.update(options)
        if isinstance(seen.get("result"), Exception):
            raise seen["result"]
        return seen.get("result", 0)

    module.run_demo = run_demo
    monkeypatch.setitem(sys.modules, "langchain_aegis.demo", types.ModuleType("langchain_aegis.demo"))
    monkeypatch.setitem(sys.modules, "langchain_aegis.demo.run", module)
    return seen


def test_the_demo_gets_every_option_and_gives_the_exit_code(demo, tmp_path):
    (tmp_path / "q.jsonl").write_text("")
    arguments = ["--model", "m", "--redis-url", "redis://r", "--ollama-url", "http://o", "--no-guards", "--json",
                 "--documents", str(tmp_path), "--questions", str(tmp_path / "q.jsonl")]  # fmt: skip
    demo["result"] = 1
    done = CliRunner().invoke(cli.app, ["demo", *arguments])
    assert done.exit_code == 1
    del demo["result"]
    assert demo == {
        "model": "m", "redis_url": "redis://r", "ollama_url": "http://o", "no_guards": True, "json": True,
        "documents": tmp_path, "questions": tmp_path / "q.jsonl",
    }  # fmt: skip


def test_the_demo_is_run_with_its_defaults(demo):
    assert CliRunner().invoke(cli.app, ["demo"]).exit_code == 0
    assert not any(demo.values())


def test_a_stack_that_does_not_start_is_one_line(demo, main):
    demo["result"] = AegisConnectionError("no server:\n  nowhere")
    assert main("demo") == (2, "", "aegis: no server: nowhere\n")


def test_an_error_that_is_not_ours_is_not_hidden(demo, main):
    demo["result"] = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        main("demo")


@pytest.mark.parametrize("option", ["--documents", "--questions"])
def test_a_file_of_the_demo_that_is_not_there_is_said_in_one_line(option):
    done = CliRunner().invoke(cli.app, ["demo", option, "/no/such/place"])
    assert done.exit_code == 2
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert "/no/such/place" in done.stderr


# -- The cache ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(redis_url):
    """A cache with two answers, in a namespace that the commands are told."""
    from langchain_aegis import AegisSemanticCache, aegis_scope

    namespace = f"cli-{uuid.uuid4().hex[:8]}"
    with AegisSemanticCache(redis_url, namespace=namespace, op_budget_s=10) as cache:
        for tenant, source in (("a", "one.md"), ("b", "two.md")):
            with aegis_scope(tenant=tenant):
                cache.get_or_generate("What is one?", lambda: "1", pipeline="p", sources=[source])
        assert cache.stats().stored == 2
        yield cache
        cache.clear()


@pytest.fixture
def on(cache, main):
    """Run a command on the namespace of `cache`."""

    def run(*arguments):
        return main(
            "cache", *arguments, "--redis-url", cache.settings.redis_url, "--namespace", cache.settings.namespace
        )

    return run


@pytest.mark.parametrize(
    "arguments", [["--source", "one.md"], ["--tenant", "a"], ["--source", "one.md", "--tenant", "a"]]
)
def test_invalidating_removes_the_answers_named(on, arguments):
    assert on("invalidate", *arguments) == (0, "1 removed\n", "")
    assert on("invalidate", *arguments) == (0, "0 removed\n", "")


@pytest.mark.parametrize(
    ("arguments", "removed"),
    [(["--task", "t"], 0), (["--model", "pipeline:p"], 2), (["--model", "pipeline:p", "--tenant", "b"], 1)],
)
def test_what_is_invalidated_may_be_named_in_many_ways(on, arguments, removed):
    assert on("invalidate", *arguments) == (0, f"{removed} removed\n", "")


def test_what_is_too_old_is_gone(cache, on):
    exit_code, out, _ = on("invalidate", "--older-than-s", "0.0001")
    assert exit_code == 0
    assert out.endswith("removed\n")
    assert list(cache.entries()) == []


def test_invalidating_what_is_near_needs_an_embedder(on):
    exit_code, out, err = on("invalidate", "--near", "What is one?")
    assert (exit_code, out) == (2, "")
    assert "embedder" in err


def test_inspecting_lists_entries_and_no_answers(cache, on):
    exit_code, out, _ = on("inspect", "--json", "--limit", "1")
    told = json.loads(out)
    assert (exit_code, told["entries"], told["tasks"], len(told["newest"])) == (0, 2, {"": 2}, 1)
    assert told["bytes"] == sum(entry.bytes for entry in cache.entries())
    exit_code, out, _ = on("inspect")
    assert exit_code == 0
    assert all(entry.key in out for entry in cache.entries())
    assert json.loads(on("inspect", "--task", "other", "--json")[1])["entries"] == 0


def test_explaining_says_what_would_happen_to_whom(on):
    mine = ["explain", "What is one?", "--pipeline", "p", "--tenant", "a"]
    assert on(*mine)[:2] == (0, "exact\n")
    exit_code, out, _ = on(*mine[:-1], "c", "--json")
    told = json.loads(out)
    assert (exit_code, told["decision"]) == (1, "miss")
    assert set(told["reasons"]) <= set(told["meanings"])
    exit_code, out, _ = on(*mine[:-1], "c")
    assert exit_code == 1
    assert out.startswith("miss (") and f"\n{told['reasons'][0]}: " in out


def test_near_questions_are_shown_with_what_speaks_against_them(redis_url, minilm, monkeypatch):
    from langchain_aegis import AegisSemanticCache

    namespace = f"cli-{uuid.uuid4().hex[:8]}"
    made = AegisSemanticCache(
        redis_url, minilm, namespace=namespace, keep_questions=True, op_budget_s=10, embed_budget_s=30
    )
    monkeypatch.setattr(cli_cache, "_cache", lambda *_: made)
    runner = CliRunner()
    with made:
        made.get_or_generate("How many users may the basic plan have?", lambda: "5", pipeline="p")
        done = runner.invoke(cli.app, ["cache", "explain", "How many users may the basic plan not have?"])
        assert done.exit_code == 1, done.output
        assert '"How many users may the basic plan have?"' in done.stdout
        assert "guard:negation" in done.stdout
        done = runner.invoke(cli.app, ["cache", "explain", "How many users can the basic plan have?"])
        assert done.exit_code == 0, done.output
        assert "may be served" in done.stdout
        done = runner.invoke(cli.app, ["cache", "invalidate", "--near", "How many users can the basic plan have?"])
        assert (done.exit_code, done.stdout) == (0, "1 removed\n")


def test_answers_are_carried_out_and_in(cache, on, tmp_path):
    file = tmp_path / "answers.jsonl"
    assert on("export", file) == (0, "2 exported\n", "")
    assert file.stat().st_mode & 0o777 == 0o600
    exit_code, out, _ = on("import", file, "--json")
    assert (exit_code, json.loads(out)) == (0, {"taken": 2, "left": {}})
    on("invalidate", "--tenant", "a")
    exit_code, out, _ = on("import", file)
    assert exit_code == 1
    assert out.startswith("1 imported\n1 not: ")


def test_known_answers_are_put_in_beforehand(cache, on, tmp_path):
    file = tmp_path / "known.jsonl"
    rows = [{"question": "What is three?", "answer": "3"}, {"question": "What is four?", "answer": "4", "tenant": "a"}]
    file.write_text("\n\n".join(map(json.dumps, rows)))
    with langchain_aegis.aegis_scope(tenant="a"):
        assert on("warm", file, "--pipeline", "q")[0] in (0, 1)  # a call without a tenant may be refused here
        assert cache.get_or_generate("What is four?", lambda: "new", pipeline="q") == "4"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "line 1"),
        ("[1]", "line 1"),
        ('{"question": "What is four?"}', "row 1"),
        ("\udcff", "UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_file_of_known_answers_that_cannot_be_read_is_said(on, tmp_path, text, says):
    file = tmp_path / "known.jsonl"
    if text is not None:
        file.write_text(text, errors="surrogateescape")
    exit_code, out, err = on("warm", file, "--pipeline", "q")
    assert (exit_code, out) == (2, "")
    assert err.splitlines()[-1].startswith("aegis: ") and says in err


def test_a_file_that_is_no_export_is_not_taken(on, tmp_path):
    file = tmp_path / "other.jsonl"
    file.write_text('{"question": "q"}\n')
    assert on("import", file)[0] == 2
    assert on("export", tmp_path / "none" / "x")[0] == 2


def test_a_wrong_answer_is_reported_by_its_id(cache, on):
    from langchain_core.messages import AIMessage

    answer = AIMessage("2", response_metadata={"finish_reason": "stop"})
    with langchain_aegis.aegis_scope(tenant="a"):
        cache.get_or_generate("What is two?", lambda: answer, pipeline="p")
        hit = cache.get_or_generate("What is two?", lambda: answer, pipeline="p")
    lookup_id = langchain_aegis.was_cached(hit)["lookup_id"]
    assert on("report-wrong", lookup_id) == (0, "removed\n", "")
    assert on("report-wrong", lookup_id)[0] == 1
    for unknown in ("x" * 40, "-" + "x" * 40):  # an id may begin so; it is no option
        exit_code, out, err = on("report-wrong", unknown)
        assert (exit_code, out) == (2, "")
        assert "lookup_id" in err


def test_clearing_asks_unless_told_not_to(cache, on, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    exit_code, out, err = on("clear")
    assert (exit_code, out.strip()) == (1, "")
    assert cache.settings.namespace in err
    assert on("clear", "--yes") == (0, f"cleared {cache.settings.namespace}\n", "")
    assert cache.invalidate(tenant="b") == 0


def test_stats_are_printed_as_a_table_or_as_json(on):
    exit_code, out, _ = on("stats", "--json")
    assert (exit_code, json.loads(out)) == (0, {"redis": True, "search": True, "entries": 2, "tenants": 2})
    exit_code, out, _ = on("stats")
    assert exit_code == 0
    assert "entries  2" in out


def test_stats_without_redis_say_so_in_the_exit_code(main, tmp_path):
    assert main("cache", "stats", "--redis-url", f"unix://{tmp_path}/none.sock")[0] == 2


def test_judging_two_questions_says_why_not(monkeypatch):
    """The exit code says whether the answer would be served."""
    from langchain_aegis.embedded import MiniLMEmbeddings

    monkeypatch.setattr(
        cli_cache, "_cache", lambda *_: langchain_aegis.AegisSemanticCache(embeddings=MiniLMEmbeddings())
    )
    runner = CliRunner()
    question = "How many users may the basic plan have?"
    served = runner.invoke(cli.app, ["cache", "judge", question, question, "--json"])
    assert (served.exit_code, json.loads(served.stdout)["served"]) == (0, True)
    refused = runner.invoke(cli.app, ["cache", "judge", question, question.replace("may", "may not"), "--json"])
    verdict = json.loads(refused.stdout)
    assert (refused.exit_code, verdict["served"]) == (1, False)
    assert verdict["reasons"]
    plain = runner.invoke(cli.app, ["cache", "judge", question, "What does the pro plan cost?"])
    assert plain.exit_code == 1
    assert plain.stdout.startswith("not served, similarity 0.")


def test_judging_without_an_embedder_is_an_error(main):
    exit_code, out, err = main("cache", "judge", "a?", "b?", OLLAMA_BASE_URL="http://127.0.0.1:9")
    assert (exit_code, out) == (2, "")
    assert err.splitlines()[-1].startswith("aegis: ")


@pytest.fixture
def measured(monkeypatch, home):
    """Every embedder that the command asks for is a made-up one."""
    from test_calibration import USUAL, Made

    monkeypatch.setattr(cli_cache, "_embeddings", lambda *asked: Made(USUAL))
    return home / "calibration.json"


def test_calibrating_prints_what_each_mode_serves_and_where_it_is_kept(measured):
    done = CliRunner().invoke(cli.app, ["cache", "calibrate"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("made, 64 dimensions")
    assert [line.split()[0] for line in lines if line and line.split()[0] in ("strict", "balanced", "lenient")]
    assert sum("German" in line for line in lines) == 3
    assert lines[-1] == f"kept in {measured}"
    assert measured.is_file()


def test_a_calibration_is_one_json_document(measured, tmp_path):
    file = tmp_path / "ours.json"
    done = CliRunner().invoke(cli.app, ["cache", "calibrate", "--json", "--file", str(file)])
    values = json.loads(done.stdout)
    assert (done.exit_code, values["saved"], values["warnings"]) == (0, str(file), [])
    traps = values["modes"]["balanced"]["served"]["traps"]
    assert traps["rate"] == traps["count"] / traps["of"]
    assert traps["interval"][0] <= traps["rate"] <= traps["interval"][1] <= 0.03
    assert file.is_file() and not measured.exists()


def test_a_calibration_may_be_looked_at_only(measured):
    done = CliRunner().invoke(cli.app, ["cache", "calibrate", "--dry-run"])
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "not kept (--dry-run)")
    assert not measured.exists()


def test_an_embedder_without_german_is_kept_with_a_warning(home, monkeypatch):
    from test_calibration import USUAL, Made, direction

    from langchain_aegis import pairs

    german = {text for pair in pairs.load() if pair.lang == "de" for text in (pair.cached, pair.new)}
    embedder = Made(lambda text: direction(text) if text in german else USUAL(text))
    monkeypatch.setattr(cli_cache, "_embeddings", lambda *_: embedder)
    done = CliRunner().invoke(cli.app, ["cache", "calibrate"])
    assert done.exit_code == 1, done.output
    assert "warning: German" in done.stdout
    assert (home / "calibration.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ollama-url", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["--minilm", "--model", "x"], "--minilm"),
        (["--ollama-url", "ftp://x"], "address"),
    ],
)
def test_an_embedder_that_cannot_be_asked_is_an_error(main, home, arguments, says):
    exit_code, out, err = main("cache", "calibrate", *arguments)
    assert (exit_code, out) == (2, "")
    assert err.splitlines()[-1].startswith("aegis: ") and says in err


def test_an_embedder_that_tells_nothing_apart_is_an_error(main, monkeypatch, home):
    from test_calibration import Made, direction

    monkeypatch.setattr(cli_cache, "_embeddings", lambda *_: Made(direction))
    exit_code, out, err = main("cache", "calibrate")
    assert (exit_code, out) == (2, "")
    assert "does not tell questions apart" in err
    assert not list(home.iterdir())


def test_the_errors_that_the_command_knows_are_the_packages():
    assert issubclass(AegisConfigError, langchain_aegis.AegisError)
