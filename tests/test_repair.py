"""`aegis doctor --fix`: a corrected copy beside the file, and nothing else touched."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_aegis.ollama.doctor import read_files
from langchain_aegis.ollama.repair import repair

IGNORED = "# aegis doctor: ignored by Ollama; use OLLAMA_CONTEXT_LENGTH (or the option num_ctx of a request)\n"


def fixed(path, text):
    """Write a file, correct it, and return the new text; the old one if nothing was corrected."""
    path.write_bytes(text.encode())
    compose, env = ([path], []) if path.suffix == ".yml" else ([], [path])
    done = repair(read_files(compose, env).findings)
    assert path.read_bytes() == text.encode()
    return done[0].written.read_bytes().decode() if done else text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("OLLAMA_NUM_CTX=8192\n", "OLLAMA_CONTEXT_LENGTH=8192\n"),
        ('export OLLAMA_NUM_CTX="8192" # c\n', 'export OLLAMA_CONTEXT_LENGTH="8192" # c\n'),
        ("OLLAMA_KEEP_ALIVE=30\n", "OLLAMA_KEEP_ALIVE=30m\n"),
        ("OLLAMA_KEEP_ALIVE='0'\r\nX=1\r\n", "OLLAMA_KEEP_ALIVE='30m'\r\nX=1\r\n"),
        ("OLLAMA_SCHED_SPREAD=yes", "OLLAMA_SCHED_SPREAD=true"),
        ("OLLAMA_NUM_CTX=many\n", f"{IGNORED}# OLLAMA_NUM_CTX=many\n"),
        ("OLLAMA_NUM_CTX=1\nOLLAMA_CONTEXT_LENGTH=8192\n",
         f"{IGNORED}# OLLAMA_NUM_CTX=1\nOLLAMA_CONTEXT_LENGTH=8192\n"),
        ("OLLAMA_WARP=1\n", "OLLAMA_WARP=1\n"),
    ],
)  # fmt: skip
def test_env_files_are_corrected_line_by_line(tmp_path, before, after):
    assert fixed(tmp_path / "x.env", before) == after


@pytest.mark.parametrize(
    ("name", "value", "port"),
    [
        ("short", "11434:11434", "127.0.0.1:11434:11434"), ("alone", "11434", "127.0.0.1:11434:11434"),
        ("open", "0.0.0.0:11434:11434", "127.0.0.1:11434:11434"), ("v6", "[::]:11434:11434", "127.0.0.1:11434:11434"),
        ("kind", "11434:11434/tcp", "127.0.0.1:11434:11434/tcp"),
        ("variable", "${PORT:-11434}:11434", "127.0.0.1:${PORT:-11434}:11434"),
    ],
)  # fmt: skip
def test_ports_are_put_on_loopback(tmp_path, name, value, port):
    text = 'services:\n  ollama:\n    image: ollama/ollama:0.32.15\n    ports:\n      - "{}" # open\n'
    assert fixed(tmp_path / f"{name}.yml", text.format(value)) == text.format(port)


def test_a_lan_address_is_left_to_its_owner(tmp_path):
    text = 'services:\n  ollama:\n    image: ollama/ollama:0.32.15\n    ports: ["192.168.1.5:11434:11434"]\n'
    assert fixed(tmp_path / "c.yml", text) == text


def test_nothing_is_ever_overwritten(tmp_path):
    """The same copy is found again; another content gets the next free name."""
    path, text = tmp_path / "compose.yml", "services: {ollama: {environment: {OLLAMA_NUM_CTX: 1}}}\n"
    path.write_text(text)
    names = [repair(read_files([path], []).findings)[0].written.name for _ in range(2)]
    (tmp_path / "compose.fixed.yml").write_text("mine")
    (tmp_path / "compose.fixed.2.yml").mkdir()
    names.append(repair(read_files([path], []).findings)[0].written.name)
    assert names == ["compose.fixed.yml", "compose.fixed.yml", "compose.fixed.3.yml"]
    assert (tmp_path / "compose.fixed.yml").read_text() == "mine"
    assert path.read_text() == text


def test_the_copy_of_a_dot_file_keeps_its_name(tmp_path):
    (tmp_path / ".env").write_text("OLLAMA_NUM_CTX=1\n")
    (done,) = repair(read_files([], [tmp_path / ".env"]).findings)
    assert (done.written.name, done.changes, done.open) == (".env.fixed", 1, 0)


def test_an_anchor_is_corrected_once_for_all_who_use_it(tmp_path):
    text = (
        "x-e: &e {OLLAMA_NUM_CTX: 8192}\nservices:\n  a: {image: 'ollama/ollama:0.32.15', environment: *e}\n"
        "  b: {image: 'ollama/ollama:0.32.15', environment: {<<: *e}}\n"
    )
    assert fixed(tmp_path / "c.yml", text) == text.replace("OLLAMA_NUM_CTX", "OLLAMA_CONTEXT_LENGTH")


def test_a_file_that_was_extended_is_corrected_too(tmp_path):
    (tmp_path / "base.yml").write_text("services: {b: {environment: [OLLAMA_NUM_CTX=8192]}}\n")
    path = tmp_path / "c.yml"
    path.write_text("services: {a: {image: 'ollama/ollama:0.32.15', extends: {file: base.yml, service: b}}}\n")
    (done,) = repair(read_files([path], []).findings)
    assert done.written == tmp_path / "base.fixed.yml"
    assert "OLLAMA_CONTEXT_LENGTH=8192" in done.written.read_text()


LINE = st.sampled_from([
    "OLLAMA_NUM_CTX=1", "OLLAMA_KEEP_ALIVE = '0' # c", "export OLLAMA_NUM_PARALEL=4", "OLLAMA_KV_CACHE_TYPE=q8_0",
    "OLLAMA_FLASH_ATTENTION=0", "# c", "", "X=${Y}", 'OLLAMA_KEEP_ALIVE="a\nb"', "OLLAMA_NUM_CTX='",
    "OLLAMA_GPU_OVERHEAD:1",
])  # fmt: skip


@given(st.lists(LINE, max_size=8), st.sampled_from(["\n", "\r\n"]))
def test_what_was_corrected_stays_corrected(tmp_path_factory, lines, end):
    """A second run on the copy finds nothing that it could correct again."""
    directory = tmp_path_factory.mktemp("repair")
    once = fixed(directory / "x.env", end.join(lines))
    for _ in range(3):  # one line may hide another: a repeated name, a contradiction
        again = fixed(directory / "y.env", once)
        if again == once:
            break
        once = again
    assert fixed(directory / "z.env", once) == once
    kept = [line for line in lines if line.startswith("#")]
    assert all(line in once for line in kept)
