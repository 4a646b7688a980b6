"""Whoever removes answers wins over every answer that is being made: none of those is kept."""

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest
from caches import Same, stats_of
from conftest import wait_until
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult

from langchain_aegis import (
    AegisSemanticCache,
    Answer,
    ChatAegis,
    aegis_scope,
    aegis_sources,
    batching,
    was_cached,
)
from langchain_aegis.merging import chat_flights
from langchain_aegis.writes import the_writer

QUESTION, PARAPHRASE = "How long may I keep a book?", "How long can I keep a book?"
WHOSE = {"tenant": "acme", "user": "ann", "task": "faq"}
DEADLINE_S = 30
DONE = {"done_reason": "stop"}

# What removes the answer to QUESTION for WHOSE, resting on "loans.md".
REMOVALS = {
    "sources": {"sources": ["loans.md"]},
    "several sources": {"sources": ["fees.md", "loans.md"]},
    "tenant": {"tenant": "acme"},
    "user": {"user": "ann"},
    "tenant and user": {"tenant": "acme", "user": "ann"},
    "tenant and sources": {"tenant": "acme", "sources": ["loans.md"]},
    "task": {"task": "faq"},
    "tenant and task": {"tenant": "acme", "task": "faq"},
    "model": {"model": "what made it"},  # `remove` is told which
    "tenant and model": {"tenant": "acme", "model": "what made it"},
    "age": {"older_than_s": 0},
    "tenant and age": {"tenant": "acme", "older_than_s": 0},
    "nearness": {"near": "For how long may a book be kept?"},
    "tenant and nearness": {"tenant": "acme", "near": "For how long may a book be kept?"},
    "clear": None,
}
# What concerns somebody else, and costs this answer nothing.
RACES = list(REMOVALS)
OTHERS = {
    "sources": {"sources": ["fees.md"]},
    "tenant": {"tenant": "globex"},
    "user": {"user": "bob"},
    "tenant and user": {"tenant": "acme", "user": "bob"},
    "tenant and sources": {"tenant": "globex", "sources": ["loans.md"]},
    "task": {"task": "chat"},
    "tenant and task": {"tenant": "globex", "task": "faq"},
    "model": {"model": "pipeline:other"},
    "tenant and model": {"tenant": "globex", "model": "what made it"},
    "age": {"older_than_s": 3600},
    "tenant and age": {"tenant": "globex", "older_than_s": 0},
}


def open_cache(url, namespace, **options):
    return AegisSemanticCache(url, Same(), namespace=namespace, op_budget_s=10, embed_budget_s=30, **options)


@pytest.fixture
async def make(redis_url):
    """Makes caches of one namespace; each stands for a process of its own."""
    namespace = f"r{uuid.uuid4().hex[:8]}"
    async with contextlib.AsyncExitStack() as exits:

        async def make(**options):
            return await exits.enter_async_context(open_cache(redis_url, namespace, **options))

        make.namespace = namespace
        yield make


@pytest.fixture
async def cache(make):
    return await make()


def remove(cache, what, model="pipeline:rag"):
    """Do one of REMOVALS."""
    return cache.clear() if what is None else cache.invalidate(**_told(what, model))


async def aremove(cache, what, model="pipeline:rag"):
    return await (cache.aclear() if what is None else cache.ainvalidate(**_told(what, model)))


def _told(what, model):
    return {**what, "model": model} if what.get("model") == "what made it" else what


class Pipeline:
    """Makes answers that are numbered; `meanwhile` runs while the first one is being made."""

    def __init__(self, meanwhile=None, named="by the answer"):
        self.made, self.meanwhile, self.named = 0, meanwhile, named

    def generate(self):
        self.made += 1
        if self.named == "inside":
            aegis_sources("loans.md")
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        value = f"answer {self.made}"
        return Answer(value, sources=["loans.md"]) if self.named == "by the answer" else value

    async def agenerate(self):
        if (meanwhile := self.meanwhile) is not None:
            self.meanwhile = None
            answer = self.generate()
            await meanwhile()
            return answer
        return self.generate()

    async def ask(self, cache, way="sync", question=QUESTION):
        before = {"sources": ["loans.md"]} if self.named == "by the caller" else {}
        with aegis_scope(**WHOSE):
            if way == "sync":
                return cache.get_or_generate(question, self.generate, pipeline="rag", **before)
            made = cache.aget_or_generate(question, self.agenerate, pipeline="rag", **before)
            return await asyncio.wait_for(made, DEADLINE_S)


