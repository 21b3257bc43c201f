"""Ways to store keys and values, as what attention would see of a whole sequence: for comparing their quality.

Every format answers two questions: how do tokens look once they are stored, and which earlier ones does a query see
so. Rounding is done with real codes and stored parameters, so nothing here is better than its bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tenfold.cache.skvq.attend import left_window
from tenfold.cache.skvq.calibrate import Sample
from tenfold.ops.kv.quantize import E4M3_LARGEST, Grouping, hadamard, rounded
from tenfold.ops.kv.spec import PackedSpec

EXACT_BITS = 16
STRIDE = 128  # tokens: every format stores what follows a multiple of it as if nothing stood before


Pair = tuple[Tensor, Tensor]


class Format(Protocol):
    """name: of a row in a table; bits: average of a number that is stored, in a long sequence, parameters included;
    kept: tokens of a sequence that are never stored.
    """

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> float: ...
    @property
    def kept(self) -> int: ...

    def store(self, layer: int, sample: Sample) -> Pair:
        """Keys, rotated, and values, each [kv_heads, S, head_dim], as stored. The sample begins at a multiple of
        STRIDE.
        """
        ...

    def old(self, layer: int, queries: Tensor, length: int) -> Pair:
        """Which of `length` keys, and values, queries at positions [Q] see as stored, each [Q, length] bool."""
        ...


def bits_at(format: Format, length: int) -> float:
    """Average bits of a number in a sequence of some length, tokens that are kept in 16 bits included."""
    kept = min(length, format.kept)
    return (kept * EXACT_BITS + (length - kept) * format.bits) / length


def affine(x: Tensor, bits: int, dim: int) -> Tensor:
    """Asymmetric round-to-nearest over a dimension, parameters in float16."""
    lo = x.amin(dim, keepdim=True).half().float()
    scale = ((x.amax(dim, keepdim=True) - lo) / (2**bits - 1)).clamp(min=1e-5).half().float()
    return ((x - lo) / scale).round().clamp(0, 2**bits - 1) * scale + lo


def rotated(sample: Sample) -> Pair:
    """Keys, rotated, and values, [kv_heads, S, head_dim]."""
    return sample.turn(sample.keys.transpose(0, 1)), sample.values.transpose(0, 1)


def everything(queries: Tensor, length: int) -> Pair:
    old = left_window(queries, length, 0, 0)
    return old, old


@dataclass(frozen=True, slots=True)
class Exact:
    """As computed."""

    name: str = "exact"
    bits: float = EXACT_BITS
    kept: int = 0

    def store(self, layer: int, sample: Sample) -> Pair:
        return rotated(sample)

    def old(self, layer: int, queries: Tensor, length: int) -> Pair:
        never = torch.zeros(len(queries), length, dtype=torch.bool, device=queries.device)
        return never, never


@dataclass(frozen=True, slots=True)
class Float8:
    """E4M3 with a float32 scale for each token and head."""

    head_dim: int
    name: str = "fp8 e4m3, scale per token and head"
    kept: int = 0

    @property
    def bits(self) -> float:
        return 8 + 32 / self.head_dim

    def store(self, layer: int, sample: Sample) -> Pair:
        def store(x: Tensor) -> Tensor:
            scale = (x.abs().amax(-1, keepdim=True) / E4M3_LARGEST).clamp(min=1e-12)
            return (x / scale).to(torch.float8_e4m3fn).float() * scale

        keys, values = rotated(sample)
        return store(keys), store(values)

    def old(self, layer: int, queries: Tensor, length: int) -> Pair:
        return everything(queries, length)


@dataclass(frozen=True, slots=True)
class Integer:
    """Round-to-nearest in groups of a token's neighbouring channels, float16 parameters. turned: keys and values are
    multiplied by a Hadamard matrix of a group before, and back after (SAW-INT4, arXiv 2604.19157).
    """

    width: int
    group: int
    turned: bool = False
    kept: int = 0

    @property
    def name(self) -> str:
        return f"int{self.width} g{self.group}" + (", block Hadamard" if self.turned else "")

    @property
    def bits(self) -> float:
        return self.width + 32 / self.group

    def store(self, layer: int, sample: Sample) -> Pair:
        turn = hadamard(self.group, sample.keys.device) if self.turned else None

        def store(x: Tensor) -> Tensor:
            groups = x.unflatten(-1, (-1, self.group))
            if turn is None:
                return affine(groups, self.width, -1).flatten(-2)
            return (affine(groups @ turn, self.width, -1) @ turn).flatten(-2)

        keys, values = rotated(sample)
        return store(keys), store(values)

    def old(self, layer: int, queries: Tensor, length: int) -> Pair:
        return everything(queries, length)


@dataclass(frozen=True, slots=True)
class Kivi:
    """KIVI (arXiv 2402.02750): keys by channel over groups of tokens, values by token over groups of channels, in
    `width` bits; keys of the last tokens up to a multiple of `residual`, and values of the last `residual` tokens, stay
    as computed. channels: of a group of values, 0 for as many as a group of keys has tokens.
    """

    group: int
    width: int = 2
    residual: int = 128
    channels: int = 0

    @property
    def name(self) -> str:
        return f"KIVI {self.width} bit g{self.group}" + (f", values g{self.channels}" if self.channels else "")

    @property
    def bits(self) -> float:
        return self.width + 16 / self.group + 16 / (self.channels or self.group)

    @property
    def kept(self) -> int:
        return self.residual * 3 // 4  # keys from 0 to residual, so half of it on average; values all of it

    def store(self, layer: int, sample: Sample) -> Pair:
        keys, values = rotated(sample)
        whole = keys.shape[1] // self.group * self.group
        grouped = keys[:, :whole].unflatten(1, (-1, self.group))
        stored = torch.cat((affine(grouped, self.width, 2).flatten(1, 2), keys[:, whole:]), 1) if whole else keys
        return stored, affine(values.unflatten(-1, (-1, self.channels or self.group)), self.width, -1).flatten(-2)

    def old(self, layer: int, queries: Tensor, length: int) -> Pair:
        places = torch.arange(length, device=queries.device)
        old_keys = places < queries[:, None] // self.residual * self.residual
        return old_keys, left_window(queries, length, self.residual, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Skvq:
    """keys, values: of every layer how its channels are grouped and clipped."""

    name: str
    spec: PackedSpec
    keys: Sequence[Grouping]
    values: Sequence[Grouping]
    kv_heads: int
    head_dim: int

    @property
    def bits(self) -> float:
        return self.spec.bits(self.kv_heads, self.head_dim)

    @property
    def kept(self) -> int:
        return self.spec.window + self.spec.sinks

    def store(self, layer: int, sample: Sample) -> Pair:
        spec = self.spec
        keys = sample.keys.transpose(0, 1)
        if spec.rotary == "post":
            stored = self._stored(sample.turn(keys), self.keys[layer], spec.key_bits)
        else:
            stored = sample.turn(self._stored(keys, self.keys[layer], spec.key_bits))
        return stored, self._stored(sample.values.transpose(0, 1), self.values[layer], spec.value_bits)

    def old(self, layer: int, queries: Tensor, length: int) -> Pair:
        old = left_window(queries, length, self.spec.window, self.spec.sinks)
        return old, old

    def _stored(self, x: Tensor, grouping: Grouping, bits: float) -> Tensor:
        """x [kv_heads, S, head_dim]."""
        flat = rounded(x.transpose(0, 1).flatten(1), grouping, bits, self.spec.parameters)
        return flat.unflatten(1, (self.kv_heads, self.head_dim)).transpose(0, 1)
