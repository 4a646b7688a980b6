"""Get models ready before the first call: downloaded, loaded, and with a system prompt read.

Order: the largest first. When a model is loaded beside others, Ollama (since 0.30) wants it to fit whole and unloads
idle ones until it does; the first one gets an empty memory. With the small embedder first, the large model would push
it out, and loading the embedder again might push out the large one. If two do not fit together, that is said: nothing
is loaded a second time.

A model stays for the `keep_alive` of the last request that named one, whoever sent it. So this package names its own
with every call, and `aegis warm --watch` looks again and again; what cannot be prevented is that another client
unloads a model in between, or that the server needs the memory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Self

from langchain_aegis.attempts import Timeouts
from langchain_aegis.client import OllamaClient
from langchain_aegis.errors import AegisConfigError, AegisError, AegisModelNotFoundError
from langchain_aegis.flows import Flow, arun, run
from langchain_aegis.identity import normalise_model
from langchain_aegis.reloads import RUNNER_OPTIONS, Rule, reloads, runner_options
from langchain_aegis.timestamps import unix_s

MOST_FAILURES: Final = 5  # of a download, without one new byte between them
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 15.0
_FOREVER_S = 10 * 365 * 86_400  # what expires later was told to stay for ever
_STALLED_S = 120.0  # a download that tells nothing for so long has stalled

Phase = Literal["pull", "retry", "load", "prefill", "ready"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the warming of one model is.

    Attributes:
        model: Its name.
        phase: What is done now; "retry": the download broke off and goes on in a moment.
        text: The server's words, or why the download broke off.
        completed: Bytes that have come.
        total: Bytes of what is known of the model so far.
    """

    model: str
    phase: Phase
    text: str = ""
    completed: int = 0
    total: int = 0


Report = Callable[[Progress], object]


