"""Calls with different runner options do not make the server reload a model again and again."""

import asyncio
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import HumanMessage
from langgraph.graph import START, MessagesState, StateGraph
from prometheus_client import CollectorRegistry, generate_latest

from langchain_aegis import AegisEmbeddings, ChatAegis
from langchain_aegis.errors import AegisConfigError, AegisContextOverflowError, AegisOptionError, AegisReloadError
from langchain_aegis.metrics_admission import register_admission
from langchain_aegis.notices import forget_warnings
from langchain_aegis.reloads import ARRIVES_S, RUNNER_OPTIONS, Flight, Reloads, place, reloads, runner_options
from langchain_aegis.testing import ScriptedModel, ScriptedOllama
from langchain_aegis.wakers import Waker

MODELS = [ScriptedModel(name="m"), ScriptedModel(name="other"), ScriptedModel(name="embed", embedding=True)]


@pytest.fixture
def server():
    """One of its own: what it has loaded counts."""
    forget_warnings()
    with ScriptedOllama(MODELS) as server:
        yield server


@pytest.fixture(params=["sync", "async"])
def ask(request):
    if request.param == "sync":
        return lambda model, prompt="What is it?", **kwargs: model.invoke(prompt, **kwargs)
    return lambda model, prompt="What is it?", **kwargs: asyncio.run(model.ainvoke(prompt, **kwargs))


def here(offset=0):
    """The line that calls this, as the guard names it."""
    import sys

    frame = sys._getframe(1)
    return f"{frame.f_code.co_filename}:{frame.f_lineno + offset}"


def windows(server):
    return [chat["options"].get("num_ctx") for chat in server.chats]


def reports(caplog):
    return [r.message for r in caplog.records if r.message.startswith("reload:")]


# -- the two nodes --


def test_two_nodes_share_one_runner(server, ask, caplog):
    """The larger window; both places are named; a hundred calls load the model twice at most."""
    first, small = here(1), None
    small = ChatAegis("m", base_url=server.base_url, num_ctx=4096, num_predict=3)
    second, large = here(1), None
    large = ChatAegis("m:latest", base_url=server.base_url, num_ctx=8192, num_predict=3)
    for n in range(100):
        ask(large if n % 2 else small, f"What is number {n}?")
    assert server.counters.loads <= 2
    assert windows(server) == [4096] + [8192] * 99
    (report,) = reports(caplog)
    assert f"num_ctx=4096 at {first}" in report
    assert f"num_ctx=8192 at {second}" in report
    assert "All calls now send num_ctx=8192" in report


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream"])
def test_a_larger_window_does_not_overtake_a_smaller_one(server, way, monkeypatch):
    """Else the model is loaded for the larger, the smaller and the larger again."""
    left, waits, depart = threading.Event(), threading.Event(), Reloads.depart

    def slowly(self, *args, **kwargs):
        sent = depart(self, *args, **kwargs)
        if sent is None:
            waits.set()
        elif sent["num_ctx"] == 4096:
            left.set()
            assert waits.wait(10)  # on its way for so long
        return sent

    async def streamed(model):
        return [chunk async for chunk in model.astream("What is it?")]

    def ask(num_ctx):
        model = ChatAegis("m", base_url=server.base_url, num_ctx=num_ctx, num_predict=3)
        if way == "astream":
            return asyncio.run(streamed(model))
        if way == "ainvoke":
            return asyncio.run(model.ainvoke("What is it?"))
        return list(model.stream("What is it?")) if way == "stream" else model.invoke("What is it?")

    monkeypatch.setattr(Reloads, "depart", slowly)
    with ThreadPoolExecutor(2) as threads:
        small = threads.submit(ask, 4096)
        assert left.wait(10)
        large = threads.submit(ask, 8192)
        assert small.result(30)
        assert large.result(30)
    assert windows(server) == [4096, 8192]
    assert server.counters.loads == 2


def test_who_waits_for_a_smaller_window_is_woken_and_does_not_wait_for_ever():
    now = 0.0
    guard = Reloads(clock=lambda: now)

    def depart(num_ctx, flight, waker):
        guard.share("s", "m", {"num_ctx": num_ctx}, where=lambda: "x.py:1")
        return guard.depart("s", "m", {"num_ctx": num_ctx}, flight=flight, waker=waker)

    small, lost, waker, other = Flight(), Flight(), Waker(None), Waker(None)
    assert depart(1, small, waker) == depart(1, lost, waker) == {"num_ctx": 1}
    assert depart(2, Flight(), waker) is None
    assert depart(1, Flight(), other) is None  # it is sent with the larger one, too
    guard.landed("s", "m", small)
    guard.landed("s", "m", small)
    assert (waker.woken, other.woken) == (True, True)
    assert depart(2, Flight(), Waker(None)) is None  # the other one is still on its way
    now = ARRIVES_S
    assert depart(2, Flight(), Waker(None)) == depart(1, Flight(), Waker(None)) == {"num_ctx": 2}


