"""How good probabilities are: accuracy, F1, calibration, and the temperature that makes them mean what they say."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.models.sentiment.folder import TEMPERATURES

BINS = 15  # of confidence, as in Guo et al. 2017
STEPS = 80  # of the search for a temperature, each of which narrows it by a third


@dataclass(frozen=True, slots=True)
class Scores:
    """Of probabilities against labels. confusion [truth][guess]: counts. ece: expected calibration error; brier: mean
    squared distance to the truth; nll: mean negative log-likelihood, natural.
    """

    posts: int
    accuracy: float
    f1_weighted: float
    f1_macro: float
    ece: float
    brier: float
    nll: float
    confusion: list[list[int]]

    def as_json(self) -> Mapping[str, Any]:
        return asdict(self)


def score(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Scores:
    """logits [N, C], labels [N] int64; N from 1."""
    logs = (logits.double() / temperature).log_softmax(-1)
    probabilities = logs.exp()
    table = confusion(logits.argmax(-1), labels, logits.shape[-1])
    f1, counts = f1_each(table), table.sum(1)
    truth = F.one_hot(labels, logits.shape[-1])
    return Scores(
        posts=len(labels),
        accuracy=float(table.diagonal().sum() / table.sum()),
        f1_weighted=float((f1 * counts).sum() / counts.sum()),
        f1_macro=float(f1.mean()),
        ece=ece(probabilities, labels),
        brier=float((probabilities - truth).square().sum(-1).mean()),
        nll=float(-logs.gather(1, labels[:, None]).mean()),
        confusion=table.long().tolist(),
    )


def confusion(guesses: Tensor, labels: Tensor, classes: int) -> Tensor:
    """[truth, guess] float64: how often."""
    flat = torch.bincount(labels * classes + guesses, minlength=classes * classes)
    return flat.view(classes, classes).double()


def f1_each(table: Tensor) -> Tensor:
    """F1 of each class of a confusion [truth, guess]; 0 where it neither is nor is guessed."""
    hits = table.diagonal()
    return 2 * hits / (table.sum(0) + table.sum(1)).clamp(min=1)


def ece(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Mean distance between how sure a guess is and how often such guesses are right (Guo et al. 2017, equation 3)."""
    sure, guesses = probabilities.max(-1)
    right = (guesses == labels).double()
    place = (sure * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right - sure.double())
    return float(gaps.abs().sum() / len(labels))


def expected_ece(sure: Tensor, bins: int = BINS, draws: int = 2000, seed: int = 0) -> float:
    """The `ece` that chance alone gives: its mean over `draws`, in each of which every guess is right with just the
    probability that it says. sure [N]: that probability. Few posts in a bin are rarely right as often as they should
    be, so it is far from 0 where N is small.
    """
    sure = sure.double()
    place = ((sure * bins).ceil().long().clamp(1, bins) - 1).expand(draws, -1)
    chance = torch.rand(draws, len(sure), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    gaps = torch.zeros(draws, bins, dtype=torch.float64).scatter_add_(1, place, (chance < sure).double() - sure)
    return float(gaps.abs().sum(1).mean() / len(sure))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature of least negative log-likelihood, within TEMPERATURES. As a function of 1 / T it is convex, so
    the search closes in on its only minimum.
    """

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(logits.double() / math.exp(log_t), labels))

    low, high = (math.log(bound) for bound in TEMPERATURES)
    for _ in range(STEPS):
        third = (high - low) / 3
        if loss(low + third) <= loss(high - third):
            high -= third
        else:
            low += third
    return math.exp((low + high) / 2)
