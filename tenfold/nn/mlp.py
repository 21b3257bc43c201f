"""The gated feed-forward layer."""

from torch import Tensor

from tenfold.nn.linear import Linear
from tenfold.nn.norm import RMSNorm


class MLP:
    """`down(act(gate(x)) * up(x))`; gate_up holds the rows of gate, then of up."""

    def __init__(self, gate_up: Linear, down: Linear, act: str) -> None:
        self.gate_up = gate_up
        self.down = down
        self.act = act

    def __call__(self, x: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
        """x [T, D] -> `down(...) + residual` [T, D], computed on norm(x)."""
        return self.down(self.gate_up(x, norm=norm, act=self.act), residual=residual)
