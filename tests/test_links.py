"""Each caller gets the answer to what it asked, whatever becomes of the others and of the server."""

import asyncio
import contextlib
import gc
import os
import socket
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import redis
import redis.asyncio
from conftest import wait_until
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from langchain_aegis.links import AllInUse, AsyncLinks, Link, Links, TooLarge, packed

BUDGET_S = 0.1


def blocks(seconds=3 * BUDGET_S):
    """A command that its connection's later ones have to wait for."""
    return packed([("BLPOP", f"nothing-{os.urandom(4).hex()}", str(seconds))])


def echo(text):
    return packed([("ECHO", text)])


@pytest.fixture
def made(redis_url):
    """How many connections were made of each kind."""
    return []


@pytest.fixture
def links(redis_url, made):
    pool = redis.ConnectionPool.from_url(redis_url, protocol=2, socket_timeout=BUDGET_S)
    opened = Links(lambda: made.append(1) or pool.make_connection(), most=4, wait_s=BUDGET_S)
    yield opened
    opened.close()


@pytest.fixture
async def alinks(redis_url, made):
    pool = redis.asyncio.ConnectionPool.from_url(redis_url, protocol=2, socket_timeout=BUDGET_S)
    opened = AsyncLinks(lambda: made.append(1) or pool.make_connection(), BUDGET_S)
    yield opened
    await opened.aclose()


def kill(redis_url, identity):
    with redis.Redis.from_url(redis_url, protocol=2) as client:
        assert client.client_kill_filter(_id=int(identity)) == 1


