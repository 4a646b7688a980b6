"""An answer that one process makes is given to the others while it is made, or not at all."""

import asyncio
import contextlib
import gc
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import orjson
import pytest
import redis
from conftest import running_redis, short_directory, wait_until
from faults.redis_process import RedisProcess
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_core.outputs import ChatGenerationChunk
from langgraph.graph import START, MessagesState, StateGraph

from langchain_aegis import (
    AegisDeadlineError,
    AegisSemanticCache,
    AegisSettings,
    AegisStreamError,
    BatchingChatModel,
    ChatAegis,
    aegis_scope,
    was_cached,
)
from langchain_aegis.followed import followed
from langchain_aegis.replays import BrokenOff, StreamEntry
from langchain_aegis.testing import ScriptedOllama
from langchain_aegis.writes import the_writer

pytestmark = pytest.mark.slow  # together

LONG_S = 20.0
ASKED = "How long may I keep a book at home?"


@pytest.fixture
def ollama():
    with ScriptedOllama("m", tokens_per_s=60, words=12) as server:
        yield server


class Process:
    """What is a process's own: a cache, with its connections, and a model with its slots."""

    def __init__(self, server, url, namespace, batching, **options):
        told = {"op_budget_s": 5, "lease_s": 30, "lease_wait_s": 20, "embeddings": None, **options}
        self.cache = AegisSemanticCache(url, namespace=namespace, **told)
        model = ChatAegis("m", base_url=server.base_url, temperature=0, cache=None if batching else self.cache)
        if batching:
            model = BatchingChatModel(model.model_copy(update={"cache": self.cache}), cache=self.cache)
        self.model = model


@pytest.fixture
def processes(ollama, redis_url):
    """Makes several; each with a namespace of the test."""
    namespace, made = f"r{uuid.uuid4().hex[:8]}", []

    def make(batching=False, **options):
        made.append(Process(ollama, redis_url, namespace, batching, **options))
        return made[-1]

    make.namespace = namespace
    yield make
    for process in made:
        process.cache.close()


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url, protocol=2) as client:
        yield client


def streams(client, namespace):
    return client.keys(f"{namespace}:*:r:*")


def begun(client, namespace):
    """Wait until an answer is passed on."""
    return wait_until(lambda: [n for n in streams(client, namespace) if client.xlen(n) > 1], what="a stream")[0]


class Reader:
    """Reads a stream in a thread: what has come, when, and what came of it."""

    def __init__(self, model, asked=ASKED, take=None):
        self.chunks, self.times, self.error = [], [], None
        self._take = take
        self._thread = threading.Thread(target=self._read, args=(model, asked))
        self._thread.start()

    def _read(self, model, asked):
        try:
            with contextlib.closing(model.stream(asked)) as stream:
                for chunk in stream:
                    self.chunks.append(chunk)
                    self.times.append(time.monotonic())
                    if self._take is not None and len(self.chunks) >= self._take:
                        return
        except Exception as exc:
            self.error = exc

    def end(self):
        self._thread.join(LONG_S)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        return "".join(chunk.text for chunk in self.chunks)


class Scoped:
    """A model that is called for a tenant."""

    def __init__(self, model, tenant):
        self.model, self.tenant = model, tenant

    def stream(self, asked):
        with aegis_scope(tenant=self.tenant):
            yield from self.model.stream(asked)


async def text_of(model, asked=ASKED):
    return "".join([chunk.text async for chunk in model.astream(asked)])


@pytest.mark.parametrize("batching", [False, True])
def test_who_comes_late_has_the_pieces_as_they_come(processes, ollama, client, batching):
    """Two processes, one call of the model; the second has read a part before the first has all."""
    leader, other = processes(batching), processes(batching)
    first = Reader(leader.model)
    begun(client, processes.namespace)
    late = Reader(other.model)
    one, another = first.end(), late.end()
    assert one == another != ""
    assert len(ollama.chats) == 1
    assert len(late.chunks) > 5
    assert late.times[0] < first.times[-1]
    whole = [sum(chunks[1:], chunks[0]) for chunks in (first.chunks, late.chunks)]
    assert whole[0].usage_metadata == whole[1].usage_metadata
    assert whole[0].response_metadata == whole[1].response_metadata
    assert whole[0].id != whole[1].id
    assert was_cached(whole[1]) is None
    the_writer.drain(timeout_s=10)
    assert was_cached(other.model.invoke(ASKED))["tier"] == "exact"
    assert len(ollama.chats) == 1
    assert other.cache.stats().reasons["followed"] == 1


