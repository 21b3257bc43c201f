"""Norms, embedding, argmax and the functions they are made of, against float64 torch."""

import math

import pytest
import torch

from tenfold.ops.cpu import lib
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix


def rms(x, norm):
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.double()


@pytest.mark.parametrize("rows", [0, 1, 3, 100])
@pytest.mark.parametrize("cols", [1, 7, 16, 100, 576, 1000])
def test_norm(isa, native, rows, cols):
    norm = Norm(torch.randn(cols), 1e-5)
    x, y = torch.randn(rows, cols) * 3, torch.randn(rows, cols)
    torch.testing.assert_close(native.norm(x, norm).double(), rms(x, norm), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(native.add_norm(x, y, norm).double(), x + rms(y, norm), rtol=2e-6, atol=1e-6)


def test_norm_of_heads_keeps_the_shape(native):
    norm, x = Norm(torch.ones(8), 1e-5), torch.randn(3, 4, 8)
    assert native.norm(x, norm).shape == x.shape
    torch.testing.assert_close(native.norm(x, norm).double(), rms(x, norm), rtol=2e-6, atol=1e-6)


def test_norm_of_zeros_and_large_numbers(isa, native):
    norm = Norm(torch.ones(20), 1e-6)
    assert (native.norm(torch.zeros(2, 20), norm) == 0).all()
    assert torch.allclose(native.norm(torch.full((1, 20), 1e15), norm), torch.ones(1, 20))


def test_a_row_has_the_same_bits_in_any_batch(isa, native):
    norm, x = Norm(torch.randn(333), 1e-5), torch.randn(64, 333)
    want = torch.cat([native.norm(row[None], norm) for row in x])
    for threads in (1, 2, 5):
        lib.set_threads(threads)
        assert torch.equal(native.norm(x, norm), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cols", [1, 13, 64])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_embed_dense(isa, native, dtype, cols, scale):
    table = torch.randn(50, cols).to(dtype)
    matrix = Matrix("dense", 50, cols, (table,))
    for ids in (torch.empty(0, dtype=torch.int64), torch.tensor([49]), torch.randint(0, 50, (300,))):
        assert torch.equal(native.embed(ids, matrix, scale), table[ids].float() * scale)


def test_widening_is_exact_for_every_half(isa, native):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        table = bits.view(dtype).view(1024, 64)
        got = native.embed(torch.arange(1024), Matrix("dense", 1024, 64, (table,)))
        torch.testing.assert_close(got, table.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 15), (3, 16), (2, 1000), (3, 49152), (1, 16384), (2, 16385)])
def test_argmax(isa, native, shape):
    x = torch.randn(shape)
    assert torch.equal(native.argmax(x), x.argmax(-1))


def test_argmax_takes_the_first_of_equals(isa, native):
    x = torch.zeros(1, 40000)
    assert native.argmax(x).item() == 0
    x[0, 39999] = x[0, 17000] = x[0, 123] = 1.0
    assert native.argmax(x).item() == 123
    x[0, 39999] = 2.0
    assert native.argmax(x).item() == 39999


def test_argmax_of_infinities(isa, native):
    x = torch.full((2, 100), -math.inf)
    x[1, 37] = math.inf
    assert native.argmax(x).tolist() == [0, 37]


def test_exp_is_accurate(isa, native):
    x = torch.cat((torch.linspace(-87.3, 88.0, 200001), torch.linspace(-1, 1, 100001)))
    want = x.double().exp()
    assert ((native.map(x, "exp").double() - want) / want).abs().max() < 2.5e-7  # two units in the last place
    assert native.map(torch.zeros(3), "exp").tolist() == [1.0, 1.0, 1.0]
    assert native.map(torch.tensor([-math.inf, -200.0, -87.4]), "exp").tolist() == [0.0, 0.0, 0.0]
    assert native.map(torch.tensor([math.nan]), "exp").isnan().all()


def test_tanh_is_accurate(isa, native):
    x = torch.cat((torch.linspace(-12, 12, 200001), torch.linspace(-1e-3, 1e-3, 1001)))
    want = x.double().tanh()
    assert ((native.map(x, "tanh").double() - want).abs() <= 3e-7 * want.abs()).all()
    assert native.map(torch.tensor([-math.inf, -90.0, 0.0, 90.0, math.inf]), "tanh").tolist() == [
        -1.0,
        -1.0,
        0.0,
        1.0,
        1.0,
    ]


def test_wrong_inputs_are_refused(native):
    norm = Norm(torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match="float32"):
        native.norm(torch.randn(2, 8).half(), norm)
    with pytest.raises(ValueError, match="contiguous"):
        native.norm(torch.randn(8, 2).T, norm)
    with pytest.raises(ValueError, match="width of the norm"):
        native.norm(torch.randn(2, 9), norm)
    with pytest.raises(ValueError, match="equal"):
        native.add_norm(torch.randn(2, 8), torch.randn(3, 8), norm)
    with pytest.raises(ValueError, match="int64"):
        native.embed(torch.zeros(2, dtype=torch.int32), Matrix("dense", 4, 2, (torch.zeros(4, 2),)))
    with pytest.raises(ValueError, match="at least 1"):
        native.argmax(torch.empty(2, 0))
