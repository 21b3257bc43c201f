"""Rotary position tables: every scaling in use, computed once for the longest sequence an engine will run.

Invariant: frequencies and angles go through the same float32 operations as in Hugging Face transformers, so that
tables agree to the last bit. Scalings whose frequencies depend on the length of the sequence (dynamic NTK, longrope)
are fixed by the engine's longest sequence, since keys in the cache are already rotated.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of some layers.

    theta: base of the wavelengths; rotary_dim: leading features of a head that rotate; max_positions: the model's
    `max_position_embeddings`; scaling: Hugging Face's `rope_scaling` (classic keys, `rope_type` set), empty for none.
    Raises ValueError.
    """

    theta: float
    rotary_dim: int
    max_positions: int
    scaling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (isinstance(self.theta, (int, float)) and 1 < self.theta < 1e18):
            raise ValueError(f"rope_theta is {self.theta!r}; allowed: a number above 1 and below 1e18.")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"The rotary dimension is {self.rotary_dim}; allowed: an even number from 2.")
        if self.kind not in SCALINGS:
            raise ValueError(f"rope_scaling.rope_type is {self.kind!r}; supported: {', '.join(sorted(SCALINGS))}.")
        SCALINGS[self.kind](self, self.max_positions)

    @property
    def kind(self) -> str:
        return str(self.scaling.get("rope_type", "default"))

    def number(self, key: str, default: float | None = None, low: float = 0.0) -> float:
        """A number above `low` and below 1e9 from `scaling`."""
        value = self.scaling.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < 1e9:
            raise ValueError(
                f"rope_scaling.{key} of a {self.kind!r} rope is {value!r}; "
                f"allowed: a number above {low:g} and below 1e9."
            )
        return value

    def factors(self, key: str) -> Tensor:
        """One positive divisor for each pair of features, from `scaling`."""
        value = self.scaling.get(key)
        pairs = self.rotary_dim // 2
        if not isinstance(value, (list, tuple)) or len(value) != pairs:
            given = f"{len(value)} numbers" if isinstance(value, (list, tuple)) else repr(value)
            raise ValueError(f"rope_scaling.{key} holds {given}; allowed: a list of {pairs} positive numbers.")
        if not all(isinstance(x, (int, float)) and 0 < x < math.inf for x in value):
            raise ValueError(f"rope_scaling.{key} holds a number that is not positive and finite.")
        return torch.tensor(value, dtype=torch.float32)

    @property
    def original_positions(self) -> float:
        """The context the model was trained on before it was extended."""
        return self.number("original_max_position_embeddings", self.max_positions, low=1)


def rope_table(spec: RopeSpec, positions: int, device: torch.device | str = "cpu") -> Tensor:
    """[positions, rotary_dim] float32: cosines then sines, rotary_dim / 2 each, times the attention factor."""
    frequencies, attention = SCALINGS[spec.kind](spec, positions)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.cos() * attention, angles.sin() * attention), dim=1).to(device)


def turned_rows(table: Tensor, places: Tensor, sections: tuple[int, ...]) -> Tensor:
    """Rows like those of `rope_table` for tokens that stand in several dimensions: places [M, axes] int64; of each
    head's pairs of features the first sections[0] turn by the first axis, and so on -> [M, rotary_dim].
    """
    pairs = torch.arange(sum(sections), device=table.device)
    axes = torch.repeat_interleave(torch.tensor(sections, device=table.device))
    at = places[:, axes]
    return torch.cat([table[at, pairs], table[at, pairs + len(pairs)]], dim=1)


def exponents(spec: RopeSpec) -> Tensor:
    return torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim


def default(spec: RopeSpec, positions: int) -> tuple[Tensor, float]:
    return 1.0 / (spec.theta ** exponents(spec)), 1.0


def linear(spec: RopeSpec, positions: int) -> tuple[Tensor, float]:
    """Position interpolation: every frequency divided by the factor."""
    return default(spec, positions)[0] / spec.number("factor"), 1.0


def dynamic(spec: RopeSpec, positions: int) -> tuple[Tensor, float]:
    """Dynamic NTK: beyond the model's positions the base grows with the longest sequence; up to them it does not."""
    factor = spec.number("factor")
    if spec.rotary_dim <= 2:
        raise ValueError(f"A dynamic rope needs a rotary dimension from 4; it is {spec.rotary_dim}.")
    growth = factor * max(positions, spec.max_positions) / spec.max_positions - (factor - 1)
    base = spec.theta * growth ** (spec.rotary_dim / (spec.rotary_dim - 2))
    return 1.0 / (base ** exponents(spec)), 1.0


def llama3(spec: RopeSpec, positions: int) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between blended."""
    factor, low, high = (spec.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise ValueError(f"rope_scaling.high_freq_factor is {high:g}; allowed: more than low_freq_factor, {low:g}.")
    original = spec.original_positions
    plain, _ = default(spec, positions)
    wavelength = 2 * math.pi / plain
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * plain / factor + blend * plain
    scaled = torch.where(wavelength > original / low, plain / factor, plain)
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, blended, scaled), 1.0


def yarn(spec: RopeSpec, positions: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023): a ramp over the features from kept to interpolated frequencies, sharper attention."""
    original = spec.original_positions
    factor = spec.number("factor", spec.max_positions / original)
    powers = spec.theta ** exponents(spec)

    def feature(rotations: float) -> float:
        return spec.rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = feature(spec.number("beta_fast", 32)), feature(spec.number("beta_slow", 1))
    if spec.scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    ramp = ((torch.arange(spec.rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep, yarn_attention(spec, factor)


def yarn_attention(spec: RopeSpec, factor: float) -> float:
    def sharpness(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if spec.scaling.get("attention_factor") is not None:
        return spec.number("attention_factor")
    if spec.scaling.get("mscale") and spec.scaling.get("mscale_all_dim"):
        return sharpness(spec.number("mscale")) / sharpness(spec.number("mscale_all_dim"))
    return sharpness(1.0)


def longrope(spec: RopeSpec, positions: int) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al., 2024): divisors for each pair of features.

    An engine whose longest sequence exceeds the original context uses the long set for every sequence, another the
    short set.
    """
    original = spec.original_positions
    factor = spec.number("factor", spec.max_positions / original)
    short, long = spec.factors("short_factor"), spec.factors("long_factor")
    divisors = long if positions > original else short
    if spec.scaling.get("attention_factor") is not None:
        attention = spec.number("attention_factor")
    else:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0 / (divisors * spec.theta ** exponents(spec)), attention


def divided(spec: RopeSpec, positions: int) -> tuple[Tensor, float]:
    """Divisors read from a GGUF file, which bakes llama3 and similar scalings into one list."""
    return 1.0 / (spec.factors("factors") * spec.theta ** exponents(spec)), 1.0


# Each gives (frequencies [rotary_dim / 2] float32, factor on cosines and sines) for an engine's longest sequence.
SCALINGS: dict[str, Callable[[RopeSpec, int], tuple[Tensor, float]]] = {
    "default": default,
    "linear": linear,
    "dynamic": dynamic,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
    "factors": divided,
}
