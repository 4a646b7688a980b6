"""One Redis server for all processes of a user, gone when they are."""

import asyncio
import fcntl
import gc
import json
import logging
import os
import shlex
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import redis
from conftest import is_running, running_redis, short_directory, wait_until

from langchain_aegis.embedded import EmbeddedRedis
from langchain_aegis.embedded import redis as embedded_redis
from langchain_aegis.embedded.guard import ReadyLine, ReadySocket, SharedServer, socket_path
from langchain_aegis.errors import AegisConfigError, AegisConnectionError

USER = """
import sys
from langchain_aegis.embedded import EmbeddedRedis
server = EmbeddedRedis()
info = server.start()
print(info.pid, info.keeper_pid, server.url, flush=True)
sys.stdin.read()
"""


class User:
    """Another process that uses the shared server until its stdin is closed."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self):
        pid, keeper_pid, self.url = self.process.stdout.readline().split()
        self.server_pid, self.keeper_pid = int(pid), int(keeper_pid)
        return self

    def __exit__(self, *_):
        if not self.process.stdin.closed:
            self.process.communicate(timeout=10)


@pytest.fixture
def client():
    """A function that connects to a URL; closed at the end."""
    clients = []
    yield lambda url: clients.append(redis.Redis.from_url(url)) or clients[-1]
    for each in clients:
        each.close()


def children():
    return [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]


def server_of(lock):
    """Return the server's process id once the keeper has noted it."""
    try:
        return json.loads(lock.read_text())["server"]
    except (OSError, ValueError):
        return None


# Life of the shared server


def test_other_processes_attach_and_the_last_one_saves(home, client):
    with User() as first, User() as second, EmbeddedRedis() as server:
        assert first.server_pid == second.server_pid == server.pid
        client(first.url).set("k", "kept")
        pid = server.pid
        first.process.communicate(timeout=10)
        second.process.communicate(timeout=10)
    assert not is_running(pid)  # saved when close() returns, so that a container may end at once
    with EmbeddedRedis() as server:
        assert server.pid != pid
        assert client(server.url).get("k") == b"kept"


def test_a_search_index_survives_the_restart(home, client):
    with EmbeddedRedis() as server:
        client(server.url).execute_command("FT.CREATE", "idx", "PREFIX", 1, "d:", "SCHEMA", "t", "TAG")
        client(server.url).hset("d:1", "t", "x")
        pid = server.pid
    wait_until(lambda: not is_running(pid), 5)
    with EmbeddedRedis() as server:
        found = wait_until(lambda: client(server.url).execute_command("FT.SEARCH", "idx", "@t:{x}"))
        assert b"d:1" in str(found).encode()


@pytest.mark.slow
def test_killing_all_users_ends_the_server(home):
    with User() as first, User() as second:
        for user in (first, second):
            user.process.kill()
        wait_until(lambda: not is_running(first.server_pid), 5, "the end of the server")
        wait_until(lambda: not is_running(first.keeper_pid), 5, "the end of the keeper")


def test_killing_one_user_leaves_the_server_to_the_others(home, client):
    with User() as first, User() as second:
        client(second.url).set("k", "v")
        first.process.kill()
        first.process.wait(5)
        with EmbeddedRedis() as third:  # the keeper serves new users, so it has seen the end of the first
            assert third.pid == second.server_pid
            assert client(third.url).get("k") == b"v"


def test_killing_the_keeper_ends_the_server(home):
    with User() as user:
        os.kill(user.keeper_pid, signal.SIGKILL)
        wait_until(lambda: not is_running(user.server_pid), 5, "the end of the server")
        with EmbeddedRedis() as server:
            assert server.url == user.url
            assert server.pid != user.server_pid


def test_killing_everything_at_once_leaves_nothing(home):
    with User() as user:
        for pid in (user.process.pid, user.keeper_pid):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_running(user.server_pid), 5, "the end of the server")


def test_processes_that_start_at_once_agree_on_one_server(home):
    users = [User() for _ in range(6)]
    entered = [user.__enter__() for user in users]
    try:
        assert len({user.server_pid for user in entered}) == 1
        assert len({user.keeper_pid for user in entered}) == 1
    finally:
        for user in users:
            user.__exit__()


