"""A model that its server has in another version since does not go on answering with what the old one said."""

import asyncio
import contextlib
import threading
import uuid

import pytest
from caches import Words
from conftest import wait_until
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessageChunk
from langchain_ollama import OllamaEmbeddings

from langchain_aegis import (
    AegisEmbeddings,
    AegisRouter,
    AegisSemanticCache,
    BatchingChatModel,
    BatchingEmbeddings,
    ChatAegis,
    digests,
    engine,
    was_cached,
)
from langchain_aegis.attempts import Timeouts
from langchain_aegis.digests import asked_for
from langchain_aegis.embedded.scripted import ScriptedModel
from langchain_aegis.errors import AegisServerError
from langchain_aegis.flows import run
from langchain_aegis.testing import ScriptedOllama
from langchain_aegis.timestamps import unix_s
from langchain_aegis.writes import the_writer

OLD, NEW = "a" * 64, "b" * 64
NEAR = "How long may I keep a book at home?"
ASKED = "How long may I keep a book at home, please?"


@pytest.fixture
def patient(monkeypatch):
    """On a busy machine a server may take longer to say what it has."""
    monkeypatch.setattr(digests, "_BUDGET_S", 10.0)
    monkeypatch.setattr(digests, "_TIMEOUTS", Timeouts())


@pytest.fixture
def server(patient):
    with ScriptedOllama(ScriptedModel(name="m", digest=OLD)) as server:
        yield server


@pytest.fixture
def make_cache(redis_url):
    namespace = f"d{uuid.uuid4().hex[:8]}"
    with contextlib.ExitStack() as stack:
        stack.callback(set_llm_cache, None)

        def make(**more):
            told = {
                "redis_url": redis_url,
                "embeddings": Words(),
                "min_similarity": 0.8,
                "namespace": namespace,
                "op_budget_s": 10,  # slow machines shall not make hits misses
                "embed_budget_s": 30,
                **more,
            }
            return stack.enter_context(AegisSemanticCache(**told))

        yield make


@pytest.fixture
def later(monkeypatch):
    """Lets the time pass after which a server is asked again."""
    now = [1000.0]
    monkeypatch.setattr(digests, "clock", lambda: now[0])

    def later(seconds=digests.FRESH_S):
        now[0] += seconds

    return later


def plain(server, cache=None):
    return ChatAegis("m", base_url=server.base_url, cache=cache)


def batched(server):
    return BatchingChatModel(plain(server))


def routed(server):
    return AegisRouter({"faq": plain(server)}, default="faq")


def by_messages(server):
    """Which of its models is asked depends on the messages."""
    one, other = (ChatAegis("m", base_url=server.base_url, num_predict=n) for n in (64, 65))
    return AegisRouter({"one": one, "other": other}, default="one", task=lambda messages: "other")


KINDS = pytest.mark.parametrize("make_model", [plain, batched, routed, by_messages])


async def _streamed(model, text):
    whole = AIMessageChunk("")
    async for chunk in model.astream(text):
        whole += chunk
    return whole


WAYS = {
    "invoke": lambda model, text: model.invoke(text),
    "ainvoke": lambda model, text: asyncio.run(model.ainvoke(text)),
    "stream": lambda model, text: sum(model.stream(text), AIMessageChunk("")),
    "astream": lambda model, text: asyncio.run(_streamed(model, text)),
    "batch": lambda model, text: model.batch([text])[0],
    "abatch": lambda model, text: asyncio.run(model.abatch([text]))[0],
}
ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def ask(request):
    def ask(model, text=ASKED, way="invoke"):
        message = WAYS[way](model, text)
        assert the_writer.drain(timeout_s=10)
        return message

    return ask


@pytest.mark.row(86)
@ways
@KINDS
def test_what_a_model_said_before_it_was_pulled_anew_is_not_served(server, make_cache, make_model, way, ask, later):
    set_llm_cache(make_cache())
    model = make_model(server)
    ask(model, way=way)
    assert len(server.chats) == 1
    ask(model, way=way)
    assert len(server.chats) == 1, "a repeat is a hit"
    server.put(ScriptedModel(name="m", digest=NEW))
    later()
    ask(model, way=way)
    assert len(server.chats) == 2, "the old version's answer is outdated"
    ask(model, way=way)
    assert len(server.chats) == 2, "the new version's is not"


