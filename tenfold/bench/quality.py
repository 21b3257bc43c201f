"""How far a way of computing a model is from dense float32: perplexity, KL divergence and agreement on one text."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexities, mean KL(reference || candidate) in nats, and the share of equal best tokens."""

    tokens: int
    reference_perplexity: float
    perplexity: float
    kl: float
    agreement: float

    @property
    def perplexity_change(self) -> float:
        """Relative change, 0.01 for one percent."""
        return self.perplexity / self.reference_perplexity - 1


def windows(tokens: Sequence[int], size: int, count: int) -> Iterator[Sequence[int]]:
    """The first `count` windows of `size` tokens. Raises ValueError when the text is too short for one."""
    if len(tokens) < size:
        raise ValueError(
            f"The text has {len(tokens)} tokens; one window needs {size}. Give a longer text or a smaller window."
        )
    for start in range(0, min(len(tokens) - size + 1, size * count), size):
        yield tokens[start : start + size]


def compare(reference: Any, candidate: Any, pieces: Sequence[Sequence[int]]) -> Quality:
    """Both are functions from token ids to logits [T, vocabulary] in float32; each piece is judged on its own."""
    totals = torch.zeros(4, dtype=torch.float64)
    count = 0
    for piece in pieces:
        expected, found = reference(piece)[:-1], candidate(piece)[:-1]
        totals += _sums(expected, found.to(expected.device), torch.tensor(piece[1:], device=expected.device)).cpu()
        count += len(piece) - 1
    reference_nll, nll, kl, agree = (totals / count).tolist()
    return Quality(count, math.exp(reference_nll), math.exp(nll), kl, agree)


def _sums(expected: Tensor, found: Tensor, targets: Tensor) -> Tensor:
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    at = targets[:, None]
    kl = (p.exp() * (p - q)).sum()
    same = (p.argmax(-1) == q.argmax(-1)).sum()
    return torch.stack([-p.gather(1, at).sum(), -q.gather(1, at).sum(), kl, same.double()])
