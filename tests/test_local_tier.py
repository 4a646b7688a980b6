"""The local tier: what it answers is what Redis would have answered, and it holds nothing that something took away."""

import threading
import tracemalloc
import uuid
from contextvars import copy_context

import pytest
import redis
from caches import MODEL, chat, prompt
from conftest import running_redis, wait_until
from redis.exceptions import TimeoutError as RedisTimeoutError
from tiers import BOOK, CARD, MANY, asked, has_heard, hits, is_held, taught, tier_of

from langchain_aegis import AegisSemanticCache, AegisSettings, aegis_scope, engine, was_cached
from langchain_aegis.connections import Connections
from langchain_aegis.errors import AegisConfigError, AegisConnectionError
from langchain_aegis.links import AsyncLinks, Links
from langchain_aegis.local_tier import LocalTier
from langchain_aegis.pushes import ALIVE_S, clock
from langchain_aegis.sweeper import Sweeper
from langchain_aegis.writes import the_writer

WHOSE = {"tenant": "acme", "user": "ann", "task": "faq"}


@pytest.fixture
def pair(make_cache):
    """A cache with a local tier, and one that stands for another process; both know an answer of WHOSE."""
    namespace = f"l{uuid.uuid4().hex[:8]}"
    reader = make_cache(namespace=namespace, local_tier_bytes=MANY)
    other = make_cache(namespace=namespace)
    with aegis_scope(**WHOSE):
        with aegis_scope(sources=["loans.md"]):
            taught(other, "28 days")
        assert is_held(reader) == "28 days"
        yield reader, other


def named(driver, question=BOOK):
    """The name of a question's record in Redis."""
    engine = getattr(driver, "cache", driver)._engine
    key = engine._locate(question, MODEL, engine.caller())
    return engine.store._entry(key.exact)


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url, protocol=2) as client:
        yield client


# -- what it answers --------------------------------------------------------------------------------------------------


def test_a_repeat_asks_redis_nothing(pair, monkeypatch):
    reader, _ = pair
    name, sent = named(reader).encode(), []
    ask, aask = Links.ask, AsyncLinks.ask

    def counting(links, request, *how, **most):
        sent.append(name in request)
        return ask(links, request, *how, **most)

    async def acounting(links, request, *how, **most):
        sent.append(name in request)
        return await aask(links, request, *how, **most)

    monkeypatch.setattr(Links, "ask", counting)
    monkeypatch.setattr(AsyncLinks, "ask", acounting)
    counted, before = reader.cache.stats().exact_hits, hits(reader)
    for _ in range(200):
        assert asked(reader) == "28 days"
    local = hits(reader) - before
    assert 0 < local <= 200
    assert sent.count(True) == 200 - local, "it is asked only where something has come that may be news"
    assert reader.cache.stats().exact_hits == counted + 200


def test_each_answer_is_a_message_of_its_own_with_the_marks_of_any_hit(pair):
    reader, other = pair
    (one,), (two,) = reader.lookup(BOOK, MODEL), reader.lookup(BOOK, MODEL)
    (plain,) = other.lookup(BOOK, MODEL)
    assert one.message is not two.message
    assert len({one.message.id, two.message.id, plain.message.id}) == 3
    one.message.content = "changed"
    one.message.response_metadata["done_reason"] = "changed"
    assert asked(reader) == "28 days"
    assert was_cached(two.message).keys() == was_cached(plain.message).keys()
    assert was_cached(two.message)["tier"] == "exact"
    assert two.message.response_metadata["done_reason"] == "stop"
    assert other.report_wrong(was_cached(two.message)["lookup_id"]) is True


