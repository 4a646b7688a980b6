"""Turn a call into the names under which its answer is kept.

Pure: no clock, no network. Two calls share an exact key only if the model sees the same; they share a scope only if
everything but the question is the same. Every digest is keyed, so that nobody who reads Redis can guess a prompt.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

from langchain_aegis.chunks import ChunkRule, Chunks, Part
from langchain_aegis.messages import Message, dumps, loads, parse_prompt
from langchain_aegis.notices import warn_once
from langchain_aegis.questions import (
    LABELS,
    Labels,
    NoQuestion,
    Question,
    exact_only_reason,
    find_question,
    question_at,
)

_MODEL_NAMES = (
    "model",
    "model_name",
    "model_id",
    "deployment_name",
    "azure_deployment",
    "repo_id",
    "model_path",
    "engine",
)
_OWN_FORM = "aegis/1 "
_UNREADABLE = "unreadable"
_TOOL_FIELDS = frozenset({"tools", "functions", "tool_choice", "function_call"})
_STRUCTURE_FIELDS = frozenset({"format", "response_format", "ls_structured_output_format", "structured_output"})
_TELLING = frozenset({"system", "developer"})
_PART_OF = {
    "stop": "stop",
    **dict.fromkeys(_MODEL_NAMES, "model"),
    **dict.fromkeys(_TOOL_FIELDS, "tools"),
    **dict.fromkeys(_STRUCTURE_FIELDS, "format"),
}

FindQuestion = Callable[[str], "tuple[int, int] | None"]
Fields = tuple[bytes | str, ...]


@dataclass(frozen=True, slots=True)
class Key:
    """Where the answer of one call belongs.

    Attributes:
        exact: Digest of the whole call, 32 hex characters.
        scope: Digest of everything but the question, 32 hex characters; "" if only the exact tier applies.
        question: The text that is matched by meaning, or None.
        exact_only: Why only the exact tier applies (a reason code), or None.
        things: Names of what an invalidation may concern: namespace, tenant, user, task, model, and each of the last
            three within the tenant.
        tenant: Name of the tenant's set of entries.
        user: Name of the user's set of entries, or None.
        tenanted: Whether a tenant was named.
        task: Name of the task, or "".
        sets: Names of the sets that list the entry: tenant, and user, task, model where they are named.
        fields: Makes a digest (8 hex characters) of each part of the scope, by name, so that two scopes can be
            compared. Of a prompt: tenant, user, task, model, options, tools, format, stop, system, history, before
            and after the question, chunks. Of a pipeline: tenant, user, task, pipeline, version.
    """

    exact: str
    scope: str
    question: str | None
    exact_only: str | None
    things: tuple[str, ...]
    tenant: str
    user: str | None
    tenanted: bool
    task: str = ""
    sets: tuple[str, ...] = ()
    fields: Callable[[], dict[str, str]] = field(default=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Declined:
    """The call cannot be cached at all.

    Attributes:
        reason: A code: "unnamed_model", "unreadable_prompt".
    """

    reason: str


@dataclass(frozen=True, slots=True)
class ModelPart:
    """What LangChain's `llm_string` says about the model."""

    canonical: str
    name: str | None
    exact_only: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Who:
    """Whose call it is; None where nobody was named, which is a value of its own."""

    tenant: str | None = None
    user: str | None = None
    task: str | None = None


