"""Experts of a layer whose weights are packed, each in a format of its own, on Hopper: csrc/experts_packed.cu.

As `experts.py`, with weights in tiles (ops/tiles.py). Codes become exact numbers and a tile's sum is scaled in float32:
no weight is rounded. Activations keep their 16 bits, but for kinds whose format lets them be rounded to 8 in plans with
`acts8`, which many picks of an expert make worth while.

Plans of `digits` are for experts of few picks, where making 16-bit numbers of codes takes longer than reading them.
Tensor cores multiply codes as they lie in their bytes by activations that csrc/spread.cu writes as whole numbers in
base 256, four columns a pick (csrc/experts_digits.h). Columns count in steps of 2^-20 of the largest of their 128,
finer than 16-bit numbers.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tenfold.ops.gemm.grouped import Sorted
from tenfold.ops.gpu import hopper, nvrtc, quantize
from tenfold.ops.gpu.experts import box, launch, store_bytes
from tenfold.ops.tiles import COLS, NAMES, ROWS, Kind, Tiled

WIDTHS = (8, 16, 32, 64, 128, 192)  # the last for 8 bits alone: registers
LIMIT = 17408  # bytes of a warpgroup's tiles in a stage, where that holds more than one: four of 4 bits
MOST_STAGES = 8
MANY = 64  # picks of a tile from which on products may be bound by arithmetic
DIGIT_WIDTHS = (2, 4, 8)  # of plans of digits
DIGITS = 4  # columns of a pick
WHOLE = ("int2", "int3", "int4", "int8")  # kinds whose codes digits are multiplied by
FEW = 5.0  # picks of an expert that has some, up to which digits are the rule (H200, 2026-11-29)
ORDERED = {"PAIRS": (2, 3), "THIRDS": (3,)}  # bits of kinds that take digits in these orders of columns
SPREAD_WARPS = 4  # of a block that writes digits


@dataclass(frozen=True, slots=True)
class PackedExpertsPlan:
    """width: picks of a tile; height: rows of weights of a block, 64 or 128, for MANY picks also 192 or 256, which no
    rule and no tuning takes yet; stages of the ring; blocks of a multiprocessor; span: tiles in a stage at most; acts8:
    activations may be rounded to 8 bits; cluster: blocks that share picks, 1 or 2; digits: activations are written in
    base 256, and widths are those of DIGIT_WIDTHS.
    """

    width: int
    height: int
    stages: int
    blocks: int = 1
    span: int = 1
    acts8: bool = False
    cluster: int = 1
    digits: bool = False

    def __str__(self) -> str:
        name = f"tiles:{self.width}x{self.height}x{self.stages}x{self.blocks}x{self.span}"
        return name + ":a8" * self.acts8 + ":pairs" * (self.cluster == 2) + ":digits" * self.digits

    @property
    def columns(self) -> int:
        """Of the narrow operand, for a tile's picks."""
        return self.width * DIGITS if self.digits else self.width


def parse(name: str) -> PackedExpertsPlan:
    """The plan `str(plan)` names. Raises ValueError."""
    found = re.fullmatch(r"tiles:(\d+)x(64|128|192|256)x(\d+)x([12])x([124])(?:(:digits)|(:a8)?(:pairs)?)", name)
    if not found or int(found[1]) not in (DIGIT_WIDTHS if found[6] else WIDTHS):
        widths, few = (", ".join(map(str, each)) for each in (WIDTHS, DIGIT_WIDTHS))
        raise ValueError(
            f"{name!r} is no plan of packed experts; allowed: tiles:WIDTHxHEIGHTxSTAGESxBLOCKSxSPAN, then :a8, "
            f":pairs or both, with a width of {widths} and a height of 64 or 128, with a width of {MANY} also 192 or "
            f"256; or :digits, with a width of {few}."
        )
    width, height, stages, blocks, tiles = map(int, found.groups()[:5])
    cluster = 2 if found[8] else 1
    return PackedExpertsPlan(width, height, stages, blocks, tiles, bool(found[7]), cluster, bool(found[6]))


