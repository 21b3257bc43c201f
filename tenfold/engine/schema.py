"""JSON schemas on their way to llguidance: read, and held back where it would let an invalid answer through.

Invariant: what is handed on means the schema as its author wrote it, or less; never more.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

# Between two parts of an answer at most one line break and 64 blanks: enough to indent, and an answer cannot run away
# in white space, as small models would.
WHITE_SPACE = r"\r?\n[ \t]{0,64}|[ \t]{1,64}"
# Set over whatever a schema's own "x-guidance" says, for a client could turn a promise off with it.
JSON_OPTIONS: dict[str, Any] = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": WHITE_SPACE,
    "coerce_one_of": False,  # would take oneOf for anyOf
    "lenient": False,  # would pass over what it does not know
}
DATA = {"enum", "const", "default", "examples", "example"}  # keywords whose values are not schemas
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|([\[{])|([\]}])', re.DOTALL)


def nesting(source: str) -> int:
    """How deep arrays and objects of a JSON text stand in one another; read without recursion."""
    depth = deepest = 0
    for match in _BRACKETS.finditer(source):
        if match[1]:
            depth += 1
            deepest = max(deepest, depth)
        elif match[2]:
            depth -= 1
    return deepest


def json_schema(source: str) -> str:
    """The schema to compile. Raises ValueError for what is no schema, or none that can be kept to."""
    try:
        schema = json.loads(source, parse_constant=_not_json)
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise ValueError(f"it is {'false' if schema is False else 'a ' + type(schema).__name__}, not an object")
        schema.pop("x-guidance", None)
        text = json.dumps(schema, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"The JSON schema cannot be read: {error}.") from None
    for part in subschemas(schema):
        _check_repeats(part)
    return text


def _not_json(name: str) -> Any:
    raise ValueError(f"it contains {name}, which is not JSON")


def subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Every object in a schema that could be a schema itself, the outermost first."""
    todo = [schema]
    while todo:
        part = todo.pop()
        if isinstance(part, list):
            todo += part
        elif isinstance(part, dict):
            yield part
            todo += [value for key, value in part.items() if key not in DATA]


def _check_repeats(schema: dict[str, Any]) -> None:
    """A name that is not in `properties` may come twice in an answer, and then counts twice for llguidance's
    minProperties, but once for whoever reads the answer.
    """
    least = schema.get("minProperties")
    if not isinstance(least, int | float):
        return
    required = schema.get("required")
    certain = len(set(map(str, required))) if isinstance(required, list) else 0
    closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    if least > certain + 1 and not closed:
        raise ValueError(
            f"The JSON schema is not supported: minProperties is {least} where only {certain} names are required; "
            "allowed: one more than are required. Name the properties and set additionalProperties to false."
        )
