"""One model on several servers: calls are spread, a server that is away hurts nobody, and the model stays one model."""

import asyncio
import logging
import pickle
import threading

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.load import dumps
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from lying_server import LyingServer

from langchain_aegis import (
    AegisConfigError,
    AegisConnectionError,
    AegisModelNotFoundError,
    AegisOverloadedError,
    AegisRouter,
    AegisStreamError,
    BatchingChatModel,
    ChatAegis,
    aegis_scope,
)
from langchain_aegis.admission import Admission
from langchain_aegis.notices import forget_warnings
from langchain_aegis.pools import Pool
from langchain_aegis.servers import admission_of, admissions, server_of
from langchain_aegis.spread import Spread
from langchain_aegis.testing import ScriptedOllama
from langchain_aegis.traits import NO_TRAITS

NOWHERE = "http://127.0.0.1:9"
LONG_S = 30


@pytest.fixture
def servers():
    forget_warnings()
    with ScriptedOllama("m") as one, ScriptedOllama("m") as other:
        yield one, other


def model(servers, **told):
    return ChatAegis("m", base_url=[server.base_url for server in servers], temperature=0, **told)


def counts(servers):
    return [len(server.chats) for server in servers]


def ways(model, text="hi"):
    """Every way of asking, each as a coroutine function that returns the text of the answer."""

    async def astream():
        return "".join([chunk.text async for chunk in model.astream(text)])

    async def ainvoke():
        return (await model.ainvoke(text)).text

    async def abatch():
        return (await model.abatch([text]))[0].text

    async def agenerate():
        return (await model.agenerate([[HumanMessage(text)]])).generations[0][0].text

    async def events():
        parts = [e["data"]["chunk"].text async for e in model.astream_events(text) if e["event"].endswith("_stream")]
        return "".join(parts)

    return {
        "invoke": lambda: asyncio.to_thread(lambda: model.invoke(text).text),
        "ainvoke": ainvoke,
        "stream": lambda: asyncio.to_thread(lambda: "".join(chunk.text for chunk in model.stream(text))),
        "astream": astream,
        "batch": lambda: asyncio.to_thread(lambda: model.batch([text])[0].text),
        "abatch": abatch,
        "generate": lambda: asyncio.to_thread(lambda: model.generate([[HumanMessage(text)]]).generations[0][0].text),
        "agenerate": agenerate,
        "events": events,
    }


wrapped = pytest.mark.parametrize("wrap", [lambda m: m, BatchingChatModel], ids=["ChatAegis", "BatchingChatModel"])


# Spread


@wrapped
async def test_calls_take_turns_whichever_way_they_come(servers, wrap):
    asked = wrap(model(servers))
    answers = {await ask() for ask in ways(asked).values()}
    assert len(answers) == 1
    assert sorted(counts(servers)) == [4, 5]


@wrapped
async def test_many_calls_are_spread_evenly_and_the_rest_waits_for_whoever_is_free_first(servers, wrap):
    one, other = servers
    asked = wrap(model(servers))
    with one.hold(), other.hold():
        calls = [asyncio.create_task(asked.ainvoke(f"question {n}")) for n in range(20)]
        for server in servers:
            await server.await_until(lambda server: server.waiting == 4)
        assert counts(servers) == [4, 4]
        one.release()  # `other` still works at its four
        await one.await_until(lambda server: len(server.chats) == 16)
        assert counts(servers) == [16, 4]
    await asyncio.wait_for(asyncio.gather(*calls), LONG_S)


async def test_threads_are_spread_evenly_too(servers):
    one, other = servers
    asked = model(servers)
    with one.hold(), other.hold():
        threads = [threading.Thread(target=asked.invoke, args=(f"question {n}",)) for n in range(8)]
        for thread in threads:
            thread.start()
        for server in servers:
            await server.await_until(lambda server: server.waiting == 4)
    for thread in threads:
        thread.join(LONG_S)
    assert counts(servers) == [4, 4]


async def test_bounds_are_each_server_s_own_and_shared_with_whoever_else_uses_it(servers):
    one, other = servers
    alone = BatchingChatModel(ChatAegis("m", base_url=one.base_url), max_concurrency=2)
    asked = BatchingChatModel(model(servers), max_concurrency=3, max_waiting=1)
    assert asked.admission.max_concurrency == 5  # 2 and 3
    with one.hold(), other.hold():
        calls = [asyncio.create_task(alone.ainvoke("mine"))]
        await one.await_until(lambda server: server.waiting == 1)
        calls += [asyncio.create_task(asked.ainvoke(f"question {n}")) for n in range(4)]
        await other.await_until(lambda server: server.waiting == 3)
        await one.await_until(lambda server: server.waiting == 2)
        calls += [asyncio.create_task(asked.ainvoke(f"question {n}")) for n in (4, 5)]
        await asyncio.sleep(0)
        with pytest.raises(AegisOverloadedError):
            await asked.ainvoke("one too many")
        batch = asyncio.create_task(asked.abatch([f"item {n}" for n in range(9)]))
    await asyncio.wait_for(asyncio.gather(*calls, batch), LONG_S)
    assert one.counters.max_running <= 2
    assert other.counters.max_running <= 3