@pytest.mark.parametrize("batching", [False, True])
async def test_many_of_several_processes_make_one_call(processes, ollama, batching):
    """At the same moment, in threads and in an event loop: nobody waits for the end of the answer."""
    made = [processes(batching) for _ in range(3)]
    with ThreadPoolExecutor(12) as pool:
        loop = asyncio.get_running_loop()
        threads = [
            loop.run_in_executor(pool, lambda p=p: "".join(c.text for c in p.model.stream(ASKED)))
            for p in made for _ in range(4)
        ]  # fmt: skip
        async with asyncio.timeout(LONG_S):
            texts = await asyncio.gather(*threads, *(text_of(p.model) for p in made for _ in range(8)))
    assert len(set(texts)) == 1
    assert texts[0]
    assert len(ollama.chats) == 1
    assert len(followed) == 0


def test_who_comes_when_the_end_was_written_but_not_yet_stored_has_all_of_it(processes, ollama, client):
    leader, other = processes(), processes()
    relay = leading(leader, other)
    for text in ("four ", "weeks"):
        relay.send(chunk(text))
    relay.end()
    assert Reader(other.model).end() == "four weeks"
    assert ollama.chats == []


def test_tenants_models_and_prompts_have_streams_of_their_own(processes, ollama, client):
    leader, other = processes(), processes()
    first = Reader(Scoped(leader.model, "acme"))
    begun(client, processes.namespace)
    with aegis_scope(tenant="other"):
        assert "".join(c.text for c in other.model.stream(ASKED))
    assert len(ollama.chats) == 2
    first.end()


class _bound:
    def __init__(self, model, tenant):
        self.model, self.tenant = model, tenant

    def stream(self, asked):
        with aegis_scope(tenant=self.tenant):
            yield from self.model.stream(asked)


def test_who_was_looked_up_after_an_invalidation_does_not_read_what_began_before(processes, ollama, client):
    leader, other = processes(), processes()
    first = Reader(leader.model)
    begun(client, processes.namespace)
    other.cache.invalidate(sources=["loans.md"])
    late = Reader(other.model)
    ollama.wait_until(lambda server: len(server.chats) == 2)
    first.end()
    assert late.end()


def graph_of(model):
    """A graph of one node, which does not stream by itself."""

    async def node(state):
        return {"messages": [await model.ainvoke(ASKED)]}

    graph = StateGraph(MessagesState)
    graph.add_node("node", node)
    graph.add_edge(START, "node")
    return graph.compile()


async def tokens_of(model):
    """What a graph streams of a node's call: the texts, when they came, and the answer in the end."""
    tokens, times, end = [], [], None
    async for mode, told in graph_of(model).astream({"messages": []}, stream_mode=["messages", "values"]):
        if mode == "messages":
            tokens.append(told[0].text)
            times.append(time.monotonic())
        elif told["messages"]:
            end = told["messages"][-1]
    return "".join(tokens), times, end


@pytest.mark.parametrize("batching", [False, True])
async def test_the_tokens_of_a_graph_come_as_they_are_made(processes, ollama, client, batching):
    """A node that calls `ainvoke` in a graph that streams messages: both who makes the answer and who waits for it."""
    leader, other = processes(batching), processes(batching)
    first = asyncio.create_task(tokens_of(leader.model))
    await asyncio.to_thread(begun, client, processes.namespace)
    late = await tokens_of(other.model)
    one = await first
    assert late[0] == one[0] == late[2].text == one[2].text != ""
    assert len(late[1]) > 5
    assert late[1][0] < one[1][-1]
    assert len(ollama.chats) == 1
    assert late[2].usage_metadata == one[2].usage_metadata
    assert was_cached(late[2]) is None
    assert the_writer.drain(timeout_s=10)
    assert leader.cache.stats().stored == 1
    assert other.cache.stats().stored == 0
    assert was_cached(await other.model.ainvoke(ASKED))["tier"] == "exact"


