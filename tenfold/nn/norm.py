"""RMS norm as a layer. Most norms are not called: they are handed to the linear that follows, which fuses them."""

from torch import Tensor

from tenfold.ops.kernels import Kernels, Norm


class RMSNorm:
    """weight [D] float32, Gemma's +1 already added."""

    def __init__(self, kernels: Kernels, weight: Tensor, eps: float) -> None:
        self.kernels = kernels
        self.spec = Norm(weight, eps)

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.norm(x, self.spec)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """`x + norm(y)`: the residual around a sublayer whose output is normed."""
        return self.kernels.add_norm(x, y, self.spec)
