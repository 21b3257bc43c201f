"""What tests of experts' emulated kernels share."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.rounding import UNIT

grouped = pytest.importorskip("tenfold.ops.gemm.grouped")
ACTS = {"silu": F.silu, "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh")}


def sorted_picks(sizes: tuple[int, ...], width: int, turns: Tensor | None = None) -> "grouped.Sorted":
    """So many picks of each expert, one a token, in tiles of `width`."""
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    mixed = torch.randperm(len(ids), generator=torch.Generator().manual_seed(len(ids)))
    found: grouped.Sorted = grouped.sort(ids[mixed][:, None], len(sizes), width, turns)
    return found


def experts_of(by: "grouped.Sorted") -> Tensor:
    """Of each place [picks] int64."""
    expert, first, end, _ = by.tiles[: int(by.count)].T.long()
    assert int(first[0]) == 0
    assert torch.equal(first[1:], end[:-1])
    return torch.repeat_interleave(expert, end - first)


def check(found: Tensor, x: Tensor, w: Tensor, by: "grouped.Sorted", shares: Tensor, act: str | None) -> None:
    """What a product stores [picks, outputs] against float64, pick by pick. x by place; w [experts, rows, cols]; with a
    gate results lie by place, else by pick, times its share.
    """
    sums = torch.stack([w[expert].double() @ each for expert, each in zip(experts_of(by), x.double())])
    if act is None:
        wanted = torch.empty_like(sums)
        wanted[by.order.long()] = sums * shares.double()[by.order.long()]
    else:
        gate, up = sums.chunk(2, 1)
        wanted = ACTS[act](gate) * up
    roundings = 2 if act is None else 4  # of a sum and its product with the share; of gate, its activation, up, result
    errors = (found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert errors.max() <= roundings * UNIT[found.dtype]