@pytest.mark.parametrize("batching", [False, True])
async def test_the_tokens_of_a_graph_go_on_when_their_maker_has_gone(processes, ollama, client, batching):
    leader, other = processes(batching), processes(batching)
    first = Reader(leader.model, take=6)
    await asyncio.to_thread(begun, client, processes.namespace)
    text, _, end = await tokens_of(other.model)
    first.end()
    assert text == end.text
    assert text.startswith("".join(chunk.text for chunk in first.chunks))
    assert len(ollama.chats) == 2


# -- who makes it goes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", [False, True])
@pytest.mark.parametrize("awaited", [False, True])
def test_who_leaves_before_the_end_leaves_no_answer_and_others_make_it(processes, ollama, client, batching, awaited):
    """What they have given already is not given twice: the model says the same again."""
    leader, other = processes(batching), processes(batching)
    first = Reader(leader.model, take=6)
    begun(client, processes.namespace)
    if awaited:
        answer = asyncio.run(text_of(other.model))
    else:
        late = Reader(other.model)
        answer = late.end()
        assert sum(late.chunks[1:], late.chunks[0]).response_metadata["done_reason"] == "stop"
    first.end()
    assert answer.startswith("".join(chunk.text for chunk in first.chunks))
    assert len(ollama.chats) == 2
    the_writer.drain(timeout_s=10)
    hit = other.model.invoke(ASKED)
    assert hit.text == answer
    assert was_cached(hit)["tier"] == "exact"


@pytest.mark.parametrize("fault", ["cut", "error"])
def test_a_server_that_breaks_off_leaves_no_answer(processes, ollama, client, fault):
    leader, other = processes(), processes()
    ollama.fail(fault, after=6)
    first = Reader(leader.model)
    begun(client, processes.namespace)
    late = Reader(other.model)
    with pytest.raises(Exception, match=r"."):
        first.end()
    assert late.end().startswith("".join(chunk.text for chunk in first.chunks))
    assert len(ollama.chats) == 2


@pytest.mark.parametrize("given", ["words that the model would not say", "more"])
def test_another_answer_than_that_of_which_a_part_was_given_is_not_gone_on_with(processes, ollama, client, given):
    process, other = processes(), processes()
    relay = leading(process, other)
    relay.send(chunk(given))
    late = Reader(other.model)
    wait_until(lambda: late.chunks)
    relay.cut()
    with pytest.raises(AegisStreamError) as caught:
        late.end()
    assert caught.value.partial == given
    assert len(ollama.chats) == 1


def test_what_is_more_than_text_is_not_gone_on_with(processes, ollama, client):
    process, other = processes(), processes()
    relay = leading(process, other)
    relay.send(chunk("", additional_kwargs={"reasoning_content": "hm"}))
    late = Reader(other.model)
    wait_until(lambda: late.chunks)
    relay.cut()
    with pytest.raises(AegisStreamError):
        late.end()
    assert ollama.chats == []


