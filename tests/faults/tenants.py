"""Does anybody ever get another one's answer? Many callers with ids that look alike ask the same, at random.

Run: python tests/faults/tenants.py [--exact N] [--semantic N] [--seed S] [--redis URL]

Every answer names the tenant, user, task, question and version that it was stored for, and each one that is served is
compared with the whole history: what that caller stored, what it replaced, what was invalidated. Half of the lookups
block in threads, half are awaited in one event loop. Exit code 1 if anything was wrong, or if too little was served
for the run to show anything. The same seed gives the same calls.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from langchain_core.embeddings import Embeddings
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration

from langchain_aegis import AegisSemanticCache, aegis_scope
from langchain_aegis.writes import the_writer

MODEL = "[('_type', 'chat'), ('model', 'm'), ('stop', None)]"
THREADS, TASKS = 4, 32
REPLACED, INVALIDATED = 1 / 100, 1 / 2_000  # of all calls
LEAST_SERVED = 0.3
THINGS = (
    "book", "card", "film", "map", "tool", "key", "laptop", "record", "game", "photo", "bicycle", "projector",
    "camera", "locker", "drum", "telescope", "violin", "tent", "ladder", "costume",
)  # fmt: skip


def alike(name: str) -> list[str]:
    """Return ids that something between a caller and an answer might take for each other."""
    around = (
        "\0", "\n", "\r", "\t", "\x1f", "\x7f", "\x85", " ", "\xa0", "\u200b", "\u200d", "\u2028", "\u2029", "\u202e",
        "\u3000", "\ufeff", "\ufffd", "\ud800", "\udfff", ",", "|", "*", "?", "%", "\\", "{", "}", "[a]", "(", ")", "-",
        "@", "$", '"', "'", ":", ";", "~", "<", ">", "=", "+", "/", "`", "&", "!", "#", "^", ".",
    )  # fmt: skip
    return [
        name, name.upper(), name.title(), name.swapcase(), f"{name},{name}", f"{name}|{name.upper()}", f"{{{name}}}",
        *(name + c for c in around), *(c + name for c in around), *(name[:1] + c + name[1:] for c in around),
        name.replace("a", "\u0430"), name.replace("e", "\u0435"), name.replace("c", "\u0441"),  # homoglyphs
        "".join(chr(ord(c) + 0xFEE0) for c in name),  # full width
        name + "\u00e9", name + "e\u0301", name + "\u212b", name + "\u00c5", name + "A\u030a",  # NFC, NFD, singletons
        name + "\ufb01", name + "fi", name + "\u00df", name + "ss", name + "\u0130", name + "i\u0307", name + "\u0131",
        name + "\U0001f600", name + "\ud83d\ude00",  # one character, and its two halves
        name + "x" * 10_000, name + "x" * 9_999 + "y", name + "x" * 10_001, ("\u00e9" * 5_000) + name,
        f"tenant:{name}", f"user:{name}", f"{len(name)}:{name}", f"{name}:{name}", f"aegis:{{p00}}:e:{name}",
    ]  # fmt: skip


IDS = [*alike("acme"), *alike("Bob"), *"*?%_-.", "None", "null", "undefined", "0", "False", "\ud800", "\udc00"]


@dataclass(frozen=True)
class Caller:
    """Whose call it is."""

    tenant: str
    user: str | None = None
    task: str | None = None


def callers(chosen: random.Random, count: int) -> list[Caller]:
    """Return so many callers; the same ids stand for tenants, users and tasks, alone, together and swapped."""
    made: dict[Caller, None] = {}
    pairs = ((a, b) for a in iter(lambda: chosen.choice(IDS), None) for b in [chosen.choice(IDS)])
    for one, other in pairs:
        for caller in (
            Caller(one), Caller(one, other), Caller(other, one), Caller("acme", one), Caller(one, None, other),
            Caller(one, other, other),
        ):  # fmt: skip
            made[caller] = None
        if len(made) >= count:
            break
    return list(made)[:count]


@dataclass(frozen=True)
class Tier:
    """How questions are stored and how they are asked."""

    name: str
    stored: Callable[[str], str]
    asked: Callable[[str], str]


TIERS = (
    Tier("exact", "Translate into French: the {}".format, "Translate into French: the {}".format),
    Tier("semantic", "How long may I keep a {}?".format, "How long can I keep a {}?".format),
)


class Words(Embeddings):
    """Texts are as near as the words that they share: the vectors of all callers are the same."""

    model = "words"

    def __init__(self) -> None:
        self._known: dict[str, list[float]] = {}

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        if text not in self._known:
            vector = [0.0] * 256
            for word in text.lower().strip("?").split():
                vector[int.from_bytes(word.encode(), "big") % 251] += 1.0
            self._known[text] = vector
        return self._known[text]


@dataclass
class Found:
    """What came of the lookups of a tier."""

    lookups: int = 0
    hits: int = 0
    wrong: list[tuple[str, object, object]] = field(default_factory=list)
    seconds: float = 0.0
    tiers: Counter[str] = field(default_factory=Counter)

    def add(self, other: Found) -> None:
        """Count another's lookups too."""
        self.lookups += other.lookups
        self.hits += other.hits
        self.wrong += other.wrong
        self.tiers += other.tiers

    @property
    def shows_something(self) -> bool:
        """Whether enough was served."""
        return self.lookups == 0 or self.hits >= LEAST_SERVED * self.lookups


