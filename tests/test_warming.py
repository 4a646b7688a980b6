"""Models are ready before the first call: downloaded in spite of lost connections, loaded, and kept."""

import asyncio
import json
import time

import pytest
from typer.testing import CliRunner

from langchain_aegis import AegisEmbeddings, ChatAegis
from langchain_aegis.cli import app
from langchain_aegis.client import shared_client
from langchain_aegis.errors import (
    AegisConfigError,
    AegisConnectionError,
    AegisModelNotFoundError,
    AegisReloadError,
    AegisServerError,
)
from langchain_aegis.testing import ScriptedModel, ScriptedOllama
from langchain_aegis.warming import MOST_FAILURES, Target, Timeouts, fading, stays_s, warm

BIG = ScriptedModel(name="big:8b", file_bytes=4_000_000_000)
EMBED = ScriptedModel(name="embed", embedding=True, file_bytes=50_000_000)
RULES = "You answer for the library desk, in two sentences at most, from the documents alone. " * 20


@pytest.fixture
def server():
    with ScriptedOllama(["m", "embed"], registry=[BIG]) as server:
        yield server


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited for, without waiting."""
    waited = []

    async def asleep(seconds):
        waited.append(seconds)

    monkeypatch.setattr("langchain_aegis.warming.time.sleep", waited.append)
    monkeypatch.setattr("langchain_aegis.warming._Performer.aperform", _without_waiting(waited))
    return waited


def _without_waiting(waited):
    from langchain_aegis import warming

    original = warming._Performer.aperform

    async def aperform(self, step):
        if isinstance(step, warming._Wait):
            waited.append(step.seconds)
            return None
        return await original(self, step)

    return aperform


@pytest.fixture(params=["sync", "async"])
def heat(request):
    """Warm a model in either way."""
    if request.param == "sync":
        return lambda model, **kwargs: model.warm(**kwargs)
    return lambda model, **kwargs: asyncio.run(model.awarm(**kwargs))


def run(*arguments, **env):
    return CliRunner().invoke(app, ["warm", *arguments], env=env)


# -- from Python --


def test_a_warm_model_answers_without_a_load(server, heat):
    """It is loaded with what its calls send."""
    model = ChatAegis("m", base_url=server.base_url, num_ctx=8192, keep_alive="1h", num_thread=2)
    warmed = heat(model)
    assert (warmed.model, warmed.resident, warmed.window_tokens, warmed.pulled_bytes) == ("m:latest", True, 8192, 0)
    assert 3_500 < warmed.stays_s <= 3_600
    model.invoke("What is it?")
    assert server.counters.loads == 1


def test_a_system_prompt_is_read_in_advance(server, heat):
    """The first call finds it in the server's cache."""
    model = ChatAegis("m", base_url=server.base_url)
    warmed = heat(model, system=RULES)
    assert warmed.prefilled_tokens > 300
    before = server.counters.cached_tokens
    model.invoke([("system", RULES), ("human", "What does the desk lend?")])
    assert server.counters.cached_tokens - before > 300
    assert server.counters.loads == 1


def test_an_embedder_is_loaded_by_its_own_route(server, heat):
    warmed = heat(AegisEmbeddings("embed", base_url=server.base_url, keep_alive=-1))
    assert (warmed.resident, warmed.stays_s) == (True, None)
    assert server.routes["/api/embed"] == 1
    assert server.counters.texts_embedded == 0


def test_a_missing_model_is_pulled_and_loaded(server, heat):
    """With every step told."""
    told = []
    warmed = heat(ChatAegis("big:8b", base_url=server.base_url), report=told.append)
    assert (warmed.resident, warmed.pulled_bytes) == (True, 4_000_000_000)
    assert list(dict.fromkeys(each.phase for each in told)) == ["pull", "load", "ready"]
    sizes = [each.completed for each in told if each.phase == "pull"]
    assert sizes == sorted(sizes)
    assert told[-2].phase == "load"
    assert {each.total for each in told if each.phase == "pull"} == {0, 4_000_000_000}


def test_a_missing_model_may_be_an_error(server, heat):
    with pytest.raises(AegisModelNotFoundError, match=r"ollama pull big:8b"):
        heat(ChatAegis("big:8b", base_url=server.base_url), pull=False)
    with pytest.raises(AegisModelNotFoundError, match="registry"):
        heat(ChatAegis("nobody-has-it", base_url=server.base_url))
    assert "/api/chat" not in server.routes