class Keyring:
    """Makes the keys of one namespace from one secret.

    Args:
        secret: At least 16 bytes, the same for every process that shares the entries.
        namespace: Part of every digest.
        share_within_tenant: Leave the user out of keys and scopes.
        scope_ignore: Patterns of text outside the question that does not matter, e.g. a timestamp.
        find_question: Own rule for where the question stands in the last human message: text -> (start, end).
        allow_unnamed_models: Cache models whose `llm_string` names no model.
        labels: How prompts mark their parts, in place of the built-in labels.
        chunks: What counts as a retrieved chunk; see `Chunks`. The scope takes the chunks of a message as a set, and
            all text around them byte for byte: a number or a title in front of a chunk must be part of the chunk,
            else it keeps its place. The exact key takes everything byte for byte.

    Raises:
        AegisConfigError: `chunks` is no rule.
    """

    def __init__(
        self,
        secret: bytes,
        *,
        namespace: str = "aegis",
        share_within_tenant: bool = False,
        scope_ignore: Iterable[str] = (),
        find_question: FindQuestion | None = None,
        allow_unnamed_models: bool = False,
        labels: Labels | None = None,
        chunks: ChunkRule | None = None,
    ) -> None:
        self._names_key = derive(secret, "names")
        self.mac_key = derive(secret, "mac")
        self.profile_key = derive(secret, "profile")[:32]
        self.fingerprint = derive(secret, "fingerprint").hex()[:16]
        self._namespace = namespace
        self._share = share_within_tenant
        self._ignore = tuple(re.compile(p) for p in scope_ignore)
        self._find = find_question
        self._allow_unnamed = allow_unnamed_models
        self._labels = labels if labels is not None else LABELS
        self._chunks = Chunks(chunks)

    def for_prompt(self, prompt: str, llm_string: str, who: Who, question: str | None = None) -> Key | Declined:
        """Return the key of a call that LangChain describes with two strings.

        Args:
            prompt: What `BaseCache.lookup` gets: dumped messages, or a text.
            llm_string: The model and its options.
            who: Whose call it is.
            question: The question inside the prompt, if the caller marked it.
        """
        model = parse_llm_string(llm_string)
        if model is None and not self._allow_unnamed:
            return Declined("unnamed_model")
        if model is None:
            model = ModelPart(llm_string, None)
        messages = parse_prompt(prompt)
        if messages is None:
            return Declined("unreadable_prompt")
        span, reason = self._question(messages, question)
        reason = model.exact_only or reason
        told = (*self._who(who), model.canonical)
        *others, last = messages
        before = [self._exact_row(m, None, last=False) for m in others]
        exact = self._digest("exact", *told, *chain(*before), *self._exact_row(last, span, last=True))
        scope, text = "", None
        if reason is None and span is not None:
            if self._chunks:
                before = [self._scope_row(m, None) for m in others]
            scope = self._digest("scope", *told, *chain(*before), *self._scope_row(last, span))
            text = span.text
        fields = functools.partial(self._prompt_fields, messages, span, who, model.canonical)
        return self._key(exact, scope, text, reason, who, model.name, fields)

    def for_pipeline(self, question: str, who: Who, *, pipeline: str, version: str) -> Key:
        """Return the key of a whole pipeline's answer to `question`."""
        model = f"pipeline:{len(pipeline)}:{pipeline}:{version}"
        exact = self._digest("exact", *self._who(who), model, question)
        text = question.strip()
        reason = "too_long" if len(text) > 400 else exact_only_reason(text)
        scope = self._digest("scope", *self._who(who), model) if reason is None else ""

        def fields() -> dict[str, str]:
            return self._short({**self._who_fields(who), "pipeline": [pipeline], "version": [version]})

        text_asked = text if reason is None else None
        return self._key(exact, scope, text_asked, reason, who, f"pipeline:{pipeline}", fields)

    def thing(self, kind: str, *values: str | None) -> str:
        """Return the name under which invalidations of one kind of thing are kept, e.g. ("tenant", "acme")."""
        return f"{kind}:{self._digest(kind, *values)[:16]}"

    def _key(
        self,
        exact: str,
        scope: str,
        text: str | None,
        reason: str | None,
        who: Who,
        model: str | None,
        fields: Callable[[], dict[str, str]],
    ) -> Key:
        tenant = self.thing("tenant", who.tenant)
        things, sets = ["namespace", tenant], [tenant]
        user = None
        for kind, name in (("user", who.user), ("task", who.task), ("model", model)):
            if name is None:
                continue
            alone = self.thing(kind, name)
            things += [alone, self.thing(f"tenant-{kind}", who.tenant, name)]
            sets.append(alone)
            user = alone if kind == "user" else user
        return Key(
            exact,
            scope,
            text,
            reason,
            tuple(things),
            tenant,
            user,
            who.tenant is not None,
            who.task or "",
            tuple(sets),
            fields,
        )

    def _who(self, who: Who) -> tuple[str | None, ...]:
        return (who.tenant, None if self._share else who.user, who.task)

    def _who_fields(self, who: Who) -> dict[str, Sequence[str | bytes | None]]:
        return {name: [value] for name, value in zip(("tenant", "user", "task"), self._who(who), strict=True)}

    def _question(self, messages: Sequence[Message], given: str | None) -> tuple[Question | None, str | None]:
        """Return where the question stands, if that can be told, and why it must not be matched by meaning."""
        last = messages[-1]
        if any(m.has_media for m in messages):
            return None, "media"
        if last.role != "human" or (text := last.text) is None:
            return None, "no_question"
        if any(m.role in ("tool", "function") for m in messages) or any(b'"tool_calls"' in m.rest for m in messages):
            return None, "tools"
        others = [t for m in messages[:-1] if (t := m.text) is not None]
        if self._find is not None and given is None:
            found = self._found(text, self._find)
        else:
            found = find_question(text, others=others, given=given, labels=self._labels)
        if isinstance(found, NoQuestion):
            return None, found.reason
        reason = exact_only_reason(
            found.text,
            system=[t for m in messages[:-1] if m.role in _TELLING and (t := m.text) is not None],
            around=[text[: found.start], text[found.end :]],
            earlier=[
                (asked.text or "", reply.text or "")
                for asked, reply in pairwise(messages[:-1])
                if asked.role == "human" and reply.role == "ai"
            ],
            marked=given is not None,
        )
        return found, reason

    def _found(self, text: str, find: FindQuestion) -> Question | NoQuestion:
        try:
            span = find(text)
            return NoQuestion("no_question") if span is None else question_at(text, int(span[0]), int(span[1]))
        except Exception as exc:  # whatever a caller's rule raises must not break the call
            warn_once(
                "find_question_failed",
                f"find_question failed ({type(exc).__name__}), so that nothing is matched by meaning. It gets the text "
                "of the last human message: let it return (start, end), or None where there is no question",
            )
            return NoQuestion("no_question")

    def _exact_row(self, message: Message, span: Question | None, *, last: bool) -> Fields:
        text, kind = message.text, "text" if isinstance(message.content, str) else "block"
        if text is None:
            return (message.role, message.rest, "blocks", dumps(message.content))
        if span is not None:
            before, after = self._cut(text[: span.start]), self._cut(text[span.end :])
            return (message.role, message.rest, f"span-{kind}", before, span.text, after)
        # A last message without a span may be a question as a whole: nothing of it is left out.
        return (message.role, message.rest, kind, text if last else self._cut(text))

    def _scope_row(self, message: Message, span: Question | None) -> Fields:
        """Return role, rest, kind, text and chunks; of the message with the question, text and chunks after it too."""
        text, kind = message.text, "text" if isinstance(message.content, str) else "block"
        if text is None:
            return (message.role, message.rest, "blocks", dumps(message.content), "")
        if span is None:
            return (message.role, message.rest, kind, *self._part(self._chunks.split(text)))
        before, after = self._chunks.split_around(text[: span.start], text[span.end :])
        return (message.role, message.rest, f"span-{kind}", *self._part(before), *self._part(after))

    def _part(self, part: Part) -> Fields:
        """Return the two fields of a text: what stands around its chunks, and the chunks as a set."""
        if not part.chunks:
            return self._cut(part.gaps[0]), ""
        first, *between, end = map(self._cut, part.gaps)
        # Equal separators count once: then neither the order of the chunks nor a repeated chunk can be seen in them.
        gaps = [first, *(between[:1] if len(set(between)) == 1 else between), end]
        data = [gap.encode("utf-8", "surrogatepass") for gap in gaps]
        around = b"".join(len(gap).to_bytes(8, "big") + gap for gap in data)
        return around, "".join(sorted({self._digest("chunk", self._cut(chunk)) for chunk in part.chunks}))

    def _prompt_fields(
        self, messages: Sequence[Message], span: Question | None, who: Who, llm_string: str
    ) -> dict[str, str]:
        found: dict[str, list[str | bytes | None]] = {
            name: [] for name in ("system", "history", "before", "after", "chunks")
        }
        *others, last = messages
        for message in others:
            *text, chunks = self._scope_row(message, None)
            if message.role == "system":
                found["history"].append(None)  # its place among the other messages
            found["system" if message.role == "system" else "history"] += text
            found["chunks"].append(chunks)
        row = self._scope_row(last, span)
        found["before"] += row[:4]
        found["after"] += row[5:6]
        found["chunks"] += row[4::2]
        return self._short({**self._who_fields(who), **model_fields(llm_string), **found})

    def _short(self, fields: Mapping[str, Sequence[str | bytes | None]]) -> dict[str, str]:
        return {name: self._digest(f"field {name}", *values)[:8] for name, values in fields.items()}

    def _cut(self, text: str) -> str:
        for pattern in self._ignore:
            text = pattern.sub("\ufffc", text)
        return text

    def _digest(self, kind: str, *fields: str | bytes | None) -> str:
        digest = hashlib.blake2b(key=self._names_key, digest_size=16, person=b"aegis-name-v1")
        pieces: list[bytes] = []
        for item in (kind, self._namespace, *fields):
            if item is None:
                pieces.append(b"\xff" * 8)  # no length: a field that is absent equals no text
                continue
            data = item if isinstance(item, bytes) else item.encode("utf-8", "surrogatepass")
            pieces += len(data).to_bytes(8, "big"), data
        digest.update(b"".join(pieces))
        return digest.hexdigest()


