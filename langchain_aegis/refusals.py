"""Turn what httpx or an Ollama server says went wrong into this package's errors."""

from __future__ import annotations

import contextlib
import email.utils
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import httpx
import orjson

from langchain_aegis.errors import (
    AegisConfigError,
    AegisConnectionError,
    AegisContextOverflowError,
    AegisError,
    AegisModelNotFoundError,
    AegisOverloadedError,
    AegisRequestError,
    AegisServerError,
    AegisStreamError,
    AegisTimeoutError,
)
from langchain_aegis.settings import redact_url

SNIPPET_CHARS = 500
_MAX_RETRY_AFTER_S = 3600.0

# Wordings of Ollama 0.33 and of the llama-server below it; statuses alone do not tell these apart.
_OVERFLOWS = ("exceed_context_size", "context length", "exceeds the available context")
_WRONG_REQUESTS = ("must be of type", "invalid format", "invalid options")
# What ends a download and may be gone a moment later.
_PASSING = ("eof", "timeout", "timed out", "connection", "max retries", "dial tcp", "tls handshake", "no such host",
            "digest mismatch", "stalled", " 500", " 502", " 503", " 504")  # fmt: skip


class Progress(Protocol):
    """How far an answer has come."""

    begun: bool

    @property
    def partial(self) -> str:
        """Text that has arrived so far."""


@contextlib.contextmanager
def translated(url: str, progress: Progress) -> Iterator[None]:
    """Raise this package's errors in place of httpx's, keeping the cause.

    Args:
        url: Address of the server, named in the message without credentials.
        progress: An answer that has begun broke off; one that has not was never there.
    """
    where = redact_url(url)
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
        raise AegisConnectionError(
            f"no Ollama server answers at {where} ({_reason(exc)}). Start it with `ollama serve`, or set base_url or"
            " OLLAMA_BASE_URL to its address"
        ) from exc
    except httpx.TimeoutException as exc:
        raise AegisTimeoutError(
            f"the Ollama server at {where} sent nothing in time ({type(exc).__name__}). It may be loading the model or"
            " busy; AEGIS_READ_TIMEOUT_S and AEGIS_DEADLINE_S, or `timeout=`, give it longer"
        ) from exc
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as exc:
        raise AegisConfigError(f"not an address of an Ollama server: {where}") from exc
    except httpx.HTTPError as exc:
        if progress.begun:
            raise AegisStreamError(
                f"the answer of {where} broke off ({_reason(exc)})", partial=progress.partial
            ) from exc
        raise AegisConnectionError(
            f"the Ollama server at {where} closed the connection before it answered ({_reason(exc)})"
        ) from exc


def refusal(status: int, headers: Mapping[str, str], body: bytes, *, url: str, model: str | None) -> AegisError:
    """Return the error for an answer whose status is not 2xx.

    Args:
        status: The HTTP status.
        headers: The answer's headers, names in lower case.
        body: What was read of the body; at most 500 characters of it are quoted.
        url: Address of the server.
        model: Model that was asked for, if any.
    """
    text = _message(body)
    where = redact_url(url)
    quoted = text[:SNIPPET_CHARS] or "no reason given"
    if 300 <= status < 400:
        return AegisRequestError(
            f"{where} redirects to {redact_url(headers.get('location', 'nowhere'))[:SNIPPET_CHARS]}; prompts are not"
            " sent on to another address. Set base_url to the final one",
            status_code=status,
        )
    if status == 404 and model and "model" in text and "not found" in text:
        return AegisModelNotFoundError(
            f"the Ollama server at {where} does not have the model {model!r}; run `ollama pull {model}` there",
            status_code=status,
        )
    if status in (429, 503):
        return AegisOverloadedError(
            f"the Ollama server at {where} is overloaded: {quoted}",
            retry_after_s=_retry_after_s(headers.get("retry-after")),
            status_code=status,
        )
    if status < 500 and (overflow := _overflow(text, status)):
        return overflow
    if status in (401, 403):
        return AegisRequestError(
            f"{where} refused the request ({status}): {quoted}. Give api_key= or a header in client_kwargs",
            status_code=status,
        )
    if status == 404:
        return AegisRequestError(
            f"{where} answered 404: {quoted}. Is it the address of an Ollama server?", status_code=status
        )
    # Ollama answers 500 to an option of the wrong type, and 501 to a model that cannot do what was asked.
    if status < 500 or status == 501 or any(wording in text for wording in _WRONG_REQUESTS):
        return AegisRequestError(f"the Ollama server refused the request ({status}): {quoted}", status_code=status)
    return AegisServerError(f"the Ollama server at {where} failed ({status}): {quoted}", status_code=status)


