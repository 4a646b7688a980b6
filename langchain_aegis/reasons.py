"""Why the cache did not answer or did not keep an answer: every code, with what one can do about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, get_args

Stage = Literal["bypass", "exact_only", "lookup", "guard", "store"]


@dataclass(frozen=True, slots=True)
class Reason:
    """One code, explained.

    Attributes:
        code: As it stands in `CacheStats.reasons`, in `CacheStats.not_stored`, in verdicts and metrics.
        stage: "bypass" (the cache was not asked), "exact_only" (only an exact repeat could hit), "lookup" (nothing
            could be served), "guard" (a near answer was held back), "store" (the new answer was not kept).
        meaning: What happened.
        remedy: What the user can do, or that there is nothing to do.
    """

    code: str
    stage: Stage
    meaning: str
    remedy: str


_FINE = "Nothing: this is how it should be."

_TEXTS: dict[Stage, dict[str, tuple[str, str]]] = {
    "bypass": {
        "off": (
            'The cache is switched off: `REDIS_CACHE_ENABLED=no`, or `aegis_scope(cache="off")` around the call.',
            "Nothing, if that is meant.",
        ),
        "bypass": ("The rule given as `bypass=` matches.", "Nothing, if that is meant."),
        "bad_identity": (
            "The call names a tenant or user that is blank or no text, or two different ones, or another one than its "
            "lookup did: nobody knows whose answer it would be.",
            "Give one text that is not blank, or leave the name out; see the warning in the log.",
        ),
        "no_tenant": (
            "The call names no tenant although others do.",
            "Put it inside `aegis_scope(tenant=...)`, or say `require_tenant=False`.",
        ),
        "opted_out": ("The user does not want to be answered from the cache, nor to fill it.", _FINE),
        "unnamed_model": (
            "LangChain's key for this model names no model (plain ChatOllama): answers of several would mix.",
            "Use ChatAegis; or `allow_unnamed_models=True` if there is only one model.",
        ),
        "unreadable_prompt": (
            "LangChain handed over a prompt that cannot be read as messages.",
            "Report it with the version of langchain-core.",
        ),
    },
    "exact_only": {
        "opaque_model": (
            "The model describes itself in a form that is not known, so its options cannot be read.",
            "Use ChatAegis, or a model of a LangChain partner package.",
        ),
        "tools": ("Tools are bound, or the messages hold tool calls.", _FINE),
        "structured_output": ("The answer must follow a schema.", _FINE),
        "media": ("The messages hold images, audio or files.", _FINE),
        "no_question": (
            "No part of the prompt can be told to be the question: it is more than a question and has no label, or "
            "the last message is not the user's.",
            "Write `Question:` before it, or say `aegis_scope(question=...)`, or give `find_question=`.",
        ),
        "several_labels": (
            "Several parts are labelled as a question, as in a retrieved FAQ.",
            "Say which one: `aegis_scope(question=...)`, or a label or tag that documents do not hold.",
        ),
        "too_long": ("The question has more than 400 characters.", "Nothing: long texts are not told apart safely."),
        "not_verbatim": (
            "The text given as `aegis_scope(question=...)` does not stand exactly once in the prompt.",
            "Give it as it stands in the last message, before templates change it.",
        ),
        "not_a_question": (
            "It is a text to be worked on (translate, correct, summarise, code), or one that asks nothing.",
            "Nothing: two such texts that lie near each other have different answers.",
        ),
        "action": ("Something is to be done (transfer, delete, book), not told.", _FINE),
        "volatile": (
            "The answer changes with time (today, current, latest).",
            "Nothing; a short `ttl_s` limits the age of exact repeats too.",
        ),
        "no_embedder": (
            "There is no embedding model.",
            "Run `ollama pull bge-m3`, set `OLLAMA_MODEL_EMBEDDINGS`, or give `embeddings=`.",
        ),
    },
    "lookup": {
        "refresh": ('The caller wants a new answer: `aegis_scope(cache="refresh")`.', _FINE),
        "redis_down": ("Redis cannot be reached, or answers with errors.", "See `aegis doctor`; calls go on without."),
        "redis_slow": (
            "Redis did not answer within `op_budget_s`.",
            "Look for slow commands on that Redis, or raise `op_budget_s`.",
        ),
        "embedder_down": ("The embedder failed.", "See `aegis doctor`; exact repeats still hit."),
        "embedder_slow": (
            "The embedder needed longer than `embed_budget_s`.",
            "Keep its model loaded (`keep_alive`), or raise `embed_budget_s`.",
        ),
        "bad_vector": (
            "The embedder returned a vector without a direction (zeros, NaN or infinity).",
            "Use another embedding model.",
        ),
        "no_candidate": (
            "Nothing is kept for this scope: the same prompt, model, options and user with another question.",
            "If it goes on, `explain` says which part of the scope differs from the nearest answer.",
        ),
        "below_threshold": (
            "The nearest question is less similar than `min_similarity`.",
            "Nothing, or `aegis cache calibrate` and another `mode`.",
        ),
        "expired": ("The entry is older than its TTL.", "Raise `ttl_s`."),
        "model_changed": (
            "The entry is of another version of the model than the server has under this name now, or the model was "
            "changed while it answered.",
            "Nothing: new answers take the place of the old ones.",
        ),
        "stale": (
            "The near entry is past its TTL; stale answers are served on exact repeats only.",
            "Raise `ttl_s`.",
        ),
        "stale_revalidate": (
            "A stale answer is there; this caller makes the new one while others get the stale one.",
            _FINE,
        ),
        "no_profile": ("The entry was written by a version with other guards.", "Nothing: it expires."),
        "unreadable": ("The entry holds what this version cannot read.", "Nothing: it expires."),
        "asked_again": (
            "This very text was answered by meaning before, from another wording, and is asked again: the model "
            "makes an answer of its own, which serves exact repeats from then on. A wrong hit is not repeated.",
            "Nothing, or `repeats=\"serve\"`.",
        ),
        "other_scope": (
            "The call of the near entry differs in more than the question; only `explain` looks at such entries.",
            "See which fields differ.",
        ),
        "lease_wait": (
            "Another process makes this answer; it was waited for in vain.",
            "Raise `lease_wait_s` if answers take longer than it.",
        ),
        "followed": (
            "Another process makes this answer just now: a stream is given its pieces as they come.",
            _FINE,
        ),
        "shadow": (
            "This hit was drawn for checking: the model is asked anyway, and both answers are compared.",
            "Nothing: that is how the rate of wrong hits is measured.",
        ),
    },
    "guard": {
        "guard:language": ("The questions are in different languages.", ""),
        "guard:number": ("They hold different numbers, dates or versions.", ""),
        "guard:quantity": ("They hold different amounts with units.", ""),
        "guard:identifier": ("They hold different codes, such as those of errors or products.", ""),
        "guard:negation": ("One of them is negated.", ""),
        "guard:antonym": ("One says the opposite of the other (enable, disable).", ""),
        "guard:exclusive": ("They name different ones of a set (months, currencies, environments).", ""),
        "guard:question_word": ("They ask for different things (when, where, how much).", ""),
        "guard:direction": ("They go in opposite directions (from A to B, from B to A).", ""),
        "guard:order": ("The same words change places (A calls B, B calls A).", ""),
        "guard:shape": ("They want another form of answer (length, format, audience, language).", ""),
        "guard:entity": ("They name different people, places or products.", ""),
        "guard:substitution": ("One has another word where it matters.", ""),
        "guard:restriction": ("One has a restriction that the other has not.", ""),
        "guard:topic": ("They have no word in common that carries meaning.", ""),
        "reported": ("This pair was reported as wrong before.", "Nothing: the note expires by itself."),
        "verifier": ("The second opinion says that the answer does not serve.", "Nothing, or another `verifier=`."),
        "verifier_no_text": (
            "The near entry was stored without its question, so there is nothing to ask a second opinion about.",
            "Nothing: it was written by a cache without `verifier=`, and expires.",
        ),
        "verifier_slow": (
            "The second opinion took longer than its budget, and without it nothing near is served.",
            "Use a faster verifier, or raise `verifier_budget_s`.",
        ),
        "verifier_failed": (
            "The second opinion failed, and without it nothing near is served.",
            "See the warning in the log.",
        ),
    },
    "store": {
        "empty": ("There is nothing in the answer.", "Nothing: it would be served again and again."),
        "incomplete": (
            "The model did not say that it had finished, or was cut (`length`), or the stream broke off.",
            "Raise `num_predict` or `num_ctx` if answers are cut.",
        ),
        "part_of_prompt": (
            "The prompt did not fit into the model's window, and the model answered a part of it (`was_cut`).",
            "Raise `num_ctx`, or shorten the prompt.",
        ),
        "not_an_answer": ("What came back is no message of a model.", "Nothing."),
        "invalid_tool_calls": ("The model asked for a tool in a way that cannot be read.", "Nothing."),
        "queue_full": (
            "Answers came faster than Redis took them, and this one could not be stored within `op_budget_s`.",
            "See how busy Redis is.",
        ),
        "too_large": ("The answer is larger than `max_entry_bytes`.", "Raise `max_entry_bytes`."),
        "not_json": (
            "The answer holds what JSON cannot.",
            "Return text, messages or plain JSON from a pipeline.",
        ),
        "invalidated": (
            "Something that it rests on was invalidated while it was made.",
            _FINE,
        ),
        "fenced": ("Another process took over the making of this answer.", _FINE),
        "lost": ("Redis was emptied while the answer was made.", "Nothing: the next one is kept."),
        "failed": (
            "Redis refused to write (read-only, or out of memory).",
            "Give it memory or `maxmemory-policy`; see `aegis doctor`.",
        ),
    },
}  # fmt: skip

_GUARD_REMEDY = "Nothing. `guards_off=[{!r}]` switches it off; `cache.judge(a, b)` shows what it stops."
_STAGES: dict[Stage, str] = {
    "bypass": "The cache was not asked",
    "exact_only": "Only an exact repeat could hit",
    "lookup": "Nothing could be served",
    "guard": "A near answer was held back",
    "store": "The new answer was not kept",
}


def _all() -> Iterator[Reason]:
    for stage, texts in _TEXTS.items():
        for code, (meaning, remedy) in texts.items():
            yield Reason(code, stage, meaning, remedy or _GUARD_REMEDY.format(code.removeprefix("guard:")))


REASONS: Final[Mapping[str, Reason]] = MappingProxyType({reason.code: reason for reason in _all()})


def explain(code: str) -> Reason:
    """Return what `code` means; a code that is not known is said to be so."""
    if (known := REASONS.get(code)) is not None:
        return known
    stage: Stage = "guard" if code.startswith("guard:") else "lookup"
    return Reason(
        code, stage, "This version does not know the code.", "See the change log of the version that said it."
    )


def markdown() -> str:
    """Return all reasons as Markdown tables, one for each stage: what docs/cache.md shows."""
    parts = []
    for stage in get_args(Stage):
        rows = [f"| `{r.code}` | {r.meaning} | {r.remedy} |" for r in REASONS.values() if r.stage == stage]
        parts.append(
            "\n".join([f"**{_STAGES[stage]}**", "", "| Code | What happened | What to do |", "|---|---|---|", *rows])
        )
    return "\n\n".join(parts)
