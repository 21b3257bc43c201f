"""How files store numbers: the size of every block type of GGUF, its decoding, encoders for the simple ones, and the
one way (`dequantize`, `quantize`, `storage_bytes`) to values and bytes of any storage, packed formats included.

Invariant: every block type is decoded into the same three parts (`Groups`): small integer codes, and for each group of
neighbours in a row one scale and perhaps one minimum; a value is `code * scale + minimum`. Layouts are the block
structures of ggml, little endian.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.ops.formats import format_of, inverse, is_format, raw_tensor, unpack
from tenfold.ops.matrix import RawTensor

# Elements decoded at once: the float32 intermediates of a chunk stay near the caches, whatever the size of the tensor.
CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Decoded blocks. codes [blocks, groups, size] uint8 or int8; scale, minimum [blocks, groups] float32 (or None)."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None

    def values(self) -> Tensor:
        """[blocks, groups * size] float32."""
        values = self.codes.to(torch.float32).mul_(self.scale[:, :, None])
        if self.minimum is not None:
            values.add_(self.minimum[:, :, None])
        return values.flatten(1)


@dataclass(frozen=True, slots=True)
class BlockType:
    """`elements` neighbours of a row take `nbytes` bytes; `decode` turns uint8 [blocks, nbytes] into Groups."""

    elements: int
    nbytes: int
    decode: Callable[[Tensor], Groups]


def half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block -> [blocks, 1] float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def fields(packed: Tensor, bits: int) -> Tensor:
    """Unpack fields of `bits` bits, lowest first: uint8 [..., n] -> uint8 [..., 8 / bits, n]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).unsqueeze(-1)
    return (packed.unsqueeze(-2) >> shifts) & ((1 << bits) - 1)


