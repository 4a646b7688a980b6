"""However an application names a call's tenant, and wherever the call runs: no tenant gets another's answer."""

import asyncio
import contextlib
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypedDict

import httpx
import pytest
from caches import Same, stats_of
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnableParallel
from langchain_core.runnables.config import ContextThreadPoolExecutor
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.runtime import Runtime, get_runtime
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from langchain_aegis import (
    AegisCacheMiddleware,
    AegisSemanticCache,
    AegisSettings,
    BatchingChatModel,
    ChatAegis,
    aegis_scope,
    batching,
)

QUESTION = "What is the notice period of our contract?"
DEADLINE_S = 60


@pytest.fixture
async def make(redis_url, server):
    """Makes a model whose cache is new, as is its namespace; two calls of it have different answers."""
    async with contextlib.AsyncExitStack() as exits:

        async def make(**options):
            settings = AegisSettings.from_env({"AEGIS_TENANT_KEY": "tenant"})
            cache = await exits.enter_async_context(
                AegisSemanticCache(
                    redis_url, Same(), namespace=f"y{uuid.uuid4().hex[:8]}", op_budget_s=10, embed_budget_s=30,
                    settings=settings, **options,
                )
            )  # fmt: skip
            return ChatAegis("m", base_url=server.base_url, temperature=0.8, cache=cache)

        yield make


@pytest.fixture
async def model(make):
    return await make()


async def twice_each(ask):
    """Two tenants ask the same question twice, in turn; return the answers of the one and of the other."""
    answers = [await asyncio.wait_for(ask(tenant), DEADLINE_S) for tenant in ("acme", "globex", "acme", "globex")]
    assert all(answers)
    return answers[0::2], answers[1::2]


async def kept_apart(server, ask):
    """Each tenant has one answer, which nobody else gets."""
    acme, globex = await twice_each(ask)
    assert set(acme).isdisjoint(globex)
    assert (len(set(acme)), len(set(globex)), len(server.chats)) == (1, 1, 2)


async def never_shared(server, ask):
    """Where the tenant is lost on the way, nothing is served and nothing is kept for others."""
    acme, globex = await twice_each(ask)
    assert set(acme).isdisjoint(globex)
    return len(server.chats)


def chunks_text(chunks):
    return "".join(chunk.text for chunk in chunks)


# -- a web application


def web(*routes, middleware=()):
    """A client of a real application; the tenant is in a header, as an authenticating proxy would set it."""
    app = Starlette(routes=[Route("/", route) for route in routes], middleware=list(middleware))
    transport = httpx.ASGITransport(app)

    async def ask(tenant):
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            answer = await client.get("/", headers={"x-tenant": tenant})
        assert answer.status_code == 200
        return answer.text

    return ask


def tenant_of(request):
    return request.headers["x-tenant"]


