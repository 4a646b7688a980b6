"""Whoever can write to Redis can make a call miss. He cannot have anything served, raised, loaded or waited for."""

import asyncio
import json
import os
import random
import sys
import time
from dataclasses import fields as fields_of

import pytest
from caches import MODEL, Words, chat, prompt, text_of
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, Generation

from faults.measure import PRODUCTION, SLACK, slowness, standing_still
from faults.payloads import BYTES, DOCUMENTS
from faults.recorder import Recorder, questions
from faults.watch import no_tasks_left
from langchain_aegis import aegis_scope
from langchain_aegis.entries import FIELDS, Record, decode_answer, decode_value, unseal
from langchain_aegis.keys import Keyring, Who
from langchain_aegis.seals import Seal
from langchain_aegis.writes import the_writer

SEAL = Seal([b"k" * 32])
QUESTION = "What is the fee of item 7?"


@pytest.fixture
def planted(server, new_recorder, stored):
    """A recorder with one stored answer, and the name and fields of its entry."""
    recorder = new_recorder(url=server.unix_url)
    recorder.ask(QUESTION, "acme")
    stored()
    (name,) = server.entries()
    recorder.entry, recorder.fields, recorder.redis = name, server.client.hgetall(name), server.client
    assert recorder.ask(QUESTION, "acme") is True
    recorder.lookup = _lookup(recorder)
    return recorder


def _lookup(recorder):
    """Look the stored question up as a model does, and store nothing after it."""
    asked = []
    real = recorder.cache._engine.lookup, recorder.cache._engine.begin

    def note(prompt_, llm_string):
        asked.append((prompt_, llm_string))
        return real[1](prompt_, llm_string)

    recorder.cache._engine.begin = note
    recorder.ask(QUESTION, "acme")
    del recorder.cache._engine.begin

    def lookup():
        with aegis_scope(tenant="acme"):
            return recorder.cache.lookup(*asked[0])

    return lookup


def put(recorder, fields):
    pipe = recorder.redis.pipeline(transaction=False)
    pipe.delete(recorder.entry)
    if fields:
        pipe.hset(recorder.entry, mapping=fields)
    pipe.execute()


def signed(recorder, **changed):
    """The entry's fields with some changed, signed by ourselves: what somebody with the secret could write."""
    engine = recorder.cache._engine
    record = unseal(recorder.fields, engine.keyring.seal)
    values = {f.name: getattr(record, f.name) for f in fields_of(Record)}
    return Record(**{**values, **changed}).sealed(engine.keyring.seal)


def judged(found):
    """An answer is a message or text, and nothing else was made of what lay in Redis."""
    if found is None:
        return
    for generation in found:
        assert type(generation) in (ChatGeneration, Generation)
        if type(generation) is ChatGeneration:
            assert type(generation.message) is AIMessage


# -- every change of a stored entry -----------------------------------------------------------------------------------


