import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.serve.decide.calibrate import prior, probabilities, softmax
from tenfold.serve.decide.labels import LOWEST, Labels, add
from tenfold.serve.decide.question import Option, Question, orders

LOGS = st.lists(st.floats(-1e4, 0) | st.just(-math.inf), min_size=2, max_size=9)


@given(LOGS, st.floats(0.05, 100.0))
def test_probabilities_sum_to_one_whatever_a_model_says(logs, temperature):
    clamped = [max(LOWEST, value) for value in logs]
    found = probabilities([clamped], [clamped[::-1]], temperature)
    assert sum(found) == pytest.approx(1.0)
    assert all(0 <= p <= 1 for p in found)


@given(LOGS)
def test_adding_logarithms(logs):
    exact = math.log(sum(math.exp(value) for value in logs) or math.exp(2 * LOWEST))
    assert add(logs) == pytest.approx(max(exact, LOWEST))


@given(st.lists(st.integers(-20, 0), min_size=2, max_size=9), st.floats(0.5, 10.0))
def test_temperature_keeps_the_order(logs, temperature):
    assert softmax(logs, temperature).index(max(softmax(logs, temperature))) == softmax(logs).index(max(softmax(logs)))


def test_a_model_that_says_only_its_prior_knows_nothing():
    said = [math.log(0.7), math.log(0.2), math.log(0.1)]
    assert probabilities([said], [prior([said, said])]) == pytest.approx([1 / 3] * 3)


def test_prior_is_the_mean_probability():
    assert [math.exp(x) for x in prior([[math.log(0.9), math.log(0.1)], [math.log(0.5), math.log(0.5)]])] == (
        pytest.approx([0.7, 0.3])
    )


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("size", [2, 3, 5, 255])
def test_orders_of_a_choice(size, count):
    question = Question("choice", "", tuple(Option(str(i)) for i in range(size)))
    found = orders(question, count)
    assert len(set(found)) == len(found) == min(size, count)
    assert found[0] == tuple(range(size))
    assert all(sorted(order) == list(range(size)) for order in found)
    assert len({order.index(0) for order in found}) == len(found)  # no option keeps its place


def test_levels_are_only_turned_around():
    question = Question("score", "", tuple(Option(str(i)) for i in range(4)))
    assert orders(question, 9) == [(0, 1, 2, 3), (3, 2, 1, 0)]
    assert orders(question, 1) == [(0, 1, 2, 3)]


def test_labels_need_letters_and_digits():
    with pytest.raises(ValueError, match="no token 'A'"):
        Labels.of(lambda token: b"x", 10)
    labels = Labels.of(lambda token: bytes([token]), 256)
    assert not labels.has_words
    assert labels.token("Q") == ord("Q")
