"""The compiled linear operation: formats, arms and instruction sets against float64, the same bits however it runs."""

import pytest
import torch
import torch.nn.functional as F

from tenfold.ops.blocks import BLOCKS
from tenfold.ops.cpu import lib, pack
from tenfold.ops.cpu.arms import ARMS
from tenfold.ops.kernels import Norm
from tests.ops.cpu.weights import DENSE, STORAGES, numbers, random_weight, width

BATCHES = (0, 1, 2, 3, 5, 8, 17, 64, 130)
QUANTISED = [s for s in STORAGES if s not in DENSE]


@pytest.fixture(autouse=True)
def the_same_inputs():
    """In every run: a bound that roundings come near to is kept or it is not."""
    torch.manual_seed(1)


def quantised(x):
    """x as the kernels see it: int8 times a float32 scale for each 32 columns, in float64."""
    blocks = x.view(len(x), -1, 32)
    top = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(top, 127) / top  # not 127 / top: torch makes that a product with the reciprocal
    codes = torch.round(blocks * torch.where(top > 0, inverse, 0))
    return (codes.double() * (top * (1 / 127)).double()).view(x.shape)


def run(native, x, matrix, arm="", **options):
    """One call with a given arm ("": the rule's)."""
    matrix.arms.clear()
    if arm:
        matrix.arms[len(x)] = ARMS.index(arm)
    return native.linear(x, matrix, **options)


def spread(x, w):
    """For each output the sum of |terms|: rounding errors are proportional to it, cancellation or not."""
    return x.abs() @ w.abs().T


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("storage", STORAGES)
def test_every_format_arm_and_instruction_set(isa, native, storage, arm):
    raw = random_weight(storage, 37, width(storage, 3))
    x, w = torch.randn(21, raw.shape[1]), numbers(raw)
    used = x.double() if storage in DENSE else quantised(x)
    got = run(native, x, pack.pack([raw]), arm).double()
    # float32 accumulation over at most 24 blocks or 101 columns, each rounded by 6e-8 of a partial sum; formats with
    # minima add codes times scale and minimum apart, which are several times the value
    assert ((got - used @ w.T).abs() <= 1e-5 * spread(used, w)).all()


@pytest.mark.parametrize("storage", QUANTISED)
def test_int8_activations_cost_less_than_one_percent(native, storage):
    raw = random_weight(storage, 64, 1024)
    x, w = torch.randn(8, 1024), numbers(raw)
    want = x.double() @ w.T
    error = run(native, x, pack.pack([raw])).double() - want
    # rounding to steps of max/127 of a block of 32: 0.65 % of a normal activation; Q2_K's minima add up in `want` too
    assert error.norm() < 0.01 * spread(x.double().square(), w.square()).sqrt().norm()


def test_dense_rows_are_accurate_to_float32(isa, native):
    raw = random_weight("F32", 20, 5000)
    x, w = torch.randn(3, 5000), numbers(raw)
    got, want = run(native, x, pack.pack([raw])).double(), x.double() @ w.T
    ours, torchs = (got - want).norm(), (F.linear(x, raw.data).double() - want).norm()
    assert ours <= 4 * torchs + 1e-6 * want.norm()


@pytest.mark.parametrize("storage", ["Q4_0", "Q4_1", "Q8_0", "Q6_K", "Q4_K", "F32", "BF16"])
def test_an_output_has_the_same_bits_however_it_is_computed(isa, native, storage):
    raw = random_weight(storage, 50, width(storage, 2))
    matrix, norm = pack.pack([raw]), Norm(torch.rand(raw.shape[1]) + 0.5, 1e-5)
    x = torch.randn(130, raw.shape[1])
    want = torch.cat([run(native, row[None], matrix, "gemv", norm=norm) for row in x])
    for threads in (1, 3):
        lib.set_threads(threads)
        for batch in BATCHES:
            for arm in ("", *ARMS):
                assert torch.equal(run(native, x[:batch], matrix, arm, norm=norm), want[:batch]), (threads, batch, arm)
    assert torch.equal(run(native, x[71:90].contiguous(), matrix, norm=norm), want[71:90])


