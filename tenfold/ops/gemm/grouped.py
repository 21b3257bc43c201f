"""Products of experts in Triton: every expert that has tokens in one launch, for few tokens and for many.

    inner[i] = act(gate) * up of gate_up[e] @ x[token of i]      part[i] = weight of i * down[e] @ inner[i]

Picks (token t's k-th expert) are sorted by expert on the device, so no host waits and graphs hold; a tile is up to
`height` picks of one expert. Tokens are gathered as a tile is read, and parts of a token are summed by a third launch,
in the order of its picks, so results repeat bit for bit. As in `flat.py` weights stand on the wide side of the matrix
instruction; the weight of a pick and the gate are applied in float32, and results are rounded once a launch.
"""

import re
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenfold.ops.gemm.flat import activate, own_rows
from tenfold.ops.gpu.nvrtc import GATES

SUM_TILE = 1024  # features of a program that sums parts
UNIT = 64  # picks: what csrc/experts.h multiplies of a larger tile is whole units


@dataclass(frozen=True, slots=True)
class GroupedPlan:
    """height: picks of a tile; rows and cols of the weight tile, tiles under way, warps."""

    height: int
    rows: int
    cols: int
    stages: int
    warps: int

    def __str__(self) -> str:
        return f"grouped:{self.height}x{self.rows}x{self.cols}x{self.stages}:w{self.warps}"


def parse(name: str) -> GroupedPlan:
    """The plan `str(plan)` names. Raises ValueError."""
    found = re.fullmatch(r"grouped:(\d+)x(\d+)x(\d+)x(\d+):w(\d+)", name)
    if not found:
        raise ValueError(f"{name!r} is no plan of experts in Triton; allowed: grouped:HEIGHTxROWSxCOLSxSTAGES:wWARPS.")
    return GroupedPlan(*map(int, found.groups()))


FEW = GroupedPlan(16, 64, 128, 4, 4)
SOME = GroupedPlan(32, 64, 128, 4, 4)
MANY = GroupedPlan(64, 128, 64, 4, 4)
MOST = GroupedPlan(128, 128, 64, 3, 8)


def plan(picks: int, experts: int) -> GroupedPlan:
    """By how many picks an expert has where all have some."""
    each = picks / max(1, min(picks, experts))
    return FEW if each <= 12 else SOME if each <= 24 else MANY if each <= 96 else MOST


@dataclass(frozen=True, slots=True, eq=False)
class Sorted:
    """Picks by expert. order [P] int32: picks, `token * K + k`; tiles [N, 4] int32: expert, first place, end and 0 of
    each tile, the expert -1 where there are fewer tiles; count [1] int32: how many there are.
    """

    order: Tensor
    tiles: Tensor
    count: Tensor


