"""Batches: worked through in an order that suits the server, answered in the order of the inputs."""

import asyncio
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate

from langchain_aegis import BatchingChatModel, ChatAegis
from langchain_aegis.bulk import in_lanes
from langchain_aegis.testing import ScriptedOllama

DEADLINE_S = 120
CONTEXTS, EACH = 20, 10


def prompts(seed):
    """200 calls over 20 contexts of about 1,000 tokens, shuffled."""
    texts = [
        [SystemMessage(" ".join(f"c{context}w{n}" for n in range(500))), HumanMessage(f"Question {context} {n}?")]
        for context in range(CONTEXTS)
        for n in range(EACH)
    ]
    random.Random(seed).shuffle(texts)
    return texts


def minimum(texts):
    """Return the tokens that have to be read at least: each context once, each question."""
    with ScriptedOllama(slots=1, words=2) as server:
        model = ChatAegis("scripted", base_url=server.base_url, temperature=0, cache=False)
        for text in sorted(texts, key=lambda each: each[0].content):
            model.invoke(text)
        return server.counters.prefilled_tokens


@pytest.fixture(scope="module")
def least():
    return minimum(prompts(0))


async def at_once(model, texts):
    return await asyncio.gather(*(model.ainvoke(text) for text in texts))


async def in_a_batch(model, texts):
    return await model.abatch(texts)


async def in_threads(model, texts):
    return await asyncio.to_thread(model.batch, texts)


async def read(make, way, texts, **server_options):
    # As slow as it takes for calls to wait: what finds a free slot never does.
    with ScriptedOllama(slots=4, words=2, request_s=0.005, prefill_tokens_per_s=20_000, **server_options) as server:
        model = make(ChatAegis("scripted", base_url=server.base_url, temperature=0, cache=False, timeout=DEADLINE_S))
        async with asyncio.timeout(DEADLINE_S):
            answers = await way(model, texts)
        asked = Counter(chat["messages"][-1]["content"] for chat in server.chats)
        assert asked == Counter(text[-1].content for text in texts)
        assert all(text[-1].content.split()[1] in answer.text for text, answer in zip(texts, answers, strict=True))
        return server.counters.prefilled_tokens


def batching(inner):
    return BatchingChatModel(inner, max_concurrency=4, max_waiting=1_000)


@pytest.mark.slow
@pytest.mark.parametrize("way", [at_once, in_a_batch, in_threads])
@pytest.mark.parametrize("make", [batching, lambda inner: inner], ids=["wrapped", "ChatAegis"])
async def test_a_context_is_read_about_once(make, way, least):
    if make is not batching and way is in_threads:
        pytest.skip("LangChain's own threads hold eight calls at a time: too few to choose from")
    assert await read(make, way, prompts(1), host_cache=False) <= 1.3 * least


@pytest.mark.slow
async def test_where_the_host_keeps_contexts_nothing_is_lost_either(least):
    texts = prompts(2)
    plain = await read(lambda inner: inner.model_copy(update={"_window_ms": 0}), at_once, texts)
    assert await read(batching, at_once, texts) <= 1.05 * plain


async def test_answers_keep_the_order_of_the_inputs_whatever_was_done_first():
    texts = [f"{'shop ' * 600 if n % 2 else 'desk ' * 600} what is number{n}?" for n in range(12)]
    with ScriptedOllama(slots=2) as server:
        model = BatchingChatModel(ChatAegis("scripted", base_url=server.base_url, temperature=0), max_concurrency=2)
        answers = await model.abatch(texts)
        assert [answer.text for answer in answers] == [(await model.inner.ainvoke(text)).text for text in texts]
        seen = {i: answer.text async for i, answer in model.abatch_as_completed(texts)}
        assert [seen[i] for i in range(12)] == [answer.text for answer in answers]
        assert [a.text for a in await asyncio.to_thread(model.batch, texts)] == [answer.text for answer in answers]


@pytest.mark.row(95)
async def test_a_bad_item_hurts_only_itself_also_among_items_that_are_put_in_order():
    with ScriptedOllama() as server:
        model = BatchingChatModel(ChatAegis("scripted", base_url=server.base_url))
        long = "word " * 1_000
        answers = await model.abatch([f"{long} 1", 7, f"{long} 2", None], return_exceptions=True)
        assert [isinstance(answer, Exception) for answer in answers] == [False, True, False, True]


@pytest.mark.parametrize(
    "bound",
    [
        lambda model: model.bind(stop=["END"]),
        lambda model: model.bind_tools([{"name": "look", "description": "look it up", "parameters": {}}]),
        lambda model: model.with_config(tags=["bulk"]),
        lambda model: ChatPromptTemplate.from_messages([("human", "{text}")]) | model,
        lambda model: model.with_retry(stop_after_attempt=2),
    ],
    ids=["bind", "tools", "config", "chain", "retry"],
)
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.slow
async def test_a_long_batch_through_what_is_built_on_the_model_is_never_refused(bound, wrapped):
    with ScriptedOllama(words=2) as server:
        inner = ChatAegis("scripted", base_url=server.base_url, cache=False)
        model = BatchingChatModel(inner, max_concurrency=2, max_waiting=5) if wrapped else inner
        built = bound(model)
        chain = "text" in str(getattr(built, "input_schema", lambda: 0) and getattr(built, "first", ""))
        texts = [{"text": f"item {n}"} if chain else f"item {n}" for n in range(120)]
        async with asyncio.timeout(DEADLINE_S):
            answers = await built.abatch(texts)
            assert len(answers) == len(texts)
            assert len(server.chats) == len(texts)
            assert len(await asyncio.to_thread(built.batch, texts)) == len(texts)


# -- lanes

BLOCKS = st.lists(st.integers(0, 2), max_size=6).map(lambda ns: tuple(hash(tuple(ns[: n + 1])) for n in range(len(ns))))


@given(st.lists(BLOCKS, max_size=40), st.integers(1, 5))
def test_every_item_is_worked_through_once(prefixes, lanes):
    assert sorted(in_lanes(prefixes, lanes)) == list(range(len(prefixes)))


def test_items_that_share_nothing_long_stay_as_they_are():
    prefixes = [(5, 6), (5, 7), (), (1, 2, 3)]
    assert list(in_lanes(prefixes, 2)) == [0, 1, 2, 3]


def test_rows_of_alike_items_run_side_by_side():
    one, other = (1, 2, 3, 4), (6, 7, 8, 9)
    assert list(in_lanes([one, other] * 3, 2)) == [0, 1, 2, 3, 4, 5]
    assert list(in_lanes([one, one, one, other, other, other], 2)) == [0, 3, 1, 4, 2, 5]
