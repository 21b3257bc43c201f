"""Weights as kernels see them: `RawTensor`, what a file stores, and `Matrix`, what a linear operation runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what speaks of checkpoints only need not wait for PyTorch
    import torch
    from torch import Tensor

    from tenfold.ops.tiles import Tiled


@dataclass(frozen=True, slots=True, eq=False)
class RawTensor:
    """A tensor as its file stores it, not copied.

    storage: "F32", "F16", "BF16" (data has that type and `shape`), a GGUF block type such as "Q4_1"
    (data is uint8 [rows, bytes of a row], shape is (rows, cols)) or a packed format of `ops/formats.py` such as
    "int4g128" (data holds the codes, extras the other tensors of the format; shape is (rows, cols)).
    """

    name: str
    storage: str
    shape: tuple[int, ...]
    data: Tensor
    extras: tuple[Tensor, ...] = ()


class Deferred(RawTensor):
    """A RawTensor whose tensors are made when they are asked for: `on(device)` makes them there, `data` and `extras`
    on the CPU. Storage and shape cost nothing. make(device) returns data and extras.
    """

    __slots__ = ("make",)
    make: Callable[[torch.device | str], tuple[Tensor, ...]]

    def __init__(
        self,
        name: str,
        storage: str,
        shape: tuple[int, ...],
        make: Callable[[torch.device | str], tuple[Tensor, ...]],
    ) -> None:
        for key, value in (("name", name), ("storage", storage), ("shape", shape), ("make", make)):
            object.__setattr__(self, key, value)

    def on(self, device: torch.device | str) -> RawTensor:
        data, *extras = self.make(device)
        return RawTensor(self.name, self.storage, self.shape, data, tuple(extras))

    @property
    def data(self) -> Tensor:
        return self.on("cpu").data

    @property
    def extras(self) -> tuple[Tensor, ...]:
        return self.on("cpu").extras


@dataclass(slots=True, eq=False)
class Matrix:
    """A weight of `rows` output features by `cols` input features.

    format: "dense" (data is one [rows, cols] tensor) or a packed format of the kernels that made it. handle: what a
    compiled kernel is given (address of its C description), 0 where none. arms: implementation picked for each batch
    size, and number of multiprocessors (a memo of the choice table).
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


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """One projection of every expert of a layer. stacked [experts, rows, cols]: the memory that all lie in, where they
    are dense; tiled: their tiles, where they are packed for kernels of formats mixed in one launch, and `each` is made
    of those.
    """

    each: Sequence[Matrix]
    stacked: Tensor | None = None
    tiled: Tiled | None = None


def dense_bank(stacked: Tensor) -> Bank:
    """Of matrices [experts, rows, cols] in one memory."""
    return Bank(tuple(Matrix("dense", part.shape[0], part.shape[1], (part,)) for part in stacked), stacked)


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """The experts of a layer. Rows of gate_up are gate, then up; act: "silu" or "gelu_tanh"."""

    gate_up: Bank
    down: Bank
    act: str

    def __len__(self) -> int:
        return len(self.gate_up.each)

    @property
    def stacked(self) -> tuple[Tensor, Tensor] | None:
        """gate_up [experts, 2 * inner, cols] and down [experts, rows, inner], where both are dense."""
        up, down = self.gate_up.stacked, self.down.stacked
        return None if up is None or down is None else (up, down)

    @property
    def tiled(self) -> tuple[Tiled, Tiled] | None:
        """The tiles of both, where both have some."""
        up, down = self.gate_up.tiled, self.down.tiled
        return None if up is None or down is None else (up, down)
