"""Experts of a layer whose weights are packed, each in a format of its own, on Hopper: csrc/experts_packed.cu.

As `experts.py`, with weights in tiles (ops/tiles.py). Codes become exact numbers and a tile's sum is scaled in float32:
no weight is rounded. Activations keep their 16 bits, but for kinds whose format lets them be rounded to 8 in plans with
`acts8`, which many picks of an expert make worth while.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tenfold.ops.gemm.grouped import Sorted
from tenfold.ops.gpu import hopper, nvrtc, quantize
from tenfold.ops.gpu.experts import box, launch, store_bytes
from tenfold.ops.tiles import NAMES, ROWS, Kind, Tiled

WIDTHS = (8, 16, 32, 64, 128, 192)  # the last for 8 bits alone: registers
LIMIT = 17408  # bytes of a warpgroup's tiles in a stage, where that holds more than one: four of 4 bits
MOST_STAGES = 8
MANY = 64  # picks of a tile from which on products may be bound by arithmetic


@dataclass(frozen=True, slots=True)
class PackedExpertsPlan:
    """width: picks of a tile; height: rows of weights of a block, 64 or 128; stages of the ring; blocks of a
    multiprocessor; span: tiles in a stage at most; acts8: activations may be rounded to 8 bits; cluster: blocks that
    share picks, 1 or 2.
    """

    width: int
    height: int
    stages: int
    blocks: int = 1
    span: int = 1
    acts8: bool = False
    cluster: int = 1

    def __str__(self) -> str:
        name = f"tiles:{self.width}x{self.height}x{self.stages}x{self.blocks}x{self.span}"
        return name + ":a8" * self.acts8 + ":pairs" * (self.cluster == 2)


def parse(name: str) -> PackedExpertsPlan:
    """The plan `str(plan)` names. Raises ValueError."""
    found = re.fullmatch(r"tiles:(\d+)x(64|128)x(\d+)x([12])x([124])(:a8)?(:pairs)?", name)
    if not found or int(found[1]) not in WIDTHS:
        widths = ", ".join(map(str, WIDTHS))
        raise ValueError(
            f"{name!r} is no plan of packed experts; allowed: tiles:WIDTHxHEIGHTxSTAGESxBLOCKSxSPAN, then :a8, "
            f":pairs or both, with a width of {widths} and a height of 64 or 128."
        )
    width, height, stages, blocks, tiles = map(int, found.groups()[:5])
    return PackedExpertsPlan(width, height, stages, blocks, tiles, bool(found[6]), 2 if found[7] else 1)


def span(plan: PackedExpertsPlan, kind: Kind) -> int:
    """Tiles of a kind in a stage."""
    return max(1, min(plan.span, LIMIT // kind.nbytes))


def room(plan: PackedExpertsPlan, kinds: tuple[Kind, ...]) -> int:
    """Bytes of a warpgroup's tiles in a stage."""
    return max(span(plan, kind) * kind.nbytes for kind in kinds)