def test_threads_that_start_at_once_share_one_lease(home, open_descriptors):
    before = open_descriptors()
    barrier, pids = threading.Barrier(8), []
    servers = [EmbeddedRedis() for _ in range(8)]

    def start(server):
        barrier.wait(5)
        pids.append(server.pid)

    threads = [threading.Thread(target=start, args=(server,)) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(pids) == 8
    assert len(set(pids)) == 1
    wait_until(lambda: open_descriptors() == before + 1, what="the descriptors")
    for server in servers[1:]:
        server.close()
        server.close()
    wait_until(lambda: open_descriptors() == before + 1, what="the descriptors")
    assert is_running(servers[0].pid)
    servers[0].close()
    wait_until(lambda: open_descriptors() <= before, what="the descriptors")


def test_a_killed_server_is_started_again_at_the_same_url(home, client):
    with EmbeddedRedis() as server, EmbeddedRedis() as other:
        url, pid = server.url, server.pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: server.pid != pid, 5, "the start of a new server")
        assert server.url == url
        assert client(url).ping()
        assert other.pid == server.pid
        new = server.pid
    wait_until(lambda: not is_running(new), 5, "the end of the server")


def test_the_next_start_waits_for_the_end_of_the_last(home, client):
    for count in range(3):
        with EmbeddedRedis() as server:
            assert client(server.url).incr("count") == count + 1
            keeper = server.start().keeper_pid
        os.kill(keeper, signal.SIGTERM)  # a start in the middle of the end, not within its grace


def test_a_forked_child_takes_a_lease_of_its_own(home):
    with EmbeddedRedis() as server:
        pid = server.pid
        read, write = os.pipe()
        told_read, told_write = os.pipe()
        if (child := os.fork()) == 0:
            try:
                os.write(write, json.dumps([server.pid]).encode())
                os.read(told_read, 1)
                server.close()
            finally:
                os._exit(0)
        assert json.loads(os.read(read, 100)) == [pid]
    assert is_running(pid)  # the child still uses it
    os.write(told_write, b"x")
    os.waitpid(child, 0)
    wait_until(lambda: not is_running(pid), 5, "the end of the server")
    for descriptor in (read, write, told_read, told_write):
        os.close(descriptor)


def test_a_forked_child_that_does_nothing_holds_nothing(home):
    server = EmbeddedRedis()
    pid = server.pid
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    server.close()
    wait_until(lambda: not is_running(pid), 5, "the end of the server")
    assert is_running(child)
    os.close(write)
    os.waitpid(child, 0)
    os.close(read)


def test_the_exit_of_a_forked_child_does_not_touch_the_parents_lease(home, client):
    with EmbeddedRedis() as server:
        pid = server.pid
        if (child := os.fork()) == 0:
            server.close()
            os._exit(0)
        os.waitpid(child, 0)
        with User() as user:  # the keeper has handled whatever the child did
            assert user.server_pid == pid
        assert server.pid == pid
        assert client(server.url).ping()


@pytest.mark.slow
def test_neither_descriptors_nor_zombies_remain(home, open_descriptors):
    gc.collect()  # what earlier tests have left is closed now, not in between
    before, others = open_descriptors(), children()  # a server of the session's may be another test's
    for shared in (True, False):
        with EmbeddedRedis(shared=shared) as server:
            assert server.pid
        assert children() == others
    gc.collect()
    wait_until(lambda: open_descriptors() <= before, what="the descriptors")


def test_an_interrupt_in_the_terminal_reaches_neither_keeper_nor_server(home):
    with EmbeddedRedis() as server:
        info = server.start()
        for pid in (info.pid, info.keeper_pid):
            assert os.getsid(pid) != os.getsid(0)
            assert os.getpgid(pid) != os.getpgid(0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # that is the point
def test_a_fork_during_the_start_holds_nothing(home):
    code = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)\nprint('{}', flush=True)\n"
    command = [sys.executable, "-c", f"{code}time.sleep(100)", str(home / "go")]
    server = SharedServer("slow", home, command, ready=ReadyLine())
    starting = threading.Thread(target=server.acquire)
    starting.start()
    pid = wait_until(lambda: server_of(home / "slow.lock"))
    read, write = os.pipe()
    forked, ready = os.pipe()
    if (child := os.fork()) == 0:
        os.close(write)
        os.write(ready, b"x")  # what is to be done after a fork is done
        os.read(read, 1)
        os._exit(0)
    assert os.read(forked, 1) == b"x"
    os.close(forked)
    os.close(ready)
    (home / "go").touch()
    starting.join(60)
    assert not starting.is_alive()
    server.release(wait_s=5)
    assert not is_running(pid)
    assert is_running(child)
    with open(home / "slow.start", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(write)
    os.waitpid(child, 0)
    os.close(read)


def test_the_signal_mask_of_the_starter_does_not_matter(home):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    try:
        with EmbeddedRedis() as server:
            pid = server.pid
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: server.pid != pid, 5, "the start of a new server")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Where it lives