# -- a pipeline


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("removed", RACES)
async def test_a_removal_wins_over_a_pipelines_answer_that_is_being_made(make, way, removed):
    """By another process, before the answer says what it rests on."""
    cache, other = await make(), await make()
    if way == "sync":
        pipeline = Pipeline(lambda: remove(other, REMOVALS[removed]))
    else:
        pipeline = Pipeline(lambda: aremove(other, REMOVALS[removed]))
    assert await pipeline.ask(cache, way) == "answer 1"  # whoever waited for it still gets it
    assert stats_of(cache).not_stored == {"invalidated": 1}
    assert await pipeline.ask(cache, way, PARAPHRASE) == "answer 2"
    assert await pipeline.ask(cache, way) == "answer 2"
    assert await pipeline.ask(other, way, PARAPHRASE) == "answer 2"


@pytest.mark.parametrize("named", ["by the answer", "inside", "by the caller"])
@pytest.mark.parametrize("removed", ["sources", "tenant and sources"])
async def test_it_wins_however_the_sources_were_named(make, removed, named):
    cache, other = await make(), await make()
    pipeline = Pipeline(lambda: remove(other, REMOVALS[removed]), named)
    assert [await pipeline.ask(cache) for _ in range(3)] == ["answer 1", "answer 2", "answer 2"]


@pytest.mark.parametrize("removed", RACES)
async def test_it_wins_from_another_thread_of_the_same_cache(cache, removed):
    def meanwhile():
        thread = threading.Thread(target=remove, args=(cache, REMOVALS[removed]))
        thread.start()
        thread.join(DEADLINE_S)

    pipeline = Pipeline(meanwhile)
    assert [await pipeline.ask(cache) for _ in range(3)] == ["answer 1", "answer 2", "answer 2"]


@pytest.mark.parametrize("removed", RACES)
async def test_it_wins_where_users_share_answers(make, removed):
    cache, other = await make(share_within_tenant=True), await make(share_within_tenant=True)
    pipeline = Pipeline(lambda: remove(other, REMOVALS[removed]))
    assert [await pipeline.ask(cache) for _ in range(3)] == ["answer 1", "answer 2", "answer 2"]


@pytest.mark.parametrize("concerned", OTHERS)
async def test_what_concerns_others_keeps_no_answer_back(make, concerned):
    cache, other = await make(), await make()
    pipeline = Pipeline(lambda: remove(other, OTHERS[concerned]))
    assert [await pipeline.ask(cache) for _ in range(2)] == ["answer 1", "answer 1"]


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("removed", REMOVALS)
async def test_an_answer_that_is_kept_is_removed_for_all_ways_to_find_it(make, way, removed):
    cache, other, pipeline = await make(), await make(), Pipeline()
    assert await pipeline.ask(cache, way) == await pipeline.ask(other, way, PARAPHRASE) == "answer 1"
    await aremove(other, REMOVALS[removed])
    assert await pipeline.ask(cache, way, PARAPHRASE) == "answer 2"
    assert await pipeline.ask(other, way) == "answer 2"


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_many_removals_while_many_answers_are_made_leave_none_of_them(make, way):
    """Each answer is asked for, and removed, by somebody else."""
    cache, other = await make(), await make()
    questions = [f"{QUESTION[:-1]} of shelf {number}?" for number in range(20)]
    pipelines = [Pipeline(None) for _ in questions]
    ways = list(REMOVALS.values())

    async def one(number):
        pipeline, what = pipelines[number], ways[number % len(ways)]
        if way == "sync":
            pipeline.meanwhile = lambda: remove(other, what)
            await asyncio.to_thread(copy_context().run, _run, pipeline.ask(cache, way, questions[number]))
        else:
            pipeline.meanwhile = lambda: aremove(other, what)
            await pipeline.ask(cache, way, questions[number])

    await asyncio.wait_for(asyncio.gather(*map(one, range(len(questions)))), DEADLINE_S)
    again = [await pipeline.ask(cache, way, question) for pipeline, question in zip(pipelines, questions, strict=True)]
    assert again == ["answer 2"] * len(questions)


def _run(coroutine):
    """Run a coroutine that awaits nothing."""
    with contextlib.suppress(StopIteration):
        coroutine.send(None)