class PerRequest(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        with aegis_scope(tenant=tenant_of(request)):
            return await call_next(request)


class PurePerRequest:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async with aegis_scope(tenant=dict(scope["headers"])[b"x-tenant"].decode()):
            await self.app(scope, receive, send)


def scoped_inside(model):
    async def body(tenant):
        with aegis_scope(tenant=tenant):
            async for chunk in model.astream(QUESTION):
                yield chunk.text

    async def route(request):
        return StreamingResponse(body(tenant_of(request)))

    return web(route)


def scoped_inside_sync(model):
    """Starlette takes each step of a blocking generator in a thread, with another copy of the context."""

    def body(tenant):
        with aegis_scope(tenant=tenant):
            for chunk in model.stream(QUESTION):
                yield chunk.text

    async def route(request):
        return StreamingResponse(body(tenant_of(request)))

    return web(route)


def wrapped(model):
    async def body():
        yield ""
        async for chunk in model.astream(QUESTION):
            yield chunk.text

    async def route(request):
        return StreamingResponse(aegis_scope(tenant=tenant_of(request)).wrap(body()))

    return web(route)


def wrapped_sync(model):
    def body():
        yield ""
        yield model.invoke(QUESTION).text

    async def route(request):
        with aegis_scope(tenant=tenant_of(request)):
            return StreamingResponse(aegis_scope.wrap(body()))

    return web(route)


def blocking_route(model):
    def route(request):
        with aegis_scope(tenant=tenant_of(request)):
            return PlainTextResponse(model.invoke(QUESTION).text)

    return web(route)


def streamed_behind(middleware):
    def app(model):
        async def body():
            yield ""
            yield (await model.ainvoke(QUESTION)).text

        async def route(request):
            return StreamingResponse(body())

        return web(route, middleware=[Middleware(middleware)])

    return app


def streamed_sync_behind(middleware):
    def app(model):
        def body():
            yield ""
            yield model.invoke(QUESTION).text

        async def route(request):
            return StreamingResponse(body())

        return web(route, middleware=[Middleware(middleware)])

    return app


KEEPING_APPS = {
    "async generator": scoped_inside,
    "blocking generator": scoped_inside_sync,
    "wrapped async generator": wrapped,
    "wrapped blocking generator": wrapped_sync,
    "blocking route": blocking_route,
    "middleware, async stream": streamed_behind(PerRequest),
    "pure middleware, async stream": streamed_behind(PurePerRequest),
    "middleware, blocking stream": streamed_sync_behind(PerRequest),
    "pure middleware, blocking stream": streamed_sync_behind(PurePerRequest),
}


@pytest.mark.parametrize("app", KEEPING_APPS.values(), ids=KEEPING_APPS)
async def test_a_web_applications_tenants_have_each_their_own_answers(server, model, app):
    await kept_apart(server, app(model))


def read_after_the_scope(model):
    async def route(request):
        with aegis_scope(tenant=tenant_of(request)):
            return StreamingResponse(chunk.text async for chunk in model.astream(QUESTION))

    return web(route)


def read_after_the_scope_sync(model):
    async def route(request):
        with aegis_scope(tenant=tenant_of(request)):
            return StreamingResponse(chunk.text for chunk in model.stream(QUESTION))

    return web(route)


def called_after_the_scope(model):
    async def body():
        yield (await model.ainvoke(QUESTION)).text

    async def route(request):
        with aegis_scope(tenant=tenant_of(request)):
            return StreamingResponse(body())

    return web(route)


def called_in_a_later_step(model):
    def body(tenant):
        with aegis_scope(tenant=tenant):
            yield ""
            yield model.invoke(QUESTION).text  # in another copy of the context, to which the scope is unknown

    async def route(request):
        return StreamingResponse(body(tenant_of(request)))

    return web(route)


def called_in_the_background(model):
    done = {}

    def work(number):
        done[number] = model.invoke(QUESTION).text

    async def route(request):
        with aegis_scope(tenant=tenant_of(request)):
            number = uuid.uuid4().hex
            return PlainTextResponse(number, background=BackgroundTask(work, number))

    ask = web(route)

    async def answer(tenant):
        return done[await ask(tenant)]

    return answer


def scope_of_a_blocking_dependency(model):
    """FastAPI enters a blocking dependency in a thread: what it sets never reaches the route."""

    def dependency(tenant):
        with aegis_scope(tenant=tenant):
            yield

    async def route(request):
        steps = dependency(tenant_of(request))
        await asyncio.to_thread(next, steps)
        answer = await model.ainvoke(QUESTION)
        await asyncio.to_thread(next, steps, None)
        return PlainTextResponse(answer.text)

    return web(route)


LOSING_APPS = {
    "stream read after the scope": read_after_the_scope,
    "blocking stream read after the scope": read_after_the_scope_sync,
    "generator read after the scope": called_after_the_scope,
    "later step of a blocking generator": called_in_a_later_step,
    "background task": called_in_the_background,
    "blocking dependency": scope_of_a_blocking_dependency,
}


@pytest.mark.parametrize("app", LOSING_APPS.values(), ids=LOSING_APPS)
async def test_a_web_application_that_loses_the_scope_shares_nothing(server, model, app):
    """Although the cache has never seen a tenant: that somebody named one says enough."""
    await never_shared(server, app(model))


# -- a graph


class Chat(TypedDict):
    messages: Annotated[list[Any], add_messages]


@dataclass
class Context:
    tenant: str


def graph_of(*nodes, **options):
    graph = StateGraph(Chat, **options)
    before = START
    for number, node in enumerate(nodes):
        graph.add_node(f"n{number}", node)
        graph.add_edge(before, f"n{number}")
        before = f"n{number}"
    return graph.compile()


def nodes_of(model, awaited):
    def call(state):
        return {"messages": [model.invoke(QUESTION)]}

    async def acall(state):
        return {"messages": [await model.ainvoke(QUESTION)]}

    return acall if awaited else call


async def last_text(graph, *args, **kwargs):
    return (await graph.ainvoke({"messages": []}, *args, **kwargs))["messages"][-1].text


@pytest.mark.parametrize("awaited", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("named", ["around the graph", "in configurable", "in the context", "by a context object"])
async def test_a_graphs_tenants_have_each_their_own_answers(server, model, named, awaited):
    graph = graph_of(nodes_of(model, awaited), context_schema=Context)

    async def ask(tenant):
        if named == "around the graph":
            with aegis_scope(tenant=tenant):
                return await last_text(graph)
        if named == "in configurable":
            return await last_text(graph, {"configurable": {"tenant": tenant}})
        return await last_text(graph, context=Context(tenant) if named == "by a context object" else {"tenant": tenant})

    await kept_apart(server, ask)


@pytest.mark.parametrize("awaited", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "left open"])
async def test_what_one_node_enters_does_not_disturb_the_next(server, model, awaited, left):
    """LangGraph runs each node in a context of its own; the graph's context names the tenant in all of them."""

    def enter(state, runtime: Runtime[Context]):
        scope = aegis_scope(tenant=runtime.context.tenant)
        scope.__enter__()
        if left:
            scope.__exit__(None, None, None)
        return {}

    async def ask(tenant):
        graph = graph_of(enter, nodes_of(model, awaited), context_schema=Context)
        return await last_text(graph, context=Context(tenant))

    await kept_apart(server, ask)


@dataclass
class OtherContext:
    customer: str


@pytest.mark.parametrize("awaited", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "left open"])
async def test_a_tenant_that_only_another_node_named_is_no_tenant_and_nothing_is_shared(server, model, awaited, left):
    def enter(state):
        scope = aegis_scope(tenant=get_runtime(OtherContext).context.customer)
        scope.__enter__()
        if left:
            scope.__exit__(None, None, None)
        return {}

    graph = graph_of(enter, nodes_of(model, awaited), context_schema=OtherContext)
    assert await never_shared(server, lambda tenant: last_text(graph, context=OtherContext(tenant))) == 4


