"""An embedder may fail, lie or be attacked: that costs a hit by meaning, never a wrong answer and never a call."""

import asyncio
import itertools
import math
import os
import random
import socket
import struct
from dataclasses import fields as fields_of

import pytest
from caches import MODEL, Same, Words, chat, prompt, text_of
from conftest import wait_until

from faults.measure import SLACK, Load, within
from faults.recorder import questions
from langchain_aegis import AegisEmbeddings, AegisSemanticCache, aegis_scope, pairs
from langchain_aegis.calibration import Share
from langchain_aegis.entries import Record, unseal
from langchain_aegis.flows import run
from langchain_aegis.links import AsyncLinks, Links
from langchain_aegis.testing import ScriptedOllama
from langchain_aegis.vectors import pack

STORED, ASKED = "How long may I keep a book?", "How long can I keep a book?"
BOTH = pytest.mark.parametrize("awaited", [False, True], ids=["blocking", "awaited"])


def looks_up(cache, question, awaited=False):
    if not awaited:
        return text_of(cache.lookup(prompt(question), MODEL))

    async def one():
        found = await cache.alookup(prompt(question), MODEL)
        await cache.aclose()
        return text_of(found)

    return asyncio.run(one())


class Odd(Words):
    """Says something else than vectors, when told."""

    model = "odd"

    def __init__(self):
        super().__init__()
        self.says = ()

    def embed_query(self, text):
        return super().embed_query(text) if self.says == () else self.says


ODD = {
    "NaN": [math.nan] + [1.0] * 511, "all NaN": [math.nan] * 512, "infinite": [math.inf] + [0.0] * 511,
    "both infinities": [math.inf, -math.inf] * 256, "zeros": [0.0] * 512, "too large": [1e308] * 512, "empty": [],
    "nested": [[1.0] * 512], "strings": ["1.0"] * 512, "text": "a vector", "none": [None] * 512, "nothing": None,
    "a number": 1.0, "a mapping": {"embedding": [1.0]}, "bytes": b"\x00" * 512, "one number too few": [1.0] * 511,
    "one number too many": [1.0] * 513, "one number": [1.0],
}  # fmt: skip


@pytest.mark.row(43)
@pytest.mark.parametrize("awaited", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["blocking", "awaited"])
@pytest.mark.parametrize("name", ODD)
def test_what_is_no_vector_is_neither_asked_for_nor_stored(server, new_cache, stored, awaited, name):
    """What is of another length is another embedder's. Exact repeats are answered as ever."""
    embedder = Odd()
    cache = new_cache(embeddings=embedder, min_similarity=0.6, op_budget_s=5, embed_budget_s=10)
    cache.update(prompt(STORED), MODEL, chat("28 days"))
    stored()
    assert looks_up(cache, ASKED, awaited) == "28 days"
    embedder.says = ODD[name]
    other = "How long could I keep a book?"
    assert looks_up(cache, other, awaited) is None
    cache.update(prompt(other), MODEL, chat("28 days, as was said"))
    stored()
    assert looks_up(cache, other, awaited) == "28 days, as was said"
    length = len(pack(ODD[name]) or b"")
    assert [len(server.client.hget(n, "vec") or b"") for n in server.entries()].count(1024) == 1
    assert {len(server.client.hget(n, "vec") or b"") for n in server.entries()} == {1024, length}
    assert cache.stats().reasons.get("bad_vector", 0) >= (not length)
    embedder.says = ()
    assert looks_up(cache, "How long might I keep a book?", awaited) in ("28 days", "28 days, as was said")


class Other(Words):
    """As many dimensions, another model."""

    model = "other"


@pytest.mark.row(44)
@BOTH
def test_vectors_of_two_models_are_never_compared(new_cache, stored, awaited):
    told = {"namespace": "two", "min_similarity": 0.6, "op_budget_s": 5, "embed_budget_s": 10}
    one, other = (new_cache(embeddings=e, **told) for e in (Words(), Other()))
    one.update(prompt(STORED), MODEL, chat("28 days"))
    stored()
    assert looks_up(one, ASKED, awaited) == "28 days"
    assert looks_up(other, ASKED, awaited) is None
    assert looks_up(other, STORED, awaited) == "28 days"  # the same question is the same
    assert other.stats().reasons.get("no_candidate", 0) + other.stats().reasons.get("nothing_near", 0) <= 1


BAD_VECTORS = {
    "NaN": struct.pack("<512e", *[math.nan] * 512), "zeros": bytes(1024), "infinite": struct.pack("<e", math.inf) * 512,
    "one NaN": struct.pack("<e", math.nan) + bytes(1022), "cut": b"\x00<" * 511, "empty": b"",
}  # fmt: skip