# -- any chat model of LangChain


class Model(BaseChatModel):
    """Runs `meanwhile[0]` while it makes its first answer."""

    made: list[str]
    meanwhile: list[object]

    @property
    def _llm_type(self):
        return "numbered"

    @property
    def _identifying_params(self):
        return {"model": "numbered"}

    def _answer(self):
        self.made.append(f"answer {len(self.made) + 1}")
        message = AIMessage(self.made[-1], response_metadata={"done_reason": "stop"})
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        result = self._answer()
        if self.meanwhile:
            self.meanwhile.pop()()
        return result

    async def _agenerate(self, messages, stop=None, run_manager=None, **kwargs):
        result = self._answer()
        if self.meanwhile:
            await self.meanwhile.pop()()
        return result


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("removed", RACES)
async def test_a_removal_wins_over_a_models_answer_that_is_being_made(make, way, removed):
    cache, other = await make(), await make()
    what = REMOVALS[removed]
    named = {"what": what, "model": "numbered"}
    meanwhile = (lambda: remove(other, **named)) if way == "sync" else (lambda: aremove(other, **named))
    model = Model(cache=cache, made=[], meanwhile=[meanwhile])

    async def ask(question=QUESTION):
        with aegis_scope(**WHOSE, sources=["loans.md"]):
            return (model.invoke(question) if way == "sync" else await model.ainvoke(question)).text

    assert await ask() == "answer 1"
    assert stats_of(cache).not_stored == {"invalidated": 1}
    assert await ask(PARAPHRASE) == "answer 2"
    assert await ask() == "answer 2"


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_a_refresh_wins_over_an_answer_whose_making_began_before(make, way):
    """The slow, older answer does not take the place of the newer one."""
    cache, other = await make(), await make()
    newer = Model(cache=other, made=["newer"], meanwhile=[])

    def meanwhile():
        with aegis_scope(**WHOSE, cache="refresh"):
            assert newer.invoke(QUESTION).text == "answer 2"

    async def ameanwhile():
        with aegis_scope(**WHOSE, cache="refresh"):
            assert (await newer.ainvoke(QUESTION)).text == "answer 2"

    model = Model(cache=cache, made=[], meanwhile=[meanwhile if way == "sync" else ameanwhile])
    with aegis_scope(**WHOSE):
        first = model.invoke(QUESTION) if way == "sync" else await model.ainvoke(QUESTION)
        assert first.text == "answer 1"
        for _ in range(2):
            assert (await model.ainvoke(QUESTION)).text == model.invoke(QUESTION).text == "answer 2"
    assert len(model.made) == 1


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_a_report_wins_over_an_answer_that_is_being_made_from_what_was_reported(redis_url, make, way):
    """Another process, whose embedder sees no near question, makes an answer to the very text of the wrong hit."""
    cache = await make()
    with aegis_scope(**WHOSE):
        cache.get_or_generate(QUESTION, lambda: AIMessage("wrong", response_metadata=DONE), pipeline="rag")
        hit = cache.get_or_generate(PARAPHRASE, lambda: AIMessage("never made"), pipeline="rag")
    assert (hit.text, was_cached(hit)["tier"]) == ("wrong", "semantic")
    with open_cache(redis_url, make.namespace) as other:
        other._engine.embedder._make = lambda: None
        pipeline = Pipeline(
            (lambda: cache.report_wrong(hit)) if way == "sync" else (lambda: cache.areport_wrong(hit)), named="inside"
        )
        assert await pipeline.ask(other, way, PARAPHRASE) == "answer 1"
        assert stats_of(other).not_stored == {"invalidated": 1}
        await other.aclose()
    assert await pipeline.ask(cache, way, PARAPHRASE) == "answer 2"
    assert await pipeline.ask(cache, way, PARAPHRASE) == "answer 2"
    assert await Pipeline().ask(cache, way) == "answer 1"  # what was reported is gone, and the pair never served again


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_who_opts_out_leaves_nothing_that_is_being_made(make, way):
    cache, other = await make(), await make()
    pipeline = Pipeline((lambda: other.opt_out("ann")) if way == "sync" else (lambda: other.aopt_out("ann")))
    assert [await pipeline.ask(cache, way) for _ in range(2)] == ["answer 1", "answer 2"]
    assert cache.stats().stored == 0
    await other.aopt_in("ann")
    assert [await pipeline.ask(cache, way) for _ in range(2)] == ["answer 3", "answer 3"]