def test_a_pipeline_is_answered_from_it_too(pair):
    reader, other = pair
    made = []

    def ask(driver):
        async def agenerate():
            made.append(1)
            return "28 days"

        def generate():
            made.append(1)
            return "28 days"

        return driver.get_or_generate("How long?", agenerate if driver.awaited else generate, pipeline="p")

    assert ask(other) == "28 days"
    assert the_writer.drain(timeout_s=10)
    before = hits(reader)
    assert wait_until(lambda: ask(reader) == "28 days" and hits(reader) > before)
    assert len(made) == 1
    other.invalidate(model="pipeline:p")
    has_heard(reader)
    ask(reader)
    assert len(made) == 2


def test_another_tenant_or_user_never_gets_what_is_held(pair):
    reader, _ = pair
    for whose in ({"tenant": "globex", "user": "ann"}, {"tenant": "acme", "user": "bob"}):
        with aegis_scope(task="faq", **whose):
            before = hits(reader)
            assert asked(reader) is None
            assert hits(reader) == before
    assert is_held(reader) == "28 days"


def test_replies_answer_their_own_request_alone(pair):
    """Of one record, asked for by somebody of whom other invalidations count, nothing is known."""
    reader, _ = pair
    tier, engine = tier_of(reader), reader.cache._engine
    key = engine._locate(BOOK, MODEL, engine.caller())
    request = engine.store.request(key.exact, key.things, key.tenant, key.user)
    assert wait_until(lambda: tier.get(request))
    assert tier.get(engine.store.request(key.exact, key.things[:-1], key.tenant, key.user)) is None
    assert tier.get(engine.store.request(key.exact, key.things, None, key.user)) is None
    assert tier.get(engine.store.request(key.exact, key.things, key.tenant, None)) is None


def test_without_the_option_there_is_no_tier_and_no_thread(make_cache):
    driver = make_cache()
    taught(driver, "28 days")
    assert asked(driver) == "28 days"
    assert type(driver.cache._connections) is Connections
    assert driver.cache.stats().local is None


def test_the_environment_may_say_how_much_it_holds(monkeypatch):
    monkeypatch.setenv("AEGIS_LOCAL_TIER_BYTES", "4096")
    assert AegisSettings.from_env().local_tier_bytes == 4096
    assert AegisSemanticCache().settings.local_tier_bytes == 4096
    assert AegisSemanticCache(local_tier_bytes=0).settings.local_tier_bytes == 0
    for wrong in (-1, 1.5, "1", True):
        with pytest.raises(AegisConfigError, match="local_tier_bytes"):
            AegisSemanticCache(local_tier_bytes=wrong)


# -- what takes it away -----------------------------------------------------------------------------------------------


def _report(cache):
    (hit,) = cache.lookup(BOOK, MODEL)
    assert cache.report_wrong(hit.message) is True


INVALIDATIONS = {
    "sources": lambda cache: cache.invalidate(sources=["loans.md"]),
    "tenant": lambda cache: cache.invalidate(tenant="acme"),
    "user": lambda cache: cache.invalidate(user="ann"),
    "task": lambda cache: cache.invalidate(task="faq"),
    "model": lambda cache: cache.invalidate(model="m"),
    "tenant and source": lambda cache: cache.invalidate(tenant="acme", sources=["loans.md"]),
    "age": lambda cache: cache.invalidate(older_than_s=0),
    "near": lambda cache: cache.invalidate(near="How long can I keep a book?"),
    "clear": lambda cache: cache.clear(),
    "report": _report,
    "opt-out": lambda cache: cache.opt_out("ann"),
}
ways = pytest.mark.parametrize("way", INVALIDATIONS)


@ways
def test_what_is_invalidated_elsewhere_is_not_served_once_that_is_heard(pair, way, monkeypatch):
    reader, other = pair
    monkeypatch.setattr(Sweeper, "wake", lambda *_: None)  # when it unlinks the record, that is heard, too
    INVALIDATIONS[way](other)
    has_heard(reader)
    assert asked(reader) is None


@ways
def test_what_this_cache_invalidates_is_not_served_from_then_on(pair, way):
    reader, _ = pair
    INVALIDATIONS[way](reader)
    assert asked(reader) is None


