"""Whose call it is follows the call, and nothing else."""

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.scope import aegis_scope, aegis_sources, bound_here, current, seen_config, tenants_named, who


def test_an_inner_scope_changes_only_what_it_names():
    with aegis_scope(tenant="acme", task="chat", ttl_s=5):
        with aegis_scope(user="u1", cache="off"):
            assert (current().tenant, current().user, current().task, current().ttl_s) == ("acme", "u1", "chat", 5)
            assert current().cache == "off"
        assert current().user is None
    assert current().tenant is None


@pytest.mark.parametrize(
    "bad",
    [
        *({"tenant": t} for t in ("", " ", 3)), {"user": "\n"}, {"question": " "}, {"cache": "on"},
        *({"ttl_s": t} for t in (0, float("nan"), True)), *({"sources": s} for s in ("doc", [""], [3])),
    ],
)  # fmt: skip
@pytest.mark.row(53)
def test_a_bad_value_is_refused_at_once(bad):
    with pytest.raises(AegisConfigError):
        aegis_scope(**bad)


async def test_tasks_and_threads_see_the_scope_they_were_started_in():
    async def tenant():
        await asyncio.sleep(0)
        return current().tenant

    async with aegis_scope(tenant="a"):
        first = asyncio.create_task(tenant())
    async with aegis_scope(tenant="b"):
        second = asyncio.create_task(tenant())
        in_thread = await asyncio.to_thread(lambda: current().tenant)
    assert (await first, await second, in_thread) == ("a", "b", "b")


def test_sources_reach_the_outer_scopes_from_anywhere_inside():
    with aegis_scope(tenant="a", sources=["d0"]) as _:
        outer = current().sources
        with aegis_scope(task="chat"):
            aegis_sources("d1")
            context = copy_context()
            thread = threading.Thread(target=lambda: context.run(aegis_sources, "d2"))
            thread.start()
            thread.join()
            assert current().sources.ids() == {"d0", "d1", "d2"}
        assert outer.ids() == {"d0", "d1", "d2"}


def test_a_stream_keeps_its_scope_when_it_is_read_later():
    def stream():
        for _ in range(2):
            yield current().tenant

    with aegis_scope(tenant="caller"):
        wrapped = aegis_scope(tenant="acme").wrap(stream())
        bound_here = aegis_scope.wrap(stream())
    assert (next(wrapped), current().tenant, next(wrapped)) == ("acme", None, "acme")
    assert next(bound_here) == "caller"


async def test_an_async_stream_keeps_its_scope_in_another_task():
    closed = []

    async def stream():
        try:
            while True:
                yield current().tenant
        finally:
            closed.append(current().tenant)

    wrapped = aegis_scope(tenant="acme").wrap(stream())
    assert await asyncio.create_task(anext(wrapped)) == "acme"
    assert await anext(wrapped) == "acme"
    await wrapped.aclose()
    assert len(closed) == 1


def test_leaving_in_another_context_never_raises():
    scope = aegis_scope(tenant="acme")
    copy_context().run(scope.__enter__)
    scope.__exit__(None, None, None)
    assert current().tenant is None


@pytest.mark.row(59)
def test_the_scope_and_the_config_of_the_call_complete_each_other():
    with seen_config({"configurable": {"tenant_id": "acme", "user_id": 7}}):
        assert who("tenant_id", "user_id") == ("acme", "7")
        with aegis_scope(tenant="acme"):
            assert who("tenant_id", "user_id") == ("acme", "7")
        with aegis_scope(tenant="told"):
            assert who(None, None) == ("told", None)
    assert who("tenant_id", "user_id") == (None, None)


@pytest.mark.parametrize("told", [{"tenant": "globex"}, {"tenant": "acme", "user": "u2"}, {"user": "u2"}])
@pytest.mark.row(59)
def test_a_scope_and_a_config_that_name_different_ones_name_nobody(told):
    """A scope that came along by mistake (a worker started inside it) must not decide whose answer is served."""
    from langchain_core.runnables import RunnableLambda

    config = {"configurable": {"tenant_id": "acme", "user_id": "u1"}}
    with aegis_scope(**told):
        with seen_config(config), pytest.raises(AegisConfigError):
            who("tenant_id", "user_id")
        with pytest.raises(AegisConfigError):
            RunnableLambda(lambda _: who("tenant_id", "user_id")).invoke(1, config)


