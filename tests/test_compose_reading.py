"""Compose and env files are read as compose reads them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_aegis.ollama.commands import of_health_check, of_service
from langchain_aegis.ollama.compose import check_project
from langchain_aegis.ollama.compose_file import NoComposeFileError, read_compose
from langchain_aegis.ollama.doctor import read_files
from langchain_aegis.ollama.env_files import read_env_file
from langchain_aegis.ollama.interpolation import interpolate, names

LAUGHS = "x0: &x0 [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


def read(tmp_path, text, **values):
    path = tmp_path / "compose.yml"
    path.write_text(text)
    return read_compose(path, values).services


def bad(findings):
    return sorted(f.code for f in findings if f.severity in ("warning", "error"))


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("a", "a"), ("$$A", "$A"), ("$A", "1"), ("${A}", "1"), ("x${A}y", "x1y"), ("${B-d}", "d"), ("${E-d}", ""),
        ("${E:-d}", "d"), ("${A:-d}", "1"), ("${B:--1}", "-1"), ("${B:-${A}}", "1"), ("${B:-${C:-${A}}z}", "1z"),
        ("${A:+yes}", "yes"), ("${B:+yes}", ""), ("${E+yes}", ""), ("${B}", "${B}"), ("${B:?why}", "${B}"),
        ("${A:?why}", "1"), ("$", "$"), ("$1", "$1"), ("${", "${"), ("${}", "${}"), ("100%$", "100%$"),
    ],
)  # fmt: skip
def test_variables_are_filled_in_as_compose_does(text, filled):
    assert interpolate(text, {"A": "1", "E": ""}) == filled


def test_the_variables_of_a_text_are_known():
    assert names("${A:-${B}} $C $$D") == {"A", "B", "C"}


@given(st.text(alphabet="${}:-+?AB a", max_size=40))
def test_no_text_breaks_the_filling_in(text):
    interpolate(text, {"A": "${B}"})
    names(text)


def test_a_plain_word_is_the_text_that_stands_there(tmp_path):
    """Not what YAML 1.1 makes of it: compose hands `off`, `1_000` and `0x10` to the container as they are."""
    services = read(
        tmp_path, "services: {a: {environment: {A: off, B: 1_000, C: 0x10, D: 1:30, E: ~, F: '', G: true}}}"
    )
    assert services["a"]["environment"] == {
        "A": "off", "B": "1_000", "C": "0x10", "D": "1:30", "E": None, "F": "", "G": "true",
    }  # fmt: skip


def test_merge_keys_yield_to_what_stands_beside_them(tmp_path):
    text = "x: [&a {A: 1, B: 1}, &b {B: 2, C: 2}]\nservices: {s: {environment: {<<: [*a, *b], C: 3}}}"
    assert read(tmp_path, text)["s"]["environment"] == {"A": "1", "B": "1", "C": "3"}


def test_extends_merges_mappings_and_joins_lists(tmp_path):
    (tmp_path / "base.yml").write_text(
        "services: {b: {image: x, environment: [A=1, B=1], ports: ['1:1'], command: [a], healthcheck: {test: [NONE]}}}"
    )
    text = """
services:
  s:
    extends: {file: base.yml, service: b}
    environment: {B: 2}
    ports: ['2:2']
    command: [b]
  t: {extends: {service: s}, ports: !override ['3:3'], healthcheck: !reset null}
  loop: {extends: loop}
  lost: {extends: {file: no.yml, service: x}, image: y}
