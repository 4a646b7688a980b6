"""Who runs next: priorities, turns of tenants, and order for the server's sake. All in virtual time."""

import heapq
import itertools
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from langchain_aegis.admission import Admission
from langchain_aegis.errors import AegisOverloadedError
from langchain_aegis.tickets import State
from langchain_aegis.traits import Traits, background

BLOCKS = 8


class Clock:
    def __init__(self):
        self.now = 1_000.0

    def __call__(self):
        return self.now


def context(name):
    """Return the prefix of a prompt about `name`: eight blocks of its own."""
    return lambda: tuple(hash((name, n)) for n in range(BLOCKS))


def call(name=None, *, tenant=None, runner=None, model="m"):
    return Traits(tenant=tenant, model=model, runner=runner, prefix=context(name) if name is not None else tuple)


class Simulation:
    """Calls with a service time each, put to an admission; `started` lists (time, traits) in the order of starting."""

    def __init__(self, slots, waiting=10_000, **how):
        self.clock = Clock()
        self.admission = Admission(slots, waiting, clock=self.clock)
        self.how = how
        self.started, self._events, self._order = [], [], itertools.count()
        self._waiting = []

    def at(self, seconds, traits, service_s, wait="refuse"):
        heapq.heappush(self._events, (1_000 + seconds, next(self._order), "come", (traits, service_s, wait)))

    def run(self):
        while self._events:
            self.clock.now, _, what, value = heapq.heappop(self._events)
            if what == "come":
                traits, service_s, wait = value
                ticket = self.admission.enter(traits=traits, wait=wait, **self.how)
                self._waiting.append((ticket, traits, service_s, self.clock.now))
            else:
                value.leave()
            for each in [each for each in self._waiting if each[0].running]:
                self._waiting.remove(each)
                ticket, traits, service_s, came = each
                ticket.wait()
                self.started.append((self.clock.now - 1_000, traits, self.clock.now - came))
                took = service_s(traits) if callable(service_s) else service_s
                heapq.heappush(self._events, (self.clock.now + took, next(self._order), "go", ticket))
        assert not self._waiting
        return self.started


# -- priorities


def test_single_calls_go_before_items_of_batches_and_those_still_move():
    simulation = Simulation(1)
    simulation.at(0, call(tenant="first"), 1)
    for n in range(40):
        simulation.at(0.1, call(tenant=f"bulk {n}"), 1, "queue")
        simulation.at(0.2, call(tenant=f"one {n}"), 1)
    order = [traits.tenant.split()[0] for _, traits, _ in simulation.run()][1:]
    assert order[:8].count("bulk") == 1
    assert order[:40].count("bulk") == 5  # one of eight


def test_patient_calls_wait_without_counting_and_before_batches():
    admission = Admission(1, 0)
    first, item, patient = admission.enter(), admission.enter(wait="queue"), admission.enter(wait="patient")
    first.leave()
    assert (patient.state, item.state) == (State.RUNNING, State.WAITING)


@pytest.mark.row(113)
def test_background_traffic_never_takes_the_last_slot():
    admission = Admission(3, 10)
    with background():
        spare = [admission.enter() for _ in range(4)]
    assert [ticket.running for ticket in spare] == [True, True, False, False]
    single = admission.enter()
    assert single.running
    single.leave()
    assert not spare[2].running
    spare[0].leave()
    assert [ticket.running for ticket in spare[1:]] == [True, True, False]


@pytest.mark.row(113)
def test_background_traffic_uses_a_single_slot_only_while_nothing_else_is_there():
    admission = Admission(1, 10)
    with background():
        first, second = admission.enter(), admission.enter()
    single = admission.enter()
    first.leave()
    assert (single.running, second.running) == (True, False)
    single.leave()
    assert second.running


@pytest.mark.row(113)
def test_background_traffic_has_a_bound_of_its_own():
    admission = Admission(1, 2)
    with background():
        tickets = [admission.enter() for _ in range(3)]
        with pytest.raises(AegisOverloadedError):
            admission.enter()
    assert admission.stats().waiting_spare == 2
    tickets += [admission.enter(), admission.enter()]
    assert admission.stats().waiting == 2


# -- tenants


@pytest.mark.row(110)
@pytest.mark.slow
def test_a_tenant_with_few_calls_is_not_slowed_down_by_one_with_many():
    def waits(beside):
        simulation = Simulation(4)
        for n in range(beside):
            simulation.at(0, call(n % 7, tenant="a"), 1.0)
        for n in range(10):
            simulation.at(5 + n * 7.3, call("b", tenant="b"), 1.0)
        return sorted(waited + 1.0 for _, traits, waited in simulation.run() if traits.tenant == "b")

    alone, beside = waits(0), waits(5_000)
    assert beside[-1] <= 3 * alone[-1]