@pytest.mark.row(59)
def test_a_scope_and_a_graphs_context_that_name_different_tenants_name_nobody():
    from langgraph.graph import START, StateGraph

    graph = StateGraph(dict, context_schema=dict)
    graph.add_node("ask", lambda _: {"who": who("tenant_id", None)[0]})
    graph.add_edge(START, "ask")
    compiled = graph.compile()
    with aegis_scope(tenant="acme"):
        assert compiled.invoke({}, context={"tenant_id": "acme"}) == {"who": "acme"}
        with pytest.raises(AegisConfigError):
            compiled.invoke({}, context={"tenant_id": "globex"})


@pytest.mark.row(53)
def test_an_unusable_tenant_in_a_config_is_an_error_never_another_bucket():
    for bad in ("", "  ", ["a"], True):
        with seen_config({"configurable": {"tenant_id": bad}}), pytest.raises(AegisConfigError):
            who("tenant_id", None)


def test_a_runnable_around_the_call_names_the_tenant():
    from langchain_core.runnables import RunnableLambda

    step = RunnableLambda(lambda _: who("tenant_id", "user_id"))
    assert step.invoke(1, {"configurable": {"tenant_id": "acme"}}) == ("acme", None)


# -- what counts as naming a tenant


def test_every_scope_that_names_a_tenant_is_counted_once():
    before = tenants_named()
    with aegis_scope(tenant="a"), aegis_scope(user="u", task="chat"):
        aegis_scope.wrap(iter(()))
    aegis_scope(tenant="b").wrap(iter(()))
    aegis_scope(tenant="never entered")
    with aegis_scope(user="u"):
        aegis_scope.wrap(iter(()))
    assert tenants_named() - before == 3


def test_a_tenant_named_in_any_thread_is_noticed():
    def name(_):
        before = tenants_named()
        with aegis_scope(tenant="a"):
            return tenants_named() != before

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(name, range(500)))


# -- scopes that are not left where, or when, they should be


def asked():
    try:
        return who("tenant_id", "user_id")
    except AegisConfigError:
        return "nobody"


def held(**names):
    with aegis_scope(**names):
        while True:
            yield asked()


async def aheld(**names):
    with aegis_scope(**names):
        while True:
            yield asked()


def test_a_scope_left_elsewhere_gives_way_to_the_one_around_it():
    with aegis_scope(tenant="acme", task="chat"):
        inner = held(tenant="globex", user="u1")
        assert next(inner) == ("globex", "u1")
        copy_context().run(inner.close)
        assert (current().tenant, current().user, current().task) == ("acme", None, "chat")
        with aegis_scope(user="u2"):
            assert asked() == ("acme", "u2")
    assert current().tenant is None


def test_what_was_entered_over_a_scope_left_elsewhere_keeps_only_its_own():
    def run():
        steps = held(tenant="acme", user="u1")
        next(steps)
        with aegis_scope(tenant="globex"), aegis_scope(task="chat"):
            assert asked() == ("globex", "u1")
            copy_context().run(steps.close)
            assert (current().tenant, current().user, current().task) == ("globex", None, "chat")

    copy_context().run(run)


def test_who_lost_his_scope_is_nobody_until_he_is_named_again():
    def run():
        steps = held(tenant="acme")
        assert next(steps) == ("acme", None)
        copy_context().run(steps.close)
        assert asked() == "nobody"
        with aegis_scope(task="chat"):
            assert asked() == "nobody"
        assert asked() == "nobody"
        with aegis_scope(tenant="globex"):
            assert asked() == ("globex", None)
        with seen_config({"configurable": {"tenant_id": "globex"}}):
            assert asked() == ("globex", None)

    copy_context().run(run)


