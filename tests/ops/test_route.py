"""Routers: picks and weights against a plain reading of each family's rule, and numbers that do not go together."""

import math
import random
from typing import Any

import pytest
import torch

from tenfold.ops.route import Routing, route, sigmoid

RULES: dict[str, dict[str, Any]] = {
    "olmoe": {"top": 3},
    "mixtral": {"top": 2, "normed": True},
    "deepseek-v2": {"top": 4, "groups": 4, "kept": 2, "scale": 16.0},
    "deepseek-v3": {"top": 3, "score": "sigmoid", "normed": True, "groups": 4, "kept": 2, "best": 2, "scale": 2.5},
}
EXPERTS = 16


def expected(logits: list[float], rule: Routing) -> dict[int, float]:
    """Weights by expert of one token."""
    if rule.score == "softmax":
        powers = [math.exp(v - max(logits)) for v in logits]
        scores = [p / sum(powers) for p in powers]
    else:
        scores = [1 / (1 + math.exp(-v)) for v in logits]
    bias = [0.0] * rule.experts if rule.bias is None else rule.bias.tolist()
    choice = {e: s + b for e, (s, b) in enumerate(zip(scores, bias))}
    each = rule.experts // rule.groups
    groups = {g: sorted((choice[e] for e in range(g * each, (g + 1) * each)), reverse=True) for g in range(rule.groups)}
    kept = sorted(groups, key=lambda g: -sum(groups[g][: rule.best]))[: rule.kept]
    picks = sorted((e for e in choice if e // each in kept), key=lambda e: -choice[e])[: rule.top]
    whole = sum(scores[e] for e in picks) if rule.normed else 1.0
    return {e: scores[e] / whole * rule.scale for e in picks}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_picks_follow_the_rule(name: str, bias: bool) -> None:
    draw = torch.Generator().manual_seed(len(name))
    added = torch.randn(EXPERTS, generator=draw) * 0.3 if bias else None
    rule = Routing(EXPERTS, **RULES[name], bias=added)
    logits = torch.randn(50, EXPERTS, generator=draw) * 2
    ids, weights = route(logits, rule)
    assert ids.shape == weights.shape == (50, rule.top)
    assert weights.dtype == torch.float32
    for row, own, given in zip(logits.tolist(), ids.tolist(), weights.tolist()):
        assert dict(zip(own, given)) == pytest.approx(expected(row, rule), rel=1e-5)


def test_no_token_is_no_trouble() -> None:
    ids, weights = route(torch.empty(0, 8), Routing(8, 2, groups=2, kept=1))
    assert ids.shape == weights.shape == (0, 2)


def test_a_sigmoid_does_not_depend_on_its_neighbours() -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(1))
    whole = sigmoid(x)
    assert whole.dtype == x.dtype
    draw = random.Random(2)
    for _ in range(200):
        start = draw.randrange(len(x))
        end = draw.randint(start + 1, len(x))
        assert torch.equal(sigmoid(x[start:end].clone()), whole[start:end])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"score": "relu"}, "softmax, sigmoid"),
        ({"top": 0}, "1 to 16"),
        ({"top": 17}, "1 to 16"),
        ({"groups": 3}, "equal groups"),
        ({"groups": 4, "kept": 5}, "at most all"),
        ({"groups": 4, "kept": 1, "top": 5}, "1 to 4"),
        ({"groups": 8, "best": 3, "kept": 2}, "1 to 2"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Routing(EXPERTS, **({"top": 2} | wrong))
