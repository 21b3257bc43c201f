"""Products of experts in whole numbers, piece by piece on a CPU: digits of x, codes as instructions take them, and that
the columns of both meet. The kernel that holds them together runs in test_experts_packed_kernel.py.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tenfold.ops import formats, tiles
from tenfold.ops.gpu import nvrtc
from tests.ops.gpu.emulated import Emulator

packed = pytest.importorskip("tenfold.ops.gpu.experts_packed")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler to emulate kernels")
TYPES = [torch.bfloat16, torch.float16]
KINDS = {bits: (tiles.Kind(f"int{bits}", zeros=True),) for bits in (2, 3, 4, 8)}
ALL = tuple(kind for (kind,) in KINDS.values())
FRAGMENTS = """
static u32 piece_4(u32 at) { u32 v; memcpy(&v, emulated_memory + at, 4); return v; }
static uint4 piece_16(u32 at) { return {piece_4(at), piece_4(at + 4), piece_4(at + 8), piece_4(at + 12)}; }
static uint2 piece_8(u32 at) { return {piece_4(at), piece_4(at + 4)}; }
typedef u32 Fragment[4];
#include "bytes.h"

extern "C" void fragments(const u32 *tile, u32 *out, float *excess, int words) {
    for (int i = 0; i < words; i++) memcpy(emulated_memory + 4 * i, tile + i, 4);
    const int thread = threadIdx.x;
    Words<CODE> own;
    for (int half = 0; half < 2; half++) {
        Fragment a[4];
        own.load(0, half, thread / 32, thread % 32);
        own.mask(a, half);
        for (int s = 0; s < own.STEPS; s++)
            for (int r = 0; r < 4; r++) out[((half * own.STEPS + s) * 128 + thread) * 4 + r] = a[s][r];
    }
    for (int u = 0; u < 2; u++) excess[u] = excess_of<CODE>(u);
}
"""


@pytest.fixture(autouse=True)
def emulator(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    found = Emulator(tmp_path_factory.getbasetemp())
    monkeypatch.setattr(nvrtc, "load", found)
    return found


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def left_operand(emulator: Emulator, folder: Path, bits: int, tile: Tensor) -> tuple[Tensor, Tensor]:
    """A tile as the instruction sees it, [64, columns of all steps] int64, and by what upper and lower rows are too
    large.
    """
    source = folder / f"fragments{bits}.cu"
    source.write_text(FRAGMENTS)
    steps = 8 if bits == 3 else 4
    out, excess = torch.zeros(steps, 128, 4, dtype=torch.int32), torch.zeros(2)
    words = tile.contiguous().view(torch.int32)
    run = emulator(str(source), "fragments", (("CODE", bits), ("HALF", 0)))
    run((1, 1, 1), 128, 4 * len(words), [words, out, excess, len(words)])
    each = out.view(torch.int8 if bits == 8 else torch.uint8).unflatten(2, (4, 4))  # step, thread, r, byte
    each = each.unflatten(1, (4, 8, 4)).unflatten(4, (2, 2))  # step, warp, g, t, half of 32 columns, lower row, byte
    return each.permute(1, 5, 2, 0, 4, 3, 6).reshape(64, -1).long(), excess


def right_operand(bits: int, digits: Tensor, kinds: tuple[tiles.Kind, ...], chunk: int, chunks: int) -> Tensor:
    """Digits as the instruction sees them, [columns of all steps, picks * 4] int64."""
    first = packed.orders(kinds)[0] if bits in (2, 3) else 0
    own = [digits[:, ((first + i) * chunks + chunk) * 128 :][:, :128] for i in range(2 if bits == 3 else 1)]
    return torch.cat(own, dim=1).view(torch.int8).long().T


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bits", KINDS)
def test_codes_meet_their_columns(
    bits: int, dtype: torch.dtype, mixed: bool, emulator: Emulator, tmp_path: Path
) -> None:
    """A product put together as the kernel does, against float64."""
    picks, cols = 3, 512 if bits == 3 else 448  # of the last tile 64 columns, where codes allow it
    kinds = ALL if mixed else KINDS[bits]
    x = random(picks, cols, seed=1).to(dtype)
    format = formats.format_of(f"int{bits}g128z")
    own = format.pack(random(64, cols, seed=2))
    assert own.zeros is not None
    own.zeros.add_(torch.rand(own.zeros.shape, generator=torch.Generator().manual_seed(3)).to(own.zeros) - 0.5)
    tiled = tiles.tile(format, own)[0]
    exact = tiles.untile(KINDS[bits][0], tiled[None], 64, cols, torch.float32).double()
    digits, counts = packed.spread(x, kinds)
    found = torch.zeros(64, picks, dtype=torch.float64)
    upper = torch.arange(64) // 8 % 2 == 0
    for chunk, tile in enumerate(tiled):
        codes, excess = left_operand(emulator, tmp_path, bits, tile)
        products = (codes @ right_operand(bits, digits, kinds, chunk, len(tiled))).unflatten(1, (picks, 2, 2))
        whole = products[..., 1] * 256 + products[..., 0]  # of the two low digits, of the two high ones
        assert whole.abs().max() < 1 << 31
        units, sums = counts[chunk, :picks, 0::2].double(), counts[chunk, :picks, 1::2].double()
        scales, zeros = tile[64 * 128 * bits // 8 :].contiguous().view(torch.float16).double().view(2, 64, 1)
        large = torch.where(upper, *excess.double())[:, None]
        found += scales / large * ((whole * units).sum(2) - zeros * large * sums.sum(1))
    want = exact @ x.double().T
    assert (found - want).abs().max() <= 4e-6 * want.abs().max()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_digits_are_x_in_every_order(dtype: torch.dtype) -> None:
    """Each column once in an order, twice the low bits' and the third's; of sizes far apart; 0 behind the last."""
    x = random(5, 200, seed=4).to(dtype)
    x[0, ::128] *= 1000
    x[1] *= 2.0**-13
    x[2, :128] = 0
    x[3] = 2.0**10
    x[4] = torch.arange(200).to(dtype)
    pair = torch.arange(32)
    h, t = pair // 4 % 2, pair % 4
    digits, counts = packed.spread(x, ALL)
    values = torch.nn.functional.pad(x.double(), (0, 56)).unflatten(1, (2, 128))
    powers = 256 ** torch.arange(4, dtype=torch.float64)
    every = digits.view(torch.int8).unflatten(0, (5, 4)).unflatten(2, (3, 2, 128)).double()
    unit = counts[:, :5, 0].double().T[..., None]
    assert torch.equal(counts[:, :5, 2].double().T[..., None], unit * 65536)
    sums = (values / unit).round().sum(2) * unit[..., 0]
    assert torch.allclose(counts[:, :5, 3].double().T, sums, rtol=1e-6, atol=0)
    assert not counts[:, :5, 1].any()
    up = (torch.zeros(32), 4 - 4 * h, 6 - 4 * (pair // 8 % 2) - 2 * h)
    for order, power in enumerate(up):
        got = (every[:, :, order] * powers[:, None, None]).sum(1) * unit  # picks, chunks, places
        got = got / (2.0**power).double().repeat_interleave(4)
        assert torch.allclose(got.sort(2).values, values.sort(2).values, rtol=0, atol=2.0**-21 * 2048)
        largest = values.abs().amax(2, keepdim=True)
        assert ((got.sort(2).values - values.sort(2).values).abs() <= 2.0**-20 * largest).all()
    assert t.max() == 3


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_picks_are_those_of_their_tokens(dtype: torch.dtype) -> None:
    x = random(4, 136, seed=5).to(dtype)
    order = torch.tensor([7, 2, 0, 5, 3], dtype=torch.int32)
    for kinds in (KINDS[4], KINDS[2], KINDS[3], ALL):
        digits, counts = packed.spread(x, kinds, order, 2)
        same, alike = packed.spread(x[(order // 2).long()], kinds)
        assert torch.equal(digits, same)
        assert torch.equal(counts[:, :5], alike[:, :5])
        assert digits.shape == (20, sum(packed.orders(kinds)) * 256)
        assert counts.shape[1] >= 5 + max(packed.DIGIT_WIDTHS)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_numbers_that_are_none_and_sizes_at_the_ends(dtype: torch.dtype) -> None:
    x = random(6, 256, seed=6).to(dtype)
    x[0, 3], x[1, 200], x[2, 200] = float("nan"), float("inf"), -float("inf")
    x[3], x[4], x[5] = torch.finfo(dtype).max * 2.0**-8, torch.finfo(dtype).tiny, 0
    _, counts = packed.spread(x, ALL)
    none = counts[:, :6, [0, 2, 3]].isnan()
    assert none.all(2).T.tolist() == [[True, False], [False, True], [False, True]] + [[False, False]] * 3
    assert torch.equal(none.all(2), none.any(2))
    assert counts[:, 3:6].isfinite().all()
    assert not counts[:, 5, 3].any()


def plans() -> list[Any]:
    Plan = packed.PackedExpertsPlan
    return [Plan(2, 64, 4, 2, 4, digits=True), Plan(4, 128, 2, 2, 2, digits=True), Plan(8, 128, 2, digits=True)]


@pytest.mark.parametrize("plan", plans(), ids=str)
def test_stages_hold_what_the_kernel_lays_out(plan: Any) -> None:
    """Bytes of shared memory as macros of the kernel add them up."""
    for kinds in (KINDS[4], KINDS[3], ALL):
        macros = dict(packed.defines(plan, bank_of(kinds), 0, torch.float16))
        n, span, height = macros["N"], macros["SPAN"], macros["ROWS"]
        stage = span * (2 if macros["THIRDS"] else 1) * n * 128 + height // 64 * macros["ROOM"] + span * n // 4 * 16
        store = n // 4 * 8 + n // 4 * (64 * 2 + 16)
        whole = 1024 + plan.stages * (-(-stage // 1024) * 1024 + 16 + 8) + height // 64 * store
        assert packed.shared_bytes(plan, kinds) == whole
        assert macros["ROOM"] % 16 == 0
        assert macros["PAIRS"] == sum(1 << i for i, kind in enumerate(kinds) if kind.bits in (2, 3))
        assert macros["THIRDS"] == sum(1 << i for i, kind in enumerate(kinds) if kind.bits == 3)
        assert macros["WITH_BYTES"] == any(kind.bits in (4, 8) for kind in kinds)


def bank_of(kinds: tuple[tiles.Kind, ...]) -> tiles.Tiled:
    none = torch.zeros(0)
    return tiles.Tiled((), kinds, (), none, 64, 128, False, torch.float16)


def test_plans_of_digits() -> None:
    for plan in plans():
        assert packed.parse(str(plan)) == plan
        assert packed.legal(plan, ALL)
        assert plan.columns == 4 * plan.width
        for other in (tiles.DENSE, tiles.Kind("fp8"), tiles.Kind("int4", acts8=True)):
            assert not packed.legal(plan, (*ALL, other))
    for wrong in (
        "tiles:16x64x2x1x1:digits",
        "tiles:2x64x2x1x1",
        "tiles:8x64x2x1x1:a8:digits",
        "tiles:4x64x2x1x1:pairs",
    ):
        with pytest.raises(ValueError, match="digits, with a width of 2, 4, 8"):
            packed.parse(wrong)
    for picks, width in ((8, 2), (64, 2), (128, 4), (160, 4), (512, 8)):
        plan = packed.plan(picks, 128, ALL)
        assert plan.digits
        assert plan.width == width
    assert not packed.plan(1024, 128, ALL).digits
    assert not packed.plan(8, 128, (*ALL, tiles.DENSE)).digits
    for picks, widths in ((8, {2, 4}), (512, {2, 4, 8}), (8192, set())):
        every = [plan for plan in packed.candidates(picks, 128, ALL) if plan.digits]
        assert {plan.width for plan in every} == widths
        assert all(packed.legal(plan, ALL) for plan in every)
        assert not any(plan.digits for plan in packed.candidates(picks, 128, (*ALL, tiles.DENSE)))
    assert packed.load(8, 128) == pytest.approx(1.03, abs=0.01)