@pytest.mark.row(57)
async def test_many_runs_of_two_tenants_at_once_do_not_mix(server, model):
    graph = graph_of(nodes_of(model, True), nodes_of(model, False), context_schema=Context)
    tenants = ["acme", "globex"] * 20
    runs = asyncio.gather(*(last_text(graph, context=Context(tenant)) for tenant in tenants))
    answers = await asyncio.wait_for(runs, DEADLINE_S)
    assert set(answers[0::2]).isdisjoint(answers[1::2])


async def test_an_agents_tenants_have_each_their_own_answers(server, model, make):
    bare = ChatAegis("m", base_url=server.base_url, temperature=0.8)
    agent = create_agent(bare, [], middleware=[AegisCacheMiddleware(model.cache)], context_schema=Context)

    async def ask(tenant):
        said = await agent.ainvoke({"messages": [HumanMessage(QUESTION)]}, context=Context(tenant))
        return said["messages"][-1].text

    await kept_apart(server, ask)


# -- a config given to the call itself


def named(tenant):
    return {"configurable": {"tenant": tenant}}


async def _events(model, tenant):
    events = [e async for e in model.astream_events(QUESTION, named(tenant), version="v2")]
    return chunks_text(e["data"]["chunk"] for e in events if e["event"] == "on_chat_model_stream")


async def _astream(model, tenant):
    return chunks_text([chunk async for chunk in model.astream(QUESTION, named(tenant))])


