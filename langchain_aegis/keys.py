"""Turn a call into the names under which its answer is kept.

Pure: no clock, no network. Two calls share an exact key only if the model sees the same; they share a scope only if
everything but the question is the same. Every digest is keyed, so that nobody who reads Redis can guess a prompt.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

from langchain_aegis.chunks import ChunkRule, Chunks, Part
from langchain_aegis.known_prompts import KnownPrompts
from langchain_aegis.messages import Message, dumps, parse_prompt
from langchain_aegis.model_parts import ModelPart, model_fields, parse_llm_string
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
from langchain_aegis.seals import Seal, derive

_TELLING = frozenset({"system", "developer"})

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

    @property
    def length(self) -> int:
        """Characters of the prompt that `resolve` has to read; 0 if all is known."""
        return 0

    def resolve(self) -> None:
        """Find out what is not known yet."""


class _PromptKey(Key):
    """The key of a prompt whose question is looked for when somebody asks: an exact repeat needs none."""

    __slots__ = ("_reading",)
    _reading: _Reading

    def __init__(self, exact: str, owner: _Owner, reading: _Reading) -> None:
        put = object.__setattr__
        put(self, "exact", exact)
        put(self, "things", owner.things)
        put(self, "tenant", owner.tenant)
        put(self, "user", owner.user)
        put(self, "tenanted", owner.tenanted)
        put(self, "task", owner.task)
        put(self, "sets", owner.sets)
        put(self, "_reading", reading)

    @property
    def length(self) -> int:
        return self._reading.length()

    def resolve(self) -> None:
        self._reading.meaning()

    @property
    def scope(self) -> str:
        return self._reading.meaning().scope

    @property
    def question(self) -> str | None:
        return self._reading.meaning().question

    @property
    def exact_only(self) -> str | None:
        return self._reading.meaning().exact_only

    @property
    def fields(self) -> Callable[[], dict[str, str]]:
        return self._reading.fields


class _Reading:
    """A prompt that can be read, and what it asks once somebody wants to know."""

    __slots__ = ("_known", "_marked", "_messages", "_model", "_prompt", "_ring", "_who")

    def __init__(self, ring: Keyring, prompt: str, marked: str | None, who: Who, model: ModelPart) -> None:
        self._ring = ring
        self._prompt = prompt
        self._marked = marked
        self._who = who
        self._model = model
        self._messages: Sequence[Message] | None = None
        self._known: _Meaning | None = None

    def messages(self) -> Sequence[Message] | None:
        """Return the prompt taken apart; None if it cannot be read."""
        if (messages := self._messages) is None:
            messages = self._messages = parse_prompt(self._prompt)
        return messages

    def length(self) -> int:
        return 0 if self._known is not None else sum(len(m.text or "") for m in self.messages() or ())

    def meaning(self) -> _Meaning:
        if (known := self._known) is None:
            known = self._known = self._ring._meaning(self.messages() or (), self._marked, self._who, self._model)
        return known

    def fields(self) -> dict[str, str]:
        span, told = self.meaning().span, self.messages() or ()
        return self._ring._prompt_fields(told, span, self._who, self._model.canonical)


@dataclass(slots=True)
class _Meaning:
    """The part of a key that needs the question; `span` is where it stands, even if only the exact tier applies."""

    scope: str
    question: str | None
    exact_only: str | None
    span: Question | None


@dataclass(frozen=True, slots=True)
class _Owner:
    """What the keys of one caller and model have in common. Three begin digests; `raw` is of a prompt as it comes."""

    exact: Any
    scope: Any
    raw: Any
    things: tuple[str, ...]
    tenant: str
    user: str | None
    tenanted: bool
    task: str
    sets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Declined:
    """The call cannot be cached at all.

    Attributes:
        reason: A code: "unnamed_model", "unreadable_prompt".
    """

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Who:
    """Whose call it is; None where nobody was named, which is a value of its own."""

    tenant: str | None = None
    user: str | None = None
    task: str | None = None


class Keyring:
    """Makes the keys of one namespace from one secret.

    Args:
        secret: At least 16 bytes, the same for every process that shares the entries. All names are made with it.
        record_secrets: What records are signed with, and encrypted: the first new ones, any of them old ones. Default:
            `secret`.
        encrypt: Whether records are encrypted.
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
        AegisConfigError: `chunks` is no rule, or what `Seal` says.
    """

    def __init__(
        self,
        secret: bytes,
        *,
        record_secrets: Sequence[bytes] = (),
        encrypt: bool = False,
        namespace: str = "aegis",
        share_within_tenant: bool = False,
        scope_ignore: Iterable[str] = (),
        find_question: FindQuestion | None = None,
        allow_unnamed_models: bool = False,
        labels: Labels | None = None,
        chunks: ChunkRule | None = None,
    ) -> None:
        self._names_key = derive(secret, "names")
        self.seal = Seal(record_secrets or (secret,), encrypt=encrypt)
        self.profile_key = derive(secret, "profile")[:32]
        self.fingerprint = derive(secret, "fingerprint").hex()[:16]
        self._namespace = namespace
        self._share = share_within_tenant
        self._ignore = tuple(re.compile(p) for p in scope_ignore)
        self._find = find_question
        self._allow_unnamed = allow_unnamed_models
        self._labels = labels if labels is not None else LABELS
        self._chunks = Chunks(chunks)
        self._owner = functools.lru_cache(maxsize=256)(self._make_owner)
        self._known = KnownPrompts()

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
        owner = self._owner(who.tenant, who.user, who.task, model.name, model.canonical)
        reading = _Reading(self, prompt, question, who, model)
        if self._ignore:  # then the key may depend on which part is said to be the question
            exact = self._exact(owner, reading)
        else:
            digest = owner.raw.copy()
            digest.update(prompt.encode("utf-8", "surrogatepass"))
            raw = digest.digest()
            if (exact := self._known.get(raw)) is None and (exact := self._exact(owner, reading)) is not None:
                self._known.put(raw, exact)
        return Declined("unreadable_prompt") if exact is None else _PromptKey(exact, owner, reading)

    def _exact(self, owner: _Owner, reading: _Reading) -> str | None:
        """Return the exact key of a prompt; None if it cannot be read."""
        if not (messages := reading.messages()):
            return None
        span = reading.meaning().span if self._ignore else None  # patterns do not apply to the question
        *others, last = messages
        rows = [self._exact_row(m, None, last=False) for m in others]
        rows.append(self._exact_row(last, span, last=True))
        digest = owner.exact.copy()
        digest.update(_framed(chain.from_iterable(rows)))
        return str(digest.hexdigest())

    def _meaning(self, messages: Sequence[Message], question: str | None, who: Who, model: ModelPart) -> _Meaning:
        """Return scope, question, and why only the exact tier applies."""
        span, reason = self._question(messages, question)
        reason = model.exact_only or reason
        scope, text = "", None
        if reason is None and span is not None:
            *others, last = messages
            rows = [(self._scope_row if self._chunks else self._plain_row)(m) for m in others]
            rows.append(self._scope_row(last, span))
            digest = self._owner(who.tenant, who.user, who.task, model.name, model.canonical).scope.copy()
            digest.update(_framed(chain.from_iterable(rows)))
            scope, text = digest.hexdigest(), span.text
        return _Meaning(scope, text, reason, span)

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
        owner = self._owner(who.tenant, who.user, who.task, f"pipeline:{pipeline}", model)
        return Key(
            exact, scope, text_asked, reason, owner.things, owner.tenant, owner.user, owner.tenanted, owner.task,
            owner.sets, fields,
        )  # fmt: skip

    def thing(self, kind: str, *values: str | None) -> str:
        """Return the name under which invalidations of one kind of thing are kept, e.g. ("tenant", "acme")."""
        return f"{kind}:{self._digest(kind, *values)[:16]}"

    def _make_owner(
        self, tenant_name: str | None, user_name: str | None, task: str | None, model: str | None, canonical: str
    ) -> _Owner:
        tenant = self.thing("tenant", tenant_name)
        things, sets = ["namespace", tenant], [tenant]
        user = None
        for kind, name in (("user", user_name), ("task", task), ("model", model)):
            if name is None:
                continue
            alone = self.thing(kind, name)
            things += [alone, self.thing(f"tenant-{kind}", tenant_name, name)]
            sets.append(alone)
            user = alone if kind == "user" else user
        who = Who(tenant=tenant_name, user=user_name, task=task)
        named = (*self._who(who), canonical)
        return _Owner(
            self._begun("exact", *named), self._begun("scope", *named), self._begun("raw", *named), tuple(things),
            tenant, user, tenant_name is not None, task or "", tuple(sets),
        )  # fmt: skip

    def _who(self, who: Who) -> tuple[str | None, ...]:
        return (who.tenant, None if self._share else who.user, who.task)

    def _who_fields(self, who: Who) -> dict[str, Sequence[str | bytes | None]]:
        return {name: [value] for name, value in zip(("tenant", "user", "task"), self._who(who), strict=True)}

    def _question(self, messages: Sequence[Message], given: str | None) -> tuple[Question | None, str | None]:
        """Return where the question stands, if that can be told, and why it must not be matched by meaning."""
        *before, last = messages
        if any(m.has_media for m in messages):
            return None, "media"
        if last.role != "human" or (text := last.text) is None:
            return None, "no_question"
        if any(m.role in ("tool", "function") or b'"tool_calls"' in m.rest for m in messages):
            return None, "tools"
        others = [t for m in before if (t := m.text) is not None]
        if self._find is not None and given is None:
            found = self._found(text, self._find)
        else:
            found = find_question(text, others=others, given=given, labels=self._labels)
        if isinstance(found, NoQuestion):
            return None, found.reason
        reason = exact_only_reason(
            found.text,
            system=[t for m in before if m.role in _TELLING and (t := m.text) is not None],
            around=[text[: found.start], text[found.end :]],
            earlier=[
                (asked.text or "", reply.text or "")
                for asked, reply in pairwise(before)
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

    def _plain_row(self, message: Message) -> Fields:
        return self._exact_row(message, None, last=False)

    def _scope_row(self, message: Message, span: Question | None = None) -> Fields:
        """Return role, rest, kind, text and chunks; of the message with the question, text and chunks after it too."""
        text, kind = message.text, "text" if isinstance(message.content, str) else "block"
        if text is None:
            return (message.role, message.rest, "blocks", dumps(message.content), "")
        if span is None:
            return (message.role, message.rest, kind, *self._part(self._chunks.split(text)))
        if not self._chunks:
            told = self._cut(text[: span.start]), "", self._cut(text[span.end :]), ""
            return (message.role, message.rest, f"span-{kind}", *told)
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
        return {name: self._digest(f"field {name}", *values)[:_SHORT] for name, values in fields.items()}

    def _cut(self, text: str) -> str:
        for pattern in self._ignore:
            text = pattern.sub("\ufffc", text)
        return text

    def _digest(self, kind: str, *fields: str | bytes | None) -> str:
        digest: str = self._begun(kind, *fields).hexdigest()
        return digest

    def _begun(self, kind: str, *fields: str | bytes | None) -> Any:
        """Return the digest of some fields; more may be added."""
        digest = hashlib.blake2b(key=self._names_key, digest_size=16, person=b"aegis-name-v1")
        digest.update(_framed((kind, self._namespace, *fields)))
        return digest


def _framed(fields: Iterable[str | bytes | None]) -> bytes:
    """Return fields so that no two lists of them are the same bytes."""
    pieces: list[bytes] = []
    for item in fields:
        if item is None:
            pieces.append(b"\xff" * 8)  # no length: a field that is absent equals no text
            continue
        data = item if isinstance(item, bytes) else item.encode("utf-8", "surrogatepass")
        pieces += len(data).to_bytes(8, "big"), data
    return b"".join(pieces)


# The parts of a scope, by what it is the scope of.
_PARTS = {
    "p": ("tenant", "user", "task", "model", "options", "tools", "format", "stop", "system", "history", "before",
          "after", "chunks"),
    "v": ("tenant", "user", "task", "pipeline", "version"),
}  # fmt: skip
_SHORT = 8  # characters of a part's digest


def written_fields(fields: Mapping[str, str]) -> str:
    """Return what `Key.fields` made as it is kept in a record: "p" or "v", and the digests."""
    kind = next(kind for kind, names in _PARTS.items() if names == tuple(fields))
    return kind + "".join(fields.values())


def read_fields(text: str) -> dict[str, str]:
    """Return what `written_fields` was given; empty if `text` is nothing of the kind."""
    names = _PARTS.get(text[:1], ())
    if len(text) != 1 + _SHORT * len(names):
        return {}
    return {name: text[1 + _SHORT * i : 1 + _SHORT * (i + 1)] for i, name in enumerate(names)}
