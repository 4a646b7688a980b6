"""Find a model's shape: on its server, else in the shipped table, else by its size."""

from __future__ import annotations

from dataclasses import dataclass, replace

from langchain_aegis.attempts import Timeouts
from langchain_aegis.client import OllamaClient
from langchain_aegis.errors import AegisConfigError, AegisError, AegisModelNotFoundError
from langchain_aegis.identity import normalise_model
from langchain_aegis.ollama.plan_metadata import needs_lists, of_metadata
from langchain_aegis.ollama.plan_quantisation import check_quantisation
from langchain_aegis.ollama.plan_shape import Shape, of_size, of_table, of_tag, parse_size
from langchain_aegis.settings import redact_url


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is known of a model; `shape` is None if none was named. `version` is the server's, if it answered."""

    shape: Shape | None = None
    version: str | None = None
    notes: tuple[str, ...] = ()


def find_model(
    name: str | None, base_url: str | None, parameters: str | None, quantisation: str | None, timeout_s: float
) -> Found:
    """Find a model.

    Args:
        base_url: The server to ask; None: none.
        parameters: Size as text, e.g. "8b": then neither server nor table is asked for the shape.
        quantisation: Plan it stored as this.

    Raises:
        AegisConfigError: A size or quantisation cannot be read, or nothing is known of the model.
    """
    wanted = check_quantisation(quantisation) if quantisation else None
    size = parse_size(parameters) if parameters is not None else None
    if parameters is not None and size is None:
        raise AegisConfigError(f"--parameters must be a size such as 8b or 270m, got {parameters!r}")
    server = _ask(name if size is None else None, base_url, timeout_s) if base_url else Found()
    if size is not None:
        return replace(server, shape=of_size(name or f"a model of {parameters}", size, wanted))
    if name is None:
        return server
    shape, notes = server.shape, server.notes
    if shape is None:
        shape = of_table(name, wanted) or of_tag(name, wanted)
        notes = (*notes, "Shape and size come from the table that is shipped, not from the model's file.")
        if shape and ":" in name and shape.name != name:  # another name of that shape: say what was asked for
            shape = replace(shape, name=name)
    elif wanted and wanted != shape.quantisation:
        notes = (*notes, f"The server has it as {shape.quantisation}; the size as {wanted} is an estimate.")
        shape = shape.stored_as(wanted)
    return replace(server, shape=shape, notes=notes)


def _ask(name: str | None, base_url: str, timeout_s: float) -> Found:
    bounds = Timeouts(connect_s=timeout_s, read_s=timeout_s, deadline_s=4 * timeout_s)
    client = OllamaClient(base_url, timeouts=bounds)
    try:
        version = client.version() or None
        if name is None:
            return Found(version=version)
        shown = client.show(name)
        if needs_lists(shown):
            shown = client.show(name, verbose=True)
        sizes = {normalise_model(str(row.get("model") or row.get("name"))): row.get("size") for row in client.tags()}
    except AegisModelNotFoundError:
        return Found(version=version, notes=(f"The server does not have it: ollama pull {name}.",))
    except AegisError as exc:
        return Found(notes=(f"The server at {redact_url(base_url)} was not asked: {exc}",))
    finally:
        client.close()
    size = sizes.get(normalise_model(name))
    shape = of_metadata(name, shown, size) if isinstance(size, int) and size > 0 else None
    notes = () if shape else ("The server does not describe the model's layers.",)
    return Found(shape=shape, version=version, notes=notes)