@pytest.mark.row(86)
@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
def test_nor_is_it_served_for_its_meaning(server, make_cache, way, ask, later):
    seen = []
    model = plain(server, make_cache(on_lookup=seen.append))
    ask(model, NEAR, way)
    assert was_cached(ask(model, ASKED, way))["tier"] == "semantic"
    server.put(ScriptedModel(name="m", digest=NEW))
    later()
    assert was_cached(ask(model, ASKED, way)) is None
    assert seen[-1].reasons == ("model_changed",)


@pytest.mark.row(86)
@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream"])
def test_a_process_that_starts_after_the_pull_serves_nothing_older(server, make_cache, way, ask):
    ask(plain(server, make_cache()))
    server.put(ScriptedModel(name="m", digest=NEW))
    with ScriptedOllama(ScriptedModel(name="m", digest=NEW)) as fresh:  # as nobody here has asked it
        ask(plain(fresh, make_cache()), way=way)
        assert len(fresh.chats) == 1


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream"])
def test_what_an_unknown_version_says_while_it_is_replaced_is_not_kept(server, make_cache, way, ask):
    """Nobody knows whose the answer is: the server was never asked before."""
    cache = make_cache()
    model = plain(server, cache)
    with server.hold():
        asking = threading.Thread(target=WAYS[way], args=(model, ASKED))
        asking.start()
        server.wait_until(lambda s: len(s.chats) == 1)
        server.put(ScriptedModel(name="m", digest=NEW))
    asking.join(10)
    assert the_writer.drain(timeout_s=10)
    assert cache.stats().not_stored == {"model_changed": 1}
    assert was_cached(ask(model, way=way)) is None
    assert was_cached(ask(model, way=way))["tier"] == "exact"


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
def test_what_nobody_said_who_made_is_served_until_somebody_says_something(server, make_cache, way, ask, later):
    model = plain(server, make_cache())
    server.fail(500, times=None, path="/api/tags")
    ask(model, way=way)
    assert was_cached(ask(model, way=way))["tier"] == "exact"
    server.heal()
    later(60)
    assert was_cached(ask(model, way=way)) is None
    assert was_cached(ask(model, way=way))["tier"] == "exact"


def test_before_an_answer_was_kept_nothing_is_asked(server, make_cache, ask):
    """A server that fails gets the model's own request, and no other one."""
    server.fail(500, times=None, path="/api/chat")
    model = plain(server, make_cache())
    for _ in range(2):
        with pytest.raises(AegisServerError):
            ask(model)
    assert "/api/tags" not in server.routes


@pytest.mark.parametrize("timestamp", ["2026-01-02T03:04:05.123456789Z", "2026-01-02T04:04:05.1+01:00"])
def test_timestamps_of_ollama_are_read(timestamp):
    assert 0 < unix_s(timestamp) - 1_767_323_045 < 1


@pytest.mark.parametrize("nothing", [None, "", 5, "yesterday", "9999-99-99T00:00:00Z"])
def test_others_are_none(nothing):
    assert unix_s(nothing) is None


def test_the_same_version_on_another_server_shares_answers(server, make_cache, ask):
    ask(plain(server, make_cache()))
    with ScriptedOllama(ScriptedModel(name="m", digest=OLD)) as twin:
        assert was_cached(ask(plain(twin, make_cache())))["tier"] == "exact"


def test_old_answers_come_back_with_the_old_version(server, make_cache, ask, later):
    model = plain(server, make_cache())
    ask(model)
    server.put(ScriptedModel(name="m", digest=NEW))
    later()
    ask(model, "What is a loan?")
    server.put(ScriptedModel(name="m", digest=OLD))
    later()
    assert was_cached(ask(model))["tier"] == "exact"


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
def test_a_pull_of_this_process_is_known_at_once(server, make_cache, way, ask, later):
    model = plain(server, make_cache())
    ask(model, way=way)
    server.put(ScriptedModel(name="m", digest=NEW))
    client = model._endpoint.client()
    list(client.pull("m"))
    ask(model, way=way)
    assert len(server.chats) == 2


