"""Read a compose file into plain values that know where they stand.

Anchors, merge keys, `extends`, `!reset`, `!override` and variables are resolved as compose does; what depends on an
unknown variable keeps its `${NAME}`. Texts, and the keys of mappings, are `Text`; true, false and numbers are texts
too, as compose hands them to a container.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from langchain_aegis.ollama.env_files import read_text
from langchain_aegis.ollama.interpolation import interpolate, names
from langchain_aegis.ollama.places import Place, Text

RESET = object()  # `!reset`: the value of another file is dropped
_LISTS = {"environment", "labels"}  # NAME=value lists that are mappings in truth
_MOST_VALUES = 100_000  # of one file, aliases counted: a file that unfolds to more is an attack or a mistake


class NoComposeFileError(ValueError):
    """The file is no compose file; the message says why."""


@dataclass(frozen=True)
class ComposeFile:
    """One compose file.

    Attributes:
        services: Name -> service.
        repeated: Keys that stand twice in one mapping, which compose refuses.
        uses: Variables that the file fills in.
        extra: Further top-level values.
        missing: Files named by `extends` that cannot be read.
    """

    path: Path
    services: dict[str, dict[str, Any]]
    repeated: list[Text]
    uses: set[str]
    extra: Mapping[str, Any]
    missing: list[str]


def read_compose(path: Path, values: Mapping[str, str]) -> ComposeFile:
    """Read a compose file.

    Raises:
        OSError: The file cannot be read.
        NoComposeFileError: It is something else.
    """
    reader = _Reader(path, values)
    try:
        data = reader.read()
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as exc:
        raise NoComposeFileError(" ".join(str(exc).split())) from exc
    if not isinstance(data, dict) or not isinstance(data.get("services"), dict):
        raise NoComposeFileError("there is no mapping `services`")
    services = data["services"]
    if wrong := [name for name, service in services.items() if not isinstance(service, dict)]:
        raise NoComposeFileError(f"service {wrong[0]} is no mapping")
    missing: list[str] = []
    done = {name: _extended(name, services, path, values, missing, ()) for name in services}
    extra = {name: value for name, value in data.items() if name != "services"}
    return ComposeFile(path, done, reader.repeated, reader.uses, extra, missing)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return one service made of two, as compose merges them: mappings by key, lists one behind the other."""
    result = dict(base)
    for key, value in over.items():
        old = result.pop(key, None)  # the key of the later one knows its place
        if value is RESET:
            continue
        if key in _LISTS and old is not None and not getattr(key, "override", False):
            result[key] = _as_mapping(old) | _as_mapping(value)
        elif isinstance(old, dict) and isinstance(value, dict) and not getattr(key, "override", False):
            result[key] = merged(old, value)
        elif (
            isinstance(old, list)
            and isinstance(value, list)
            and not getattr(key, "override", False)
            and key not in _REPLACED
        ):
            result[key] = [*old, *value]
        else:
            result[key] = value
    return result


_REPLACED = {"command", "entrypoint", "test"}


def _as_mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return dict(value)
    return dict(assignment(item) for item in value if isinstance(item, Text)) if isinstance(value, list) else {}


def assignment(item: Text) -> tuple[Text, Text | None]:
    """Return name and value of `NAME=value`; the value is None if there is only a name."""
    name, equals, value = item.partition("=")
    place, inner = item.place, item.raw.find("=")
    if place is None or inner < 0:
        return Text(name, place, item.raw), Text(value) if equals else None
    start, end = place.name
    quoted = item.raw[:1] in ("'", '"')
    spans = ((start + quoted, start + inner), (start + inner + 1, end - quoted))
    inside = Place(place.path, place.line, *spans, place.entry, yaml=True)
    return Text(name, inside, item.raw), Text(value, inside, item.raw[inner + 1 :])


