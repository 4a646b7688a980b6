"""What is encrypted cannot be read, moved or changed in Redis, and keys change while all is served."""

import asyncio
import os
import random
from itertools import pairwise

import pytest
from caches import MODEL, Words, call_once, chat, prompt, text_of
from conftest import wait_until
from langchain_core.messages import HumanMessage

from faults.test_integrity import signed
from faults.test_secrets import all_that_redis_holds
from langchain_aegis import AegisSettings, aegis_scope
from langchain_aegis.embedding_cache import AegisEmbeddingCache
from langchain_aegis.entries import unseal
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.flows import run
from langchain_aegis.writes import the_writer

FIRST, SECOND = "the first key of records", "the second key of records"
CANARY = "canary4711"
BOOK, NEAR_BOOK = "How long may I keep a book?", "How long can I keep a book?"
MEANING = {"embeddings": Words(), "min_similarity": 0.6, "embed_budget_s": 10, "repeats": "serve"}
BOTH = pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "encrypted"])
WAYS = pytest.mark.parametrize("awaited", [False, True], ids=["blocking", "awaited"])


def asked(cache, question, awaited=False):
    return text_of(call_once(awaited, cache, "lookup", prompt(question), MODEL))


def taught(cache, question=BOOK, answer="28 days", awaited=False):
    """As LangChain does it: looked up, made, stored."""

    async def both():
        try:
            found = await cache.alookup(prompt(question), MODEL)
            if found is None:
                await cache.aupdate(prompt(question), MODEL, chat(answer))
            return found
        finally:
            await cache.aclose()

    if awaited:
        found = asyncio.run(both())
    elif (found := cache.lookup(prompt(question), MODEL)) is None:
        cache.update(prompt(question), MODEL, chat(answer))
    assert the_writer.drain(timeout_s=10)
    return text_of(found)


@pytest.fixture
def kept(server, new_cache):
    """Makes caches of one namespace: `kept(encrypt=..., record_keys=..., **options)`."""

    def make(encrypt=False, record_keys=(), secret_key=None, **options):
        settings = AegisSettings(encrypt=encrypt, record_keys=record_keys, secret_key=secret_key)
        return new_cache(url=server.unix_url, namespace="kept", settings=settings, **{**MEANING, **options})

    return make


# -- what is there ----------------------------------------------------------------------------------------------------


@pytest.mark.row(61)
@WAYS
def test_an_encrypting_cache_answers_as_ever_and_redis_holds_no_word_of_it(server, kept, awaited, tmp_path):
    """Keys, values, arguments of commands, and what `export` writes; questions are kept here, too."""
    server.client.config_set("slowlog-log-slower-than", 0)
    server.client.execute_command("SLOWLOG", "RESET")
    cache = kept(encrypt=True, keep_questions=True)
    question, near = f"How long may I keep {CANARY}?", f"How long can I keep {CANARY}?"
    with aegis_scope(tenant=CANARY, task=f"the task {CANARY}"):
        assert taught(cache, question, f"28 days, {CANARY}", awaited) is None
        assert asked(cache, question, awaited) == f"28 days, {CANARY}"
        assert asked(cache, near, awaited) == f"28 days, {CANARY}"
        (entry,) = cache.entries()
        assert (entry.question, entry.task) == (question, f"the task {CANARY}")
    assert cache.export(tmp_path / "answers") == 1
    held = all_that_redis_holds(server)
    server.client.config_set("slowlog-log-slower-than", 10_000)
    assert "EVAL" in held
    assert CANARY not in held + repr([server.client.hgetall(name) for name in server.entries()])
    assert CANARY not in (tmp_path / "answers").read_text()
    assert kept(encrypt=True).import_(tmp_path / "answers").left in ({}, {"older": 1})


def test_an_export_is_imported_where_records_are_encrypted_alike(kept, tmp_path):
    for encrypt in (False, True):
        cache = kept(encrypt=encrypt)
        cache.clear()
        taught(cache)
        cache.export(tmp_path / "answers")
        cache.clear()
        with pytest.raises(AegisConfigError, match="AEGIS_ENCRYPT"):
            kept(encrypt=not encrypt).import_(tmp_path / "answers")


# -- every change of it -----------------------------------------------------------------------------------------------