@pytest.mark.row(45)
@BOTH
@pytest.mark.parametrize("resigned", [False, True], ids=["as written", "with the right signature"])
@pytest.mark.parametrize("name", BAD_VECTORS)
def test_a_vector_that_somebody_writes_over_a_stored_one_is_never_served(
    server, new_cache, stored, awaited, name, resigned
):
    cache = new_cache(embeddings=Words(), min_similarity=0.5, op_budget_s=5, embed_budget_s=10)
    cache.update(prompt(STORED), MODEL, chat("28 days"))
    stored()
    (entry,) = server.entries()
    if resigned:
        seal = cache._engine.keyring.seal
        record = unseal(server.client.hgetall(entry), seal)
        values = {f.name: getattr(record, f.name) for f in fields_of(Record)} | {"vec": BAD_VECTORS[name]}
        server.client.delete(entry)
        server.client.hset(entry, mapping=Record(**values).sealed(seal))
    else:
        server.client.hset(entry, "vec", BAD_VECTORS[name])
    for question in (ASKED, "What does a card cost?", "Who is there?"):
        assert looks_up(cache, question, awaited) is None
    assert looks_up(cache, STORED, awaited) == ("28 days" if resigned else None)


# -- the embedder is away ---------------------------------------------------------------------------------------------


@pytest.fixture
def embedder(request):
    """Embeddings of a server on which something is wrong, and what is undone later."""
    with ScriptedOllama() as ollama:
        url, model = ollama.base_url, "scripted-embed"
        if request.param == "down":
            with socket.socket() as closed:
                closed.bind(("127.0.0.1", 0))
                url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        elif request.param == "without its model":
            model = "bge-m3"
        elif request.param in ("hang", "malformed"):
            ollama.fail(request.param, times=None)
        else:
            ollama.fail(int(request.param), times=None)
        yield AegisEmbeddings(model, base_url=url, timeout=30)


