"""The search finds what it says: the least weighed difference, the same in whatever order samples come."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tenfold.quantize.mbq.compare import ABLATION
from tenfold.quantize.mbq.fold import NAMES, layer_swaps, swaps_of
from tenfold.quantize.mbq.gradients import ALIKE, Kinds, directions, magnitudes, worths
from tenfold.quantize.mbq.search import (
    METHODS,
    Layer,
    Method,
    candidates,
    distance,
    equalize,
    searched,
    smoothed,
    tried_out,
)
from tenfold.quantize.mbq.subject import Subject
from tenfold.quantize.mbq.trial import Swap
from tenfold.quantize.schemes import parse, round_activations
from tenfold.weights.open import open_checkpoint
from tests.quantize.mbq.conftest import Seeing, samples_of

SCHEME = parse("w3g32z")


def subject_of(seeing: Seeing, name: str = "llava") -> Subject:
    return Subject(open_checkpoint(seeing(name)))


def layer_of(subject: Subject, pairs: Path, number: int = 1, backwards: bool = False) -> Layer:
    samples = samples_of(subject.checkpoint.path, pairs)
    batches = subject.batches(samples[::-1] if backwards else samples, tokens=400)
    found: list[Layer] = []
    subject.walk(
        batches, lambda i, states: found.append(Layer(subject, i, batches, list(states))) if i == number else None
    )
    return replace(found[0], directions=directions(subject, batches))


def test_weights_of_tokens(seeing: Seeing, pairs: Path) -> None:
    subject = subject_of(seeing)
    samples = samples_of(subject.checkpoint.path, pairs)
    for batch in subject.batches(samples, tokens=400):
        alike, weighed = ALIKE.weights(batch), Kinds(vision=0.25, answer=1.0).weights(batch)
        assert torch.equal(alike > 0, batch.real)
        assert set(alike.unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(weighed == 0.25, batch.vision)
        assert torch.equal(weighed == 1, batch.answer)
        assert not (batch.vision & batch.answer).any()
        assert not (batch.answer & ~batch.real).any()
        assert (weighed[batch.real] == 0).any()  # prompts
        three = Kinds(vision=0.25, said=1.0, rest=0.5).weights(batch)
        assert torch.equal(three == 0.25, batch.vision)
        assert torch.equal(three == 0.5, batch.rest)
        assert torch.equal(three > 0, batch.real)
        length = batch.step.max_query
        for own, answer in zip(three.view(-1, length), batch.answer.view(-1, length)):
            places = answer.nonzero()[:, 0]
            assert torch.equal((own == 1).nonzero()[:, 0], places - 1)  # what an answer's token is said after
    whole = subject.batch(samples)
    assert int(whole.vision.sum()) == sum(len(s.places) for s in samples)
    assert int(whole.answer.sum()) == sum(len(s.tokens) - s.answer for s in samples) == len(whole.targets)


def test_distance_is_the_weighed_mean() -> None:
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]), torch.tensor([[0.0, 4.0], [3.0, 1.0], [0.0, 0.0]])
    weights = torch.tensor([1.0, 0.5, 0.0])
    assert distance([a], [b], [weights], "mae") == pytest.approx((3 + 0.5 * 3) / 4)
    assert distance([a], [b], [weights], "mse") == pytest.approx((5 + 0.5 * 9) / 4)
    towards = torch.tensor([[1.0, 1.0], [0.0, 2.0], [5.0, 5.0]])
    assert distance([a], [b], [weights], "fisher", [towards]) == pytest.approx(((1 - 2) ** 2 + 0.5 * 6**2) / 4)
    with pytest.raises(ValueError, match="there are no gradients"):
        distance([a], [b], [weights], "fisher")


@pytest.mark.parametrize("name", [*METHODS, "search mae kinds, propagated", "search fisher alike"])
@pytest.mark.parametrize("scheme", ["w3g32z", "w4a8"])
def test_order_of_samples_changes_nothing(name: str, scheme: str, seeing: Seeing, pairs: Path) -> None:
    subject = subject_of(seeing)
    worth = {"attention": Kinds(0.3, 1.0, rest=0.2), "mlp": Kinds(0.2, 1.0, rest=0.1)}
    method = METHODS[name] if name in METHODS else ABLATION[name]
    made = [equalize(layer_of(subject, pairs, backwards=way), parse(scheme), method, worth) for way in (False, True)]
    assert made[0][1] == made[1][1]
    assert made[0][0].keys() == made[1][0].keys()
    wanted = {"rtn": set(), "smoothquant": {"qkv", "gate_up"}}.get(name, {"qkv", "gate_up", "down"})
    assert set(made[0][0]) == wanted
    for part, scales in made[0][0].items():
        assert torch.equal(scales, made[1][0][part])


@pytest.mark.parametrize("norm", ["mae", "mse"])
@pytest.mark.parametrize("part", ["qkv", "gate_up", "down"])
def test_the_least_loss_is_taken(part: str, norm: str, seeing: Seeing, pairs: Path) -> None:
    """By trying every strength in another way: on the dense model, one token's difference at a time."""
    subject = subject_of(seeing)
    layer = layer_of(subject, pairs)
    states = layer.states if part == "qkv" else layer.middle()
    inputs = layer.inputs(part, states)
    weights = [Kinds(vision=0.3, answer=1.0).weights(batch) for batch in layer.batches]
    scales, loss = searched(layer, part, states, inputs, weights, SCHEME, norm, 20)
    size = torch.cat([x[b.real] for x, b in zip(inputs, layer.batches)]).double().abs().mean(0)
    matrix = subject.linear(1, part)
    exact = matrix.weight.data[0].clone()
    side = "attention" if part == "qkv" else "mlp"

    def outputs() -> list[torch.Tensor]:
        if part == "down":
            return [x @ matrix.weight.data[0].T for x in inputs]
        return [layer.run(side, b, s) for b, s in zip(layer.batches, states)]

    before, least = outputs(), []
    for tried in candidates(size, 20):
        matrix.weight.data[0].copy_(tried_out(exact, tried, SCHEME).weight)
        total = 0.0
        for a, b, weight in zip(before, outputs(), weights):
            power = (a - b).abs() if norm == "mae" else (a - b) ** 2
            total += float((power.double() * weight[:, None]).sum())
        least.append((total, tried))
        matrix.weight.data[0].copy_(exact)
    best = min(least, key=lambda pair: pair[0])
    assert torch.allclose(scales, best[1], rtol=1e-6)
    count = sum(int((w > 0).sum()) for w in weights) * before[0].shape[1]
    assert loss == pytest.approx(best[0] / count, rel=1e-4)
    assert least[0][0] >= best[0]


