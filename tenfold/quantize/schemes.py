"""Schemes of weights and activations as they are rounded to: what a matrix becomes, and how many bits that takes.

    w_hat[r, j] = (code[r, j] - zero[r, g]) * scale[r, g]        g = j // group; without groups, one for the whole row

Names: `w4g128z` is codes of 4 bits, 128 columns a group, with zeros; `fp8` is codes of float8 e4m3, whose value is
`code * scale`; `a8`: activations are rounded to float8 e4m3 too, one scale a token. Codes without zeros are symmetric
about the middle, with activations of 8 bits and weights of 4 strictly: code 0 is left out, which tensor cores of 8 bits
are not given. Scales and zeros are kept in float16, those of float8 in float32.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.ops.formats import FP8_MAX, LEAST_TOKEN, Format, Packed, strict, two_levels

NAME = re.compile(r"(?:w([1-8])|fp8)(?:g([1-9]\d*))?(z?)(?:a(8|16))?")
PARAMETER_BITS = 16  # of a scale, and of a zero
FP8_SCALE_BITS = 32
SHRINKS = tuple(1 - 0.04 * i for i in range(16))  # of the range from the least to the largest, that are tried
WIDE = (1.0,)


@dataclass(frozen=True, slots=True)
class Scheme:
    """bits of a code; group: columns that share a scale, 0 for all of a row; zero: groups have zeros; activations: bits
    that these are rounded to, 16 for none; float8: codes are numbers of e4m3, not whole ones.
    """

    bits: int
    group: int = 0
    zero: bool = False
    activations: int = 16
    float8: bool = False

    def __str__(self) -> str:
        codes = "fp8" if self.float8 else f"w{self.bits}"
        group = f"g{self.group}" if self.group else ""
        return f"{codes}{group}{'z' * self.zero}{'a8' * (self.activations == 8)}"

    @property
    def lowest(self) -> int:
        """What is taken from codes and zeros when they are stored: whole numbers of 8 bits have signs."""
        return 128 if self.bits == 8 else 0

    @property
    def least(self) -> int:
        """The lowest code that rounding gives, counted from 0."""
        return int(strict(self.bits, self.zero, self.activations))

    @property
    def eights(self) -> bool:
        """Whether kernels multiply it by activations of 8 bits, where that is faster."""
        return self.activations == 8 and (self.float8 or bool(self.least))

    def stored_bits(self, cols: int) -> float:
        """Of a weight in a matrix with so many columns, scales and zeros included."""
        extras = FP8_SCALE_BITS if self.float8 else PARAMETER_BITS * (1 + self.zero)
        return self.bits + extras / min(self.group or cols, cols)


def parse(name: str) -> Scheme:
    """The scheme of this name. Raises ValueError."""
    found = NAME.fullmatch(name)
    if found is None:
        raise ValueError(
            f"{name!r} is no scheme; allowed: wBITS from w1 to w8, or fp8, then gN for groups of N columns, z for "
            "zeros, a8 for activations of 8 bits, as in w4g128z, w4a8 or fp8a8."
        )
    bits, group, zero, activations = found.groups()
    return Scheme(int(bits or 8), int(group or 0), bool(zero), int(activations or 16), bits is None)


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Scales and zeros of a matrix, [rows, groups] float32 with the values that they are stored with."""

    scheme: Scheme
    scales: Tensor
    zeros: Tensor

    def group_of(self, column: int) -> int:
        return column // self.scheme.group if self.scheme.group else 0

    def rounded(self, w: Tensor, column: int) -> Tensor:
        """One column [rows] of the matrix as it is stored."""
        g = self.group_of(column)
        return on_grid(w, self.scales[:, g], self.zeros[:, g], self.scheme)


def on_grid(w: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    if scheme.float8:
        return to_float8(w / scale).float() * scale
    codes = torch.round(w / scale + zero).clamp_(scheme.least, (1 << scheme.bits) - 1)
    return (codes - zero) * scale


def to_float8(values: Tensor) -> Tensor:
    """The nearest numbers of e4m3, and the largest for what lies beyond it."""
    return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def grid_of(w: Tensor, scheme: Scheme, shrinks: Sequence[float] = SHRINKS) -> Grid:
    """For w [rows, cols] float32: with zeros from the least to the largest of a group, else from minus to plus the
    largest magnitude; of ranges shrunk so much the one with the least square error, group by group. One bit: the mean
    plus and minus the mean distance from it. Raises ValueError where groups do not divide the columns.
    """
    rows, cols = w.shape
    group = scheme.group or cols
    if cols % group:
        raise ValueError(f"{scheme} has groups of {group} columns and the matrix {cols}; allowed: divisors of that.")
    parts = w.float().view(rows, -1, group)
    if scheme.bits == 1:
        means, distances = two_levels(parts, torch.full((parts.shape[1],), group))
        scales = _scales(distances)
        return Grid(scheme, scales, _half(0.5 - means / scales) if scheme.zero else torch.full_like(scales, 0.5))
    scales, zeros = _range(parts, scheme, shrinks[0])
    best = _error(parts, scales, zeros, scheme)
    for shrink in shrinks[1:]:
        tried = _range(parts, scheme, shrink)
        error = _error(parts, *tried, scheme)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, tried[0], scales), torch.where(better, tried[1], zeros)
    return Grid(scheme, scales, zeros)