def test_an_invalidation_that_fails_takes_away_what_it_may_have_concerned(pair, monkeypatch):
    """It may have been done although its answer did not come."""
    reader, _ = pair
    ask, aask = Links.ask, AsyncLinks.ask

    def failing(links, request, *how, **most):
        assert ask(links, request, *how, **most)
        raise RedisTimeoutError("late")

    async def afailing(links, request, *how, **most):
        assert await aask(links, request, *how, **most)
        raise RedisTimeoutError("late")

    with monkeypatch.context() as patch:
        patch.setattr(Links, "ask", failing)
        patch.setattr(AsyncLinks, "ask", afailing)
        with pytest.raises(AegisConnectionError):
            reader.opt_out("ann")
    assert tier_of(reader).stats().entries == 0
    assert asked(reader) is None


def test_a_new_answer_takes_the_place_of_the_old_one(pair):
    reader, other = pair
    taught(other, "30 days")
    has_heard(reader)
    assert asked(reader) == "30 days"
    assert is_held(reader) == "30 days"


def test_a_new_answer_of_this_cache_takes_its_place_at_once(pair):
    reader, _ = pair
    for days in range(30, 40):
        taught(reader, f"{days} days")
        assert asked(reader) == f"{days} days"


def test_an_answer_of_this_cache_takes_away_no_other(pair):
    reader, _ = pair
    taught(reader, "5 euros", CARD)  # a refresh moves the clock
    assert is_held(reader) == "28 days"
    before = tier_of(reader).stats().invalidated
    reader.update(CARD, MODEL, chat("6 euros"))
    assert the_writer.drain(timeout_s=10)
    has_heard(reader)
    assert tier_of(reader).stats().invalidated == before, "neither the write nor its push concerns another record"
    assert is_held(reader) == "28 days"


def test_a_refresh_is_not_answered_from_it(pair):
    reader, _ = pair
    with aegis_scope(cache="refresh"):
        assert asked(reader) is None


def test_calls_that_do_without_the_cache_do_without_it(pair, make_cache):
    reader, _ = pair
    with aegis_scope(cache="off"):
        assert asked(reader) is None
    namespace = reader.cache.settings.namespace
    careful = make_cache(namespace=namespace, local_tier_bytes=MANY, bypass=["keep"])
    assert asked(careful) is None
    assert hits(careful) == 0


def test_a_dry_run_serves_nothing_from_it(pair, make_cache):
    reader, _ = pair
    dry = make_cache(namespace=reader.cache.settings.namespace, local_tier_bytes=MANY, dry_run=True)

    def local():
        assert asked(dry) is None
        return hits(dry)

    wait_until(local)
    assert dry.cache.stats().exact_hits >= 1


def test_a_call_without_a_tenant_gets_nothing_once_somebody_has_named_one(make_cache, client):
    reader = make_cache(local_tier_bytes=MANY)
    taught(reader, "for all")
    assert is_held(reader) == "for all"
    client.hset(f"{reader.cache.settings.namespace}:{{p00}}:epochs", "tenanted", "1")
    has_heard(reader)
    assert asked(reader) is None


def test_an_expired_record_is_not_served_even_if_nobody_says_that_it_expired(pair, monkeypatch):
    reader, _ = pair
    ahead_ms = engine.now_ms() + 3_600_000
    monkeypatch.setattr(engine, "now_ms", lambda: ahead_ms)
    before = hits(reader)

    def looked_at():
        assert asked(reader) is None
        return hits(reader) > before

    wait_until(looked_at, what="a look at what is held")


@pytest.mark.slow
def test_an_expiry_is_heard(pair):
    reader, other = pair
    with aegis_scope(ttl_s=0.05):
        taught(other, "soon gone")
    wait_until(lambda: asked(reader) is None, what="the end of a short-lived answer")
    with aegis_scope(ttl_s=0.2):
        taught(other, "soon gone")
    has_heard(reader)
    wait_until(lambda: tier_of(reader).stats().entries == 0 and asked(reader) is None, what="its end in the tier")


