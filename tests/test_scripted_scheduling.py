"""The scripted server schedules as Ollama 0.33 was seen to: slots, prompt caches, the load queue, reloads, keep_alive.

The figures named here were measured on a real server (one slot, a prompt of 1,005 tokens): 11.09 s at first, 0.054 s
for the same prompt, 0.32 s for the same beginning with another question, 11.4 s for another beginning, 0.21 s for the
first one again, because the host keeps what a slot gives up. `OLLAMA_MAX_QUEUE=2` with 20 requests at once: cold, 3
answers and 17 times 503; warm, 20 answers; warm with every second request asking for another `num_ctx`, some 503.
"""

import asyncio
import itertools

import httpx
import pytest

from langchain_aegis.embedded.scripted_caches import PromptCaches, common
from langchain_aegis.testing import ScriptedOllama

DEADLINE_S = 60
CHAT = "/api/chat"


def context(name):
    return " ".join(f"{name}{n}" for n in range(500))


async def ask(client, text, *, model="scripted", **body):
    options = body.pop("options", {})
    request = {"model": model, "stream": False, "messages": [{"role": "user", "content": text}], **body}
    request["options"] = {"temperature": 0, "num_predict": 2, **options}
    return await client.post(CHAT, json=request, timeout=DEADLINE_S)


class Reading:
    """Counts what each request made the server read."""

    def __init__(self, server, client):
        self.server, self.client, self.before = server, client, 0

    async def __call__(self, text, **body):
        answer = await ask(self.client, text, **body)
        assert answer.status_code == 200
        before, self.before = self.before, self.server.counters.prefilled_tokens
        return self.before - before, answer.json()["prompt_eval_count"]


@pytest.fixture
async def reading(request):
    told = getattr(request, "param", {"slots": 1})
    async with ScriptedOllama(**told) as server, httpx.AsyncClient(base_url=server.base_url) as client:
        yield Reading(server, client)


async def test_what_a_slot_has_read_it_need_not_read_again(reading):
    """11.09 s, 0.054 s, 0.32 s: all of it, next to nothing, the question."""
    first, whole = await reading(f"{context('a')}\nWhat is it?")
    again, counted = await reading(f"{context('a')}\nWhat is it?")
    other, _ = await reading(f"{context('a')}\nWho was that?")
    assert (first, again, counted) == (whole, 1, whole)  # cached tokens are counted as the prompt's
    assert 1 < other < 0.05 * whole


async def test_the_host_brings_back_what_a_slot_gave_up(reading):
    """11.4 s for another beginning, then 0.21 s for the first one."""
    first, whole = await reading(f"{context('a')} one")
    other, _ = await reading(f"{context('b')} two")
    back, _ = await reading(f"{context('a')} three")
    assert other > 0.9 * first
    assert back < 0.05 * whole


@pytest.mark.parametrize("reading", [{"slots": 1, "host_cache": False}], indirect=True)
async def test_without_the_hosts_cache_it_is_read_anew(reading):
    await reading(f"{context('a')} one")
    await reading(f"{context('b')} two")
    back, whole = await reading(f"{context('a')} three")
    assert back > 0.9 * whole


async def test_a_change_at_the_front_costs_everything(reading):
    """14.97 s after one changed character."""
    await reading(f"{context('a')} one")
    changed, whole = await reading(f"X{context('a')} one")
    assert changed > 0.9 * whole


@pytest.mark.parametrize("reading", [{"slots": 4, "host_cache": False}], indirect=True)
async def test_each_slot_keeps_a_beginning_and_the_one_that_fits_is_taken(reading):
    for name in "abcd":
        await reading(f"{context(name)} one")
    costs = [await reading(f"{context(name)} two") for name in "dbca"]
    assert all(cost < 0.05 * whole for cost, whole in costs)
    cost, whole = await reading(f"{context('e')} one")  # takes the slot that was not used for longest: d's
    assert cost > 0.9 * whole
    assert [(await reading(f"{context(name)} three"))[0] < 0.05 * whole for name in "bcad"] == [True, True, True, False]


