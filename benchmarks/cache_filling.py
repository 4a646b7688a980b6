"""Load many answers quickly, written by the cache's own code.

The one place of the benchmarks that knows the package from inside. Each answer goes through the flow that `update`
runs; many of those flows go on side by side, and what they ask of Redis at the same time is sent as one pipeline. So
what lies in Redis afterwards is what `update` would have written, without a round trip per answer.
"""

import contextvars
import hashlib
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice

import numpy
from cache_workload import PROMPTS, Item, generations

from langchain_aegis import AegisSemanticCache, aegis_scope
from langchain_aegis.breaker import Unavailable
from langchain_aegis.entries import Record
from langchain_aegis.steps import Embed
from langchain_aegis.store import Commands
from langchain_aegis.updates import Later

AT_ONCE = 100


def fill(
    cache: AegisSemanticCache,
    items: Iterable[Item],
    llm_string: str,
    *,
    scope: Callable[[Item], dict] | None = None,
    prepare: Callable[[list[Item]], None] | None = None,
) -> int:
    """Store each item's answer to its question; returns how many. Raises RuntimeError if one was not stored.

    Args:
        cache: With a generous `op_budget_s`: a pipeline takes longer than one answer.
        items: What is stored.
        llm_string: As LangChain tells it.
        scope: Returns the arguments of `aegis_scope` for an item.
        prepare: Called with each part before it is stored.
    """
    count, first = 0, True
    coming = iter(items)
    while part := list(islice(coming, AT_ONCE)):
        if prepare is not None:
            prepare(part)
        if first:  # makes the index
            _run_all(cache, [_flow(cache, part[0], llm_string, scope)])
            part, count, first = part[1:], count + 1, False
        _run_all(cache, [_flow(cache, item, llm_string, scope) for item in part])
        count += len(part)
    if not_stored := cache.stats().not_stored:
        raise RuntimeError(f"not all answers were stored: {not_stored}")
    return count


def _flow(cache, item, llm_string, scope):
    """Return what resumes the item's update, in a context of its own."""
    context = contextvars.copy_context()
    if scope is not None:
        context.run(aegis_scope(**scope(item)).__enter__)  # never left: the context goes with the flow
    flow = _in_place(cache._engine.update(PROMPTS.prompt(item.question), llm_string, generations(item)))
    return lambda answer, failed=False: context.run(flow.throw if failed else flow.send, answer)


def _in_place(flow):
    """Do here what an update leaves to the background: by then, others' vectors are prepared."""
    try:
        step = next(flow)
        while True:
            if isinstance(step, Later):
                yield from step.rest()
                step = flow.send(None)
                continue
            try:
                answer = yield step
            except Unavailable as exc:
                step = flow.throw(exc)
            else:
                step = flow.send(answer)
    except StopIteration:
        return


def _perform(cache, step):
    if isinstance(step, Embed):  # without the thread that keeps the budget
        return cache._engine.embedder.get().embed_query(step.text)
    return cache._perform(step)


def _run_all(cache, flows):
    waiting = [(resume, None, False) for resume in flows]
    while waiting:
        asked = []
        for resume, answer, failed in waiting:
            try:
                step = resume(answer, failed)
                while not isinstance(step, Commands):
                    try:
                        step = resume(_perform(cache, step))
                    except Unavailable as exc:
                        step = resume(exc, True)
                asked.append((resume, step))
            except StopIteration:
                continue
        waiting = []
        if asked:
            replies = iter(cache._connections.perform(Commands(tuple(c for _, step in asked for c in step.each))))
            waiting = [(resume, [next(replies) for _ in step.each], False) for resume, step in asked]


def multiply(
    cache: AegisSemanticCache,
    record: Record,
    count: int,
    vectors: Callable[[int], numpy.ndarray],
    *,
    tenanted: bool = False,
    scopes_of: int | None = None,
) -> None:
    """Store many more answers like a stored one: of the same size, with other keys and other vectors.

    They are written as an import writes them. Nobody can ask for them, since no question has their keys; they are
    what a lookup has to find its answer among. Raises RuntimeError if one was not stored.

    Args:
        cache: As in `fill`.
        record: What an `on_lookup` of the cache saw.
        count: How many.
        vectors: Returns so many vectors of length 1, shape `(n, dimensions)`.
        tenanted: Whether the record belongs to a named tenant.
        scopes_of: Give each so many of them a tenant and a scope of their own, instead of the record's.
    """
    store, perform = cache._engine.store, cache._connections.perform
    for start in range(0, count, AT_ONCE):
        commands, now_ms = [], time.time_ns() // 1_000_000
        for at, row in enumerate(vectors(min(AT_ONCE, count - start)), start):
            made = replace(record, key=secrets.token_hex(16), vec=row.astype("<f2").tobytes())
            if scopes_of is not None:
                own = hashlib.blake2b(f"{record.key}{at // scopes_of}".encode(), digest_size=16).hexdigest()
                made = replace(made, scope=own, sets=(f"tenant:{own}", *record.sets[1:]))
            flow = store.put(made, things=["namespace", *made.sets, *made.src], now_ms=now_ms, tenanted=tenanted)
            step = flow.send(None)
            while step.each[0][0] not in ("EVAL", "EVALSHA", "FCALL"):  # what a store asks before its first write
                step = flow.send(perform(step))
            commands += step.each
        for reply in perform(Commands(tuple(commands))):
            if reply != b"stored":
                raise RuntimeError(f"an answer was not stored: {reply!r}")