def test_without_the_guard_each_call_reloads(server, ask):
    """What the guard is for: it can be switched off."""
    models = [ChatAegis("m", base_url=server.base_url, num_ctx=n, on_reload="allow") for n in (4096, 8192)]
    for n in range(20):
        ask(models[n % 2], f"What is number {n}?")
    assert server.counters.loads == 20
    assert reloads.rows() == []


def test_no_prompt_is_cut_or_refused_because_of_it(server, ask):
    """Each window holds what was asked for, and more."""
    small, large = (ChatAegis("m", base_url=server.base_url, num_ctx=n, num_predict=3) for n in (4096, 8192))
    for _ in range(2):
        ask(small, "word " * 4_000)
        assert ask(large, "word " * 8_000).usage_metadata["input_tokens"] > 8_000
    with pytest.raises(AegisContextOverflowError, match="8192"):
        ask(large, "word " * 8_200)
    assert server.counters.loads == 2


def test_calls_that_wait_take_the_window_that_others_asked_for_meanwhile(server):
    """Only those that are under way at the moment of the first larger one may cost a load."""
    small, large = (ChatAegis("m", base_url=server.base_url, num_ctx=n, num_predict=3) for n in (4096, 8192))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: (large if n % 2 else small).invoke(f"What is number {n}?"), range(100)))
    assert server.counters.loads <= 1 + 4  # max_concurrency


async def test_a_larger_window_is_loaded_once_for_a_queue_of_smaller_ones(server):
    small, large = (ChatAegis("m", base_url=server.base_url, num_ctx=n, max_concurrency=1) for n in (4096, 8192))
    with server.hold():
        calls = [asyncio.ensure_future(small.ainvoke("first"))]
        await server.await_until(lambda s: s.waiting == 1)
        calls += [asyncio.ensure_future((large if n % 2 else small).ainvoke(f"number {n}")) for n in range(20)]
        await asyncio.sleep(0)
    await asyncio.gather(*calls)
    assert windows(server) == [4096] + [8192] * 20
    assert server.counters.loads == 2


def test_a_graphs_nodes_share_one_runner(server, caplog):
    """As an application has them."""
    small, large = (ChatAegis("m", base_url=server.base_url, num_ctx=n, num_predict=3) for n in (4096, 8192))

    async def plan(state):
        return {"messages": [await small.ainvoke(state["messages"])]}

    async def answer(state):
        return {"messages": [await large.ainvoke([HumanMessage("What is it?")], temperature=0)]}

    graph = StateGraph(MessagesState).add_sequence([plan, answer]).add_edge(START, "plan").compile()

    async def run():
        for n in range(10):
            await graph.ainvoke({"messages": [HumanMessage(f"What is number {n}?")]})

    asyncio.run(run())
    assert server.counters.loads == 2
    assert len(reports(caplog)) == 1


def test_options_of_a_call_name_the_call(server, ask, caplog):
    """Not the place where the model was made."""
    made = here(1)
    model = ChatAegis("m", base_url=server.base_url, num_ctx=4096)
    ask(model)
    ask(model, options={"num_ctx": 16_384})
    (report,) = reports(caplog)
    assert f"num_ctx=4096 at {made}" in report
    (where,) = re.findall(r"num_ctx=16384 at (\S+):\d+", report)
    assert where == __file__
    assert report.count(made) == 1


def test_what_is_made_and_never_called_counts_for_nothing(server, ask):
    """A large window costs memory: only a call asks for it."""
    ChatAegis("m", base_url=server.base_url, num_ctx=131_072)
    ask(ChatAegis("m", base_url=server.base_url, num_ctx=4096))
    assert windows(server) == [4096]


def test_models_and_servers_are_kept_apart(server, ask):
    with ScriptedOllama(MODELS) as elsewhere:
        ask(ChatAegis("m", base_url=server.base_url, num_ctx=8192))
        ask(ChatAegis("other", base_url=server.base_url, num_ctx=4096))
        ask(ChatAegis("m", base_url=elsewhere.base_url, num_ctx=4096))
        assert (windows(server), windows(elsewhere)) == ([8192, 4096], [4096])


