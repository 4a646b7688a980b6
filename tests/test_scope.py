"""Whose call it is follows the call, and nothing else."""

import asyncio
import threading
from contextvars import copy_context

import pytest

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.scope import aegis_scope, aegis_sources, current, seen_config, who


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
            assert current().sources.ids() == {"d1", "d2"}
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


def test_the_scope_wins_over_the_config_of_the_call():
    with seen_config({"configurable": {"tenant_id": "from-config", "user_id": 7}}):
        assert who("tenant_id", "user_id") == ("from-config", "7")
        with aegis_scope(tenant="told"):
            assert who("tenant_id", "user_id") == ("told", "7")
    assert who("tenant_id", "user_id") == (None, None)


def test_an_unusable_tenant_in_a_config_is_an_error_never_another_bucket():
    for bad in ("", "  ", ["a"], True):
        with seen_config({"configurable": {"tenant_id": bad}}), pytest.raises(AegisConfigError):
            who("tenant_id", None)


def test_a_runnable_around_the_call_names_the_tenant():
    from langchain_core.runnables import RunnableLambda

    step = RunnableLambda(lambda _: who("tenant_id", "user_id"))
    assert step.invoke(1, {"configurable": {"tenant_id": "acme"}}) == ("acme", None)
