"""Measurements: several samples of one figure, and ratios of two figures measured in turn."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """Samples of one quantity, in the order taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        return min(self.samples), max(self.samples)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """ours / theirs pair by pair: sample i of both was taken in the same round, so a drift of the machine cancels."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} and {len(theirs)} samples do not pair; take one of each a round.")
    return Figure(tuple(a / b for a, b in zip(ours, theirs)))


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of y over x by least squares; 0.0 where all x are the same."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / spread if spread else 0.0
