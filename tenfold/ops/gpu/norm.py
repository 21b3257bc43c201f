"""RMS norm in front of a linear operation: csrc/norm.cu, which lets the next kernel begin before it ends."""

import torch
from torch import Tensor

from tenfold.ops import elementwise
from tenfold.ops.gpu import nvrtc
from tenfold.ops.kernels import Norm

THREADS = 256
MOST_COLS = THREADS * 8 * 8  # a row in registers


def run(x: Tensor, norm: Norm) -> Tensor:
    """As `Kernels.norm`: x [T, D] bfloat16 or float16, contiguous."""
    tokens, cols = x.shape
    if not x.is_cuda or cols % 8 or cols > MOST_COLS:
        return elementwise.norm(x, norm)
    out = torch.empty_like(x)
    vectors = -(-cols // (8 * THREADS))
    kernel = nvrtc.load("norm.cu", "rms_norm", (("HALF", nvrtc.HALF[x.dtype]), ("VECTORS", vectors)))
    kernel((tokens, 1, 1), THREADS, 0, [x, norm.weight, out, float(norm.eps), cols], dependent=True)
    return out
