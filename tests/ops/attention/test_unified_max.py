"""Which phi serves which rows: arithmetic on the host."""

import math

import pytest
import torch

from tenfold.ops.attention.unified_max import (
    BINS,
    STEP,
    choose_phi,
    guard,
    histogram,
    proven_phi,
    quantile,
    score_bound,
    served,
    visible_scores,
    window,
)
from tenfold.ops.kernels import AttentionSpec

TYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("length", [1, 1000, 1 << 17])
def test_every_row_maximum_in_the_window_gives_sums_that_are_served(dtype: torch.dtype, length: int) -> None:
    """For a row of equal scores, whose sum is the largest, and one with a single score that counts, the smallest."""
    safe, limits = window(dtype), guard(dtype)
    for top in (safe.low + 1e-3, safe.high - 1e-3):
        for count in (1, length):
            log_sum = (top + math.log(count)) / math.log(2)
            assert limits.least < log_sum
            assert log_sum < limits.most
        assert dtype != torch.float16 or math.exp(top) < 65504


def test_the_window_of_bfloat16_is_wide_and_that_of_float16_narrow() -> None:
    wide, narrow = window(torch.bfloat16), window(torch.float16)
    assert wide.low < -69
    assert wide.high > 57
    assert narrow.low > -3
    assert narrow.high < math.log(65504)
    assert window(torch.bfloat16, 1 << 10).high > wide.high


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_phi_leaves_equal_room_on_both_sides(dtype: torch.dtype) -> None:
    low, high, safe = torch.tensor([-5.0, 300.0]), torch.tensor([3.0, 304.0]), window(dtype)
    phi = choose_phi(low, high, safe)
    torch.testing.assert_close(low - (phi + safe.low), (phi + safe.high) - high, atol=1e-3, rtol=0)
    assert served(low, high, phi, safe).all()
    assert not served(low, high + safe.width, phi, safe).any()
    assert served(low, high, phi + 200, safe).sum() == 0


def test_quantiles_bracket_the_values() -> None:
    values = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * 20
    values[1] = float("-inf")
    values[1, 0] = 1e9
    counts = histogram(values)
    assert counts.sum(1).tolist() == [5000, 1, 5000]
    for share in (0.001, 0.5, 0.999):
        exact = torch.quantile(values[0], share, interpolation="lower")
        assert exact - STEP <= quantile(counts, share, upper=False)[0] <= exact + 2e-2
        assert exact - 2e-2 <= quantile(counts, share, upper=True)[0] <= exact + STEP
    assert quantile(counts, 1.0, upper=True)[1] == BINS // 2 * STEP


@pytest.mark.parametrize("rules", [{}, {"window": 3}, {"softcap": 2.0}], ids=str)
def test_visible_scores(rules: dict[str, float]) -> None:
    spec = AttentionSpec(2, 1, 4, 0.7, **rules)
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(6, 2, 4, generator=generator), torch.randn(6, 4, generator=generator)
    found = visible_scores(q, k, spec)
    for g in range(2):
        for t in range(6):
            for s in range(6):
                x = 0.7 * float(q[t, g] @ k[s])
                if spec.softcap:
                    x = 2 * math.tanh(x / 2)
                hidden = s > t or (spec.window and s <= t - 3)
                assert found[g, t, s] == pytest.approx(float("-inf") if hidden else x, abs=1e-5)


def test_no_score_of_normed_heads_exceeds_the_bound() -> None:
    spec = AttentionSpec(2, 1, 16, 0.25)
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(2, 16, generator=generator)
    bound = score_bound(spec, weights[0], weights[1])
    x = torch.randn(2, 500, 16, generator=generator) ** 3
    normed = x / x.pow(2).mean(-1, keepdim=True).sqrt() * weights[:, None]
    scores = spec.scale * normed[0] @ normed[1].T
    assert scores.abs().max() <= bound < 60 * scores.abs().max()
    assert score_bound(spec) == math.inf
    assert score_bound(spec, weights[0]) == math.inf
    assert score_bound(AttentionSpec(2, 1, 16, 0.25, softcap=0.1), *weights) == 0.1


def test_a_bound_proves_phi_where_the_window_is_wide_enough() -> None:
    phi = proven_phi(50.0, 3, torch.bfloat16)
    assert phi is not None
    bounds = torch.full((3,), 50.0)
    assert served(-bounds, bounds, phi, window(torch.bfloat16)).all()
    assert proven_phi(50.0, 3, torch.float16) is None
    assert proven_phi(math.inf, 3, torch.bfloat16) is None
