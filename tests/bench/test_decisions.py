import json
import math
import random

import pytest

from tenfold.bench.decisions import (
    FITTED,
    SCALED,
    WAYS,
    Example,
    calibration_error,
    fit,
    measure,
    own,
    result,
    sample,
    scaled,
    score,
    write_temperature,
)


def test_score():
    found = score([[0.9, 0.1], [0.6, 0.4]], [0, 1])
    assert found.accuracy == 0.5
    assert found.brier == pytest.approx((0.01 + 0.01 + 0.36 + 0.36) / 2)
    assert found.nll == pytest.approx(-(math.log(0.9) + math.log(0.4)) / 2)
    assert found.ece == pytest.approx((0.1 + 0.6) / 2)


def test_calibration_error_is_zero_for_an_honest_forecast():
    assert calibration_error([0.75] * 4, [True, True, True, False]) == pytest.approx(0)
    assert calibration_error([1.0] * 4, [True, False] * 2) == pytest.approx(0.5)


@pytest.mark.parametrize("truth", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_used_is_found_again(truth):
    rng = random.Random(1)
    told, answers = [], []
    for _ in range(4000):
        p = rng.random()
        told.append(scaled([p, 1 - p], 1 / truth))  # the model is as much too sure (or unsure) as this
        answers.append(0 if rng.random() < p else 1)
    assert fit(told, answers) == pytest.approx(truth, rel=0.1)


def test_half_fits_and_half_is_measured():
    asked = []

    def asking(example, fields):
        asked.append((example.given, fields["orders"], fields["calibrate"]))
        return [0.99, 0.01]

    examples = [Example(str(i), {"type": "predicate", "instructions": ""}, i % 2) for i in range(10)]
    found = measure("x", examples, asking)
    assert (found.fitted, found.measured) == (5, 5)
    assert set(found.scores) == {*WAYS, SCALED}
    assert len(asked) == 10 * len(WAYS)
    assert found.scores[SCALED].ece < found.scores[FITTED].ece
    assert found.scores[SCALED].accuracy == found.scores[FITTED].accuracy


def test_only_the_second_half_counts():
    wrong, right = {way: [0.1, 0.9] for way in WAYS}, {way: [0.9, 0.1] for way in WAYS}
    assert result("x", [wrong] * 4 + [right] * 4, [0] * 8).scores[FITTED].accuracy == 1.0


def test_examples_of_ones_own(tmp_path):
    score_of = {"type": "score", "instructions": "q", "levels": [{"label": "low"}, {"label": "high"}]}
    choice = {"type": "choice", "instructions": "q", "choices": [{"value": "true"}, {"value": True}]}
    rows = [
        {"input": "a", "question": {"type": "predicate", "instructions": "q"}, "answer": False},
        {"input": "b", "question": choice, "answer": True},
        {"input": "c", "question": score_of, "answer": "high"},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [e.answer for e in own(path)] == [1, 1, 1]
    assert len(sample(own(path), 2)) == 2
    path.write_text('{"input": "a"}')
    with pytest.raises(ValueError, match="line 1"):
        list(own(path))


def test_the_file_of_temperatures_keeps_other_models(tmp_path):
    path = tmp_path / "t.json"
    path.write_text('{"other": 2.0}')
    told = [{way: [0.8, 0.2] for way in WAYS}] * 8
    temperature = write_temperature(path, "mine", [result("x", told, [0, 1] * 4)])
    assert json.loads(path.read_text()) == {"other": 2.0, "mine": round(temperature, 3)}
