"""The search of scales: columns of a matrix are multiplied, and what comes in divided, so that what rounding does to
the outputs, each token weighed by what it is worth, becomes least (MBQ, Eq. 13 to 17; AWQ with all tokens alike).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.quantize.mbq.fold import NAMES, Scales, layer_swaps
from tenfold.quantize.mbq.gradients import WEIGHINGS, Directions, Kinds
from tenfold.quantize.mbq.subject import Batch, Subject
from tenfold.quantize.mbq.trial import Swap
from tenfold.quantize.schemes import WIDE, Scheme, round_to_nearest

GRID = 20  # strengths, 0 and up, below 1
NORMS = ("mae", "mse", "fisher")
# Matrices that get scales, and of which layer's part these are: what is looked at is the whole of it, or, of what is
# last there, its own outputs.
GROUPS = {"qkv": "attention", "out": "attention", "gate_up": "mlp", "down": "mlp"}


@dataclass(frozen=True, slots=True)
class Method:
    """How scales are found. kind: "search", "smooth" (SmoothQuant's alpha) or "none"; weigh: what tokens count, see
    `Magnitude.worth`; norm: of differences, absolute, square, or the square of what a token's difference does to the
    loss, its product with the gradient ("fisher"); propagate: whether a matrix is looked at with what
    comes out of all before it once these are rounded, or as the exact model has it.
    """

    kind: str
    weigh: str = "alike"
    norm: str = "mae"
    alpha: float = 0.5
    propagate: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("norm", NORMS), ("weigh", WEIGHINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}.")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; allowed: 0 to 1.")


METHODS = {
    "mbq": Method("search", "answers"),
    "awq": Method("search", norm="mse"),
    "smoothquant": Method("smooth"),
    "rtn": Method("none"),
}


def scalable(subject: Subject, layer: int, part: str) -> bool:
    """Whether something stands before a matrix that can be divided: of out, values of as many heads as it has."""
    spec = subject.model.blocks[layer].attention.heads.spec
    return part != "out" or spec.heads == spec.kv_heads


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer and what goes into it: states [T, hidden] of each batch; directions: gradients, for the norm fisher."""

    subject: Subject
    number: int
    batches: Sequence[Batch]
    states: Sequence[Tensor]
    directions: Directions | None = None

    def gradients(self, side: str) -> list[Tensor] | None:
        """By the outputs of attention or of the MLP, of each batch."""
        if self.directions is None:
            return None
        return [g.to(self.subject.kernels.device) for g in self.directions[side][self.number]]

    def run(self, part: str, batch: Batch, state: Tensor) -> Tensor:
        """The outputs of attention or of the MLP, without the residual."""
        block = self.subject.model.blocks[self.number]
        if part == "attention":
            found: Tensor = block.attention(state, self.subject.model._turn(batch.step), norm=block.attention_norm)
            return found
        found = block.mlp(state, norm=block.mlp_norm)
        return found

    def inputs(self, part: str, states: Sequence[Tensor]) -> list[Tensor]:
        """What the matrices of attention or of the MLP multiply, [T, cols] of each batch, by what goes into it."""
        kernels = self.subject.kernels
        seen: list[Tensor] = []
        kernels.inputs = {id(self.subject.linear(self.number, part).weight): seen.append}
        try:
            for batch, state in zip(self.batches, states):
                self.run(GROUPS[part], batch, state)
        finally:
            kernels.inputs = {}
        return seen

    def middle(self) -> list[Tensor]:
        """What goes into the MLP."""
        return [state + self.run("attention", batch, state) for batch, state in zip(self.batches, self.states)]


def equalize(
    layer: Layer, scheme: Scheme, method: Method, worth: Mapping[str, Kinds], grid: int = GRID
) -> tuple[Scales, dict[str, float]]:
    """Scales of one layer and the losses they leave. worth: what tokens count, by part of the layer."""
    scales: Scales = {}
    losses: dict[str, float] = {}
    if method.kind == "none":
        return scales, losses
    subject = layer.subject
    for part, side in GROUPS.items():
        if not scalable(subject, layer.number, part):
            continue
        before = list(NAMES)[: list(NAMES).index(part)] if method.propagate else ()
        with subject.swapped(layer_swaps(subject, layer.number, scales, scheme, before)):
            states = layer.states if side == "attention" else layer.middle()
            inputs = layer.inputs(part, states)
        if method.kind == "smooth":
            if part in ("qkv", "gate_up"):  # those that a norm stands before
                scales[part] = smoothed(layer, part, inputs, method.alpha)
            continue
        weights = [worth[side].weights(batch) for batch in layer.batches]
        scales[part], losses[part] = searched(layer, part, states, inputs, weights, scheme, method.norm, grid)
    return scales, losses


def smoothed(layer: Layer, part: str, inputs: Sequence[Tensor], alpha: float) -> Tensor:
    """SmoothQuant (arXiv 2211.10438): what is large in inputs goes over into weights, by the power alpha."""
    most = torch.stack([x[b.real].float().abs().amax(0) for x, b in zip(inputs, layer.batches)]).amax(0)
    own = layer.subject.weight(layer.number, part).float().abs().amax(0)
    return (most.clamp(min=1e-5) ** alpha / own.clamp(min=1e-5) ** (1 - alpha)).clamp(1e-4, 1e4)


def sizes(inputs: Sequence[Tensor], batches: Sequence[Batch]) -> Tensor:
    """Mean magnitude of each input feature over all tokens [cols]."""
    sums = torch.stack([x[b.real].double().abs().sum(0) for x, b in zip(inputs, batches)]).sum(0)
    return sums / sum(int(b.real.sum()) for b in batches)


def candidates(size: Tensor, grid: int) -> list[Tensor]:
    """Scales [cols] float32 of each strength, none at all first."""
    found = []
    for i in range(grid):
        tried = size.pow(i / grid).clamp(min=1e-4)
        found.append((tried / (tried.max() * tried.min()).sqrt()).float())
    return found


def searched(
    layer: Layer,
    part: str,
    states: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    scheme: Scheme,
    norm: str,
    grid: int,
) -> tuple[Tensor, float]:
    """The scales of the strength whose loss is least, and that loss: of `part`'s matrix, at the outputs of its side."""
    subject = layer.subject
    matrix = subject.linear(layer.number, part)
    w = subject.weight(layer.number, part).float()
    alone = part in ("out", "down")

    def outputs() -> list[Tensor]:
        if alone:
            return [matrix(x) for x in inputs]
        return [layer.run(GROUPS[part], batch, state) for batch, state in zip(layer.batches, states)]

    exact = outputs()
    gradients = layer.gradients(GROUPS[part]) if norm == "fisher" else None
    best, least = torch.ones(w.shape[1], device=w.device), float("inf")
    for tried in candidates(sizes(inputs, layer.batches), grid):
        with subject.swapped({id(matrix.weight): tried_out(w, tried, scheme)}):
            loss = distance(exact, outputs(), weights, norm, gradients)
        if loss < least:
            best, least = tried, loss
    return best, least


def tried_out(w: Tensor, scales: Tensor, scheme: Scheme) -> Swap:
    """A matrix with scaled columns as it is rounded, for inputs that are divided."""
    rounded = round_to_nearest(w * scales, scheme, WIDE)
    return Swap(rounded / scales, scheme) if scheme.activations == 16 else Swap(rounded, scheme, scales)


def distance(
    exact: Sequence[Tensor],
    found: Sequence[Tensor],
    weights: Sequence[Tensor],
    norm: str,
    gradients: Sequence[Tensor] | None = None,
) -> float:
    """Of outputs [T, rows], differences of a token weighed as it counts [T], the mean: absolute, square, or of the norm
    "fisher" the square of their product with gradients [T, rows].
    """
    if norm == "fisher" and gradients is None:
        raise ValueError("norm is 'fisher' and there are no gradients; give them, or take mae or mse.")
    total = count = 0.0
    for number, (a, b, weight) in enumerate(zip(exact, found, weights)):
        difference = (a - b).float()
        if gradients is not None:
            each = (difference.double() * gradients[number].double()).sum(-1).square()
        else:
            each = (difference.abs() if norm == "mae" else difference.square()).sum(-1, dtype=torch.float64)
        total += float((each * weight).sum())
        count += float((weight > 0).sum()) * a.shape[1]
    return total / max(1.0, count)
