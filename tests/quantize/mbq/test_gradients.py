"""Gradients are transformers' own, in float64; batches change nothing; ratios have their floor."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.quantize.mbq.gradients import ALIKE, HOOKS, Kinds, Magnitude, directions, magnitudes, worths
from tenfold.quantize.mbq.subject import Subject
from tenfold.weights.open import open_checkpoint
from tests.quantize.mbq.conftest import Seeing, samples_of
from tests.vision import SPECIAL, TINY, reference


def theirs(name: str, folder: Path, sample: Any) -> dict[tuple[str, int, str], tuple[float, float]]:
    """Mean magnitude and mean square of the gradients by the outputs of o_proj and down_proj by transformers, given
    what our tower saw.
    """
    model = reference(folder, TINY[name].family)
    inner = model.double()
    text = inner.model.language_model if hasattr(inner.model, "language_model") else inner.model.text_model
    outputs: dict[tuple[str, int], torch.Tensor] = {}
    hooks = []

    def keep(key: tuple[str, int]) -> Any:
        def hook(_: Any, __: Any, y: torch.Tensor) -> None:
            y.retain_grad()
            outputs[key] = y

        return hook

    for i, layer in enumerate(text.layers):
        hooks.append(layer.self_attn.o_proj.register_forward_hook(keep(("attention", i))))
        hooks.append(layer.mlp.down_proj.register_forward_hook(keep(("mlp", i))))
    try:
        ids = torch.tensor([sample.tokens])
        subject = Subject(open_checkpoint(folder), dtype=torch.float64)
        embeds = text.embed_tokens(ids).detach()
        seen = torch.cat([subject.features(p) for p in sample.pictures]) if sample.pictures else None
        if seen is not None:
            embeds[0, torch.as_tensor(sample.places)] = seen
        embeds.requires_grad_()
        more: dict[str, Any] = {}
        if sample.turns is not None:
            places = torch.as_tensor(sample.positions).long().expand(3, -1).clone()
            places[:, torch.as_tensor(sample.places)] = torch.as_tensor(sample.turns).T
            more["position_ids"] = places[:, None]
        hidden = text(inputs_embeds=embeds, use_cache=False, **more).last_hidden_state
        logits = inner.lm_head(hidden)[0]
        rows = torch.arange(sample.answer - 1, len(sample.tokens) - 1)
        torch.nn.functional.cross_entropy(logits[rows], ids[0, rows + 1]).backward()
    finally:
        for hook in hooks:
            hook.remove()
        reference.cache_clear()
    places = torch.arange(ids.shape[1])
    masks = {"vision": ids[0] == SPECIAL[TINY[name].mark], "answer": places >= sample.answer}
    masks["said"] = (places >= sample.answer - 1) & (places < ids.shape[1] - 1)
    masks["rest"] = ~masks["vision"] & ~masks["said"]
    found = {}
    for (part, i), y in outputs.items():
        assert y.grad is not None
        for modality, mask in masks.items():
            found[part, i, modality] = float(y.grad[0, mask].abs().mean()), float(y.grad[0, mask].square().mean())
    return found


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "idefics3"])
def test_against_autograd_of_transformers(name: str, seeing: Seeing, pairs: Path) -> None:
    pytest.importorskip("transformers")
    folder = seeing(name)
    sample = samples_of(folder, pairs)[0]
    subject = Subject(open_checkpoint(folder), dtype=torch.float64)
    ours = magnitudes(subject, subject.batches([sample]))
    for (part, layer, modality), (size, square) in theirs(name, folder, sample).items():
        # No answer looks at what comes out of the last layer there.
        nothing = layer == subject.layers - 1 and modality in ("vision", "rest")
        assert (size == 0) == nothing
        own = ours[part][layer]
        assert getattr(own.size, modality) == pytest.approx(size, rel=1e-5), (part, layer, modality)
        assert getattr(own.square, modality) == pytest.approx(square, rel=1e-5), (part, layer, modality)


def test_batches_change_nothing(seeing: Seeing, pairs: Path) -> None:
    folder = seeing("internvl")
    samples = samples_of(folder, pairs)
    subject = Subject(open_checkpoint(folder), dtype=torch.float64)
    together = magnitudes(subject, subject.batches(samples))
    alone = magnitudes(subject, subject.batches(samples[::-1], tokens=1))
    assert len(subject.batches(samples)) < len(subject.batches(samples, tokens=1)) == len(samples)
    for part in HOOKS:
        for one, other in zip(together[part], alone[part]):
            assert asdict(one.size) == pytest.approx(asdict(other.size), rel=1e-6)
            assert asdict(one.square) == pytest.approx(asdict(other.square), rel=1e-6)


def test_directions_are_the_gradients_themselves(seeing: Seeing, pairs: Path) -> None:
    subject = Subject(open_checkpoint(seeing("llava")), dtype=torch.float64)
    (batch,) = batches = subject.batches(samples_of(seeing("llava"), pairs))
    sizes, found = magnitudes(subject, batches), directions(subject, batches)
    for part in HOOKS:
        for magnitude, (gradient,) in zip(sizes[part], found[part], strict=True):
            assert gradient.shape == (len(batch.real), subject.linear(0, "down").weight.rows)
            assert not gradient[~batch.real].any()
            each = batch.mean(gradient.abs().mean(-1), "said")
            assert magnitude.size.said == pytest.approx(float(each.mean()), rel=1e-9)


def test_what_kinds_of_tokens_count() -> None:
    one = Magnitude(size=Kinds(vision=1.0, answer=10.0, said=4.0, rest=2.0), square=Kinds(4.0, 0.0, 16.0, 2.0))
    assert one.worth("alike") == ALIKE
    assert one.worth("answers") == Kinds(vision=0.1, answer=1.0)
    assert one.worth("kinds") == Kinds(vision=0.25, said=1.0, rest=0.5)
    assert one.worth("squares") == Kinds(vision=0.25, said=1.0, rest=0.125)
    unseen = Magnitude(Kinds(math.nan, 1.0, 4.0, 2.0), Kinds(math.nan, 1.0, 0.0, 2.0))
    assert unseen.worth("answers") == Kinds(vision=1.0, answer=1.0)
    assert unseen.worth("kinds") == Kinds(vision=1.0, said=1.0, rest=0.5)
    assert unseen.worth("squares") == ALIKE


def test_no_layer_counts_less_than_the_middle_one() -> None:
    sizes = (1, 10, 20, 9), (3, 10, 20, 8), (5, 10, 20, 2)
    found = {"attention": [Magnitude(Kinds(*size), Kinds()) for size in sizes]}
    published, bare = worths(found)["attention"], worths(found, floor="none")["attention"]
    assert [w.vision for w in published] == [0.3, 0.3, 0.5]
    assert [w.vision for w in bare] == [0.1, 0.3, 0.5]
    assert all((w.answer, w.said, w.rest) == (1.0, 0.0, 0.0) for w in published + bare)
    assert worths(found, "kinds")["attention"][0] == Kinds(0.05, 0.0, 1.0, 0.45)
    kinds = worths(found, "kinds", "median")["attention"]
    assert [(w.vision, w.said, w.rest) for w in kinds] == [(0.15, 1, 0.45), (0.15, 1, 0.4), (0.25, 1, 0.4)]
    assert worths(found, "alike") == {"attention": [ALIKE] * 3}
    with pytest.raises(ValueError, match="floor is 'mean'; allowed: median, none"):
        worths(found, floor="mean")
