"""Both ends of a language model: token embedding and output head, which may share one matrix."""

import torch
from torch import Tensor

from tenfold.nn.norm import RMSNorm
from tenfold.ops.kernels import Kernels
from tenfold.ops.matrix import Matrix


class Embedding:
    """ids [T] int64 -> [T, D]; scale multiplies (Gemma)."""

    def __init__(self, kernels: Kernels, table: Matrix, scale: float = 1.0) -> None:
        self.kernels = kernels
        self.table = table
        self.scale = scale

    def __call__(self, ids: Tensor) -> Tensor:
        return self.kernels.embed(ids, self.table, self.scale)


class Head:
    """x [L, D] -> logits [L, vocab] float32 of norm(x); softcap > 0: `softcap * tanh(logits / softcap)`."""

    def __init__(self, kernels: Kernels, weight: Matrix, softcap: float = 0.0) -> None:
        self.kernels = kernels
        self.weight = weight
        self.softcap = softcap

    def __call__(self, x: Tensor, norm: RMSNorm) -> Tensor:
        logits = self.kernels.logits(x, self.weight, norm.spec)
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits
