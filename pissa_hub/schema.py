"""The part of JSON Schema 2020-12 that ``manifest.schema.json`` uses, for data that a stranger may have written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


def violations(value: Any, schema: Schema, root: Schema | None = None, place: str = "") -> Iterator[str]:
    """One-line clauses on what is wrong with a parsed JSON value, e.g. "weights/3/rank is 'x', not an integer".

    Args:
        value: as ``json.loads`` gives it.
        schema: what it has to fit.
        root: where ``$ref`` points into; None: ``schema`` itself.
        place: path of ``value`` in the whole.
    """
    root = schema if root is None else root
    if "$ref" in schema:
        schema = _referenced(schema["$ref"], root)
    names = schema.get("type", list(_TYPES))
    names = [names] if isinstance(names, str) else names
    if not any(_has_type(value, name) for name in names):
        yield f"{place or 'it'} is {_shown(value)}, not {' or '.join(names)}"
    elif "const" in schema and not _same(value, schema["const"]):
        yield f"{place} is {_shown(value)}, not {schema['const']!r}"
    elif "enum" in schema and not any(_same(value, choice) for choice in schema["enum"]):
        yield f"{place} is {_shown(value)}, not one of {', '.join(map(str, schema['enum']))}"
    elif isinstance(value, dict):
        yield from _in_object(value, schema, root, place)
    elif isinstance(value, list):
        yield from _in_array(value, schema, root, place)
    elif isinstance(value, str):
        if len(value) < schema.get("minLength", 0) or not re.search(schema.get("pattern", ""), value):
            yield f"{place} is {_shown(value)}, which has another form"
    elif value is not None and not isinstance(value, bool) and not _in_range(value, schema):
        yield f"{place} is {_shown(value)}, which is out of range"


def _in_object(value: dict[str, Any], schema: Schema, root: Schema, place: str) -> Iterator[str]:
    properties, other = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{place or 'it'} lacks {name!r}"
    for name, item in value.items():
        if not re.search(schema.get("propertyNames", {}).get("pattern", ""), name):
            yield f"{place} has the key {_shown(name)}"
        below = properties.get(name, other)
        if below is False:
            yield f"{place or 'it'} has {_shown(name)}, which is unknown"
        elif below is not True:
            yield from violations(item, below, root, f"{place}/{_shown(name)[1:-1]}".lstrip("/"))


def _in_array(value: list[Any], schema: Schema, root: Schema, place: str) -> Iterator[str]:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        yield f"{place} has {len(value)} items"
    for position, item in enumerate(value):
        yield from violations(item, schema.get("items", {}), root, f"{place}/{position}")


def _in_range(value: float, schema: Schema) -> bool:
    return (
        math.isfinite(value)
        and schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and ("exclusiveMinimum" not in schema or schema["exclusiveMinimum"] < value)
        and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
    )


def _referenced(pointer: str, root: Schema) -> Schema:
    found: Any = root
    for key in pointer.removeprefix("#/").split("/"):
        found = found[key]
    schema: Schema = found
    return schema


def _has_type(value: Any, name: str) -> bool:
    return isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