async def _abatch_as_completed(model, tenant):
    ((_, answer),) = [done async for done in model.abatch_as_completed([QUESTION], named(tenant))]
    return answer.text


async def _sync(value):
    return value.text


CALLS = {
    "invoke": lambda model, tenant: _sync(model.invoke(QUESTION, named(tenant))),
    "invoke config=": lambda model, tenant: _sync(model.invoke(QUESTION, config=named(tenant))),
    "ainvoke": lambda model, tenant: _first_text(model.ainvoke(QUESTION, named(tenant))),
    "stream": lambda model, tenant: _sync(_Joined(model.stream(QUESTION, named(tenant)))),
    "astream": _astream,
    "astream_events": _events,
    "batch": lambda model, tenant: _sync(model.batch([QUESTION], named(tenant))[0]),
    "abatch": lambda model, tenant: _first_text(model.abatch([QUESTION], [named(tenant)])),
    "batch_as_completed": lambda model, tenant: _sync(next(model.batch_as_completed([QUESTION], named(tenant)))[1]),
    "abatch_as_completed": _abatch_as_completed,
    "with_config": lambda model, tenant: _first_text(model.with_config(named(tenant)).ainvoke(QUESTION)),
    "with_config, stream": lambda model, tenant: _sync(_Joined(model.with_config(named(tenant)).stream(QUESTION))),
    "bind": lambda model, tenant: _first_text(model.bind(num_predict=50).ainvoke(QUESTION, named(tenant))),
    "with_retry": lambda model, tenant: _first_text(model.with_retry().ainvoke(QUESTION, named(tenant))),
    "with_fallbacks": lambda model, tenant: _sync(model.with_fallbacks([model]).invoke(QUESTION, named(tenant))),
    "prompt | model": lambda model, tenant: _first_text(
        (ChatPromptTemplate.from_template("{q}") | model).ainvoke({"q": QUESTION}, named(tenant))
    ),
    "in a function": lambda model, tenant: _sync(
        RunnableLambda(lambda _: model.invoke(QUESTION)).invoke(0, named(tenant))
    ),
    "in parallel": lambda model, tenant: _first_text(
        RunnableParallel(a=model, b=RunnableLambda(lambda q: q)).ainvoke(QUESTION, named(tenant))
    ),
}


class _Joined:
    def __init__(self, chunks):
        self.text = chunks_text(list(chunks))


async def _first_text(awaitable):
    got = await awaitable
    if isinstance(got, dict):
        got = got["a"]
    return (got[0] if isinstance(got, list) else got).text


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.row(59)
async def test_the_config_of_a_call_names_its_tenant(server, model, call):
    """By the name that AEGIS_TENANT_KEY says."""
    await kept_apart(server, lambda tenant: call(model, tenant))


@pytest.mark.parametrize("call", ["invoke", "ainvoke", "stream", "astream", "batch", "abatch", "prompt | model"])
@pytest.mark.row(59)
async def test_the_config_of_a_call_names_its_tenant_through_admission_too(server, model, call):
    outer = BatchingChatModel(model.model_copy(update={"cache": None}), cache=model.cache)
    if "stream" in call:  # the wrapper neither looks up nor keeps what is streamed
        await never_shared(server, lambda tenant: CALLS[call](outer, tenant))
    else:
        await kept_apart(server, lambda tenant: CALLS[call](outer, tenant))


@pytest.mark.parametrize("way", ["batch", "abatch"])
@pytest.mark.row(58)
async def test_each_item_of_a_batch_may_be_another_tenants(server, model, way):
    tenants = ["acme", "globex"] * 4
    configs = [named(tenant) for tenant in tenants]
    for _ in range(2):
        if way == "batch":
            answers = model.batch([QUESTION] * 8, configs)
        else:
            answers = await model.abatch([QUESTION] * 8, configs)
        texts = [answer.text for answer in answers]
        assert set(texts[0::2]).isdisjoint(texts[1::2])
    assert (len(set(texts[0::2])), len(set(texts[1::2]))) == (1, 1)


