"""Ask a RAG graph a list of questions, and show what the cache did with each."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage
from rich.console import Console

from langchain_aegis import __version__
from langchain_aegis.cache import AegisSemanticCache
from langchain_aegis.chat_models import ChatAegis
from langchain_aegis.demo.questions import Asked, read_questions
from langchain_aegis.errors import AegisConfigError, AegisError
from langchain_aegis.lookup import Lookup
from langchain_aegis.results import was_cached
from langchain_aegis.scope import aegis_scope
from langchain_aegis.vectors import similarities
from langchain_aegis.verification import GUARDS

_HERE = Path(__file__).parent
_ANSWER_TOKENS = 64
_EXIT_WRONG_HIT = 1
_EXIT_NOT_STARTED = 2


@dataclass(kw_only=True)
class Result:
    """What happened to one question.

    Attributes:
        question: What was asked.
        kind: As the list of questions says.
        tier: "exact", "semantic" or "miss".
        served_from: The question whose answer was served, or None.
        similarity: Cosine with that question, or with the nearest one that was not served.
        reason: Why it was not served, in words.
        time_s: From question to answer.
        tokens: Tokens that the model generated; 0 for a hit.
        answer: What the user reads.
        wrong_hit: The answer was generated for a question with another source.
        grounded: The answer contains the expected fact; None if none was given.
        saved_s: For a hit: how much longer the answer took when it was generated.
    """

    question: str
    kind: str
    tier: str
    served_from: str | None
    similarity: float | None
    reason: str
    time_s: float
    tokens: int
    answer: str
    wrong_hit: bool
    grounded: bool | None
    saved_s: float


def run_demo(
    *,
    model: str | None = None,
    redis_url: str | None = None,
    ollama_url: str | None = None,
    no_guards: bool = False,
    json: bool = False,
    documents: Path | None = None,
    questions: Path | None = None,
) -> int:
    """Run the demonstration; returns the exit code: 0 no wrong hit, 1 a wrong hit, 2 it did not start.

    Args:
        model: Chat model; default OLLAMA_MODEL_GENERATION, or the embedded one.
        redis_url: Redis; default REDIS_URL if it answers, else an embedded one.
        ollama_url: Ollama; default OLLAMA_BASE_URL if it answers, else an embedded one.
        no_guards: Serve by similarity alone, to show what the guards are for.
        json: Print one JSON document on stdout and everything else on stderr.
        documents: Directory of .md and .txt files.
        questions: File of JSON lines: question, kind, source, fact.
    """
    progress = Console(stderr=True)
    try:
        from langchain_aegis.demo.retrieval import Passages, read_documents
        from langchain_aegis.demo.stack import start_stack

        build_graph = _load_graph()
        texts = read_documents(documents or _HERE / "documents")
        asked = read_questions(questions or _HERE / "questions.jsonl")
        with start_stack(model=model, redis_url=redis_url, ollama_url=ollama_url, say=_sayer(progress)) as stack:
            passages = Passages(stack.redis_url, stack.embeddings, texts)
            passages.open()
            try:
                demo = Demo(stack, passages, asked, build_graph, no_guards=no_guards, progress=progress)
                asyncio.run(demo.ask_all())
            finally:
                passages.close()
    except AegisError as exc:
        if os.environ.get("AEGIS_DEBUG"):
            raise
        progress.print(f"aegis demo: {' '.join(str(exc).split())}", markup=False, highlight=False, soft_wrap=True)
        return _EXIT_NOT_STARTED
    except Exception as exc:  # a bug, or a fault that nobody thought of: in no case a wrong hit, which exit code 1 says
        if os.environ.get("AEGIS_DEBUG"):
            raise
        line = f"aegis demo: ended by {type(exc).__name__}: {' '.join(str(exc).split())} (AEGIS_DEBUG=1 shows where)"
        if isinstance(exc, ModuleNotFoundError):
            line = f"aegis demo: {exc.name} is missing; run: pip install 'langchain-aegis[embedded]'"
        progress.print(line, markup=False, highlight=False, soft_wrap=True)
        return _EXIT_NOT_STARTED
    report = demo.report()
    if json:
        sys.stdout.buffer.write(orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        sys.stdout.flush()
    else:
        from langchain_aegis.demo.table import print_report

        print_report(report, Console(width=None if sys.stdout.isatty() else 120))
    wrong = report["summary"]["wrong_hits"] + report["summary"]["before_retrieval"]["wrong_hits"]
    return _EXIT_WRONG_HIT if wrong else 0


class Demo:
    """The questions, asked twice: through the graph's own cached model, and with the cache around the whole graph."""

    def __init__(
        self, stack: Any, passages: Any, asked: Sequence[Asked], build_graph: Callable[..., Any], *, no_guards: bool,
        progress: Console,
    ) -> None:  # fmt: skip
        self._stack = stack
        self._asked = asked
        self._progress = progress
        self._seen: list[Lookup] = []
        # Entries of other documents, questions, models or rules must not be met: who asked for them is not known here.
        told = f"{passages.digest}\0{stack.model}\0{no_guards}\0{[(a.question, a.source) for a in asked]}"
        self._version = hashlib.blake2b(told.encode(), digest_size=4).hexdigest()
        self._cache = AegisSemanticCache(
            stack.redis_url,
            stack.embeddings,
            namespace=f"aegis-demo-{self._version}",
            guards_off=GUARDS if no_guards else (),
            keep_questions=True,  # to name the origin of every answer
            require_tenant=False,
            on_lookup=self._seen.append,
        )
        self._model = ChatAegis(stack.model, base_url=stack.ollama_url, temperature=0, num_predict=_ANSWER_TOKENS)
        self._graph = build_graph(self._model, passages.nearest)
        self._no_guards = no_guards
        self.results: list[Result] = []
        self.before_retrieval: list[Result] = []

    async def ask_all(self) -> None:
        """Ask every question in both ways."""
        set_llm_cache(self._cache)  # the one line that an application adds
        try:
            for asked in self._asked:
                self.results.append(await self._ask(asked, self._through_graph, "graph"))
            self._seen.clear()
            for asked in self._asked:
                self.before_retrieval.append(await self._ask(asked, self._before_retrieval, "before retrieval"))
        finally:
            set_llm_cache(None)
            await self._cache.aclose()

    def report(self) -> dict[str, Any]:
        """Return the results as plain JSON."""
        pairs = zip(self.results, self.before_retrieval, strict=True)
        return {
            "version": __version__,
            "questions": [{**asdict(r), "before_retrieval": asdict(b)} for r, b in pairs],
            "summary": {**_summary(self.results), "before_retrieval": _summary(self.before_retrieval)},
            "stack": {
                **self._stack.about,
                "min_similarity": self._cache.min_similarity,
                "guards": not self._no_guards,
            },
        }

    async def _through_graph(self, question: str) -> AIMessage:
        state = await self._graph.ainvoke({"question": question})
        answer: AIMessage = state["answer"]
        return answer

    async def _before_retrieval(self, question: str) -> AIMessage:
        async def generate() -> AIMessage:
            with aegis_scope(cache="off"):  # one cache is enough to look at
                return await self._through_graph(question)

        answer: AIMessage = await self._cache.aget_or_generate(
            question, generate, pipeline="aegis-demo", version=self._version
        )
        return answer

    async def _ask(self, asked: Asked, ask: Callable[[str], Awaitable[AIMessage]], way: str) -> Result:
        before = len(self._seen)
        started = time.perf_counter()
        answer = await ask(asked.question)
        time_s = time.perf_counter() - started
        if len(self._seen) == before:
            raise AegisConfigError("the cache was not asked: is it switched off by REDIS_CACHE_ENABLED?")
        found = self._seen[before]
        hit = was_cached(answer)
        origin = (found.record.question or asked.question) if hit and found.record is not None else None
        similarity, reason = (found.similarity, "") if hit else self._why(found, before)
        usage = answer.usage_metadata or {"output_tokens": 0}
        text = str(answer.text).strip()
        result = Result(
            question=asked.question, kind=asked.kind, tier=found.tier, served_from=origin,
            similarity=None if similarity is None else round(similarity, 3), reason=reason, time_s=round(time_s, 3),
            tokens=0 if hit else usage["output_tokens"], answer=text,
            wrong_hit=origin is not None and self._source(origin, asked) != asked.source,
            grounded=asked.fact.casefold() in text.casefold() if asked.fact else None,
            saved_s=round(max(0.0, hit.get("generation_s", 0.0) - time_s), 3) if hit else 0.0,
        )  # fmt: skip
        word = {"exact": "[green]exact[/]", "semantic": "[cyan]semantic[/]"}.get(result.tier, "[dim]miss[/]")
        self._progress.print(f"  {way:16} {time_s:6.2f} s  {word}  ", end="", highlight=False)
        self._progress.print(asked.question, markup=False, highlight=False)
        return result

    def _source(self, origin: str, asked: Asked) -> str:
        """The expected source of the question that an answer was generated for."""
        if origin == asked.question:
            return asked.source
        return next((a.source for a in self._asked if a.question == origin), asked.source)

    def _why(self, found: Lookup, before: int) -> tuple[float | None, str]:
        """Say why nothing was served, and how near the nearest question was."""
        if found.candidates:
            nearest = found.candidates[0]
            guards = [r.removeprefix("guard:") for r in nearest.reasons if r.startswith("guard:")]
            return nearest.similarity, f"guard: {', '.join(guards)}" if guards else _words(nearest.reasons[0])
        if found.reasons == ("no_candidate",):
            others = [s for s in self._seen[:before] if s.vector and s.key.scope != found.key.scope]
            near = max(similarities(found.vector, [o.vector for o in others]), default=0.0)
            if near >= self._cache.min_similarity:
                return near, "context differs"
            return None, "new"
        return None, _words(found.reasons[0]) if found.reasons else ""


def _summary(results: Sequence[Result]) -> dict[str, Any]:
    hits = [r for r in results if r.tier != "miss"]
    judged = [r.grounded for r in results if r.grounded is not None]
    return {
        "hit_rate": round(len(hits) / len(results), 3),
        "wrong_hits": sum(r.wrong_hit for r in results),
        "grounded": sum(judged),
        "judged": len(judged),
        "time_saved_s": round(sum(r.saved_s for r in hits), 3),
    }


def _words(code: str) -> str:
    return code.replace("_", " ")


def _sayer(progress: Console) -> Callable[[str], None]:
    return lambda line: progress.print(line, markup=False, highlight=False, style="dim")


def _load_graph() -> Callable[..., Any]:
    """Load `build_graph` of examples/rag_graph.py, which is shipped with the package as demo/rag_graph.py."""
    spec = importlib.util.spec_from_file_location("aegis_demo_rag_graph", _HERE / "rag_graph.py")
    if spec is None or spec.loader is None:
        raise AegisConfigError("the demonstration's graph is missing from this installation")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    build_graph: Callable[..., Any] = module.build_graph
    return build_graph
