"""Whatever is asked, and with whatever beside it: an answer to just that, or an error that says what is wrong."""

from __future__ import annotations

import asyncio
import datetime
import json
import subprocess
import sys

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from lying_server import LyingServer, plain

from faults.measure import standing_still
from langchain_aegis import AegisEmbeddingCache, AegisSemanticCache, BatchingChatModel, ChatAegis, errors, was_cached

WAYS = pytest.mark.parametrize("way", ["invoke", "ainvoke"])


@pytest.fixture
def lying():
    """Answers with the last message of a request."""
    server = LyingServer(tags_aside=True)

    def echo(body):
        message = {"role": "assistant", "content": str(body["messages"][-1]["content"])}
        return plain({"model": "m", "message": message, "done": True, "done_reason": "stop"})

    server.script = echo
    yield server
    server.close()


@pytest.fixture
def cache(new_cache):
    return new_cache(op_budget_s=5)


@pytest.fixture
def model(lying, cache):
    return BatchingChatModel(ChatAegis("m", base_url=lying.url, temperature=0, cache=cache), cache=cache)


def call(model, way, asked, **more):
    return model.invoke(asked, **more) if way == "invoke" else asyncio.run(model.ainvoke(asked, **more))


# -- long ones --


@pytest.mark.row(114)
@WAYS
@pytest.mark.parametrize("size", [1_000_000, 10_000_000])
def test_a_prompt_of_megabytes_is_answered_and_found_again(lying, cache, model, stored, way, size):
    """Whatever of the answer is too large to be kept is not kept, and says so; the prompt's length does not matter."""
    asked = "How long? " + "x" * size
    lying.script = plain({"model": "m", "message": {"content": "long"}, "done": True, "done_reason": "stop"})
    for _ in range(2):
        assert call(model, way, asked).content == "long"
        stored()
    assert len(lying.requests) == 1
    assert call(model, way, asked + "x").content == "long"
    assert len(lying.requests) == 2


@pytest.mark.row(114)
@WAYS
def test_an_answer_of_megabytes_is_given_and_not_kept(lying, cache, model, stored, way):
    """Each time by the server, whole."""
    for asked in range(1, 3):
        assert len(call(model, way, "y" * 3_000_000).content) == 3_000_000
        stored()
        assert len(lying.requests) == asked
    assert cache.stats().not_stored == {"too_large": 2}


@pytest.mark.row(114)
async def test_a_long_prompt_holds_up_no_event_loop(cache):
    """A megabyte is digested elsewhere: others go on meanwhile."""
    prompt = json.dumps([{"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", "HumanMessage"],
                          "kwargs": {"content": "y" * 1_000_000, "type": "human"}}])  # fmt: skip
    held = []
    for _ in range(5):
        held.append((await standing_still(cache.alookup(prompt, "[('model', 'm'), ('stop', None)]")))[1])
        if held[-1] < 0.02:
            return
    pytest.fail(f"the loop stood still for {held}")


# -- strange ones --

STRANGE = {
    "NUL": "a\x00b",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9f",
    "joined emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466\U0001f3fd",
    "right to left": "\u202eabc\u202c \u05d0\u05d1\u05d2\u200f",
    "combining": "e\u0301\u0302\u0303" * 50,
    "private use": "\ue000\uf8ff\U000f0000\U0010fffd",
    "not characters": "\ufffe\uffff\ufdd0",
    "odd spaces": "\u00a0\u2000\u2003\u3000\u200b\ufeff x",
    "ends of lines": "a\r\nb\rc\nd\u0085e\u2028f\u2029g\x0bh\x0ci",
    "backslashes": '\\u0041\\n"\\"\\\\',
}


@pytest.mark.row(115)
@WAYS
@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_text_comes_back_as_it_is_and_is_found_again(lying, model, stored, name, way):
    """Exactly the same text is an exact hit, and one that looks like it is none."""
    asked = f"What is {STRANGE[name]} here?"
    assert call(model, way, asked).content == asked
    stored()
    again = call(model, way, asked)
    assert again.content == asked
    assert was_cached(again)["tier"] == "exact"
    assert lying.requests[0]["messages"][-1]["content"] == asked
    for other in (asked + " ", asked.replace("here", "h\u200bere"), asked.replace("W", "\uff37")):
        assert call(model, way, other).content == other
    assert len(lying.requests) == 4


