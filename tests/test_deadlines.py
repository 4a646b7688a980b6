"""Whatever a request waits for, it is told how long it may: until the deadline of the whole, and no longer."""

import math
import threading

import httpcore
import httpx
import pytest

from langchain_aegis import deadlines
from langchain_aegis.deadlines import Until, bounded


class Network(httpcore.NetworkBackend):
    """Notes how long each wait was told to take."""

    def __init__(self):
        self.told = []

    def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        self.told.append(timeout)
        return Wire(self.told)

    def connect_unix_socket(self, path, timeout=None, socket_options=None):
        return self.connect_tcp(path, 0, timeout)

    def sleep(self, seconds):
        raise NotImplementedError


class Wire(httpcore.NetworkStream):
    def __init__(self, told):
        self.told = told

    def read(self, max_bytes, timeout=None):
        self.told.append(timeout)
        return b""

    def write(self, buffer, timeout=None):
        self.told.append(timeout)

    def start_tls(self, ssl_context, server_hostname=None, timeout=None):
        self.told.append(timeout)
        return self

    def close(self):
        pass


@pytest.fixture
def clock(monkeypatch):
    """The time, which stands still until a test sets it."""
    now = [1_000.0]
    monkeypatch.setattr(deadlines.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def network():
    """What a client waits with, its connections included."""
    inner = Network()
    with httpx.Client(trust_env=False) as client:
        client._transport._pool._network_backend = inner
        bounded(client)
        yield client._transport._pool._network_backend, inner.told


WAITS = {
    "connect": (lambda net, wait: net.connect_tcp("127.0.0.1", 1, wait), httpcore.ConnectTimeout),
    "connect to a socket": (lambda net, wait: net.connect_unix_socket("/none", wait), httpcore.ConnectTimeout),
    "tls": (lambda net, wait: stream(net).start_tls(None, "host", wait), httpcore.ConnectTimeout),
    "read": (lambda net, wait: stream(net).read(1, wait), httpcore.ReadTimeout),
    "read over tls": (lambda net, wait: stream(net, tls=True).read(1, wait), httpcore.ReadTimeout),
    "write": (lambda net, wait: stream(net).write(b"x", wait), httpcore.WriteTimeout),
}


def stream(net, tls=False):
    """Return a connection that was made while nobody had a deadline."""
    with Until(math.inf):
        wire = net.connect_tcp("127.0.0.1", 1)
        return wire.start_tls(None) if tls else wire


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize(
    ("left", "asked", "told"),
    [(2.0, 5.0, 2.0), (2.0, 1.0, 1.0), (2.0, None, 2.0), (math.inf, 5.0, 5.0), (math.inf, None, None)],
)
def test_a_wait_takes_no_longer_than_is_left_of_the_request(network, clock, wait, left, asked, told):
    """Nor longer than it was told itself."""
    net, seen = network
    with Until(clock[0] + left):
        WAITS[wait][0](net, asked)
    assert seen[-1] == told


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("late", [0.0, 0.001, 100.0])
def test_a_wait_is_not_begun_after_the_deadline(network, clock, wait, late):
    """What is said is the timeout of that step, which httpx knows."""
    net, seen = network
    with Until(clock[0]):
        clock[0] += late
        try:
            with pytest.raises(WAITS[wait][1]):
                WAITS[wait][0](net, 5.0)
        finally:
            clock[0] -= late
    assert 5.0 not in seen


def test_each_wait_looks_at_the_clock_again(network, clock):
    """However many there are: a byte now and then is never late for one of them."""
    net, seen = network
    wire = stream(net)
    with Until(clock[0] + 3):
        for passed in range(3):
            clock[0] = 1_000.0 + passed
            wire.read(1, 2.5)
        clock[0] = 1_003.0
        with pytest.raises(httpcore.ReadTimeout):
            wire.read(1, 2.5)
    assert seen[1:] == [2.5, 2.0, 1.0]


def test_a_deadline_is_of_its_thread_and_ends_with_its_block(network, clock):
    net, seen = network
    wire = stream(net)
    with Until(clock[0] + 3):
        with Until(clock[0] + 1):
            wire.read(1, 9.0)
        wire.read(1, 9.0)
        other = threading.Thread(target=lambda: wire.read(1, 9.0))
        other.start()
        other.join()
    wire.read(1, 9.0)
    assert seen[1:] == [1.0, 3.0, 9.0, 9.0]


def test_a_client_is_bounded_once(network):
    net, _ = network
    with httpx.Client(trust_env=False) as client:
        client._transport._pool._network_backend = net
        assert bounded(bounded(client))._transport._pool._network_backend is net