def test_values_scale_where_heads_have_their_own(seeing: Seeing, pairs: Path) -> None:
    subject = subject_of(seeing)
    spec = subject.model.blocks[0].attention.heads.spec
    assert spec.heads != spec.kv_heads
    scales, _ = equalize(layer_of(subject, pairs), SCHEME, METHODS["awq"], {"attention": ALIKE, "mlp": ALIKE})
    assert "out" not in scales


def test_smoothing_moves_what_is_large(seeing: Seeing, pairs: Path) -> None:
    layer = layer_of(subject_of(seeing), pairs)
    inputs = layer.inputs("qkv", layer.states)
    most = torch.cat([x[b.real] for x, b in zip(inputs, layer.batches)]).abs().amax(0)
    own = layer.subject.weight(1, "qkv").abs().amax(0)
    assert torch.allclose(smoothed(layer, "qkv", inputs, 0.5), (most / own).sqrt(), rtol=1e-5)
    assert torch.allclose(smoothed(layer, "qkv", inputs, 1.0), most, rtol=1e-5)


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "internvl-norms"])
def test_scales_alone_change_nothing(name: str, seeing: Seeing, pairs: Path) -> None:
    """With 8 bits in groups of 32, what scales do beyond rounding would show."""
    subject = subject_of(seeing, name)
    batches = subject.batches(samples_of(seeing(name), pairs))
    scales = {}
    for layer in range(subject.layers):
        scales[layer] = {
            part: torch.rand(subject.linear(layer, part).weight.cols) + 0.5 for part in NAMES if part != "out"
        }
    exact = subject.score(batches)
    got = subject.score(batches, swaps_of(subject, scales, parse("w8g32z")))
    assert got.loss != exact.loss
    assert got.loss == pytest.approx(exact.loss, rel=5e-3)
    assert subject.score(batches) == exact