def _error(parts: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    """Square error of each group [rows, groups]."""
    return (on_grid(parts, scales[..., None], zeros[..., None], scheme) - parts).square().sum(-1)


def _range(parts: Tensor, scheme: Scheme, shrink: float) -> tuple[Tensor, Tensor]:
    """Scales and zeros [rows, groups]."""
    if scheme.float8:
        scales = (shrink * parts.abs().amax(-1) / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
        return scales, torch.zeros_like(scales)
    if scheme.zero:
        low, high = parts.amin(-1).clamp(max=0.0), parts.amax(-1).clamp(min=0.0)
        scales = _scales(shrink * (high - low) / ((1 << scheme.bits) - 1))
        return scales, _half(-shrink * low / scales - scheme.lowest) + scheme.lowest
    middle = 1 << (scheme.bits - 1)
    scales = _scales(shrink * parts.abs().amax(-1) / (middle - 1))
    return scales, torch.full_like(scales, float(middle))


def _half(values: Tensor) -> Tensor:
    """As float16 has them."""
    return values.to(torch.float16).float()


def _scales(values: Tensor) -> Tensor:
    """As float16 has them, never 0."""
    return _half(values).clamp(min=2.0**-24)


def round_to_nearest(w: Tensor, scheme: Scheme, shrinks: Sequence[float] = SHRINKS) -> Tensor:
    """w [rows, cols] as it is stored, float32."""
    grid, group = grid_of(w, scheme, shrinks), scheme.group or w.shape[1]
    parts = w.float().view(len(w), -1, group)
    return on_grid(parts, grid.scales[..., None], grid.zeros[..., None], scheme).view_as(w)


def round_activations(x: Tensor, scheme: Scheme) -> Tensor:
    """x [tokens, features] as a product of the scheme sees it: float8 e4m3, the largest of a token as 448, like
    ops/gpu/csrc/quantize.cu. Kernels that keep 16 bits are nearer to x.
    """
    if scheme.activations == 16:
        return x
    largest = x.float().abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > LEAST_TOKEN, FP8_MAX / largest, 0.0)
    return (to_float8(x.float() * inverse).float() * (largest / FP8_MAX)).to(x.dtype)


STORED = (1, 2, 3, 4, 8)  # bits of whole numbers that there is a packed format for


def format_of_scheme(scheme: Scheme) -> Format:
    """The packed format that holds what a scheme rounds to. Raises ValueError where there is none."""
    if scheme.bits not in STORED:
        raise ValueError(
            f"{scheme} cannot be stored; formats have {', '.join(map(str, STORED))} bits. Take one of those schemes."
        )
    kind = "fp8" if scheme.float8 else f"int{scheme.bits}"
    return Format(kind, scheme.group, scheme.zero, activations=scheme.activations)


def packed(rounded: Tensor, grid: Grid) -> Packed:
    """What `rounded` [rows, cols] of a grid is stored as, exactly. Raises ValueError as `format_of_scheme` does, and
    for columns that the format cannot hold.
    """
    scheme = grid.scheme
    format = format_of_scheme(scheme)
    rows, cols = rounded.shape
    if obstacle := format.obstacle(cols):
        raise ValueError(f"A matrix {rows} x {cols} cannot be stored as {format.name}: {obstacle}.")
    group = scheme.group or cols
    parts = rounded.float().view(rows, -1, group)
    if scheme.float8:
        return Packed(to_float8(parts / grid.scales[..., None]).view(rows, cols), grid.scales)
    codes = torch.round(parts / grid.scales[..., None] + grid.zeros[..., None]).view(rows, cols)
    zeros = (grid.zeros - scheme.lowest).to(torch.float16) if scheme.zero else None
    return Packed(format.codes.store(codes - scheme.lowest), grid.scales.to(torch.float16), zeros)
