"""The errors form one tree, the one that its documentation shows, and join LangChain's."""

import inspect
import pickle
import re

import pytest
from langchain_core import exceptions as core

from langchain_aegis import errors

CLASSES = {
    name: c for name, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, errors.AegisError)
}  # fmt: skip
LANGCHAIN = {
    "AegisConnectionError": core.ModelConnectionError,
    "AegisTimeoutError": core.ModelTimeoutError,
    "AegisModelNotFoundError": core.ModelNotFoundError,
    "AegisRequestError": core.ModelInvalidRequestError,
    "AegisContextOverflowError": core.ContextOverflowError,
    "AegisServerError": core.ModelAPIError,
    "AegisStreamError": core.ModelAPIError,
    "AegisOverloadedError": core.ModelRateLimitError,
}


def documented_tree() -> dict[str, str]:
    """Read name -> parent from the indented list in the module's docstring."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in errors.__doc__.splitlines():
        if found := re.match(r"( {4,})(Aegis\w+)\b", line):
            depth = len(found[1]) // 4 - 1
            path[depth:] = [found[2]]
            parents[found[2]] = path[depth - 1] if depth else ""
    return parents


def test_the_documented_tree_is_the_tree():
    actual = {
        name: next((b.__name__ for b in c.__bases__ if issubclass(b, errors.AegisError)), "")
        for name, c in CLASSES.items()
    }
    assert documented_tree() == actual


def test_every_error_can_be_imported_from_the_package():
    import langchain_aegis

    assert {n for n in langchain_aegis.__all__ if n.endswith("Error")} == set(CLASSES)
    assert all(getattr(langchain_aegis, name) is c for name, c in CLASSES.items())


@pytest.mark.parametrize("name", LANGCHAIN)
def test_code_that_catches_langchains_error_catches_ours(name):
    with pytest.raises(LANGCHAIN[name]) as caught:
        raise CLASSES[name]("x")
    assert isinstance(caught.value, core.ModelError)


def test_each_class_of_langchain_is_matched_or_cannot_happen():
    """A new class in langchain-core asks for a decision here."""
    theirs = {
        c for c in vars(core).values()
        if inspect.isclass(c) and issubclass(c, core.ModelError) and c is not core.ModelError
    }  # fmt: skip
    ollama_has_no_login = {core.ModelAuthenticationError, core.ModelPermissionDeniedError}
    assert theirs == set(LANGCHAIN.values()) | ollama_has_no_login


@pytest.mark.parametrize("name", CLASSES)
def test_both_names_for_retryable_agree(name):
    for told in (None, True, False):
        error = CLASSES[name]("x") if told is None else None
        if error is None and "retryable" in inspect.signature(CLASSES[name]).parameters:
            error = CLASSES[name]("x", retryable=told)
            assert error.retryable is told
        if error is not None:
            assert error.is_retryable is error.retryable
    parent = LANGCHAIN.get(name)
    assert parent is None or CLASSES[name]("x").is_retryable == parent.is_retryable


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_survives_a_process_boundary(name):
    """Multiprocessing carries errors by copying them; a constructor that cannot be called again would hang it."""
    error = CLASSES[name]("what to do", status_code=503)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (type(copy), str(copy), copy.status_code) == (type(error), "what to do", 503)


def test_configuration_errors_are_value_errors_and_timeouts_are_timeouts():
    assert issubclass(errors.AegisConfigError, ValueError)
    assert issubclass(errors.AegisOptionError, errors.AegisConfigError)
    assert issubclass(errors.AegisTimeoutError, TimeoutError)
    assert issubclass(errors.AegisDeadlineError, TimeoutError)


def test_details_are_kept():
    overflow = errors.AegisContextOverflowError("x", prompt_tokens=9000, window_tokens=8192, status_code=400)
    assert (overflow.prompt_tokens, overflow.window_tokens, overflow.status_code) == (9000, 8192, 400)
    assert errors.AegisStreamError("x", partial="Par").partial == "Par"
    assert errors.AegisOverloadedError("x", retry_after_s=2.5).retry_after_s == 2.5
    assert errors.AegisServerError("x").status_code is None
