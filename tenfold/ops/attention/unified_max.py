"""Softmax arms, and the choice of a unified maximum phi for each head (FlashDecoding++, section 3).

softmax(x) = exp(x - phi) / sum(exp(x - phi)) for any phi. With one phi for all parts of a context the parts need
nothing from each other but two sums at the end. phi is in units of the scores as the softmax sees them: scaled and
capped, natural logarithm.

Only the largest score m of a row decides whether phi serves it: what lies far below m vanishes in any softmax. A row is
served when its sum of exp(x - phi), between exp(m - phi) and L * exp(m - phi) for a context of L, neither vanishes nor
overflows; other rows are computed again with a running maximum, so phi may change the time, never the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# online: the running maximum is subtracted. lazy: it is replaced only when exceeded by more than 2^8. unified: phi is
# subtracted and the sums are tested once, at the end. paper: as unified, and any score outside (low, high) around phi
# also sends its row to the recomputation.
SOFTMAX = ("online", "lazy", "unified", "paper")

LEAST_LOG2, MOST_LOG2 = -100.0, 100.0  # of a served row's sum of exp(x - phi)
NARROW_LEAST_LOG2, NARROW_MOST_LOG2 = -4.0, 15.9  # the same where weights are float16: 2^16 overflows
PAPER_LOG2 = 60.0  # the guard of "paper", around phi; the paper gives no values
NARROW_PAPER_LOG2 = 15.0
LONGEST = 1 << 17  # tokens of context that a chosen phi must serve
LN2 = math.log(2.0)


@dataclass(frozen=True, slots=True)
class Guard:
    """When a row of a unified arm is computed again, in log2 units: where its sum is not in (2^least, 2^most), and for
    "paper" where a score is not in (low, high) around phi.
    """

    least: float
    most: float
    low: float
    high: float


def guard(dtype: torch.dtype, around: float | None = None) -> Guard:
    """The guard for weights of a type. around: the paper's, in natural units; None: as wide as is safe."""
    narrow = dtype == torch.float16
    least, most = (NARROW_LEAST_LOG2, NARROW_MOST_LOG2) if narrow else (LEAST_LOG2, MOST_LOG2)
    paper = (NARROW_PAPER_LOG2 if narrow else PAPER_LOG2) if around is None else around / LN2
    return Guard(least, most, -paper, paper)


@dataclass(frozen=True, slots=True)
class Window:
    """The row maxima that a phi serves: from phi + low to phi + high, natural units."""

    low: float
    high: float

    @property
    def width(self) -> float:
        return self.high - self.low


def window(dtype: torch.dtype, longest: int = LONGEST) -> Window:
    """Row maxima m for which phi surely serves contexts of up to `longest` tokens: exp(m - phi) is above the least sum
    and longest * exp(m - phi) below the most. float16 weights overflow one by one, so their bound has no longest.
    """
    g = guard(dtype)
    spread = 0.0 if dtype == torch.float16 else math.log(longest)
    return Window(g.least * LN2, g.most * LN2 - spread)


def choose_phi(low: Tensor, high: Tensor, safe: Window) -> Tensor:
    """The phi that leaves row maxima from low to high [...] the same room on both sides of the window."""
    return (low + high) / 2 - (safe.low + safe.high) / 2


def served(low: Tensor, high: Tensor, phi: Tensor, safe: Window) -> Tensor:
    """Whether all row maxima from low to high lie in phi's window."""
    return (low - phi >= safe.low) & (high - phi <= safe.high)


def passes(scores: Sequence[float], phi: float, low: float, high: float) -> bool:
    """The paper's guard on one row: low < x - phi < high for every score."""
    return all(low < x - phi < high for x in scores)