"""
    services = read(tmp_path, text)
    assert services["s"]["environment"] == {"A": "1", "B": "2"}
    assert (services["s"]["ports"], services["s"]["command"], services["s"]["image"]) == (["1:1", "2:2"], ["b"], "x")
    assert services["t"]["ports"] == ["3:3"]
    assert "healthcheck" not in services["t"]
    assert services["lost"]["image"] == "y"


@pytest.mark.parametrize(
    "text",
    ["a: &a [*a]\nservices: {x: {y: *a}}", "services:\n  a: &a\n    b: *a\n", "? [1]\n: 2\n", "a: 1\n---\nb: 2\n",
     LAUGHS],
)  # fmt: skip
@pytest.mark.slow
def test_files_that_would_never_end_are_refused(tmp_path, text):
    with pytest.raises(NoComposeFileError):
        read(tmp_path, text)


def test_a_file_that_adds_to_another_is_merged_with_it(tmp_path):
    base, over, other = (tmp_path / name for name in ("a.yml", "b.yml", "c.yml"))
    base.write_text(
        "services: {ollama: {image: 'ollama/ollama:0.32.15', ports: ['11434:11434'],"
        " environment: [OLLAMA_KEEP_ALIVE=0]}}"
    )
    over.write_text(
        "services: {ollama: {ports: !override ['127.0.0.1:11434:11434'], environment: {OLLAMA_KEEP_ALIVE: 1h}}}"
    )
    other.write_text("services: {ollama: {image: 'ollama/ollama:0.32.15', environment: {OLLAMA_NUM_CTX: 1}}}")
    assert bad(check_project([base], {}).findings) == ["keep-alive-zero", "port-exposed"]
    assert bad(check_project([base, over], {}).findings) == []
    assert bad(check_project([base, other], {}).findings) == ["keep-alive-zero", "port-exposed", "setting-ignored"]


def test_a_dot_env_beside_the_compose_file_fills_it_in(tmp_path):
    path = tmp_path / "compose.yml"
    path.write_text("services: {ollama: {image: 'ollama/ollama:${TAG}', environment: {OLLAMA_KEEP_ALIVE: '${KEEP}'}}}")
    assert bad(read_files([path], []).findings) == []
    (tmp_path / ".env").write_text("TAG=latest\nKEEP=0\n")
    assert bad(read_files([path], []).findings) == ["image-unpinned", "keep-alive-zero"]
    (tmp_path / "mine.env").write_text("TAG=0.32.15\nKEEP=1h\n")
    assert bad(read_files([path], [tmp_path / "mine.env"]).findings) == []


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("A='b c' # d", {"A": "b c"}), ('A="x\ny"\nB=1', {"A": "x\ny", "B": "1"}), ('A="\nB=1', {"A": '"', "B": "1"}),
        ("A=${B}", {"A": None}), ("A='${B}'", {"A": "${B}"}), ("A=1#2", {"A": "1#2"}), ("A: 1", {"A": "1"}),
        ("A=1\r\nB=2\r\n", {"A": "1", "B": "2"}), ("\ufeffA=1", {"A": "1"}), ("A=#x", {"A": ""}), ("A", {}),
        ("[Service]\nEnvironment=\"A=1 2\" B=3\n# Environment=C=1\nType=exec", {"A": "1 2", "B": "3"}),
    ],
)  # fmt: skip
def test_env_files_and_systemd_units_are_read(tmp_path, text, values):
    path = tmp_path / "x"
    path.write_bytes(text.encode())
    assert {name: variable.value for name, variable in read_env_file(path).items()} == values


def test_a_place_is_the_characters_of_the_value(tmp_path):
    path = tmp_path / "x.env"
    text = '# ä\nexport A = "1" # c\r\nB=2 3  \n[Service]\n'
    for content, pairs in (
        (text[:-10], {"A": '"1"', "B": "2 3"}),
        (text + 'Environment="C=4" D=5\n', {"C": "4", "D": "5"}),
    ):
        path.write_bytes(content.encode())
        found = {name: content[slice(*v.place.value)] for name, v in read_env_file(path).items()}
        assert found == pairs


@pytest.mark.parametrize(
    ("test", "programs"),
    [
        (["CMD", "curl", "-f", "x"], ["curl"]), (["CMD-SHELL", "a | b || c && d; e"], ["a", "b", "c", "d", "e"]),
        ("X=1 exec timeout 5 wget -q x", ["exec", "timeout", "wget"]), (["NONE"], []), ([], []), (None, []),
        (["CMD-SHELL", "test \"$(curl -s x)\" = ok"], ["test", "curl"]), (["CMD-SHELL", "echo 'curl'"], ["echo"]),
        (["CMD-SHELL", "for i in curl wget; do nc $i; done"], ["nc"]), ("it's", ["it's"]), (["curl", "x"], ["curl"]),
        (["CMD-SHELL", "ollama list # curl would do too"], ["ollama"]), (["CMD-SHELL", "</dev/tcp/x/1"], []),
    ],
)  # fmt: skip
def test_the_programs_of_a_command_are_seen(test, programs):
    assert list(of_health_check(test).programs) == programs


def test_a_script_in_a_command_is_taken_apart():
    command = of_service(["sh", "-c", "ollama serve &\nuntil curl -s x; do sleep 1; done\n# wget\nwait"])
    assert list(command.programs) == ["sh", "ollama", "curl", "sleep", "wait"]
    assert of_service("apt-get update && apt-get install -y curl").installs