def test_cache_keys_stay_what_was_asked_for(server, ask):
    """So nothing that was cached is lost, whatever else the process does."""
    small = ChatAegis("m", base_url=server.base_url, num_ctx=4096)
    name = small._get_llm_string()
    ask(ChatAegis("m", base_url=server.base_url, num_ctx=8192))
    ask(small)
    assert small._get_llm_string() == name


# -- the server's own window --


def test_a_call_that_leaves_the_window_to_the_server_never_gets_a_smaller_one(server, ask):
    """The server's is 4,096: a call for 2,048 rides on it."""
    auto, small = ChatAegis("m", base_url=server.base_url), ChatAegis("m", base_url=server.base_url, num_ctx=2048)
    for n in range(20):
        ask(small if n % 2 else auto, f"What is number {n}?")
    assert server.counters.loads <= 3
    assert windows(server)[3:] == [None] * 17
    ask(small, "word " * 3_000)


def test_a_larger_window_than_the_servers_own_is_shared_by_all(server, ask):
    auto, large = ChatAegis("m", base_url=server.base_url), ChatAegis("m", base_url=server.base_url, num_ctx=8192)
    for n in range(20):
        ask(large if n % 2 else auto, f"What is number {n}?")
    assert server.counters.loads == 4  # each, and each again until it is known which is larger
    assert windows(server)[3:] == [8192] * 17
    ask(auto, "word " * 6_000)


def test_a_window_that_turns_out_too_small_is_not_kept(server, ask):
    """The server was restarted with a smaller window of its own: who asked for more gets it."""
    auto, large = ChatAegis("m", base_url=server.base_url), ChatAegis("m", base_url=server.base_url, num_ctx=8192)
    ask(auto)
    ask(large)
    reloads.note_window(server.base_url, "m", {}, 32_768)  # as it was before
    ask(large)
    assert windows(server)[-1] is None
    assert ask(large, "word " * 6_000).usage_metadata["input_tokens"] > 6_000
    assert windows(server)[-2:] == [None, 8192]
    ask(auto, "What is it now?")
    assert windows(server)[-1] == 8192


# -- the other options --


def test_who_says_nothing_rides_on_who_does(server, ask, caplog):
    """Threads and batches change how fast the answer comes, not what it says."""
    plain, tuned = (ChatAegis("m", base_url=server.base_url, num_predict=3, **more) for more in ({}, {"num_thread": 8}))
    for n in range(10):
        ask(tuned if n % 2 else plain, f"What is number {n}?")
    assert server.counters.loads == 2
    assert not reports(caplog)


def test_the_first_value_of_an_execution_option_is_sent_by_all(server, ask, caplog):
    models = [ChatAegis("m", base_url=server.base_url, num_batch=n, num_predict=3) for n in (512, 1024)]
    for n in range(10):
        ask(models[n % 2], f"What is number {n}?")
    assert server.counters.loads == 1
    assert "All calls now send num_batch=512" in reports(caplog)[0]


def test_shift_is_sent_as_asked(server, ask, caplog):
    """It decides whether an answer ends with the window."""
    model = ChatAegis("m", base_url=server.base_url)
    ask(model)
    ask(model, shift=False)
    ask(model)
    assert [chat.get("shift") for chat in server.chats] == [None, False, None]
    assert "shift=not set" in reports(caplog)[0]
    assert "do reload the model" in reports(caplog)[0]
    assert server.counters.loads == 3


def test_an_embedder_keeps_its_window(server, caplog):
    """A larger one would give long texts other vectors than those that are stored."""
    short, long = (AegisEmbeddings("embed", base_url=server.base_url, num_ctx=n, num_thread=n) for n in (128, 512))
    short.embed_query("a")
    long.embed_query("a")
    bodies = [seen.body["options"] for seen in server.requests]
    assert bodies == [{"num_ctx": 128, "num_thread": 128}, {"num_ctx": 512, "num_thread": 128}]
    assert "num_ctx=128" in reports(caplog)[0]
    with pytest.raises(AegisReloadError):
        AegisEmbeddings("embed", base_url=server.base_url, num_ctx=64, on_reload="raise").embed_query("a")


# -- refused --


def test_a_second_set_can_be_refused(server, ask):
    """Before anything is sent, with both places; the first set goes on."""
    first = here(1)
    ask(ChatAegis("m", base_url=server.base_url, num_ctx=8192))
    strict = ChatAegis("m", base_url=server.base_url, num_ctx=4096, on_reload="raise")
    with pytest.raises(AegisReloadError, match=re.escape(f"num_ctx=8192 at {first}")) as caught:
        ask(strict)
    assert isinstance(caught.value, AegisConfigError)
    assert len(server.chats) == 1
    same = ChatAegis("m", base_url=server.base_url, num_ctx=8192, on_reload="raise")
    assert ask(same).text