def derive(secret: bytes, purpose: str) -> bytes:
    """Return the 32-byte key for one purpose."""
    return hmac.digest(secret, f"langchain-aegis {purpose} v1".encode(), "sha256")


@functools.lru_cache(maxsize=256)
def parse_llm_string(llm_string: str) -> ModelPart | None:
    """Read what LangChain says about the model; None if it is LangChain's own form and names no model.

    A form that is not known is opaque: hashed whole, exact tier only.
    """
    fields = _read(llm_string)
    if fields is None:
        return ModelPart(llm_string, None, "opaque_model")
    name = _name(fields)
    if name is None and not llm_string.startswith(_OWN_FORM):
        return None
    reason = "tools" if any(fields.get(f) for f in _TOOL_FIELDS) else None
    if reason is None and any(fields.get(f) for f in _STRUCTURE_FIELDS):
        reason = "structured_output"
    return ModelPart(llm_string, name, reason)


def model_fields(llm_string: str) -> dict[str, tuple[str]]:
    """Return what an `llm_string` says in parts: model, tools, format, stop, and all else as options."""
    fields = _read(llm_string)
    parts: dict[str, dict[str, Any]] = {"model": {}, "options": {}, "tools": {}, "format": {}, "stop": {}}
    if fields is None or _UNREADABLE in fields.values():
        fields = {**(fields or {}), "whole": llm_string}
    for name, value in fields.items():
        parts[_PART_OF.get(name, "options")][name] = value
    return {part: (repr(sorted(told.items())),) for part, told in parts.items()}


def _name(fields: Mapping[str, Any]) -> str | None:
    return next((str(fields[n]) for n in _MODEL_NAMES if fields.get(n)), None)


def _read(llm_string: str) -> dict[str, Any] | None:
    """Return the fields of a form that is known, else None."""
    try:
        if llm_string.startswith(_OWN_FORM):
            return dict(loads(llm_string[len(_OWN_FORM) :]))
        if llm_string.startswith("[("):
            return _read_params(llm_string)
        head, dashes, tail = llm_string.rpartition("---")
        if dashes and head.startswith("{"):  # a serialisable model: its constructor as JSON, then the call's arguments
            return {**loads(head).get("kwargs", {}), **_read_params(tail)}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return None


def _read_params(text: str) -> dict[str, Any]:
    """Read `str(sorted(params.items()))`: as literals where possible, else at least the names and plain texts."""
    try:
        return dict(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        names: dict[str, Any] = dict.fromkeys(re.findall(r"[\[ ]\('(\w+)', (?!None)", text), _UNREADABLE)
        names.update(re.findall(r"[\[ ]\('(\w+)', '([^']*)'\)", text))
        return names
