"""Every error that this package raises, in one tree.

    AegisError
        AegisConfigError (also ValueError)      a setting or argument is wrong; said before any network traffic
            AegisOptionError                    an unknown or mistyped model option
            AegisReloadError                    runner options that would make the server reload the model
        AegisConnectionError                    the model server cannot be reached
        AegisTimeoutError                       it did not answer in time
        AegisModelNotFoundError                 it does not have the model
        AegisRequestError                       it refused the request
            AegisContextOverflowError           the prompt does not fit into the model's window
        AegisServerError                        it failed
            AegisStreamError                    its answer broke off, or was not one
            AegisBatchError                     asked for several results, it returned others
        AegisOverloadedError                    too many calls wait already, here or at the server
        AegisDeadlineError                      the caller's own deadline passed
        AegisClosedError                        the object was closed

Where langchain-core has a matching `ModelError`, the class inherits from it too, so code that catches
LangChain's errors keeps working. Redis and the embedder never raise through the cache: they are misses.
"""

from __future__ import annotations

from langchain_core import exceptions as core


class AegisError(Exception):
    """Base of all errors of this package.

    Attributes:
        retryable: The same call may succeed later without a change.
        status_code: HTTP status of the server's answer, if there was one.
    """

    retryable: bool = False
    status_code: int | None = None

    def __init__(self, message: str, *, retryable: bool | None = None, status_code: int | None = None) -> None:
        super().__init__(message)
        if retryable is not None:
            self.retryable = retryable
        if status_code is not None:
            self.status_code = status_code
        self.is_retryable = self.retryable  # LangChain's name for it


class AegisConfigError(AegisError, ValueError):
    """A setting or an argument is wrong. The message says what to write instead."""


class AegisOptionError(AegisConfigError):
    """A model option is unknown or has the wrong type."""


class AegisReloadError(AegisConfigError):
    """A call's runner options differ from those of other calls of the model, so that the server would reload it."""


class AegisConnectionError(AegisError, core.ModelConnectionError):
    """The model server cannot be reached."""

    retryable = True


class AegisTimeoutError(AegisError, core.ModelTimeoutError, TimeoutError):
    """The model server did not answer in time."""

    retryable = True


class AegisModelNotFoundError(AegisError, core.ModelNotFoundError):
    """The model server does not have the model."""


class AegisRequestError(AegisError, core.ModelInvalidRequestError):
    """The model server refused the request; repeating it will not help."""


class AegisContextOverflowError(AegisRequestError, core.ContextOverflowError):
    """The prompt does not fit into the model's window.

    Attributes:
        prompt_tokens: Tokens of the prompt, as the server counted them, or None. Where nothing was sent: so many at
            least.
        window_tokens: Tokens that the window holds, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        prompt_tokens: int | None = None,
        window_tokens: int | None = None,
        status_code: int | None = None,
    ) -> None:
        super().__init__(message, status_code=status_code)
        self.prompt_tokens = prompt_tokens
        self.window_tokens = window_tokens


class AegisServerError(AegisError, core.ModelAPIError):
    """The model server failed."""

    retryable = True


class AegisStreamError(AegisServerError):
    """An answer broke off, held an error line, or was not what Ollama sends.

    Attributes:
        partial: The text that had arrived before; never cached.
    """

    def __init__(
        self, message: str, *, partial: str = "", retryable: bool | None = None, status_code: int | None = None
    ) -> None:
        super().__init__(message, retryable=retryable, status_code=status_code)
        self.partial = partial


class AegisBatchError(AegisServerError):
    """A request for several results was answered with more, fewer or other ones: none of them is anybody's."""


class AegisOverloadedError(AegisError, core.ModelRateLimitError):
    """Too many calls wait already; nothing was sent.

    Attributes:
        retry_after_s: Seconds after which a slot is likely to be free.
    """

    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0, status_code: int | None = None) -> None:
        super().__init__(message, status_code=status_code)
        self.retry_after_s = retry_after_s


class AegisDeadlineError(AegisError, TimeoutError):
    """The caller's deadline passed before the answer was complete."""

    retryable = True


class AegisClosedError(AegisError):
    """The object was closed; make a new one."""
