"""The judge of structured output: it must notice what it is there to notice."""

import json
import random
from collections import Counter
from typing import Any

import pytest

from tenfold.bench import schemas, structured
from tenfold.bench.schemas import Case
from tenfold.bench.structured import Cost, Verdict
from tenfold.bench.vocabulary import Bytes
from tenfold.engine.grammar import Grammars, Matcher
from tenfold.engine.request import Grammar

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "string", "maxLength": 3}}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def matcher() -> Matcher:
    return Grammars(Bytes(), structured.END + 1, (structured.END,)).start(Grammar("json_schema", json.dumps(SCHEMA)))


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        ({"a": 1}, "as written"),
        ({"a": 1, "b": ["é", ""]}, "as written"),
        ({"b": [], "a": 1}, "reordered"),
        ({"b": []}, ""),
        ({"a": "1"}, ""),
        ({"a": 1, "c": 1}, ""),
        ({"a": 1, "b": ["abcd"]}, ""),
        ({"a": 1, "b": ["\ud800"]}, ""),
        ([], ""),
    ],
)
def test_an_instance_is_taken_in_some_order_of_its_members(matcher: Matcher, value: Any, taken: str) -> None:
    assert structured.takes(matcher, value) == taken


def test_instances_made_up_are_valid_and_their_changed_copies_partly_not(matcher: Matcher) -> None:
    validator = structured.oracle(SCHEMA)
    rng = random.Random(1)
    texts = [structured.walk(matcher, rng) for _ in range(20)]
    values = [json.loads(t) for t in texts if t is not None]
    assert len(values) > 10
    assert all(map(validator.is_valid, values))
    before = json.dumps(values)
    verdicts = Counter(validator.is_valid(structured.mutant(v, rng)) for v in values for _ in range(20))
    assert min(verdicts[True], verdicts[False]) > 10
    assert json.dumps(values) == before


def test_wrong_answers_are_noticed_both_ways() -> None:
    lying = Case("x", "y", SCHEMA, (({"a": 1}, False), ({}, True), ({"a": 2}, True), ({"b": [], "a": 1}, True)))
    refused = Case("x", "z", {"not": {}})
    verdict = structured.judge([lying, refused], print)
    assert (verdict.schemas, verdict.accepted, verdict.valid, verdict.invalid) == (2, 1, 3, 1)
    assert verdict.false_accepts == [("x y", '{"a": 1}')]
    assert verdict.false_rejects == [("x y", "{}")]
    assert verdict.reordered == 1
    assert verdict.refused == {'keyword ["not"]': 1}
    (claim,) = structured.claims_of({"lies": verdict}, "command")
    assert (claim.value, claim.met) == (1, False)
    assert structured.claims_of({"none": Verdict()}, "command")[0].met


def test_without_instances_they_are_made_up() -> None:
    verdict = structured.judge([Case("x", "y", SCHEMA)], print)
    assert verdict.made_up > 0
    assert verdict.valid >= verdict.made_up
    assert verdict.invalid > 0
    assert not verdict.false_accepts


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        ({"$schema": "x", "type": "object"}, True),
        ({"properties": {}}, True),
        ({"type": "object"}, False),
        ({"$schema": "x"}, False),
        ([1], False),
    ],
)
def test_what_counts_as_a_schema(value: Any, schema: bool) -> None:
    assert schemas.is_schema(value) == schema


def test_the_share_of_masks_is_paired() -> None:
    cost = Cost((1.0, 9.0, 2.0), (2.0, 10.0, 2.0))
    assert cost.shares == pytest.approx([0.5, 0.1, 0.0])
    claim = structured.cost_claim(cost, 8, "default", "command")
    assert (claim.value, claim.spread, claim.met) == (10.0, (0.0, 50.0), True)
    assert "batch 8, SmolLM2-135M-Instruct Q4_1, JSON" in claim.what
    assert "batch 8, other.gguf, JSON" in structured.cost_claim(cost, 8, "/models/other.gguf", "command").what
