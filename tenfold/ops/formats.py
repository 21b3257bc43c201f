"""Packed formats of linear weights for GPU kernels: names, sizes, layout, rounding to them and back.

Invariant: a format is data (`Format`), its name says all of it, and whoever has the name and the tensors can compute
every value exactly:

    W[r, order[j]] = (code[r, j] - zero[r, j // group]) * scale[r, j // group]        (order[j] = j where there is none)

Names: `int4g128`, `int2g64z`, `int8`, `fp8a8`, ... = codes (`int1` to `int8`: whole numbers; `fp8`: float8 e4m3), then
`gN`: N neighbouring columns share a scale (without it: the whole row does), `z`: groups have zeros, `o`: columns lie in
an order of their own, `a8`: kernels may round activations to 8 bits (fp8: e4m3), one scale a token, where that is
faster; without it activations keep 16 bits.

Tensors of a matrix of `rows` outputs and `cols` inputs, contiguous, in this order (`Packed`); G = ceil(cols / N):

    codes   int4: int32 [rows, cols / 8]   int3: int32 [rows, cols / 32 * 3]   int2: int32 [rows, cols / 16]
            int1: int32 [rows, cols / 32]  int8: int8 [rows, cols]   fp8: float8_e4m3fn [rows, cols]
    scales  [rows, G]                      int: float16, bfloat16 or float32 as the checkpoint has them · fp8: float32
    zeros   [rows, G], type of the scales  only with `z`; any number: other tools write whole ones, our own fractions
    order   int32 [cols]                   only with `o`: stored column j multiplies input feature order[j]

- A row's codes are contiguous along the columns: 16 bytes hold 32 columns of int4, 16 of int8 and fp8, all of one row
  and, as groups are multiples of 32, of one group; 16 bytes of int2 hold 64 columns, 16 of int1 and 48 of int3 128.
  `cols` is a multiple of 32 (int4), 64 (int2), 128 (int1, int3) or 16, so that every row starts at a multiple of 16
  bytes.
- int4: codes are 0..15; without `z` the zero is 8. With `a8` our own rounding leaves out code 0, since tensor cores
  then take signs and magnitudes as they lie (ops/tiles.py); checkpoints may have it. Word w of a row holds columns
  8w .. 8w+7. Its nibble i (bits 4i to 4i+3) is column 8w + 2i and its nibble i + 4 is column 8w + 2i + 1, for i = 0..3:

      bits   31-28 27-24 23-20 19-16 15-12 11-8  7-4   3-0
      column     7     5     3     1     6    4    2     0

  So `(word >> 4 * i) & 0x000F000F` is the pair of columns 2i, 2i+1 in two halves of 16 bits. OR with 0x64006400 makes
  them the float16 pair 1024 + code, OR with 0x43004300 the bfloat16 pair 128 + code: one LOP3 for two weights.
- int2: codes are 0..3; without `z` the zero is 2. Word w holds columns 16w .. 16w+15 in pairs as int4 does: bits 2i and
  2i+1 are column 16w + 2i, and the same bits of the upper half column 16w + 2i + 1, for i = 0..7.
- int3: codes are 0..7; without `z` the zero is 4. Three words hold 32 columns. In the lower half of word t lie columns
  2p for p = 5t .. 5t+4, three bits each from the lowest, and in its bit 15 bit t of column 30; in the upper half lie
  columns 2p + 1, and 31. So 15 of 16 pairs cost one shift and one mask, as those of int4.
- int1: codes are 0 and 1, only with `gN` and `z`: a group's two levels are -zero * scale and (1 - zero) * scale, which
  no zero of all groups puts in their place. Word w holds columns 32w .. 32w+31 in pairs as int4 does: bit i is column
  32w + 2i and bit i + 16 column 32w + 2i + 1, for i = 0..15.
- int8: two's complement, without `z` the zero is 0. Checkpoints that count from 0 to 255 are stored less 128, and so
  are their zeros.
- fp8: no zeros. A scale of a whole tensor is repeated for every row, one of a block of rows for each of its rows.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tenfold.ops.matrix import Deferred, Matrix, RawTensor

NIBBLES = 8  # columns in one int32 word of int4 codes
THREE = 32  # columns in three int32 words of int3 codes
TWO, ONE = 16, 32  # and in one of int2 and int1
EVERY_NIBBLE_PAIR = 0x000F000F  # picks columns 2i and 2i+1 of a word that was shifted right by 4 * i
HALF_MAGIC, BFLOAT_MAGIC = 0x64006400, 0x43004300  # float16 pair 1024 + code, bfloat16 pair 128 + code
LOAD_COLS = 32  # a group is a multiple of this, so that a 16-byte load needs one scale
FP8_MAX = 448.0
LEAST_TOKEN = 1e-35  # as float8: a token whose largest number is less is zeros, as 448 divided by it may be infinite
CHUNK_ELEMENTS = 1 << 22  # elements decoded at once, as float32
FARTHEST = 512.0  # distances between zero and the middle of two levels: float16 counts halves up to there

NAME = re.compile(r"(?P<kind>int[12348]|fp8)(?:g(?P<group>[1-9]\d{0,5}))?(?P<zero>z?)(?P<order>o?)(?P<acts>(?:a8)?)")


@dataclass(frozen=True, slots=True)
class Codes:
    """How codes of one kind lie in memory. middle: the zero of a format without zeros; lowest, levels: the codes'
    range. store and load turn codes as numbers [rows, cols] into their tensor and back."""

    bits: int
    middle: int
    lowest: int
    align: int  # columns
    dtype: torch.dtype
    store: Callable[[Tensor], Tensor]
    load: Callable[[Tensor], Tensor]

    @property
    def highest(self) -> int:
        return self.lowest + (1 << self.bits) - 1


class Packed(NamedTuple):
    """The tensors of a packed matrix; see the module for shapes and types."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    order: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in self if t is not None)

    def rows(self, place: slice) -> "Packed":
        """Some rows of the matrix."""
        zeros = None if self.zeros is None else self.zeros[place]
        return Packed(self.codes[place], self.scales[place], zeros, self.order)


