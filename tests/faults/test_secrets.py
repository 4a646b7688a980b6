"""What somebody asks, who asks, and what opens a door stands in no log, name, error or picture of an object."""

import asyncio
import logging
import time
import traceback
from functools import partial

import pytest
from caches import MODEL, Words, call_once, chat, prompt, text_of
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.outputs import ChatGeneration, ChatResult

from faults.proxy import Proxy
from faults.recorder import Speaking
from langchain_aegis import (
    AegisEmbeddingCache,
    AegisEmbeddings,
    AegisError,
    AegisSemanticCache,
    AegisSettings,
    BatchingChatModel,
    ChatAegis,
    aegis_scope,
)
from langchain_aegis.testing import ScriptedOllama

CANARY = "canary7f3a"
QUESTION = f"How long may I keep {CANARY} books?"
SECRET = f"{CANARY} is the secret of this test, long enough"


def all_that_redis_holds(server):
    """Every name and value but answers, and what is told to whoever administers it."""
    told = []
    for name in server.client.scan_iter("*", count=1_000):
        told.append(name)
        kind = server.client.type(name)
        if kind == b"hash":
            told += [(k, v) for k, v in server.client.hgetall(name).items() if k != b"answer"]
        elif kind == b"zset":
            told += server.client.zrange(name, 0, -1)
        elif kind == b"set":
            told += server.client.smembers(name)
        else:
            told.append(server.client.get(name))
    told += server.indexes()
    told += [entry["command"] for entry in server.client.slowlog_get(10_000)]
    told += [server.client.execute_command("FUNCTION", "LIST"), server.client.execute_command("CLIENT", "LIST")]
    return repr(told)


@pytest.mark.row(61)
@pytest.mark.parametrize("awaited", [False, True], ids=["blocking", "awaited"])
def test_nothing_of_a_call_but_its_answer_stands_in_redis_or_in_a_log(
    server, new_cache, stored, caplog, monkeypatch, tmp_path, awaited
):
    """But for the name of a task, which an operator chooses: `aegis cache inspect` shows it."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("AEGIS_SECRET_KEY", SECRET)
    server.client.config_set("slowlog-log-slower-than", 0)
    server.client.execute_command("SLOWLOG", "RESET")
    cache = new_cache(embeddings=Words(), min_similarity=0.6, op_budget_s=5, embed_budget_s=10)

    call = partial(call_once, awaited, cache)
    asked = prompt(SystemMessage(f"You know {CANARY}."), HumanMessage(QUESTION))
    near = prompt(SystemMessage(f"You know {CANARY}."), HumanMessage(QUESTION.replace("may", "can")))
    with aegis_scope(tenant=f"{CANARY} Ltd", user=f"{CANARY}@example.org", task="faq", sources=[f"{CANARY}.md"]):
        call("lookup", asked, MODEL.replace("'m'", f"'{CANARY}'"))
        call("update", asked, MODEL.replace("'m'", f"'{CANARY}'"), chat("28 days"))
        stored()
        found = call("lookup", near, MODEL.replace("'m'", f"'{CANARY}'"))
        assert text_of(found) == "28 days"
        assert CANARY not in repr(found)
        pictures = [repr(cache), str(cache), repr(cache.stats()), repr(cache.health()), repr(list(cache.entries()))]
        cache.export(tmp_path / "answers")
        held = all_that_redis_holds(server)
        assert held.count("HSET") or held.count("EVAL")
        cache.report_wrong(found[0].message)
        call("invalidate", sources=[f"{CANARY}.md"])
        call("invalidate", near=QUESTION)
        cache.opt_out(f"{CANARY}@example.org")
    held += all_that_redis_holds(server)
    server.client.config_set("slowlog-log-slower-than", 10_000)
    at = held.find(CANARY)
    assert at < 0, held[max(0, at - 200) : at + 100]
    assert CANARY not in (tmp_path / "answers").read_text()
    assert CANARY not in "".join(pictures)
    ours = [r for r in caplog.records if r.name.startswith("langchain_aegis")]
    assert CANARY not in "".join(f"{r.getMessage()} {r.exc_text}" for r in ours)


@pytest.mark.row(61)
def test_nothing_that_opens_a_door_stands_in_an_error_a_log_or_a_picture(server, caplog, monkeypatch, tmp_path):
    """Servers that are away, refuse, or answer nonsense; addresses that are wrong."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("AEGIS_SECRET_KEY", SECRET)
    said = []

    def note(*things):
        for thing in things:
            said.extend((repr(thing), str(thing)))
            if isinstance(thing, BaseException):
                said.append("".join(traceback.format_exception(thing)))

    with ScriptedOllama("chat") as ollama:
        address = ollama.base_url.replace("://", f"://{CANARY}:{CANARY}@")
        model = ChatAegis("chat", base_url=address, temperature=0, cache=False)
        embeddings = AegisEmbeddings("scripted-embed", base_url=address, cache=AegisEmbeddingCache())
        note(model, embeddings, model._identifying_params, model._get_llm_string())
        model.invoke("Hello?")
        for fault in (400, 404, 500, 503, "cut", "error", "malformed", "no_done"):
            ollama.fail(fault, times=None)
            for call in (lambda: model.invoke(QUESTION), lambda: embeddings.embed_query(QUESTION)):
                try:
                    call()
                except AegisError as exc:
                    note(exc, exc.__cause__, exc.__context__)
            ollama.heal()
    for call in (lambda: model.invoke("Hello?"), lambda: embeddings.embed_query("Hello, again?")):
        with pytest.raises(AegisError) as caught:
            call()
        note(caught.value, caught.value.__cause__)

    for url in (
        f"redis://{CANARY}:{CANARY}@{server.url.partition('//')[2]}", f"unix://:{CANARY}@{tmp_path}/none",
        f"rediss://:{CANARY}@{server.url.partition('//')[2]}", f"redis://:{CANARY}@[::1", f"http://:{CANARY}@host",
        f"redis://:{CANARY}@127.0.0.1:1/0?nothing={CANARY}",
    ):  # fmt: skip
        try:
            with AegisSemanticCache(url, Words(), settings=AegisSettings(redis_url=url)) as cache:
                note(cache, cache.settings, cache._connections, cache.lookup(prompt("Hello?"), MODEL), cache.health())
                note(cache.stats(), cache._engine.keyring)
                cache.invalidate(tenant="x")
        except AegisError as exc:
            note(exc, exc.__cause__, exc.__context__)
    assert CANARY not in "".join(said)
    ours = [r for r in caplog.records if r.name.startswith("langchain_aegis")]
    assert ours
    assert CANARY not in "".join(f"{r.getMessage()} {r.exc_text or ''} {r.exc_info or ''}" for r in ours)


