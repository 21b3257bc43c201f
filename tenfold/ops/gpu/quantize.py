"""Tokens rounded to float8 e4m3 in front of products of float8 by float8: csrc/quantize.cu."""

import torch
from torch import Tensor

from tenfold.ops.formats import format_of, is_format
from tenfold.ops.gpu import nvrtc
from tenfold.ops.kernels import Norm

GROUP = 128  # columns that may share a scale
THREADS = 256  # of a block that rounds a token
MOST_COLS = THREADS * 8 * 16  # a token in registers


def takes(format: str) -> bool:
    """Whether matrices of this format can be read."""
    if not is_format(format):
        return False
    found = format_of(format)
    return found.kind == "fp8" and found.activations == 8 and not found.order and found.group in (0, GROUP)


def quantize(x: Tensor, norm: Norm | None = None) -> tuple[Tensor, Tensor]:
    """x [T, cols] bfloat16 or float16, normed where there is a norm -> float8_e4m3fn codes [T, cols], float32 scales
    [T]: the largest of a token becomes 448.
    """
    tokens, cols = x.shape
    codes = torch.empty(tokens, cols, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    vectors = -(-cols // (8 * THREADS))
    kernel = nvrtc.load("quantize.cu", "quantize", quantize_defines(x.dtype, norm is not None, vectors))
    weight, eps = (None, 0.0) if norm is None else (norm.weight, float(norm.eps))
    kernel((tokens, 1, 1), THREADS, 0, [x, weight, codes, scales, eps, cols], dependent=True)
    return codes, scales


def quantize_defines(dtype: torch.dtype, norm: bool, vectors: int) -> tuple[tuple[str, int], ...]:
    return (("HALF", nvrtc.HALF[dtype]), ("NORM", int(norm)), ("VECTORS", vectors))