def error_line(error: Any, *, partial: str) -> AegisError:
    """Return the error for an answer that holds an `error` field after its status said 200."""
    text = _nested(error)
    if overflow := _overflow(text, None):
        return overflow
    return AegisStreamError(f"the model stopped with an error: {text[:SNIPPET_CHARS]}", partial=partial)


def pull_error(error: Any, *, partial: str) -> AegisError:
    """Return the error for a download that the server gave up."""
    text = _nested(error)
    if "file does not exist" in text or "not found" in text:
        return AegisModelNotFoundError(f"the registry does not have that model: {text[:SNIPPET_CHARS]}")
    again = any(wording in text.lower() for wording in _PASSING)
    return AegisServerError(f"the server could not pull the model: {text[:SNIPPET_CHARS]}", retryable=again)


def _overflow(text: str, status: int | None) -> AegisContextOverflowError | None:
    if not any(wording in text for wording in _OVERFLOWS):
        return None
    counts = _counts(text)
    return overflow_error(counts.get("n_prompt_tokens"), counts.get("n_ctx"), status=status)


def overflow_error(
    prompt: int | None, window: int | None, *, at_least: bool = False, status: int | None = None
) -> AegisContextOverflowError:
    """Return the error for a prompt of `prompt` tokens, or `at_least` so many, and a window of `window` tokens."""
    more = "at least " if at_least else ""
    sizes = f": {more}{prompt} tokens, the window holds {window}" if prompt and window else ""
    enough = f" above {prompt}" if prompt else ""
    return AegisContextOverflowError(
        f"the prompt does not fit into the model's window{sizes}. Raise num_ctx{enough} (or OLLAMA_CONTEXT_LENGTH on"
        ' the server), shorten the prompt (on_overflow="trim" with trim=), or let the server cut it with'
        ' on_overflow="warn"',
        prompt_tokens=prompt,
        window_tokens=window,
        status_code=status,
    )


def _counts(text: str) -> dict[str, int]:
    # llama-server's own error stands as JSON inside the text of Ollama's `error` field.
    value: Any = text
    for _ in range(4):
        if isinstance(value, str):
            try:
                value = orjson.loads(value[value.index("{") : value.rindex("}") + 1])
            except ValueError:
                return {}
        elif isinstance(value, dict):
            if "n_ctx" in value or "n_prompt_tokens" in value:
                return {name: number for name, number in value.items() if type(number) is int}
            value = value.get("error")
    return {}


def _message(body: bytes) -> str:
    try:
        value = orjson.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace").strip()
    return _nested(value.get("error", value)) if isinstance(value, dict) else str(value)


def _nested(error: Any) -> str:
    return error if isinstance(error, str) else orjson.dumps(error).decode()


def _retry_after_s(value: str | None) -> float:
    if value:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            wait_s = (
                float(value)
                if value.strip().replace(".", "", 1).isdigit()
                else email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            )
            return min(max(wait_s, 0.0), _MAX_RETRY_AFTER_S)
    return 1.0


def _reason(exc: Exception) -> str:
    return str(exc) or type(exc).__name__