def test_strict_is_another_way_to_write_it():
    assert ChatAegis("m", strict=True).on_reload == "raise"
    assert ChatAegis("m", strict=False).on_reload == "share"
    assert ChatAegis("m", strict=False, on_reload="allow").on_reload == "allow"
    for wrong in ({"strict": "yes"}, {"strict": True, "on_reload": "allow"}, {"strict": False, "on_reload": "raise"}):
        with pytest.raises(AegisOptionError, match="strict"):
            ChatAegis("m", **wrong)


# -- what is told --


def test_metrics_name_what_would_reload(server, ask):
    registry = CollectorRegistry()
    register_admission(registry)
    small, large = (ChatAegis("m", base_url=server.base_url, num_ctx=n, num_predict=3) for n in (4096, 8192))
    for n in range(6):
        ask(large if n % 2 else small, f"What is number {n}?")
    text = generate_latest(registry).decode()
    labels = f'model="m:latest",options="num_ctx=4096",server="{server.base_url}"'
    assert f"aegis_runner_calls_total{{{labels}}} 3.0" in text
    assert f"aegis_runner_shared_total{{{labels}}} 2.0" in text
    assert f'aegis_runner_switches_total{{model="m:latest",server="{server.base_url}"}} 1.0' in text


def test_a_third_set_is_reported_too_and_none_twice(server, ask, caplog):
    models = [ChatAegis("m", base_url=server.base_url, num_ctx=n) for n in (4096, 8192, 2048)]
    for _ in range(2):
        for model in models:
            ask(model)
    assert len(reports(caplog)) == 2


def test_the_place_is_the_callers():
    assert place().text == here()
    assert place() == place()  # a model is equal to one that was made elsewhere


# -- the rule itself --


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "num_ctx": st.sampled_from([2048, 4096, 8192]),
        "num_thread": st.integers(1, 3),
        "num_gpu": st.integers(0, 2),
        "shift": st.booleans(),
    },
)


@given(st.lists(OPTIONS, min_size=1, max_size=12), st.one_of(st.none(), st.sampled_from([2048, 4096, 32_768])))
def test_a_window_is_never_smaller_than_what_was_asked_for(calls, own_window):
    """Nor than the server's own, where that was left to it; `shift` is what was asked for."""
    guard = Reloads()
    if own_window:
        guard.note_window("s", "m", {}, own_window)
    for options in calls:
        sent = guard.share("s", "m", options, where=lambda: "x.py:1")
        given_window = sent.get("num_ctx", own_window)
        if "num_ctx" in options:
            assert given_window is not None
            assert given_window >= options["num_ctx"]
        elif own_window is None:
            assert "num_ctx" not in sent
        else:
            assert given_window >= own_window
        assert sent.get("shift") == options.get("shift")
    again = [guard.share("s", "m", {**options, "shift": True}, where=lambda: "x.py:1") for options in calls]
    if own_window or all("num_ctx" in options for options in calls):
        assert all(sent == again[0] for sent in again)  # one set, once all are known


def test_what_leaves_the_choice_to_the_server_asks_for_nothing():
    assert runner_options({"num_gpu": -1, "num_thread": 0, "temperature": 1, "num_ctx": 4096}) == {"num_ctx": 4096}
    assert runner_options({"num_gpu": 0, "use_mmap": False}, shift=False) == {
        "num_gpu": 0, "use_mmap": False, "shift": False}  # fmt: skip
    assert set(RUNNER_OPTIONS) >= {"num_ctx", "shift"}


def test_a_forked_child_is_not_stuck_in_its_parents_lock():
    """Whatever a thread of the parent was doing."""
    held, release = threading.Event(), threading.Event()

    def hold():
        with reloads._lock:
            held.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    child = os.fork()
    if not child:
        reloads.share("s", "m", {"num_ctx": 1}, where=lambda: "x.py:1")
        os._exit(7)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_names_from_outside_do_not_fill_the_memory():
    guard = Reloads()
    for n in range(1_000):
        guard.share("s", f"m{n}", {}, where=lambda: "x.py:1")
        guard.share("s", "one", {"num_ctx": n + 1}, where=lambda: "x.py:1")
    rows = guard.rows()
    assert len(rows) <= 256
    assert max(len(sets) for _, _, sets, _ in rows) <= 64
