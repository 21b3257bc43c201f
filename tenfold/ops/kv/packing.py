"""Codes to bytes and back, a head at a time, exactly.

Layout: the codes of one token and one kv head are contiguous and in the order of the head's channels, whatever groups
they belong to, so a kernel that serves a head reads one run of bytes. The first channel is in the lowest bits:

    2 bits    4 codes a byte    byte = c0 + 4 c1 + 16 c2 + 64 c3
    4 bits    2 codes a byte    byte = c0 + 16 c1
    3 bits    8 codes in 3 bytes, a little-endian number of 24 bits
    1.5 bits  5 codes a byte    byte = c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4, at most 242
    8 bits    a code a byte

The last byte of a head is filled with codes of 0. A head of 128 channels takes 26 bytes at 1.5 bits, 32 at 2; the codes
of 16 tokens of a head are always a multiple of 16 bytes.
"""

import torch
from torch import Tensor

LEVELS = {1.5: 3, 2: 4, 3: 8, 4: 16, 8: 256}  # bits to the number of codes
FLOAT8_BITS = 8  # codes of which are float8 e4m3 numbers
UNITS = {1.5: (5, 1), 2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # bits to (codes, bytes) of a unit


def packed_bytes(channels: int, bits: float) -> int:
    """Bytes of one head's codes of one token."""
    codes, size = UNITS[bits]
    return -(-channels // codes) * size


def pack(codes: Tensor, bits: float) -> Tensor:
    """codes [..., C] uint8, each below LEVELS[bits] -> [..., packed_bytes(C, bits)] uint8. Raises ValueError."""
    if bits not in LEVELS:
        raise ValueError(f"bits is {bits}; allowed: {', '.join(map(str, LEVELS))}.")
    if codes.dtype != torch.uint8 or (codes.numel() and int(codes.max()) >= LEVELS[bits]):
        raise ValueError(f"Codes of {bits:g} bits are uint8 from 0 to {LEVELS[bits] - 1}; some are not.")
    count, size = UNITS[bits]
    units = -(-codes.shape[-1] // count)
    filled = torch.nn.functional.pad(codes, (0, units * count - codes.shape[-1]))
    number = (filled.unflatten(-1, (units, count)).int() * _places(bits, codes.device)).sum(-1, dtype=torch.int32)
    shifts = 8 * torch.arange(size, dtype=torch.int32, device=codes.device)
    return (number[..., None] >> shifts & 255).to(torch.uint8).flatten(-2)


def unpack(data: Tensor, bits: float, channels: int) -> Tensor:
    """The codes [..., channels] uint8 that `pack` made data [..., packed_bytes(channels, bits)] of. Raises
    ValueError for data of another width.
    """
    if bits not in LEVELS:
        raise ValueError(f"bits is {bits}; allowed: {', '.join(map(str, LEVELS))}.")
    if data.shape[-1] != packed_bytes(channels, bits):
        raise ValueError(
            f"{data.shape[-1]} bytes a head were given; {channels} codes of {bits:g} bits take "
            f"{packed_bytes(channels, bits)}."
        )
    _, size = UNITS[bits]
    shifts = 8 * torch.arange(size, dtype=torch.int32, device=data.device)
    number = (data.unflatten(-1, (-1, size)).int() << shifts).sum(-1, dtype=torch.int32)
    codes = number[..., None] // _places(bits, data.device) % LEVELS[bits]
    return codes.to(torch.uint8).flatten(-2)[..., :channels]


def _places(bits: float, device: torch.device) -> Tensor:
    """What each code of a unit is multiplied by."""
    return LEVELS[bits] ** torch.arange(UNITS[bits][0], dtype=torch.int32, device=device)
