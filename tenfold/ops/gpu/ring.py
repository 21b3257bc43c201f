"""Linear operations of up to 64 tokens with weights in flight through a ring in shared memory: csrc/ring.cu.

`held` plans keep all of x in shared memory and fuse the RMS norm before (up to 8 tokens in bfloat16); the others let x
travel with the weights, and a norm runs before them. Bias, gate and residual are fused either way. "ring-fp8" plans
multiply float8 by float8: tokens are rounded to e4m3 with a scale each before (`quantize.py`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.ops.formats import packed_of
from tenfold.ops.gpu import norm as norms
from tenfold.ops.gpu import nvrtc
from tenfold.ops.gpu.quantize import MOST_COLS, quantize
from tenfold.ops.gpu.stream import GATES, MOST_TILES, SHARED, SHARED_SM, WORKSPACE, Workspace
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix

MOST_TOKENS = 64
STEP_BYTES = 256  # of a row, in a stage
FLOAT8 = "ring-fp8"
KINDS = {"ring": 16, FLOAT8: 8}  # bits of the numbers
MOST_SMS = 256  # multiprocessors, more than any GPU has
MOST_HELD = 8  # tokens: of more, staging them takes longer than a norm before


@dataclass(frozen=True, slots=True)
class RingPlan:
    """stages of the ring, blocks of a multiprocessor, whether x is held in shared memory, rows of a tile (64 or 128),
    and how work is dealt out: splits 1: whole tiles; n: every tile to n blocks; 0: equal parts to all blocks there are.
    kind: of KINDS.
    """

    stages: int
    blocks: int
    held: bool = False
    height: int = 64
    splits: int = 1
    kind: str = "ring"

    @property
    def step_cols(self) -> int:
        return STEP_BYTES * 8 // KINDS[self.kind]

    def __str__(self) -> str:
        dealt = {0: ":even", 1: ""}.get(self.splits, f":s{self.splits}")
        return f"{self.kind}:{self.stages}x{self.blocks}x{self.height}{':held' if self.held else ''}{dealt}"


def parse(name: str) -> RingPlan:
    """The plan `str(plan)` names. Raises ValueError."""
    found = re.fullmatch(r"(ring|ring-fp8):(\d+)x(\d+)x(64|128)(:held)?(?::(even)|:s(\d+))?", name)
    if not found:
        raise ValueError(
            f"{name!r} is no ring plan; allowed: ring:SxBxR or ring-fp8:SxBxR, then :held, then :even or :sN."
        )
    kind, stages, blocks, height, held, even, splits = found.groups()
    return RingPlan(int(stages), int(blocks), bool(held), int(height), 0 if even else int(splits or 1), kind)


def width(tokens: int) -> int:
    """Tokens of the instruction the kernel is compiled for."""
    return max(8, 1 << (tokens - 1).bit_length())


def shared_bytes(plan: RingPlan, tokens: int, cols: int) -> int:
    """Dynamic shared memory of one block."""
    n = width(tokens)
    stage = 2 * plan.height * 128 + (0 if plan.held else 2 * n * 128)
    held = -(-cols // plan.step_cols) * 2 * n * 128 if plan.held else 0
    return 1024 + plan.stages * (stage + 16) + held + n * (plan.height + 5) * 4 + 16


def grid(plan: RingPlan, rows: int, cols: int, sms: int) -> int:
    """Blocks of a launch over a w of so many rows."""
    tiles, room = -(-rows // plan.height), sms * plan.blocks
    if plan.splits == 0:
        return min(room, tiles * -(-cols // plan.step_cols))
    return min(tiles, room) if plan.splits == 1 else tiles * plan.splits


def legal(plan: RingPlan, tokens: int, rows: int, cols: int) -> bool:
    """Whether the plan can run a product of these sizes (a held plan with a norm only in bfloat16)."""
    if not 1 <= tokens <= (MOST_HELD if plan.held else MOST_TOKENS) or cols % (128 // KINDS[plan.kind]):
        return False
    if plan.kind == FLOAT8 and (plan.held or cols > MOST_COLS):
        return False
    if plan.splits > -(-cols // plan.step_cols) or -(-rows // plan.height) > MOST_TILES:
        return False
    sums = 0 if plan.splits == 1 else 2 * grid(plan, rows, cols, MOST_SMS) * plan.height * width(tokens) * 4
    shared = shared_bytes(plan, tokens, cols)
    return shared <= SHARED and (shared + 1024) * plan.blocks <= SHARED_SM and sums <= WORKSPACE


def candidates(tokens: int, rows: int, cols: int, sms: int, kind: str = "ring") -> Iterator[RingPlan]:
    """Plans worth timing."""
    narrow = ((6, 1), (4, 2), (8, 1), (10, 1), (3, 2), (5, 1))
    sizes = [(s, b, 64) for s, b in narrow] + [(4, 1, 128), (3, 1, 128), (5, 1, 128), (2, 2, 128)]
    tiles = [-(-rows // height) for height in (64, 128)]
    for stages, blocks, height in sizes:
        aligned = sms * blocks // tiles[height == 128]
        for splits in dict.fromkeys((1, 0, aligned)):
            for held in (True, False):
                plan = RingPlan(stages, blocks, held, height, splits, kind)
                if legal(plan, tokens, rows, cols):
                    yield plan


def rule(tokens: int, rows: int, cols: int, sms: int) -> RingPlan | None:
    """The plan where nothing was measured (H100, 2026-11-28). None: the library is as fast or faster, as with many
    tokens and few rows.
    """
    few = -(-rows // 64) < 0.7 * sms
    if tokens > 16:
        plan = RingPlan(6, 1)
    else:
        plan = RingPlan(8, 1, splits=2 if few else 1)
    return plan if legal(plan, tokens, rows, cols) and not (few and tokens > 16) else None


def rule_fp8(tokens: int) -> RingPlan:
    """The same for float8 by float8, legal or not."""
    return RingPlan(10 if tokens <= 16 else 5, 1, kind=FLOAT8)


class Maps:
    """Tensor maps of weight matrices, made once for each."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], nvrtc.TensorMap] = {}

    def of(self, matrix: Tensor, height: int) -> nvrtc.TensorMap:
        key = (matrix.data_ptr(), matrix.dtype, *matrix.shape, height)  # memory is used again
        if key not in self._known:
            self._known[key] = nvrtc.TensorMap(matrix, height)
        return self._known[key]


