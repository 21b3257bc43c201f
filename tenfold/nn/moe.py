"""The mixture-of-experts feed-forward layer: a router picks experts for each token, and some experts see all tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.nn.linear import Linear
from tenfold.nn.mlp import MLP
from tenfold.nn.norm import RMSNorm
from tenfold.ops.kernels import Kernels
from tenfold.ops.matrix import Bank
from tenfold.ops.route import Routing, route


class MoE:
    """`sum of weight * expert(x) over the picked experts + shared(x) * sigmoid(shared_gate(x))`.

    router [experts, D] float32: picks decide which weights are read at all, so they are made in float32. shared,
    shared_gate: None where a family has none.
    """

    def __init__(
        self,
        kernels: Kernels,
        router: Tensor,
        routing: Routing,
        gate_up: Bank,
        down: Bank,
        act: str,
        shared: MLP | None = None,
        shared_gate: Linear | None = None,
    ) -> None:
        self.kernels = kernels
        self.router = router
        self.routing = routing
        self.gate_up = gate_up
        self.down = down
        self.act = act
        self.shared = shared
        self.shared_gate = shared_gate

    def __call__(self, x: Tensor, norm: RMSNorm, residual: Tensor) -> Tensor:
        """x [T, D] -> `experts + residual` [T, D], computed on norm(x)."""
        x = norm(x)
        if self.shared is not None and self.shared_gate is None:
            residual = self.shared(x, residual=residual)
        elif self.shared is not None and self.shared_gate is not None:
            residual = residual + self.shared(x) * torch.sigmoid(self.shared_gate(x))
        ids, weights = route(F.linear(x.float(), self.router), self.routing)
        return self.kernels.experts(x, ids, weights, self.gate_up, self.down, self.act, residual)
