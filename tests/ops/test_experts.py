"""Experts: each token's sum over its picks, whoever has how many tokens, from dense and from packed matrices."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.ops.blocks import dequantize, quantize
from tenfold.ops.matrix import Experts, RawTensor
from tenfold.ops.oracle import ACTIVATIONS, Oracle

HIDDEN, INNER, EXPERTS = 64, 32, 5


def raw(name: str, data: Tensor, storage: str = "F32") -> RawTensor:
    part = RawTensor(name, "F32", tuple(data.shape), data)
    return part if storage == "F32" else quantize(part, storage)


def parts(seed: int, storage: str = "F32") -> tuple[list[list[RawTensor]], list[list[RawTensor]]]:
    draw = torch.Generator().manual_seed(seed)

    def matrix(rows: int, cols: int) -> RawTensor:
        return raw("w", torch.randn(rows, cols, generator=draw) * cols**-0.5, storage)

    gate_up = [[matrix(INNER, HIDDEN), matrix(INNER, HIDDEN)] for _ in range(EXPERTS)]
    return gate_up, [[matrix(HIDDEN, INNER)] for _ in range(EXPERTS)]


def one_by_one(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Any, down: Any, act: str, residual: Tensor | None
) -> Tensor:
    """Token by token, in float64."""
    out = torch.zeros(len(x), HIDDEN, dtype=torch.float64) if residual is None else residual.double()
    for t, (own, shares) in enumerate(zip(ids.tolist(), weights.double())):
        for e, share in zip(own, shares):
            gate, up, back = (dequantize(p, torch.float32).double() for p in (*gate_up[e], *down[e]))
            inner = ACTIVATIONS[act](F.linear(x[t].double(), gate)) * F.linear(x[t].double(), up)
            out[t] += share * F.linear(inner, back)
    return out


CASES = {
    "spread": torch.tensor([[0, 1], [2, 3], [4, 0], [1, 4], [3, 0], [2, 1]]),
    "all on one": torch.tensor([[2, 3]] * 7),
    "one token": torch.tensor([[4, 1]]),
    "one pick": torch.tensor([[1], [0], [1]]),
    "nobody": torch.empty(0, 2, dtype=torch.int64),
}


@pytest.mark.parametrize("storage", ["F32", "Q8_0"])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("name", CASES)
def test_a_tokens_experts_are_summed(name: str, act: str, storage: str, kernels: Any) -> None:
    ids = CASES[name]
    draw = torch.Generator().manual_seed(len(name))
    x, residual = (torch.randn(len(ids), HIDDEN, generator=draw) for _ in range(2))
    weights = torch.rand(ids.shape, generator=draw)
    gate_up, down = parts(3, storage)
    banks = kernels.bank(gate_up), kernels.bank(down)
    for added in (None, residual):
        found = kernels.experts(x, ids, weights, Experts(*banks, act), added)
        want = one_by_one(x, ids, weights, gate_up, down, act, added)
        # the CPU's kernels round activations to 8 bits beside weights of 8 bits
        assert (found - want).abs().max() <= (1e-5 if storage == "F32" else 0.02) * want.abs().max() if len(ids) else 1
        assert found.dtype == x.dtype


def test_dense_experts_lie_in_one_memory() -> None:
    gate_up, _ = parts(1)
    bank = Oracle().bank(gate_up)
    assert bank.stacked is not None
    assert bank.stacked.shape == (EXPERTS, 2 * INNER, HIDDEN)
    for each, own in zip(bank.each, gate_up):
        assert torch.equal(each.data[0], torch.cat([p.data for p in own]))
        assert each.data[0].data_ptr() >= bank.stacked.data_ptr()


def test_products_of_each_head(kernels: Any) -> None:
    draw = torch.Generator().manual_seed(5)
    x, w = torch.randn(7, 3, 32, generator=draw), torch.randn(3, 64, 32, generator=draw)
    found = kernels.each(x, kernels.bank([[raw("w", part)] for part in w]))
    assert torch.allclose(found, torch.einsum("thc,hrc->thr", x, w), atol=1e-4)