def test_a_burst_of_one_tenant_takes_turns_with_the_others():
    simulation = Simulation(1)
    for n in range(300):
        simulation.at(0, call(tenant="abc"[n // 100]), 1.0)
    first = [traits.tenant for _, traits, _ in simulation.run()][:60]
    assert {name: first.count(name) for name in "abc"}.items() >= {"b": 20, "c": 20}.items() or max(
        first.count(name) for name in "abc"
    ) <= 21


def test_a_lone_tenant_has_all_places_and_gives_up_only_what_others_need():
    admission = Admission(4, 100)
    many = [admission.enter(traits=call(tenant="a")) for _ in range(104)]
    with pytest.raises(AegisOverloadedError):
        admission.enter(traits=call(tenant="a"))
    few = [admission.enter(traits=call(tenant="b")) for _ in range(10)]
    stats = admission.stats()
    assert (stats.waiting, stats.refused) == (100, 11)
    evicted = [ticket for ticket in many if ticket.state is State.EVICTED]
    assert evicted == many[-10:]
    with pytest.raises(AegisOverloadedError) as refused:
        evicted[0].wait()
    assert refused.value.retry_after_s > 0
    for _ in range(20):  # b has had its slots after a few of a's
        next(ticket for ticket in (*many, *few) if ticket.running).leave()
    assert sum(ticket.state is not State.WAITING for ticket in few) >= 8


def test_nobody_is_evicted_by_a_tenant_that_has_as_much():
    admission = Admission(1, 4)
    tickets = [admission.enter(traits=call(tenant=name)) for name in "xaabb"]
    for name in "ab":
        with pytest.raises(AegisOverloadedError):
            admission.enter(traits=call(tenant=name))
    assert all(ticket.state is not State.EVICTED for ticket in tickets)


# -- order


@pytest.mark.parametrize("seed", range(20))
def test_calls_that_begin_alike_follow_each_other_in_one_slot(seed):
    """200 calls over 20 contexts, shuffled, 4 slots that keep what they read last: at most 1.3 readings of each."""
    names = [n % 20 for n in range(200)]
    random.Random(seed).shuffle(names)
    slots, read = [], 0

    def service_s(traits):
        # The server takes the free slot that knows most of the prompt, else the one that was not used for longest.
        nonlocal read
        prefix = traits.prefix()
        known = next((slot for slot in slots if slot[0] == prefix and slot[1] <= simulation.clock.now), None)
        slot = known or next((slot for slot in slots if slot[1] <= simulation.clock.now), None)
        if slot is None:
            slots.append(slot := [None, 0])
        read += known is None
        took = 0.3 if known else 11.0
        slots.remove(slot)
        slots.append([prefix, simulation.clock.now + took - 1e-6])
        return took

    simulation = Simulation(4)
    for at, name in enumerate(names):
        simulation.at(at * 1e-4, call(name), service_s)
    simulation.run()
    assert read <= 26
    assert simulation.admission.stats().prefixes_reused >= 150


def test_a_call_whose_beginning_is_in_use_is_not_held_back_while_a_slot_is_free():
    admission = Admission(2)
    assert [admission.enter(traits=call("same")).running for _ in range(2)] == [True, True]


def test_with_a_choice_a_beginning_runs_once():
    admission = Admission(2)
    running = [admission.enter(traits=call("a")), admission.enter(traits=call("x"))]
    twin, other = admission.enter(traits=call("a")), admission.enter(traits=call("b"))
    running[1].leave()
    assert (twin.running, other.running) == (False, True)


@pytest.mark.row(97)
def test_without_a_window_calls_run_as_they_came():
    simulation = Simulation(1, window_ms=0)
    for n in range(30):
        simulation.at(n * 1e-3, call(n % 3, runner=n % 2), 1.0)
    assert [traits.prefix() for _, traits, _ in simulation.run()] == [context(n % 3)() for n in range(30)]


@pytest.mark.parametrize("tenants", [1, 3])
@pytest.mark.parametrize(("service_s", "load_s", "most"), [(0.05, 0, 4), (0.05, 1, 4), (1, 10, 4)])
def test_calls_for_one_runner_follow_each_other(tenants, service_s, load_s, most):
    """Two models with two windows each, in turn, 100 calls. First come, first served would load 100 times."""
    loaded, reloads = {}, 0

    def took_s(traits):
        nonlocal reloads
        known = loaded.get(traits.model)
        loaded[traits.model] = traits.runner
        reloads += known not in (None, traits.runner)
        return service_s + load_s * (known != traits.runner)

    simulation = Simulation(4)
    for n in range(100):
        model, window = "ab"[n % 2], n // 2 % 2
        simulation.at(n * 1e-4, call(tenant=str(n % tenants), model=model, runner=(model, window)), took_s)
    simulation.run()
    assert reloads <= most
    assert simulation.admission.stats().reloads_avoided > 20


@pytest.mark.parametrize("tenants", [1, 3])
@pytest.mark.parametrize(("service_s", "load_s"), [(0.2, 1), (1, 1), (1, 3), (5, 10)])
def test_a_runner_that_takes_long_to_load_has_time_to_answer(service_s, load_s, tenants):
    """Loads come one after another: whoever waits does so for the load, not for others."""
    simulation, loaded, reloads, idle_at = Simulation(4), {}, 0, 0.0

    def took_s(traits):
        nonlocal reloads, idle_at
        known = loaded.get(traits.model)
        loaded[traits.model] = traits.runner
        reloads += known not in (None, traits.runner)
        if known != traits.runner:
            idle_at = max(simulation.clock.now, idle_at) + load_s
        return service_s + (max(0.0, idle_at - simulation.clock.now) if known != traits.runner else 0.0)

    for n in range(100):
        model, window = "ab"[n % 2], n // 2 % 2
        simulation.at(n * 1e-4, call(tenant=str(n % tenants), model=model, runner=(model, window)), took_s)
    simulation.run()
    assert reloads <= 4


def test_nobody_is_overtaken_for_longer_than_its_patience():
    """Calls of one runner come without end; one that needs another waits for two seconds and a slot, not for ever."""
    simulation = Simulation(2)
    for n in range(400):
        simulation.at(n * 0.1, call("busy", runner="loaded"), 0.25)
    simulation.at(1.0, call("other", runner="else"), 0.25)
    simulation.at(1.0, call("different", runner="loaded"), 0.25)
    waits = {traits.prefix(): waited for _, traits, waited in simulation.run() if traits.prefix() != context("busy")()}
    assert all(waited <= 2.0 + 0.25 for waited in waits.values())
    assert len(waits) == 2


@pytest.mark.row(97)
def test_a_group_gives_way_after_max_batch_calls():
    simulation = Simulation(1, max_batch=3)
    for n in range(12):
        simulation.at(n * 1e-3, call("ab"[n % 2]), 0.01)
    order = [traits.prefix() for _, traits, _ in simulation.run()]
    runs = [len(list(group)) for _, group in itertools.groupby(order)]
    assert max(runs) <= 3
    assert len(runs) <= 5


def test_a_prompt_that_cannot_be_read_costs_nothing():
    def broken():
        raise RuntimeError("a message of its own kind")

    admission = Admission(1)
    tickets = [admission.enter(traits=Traits(prefix=broken)) for _ in range(3)]
    for ticket in tickets:
        assert ticket.running
        ticket.leave()


@pytest.mark.slow
def test_a_batch_of_ten_thousand_is_not_quadratic():
    """The number of prompts compared stays in proportion to the number of calls."""
    admission, looked = Admission(4), 0

    def prefix(n):
        def look():
            nonlocal looked
            looked += 1
            return context(n % 50)()

        return look

    tickets = [admission.enter(wait="queue", traits=Traits(prefix=prefix(n))) for n in range(2_000)]
    assert looked == 2_000
    running = tickets[:4]
    while running:
        running.pop().leave()
        running = running or [ticket for ticket in tickets if ticket.running]
        tickets = [ticket for ticket in tickets if ticket.state is not State.LEFT]
    assert admission.stats().running == 0
    assert looked == 2_000


# -- what always holds


class AnyOrder(RuleBasedStateMachine):
    """Calls come, run, leave and are cancelled in any order."""

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.admission = Admission(2, 3, clock=self.clock)
        self.tickets = []

    @rule(
        tenant=st.sampled_from([None, "a", "b"]),
        name=st.sampled_from([None, "x", "y"]),
        runner=st.sampled_from([None, 1, 2]),
        wait=st.sampled_from(["refuse", "patient", "queue", "spare"]),
        deadline_s=st.sampled_from([None, 1.0]),
    )
    def come(self, tenant, name, runner, wait, deadline_s):
        traits = call(name, tenant=tenant, runner=runner)
        before = self.admission.stats()
        try:
            if wait == "spare":
                with background():
                    self.tickets.append(self.admission.enter(traits=traits, deadline_s=deadline_s))
            else:
                self.tickets.append(self.admission.enter(wait=wait, traits=traits, deadline_s=deadline_s))
        except AegisOverloadedError:
            assert wait in ("refuse", "spare")
            assert (before.waiting if wait == "refuse" else before.waiting_spare) == 3

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def leave(self, data):
        ticket = data.draw(st.sampled_from(self.tickets))
        ticket.leave()
        self.tickets.remove(ticket)

    @rule(seconds=st.sampled_from([0.1, 1.5, 5.0]))
    def wait(self, seconds):
        self.clock.now += seconds

    @invariant()
    def the_bounds_hold_and_nobody_is_lost(self):
        stats = self.admission.stats()
        states = [ticket.state for ticket in self.tickets]
        assert states.count(State.RUNNING) == stats.running <= 2
        assert stats.waiting <= 3
        assert stats.waiting_spare <= 3
        assert states.count(State.WAITING) == stats.waiting + stats.waiting_bulk + stats.waiting_spare
        waiting = {ticket.kind for ticket in self.tickets if ticket.state is State.WAITING}
        assert stats.running == 2 or waiting <= {"spare"}
        assert sum(row.refused for row in stats.rows) == stats.refused

    def teardown(self):
        for ticket in self.tickets:
            ticket.leave()
        stats = self.admission.stats()
        assert (stats.running, stats.waiting, stats.waiting_bulk, stats.waiting_spare) == (0, 0, 0, 0)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
