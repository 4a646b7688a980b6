"""The choice among several servers of one model: never one that is down, even, and back to whom knows the prompt."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from langchain_aegis.admission import Admission
from langchain_aegis.balance import Candidate, in_order
from langchain_aegis.pools import Pool
from langchain_aegis.queues import LONG_PREFIX
from langchain_aegis.traits import Traits

SERVERS = st.lists(
    st.builds(
        Candidate,
        up=st.booleans(),
        slots=st.integers(1, 8),
        busy=st.integers(0, 20),
        shared=st.integers(0, 3 * LONG_PREFIX),
        last=st.integers(0, 5),
    ),
    min_size=1,
    max_size=5,
)


@given(SERVERS)
def test_those_that_are_up_are_asked_once_each_and_no_other(servers):
    order = in_order(servers)
    assert sorted(order) == [at for at, one in enumerate(servers) if one.up]


@given(SERVERS)
def test_nobody_waits_while_a_slot_is_free(servers):
    order = in_order(servers)
    if any(one.up and one.busy < one.slots for one in servers):
        assert servers[order[0]].busy < servers[order[0]].slots


@given(SERVERS)
def test_who_knows_the_prompt_costs_at_most_one_more_service_time(servers):
    order = in_order(servers)
    if order:
        first = servers[order[0]]
        least = min((servers[at] for at in order), key=lambda one: (one.busy + 1) / one.slots)
        assert first.busy < first.slots or first.busy / first.slots <= least.busy / least.slots + 1


@given(SERVERS)
def test_without_a_known_prompt_the_least_busy_is_first(servers):
    servers = [replace(one, shared=min(one.shared, LONG_PREFIX - 1)) for one in servers]
    order = in_order(servers)
    loads = [((servers[at].busy + 1) / servers[at].slots, servers[at].last) for at in order]
    assert loads == sorted(loads)


@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 60))
def test_calls_are_spread_within_one_of_even(servers, slots, calls):
    counts, last = [0] * servers, [0] * servers
    for call in range(calls):
        at = in_order([Candidate(True, slots, n, last=when) for n, when in zip(counts, last, strict=True)])[0]
        counts[at] += 1
        last[at] = call + 1
    assert max(counts) - min(counts) <= 1


@given(st.lists(st.integers(1, 8), min_size=2, max_size=4), st.integers(0, 60))
def test_larger_servers_get_more(slots, calls):
    counts = [0] * len(slots)
    for _ in range(calls):
        counts[in_order([Candidate(True, s, n) for s, n in zip(slots, counts, strict=True)])[0]] += 1
    for one, n in enumerate(counts):
        for other, m in enumerate(counts):
            assert n / slots[one] <= (m + 1) / slots[other] or n == 0  # none is worse off for having got one more


def test_a_known_prompt_goes_back_unless_that_server_is_clearly_busier():
    knows, free = Candidate(True, 4, 3, shared=LONG_PREFIX), Candidate(True, 4, 0)
    assert in_order([free, knows]) == [1, 0]
    assert in_order([free, replace(knows, shared=LONG_PREFIX - 1)]) == [0, 1]
    assert in_order([free, replace(knows, busy=4)]) == [0, 1]  # it would wait, while a slot is free
    full = replace(free, busy=4)
    assert in_order([full, replace(knows, busy=8)]) == [1, 0]
    assert in_order([full, replace(knows, busy=9)]) == [0, 1]
    assert in_order([free, replace(knows, up=False)]) == [0]
    most = replace(knows, shared=2 * LONG_PREFIX)
    assert in_order([knows, most]) == [1, 0]


# -- a pool


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def pool(*slots, **told):
    clock = Clock()
    return Pool(
        {f"http://{name}:1": Admission(n) for name, n in zip("abc", slots, strict=False)}, clock=clock, **told
    ), clock


def test_a_pool_has_the_slots_of_the_servers_that_are_up():
    both, _ = pool(4, 2)
    assert both.max_concurrency == 6
    both.lost("http://a:1", 30)
    assert (both.max_concurrency, both.down) == (2, ("http://a:1",))
    both.lost("http://b:1", 30)
    assert both.max_concurrency == 6  # whoever comes first finds out
    both.found("http://a:1")
    assert (both.max_concurrency, both.down) == (4, ("http://b:1",))
    both.fit({"http://a:1": Admission(1)})
    assert both.max_concurrency == 1


def test_calls_that_are_on_their_way_count():
    two, _ = pool(4, 4)
    chosen = [two.choose(Traits(), (), n) for n in range(6)]
    assert sorted(chosen) == ["http://a:1"] * 3 + ["http://b:1"] * 3
    for n in range(6):
        two.left(chosen[n], n)
    assert two.choose(Traits(), ("http://a:1",), 7) == "http://b:1"
    assert two.choose(Traits(), ("http://a:1", "http://b:1"), 8) is None


def test_a_server_s_other_users_count_too():
    a, b = Admission(4), Admission(4)
    two = Pool({"a": a, "b": b})
    with a.slot(), a.slot():
        assert [two.choose(Traits(), (), n) for n in range(3)] == ["b", "b", "a"]


def test_who_holds_a_slot_of_a_server_stays_with_it():
    a, b = Admission(1), Admission(1)
    two = Pool({"a": a, "b": b})
    with b.slot() as ticket, ticket.held(), two.slot():  # rides: it does not wait for itself
        assert two.choose(Traits(), (), 1) == "b"
        assert two.busy == 0


def test_prompts_that_begin_alike_meet_at_one_server_and_models_do_not_mix():
    two, _ = pool(4, 4)
    long = tuple(range(1, LONG_PREFIX + 3))

    def choose(prefix, runner="m"):
        at = two.choose(Traits(runner=runner, prefix=lambda: prefix), (), object())
        two._members[at].under_way.clear()
        return at

    first = choose(long)
    assert {choose((*long[:LONG_PREFIX], 90 + n)) for n in range(5)} == {first}
    assert choose(long, runner="other") != first
    two.lost(first, 30)
    assert not two._members[first].read  # it has to be started anew


def test_few_prompts_are_remembered():
    one, _ = pool(4)
    for n in range(500):
        one.choose(Traits(prefix=lambda n=n: (n, *range(LONG_PREFIX))), (), n)
    assert len(one._members["http://a:1"].read) == 64


def test_a_server_that_is_down_is_looked_at_by_one_call_each_recheck_s():
    two, clock = pool(4, 4)
    assert list(two.to_look_at(30)) == []
    two.lost("http://a:1", 30)
    assert list(two.to_look_at(30)) == []
    clock.now = 31
    assert list(two.to_look_at(30)) == ["http://a:1"]
    assert list(two.to_look_at(30)) == []  # somebody looks
    two.lost("http://b:1", 30)
    clock.now = 33
    assert list(two.to_look_at(30)) == ["http://a:1", "http://b:1"]  # there is no other: look sooner
    assert list(two.to_look_at(30)) == []
