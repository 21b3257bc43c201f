"""Clipped dynamic quantisation per token and group (arXiv 2405.06219, section 3), and back.

Codes of 8 bits are float8 e4m3 instead, with a scale for each token and group and no zero.

Invariant: what `quantize` returns is all that is stored; `dequantize` uses nothing else, and attention computes with
exactly what it gives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.ops.kv.packing import FLOAT8_BITS, LEVELS, pack, unpack

LEAST_SCALE = 1e-5
E4M3_LARGEST = 448.0
# What scales of float8 codes are multiples of where none was measured: as E4M3 they bring back groups whose largest
# number is 0.01 to 1,568, while 1 would lose all below 0.4.
UNMEASURED_UNIT = 2.0**-7
STORED = {"e4m3": torch.float8_e4m3fn, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class Grouping:
    """How the keys, or the values, of one layer are grouped. C channels (kv_heads * head_dim) in G groups.

    group [C] int64: the group of each channel, the same number of channels each, inside one span of heads; clip [G]
    float32 in (0, 1]: what a token's minimum and maximum are multiplied by; unit [G] float32, powers of two:
    parameters are stored in multiples of it, which keeps small ones out of the subnormal numbers of E4M3; shift [C]
    float32: taken off before and added after. The groups of a span are consecutive.
    """

    group: Tensor
    clip: Tensor
    unit: Tensor
    shift: Tensor

    @property
    def order(self) -> Tensor:
        """[G, C / G] int64: the channels of each group, in ascending order."""
        return self.group.argsort(stable=True).view(len(self.clip), -1)

    def to(self, device: torch.device | str) -> "Grouping":
        return Grouping(*(t.to(device) for t in (self.group, self.clip, self.unit, self.shift)))


def plain(channels: int, group: int, unit: float = 1.0) -> Grouping:
    """Groups of neighbouring channels, nothing clipped, nothing shifted. Raises ValueError."""
    if channels % group:
        raise ValueError(f"{channels} channels cannot be cut into groups of {group}; take a divisor.")
    ones = torch.ones(channels // group)
    return Grouping(torch.arange(channels) // group, ones, unit * ones, torch.zeros(channels))


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """Of T tokens: codes [T, C] uint8 in the order of channels, parameters [T, G, 2], scale and zero of each group in
    multiples of the grouping's unit, float8_e4m3fn or float16; [T, G, 1], scales alone, for codes of 8 bits.
    """

    codes: Tensor
    parameters: Tensor


def quantize(x: Tensor, grouping: Grouping, bits: float, parameters: str = "e4m3") -> Quantized:
    """x [T, C] of any floating type, finite.

    With lo, hi the minimum and maximum of a group's (x - shift), times clip:
    scale = max((hi - lo) / (levels - 1), 1e-5), code = round(clamp((x - shift - lo) / scale, 0, levels - 1)).
    Codes come from the scale and zero before they are rounded to the type that is stored. 8 bits: the scale brings the
    largest magnitude to E4M3's largest number, and is rounded before codes come from it; 0 over a scale of 0 is 0.
    """
    order, top = grouping.order, LEVELS[bits] - 1
    grouped = (x.float() - grouping.shift)[:, order]
    if bits == FLOAT8_BITS:
        scale = (grouping.clip * grouped.abs().amax(-1) / E4M3_LARGEST).clamp(min=LEAST_SCALE) / grouping.unit
        kept = stored(scale[..., None], parameters)
        ratio = (grouped / (kept.float() * grouping.unit[:, None])).nan_to_num(0.0)  # a scale may round to 0
        codes = ratio.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
        return Quantized(_ungrouped(codes, order), kept)
    lo, hi = (grouping.clip * edge for edge in (grouped.amin(-1), grouped.amax(-1)))
    scale = ((hi - lo) / top).clamp(min=LEAST_SCALE)
    codes = ((grouped - lo[..., None]) / scale[..., None]).clamp(0, top).round().to(torch.uint8)
    kept = stored(torch.stack((scale, lo), -1) / grouping.unit[:, None], parameters)
    return Quantized(_ungrouped(codes, order), kept)


def _ungrouped(codes: Tensor, order: Tensor) -> Tensor:
    """codes [T, G, C / G] of each group -> [T, C] in the order of channels."""
    flat = torch.empty_like(codes.flatten(1))
    flat[:, order.flatten()] = codes.flatten(1)
    return flat


def stored(parameters: Tensor, name: str) -> Tensor:
    """Rounded to the type of the name; what E4M3 cannot hold becomes its largest number instead of NaN."""
    dtype = STORED[name]
    largest = E4M3_LARGEST if name == "e4m3" else torch.finfo(dtype).max
    return parameters.clamp(-largest, largest).to(dtype)


def dequantize(quantized: Quantized, grouping: Grouping) -> Tensor:
    """`code * scale + zero + shift`, [T, C] float32."""
    parameters = quantized.parameters.float() * grouping.unit[:, None]
    if parameters.shape[-1] == 1:
        numbers = quantized.codes.view(torch.float8_e4m3fn).float()
        return numbers * parameters[..., 0][:, grouping.group] + grouping.shift
    scale, zero = (p[:, grouping.group] for p in parameters.unbind(-1))
    return quantized.codes.float() * scale + zero + grouping.shift


def rounded(x: Tensor, grouping: Grouping, bits: float, parameters: str = "e4m3") -> Tensor:
    """What x [T, C] is after it was stored, float32."""
    return dequantize(quantize(x, grouping, bits, parameters), grouping)


def to_bytes(quantized: Quantized, bits: float, kv_heads: int) -> tuple[Tensor, Tensor]:
    """The codes by head [T, kv_heads, bytes] uint8 (`packing`) and the parameters [T, G, bytes] uint8: of each group
    its scale, then its zero.
    """
    heads = quantized.codes.unflatten(1, (kv_heads, -1))
    return pack(heads, bits), quantized.parameters.contiguous().view(torch.uint8)


def from_bytes(codes: Tensor, parameters: Tensor, bits: float, head_dim: int, name: str = "e4m3") -> Quantized:
    """The inverse of `to_bytes`; name: type of the parameters."""
    return Quantized(unpack(codes, bits, head_dim).flatten(1), parameters.contiguous().view(STORED[name]))


def hadamard(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Orthonormal, symmetric [size, size]; size is a power of two. Raises ValueError."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"A Hadamard matrix of {size} rows was asked for; allowed: powers of two.")
    h = torch.ones(1, 1, device=device)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1))) / 2**0.5
    return h
