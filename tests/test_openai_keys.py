"""The key of what ChatOpenAI answers: model, server and every option that changes an answer; nothing else."""

import pytest
from langchain_core.load import dumps
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

from langchain_aegis import BatchingChatModel
from langchain_aegis.keys import Keyring, Who
from langchain_aegis.model_parts import _TRANSPORT, model_fields, parse_llm_string

SERVER = "http://127.0.0.1:8000/v1"
RING = Keyring(b"0123456789abcdef0123456789abcdef")
QUESTION = dumps([HumanMessage("How long may I keep a book?")])

# Field -> a value that is not the default.
ANSWERS = {
    "model": "other", "base_url": "http://127.0.0.1:8001/v1", "temperature": 0.5, "model_kwargs": {"top_k": 3},
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "seed": 7, "logprobs": True, "top_logprobs": 2,
    "logit_bias": {1: 2}, "n": 2, "top_p": 0.5, "max_completion_tokens": 9, "reasoning_effort": "low",
    "reasoning": {"effort": "low"}, "verbosity": "low", "stop_sequences": ["X"], "extra_body": {"min_p": 0.1},
    "default_headers": {"x-route": "b"}, "default_query": {"v": "2"}, "organization": "o",
    "disabled_params": {"n": None},
    "include": ["x"], "service_tier": "flex", "store": True, "truncation": "auto", "use_previous_response_id": True,
    "use_responses_api": True, "output_version": "v1", "include_response_headers": True,
    "context_management": [{"type": "x"}], "prompt_cache_options": {"ttl": "1h"},
}  # fmt: skip
TRANSPORT = {
    "timeout": 3.0, "max_retries": 7, "streaming": True, "stream_usage": True, "stream_chunk_timeout": 9.0,
    "disable_streaming": True, "openai_proxy": "http://127.0.0.1:3128", "api_key": "another",
    "tiktoken_model_name": "gpt-4o", "name": "my node", "tags": ["a"], "metadata": {"a": "b"}, "verbose": True,
    "cache": False, "custom_get_token_ids": len, "http_socket_options": [],
}  # fmt: skip
MADE = {"callbacks", "rate_limiter", "client", "async_client", "root_client", "root_async_client", "profile",
        "http_client", "http_async_client"}  # fmt: skip

FIELDS = {field.alias or name for name, field in ChatOpenAI.model_fields.items()}  # earlier releases have fewer


def made(**options):
    return ChatOpenAI(**{"model": "llama", "base_url": SERVER, "api_key": "none", **options})


def key(llm_string):
    found = RING.for_prompt(QUESTION, llm_string, Who())
    return found.exact, found.scope


def of(**options):
    return key(made(**options)._get_llm_string())


@pytest.mark.parametrize("field", [name for name in ANSWERS if name in FIELDS])
def test_what_may_change_an_answer_changes_the_key(field):
    ours, other = of(), of(**{field: ANSWERS[field]})
    assert ours[0] != other[0]
    assert ours[1] != other[1]


@pytest.mark.parametrize("field", [name for name in TRANSPORT if name in FIELDS])
def test_how_an_answer_comes_does_not_change_the_key(field):
    assert of() == of(**{field: TRANSPORT[field]})


def test_every_field_of_the_model_is_one_of_the_two():
    """One that a later release adds is part of the key; whoever reads this decides whether it should be."""
    assert FIELDS - set(ANSWERS) - set(TRANSPORT) - MADE == set()
    told = {field.alias or name for name, field in ChatOpenAI.model_fields.items() if name in _TRANSPORT}
    assert told <= set(TRANSPORT)


def test_a_field_that_nobody_knows_is_part_of_the_key():
    text = made()._get_llm_string()
    assert key(text) != key(
        text.replace('"max_tokens"', '"x"').replace('{"model_name"', '{"brand_new": 1, "model_name"')
    )


def test_the_same_address_in_other_words_is_the_same_server():
    assert of() == of(base_url=SERVER + "/")


def test_the_address_that_only_the_client_reads_names_the_server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_BASE", raising=False)
    keys = []
    for port in (8000, 8001):
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
        model = ChatOpenAI(model="llama", api_key="none")
        assert str(model.root_client.base_url) == f"http://127.0.0.1:{port}/v1/"
        keys.append(key(model._get_llm_string()))
    assert keys[0] != keys[1]
    assert keys[0] == of()
    assert of(base_url=SERVER) == of()  # what the model names itself wins


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"extra_body": {"guided_json": {"type": "object"}}}, "structured_output"),
        ({"extra_body": {"structured_outputs": {"choice": ["a", "b"]}}}, "structured_output"),
        ({"extra_body": {"grammar": "root ::= x"}}, "structured_output"),
        ({"model_kwargs": {"response_format": {"type": "json_object"}}}, "structured_output"),
        ({"model_kwargs": {"tools": [{"type": "function"}]}}, "tools"),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, None),
        ({"extra_body": {"guided_json": None, "top_k": 3}}, None),
        ({}, None),
    ],
)
def test_tools_and_structured_output_are_seen_wherever_they_are_told(options, reason):
    assert parse_llm_string(made(**options)._get_llm_string()).exact_only == reason


@pytest.mark.parametrize(
    ("bound", "reason"),
    [
        (lambda m: m.bind_tools([{"type": "function", "function": {"name": "f", "parameters": {}}}]), "tools"),
        (lambda m: m.bind(extra_body={"guided_choice": ["a"]}), "structured_output"),
        (lambda m: m.bind(response_format={"type": "json_object"}), "structured_output"),
        (lambda m: m.bind(stop=["---"]), None),
        (lambda m: m.bind(model="another"), None),
    ],
)
def test_the_same_of_a_single_call(bound, reason):
    call = bound(made())
    text = call.bound._get_llm_string(**call.kwargs)
    part = parse_llm_string(text)
    assert part.exact_only == reason
    assert part.name == ("another" if "model" in call.kwargs else "llama")
    assert key(text)[0] != of()[0]


def test_an_end_of_the_answer_may_be_what_stands_between_the_parts_of_the_form():
    one, two = made(stop_sequences=["---"]), made(stop_sequences=["----"])
    assert parse_llm_string(one._get_llm_string(stop=["a---b"])).name == "llama"
    assert len({key(m._get_llm_string(stop=s)) for m in (one, two) for s in (None, ["---"], ["a---b"])}) == 6


def test_a_wrapper_has_the_key_of_the_model_inside():
    assert key(BatchingChatModel(made())._get_llm_string()) == of()


def test_another_class_is_taken_as_a_whole():
    class Mine(ChatOpenAI):
        pass

    ours = Mine(model="llama", base_url=SERVER, api_key="none")
    assert key(ours._get_llm_string()) != of()
    assert parse_llm_string(ours._get_llm_string()).name == "llama"


def test_what_is_explained_names_the_option_that_differs_and_no_transport():
    base = model_fields(made()._get_llm_string())
    assert model_fields(made(timeout=3, max_retries=9)._get_llm_string()) == base
    warm = model_fields(made(temperature=0.5)._get_llm_string())
    assert {part for part in base if base[part] != warm[part]} == {"options"}


@pytest.mark.parametrize(
    "text", ['{"a"', "{}", '{"id": 1}---x', '{"kwargs": []}---[]', "[1]---[]", '"ChatOpenAI"---', '{"id":']
)
def test_a_broken_form_is_opaque_or_names_no_model(text):
    part = parse_llm_string(text)
    assert part is None or (part.name, part.exact_only) == (None, "opaque_model")