async def until(condition):
    for _ in range(2_000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it never came")


# -- blocking ---------------------------------------------------------------------------------------------------------


def test_commands_are_answered_in_order_and_errors_are_values(links, made):
    replies = links.ask(packed([("ECHO", "a"), ("HGETALL",), ("ECHO", b"b" * 200_000)]), 3)
    assert replies[0] == b"a"
    assert isinstance(replies[1], ResponseError)
    assert replies[2] == b"b" * 200_000
    assert links.ask(echo("c"), 1) == [b"c"]
    assert len(made) == 1


def test_what_is_done_meanwhile_is_done_between_question_and_answer(links, redis_url, made):
    with redis.Redis.from_url(redis_url) as other:
        name, seen = f"n{os.urandom(4).hex()}", []

        def meanwhile():
            while not other.exists(name):  # the question has arrived, and its answer was not read
                assert other.ping()
            seen.append(other.get(name))
            raise ValueError("what it raises means only that it was not done")

        assert links.ask(packed([("SET", name, "1"), ("ECHO", "a")]), 2, meanwhile) == [b"OK", b"a"]
        other.delete(name)
    assert seen == [b"1"]
    assert links.ask(echo("next"), 1) == [b"next"]
    assert len(made) == 1


def test_whoever_is_interrupted_meanwhile_leaves_no_answer_behind(links, made):
    def meanwhile():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        links.ask(echo("mine"), 1, meanwhile)
    assert links.ask(echo("next"), 1) == [b"next"]
    assert len(made) == 2


@pytest.mark.row(3)
def test_a_late_answer_is_nobody_elses(links, made):
    with pytest.raises((RedisTimeoutError, TimeoutError)):
        links.ask(blocks(), 1)
    assert [links.ask(echo(str(i)), 1) for i in range(3)] == [[b"0"], [b"1"], [b"2"]]
    assert len(made) == 2


@pytest.mark.row(26)
def test_more_answers_than_were_asked_for_end_the_connection(links, made):
    with pytest.raises(RedisConnectionError, match="not asked"):
        links.ask(packed([("ECHO", "mine"), ("ECHO", "nobody's")]), 1)
    assert links.ask(echo("next"), 1) == [b"next"]
    assert len(made) == 2


def test_an_idle_connection_that_the_server_closed_is_made_anew(links, redis_url, monkeypatch):
    monkeypatch.setattr("langchain_aegis.links._IDLE_S", 0.0)
    (identity,) = links.ask(packed([("CLIENT", "ID")]), 1)
    kill(redis_url, identity)
    assert links.ask(echo("again"), 1) == [b"again"]


def test_threads_share_a_few_connections(links, made):
    wrong = []

    def ask(name):
        for i in range(50):
            try:
                if links.ask(echo(f"{name}-{i}"), 1) != [f"{name}-{i}".encode()]:
                    wrong.append((name, i))
            except RedisTimeoutError:
                pass  # all were in use for too long

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(made) <= 4
    assert links._count == len(links._free) == len(made)


@pytest.mark.row(12)
def test_who_finds_all_connections_in_use_waits_for_one_and_not_for_ever(redis_url):
    pool = redis.ConnectionPool.from_url(redis_url, protocol=2, socket_timeout=5)
    one = Links(pool.make_connection, most=1, wait_s=5)
    one.ask(echo("open"), 1)
    blocked = threading.Thread(target=one.ask, args=(blocks(0.2), 1))
    blocked.start()
    while one._free:
        time.sleep(0.001)
    assert one.ask(echo("in turn"), 1) == [b"in turn"]
    blocked.join()
    blocked = threading.Thread(target=one.ask, args=(blocks(0.3), 1))
    blocked.start()
    while one._free:
        time.sleep(0.001)
    one._wait_s = 0.01
    with pytest.raises(RedisTimeoutError, match="in use"):
        one.ask(echo("too late"), 1)
    blocked.join()
    one.close()


@pytest.mark.row(12)
def test_who_waited_for_a_connection_has_the_rest_of_the_time_for_the_answer(redis_url):
    """Half of 64 threads would wait twice as long as the budget for a Redis that is frozen."""
    pool = redis.ConnectionPool.from_url(redis_url, protocol=2, socket_timeout=1)
    one = Links(pool.make_connection, most=1, wait_s=1)
    one.ask(echo("open"), 1)
    blocked = threading.Thread(target=one.ask, args=(blocks(0.6), 1))
    blocked.start()
    while one._free:
        time.sleep(0.001)
    asked = []
    real = Link._hurry
    try:
        Link._hurry = lambda link, until_s: asked.append(until_s - time.monotonic()) or real(link, until_s)
        assert one.ask(echo("in turn"), 1) == [b"in turn"]
    finally:
        Link._hurry = real
    blocked.join()
    assert len(asked) == 1 and 0.1 < asked[0] < 0.7
    assert one.ask(echo("next"), 1) == [b"next"]
    assert one._free[0]._sock.gettimeout() == 1  # as before
    one.close()


@pytest.mark.row(3)
def test_who_waited_for_a_connection_in_vain_makes_none_that_he_has_no_time_for():
    """Half of 64 threads would connect when the others have given up, and add that to what they have waited."""
    made, ended = [], threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            client, _ = listener.accept()
            with client:
                client.recv(100)
                client.sendall(b"$4\r\nopen\r\n")
                client.recv(100)
                ended.wait(10)

        def make():
            made.append(redis.Connection(port=listener.getsockname()[1], protocol=2, driver_info=None))
            return made[-1]

        one = Links(make, most=1, wait_s=1)
        with ThreadPoolExecutor(3) as pool:
            pool.submit(serve)
            assert one.ask(echo("open"), 1) == [b"open"]
            first = pool.submit(one.ask, echo("first"), 1)
            wait_until(lambda: not one._free)
            second = pool.submit(one.ask, echo("second"), 1)
            wait_until(lambda: one._waiting)
            time.sleep(0.9)  # of the second it has waited now
            ended.set()
            assert isinstance(first.exception(10), RedisConnectionError)
            assert isinstance(second.exception(10), AllInUse)
        assert len(made) == 1 and one._count == 0
        one.close()


@pytest.mark.row(24)
def test_a_reply_that_comes_drop_by_drop_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip():
            client, _ = listener.accept()
            with client, contextlib.suppress(OSError):
                client.recv(100)
                client.sendall(b"$9\r\n")
                while True:
                    client.sendall(b"x")
                    time.sleep(0.15)

        thread = threading.Thread(target=drip)
        thread.start()
        make = partial(redis.Connection, port=listener.getsockname()[1], protocol=2, driver_info=None, socket_timeout=1)
        dripping = Links(make, most=1, wait_s=1)
        began = time.monotonic()
        with pytest.raises((RedisTimeoutError, TimeoutError)):
            dripping.ask(echo("x"), 1)
        assert time.monotonic() - began >= 0.99
        assert dripping._count == 0
        dripping.close()
        thread.join(10)


@pytest.mark.row(34)
def test_more_than_is_wanted_is_not_read(links, made):
    links.ask(packed([("SET", "large", b"x" * 3_000_000)]), 1)
    with pytest.raises(TooLarge):
        links.ask(packed([("GET", "large")]), 1, largest=1_000_000)
    assert links.ask(packed([("STRLEN", "large")]), 1, largest=1_000) == [3_000_000]
    assert len(made) == 2
    assert len(links.ask(packed([("GET", "large")]), 1, largest=4_000_000)[0]) == 3_000_000
    links.ask(packed([("DEL", "large")]), 1)


@pytest.mark.row(34)
async def test_more_than_is_wanted_is_not_read_and_the_others_are_told_that_it_was_not_theirs(alinks, made):
    await alinks.ask(packed([("SET", "larger", b"x" * 3_000_000)]), 1)
    asked = [alinks.ask(packed([("GET", "larger")]), 1, largest=1_000_000), *(alinks.ask(echo(t), 1) for t in "ab")]
    told = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(t) for t in told] == [TooLarge] * 3
    assert [t.own for t in told] == [True, False, False]
    assert len((await alinks.ask(packed([("GET", "larger")]), 1))[0]) == 3_000_000
    assert len(made) == 2
    # Many replies that are each small enough are not taken for one.
    assert await alinks.ask(packed([("GETRANGE", "larger", "0", "400000")] * 20), 20, largest=1_000_000)
    await alinks.ask(packed([("DEL", "larger")]), 1)


