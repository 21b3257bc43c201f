"""Argument values that are not written as JSON: Python literals, and plain text whose type only the schema knows.

Invariant: text from a model is never run; what cannot be understood stays a string.
"""

import ast
import json
import math
from typing import Any

MAX_LITERAL = 1 << 16  # characters of a Python literal; Python's own parser needs much memory for long ones
NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
UNDERSTOOD = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)


def parameter_types(schema: Any) -> dict[str, frozenset[str]]:
    """The JSON types that each parameter of a tool may have; without any in the schema, a string."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict):
        return {}
    return {name: frozenset(_types(part, schema)) or frozenset({"string"}) for name, part in properties.items()}


def _types(schema: Any, root: dict[str, Any], depth: int = 0) -> set[str]:
    if not isinstance(schema, dict) or depth > 8:
        return set()
    found: set[str] = set()
    given = schema.get("type")
    found |= {given} if isinstance(given, str) else {t for t in given or () if isinstance(t, str)}
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if not found and isinstance(values, list):
        found |= {_type(value) for value in values}
    for key in ("anyOf", "oneOf", "allOf"):
        for part in schema.get(key) or () if isinstance(schema.get(key), list) else ():
            found |= _types(part, root, depth + 1)
    reference = schema.get("$ref")
    if isinstance(reference, str):
        found |= _types(_resolve(reference, root), root, depth + 1)
    if not found and "properties" in schema:
        found.add("object")
    if not found and "items" in schema:
        found.add("array")
    return found


def _resolve(reference: str, root: Any) -> Any:
    for part in reference.removeprefix("#/").split("/"):
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
