"""Decide about a chat call whose prompt may not fit into the model's window.

The server refuses such a prompt by itself (`truncate: false`), with exact counts and without a reload. Here it is
decided what follows from a refusal, and it is noticed afterwards what no server refuses: an old one that ignores
`truncate`, and an answer during which the beginning of the prompt fell out of the window.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

from langchain_core.messages import BaseMessage

from langchain_aegis.attempts import Timeouts
from langchain_aegis.client import OllamaClient
from langchain_aegis.cut_answers import MARK, note_cut
from langchain_aegis.errors import AegisContextOverflowError, AegisError, AegisOptionError
from langchain_aegis.identity import normalise_model
from langchain_aegis.notices import logger, warn_once
from langchain_aegis.options import Call
from langchain_aegis.refusals import overflow_error
from langchain_aegis.reloads import ARRIVES_S, Flight, Rule, reloads, runner_options
from langchain_aegis.wakers import Waker, running_loop

Policy = Literal["raise", "warn", "trim"]
Trim = Callable[[list[BaseMessage], AegisContextOverflowError], Sequence[BaseMessage]]

MOST_TRIMS: Final = 3
WORDS_PER_TOKEN: Final = 4  # that a token can begin at most: superword vocabularies, which go furthest, stop there
_BLOCK_TOKENS = 256  # llama.cpp rounds windows up to a multiple of it
_LEAST_WINDOW = 2048  # Ollama gives no chat model a smaller one unless told to
_KNOWN_S = 60.0  # for so long the server's word about a window counts: it may be restarted with another one
_REFUSED_S = 10.0  # for so long a call is refused by the server's word to an earlier one
_LOOK = Timeouts(connect_s=1.0, read_s=1.0, deadline_s=1.0)


def at_least_tokens(text: str) -> int:
    """Return a number of tokens that no tokenizer stays below.

    A token holds no more than `WORDS_PER_TOKEN` beginnings of words, in the usual vocabularies one. Words are what
    white space separates and begins with a letter or a digit: everything else may be dropped by a normaliser, or run
    together in one token, such as a line of dashes.
    """
    return -(-_words(text) // WORDS_PER_TOKEN)


def _words(text: str) -> int:
    return sum(word[0].isalnum() for word in text.split())


class Fit:
    """One call on its way into the window.

    Args:
        call: What is asked for.
        messages: The prompt.
        client: The server.
        body: Makes the request of a call and messages.
        policy: What happens to a prompt that does not fit.
        trim: Returns a shorter prompt; for the policy "trim".
        rule: What happens to runner options that differ from other calls'.
        where: Returns the file and line that asks for these runner options.

    Attributes:
        call: The call as it is sent: its runner options may be those of other calls.
        body: The request; changed by `again`.

    Raises:
        AegisContextOverflowError: It cannot fit; nothing was sent.
        AegisReloadError: Its runner options differ from other calls', and `rule` is "raise".
    """

    def __init__(
        self,
        call: Call,
        messages: list[BaseMessage],
        client: OllamaClient,
        *,
        body: Callable[[Call, list[BaseMessage]], dict[str, Any]],
        policy: Policy,
        trim: Trim | None,
        rule: Rule,
        where: Callable[[], str],
    ) -> None:
        self._asked = call
        self._messages = messages
        self._client = client
        self._make = body
        self._policy: Policy = policy
        self._trim = trim
        self._trims = 0
        self._mark: dict[str, Any] | None = None
        self._own = runner_options(call.options, call.shift)
        self._guarded = rule != "allow"
        self._sent = self._own
        self._flight: Flight | None = None
        if self._guarded:
            self._sent = reloads.share(client.base_url, call.model, self._own, rule=rule, where=where)
        self.call = _with_runner(call, self._own, self._sent)
        self.body = body(self.call, messages)
        self._forbids_cut = self.body.get("truncate") is False
        if policy == "raise" and self._forbids_cut:
            self._refuse_what_cannot_fit()

    # -- before --

    def in_turn(self) -> None:
        """Send what all calls of the model send now; to be called when nothing else is to be waited for any more."""
        while not self._departs(waker := Waker(None)):
            waker.wait(ARRIVES_S)

    async def ain_turn(self) -> None:
        """Do what `in_turn` does, without blocking the event loop."""
        while not self._departs(waker := Waker(running_loop())):
            await waker.await_(ARRIVES_S)

    def _departs(self, waker: Waker) -> bool:
        if not self._guarded:
            return True
        flight = Flight()
        sent = reloads.depart(self._client.base_url, self.call.model, self._own, flight=flight, waker=waker)
        if sent is None:
            return False
        self._flight = flight
        if sent != self._sent:
            self._send_with(sent)
        return True

    def landed(self) -> None:
        """Take note that the answer has begun, or never will; may be called again."""
        flight, self._flight = self._flight, None
        if flight is not None:
            reloads.landed(self._client.base_url, self.call.model, flight)

    def _send_with(self, runner: dict[str, Any]) -> None:
        self._sent = runner
        self.call = _with_runner(self._asked, self._own, runner)
        self.body = {**self.body, "options": self.call.request([]).get("options", {})}

    def _refuse_what_cannot_fit(self) -> None:
        window = self._known(_REFUSED_S)
        if window is None and (asked := self._sent.get("num_ctx")) is not None:
            window = max(_rounded(asked), _LEAST_WINDOW)
        texts = [m["content"] for m in self.body["messages"] if m["role"] == "user" and m.get("content")]
        # A word and its blank are two characters at least: most prompts need no counting.
        if window is None or sum(map(len, texts)) < 2 * WORDS_PER_TOKEN * window:
            return
        if self._own.get("num_ctx", 0) > window:  # then it gets its own window when the other calls' is too small
            return
        # Of other messages, a template may leave out a part.
        if (least := sum(map(at_least_tokens, texts))) > window:
            raise overflow_error(least, window, at_least=True)

    # -- when the server refuses --

    def again(self, refusal: AegisContextOverflowError) -> None:
        """Change the request so that it may fit; raise `refusal` if nothing is to be changed."""
        if not self._changed_without_trim(refusal) and self._trim is not None:
            self._take(self._trim(list(self._messages), refusal), refusal)

    async def aagain(self, refusal: AegisContextOverflowError) -> None:
        """Do what `again` does; `trim` runs in a thread."""
        if not self._changed_without_trim(refusal) and self._trim is not None:
            self._take(await asyncio.to_thread(self._trim, list(self._messages), refusal), refusal)

    def _changed_without_trim(self, refusal: AegisContextOverflowError) -> bool:
        window = refusal.window_tokens
        if window is not None:
            self._note(self._sent, window)
        if self._sent != self._own and (window is None or self._own.get("num_ctx", window + 1) > window):
            # The window of other calls is too small after all: this one gets the window that it asked for.
            self._send_with(self._own)
            return True
        if self._policy == "warn" and self.body.get("truncate") is False:
            logger.warning("prompt_cut: %s; the server cuts it", refusal)
            self._mark = _marked("cut", refusal)
            self.body = {**self.body, "truncate": True}
            return True
        if self._policy == "trim" and self._trims < MOST_TRIMS:
            return False
        raise refusal

    def _take(self, shorter: Sequence[BaseMessage], refusal: AegisContextOverflowError) -> None:
        if not isinstance(shorter, Sequence) or not shorter or not all(isinstance(m, BaseMessage) for m in shorter):
            raise AegisOptionError("trim must return the messages of the shorter prompt") from refusal
        if list(shorter) == self._messages:
            raise refusal
        self._trims += 1
        self._mark = self._mark or _marked("trimmed", refusal)
        self._messages = list(shorter)
        self.body = self._make(self.call, self._messages)

    # -- after --

    def ended(self, part: dict[str, Any]) -> dict[str, Any]:
        """Return the part that ends an answer, marked if the model did not see its whole prompt.

        Raises:
            AegisContextOverflowError: The server cut the prompt although it was told not to.
        """
        if self._asks_window(part):
            with contextlib.suppress(AegisError):  # then it stays unknown; the answer is there
                self._learn(self._client.ps(timeouts=_LOOK))
        return self._judged(part)

    async def aended(self, part: dict[str, Any]) -> dict[str, Any]:
        """Do what `ended` does, without blocking the event loop."""
        if self._asks_window(part):
            with contextlib.suppress(AegisError):  # then it stays unknown; the answer is there
                self._learn(await self._client.aps(timeouts=_LOOK))
        return self._judged(part)

    def _asks_window(self, part: Mapping[str, Any]) -> bool:
        """Whether the counts can only be understood by whoever knows the window."""
        if self._known(_KNOWN_S) is not None or not self._was_last():
            return False
        if self._guarded and "num_ctx" not in self._sent and reloads.unclear(self._client.base_url, self.call.model):
            return True
        window: int = self._sent.get("num_ctx", _LEAST_WINDOW)
        return sum(_counts(part)) >= min(window, _LEAST_WINDOW)

    def _was_last(self) -> bool:
        """Whether no other call of this process has been sent with other runner options since."""
        last = reloads.last_sent(self._client.base_url, self.call.model)
        return not self._guarded or last in (None, self._sent)

    def _learn(self, loaded: Sequence[Mapping[str, Any]]) -> None:
        if not self._was_last():
            return  # another call may have had the model loaded anew meanwhile
        for each in loaded:
            window = each.get("context_length")
            if each.get("model") == normalise_model(self.call.model) and type(window) is int and window > 0:
                # A larger one than was asked for is another process's.
                self._note(self._sent, min(window, self._sent.get("num_ctx", window)))

    def _judged(self, part: dict[str, Any]) -> dict[str, Any]:
        used, made = _counts(part)
        window = self._known(_KNOWN_S) or self._sent.get("num_ctx")
        told = AegisContextOverflowError("", prompt_tokens=None, window_tokens=window)
        if self._mark is None and used:
            certain = window is not None and used >= _rounded(window)
            if certain or self._seems_cut(used, window):
                self._old_server(used, window, certain)
                self._mark = _marked("cut", told)
            elif window is not None and used + made >= window:
                warn_once(
                    f"window_full:{normalise_model(self.call.model)}",
                    f"the window of {self.call.model} ({window} tokens) was full before an answer was complete: prompt"
                    f" {used} tokens, answer {made}. The server dropped the beginning of the prompt, so the answer is"
                    " marked and not cached. Raise num_ctx, or bound answers with num_predict",
                )
                told.prompt_tokens = used
                self._mark = _marked("shifted", told)
        if self._mark is None:
            return part
        note_cut()
        return {**part, MARK: self._mark}

    def _seems_cut(self, used: int, window: int | None) -> bool:
        """Whether the server has read fewer tokens than the prompt has.

        In the usual vocabularies, a token begins at most one word. Where nothing is known of the window, a count that
        is one of the usual windows is none by chance.
        """
        texts = [m["content"] for m in self.body["messages"] if m["role"] == "user" and m.get("content")]
        blanks = sum(text.count(blank) for text in texts for blank in " \n\t")
        if blanks + len(texts) > used and sum(map(_words, texts)) > used:  # counting blanks costs next to nothing
            return True
        return used == window or (window is None and used >= _LEAST_WINDOW and used & (used - 1) == 0)

    def _old_server(self, used: int, window: int | None, certain: bool) -> None:
        held = f"its window holds {window}" if window else "its window is not known"
        said = f"the server cut the prompt of {self.call.model}: it read {used} tokens, {held}"
        if certain and self._forbids_cut and self._policy != "warn":
            raise AegisContextOverflowError(
                f"{said}, although it was told not to. Raise num_ctx (or OLLAMA_CONTEXT_LENGTH on the server), shorten"
                " the prompt, or take a server that refuses it (Ollama from 0.12.6 on)",
                window_tokens=window,
            )
        logger.warning("prompt_cut: %s", said)

    # -- what is known of the window --

    def _known(self, within_s: float) -> int | None:
        return reloads.window(self._client.base_url, self.call.model, self._sent, within_s=within_s)

    def _note(self, options: Mapping[str, Any], window: int) -> None:
        reloads.note_window(self._client.base_url, self.call.model, options, window)


def _with_runner(call: Call, own: Mapping[str, Any], sent: Mapping[str, Any]) -> Call:
    if sent == own:
        return call
    kept = {name: value for name, value in call.options.items() if name not in own or name in sent}
    return dataclasses.replace(call, options={**kept, **{n: v for n, v in sent.items() if n != "shift"}})


def _marked(how: str, refusal: AegisContextOverflowError) -> dict[str, Any]:
    return {"how": how, "prompt_tokens": refusal.prompt_tokens, "window_tokens": refusal.window_tokens}


def _counts(part: Mapping[str, Any]) -> tuple[int, int]:
    used, made = (n if type(n := part.get(name)) is int else 0 for name in ("prompt_eval_count", "eval_count"))
    return used, made


def _rounded(window: int) -> int:
    return -(-window // _BLOCK_TOKENS) * _BLOCK_TOKENS
