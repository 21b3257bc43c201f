"""Linear operations of up to 64 tokens on packed weights, whose codes come through a ring in shared memory:
csrc/ring_packed.cu.

Takes the formats of ops/formats.py whose groups are multiples of 128 columns, or whole rows, without a column order.
Codes become exact numbers in registers, a group's sum is scaled in float32: no weight is rounded, and activations keep
their 16 bits. A norm runs before; bias, gate and residual are fused.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.ops.formats import Format, format_of, packed_of
from tenfold.ops.gpu import hopper, nvrtc, stream_packed
from tenfold.ops.gpu import norm as norms
from tenfold.ops.gpu.ring import MOST_TOKENS, RingPlan, can_meet, grid, parts, width
from tenfold.ops.gpu.sums import Workspace
from tenfold.ops.kernels import Norm
from tenfold.ops.matrix import Matrix

CODES = {"ring4": ("int4",), "ring8": ("int8", "fp8")}  # what each kind of plan reads
BITS = {"ring4": 4, "ring8": 8}
ALIGN = {"ring4": 32, "ring8": 16}  # columns in 16 bytes, which rows are multiples of
STEP_BYTES = 128  # of a row's codes, in a stage
# Blocks of a multiprocessor, rows of a tile, and how many blocks its shared memory must hold: where that is more than
# the first, the next kernel's blocks begin beside this one's.
SIZES = ((1, 64, 1), (1, 64, 2), (2, 64, 2), (1, 128, 1), (1, 192, 1), (1, 256, 1))
LEAST_STAGES, MOST_STAGES = 3, 8


@dataclass(frozen=True, slots=True)
class PackedPlan(RingPlan):
    """As RingPlan, of a kind of CODES, with tiles of 64, 128, 192 or 256 rows: the more, the less often tokens are read
    from the L2 cache.
    """

    kind: str = "ring4"

    @property
    def step_cols(self) -> int:
        return STEP_BYTES * 8 // BITS[self.kind]

    @property
    def threads(self) -> int:
        """Of a block: a warpgroup for 64 rows, and a warp that brings codes, with a large tile a warpgroup."""
        return self.height * 2 + (128 if self.height > 128 else 32)


def parse(name: str) -> PackedPlan:
    """The plan `str(plan)` names. Raises ValueError."""
    found = parts(name, CODES, (64, 128, 192, 256))
    if found is None or found.inputs:
        raise ValueError(f"{name!r} is no ring plan for codes; allowed: ring4:SxBxR or ring8:SxBxR, then :even or :sN.")
    return PackedPlan(found.stages, found.blocks, found.height, found.splits, found.kind)


def kind_of(format: str) -> str:
    """The kind of plan that reads matrices of this format, empty where none does."""
    return stream_packed.kind_of(format, CODES)


def stage_bytes(plan: PackedPlan, tokens: int) -> int:
    """Codes of a tile's rows and the tokens' columns beside them."""
    return STEP_BYTES * plan.height + width(tokens) * plan.step_cols * 2


def shared_bytes(plan: PackedPlan, tokens: int) -> int:
    """Dynamic shared memory of one block."""
    return 1024 + plan.stages * (stage_bytes(plan, tokens) + 16) + 16


def legal(plan: PackedPlan, tokens: int, rows: int, cols: int) -> bool:
    """Whether the plan can run a product of these sizes."""
    if not 1 <= tokens <= MOST_TOKENS or cols % ALIGN[plan.kind] or plan.stages < 2:
        return False
    fits = fits_registers(plan, tokens) and hopper.fits(shared_bytes(plan, tokens), plan.blocks)
    return fits and can_meet(plan, tokens, rows, cols)


def fits_registers(plan: PackedPlan, tokens: int) -> bool:
    """Whether the kernel is compiled without spilling registers (CUDA 13.0)."""
    if plan.blocks > 1:
        return plan.height == 64 and width(tokens) <= 32
    return plan.height < 256 or width(tokens) <= 32


def candidates(kind: str, tokens: int, rows: int, cols: int, sms: int) -> Iterator[PackedPlan]:
    """Plans worth timing: as many stages as fit, whole tiles and parts of them."""
    found: dict[PackedPlan, None] = {}
    for blocks, height, beside in SIZES:
        tiles, room = -(-rows // height), sms * blocks
        for splits in (1, 0, room // tiles) if tiles < room else (1, 0):
            for stages in range(MOST_STAGES, LEAST_STAGES - 1, -1):
                plan = PackedPlan(stages, blocks, height, splits, kind)
                if hopper.fits(shared_bytes(plan, tokens), beside) and legal(plan, tokens, rows, cols):
                    found[plan] = None
                    break
    yield from found


def rule(kind: str, tokens: int, rows: int, cols: int, sms: int) -> PackedPlan | None:
    """The plan where nothing was measured (H100, 2026-11-28): large tiles for many rows, else parts of tiles for every
    multiprocessor, with as many stages as fit. None: no plan is legal.
    """
    tiles, few = -(-rows // 64), width(tokens) <= 32
    if tiles > 2 * sms:
        blocks, height, splits = 1, 256 if few else 128, 1
    else:
        blocks, height = 2 if few and (width(tokens) <= 16 or tiles < 0.7 * sms) else 1, 64
        splits = max(1, sms * blocks // tiles)
    plans = (PackedPlan(stages, blocks, height, splits, kind) for stages in range(MOST_STAGES, LEAST_STAGES - 1, -1))
    return next((plan for plan in plans if legal(plan, tokens, rows, cols)), None)


def run(
    plan: PackedPlan,
    workspace: Workspace,
    sms: int,
    x: Tensor,
    w: Matrix,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
    float32: bool = False,
) -> Tensor:
    """As `Kernels.linear` with a matrix whose format the plan's kind reads; the plan must be legal. float32: the
    result's type.
    """
    if norm is not None:
        x = norms.run(x, norm)
    tokens, cols = x.shape
    gate, packed = nvrtc.GATES[act], packed_of(w)
    height, outputs = (plan.height // 2, w.rows // 2) if gate else (plan.height, w.rows)
    out = x.new_empty(tokens, outputs, dtype=torch.float32 if float32 else x.dtype)
    macros = defines(plan, format_of(w.format), packed.scales.dtype, x.dtype, width(tokens), gate)
    kernel = nvrtc.load("ring_packed.cu", "ring_packed", (*macros, ("FLOAT32", int(float32))))
    w_map = nvrtc.tensor_map(packed.codes.view(torch.uint8), height)
    x_map = nvrtc.tensor_map(x, width(tokens))
    arguments: list[nvrtc.Argument] = [w_map, x_map, packed.scales, packed.zeros, out, bias, residual]
    arguments += [workspace.sums, workspace.counters, tokens, w.rows, cols]
    blocks = grid(plan, w.rows, cols, sms)
    kernel((blocks, 1, 1), plan.threads, shared_bytes(plan, tokens), arguments, dependent=True)
    return out


def defines(
    plan: PackedPlan, format: Format, scales: torch.dtype, dtype: torch.dtype, tokens: int, gate: int
) -> tuple[tuple[str, int], ...]:
    """Macros of the kernel; tokens: of the instruction."""
    return (
        *stream_packed.format_macros(format, scales),
        ("HALF", nvrtc.HALF[dtype]),
        ("N", tokens),
        ("STAGES", plan.stages),
        ("BLOCKS", plan.blocks),
        ("GATE", gate),
        ("ROWS", plan.height),
        ("SPLIT", int(plan.splits != 1)),
    )