def test_a_download_survives_lost_connections(server, heat, waits):
    """And goes on where it broke off: no byte comes twice."""
    server.fail("cut", times=3, after=5, path="/api/pull")
    server.fail(503, times=1, path="/api/pull")
    told = []
    warmed = heat(ChatAegis("big:8b", base_url=server.base_url), report=told.append)
    assert warmed.resident
    assert server.routes["/api/pull"] == 5
    assert server.counters.pulled_bytes == 4_000_000_000
    assert len([each for each in told if each.phase == "retry"]) == len(waits) == 4
    assert waits[:3] == [0.5, 0.5, 0.5]  # each attempt had brought something


def test_a_download_that_never_moves_ends(server, heat, waits):
    """After a few attempts that wait ever longer."""
    server.fail("cut", times=None, after=0, path="/api/pull")
    with pytest.raises((AegisServerError, AegisConnectionError)):
        heat(ChatAegis("big:8b", base_url=server.base_url))
    assert server.routes["/api/pull"] == MOST_FAILURES + 1
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("said", "again"),
    [
        ("max retries exceeded: unexpected EOF", True),
        ('Get "https://registry.ollama.ai/v2/": dial tcp: lookup registry.ollama.ai: no such host', True),
        ("write /root/.ollama/models/blobs/x: no space left on device", False),
        ("pull model manifest: 412: this model requires a newer version of Ollama", False),
    ],
)
def test_only_what_may_pass_is_tried_again(server, heat, waits, said, again):
    """The server's words decide."""
    server.fail("error", times=1, after=1, path="/api/pull", message=said)
    model = ChatAegis("big:8b", base_url=server.base_url)
    if again:
        assert heat(model).resident
    else:
        with pytest.raises(AegisServerError, match="could not pull"):
            heat(model)
        assert server.routes["/api/pull"] == 1


def test_what_unloads_itself_cannot_be_warmed(server, heat):
    with pytest.raises(AegisConfigError, match="keep_alive=0"):
        heat(ChatAegis("m", base_url=server.base_url, keep_alive=0))


def test_warming_shares_runner_options_like_a_call(server, heat):
    """The largest window that was asked for; and what is strict says so."""
    large = ChatAegis("m", base_url=server.base_url, num_ctx=8192)
    small = ChatAegis("m", base_url=server.base_url, num_ctx=4096)
    heat(large)
    assert heat(small).window_tokens == 8192
    assert server.counters.loads == 1
    with pytest.raises(AegisReloadError):
        heat(ChatAegis("m", base_url=server.base_url, num_ctx=2048, on_reload="raise"))


def test_a_dead_server_is_an_error_at_once(heat):
    with pytest.raises(AegisConnectionError):
        heat(ChatAegis("m", base_url="http://127.0.0.1:1"))


def test_a_model_on_several_servers_is_loaded_on_all(heat):
    """And the one that cannot keep it is told."""
    with ScriptedOllama("m") as one, ScriptedOllama("m", registry=[]) as other:
        warmed = heat(ChatAegis("m", base_url=[one.base_url, other.base_url], num_ctx=2048))
        assert (warmed.resident, warmed.window_tokens) == (True, 2048)
        assert (one.counters.loads, other.counters.loads) == (1, 1)


# -- several models --


def test_the_largest_is_loaded_first():
    """It gets an empty memory; a small one fits beside it sooner than the other way round."""
    models = [EMBED, ScriptedModel(name="m", file_bytes=900_000_000), BIG]
    with ScriptedOllama(models) as server:
        targets = [Target(model=name) for name in ("embed", "m", "big:8b")]
        found = warm(targets, shared_client(server.base_url), Timeouts())
        assert [each.model for each in found] == ["embed:latest", "m:latest", "big:8b"]
        assert all(each.resident for each in found)
        order = [seen.body["model"] for seen in server.requests if seen.path in ("/api/chat", "/api/embed")]
        assert order == ["big:8b", "m", "embed"]
        assert server.counters.loads == 3


def test_what_does_not_fit_together_is_said_and_loaded_once():
    with ScriptedOllama([EMBED, BIG], max_loaded=1) as server:
        found = warm([Target(model=n) for n in ("embed", "big:8b")], shared_client(server.base_url), Timeouts())
        assert [each.resident for each in found] == [True, False]
        assert server.counters.loads == 2


def test_a_model_that_is_loaded_already_is_left_as_it_is(server):
    """Another program's window is not taken from it."""
    ChatAegis("m", base_url=server.base_url, num_ctx=8192).invoke("What is it?")
    (found,) = warm([Target(model="m", body={"keep_alive": "2h"})], shared_client(server.base_url), Timeouts())
    assert (found.window_tokens, server.counters.loads) == (8192, 1)
    assert found.stays_s > 7_000


