"""`aegis plan`: the arithmetic grows as it must, agrees with what others measured, and never recommends what fails."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.ollama.plan import (
    CELL,
    GB,
    MIB,
    MOST_SLOTS,
    Layout,
    Room,
    batch_of,
    compute_bytes,
    fits,
    kv_bytes,
    largest_context,
    most_slots,
    need,
    settle,
)
from langchain_aegis.ollama.plan_metadata import needs_lists, of_metadata
from langchain_aegis.ollama.plan_quantisation import (
    check_quantisation,
    kv_bits,
    kv_types,
    meets,
    of_name,
    quality_levels,
    quantisations,
)
from langchain_aegis.ollama.plan_shape import (
    Shape,
    known_models,
    of_size,
    of_table,
    of_tag,
    parse_size,
)
from langchain_aegis.ollama.plan_speed import ceiling, estimate, measurements, shares

SPARK = Room(memory_bytes=128 * GB, reserve_bytes=32 * GB, shared=True, gpu=True)
SHAPES = [of_table(name) for name in known_models()]


def room(gigabytes, *, shared=False):
    return Room(memory_bytes=round(gigabytes * GB), reserve_bytes=0, shared=shared, gpu=True)


layouts = st.builds(
    Layout,
    slots=st.integers(1, 16),
    context=st.integers(1, 131_072),
    kv_type=st.sampled_from(kv_types()),
    flash_attention=st.booleans(),
    prompt_cache_mib=st.integers(0, 8192),
)
rooms = st.builds(
    Room,
    memory_bytes=st.integers(1, 200).map(lambda n: n * GB),
    reserve_bytes=st.integers(0, 40).map(lambda n: n * GB),
    shared=st.booleans(),
    gpu=st.booleans(),
)
shapes = st.sampled_from(SHAPES)


# -- The shipped table of models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", known_models())
def test_a_models_parameters_follow_from_its_shape(name):
    """Guards the table against a wrong number: it is off by less than one in a thousand."""
    row = known_models()[name]
    experts = row.get("experts", 0)
    attention = 2 * row["embedding"] * row["head"] * (row["heads"] + row["kv_heads"])
    feed_forward = row["embedding"] * (3 * row["feed_forward"] * max(experts, 1) + experts)
    tables = row["vocabulary"] * row["embedding"] * (1 if row.get("tied") else 2)
    assert row["layers"] * (attention + feed_forward) + tables == pytest.approx(row["parameters"], rel=1e-3)


@pytest.mark.parametrize(("name", "billions"), [("gpt-oss:20b", 3.6), ("gpt-oss:120b", 5.1), ("qwen3:30b-a3b", 3.3)])
def test_active_parameters_are_those_that_the_makers_name(name, billions):
    """The makers count the table of tokens once; a token reads one row of it."""
    shape = of_table(name)
    assert shape.parameters_read() / 1e9 == pytest.approx(billions, abs=0.35)
    assert shape.parameters_read(10**6) == pytest.approx(shape.parameters - shape.vocabulary * shape.embedding)


@pytest.mark.parametrize(
    ("asked", "known", "quantisation"),
    [
        ("llama3.1", "llama3.1:8b", "Q4_K_M"),
        ("llama3.1:8b-instruct-q8_0", "llama3.1:8b", "Q8_0"),
        ("llama3.1:8b-instruct-fp16", "llama3.1:8b", "F16"),
        ("qwen3:30b-a3b-instruct-2507-q4_K_M", "qwen3:30b-a3b", "Q4_K_M"),
        ("gpt-oss:latest", "gpt-oss:20b", "MXFP4"),
    ],
)
def test_a_name_says_model_and_quantisation(asked, known, quantisation):
    shape = of_table(asked)
    assert (shape.name, shape.quantisation) == (known, quantisation)


def test_an_unknown_name_is_planned_by_the_size_in_its_tag():
    shape = of_tag("mymodel:13b")
    assert (shape.parameters, shape.quantisation) == (13_000_000_000, "Q4_K_M")
    assert "phi4:14b" in shape.assumed[0]
    with pytest.raises(AegisConfigError, match="--parameters 8b"):
        of_tag("mymodel")


def test_a_model_larger_than_all_known_ones_takes_the_largest_dense_shape():
    assert "llama3.3:70b" in of_size("x", 400 * GB).assumed[0]


@pytest.mark.parametrize(
    ("text", "number"),
    [("8b", 8e9), ("8.03B", 8.03e9), ("270M", 270e6), ("8000000000", 8e9), ("8 B", 8e9), ("eight", None), ("", None)],
)
def test_sizes_are_read(text, number):
    assert parse_size(text) == number


# -- Weights and quantisations ------------------------------------------------------------------------------------


def test_smaller_files_lose_more():
    rows = [row for row in quantisations().values() if row.kl is not None and row.name != "F16"]
    assert [row.bits for row in rows] == sorted(row.bits for row in rows)
    assert [row.kl for row in rows] == sorted((row.kl for row in rows), reverse=True)


def test_the_file_of_llama_has_the_published_size():
    """4.58 GiB, llama.cpp tools/quantize/README.md."""
    assert of_table("llama3.1:8b").weights_bytes / 2**30 == pytest.approx(4.58, abs=0.01)


def test_quality_levels_are_met_by_what_loses_less():
    best = [next(row.name for row in quantisations().values() if row.kl and meets(row, most))
            for most in quality_levels().values()]  # fmt: skip
    assert best == ["Q8_0", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]


@pytest.mark.parametrize("text", ["Q4_K_M", "q4_K_M", "q4km", "Q4-K-M"])
def test_any_spelling_of_a_quantisation_is_understood(text):
    assert check_quantisation(text) == "Q4_K_M"


def test_a_quantisation_that_is_none_is_refused_with_those_that_are():
    with pytest.raises(AegisConfigError, match=r"Q2_K, .*, F16, got 'q9'"):
        check_quantisation("q9")
    with pytest.raises(AegisConfigError, match="f16, q8_0, q4_0, got 'q8'"):
        kv_bits("q8")


def test_a_tag_without_a_quantisation_keeps_its_name():
    assert of_name("qwen3:30b-a3b") == ("qwen3:30b-a3b", None)


# -- Memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "context", "mib"),
    [
        # "llama_kv_cache: size = 1024.00 MiB (8192 cells, 32 layers)", as llama.cpp logs for these shapes
        ("llama3.1:8b", 8192, 1024),
        ("qwen2.5:7b", 32768, 1792),
        ("llama3.3:70b", 4096, 1280),
    ],
)
def test_keys_and_values_take_what_the_runner_says(name, context, mib):
    assert kv_bytes(of_table(name), Layout(slots=1, context=context)) == mib * MIB


def test_a_layer_with_a_sliding_window_keeps_that_and_one_batch():
    """29 of 34 layers of gemma3:4b see 1,024 tokens: 2,048 cells with batches of 1,024, whatever the window."""
    shape = of_table("gemma3:4b")
    per_token = 2 * 4 * 256 * 2  # keys and values, heads, their length, bytes
    full, sliding = 5 * 8192 * per_token, 29 * 2048 * per_token
    assert kv_bytes(shape, Layout(slots=1, context=8192)) == full + sliding


def test_a_quantised_cache_is_about_half_and_a_quarter():
    shape = of_table("llama3.1:8b")
    f16, q8_0, q4_0 = (kv_bytes(shape, Layout(slots=1, context=8192, kv_type=kind)) for kind in kv_types())
    assert (q8_0 / f16, q4_0 / f16) == (8.5 / 16, 4.5 / 16)


def test_the_buffers_are_near_what_the_runner_says():
    """llama.cpp logs 258.50 MiB for Llama 3.1 8B with flash attention, 560 MiB without, at 8,192 tokens."""
    shape, layout = of_table("llama3.1:8b"), Layout(slots=1, context=4096)
    assert compute_bytes(shape, layout, gpu=False) / MIB == pytest.approx(258.5, rel=0.15)
    without = replace(layout, context=8192, flash_attention=False)
    assert compute_bytes(shape, without, gpu=False) / MIB == pytest.approx(560, rel=0.5)


@settings(deadline=None)
@given(shapes, layouts, rooms, st.integers(1, 8192), st.integers(1, 8))
def test_memory_grows_with_the_window_and_the_slots(shape, layout, where, tokens, slots):
    before = need(shape, layout, where).total
    assert need(shape, replace(layout, context=layout.context + tokens), where).total >= before
    assert need(shape, replace(layout, slots=layout.slots + slots), where).total > before


@settings(deadline=None)
@given(shapes, layouts, rooms)
def test_what_is_recommended_fits_and_is_not_more_than_was_asked_for(shape, layout, where):
    settled = settle(shape, layout, where)
    if settled is None:
        smallest = min(4096, layout.context, shape.window)
        assert not fits(shape, replace(layout, slots=1, context=smallest), where)
        return
    assert fits(shape, settled, where)
    assert 1 <= settled.slots <= layout.slots
    assert settled.context <= min(layout.context, shape.window)
    assert replace(settled, slots=layout.slots, context=layout.context) == layout


@settings(deadline=None)
@given(shapes, layouts, rooms)
def test_the_largest_window_and_the_most_slots_are_the_last_that_fit(shape, layout, where):
    context, slots = largest_context(shape, layout, where), most_slots(shape, layout, where)
    if context:
        assert fits(shape, replace(layout, context=context), where)
        assert context <= shape.window
    if context + CELL <= shape.window:
        assert not fits(shape, replace(layout, context=context + CELL), where)
    if slots:
        assert fits(shape, replace(layout, slots=slots), where)
    if slots < MOST_SLOTS:
        assert not fits(shape, replace(layout, slots=slots + 1), where)


def test_the_application_fits_the_machine_that_it_runs_on():
    """Four RAG prompts of 15,000 tokens and their answers, on one DGX Spark."""
    wish = Layout(slots=4, context=32768)
    assert settle(of_table("gpt-oss:120b"), wish, SPARK) == settle(of_table("qwen3:32b"), wish, SPARK) == wish
    large = of_table("llama3.3:70b")
    assert settle(large, wish, SPARK) == replace(wish, slots=3)  # 96.4 of 96 GB with four
    assert settle(large, replace(wish, kv_type="q8_0"), SPARK).slots == 4
    assert settle(large.stored_as("Q8_0"), wish, SPARK).slots == 1


def test_a_window_is_kept_before_slots_are_and_shrinks_only_then():
    shape = of_table("llama3.1:8b")
    assert settle(shape, Layout(slots=4, context=16384), room(12)) == Layout(slots=2, context=16384)
    small = settle(shape, Layout(slots=4, context=131072), room(12))
    assert (small.slots, small.context % CELL) == (1, 0)
    assert 16384 < small.context < 131072
    assert settle(shape, Layout(slots=4, context=16384), room(4)) is None


def test_a_model_that_runs_one_answer_at_a_time_gets_one_slot():
    shape = replace(of_table("qwen3:8b"), single_slot=True)
    assert settle(shape, Layout(slots=4, context=8192), SPARK).slots == 1


def test_prompts_seen_before_count_where_the_memory_is_shared():
    shape, layout = of_table("llama3.1:8b"), Layout(slots=1, context=8192)
    own, shared = (need(shape, layout, room(24, shared=shared)).total for shared in (False, True))
    assert shared - own == 8192 * MIB


@pytest.mark.parametrize(("context", "slots", "batch"), [(4096, 1, 512), (4096, 4, 1024), (32768, 4, 2048)])
def test_batches_are_those_that_ollama_chooses(context, slots, batch):
    """Measured: 512 at 4,096 tokens, 1,024 with four slots."""
    assert batch_of(Layout(slots=slots, context=context)) == batch


# -- Speed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", measurements(), ids=lambda r: f"{r.shape.name}-{r.answers}-{r.tokens}")
def test_no_published_speed_is_above_the_ceiling(row):
    """And none below half of it: the model of weights and cache read once per token explains all of them."""
    assert 0.5 < row.share < 1
    assert row.ceiling * shares(several=row.answers > 1)[0] <= row.tokens_s * 1.0001


@settings(deadline=None)
@given(shapes, st.integers(0, 100_000), st.integers(1, 16), st.floats(50, 2000))
def test_speed_falls_with_the_prompt_and_rises_with_the_bandwidth(shape, tokens, answers, bandwidth):
    here = ceiling(shape, bandwidth, tokens, answers=answers)
    assert ceiling(shape, bandwidth, tokens + 4096, answers=answers) <= here
    assert ceiling(shape, bandwidth * 2, tokens, answers=answers) == pytest.approx(here * 2)
    assert ceiling(shape, bandwidth, tokens, answers=answers + 1) > here
    speed = estimate(shape, bandwidth, tokens, answers=answers)
    assert 0 < speed.low < speed.high < speed.ceiling == here


# -- What a server says -------------------------------------------------------------------------------------------


def shown(architecture="llama", capabilities=("completion",), **own):
    info = {"general.architecture": architecture, "general.parameter_count": 8_030_261_248}
    info |= {f"{architecture}.{name.replace('__', '.')}": value for name, value in own.items()}
    return {
        "model_info": info,
        "details": {"family": architecture, "parameter_size": "8.0B", "quantization_level": "Q4_K_M"},
        "capabilities": list(capabilities),
    }


LLAMA = {
    "block_count": 32, "embedding_length": 4096, "feed_forward_length": 14336, "context_length": 131072,
    "vocab_size": 128256, "attention__head_count": 32, "attention__head_count_kv": 8,
}  # fmt: skip


def test_a_server_and_the_table_agree():
    found, known = of_metadata("mine", shown(**LLAMA), 4_920_000_000), of_table("llama3.1:8b")
    assert found.weights_bytes == 4_920_000_000
    for name in ("full_width", "window", "vocabulary", "tied", "parameters", "quantisation"):
        assert getattr(found, name) == getattr(known, name), name


def test_an_embedding_model_has_one_slot():
    assert of_metadata("e", shown(capabilities=("embedding",), **LLAMA), GB).single_slot
    assert of_metadata("q", shown("qwen3next", **LLAMA), GB).single_slot


def test_lists_by_layer_are_used():
    """As nemotron_h has them: 0 heads is a layer with a state and no cache."""
    own = LLAMA | {"attention__head_count_kv": [8, 0, 8, 0], "block_count": 4}
    own |= {"ssm__inner_size": 8192, "ssm__state_size": 128, "ssm__group_count": 8, "ssm__conv_kernel": 4}
    shape = of_metadata("h", shown("nemotron_h", **own), GB)
    assert shape.full_width == 2 * 8 * 256
    assert shape.state_bytes == 2 * 4 * (3 * (8192 + 2 * 8 * 128) + 128 * 8192)
    assert not needs_lists(shown("nemotron_h", **own))


def test_lists_that_were_left_out_are_asked_for():
    assert needs_lists(shown(**LLAMA | {"attention__head_count_kv": None}))
    assert needs_lists(shown(**LLAMA | {"attention__sliding_window_pattern": []}))
    assert not needs_lists({})


def test_a_pattern_in_the_file_wins_over_the_table():
    own = LLAMA | {"block_count": 4, "attention__sliding_window": 512}
    pattern = {"attention__sliding_window_pattern": [True, True, True, False]}
    assert of_metadata("g", shown("gemma3", **own | pattern), GB).full_width == 8 * 256
    assert of_metadata("g", shown("gemma2", **own), GB).full_width == 2 * 8 * 256
    assert of_metadata("n", shown("newarch", **own), GB).sliding_width == 0  # unknown: never too little memory


def test_layers_that_share_a_cache_or_have_a_state_have_none():
    shared = LLAMA | {"attention__shared_kv_layers": 12}
    assert of_metadata("s", shown(**shared), GB).full_width == 20 * 8 * 256
    every_fourth = LLAMA | {"full_attention_interval": 4}
    assert of_metadata("q", shown("qwen3next", **every_fourth), GB).full_width == 8 * 8 * 256


def test_the_most_is_assumed_where_the_server_says_nothing():
    own = {k: v for k, v in LLAMA.items() if k not in ("attention__head_count_kv", "vocab_size")}
    shape = of_metadata("m", shown(**own), GB)
    assert shape.full_width == 32 * 32 * 256
    assert len(shape.assumed) == 2


def test_a_server_that_says_too_little_is_no_source():
    assert of_metadata("m", {"model_info": {"general.architecture": "llama"}, "details": {}}, GB) is None
    assert of_metadata("m", {}, GB) is None


def test_shapes_are_values():
    assert isinstance(hash(of_table("llama3.1:8b")), int)
    assert Shape(**vars(of_table("llama3.1:8b"))) == of_table("llama3.1:8b")
