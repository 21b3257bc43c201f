"""Groups are of equal size and sensible; clip factors are those of least error; runs agree to the bit."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold.cache.skvq.calibrate import CLIPS, LARGEST_ZERO, ClipSearch, Extremes, Sample, assign, cluster
from tenfold.ops.kernels import AttentionSpec
from tenfold.ops.kv.quantize import rounded
from tenfold.ops.oracle import rotate

SPEC = AttentionSpec(heads=4, kv_heads=2, head_dim=64, scale=0.2)


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 16), count=st.integers(1, 6), seed=st.integers(0, 1 << 30))
def test_clusters_are_of_equal_size_and_the_same_each_time(size: int, count: int, seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(size * count, 2)).astype(np.float32)
    labels = cluster(points, count)
    assert np.bincount(labels, minlength=count).tolist() == [size] * count
    assert np.array_equal(labels, cluster(points, count))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1 << 30))
def test_clear_clusters_are_found(seed: int) -> None:
    generator = np.random.default_rng(seed)
    truth = generator.permutation(np.repeat(np.arange(4), 8))
    centres = np.array([[-1, 1], [-5, 0], [0, 9], [-20, 20]])
    labels = cluster((centres[truth] + generator.normal(size=(32, 2)) / 20).astype(np.float32), 4)
    assert len({(a, b) for a, b in zip(truth.tolist(), labels.tolist())}) == 4


def test_who_would_lose_most_chooses_first() -> None:
    distance = np.array([[0.0, 1.0], [0.0, 9.0], [5.0, 6.0], [4.0, 3.0]])
    assert assign(distance, 2).tolist() == [0, 0, 1, 1]


def extremes(channels: int = 128) -> tuple[Extremes, Tensor]:
    found = Extremes(channels)
    size = torch.tensor([1.0, 1.2, 8.0, 9.0])[torch.arange(channels) % 4]
    for seed in range(3):
        found.add(size * torch.randn(50, channels, generator=torch.Generator().manual_seed(seed)))
    return found, size


def test_groups_stay_inside_their_span_and_hold_channels_alike() -> None:
    found, size = extremes()
    grouping = found.grouping(32, 64, torch.zeros(128))
    for group, row in enumerate(grouping.order):
        assert set((row // 64).tolist()) == {group // 2}
        assert size[row].max() - size[row].min() <= 1
    contiguous = found.grouping(32, 64, torch.zeros(128), reorder=False)
    assert contiguous.group.tolist() == [c // 32 for c in range(128)]


def test_units_are_powers_of_two_that_leave_room() -> None:
    found, _ = extremes()
    shift = torch.full((128,), 0.25)
    grouping = found.grouping(32, 64, shift)
    assert torch.equal(grouping.unit, torch.exp2(grouping.unit.log2().round()))
    for row, unit in zip(grouping.order, grouping.unit):
        largest = max(abs(found.low[row] - 0.25).max(), abs(found.high[row] - 0.25).max())
        assert LARGEST_ZERO / 2 < largest / float(unit) <= LARGEST_ZERO


def test_damaged_values_are_told() -> None:
    found = Extremes(32)
    found.add(torch.full((1, 32), float("nan")))
    with pytest.raises(ValueError, match="not finite"):
        found.grouping(32, 32, torch.zeros(32))


def sample(seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(24, h, 64, generator=generator) for h in (4, 2, 2))
    v[..., 7] *= 6  # something worth clipping
    angle = torch.arange(24)[:, None, None] / (1 + torch.arange(32.0))
    return Sample(
        q, k * 2, v, SPEC, lambda x: rotate(x.transpose(0, 1), angle.cos(), angle.sin()).transpose(0, 1).contiguous()
    )


def naive(one: Sample, stored: Tensor, of_keys: bool, rotary: str, window: int, sinks: int) -> float:
    """The error of the attention output of every fourth query, one query and head after the other."""
    total, k, v = 0.0, one.keys.transpose(0, 1), one.values.transpose(0, 1)
    turned = one.turn(k)
    other = stored.unflatten(1, (2, 64)).transpose(0, 1)
    if of_keys and rotary == "pre":
        other = one.turn(other)
    for t, head in product(range(0, 24, 4), range(4)):
        old = torch.tensor([sinks <= s <= t - window for s in range(t + 1)])[:, None]
        keys, values = turned[head // 2, : t + 1], v[head // 2, : t + 1]
        mixed = torch.where(old, other[head // 2, : t + 1], keys if of_keys else values)
        exact = (keys @ one.q[t, head] * SPEC.scale).softmax(0) @ values
        found = ((mixed if of_keys else keys) @ one.q[t, head] * SPEC.scale).softmax(0) @ (values if of_keys else mixed)
        total += float((found - exact).double().square().sum())
    return total


@pytest.mark.parametrize(("of_keys", "rotary"), [(True, "pre"), (True, "post"), (False, "pre")])
def test_losses_are_those_of_the_attention_output(of_keys: bool, rotary: str) -> None:
    one = sample(1)
    found = Extremes(128)
    source = one.values if not of_keys else one.keys
    if rotary == "post":
        source = one.turn(source.transpose(0, 1)).transpose(0, 1)
    flat = source.flatten(1)
    found.add(flat)
    search = ClipSearch(found.grouping(32, 64, torch.zeros(128)), 2, "e4m3", of_keys, rotary)
    search.add(one, window=4, sinks=2)
    for group, at in ((0, 0), (3, 10), (2, 5)):
        grouping = search.base
        clipped = type(grouping)(grouping.group, torch.full((4,), CLIPS[at]), grouping.unit, grouping.shift)
        stored = torch.where(grouping.group == group, rounded(flat, clipped, 2), flat)
        assert search.losses[group, at] == pytest.approx(naive(one, stored, of_keys, rotary, 4, 2), rel=1e-3)
    best = [CLIPS[i] for i in search.losses.argmin(1)]
    assert search.grouping().clip.tolist() == pytest.approx(best)


def test_among_equals_nothing_is_clipped() -> None:
    found, _ = extremes()
    search = ClipSearch(found.grouping(32, 64, torch.zeros(128)), 2, "e4m3", of_keys=False)
    assert search.grouping().clip.tolist() == [1.0] * 4
