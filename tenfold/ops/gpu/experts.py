"""Experts of a layer on Hopper: csrc/experts.cu, all in one launch each way, for a few tokens and for thousands.

Picks are sorted by expert and their tokens copied side by side, so that the tensor copy engine can bring those of a
tile; a tile is up to `width` picks of one expert, and costs what it holds in units of 64. Sums of a token's experts
meet in a launch of their own.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.ops.gemm.grouped import UNIT, Sorted, most_tiles
from tenfold.ops.gpu import hopper, nvrtc
from tenfold.ops.route import Routing

WIDTHS = (8, 16, 32, 64, 128, 192, 256)
WIDEST = {64: 256, 128: 256, 192: 192, 256: 128}  # picks for which registers suffice, by the rows of a tile
WARPS = 8  # of a block that routes
MOST_ROUTERS = 8  # blocks
LARGE = {64: ((128, 6),), 128: ((128, 6), (256, 4)), 192: ((128, 5), (192, 4)), 256: ((128, 4),)}
"""Heights and stages of tiles so wide, one block of a multiprocessor."""
MOST_PICKS = 4096
MOST_EXPERTS = 1024


@dataclass(frozen=True, slots=True)
class ExpertsPlan:
    """width: picks of a tile; height: rows of w of a tile, 64 to 256; boxes of 64 columns in a stage; stages of the
    ring; blocks of a multiprocessor; cluster: blocks that share picks, 1 or 2.
    """

    width: int
    height: int
    boxes: int
    stages: int
    blocks: int = 1
    cluster: int = 1

    def __str__(self) -> str:
        name = f"experts:{self.width}x{self.height}x{self.boxes}x{self.stages}x{self.blocks}"
        return name + ":pairs" * (self.cluster == 2)


def parse(name: str) -> ExpertsPlan:
    """The plan `str(plan)` names. Raises ValueError."""
    found = re.fullmatch(r"experts:(\d+)x(64|128|192|256)x([12])x(\d+)x(\d+)(:pairs)?", name)
    if not found or int(found[1]) not in WIDTHS:
        widths = ", ".join(map(str, WIDTHS))
        raise ValueError(
            f"{name!r} is no plan of experts; allowed: experts:WIDTHxHEIGHTxBOXESxSTAGESxBLOCKS with a "
            f"width of {widths} and a height of {', '.join(map(str, WIDEST))}."
        )
    width, height, boxes, stages, blocks = map(int, found.groups()[:5])
    return ExpertsPlan(width, height, boxes, stages, blocks, 2 if found[6] else 1)


def shared_bytes(plan: ExpertsPlan) -> int:
    """Dynamic shared memory of one block."""
    stage = plan.boxes * 128 * (plan.height + plan.width)
    return 1024 + plan.stages * (stage + 16) + plan.height // 64 * store_bytes(plan.width)


def store_bytes(width: int) -> int:
    """Where a warpgroup's sums pass on their way out, in shared memory."""
    return 8 * width + min(width, 32) * (2 * 64 + 16)


def box(width: int, cluster: int) -> int:
    """Picks that one block fetches at once."""
    return min(width, UNIT) // cluster


def slabs(w: Tensor) -> Tensor:
    """Weights of gate, then up, [experts, rows, cols] as [experts, rows / 16, 2, 8, cols], without a copy: a slab is
    eight rows of gate and the same eight of up.
    """
    return w.unflatten(1, (2, -1, 8)).transpose(1, 2)


def slab_box(height: int) -> tuple[int, int, int]:
    """Of `slabs`, what one block fetches at once."""
    return height // 16, 2, 8


def legal(plan: ExpertsPlan, rows: int, cols: int, gate: bool) -> bool:
    """Whether a plan can run experts with weights of rows x cols: its ring has room, and registers suffice."""
    wide = plan.width <= WIDEST[plan.height] and (plan.blocks == 1 or (plan.width <= 64 and plan.height <= 128))
    sizes = cols % 8 == 0 and not (gate and rows % 16)
    return wide and sizes and plan.stages >= 2 and hopper.fits(shared_bytes(plan), plan.blocks)


