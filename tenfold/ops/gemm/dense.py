"""The library's arm of a linear operation, for any number of tokens: norm, PyTorch's product (cuBLAS), gate.

Roundings are the oracle's but for a residual: the library adds it to the float32 sum, so the result is rounded once
where the oracle rounds twice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.ops import elementwise
from tenfold.ops.kernels import Norm


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `Kernels.linear` with dense w [rows, cols] of x's type."""
    if norm is not None:
        x = elementwise.norm(x, norm)
    if residual is not None and act is None and bias is None:
        return torch.addmm(residual, x, w.t())
    y = F.linear(x, w, None if bias is None else bias.to(x.dtype))
    if act is not None:
        y = elementwise.act_mul(y, act)
    return y if residual is None else elementwise.add(y, residual)