async def test_a_scope_left_in_the_task_that_copied_it_is_left_there_at_once():
    scope = aegis_scope(tenant="acme")

    async def leave():
        scope.__exit__(None, None, None)
        return current().tenant, asked()

    async def enter():
        scope.__enter__()
        left = await asyncio.create_task(leave())
        return left, asked()

    assert await asyncio.create_task(enter()) == ((None, (None, None)), "nobody")


async def test_a_task_keeps_the_scope_it_was_started_in_while_others_come_and_go():
    go = asyncio.Event()

    async def later():
        with aegis_scope(task="chat"):
            await go.wait()
        return asked()

    one, other = aheld(tenant="acme"), aheld(tenant="globex")
    await anext(one)
    task = asyncio.create_task(later())
    await asyncio.sleep(0)
    await anext(other)
    await one.aclose()
    await other.aclose()
    go.set()
    assert await task == ("acme", None)
    assert asked() == (None, None)


def test_generators_left_in_another_order_than_entered_leave_nothing_behind():
    first, second = held(tenant="acme"), held(tenant="globex")
    next(first)
    next(second)
    first.close()
    assert next(second) == ("globex", None)
    second.close()
    assert asked() == (None, None)


@given(st.lists(st.tuples(st.sampled_from(["open", "read", "close", "lose", "with"]), st.integers(0, 3)), max_size=24))
def test_no_order_of_generators_makes_one_tenants_call_anothers(orders):
    """Each generator asks as its own tenant or as nobody, and so does a `with` around its step; in the end, nobody."""

    def run():
        opened, lost = {}, False
        for order, number in orders:
            if order == "open" and number not in opened:
                opened[number] = held(tenant=f"t{number}")
                assert next(opened[number]) in ((f"t{number}", None), "nobody")
            elif order == "read" and number in opened:
                assert next(opened[number]) in ((f"t{number}", None), "nobody")
            elif order == "with" and number in opened:
                with aegis_scope(tenant="reader"):
                    assert asked() in (("reader", None), "nobody")
                    assert next(opened[number]) in ((f"t{number}", None), "nobody")
            elif order == "close" and number in opened:
                opened.pop(number).close()
            elif order == "lose" and number in opened:
                copy_context().run(opened.pop(number).close)
                lost = True
            if len(opened) == 1:
                assert all(next(one) == (f"t{number}", None) for number, one in opened.items())
            elif not opened:
                assert asked() in ((None, None), "nobody" if lost else None)
        for one in opened.values():
            one.close()
        assert asked() in ((None, None), "nobody" if lost else None)

    copy_context().run(run)


@pytest.mark.parametrize("names", [({"tenant": "a"}, {"tenant": "b"}), ({"user": "a"}, {"user": "b"})])
def test_generators_of_different_tenants_or_users_read_in_turn_are_nobodys(names):
    first, second = (held(**each) for each in names)
    next(first)
    next(second)
    assert next(first) == "nobody"
    with seen_config(None):
        assert asked() == "nobody"
    second.close()
    assert "nobody" not in (asked(), next(first))
    first.close()


def test_generators_of_one_tenant_may_be_read_in_turn():
    both = [held(tenant="acme", task=str(n)) for n in range(2)]
    for _ in range(2):
        assert [next(one) for one in both] == [("acme", None)] * 2
    for one in both:
        one.close()


def test_a_loop_over_a_generator_of_another_tenant_is_not_that_tenants():
    steps = held(tenant="globex")
    with aegis_scope(tenant="acme"):
        assert next(steps) == ("globex", None)
        assert asked() == "nobody"
        steps.close()
        assert asked() == ("acme", None)


async def test_inside_a_generator_its_own_scope_is_known_in_awaited_calls_and_their_tasks():
    async def call():
        await asyncio.sleep(0)
        return asked()

    async def body():
        with aegis_scope(tenant="globex"):
            yield await call()
            with seen_config(None):  # as ChatAegis.ainvoke does, before LangChain makes tasks
                yield await asyncio.create_task(call())

    async with aegis_scope(tenant="acme"):
        async with contextlib.aclosing(body()) as steps:
            assert [step async for step in steps] == [("globex", None)] * 2
        assert asked() == ("acme", None)


