"""Tokens rounded to float8, emulated: every bit of the codes in all three orders of columns, with picks and norms."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.ops.gpu import nvrtc, quantize
from tenfold.ops.kernels import Norm
from tests.ops.gpu.emulated import Emulator
from tests.ops.gpu.emulated_cases import MARKS, normal
from tests.ops.gpu.test_w4a8 import column

pytestmark = [*MARKS, pytest.mark.usefixtures("poisoned")]
EPS = 1e-5
BFLOAT, HALF = torch.bfloat16, torch.float16
SIZES = [(1, 8, BFLOAT), (3, 416, BFLOAT), (2, 2048, BFLOAT), (2, 2056, HALF), (3, 2080, HALF), (1, 4096, HALF)]


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(nvrtc, "load", Emulator(folder))


def inputs(tokens: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Of sizes far apart, tokens and columns; where there are several the second is zero."""
    x = normal(tokens, cols) * 8.0 ** normal(tokens, 1, seed=1) * 4.0 ** normal(cols, seed=2)
    x[1:2] = 0
    return x.to(dtype)


def expected(x: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """Codes, float8 [T, cols], and scales [T]: operations in float32, each rounded once."""
    values = x.float() if norm is None else x.float() * norm.weight
    largest = values.abs().amax(1)
    inverse = torch.where(largest > 0, torch.full_like(largest, 448) / largest, 0)
    scales = largest / 448
    if norm is not None:
        scales = scales * torch.rsqrt(x.float().square().mean(1) + norm.eps)
    return (values * inverse[:, None]).to(torch.float8_e4m3fn), scales


def in_tiles(codes: Tensor) -> Tensor:
    """Codes [T, cols] with every sixteen columns as a lane has those of a tile."""
    places = torch.tensor([2 * (p // 4) + 8 * (p % 2) + p // 2 % 2 for p in range(16)])
    assert sorted(places.tolist()) == list(range(16))
    return codes.view(torch.uint8).unflatten(1, (-1, 16))[:, :, places].flatten(1).view(codes.dtype)


def check(got: Tensor, scales: Tensor, wanted: Tensor, sizes: Tensor) -> None:
    assert torch.equal(got.float(), wanted.float())
    torch.testing.assert_close(scales, sizes, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("tokens", "cols", "dtype"), SIZES)
def test_columns_as_they_come(tokens: int, cols: int, dtype: torch.dtype) -> None:
    x = inputs(tokens, cols, dtype)
    norm = Norm(normal(cols, seed=3), EPS) if dtype == HALF else None
    check(*quantize.quantize(x, norm), *expected(x, norm))


def test_tokens_of_next_to_nothing_are_zeros() -> None:
    """448 divided by their largest number is infinite, and zeros times that are no numbers."""
    x = torch.zeros(2, 64, dtype=BFLOAT)
    x[0, 3] = 1e-37
    x[1, 3] = 1e-34
    codes, scales = quantize.quantize(x)
    assert codes.float()[:, 3].tolist() == [0, 448]
    assert codes.float().count_nonzero() == 1
    assert scales.isfinite().all()


@pytest.mark.parametrize("cols", [16, 624, 2048])
@pytest.mark.parametrize("picked", [False, True])
def test_columns_for_tiles(cols: int, picked: bool) -> None:
    """Of every sixteen, for all tokens or for picks in an order, three of a token."""
    x = inputs(3, cols, BFLOAT)
    order = torch.tensor([7, 2, 0, 5, 8], dtype=torch.int32) if picked else None
    codes, scales = expected(x if order is None else x[(order // 3).long()], None)
    check(*quantize.for_tiles(x, order, 3), in_tiles(codes), scales)


@pytest.mark.parametrize(("tokens", "cols", "dtype"), SIZES)
def test_columns_for_nibbles(tokens: int, cols: int, dtype: torch.dtype) -> None:
    """Of every 128, filled up with zeros, and the sums of codes."""
    x = inputs(tokens, cols, dtype)
    norm = Norm(normal(cols, seed=3), EPS) if dtype == HALF else None
    codes, scales = expected(x, norm)
    whole = F.pad(codes.float(), (0, -cols % 128)).unflatten(1, (-1, 128))
    got, numbers = quantize.for_nibbles(x, norm)
    check(got, numbers[:, 0], whole[:, :, [column(p) for p in range(128)]].flatten(1), scales)
    sums, most = codes.double().sum(1), codes.double().abs().sum(1)
    assert ((numbers[:, 1] - sums).abs() <= 1e-6 * most).all()