def test_a_pull_while_the_server_is_asked_is_known_too(server):
    client = ChatAegis("m", base_url=server.base_url)._endpoint.client()
    flow = client.models.learn(client)
    step = next(flow)
    with client.models.changing():
        pass
    with pytest.raises(StopIteration):
        flow.send(step.perform())
    assert not client.models.fresh


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
def test_the_server_is_asked_once_in_five_seconds_whoever_asks(server, make_cache, way, ask, later):
    cache = make_cache()
    for n in range(5):
        ask(plain(server, cache), way=way)
        ask(ChatAegis("m", base_url=server.base_url, temperature=0, cache=cache), f"Question {n}?", way)
    assert server.routes["/api/tags"] == 1
    later()
    ask(plain(server, cache), way=way)
    assert server.routes["/api/tags"] == 2


def test_without_this_cache_nothing_is_asked(server, ask):
    for cache in (None, False, InMemoryCache()):
        ask(plain(server, cache))
    assert "/api/tags" not in server.routes


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
def test_many_that_begin_at_once_ask_once_and_all_wait_for_it(server, make_cache, way, ask, monkeypatch):
    """Whoever did not wait would be served what is outdated."""
    ask(plain(server, make_cache()))
    with ScriptedOllama(ScriptedModel(name="m", digest=NEW)) as fresh:
        served, many, told = [], 8, []
        cache = make_cache(on_lookup=lambda found: served.append(found.record and found.record.digest))
        client = plain(fresh, cache)._endpoint.client()

        def one():
            told.append(WAYS[way](plain(fresh, cache), ASKED))

        asked, go = threading.Event(), threading.Event()
        tags, atags = client.tags, client.atags

        def slow(**how):
            asked.set()
            assert go.wait(10)
            return tags(**how)

        async def aslow(**how):
            asked.set()
            assert await asyncio.to_thread(go.wait, 10)
            return await atags(**how)

        monkeypatch.setattr(client, "tags", slow)
        monkeypatch.setattr(client, "atags", aslow)
        threads = [threading.Thread(target=one) for _ in range(many)]
        for thread in threads:
            thread.start()
        assert asked.wait(10)
        assert wait_until(lambda: client.models._asking is not None)
        assert not told
        go.set()
        for thread in threads:
            thread.join(10)
        assert fresh.routes["/api/tags"] == 1
        assert len(told) == many
        assert set(served) <= {None, NEW[:12]}, "some may be served what another of them was answered"


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
def test_a_server_that_does_not_say_costs_no_hit(server, make_cache, way, ask, later):
    """What it said last counts; before it has said anything, nothing is known to have changed."""
    model = plain(server, make_cache())
    ask(model, way=way)
    server.fail(500, times=None, path="/api/tags")
    later()
    assert was_cached(ask(model, way=way))["tier"] == "exact"
    later()
    assert was_cached(ask(model, way=way))["tier"] == "exact"
    assert server.routes["/api/tags"] == 2, "one that failed is left alone for longer"
    with ScriptedOllama(ScriptedModel(name="m", digest=NEW)) as silent:
        silent.fail(500, times=None, path="/api/tags")
        assert was_cached(ask(plain(silent, make_cache()), way=way))["tier"] == "exact"


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
def test_a_server_that_hangs_costs_a_quarter_of_a_second_once(server, make_cache, way, ask, monkeypatch):
    ask(plain(server, make_cache()))
    monkeypatch.setattr(digests, "_BUDGET_S", 0.25)
    monkeypatch.setattr(digests, "_TIMEOUTS", Timeouts(deadline_s=0.25))
    with ScriptedOllama(ScriptedModel(name="m", digest=OLD)) as hung, hung.hold():
        cache = make_cache()
        for _ in range(3):
            assert was_cached(ask(plain(hung, cache), way=way))["tier"] == "exact"
        assert hung.routes["/api/tags"] <= 1


