"""The shape of the package: imports point one way, public names are those promised, importing it is cheap."""

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import langchain_aegis

ROOT = Path(langchain_aegis.__file__).parent

# A module imports only from modules named before it; a package stands for all of its modules. Imports inside functions
# and under TYPE_CHECKING count too.
ORDER = [
    "errors", "settings", "home", "notices", "nesting", "scope", "stamps", "loops", "breaker", "flows", "forks",
    "nonces", "cut_answers",
    "_compat", "tuning", "messages", "lexicon", "tokens", "profiles", "verification", "tasks", "questions", "identity",
    "options", "chunks", "model_parts", "ciphers", "seals", "known_prompts", "keys",
    "entries", "answers", "replays", "hits", "vectors",
    "replies", "namespace", "nearby", "indexes", "scripts", "links", "store", "tls", "sentinel_urls", "sentinels",
    "connections", "pushes", "sweeper", "writes", "relays",
    "counts", "telemetry",
    "deadlines", "attempts", "timestamps", "digests", "refusals", "ndjson", "client", "endpoint",
    "wakers", "reloads", "overflow", "warming",
    "traits", "prefixes", "late_messages",
    "live", "bounds", "free_ticket", "tickets", "tallies", "queues", "admission", "balance", "pools", "progress",
    "slot_scripts", "slot_link", "shared_admission", "slot_lender",
    "bulk", "pulses", "own_errors", "broadcasts", "flights",
    "calls", "forwarding", "servers", "openai_servers", "own_bounds", "copies", "merging", "turning_away",
    "followed", "kept_streams",
    "budgets", "embedder", "embedder_models", "steps", "verifiers", "agreement", "shadow", "reasons", "lookup",
    "results", "expected",
    "local_tier", "scopes_seen", "cache_options", "reports", "pairs", "calibration", "updates", "engine", "performer",
    "explain", "invalidations", "pipelines", "transfer", "control",
    "lanes", "gathering", "embedding_requests", "embedding_cache", "gathered_embeddings",
    "bodies", "asking",
    "embeddings", "spread", "chat_models", "batching_chat", "batching_embeddings", "runnables", "recached",
    "fleet", "routing", "router", "cache", "middleware",
    "ollama",
    "metrics_admission", "metrics_chat", "metrics_server", "metrics",
    "embedded", "testing",
    "demo",
    "bench",
    "cli_cache", "cli_plan", "cli_top", "cli_warm", "cli_doctor", "cli_bench", "cli", "__main__",
]  # fmt: skip

# importer -> imported, against the order, each with its reason.
EXCEPTIONS = {
    ("tickets", "admission"): "names the class of the gate in annotations; never imported at run time",
    ("live", "admission"): "names the class of the gate in annotations; never imported at run time",
}

PUBLIC = [
    "ChatAegis", "AegisEmbeddings", "AegisSemanticCache", "AegisCacheMiddleware", "AegisEmbeddingCache", "AegisRouter",
    "AegisSettings", "Answer", "BatchingChatModel", "BatchingEmbeddings", "BatchingRunnable", "batch_progress",
    "batching", "aegis_scope", "aegis_sources", "was_cached", "was_cut",
    "AegisError", "AegisBatchError", "AegisClosedError", "AegisConfigError", "AegisConnectionError",
    "AegisContextOverflowError", "AegisDeadlineError", "AegisModelNotFoundError", "AegisOptionError",
    "AegisOverloadedError", "AegisReloadError", "AegisRequestError", "AegisServerError", "AegisStreamError",
    "AegisTimeoutError",
    "__version__",
]  # fmt: skip

FORBIDDEN_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "cPickle"}
BROAD = {"Exception", "BaseException", ""}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("hashlib", "md5"), ("hashlib", "sha1"),
    ("os", "system"), ("load", "loads"), ("load", "load"), ("tempfile", "mktemp"),
}  # fmt: skip


@cache
def modules():
    """Module name below the package -> parsed source; "" is the package itself."""
    names = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        names["" if name == "__init__" else name.removesuffix(".__init__")] = ast.parse(path.read_text(), str(path))
    return names


@cache
def own_imports(name):
    """All (module of this package, whether it is imported when the importer is)."""
    return list(find_imports(name))


def find_imports(name):
    tree = modules()[name]
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively; say langchain_aegis.x"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [i if i.removeprefix("langchain_aegis.") in modules() else node.module for i in inner]
        for target in found:
            if target == "langchain_aegis" or target.startswith("langchain_aegis."):
                yield target.removeprefix("langchain_aegis").lstrip("."), id(node) not in typing_only | late


def unit(name):
    return name.partition(".")[0]


def test_every_module_has_its_place_in_the_order():
    assert {unit(name) for name in modules()} - {""} <= set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_one_way(name):
    if name == "":
        assert not any(now for _, now in own_imports(name)), "the package imports its modules on first use only"
        return
    for target, _ in own_imports(name):
        if target == "":
            node_names = {a.name for n in ast.walk(modules()[name]) if isinstance(n, ast.ImportFrom)
                          and n.module == "langchain_aegis" for a in n.names}  # fmt: skip
            assert node_names <= {"__version__"}, f"{name} imports from the package itself: import the module"
        elif unit(target) != unit(name) and (unit(name), unit(target)) not in EXCEPTIONS:
            assert ORDER.index(unit(target)) < ORDER.index(unit(name)), f"{name} imports {target}"