def test_the_rest_of_an_answer_is_what_was_not_given_however_it_is_cut_into_pieces(processes):
    """Pieces of any length, of an answer that is the same, another, or shorter."""
    entry_of = partial(StreamEntry, processes().cache, [HumanMessage(ASKED)], "m", None)
    for cut in range(1, 12):
        for size in range(1, 13):
            entry = entry_of()
            entry.broke_off([chunk("four weeks. "[:cut])], BrokenOff("x"))
            pieces = [chunk("four weeks. "[i : i + size]) for i in range(0, 12, size)]
            rest = [entry.rest(piece) for piece in pieces]
            assert "".join(piece.text for piece in rest if piece is not None) == "four weeks. "[cut:]
    for other in (["five"], ["fou", "x"], ["four we", "aks"], [" four"]):
        entry = entry_of()
        entry.broke_off([chunk("four weeks")], BrokenOff("x"))
        with pytest.raises(AegisStreamError):
            for text in other:
                entry.rest(chunk(text))
    entry = entry_of()
    entry.broke_off([chunk("four weeks")], BrokenOff("x"))
    assert entry.rest(chunk("four")) is None
    with pytest.raises(AegisStreamError):
        entry.rest(chunk("", response_metadata={"done_reason": "stop"}))


@pytest.mark.parametrize("batching", [False, True])
def test_before_the_first_piece_another_one_makes_it(processes, ollama, client, batching):
    """The leader's call fails before anything came: one of those who wait makes the answer, the others follow it."""
    leader, *others = (processes(batching) for _ in range(4))
    relay = leading(leader, others[0])
    late = [Reader(other.model) for other in others]
    wait_until(lambda: all(other.cache.stats().reasons.get("followed") for other in others))
    assert ollama.chats == []
    relay.cut()
    texts = {reader.end() for reader in late}
    assert len(texts) == 1
    assert texts != {""}
    assert len(ollama.chats) == 1


@pytest.mark.slow
def test_a_process_that_dies_is_silent_and_then_another_one_makes_it(processes, ollama, client, redis_url):
    """Its stream ends with its last sign of life, long before its lease would."""
    other = processes()
    dead = processes()
    relay = leading(dead, other)
    wait_until(lambda: streams(client, processes.namespace))
    relay._cast.write = lambda: False  # it says nothing more: the thread that would has died with it
    began_s = time.monotonic()
    late = Reader(other.model)
    assert late.end()
    assert time.monotonic() - began_s < 15
    assert len(ollama.chats) == 1


def leading(process, other):
    """Return the relay of a lookup that has the lease, as if it were the leader of `ASKED`."""

    model = other.model
    entry = StreamEntry(process.cache, [HumanMessage(ASKED)], model._get_llm_string(), None)
    assert entry.lookup() is None
    assert entry.relay.leads
    process.entry = entry
    entry.relay.begin()
    return entry.relay


def chunk(text, **told):
    return ChatGenerationChunk(message=AIMessageChunk(content=text, **told))


def test_a_stream_that_is_given_up_by_nobodys_hand_ends(processes, ollama, client):
    """Who makes the answer is collected as garbage: no end comes, and no sign of life."""
    process, other = processes(), processes()
    relay = leading(process, other)
    name = wait_until(lambda: streams(client, processes.namespace))[0]
    relay.send(chunk("one"))
    wait_until(lambda: client.xlen(name) == 2)
    del relay, process.entry
    gc.collect()
    wait_until(lambda: 0 <= client.pttl(name) <= 10_000)
    wait_until(lambda: client.pttl(name) < 8_900, what="that nobody says that it lives")


# -- what lies in Redis -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_piece_is_signed_and_nothing_can_be_put_in_left_out_or_taken_from_elsewhere(processes, ollama, client):
    """Whoever can write to Redis can end a stream, not change what is read from it."""
    for kind in ("forged", "gap", "twice", "changed", "renumbered", "foreign"):
        process, other = processes(), processes()
        asked = f"{ASKED} {kind}"
        first = Reader(process.model, asked)
        name = begun(client, processes.namespace)
        rows = [fields for _, fields in client.xrange(name)]
        said = [orjson.loads(fields[b"d"]) for fields in rows]
        ttl = client.pttl(name)
        if kind == "forged":  # an end, of which all is right but the signature
            rows.append({**rows[1], b"d": orjson.dumps({"kind": "end", "cast": said[0]["cast"], "n": len(rows)})})
        elif kind == "gap":
            del rows[1]
        elif kind == "twice":
            rows.insert(1, rows[1])
        elif kind == "changed":
            said[1]["chunk"]["content"] = "Never"
            rows[1] = {**rows[1], b"d": orjson.dumps(said[1])}
        elif kind == "renumbered":
            rows[1] = {**rows[1], b"d": orjson.dumps({**said[1], "n": 9})}
        else:
            rows.append({b"what": b"is this"})
        with client.pipeline() as pipe:
            pipe.delete(name)
            for fields in rows:
                pipe.xadd(name, fields)
            pipe.pexpire(name, ttl)
            pipe.execute()
        late = Reader(other.model, asked)
        whole = first.end()
        assert late.end() == whole  # as far as it was right it was given, and then made anew
        the_writer.drain(timeout_s=10)
        client.delete(*streams(client, processes.namespace))