def sort(ids: Tensor, experts: int, height: int, turns: Tensor | None = None) -> Sorted:
    """ids [T, K] int64, of experts. turns [experts] int32: the order in which experts come, where it is another.
    Nothing is read back from the device.

    An expert has as few tiles of up to `height` picks as hold its own, and all of them about as many, but for its last
    one whole units: as many units are multiplied as if all tiles but one were full, and tiles take alike.
    """
    flat = ids.flatten() if turns is None else turns.argsort()[ids.flatten()]
    picks = len(flat)
    order = flat.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    ends = counts.cumsum(0)
    unit = UNIT if height % UNIT == 0 else height
    units, parts = (counts + unit - 1) // unit, (counts + height - 1) // height  # of each expert
    last = parts.cumsum(0)  # tiles up to each expert's end
    slots = torch.arange(most_tiles(picks, experts, height) + 1, device=ids.device)
    expert = torch.searchsorted(last, slots, right=True)
    lives, own = expert < experts, expert.clamp(max=experts - 1)
    start, before, whole, part = torch.stack([ends - counts, last - parts, units, parts.clamp(min=1)])[:, own]
    first = torch.where(lives, start + (slots - before) * whole // part * unit, picks)
    name = torch.where(lives, own if turns is None else turns[own].long(), -1)
    tiles = torch.stack([name[:-1], first[:-1], first[1:], torch.zeros_like(first[1:])], dim=1)
    return Sorted(order.to(torch.int32), tiles.to(torch.int32), last[-1:].to(torch.int32))


def most_tiles(picks: int, experts: int, height: int) -> int:
    """Of any picks: each of the experts that have some may have one that is not full."""
    return (picks + min(picks, experts) * (height - 1)) // height


@triton.jit
def grouped_kernel(
    x, w, out, shares, order, tiles, count, size, cols, each, K,
    GATE: tl.constexpr, DOWN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of picks by a tile of an expert's features; grid (features / BN, tiles). DOWN: rows of x lie by place and
    results go by pick, else the other way around. each: elements of one expert's weight.
    """
    tile = tl.program_id(1)
    if tile < tl.load(count):
        expert = tl.load(tiles + 4 * tile)
        place = tl.load(tiles + 4 * tile + 1) + tl.arange(0, BM)
        lives = place < tl.load(tiles + 4 * tile + 2)
        pick = tl.load(order + place, mask=lives, other=0)
        source = (place if DOWN else pick // K).to(tl.int64)
        row = own_rows(tl.program_id(0), size, BN, GATE)
        k = tl.arange(0, BK)
        weights = w + expert.to(tl.int64) * each + row[:, None].to(tl.int64) * cols + k[None, :]
        tokens = x + source[None, :] * cols + k[:, None]
        acc = tl.zeros([BN, BM], tl.float32)
        for begin in range(0, cols, BK):
            left = k < cols - begin
            a = tl.load(weights + begin, mask=left[None, :], other=0.0)
            b = tl.load(tokens + begin, mask=left[:, None] & lives[None, :], other=0.0)
            acc = tl.dot(a, b, acc)
        if GATE:
            H: tl.constexpr = BN // 2
            gate, up = tl.split(tl.permute(tl.reshape(acc, (2, H, BM)), (1, 2, 0)))
            acc = activate(gate, GATE) * up
            feature = tl.program_id(0) * H + tl.arange(0, H)
        else:
            feature = tl.program_id(0) * BN + tl.arange(0, BN)
        if DOWN:
            acc *= tl.load(shares + pick, mask=lives, other=0.0)[None, :]
            target = pick.to(tl.int64)
        else:
            target = place.to(tl.int64)
        at = out + target[None, :] * size + feature[:, None]
        tl.store(at, acc.to(out.dtype.element_ty), mask=lives[None, :] & (feature < size)[:, None])


@triton.jit
def sum_kernel(parts, residual, out, size, K: tl.constexpr, B: tl.constexpr):
    """B features of one token: the sum of its K parts and the residual; grid (tokens, size / B)."""
    token = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * B + tl.arange(0, B)
    lives = feature < size
    total = tl.zeros([B], tl.float32)
    for k in range(K):
        total += tl.load(parts + (token * K + k) * size + feature, mask=lives, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + token * size + feature, mask=lives, other=0.0).to(tl.float32)
    tl.store(out + token * size + feature, total.to(out.dtype.element_ty), mask=lives)


def run(
    chosen: GroupedPlan,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    act: str,
    residual: Tensor | None = None,
) -> Tensor:
    """As `Kernels.experts` with gate_up [experts, 2 * inner, cols] and down [experts, rows, inner], contiguous."""
    out = x.new_empty(len(x), down.shape[1])
    if not ids.numel():
        return out
    by = sort(ids, len(gate_up), chosen.height)
    parts = products(chosen, x, by, weights.contiguous(), gate_up, down, act)
    return summed(parts, residual, out)


def summed(parts: Tensor, residual: Tensor | None, out: Tensor) -> Tensor:
    """out [T, rows]: the sum of each token's parts [T * K, rows], in the order of its picks, and the residual."""
    tokens, rows = out.shape
    top = len(parts) // tokens
    sum_kernel[(tokens, triton.cdiv(rows, SUM_TILE))](parts, residual, out, rows, K=top, B=SUM_TILE)
    return out


def products(
    chosen: GroupedPlan, x: Tensor, by: Sorted, shares: Tensor, gate_up: Tensor, down: Tensor, act: str
) -> Tensor:
    """What each pick gives, times its weight: [T * K, rows]. shares [T, K] contiguous."""
    cols, inner, rows, top = x.shape[1], gate_up.shape[1] // 2, down.shape[1], shares.shape[1]
    halfway, parts = x.new_empty(shares.numel(), inner), x.new_empty(shares.numel(), rows)
    common = {"BM": chosen.height, "BN": chosen.rows, "BK": chosen.cols}
    settings = {"num_stages": chosen.stages, "num_warps": chosen.warps}
    for source, w, target, size, depth, gate in (
        (x, gate_up, halfway, inner, cols, GATES[act]),
        (halfway, down, parts, rows, inner, 0),
    ):
        features = chosen.rows // 2 if gate else chosen.rows
        grouped_kernel[(triton.cdiv(size, features), len(by.tiles))](
            *(source, w, target, shares, by.order, by.tiles, by.count, size, depth, w.stride(0), top),
            GATE=gate,
            DOWN=not gate,
            **common,
            **settings,
        )
    return parts
