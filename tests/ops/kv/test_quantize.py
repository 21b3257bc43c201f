"""Bounds of the rounding, that what is stored is what is computed with, and who sees a token stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold.cache.skvq.attend import Seen, attend, left_window
from tenfold.ops.kernels import AttentionSpec
from tenfold.ops.kv.packing import LEVELS
from tenfold.ops.kv.quantize import (
    Grouping,
    dequantize,
    from_bytes,
    plain,
    quantize,
    rounded,
    stored,
    to_bytes,
)

BITS = st.sampled_from([1.5, 2, 3, 4])
SEEDS = st.integers(0, 1 << 30)


def tokens(seed: int, count: int = 6, channels: int = 128) -> Tensor:
    """Numbers whose channels differ in size and offset, as keys do."""
    generator = torch.Generator().manual_seed(seed)
    size, offset = torch.rand(channels, generator=generator) * 4, torch.randn(channels, generator=generator)
    return torch.randn(count, channels, generator=generator) * size + offset


def shuffled(seed: int, channels: int = 128, group: int = 32) -> Grouping:
    generator = torch.Generator().manual_seed(seed)
    map_ = torch.randperm(channels, generator=generator) // group
    clip = torch.rand(channels // group, generator=generator) / 4 + 0.75
    unit = 2.0 ** torch.randint(-6, 3, (channels // group,), generator=generator)
    return Grouping(map_, clip, unit, torch.randn(channels, generator=generator))


@settings(deadline=None, max_examples=40)
@given(bits=BITS, seed=SEEDS)
def test_without_clipping_no_number_is_off_by_more_than_half_a_step_and_the_rounding_of_parameters(
    bits: float, seed: int
) -> None:
    x, grouping = tokens(seed), plain(128, 32)
    grouped = x.view(-1, 4, 32)
    lo, hi = grouped.amin(-1), grouped.amax(-1)
    scale, top = (hi - lo) / (LEVELS[bits] - 1), LEVELS[bits] - 1
    error = (rounded(x, grouping, bits).view_as(grouped) - grouped).abs().amax(-1)
    rounding = 2.0**-4  # relative, of a number with three bits behind the leading one; 2**-10 of a subnormal one
    bound = scale / 2 + (scale * top + lo.abs()) * rounding + (top + 1) * 2.0**-10 + 1e-5
    assert (error <= bound).all()
    exact = (rounded(x, grouping, bits, "fp16").view_as(grouped) - grouped).abs().amax(-1)
    assert (exact <= scale / 2 + (scale * top + lo.abs()) * 2.0**-11 + 1e-4).all()


@settings(deadline=None, max_examples=40)
@given(bits=BITS, seed=SEEDS, parameters=st.sampled_from(["e4m3", "fp16"]))
def test_what_is_stored_is_all_that_is_computed_with(bits: float, seed: int, parameters: str) -> None:
    x, grouping = tokens(seed), shuffled(seed)
    quantized = quantize(x, grouping, bits, parameters)
    back = from_bytes(*to_bytes(quantized, bits, 2), bits, 64, parameters)
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(dequantize(back, grouping), rounded(x, grouping, bits, parameters))


@settings(deadline=None, max_examples=40)
@given(bits=BITS, seed=SEEDS)
def test_a_token_is_stored_the_same_whoever_is_beside_it(bits: float, seed: int) -> None:
    x, grouping = tokens(seed), shuffled(seed)
    together = rounded(x, grouping, bits)
    assert torch.equal(together, rounded(x, grouping, bits))
    for t in range(len(x)):
        assert torch.equal(rounded(x[t : t + 1], grouping, bits)[0], together[t])


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS)
def test_groups_are_what_the_map_says(seed: int) -> None:
    """Permuting the channels and cutting neighbours is the same as the map."""
    x, grouping = tokens(seed), shuffled(seed)
    order = grouping.order.flatten()
    cut = Grouping(torch.arange(128) // 32, grouping.clip, grouping.unit, grouping.shift[order])
    assert torch.equal(rounded(x, grouping, 2)[:, order], rounded(x[:, order], cut, 2))


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, bits=BITS)
def test_a_shift_takes_a_constant_offset_away(seed: int, bits: float) -> None:
    x, grouping = tokens(seed), plain(128, 32)
    offset = torch.linspace(-64, 64, 128).round()  # exact sums
    x = (x * 256).round() / 256
    shifted = Grouping(grouping.group, grouping.clip, grouping.unit, offset)
    torch.testing.assert_close(rounded(x + offset, shifted, bits), rounded(x, grouping, bits) + offset)


def test_extremes() -> None:
    grouping = plain(64, 32)
    assert torch.equal(rounded(torch.zeros(2, 64), grouping, 2), torch.zeros(2, 64))
    assert torch.equal(rounded(torch.full((1, 64), 2.0), grouping, 1.5), torch.full((1, 64), 2.0))
    assert rounded(torch.full((1, 64), 1e6), grouping, 2).eq(448).all()
    assert rounded(torch.zeros(0, 64), grouping, 2).shape == (0, 64)
    assert stored(torch.tensor([1e9, -1e9]), "e4m3").float().tolist() == [448, -448]
    small = torch.linspace(-0.01, 0.01, 64)[None]
    finer = Grouping(grouping.group, grouping.clip, torch.full((2,), 2.0**-10), grouping.shift)
    assert (rounded(small, finer, 4) - small).abs().max() < (rounded(small, grouping, 4) - small).abs().max() / 4
    with pytest.raises(ValueError, match="cut into groups"):
        plain(96, 64)


@settings(deadline=None, max_examples=40)
@given(length=st.integers(1, 40), window=st.integers(0, 40), sinks=st.integers(0, 8))
def test_a_query_sees_stored_what_is_neither_sink_nor_in_its_window(length: int, window: int, sinks: int) -> None:
    old = left_window(torch.arange(length), length, window, sinks)
    for t in range(length):
        recent = set(range(max(0, t + 1 - window), t + 1))
        for s in range(t + 1):
            assert bool(old[t, s]) == (s not in recent and s >= sinks)
        assert int(old[t].sum()) == max(0, t + 1 - sinks - window)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, window=st.integers(0, 12), softcap=st.sampled_from([0.0, 5.0]), sliding=st.sampled_from([0, 5]))
def test_attention_is_that_of_each_query_by_itself(seed: int, window: int, softcap: float, sliding: int) -> None:
    count, spec = 12, AttentionSpec(4, 2, 8, 0.3, window=sliding, softcap=softcap)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 2, count, 8, generator=generator)
    k, v, stored_k, stored_v = (torch.randn(2, count, 8, generator=generator) for _ in range(4))
    old = left_window(torch.arange(count), count, window, 2)
    found = attend(q, torch.arange(count), k, v, Seen(stored_k, stored_v, old, old), spec)
    for t in range(count):
        first = max(0, t + 1 - sliding) if sliding else 0
        own_k, own_v = (torch.where(old[t][:, None], a, b)[:, first : t + 1] for a, b in ((stored_k, k), (stored_v, v)))
        scores = (q[:, :, t : t + 1] @ own_k[:, None].mT) * spec.scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        expected = scores.softmax(-1) @ own_v[:, None]
        torch.testing.assert_close(found[:, :, t : t + 1], expected, atol=1e-5, rtol=1e-5)
