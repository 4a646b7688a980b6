"""Prometheus sees what the cache counted, once, without a fault of Redis or a blocked loop."""

import asyncio
import multiprocessing
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from langchain_aegis import AegisConfigError, AegisSettings
from langchain_aegis.counts import Cost, Counts
from langchain_aegis.reasons import REASONS
from langchain_aegis.results import CacheHealth, LocalStats

pytest.importorskip("prometheus_client", reason="the extra metrics is not installed")

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from langchain_aegis.metrics import BUCKETS_S, PREFIX, collector, register

GUIDE = Path(__file__).parent.parent / "docs" / "cache.md"
LOCAL = LocalStats(hits=4, entries=1, bytes=2_000, invalidated=0, evicted=0, alive=True)


class Cache:
    """A cache as the collector sees it, with counts that a test makes."""

    def __init__(self, namespace="aegis", health=None):
        self.settings = AegisSettings(namespace=namespace)
        self.counts = Counts()
        self.health_is = health or CacheHealth(redis=True, search=True, entries=7, tenants=2, embedder="minilm")
        self.asked_in = []

    def stats(self):
        seen = self.counts.snapshot()
        return SimpleNamespace(**{name: getattr(seen, name) for name in seen.__slots__}, rejected=3, local=LOCAL)

    def health(self):
        self.asked_in.append(threading.get_ident())
        if isinstance(self.health_is, Exception):
            raise self.health_is
        return self.health_is


@pytest.fixture
def cache():
    cache = Cache()
    cache.counts.hit("exact", 0.0004, cost=Cost(2.5, 100, 20), task="chat")
    cache.counts.hit("semantic", 0.012)
    cache.counts.miss(("guard:number",), 0.02, (0.97, "guard:number"))
    cache.counts.bypassed("no_tenant")
    cache.counts.stored(0.001)
    cache.counts.not_stored("incomplete")
    cache.counts.checked(wrong=True)
    return cache


def scrape(registry):
    """All samples as Prometheus reads them: (name, labels without the namespace) -> value."""
    text = generate_latest(registry).decode()
    return {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k != "namespace")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_count_has_its_series(cache):
    registry = CollectorRegistry()
    register(cache, registry)
    seen = scrape(registry)
    assert seen["aegis_cache_lookups_total", "exact"] == 1
    assert seen["aegis_cache_lookups_total", "semantic"] == 1
    assert seen["aegis_cache_lookups_total", "miss"] == 1
    assert seen["aegis_cache_misses_total", "guard:number", "guard"] == 1
    assert seen["aegis_cache_misses_total", "no_tenant", "bypass"] == 1
    assert seen["aegis_cache_stored_total",] == 1
    assert seen["aegis_cache_not_stored_total", "incomplete"] == 1
    assert seen["aegis_cache_rejected_records_total",] == 3
    assert seen["aegis_cache_local_hits_total",] == 4
    assert seen["aegis_cache_task_lookups_total", "chat", "exact"] == 1
    assert seen["aegis_cache_saved_tokens_total", "input"] == 100
    assert seen["aegis_cache_saved_tokens_total", "output"] == 20
    assert seen["aegis_cache_saved_seconds_total",] == 2.5
    assert seen["aegis_cache_shadow_checked_total",] == 1
    assert seen["aegis_cache_shadow_wrong_total",] == 1
    assert seen["aegis_cache_lookup_seconds_bucket", "0.0002", "exact"] == 0
    assert seen["aegis_cache_lookup_seconds_bucket", "0.0005", "exact"] == 1
    assert seen["aegis_cache_lookup_seconds_bucket", "+Inf", "exact"] == 1
    assert seen["aegis_cache_lookup_seconds_sum", "semantic"] == pytest.approx(0.012)
    assert seen["aegis_cache_update_seconds_count",] == 1
    assert seen["aegis_cache_nearest_miss_similarity_bucket", "0.96"] == 0
    assert seen["aegis_cache_nearest_miss_similarity_bucket", "0.97"] == 1
    assert seen["aegis_cache_entries",] == 7
    assert seen["aegis_cache_tenants",] == 2
    assert seen["aegis_cache_redis_up",] == 1


def test_scraping_twice_counts_nothing_twice(cache):
    registry = CollectorRegistry()
    register(cache, registry)
    assert scrape(registry) == scrape(registry)