def run(
    plan: RingPlan,
    maps: Maps,
    workspace: Workspace,
    sms: int,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `Kernels.linear` with dense w [rows, cols]; the plan must be legal."""
    if norm is not None and not (plan.held and x.dtype == torch.bfloat16):
        x, norm = norms.run(x, norm), None
    return launch(plan, maps, workspace, sms, x, x, w, None, None, bias, norm, act, residual)


def run_fp8(
    plan: RingPlan,
    maps: Maps,
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
    return launch(plan, maps, workspace, sms, x, codes, packed.codes, packed.scales, scales, bias, None, act, residual)


def launch(
    plan: RingPlan,
    maps: Maps,
    workspace: Workspace,
    sms: int,
    x: Tensor,
    inputs: Tensor,
    w: Tensor,
    row_scales: Tensor | None,
    token_scales: Tensor | None,
    bias: Tensor | None,
    norm: Norm | None,
    act: str | None,
    residual: Tensor | None,
) -> Tensor:
    """x: of the result's type. inputs: x, or its codes, of which token_scales [T] and row_scales [rows, groups] are."""
    tokens, cols = inputs.shape
    rows, gate = w.shape[0], GATES[act]
    height, outputs = (plan.height // 2, rows // 2) if gate else (plan.height, rows)
    out = x.new_empty(tokens, outputs)
    kernel = nvrtc.load(
        "ring.cu",
        "ring",
        (
            ("BITS", KINDS[plan.kind]),
            ("HALF", nvrtc.HALF[x.dtype]),
            ("N", width(tokens)),
            ("STAGES", plan.stages),
            ("BLOCKS", plan.blocks),
            ("HELD", int(plan.held)),
            ("NORM", int(norm is not None)),
            ("GATE", gate),
            ("ROWS", plan.height),
            ("SPLIT", int(plan.splits != 1)),
            ("GROUPED", int(row_scales is not None and row_scales.shape[1] > 1)),
        ),
    )
    weight, eps = (None, 0.0) if norm is None else (norm.weight, float(norm.eps))
    w_map = maps.of(w, height)
    x_map = w_map if plan.held else nvrtc.TensorMap(inputs, width(tokens))
    arguments: list[nvrtc.Argument] = [w_map, x_map, x, row_scales, token_scales, out, bias, residual, weight]
    arguments += [workspace.sums, workspace.counters, eps, tokens, rows, cols]
    blocks, threads = grid(plan, rows, cols, sms), plan.height * 2 + 32
    kernel((blocks, 1, 1), threads, shared_bytes(plan, tokens, cols), arguments, dependent=True)
    return out
