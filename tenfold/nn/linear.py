"""A linear layer with what may be fused around it: the norm before, the gate, and the residual after."""

from torch import Tensor

from tenfold.nn.norm import RMSNorm
from tenfold.ops.kernels import Kernels
from tenfold.ops.matrix import Matrix


class Linear:
    """x [T, cols] -> [T, rows], or [T, rows / 2] with a gate. bias [rows] float32."""

    def __init__(self, kernels: Kernels, weight: Matrix, bias: Tensor | None = None) -> None:
        self.kernels = kernels
        self.weight = weight
        self.bias = bias

    def __call__(
        self, x: Tensor, norm: RMSNorm | None = None, act: str | None = None, residual: Tensor | None = None
    ) -> Tensor:
        spec = None if norm is None else norm.spec
        return self.kernels.linear(x, self.weight, self.bias, norm=spec, act=act, residual=residual)
