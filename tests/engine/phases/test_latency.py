"""Predicted times: what was measured is met, stairs are found, observations are learned."""

import pytest

from tenfold.engine.phases.latency import Fit, Paper, Stairs, interpolated

STAIRS = Stairs(
    {32: ((1, 0.01), (1000, 0.4)), 64: ((1, 0.01), (1000, 0.2)), 96: ((1, 0.01), (1000, 0.2)), 132: ((1000, 0.1),)},
    {32: ((1, 0.008), (64, 0.02)), 64: ((1, 0.006), (64, 0.012))},
)


def test_between_measured_places_values_lie_between() -> None:
    points = [(10, 1.0), (20, 3.0)]
    assert [interpolated(points, at) for at in (5, 10, 15, 20, 40)] == [1.0, 1.0, 2.0, 3.0, 7.0]
    assert interpolated(points[:1], 30) == 3.0
    with pytest.raises(ValueError, match="measured"):
        interpolated([], 1)


def test_stairs_take_the_next_smaller_number_that_was_measured() -> None:
    assert STAIRS.prefill_seconds(80, 1000) == 0.2
    assert STAIRS.prefill_seconds(16, 1000) == 0.4
    assert STAIRS.prefill_seconds(132, 0) == STAIRS.decode_seconds(32, 0) == 0
    assert STAIRS.decode_seconds(48, 64) == 0.02


def test_a_phase_that_was_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="decode"):
        Stairs({32: ((1, 1.0),)}, {32: ()})


def test_a_line_is_learned_and_new_observations_replace_old_ones() -> None:
    fit = Fit(0.0, 0.0)
    for i in range(40):
        fit.observe(i % 7, 3.0 * (i % 7) + 2.0)
    assert (fit.a, fit.b) == (pytest.approx(3.0, abs=0.01), pytest.approx(2.0, abs=0.01))
    for i in range(400):
        fit.observe(i % 7, 1.0 * (i % 7) + 5.0)
    assert fit.at(4) == pytest.approx(9.0, abs=0.05)


def test_the_papers_form_is_a_queue() -> None:
    paper = Paper.seeded(132, ttft=0.2, tpot=0.006)
    assert paper.ttft_seconds(132, 0) == pytest.approx(0.2)
    assert paper.tpot_seconds(132) == pytest.approx(0.006)
    assert paper.ttft_seconds(132, 66) == pytest.approx(0.4)
    assert paper.ttft_seconds(64, 64) == paper.tpot_seconds(0) == float("inf")
    for decode in (32, 64, 96) * 30:
        paper.observe(132 - decode, decode, 20.0, 0.5, 1.2 / decode + 0.004)
    assert paper.tpot_seconds(48) == pytest.approx(1.2 / 48 + 0.004, rel=0.02)