def test_what_another_client_shortened_is_prolonged(server):
    """Whoever comes last decides how long a model stays, so somebody has to look."""
    client = shared_client(server.base_url)
    targets = [Target(model="m", body={"keep_alive": -1}), Target(model="embed", body={"keep_alive": -1})]
    warm(targets, client, Timeouts())
    assert fading(targets, client.ps(), within_s=60) == []
    client.chat({"model": "m", "messages": [], "keep_alive": "20s"})  # some other program
    client.chat({"model": "embed", "messages": [], "keep_alive": 0})
    assert fading(targets, client.ps(), within_s=60) == targets
    assert fading(targets, client.ps(), within_s=5) == targets[1:]
    found = warm(fading(targets, client.ps(), within_s=60), client, Timeouts())
    assert [each.stays_s for each in found] == [None, None]


def test_the_servers_times_are_read():
    assert stays_s({"expires_at": "2319-03-05T00:00:00Z"}) is None
    assert stays_s({}) is None
    assert stays_s({"expires_at": "2020-11-22T12:39:43.903748202Z"}) == 0.0
    soon = time.strftime("%Y-%m-%dT%H:%M:%S.123456789Z", time.gmtime(time.time() + 100))
    assert 95 < stays_s({"expires_at": soon}) <= 101


# -- the command --


def test_the_command_pulls_with_a_bar_and_resumes(server, waits):
    """On a terminal: bytes, speed, time left."""
    server.fail("cut", times=1, after=6, path="/api/pull")
    done = run("big:8b", "--ollama-url", server.base_url, FORCE_COLOR="1", COLUMNS="160")
    assert done.exit_code == 0, done.output
    assert "the download broke off and goes on" in done.stderr
    assert "4.0/4.0 GB" in done.stderr
    assert "━" in done.stderr
    assert "big:8b" in done.stdout
    assert server.counters.pulled_bytes == 4_000_000_000


def test_the_command_says_lines_where_there_is_no_terminal(server):
    """In a log, each step once."""
    done = run("big:8b", "embed", "--ollama-url", server.base_url, "--json")
    assert done.exit_code == 0, done.output
    lines = done.stderr.splitlines()
    assert len(lines) == len(set(lines)) < 12
    assert "big:8b: loading" in lines
    big, embed = json.loads(done.stdout)
    assert (big["model"], big["resident"], big["pulled_bytes"], embed["resident"]) == (
        "big:8b",
        True,
        4_000_000_000,
        True,
    )


def test_the_command_takes_the_applications_models(server, tmp_path):
    """From the environment, with a window and a system prompt."""
    rules = tmp_path / "rules.txt"
    rules.write_text(RULES, encoding="utf-8")
    done = run(
        "--ollama-url", server.base_url, "--num-ctx", "8192", "--keep-alive", "-1", "--system", str(rules), "--json",
        OLLAMA_MODEL_GENERATION="m", OLLAMA_MODEL_EMBEDDINGS="embed",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    chat, embed = json.loads(done.stdout)
    assert (chat["model"], chat["window_tokens"], chat["stays_s"], chat["prefilled_tokens"] > 300) == (
        "m:latest", 8192, None, True)  # fmt: skip
    assert embed["model"] == "embed:latest"
    model = ChatAegis("m", base_url=server.base_url, num_ctx=8192)
    model.invoke("What is it?")
    assert server.counters.loads == 2


def test_the_command_says_what_does_not_fit():
    with ScriptedOllama([EMBED, BIG], max_loaded=1) as server:
        done = run("embed", "big:8b", "--ollama-url", server.base_url)
        assert done.exit_code == 1
        assert "do not fit together" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name a model"),
        (("m", "--system", "/nowhere/rules.txt"), "--system"),
        (("m", "--keep-alive", "0"), "keep_alive=0"),
        (("big:8b", "--no-pull"), "ollama pull big:8b"),
        (("nosuch:1b",), "'nosuch:1b' cannot be pulled: the registry does not have"),
    ],
)
def test_the_command_says_what_is_wrong(server, arguments, said):
    done = run(*arguments, "--ollama-url", server.base_url)
    assert isinstance(done.exception, AegisConfigError | AegisModelNotFoundError)
    assert said in str(done.exception)


def test_watching_loads_again_what_another_client_unloaded(server, monkeypatch):
    """Until it is told to stop."""
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        client = shared_client(server.base_url)
        if len(looks) == 1:
            client.chat({"model": "m", "messages": [], "keep_alive": 0})
            assert client.ps() == []
        elif len(looks) == 2:
            assert [each["model"] for each in client.ps()] == ["m:latest"]
            server.fail(503, times=1, path="/api/ps")
        elif len(looks) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("langchain_aegis.cli_warm.time.sleep", sleep)
    done = run("m", "--ollama-url", server.base_url, "--watch", "30")
    assert done.exit_code == 0, done.output
    assert looks == [30] * 4
    assert "warmed again: m" in done.stderr
    assert "not warm:" in done.stderr
