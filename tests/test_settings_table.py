"""The table of Ollama's settings: complete, consistent, and honest about what it does not know."""

import pytest

from langchain_aegis.ollama.knowledge import knowledge, version_tuple

TABLE = knowledge()
ROWS = [*TABLE.server.values(), *TABLE.request.values()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_says_where_it_comes_from_and_what_its_kind_needs(row):
    assert row.source
    if row.reads == "no":
        assert row.instead
    else:
        assert row.effect and row.since and row.default
    if row.until:
        assert row.since and row.instead
        assert version_tuple(row.since) <= version_tuple(row.until) < version_tuple(TABLE.verified)
    releases = [version_tuple(since) for since in row.default]
    assert releases == sorted(set(releases))
    assert not releases or releases[0] == version_tuple(row.since) or releases[0] == (0, 5, 0)


def test_no_name_is_both_a_variable_and_a_field():
    assert not set(TABLE.server) & set(TABLE.request)


def test_what_is_recommended_instead_is_read():
    """Advice that names another setting names one that works."""
    for row in ROWS:
        for word in row.instead.replace("(", " ").replace(")", " ").replace(",", " ").split():
            if word.startswith(("OLLAMA_", "LLAMA_ARG_")) and word != "LLAMA_ARG_NUMA":
                assert TABLE.setting(word).status == "read", row.name
        if getattr(row, "rename", ""):
            assert TABLE.setting(row.rename).status == "read", row.name
            assert row.rename in row.instead


@pytest.mark.parametrize(
    ("name", "version", "status", "default"),
    [
        ("OLLAMA_NUM_PARALLEL", "0.5.7", "read", "chosen by memory: 4 or 1"),
        ("OLLAMA_NUM_PARALLEL", "0.9.6", "read", "chosen by memory: 2 or 1"),
        ("OLLAMA_NUM_PARALLEL", None, "read", "1"),
        ("OLLAMA_CONTEXT_LENGTH", "0.5.12", "not yet", None),
        ("OLLAMA_CONTEXT_LENGTH", "0.5.13", "read", "2048"),
        ("OLLAMA_CONTEXT_LENGTH", "v0.15.4", "read", "4096"),
        ("OLLAMA_GPU_OVERHEAD", None, "barely", "0 bytes"),
        ("OLLAMA_NUM_CTX", "0.6.0", "ignored", None),
        ("OLLAMA_NEW_ENGINE", "0.24.0", "read", None),
        ("OLLAMA_NEW_ENGINE", "0.30.0", "gone", None),
        ("OLLAMA_NEW_ENGINE", "0.5.0", "not yet", None),
        ("LLAMA_ARG_THREADS", "0.24.0", "not yet", None),
        ("truncate", "0.12.5", "not yet", None),
        ("repeat_penalty", "0.18.0", "read", "1.1"),
        ("repeat_penalty", None, "read", "1"),
        ("mirostat", None, "gone", "0"),
        ("num_threads", None, "ignored", None),
    ],
)
def test_a_release_decides_what_a_name_means(name, version, status, default):
    known = TABLE.setting(name, version)
    assert (known.status, known.default, known.certain) == (status, default, True)


def test_what_is_unknown_is_said_to_be_so():
    assert TABLE.setting("OLLAMA_NEW_THING").status == "unknown"
    assert not TABLE.setting("OLLAMA_NEW_THING").certain
    for version in ("0.4.7", "0.34.0", "1.0.0", "main"):
        assert not TABLE.setting("OLLAMA_NUM_PARALLEL", version).certain, version
    for version in ("0.5.0", "0.33.0-rc2", "0.33.4", "v0.32.15"):
        assert TABLE.setting("OLLAMA_NUM_PARALLEL", version).certain, version


def test_fields_that_reload_a_model_are_marked():
    reloading = {name for name, row in TABLE.request.items() if row.reload and row.status_at() == "read"}
    assert reloading == {
        "num_ctx", "num_batch", "num_thread", "num_gpu", "main_gpu", "use_mmap", "draft_num_predict", "shift",
    }  # fmt: skip
    top = {name for name, row in TABLE.request.items() if row.where == "top"}
    assert {"keep_alive", "truncate", "shift", "think", "format", "dimensions"} <= top


@pytest.mark.parametrize(
    ("values", "version", "codes"),
    [
        ({"OLLAMA_KV_CACHE_TYPE": "Q8_0", "OLLAMA_FLASH_ATTENTION": "false"}, None, {("kv-cache", "error")}),
        ({"OLLAMA_KV_CACHE_TYPE": "q8_0", "OLLAMA_FLASH_ATTENTION": "off"}, None, set()),  # "off" counts as true
        ({"OLLAMA_KV_CACHE_TYPE": "q8_0", "OLLAMA_FLASH_ATTENTION": "0"}, "0.20.0", {("kv-cache", "warning")}),
        ({"OLLAMA_KV_CACHE_TYPE": "q8_0"}, "0.6.0", {("kv-cache", "warning")}),
        ({"OLLAMA_KV_CACHE_TYPE": "q8_0"}, "0.13.0", set()),
        ({"OLLAMA_KV_CACHE_TYPE": "f16", "OLLAMA_FLASH_ATTENTION": "0"}, None, set()),
        ({"OLLAMA_MAX_LOADED_MODELS": "1"}, None, {("models-evict", "warning")}),
        ({"OLLAMA_CONTEXT_LENGTH": "2048"}, None, {("window-small", "warning")}),
        ({"OLLAMA_CONTEXT_LENGTH": "2048"}, "0.6.0", set()),
        ({"OLLAMA_CONTEXT_LENGTH": "262144", "OLLAMA_NUM_PARALLEL": "4"}, None, {("window-huge", "warning")}),
        ({"OLLAMA_CONTEXT_LENGTH": "131072", "OLLAMA_NUM_PARALLEL": "4"}, None, set()),
        ({"OLLAMA_CONTEXT_LENGTH": "1048576"}, None, set()),  # the number of slots is not known here
    ],
)
def test_settings_that_do_not_go_together_are_data(values, version, codes):
    found = {(c.code, c.severity) for c in TABLE.contradictions if c.severity != "info" and c.applies(values, version)}
    assert {(code, severity) for code, severity in found} == {
        (next(c.code for c in TABLE.contradictions if c.code.startswith(start)), severity) for start, severity in codes
    }


def test_families_that_get_one_slot_are_known_by_release():
    assert TABLE.one_slot_for(["llama"]) is None
    assert TABLE.one_slot_for(["qwen35moe"]) == "qwen35moe"
    assert TABLE.one_slot_for(["qwen35moe"], "0.16.0") is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("OLLAMA_NUM_PARALEL", "OLLAMA_NUM_PARALLEL"), ("OLAMA_NUM_PARALLEL", "OLLAMA_NUM_PARALLEL"),
        ("OLLAMA_CONTEXT_LENGHT", "OLLAMA_CONTEXT_LENGTH"), ("ollama_keep_alive", "OLLAMA_KEEP_ALIVE"),
        ("OLLAMA_MAX_LOADED_MODEL", "OLLAMA_MAX_LOADED_MODELS"), ("OLLAMA_MY_APP", None), ("OLLAMA_MODEL_ID", None),
        ("REDIS_HOST", None), ("LLAMA_ARG_THREADS", None),
    ],
)  # fmt: skip
def test_misspelt_names_are_recognised(name, meant):
    assert TABLE.nearest(name) == meant


def test_the_table_renders_as_markdown():
    text = TABLE.render_markdown()
    for row in ROWS:
        assert text.count(f"| `{row.name}` |") == 1, row.name
    assert "1 (before 0.10.0: chosen by memory: 2 or 1; before 0.6.7: chosen by memory: 4 or 1)" in text
    old = TABLE.render_markdown("0.5.7")
    assert "| `OLLAMA_NUM_PARALLEL` | 0.1.34 | chosen by memory: 4 or 1 |" in old
    widths = [len(line.replace("\\|", "").split("|")) for line in text.splitlines() if line.startswith("|")]
    assert set(widths) == {6, 8, 11}