@pytest.mark.parametrize("removed", [name for name in REMOVALS if not name.endswith("age")])
async def test_who_waits_for_another_process_is_not_given_what_was_removed(make, removed):
    """With `lease_s` one process makes the answer, and the others wait for it."""
    maker, waiter = await make(lease_s=60, lease_wait_s=60), await make(lease_s=60, lease_wait_s=60)
    begun, go = asyncio.Event(), asyncio.Event()

    async def outdated():
        begun.set()
        await go.wait()
        return Answer("outdated", sources=["loans.md"])

    async def ask(cache, generate):
        with aegis_scope(**WHOSE):
            return await asyncio.wait_for(cache.aget_or_generate(QUESTION, generate, pipeline="rag"), DEADLINE_S)

    first = asyncio.create_task(ask(maker, outdated))
    await begun.wait()
    second = asyncio.create_task(ask(waiter, lambda: Answer("new", sources=["loans.md"])))
    await aremove(waiter, REMOVALS[removed])
    go.set()
    assert (await first, await second) == ("outdated", "new")
    assert await ask(maker, lambda: "newer") in ("new", "newer")


# -- streams and shared generations of ChatAegis


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("removed", RACES)
async def test_a_removal_wins_over_a_stream_that_is_read_to_its_end_later(server, make, way, removed):
    cache, other = await make(), await make()
    model = ChatAegis("m", base_url=server.base_url, temperature=0.8, cache=cache)

    async def ask():
        with aegis_scope(**WHOSE, sources=["loans.md"]):
            return await model.ainvoke(QUESTION)

    with aegis_scope(**WHOSE, sources=["loans.md"]):
        if way == "sync":
            stream = model.stream(QUESTION)
            chunks = [next(stream)]
        else:
            stream = model.astream(QUESTION)
            chunks = [await anext(stream)]
    await aremove(other, REMOVALS[removed], "m")
    chunks += list(stream) if way == "sync" else [chunk async for chunk in stream]
    assert stats_of(cache).not_stored == {"invalidated": 1}
    again = await ask()
    assert was_cached(again) is None
    assert again.text != "".join(chunk.text for chunk in chunks)
    assert (await ask()).text == again.text
    assert len(server.chats) == 2


def callers_of(model, way):
    """A function that starts a caller and returns its future."""

    def call():
        with aegis_scope(**WHOSE, sources=["loans.md"]):
            return model.invoke(QUESTION)

    async def acall():
        with aegis_scope(**WHOSE, sources=["loans.md"]):
            return await model.ainvoke(QUESTION)

    return (lambda: asyncio.ensure_future(asyncio.to_thread(call))) if way == "sync" else (
        lambda: asyncio.create_task(acall())
    )  # fmt: skip


def callers():
    """How many callers share each generation that is under way."""
    with chat_flights.lock:
        return [flight.seats for flight in chat_flights._open.values()]


async def until(true):
    await asyncio.to_thread(wait_until, true, DEADLINE_S)


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("removed", RACES)
async def test_a_removal_wins_over_a_generation_that_many_callers_share(server, make, way, removed):
    cache, other = await make(), await make()
    model = batching(ChatAegis("m", base_url=server.base_url, temperature=0), cache=cache)
    start = callers_of(model, way)
    with server.hold():
        asked = [start() for _ in range(5)]
        await server.await_until(lambda server: server.waiting == 1)
        await until(lambda: callers() == [5])
        await aremove(other, REMOVALS[removed], "m")
    answers = await asyncio.wait_for(asyncio.gather(*asked), DEADLINE_S)
    assert (len(server.chats), len({answer.text for answer in answers})) == (1, 1)
    assert stats_of(cache).not_stored == {"invalidated": 5}
    assert was_cached(await start()) is None
    assert len(server.chats) == 2
    assert was_cached(await start()) is not None


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("removed", REMOVALS)
async def test_who_joins_a_generation_after_the_removal_keeps_nothing_of_it(server, make, way, removed):
    """His lookup is newer than the removal, but what he joins is older."""
    cache, other = await make(), await make()
    model = batching(ChatAegis("m", base_url=server.base_url, temperature=0), cache=cache)
    start = callers_of(model, way)
    with server.hold():
        asked = [start()]
        await server.await_until(lambda server: server.waiting == 1)
        await aremove(other, REMOVALS[removed], "m")
        asked.append(start())
        await until(lambda: sum(callers()) == 2)
    await asyncio.wait_for(asyncio.gather(*asked), DEADLINE_S)
    begun = len(server.chats)
    again = await start()
    if begun == 1:  # he joined: then neither may keep it
        assert was_cached(again) is None
    assert was_cached(await start()) is not None
    assert len(server.chats) == 2


