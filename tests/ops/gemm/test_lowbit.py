"""Kernels on packed weights under Triton's interpreter, against float64 products of the unpacked weight.

float16 keeps 11 bits. A result is rounded once: 2^-11 of its size. Where scales multiply weights these are rounded too,
each by up to 2^-11, which a sum of n products feels as 2^-11 of the root of the sum of their squares. Sums of float32
are exact beside that.
"""

import pytest
import torch
from torch import Tensor

from tenfold.ops.blocks import quantize
from tenfold.ops.formats import FP8_MAX, Packed, format_of, packed_of, stack, unpack
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix, RawTensor
from tenfold.ops.oracle import Oracle

lowbit = pytest.importorskip("tenfold.ops.gemm.lowbit")
LowbitPlan = lowbit.LowbitPlan

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu_lowbit.py runs these on the GPU")

FORMATS = [
    *("int1g32z", "int1g128z", "int2", "int2g32z", "int3", "int3g64z", "int4", "int4g32", "int4g128", "int4g128z"),
    *("int8", "int8g64", "int8g128z", "fp8", "fp8g128", "fp8a8"),
]
HALF = 2**-11


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight(name: str, rows: int, cols: int, order: bool = False) -> Matrix:
    raw = quantize(RawTensor("w", "F32", (rows, cols), random(rows, cols, seed=rows, dtype=torch.float32) / 16), name)
    if order:
        places = torch.randperm(cols, generator=torch.Generator().manual_seed(3)).to(torch.int32)
        name = name + "o"
        raw = RawTensor("w", name, raw.shape, raw.data, (*raw.extras, places))
    return stack([raw], "cpu")


def assert_close(got: Tensor, x: Tensor, w: Matrix, bias: Tensor | None, roundings: float = 1.0) -> None:
    """roundings: of weights and tokens, in units of 2^-11, that the sums feel beside the one of the result."""
    dense, tokens = unpack(w).double(), x.double()
    wanted = tokens @ dense.T + (0 if bias is None else bias.double())
    spread = (tokens.square() @ dense.T.square()).sqrt()
    assert got.shape == wanted.shape
    assert ((got.double() - wanted).abs() <= HALF * (wanted.abs() + 4 * roundings * spread) + 1e-6).all()


@pytest.mark.parametrize(("name", "order"), [*((name, False) for name in FORMATS), ("int4g64z", True), ("int8", True)])
def test_every_format(name: str, order: bool) -> None:
    """Ragged rows, ragged columns with part of a group at the end, one token and a few, one and several splits."""
    cols = {1: 384, 2: 192, 3: 384}.get(format_of(name).bits, 160)
    w, bias = weight(name, 24, cols, order), random(24, seed=5, dtype=torch.float32)
    for tokens, plan in (
        (1, LowbitPlan("fused", 16, 64, 16, 3)),
        (19, LowbitPlan("fused", 32, 256 if cols == 384 else 128, 16, 1)),
        (3, LowbitPlan("dense")),
    ):
        x = random(tokens, cols, seed=tokens)
        assert_close(lowbit.lowbit_linear(x, w, bias, plan=plan), x, w, bias)
        if tokens == 1:
            assert_close(lowbit.lowbit_linear(x, w, plan=plan), x, w, None)


@pytest.mark.parametrize("cols", [128, 64 + 32])
def test_whole_tiles_and_one_row(cols: int) -> None:
    w, x = weight("int4g32", 1, cols), random(2, cols)
    assert_close(lowbit.lowbit_linear(x, w, plan=LowbitPlan("fused", 16, 32, 16)), x, w, None)


def test_more_splits_than_tiles_and_no_tokens() -> None:
    w, x = weight("int4g32", 20, 96), random(3, 96)
    workspace = lowbit.Workspace(torch.device("cpu"))
    plan = LowbitPlan("fused", 16, 32, 16, 8)
    first = lowbit.lowbit_linear(x, w, plan=plan, workspace=workspace)
    assert_close(first, x, w, None)
    # The memory is as it was: counters at zero, whatever the sums.
    assert not workspace.counters.any()
    workspace.sums.fill_(float("nan"))
    assert torch.equal(lowbit.lowbit_linear(x, w, plan=plan, workspace=workspace), first)
    assert lowbit.lowbit_linear(x[:0], w).shape == (0, 20)