def _extended(
    name: str,
    services: Mapping[str, Any],
    path: Path,
    values: Mapping[str, str],
    missing: list[str],
    seen: tuple[Any, ...],
) -> dict[str, Any]:
    service = services.get(name)
    if not isinstance(service, dict):
        return {}
    own: dict[str, Any] = _without_resets(service)
    base = service.get("extends")
    if not base or (path, name) in seen or len(seen) > 20:
        return own
    file, of = (base.get("file"), base.get("service")) if isinstance(base, dict) else (None, base)
    others, where = services, path
    if file:
        where = path.parent / str(file)
        try:
            data = _Reader(where, values).read()
            others = data["services"]
        except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError, KeyError, TypeError):
            missing.append(str(file))
            return own
    joint = merged(_extended(str(of), others, where, values, missing, (*seen, (path, name))), service)
    return dict(_without_resets(joint))


def _without_resets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_resets(inner) for key, inner in value.items() if inner is not RESET}
    return [_without_resets(inner) for inner in value if inner is not RESET] if isinstance(value, list) else value


@dataclass
class _Reader:
    """Turns the nodes of one file into values."""

    path: Path
    values: Mapping[str, str]
    repeated: list[Text] = field(default_factory=list)
    uses: set[str] = field(default_factory=set)
    text: str = ""
    left: int = _MOST_VALUES

    def read(self) -> Any:
        self.text = read_text(self.path)
        node = yaml.compose(self.text, Loader=yaml.SafeLoader)
        return None if node is None else self.value(node, ())

    def value(self, node: yaml.Node, above: tuple[int, ...], entry: tuple[int, int] | None = None) -> Any:
        self.left -= 1
        if self.left < 0 or id(node) in above:
            raise yaml.YAMLError("it refers to itself, or unfolds to too many values")
        if node.tag == "!reset":
            return RESET
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, above)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, above, (item.start_mark.index, self.end(item))) for item in node.value]
        return self.scalar(node, entry)

    def scalar(self, node: yaml.Node, entry: tuple[int, int] | None) -> Text | None:
        if node.tag == "tag:yaml.org,2002:null" and getattr(node, "style", None) is None:
            return None
        span = (node.start_mark.index, self.end(node))
        place = Place(self.path, node.start_mark.line + 1, span, span, entry or span, yaml=True, quotes=True)
        self.uses |= names(node.value)
        return Text(interpolate(node.value, self.values), place, self.text[slice(*span)])

    def mapping(self, node: yaml.MappingNode, above: tuple[int, ...]) -> dict[str, Any]:
        own: dict[str, Any] = {}
        inherited: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                for base in reversed(list(self._bases(self.value(value_node, above)))):
                    inherited |= base
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError("a key is no text")
            key = self.key(key_node, value_node)
            if key in own:
                self.repeated.append(key)
            entry = key.place.entry if key.place else None
            own.pop(key, None)
            own[key] = self.value(value_node, above, entry)
        return {key: value for key, value in inherited.items() if key not in own} | own

    def key(self, node: yaml.ScalarNode, value: yaml.Node) -> Text:
        start, end = node.start_mark.index, node.end_mark.index
        aliased = value.start_mark.index < end  # it stands where its anchor is
        last = end if aliased else max(end, self.end(value))
        after = (end, end) if aliased else (value.start_mark.index, last)
        place = Place(self.path, node.start_mark.line + 1, (start, end), after, (start, last), yaml=True, quotes=True)
        return Text(str(node.value), place, self.text[start:end], override=value.tag == "!override")

    def end(self, node: yaml.Node) -> int:
        """Return where the characters of a node end; PyYAML's mark of a block lies behind comments that follow it."""
        start, end = node.start_mark.index, node.end_mark.index
        if isinstance(node, yaml.CollectionNode) and not node.flow_style:
            children = [c for item in node.value for c in (item if isinstance(item, tuple) else (item,))]
            end = max([start, *(self.end(child) for child in children if child.start_mark.index >= start)])  # no alias
        while end > start and self.text[end - 1].isspace():
            end -= 1
        return int(end)

    @staticmethod
    def _bases(value: Any) -> Iterator[dict[str, Any]]:
        for base in value if isinstance(value, list) else [value]:
            if isinstance(base, dict):
                yield base
