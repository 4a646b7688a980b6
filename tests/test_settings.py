"""Settings: one frozen value, read from an environment once, with errors that name the variable."""

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.settings import AegisSettings, normalise_base_url, redact_url

# One value per field, different from the default: text in the environment, value in the settings.
EXAMPLES = {
    "ollama_base_url": ("http://gpu:11434/", "http://gpu:11434"),
    "model_generation": ("llama3.2:8b", "llama3.2:8b"),
    "model_embeddings": ("bge-m3", "bge-m3"),
    "redis_url": ("redis://cache:6380/2", "redis://cache:6380/2"),
    "connect_timeout_s": ("1.5", 1.5),
    "read_timeout_s": ("30", 30.0),
    "deadline_s": ("90", 90.0),
    "keep_alive": ("2h", "2h"),
    "vllm_base_url": ("http://gpu:8000/v1/", "http://gpu:8000/v1"),
    "vllm_api_key": ("token", "token"),
    "vllm_max_num_seqs": ("256", 256),
    "cache_enabled": ("no", False),
    "namespace": ("shop", "shop"),
    "mode": ("strict", "strict"),
    "ttl_s": ("60", 60),
    "op_budget_s": ("0.05", 0.05),
    "embed_budget_s": ("0.5", 0.5),
    "max_entry_bytes": ("4096", 4096),
    "local_tier_bytes": ("65536", 65536),
    "lease_s": ("60", 60.0),
    "tenant_key": ("org", "org"),
    "user_key": ("member", "member"),
    "max_concurrency": ("2", 2),
    "max_waiting": ("0", 0),
    "window_ms": ("0", 0.0),
    "max_batch": ("8", 8),
    "shared_slots": ("1", True),
    "slot_lease_s": ("5", 5.0),
    "home": ("/srv/aegis", "/srv/aegis"),
    "secret_key": ("0123456789abcdef", "0123456789abcdef"),
    "record_keys": ("the-new-key-of-records secret", ("the-new-key-of-records", "secret")),
    "encrypt": ("yes", True),
}
COMMON = {
    "OLLAMA_BASE_URL": ("http://gpu:9", "ollama_base_url", "http://gpu:9"),
    "OLLAMA_HOST": ("gpu", "ollama_base_url", "http://gpu:11434"),
    "OLLAMA_MODEL_GENERATION": ("qwen3", "model_generation", "qwen3"),
    "OLLAMA_MODEL_EMBEDDINGS": ("bge-m3", "model_embeddings", "bge-m3"),
    "VLLM_BASE_URL": ("gpu", "vllm_base_url", "http://gpu:8000"),
    "VLLM_API_KEY": ("token", "vllm_api_key", "token"),
    "REDIS_URL": ("rediss://cache:1", "redis_url", "rediss://cache:1"),
    "REDIS_HOST": ("cache", "redis_url", "redis://cache:6379"),
    "REDIS_PORT": ("6380", "redis_url", "redis://127.0.0.1:6380"),
    "REDIS_CACHE_ENABLED": ("false", "cache_enabled", False),
    "BATCH_WINDOW_MS": ("20", "window_ms", 20.0),
}
PASSWORD = "hunter2-and-more"


def test_every_field_has_an_example_here():
    """A new field is not forgotten by the tests below."""
    assert set(EXAMPLES) == {f.name for f in dataclasses.fields(AegisSettings)}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_field_is_read_from_its_variable(name):
    text, value = EXAMPLES[name]
    assert getattr(AegisSettings(), name) != value
    assert AegisSettings.from_env({f"AEGIS_{name.upper()}": f" {text} "}) == AegisSettings(**{name: value})


@pytest.mark.parametrize("variable", COMMON)
def test_the_names_that_applications_have_already_are_read(variable):
    text, name, value = COMMON[variable]
    assert AegisSettings.from_env({variable: text}) == AegisSettings(**{name: value})


def test_the_own_name_wins_over_the_common_one_and_the_url_over_its_parts():
    env = {
        "OLLAMA_HOST": "a", "OLLAMA_BASE_URL": "http://b:1", "AEGIS_OLLAMA_BASE_URL": "http://c:1",
        "REDIS_HOST": "a", "REDIS_URL": "redis://b:1",
        "BATCH_WINDOW_MS": "1", "AEGIS_WINDOW_MS": "2",
    }  # fmt: skip
    settings = AegisSettings.from_env(env)
    assert (settings.ollama_base_url, settings.redis_url, settings.window_ms) == ("http://c:1", "redis://b:1", 2.0)
    del env["AEGIS_OLLAMA_BASE_URL"]
    assert AegisSettings.from_env(env).ollama_base_url == "http://b:1"


def test_a_redis_password_is_quoted_into_the_url():
    settings = AegisSettings.from_env({"REDIS_HOST": "cache", "REDIS_PASSWORD": "a/b@c:d"})
    assert settings.redis_url == "redis://:a%2Fb%40c%3Ad@cache:6379"


@pytest.mark.parametrize("empty", ["", " ", "\t\n"])
def test_an_empty_variable_counts_as_unset(empty):
    env = {f"AEGIS_{name.upper()}": empty for name in EXAMPLES} | dict.fromkeys([*COMMON, "REDIS_PASSWORD"], empty)
    assert AegisSettings.from_env(env) == AegisSettings()


