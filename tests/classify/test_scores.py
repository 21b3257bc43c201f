"""Scores and calibration, against sums by hand."""

import math

import pytest
import torch

from tenfold.classify import loss, plots
from tenfold.classify.scores import confusion, ece, expected_ece, f1_each, fit_temperature, score


def test_confusion_and_f1():
    labels, guesses = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 0, 0])
    table = confusion(guesses, labels, 3)
    assert table.tolist() == [[1, 1, 0], [1, 2, 0], [1, 0, 0]]
    assert f1_each(table).tolist() == pytest.approx([2 / 5, 4 / 6, 0])


def test_scores_by_hand():
    probabilities = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.3, 0.7]])
    found = score(probabilities.log(), torch.tensor([0, 1, 1, 0]))
    assert found.accuracy == 0.5
    assert found.f1_macro == found.f1_weighted == pytest.approx(0.5)
    assert found.brier == pytest.approx((0.08 + 0.72 + 0.02 + 0.98) / 4)
    assert found.nll == pytest.approx(-(math.log(0.8) + math.log(0.4) + math.log(0.9) + math.log(0.3)) / 4)
    assert found.ece == pytest.approx((abs(0.8 - 1) + abs(0.6 - 0) + abs(0.9 - 1) + abs(0.7 - 0)) / 4, abs=1e-6)
    assert found.confusion == [[1, 1], [1, 1]]


def test_calibration_error_of_bins():
    """Ten guesses at 0.75, of which half are right, and ten at 0.95, all right."""
    sure = torch.tensor([0.75] * 10 + [0.95] * 10, dtype=torch.float64)
    probabilities = torch.stack([sure, 1 - sure], 1)
    labels = torch.tensor([0, 1] * 5 + [0] * 10)
    assert ece(probabilities, labels) == pytest.approx((0.25 + 0.05) / 2)
    assert ece(torch.tensor([[1.0, 0.0]]), torch.tensor([0])) == 0


def test_calibration_error_by_chance():
    """A guess at 0.8 is off by 0.2 or by 0.8; two in a bin by 0.2, 0.3 or 0.8; and many by nothing."""
    assert expected_ece(torch.tensor([0.8]), draws=20_000) == pytest.approx(0.8 * 0.2 + 0.2 * 0.8, abs=0.01)
    two = 0.64 * 0.2 + 0.32 * 0.3 + 0.04 * 0.8
    assert expected_ece(torch.tensor([0.8, 0.8]), draws=20_000) == pytest.approx(two, abs=0.01)
    assert expected_ece(torch.full((50_000,), 0.8), draws=10) < 0.005
    assert expected_ece(torch.ones(5)) == 0


def test_calibration_error_by_chance_is_that_of_drawn_labels():
    torch.manual_seed(0)
    probabilities = (torch.randn(60, 3, dtype=torch.float64) * 2).softmax(-1)
    drawn = [ece(probabilities, torch.multinomial(probabilities, 1)[:, 0]) for _ in range(2000)]
    told = expected_ece(probabilities.amax(-1))
    assert told == pytest.approx(sum(drawn) / len(drawn), abs=0.003)  # three standard errors of both
    assert told == expected_ece(probabilities.amax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found(temperature):
    """Labels drawn from the probabilities at a temperature; scaling must find it again."""
    torch.manual_seed(0)
    logits = torch.randn(20_000, 3) * 2
    labels = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.05)
    assert score(logits, labels, found).ece < 0.015
    assert score(logits, labels, found).nll <= score(logits, labels).nll + 1e-9


def test_temperatures_stay_in_bounds():
    assert fit_temperature(torch.tensor([[9.0, 0.0]]), torch.tensor([0])) >= 0.05
    assert fit_temperature(torch.tensor([[9.0, 0.0]]), torch.tensor([1])) <= 100


def test_contrast_of_views():
    features = torch.eye(3)
    assert loss.of_views(features, features) < 1e-4
    assert loss.of_views(features, features.roll(1, 0)) > 10


def test_contrast_of_labels():
    labels = torch.tensor([0, 0, 1, 1])
    together = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert loss.of_labels(together, labels) < 1e-4
    assert loss.of_labels(together, torch.tensor([0, 1, 0, 1])) > 10
    assert loss.of_labels(together, torch.arange(4)) == 0
    one = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1).requires_grad_()
    loss.of_labels(one, labels).backward()
    assert one.grad.isfinite().all()


def test_a_confusion_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = plots.confusion([[3, 1], [0, 0]], ["no", "yes"], "title", tmp_path / "c.png")
    assert path.read_bytes().startswith(b"\x89PNG")