def test_what_is_passed_on_can_be_encrypted(processes, ollama, client):
    pytest.importorskip("cryptography")
    settings = AegisSettings(encrypt=True, secret_key="a secret of 16 or more")
    leader, other = processes(settings=settings), processes(settings=settings)
    first = Reader(leader.model)
    name = begun(client, processes.namespace)
    assert not any(b"kind" in fields[b"d"] for _, fields in client.xrange(name))
    late = Reader(other.model)
    assert late.end() == first.end()
    assert len(ollama.chats) == 1


def test_a_stream_is_gone_soon_after_its_end(processes, client):
    leader = processes()
    assert Reader(leader.model).end()
    (name,) = wait_until(lambda: streams(client, processes.namespace))
    wait_until(lambda: 0 < client.pttl(name) <= 10_000)


def test_tool_calls_and_other_pieces_come_as_they_are(processes, client):
    process, other = processes(), processes()
    relay = leading(process, other)
    sent = [
        chunk("a", additional_kwargs={"reasoning_content": "hm"}),
        chunk("", tool_call_chunks=[{"name": "f", "args": "{}", "id": "1", "index": 0, "type": "tool_call_chunk"}]),
        ChatGenerationChunk(
            message=AIMessageChunk(
                content="", chunk_position="last", response_metadata={"done_reason": "stop"},
                usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
            ),
            generation_info={"done": True},
        ),
    ]  # fmt: skip
    for each in sent:
        relay.send(each)
    relay.end()

    entry = StreamEntry(other.cache, [HumanMessage(ASKED)], other.model._get_llm_string(), None)
    assert entry.lookup() is None
    assert not entry.relay.leads
    got = list(entry.relay.follow())
    assert [c.message.model_copy(update={"id": None}) for c in got] == [
        c.message.model_copy(update={"id": None}) for c in sent
    ]
    assert [c.generation_info for c in got] == [c.generation_info for c in sent]


def test_what_json_cannot_say_is_not_passed_on(processes, client):
    process, other = processes(), processes()
    relay = leading(process, other)
    relay.send(chunk("a"))
    relay.send(chunk("b", additional_kwargs={"what": object()}))
    relay.send(chunk("c"))
    relay.end()
    (name,) = wait_until(lambda: streams(client, processes.namespace))
    wait_until(lambda: client.xlen(name) == 3)
    kinds = [orjson.loads(fields[b"d"])["kind"] for _, fields in client.xrange(name)]
    assert kinds == ["begin", "chunk", "cut"]


# -- waiting ----------------------------------------------------------------------------------------------------------


def test_an_answer_that_is_not_streamed_is_waited_for(processes, ollama):
    leader, other = processes(), processes()
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(leader.model.invoke, ASKED)
        ollama.wait_until(lambda server: len(server.chats) == 1)
        late = Reader(other.model)
        assert late.end() == whole.result(LONG_S).text
    assert len(ollama.chats) == 1


def test_it_is_not_waited_for_longer_than_for_an_answer(processes, ollama):
    leader, other = processes(), processes(lease_wait_s=0.1)
    with ollama.hold(), ThreadPoolExecutor(1) as pool:
        whole = pool.submit(leader.model.invoke, ASKED)
        ollama.wait_until(lambda server: len(server.chats) == 1)
        late = Reader(other.model)
        ollama.wait_until(lambda server: len(server.chats) == 2)  # nothing was passed on: it goes on alone
        ollama.release()
        assert late.end() == whole.result(LONG_S).text


