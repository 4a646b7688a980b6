"""One run of the benchmark: starts the parts, measures, and returns a report as plain JSON."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from langchain_aegis import __version__
from langchain_aegis.bench import callers, claims, client_cost, machine
from langchain_aegis.bench.chat_ollama import aclose
from langchain_aegis.bench.figures import MIN_ROUNDS, Figure, Figures
from langchain_aegis.bench.rag import Counts, Pipeline, Traffic
from langchain_aegis.bench.scripted import scripted_server
from langchain_aegis.bench.workloads import Stream, draw_mix, read_prompts
from langchain_aegis.cache import AegisSemanticCache
from langchain_aegis.chat_models import ChatAegis
from langchain_aegis.demo import run as demo
from langchain_aegis.demo.retrieval import read_documents
from langchain_aegis.demo.stack import Stack, start_stack
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.lookup import Lookup
from langchain_aegis.pairs import load
from langchain_aegis.scope import aegis_scope

FORMAT = "aegis-bench/1"
PARTS = ("client", "callers", "rag")
_NAMESPACE = "aegis-bench"
_TOKENS_EMBEDDED, _TOKENS = 8, 64
_SPINS = 3  # after each round
_OP_BUDGET_S, _EMBED_BUDGET_S = 2.0, 30.0  # a busy machine must not turn hits into misses


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and how long.

    Attributes:
        parts: Which of `PARTS`.
        rounds: How often everything is done, interleaved; ranges are those of the rounds. In four, each of the four
            ways is once the first.
        callers: Numbers of callers at once.
        tokens: Length of a generated answer; None: 8 on the embedded server, 64 on another.
        mix: Questions in the mix that is counted, a multiple of 10.
        timed: Questions in each round that are timed without and with the cache, a multiple of 10.
        client_rounds: Rounds of the client's cost.
        seed: Decides about everything that is drawn.
    """

    parts: tuple[str, ...] = PARTS
    rounds: int = 4
    callers: tuple[int, ...] = (1, 2, 4, 8, 16)
    tokens: int | None = None
    mix: int = 200
    timed: int = 10
    client_rounds: int = 7
    seed: int = 7

    def __post_init__(self) -> None:
        if unknown := set(self.parts) - set(PARTS):
            raise AegisConfigError(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
        if self.rounds < MIN_ROUNDS:
            raise AegisConfigError(f"at least {MIN_ROUNDS} rounds are needed for a range, got {self.rounds}")
        if not self.callers or min(self.callers) < 1:
            raise AegisConfigError("numbers of callers must be at least 1")
        if self.tokens is not None and self.tokens < 2:
            raise AegisConfigError("an answer needs at least 2 tokens")


QUICK = Plan(rounds=3, callers=(1, 4), tokens=4, mix=40, client_rounds=3)


@dataclass(frozen=True, kw_only=True)
class Servers:
    """Where it is measured; what is None is embedded."""

    model: str | None = None
    ollama_url: str | None = None
    redis_url: str | None = None


def run_bench(
    plan: Plan, servers: Servers, *, prompts: Path | None = None, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Measure, and return the report.

    Args:
        plan: What.
        servers: Where.
        prompts: A workload of one's own in place of the mix, see `read_prompts`.
        say: Told what happens, one line each.

    Raises:
        AegisError: A part did not start or failed; one line that says why.
    """
    own = read_prompts(prompts) if prompts else None
    run = _Run(plan, own or draw_mix(load(), plan.mix, plan.seed), own, say)
    started, load_before = time.monotonic(), machine.load_average()
    if "client" in plan.parts:
        run.client()
    about: dict[str, Any] = {}
    if {"callers", "rag"} & {*plan.parts}:
        with start_stack(
            model=servers.model, redis_url=servers.redis_url, ollama_url=servers.ollama_url, say=say
        ) as stack:
            about = dict(stack.about)
            asyncio.run(run.with_servers(stack))
    found = claims.check(run.figures, None if own else run.counts)
    return {
        "format": FORMAT,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "package": __version__,
        "took_s": round(time.monotonic() - started, 1),
        "machine": {**machine.machine(), "load_before": load_before, "load_after": machine.load_average()},
        "versions": machine.versions(),
        "settings": {
            **about,
            **asdict(run.plan),
            "workload": "own prompts" if own else "mix of the research note",
            "questions": len(run.counted.traffic),
        },
        "noise": machine.noise(run.spins),
        "summary": claims.summary(run.figures, run.counts),
        "figures": [figure.as_dict() for figure in run.figures],
        "answered": run.counts.as_dict() if run.counts else None,
        "claims": [asdict(claim) for claim in found],
    }


class _Run:
    """What one run has measured so far."""

    def __init__(self, plan: Plan, counted: Stream, own: Stream | None, say: Callable[[str], None]) -> None:
        self.plan = plan
        self.counted = counted
        self._own = own
        self._say = say
        self.spins = [machine.spin_s()]
        self.figures: list[Figure] = []
        self.counts: Counts | None = None

    def client(self) -> None:
        """Measure the client's cost on a scripted server."""
        self._say("what an answer costs the client ...")
        with scripted_server() as address:
            for figures in client_cost.measure(address, self.plan.client_rounds):
                self._note(figures)

    async def with_servers(self, stack: Stack) -> None:
        """Measure what needs a model, Redis and an embedder."""
        plan = self.plan
        embedded = stack.about["ollama"] == "embedded"
        self.plan = plan = replace(plan, tokens=plan.tokens or (_TOKENS_EMBEDDED if embedded else _TOKENS))
        tokens, run, seen = plan.tokens or _TOKENS, f"bench-{uuid.uuid4().hex[:8]}", list[Lookup]()
        cache = AegisSemanticCache(
            stack.redis_url, stack.embeddings, namespace=_NAMESPACE, require_tenant=False, on_lookup=seen.append,
            op_budget_s=_OP_BUDGET_S, embed_budget_s=_EMBED_BUDGET_S,
        )  # fmt: skip
        try:
            with aegis_scope(task=run):
                if "rag" in plan.parts:
                    await self._rag(stack, Traffic(cache, seen, run), tokens)
                if "callers" in plan.parts:
                    await self._callers(stack, cache, tokens)
        finally:
            await cache.ainvalidate(task=run)
            await cache.aclose()

    async def _rag(self, stack: Stack, traffic: Traffic, tokens: int) -> None:
        plan = self.plan
        self._say("what the cache answers ...")
        self.counts = await traffic.count(self.counted, "counted")
        self._say("a RAG application without and with the cache ...")
        model = ChatAegis(stack.model, base_url=stack.ollama_url, temperature=0, num_predict=tokens, cache=False)
        pipeline = Pipeline(model, stack.embeddings, read_documents(Path(demo.__file__).parent / "documents"))
        await pipeline.answer("warm up")
        figures = Figures("rag")
        for number in range(plan.rounds):
            stream = self._own or draw_mix(load(), plan.timed, plan.seed + number)
            stream = replace(stream, traffic=stream.traffic[: plan.timed])  # of prompts of one's own, the first
            self._say(f"  round {number + 1} of {plan.rounds}")
            await traffic.time(stream, f"timed-{number}", pipeline.answer, figures)
            self._note([])
        self._note(figures.done())

    async def _callers(self, stack: Stack, cache: AegisSemanticCache, tokens: int) -> None:
        plan = self.plan
        self._say(f"{', '.join(map(str, plan.callers))} callers at once ...")
        questions = [r.question for r in self.counted.traffic]
        ways = callers.models(stack.model, stack.ollama_url, tokens, cache)
        prompts = callers.Prompts(questions, plan.seed)
        try:
            async for figures in callers.measure(ways, plan.callers, plan.rounds, prompts, self._say):
                self._note(figures)
        finally:
            await aclose(ways["ChatOllama"])

    def _note(self, figures: list[Figure]) -> None:
        """Take what a round, or all of them, gave; and see how fast the machine is now."""
        self.spins += [machine.spin_s() for _ in range(_SPINS)]
        self.figures += figures