def span(plan: PackedExpertsPlan, kind: Kind) -> int:
    """Tiles of a kind in a stage."""
    return max(1, min(plan.span, LIMIT // kind.nbytes))


def room(plan: PackedExpertsPlan, kinds: tuple[Kind, ...]) -> int:
    """Bytes of a warpgroup's tiles in a stage."""
    return max(span(plan, kind) * kind.nbytes for kind in kinds)


def shared_bytes(plan: PackedExpertsPlan, kinds: tuple[Kind, ...], boxes: int = 0) -> int:
    """Dynamic shared memory of one block. boxes: as `boxes_of`, where products know better."""
    stage = plan.span * (boxes or boxes_of(plan, kinds)) * plan.columns * 128
    stage += plan.height // ROWS * room(plan, kinds) + plan.span * plan.width * 16 * plan.digits  # what digits count
    stages = plan.stages * (-(-stage // 1024) * 1024 + 24)
    return 1024 + stages + plan.height // ROWS * store_bytes(plan.width)


def boxes_of(plan: PackedExpertsPlan, kinds: tuple[Kind, ...]) -> int:
    """Boxes of picks that a tile of weights takes at most: 64 columns in 16 bits, or all 128 in 8; digits of 128, twice
    for 3 bits.
    """
    if plan.digits:
        return 2 if any(kind.bits == 3 for kind in kinds) else 1
    return 1 if plan.acts8 and all(map(rounded, kinds)) else 2


def legal(plan: PackedExpertsPlan, kinds: tuple[Kind, ...]) -> bool:
    """Whether a plan can run experts of these kinds: its ring has room, and the kernel's registers suffice."""
    if plan.digits and not spreads(kinds):
        return False
    registers = plan.blocks == 1 or (plan.columns <= 64 and plan.height == 64) or (plan.digits and plan.columns <= 16)
    registers &= plan.width < WIDTHS[-1] or boxes_of(plan, kinds) == 1
    registers &= plan.height <= 128 or (plan.width == MANY and plan.blocks == plan.cluster == 1)
    return registers and plan.stages >= 2 and hopper.fits(shared_bytes(plan, kinds), plan.blocks)


def spreads(kinds: tuple[Kind, ...]) -> bool:
    """Whether plans of digits take all of these kinds."""
    return all(kind.name in WHOLE and not kind.acts8 for kind in kinds)


def candidates(picks: int, experts: int, kinds: tuple[Kind, ...]) -> Iterator[PackedExpertsPlan]:
    """Plans worth timing, of widths about the picks that an expert has, with as many stages as fit."""
    each = picks / max(1, min(picks, experts))
    for width in WIDTHS:
        if not min(each / 4, 128) <= width <= max(8, 4 * each):
            continue
        acts8 = any(map(rounded, kinds))
        if width > MANY:
            sizes = [(128, 1, 1, acts8, cluster) for cluster in (1, 2)]
        else:
            shapes = [(*shape, tiles) for shape in ((64, 2), (128, 1)) for tiles in (1, 2, 4)]
            sizes = [(*shape, eight, 1) for shape in shapes if width * shape[2] <= 2 * MANY for eight in {False, acts8}]
        for height, blocks, tiles, eight, cluster in sizes:
            found = deepest(width, height, blocks, tiles, eight, cluster, kinds)
            if found is not None:
                yield found
    yield from digits_candidates(picks, experts, kinds)


def digits_candidates(picks: int, experts: int, kinds: tuple[Kind, ...]) -> Iterator[PackedExpertsPlan]:
    """Those of digits, where an expert's picks are few enough for some tiles to hold."""
    each = load(picks, experts)
    for width in DIGIT_WIDTHS:
        if not each / 4 <= width <= max(4, 4 * each):
            continue
        for height, blocks in ((64, 2), (128, 1), (128, 2)):
            for tiles in (2, 4) if width < 8 else (1, 2):
                found = deepest(width, height, blocks, tiles, False, 1, kinds, digits=True)
                if found is not None:
                    yield found


def load(picks: int, experts: int) -> float:
    """Picks of an expert that has some, where all are drawn evenly."""
    return picks / (experts * (1 - (1 - 1 / experts) ** picks)) if picks else 0.0


def deepest(
    width: int,
    height: int,
    blocks: int,
    tiles: int,
    acts8: bool,
    cluster: int,
    kinds: tuple[Kind, ...],
    digits: bool = False,
) -> PackedExpertsPlan | None:
    """The plan with as many stages as fit."""
    plans = (
        PackedExpertsPlan(width, height, stages, blocks, tiles, acts8, cluster, digits)
        for stages in range(MOST_STAGES, 1, -1)
    )
    return next((plan for plan in plans if legal(plan, kinds)), None)


def plan(picks: int, experts: int, kinds: tuple[Kind, ...]) -> PackedExpertsPlan:
    """The plan where nothing was measured (H100, 2026-11-28; that of digits: H200, 2026-11-29)."""
    drawn = load(picks, experts)
    if drawn <= FEW and spreads(kinds):
        few = next(w for w in DIGIT_WIDTHS if w >= 1.5 * drawn)
        found = deepest(few, 64, 2, min(4, 16 // few), False, 1, kinds, digits=True)
        if found is not None:
            return found
    each = picks / max(1, min(picks, experts))
    eights = [rounded(kind) for kind in kinds]
    widths = WIDTHS if all(eights) else WIDTHS[:-1]
    width = next((w for w in widths if w >= 1.5 * each), widths[-1])
    if width >= MANY:
        found = deepest(width, 128, 1, 1, any(eights), 1, kinds)
    else:
        found = deepest(width, 64, 2, 4 if width <= 16 else 2, all(eights), 1, kinds)
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
    return NAMES.index(kind.name) + len(NAMES) * (kind.zeros + 2 * kind.scales + 6 * acts8)


def rounded(kind: Kind) -> bool:
    """Whether products of a kind may take activations of 8 bits."""
    return kind.acts8 and kind.name in ("sign4", "fp8")


def rounds(chosen: PackedExpertsPlan, kind: Kind, cols: int) -> bool:
    """Whether they do."""
    return chosen.acts8 and rounded(kind) and cols % 16 == 0


def gathers(chosen: PackedExpertsPlan, w: Tiled) -> bool:
    """Whether a product reads picks of 16 bits by place."""
    return not chosen.digits and boxes_in(chosen, w) == 2


def boxes_in(chosen: PackedExpertsPlan, w: Tiled) -> int:
    """As `boxes_of`, of a product."""
    return boxes_of(replace(chosen, acts8=chosen.acts8 and w.cols % 16 == 0), w.kinds)


def products(
    chosen: PackedExpertsPlan,
    sms: int,
    x: Tensor,
    gathered: Tensor | None,
    by: Sorted,
    shares: Tensor,
    gate_up: Tiled,
    down: Tiled,
    act: str,
) -> Tensor:
    """What each pick gives, times its weight: [T * K, rows]. gathered: x by place, where it `gathers`."""
    halfway, parts = (x.new_empty(shares.numel(), size) for size in (down.cols, down.rows))
    first = x if gathered is None else gathered
    product(
        chosen, sms, first, operand(chosen, x, gate_up, by.order, shares.shape[1]), gate_up, halfway, by, shares, act
    )
    product(chosen, sms, halfway, operand(chosen, halfway, down), down, parts, by, shares, None)
    return parts


def operand(
    chosen: PackedExpertsPlan, x: Tensor, w: Tiled, order: Tensor | None = None, top: int = 1
) -> tuple[Tensor, Tensor] | None:
    """x by place in digits or, where a kind takes it so, in 8 bits. order, top: as `quantize.for_tiles`."""
    if chosen.digits:
        return spread(x, w.kinds, order, top)
    return quantize.for_tiles(x, order, top) if some(chosen, w) else None


def orders(kinds: tuple[Kind, ...]) -> tuple[bool, bool, bool]:
    """Which orders of digits' columns kinds need, as csrc/spread.h names them."""
    bits = {kind.bits for kind in kinds}
    return bool(bits & {4, 8}), bool(bits & {2, 3}), 3 in bits


def spread(x: Tensor, kinds: tuple[Kind, ...], order: Tensor | None = None, top: int = 1) -> tuple[Tensor, Tensor]:
    """x [T, cols] as digits [picks * 4, orders * cols up to whole tiles] uint8, four rows a pick, and what they count
    [chunks of 128 columns, picks and more, 4] float32: csrc/spread.cu. order: of picks [P] int32, `top` of a token,
    each of which is its token; else x lies by place.
    """
    cols, places = x.shape[1], len(x) if order is None else len(order)
    chunks, with_orders = -(-cols // COLS), orders(kinds)
    room = places + DIGIT_WIDTHS[-1]  # a tile's may reach beyond the last pick
    digits = torch.empty(places * DIGITS, sum(with_orders) * chunks * COLS, dtype=torch.uint8, device=x.device)
    counts = torch.empty(chunks, room, 4, dtype=torch.float32, device=x.device)
    names = ("WITH_BYTES", "WITH_PAIRS", "WITH_THIRDS")
    macros = (("HALF", nvrtc.HALF[x.dtype]), ("TOP", 0 if order is None else top), *zip(names, map(int, with_orders)))
    arguments: list[nvrtc.Argument] = [x, order, digits, counts, places, cols, room]
    blocks = -(-places * chunks // SPREAD_WARPS)
    nvrtc.load("spread.cu", "spread", macros)((blocks, 1, 1), SPREAD_WARPS * 32, 0, arguments, dependent=True)
    return digits, counts


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
    some kind takes it so; in plans of digits x as `spread` writes it, and x itself is not read.
    """
    gate = nvrtc.GATES[act]
    boxes = boxes_in(chosen, w)
    while not hopper.fits(shared_bytes(chosen, w.kinds, boxes), chosen.blocks):
        chosen = replace(chosen, stages=chosen.stages - 1)
    kernel = nvrtc.load("experts_packed.cu", "experts_packed", defines(chosen, w, gate, x.dtype))
    codes, scales = eights if eights is not None else (x, None)
    height = box(chosen.columns, chosen.cluster)
    maps = nvrtc.tensor_map(codes if chosen.digits else x, height), nvrtc.tensor_map(codes, height)
    arguments: list[nvrtc.Argument] = [*maps, scales, w.sources, out, by.tiles, by.count, by.order, shares]
    most = len(by.tiles) * -(-w.rows // chosen.height)
    shared = shared_bytes(chosen, w.kinds, boxes)
    arguments += [w.rows, w.cols]
    if chosen.digits:
        assert scales is not None
        arguments += [scales, scales.shape[1]]
    launch(kernel, most, sms, chosen.blocks, chosen.cluster, threads(chosen), shared, arguments)


def threads(chosen: PackedExpertsPlan) -> int:
    """Of a block: a warpgroup for 64 rows, and a warp that brings tiles; with many picks, and a block alone on its
    multiprocessor, a warpgroup.
    """
    return chosen.height * 2 + (128 if chosen.width >= 64 and chosen.blocks == 1 else 32)


def defines(chosen: PackedExpertsPlan, w: Tiled, gate: int, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    eight = [rounds(chosen, kind, w.cols) for kind in w.kinds]
    digits: tuple[tuple[str, int], ...] = (("DIGITS", 1), ("WITH_BYTES", int(orders(w.kinds)[0])))
    digits += tuple((name, flags(kind.bits in bits for kind in w.kinds)) for name, bits in ORDERED.items())
    return (
        ("HALF", nvrtc.HALF[dtype]),
        ("GATE", gate),
        ("DOWN", int(not gate)),
        ("FLOAT32", 0),
        ("N", chosen.columns),
        ("ROWS", chosen.height),
        ("STAGES", chosen.stages),
        ("BLOCKS", chosen.blocks),
        ("CLUSTER", chosen.cluster),
        ("SPAN", chosen.span),
        ("LIMIT", LIMIT),
        ("ROOM", room(chosen, w.kinds)),
        ("KINDS", len(w.kinds)),
        ("X_BOXES", boxes_in(chosen, w)),
        ("ACTS8S", flags(eight)),
        *((f"K{at}", code(kind, one)) for at, (kind, one) in enumerate(zip(w.kinds, eight))),
        *(digits if chosen.digits else ()),
    )


def flags(each: Iterable[bool]) -> int:
    """A bit for each that is true."""
    return sum(1 << at for at, one in enumerate(each) if one)
