"""Experts under measurement: layers of models, picks, formats, and what they cannot but take."""

from dataclasses import replace

import pytest
import torch

from tenfold.bench import moe

tuning = pytest.importorskip("tenfold.ops.gpu.tune_experts")


def test_layers_are_those_of_models() -> None:
    work = moe.work_of("shape:qwen3-30b-a3b", "bfloat16")
    assert (work.count, work.top, work.cols, work.inner) == (128, 8, 2048, 768)
    assert work.dense
    assert moe.work_of("shape:mixtral-8x7b", "w4a16").formats == (("int4g128", "int4g128", 8),)
    with pytest.raises(ValueError, match="has no experts"):
        moe.work_of("shape:tiny", "bfloat16")
    with pytest.raises(ValueError, match="allowed: bfloat16, w8a16"):
        moe.work_of("shape:mixtral-8x7b", "w9")


@pytest.mark.parametrize("skew", [0.0, 1.2])
def test_picks_are_as_uneven_as_asked(skew: float) -> None:
    work = replace(moe.work_of("shape:deepseek-v2-lite", "bfloat16"), tokens=400)
    scores = tuning.scores_of(work, skew)
    assert scores.shape == (400, 64)
    counts = torch.bincount(scores.topk(6).indices.flatten(), minlength=64).sort(descending=True).values
    assert (counts[0] > 4 * counts[32]) == (skew > 0)
    assert torch.equal(scores, tuning.scores_of(work, skew))


@pytest.mark.parametrize("count", [8, 60, 128])
@pytest.mark.parametrize("mix", moe.MIXES)
def test_formats_are_shared_out_in_their_parts(mix: str, count: int) -> None:
    parts = moe.MIXES[mix]
    found = moe.shared_out(parts, count)
    assert sum(n for _, _, n in found) == count
    for name, _, n in found:
        assert abs(n - count * parts[name] / sum(parts.values())) <= 1
    work = replace(moe.work_of("shape:mixtral-8x7b", "w4a16"), count=count, formats=found)
    dealt = tuning.dealt(work)
    assert sorted(up for up, _ in dealt) == sorted(name for name, _, n in found for _ in range(n))


def test_floors_count_the_experts_that_are_hit_and_the_picks() -> None:
    work = replace(moe.work_of("shape:mixtral-8x7b", "bfloat16"), cols=100, inner=50)
    bits = [16.0] * 7 + [4.0]
    read, compute = moe.floor(work, torch.tensor([[0, 1], [1, 7]]), bits, copy_gbs=1.0, tflops=1e-6)
    assert read == pytest.approx(1e-3 * (2 * 30_000 + 7_500 + 2 * (2 * 4 * 100 + 2 * 4 * 50)))
    assert compute == pytest.approx(4 * 6 * 100 * 50)


def test_bits_of_a_weight_count_its_scales() -> None:
    work = replace(moe.work_of("shape:mixtral-8x7b", "bfloat16"), cols=256, inner=128)
    assert moe.bits_of("dense", work) == 16
    assert moe.bits_of("int4g128", work) == pytest.approx(4 + 16 / 128)
    assert moe.bits_of("int2g128z", work) == pytest.approx(2 + 32 / 128)


def test_the_best_of_ours_and_every_rival_are_told() -> None:
    def row(arm: str, took: float, ours: bool = True, whole: bool = False) -> dict[str, object]:
        return {"arm": arm, "microseconds": took, "ours": ours, "whole": whole}

    rivals = [row("torch grouped", 9.0, False), row("loop", 3.0, False)]
    rows = [row("a", 5.0), row("b", 4.0), *rivals, row("a", 7.0, whole=True)]
    assert [(r["arm"], r["whole"]) for r in moe.best(rows)] == [
        ("b", False),
        ("torch grouped", False),
        ("loop", False),
        ("a", True),
    ]


def test_formats_stand_side_by_side() -> None:
    def row(format: str, arm: str, took: float, ours: bool = True, whole: bool = False) -> dict[str, object]:
        about = {"model": "shape:mixtral-8x7b", "tokens": 8, "format": format, "arm": arm}
        return about | {"microseconds": took, "ours": ours, "whole": whole}

    rows = [row("bfloat16", "a", 9.0), row("bfloat16", "b", 8.0), row("bfloat16", "torch grouped", 6.0, False)]
    rows += [row("bfloat16", "b", 1.0, whole=True), row("w8a8", "c", 4.0)]
    assert moe.table(rows).splitlines() == [
        "| experts of | tokens | bfloat16 | torch grouped | w8a8 |",
        "|---|---|---|---|---|",
        "| mixtral-8x7b | 8 | 8.0 us | 6.0 us | 4.0 us (1.50x) |",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ValueError, match="There is no GPU here, and experts are timed on one"):
        moe.main([])