def test_a_slot_that_shares_less_than_a_tenth_is_no_better_than_the_oldest():
    caches = PromptCaches(2, host_tokens=0)
    for text in (list("abcdefghij" * 10), list("zzzzz" * 20)):
        caches.take(text)
        caches.give(text)
    assert caches.take(list("zzz") + list("x" * 97)) == 0
    assert caches.take(list("z" * 100)) == 100


def test_the_hosts_cache_is_bounded():
    caches = PromptCaches(1, host_tokens=250)
    for name in "abcdef":
        text = list(name * 100)
        assert caches.take(text) == 0
        caches.give(text)
    assert caches.take(list("a" * 100)) == 0
    caches.give([])
    assert caches.take(list("f" * 100)) == 100


@pytest.mark.parametrize(
    ("left", "right", "shared"), [("", "abc", 0), ("abc", "abd", 2), ("abc", "abc", 3), ("xbc", "abc", 0)]
)
def test_what_two_texts_share(left, right, shared):
    assert common(list(left), list(right)) == shared


# -- loading


async def test_other_runner_options_load_the_model_anew_and_its_caches_are_gone(reading):
    """num_ctx, num_batch, num_thread, num_gpu, use_mmap and shift do; sampling, num_keep, format, keep_alive do not."""
    await reading(f"{context('a')} one")
    for body in (
        {"options": {"temperature": 1}}, {"options": {"top_k": 3, "num_keep": 8}}, {"format": "json"},
        {"keep_alive": "10m"}, {"truncate": True}, {"logprobs": True},
    ):  # fmt: skip
        cost, whole = await reading(f"{context('a')} {body}", **body)
        assert cost < 0.1 * whole
    assert reading.server.counters.reloads == 0
    changes = ({"num_ctx": 2048}, {"num_ctx": 4096}, {"num_batch": 64}, {"num_thread": 2}, {"num_gpu": 0})
    told = {}
    for at, change in enumerate(changes, 1):
        told |= change
        cost, whole = await reading(f"{context('a')} {at}", options=told)
        assert reading.server.counters.reloads == at
        assert cost > 0.9 * whole
    await reading("hello", options=told, shift=False)
    assert reading.server.counters.reloads == len(changes) + 1


async def test_the_default_window_named_is_no_change(reading):
    await reading("hello")
    await reading("hello", options={"num_ctx": 4096})
    assert reading.server.counters.loads == 1


async def many(server, requests):
    """Send all at once to a server with `load_s`; returns the statuses."""
    async with httpx.AsyncClient(base_url=server.base_url, limits=httpx.Limits(max_connections=None)) as client:
        return sorted(
            [answer.status_code for answer in await asyncio.gather(*(request(client) for request in requests))]
        )


async def test_a_cold_model_takes_three_and_refuses_the_others():
    async with ScriptedOllama(slots=1, max_queue=2, load_s=0.3) as server:
        statuses = await many(server, [lambda client, n=n: ask(client, f"question {n}") for n in range(20)])
        assert statuses == [200] * 3 + [503] * 17
        assert server.counters.loads == 1


async def test_a_warm_model_refuses_nobody():
    async with ScriptedOllama(slots=1, max_queue=2) as server, httpx.AsyncClient(base_url=server.base_url) as client:
        await ask(client, "warm")
        assert await many(server, [lambda client, n=n: ask(client, f"question {n}") for n in range(20)]) == [200] * 20


async def test_a_warm_model_asked_for_two_windows_refuses_some():
    async with ScriptedOllama(slots=1, max_queue=2, load_s=0.2) as server:
        async with httpx.AsyncClient(base_url=server.base_url) as client:
            await ask(client, "warm")
        windows = [{"num_ctx": 2048} if n % 2 else {} for n in range(20)]
        requests = [lambda client, o=o: ask(client, "question", options=o) for o in windows]
        statuses = await many(server, requests)
        assert 10 <= statuses.count(200) < 20
        assert set(statuses) == {200, 503}