def test_type_checkers_know_every_public_name():
    """What is imported on first use is imported under TYPE_CHECKING too: else it would be Any to users."""
    (block,) = (n for n in modules()[""].body if isinstance(n, ast.If))
    typed = {(a.asname, n.module) for n in block.body for a in n.names}
    assert typed == {(name, f"langchain_aegis.{module}") for name, module in langchain_aegis._HOME_OF.items()}


def test_no_two_modules_import_each_other():
    """Not even in a circle, and not inside a package either."""
    state = {}

    def visit(name, path):
        assert state.get(name) != "open", " -> ".join([*path, name])
        if name in state:
            return
        state[name] = "open"
        for target, at_import in own_imports(name):
            if at_import and target:
                visit(target, [*path, name])
        state[name] = "done"

    for name in modules():
        visit(name, [])


def test_every_exception_is_needed():
    used = {(unit(name), unit(target)) for name in modules() for target, _ in own_imports(name)}
    assert set(EXCEPTIONS) <= used
    assert all(ORDER.index(b) > ORDER.index(a) for a, b in EXCEPTIONS)


def reached(name):
    """All modules of the package that `name` imports, directly or not, late or not."""
    seen, todo = set(), [name]
    while todo:
        for target, _ in own_imports(todo.pop()):
            if target and target not in seen:
                seen.add(target)
                todo.append(target)
    return seen


def test_the_chat_model_and_the_cache_do_not_know_each_other():
    """LangChain joins them."""
    assert not reached("chat_models") & {"cache", "engine", "lookup", "store", "connections", "embedder", "keys"}
    assert not reached("cache") & {"chat_models", "runnables", "admission", "flights"}


def test_the_public_names_are_the_documented_ones():
    assert sorted(langchain_aegis.__all__) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(langchain_aegis))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_can_be_imported(name):
    value = getattr(langchain_aegis, name)
    assert value is getattr(langchain_aegis, name)
    if name != "__version__":
        assert value.__doc__, f"{name} says nothing about itself"


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="NoSuchName"):
        importlib.import_module("langchain_aegis").NoSuchName  # noqa: B018


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import langchain_aegis", {"langchain_core", "redis", "httpx", "pydantic", "langchain_ollama", "asyncio"}),
        ("import langchain_aegis.cli", {"langchain_core", "redis", "httpx", "langchain_ollama"}),
        ("from langchain_aegis import AegisSettings", {"langchain_core", "redis", "httpx"}),
        ("from langchain_aegis import ChatAegis", {"redis", "langgraph", "xllamacpp", "onnxruntime", "numpy"}),
        ("from langchain_aegis import AegisSemanticCache", {"langchain_ollama", "langgraph", "onnxruntime"}),
        ("import langchain_aegis.testing", {"redis", "xllamacpp", "onnxruntime", "tokenizers", "langgraph"}),
    ],
)  # fmt: skip
def test_importing_loads_no_more_than_it_must(statement, absent):
    code = f"{statement}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert not absent & set(done.stdout.split())


def test_no_module_is_longer_than_500_lines():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in ROOT.rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > 500} == {}


@pytest.mark.parametrize("name", sorted(modules()))
def test_every_module_says_in_one_sentence_what_it_is_for(name):
    """A first line that needs no "and" is about one idea."""
    doc = ast.get_docstring(modules()[name])
    assert doc, f"{name or 'the package'} has no docstring"
    first = doc.partition("\n\n")[0]
    assert first.endswith((".", ":", "!")), first


def test_the_types_are_shipped():
    assert (ROOT / "py.typed").is_file()


@pytest.mark.row(122)
@pytest.mark.parametrize("name", sorted(modules()))
def test_nothing_dangerous_is_used(name):
    """No code from data: no pickle, no eval, no unsafe YAML, no langchain-core load; no broken digest."""
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Import):
            imported = {alias.name.partition(".")[0] for alias in node.names}
            assert not imported & FORBIDDEN_IMPORTS
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in FORBIDDEN_IMPORTS
            wrong = {(node.module.rpartition(".")[2], alias.name) for alias in node.names} & FORBIDDEN_ATTRIBUTES
            assert not wrong
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                assert node.func.id not in FORBIDDEN_CALLS, f"{name}:{node.lineno}"
            elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                assert (node.func.value.id, node.func.attr) not in FORBIDDEN_ATTRIBUTES, f"{name}:{node.lineno}"
            shell = [k for k in node.keywords if k.arg == "shell"]
            assert not shell, f"{name}:{node.lineno} runs a shell"


def test_data_is_data():
    """What is not Python in the package is text of a known kind."""
    kinds = {p.suffix for p in ROOT.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert kinds <= {".py", ".toml", ".json", ".jsonl", ".md", ".txt", ".typed", ""}


def test_broad_handlers_say_why():
    """`except Exception` that does not raise again stands only beside a comment."""
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ExceptHandler) or ast.unparse(node.type or ast.Name("")) not in BROAD:
                continue
            again = isinstance(node.body[-1], ast.Raise)
            assert again or any("#" in line for line in lines[node.lineno - 2 : node.body[0].lineno]), (
                f"{path.relative_to(ROOT)}:{node.lineno}"
            )
