"""What a layer's experts give together, in terms of `Kernels.linear`: the meaning, for any matrices on any device.

It asks the device which experts have tokens, so it waits for it, and no graph can hold it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tenfold.ops.matrix import Experts

if TYPE_CHECKING:
    from tenfold.ops.kernels import Kernels


def experts(
    kernels: "Kernels",
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    own: Experts,
    residual: Tensor | None = None,
) -> Tensor:
    """As `Kernels.experts`. Sums are float32 and rounded once."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    places = ids.flatten().sort(stable=True)
    tokens = places.indices // ids.shape[1]
    shares = weights.flatten()[places.indices, None].float()
    counts = torch.bincount(places.values, minlength=len(own)).tolist()
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = tokens[start : start + count]
            inner = kernels.linear(x[rows], own.gate_up.each[expert], act=own.act)
            part = kernels.linear(inner, own.down.each[expert]).float()
            out.index_add_(0, rows, part * shares[start : start + count])
            start += count
    return out.to(x.dtype) if residual is None else (out + residual.float()).to(x.dtype)