def shared_bytes(plan: PackedExpertsPlan, kinds: tuple[Kind, ...], boxes: int = 0) -> int:
    """Dynamic shared memory of one block. boxes: as `boxes_of`, where products
    know better.
    """
    picks = plan.span * (boxes or boxes_of(plan, kinds)) * plan.width * 128
    stage = picks + plan.height // ROWS * room(plan, kinds)
    stages = plan.stages * (-(-stage // 1024) * 1024 + 24)
    return 1024 + stages + plan.height // ROWS * store_bytes(plan.width)


def boxes_of(plan: PackedExpertsPlan, kinds: tuple[Kind, ...]) -> int:
    """Boxes of picks that a tile of weights takes at most: 64 columns in 16 bits, or all 128 in 8."""
    return 1 if plan.acts8 and all(map(rounded, kinds)) else 2


def legal(plan: PackedExpertsPlan, kinds: tuple[Kind, ...]) -> bool:
    """Whether a plan can run experts of these kinds: its ring has room, and the kernel's registers suffice."""
    registers = plan.blocks == 1 or (plan.width <= 32 and plan.height == 64)
    registers &= plan.width < WIDTHS[-1] or boxes_of(plan, kinds) == 1
    return registers and plan.stages >= 2 and hopper.fits(shared_bytes(plan, kinds), plan.blocks)


def candidates(picks: int, experts: int, kinds: tuple[Kind, ...]) -> Iterator[PackedExpertsPlan]:
    """Plans worth timing, of widths about the picks that an expert has, with as many stages as fit."""
    each = picks / max(1, min(picks, experts))
    for width in WIDTHS:
        if not min(each / 4, 128) <= width <= max(8, 4 * each):
            continue
        acts8 = width >= MANY and any(kind.acts8 for kind in kinds)
        if width >= MANY:
            sizes = [(128, 1, 1, acts8, cluster) for cluster in (1, 2)]
        else:
            shapes = ((64, 2), (128, 1))
            sizes = [(*shape, tiles, False, 1) for shape in shapes for tiles in (1, 2, 4) if width * tiles <= 64]
        for height, blocks, tiles, eight, cluster in sizes:
            found = deepest(width, height, blocks, tiles, eight, cluster, kinds)
            if found is not None:
                yield found


def deepest(
    width: int, height: int, blocks: int, tiles: int, acts8: bool, cluster: int, kinds: tuple[Kind, ...]
) -> PackedExpertsPlan | None:
    """The plan with as many stages as fit."""
    plans = (PackedExpertsPlan(width, height, n, blocks, tiles, acts8, cluster) for n in range(MOST_STAGES, 1, -1))
    return next((plan for plan in plans if legal(plan, kinds)), None)


def plan(picks: int, experts: int, kinds: tuple[Kind, ...]) -> PackedExpertsPlan:
    """The plan where nothing was measured (H100, 2026-11-28)."""
    each = picks / max(1, min(picks, experts))
    widths = WIDTHS if all(map(rounded, kinds)) else WIDTHS[:-1]
    width = next((w for w in widths if w >= 1.5 * each), widths[-1])
    if width >= MANY:
        found = deepest(width, 128, 1, 1, any(kind.acts8 for kind in kinds), 1, kinds)
    else:
        found = deepest(width, 64, 2, 4 if width <= 16 else 2, False, 1, kinds)
    assert found is not None
    return found


def expert_bytes(gate_up: Tiled, down: Tiled) -> list[int]:
    """Bytes of each expert."""
    return [up.nbytes + down.nbytes for up, down in zip(gate_up.data, down.data)]


def turns(gate_up: Tiled, down: Tiled) -> Tensor | None:
    """Experts from the largest to the smallest [experts] int32, so that blocks run out of work together; None where all
    are alike.
    """
    nbytes = expert_bytes(gate_up, down)
    if len(set(nbytes)) == 1:
        return None
    order = sorted(range(len(nbytes)), key=lambda expert: -nbytes[expert])
    return torch.tensor(order, dtype=torch.int32, device=gate_up.sources.device)


def takes(x: Tensor, gate_up: Tiled, down: Tiled) -> bool:
    """Whether these experts can run here at all."""
    same = x.dtype == gate_up.dtype == down.dtype
    return same and x.dtype in nvrtc.HALF and all(size % 8 == 0 for size in (gate_up.cols, down.cols, down.rows))


def code(kind: Kind, acts8: bool) -> int:
    """A kind as the kernel counts them."""
    return NAMES.index(kind.name) + 6 * kind.zeros + 12 * kind.scales + 36 * acts8


def rounded(kind: Kind) -> bool:
    """Whether products of a kind may take activations of 8 bits."""
    return kind.acts8 and kind.name in ("int4", "fp8") and not kind.zeros


def rounds(chosen: PackedExpertsPlan, kind: Kind, cols: int) -> bool:
    """Whether they do."""
    return chosen.acts8 and rounded(kind) and cols % 16 == 0


def products(
    chosen: PackedExpertsPlan,
    sms: int,
    x: Tensor,
    gathered: Tensor,
    by: Sorted,
    shares: Tensor,
    gate_up: Tiled,
    down: Tiled,
    act: str,
) -> Tensor:
    """What each pick gives, times its weight: [T * K, rows]. gathered: x by place."""
    halfway = x.new_empty(len(gathered), down.cols)
    parts = x.new_empty(len(gathered), down.rows)
    eights = quantize.for_tiles(x, by.order, shares.shape[1]) if some(chosen, gate_up) else None
    product(chosen, sms, gathered, eights, gate_up, halfway, by, shares, act)
    eights = quantize.for_tiles(halfway) if some(chosen, down) else None
    product(chosen, sms, halfway, eights, down, parts, by, shares, None)
    return parts


def some(chosen: PackedExpertsPlan, w: Tiled) -> bool:
    """Whether any expert takes activations of 8 bits."""
    return any(rounds(chosen, kind, w.cols) for kind in w.kinds)


def product(
    chosen: PackedExpertsPlan,
    sms: int,
    x: Tensor,
    eights: tuple[Tensor, Tensor] | None,
    w: Tiled,
    out: Tensor,
    by: Sorted,
    shares: Tensor,
    act: str | None,
) -> None:
    """One way: x and out by place, but out by pick without a gate. eights: x as `quantize.for_tiles` rounds it, where
    some kind takes it so.
    """
    gate = nvrtc.GATES[act]
    boxes = 1 if all(rounds(chosen, kind, w.cols) for kind in w.kinds) else 2
    while not hopper.fits(shared_bytes(chosen, w.kinds, boxes), chosen.blocks):
        chosen = replace(chosen, stages=chosen.stages - 1)
    kernel = nvrtc.load("experts_packed.cu", "experts_packed", defines(chosen, w, gate, x.dtype))
    codes, scales = eights if eights is not None else (x, None)
    picks = box(chosen.width, chosen.cluster)
    maps = nvrtc.tensor_map(x, picks), nvrtc.tensor_map(codes, picks)
    arguments: list[nvrtc.Argument] = [*maps, scales, w.sources, out, by.tiles, by.count, by.order, shares]
    most = len(by.tiles) * -(-w.rows // chosen.height)
    shared = shared_bytes(chosen, w.kinds, boxes)
    launch(kernel, most, sms, chosen.blocks, chosen.cluster, threads(chosen), shared, [*arguments, w.rows, w.cols])


def threads(chosen: PackedExpertsPlan) -> int:
    """Of a block: a warpgroup for 64 rows, and a warp that brings tiles, with many picks a warpgroup."""
    return chosen.height * 2 + (128 if chosen.width >= 64 else 32)


def defines(chosen: PackedExpertsPlan, w: Tiled, gate: int, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    eight = [rounds(chosen, kind, w.cols) for kind in w.kinds]
    return (
        ("HALF", nvrtc.HALF[dtype]),
        ("GATE", gate),
        ("DOWN", int(not gate)),
        ("FLOAT32", 0),
        ("N", chosen.width),
        ("ROWS", chosen.height),
        ("STAGES", chosen.stages),
        ("BLOCKS", chosen.blocks),
        ("CLUSTER", chosen.cluster),
        ("SPAN", chosen.span),
        ("LIMIT", LIMIT),
        ("ROOM", room(chosen, w.kinds)),
        ("KINDS", len(w.kinds)),
        ("X_BOXES", 1 if all(eight) else 2),
        ("ACTS8S", sum(1 << at for at, one in enumerate(eight) if one)),
        *((f"K{at}", code(kind, one)) for at, (kind, one) in enumerate(zip(w.kinds, eight))),
    )
