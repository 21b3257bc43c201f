"""docs/security.md names the tests that hold its promises; each of them must be there."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from tenfold.serve.settings import ServeConfig

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([a-z]+/test_\w+\.py)(?:::(\w+))?`", TEXT)))


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_named_tests_exist(file, test):
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert functions
    assert not test or test in functions


def test_every_promise_names_a_test():
    rows = [row for row in TEXT.splitlines() if row.startswith("|") and not row.startswith(("|---", "| |"))]
    promises = [row for row in rows if "held by" not in row and "/admin/" not in row.split("|")[1]]
    assert len(promises) > 20
    assert [row for row in promises if "test_" not in row and "connection | 16" not in row] == []


def test_settings_it_names_exist():
    known = {f"--{field.name.replace('_', '-')}" for field in fields(ServeConfig)}
    assert set(re.findall(r"`(--[a-z][a-z-]*[a-z])(?: [^`]*)?`", TEXT)) <= known
