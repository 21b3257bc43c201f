"""The mixture-of-experts feed-forward layer: a router picks experts for each token, and some experts see all tokens."""

from torch import Tensor

from tenfold.nn.linear import Linear
from tenfold.nn.mlp import MLP
from tenfold.nn.norm import RMSNorm
from tenfold.ops.kernels import Kernels
from tenfold.ops.matrix import Experts, Matrix
from tenfold.ops.route import Routing, sigmoid


class MoE:
    """`sum of weight * expert(x) over the picked experts + shared(x) * sigmoid(shared_gate(x))`.

    router: a row for each expert, never packed, since picks decide which weights are read at all. shared, shared_gate:
    None where a family has none.
    """

    def __init__(
        self,
        kernels: Kernels,
        router: Matrix,
        routing: Routing,
        experts: Experts,
        shared: MLP | None = None,
        shared_gate: Linear | None = None,
    ) -> None:
        self.kernels = kernels
        self.router = router
        self.routing = routing
        self.experts = experts
        self.shared = shared
        self.shared_gate = shared_gate

    def __call__(self, x: Tensor, norm: RMSNorm, residual: Tensor) -> Tensor:
        """x [T, D] -> `experts + residual` [T, D], computed on norm(x)."""
        x = norm(x)
        scores = self.kernels.logits(x, self.router)
        if self.shared is not None and self.shared_gate is None:
            residual = self.shared(x, residual=residual)
        elif self.shared is not None and self.shared_gate is not None:
            residual = residual + self.shared(x) * sigmoid(self.shared_gate(x))
        return self.kernels.routed(x, scores, self.routing, self.experts, residual)