@pytest.mark.row(116)
@WAYS
@pytest.mark.parametrize("where", ["the prompt", "the system message", "a tool's result", "a name"])
def test_half_of_a_pair_is_refused_before_it_is_sent(lying, model, cache, stored, where, way):
    """JSON cannot say it, so no server can be asked; no key fails over it, and nothing is kept."""
    half = "a\ud800b"
    asked = {
        "the prompt": [HumanMessage(half)],
        "the system message": [SystemMessage(half), HumanMessage("q")],
        "a tool's result": [
            HumanMessage("q"),
            AIMessage("", tool_calls=[{"name": "t", "args": {}, "id": "1"}]),
            ToolMessage(half, tool_call_id="1"),
        ],
        "a name": [AIMessage("", tool_calls=[{"name": half, "args": {}, "id": "1"}]), HumanMessage("q")],
    }[where]
    for _ in range(2):
        with pytest.raises(errors.AegisRequestError) as caught:
            call(model, way, asked)
        assert not caught.value.retryable
        stored()
    assert lying.requests == []
    assert cache.stats().not_stored == {}


class Any_(BaseChatModel):
    """A model of somebody else, that takes whatever it is told; notes each call."""

    calls: list

    @property
    def _llm_type(self):
        return "any"

    @property
    def _identifying_params(self):
        return {"model": "any"}

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        self.calls.append(kwargs)
        message = AIMessage(f"answer {len(self.calls)}", response_metadata={"done_reason": "stop"})
        return ChatResult(generations=[ChatGeneration(message=message)])