def test_only_this_user_can_reach_it(home):
    with EmbeddedRedis() as server:
        path = Path(server.url.removeprefix("unix://"))
        assert path.parent == home
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE((home / "redis").stat().st_mode) == 0o700
        with redis.Redis.from_url(server.url) as connection:
            assert [*connection.config_get("port").values()] in (["0"], [b"0"])


@pytest.fixture
def deep(home):
    """A function that makes a home whose sockets may have to lie elsewhere."""
    made = []
    yield lambda name: made.append(home / name) or made[-1]
    for path in made:
        if (elsewhere := socket_path(path, "s").parent) != path:
            elsewhere.rmdir()


@pytest.mark.parametrize("name", ["x" * 150, "with space é %2F?#", "quote'\""])
def test_any_home_works(name, deep, client):
    deep = deep(name)
    with EmbeddedRedis(deep) as server:
        url = server.url
        assert len(client(url).connection_pool.connection_kwargs["path"].encode()) < 100
        client(url).set("k", "v")
        pid = server.pid
        with EmbeddedRedis(deep) as other:
            assert other.pid == pid
    wait_until(lambda: not is_running(pid), 5)
    assert any((deep / "redis" / "aof").iterdir())
    with EmbeddedRedis(deep) as server:
        assert server.url == url
        assert client(url).get("k") == b"v"


def test_a_directory_for_sockets_that_others_may_enter_is_refused(home):
    deep = home / ("x" * 150)
    deep.mkdir(0o700)
    directory = socket_path(deep, "s").parent
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    directory.chmod(0o755)
    with pytest.raises(AegisConfigError, match="not ours alone"):
        EmbeddedRedis(deep).start()
    directory.rmdir()
    directory.symlink_to(home)
    with pytest.raises(AegisConfigError, match="not ours alone"):
        EmbeddedRedis(deep).start()
    directory.unlink()


def test_two_homes_have_two_servers(home):
    with EmbeddedRedis(home / "a") as a, EmbeddedRedis(home / "b") as b:
        assert a.pid != b.pid
        assert a.url != b.url


def test_servers_that_cannot_read_each_others_data_are_kept_apart(home, client):
    with EmbeddedRedis() as search, EmbeddedRedis(search=False) as plain:
        assert search.pid != plain.pid
        assert (search.has_search, plain.has_search) == (True, False)


@pytest.mark.parametrize("content", [b"REDIS0099 from a later version", os.urandom(2000)], ids=["later", "noise"])
def test_damaged_data_is_moved_aside_with_one_warning(content, home, client, caplog):
    with EmbeddedRedis() as server:
        client(server.url).set("k", "v")
        pid = server.pid
    wait_until(lambda: not is_running(pid), 5)
    manifest = home / "redis" / "aof" / "appendonly.aof.manifest"
    manifest.write_bytes(content)
    with caplog.at_level(logging.WARNING, "langchain_aegis"), EmbeddedRedis() as server:
        assert client(server.url).dbsize() == 0
        with EmbeddedRedis() as other:
            assert other.pid == server.pid
    warned = [record.getMessage() for record in caplog.records if record.name == "langchain_aegis"]
    assert len(warned) == 1
    assert "aof.damaged" in warned[0]
    assert (home / "redis" / "aof.damaged" / manifest.name).read_bytes() == content


@pytest.fixture
def slow_to_load(home, monkeypatch, client):
    """An EmbeddedRedis whose saved data takes about 3 s to be read, three times as long as a start may take."""
    program = home / "slow-redis"
    real = embedded_redis._server_program(None)
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(real)} "$@" --key-load-delay 300\n')
    program.chmod(0o700)
    with EmbeddedRedis(server=program, search=False) as server:
        pipe = client(server.url).pipeline(transaction=False)
        for number in range(10_000):  # DEBUG POPULATE is not in the log
            pipe.set(f"k{number}", "v")
        pipe.execute()
    monkeypatch.setattr(embedded_redis, "_START_TIMEOUT_S", 1.0)
    return EmbeddedRedis(server=program, search=False)


