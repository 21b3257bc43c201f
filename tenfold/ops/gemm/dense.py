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
    float32: bool = False,
) -> Tensor:
    """As `Kernels.linear` with dense w [rows, cols] of x's type. float32: the result's type, where nothing follows the
    product and the device is a GPU.
    """
    if norm is not None:
        x = elementwise.norm(x, norm)
    if float32 and x.is_cuda and bias is None and act is None and residual is None:
        return torch.mm(x, w.t(), out_dtype=torch.float32)
    if residual is not None and act is None and bias is None:
        return torch.addmm(residual, x, w.t())
    y = F.linear(x, w, None if bias is None else bias.to(x.dtype))
    if act is not None:
        y = elementwise.act_mul(y, act)
    return y if residual is None else elementwise.add(y, residual)
