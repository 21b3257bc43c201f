"""Types that a schema gives to parameters, whatever the schema."""

import pytest

from tenfold.serve.parse.values import MAX_READ, parameter_types


class Counted(dict):
    """A schema that counts how often one like it is read."""

    reads = 0

    def get(self, key, default=None):
        Counted.reads += 1
        return super().get(key, default)


def types(part, **root):
    return parameter_types({"properties": {"a": part}, **root})["a"]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "integer"}, {"integer"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"enum": [1, "a", None]}, {"integer", "string", "null"}),
        ({"const": True}, {"boolean"}),
        ({"anyOf": [{"type": "number"}, {"$ref": "#/$defs/b"}]}, {"number", "boolean"}),
        ({"$ref": "#/$defs/none"}, {"string"}),
        ({"properties": {}}, {"object"}),
        ({"items": {}}, {"array"}),
        ({}, {"string"}),
    ],
)
def test_types(part, expected):
    assert types(part, **{"$defs": {"b": {"type": "boolean"}}}) == expected


@pytest.mark.parametrize("given", [3, 1.5, True, {"a": 1}, [3, None]])
@pytest.mark.parametrize("key", ["type", "enum", "anyOf", "$ref"])
def test_what_is_no_schema_is_passed_over(key, given):
    expected = {"integer", "null"} if key == "enum" and isinstance(given, list) else {"string"}
    assert types({key: given}) == expected


@pytest.mark.parametrize("k", [1, 30, 2000])
def test_parts_that_refer_to_each_other_are_read_once(k):
    links = [{"$ref": f"#/properties/{name}"} for name in "ab" for _ in range(k)]
    parts = {
        name: Counted(anyOf=[{"type": kind}, *map(Counted, links)]) for name, kind in (("a", "null"), ("b", "integer"))
    }
    Counted.reads = 0
    found = parameter_types({"properties": parts})
    assert "null" in found["a"]
    assert k > 30 or found == {"a": {"null", "integer"}, "b": {"null", "integer"}}
    assert Counted.reads <= 6 * MAX_READ  # of each schema six keys are read


def test_reading_is_bounded_for_a_tool_as_a_whole():
    wide = Counted(anyOf=[Counted(type="integer")] * 100)
    parts = {f"a{i}": Counted({"$ref": "#/$defs/wide"}) for i in range(1000)}
    Counted.reads = 0
    found = parameter_types({"properties": parts, "$defs": {"wide": wide}})
    assert found["a0"] == {"integer"}
    assert Counted.reads <= 6 * MAX_READ
