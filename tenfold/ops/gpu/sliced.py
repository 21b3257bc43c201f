"""Linear operations of up to 64 tokens whose columns the blocks of a cluster divide: csrc/ring8.cu on 16-bit numbers.

Each block holds its columns of all tokens in shared memory, so x is read once however many tiles there are. A norm runs
before; bias, gate and residual are fused. Sizes are those of `ring8` with two bytes to a column.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from tenfold.ops.gpu import norm as norms
from tenfold.ops.gpu import nvrtc, ring8
from tenfold.ops.gpu.ring import Maps, width
from tenfold.ops.gpu.ring8 import Ring8Plan
from tenfold.ops.gpu.stream import GATES
from tenfold.ops.kernels import Norm

KIND = "sliced"
LEAST_WORTH = 9  # tokens: fewer stream


def parse(name: str) -> Ring8Plan:
    """The plan `str(plan)` names. Raises ValueError."""
    kind, _, sizes = name.partition(":")
    try:
        if kind != KIND:
            raise ValueError
        return replace(ring8.parse(f"{ring8.KIND}:{sizes}"), kind=KIND)
    except ValueError:
        raise ValueError(f"{name!r} is no sliced plan; allowed: {KIND}:STAGESxSLICES, 1, 2, 4 or 8 slices.") from None


def legal(plan: Ring8Plan, tokens: int, rows: int, cols: int) -> bool:
    """Whether the plan can run a product of these sizes."""
    return ring8.legal(plan, tokens, rows, 2 * cols)


def candidates(tokens: int, rows: int, cols: int, sms: int) -> Iterator[Ring8Plan]:
    """Plans worth timing."""
    if tokens < LEAST_WORTH:
        return
    for plan in ring8.candidates(tokens, rows, 2 * cols, sms):
        yield replace(plan, kind=KIND)


def run(
    plan: Ring8Plan,
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
    if norm is not None:
        x = norms.run(x, norm)
    gate, rows = GATES[act], w.shape[0]
    height, outputs = (32, rows // 2) if gate else (64, rows)
    out = x.new_empty(tokens, outputs)
    kernel = nvrtc.load("ring8.cu", "ring8", ring8.defines(plan, x.dtype, tokens, gate, False))
    arguments: list[nvrtc.Argument] = [maps.of(w, height), nvrtc.TensorMap(x, width(tokens)), None, None]
    arguments += [out, bias, residual, tokens, rows, cols]
    blocks = min(ring8.pieces(outputs, height), ring8.clusters(plan, sms)) * plan.slices
    shared = ring8.shared_bytes(plan, tokens, 2 * cols)
    kernel((blocks, 1, 1), 160, shared, arguments, dependent=True, cluster=plan.slices)
    return out