Call = tuple[str, Caller, tuple[Any, ...]]


class History:
    """What some callers did, one after the other, and what they may be served.

    Nobody else calls for their tenants: what was invalidated is gone when the call returns.
    """

    def __init__(self, tier: Tier, mine: list[Caller], chosen: random.Random) -> None:
        self.tier, self.mine, self.random = tier, mine, chosen
        self.found = Found()
        self._latest: Counter[tuple[Caller, str]] = Counter()  # the version that was stored last; 0: none
        self._removed: Counter[tuple[Caller, str]] = Counter()  # versions up to this one are gone
        self._prompts = {
            text: dumps([HumanMessage(text)]) for thing in THINGS for text in (tier.stored(thing), tier.asked(thing))
        }

    def begin(self) -> Iterator[Call]:
        """Store every second thing for each caller: what one has, another one lacks."""
        for caller in self.mine:
            for thing in THINGS:
                if self.random.random() < 0.6:
                    yield self._store(caller, thing)

    def go_on(self, lookups: int) -> Generator[Call, Any, None]:
        """Look up so often, at random, with what else happens meanwhile; is sent what was served."""
        for _ in range(lookups):
            caller, thing, drawn = self.random.choice(self.mine), self.random.choice(THINGS), self.random.random()
            if drawn < INVALIDATED:
                yield "invalidate", caller, ()
                for had in list(self._latest):
                    if had[0].tenant == caller.tenant:
                        self._removed[had] = self._latest[had]
            elif drawn < INVALIDATED + REPLACED:
                yield self._store(caller, thing)
            served = yield "lookup", caller, (self._prompts[self.tier.asked(thing)], MODEL)
            self._look_at(served, caller, thing)

    def _store(self, caller: Caller, thing: str) -> Call:
        version = self._latest[caller, thing] = self._latest[caller, thing] + 1
        text = json.dumps([caller.tenant, caller.user, caller.task, thing, version])
        message = AIMessage(text, response_metadata={"done_reason": "stop"})
        return "update", caller, (self._prompts[self.tier.stored(thing)], MODEL, [ChatGeneration(message=message)])

    def _look_at(self, served: Any, caller: Caller, thing: str) -> None:
        self.found.lookups += 1
        if served is None:
            return
        self.found.hits += 1
        self.found.tiers[served[0].message.response_metadata["aegis_cache"]["tier"]] += 1
        tenant, user, task, about, version = json.loads(served[0].text)
        asked = (caller, thing)
        for kind, right in (
            ("another tenant's", tenant == caller.tenant),
            ("another user's", user == caller.user),
            ("another task's", task == caller.task),
            ("another question's", about == thing),
            ("what was invalidated", version > self._removed[asked]),
            ("what was never stored", version <= self._latest[asked]),
        ):
            if not right:
                self.found.wrong.append((kind, asked, (tenant, user, task, about, version)))
                return


def _shared_out(all_callers: list[Caller], among: int) -> list[list[Caller]]:
    """Give each tenant's callers to one of so many."""
    tenants: dict[str, list[Caller]] = {}
    for caller in all_callers:
        tenants.setdefault(caller.tenant, []).append(caller)
    shares: list[list[Caller]] = [[] for _ in range(among)]
    for mine in sorted(tenants.values(), key=len, reverse=True):
        min(shares, key=len).extend(mine)
    return [share for share in shares if share]


