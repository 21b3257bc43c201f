"""What tokens of pictures, of answers and of prompts are worth: the mean magnitude of the loss's gradient by the
outputs of a layer's attention and of its MLP, over each kind of token (MBQ, sections 3.2 and 4.1, has the first two).
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.quantize.mbq.subject import KINDS, Batch, Subject

HOOKS = {"attention": "out", "mlp": "down"}  # the matrix whose outputs are looked at
FLOORS = ("median", "none")
WEIGHINGS = ("alike", "answers", "kinds", "squares")


@dataclass(frozen=True, slots=True)
class Kinds:
    """A number for tokens of each kind (see `Batch`)."""

    vision: float = 0.0
    answer: float = 0.0
    said: float = 0.0
    rest: float = 0.0

    def weights(self, batch: Batch) -> Tensor:
        """[T] float32: of each token its kind's. One of several kinds has the sum, padding 0."""
        return torch.stack([getattr(self, kind) * getattr(batch, kind).float() for kind in KINDS]).sum(0)


ALIKE = Kinds(vision=1.0, said=1.0, rest=1.0)


@dataclass(frozen=True, slots=True)
class Magnitude:
    """Of the gradient by one output, over tokens of each kind, mean over samples: mean magnitude and mean square."""

    size: Kinds
    square: Kinds

    @property
    def ratio(self) -> float:
        """Of a picture's token to one of an answer."""
        return _ratio(self.size.vision, self.size.answer)

    def worth(self, weigh: str) -> Kinds:
        """What tokens count, without a floor. weigh: "alike", all 1; "answers", as published, those of answers 1, of
        pictures by the size of their gradient, of prompts nothing; "kinds", those after which an answer's token is said
        1, of pictures and the rest by size; "squares", the same by the mean square.
        """
        if weigh == "alike":
            return ALIKE
        if weigh == "answers":
            return Kinds(vision=self.ratio, answer=1.0)
        own = self.square if weigh == "squares" else self.size
        return Kinds(vision=_ratio(own.vision, own.said), said=1.0, rest=_ratio(own.rest, own.said))


def _ratio(of: float, to: float) -> float:
    """1 where there is no such token, or no gradient to compare with."""
    return of / to if to > 0 and math.isfinite(of) else 1.0


Magnitudes = dict[str, list[Magnitude]]  # by part of HOOKS, of each layer
Key = tuple[str, str, int, int]  # part, kind, layer, power
Directions = dict[str, list[list[Tensor]]]  # gradients [T, hidden] by part, layer and batch, in the host's memory
Progress = Callable[[int, int], None]


def magnitudes(subject: Subject, batches: Sequence[Batch], progress: Progress | None = None) -> Magnitudes:
    """Of every layer. The loss of a sample is that of its answer; samples do not touch each other."""
    found: dict[Key, list[float]] = {}
    for batch, gradients in _backward(subject, batches, progress):
        for (part, layer), gradient in gradients.items():
            for power in (1, 2):
                each = gradient.double().abs().pow(power).mean(-1)
                for kind in KINDS:
                    found.setdefault((part, kind, layer, power), []).extend(batch.mean(each, kind).tolist())
    made: Magnitudes = {}
    for part in HOOKS:
        made[part] = [
            Magnitude(*(Kinds(*(_mean(found[part, kind, layer, power]) for kind in KINDS)) for power in (1, 2)))
            for layer in range(subject.layers)
        ]
    return made


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def directions(subject: Subject, batches: Sequence[Batch], progress: Progress | None = None) -> Directions:
    """The gradients themselves: as many numbers as samples have tokens, for every feature of two outputs a layer."""
    made: Directions = {part: [[] for _ in range(subject.layers)] for part in HOOKS}
    for _, gradients in _backward(subject, batches, progress):
        for (part, layer), gradient in gradients.items():
            made[part][layer].append(gradient.cpu())
    return made


def _backward(
    subject: Subject, batches: Sequence[Batch], progress: Progress | None
) -> Iterator[tuple[Batch, dict[tuple[str, int], Tensor]]]:
    """Gradients by part and layer, of one batch after the other."""
    kernels = subject.kernels
    kernels.tracking = True
    try:
        for number, batch in enumerate(batches):
            yield batch, _of_batch(subject, batch)
            if progress is not None:
                progress(number + 1, len(batches))
    finally:
        kernels.tracking, kernels.outputs = False, {}


def _of_batch(subject: Subject, batch: Batch) -> dict[tuple[str, int], Tensor]:
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
    found = {}
    for key, y in seen.items():
        assert y.grad is not None
        found[key] = y.grad
    return found


def worths(found: Magnitudes, weigh: str = "answers", floor: str = "") -> dict[str, list[Kinds]]:
    """What tokens count in each layer, by part. weigh: one of WEIGHINGS, see `Magnitude.worth`. floor: "median", what a
    kind counts is no less in any layer than in the middle one of its part, or "none"; empty, as published: median for
    "answers", else none.
    """
    floor = floor or ("median" if weigh == "answers" else "none")
    if floor not in FLOORS:
        raise ValueError(f"floor is {floor!r}; allowed: {', '.join(FLOORS)}.")
    made = {}
    for part, own in found.items():
        each = [one.worth(weigh) for one in own]
        middle = {kind: statistics.median(getattr(one, kind) for one in each) for kind in KINDS}
        least = middle if floor == "median" else dict.fromkeys(KINDS, 0.0)
        made[part] = [Kinds(**{kind: max(getattr(one, kind), least[kind]) for kind in KINDS}) for one in each]
    return made