@pytest.mark.row(116)
@WAYS
def test_a_model_that_can_say_half_of_a_pair_is_cached_like_any(cache, stored, way):
    """It is another question than any other, and no error."""
    model = Any_(cache=cache, calls=[])
    assert [call(model, way, asked).content for asked in ("a\ud800b", "a\ud801b", "a?b", "a\ufffdb")] == [
        f"answer {i}" for i in range(1, 5)
    ]
    stored()
    assert call(model, way, "a\ud800b").content in ("answer 1", "answer 5")


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
OTHER = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgp="}}
SPARSE = {
    "empty": ("", " "),
    "blanks": (" \t", " \n"),
    "no parts": ([HumanMessage([])], [HumanMessage("")]),
    "a picture": ([HumanMessage([IMAGE])], [HumanMessage([OTHER])]),
    "a picture and a text": (
        [HumanMessage([{"type": "text", "text": "What is it?"}, IMAGE])],
        [HumanMessage([{"type": "text", "text": "What is it?"}, OTHER])],
    ),
    "two pictures": ([HumanMessage([IMAGE, OTHER])], [HumanMessage([OTHER, IMAGE])]),
    "texts in parts": (
        [HumanMessage([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
        [HumanMessage([{"type": "text", "text": "a"}, {"type": "text", "text": "c"}])],
    ),
    "no question": ([SystemMessage("Be brief.")], [SystemMessage("Be long.")]),
}


@pytest.mark.row(117)
@WAYS
@pytest.mark.parametrize("name", SPARSE)
def test_a_prompt_with_little_or_no_text_is_itself_and_no_other(lying, model, stored, name, way):
    """Asked again it has the same answer; pictures are a part of what was asked."""
    lying.script = lambda body: plain(
        {"model": "m", "message": {"content": f"n{len(lying.requests)}"}, "done": True, "done_reason": "stop"}
    )
    one, other = SPARSE[name]
    first = call(model, way, one).content
    stored()
    second = call(model, way, other).content
    stored()
    assert first != second
    assert call(model, way, one).content in (first, "n3")
    assert call(model, way, other).content in (second, "n3", "n4")


# -- what stands beside a prompt --


class Opaque:
    """Its representation holds an address, as of most objects."""


BESIDE = {
    "a lambda": lambda: lambda text: text,
    "an object": Opaque,
    "a generator": lambda: (i for i in range(3)),
    "a date": lambda: datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    "a set": lambda: {"b", "a", "c"},
    "bytes": lambda: b"\x00\xff",
    "not a number": lambda: float("nan"),
    "half of a pair": lambda: "\ud800",
}


@pytest.mark.row(118)
@WAYS
@pytest.mark.parametrize("name", BESIDE)
def test_what_cannot_be_told_beside_a_prompt_breaks_no_call_of_another_model(cache, stored, name, way):
    """Each of two different things is its own call."""
    model = Any_(cache=cache, calls=[])
    call(model, way, "q", told=BESIDE[name]())
    stored()
    call(model, way, "q", told="something else")
    assert len(model.calls) == 2


@pytest.mark.row(118)
@WAYS
@pytest.mark.parametrize("name", BESIDE)
def test_ours_refuses_what_no_server_can_be_told(lying, model, name, way):
    """Before anything is sent."""
    for where in ({"seed": BESIDE[name]()}, {"options": {"top_k": BESIDE[name]()}}, {"unknown": BESIDE[name]()}):
        with pytest.raises(errors.AegisError) as caught:
            call(model, way, "q", **where)
        assert not caught.value.retryable
    assert lying.requests == []


KEYS = """
import json, sys
from langchain_core.messages import HumanMessage
from langchain_core.load import dumps
from langchain_aegis import ChatAegis
from langchain_aegis.keys import Keyring, Who
model = ChatAegis("m", base_url="http://localhost:1", top_k=3, seed=1, min_p=0.1, temperature=0)
llm = model._get_llm_string(stop=["b", "a"], format={"type": "object", "properties": {"x": {}, "y": {}}})
found = Keyring(b"s" * 32).for_prompt(dumps([HumanMessage("How long?")]), llm, Who(tenant="t"), None)
print(json.dumps([llm, found.exact, found.scope]))
"""


@pytest.mark.slow
@pytest.mark.row(118)
def test_processes_with_different_hash_seeds_have_the_same_keys():
    """No order of a set or a dict is in a key."""
    told = set()
    for seed in ("0", "1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", KEYS], capture_output=True, text=True, timeout=60, env={"PYTHONHASHSEED": seed}
        )
        assert done.returncode == 0, done.stderr
        told.add(done.stdout)
    assert len(told) == 1


@pytest.mark.row(119)
@WAYS
def test_ids_do_not_matter_and_everything_that_the_model_sees_does(lying, model, stored, way):
    """Names, tool calls, their results: another question each time."""

    def conversation(identity=None, name=None, args=None, result="sunny", **more):
        tool_calls = [{"name": "weather", "args": args or {"city": "Paris"}, "id": "1"}]
        return [
            HumanMessage("What is the weather?", id=identity, name=name),
            AIMessage("", id=identity, tool_calls=tool_calls, **more),
            ToolMessage(result, tool_call_id="1", id=identity),
            HumanMessage("And now?", id=identity),
        ]

    call(model, way, conversation())
    stored()
    assert was_cached(call(model, way, conversation(identity="another")))
    assert was_cached(call(model, way, conversation(response_metadata={"total_duration": 3})))
    assert len(lying.requests) == 1
    others = [
        conversation(name="bob"),
        conversation(args={"city": "Rome"}),
        conversation(result="rain"),
        [*conversation(), AIMessage("It is."), HumanMessage("And now?")],
        [
            *conversation()[:-1],
            HumanMessage([{"type": "text", "text": "And now?", "cache_control": {"type": "ephemeral"}}]),
        ],
    ]
    for number, other in enumerate(others, 2):
        assert not was_cached(call(model, way, other))
        assert len(lying.requests) == number


# -- names --


@pytest.mark.row(120)
@pytest.mark.parametrize("kind", [AegisSemanticCache, AegisEmbeddingCache])
@pytest.mark.parametrize(
    "namespace",
    ["a*", "*", "[x]", "a?b", "a b", "", " ", "a{b}", "{a", "a\\b", "a\n", "a\x00", "a\ud800", 3, b"a", ["a"]],
    ids=repr,
)  # fmt: skip
def test_a_namespace_that_could_mean_others_is_refused(server, kind, namespace):
    """When the cache is made, before anything is connected."""
    with pytest.raises(errors.AegisConfigError, match="namespace"):
        kind(redis_url=server.unix_url, namespace=namespace)


# -- what comes back --


@pytest.mark.row(121)
@WAYS
def test_who_changes_an_answer_changes_no_other_ones(lying, model, stored, way):
    """Neither of the answer that was made, nor of one from the cache."""
    lying.script = plain(
        {"model": "m", "message": {"role": "assistant", "content": "right",
                                   "tool_calls": [{"function": {"name": "t", "arguments": {"a": [1]}}}]},
         "done": True, "done_reason": "stop"}
    )  # fmt: skip
    for _ in range(4):
        answer = call(model, way, "q")
        stored()
        assert (answer.content, answer.tool_calls[0]["args"]) == ("right", {"a": [1]})
        assert (len(answer.tool_calls), answer.response_metadata["done_reason"]) == (1, "stop")
        assert "evil" not in answer.additional_kwargs
        answer.content = "wrong"
        answer.tool_calls[0]["args"]["a"].append(2)
        answer.tool_calls.append({"name": "evil", "args": {}, "id": "2"})
        answer.response_metadata["done_reason"] = "wrong"
        answer.additional_kwargs["evil"] = True
    assert len(lying.requests) == 1
