"""Linear operations of up to 64 tokens with weights in flight through a ring in shared memory: csrc/ring.cu.

`held` plans keep all of x in shared memory and fuse the RMS norm before (up to 8 tokens in bfloat16); the others let x
travel with the weights, and a norm runs before them. Bias, gate and residual are fused either way.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.ops import elementwise
from tenfold.ops.gpu import nvrtc
from tenfold.ops.gpu.stream import GATES, SHARED, SHARED_SM
from tenfold.ops.kernels import Norm

MOST_TOKENS = 64
STEP_COLS = 128
PITCH = 68
MOST_HELD = 8  # tokens: of more, staging them takes longer than a norm before


@dataclass(frozen=True, slots=True)
class RingPlan:
    """stages of the ring, blocks of a multiprocessor, and whether x is held in shared memory."""

    stages: int
    blocks: int
    held: bool

    def __str__(self) -> str:
        return f"ring:{self.stages}x{self.blocks}{':held' if self.held else ''}"


def parse(name: str) -> RingPlan:
    """The plan `str(plan)` names. Raises ValueError."""
    kind, sizes, *rest = name.split(":")
    stages, _, blocks = sizes.partition("x")
    if kind != "ring" or rest not in ([], ["held"]):
        raise ValueError(f"{name!r} is no ring plan; allowed: ring:SxB or ring:SxB:held.")
    return RingPlan(int(stages), int(blocks), bool(rest))


def width(tokens: int) -> int:
    """Tokens of the instruction the kernel is compiled for."""
    return max(8, 1 << (tokens - 1).bit_length())


def shared_bytes(plan: RingPlan, tokens: int, cols: int) -> int:
    """Dynamic shared memory of one block."""
    n = width(tokens)
    stage = 2 * 8192 + (0 if plan.held else 2 * n * 128)
    held = -(-cols // STEP_COLS) * 2 * n * 128 if plan.held else 0
    return 1024 + plan.stages * (stage + 16) + held + n * (PITCH + 1) * 4


def legal(plan: RingPlan, tokens: int, rows: int, cols: int) -> bool:
    """Whether the plan can run a product of these sizes (a held plan with a norm only in bfloat16)."""
    if not 1 <= tokens <= (MOST_HELD if plan.held else MOST_TOKENS) or cols % 8:
        return False
    shared = shared_bytes(plan, tokens, cols)
    return shared <= SHARED and (shared + 1024) * plan.blocks <= SHARED_SM


def candidates(tokens: int, rows: int, cols: int) -> Iterator[RingPlan]:
    """Plans worth timing."""
    for stages, blocks in ((6, 1), (4, 2), (8, 1), (10, 1), (3, 2), (5, 1)):
        for held in (True, False):
            plan = RingPlan(stages, blocks, held)
            if legal(plan, tokens, rows, cols):
                yield plan


class Maps:
    """Tensor maps of weight matrices, made once for each."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int, int], nvrtc.TensorMap] = {}

    def of(self, matrix: Tensor, height: int) -> nvrtc.TensorMap:
        key = (matrix.data_ptr(), *matrix.shape, height)
        if key not in self._known:
            self._known[key] = nvrtc.TensorMap(matrix, height)
        return self._known[key]


def run(
    plan: RingPlan,
    maps: Maps,
    sms: int,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `Kernels.linear` with dense w [rows, cols]; the plan must be legal."""
    tokens, cols = x.shape
    rows = w.shape[0]
    gate = GATES[act]
    if norm is not None and not (plan.held and x.dtype == torch.bfloat16):
        x, norm = elementwise.norm(x, norm), None
    height, outputs = (32, rows // 2) if gate else (64, rows)
    out = x.new_empty(tokens, outputs)
    kernel = nvrtc.load(
        "ring.cu",
        "ring",
        (
            ("HALF", nvrtc.HALF[x.dtype]),
            ("N", width(tokens)),
            ("STAGES", plan.stages),
            ("BLOCKS", plan.blocks),
            ("HELD", int(plan.held)),
            ("NORM", int(norm is not None)),
            ("GATE", gate),
        ),
    )
    weight, eps = (None, 0.0) if norm is None else (norm.weight, float(norm.eps))
    w_map = maps.of(w, height)
    x_map = w_map if plan.held else nvrtc.TensorMap(x, width(tokens))
    blocks = min(-(-outputs // height), sms * plan.blocks)
    arguments: list[nvrtc.Argument] = [w_map, x_map, x, out, bias, residual, weight, eps, tokens, rows, cols]
    kernel((blocks, 1, 1), 160, shared_bytes(plan, tokens, cols), arguments, dependent=True)
    return out
