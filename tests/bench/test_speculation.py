"""The comparison of speculation on and off counts what happened and compares what was answered."""

import json
from typing import Any

import pytest

from tenfold.bench import speculation
from tests.engine import fake


def test_off_and_on_in_turn_with_equal_answers() -> None:
    engine = fake.make_engine(speculate="ngram", max_model_len=300, pages=400)
    fake.speculating(engine, fake.Guesses(), fake.All())
    point = speculation.measure(engine, "sampled", rows=2, tokens=12, rounds=2)
    assert (point.equal, point.answers) == (30, 30)
    assert (len(point.off), len(point.on), point.tokens) == (2, 2, 120)
    assert point.drafted > point.accepted > 0
    assert json.loads(json.dumps(point.plain()))["gain"] > 0


def test_answers_that_differ_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fake.make_engine(speculate="ngram", max_model_len=300, pages=400)
    once = speculation.once

    def changed(engine: Any, *rest: Any) -> dict[str, list[int]]:
        answers = once(engine, *rest)
        answers["3"][0] += engine.speculator is not None
        return answers

    monkeypatch.setattr(speculation, "once", changed)
    point = speculation.measure(engine, "repeat", rows=1, tokens=4, rounds=1)
    assert (point.equal, point.answers) == (8, 10)