# -- two processes

PROCESS = """
import json, sys
from langchain_aegis import Answer, aegis_scope
from test_races import QUESTION, WHOSE, open_cache, remove

def say(value):
    print(json.dumps(value), flush=True)

def hear():
    return json.loads(sys.stdin.readline())

for line in sys.stdin:
    order = json.loads(line)
    with open_cache(order["url"], order["namespace"]) as cache:
        if order["do"] == "remove":
            remove(cache, order["what"])
            say("removed")
        else:
            def generate():
                say("generating")
                return Answer(hear(), sources=["loans.md"])
            with aegis_scope(**WHOSE):
                say(cache.get_or_generate(QUESTION, generate, pipeline="rag"))
"""


class Process:
    """Another process that asks and removes when it is told to."""

    def __init__(self, url, tests):
        self.url, self.busy = url, False
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tests
        )
        self._reader = ThreadPoolExecutor(1)

    def tell(self, value):
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def hear(self):
        said = json.loads(self._reader.submit(self._process.stdout.readline).result(DEADLINE_S))
        self.busy = said == "generating"
        return said

    def order(self, do, namespace, **more):
        self.busy = True
        self.tell({"do": do, "url": self.url, "namespace": namespace, **more})

    def close(self):
        if self.busy:  # a test failed in the middle of an order
            self._process.kill()
        self._process.stdin.close()
        self._process.wait(DEADLINE_S)
        self._reader.shutdown()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def processes(redis_url, request):
    with contextlib.ExitStack() as exits:

        def start():
            process = Process(redis_url, request.path.parent)
            exits.callback(process.close)
            return process

        yield [start(), start]


@pytest.fixture
def process(processes):
    if processes[0].busy:
        processes[0] = processes[1]()
    return processes[0]


@pytest.mark.parametrize("removed", RACES)
@pytest.mark.slow
async def test_a_removal_here_wins_over_an_answer_that_another_process_makes(cache, make, process, removed):
    process.order("ask", make.namespace)
    assert process.hear() == "generating"
    await aremove(cache, REMOVALS[removed])
    process.tell("outdated")
    assert process.hear() == "outdated"
    pipeline = Pipeline()
    assert await pipeline.ask(cache, question=PARAPHRASE) == "answer 1"
    assert await asyncio.to_thread(the_writer.drain, timeout_s=10)  # another process finds it once it is stored
    process.order("ask", make.namespace)
    assert process.hear() == "answer 1"  # it generates nothing


@pytest.mark.parametrize("removed", RACES)
async def test_a_removal_by_another_process_wins_over_an_answer_that_is_made_here(cache, make, process, removed):
    def meanwhile():
        process.order("remove", make.namespace, what=REMOVALS[removed])
        assert process.hear() == "removed"

    pipeline = Pipeline(meanwhile)
    assert [await pipeline.ask(cache) for _ in range(3)] == ["answer 1", "answer 2", "answer 2"]


# -- sources


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("named", ["by the answer", "inside", "by the caller"])
async def test_answers_go_with_any_source_however_it_was_named(cache, named, way):
    pipeline = Pipeline(named=named)
    assert [await pipeline.ask(cache, way) for _ in range(2)] == ["answer 1", "answer 1"]
    assert await cache.ainvalidate(sources=["fees.md"]) == 0
    assert await pipeline.ask(cache, way, PARAPHRASE) == "answer 1"
    assert await cache.ainvalidate(sources=["fees.md", "loans.md"]) == 1
    assert await pipeline.ask(cache, way, PARAPHRASE) == "answer 2"