@dataclass(frozen=True, slots=True)
class Format:
    """A packed format; its fields are the parts of its name (see the module). group 0: a scale for each whole row.

    Raises ValueError for parts that do not go together.
    """

    kind: str
    group: int = 0
    zero: bool = False
    order: bool = False
    activations: int = 16

    def __post_init__(self) -> None:
        if self.kind not in CODES or self.activations not in (8, 16):
            raise ValueError(f"There is no format of {self.kind} with {self.activations}-bit activations.")
        if self.kind == "fp8" and self.zero:
            raise ValueError("fp8 has no zeros; use a format without z.")
        if self.kind == "int1" and not (self.zero and self.group):
            raise ValueError(
                f"{self.name} lacks {'groups' if self.zero else 'zeros'}, and two levels need a scale and a zero of "
                "their own; allowed: int1 with groups and zeros, such as int1g128z."
            )
        if self.group % LOAD_COLS:
            raise ValueError(f"The group of {self.name} is {self.group}; allowed: multiples of {LOAD_COLS}, or none.")

    @property
    def name(self) -> str:
        group = f"g{self.group}" if self.group else ""
        return self.kind + group + "z" * self.zero + "o" * self.order + "a8" * (self.activations == 8)

    @property
    def codes(self) -> Codes:
        return CODES[self.kind]

    @property
    def bits(self) -> int:
        return self.codes.bits

    @property
    def strict(self) -> bool:
        """As the function of this name."""
        return strict(self.bits, self.zero, self.activations)

    @property
    def lowest(self) -> int:
        """The lowest code that rounding gives."""
        return self.codes.lowest + self.strict

    def groups(self, cols: int) -> int:
        """Scales of a row; the last group may be shorter than the others."""
        return -(-cols // self.group) if self.group else 1

    def obstacle(self, cols: int) -> str:
        """Why rows of `cols` columns cannot be stored, empty where they can."""
        return "" if cols % self.codes.align == 0 else f"{cols} columns are no multiple of {self.codes.align}"

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a matrix, scales of int formats counted as 16 bits."""
        scales = rows * self.groups(cols) * (4 if self.kind == "fp8" else 2) * (1 + self.zero)
        return rows * cols * self.bits // 8 + scales + 4 * cols * self.order

    def pack(self, dense: Tensor, scale_type: torch.dtype = torch.float16) -> Packed:
        """Round a matrix [rows, cols] to the nearest codes; scale_type: of the scales of an int format.

        Without zeros the number of largest magnitude in a group becomes the lowest code, as in Q4_0, so every code is
        of use. Raises ValueError for a shape the format cannot hold, and for a format with an order.
        """
        rows, cols = dense.shape
        if self.obstacle(cols) or self.order:
            raise ValueError(f"A matrix {rows} x {cols} cannot be packed as {self.name}: {self.obstacle(cols)}.")
        pieces = [self._pack(part, scale_type) for part in dense.split(max(1, CHUNK_ELEMENTS // cols))]
        zeros = [piece.zeros for piece in pieces if piece.zeros is not None]
        return Packed(
            join([piece.codes for piece in pieces]),
            join([piece.scales for piece in pieces]),
            join(zeros) if zeros else None,
        )

    def _pack(self, dense: Tensor, scale_type: torch.dtype) -> Packed:
        rows, cols = dense.shape
        size, groups = self.group or cols, self.groups(cols)
        padded = torch.nn.functional.pad(dense.float(), (0, groups * size - cols))
        values = padded.view(rows, groups, size)
        if self.kind == "fp8":
            scales = divided(values.abs().amax(dim=2), FP8_MAX)
            scaled = (values * inverse(scales)[..., None]).clamp_(-FP8_MAX, FP8_MAX).flatten(1)[:, :cols]
            return Packed(scaled.to(torch.float8_e4m3fn), scales)
        codes = self.codes
        if self.bits == 1:
            means, distances = two_levels(values, (cols - size * torch.arange(groups)).clamp_(max=size))
            scales = rounded(distances, scale_type)
            zeros = rounded(0.5 - means * inverse(scales), scale_type)
        elif self.zero:
            low, high = values.amin(dim=2).clamp_(max=0), values.amax(dim=2).clamp_(min=0)
            scales = rounded(divided(high - low, codes.highest - codes.lowest), scale_type)
            zeros = (codes.lowest - low * inverse(scales)).round_().clamp_(codes.lowest, codes.highest)
        else:
            largest = values.gather(2, values.abs().argmax(dim=2, keepdim=True))[..., 0]
            scales = rounded(largest / (self.lowest - codes.middle), scale_type)
            zeros = torch.full_like(scales, codes.middle)
        numbers = (values * inverse(scales)[..., None] + zeros[..., None]).round_().clamp_(self.lowest, codes.highest)
        stored = codes.store(numbers.flatten(1)[:, :cols])
        return Packed(stored, scales.to(scale_type), zeros.to(scale_type) if self.zero else None)

    def unpack(self, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values [rows, cols], computed in float32 and rounded to `dtype` once."""
        codes, scales, zeros, order = packed
        rows = codes.shape[0]
        cols = codes.shape[1] * codes.element_size() * 8 // self.bits
        out = torch.empty(rows, cols, dtype=dtype, device=codes.device)
        step = max(1, CHUNK_ELEMENTS // cols)
        for first in range(0, rows, step):
            part = slice(first, first + step)
            values = self.codes.load(codes[part]).float()
            values -= self.codes.middle if zeros is None else self._spread(zeros[part], cols)
            values *= self._spread(scales[part], cols)
            if order is None:
                out[part] = values
            else:
                out[part, order.long()] = values.to(dtype)
        return out

    def _spread(self, values: Tensor, cols: int) -> Tensor:
        """One number of each group -> float32 [rows, cols], or [rows, 1] where a row has one group."""
        values = values.float()
        return values if values.shape[1] == 1 else values.repeat_interleave(self.group, dim=1)[:, :cols]


def strict(bits: int, zero: bool, activations: int) -> bool:
    """Whether rounding leaves out the lowest code, which has no opposite."""
    return bits == 4 and activations == 8 and not zero


def two_levels(values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and distance [rows, groups] of two levels for `values` [rows, groups, columns] float32: the mean of a
    group, and twice the mean distance from it. counts [groups]: columns that count; behind them stand zeros.

    A group of hardly any spread gets a distance that 16 bits can count to its middle in.
    """
    inside = torch.arange(values.shape[2], device=values.device) < counts.to(values.device)[:, None]
    means = values.sum(dim=2) / counts.to(values)
    distances = ((values - means[..., None]).abs() * inside).sum(dim=2) / counts.to(values)
    return means, torch.maximum(2 * distances, means.abs() / FARTHEST)


def divided(values: Tensor, by: float) -> Tensor:
    """values / by, the nearest number on every device: by a Python number CUDA multiplies with its inverse."""
    return values / torch.full((), by, dtype=values.dtype, device=values.device)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is infinite."""
    found = 1 / scale
    return found.masked_fill_(found.isinf(), 0)


def rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 numbers that `dtype` can hold, never infinite."""
    limit = torch.finfo(dtype).max
    return scale.clamp(-limit, limit).to(dtype).float()


def store_nibbles(numbers: Tensor) -> Tensor:
    """Codes 0..15 [rows, cols] of any type -> int32 [rows, cols / 8] in the layout of the module."""
    rows, cols = numbers.shape
    # Column 4j + 2n + h of a word is nibble n of byte 2h + j.
    parts = numbers.to(torch.uint8).view(rows, cols // NIBBLES, 2, 2, 2)
    joined = parts[:, :, :, 0] | (parts[:, :, :, 1] << 4)  # [rows, words, j, h]
    return joined.transpose(2, 3).reshape(rows, cols // 2).view(torch.int32)


def load_nibbles(words: Tensor) -> Tensor:
    """int32 [rows, words] -> codes uint8 [rows, 8 * words]."""
    rows, count = words.shape
    joined = words.contiguous().view(torch.uint8).view(rows, count, 2, 2).transpose(2, 3)
    return torch.stack((joined & 15, joined >> 4), dim=3).reshape(rows, count * NIBBLES)


def store_pairs(numbers: Tensor, bits: int) -> Tensor:
    """Codes of so many bits [rows, words, columns of a word] -> int32 [rows, words]: columns 2i and 2i + 1 at bit
    bits * i of the two halves.
    """
    pairs = numbers.to(torch.int32).unflatten(2, (-1, 2))
    shifts = bits * torch.arange(pairs.shape[2], dtype=torch.int32, device=numbers.device)
    halves = (pairs << shifts[:, None]).sum(dim=2, dtype=torch.int32)
    return halves[..., 0] | (halves[..., 1] << 16)


def load_pairs(words: Tensor, bits: int) -> Tensor:
    """What `store_pairs` stored: int32 [rows, words] -> uint8 [rows, words, columns of a word]."""
    shifts = bits * torch.arange(16 // bits, dtype=torch.int32, device=words.device)
    places = (shifts[:, None] + torch.tensor([0, 16], dtype=torch.int32, device=words.device)).flatten()
    return ((words[..., None] >> places) & ((1 << bits) - 1)).to(torch.uint8)


def store_one(numbers: Tensor) -> Tensor:
    """Codes 0 and 1 [rows, cols] of any type -> int32 [rows, cols / 32] in the layout of the module."""
    return store_pairs(numbers.unflatten(1, (-1, ONE)), 1)


def load_one(words: Tensor) -> Tensor:
    return load_pairs(words, 1).flatten(1)


def store_two(numbers: Tensor) -> Tensor:
    """Codes 0..3 [rows, cols] of any type -> int32 [rows, cols / 16] in the layout of the module."""
    return store_pairs(numbers.unflatten(1, (-1, TWO)), 2)


def load_two(words: Tensor) -> Tensor:
    return load_pairs(words, 2).flatten(1)


def store_three(numbers: Tensor) -> Tensor:
    """Codes 0..7 [rows, cols] of any type -> int32 [rows, cols / 32 * 3] in the layout of the module."""
    blocks = numbers.to(torch.int32).unflatten(1, (-1, THREE))
    words = store_pairs(blocks[..., :-2].unflatten(2, (3, -1)).flatten(1, 2), 3).unflatten(1, (-1, 3))
    bit = torch.arange(3, dtype=torch.int32, device=numbers.device)
    last = (blocks[..., -2:, None] >> bit) & 1  # [rows, blocks, halves, words]
    return (words | (last[:, :, 0] << 15) | (last[:, :, 1] << 31)).flatten(1)


def load_three(words: Tensor) -> Tensor:
    blocks = words.unflatten(1, (-1, 3))
    most = load_pairs(words, 3).unflatten(1, (-1, 3)).flatten(2)
    bit = torch.arange(3, dtype=torch.int32, device=words.device)
    last = [(((blocks >> place) & 1) << bit).sum(dim=2, dtype=torch.uint8) for place in (15, 31)]
    return torch.cat([most, torch.stack(last, dim=2)], dim=2).flatten(1)


def interleave(words: Tensor) -> Tensor:
    """Words whose nibble i is column i, as most files have them -> words in the layout of the module."""
    low, high = words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F
    return gather_bytes(low) | (gather_bytes(high) << 16)


def gather_bytes(spread: Tensor) -> Tensor:
    """Four nibbles, one in each byte of a word -> side by side in its low half."""
    pairs = (spread | (spread >> 4)) & 0x00FF00FF
    return (pairs | (pairs >> 8)) & 0xFFFF


def same(codes: Tensor) -> Tensor:
    return codes


CODES: dict[str, Codes] = {
    "int1": Codes(1, 0, 0, 128, torch.int32, store_one, load_one),
    "int2": Codes(2, 2, 0, 64, torch.int32, store_two, load_two),
    "int3": Codes(3, 4, 0, 128, torch.int32, store_three, load_three),
    "int4": Codes(4, 8, 0, 32, torch.int32, store_nibbles, load_nibbles),
    "int8": Codes(8, 0, -128, 16, torch.int8, lambda numbers: numbers.to(torch.int8), same),
    "fp8": Codes(8, 0, 0, 16, torch.float8_e4m3fn, same, same),
}


@cache
def format_of(name: str) -> Format:
    """The format of a name. Raises ValueError for one that is none."""
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name[:80]!r} is no packed format; formats look like int4g128, int2g64z, int3, int8, fp8 or fp8a8."
        )
    group, acts = int(match["group"] or 0), 8 if match["acts"] else 16
    return Format(match["kind"], group, bool(match["zero"]), bool(match["order"]), acts)


def is_format(storage: str) -> bool:
    """Whether a storage is a packed format of this module (and not dense, nor a block type of GGUF)."""
    return NAME.fullmatch(storage) is not None


def raw_tensor(name: str, format: Format, rows: int, cols: int, packed: Packed) -> RawTensor:
    """A packed matrix under the name of its tensor."""
    codes, *extras = packed.tensors()
    return RawTensor(name, format.name, (rows, cols), codes, tuple(extras))


def packed_of(weight: RawTensor | Matrix) -> Packed:
    """The tensors of a packed RawTensor or Matrix under their names."""
    if isinstance(weight, Matrix):
        format, tensors = format_of(weight.format), weight.data
    else:
        made = weight.on("cpu") if isinstance(weight, Deferred) else weight
        format, tensors = format_of(made.storage), (made.data, *made.extras)
    codes, scales, *rest = tensors
    zeros = rest.pop(0) if format.zero else None
    return Packed(codes, scales, zeros, rest.pop(0) if format.order else None)


def can_stack(parts: Sequence[RawTensor]) -> bool:
    """Whether packed parts have one format, and one order where they have any, so that their rows make one matrix."""
    if len({(part.storage, part.shape[1]) for part in parts}) != 1 or not is_format(parts[0].storage):
        return False
    orders = [packed_of(part).order for part in parts]
    return all(order is None or torch.equal(order, orders[0]) for order in orders)  # type: ignore[arg-type]


def stack(parts: Sequence[RawTensor], device: torch.device | str) -> Matrix:
    """One packed Matrix of parts for which `can_stack` holds; scales of several types meet in the one that holds all.

    Stored codes, scales, zeros and order are not changed in value.
    """
    every = [packed_of(part) for part in parts]
    rows = sum(part.shape[0] for part in parts)
    kind = every[0].scales.dtype if len({p.scales.dtype for p in every}) == 1 else torch.float32
    zeros = [p.zeros.to(device, kind) for p in every if p.zeros is not None]
    joined = Packed(
        join([p.codes.to(device) for p in every]),
        join([p.scales.to(device, kind) for p in every]),
        join(zeros) if zeros else None,
        None if every[0].order is None else every[0].order.to(device, torch.int32).contiguous(),
    )
    return Matrix(parts[0].storage, rows, parts[0].shape[1], joined.tensors())


def join(tensors: Sequence[Tensor]) -> Tensor:
    """By rows. Bytes are joined, because some builds of PyTorch cannot join float8 tensors."""
    if len(tensors) == 1:
        return tensors[0].contiguous()
    kind = tensors[0].dtype
    return torch.cat([t.contiguous().view(torch.uint8) for t in tensors]).view(kind)


def unpack(weight: RawTensor | Matrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values [rows, cols] of a packed weight, where its tensors lie."""
    format = format_of(weight.format if isinstance(weight, Matrix) else weight.storage)
    return format.unpack(packed_of(weight), dtype)