@pytest.mark.parametrize("arm", ARMS)
def test_large_operations_are_cut_into_units_without_gaps(isa, native, arm):
    raw = random_weight("Q4_1", 1000, 2048)
    matrix, x = pack.pack([raw]), torch.randn(70, 2048)
    want = torch.cat([run(native, row[None], matrix) for row in x[::7]])
    assert torch.equal(run(native, x, matrix, arm)[::7], want)


def gated(y, act):
    gate, up = y.chunk(2, -1)
    return (F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")) * up


def expected(x, w, bias, norm, act, residual):
    x = x.double()
    if norm:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.double()
    y = x @ w.T
    y = y if bias is None else y + bias.double()
    y = gated(y, act) if act else y
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("act", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
def test_norm_bias_gate_and_residual(isa, native, act, with_bias, with_residual, with_norm):
    parts, cols = [random_weight("F32", 21, 45, i) for i in range(2)], 45
    x = torch.randn(6, cols)
    bias = torch.randn(42) if with_bias else None
    residual = torch.randn(6, 21 if act else 42) if with_residual else None
    norm = Norm(torch.rand(cols), 1e-4) if with_norm else None
    want = expected(x, numbers(*parts), bias, norm, act, residual)
    got = run(native, x, pack.pack(parts), bias=bias, norm=norm, act=act, residual=residual)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "heights",
    [
        [(16, "F32"), (16, "BF16")],
        [(35, "F16"), (35, "F32")],
        [(64, "F32")],
        [(70, "F32")],
        [(9, "F32"), (30, "F32"), (1, "F32")],
    ],
    ids=["two formats", "padded tiles", "one tensor", "one tensor, no tile edge", "three tensors"],
)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_gate_and_up_may_be_stacked_in_any_way(isa, native, heights, act):
    parts = [random_weight(storage, rows, 40, rows) for rows, storage in heights]
    rows = sum(h for h, _ in heights)
    x, bias, residual = torch.randn(19, 40), torch.randn(rows), torch.randn(19, rows // 2)
    want = expected(x, numbers(*parts), bias, None, act, residual)
    for arm in ARMS:
        got = run(native, x, pack.pack(parts), arm, bias=bias, act=act, residual=residual)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)


def test_gates_saturate_without_nans(isa, native):
    raw = random_weight("F32", 32, 1)
    raw.data.fill_(1.0)
    x = torch.tensor([[-1e4], [-200.0], [-88.0], [0.0], [88.0], [200.0]])
    got = run(native, x, pack.pack([raw]), act="silu")
    torch.testing.assert_close(got, F.silu(x.double()).mul(x).float().expand(6, 16), rtol=1e-6, atol=1e-30)


def test_stacked_formats_share_one_call(isa, native):
    parts = [random_weight(s, n, 256, n) for s, n in (("Q4_K", 33), ("Q6_K", 18), ("F32", 7), ("Q8_0", 40))]
    x, matrix = torch.randn(20, 256), pack.pack(parts)
    alone = torch.cat([run(native, x, pack.pack([part])) for part in parts], dim=1)
    for arm in ARMS:
        assert torch.equal(run(native, x, matrix, arm), alone)


@pytest.mark.parametrize(
    ("storage", "codes"), [("Q4_0", slice(2, 18)), ("Q8_0", slice(2, 34)), ("Q5_K", slice(16, 176))]
)
def test_zeros_and_extreme_codes(isa, native, storage, codes):
    raw = random_weight(storage, 24, 256)
    blocks = raw.data.view(24, -1, BLOCKS[storage].nbytes)
    blocks[:8, :, codes] = 0x80  # the most negative 8-bit code, where |code| does not fit int8
    blocks[8:16, :, codes] = 0x7F
    blocks[16:, :, codes] = 0xFF  # the largest sums of 4- and 5-bit codes
    x = torch.cat([torch.zeros(1, 256), torch.full((1, 256), 3.0), torch.full((1, 256), -3.0)])
    got = run(native, x, pack.pack([raw])).double()
    want = x.double() @ numbers(raw).T
    assert (got[0] == 0).all()
    assert ((got - want).abs() <= 1e-5 * spread(x.double(), numbers(raw))).all()