async def test_a_reload_waits_for_those_who_use_the_runner_and_fitting_requests_pass_it():
    async with ScriptedOllama(slots=4) as server, httpx.AsyncClient(base_url=server.base_url) as client:
        await ask(client, "warm")
        with server.hold():
            running = asyncio.create_task(ask(client, "first"))
            await server.await_until(lambda seen: seen.waiting == 1)
            other = asyncio.create_task(ask(client, "other window", options={"num_ctx": 2048}))
            await server.await_until(lambda seen: len(seen.chats) == 3)
            passing = asyncio.create_task(ask(client, "fits"))
            await server.await_until(lambda seen: seen.waiting == 2)
            assert server.counters.reloads == 0
        async with asyncio.timeout(DEADLINE_S):
            assert [(await task).status_code for task in (running, passing, other)] == [200] * 3
        assert server.counters.reloads == 1


async def test_room_for_one_model_means_that_the_second_evicts_the_first():
    async with (
        ScriptedOllama(["a", "b"], max_loaded=1) as server,
        httpx.AsyncClient(base_url=server.base_url) as client,
    ):
        for model in "abab":
            assert (await ask(client, "hello", model=model)).status_code == 200
        assert server.counters.loads == 4
        loaded = (await client.get("/api/ps")).json()["models"]
        assert [each["name"] for each in loaded] == ["b:latest"]


async def test_a_model_is_unloaded_when_its_time_is_over_and_a_request_prolongs_it():
    """keep_alive of a request stays; 5 minutes are the default."""
    async with ScriptedOllama() as server, httpx.AsyncClient(base_url=server.base_url) as client:

        async def loaded():
            return [each["name"] for each in (await client.get("/api/ps")).json()["models"]]

        await ask(client, "hello")
        server.advance(290)
        assert await loaded()
        await ask(client, "hello", keep_alive="30m")
        server.advance(1_000)
        assert await loaded()
        await ask(client, "hello")
        server.advance(1_700)
        assert await loaded()
        server.advance(200)
        assert not await loaded()
        await ask(client, "hello")
        assert (server.counters.loads, server.counters.reloads) == (2, 0)


async def test_an_embedding_model_has_one_slot_and_each_model_its_own():
    async with ScriptedOllama(slots=3) as server, httpx.AsyncClient(base_url=server.base_url) as client:
        body = {"model": "scripted-embed", "input": "x"}
        with server.hold():
            calls = [asyncio.create_task(client.post("/api/embed", json=body)) for _ in range(4)]
            calls += [asyncio.create_task(ask(client, f"question {n}")) for n in range(4)]
            await server.await_until(lambda seen: seen.waiting == 8)
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*calls)
        assert server.counters.max_running <= 4
        assert server.counters.requests_embedded == 4


@pytest.mark.slow
async def test_a_client_that_leaves_is_counted_and_its_slot_is_free():
    async with (
        ScriptedOllama(slots=1, words=5_000, tokens_per_s=500) as server,
        httpx.AsyncClient(base_url=server.base_url) as client,
    ):
        call = asyncio.create_task(ask(client, "tell me all", options={"num_predict": 5_000}))
        await server.await_until(lambda seen: seen.counters.generated_tokens > 3)
        call.cancel()
        await server.await_until(lambda seen: seen.disconnects == 1 and seen.running == 0)


def test_reading_reloading_and_requests_take_the_time_that_was_asked_for():
    """Ratios of the server's own clock: reading 500 tokens, a reload, a fixed cost."""
    with (
        ScriptedOllama(slots=1, prefill_tokens_per_s=5_000, load_s=0.2, request_s=0.01) as server,
        httpx.Client(base_url=server.base_url, timeout=DEADLINE_S) as client,
    ):

        def took(text, **options):
            body = {
                "model": "scripted", "stream": False, "messages": [{"role": "user", "content": text}],
                "options": {"num_predict": 1, **options},
            }  # fmt: skip
            told = client.post(CHAT, json=body).json()
            return told["prompt_eval_duration"] / 1e9, told.get("load_duration", 0) / 1e9

        (cold, load), (warm, none) = took(context("a")), took(context("a"))
        _, reload = took(context("a"), num_ctx=2048)
    assert cold > 4 * warm
    assert min(load, reload) > 10 * none
    assert all(one <= other for one, other in itertools.pairwise([0.2, load]))