@pytest.mark.parametrize("how", ["deleted", "overwritten", "expired", "flushed", "flushed all"])
def test_what_somebody_does_to_a_record_in_redis_is_heard(pair, client, how):
    reader, _ = pair
    if how.startswith("flushed"):  # the server is everybody's
        with running_redis("valkey+search") as server:
            _flushed(server.url, how)
        return
    name = named(reader)
    {
        "deleted": lambda: client.delete(name),
        "overwritten": lambda: client.hset(name, "answer", "forged"),
        "expired": lambda: client.pexpire(name, 1),
    }[how]()
    wait_until(lambda: how != "expired" or not client.exists(name))
    has_heard(reader)
    assert asked(reader) is None


def _flushed(url, how):
    with AegisSemanticCache(url, namespace="f", local_tier_bytes=MANY, op_budget_s=5) as cache:
        cache._engine.embedder._make = lambda: None
        taught(cache, "28 days")
        assert is_held(cache) == "28 days"
        with redis.Redis.from_url(url) as client:
            client.flushall() if how == "flushed all" else client.flushdb()
        has_heard(cache)
        assert asked(cache) is None


# -- reads and pushes that cross --------------------------------------------------------------------------------------


@ways
def test_what_is_read_while_it_is_invalidated_is_not_held(pair, way, monkeypatch):
    """The replies are of before, the push comes before they do."""
    reader, other = pair
    tier_of(reader).drop(None)
    meanwhile = [lambda: INVALIDATIONS[way](other), lambda: has_heard(reader)]
    ask, aask = Connections.ask, Connections.aask

    def crossed(connections, replies):
        if connections is reader.cache._connections:
            while meanwhile:
                thread = threading.Thread(target=copy_context().run, args=(meanwhile.pop(0),))
                thread.start()
                thread.join()
        return replies

    async def acrossed(self, *told):
        return crossed(self, await aask(self, *told))

    monkeypatch.setattr(Connections, "ask", lambda self, *told: crossed(self, ask(self, *told)))
    monkeypatch.setattr(Connections, "aask", acrossed)
    assert asked(reader) == "28 days", "it was asked before"
    assert not meanwhile
    assert tier_of(reader).stats().entries == 0
    assert asked(reader) is None


@ways
def test_what_is_read_while_this_cache_invalidates_it_is_not_held(pair, way, monkeypatch):
    reader, _ = pair
    tier = tier_of(reader)
    (request, replies, _), *_ = tier._held.values()
    monkeypatch.setattr(tier, "changed", lambda names: None)  # its push may come late
    state = tier.state()
    INVALIDATIONS[way](reader)
    tier.keep(request, replies, state)
    assert tier.stats().entries == 0


def test_what_is_read_before_pushes_come_is_not_held(make_tier):
    tier, request, replies = make_tier()
    tier._pushes = Heard()
    assert tier.state() is None
    tier.keep(request, replies, tier.state())
    for interrupt in (tier.lost, lambda: tier.connected(None), tier.lost):
        before = tier._state
        tier.proved(clock(), tier.doubts)
        tier.keep(request, replies, before)
        assert tier.stats().entries == 0
        tier.keep(request, replies, tier.state())
        assert tier.stats().entries == 1
        before = tier.state()
        interrupt()
        tier.proved(clock(), tier.doubts)
        tier.keep(request, replies, before)
        assert tier.stats().entries == 0
        interrupt()


@pytest.fixture
def make_tier():
    """Makes tiers that hear what the test tells them, each with a request and its replies."""

    def make(max_bytes=MANY):
        tier = LocalTier("n:{p00}:", max_bytes, lambda: None)
        tier._start = lambda: None
        return tier, _request(0), [[b"1"], [b"id"]]

    return make


def _request(number):
    return b"HMGET n:{p00}:e:%032d v mac" % number