@pytest.mark.row(59)
async def test_the_config_of_one_call_is_forgotten_by_the_next(server, make):
    model = await make(require_tenant=False)
    first = await model.ainvoke(QUESTION, named("acme"))
    async for _ in model.astream("How long may I keep a book?", named("acme")):
        assert (await model.ainvoke(QUESTION)).text != first.text
    assert (await model.ainvoke(QUESTION)).text != first.text


# -- threads and tasks


async def in_thread(call):
    return await asyncio.get_running_loop().run_in_executor(None, call)


THREADS = {
    "to_thread": lambda call: asyncio.to_thread(call),
    "copied context": lambda call: in_thread(partial(copy_context().run, call)),
    "LangChain's executor": lambda call: asyncio.wrap_future(_submit(ContextThreadPoolExecutor, call)),
    "task": lambda call: asyncio.create_task(asyncio.to_thread(call)),
}
BARE_THREADS = {
    "run_in_executor": in_thread,
    "ThreadPoolExecutor": lambda call: asyncio.wrap_future(_submit(ThreadPoolExecutor, call)),
    "Thread": lambda call: _new_thread(call),
}


def _submit(kind, call):
    with kind(1) as executor:
        return executor.submit(call)


async def _new_thread(call):
    said = []
    thread = threading.Thread(target=lambda: said.append(call()))
    thread.start()
    await asyncio.to_thread(thread.join, DEADLINE_S)
    return said[0]


@pytest.mark.parametrize("run", THREADS.values(), ids=THREADS)
async def test_a_scope_goes_along_with_its_context(server, model, run):
    async def ask(tenant):
        with aegis_scope(tenant=tenant):
            return (await run(lambda: model.invoke(QUESTION))).text

    await kept_apart(server, ask)


@pytest.mark.parametrize("run", BARE_THREADS.values(), ids=BARE_THREADS)
async def test_a_bare_thread_knows_no_scope_and_nothing_is_shared(server, model, run):
    async def ask(tenant):
        with aegis_scope(tenant=tenant):
            return (await run(lambda: model.invoke(QUESTION))).text

    assert await never_shared(server, ask) == 4


async def test_a_batch_inside_a_scope_is_the_scopes(server, model):
    async def ask(tenant):
        with aegis_scope(tenant=tenant):
            texts = {answer.text for answer in model.batch([QUESTION]) + await model.abatch([QUESTION])}
        assert len(texts) == 1
        return texts.pop()

    await kept_apart(server, ask)


async def test_a_task_started_in_a_scope_keeps_it_after_the_scope_was_left(server, model):
    go = asyncio.Event()

    async def later():
        await go.wait()
        return (await model.ainvoke(QUESTION)).text

    async def ask(tenant):
        go.clear()
        with aegis_scope(tenant=tenant):
            task = asyncio.create_task(later())
        go.set()
        return await task

    await kept_apart(server, ask)


async def test_a_worker_started_before_any_scope_shares_nothing(server, model):
    """A queue does not carry the context of those who put work into it."""
    work: asyncio.Queue[asyncio.Future[str]] = asyncio.Queue()

    async def worker():
        while True:
            waiting = await work.get()
            waiting.set_result((await model.ainvoke(QUESTION)).text)

    task = asyncio.create_task(worker())

    async def ask(tenant):
        with aegis_scope(tenant=tenant):
            waiting = asyncio.get_running_loop().create_future()
            work.put_nowait(waiting)
            return await waiting

    assert await never_shared(server, ask) == 4
    task.cancel()


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_threads_and_tasks_that_share_one_generation_are_of_one_tenant(server, model, way):
    """Joining a generation that is under way is as good as a hit, and as dangerous."""
    shared = batching(ChatAegis("m", base_url=server.base_url, temperature=0), cache=model.cache)

    async def ask(tenant):
        with aegis_scope(tenant=tenant):
            if way == "ainvoke":
                return await shared.ainvoke(QUESTION)
            return await asyncio.to_thread(shared.invoke, QUESTION)

    with server.hold():
        asked = [asyncio.create_task(ask(tenant)) for tenant in ("acme", "globex", "acme", "globex")]
        # Two are with the server, and two have joined them.
        await server.await_until(lambda server: server.waiting == shared.admission.stats().merged == 2)
    await asyncio.wait_for(asyncio.gather(*asked), DEADLINE_S)
    assert len(server.chats) == 2