def candidates(picks: int, experts: int) -> Iterator[ExpertsPlan]:
    """Plans worth timing, of widths about the picks that an expert has.

    What the L2 cache must deliver decides about large tiles: 2 / width + 2 / height bytes a multiply-add, of which a
    cluster halves the second. That is 31 bytes for a thousand multiply-adds in tiles of 128 by 128, 23 in 256 by 128
    and 128 by 256, 21 in 192 by 192, and in pairs 23, 16, 20 and 16. An H100 multiplies fast enough to ask for 9 TB/s
    at 23.
    """
    each = picks / max(1, min(picks, experts))
    for width in WIDTHS:
        if not min(each / 4, 128) <= width <= max(8, 4 * each):
            continue
        if width <= 64:
            for stages, blocks, height in ((6, 1, 64), (4, 2, 64), (4, 1, 128)):
                yield ExpertsPlan(width, height, 2, stages, blocks)
        if width >= 64:
            for height, stages in LARGE[width]:
                yield ExpertsPlan(width, height, 1, stages)
                yield ExpertsPlan(width, height, 1, stages, cluster=2)


def plan(picks: int, experts: int) -> ExpertsPlan:
    """The plan where nothing was measured (H100, 2026-11-28; pairs took half as long again then)."""
    if picks < experts / 2:
        return ExpertsPlan(8, 64, 2, 4, 2)  # few items, which two blocks of a multiprocessor share better
    each = picks / experts
    width = next((w for w in WIDTHS if w >= 2 * each), WIDTHS[-1])
    if width <= 64:
        return ExpertsPlan(width, 128, 2, 4)
    height, stages = LARGE[width][0]
    return ExpertsPlan(width, height, 1, stages)


def routes(tokens: int, routing: Routing) -> bool:
    """Whether `routed` takes so many tokens: few, whose picks one block sorts in no time."""
    few = tokens * routing.top <= MOST_PICKS and route_bytes(tokens, routing) <= hopper.SHARED
    return few and routing.experts <= MOST_EXPERTS and routing.top <= 32 and routing.groups <= 32