@pytest.mark.row(27)
def test_an_entry_of_which_any_bit_is_flipped_is_a_miss(planted, rounds):
    """Each bit of each field where it is read; and a sample of them through Redis."""
    key = planted.cache._engine.keyring.seal
    assert unseal(planted.fields, key) is not None
    where = []
    for field, value in planted.fields.items():
        changed = bytearray(value)
        for bit in range(len(value) * 8):
            changed[bit // 8] ^= 1 << bit % 8
            assert unseal({**planted.fields, field: bytes(changed)}, key) is None, (field, bit)
            changed[bit // 8] ^= 1 << bit % 8
            where.append((field, bit))
    assert len(where) > 3_000
    rejected = planted.cache.stats().rejected
    sample = random.Random(27).sample(where, min(len(where), rounds(300)))
    for field, bit in sample:
        changed = bytearray(planted.fields[field])
        changed[bit // 8] ^= 1 << bit % 8
        planted.redis.hset(planted.entry, field, bytes(changed))
        assert planted.lookup() is None, (field, bit)
        planted.redis.hset(planted.entry, field, planted.fields[field])
    assert planted.lookup() is not None
    assert planted.cache.stats().rejected == rejected + len(sample)


@pytest.mark.row(28)
def test_an_entry_of_which_any_field_is_cut_anywhere_is_a_miss(planted):
    key = planted.cache._engine.keyring.seal
    for field, value in planted.fields.items():
        for length in range(len(value)):
            assert unseal({**planted.fields, field: value[:length]}, key) is None, (field, length)
        for short in {value[:-1], value[1:], b""} - {value}:
            planted.redis.hset(planted.entry, field, short)
            assert planted.lookup() is None, field
        planted.redis.hset(planted.entry, field, value)
        planted.redis.hdel(planted.entry, field)
        assert planted.lookup() is None, field
        planted.redis.hset(planted.entry, field, value)
    assert planted.lookup() is not None


@pytest.mark.row(27, 28)
@given(st.sampled_from(FIELDS), st.binary(max_size=100))
def test_a_record_with_any_other_bytes_in_any_field_is_a_miss(field, value):
    record = Record(
        key="0" * 32, scope="1" * 32, emb="e", digest="", created_ms=1, expires_ms=2, epochs="f:3", answer=b"{}"
    )
    told = {n.encode(): v for n, v in record.sealed(SEAL).items()}
    assert unseal({**told, field.encode(): value}, SEAL) in (
        None,
        record if told.get(field.encode(), b"") == value else 0,
    )


# -- true entries in the wrong place or at the wrong time -------------------------------------------------------------


@pytest.mark.row(29)
def test_a_true_entry_of_another_tenant_under_my_name_is_a_miss(server, new_recorder, stored):
    recorder = new_recorder(url=server.unix_url)
    names = {}
    for tenant in ("acme", "globex"):
        before = set(server.entries())
        recorder.ask(QUESTION, tenant)
        stored()
        (names[tenant],) = set(server.entries()) - before
    rejected = recorder.cache.stats().rejected
    for way in ("copy", "rename"):
        if way == "copy":
            server.client.copy(names["globex"], names["acme"], replace=True)
        else:
            server.client.rename(names["globex"], names["acme"])
        assert recorder.ask(QUESTION, "acme") is False  # the recorder sees whose it is
        stored()
        assert recorder.ask(QUESTION, "acme") is True
        recorder.ask(QUESTION, "globex")
        stored()
    assert recorder.cache.stats().rejected == rejected + 2


@pytest.mark.row(29)
def test_a_true_entry_of_another_scope_in_my_search_is_not_served(server, new_recorder, stored):
    """By meaning, too: its name, its scope field or its vector may be another's."""
    recorder = new_recorder(url=server.unix_url, embeddings=Words(), min_similarity=0.6)
    recorder.ask(QUESTION, "globex")
    stored()
    (theirs,) = server.entries()
    recorder.ask("Who may come at night?", "acme")
    stored()
    (mine,) = set(server.entries()) - {theirs}
    own, other = server.client.hgetall(mine), server.client.hgetall(theirs)
    near = "What is the fee of the item 7?"
    for planted in (other, {**other, b"scope": own[b"scope"]}, {**own, b"answer": other[b"answer"]},
                    {**own, b"vec": other[b"vec"]}):  # fmt: skip
        for name in (mine, theirs):
            server.client.delete(name)
            server.client.hset(name, mapping=planted)
            assert recorder.ask(near, "acme") in (True, False)  # the recorder sees whose it is
            stored()
    recorder.wrong_before = list(recorder.wrong)
    assert not recorder.wrong


@pytest.mark.row(30)
@pytest.mark.parametrize("way", ["invalidated", "cleared", "emptied", "expired"])
def test_an_old_entry_that_somebody_puts_back_is_not_served(server, new_recorder, stored, way):
    recorder = new_recorder(url=server.unix_url, **({"ttl_s": 1} if way == "expired" else {}))
    recorder.ask(QUESTION, "acme")
    stored()
    (name,) = server.entries()
    kept, began = server.client.dump(name), time.monotonic()
    if way == "invalidated":
        recorder.cache.invalidate(tenant="acme")
    elif way == "cleared":
        recorder.cache.clear()
    elif way == "emptied":
        server.empty()
        recorder.ask("Another question?", "acme")
        stored()
    else:
        time.sleep(max(0.0, 1.01 - (time.monotonic() - began)))
    server.client.restore(name, 0, kept, replace=True)  # without a time to live
    assert recorder.ask(QUESTION, "acme") is False


# -- hostile values ---------------------------------------------------------------------------------------------------

HOSTILE = {**{n: json.dumps(v).encode() for n, v in DOCUMENTS.items()}, **BYTES}


@pytest.fixture
def audited(monkeypatch):
    """Fails if anything is unpickled, or the variable of a secret is read."""
    told, live = [], [True]

    def hook(event, _):
        if live[0] and event in ("pickle.find_class", "os.system", "subprocess.Popen", "marshal.loads"):
            told.append(event)

    class Watched(type(os.environ)):
        def __getitem__(self, name):
            if name == "AEGIS_FAULT_CANARY":
                told.append("environment")
            return super().__getitem__(name)

    monkeypatch.setenv("AEGIS_FAULT_CANARY", "canary")
    monkeypatch.setattr(os.environ, "__class__", Watched, raising=False)
    sys.addaudithook(hook)  # it stays as long as the process does
    yield told
    live[0] = False
    assert told == []


@pytest.mark.row(31, 32, 33, 36)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_value_is_a_miss_and_nothing_is_made_of_it(planted, name, audited, caplog):
    value = HOSTILE[name]
    took = []
    for field in ("answer", "profile", "epochs", "expires_ms", "sets"):
        if value == planted.fields.get(field.encode(), b""):
            continue
        put(planted, {**planted.fields, field.encode(): value})
        began = time.perf_counter()
        assert planted.lookup() is None, field
        took.append(time.perf_counter() - began)
    # Even with our own signature, it is text, a message, or nothing.
    put(planted, signed(planted, answer=value))
    began = time.perf_counter()
    found = planted.lookup()
    took.append(time.perf_counter() - began)
    judged(found)
    assert found is None or name in SIGNED_ARE_ANSWERS, found
    assert sorted(took)[1] <= 0.010 * SLACK * slowness(), "others may have had the machine meanwhile, but not always"
    assert "failed; the call goes on" not in caplog.text  # which a caught exception says


# With a true signature these are answers: odd ones, but data.
SIGNED_ARE_ANSWERS = {"not a number", "infinite", "huge exponent", "name is a list"}


@pytest.mark.row(31)
@pytest.mark.parametrize("name", HOSTILE)
def test_no_decoder_raises_or_makes_anything_of_a_hostile_value(name, audited):
    for value in (HOSTILE[name], b'{"kind":"value","item":' + HOSTILE[name] + b"}"):
        judged(decode_answer(value))
        told = decode_value(value)
        assert told is None or isinstance(told[1], (dict, list, str, int, float, type(None)))


def test_there_are_more_than_forty():
    assert len(HOSTILE) >= 60


@pytest.mark.row(32)
@pytest.mark.parametrize("name", [n for n, v in DOCUMENTS.items() if isinstance(v, dict)])
def test_a_models_answer_that_holds_such_a_document_comes_back_as_the_data_that_it_is(server, new_cache, name, stored):
    cache = new_cache(url=server.unix_url)
    evil = DOCUMENTS[name]
    told = AIMessage(
        json.dumps(evil), additional_kwargs={"x": evil, "lc": 1, "__lc_escaped__": [evil]},
        response_metadata={"done_reason": "stop"},
        tool_calls=[{"name": "f", "args": {"x": evil}, "id": "1", "type": "tool_call"}],
    )  # fmt: skip
    cache.update(prompt("Why?"), MODEL, [ChatGeneration(message=told)])
    stored()
    (found,) = cache.lookup(prompt("Why?"), MODEL)
    message = found.message
    assert (message.content, message.additional_kwargs) == (told.content, told.additional_kwargs)
    assert message.tool_calls[0]["args"] == {"x": evil}


# -- values that are too large ----------------------------------------------------------------------------------------

LARGE = 50_000_000


@pytest.mark.row(34, 35)
@pytest.mark.parametrize("field", ["answer", "profile", "mac"])
async def test_a_huge_value_is_a_miss_and_holds_no_loop_up(server, new_recorder, stored, field):
    recorder = new_recorder(url=server.unix_url, **PRODUCTION)
    async with no_tasks_left():
        for _ in range(4):
            server.client.flushall()
            await recorder.aask(QUESTION)
            await asyncio.to_thread(stored)
            (name,) = server.entries()
            server.client.hset(name, field, b"x" * LARGE)
            slow = slowness()
            took, still = await standing_still(recorder.aask(QUESTION))  # the recorder looks at the answer
            slow = max(slow, slowness())
            if took <= 0.120 * SLACK * slow and still <= 0.020 * SLACK * slow:
                break
        else:
            pytest.fail(f"took {took:.3f} s, and the loop stood still for {still:.3f} s")
        await recorder.cache.aclose()


@pytest.mark.row(34)
@pytest.mark.parametrize("awaited", [False, True], ids=["blocking", "awaited"])
def test_a_huge_value_is_not_read_to_its_end_and_nobody_has_to_read_it_again(server, new_recorder, stored, awaited):
    recorder = new_recorder(url=server.unix_url, op_budget_s=5)  # which a busy machine may need for so much
    recorder.ask(QUESTION)
    stored()
    (name,) = server.entries()
    server.client.hset(name, "answer", b"x" * LARGE)

    async def one():
        assert await recorder.aask(QUESTION) is False
        await recorder.cache.aclose()

    if awaited:
        asyncio.run(one())
    else:
        assert recorder.ask(QUESTION) is False
    assert recorder.cache.stats().reasons.get("unreadable") == 1
    assert recorder.cache.stats().rejected == 0  # its signature was not looked at
    stored()
    assert not server.entries()
    assert recorder.ask(QUESTION) is False
    stored()
    assert recorder.ask(QUESTION) is True
    assert not recorder.cache._connections.breaker.open


@pytest.mark.row(34)
async def test_who_asks_beside_a_huge_value_misses_at_worst(server, new_recorder, stored):
    recorder = new_recorder(url=server.unix_url, op_budget_s=5)
    asked = questions(10)
    await asyncio.gather(*(recorder.aask(q) for q in asked))
    await asyncio.to_thread(stored)
    names = set(server.entries())
    other = "Who may come at night?"
    await recorder.aask(other)
    await asyncio.to_thread(stored)
    (name,) = set(server.entries()) - names
    server.client.hset(name, "answer", b"x" * LARGE)
    told = await asyncio.gather(recorder.aask(other), *(recorder.aask(q) for q in asked))
    assert told[0] is False
    assert not recorder.cache._connections.breaker.open
    await asyncio.to_thread(stored)
    assert all(await asyncio.gather(*(recorder.aask(q) for q in asked)))  # theirs are still there
    await recorder.cache.aclose()


# -- writers ----------------------------------------------------------------------------------------------------------


@pytest.mark.row(39)
def test_of_two_processes_that_write_one_entry_one_wins_whole(server, new_cache, rounds):
    """Forked children, which begin at once. AEGIS_FAULT_ROUNDS=1000 writes as often as is promised."""
    count, told = rounds(100), {"url": server.unix_url, "namespace": "both", "op_budget_s": 5}
    cache, go, children = new_cache(**told), os.pipe(), []
    for who in "ab":
        if (pid := os.fork()) == 0:
            code = 1
            try:
                own = new_cache(**told)
                os.read(go[0], 1)
                for i in range(count):
                    own.update(prompt("The same question?"), MODEL, chat(f"{who}:{i}:" + who * 2_000))
                assert the_writer.drain(timeout_s=60)
                code = 0 if own.stats().stored == count else 2
            finally:
                os._exit(code)
        children.append(pid)
    os.write(go[1], b"gg")
    seen, ended = set(), []
    while len(ended) < 2:
        if (text := text_of(cache.lookup(prompt("The same question?"), MODEL))) is not None:
            who, _, body = text.split(":")
            assert body == who * 2_000
            seen.add(who)
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in children:
            ended.append(os.waitstatus_to_exitcode(status))
    for end in go:
        os.close(end)
    assert ended == [0, 0]
    assert seen
    assert server.client.ttl(server.entries()[0]) > 0
    assert cache.stats().rejected == 0


# -- other versions, other clocks -------------------------------------------------------------------------------------


@pytest.mark.row(40)
def test_records_of_another_version_are_misses_and_are_written_over_once(planted, server, stored):
    for version in (b"2", b"0", b"", b"1\x00", b"11"):
        put(planted, {**planted.fields, b"v": version, b"new": b"x"})
        before = server.calls("eval")
        assert planted.ask(QUESTION, "acme") is False
        stored()
        assert planted.ask(QUESTION, "acme") is True
        assert planted.ask(QUESTION, "acme") is True
        stored()
        assert server.calls("eval") - before == 1


@pytest.mark.row(40)
def test_fields_that_a_later_version_adds_are_left_alone(planted):
    put(planted, {**planted.fields, b"later": b"x"})
    assert planted.ask(QUESTION, "acme") is True


@pytest.mark.row(41)
@pytest.mark.parametrize("hours", [-1, 1])
@pytest.mark.parametrize("whose", ["writer", "reader"])
def test_a_clock_that_is_an_hour_off_serves_nothing_expired_and_raises_nothing(
    server, new_recorder, stored, hours, whose, monkeypatch
):
    """Either the one who writes or the one who reads has the wrong time."""
    told = {"url": server.unix_url, "namespace": "clocks", "ttl_s": 600}
    writer, reader = new_recorder(**told), new_recorder(**told)
    real = time.time_ns

    def off():
        return real() + hours * 3_600_000_000_000

    with monkeypatch.context() as patch:
        if whose == "writer":
            patch.setattr(time, "time_ns", off)
        writer.ask(QUESTION)
        stored()
    for name in server.entries():
        assert 0 < server.client.ttl(name) <= 600  # Redis counts by its own clock
    with monkeypatch.context() as patch:
        if whose == "reader":
            patch.setattr(time, "time_ns", off)
        # To one who is an hour ahead it has expired; to one an hour behind it comes from the future.
        assert reader.ask(QUESTION) is False
        stored()
    ages = []
    reader.cache._engine.options.__dict__["on_lookup"] = ages.append
    reader.ask(QUESTION)
    assert all(found.similarity in (None, 1.0) for found in ages)


@pytest.mark.row(41)
def test_a_clock_that_steps_back_while_it_runs_changes_no_budget_and_no_age(server, new_recorder, stored, monkeypatch):
    recorder = new_recorder(url=server.unix_url)
    recorder.ask(QUESTION)
    stored()
    real, shift = time.time_ns, [0]
    monkeypatch.setattr(time, "time_ns", lambda: real() - shift[0] * 1_000_000_000)
    for shift[0] in (0, 30, 59):  # within the minute that hosts may differ
        assert recorder.ask(QUESTION) is True
        answer = recorder.model.invoke(QUESTION)
        assert answer.response_metadata["aegis_cache"]["age_s"] >= 0
    shift[0] = 3_600
    hasty = new_recorder(url=server.unix_url, **PRODUCTION)
    with server.frozen():
        began = time.monotonic()
        assert hasty.ask("Another?") is False
        assert time.monotonic() - began <= 0.120 * SLACK * slowness()


# -- keys -------------------------------------------------------------------------------------------------------------

PIECES = st.text(max_size=12) | st.sampled_from(["", "\x00", "\x1f", "|", ":", ",", "a", "ab", "\ud800", "\n\n"])


@pytest.mark.row(42)
@given(st.tuples(PIECES, PIECES, PIECES), st.tuples(PIECES, PIECES, PIECES))
def test_keys_of_different_parts_differ_however_they_are_put_together(one, two):
    keyring = Keyring(b"s" * 32, namespace="n")

    def key(parts):
        tenant, text, task = parts
        who = Who(tenant=tenant or None, user=None, task=task or None)
        return keyring.for_prompt(prompt(text), MODEL, who, None).exact

    if one != two:
        assert key(one) != key(two)


@pytest.mark.row(42)
def test_two_conversations_that_join_to_the_same_text_differ(new_cache, server, stored):
    cache = new_cache(url=server.unix_url)
    cache.update(prompt("ab", "c"), MODEL, chat("one"))
    stored()
    assert cache.lookup(prompt("a", "bc"), MODEL) is None
    assert cache.lookup(prompt("abc"), MODEL) is None
    assert text_of(cache.lookup(prompt("ab", "c"), MODEL)) == "one"
    recorder = Recorder(cache)
    recorder.ask("x\n\nHuman: y")
    stored()
    assert cache.lookup(prompt("x", "y"), MODEL) is None
    assert len(questions(2)) == 2
