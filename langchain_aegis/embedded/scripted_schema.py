"""Fill a JSON schema with values that come from a prompt."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]

_DEPTH = 4  # below this, what may be left out is left out: schemas may contain themselves
_FORMATS = {
    "date": "2026-11-22", "date-time": "2026-11-22T12:00:00Z", "time": "12:00:00Z", "duration": "PT1H",
    "email": "someone@example.com", "uri": "https://example.com/", "uuid": "123e4567-e89b-42d3-a456-426614174000",
    "ipv4": "192.0.2.1", "ipv6": "2001:db8::1", "hostname": "example.com",
}  # fmt: skip
_PATTERN_TRIALS = ("a", "A", "0", "1", "12", "123", "1234", "12345", "AB-123", "abc", "ABC", "2026-11-22", "a1", "A1")
_QUOTED = re.compile(r"""(?<!\w)'([^'\n]{1,200})'(?!\w)|"([^"\n]{1,200})"|“([^”\n]{1,200})”|`([^`\n]{1,200})`""")
_NAMES = re.compile(r"\b[A-ZÄÖÜ][\w-]*(?:\s+[A-ZÄÖÜ][\w-]*)*")
_NUMBERS = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w]|\.\d)")
_WORDS = re.compile(r"\w+")
STOP_WORDS = frozenset(
    _WORDS.findall(
        """
        a about an and any are as at be by can could do does for from give has have how i if in into is it its
        just me my of on only or our please result return so tell that the their them there they this to tool up
        us use using was we what when where which who why will with would you your bitte das dem den der des die
        du ein eine einem einen einer er es für ich im in ist mir mit nach und uns von wann was wer wie wir wo
        zu
        """
    )
)


def quoted(text: str) -> list[str]:
    """Return what stands in quotation marks, in order."""
    return ["".join(match.groups(default="")) for match in _QUOTED.finditer(text)]


def salient(text: str, limit: int = 8) -> list[str]:
    """Return the first words that say what a text is about: no stop words, none twice."""
    found: dict[str, str] = {}
    for word in _WORDS.findall(text):
        if word.lower() not in STOP_WORDS and word.lower() not in found:
            found[word.lower()] = word
            if len(found) == limit:
                break
    return list(found.values())


def keys_named(text: str) -> list[str]:
    """Return the quoted words of a prompt that can be keys of a JSON object."""
    return list(dict.fromkeys(word for word in quoted(text) if word.isidentifier()))