@pytest.mark.slow
def test_a_connection_that_is_in_use_while_all_are_closed_is_closed_when_it_comes_back(redis_url, open_descriptors):
    gc.collect()
    before = open_descriptors()
    pool = redis.ConnectionPool.from_url(redis_url, protocol=2, socket_timeout=5)
    opened = Links(pool.make_connection, most=2, wait_s=1)
    opened.ask(echo("open"), 1)
    used = threading.Thread(target=opened.ask, args=(blocks(0.2), 1))
    used.start()
    while opened._free:
        time.sleep(0.001)
    opened.close()
    used.join()
    assert not opened._free
    gc.collect()
    wait_until(lambda: open_descriptors() <= before, what="the descriptors")


@pytest.mark.row(10)
def test_a_server_that_is_loading_is_no_answer(links, monkeypatch):
    links.ask(echo("open"), 1)
    link = links._free[0]
    link._reader = Saying(redis.exceptions.BusyLoadingError("Redis is loading the dataset in memory"))
    with pytest.raises(RedisConnectionError):
        links.ask(echo("x"), 1)


class Saying:
    """A reader that returns one reply."""

    def __init__(self, reply):
        self.replies = [reply]

    def feed(self, *data):
        pass

    def gets(self):
        return self.replies.pop() if self.replies else False

    def has_data(self):
        return False


# -- awaited ----------------------------------------------------------------------------------------------------------


async def test_all_callers_of_a_loop_share_one_connection(alinks, made):
    replies = await asyncio.gather(*(alinks.ask(echo(str(i)), 1) for i in range(200)))
    assert replies == [[str(i).encode()] for i in range(200)]
    assert len(made) == 1


async def test_nothing_is_done_meanwhile_where_others_wait_too(alinks):
    done = []
    asked = [alinks.ask(echo(str(i)), 1, partial(done.append, i)) for i in range(3)]
    assert await asyncio.gather(*asked) == [[b"0"], [b"1"], [b"2"]]
    assert done == [0]
    failing = alinks.ask(echo("a"), 1, lambda: 1 / 0)
    assert await failing == [b"a"]


@pytest.mark.row(25)
async def test_whoever_is_cancelled_leaves_the_others_their_answers(alinks, made):
    await alinks.ask(echo("open"), 1)
    for seed in range(20):
        tasks = [asyncio.ensure_future(alinks.ask(packed([("ECHO", f"{seed}-{i}")] * 2), 2)) for i in range(30)]
        await asyncio.sleep(0)
        for task in tasks[seed % 3 :: 3]:
            task.cancel()
        told = await asyncio.gather(*tasks, return_exceptions=True)
        for i, reply in enumerate(told):
            assert isinstance(reply, asyncio.CancelledError) or reply == [f"{seed}-{i}".encode()] * 2
        assert sum(isinstance(reply, list) for reply in told) >= 20
    assert await alinks.ask(echo("after"), 1) == [b"after"]
    assert len(made) == 1