def bit_row(packed: Tensor) -> Tensor:
    """Unpack bits in order, lowest first: uint8 [blocks, n] -> uint8 [blocks, 8 * n]."""
    return ((packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)


def centred(codes: Tensor, middle: int) -> Tensor:
    """Unsigned codes (below 128) as int8 with `middle` taken off."""
    return codes.view(torch.int8) - middle


def five_bits(high: Tensor, low: Tensor) -> Tensor:
    """Codes of Q5_0 and Q5_1: fifth bits [blocks, 4] and nibbles [blocks, 16] -> [blocks, 1, 32]."""
    return (fields(low, 4).flatten(1) | (bit_row(high) << 4)).unsqueeze(1)


def six_bit_pairs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight 6-bit scales and minimums of Q4_K and Q5_K: uint8 [blocks, 12] -> two of [blocks, 8] float32."""
    first, second, mixed = packed.split(4, dim=1)
    scales = torch.cat((first & 63, (mixed & 15) | ((first >> 6) << 4)), dim=1)
    minimums = torch.cat((second & 63, (mixed >> 4) | ((second >> 6) << 4)), dim=1)
    return scales.float(), minimums.float()


def decode_q4_0(blocks: Tensor) -> Groups:
    return Groups(centred(fields(blocks[:, 2:], 4).flatten(1), 8).unsqueeze(1), half(blocks, 0))


def decode_q4_1(blocks: Tensor) -> Groups:
    return Groups(fields(blocks[:, 4:], 4).flatten(1).unsqueeze(1), half(blocks, 0), half(blocks, 2))


def decode_q5_0(blocks: Tensor) -> Groups:
    return Groups(centred(five_bits(blocks[:, 2:6], blocks[:, 6:]), 16), half(blocks, 0))


def decode_q5_1(blocks: Tensor) -> Groups:
    return Groups(five_bits(blocks[:, 4:8], blocks[:, 8:]), half(blocks, 0), half(blocks, 2))


def decode_q8_0(blocks: Tensor) -> Groups:
    return Groups(blocks[:, 2:].view(torch.int8).unsqueeze(1), half(blocks, 0))


def decode_q2_k(blocks: Tensor) -> Groups:
    """scales and minimums 16 x (4 + 4 bits) · codes 64 bytes · scale of scales · scale of minimums."""
    scales, minimums = (blocks[:, :16] & 15).float(), (blocks[:, :16] >> 4).float()
    codes = fields(blocks[:, 16:80].unflatten(1, (2, 32)), 2)
    return Groups(codes.reshape(-1, 16, 16), half(blocks, 80) * scales, -(half(blocks, 82) * minimums))


def decode_q3_k(blocks: Tensor) -> Groups:
    """third bits 32 bytes · low bits 64 bytes · 16 6-bit scales (8 bytes of low nibbles, 4 of high pairs) · scale."""
    high = fields(blocks[:, :32], 1).reshape(-1, 16, 16)
    low = fields(blocks[:, 32:96].unflatten(1, (2, 32)), 2).reshape(-1, 16, 16)
    scales = fields(blocks[:, 96:104], 4).flatten(1) | (fields(blocks[:, 104:108], 2).flatten(1) << 4)
    return Groups(centred(low | (high << 2), 4), half(blocks, 108) * centred(scales, 32).float())


def decode_q4_k(blocks: Tensor) -> Groups:
    """scale of scales · scale of minimums · 8 6-bit scales and minimums in 12 bytes · codes 128 bytes."""
    scales, minimums = six_bit_pairs(blocks[:, 4:16])
    codes = fields(blocks[:, 16:].unflatten(1, (4, 32)), 4)
    return Groups(codes.reshape(-1, 8, 32), half(blocks, 0) * scales, -(half(blocks, 2) * minimums))


def decode_q5_k(blocks: Tensor) -> Groups:
    """As Q4_K, with 32 bytes of fifth bits before the codes."""
    scales, minimums = six_bit_pairs(blocks[:, 4:16])
    low = fields(blocks[:, 48:].unflatten(1, (4, 32)), 4).reshape(-1, 8, 32)
    return Groups(low | (fields(blocks[:, 16:48], 1) << 4), half(blocks, 0) * scales, -(half(blocks, 2) * minimums))


def decode_q6_k(blocks: Tensor) -> Groups:
    """low nibbles 128 bytes · high pairs 64 bytes · 16 int8 scales · scale."""
    low = fields(blocks[:, :128].unflatten(1, (2, 64)), 4).reshape(-1, 16, 16)
    high = fields(blocks[:, 128:192].unflatten(1, (2, 32)), 2).reshape(-1, 16, 16)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return Groups(centred(low | (high << 4), 32), half(blocks, 208) * scales)


DENSE: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCKS: dict[str, BlockType] = {
    "Q4_0": BlockType(32, 18, decode_q4_0),
    "Q4_1": BlockType(32, 20, decode_q4_1),
    "Q5_0": BlockType(32, 22, decode_q5_0),
    "Q5_1": BlockType(32, 24, decode_q5_1),
    "Q8_0": BlockType(32, 34, decode_q8_0),
    "Q2_K": BlockType(256, 84, decode_q2_k),
    "Q3_K": BlockType(256, 110, decode_q3_k),
    "Q4_K": BlockType(256, 144, decode_q4_k),
    "Q5_K": BlockType(256, 176, decode_q5_k),
    "Q6_K": BlockType(256, 210, decode_q6_k),
}


def row_bytes(storage: str, cols: int) -> int:
    """Bytes of a row of `cols` values. Raises ValueError for an unknown storage or a row that is not whole blocks."""
    if storage in DENSE:
        return cols * DENSE[storage].itemsize
    if storage not in BLOCKS:
        raise ValueError(f"Storage {storage!r} is unknown; allowed: {', '.join([*DENSE, *BLOCKS])}.")
    block = BLOCKS[storage]
    if cols % block.elements:
        raise ValueError(f"A row of {cols} values cannot be {storage}: it stores multiples of {block.elements}.")
    return cols // block.elements * block.nbytes


def storage_bytes(storage: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this shape; packed formats with the matrix's scales. Raises ValueError as `row_bytes`."""
    if is_format(storage):
        return format_of(storage).nbytes(shape[0], shape[1])
    return math.prod(shape[:-1]) * row_bytes(storage, shape[-1] if shape else 1)


def dequantize(raw: RawTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of a stored tensor, `raw.shape`, in `dtype`; a dense tensor that has that type already is not copied.

    Blocks and codes are decoded in float32 and rounded to `dtype` once. Raises ValueError for an unknown storage.
    """
    if raw.storage in DENSE:
        return raw.data.to(dtype)
    if is_format(raw.storage):
        return unpack(raw, dtype)
    row_bytes(raw.storage, raw.shape[-1])
    block = BLOCKS[raw.storage]
    blocks = raw.data.reshape(-1, block.nbytes)
    out = torch.empty(len(blocks), block.elements, dtype=dtype)
    step = CHUNK_ELEMENTS // block.elements
    for start in range(0, len(blocks), step):
        out[start : start + step] = block.decode(blocks[start : start + step]).values()
    return out.view(raw.shape)


def blocks_of_32(values: Tensor) -> Tensor:
    if values.dim() != 2 or values.shape[1] % 32:
        raise ValueError(f"Values of shape {tuple(values.shape)} cannot be quantised; needed: [rows, multiple of 32].")
    return values.float().reshape(-1, 32)


def assemble(values: Tensor, *parts: Tensor) -> Tensor:
    """Byte parts of each block side by side -> uint8 [rows, bytes of a row]."""
    return torch.cat([part.view(torch.uint8) for part in parts], dim=1).reshape(len(values), -1)


def pair_nibbles(codes: Tensor) -> Tensor:
    """Codes 0 to 15 [blocks, 32] -> uint8 [blocks, 16]: value i and value i + 16 share a byte."""
    low, high = codes.to(torch.uint8).chunk(2, dim=1)
    return low | (high << 4)


def encode_q8_0(values: Tensor) -> Tensor:
    """Dense [rows, cols] -> Q8_0 bytes uint8 [rows, cols / 32 * 34]: the largest magnitude of 32 becomes 127."""
    blocks = blocks_of_32(values)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    scaled = blocks * inverse(scale)
    # Halves round away from zero, as ggml rounds them; torch.round would take them to even.
    codes = torch.trunc(scaled + torch.copysign(torch.full_like(scaled, 0.5), scaled)).to(torch.int8)
    return assemble(values, scale.half(), codes)


def encode_q4_0(values: Tensor) -> Tensor:
    """Dense [rows, cols] -> Q4_0 bytes uint8 [rows, cols / 32 * 18]: of 32, the largest in magnitude becomes -8."""
    blocks = blocks_of_32(values)
    scale = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True)) / -8
    codes = torch.trunc(blocks * inverse(scale) + 8.5).clamp_(0, 15)
    return assemble(values, scale.half(), pair_nibbles(codes))


def encode_q4_1(values: Tensor) -> Tensor:
    """Dense [rows, cols] -> Q4_1 bytes uint8 [rows, cols / 32 * 20]: the smallest of 32 becomes 0, the largest 15."""
    blocks = blocks_of_32(values)
    low = blocks.amin(dim=1, keepdim=True)
    scale = (blocks.amax(dim=1, keepdim=True) - low) / 15
    codes = torch.trunc((blocks - low) * inverse(scale) + 0.5).clamp_(0, 15)
    return assemble(values, scale.half(), low.half(), pair_nibbles(codes))


ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": encode_q8_0,
    "Q4_0": encode_q4_0,
    "Q4_1": encode_q4_1,
}


def quantize(raw: RawTensor, storage: str) -> RawTensor:
    """A matrix [rows, cols] stored as F32, F16, BF16, Q8_0, Q4_0, Q4_1 or a packed format, rounded to nearest.

    Raises ValueError for another storage, and for a matrix whose rows are not whole blocks.
    """
    if storage in DENSE:
        return RawTensor(raw.name, storage, raw.shape, dequantize(raw, DENSE[storage]))
    if is_format(storage):
        format, dense = format_of(storage), raw.data if raw.storage in DENSE else dequantize(raw)
        return raw_tensor(raw.name, format, dense.shape[0], dense.shape[1], format.pack(dense))
    if storage not in ENCODERS:
        raise ValueError(f"Tenfold cannot quantise to {storage!r}; allowed: {', '.join([*DENSE, *ENCODERS])}.")
    return RawTensor(raw.name, storage, raw.shape, ENCODERS[storage](dequantize(raw)))
