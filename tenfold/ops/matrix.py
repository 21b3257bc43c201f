"""Weights as kernels see them: `RawTensor`, what a file stores, and `Matrix`, what a linear operation runs on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what speaks of checkpoints only need not wait for PyTorch
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RawTensor:
    """A tensor as its file stores it, not copied.

    storage: "F32", "F16", "BF16" (data has that type and `shape`) or a GGUF block type such as "Q4_1"
    (data is uint8 [rows, bytes of a row], shape is (rows, cols)).
    """

    name: str
    storage: str
    shape: tuple[int, ...]
    data: Tensor


@dataclass(slots=True, eq=False)
class Matrix:
    """A weight of `rows` output features by `cols` input features.

    format: "dense" (data is one [rows, cols] tensor) or a packed format of the kernels that made it. handle: what a
    compiled kernel is given (address of its C description), 0 where none. arms: implementation picked for each batch
    size (a memo of the choice table).
    """

    format: str
    rows: int
    cols: int
    data: tuple[Tensor, ...]
    handle: int = 0
    arms: dict[int, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.data)
