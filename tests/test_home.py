"""The home directory is private, always found, and holds one secret that all processes agree on."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.home import aegis_home, load_secret
from langchain_aegis.settings import AegisSettings


@pytest.fixture(autouse=True)
def no_home(monkeypatch, tmp_path):
    """Begin with none of the variables, and a temporary directory of the test's own."""
    for name in ("AEGIS_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_order_of_places(monkeypatch, tmp_path):
    assert aegis_home() == tmp_path / f"langchain-aegis-{os.getuid()}"
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert aegis_home() == tmp_path / "me/.cache/langchain-aegis"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert aegis_home() == tmp_path / "xdg/langchain-aegis"
    monkeypatch.setenv("AEGIS_HOME", str(tmp_path / "env"))
    assert aegis_home() == tmp_path / "env"
    assert aegis_home(AegisSettings(home=str(tmp_path / "told"))) == tmp_path / "told"


@pytest.mark.parametrize("value", ["", " ", "relative/path"])
def test_empty_and_relative_home_directories_are_passed_over(monkeypatch, tmp_path, value):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", value)
    assert aegis_home() == tmp_path / f"langchain-aegis-{os.getuid()}"


def test_a_home_that_cannot_be_made_is_passed_over(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert aegis_home() == tmp_path / f"langchain-aegis-{os.getuid()}"


def test_a_told_home_that_cannot_be_made_is_an_error_that_names_it(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AEGIS_HOME", str(tmp_path / "file/below"))
    with pytest.raises(AegisConfigError, match=r"AEGIS_HOME=.*file/below"):
        aegis_home()


def test_the_directory_is_for_the_owner_only(monkeypatch, tmp_path):
    open_to_all = tmp_path / "open"
    open_to_all.mkdir(mode=0o777)
    open_to_all.chmod(0o777)
    monkeypatch.setenv("AEGIS_HOME", str(open_to_all))
    assert mode(aegis_home()) == 0o700
    monkeypatch.setenv("AEGIS_HOME", str(tmp_path / "new"))
    assert mode(aegis_home()) == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a directory that belongs to somebody else")
def test_a_temporary_directory_of_somebody_else_is_refused(tmp_path):
    """Whoever made it could put a secret of his own there."""
    theirs = tmp_path / f"langchain-aegis-{os.getuid()}"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    with pytest.raises(AegisConfigError, match="another user"):
        aegis_home()


def test_the_secret_is_made_once_and_kept_for_the_owner():
    settings = AegisSettings()
    secret = load_secret(settings)
    assert len(secret) == 32
    assert load_secret(settings) == secret
    assert [p.name for p in aegis_home().iterdir()] == ["secret"]
    assert mode(aegis_home() / "secret") == 0o600


def test_a_secret_from_the_settings_needs_no_file():
    assert load_secret(AegisSettings(secret_key="sixteen-letters!")) == b"sixteen-letters!"
    assert not list(aegis_home().iterdir())


def test_a_damaged_secret_is_an_error_that_says_what_to_do():
    (aegis_home() / "secret").write_bytes(b"short")
    with pytest.raises(AegisConfigError, match="remove it"):
        load_secret(AegisSettings())


def test_a_secret_that_cannot_be_read_is_an_error_that_says_what_to_set():
    (aegis_home() / "secret").mkdir()
    with pytest.raises(AegisConfigError, match="AEGIS_SECRET_KEY"):
        load_secret(AegisSettings())


def test_processes_that_start_at_once_agree_on_one_secret(tmp_path):
    """All wait at a line of their own, then make the secret together."""
    code = (
        "import sys; from langchain_aegis.home import load_secret; from langchain_aegis.settings import AegisSettings\n"
        "settings = AegisSettings(home=sys.argv[1]); print('ready', flush=True); sys.stdin.readline()\n"
        "print(load_secret(settings).hex())"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "shared")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    try:
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        secrets = {child.communicate(timeout=60)[0].strip() for child in children}
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert len(secrets) == 1
    assert len(bytes.fromhex(secrets.pop())) == 32
    assert [p.name for p in (tmp_path / "shared").iterdir()] == ["secret"]


def test_who_comes_second_while_he_writes_takes_the_secret_of_the_first(monkeypatch):
    others, settings, fsync = [], AegisSettings(), os.fsync

    def meanwhile(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        others.append(load_secret(settings))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", meanwhile)
    assert [load_secret(settings)] == others
    assert [path.name for path in aegis_home().iterdir()] == ["secret"]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_of_eight_workers_that_make_the_secret_at_once_each_gets_the_same_one_and_nobody_sees_a_part_of_it(tmp_path):
    """Forked, so that they begin within microseconds of each other; a reader looks on all the while."""
    for number in range(2):
        home, go, told = tmp_path / str(number), os.pipe(), os.pipe()
        settings, children = AegisSettings(home=str(home)), []
        for _ in range(8):
            if (pid := os.fork()) == 0:
                code = 1
                try:
                    os.umask(0)  # an application's own business: the file is for its owner all the same
                    os.read(go[0], 1)
                    os.write(told[1], load_secret(settings))  # so little is written at once
                    code = 0
                finally:
                    os._exit(code)
            children.append(pid)
        os.write(go[1], b"g" * 8)
        seen, ended = set(), []
        while len(ended) < len(children):
            ended += [pid for pid in set(children) - set(ended) if os.waitpid(pid, os.WNOHANG)[0]]
            if (home / "secret").exists():
                seen.add(((home / "secret").read_bytes(), mode(home / "secret")))
        secrets = os.read(told[0], 8 * 32 + 1)
        for end in (*go, *told):
            os.close(end)
        assert len(secrets) == 8 * 32
        assert {(secrets[at : at + 32], 0o600) for at in range(0, 8 * 32, 32)} == seen | {(secrets[:32], 0o600)}
        assert [path.name for path in home.iterdir()] == ["secret"]
        assert (mode(home), (home / "secret").read_bytes()) == (0o700, secrets[:32])