@contextlib.contextmanager
def request_of(tenant):
    with aegis_scope(tenant=tenant):
        yield


@contextlib.asynccontextmanager
async def arequest_of(tenant):
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(aegis_scope(tenant=tenant))
        yield


async def test_context_managers_that_hold_a_scope_over_a_yield_nest():
    """As a web framework's dependencies do: they are left in turn."""

    async def task():
        return asked()

    with request_of("acme"):
        assert asked() == ("acme", None)
        async with arequest_of("globex"):
            assert asked() == ("globex", None)
            assert await asyncio.create_task(task()) == ("globex", None)
            with contextlib.ExitStack() as stack:
                stack.enter_context(request_of("initech"))
                assert asked() == ("initech", None)
        assert asked() == ("acme", None)
    assert asked() == (None, None)


def test_a_fixtures_scope_may_be_narrowed_by_what_runs_inside():
    fixture = held(tenant="default")
    next(fixture)
    with aegis_scope(tenant="acme"):
        assert asked() == ("acme", None)
        with aegis_scope(task="chat"):
            assert asked() == ("acme", None)
    assert asked() == ("default", None)
    fixture.close()


def test_one_scope_object_may_be_used_by_several_tasks_at_once():
    scope = aegis_scope(tenant="acme")
    first, second = copy_context(), copy_context()
    first.run(scope.__enter__)
    second.run(scope.__enter__)
    first.run(scope.__exit__, None, None, None)
    assert (first.run(asked), second.run(asked)) == ((None, None), ("acme", None))
    second.run(scope.__exit__, None, None, None)
    assert second.run(asked) == (None, None)


def test_a_wrapped_generator_keeps_the_scopes_it_enters_to_itself():
    def steps():
        yield asked()
        with aegis_scope(tenant="inner"):
            yield asked()
            yield asked()
        yield asked()

    wrapped, seen = aegis_scope(tenant="acme").wrap(steps()), []
    with aegis_scope(tenant="reader"):
        for said in wrapped:
            seen.append(said[0])
            assert asked() == ("reader", None)
    assert seen == ["acme", "inner", "inner", "acme"]


async def test_a_wrapped_generator_may_be_stepped_by_many_tasks():
    wrapped = aegis_scope(tenant="acme").wrap(aheld(tenant="globex"))
    for _ in range(3):
        assert await asyncio.create_task(anext(wrapped)) == ("globex", None)
    await asyncio.create_task(wrapped.aclose())
    assert asked() == (None, None)


def test_what_is_bound_where_it_is_made_does_not_care_about_the_end_of_that_scope():
    def steps():
        while True:
            yield asked()

    def maker():
        with aegis_scope(tenant="acme"):
            yield bound_here(steps())

    def run():
        making = maker()
        bound = next(making)
        copy_context().run(making.close)
        assert next(bound) == ("acme", None)
        assert next(bound_here(steps())) == "nobody"

    copy_context().run(run)
    unbound = steps()
    assert bound_here(unbound) is unbound


def test_what_is_bound_where_nobody_is_known_is_nobodys():
    first, second = held(tenant="acme"), held(tenant="globex")
    next(first)
    next(second)
    bound = aegis_scope.wrap(asked() for _ in range(2))
    named = aegis_scope(tenant="initech").wrap(asked() for _ in range(2))
    second.close()
    first.close()
    assert (next(bound), next(named)) == ("nobody", ("initech", None))


def test_a_scope_keeps_nothing_of_the_code_that_entered_it_alive():
    import gc
    import weakref

    class Thing:
        pass

    def steps():
        thing = Thing()
        alive.append(weakref.ref(thing))
        with aegis_scope(tenant="acme"):
            contexts.append(copy_context())
            yield thing

    alive, contexts = [], []
    one = steps()
    next(one)
    one.close()
    del one
    gc.collect()
    assert alive[0]() is None
