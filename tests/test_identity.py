"""Two models share an answer only if nothing that changes answers differs between them."""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from langchain_aegis.errors import AegisOptionError
from langchain_aegis.identity import EXECUTION_OPTIONS, PREFIX, identify, llm_string, normalise_model

CHANGING = ["temperature", "num_ctx", "num_predict", "seed", "top_k", "top_p", "min_p", "repeat_penalty", "num_keep",
            "presence_penalty", "mirostat", "an_option_of_tomorrow"]  # fmt: skip
values = st.one_of(st.integers(-1000, 1000), st.floats(-100, 100), st.booleans())
options = st.dictionaries(st.sampled_from(CHANGING), values)
fields = st.fixed_dictionaries(
    {"model": st.sampled_from(["m", "m:7b", "n", "hub/m"])},
    optional={
        "options": options,
        "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3),
        "tools": st.lists(st.fixed_dictionaries({"name": st.text(max_size=3)}), max_size=3),
        "format": st.one_of(st.just("json"), st.fixed_dictionaries({"type": st.text(max_size=3)})),
        "think": st.one_of(st.booleans(), st.sampled_from(["low", "high"])),
        "logprobs": st.booleans(),
        "truncate": st.booleans(),
    },
)


def string(**parts):
    return llm_string(identify(**parts))


def same(a, b):
    """Equal as Ollama's options are: 0 and 0.0 agree, 1 and True do not."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


@settings(deadline=None)
@given(fields, st.sampled_from(CHANGING), values)
def test_any_answer_changing_option_changes_the_string(parts, name, value):
    """Set one option to another value: another string."""
    before = parts.get("options", {})
    assume(not (name in before and same(before[name], value)))
    assert string(**parts) != string(**{**parts, "options": {**before, name: value}})


@settings(deadline=None)
@given(fields, st.sampled_from(sorted(EXECUTION_OPTIONS)), values)
def test_options_of_execution_do_not_change_it(parts, name, value):
    """Threads, layers and batch size leave the answer alone."""
    assert string(**parts) == string(**{**parts, "options": {**parts.get("options", {}), name: value}})


@settings(deadline=None)
@given(fields, fields)
def test_different_fields_never_share_a_string(one, other):
    """The string is injective up to order, missing values and 0 = 0.0."""

    def plain(parts):
        opts = tuple(sorted((k, isinstance(v, bool), v) for k, v in parts.get("options", {}).items()))
        stop = frozenset(parts.get("stop", ()))
        rest = {
            k: parts[k] for k in ("tools", "format", "think", "logprobs", "truncate") if parts.get(k) not in (None, [])
        }
        return normalise_model(parts["model"]), opts, stop, repr(sorted(rest.items(), key=lambda kv: kv[0]))

    assert (string(**one) == string(**other)) == (plain(one) == plain(other))


@pytest.mark.row(118)
@settings(deadline=None)
@given(fields, st.randoms())
def test_order_never_matters(parts, random):
    """Neither the order of options nor that of stops."""
    shuffled = list(parts.get("options", {}).items())
    random.shuffle(shuffled)
    stops = list(parts.get("stop", []))
    random.shuffle(stops)
    mixed = dict(reversed(list({**parts, "options": dict(shuffled), "stop": stops}.items())))
    assert string(**mixed) == string(**parts)


@settings(deadline=None)
@given(fields)
def test_the_form_is_one_prefix_and_compact_sorted_json(parts):
    """The cache parses exactly this form."""
    text = string(**parts)
    assert text.startswith(PREFIX)
    body = text[len(PREFIX) :]
    assert body == json.dumps(json.loads(body), sort_keys=True, separators=(",", ":"))


def test_what_is_absent_is_left_out():
    """None, an empty list and a missing field are one thing."""
    bare = string(model="m")
    assert bare == 'aegis/1 {"model":"m:latest"}'
    assert bare == string(model="m:latest", options={"temperature": None}, stop=[], tools=[], format="", think=None)
    assert bare != string(model="m", think=False)


@pytest.mark.parametrize(
    ("name", "full"),
    [("x", "x:latest"), ("x:7b", "x:7b"), ("hub/x", "hub/x:latest"), ("host:5000/a/x", "host:5000/a/x:latest")],
)
def test_a_model_without_a_tag_is_its_latest(name, full):
    """`x` and `x:latest` are one model; a port is no tag."""
    assert normalise_model(name) == full


def test_zero_and_zero_point_zero_agree_and_true_is_no_number():
    """Numbers are compared as numbers."""
    assert string(model="m", options={"temperature": 0}) == string(model="m", options={"temperature": 0.0})
    assert string(model="m", options={"temperature": 1}) != string(model="m", options={"temperature": True})
    assert string(model="m", options={"temperature": 0.7}) != string(model="m", options={"temperature": 0.70001})


def test_the_order_of_a_schemas_properties_counts():
    """A grammar makes the model write properties in the schema's order, so reasoning may come before the answer."""
    one = {"type": "object", "properties": {"why": {"type": "string"}, "answer": {"type": "string"}}}
    other = {"type": "object", "properties": dict(reversed(one["properties"].items()))}
    assert string(model="m", format=one) != string(model="m", format=other)
    assert string(model="m", format=one) == string(model="m", format=dict(reversed(one.items())))


def test_stop_may_come_from_the_options():
    """However a stop is given, it is the same stop."""
    assert string(model="m", options={"stop": ["a", "b"]}) == string(model="m", stop=["b", "a", "a"])


@pytest.mark.row(118)
def test_a_value_that_json_cannot_say_is_refused():
    """Never a random key."""
    with pytest.raises(AegisOptionError, match="JSON"):
        string(model="m", options={"seed": object()})
