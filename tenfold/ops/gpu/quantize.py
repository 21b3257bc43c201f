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


def fits(x: Tensor) -> bool:
    """Whether tokens [T, cols] can be rounded here."""
    return x.is_cuda and bool(len(x)) and x.shape[1] <= MOST_COLS and x.shape[1] % 8 == 0 and x.is_contiguous()


def quantize(x: Tensor, norm: Norm | None = None) -> tuple[Tensor, Tensor]:
    """x [T, cols] bfloat16 or float16, normed where there is a norm -> float8_e4m3fn codes [T, cols], float32 scales
    [T]: the largest of a token becomes 448.
    """
    return _launch(x, len(x), norm)


def for_tiles(x: Tensor, order: Tensor | None = None, top: int = 1) -> tuple[Tensor, Tensor]:
    """The same with columns as products of tiles take them (ops/tiles.py): of every 16, number 4 t + 2 c + h is column
    2 t + 8 h + c. order: of picks [P] int32, `top` of a token, each of which is its token. cols: whole sixteens.
    """
    return _launch(x, len(x) if order is None else len(order), None, 1, order, top)


def for_nibbles(x: Tensor, norm: Norm | None = None) -> tuple[Tensor, Tensor]:
    """The same in the order of columns of csrc/w4a8.cu, filled up with zeros to whole 128, and float32 [T, 2]: scales,
    and the sums of the codes of tokens.
    """
    return _launch(x, len(x), norm, 2)


def _launch(
    x: Tensor, rows: int, norm: Norm | None, tiles: int = 0, order: Tensor | None = None, top: int = 1
) -> tuple[Tensor, Tensor]:
    cols = x.shape[1]
    whole, numbers = (-(-cols // GROUP) * GROUP, (rows, 2)) if tiles == 2 else (cols, (rows,))
    codes = torch.empty(rows, whole, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(numbers, dtype=torch.float32, device=x.device)
    vectors = -(-whole // (8 * THREADS))
    macros = {
        "HALF": nvrtc.HALF[x.dtype],
        "NORM": int(norm is not None),
        "VECTORS": vectors,
        "TILES": tiles,
        "TOP": top,
    }
    kernel = nvrtc.load("quantize.cu", "quantize", tuple(macros.items()))
    weight, eps = (None, 0.0) if norm is None else (norm.weight, float(norm.eps))
    kernel((rows, 1, 1), THREADS, 0, [x, weight, codes, scales, order, eps, cols], dependent=True)
    return codes, scales
