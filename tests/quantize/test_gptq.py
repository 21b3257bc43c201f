"""Schemes and GPTQ: what rounding gives back, that errors are made up for, and inputs that never were."""

import pytest
import torch
from torch import Tensor

from tenfold.quantize.gptq import Moments, gptq, loss_of
from tenfold.quantize.schemes import SHRINKS, WIDE, Scheme, grid_of, parse, round_activations, round_to_nearest

SCHEMES = ["w1g32z", "w2g32z", "w3g32z", "w4g32z", "w4g32", "w8", "w4"]


def weights(rows: int = 24, cols: int = 96, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int = 400, cols: int = 96, seed: int = 1) -> Tensor:
    """Features that go together, some of them large."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, cols, generator=draw) @ (0.4 * torch.randn(cols, cols, generator=draw))
    return mixed * torch.rand(cols, generator=draw).exp()


def moments(x: Tensor) -> Tensor:
    found = Moments(x.shape[1])
    for part in x.split(150):
        found.add(part)
    return found.mean()


@pytest.mark.parametrize("name", [*SCHEMES, "w8a8", "w4g128a8"])
def test_names(name: str) -> None:
    assert str(parse(name)) == name


@pytest.mark.parametrize("wrong", ["w0", "w9", "4", "w4g0", "w4a4", "w4zg32", ""])
def test_what_is_no_scheme_says_what_is(wrong: str) -> None:
    with pytest.raises(ValueError, match="w1 to w8"):
        parse(wrong)


def test_bits_count_scales_and_zeros() -> None:
    assert parse("w4g128z").stored_bits(4096) == 4.25
    assert parse("w4g128").stored_bits(4096) == 4.125
    assert parse("w8").stored_bits(2048) == 8 + 16 / 2048


@pytest.mark.parametrize("name", SCHEMES[1:])
def test_rounding_stays_within_half_a_step_and_keeps_to_its_levels(name: str) -> None:
    scheme, w = parse(name), weights()
    rounded, grid = round_to_nearest(w, scheme, WIDE), grid_of(w, scheme, WIDE)
    group = scheme.group or w.shape[1]
    steps = grid.scales.repeat_interleave(group, dim=1)
    slack = 1.02 if scheme.zero else 1.0  # scales and zeros are rounded too
    assert ((w - rounded).abs() <= 0.5 * slack * steps + 0.01 * steps * (1 << scheme.bits) * scheme.zero).all()
    for row in rounded.view(len(w), -1, group).flatten(0, 1):
        assert len(row.unique()) <= 1 << scheme.bits
    assert torch.equal(round_to_nearest(rounded, scheme, WIDE), rounded) or scheme.zero
    assert (w - round_to_nearest(w, scheme)).square().sum() <= (w - rounded).square().sum()


def test_few_bits_gain_much_from_a_narrower_range() -> None:
    w = weights()
    for name, gain in (("w2g32z", 0.9), ("w4", 0.95)):
        narrow, wide = (round_to_nearest(w, parse(name), by) for by in (SHRINKS, WIDE))
        assert (w - narrow).square().sum() < gain * (w - wide).square().sum()


def test_one_bit_is_the_mean_plus_and_minus_a_distance() -> None:
    w = weights() + 0.5
    rounded = round_to_nearest(w, parse("w1g32z"))
    for row, own in zip(rounded.view(-1, 32), w.view(-1, 32)):
        assert len(row.unique()) == 2
        assert float(row.unique().mean()) == pytest.approx(float(own.mean()), abs=5e-3)
    assert (w - rounded).square().mean() < 0.6


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("name", SCHEMES)
def test_errors_are_made_up_for(name: str, order: bool) -> None:
    w, by = weights(), moments(inputs())
    scheme = parse(name)
    found = gptq(w, by, scheme, order)
    assert loss_of(w, found, by) < 0.8 * loss_of(w, round_to_nearest(w, scheme), by)
    group = scheme.group or w.shape[1]
    for row in found.view(len(w), -1, group).flatten(0, 1):
        assert len(row.unique()) <= 1 << scheme.bits
    assert torch.equal(found, gptq(w, by, scheme, order))


def test_inputs_that_have_nothing_in_common_change_nothing() -> None:
    w, scheme = weights(), parse("w4g32z")
    assert torch.allclose(gptq(w, torch.eye(96), scheme), round_to_nearest(w, scheme), atol=1e-6)
    assert torch.allclose(gptq(w, torch.zeros(96, 96), scheme), round_to_nearest(w, scheme), atol=1e-6)


def test_features_that_never_were_do_no_harm() -> None:
    x = inputs()
    x[:, 10:20] = 0.0
    w, by, scheme = weights(), moments(x), parse("w3g32z")
    found = gptq(w, by, scheme)
    assert torch.isfinite(found).all()
    assert loss_of(w, found, by) < loss_of(w, round_to_nearest(w, scheme), by)


def test_the_size_of_inputs_does_not_matter_beside_features_that_never_were() -> None:
    """Moments of small inputs are far below 1, and damping is a share of their mean."""
    x, w, scheme = inputs(), weights(), parse("w3g32z")
    x[:, 10:20] = 0.0
    large, small = moments(x), moments(x / 256)
    assert loss_of(w, gptq(w, small, scheme), large) < 1.05 * loss_of(w, gptq(w, large, scheme), large)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e38])
def test_moments_that_are_not_finite_are_refused(wrong: float) -> None:
    """Also where it is their mean that has no number."""
    with pytest.raises(
        ValueError, match=r"moments of a matrix's inputs are not finite; allowed: finite numbers\. Check"
    ):
        gptq(weights(), torch.full((96, 96), wrong), parse("w4g32z"))


def test_few_inputs_lean_on_those_of_others() -> None:
    x, few = inputs(), inputs(3, seed=5)
    others, own = moments(x), Moments(96)
    own.add(few)
    shrunk = own.shrunk(others, 100)
    assert torch.allclose(shrunk, (own.sums + others * 100) / 103)
    assert torch.allclose(Moments(96).shrunk(others, 100), others)
    w, scheme = weights(), Scheme(3, 32, True)
    leaning, alone = gptq(w, shrunk, scheme), gptq(w, own.mean(), scheme)
    assert loss_of(w, leaning, others) < loss_of(w, alone, others)


def test_weighted_inputs_count_as_often() -> None:
    x = inputs(50)
    twice, weighted = Moments(96), Moments(96)
    twice.add(torch.cat([x, x[:20]]))
    weighted.add(x, torch.tensor([2.0] * 20 + [1.0] * 30))
    assert torch.allclose(twice.sums, weighted.sums, rtol=1e-4, atol=1e-2)


def test_activations_are_rounded_token_by_token() -> None:
    """To the nearest of float8 e4m3, with the largest of a token as its largest number."""
    x = inputs(20)
    x[3] = 0
    x[4] = 0
    x[4, 5] = 1e-37
    for name in ("w4a8", "fp8a8"):
        rounded, largest = round_activations(x, parse(name)), x.abs().amax(-1, keepdim=True)
        numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        numbers = numbers[numbers.isfinite()]
        apart = (x[..., None] - numbers * (largest / 448)[..., None]).abs().amin(-1)
        assert torch.allclose((x - rounded).abs(), apart, atol=1e-6)
        assert torch.equal(rounded[3], x[3])
        assert not rounded[4].any()
    assert torch.equal(round_activations(x, parse("w4")), x)


def test_groups_that_do_not_divide_the_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="divisors"):
        round_to_nearest(weights(), parse("w4g64"))
