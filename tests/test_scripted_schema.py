"""Values made for a JSON schema: they satisfy it, whatever the schema, whatever the prompt."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_aegis.embedded.scripted_schema import Filler

SCHEMAS: dict[str, Any] = {
    "nested": {
        "type": "object",
        "required": ["who", "items"],
        "properties": {
            "who": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string", "maxLength": 4}}},
            "items": {"type": "array", "minItems": 3, "items": {"type": "integer", "minimum": 5, "maximum": 6}},
        },
    },
    "references": {
        "$defs": {
            "Colour": {"enum": ["red", "green"]},
            "Node": {
                "type": "object",
                "required": ["value", "next"],
                "properties": {
                    "value": {"$ref": "#/$defs/Colour"},
                    "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
                },
            },
        },
        "$ref": "#/$defs/Node",
    },
    "unique": {"type": "array", "minItems": 3, "uniqueItems": True, "items": {"type": "integer", "minimum": 1}},
    "merged": {
        "allOf": [
            {"type": "object", "required": ["a"], "properties": {"a": {"const": 5}}},
            {"required": ["b"], "properties": {"b": {"type": "boolean"}}},
        ]
    },
    "formats": {
        "type": "object",
        "required": ["day", "code"],
        "properties": {
            "day": {"type": "string", "format": "date"},
            "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
        },
    },
    "numbers": {
        "type": "object",
        "required": ["x", "y", "z"],
        "properties": {
            "x": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
            "y": {"type": "integer", "multipleOf": 7, "minimum": 20},
            "z": {"type": ["null", "number"], "maximum": -3},
        },
    },
}

_scalars = st.one_of(
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-100, 100),
        st.integers(0, 20),
    ),
    st.builds(
        lambda low, span: {"type": "number", "exclusiveMinimum": low, "maximum": low + span},
        st.integers(-9, 9),
        st.sampled_from([0.25, 1, 7]),
    ),
    st.builds(
        lambda least, span: {"type": "string", "minLength": least, "maxLength": least + span},
        st.integers(0, 30),
        st.integers(0, 9),
    ),
    st.just({"type": "boolean"}),
    st.lists(st.sampled_from(["red", "green", 3, None]), min_size=1, unique=True).map(lambda items: {"enum": items}),
)
_schemas = st.recursive(
    _scalars,
    lambda inner: st.one_of(
        st.builds(
            lambda items, least, span: {"type": "array", "items": items, "minItems": least, "maxItems": least + span},
            inner,
            st.integers(0, 3),
            st.integers(0, 3),
        ),
        st.builds(
            lambda properties, count: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:count],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from("abcd"), inner, max_size=4),
            st.integers(0, 4),
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda choices: {"anyOf": choices}),
        inner.map(lambda one: {"anyOf": [{"type": "null"}, one]}),
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("name", SCHEMAS)
def test_satisfies_the_schema(name: str) -> None:
    jsonschema.validate(Filler("Ada bought 5 green apples", "").value(SCHEMAS[name]), SCHEMAS[name])


@settings(deadline=None, max_examples=100)
@given(schema=_schemas, text=st.text(max_size=60), seed=st.text(max_size=3))
@pytest.mark.slow
def test_satisfies_any_schema(schema: dict[str, Any], text: str, seed: str) -> None:
    """The value is the same for the same prompt and seed."""
    value = Filler(text, seed).value(schema)
    jsonschema.validate(value, schema)
    assert value == Filler(text, seed).value(schema)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Bob is 42 years old. Answer as JSON.", "Bob"),
        ("Please look up Ada Lovelace", "Ada Lovelace"),
        ("Create a customer named '你好啊集团' (Hello Group)", "你好啊集团"),
        ("tell me about penguins", "penguins"),
        ("", "something"),
    ],
)
def test_strings_are_what_the_prompt_names(text: str, name: str) -> None:
    assert Filler(text, "").value({"type": "string"}) == name


def test_numbers_are_the_prompts_as_far_as_they_are_allowed() -> None:
    filler = Filler("Add 1.5 and 200 and 3", "")
    assert filler.value({"type": "integer", "maximum": 10}) == 3
    assert filler.value({"type": "number"}) == 1.5
    assert filler.value({"type": "integer"}) == 200


def test_a_schema_that_contains_itself_ends() -> None:
    tree = {
        "$defs": {"T": {"type": "object", "properties": {"left": {"$ref": "#/$defs/T"}, "v": {"type": "integer"}}}},
        "$ref": "#/$defs/T",
    }
    jsonschema.validate(Filler("x", "").value(tree), tree)