async def test_prompts_that_begin_alike_go_to_one_server(servers):
    asked = model(servers)
    contexts = [" ".join(f"c{n}w{word}" for word in range(600)) for n in range(6)]
    for question in range(5):
        for context in contexts:
            await asked.ainvoke([SystemMessage(context), HumanMessage(f"Question {question}?")])
    for server in servers:
        seen = {chat["messages"][0]["content"] for chat in server.chats}
        assert len(seen) == 3
        assert len(server.chats) == 15


async def test_identical_calls_make_one_call_of_one_server(servers):
    asked, other = (BatchingChatModel(model(servers)) for _ in range(2))
    with servers[0].hold(), servers[1].hold():
        calls = [asyncio.create_task(m.ainvoke("the same")) for m in (asked, other) for _ in range(10)]
        await asyncio.sleep(0)
    answers = await asyncio.wait_for(asyncio.gather(*calls), LONG_S)
    assert sum(counts(servers)) == 1
    assert len({answer.text for answer in answers}) == 1


@pytest.mark.slow
async def test_a_call_inside_a_stream_never_waits_for_its_own_slot(servers):
    asked = model(servers, max_concurrency=1)
    async with asyncio.timeout(LONG_S):

        async def nested(n):
            return [(await asked.ainvoke(f"inner {n}")).text async for _ in asked.astream(f"outer {n}")]

        assert all(await asyncio.gather(*(nested(n) for n in range(4))))
    for outer in asked.stream("outer"):
        assert asked.invoke("inner").text
        assert outer is not None


# One model


def test_an_answer_of_either_is_the_model_s(servers):
    one, other = servers
    cache = InMemoryCache()
    asked = model(servers, cache=cache)
    alone = ChatAegis("m", base_url=one.base_url, temperature=0, cache=cache)
    assert asked._get_llm_string() == alone._get_llm_string()
    first = asked.invoke("hi").text
    one.close()
    other.close()
    assert asked.invoke("hi").text == alone.invoke("hi").text == first
    assert "".join(chunk.text for chunk in asked.stream("hi")) == first
    assert len(cache._cache) == 1


def test_addresses_are_made_plain_and_one_is_one(servers):
    assert ChatAegis("m", base_url=["box", "http://box:11434/"]).base_url == "http://box:11434"
    assert ChatAegis("m", base_url=("a", "b")).base_url == ["http://a:11434", "http://b:11434"]
    there, back = ChatAegis("m", base_url=["a", "b"]), ChatAegis("m", base_url=["b", "a"])
    assert server_of(there) == server_of(back) == "http://a:11434, http://b:11434"
    assert there._admission is back._admission is admissions()["http://a:11434, http://b:11434"]
    copy = model(servers).model_copy(update={"base_url": servers[1].base_url})
    copy.invoke("hi")
    assert counts(servers) == [0, 1]


@pytest.mark.parametrize("told", [[], [None], ["a", 3], {"a": "b"}, 3, ["a", "ftp://b"]], ids=repr)
def test_what_is_no_address_is_refused_at_once(told):
    with pytest.raises(AegisConfigError, match="address"):
        ChatAegis("m", base_url=told)


@pytest.mark.parametrize("recheck_s", [-1, float("inf"), float("nan"), "soon"])
def test_recheck_s_is_a_number_of_seconds(recheck_s):
    with pytest.raises(AegisConfigError, match="recheck_s"):
        ChatAegis("m", base_url=["a", "b"], recheck_s=recheck_s)


def test_credentials_are_neither_shown_nor_serialised(servers, caplog):
    secret = [f"http://me:pa55word@127.0.0.1:{port}" for port in (9, 10)]
    asked = ChatAegis("m", base_url=secret)
    assert "pa55word" not in repr(asked) + str(asked) + dumps(asked)
    with pytest.raises(AegisConnectionError) as caught:
        asked.invoke("hi")
    assert "pa55word" not in str(caught.value) + caplog.text
    assert len(caplog.records) == 2


