"""Experts under measurement: layers of models, picks, formats, and what they cannot but take."""

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
def test_picks_are_as_uneven_as_asked(skew: float) -> None:
    layer = Layer(64, 6, 32, 16)
    scores = moe.scores_of(layer, 400, skew)
    assert scores.shape == (400, 64)
    counts = torch.bincount(scores.topk(6).indices.flatten(), minlength=64).sort(descending=True).values
    assert (counts[0] > 4 * counts[32]) == (skew > 0)
    assert torch.equal(scores, moe.scores_of(layer, 400, skew))


@pytest.mark.parametrize("mix", moe.MIXES)
def test_formats_are_dealt_out_in_their_parts(mix: str) -> None:
    names = moe.formats_of(mix, 128)
    parts = moe.MIXES[mix]
    for name, count in parts.items():
        assert abs(names.count(name) - 128 * count / sum(parts.values())) <= 1
    with pytest.raises(ValueError, match="allowed: bfloat16, w8a16"):
        moe.formats_of("w9", 128)


def test_floors_count_the_experts_that_are_hit_and_the_picks() -> None:
    layer = Layer(8, 2, 100, 50)
    bits = [16.0] * 7 + [4.0]
    read, compute = layer.floor(torch.tensor([[0, 1], [1, 7]]), bits, copy_gbs=1.0, tflops=1e-6)
    assert read == pytest.approx(1e-3 * (2 * 30_000 + 7_500 + 2 * (2 * 4 * 100 + 2 * 4 * 50)))
    assert compute == pytest.approx(4 * 6 * 100 * 50)


def test_bits_of_a_weight_count_its_scales() -> None:
    layer = Layer(8, 2, 256, 128)
    assert moe.bits_of("bfloat16", layer) == 16
    assert moe.bits_of("int4g128", layer) == pytest.approx(4 + 16 / 128)
    assert moe.bits_of("int2g128z", layer) == pytest.approx(2 + 32 / 128)


def test_the_best_of_ours_and_every_rival_are_told() -> None:
    def row(arm: str, took: float, ours: bool = True, whole: bool = False) -> dict[str, object]:
        return {"arm": arm, "microseconds": took, "ours": ours, "whole": whole}

    rows = [
        row("a", 5.0),
        row("b", 4.0),
        row("torch grouped", 9.0, False),
        row("loop", 3.0, False),
        row("a", 7.0, whole=True),
    ]
    assert [(r["arm"], r["whole"]) for r in moe.best(rows)] == [
        ("b", False),
        ("torch grouped", False),
        ("loop", False),
        ("a", True),
    ]
