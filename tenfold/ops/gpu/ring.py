"""Linear operations of up to 64 tokens with weights in flight through a ring in shared memory: csrc/ring.cu.

x travels with the weights, and a norm runs before. Bias, gate and residual are fused. "ring-fp8" plans multiply float8
by float8: tokens are rounded to e4m3 with a scale each before (`quantize.py`).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tenfold.ops.formats import packed_of
from tenfold.ops.gpu import hopper, nvrtc
from tenfold.ops.gpu import norm as norms
from tenfold.ops.gpu.quantize import MOST_COLS, quantize
from tenfold.ops.gpu.sums import MOST_TILES, WORKSPACE, Workspace
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix

MOST_TOKENS = 64
BOX_BYTES = 128  # of a row; a stage has two such boxes, of the highest tiles one
HEIGHTS = (64, 128, 256)
FLOAT8 = "ring-fp8"
KINDS = {"ring": 16, FLOAT8: 8}  # bits of the numbers
SIZES = (
    (6, 1, 64),
    (8, 1, 64),
    (10, 1, 64),
    (5, 1, 64),
    (4, 2, 64),
    (3, 1, 128),
    (4, 1, 128),
    (5, 1, 128),
    (4, 1, 256),
)
FEW_INPUTS = ((4, 2), (5, 2))  # stages, and those of tokens, where the next kernel's block is to fit beside
SHARED_SIZES = ((5, 1, 256), (4, 1, 256), (4, 1, 128))  # of plans whose blocks share tiles in clusters
CLUSTERS = (8, 4, 2)
STORED = 8  # rows that a thread stores together
MOST_SMS = 256  # multiprocessors, more than any GPU has


@dataclass(frozen=True, slots=True)
class RingPlan:
    """stages of the ring, blocks of a multiprocessor, rows of a tile (of HEIGHTS), and how work is dealt out: splits 1:
    whole tiles; n: every tile to n blocks; 0: equal parts to all blocks there are. kind: of KINDS. cluster: blocks that
    have a tile together and add up in shared memory; then splits is 1. inputs: stages of tokens, 0 for as many as of w.
    """

    stages: int
    blocks: int
    height: int = 64
    splits: int = 1
    kind: str = "ring"
    cluster: int = 1
    inputs: int = 0

    @property
    def step_cols(self) -> int:
        return boxes(self.height) * BOX_BYTES * 8 // KINDS[self.kind]

    def __str__(self) -> str:
        dealt = {0: ":even", 1: ""}.get(self.splits, f":s{self.splits}")
        dealt += f":c{self.cluster}" * (self.cluster > 1) + f":x{self.inputs}" * (self.inputs > 0)
        return f"{self.kind}:{self.stages}x{self.blocks}x{self.height}{dealt}"


def parse(name: str) -> RingPlan:
    """The plan `str(plan)` names. Raises ValueError."""
    whole, _, cluster = name.partition(":c")
    found = parts(whole, KINDS, HEIGHTS)
    if found is None or cluster not in ("", *map(str, CLUSTERS)) or (cluster and (found.splits != 1 or found.inputs)):
        raise ValueError(
            f"{name!r} is no ring plan; allowed: ring:SxBxR or ring-fp8:SxBxR, then :cN, or :even or :sN, then :xN "
            "with N below S."
        )
    return replace(found, cluster=int(cluster or 1))


def parts(name: str, kinds: Iterable[str], heights: Iterable[int]) -> RingPlan | None:
    """The plan, without a cluster, of which `str` makes this name; None for another name."""
    sizes = rf"(\d+)x(\d+)x({'|'.join(map(str, heights))})"
    found = re.fullmatch(rf"({'|'.join(kinds)}):{sizes}(?::(even)|:s(\d+))?(?::x(\d+))?", name)
    if not found:
        return None
    kind, stages, blocks, height, even, splits, inputs = found.groups()
    plan = RingPlan(int(stages), int(blocks), int(height), 0 if even else int(splits or 1), kind)
    if inputs is None:
        return plan
    return replace(plan, inputs=int(inputs)) if 0 < int(inputs) < plan.stages else None


def boxes(height: int) -> int:
    """Of a stage."""
    return 1 if height == HEIGHTS[-1] else 2


def width(tokens: int) -> int:
    """Tokens of the instruction the kernel is compiled for."""
    return max(8, 1 << (tokens - 1).bit_length())


def shared_bytes(plan: RingPlan, tokens: int, cols: int) -> int:
    """Dynamic shared memory of one block."""
    n, row = width(tokens), boxes(plan.height) * BOX_BYTES
    ring = plan.stages * (row * plan.height + 16) + (plan.inputs or plan.stages) * row * n
    if plan.cluster > 1:  # sums take the place of stages
        return 1024 + ring
    stored = n // 2 if n == MOST_TOKENS and (plan.height == HEIGHTS[-1] or plan.inputs) else n  # tokens at a time
    return 1024 + ring + stored * (plan.height + 4) * 4 + 16


def grid(plan: RingPlan, rows: int, cols: int, sms: int) -> int:
    """Blocks of a launch over a w of so many rows."""
    tiles, room = -(-rows // plan.height), sms * plan.blocks
    if plan.cluster > 1:
        return tiles * plan.cluster
    if plan.splits == 0:
        return min(room, tiles * -(-cols // plan.step_cols))
    return min(tiles, room) if plan.splits == 1 else tiles * plan.splits


def legal(plan: RingPlan, tokens: int, rows: int, cols: int) -> bool:
    """Whether the plan can run a product of these sizes."""
    if not 1 <= tokens <= MOST_TOKENS or cols % (128 // KINDS[plan.kind]) or plan.stages < 2:
        return False
    if plan.kind == FLOAT8 and cols > MOST_COLS:
        return False
    if plan.height // 2 < STORED * plan.cluster:
        return False
    together = 2 * plan.blocks if plan.inputs else plan.blocks  # few stages of tokens are for the next kernel
    return can_meet(plan, tokens, rows, cols) and hopper.fits(shared_bytes(plan, tokens, cols), together)


def can_meet(plan: RingPlan, tokens: int, rows: int, cols: int) -> bool:
    """Whether there are as many steps as parts, and room where the blocks of a tile leave their sums."""
    if max(plan.splits, plan.cluster) > -(-cols // plan.step_cols) or -(-rows // plan.height) > MOST_TILES:
        return False
    sums = 0 if plan.splits == 1 else 2 * grid(plan, rows, cols, MOST_SMS) * plan.height * width(tokens) * 4
    return sums <= WORKSPACE


def candidates(tokens: int, rows: int, cols: int, sms: int, kind: str = "ring") -> Iterator[RingPlan]:
    """Plans worth timing."""
    sizes = [(*size, 0) for size in SIZES]
    if tokens > 16:
        sizes += [(stages, 1, HEIGHTS[0], inputs) for stages, inputs in FEW_INPUTS]
    for stages, blocks, height, inputs in sizes:
        tiles, room = -(-rows // height), sms * blocks
        for splits in (1, 0, room // tiles) if tiles < room else (1,):
            plan = RingPlan(stages, blocks, height, splits, kind, inputs=inputs)
            if legal(plan, tokens, rows, cols):
                yield plan
    for stages, blocks, height in SHARED_SIZES:
        cluster = next((c for c in CLUSTERS if -(-rows // height) * c <= sms), 1)
        plan = RingPlan(stages, blocks, height, 1, kind, cluster)
        if cluster > 1 and legal(plan, tokens, rows, cols):
            yield plan


def rule(tokens: int, rows: int, cols: int, sms: int) -> RingPlan | None:
    """The plan where nothing was measured (steps of Llama-3-8B on an H200, 2026-11-29). None: the library is as fast or
    faster, as with many tokens and few rows.
    """
    few = -(-rows // 64) < 0.7 * sms
    if few and tokens > 16:
        plan = RingPlan(8, 1) if tokens <= 32 and cols <= rows else None
    elif few:
        plan = RingPlan(8, 1, splits=2)
    elif rows < 128 * sms:
        plan = RingPlan(4, 1, 128, cluster=2) if tokens <= 16 and -(-rows // 128) * 2 <= sms else RingPlan(6, 1)
    elif tokens <= 16:
        plan = RingPlan(4, 1, 256)
    else:
        plan = RingPlan(5 if tokens <= 32 else 4, 1, 128)
    return plan if plan is not None and legal(plan, tokens, rows, cols) else None


def rule_fp8(tokens: int) -> RingPlan:
    """The same for float8 by float8, legal or not."""
    return RingPlan(10 if tokens <= 16 else 5, 1, kind=FLOAT8)


def run(
    plan: RingPlan,
    workspace: Workspace,
    sms: int,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
    float32: bool = False,
) -> Tensor:
    """As `Kernels.linear` with dense w [rows, cols]; the plan must be legal. float32: the result's type."""
    if norm is not None:
        x = norms.run(x, norm)
    return launch(plan, workspace, sms, x, x, w, None, None, bias, act, residual, float32)


