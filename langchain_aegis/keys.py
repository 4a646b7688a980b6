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
from dataclasses import dataclass
from typing import Any

from langchain_aegis.messages import Message, dumps, loads, parse_prompt
from langchain_aegis.questions import NoQuestion, Question, exact_only_reason, find_question

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
_TOOL_FIELDS = frozenset({"tools", "functions", "tool_choice", "function_call"})
_STRUCTURE_FIELDS = frozenset({"format", "response_format", "ls_structured_output_format", "structured_output"})

FindQuestion = Callable[[str], "tuple[int, int] | None"]


@dataclass(frozen=True, slots=True)
class Key:
    """Where the answer of one call belongs.

    Attributes:
        exact: Digest of the whole call, 32 hex characters.
        scope: Digest of everything but the question, 32 hex characters; "" if only the exact tier applies.
        question: The text that is matched by meaning, or None.
        exact_only: Why only the exact tier applies (a reason code), or None.
        things: Names of what an invalidation may concern: namespace, tenant, user, task, model.
        tenant: Name of the tenant's set of entries.
        user: Name of the user's set of entries, or None.
        tenanted: Whether a tenant was named.
        task: Name of the task, or "".
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
        kept = [self._fields(m) for m in messages]
        exact = self._digest("exact", *self._who(who), model.canonical, *(f for m in kept for f in m))
        scope, text = "", None
        if reason is None and span is not None:
            last = messages[-1]
            whole = last.text or ""
            kept[-1] = self._fields(last, whole[: span.start], whole[span.end :])
            scope = self._digest("scope", *self._who(who), model.canonical, *(f for m in kept for f in m))
            text = span.text
        return self._key(exact, scope, text, reason, who, model.name)

    def for_pipeline(self, question: str, who: Who, *, pipeline: str, version: str) -> Key:
        """Return the key of a whole pipeline's answer to `question`."""
        model = f"pipeline:{len(pipeline)}:{pipeline}:{version}"
        exact = self._digest("exact", *self._who(who), model, question)
        text = question.strip()
        reason = "too_long" if len(text) > 400 else exact_only_reason(text)
        scope = self._digest("scope", *self._who(who), model) if reason is None else ""
        return self._key(exact, scope, text if reason is None else None, reason, who, f"pipeline:{pipeline}")

    def thing(self, kind: str, *values: str | None) -> str:
        """Return the name under which invalidations of one kind of thing are kept, e.g. ("tenant", "acme")."""
        return f"{kind}:{self._digest(kind, *values)[:16]}"

    def _key(self, exact: str, scope: str, text: str | None, reason: str | None, who: Who, model: str | None) -> Key:
        tenant = self.thing("tenant", who.tenant)
        things = ["namespace", tenant]
        user = None
        if who.user is not None:
            user = self.thing("user", who.user)
            things += [user, self.thing("tenant-user", who.tenant, who.user)]
        if who.task is not None:
            things.append(self.thing("task", who.task))
        if model is not None:
            things.append(self.thing("model", model))
        return Key(exact, scope, text, reason, tuple(things), tenant, user, who.tenant is not None, who.task or "")

    def _who(self, who: Who) -> tuple[str | None, ...]:
        return (who.tenant, None if self._share else who.user, who.task)

    def _question(self, messages: Sequence[Message], given: str | None) -> tuple[Question | None, str | None]:
        last = messages[-1]
        if any(m.has_media for m in messages):
            return None, "media"
        if last.role != "human" or (text := last.text) is None:
            return None, "no_question"
        if any(m.role in ("tool", "function") for m in messages) or any(b'"tool_calls"' in m.rest for m in messages):
            return None, "tools"
        others = [t for m in messages[:-1] if (t := m.text) is not None]
        if self._find is not None and given is None:
            span = self._find(text)
            inner = text[span[0] : span[1]] if span is not None else ""
            if span is None or not inner.strip():
                return None, "no_question"
            start = span[0] + len(inner) - len(inner.lstrip())
            found: Question | NoQuestion = Question(inner.strip(), start, start + len(inner.strip()))
        else:
            found = find_question(text, others=others, given=given)
        if isinstance(found, NoQuestion):
            return None, found.reason
        instructions = [t for m in messages[:-1] if m.role == "system" and (t := m.text) is not None]
        instructions += [text[: found.start], text[found.end :]]
        return found, exact_only_reason(found.text, instructions=instructions)

    def _fields(
        self, message: Message, prefix: str | None = None, suffix: str | None = None
    ) -> tuple[bytes | str, ...]:
        """The digest's fields of one message; with `prefix` and `suffix`, those of a message around its question."""
        if prefix is not None and suffix is not None:
            kind = "span-text" if isinstance(message.content, str) else "span-block"
            return (message.role, message.rest, kind, self._cut(prefix), self._cut(suffix))
        if isinstance(message.content, str):
            return (message.role, message.rest, "text", self._cut(message.content))
        return (message.role, message.rest, "blocks", dumps(message.content))

    def _cut(self, text: str) -> str:
        for pattern in self._ignore:
            text = pattern.sub("\ufffc", text)
        return text

    def _digest(self, kind: str, *fields: str | bytes | None) -> str:
        digest = hashlib.blake2b(key=self._names_key, digest_size=16, person=b"aegis-name-v1")
        for field in (kind, self._namespace, *fields):
            if field is None:
                digest.update(b"\xff" * 8)  # no length: a field that is absent equals no text
                continue
            data = field if isinstance(field, bytes) else field.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big"))
            digest.update(data)
        return digest.hexdigest()


def derive(secret: bytes, purpose: str) -> bytes:
    """Return the 32-byte key for one purpose."""
    return hmac.digest(secret, f"langchain-aegis {purpose} v1".encode(), "sha256")


@functools.lru_cache(maxsize=256)
def parse_llm_string(llm_string: str) -> ModelPart | None:
    """Read what LangChain says about the model; None if it is LangChain's own form and names no model.

    A form that is not known is opaque: hashed whole, exact tier only.
    """
    if llm_string.startswith("aegis/1 "):
        try:
            fields = loads(llm_string[8:])
            return ModelPart(llm_string, fields.get("model"), _exact_only(fields))
        except (ValueError, AttributeError, RecursionError):
            return ModelPart(llm_string, None, "opaque_model")
    head, dashes, tail = llm_string.rpartition("---")
    if dashes and head.startswith("{"):  # a serialisable model: JSON of its constructor, then the call's arguments
        try:
            constructor = loads(head).get("kwargs", {})
        except (ValueError, AttributeError, RecursionError):
            return ModelPart(llm_string, None, "opaque_model")
        fields = {**constructor, **_read_params(tail)}
    elif llm_string.startswith("[("):
        fields = _read_params(llm_string)
    else:
        return ModelPart(llm_string, None, "opaque_model")
    name = next((str(fields[n]) for n in _MODEL_NAMES if fields.get(n)), None)
    return None if name is None else ModelPart(llm_string, name, _exact_only(fields))


def _read_params(text: str) -> dict[str, Any]:
    """Read `str(sorted(params.items()))`: as literals where possible, else at least the names and plain texts."""
    try:
        return dict(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        names: dict[str, Any] = dict.fromkeys(re.findall(r"[\[ ]\('(\w+)', (?!None)", text), "unreadable")
        names.update(re.findall(r"[\[ ]\('(\w+)', '([^']*)'\)", text))
        return names


def _exact_only(fields: Mapping[str, Any]) -> str | None:
    if any(fields.get(name) for name in _TOOL_FIELDS):
        return "tools"
    if any(fields.get(name) for name in _STRUCTURE_FIELDS):
        return "structured_output"
    return None