def test_what_is_shown_of_admission_names_no_login():
    """`aegis top` writes it to a file, Prometheus into labels."""
    told = ("http://me:pa55word@shown:1", "http://you:pa55word@shown:1", "http://shown:1")
    made = [ChatAegis("m", base_url=each)._admission for each in (*told, [told[0], "http://other:1"])]
    shown = {name: admission for name, admission in admissions().items() if "shown:1" in name}
    assert "pa55word" not in str(list(admissions()))
    assert all(any(each is admission for admission in shown.values()) for each in made)
    assert sorted(shown) == [
        "http://***@shown:1", "http://***@shown:1 (2)", "http://***@shown:1, http://other:1", "http://shown:1",
    ]  # fmt: skip


async def test_each_server_gets_the_model_s_own_headers_and_its_own_connections(servers):
    asked = model(servers, client_kwargs={"headers": {"x-team": "blue"}}, sync_client_kwargs={"http2": False})
    for n in range(2):
        asked.invoke(f"hi {n}")
        await asked.ainvoke(f"hello {n}")
    assert counts(servers) == [2, 2]
    assert all(seen.headers["x-team"] == "blue" for server in servers for seen in server.requests)
    assert pickle.loads(pickle.dumps(asked)).invoke("hi").text  # noqa: S301


def test_all_of_them_have_to_have_the_model(servers):
    model(servers, validate_model_on_init=True)
    with ScriptedOllama("other") as third, pytest.raises(AegisModelNotFoundError, match=third.base_url):
        model([*servers, third], validate_model_on_init=True)


# One that cannot be reached


@wrapped
@pytest.mark.parametrize("way", list(ways(None)))
async def test_the_next_one_answers_whichever_way_the_call_came(servers, wrap, way, caplog):
    one, _ = servers
    asked = wrap(model(servers))
    expected = (await asked.ainvoke("hi")).text
    one.close()
    runs = RunCollectorCallbackHandler()
    for n in range(3):  # the first finds out, or the second
        assert await ways(asked)[way]() == expected, n
    assert (await asked.ainvoke("hi", {"callbacks": [runs]})).text == expected
    assert [run.error for run in runs.traced_runs] == [None]
    assert [r.getMessage().partition(": ")[0] for r in caplog.records] == [f"server_down:{one.base_url}"]
    assert caplog.records[0].levelno == logging.WARNING


async def test_it_is_left_alone_and_then_looked_at_without_a_prompt(servers):
    one, _ = servers
    asked = model(servers)
    pool = asked._admission
    clock = pool._clock = Clock(pool._clock())
    one.close()
    for _ in range(3):
        await asked.ainvoke("hi")
    assert pool.down == (one.base_url,)
    assert pool.max_concurrency == 4
    one.start()
    one.forget()
    await asked.ainvoke("hi")
    clock.now += 29
    asked.invoke("hi")
    assert not one.requests  # nobody has looked
    one.close()
    clock.now += 2
    asked.invoke("hi")
    clock.now += 29
    one.start()
    one.forget()
    asked.invoke("hi")
    assert not one.requests
    clock.now += 2
    for _ in range(4):
        asked.invoke("hi")
    assert [seen.path for seen in one.requests] == ["/api/version", "/api/chat", "/api/chat"]
    assert pool.down == ()
    assert pool.max_concurrency == 8


class Clock:
    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


@wrapped
@pytest.mark.parametrize("way", list(ways(None)))
async def test_if_all_are_away_the_error_says_so_and_the_first_that_is_back_answers(servers, wrap, way):
    one, other = servers
    asked = wrap(model(servers, recheck_s=0))
    one.close()
    other.close()
    ask = ways(asked)[way]
    for _ in range(3):
        with pytest.raises(AegisConnectionError, match=f"none of the servers at .*{one.base_url}.* can be reached"):
            await ask()
    other.start()
    other.forget()
    assert await ask()
    assert len(other.chats) == 1


async def test_if_all_are_away_nobody_tries_them_more_than_once_a_second(servers):
    asked = model(servers)
    pool = asked._admission
    clock = pool._clock = Clock(pool._clock())
    for server in servers:
        server.close()
    with pytest.raises(AegisConnectionError) as first:
        await asked.ainvoke("hi")
    assert first.value.__cause__ is not None
    for server in servers:
        server.start()
        server.forget()
    with pytest.raises(AegisConnectionError):
        await asked.ainvoke("hi")
    assert not servers[0].requests
    clock.now += 1
    await asked.ainvoke("hi")
    assert [server.routes["/api/version"] for server in servers] == [1, 1]
    assert sum(counts(servers)) == 1