class Filler:
    """Makes values for one prompt; the same prompt and seed give the same values.

    Strings are taken from what the prompt quotes, then from its names, then from its other words. Numbers are those
    of the prompt, in order, as far as the schema allows them.

    Args:
        text: The prompt.
        seed: Decides what the prompt leaves open.
    """

    def __init__(self, text: str, seed: str) -> None:
        self._seed = seed
        self._text = text.lower()
        self._words = set(_WORDS.findall(self._text))
        # The first word of a sentence is rarely a name, so those come last.
        found = [match for match in _NAMES.finditer(_QUOTED.sub(" ", text)) if match.group().lower() not in STOP_WORDS]
        found.sort(key=lambda match: " " not in match.group() and _starts_sentence(match))
        names = [match.group() for match in found if not match.group().isupper()]
        self._strings = [*quoted(text), *names, *salient(text)] or ["something"]
        self._numbers = [float(number) for number in _NUMBERS.findall(text)]
        self._next_string = 0
        self._drawn = 0

    def arguments(self, schema: Schema) -> dict[str, Any]:
        """Return a tool's arguments: the required ones, and optional ones that the prompt names."""
        named = [name for name in schema.get("properties", {}) if name.lower() in self._words]
        return self._object(schema, schema, 0, wanted=named)

    def value(self, schema: Schema) -> Any:
        """Return a value that the schema allows, optional properties filled in."""
        return self._value(schema, schema, 0)

    def _value(self, schema: Any, root: Schema, depth: int) -> Any:
        if not isinstance(schema, Mapping):  # `true`: anything goes
            return self._string({})
        schema = _resolved(schema, root)
        if "const" in schema:
            return schema["const"]
        if options := schema.get("enum"):
            return self._choice(options)
        if choices := schema.get("anyOf") or schema.get("oneOf"):
            rest = {name: item for name, item in schema.items() if name not in ("anyOf", "oneOf")}
            return self._value(_merged(rest, self._alternative(choices, root, depth), root), root, depth)
        kind = _kind(schema, depth)
        if kind == "object":
            wanted = list(schema.get("properties", {})) if depth < _DEPTH else []
            return self._object(schema, root, depth, wanted=wanted)
        if kind == "array":
            return self._array(schema, root, depth)
        if kind in ("integer", "number"):
            return self._number(schema, whole=kind == "integer")
        if kind == "boolean":
            return bool(self._draw(2))
        return None if kind == "null" else self._string(schema)

    def _alternative(self, choices: Sequence[Any], root: Schema, depth: int) -> Any:
        def is_null(choice: Any) -> bool:
            return isinstance(choice, Mapping) and _resolved(choice, root).get("type") == "null"

        if depth >= _DEPTH:
            return next((choice for choice in choices if is_null(choice)), choices[-1])
        return next((choice for choice in choices if not is_null(choice)), choices[0])

    def _choice(self, options: Sequence[Any]) -> Any:
        for option in options:
            if str(option).lower() in self._words or (" " in str(option) and str(option).lower() in self._text):
                return option
        return options[self._draw(len(options))]

    def _object(self, schema: Schema, root: Schema, depth: int, wanted: Sequence[str]) -> dict[str, Any]:
        schema = _resolved(schema, root)
        properties: Mapping[str, Any] = schema.get("properties", {})
        required = schema.get("required", ())
        names = [name for name in properties if name in required or name in wanted]
        names += [name for name in required if name not in properties]
        filled = {name: self._value(properties.get(name, True), root, depth + 1) for name in names}
        extra = schema.get("additionalProperties", True)
        missing = schema.get("minProperties", 0) - len(filled)
        if missing > 0 and extra is not False:
            filled |= {f"key{number}": self._value(extra, root, depth + 1) for number in range(missing)}
        return filled

    def _array(self, schema: Schema, root: Schema, depth: int) -> list[Any]:
        least, most = schema.get("minItems", 0), schema.get("maxItems", 1_000)
        fixed = schema.get("prefixItems", ())
        items = schema.get("items", True)
        count = max(least, min(most, 2 if depth < _DEPTH else 0, 1_000))
        filled: list[Any] = [self._value(item, root, depth + 1) for item in fixed]
        while len(filled) < count and items is not False:
            value = self._value(items, root, depth + 1)
            if schema.get("uniqueItems") and value in filled:
                value = next((other for other in self._others(items, root) if other not in filled), None)
                if value is None:
                    break
            filled.append(value)
        return filled[: max(most, len(fixed))]

    def _others(self, items: Any, root: Schema) -> Iterator[Any]:
        schema = _resolved(items, root) if isinstance(items, Mapping) else {}
        kind = _kind(schema, 0)
        if options := schema.get("enum"):
            yield from options
        elif kind in ("integer", "number"):
            low, high, step = _bounds(schema, whole=kind == "integer")
            start = low if low > -math.inf else (high - 1000 * step if high < math.inf else 0)
            yield from (_as(kind, start + number * step) for number in range(1000) if start + number * step <= high)
        elif kind == "boolean":
            yield from (False, True)
        elif kind == "string":
            yield from (self._fit(f"{self._string(schema)} {number}", schema) for number in range(2, 50))
            yield from (self._fit(f"{number}", schema) for number in range(1000))

    def _number(self, schema: Schema, *, whole: bool) -> int | float:
        low, high, step = _bounds(schema, whole=whole)
        exact = "multipleOf" in schema or whole
        for number in self._numbers:
            if low <= number <= high and (not exact or math.isclose(number / step, round(number / step))):
                self._numbers.remove(number)
                return _as("integer" if whole else "number", number)
        first = math.ceil(low / step) if low > -math.inf else (math.floor(high / step) - 9 if high < math.inf else 0)
        last = min(math.floor(high / step), first + 9) if high < math.inf else first + 9
        if last < first:  # nothing of the step's grid lies between the bounds: only a fraction does
            return (low + high) / 2
        return _as("integer" if whole else "number", (first + self._draw(last - first + 1)) * step)

    def _string(self, schema: Schema) -> str:
        if (form := schema.get("format")) in _FORMATS:
            return _FORMATS[form]
        text = self._strings[self._next_string % len(self._strings)]
        self._next_string += 1
        if pattern := schema.get("pattern"):
            for trial in (text, text.lower(), text.upper(), *_PATTERN_TRIALS):
                if _matches(pattern, trial):
                    return trial
        return self._fit(text, schema)

    def _fit(self, text: str, schema: Schema) -> str:
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        if len(text) < least:
            text = (text + " ") * (least // (len(text) + 1) + 1)
            text = text[:least].rstrip() + "." * (least - len(text[:least].rstrip()))
        return text if most is None else text[:most]

    def _draw(self, sides: int) -> int:
        self._drawn += 1
        digest = hashlib.blake2b(f"{self._seed}/{self._drawn}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % max(sides, 1)


def _starts_sentence(match: re.Match[str]) -> bool:
    before = match.string[: match.start()].rstrip()
    return not before or before[-1] in ".!?:"


def _resolved(schema: Schema, root: Schema) -> Schema:
    """Follow `$ref` and merge `allOf`."""
    for _ in range(20):  # a chain of references that never ends names nothing
        ref = schema.get("$ref")
        if not isinstance(ref, str):
            break
        target: Any = root
        for part in ref.removeprefix("#").strip("/").split("/") if ref != "#" else ():
            target = target.get(part.replace("~1", "/").replace("~0", "~"), {}) if isinstance(target, Mapping) else {}
        schema = {**target, **{name: item for name, item in schema.items() if name != "$ref"}}
    for part in schema.get("allOf", ()):
        schema = _merged({name: item for name, item in schema.items() if name != "allOf"}, part, root)
    return schema


def _merged(left: Schema, right: Any, root: Schema) -> Schema:
    if not isinstance(right, Mapping):
        return left
    right = _resolved(right, root)
    merged = {**left, **right}
    if "properties" in left and "properties" in right:
        merged["properties"] = {**left["properties"], **right["properties"]}
    if "required" in left and "required" in right:
        merged["required"] = [*left["required"], *right["required"]]
    return merged


def _kind(schema: Schema, depth: int) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        others = [one for one in kind if one != "null"]
        kind = "null" if not others or (depth >= _DEPTH and "null" in kind) else others[0]
    if kind is None:
        if "properties" in schema or "required" in schema:
            return "object"
        if "items" in schema or "prefixItems" in schema:
            return "array"
        return "number" if "minimum" in schema or "maximum" in schema else "string"
    return str(kind)


def _bounds(schema: Schema, *, whole: bool) -> tuple[float, float, float]:
    """Return the least and the greatest value, both allowed, and the step between values."""
    step = schema.get("multipleOf") or (1 if whole else 0.5)
    if whole and step != int(step):
        step = 1 if step < 1 else step
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    margin = 1 if whole else 1e-9
    exclusive_low, exclusive_high = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if exclusive_low is not None and exclusive_low is not True and exclusive_low is not False:
        low = max(low, math.floor(exclusive_low) + 1 if whole else exclusive_low + margin * max(1, abs(exclusive_low)))
    if exclusive_high is not None and exclusive_high is not True and exclusive_high is not False:
        high = min(
            high, math.ceil(exclusive_high) - 1 if whole else exclusive_high - margin * max(1, abs(exclusive_high))
        )
    # Draft 4 writes the exclusive bounds as flags.
    low += margin if exclusive_low is True else 0
    high -= margin if exclusive_high is True else 0
    return low, high, step


def _as(kind: str, number: float) -> int | float:
    return round(number) if kind == "integer" or float(number).is_integer() else float(number)


def _matches(pattern: str, text: str) -> bool:
    try:
        return re.search(pattern, text) is not None
    except re.error:
        return True
