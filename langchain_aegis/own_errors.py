"""Give each of several callers an error of its own: tracebacks grow with each raise, so nobody shares one."""

from __future__ import annotations

import copy


def own_error(error: Exception) -> Exception:
    """Return another instance of `error`, or `error` itself if its class makes none."""
    try:
        twin = copy.copy(error)
    except Exception:  # a constructor with other arguments than `args`
        try:
            twin = type(error).__new__(type(error), *error.args)
            twin.__dict__.update(error.__dict__)
        except Exception:  # an extension type without a constructor
            return error
    if type(twin) is not type(error) or str(twin) != str(error):
        return error
    if notes := getattr(error, "__notes__", None):
        twin.__notes__ = list(notes)
    return twin
