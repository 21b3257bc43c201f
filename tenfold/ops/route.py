"""Which experts a token goes to, and with what weight: routers of all mixture-of-experts families in one meaning."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

SCORES = ("softmax", "sigmoid")
TINY = 1e-20  # beside a sum that weights are divided by


@dataclass(frozen=True, slots=True)
class Routing:
    """How scores of `experts` become the `top` picks of a token.

    score: of SCORES, over all experts. bias [experts] float32: added to scores for the choice alone (DeepSeek-V3).
    groups > 1: experts lie in so many equal groups, of which only the `kept` best take part, a group being as good as
    the sum of its `best` highest scores. normed: weights of a token sum to 1; scale multiplies them in the end. Raises
    ValueError for numbers that do not go together.
    """

    experts: int
    top: int
    score: str = "softmax"
    normed: bool = False
    scale: float = 1.0
    groups: int = 1
    kept: int = 1
    best: int = 1
    bias: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"A router's score is {self.score!r}; allowed: {', '.join(SCORES)}.")
        if self.experts % self.groups or not 1 <= self.kept <= self.groups:
            raise ValueError(
                f"{self.experts} experts in {self.groups} groups of which {self.kept} take part; allowed: equal "
                "groups, of which at least one takes part and at most all."
            )
        each = self.experts // self.groups
        if not 1 <= self.top <= self.kept * each:
            raise ValueError(
                f"A token goes to {self.top} experts; allowed: 1 to {self.kept * each}, those to pick from."
            )
        if not 1 <= self.best <= each:
            raise ValueError(f"A group is judged by {self.best} experts and has {each}; allowed: 1 to {each}.")


def route(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """logits [T, experts] float32 -> ids [T, top] int64 of different experts in no order, weights [T, top] float32."""
    scores = logits.softmax(-1) if routing.score == "softmax" else sigmoid(logits)
    choice = scores if routing.bias is None else scores + routing.bias
    if routing.groups > 1:
        choice = choice.masked_fill(~_taking_part(choice, routing), float("-inf"))
    ids = choice.topk(routing.top, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    if routing.normed:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    return ids, weights * routing.scale if routing.scale != 1.0 else weights


def sigmoid(x: Tensor) -> Tensor:
    """The same of a number wherever it stands: on CPUs PyTorch's own differs in the last bit between whole vectors and
    what is left over, so that a token's would depend on how many others there are.
    """
    return x.double().sigmoid().to(x.dtype)


def _taking_part(choice: Tensor, routing: Routing) -> Tensor:
    """Whether each expert [T, experts] is in one of the best groups of its token."""
    each = routing.experts // routing.groups
    groups = choice.view(-1, routing.groups, each).topk(routing.best, dim=-1).values.sum(-1)
    kept = torch.zeros_like(groups, dtype=torch.bool)
    kept.scatter_(1, groups.topk(routing.kept, dim=-1, sorted=False).indices, True)
    return kept.repeat_interleave(each, dim=1)
