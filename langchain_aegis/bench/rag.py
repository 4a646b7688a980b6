"""A RAG application's traffic: what the cache answers, and what that saves."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel

from langchain_aegis.bench.figures import Figures, percentile
from langchain_aegis.bench.workloads import Request, Stream
from langchain_aegis.cache import AegisSemanticCache
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.lookup import Lookup
from langchain_aegis.vectors import pack, similarities

_PIPELINE = "aegis-bench"
_PASSAGES = 2
_FAULTS = frozenset({"redis_down", "redis_slow", "embedder_down", "embedder_slow"})
_COUNTED = ("asked", "exact", "semantic", "wrong", "unlabelled")
_PROMPT = """Request {number}. Answer the question in one short sentence, with the words of the context.

Context:
{context}

Question: {question}

Answer:"""


@dataclass(slots=True)
class Tally:
    """What became of the questions of one kind."""

    asked: int = 0
    exact: int = 0
    semantic: int = 0
    wrong: int = 0  # answers that were made for a question which a label says is another one
    unlabelled: int = 0  # answers that were made for a question of which no label says that it is the same

    @property
    def hits(self) -> int:
        """Answered from the cache, rightly or not."""
        return self.exact + self.semantic


@dataclass(slots=True)
class Counts:
    """What a stream found; answers that may be wrong are listed as (question, the one whose answer it got)."""

    kinds: dict[str, Tally] = field(default_factory=dict)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    unlabelled: list[tuple[str, str]] = field(default_factory=list)
    slow: int = 0  # lookups that an infrastructure fault or a budget ended

    def of(self, *kinds: str) -> Tally:
        """Return the sum of some kinds."""
        found = [tally for kind, tally in self.kinds.items() if kind in kinds]
        return Tally(**{name: sum(getattr(tally, name) for tally in found) for name in _COUNTED})

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return {
            "kinds": {kind: {name: getattr(t, name) for name in _COUNTED} for kind, t in self.kinds.items()},
            "wrong": [list(pair) for pair in self.wrong],
            "unlabelled": [list(pair) for pair in self.unlabelled],
            "slow": self.slow,
        }


class Traffic:
    """Asks questions of a pipeline with the cache around it.

    Args:
        cache: Made with `on_lookup=seen.append`.
        seen: What it looked up.
        run: Task under which everything is kept, so that it can be removed.
    """

    def __init__(self, cache: AegisSemanticCache, seen: list[Lookup], run: str) -> None:
        self._cache = cache
        self._seen = seen
        self._run = run
        self._topics: dict[str, str | None] = {}

    async def count(self, stream: Stream, version: str) -> Counts:
        """Put a stream to the cache; answers are not generated but say which question they were made for."""
        counts = Counts()
        for request in stream.known:
            await self._count_one(counts, "first", request, version, stream.apart)
        for request in (*stream.traffic, *stream.traps):
            await self._count_one(counts, request.kind, request, version, stream.apart)
        return counts

    async def time(
        self, stream: Stream, version: str, answer: Callable[[str], Awaitable[str]], figures: Figures
    ) -> None:
        """Ask a stream's questions without and with the cache, in turn, and note what one takes on average."""
        for request in stream.known:
            await self._ask(request, version, _immediately)
        took: dict[str, list[float]] = {"without cache": [], "with cache": []}
        hits = []
        for number, request in enumerate(stream.traffic):
            for way in sorted(took, reverse=bool(number % 2)):
                started = time.perf_counter()
                hit = False
                if way == "with cache":
                    hit, _ = await self._ask(request, version, lambda r: answer(r.question))
                else:
                    await answer(request.question)
                took[way].append(time.perf_counter() - started)
                if hit:
                    hits.append(took[way][-1])
        for way, times in took.items():
            figures.add("time_per_question", way, sum(times) / len(times), "s")
        figures.ratio("time_per_question", "with cache", "without cache", inverse=True, as_="times_faster")
        if hits:
            figures.add("hit_p50", "with cache", percentile(hits, 0.5) * 1e3, "ms")

    async def _count_one(
        self, counts: Counts, kind: str, request: Request, version: str, apart: frozenset[frozenset[str]] | None
    ) -> None:
        self._topics.setdefault(request.question, request.topic)
        hit, origin = await self._ask(request, version, _immediately)
        found = self._seen[-1]
        tally = counts.kinds.setdefault(kind, Tally())
        tally.asked += 1
        counts.slow += not hit and not _FAULTS.isdisjoint(found.reasons)
        if not hit:
            return
        if found.tier == "exact":
            tally.exact += 1
        else:
            tally.semantic += 1
        topic, served = request.topic, self._topics.get(origin)
        if topic is None or served is None or topic == served:
            return
        if apart is None or frozenset((topic, served)) in apart:
            tally.wrong += 1
            counts.wrong.append((request.question, origin))
        else:
            tally.unlabelled += 1
            counts.unlabelled.append((request.question, origin))

    async def _ask(
        self, request: Request, version: str, answer: Callable[[Request], Awaitable[str]]
    ) -> tuple[bool, str]:
        """Return whether it was answered from the cache, and the question that the answer was made for."""
        made = False

        async def generate() -> dict[str, str]:
            nonlocal made
            made = True
            return {"made_for": request.question, "text": await answer(request)}

        before = len(self._seen)
        value = await self._cache.aget_or_generate(
            request.question, generate, pipeline=_PIPELINE, version=version, task=self._run
        )
        if len(self._seen) == before:
            raise AegisConfigError("the cache was not asked: is it switched off by REDIS_CACHE_ENABLED?")
        return not made, value["made_for"]


class Pipeline:
    """Finds the nearest passages and asks the model with them, as a RAG application does.

    Args:
        model: The chat model, without a cache.
        embeddings: Finds passages.
        documents: The passages.
    """

    def __init__(self, model: BaseChatModel, embeddings: Embeddings, documents: Sequence[Document]) -> None:
        self._model = model
        self._embeddings = embeddings
        self._texts = [d.page_content for d in documents]
        self._vectors = [pack(v) or b"" for v in embeddings.embed_documents(self._texts)]
        self._numbers = Counter[str]()

    async def answer(self, question: str) -> str:
        """Return the model's answer. No prompt begins like another, so that the server knows nothing of it yet."""
        vector = pack(await self._embeddings.aembed_query(question)) or b""
        scores = similarities(vector, self._vectors)
        nearest = sorted(range(len(scores)), key=lambda i: -scores[i])[:_PASSAGES]
        self._numbers["asked"] += 1
        prompt = _PROMPT.format(
            number=f"{self._numbers['asked']:06d}"[::-1],
            context="\n".join(self._texts[i] for i in sorted(nearest)),
            question=question,
        )
        return str((await self._model.ainvoke(prompt)).text)


async def _immediately(request: Request) -> str:
    return "an answer"
