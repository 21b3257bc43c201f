"""Experts under measurement: layers of models, picks, and what they cannot but take."""

import pytest
import torch

from tenfold.bench import moe
from tenfold.bench.moe import Layer


def test_layers_are_those_of_models() -> None:
    assert moe.layer_of("shape:qwen3-30b-a3b") == Layer(128, 8, 2048, 768)
    assert moe.layer_of("shape:mixtral-8x7b") == Layer(8, 2, 4096, 14336)
    with pytest.raises(ValueError, match="has no experts"):
        moe.layer_of("shape:tiny")


@pytest.mark.parametrize("skew", [0.0, 1.2])
def test_picks_of_a_token_are_different_experts(skew: float) -> None:
    layer = Layer(64, 6, 32, 16)
    ids = moe.drawn(layer, 400, skew)
    assert ids.shape == (400, 6)
    assert all(len(set(row)) == 6 for row in ids.tolist())
    counts = torch.bincount(ids.flatten(), minlength=64).sort(descending=True).values
    assert (counts[0] > 4 * counts[32]) == (skew > 0)
    assert torch.equal(ids, moe.drawn(layer, 400, skew))


def test_floors_count_the_experts_that_are_hit_and_the_picks() -> None:
    layer = Layer(8, 2, 100, 50)
    assert layer.expert_bytes == 3 * 100 * 50 * 2
    read, compute = layer.floor(torch.tensor([[0, 1], [1, 2]]), copy_gbs=1.0, tflops=1e-6)
    assert read == pytest.approx(1e-3 * (3 * 30_000 + 2 * (2 * 4 * 100 + 2 * 4 * 50)))
    assert compute == pytest.approx(4 * 6 * 100 * 50)