@pytest.mark.row(25)
async def test_whoever_is_cancelled_while_it_connects_leaves_the_others_the_connection(alinks, made):
    first, second = (asyncio.ensure_future(alinks.ask(echo(t), 1)) for t in ("first", "second"))
    await asyncio.sleep(0)
    first.cancel()
    assert await second == [b"second"]
    assert len(made) == 1


@pytest.mark.row(3)
async def test_a_server_that_says_nothing_is_left(alinks, made):
    await alinks.ask(echo("open"), 1)
    told = await asyncio.gather(alinks.ask(blocks(5), 1), alinks.ask(echo("behind"), 1), return_exceptions=True)
    assert [type(t) for t in told] == [RedisTimeoutError] * 2
    assert await alinks.ask(echo("next"), 1) == [b"next"]
    assert len(made) == 2


async def test_a_slow_answer_is_given_up_and_the_next_ones_are_still_right(alinks, made):
    await alinks.ask(echo("open"), 1)
    link = alinks._link
    slow = asyncio.ensure_future(alinks.ask(blocks(1.5 * BUDGET_S), 1))
    await asyncio.sleep(0)
    late = asyncio.ensure_future(alinks.ask(echo("late"), 1))
    await asyncio.sleep(0)
    link._heard_s = link._loop.time() + 1  # as if something else had been heard since
    with pytest.raises(RedisTimeoutError):
        await slow
    with pytest.raises(RedisTimeoutError):
        await late
    await until(lambda: not link._asked)
    assert await alinks.ask(echo("next"), 1) == [b"next"]
    assert len(made) == 1


@pytest.mark.row(26)
async def test_an_answer_to_nothing_ends_the_connection(alinks, made):
    await alinks.ask(echo("open"), 1)
    assert await alinks.ask(packed([("ECHO", "mine"), ("ECHO", "nobody's")]), 1) == [b"mine"]
    await until(lambda: alinks._link.closed)
    assert await alinks.ask(echo("next"), 1) == [b"next"]
    assert len(made) == 2


async def test_an_idle_connection_that_was_closed_is_made_anew(alinks, redis_url, made, monkeypatch):
    monkeypatch.setattr("langchain_aegis.links._IDLE_S", 0.0)
    (identity,) = await alinks.ask(packed([("CLIENT", "ID")]), 1)
    kill(redis_url, identity)  # the loop has had no time to notice
    assert await alinks.ask(echo("again"), 1) == [b"again"]
    assert len(made) == 2


@pytest.mark.row(23)
async def test_a_connection_that_breaks_tells_all_that_wait(alinks, redis_url):
    (identity,) = await alinks.ask(packed([("CLIENT", "ID")]), 1)
    waiting = [asyncio.ensure_future(alinks.ask(blocks(), 1)) for _ in range(5)]
    await asyncio.sleep(0.01)
    await asyncio.to_thread(kill, redis_url, identity)
    told = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(t, RedisConnectionError) for t in told)


def test_each_loop_leaves_nothing_behind(redis_url, open_descriptors):
    gc.collect()
    before = open_descriptors()
    pool = redis.asyncio.ConnectionPool.from_url(redis_url, protocol=2)

    async def use():
        opened = AsyncLinks(pool.make_connection, BUDGET_S)
        assert await opened.ask(echo("x"), 1) == [b"x"]
        await opened.aclose()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            asyncio.run(use())
        gc.collect()
    wait_until(lambda: open_descriptors() <= before, what="the descriptors")


def test_what_cannot_be_reached_is_said_to_each(tmp_path):
    make = partial(redis.UnixDomainSocketConnection, path=f"{tmp_path}/none.sock")
    opened = Links(make, most=2, wait_s=1)
    for _ in range(5):
        with pytest.raises(RedisConnectionError):
            opened.ask(echo("x"), 1)
    assert opened._count == 0
