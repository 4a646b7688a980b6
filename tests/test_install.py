"""The installer: one line for a wrong Python, and nothing to do when all is installed. No network is used."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools/install.sh"
NEVER = "#!/bin/sh\necho 'this must not run' >&2\nexit 99\n"


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def run(*, cwd=ROOT, **environment):
    """Run the installer of `cwd` with a bare environment; an installer that is called for is one that fails."""
    return subprocess.run(
        ["/bin/sh", str(cwd / "tools/install.sh")],
        env={"PATH": "/usr/bin:/bin", **environment},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def clone(tmp_path):
    """A copy of what the installer reads, without an environment."""
    for name in ("requirements.lock", "pyproject.toml", "tools/install.sh", "tools/installer.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    return tmp_path


def python_version(tmp_path: Path, version: str) -> Path:
    """An interpreter that runs, but says that it is another version."""
    real = Path(sys.executable).resolve()
    text = (
        "#!/bin/sh\n"
        f'if [ "$1" = -c ]; then shift; code=$1; shift; exec "{real}" -c "import sys\n'
        f"sys.version_info = ({version.replace('.', ',')}, 0, 'final', 0)\n"
        '$code" "$@"; fi\n'
        f'exec "{real}" "$@"\n'
    )
    return script(tmp_path / f"fake/python{version}", text)


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.14"])
def test_a_wrong_python_gives_one_line_that_names_the_versions(clone, tmp_path, version):
    done = run(cwd=clone, PYTHON=str(python_version(tmp_path, version)), UV=str(script(tmp_path / "uv", NEVER)))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert all(v in done.stderr for v in ("3.11", "3.12", "3.13", "PYTHON="))
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("broken", ["/nonexistent/python", "/bin/false"])
def test_a_python_that_cannot_run_gives_the_same_line(clone, broken):
    done = run(cwd=clone, PYTHON=broken)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "3.11" in done.stderr


def test_the_first_supported_python_is_taken(clone, tmp_path):
    """An old `python3` first in PATH is passed over for a good `python3.12`."""
    for name, version in (("python3", "3.9"), ("python3.12", "3.12")):
        python_version(tmp_path, version).rename(tmp_path / "fake" / name)
    uv = script(tmp_path / "uv", '#!/bin/sh\necho "uv $*"\nexit 7\n')
    done = run(cwd=clone, PATH=f"{tmp_path}/fake:/usr/bin:/bin", UV=str(uv))
    assert done.returncode == 7
    assert "uv venv" in done.stdout


def test_an_installed_environment_is_left_alone(clone, tmp_path):
    """What was installed is written down; the same files and interpreter ask for nothing."""
    good, uv = python_version(tmp_path, "3.12"), script(tmp_path / "uv", "#!/bin/sh\nmkdir -p .venv\n")
    first = run(cwd=clone, PYTHON=str(good), UV=str(uv))
    assert (clone / ".venv/.installed").is_file(), first.stderr
    again = run(cwd=clone, PYTHON=str(good), UV=str(script(tmp_path / "never", NEVER)))
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")

    with (clone / "requirements.lock").open("a") as file:
        file.write("# another pin\n")
    changed = run(cwd=clone, PYTHON=str(good), UV=str(tmp_path / "never"))
    assert changed.returncode == 99


def test_a_failed_installation_is_not_taken_for_a_done_one(clone, tmp_path):
    uv = script(tmp_path / "uv", '#!/bin/sh\n[ "$1" = venv ] && mkdir -p .venv && exit 0\nexit 3\n')
    for _ in range(2):
        assert run(cwd=clone, PYTHON=str(python_version(tmp_path, "3.12")), UV=str(uv)).returncode == 3
        assert not (clone / ".venv/.installed").exists()


@pytest.mark.row(127)
def test_the_lowest_versions_are_taken_into_an_environment_of_their_own(clone, tmp_path):
    """RESOLUTION takes them from pyproject.toml instead of the pins; another one is another environment."""
    log = tmp_path / "told"
    uv = script(
        tmp_path / "uv",
        f'#!/bin/sh\necho "$*" >>"{log}"\nfor last in "$@"; do :; done\n[ "$1" = venv ] && mkdir -p "$last"\nexit 0\n',
    )
    told = {"PYTHON": str(python_version(tmp_path, "3.12")), "VENV": ".venv-other"}
    done = run(cwd=clone, UV=str(uv), RESOLUTION="lowest-direct", **told)
    assert (clone / ".venv-other/.installed").is_file(), done.stderr
    assert not (clone / ".venv").exists()
    compiled, installed = [line for line in log.read_text().splitlines() if line.startswith("pip")][:2]
    assert "--resolution lowest-direct" in compiled and "pyproject.toml" in compiled
    assert "requirements.lock" not in compiled + installed
    assert "-r .venv-other/resolved.txt" in installed
    never = str(script(tmp_path / "never", NEVER))
    assert run(cwd=clone, UV=never, RESOLUTION="lowest-direct", **told).returncode == 0
    assert run(cwd=clone, UV=never, RESOLUTION="highest", **told).returncode == 99


@pytest.mark.parametrize("absolute", [False, True])
def test_the_environment_may_be_here_or_anywhere(clone, tmp_path_factory, absolute):
    """Whoever installs into it is told where it is, in full."""
    place = tmp_path_factory.mktemp("elsewhere") / "an environment" if absolute else clone / ".venv-3.12"
    log = clone / "told"
    uv = script(
        clone / "uv",
        f'#!/bin/sh\necho "$1 in $VIRTUAL_ENV" >>"{log}"\nfor last in "$@"; do :; done\n'
        '[ "$1" = venv ] && mkdir -p "$last"\nexit 0\n',
    )
    told = str(place) if absolute else place.name
    done = run(cwd=clone, PYTHON=str(python_version(clone, "3.12")), UV=str(uv), VENV=told)
    assert (place / ".installed").is_file(), done.stderr
    assert set(log.read_text().splitlines()) - {"venv in "} == {f"pip in {place}"}