@dataclass(frozen=True, slots=True)
class Warmed:
    """A model that was made ready.

    Attributes:
        model: Its name, with its tag.
        resident: Whether it was loaded at the end: not if one that was loaded later needed its memory.
        pulled_bytes: So much was downloaded.
        load_s: Seconds that loading took; about 0 if it was loaded.
        window_tokens: The window of each slot, or None if the server does not say.
        size_bytes: Memory that it takes.
        gpu_bytes: How much of that is on a GPU.
        stays_s: Seconds until it is unloaded when nothing is asked; None: for ever, or not resident.
        prefilled_tokens: Tokens of the system prompt that were read.
    """

    model: str
    resident: bool = False
    pulled_bytes: int = 0
    load_s: float = 0.0
    window_tokens: int | None = None
    size_bytes: int = 0
    gpu_bytes: int = 0
    stays_s: float | None = None
    prefilled_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A model that is to be made ready.

    Attributes:
        model: Its name.
        body: Fields of the request that its calls will send: what is loaded must be what they need.
        embeds: It makes vectors; None: the server says.
        runner: Returns the runner options that calls send now; None: take whatever is loaded.
        system: Text that the prompts of its calls begin with, read in advance.
    """

    model: str
    body: Mapping[str, Any] = field(default_factory=dict)
    embeds: bool | None = None
    runner: Callable[[], Mapping[str, Any]] | None = None
    system: str | None = None

    @classmethod
    def of(
        cls, body: Mapping[str, Any], server: str, *, rule: Rule, where: str, embeds: bool, system: str | None = None
    ) -> Self:
        """Return the target for calls of a process that send `body`, whose runner options they share.

        Raises:
            AegisReloadError: Other calls of the process have other ones, and `rule` is "raise".
        """
        model, options = body["model"], body.get("options", {})
        asked = runner_options(options, body.get("shift"))
        own = ("num_ctx",) if embeds else ("shift",)
        if rule != "allow":
            reloads.share(server, model, asked, where=lambda: where, rule=rule, own=own)

        def runner() -> Mapping[str, Any]:
            sent = asked if rule == "allow" else reloads.send(server, model, asked, own=own)
            return {name: value for name, value in sent.items() if name != "shift"}

        kept = {name: value for name, value in options.items() if name not in RUNNER_OPTIONS}
        fields = {name: value for name, value in body.items() if name not in ("messages", "input")}
        return cls(model=model, body={**fields, "options": kept}, embeds=embeds, runner=runner, system=system)

    def __post_init__(self) -> None:
        """Refuse what would unload the model."""
        if self.body.get("keep_alive") in (0, "0", "0s", "0m", "0h"):
            raise AegisConfigError(f"keep_alive=0 unloads {self.model} after each call: there is nothing to warm")


def warm(
    targets: Sequence[Target], client: OllamaClient, timeouts: Timeouts, *, pull: bool = True,
    report: Report | None = None,
) -> list[Warmed]:  # fmt: skip
    """Make models ready, and return what became of them, in the order of `targets`.

    Args:
        targets: The models, all of one server.
        client: The server.
        timeouts: Bounds of each request but a download, which may take as long as bytes come.
        pull: Download what the server does not have.
        report: Told how far it is.

    Raises:
        AegisModelNotFoundError: There is no such model, or it is not there and `pull` is False.
        AegisError: The server cannot be reached, or failed.
    """
    performer = _Performer(client, timeouts, report or _silent)
    return run(_warm(targets, pull, report or _silent), performer.perform)


async def awarm(
    targets: Sequence[Target], client: OllamaClient, timeouts: Timeouts, *, pull: bool = True,
    report: Report | None = None,
) -> list[Warmed]:  # fmt: skip
    """Do what `warm` does, without blocking the event loop."""
    performer = _Performer(client, timeouts, report or _silent)
    return await arun(_warm(targets, pull, report or _silent), performer.aperform)


def _silent(told: Progress) -> None:
    pass


# What the flow asks for.


@dataclass(frozen=True, slots=True)
class _Ask:
    """One call of the client, by the name of its method."""

    method: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class _Wait:
    seconds: float


@dataclass(slots=True)
class _Pull:
    """One attempt to download a model; knows how much of each layer has come."""

    model: str
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def completed(self) -> int:
        return sum(done for done, _ in self.layers.values())

    def progress(self, part: Mapping[str, Any]) -> Progress:
        digest, total = part.get("digest"), part.get("total")
        if isinstance(digest, str) and type(total) is int:
            done = part.get("completed")
            self.layers[digest] = (done if type(done) is int else 0, total)
        whole = sum(total for _, total in self.layers.values())
        return Progress(self.model, "pull", str(part.get("status", "")), self.completed, whole)


class _Performer:
    def __init__(self, client: OllamaClient, timeouts: Timeouts, report: Report) -> None:
        self._client = client
        self._timeouts = timeouts
        self._pulling = replace(timeouts, read_s=_STALLED_S, deadline_s=None)
        self._report = report

    def perform(self, step: Any) -> Any:
        if isinstance(step, _Wait):
            return time.sleep(step.seconds)
        if isinstance(step, _Pull):
            for part in self._client.pull(step.model, timeouts=self._pulling):
                self._report(step.progress(part))
            return None
        return getattr(self._client, step.method)(*step.arguments, timeouts=self._timeouts)

    async def aperform(self, step: Any) -> Any:
        if isinstance(step, _Wait):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, _Pull):
            async for part in self._client.apull(step.model, timeouts=self._pulling):
                self._report(step.progress(part))
            return None
        return await getattr(self._client, f"a{step.method}")(*step.arguments, timeouts=self._timeouts)


def _warm(targets: Sequence[Target], pull: bool, report: Report) -> Flow[list[Warmed]]:
    pulled: dict[str, int] = {}
    there = yield from _sizes()
    for target in targets:
        name = normalise_model(target.model)
        if name not in there and name not in pulled:
            if not pull:
                raise AegisModelNotFoundError(
                    f"the server does not have the model {target.model!r}; run `ollama pull {target.model}` there. It"
                    f" has: {', '.join(there) or 'none'}"
                )
            pulled[name] = yield from _download(target.model, report)
    if pulled:
        there = yield from _sizes()
    warmed: dict[int, Warmed] = {}
    for at, target in sorted(enumerate(targets), key=lambda each: -there.get(normalise_model(each[1].model), 0)):
        warmed[at] = yield from _load(target, report)
    loaded = {str(each.get("model")): each for each in (yield _Ask("ps"))}
    found = []
    for at, target in enumerate(targets):
        name = normalise_model(target.model)
        found.append(_as_loaded(replace(warmed[at], pulled_bytes=pulled.get(name, 0)), loaded.get(name)))
        report(Progress(target.model, "ready"))
    return found


def _sizes() -> Flow[dict[str, int]]:
    found = yield _Ask("tags")
    return {str(each.get("model") or each.get("name")): int(each.get("size") or 0) for each in found}


def _download(model: str, report: Report) -> Flow[int]:
    """Download a model, beginning again where it broke off; return how many bytes it has."""
    best = failures = 0
    while True:
        step = _Pull(model)
        try:
            yield step
        except AegisError as exc:
            if isinstance(exc, AegisModelNotFoundError):
                raise AegisModelNotFoundError(f"{model!r} cannot be pulled: {exc}") from exc
            if not exc.retryable:  # a lost connection, a restart, or a registry's hiccup passes
                raise
            failures = 1 if step.completed > best else failures + 1
            best = max(best, step.completed)
            if failures > MOST_FAILURES:
                raise
            report(Progress(model, "retry", str(exc), best))
            yield _Wait(min(_FIRST_WAIT_S * 2 ** (failures - 1), _LONGEST_WAIT_S))
        else:
            return step.completed


def _load(target: Target, report: Report) -> Flow[Warmed]:
    name = normalise_model(target.model)
    embeds = target.embeds
    if embeds is None:
        embeds = _makes_vectors((yield _Ask("show", (target.model,))))
    if target.runner is not None:
        runner = target.runner()
    else:
        loaded = {str(each.get("model")): each.get("context_length") for each in (yield _Ask("ps"))}
        runner = {"num_ctx": loaded[name]} if loaded.get(name) else {}
    report(Progress(target.model, "load"))
    body = {**target.body, "model": target.model, "options": {**target.body.get("options", {}), **runner}}
    began = time.monotonic()
    if embeds:
        yield _Ask("embed", ({**body, "input": []},))
    else:
        yield _Ask("chat", ({**body, "messages": []},))
    warmed = Warmed(name, load_s=round(time.monotonic() - began, 3))
    if target.system and not embeds:
        report(Progress(target.model, "prefill"))
        # The prompt of every call begins alike up to the question, of which one character stands here.
        asked = {
            **body,
            "messages": [{"role": "system", "content": target.system}, {"role": "user", "content": "."}],
            "options": {**body["options"], "num_predict": 1},
            "truncate": False,
        }
        answer = yield _Ask("chat", (asked,))
        warmed = replace(warmed, prefilled_tokens=int(answer.get("prompt_eval_count") or 0))
    return warmed


def _makes_vectors(shown: Mapping[str, Any]) -> bool:
    able = shown.get("capabilities")
    if isinstance(able, list):
        return "embedding" in able and "completion" not in able
    return "bert" in str((shown.get("details") or {}).get("family", ""))  # servers before 0.6.4 do not say


def _as_loaded(warmed: Warmed, loaded: Mapping[str, Any] | None) -> Warmed:
    if loaded is None:
        return warmed
    window = loaded.get("context_length")
    return replace(
        warmed,
        resident=True,
        window_tokens=window if type(window) is int and window else None,
        size_bytes=int(loaded.get("size") or 0),
        gpu_bytes=int(loaded.get("size_vram") or 0),
        stays_s=stays_s(loaded),
    )


def stays_s(loaded: Mapping[str, Any]) -> float | None:
    """Return the seconds until a loaded model, as /api/ps tells of it, is unloaded; None: never, or unknown."""
    expires_s = unix_s(loaded.get("expires_at"))
    if expires_s is None:
        return None
    left = expires_s - time.time()
    return None if left > _FOREVER_S else round(max(left, 0.0), 1)


def fading(targets: Sequence[Target], loaded: Sequence[Mapping[str, Any]], *, within_s: float) -> list[Target]:
    """Return the targets that are not loaded, or will be unloaded within so many seconds.

    Args:
        targets: The models.
        loaded: What /api/ps tells.
        within_s: Seconds.
    """
    here = {str(each.get("model")): stays_s(each) for each in loaded}
    found = []
    for target in targets:
        name = normalise_model(target.model)
        left = here.get(name)
        if name not in here or (left is not None and left < within_s):
            found.append(target)
    return found