def test_every_code_becomes_its_number() -> None:
    """Rows of the unit matrix read the weight out: all codes of each kind, exactly, through both kernels."""
    for name in ("int1g64z", "int2", "int3g32", "int4g32", "int8", "fp8"):
        w, known = weight(name, 16, 256), format_of(name)
        if known.bits < 8:
            codes = torch.arange(16 * 256).view(16, 256) + torch.arange(16)[:, None]
            w.data[0].copy_(known.codes.store(codes % (1 << known.bits)))
        else:
            codes = torch.arange(256, dtype=torch.uint8).repeat(16, 1)
            codes[codes & 127 == 127] = 0  # float8 has no number there
            w.data[0].view(torch.uint8).copy_(codes)
        w.data[1].fill_(1.0)
        eye = torch.eye(256, dtype=torch.float16)
        for plan in (LowbitPlan("fused", 16, 64, 64), LowbitPlan("dense")):
            assert torch.equal(lowbit.lowbit_linear(eye, w, plan=plan), unpack(w).T.half()), (name, plan)


@pytest.mark.parametrize("name", ["int1g128z", "int1g32z", "int2g32z", "int3g64z", "int4g128z", "int8g64z"])
def test_zeros_may_be_fractions(name: str) -> None:
    """Unpacked they are the oracle's to the bit. Those of one bit cost a product nothing."""
    w, x = weight(name, 24, 384), random(3, 384)
    zeros = w.data[2]
    zeros.add_(random(*zeros.shape, seed=8) / 4)
    packed, format = packed_of(w), format_of(name)
    half = lowbit.unpack_on_device(packed, format, 24, 384, torch.float16)
    assert torch.equal(half, format.unpack(packed, torch.float16))
    plan = LowbitPlan("fused", 16, 32, 16, 3)
    assert lowbit.scaling(plan, format) == lowbit.SUMS
    assert lowbit.zeroing(format) == (lowbit.FROM_SUMS if name.startswith("int1") else lowbit.FROM_CODES)
    got = lowbit.lowbit_linear(x, w, plan=plan)
    assert_close(got, x, w, None, roundings=0.0 if name.startswith("int1") else 1.0)


@pytest.mark.parametrize(("tokens", "cols"), [(1, 32), (3, 352), (2, 9000)])
def test_tokens_are_rounded_to_float8(tokens: int, cols: int) -> None:
    x = random(tokens, cols)
    x[0, 3] = 3000.0
    codes, scales = lowbit.quantize_tokens(x)
    assert torch.equal(scales, x.float().abs().amax(dim=1) / FP8_MAX)
    numbers = codes.float() * scales[:, None]
    bound = torch.maximum(x.float().abs() / 16, scales[:, None] * 2**-10) * 1.001
    # The interpreter loses a carry into the exponent and cuts small numbers off; what a GPU does is tested there.
    assert ((numbers - x.float()).abs() <= bound).float().mean() > 0.9
    zeros = lowbit.quantize_tokens(torch.zeros(2, 32, dtype=torch.float16))
    assert not zeros[0].float().any()


def test_tokens_of_next_to_nothing_are_zeros_in_float8() -> None:
    """The inverse of their scale is infinite, and zeros times that are no numbers."""
    x = torch.zeros(2, 32, dtype=torch.bfloat16)
    x[0, 3], x[1, 3] = 1e-37, 1e-34
    codes, scales = lowbit.quantize_tokens(x)
    assert codes.float()[:, 3].tolist() == [0, 448]
    assert codes.float().count_nonzero() == 1
    assert scales.isfinite().all()


@pytest.mark.parametrize("name", ["fp8a8", "fp8g128a8"])
def test_float8_meets_float8(name: str) -> None:
    """Against the same rounded tokens; products of float8 are exact, sums are of float32."""
    w, x, bias = weight(name, 24, 160), random(5, 160), random(24, seed=7, dtype=torch.float32)
    codes, scales = lowbit.quantize_tokens(x)
    rounded = codes.double() * scales[:, None].double()
    for splits in (1, 3):
        got = lowbit.lowbit_linear(x, w, bias, plan=LowbitPlan("fp8", 16, 64, 16, splits))
        assert_close(got, rounded, w, bias)


def test_tokens_may_be_rounded_before() -> None:
    """Their norm is then in the numbers that are given, and x itself is not read."""
    w, x, plan = weight("fp8g128a8", 24, 160), random(5, 160), LowbitPlan("fp8", 16, 64, 16)
    norm = Norm(random(160, seed=2, dtype=torch.float32).abs() + 0.5, 1e-5)
    wanted = lowbit.linear(x, w, norm=norm, plan=plan)
    rounded = lowbit.quantize_tokens(lowbit.elementwise.norm(x, norm))
    assert lowbit.rounds(plan)
    assert not lowbit.rounds(LowbitPlan("dense"))
    assert torch.equal(lowbit.linear(torch.full_like(x, torch.nan), w, norm=norm, plan=plan, rounded=rounded), wanted)


def test_the_whole_operation_is_that_of_the_oracle() -> None:
    w, x, oracle = weight("int4g32", 64, 96), random(3, 96), Oracle()
    norm, bias = (
        Norm(random(96, seed=2, dtype=torch.float32).abs() + 0.5, 1e-5),
        random(64, seed=3, dtype=torch.float32),
    )
    residual = random(3, 32, seed=4)
    got = lowbit.linear(x, w, bias, norm, "silu", residual)
    wanted = oracle.linear(x.float(), w, bias, norm=norm, act="silu", residual=residual.float())
    assert (got.float() - wanted).abs().max() <= 16 * HALF * wanted.abs().max()


