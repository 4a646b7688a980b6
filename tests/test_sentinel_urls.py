"""A Redis that Sentinels watch is one setting, written as langchain-redis and redisvl write it."""

import pytest

from langchain_aegis import AegisConfigError, AegisEmbeddingCache, AegisSemanticCache
from langchain_aegis.ollama.redis_checks import check_redis_server
from langchain_aegis.sentinel_urls import sentinels_of
from langchain_aegis.settings import AegisSettings


@pytest.mark.parametrize(
    ("url", "places", "service", "told", "asked"),
    [
        ("redis+sentinel://a", [("a", 26379)], "mymaster", {"db": 0}, {}),
        ("redis+sentinel://a:1,b,[::1]:3/main", [("a", 1), ("b", 26379), ("::1", 3)], "main", {"db": 0}, {}),
        (
            "redis+sentinel://al%40ice:p%2Fw@a/main/2", [("a", 26379)], "main",
            {"db": 2, "username": "al@ice", "password": "p/w"}, {"username": "al@ice", "password": "p/w"},
        ),
        ("redis+sentinel://:pw@a/m?sentinel_password=other", [("a", 26379)], "m",
         {"db": 0, "password": "pw"}, {"password": "other"}),
        ("redis+sentinel://u:pw@a/m?sentinel_password=&sentinel_username=", [("a", 26379)], "m",
         {"db": 0, "username": "u", "password": "pw"}, {}),
        ("redis+sentinel://a/m?health_check_interval=3", [("a", 26379)], "m",
         {"db": 0, "health_check_interval": 3}, {}),
    ],
)  # fmt: skip
def test_an_address_says_who_watches_what_it_is_called_and_who_asks(url, places, service, told, asked):
    found = sentinels_of(url)
    assert (list(found.places), found.service, found.told, found.asked) == (places, service, told, asked)
    assert not found.tls
    pool = found.client().connection_pool
    assert pool.is_master
    assert pool.service_name == service
    assert pool.connection_kwargs.items() >= told.items()


def test_tls_is_spoken_to_both_and_believes_the_same_certificates():
    found = sentinels_of("rediss+sentinel://a/m?ssl_ca_certs=/ca.pem")
    pool = found.client().connection_pool
    (sentinel,) = pool.sentinel_manager.sentinels
    for one in (pool, sentinel.connection_pool):
        assert "SSL" in one.connection_class.__name__
        assert one.connection_kwargs["ssl_ca_certs"] == "/ca.pem"


@pytest.mark.parametrize("url", ["redis://a:1/0", "rediss://a", "unix:///x", "sentinel://a"])
def test_another_address_is_none_of_sentinels(url):
    assert sentinels_of(url) is None


@pytest.mark.parametrize(
    "rest",
    ["", "/m", "a:x/m", "a:99999/m", "a/m/x", "a/m/0/more", "a,,b/m", "a/m?health_check_interval=x", "u:canary/w@a/m"],
)
@pytest.mark.parametrize("scheme", ["redis+sentinel", "rediss+sentinel"])
def test_what_cannot_be_read_is_said_when_the_cache_is_made_and_quotes_no_password(scheme, rest):
    for make in (AegisSemanticCache, lambda url: AegisEmbeddingCache(redis_url=url)):
        with pytest.raises(AegisConfigError, match="redis_url") as failed:
            make(f"{scheme}://{rest}")
        assert "canary" not in str(failed.value)


def test_the_environment_may_name_one(monkeypatch):
    monkeypatch.setenv("REDIS_URL", "redis+sentinel://127.0.0.1:1/main")
    cache = AegisSemanticCache()
    assert cache._connections._sought
    cache.close()


def test_the_doctor_says_that_no_sentinel_answers():
    url = "redis+sentinel://user:canary@127.0.0.1:1/main"
    (found,) = check_redis_server(AegisSettings(redis_url=url))
    assert found.severity == "error"
    assert "main" in found.what
    assert "canary" not in f"{found}"