class Heard:
    """Stands for a connection that is alive."""

    asked, idle, has_come = True, False, False

    def quiet(self):
        return not self.has_come

    def ring(self):
        pass


def test_it_answers_only_what_is_proved_now(make_tier, monkeypatch):
    tier, request, replies = make_tier()
    now = [100.0]
    monkeypatch.setattr("langchain_aegis.local_tier.clock", lambda: now[0])
    tier._pushes = Heard()
    tier.proved(100.0, doubts=0)
    tier.keep(request, replies, tier.state())
    assert tier.get(request) is replies
    tier._pushes.has_come = True
    assert tier.get(request) is None, "something has come, who knows what"
    tier._pushes.has_come = False
    now[0] += ALIVE_S - 0.001
    assert tier.get(request) is replies
    now[0] += 0.001
    assert tier.get(request) is None
    tier.proved(now[0] - ALIVE_S, doubts=0)
    assert tier.get(request) is None, "a late proof is old"
    tier.proved(now[0], doubts=0)
    assert tier.get(request) is replies
    tier.connected(None)
    assert tier.get(request) is None
    tier.proved(now[0], doubts=0)
    assert not tier.stats().alive, "proved of a connection that is doubted since"
    tier.proved(now[0], doubts=1)
    assert tier.stats().alive
    assert tier.get(request) is None, "and holds nothing of before"
    tier.lost()
    assert not tier.stats().alive


# -- how much it holds ------------------------------------------------------------------------------------------------


def test_it_holds_the_most_recently_used_up_to_its_bytes(make_tier):
    tier, _, replies = make_tier()
    tier._pushes = Heard()
    tier.proved(clock(), 0)
    tier.keep(_request(0), replies, tier.state())
    each = tier.stats().bytes
    tier._max_bytes = 3 * each + each // 2
    for number in range(1, 3):
        tier.keep(_request(number), replies, tier.state())
    assert tier.stats().bytes == 3 * each
    assert tier.get(_request(0)) is replies
    tier.keep(_request(3), replies, tier.state())
    assert [tier.get(_request(n)) is not None for n in range(4)] == [True, False, True, True]
    assert tier.stats().evicted == 1
    tier.keep(_request(4), [[b"x" * 4 * each], [b"id"]], tier.state())
    assert tier.get(_request(4)) is None, "larger than all the room"
    assert tier.stats().entries == 3
    tier.keep(_request(3), [[b"y" * 10], [b"id"]], tier.state())
    assert tier.stats().bytes == 3 * each + 9
    tier.drop([f"{n:032d}" for n in (0, 2, 3)])
    assert tier.stats().bytes == tier.stats().entries == 0


def test_what_it_says_to_hold_covers_what_it_takes_up(make_cache):
    driver = make_cache(namespace=f"b{uuid.uuid4().hex[:8]}", local_tier_bytes=MANY)
    questions = [prompt(f"What is the fee of item {i}?") for i in range(300)]
    for question in questions:
        driver.lookup(question, MODEL)
        driver.update(question, MODEL, chat("It is 5 euros."))
        assert the_writer.drain(timeout_s=10)
    is_held(driver, questions[0])
    tier_of(driver).drop(None)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        while tier_of(driver).stats().entries < len(questions):
            for question in questions:
                driver.lookup(question, MODEL)
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert held < 1.5 * tier_of(driver).stats().bytes


def test_where_the_least_recently_used_go_every_use_is_noted_and_nothing_is_held(pair, make_cache, client):
    reader, _ = pair
    namespace = reader.cache.settings.namespace
    bounded = make_cache(namespace=namespace, local_tier_bytes=MANY, max_entries_per_tenant=5)
    taught(bounded, "30 days")
    for _ in range(20):
        assert asked(bounded) == "30 days"
    assert hits(bounded) == 0
    assert any(b":u:tenant:" in name for name in client.scan_iter(f"{namespace}:*"))
