"""Over TLS only a server that shows the right certificate is told anything."""

import asyncio
import logging
import ssl
import time

import pytest
import redis
from redis.asyncio.connection import RedisSSLContext

from faults import certificates
from faults.measure import SLACK, Load, slowness, standing_still
from faults.proxy import Proxy

pytestmark = pytest.mark.skipif(not certificates.possible(), reason="needs the openssl command")

QUESTION = "What is the fee of item 7?"
PASSWORD = "canary-password"
LOCAL = "DNS:localhost,IP:127.0.0.1"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What servers show, by name, and the CA that clients are given."""
    path = tmp_path_factory.mktemp("tls")
    ours, other = (certificates.Authority(path, name) for name in ("ours", "other"))
    yield (
        ours.file,
        {
            "right": ours.server("right", LOCAL),
            "another CA's": other.server("foreign", LOCAL),
            "for another host": ours.server("elsewhere", "DNS:elsewhere.example,IP:127.0.0.2"),
            "expired": ours.server("late", LOCAL, days=-1),
        },
    )


@pytest.fixture
def over_tls(server, shown):
    """Makes a TLS address of the Redis; what it shows may be chosen."""
    made = []
    server.client.execute_command("ACL", "SETUSER", "canary", "on", f">{PASSWORD}", "~*", "+@all")

    def make(name="right", host="localhost", scheme="rediss", ca=True, tls=True):
        made.append(Proxy(str(server.socket), shown[1][name] if tls else None))
        told = f"?ssl_ca_certs={shown[0]}" if ca and scheme == "rediss" else ""
        return f"{scheme}://canary:{PASSWORD}@{host}:{made[-1].port}{told}"

    yield make
    for proxy in made:
        proxy.close()
    server.client.execute_command("ACL", "DELUSER", "canary")


@pytest.mark.row(125)
@pytest.mark.parametrize(("given", "host"), [("address", "localhost"), ("client", "127.0.0.1")])
async def test_the_right_certificate_is_believed(over_tls, new_recorder, stored, given, host):
    url = over_tls(host=host)
    client = redis.Redis.from_url(url) if given == "client" else None
    told = {"redis": client} if client else {"url": url}
    recorder = new_recorder(**told, op_budget_s=10)
    assert recorder.ask(QUESTION) is False
    stored()
    assert recorder.ask(QUESTION) is True
    assert await recorder.aask(QUESTION) is True
    assert recorder.cache.health().redis
    await recorder.cache.aclose()
    if client:
        client.close()


WRONG = {
    "another CA's certificate": {"name": "another CA's"},
    "a CA that nobody knows": {"ca": False},
    "a certificate for another host": {"name": "for another host"},
    "a certificate for another address": {"name": "for another host", "host": "127.0.0.1"},
    "an expired certificate": {"name": "expired"},
    "no TLS at all": {"tls": False},
}


@pytest.mark.row(125, 61)
@pytest.mark.parametrize(
    ("what", "awaited"),
    [  # every way is tried by one of the two at least; by both where there is time
        pytest.param(what, awaited, marks=[pytest.mark.slow] if (number + awaited) % 2 else [])
        for number, what in enumerate(WRONG)
        for awaited in (False, True)
    ],
)
async def test_any_other_server_is_told_nothing_and_costs_nobody_an_answer(
    server, over_tls, new_recorder, stored, caplog, what, awaited
):
    caplog.set_level(logging.DEBUG)
    before = server.calls("auth")
    recorder = new_recorder(url=over_tls(**WRONG[what]), op_budget_s=0.15)
    for _ in range(2):
        assert (await recorder.aask(QUESTION) if awaited else recorder.ask(QUESTION)) is False
    stored()
    await recorder.cache.aclose()
    assert server.calls("auth") == before
    assert not server.entries()
    told = [r for r in caplog.records if r.name.startswith("langchain_aegis") and r.levelno >= logging.WARNING]
    assert [r.getMessage().partition(":")[0] for r in told].count("redis_unavailable") == 1
    assert PASSWORD not in caplog.text


@pytest.mark.row(125)
def test_who_forgets_tls_gets_misses(server, over_tls, new_recorder, stored):
    recorder = new_recorder(url=over_tls(scheme="redis"), op_budget_s=0.15)
    assert recorder.ask(QUESTION) is False
    stored()
    assert not server.entries()


@pytest.fixture
def contexts(monkeypatch):
    """The contexts that are made from now on, each a quarter of a second later than asked for."""
    made, real = [], RedisSSLContext.get

    def slowly(self):
        if self.context is None:
            time.sleep(0.25)
            made.append(real(self))
        return real(self)

    monkeypatch.setattr(RedisSSLContext, "get", slowly)
    return made


@pytest.mark.row(18, 125)
async def test_connecting_over_tls_never_holds_an_event_loop_up(over_tls, new_cache, new_recorder, contexts):
    """Reading the certificates takes 50 ms, here 250: a thread does it, once for all connections."""
    recorder = new_recorder(url=over_tls(), op_budget_s=10)
    for number in range(4):
        before = slowness()
        _, still = await standing_still(recorder.aask(f"{QUESTION[:-1]} or {number}?"))
        assert not recorder.cache._connections.breaker.open
        await recorder.cache._connections._async.aclose()  # the next call connects again
        if still <= 0.020 * SLACK * max(before, slowness()) and number:
            break
    else:
        pytest.fail(f"the loop stood still for {still:.3f} s")
    assert len(contexts) == 1
    await recorder.cache.aclose()


@pytest.mark.row(125)
def test_all_connections_of_a_cache_share_what_they_believe(over_tls, new_recorder, contexts):
    """Of threads and of event loops."""
    recorder = new_recorder(url=over_tls(), op_budget_s=10)
    Load(recorder, "threads", 8)([f"{QUESTION[:-1]} or {i}?" for i in range(16)])
    for _ in range(3):
        asyncio.run(recorder.aask(QUESTION))
    assert len(contexts) == 1


@pytest.mark.row(125)
@pytest.mark.parametrize("awaited", [False, True])
async def test_a_certificate_that_was_renewed_is_read_when_the_old_one_is_not_believed(
    over_tls, shown, new_recorder, tmp_path, awaited
):
    """The file that names the CA is another one by now; nobody has to start the program again."""
    ours, other = shown[0], shown[0].with_name("other.pem")
    ca = tmp_path / "ca.pem"
    ca.write_bytes(other.read_bytes())
    recorder = new_recorder(url=f"{over_tls(ca=False)}?ssl_ca_certs={ca}", op_budget_s=10)

    async def connects():
        await recorder.aask(QUESTION) if awaited else recorder.ask(QUESTION)
        return recorder.cache._connections.breaker._failed == 0

    assert not await connects()
    ca.write_bytes(ours.read_bytes())
    recorder.cache._connections.breaker.succeeded()
    assert await connects()
    await recorder.cache.aclose()


@pytest.mark.row(125)
@pytest.mark.parametrize("awaited", [False, True])
@pytest.mark.parametrize("told", ["?ssl_ca_certs=/nowhere/ca.pem", "?ssl_ca_data=nonsense", "?ssl_ciphers=NONE"])
async def test_certificates_that_cannot_be_read_are_a_miss(over_tls, new_recorder, told, awaited):
    recorder = new_recorder(url=over_tls(ca=False) + told, op_budget_s=10)
    assert (await recorder.aask(QUESTION) if awaited else recorder.ask(QUESTION)) is False
    assert not recorder.cache.health().redis
    await recorder.cache.aclose()


def test_redis_py_still_asks_what_the_shared_context_replaces():
    """If it makes its contexts another way one day, this notices."""
    assert callable(redis.SSLConnection._wrap_socket_with_ssl)
    context = RedisSSLContext(cert_reqs="required", check_hostname=True)
    context.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    assert context.get() is context.context