@pytest.mark.slow
def test_a_server_that_reads_much_data_is_waited_for(slow_to_load, client, caplog):
    with caplog.at_level(logging.WARNING, "langchain_aegis"), slow_to_load as server:
        assert client(server.url).dbsize() == 10_000
    (said,) = [record.getMessage() for record in caplog.records if record.name == "langchain_aegis"]
    assert "still reads its saved data" in said
    assert "300 s" in said


@pytest.mark.slow
def test_a_server_that_reads_data_too_long_says_where_it_is(slow_to_load, home, monkeypatch):
    monkeypatch.setattr(embedded_redis, "_LOADING_TIMEOUT_S", 1.5)
    with pytest.raises(AegisConnectionError, match=r"still read its data after 1\.5 s") as caught:
        slow_to_load.start()
    (data,) = home.glob("redis-*/aof")  # nothing was moved or lost
    assert f"its data is in {data}: move that away, or delete it" in str(caught.value)


def test_what_was_removed_before_a_crash_stays_removed(home, client):
    with EmbeddedRedis() as server:
        client(server.url).set("kept", "1")
        client(server.url).set("removed", "1")
        client(server.url).delete("removed")
        pid = server.pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: server.pid != pid, 5)  # asked for again, it is started again
        assert (client(server.url).get("kept"), client(server.url).get("removed")) == (b"1", None)


# A server of one's own


def test_a_private_server_is_gone_with_its_directory_when_closed(home):
    server = EmbeddedRedis(shared=False)
    with server, EmbeddedRedis(shared=False) as other:
        assert server.pid != other.pid
        directory, pid = Path(server.url.removeprefix("unix://")).parent, server.pid
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert not is_running(pid)
    assert not directory.exists()
    with server:  # and it may be started again, empty
        assert server.pid != pid


def test_a_private_server_ends_with_a_killed_process(home):
    code = USER.replace("EmbeddedRedis()", "EmbeddedRedis(shared=False)")
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        pid, _, url = process.stdout.readline().split()
        process.kill()
        wait_until(lambda: not is_running(int(pid)), 5, "the end of the server")
        wait_until(lambda: not Path(url.removeprefix("unix://")).parent.exists(), 5, "the end of its directory")


@pytest.mark.parametrize("kind", ["valkey+search", "redis8+search", "plain"])
def test_every_kind_of_server_runs(kind, client):
    with running_redis(kind) as server:
        assert server.has_search == (kind != "plain")
        if server.has_search:
            assert client(server.url).execute_command("FT._LIST") is not None


# Async


async def test_start_does_not_block_the_event_loop(home, loop_errors):
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    async with EmbeddedRedis() as server:
        during_start = ticks
        async with redis.asyncio.Redis.from_url(await asyncio.to_thread(lambda: server.url)) as connection:
            assert await connection.ping()
    ticking.cancel()
    assert during_start > 10


async def test_a_cancelled_start_leaves_no_server(home, open_descriptors):
    before = open_descriptors()
    server = EmbeddedRedis()
    entering = asyncio.create_task(server.__aenter__())
    await asyncio.to_thread(wait_until, lambda: (home / "redis.lock").exists())
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert open_descriptors() <= before + 4  # the loop's own executor may have opened some
    note = json.loads(await asyncio.to_thread(wait_until, lambda: (home / "redis.lock").read_text()))
    await asyncio.to_thread(wait_until, lambda: not is_running(note["keeper"]), 5, "the end of the keeper")


# Errors


def test_a_server_that_cannot_start_says_why_in_one_line(home):
    others = children()
    with pytest.raises(AegisConfigError, match="AEGIS_REDIS_SERVER") as caught:
        EmbeddedRedis(server="/no/such/server").start()
    assert "\n" not in str(caught.value)
    with pytest.raises(AegisConnectionError, match="exit code 1") as caught:
        EmbeddedRedis(server="/bin/false", search=False).start()
    assert "\n" not in str(caught.value)
    assert children() == others


def test_data_is_not_moved_aside_when_it_is_not_the_reason(home):
    (home / "d").write_text("data")
    script = [sys.executable, "-c", "print('no luck today'); raise SystemExit(3)"]
    server = SharedServer("broken", home, script, ready=ReadyLine(), spare=[home / "d"])
    with pytest.raises(AegisConnectionError, match=r"exit code 3.*no luck today"):
        server.acquire()
    assert (home / "d").read_text() == "data"


def test_the_server_comes_from_the_environment(home, monkeypatch):
    monkeypatch.setenv("AEGIS_REDIS_SERVER", "/no/such/server")
    with pytest.raises(AegisConfigError, match="/no/such/server"):
        EmbeddedRedis().start()