@pytest.mark.row(46)
@pytest.mark.parametrize("how", ["tasks", pytest.param("threads", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "embedder",
    [
        "down",
        "without its model",
        "hang",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("500", "503", "malformed")),
    ],
    indirect=True,
)
@pytest.mark.slow
def test_an_embedder_that_fails_or_says_nothing_costs_hits_by_meaning_alone(
    server, new_recorder, stored, embedder, how
):
    """64 at once; first with the embedder's own budget, then it is left alone."""
    budget_s = 0.2
    recorder = new_recorder(url=server.unix_url, embeddings=embedder, embed_budget_s=budget_s, op_budget_s=5)
    load = Load(recorder, how)
    asked = questions(40)
    first = load(asked)
    assert not first.errors and len(first.took) == 40
    stored()
    # None is waited for longer than the budget; the model, Redis and a busy machine take their time too.
    assert max(first.took) <= budget_s + 2 * SLACK
    again = load(asked)
    assert again.hits == 40 and not again.errors
    if not recorder.cache._engine.embedder.breaker.open:
        load(questions(20, "other"))
    stored()
    alone = Load(recorder, how, at_once=1)
    within(0.010 * SLACK, lambda: alone(questions(10, "new"), recorder=recorder).median)
    reasons = recorder.cache.stats().reasons
    assert reasons.get("embedder_down", 0) + reasons.get("embedder_slow", 0) >= 5


# -- near questions with another answer -------------------------------------------------------------------------------

NOUNS = (
    "printer",
    "ladder",
    "boiler",
    "ferry",
    "lamp",
    "gate",
    "kettle",
    "tent",
    "camera",
    "bridge",
    "lift",
    "roof",
    "stove",
)
NEAR_MISSES = {
    "number": [("How far may the {} fly with {} parts?", [(3, 4), (30, 13), ("1,000", "10,000"), ("2.1", "2.2")])],
    "ordinal": [("Who built the {1} {0}?", [("first", "second"), ("third", "thirteenth")])],
    "date": [
        ("What did the {} cost in {}?", [("May", "June"), ("2019", "2020"), ("winter", "summer")]),
        ("Is the {} open on {}?", [("Monday", "Tuesday"), ("1 May", "2 May"), ("2026-01-02", "2026-02-01")]),
    ],
    "unit": [("May the {} be used for 2 {}?", [("hours", "days"), ("km", "miles"), ("kg", "g"), ("litres", "ml")])],
    "negation": [("Why does the {} {}?", [("work", "not work"), ("start", "never start"), ("open", "fail to open")])],
    "opposite": [
        ("How do I {1} the {0}?", [("open", "close"), ("lock", "unlock"), ("install", "uninstall"), ("start", "stop"),
                                   ("buy", "sell"), ("enable", "disable"), ("attach", "detach")]),
        ("Why is the {} too {}?", [("hot", "cold"), ("fast", "slow"), ("loud", "quiet"), ("large", "small")]),
    ],
    "name": [
        ("How far is the {} from {}?", [("Paris", "Rome"), ("Oslo", "Lima"), ("Zug", "Zuerich")]),
        ("Did {1} sell the {0}?", [("Anna", "Otto"), ("Mr Smith", "Mrs Smith"), ("IBM", "SAP")]),
    ],
    "from and to": [("How does the {} get from {}?", [("Paris to Rome", "Rome to Paris"), ("A to B", "B to A")])],
    "code": [
        ("What does {1} return for a {0}?", [("parse_config", "parse_configs"), ("get()", "set()"), ("is_a", "is_b")]),
        ("Which flag makes the {} {}?", [("-v", "-V"), ("--quiet", "--verbose"), ("x == y", "x != y")]),
    ],
    "comparison": [("Is the {} more than {}?", [("10 m", "100 m"), ("half full", "full")]),
                   ("What weighs {1} the {0}?", [("more than", "less than"), ("as much as", "twice as much as")])],
    "German": [
        ("Wie lange darf ich {1} {0} behalten?", [("3", "4"), ("keinen", "einen"), ("zwei", "drei")]),
        ("Wann {1} der {0}?", [("oeffnet", "schliesst"), ("beginnt", "endet")]),
        ("Wie {1} ich den {0} {2}?", [("schalte", "ein", "aus"), ("stelle", "hoch", "runter")]),
    ],
    "language": [("How do I say {} in {}?", [("French", "Spanish"), ("German", "Dutch")])],
}  # fmt: skip


def near_misses():
    for kind, templates in NEAR_MISSES.items():
        for template, changes in templates:
            for noun, change in itertools.product(NOUNS, changes):
                words = change if len(change) == 2 else None
                both = words or [(change[0], change[1]), (change[0], change[2])]
                one, other = (template.format(noun, *((w,) if isinstance(w, (str, int)) else w)) for w in both)
                yield kind, one, other
                yield kind, other, one


@pytest.mark.row(47)
def test_of_thousands_of_near_questions_hardly_one_gets_the_others_answer(tmp_path):
    """With an embedder for which all questions are the same: what stands between is the guards alone."""
    packaged = [(p.category, p.cached, p.new) for p in pairs.load() if not p.duplicate]
    asked = [*near_misses(), *packaged, *((kind, new, cached) for kind, cached, new in packaged)]
    with AegisSemanticCache(f"unix://{tmp_path}/none", Same()) as cache:
        served = [pair for pair in asked if cache.judge(*pair[1:]).served]
    assert len(asked) >= 2_000
    assert Share(len(served), len(asked)).interval()[1] <= 0.005, served


def _cosine(one, other):
    lengths = math.sqrt(math.fsum(x * x for x in one) * math.fsum(y * y for y in other))
    return math.fsum(x * y for x, y in zip(one, other, strict=True)) / lengths


def _nearer(embed, target, text, steps=6):
    """Append to a question, word by word, what brings it nearest to the target: its own words are nearest of all."""
    goal = embed(target)
    best = _cosine(embed(text), goal)
    for _ in range(steps):
        words = [w for w in target.strip("?!. ").split() if w.lower() not in text.lower().split()]
        tried = [(_cosine(embed(f"{text.rstrip('?')} {w}?"), goal), w) for w in words]
        if not tried or max(tried)[0] <= best:
            return best, text
        best, word = max(tried)
        text = f"{text.rstrip('?')} {word}?"
    return best, text


@pytest.mark.slow
@pytest.mark.row(48)
@pytest.mark.deadline(300)
def test_a_question_that_is_bent_towards_anothers_poisons_hardly_any(minilm, tmp_path, rounds):
    """An attacker of the same scope stores an answer under his question and whatever words bring it near a target.

    Of another scope none is served, whatever it is near to: rows 54 to 56. AEGIS_FAULT_ROUNDS=200 as promised.
    """
    targets = list(dict.fromkeys(p.cached for p in pairs.load() if p.lang == "en"))
    chosen = random.Random(7)
    chosen.shuffle(targets)
    known: dict[str, list[float]] = {}

    def embed(text):
        if text not in known:
            known[text] = minilm.embed_query(text)
        return known[text]

    count, near, served = rounds(60), 0, []
    with AegisSemanticCache(f"unix://{tmp_path}/none", minilm, embed_budget_s=30) as cache:
        for number in range(count):
            target, mine = targets[number % len(targets)], f"{chosen.choice(TAIL)} {chosen.choice(NOUNS)}?"
            similarity, bent = _nearer(embed, target, mine)
            near += similarity >= 0.65
            if cache.judge(bent, target).served:
                served.append((bent, target))
    assert near >= count / 2  # it does get near
    assert len(served) <= 0.05 * count, served


TAIL = ("Why must I pay twice for the", "Where do I send money for the", "Who opens the", "When was the")


# -- the search itself ------------------------------------------------------------------------------------------------


@pytest.mark.row(51)
@BOTH
@pytest.mark.parametrize("way", ["function", "script", "", "plain"])
def test_an_answer_that_ends_during_a_lookup_is_a_miss(request, new_cache, stored, monkeypatch, awaited, way):
    """Before each of its requests: Redis is asked in one where functions or scripts may search, else in several."""
    server = request.getfixturevalue("plain_server" if way == "plain" else "server")
    cache = new_cache(url=server.unix_url, embeddings=Words(), min_similarity=0.6, op_budget_s=5, embed_budget_s=10)
    links = AsyncLinks if awaited else Links
    real, steps = links.ask, []

    def ask(self, request, *rest, **told):
        steps.append(request)
        if len(steps) == before + 1:
            for name in server.entries():
                server.client.pexpire(name, 1)
            wait_until(lambda: not server.entries())
        return real(self, request, *rest, **told)

    for before in range(1, 8):
        cache.update(prompt(STORED), MODEL, chat("28 days"))
        stored()
        if way != "plain":
            cache._engine.store._server_search._way = way
        steps.clear()
        with monkeypatch.context() as patch:
            patch.setattr(links, "ask", ask)
            found = looks_up(cache, ASKED, awaited)
        assert found is None or before >= len(steps) - 1
        if len(steps) <= before:
            assert found == "28 days"
            break
    assert before >= 2
    assert not cache._connections.breaker.open


MANY = int(os.environ.get("AEGIS_FAULT_ENTRIES", "10000"))


@pytest.mark.slow
@pytest.mark.row(50, 52)
@pytest.mark.deadline(600)
def test_among_very_many_entries_of_one_scope_a_search_finds_the_right_one_or_nothing(server, new_cache, stored):
    """Two scopes with the same vectors. Cut short by its own time too. AEGIS_FAULT_ENTRIES=100000 as promised."""
    told = {"namespace": "many", "embeddings": Words(), "min_similarity": 0.6}
    patient = new_cache(**told, op_budget_s=60, embed_budget_s=60, repeats="serve")
    for tenant in ("mine", "theirs"):
        with aegis_scope(tenant=tenant):
            patient.update(prompt(STORED), MODEL, chat(f"28 days, {tenant}"))
    stored()
    seal, chosen = patient._engine.keyring.seal, random.Random(7)
    pipe = server.client.pipeline(transaction=False)
    for name in server.entries():
        record = unseal(server.client.hgetall(name), seal)
        values = {f.name: getattr(record, f.name) for f in fields_of(Record)}
        counts = list(server.client.scan_iter("*:n:*"))
        for number in range(MANY // 2):
            key = f"{chosen.getrandbits(128):032x}"
            near = Words().embed_query(f"word{number} {number} of {number * 7}")
            text = f"another, {values['scope'][:4]}"
            other = {"key": key, "vec": pack(near), "answer": values["answer"].replace(b"28 days", text.encode())}
            pipe.hset(name[:-32] + key.encode(), mapping=Record(**{**values, **other}).sealed(seal))
            pipe.pexpire(name[:-32] + key.encode(), 600_000)
            if number % 500 == 0:
                pipe.execute()
    pipe.execute()
    for name in counts:
        for place in server.client.hkeys(name):
            server.client.hset(name, place, MANY // 2)
    quick = new_cache(**told, embed_budget_s=10, repeats="serve")
    # A search along the graph of a large scope may not come by the only one that is near: that is a miss.
    for cache, least in ((patient, 0.9 if MANY <= 10_000 else 0.0), (quick, 0.0)):
        for tenant in ("mine", "theirs"):
            with aegis_scope(tenant=tenant):
                found = [looks_up(cache, ASKED) for _ in range(50)]
                assert {*found} <= {None, f"28 days, {tenant}"}
                assert found.count(None) <= (1 - least) * 50
    # A search that may take a millisecond and no more tells what it found of this scope, or nothing.
    store, perform = patient._engine.store, patient._connections.perform
    for name in server.entries()[:2]:
        scope, emb = (server.client.hget(name, f).decode() for f in ("scope", "emb"))
        for _ in range(50):
            epochs = run(store.epochs(["namespace"]), perform)
            near = run(store.nearest(scope, emb, pack(Words().embed_query(ASKED)), 5, epochs, 1), perform).near
            assert all(one.record.scope == scope for one in near)