def test_activations_are_rounded_after_the_division(seeing: Seeing) -> None:
    subject = subject_of(seeing)
    matrix = subject.linear(0, "down")
    scheme, by = parse("w4a8"), torch.rand(matrix.weight.cols) + 0.5
    x = torch.randn(5, matrix.weight.cols)
    subject.kernels.swaps = {id(matrix.weight): (swap := tried_out(subject.weight(0, "down"), by, scheme))}
    assert torch.allclose(matrix(x), round_activations(x / by, scheme) @ swap.weight.T, atol=1e-6)
    subject.kernels.swaps = {}


def test_gradients_weigh_the_search(seeing: Seeing, pairs: Path) -> None:
    """Other weights of tokens, other losses; MBQ with ratios of 1 is not AWQ, as prompts count nothing."""
    subject = subject_of(seeing)
    layer = layer_of(subject, pairs)
    found = magnitudes(subject, layer.batches)
    losses = set()
    for method in [method for method in ABLATION.values() if not method.propagate]:
        own = {part: values[1] for part, values in worths(found, method.weigh).items()}
        assert all(worth.vision > 0 for worth in own.values())
        losses.add(equalize(layer, SCHEME, method, own)[1]["qkv"])
    assert len(losses) == 9


@pytest.mark.parametrize("scheme", ["w3g32z", "w4a8"])
def test_what_is_rounded_already_is_seen(scheme: str, seeing: Seeing, pairs: Path) -> None:
    """Propagated, a part's inputs are those of the model whose matrices before it are rounded, by whole forward passes;
    the first part of the first layer has none before it.
    """
    subject = subject_of(seeing)
    samples = samples_of(subject.checkpoint.path, pairs)
    batches, method = subject.batches(samples, tokens=400), Method("search", propagate=True)
    worth = dict.fromkeys(("attention", "mlp"), ALIKE)
    scales, losses = {}, {}

    def visit(number: int, states: Sequence[torch.Tensor]) -> dict[int, Swap]:
        layer = Layer(subject, number, batches, states)
        scales[number], losses[number] = equalize(layer, parse(scheme), method, worth)
        return layer_swaps(subject, number, scales[number], parse(scheme))

    subject.walk(batches, visit)
    plain = equalize(layer_of(subject, pairs, 0), parse(scheme), Method("search"), worth)
    assert losses[0]["qkv"] == plain[1]["qkv"]
    assert losses[0]["gate_up"] != plain[1]["gate_up"]
    layer, matrix = 1, subject.linear(1, "down")
    swaps = layer_swaps(subject, 0, scales[0], parse(scheme))
    swaps |= layer_swaps(subject, layer, {p: s for p, s in scales[1].items() if p != "down"}, parse(scheme))
    inputs: list[torch.Tensor] = []
    subject.kernels.inputs = {id(matrix.weight): inputs.append}
    swaps.pop(id(matrix.weight))
    subject.score(batches, swaps)
    subject.kernels.inputs = {}
    tried = tried_out(subject.weight(layer, "down"), scales[layer]["down"], parse(scheme))
    exact = [matrix(x) for x in inputs]
    with subject.swapped({id(matrix.weight): tried}):
        rounded = [matrix(x) for x in inputs]
    loss = distance(exact, rounded, [ALIKE.weights(batch) for batch in batches], "mae")
    assert losses[layer]["down"] == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("wrong", [{"norm": "l3"}, {"alpha": 2.0}, {"weigh": "pictures"}])
def test_methods_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        Method("search", **wrong)  # type: ignore[arg-type]