@pytest.mark.parametrize("platform", ["linux-aarch64", "darwin-arm64"])
def test_a_platform_without_search_is_told_what_to_do(platform, home, monkeypatch):
    monkeypatch.setattr(embedded_redis, "_platform", lambda: platform)
    with pytest.raises(AegisConfigError, match=f"No embedded Redis.* for {platform}.*REDIS_URL") as caught:
        EmbeddedRedis().start()
    assert "\n" not in str(caught.value)


def test_without_the_search_module_it_runs_plain_if_allowed(home, monkeypatch):
    monkeypatch.setattr(
        embedded_redis,
        "package_path",
        lambda name, real=embedded_redis.package_path: real(name) if "valkey" in name else None,
    )
    with pytest.raises(AegisConfigError, match=r"pip install 'langchain-aegis\[embedded\]'"):
        EmbeddedRedis().start()
    with EmbeddedRedis(search=None) as server:
        assert not server.has_search


def test_a_missing_package_is_named(home, monkeypatch):
    monkeypatch.setattr(embedded_redis, "package_path", lambda name: None)
    with pytest.raises(AegisConfigError, match=r"pip install 'langchain-aegis\[embedded\]'"):
        EmbeddedRedis().start()


# The guard with another server than Redis

ECHO = """
import json, os, signal, socket, sys, time
print("a word before", flush=True)
listener = socket.create_server(("127.0.0.1", 0))
print(json.dumps({"port": listener.getsockname()[1], "mode": os.environ["MODE"]}), flush=True)
for _ in range(3000):
    print("x" * 1000, flush=True)
while True:
    time.sleep(1)
"""


def test_a_server_that_prints_its_address_is_shared_too(home):
    make = lambda: SharedServer(  # noqa: E731
        "echo", home, [sys.executable, "-c", ECHO], ready=ReadyLine(), env={"MODE": "m"}, address={"models": ["a"]}
    )
    first, second = make(), make()
    info = first.acquire()
    assert info.address["port"] > 0
    assert (info.address["mode"], info.address["models"]) == ("m", ["a"])
    assert second.acquire() == info
    wait_until(lambda: (home / "echo.log").stat().st_size > 3_000_000, 20, "all of its output in the log")
    first.release()
    first.release()
    assert is_running(info.pid)
    second.release(wait_s=5)
    assert not is_running(info.pid)


def test_a_server_that_is_never_ready_is_given_up(home):
    sleeper = [sys.executable, "-c", "import time; print('still loading', flush=True); time.sleep(60)"]
    server = SharedServer("slow", home, sleeper, ready=ReadySocket(str(home / "no.sock")), timeout_s=0.5)
    with pytest.raises(AegisConnectionError, match=r"not ready within 0\.5 s.*still loading"):
        server.acquire()
    note = json.loads((home / "slow.lock").read_text())
    wait_until(lambda: not is_running(note["server"]), 5)


def test_a_frozen_server_is_killed_when_the_last_user_leaves(home):
    server = SharedServer(
        "frozen",
        home,
        [sys.executable, "-c", "import time; print('{}', flush=True); time.sleep(100)"],
        ready=ReadyLine(),
        grace_s=0,
        stop_timeout_s=0.3,
    )
    pid = server.acquire().pid
    os.kill(pid, signal.SIGSTOP)
    server.release(wait_s=5)
    assert not is_running(pid)


def test_children_of_the_server_end_with_it(home):
    code = (
        "import json, subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)']); "
        "print(json.dumps({'child': child.pid}), flush=True); time.sleep(100)"
    )
    server = SharedServer("parent", home, [sys.executable, "-c", code], ready=ReadyLine())
    child = server.acquire().address["child"]
    server.release(wait_s=5)
    wait_until(lambda: not is_running(child), 5)


def test_the_keeper_needs_the_standard_library_alone():
    code = "import sys; sys.argv = ['keeper']; import langchain_aegis.embedded.keeper as k; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"langchain_core", "redis", "numpy", "pydantic"} & set(loaded)
    assert [name for name in loaded if name.startswith("langchain_aegis.")] == [
        "langchain_aegis.embedded",
        "langchain_aegis.embedded.keeper",
    ]


def test_a_home_helper_waits_for_its_servers():
    with short_directory() as path, EmbeddedRedis(path) as server:
        pid = server.pid
    assert not is_running(pid)