def test_whoever_gives_up_waiting_ends_it_for_nobody_else(server):
    client = ChatAegis("m", base_url=server.base_url)._endpoint.client()
    asking, waiting = client.models.learn(client), client.models.learn(client)
    step, settle = next(asking), next(waiting)

    async def give_up():
        asyncio.wrap_future(settle.done).cancel()

    asyncio.run(give_up())
    with pytest.raises(StopIteration):
        asking.send(step.perform())
    assert client.models.digest("m") == OLD[:12]
    assert settle.done.result(0) is None


def test_whoever_is_cancelled_while_he_asks_holds_up_nobody(server, make_cache, later):
    """The next one asks himself."""
    client = ChatAegis("m", base_url=server.base_url)._endpoint.client()
    flow = client.models.learn(client)
    next(flow)
    flow.close()
    assert client.models._asking is None
    later(100)
    flow = client.models.learn(client)
    with pytest.raises(StopIteration):
        flow.send(next(flow).perform())
    assert client.models.digest("m") == OLD[:12]


def test_calls_before_and_after_the_pull_do_not_share_one_answer(server, make_cache, later):
    """The answer that is under way is the old version's, and would be kept as the new one's."""
    set_llm_cache(make_cache())
    model = batched(server)
    with server.hold():
        first = threading.Thread(target=model.invoke, args=(ASKED,))
        first.start()
        server.wait_until(lambda s: len(s.chats) == 1)
        server.put(ScriptedModel(name="m", digest=NEW))
        model.inner._endpoint.client().models._told = {"m:latest": (NEW, 0.0)}
        second = threading.Thread(target=model.invoke, args=(ASKED,))
        second.start()
        server.wait_until(lambda s: len(s.chats) == 2)
    for thread in (first, second):
        thread.join(10)


def test_several_servers_are_asked_all_and_together_have_one_version(make_cache, ask, later):
    with (
        ScriptedOllama(ScriptedModel(name="m", digest=OLD)) as one,
        ScriptedOllama(ScriptedModel(name="m", digest=OLD)) as other,
    ):
        model = ChatAegis("m", base_url=[one.base_url, other.base_url], cache=make_cache())
        ask(model)
        assert was_cached(ask(model))["tier"] == "exact"
        one.put(ScriptedModel(name="m", digest=NEW))
        later()
        assert was_cached(ask(model)) is None, "either version may have answered"
        assert was_cached(ask(model))["tier"] == "exact"
        other.put(ScriptedModel(name="m", digest=NEW))
        later()
        assert was_cached(ask(model)) is None
        assert was_cached(ask(model))["tier"] == "exact"


@pytest.mark.parametrize(("digest", "served"), [(OLD, True), (NEW, False)])
@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
def test_a_stale_answer_stands_in_for_its_own_version_only(
    server, make_cache, ask, later, monkeypatch, digest, served, way
):
    model = plain(server, make_cache(ttl_s=60, stale_if_error_s=1000))
    ask(model, way=way)
    now_ms = engine.now_ms
    monkeypatch.setattr(engine, "now_ms", lambda: now_ms() + 61_000)
    server.put(ScriptedModel(name="m", digest=digest))
    later()
    server.fail(500, times=None, path="/api/chat")
    if served:
        assert was_cached(ask(model, way=way))["stale"] is True
    else:
        with pytest.raises(AegisServerError):
            ask(model, way=way)


def test_a_router_stands_for_all_models_that_it_may_call(server, later):
    """Of a call that is not known yet, the cache is told about all of them."""
    with ScriptedOllama(ScriptedModel(name="m", digest=NEW)) as other:
        models = {"one": plain(server), "two": plain(other)}
        text = AegisRouter(models, default="one", task=lambda messages: "two")._get_llm_string()
        asked = asked_for(text)
        assert not asked.look()
        run(asked.ascertain(), lambda step: step.perform())
        assert asked.digest == f"{OLD[:12]},{NEW[:12]}"
        models["one"]._get_llm_string()
        assert asked_for(text).look(), "now another model was spoken of last"
        assert asked_for(text).digest == ""