async def test_sources_that_are_named_in_threads_of_the_pipeline_count(cache):
    def generate():
        with ThreadPoolExecutor(1) as threads:
            threads.submit(copy_context().run, aegis_sources, "loans.md").result()
        return "28 days"

    async def agenerate():
        await asyncio.gather(asyncio.to_thread(aegis_sources, "loans.md"), asyncio.create_task(asyncio.sleep(0)))
        return "28 days"

    cache.get_or_generate(QUESTION, generate, pipeline="a")
    await cache.aget_or_generate(QUESTION, agenerate, pipeline="b")
    assert cache.invalidate(sources=["loans.md"]) == 2


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_an_answer_that_was_made_from_a_kept_one_goes_with_its_sources(cache, way):
    """The inner pipeline is a hit and names no source again; what was made of it rests on them all the same."""
    inner, outer = Pipeline(), []

    def whole():
        outer.append(cache.get_or_generate(QUESTION, inner.generate, pipeline="inner"))
        return f"whole {len(outer)}"

    async def awhole():
        outer.append(await cache.aget_or_generate(QUESTION, inner.agenerate, pipeline="inner"))
        return f"whole {len(outer)}"

    async def ask():
        with aegis_scope(**WHOSE):
            if way == "sync":
                return cache.get_or_generate(QUESTION, whole, pipeline="outer")
            return await cache.aget_or_generate(QUESTION, awhole, pipeline="outer")

    with aegis_scope(**WHOSE):
        cache.get_or_generate(QUESTION, inner.generate, pipeline="inner")
    assert [await ask(), await ask()] == ["whole 1", "whole 1"]
    assert outer == ["answer 1"]
    await cache.ainvalidate(sources=["loans.md"])
    assert await ask() == "whole 2"
    assert outer == ["answer 1", "answer 2"]


async def test_a_pipeline_around_a_cached_model_goes_with_the_models_sources(make):
    """The model's answer is a hit; its sources were named when it was made, not when the pipeline ran."""
    cache = await make()
    model = Model(cache=cache, made=[], meanwhile=[])
    with aegis_scope(**WHOSE, sources=["loans.md"]):
        model.invoke(QUESTION)

    def generate():
        return f"{model.invoke(QUESTION).text}, in short"

    with aegis_scope(**WHOSE):
        asked = [cache.get_or_generate(QUESTION, generate, pipeline="short")]
        cache.invalidate(sources=["loans.md"])
        asked.append(cache.get_or_generate(QUESTION, generate, pipeline="short"))
    assert asked == ["answer 1, in short", "answer 2, in short"]


# -- pipelines and versions

NAMES = [("rag", ""), ("rag", "2"), ("rag2", ""), ("", "rag"), ("rag:2", ""), ("rag", ":2"), ("r", "ag2"), ("RAG", "")]


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("question", [QUESTION, PARAPHRASE], ids=["exact", "semantic"])
async def test_two_pipelines_or_versions_never_share(cache, way, question):
    names = [(pipeline, version) for pipeline, version in NAMES if pipeline]
    texts = {}

    async def ask(question, name, text):
        pipeline, version = name
        options = {"pipeline": pipeline, "version": version}
        if way == "sync":
            return cache.get_or_generate(question, lambda: text, **options)
        return await cache.aget_or_generate(question, lambda: text, **options)

    for number, name in enumerate(names):
        texts[name] = await ask(QUESTION, name, f"made by {number}")
        assert texts[name] == f"made by {number}"
    for name in names:
        assert await ask(question, name, "made again") == texts[name]


async def test_a_pipeline_and_a_model_never_share(cache):
    model = Model(cache=cache, made=[], meanwhile=[])
    assert model.invoke(QUESTION).text == "answer 1"
    for pipeline in ("numbered", "model", "rag"):
        assert cache.get_or_generate(QUESTION, lambda: "made", pipeline=pipeline) == "made"
    assert model.invoke(PARAPHRASE).text == "answer 1"


async def test_tasks_tenants_and_users_keep_a_pipelines_answers_apart(cache):
    scopes = [
        {}, {"tenant": "acme"}, {"tenant": "globex"}, {"tenant": "acme", "user": "ann"},
        {"tenant": "acme", "user": "bob"}, {"tenant": "acme", "task": "faq"}, {"tenant": "acme", "task": "ann"},
    ]  # fmt: skip
    for question in (QUESTION, PARAPHRASE):
        for number, scope in enumerate(scopes):
            with aegis_scope(**scope):
                got = cache.get_or_generate(question, lambda number=number: f"made for {number}", pipeline="rag")
            assert got == f"made for {number}"
