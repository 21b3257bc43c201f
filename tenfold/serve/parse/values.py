"""Argument values that are not written as JSON: Python literals, and plain text whose type only the schema knows.

Invariant: text from a model is never run; what cannot be understood stays a string.
"""

import ast
import json
import math
from typing import Any

MAX_LITERAL = 1 << 16  # characters of a Python literal; Python's own parser needs much memory for long ones
MAX_READ = 10_000  # schemas and values that are looked at for the types of one tool's parameters
MAX_POINTER = 32  # names in a reference
NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
UNDERSTOOD = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)


def parameter_types(schema: Any) -> dict[str, frozenset[str]]:
    """The JSON types that each parameter of a tool may have; without any in the schema, a string."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict):
        return {}
    reader = _TypeReader(schema)
    return {name: frozenset(reader.types(part, set())) or frozenset({"string"}) for name, part in properties.items()}


class _TypeReader:
    """Finds types in one tool's schema. It looks at MAX_READ schemas and values, then finds no more: through parts
    that refer to each other there are far more ways than parts."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._left = MAX_READ

    def types(self, schema: Any, seen: set[str], depth: int = 0) -> set[str]:
        """seen: references that were followed already."""
        self._left -= 1
        if not isinstance(schema, dict) or depth > 8 or self._left < 0:
            return set()
        given = schema.get("type")
        found = {given} if isinstance(given, str) else {t for t in self._list(given) if isinstance(t, str)}
        if not found:
            values = schema.get("enum", [schema["const"]] if "const" in schema else None)
            found |= {_type(value) for value in self._list(values)}
        for key in ("anyOf", "oneOf", "allOf"):
            for part in self._list(schema.get(key)):
                found |= self.types(part, seen, depth + 1)
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            found |= self.types(_resolve(reference, self._root), seen, depth + 1)
        if not found and "properties" in schema:
            found.add("object")
        if not found and "items" in schema:
            found.add("array")
        return found

    def _list(self, value: Any) -> list[Any]:
        """As much of a list as may still be looked at; nothing of what is no list."""
        if not isinstance(value, list):
            return []
        part = value[: max(self._left, 0)]
        self._left -= len(part)
        return part


def _resolve(reference: str, root: Any) -> Any:
    for part in reference.removeprefix("#/").split("/", MAX_POINTER):
        root = root.get(part) if isinstance(root, dict) else None
    return root


def _type(value: Any) -> str:
    return "null" if value is None else NAMES.get(type(value), "object")


def typed_value(text: str, types: frozenset[str]) -> str:
    """JSON of a value written as plain text, in one of the types it may have; a string where it fits none."""
    stripped = text.strip()
    for read in (_json, _python):
        value, understood = read(stripped)
        if understood and _fits(value, types):
            return stripped if read is _json else json.dumps(value, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False)


def _json(text: str) -> tuple[Any, bool]:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None, False
    return value, True


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _python(text: str) -> tuple[Any, bool]:
    if len(text) > MAX_LITERAL:
        return None, False
    try:
        value = ast.literal_eval(text)
        json.dumps(value, allow_nan=False)
    except UNDERSTOOD:
        return None, False
    return value, not isinstance(value, str)


def _fits(value: Any, types: frozenset[str]) -> bool:
    kind = _type(value)
    if kind in types:
        return kind != "string"
    if kind == "integer":
        return "number" in types
    return kind == "number" and "integer" in types and math.isfinite(value) and value == int(value)


def python_calls(text: str) -> list[tuple[str, str]]:
    """(name, arguments as JSON) of `f(a=1)` or `[f(a=1), g()]`; empty for anything else. print(...) around one call is
    passed over.
    """
    if len(text) > MAX_LITERAL:
        return []
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List) else [tree]
        return [_python_call(node) for node in nodes]
    except UNDERSTOOD:
        return []


def _python_call(node: ast.expr) -> tuple[str, str]:
    if not isinstance(node, ast.Call):
        raise ValueError("not a call")
    name = ast.unparse(node.func)
    if name == "print" and len(node.args) == 1 and isinstance(node.args[0], ast.Call):
        return _python_call(node.args[0])
    if node.args or not all(isinstance(part, (ast.Name, ast.Attribute)) for part in _parts(node.func)):
        raise ValueError("arguments without names")
    arguments = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in node.keywords}
    return name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)


def _parts(node: ast.expr) -> list[ast.expr]:
    return [node, *(_parts(node.value) if isinstance(node, ast.Attribute) else [])]