@pytest.mark.parametrize("name", [*FORMATS, "int4g128zo", "int4a8", "fp8g128a8", "int4g96", "int1g160z"])
@pytest.mark.parametrize("batch", [1, 2, 17, 64, 300, 5000])
@pytest.mark.parametrize(("rows", "cols"), [(4096, 4096), (28672, 8192), (64, 96), (1000, 352)])
def test_plans_are_legal_and_round_trip(name: str, batch: int, rows: int, cols: int) -> None:
    format = format_of(name)
    picked = lowbit.plan(rows, cols, batch, format, 132)
    every = list(lowbit.candidates(rows, cols, batch, format, 132))
    assert lowbit.legal(picked, rows, cols, format)
    assert all(lowbit.legal(each, rows, cols, format) for each in every)
    for each in (picked, *every):
        blocks = -(-rows // each.rows) * -(-batch // each.tokens)
        assert each.splits == 1 or blocks * each.splits * each.rows * each.tokens <= lowbit.MOST_SUMS
        assert each.splits == 1 or blocks <= lowbit.MOST_COUNTERS
    assert len({str(each) for each in every}) == len(every) > 0
    assert [lowbit.parse(str(each)) for each in every] == every
    assert any(each.kind == "library" for each in every) == (name in ("fp8a8", "int4a8") and rows % 16 == 0)


def test_the_rule_reads_with_all_multiprocessors() -> None:
    """Few tokens: at least as many blocks as multiprocessors where the weight has tiles for them."""
    for rows, cols in ((4096, 4096), (4096, 14336), (28672, 4096), (1024, 4096)):
        picked = lowbit.plan(rows, cols, 1, format_of("int4g128"), 132)
        assert rows // picked.rows * picked.splits >= 128
    assert lowbit.plan(4096, 4096, 1000, format_of("int4g128"), 132).kind == "dense"
    assert lowbit.plan(4096, 4096, 1000, format_of("fp8g128a8"), 132).kind == "fp8"
    assert lowbit.plan(4096, 4096, 1000, format_of("fp8a8"), 132).kind == "library"
    assert lowbit.plan(4096, 4096, 1000, format_of("int4a8"), 132).kind == "library"
    assert lowbit.plan(4096, 4096, 100, format_of("int4a8"), 132).kind == "fused"


def test_codes_of_four_bits_are_float8_exactly() -> None:
    format = format_of("int4a8")
    numbers = torch.arange(16 * 64).view(16, 64) * 7 % 16
    packed = Packed(format.codes.store(numbers), torch.rand(16, 1).half())
    found = lowbit.eighths(packed, format, 16, 64)
    assert found.dtype == torch.float8_e4m3fn
    assert torch.equal(found.float(), numbers.float() - 8)


@pytest.mark.parametrize("name", ["fused", "dense:1", "fused:1x2:s1:w1:n1", "fused:axbxc:s1:w1:n1", "gemv", ""])
def test_names_that_are_no_plans(name: str) -> None:
    with pytest.raises(ValueError, match="is no plan of a packed linear"):
        lowbit.parse(name)


def test_what_cannot_run_gets_a_sentence() -> None:
    w = weight("int4g32", 16, 64)
    with pytest.raises(ValueError, match=r"x is \(2, 32\).*allowed: contiguous \[T, 64\]"):
        lowbit.lowbit_linear(random(2, 32), w)
    with pytest.raises(ValueError, match="float32; allowed"):
        lowbit.lowbit_linear(random(2, 64, dtype=torch.float32), w)
    with pytest.raises(ValueError, match="The plan library cannot run a weight 16 x 64 of int4g32"):
        lowbit.lowbit_linear(random(2, 64), w, plan=LowbitPlan("library"))
    plan, small = LowbitPlan("fused", 16, 32, 16, 2), lowbit.Workspace(torch.device("cpu"), 8, 8)
    with pytest.raises(ValueError, match="more sums than the workspace holds"):
        lowbit.lowbit_linear(random(2, 64), w, plan=plan, workspace=small)
    with pytest.raises(ValueError, match="cannot run a weight 16 x 64 of int4g32"):  # tiles larger than shared memory
        lowbit.lowbit_linear(random(2, 64), w, plan=LowbitPlan("fused", 256, 256, 128))
    with pytest.raises(ValueError, match="cannot run a weight 16 x 64 of fp8g64a8"):
        lowbit.lowbit_linear(random(2, 64), weight("fp8g64a8", 16, 64), plan=LowbitPlan("fp8", cols=128))