# -- what a miss tells of others --------------------------------------------------------------------------------------


@pytest.mark.row(60)
@pytest.mark.parametrize("awaited", [False, True], ids=["blocking", "awaited"])
def test_a_miss_looks_the_same_whether_or_not_another_tenant_has_the_answer(server, new_cache, stored, awaited):
    """As many requests of as many bytes, and as many bytes in reply: there is nothing that could take longer."""
    traffic = []

    def noted(way):
        def pass_on(data):
            traffic.append((way, len(data)))
            return data

        return pass_on

    with Proxy(str(server.socket)) as proxy:
        told = {"url": proxy.url, "embeddings": Words(), "min_similarity": 0.6, "op_budget_s": 5, "embed_budget_s": 10}
        cache = new_cache(**told, require_tenant=True)

        def miss(question):
            traffic.clear()
            with aegis_scope(tenant="prying"):
                if awaited:
                    assert loop.run_until_complete(cache.alookup(prompt(question), MODEL)) is None
                else:
                    assert cache.lookup(prompt(question), MODEL) is None
            return sorted(traffic)

        loop = asyncio.new_event_loop()
        for tenant in ("acme", "prying"):
            with aegis_scope(tenant=tenant):
                cache.update(prompt("Who opens the gate?"), MODEL, chat("Otto"))
        with aegis_scope(tenant="acme"):
            cache.update(prompt("How long may I keep a book?"), MODEL, chat("28 days"))
        stored()
        proxy.up.rewrite, proxy.down.rewrite = noted("asked"), noted("told")
        for _ in range(3):
            miss("How long shall I keep a coat?")
            # The same words in another order would be another vector: only what acme has differs.
            has, near, has_not = (
                miss(f"How long {word} I keep a {thing}?")
                for word, thing in (("may", "book"), ("can", "book"), ("may", "film"))
            )
            assert has == near == has_not
        loop.run_until_complete(cache.aclose())
        loop.close()


