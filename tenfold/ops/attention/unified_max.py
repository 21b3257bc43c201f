"""Softmax arms, and the choice of a unified maximum phi for each head (FlashDecoding++, section 3).

softmax(x) = exp(x - phi) / sum(exp(x - phi)) for any phi. With one phi for all parts of a context the parts need
nothing from each other but two sums at the end. phi is in units of the scores as the softmax sees them: scaled and
capped, natural logarithm.

Only the largest score m of a row decides whether phi serves it: what lies far below m vanishes in any softmax. A row is
served when its sum of exp(x - phi), between exp(m - phi) and L * exp(m - phi) for a context of L, neither vanishes nor
overflows; other rows are computed again with a running maximum, so phi may change the time, never the result.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.ops.kernels import AttentionSpec

LEAST_LOG2, MOST_LOG2 = -100.0, 100.0  # of a served row's sum of exp(x - phi)
# Where weights are float16: below this sum too many of them vanish; above this score a weight is infinite, and the sum.
NARROW_LEAST_LOG2, NARROW_TOP_LOG2 = -4.0, 15.9
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
    least = NARROW_LEAST_LOG2 if narrow else LEAST_LOG2
    paper = (NARROW_PAPER_LOG2 if narrow else PAPER_LOG2) if around is None else around / LN2
    return Guard(least, MOST_LOG2, -paper, paper)


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
    and longest * exp(m - phi) below the most; where weights are float16, each of them must be finite.
    """
    g = guard(dtype)
    high = NARROW_TOP_LOG2 * LN2 if dtype == torch.float16 else g.most * LN2 - math.log(longest)
    return Window(g.least * LN2, high)


def choose_phi(low: Tensor, high: Tensor, safe: Window) -> Tensor:
    """The phi that leaves row maxima from low to high [...] the same room on both sides of the window."""
    return (low + high) / 2 - (safe.low + safe.high) / 2


def served(low: Tensor, high: Tensor, phi: Tensor, safe: Window) -> Tensor:
    """Whether all row maxima from low to high lie in phi's window."""
    return (low - phi >= safe.low) & (high - phi <= safe.high)


def score_bound(spec: AttentionSpec, q_norm: Tensor | None = None, k_norm: Tensor | None = None) -> float:
    """What no score exceeds in magnitude, whatever the text; infinite where nothing bounds it.

    A capped score is below its cap. q_norm, k_norm: weights of RMS norms on the heads, which leave vectors of length at
    most sqrt(head_dim) * max|weight|, rotated or not; a product is at most that of the lengths (Cauchy-Schwarz).
    """
    bound = spec.softcap or math.inf
    if q_norm is not None and k_norm is not None:
        bound = min(bound, spec.scale * spec.head_dim * float(q_norm.abs().max()) * float(k_norm.abs().max()))
    return bound


def proven_phi(bound: float, heads: int, dtype: torch.dtype) -> Tensor | None:
    """phi [heads] that serves all rows of a layer whose scores lie within +-bound, without calibration; None where the
    window for weights of this type is too narrow for a proof.
    """
    safe = window(dtype)
    if 2 * bound > safe.width:
        return None
    low = torch.full((heads,), -bound)
    return choose_phi(low, -low, safe)


STEP = 0.25  # natural units; width of a histogram's bins
BINS = 8192  # around 0; what lies outside counts in the first or last


def visible_scores(q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
    """Scaled, capped scores of one sequence, -inf where a query does not see a key: q [T, group, D], the heads that
    share k [T, D] -> [group, T, T] float32.
    """
    scores = torch.einsum("tgd,sd->gts", q.float(), k.float()) * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    place = torch.arange(len(k), device=k.device)
    hidden = place > place[:, None]
    if spec.window:
        hidden |= place <= place[:, None] - spec.window
    return scores.masked_fill_(hidden, float("-inf"))


def histogram(values: Tensor) -> Tensor:
    """Counts [rows, BINS] int32 of values [rows, N]; infinities are not counted."""
    bins = (values / STEP).floor().nan_to_num(0.0).clamp(-BINS // 2, BINS // 2 - 1).long() + BINS // 2
    counts = torch.zeros(len(values), BINS, dtype=torch.int32, device=values.device)
    return counts.scatter_add_(1, bins, values.isfinite().int())


def quantile(counts: Tensor, share: float, upper: bool) -> Tensor:
    """The edge of the bin, upper or lower, below which `share` of the values lie: counts [..., BINS] -> [...]."""
    total = counts.sum(-1, keepdim=True)
    reached = counts.cumsum(-1) >= torch.clamp((total * share).ceil(), min=1)
    first = reached.int().argmax(-1)
    return (first - BINS // 2 + (1 if upper else 0)) * STEP