# -- generators that hold a scope


async def scoped_answers(model, tenant):
    with aegis_scope(tenant=tenant):
        yield ""
        yield (await model.ainvoke(QUESTION)).text


async def test_a_generator_read_step_by_step_in_several_tasks_shares_nothing(server, model):
    """Each step of it has a context of its own, in which the scope of the first step is not known."""

    async def ask(tenant):
        answers = scoped_answers(model, tenant)
        await asyncio.create_task(anext(answers))
        text = await asyncio.create_task(anext(answers))
        await asyncio.create_task(answers.aclose())
        return text

    assert await never_shared(server, ask) == 4


async def test_a_generator_closed_in_another_task_leaves_no_tenant_behind(server, model):
    """Its reader goes on with a call for somebody else, named in the config."""
    texts = {}
    for tenant in ("acme", "globex"):
        with aegis_scope(tenant=tenant):
            texts[tenant] = (await model.ainvoke(QUESTION)).text
    answers = scoped_answers(model, "acme")
    assert await anext(answers) == ""
    await asyncio.create_task(answers.aclose())  # a web framework does so when the client has left
    assert (await model.ainvoke(QUESTION, named("globex"))).text == texts["globex"]
    assert (await model.ainvoke(QUESTION)).text not in texts.values()


@pytest.mark.parametrize("bound", [True, False], ids=["wrapped", "bare"])
async def test_two_generators_read_in_turn_share_nothing(server, model, bound):
    """In one task, the scope that was entered last is in force for both, unless each is wrapped."""

    async def answers(tenant):
        yield ""
        yield (await model.ainvoke(QUESTION)).text

    def open_for(tenant):
        return aegis_scope(tenant=tenant).wrap(answers(tenant)) if bound else scoped_answers(model, tenant)

    texts = []
    for _ in range(2):
        both = [open_for("acme"), open_for("globex")]
        texts += [[await anext(one) for one in both] for _ in range(2)]
        for one in both:
            await one.aclose()
    acme, globex = zip(*texts[1::2], strict=True)
    assert set(acme).isdisjoint(globex)
    if bound:
        assert (len(set(acme)), len(set(globex)), len(server.chats)) == (1, 1, 2)


# -- what the cache asks for


@pytest.mark.parametrize("require_tenant", ["auto", True, False])
@pytest.mark.row(59)
async def test_who_names_no_tenant_gets_nothing_of_those_who_do(server, make, require_tenant):
    model = await make(require_tenant=require_tenant)
    with aegis_scope(tenant="acme"):
        acme = {(await model.ainvoke(QUESTION)).text for _ in range(2)}
    nobody = [(await model.ainvoke(QUESTION)).text for _ in range(2)]
    assert len(acme) == 1
    assert acme.isdisjoint(nobody)
    assert (nobody[0] == nobody[1]) == (require_tenant is False)


async def test_calls_without_a_tenant_share_where_nobody_ever_named_one(server, make):
    model = await make()
    assert len({(await model.ainvoke(QUESTION)).text for _ in range(3)}) == 1
    assert len(server.chats) == 1


async def test_a_tenant_named_later_ends_what_was_shared(server, make):
    """Answers that were kept before anybody named a tenant are served to nobody any more."""
    model = await make()
    before = (await model.ainvoke(QUESTION)).text
    assert (await model.ainvoke(QUESTION)).text == before
    with aegis_scope(tenant="acme"):
        assert (await model.ainvoke(QUESTION)).text != before
    assert (await model.ainvoke(QUESTION)).text != before


@pytest.mark.parametrize("bad", ["", "  ", 3.5, True, ["acme"], b"acme"])
@pytest.mark.row(53)
async def test_a_tenant_that_is_no_name_bypasses_the_cache(server, model, bad):
    for _ in range(2):
        await model.ainvoke(QUESTION, named(bad))
    assert len(server.chats) == 2
    assert stats_of(model.cache).stored == 0
