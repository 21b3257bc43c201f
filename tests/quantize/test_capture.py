"""Capturing what experts see, and the sensitivity of their blocks against running the whole layer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tenfold.models.table import build_model
from tenfold.ops.matrix import Bank, Experts, Matrix
from tenfold.ops.route import route
from tenfold.quantize.capture import TextTooShort, Watching, spread, watched
from tenfold.quantize.mxmoe.sensitivity import PARTS, losses
from tenfold.quantize.schemes import Scheme, parse, round_activations, round_to_nearest
from tenfold.weights.load import Weights
from tenfold.weights.open import open_checkpoint
from tests.tiny import VOCAB

SCHEMES = [parse(name) for name in ("w2g8z", "w4g8", "w4g8a8", "fp8a8")]
Folder = Callable[[str], Path]


def windows(count: int = 6, length: int = 70) -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (length,), generator=draw).tolist() for _ in range(count)]


def opened(folder: Path) -> tuple[object, Watching]:
    kernels = Watching()
    checkpoint = open_checkpoint(folder)
    return build_model(checkpoint.config, Weights(checkpoint, kernels), 128), kernels


@pytest.mark.parametrize(("count", "most"), [(127, 64), (128, 64), (64, 64), (5, 64), (1000, 3), (0, 4)])
def test_samples_are_spread_over_all(count: int, most: int) -> None:
    """None twice, from the first on, and between two no gap that is more than one longer than another."""
    found = spread(range(count), most)
    assert len(found) == min(count, most)
    gaps = [b - a for a, b in zip(found, [*found[1:], count])]
    assert found[:1] == [0][:count]
    assert not gaps or max(gaps) - 1 <= min(gaps) > 0


def test_no_samples_are_no_wish() -> None:
    with pytest.raises(ValueError, match="0 samples were asked for; allowed: from 1"):
        spread([1], 0)


@pytest.mark.parametrize("name", ["qwen2-moe", "mixtral", "deepseek-v3"])
def test_every_pick_is_seen_once(name: str, tiny: Folder) -> None:
    model, kernels = opened(tiny(name))
    texts, said = windows(), []
    config = model.config.experts  # type: ignore[attr-defined]
    layers = dict(watched(model, kernels, texts, lambda done, total: said.append((done, total))))  # type: ignore[arg-type]
    assert list(layers) == [i for i, sparse in enumerate(config.layers) if sparse]
    tokens = sum(map(len, texts))
    for seen in layers.values():
        assert sum(s.picks for s in seen) == tokens * config.routing.top
        assert all(s.inputs.count == s.inner.count == s.picks for s in seen)
        assert all(len(s.tokens()[0]) == min(s.picks, 512) for s in seen)
        if config.routing.normed:
            assert sum(s.share for s in seen) == pytest.approx(tokens * config.routing.scale, rel=1e-3)
    count = len(texts) * len(config.layers)
    assert said == [(i + 1, count) for i in range(count)]


def test_capturing_changes_no_answer(tiny: Folder) -> None:
    model, kernels = opened(tiny("qwen3-moe"))
    (seen,) = [s for _, s in watched(model, kernels, windows())]  # type: ignore[arg-type]
    again = dict(watched(model, kernels, windows()))  # type: ignore[arg-type]
    for first, second in zip(seen, next(iter(again.values()))):
        assert torch.equal(first.inputs.sums, second.inputs.sums)


def test_tokens_may_count_differently(tiny: Folder) -> None:
    """Those that count nothing leave no moments, and the others those that they leave when all count; picks stay."""
    model, kernels = opened(tiny("qwen3-moe"))
    texts = windows()
    (whole,) = [s for _, s in watched(model, kernels, texts)]  # type: ignore[arg-type]
    halves = []
    for first in (True, False):
        worth = [torch.tensor([float((i < 30) == first) for i in range(len(text))]) for text in texts]
        (seen,) = [s for _, s in watched(model, kernels, texts, worth=worth)]  # type: ignore[arg-type]
        halves.append(seen)
    for every, one, other in zip(whole, *halves, strict=True):
        assert every.picks == one.picks == other.picks
        assert torch.allclose(one.inputs.sums + other.inputs.sums, every.inputs.sums, atol=1e-4)
        assert torch.allclose(one.inner.sums + other.inner.sums, every.inner.sums, atol=1e-4)
    assert any(not torch.allclose(one.inputs.sums, every.inputs.sums) for every, one in zip(whole, halves[0]))
    assert kernels.worth is None


def test_texts_and_models_that_will_not_do(tiny: Folder) -> None:
    model, kernels = opened(tiny("mixtral"))
    with pytest.raises(TextTooShort, match="has 20 tokens; give one of at least 256"):
        next(watched(model, kernels, [list(range(3, 23))]))  # type: ignore[arg-type]
    dense, kernels = opened(tiny("llama"))
    with pytest.raises(ValueError, match="no experts"):
        next(watched(dense, kernels, windows()))  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["gate_up", "down"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_cheap_sensitivity_is_that_of_the_whole_layer(part: str, scheme: Scheme, tiny: Folder) -> None:
    """The layer of a random model on random tokens, each block of each expert rounded in turn."""
    model, kernels = opened(tiny("mixtral"))
    moe = model.blocks[1].moe  # type: ignore[attr-defined]
    x = torch.randn(90, 64, generator=torch.Generator().manual_seed(4))
    ids, weights = route(torch.randn(90, 4, generator=torch.Generator().manual_seed(5)), moe.routing)
    from tenfold.quantize.capture import Seen
    from tenfold.quantize.gptq import Moments

    kernels.seen = [Seen(Moments(64), Moments(96)) for _ in range(4)]
    exact = kernels.experts(x, ids, weights, moe.experts)
    seen, kernels.seen = kernels.seen, None
    for expert in range(4):
        banks = {"gate_up": moe.experts.gate_up, "down": moe.experts.down}
        each = list(banks[part].each)
        w = round_to_nearest(each[expert].data[0], scheme)
        each[expert] = Matrix("dense", *w.shape, (w,))
        banks[part] = Bank(tuple(each))
        if scheme.activations == 16:
            changed = kernels.experts(x, ids, weights, Experts(banks["gate_up"], banks["down"], moe.experts.act))
        else:
            changed = exact + difference(kernels, x, ids, weights, moe, banks, expert, part, scheme)
        own = moe.experts.gate_up.each[expert].data[0], moe.experts.down.each[expert].data[0]
        schemes = {key: [scheme] for key in PARTS}
        found = losses(seen[expert], *own, moe.experts.act, schemes, lambda w, s, _: round_to_nearest(w, s))
        assert found[part, str(scheme)] == pytest.approx(float((changed - exact).square().sum()), rel=1e-3)


def difference(
    kernels: Watching, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, moe: object, banks: dict[str, Bank],
    expert: int, part: str, scheme: Scheme,
) -> torch.Tensor:  # fmt: skip
    """What one expert's output changes by where its inputs are rounded too."""
    out = torch.zeros_like(x)
    rows, slots = (ids == expert).nonzero(as_tuple=True)
    own, layer = x[rows], moe.experts  # type: ignore[attr-defined]
    act = layer.act
    exact = kernels.linear(kernels.linear(own, layer.gate_up.each[expert], act=act), layer.down.each[expert])
    if part == "gate_up":
        own = round_activations(own, scheme)
    inner = kernels.linear(own, banks["gate_up"].each[expert], act=act)
    if part == "down":
        inner = round_activations(inner, scheme)
    out[rows] = (kernels.linear(inner, banks["down"].each[expert]) - exact) * weights[rows, slots, None]
    return out
