"""What an invalidation concerns: the user's words as the store's."""

from __future__ import annotations

from collections.abc import Iterable

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.identity import normalise_model
from langchain_aegis.keys import Keyring
from langchain_aegis.store import Invalidation

_HELP = (
    "invalidate by sources, user, task, model, older_than_s or near, each alone or together with tenant; "
    "by tenant alone; or clear()"
)


def plan(
    keyring: Keyring,
    *,
    now_ms: int,
    sources: Iterable[str] | None = None,
    tenant: str | None = None,
    user: str | None = None,
    task: str | None = None,
    model: str | None = None,
    older_than_s: float | None = None,
    near: str | None = None,
) -> Invalidation:
    """Return what is to be marked and removed.

    Args:
        keyring: Makes the names.
        now_ms: Unix time in milliseconds.
        sources: Ids of documents.
        tenant: Restricts each of the others to a tenant, or names all of his answers.
        user: Id of a user.
        task: Name of a task.
        model: Name of a model, or "pipeline:<name>".
        older_than_s: Age in seconds.
        near: A question; what is near it has to be looked for.

    Raises:
        AegisConfigError: A value cannot be used, or this combination.
    """
    if isinstance(sources, str) or not isinstance(sources, Iterable | None):
        raise AegisConfigError("sources must be a collection of ids; write sources=[id]")
    sources = None if sources is None else list(sources)  # a generator can be read only once
    texts = {"tenant": tenant, "user": user, "task": task, "model": model, "near": near}
    for name, value in (*texts.items(), *(("a source", s) for s in sources or ())):
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise AegisConfigError(f"{name} must be a text that is not blank, got {value!r}")
    if older_than_s is not None and (
        isinstance(older_than_s, bool) or not isinstance(older_than_s, (int, float)) or not 0 <= older_than_s < 1e10
    ):
        raise AegisConfigError(f"older_than_s must be a number of seconds, got {older_than_s!r}")
    named = [value for value in (sources, user, task, model, older_than_s, near) if value is not None]
    if len(named) > 1 or (not named and tenant is None):
        raise AegisConfigError(_HELP)
    thing = keyring.thing
    owner = thing("tenant", tenant) if tenant is not None else None
    if older_than_s is not None:
        return Invalidation(before_ms=now_ms - int(older_than_s * 1000), before_tenant=owner, now_ms=now_ms)
    if near is not None:
        return Invalidation(near=())
    if sources is not None:
        kind, values = "source", sources
    elif user is not None:
        kind, values = "user", [user]
    elif task is not None:
        kind, values = "task", [task]
    elif model is not None:
        kind, values = "model", list(dict.fromkeys((model, normalise_model(model))))
    else:
        kind, values = "tenant", [str(tenant)]
    sets = [thing(kind, value) for value in values]
    # Records list their sources themselves, and their user where users share: they are looked at one by one.
    listed = kind in ("source", "user")
    if owner is None or kind == "tenant":
        return Invalidation(sets, [[s] for s in sets], sources=listed, now_ms=now_ms)
    # A source within a tenant is named by the tenant's own digest: a record knows no more of its tenant.
    whose = owner if kind == "source" else tenant
    things = [thing(f"tenant-{kind}", whose, value) for value in values]
    return Invalidation(things, [[s, owner] for s in sets], sources=listed, now_ms=now_ms)
