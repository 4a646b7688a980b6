"""Every reason for a miss is explained, in the code and in the documentation."""

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

import langchain_aegis
from langchain_aegis.questions import exact_only_reason
from langchain_aegis.reasons import REASONS, explain, markdown
from langchain_aegis.verification import GUARDS, compare, profile

PACKAGE = Path(langchain_aegis.__file__).parent
GUIDE = PACKAGE.parent / "docs" / "cache.md"

# The modules through which a reason passes on its way to the user, as far as they exist.
MODULES = [
    "model_parts", "keys", "questions", "entries", "store", "scripts", "connections", "budgets", "embedder",
    "verifiers", "shadow", "lookup", "updates", "engine", "cache", "pipelines",
    "middleware", "recached", "reports", "transfer", "leases", "explain", "performer",
]  # fmt: skip
RAISED = {"Unavailable", "NoQuestion", "Declined"}
TOLD = {"bypassed", "not_stored", "miss", "give_up"}
HELD = {"reason", "reasons", "exact_only"}
FAULTS = {"slow", "down"}  # what a Budget says
RETURNED = re.compile(r"refusal|reason|_exact_only$|^_question$|_objections$|^put$|^caller$|^locate|_opinion$")
# What the same functions return when nothing is wrong.
NO_REASON = {"stored", "exact", "semantic", "miss", ""}


def constants(expression):
    """The texts that an expression may be, through conditions and collections; not what it compares or calls."""
    match expression:
        case ast.Constant(value=str(text)):
            yield text
        case ast.IfExp(body=one, orelse=other):
            yield from constants(one)
            yield from constants(other)
        case ast.BoolOp(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts):
            for part in parts:
                yield from constants(part)
        case ast.BinOp(left=one, right=other):
            yield from constants(one)
            yield from constants(other)
        case ast.NamedExpr(value=value) | ast.Starred(value=value) | ast.Await(value=value):
            yield from constants(value)


def name_of(node):
    return getattr(node, "attr", None) or getattr(node, "id", None)


def codes(tree):
    """All codes in one module: (code, line)."""
    for node in ast.walk(tree):
        found = []
        match node:
            case ast.Call(func=function, args=arguments, keywords=keywords):
                if name_of(function) in RAISED | TOLD:
                    found += arguments
                if name_of(function) in ("append", "extend", "insert") and name_of(function.value) in HELD:
                    found += arguments
                found += [
                    k.value for k in keywords if k.arg in HELD or (k.arg in FAULTS and name_of(function) == "Budget")
                ]
                if name_of(function) == "ModelPart":
                    found += arguments[2:]
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    pairs = zip(target.elts, value.elts, strict=False) if (
                        isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                    ) else [(target, value)]  # fmt: skip
                    found += [v for t, v in pairs if name_of(t) in HELD]
                    if any(isinstance(t, ast.Name) and "PUT" in t.id for t in targets):
                        found += [ast.Constant(m) for m in re.findall(r"return '(\w+)'", ast.unparse(value))]
            case ast.AnnAssign(target=target, value=value) | ast.AugAssign(target=target, value=value):
                found += [value] if name_of(target) in HELD and value is not None else []
            case ast.NamedExpr(target=target, value=value):
                found += [value] if name_of(target) in HELD else []
            case ast.FunctionDef(name=name) if RETURNED.search(name):
                found += [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None]
        for expression in found:
            for text in constants(expression):
                yield text, getattr(node, "lineno", 0)


@cache
def all_codes():
    """Code -> where it is said."""
    found = {}
    for name in MODULES:
        path = PACKAGE / f"{name}.py"
        if path.exists():
            for text, line in codes(ast.parse(path.read_text())):
                found.setdefault(text, f"{path.name}:{line}")
    return {text: place for text, place in found.items() if text not in NO_REASON}


def guide_between(mark):
    return GUIDE.read_text().partition(f"<!-- {mark} -->")[2].partition(f"<!-- /{mark} -->")[0]


def test_every_code_in_the_source_is_explained():
    unknown = {text: place for text, place in all_codes().items() if text not in REASONS}
    assert not unknown, "give them a meaning and a remedy in reasons.py"


@pytest.mark.parametrize(
    "code",
    ["off", "bypass", "no_tenant", "bad_identity", "unnamed_model", "unreadable_prompt", "opaque_model", "tools",
     "media", "structured_output", "no_question", "several_labels", "too_long", "not_verbatim", "not_a_question",
     "action", "volatile", "no_embedder", "embedder_slow", "embedder_down", "bad_vector", "redis_down", "redis_slow",
     "refresh", "no_candidate", "below_threshold", "expired", "no_profile", "unreadable", "empty", "incomplete",
     "not_an_answer", "invalid_tool_calls", "too_large", "not_json", "invalidated", "lost", "failed"],
)  # fmt: skip
def test_the_search_through_the_source_finds_what_is_there(code):
    """Else the test above would pass for having seen nothing."""
    assert code in all_codes()


def test_no_reason_is_explained_that_nothing_says():
    assert {code for code in REASONS if ":" not in code} <= set(all_codes())


def test_every_guard_is_explained():
    assert {code for code in REASONS if code.startswith("guard:")} == {f"guard:{name}" for name in GUARDS}


def test_every_reason_says_what_happened_and_what_to_do():
    for code, reason in REASONS.items():
        assert reason.code == code
        assert re.fullmatch(r"[a-z_]+(:[a-z_]+)?", code)
        for text in (reason.meaning, reason.remedy):
            assert text[0] in "`" or text[0].isupper(), text
            assert text.endswith("."), text
            assert "|" not in text, "it would end the cell of the table"
            assert text.count("`") % 2 == 0


def test_a_known_code_is_explained_and_an_unknown_one_is_said_to_be_unknown():
    assert explain("guard:number") is REASONS["guard:number"]
    assert "does not know" in explain("invented").meaning
    assert (explain("guard:invented").stage, explain("invented").code) == ("guard", "invented")


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        REASONS["off"] = REASONS["bypass"]


def test_the_documentation_holds_every_reason_as_the_package_tells_it():
    """To renew it: python -c 'from langchain_aegis.reasons import markdown; print(markdown())', between the marks."""
    shown = guide_between("reasons")
    assert shown.strip() == markdown()
    assert set(re.findall(r"^\| `([a-z_:]+)` \|", shown, re.M)) == set(REASONS)


def test_every_guard_stops_the_example_that_the_documentation_gives():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", guide_between("guards"), re.M)
    assert tuple(name for name, _, _ in rows) == GUARDS
    for name, kept, asked in rows:
        assert name in compare(profile(kept), profile(asked)), (kept, asked)


def test_what_is_said_to_be_never_matched_is_not():
    section = GUIDE.read_text().partition("## What is never matched by meaning")[2].partition("\n## ")[0]
    rows = re.findall(r'^\| .+ \| `(\w+)` \| "(.+?)"', section, re.M)
    assert len(rows) >= 4
    for reason, text in rows:
        assert exact_only_reason(text) == reason, text


def test_the_code_in_the_documentation_is_python_that_imports_what_there_is():
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    assert len(blocks) > 8
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("langchain_aegis"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), block


def test_every_link_in_the_documentation_leads_somewhere():
    text = GUIDE.read_text()
    places = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= places
    assert all((GUIDE.parent / target).exists() for target in re.findall(r"\]\(([^)#]+)\)", text))
