"""The comparison of two ways to compute a model, on hand-made distributions."""

import math

import pytest
import torch

from tenfold.bench.quality import compare, windows


def logits_of(probabilities: list[list[float]]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_equal_models_have_no_divergence() -> None:
    table = logits_of([[0.5, 0.25, 0.25]] * 3)
    found = compare(lambda ids: table, lambda ids: table, [[0, 0, 1]])
    assert found.tokens == 2
    assert found.kl == pytest.approx(0, abs=1e-12)
    assert found.agreement == 1
    assert found.perplexity == pytest.approx(math.exp(-(math.log(0.5) + math.log(0.25)) / 2))


def test_divergence_of_two_known_distributions() -> None:
    p, q = [0.5, 0.5], [0.9, 0.1]
    found = compare(lambda ids: logits_of([p, p]), lambda ids: logits_of([q, q]), [[0, 1]])
    assert found.kl == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-5)
    assert found.perplexity == pytest.approx(10, rel=1e-5)
    assert found.perplexity_change == pytest.approx(4, rel=1e-5)


def test_windows_refuse_a_text_too_short() -> None:
    assert [list(w) for w in windows(range(7), 3, 5)] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="longer text"):
        list(windows([1, 2], 3, 1))