@pytest.mark.row(27, 28, 29)
@BOTH
def test_an_entry_with_a_vector_and_a_profile_is_a_miss_however_it_is_changed(server, kept, rounds, encrypt):
    """Each bit and each cut where it is read, and a sample through Redis, asked exactly and by meaning."""
    cache = kept(encrypt=encrypt)
    taught(cache)
    (name,) = server.entries()
    fields = server.client.hgetall(name)
    assert (b"profile" in fields) is not encrypt
    assert b"vec" in fields
    seal = cache._engine.keyring.seal
    changes = [(field, value[:length]) for field, value in fields.items() for length in range(len(value))]
    for field, value in fields.items():
        changed = bytearray(value)
        for bit in range(len(value) * 8):
            changed[bit // 8] ^= 1 << bit % 8
            changes.append((field, bytes(changed)))
            changed[bit // 8] ^= 1 << bit % 8
    drawn = random.Random(3)
    for field, value in [*(c for c in changes if c[0] != b"vec"), *drawn.sample(changes, 1_000)]:
        assert unseal({**fields, field: value}, seal) is None, field
    sample = [drawn.choice([c for c in changes if c[0] == field]) for field in fields for _ in range(rounds(3))]
    for field, value in sample:
        server.client.hset(name, field, value)
        assert asked(cache, BOOK) is None, field
        assert asked(cache, NEAR_BOOK) is None, field
        server.client.hset(name, field, fields[field])
    assert asked(cache, NEAR_BOOK) == asked(cache, BOOK) == "28 days"


@pytest.mark.row(29)
def test_an_answer_under_another_name_or_in_another_entry_is_a_miss(server, kept):
    cache = kept(encrypt=True)
    names = {}
    for tenant in ("acme", "globex"):
        before = set(server.entries())
        with aegis_scope(tenant=tenant):
            taught(cache, BOOK, tenant)
        (names[tenant],) = set(server.entries()) - before
    mine, theirs = (server.client.hgetall(names[tenant]) for tenant in ("acme", "globex"))
    moved = {**mine, b"answer": theirs[b"answer"]}
    for planted in (theirs, moved, {**moved, b"mac": theirs[b"mac"]}, {**theirs, b"key": mine[b"key"]}):
        server.client.delete(names["acme"])
        server.client.hset(names["acme"], mapping=planted)
        with aegis_scope(tenant="acme"):
            assert asked(cache, BOOK) is None
            assert asked(cache, NEAR_BOOK) is None


@pytest.mark.row(31, 36)
def test_hostile_values_that_are_truly_encrypted_are_answers_or_nothing(server, kept):
    from faults.test_integrity import HOSTILE, SIGNED_ARE_ANSWERS, judged

    cache = kept(encrypt=True)
    taught(cache)
    (cache.entry,) = server.entries()
    cache.fields, cache.cache = server.client.hgetall(cache.entry), cache
    for name, value in HOSTILE.items():
        server.client.hset(cache.entry, mapping=signed(cache, answer=value))
        found = cache.lookup(prompt(BOOK), MODEL)
        judged(found)
        assert found is None or name in SIGNED_ARE_ANSWERS, name


# -- hosts that differ ------------------------------------------------------------------------------------------------


@WAYS
def test_plain_and_encrypted_entries_of_one_name_are_misses_to_each_other_and_written_over(
    server, kept, awaited, caplog
):
    plain, encrypting = kept(), kept(encrypt=True)
    for _ in range(2):
        for cache, answer in ((plain, "plain"), (encrypting, "encrypted")):
            assert taught(cache, BOOK, answer, awaited) is None
            assert asked(cache, BOOK, awaited) == answer
            assert len(server.entries()) == 1
    assert asked(plain, NEAR_BOOK, awaited) is None
    assert asked(plain, BOOK, awaited) is None
    ours = [r.getMessage().partition(":")[0] for r in caplog.records if r.name.startswith("langchain_aegis")]
    assert ours.count("other_encryption") == 1
    assert plain.invalidate(older_than_s=0) == 1, "it removes what it cannot read"
    assert asked(encrypting, BOOK, awaited) is None


@BOTH
@WAYS
def test_keys_are_rotated_while_both_old_and_new_processes_are_served(server, kept, awaited, encrypt):
    """As an operator does it: the new key is added, then signs, then is alone."""
    steps = [kept(encrypt, keys) for keys in (("secret",), ("secret", FIRST), (FIRST, "secret"), (FIRST,))]
    for before, after in pairwise(steps):
        server.client.flushall()
        taught(before, BOOK, "of before", awaited)
        last = after is steps[3]
        # With the step before, the key that signs now is known already; only who drops the old one loses its entries.
        assert asked(after, BOOK, awaited) == "of before"
        assert asked(after, NEAR_BOOK, awaited) == "of before"
        taught(after, "What does a card cost?", "of after", awaited)
        assert asked(before, "What does a card cost?", awaited) == "of after"
        assert after.invalidate(model="m") == 2, "whoever signed them"
        assert asked(before, BOOK, awaited) is None
        assert last or asked(after, BOOK, awaited) is None


@BOTH
def test_a_key_that_leaked_is_dropped_at_once_and_what_it_signed_is_a_miss(kept, encrypt):
    leaked, fresh = kept(encrypt, (FIRST,)), kept(encrypt, (SECOND,))
    taught(leaked, BOOK, "forged, perhaps")
    assert asked(fresh, BOOK) is None
    assert asked(fresh, NEAR_BOOK) is None
    assert taught(fresh, BOOK, "28 days") is None
    assert asked(fresh, NEAR_BOOK) == "28 days"
    assert asked(leaked, BOOK) is None


@pytest.mark.parametrize("named", [{"near": NEAR_BOOK}, {"near": NEAR_BOOK, "tenant": "acme"}, {"older_than_s": 0}])
def test_what_another_host_signs_with_a_key_or_encryption_of_its_own_is_invalidated_from_here(server, kept, named):
    """It would go on to serve it, and whoever has invalidated it believes that nobody does."""
    hosts = [kept(False, (FIRST,)), kept(False, (SECOND,)), kept(True, (FIRST,))]
    for other in hosts[1:]:
        for tenant in ("acme", "globex"):
            with aegis_scope(tenant=tenant):
                taught(other)
        whose = 1 if "tenant" in named else 2
        assert hosts[0].invalidate(**named) == whose
        with aegis_scope(tenant="acme"):
            assert asked(other, BOOK) is None
            assert asked(other, NEAR_BOOK) is None
        with aegis_scope(tenant="globex"):
            assert asked(other, BOOK) == ("28 days" if whose == 1 else None)
        hosts[0].clear()


@pytest.mark.row(16)
@WAYS
def test_where_there_is_no_search_an_invalidation_by_nearness_looks_at_every_entry(plain_server, new_cache, awaited):
    def host(**keys):
        settings = AegisSettings(**keys)
        return new_cache(url=plain_server.unix_url, namespace="plain", settings=settings, **MEANING)

    ours, theirs = host(), host(encrypt=True)
    for tenant in ("acme", "globex"):
        with aegis_scope(tenant=tenant):
            taught(ours, BOOK, "28 days", awaited)
            taught(theirs, "How long may I keep a film?", "7 days", awaited)
            taught(ours, "What does a card cost?", "4 euros", awaited)
    assert call_once(awaited, ours, "invalidate", near=NEAR_BOOK, tenant="acme") == 2
    for tenant, book, film in (("acme", None, None), ("globex", "28 days", "7 days")):
        with aegis_scope(tenant=tenant):
            assert asked(ours, BOOK, awaited) == book
            assert asked(theirs, "How long may I keep a film?", awaited) == film
            assert asked(ours, "What does a card cost?", awaited) == "4 euros"
    assert call_once(awaited, ours, "invalidate", near=NEAR_BOOK) == 2


@pytest.mark.row(14)
@WAYS
def test_an_invalidation_by_nearness_removes_what_it_should_although_the_index_is_gone(server, kept, awaited):
    cache = kept()
    taught(cache, BOOK, "28 days", awaited)
    for index in server.indexes():
        server.client.execute_command("FT.DROPINDEX", index)
    assert asked(cache, BOOK, awaited) == "28 days"
    assert call_once(awaited, cache, "invalidate", near=NEAR_BOOK) == 1
    assert asked(cache, BOOK, awaited) is None


@pytest.mark.row(29)
def test_what_cannot_be_read_is_never_served_however_near_it_says_that_it_is(kept):
    ours = kept(False, (FIRST,))
    taught(kept(False, (SECOND,)))
    for question in (BOOK, NEAR_BOOK):
        assert asked(ours, question) is None
        explained = ours.explain(prompt=[HumanMessage(question)], llm_string=MODEL)
        assert (explained.decision, explained.candidates) == ("miss", ())


def test_hits_and_scores_of_before_a_rotation_are_still_known_after_it(kept):
    before, after, gone = (kept(False, keys) for keys in ((FIRST,), (SECOND, FIRST), (SECOND,)))
    taught(before)
    (hit,) = before.lookup(prompt(NEAR_BOOK), MODEL)
    store = before._engine.store
    run(store.note("a" * 32, "b" * 32, "0.125"), before._connections.perform)
    told = run(_notes(store, "a" * 32), before._connections.perform)
    assert after._engine.store._notes("a" * 32, told) == {"b" * 32: "0.125"}
    assert gone._engine.store._notes("a" * 32, told) == {}
    with pytest.raises(AegisConfigError, match="report_wrong takes"):
        gone.report_wrong(hit.message)
    assert after.report_wrong(hit.message) is True


def _notes(store, asked):
    from langchain_aegis.store import Commands

    (told,) = yield Commands(store._asks(asked))
    return told


@pytest.mark.row(40)
@BOTH
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_processes_with_old_and_new_keys_serve_beside_each_other_and_nothing_wrong(server, new_cache, rounds, encrypt):
    """Forked children of every step of a rotation, which ask for the same answers at once."""
    count = rounds(60)
    url, go, children = server.unix_url, os.pipe(), []
    for keys in (("secret", FIRST), (FIRST, "secret"), (FIRST,), ("secret",)):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                settings = AegisSettings(encrypt=encrypt, record_keys=keys)
                own = new_cache(url=url, namespace="turning", settings=settings, **MEANING)
                os.read(go[0], 1)
                for number in range(count):
                    question, answer = f"What is the fee of item {number % 7}?", f"{number % 7} euros"
                    found = taught(own, question, answer)
                    assert found in (None, answer), found
                # Who has both keys makes each answer once at most; the others write over what they cannot read.
                code = 0 if own.stats().misses <= (7 if len(keys) == 2 else count) else 2
            finally:
                os._exit(code)
        children.append(pid)
    os.write(go[1], b"g" * len(children))
    ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    for end in go:
        os.close(end)
    assert ended == [0] * len(children)


# -- hosts with different secrets -------------------------------------------------------------------------------------


@WAYS
def test_a_host_with_another_secret_is_told_once_and_cannot_claim_to_have_removed_anything(kept, caplog, awaited):
    ours, theirs = kept(secret_key="of the first host, long"), kept(secret_key="of the second host, long")
    taught(ours, BOOK, "ours", awaited)
    for _ in range(2):
        assert asked(theirs, BOOK, awaited) is None
        assert asked(theirs, NEAR_BOOK, awaited) is None
    said = [r.getMessage() for r in caplog.records if r.name.startswith("langchain_aegis")]
    (told,) = [text for text in said if text.startswith("another_secret")]
    assert "AEGIS_SECRET_KEY" in told, "it says what to do"
    (hit,) = ours.lookup(prompt(BOOK), MODEL)
    for name, named in (
        ("invalidate", {"sources": ["a.md"]}), ("invalidate", {"tenant": "acme"}), ("invalidate", {"user": "u"}),
        ("invalidate", {"task": "faq"}), ("invalidate", {"model": "m"}), ("invalidate", {"older_than_s": 0}),
        ("invalidate", {"near": BOOK}), ("clear", {}), ("opt_out", {"user": "u"}), ("opt_in", {"user": "u"}),
    ):  # fmt: skip
        with pytest.raises(AegisConfigError, match="AEGIS_SECRET_KEY"):
            call_once(awaited, theirs, name, **named)
    with pytest.raises(AegisConfigError, match="with this secret"):
        call_once(awaited, theirs, "report_wrong", hit.message)
    assert asked(ours, NEAR_BOOK, awaited) == "ours"
    assert ours.invalidate(model="m") == 1


def test_the_local_tier_holds_what_is_encrypted_as_it_lies_in_redis(kept):
    cache = kept(encrypt=True, local_tier_bytes=1_000_000)
    taught(cache)
    wait_until(lambda: asked(cache, BOOK) == "28 days" and cache.stats().local.hits, what="a hit of the local tier")
    (held,) = cache._connections.tier._held.values()
    assert held[0]
    assert b"28 days" not in b"".join(value for reply in held[1] for value in reply if value is not None)


# -- kept vectors -----------------------------------------------------------------------------------------------------


def test_kept_vectors_are_encrypted_too_and_their_keys_rotate(server):
    def vectors(encrypt, *keys):
        settings = AegisSettings(encrypt=encrypt, record_keys=keys, namespace="vectors", op_budget_s=5)
        made = AegisEmbeddingCache(redis_url=server.unix_url, settings=settings)
        made.model = made.model_key("words")
        return made

    def found(cache, **told):
        return run(cache.ask_redis(cache.model, ["a text"], **told), cache.perform).get("a text")

    packed = bytes(range(64)) * 4
    first, both, second = vectors(True, FIRST), vectors(True, SECOND, FIRST), vectors(True, SECOND)
    run(first.keep(first.model, {"a text": packed}), first.perform)
    (name,) = server.client.keys("vectors:*")
    value = server.client.get(name)
    assert packed not in value
    assert found(first) == found(both) is not None
    assert len(found(first, dimensions=64)) == 64
    for stranger in (second, vectors(False, FIRST), vectors(False)):
        assert found(stranger) is None
    assert found(vectors(True, FIRST), dimensions=63) is None
    for at in range(len(value)):
        server.client.set(name, value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :])
        assert found(first) is None, at
        server.client.set(name, value[:at])
        assert found(first) is None, at
    plain = vectors(False, FIRST)
    run(plain.keep(plain.model, {"a text": packed}), plain.perform)
    assert packed in server.client.get(name)
    assert found(plain) is not None
    assert found(first) is None
