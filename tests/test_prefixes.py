"""What admission may know of a chat call."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_ollama import ChatOllama

from langchain_aegis import ChatAegis, aegis_scope
from langchain_aegis.prefixes import BLOCK_CHARS, prefix_of, traits_of_chat
from langchain_aegis.traits import background, common, priority

LONG = "The desk lends books for four weeks. " * 100


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12))
def test_common_counts_the_leading_blocks_that_are_equal(one, other):
    def cumulative(blocks):
        return tuple(hash(tuple(blocks[: n + 1])) for n in range(len(blocks)))

    naive = 0
    while naive < min(len(one), len(other)) and one[naive] == other[naive]:
        naive += 1
    assert common(cumulative(one), cumulative(other)) == naive


def test_prompts_that_begin_alike_share_their_first_blocks():
    one = prefix_of([SystemMessage("You answer."), HumanMessage(f"{LONG}\nQuestion: how long?")])
    other = prefix_of([SystemMessage("You answer."), HumanMessage(f"{LONG}\nQuestion: how much?")])
    assert common(one, other) == len(LONG) // BLOCK_CHARS
    changed = prefix_of([SystemMessage("You Answer."), HumanMessage(f"{LONG}\nQuestion: how much?")])
    assert common(one, changed) == 0


def test_who_says_it_and_which_tools_are_offered_are_part_of_the_beginning():
    one = [HumanMessage(LONG), AIMessage("yes")]
    assert common(prefix_of(one), prefix_of([AIMessage(LONG), AIMessage("yes")])) == 0
    assert common(prefix_of(one), prefix_of(one, tools=[{"name": "search"}])) == 0
    assert prefix_of(one) == prefix_of(one, tools=[])


def test_a_short_prompt_has_no_prefix_and_a_huge_one_a_bounded_one():
    assert prefix_of("How long?") == ()
    assert len(prefix_of("x" * 2_000_000)) == 256


def test_pictures_count_by_what_they_hold():
    def picture(data):
        return [
            HumanMessage([{"type": "image_url", "image_url": data * 1000}, {"type": "text", "text": "What is it?"}])
        ]

    assert common(prefix_of(picture("a")), prefix_of(picture("b"))) == 0


def test_a_runner_is_the_model_and_what_it_was_loaded_with():
    small, same, large = (
        traits_of_chat(ChatAegis(name, num_ctx=window, temperature=warmth), "x", {})
        for name, window, warmth in (("m", 2048, 0.1), ("m:latest", 2048, 0.9), ("m", 4096, 0.1))
    )
    assert small.runner == same.runner != large.runner
    assert small.model == "m:latest"


@pytest.mark.parametrize("kwargs", [{"num_ctx": 4096}, {"options": {"num_ctx": 4096}}])
def test_arguments_of_the_call_go_before_the_models(kwargs):
    model = ChatOllama(model="m", num_ctx=2048)
    assert (
        traits_of_chat(model, "x", kwargs).runner == traits_of_chat(ChatOllama(model="m", num_ctx=4096), "x", {}).runner
    )
    assert traits_of_chat(model, "x", {"model": "other"}).model == "other:latest"


def test_the_tenant_is_the_scopes():
    with aegis_scope(tenant="acme"):
        assert traits_of_chat(ChatAegis("m"), "x", {}).tenant == "acme"
    assert traits_of_chat(ChatAegis("m"), "x", {}).tenant is None


def test_the_prompt_is_read_only_when_asked_for():
    class Unread(str):
        def __getitem__(self, at):
            raise AssertionError("read")

    traits_of_chat(ChatAegis("m"), Unread("x"), {})


def test_background_traffic_is_marked_while_it_lasts():
    with background():
        assert priority.get() == "spare"
    assert priority.get() == "interactive"