def test_explain_says_that_the_model_has_changed(server, make_cache, ask, later):
    cache = make_cache()
    model = plain(server, cache)
    ask(model)
    server.put(ScriptedModel(name="m", digest=NEW))
    later()
    told = cache.explain(prompt=ASKED, model=model)
    assert (told.decision, told.reasons) == ("miss", ("model_changed",))


# -- the model that makes the semantic tier's vectors ----------------------------------------------------------------


@pytest.fixture
def embeds(patient):
    """A server of its own for the embedding model, so that it can be counted what it is asked."""
    with ScriptedOllama(ScriptedModel(name="bge", embedding=True, digest=OLD)) as server:
        yield server
    while _peers:
        _peers.pop()._client._client.close()  # nobody else does


_peers: list[OllamaEmbeddings] = []


def own(server):
    return AegisEmbeddings("bge", base_url=server.base_url)


def peers(server):
    _peers.append(OllamaEmbeddings(model="bge", base_url=f"{server.base_url}/"))
    return _peers[-1]


def wrapped(server):
    return BatchingEmbeddings(own(server))


# One of langchain-ollama's belongs to its first event loop; here each call has a loop of its own.
EMBEDDERS = pytest.mark.parametrize(
    ("make_embedder", "way"),
    [(own, "invoke"), (own, "ainvoke"), (peers, "invoke"), (wrapped, "invoke"), (wrapped, "ainvoke")],
)


def again(text, times):
    """The same question, as another text: its vector is the same."""
    return text + "?" * times


@EMBEDDERS
def test_vectors_of_an_embedding_model_are_not_compared_with_those_of_before_it_was_pulled_anew(
    server, embeds, make_cache, make_embedder, way, ask, later
):
    seen = []
    model = plain(server, make_cache(embeddings=make_embedder(embeds), repeats="serve", on_lookup=seen.append))
    ask(model, NEAR, way)
    assert was_cached(ask(model, again(NEAR, 1), way))["tier"] == "semantic"
    embeds.put(ScriptedModel(name="bge", embedding=True, digest=NEW))
    later()
    assert was_cached(ask(model, again(NEAR, 2), way)) is None
    assert seen[-1].reasons == ("model_changed",), "which of the two has made the vector?"
    assert was_cached(ask(model, again(NEAR, 3), way)) is None
    assert (seen[-1].reasons, seen[-1].candidates) == (("no_candidate",), ())
    assert was_cached(ask(model, again(NEAR, 4), way))["tier"] == "semantic", "the new one's are"
    assert was_cached(ask(model, NEAR, way))["tier"] == "exact", "and no vector is needed for a repeat"


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
def test_another_process_with_the_same_embedding_model_finds_the_vectors(server, embeds, make_cache, way, ask):
    ask(plain(server, make_cache(embeddings=own(embeds), repeats="serve")), NEAR, way)
    other = plain(server, make_cache(embeddings=wrapped(embeds), repeats="serve"))
    assert was_cached(ask(other, again(NEAR, 1), way))["tier"] == "semantic"


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
def test_an_embedding_model_whose_version_nobody_tells_is_used_as_ever(server, embeds, make_cache, way, ask, later):
    embeds.fail(500, times=None, path="/api/tags")
    model = plain(server, make_cache(embeddings=own(embeds), repeats="serve"))
    ask(model, NEAR, way)
    for n in (1, 2):
        later()
        assert was_cached(ask(model, again(NEAR, n), way))["tier"] == "semantic"


def test_whoever_embeds_is_asked_for_versions_no_more_often_than_others(server, embeds, make_cache, ask, later):
    model = plain(server, make_cache(embeddings=own(embeds), repeats="serve"))
    for n in range(4):
        ask(model, again(NEAR, n))
    assert embeds.routes["/api/tags"] == 1
    later()
    ask(model, again(NEAR, 5))
    assert embeds.routes["/api/tags"] == 2


def test_what_is_near_is_removed_by_the_vectors_of_today(server, embeds, make_cache, ask):
    cache = make_cache(embeddings=own(embeds), repeats="serve", keep_questions=True)
    model = plain(server, cache)
    ask(model, NEAR)
    assert cache.invalidate(near=NEAR) == 1
    assert was_cached(ask(model, NEAR)) is None