def run_fp8(
    plan: RingPlan,
    workspace: Workspace,
    sms: int,
    x: Tensor,
    w: Matrix,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `Kernels.linear` with a matrix that `quantize.takes` accepts; the plan must be legal, of kind "ring-fp8"."""
    codes, scales = quantize(x, norm)
    packed = packed_of(w)
    return launch(plan, workspace, sms, x, codes, packed.codes, packed.scales, scales, bias, act, residual)


def launch(
    plan: RingPlan,
    workspace: Workspace,
    sms: int,
    x: Tensor,
    inputs: Tensor,
    w: Tensor,
    row_scales: Tensor | None,
    token_scales: Tensor | None,
    bias: Tensor | None,
    act: str | None,
    residual: Tensor | None,
    float32: bool = False,
) -> Tensor:
    """x: of the result's type, unless that is float32. inputs: x, or its codes with token_scales [T]. row_scales [rows,
    groups] of w.
    """
    tokens, cols = inputs.shape
    rows, gate = w.shape[0], nvrtc.GATES[act]
    height, outputs = (plan.height // 2, rows // 2) if gate else (plan.height, rows)
    out = x.new_empty(tokens, outputs, dtype=torch.float32 if float32 else x.dtype)
    kernel = nvrtc.load(
        "ring.cu",
        "ring",
        (
            ("BITS", KINDS[plan.kind]),
            ("HALF", nvrtc.HALF[x.dtype]),
            ("N", width(tokens)),
            ("STAGES", plan.stages),
            ("X_STAGES", plan.inputs or plan.stages),
            ("BLOCKS", plan.blocks),
            ("GATE", gate),
            ("ROWS", plan.height),
            ("SPLIT", int(plan.splits != 1)),
            ("CLUSTER", plan.cluster),
            ("FLOAT32", int(float32)),
            ("GROUPED", int(row_scales is not None and row_scales.shape[1] > 1)),
        ),
    )
    w_map, x_map = nvrtc.tensor_map(w, height), nvrtc.tensor_map(inputs, width(tokens))
    arguments: list[nvrtc.Argument] = [w_map, x_map, row_scales, token_scales, out, bias, residual]
    arguments += [workspace.sums, workspace.counters, tokens, rows, cols]
    blocks, threads = grid(plan, rows, cols, sms), plan.height * 2 + 32
    shared = shared_bytes(plan, tokens, cols)
    kernel((blocks, 1, 1), threads, shared, arguments, dependent=True, cluster=plan.cluster)
    return out