@pytest.mark.slow
@pytest.mark.row(60)
def test_a_miss_takes_as_long_whether_or_not_another_tenant_has_the_answer(server, new_cache, stored):
    """2,000 probes; the shares of those that take longer than the other kind's median are as of one kind.

    By the rule of signs over pairs that were made one after the other: a machine that is busy is so for both.
    """
    cache = new_cache(embeddings=Words(), min_similarity=0.6, op_budget_s=5, embed_budget_s=10, require_tenant=True)
    with aegis_scope(tenant="acme"):
        cache.update(prompt("How long may I keep a book?"), MODEL, chat("28 days"))
    stored()
    asked = [prompt(f"How long may I keep a {thing}?") for thing in ("book", "film")]
    longer = 0
    with aegis_scope(tenant="prying"):
        for number in range(1_000):
            took = [0.0, 0.0]
            for which in (0, 1) if number % 2 else (1, 0):
                began = time.perf_counter()
                assert cache.lookup(asked[which], MODEL) is None
                took[which] = time.perf_counter() - began
            longer += took[0] > took[1]
    assert 500 - 4 * 16 < longer < 500 + 4 * 16, longer  # four standard deviations


# -- one tenant is removed --------------------------------------------------------------------------------------------


@pytest.mark.row(62)
@pytest.mark.parametrize("namespace", ["aegis", "a-b_c.d"])
def test_of_three_tenants_one_is_removed_without_looking_through_all_names(server, new_recorder, stored, namespace):
    recorder = new_recorder(url=server.unix_url, namespace=namespace, op_budget_s=5)
    other = new_recorder(url=server.unix_url, namespace=f"{namespace}2", op_budget_s=5)
    tenants = ("*", "acme", "acme*")
    for one in (recorder, other):
        for tenant in tenants:
            for number in range(6):
                one.ask(f"What is the fee of item {number}?", tenant)
        stored()
    keys, scans = server.calls("keys"), server.calls("scan")
    assert recorder.cache.invalidate(tenant="acme*") == 6
    assert recorder.cache.invalidate(tenant="*") == 6
    assert (server.calls("keys"), server.calls("scan")) == (keys, scans)
    hits = {t: [recorder.ask(f"What is the fee of item {n}?", t) for n in range(6)] for t in tenants}
    assert hits == {"acme": [True] * 6, "*": [False] * 6, "acme*": [False] * 6}
    assert all(other.ask(f"What is the fee of item {n}?", t) for n in range(6) for t in tenants)


@pytest.mark.row(62)
@pytest.mark.parametrize("namespace", ["a*", "a?", "[a]", "a{b}", "a b", "a\nb", "", "\\"])
def test_a_namespace_that_would_mean_more_than_itself_is_refused(namespace):
    with pytest.raises(AegisError, match="namespace"):
        AegisSemanticCache("redis://127.0.0.1", Words(), namespace=namespace)


# -- many tenants at once ---------------------------------------------------------------------------------------------


@pytest.mark.row(57, 58)
@pytest.mark.parametrize("same", [True, False], ids=["the same question", "questions of their own"])
async def test_of_many_tenants_who_ask_at_once_each_gets_its_own_answer(server, new_cache, same):
    """Through admission and the cache: equal calls become one, but never those of two tenants."""
    cache = new_cache(op_budget_s=5, require_tenant=True)
    made = Numbered()
    batching = BatchingChatModel(made, cache=cache, max_waiting=2_000)
    answers: dict[str, set[str]] = {}

    async def one(number):
        tenant = f"tenant {number % 20}"
        question = "What is the fee?" if same else f"What is the fee of item {number % 7}?"
        with aegis_scope(tenant=tenant):
            answer = await batching.ainvoke(question)
        assert answer.content.endswith(question)
        answers.setdefault(tenant, set()).add(answer.content)

    await asyncio.gather(*(one(number) for number in range(280)))
    await cache.aclose()
    calls = [answer for told in answers.values() for answer in told]
    assert len(calls) == len(set(calls)), "no call's answer went to two tenants"
    assert 20 * (1 if same else 7) <= made.count == len(calls)


class Numbered(Speaking):
    """Says which of its calls this is."""

    count: int = 0

    def _answer(self, messages, run_manager):
        self.count += 1
        message = AIMessage(f"{self.count} {messages[-1].content}", response_metadata={"done_reason": "stop"})
        return ChatResult(generations=[ChatGeneration(message=message)])
