"""What is seen of admissions: `aegis top`, the files behind it, and Prometheus."""

import json
import os
import stat
import subprocess
import sys
import threading
import time

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from typer.testing import CliRunner

from langchain_aegis import AegisConfigError, AegisOverloadedError, BatchingChatModel, ChatAegis, aegis_scope
from langchain_aegis.admission import Admission
from langchain_aegis.cli import app
from langchain_aegis.cli_top import plain, table
from langchain_aegis.live import FRESH_S, Live, Told, told, watch
from langchain_aegis.metrics_admission import register_admission
from langchain_aegis.servers import admissions
from langchain_aegis.tallies import BOUNDS_S, OTHERS, Row, Tally
from langchain_aegis.testing import ScriptedOllama
from langchain_aegis.traits import Traits

DEADLINE_S = 60
BUSY = """
import sys, threading
from langchain_aegis import ChatAegis, aegis_scope
from langchain_aegis.live import told, watch
from langchain_aegis.testing import ScriptedOllama
with ScriptedOllama(slots=1) as server:
    model = ChatAegis("scripted", base_url=server.base_url, max_concurrency=2)
    def call(n):
        with aegis_scope(tenant="acme\\x1b[31m"):
            model.invoke(f"question {n}")
    threads = [threading.Thread(target=call, args=(n,)) for n in range(5)]
    with server.hold():
        watch()  # somebody looks already: what the process does first is seen at once
        for thread in threads:
            thread.start()
        server.wait_until(lambda seen: seen.waiting == 2)
        while [each.servers[server.base_url]["waiting_bulk"] for each in told()] != [3]:
            watch()
            threading.Event().wait(0.01)
        print(server.base_url, flush=True)
        for line in sys.stdin:   # each line: one more call, as an application would make it
            threads.append(threading.Thread(target=call, args=(99,)))
            threads[-1].start()
    for thread in threads:
        thread.join()
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("AEGIS_HOME", str(tmp_path))
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["top", *arguments])


# -- the command


@pytest.mark.slow
def test_a_busy_process_is_seen_by_the_command(home):
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as busy:
        try:
            server = busy.stdout.readline().strip()
            done = run("--json")
            shown = run("--once")
        finally:
            busy.stdin.close()
            busy.wait(DEADLINE_S)
    (process,) = json.loads(done.stdout)
    stats = process["servers"][server]
    assert (process["pid"], stats["running"], stats["waiting_bulk"], stats["max_concurrency"]) == (busy.pid, 2, 3, 2)
    assert (done.exit_code, shown.exit_code) == (0, 0)
    assert "2/2" in shown.stdout
    assert "\x1b[31m" not in shown.stdout
    assert run("--json").stdout.strip() == "[]"  # it has ended, and its file is gone
    assert not list((home / "top").glob("*.json"))


@pytest.mark.slow
def test_without_a_process_it_says_what_to_do(home):
    done = run("--once")
    assert done.exit_code == 1
    assert "AEGIS_HOME" in done.stdout
    assert (run("--json").exit_code, run("--json").stdout.strip()) == (1, "[]")


def test_a_home_that_cannot_be_written_is_named(home):
    (home / "top").write_text("in the way")
    with pytest.raises(AegisConfigError, match="AEGIS_HOME"):
        watch()


def test_names_cannot_steer_the_terminal():
    assert plain("a\x1b[2Jb\u202ec") == "a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}c"
    assert plain("[red]x[/red]") == r"\[red]x\[/red]"
    assert plain(None) == "-"


def test_the_table_has_a_row_per_server_and_per_tenant(capsys):
    from rich.console import Console

    admission = Admission(2, 3)
    with admission.slot(traits=Traits(tenant="acme", model="m")):
        pass
    stats = json.loads(json.dumps({"http://a": stats_of(admission)}))
    Console(width=200).print(table([Told(7, "app", stats)]))
    shown = capsys.readouterr().out
    assert "0/2" in shown
    assert "acme" in shown


def stats_of(admission):
    from dataclasses import asdict

    return asdict(admission.stats())


# -- the files behind it


def test_nothing_is_written_while_nobody_looks(home):
    live = Live()
    before = threading.active_count()
    live.touch()
    assert threading.active_count() == before
    assert not (home / "top").exists()


def test_a_process_that_is_looked_at_writes_for_its_user_only_until_nobody_looks(home):
    live, admission = Live(), Admission(1)
    live.admissions = lambda: {"http://a": admission}
    watch()
    live.touch()
    file = home / "top" / f"{os.getpid()}.json"
    until = time.monotonic() + DEADLINE_S
    while not (found := told()):
        assert time.monotonic() < until
    assert [each.servers["http://a"]["max_concurrency"] for each in found] == [1]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    long_ago = time.time() - 2 * FRESH_S
    os.utime(home / "top" / "watched", (long_ago, long_ago))
    live._thread.join(DEADLINE_S)
    assert not file.exists()


def test_files_of_dead_or_silent_processes_are_removed_and_others_left_alone(home):
    watch()
    folder = home / "top"
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    (folder / f"{dead.pid}.json").write_text('{"pid": 1, "program": "x", "servers": {}}')
    old = folder / f"{os.getpid()}.json"
    old.write_text("{}")
    os.utime(old, (1, 1))
    damaged = folder / f"{os.getppid()}.json"
    damaged.write_text("{")
    assert told() == []
    assert {file.name for file in folder.glob("*.json")} == {damaged.name}


def test_a_disk_that_cannot_be_written_is_nothing_to_the_application(home, monkeypatch):
    live = Live()
    watch()
    monkeypatch.setattr("langchain_aegis.live._write", lambda *_: (_ for _ in ()).throw(OSError("full")))
    live.touch()
    if (thread := live._thread) is not None:
        thread.join(DEADLINE_S)
    assert live._thread is None
    live.touch()


# -- Prometheus


@pytest.fixture
def metrics():
    registry = CollectorRegistry()
    return registry, register_admission(registry, tenants=True)


def test_prometheus_sees_slots_calls_and_waits(metrics):
    registry, _ = metrics
    with ScriptedOllama() as server:
        model = BatchingChatModel(ChatAegis("scripted", base_url=server.base_url), max_concurrency=3, max_waiting=7)
        with aegis_scope(tenant="acme"):
            model.invoke("hello")
        labels = {"server": server.base_url}
        assert registry.get_sample_value("aegis_admission_slots", labels) == 3
        assert registry.get_sample_value("aegis_admission_places", labels) == 7
        assert registry.get_sample_value("aegis_admission_running", labels) == 0
        served = labels | {"model": "scripted:latest", "tenant": "acme", "event": "served"}
        assert registry.get_sample_value("aegis_admission_calls_total", served) == 1
    assert b"# HELP aegis_admission_wait_seconds" in generate_latest(registry)


def test_tenants_are_shown_only_when_told_to():
    registry = CollectorRegistry()
    register_admission(registry)
    with ScriptedOllama() as server, aegis_scope(tenant="secret-customer"):
        ChatAegis("scripted", base_url=server.base_url).invoke("hello")
        assert b"secret-customer" not in generate_latest(registry)
        labels = {"server": server.base_url, "model": "scripted:latest", "event": "served"}
        assert registry.get_sample_value("aegis_admission_calls_total", labels) == 1


def test_a_wait_is_in_the_histogram():
    admission = Admission(1)
    first, second = admission.enter(), admission.enter(traits=Traits(model="m"))
    first.leave()
    second.wait()
    second.leave()
    (row,) = [row for row in admission.stats().rows if row.model == "m"]
    assert sum(row.waits) == 1
    assert row.wait_s(0.5) in BOUNDS_S


def test_they_are_shown_once_per_registry(metrics):
    with pytest.raises(AegisConfigError):
        register_admission(metrics[0])


def test_models_without_an_address_are_listed_while_they_live():
    from langchain_core.language_models import FakeListChatModel

    before = len(admissions())
    model = BatchingChatModel(FakeListChatModel(responses=["x"]))
    assert len(admissions()) == before + 1
    del model


# -- the counts


def test_a_row_counts_by_what_became_of_the_call():
    tally, traits = Tally(), Traits(tenant="a", model="m")
    for event in ("served", "served", "refused", "merged", "expired", "cancelled"):
        tally.count(event, traits)
    (row,) = tally.rows()
    assert (row.served, row.refused, row.merged, row.expired, row.cancelled) == (2, 1, 1, 1, 1)


def test_tenants_from_outside_cannot_fill_the_memory():
    tally = Tally()
    for n in range(3_000):
        tally.count("served", Traits(tenant=f"t{n}"))
    rows = tally.rows()
    assert len(rows) == 1_001
    assert sum(row.served for row in rows) == 3_000
    assert next(row.served for row in rows if row.tenant == OTHERS) == 2_000


@pytest.mark.parametrize(
    ("waits", "median", "most"), [([], 0.0, 0.0), ([0.02] * 9 + [3.0], 0.05, 5.0), ([999], *[float("inf")] * 2)]
)
def test_quantiles_of_waits_are_bounds_that_were_not_exceeded(waits, median, most):
    tally = Tally()
    for seconds in waits:
        tally.waited(Traits(), seconds)
    row = next(iter(tally.rows()), Row(None, None))
    assert (row.wait_s(0.5), row.wait_s(0.99)) == (median, most)


def test_refused_calls_are_counted_for_their_tenant():
    admission = Admission(1, 0)
    with admission.slot():
        for _ in range(3):
            with pytest.raises(AegisOverloadedError):
                admission.enter(traits=Traits(tenant="a"))
    assert {row.tenant: row.refused for row in admission.stats().rows}["a"] == 3