def test_without_an_argument_the_process_environment_is_read(monkeypatch):
    monkeypatch.setenv("AEGIS_NAMESPACE", "from-the-process")
    assert AegisSettings.from_env().namespace == "from-the-process"


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("AEGIS_TTL_S", "an hour"), ("AEGIS_TTL_S", "1.5"), ("AEGIS_OP_BUDGET_S", "fast"), ("AEGIS_CACHE_ENABLED", "2"),
        ("REDIS_CACHE_ENABLED", "maybe"), ("BATCH_WINDOW_MS", "50ms"), ("REDIS_PORT", "http"),
        ("OLLAMA_BASE_URL", "ftp://gpu"), ("AEGIS_OLLAMA_BASE_URL", "http://gpu:eleven"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_an_error_that_names_the_variable(variable, text):
    with pytest.raises(AegisConfigError, match=variable):
        AegisSettings.from_env({variable: text})


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("mode", "loose"), ("ttl_s", 0), ("ttl_s", -1), ("op_budget_s", 0), ("op_budget_s", float("nan")),
        ("embed_budget_s", 0), ("max_entry_bytes", 0), ("connect_timeout_s", 0), ("read_timeout_s", -1),
        ("deadline_s", 0), ("max_concurrency", 0), ("max_batch", 0), ("max_waiting", -1), ("window_ms", -0.1),
        ("vllm_max_num_seqs", 0), ("window_ms", float("nan")), ("namespace", ""), ("namespace", "a b"),
        ("namespace", "a*"), ("namespace", "{a}"), ("namespace", "a\x00"), ("secret_key", "short"),
        ("record_keys", ("short",)), ("record_keys", "one text of 16 characters"), ("record_keys", ("secret",) * 2),
        ("record_keys", (b"0123456789abcdef",)), ("record_keys", ("0123456789abcdef",) * 2),
    ],
)  # fmt: skip
def test_values_that_could_only_fail_later_are_refused_by_name(name, bad):
    with pytest.raises(AegisConfigError, match=name):
        AegisSettings(**{name: bad})


@pytest.mark.row(61)
def test_a_key_that_cannot_be_used_is_not_in_the_error():
    for keys in ((PASSWORD, "short-key"), (PASSWORD, "secret")):
        with pytest.raises(AegisConfigError, match="AEGIS_RECORD_KEYS") as caught:
            AegisSettings(record_keys=keys, secret_key=PASSWORD)
        assert PASSWORD not in str(caught.value)
        assert "short-key" not in str(caught.value)
    assert PASSWORD not in repr(AegisSettings(record_keys=(PASSWORD,)))


def test_settings_cannot_be_changed_and_a_copy_ignores_none():
    settings = AegisSettings(ttl_s=60)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.ttl_s = 1
    assert settings.but(ttl_s=None, namespace="x") == AegisSettings(ttl_s=60, namespace="x")


@pytest.mark.parametrize(
    ("given_url", "normal"),
    [
        ("myhost", "http://myhost:11434"), ("myhost:80", "http://myhost:80"), ("http://myhost", "http://myhost:80"),
        ("https://myhost/", "https://myhost:443"), ("0.0.0.0", "http://127.0.0.1:11434"),  # noqa: S104
        ("http://0.0.0.0:11434", "http://127.0.0.1:11434"), ("http://[::1]:11434", "http://[::1]:11434"),
        ("https://proxy/ollama/", "https://proxy:443/ollama"), ("http://u:p@h:1", "http://u:p@h:1"),
    ],
)  # fmt: skip
def test_an_ollama_address_gets_scheme_and_port(given_url, normal):
    assert normalise_base_url(given_url) == normal
    assert normalise_base_url(normal) == normal


@pytest.mark.parametrize("text", ["", "ftp://h", "http://", "http://h:port", "http://h:99999"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(AegisConfigError, match="address"):
        normalise_base_url(text)


@given(password=st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S")), min_size=1, max_size=20))
@pytest.mark.row(61)
def test_redaction_never_leaves_a_part_of_the_password(password):
    """Not even for a password that somebody forgot to quote."""
    secret = f"SECRET{password}TERCES"
    for url in (f"redis://:{secret}@cache:6379/0", f"http://user:{secret}@gpu:11434/path", f"user:{secret}@gpu:1"):
        shown = redact_url(url)
        assert "SECRET" not in shown
        assert "TERCES" not in shown
        assert "cache:6379" in shown or "gpu:1" in shown


def test_redaction_keeps_what_is_no_secret():
    assert redact_url("redis://cache:6379/0") == "redis://cache:6379/0"
    assert redact_url("gpu:11434") == "gpu:11434"
    assert redact_url("redis://cache:6379/0?password=x") == "redis://cache:6379/0"


@pytest.mark.parametrize(
    "env",
    [
        {"OLLAMA_BASE_URL": f"http://user:{PASSWORD}@gpu:11434"},
        {"REDIS_URL": f"redis://:{PASSWORD}@cache:6379"},
        {"REDIS_HOST": "cache", "REDIS_PASSWORD": PASSWORD},
        {"AEGIS_SECRET_KEY": PASSWORD},
    ],
)
@pytest.mark.row(61)
def test_the_settings_can_be_printed_without_showing_a_secret(env):
    assert PASSWORD not in repr(AegisSettings.from_env(env))


@pytest.mark.parametrize("address", [f"http://user:{PASSWORD}@gpu:port", f"ftp://user:{PASSWORD}@gpu"])
@pytest.mark.row(61)
def test_an_error_about_an_address_does_not_show_its_password(address):
    with pytest.raises(AegisConfigError) as caught:
        AegisSettings.from_env({"OLLAMA_BASE_URL": address})
    assert PASSWORD not in str(caught.value)
    assert "gpu" in str(caught.value)


def test_settings_alone_load_neither_langchain_nor_redis():
    code = "import sys, langchain_aegis.settings as s; s.AegisSettings.from_env({}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert not {"langchain_core", "redis", "httpx"} & set(loaded.split())
