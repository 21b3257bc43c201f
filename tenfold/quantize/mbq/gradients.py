"""What tokens of pictures and of answers are worth: the mean magnitude of the loss's gradient by the outputs of a
layer's attention and of its MLP, over either kind of token (MBQ, sections 3.2 and 4.1).
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.quantize.mbq.subject import MODALITIES, Batch, Subject

HOOKS = {"attention": "out", "mlp": "down"}  # the matrix whose outputs are looked at
FLOORS = ("median", "none")


@dataclass(frozen=True, slots=True)
class Magnitude:
    """Mean |gradient| of one output, over tokens of pictures and of answers, mean over samples."""

    vision: float
    answer: float

    @property
    def ratio(self) -> float:
        """1 where there are no pictures, or no gradient to compare with."""
        return self.vision / self.answer if self.answer > 0 and math.isfinite(self.vision) else 1.0


Magnitudes = dict[str, list[Magnitude]]  # by part of HOOKS, of each layer


def magnitudes(
    subject: Subject, batches: Sequence[Batch], progress: Callable[[int, int], None] | None = None
) -> Magnitudes:
    """Of every layer. The loss of a sample is that of its answer; samples do not touch each other."""
    kernels = subject.kernels
    found: dict[tuple[str, str, int], list[float]] = {}
    kernels.tracking = True
    try:
        for number, batch in enumerate(batches):
            for key, values in _of_batch(subject, batch).items():
                found.setdefault(key, []).extend(values)
            if progress is not None:
                progress(number + 1, len(batches))
    finally:
        kernels.tracking, kernels.outputs = False, {}
    made: Magnitudes = {}
    for part in HOOKS:
        made[part] = [
            Magnitude(*(_mean(found[part, modality, layer]) for modality in MODALITIES))
            for layer in range(subject.layers)
        ]
    return made


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _of_batch(subject: Subject, batch: Batch) -> dict[tuple[str, str, int], list[float]]:
    seen: dict[tuple[str, int], Tensor] = {}

    def keep(key: tuple[str, int]) -> Callable[[Tensor], None]:
        def watch(y: Tensor) -> None:
            y.retain_grad()
            seen[key] = y

        return watch

    subject.kernels.outputs = {
        id(subject.linear(layer, matrix).weight): keep((part, layer))
        for layer in range(subject.layers)
        for part, matrix in HOOKS.items()
    }
    with torch.enable_grad():
        loss: Any = subject.losses(batch, subject.model.forward(batch.step)).sum()
        loss.backward()
    found: dict[tuple[str, str, int], list[float]] = {}
    for (part, layer), y in seen.items():
        assert y.grad is not None
        each = y.grad.abs().mean(-1)
        for modality in MODALITIES:
            found[part, modality, layer] = batch.mean(each, modality).tolist()
    return found


def ratios(found: Magnitudes, floor: str = "median", balance: bool = True) -> dict[str, list[float]]:
    """What a token of a picture counts in each layer where one of an answer counts 1. floor: "median", no layer counts
    less than the middle one of its part (as published), or "none". balance: without it all count 1.
    """
    if floor not in FLOORS:
        raise ValueError(f"floor is {floor!r}; allowed: {', '.join(FLOORS)}.")
    made = {}
    for part, own in found.items():
        each = [one.ratio if balance else 1.0 for one in own]
        least = statistics.median(each) if floor == "median" else 0.0
        made[part] = [max(one, least) for one in each]
    return made
