"""The JSON Schema of a line of a `.jsonl` data file, made from the types of `anygpt.data.rows`.

    python -m anygpt.data.json_schema > anygpt/data/schema.json

It says what can be said of one row's form; that media exist, ids differ and an assistant answers is checked by
`scripts/validate_data.py`.
"""

import inspect
import json
import types
import typing
from typing import Any, Literal

from anygpt.data.rows import SampleRow

BASIC = {str: {"type": "string"}, int: {"type": "integer"}}


def json_schema() -> dict[str, Any]:
    """The schema as JSON data."""
    definitions: dict[str, Any] = {}
    top = _schema(SampleRow, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top, "$defs": definitions}


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one type; those of typed dictionaries go to `definitions`."""
    if kind in BASIC:
        return BASIC[kind]
    if typing.is_typeddict(kind):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # taken before its keys are looked at
            definitions[kind.__name__] = _object(kind, definitions)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": _schema(arguments[0], definitions), "minItems": 1}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(argument, definitions) for argument in arguments]}
    raise TypeError(f"no JSON Schema is known for {kind}")


def _object(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    keys = typing.get_type_hints(kind)
    return {
        "type": "object",
        "description": inspect.cleandoc(kind.__doc__),
        "properties": {key: _schema(value, definitions) for key, value in keys.items()},
        "required": [key for key in keys if key in kind.__required_keys__],
        "additionalProperties": False,
    }


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
