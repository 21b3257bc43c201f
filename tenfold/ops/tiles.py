"""Packed weights in the order in which a warpgroup of Hopper takes them, for kernels of formats mixed in one launch.

Invariant: a tile is 64 rows by 128 columns in one piece of memory, codes, then what scales them, so that one copy
brings all a step of a product needs; whoever knows the tile's `Kind` can compute every value of it exactly. A matrix
is [rows / 64, cols / 128] tiles, the last of each direction filled up with what multiplies to nothing.

Lane l of warp w (of four) has rows 16 w + g and 16 w + g + 8, g = l / 4, and of every 16 columns j four: 2 t + 8 h + c,
t = l % 4, for h, c = 0, 1. In a register of wgmma are c = 0 and 1; register r = 2 h + u, u = 0 for the upper row. So a
lane has 64 codes of a tile, and the codes of all lanes of a warp stand side by side in pieces of 16 bytes:

    16 bits  eight pieces: of 16 columns each, the four registers
    8 bits   four pieces: of 32 columns each, words (j, u), in a word bytes 2 c + h
    4 bits   two pieces: of 64 columns each, words j, in a word nibbles 4 c + r
    2 bits   one piece: words j / 2, in a word pairs of bits 8 c + 4 (j % 2) + r
    sign4    as 4 bits, but with magnitudes and signs of codes -7 to 7: in byte 2 c + h bits 0 to 2 are the magnitude
             of the upper row (u = 0) and bit 7 its sign, bits 4 to 6 that of the lower row, whose sign is bit 3 of the
             byte above (of byte 3: of byte 0)
    3 bits   the low two bits as those of 2 bits, then the third of all warps, a piece of 8 bytes: words j / 4, bits
             16 c + 4 (j % 4) + r

Behind codes of all warps stand the scales of 64 rows, then their zeros where the kind has them. Codes of 1 bit, a
column order, and groups that are neither whole rows nor multiples of 128 columns, cannot be held.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from tenfold.ops.formats import CODES, Format, Packed, can_stack, format_of, is_format, packed_of, stack, unpack
from tenfold.ops.matrix import Matrix, RawTensor

ROWS, COLS = 64, 128
SCALES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
NAMES = ("dense", "int2", "int3", "int4", "int8", "fp8", "sign4")  # the last: int4 for activations of 8 bits
MOST_KINDS = 8  # in one launch


@dataclass(frozen=True, slots=True, order=True)
class Kind:
    """What tiles of one matrix hold. name: of NAMES; scales: of SCALES, the type of scales and zeros; acts8: kernels
    may round activations to 8 bits.
    """

    name: str
    zeros: bool = False
    scales: int = 1
    acts8: bool = False

    @property
    def codes(self) -> str:
        """What formats call them."""
        return "int4" if self.name == "sign4" else self.name

    @property
    def bits(self) -> int:
        return 16 if self.name == "dense" else CODES[self.codes].bits

    @property
    def nbytes(self) -> int:
        """Of one tile."""
        extras = 0 if self.name == "dense" else ROWS * (4 if self.scales == SCALES[torch.float32] else 2)
        return ROWS * COLS * self.bits // 8 + extras * (1 + self.zeros)


DENSE = Kind("dense")


def obstacle(format: Format) -> str:
    """Why matrices of a packed format cannot lie in tiles, empty where they can."""
    if format.kind not in NAMES:
        return f"tiles have no codes of {format.kind}"
    if format.order:
        return "its columns lie in an order of their own"
    return f"its groups of {format.group} columns are no multiple of {COLS}" if format.group % COLS else ""


def grid(rows: int, cols: int) -> tuple[int, int]:
    """Tiles down and across."""
    return -(-rows // ROWS), -(-cols // COLS)


def kind_named(format: Format, scales: int = 1) -> Kind:
    """Of a format's matrices, if they have codes as our own rounding gives them. Codes of 4 bits with zeros keep
    activations of 16 bits.
    """
    eight = format.activations == 8 and (format.strict or format.kind != "int4")
    return Kind("sign4" if format.strict else format.kind, format.zero, scales, eight)


def kind_of(format: Format, packed: Packed) -> Kind:
    """Of a packed matrix. 4 bits with codes that have no opposite, which other tools write, keep activations of 16."""
    kind = kind_named(format, SCALES[packed.scales.dtype])
    if kind.name == "sign4" and bool((format.codes.load(packed.codes) == 0).any()):
        return Kind(format.kind, format.zero, kind.scales)
    return kind


def tile(format: Format, packed: Packed, pairs: bool = False, kind: Kind | None = None) -> Tensor:
    """A packed matrix -> its tiles, uint8 [down, across, bytes of a tile]. pairs: rows are gate, then up, and shall lie
    in turns of eight, so that a lane has both of a feature; kind: the matrix's, where it is known.

    Raises ValueError for a format that tiles cannot hold.
    """
    if obstacle(format):
        raise ValueError(f"Weights of {format.name} cannot lie in tiles: {obstacle(format)}.")
    kind = kind or kind_of(format, packed)
    numbers = format.codes.load(packed.codes).view(torch.uint8)
    cols = numbers.shape[1]
    across = grid(1, cols)[1]
    codes = CODES[kind.codes]
    filling = 0 if codes.bits == 8 else codes.middle
    lanes = spread(turned(numbers, pairs, filling), filling)
    blocks = store_signs(lanes) if kind.name == "sign4" else store(lanes, kind.bits)
    extras = [each for each in (packed.scales, packed.zeros) if each is not None]
    parts = [blocks]
    for values in extras:
        steps = values.expand(-1, across) if not format.group else values.repeat_interleave(format.group // COLS, dim=1)
        rows = turned(steps[:, :across], pairs, 0)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % ROWS))
        parts.append(rows.unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous().view(torch.uint8))
    return torch.cat([part.flatten(2) for part in parts], dim=2)


def tile_dense(values: Tensor, pairs: bool = False) -> Tensor:
    """The same of dense values [rows, cols] of 16 bits."""
    numbers = turned(values.view(torch.int16), pairs, 0)
    return store(spread(numbers, 0), 16).flatten(2)


def untile(kind: Kind, tiles: Tensor, rows: int, cols: int, dtype: torch.dtype, pairs: bool = False) -> Tensor:
    """The values [rows, cols] of tiles, computed in float32 and rounded to `dtype` once; dense tiles hold `dtype`."""
    size = ROWS * COLS * kind.bits // 8
    numbers = gathered(load_signs(tiles[:, :, :size]) if kind.name == "sign4" else load(tiles[:, :, :size], kind.bits))
    if kind.name == "dense":
        return unturned(numbers.view(dtype), pairs, rows)[:, :cols].contiguous()
    stored = next(t for t, code in SCALES.items() if code == kind.scales)
    extras = tiles[:, :, size:].contiguous().view(stored).unflatten(2, (-1, ROWS)).float()
    each = [part.transpose(1, 2).flatten(0, 1).repeat_interleave(COLS, dim=1) for part in extras.unbind(2)]
    codes = CODES[kind.codes]
    values = numbers.view(codes.dtype if codes.bits == 8 else torch.uint8).float()
    values = (values - (each[1] if kind.zeros else codes.middle)) * each[0]
    return unturned(values, pairs, rows)[:, :cols].to(dtype)


def turned(values: Tensor, pairs: bool, filling: int) -> Tensor:
    """Rows of gate, then up, in turns of eight; features beyond the last are filled up to 32."""
    if not pairs:
        return values
    halves = torch.nn.functional.pad(values.unflatten(0, (2, -1)), (0, 0, 0, -(len(values) // 2) % 32), value=filling)
    return halves.unflatten(1, (-1, 8)).transpose(0, 1).flatten(0, 2)


def unturned(values: Tensor, pairs: bool, rows: int) -> Tensor:
    if not pairs:
        return values[:rows]
    return values.unflatten(0, (-1, 2, 8)).transpose(0, 1).flatten(1, 2)[:, : rows // 2].flatten(0, 1)


def spread(numbers: Tensor, filling: int) -> Tensor:
    """Codes [rows, cols] -> [down, across, warp, lane, j, h, u, c] as the module names them."""
    padded = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % COLS, 0, -len(numbers) % ROWS), value=filling)
    parts = padded.unflatten(0, (-1, 4, 2, 8)).unflatten(4, (-1, 8, 2, 4, 2))  # down, w, u, g, across, j, h, t, c
    return parts.permute(0, 4, 1, 3, 7, 5, 6, 2, 8).flatten(3, 4)


def gathered(parts: Tensor) -> Tensor:
    """What `spread` spread."""
    down, across = parts.shape[:2]
    return parts.unflatten(3, (8, 4)).permute(0, 2, 7, 3, 1, 5, 6, 4, 8).reshape(down * ROWS, across * COLS)


def store(parts: Tensor, bits: int) -> Tensor:
    """[down, across, warp, lane, j, h, u, c] -> bytes [down, across, bytes of a tile's codes]."""
    if bits == 16:
        return by_piece(parts.flatten(5, 6).contiguous().view(torch.uint8), 16)
    if bits == 8:  # words (j, u) of bytes (c, h)
        return by_piece(parts.permute(0, 1, 2, 3, 4, 6, 7, 5).contiguous(), 16)
    if bits == 4:  # words j of nibbles (c, h, u)
        return by_piece(joined(parts.permute(0, 1, 2, 3, 4, 7, 5, 6), 4), 16)
    pairs = parts.unflatten(4, (4, 2))  # words j / 2 of (c, j % 2, h, u)
    low = by_piece(joined(pairs.permute(0, 1, 2, 3, 4, 8, 5, 6, 7) & 3, 2), 16)
    if bits == 2:
        return low
    fours = parts.unflatten(4, (2, 4))  # words j / 4 of (c, j % 4, h, u)
    return torch.cat([low, by_piece(joined(fours.permute(0, 1, 2, 3, 4, 8, 5, 6, 7) >> 2, 1), 8)], dim=2)


def load(stored: Tensor, bits: int) -> Tensor:
    """What `store` stored."""
    if bits == 16:
        return pieces(stored, 16).view(torch.int16).unflatten(4, (8, 2, 2, 2))
    if bits == 8:
        return pieces(stored, 16).unflatten(4, (8, 2, 2, 2)).permute(0, 1, 2, 3, 4, 7, 5, 6)
    if bits == 4:
        return parted(pieces(stored, 16), 4).unflatten(4, (8, 2, 2, 2)).permute(0, 1, 2, 3, 4, 6, 7, 5)
    size = ROWS * COLS // 4
    low = parted(pieces(stored[:, :, :size], 16), 2).unflatten(4, (4, 2, 2, 2, 2))
    numbers = low.permute(0, 1, 2, 3, 4, 6, 7, 8, 5).flatten(4, 5)
    if bits == 2:
        return numbers
    high = parted(pieces(stored[:, :, size:], 8), 1).unflatten(4, (2, 2, 4, 2, 2))
    return numbers | (high.permute(0, 1, 2, 3, 4, 6, 7, 8, 5).flatten(4, 5) << 2)


def store_signs(parts: Tensor) -> Tensor:
    """`store` of codes 1 to 15 of 4 bits, as sign4."""
    numbers = parts.permute(0, 1, 2, 3, 4, 7, 5, 6).to(torch.int16) - 8  # words j of (c, h, u)
    magnitudes, signs = numbers.abs().flatten(5, 6), (numbers < 0).to(torch.int16).flatten(5, 6)
    low = magnitudes[..., 0] | signs[..., 0] << 7
    high = magnitudes[..., 1] << 4 | signs[..., 1].roll(1, dims=5) << 3
    return by_piece((low | high).to(torch.uint8), 16)


def load_signs(stored: Tensor) -> Tensor:
    """What `store_signs` stored."""
    bytes_ = pieces(stored, 16).to(torch.int16).unflatten(4, (8, 4))
    low = (bytes_ & 7) * (1 - (bytes_ >> 6 & 2))
    high = (bytes_ >> 4 & 7) * (1 - (bytes_ >> 2 & 2).roll(-1, dims=5))
    numbers = (torch.stack((low, high), dim=6) + 8).to(torch.uint8)
    return numbers.unflatten(5, (2, 2)).permute(0, 1, 2, 3, 4, 6, 7, 5)


def by_piece(bytes_: Tensor, size: int) -> Tensor:
    """Each lane's bytes [down, across, warp, lane, ...], pieces of all lanes side by side -> [down, across, bytes]."""
    return bytes_.flatten(4).unflatten(4, (-1, size)).transpose(3, 4).flatten(2).contiguous()


def pieces(stored: Tensor, size: int) -> Tensor:
    """What `by_piece` made, each lane's bytes together again: [down, across, 4, 32, bytes]."""
    return stored.unflatten(2, (4, -1, 32, size)).transpose(3, 4).flatten(4).contiguous()


def joined(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., lane, words, ...], those of a word in the order of its bits -> bytes [..., lane, bytes]."""
    flat = codes.to(torch.uint8).flatten(4).unflatten(4, (-1, 8 // bits))
    shifts = bits * torch.arange(8 // bits, dtype=torch.uint8, device=codes.device)
    return (flat << shifts).sum(dim=5, dtype=torch.uint8)


def parted(bytes_: Tensor, bits: int) -> Tensor:
    """What `joined` joined: [..., lane, bytes] -> codes [..., lane, codes]."""
    shifts = bits * torch.arange(8 // bits, dtype=torch.uint8, device=bytes_.device)
    return ((bytes_[..., None] >> shifts) & ((1 << bits) - 1)).flatten(4)


@dataclass(frozen=True, slots=True, eq=False)
class Tiled:
    """One projection of every expert of a layer. data: tiles of each [down, across, bytes]; of: which of `kinds` they
    are; sources [experts, 2] int64: where each begins, and `kind + (bytes of a tile << 32)`, for kernels; dtype: of
    dense tiles.
    """

    data: tuple[Tensor, ...]
    kinds: tuple[Kind, ...]
    of: tuple[int, ...]
    sources: Tensor
    rows: int
    cols: int
    pairs: bool
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return sum(each.numel() for each in self.data)

    def matrix(self, expert: int) -> Matrix:
        """Of one expert, dense."""
        kind = self.kinds[self.of[expert]]
        values = untile(kind, self.data[expert], self.rows, self.cols, self.dtype, self.pairs)
        return Matrix("dense", self.rows, self.cols, (values,))


class Untiled(Sequence[Matrix]):
    """The matrices of tiled experts, made dense as they are asked for."""

    def __init__(self, tiled: Tiled) -> None:
        self.tiled = tiled

    def __len__(self) -> int:
        return len(self.tiled.data)

    @overload
    def __getitem__(self, at: int) -> Matrix: ...
    @overload
    def __getitem__(self, at: slice) -> list[Matrix]: ...
    def __getitem__(self, at: int | slice) -> Matrix | list[Matrix]:
        if isinstance(at, slice):
            return [self.tiled.matrix(i) for i in range(len(self))[at]]
        return self.tiled.matrix(range(len(self))[at])


def can_tile(experts: Sequence[Sequence[RawTensor]]) -> bool:
    """Whether experts' parts can lie in tiles and some are packed, so that it is of use."""
    packed = {parts[0].storage for parts in experts if can_stack(parts)}
    return bool(packed) and not refuses(packed)


def refuses(storages: Iterable[str]) -> bool:
    """Whether any of these is a packed format that cannot lie in tiles."""
    return any(is_format(name) and obstacle(format_of(name)) for name in storages)


def bank(
    experts: Sequence[Sequence[RawTensor]],
    pairs: bool,
    dense: Callable[[Sequence[RawTensor]], Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> Tiled:
    """Tiles of all experts, for which `can_tile` holds. pairs: see `tile`; dense(parts): the values of parts that are
    packed in no format, or in different ones; dtype: of dense tiles, which kinds beyond MOST_KINDS become too.
    """
    kinds: dict[Kind, int] = {}
    data, of = [], []
    for parts in experts:
        if can_stack(parts):
            matrix = stack(parts, device)
            format, packed = format_of(matrix.format), packed_of(matrix)
            kind = kind_of(format, packed)
            if kind in kinds or len(kinds) < MOST_KINDS - 1:
                data.append(tile(format, packed, pairs, kind))
                of.append(kinds.setdefault(kind, len(kinds)))
                continue
            values = unpack(matrix, dtype)
        else:
            values = dense(parts)
        data.append(tile_dense(values.to(device, dtype), pairs))
        of.append(kinds.setdefault(DENSE, len(kinds)))
    rows, cols = sum(part.shape[0] for part in experts[0]), experts[0][0].shape[1]
    names = tuple(kinds)
    sources = [(each.data_ptr(), at + (names[at].nbytes << 32)) for at, each in zip(of, data)]
    table = torch.tensor(sources, dtype=torch.int64, device=device)
    return Tiled(tuple(data), names, tuple(of), table, rows, cols, pairs, dtype)
