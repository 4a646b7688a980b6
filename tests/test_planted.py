"""Files with planted faults, written as people write them: the doctor finds each fault, and nothing else.

A file says in comments what must be found: `# expect: CODE` and, after it, a text that stands in the finding.
"""

import json
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator, ValidationError

from langchain_aegis.ollama.doctor import read_files
from langchain_aegis.ollama.findings import codes
from langchain_aegis.ollama.repair import repair

PLANTED = Path(__file__).parent / "planted"
SCHEMA = json.loads((Path(__file__).parent / "compose-spec.schema.json").read_text())
FILES = sorted(p for p in PLANTED.iterdir() if p.suffix != ".txt")


def judge(path):
    """Return the warnings and errors of a planted file, read with the files that it names."""
    text = path.read_bytes().decode("utf-8-sig")
    others = [path.parent / name for name in re.findall(r"(?m)^# with: (\S+)", text)]
    compose, env = ([path], []) if path.suffix == ".yml" else (others, [path])
    return [f for f in read_files(compose, env).findings if f.severity in ("warning", "error")]


def valid(text):
    """Say whether compose would take it: the specification's schema, as far as it looks."""
    try:
        Draft7Validator(SCHEMA).validate(yaml.safe_load(text))
    except (ValidationError, yaml.YAMLError):
        return False
    return True


def expected(path):
    text = path.read_bytes().decode("utf-8-sig")
    return [(m[1], m[2].strip()) for m in re.finditer(r"(?m)^# expect: (\S+)([^\r\n]*)", text)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_planted_fault_is_found_and_no_other(path):
    findings = judge(path)
    left = list(findings)
    for code, says in expected(path):
        found = next((f for f in left if f.code == code and says in f"{f.what} {f.where}"), None)
        assert found, (code, says, [(f.code, f.what) for f in left])
        assert found.why and found.fix and str(path.parent) in found.where
        left.remove(found)
    assert [(f.code, f.what) for f in left] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_corrected_copy_has_none_of_the_faults_that_can_be_corrected(path, tmp_path):
    """And keeps the rest of the file: comments, other lines, line ends; the original is untouched."""
    for other in PLANTED.iterdir():
        (tmp_path / other.name).write_bytes(other.read_bytes())
    original = tmp_path / path.name
    before = original.read_bytes()
    findings = judge(original)
    fixable = {(f.code, f.what) for f in findings if f.edit and f.edit.place.path == original}
    repaired = [r for r in repair(findings) if r.original == original]
    assert original.read_bytes() == before
    assert bool(repaired) == bool(fixable)
    for each in repaired:
        after = each.written.read_bytes()
        old, new = before.decode("utf-8-sig"), after.decode("utf-8-sig")
        if each.written.suffix == ".yml":
            assert valid(new) or not valid(old)
        assert not {(f.code, f.what) for f in judge(each.written)} & fixable
        assert {f.code for f in judge(each.written)} <= {f.code for f in findings}
        for comment in re.findall(r"#[^\r\n]*", old):
            assert comment in new
        assert ("\r\n" in old) == ("\r\n" in new) and new.count("\r\n") in (0, new.count("\n"))
        assert after[:3] == before[:3]
        untouched = set(old.splitlines()) - {line for line in old.splitlines() if "OLLAMA" in line.upper()}
        assert len(untouched - set(new.splitlines())) <= 12  # ports, health checks, images


def test_planted_compose_files_are_compose_files():
    """But for those whose fault is that they are none; and one that uses the tags of compose."""
    wrong = {path.name for path in FILES if path.suffix == ".yml" and not valid(path.read_text(encoding="utf-8-sig"))}
    assert wrong == {"30-reset.yml", "40-malformed.yml"}


def test_every_code_that_files_can_show_is_planted_somewhere():
    planted = {code for path in FILES for code, _ in expected(path)}
    wrong = {name for name, code in codes().items() if {"warning", "error"} & set(code.severity)}
    offline = {name for name in wrong if codes()[name].looks_at == "files"} | {
        "redis-search",
        "redis-memory",
        "version",
    }
    assert offline - planted == {"compose-unreadable", "file-unreadable"}