def _blocking(cache: AegisSemanticCache, calls: Iterator[Call] | Generator[Call, Any, None]) -> None:
    served = None
    while True:
        try:
            name, who, told = calls.send(served) if isinstance(calls, Generator) else next(calls)
        except StopIteration:
            return
        if name == "invalidate":
            the_writer.drain(timeout_s=30)  # what it stored before counts as done
            cache.invalidate(tenant=who.tenant)
            continue
        with aegis_scope(tenant=who.tenant, user=who.user, task=who.task):
            served = getattr(cache, name)(*told)


async def _awaited(cache: AegisSemanticCache, calls: Iterator[Call] | Generator[Call, Any, None]) -> None:
    served = None
    while True:
        try:
            name, who, told = calls.send(served) if isinstance(calls, Generator) else next(calls)
        except StopIteration:
            return
        if name == "invalidate":
            await cache.ainvalidate(tenant=who.tenant)
            continue
        async with aegis_scope(tenant=who.tenant, user=who.user, task=who.task):
            served = await getattr(cache, f"a{name}")(*told)


def run(url: str, tier: Tier, lookups: int, *, seed: int = 7, many: int = 300) -> Found:
    """Look up so often for so many callers, half blocking and half awaited, in a namespace of its own."""
    chosen = random.Random(f"{seed} {tier.name}")
    found = Found()
    options = {"namespace": f"t{uuid.uuid4().hex[:8]}", "min_similarity": 0.6, "repeats": "serve",
               "require_tenant": True, "op_budget_s": 30, "embed_budget_s": 30}  # fmt: skip
    with AegisSemanticCache(url, Words(), **options) as cache:
        everybody = callers(chosen, many)
        chosen.shuffle(everybody)
        halves = everybody[: many // 2], everybody[many // 2 :]
        # A tenant that stands in both halves is one history's.
        first = {caller.tenant for caller in halves[0]}
        ours = [*halves[0], *(c for c in halves[1] if c.tenant in first)]
        theirs = [c for c in halves[1] if c.tenant not in first]
        blocking, awaited = (
            [History(tier, mine, random.Random(f"{seed} {tier.name} {way} {n}")) for n, mine in enumerate(shares)]
            for way, shares in (("b", _shared_out(ours, THREADS)), ("a", _shared_out(theirs, TASKS)))
        )
        for history in (*blocking, *awaited):
            _blocking(cache, history.begin())
            the_writer.drain(timeout_s=60)
        began = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            each = _parts(lookups - lookups // 2, len(blocking))
            list(pool.map(lambda told: _blocking(cache, told[0].go_on(told[1])), zip(blocking, each, strict=True)))

        async def all_awaited() -> None:
            each = _parts(lookups // 2, len(awaited))
            await asyncio.gather(*(_awaited(cache, h.go_on(n)) for h, n in zip(awaited, each, strict=True)))
            await cache.aclose()

        asyncio.run(all_awaited())
        found.seconds = time.perf_counter() - began
        for history in (*blocking, *awaited):
            found.add(history.found)
        cache.clear()
    return found


def _parts(count: int, among: int) -> list[int]:
    return [count // among + (n < count % among) for n in range(among)]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--exact", type=int, default=1_000_000, help="lookups of the exact tier")
    arguments.add_argument("--semantic", type=int, default=100_000, help="lookups of the semantic tier")
    arguments.add_argument("--seed", type=int, default=7)
    arguments.add_argument("--redis", help="address of a Redis; default: one of its own")
    told = arguments.parse_args()
    if told.redis:
        return _all(told, told.redis)
    from langchain_aegis.embedded.redis import EmbeddedRedis

    with EmbeddedRedis(shared=False) as server:
        return _all(told, server.url)


def _all(told: argparse.Namespace, url: str) -> int:
    bad = 0
    for tier, lookups in zip(TIERS, (told.exact, told.semantic), strict=True):
        found = run(url, tier, lookups, seed=told.seed)
        print(
            f"{tier.name}: {len(found.wrong)} wrong of {found.lookups:,} lookups ({found.hits:,} served: "
            f"{dict(found.tiers)}), {found.seconds:.0f} s, {found.lookups / max(found.seconds, 1e-9):,.0f}/s, seed "
            f"{told.seed}; with 95 % below {3 / max(1, found.lookups):.1e} each"
        )
        for wrong in found.wrong[:5]:
            print(f"  {ascii(wrong)[:300]}")
        bad += bool(found.wrong) or not found.shows_something
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