def route_bytes(tokens: int, routing: Routing) -> int:
    """Shared memory of a block that routes."""
    each = 3 + WARPS * (routing.groups > 1) + -(-tokens // 32)
    return 4 * (each * routing.experts + (WARPS + tokens) * routing.top + WARPS)


def routed(logits: Tensor, routing: Routing, width: int, turns: Tensor | None = None) -> tuple[Tensor, Sorted]:
    """As `ops.route.route` for logits [T, experts] float32, contiguous, with picks sorted into tiles of `width`:
    weights [T, top] float32. csrc/route.cu; there must be a token. The list holds what `Sorted.count` says, no more.
    turns [experts] int32: the order in which experts come, where it is another.
    """
    tokens, top = len(logits), routing.top
    picks = tokens * top
    blocks = next(n for n in (1, 2, 4, MOST_ROUTERS) if n * WARPS >= tokens or n == MOST_ROUTERS)
    weights = logits.new_empty(tokens, top)
    order, count = (torch.empty(n, dtype=torch.int32, device=logits.device) for n in (picks, 1))
    tiles = torch.empty(most_tiles(picks, routing.experts, width), 4, dtype=torch.int32, device=logits.device)
    macros = {
        "EXPERTS": routing.experts,
        "TOP": top,
        "SIGMOID": int(routing.score == "sigmoid"),
        "NORMED": int(routing.normed),
        "GROUPS": routing.groups,
        "KEPT": routing.kept,
        "BEST": routing.best,
        "WIDTH": width,
        "WARPS": WARPS,
        "CLUSTER": int(blocks > 1),
    }
    shared = route_bytes(tokens, routing)
    arguments: list[nvrtc.Argument] = [logits, routing.bias, turns, weights, order, tiles, count]
    arguments += [float(routing.scale), tokens]
    kernel = nvrtc.load("route.cu", "route", tuple(macros.items()))
    kernel((blocks, 1, 1), WARPS * 32, shared, arguments, dependent=True, cluster=blocks)
    return weights, Sorted(order, tiles, count)


def gather(x: Tensor, by: Sorted, shares: Tensor) -> Tensor:
    """The tokens of all picks, by place. x contiguous, its columns whole eights."""
    cols, picks = x.shape[1], shares.numel()
    out = x.new_empty(picks, cols)
    _around("gather", x, shares.shape[1])((picks, 1, 1), 256, 0, [x, by.order, out, cols // 8], dependent=True)
    return out


def summed(parts: Tensor, residual: Tensor | None, top: int) -> Tensor:
    """The sum of each token's `top` parts, and the residual: [T, rows], whole eights of rows."""
    picks, rows = parts.shape
    out = parts.new_empty(picks // top, rows)
    arguments: list[nvrtc.Argument] = [parts, residual, out, rows // 8]
    _around("add_up", parts, top)((len(out), 1, 1), 256, 0, arguments, dependent=True)
    return out


def _around(entry: str, x: Tensor, top: int) -> nvrtc.Kernel:
    return nvrtc.load("picks.cu", entry, (("HALF", nvrtc.HALF[x.dtype]), ("TOP", top)))


def products(
    chosen: ExpertsPlan, sms: int, gathered: Tensor, by: Sorted, shares: Tensor, gate_up: Tensor, down: Tensor, act: str
) -> Tensor:
    """What each pick gives, times its weight: [T * K, rows]."""
    halfway = gathered.new_empty(len(gathered), down.shape[2])
    parts = gathered.new_empty(len(gathered), down.shape[1])
    product(chosen, sms, gathered, gate_up, halfway, by, shares, act)
    product(chosen, sms, halfway, down, parts, by, shares, None)
    return parts


def product(
    chosen: ExpertsPlan,
    sms: int,
    x: Tensor,
    w: Tensor,
    out: Tensor,
    by: Sorted,
    shares: Tensor,
    act: str | None,
) -> None:
    """One way: x and out by place, but out by pick without a gate."""
    _, rows, cols = w.shape
    gate = nvrtc.GATES[act]
    kernel = nvrtc.load(
        "experts.cu",
        "experts",
        (
            ("HALF", nvrtc.HALF[x.dtype]),
            ("GATE", gate),
            ("FLOAT32", 0),
            ("N", chosen.width),
            ("ROWS", chosen.height),
            ("BOXES", chosen.boxes),
            ("STAGES", chosen.stages),
            ("BLOCKS", chosen.blocks),
            ("CLUSTER", chosen.cluster),
            ("DOWN", int(not gate)),
        ),
    )
    w_map = nvrtc.tensor_map(slabs(w), slab_box(chosen.height)) if gate else nvrtc.tensor_map(w, chosen.height)
    maps = w_map, nvrtc.tensor_map(x, box(chosen.width, chosen.cluster))
    arguments: list[nvrtc.Argument] = [*maps, out, by.tiles, by.count, by.order, shares, rows, cols]
    height = chosen.height // 2 if gate else chosen.height
    most = len(by.tiles) * -(-(rows // 2 if gate else rows) // height)
    launch(kernel, most, sms, chosen.blocks, chosen.cluster, chosen.height * 2 + 32, shared_bytes(chosen), arguments)


def launch(
    kernel: nvrtc.Kernel,
    items: int,
    sms: int,
    blocks: int,
    cluster: int,
    threads: int,
    shared: int,
    arguments: Sequence[nvrtc.Argument],
) -> None:
    """As many blocks as run at the same time, which take items in turn: a cluster that had to wait for others to end
    would double the time.
    """
    room = sms * blocks // cluster
    if cluster > 1:
        room = min(room, kernel.clusters(threads, shared, cluster))
    count = min(-(-items // cluster), room) * cluster
    kernel((count, 1, 1), threads, shared, arguments, dependent=True, cluster=cluster)