@pytest.mark.parametrize("code", sorted(REASONS))
def test_every_reason_appears_with_its_stage(code):
    cache = Cache()
    cache.counts.miss((code,), 0.001)
    cache.counts.not_stored(code)
    registry = CollectorRegistry()
    register(cache, registry)
    seen = scrape(registry)
    assert seen["aegis_cache_misses_total", code, REASONS[code].stage] == 1
    assert seen["aegis_cache_not_stored_total", code] == 1


def test_buckets_ascend_and_end_with_all():
    cache = Cache()
    for at in range(200):
        cache.counts.miss((), 1e-6 * 1.1**at, (at / 199, "below_threshold"))
    registry = CollectorRegistry()
    register(cache, registry)
    seen = scrape(registry)
    row = [seen["aegis_cache_lookup_seconds_bucket", str(bound), "miss"] for bound in BUCKETS_S]
    assert row == sorted(row)
    assert seen["aegis_cache_lookup_seconds_bucket", "+Inf", "miss"] == 200
    assert seen["aegis_cache_lookup_seconds_count", "miss"] == 200


def test_two_caches_are_told_apart_by_namespace_and_added_up_within_one(cache):
    registry = CollectorRegistry()
    made = register(cache, registry)
    other, same = Cache("other"), Cache()
    for further in (other, same):
        further.counts.hit("exact", 0.001)
        made.add(further)
    made.add(cache)  # is there already
    text = generate_latest(registry).decode()
    assert 'aegis_cache_lookups_total{namespace="aegis",tier="exact"} 2.0' in text
    assert 'aegis_cache_lookups_total{namespace="other",tier="exact"} 1.0' in text
    assert text.count("# TYPE aegis_cache_lookups_total counter") == 1


def test_registering_twice_is_an_error_that_says_what_to_do(cache):
    registry = CollectorRegistry(auto_describe=True)
    made = register(cache, registry)
    with pytest.raises(AegisConfigError, match=r"add\(\)"):
        register(Cache(), registry)
    registry.unregister(made)
    register(cache, registry)


def test_registering_asks_neither_redis_nor_the_cache(cache):
    register(cache, CollectorRegistry(auto_describe=True))
    assert not cache.asked_in


def test_a_redis_that_is_away_is_shown_as_down_and_its_entries_as_unknown():
    registry = CollectorRegistry()
    register(Cache(health=CacheHealth(redis=False, search=None, entries=0, tenants=0, embedder=None)), registry)
    seen = scrape(registry)
    assert seen["aegis_cache_redis_up",] == 0
    assert ("aegis_cache_entries",) not in seen


def test_a_scrape_survives_a_cache_that_cannot_tell(cache):
    cache.health_is = AegisConfigError("no secret")
    registry = CollectorRegistry()
    register(cache, registry)
    assert scrape(registry)["aegis_cache_lookups_total", "exact"] == 1


async def test_a_scrape_on_an_event_loop_asks_redis_in_a_thread(cache):
    registry = CollectorRegistry()
    register(cache, registry)
    assert scrape(registry)["aegis_cache_lookups_total", "exact"] == 1
    async with asyncio.timeout(30):
        while ("aegis_cache_entries",) not in scrape(registry):  # noqa: ASYNC110 - a scrape is what shows it
            await asyncio.sleep(0)
    assert threading.get_ident() not in cache.asked_in


def _scrape_in_child(made, sender):
    sender.send(sum(len(family.samples) for family in made.collect()))


def test_the_child_of_a_fork_can_be_scraped_although_the_parent_was_being_scraped(cache):
    made = collector(cache)
    receiver, sender = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=_scrape_in_child, args=(made, sender))
    with made._lock:
        child.start()
    assert receiver.poll(30)
    assert receiver.recv() > 10
    child.join(30)


def test_redis_is_not_asked_if_that_is_not_wanted(cache):
    families = {family.name for family in collector(cache, health=False).collect() if family.samples}
    assert not cache.asked_in
    assert f"{PREFIX}_entries" not in families


def test_without_prometheus_client_the_error_names_the_extra():
    code = "import sys; sys.modules['prometheus_client'] = None; import langchain_aegis.metrics"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "pip install 'langchain-aegis[metrics]'" in done.stderr


def test_the_documentation_lists_every_metric(cache):
    shown = GUIDE.read_text().partition("## Metrics")[2].partition("\n## ")[0]
    there = set(re.findall(r"^\| `(aegis_cache_\w+)`", shown, re.M))
    totals = {"counter": "_total"}
    assert there == {family.name + totals.get(family.type, "") for family in collector(cache).describe()}