async def test_a_deadline_and_a_cancel_end_the_reading_of_one_alone(processes, ollama, client):
    leader, other = processes(True), processes(True)
    impatient = BatchingChatModel(other.model.inner, cache=other.cache, deadline_s=0.15)
    first = Reader(leader.model)
    await asyncio.to_thread(begun, client, processes.namespace)
    gone = asyncio.create_task(text_of(other.model))
    late = [asyncio.create_task(text_of(other.model)) for _ in range(2)]
    with pytest.raises(AegisDeadlineError):
        await text_of(impatient)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    async with asyncio.timeout(LONG_S):
        texts = await asyncio.gather(*late)
    assert {*texts} == {await asyncio.to_thread(first.end)}
    assert len(ollama.chats) == 1
    assert len(followed) == 0


def test_what_is_held_in_the_process_stays_held(processes, ollama, client):
    """Nothing that is asked or written for streams changes a record."""
    leader, other = (processes(local_tier_bytes=1_000_000) for _ in range(2))
    assert leader.model.invoke("hello").text
    the_writer.drain(timeout_s=10)

    def held(process):
        assert process.model.invoke("hello").text
        return process.cache.stats().local.hits

    for process in (leader, other):
        wait_until(lambda process=process: held(process) < held(process), what="a hit of the local tier")
    before = [process.cache.stats().local.invalidated for process in (leader, other)]
    first = Reader(leader.model)
    begun(client, processes.namespace)
    assert Reader(other.model).end() == first.end()
    the_writer.drain(timeout_s=10)
    after = [process.cache.stats().local.invalidated for process in (leader, other)]
    # That there was no answer yet was held, too, and is no longer so; "hello" still is.
    assert all(b - a <= 1 for a, b in zip(before, after, strict=True))


def test_without_a_lease_nothing_is_passed_on(processes, ollama, client):
    one = processes(lease_s=0)
    assert Reader(one.model).end()
    assert streams(client, processes.namespace) == []


def test_a_dry_run_follows_nobody(processes, ollama, client):
    leader, dry = processes(), processes(dry_run=True)
    first = Reader(leader.model)
    begun(client, processes.namespace)
    late = Reader(dry.model)
    ollama.wait_until(lambda server: len(server.chats) == 2)
    assert first.end() == late.end()


@pytest.mark.parametrize("batching", [False, True])
def test_who_asks_for_a_fresh_answer_or_none_of_the_cache_follows_nobody(processes, ollama, client, batching):
    leader, other = processes(batching), processes(batching)
    first = Reader(leader.model)
    begun(client, processes.namespace)
    for how in ("off", "refresh"):
        with aegis_scope(cache=how):
            assert "".join(c.text for c in other.model.stream(ASKED))
    assert first.end()
    assert len(ollama.chats) == 3


@pytest.mark.slow
def test_a_redis_that_is_away_for_a_moment_does_not_end_a_stream(ollama, tmp_path):
    """Who reads goes on where he was; who writes has kept what came meanwhile."""
    with short_directory() as path, RedisProcess(path, search=False) as own:
        leader, other = (Process(ollama, own.url, "r", False, op_budget_s=0.1) for _ in range(2))
        first = Reader(leader.model)
        begun(own.client, "r")
        late = Reader(other.model)
        wait_until(lambda: late.chunks)
        with own.frozen():
            time.sleep(0.3)
        assert late.end() == first.end()
        assert len(ollama.chats) == 1
        for process in (leader, other):
            process.cache.close()


def test_a_redis_that_goes_away_costs_whoever_leads_nothing(ollama):
    with running_redis("plain") as own:
        one = Process(ollama, own.url, "r", False, op_budget_s=0.1)
        with redis.Redis.from_url(own.url) as client:
            first = Reader(one.model)
            begun(client, "r")
    assert first.end()
    assert first.error is None
    one.cache.close()
