"""Packed formats on the CPU: each becomes a block type of the compiled kernels that holds exactly the same values.

Codes of 2, 3 and 4 bits without zeros become Q4_0, other whole-number codes Q8_0 (a code less its zero fits 8 bits),
with a group's scale repeated for every 32 columns. What those cannot say (fp8, scales that float16 cannot hold, zeros
that are fractions, as those of 1 bit are, columns in an order of their own) is kept as float32.
"""

import torch
from torch import Tensor

from tenfold.ops.blocks import assemble, pair_nibbles
from tenfold.ops.formats import Packed, format_of, is_format, packed_of, unpack
from tenfold.ops.matrix import RawTensor

BLOCK = 32  # columns that share a scale in Q4_0 and Q8_0
NIBBLE_MIDDLE = 8  # the code of zero in Q4_0


def cpu_storage(storage: str) -> str:
    """What a packed format becomes, unless its scales are too fine, or its zeros fractions or too far from codes."""
    format = format_of(storage)
    if format.kind in ("fp8", "int1") or format.order:
        return "F32"
    return "Q4_0" if format.bits <= 4 and not format.zero else "Q8_0"


def has_fractions(raw: RawTensor) -> bool:
    """Whether zeros of a packed tensor are none that Q8_0 can say. Reads the tensor."""
    zeros = packed_of(raw).zeros
    return zeros is not None and not torch.equal(zeros.float(), zeros.float().round())


def repack(raw: RawTensor) -> RawTensor:
    """The same values in a storage of the CPU kernels; a tensor that has one already is returned as it is."""
    if not is_format(raw.storage):
        return raw
    packed, cols = packed_of(raw), raw.shape[1]
    storage = cpu_storage(raw.storage)
    scales = packed.scales.to(torch.float16)
    if storage == "F32" or cols % BLOCK or not torch.equal(scales.float(), packed.scales.float()):
        return values(raw)
    if storage == "Q4_0":
        known = format_of(raw.storage).codes
        codes = known.load(packed.codes).view(-1, BLOCK) + (NIBBLE_MIDDLE - known.middle)
        data = assemble(packed.codes, blocks_of(raw, scales), pair_nibbles(codes))
        return RawTensor(raw.name, storage, raw.shape, data)
    signed = differences(raw, packed)
    if signed is None:
        return values(raw)
    return RawTensor(raw.name, storage, raw.shape, assemble(signed, blocks_of(raw, scales), signed.view(-1, BLOCK)))


def values(raw: RawTensor) -> RawTensor:
    return RawTensor(raw.name, "F32", raw.shape, unpack(raw))


def blocks_of(raw: RawTensor, scales: Tensor) -> Tensor:
    """Scales [rows, groups] -> one for each block, [rows * blocks of a row, 1]."""
    blocks = raw.shape[1] // BLOCK
    repeats = (format_of(raw.storage).group or raw.shape[1]) // BLOCK
    return scales.repeat_interleave(repeats, dim=1)[:, :blocks].reshape(-1, 1)


def differences(raw: RawTensor, packed: Packed) -> Tensor | None:
    """Codes less their zeros as int8 [rows, cols], None where they are no whole numbers of 8 bits."""
    format = format_of(raw.storage)
    codes = format.codes.load(packed.codes)
    if packed.zeros is None:
        return (codes.to(torch.int16) - format.codes.middle).to(torch.int8)
    zeros = packed.zeros.float()
    if not torch.equal(zeros, zeros.round()) or zeros.abs().max() > 256:
        return None
    group = format.group or raw.shape[1]
    wide = codes.to(torch.int16) - zeros.to(torch.int16).repeat_interleave(group, dim=1)[:, : raw.shape[1]]
    return None if wide.amin() < -128 or wide.amax() > 127 else wide.to(torch.int8)