@pytest.mark.row(87)
@wrapped
async def test_an_answer_that_has_begun_is_never_started_anew(servers, wrap):
    asked = wrap(model(servers))
    for server in servers:
        server.fail("cut", after=3, times=None)
    got = []
    with pytest.raises(AegisStreamError):
        async for chunk in asked.astream("hi"):
            got.append(chunk.text)  # noqa: PERF401
    with pytest.raises(AegisStreamError):
        for chunk in asked.stream("hi"):
            got.append(chunk.text)  # noqa: PERF401
    assert any(got)
    assert sum(counts(servers)) == 2


@wrapped
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_connection_that_ends_before_the_answer_is_one_call_s_bad_luck(servers, wrap, how):
    """As an idle one does that the server closes just then: the call goes on, and the server is not given up."""
    lying = LyingServer()
    try:
        lying.script = [how]
        asked = wrap(ChatAegis("m", base_url=[lying.url, servers[0].base_url], temperature=0))
        for n, ask in enumerate(ways(asked, "hi").values()):
            assert await ask(), n
        assert len(servers[0].chats) == 9
        assert len(lying.requests) >= 4
        assert admissions()[server_of(asked)].down == ()
    finally:
        lying.close()


async def test_other_errors_are_the_answer_and_nobody_else_is_asked(servers):
    asked = model(servers)
    for server in servers:
        server.fail(500, times=None)
    for ask in ways(asked).values():
        with pytest.raises(Exception, match="failed"):
            await ask()
    assert sum(counts(servers)) == 9


async def test_calls_that_wait_go_to_the_server_that_is_left(servers):
    one, other = servers
    asked = BatchingChatModel(model(servers))
    with other.hold(), one.hold():
        calls = [asyncio.create_task(asked.ainvoke(f"question {n}")) for n in range(40)]
        for server in servers:
            await server.await_until(lambda server: server.waiting == 4)
        one.close()
    answers = await asyncio.wait_for(asyncio.gather(*calls), LONG_S)
    assert len(answers) == 40
    assert other.counters.max_running <= 4


@wrapped
async def test_who_leaves_leaves_nothing_behind(servers, wrap):
    one, other = servers
    asked = wrap(model(servers))
    pool = admission_of(asked)
    with one.hold(), other.hold():
        calls = [asyncio.create_task(asked.ainvoke(f"question {n}")) for n in range(12)]

        async def read(n):
            return [chunk async for chunk in asked.astream(f"stream {n}")]

        calls += [asyncio.create_task(read(n)) for n in range(4)]
        for server in servers:
            await server.await_until(lambda server: server.waiting == 4)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        for server in servers:
            await server.await_until(lambda server: server.disconnects == 4)
    assert pool.busy == 0
    for member in pool._members.values():
        assert member.admission.busy == len(member.under_way) == 0


async def test_a_router_falls_back_when_all_are_away(servers):
    _, other = servers
    spare = ChatAegis("m", base_url=other.base_url)
    router = AegisRouter(
        {"generate": ChatAegis("m", base_url=[NOWHERE, "http://127.0.0.1:10"]), "spare": BatchingChatModel(spare)},
        default="generate",
        fallback=["spare"],
    )
    for ask in ways(router).values():
        assert await ask()
    assert counts(servers) == [0, 9]


async def test_tenants_and_tools_go_their_way_as_on_one_server(servers):
    asked = BatchingChatModel(model(servers))
    tool = {"name": "look", "description": "look it up", "parameters": {"type": "object", "properties": {}}}
    with aegis_scope(tenant="acme"):
        await asked.bind_tools([tool]).ainvoke("look it up")
    assert [row.tenant for row in asked.admission.stats().rows] == ["acme"]
    assert sum("tools" in chat for server in servers for chat in server.chats) == 1


class Broken:
    """The call of a server whose connection is lost after the first part of the answer."""

    def parts(self):
        yield {"message": {"content": "a"}, "done": False}
        raise AegisConnectionError("gone")

    async def aparts(self):
        for part in self.parts():
            yield part


@pytest.mark.row(69, 71)
async def test_no_kind_of_loss_starts_an_answer_anew_that_has_begun():
    asked = []

    def at(address):
        asked.append(address)
        return Broken()

    pool = Pool({"a": Admission(1), "b": Admission(1)})
    spread = Spread(pool=pool, turn={"traits": NO_TRAITS}, at=at, client=None, recheck_s=30)
    with pytest.raises(AegisConnectionError, match="gone"):
        list(spread.parts())
    with pytest.raises(AegisConnectionError, match="gone"):
        [part async for part in spread.aparts()]
    assert asked == ["a", "b"]
    assert pool.busy == 0
