"""JSON schemas on their way to llguidance: read, rid of what says nothing, and refused where it would let an invalid
answer through.

Invariant: what is handed on means the schema as its author wrote it, or less; never more.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

# At most 64 characters between two parts of an answer: enough to indent, and an answer cannot run away
# in white space, as small models would.
WHITE_SPACE = r"[ \t\r\n]{1,64}"
# Set over whatever a schema's own "x-guidance" says, for a client could turn a promise off with it.
JSON_OPTIONS: dict[str, Any] = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": WHITE_SPACE,
    "coerce_one_of": False,  # would take oneOf for anyOf
    "lenient": False,  # would pass over what it does not know
}
# Keywords whose values are data, and those whose values are schemas by name.
DATA = frozenset(("enum", "const", "default", "examples", "example"))
NAMED = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"))
# Formats that some draft defines. Others are notes to the reader, as the drafts say of names they do not know.
FORMATS = frozenset(
    (
        *("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6"),
        *("uri", "uri-reference", "uri-template", "iri", "iri-reference", "uuid", "regex"),
        *("json-pointer", "relative-json-pointer"),
    )
)
YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"  # 0001 to 9999
LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
DAY = "(?:0[1-9]|1[0-9]|2[0-8])"
MONTH_DAY = rf"(?:(?:0[1-9]|1[0-2])-{DAY}|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
DATE = rf"(?:{YEAR}-{MONTH_DAY}|{LEAP_YEAR}-02-29)"
TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
# Formats to be exact about: llguidance would take the 30th of February, and a leap second at any time of the day.
PATTERNS = {"date": f"^{DATE}$", "time": f"^{TIME}$", "date-time": f"^{DATE}T{TIME}$"}
DIALECT = re.compile(r"https?://json-schema\.org/draft(-04|-06|-07|/2019-09|/2020-12)/schema#?")
OLD_DIALECT = re.compile(r"https?://json-schema\.org/draft-0[0-3]/.*")
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
    except ValueError as error:
        raise ValueError(f"The JSON schema cannot be read: {error}.") from None
    schema.pop("x-guidance", None)
    for part in list(subschemas(schema)):
        _drop_notes(part)
        _spell_format(part)
        _check_repeats(part)
    try:
        return json.dumps(schema, allow_nan=False)
    except ValueError:
        raise ValueError("The JSON schema cannot be read: it has a number too large for 64 bits.") from None


def _not_json(name: str) -> Any:
    raise ValueError(f"it contains {name}, which is not JSON")


def subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Every object in a schema that is one itself, or could be by a reference, the outermost first."""
    todo = [schema]
    while todo:
        part = todo.pop()
        if isinstance(part, list):
            todo += part
        elif isinstance(part, dict):
            yield part
            for key, value in part.items():
                if key in NAMED and isinstance(value, dict):
                    todo += value.values()
                elif key not in DATA:
                    todo.append(value)


def _drop_notes(schema: dict[str, Any]) -> None:
    """Take out keywords that allow everything, but that llguidance refuses whatever they say."""
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    dialect = schema.get("$schema")
    if not isinstance(dialect, str):
        return
    if OLD_DIALECT.fullmatch(dialect):
        raise ValueError(f"The JSON schema is not supported: $schema is {dialect}; allowed: draft-04 and later.")
    if not DIALECT.fullmatch(dialect):
        del schema["$schema"]  # read as the newest draft


def _spell_format(schema: dict[str, Any]) -> None:
    """A format as a pattern where that is more exact; none where no draft knows it."""
    kind = schema.get("format")
    if not isinstance(kind, str) or (kind in FORMATS and kind not in PATTERNS):
        return
    del schema["format"]
    if kind not in PATTERNS:
        return
    pattern = {"pattern": PATTERNS[kind]}
    if "pattern" not in schema:
        schema.update(pattern)
    elif isinstance(schema.get("allOf", []), list):
        schema["allOf"] = [*schema.get("allOf", []), pattern]


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
